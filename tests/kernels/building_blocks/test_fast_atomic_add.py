"""Every value is added once, to its own number, and to no other byte."""

import math
from pathlib import Path

import pytest
import torch
from aot import compile_cuda, compile_sm90a
from kernel_checks import WRONG, assert_accurate, mutant

from warpmap import DEVICE
from warpmap.kernels.building_blocks import fast_atomic_add as module
from warpmap.kernels.building_blocks.fast_atomic_add import (
    ADDS,
    RUNGS,
    _dot_launch,
    add_at,
    add_at_by,
    dot,
    dot_by,
)

HALF = torch.float16
# any addition to it leaves another NaN behind: it says who was there
UNTOUCHED = 0x7D01


def guarded(values, start):
    """``values``, 8 halves or more from either end of memory.

    Returns:
        The values, beginning on an odd half if ``start`` is odd, and a
        function that says whether what lies around them is untouched.
    """
    first, N = 8 + start, values.numel()
    bits = torch.full((N + 20,), UNTOUCHED, dtype=torch.int16, device=DEVICE)
    bits[first : first + N] = values.to(DEVICE).view(torch.int16)

    def untouched():
        around = torch.cat([bits[:first], bits[first + N :]])
        return bool((around == UNTOUCHED).all())

    return bits[first : first + N].view(values.dtype), untouched


def signs(n, device=DEVICE):
    """As many 1 as -1, in random order."""
    one = torch.tensor([1.0, -1.0], dtype=HALF, device=device).repeat(n // 2)
    return one[torch.randperm(n, device=device)]


def check_add(op):
    """Additions that are exact in half precision; so the results are, too."""
    for N, start in [(1, 0), (1, 1), (2, 0), (2, 1), (37, 0), (37, 1), (8, 3)]:
        out = torch.randint(-8, 9, (N,)).to(HALF)
        index = torch.randint(-2, N + 2, (300,), device=DEVICE)
        value = signs(300)
        inside = (index >= 0) & (index < N)
        exact = out.double().to(DEVICE)
        exact = exact.index_add(0, index[inside], value[inside].double())
        view, untouched = guarded(out, start)
        assert torch.equal(op(view, index, value).double(), exact)
        assert untouched()


def check_neighbours(op):
    """What is not named keeps its bits: -0, the smallest, inf, and NaN."""
    special = [-0.0, 0.0, 2.0**-24, -(2.0**-24), 65504, -torch.inf, torch.nan]
    for start in (0, 1):
        for at in range(9):
            out = torch.tensor(special + [-0.0] * 2).to(HALF)
            view, _ = guarded(out, start)
            before = view.clone().view(torch.int16)
            index = torch.full((5,), at, device=DEVICE)
            op(view, index, torch.ones(5, dtype=HALF, device=DEVICE))
            after = view.view(torch.int16)
            others = [
                i
                for i, x in enumerate(out.tolist())
                if i != at and x == x  # a NaN may become another
            ]
            assert torch.equal(after[others], before[others])
            assert view[6].isnan()


def check_add_accurate(op, dtype=HALF):
    """Against float64; k additions round k times, up as often as down."""
    value = torch.rand(999, device=DEVICE).to(dtype)
    index = torch.randint(0, 40, (999,), device=DEVICE)
    out = torch.rand(41, device=DEVICE).to(dtype)[1:]
    exact = out.double().index_add(0, index, value.double())
    most = index.bincount().max().item()
    # numbers of one sign: the running sum never exceeds the result
    stored = 8 * most**0.5
    ours = op(out, index, value)
    assert_accurate(ours[None], exact[None], dtype, stored=stored)


def check_dot(op, sizes=(1, 7, 8, 999, 16384, 16385, 40003), dtype=HALF):
    for n in sizes:
        x, y = (torch.randn(n, device=DEVICE).to(dtype) for _ in "xy")
        products = x.double() * y.double()
        assert_accurate(
            op(x, y).view(1, 1),
            products.sum().view(1, 1),
            torch.float32,
            scale=products.abs().sum().view(1, 1),
            terms=n,
        )


def check_dot_exact(op, n):
    """Sums of 1 and -1 that stay below 2048 are exact in half precision."""
    x, y = signs(n), signs(n)
    assert op(x, y).item() == (x.double() * y.double()).sum().item()


def test_additions_are_exact_where_half_precision_is():
    check_add(add_at)


def test_neighbours_keep_their_bits():
    check_neighbours(add_at)


def test_additions_agree_with_float64():
    check_add_accurate(add_at)


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16], ids=str)
def test_dot_agrees_with_float64(dtype):
    check_dot(dot, dtype=dtype)


def test_dot_of_signs_is_exact():
    check_dot_exact(dot, 2000)


