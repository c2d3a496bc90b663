"""One kernel equals its chain in float64, and the counter what really moves."""

import functools
import math

import pytest
import torch
from aot import compile_sm90a
from kernel_checks import WRONG, assert_accurate, mutant
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from warpmap import DEVICE
from warpmap.kernels.fused import _fusion_cost as cost
from warpmap.kernels.fused import kernel_fusion as module
from warpmap.kernels.fused._fusion_cost import (
    CHAINS,
    GPUS,
    KEPT,
    LAUNCHES,
    Op,
    fusion_chart,
    fusion_gain,
    tensors_moved,
)
from warpmap.kernels.fused.kernel_fusion import (
    DTYPES,
    NUM_WARPS,
    PROGRAMS_PER_SM,
    _tile,
    bias_gelu_add,
    bias_gelu_add_reference,
)

# one, a row and a part of a tile, odd, two strips, many short rows
SHAPES = [(1, 1), (3, 64), (5, 781), (3, 1100), (150, 16), (2, 3, 24)]


def normal(shape, dtype=torch.float32, size=1.2):
    return torch.randn(shape, device=DEVICE).mul(size).to(dtype)


def inputs(shape, dtype=torch.float32):
    return (
        normal(shape, dtype),
        normal(shape[-1:], dtype),
        normal(shape, dtype),
    )


def flat(x):
    return x.reshape(-1, x.shape[-1])


def wide(*tensors):
    return [t.detach().double().clone() for t in tensors]


def exact_chain(x, bias, residual):
    """1 + tanh(u) would cancel where u is far below zero; this does not."""
    h, _, s, _ = parts(x, bias)
    return h * s + residual


def parts(x, bias):
    """Of the chain in float64: h, t, sigmoid(t) and the slope of t."""
    h = x + bias
    t = 2 * math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)
    slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * h**2)
    return h, t, torch.sigmoid(t), slope


def derivatives(x, bias):
    """The first and the second one of GELU, by autograd."""
    h = (x + bias).requires_grad_()
    y = exact_chain(h, torch.zeros_like(bias), torch.zeros_like(h))
    (first,) = torch.autograd.grad(y.sum(), h, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), h)
    return first.detach(), second


def check_forward(op, x, bias, residual):
    """The sum x + bias may cancel, and the sigmoid feels t relatively."""
    y, (wx, wb, wr) = op(x, bias, residual), wide(x, bias, residual)
    exact = exact_chain(wx, wb, wr)
    h, t, s, _ = parts(wx, wb)
    first, _ = derivatives(wx, wb)
    scale = (h * s).abs() * (1 + t.abs() * (1 - s)) + wr.abs()
    scale += (wx.abs() + wb.abs()) * first.abs()
    assert y.shape == x.shape
    assert_accurate(flat(y), flat(exact), x.dtype, scale=flat(scale), steps=16)


def gradient(op):
    """From a function of inputs, the function of (*inputs, dy)."""

    def backward(*given):
        *inputs, dy = given
        inputs = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(op(*inputs), inputs, dy)

    return backward


def check_backward(grads, x, bias, residual, dy):
    """1 - sigmoid(t) may cancel: an error of 1 before it is multiplied.

    In 16 bits that, at most 4000 roundings of float32 for |h| < 9, is less
    than the rounding of the result, and of the size of dy.
    """
    dx, dbias, dresidual = grads(x, bias, residual, dy)
    wx, wb, wr, wdy = wide(x, bias, residual, dy)
    exact = gradient(exact_chain)(wx, wb, wr, wdy)
    torch.testing.assert_close(dresidual, dy, rtol=0, atol=0)
    assert dx.shape == x.shape
    h, t, s, slope = parts(wx, wb)
    _, second = derivatives(wx, wb)
    felt = t.abs() * (1 - s)
    scale = s * (1 + h.abs() * (1 - s) * slope) * (1 + felt)
    scale += s * h.abs() * slope * (1 + s * felt)
    scale += (wx.abs() + wb.abs()) * second.abs()
    scale *= wdy.abs()
    if x.dtype == torch.float32:
        assert_accurate(
            flat(dx), flat(exact[0]), x.dtype, scale=flat(scale), steps=16
        )
    else:
        assert h.abs().max() < 9
        assert_accurate(
            flat(dx),
            flat(exact[0]),
            x.dtype,
            scale=flat(torch.maximum(exact[0].abs(), wdy.abs())),
            steps=4000,
        )
    assert_accurate(
        dbias[None],
        exact[1][None],
        bias.dtype,
        # what is stored is no larger than the sum of magnitudes
        scale=flat(scale if x.dtype == torch.float32 else wdy.abs() * 1.2)
        .sum(dim=0, keepdim=True)
        .clamp(min=1e-30),
        steps=16 if x.dtype == torch.float32 else 4000,
        terms=wx.numel() // wx.shape[-1],
    )


