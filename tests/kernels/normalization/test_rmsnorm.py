"""RMSNorm is exact to rounding, with its sums and its residual."""

import pytest
import torch
from aot import compile_sm90a
from kernel_checks import WRONG, assert_accurate, mutant
from torch.nn.functional import rms_norm

from warpmap import DEVICE
from warpmap.kernels.normalization import _rows
from warpmap.kernels.normalization import rmsnorm as module
from warpmap.kernels.normalization._rows import (
    DTYPES,
    MAX_COLS,
    column_sums,
)
from warpmap.kernels.normalization.rmsnorm import (
    _bwd_tile,
    _fwd_tile,
    add_rmsnorm,
    rmsnorm,
    rmsnorm_reference,
)

EPS = 1e-6
LONG = 16385  # backward does not keep such a row in registers
INF, NAN = float("inf"), float("nan")
# one element; many rows a program and some left over; a full tile; padded,
# and rows enough for three walkers to come round again
SHAPES = [(1, 1), (1500, 7), (4, 256), (29, 300)]


def normal(shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def matrices(shape, dtype=torch.float32):
    """x, weight and the gradient of y; a row as small as eps is among them."""
    x = normal(shape) * 2
    x[0] *= 1e-3
    return x.to(dtype), normal(shape[1:], dtype) + 1, normal(shape, dtype)


def on_device(t):
    """The same shape and strides on the GPU, unless it is meant elsewhere."""
    if t.is_meta:
        return t
    made = {"dtype": t.dtype, "device": DEVICE}
    return torch.empty_strided(t.shape, t.stride(), **made).zero_()


def strided(dtype=torch.float32):
    """Rows that lie apart, and end where the next matrix begins."""
    x = normal((40, 200), dtype)[::2, 50:131]
    return x, normal((81,), dtype), normal((20, 81), dtype)


def check_forward(op, x, weight, stored=1):
    """Against float64.

    Float32 roundings in x * rsqrt(mean + eps) * weight: those of the mean
    count half under the root, which is good to 2 units itself; then two
    products. Rounding before the weight, too, is a second ``stored``.
    """
    N = x.shape[1:]
    beside = x.dtype == weight.dtype == torch.float32
    assert_accurate(
        op(x, weight),
        rms_norm(x.double(), N, weight.double(), EPS),
        x.dtype,
        stored=stored,
        steps=8,
        terms=x.shape[1],
        framework=rms_norm(x, N, weight, EPS) if beside else None,
    )


def gradients(op, wrt):
    """From a function of x and weight, a gradient: 0 of x, 1 of weight."""

    def found(x, weight, dy):
        inputs = [t.detach().requires_grad_() for t in (x, weight)]
        return torch.autograd.grad(op(*inputs), inputs, dy)[wrt]

    return found


def check_dx(dx, x, weight, dy, dh=None):
    """What is subtracted in (g - normal mean(normal g)) rstd counts."""
    xd, wd, g = x.double(), weight.double(), dy.double() * weight.double()
    rstd = torch.rsqrt(xd.square().mean(dim=1, keepdim=True) + EPS)
    mean = (xd * rstd * g).abs().mean(dim=1, keepdim=True)
    exact = gradients(lambda x, w: rms_norm(x, w.shape, w, EPS), 0)
    more = torch.zeros_like(xd) if dh is None else dh.double()
    assert_accurate(
        dx(x, weight, dy),
        exact(xd, wd, dy.double()) + more,
        x.dtype,
        scale=rstd * (g.abs() + (xd * rstd).abs() * mean) + more.abs(),
        steps=24,
        terms=x.shape[1],
    )


def check_dweight(dweight, x, weight, dy):
    """A sum over the rows, whose terms have the error of a normal row."""
    xd, dyd = x.double(), dy.double()
    rstd = torch.rsqrt(xd.square().mean(dim=1, keepdim=True) + EPS)
    terms = xd * rstd * dyd
    assert_accurate(
        dweight(x, weight, dy)[None],
        terms.sum(dim=0, keepdim=True),
        weight.dtype,
        scale=terms.abs().sum(dim=0, keepdim=True),
        steps=8,
        terms=x.shape[0] + x.shape[1],
    )


def check_backward(op, x, weight, dy):
    inputs = [t.detach().requires_grad_() for t in (x, weight)]
    dx, dweight = torch.autograd.grad(op(*inputs), inputs, dy)
    check_dx(lambda *_: dx, x, weight, dy)
    check_dweight(lambda *_: dweight, x, weight, dy)


def test_reference_agrees_with_torch_and_with_a_case_worked_by_hand():
    x, weight = torch.randn(7, 33), torch.randn(33)
    torch.testing.assert_close(
        rmsnorm_reference(x, weight), rms_norm(x, (33,), weight, EPS)
    )
    x = torch.tensor([[1.0, 7.0]])  # the mean of 1 and 49 is 25
    y = rmsnorm_reference(x, torch.tensor([10.0, 1.0]), eps=0.0)
    torch.testing.assert_close(y, torch.tensor([[2.0, 1.4]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(shape, dtype):
    x, weight, dy = matrices(shape, dtype)
    check_forward(rmsnorm, x, weight)
    check_backward(rmsnorm, x, weight, dy)


def test_a_row_may_be_longer_than_a_program_holds(monkeypatch):
    # one walk over all rows
    monkeypatch.setattr(module, "programs_at_once", lambda *_: 1)
    check_backward(rmsnorm, *matrices((3, LONG + 199)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N", [8192, 12289, 16384, 16385, 20481, MAX_COLS])
def test_rows_may_end_where_a_chunk_does_or_just_after(N, dtype):
    # three walkers, of whom one comes round again
    x, weight, dy = matrices((4, N), dtype)
    check_backward(rmsnorm, x, weight, dy)
    check_add(add_rmsnorm, x, x.flip(0), weight, dy, dy.flip(0))


def split(N, loads):
    """A long row for two programs."""
    tile = {"BLOCK_N": 4096, "CHUNKS": 3, "SPLIT": 2, "num_warps": 16}
    return tile, 1


def test_two_programs_may_share_a_row(monkeypatch):
    monkeypatch.setattr(module, "_bwd_tile", split)
    for N in (LONG + 199, 24576):
        check_backward(rmsnorm, *matrices((5, N)))


def test_the_longest_row():
    x, weight, dy = matrices((1, MAX_COLS), torch.float16)
    check_forward(rmsnorm, x, weight)
    check_backward(rmsnorm, x, weight, dy)


def test_weight_may_have_another_dtype():
    x, weight, dy = matrices((9, 50), torch.float16)
    check_forward(rmsnorm, x, weight.float())
    check_backward(rmsnorm, x, weight.float(), dy)


def test_rows_may_lie_apart():
    x, weight, dy = strided()
    check_forward(rmsnorm, x, weight)
    check_backward(rmsnorm, x, weight, dy)
    one_row_many_times = normal((1, 33)).expand(5, 33)
    check_forward(rmsnorm, one_row_many_times, weight[:33])
    check_forward(rmsnorm, normal((4, 6))[:, ::6], weight[:1])


def test_gradient_may_have_any_layout():
    x, weight, _ = matrices((3, 5))
    check_backward(rmsnorm, x, weight, normal((5, 3)).T)
    check_backward(rmsnorm, x, weight, normal((1, 1)).expand(3, 5))


# The residual


def check_add(op, x, residual, weight, dy, dh):
    """``h`` is the rounded sum; the rest is judged from that ``h``."""
    inputs = [t.detach().requires_grad_() for t in (x, residual, weight)]
    y, h = op(*inputs)
    exact = x.double() + residual.double()
    assert_accurate(h.detach(), exact, x.dtype, steps=1)
    check_forward(lambda *_: y.detach(), h.detach(), weight)
    dx, dresidual, dweight = torch.autograd.grad((y, h), inputs, (dy, dh))
    check_dx(lambda *_: dx, h.detach(), weight, dy, dh)
    check_dweight(lambda *_: dweight, h.detach(), weight, dy)
    assert torch.equal(dx, dresidual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1500, 7), (5, 300)], ids=str)
def test_residual_is_added_first(shape, dtype):
    x, weight, dy = matrices(shape, dtype)
    check_add(add_rmsnorm, x, normal(shape, dtype), weight, dy, dy.flip(0))


def test_rows_of_the_residual_may_lie_elsewhere():
    x, weight, dy = strided()
    residual = normal((20, 90))[:, 3:84]
    check_add(add_rmsnorm, x, residual, weight, dy, dy.T.contiguous().T)


@pytest.mark.parametrize("unused", ["y", "h"])
def test_one_result_may_go_unused(unused):
    x, weight, dy = matrices((4, 9))
    x.requires_grad_()
    y, h = add_rmsnorm(x, x.detach(), weight)
    used = h if unused == "y" else y
    (dx,) = torch.autograd.grad(used, x, dy)
    if unused == "y":
        assert torch.equal(dx, dy)
    else:
        check_dx(lambda *_: dx, h.detach(), weight, dy)


# Where the row is rounded


def test_rounding_before_the_weight_is_a_second_rounding():
    x, weight, _ = matrices((20, 256), torch.float16)

    def first(x, weight):
        return rmsnorm(x, weight, cast_first=True)

    check_forward(first, x, weight, stored=2.01)
    with pytest.raises(AssertionError):
        check_forward(first, x, weight)


def test_each_variant_is_its_reference_and_not_the_other():
    # float16, which Triton's interpreter rounds as GPUs do
    x, weight, _ = matrices((20, 256), torch.float16)
    once, twice = (
        rmsnorm_reference(x, weight, cast_first=c) for c in (False, True)
    )
    assert (once != twice).float().mean() > 0.1
    for wanted, cast_first in ((once, False), (twice, True)):
        found = rmsnorm(x, weight, cast_first=cast_first)
        assert (found != wanted).float().mean() < 0.01
        found, _ = add_rmsnorm(x, 0 * x, weight, cast_first=cast_first)
        assert (found != wanted).float().mean() < 0.01


# Edges


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_empty(shape):
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    weight = torch.ones(shape[1:], device=DEVICE, requires_grad=True)
    y, h = add_rmsnorm(x, x, weight)
    (rmsnorm(x, weight) + y + h).sum().backward()
    assert y.shape == h.shape == x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_what_is_not_finite_goes_where_arithmetic_lets_it_go():
    rows = [[1, NAN, 3], [1, INF, 3], [0, 0, 0], [1e30, 1, 2], [1, 2, 3]]
    x = torch.tensor(rows, device=DEVICE)
    weight = torch.tensor([1.0, 2.0, -1.0], device=DEVICE)
    # on the CPU: torch's kernel for GPUs spreads an infinity over its row
    expected = rms_norm(x.cpu(), (3,), weight.cpu(), EPS).to(DEVICE)
    found = rmsnorm(x, weight)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found.isnan().any(dim=1).tolist() == [True, True] + [False] * 3


GOOD = {"x": (2, 3), "residual": (2, 3), "weight": (3,)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(4)}, r"x to be \(M, N\).*\(4,\)"),
        ({"x": torch.zeros(1, 2, 3)}, r"x to be \(M, N\).*\(1, 2, 3\)"),
        ({"x": torch.zeros(1, MAX_COLS + 1)}, f"at most {MAX_COLS}"),
        ({"residual": torch.zeros(3)}, r"residual to be \(2, 3\).*\(3,\)"),
        ({"residual": torch.zeros(2, 3).half()}, "residual in torch.float16"),
        ({"weight": torch.zeros(2)}, r"weight to be \(3,\).*\(2,\)"),
        ({"weight": torch.zeros(3).double()}, "weight in torch.float64"),
        ({"weight": torch.zeros(6)[::2]}, r"rows of weight.*\(2,\)"),
        ({"x": torch.zeros(3, 2).T}, r"rows of x.*\(1, 2\)"),
        ({"residual": torch.zeros(2, 3, device="meta")}, "residual on.*meta"),
    ],
)
def test_bad_input_is_refused_by_name(changed, message):
    given = {n: torch.zeros(s) for n, s in GOOD.items()} | changed
    given = {n: on_device(t) for n, t in given.items()}
    with pytest.raises(ValueError, match=message):
        add_rmsnorm(**given)
    if "residual" not in changed:
        with pytest.raises(ValueError, match=message):
            rmsnorm(given["x"], given["weight"])


def test_operators_are_registered_as_torch_wants_them():
    x, weight, dy = matrices((3, 20))
    x.requires_grad_()
    weight.requires_grad_()
    op = torch.ops.warpmap.rmsnorm.default
    torch.library.opcheck(op, (x, None, weight, EPS, False))
    torch.library.opcheck(op, (x, x.detach(), weight, EPS, True))
    saved = x.detach(), weight.detach(), torch.ones(3, 1, device=DEVICE)
    op = torch.ops.warpmap.rmsnorm_backward.default
    torch.library.opcheck(op, (dy, None, *saved))
    torch.library.opcheck(op, (dy, dy.clone(), *saved))


def test_compiles_with_its_gradient_in_one_graph():
    x, weight, dy = matrices((4, 9))

    def block(x, weight):
        y, h = add_rmsnorm(rmsnorm(x, weight), x * 2, weight)
        return y * h

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for wrt in (0, 1):
        a, b = (gradients(f, wrt)(x, weight, dy) for f in (block, compiled))
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_second_derivative_is_refused():
    x, weight, _ = matrices((2, 3))
    x.requires_grad_()
    loss = rmsnorm(x, weight).square().sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dx.sum().backward()


@pytest.mark.sanitize
def test_every_kernel_runs_at_its_edges():
    for shape in ((20, 90), (3, LONG)):
        x, weight, dy = matrices(shape, torch.float16)
        check_add(add_rmsnorm, x, x.flip(0), weight, dy, dy.flip(0))
        check_forward(rmsnorm, x, weight)
        check_backward(rmsnorm, x, weight, dy)


# The sums over all rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_sums_agree_with_float64(dtype):
    for shape in ((1, 1), (300, 70)):
        check_sums(column_sums, normal(shape), dtype)


def test_column_sums_of_many_columns():
    check_sums(column_sums, normal((3, 9000)), torch.float32)


def check_sums(sums, x, dtype):
    assert_accurate(
        sums(x, dtype)[None],
        x.double().sum(dim=0, keepdim=True),
        dtype,
        scale=x.double().abs().sum(dim=0, keepdim=True),
        steps=1,
        terms=x.shape[0],
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("range(0, M, BLOCK_M)", "range(0, M - BLOCK_M, BLOCK_M)"),
        ("acc += tl.load", "acc = tl.load"),
        ("(rows < M) & ", ""),
        ("cdiv(N, BLOCK_N),)", "cdiv(N, BLOCK_N) - 1,)"),
    ],
)
def test_a_mistake_in_the_column_sums_is_caught(old, new, tmp_path):
    # what follows in memory must not count: here it does not even exist
    x = normal((400, 70))[:300]
    wrong = mutant(_rows, old, new, tmp_path)
    with pytest.raises(AssertionError):
        check_sums(wrong.column_sums, x, torch.float32)


