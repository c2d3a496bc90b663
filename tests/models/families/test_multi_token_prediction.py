import math
import weakref

import pytest
import torch
from torch.nn import functional as F

from warpmap import DEVICE
from warpmap.models.families._self_drafting import draft, generate
from warpmap.models.families.multi_token_prediction import (
    IndependentHeads,
    PredictionModule,
    SequentialModules,
    backward_by_depth,
    depth_loss,
    joint_loss,
)
from warpmap.models.foundations.decoder_only import Decoder, DecoderConfig
from warpmap.models.foundations.parameter_count import (
    grouped_attention,
    parameter_count,
)
from warpmap.models.positions.rope import rope_table

BOTH = [IndependentHeads, SequentialModules]
WEIGHTS = [1.0, 0.5, 0.25]
V, C, T = 11, 8, 7


def built(kind, ahead=2, tied=False, dtype=torch.float64, device=DEVICE):
    torch.manual_seed(1)
    config = DecoderConfig(V, C, 2, 2, 1, 12, tied=tied)
    model = kind(Decoder(config), ahead)
    for weight in model.parameters():  # far from 0, so that mistakes show
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.5)
    return model.to(device, dtype)


def texts(batch=2, length=T, device=DEVICE):
    return torch.randint(V, (batch, length), device=device)


