"""Who waits for whom in RL training: a simulator of its roles on GPUs.

A step writes answers, scores them, updates the models and takes the new
weights back to where answers are written:

    rollout     generates; a step of decoding takes a + b n for n answers
    score       one forward pass each: reference, reward model, critic
    train       three times a forward pass each: actor, critic
    sync        weights resharded in place, or sent to other GPUs

Colocated, all GPUs take every role in turn. Split, some only generate and the
others do the rest. Asynchronous is split, and answers for later updates begin
before this one is done.

Reference: Sheng et al., 2024, https://arxiv.org/abs/2409.19256
Reference: Fu et al., 2025, https://arxiv.org/abs/2505.24298
"""

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal, get_args

from warpmap.chart import Axis, Line, LineChart, Point
from warpmap.trace import Frame, Lanes, Mark, Span, Trace

Placement = Literal["colocated", "split", "asynchronous"]
Algorithm = Literal["PPO", "GRPO"]
Stage = Literal["generate", "score", "actor", "critic", "sync"]

SCORERS: dict[Algorithm, tuple[str, ...]] = {
    "PPO": ("reference", "reward", "critic"),
    "GRPO": ("reference",),
}
"""Models that read each answer once; GRPO here is rewarded by a rule."""

TRAINED: dict[Algorithm, tuple[Stage, ...]] = {
    "PPO": ("actor", "critic"),
    "GRPO": ("actor",),
}
"""Models that each update changes."""


@dataclass(frozen=True)
class Cluster:
    """GPUs, their roles and their speeds, in seconds and tokens.

    Attributes:
        gpus: All GPUs.
        rollout: The first of them, that generate; all if colocated.
        shared: Whether the same GPUs generate and train.
        step: Seconds of a decoding step without answers: reading weights.
        step_per_answer: Seconds that each answer adds to a step.
        train_rate: Tokens that one GPU trains on in a second, for one model.
        sync: Seconds from an update to the rollout's use of it.
        algorithm: Which models score and train.
    """

    gpus: int
    rollout: int
    shared: bool
    step: float
    step_per_answer: float
    train_rate: float
    sync: float
    algorithm: Algorithm = "PPO"


@dataclass(frozen=True)
class Work:
    """What some GPUs did without a change.

    Attributes:
        stage: The role.
        gpus: Numbers of the GPUs.
        start: When it began.
        end: When it ended, or the number of answers changed.
        answers: Answers in it.
        ended: Those of them that generation completed at its end.
    """

    stage: Stage
    gpus: range
    start: float
    end: float
    answers: int
    ended: int = 0


@dataclass(frozen=True)
class Run:
    """Some steps of training.

    Attributes:
        works: Everything that was done, by its end.
        updates: When each update had reached the rollout.
        batches: Answers that each update learned from, by number.
        began: Updates that had reached the rollout as each answer began.
    """

    works: list[Work]
    updates: list[float]
    batches: list[list[int]]
    began: list[int]

    def staleness(self, update: int) -> list[int]:
        """Updates that each answer of a batch is behind the newest."""
        return [update - self.began[answer] for answer in self.batches[update]]


class _Rollout:
    """One GPU that generates: each step adds a token to all its answers."""

    def __init__(self, gpu: int, cluster: Cluster) -> None:
        self.gpu, self.cluster = gpu, cluster
        self.running: list[tuple[float, int]] = []  # heap: last token, answer
        self.tokens = self.now = 0.0

    @property
    def step(self) -> float:
        extra = self.cluster.step_per_answer * len(self.running)
        return self.cluster.step + extra

    def due(self) -> float:
        """When the next answer ends."""
        if not self.running:
            return math.inf
        return self.now + (self.running[0][0] - self.tokens) * self.step

    def run_to(self, now: float) -> Work:
        """Decode until ``now``."""
        gpus = range(self.gpu, self.gpu + 1)
        done = Work("generate", gpus, self.now, now, len(self.running))
        self.tokens += (now - self.now) / self.step
        self.now = now
        return done


