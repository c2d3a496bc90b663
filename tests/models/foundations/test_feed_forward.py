import math

import pytest
import torch
from torch.nn import functional as F

from warpmap import DEVICE
from warpmap.models.configs import MODELS
from warpmap.models.foundations.feed_forward import (
    SwiGLU,
    activate,
    feed_forward,
    feed_forward_backward,
    gated_hidden,
)

U = torch.finfo(torch.float64).eps / 2
ACTIVATIONS = {
    "identity": lambda x: x,
    "sigmoid": F.sigmoid,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}
# one token, no token, a batch; F narrower and wider than C
SHAPES = [((1, 3), 2), ((0, 3), 4), ((2, 5, 6), 9)]


def inputs(shape, hidden, gated):
    C = shape[-1]
    sizes = [shape, (hidden, C), (C, hidden)] + [(hidden, C)] * gated
    return [
        torch.randn(size, dtype=torch.float64, device=DEVICE) for size in sizes
    ]


def torch_feed_forward(x, up, down, gate=None, activation="silu"):
    """The same from PyTorch's own pieces."""
    f = ACTIVATIONS[activation]
    if gate is None:
        return F.linear(f(F.linear(x, up)), down)
    return F.linear(f(F.linear(x, gate)) * F.linear(x, up), down)


def close(got, want):
    """Whether two float64 results differ by rounding alone.

    No sum here has more than 32 terms, three follow one another, and their
    terms add up to less than 1e5 in size: each errs by 32 u of that at most.
    """
    return got.shape == want.shape and torch.allclose(
        got, want, rtol=0, atol=3 * 32 * U * 1e5
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_slopes_agree_with_torch(activation):
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)  # 0 is among them
    x.requires_grad_()
    y, slope = activate(x, activation)
    want = ACTIVATIONS[activation](x)
    (want_slope,) = torch.autograd.grad(want.sum(), x)
    # values and slopes are below 9; erf and exp are good to a few units
    torch.testing.assert_close(y, want, rtol=0, atol=100 * U)
    torch.testing.assert_close(slope, want_slope, rtol=0, atol=100 * U)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_out_nothing_overflows(activation):
    x = torch.tensor([-1e30, -750.0, 750.0, 1e30], dtype=torch.float64)
    for values in activate(x, activation):
        assert values.isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("shape", "hidden"), SHAPES, ids=str)
def test_both_directions_agree_with_torch(shape, hidden, gated, activation):
    leaves = [t.requires_grad_() for t in inputs(shape, hidden, gated)]
    want = torch_feed_forward(*leaves, activation=activation)
    assert close(feed_forward(*leaves, activation=activation), want)
    grad = torch.randn_like(want)
    ours = feed_forward_backward(grad, *leaves, activation=activation)
    theirs = torch.autograd.grad(want, leaves, grad)
    assert (ours.gate is None) == (not gated)
    for got, expected in zip(ours, theirs, strict=False):
        assert close(got, expected)


def wrong_backward(fault, grad, x, up, down, gate):
    """The gated backward of SiLU, with one line changed."""
    g, u = x @ gate.T, x @ up.T
    opened, slope = activate(g, "silu")
    d_hidden = grad @ down
    if fault == "gates swapped":
        opened, u = u, opened
    if fault == "slope of a sigmoid":
        slope = activate(g, "sigmoid")[1]
    if fault == "slope forgotten":
        slope = torch.ones_like(g)
    d_u, d_g = d_hidden * opened, d_hidden * u * slope
    d_x = d_u @ up + d_g @ gate
    if fault == "only the gate's path":
        d_x = d_g @ gate
    hidden = u if fault == "product forgotten" else opened * u
    return d_x, d_u.T @ x, grad.T @ hidden, d_g.T @ x


@pytest.mark.parametrize(
    "fault",
    [
        None,
        "gates swapped",
        "slope of a sigmoid",
        "slope forgotten",
        "only the gate's path",
        "product forgotten",
    ],
)
def test_a_wrong_gradient_is_caught(fault):
    leaves = [t.requires_grad_() for t in inputs((7, 6), 9, gated=True)]
    want = torch_feed_forward(*leaves)
    grad = torch.randn_like(want)
    theirs = torch.autograd.grad(want, leaves, grad)
    wrong = wrong_backward(fault, grad, *[t.detach() for t in leaves])
    good = [
        close(got, expected)
        for got, expected in zip(wrong, theirs, strict=True)
    ]
    assert all(good) == (fault is None)


@pytest.mark.parametrize("wrong", ["relu", "sigmoid", "gelu"])
def test_a_wrong_activation_is_caught(wrong):
    leaves = inputs((7, 6), 9, gated=True)
    want = torch_feed_forward(*leaves)
    assert not close(feed_forward(*leaves, activation=wrong), want)
    swapped = [*leaves[:1], leaves[3], leaves[2], leaves[1]]
    assert not close(feed_forward(*swapped), want)


