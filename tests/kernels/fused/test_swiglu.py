"""Gated activations are exact to rounding, forward and backward."""

import pytest
import torch
from aot import compile_sm90a
from kernel_checks import WRONG, assert_accurate, mutant, unit_roundoff
from torch.utils._python_dispatch import TorchDispatchMode

from warpmap import DEVICE
from warpmap.kernels.fused import swiglu as module
from warpmap.kernels.fused.swiglu import (
    DTYPES,
    NUM_WARPS,
    _tile,
    swiglu,
    swiglu_packed,
    swiglu_reference,
)

ACTIVATIONS = ["silu", "gelu"]

# one element, short rows together and some left over, a full tile, a padded one
SHAPES = [(1, 1), (70, 20), (2, 3, 64), (3, 1024), (2, 1500)]


def normal(shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).mul(2).to(dtype)


def packed(gate, up, activation="silu"):
    """``swiglu_packed`` as a function of two tensors."""
    return swiglu_packed(torch.cat((gate, up), dim=-1), activation)


def bent(x, activation):
    """The ``z`` of ``x sigmoid(z)`` and its slope, in float64."""
    if activation == "silu":
        return x, torch.ones_like(x)
    c = 2 * (2 / torch.pi) ** 0.5
    return c * (x + 0.044715 * x**3), c * (1 + 3 * 0.044715 * x**2)


def steps(x, activation):
    """Float32 roundings, by their sensitivity.

    sigmoid(z) feels z with relative sensitivity |z| at most, and z has one
    rounding from log2(e) and, for GELU, six more. Then exp, sum, reciprocal,
    and four for the products and sums of the slope.
    """
    z, _ = bent(x.double(), activation)
    z = z.abs().clamp(max=104)  # beyond, sigmoid is 0 or 1
    return (2 if activation == "silu" else 8) * z.max().item() + 10


def exact(gate, up, activation):
    """In float64, as ``x sigmoid(z)``: PyTorch's 1 + tanh cancels."""
    gate, up = gate.double(), up.double()
    return gate * bent(gate, activation)[0].sigmoid() * up


def sigmoid(x, activation):
    """The sigmoid that a kernel rounds, as the scale of its errors.

    A GPU flushes it to zero below the smallest normal float32, and what it is
    multiplied by makes that larger. The floor is the number whose roundings,
    in float32 and of the result, are as large as what is flushed.
    """
    float32 = torch.finfo(torch.float32)
    roundings = unit_roundoff(x.dtype)
    roundings += steps(x, activation) * float32.eps / 2
    s = bent(x.double(), activation)[0].sigmoid()
    return s.clamp(min=float32.smallest_normal / roundings)


def check_forward(op, gate, up, activation="silu"):
    beside = None
    if activation == "silu":
        beside = swiglu_reference(gate.float(), up.float()).to(gate.dtype)
    assert_accurate(
        op(gate, up, activation),
        exact(gate, up, activation),
        gate.dtype,
        scale=(gate.double() * up).abs() * sigmoid(gate, activation),
        steps=steps(gate, activation),
        framework=beside,
    )


def gradients(op):
    """From a function, that of (gate, up, dy) which gives both gradients."""

    def both(gate, up, dy, activation="silu"):
        leaves = [t.detach().requires_grad_() for t in (gate, up)]
        return torch.autograd.grad(op(*leaves, activation), leaves, dy)

    return both


def check_backward(both, gate, up, dy, activation="silu"):
    """The slope is a sum: its terms' magnitudes are the scale."""
    right = gradients(exact)(*(t.double() for t in (gate, up, dy)), activation)
    x = gate.double()
    s, (_, dz) = sigmoid(gate, activation), bent(x, activation)
    slope = s + (x * s * dz).abs()
    scales = (dy.double() * up).abs() * slope, (dy.double() * x).abs() * s
    results = both(gate, up, dy, activation)
    for actual, yardstick, scale in zip(results, right, scales, strict=True):
        assert_accurate(
            actual,
            yardstick,
            gate.dtype,
            scale=scale,
            steps=2 * steps(gate, activation),
        )


