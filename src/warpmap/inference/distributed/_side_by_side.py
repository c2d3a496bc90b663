"""The same requests through two ways of sharing, on one clock.

Lanes are GPUs. What they do and how long it takes comes from ``stages``,
when from ``timeline``: the functions that ``parallel_strategies`` calls.
"""

from dataclasses import replace
from typing import Literal, NamedTuple

from warpmap.hardware.performance.roofline import H200
from warpmap.inference.decoding.memory_bound_decoding import step_seconds
from warpmap.inference.distributed._stages import (
    Split,
    Stage,
    share_out,
    stages,
)
from warpmap.inference.distributed.parallel_strategies import timeline
from warpmap.models.configs import config
from warpmap.trace import Frame, Lanes, Mark, Span, Trace

Strategy = Literal["data", "tensor", "pipeline", "sequence", "expert"]

LAYERS = 4
CONTEXT = 4096
ALPHA_US, LINK_GB_S = 5.0, 450.0


class Piece(NamedTuple):
    """A part of a visit: arithmetic, or a wait for messages."""

    name: str
    us: float
    waits: bool


class Event(NamedTuple):
    """A piece on the clock, the same on several GPUs."""

    start: float
    end: float
    gpus: range
    requests: str
    piece: Piece


def pieces(stage: Stage) -> list[Piece]:
    """A visit of a stage, layer by layer; the times add up to its own."""
    attend = [op for op in stage.operators if op.name.startswith("attention")]
    head = [op for op in stage.operators if op.name == "head"]
    rest = [o for o in stage.operators if o not in attend and o not in head]
    us = dict.fromkeys(("attention", "FFN", "first", "last"), 0.0)
    kinds = dict.fromkeys(us, "")
    for m in stage.messages:
        part: str = m.part
        if part == "ends":
            part = "first" if m.kind == "all-reduce" else "last"
        us[part] += m.seconds(ALPHA_US, LINK_GB_S) * 1e6
        kinds[part] = m.kind

    made = [Piece(f"{kinds['first']} of embeddings", us["first"], True)]
    for _ in range(stage.layers):
        for part, name, ops in (
            ("attention", "attention", attend),
            ("FFN", "experts", rest),
        ):
            seconds = step_seconds(ops, H200) / stage.layers
            wait = us[part] / stage.layers
            made.append(Piece(name, seconds * 1e6, False))
            made.append(Piece(f"{kinds[part]} after {name}", wait, True))
    made.append(Piece("the head", step_seconds(head, H200) * 1e6, False))
    made.append(Piece(f"{kinds['last']} at the end", us["last"], True))
    # arithmetic without a message in between is drawn as one
    merged: list[Piece] = []
    for piece in (p for p in made if p.us):
        if merged and not merged[-1].waits and not piece.waits:
            before = merged.pop()
            name = before.name
            if piece.name not in name:
                name = f"{name}, {piece.name}"
            piece = Piece(name, before.us + piece.us, False)
        merged.append(piece)
    return merged


def events(
    strategy: Strategy, gpus: int, requests: int, steps: int
) -> list[Event]:
    """All that happens, in the order of time."""
    c = replace(config("Mixtral 8x7B"), layers=LAYERS)
    split = Split(**{strategy: gpus})
    parts = [pieces(s) for s in stages(c, split, requests, CONTEXT)]
    load = share_out(split, requests)
    groups = split.data * split.expert  # each with requests of its own
    across = split.tensor * split.sequence
    names = "ABCDEFGH"[:requests]
    found: list[Event] = []

    def visit(stage: int, flight: int, start: float) -> None:
        for group in range(groups):
            mine = names[group * load.requests :][: load.requests]
            company = mine[flight * load.together :][: load.together]
            if not company and strategy == "data":
                continue
            first = (stage * groups + group) * across
            at = start
            for piece in parts[stage]:
                where = range(first, first + across)
                end = at + piece.us
                found.append(Event(at, end, where, company, piece))
                at = end

    seconds = [sum(piece.us for piece in part) for part in parts]
    timeline(seconds, load.flights, steps, visit)
    return sorted(found, key=lambda event: (event.start, event.gpus.start))


def side_by_side(
    upper: Strategy = "tensor",
    lower: Strategy = "pipeline",
    gpus: int = 4,
    requests: int = 2,
    steps: int = 1,
) -> Trace:
    """Decode with four layers of Mixtral 8x7B, split in two ways.

    Args:
        upper: How the GPUs of the upper lanes share the model.
        lower: How those of the lower lanes do.
        gpus: H200s of each, 2 or 4.
        requests: Requests that decode, each with 4096 tokens, 1 to 8.
        steps: Tokens of each request, 1 or 2.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> side_by_side()[-1].caption
        'Tensor took 396 µs, pipeline 963 µs.'
    """
    if gpus not in (2, 4):
        raise ValueError(f"gpus must be 2 or 4, got {gpus}")
    if not 1 <= requests <= 8:
        raise ValueError(f"requests must be 1 to 8, got {requests}")
    if steps not in (1, 2):
        raise ValueError(f"steps must be 1 or 2, got {steps}")
    both = {
        "upper": events(upper, gpus, requests, steps),
        "lower": events(lower, gpus, requests, steps),
    }
    names = {"upper": upper, "lower": lower}
    took = {place: max(e.end for e in es) for place, es in both.items()}
    end = max(took.values())
    # within a nanosecond is the same moment
    moments = sorted({round(e.start, 3) for es in both.values() for e in es})

    def picture(now: float) -> Lanes:
        lanes: list[tuple[str, list[Span]]] = [
            (f"{name} {gpu}", [])
            for name in names.values()
            for gpu in range(gpus)
        ]
        for row, place in ((0, "upper"), (gpus, "lower")):
            for e in both[place]:
                if round(e.start, 3) > now:
                    break
                mark: Mark = "wait" if e.piece.waits else ""
                if not e.piece.waits and round(e.end, 3) > now:
                    mark = "on"
                # short spans without text, or the axis would be stretched
                long = e.end - e.start > end / 20
                text = e.requests if long and not e.piece.waits else ""
                for gpu in e.gpus:
                    lanes[row + gpu][1].append(Span(e.start, e.end, text, mark))
        return Lanes(lanes, "µs", end, now)

    trace = []
    for now in moments:
        caption = []
        for place, name in names.items():
            starts = [e for e in both[place] if round(e.start, 3) == now]
            said = list(dict.fromkeys(_say(e, gpus) for e in starts))
            if said:
                caption.append(f"{name.capitalize()}: {'; '.join(said)}.")
        trace.append(Frame(" ".join(caption), picture(now)))
    last = f"{upper.capitalize()} took {took['upper']:,.0f} µs, "
    last += f"{lower} {took['lower']:,.0f} µs."
    trace.append(Frame(last, picture(end)))
    return trace


def _say(event: Event, gpus: int) -> str:
    piece, where = event.piece, event.gpus
    if piece.name.startswith("send"):
        return f"{event.requests} moves on to GPU {where.stop}"
    if piece.waits:
        return piece.name
    if len(where) == gpus:
        return f"all GPUs compute {piece.name}"
    return f"GPU {where.start} computes {event.requests or 'for others'}"
