"""Who reports to whom in a binomial tree, without any tensor.

``collective_operations`` sends tensors along these edges. ``tree_trace`` sends
plain numbers along the same edges, all ranks in one process, so that a browser
can play them; it imports no torch. A wrong edge breaks both.
"""

from collections.abc import Callable, Sequence

from warpmap.trace import Frame, Mark, Trace, Tree, TreeNode


def tree_children(rank: int, world_size: int) -> list[int]:
    """The ranks that report to this one; the nearest first.

    A rank's parent is its number with the lowest set bit cleared, so that
    rank 6, binary 110, reports to rank 4, binary 100. Rank 0 is the root.

    Examples:
        >>> [tree_children(rank, world_size=6) for rank in range(6)]
        [[1, 2, 4], [], [3], [], [5], []]
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"expected a rank below {world_size}, got {rank}")
    lowest_bit = rank & -rank or world_size
    distances = [1 << k for k in range(world_size.bit_length())]
    return [
        rank + d for d in distances if d < lowest_bit and rank + d < world_size
    ]


Edge = tuple[int, int]
"""A child and its parent."""


def rounds(world_size: int) -> list[list[Edge]]:
    """The edges that are used at one time, on the way up.

    Every rank hears its children one after another, the nearest first.

    Examples:
        >>> rounds(5)
        [[(1, 0), (3, 2)], [(2, 0)], [(4, 0)]]
    """
    families = [tree_children(rank, world_size) for rank in range(world_size)]
    return [
        [
            (children[k], p)
            for p, children in enumerate(families)
            if children[k:]
        ]
        for k in range(len(families[0]))
    ]


def all_reduce_numbers(
    inputs: Sequence[int],
    record: Callable[[str, list[int], list[Edge]], object] | None = None,
) -> list[int]:
    """The tree all-reduce of ``collective_operations``, one number a rank.

    Args:
        inputs: One number a rank, at least one.
        record: Hears of each round, "up" and "down": what all ranks hold after
            it, and the edges that were used.

    Returns:
        The sum, once for each rank.

    Examples:
        >>> all_reduce_numbers([1, 10, 100])
        [111, 111, 111]
    """
    held = list(inputs)
    up = rounds(len(held))
    for edges in up:
        for child, parent in edges:
            held[parent] += held[child]
        if record:
            record("up", held, edges)
    for edges in reversed(up):  # the deepest subtree goes first
        for child, parent in edges:
            held[child] = held[parent]
        if record:
            record("down", held, edges)
    return held


def tree_trace(ranks: int = 6) -> Trace:
    """Run :func:`all_reduce_numbers` and keep every round of it.

    Rank 0 holds a one, rank 1 a ten, rank 2 a hundred: the digits of a sum
    tell whose shares are in it.

    Args:
        ranks: Ranks in the tree, 2 to 9.

    Returns:
        What all ranks hold: before the start, and after each round.

    Raises:
        ValueError: If ``ranks`` is out of its range.

    Examples:
        >>> [node.text for node in tree_trace(ranks=2)[-1].picture.nodes]
        ['rank 0: 11', 'rank 1: 11']
    """
    if not 2 <= ranks <= 9:
        raise ValueError(f"ranks must be 2 to 9, got {ranks}")
    inputs = [10**rank for rank in range(ranks)]
    parents = {
        child: rank
        for rank in range(ranks)
        for child in tree_children(rank, ranks)
    }
    waiting: set[int] = set()

    def tree(held: list[int], marks: dict[int, Mark]) -> Tree:
        def nodes(rank: int) -> list[TreeNode]:
            parent = parents.get(rank)
            mark = marks.get(rank, "wait" if rank in waiting else "")
            me = TreeNode(
                str(rank),
                f"rank {rank}: {held[rank]}",
                None if parent is None else str(parent),
                mark,
            )
            below = tree_children(rank, ranks)
            return [me, *(node for child in below for node in nodes(child))]

        return Tree(nodes(0))

    trace = [Frame("Each rank holds its own share.", tree(inputs, {}))]

    def record(way: str, held: list[int], edges: list[Edge]) -> None:
        senders = [child if way == "up" else parent for child, parent in edges]
        getters = [parent if way == "up" else child for child, parent in edges]
        pairs = ", ".join(
            f"{a} to {b}" for a, b in zip(senders, getters, strict=True)
        )
        waiting.difference_update(getters)
        marks: dict[int, Mark] = dict.fromkeys(senders, "on")
        marks |= dict.fromkeys(getters, "new")
        what = "Sums go up" if way == "up" else "The result goes down"
        says = f"{what}: rank {pairs}."
        if way == "up" and len(trace) == len(rounds(ranks)):
            says += " Rank 0 holds the sum of all."
        if len(trace) == 2 * len(rounds(ranks)):
            says += " Every rank holds it."
        trace.append(Frame(says, tree(held, marks)))
        if way == "up":
            waiting.update(senders)

    all_reduce_numbers(inputs, record)
    return trace