def test_reference_agrees_with_its_formulas():
    gate, up = torch.randn(2, 50, dtype=torch.float64)
    for activation in ACTIVATIONS:
        torch.testing.assert_close(
            swiglu_reference(gate, up, activation), exact(gate, up, activation)
        )


def moved_by(f):
    """Elements that PyTorch's operators read and write."""
    moved = []

    class Meter(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            tensors = [t for t in (*args, out) if isinstance(t, torch.Tensor)]
            memory = [t.untyped_storage().data_ptr() for t in tensors]
            if memory[-1] not in memory[:-1]:  # a view moves nothing
                moved.append(sum(t.numel() for t in tensors))
            return out

    with Meter():
        f()
    return sum(moved)


def test_steps_move_5_elements_forward_and_9_backward():
    gate, up = (torch.randn(6, 50, requires_grad=True) for _ in range(2))
    dy = torch.randn(6, 50)
    assert moved_by(lambda: swiglu_reference(gate, up)) == 5 * 300
    y = swiglu_reference(gate, up)
    backward = moved_by(lambda: torch.autograd.grad(y, (gate, up), dy))
    assert backward == 9 * 300


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(shape, activation):
    gate, up, dy = (normal(shape) for _ in range(3))
    for op in (swiglu, packed):
        check_forward(op, gate, up, activation)
        check_backward(gradients(op), gate, up, dy, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_rounded_once(dtype, activation):
    gate, up, dy = (normal((2, 70), dtype) for _ in range(3))
    check_forward(swiglu, gate, up, activation)
    check_backward(gradients(packed), gate, up, dy, activation)


def strided():
    """Rows that lie apart, and end where the next matrix begins."""
    return normal((10, 200))[::2, 50:131], normal((5, 300))[:, 7:88]


def test_rows_may_lie_apart():
    gate, up = strided()
    check_forward(swiglu, gate, up)
    check_backward(gradients(swiglu), gate, up, normal((81, 5)).T)
    check_backward(gradients(swiglu), gate, up, normal((1, 1)).expand(5, 81))
    one_row_many_times = normal((1, 33)).expand(5, 33)
    check_forward(swiglu, one_row_many_times, normal((5, 33)))
    x = normal((3, 4, 100))[..., 10:80]
    gate, up = x.chunk(2, dim=-1)
    assert torch.equal(swiglu_packed(x), swiglu(gate, up))
    swapped = normal((4, 3, 40)).transpose(0, 1)  # rows of no one stride
    check_forward(swiglu, swapped, normal((3, 4, 40)))
    check_forward(swiglu, normal(7), normal(7))


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_large_gates_neither_overflow_nor_vanish():
    gate = torch.tensor([-1e4, -90.0, -30.0, 0.0, 30.0, 1e4], device=DEVICE)
    up, dy = torch.full_like(gate, 3), torch.ones_like(gate)
    for activation in ACTIVATIONS:
        y = swiglu(gate, up, activation)
        expected = swiglu_reference(gate, up, activation)
        torch.testing.assert_close(y, expected)
        both = gradients(swiglu)(gate, up, dy, activation)
        right = gradients(swiglu_reference)(gate, up, dy, activation)
        torch.testing.assert_close(both, right)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 4)], ids=str)
def test_empty(shape):
    gate, up = (torch.empty(shape, device=DEVICE) for _ in range(2))
    for op in (swiglu, packed):
        for d in gradients(op)(gate, up, torch.empty(shape, device=DEVICE)):
            assert d.shape == shape


