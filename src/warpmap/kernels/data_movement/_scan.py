"""Three ways to find all prefixes at once, without any GPU.

Each takes any associative operation, and does in one step what does not
depend on each other:

    hillis_steele     log2 n steps, n log2 n - n + 1 operations
    blelloch          2 log2 n steps, 2 (n - 1) operations
    reduce_then_scan  two passes through the numbers, of blocks that wait once

References: Hillis and Steele, 1986, https://doi.org/10.1145/7902.7903;
Blelloch, 1990, https://www.cs.cmu.edu/~guyb/papers/Ble93.pdf
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import add
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from warpmap.trace import Cell, Frame, Grid, Mark, Trace

T = TypeVar("T")
Operation = Callable[[T, T], T]
Algorithm = Literal["hillis_steele", "blelloch", "reduce_then_scan"]


class Step(NamedTuple):
    """What was done at once, between two barriers.

    Attributes:
        says: In words.
        cells: The numbers after it.
        read: Places that were read.
        written: Places that changed.
        operations: How often the operation was applied.
    """

    says: str
    cells: list[Any]
    read: list[int]
    written: list[int]
    operations: int


Record = Callable[[Step], object]


def hillis_steele(
    values: Sequence[T], op: Operation[T], record: Record | None = None
) -> list[T]:
    """Inclusive scan: each cell adds the one 1, 2, 4, ... places before it.

    Args:
        values: Any number of them.
        op: Associative; the earlier number is its first argument.
        record: Called after each step.

    Examples:
        >>> hillis_steele([3, 1, 7, 0], add)
        [3, 4, 11, 11]
    """
    cells, apart = list(values), 1
    while apart < len(cells):
        # all read before any writes: two copies, or a barrier between
        sums = [op(a, b) for a, b in zip(cells, cells[apart:], strict=False)]
        cells[apart:] = sums
        if record:
            n = len(sums)
            says = f"each adds the cell {apart} before it"
            written = [*range(apart, len(cells))]
            record(Step(says, cells[:], [*range(len(cells))], written, n))
        apart *= 2
    return cells


def blelloch(
    values: Sequence[T],
    op: Operation[T],
    identity: T,
    record: Record | None = None,
) -> list[T]:
    """Exclusive scan: add up in a tree, then hand down what came before.

    Args:
        values: A power of two of them.
        op: Associative; the earlier number is its first argument.
        identity: What changes nothing: 0 of a sum.
        record: Called after each step.

    Raises:
        ValueError: If the number of values is no power of two.

    Examples:
        >>> blelloch([3, 1, 7, 0], add, 0)
        [0, 3, 4, 11]
    """
    n = len(values)
    if n < 1 or n & (n - 1):
        raise ValueError(f"n must be a power of two, got {n}")
    cells = list(values)
    apart = [2**k for k in range(n.bit_length() - 1)]

    for s in apart:
        right = [*range(2 * s - 1, n, 2 * s)]
        left = [i - s for i in right]
        for i, j in zip(left, right, strict=True):
            cells[j] = op(cells[i], cells[j])
        if record:
            says = f"up: each right end adds the cell {s} before it"
            record(Step(says, cells[:], left + right, right, len(right)))

    cells[-1] = identity
    if record:
        says = "nothing lies before the first: the total gives way to that"
        record(Step(says, cells[:], [], [n - 1], 0))
    for s in reversed(apart):
        right = [*range(2 * s - 1, n, 2 * s)]
        left = [i - s for i in right]
        for i, j in zip(left, right, strict=True):
            # down: left gets what is before both, right that and left's sum
            cells[i], cells[j] = cells[j], op(cells[j], cells[i])
        if record:
            says = f"down: ends swap with the cell {s} before, and add"
            both = left + right
            record(Step(says, cells[:], both, both, len(right)))
    return cells


def reduce_then_scan(
    values: Sequence[T],
    op: Operation[T],
    block: int = 4,
    record: Record | None = None,
) -> list[T]:
    """Inclusive scan of blocks that each know what came before them.

    Args:
        values: Any number of them.
        op: Associative; the earlier number is its first argument.
        block: Numbers a block.
        record: Called after each of the three passes.

    Raises:
        ValueError: If a block is empty.

    Examples:
        >>> reduce_then_scan([3, 1, 7, 0, 4], add, block=2)
        [3, 4, 11, 11, 15]
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    cells = list(values)
    starts = range(0, len(cells), block)
    blocks = [cells[i : i + block] for i in starts]
    ends = [i + len(b) - 1 for i, b in zip(starts, blocks, strict=True)]

    def done(says: str, read: list[int], written: list[int], n: int) -> None:
        if record:
            record(Step(says, cells[:], read, written, n))

    everywhere = [*range(len(cells))]
    sums = [hillis_steele(b, op)[-1] for b in blocks]
    done(
        f"each block adds up its numbers: {sums}",
        everywhere,
        [],
        len(cells) - len(blocks),
    )
    for i in range(1, len(sums)):
        sums[i] = op(sums[i - 1], sums[i])
    done(f"one block scans the sums: {sums}", [], [], max(0, len(sums) - 1))
    for k, (i, b) in enumerate(zip(starts, blocks, strict=True)):
        for j, value in enumerate(b):
            before = cells[i + j - 1] if j else sums[k - 1] if k else None
            cells[i + j] = value if before is None else op(before, value)
    done(
        "each block starts from the sum before it and reads once more",
        everywhere,
        everywhere,
        max(0, len(cells) - 1),
    )
    assert [cells[i] for i in ends] == sums
    return cells


