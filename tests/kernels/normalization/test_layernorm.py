"""LayerNorm is exact to rounding, also where the mean is large."""

import inspect
import math

import pytest
import torch
from aot import compile_sm90a
from kernel_checks import WRONG, assert_accurate, mutant, unit_roundoff
from torch.nn.functional import layer_norm

from warpmap import DEVICE
from warpmap.kernels.normalization import layernorm as module
from warpmap.kernels.normalization._rows import DTYPES, MAX_COLS
from warpmap.kernels.normalization.layernorm import (
    IN_REGISTERS,
    _bwd_tile,
    _fwd_tile,
    layernorm,
    layernorm_reference,
    naive_variance,
    welford_variance,
)

EPS = 1e-5
INF, NAN = float("inf"), float("nan")
# many rows a program and some left over; a full tile; padded, and rows enough
# for three walkers to come round again
SHAPES = [(1500, 7), (4, 256), (29, 300)]


def normal(shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def matrices(shape, dtype=torch.float32):
    """x, weight, bias and the gradient of y; a small row is among them."""
    x = normal(shape) + 2
    x[0] *= 1e-3
    weight, bias = normal((2, shape[1]), dtype)
    return x.to(dtype), weight + 1, bias, normal(shape, dtype)


def on_device(t):
    """The same shape and strides on the GPU, unless it is meant elsewhere."""
    if t.is_meta:
        return t
    made = {"dtype": t.dtype, "device": DEVICE}
    return torch.empty_strided(t.shape, t.stride(), **made).zero_()


def strided():
    """Rows that lie apart, and end where the next matrix begins."""
    x = normal((40, 200))[::2, 50:131]
    return x, *normal((2, 81)), normal((20, 81))


def parts(x):
    """Normal rows, 1 / deviation and |mean| in deviations, in float64."""
    x = x.double()
    centred = x - x.mean(dim=1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(dim=1, keepdim=True) + EPS)
    return centred * rstd, rstd, x.abs().mean(dim=1, keepdim=True) * rstd


def check_forward(op, x, weight, bias):
    """Against float64.

    The mean has a relative error, which is an absolute one of the result: as
    many deviations as the mean is from zero. That enters ``scale``, with what
    the bias may cancel. The variance feels it only squared.
    """
    N = x.shape[1:]
    wd, bd = weight.double(), bias.double()
    exact = layer_norm(x.double(), N, wd, bd, EPS)
    normal_rows, _, mean = parts(x)
    scale = (normal_rows.abs() + mean) * wd.abs() + bd.abs()
    steps, terms = 8, x.shape[1]
    if x.dtype != torch.float32:
        # the last rounding is of the result alone; the others, of float32,
        # are added to it as so many of the last
        float32 = (steps + 8 * math.sqrt(terms)) * unit_roundoff(torch.float32)
        scale = exact.abs() + float32 / unit_roundoff(x.dtype) * scale
    assert_accurate(
        op(x, weight, bias),
        exact,
        x.dtype,
        scale=scale,
        steps=steps,
        terms=terms,
        framework=layer_norm(x, N, weight, bias, EPS)
        if x.dtype == weight.dtype == torch.float32
        else None,
    )


def check_gradients(found, x, weight, bias, dy):
    """Gradients of x, weight and bias: each by what its sums add up."""
    normal_rows, rstd, mean = parts(x)
    dyd = dy.double()
    g = dyd * weight.double()
    mean_g = g.mean(dim=1, keepdim=True)
    mean_xg = (normal_rows * g).mean(dim=1, keepdim=True)
    about = normal_rows.abs() + mean
    scale = g.abs() + g.abs().mean(dim=1, keepdim=True)
    scale += about * (about * g.abs()).mean(dim=1, keepdim=True)
    dx, dweight, dbias = found
    assert_accurate(
        dx,
        rstd * (g - mean_g - normal_rows * mean_xg),
        x.dtype,
        scale=rstd * scale,
        steps=24,
        terms=x.shape[1],
    )
    for sums, terms, size in (
        (dweight, dyd * normal_rows, dyd.abs() * about),
        (dbias, dyd, dyd.abs()),
    ):
        assert_accurate(
            sums[None],
            terms.sum(dim=0, keepdim=True),
            weight.dtype,
            scale=size.sum(dim=0, keepdim=True),
            steps=8,
            terms=sum(x.shape),
        )


def gradients(op):
    """From a function of x, weight and bias, that of their gradients."""

    def found(x, weight, bias, dy):
        inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
        return torch.autograd.grad(op(*inputs), inputs, dy)

    return found


def check(op, x, weight, bias, dy):
    check_forward(op, x, weight, bias)
    check_gradients(gradients(op)(x, weight, bias, dy), x, weight, bias, dy)


def test_reference_agrees_with_torch_and_with_a_case_worked_by_hand():
    x, weight, bias = torch.randn(7, 33), torch.randn(33), torch.randn(33)
    torch.testing.assert_close(
        layernorm_reference(x, weight, bias),
        layer_norm(x, (33,), weight, bias, EPS),
    )
    # mean 4, distances -3, -1, 4 and 0: variance 6.5
    x, weight = torch.tensor([[1.0, 3, 8, 4]]), torch.tensor([1.0, 2, 1, 1])
    y = layernorm_reference(x, weight, torch.ones(4), eps=-6.25)
    torch.testing.assert_close(y, torch.tensor([[-5.0, -3.0, 9.0, 1.0]]))


# The variance


def test_the_naive_variance_fails_where_the_mean_is_large():
    x = torch.randn(8, 1000)
    exact = x.double().var(dim=1, correction=0)
    found = naive_variance(x).double()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)
    # 1e4 squared is 1e8, and float32 knows eight digits of that
    far = x + 1e4
    error = (naive_variance(far) - far.double().var(dim=1, correction=0)).abs()
    assert error.max() > 1
    assert naive_variance(x + 1e5).min() < 0