def test_vectors_may_begin_anywhere():
    x, y = torch.randn(2, 501, device=DEVICE).to(HALF)
    exact = (x[3:].double() * y[1:-2].double()).sum().item()
    assert dot(x[3:], y[1:-2]).item() == pytest.approx(exact, abs=1e-4)


def test_empty():
    nothing = torch.empty(0, dtype=HALF, device=DEVICE)
    index = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert dot(nothing, nothing).item() == 0
    assert add_at(nothing, index, nothing).shape == (0,)
    out = torch.ones(2, dtype=HALF, device=DEVICE)
    assert add_at(out, index, nothing).tolist() == [1, 1]
    one = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    assert add_at(nothing, one, out[:1]).shape == (0,)


def test_a_sum_in_half_precision_stops_where_the_page_says():
    value = torch.full((4000,), 0.01, dtype=HALF, device=DEVICE)
    index = torch.zeros(4000, dtype=torch.int64, device=DEVICE)
    out = torch.zeros(1, dtype=HALF, device=DEVICE)
    # half of the spacing 2**-5 of numbers from 32 on is more than 0.01
    assert add_at(out, index, value).item() == 32


V, AT = torch.zeros(4, dtype=HALF), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (V[None], V, r"two vectors.*\(1, 4\)"),
        (V, V[:3], r"\(4,\) and \(3,\)"),
        (V.float(), V.float(), "float32"),
        (V, V.bfloat16(), "float16 and torch.bfloat16"),
        (V[::2], V[::2], "strides"),
        (V.to("meta"), V.to("meta"), "meta"),
    ],
)
def test_bad_vectors_are_refused(x, y, message):
    if x.device.type != "meta" and x.is_contiguous():
        x, y = x.to(DEVICE), y.to(DEVICE)
    elif x.device.type != "meta":
        x = y = V.to(DEVICE)[::2]
    with pytest.raises(ValueError, match=message):
        dot(x, y)


@pytest.mark.parametrize(
    ("out", "index", "value", "message"),
    [
        (V[None], AT, V, r"\(1, 4\)"),
        (V, AT[:2], V, r"\(2,\), \(4,\)"),
        (V.float(), AT, V.float(), "float32"),
        (V, AT, V.bfloat16(), "float16 and torch.bfloat16"),
        (V, AT.int(), V, "int64, got torch.int32"),
        (V.to("meta"), AT, V, "one device"),
    ],
)
def test_bad_additions_are_refused(out, index, value, message):
    out = out if out.device.type == "meta" else out.to(DEVICE)
    with pytest.raises(ValueError, match=message):
        add_at(out, index.to(DEVICE), value.to(DEVICE))


def test_layouts_and_unknown_names_are_refused():
    out = torch.zeros(8, dtype=HALF, device=DEVICE)
    index = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"strides \(2,\)"):
        add_at(out, index, out[::2])
    with pytest.raises(ValueError, match="got 'best'"):
        dot_by("best", out, out)
    with pytest.raises(ValueError, match="got 'best'"):
        add_at_by("best", out, index, out[:4])
    with pytest.raises(ValueError, match=r"float16, got torch.bfloat16"):
        dot_by("half", out.bfloat16(), out.bfloat16())
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        dot_by("half", out[1:], out[1:])
    with pytest.raises(ValueError, match="float16"):
        add_at_by("float", out, index, out[:4])


def test_what_a_cpu_cannot_do_is_refused():
    x = torch.zeros(8, dtype=torch.bfloat16)
    index = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"float16 on the CPU|on one device"):
        add_at(x, index, x)
    with pytest.raises(ValueError, match=r"on a GPU, got cpu|on one device"):
        add_at_by("half", x.half(), index, x.half())
    with pytest.raises(ValueError, match=r"on a GPU, got cpu|on one device"):
        dot_by("half", x.half(), x.half())


# Faults: the checks above must see every one


@pytest.mark.parametrize(
    "fault", ["all zeros", "one row shifted", "last element unwritten"]
)
def test_a_wrong_result_is_caught(fault):
    with pytest.raises(AssertionError):
        check_add_accurate(WRONG[fault](add_at))


