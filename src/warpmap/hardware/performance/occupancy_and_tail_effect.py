"""Blocks that fit on a GPU at once, and what the last of them leave idle.

A kernel is a grid of blocks. A streaming multiprocessor (SM) holds as many as
its warps, registers and shared memory allow; all SMs together are the slots
of the GPU. Blocks fill the slots, and a new one starts where an old one ends:

    slots       SMs x blocks that fit on one
    waves       blocks / slots, rounded up
    efficiency  blocks / (waves x slots), if all blocks take the same time

Reference: Volkov, 2010,
https://www.nvidia.com/content/GTC-2010/pdfs/2238_GTC2010.pdf
Reference: Osama et al., 2023, https://arxiv.org/abs/2301.03598
"""

import heapq
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from warpmap.chart import Axis, Line, LineChart, Point
from warpmap.hardware.gpus import GPUS as SHEETS
from warpmap.trace import Frame, Lanes, Mark, Span, Trace

KIB = 1024
WARP = 32  # threads
MAX_THREADS = 1024  # a block
MAX_REGISTERS = 255  # a thread
REGISTERS = 65536  # an SM
PARTITIONS = 4  # of an SM, each with a scheduler and a quarter of registers
REGISTER_UNIT = 256  # registers are handed to a warp in this unit
SHARED_UNIT = 128  # bytes of shared memory are handed to a block in this unit
RESERVED = 1 * KIB  # bytes of shared memory of a block that CUDA keeps

Capability = Literal["8.0", "8.9", "9.0", "10.0"]


@dataclass(frozen=True)
class SM:
    """Limits of one SM that differ between generations.

    Attributes:
        warps: Warps resident at once.
        blocks: Blocks resident at once.
        shared_bytes: Shared memory of all its blocks.
        shared_bytes_a_block: Shared memory that one block may ask for.
    """

    warps: int
    blocks: int
    shared_bytes: int
    shared_bytes_a_block: int


SMS: dict[str, SM] = {
    "8.0": SM(64, 32, 164 * KIB, 163 * KIB),
    "8.9": SM(48, 24, 100 * KIB, 99 * KIB),
    "9.0": SM(64, 32, 228 * KIB, 227 * KIB),
    "10.0": SM(64, 32, 228 * KIB, 227 * KIB),
}
"""SMs by compute capability: Ampere, Ada, Hopper, Blackwell."""

GPUS: dict[str, dict[str, str | int | float]] = {
    name: {
        "capability": sheet.compute_capability,
        "sms": sheet.sms,
        "bandwidth_gb_s": round(1000 * sheet.bandwidth_tb_s, 1),
    }
    for name, sheet in SHEETS.items()
    if sheet.compute_capability in SMS and sheet.sms and sheet.bandwidth_tb_s
}
"""GPUs as arguments of ``launch``."""

KERNELS: dict[str, dict[str, int]] = {
    "One element a thread": {
        "threads_per_block": 256,
        "registers_per_thread": 16,
        "shared_bytes": 0,
        "bytes_in_flight_a_thread": 4,
    },
    "Four float4 a thread": {
        "threads_per_block": 128,
        "registers_per_thread": 40,
        "shared_bytes": 0,
        "bytes_in_flight_a_thread": 64,
    },
    "GEMM, 128 x 256 tile, 4 stages": {
        "threads_per_block": 384,
        "registers_per_thread": 168,
        "shared_bytes": 4 * 48 * KIB,
        "bytes_in_flight_a_thread": 384,
    },
}
"""Kernels as arguments of ``launch``."""


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _check(least: int, **arguments: float) -> None:
    for name, value in arguments.items():
        if not least <= value < math.inf:
            raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class Residency:
    """What one SM holds of a kernel.

    Attributes:
        blocks: Blocks resident at once; 0 if not even one fits.
        occupancy: Resident warps over the warps that the SM could hold.
        limits: What stops one block more.
    """

    blocks: int
    occupancy: float
    limits: tuple[str, ...]