@pytest.mark.parametrize("mean", [0, 1e4, 1e5])
def test_welford_is_right_in_one_pass(mean):
    x = torch.randn(8, 1000) + mean
    exact = x.double().var(dim=1, correction=0)
    # as far off as the running mean is rounded: |mean| eps of deviation 1
    found = welford_variance(x).double()
    torch.testing.assert_close(found, exact, rtol=1e-5 + mean * 1e-7, atol=0)


@pytest.mark.parametrize("mean", [0, 1e4, 1e5])
def test_the_kernel_is_right_where_the_mean_is_large(mean):
    x, weight, bias, dy = matrices((4, 1000))
    check(layernorm, x + mean, weight, bias, dy)


def test_the_naive_variance_in_the_kernel_is_caught(tmp_path):
    old = "variance = tl.sum(total, axis=1, keep_dims=True) / N"
    new = "variance = tl.sum(x * x, axis=1, keep_dims=True) / N - mean * mean"
    wrong = mutant(module, old, new, tmp_path).layernorm
    x, weight, bias, _ = matrices((4, 1000))
    check_forward(wrong, x[1:] - 2, weight, bias)
    with pytest.raises(AssertionError):
        check_forward(wrong, x[1:] + 1e4, weight, bias)


# Shapes and dtypes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(shape, dtype):
    check(layernorm, *matrices(shape, dtype))


# the longest row in registers; one column more; chunks that are all full; two
# programs a row, one without its last chunk, and one with a column in it
@pytest.mark.parametrize(
    "N", [IN_REGISTERS, IN_REGISTERS + 1, 12288, 16385, 20481, MAX_COLS]
)
def test_rows_at_the_ends_of_chunks(N, monkeypatch):
    # one of the walkers comes round again
    monkeypatch.setattr(module, "programs_at_once", lambda *_: 4)
    check(layernorm, *matrices((3, N), torch.float16))


def test_long_rows_may_lie_apart():
    x = normal((4, 2 * IN_REGISTERS))[::2, 50 : 60 + IN_REGISTERS]
    check(layernorm, x, *normal((2, x.shape[1])), normal(x.shape))


def test_one_column_is_its_bias():
    x, weight, bias, dy = matrices((3, 1))
    assert torch.equal(layernorm(x, weight, bias), bias.expand(3, 1))
    dx, dweight, dbias = gradients(layernorm)(x, weight, bias, dy)
    # g - mean(g) is 0, or on a GPU, where the product in g and the difference
    # are one operation, what rounding cuts off g
    cut = unit_roundoff(torch.float32) * (dy * weight).abs()
    assert (dx.abs() <= 2 * EPS**-0.5 * cut).all()
    assert not dweight.any()
    torch.testing.assert_close(dbias, dy.sum(dim=0))