ADD_FAULTS = {
    "padded with +0": ("value[:, None], nothing)", "value[:, None], -0.0)"),
    "partner beyond the end": (" & (pair + 1 < N)", ""),
    "partner before the start": (" & (pair >= 0)", ""),
    "first or last forgotten": ("wanted & ~whole", "wanted & (index < 0)"),
    "negative index": ("(index >= 0) & (index < N)", "index < N"),
    "index past the end": ("(index >= 0) & (index < N)", "index >= 0"),
    "both halves": (
        "named = pair[:, None] + side == index[:, None]",
        "named = pair[:, None] + side > -9",
    ),
    "added twice": ("wanted & ~whole", "wanted"),
    "the next pair": ("// 2 * 2 - shift", "// 2 * 2 - shift + 2"),
}
DOT_FAULTS = {
    "last block only": ("acc += x * y", "acc = x * y"),
    "first block again": ("first + block * BLOCK", "first"),
    "sum in half precision": (
        "acc += x * y",
        "acc += (x * y).to(tl.float16).to(tl.float32)",
    ),
    "stored, not added": (
        'tl.atomic_add(sum_ptr, tl.sum(acc, axis=0), sem="relaxed")',
        "tl.store(sum_ptr, tl.sum(acc, axis=0))",
    ),
    "last program forgotten": (
        "triton.cdiv(x.numel(), BLOCK * BLOCKS)",
        "max(1, x.numel() // (BLOCK * BLOCKS))",
    ),
}


@pytest.mark.parametrize("fault", ADD_FAULTS)
def test_a_mistake_in_the_additions_is_caught(fault, tmp_path):
    wrong = mutant(module, *ADD_FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):  # noqa: PT012  either may see it
        check_neighbours(wrong.add_at)
        check_add(wrong.add_at)


