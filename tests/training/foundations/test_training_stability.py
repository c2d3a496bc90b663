import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from warpmap import DEVICE
from warpmap.training.foundations._spike import Settings, train
from warpmap.training.foundations.optimizers import AdamW
from warpmap.training.foundations.training_stability import (
    StableAttention,
    clip_gradients,
    cross_entropy,
    cross_entropy_backward,
    largest_step,
)

F64 = {"dtype": torch.float64, "device": DEVICE}
# sums of some hundred terms, rounded in another order
EXACT = {"rtol": 1e-12, "atol": 1e-14}
SHAPES = [(), (5,), (7, 3), (2, 3, 4), (0, 3)]


def with_gradients(scale=1.0):
    params = [torch.zeros(shape, **F64) for shape in SHAPES]
    for i, p in enumerate(params):
        p.grad = torch.randn_like(p) * scale * 3.0**i
    return [*params, torch.zeros(2, **F64)]  # the last has none


def gradients(params):
    return [p.grad.clone() for p in params if p.grad is not None]


def clip_each(params, limit):
    for p in params:
        if p.grad is not None:
            nn.utils.clip_grad_norm_([p], limit)


def clip_always(params, limit):
    norm = torch.cat([g.flatten() for g in gradients(params)]).norm()
    for p in params:
        if p.grad is not None:
            p.grad *= limit / norm


def clip_by_square(params, limit):
    square = torch.cat([g.flatten() for g in gradients(params)]).square().sum()
    for p in params:
        if p.grad is not None:
            p.grad *= (limit / square).clamp(max=1)


def clip_elements(params, limit):
    nn.utils.clip_grad_value_(params, limit)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("limit", [0.3, 50.0])
def test_clipping_agrees_with_torch(scale, limit):
    params = with_gradients(scale)
    copies = [p.clone() for p in params]
    for copy, p in zip(copies, params, strict=True):
        copy.grad = None if p.grad is None else p.grad.clone()
    want = nn.utils.clip_grad_norm_(copies, limit)
    torch.testing.assert_close(clip_gradients(params, limit), want, **EXACT)
    torch.testing.assert_close(gradients(params), gradients(copies), **EXACT)


@pytest.mark.parametrize(
    "wrong", [clip_each, clip_always, clip_by_square, clip_elements]
)
def test_wrong_clipping_is_caught(wrong):
    caught = 0
    for scale, limit in ((1e-3, 0.3), (1.0, 50.0), (1e3, 50.0)):
        params = with_gradients(scale)
        before = gradients(params)
        wrong(params, limit)
        got = gradients(params)
        for p, g in zip(params, before, strict=False):
            p.grad = g
        nn.utils.clip_grad_norm_(params, limit)
        want = gradients(params)
        caught += not all(map(torch.allclose, got, want))
    assert caught


def test_a_gradient_that_is_not_finite_shows_in_the_norm():
    for bad in (math.nan, math.inf):
        params = with_gradients()
        params[1].grad[2] = bad
        assert not clip_gradients(params, 1.0).isfinite()


def test_no_gradient_has_norm_0():
    assert clip_gradients([torch.zeros(2)], 1.0).item() == 0


def classes(scale=1.0):
    logits = (torch.randn(6, 11, **F64) * scale).requires_grad_()
    return logits, torch.randint(11, (6,), device=DEVICE)


def z_loss(logits, targets, weight):
    """The same loss from other functions."""
    probs = logits.exp().sum(dim=1)
    return functional.cross_entropy(logits, targets) + weight * (
        probs.log() ** 2
    ).sum() / len(targets)


@pytest.mark.parametrize("weight", [0.0, 1e-4, 0.3])
def test_z_loss_agrees_with_torch(weight):
    logits, targets = classes()
    torch.testing.assert_close(
        cross_entropy(logits, targets, weight),
        z_loss(logits, targets, weight),
        **EXACT,
    )


