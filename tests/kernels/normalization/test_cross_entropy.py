"""Cross-entropy is exact to rounding, with every option and at every edge."""

import math

import pytest
import torch
import torch.nn.functional as F
from aot import compile_sm90a
from kernel_checks import WRONG, assert_accurate, mutant

from warpmap import DEVICE
from warpmap.kernels.normalization import cross_entropy as module
from warpmap.kernels.normalization.cross_entropy import (
    DTYPES,
    _tile,
    backward_rows,
    cross_entropy,
    cross_entropy_reference,
    forward_rows,
)

# one element, short rows, padded lanes, full tiles, several and a rest
SHAPES = [(1, 1), (9, 7), (4, 781), (3, 4096), (2, 9001)]
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "only smoothing": {"label_smoothing": 1.0},
    "z-loss": {"z_loss": 0.01},
    "all": {"label_smoothing": 0.3, "z_loss": 0.1, "ignore_index": 2},
}
INF, NAN = float("inf"), float("nan")


def normal(shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).mul(3).to(dtype)


def targets(logits, ignore_index=-100):
    """Random classes; every third row is ignored."""
    M, N = logits.shape
    target = torch.randint(N, (M,), device=DEVICE)
    target[2::3] = ignore_index
    return target


def rows_by_torch(logits, target, ignore_index=-100, z_loss=0.0, **options):
    """Each row's loss from PyTorch's own functions, in the logits' dtype."""
    options |= {"ignore_index": ignore_index, "reduction": "none"}
    loss = F.cross_entropy(logits, target, **options)
    if z_loss:
        squares = torch.logsumexp(logits, dim=1) ** 2
        loss = loss + z_loss * squares * (target != ignore_index)
    return loss


def check_forward(op, logits, target, beside_torch=True, **options):
    """Against float64.

    The loss is a difference, ``top - picked``, plus the logarithm of a sum;
    an error of the sum by a share e is one of its logarithm by e itself, so 1
    counts as a magnitude. exp(t) has two roundings, felt |t| times; weighted
    by the terms of the sum, |t| is below log N + 1 for each lane.
    """
    x = logits.double()
    N = x.shape[1]
    exact = rows_by_torch(x, target, **options)
    valid = target.clamp(0, N - 1)
    top, lse = x.amax(dim=1), torch.logsumexp(x, dim=1)
    picked = x.gather(1, valid[:, None])[:, 0]
    scale = (top - picked) + (lse - top) + 1
    smoothing = options.get("label_smoothing", 0.0)
    scale += smoothing * (picked.abs() + x.abs().mean(dim=1))
    # lse itself, with an error of what it is made of
    scale += options.get("z_loss", 0.0) * lse.abs() * (4 * top.abs() + 8)
    rounded = rows_by_torch(logits.float(), target, **options)
    assert_accurate(
        op(logits)[:, None],
        exact[:, None],
        torch.float32,
        scale=scale[:, None],
        steps=6 * (math.log(N) + 1) + 8,
        terms=N,
        framework=rounded[:, None] if beside_torch else None,
    )


def per_row(target, f=cross_entropy, **options):
    return lambda logits: f(logits, target, reduction="none", **options)


def gradient(op, dlosses):
    """From a function of logits, the function that gives their gradient."""

    def dx(logits):
        logits = logits.detach().requires_grad_()
        return torch.autograd.grad(op(logits), logits, dlosses)[0]

    return dx


def check_backward(dx, logits, target, dlosses, **options):
    """Against float64; a probability and what is wanted are subtracted.

    p = exp(x - lse) feels the error of lse, whose magnitude is |lse| and
    which holds a sum of N terms, and two roundings of x - lse, |x - lse|
    times each, until p is 0 at -104.
    """
    x = logits.double()
    N = x.shape[1]

    def by_torch(x):
        return rows_by_torch(x, target, **options)

    exact = gradient(by_torch, dlosses.double())(x)
    lse = torch.logsumexp(x, dim=1, keepdim=True)
    p = (x - lse).exp()
    ignored = (target == options.get("ignore_index", -100))[:, None]
    smoothing = options.get("label_smoothing", 0.0)
    chosen = F.one_hot(target.clamp(0, N - 1), N)
    wanted = (1 - smoothing) * chosen + smoothing / N
    z = 2 * options.get("z_loss", 0.0) * lse.abs()
    scale = dlosses.double().abs()[:, None] * (p * (1 + z) + wanted)
    t = (x - lse).abs().clamp(max=104).max().item()
    assert_accurate(
        dx(logits),
        exact,
        logits.dtype,
        scale=scale.masked_fill(ignored, 0),
        steps=3 * t + 2 * lse.abs().max().item() + 6 * math.log(N) + 20,
        terms=N,
    )


