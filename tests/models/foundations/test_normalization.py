import functools
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from warpmap import DEVICE
from warpmap.models.foundations.normalization import (
    ResidualBlock,
    RMSNorm,
    gradient_norms,
    normalize,
    normalize_backward,
)

U = torch.finfo(torch.float64).eps / 2
EPS = 1e-6
# name, axis, center, PyTorch's own; x is (tokens, C)
NORMS = [
    (0, True, lambda x: F.batch_norm(x, None, None, training=True, eps=EPS)),
    (-1, True, lambda x: F.layer_norm(x, x.shape[-1:], eps=EPS)),
    (-1, False, lambda x: F.rms_norm(x, x.shape[-1:], eps=EPS)),
]
IDS = ["batch", "layer", "rms"]
# a mean far from 0, next to 0, and rows of very different sizes
SHIFTS = [(0.0, 1.0), (1000.0, 1.0), (0.0, 1e-3)]


def tokens(rows=12, width=20, shift=0.0, size=1.0):
    noise = torch.randn(rows, width, dtype=torch.float64, device=DEVICE)
    return shift + size * noise


def bound(x, axis, scale):
    """How far rounding may move a normalized value, or a gradient near 1.

    A mean of n values is off by at most n u times the largest. That goes into
    every difference, is magnified by the scale, and the mean square of such
    differences adds as much again; a few operations follow.
    """
    n = x.shape[axis]
    off = n * U * (x.abs().amax() * scale.amax() + 10)
    return float(4 * off * math.sqrt(n))


@pytest.mark.parametrize(("axis", "center", "theirs"), NORMS, ids=IDS)
@pytest.mark.parametrize(("shift", "size"), SHIFTS)
def test_both_directions_agree_with_torch(axis, center, theirs, shift, size):
    x = tokens(shift=shift, size=size).requires_grad_()
    y, scale = normalize(x, axis, center, EPS)
    want = theirs(x)
    off = bound(x.detach(), axis, scale.detach())
    assert off < 1e-6
    torch.testing.assert_close(y, want, rtol=0, atol=off)

    grad = torch.randn_like(x)
    got = normalize_backward(grad, y, scale, axis, center)
    (want_grad,) = torch.autograd.grad(want, x, grad)
    # the gradient is scaled once more, and holds three values of size near 4
    off = 50 * off * float(scale.detach().amax())
    torch.testing.assert_close(got, want_grad, rtol=0, atol=off)