@pytest.mark.parametrize("weight", [0.0, 1e-4, 0.3])
def test_its_gradient_agrees_with_autograd(weight):
    logits, targets = classes()
    z_loss(logits, targets, weight).backward()
    with torch.no_grad():
        got = cross_entropy_backward(logits, targets, weight)
        torch.testing.assert_close(got, logits.grad, **EXACT)
        # what holds the level of a row is the z-loss alone
        level = 2 * weight * logits.logsumexp(dim=1) / len(targets)
        torch.testing.assert_close(got.sum(dim=1), level, **EXACT)


def no_factor_2(logits, targets, weight):
    return cross_entropy_backward(logits, targets, weight / 2)


def level_only(logits, targets, weight):
    log_z = logits.logsumexp(dim=1, keepdim=True)
    grad = cross_entropy_backward(logits, targets)
    return grad + 2 * weight * log_z / logits.shape[1] / len(logits)


def not_averaged(logits, targets, weight):
    return cross_entropy_backward(logits, targets, weight) * len(logits)


@pytest.mark.parametrize("wrong", [no_factor_2, level_only, not_averaged])
def test_a_wrong_gradient_is_caught(wrong):
    logits, targets = classes()
    z_loss(logits, targets, 0.3).backward()
    with torch.no_grad(), pytest.raises(AssertionError):
        torch.testing.assert_close(
            wrong(logits, targets, 0.3), logits.grad, rtol=1e-3, atol=1e-6
        )


def test_large_logits_stay_finite():
    logits, targets = classes(scale=1e4)
    assert cross_entropy(logits, targets, 1e-4).isfinite()
    with torch.no_grad():
        assert cross_entropy_backward(logits, targets, 1e-4).isfinite().all()


def test_a_high_level_costs_precision_in_bfloat16():
    """The page's reason for the z-loss."""
    logits = torch.tensor([[0.0, 1.0]], device=DEVICE)
    right = torch.tensor([1], device=DEVICE)
    for level, same in ((0.0, True), (1000.0, False)):
        rounded = (logits + level).bfloat16().float()
        off = cross_entropy(rounded, right) - cross_entropy(logits, right)
        assert (off.abs() < 1e-6) == same


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_agrees_with_torch_and_is_causal(qk_norm):
    layer = StableAttention(24, heads=3, qk_norm=qk_norm).to(**F64)
    for p in layer.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, 7, 24, **F64)
    q, k, v = (x @ layer.qkv.weight.T).chunk(3, dim=-1)
    q, k, v = (y.unflatten(-1, (3, 8)).transpose(1, 2) for y in (q, k, v))
    if qk_norm:
        q = functional.rms_norm(q, (8,), layer.q_norm.weight, 1e-6)
        k = functional.rms_norm(k, (8,), layer.k_norm.weight, 1e-6)
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    want = y.transpose(1, 2).flatten(2) @ layer.out.weight.T
    torch.testing.assert_close(layer(x), want, rtol=1e-10, atol=1e-10)
    # the first tokens do not notice the last one
    x[:, -1] += 1
    torch.testing.assert_close(layer(x)[:, :-1], want[:, :-1])


def sharpness(qk_norm, growth):
    """Largest score, and the gradient of the projections, as they grow."""
    torch.manual_seed(0)
    layer = StableAttention(32, heads=2, qk_norm=qk_norm).to(**F64)
    x = torch.randn(1, 9, 32, **F64)
    with torch.no_grad():
        layer.qkv.weight[:64] *= growth  # of queries and keys
    q, k, _ = layer.queries_and_keys(x)
    score = (q @ k.mT).abs().amax().item() / 4
    layer(x).square().sum().backward()
    return score, layer.qkv.weight.grad[:64].norm().item() * growth


def test_scores_grow_with_the_square_of_the_weights():
    score, slope = sharpness(qk_norm=False, growth=1.0)
    grown, flat = sharpness(qk_norm=False, growth=100.0)
    assert grown == pytest.approx(1e4 * score)
    # nearly one key each is left: a relative change of the weights does
    # nothing any more, though the scores grew ten thousandfold
    assert flat < slope


