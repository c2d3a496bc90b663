"""The roofline model: a lower bound of time from two ceilings.

A chip can do so many operations a second and move so many bytes a second.
An operation needs some of both, so it takes at least the longer of two times:

    seconds  max(FLOPs / peak FLOP/s, bytes / bandwidth)

One multiply and one add are 2 FLOPs. Bytes are what no implementation can
avoid: each input is read once and each output written once, as if the chip's
own memory held everything in between.

Reference: Williams, Waterman and Patterson, 2009,
https://doi.org/10.1145/1498765.1498785
"""

import math
from dataclasses import dataclass

from warpmap.chart import Axis, Line, LineChart, Point
from warpmap.hardware.gpus import GPUS


def _check(**arguments: float) -> None:
    for name, value in arguments.items():
        if not 0 < value < math.inf:
            raise ValueError(f"expected {name} > 0 and finite, got {value}")


@dataclass(frozen=True)
class Ceilings:
    """What a chip can do at most.

    Args:
        flops_per_s: Peak FLOP/s of the format in use, dense.
        bytes_per_s: Peak bandwidth of the memory, in byte/s.

    Raises:
        ValueError: If a ceiling is not a positive number.

    Examples:
        >>> Ceilings(flops_per_s=989.4e12, bytes_per_s=4.8e12).ridge
        206.125
    """

    flops_per_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        """Refuse ceilings that are no rates."""
        _check(flops_per_s=self.flops_per_s, bytes_per_s=self.bytes_per_s)

    @property
    def ridge(self) -> float:
        """FLOPs a byte at which both walls are equally far."""
        return self.flops_per_s / self.bytes_per_s


@dataclass(frozen=True)
class Work:
    """What an operation needs: arithmetic and traffic.

    Args:
        flops: Multiplications and additions.
        bytes: Traffic between the chip and its memory.

    Examples:
        >>> Work(flops=100, bytes=50).intensity
        2.0
    """

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes


H200 = Ceilings(flops_per_s=989.4e12, bytes_per_s=4.8e12)
"""bf16 on the tensor cores, dense: the data sheet's 1,979 needs sparsity."""


def elementwise(
    elements: int,
    inputs: int = 2,
    flops_per_element: float = 1,
    element_bytes: float = 2,
) -> Work:
    """Work of ``y = f(x1, x2, ...)``, for example an addition.

    Args:
        elements: Elements of the output.
        inputs: Tensors read, each as large as the output.
        flops_per_element: Operations for each output.
        element_bytes: Bytes of an element, 2 for bf16.

    Raises:
        ValueError: If an argument is not positive.

    Examples:
        >>> elementwise(1000)
        Work(flops=1000, bytes=6000)
    """
    _check(
        elements=elements,
        inputs=inputs,
        flops_per_element=flops_per_element,
        element_bytes=element_bytes,
    )
    return Work(
        flops=flops_per_element * elements,
        bytes=element_bytes * elements * (inputs + 1),
    )


def gemm(
    M: int,
    N: int,
    K: int,
    element_bytes: float = 2,
    weight_bytes: float = 2,
) -> Work:
    """Work of a layer ``(M, K) @ (K, N)``; with ``M = 1`` it is a GEMV.

    Args:
        M: Rows of the input: tokens, or the batch when decoding.
        N: Columns of the weights.
        K: Rows of the weights, the length of each sum.
        element_bytes: Bytes of an element of input and output.
        weight_bytes: Bytes of a weight: 1 for fp8, 0.5 for int4.

    Raises:
        ValueError: If an argument is not positive.

    Examples:
        >>> gemm(4, 4, 4)
        Work(flops=128, bytes=96)
    """
    _check(
        M=M, N=N, K=K, element_bytes=element_bytes, weight_bytes=weight_bytes
    )
    return Work(
        flops=2 * M * N * K,
        bytes=element_bytes * (M * K + M * N) + weight_bytes * K * N,
    )