def simulate(
    lengths: Sequence[int],
    batch: int,
    steps: int,
    cluster: Cluster,
    ahead: int = 0,
    visit: Callable[[Work], object] | None = None,
) -> Run:
    """Generate, score, train and synchronize, event by event.

    The k-th answer may begin once ``k // batch - ahead`` updates have reached
    the rollout, on the GPU with the fewest. An update takes the first
    ``batch`` answers that are done.

    Args:
        lengths: Tokens of each answer, in the order of their prompts.
        batch: Answers of an update.
        steps: Updates to make.
        cluster: GPUs and speeds.
        ahead: Batches that may begin before their turn; 0 is synchronous.
        visit: Called with each piece of work as it ends.

    Raises:
        ValueError: If there are too few lengths.

    Examples:
        >>> pair = Cluster(2, 1, False, 1.0, 0.0, 4.0, 5.0, "GRPO")
        >>> for w in simulate([12], batch=1, steps=1, cluster=pair).works:
        ...     print(w.stage, w.start, w.end)
        generate 0.0 12.0
        score 12.0 13.0
        actor 13.0 16.0
        sync 16.0 21.0
    """
    if len(lengths) < batch * steps:
        raise ValueError(
            f"lengths must be at least batch x steps, got {len(lengths)}"
        )
    c = cluster
    rollouts = [_Rollout(gpu, c) for gpu in range(c.rollout)]
    trainers = range(0 if c.shared else c.rollout, c.gpus)
    pass_seconds = 1 / (c.train_rate * len(trainers))  # a token's, to train
    score_seconds = pass_seconds / 3 * len(SCORERS[c.algorithm])

    run = Run([], [], [], [])
    written: deque[int] = deque()
    scored: list[int] = []
    jobs: deque[tuple[Stage, float, list[int]]] = deque()
    job: Work | None = None
    now = 0.0

    def done(work: Work) -> None:
        if work.answers and work.end > work.start:
            run.works.append(work)
            if visit:
                visit(work)

    while len(run.updates) < steps:
        syncing = job is not None and job.stage == "sync"
        limit = (len(run.updates) + ahead + 1) * batch
        while len(run.began) < min(limit, len(lengths)):
            free = min(rollouts, key=lambda r: len(r.running))
            done(free.run_to(now))
            last = free.tokens + lengths[len(run.began)]
            heapq.heappush(free.running, (last, len(run.began)))
            run.began.append(len(run.updates))

        if job is None and not jobs:
            # with shared GPUs, scoring waits until generation is over
            busy = c.shared and any(r.running for r in rollouts)
            if len(scored) >= batch:
                taken, scored = scored[:batch], scored[batch:]
                run.batches.append(taken)
                seconds = pass_seconds * sum(lengths[a] for a in taken)
                jobs.extend((m, seconds, taken) for m in TRAINED[c.algorithm])
                jobs.append(("sync", c.sync, taken))
            elif written and not busy:
                room = min(batch - len(scored), len(written))
                taken = [written.popleft() for _ in range(room)]
                seconds = score_seconds * sum(lengths[a] for a in taken)
                jobs.append(("score", seconds, taken))
        if job is None and jobs:
            stage, seconds, taken = jobs.popleft()
            syncing = stage == "sync"
            if syncing:
                for r in rollouts:
                    done(r.run_to(now))
            on = range(c.gpus) if syncing else trainers
            job = Work(stage, on, now, now + seconds, len(taken))

        first = min(rollouts, key=_Rollout.due)
        if job and (syncing or job.end <= first.due()):
            now = job.end
            done(job)
            if job.stage == "score":
                scored += taken
            if syncing:
                run.updates.append(now)
                for r in rollouts:
                    r.now = now  # they stood still
            job = None
        else:
            now = first.due()
            work = first.run_to(now)
            first.tokens = first.running[0][0]  # no rounding
            while first.running and first.running[0][0] <= first.tokens:
                written.append(heapq.heappop(first.running)[1])
            ended = work.answers - len(first.running)
            done(replace(work, ended=ended))
    return run


def draw_lengths(
    count: int, mean_tokens: float, tail: float, max_tokens: int, seed: int
) -> list[int]:
    """Random lengths of answers: a Weibull distribution, cut at the top.

    Args:
        count: How many.
        mean_tokens: Their mean before the cut.
        tail: 0 makes all equal, 1 is exponential, 2 has a heavier tail.
        max_tokens: Where generation stops in any case.
        seed: Chooses them.

    Examples:
        >>> draw_lengths(3, 100, tail=0, max_tokens=400, seed=0)
        [100, 100, 100]
        >>> draw_lengths(5, 100, tail=1, max_tokens=180, seed=0)
        [180, 142, 55, 30, 72]
    """
    chance = random.Random(seed)
    scale = mean_tokens / math.gamma(1 + tail)
    drawn = (scale * chance.expovariate(1.0) ** tail for _ in range(count))
    return [min(max(1, math.ceil(tokens)), max_tokens) for tokens in drawn]


