"""All slopes of a function, found in three ways."""

from collections.abc import Callable, Iterator
from typing import Any

from warpmap.training.foundations._flat import Flat
from warpmap.training.foundations._tape import pull, push
from warpmap.training.foundations.autograd import Tensor, tensor


def forward_jacobian(f: Callable[[Tensor], Tensor], values: Any) -> list[Flat]:
    """All slopes of ``f``, a column from each of N passes.

    Args:
        f: From a tensor of N elements to one of M.
        values: Where, as for ``tensor``.

    Returns:
        M rows of N slopes.

    Examples:
        >>> forward_jacobian(lambda x: x * x, [3.0, 4.0])
        [[6.0, 0.0], [0.0, 8.0]]
    """
    x = tensor(values)
    y = f(x)
    columns = [push(y, x, unit) for unit in _units(len(x.data))]
    return [list(row) for row in zip(*columns, strict=True)]


def reverse_jacobian(f: Callable[[Tensor], Tensor], values: Any) -> list[Flat]:
    """The same, a row from each of M passes.

    Examples:
        >>> reverse_jacobian(lambda x: x * x, [3.0, 4.0])
        [[6.0, 0.0], [0.0, 8.0]]
    """
    x = tensor(values)
    y = f(x)
    zeros = [0.0] * len(x.data)
    return [pull(y, unit).get(x, zeros) for unit in _units(len(y.data))]


def difference_jacobian(
    f: Callable[[Tensor], Tensor], values: Any, step: float = 1e-5
) -> list[Flat]:
    """The same without derivatives: moves each element up and down a little.

    Examples:
        >>> rows = difference_jacobian(lambda x: x * x, [3.0, 4.0])
        >>> [[round(slope, 6) for slope in row] for row in rows]
        [[6.0, 0.0], [0.0, 8.0]]
    """
    x = tensor(values)

    def at(distance: float, unit: Flat) -> Flat:
        moved = [a + distance * u for a, u in zip(x.data, unit, strict=True)]
        return f(Tensor(moved, x.shape)).data

    columns = []
    for unit in _units(len(x.data)):
        pairs = zip(at(step, unit), at(-step, unit), strict=True)
        columns.append([(up - down) / (2 * step) for up, down in pairs])
    return [list(row) for row in zip(*columns, strict=True)]


def _units(n: int) -> Iterator[Flat]:
    return ([float(i == j) for j in range(n)] for i in range(n))