def attention(
    B: int,
    T: int,
    S: int,
    H: int,
    Hkv: int,
    D: int,
    causal: bool = True,
    element_bytes: float = 2,
) -> Work:
    """Work of fused attention: prefill with ``T = S``, decoding with ``T = 1``.

    The two matrix products are counted. The softmax between them is not: it
    costs about 5 operations a score, the products 4 ``D``. Scores stay on the
    chip; queries, keys, values and outputs cross the memory bus once.

    Args:
        B: Sequences.
        T: Query tokens of each, the last ones of the sequence.
        S: Key tokens of each.
        H: Query heads.
        Hkv: Key-value heads, a divisor of ``H``.
        D: Head size.
        causal: Whether a token sees only itself and earlier ones.
        element_bytes: Bytes of an element.

    Raises:
        ValueError: If an argument is not positive, ``H`` is not a multiple of
            ``Hkv``, or there are more queries than keys under the mask.

    Examples:
        >>> attention(B=1, T=1, S=10, H=2, Hkv=1, D=4)
        Work(flops=320, bytes=192)
    """
    _check(B=B, T=T, S=S, H=H, Hkv=Hkv, D=D, element_bytes=element_bytes)
    if H % Hkv:
        raise ValueError(f"expected H a multiple of Hkv, got {H} and {Hkv}")
    if causal and T > S:
        raise ValueError(f"expected T <= S under the mask, got {T} > {S}")
    scores = T * S - (T * (T - 1) // 2 if causal else 0)
    return Work(
        flops=4 * B * H * scores * D,
        bytes=element_bytes * 2 * B * D * (T * H + S * Hkv),
    )


@dataclass(frozen=True)
class Bound:
    """The best that a chip can do for an operation.

    Args:
        seconds: No run is shorter.
        flops_per_s: No run is faster: the height of the roof.
        wall: ``"memory"`` or ``"compute"``, whichever takes longer.
    """

    seconds: float
    flops_per_s: float
    wall: str


def bound(work: Work, ceilings: Ceilings = H200) -> Bound:
    """The roof over an operation.

    Args:
        work: What the operation needs.
        ceilings: What the chip can do.

    Examples:
        >>> bound(elementwise(2**20)).wall
        'memory'
        >>> bound(gemm(8192, 8192, 8192)).wall
        'compute'
    """
    compute = work.flops / ceilings.flops_per_s
    memory = work.bytes / ceilings.bytes_per_s
    seconds = max(compute, memory)
    return Bound(
        seconds=seconds,
        flops_per_s=work.flops / seconds,
        wall="memory" if memory > compute else "compute",
    )


def break_even_batch(
    N: int,
    K: int,
    ceilings: Ceilings = H200,
    element_bytes: float = 2,
    weight_bytes: float = 2,
) -> int | None:
    """The smallest batch at which a layer is bound by compute.

    Args:
        N: Columns of the weights.
        K: Rows of the weights.
        ceilings: What the chip can do.
        element_bytes: Bytes of an element of input and output.
        weight_bytes: Bytes of a weight: 1 for fp8, 0.5 for int4.

    Returns:
        ``M`` of ``gemm``, or ``None`` where no batch is large enough: then
        inputs and outputs alone keep the memory busy.

    Raises:
        ValueError: If an argument is not positive.

    Examples:
        >>> break_even_batch(8192, 8192)
        218
    """
    one = gemm(1, N, K, element_bytes, weight_bytes)
    two = gemm(2, N, K, element_bytes, weight_bytes)
    # time is linear in M on both walls, so the lines cross at most once
    memory_per_row = (two.bytes - one.bytes) / ceilings.bytes_per_s
    compute_per_row = one.flops / ceilings.flops_per_s
    weights = one.bytes / ceilings.bytes_per_s - memory_per_row
    if compute_per_row <= memory_per_row:
        return None
    return math.ceil(weights / (compute_per_row - memory_per_row))


@dataclass(frozen=True)
class LayerBound:
    """What ``layer_roofline`` answers.

    Attributes:
        intensity: FLOPs a byte of this layer at this batch.
        ridge: FLOPs a byte from which the chip is bound by compute.
        microseconds: Lower bound of the time.
        tflops: Upper bound of the rate.
        wall: What sets the pace, memory or compute.
        break_even_batch: Smallest batch bound by compute, if there is one.
    """

    intensity: float
    ridge: float
    microseconds: float
    tflops: float
    wall: str
    break_even_batch: int | None


def layer_roofline(
    batch: int = 1,
    in_features: int = 8192,
    out_features: int = 8192,
    element_bytes: float = 2.0,
    weight_bytes: float = 2.0,
    peak_tflops: float = 989.4,
    bandwidth_tb_s: float = 4.8,
) -> LayerBound:
    """Lower bound of the time of one linear layer.

    Args:
        batch: Tokens in flight: sequences when decoding.
        in_features: Width of the input.
        out_features: Width of the output.
        element_bytes: Bytes of an activation: 2 for bf16, 1 for fp8.
        weight_bytes: Bytes of a weight: 1 for fp8, 0.5 for int4.
        peak_tflops: Dense peak of the format, in TFLOP/s.
        bandwidth_tb_s: Memory bandwidth, in TB/s (10^12 byte/s).

    Raises:
        ValueError: If an argument is not positive.

    Examples:
        >>> layer = layer_roofline(batch=1)
        >>> layer.wall, round(layer.microseconds)
        ('memory', 28)
    """
    _check(**locals())  # the arguments, nothing else yet
    chip = Ceilings(peak_tflops * 1e12, bandwidth_tb_s * 1e12)
    width = out_features, in_features, element_bytes, weight_bytes
    work = gemm(batch, *width)
    best = bound(work, chip)
    return LayerBound(
        intensity=work.intensity,
        ridge=chip.ridge,
        microseconds=best.seconds * 1e6,
        tflops=best.flops_per_s / 1e12,
        wall=best.wall,
        break_even_batch=break_even_batch(
            out_features, in_features, chip, element_bytes, weight_bytes
        ),
    )


def roofline_chart(
    batch: int,
    in_features: int,
    out_features: int,
    element_bytes: float,
    weight_bytes: float,
    peak_tflops: float,
    bandwidth_tb_s: float,
) -> LineChart:
    """The roof of the chip, and the layer under it at several batches.

    Args:
        batch: As of ``layer_roofline``, like all that follow.
        in_features: Width of the input.
        out_features: Width of the output.
        element_bytes: Bytes of an activation.
        weight_bytes: Bytes of a weight.
        peak_tflops: Dense peak of the format, in TFLOP/s.
        bandwidth_tb_s: Memory bandwidth, in TB/s.

    Raises:
        ValueError: If an argument is not positive.

    Examples:
        >>> chart = roofline_chart(64, 8192, 8192, 2, 2, 989.4, 4.8)
        >>> [point.name for point in chart.points]
        ['ridge', '64 tokens']
    """
    chip = peak_tflops, bandwidth_tb_s
    width = in_features, out_features, element_bytes, weight_bytes
    here = layer_roofline(batch, *width, *chip)
    ridge = here.ridge
    first = min(ridge / 1000, here.intensity)
    last = max(ridge * 30, here.intensity)
    roof = [(i, min(peak_tflops, i * bandwidth_tb_s)) for i in (first, ridge)]
    name = "1 token" if batch == 1 else f"{batch:,} tokens"
    return LineChart(
        "The layer under the roof of the chip",
        Axis("FLOPs a byte", log=True),
        Axis("TFLOP/s", log=True),
        [Line("roof", [*roof, (last, peak_tflops)])],
        [
            Point("ridge", ridge, peak_tflops),
            Point(name, here.intensity, here.tflops),
        ],
    )


CHIPS = {
    name: {"peak_tflops": gpu.bf16_tflops, "bandwidth_tb_s": gpu.bandwidth_tb_s}
    for name, gpu in GPUS.items()
    if gpu.bf16_tflops
}
"""The calculator's menu of GPUs, in bf16."""

WEIGHTS = {
    "bf16": {"weight_bytes": 2.0},
    "fp8": {"weight_bytes": 1.0},
    "int4": {"weight_bytes": 0.5},
}
"""The calculator's menu of formats; the products stay in bf16."""