RUNS: dict[str, dict[str, Any]] = {
    "GRPO, long reasoning": {
        "algorithm": "GRPO",
        "mean_tokens": 4000.0,
        "tail": 1.0,
        "max_tokens": 16384,
    },
    "GRPO, all answers equal": {
        "algorithm": "GRPO",
        "mean_tokens": 4000.0,
        "tail": 0.0,
        "max_tokens": 16384,
    },
    "PPO, short answers": {
        "algorithm": "PPO",
        "mean_tokens": 300.0,
        "tail": 0.5,
        "max_tokens": 1024,
    },
}
"""Workloads to start from; the figures are invented."""

PLACEMENTS: dict[str, dict[str, Any]] = {
    "colocated": {"placement": "colocated"},
    "split": {"placement": "split"},
    "one batch ahead": {"placement": "asynchronous", "ahead": 1},
    "four batches ahead": {"placement": "asynchronous", "ahead": 4},
}
"""Who runs where, and how far generation may run ahead."""


@dataclass(frozen=True)
class RLHFSystems:
    """What a step costs, once the run is under way.

    Attributes:
        step_seconds: Time from one update to the next, in seconds.
        samples_per_hour: Answers that all GPUs learn from in an hour.
        idle_percent: Share of all GPUs' time without any work.
        rollout_idle_percent: The same of the GPUs that generate.
        trainer_idle_percent: The same of the GPUs that train.
        decode_batch: Answers in a decoding step, on average over the steps.
        longest_tokens: Tokens of the longest answer that was learned from.
        staleness: Updates that an answer is behind on average, counted from
            its first token.
        most_staleness: The same of the worst answer.
    """

    step_seconds: float
    samples_per_hour: float
    idle_percent: float
    rollout_idle_percent: float
    trainer_idle_percent: float
    decode_batch: float
    longest_tokens: int
    staleness: float
    most_staleness: int


def idle_share(run: Run, gpus: range, start: float, end: float) -> float:
    """Share of the time of some GPUs in which they had no work.

    Args:
        run: What was done.
        gpus: Numbers of the GPUs.
        start: When to begin to count.
        end: When to stop.

    Examples:
        >>> work = Work("generate", range(0, 1), 1.0, 4.0, answers=2)
        >>> idle_share(Run([work], [], [], []), range(2), 0.0, 4.0)
        0.625
    """
    busy = 0.0
    for w in run.works:
        seconds = max(0.0, min(w.end, end) - max(w.start, start))
        first, last = max(w.gpus.start, gpus.start), min(w.gpus.stop, gpus.stop)
        busy += seconds * max(0, last - first)
    return max(0.0, 1 - busy / (len(gpus) * (end - start)))


