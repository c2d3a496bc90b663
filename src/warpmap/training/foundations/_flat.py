"""Tensors as flat lists: where elements lie, and products of matrices."""

from operator import mul

Flat = list[float]
"""The elements of a tensor, row by row."""


def places(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    """Where the elements of a strided view lie, row by row.

    Examples:
        >>> places((3, 2), (1, 3))  # a matrix of 2 by 3, its axes swapped
        [0, 3, 1, 4, 2, 5]
    """
    found = [0]
    for n, stride in zip(shape, strides, strict=True):
        found = [at + i * stride for at in found for i in range(n)]
    return found


def repeated(shape: tuple[int, ...], target: tuple[int, ...]) -> list[int]:
    """From where broadcasting to ``target`` reads each element.

    Examples:
        >>> repeated((3,), (2, 3)), repeated((2, 1), (2, 3))
        ([0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1])
    """
    strides: list[int] = []
    size = 1
    for n in reversed(shape):
        strides.insert(0, size if n > 1 else 0)
        size *= n
    missing = [0] * (len(target) - len(shape))
    return places(target, (*missing, *strides))


def common_shape(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """The shape to which two broadcast.

    Raises:
        ValueError: If lengths differ where neither is 1.

    Examples:
        >>> common_shape((3,), (2, 1))
        (2, 3)
    """
    n = max(len(a), len(b))
    pairs = list(
        zip((1,) * (n - len(a)) + a, (1,) * (n - len(b)) + b, strict=True)
    )
    if any(p != q and 1 not in (p, q) for p, q in pairs):
        raise ValueError(f"shapes {a} and {b} do not broadcast")
    return tuple(q if p == 1 else p for p, q in pairs)


def read(at: list[int], v: Flat) -> Flat:
    """The elements at some places, which may repeat."""
    return [v[place] for place in at]


def collect(at: list[int], size: int, v: Flat) -> Flat:
    """The transpose of ``read``: adds each element to its place."""
    found = [0.0] * size
    for place, x in zip(at, v, strict=True):
        found[place] += x
    return found


def transposed(v: Flat, columns: int) -> Flat:
    """A matrix with that many columns, its axes swapped."""
    return [x for j in range(columns) for x in v[j::columns]]


def product(a: Flat, b: Flat, M: int, K: int, N: int) -> Flat:
    """Matrix ``(M, K)`` times ``(K, N)``.

    Examples:
        >>> product([1, 2], [3, 4], 1, 2, 1)
        [11]
    """
    rows = [a[i * K : (i + 1) * K] for i in range(M)]
    columns = [b[j::N] for j in range(N)]
    return [sum(map(mul, row, column)) for row in rows for column in columns]
