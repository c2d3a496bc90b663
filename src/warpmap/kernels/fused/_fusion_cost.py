"""What fusing a chain of operators saves: launches, and bytes.

An operator run alone loads its inputs from memory and stores its outputs. In
one kernel, what one step makes and a later one takes stays in registers:

    seconds  launches x cost of one + bytes / bandwidth

Only tensors as large as the whole are counted. A bias of one row, or its
gradient, is a thousandth of them.
"""

import math
from dataclasses import dataclass
from typing import Literal

from warpmap.chart import Axis, Line, LineChart, Point
from warpmap.hardware.gpus import GPUS as SHEETS


@dataclass(frozen=True)
class Op:
    """One operator of a chain.

    Attributes:
        name: What it does.
        reads: Names of the large tensors that it loads.
        writes: Names of the large tensors that it stores.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]


ChainName = Literal[
    "bias, GELU, residual",
    "its gradients",
    "SwiGLU",
    "dropout, residual",
    "eight activations",
]

CHAINS: dict[ChainName, list[Op]] = {
    "bias, GELU, residual": [
        Op("add bias", ("x",), ("h",)),
        Op("gelu", ("h",), ("a",)),
        Op("add residual", ("a", "residual"), ("y",)),
    ],
    "its gradients": [
        Op("gelu backward", ("dy", "h"), ("dx",)),
        Op("sum of rows", ("dx",), ()),
    ],
    "SwiGLU": [
        Op("silu", ("gate",), ("s",)),
        Op("multiply", ("s", "up"), ("y",)),
    ],
    "dropout, residual": [
        Op("dropout", ("x",), ("d",)),
        Op("add residual", ("d", "residual"), ("y",)),
    ],
    "eight activations": [
        Op(f"activation {n}", (f"x{n}",), (f"x{n + 1}",)) for n in range(8)
    ],
}
"""Chains by name, and what each of their operators moves."""

KEPT = {"dx"}
"""Made in a chain, taken in it as well, and wanted afterwards all the same."""


def tensors_moved(ops: list[Op], fused: bool = False) -> int:
    """Large tensors that are loaded or stored.

    Args:
        ops: The chain, in order.
        fused: Whether one kernel does it all.

    Examples:
        >>> chain = CHAINS["bias, GELU, residual"]
        >>> tensors_moved(chain), tensors_moved(chain, fused=True)
        (7, 3)
    """
    if not fused:
        return sum(len(op.reads) + len(op.writes) for op in ops)
    read = {name for op in ops for name in op.reads}
    written = {name for op in ops for name in op.writes}
    # each input once, and what nobody in the chain takes or somebody wants
    return len(read - written) + len(written - (read - KEPT))


@dataclass(frozen=True)
class FusionGain:
    """What ``fusion_gain`` answers.

    Attributes:
        launches: Kernels of the chain, one for each operator.
        mb_unfused: Moved operator by operator, in 10^6 bytes.
        mb_fused: Moved by one kernel, in 10^6 bytes.
        us_unfused: Time operator by operator, in us.
        us_fused: Time of one kernel, in us.
        speedup: How many times as fast one kernel is.
        launch_share_percent: Part of the unfused time that is launching.
    """

    launches: int
    mb_unfused: float
    mb_fused: float
    us_unfused: float
    us_fused: float
    speedup: float
    launch_share_percent: float


def fusion_gain(
    chain: ChainName = "bias, GELU, residual",
    elements: int = 1 << 24,
    element_bytes: float = 2.0,
    launch_us: float = 2.0,
    bandwidth_gb_s: float = 4275.0,
) -> FusionGain:
    """Predict what fusing a chain gains.

    Args:
        chain: Which operators.
        elements: Elements of each large tensor.
        element_bytes: Bytes of an element: 2 for bf16, 4 for fp32.
        launch_us: Fixed cost of a kernel, in us: about 2 in a CUDA graph, 5
            or more where the CPU launches each.
        bandwidth_gb_s: Bandwidth that a copy reaches, in GB/s (10^9 byte/s).

    Raises:
        ValueError: If there is no such chain, or a number is out of range.

    Examples:
        >>> round(fusion_gain(elements=1 << 30).speedup, 2)
        2.33
        >>> round(fusion_gain(elements=1 << 10).speedup, 2)
        3.0
    """
    if chain not in CHAINS:
        raise ValueError(
            f"chain must be one of {', '.join(CHAINS)}, got {chain!r}"
        )
    for name, value in {
        "elements": elements,
        "element_bytes": element_bytes,
        "bandwidth_gb_s": bandwidth_gb_s,
    }.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be more than 0, got {value}")
    if not 0 <= launch_us < math.inf:
        raise ValueError(f"launch_us must be at least 0, got {launch_us}")
    ops = CHAINS[chain]
    size = elements * element_bytes
    unfused, fused = (tensors_moved(ops, f) * size for f in (False, True))
    launching = len(ops) * launch_us
    us_unfused = launching + unfused / bandwidth_gb_s / 1e3
    us_fused = launch_us + fused / bandwidth_gb_s / 1e3
    return FusionGain(
        launches=len(ops),
        mb_unfused=unfused / 1e6,
        mb_fused=fused / 1e6,
        us_unfused=us_unfused,
        us_fused=us_fused,
        speedup=us_unfused / us_fused,
        launch_share_percent=100 * launching / us_unfused,
    )


def fusion_chart(
    chain: ChainName,
    elements: int,
    element_bytes: float,
    launch_us: float,
    bandwidth_gb_s: float,
) -> LineChart:
    """The gain against the size: launches on the left, bytes on the right.

    Args:
        chain: As of ``fusion_gain``, like all that follow.
        elements: Elements of each large tensor.
        element_bytes: Bytes of an element.
        launch_us: Fixed cost of a kernel, in us.
        bandwidth_gb_s: Bandwidth that a copy reaches, in GB/s.

    Raises:
        ValueError: If there is no such chain, or a number is out of range.

    Examples:
        >>> chart = fusion_chart("SwiGLU", 1 << 24, 2.0, 2.0, 4275.0)
        >>> [line.name for line in chart.lines]
        ['SwiGLU']
    """
    cost = element_bytes, launch_us, bandwidth_gb_s
    here = fusion_gain(chain, elements, *cost)
    first, last = min(10, elements.bit_length() - 1), 30
    sizes = [1 << n for n in range(first, max(last, elements.bit_length()) + 1)]
    return LineChart(
        "What one kernel gains over a chain of them",
        Axis("elements", log=True),
        Axis("times as fast"),
        [
            Line(
                chain,
                [(n, fusion_gain(chain, n, *cost).speedup) for n in sizes],
            )
        ],
        [Point("this size", elements, here.speedup)],
    )


GPUS: dict[str, dict[str, float]] = {
    # a copy reaches some nine tenths of what the sheet says
    name: {"bandwidth_gb_s": round(890 * sheet.bandwidth_tb_s)}
    for name, sheet in SHEETS.items()
    if sheet.bandwidth_tb_s
}
"""The calculator's menu of GPUs."""

LAUNCHES: dict[str, dict[str, float]] = {
    "in a CUDA graph": {"launch_us": 2.0},
    "one by one from Python": {"launch_us": 6.0},
}
"""The calculator's menu of ways to launch, in round numbers."""
