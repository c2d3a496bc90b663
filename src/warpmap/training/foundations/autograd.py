"""Automatic differentiation: tensors whose operations leave a tape.

An operation computes its result, and says by which linear map each input
enters it. There are three kinds of maps:

    element by element  a slope for each; its own transpose
    places              reading them; the transpose adds into them
    matrix products     the other factor; the transpose, transposed factors

``_tape`` reads the maps forwards or backwards.

Reference: Baydin et al., 2018, https://arxiv.org/abs/1502.05767
"""

import math
from collections.abc import Sequence
from functools import partial
from operator import add, mul, sub
from typing import Any

from warpmap.training.foundations import _flat
from warpmap.training.foundations._flat import Flat
from warpmap.training.foundations._tape import Edge, Node, Record, pull


class Tensor(Node):
    """Numbers in a shape, and how they were computed.

    Attributes:
        shape: Length of each axis; ``()`` for a number.
        grad: What ``backward`` has added up for a leaf, row by row.

    Examples:
        >>> x = tensor([3.0, 4.0])
        >>> y = (x * x).sum()
        >>> y.backward()
        >>> y.item(), x.grad
        (25.0, [6.0, 8.0])
    """

    def __init__(
        self,
        data: Flat,
        shape: tuple[int, ...],
        edges: Sequence[Edge] = (),
        needs_grad: bool = True,
    ) -> None:
        """Put a result on the tape."""
        super().__init__(data, edges, needs_grad)
        self.shape = shape
        self.grad: Flat | None = None

    # -- elements: the map is diagonal, and its own transpose ------------------

    def __add__(self, other: "Operand") -> "Tensor":
        """Element by element; axes of length 1 are repeated."""
        a, b = _broadcast(self, other)
        edges = [Edge(a, _same, _same), Edge(b, _same, _same)]
        return Tensor(list(map(add, a.data, b.data)), a.shape, edges)

    def __sub__(self, other: "Operand") -> "Tensor":
        """Element by element."""
        a, b = _broadcast(self, other)
        edges = [Edge(a, _same, _same), _diagonal(b, [-1.0] * len(b.data))]
        return Tensor(list(map(sub, a.data, b.data)), a.shape, edges)

    def __mul__(self, other: "Operand") -> "Tensor":
        """Element by element; each factor is the other one's slope."""
        a, b = _broadcast(self, other)
        edges = [_diagonal(a, b.data), _diagonal(b, a.data)]
        return Tensor(list(map(mul, a.data, b.data)), a.shape, edges)

    def __truediv__(self, other: "Operand") -> "Tensor":
        """Element by element."""
        a, b = _broadcast(self, other)
        y = [p / q for p, q in zip(a.data, b.data, strict=True)]
        slopes = [-r / q for r, q in zip(y, b.data, strict=True)]
        edges = [_diagonal(a, [1 / q for q in b.data]), _diagonal(b, slopes)]
        return Tensor(y, a.shape, edges)

    def __pow__(self, power: float) -> "Tensor":
        """Each element to a power that is a number."""
        # math.pow refuses what would be complex
        y = [math.pow(x, power) for x in self.data]
        slopes = [power and power * math.pow(x, power - 1) for x in self.data]
        return Tensor(y, self.shape, [_diagonal(self, slopes)])

    def __neg__(self) -> "Tensor":
        """Each element with the other sign."""
        return self * -1.0

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: "Operand") -> "Tensor":
        """A number minus this."""
        return _as_tensor(other) - self

    def __rtruediv__(self, other: "Operand") -> "Tensor":
        """A number over this."""
        return _as_tensor(other) / self

    def exp(self) -> "Tensor":
        """Its own slope."""
        y = [math.exp(x) for x in self.data]
        return Tensor(y, self.shape, [_diagonal(self, y)])

    def log(self) -> "Tensor":
        """The natural logarithm."""
        y = [math.log(x) for x in self.data]
        slopes = [1 / x for x in self.data]
        return Tensor(y, self.shape, [_diagonal(self, slopes)])

    def relu(self) -> "Tensor":
        """What is negative becomes 0; the slope at 0 is 0, as in PyTorch."""
        slopes = [float(x > 0) for x in self.data]
        return Tensor(
            list(map(mul, self.data, slopes)),
            self.shape,
            [_diagonal(self, slopes)],
        )

    # -- places: reading one is transposed to adding into it -------------------

    def sum(self, axis: int | None = None, keep: bool = False) -> "Tensor":
        """Sum over an axis, or over all; ``keep`` keeps it, with length 1."""
        shape: tuple[int, ...] = ()
        if axis is None:
            target = [0] * len(self.data)
        else:
            axis = range(len(self.shape))[axis]
            before, after = self.shape[:axis], self.shape[axis + 1 :]
            target = _flat.repeated((*before, 1, *after), self.shape)
            shape = (*before, 1, *after) if keep else (*before, *after)
        size = math.prod(shape)
        read = partial(_flat.read, target)
        collect = partial(_flat.collect, target, size)
        return Tensor(collect(self.data), shape, [Edge(self, collect, read)])

    def mean(self) -> "Tensor":
        """Mean of all elements."""
        return self.sum() / len(self.data)

    def __getitem__(self, key: Any) -> "Tensor":
        """Rows, or one element of several rows.

        Args:
            key: A number, a slice or a sequence of numbers chooses rows; a
                pair of sequences ``(rows, columns)`` chooses elements.

        Examples:
            >>> x = tensor([[1.0, 2.0], [3.0, 4.0]])
            >>> x[[1, 1, 0]].tolist(), x[[0, 1], [1, 0]].tolist()
            ([[3.0, 4.0], [3.0, 4.0], [1.0, 2.0]], [2.0, 3.0])
        """
        rows, width = range(self.shape[0]), math.prod(self.shape[1:])
        if isinstance(key, tuple):
            columns = range(width)
            pairs = zip(*key, strict=True)
            places = [rows[r] * width + columns[c] for r, c in pairs]
            return self._at(places, (len(places),))
        if isinstance(key, int):
            start = rows[key] * width
            return self._at([*range(start, start + width)], self.shape[1:])
        chosen = rows[key] if isinstance(key, slice) else [rows[k] for k in key]
        places = [row * width + i for row in chosen for i in range(width)]
        return self._at(places, (len(chosen), *self.shape[1:]))

    @property
    def T(self) -> "Tensor":
        """A matrix with its axes swapped."""
        M, N = self.shape
        return self._at(_flat.places((N, M), (1, N)), (N, M))

    def _at(self, places: list[int], shape: tuple[int, ...]) -> "Tensor":
        read = partial(_flat.read, places)
        collect = partial(_flat.collect, places, len(self.data))
        return Tensor(read(self.data), shape, [Edge(self, read, collect)])

    # -- matrices --------------------------------------------------------------

    def __matmul__(self, other: "Tensor") -> "Tensor":
        """Product of matrices ``(M, K)`` and ``(K, N)``.

        Raises:
            ValueError: If the shapes do not fit.
        """
        a, b = self.data, other.data
        if not (
            len(self.shape) == len(other.shape) == 2
            and self.shape[1] == other.shape[0]
        ):
            raise ValueError(
                f"expected (M, K) @ (K, N), got {self.shape} @ {other.shape}"
            )
        (M, K), N = self.shape, other.shape[1]
        # linear in either factor, the other held
        left = Edge(
            self,
            lambda v: _flat.product(v, b, M, K, N),
            lambda g: _flat.product(g, _flat.transposed(b, N), M, N, K),
        )
        right = Edge(
            other,
            lambda v: _flat.product(a, v, M, K, N),
            lambda g: _flat.product(_flat.transposed(a, K), g, K, M, N),
        )
        return Tensor(_flat.product(a, b, M, K, N), (M, N), [left, right])

    def logsumexp(self) -> "Tensor":
        """Log of the sum of exponentials along the last axis, which is kept.

        Examples:
            >>> x = tensor([1000.0, 1000.0])
            >>> round(x.logsumexp().item() - math.log(2), 9)
            1000.0
        """
        N = self.shape[-1]
        tops = [max(self.data[i : i + N]) for i in range(0, len(self.data), N)]
        # a constant on the tape: the result does not depend on it
        top = Tensor(tops, (*self.shape[:-1], 1), needs_grad=False)
        return (self - top).exp().sum(-1, keep=True).log() + top

    def softmax(self) -> "Tensor":
        """Softmax along the last axis."""
        return (self - self.logsumexp()).exp()

    # -- and back --------------------------------------------------------------

    def backward(
        self, seed: Flat | None = None, record: Record | None = None
    ) -> None:
        """Add the gradient of this result to ``grad`` of every leaf below it.

        Args:
            seed: Gradient of what is wanted with respect to this, row by row;
                may be left out for a single number.
            record: Hears of every edge on the way.

        Raises:
            ValueError: If the seed has another size.
        """
        if seed is None and len(self.data) == 1:
            seed = [1.0]
        if seed is None or len(seed) != len(self.data):
            raise ValueError(
                f"expected a seed of {len(self.data)} numbers, got {seed}"
            )
        for node, grad in pull(self, seed, record).items():
            if isinstance(node, Tensor) and not node.edges:
                node.grad = list(map(add, node.grad or [0.0] * len(grad), grad))

    def tolist(self) -> Any:
        """The elements as nested lists, or as a number."""
        found: list[Any] = self.data
        for n in reversed(self.shape[1:]):
            found = [found[i : i + n] for i in range(0, len(found), n)]
        return found if self.shape else found[0]

    def item(self) -> float:
        """The only element."""
        (value,) = self.data
        return value