def wrong_norms():
    def unbiased(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (x.var(-1, keepdim=True) + EPS).sqrt()

    def sum_not_mean(x):
        return x / (x.square().sum(-1, keepdim=True) + EPS).sqrt()

    def eps_outside(x):
        return x / (x.square().mean(-1, keepdim=True).sqrt() + EPS)

    def not_centred(x):
        return normalize(x, -1, False, EPS)[0]

    def other_axis(x):
        return normalize(x, 0, True, EPS)[0]

    return [
        ("layer", unbiased),
        ("layer", not_centred),
        ("layer", other_axis),
        ("rms", sum_not_mean),
        ("rms", eps_outside),
    ]


@pytest.mark.parametrize(
    ("norm", "fault"), wrong_norms(), ids=lambda f: getattr(f, "__name__", f)
)
def test_a_wrong_norm_is_caught(norm, fault):
    axis, center, theirs = NORMS[IDS.index(norm)]
    x = tokens()
    off = bound(x, axis, normalize(x, axis, center, EPS)[1])
    assert (fault(x) - theirs(x)).abs().max() > off


@pytest.mark.parametrize("fault", ["no mean", "no projection", "no scale"])
def test_a_wrong_gradient_is_caught(fault):
    x = tokens().requires_grad_()
    y, scale = normalize(x, -1)
    grad = torch.randn_like(x)
    (want,) = torch.autograd.grad(NORMS[1][2](x), x, grad)
    wrong = {
        "no mean": normalize_backward(grad, y, scale, -1, center=False),
        "no projection": scale * (grad - grad.mean(-1, keepdim=True)),
        "no scale": normalize_backward(grad, y, torch.ones_like(y), -1),
    }[fault]
    assert (wrong - want).abs().max() > 1e-2


def test_the_gradient_asks_for_nothing_that_cannot_be():
    x = tokens()
    y, scale = normalize(x, -1, eps=0.0)
    dx = normalize_backward(torch.randn_like(x), y, scale, -1)
    # neither a shift nor a stretch of the row changes y: no slope that way
    for direction in (torch.ones_like(x), x - x.mean(-1, keepdim=True)):
        slope = (dx * direction).sum(-1)
        assert (slope.abs() < 1e-11).all()


@pytest.mark.parametrize(("axis", "meet"), [(0, True), (-1, False)])
def test_only_the_batch_norm_lets_tokens_meet(axis, meet):
    """So it would show a language model the tokens it has to predict."""
    x = tokens().requires_grad_()
    y, _ = normalize(x, axis)
    (slope,) = torch.autograd.grad(y[0].square().sum() + y[0, 0], x)
    assert bool(slope[1:].any()) == meet
    assert slope[0].any()


def test_rms_norm_of_centred_rows_is_layer_norm():
    """So a layer norm's mean can be taken out of the weights before it."""
    x = tokens(width=20)
    weight = torch.randn(16, 20, dtype=torch.float64, device=DEVICE)
    want = F.layer_norm(x @ weight.T, (16,), eps=EPS)
    centred = weight - weight.mean(0, keepdim=True)
    got, _ = normalize(x @ centred.T, -1, center=False, eps=EPS)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    (plain, _) = normalize(x @ weight.T, -1, center=False, eps=EPS)
    assert (plain - want).abs().max() > 1e-2


def test_zeros_stay_zeros_and_an_equal_row_has_no_deviation():
    x = torch.tensor([[0.0, 0.0], [3.0, 3.0]], device=DEVICE)
    assert normalize(x, -1)[0].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert RMSNorm(2).to(DEVICE)(x)[0].tolist() == [0.0, 0.0]
    assert RMSNorm(2).to(DEVICE)(x[:0]).shape == (0, 2)


def half_precision(dtype, weight_first=False, wide=torch.float32):
    """RMSNorm with the order of its roundings laid open."""
    norm = RMSNorm(64).to(dtype)
    norm.weight.data = (1 + torch.rand(64)).to(dtype)

    def by_hand(x):
        x = x.to(wide)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
        if weight_first:
            return (y * norm.weight.to(wide)).to(dtype)
        return y.to(dtype) * norm.weight

    return norm, by_hand


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_casts_before_the_weight_as_llama_does(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm, late = half_precision(dtype, weight_first=True)
    theirs = LlamaRMSNorm(64, EPS).to(dtype)
    theirs.load_state_dict(norm.state_dict())
    x = torch.randn(200, 64).to(dtype)
    got = norm(x)
    assert got.dtype == dtype
    assert torch.equal(got, theirs(x))
    # the other order is PyTorch's, and differs in one value out of four
    torch_own = F.rms_norm(x, (64,), norm.weight, EPS)
    assert 0.1 < (got != late(x)).double().mean() < 0.4
    assert (torch_own != late(x)).double().mean() < 0.01
    # two roundings err twice as far as one at most, float32 adds a little
    u = torch.finfo(dtype).eps / 2
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    exact = exact * norm.weight.double()
    assert ((got - exact).abs() <= 2.02 * u * exact.abs()).all()
    assert ((late(x) - exact).abs() <= 1.01 * u * exact.abs()).all()
    assert ((got - exact).abs() > 1.2 * u * exact.abs()).any()


def test_a_large_value_survives_float16():
    """300 squared is past the largest float16; its row would become zeros."""
    norm, narrow = half_precision(torch.float16, wide=torch.float16)
    x = torch.ones(1, 64, dtype=torch.float16)
    x[0, 5] = 300
    assert narrow(x).tolist() == [[0.0] * 64]
    exact = 300 / math.sqrt((300**2 + 63) / 64 + EPS)
    got = float(norm(x)[0, 5].detach() / norm.weight[5].detach())
    assert abs(got - exact) < 4 * torch.finfo(torch.float16).eps * exact


def test_a_float32_weight_widens_the_result():
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    assert RMSNorm(4)(x).dtype == torch.float32
    assert RMSNorm(4).to(torch.bfloat16)(x).dtype == torch.bfloat16


def test_float64_is_not_narrowed():
    x = tokens(shift=1.0)
    got = RMSNorm(20).double().to(DEVICE)(x)
    torch.testing.assert_close(got, NORMS[2][2](x), rtol=0, atol=1e-14)


def test_a_block_norms_before_or_after():
    x = tokens(width=6)
    sublayer = nn.Linear(6, 6, bias=False).double().to(DEVICE)

    def norm(t):
        return F.rms_norm(t, (6,), eps=EPS)

    def block(placement):
        return ResidualBlock(6, sublayer, placement).double().to(DEVICE)(x)

    for placement, want, other in [
        ("pre", x + sublayer(norm(x)), norm(x + sublayer(x))),
        ("post", norm(x + sublayer(x)), x + norm(sublayer(x))),
    ]:
        torch.testing.assert_close(block(placement), want, rtol=0, atol=1e-13)
        assert (block(placement) - other).abs().max() > 1e-2


norms_of = functools.cache(gradient_norms)


def first_to_last(placement, layers):
    norms = norms_of(placement, layers)
    return norms[0] / norms[-1]


@pytest.mark.slow
def test_depth_multiplies_after_and_adds_before():
    """Twice the layers: the ratio is squared, or doubles."""
    after = [first_to_last("post", n) for n in (16, 32, 64)]
    before = [first_to_last("pre", n) for n in (16, 32, 64)]
    for half, twice in itertools.pairwise(after):
        assert 0.7 < math.log(twice) / math.log(half**2) < 1.3
    for half, twice in itertools.pairwise(before):
        assert 0.7 < twice / (2 * half) < 1.3


def test_growth_a_layer_is_what_two_moments_say():
    g = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    density = torch.exp(-g.square() / 2) / math.sqrt(2 * math.pi)
    sigmoid = torch.sigmoid(g)
    silu, slope = g * sigmoid, sigmoid + g * sigmoid * (1 - sigmoid)
    value = float(torch.trapezoid(silu.square() * density, g))
    slopes = float(torch.trapezoid(slope.square() * density, g))
    growth = math.sqrt((1 + value + slopes) / (1 + value))
    assert round(value, 2) == 0.36
    assert round(slopes, 2) == 0.38
    assert round(growth, 2) == 1.13
    measured = first_to_last("post", 64) ** (1 / 63)
    assert abs(measured - growth) < 0.02


def test_the_last_gradient_depends_on_depth_only_before():
    """Xiong and others: 1 / sqrt(layers) before, as large as ever after."""
    after = [norms_of("post", n)[-1] for n in (16, 64)]
    before = [norms_of("pre", n)[-1] for n in (16, 64)]
    assert 0.8 < after[1] / after[0] < 1.25
    assert 0.8 < 2 * before[1] / before[0] < 1.25


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        RMSNorm(0)
    with pytest.raises(ValueError, match="eps must not be negative, got -1"):
        RMSNorm(4, eps=-1)
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 4\), got \(2, 3"):
        RMSNorm(4)(torch.ones(2, 3))
    with pytest.raises(ValueError, match="'pre' or 'post', got 'peri'"):
        ResidualBlock(4, nn.Identity(), "peri")
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        gradient_norms("pre", 0)
