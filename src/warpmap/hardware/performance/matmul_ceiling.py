"""How fast a matrix product really gets, and a benchmark that can be trusted.

    rate    2 M N K operations / the median time of a call
    time    of calls after the warm-up, each after the L2 cache was emptied
    inputs  random: what is multiplied changes the power, and so the clock

Reference: He, 2024,
https://www.thonking.ai/p/strangely-matrix-multiplications
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from warpmap import DEVICE
from warpmap.hardware.performance.occupancy_and_tail_effect import (
    gemm_tiles,
    wave_efficiency,
)

Format = Literal["bf16", "fp16", "tf32", "fp32", "fp8", "int8"]
Inputs = Literal["zeros", "constant", "uniform", "normal"]

FORMATS: tuple[Format, ...] = get_args(Format)
INPUTS: tuple[Inputs, ...] = get_args(Inputs)
DTYPES: dict[Format, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
SPAN = 5  # calls that must agree before the warm-up is over
TOLERANCE = 0.05  # how far from the usual time a settled call may be
OUTLIER = 1.5  # times the median


@dataclass(frozen=True)
class Shape:
    """A product of ``(M, K)`` by ``(K, N)``.

    Attributes:
        M: Rows of the result.
        N: Columns of the result.
        K: Length of each sum.

    Examples:
        >>> Shape(2, 3, 4).flops
        48
    """

    M: int
    N: int
    K: int

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.M * self.N * self.K


def neighbours(
    size: int = 4096, steps: Sequence[int] = (-64, -8, -1, 0, 1, 8, 64)
) -> list[Shape]:
    """Square products of which one side is changed at a time.

    Args:
        size: The side of the square.
        steps: What is added to one side.

    Examples:
        >>> neighbours(8, steps=(0, 1))
        [Shape(M=8, N=8, K=8), Shape(M=9, N=8, K=8), Shape(M=8, N=9, K=8), \
Shape(M=8, N=8, K=9)]
    """
    square = {"M": size, "N": size, "K": size}
    shapes = [Shape(**square)] if 0 in steps else []
    return shapes + [
        Shape(**{**square, side: size + step})
        for side in square
        for step in steps
        if step
    ]


def row_alignment(length: int, element_bytes: int) -> int:
    """Bytes that divide the address of every row, at most 16.

    Args:
        length: Elements of a row; rows follow each other without a gap.
        element_bytes: Bytes of an element.

    Examples:
        >>> row_alignment(4096, 2), row_alignment(4097, 2)
        (16, 2)
    """
    return math.gcd(length * element_bytes, 16)


def useful_share(
    shape: Shape, sms: int = 132, tile_m: int = 128, tile_n: int = 256
) -> float:
    """Part of the tensor cores' time that makes results: whole tiles and waves.

    Args:
        shape: The product.
        sms: Tiles under way at once, one an SM.
        tile_m: Rows of a tile.
        tile_n: Columns of a tile.

    Examples:
        >>> round(useful_share(Shape(4096, 4096, 4096)), 3)
        0.97
        >>> round(useful_share(Shape(4096, 4097, 4096)), 3)
        0.776
    """
    tiles = gemm_tiles(shape.M, shape.N, tile_m, tile_n)
    filled = shape.M * shape.N / (tiles * tile_m * tile_n)
    return filled * wave_efficiency(tiles, sms)


@dataclass(frozen=True)
class Summary:
    """What many timings of one thing say.

    Attributes:
        warm_up: Calls at the start that are not counted.
        median_s: Median of the others, in s.
        spread: Distance from the 10th to the 90th percentile, over the
            median.
        outliers: Counted calls that took more than 1.5 times the median.
    """

    warm_up: int
    median_s: float
    spread: float
    outliers: int


def summarize(times: Sequence[float]) -> Summary:
    """The median of what follows the warm-up.

    The usual time is the median of the second half. The warm-up ends with the
    first ``SPAN`` calls in a row whose median is that of the usual, give or
    take ``TOLERANCE``, and of which the first is as well.

    Args:
        times: Seconds of each call, in order, at least ``2 * SPAN``.

    Raises:
        ValueError: If there are too few, or one is not positive.

    Examples:
        >>> summarize([9.0, 3.0] + 19 * [1.0] + [5.0])
        Summary(warm_up=2, median_s=1.0, spread=0.0, outliers=1)
    """
    if len(times) < 2 * SPAN or min(times) <= 0:
        raise ValueError(
            f"times must be {2 * SPAN} or more positive numbers, got {times}"
        )
    usual = statistics.median(times[len(times) // 2 :])

    def settled(first: int) -> bool:
        middle = statistics.median(times[first : first + SPAN])
        return all(
            abs(t - usual) <= TOLERANCE * usual for t in (times[first], middle)
        )

    # with nothing settled the second half is all there is
    half = len(times) // 2
    warm_up = next((n for n in range(half) if settled(n)), half)
    counted = times[warm_up:]
    median = statistics.median(counted)
    tenths = statistics.quantiles(counted, n=10, method="inclusive")
    return Summary(
        warm_up=warm_up,
        median_s=median,
        spread=(tenths[-1] - tenths[0]) / median,
        outliers=sum(t > OUTLIER * median for t in counted),
    )


def call_times(
    run: Callable[[], object],
    calls: int,
    clock: Callable[[], float] = time.perf_counter,
    least_s: float = 1e-3,
) -> list[float]:
    """Seconds of each call by a clock of the host.

    A call too short for the clock is repeated, and its share is taken.

    Args:
        run: What is timed; it returns when it is done.
        calls: Timings wanted.
        clock: Seconds since some moment.
        least_s: How long a timing has to be, a thousand ticks or so.

    Examples:
        >>> len(call_times(lambda: None, 10, least_s=1e-5))
        10
    """
    times: list[float] = []
    repeats = 1
    while len(times) < calls:
        start = clock()
        for _ in range(repeats):
            run()
        took = clock() - start
        if took < least_s:
            repeats *= 2  # and nothing that was too short is kept
            times.clear()
        else:
            times.append(took / repeats)
    return times


def _call_times_cuda(run: Callable[[], object], calls: int) -> list[float]:
    """Seconds of each call by the GPU's own clock, its L2 cache emptied.

    Args:
        run: Launches what is timed.
        calls: Timings wanted.
    """
    # clearing it keeps the GPU busy while the CPU queues what is timed
    other = torch.empty(1 << 29, dtype=torch.int8, device="cuda")
    marks = []
    for _ in range(calls):
        other.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        begin.record()
        run()
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in marks]


def matrix(
    inputs: Inputs, rows: int, columns: int, fmt: Format, device: str = DEVICE
) -> Tensor:
    """A matrix of a format.

    Args:
        inputs: "zeros"; "constant", all 1; "uniform", from 0 to 1, or of all
            integers; "normal", standard, 16 times as wide in integers.
        rows: Number of rows.
        columns: Number of columns.
        fmt: Number format.
        device: Where.

    Raises:
        ValueError: If the inputs or the format are others.

    Examples:
        >>> matrix("constant", 1, 3, "int8").tolist()
        [[1, 1, 1]]
    """
    if fmt not in FORMATS or inputs not in INPUTS:
        raise ValueError(
            f"fmt must be one of {FORMATS} and inputs one of {INPUTS}, "
            f"got {fmt!r} and {inputs!r}"
        )
    x = torch.empty(rows, columns, device=device)
    if inputs == "normal":
        x.normal_().mul_(16 if fmt == "int8" else 1)
    elif inputs == "uniform":
        x.uniform_(*((-128, 128) if fmt == "int8" else (0, 1)))
    else:
        x.fill_(float(inputs == "constant"))
    if fmt == "int8":
        x = x.floor_().clamp_(-128, 127)
    return x.to(DTYPES[fmt])


def toggled_bits(x: Tensor) -> float:
    """Bits in which a number differs from its neighbour in the row, on average.

    Args:
        x: ``(M, N)``, of one, two or four bytes an element.

    Examples:
        >>> toggled_bits(torch.tensor([[1, 2, 2, 1]], dtype=torch.int8))
        1.3333333333333333
    """
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]
    bits = x.contiguous().view(words)
    changed = bits[:, 1:] ^ bits[:, :-1]
    width = 8 * x.element_size()
    ones = sum((changed >> n & 1).double().mean() for n in range(width))
    return float(ones)


def product(a: Tensor, b: Tensor, fmt: Format) -> Callable[[], Tensor]:
    """The call that multiplies, ready to be timed.

    Args:
        a: ``(M, K)`` of the format.
        b: ``(N, K)`` of the format, the weights of a layer.
        fmt: Number format.

    Returns:
        A function that returns ``a @ b.T``: in the format, from fp8 in bf16,
        from int8 in int32. It keeps PyTorch's precision of float32 products.

    Examples:
        >>> a, b = torch.ones(2, 3), torch.ones(4, 3)
        >>> product(a, b, "fp32")()[0].tolist()
        [3.0, 3.0, 3.0, 3.0]
    """
    if fmt == "int8":
        return lambda: torch._int_mm(a, b.T)
    if fmt == "fp8":
        one = torch.ones((), device=a.device)
        return lambda: torch._scaled_mm(
            a,
            b.T,
            scale_a=one,
            scale_b=one,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    if fmt not in ("tf32", "fp32"):
        return lambda: torch.matmul(a, b.T)
    wanted = "high" if fmt == "tf32" else "highest"

    def multiply() -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(wanted)
        try:
            return torch.matmul(a, b.T)
        finally:
            torch.set_float32_matmul_precision(before)

    return multiply


def measure(
    shape: Shape,
    fmt: Format = "bf16",
    inputs: Inputs = "normal",
    calls: int = 30,
    device: str = DEVICE,
) -> tuple[float, Summary]:
    """The rate of a product.

    Args:
        shape: The product.
        fmt: Number format.
        inputs: What is multiplied.
        calls: Timings, warm-up included.
        device: "cuda" or "cpu".

    Returns:
        TFLOP/s (TOP/s for int8), and what the timings say.

    Examples:
        >>> rate, said = measure(Shape(64, 64, 64), "fp32", device="cpu")
        >>> rate > 0
        True
    """
    a, b = (matrix(inputs, n, shape.K, fmt, device) for n in (shape.M, shape.N))
    run: Callable[[], Any] = product(a, b, fmt)
    if device == "cuda":
        times = _call_times_cuda(run, calls)
    else:
        times = call_times(run, calls)
    summary = summarize(times)
    return shape.flops / summary.median_s / 1e12, summary
