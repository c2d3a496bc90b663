"""The simulated warp keeps to PTX's rules, and the GPU to the simulation."""

import itertools
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from aot import compile_cuda, compile_sm90a

from warpmap.kernels.building_blocks import warp_primitives as module
from warpmap.kernels.building_blocks._warp import (
    FULL,
    UNDEFINED,
    WarpError,
    ballot,
    match_all,
    match_any,
    run_warp,
    shfl,
    shfl_down,
    shfl_up,
    shfl_xor,
)
from warpmap.kernels.building_blocks.warp_primitives import (
    gpu_kernel,
    sum_trace,
    warp_count,
    warp_pack,
    warp_scan,
    warp_sum,
    warp_sum_down,
    warp_transpose,
)
from warpmap_site.traces import check, impure_imports

SHUFFLES = {
    "idx": shfl,
    "up": shfl_up,
    "down": shfl_down,
    "bfly": shfl_xor,
}
WIDTHS = [1, 2, 4, 8, 16, 32]


def ptx_source(mode, lane, b, width):
    """The lane that shfl.sync reads, after the pseudocode of the PTX manual.

    CUDA passes 0x1f as the bound, and 0 for up; the width as a mask of the
    bits of a lane's number that must not change.
    """
    bound, segment = 0 if mode == "up" else 31, 32 - width
    most = (lane & segment) | (bound & ~segment)
    least = lane & segment
    source, inside = {
        "up": (lane - b, lane - b >= most),
        "down": (lane + b, lane + b <= most),
        "bfly": (lane ^ b, lane ^ b <= most),
        "idx": (least | (b & ~segment), least | (b & ~segment) <= most),
    }[mode]
    return source if inside else lane


def once(make, *columns):
    """The answers of one call, ``make(lane, *values of the lane)``."""

    def program(lane, *values):
        call = make(lane, *values)
        if call:
            return (yield call)
        return None

    return run_warp(program, *columns)


def masks_and_some_random(count):
    draw = random.Random(0)
    return [FULL, 1, 0x80000000, 0x0F0F0F0F] + [
        draw.randrange(1, FULL + 1) for _ in range(count)
    ]


# The simulated warp


@pytest.mark.parametrize("mode", SHUFFLES)
def test_shuffles_read_the_lane_that_ptx_says(mode):
    for width, b in itertools.product(WIDTHS, range(32)):
        told = once(
            lambda _, x, b=b, w=width: SHUFFLES[mode](FULL, x, b, w), range(32)
        )
        want = [ptx_source(mode, lane, b, width) for lane in range(32)]
        assert told == want, (mode, width, b)


@pytest.mark.parametrize("mode", SHUFFLES)
def test_a_lane_that_takes_no_part_is_read_as_undefined(mode):
    for mask in masks_and_some_random(10):
        told = once(
            lambda i, x, m=mask: m >> i & 1 and SHUFFLES[mode](m, x, 5),
            range(32),
        )
        for lane in range(32):
            source = ptx_source(mode, lane, 5, 32)
            if not mask >> lane & 1:
                assert told[lane] is None
            elif mask >> source & 1:
                assert told[lane] == source
            else:
                assert told[lane] is UNDEFINED


def agree(mask, values):
    """A ballot and both matches, each against brute force."""
    there = [i for i in range(32) if mask >> i & 1]

    def ask(make):
        told = once(lambda i, x: mask >> i & 1 and make(mask, x), values)
        return [told[i] for i in there]

    odd = sum(2**i for i in there if values[i] % 2)
    assert ask(lambda m, x: ballot(m, x % 2)) == [odd] * len(there)
    assert ask(match_any) == [
        sum(2**j for j in there if values[j] == values[i]) for i in there
    ]
    equal = len({values[i] for i in there}) == 1
    assert ask(match_all) == [mask * equal] * len(there)


def test_votes_and_matches_agree_with_brute_force():
    draw = random.Random(1)
    for mask in masks_and_some_random(20):
        for most in (1, 3, 40):
            agree(mask, [draw.randrange(most) for _ in range(32)])


def test_parts_of_a_warp_go_different_ways():
    def program(lane, x):
        if lane % 2:
            x = yield shfl(0xAAAAAAAA, x, 1)
        else:
            x = yield ballot(0x55555555, lane < 4)
        return (yield shfl_xor(FULL, x, 1))

    assert run_warp(program, range(32)) == [1, 0b101] * 16


def test_nobody_waits_for_a_lane_that_has_exited():
    def program(lane, x):
        if lane >= 8:
            return x
        return (yield shfl_down(FULL, x, 4))

    told = run_warp(program, range(32))
    assert told[:4] == [4, 5, 6, 7]
    assert all(x is UNDEFINED for x in told[4:8])
    assert told[8:] == list(range(8, 32))