Operand = Tensor | float | Sequence[Any]
"""A tensor, or what ``tensor`` makes a constant of."""


def tensor(values: Any, needs_grad: bool = True) -> Tensor:
    """A leaf from a number or from nested sequences of numbers.

    Args:
        values: All sequences of one depth have the same length.
        needs_grad: False for data: no gradient is computed for it.

    Raises:
        ValueError: If lengths differ.

    Examples:
        >>> tensor([[1, 2, 3], [4, 5, 6]]).shape
        (2, 3)
    """
    if not isinstance(values, Sequence):
        return Tensor([float(values)], (), needs_grad=needs_grad)
    rows = [tensor(value) for value in values]
    shapes = {row.shape for row in rows}
    if len(shapes) > 1:
        raise ValueError(f"expected rows of one shape, got {sorted(shapes)}")
    data = [x for row in rows for x in row.data]
    shape = (len(rows), *(shapes.pop() if shapes else ()))
    return Tensor(data, shape, needs_grad=needs_grad)


def _as_tensor(value: Operand) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return tensor(value, needs_grad=False)


def _same(v: Flat) -> Flat:
    return v


def _diagonal(source: Tensor, slopes: Flat) -> Edge:
    def scale(v: Flat) -> Flat:
        return list(map(mul, v, slopes))

    return Edge(source, scale, scale)


def _broadcast(a: Tensor, other: Operand) -> tuple[Tensor, Tensor]:
    b = _as_tensor(other)
    shape = _flat.common_shape(a.shape, b.shape)
    return _repeat(a, shape), _repeat(b, shape)


def _repeat(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if x.shape == shape:
        return x
    return x._at(_flat.repeated(x.shape, shape), shape)