# Faults: the checks above must see every one


def forward_checks(op):
    for x, weight, _ in (matrices((5, 300)), strided()):
        check_forward(op, x, weight)


def test_the_kernel_passes_the_checks_that_faults_must_fail():
    forward_checks(rmsnorm)
    check_backward(rmsnorm, *matrices((29, 300)))


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_result_is_caught(fault):
    with pytest.raises(AssertionError):
        forward_checks(WRONG[fault](rmsnorm))
    given = matrices((5, 300))
    for wrt, check in enumerate((check_dx, check_dweight)):
        with pytest.raises(AssertionError):
            check(WRONG[fault](gradients(rmsnorm, wrt)), *given)


FORWARD_FAULTS = {
    "mean over the padding": (
        "mean_square = tl.sum(x * x, axis=1, keep_dims=True) / N",
        "mean_square = tl.sum(x * x, axis=1, keep_dims=True) / BLOCK_N",
    ),
    "eps left out": ("tl.rsqrt(mean_square + eps)", "tl.rsqrt(mean_square)"),
    "sum in float16": (
        "tl.sum(x * x, axis=1",
        "tl.sum((x * x).to(tl.float16), axis=1",
    ),
    "weight left out": ("cols, x * weight, mask)", "cols, x, mask)"),
    "rounded before the weight": (
        "    if CAST_FIRST:\n        x = x.to(y_ptr.dtype.element_ty)",
        "    if not CAST_FIRST:\n        x = x.to(tl.float16)",
    ),
    "two rows stored in one place": (
        "tl.store(y_ptr + rows * N",
        "tl.store(y_ptr + rows // 2 * 2 * N",
    ),
    "last column unwritten": (
        "cols, x * weight, mask)",
        "cols, x * weight, cols < N - 1)",
    ),
}
BACKWARD_FAULTS = {
    "mean left out": (
        "dweight += dy * normal\n        dx = (g - normal * mean)",
        "dweight += dy * normal\n        dx = g",
    ),
    "rstd left out": (
        "dweight += dy * normal\n        dx = (g - normal * mean) * rstd",
        "dweight += dy * normal\n        dx = g - normal * mean",
    ),
    "mean of the tile": (
        "normal * g, axis=1, keep_dims=True) / N",
        "normal * g, axis=1, keep_dims=True) / BLOCK_N",
    ),
    "weight twice in its own gradient": ("dweight += dy *", "dweight += g *"),
    "last row lost": ("live = rows < M", "live = rows < M - 1"),
    "every second tile lost": (
        "step = tl.num_programs(1) * BLOCK_M",
        "step = 2 * tl.num_programs(1) * BLOCK_M",
    ),
    "sums of each walk in one place": (
        "walker * N + cols, dweight, cols",
        "0 * N + cols, dweight, cols",
    ),
    "gradient's layout ignored": (
        "else dy.contiguous()",
        "else dy.T.contiguous().view_as(dy)",
    ),
}
ADD_FAULTS = {
    "residual left out": ("x += load(residual_ptr", "load(residual_ptr"),
    "residual's rows where x has them": (
        "rows * stride_rm",
        "rows * stride_xm",
    ),
    "norm of what is not stored": ("x = h.to(tl.float32)", "x = x * 1.0"),
    "gradient of h left out": (
        "dx += load(dh_ptr + rows",
        "load(dh_ptr + rows",
    ),
    "no gradient for the residual": (
        "return dx, dx if ctx.add else None",
        "return dx, dx * 0 if ctx.add else None",
    ),
}


