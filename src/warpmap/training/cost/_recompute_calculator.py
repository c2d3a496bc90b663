"""What recomputation saves and costs, for a reader's own numbers; and a trace.

``_recompute_plan`` holds the plans themselves.
"""

import math
from dataclasses import dataclass

from warpmap.chart import Axis, Line, LineChart, Point
from warpmap.models.configs import config
from warpmap.trace import Cell, Frame, Grid, Mark, Trace
from warpmap.training.cost._recompute_plan import (
    best_segments,
    calls,
    schedule,
    segments_peak,
)
from warpmap.training.cost.training_memory import layer_bytes

KIB, MIB = 1 << 10, 1 << 20


def _preset(name: str, sequence: int, tensor: int) -> dict[str, float]:
    model = config(name)
    inside = layer_bytes(model, sequence, tensor=tensor)
    kept = layer_bytes(model, sequence, tensor=tensor, recompute="full")
    return {
        "layers": model.layers,
        "inside_mib": inside / MIB,
        "input_mib": kept / MIB,
    }


PRESETS = {
    "Llama 3 8B, 8192 tokens": _preset("Llama 3 8B", 8192, 1),
    "Llama 3 70B, 8192 tokens": _preset("Llama 3 70B", 8192, 1),
    "Llama 3.1 405B on 8 GPUs, 8192 tokens": _preset("Llama 3.1 405B", 8192, 8),
    "as large inside as outside": {
        "layers": 64,
        "inside_mib": 64.0,
        "input_mib": 64.0,
    },
}
"""Layers, as the page on training memory counts them."""


@dataclass(frozen=True)
class RecomputePlan:
    """Activations at their most, and calls of layers in a step.

    Attributes:
        plain_gib: With everything kept, in GiB.
        each_layer_gib: With each layer's input kept, in GiB.
        segments: Segments, where these take least memory.
        longest_segment: Layers of the first of them; later ones are shorter.
        segments_gib: With these segments, in GiB.
        nested_gib: With so many slots, segments within segments, in GiB.
        nested_forwards: Forward passes that this takes; plain takes 1, the
            others up to 2.
        nested_step_percent: Time of a step, in percent of a plain one, if a
            backward pass takes two forward passes.
    """

    plain_gib: float
    each_layer_gib: float
    segments: int
    longest_segment: int
    segments_gib: float
    nested_gib: float
    nested_forwards: float
    nested_step_percent: float


def recompute_plan(
    layers: int = 32,
    inside_mib: float = 1312.0,
    input_mib: float = 64.0,
    slots: int = 5,
) -> RecomputePlan:
    """Memory and work of the ways to recompute a chain of equal layers.

    Args:
        layers: Layers of the model, 1 to 256.
        inside_mib: What a layer keeps for its backward pass, in MiB.
        input_mib: A layer's input, which is part of that, in MiB.
        slots: Inputs that nested segments may keep besides the first.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> plan = recompute_plan()
        >>> plan.plain_gib, plan.each_layer_gib, plan.nested_gib
        (41.0, 3.21875, 1.65625)
    """
    total = calls(layers, slots)
    if not 0 < inside_mib < math.inf:
        raise ValueError(f"inside_mib must be above 0, got {inside_mib}")
    if not 0 < input_mib <= inside_mib:
        raise ValueError(
            f"input_mib must be above 0 and at most {inside_mib}, the inside, "
            f"got {input_mib}"
        )
    chain = (
        [round(input_mib * KIB)] * layers,
        [round(inside_mib * KIB)] * layers,
    )
    best = best_segments(*chain)
    kept = min(slots + 1, layers - 1)
    return RecomputePlan(
        plain_gib=layers * inside_mib / 1024,
        each_layer_gib=segments_peak(*chain, [1] * layers) / MIB,
        segments=len(best),
        longest_segment=max(best),
        segments_gib=segments_peak(*chain, best) / MIB,
        nested_gib=(kept * input_mib + inside_mib) / 1024,
        nested_forwards=total / layers,
        nested_step_percent=100 * (total / layers + 2) / 3,
    )


def recompute_chart(
    layers: int = 32,
    inside_mib: float = 1312.0,
    input_mib: float = 64.0,
    slots: int = 5,
) -> LineChart:
    """Memory against work, for every number of slots.

    Args:
        layers: As for ``recompute_plan``.
        inside_mib: As for ``recompute_plan``.
        input_mib: As for ``recompute_plan``.
        slots: Where the point is.

    Examples:
        >>> [line.name for line in recompute_chart().lines]
        ['equal segments', 'segments within segments']
    """
    here = recompute_plan(layers, inside_mib, input_mib, slots)

    def gib(kept: int, inside: int) -> float:
        return (kept * input_mib + inside * inside_mib) / KIB

    equal = [
        (2 - k / layers, gib(-(-layers // k) - 1, k))
        for k in range(layers, 0, -1)
    ]
    within = [
        (calls(layers, s) / layers, gib(min(s + 1, layers - 1), 1))
        for s in range(max(0, layers - 2), -1, -1)
    ]
    return LineChart(
        "Activations against forward passes",
        Axis("forward passes in a step", log=True),
        Axis("GiB", log=True),
        [
            Line("equal segments", equal),
            Line("segments within segments", within),
        ],
        [
            Point("plain", 1.0, here.plain_gib),
            Point("each layer", 2 - 1 / layers, here.each_layer_gib),
            Point(f"{slots} slots", here.nested_forwards, here.nested_gib),
        ],
    )


def recompute_trace(layers: int = 8, slots: int = 1) -> Trace:
    """A forward and a backward pass with few inputs kept, call by call.

    Args:
        layers: Layers of the chain, 1 to 12.
        slots: Inputs that may be kept at once, besides the first.

    Raises:
        ValueError: If a number is out of range, or the trace has more than 80
            calls.

    Examples:
        >>> for frame in recompute_trace(layers=2, slots=0):
        ...     print(frame.caption)
        The input of layer 1 is kept.
        Layer 1 runs, and what is inside it is forgotten.
        Layer 2 runs with a graph, and is reversed.
        Layer 1 runs with a graph, and is reversed.
    """
    if not 1 <= layers <= 12:
        raise ValueError(f"layers must be 1 to 12, got {layers}")
    if calls(layers, slots) > 80:
        raise ValueError(f"layers must be fewer, or slots more, got {layers}")
    trace: Trace = []
    kept: list[int] = []
    counts = [0] * layers
    end = layers
    for what, i in schedule(layers, slots):
        here: dict[int, Mark] = {}
        if what == "free":
            kept.remove(i)
            continue
        if what == "keep":
            kept.append(i)
            said = f"The input of layer {i + 1} is kept."
        elif what == "call":
            counts[i] += 1
            here[i] = "on"
            said = f"Layer {i + 1} runs, and what is inside it is forgotten."
        else:
            counts[i] += 1
            here[i] = "new"
            end = i
            said = f"Layer {i + 1} runs with a graph, and is reversed."
        rows = [
            (
                "layer",
                [
                    Cell(str(n + 1), here.get(n, "gone" if n > end else ""))
                    for n in range(layers)
                ],
            ),
            (
                "its input",
                [
                    Cell("kept", "on") if n in kept else Cell()
                    for n in range(layers)
                ],
            ),
            ("calls", [Cell(str(n)) for n in counts]),
        ]
        trace.append(Frame(said, Grid(rows, [""] * layers)))
    return trace