@pytest.mark.parametrize(
    ("gate", "up", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), r"\(2, 3\), \(2, 4\)"),
        (torch.zeros(()), torch.zeros(()), r"one shape, got \[\(\), \(\)\]"),
        (torch.zeros(2).double(), torch.zeros(2).double(), "gate.*float64"),
        (torch.zeros(2), torch.zeros(2).half(), "up.*float16"),
        (torch.zeros(2), torch.zeros(2, device="meta"), "up on.*meta"),
        (torch.zeros(3, 2), torch.zeros(2, 3).T, r"up.*strides \(1, 3\)"),
    ],
)
def test_bad_input_is_refused_by_name(gate, up, message):
    gate, up = (t if t.is_meta else t.to(DEVICE) for t in (gate, up))
    with pytest.raises(ValueError, match=message):
        swiglu(gate, up)


def test_an_unknown_activation_and_odd_halves_are_refused():
    x = normal((2, 6))
    with pytest.raises(ValueError, match="'silu' or 'gelu', got 'relu'"):
        swiglu(x, x, "relu")
    with pytest.raises(ValueError, match=r"\(..., 2 F\), got \(2, 5\)"):
        swiglu_packed(normal((2, 5)))


def kept(f, *inputs):
    """Elements that autograd keeps for backward."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        f(*inputs)
    return sum(sizes)


def test_two_tensors_are_kept_where_the_steps_keep_three():
    gate, up = (normal((4, 8)).requires_grad_() for _ in range(2))
    assert kept(swiglu_reference, gate, up) == 3 * 32
    assert kept(swiglu, gate, up) == 2 * 32
    assert kept(swiglu_packed, normal((4, 16)).requires_grad_()) == 2 * 32


def test_operators_are_registered_as_torch_wants_them():
    gate, up = (normal((3, 20)).requires_grad_() for _ in range(2))
    x, dy = normal((3, 40)).requires_grad_(), normal((3, 20))
    ops = torch.ops.warpmap
    torch.library.opcheck(ops.swiglu.default, (gate, up, "silu"))
    torch.library.opcheck(ops.swiglu_packed.default, (x, "gelu"))
    gate, up, x = (t.detach() for t in (gate, up, x))
    for op, args in (
        (ops.swiglu_backward.default, (gate, up, dy, "silu")),
        (ops.swiglu_packed_backward.default, (x, dy, "silu")),
    ):
        torch.library.opcheck(
            op, args, test_utils=("test_schema", "test_faketensor")
        )


def test_compiles_with_its_gradient_in_one_graph():
    def loss(x):
        gate, up = (x * 2).chunk(2, dim=-1)
        return (swiglu(gate, up) * swiglu_packed(x, "gelu")).sum()

    x = normal((4, 18)).requires_grad_()
    fast = torch.compile(loss, fullgraph=True, backend="aot_eager")
    a, b = (torch.autograd.grad(f(x), x) for f in (loss, fast))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_second_derivative_is_refused():
    gate, up = (normal((2, 3)).requires_grad_() for _ in range(2))
    (d,) = torch.autograd.grad(
        swiglu(gate, up).square().sum(), gate, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no autograd formula"):
        d.sum().backward()


@pytest.mark.sanitize
def test_every_kernel_runs_at_its_edges():
    for activation in ACTIVATIONS:
        for shape in ((3, 5), (70, 20), (3, 1500)):
            gate, up, dy = (normal(shape, torch.bfloat16) for _ in range(3))
            check_forward(packed, gate, up, activation)
            check_backward(gradients(packed), gate, up, dy, activation)


# Faults: the checks above must see every one


def forward_checks(op):
    for activation in ACTIVATIONS:
        check_forward(op, normal((70, 20)), normal((70, 20)), activation)
    check_forward(op, *strided())


def backward_checks(both):
    for activation in ACTIVATIONS:
        tensors = (normal((70, 20)) for _ in range(3))
        check_backward(both, *tensors, activation)
    check_backward(both, *strided(), normal((5, 81)))


def test_the_kernel_passes_the_checks_that_faults_must_fail():
    forward_checks(swiglu)
    forward_checks(packed)
    backward_checks(gradients(swiglu))
    backward_checks(gradients(packed))


# zeros past the end are no mistake here: no element feels another
@pytest.mark.parametrize("fault", sorted(WRONG.keys() - {"tail unmasked"}))
def test_a_wrong_result_is_caught(fault):
    gate, up, dy = (normal((70, 20)) for _ in range(3))
    with pytest.raises(AssertionError):
        check_forward(lambda g, u, _: WRONG[fault](swiglu)(g, u), gate, up)
    for i in (0, 1):

        def wrong(*args, i=i):
            both = gradients(swiglu)
            results = list(both(*args))
            one = WRONG[fault](lambda *tensors: both(*tensors)[i])
            results[i] = one(*args[:3])
            return results

        with pytest.raises(AssertionError):
            check_backward(wrong, gate, up, dy)


FORWARD_FAULTS = {
    "up left out": ("act * up, mask)", "act, mask)"),
    "in half precision": (
        "s = tl.sigmoid(z)",
        "s = tl.sigmoid(z).to(tl.float16)",
    ),
    "a wrong digit of GELU": (
        "TWO_SQRT_2_OVER_PI * (x + 0.044715",
        "TWO_SQRT_2_OVER_PI * (x + 0.04475",
    ),
    "the last rows forgotten": ("tl.cdiv(N, BLOCK_N)\n    # 64", "2\n    # 64"),
    "last column unwritten": ("cols, cols < N", "cols, cols < N - 1"),
    "strides taken for one": (
        "rows * stride_y + cols, act",
        "rows * (stride_y - 1) + cols, act",
    ),
}
BACKWARD_FAULTS = {
    "slope of a plain sigmoid": (
        "s + x * s * (1 - s) * dz",
        "s * (1 - s) * dz",
    ),
    "dz left out": ("(1 - s) * dz", "(1 - s)"),
    "slope without up": ("dy * up * slope", "dy * slope"),
    "gradients swapped": ("dy * up * slope, mask", "dy * act, mask"),
    "dy left out": ("dy * act, mask", "act, mask"),
    "gradient's layout ignored": (
        "up, dy, dgate, dup))",
        "up, dy.T.contiguous().view_as(dy), dgate, dup))",
    ),
}


@pytest.mark.parametrize("fault", FORWARD_FAULTS)
def test_a_mistake_in_the_forward_kernel_is_caught(fault, tmp_path):
    wrong = mutant(module, *FORWARD_FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        forward_checks(wrong.swiglu)


@pytest.mark.parametrize("fault", BACKWARD_FAULTS)
def test_a_mistake_in_the_backward_kernel_is_caught(fault, tmp_path):
    wrong = mutant(module, *BACKWARD_FAULTS[fault], tmp_path)
    forward_checks(wrong.swiglu)
    with pytest.raises(AssertionError):
        backward_checks(gradients(wrong.swiglu))


def test_halves_swapped_are_caught(tmp_path):
    order = "dgate, dup = _matrix(dx).tensor_split(2, dim=1)"
    wrong = mutant(
        module, order, order.replace("dgate, dup", "dup, dgate"), tmp_path
    )

    def both_packed(gate, up, activation):
        return wrong.swiglu_packed(torch.cat((gate, up), -1), activation)

    forward_checks(both_packed)
    with pytest.raises(AssertionError):
        backward_checks(gradients(both_packed))


def flushing(below, folder):
    """The kernel, its sigmoid flushed to zero below some number."""
    right = "s = tl.sigmoid(z)"
    flushed = f"{right}\n    s = tl.where(s < {below}, 0.0, s)"
    return mutant(module, right, flushed, folder).swiglu


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_what_a_gpu_flushes_may_be_flushed(dtype, tmp_path):
    gate = torch.linspace(-11, -8, 900, device=DEVICE).view(3, 300).to(dtype)
    up = torch.full_like(gate, 8)
    smallest = torch.finfo(torch.float32).smallest_normal
    for below, allowed in ((smallest, True), (100 * smallest, False)):
        op = flushing(below, tmp_path)
        for check in (
            lambda op=op: check_forward(op, gate, up, "gelu"),
            lambda op=op: check_backward(gradients(op), gate, up, up, "gelu"),
        ):
            if allowed:
                check()
            else:
                with pytest.raises(AssertionError):
                    check()


# What the compiler makes of the kernels


@pytest.mark.parametrize(
    ("direction", "dtype", "activation", "N"),
    [
        ("fwd", "bf16", "silu", 14336),
        ("bwd", "bf16", "gelu", 64),
        ("bwd", "fp32", "gelu", 14336),
    ],
)
def test_fits_in_registers_and_moves_16_bytes_at_a_time(
    direction, dtype, activation, N
):
    forward = direction == "fwd"
    names = ["gate", "up", "y"]
    if not forward:
        names[2:] = ["dy", "dgate", "dup"]
    BLOCK_M, BLOCK_N = _tile(N)
    kernel = compile_sm90a(
        f"{module.__name__}:_swiglu_{direction}_kernel",
        {
            **{f"{name}_ptr": f"*{dtype}:16" for name in names},
            **{f"stride_{name}": "i32:16" for name in names},
            **{"M": "i32", "N": "i32:16"},
        },
        {"ACTIVATION": activation, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N},
        num_warps=NUM_WARPS,
    )
    assert kernel.spills == kernel.stack == kernel.shared == 0
    packs = {"bf16": 1, "fp32": 2}[dtype]  # of 8 elements a thread
    global_memory = {
        op: n
        for op, n in kernel.opcodes.items()
        if op.startswith(("LDG.", "STG"))
    }
    assert global_memory == {
        "LDG.E.128": packs * (2 if forward else 3),
        "STG.E.128": packs * (1 if forward else 2),
    }
    # all the threads that a multiprocessor can hold, or three quarters
    assert kernel.registers <= 40


# On a GPU


@pytest.mark.gpu
def test_random_shapes_agree_with_float64():
    for _ in range(40):
        M = int(torch.randint(1, 300, ()))
        N = int(2 ** (15 * torch.rand(()).item()))
        dtype = DTYPES[int(torch.randint(3, ()))]
        gap = int(torch.randint(9, ()))
        activation = ACTIVATIONS[int(torch.randint(2, ()))]
        tensors = [normal((M, N + gap), dtype)[:, gap:] for _ in range(3)]
        for op in (swiglu, packed):
            check_forward(op, *tensors[:2], activation)
            check_backward(gradients(op), *tensors, activation)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    N = 14336
    M = 2**31 // N + 3
    x = torch.empty(M, 2 * N, dtype=torch.bfloat16, device="cuda").normal_()
    x.requires_grad_()
    y = swiglu_packed(x)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    ends = torch.tensor([0, 1, M // 2, M - 2, M - 1], device="cuda")
    gate, up = x.detach()[ends].chunk(2, dim=-1)
    check_forward(lambda *_: y.detach()[ends], gate, up)
    check_backward(
        lambda *_: dx[ends].chunk(2, dim=-1), gate, up, y.detach()[ends]
    )


@pytest.mark.gpu
def test_runs_are_equal_bit_for_bit():
    gate, up, dy = (normal((1000, 3000), torch.bfloat16) for _ in range(3))
    first = swiglu(gate, up), *gradients(swiglu)(gate, up, dy)
    for _ in range(20):
        again = swiglu(gate, up), *gradients(swiglu)(gate, up, dy)
        assert all(map(torch.equal, first, again))


@pytest.mark.gpu
def test_inductor_compiles_it():
    gate, up = (normal((64, 1000), torch.bfloat16) for _ in range(2))
    fast = torch.compile(lambda a, b: swiglu(a + 1, b) * 2, fullgraph=True)
    torch.testing.assert_close(fast(gate, up), swiglu(gate + 1, up) * 2)


@pytest.mark.multi_gpu
def test_runs_on_the_gpu_that_holds_the_gate():
    gate, up = (normal((4, 100)).to("cuda:1") for _ in range(2))
    check_forward(swiglu, gate, up)