@pytest.mark.parametrize("fault", FORWARD_FAULTS)
def test_a_mistake_in_the_forward_kernel_is_caught(fault, tmp_path):
    wrong = mutant(module, *FORWARD_FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        forward_checks(wrong.rmsnorm)


@pytest.mark.parametrize("fault", BACKWARD_FAULTS)
def test_a_mistake_in_the_backward_kernel_is_caught(fault, tmp_path):
    wrong = mutant(module, *BACKWARD_FAULTS[fault], tmp_path)
    wrong.programs_at_once = lambda *_: 3  # so that each walks on a GPU, too
    forward_checks(wrong.rmsnorm)
    x, weight, dy = matrices((29, 300))
    with pytest.raises(AssertionError):
        check_backward(wrong.rmsnorm, x, weight, dy.T.contiguous().T)


@pytest.mark.parametrize("fault", ADD_FAULTS)
def test_a_mistake_with_the_residual_is_caught(fault, tmp_path):
    wrong = mutant(module, *ADD_FAULTS[fault], tmp_path)
    x, weight, dy = (t.half() for t in strided())
    residual = normal((20, 90), torch.float16)[:, 3:84]
    check_add(add_rmsnorm, x, residual, weight, dy, dy.flip(0))
    with pytest.raises(AssertionError):
        check_add(wrong.add_rmsnorm, x, residual, weight, dy, dy.flip(0))


LONG_FAULTS = {
    "mean of its own part": ("% (SPLIT * CHUNKS)", "% CHUNKS"),
    "mean without the last chunk": (
        "last = (1 + SPLIT) * CHUNKS",
        "last = (1 + SPLIT) * CHUNKS - 1",
    ),
    "one chunk's sums added to another's": (
        "            dweight = dweight[1:]\n",
        "            dweight = (dweight[CHUNKS],) + dweight[1:CHUNKS]\n",
    ),
    "sums of the last row alone": ("sums += dy * normal", "sums = dy * normal"),
    "every second row lost": (
        "tl.range(walker, M, tl.num_programs(1)",
        "tl.range(walker, M, 2 * tl.num_programs(1)",
    ),
    "mean of normal rows, not normal": ("* rstd / N\n", "/ N\n"),
    "gradient of h left out": (
        "load(dh_ptr + offset + cols",
        "0 * load(dh_ptr + offset + cols",
    ),
}


@pytest.mark.parametrize("fault", LONG_FAULTS)
def test_a_mistake_with_long_rows_is_caught(fault, tmp_path):
    wrong = mutant(module, *LONG_FAULTS[fault], tmp_path)
    wrong.programs_at_once = lambda *_: 2
    wrong._bwd_tile = split
    x, weight, dy = matrices((5, LONG + 4295))
    with pytest.raises(AssertionError):
        check_add(wrong.add_rmsnorm, x, x.flip(0), weight, dy, dy.flip(0))


# What the compiler makes of the kernels

WIDTH = {"bf16": 2, "fp32": 4}


def compiled_forward(N, dtype, add):
    tile = _fwd_tile(N)
    pointers = ["x", "residual", "weight", "y", "h"]
    return compile_sm90a(
        f"{module.__name__}:_rmsnorm_fwd_kernel",
        {
            **{f"{n}_ptr": f"*{dtype}:16" for n in pointers},
            **{"rstd_ptr": "*fp32:16", "M": "i32", "eps": "fp32"},
            **{"stride_xm": "i32:16", "stride_rm": "i32:16"},
        },
        {
            **{"N": N, "ADD": add, "CAST_FIRST": False},
            **{n: tile[n] for n in ("BLOCK_M", "BLOCK_N")},
        },
        num_warps=tile["num_warps"],
    )


def compiled_backward(N, dtype, add):
    tile, _ = _bwd_tile(N, (3 + add) * WIDTH[dtype])
    long = "_long" if "SPLIT" in tile else ""
    kernel = f"_rmsnorm_bwd{long}_kernel"
    pointers = ["h", "weight", "dy", "dh", "dx"]
    return compile_sm90a(
        f"{module.__name__}:{kernel}",
        {
            **{f"{n}_ptr": f"*{dtype}:16" for n in pointers},
            **{"rstd_ptr": "*fp32:16", "dweight_ptr": "*fp32:16"},
            **{"stride_hm": "i32:16", "M": "i32"},
        },
        {
            **{"N": N, "ADD": add},
            **{n: v for n, v in tile.items() if n != "num_warps"},
        },
        num_warps=tile["num_warps"],
    )


def memory(kernel, name):
    """Instructions of that name by their width: {128: 8}."""
    found = {}
    for op, count in kernel.opcodes.items():
        if op.startswith(name):
            width = int(op.split(".")[-1]) if op[-1].isdigit() else 32
            found[width] = found.get(width, 0) + count
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("N", "dtype", "add"),
    [
        (1024, "bf16", False),
        (4096, "bf16", False),
        (4096, "fp32", True),
        (16384, "bf16", False),
        (MAX_COLS, "bf16", True),
        (MAX_COLS, "fp32", False),
    ],
)
def test_forward_fits_in_registers_and_moves_16_bytes_at_a_time(N, dtype, add):
    kernel = compiled_forward(N, dtype, add)
    assert kernel.spills == kernel.stack == 0
    # a row is stored once; 4 bytes hold its rstd
    stores, loads = memory(kernel, "STG"), memory(kernel, "LDG")
    tile = _fwd_tile(N)
    row = tile["BLOCK_M"] * tile["BLOCK_N"] * WIDTH[dtype]
    assert set(loads) == {128}
    assert set(stores) == {128, 32}
    assert 16 * kernel.threads * stores[128] == row * (1 + add)
    # and loaded twice, from memory and from L1, or beside its residual
    assert loads[128] >= 2 * stores[128] // (1 + add)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("N", "dtype", "add"),
    [
        (1024, "bf16", False),
        (4096, "bf16", True),
        (8192, "bf16", False),
        (12288, "bf16", False),
        (16384, "bf16", True),
        (16384, "fp32", True),
        (MAX_COLS, "bf16", False),
        (MAX_COLS, "bf16", True),
        (MAX_COLS, "fp32", False),
        (MAX_COLS, "fp32", True),
        (MAX_COLS - 4096, "bf16", False),
    ],
)
def test_backward_fits_in_registers(N, dtype, add):
    kernel = compiled_backward(N, dtype, add)
    tile, per_sm = _bwd_tile(N, (3 + add) * WIDTH[dtype])
    assert kernel.spills == kernel.stack == 0
    assert kernel.registers * kernel.threads * per_sm <= 65536
    assert kernel.shared * per_sm <= 227 * 1024
    # into shared memory where the loop is pipelined; 4 bytes hold a rstd
    loads = "LDGSTS" if tile.get("STAGES", 1) > 1 else "LDG."
    small = "SPLIT" in tile and add and dtype == "bf16"  # 4 elements a thread
    assert set(memory(kernel, "STG")) == ({64, 128} if small else {128})
    assert set(memory(kernel, loads)) == {64 if small else 128, 32}