@pytest.mark.parametrize("fault", DOT_FAULTS)
def test_a_mistake_in_dot_is_caught(fault, tmp_path):
    wrong = mutant(module, *DOT_FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        check_dot(wrong.dot)


# What the compilers make of them


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_triton_adds_pairs_in_the_cache_and_loops_only_at_the_ends(dtype):
    kernel = compile_sm90a(
        f"{module.__name__}:_add_at_kernel",
        {
            **{f"{n}_ptr": f"*{dtype}:16" for n in ("out", "value")},
            **{"index_ptr": "*i64:16", "shift": "i32"},
            **{"n": "i32:16", "N": "i32"},
        },
        {"BLOCK": 256},
    )
    assert kernel.spills == kernel.stack == 0
    assert f".add.noftz.v2.{dtype[:-2].replace('fp', 'f')}" in kernel.ptx
    adds = {op for op in kernel.opcodes if op.startswith(("RED", "ATOM"))}
    packed = {"fp16": "F16x2", "bf16": "BF16x2"}[dtype]
    assert adds == {
        f"REDG.E.ADD.{packed}.RN.STRONG.GPU",
        "ATOMG.E.CAS.STRONG.GPU",
    }


def test_dot_reads_16_bytes_at_a_time_and_adds_once():
    BLOCK, BLOCKS, num_warps = _dot_launch()
    kernel = compile_sm90a(
        f"{module.__name__}:_dot_kernel",
        {
            **{f"{n}_ptr": "*fp16:16" for n in "xy"},
            **{"sum_ptr": "*fp32:16", "n": "i32:16"},
        },
        {"BLOCK": BLOCK, "BLOCKS": BLOCKS},
        num_warps=num_warps,
    )
    assert kernel.spills == kernel.stack == 0
    loads = {op: n for op, n in kernel.opcodes.items() if op[:3] == "LDG"}
    assert loads == {
        "LDG.E.128": 2 * BLOCK * BLOCKS * 2 // 16 // kernel.threads
    }
    adds = {op: n for op, n in kernel.opcodes.items() if op[:3] == "RED"}
    assert adds == {"REDG.E.ADD.F32.FTZ.RN.STRONG.GPU": 1}


@pytest.mark.slow
@pytest.mark.nvcc
def test_one_half_is_a_loop_and_a_pair_an_instruction():
    kernels = compile_cuda(Path(module.__file__).with_suffix(".cu"))
    assert {k for k in kernels if k.startswith("dot")} == {
        f"dot_{rung}" for rung in RUNGS
    }
    assert {k for k in kernels if k.startswith("add")} == {
        f"add_at_{way}" for way in ADDS
    }
    for name, kernel in kernels.items():
        assert kernel.spills == kernel.stack == 0
        ops = kernel.opcodes
        loop = sum(n for op, n in ops.items() if ".CAS." in op)
        pair = ops.get("REDG.E.ADD.F16x2.RN.STRONG.GPU", 0)
        alone = ops.get("REDG.E.ADD.F32.FTZ.RN.STRONG.GPU", 0)
        way = name.split("_")[-1]
        assert (loop > 0) == (way in ("half", "padded"))
        assert (pair > 0) == (way in ("half2", "padded"))
        assert alone == (way in ("float", "block"))
        if name.startswith("dot"):
            assert ops["LDG.E.128"] >= 2


@pytest.mark.sanitize
def test_every_kernel_runs():
    x = signs(2 * 16384 + 2)
    exact = (x.double() * x.double().flip(0)).sum().item()
    index = torch.arange(99, device=DEVICE) % 7
    assert dot(x, x.flip(0)).item() == exact
    adds, rungs = [add_at], []
    if DEVICE == "cuda":
        adds += [
            lambda *args, way=way: add_at_by(way, *args)
            for way in ("half", "padded")
        ]
        rungs = RUNGS
        out = torch.zeros(7, device=DEVICE)
        add_at_by("float", out, index, torch.ones(99, device=DEVICE))
        assert out.sum().item() == 99
    for op in adds:
        out, _ = guarded(torch.zeros(7, dtype=HALF), 1)
        op(out, index, torch.ones(99, dtype=HALF, device=DEVICE))
        assert out.tolist() == [15.0] + [14.0] * 6
    for rung in rungs:
        assert dot_by(rung, x, x.flip(0)).item() == exact


# On a GPU

WAYS = ["half", "padded"]


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_cuda_additions_keep_the_same_checks(way):
    def op(*args):
        return add_at_by(way, *args)

    check_add(op)
    check_neighbours(op)
    check_add_accurate(op)


@pytest.mark.gpu
def test_bfloat16_additions_agree_with_float64():
    check_add_accurate(add_at, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("way", [*WAYS, "triton", "float"])
@pytest.mark.parametrize("N", [1, 2, 3, 64, 1001])
def test_no_addition_is_lost_where_thousands_meet(N, way):
    n = 200_000
    for start in (0, 1):
        index = torch.randint(0, N, (n,), device="cuda")
        value = signs(n)
        exact = torch.zeros(N, device="cuda", dtype=torch.float64)
        exact.index_add_(0, index, value.double())
        if way == "float":
            out = torch.zeros(N, device="cuda")
            add_at_by(way, out, index, value.float())
        else:
            out, untouched = guarded(torch.zeros(N, dtype=HALF), start)
            op = add_at if way == "triton" else None
            (op or (lambda *a: add_at_by(way, *a)))(out, index, value)
            assert untouched()
        assert torch.equal(out.double(), exact)


@pytest.mark.gpu
def test_two_neighbours_that_many_add_to_do_not_disturb_each_other():
    n = 4000  # every sum stays below 2048, so every one is exact
    for way in (add_at, lambda *a: add_at_by("padded", *a)):
        out, _ = guarded(torch.zeros(5, dtype=HALF), 1)
        index = torch.arange(n, device="cuda") % 5
        way(out, index, torch.ones(n, dtype=HALF, device="cuda"))
        assert out.tolist() == [800.0] * 5


@pytest.mark.gpu
@pytest.mark.parametrize("rung", RUNGS)
def test_every_rung_counts_every_element_once(rung):
    for n in (2, 6, 8, 14, 1000, 4002, 100_006):
        check_dot_exact(lambda x, y: dot_by(rung, x, y), n)


@pytest.mark.gpu
@pytest.mark.parametrize("rung", RUNGS)
def test_rungs_are_bounded_against_float64(rung):
    x, y = torch.rand(2, 8000, device="cuda").to(HALF)
    exact = (x.double() * y.double()).sum().view(1, 1)
    ours = dot_by(rung, x, y).view(1, 1)
    if rung in ("float", "block"):
        assert_accurate(ours, exact, torch.float32, terms=8000)
    else:  # 1000 threads add one number each, and each sum is rounded
        assert_accurate(
            ours.to(HALF), exact, HALF, stored=8 * 1000**0.5, terms=8
        )


@pytest.mark.gpu
def test_rungs_in_half_precision_stop_growing_or_overflow():
    x = torch.ones(2**24, dtype=HALF, device="cuda")
    for rung in RUNGS:
        total = dot_by(rung, x, x).item()
        if rung in ("float", "block"):
            assert total == 2**24
        else:
            assert total < 2**20 or total == math.inf


@pytest.mark.gpu
def test_the_last_rung_agrees_with_float64():
    check_dot(lambda x, y: dot_by("block", x, y))
    check_dot(dot, sizes=(10**7 + 3,))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    n = 2**31 + 9
    x = torch.zeros(n, dtype=HALF, device="cuda")
    ends = torch.tensor([0, 1, 2**31 - 1, 2**31, n - 1], device="cuda")
    x[ends] = 3
    assert dot(x, x).item() == 45
    assert dot_by("block", x, x).item() == 45
    for op in (add_at, lambda *a: add_at_by("padded", *a)):
        op(x, ends, torch.ones(5, dtype=HALF, device="cuda"))
    assert x[ends].tolist() == [5] * 5
    x[ends] = 0
    assert not x.any()


@pytest.mark.multi_gpu
def test_runs_on_the_gpu_that_holds_the_vectors():
    x = torch.ones(1000, dtype=HALF, device="cuda:1")
    index = torch.zeros(1000, dtype=torch.int64, device="cuda:1")
    assert dot(x, x).item() == dot_by("block", x, x).item() == 1000
    assert add_at(torch.zeros_like(x), index, x)[0].item() == 1000
