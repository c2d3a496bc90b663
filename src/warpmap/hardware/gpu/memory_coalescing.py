"""Sectors of memory that one request of a warp touches.

The 32 threads of a warp run a load together, and memory answers in aligned
sectors of 32 bytes. Each sector that holds a wanted byte is moved, once and
whole, whichever threads want it:

    sectors     distinct values of address // 32
    efficiency  wanted bytes / (32 sectors)

Four sectors make a cache line of 128 bytes. A line is what the caches keep
track of; a sector is what they fetch.

Reference: Harris, 2013,
https://developer.nvidia.com/blog/how-access-global-memory-efficiently-cuda-c-kernels/
"""

import random
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from warpmap.chart import Axis, Line, LineChart, Point
from warpmap.trace import Cell, Frame, Grid, Mark, Trace

THREADS = 32
SECTOR_BYTES = 32
LINE_BYTES = 128
WIDTHS = (1, 2, 4, 8, 16)
"""Bytes that one load can bring to a thread."""

ACCESSES: dict[str, dict[str, int | bool]] = {
    "Neighbours, float": {"element_bytes": 4, "stride": 1, "offset": 0},
    "Neighbours, bf16": {"element_bytes": 2, "stride": 1, "offset": 0},
    "Neighbours, float4": {"element_bytes": 16, "stride": 1, "offset": 0},
    "Shifted by one float": {"element_bytes": 4, "stride": 1, "offset": 1},
    "One field of four floats": {"element_bytes": 4, "stride": 4, "offset": 0},
    "Column of a bf16 matrix, 4096 wide": {
        "element_bytes": 2,
        "stride": 4096,
        "offset": 0,
    },
    "All threads the same float": {
        "element_bytes": 4,
        "stride": 0,
        "offset": 0,
    },
}
"""Patterns that kernels have, as arguments of ``warp_request``."""


def _check(element_bytes: int, stride: int, offset: int) -> None:
    if element_bytes not in WIDTHS:
        raise ValueError(
            f"element_bytes must be one of {WIDTHS}, got {element_bytes}"
        )
    for name, value in {"stride": stride, "offset": offset}.items():
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")


def addresses(
    element_bytes: int = 4,
    stride: int = 1,
    offset: int = 0,
    shuffled: bool = False,
) -> list[int]:
    """First byte that each thread of a warp wants of ``x[offset + stride t]``.

    Args:
        element_bytes: Bytes of an element: 1, 2, 4, 8 or 16.
        stride: Elements from one thread's to the next thread's.
        offset: Elements from the array's start, which a line begins with.
        shuffled: Whether the threads take the elements in a random order.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> addresses(stride=2, offset=1)[:4]
        [4, 12, 20, 28]
    """
    _check(element_bytes, stride, offset)
    wanted = [element_bytes * (offset + stride * t) for t in range(THREADS)]
    if shuffled:
        random.Random(0).shuffle(wanted)
    return wanted


def coalesce(
    wanted: Iterable[int],
    element_bytes: int,
    granule: int = SECTOR_BYTES,
    visit: Callable[[int, int, bool], object] | None = None,
) -> list[int]:
    """Granules that a request moves, in the order of their addresses.

    Args:
        wanted: First byte of each thread's element, a multiple of its size:
            CUDA allows no other, so no element lies on two sectors.
        element_bytes: Bytes of an element.
        granule: Bytes moved together: a sector, or a line.
        visit: Called with each thread, its granule, and whether no thread
            before had asked for it.

    Returns:
        Numbers of the granules, each once.

    Raises:
        ValueError: If an address is not a multiple of the element's size.

    Examples:
        >>> coalesce([4, 0, 36, 32], element_bytes=4)
        [0, 1]
    """
    touched: set[int] = set()
    for thread, address in enumerate(wanted):
        if address % element_bytes:
            raise ValueError(
                f"wanted holds {address}, expected multiples of {element_bytes}"
            )
        number = address // granule
        if visit:
            visit(thread, number, number not in touched)
        touched.add(number)
    return sorted(touched)


@dataclass(frozen=True)
class Request:
    """What one request of a warp costs.

    Attributes:
        sectors: Sectors of 32 bytes that are moved.
        lines: Cache lines of 128 bytes that these lie in.
        moved_bytes: Bytes moved.
        useful_bytes: Bytes among them that a thread wanted.
        efficiency_percent: Useful bytes over bytes moved, in percent.
        array_efficiency_percent: The same for many warps side by side, which
            share the sectors at their borders, in percent.
        useful_gb_s: Upper bound of the useful bandwidth over a large array,
            in GB/s.
    """

    sectors: int
    lines: int
    moved_bytes: int
    useful_bytes: int
    efficiency_percent: float
    array_efficiency_percent: float
    useful_gb_s: float


