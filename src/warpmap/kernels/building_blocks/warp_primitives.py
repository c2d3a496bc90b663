"""What 32 lanes can do with each other's registers.

The lanes of a warp run together, so they can pass values on without memory:
a shuffle reads another lane's register, a ballot collects one bit from each,
a match finds the lanes with the same value. Programs for one lane, here for
the simulated warp; ``warp_primitives.cu`` holds the same in CUDA C++.

    sum, scan          5 shuffles, one for each bit of a lane's number
    pack, count        1 ballot, 1 match
    transpose, 32x32   80 shuffles and no shared memory

Reference: Lin and Grover, 2018,
https://developer.nvidia.com/blog/using-cuda-warp-level-primitives/
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from warpmap.kernels.building_blocks._warp import (
    FULL,
    LANES,
    Call,
    Program,
    ballot,
    match_any,
    run_warp,
    shfl_down,
    shfl_up,
    shfl_xor,
    source_lane,
)
from warpmap.trace import Cell, Frame, Grid, Mark, Trace


def warp_sum(lane: int, x: float) -> Program[float]:
    """The sum of all lanes' ``x``, on every lane.

    Examples:
        >>> run_warp(warp_sum, range(32))[:3]
        [496, 496, 496]
    """
    for step in (16, 8, 4, 2, 1):
        x = x + (yield shfl_xor(FULL, x, step))
    return x


def warp_sum_down(lane: int, x: float) -> Program[float]:
    """The sum of all lanes' ``x``, on lane 0; the others hold less or more.

    Examples:
        >>> run_warp(warp_sum_down, range(32))[:3]
        [496, 512, 528]
    """
    for step in (16, 8, 4, 2, 1):
        x = x + (yield shfl_down(FULL, x, step))
    return x


def warp_scan(lane: int, x: float) -> Program[float]:
    """The sum of ``x`` over this lane and all below it.

    Examples:
        >>> run_warp(warp_scan, range(32))[:5]
        [0, 1, 3, 6, 10]
    """
    for step in (1, 2, 4, 8, 16):
        below = yield shfl_up(FULL, x, step)
        # all lanes shuffle, but the lowest were told their own value
        x = x + below if lane >= step else x
    return x


def warp_pack(lane: int, keep: bool) -> Program[int]:
    """This lane's place among the lanes that ``keep``; -1 if it does not.

    Examples:
        >>> run_warp(warp_pack, [lane % 3 == 0 for lane in range(32)])[:7]
        [0, -1, -1, 1, -1, -1, 2]
    """
    votes = yield ballot(FULL, keep)
    below = (1 << lane) - 1
    return (votes & below).bit_count() if keep else -1


def warp_count(lane: int, key: int, mask: int = FULL) -> Program[int]:
    """How many lanes have this key, on the lowest of them; 0 on the others.

    Examples:
        >>> run_warp(warp_count, [7, 7, 5, 7] * 8)[:5]
        [24, 0, 8, 0, 0]
    """
    same = yield match_any(mask, key)
    below = (1 << lane) - 1
    return 0 if same & below else same.bit_count()


def warp_transpose(lane: int, row: Sequence[Any]) -> Program[list[Any]]:
    """Column ``lane`` of a 32 x 32 matrix, of which each lane holds a row.

    Examples:
        >>> rows = [[100 * i + j for j in range(32)] for i in range(32)]
        >>> run_warp(warp_transpose, rows)[5][:3]
        [5, 105, 205]
    """
    held = list(row)
    for step in (16, 8, 4, 2, 1):
        for low in range(LANES):
            if low & step:
                continue
            # the pair of lanes trades the two corners off the diagonal
            give = low if lane & step else low + step
            held[give] = yield shfl_xor(FULL, held[give], step)
    return held


def gpu_kernel(name: str) -> Callable[..., None]:
    """A kernel of ``warp_primitives.cu``; see ``warpmap.kernels.cuda``.

    Args:
        name: ``lane_sums``, ``lane_scans``, ``lane_packs``, ``lane_counts``:
            each takes ``(x, y, n)`` and is the program above for every 32
            neighbours of ``x``. ``transposes`` takes ``(x, y, M, N)``.

    Examples:
        >>> lane_sums = gpu_kernel("lane_sums")  # compiled at its first launch
        >>> callable(lane_sums)
        True
    """
    # imported here: browsers have no torch
    from warpmap.kernels.cuda import cuda_kernel

    return cuda_kernel(__file__, name)


SUMS = {"xor": warp_sum, "down": warp_sum_down}


def sum_trace(
    pattern: Literal["xor", "down"] = "xor", lanes: int = LANES
) -> Trace:
    """A warp adds up the numbers of its lanes, exchange by exchange.

    Args:
        pattern: Which shuffle: xor is the butterfly, down the tree.
        lanes: Lanes that are there, 1 to 32. The mask names all 32 anyway.

    Returns:
        Above, what each lane holds; below, what it is told. What comes from a
        lane that is not there is shown as ``?``, and what it spoils.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> sum_trace()[-1].caption
        'After 5 shuffles 32 of 32 lanes hold the sum, 496.'
    """
    if not 1 <= lanes <= LANES:
        raise ValueError(f"lanes must be 1 to 32, got {lanes}")
    if pattern not in SUMS:
        raise ValueError(f"pattern must be xor or down, got {pattern!r}")
    frames: Trace = []

    def grid(
        values: Mapping[int, Any],
        mark: Mark = "",
        keys: Mapping[int, str] | None = None,
    ) -> Grid:
        def cell(lane: int) -> Cell:
            if lane not in values:
                return Cell()
            value, key = values[lane], (keys or {}).get(lane, "")
            if value != value:  # UNDEFINED is nan
                return Cell("?", "gone", key)
            return Cell(str(value), mark, key)

        pieces = [range(first, first + 8) for first in range(0, LANES, 8)]
        return Grid(
            [(f"{p[0]}-{p[-1]}", [cell(lane) for lane in p]) for p in pieces],
            [f"+{i}" for i in range(8)],
        )

    def record(calls: Mapping[int, Call], told: Mapping[int, Any]) -> None:
        held = {lane: call.value for lane, call in calls.items()}
        step = calls[0].where
        sources = {lane: source_lane(c, lane) for lane, c in calls.items()}
        # what moves keeps its key; of what two lanes read, one is a copy
        keys = {lane: f"{step}-{lane}" for lane in calls}
        first = "Each lane holds its own number."
        then = "Each lane adds what it was told."
        frames.append(
            Frame(
                then if frames else first,
                grid(held, "on"),
                grid(held, keys=dict(keys)),
            )
        )
        moved = {lane: keys.pop(who, "") for lane, who in sources.items()}
        frames.append(
            Frame(
                f"shfl_{pattern} by {step}: lane 0 is told what lane "
                f"{sources[0]} holds.",
                grid(held, "on"),
                grid(told, "new", moved),
            )
        )

    results = run_warp(SUMS[pattern], range(lanes), record=record)
    total = sum(range(lanes))
    frames.append(
        Frame(
            f"After {len(frames) // 2} shuffles {results.count(total)} of "
            f"{lanes} lanes hold the sum, {total}.",
            grid(dict(enumerate(results)), "new"),
            grid({}),
        )
    )
    return frames