def gradients(model):
    return {
        name: p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def loop(model, tokens, weights, shift=1, divide="all"):
    """One target at a time."""
    total = 0.0
    for k, features in enumerate(model.features(tokens)):
        terms = []
        for text, rows in zip(tokens, features, strict=True):
            for i, row in enumerate(rows):
                if i + k + shift < len(text):
                    logits = model.decoder.head.weight @ row
                    right = logits[text[i + k + shift]]
                    terms.append(logits.exp().sum().log() - right)
        count = len(tokens) * (tokens.shape[1] - 1)
        count = len(terms) if divide == "own" else count
        total = total + weights[k] * sum(terms) / count
    return total


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", BOTH)
def test_loss_and_gradients_agree_with_a_loop_over_targets(kind, tied):
    model, tokens = built(kind, tied=tied), texts()
    want = loop(model, tokens, WEIGHTS)
    want.backward()
    expected = gradients(model)
    assert len(expected) == len(list(model.parameters()))
    for run in ("joint", "by depth"):
        model.zero_grad()
        if run == "joint":
            got = joint_loss(model, tokens, WEIGHTS)
            got.backward()
        else:
            got = backward_by_depth(model, tokens, WEIGHTS)
        # sums of some hundred terms near 1
        torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
        torch.testing.assert_close(
            gradients(model), expected, rtol=1e-11, atol=1e-12
        )


@pytest.mark.parametrize(
    "fault",
    [
        {"shift": 0},  # the token itself
        {"shift": 2},
        {"divide": "own"},
        {"weights": [1.0, 0.25, 0.5]},
        {"weights": [1.0, 0.0, 0.0]},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", BOTH)
def test_loop_tells_wrong_losses(kind, fault):
    model, tokens = built(kind), texts()
    want = joint_loss(model, tokens, WEIGHTS)
    wrong = loop(model, tokens, **{"weights": WEIGHTS, **fault})
    assert not torch.allclose(wrong, want, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", BOTH)
def test_depth_by_depth_is_the_joint_backward_bit_for_bit(kind, dtype):
    model = built(kind, ahead=3, dtype=dtype, device="cpu")
    tokens, weights = texts(device="cpu"), [1.0, 0.3, 0.3, 0.3]
    loss = joint_loss(model, tokens, weights)
    loss.backward()
    want = gradients(model)
    model.zero_grad()
    assert torch.equal(backward_by_depth(model, tokens, weights), loss)
    got = gradients(model)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_first_depth_first_adds_up_in_another_order():
    """Why ``backward_by_depth`` starts at the end."""
    model = built(IndependentHeads, 3, dtype=torch.float32, device="cpu")
    tokens = texts(device="cpu", batch=8)
    joint_loss(model, tokens, [1.0] * 4).backward()
    want = model.decoder.head.weight.grad.clone()
    model.zero_grad()
    for k, features in enumerate(model.features(tokens)):
        depth_loss(model.decoder, features.detach(), tokens, k).backward()
    got = model.decoder.head.weight.grad
    assert not torch.equal(got, want)
    torch.testing.assert_close(got, want)


class Held:
    """A tensor that autograd keeps for the way back."""

    def __init__(self, tensor):
        self.tensor = tensor


def most_logits_held(model, run):
    """The most losses at a time whose probabilities wait for a backward."""
    held, most = [], 0
    weight = model.decoder.head.weight.data_ptr()

    def pack(tensor):
        nonlocal most
        matrix = tensor.ndim == 2 and tensor.shape[1] == V
        if not matrix or tensor.data_ptr() == weight:
            return tensor
        box = Held(tensor)
        held.append(weakref.ref(box))
        alive = [ref() for ref in held if ref() is not None]
        # the softmax and the loss keep the same numbers
        most = max(most, len({box.tensor.data_ptr() for box in alive}))
        return box

    def unpack(box):
        return box.tensor if isinstance(box, Held) else box

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        run()
    return most


@pytest.mark.parametrize("kind", BOTH)
def test_logits_of_one_depth_at_a_time(kind):
    model, tokens = built(kind, ahead=3), texts()
    weights = [1.0] * 4

    def joint():
        joint_loss(model, tokens, weights).backward()

    def by_depth():
        backward_by_depth(model, tokens, weights)

    assert most_logits_held(model, joint) == 4
    assert most_logits_held(model, by_depth) == 1


@pytest.mark.parametrize("kind", BOTH)
def test_a_row_sees_what_it_may_and_nothing_later(kind):
    model, tokens = built(kind, ahead=3), texts(batch=1)
    whole = model.features(tokens)
    for k, features in enumerate(whole):
        assert features.shape == (1, T - k, C)
        for t in range(T):
            other = tokens.clone()
            other[0, t] = (other[0, t] + 1) % V
            moved = model.features(other)[k] - features
            changed = moved.abs().amax(dim=(0, 2)) > 1e-9
            # sequential depths were told the k tokens before their target
            sees = k if kind is SequentialModules else 0
            want = [i + sees >= t for i in range(T - k)]
            assert changed.tolist() == want, (k, t)


@pytest.mark.parametrize("kind", BOTH)
def test_the_decoder_stays_as_it_was(kind):
    model, tokens = built(kind), texts()
    torch.testing.assert_close(
        model.features(tokens)[0], model.decoder.features(tokens)
    )


def test_a_module_joins_as_the_report_says():
    """M [norm(h); norm(embedding)], equation 21, then block and norm."""
    config = DecoderConfig(V, C, 2, 2, 1, 12)
    module = PredictionModule(config).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    h, e = torch.randn(2, 1, T, C, dtype=torch.float64)
    angles = rope_table(torch.arange(T).double(), C // 2)

    def norm(x, layer):
        return F.rms_norm(x, (C,), layer.weight, 1e-6)

    left, right = module.join.weight.split(C, dim=1)
    joined = norm(h, module.feature_norm) @ left.T
    joined = joined + norm(e, module.token_norm) @ right.T
    want = norm(module.block(joined, angles, None, 0, None), module.norm)
    torch.testing.assert_close(module(h, e, angles), want)
    # the order of the published weights is the other one
    assert not torch.allclose(module(e, h, angles), want, atol=1e-3)


def test_parameters_agree_with_the_calculator():
    config = DecoderConfig(V, C, 2, 2, 1, 12)
    counted = parameter_count(
        layers=2,
        hidden_size=C,
        heads=2,
        kv_heads=1,
        head_dim=C // 2,
        intermediate_size=12,
        vocab_size=V,
        experts=0,
        mtp_layers=3,
    )
    model = SequentialModules(Decoder(config), ahead=3)
    extra = sum(p.numel() for p in model.depths.parameters())
    assert extra == counted.extra_predictors
    model = IndependentHeads(Decoder(config), ahead=3)
    extra = sum(p.numel() for p in model.siblings.parameters())
    block = grouped_attention(C, 2, 1, C // 2) + 3 * C * 12 + 2 * C
    assert extra == 3 * block


def greedy(decoder, text, new):
    for _ in range(new):
        last = decoder(text)[:, -1:].argmax(dim=-1)
        text = torch.cat([text, last], dim=1)
    return text


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("kind", BOTH)
def test_self_drafting_writes_what_the_decoder_writes(kind, ahead):
    model = built(kind, ahead)
    unchecked = []
    for seed in range(5):
        torch.manual_seed(seed)
        prompt = texts(batch=1, length=4)
        got, passes = generate(model, prompt, new=12)
        assert torch.equal(got, greedy(model.decoder, prompt, 12))
        assert math.ceil(12 / (ahead + 1)) <= passes <= 12
        # guesses that nobody checks are another text
        blind = torch.cat([prompt, draft(model, prompt)], dim=1)
        want = greedy(model.decoder, prompt, ahead)
        unchecked.append(torch.equal(blind, want))
    assert not all(unchecked)


@pytest.mark.parametrize("ahead", [1, 2, 3])
@pytest.mark.parametrize("kind", BOTH)
def test_right_guesses_save_passes(kind, ahead):
    model, prompt = built(kind, ahead), texts(batch=1, length=4)
    with torch.no_grad():  # all logits alike: always token 0
        model.decoder.head.weight.zero_()
    text, passes = generate(model, prompt, new=13)
    assert not text[:, 4:].any()
    assert passes == 1 + math.ceil(12 / (ahead + 1))


def test_independent_guesses_need_one_pass():
    """All are read from one row, so what stands after it does not matter."""
    model, prompt = built(IndependentHeads, ahead=3), texts(batch=1)
    junk = torch.cat([prompt, texts(batch=1, length=3)], dim=1)
    rows = [f[:, T - 2] for f in model.features(junk)[1:]]
    want = torch.stack([model.decoder.head(r).argmax(-1) for r in rows], 1)
    assert torch.equal(draft(model, prompt), want)


@pytest.mark.parametrize("kind", BOTH)
def test_bad_input_is_named(kind):
    model = built(kind)
    with pytest.raises(ValueError, match="ahead must be at least 1, got 0"):
        kind(model.decoder, 0)
    with pytest.raises(ValueError, match=r"T above 2, got \(1, 2\)"):
        model.features(texts(1, 2))
    with pytest.raises(ValueError, match="expected 3 weights, one a depth"):
        joint_loss(model, texts(), [1.0, 1.0])
    with pytest.raises(ValueError, match="got 4"):
        backward_by_depth(model, texts(), [1.0] * 4)
    with pytest.raises(ValueError, match="one prompt of at least 2 tokens"):
        generate(model, texts(2), 1)
    with pytest.raises(ValueError, match=r"got \(1, 1\)"):
        generate(model, texts(1, 1), 1)