def warp_request(
    element_bytes: int = 4,
    stride: int = 1,
    offset: int = 0,
    shuffled: bool = False,
    bandwidth_gb_s: float = 4800.0,
) -> Request:
    """Cost of one load or store of a warp.

    Args:
        element_bytes: Bytes of an element: 1, 2, 4, 8 or 16.
        stride: Elements from one thread's to the next thread's.
        offset: Elements before the first thread's; 0 is the start of a line.
        shuffled: Whether the threads take the elements in a random order.
        bandwidth_gb_s: Bandwidth of the memory, in GB/s (10^9 byte/s).

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> warp_request(stride=1).sectors, warp_request(stride=8).sectors
        (4, 32)
        >>> warp_request(stride=1, offset=1).efficiency_percent
        80.0
    """
    if not 0 < bandwidth_gb_s < float("inf"):
        raise ValueError(f"bandwidth_gb_s must be > 0, got {bandwidth_gb_s}")
    wanted = addresses(element_bytes, stride, offset, shuffled)
    sectors = len(coalesce(wanted, element_bytes))
    useful = element_bytes * len(set(wanted))
    share = array_share(element_bytes, stride)
    return Request(
        sectors=sectors,
        lines=len(coalesce(wanted, element_bytes, LINE_BYTES)),
        moved_bytes=SECTOR_BYTES * sectors,
        useful_bytes=useful,
        efficiency_percent=100 * useful / (SECTOR_BYTES * sectors),
        array_efficiency_percent=100 * share,
        useful_gb_s=bandwidth_gb_s * share,
    )


def array_share(
    element_bytes: int, stride: int, granule: int = SECTOR_BYTES
) -> float:
    """Useful share of the bytes moved when warps sweep a whole array.

    Below a stride of one sector every sector is moved, and one element in
    ``stride`` is used. From there on each element has a sector of its own.

    Args:
        element_bytes: Bytes of an element: 1, 2, 4, 8 or 16.
        stride: Elements from one used element to the next; 0 means that all
            want one element.
        granule: Bytes moved together.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> [array_share(4, stride) for stride in (1, 2, 8, 32)]
        [1.0, 0.5, 0.125, 0.125]
    """
    _check(element_bytes, stride, 0)
    step = element_bytes * stride
    return element_bytes / min(step or granule, granule)


def efficiency_chart(
    element_bytes: int = 4,
    stride: int = 1,
    offset: int = 0,
    shuffled: bool = False,
    bandwidth_gb_s: float = 4800.0,
) -> LineChart:
    """Efficiency of a request against its stride; see ``warp_request``.

    Args:
        element_bytes: Bytes of an element: 1, 2, 4, 8 or 16.
        stride: Elements from one thread's to the next thread's.
        offset: Elements before the first thread's; 0 is the start of a line.
        shuffled: Whether the threads take the elements in a random order.
        bandwidth_gb_s: Bandwidth of the memory, in GB/s; it changes no share.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> efficiency_chart().points[0].y
        100.0
    """
    yours = warp_request(
        element_bytes, stride, offset, shuffled, bandwidth_gb_s
    )
    strides = range(1, max(32, min(stride, 256)) + 1)

    def line(width: int) -> Line:
        shares = [
            warp_request(width, s, offset).efficiency_percent for s in strides
        ]
        return Line(f"{width} bytes", list(zip(strides, shares, strict=True)))

    return LineChart(
        "Useful share of the bytes moved",
        Axis("stride, in elements"),
        Axis("useful, %"),
        [line(width) for width in sorted({2, 4, 16, element_bytes})],
        [Point("this request", min(stride, 256), yours.efficiency_percent)],
    )


def request_trace(
    element_bytes: int = 4,
    stride: int = 3,
    offset: int = 0,
    shuffled: bool = False,
) -> Trace:
    """The sectors of one request, four threads at a time.

    Args:
        element_bytes: Bytes of an element: 1, 2, 4, 8 or 16.
        stride: Elements from one thread's to the next thread's.
        offset: Elements before the first thread's; 0 is the start of a line.
        shuffled: Whether the threads take the elements in a random order.

    Returns:
        Each row is a sector, each cell an element, with the thread that wants
        it.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> request_trace(stride=1)[-1].caption
        '128 of 128 bytes moved are useful: 100%.'
    """
    wanted = addresses(element_bytes, stride, offset, shuffled)
    users: dict[int, int] = {}  # by address: the last thread that wants it
    rows: set[int] = set()
    fresh: list[int] = []
    frames: Trace = []

    def show(caption: str, now: Collection[int], unused: Mark = "") -> None:
        def cell(address: int) -> Cell:
            if address not in users:
                return Cell("", unused)
            return Cell(str(users[address]), "new" if address in now else "on")

        starts = [SECTOR_BYTES * number for number in sorted(rows)]
        columns = range(0, SECTOR_BYTES, element_bytes)
        grid = Grid(
            [
                (f"byte {start}", [cell(start + at) for at in columns])
                for start in starts
            ]
        )
        frames.append(Frame(caption, grid))

    def visit(thread: int, number: int, first: bool) -> None:
        users[wanted[thread]] = thread
        rows.add(number)
        if first:
            fresh.append(number)
        if thread % 4 == 3:
            many = "sector" if len(fresh) == 1 else "sectors"
            show(
                f"Threads {thread - 3} to {thread} touch {len(fresh) or 'no'} "
                f"new {many}: {len(rows)} so far.",
                now=wanted[thread - 3 : thread + 1],
            )
            fresh.clear()

    moved = SECTOR_BYTES * len(coalesce(wanted, element_bytes, visit=visit))
    useful = element_bytes * len(users)
    show(
        f"Memory moves {len(rows)} whole sectors: {moved} bytes.",
        now=(),
        unused="wait",
    )
    show(
        f"{useful} of {moved} bytes moved are useful: {useful / moved:.0%}.",
        now=(),
        unused="gone",
    )
    return frames