def test_parameters_may_have_another_dtype():
    x, weight, bias, dy = matrices((9, 50), torch.float16)
    check(layernorm, x, weight.float(), bias.float(), dy)


def test_rows_may_lie_apart():
    check(layernorm, *strided())
    x, weight, bias, dy = strided()
    check(layernorm, x[:1].expand(20, 81), weight, bias, dy)
    check(layernorm, x, weight, bias, dy.T.contiguous().T)
    check(layernorm, x, weight, bias, dy[:1, :1].expand(20, 81))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_empty(shape):
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    weight, bias = torch.ones(2, shape[1], device=DEVICE).requires_grad_()
    y = layernorm(x, weight, bias)
    dx, dweight, dbias = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert y.shape == dx.shape == shape
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dbias, torch.zeros_like(bias))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_what_is_not_finite_goes_where_torch_lets_it_go():
    rows = [[1, NAN, 3], [1, INF, 3], [1, -INF, INF], [2, 2, 2], [1, 2, 3]]
    x = torch.tensor(rows, device=DEVICE)
    weight, bias = torch.tensor([[1.0, 2, -1], [0, 1, 0]], device=DEVICE)
    expected = layer_norm(x, (3,), weight, bias, EPS)
    found = layernorm(x, weight, bias)
    # equal numbers: two units of their mean, 2, times weight / sqrt(EPS)
    bound = {"atol": 2 * 2**-22 * 2 * EPS**-0.5, "rtol": 1e-6}
    torch.testing.assert_close(found, expected, equal_nan=True, **bound)
    assert found.isnan().all(dim=1).tolist() == [True] * 3 + [False] * 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(4)}, r"x to be \(M, N\).*\(4,\)"),
        ({"x": torch.zeros(1, MAX_COLS + 1)}, f"at most {MAX_COLS}"),
        ({"x": torch.zeros(3, 2).T}, r"rows of x.*\(1, 2\)"),
        ({"x": torch.zeros(2, 3, device="meta")}, "x on.*meta"),
        ({"weight": torch.zeros(2, 3)}, r"weight to be \(3,\).*\(2, 3\)"),
        ({"bias": torch.zeros(4)}, r"bias to be \(3,\).*\(4,\)"),
        ({"bias": torch.zeros(3).half()}, "bias in torch.float16"),
        ({"x": torch.zeros(2, 3).int()}, "x in torch.int32"),
    ],
)
def test_bad_input_is_refused_by_name(changed, message):
    good = {"x": torch.zeros(2, 3)} | dict.fromkeys(
        ("weight", "bias"), torch.zeros(3)
    )
    given = {n: on_device(t) for n, t in (good | changed).items()}
    with pytest.raises(ValueError, match=message):
        layernorm(**given)


@pytest.mark.slow
def test_operators_are_registered_as_torch_wants_them():
    x, weight, bias, dy = matrices((3, 20))
    for t in (x, weight, bias):
        t.requires_grad_()
    op = torch.ops.warpmap.layernorm.default
    torch.library.opcheck(op, (x, weight, bias, EPS))
    one_a_row = torch.ones(3, 1, device=DEVICE)
    saved = x.detach(), weight.detach(), one_a_row, one_a_row
    op = torch.ops.warpmap.layernorm_backward.default
    torch.library.opcheck(op, (dy, *saved))


def test_compiles_with_its_gradient_in_one_graph():
    given = matrices((4, 9))

    def block(x, weight, bias):
        return layernorm(x * 2, weight, bias) ** 2

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        gradients(block)(*given), gradients(compiled)(*given), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_second_derivative_is_refused():
    x, weight, bias, _ = matrices((2, 3))
    x.requires_grad_()
    loss = layernorm(x, weight, bias).square().sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dx.sum().backward()


@pytest.mark.sanitize
def test_every_kernel_runs_at_its_edges():
    for shape in ((20, 90), (3, IN_REGISTERS + 1)):
        check(layernorm, *matrices(shape, torch.float16))


# Faults: the checks above must see every one


