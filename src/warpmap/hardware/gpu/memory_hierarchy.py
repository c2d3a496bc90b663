"""Caches, and the chase that shows where each of them ends.

A cache keeps lines of 128 bytes in sets. A line may lie in one set only, in
any of its ways; a set that is full drops the line that was used least
recently. A pointer chase walks a ring of lines over and over, each load
waiting for the one before, so its time is latency and nothing else:

    fits in L1      every load takes L1's cycles
    fits in L2      every load takes L2's
    fits in none    every load goes to memory

Reference: Luo et al., 2024, https://arxiv.org/abs/2402.13499
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from warpmap.chart import Axis, Line, LineChart, Point
from warpmap.hardware.gpus import GPUS as SHEETS
from warpmap.trace import Cell, Frame, Grid, Mark, Trace

KIB, MIB = 1 << 10, 1 << 20
LINE_BYTES = 128
L1_WAYS, L2_WAYS = 4, 16  # assumed: NVIDIA publishes neither

L1_KIB = {"7.0": 128, "8.0": 192, "8.9": 128, "9.0": 256, "10.0": 256}
"""L1 cache and shared memory of an SM, which share it, by capability."""

GPUS: dict[str, dict[str, int]] = {
    name: {
        "l1_kib": L1_KIB[sheet.compute_capability],
        "l2_mib": int(sheet.l2_mb),
    }
    for name, sheet in SHEETS.items()
    if sheet.compute_capability in L1_KIB and sheet.l2_mb
}
"""Sizes of caches, as arguments of ``chase_latency``."""


class Cache:
    """A set-associative cache that drops the least recently used line.

    Args:
        size: Bytes; a multiple of ``ways * line``.
        ways: Lines of a set.
        line: Bytes of a line.

    Raises:
        ValueError: If the size is not a multiple.

    Examples:
        >>> cache = Cache(size=512, ways=2)
        >>> [cache.access(address) for address in (0, 64, 128, 0)]
        [False, True, False, True]
    """

    def __init__(self, size: int, ways: int, line: int = LINE_BYTES) -> None:
        """Start with every way empty."""
        if size < 1 or size % (ways * line):
            raise ValueError(
                f"size must be a multiple of {ways * line}, got {size}"
            )
        self.ways = ways
        self.line = line
        # keys are lines, the least recently used first
        self.sets: list[dict[int, None]] = [
            {} for _ in range(size // (ways * line))
        ]

    def access(self, address: int) -> bool:
        """Use the line of an address, and fetch it if it is not there.

        Args:
            address: Of any byte of the line.

        Returns:
            Whether it was there.
        """
        line = address // self.line
        kept = self.sets[line % len(self.sets)]
        hit = line in kept
        if hit:
            del kept[line]
        elif len(kept) == self.ways:
            del kept[next(iter(kept))]
        kept[line] = None  # now the most recently used
        return hit


def ring(count: int, seed: int = 0) -> list[int]:
    """Places in a random order that meets each once and starts at 0.

    Args:
        count: Places.
        seed: Of the order. In order, hardware could guess what comes next.

    Examples:
        >>> sorted(ring(4)), ring(4)[0]
        ([0, 1, 2, 3], 0)
    """
    others = list(range(1, count))
    random.Random(seed).shuffle(others)
    return [0, *others]


def chase(
    caches: Sequence[Cache],
    addresses: Sequence[int],
    rounds: int = 2,
    visit: Callable[[int, int], object] | None = None,
) -> list[int]:
    """Walk a ring of addresses, and count who answers in the last round.

    Args:
        caches: From the nearest on; one that misses asks the next.
        addresses: One round.
        rounds: Rounds; in the first the caches are filled.
        visit: Called with each address and the place of who answers.

    Returns:
        Answers of each cache, then those of memory.

    Examples:
        >>> lines = [128 * i for i in range(5)]
        >>> chase([Cache(512, ways=4), Cache(1024, ways=8)], lines)
        [0, 5, 0]
    """
    answers = [0] * (len(caches) + 1)
    for round_number in range(rounds):
        for address in addresses:
            hits = (n for n, c in enumerate(caches) if c.access(address))
            level = next(hits, len(caches))
            answers[level] += round_number == rounds - 1
            if visit:
                visit(address, level)
    return answers


def hit_share(lines: int, stride_lines: int, sets: int, ways: int) -> float:
    """Share of a chase's loads that a cache answers, without running it.

    Over and over in the same order, a set that has room for its lines always
    hits. One line more, and each is dropped shortly before its turn.

    Args:
        lines: Lines of the ring.
        stride_lines: Distance of neighbouring ones, in lines.
        sets: Sets of the cache.
        ways: Lines of a set.

    Examples:
        >>> [hit_share(lines, 1, sets=2, ways=4) for lines in (8, 9, 10)]
        [1.0, 0.4444444444444444, 0.0]
    """
    reached = sets // math.gcd(sets, stride_lines)
    each, fuller = divmod(lines, reached)
    fit = (reached - fuller) * each if each <= ways else 0
    fit += fuller * (each + 1) if each + 1 <= ways else 0
    return fit / lines


@dataclass(frozen=True)
class Latency:
    """What a load of a chase costs, once the caches are filled.

    Attributes:
        l1_percent: Loads that L1 answers, in percent.
        l2_percent: Loads that L2 answers, in percent.
        memory_percent: Loads that memory answers, in percent.
        cycles: Mean latency, in cycles.
        ns: Mean latency, in ns.
        thread_gb_s: What one thread gets that chases pointers of 8 bytes, in
            GB/s (10^9 byte/s).
        loads_for_bandwidth: Lines of 128 bytes that must be under way to
            fill the memory's bandwidth at this latency.
    """

    l1_percent: float
    l2_percent: float
    memory_percent: float
    cycles: float
    ns: float
    thread_gb_s: float
    loads_for_bandwidth: float


def chase_latency(
    working_set_kib: int = 1024,
    stride_bytes: int = 128,
    l1_kib: int = 256,
    l2_mib: int = 50,
    l1_cycles: float = 40.0,
    l2_cycles: float = 260.0,
    memory_cycles: float = 480.0,
    clock_mhz: float = 1980.0,
    bandwidth_gb_s: float = 4800.0,
) -> Latency:
    """Mean latency of a pointer chase over a working set.

    Args:
        working_set_kib: Bytes from the ring's first line to its end, in KiB.
        stride_bytes: Distance of neighbouring lines, in bytes; a multiple of
            128.
        l1_kib: L1 cache of an SM, in KiB.
        l2_mib: L2 cache, in MiB.
        l1_cycles: Latency of L1, in cycles.
        l2_cycles: Latency of L2, in cycles.
        memory_cycles: Latency of memory, in cycles.
        clock_mhz: Clock of the SMs, in MHz.
        bandwidth_gb_s: Bandwidth of memory, in GB/s (10^9 byte/s).

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> [chase_latency(kib).cycles for kib in (128, 1024, 262144)]
        [40.0, 260.0, 480.0]
    """
    for name, value in {
        "working_set_kib": working_set_kib,
        "l1_kib": l1_kib,
        "l2_mib": l2_mib,
    }.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, number in {
        "l1_cycles": l1_cycles,
        "l2_cycles": l2_cycles,
        "memory_cycles": memory_cycles,
        "clock_mhz": clock_mhz,
        "bandwidth_gb_s": bandwidth_gb_s,
    }.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{name} must be more than 0, got {number}")
    if stride_bytes < LINE_BYTES or stride_bytes % LINE_BYTES:
        raise ValueError(
            f"stride_bytes must be a multiple of {LINE_BYTES}, "
            f"got {stride_bytes}"
        )
    stride_lines = stride_bytes // LINE_BYTES
    lines = max(1, working_set_kib * KIB // stride_bytes)
    l1_sets = l1_kib * KIB // (LINE_BYTES * L1_WAYS)
    l2_sets = l2_mib * MIB // (LINE_BYTES * L2_WAYS)
    l1 = hit_share(lines, stride_lines, l1_sets, L1_WAYS)
    # L2 has room for all long after L1 has stopped to answer
    both = max(l1, hit_share(lines, stride_lines, l2_sets, L2_WAYS))
    cycles = (
        l1 * l1_cycles + (both - l1) * l2_cycles + (1 - both) * memory_cycles
    )
    ns = 1e3 * cycles / clock_mhz
    return Latency(
        l1_percent=100 * l1,
        l2_percent=100 * (both - l1),
        memory_percent=100 * (1 - both),
        cycles=cycles,
        ns=ns,
        thread_gb_s=8 / ns,
        loads_for_bandwidth=bandwidth_gb_s * ns / LINE_BYTES,
    )


def latency_chart(
    working_set_kib: int = 1024,
    stride_bytes: int = 128,
    l1_kib: int = 256,
    l2_mib: int = 50,
    l1_cycles: float = 40.0,
    l2_cycles: float = 260.0,
    memory_cycles: float = 480.0,
    clock_mhz: float = 1980.0,
    bandwidth_gb_s: float = 4800.0,
) -> LineChart:
    """Latency against the working set; see ``chase_latency``.

    Args:
        working_set_kib: Bytes from the ring's first line to its end, in KiB.
        stride_bytes: Distance of neighbouring lines, in bytes.
        l1_kib: L1 cache of an SM, in KiB.
        l2_mib: L2 cache, in MiB.
        l1_cycles: Latency of L1, in cycles.
        l2_cycles: Latency of L2, in cycles.
        memory_cycles: Latency of memory, in cycles.
        clock_mhz: Clock of the SMs, in MHz.
        bandwidth_gb_s: Bandwidth of memory, in GB/s; it changes no latency.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> latency_chart(working_set_kib=64).points[0].y
        40.0
    """

    def cycles(kib: int) -> float:
        return chase_latency(
            kib,
            stride_bytes,
            l1_kib,
            l2_mib,
            l1_cycles,
            l2_cycles,
            memory_cycles,
            clock_mhz,
            bandwidth_gb_s,
        ).cycles

    yours = cycles(working_set_kib)
    # sixteen sizes an octave, from 16 KiB to 1 GiB
    sizes = [round(2 ** (4 + n / 16)) for n in range(16 * 16 + 1)]
    return LineChart(
        "Latency of a pointer chase",
        Axis("working set, KiB", log=True),
        Axis("cycles", log=True),
        [Line("LRU caches", [(kib, cycles(kib)) for kib in sizes])],
        [Point("this chase", working_set_kib, yours)],
    )


def chase_trace(
    lines: int = 5, sets: int = 2, ways: int = 2, rounds: int = 3
) -> Trace:
    """A chase over neighbouring lines through one small cache.

    Args:
        lines: Lines of the ring, 1 to 20, met in order.
        sets: Sets of the cache, 1 to 8.
        ways: Lines of a set, 1 to 8.
        rounds: Rounds, 2 to 8.

    Returns:
        Each row is a set, the least recently used line first; one frame a
        load, and one for the count.

    Raises:
        ValueError: If a number is out of range, or there are more than 40
            loads.

    Examples:
        >>> chase_trace(lines=4)[-1].caption
        'The last round: 4 of 4 loads hit.'
        >>> chase_trace(lines=6)[-1].caption
        'The last round: 0 of 6 loads hit.'
    """
    for name, value, least, most in (
        ("lines", lines, 1, 20),
        ("sets", sets, 1, 8),
        ("ways", ways, 1, 8),
        ("rounds", rounds, 2, 8),
    ):
        if not least <= value <= most:
            raise ValueError(f"{name} must be {least} to {most}, got {value}")
    if lines * rounds > 40:
        raise ValueError(f"rounds must be fewer, got {rounds}: over 40 loads")

    cache = Cache(sets * ways * LINE_BYTES, ways)
    before: set[int] = set()
    frames: Trace = []

    def show(caption: str, line: int, hit: bool) -> None:
        def cell(kept: int) -> Cell:
            used: Mark = "on" if hit else "new"
            mark: Mark = used if kept == line else ""
            return Cell(str(kept), mark, key=str(kept))

        rows = []
        for number, kept in enumerate(cache.sets):
            empty = [Cell()] * (ways - len(kept))
            rows.append((f"set {number}", [*map(cell, kept), *empty]))
        frames.append(Frame(caption, Grid(rows)))

    def visit(address: int, level: int) -> None:
        line = address // LINE_BYTES
        now = {kept for row in cache.sets for kept in row}
        gone = before - now
        what = "hits" if level == 0 else "misses"
        if gone:
            what += f"; line {gone.pop()}, unused for longest, leaves"
        lap = len(frames) // lines + 1
        show(f"Round {lap}: line {line} {what}.", line, level == 0)
        before.clear()
        before.update(now)

    hits, _ = chase(
        [cache], [LINE_BYTES * n for n in range(lines)], rounds, visit
    )
    show(f"The last round: {hits} of {lines} loads hit.", -1, False)
    return frames