def check_both(logits, target=None, beside_torch=True, **options):
    ignore = options.get("ignore_index", -100)
    target = targets(logits, ignore) if target is None else target
    dlosses = torch.randn(logits.shape[0], device=DEVICE)
    op = per_row(target, **options)
    check_forward(op, logits, target, beside_torch, **options)
    check_backward(gradient(op, dlosses), logits, target, dlosses, **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_agrees_with_torch(name):
    x = torch.randn(9, 33, dtype=torch.float64).float()
    target = torch.randint(33, (9,))
    target[::4] = OPTIONS[name].get("ignore_index", -100)
    torch.testing.assert_close(
        cross_entropy_reference(x, target, **OPTIONS[name]),
        rows_by_torch(x, target, **OPTIONS[name]),
    )


def test_a_case_worked_by_hand():
    # e^x sums to 8: the loss is log 8 - log 2, and the gradient p - wanted
    x = torch.tensor([[1.0, 2.0, 5.0]], device=DEVICE).log().requires_grad_()
    loss = cross_entropy(x, torch.tensor([1], device=DEVICE))
    loss.backward()
    torch.testing.assert_close(loss.item(), math.log(4))
    expected = torch.tensor([[0.125, -0.75, 0.625]], device=DEVICE)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(shape, dtype):
    check_both(normal(shape, dtype))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_agrees_with_float64(name):
    check_both(normal((4, 781), torch.float16), **OPTIONS[name])


@pytest.mark.sanitize
def test_every_kernel_runs_on_a_row_that_no_tile_fits():
    check_both(normal((4, 9001), torch.bfloat16), label_smoothing=0.2)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_are_those_of_torch_in_float32(reduction):
    logits = normal((8, 50), torch.float16)
    target = targets(logits)
    options = {"reduction": reduction, "label_smoothing": 0.1}
    loss = cross_entropy(logits, target, **options)
    expected = F.cross_entropy(logits.float(), target, **options)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)

    def total(f):
        return lambda x: f(x.float(), target, **options).sum()

    ones = torch.ones((), device=DEVICE)
    torch.testing.assert_close(
        gradient(total(cross_entropy), ones)(logits.float()),
        gradient(total(F.cross_entropy), ones)(logits.float()),
    )


def test_the_mean_of_no_row_is_nan_as_in_torch():
    logits, target = normal((3, 5)), torch.full((3,), -100, device=DEVICE)
    assert cross_entropy(logits, target).isnan()
    assert F.cross_entropy(logits, target).isnan()
    assert cross_entropy(logits, target, reduction="sum") == 0


def test_an_ignored_row_is_not_even_read():
    logits, target = normal((4, 300)), torch.tensor([5, -1, 7, -1])
    logits[1::2] = NAN
    target = target.to(DEVICE)
    logits.requires_grad_()
    loss = cross_entropy(logits, target, ignore_index=-1)
    loss.backward()
    expected = F.cross_entropy(logits.detach()[::2], target[::2])
    torch.testing.assert_close(loss.detach(), expected)
    assert (logits.grad[1::2] == 0).all()
    assert logits.grad[::2].isfinite().all()


@pytest.mark.parametrize("wrong", [-1, 300, 2**40])
def test_a_target_that_is_no_class_gives_nan(wrong):
    logits = normal((3, 300)).requires_grad_()
    target = torch.tensor([5, wrong, 7], device=DEVICE)
    losses = cross_entropy(logits, target, reduction="none")
    losses.sum().backward()
    assert losses.isnan().tolist() == [False, True, False]
    assert logits.grad.isnan().all(dim=1).tolist() == [False, True, False]


def test_rows_may_lie_apart():
    check_both(normal((40, 200))[::2, 50:131])
    check_both(normal((1, 33)).expand(5, 33))
    check_both(normal((4, 6))[:, ::6])
    logits = normal((4, 9))
    check_both(logits, torch.tensor([[1, 2]] * 4, device=DEVICE)[:, 0])