def rlhf_systems(
    placement: Placement = "colocated",
    gpus: int = 16,
    rollout_gpus: int = 8,
    ahead: int = 1,
    algorithm: Algorithm = "GRPO",
    batch: int = 128,
    mean_tokens: float = 4000.0,
    tail: float = 1.0,
    max_tokens: int = 16384,
    step_ms: float = 10.0,
    step_ms_per_answer: float = 0.1,
    train_tokens_per_s: float = 8000.0,
    reshard_seconds: float = 10.0,
    send_seconds: float = 5.0,
    seed: int = 0,
) -> RLHFSystems:
    """Simulate some steps of RL training and report where the time goes.

    Args:
        placement: Who runs where.
        gpus: All GPUs.
        rollout_gpus: Those that generate, unless colocated.
        ahead: Batches that may begin before their turn, if asynchronous.
        algorithm: PPO with reward model and critic, or GRPO with a rule.
        batch: Answers of an update.
        mean_tokens: Mean tokens of an answer, before the limit.
        tail: 0 makes answers equal, 1 exponential, 2 has a heavier tail.
        max_tokens: Tokens at which an answer is cut.
        step_ms: Time of a decoding step for reading the weights, in ms.
        step_ms_per_answer: Time that each running answer adds, in ms.
        train_tokens_per_s: Tokens one GPU trains one model on in a second.
        reshard_seconds: Changing from training to generation in place, in
            seconds a step.
        send_seconds: Sending weights to other GPUs, in seconds a step.
        seed: Chooses the random lengths.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> late = rlhf_systems("asynchronous")
        >>> late.samples_per_hour > 2 * rlhf_systems().samples_per_hour
        True
        >>> round(late.staleness, 1), late.most_staleness
        (1.0, 5)
    """
    _check(**locals())
    shared = placement == "colocated"
    if not shared and rollout_gpus >= gpus:
        raise ValueError(
            f"rollout_gpus must be below gpus ({gpus}), got {rollout_gpus}"
        )
    ahead = ahead if placement == "asynchronous" else 0
    warm = 4 + 4 * ahead  # updates that are not counted
    steps = warm + 8
    if batch * steps > 20_000:
        raise ValueError(
            f"batch must be at most {20_000 // steps} here, got {batch}"
        )
    cluster = Cluster(
        gpus=gpus,
        rollout=gpus if shared else rollout_gpus,
        shared=shared,
        step=step_ms / 1e3,
        step_per_answer=step_ms_per_answer / 1e3,
        train_rate=train_tokens_per_s,
        sync=reshard_seconds if shared else send_seconds,
        algorithm=algorithm,
    )
    # more prompts than are learned from, so that the end is like the middle
    count = batch * (steps + ahead)
    lengths = draw_lengths(count, mean_tokens, tail, max_tokens, seed)
    run = simulate(lengths, batch, steps, cluster, ahead)

    start, end = run.updates[warm - 1], run.updates[-1]
    late = range(warm, steps)
    learned = [answer for update in late for answer in run.batches[update]]
    stale = [updates for update in late for updates in run.staleness(update)]
    rounds = tokens = 0.0
    for w in run.works:
        if w.stage == "generate" and w.end > start:
            step = cluster.step + cluster.step_per_answer * w.answers
            rounds += (w.end - w.start) / step
            tokens += (w.end - w.start) / step * w.answers
    trainers = range(0 if shared else rollout_gpus, gpus)
    return RLHFSystems(
        step_seconds=(end - start) / len(late),
        samples_per_hour=3600 * len(learned) / (end - start),
        idle_percent=100 * idle_share(run, range(gpus), start, end),
        rollout_idle_percent=100
        * idle_share(run, range(cluster.rollout), start, end),
        trainer_idle_percent=100 * idle_share(run, trainers, start, end),
        decode_batch=tokens / rounds,
        longest_tokens=max(lengths[answer] for answer in learned),
        staleness=fmean(stale),
        most_staleness=max(stale),
    )


def _check(placement: str, algorithm: str, **numbers: float) -> None:
    for name, chosen, allowed in (
        ("placement", placement, get_args(Placement)),
        ("algorithm", algorithm, get_args(Algorithm)),
    ):
        if chosen not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {chosen!r}")
    from_one = {"gpus", "rollout_gpus", "batch", "mean_tokens", "max_tokens"}
    above_zero = {"step_ms", "train_tokens_per_s"}
    most = {"gpus": 128, "ahead": 8, "tail": 3, "max_tokens": 10**6}
    for name, value in numbers.items():
        least = 1 if name in from_one else 0
        if not least <= value <= most.get(name, 1e9):
            raise ValueError(
                f"{name} must be {least} to {most.get(name, 10**9)}, "
                f"got {value}"
            )
        if name in above_zero and not value:
            raise ValueError(f"{name} must be above 0, got 0")


def split_chart(
    placement: Placement = "colocated",
    gpus: int = 16,
    rollout_gpus: int = 8,
    **others: Any,
) -> LineChart:
    """Answers an hour over the number of GPUs that generate.

    Args:
        placement: The reader's own.
        gpus: All GPUs.
        rollout_gpus: Where the reader's point is.
        **others: The other arguments of ``rlhf_systems``.

    Raises:
        ValueError: As ``rlhf_systems``.

    Examples:
        >>> [line.name for line in split_chart(batch=16).lines]
        ['colocated', 'split', 'asynchronous']
    """

    def rate(placement: Placement, rollout_gpus: int) -> float:
        system = rlhf_systems(placement, gpus, rollout_gpus, **others)
        return system.samples_per_hour

    own = rate(placement, rollout_gpus)
    at = min(rollout_gpus, max(1, gpus - 1))
    shown = {max(1, round(gpus * k / 8)) for k in range(1, 8)} | {at}
    splits = sorted(n for n in shown if n < gpus)
    together = rate("colocated", 1)
    lines = [Line("colocated", [(n, together) for n in splits or [at]])]
    points = [Point("here", at, own)]
    if splits:
        lines += [
            Line("split", [(n, rate("split", n)) for n in splits]),
            Line(
                "asynchronous", [(n, rate("asynchronous", n)) for n in splits]
            ),
        ]
        best, most = max(lines[-1].points, key=lambda point: point[1])
        points.append(Point(f"best with {best}", best, most))
    return LineChart(
        "Answers learned from, over the split",
        Axis("GPUs that generate"),
        Axis("answers an hour"),
        lines,
        points,
    )


