"""Softmax is exact to rounding, forward and backward, at every edge."""

import itertools

import pytest
import torch
from aot import compile_sm90a
from kernel_checks import WRONG, assert_accurate, mutant
from torch.utils._python_dispatch import TorchDispatchMode

from warpmap import DEVICE
from warpmap.kernels.normalization import softmax as module
from warpmap.kernels.normalization._rows import DTYPES
from warpmap.kernels.normalization.softmax import (
    IN_REGISTERS,
    ON_CHIP,
    _tile,
    softmax,
    softmax_reference,
)

# the longest rows that both directions hold on chip, and that forward does
LONG = {torch.bfloat16: ON_CHIP // 4, torch.float32: ON_CHIP // 8}
LONGEST = {torch.bfloat16: ON_CHIP // 2, torch.float32: ON_CHIP // 4}

# one element, many rows a program and some left over, padded, full; at the
# end of what is held in registers, on chip, and just beyond
SHAPES = [(1, 1), (300, 7), (5, 781)]
CASES = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
CASES += [
    ((2, N + more), dtype)
    for dtype in LONG
    for N in sorted({IN_REGISTERS, LONG[dtype], LONGEST[dtype]})
    for more in (0, 1)
]
INF, NAN = float("inf"), float("nan")


def normal(shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).mul(3).to(dtype)


def steps(x):
    """Float32 roundings in exp(x - max) / sum, by their sensitivity.

    exp(t) feels t with relative sensitivity |t|, and t has three roundings:
    the difference, log2(e), and the product of both, as GPUs raise 2 to it.
    It is felt above and below the line. Then two units for each exp2, for the
    reciprocal and for its product, and one for the sum's last; rows longer
    than a chip holds rescale their sums once a piece. Below t = -104 exp is 0.
    """
    t = (x - x.amax(dim=1, keepdim=True)).double().abs().clamp(max=104)
    return 6 * t.max().item() + 9 + 3 * (x.shape[1] // 4096 + 1)


def check_forward(op, x, beside_torch=True):
    exact = torch.softmax(x.double(), dim=1)
    assert_accurate(
        op(x),
        exact,
        x.dtype,
        steps=steps(x),
        terms=x.shape[1],
        framework=torch.softmax(x, dim=1) if beside_torch else None,
    )


def gradient(op):
    """From a function of x, the function of (x, dy) that gives dx."""

    def dx(x, dy):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(op(x), x, dy)[0]

    return dx


def check_backward(dx, x, dy, beside_torch=True):
    """Against float64; what is subtracted in dx = y (dy - sum y dy) counts.

    y is stored in between, so it has the relative error of a stored result.
    It appears twice, so ``stored`` is 3 with dx itself.
    """
    torch_softmax = gradient(lambda x: torch.softmax(x, dim=1))
    exact = torch_softmax(x.double(), dy.double())
    y = torch.softmax(x.double(), dim=1)
    y = y.clamp(min=torch.finfo(x.dtype).smallest_normal)
    both = dy.double().abs() + (y * dy.double().abs()).sum(1, keepdim=True)
    assert_accurate(
        dx(x, dy),
        exact,
        x.dtype,
        scale=y * both,
        stored=3,
        steps=2 * steps(x) + 4,
        terms=x.shape[1],
        framework=torch_softmax(x, dy) if beside_torch else None,
    )


def test_reference_agrees_with_torch_and_with_a_case_worked_by_hand():
    x = torch.randn(7, 33)
    torch.testing.assert_close(softmax_reference(x), torch.softmax(x, dim=1))
    by_hand = softmax_reference(torch.tensor([[1.0, 2.0, 5.0]]).log())
    torch.testing.assert_close(by_hand, torch.tensor([[0.125, 0.25, 0.625]]))


def test_steps_of_the_reference_move_8_mn_and_4_m_elements():
    moved = []

    class Meter(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            tensors = [t for t in (*args, out) if isinstance(t, torch.Tensor)]
            moved.append(sum(t.numel() for t in tensors))
            return out

    M, N = 6, 50
    x = torch.randn(M, N)
    with Meter():
        softmax_reference(x)
    assert sum(moved) == 8 * M * N + 4 * M
    assert len(moved) == 5


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_agrees_with_float64(shape, dtype):
    x, dy = normal(shape, dtype), normal(shape, dtype)
    check_forward(softmax, x)
    check_backward(gradient(softmax), x, dy)


def strided():
    """Rows that lie apart, and end where the next matrix begins."""
    return normal((40, 200))[::2, 50:131]


def test_rows_may_lie_apart():
    check_forward(softmax, strided())
    check_backward(gradient(softmax), strided(), strided())
    one_row_many_times = normal((1, 33)).expand(5, 33)
    check_forward(softmax, one_row_many_times)
    one_column = normal((4, 6))[:, ::6]
    check_forward(softmax, one_column)


def test_gradient_may_have_any_layout():
    x = normal((3, 5))
    check_backward(gradient(softmax), x, normal((5, 3)).T)
    check_backward(gradient(softmax), x, normal((1, 1)).expand(3, 5))


def test_large_logits_do_not_overflow():
    x = normal((4, 100))
    # these differences are exact, and PyTorch's exp is more exact than GPUs'
    # power of two: it is no match here, the bound is
    for large in (x + 3e4, -x - 1e30, x * 1000):
        check_forward(softmax, large, beside_torch=False)
        check_backward(gradient(softmax), large, x, beside_torch=False)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_empty(shape):
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    y = softmax(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_goes_where_torch_lets_it_go():
    lowest = torch.finfo(torch.float32).min  # as masks are made of
    rows = [
        [1, 2, NAN, 4, 5],
        [1, INF, 3, 4, 5],
        [NAN, -INF, -INF, -INF, -INF],
        [-INF, -INF, -INF, -INF, -INF],
        [-INF, 2, -INF, 2, -INF],
        [1, 2, lowest, 4, 5],
        [lowest, lowest, lowest, lowest, lowest],
    ]
    x = torch.tensor(rows, device=DEVICE)
    y, expected = softmax(x), torch.softmax(x, dim=1)
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert y.isnan().all(dim=1).tolist() == [True] * 4 + [False] * 3

    dy = torch.arange(35.0, device=DEVICE).view(7, 5)
    dx = gradient(softmax)(x, dy)
    expected = gradient(lambda x: torch.softmax(x, dim=1))(x, dy)
    torch.testing.assert_close(dx, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4), r"\(M, N\).*\(4,\)"),
        (torch.zeros(2, 3, 4), r"\(M, N\).*\(2, 3, 4\)"),
        (torch.zeros(2, 3, dtype=torch.float64), "float64"),
        (torch.zeros(2, 3, dtype=torch.int32), "int32"),
        (torch.zeros(2, 3, device="meta"), "on meta|got meta"),
        (torch.zeros(3, 2).T, r"strides \(1, 2\)"),
        (torch.zeros(3, 4)[:, ::2], r"strides \(4, 2\)"),
    ],
)
def test_bad_input_is_refused_by_name(x, message):
    if x.device.type != "meta":
        strides = x.stride()
        x = torch.empty_strided(
            x.shape, strides, dtype=x.dtype, device=DEVICE
        ).zero_()
    with pytest.raises(ValueError, match=message):
        softmax(x)


def test_operators_are_registered_as_torch_wants_them():
    x = normal((3, 20)).requires_grad_()
    ops = torch.ops.warpmap
    torch.library.opcheck(ops.softmax.default, (x,))
    y, dy = softmax(x).detach(), normal((3, 20))
    torch.library.opcheck(ops.softmax_backward.default, (y, dy))


def test_compiles_with_its_gradient_in_one_graph():
    def loss(x):
        return (softmax(x * 2) ** 2).sum()

    x = normal((4, 9))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    a, b = (gradient(f)(x, None) for f in (loss, compiled))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.sanitize
def test_every_kernel_runs_at_its_edges():
    small = [normal(shape, torch.bfloat16) for shape in ((3, 5), (300, 7))]
    for x in (*small, in_pieces()):
        dy = normal(x.shape, torch.bfloat16)
        check_forward(softmax, x)
        check_backward(gradient(softmax), x, dy)


def test_a_second_derivative_is_refused():
    x = normal((2, 3)).requires_grad_()
    (dx,) = torch.autograd.grad(softmax(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dx.sum().backward()


# Faults: the checks above must see every one


def in_pieces():
    """Rows of two pieces, the second a part of one; the first has the top."""
    x = normal((3, 20000), torch.bfloat16)
    x[:, 7] = 20
    return x


def forward_checks(op):
    check_forward(op, normal((5, 781)))
    check_forward(op, strided())


def backward_checks(dx):
    check_backward(dx, normal((5, 781)), normal((5, 781)))
    check_backward(dx, strided(), strided())


def test_the_kernel_passes_the_checks_that_faults_must_fail():
    forward_checks(softmax)
    check_forward(softmax, in_pieces())
    backward_checks(gradient(softmax))
    check_backward(gradient(softmax), in_pieces(), in_pieces())


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_result_is_caught(fault):
    with pytest.raises(AssertionError):
        forward_checks(WRONG[fault](softmax))
    with pytest.raises(AssertionError):
        backward_checks(WRONG[fault](gradient(softmax)))


FORWARD_FAULTS = {
    "padding takes part": ('pad = -float("inf")', "pad = 0.0"),
    "not divided by the sum": ("exps * scale, cols", "exps, cols"),
    "sum in float16": ("1 / tl.sum(sums,", "1 / tl.sum(sums.to(tl.float16),"),
    "two rows stored in one place": (
        "tl.store(y_ptrs",
        "tl.store(y_ptrs - rows % 2 * stride_ym",
    ),
    "last column unwritten": (
        "exps * scale, cols + at < N)",
        "exps * scale, cols + at < N - 1)",
    ),
}
BACKWARD_FAULTS = {
    "sum left out": ("y * (dy - mean), cols", "y * dy, cols"),
    "y left out of the sum": ("y * dy if i == 0", "dy if i == 0"),
    "sum in float16": (
        "mean = tl.sum(sums,",
        "mean = tl.sum(sums.to(tl.float16),",
    ),
    "gradient of the first row for all": (
        "rows * stride_dym",
        "rows * 0",
    ),
    "gradient's layout ignored": (
        "dy.contiguous()",
        "dy.T.contiguous().view_as(dy)",
    ),
}


@pytest.mark.parametrize("fault", FORWARD_FAULTS)
def test_a_mistake_in_the_forward_kernel_is_caught(fault, tmp_path):
    wrong = mutant(module, *FORWARD_FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        forward_checks(wrong.softmax)


@pytest.mark.parametrize("fault", BACKWARD_FAULTS)
def test_a_mistake_in_the_backward_kernel_is_caught(fault, tmp_path):
    wrong = mutant(module, *BACKWARD_FAULTS[fault], tmp_path)
    check_forward(wrong.softmax, strided())
    with pytest.raises(AssertionError):
        backward_checks(gradient(wrong.softmax))


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_leaving_out_the_max_is_caught_by_large_logits(tmp_path):
    wrong = mutant(module, "top = tl.max", "top = 0 * tl.max", tmp_path)
    check_forward(wrong.softmax, normal((2, 9)))
    with pytest.raises(AssertionError):
        check_forward(wrong.softmax, normal((2, 9)) * 1000, False)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_leaving_out_a_piece_is_caught(tmp_path):
    x = in_pieces()
    wrong = mutant(module, "exps if i == 0 else sums + exps", "exps", tmp_path)
    with pytest.raises(AssertionError):
        check_forward(wrong.softmax, x)
    wrong = mutant(
        module, "x if i == 0 else tl.maximum(tops, x)", "x", tmp_path
    )
    with pytest.raises(AssertionError):
        check_forward(wrong.softmax, x * 10)
    wrong = mutant(
        module, "y * dy if i == 0 else sums + y * dy", "y * dy", tmp_path
    )
    check_forward(wrong.softmax, x)
    with pytest.raises(AssertionError):
        check_backward(gradient(wrong.softmax), x, x)


# What the compiler makes of the kernels


SIZES = {"fp32": 4, "bf16": 2}


def compiled(direction, N, dtype):
    names = {"fwd": ["x", "y"], "bwd": ["y", "dy", "dx"]}[direction]
    tile = _tile(N, SIZES[dtype], direction == "bwd")
    whole = ":16" if N % 16 == 0 else ""
    return compile_sm90a(
        f"{module.__name__}:_softmax_{direction}_kernel",
        {
            **{f"{n}_ptr": f"*{dtype}:16" for n in names},
            **{f"stride_{n}m": "i32" + whole for n in names},
            **{"M": "i32", "N": "i32" + whole},
        },
        {name: tile[name] for name in ("BLOCK_M", "BLOCK_N", "PIECES")},
        num_warps=tile["num_warps"],
    )


# many rows a program; the longest in registers; then in pieces: the longest of
# each number of warps, and the longest of all
COMPILED = [("fwd", "bf16", 64), ("bwd", "bf16", 64)]
COMPILED += [
    (direction, dtype, IN_REGISTERS)
    for direction in ("fwd", "bwd")
    for dtype in SIZES
]
COMPILED += [("fwd", "bf16", N) for N in (24576, 49152, 65536)]
COMPILED += [("fwd", "fp32", N) for N in (24576, 32768)]
COMPILED += [("bwd", "bf16", 24576), ("bwd", "bf16", 32768)]
COMPILED += [("bwd", "fp32", 16384)]


@pytest.mark.slow
@pytest.mark.parametrize(("direction", "dtype", "N"), COMPILED)
def test_fits_in_registers_and_moves_16_bytes_at_a_time(direction, dtype, N):
    kernel = compiled(direction, N, dtype)
    assert kernel.spills == kernel.stack == 0
    # an element is stored once: the traffic that the page claims
    tile = _tile(N, SIZES[dtype], direction == "bwd")
    row = tile["BLOCK_M"] * tile["BLOCK_N"] * tile["PIECES"] * SIZES[dtype]
    stores = kernel.opcodes["STG.E.128"]
    assert 16 * kernel.threads * stores == row
    loads = {"fwd": 1, "bwd": 2}[direction] * stores
    global_memory = {
        op: n
        for op, n in kernel.opcodes.items()
        if op.startswith(("LDG.", "LDGSTS", "STG"))
    }
    if tile["PIECES"] == 1:
        assert global_memory == {"LDG.E.128": loads, "STG.E.128": stores}
    else:  # kept in L1 by the first reading, let go by the last
        again = {"LDG.E.128": loads} if direction == "fwd" else {}
        assert global_memory == {
            "LDG.E.EL.128": loads,
            **again,
            "LDG.E.EF.128": loads,
            "STG.E.128": stores,
        }
    # forward in 16 bits: one row loads while the other is added up
    rows = 2 if (direction, dtype) == ("fwd", "bf16") else 1
    registers = 8 * -(-kernel.registers // 8)  # given out by eights
    assert rows * kernel.threads * registers <= 65536


@pytest.mark.slow
@pytest.mark.parametrize(
    ("direction", "N"),
    [("fwd", N) for N in (8191, 24575, 49151, 65535)]
    + [("bwd", N) for N in (8191, 24575, 32767)],
)
def test_nor_do_rows_spill_whose_elements_are_loaded_one_by_one(direction, N):
    kernel = compiled(direction, N, "bf16")
    assert kernel.spills == kernel.stack == 0


def test_a_thread_never_holds_more_than_where_it_was_compiled():
    for dtype, longest in (("bf16", 65536), ("fp32", 32768)):
        for N, backward in itertools.product(range(1, longest + 1), (0, 1)):
            tile = _tile(N, SIZES[dtype], bool(backward))
            assert 1 <= tile["num_warps"] <= 32
            assert tile["PIECES"] * tile["BLOCK_N"] >= N
            elements = tile["BLOCK_M"] * tile["BLOCK_N"]
            most = 32 if dtype == "bf16" else 16
            assert elements <= most * 32 * tile["num_warps"]


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("N", [64, 16384, 65536])
@pytest.mark.parametrize("op", ["forward", "backward"])
def test_more_than_2_to_the_31_elements(op, N):
    M = 2**31 // N + 3
    x = torch.empty(M, N, dtype=torch.bfloat16, device="cuda")
    x.normal_()
    ends = torch.tensor([0, 1, M // 2, M - 2, M - 1], device="cuda")
    if op == "forward":
        y = softmax(x)
        check_forward(lambda _: y[ends], x[ends])
    else:
        dx = gradient(softmax)(x, x)
        check_backward(lambda *_: dx[ends], x[ends], x[ends])


@pytest.mark.gpu
def test_random_shapes_agree_with_float64():
    for _ in range(60):
        N = int(2 ** (17 * torch.rand(()).item()))
        M = int(torch.randint(1, 300, ()))
        dtype = DTYPES[int(torch.randint(3, ()))]
        gap = int(torch.randint(9, ()))
        x, dy = (normal((M, N + gap), dtype)[:, gap:] for _ in "xy")
        check_forward(softmax, x)
        check_backward(gradient(softmax), x, dy)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_are_equal_bit_for_bit(dtype):
    for N in (3000, 32768, 65536, 65544):
        x, dy = normal((1000, N), dtype), normal((1000, N), dtype)
        first = softmax(x), gradient(softmax)(x, dy)
        for _ in range(20):
            assert torch.equal(softmax(x), first[0])
            assert torch.equal(gradient(softmax)(x, dy), first[1])


@pytest.mark.gpu
def test_inductor_compiles_it():
    x = normal((64, 1000), torch.bfloat16)
    compiled = torch.compile(lambda x: softmax(x + 1) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(x), softmax(x + 1) * 2)


@pytest.mark.multi_gpu
def test_runs_on_the_gpu_that_holds_the_matrix():
    check_forward(softmax, normal((4, 100)).to("cuda:1"))