def test_large_logits_do_not_overflow():
    x = normal((4, 100))
    target = targets(x)
    op = per_row(target)
    ones = torch.ones(4, device=DEVICE)
    for large in (x + 3e4, -x - 1e30, x * 1000):
        check_forward(op, large, target)
        check_backward(gradient(op, ones), large, target, ones)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_what_is_not_finite_goes_where_torch_lets_it_go():
    rows = [
        [1, 2, NAN, 4, 5],
        [1, INF, 3, 4, 5],
        [-INF, -INF, -INF, -INF, -INF],
        [2, 3, -INF, 2, -INF],
        [2, -INF, 3, 2, -INF],
        [1, 2, 3, 4, 5],
    ]
    logits = torch.tensor(rows, device=DEVICE)
    target = torch.ones(6, dtype=torch.int64, device=DEVICE)
    losses = cross_entropy(logits, target, reduction="none")
    expected = F.cross_entropy(logits, target, reduction="none")
    assert losses.isnan().tolist() == [True] * 3 + [False] * 3
    assert losses[4] == INF
    torch.testing.assert_close(losses, expected, equal_nan=True)
    ones = torch.ones(6, device=DEVICE)
    by_torch = per_row(target, F.cross_entropy)
    torch.testing.assert_close(
        gradient(per_row(target), ones)(logits)[[0, 1, 2, 3, 5]],
        gradient(by_torch, ones)(logits)[[0, 1, 2, 3, 5]],
        equal_nan=True,
    )


def test_no_rows():
    logits = torch.empty(0, 5, device=DEVICE, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64, device=DEVICE)
    losses = cross_entropy(logits, target, reduction="none")
    losses.sum().backward()
    assert losses.shape == (0,)
    assert logits.grad.shape == (0, 5)


def test_the_gradient_may_overwrite_the_logits():
    logits = normal((5, 781), torch.float16)
    target, dlosses = targets(logits), torch.randn(5, device=DEVICE)
    expected = gradient(per_row(target), dlosses)(logits)
    _, lse = forward_rows(logits, target)
    backward_rows(logits, target, lse, dlosses, logits)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def test_backward_keeps_two_numbers_a_row_beside_the_logits():
    logits = normal((6, 500), torch.bfloat16).requires_grad_()
    target, kept = targets(logits), []

    def keep(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        cross_entropy(logits, target, reduction="none")
    own = [t for t in kept if t.data_ptr() != logits.data_ptr()]
    assert sum(t.numel() for t in own) == 2 * 6


INT = torch.int64


@pytest.mark.parametrize(
    ("logits", "target", "options", "message"),
    [
        (torch.zeros(4), torch.zeros(4, dtype=INT), {}, r"\(M, N\).*\(4,\)"),
        (torch.zeros(4, 0), torch.zeros(4, dtype=INT), {}, r"\(4, 0\)"),
        (torch.zeros(2, 3).double(), torch.zeros(2, dtype=INT), {}, "float64"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=INT), {}, r"\(2,\).*\(3,\)"),
        (torch.zeros(2, 3), torch.zeros(2), {}, "int64.*float32"),
        (torch.zeros(3, 2).T, torch.zeros(2, dtype=INT), {}, r"\(1, 2\)"),
        (
            torch.zeros(2, 3, device="meta"),
            torch.zeros(2, dtype=INT),
            {},
            "got meta",
        ),
        *(
            (torch.zeros(2, 3), torch.zeros(2, dtype=INT), {name: value}, name)
            for name, value in [
                ("label_smoothing", -0.1),
                ("label_smoothing", 1.1),
                ("label_smoothing", NAN),
                ("z_loss", -1.0),
                ("z_loss", NAN),
                ("reduction", "average"),
            ]
        ),
    ],
)
def test_bad_input_is_refused_by_name(logits, target, options, message):
    if logits.device.type != "meta":
        strides = logits.stride()
        logits = torch.empty_strided(
            logits.shape, strides, dtype=logits.dtype, device=DEVICE
        ).zero_()
    with pytest.raises(ValueError, match=message):
        cross_entropy(logits, target.to(DEVICE), **options)


def test_operators_are_registered_as_torch_wants_them():
    logits, target = normal((3, 20)), targets(normal((3, 20)))
    ops = torch.ops.warpmap
    arguments = logits.requires_grad_(), target, -100, 0.1, 0.01
    torch.library.opcheck(ops.cross_entropy.default, arguments)
    lse, ones = torch.ones(3, device=DEVICE), torch.ones(3, device=DEVICE)
    arguments = logits.detach(), target, lse, ones, -100, 0.1, 0.01
    torch.library.opcheck(ops.cross_entropy_backward.default, arguments)