MARKS: dict[Stage, Mark] = {
    "generate": "",
    "score": "on",
    "actor": "on",
    "critic": "on",
    "sync": "wait",
}


def rlhf_trace(
    placement: Placement = "asynchronous",
    gpus: int = 4,
    rollout_gpus: int = 2,
    batch: int = 6,
    updates: int = 3,
    ahead: int = 1,
    tail: float = 1.0,
    seed: int = 3,
) -> Trace:
    """Some updates of a small run, on speeds made for the picture.

    Args:
        placement: Who runs where.
        gpus: All GPUs, at most 8.
        rollout_gpus: Those that generate, unless colocated.
        batch: Answers of an update, at most 10.
        updates: Updates, at most 4 and 30 answers.
        ahead: Batches that may begin before their turn, if asynchronous.
        tail: 0 makes answers equal, 1 exponential, 2 has a heavier tail.
        seed: Chooses the random lengths.

    Returns:
        A lane for each GPU; numbers are the answers that it is writing.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> rlhf_trace(tail=0.0)[-1].caption
        '3 updates after 61 s; GPUs idle 34% of it.'
    """
    shared = placement == "colocated"
    for name, value, least, most in (
        ("gpus", gpus, 1 if shared else 2, 8),
        ("rollout_gpus", rollout_gpus, 1, 8 if shared else gpus - 1),
        ("batch", batch, 1, 10),
        ("updates", updates, 1, min(4, 30 // max(1, batch))),
        ("ahead", ahead, 0, 4),
        ("tail", tail, 0, 3),
    ):
        if not least <= value <= most:
            raise ValueError(f"{name} must be {least} to {most}, got {value}")
    ahead = ahead if placement == "asynchronous" else 0
    rollout = gpus if shared else rollout_gpus
    cluster = Cluster(gpus, rollout, shared, 0.1, 0.02, 60.0, 2.0, "GRPO")
    lengths = draw_lengths(batch * (updates + ahead), 100, tail, 400, seed)
    works: list[Work] = []
    run = simulate(lengths, batch, updates, cluster, ahead, works.append)
    end = run.updates[-1]

    def lanes(now: float, over: bool = False) -> Lanes:
        rows = []
        for gpu in range(gpus):
            spans, free = [], 0.0
            mine = [w for w in works if gpu in w.gpus and w.start < now]
            for w in mine:
                if over and w.start > free:
                    spans.append(Span(free, w.start, "", "gone"))
                free = w.end
                text = str(w.answers) if w.stage == "generate" else w.stage
                mark = "new" if w.end >= now and not over else MARKS[w.stage]
                spans.append(Span(w.start, min(w.end, now), text, mark))
            if over and free < end:
                spans.append(Span(free, end, "", "gone"))
            rows.append((f"GPU {gpu}", spans))
        return Lanes(rows, "s", end, None if over else now)

    frames: Trace = []
    learned = 0
    for w in works:
        if w.stage == "score" or (w.stage == "generate" and not w.ended):
            continue
        if w.stage == "generate":
            left = w.answers - w.ended
            says = f"GPU {w.gpus[0]} ends an answer; {left or 'none'} left"
        elif w.stage == "actor":
            stale = run.staleness(learned)
            learned += 1
            late = sum(map(bool, stale)) or "none"
            says = f"update {learned} has learned from {batch} answers, "
            says += f"{late} of them begun with older weights"
            says += f", at worst {max(stale)} behind" if max(stale) else ""
        else:
            says = f"the weights of update {learned} are where they generate"
        frames.append(Frame(f"{w.end:.0f} s: {says}.", lanes(w.end)))
    idle = idle_share(run, range(gpus), 0.0, end)
    says = f"{updates} updates after {end:.0f} s; GPUs idle {idle:.0%} of it."
    frames.append(Frame(says, lanes(end, over=True)))
    return frames
