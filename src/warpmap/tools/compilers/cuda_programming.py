"""Grids, blocks and threads, run in plain Python.

A kernel is a function that every thread runs, each with other indices. Here a
thread is a generator that yields the element it touches, so that all threads
of a block take a step before any takes the next. ``cuda_programming.cu`` holds
the same kernels in CUDA C++.

    one element a thread   i = blockIdx * blockDim + threadIdx, if i < n
    grid-stride loop       then i += gridDim * blockDim, until n

Reference: Nickolls, Buck, Garland and Skadron, 2008,
https://doi.org/10.1145/1365490.1365500
"""

import random
from collections.abc import (
    Callable,
    Iterator,
    Mapping,
    MutableSequence,
    Sequence,
)
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, Literal, NamedTuple

from warpmap.trace import Cell, Frame, Grid, Mark, Trace

WARP = 32
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)
MAX_THREADS = 1024
"""Limits of a launch: blocks, threads on each axis, threads of a block."""


class Dim3(NamedTuple):
    """Three sizes or indices, as CUDA's ``dim3`` and ``uint3``."""

    x: int
    y: int = 1
    z: int = 1


@dataclass(frozen=True)
class Thread:
    """What a thread knows about itself: CUDA's four built-in variables."""

    gridDim: Dim3
    blockDim: Dim3
    blockIdx: Dim3
    threadIdx: Dim3

    @property
    def number(self) -> int:
        """Its number in its block: x runs fastest. 32 in a row are a warp."""
        X, Y, _ = self.blockDim
        x, y, z = self.threadIdx
        return (z * Y + y) * X + x

    @property
    def block_number(self) -> int:
        """Its block's number in the grid, counted in the same way."""
        X, Y, _ = self.gridDim
        x, y, z = self.blockIdx
        return (z * Y + y) * X + x

    def along(self, axis: int, n: int) -> range:
        """The grid-stride loop: this thread's share of ``range(n)``.

        Args:
            axis: 0, 1 or 2, for x, y or z.
            n: Elements on this axis.

        Examples:
            >>> at = Thread(Dim3(2), Dim3(4), Dim3(1, 0, 0), Dim3(3, 0, 0))
            >>> list(at.along(0, 20))  # the last of 8 threads
            [7, 15]
        """
        grid, block = self.gridDim[axis], self.blockDim[axis]
        first = self.blockIdx[axis] * block + self.threadIdx[axis]
        return range(first, n, grid * block)


Kernel = Callable[..., Iterator[int]]
Record = Callable[[Dim3, Mapping[Thread, int]], object]


def axpy_once(
    at: Thread, a: float, x: Sequence[float], y: MutableSequence[float], n: int
) -> Iterator[int]:
    """``y = a x + y``, an element for each thread.

    Examples:
        >>> y = [1.0] * 5
        >>> launch(axpy_once, 2, 4, 10.0, range(5), y, 5)  # 3 threads too many
        >>> y
        [1.0, 11.0, 21.0, 31.0, 41.0]
    """
    i = at.blockIdx.x * at.blockDim.x + at.threadIdx.x
    if i < n:
        y[i] = a * x[i] + y[i]
        yield i


def axpy(
    at: Thread, a: float, x: Sequence[float], y: MutableSequence[float], n: int
) -> Iterator[int]:
    """``y = a x + y``, by a grid of any size.

    Examples:
        >>> y = [1.0] * 5
        >>> launch(axpy, 1, 2, 10.0, range(5), y, 5)  # 2 threads for 5
        >>> y
        [1.0, 11.0, 21.0, 31.0, 41.0]
    """
    first = at.blockIdx.x * at.blockDim.x + at.threadIdx.x
    threads = at.gridDim.x * at.blockDim.x
    for i in range(first, n, threads):
        y[i] = a * x[i] + y[i]
        yield i