# On a GPU


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    M = 2**31 // MAX_COLS + 3
    made = {"dtype": torch.bfloat16, "device": "cuda"}
    x = torch.empty(M, MAX_COLS, **made).normal_().requires_grad_()
    weight = normal((MAX_COLS,), torch.bfloat16).requires_grad_()
    ends = torch.tensor([0, 1, M // 2, M - 2, M - 1], device="cuda")
    y, h = add_rmsnorm(x, x.detach(), weight)
    check_forward(lambda *_: y[ends].detach(), h[ends].detach(), weight)
    dx, dweight = torch.autograd.grad(y, (x, weight), x.detach())
    rows = h.detach(), weight.detach(), x.detach()
    check_dx(lambda *_: dx[ends], rows[0][ends], rows[1], rows[2][ends])

    exact = torch.zeros(1, MAX_COLS, dtype=torch.float64, device="cuda")
    scale = exact.clone()
    for some, dy in zip(rows[0].split(2048), rows[2].split(2048), strict=True):
        some = some.double()
        rstd = torch.rsqrt(some.square().mean(dim=1, keepdim=True) + EPS)
        terms = some * rstd * dy.double()
        exact += terms.sum(dim=0)
        scale += terms.abs().sum(dim=0)
    bound = {"scale": scale, "steps": 8, "terms": M + MAX_COLS}
    assert_accurate(dweight[None], exact, torch.bfloat16, **bound)


@pytest.mark.gpu
def test_random_shapes_agree_with_float64():
    for _ in range(30):
        N = int(2 ** (15 * torch.rand(()).item()))
        M = int(torch.randint(1, 2000, ()))
        dtype = DTYPES[int(torch.randint(3, ()))]
        gap = int(torch.randint(9, ()))
        x, r, dy, dh = (normal((M, N + gap), dtype)[:, gap:] for _ in "xryh")
        weight = normal((N,), dtype)
        check_forward(rmsnorm, x, weight)
        check_backward(rmsnorm, x, weight, dy)
        check_add(add_rmsnorm, x, r, weight, dy, dh)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_are_equal_bit_for_bit(dtype):
    given = matrices((5000, 3000), dtype)
    first = [gradients(rmsnorm, wrt)(*given) for wrt in (0, 1)]
    for _ in range(20):
        assert torch.equal(gradients(rmsnorm, 0)(*given), first[0])
        assert torch.equal(gradients(rmsnorm, 1)(*given), first[1])


@pytest.mark.gpu
def test_inductor_compiles_it():
    x, weight, _ = matrices((64, 1000), torch.bfloat16)
    compiled = torch.compile(
        lambda x: rmsnorm(x + 1, weight) * 2, fullgraph=True
    )
    torch.testing.assert_close(compiled(x), rmsnorm(x + 1, weight) * 2)


@pytest.mark.multi_gpu
def test_runs_on_the_gpu_that_holds_the_matrix():
    x, weight, dy = (t.to("cuda:1") for t in matrices((4, 100)))
    check_forward(rmsnorm, x, weight)
    check_backward(rmsnorm, x, weight, dy)
