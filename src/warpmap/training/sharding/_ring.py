"""Who passes which chunk on at which step of a ring, without any tensor.

``collective_operations`` follows these steps with tensors and processes.
``ring_trace`` follows the same steps with lists of numbers, all ranks in one
process, so that a browser can play them; it imports no torch. A wrong step
breaks both, and the tests of both.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from warpmap.trace import Arrow, Cell, Frame, Mark, Ring, Trace


class Step(NamedTuple):
    """What one rank does in one step, in which all ranks take part."""

    send: int  # the chunk that goes to the next rank
    receive: int  # the chunk that comes from the rank before


def reduce_scatter_steps(rank: int, size: int) -> list[Step]:
    """Each chunk visits all ranks, and ends complete on the rank of its number.

    What comes is added to the rank's own share, and sent in the next step.

    Examples:
        >>> reduce_scatter_steps(rank=0, size=3)
        [Step(send=2, receive=1), Step(send=1, receive=0)]
    """
    return [
        Step((rank - 1 - step) % size, (rank - 2 - step) % size)
        for step in range(size - 1)
    ]


def all_gather_steps(rank: int, size: int) -> list[Step]:
    """Each chunk starts on the rank of its number, and is copied to all others.

    Examples:
        >>> all_gather_steps(rank=0, size=3)
        [Step(send=0, receive=2), Step(send=2, receive=1)]
    """
    return [
        Step((rank - step) % size, (rank - 1 - step) % size)
        for step in range(size - 1)
    ]


Chunks = list[list[int]]
"""What one rank holds."""


def all_reduce_lists(
    inputs: Sequence[Sequence[int]],
    record: Callable[[str, list[Chunks], list[Step]], object] | None = None,
) -> list[list[int]]:
    """The ring all-reduce of ``collective_operations``, on lists of numbers.

    Args:
        inputs: One list a rank, all of the same length, at least 1.
        record: Hears of the "cut" into chunks and of every "send", "add" and
            "copy": what all ranks hold then, and the step of each rank.

    Returns:
        The sum, once for each rank.

    Raises:
        ValueError: If there is no rank or no element, or lengths differ.

    Examples:
        >>> all_reduce_lists([[1, 2, 3], [10, 20, 30]])
        [[11, 22, 33], [11, 22, 33]]
    """
    size, length = len(inputs), len(inputs[0]) if inputs else 0
    if not length or any(len(values) != length for values in inputs):
        lengths = [len(values) for values in inputs]
        raise ValueError(f"expected lists of one length, got {lengths}")
    width = -(-length // size)
    held = []
    for values in inputs:
        padded = [*values, *[0] * (size * width - length)]
        held.append([padded[c * width :][:width] for c in range(size)])
    if record:
        record("cut", held, [])

    for schedule, verb in (
        (reduce_scatter_steps, "add"),
        (all_gather_steps, "copy"),
    ):
        of_ranks = [schedule(rank, size) for rank in range(size)]
        for steps in map(list, zip(*of_ranks, strict=True)):
            if record:
                record("send", held, steps)
            sent = [held[rank][steps[rank].send] for rank in range(size)]
            for rank in range(size):
                mine = held[rank][steps[rank].receive]
                came = sent[rank - 1]
                held[rank][steps[rank].receive] = (
                    [a + b for a, b in zip(mine, came, strict=True)]
                    if verb == "add"
                    else came
                )
            if record:
                record(verb, held, steps)
    return [[n for chunk in c for n in chunk][:length] for c in held]


def ring_trace(ranks: int = 4, elements: int = 4) -> Trace:
    """Run :func:`all_reduce_lists` and keep every step of it.

    Rank 0 holds ones, rank 1 tens, rank 2 hundreds: the digits of a sum tell
    whose shares are in it.

    Args:
        ranks: Ranks on the ring, 2 to 6.
        elements: Elements of each rank's tensor, 1 to twice the ranks; zeros
            fill up the last chunks.

    Returns:
        What all ranks hold: before the start, and after each send and each
        arrival.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> trace = ring_trace(ranks=2, elements=2)
        >>> [[c.text for c in cells] for _, cells in trace[-1].picture.nodes]
        [['11', '11'], ['11', '11']]
    """
    if not 2 <= ranks <= 6:
        raise ValueError(f"ranks must be 2 to 6, got {ranks}")
    if not 1 <= elements <= 2 * ranks:
        raise ValueError(f"elements must be 1 to {2 * ranks}, got {elements}")

    trace: Trace = []
    taken = 0

    def record(verb: str, held: list[Chunks], steps: list[Step]) -> None:
        nonlocal taken
        taken += verb == "send"
        first = taken < ranks
        half = "Reduce-scatter" if first else "All-gather"
        step = f"{half}, step {taken if first else taken - ranks + 1}"
        marks: dict[tuple[int, int], Mark] = {}
        if not first:  # leftovers, until a finished chunk takes their place
            ahead = [all_gather_steps(r, ranks) for r in range(ranks)]
            at = taken - ranks + (verb == "copy")
            marks = {
                (r, later.receive): "wait"
                for r in range(ranks)
                for later in ahead[r][at:]
            }
        arrows = []
        for rank, (send, receive) in enumerate(steps):
            if verb == "send":
                marks[rank, send] = "on"
                to = (rank + 1) % ranks
                arrows.append(Arrow(rank, to, f"chunk {send}"))
            else:
                marks[rank, receive] = "new"
        says = {
            "cut": f"Each rank cuts its tensor into {ranks} chunks.",
            "send": f"{step}: every rank sends one chunk to the next rank.",
            "add": f"{step}: what came is added to the rank's own share.",
            "copy": f"{step}: a finished chunk takes the place of a leftover.",
        }[verb]
        if verb == "add" and taken == ranks - 1:
            says += " Rank r now holds the finished chunk r."
        if verb == "copy" and taken == 2 * (ranks - 1):
            says += " Every rank holds the sum."
        trace.append(Frame(says, _ring(held, marks, arrows)))

    inputs = [[10**rank] * elements for rank in range(ranks)]
    all_reduce_lists(inputs, record)
    return trace


def _ring(
    held: list[Chunks], marks: dict[tuple[int, int], Mark], arrows: list[Arrow]
) -> Ring:
    nodes = []
    for rank, chunks in enumerate(held):
        texts = [" ".join(map(str, chunk)) for chunk in chunks]
        cells = [Cell(t, marks.get((rank, c), "")) for c, t in enumerate(texts)]
        nodes.append((f"rank {rank}", cells))
    return Ring(nodes, arrows)