def residency(
    threads_per_block: int,
    registers_per_thread: int,
    shared_bytes: int,
    sm: SM = SMS["9.0"],
) -> Residency:
    """Blocks that one SM holds.

    Args:
        threads_per_block: Threads a block.
        registers_per_thread: Registers a thread, as the compiler reports.
        shared_bytes: Shared memory a block, static and dynamic.
        sm: Limits of the SM.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> residency(256, 32, shared_bytes=0)
        Residency(blocks=8, occupancy=1.0, limits=('warps', 'registers'))
        >>> residency(256, 33, shared_bytes=0).occupancy
        0.75
    """
    ranges = {
        "threads_per_block": (1, threads_per_block, MAX_THREADS),
        "registers_per_thread": (1, registers_per_thread, MAX_REGISTERS),
        "shared_bytes": (0, shared_bytes, sm.shared_bytes_a_block),
    }
    for name, (low, value, high) in ranges.items():
        if not low <= value <= high:
            raise ValueError(f"{name} must be {low} to {high}, got {value}")

    warps = -(-threads_per_block // WARP)
    # a warp lives in one partition and takes its registers there
    of_a_warp = _up(registers_per_thread * WARP, REGISTER_UNIT)
    warps_by_registers = REGISTERS // PARTITIONS // of_a_warp * PARTITIONS
    fits = {
        "warps": sm.warps // warps,
        "blocks": sm.blocks,
        "registers": warps_by_registers // warps,
        "shared memory": sm.shared_bytes
        // _up(shared_bytes + RESERVED, SHARED_UNIT),
    }
    blocks = min(fits.values())
    return Residency(
        blocks=blocks,
        occupancy=blocks * warps / sm.warps,
        limits=tuple(name for name, most in fits.items() if most == blocks),
    )


def waves(blocks: int, slots: int) -> int:
    """Rounds in which equal blocks run.

    Args:
        blocks: Blocks of the grid.
        slots: Blocks that the GPU holds at once.

    Raises:
        ValueError: If a number is not positive.

    Examples:
        >>> waves(132, 132), waves(133, 132)
        (1, 2)
    """
    _check(1, blocks=blocks, slots=slots)
    return -(-blocks // slots)


def wave_efficiency(blocks: int, slots: int) -> float:
    """Share of the slots' time that equal blocks use.

    Args:
        blocks: Blocks of the grid.
        slots: Blocks that the GPU holds at once.

    Raises:
        ValueError: If a number is not positive.

    Examples:
        >>> wave_efficiency(132, 132), round(wave_efficiency(133, 132), 3)
        (1.0, 0.504)
    """
    return blocks / (waves(blocks, slots) * slots)


def gemm_tiles(M: int, N: int, tile_m: int = 128, tile_n: int = 256) -> int:
    """Tiles of the output of a matrix product, one block each.

    Args:
        M: Rows of the output.
        N: Columns of the output.
        tile_m: Rows of a tile.
        tile_n: Columns of a tile.

    Raises:
        ValueError: If a number is not positive.

    Examples:
        >>> gemm_tiles(1536, 2816), gemm_tiles(1536, 2817)
        (132, 144)
    """
    _check(1, M=M, N=N, tile_m=tile_m, tile_n=tile_n)
    return -(-M // tile_m) * -(-N // tile_n)


@dataclass(frozen=True)
class Run:
    """One block on the GPU.

    Attributes:
        block: Its number, in the order of the grid.
        slot: Where it ran.
        start: When it started.
        end: When it ended, in the unit of the durations.
    """

    block: int
    slot: int
    start: float
    end: float


def dispatch(
    durations: Iterable[float],
    slots: int,
    visit: Callable[[Run], object] | None = None,
) -> list[Run]:
    """Give every block, in order, the slot that is free first.

    Args:
        durations: How long each block takes.
        slots: Blocks that the GPU holds at once.
        visit: Called with each block as it starts.

    Returns:
        What ran where and when; of several free slots the lowest is taken.

    Raises:
        ValueError: If there is no slot, or a duration is negative.

    Examples:
        >>> max(run.end for run in dispatch([2.0] * 5, slots=4))
        4.0
    """
    _check(1, slots=slots)
    free = [(0.0, slot) for slot in range(slots)]  # a heap: when, which
    runs = []
    for block, duration in enumerate(durations):
        _check(0, durations=duration)
        start, slot = free[0]
        run = Run(block, slot, start, start + duration)
        heapq.heapreplace(free, (run.end, slot))
        if visit:
            visit(run)
        runs.append(run)
    return runs


@dataclass(frozen=True)
class Launch:
    """What a launch makes of a GPU.

    Attributes:
        blocks_per_sm: Blocks resident on one SM.
        occupancy_percent: Resident warps over the most possible, in percent.
        limited_by: What stops one block more on an SM.
        slots: Blocks resident on the GPU.
        waves: Rounds in which the blocks run.
        last_wave_blocks: Blocks of the last round.
        efficiency_percent: Share of the slots' time in use, in percent.
        bandwidth_in_flight_gb_s: Upper bound of the bandwidth, by Little's
            law and the data sheet, in GB/s.
    """

    blocks_per_sm: int
    occupancy_percent: float
    limited_by: str
    slots: int
    waves: int
    last_wave_blocks: int
    efficiency_percent: float
    bandwidth_in_flight_gb_s: float


def launch(
    blocks: int = 133,
    threads_per_block: int = 384,
    registers_per_thread: int = 168,
    shared_bytes: int = 192 * KIB,
    capability: Capability = "9.0",
    sms: int = 132,
    bytes_in_flight_a_thread: int = 16,
    latency_ns: float = 500.0,
    bandwidth_gb_s: float = 4800.0,
) -> Launch:
    """Occupancy, waves and bandwidth of a launch.

    Args:
        blocks: Blocks of the grid.
        threads_per_block: Threads a block, 1 to 1024.
        registers_per_thread: Registers a thread, as the compiler reports.
        shared_bytes: Shared memory a block, in bytes.
        capability: Compute capability: 8.0 A100, 8.9 L40S, 9.0 H100 and H200,
            10.0 B200.
        sms: SMs of the GPU.
        bytes_in_flight_a_thread: Bytes that each thread has asked memory for
            and waits for, on average.
        latency_ns: Time from asking to receiving, in ns.
        bandwidth_gb_s: Bandwidth of the memory, in GB/s (10^9 byte/s).

    Raises:
        ValueError: If a number is out of range, or no block fits.

    Examples:
        >>> found = launch(blocks=133)
        >>> found.blocks_per_sm, found.waves, found.last_wave_blocks
        (1, 2, 1)
    """
    _check(1, blocks=blocks, sms=sms)
    _check(
        0,
        bytes_in_flight_a_thread=bytes_in_flight_a_thread,
        bandwidth_gb_s=bandwidth_gb_s,
    )
    if not 0 < latency_ns < math.inf:
        raise ValueError(f"latency_ns must be more than 0, got {latency_ns}")
    if capability not in SMS:
        raise ValueError(
            f"capability must be one of {', '.join(SMS)}, got {capability}"
        )
    held = residency(
        threads_per_block, registers_per_thread, shared_bytes, SMS[capability]
    )
    if not held.blocks:
        raise ValueError(
            f"registers_per_thread must be less, got {registers_per_thread}: "
            f"{threads_per_block} threads need more than {REGISTERS} registers"
        )
    slots = sms * held.blocks
    threads = min(blocks, slots) * threads_per_block
    in_flight = threads * bytes_in_flight_a_thread / latency_ns
    return Launch(
        blocks_per_sm=held.blocks,
        occupancy_percent=100 * held.occupancy,
        limited_by=", ".join(held.limits),
        slots=slots,
        waves=waves(blocks, slots),
        last_wave_blocks=(blocks - 1) % slots + 1,
        efficiency_percent=100 * wave_efficiency(blocks, slots),
        bandwidth_in_flight_gb_s=min(in_flight, bandwidth_gb_s),
    )


def wave_chart(**arguments: Any) -> LineChart:
    """Efficiency against the size of the grid.

    Args:
        arguments: Those of ``launch``.

    Raises:
        ValueError: If a number is out of range, or no block fits.

    Examples:
        >>> wave_chart(blocks=133).points[0].x
        133
    """
    yours = launch(**arguments)
    slots = yours.slots
    blocks = (yours.waves - 1) * slots + yours.last_wave_blocks
    # up to eight waves before this one, and two after it
    shown = range(max(0, yours.waves - 9), max(5, yours.waves + 2))
    ends = [n for w in shown for n in (w * slots + 1, (w + 1) * slots)]
    return LineChart(
        f"Efficiency with {slots} slots",
        Axis("blocks of the grid"),
        Axis("slots in use, %"),
        [
            Line(
                "equal blocks",
                [(n, 100 * wave_efficiency(n, slots)) for n in ends],
            )
        ],
        [Point("this launch", blocks, yours.efficiency_percent)],
    )


def dispatch_trace(
    blocks: int = 13, sms: int = 4, resident: int = 1, uneven: bool = False
) -> Trace:
    """Blocks on their SMs over time, one frame a block.

    Args:
        blocks: Blocks of the grid, at most 38.
        sms: SMs of the GPU, at most 16.
        resident: Blocks that an SM holds, at most 4.
        uneven: Whether the blocks take 6 to 14 us instead of 10 each.

    Returns:
        A lane for each place of an SM; the last frame shows what stayed idle.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> dispatch_trace(blocks=5)[-1].caption
        'All done after 20 us, 62% of it used.'
    """
    for name, value, most in (
        ("blocks", blocks, 38),
        ("sms", sms, 16),
        ("resident", resident, 4),
    ):
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be 1 to {most}, got {value}")
    # 7 and 9 have no common divisor: every length from 6 to 14 in turn
    durations = [6.0 + 7 * b % 9 if uneven else 10.0 for b in range(blocks)]
    slots = sms * resident
    end = max(run.end for run in dispatch(durations, slots))
    seen: list[Run] = []
    frames: Trace = []

    def lanes(now: float, idle: bool = False) -> Lanes:
        def mark(run: Run) -> Mark:
            if run is seen[-1] and not idle:
                return "new"
            return "on" if run.end > now else ""

        # like the hardware, slot numbers go round the SMs before a second
        # block comes to any
        rows = []
        for slot in sorted(range(slots), key=lambda s: (s % sms, s // sms)):
            mine = [run for run in seen if run.slot == slot]
            spans = [Span(r.start, r.end, str(r.block), mark(r)) for r in mine]
            last = mine[-1].end if mine else 0.0
            if idle and last < end:
                spans.append(Span(last, end, "idle", "gone"))
            rows.append((f"SM {slot % sms}", spans))
        return Lanes(rows, "us", end, None if idle else now)

    def visit(run: Run) -> None:
        seen.append(run)
        left = blocks - len(seen)
        frames.append(
            Frame(
                f"At {run.start:g} us block {run.block} takes a place on "
                f"SM {run.slot % sms}; {left or 'none'} left.",
                lanes(run.start),
            )
        )

    dispatch(durations, slots, visit)
    used = sum(durations) / (slots * end)
    frames.append(
        Frame(
            f"All done after {end:g} us, {used:.0%} of it used.",
            lanes(end, idle=True),
        )
    )
    return frames