# The kernel


def test_the_reference_is_the_formula():
    x, bias, residual = wide(*inputs((5, 7)))
    h = x + bias
    u = math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)
    formula = h * (1 + torch.tanh(u)) / 2 + residual
    for f in (bias_gelu_add_reference, exact_chain):
        torch.testing.assert_close(f(x, bias, residual), formula)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, torch.float32) for shape in SHAPES]
    + [((5, 781), dtype) for dtype in DTYPES[1:]],
    ids=str,
)
def test_agrees_with_float64(shape, dtype):
    x, bias, residual = inputs(shape, dtype)
    check_forward(bias_gelu_add, x, bias, residual)
    dy = normal(shape, dtype)
    check_backward(gradient(bias_gelu_add), x, bias, residual, dy)


def test_rounds_once_where_the_chain_rounds_three_times():
    x, bias, residual = inputs((40, 512), torch.float16)
    exact = bias_gelu_add_reference(*wide(x, bias, residual))
    best = (exact.half().double() - exact).abs()
    ours, chain = (
        ((f(x, bias, residual).double() - exact).abs() > best).double().mean()
        for f in (bias_gelu_add, bias_gelu_add_reference)
    )
    assert ours < 0.01
    assert chain > 0.2


def layouts():
    return {
        "rows apart": normal((6, 64))[:, 3:43],
        "every second row": normal((12, 40))[::2],
        "every second column": normal((6, 80))[:, ::2],
        "transposed": normal((40, 6)).T,
        "one row": normal((1, 40)).expand(6, 40),
        "one number": normal(()).expand(6, 40),
        "odd address": normal(241)[1:].view(6, 40),
    }


@pytest.mark.parametrize("layout", layouts())
def test_every_layout(layout):
    x, bias = layouts()[layout], normal(80)[::2]
    other = normal((6, 40))
    check_forward(bias_gelu_add, x, bias, other)
    check_forward(bias_gelu_add, other, bias, x)
    check_backward(gradient(bias_gelu_add), other, bias, other, x)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,)], ids=str)
def test_empty(shape):
    given = [x.requires_grad_() for x in inputs(shape)]
    bias_gelu_add(*given).sum().backward()
    for x in given:
        torch.testing.assert_close(x.grad, torch.zeros_like(x.grad))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_far_from_zero_it_is_zero_or_the_sum_itself():
    x = torch.tensor([-1e4, -30.0, 30.0, 1e4], device=DEVICE)
    zero = torch.zeros_like(x)
    y = bias_gelu_add(x, zero, zero)
    torch.testing.assert_close(y, x.clamp(min=0), rtol=0, atol=0)
    dx, _, _ = gradient(bias_gelu_add)(x, zero, zero, zero + 1)
    torch.testing.assert_close(dx, (x > 0).float())