def axpy_chunk(
    at: Thread, a: float, x: Sequence[float], y: MutableSequence[float], n: int
) -> Iterator[int]:
    """``y = a x + y``, a piece for each thread: how a CPU would share it out.

    Examples:
        >>> y = [1.0] * 5
        >>> launch(axpy_chunk, 1, 2, 10.0, range(5), y, 5)
        >>> y
        [1.0, 11.0, 21.0, 31.0, 41.0]
    """
    me = at.blockIdx.x * at.blockDim.x + at.threadIdx.x
    each = -(-n // (at.gridDim.x * at.blockDim.x))
    for i in range(me * each, min((me + 1) * each, n)):
        y[i] = a * x[i] + y[i]
        yield i


def touch(
    at: Thread,
    owner: MutableSequence[int],
    visits: MutableSequence[int],
    X: int,
    Y: int = 1,
    Z: int = 1,
) -> Iterator[int]:
    """Tell each element of a box which thread came, and count visits.

    Examples:
        >>> owner, visits = [-1] * 6, [0] * 6
        >>> launch(touch, 1, (2, 2), owner, visits, 3, 2)  # 3 wide, 2 high
        >>> owner, visits
        ([0, 1, 0, 2, 3, 2], [1, 1, 1, 1, 1, 1])
    """
    me = at.block_number * prod(at.blockDim) + at.number
    for z in at.along(2, Z):
        for y in at.along(1, Y):
            for x in at.along(0, X):
                element = (z * Y + y) * X + x
                owner[element] = me
                visits[element] += 1
                yield element


def _dim3(name: str, size: int | Sequence[int], most: Sequence[int]) -> Dim3:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    if not 1 <= len(sizes) <= 3:
        raise ValueError(f"{name} must have 1 to 3 sizes, got {sizes}")
    dims = Dim3(*sizes)
    if not all(1 <= d <= m for d, m in zip(dims, most, strict=True)):
        raise ValueError(
            f"{name} must be 1 to {tuple(most)} in x, y, z, got {tuple(dims)}"
        )
    return dims


def _indices(dims: Dim3) -> list[Dim3]:
    """All indices, x fastest."""
    return [
        Dim3(x, y, z) for z, y, x in product(*(range(d) for d in dims[::-1]))
    ]


def launch(
    kernel: Kernel,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    *arguments: Any,
    seed: int | None = None,
    record: Record | None = None,
) -> None:
    """Run a kernel, as ``kernel<<<grid, block>>>(arguments)`` would.

    Args:
        kernel: Called once for every thread, as ``kernel(thread, *arguments)``;
            yields the element it touched at every step.
        grid: Blocks, on up to three axes.
        block: Threads of a block, on up to three axes.
        arguments: What the kernel takes.
        seed: Shuffles the blocks: CUDA promises no order.
        record: Told of each step of a block, what its threads touched.

    Raises:
        ValueError: If CUDA would refuse the launch.

    Examples:
        >>> launch(axpy, 1, (32, 33), 1.0, [], [], 0)
        Traceback (most recent call last):
        ValueError: block must have at most 1024 threads, got 32 x 33 x 1 = 1056
    """
    gridDim = _dim3("grid", grid, MAX_GRID)
    blockDim = _dim3("block", block, MAX_BLOCK)
    if prod(blockDim) > MAX_THREADS:
        raise ValueError(
            f"block must have at most {MAX_THREADS} threads, got "
            f"{' x '.join(map(str, blockDim))} = {prod(blockDim)}"
        )
    blocks = _indices(gridDim)
    if seed is not None:
        random.Random(seed).shuffle(blocks)
    for blockIdx in blocks:
        threads = [
            Thread(gridDim, blockDim, blockIdx, i) for i in _indices(blockDim)
        ]
        running = {at: kernel(at, *arguments) for at in threads}
        while running:
            steps = {at: next(run, None) for at, run in running.items()}
            touched = {at: i for at, i in steps.items() if i is not None}
            running = {at: running[at] for at in touched}
            if touched and record:
                record(blockIdx, touched)


def gpu_kernel(name: str) -> Callable[..., None]:
    """A kernel of ``cuda_programming.cu``; see ``warpmap.kernels.cuda``.

    Args:
        name: ``axpy_once`` or ``axpy``, which take ``(a, x, y, n)``; ``touch``,
            which takes ``(owner, visits, X, Y, Z)``.

    Examples:
        >>> callable(gpu_kernel("axpy"))  # compiled at its first launch
        True
    """
    # imported here: browsers have no torch
    from warpmap.kernels.cuda import cuda_kernel

    return cuda_kernel(__file__, name)


WALKS: dict[str, Kernel] = {
    "one element each": axpy_once,
    "grid stride": axpy,
    "a piece each": axpy_chunk,
}


def walk_trace(
    n: int = 40,
    blocks: int = 2,
    threads: int = 8,
    walk: Literal[
        "one element each", "grid stride", "a piece each"
    ] = "grid stride",
) -> Trace:
    """Which thread touches which element, step by step.

    Args:
        n: Elements of the array, 1 to 96.
        blocks: Blocks of the grid, 1 to 8.
        threads: Threads of a block, 1 to 16.
        walk: How elements are shared out.

    Returns:
        The array in rows of eight; an element shows block and thread.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> walk_trace(walk="one element each")[-1].caption
        '16 of 40 elements were touched, each once. 24 were left out.'
    """
    for name, value, most in (
        ("n", n, 96),
        ("blocks", blocks, 8),
        ("threads", threads, 16),
    ):
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be 1 to {most}, got {value}")
    if walk not in WALKS:
        raise ValueError(f"walk must be one of {[*WALKS]}, got {walk!r}")
    frames: Trace = []
    owners: dict[int, str] = {}
    visits = 0

    def grid(now: Mapping[int, Thread]) -> Grid:
        def cell(i: int) -> Cell:
            mark: Mark = "new" if i in now else "on" if i in owners else ""
            return Cell(owners.get(i, ""), mark)

        rows = [range(i, min(i + 8, n)) for i in range(0, n, 8)]
        return Grid(
            [(f"{r[0]}", [cell(i) for i in r]) for r in rows],
            [f"+{i}" for i in range(8)],
        )

    def record(blockIdx: Dim3, touched: Mapping[Thread, int]) -> None:
        nonlocal visits
        now = {i: at for at, i in touched.items()}
        visits += len(touched)
        owners.update({i: f"{a.blockIdx.x}.{a.number}" for i, a in now.items()})
        first, last = min(now), max(now)
        where = f"{first} to {last}" if last > first else f"{first}"
        apart = "" if last - first < len(now) else ", with gaps"
        frames.append(
            Frame(
                f"Block {blockIdx.x}: {len(now)} threads touch {where}{apart}.",
                grid(now),
            )
        )

    x, y = [1.0] * n, [0.0] * n
    launch(WALKS[walk], blocks, threads, 1.0, x, y, n, record=record)
    done = sum(y)  # each visit adds one
    often = "each once" if done == len(owners) else f"{visits} times in all"
    left = f" {n - len(owners)} were left out." if n > len(owners) else ""
    frames.append(
        Frame(
            f"{len(owners)} of {n} elements were touched, {often}.{left}",
            grid({}),
        )
    )
    return frames
