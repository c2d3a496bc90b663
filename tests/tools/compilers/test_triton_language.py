"""Three kernels are right, and touch and compile to what the page says."""

import itertools
import math

import pytest
import torch
from aot import compile_sm90a
from kernel_checks import WRONG, assert_accurate, mutant

from warpmap import DEVICE
from warpmap.kernels import tl, triton
from warpmap.tools.compilers import _blocks
from warpmap.tools.compilers import triton_language as module
from warpmap.tools.compilers._blocks import (
    block_trace,
    matmul_blocks,
    matmul_trace,
    visit_blocks,
)
from warpmap.tools.compilers.triton_language import (
    DTYPES,
    MAX_COLS,
    _is_even,
    _row_tile,
    _tile,
    add,
    matmul,
    row_max,
)
from warpmap_site.traces import check, impure_imports

INTERPRETED = triton.knobs.runtime.interpret
# an element, within a block, exactly one, two and a bit
SIZES = [1, 5, 1024, 2051]
ROWS = [(1, 1), (5, 7), (3, 64), (300, 3), (2, 5000)]
# smaller than a block, one of each, edges everywhere
PRODUCTS = [(1, 1, 1), (5, 3, 70), (64, 64, 32), (70, 130, 33)]


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def check_add(op, x, y):
    exact = x.double() + y.double()
    assert_accurate(op(x, y), exact, x.dtype, steps=1, framework=x + y)


def check_row_max(op, x):
    out = op(x)
    assert out.dtype == x.dtype
    assert torch.equal(out, x.amax(dim=1))


def check_matmul(op, a, b):
    exact = a.double() @ b.double()
    # no cancellation in |a| |b|: each product and sum errs relative to it
    scale = a.double().abs() @ b.double().abs()
    got = op(a, b)
    assert got.dtype == a.dtype
    u = torch.finfo(a.dtype).eps / 2
    bound = u * exact.abs() + (2 + 8 * math.sqrt(a.shape[1])) * 2**-24 * scale
    smallest = torch.finfo(a.dtype).smallest_normal
    off = (got.double() - exact).abs()
    assert got.shape == exact.shape
    assert (off <= bound + smallest).all()