def test_compiles_with_its_gradient_in_one_graph():
    logits = normal((4, 9))
    target = targets(logits)

    def loss(x):
        return cross_entropy(x * 2, target, z_loss=0.1)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    a, b = (gradient(f, None)(logits) for f in (loss, compiled))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_second_derivative_is_refused():
    x = normal((2, 3)).requires_grad_()
    loss = cross_entropy(x, targets(x))
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dx.sum().backward()


# Faults: the checks above must see every one


def forward_checks(f, wrapped=lambda op: op):
    """On short rows, on several tiles, and with every option."""
    for shape, options in (
        ((3, 9001), {}),
        ((4, 50), {"label_smoothing": 0.3, "z_loss": 0.1, "ignore_index": 2}),
    ):
        logits = normal(shape)
        # of several tiles: let the maximum lie in a later one once
        logits[0, shape[1] * 3 // 4] = 20.0
        target = targets(logits, options.get("ignore_index", -100))
        op = wrapped(per_row(target, f, **options))
        check_forward(op, logits, target, **options)


def backward_checks(f, wrapped=lambda op: op):
    for shape, options in (
        ((3, 5001), {}),
        ((4, 50), {"label_smoothing": 0.3, "z_loss": 0.1, "ignore_index": 2}),
    ):
        logits = normal(shape)
        target = targets(logits, options.get("ignore_index", -100))
        dlosses = torch.randn(shape[0], device=DEVICE)
        dx = wrapped(gradient(per_row(target, f, **options), dlosses))
        check_backward(dx, logits, target, dlosses, **options)


def test_the_kernel_passes_the_checks_that_faults_must_fail():
    forward_checks(cross_entropy)
    backward_checks(cross_entropy)


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_result_is_caught(fault):
    with pytest.raises(AssertionError):
        forward_checks(cross_entropy, WRONG[fault])
    with pytest.raises(AssertionError):
        backward_checks(cross_entropy, WRONG[fault])


FORWARD_FAULTS = {
    "padding takes part": (
        'other=-float("inf")).to(tl.float32)\n        higher',
        "other=0.0).to(tl.float32)\n        higher",
    ),
    "old sum not rescaled": ("total * shrink +", "total +"),
    "old maximum kept": ("        peak = higher\n", ""),
    "lanes' maxima ignored": (
        "total * tl.exp2((peak - top) * LOG2_E)",
        "total",
    ),
    "last tile left out": (
        "tl.range(0, N, DEPTH * LANES)",
        "tl.range(0, tl.maximum(N - DEPTH * LANES, 1), DEPTH * LANES)",
    ),
    "sum in float16": ("tl.sum(exps,", "tl.sum(exps.to(tl.float16),"),
    "maximum not added back": (
        "loss = top - picked + log_sum",
        "loss = -picked + log_sum",
    ),
    "padding smoothed over": (
        "tl.sum(plain, axis=0) / N",
        "tl.sum(plain, axis=0) / LANES",
    ),
    "z-loss left out": ("loss + z_loss * lse * lse", "loss"),
    "neighbour's target": (
        "picked = tl.load(row_ptr + target,",
        "picked = tl.load(row_ptr + target // 2,",
    ),
    "ignored row counted": ("if target == ignore_index:", "if target == -7:"),
}
BACKWARD_FAULTS = {
    "target not subtracted": ("- wanted)", ")"),
    "smoothing left out": ("wanted += label_smoothing / N", "wanted += 0.0"),
    "target not lowered": ("1 - label_smoothing, 0.0)", "1.0, 0.0)"),
    "gradient of the loss left out": ("dloss * (prob", "(prob"),
    "z-loss left out": ("(1 + 2 * z_loss * lse)", "1.0"),
    "z-loss halved": ("2 * z_loss * lse)", "z_loss * lse)"),
    "ignored row counted": ("tl.where(kept, dx, 0.0)", "dx"),
    "first block everywhere": ("% blocks * BLOCK_N", "% blocks * 0"),
    "in base two": ("(x - lse) * LOG2_E", "(x - lse)"),
}


@pytest.mark.parametrize("fault", FORWARD_FAULTS)
def test_a_mistake_in_the_forward_kernel_is_caught(fault, tmp_path):
    wrong = mutant(module, *FORWARD_FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        forward_checks(wrong.cross_entropy)


@pytest.mark.parametrize("fault", BACKWARD_FAULTS)
def test_a_mistake_in_the_backward_kernel_is_caught(fault, tmp_path):
    wrong = mutant(module, *BACKWARD_FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        backward_checks(wrong.cross_entropy)


# What the compiler makes of the kernels


def compiled(direction, N, dtype, smooth=False):
    DEPTH, LANES, num_warps = _tile(N, {"fp32": 4, "bf16": 2}[dtype])
    pointers = {"logits": dtype, "target": "i64", "lse": "fp32"}
    strides, constexprs = ["stride_m"], {"DEPTH": DEPTH, "LANES": LANES}
    if direction == "fwd":
        pointers |= {"losses": "fp32"}
        constexprs |= {"SMOOTH": smooth}
    else:
        pointers |= {"dlosses": "fp32", "dlogits": dtype}
        strides, constexprs = (
            ["stride_m", "stride_dm"],
            {"BLOCK_N": DEPTH * LANES},
        )
    return compile_sm90a(
        f"{module.__name__}:_cross_entropy_{direction}_kernel",
        {
            **{f"{n}_ptr": f"*{t}:16" for n, t in pointers.items()},
            **dict.fromkeys(strides, "i32:16"),
            **{"N": "i32:16", "ignore_index": "i32"},
            **{"label_smoothing": "fp32", "z_loss": "fp32"},
        },
        constexprs,
        num_warps=num_warps,
    )


@pytest.mark.slow
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_forward_has_the_loads_exps_and_programs_that_the_page_promises(
    dtype, smooth
):
    kernel = compiled("fwd", 128256, dtype, smooth)
    DEPTH, LANES, _ = _tile(128256, {"fp32": 4, "bf16": 2}[dtype])
    assert kernel.spills == kernel.stack == 0
    assert kernel.opcodes["LDG.E.128"] == DEPTH == 4
    # in the loop one exp an element and one a lane, then one more a lane
    lanes = LANES // kernel.threads
    assert kernel.opcodes["MUFU.EX2"] == lanes * (DEPTH + 1) + lanes
    at_once = 65536 // (kernel.registers * kernel.threads)
    assert at_once >= (9 if smooth else 10)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_backward_moves_16_bytes_at_a_time(dtype):
    kernel = compiled("bwd", 128256, dtype)
    assert kernel.spills == kernel.stack == 0
    assert kernel.opcodes["LDG.E.128"] == kernel.opcodes["STG.E.128"] == 4


def test_short_rows_compile_too():
    for direction in ("fwd", "bwd"):
        kernel = compiled(direction, 300, "bf16")
        assert kernel.spills == kernel.stack == 0


# On a GPU


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    N = 128256
    M = 2**31 // N + 3
    logits = torch.empty(M, N, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.randint(N, (M,), device="cuda")
    ends = torch.tensor([0, 1, M // 2, M - 2, M - 1], device="cuda")
    losses, lse = forward_rows(logits, target)
    check_forward(lambda _: losses[ends], logits[ends], target[ends])
    ones = torch.ones(M, device="cuda")
    before = logits[ends]
    backward_rows(logits, target, lse, ones, logits)
    check_backward(lambda _: logits[ends], before, target[ends], ones[ends])


@pytest.mark.gpu
def test_random_shapes_agree_with_float64():
    for _ in range(60):
        N = int(2 ** (17.5 * torch.rand(()).item()))
        M = int(torch.randint(1, 300, ()))
        dtype = DTYPES[int(torch.randint(3, ()))]
        gap = int(torch.randint(9, ()))
        options = list(OPTIONS.values())[int(torch.randint(5, ()))]
        logits = normal((M, N + gap), dtype)[:, gap:]
        # of a single short row PyTorch's error may be 0 by luck
        check_both(logits, beside_torch=False, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_are_equal_bit_for_bit(dtype):
    logits = normal((500, 30000), dtype)
    target, ones = targets(logits), torch.ones(500, device=DEVICE)
    op = per_row(target)
    first = op(logits), gradient(op, ones)(logits)
    for _ in range(20):
        assert torch.equal(op(logits), first[0])
        assert torch.equal(gradient(op, ones)(logits), first[1])


@pytest.mark.gpu
def test_inductor_compiles_it():
    logits = normal((64, 1000), torch.bfloat16)
    target = targets(logits)

    def loss(x):
        return cross_entropy(x + 1, target) * 2

    torch.testing.assert_close(
        torch.compile(loss, fullgraph=True)(logits), loss(logits)
    )


@pytest.mark.multi_gpu
def test_runs_on_the_gpu_that_holds_the_logits():
    logits = normal((4, 100)).to("cuda:1")
    target = targets(logits).to("cuda:1")
    check_forward(per_row(target), logits, target)