def test_the_layer_agrees_with_transformers_llama():
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    config = LlamaConfig(
        hidden_size=12, intermediate_size=32, num_attention_heads=4
    )
    theirs, ours = LlamaMLP(config), SwiGLU(12, 32)
    ours.load_state_dict(
        {k.replace("_proj", ""): w for k, w in theirs.state_dict().items()}
    )
    x = torch.randn(3, 5, 12)
    assert torch.equal(ours(x), theirs(x))
    assert all(w.ndim == 2 for w in ours.parameters())  # no biases


def test_the_layer_is_the_function():
    layer = SwiGLU(6, 9).double().to(DEVICE)
    x = torch.randn(2, 5, 6, dtype=torch.float64, device=DEVICE)
    weights = [layer.up.weight, layer.down.weight, layer.gate.weight]
    assert close(layer(x), feed_forward(x, *weights))


def test_tokens_do_not_meet():
    layer = SwiGLU(6, 9).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    moved = x.clone()
    moved[2] += 1
    changed = (layer(moved) != layer(x)).any(dim=-1)
    assert changed.tolist() == [False, False, True, False, False]


def test_it_is_a_sum_over_memories():
    """Each key decides how much of its value is added."""
    x, keys, values = inputs((4, 6), 9, gated=False)
    want = torch.zeros_like(x)
    for token in range(4):
        for key, value in zip(keys, values.T, strict=True):
            match = math.fsum((x[token] * key).tolist())
            want[token] += max(match, 0.0) * value
    got = feed_forward(x, keys, values, activation="relu")
    assert close(got, want)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_two_gated_units_multiply(activation):
    # f(a) b + f(-a) (-b) = (f(a) - f(-a)) b = a b
    x = torch.randn(100, 2, dtype=torch.float64) * 30
    signs = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    zeros = torch.zeros_like(signs)
    gate = torch.cat([signs, zeros], dim=1)
    up = torch.cat([zeros, signs], dim=1)
    down = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    y = feed_forward(x, up, down, gate, activation)
    product = x[:, 0] * x[:, 1]
    # near 0 the two halves of f cancel, so the error is relative to f(|a|)
    bound = 40 * U * (x[:, 1].abs() * (1 + x[:, 0].abs()))
    assert ((y[:, 0] - product).abs() <= bound).all()
    # without the gate, ReLU cannot: twice the input, twice the output
    plain = feed_forward(2 * x, gate + up, down, activation="relu")
    once = feed_forward(x, gate + up, down, activation="relu")
    assert torch.equal(plain, 2 * once)


@pytest.mark.parametrize(
    ("name", "multiple_of", "multiplier"),
    [
        ("Llama 2 7B", 256, 1.0),
        ("Llama 2 13B", 256, 1.0),
        ("Llama 2 70B", 4096, 1.3),
        ("Llama 3 8B", 1024, 1.3),
        ("Llama 3 70B", 4096, 1.3),
        ("Llama 3.1 405B", 4096, 1.2),
    ],
)
def test_widths_are_those_that_were_published(name, multiple_of, multiplier):
    model = MODELS[name]
    hidden = gated_hidden(model.hidden_size, multiple_of, multiplier)
    assert hidden == model.intermediate_size


@pytest.mark.parametrize("width", [1, 96, 768, 4096, 5120, 12345])
def test_three_matrices_weigh_what_two_did(width):
    plain = 2 * width * 4 * width
    hidden = gated_hidden(width, multiple_of=1)
    assert abs(3 * width * hidden - plain) <= 3 * width
    assert gated_hidden(width, multiple_of=256) % 256 == 0
    assert hidden <= gated_hidden(width, multiple_of=256) < hidden + 256


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        SwiGLU(4, 0)
    for bad in ("width", "multiple_of", "multiplier"):
        arguments = {"width": 4, bad: 0}
        with pytest.raises(ValueError, match=f"{bad} must be positive, got 0"):
            gated_hidden(**arguments)
    x, up, down = torch.ones(1, 2), torch.ones(3, 2), torch.ones(2, 3)
    for bad in [(x, down, up), (up, up, down, up.T), (x, up, down, down)]:
        with pytest.raises(ValueError, match=r"expected x \(\.\.\., C\)"):
            feed_forward(*bad)
        with pytest.raises(ValueError, match=r"expected x \(\.\.\., C\)"):
            feed_forward_backward(x, *bad)
    with pytest.raises(ValueError, match="got 'tanh'"):
        feed_forward(x, up, down, activation="tanh")