def test_a_lane_must_be_in_its_own_mask():
    with pytest.raises(WarpError, match=r"0x0000ffff.* lane 16, not in"):
        once(lambda _, x: shfl_xor(0xFFFF, x, 1), range(32))


def test_masks_that_differ_never_meet():
    with pytest.raises(WarpError, match=r"(?s)lanes 0-29 .*lanes 30 31 wait"):
        once(lambda i, x: ballot(FULL if i < 30 else FULL - 1, x), range(32))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ballot(0, 1), "mask must name lanes, got 0x0"),
        (lambda: ballot(2**32, 1), "mask .* got 0x100000000"),
        (lambda: shfl_up(FULL, 1, 32), "where .* got 32"),
        (lambda: shfl_xor(FULL, 1, 1, width=3), "width .* got 3"),
        (lambda: run_warp(warp_sum, []), r"1 to 32 values, got \[0\]"),
        (lambda: run_warp(warp_sum, range(33)), r"got \[33\]"),
        (lambda: run_warp(warp_sum), r"got \[\]"),
        (lambda: run_warp(warp_count, [1], [2, 3]), r"got \[1, 2\]"),
        (lambda: sum_trace(lanes=33), "lanes must be 1 to 32, got 33"),
        (lambda: sum_trace("up"), "pattern must be xor or down, got 'up'"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# What is built on it


def numbers(count=32):
    return [random.randrange(-1000, 1000) for _ in range(count)]


def keys():
    return [random.randrange(5) for _ in range(32)]


def checks(
    total=warp_sum,
    scan=warp_scan,
    pack=warp_pack,
    count=warp_count,
    transpose=warp_transpose,
):
    """Every program against the plain Python that says the same."""
    x, key = numbers(), keys()
    assert run_warp(total, x) == [sum(x)] * 32
    assert run_warp(scan, x) == list(itertools.accumulate(x))

    kept = [i for i in range(32) if key[i] < 2]
    places = {i: place for place, i in enumerate(kept)}
    votes = [k < 2 for k in key]
    assert run_warp(pack, votes) == [places.get(i, -1) for i in range(32)]

    counts, first = Counter(key), {k: key.index(k) for k in key}
    assert run_warp(count, key) == [
        counts[k] if first[k] == i else 0 for i, k in enumerate(key)
    ]

    rows = [numbers() for _ in range(32)]
    assert run_warp(transpose, rows) == [
        list(c) for c in zip(*rows, strict=True)
    ]


def test_programs_agree_with_plain_python():
    for _ in range(5):
        checks()
    x = numbers()
    assert run_warp(warp_sum_down, x)[0] == sum(x)


def scan_inside_the_branch(lane, x):
    for step in (1, 2, 4, 8, 16):
        if lane >= step:
            x += yield shfl_up(FULL, x, step)
    return x


def scan_of_all(lane, x):
    for step in (1, 2, 4, 8, 16):
        x += yield shfl_up(FULL, x, step)
    return x


def sum_without_the_last_step(lane, x):
    for step in (16, 8, 4, 2):
        x += yield shfl_xor(FULL, x, step)
    return x


def sum_with_half_a_mask(lane, x):
    for step in (16, 8, 4, 2, 1):
        x += yield shfl_xor(0xFFFF if lane < 16 else 0xFFFF0000, x, step)
    return x


def pack_of_the_lanes_that_kept(lane, keep):
    if not keep:
        return -1
    votes = yield ballot(FULL, keep)
    return (votes & (2 << lane) - 1).bit_count()


def count_on_every_lane(lane, key):
    return (yield match_any(FULL, key)).bit_count()


def transpose_that_gives_the_other_corner(lane, row):
    row = list(row)
    for step, low in itertools.product((16, 8, 4, 2, 1), range(32)):
        if not low & step:
            give = low + step if lane & step else low
            row[give] = yield shfl_xor(FULL, row[give], step)
    return row


@pytest.mark.parametrize(
    "wrong",
    [
        {"scan": scan_inside_the_branch},
        {"scan": scan_of_all},
        {"total": sum_without_the_last_step},
        {"total": sum_with_half_a_mask},
        {"total": warp_sum_down},
        {"pack": pack_of_the_lanes_that_kept},
        {"count": count_on_every_lane},
        {"transpose": transpose_that_gives_the_other_corner},
    ],
    ids=lambda wrong: next(iter(wrong.values())).__name__,
)
def test_a_wrong_program_is_caught(wrong):
    with pytest.raises((AssertionError, WarpError)):
        checks(**wrong)


@pytest.mark.parametrize("lanes", [1, 4, 20, 31])
def test_a_mask_that_names_lanes_that_are_gone_spoils_the_sum(lanes):
    for program in (warp_sum, warp_sum_down):
        total = run_warp(program, [1] * lanes)[0]
        assert total != total
    padded = [1] * lanes + [0] * (32 - lanes)
    assert set(run_warp(warp_sum, padded)) == {lanes}


def test_exchanges_are_counted_as_the_page_says():
    def exchanges(program, column):
        count = []
        run_warp(program, column, record=lambda *_: count.append(1))
        return len(count)

    assert exchanges(warp_sum, range(32)) == 5
    assert exchanges(warp_scan, range(32)) == 5
    assert exchanges(warp_pack, range(32)) == 1
    assert exchanges(warp_count, range(32)) == 1
    assert exchanges(warp_transpose, [range(32)] * 32) == 80


# The trace


def texts(grid):
    return [cell.text for _, cells in grid.rows for cell in cells]


@pytest.mark.parametrize("pattern", ["xor", "down"])
@pytest.mark.parametrize("lanes", [32, 20])
def test_the_trace_shows_the_very_sums(pattern, lanes):
    frames = check("sum_trace", sum_trace(pattern, lanes))
    results = run_warp(module.SUMS[pattern], range(lanes))
    want = ["?" if x != x else str(x) for x in results]
    assert texts(frames[-1].picture) == want + [""] * (32 - lanes)
    assert len(frames) == 2 * 5 + 1
    for held, told in zip(frames[:-1:2], frames[1::2], strict=True):
        # lane 0 is told what stood at its partner's place
        step = int(told.caption.split(" by ")[1].split(":")[0])
        before = texts(held.below)[step] if step < lanes else "?"
        assert texts(told.below)[0] == before


def test_the_module_runs_where_there_is_no_torch():
    assert impure_imports(module.__name__) == []


# What the compilers make of it


@pytest.mark.slow
@pytest.mark.nvcc
def test_compiles_to_the_instructions_that_the_page_counts():
    kernels = compile_cuda(Path(module.__file__).with_suffix(".cu"))
    counted = {
        "lane_sums": {"SHFL.BFLY": 5},
        "lane_scans": {"SHFL.UP": 5},
        "lane_packs": {"VOTE.ANY": 1},
        "lane_counts": {"VOTE.ANY": 1, "MATCH.ANY": 1},
        "transposes": {"SHFL.BFLY": 80},
    }
    for name, counts in counted.items():
        kernel = kernels[name]
        assert kernel.spills == kernel.stack == kernel.shared == 0
        found = {
            op: n
            for op, n in kernel.opcodes.items()
            if op.startswith(("SHFL", "VOTE", "MATCH", "LDS", "STS"))
        }
        assert found == counts, name
    assert kernels["clocks_sum_redux"].opcodes["REDUX.SUM"]


def test_triton_reduces_a_warp_with_a_butterfly():
    kernel = compile_sm90a(
        "warpmap.kernels.data_movement.reduce:_sum_kernel",
        {"x_ptr": "*fp32:16", "sums_ptr": "*fp32:16", "N": "i32"},
        {"BLOCK": 32},
        num_warps=1,
    )
    # it has two sums: of the whole blocks, and of what is left
    assert kernel.opcodes["SHFL.BFLY"] == 2 * 5
    assert kernel.shared == 0


# On a GPU


def gpu(values, dtype):
    return torch.tensor(values, dtype=dtype, device="cuda")


def lane_results(name, x):
    """A kernel over 32 neighbours at a time; poisoned where not written."""
    y = torch.full_like(x, 12345)
    n = x.numel()
    gpu_kernel(name)(-(-n // 256), 256, x, y, n)
    return y


PROGRAMS = {
    "lane_sums": (warp_sum, torch.float32),
    "lane_scans": (warp_scan, torch.float32),
    "lane_packs": (warp_pack, torch.int32),
    "lane_counts": (warp_count, torch.int32),
}


def keys_for(count):
    # whole numbers: their sums are exact in float32, in any order
    return [random.randrange(5) for _ in range(count)]


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("count", [1, 20, 32, 33, 1000, 4096])
def test_the_gpu_agrees_with_the_simulated_warp_lane_by_lane(name, count):
    program, dtype = PROGRAMS[name]
    values = keys_for(count)
    want = []
    for first in range(0, count, 32):
        lanes = values[first : first + 32]
        missing = 32 - len(lanes)
        if name == "lane_counts":  # the lanes without a key are gone
            want += run_warp(program, lanes)
        else:  # they bring a zero
            want += run_warp(program, lanes + [0] * missing)[: len(lanes)]
    assert lane_results(name, gpu(values, dtype)).tolist() == want


@pytest.mark.gpu
@pytest.mark.sanitize
def test_the_gpu_shuffles_votes_and_matches_as_the_simulated_warp_does():
    masks = masks_and_some_random(2)
    # int32 holds the same bits
    signed = [m - 2**32 if m >= 2**31 else m for m in masks]
    x = [random.randrange(10**6) for _ in range(32)]
    shape = (len(masks), 6, 32, 32)
    for kind, mode in enumerate(SHUFFLES):
        y = torch.full(shape, -1, dtype=torch.int32, device="cuda")
        gpu_kernel("every_shuffle")(
            (32, 6, len(masks)),
            32,
            gpu(x, torch.int32),
            gpu(signed, torch.int32),
            y,
            kind,
        )
        y = y.tolist()
        for (m, mask), (w, width), where in itertools.product(
            enumerate(masks), enumerate(WIDTHS), range(32)
        ):
            make = SHUFFLES[mode]
            told = once(
                lambda i, v, mask=mask, b=where, w=width, make=make: (
                    mask >> i & 1 and make(mask, v, b, w)
                ),
                x,
            )
            for lane, want in enumerate(told):
                if want is None:
                    assert y[m][w][where][lane] == -1
                elif want is not UNDEFINED:
                    assert y[m][w][where][lane] == want

    rows = [[random.randrange(n) for _ in range(32)] for n in (1, 2, 9, 10**6)]
    pairs = list(itertools.product(masks, rows))
    y = torch.zeros((len(pairs), 3, 32), dtype=torch.int32, device="cuda")
    gpu_kernel("every_vote")(
        len(pairs),
        32,
        gpu([row for _, row in pairs], torch.int32),
        gpu([signed[masks.index(m)] for m, _ in pairs], torch.int32),
        y,
    )
    makes = (lambda m, v: ballot(m, v & 1), match_any, match_all)
    for (mask, row), got in zip(pairs, y.tolist(), strict=True):
        for make, lanes in zip(makes, got, strict=True):
            told = once(
                lambda i, v, m=mask, make=make: m >> i & 1 and make(m, v), row
            )
            assert [v & FULL for v in lanes] == [t or 0 for t in told]


@pytest.mark.gpu
def test_sums_and_scans_agree_with_torch():
    x = torch.randn(1000, 32, device="cuda")
    scale = x.double().abs().sum(dim=1, keepdim=True)
    # 5 additions on every path
    bound = 5 * 2.0**-24 * 1.001 * scale
    for name, exact in (
        ("lane_sums", x.double().sum(dim=1, keepdim=True).expand(-1, 32)),
        ("lane_scans", x.double().cumsum(dim=1)),
    ):
        off = (lane_results(name, x.flatten()).view(1000, 32) - exact).abs()
        assert (off <= bound).all()
    # every lane adds the same pairs, so all hold the same bits
    sums = lane_results("lane_sums", x.flatten()).view(1000, 32)
    assert torch.equal(sums, sums[:, :1].expand(-1, 32))


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [(1, 1), (32, 32), (33, 95), (200, 31)])
def test_transposes_agree_with_torch(shape):
    M, N = shape
    x = torch.randn(shape, device="cuda")
    y = torch.full((N, M), torch.nan, device="cuda")
    warps = -(-M // 32) * -(-N // 32)
    gpu_kernel("transposes")(-(-warps // 4), 128, x, y, M, N)
    assert torch.equal(y, x.T)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    n = 2**31 + 50
    x = torch.zeros(n, dtype=torch.int32, device="cuda")
    x[-32:] = 1
    places = lane_results("lane_packs", x)
    first = n - n % 32  # of the last warp
    want = run_warp(warp_pack, x[first:].tolist() + [0] * (32 - n % 32))
    assert places[first:].tolist() == want[: n % 32]


@pytest.mark.gpu
@pytest.mark.sanitize
def test_the_timed_steps_do_what_they_say():
    every = torch.arange(32, dtype=torch.int32, device="cuda")
    clocks = torch.zeros(32, dtype=torch.int64, device="cuda")
    for name in ("sum_shuffles", "sum_shared", "sum_redux"):
        x = every.clone()
        gpu_kernel(f"clocks_{name}")(1, 32, x, clocks, 1)
        assert (clocks > 0).all()
        assert (x == 496).all()
