"""Sums whose bits are the same every time, and for every batch.

Each addition in floating point rounds, so the order of additions decides the
last bits. Sums in float32 here are written out in plain Python; two kernels
show the same on a GPU: one whose programs add in the order they arrive, and
one whose split of a row is fixed.

    sequential  (n - 1) u of error at most, times the sum of magnitudes
    tree        ceil(log2 n) u
    Kahan       2 u, plus a term of n u^2

with u = 2^-24, to first order. Reference: Higham, 1993,
https://doi.org/10.1137/0914050
"""

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

UNIT = 2.0**-24  # the relative error of rounding to float32


def float32(x: float) -> float:
    """The nearest float32.

    Examples:
        >>> float32(2**24 + 1)
        16777216.0
    """
    (y,) = struct.unpack("f", struct.pack("f", x))
    return float(y)


def sequential_sum(xs: Sequence[float]) -> float:
    """Add in the order given, as atomics do in the order of arrival.

    Args:
        xs: Float32 numbers.

    Examples:
        >>> sequential_sum([2.0**24, 1.0, 1.0]), sequential_sum([1, 1, 2**24])
        (16777216.0, 16777218.0)
    """
    total = 0.0
    for x in xs:
        # float64 adds two float32 so well that rounding again is exact
        total = float32(total + x)
    return total


def tree_sum(xs: Sequence[float]) -> float:
    """Add the halves, and then their sums.

    Args:
        xs: Float32 numbers.

    Examples:
        >>> tree_sum([2.0**24, 1.0, 1.0, 1.0])
        16777218.0
    """
    if len(xs) < 2:
        return float(sum(xs))
    half = (len(xs) + 1) // 2
    return float32(tree_sum(xs[:half]) + tree_sum(xs[half:]))


def kahan_sum(xs: Sequence[float]) -> float:
    """Carry what each addition lost to the next one.

    Args:
        xs: Float32 numbers.

    Examples:
        >>> kahan_sum([2.0**24, 1.0, 1.0, 1.0])
        16777220.0
    """
    total = lost = 0.0
    for x in xs:
        wanted = float32(x - lost)
        more = float32(total + wanted)
        lost = float32(float32(more - total) - wanted)
        total = more
    return total


def split_sum(xs: Sequence[float], splits: int) -> float:
    """Cut into parts, sum each in order, then add the parts in order.

    Args:
        xs: Float32 numbers.
        splits: Parts, at least 1.

    Raises:
        ValueError: If ``splits`` is below 1.

    Examples:
        >>> split_sum([2.0**24, 1.0, 1.0, 1.0], splits=2)
        16777218.0
    """
    if splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    size = max(1, -(-len(xs) // splits))
    parts = [xs[i : i + size] for i in range(0, len(xs), size)]
    return sequential_sum([sequential_sum(part) for part in parts])


def splits_for(rows: int, programs: int = 32) -> int:
    """Programs for each row, when they are dealt out among the rows.

    Args:
        rows: Rows of the batch.
        programs: What keeps a GPU busy.

    Raises:
        ValueError: If ``rows`` is below 1.

    Examples:
        >>> [splits_for(rows) for rows in (1, 8, 100)]
        [32, 4, 1]
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    return max(1, programs // rows)


def atomic_total(x: "Tensor") -> "Tensor":
    """Sum of all elements; programs add theirs as they arrive.

    Args:
        x: Any shape, float32, contiguous, on ``warpmap.DEVICE``.

    Returns:
        ``()``, float32; on a GPU the last bits differ from run to run.

    Raises:
        ValueError: If ``x`` has another dtype, layout or device.

    Examples:
        >>> import torch
        >>> from warpmap import DEVICE
        >>> atomic_total(torch.ones(5, device=DEVICE)).item()
        5.0
    """
    from warpmap.kernels.building_blocks import _deterministic_kernels

    return _deterministic_kernels.atomic_total(x)


def row_sums(x: "Tensor", splits: int) -> "Tensor":
    """Sum of each row, cut into so many parts.

    Args:
        x: ``(M, N)``, float32, contiguous, on ``warpmap.DEVICE``.
        splits: Parts of a row. A constant makes a row's bits independent of
            the batch; ``splits_for(M)`` does not.

    Returns:
        ``(M,)``, float32.

    Raises:
        ValueError: If ``x`` has another shape, dtype, layout or device, or
            ``splits`` is below 1.

    Examples:
        >>> import torch
        >>> from warpmap import DEVICE
        >>> row_sums(torch.ones(2, 5, device=DEVICE), splits=2).tolist()
        [5.0, 5.0]
    """
    from warpmap.kernels.building_blocks import _deterministic_kernels

    return _deterministic_kernels.row_sums(x, splits)