def scan_trace(algorithm: Algorithm = "hillis_steele", n: int = 16) -> Trace:
    """A scan of the numbers 1 to n, step by step.

    Args:
        algorithm: Which: hillis_steele, blelloch or reduce_then_scan.
        n: How many numbers, a power of two from 2 to 64.

    Returns:
        A row for each step: what it read, what it wrote.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> scan_trace(n=8)[-1].caption
        'Step 3: each adds the cell 4 before it. 17 additions so far.'
    """
    if algorithm not in get_args(Algorithm):
        raise ValueError(
            f"algorithm must be one of {get_args(Algorithm)}, got {algorithm!r}"
        )
    if not 2 <= n <= 64 or n & (n - 1):
        raise ValueError(f"n must be a power of two from 2 to 64, got {n}")
    values = [*range(1, n + 1)]
    steps = [Step("", values, [], [], 0)]
    if algorithm == "hillis_steele":
        hillis_steele(values, add, steps.append)
    elif algorithm == "blelloch":
        blelloch(values, add, 0, steps.append)
    else:
        reduce_then_scan(values, add, max(2, n // 4), steps.append)

    frames, additions = [Frame("The numbers.", _grid(steps[0]))], 0
    for number, (before, step) in enumerate(pairwise(steps), start=1):
        additions += step.operations
        caption = f"Step {number}: {step.says}. {additions} additions so far."
        frames.append(Frame(caption, _grid(step, before)))
    return frames


def _grid(step: Step, before: Step | None = None) -> Grid:
    """The cells before a step and after it, eight in a row."""
    n = len(step.cells)
    wide = min(8, n)
    rows = []
    for first in range(0, n, wide):
        places = range(first, first + wide)
        name = f"{first}-{first + wide - 1}"
        if before:
            read: list[tuple[int, Mark]] = [
                (i, "on" if i in step.read else "") for i in places
            ]
            cells = [Cell(str(before.cells[i]), mark) for i, mark in read]
            rows.append((f"{name} before", cells))
        wrote: list[tuple[int, Mark]] = [
            (i, "new" if i in step.written else "") for i in places
        ]
        cells = [Cell(str(step.cells[i]), mark) for i, mark in wrote]
        rows.append((f"{name} after" if before else name, cells))
    return Grid(rows, [f"+{i}" for i in range(wide)])
