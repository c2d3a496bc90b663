"""1F1B: the order in which pipeline stages run their micro-batches.

A stage starts with as many forward passes as stages come after it, then takes
one forward and one backward pass in turn. So it never holds activations of
more micro-batches than there are stages from it to the end.

Reference: Narayanan et al., 2021, https://arxiv.org/abs/2104.04473
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from warpmap.trace import Frame, Lanes, Mark, Span, Trace

Pass = Literal["F", "B"]


class Work(NamedTuple):
    """One pass of one micro-batch through one stage, and when."""

    stage: int
    kind: Pass
    micro_batch: int
    start: float
    end: float


def order(
    stage: int, stages: int, micro_batches: int
) -> list[tuple[Pass, int]]:
    """What one stage does, in turn.

    Examples:
        >>> [f"{kind}{at}" for kind, at in order(0, 2, 3)]
        ['F0', 'F1', 'B0', 'F2', 'B1', 'B2']
    """
    ahead = min(stages - stage - 1, micro_batches)
    passes: list[tuple[Pass, int]] = [("F", at) for at in range(ahead)]
    for at in range(micro_batches - ahead):
        passes += [("F", ahead + at), ("B", at)]
    first_left = micro_batches - ahead
    return passes + [("B", at) for at in range(first_left, micro_batches)]


def schedule(
    stages: int,
    micro_batches: int,
    forward: float = 1,
    backward: float = 2,
    record: Callable[[Work], object] | None = None,
) -> list[Work]:
    """Run the pipeline; every pass starts as soon as what it needs is done.

    A forward pass needs that of the stage before, a backward pass that of the
    stage after. Sending takes no time.

    Args:
        stages: Stages of the pipeline.
        micro_batches: Micro-batches of a step.
        forward: Time of a forward pass through a stage.
        backward: Time of a backward pass.
        record: Hears of every pass.

    Examples:
        >>> max(work.end for work in schedule(stages=4, micro_batches=8))
        33
    """
    todo = [order(s, stages, micro_batches) for s in range(stages)]
    done: dict[tuple[int, Pass, int], float] = {}
    free: list[float] = [0] * stages  # when a stage has nothing to do
    works = []
    while any(todo):
        for stage, passes in enumerate(todo):
            while passes:
                kind, at = passes[0]
                before = stage - 1 if kind == "F" else stage + 1
                needed = (before, kind, at)
                if 0 <= before < stages and needed not in done:
                    break
                start = max(free[stage], done.get(needed, 0))
                end = start + (forward if kind == "F" else backward)
                free[stage] = done[stage, kind, at] = end
                works.append(Work(stage, kind, at, start, end))
                if record:
                    record(works[-1])
                passes.pop(0)
    return works


def one_f_one_b_trace(stages: int = 4, micro_batches: int = 6) -> Trace:
    """A step of a pipeline, in which a backward pass takes twice as long.

    Args:
        stages: Stages of the pipeline, 1 to 6.
        micro_batches: Micro-batches of a step, 1 to 12.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> one_f_one_b_trace(stages=2, micro_batches=4)[-1].caption
        'Done after 15. Each stage was idle for 3, 1/4 of its work.'
    """
    for name, value, most in (
        ("stages", stages, 6),
        ("micro_batches", micro_batches, 12),
    ):
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be 1 to {most}, got {value}")
    works: list[Work] = []
    schedule(stages, micro_batches, record=works.append)
    end = max(work.end for work in works)

    def frame(caption: str, now: float) -> Frame:
        lanes = []
        for stage in range(stages):
            spans: list[Span] = []
            last = 0.0
            for work in works:  # those of a stage are in their order
                if work.stage != stage or work.start > now:
                    continue
                if work.start > last:
                    spans.append(Span(last, work.start, "", "wait"))
                mark: Mark = "new" if work.start == now else ""
                if work.start < now < work.end:
                    mark = "on"
                text = f"{work.kind}{work.micro_batch + 1}"
                spans.append(Span(work.start, work.end, text, mark))
                last = work.end
            if last < now:
                spans.append(Span(last, now, "", "wait"))
            lanes.append((f"stage {stage + 1}", spans))
        return Frame(caption, Lanes(lanes, "passes forward", end, now))

    trace = []
    for now in sorted({work.start for work in works}):
        held = [
            sum(
                (w.kind == "F" and w.start <= now)
                - (w.kind == "B" and w.end <= now)
                for w in works
                if w.stage == stage
            )
            for stage in range(stages)
        ]
        starts = [
            f"stage {w.stage + 1} {'forward' if w.kind == 'F' else 'backward'} "
            f"{w.micro_batch + 1}"
            for w in sorted(works)
            if w.start == now
        ]
        trace.append(
            frame(
                f"At {now:g} start: {', '.join(starts)}. "
                f"Micro-batches held: {', '.join(map(str, held))}.",
                now,
            )
        )
    idle = end - 3 * micro_batches
    share = f"{stages - 1}/{micro_batches}"
    trace.append(
        frame(
            f"Done after {end:g}. Each stage was idle for {idle:g}, "
            f"{share} of its work.",
            end,
        )
    )
    return trace