# Right


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_agrees_with_float64(dtype):
    for n in SIZES:
        check_add(add, normal(2, n, dtype=dtype), normal(2, n, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_max_agrees_with_torch(dtype):
    for M, N in ROWS:
        x = normal(M, N + 3, dtype=dtype)
        check_row_max(row_max, x[:, :N])
        check_row_max(row_max, x[:, 3:])
        check_row_max(row_max, -x.abs() - 1)  # padding must not win
    check_row_max(row_max, torch.full((2, 5), -math.inf, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_matmul_agrees_with_float64(dtype):
    for M, N, K in PRODUCTS:
        a, b = normal(M, K + 1, dtype=dtype), normal(K, N + 2, dtype=dtype)
        check_matmul(matmul, a[:, :K], b[:, :N])
        check_matmul(matmul, a[:, 1:], b[:, 2:])


def test_nothing_is_needed_for_nothing():
    empty = normal(0)
    assert add(empty, empty).shape == (0,)
    assert row_max(normal(0, 3)).shape == (0,)
    assert matmul(normal(0, 3), normal(3, 2)).shape == (0, 2)
    assert matmul(normal(2, 0), normal(0, 3)).tolist() == [[0.0] * 3] * 2


@pytest.mark.sanitize
def test_every_kernel_runs_at_its_edges():
    check_add(add, normal(1, 1025), normal(1, 1025))
    check_row_max(row_max, normal(5, 70)[:, 1:])
    for dtype in (torch.float32, torch.float16):
        a, b = normal(70, 40, dtype=dtype), normal(40, 90, dtype=dtype)
        check_matmul(matmul, a, b)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: add(x, x.half()), "expected one dtype"),
        (lambda x: add(x.long(), x.long()), "expected one dtype"),
        (lambda x: add(x, x.to("meta")), "one .* device"),
        (lambda x: add(x, x[:2]), r"one shape, got \(3, 4\) and \(2, 4\)"),
        (lambda x: add(x.T, x.T), "contiguous"),
        (lambda x: row_max(x.T), "x must be a matrix with contiguous rows"),
        (lambda x: row_max(x[0]), "x must be a matrix"),
        (lambda x: row_max(x[:, :0]), f"1 to {MAX_COLS} columns, got 0"),
        (lambda x: matmul(x, x), "a has 4 columns, but b has 3 rows"),
        (lambda x: matmul(x, x.T), "b must be a matrix with contiguous rows"),
        (lambda x: matmul(x.bfloat16(), x.bfloat16()), "expected one dtype"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call(normal(3, 4))


def test_a_row_too_long_is_named():
    with pytest.raises(ValueError, match=f"got {MAX_COLS + 1}"):
        row_max(normal(1, MAX_COLS + 1))


# Wrong kernels are caught


def checks(op):
    check_add(op.add, normal(3, 700), normal(3, 700))
    check_row_max(op.row_max, -normal(5, 70).abs() - 1)
    # the largest of a row is its last, or its first; the next row's is larger
    rising = torch.arange(350.0, device=DEVICE).view(5, 70)[:, 1:]
    check_row_max(op.row_max, rising)
    check_row_max(op.row_max, -rising)
    check_matmul(op.matmul, normal(70, 33), normal(33, 71))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mask = offsets < n\n", "mask = offsets < n - 1\n"),
        ("x.to(tl.float32) + y", "x.to(tl.float16) + y"),
        ("y_ptr + offsets, mask", "y_ptr + offsets + 1, mask"),
        ('other=-float("inf")', "other=0.0"),
        ("(rows < M)[:, None] & (cols < N)[None, :]\n    # what",
         "(rows < M)[:, None] & (cols < N - 1)[None, :]\n    # what"),
        ("rows[:, None] * stride_xm", "rows[:, None] * N"),
        ("        a_ptrs += BLOCK_K\n", ""),
        ("k < K - first", "k < K"),
        ("acc = tl.dot(a, b, acc,", "acc = tl.dot(a, b,"),
        ("tl.dot(a, b,", "tl.dot(a.to(tl.float16), b.to(tl.float16),"),
        ("c_ptr + rows[:, None] * stride_cm", "c_ptr + rows[:, None] * M"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_a_mistake_in_a_kernel_is_caught(old, new, tmp_path):
    wrong = mutant(module, old, new, tmp_path)
    with pytest.raises(AssertionError):
        checks(wrong)


def test_the_kernels_pass_the_checks_that_mistakes_must_fail():
    checks(module)


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_result_is_caught(fault):
    wrong = WRONG[fault](add)
    if fault == "tail unmasked":  # of a sum of elements it changes nothing
        check_add(wrong, normal(3, 700), normal(3, 700))
        return
    with pytest.raises(AssertionError):
        check_add(wrong, normal(3, 700), normal(3, 700))


# Which addresses programs touch


@pytest.fixture
def loads(monkeypatch):
    """Program, addresses and mask of each load that the interpreter makes."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    log, load = [], Builder.create_masked_load

    def spy(self, pointers, mask, *rest):
        log.append((self.grid_idx[:2], pointers.data.tolist(), mask.data))
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(Builder, "create_masked_load", spy)
    return log


def split(base, load):
    """Offsets in floats that a load touches, and that its mask leaves out."""
    _, pointers, mask = load
    pairs = [
        ((p - base) // 4, m)
        for ps, ms in zip(pointers, mask, strict=True)
        for p, m in zip(ps, ms, strict=True)
    ]
    return [p for p, m in pairs if m], [p for p, m in pairs if not m]


def check_row_max_loads(loads):
    x = torch.randn(5, 7)[:, :6]
    row_max(x)
    told = []
    BLOCK_M, BLOCK_N = len(loads[0][1]), len(loads[0][1][0])
    visit_blocks(5, 6, 7, BLOCK_M, BLOCK_N, record=lambda *p: told.append(p))
    assert [split(x.data_ptr(), load) for load in loads] == [
        (touched, left) for _, touched, left in told
    ]


def check_matmul_loads(loads):
    a, b = torch.randn(70, 40), torch.randn(40, 130)
    matmul(a, b)
    told = {}

    def record(pid, of_a, of_b):
        told.setdefault(pid, []).extend([of_a, of_b])

    A, B = [[1.0] * 40] * 70, [[1.0] * 130] * 40
    matmul_blocks(A, B, 32, 64, 16, record)
    found = {}
    for load in loads:
        found.setdefault(tuple(load[0]), []).append(load)
    assert found.keys() == told.keys()
    for pid, steps in found.items():
        for n, (load, places) in enumerate(zip(steps, told[pid], strict=True)):
            base, stride = ((a.data_ptr(), 40), (b.data_ptr(), 130))[n % 2]
            want = [row * stride + col for row, col in places]
            assert split(base, load)[0] == want


if DEVICE == "cpu":  # the interpreter runs; a GPU does not say what it loads

    def test_programs_touch_the_addresses_that_the_trace_shows(loads):
        check_row_max_loads(loads)

    def test_a_product_loads_the_blocks_that_the_trace_shows(
        loads, monkeypatch
    ):
        tile = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 16}
        monkeypatch.setattr(module, "_tile", lambda dtype, even: tile)
        check_matmul_loads(loads)


def test_a_product_by_blocks_agrees_with_torch():
    a, b = torch.randn(5, 7).double(), torch.randn(7, 6).double()
    c = matmul_blocks(a.tolist(), b.tolist(), 2, 4, 2)
    torch.testing.assert_close(torch.tensor(c).double(), a @ b)


@pytest.mark.parametrize("shape", [(5, 6, 6), (1, 12, 12), (8, 3, 5)], ids=str)
@pytest.mark.parametrize("block", [(1, 1), (2, 4), (8, 16)], ids=str)
def test_with_a_mask_every_element_is_visited_once(shape, block):
    M, N, stride = shape
    want = {r * stride + c: 1 for r in range(M) for c in range(N)}
    assert visit_blocks(*shape, *block) == want
    frames = check("block_trace", block_trace(*shape, *block))
    assert frames[-1].caption == f"All {M * N} elements were visited once."
    shown = [c.text for _, row in frames[-1].picture.rows for c in row]
    assert shown.count("1") == M * N
    for masked in (True, False):
        frames = check("block_trace", block_trace(*shape, *block, masked))
        visits = visit_blocks(*shape, *block, masked)
        shown = [c.text for _, row in frames[-1].picture.rows for c in row]
        counts = {
            i: int(text) for i, text in enumerate(shown) if text.isdigit()
        }
        assert counts == visits


@pytest.mark.parametrize("blocks", [(2, 4, 2), (1, 8, 4), (4, 4, 1)], ids=str)
def test_the_trace_of_a_product_counts_its_loads(blocks):
    M, N, K = 5, 6, 7
    frames = check("matmul_trace", matmul_trace(M, N, K, *blocks))
    last = frames[-1]
    each = (-(-N // blocks[1]), -(-M // blocks[0]))
    for grid, times, size in zip(
        (last.picture, last.below), each, (M * K, K * N), strict=True
    ):
        texts = [c.text for _, row in grid.rows for c in row]
        assert texts == [str(times)] * size


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: block_trace(M=9), "M must be 1 to 8, got 9"),
        (lambda: block_trace(stride=5), "stride must be at least N = 6, got 5"),
        (lambda: block_trace(BLOCK_N=6), "BLOCK_N must be a power of two"),
        (lambda: visit_blocks(0, 1, 1, 1, 1), "M must be at least 1, got 0"),
        (lambda: matmul_trace(K=0), "K must be 1 to 8, got 0"),
        (lambda: matmul_trace(BLOCK_K=3), "BLOCK_K must be a power of two"),
        (lambda: matmul_trace(8, 8, 8, 1, 1, 1), "BLOCK_K must be larger"),
    ],
)
def test_bad_sizes_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_the_traces_run_where_there_is_no_torch():
    assert impure_imports(_blocks.__name__) == []


# What the compiler decides


def compiled_add(dtype="fp32", aligned=True, n="i32:16", **options):
    pointer = f"*{dtype}" + ":16" * aligned
    names = ("x_ptr", "y_ptr", "out_ptr")
    return compile_sm90a(
        f"{module.__name__}:_add_kernel",
        {**dict.fromkeys(names, pointer), "n": n},
        {"BLOCK": 1024},
        **options,
    )


def compiled_matmul(dtype, even=True, PRECISION="ieee", constants=(), **other):
    by_16 = ":16" * even
    names = ("a_ptr", "b_ptr", "c_ptr")
    sizes = ("stride_am", "stride_bk", "stride_cm", "M", "N", "K")
    torch_dtype = {"fp32": torch.float32, "fp16": torch.float16}[dtype]
    tile = _tile(torch_dtype, even) | other
    options = {o: tile.pop(o) for o in ("num_warps", "num_stages")}
    constants = dict.fromkeys(constants, 1)
    kernel = compile_sm90a(
        f"{module.__name__}:_matmul_kernel",
        {
            **dict.fromkeys(names, f"*{dtype}:16"),
            **{s: f"i32{by_16}" for s in sizes if s not in constants},
        },
        {**tile, **constants, "PRECISION": PRECISION},
        **options,
    )
    assert kernel.threads == 32 * options["num_warps"]
    return kernel


def memory(kernel):
    """Instructions that move global memory, and tensor cores'."""
    kinds = ("LDG.", "STG.", "LDGSTS.", "HGMMA")
    return {o: n for o, n in kernel.opcodes.items() if o.startswith(kinds)}


@pytest.mark.slow
def test_add_moves_16_bytes_where_16_divides_everything():
    wide = {"LDG.E.128": 4, "STG.E.128": 2}
    single = {"LDG.E": 16, "STG.E": 8}
    assert memory(compiled_add()) == wide
    assert memory(compiled_add(n="i32")) == single
    assert memory(compiled_add(aligned=False)) == single
    assert memory(compiled_add("bf16")) == {"LDG.E.128": 2, "STG.E.128": 1}
    # more warps: fewer elements a thread, the same block
    eight = compiled_add(num_warps=8)
    assert memory(eight) == {"LDG.E.128": 2, "STG.E.128": 1}
    assert eight.spills == compiled_add().spills == 0


@pytest.mark.slow
@pytest.mark.parametrize("N", [64, 4096, MAX_COLS])
def test_row_max_reads_a_row_once_and_keeps_it_in_registers(N):
    BLOCK_M, BLOCK_N, warps = _row_tile(N)
    kernel = compile_sm90a(
        f"{module.__name__}:_row_max_kernel",
        {"x_ptr": "*bf16:16", "out_ptr": "*bf16:16"}
        | {"stride_xm": "i32:16", "M": "i32", "N": "i32:16"},
        {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N},
        num_warps=warps,
    )
    assert kernel.spills == kernel.stack == 0
    loads = BLOCK_M * N * 2 // (16 * 32 * warps)
    assert kernel.opcodes["LDG.E.128"] == loads


@pytest.mark.slow
def test_a_half_product_goes_through_shared_memory_to_the_tensor_cores():
    kernel = compiled_matmul("fp16")
    assert kernel.spills == kernel.stack == 0
    # 3 stages of a block of A and of B, 2 bytes an element
    assert kernel.shared == 3 * (128 * 64 + 64 * 256) * 2
    assert memory(kernel) == {
        "LDGSTS.E.BYPASS.128": 36,
        "HGMMA.64x256x16.F32": 4,
        "STG.E.128": 16,
    }
    # one stage: nothing is loaded ahead
    alone = compiled_matmul("fp16", num_stages=1)
    assert "LDGSTS.E.BYPASS.128" not in alone.opcodes
    assert alone.shared == kernel.shared // 3


def test_sizes_that_16_does_not_divide_undo_it():
    kernel = compiled_matmul("fp16", even=False)
    assert not any(o.startswith("LDGSTS") for o in kernel.opcodes)
    assert "LDG.E.128" not in kernel.opcodes
    assert kernel.opcodes["LDG.E.U16"] == 48
    assert kernel.opcodes["HGMMA.64x256x16.F32"] == 2
    # why the blocks are half as deep
    assert kernel.spills == kernel.stack == 0
    assert compiled_matmul("fp16", even=False, BLOCK_K=64).spills > 0


def test_every_number_but_the_rows_decides_how_deep_the_blocks_are():
    a, b = normal(5, 64), normal(32, 48)
    assert _is_even(a[:, :32], b)
    assert _is_even(a[:, 16:48], b)
    for odd in (
        (normal(5, 63)[:, :32], b),
        (a[:, 1:33], b),
        (a[:, :31], b[:31]),
        (a[:, :32], normal(32, 50)[:, :48]),
        (a[:, :32], b[:, 1:]),
        (a[:, :32], b[:, :47]),
    ):
        assert not _is_even(*odd)


def test_a_float_product_uses_tensor_cores_only_in_tf32():
    exact, rounded = (compiled_matmul("fp32", PRECISION=p)
                      for p in ("ieee", "tf32"))  # fmt: skip
    assert exact.spills == exact.stack == 0
    assert exact.opcodes["FFMA"] == 64 * 64 * 32 // 128
    assert not any("MMA." in o for o in exact.opcodes)
    assert any(o.startswith("HGMMA") and "TF32" in o for o in rounded.opcodes)


def test_an_argument_of_1_is_a_constant_and_compiles():
    ones = ("stride_am", "stride_bk", "stride_cm", "M", "N", "K")
    assert compiled_matmul("fp32", constants=ones).spills == 0


# Where the interpreter and a GPU differ


@triton.jit
def _count_kernel(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + 1)


@triton.jit
def _square_kernel(x_ptr, y_ptr, PRECISION: tl.constexpr):
    i = tl.arange(0, 64)
    block = i[:, None] * 64 + i[None, :]
    x = tl.load(x_ptr + block)
    tl.store(y_ptr + block, tl.dot(x, x, input_precision=PRECISION))


@triton.jit
def _three_kernel(x_ptr):
    tl.store(x_ptr + tl.arange(0, 3), 1.0)


def test_the_interpreter_sees_no_race():
    x = torch.zeros(1, device=DEVICE)
    programs = 200 if INTERPRETED else 200_000
    _count_kernel[(programs,)](x)
    if INTERPRETED:  # one after another
        assert x.item() == programs
    else:
        assert x.item() < programs


def test_the_interpreter_does_not_round_to_tf32():
    x, y = normal(64, 64), normal(64, 64)
    exact = x.double() @ x.double()

    def error(PRECISION):
        _square_kernel[(1,)](x, y, PRECISION=PRECISION)
        return (y.double() - exact).abs().max().item()

    assert error("ieee") < 2e-5
    assert (error("tf32") < 2e-5) == INTERPRETED


@triton.jit
def _double_kernel(x_ptr, y_ptr, WIDE: tl.constexpr):
    i = tl.arange(0, 16)
    x = tl.load(x_ptr + i)
    if WIDE:
        x = x.to(tl.float32)
    tl.store(y_ptr + i, x + x)


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_the_interpreter_cannot_add_bfloat16():
    x = normal(16, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    _double_kernel[(1,)](x, y, WIDE=True)
    assert torch.equal(y, 2 * x)
    _double_kernel[(1,)](x, y, WIDE=False)
    assert torch.equal(y, 2 * x) != INTERPRETED


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_the_interpreter_cannot_multiply_bfloat16():
    x, y = normal(64, 64, dtype=torch.bfloat16), normal(64, 64)
    _square_kernel[(1,)](x, y, PRECISION="ieee")
    close = torch.allclose(y.double(), x.double() @ x.double(), atol=1e-3)
    assert close != INTERPRETED


def test_a_block_that_is_no_power_of_two_is_refused():
    with pytest.raises(Exception, match="power of 2"):
        _three_kernel[(1,)](normal(3))


# On a GPU


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    n = 2**31 + 3 * 2**11
    x = torch.empty(n, dtype=torch.bfloat16, device="cuda").normal_()
    assert torch.equal(add(x, x)[-9:], x[-9:] * 2)
    rows = x.view(-1, 2**11)
    assert torch.equal(row_max(rows), rows.amax(dim=1))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("M", "N", "K"), [(2**17 + 3, 64, 2**14), (64, 2**17 + 8, 2**14),
                      (46400, 46400, 32)]
)  # fmt: skip
def test_a_product_of_more_than_2_to_the_31_elements(M, N, K):
    a = torch.empty(M, K, dtype=torch.float16, device="cuda").normal_()
    b = torch.empty(K, N, dtype=torch.float16, device="cuda").normal_()
    c = matmul(a, b)
    check_matmul(lambda *_: c[-5:, -50:], a[-5:], b[:, -50:])
    check_matmul(lambda *_: c[:5, :50], a[:5], b[:, :50])


@pytest.mark.gpu
def test_random_shapes_agree_with_float64():
    for _ in range(40):
        M, N, K = (int(2 ** (9 * torch.rand(()).item())) for _ in "MNK")
        gap = int(torch.randint(9, ()))
        for dtype in (torch.float32, torch.float16):
            a = normal(M, K + gap, dtype=dtype)[:, gap:]
            b = normal(K, N + gap, dtype=dtype)[:, gap:]
            check_matmul(matmul, a, b)
            check_row_max(row_max, a)
        for dtype in DTYPES:
            x = normal(M, N, dtype=dtype)
            check_add(add, x, x * 3)


@pytest.mark.gpu
def test_runs_are_equal_bit_for_bit():
    a, b = (normal(1000, 1000, dtype=torch.float16) for _ in "ab")
    first = matmul(a, b)
    assert all(torch.equal(matmul(a, b), first) for _ in range(20))


@pytest.mark.multi_gpu
def test_runs_on_the_gpu_that_holds_the_matrix():
    a, b = (normal(70, 70).to("cuda:1") for _ in "ab")
    check_matmul(matmul, a, b)
    check_row_max(row_max, a)
    check_add(add, a, b)


def test_every_block_is_a_power_of_two():
    for dtype, even, name in itertools.product(
        (torch.float32, torch.float16),
        (True, False),
        ("BLOCK_M", "BLOCK_N", "BLOCK_K"),
    ):
        assert _tile(dtype, even)[name].bit_count() == 1
