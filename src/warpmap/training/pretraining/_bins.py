"""Which documents share a row, and where long ones are cut. Pure Python.

Reference: Ding et al., 2024, https://arxiv.org/abs/2404.10830
"""

from collections.abc import Callable, Sequence

from warpmap.trace import Cell, Frame, Grid, Mark, Trace


def best_fit_decreasing(
    lengths: Sequence[int],
    capacity: int,
    record: Callable[[int, int, list[list[int]]], object] | None = None,
) -> list[list[int]]:
    """Put items into bins: the longest first, each where it fits tightest.

    The fewest bins are hard to find. In the worst case this needs about 11/9
    as many (Johnson et al., 1974); on many short documents hardly any more.

    Args:
        lengths: Tokens of each item, 1 to ``capacity``.
        capacity: Tokens of a bin.
        record: Receives each item, its bin, and all bins, once it is put.

    Returns:
        The indices of the items in each bin. Equal lengths keep their order.

    Raises:
        ValueError: If an item is empty or longer than a bin.

    Examples:
        >>> best_fit_decreasing([4, 8, 1, 4, 2, 1], capacity=10)
        [[1, 2, 5], [0, 3, 4]]
    """
    if capacity < 1:
        raise ValueError(f"capacity must be 1 or more, got {capacity}")
    if lengths and not 1 <= min(lengths) <= max(lengths) <= capacity:
        raise ValueError(
            f"lengths must be 1 to {capacity}, the capacity, got "
            f"{min(lengths)} to {max(lengths)}: cut long documents first"
        )
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where some bin has room for r more tokens
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        if fitting := rooms >> length:
            # the lowest bit is the least room that is enough
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        with_room[room - length].append(chosen)
        rooms |= 1 << room - length
        if record:
            record(item, chosen, bins)
    return bins


def pieces(lengths: Sequence[int], capacity: int) -> list[tuple[int, int, int]]:
    """Cut what is longer than a bin, and nothing else.

    Args:
        lengths: Tokens of each document; an empty one has no piece.
        capacity: Tokens of a bin.

    Returns:
        Document, first token and end of each piece, in their order.

    Raises:
        ValueError: If ``capacity`` is below 1.

    Examples:
        >>> pieces([3, 9], capacity=4)
        [(0, 0, 3), (1, 0, 4), (1, 4, 8), (1, 8, 9)]
    """
    if capacity < 1:
        raise ValueError(f"capacity must be 1 or more, got {capacity}")
    return [
        (document, start, min(start + capacity, length))
        for document, length in enumerate(lengths)
        for start in range(0, length, capacity)
    ]


def packing_trace(lengths: str = "3 7 2 5 4 6 1 4", capacity: int = 8) -> Trace:
    """Pack a few documents and keep every step.

    Args:
        lengths: Tokens of each document, 1 to 16 of them, apart by spaces.
        capacity: Tokens of a row, 1 to 24.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> print(packing_trace("3 7 2", capacity=8)[-1].caption)
        C, 2 tokens: the tightest row that has room is row 2, now full to 5.
    """
    if not 1 <= capacity <= 24:
        raise ValueError(f"capacity must be 1 to 24, got {capacity}")
    words = lengths.split()
    if not 1 <= len(words) <= 16 or not all(w.isdecimal() for w in words):
        raise ValueError(f"lengths must be 1 to 16 numbers, got {lengths!r}")
    sizes = [int(word) for word in words]
    names = "ABCDEFGHIJKLMNOP"
    trace: Trace = []

    def draw(caption: str, bins: list[list[int]], new: int = -1) -> None:
        rows = []
        for number, members in enumerate(bins, start=1):
            cells: list[Cell] = []
            for item in members:
                mark: Mark = "new" if item == new else "on"
                cells += [Cell(names[item], mark)] * sizes[item]
            cells += [Cell()] * (capacity - len(cells))
            rows.append((f"row {number}", cells))
        if not rows:
            rows = [("row 1", [Cell()] * capacity)]
        trace.append(Frame(caption, Grid(rows)))

    def record(item: int, chosen: int, bins: list[list[int]]) -> None:
        size = sizes[item]
        full = sum(sizes[i] for i in bins[chosen])
        said = f"{names[item]}, {size} token{'s' * (size > 1)}: "
        if full == size:
            said += f"no row has room, so row {chosen + 1} begins."
        else:
            said += (
                "the tightest row that has room is "
                f"row {chosen + 1}, now full to {full}."
            )
        draw(said, bins, item)

    draw(f"{len(sizes)} documents wait, the longest first.", [])
    best_fit_decreasing(sizes, capacity, record)
    return trace


def cut_when_full(lengths: Sequence[int], capacity: int) -> int:
    """Documents that are cut when all are joined and cut into full rows.

    Raises:
        ValueError: If ``capacity`` is below 1.

    Examples:
        >>> cut_when_full([3, 5, 4, 4], capacity=8)
        0
        >>> cut_when_full([3, 4, 5, 4], capacity=8)
        1
    """
    if capacity < 1:
        raise ValueError(f"capacity must be 1 or more, got {capacity}")
    cut, start = 0, 0
    for length in lengths:
        end = start + length
        cut += length > 0 and start // capacity != (end - 1) // capacity
        start = end
    return cut