@pytest.mark.slow
@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_result_is_caught(fault):
    x, weight, bias, dy = matrices((4, 60))
    with pytest.raises(AssertionError):
        check_forward(WRONG[fault](layernorm), x, weight, bias)
    right = gradients(layernorm)
    correct = right(x, weight, bias, dy)
    for i in range(3):
        if (fault, i) == ("tail unmasked", 2):
            continue  # a sum down the columns has no tail
        found = list(correct)
        found[i] = WRONG[fault](lambda *args, i=i: right(*args)[i])(
            x, weight, bias, dy
        )
        with pytest.raises(AssertionError):
            check_gradients(found, x, weight, bias, dy)


FORWARD_FAULTS = {
    "padding counts as -mean": (
        "tl.where(mask, x - mean, 0.0)",
        "tl.where(cols < BLOCK_N, x - mean, 0.0)",
    ),
    "mean over the padding": (
        "    mean = tl.sum(total, axis=1, keep_dims=True) / N",
        "    mean = tl.sum(total, axis=1, keep_dims=True) / BLOCK_N",
    ),
    "one less than N": (
        "variance = tl.sum(total, axis=1, keep_dims=True) / N",
        "variance = tl.sum(total, axis=1, keep_dims=True) / (N - 1)",
    ),
    "eps left out": ("tl.rsqrt(variance + eps)", "tl.rsqrt(variance)"),
    "sum in float16": ("total = x if", "total = x.to(tl.float16) if"),
    "weight left out": ("normal * weight + bias", "normal + bias"),
    "bias left out": ("normal * weight + bias", "normal * weight"),
    "last column unwritten": (
        "normal * weight + bias, mask)",
        "normal * weight + bias, cols < N - 1)",
    ),
}
LONG_FORWARD_FAULTS = {
    "chunks not added up": ("else total + x", "else x"),
    "squares of the last chunk alone": ("else total + squares", "else squares"),
    "squares of one chunk for all": ("if CHUNKS > 1:", "if False:"),
    "same weight for each chunk": (
        "weight_ptr + cols + at",
        "weight_ptr + cols",
    ),
    "same bias for each chunk": ("bias_ptr + cols + at", "bias_ptr + cols"),
    "last chunk lost": (
        '"CHUNKS": triton.cdiv(N, BLOCK_N)',
        '"CHUNKS": N // BLOCK_N',
    ),
}
BACKWARD_FAULTS = {
    "mean of g left out": ("(g - mean_g -", "(g -"),
    "mean of x g left out": ("- normal * mean_xg)", ")"),
    "rstd left out": ("normal * mean_xg) * rstd", "normal * mean_xg)"),
    "sums swapped": (
        "dweight += dy * normal\n        dbias += dy\n",
        "dbias += dy * normal\n        dweight += dy\n",
    ),
    "last row lost": ("live = rows < M", "live = rows < M - 1"),
    "every second tile lost": (
        "step = tl.num_programs(1) * BLOCK_M",
        "step = 2 * tl.num_programs(1) * BLOCK_M",
    ),
    "sums of each walk in one place": ("walker * 2 * N", "0 * N"),
}
LONG_BACKWARD_FAULTS = {
    "means over its own part": ("tl.range(CHUNKS,", "tl.range(SPLIT * CHUNKS,"),
    "means over the other part": ("(1 + SPLIT) * CHUNKS", "SPLIT * CHUNKS"),
    "mean of g left out": ("(g - mean_g -", "(g -"),
    "mean of x g left out": ("- normal * mean_xg)", ")"),
    "deviation left out of a mean": ("* rstd / N", "/ N"),
    "sums of a chunk for another": ("sum_w = dweight[0]", "sum_w = dweight[1]"),
    "chunks swapped in the end": ("dbias[i]", "dbias[CHUNKS - 1 - i]"),
    "sums of this row alone": ("sum_b += dy", "sum_b = dy"),
    "sums swapped": (
        "dweight, dbias = dweight[1:], dbias[1:]",
        "dbias, dweight = dweight[1:], dbias[1:]",
    ),
    "each row in one place": ("M, tl.num_programs(1)", "M, 1"),
    "both own the first part": ("own = part *", "own = 0 *"),
    "last chunk lost": ("* BLOCK_N < N:", "* BLOCK_N < N - 1:"),
    "sums of each walk in one place": ("walker * 2 * N", "0 * N"),
}


