"""Who adds what to what in a block that sums, without any GPU.

The first kernels of ``reduce.cu`` hold a number for each thread in shared
memory, and add them up in a tree. They differ in which thread adds which
cells. That decides how many warps have something to do, and how many banks of
shared memory they reach at once:

    warps    warps with a thread at work, added up over the steps
    passes   trips to shared memory that their loads take: lanes that want
             different cells of one bank are served one after another

Reference: Harris, 2007,
https://developer.download.nvidia.com/assets/cuda/files/reduction.pdf
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from warpmap.trace import Cell, Frame, Grid, Mark, Trace

LANES = 32
BANKS = 32

Tree = Literal["interleaved", "strided", "sequential"]


class Add(NamedTuple):
    """One addition: ``cells[to] += cells[source]``."""

    thread: int
    to: int
    source: int


def tree_steps(tree: Tree, threads: int = 256) -> list[list[Add]]:
    """The additions of each step; a barrier stands between steps.

    Args:
        tree: Which kernel.
        threads: Of the block, a power of two; each starts with one number.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> tree_steps("sequential", 4)[0]
        [Add(thread=0, to=0, source=2), Add(thread=1, to=1, source=3)]
    """
    if tree not in get_args(Tree):
        raise ValueError(f"tree must be one of {get_args(Tree)}, got {tree!r}")
    if threads < 1 or threads & (threads - 1):
        raise ValueError(f"threads must be a power of two, got {threads}")
    apart = [2**k for k in range(threads.bit_length() - 1)]
    if tree == "sequential":
        return [[Add(t, t, t + s) for t in range(s)] for s in reversed(apart)]
    return [
        [
            Add(to if tree == "interleaved" else to // (2 * s), to, to + s)
            for to in range(0, threads, 2 * s)
        ]
        for s in apart
    ]


def tree_sum(
    values: Sequence[float],
    tree: Tree,
    record: Callable[[list[Add], list[float]], object] | None = None,
) -> float:
    """The sum, added up in the order of a kernel.

    Args:
        values: One for each thread: a power of two.
        tree: Which kernel.
        record: Called after each step with its additions and the cells.

    Examples:
        >>> tree_sum([1, 2, 3, 4], "interleaved")
        10
    """
    cells = list(values)
    for step in tree_steps(tree, len(cells)):
        for add in step:
            cells[add.to] += cells[add.source]
        if record:
            record(step, cells)
    return cells[0]


@dataclass(frozen=True)
class Work:
    """What the steps of a block cost.

    Attributes:
        steps: Barriers.
        warps: Warps with a thread at work, added up over the steps.
        passes: Trips to shared memory that their loads take.
    """

    steps: int
    warps: int
    passes: int


def tree_work(tree: Tree, threads: int = 256) -> Work:
    """Count a block's work; arguments are those of :func:`tree_steps`.

    Examples:
        >>> tree_work("interleaved")
        Work(steps=8, warps=47, passes=47)
    """
    steps = tree_steps(tree, threads)
    counted = [_work(step) for step in steps]
    warps = sum(w for w, _ in counted)
    return Work(len(steps), warps, sum(p for _, p in counted))


def _work(step: Sequence[Add]) -> tuple[int, int]:
    """Warps at work, and the trips that their loads take."""
    wanted: dict[int, list[int]] = {}  # by warp: a bank for each lane at work
    for add in step:
        warp = wanted.setdefault(add.thread // LANES, [])
        warp.append(add.source % BANKS)
    trips = [max(map(banks.count, banks)) for banks in wanted.values()]
    return len(wanted), sum(trips)


def tree_trace(tree: Tree = "interleaved", threads: int = 32) -> Trace:
    """A block adds up its threads' numbers, step by step.

    Args:
        tree: Which kernel: threads interleaved, strided or sequential.
        threads: Threads of the block, a power of two from 2 to 256.

    Returns:
        Above the cells of shared memory; below, at the cell that it writes,
        the thread that is at work.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> tree_trace()[-1].caption
        'Step 5: cell 0 holds the sum, 496.'
    """
    if not 2 <= threads <= 256:
        raise ValueError(f"threads must be 2 to 256, got {threads}")
    wide = min(8, threads)
    frames: Trace = []

    def grid(texts: Sequence[str], marks: dict[int, Mark]) -> Grid:
        rows = [
            (
                f"{first}-{first + wide - 1}",
                [
                    Cell(texts[i], marks.get(i, ""))
                    for i in range(first, first + wide)
                ],
            )
            for first in range(0, threads, wide)
        ]
        return Grid(rows, [f"+{i}" for i in range(wide)])

    def show(caption: str, cells: Sequence[float], step: Sequence[Add]) -> None:
        read: dict[int, Mark] = {add.source: "on" for add in step}
        written: dict[int, Mark] = {add.to: "new" for add in step}
        workers = {add.to: str(add.thread) for add in step}
        frames.append(
            Frame(
                caption,
                grid([str(c) for c in cells], read | written),
                grid([workers.get(i, "") for i in range(threads)], written),
            )
        )

    def record(step: list[Add], cells: list[float]) -> None:
        number = len(frames)
        warps, passes = _work(step)
        says = (
            f"{len(step)} threads of {warps} {_plural('warp', warps)} add, "
            f"in {passes} {_plural('pass', passes)}."
        )
        if len(step) == 1:
            says = f"cell 0 holds the sum, {cells[0]}."
        show(f"Step {number}: {says}", cells, step)

    numbers = range(threads)
    show("Each thread has stored its number.", numbers, [])
    tree_sum(numbers, tree, record)
    return frames


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}es" if word == "pass" else f"{word}s"
