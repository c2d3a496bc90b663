"""Every row is added once, to its own row, whatever the order and the dtype."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from aot import compile_sm90a
from kernel_checks import WRONG, assert_accurate, mutant

from warpmap import DEVICE
from warpmap.kernels.data_movement import index_add as module
from warpmap.kernels.data_movement.index_add import (
    DTYPES,
    MAX_COLS,
    _atomic_tile,
    _segment_tile,
    index_add,
    index_add_,
    index_add_sorted_,
)

BOTH = [index_add_, index_add_sorted_]
SRC = Path(__file__).parents[3] / "src"
FLOATS = [torch.float32, torch.float16]
# rows of out, rows of source, columns: one, none left over, some, several
# tiles of rows, several strips of columns
SHAPES = [(1, 1, 1), (4, 32, 8), (7, 50, 5), (3, 70, 33), (5, 20, 130)]


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def somewhere(N, M, dtype=torch.int64):
    """Any order, some rows often, others perhaps never."""
    return torch.randint(0, N, (M,), device=DEVICE, dtype=dtype)


def check(op, out, index, source):
    """Against float64, with the roundings that each way has.

    Atomics store a row as often as something is added to it, and every sum on
    the way is at most that of all magnitudes. Sorted, it is stored once.
    """
    exact = out.double().index_add(0, index, source.double())
    scale = out.double().abs().index_add(0, index, source.double().abs())
    most = int(index.bincount().max()) if index.numel() else 0
    framework = None
    if out.dtype == torch.float32:
        framework = out.index_add(0, index, source)
    assert_accurate(
        op(out.clone(), index, source),
        exact,
        out.dtype,
        scale=scale,
        stored=1 if "sorted" in op.__name__ else max(1, most),
        terms=most + 1,
        framework=framework,
    )


def checks(op, dtype=torch.float32):
    for N, M, C in SHAPES:
        out, source = normal(N, C, dtype=dtype), normal(M, C, dtype=dtype)
        check(op, out, somewhere(N, M), source)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", BOTH)
def test_agrees_with_float64(op, dtype):
    checks(op, dtype)


def test_sorted_agrees_with_float64_in_bfloat16():
    checks(index_add_sorted_, torch.bfloat16)


@pytest.mark.parametrize("op", BOTH)
def test_any_order_of_indices(op):
    out, source = normal(6, 9), normal(40, 9)
    for index in (
        torch.full((40,), 5, device=DEVICE),  # one destination
        torch.arange(40, device=DEVICE) % 2 * 3,  # out of order, gaps
        torch.arange(39, -1, -1, device=DEVICE) // 7,  # falling
        somewhere(6, 40, torch.int32),
        somewhere(6, 80)[::2],  # strided
    ):
        check(op, out, index, source)


@pytest.mark.parametrize("op", BOTH)
def test_rows_may_lie_apart(op):
    index = somewhere(6, 21)
    source = normal(42, 30)[::2, 3:20]
    wide = normal(12, 40)
    out = wide[::2, 5:22]
    before = wide.clone()
    exact = out.double().index_add(0, index, source.double())
    assert op(out, index, source) is out
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    out.copy_(before[::2, 5:22])
    assert torch.equal(wide, before)  # nothing beside it has changed
    check(op, normal(6, 17), index, normal(1, 17).expand(21, 17))


@pytest.mark.parametrize("op", BOTH)
@pytest.mark.parametrize("shape", [(3, 0, 4), (0, 0, 4), (3, 5, 0)], ids=str)
def test_empty(op, shape):
    N, M, C = shape
    out = normal(N, C)
    index = torch.zeros(M, dtype=torch.int64, device=DEVICE)
    assert torch.equal(op(out.clone(), index, normal(M, C)), out)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("op", BOTH)
def test_what_is_not_finite_stays_in_its_row_and_column(op):
    source = torch.zeros(20, 6, device=DEVICE)
    source[3, 1], source[4, 2], source[5, 2] = torch.nan, torch.inf, -torch.inf
    index = torch.arange(20, device=DEVICE) // 3
    y = op(torch.zeros(8, 6, device=DEVICE), index, source)
    expected = torch.zeros(8, 6, device=DEVICE).index_add(0, index, source)
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert y.isnan().sum() == 2


def test_sorted_is_equal_bit_for_bit_wherever_the_rows_stand():
    # in the order of the source: so a row that goes elsewhere changes nothing
    out, source = normal(5, 8), normal(60, 8)
    index = somewhere(4, 60)
    first = index_add_sorted_(out.clone(), index, source)
    gaps = torch.arange(60, device=DEVICE) * 2
    spread = torch.full((120,), 4, device=DEVICE)
    spread[gaps] = index
    wide = normal(120, 8)
    wide[gaps] = source
    again = index_add_sorted_(out.clone(), spread, wide)
    assert torch.equal(again[:4], first[:4])


def test_sorting_rounds_once_and_atomics_each_time():
    out = torch.full((1, 4), 2048.0, dtype=torch.float16, device=DEVICE)
    index = torch.zeros(100, dtype=torch.int64, device=DEVICE)
    ones = torch.ones(100, 4, dtype=torch.float16, device=DEVICE)
    assert index_add_(out.clone(), index, ones).tolist() == [[2048] * 4]
    assert index_add_sorted_(out.clone(), index, ones).tolist() == [[2148] * 4]


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradient_is_a_gather(deterministic):
    x = normal(4, 3).requires_grad_()
    source = normal(9, 3).requires_grad_()
    index = somewhere(4, 9)
    dy = normal(4, 3)
    y = index_add(x, index, source, deterministic)
    torch.testing.assert_close(y, x.index_add(0, index, source))
    ours = torch.autograd.grad(y, (x, source), dy)
    right = torch.autograd.grad(x.index_add(0, index, source), (x, source), dy)
    assert torch.equal(ours[0], right[0])
    assert torch.equal(ours[1], right[1])
    assert torch.equal(ours[1], dy[index])


OUT, SOURCE = torch.zeros(4, 3), torch.ones(5, 3)
AT = torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize("op", [*BOTH, index_add])
@pytest.mark.parametrize(
    ("out", "index", "source", "message"),
    [
        (OUT[0], AT, SOURCE, r"out \(N, C\).*\(3,\)"),
        (OUT, AT[None], SOURCE, r"\(1, 5\)"),
        (OUT, AT[:4], SOURCE, r"\(4,\), \(5, 3\)"),
        (OUT, AT, SOURCE[:, :2], r"\(5, 2\)"),
        (OUT.double(), AT, SOURCE.double(), "float64"),
        (OUT, AT, SOURCE.half(), "float32 and torch.float16"),
        (OUT, AT.float(), SOURCE, "int64 or int32, got torch.float32"),
        (OUT.to("meta"), AT, SOURCE, "one device"),
        (OUT, AT, torch.ones(3, 5).T, r"strides \(1, 5\)"),
    ],
)
def test_bad_input_is_refused(op, out, index, source, message):
    if out.device.type != "meta":
        out = out.to(DEVICE)
    source = source.to(DEVICE)
    with pytest.raises(ValueError, match=message):
        op(out, index.to(DEVICE), source)


@pytest.mark.parametrize("op", BOTH)
def test_out_that_cannot_be_added_to_is_refused(op):
    index, source = AT.to(DEVICE), SOURCE.to(DEVICE)
    with pytest.raises(ValueError, match=r"overlap, got strides \(0, 1\)"):
        op(OUT[:1].to(DEVICE).expand(4, 3), index, source)
    with pytest.raises(ValueError, match="call index_add"):
        op(OUT.to(DEVICE).clone().requires_grad_(), index, source)
    with pytest.raises(ValueError, match=r"2\*\*31 - 1 rows, got 2147483648"):
        op(source[:1].expand(2**31, 3), index, source)
    wide = source[:1, :1].expand(5, MAX_COLS + 1)
    with pytest.raises(ValueError, match="4194240 columns, got 4194241"):
        op(wide, index, wide)
    nowhere = torch.zeros(0, 3, device=DEVICE)
    with pytest.raises(ValueError, match="from 0 to -1"):
        op(nowhere, index, source)


@pytest.mark.parametrize("op", BOTH)
def test_a_source_that_lies_in_out_is_refused(op):
    x, index = torch.zeros(9, 4, device=DEVICE), AT.to(DEVICE)
    for source in (x[:5], x[4:], x[2:7]):
        with pytest.raises(ValueError, match="apart from out in memory"):
            op(x, index, source)
    op(x[:4], index, x[4:])  # side by side is apart
    assert torch.equal(index_add(x[:5], index, x[:5]), x[:5])


@pytest.mark.parametrize("op", [*BOTH, index_add])
@pytest.mark.parametrize("wrong", [-1, 4, 2**32, -(2**32)])
def test_an_index_out_of_range_is_refused_on_a_cpu(op, wrong):
    index = AT.clone()
    index[3] = wrong
    # where there is a GPU, tensors on the CPU are refused altogether
    with pytest.raises(ValueError, match=r"indices from 0 to 3|on one device"):
        op(OUT.clone(), index, SOURCE)


def test_atomics_of_bfloat16_are_refused_on_a_cpu():
    for op in (index_add_, index_add):
        with pytest.raises(ValueError, match=r"sort instead|on one device"):
            op(OUT.bfloat16(), AT, SOURCE.bfloat16())


def test_operators_are_registered_as_torch_wants_them():
    out, index, source = normal(4, 6), somewhere(4, 7), normal(7, 6)
    ops = torch.ops.warpmap
    for op in (ops.index_add_, ops.index_add_sorted_):
        torch.library.opcheck(op.default, (out, index, source))
    args = out.requires_grad_(), index, source.requires_grad_(), True
    torch.library.opcheck(ops.index_add.default, args)


def test_compiles_with_its_gradient_in_one_graph():
    index = somewhere(4, 9)

    def f(x, source):
        return index_add(x * 2, index, source, deterministic=True).square()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    args = normal(4, 3).requires_grad_(), normal(9, 3).requires_grad_()
    a, b = (torch.autograd.grad(g(*args).sum(), args) for g in (f, compiled))
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


def test_compiles_in_place():
    index, source = somewhere(4, 9), normal(9, 3)

    def f(x):
        return index_add_sorted_(x * 2, index, source) + 1

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    x = normal(4, 3)
    assert torch.equal(compiled(x), f(x))


# Faults: the checks above must see every one


@pytest.mark.parametrize(
    "fault", ["all zeros", "one row shifted", "last element unwritten"]
)
@pytest.mark.parametrize("op", BOTH)
def test_a_wrong_result_is_caught(op, fault):
    wrong = WRONG[fault](op)
    wrong.__name__ = op.__name__
    with pytest.raises(AssertionError):
        check(wrong, normal(5, 20), somewhere(5, 70), normal(70, 20))


ATOMIC_FAULTS = {
    "last tile forgotten": ("triton.cdiv(M, BLOCK_M)", "max(1, M // BLOCK_M)"),
    "last column unwritten": (
        "known)[:, None] & (cols < C)",
        "known)[:, None] & (cols < C - 1)",
    ),
    "stored, not added": (
        "tl.atomic_add(\n        out_ptr + index[:, None] * stride_om + cols,"
        ' x, mask, sem="relaxed"\n    )',
        "tl.store(out_ptr + index[:, None] * stride_om + cols, x, mask)",
    ),
    "wherever it stands": (
        "index[:, None] * stride_om",
        "rows[:, None] % N * stride_om",
    ),
    "the first strip of columns again": (
        "cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]",
        "cols = tl.arange(0, BLOCK_C)[None, :]",
    ),
}
SORTED_FAULTS = {
    "too many rows": (
        "(k < end)[:, None] & (cols < C)[None, :]",
        "(k < M)[:, None] & (cols < C)[None, :]",
    ),
    "without what was there": (
        "acc = tl.load(out_ptrs, cols < C, other=0.0).to(tl.float32)",
        "acc = tl.zeros((BLOCK_C,), tl.float32)",
    ),
    "last rows only": ("acc += tl.sum", "acc = tl.sum"),
    "first sixteen only": (
        "range(begin, end, BLOCK_K)",
        "range(begin, begin + 1, BLOCK_K)",
    ),
    "sum in half precision": (
        "acc += tl.sum(x.to(tl.float32), axis=0)",
        "acc += tl.sum(x.to(tl.float16), axis=0).to(tl.float32)",
    ),
    "not where sorting says": (
        "rows = tl.load(order_ptr + k, k < end, other=0)",
        "rows = tl.minimum(k, M - 1)",
    ),
    "last column unwritten": (
        "tl.store(out_ptrs, acc, cols < C)",
        "tl.store(out_ptrs, acc, cols < C - 1)",
    ),
}


@pytest.mark.parametrize("fault", ATOMIC_FAULTS)
def test_a_mistake_in_the_atomics_is_caught(fault, tmp_path):
    wrong = mutant(module, *ATOMIC_FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        checks(wrong.index_add_)


@pytest.mark.parametrize("fault", SORTED_FAULTS)
def test_a_mistake_after_sorting_is_caught(fault, tmp_path):
    wrong = mutant(module, *SORTED_FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        checks(wrong.index_add_sorted_)


def test_a_wrong_gradient_is_caught(tmp_path):
    wrong = mutant(
        module, "dy.index_select(0, *ctx.saved_tensors)", "dy[:1] * 1", tmp_path
    )
    x, source = normal(2, 3), normal(1, 3).requires_grad_()
    index = torch.ones(1, dtype=torch.int64, device=DEVICE)
    dy = normal(2, 3)
    wrong.index_add(x, index, source).backward(dy)
    assert not torch.equal(source.grad, dy[index])


# What the compiler makes of the kernels


@pytest.mark.parametrize(
    ("dtype", "C"), [("fp32", 256), ("fp16", 256), ("bf16", 64)]
)
def test_adds_16_bytes_at_a_time_and_waits_for_none(dtype, C):
    BLOCK_M, BLOCK_C, num_warps = _atomic_tile(C)
    kernel = compile_sm90a(
        f"{module.__name__}:_index_add_kernel",
        {
            **{f"{n}_ptr": f"*{dtype}:16" for n in ("out", "source")},
            **{"index_ptr": "*i64:16", "M": "i32", "N": "i32", "C": "i32:16"},
            **{"stride_om": "i32:16", "stride_sm": "i32:16"},
        },
        {"BLOCK_M": BLOCK_M, "BLOCK_C": BLOCK_C},
        num_warps=num_warps,
    )
    assert kernel.spills == kernel.stack == 0
    packed = {"fp32": "F32x4.FTZ", "fp16": "F16x8", "bf16": "BF16x8"}[dtype]
    adds = {o for o in kernel.opcodes if o.startswith(("RED", "ATOM", "MEM"))}
    assert adds == {f"REDG.E.ADD.{packed}.RN.STRONG.GPU"}
    loads = {op for op in kernel.opcodes if op.startswith("LDG")}
    assert loads <= {"LDG.E.EF.128", "LDG.E.64", "LDG.E.128"}
    assert "LDG.E.EF.128" in loads


@pytest.mark.parametrize(("dtype", "C"), [("fp32", 1024), ("bf16", 256)])
def test_a_segment_is_summed_in_registers(dtype, C):
    BLOCK_K, BLOCK_C, num_warps = _segment_tile(C)
    kernel = compile_sm90a(
        f"{module.__name__}:_segment_add_kernel",
        {
            **{f"{n}_ptr": f"*{dtype}:16" for n in ("out", "source")},
            **{f"{n}_ptr": "*i64:16" for n in ("starts", "order")},
            **{"M": "i32", "N": "i32", "C": "i32:16"},
            **{"stride_om": "i32:16", "stride_sm": "i32:16"},
        },
        {"BLOCK_K": BLOCK_K, "BLOCK_C": BLOCK_C},
        num_warps=num_warps,
    )
    assert kernel.spills == kernel.stack == kernel.shared == 0
    stores = {op for op in kernel.opcodes if op.startswith("STG")}
    assert stores == {"STG.E.128"}
    # 16 rows are loaded before they are added up, and the one of out
    vectors = BLOCK_C * {"fp32": 4, "bf16": 2}[dtype] // 16 // kernel.threads
    assert kernel.opcodes["LDG.E.128"] == (BLOCK_K + 1) * vectors


@pytest.mark.sanitize
def test_every_kernel_runs():
    out, index, source = normal(4, 40), somewhere(4, 50), normal(50, 40)
    for op in BOTH:
        check(op, out, index, source)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("op", BOTH)
def test_bfloat16_agrees_with_float64(op):
    checks(op, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("op", BOTH)
def test_random_shapes_agree_with_float64(op):
    for _ in range(40):
        N, M, C = (int(2 ** (top * torch.rand(()))) for top in (12, 12, 11))
        dtype = DTYPES[int(torch.randint(3, ()))]
        gap = int(torch.randint(9, ()))
        wide = normal(M, C + gap, dtype=dtype)
        check(op, normal(N, C, dtype=dtype), somewhere(N, M), wide[:, gap:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sorted_runs_are_equal_bit_for_bit(dtype):
    out, source = normal(500, 256, dtype=dtype), normal(30000, 256, dtype=dtype)
    index = somewhere(500, 30000)
    first = index_add_sorted_(out.clone(), index, source)
    for _ in range(20):
        again = index_add_sorted_(out.clone(), index, source)
        assert torch.equal(again, first)


@pytest.mark.gpu
@pytest.mark.parametrize("op", BOTH)
def test_more_than_2_to_the_31_elements(op):
    N, C = 2**22 + 3, 512
    big = torch.zeros(N, C, dtype=torch.float16, device="cuda")
    index = torch.tensor([N - 1, 0, N - 2, N - 1], device="cuda")
    op(big, index, torch.ones(4, C, dtype=torch.float16, device="cuda"))
    assert big[[0, 1, N - 2, N - 1], 3].tolist() == [1, 0, 1, 2]
    everywhere = torch.zeros(N, dtype=torch.int64, device="cuda")
    everywhere[-1] = 1
    big.zero_()
    big[-1] = 5
    out = torch.zeros(2, C, dtype=torch.float16, device="cuda")
    op(out, everywhere[-3:], big[-3:])
    assert out[:, 7].tolist() == [0, 5]
    if op is index_add_sorted_:  # many destinations, or it takes seconds
        index = torch.arange(N, device="cuda") // 64
        total = op(torch.zeros_like(big[: N // 64 + 1]), index, big)
        assert total.sum(dtype=torch.float64).item() == 5 * C
    else:
        op(out, torch.arange(N, device="cuda") % 2, big)
        assert out.sum(dtype=torch.float64).item() == 10 * C


@pytest.mark.gpu
def test_inductor_compiles_it():
    index = somewhere(64, 1000)
    x, source = normal(64, 128), normal(1000, 128)

    def f(x, source):
        return index_add(x + 1, index, source, deterministic=True) * 2

    compiled = torch.compile(f, fullgraph=True)
    torch.testing.assert_close(compiled(x, source), f(x, source))


OUT_OF_RANGE = """
import torch
from warpmap.kernels.data_movement import index_add as module

out, source = torch.zeros(4, 8).cuda(), torch.ones(3, 8).cuda()
index = torch.tensor([0, {wrong}, 1]).cuda()
module.{op}(out, index, source)
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("op", BOTH)
@pytest.mark.parametrize("wrong", [-1, 4, 2**32])
def test_an_index_out_of_range_stops_the_kernel(op, wrong):
    # which ends all work on the GPU: so in a process of its own
    program = OUT_OF_RANGE.format(op=op.__name__, wrong=wrong)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": str(SRC),
        },
    )
    assert done.returncode != 0
    assert "index out of range" in done.stdout + done.stderr


@pytest.mark.multi_gpu
def test_runs_on_the_gpu_that_holds_the_rows():
    out, source = normal(4, 8).to("cuda:1"), normal(9, 8).to("cuda:1")
    for op in BOTH:
        check(op, out, somewhere(4, 9).to("cuda:1"), source)
