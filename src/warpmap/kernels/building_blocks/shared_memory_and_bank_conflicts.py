"""Bank conflicts of shared memory: counted, and ended by padding or a swizzle.

Shared memory is 32 banks side by side. Words of 4 bytes go round them in turn,
and each bank hands out one word a cycle. A request of a warp is served in
phases of 128 bytes, and a phase lasts as long as its busiest bank needs:

    bank        address // 4 % 32
    phase       32 threads of up to 4 bytes, or 16 of 8, or 8 of 16
    wavefronts  over the phases, the sum of most words wanted from one bank

Threads that want the same word share it. Beside this module stands a kernel in
CUDA C++ that times a request with any addresses.

Reference: Ruetsch and Micikevicius, 2009, Optimizing Matrix Transpose in CUDA
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from warpmap.chart import Axis, Line, LineChart, Point
from warpmap.trace import Cell, Frame, Grid, Mark, Trace

THREADS = 32
BANKS = 32
WORD_BYTES = 4
WIDTHS = (1, 2, 4, 8, 16)
"""Bytes that one instruction can bring to a thread."""

MEMORY_BYTES = 32768
"""Shared memory of the kernel that measures."""


def _layout(
    access_bytes: int, columns: int, across: int, **more: int
) -> dict[str, int]:
    plain = {"padding": 0, "bits": 0, "base": 4, "shift": 3}
    where = {"columns": columns, "across": across}
    return {"access_bytes": access_bytes, **where, **plain, **more}


LAYOUTS: dict[str, dict[str, int]] = {
    "Row of floats": _layout(4, 32, 32),
    "Column of floats": _layout(4, 32, 1),
    "Column, rows padded by one": _layout(4, 32, 1, padding=1),
    "Column, Swizzle<5,2,5>": _layout(4, 32, 1, bits=5, base=2, shift=5),
    "Column of bf16, 32 wide": _layout(2, 32, 1),
    "16 bytes of each row of 128": _layout(16, 8, 1),
    "The same, padded by 16 bytes": _layout(16, 8, 1, padding=1),
    "The same, Swizzle<3,4,3>": _layout(16, 8, 1, bits=3),
}
"""Ways to read a tile, as arguments of ``shared_request``."""


def swizzle(address: int, bits: int, base: int, shift: int) -> int:
    """CuTe's ``Swizzle<bits, base, shift>``: the byte's new address.

    The ``bits`` bits from ``base`` on are combined by exclusive or with those
    ``shift`` places higher; if it is negative, the higher with the lower.

    Args:
        address: In bytes, at least 0.
        bits: How many bits change; 0 leaves all in place.
        base: How many low bits stay: 2^base bytes keep together.
        shift: Distance of the two groups of bits, at least ``bits``.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> [swizzle(128 * row, bits=5, base=2, shift=5) for row in range(4)]
        [0, 132, 264, 396]
    """
    for name, value in {"address": address, "bits": bits, "base": base}.items():
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    if abs(shift) < bits:
        raise ValueError(f"shift must be at least bits, {bits}, got {shift}")
    source, target = base + max(shift, 0), base + max(-shift, 0)
    chosen = address >> source & (1 << bits) - 1
    return address ^ chosen << target


def wavefronts(
    wanted: Sequence[int],
    access_bytes: int,
    visit: Callable[[int, list[list[int]]], object] | None = None,
) -> int:
    """Cycles for which the banks are busy with one request of a warp.

    Args:
        wanted: First byte of what each thread wants, a multiple of its size.
        access_bytes: Bytes a thread: 1, 2, 4, 8 or 16.
        visit: Called for each phase, with the number of its first thread and
            the words that each bank has to hand out.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> wavefronts([4 * t for t in range(32)], access_bytes=4)
        1
        >>> wavefronts([128 * t for t in range(32)], access_bytes=4)
        32
    """
    if access_bytes not in WIDTHS:
        raise ValueError(
            f"access_bytes must be one of {WIDTHS}, got {access_bytes}"
        )
    for address in wanted:
        if address < 0 or address % access_bytes:
            raise ValueError(
                f"wanted holds {address}, expected multiples of {access_bytes}"
            )
    threads = min(THREADS, BANKS * WORD_BYTES // access_bytes)
    cycles = 0
    for first in range(0, len(wanted), threads):
        queues: list[list[int]] = [[] for _ in range(BANKS)]
        for address in wanted[first : first + threads]:
            last = address + access_bytes - 1
            for word in range(address // WORD_BYTES, last // WORD_BYTES + 1):
                queue = queues[word % BANKS]
                if word not in queue:  # who wants the same word shares it
                    queue.append(word)
        if visit:
            visit(first, queues)
        cycles += max(map(len, queues))
    return cycles


def tile_addresses(
    access_bytes: int = 4,
    columns: int = 32,
    across: int = 1,
    padding: int = 0,
    bits: int = 0,
    base: int = 4,
    shift: int = 3,
) -> list[int]:
    """First byte that each thread of a warp wants of a tile, row by row.

    Thread t takes column ``t % across`` of row ``t // across``.

    Args:
        access_bytes: Bytes a thread takes at once: 1, 2, 4, 8 or 16.
        columns: Length of a row, in such pieces.
        across: Threads side by side; 1 reads a column, 32 a row.
        padding: Pieces left free after each row.
        bits: Bits of the address that a swizzle changes; 0 for none.
        base: Low bits of the address that it leaves alone.
        shift: How much higher the bits lie that it combines them with.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> tile_addresses(columns=32, padding=1)[:4]
        [0, 132, 264, 396]
    """
    if access_bytes not in WIDTHS:
        raise ValueError(
            f"access_bytes must be one of {WIDTHS}, got {access_bytes}"
        )
    for name, value, least in (
        ("columns", columns, 1),
        ("across", across, 1),
        ("padding", padding, 0),
    ):
        if not least <= value <= 1024:
            raise ValueError(f"{name} must be {least} to 1024, got {value}")
    if across > columns:
        raise ValueError(f"across must be at most columns, got {across}")
    if bits and 1 << base < access_bytes:
        raise ValueError(
            f"base must keep {access_bytes} bytes together, got {base}"
        )
    places = [divmod(thread, across) for thread in range(THREADS)]
    pitch = columns + padding
    return [
        swizzle(access_bytes * (row * pitch + column), bits, base, shift)
        for row, column in places
    ]


@dataclass(frozen=True)
class SharedRequest:
    """What one request of a warp costs in shared memory.

    Attributes:
        wavefronts: Cycles for which the banks are busy.
        phases: Cycles that would do without conflicts.
        ways: Most words that one bank hands out in one phase.
        bytes_per_cycle: Bytes that the threads get in a cycle; the banks
            have 128.
        tile_bytes: Shared memory of 32 rows with their padding, in bytes.
    """

    wavefronts: int
    phases: int
    ways: int
    bytes_per_cycle: float
    tile_bytes: int


def shared_request(
    access_bytes: int = 4,
    columns: int = 32,
    across: int = 1,
    padding: int = 0,
    bits: int = 0,
    base: int = 4,
    shift: int = 3,
) -> SharedRequest:
    """Cost of one load or store of a warp in a tile of shared memory.

    Args:
        access_bytes: Bytes a thread takes at once: 1, 2, 4, 8 or 16.
        columns: Length of a row, in such pieces.
        across: Threads side by side; 1 reads a column, 32 a row.
        padding: Pieces left free after each row.
        bits: Bits of the address that a swizzle changes; 0 for none.
        base: Low bits of the address that it leaves alone.
        shift: How much higher the bits lie that it combines them with.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> shared_request().wavefronts, shared_request(padding=1).wavefronts
        (32, 1)
    """
    wanted = tile_addresses(
        access_bytes, columns, across, padding, bits, base, shift
    )
    ways: list[int] = []
    cycles = wavefronts(
        wanted,
        access_bytes,
        lambda _, queues: ways.append(max(map(len, queues))),
    )
    return SharedRequest(
        wavefronts=cycles,
        phases=len(ways),
        ways=max(ways),
        bytes_per_cycle=THREADS * access_bytes / cycles,
        tile_bytes=THREADS * (columns + padding) * access_bytes,
    )


def wavefront_chart(**tile: int) -> LineChart:
    """Wavefronts against the length of a row.

    Args:
        tile: As ``shared_request`` takes it.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> wavefront_chart(columns=32, across=1).points[0].y
        32
    """
    columns, across = tile.get("columns", 32), tile.get("across", 1)
    yours = shared_request(**tile)
    lengths = range(across, max(64, columns) + 1)

    def line(name: str, **changed: int) -> Line:
        cycles = [
            shared_request(**{**tile, **changed, "columns": n}).wavefronts
            for n in lengths
        ]
        return Line(name, list(zip(lengths, cycles, strict=True)))

    lines = [line("plain", padding=0, bits=0)]
    if padding := tile.get("padding", 0):
        lines.append(line(f"padded by {padding}", bits=0))
    if tile.get("bits", 0):
        lines.append(line("swizzled"))
    return LineChart(
        "Wavefronts of one request",
        Axis("length of a row"),
        Axis("wavefronts", log=True),
        lines,
        [Point("this tile", columns, yours.wavefronts)],
    )


def bank_trace(
    access_bytes: int = 4,
    columns: int = 8,
    across: int = 1,
    padding: int = 0,
    bits: int = 0,
    base: int = 4,
    shift: int = 3,
) -> Trace:
    """The banks at work on one request, wavefront by wavefront.

    Args:
        access_bytes: Bytes a thread takes at once: 1, 2, 4, 8 or 16.
        columns: Length of a row, in such pieces.
        across: Threads side by side; 1 reads a column, 32 a row.
        padding: Pieces left free after each row.
        bits: Bits of the address that a swizzle changes; 0 for none.
        base: Low bits of the address that it leaves alone.
        shift: How much higher the bits lie that it combines them with.

    Returns:
        Above the 32 banks, each with the words it still has to hand out;
        below the 32 threads, marked once they have all that they want.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> bank_trace(columns=32)[-1].caption
        'Done: 32 wavefronts, where 1 would do.'
    """
    wanted = tile_addresses(
        access_bytes, columns, across, padding, bits, base, shift
    )
    threads = min(THREADS, BANKS * WORD_BYTES // access_bytes)
    missing = [
        set(range(a // WORD_BYTES, (a + access_bytes - 1) // WORD_BYTES + 1))
        for a in wanted
    ]
    frames: Trace = []

    def rows(name: str, cells: list[Cell]) -> Grid:
        starts = range(0, len(cells), 8)
        return Grid([(f"{name} {s}", cells[s : s + 8]) for s in starts])

    def show(
        caption: str, left: list[int], busy: set[int], served: set[int]
    ) -> None:
        def bank(number: int) -> Cell:
            mark: Mark = "new" if number in busy else ""
            waits = left[number] and not mark
            return Cell(str(left[number] or ""), "wait" if waits else mark)

        def thread(number: int) -> Cell:
            done: Mark = "" if missing[number] else "on"
            return Cell(str(number), "new" if number in served else done)

        frames.append(
            Frame(
                caption,
                rows("bank", [bank(b) for b in range(BANKS)]),
                rows("thread", [thread(t) for t in range(THREADS)]),
            )
        )

    def visit(first: int, queues: list[list[int]]) -> None:
        now = range(first, first + threads)
        left = [len(queue) for queue in queues]
        show(
            f"Threads {first} to {now[-1]} ask: the busiest bank owes "
            f"{max(left)} word{'s' * (max(left) > 1)}.",
            left,
            set(),
            set(),
        )
        for cycle in range(max(left)):
            out = {queue[cycle] for queue in queues if cycle < len(queue)}
            served = {t for t in now if missing[t] & out}
            for t in served:
                missing[t] -= out
            busy = {word % BANKS for word in out}
            for b in busy:
                left[b] -= 1
            show(
                f"{len(out)} of 32 banks hand out a word, to {len(served)} "
                f"thread{'s' * (len(served) > 1)}.",
                left,
                busy,
                served,
            )

    cycles = wavefronts(wanted, access_bytes, visit)
    show(
        f"Done: {cycles} wavefront{'s' * (cycles > 1)}, where "
        f"{THREADS // threads} would do.",
        [0] * BANKS,
        set(),
        set(),
    )
    return frames


def cycles_per_request(
    wanted: Sequence[int], access_bytes: int, rounds: int = 500
) -> float:
    """What a request costs on the GPU, while all its SM's warps repeat it.

    Args:
        wanted: First byte of what each of 32 threads wants.
        access_bytes: Bytes a thread: 4, 8 or 16.
        rounds: How often every warp repeats its four requests.

    Returns:
        Cycles of the SM for each request.

    Raises:
        ValueError: If an argument is out of range.
        RuntimeError: If a thread read anything but what it wanted.

    Examples:
        >>> cycles_per_request([0] * 31, access_bytes=4)
        Traceback (most recent call last):
        ValueError: wanted must hold 32 addresses, got 31
    """
    if access_bytes not in (4, 8, 16):
        raise ValueError(f"access_bytes must be 4, 8 or 16, got {access_bytes}")
    if len(wanted) != THREADS:
        raise ValueError(f"wanted must hold 32 addresses, got {len(wanted)}")
    wavefronts(wanted, access_bytes)  # refuses what is not aligned
    if max(wanted) + access_bytes > MEMORY_BYTES:
        raise ValueError(f"wanted must lie below byte {MEMORY_BYTES}")

    import torch

    from warpmap.kernels.cuda import cuda_kernel

    kernel = cuda_kernel(__file__, f"repeat_{8 * access_bytes}")
    warps, chains = 32, 4
    start = torch.tensor([*wanted] * chains, dtype=torch.int32, device="cuda")
    end = torch.empty(warps, chains, THREADS, dtype=torch.int32, device="cuda")
    cycles = torch.empty(1, dtype=torch.int64, device="cuda")
    for _ in range(2):  # the first time warms up
        kernel(1, warps * THREADS, start, end, cycles, rounds)
    if not torch.equal(end, start.view(1, chains, THREADS).expand_as(end)):
        raise RuntimeError("a thread did not read what it wanted")
    return cycles.item() / (warps * chains * rounds)