def test_qk_norm_bounds_scores_whatever_the_weights():
    score, slope = sharpness(qk_norm=True, growth=1.0)
    grown, same = sharpness(qk_norm=True, growth=100.0)
    assert score <= grown <= math.sqrt(16)
    # eps = 1e-6 beside mean squares of 0.3
    assert grown == pytest.approx(score, rel=1e-4)
    assert same == pytest.approx(slope, rel=1e-3)


def last_step(gradients, beta1, beta2):
    """What AdamW does with the last of them, over the learning rate."""
    p = torch.zeros(1, **F64)
    adamw = AdamW([p], 1.0, (beta1, beta2), eps=0.0, weight_decay=0.0)
    for g in gradients:
        p.zero_()
        p.grad = torch.full_like(p, g)
        adamw.step()
    return p.abs().item()


BETAS = [(0.9, 0.999), (0.9, 0.95), (0.9, 0.9), (0.5, 0.25), (0.1, 0.9)]


@pytest.mark.parametrize("betas", BETAS, ids=str)
@pytest.mark.parametrize("steps", [1, 7, 200])
def test_the_bound_on_a_step_is_reached_and_not_passed(betas, steps):
    beta1, beta2 = betas
    bound = largest_step(beta1, beta2, steps)
    worst = [(beta2 / beta1) ** -age for age in range(steps)]
    reached = last_step(worst[::-1], beta1, beta2)
    assert reached == pytest.approx(bound, rel=1e-9)
    for _ in range(5):
        others = torch.randn(steps, dtype=torch.float64).tolist()
        assert last_step(others, beta1, beta2) <= bound * (1 + 1e-12)


def test_the_step_of_one_loud_gradient_alone_is_no_bound():
    # what is often quoted: (1 - beta1) / sqrt(1 - beta2) = 3.16
    assert 0.1 / math.sqrt(0.001) < largest_step(0.9, 0.999, 10_000) / 2


@pytest.fixture
def one_thread():
    """The model is so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def spike(**guards):
    run = train(Settings(steps=90, noise_from=76, **guards))
    before = sum(s.loss for s in run[66:76]) / 10
    after = max(s.loss for s in run[79:]) / before
    return run, after, max(s.far for s in run[76:])


@pytest.mark.usefixtures("one_thread")
def test_noise_makes_a_spike_and_guards_of_the_step_flatten_it():
    run, peak, far = spike()
    assert peak > 2  # times the loss before
    assert far > 0.08  # of the elements moved by more than lr
    clipped, low, less = spike(clip=0.1)
    assert low < 0.8 * peak
    assert less < 0.04
    _, lower, none = spike(beta2=0.95)
    assert lower < peak
    assert none < 0.01
    # the noise itself is as new to either
    assert clipped[76].loss == pytest.approx(run[76].loss, rel=0.3)


@pytest.mark.usefixtures("one_thread")
def test_at_a_high_learning_rate_scores_explode_without_qk_norm():
    def last(qk_norm):
        settings = Settings(lr=0.1, qk_norm=qk_norm, steps=50, noise_steps=0)
        run = train(settings)
        return max(s.score for s in run), sum(s.loss for s in run[-10:]) / 10

    score, loss = last(qk_norm=False)
    held, lower = last(qk_norm=True)
    assert score > 500
    assert held < 50
    assert lower < loss


@pytest.mark.usefixtures("one_thread")
def test_z_loss_holds_the_level():
    quick = {"steps": 40, "noise_steps": 0}
    free = train(Settings(**quick))[-1].log_z
    held = train(Settings(**quick, z_weight=0.1))[-1].log_z
    assert abs(held) < 1 < free


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clip_gradients([], 0), "limit must be above 0, got 0"),
        (lambda: StableAttention(10, 3, True), "width must be a multiple"),
        (lambda: largest_step(1.0, 0.9, 1), r"beta1 must be in \[0, 1\)"),
        (lambda: largest_step(0.9, 0.0, 1), r"beta2 must be in \(0, 1\)"),
        (lambda: largest_step(0.9, 0.9, 0), "step must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
