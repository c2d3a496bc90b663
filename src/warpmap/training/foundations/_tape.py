"""What every operation writes down, and two ways to read it.

Each result remembers what it was computed from, and the linear map by which a
change of each input becomes a change of the result. Forward mode applies the
maps in the order of the tape, reverse mode their transposes backwards.

    forward  a column of the Jacobian in a pass: as many passes as inputs
    reverse  a row in a pass: as many as outputs, and a loss is one output

Reference: Baydin et al., 2018, https://arxiv.org/abs/1502.05767
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from operator import add

from warpmap.training.foundations._flat import Flat

Map = Callable[[Flat], Flat]
Record = Callable[["Node", "Edge", dict["Node", Flat]], object]
"""Hears of each edge that was passed, and of all gradients so far."""

_serials = count()


@dataclass(frozen=True)
class Edge:
    """How a result depends on one of its inputs: by a linear map.

    Attributes:
        source: The input.
        push: From a change of the input to the change of the result.
        pull: The transpose: from the result's gradient to the input's share.
    """

    source: "Node"
    push: Map
    pull: Map


class Node:
    """A result, and how it was computed.

    Attributes:
        data: The elements, row by row.
        edges: One for each input that needs a gradient; a leaf has none.
        needs_grad: Whether gradients flow here; not into constants.
        serial: Place on the tape. An input is always older than its result.
    """

    def __init__(
        self, data: Flat, edges: Sequence[Edge] = (), needs_grad: bool = True
    ) -> None:
        """Put a result on the tape."""
        self.data = data
        self.edges = [edge for edge in edges if edge.source.needs_grad]
        self.needs_grad: bool = bool(self.edges) if edges else needs_grad
        self.serial = next(_serials)


def tape(result: Node) -> list[Node]:
    """All that a result was computed from, oldest first, itself last.

    Examples:
        >>> from warpmap.training.foundations.autograd import tensor
        >>> x = tensor(3.0)
        >>> [node.item() for node in tape(x * x + 1)]
        [3.0, 9.0, 10.0]
    """
    found, todo = {result}, [result]
    while todo:
        for edge in todo.pop().edges:
            if edge.source not in found:
                found.add(edge.source)
                todo.append(edge.source)
    return sorted(found, key=lambda node: node.serial)


def pull(
    result: Node, seed: Flat, record: Record | None = None
) -> dict[Node, Flat]:
    """Reverse mode: the gradient of every node, from one pass over the tape.

    Examples:
        >>> from warpmap.training.foundations.autograd import tensor
        >>> x = tensor(3.0)
        >>> pull(x * x + x, [1.0])[x]
        [7.0]
    """
    grads = {result: seed}
    # all that used a node is younger: its gradient is complete when it is met
    for node in reversed(tape(result)):
        for edge in node.edges:
            _accumulate(grads, edge.source, edge.pull(grads[node]))
            if record:
                record(node, edge, grads)
    return grads


def push(result: Node, source: Node, seed: Flat) -> Flat:
    """Forward mode: how the result changes when a source changes by ``seed``.

    Examples:
        >>> from warpmap.training.foundations.autograd import tensor
        >>> x = tensor(3.0)
        >>> push(x * x + x, x, [1.0])
        [7.0]
    """
    changes = {source: seed}
    for node in tape(result):
        for edge in node.edges:
            if edge.source in changes:
                _accumulate(changes, node, edge.push(changes[edge.source]))
    return changes.get(result, [0.0] * len(result.data))


def _accumulate(held: dict[Node, Flat], node: Node, share: Flat) -> None:
    # a new list: the old one may be held elsewhere
    before = held.get(node)
    held[node] = list(map(add, before, share)) if before else share
