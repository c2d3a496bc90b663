"""Counts are checked on a map of memory, byte by byte."""

import random

import pytest

from warpmap.chart import LineChart
from warpmap.hardware.gpu.memory_coalescing import (
    ACCESSES,
    LINE_BYTES,
    SECTOR_BYTES,
    THREADS,
    WIDTHS,
    addresses,
    array_share,
    coalesce,
    efficiency_chart,
    request_trace,
    warp_request,
)


def byte_map(first_bytes, width):
    """Every byte of memory that is wanted, marked in one long map."""
    memory = bytearray(max(first_bytes) // LINE_BYTES * LINE_BYTES + LINE_BYTES)
    for address in first_bytes:
        for byte in range(address, address + width):
            memory[byte] = 1
    return memory


def marked(memory, granule):
    """Granules of the map that hold a mark, found by looking at all."""
    starts = range(0, len(memory), granule)
    return [s // granule for s in starts if any(memory[s : s + granule])]


STRIDES = [*range(20), 31, 32, 33, 64, 100]
OFFSETS = [*range(9), 15, 16, 17, 31, 33, 64]


def counts_agree(count, granule=SECTOR_BYTES):
    """Whether a counter agrees with the map on every pattern."""
    for width in WIDTHS:
        for stride in STRIDES:
            for offset in OFFSETS:
                for shuffled in (False, True):
                    wanted = addresses(width, stride, offset, shuffled)
                    expected = marked(byte_map(wanted, width), granule)
                    if list(count(wanted, width)) != expected:
                        return False
    return True


def test_sectors_agree_with_a_map_of_bytes():
    assert counts_agree(coalesce)


def test_lines_agree_with_a_map_of_bytes():
    assert counts_agree(
        lambda wanted, width: coalesce(wanted, width, LINE_BYTES), LINE_BYTES
    )


def wrong_one_sector_a_thread(wanted, width):
    return [address // SECTOR_BYTES for address in wanted]


def wrong_whole_lines(wanted, width):
    return coalesce(wanted, width, LINE_BYTES)


def wrong_from_first_byte_on(wanted, width):
    """Takes alignment for granted: sectors counted from the first address."""
    first = min(wanted)
    return coalesce([address - first for address in wanted], width)


def wrong_only_runs_of_threads(wanted, width):
    """Joins only threads that follow each other, as GPUs did before 2008."""
    found = []
    for address in wanted:
        if not found or found[-1] != address // SECTOR_BYTES:
            found.append(address // SECTOR_BYTES)
    return found


def wrong_span(wanted, width):
    """Moves all that lies between the first and the last byte."""
    last = max(wanted) // SECTOR_BYTES
    return range(min(wanted) // SECTOR_BYTES, last + 1)


@pytest.mark.parametrize(
    "wrong",
    [
        wrong_one_sector_a_thread,
        wrong_whole_lines,
        wrong_from_first_byte_on,
        wrong_only_runs_of_threads,
        wrong_span,
    ],
)
def test_the_map_catches_a_wrong_count(wrong):
    assert not counts_agree(wrong)


def test_any_permutation_of_the_threads_costs_the_same():
    rng = random.Random(1)
    for _ in range(200):
        width = rng.choice(WIDTHS)
        wanted = addresses(width, rng.randrange(40), rng.randrange(40))
        shuffled = rng.sample(wanted, len(wanted))
        assert coalesce(shuffled, width) == coalesce(wanted, width)


# width, stride, offset; sectors, lines, useful and useful of a sweep in %
WORKED_BY_HAND = [
    ((4, 1, 0), (4, 1, 100, 100)),
    ((2, 1, 0), (2, 1, 100, 100)),
    ((16, 1, 0), (16, 4, 100, 100)),
    ((4, 1, 1), (5, 2, 80, 100)),
    ((2, 1, 1), (3, 1, 66.7, 100)),
    ((4, 2, 0), (8, 2, 50, 50)),
    ((4, 4, 0), (16, 4, 25, 25)),
    ((4, 8, 0), (32, 8, 12.5, 12.5)),
    ((2, 4096, 0), (32, 32, 6.25, 6.25)),
]


@pytest.mark.parametrize(("pattern", "row"), WORKED_BY_HAND, ids=str)
def test_table_of_the_page(pattern, row):
    got = warp_request(*pattern)
    shares = got.efficiency_percent, got.array_efficiency_percent
    assert (got.sectors, got.lines) == row[:2]
    assert shares == pytest.approx(row[2:], abs=0.05)


def test_scattered_threads_cost_a_sector_each_where_none_is_shared():
    rng = random.Random(2)
    sectors = rng.sample(range(10_000), THREADS)
    wanted = [SECTOR_BYTES * s + 4 * rng.randrange(8) for s in sectors]
    assert coalesce(wanted, 4) == sorted(sectors)


@pytest.mark.parametrize("width", WIDTHS)
def test_aligned_request_has_the_closed_form(width):
    # 32 threads, stride s: s * width bytes apart, so 32 s width / 32 sectors,
    # until every thread has a sector of its own
    for stride in range(1, 80):
        sectors = warp_request(width, stride).sectors
        if SECTOR_BYTES % (stride * width) == 0:
            assert sectors == max(1, stride * width)
        elif stride * width > SECTOR_BYTES:
            assert sectors == THREADS


@pytest.mark.parametrize("width", WIDTHS)
def test_a_shift_costs_a_sector_at_most(width):
    for stride in range(1, 40):
        aligned = warp_request(width, stride).sectors
        for offset in range(70):
            shifted = warp_request(width, stride, offset).sectors
            assert aligned - 1 <= shifted <= aligned + 1


@pytest.mark.parametrize("granule", [SECTOR_BYTES, 64, LINE_BYTES])
@pytest.mark.parametrize("width", WIDTHS)
def test_share_of_a_sweep_is_the_limit_of_many_warps(width, granule):
    elements = 2048
    for stride in [1, 2, 3, 5, 7, 8, 9, 16, 31, 32, 33, 64]:
        wanted = [width * stride * i for i in range(elements)]
        moved = granule * len(marked(byte_map(wanted, width), granule))
        share = width * elements / moved
        assert array_share(width, stride, granule) == pytest.approx(share, 0.02)


def test_calculator_agrees_with_the_map():
    for pattern in ACCESSES.values():
        request = warp_request(**pattern, bandwidth_gb_s=1000)
        wanted = addresses(**pattern)
        memory = byte_map(wanted, pattern["element_bytes"])
        assert request.sectors == len(marked(memory, SECTOR_BYTES))
        assert request.lines == len(marked(memory, LINE_BYTES))
        assert request.useful_bytes == sum(memory)
        assert request.moved_bytes == SECTOR_BYTES * request.sectors
        assert request.efficiency_percent == pytest.approx(
            100 * sum(memory) / (SECTOR_BYTES * request.sectors)
        )
        assert request.useful_gb_s == 10 * request.array_efficiency_percent


def test_chart_holds_the_request_and_falls_with_the_stride():
    chart = efficiency_chart(element_bytes=8, stride=3, offset=1)
    assert isinstance(chart, LineChart)
    assert [line.name for line in chart.lines] == [
        f"{width} bytes" for width in (2, 4, 8, 16)
    ]
    for line in chart.lines:
        assert [x for x, _ in line.points] == list(range(1, 33))
        assert line.points[0][1] > line.points[-1][1]
    (yours,) = chart.points
    eight = next(line for line in chart.lines if line.name == "8 bytes")
    assert (yours.x, yours.y) in eight.points


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(
    "pattern", [(4, 1, 0), (4, 3, 0), (2, 5, 3), (16, 0, 1)]
)
def test_trace_ends_with_the_result(pattern, shuffled):
    wanted = addresses(*pattern, shuffled)
    seen = []
    visited = coalesce(
        wanted, pattern[0], visit=lambda *step: seen.append(step)
    )
    assert visited == coalesce(wanted, pattern[0])
    assert [thread for thread, _, _ in seen] == list(range(THREADS))
    assert sum(first for _, _, first in seen) == len(visited)

    frames = request_trace(*pattern, shuffled)
    assert len(frames) == 10
    last = frames[-1].picture
    assert [name for name, _ in last.rows] == [
        f"byte {SECTOR_BYTES * number}" for number in visited
    ]
    memory = byte_map(wanted, pattern[0])
    for number, (_, cells) in zip(visited, last.rows, strict=True):
        for i, cell in enumerate(cells):
            used = memory[SECTOR_BYTES * number + i * pattern[0]]
            assert (cell.mark, bool(cell.text)) == (
                ("on", True) if used else ("gone", False)
            )
    request = warp_request(*pattern, shuffled)
    assert f"{request.useful_bytes} of {request.moved_bytes}" in (
        frames[-1].caption
    )


def test_trace_never_takes_a_sector_back():
    counts = [len(frame.picture.rows) for frame in request_trace(4, 5, 2, True)]
    assert counts == sorted(counts)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: warp_request(element_bytes=3), "element_bytes .* got 3"),
        (lambda: warp_request(stride=-1), "stride must be at least 0, got -1"),
        (lambda: addresses(offset=-2), "offset must be at least 0, got -2"),
        (lambda: warp_request(bandwidth_gb_s=0), "bandwidth_gb_s .* got 0"),
        (lambda: efficiency_chart(element_bytes=0), "element_bytes"),
        (lambda: request_trace(stride=-3), "stride"),
        (lambda: array_share(4, -1), "stride"),
        (lambda: coalesce([2], 4), "holds 2, expected multiples of 4"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