def mutant_of(kernel, old, new, folder):
    """``mutant``, for code that stands in another kernel as well."""
    code = inspect.getsource(module).partition(f"def {kernel}(")[2]
    code = code.partition("\ndef ")[0]
    assert code.count(old) == 1
    return mutant(module, code, code.replace(old, new), folder)


@pytest.mark.parametrize("fault", FORWARD_FAULTS)
def test_a_mistake_in_the_forward_kernel_is_caught(fault, tmp_path):
    wrong = mutant(module, *FORWARD_FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        check_forward(wrong.layernorm, *matrices((5, 300))[:3])


@pytest.mark.parametrize("fault", LONG_FORWARD_FAULTS)
def test_a_mistake_with_the_chunks_of_a_row_is_caught(fault, tmp_path):
    wrong = mutant(module, *LONG_FORWARD_FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        check_forward(wrong.layernorm, *matrices((2, IN_REGISTERS + 1))[:3])


def check_wrong_gradients(wrong, x, weight, bias, dy):
    """Forward is right, backward is not."""
    check_forward(wrong.layernorm, x, weight, bias)
    found = gradients(wrong.layernorm)(x, weight, bias, dy)
    with pytest.raises(AssertionError):
        check_gradients(found, x, weight, bias, dy)


@pytest.mark.parametrize("fault", BACKWARD_FAULTS)
def test_a_mistake_in_the_backward_kernel_is_caught(fault, tmp_path):
    kernel = "_layernorm_bwd_kernel"
    wrong = mutant_of(kernel, *BACKWARD_FAULTS[fault], tmp_path)
    wrong.programs_at_once = lambda *_: 3  # so that each walks on a GPU, too
    check_wrong_gradients(wrong, *matrices((29, 300)))


@pytest.mark.parametrize("fault", LONG_BACKWARD_FAULTS)
def test_a_mistake_in_the_backward_kernel_of_long_rows_is_caught(
    fault, tmp_path
):
    kernel = "_layernorm_bwd_long_kernel"
    wrong = mutant_of(kernel, *LONG_BACKWARD_FAULTS[fault], tmp_path)
    wrong.programs_at_once = lambda *_: 4
    # six chunks for two programs, the last of one column
    check_wrong_gradients(wrong, *matrices((5, 20481)))


def test_a_gradient_with_its_layout_ignored_is_caught(tmp_path):
    old, new = "dy.contiguous()", "dy.T.contiguous().view_as(dy)"
    wrong = mutant(module, old, new, tmp_path)
    x, weight, bias, dy = matrices((29, 300))
    check_wrong_gradients(wrong, x, weight, bias, dy.T.contiguous().T)


# What the compiler makes of the kernels

WIDTH = {"bf16": 2, "fp32": 4}


def memory(kernel, name):
    """Widths in bits of the instructions of that name."""
    return {
        int(op.split(".")[-1]) if op[-1].isdigit() else 32
        for op in kernel.opcodes
        if op.startswith(name)
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("N", "dtype"),
    [
        (1024, "bf16"),
        (4096, "fp32"),
        (5120, "bf16"),
        (12288, "bf16"),
        (MAX_COLS, "bf16"),
    ],
)
def test_forward_fits_in_registers_and_moves_16_bytes_at_a_time(N, dtype):
    tile = _fwd_tile(N)
    kernel = compile_sm90a(
        f"{module.__name__}:_layernorm_fwd_kernel",
        {
            **{f"{n}_ptr": f"*{dtype}:16" for n in ("x", "weight", "bias")},
            **{"y_ptr": f"*{dtype}:16", "stride_xm": "i32:16", "M": "i32"},
            **{"mean_ptr": "*fp32:16", "rstd_ptr": "*fp32:16", "eps": "fp32"},
        },
        {"N": N, **{n: v for n, v in tile.items() if n != "num_warps"}},
        num_warps=tile["num_warps"],
    )
    assert kernel.spills == kernel.stack == 0
    assert memory(kernel, "LDG") == {128}
    assert memory(kernel, "STG") == {128, 32}  # mean and rstd: 4 bytes a row
    if N > IN_REGISTERS:
        # two programs on a multiprocessor: one loads while the other reduces
        assert 2 * kernel.registers * kernel.threads <= 65536


@pytest.mark.slow
@pytest.mark.parametrize(
    ("N", "dtype"),
    [
        (1024, "bf16"),
        (2880, "bf16"),
        (2880, "fp32"),
        (4096, "bf16"),
        (4096, "fp32"),
        (6144, "bf16"),
        (8192, "bf16"),
        (8192, "fp32"),
        (12288, "bf16"),
        (16384, "bf16"),
        (16384, "fp32"),
        (MAX_COLS, "bf16"),
    ],
)
def test_backward_fits_in_registers(N, dtype):
    tile, per_sm = _bwd_tile(N, WIDTH[dtype], WIDTH[dtype])
    long = "_long" if N > IN_REGISTERS else ""
    kernel = compile_sm90a(
        f"{module.__name__}:_layernorm_bwd{long}_kernel",
        {
            **{f"{n}_ptr": f"*{dtype}:16" for n in ("x", "weight", "dy", "dx")},
            **{f"{n}_ptr": "*fp32:16" for n in ("mean", "rstd", "sums")},
            **{"stride_xm": "i32:16", "M": "i32"},
        },
        {"N": N, **{n: v for n, v in tile.items() if n != "num_warps"}},
        num_warps=tile["num_warps"],
    )
    assert kernel.spills == kernel.stack == 0
    assert kernel.registers * kernel.threads * per_sm <= 65536
    assert kernel.shared * per_sm <= 227 * 1024
    assert memory(kernel, "STG") == {128}
    # into shared memory, for the rows to come; 4 bytes hold mean and rstd
    assert memory(kernel, "LDG" if long else "LDGSTS") == {128, 32}
    # most of it is left to the L1 cache where a row is read twice
    assert not long or kernel.shared <= 16 * 1024


# On a GPU


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    M = 2**31 // MAX_COLS + 3
    made = {"dtype": torch.bfloat16, "device": "cuda"}
    x = torch.empty(M, MAX_COLS, **made).normal_()
    weight, bias = normal((2, MAX_COLS), torch.bfloat16)
    ends = torch.tensor([0, 1, M // 2, M - 2, M - 1], device="cuda")
    y = layernorm(x, weight, bias)
    check_forward(lambda *_: y[ends], x[ends], weight, bias)

    dx, dweight, dbias = gradients(layernorm)(x, weight, bias, x)
    exact = torch.zeros(3, MAX_COLS, dtype=torch.float64, device="cuda")
    for rows in x.split(2048):
        normal_rows, _, _ = parts(rows)
        dyd = rows.double()
        terms = dyd * normal_rows
        exact += torch.stack([terms, terms.abs(), dyd]).sum(dim=1)
    bound = {"scale": exact[1:2], "steps": 8, "terms": M + MAX_COLS}
    assert_accurate(dweight[None], exact[:1], torch.bfloat16, **bound)
    assert_accurate(dbias[None], exact[2:], torch.bfloat16, **bound)
    few = x[ends]
    _, *sums = gradients(layernorm)(few, weight, bias, few)
    check_gradients((dx[ends], *sums), few, weight, bias, few)


@pytest.mark.gpu
def test_random_shapes_agree_with_float64():
    for _ in range(30):
        N = int(2 ** (1 + 14 * torch.rand(()).item()))
        M = int(torch.randint(1, 2000, ()))
        dtype = DTYPES[int(torch.randint(3, ()))]
        gap = int(torch.randint(9, ()))
        x, dy = (normal((M, N + gap), dtype)[:, gap:] for _ in "xy")
        check(layernorm, x, *normal((2, N), dtype), dy)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_are_equal_bit_for_bit(dtype):
    given = matrices((5000, 3000), dtype)
    first = gradients(layernorm)(*given)
    for _ in range(20):
        for a, b in zip(gradients(layernorm)(*given), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_inductor_compiles_it():
    x, weight, bias, _ = matrices((64, 1000), torch.bfloat16)

    def block(x):
        return layernorm(x + 1, weight, bias) * 2

    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.multi_gpu
def test_runs_on_the_gpu_that_holds_the_matrix():
    check(layernorm, *(t.to("cuda:1") for t in matrices((4, 100))))
