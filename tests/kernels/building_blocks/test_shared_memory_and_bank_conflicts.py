"""Counts are checked on a machine of 32 banks that serves word by word."""

import math
import random
from itertools import pairwise
from pathlib import Path

import pytest

from warpmap.chart import LineChart
from warpmap.kernels.building_blocks import (
    shared_memory_and_bank_conflicts as module,
)
from warpmap.kernels.building_blocks.shared_memory_and_bank_conflicts import (
    LAYOUTS,
    MEMORY_BYTES,
    THREADS,
    WIDTHS,
    bank_trace,
    cycles_per_request,
    shared_request,
    swizzle,
    tile_addresses,
    wavefront_chart,
    wavefronts,
)


def machine(wanted, width):
    """Cycles until every byte is served, one row of a bank at a time.

    Memory is drawn as a map: rows of 128 bytes, columns of 4, the banks.
    """
    cycles = 0
    threads = 32 if width <= 4 else 128 // width
    while wanted:
        now, wanted = wanted[:threads], wanted[threads:]
        rows = [[False] * 128 for _ in range(max(now) // 128 + 2)]
        for address in now:
            for byte in range(address, address + width):
                rows[byte // 128][byte % 128] = True
        while any(map(any, rows)):
            for bank in range(0, 128, 4):
                for row in rows:
                    if any(row[bank : bank + 4]):
                        row[bank : bank + 4] = [False] * 4
                        break  # this bank has given its word
            cycles += 1
    return cycles


def patterns():
    """Addresses and widths: strides, tiles, all the same, at random."""
    draw = random.Random(0)
    for width in WIDTHS:
        for stride in [*range(10), 15, 16, 31, 32, 33]:
            yield [width * stride * t for t in range(THREADS)], width
        for _ in range(20):
            most = draw.choice((4, 16, 64, 300))
            yield [width * draw.randrange(most) for _ in range(THREADS)], width


def counts_agree(count):
    return all(count(w, width) == machine(w, width) for w, width in patterns())


def test_wavefronts_agree_with_a_machine_of_banks():
    assert counts_agree(wavefronts)


def wrong_no_sharing(wanted, width):
    """Threads that want the same word wait for each other."""
    threads = min(32, 128 // width)
    total = 0
    for first in range(0, 32, threads):
        banks = [0] * 32
        for address in wanted[first : first + threads]:
            for word in range(address // 4, (address + width - 1) // 4 + 1):
                banks[word % 32] += 1
        total += max(banks)
    return total


def wrong_one_phase(wanted, width):
    """All threads at once, however wide: the fewest cycles in theory."""
    words = {b // 4 for a in wanted for b in range(a, a + width)}
    banks = [word % 32 for word in words]
    return max(map(banks.count, banks))


def wrong_first_word_only(wanted, width):
    return wavefronts([a // 4 * 4 for a in wanted], 4)


def wrong_16_banks(wanted, width):
    """As GPUs before 2010."""
    return sum(
        wrong_one_phase([a // 4 % 16 * 4 + a // 64 * 128 for a in part], 4)
        for part in (wanted[:16], wanted[16:])
    )


@pytest.mark.parametrize(
    "wrong",
    [wrong_no_sharing, wrong_one_phase, wrong_first_word_only, wrong_16_banks],
)
def test_the_machine_catches_a_wrong_count(wrong):
    assert not counts_agree(wrong)


@pytest.mark.parametrize("width", [4, 8, 16])
def test_a_stride_has_as_many_ways_as_it_shares_with_a_phase(width):
    threads = 128 // width
    for stride in range(1, 130):
        ways = math.gcd(stride, threads)
        wanted = [width * stride * t for t in range(THREADS)]
        assert wavefronts(wanted, width) == width // 4 * ways


@pytest.mark.parametrize("width", [4, 8, 16])
def test_a_piece_of_padding_frees_every_column_and_row(width):
    # rows of 128 bytes, and longer ones of any power of two
    for columns in (128 // width, 256 // width, 1024 // width):
        free = shared_request(width, columns, 1, padding=1)
        assert free.ways == 1
        assert free.wavefronts == free.phases == width // 4
        row = shared_request(width, columns, min(32, columns), padding=1)
        assert row.ways == 1


def test_a_swizzle_moves_every_byte_of_a_block_to_a_place_of_its_own():
    for bits in range(6):
        for base in range(5):
            for shift in [*range(bits, 7), *range(-6, -bits + 1)]:
                block = 1 << (base + bits + abs(shift))
                if block > 4096:
                    continue
                moved = [swizzle(a, bits, base, shift) for a in range(block)]
                assert sorted(moved) == list(range(block))
                # applied twice, it is undone; pieces of 2^base stay whole
                assert [swizzle(a, bits, base, shift) for a in moved] == list(
                    range(block)
                )
                piece = 1 << base
                assert all(
                    b - a == 1
                    for a, b in pairwise(moved)
                    if (a % piece) != piece - 1
                )


def cute(offset, bits, base, shift):
    """Swizzle as CuTe defines it: ZZZ ^= YYY, by masks."""
    yyy = ((1 << bits) - 1) << (base + max(0, shift))
    chosen = offset & yyy
    return offset ^ (chosen >> shift if shift >= 0 else chosen << -shift)


def test_swizzle_is_that_of_cute():
    draw = random.Random(1)
    for _ in range(2000):
        bits, base = draw.randrange(6), draw.randrange(6)
        shift = draw.choice((1, -1)) * draw.randrange(bits, 9)
        offset = draw.randrange(1 << 20)
        assert swizzle(offset, bits, base, shift) == cute(
            offset, bits, base, shift
        )


# bits, base, shift; bytes of an access; bytes of a row
FREE = [
    ((5, 2, 5), 4, 128),
    ((4, 3, 4), 8, 128),
    ((3, 4, 3), 16, 128),  # what tensor memory accelerators call 128 bytes
    ((2, 4, 3), 16, 64),  # and 64
    ((1, 4, 3), 16, 32),  # and 32
]


@pytest.mark.parametrize(("bms", "width", "row_bytes"), FREE, ids=str)
def test_swizzles_free_every_row_and_every_column(bms, width, row_bytes):
    columns = row_bytes // width
    ideal = width // 4

    def moved(places):
        return [swizzle(r * row_bytes + c * width, *bms) for r, c in places]

    for column in range(columns):
        places = [(row, column) for row in range(32)]
        assert wavefronts(moved(places), width) == ideal
        plain = [r * row_bytes + c * width for r, c in places]
        assert wavefronts(plain, width) > ideal
    for first in range(32):
        places = [divmod(t, columns) for t in range(32)]
        places = [(first + row, column) for row, column in places]
        assert wavefronts(moved(places), width) == ideal


def test_a_swizzle_for_one_width_may_not_do_for_another():
    column = [swizzle(128 * row, 3, 4, 3) for row in range(32)]
    assert wavefronts(column, 4) == 4  # 8 places, where 32 are needed


# the table of the page: preset, wavefronts, phases, ways, bytes a cycle
TABLE = [
    ("Row of floats", 1, 1, 1, 128),
    ("Column of floats", 32, 1, 32, 4),
    ("Column, rows padded by one", 1, 1, 1, 128),
    ("Column, Swizzle<5,2,5>", 1, 1, 1, 128),
    ("Column of bf16, 32 wide", 16, 1, 16, 4),
    ("16 bytes of each row of 128", 32, 4, 8, 16),
    ("The same, padded by 16 bytes", 4, 4, 1, 128),
    ("The same, Swizzle<3,4,3>", 4, 4, 1, 128),
]


def test_table_of_the_page():
    assert [name for name, *_ in TABLE] == list(LAYOUTS)
    for name, *expected in TABLE:
        got = shared_request(**LAYOUTS[name])
        numbers = got.wavefronts, got.phases, got.ways, got.bytes_per_cycle
        assert list(numbers) == expected
        wanted = tile_addresses(**LAYOUTS[name])
        assert got.wavefronts == machine(wanted, LAYOUTS[name]["access_bytes"])


def test_memory_that_a_tile_takes():
    assert shared_request(4, 32).tile_bytes == 32 * 32 * 4
    assert shared_request(4, 32, padding=1).tile_bytes == 32 * 33 * 4


def test_chart_holds_the_tile_on_a_line():
    tile = {**LAYOUTS["Column, rows padded by one"], "columns": 48}
    chart = wavefront_chart(**tile)
    assert isinstance(chart, LineChart)
    plain, padded = chart.lines
    assert dict(plain.points)[48] == 16
    (yours,) = chart.points
    assert (yours.x, yours.y) in padded.points
    swizzled = wavefront_chart(**LAYOUTS["The same, Swizzle<3,4,3>"])
    assert [line.name for line in swizzled.lines] == ["plain", "swizzled"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_trace_tells_the_count(name):
    layout = LAYOUTS[name]
    width = layout["access_bytes"]
    request = shared_request(**layout)
    phases = []
    visited = wavefronts(
        tile_addresses(**layout), width, lambda *step: phases.append(step)
    )
    assert visited == request.wavefronts
    assert len(phases) == request.phases

    frames = bank_trace(**layout)
    assert len(frames) == request.wavefronts + request.phases + 1 <= 40
    assert f"Done: {request.wavefronts} wavefront" in frames[-1].caption
    done = [c.mark for _, row in frames[-1].below.rows for c in row]
    assert done == ["on"] * THREADS
    # a wavefront takes one word at most from each bank, as the cells say
    for before, after in pairwise(frames):
        counts = [
            [int(c.text or 0) for _, row in f.picture.rows for c in row]
            for f in (before, after)
        ]
        taken = [a - b for a, b in zip(*counts, strict=True)]
        if "hand out" in after.caption:
            assert set(taken) <= {0, 1}
            assert after.caption.startswith(f"{sum(taken)} of 32")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: wavefronts([0], 3), "access_bytes .* got 3"),
        (lambda: wavefronts([2], 4), "holds 2, expected multiples of 4"),
        (lambda: wavefronts([-4], 4), "holds -4"),
        (lambda: swizzle(-1, 3, 4, 3), "address"),
        (lambda: swizzle(0, -1, 4, 3), "bits must be at least 0, got -1"),
        (lambda: swizzle(0, 1, -4, 3), "base"),
        (lambda: swizzle(0, 3, 4, 2), "shift must be at least bits, 3, got 2"),
        (lambda: tile_addresses(access_bytes=5), "access_bytes"),
        (lambda: shared_request(columns=0), "columns must be 1 .* got 0"),
        (lambda: shared_request(across=0), "across"),
        (lambda: shared_request(columns=4, across=8), "across .* got 8"),
        (lambda: shared_request(padding=-1), "padding"),
        (lambda: shared_request(16, bits=3, base=3), "base must keep 16"),
        (lambda: bank_trace(columns=-1), "columns"),
        (lambda: wavefront_chart(columns=2000), "columns"),
        (lambda: cycles_per_request([0] * 32, 2), "access_bytes"),
        (lambda: cycles_per_request([0] * 16, 4), "32 addresses, got 16"),
        (lambda: cycles_per_request([MEMORY_BYTES] * 32, 4), "below byte"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.slow
@pytest.mark.nvcc
def test_kernels_repeat_one_instruction_of_the_promised_width():
    from aot import compile_cuda

    kernels = compile_cuda(Path(module.__file__).with_suffix(".cu"))
    assert set(kernels) == {"repeat_32", "repeat_64", "repeat_128"}
    for name, opcode in (
        ("repeat_32", "LDS"),
        ("repeat_64", "LDS.64"),
        ("repeat_128", "LDS.128"),
    ):
        kernel = kernels[name]
        assert kernel.spills == kernel.stack == 0
        reads = {op for op in kernel.opcodes if op.startswith("LDS")}
        assert reads == {opcode}
        # all else that the loop does takes fewer places than the reads wait
        assert sum(kernel.opcodes.values()) < 5 * kernel.opcodes[opcode]


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("width", [4, 8, 16])
def test_threads_read_what_they_want(width):
    # raises if one does not
    far = MEMORY_BYTES // width - 1
    wanted = [width * (t * 37 % 64) for t in range(31)] + [width * far]
    assert cycles_per_request(wanted, width, rounds=3) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 8, 16, 32, 33])
def test_a_gpu_takes_the_predicted_cycles(stride):
    wanted = [4 * stride * t for t in range(THREADS)]
    predicted = wavefronts(wanted, 4)
    measured = cycles_per_request(wanted, 4)
    assert predicted * 0.9 < measured < predicted * 1.25 + 0.25