def test_is_an_operator_as_torch_wants_them():
    given = [x.requires_grad_() for x in inputs((3, 40))]
    torch.library.opcheck(module._bias_gelu_add, tuple(given))
    x, bias, dy = inputs((3, 40))
    torch.library.opcheck(
        module._bias_gelu_add_backward,
        (x, bias, dy),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles_without_a_break():
    given = inputs((3, 40))

    def block(x, bias, residual):
        return bias_gelu_add(x * 2, bias, residual) + 1

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    dy = normal((3, 40))
    for f in (lambda op: op(*given), lambda op: gradient(op)(*given, dy)):
        torch.testing.assert_close(f(compiled), f(block), rtol=0, atol=0)


BAD = {
    "float64": ("one dtype", lambda x, b, r: (x.double(), b, r)),
    "two dtypes": ("one dtype", lambda x, b, r: (x, b.half(), r)),
    "a bias too long": ("bias (N,)", lambda x, b, r: (x, x[0, :3], r)),
    "a residual to broadcast": ("residual", lambda x, b, r: (x, b, r[:1])),
    "on another device": ("device", lambda x, b, r: (x, b, r.to("meta"))),
    "a number": ("bias (N,)", lambda x, b, r: (b[0], b, b[0])),
}


@pytest.mark.parametrize("bad", BAD)
def test_refuses(bad):
    message, spoil = BAD[bad]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")[:8]):
        bias_gelu_add(*spoil(*inputs((3, 40))))


@pytest.mark.sanitize
def test_every_kernel():
    x, bias, residual = inputs((5, 1100))
    check_forward(bias_gelu_add, x, bias, residual)
    check_backward(gradient(bias_gelu_add), x, bias, residual, x)


# Faults: the checks above must see every one


def all_checks(op):
    # more tiles than walkers; a tile of several rows, half of them beyond
    turns, (BLOCK_M, _) = 11 * module._sms(normal(1)), _tile(40)
    for M, N in ((turns, 1100), (BLOCK_M + BLOCK_M // 2, 40)):
        # pieces of something larger: a wrong kernel may read beyond their ends
        x = normal((M + 2, N + 100))[1:-1, :N]
        residual, bias = normal((M, N + 200))[:, :N], normal(2048)[:N]
        check_forward(op, x, bias, residual)
        check_backward(gradient(op), x, bias, residual, residual)


def test_the_kernel_passes_the_checks_that_faults_must_fail():
    all_checks(bias_gelu_add)


@pytest.mark.parametrize("fault", sorted({*WRONG} - {"tail unmasked"}))
def test_a_wrong_result_is_caught(fault):
    x, bias, residual = inputs((3, 501))
    with pytest.raises(AssertionError):
        check_forward(WRONG[fault](bias_gelu_add), x, bias, residual)


FAULTS = {
    "no cubic term": ("h * h * h * CUBIC", "0.0"),
    "the exact GELU's scale": ("math.sqrt(2 / math.pi)", "0.8511"),
    "residual left out": ("h * _gate(h) + r,", "h * _gate(h),"),
    "residual's rows at x's stride": ("rows * stride_rm", "rows * stride_xm"),
    "bias of the first strip": (
        "bias_ptr + cols, cols < N).to(tl.float32)\n    h = x",
        "bias_ptr + cols % BLOCK_N, cols < N).to(tl.float32)\n    h = x",
    ),
    "last row lost": (
        "(cols < N)\n\n",
        "(cols < N) & (rows < M - 1)\n\n",
    ),
    "bias left out of the gradient": (
        "h = x.to(tl.float32) + bias",
        "h = x.to(tl.float32)",
    ),
    "slope without its cube": ("(1 + h * h * (3 * CUBIC))", "1.0"),
    "gate not times its complement": ("h * (1 - gate) * slope", "h * slope"),
    "one tile a walker": ("turn * walkers + walker", "walker"),
    "sums of the last tile alone": ("sums += dx", "sums = dx"),
    "rows beyond the end summed": (
        "sums += dx",
        "sums += tl.where(rows < M, dx, 1.0)",
    ),
    "gradient of the residual doubled": (
        "(*ctx.saved_tensors, dy), dy",
        "(*ctx.saved_tensors, dy), 2 * dy",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_is_caught(fault, tmp_path):
    wrong = mutant(module, *FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        all_checks(wrong.bias_gelu_add)


# What the compiler makes of the kernels

TENSORS = {
    "fwd": ("x", "bias", "residual", "y"),
    "bwd": ("x", "bias", "dy", "dx"),
}
STRIDES = {
    "fwd": ("stride_xm", "stride_rm"),
    "bwd": ("stride_xm", "stride_dym"),
}


@functools.cache
def compiled(which, dtype, N=4096):
    BLOCK_M, BLOCK_N = _tile(N)
    partial = {"partial_ptr": "*fp32:16"} if which == "bwd" else {}
    return compile_sm90a(
        f"{module.__name__}:_bias_gelu_add_{which}_kernel",
        {
            **{f"{name}_ptr": f"*{dtype}:16" for name in TENSORS[which]},
            **partial,
            **dict.fromkeys((*STRIDES[which], "N"), "i32:16"),
            "M": "i32",
        },
        {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N},
        num_warps=NUM_WARPS,
    )


def test_all_programs_of_the_backward_kernel_fit_on_an_sm():
    for dtype in ("bf16", "fp32"):
        registers = compiled("bwd", dtype).registers * 32 * NUM_WARPS
        assert PROGRAMS_PER_SM * registers <= 65536


@pytest.mark.parametrize("which", ["fwd", "bwd"])
def test_all_large_tensors_move_16_bytes_at_a_time(which):
    kernel = compiled(which, "bf16")
    assert kernel.spills == kernel.stack == 0
    assert kernel.registers <= 64
    moves = {
        op: n
        for op, n in kernel.opcodes.items()
        if op.startswith(("LDG", "STG"))
    }
    # 8 elements of each tensor and of the bias, and sums of them in float32
    assert moves == {"LDG.E.128": 3, "STG.E.128": 1 if which == "fwd" else 3}


# The counter


class Meter(TorchDispatchMode):
    """Counts the large tensors that operators read and write."""

    def __init__(self, size):
        super().__init__()
        self.size, self.moved, self.launches = size, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (
            not func.is_view
            and func.overloadpacket is not torch.ops.aten.detach
        ):
            outs = out if isinstance(out, tuple) else (out,)
            tensors = [t for t in (*args, *outs) if isinstance(t, torch.Tensor)]
            self.launches += 1
            self.moved += sum(t.numel() == self.size for t in tensors)
        return out


def metered(f):
    with Meter(40 * 30) as meter:
        f()
    return meter.launches, meter.moved


def test_the_counter_agrees_with_what_torch_runs():
    x, bias, residual = inputs((30, 40))
    x.requires_grad_()
    bias.requires_grad_()
    ran = metered(lambda: bias_gelu_add_reference(x, bias, residual))
    chain = CHAINS["bias, GELU, residual"]
    assert ran == (len(chain), tensors_moved(chain)) == (3, 7)

    y, dy = bias_gelu_add_reference(x, bias, residual), residual
    ran = metered(lambda: torch.autograd.grad(y, (x, bias), dy))
    chain = CHAINS["its gradients"]
    assert ran == (len(chain), tensors_moved(chain)) == (2, 4)

    ran = metered(lambda: bias_gelu_add(x.detach(), bias.detach(), residual))
    assert ran == (1, 3)
    gate = x.detach()
    ran = metered(lambda: F.silu(gate) * residual)
    assert ran == (2, tensors_moved(CHAINS["SwiGLU"]))


def brute_force(ops):
    """One kernel that has nothing in registers at first, and keeps it all."""
    held, loads = set(), 0
    for op in ops:
        loads += len({*op.reads} - held)
        held |= {*op.reads, *op.writes}
    later = [
        {r for op in ops[n + 1 :] for r in op.reads} for n in range(len(ops))
    ]
    stores = sum(
        name not in later[n] or name in KEPT
        for n, op in enumerate(ops)
        for name in op.writes
    )
    return loads + stores


@pytest.mark.parametrize("chain", CHAINS)
def test_fused_traffic_agrees_with_a_run_of_the_chain(chain):
    ops = CHAINS[chain]
    assert tensors_moved(ops, fused=True) == brute_force(ops)


def test_what_is_kept_is_stored():
    two = [Op("f", ("a",), ("dx",)), Op("g", ("dx", "a"), ("c",))]
    assert tensors_moved(two) == 5
    assert tensors_moved(two, fused=True) == brute_force(two) == 3


@pytest.mark.parametrize("chain", CHAINS)
def test_the_gain_goes_from_launches_to_bytes(chain):
    ops = CHAINS[chain]
    bytes_alone = tensors_moved(ops) / tensors_moved(ops, fused=True)
    gains = [fusion_gain(chain, 1 << n).speedup for n in range(4, 44, 4)]
    assert gains[0] == pytest.approx(len(ops), rel=1e-3)
    assert gains[-1] == pytest.approx(bytes_alone, rel=1e-3)
    falls = len(ops) > bytes_alone
    assert gains == sorted(gains, reverse=falls)


def test_times_add_up():
    gain = fusion_gain(elements=10**9, launch_us=5, bandwidth_gb_s=2000)
    assert gain.us_unfused == pytest.approx(15 + 14e9 / 2e12 * 1e6)
    assert gain.us_fused == pytest.approx(5 + 6e9 / 2e12 * 1e6)
    assert (gain.mb_unfused, gain.mb_fused) == (14e3, 6e3)
    assert gain.launch_share_percent == pytest.approx(1500 / 7015)


@pytest.mark.parametrize(
    "bad",
    [
        {"chain": "softmax"},
        {"elements": 0},
        {"element_bytes": -1.0},
        {"launch_us": -1.0},
        {"bandwidth_gb_s": math.inf},
    ],
    ids=str,
)
def test_the_counter_names_the_wrong_argument(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        fusion_gain(**bad)


def test_menus_and_chart():
    defaults = {
        "chain": "SwiGLU",
        "elements": 5,
        "element_bytes": 2.0,
        "launch_us": 2.0,
        "bandwidth_gb_s": 4275.0,
    }
    for menu in (*GPUS.values(), *LAUNCHES.values()):
        chart = fusion_chart(**{**defaults, **menu})
        assert chart.points[0].y == fusion_gain(**{**defaults, **menu}).speedup
        assert all(y > 1 for _, y in chart.lines[0].points)


@pytest.mark.parametrize(
    "fault",
    [
        ("len(read - written) +", "len(read) +"),
        ("(read - KEPT)", "read"),
        ("len(ops) * launch_us", "launch_us"),
    ],
    ids=str,
)
def test_a_mistake_in_the_counter_is_caught(fault, tmp_path, monkeypatch):
    wrong = mutant(cost, *fault, tmp_path)
    for name in ("tensors_moved", "fusion_gain"):
        monkeypatch.setitem(globals(), name, getattr(wrong, name))

    def check():
        for chain in CHAINS:
            test_fused_traffic_agrees_with_a_run_of_the_chain(chain)
        test_times_add_up()

    with pytest.raises(AssertionError):
        check()


# On a GPU


@pytest.mark.gpu
def test_random_shapes_and_strides():
    for _ in range(60):
        M, N = (int(torch.randint(1, n, ())) for n in (300, 3000))
        dtype = DTYPES[int(torch.randint(3, ()))]
        gap = int(torch.randint(3, ())) * 8
        x, residual, dy = (
            normal((M, N + gap), dtype, 1)[:, gap:] for _ in "xrd"
        )
        bias = normal(N, dtype, 1)
        check_forward(bias_gelu_add, x, bias, residual)
        check_backward(gradient(bias_gelu_add), x, bias, residual, dy)


@pytest.mark.gpu
def test_runs_are_equal_bit_for_bit():
    x, bias, residual = inputs((3000, 1000), torch.bfloat16)
    first = gradient(bias_gelu_add)(x, bias, residual, residual)
    for _ in range(20):
        again = gradient(bias_gelu_add)(x, bias, residual, residual)
        assert all(map(torch.equal, first, again))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    M, N = 2**16 + 1, 2**15
    x = torch.randn(M, N, dtype=torch.bfloat16, device="cuda")
    bias = torch.zeros(N, dtype=torch.bfloat16, device="cuda")
    y = bias_gelu_add(x, bias, x)
    dx, _ = module._bias_gelu_add_backward(x, bias, x)
    last = slice(M - 9, M)
    check_forward(lambda *_: y[last], x[last], bias, x[last])
    part = x[last].clone()
    wanted = gradient(bias_gelu_add)(part, bias, part, part)[0]
    assert torch.equal(dx[last], wanted)


@pytest.mark.gpu
def test_inductor_compiles_it():
    x, bias, residual = inputs((64, 1000))

    def block(x, bias, residual):
        return bias_gelu_add(x * 2, bias, residual) + 1

    compiled = torch.compile(block, fullgraph=True)
    for f in (
        lambda op: op(x, bias, residual),
        lambda op: gradient(op)(x, bias, residual, residual),
    ):
        torch.testing.assert_close(f(compiled), f(block))


@pytest.mark.multi_gpu
def test_runs_on_the_gpu_that_holds_the_tensors():
    x, bias, residual = (t.to("cuda:1") for t in inputs((5, 100)))
    check_forward(bias_gelu_add, x, bias, residual)
    check_backward(gradient(bias_gelu_add), x, bias, residual, x)
