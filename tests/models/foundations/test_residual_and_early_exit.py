import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, layer_norm
from torch.utils.flop_counter import FlopCounterMode

from warpmap import DEVICE
from warpmap.models.attention.grouped_query_attention import causal_mask
from warpmap.models.foundations._depth_gradient import gradient_through
from warpmap.models.foundations.residual_and_early_exit import (
    EarlyExitDecoder,
    confidence,
    early_exit,
    exit_loss,
)
from warpmap.models.foundations.transformer import Transformer

V, WIDTH, LAYERS, HEADS, T = 17, 24, 5, 3, 14

# Sums of at most a hundred products of numbers up to 100, in float64, through
# five blocks: each is off by 1e-16 of itself, and blocks add these up.
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def make_model(dtype=torch.float64):
    """A model with large random weights: its exits disagree."""
    model = Transformer(V, WIDTH, LAYERS, HEADS, longest=T)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) / 4)
    return model.to(DEVICE, dtype)


def some_tokens(texts=1):
    return torch.randint(V, (texts, T), device=DEVICE)


def some_threshold(model, tokens):
    """A threshold that a quarter of all exits are above, and none is at."""
    x, mask = model.embed(tokens), causal_mask(T, T, tokens.device)
    found = []
    for block in model.blocks:
        x = block(x, mask)
        found.append(confidence(model.read(x)))
    found = torch.stack(found).flatten().sort().values
    return found[len(found) * 3 // 4 :][:2].mean().item()


def decoded(model, tokens, threshold, make=EarlyExitDecoder):
    """Scores, depths and the decoder of one text, token by token."""
    decoder = make(model, threshold)
    found = [decoder.step(token) for token in tokens[0].tolist()]
    scores = torch.stack([exit.scores for exit in found])
    return scores, [exit.depth for exit in found], decoder


def frozen(model, tokens, depths):
    """The stream before each block, if tokens stop after ``depths`` blocks.

    No cache and no loop over tokens: a stopped token keeps its state, and
    every block sees the states of all.
    """
    x, mask = model.embed(tokens), causal_mask(T, T, tokens.device)
    depths = torch.tensor(depths, device=DEVICE)
    streams = []
    for layer, block in enumerate(model.blocks):
        streams.append(x)
        x = torch.where((depths > layer)[None, :, None], block(x, mask), x)
    return [*streams, x]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_threshold_that_never_fires_gives_the_model_bit_for_bit(dtype):
    model, tokens = make_model(dtype), some_tokens(3)
    scores, depths = early_exit(model, tokens, threshold=1.0)
    assert torch.equal(scores, model(tokens))
    assert (depths == LAYERS).all()
    # a sure model too: all its weight on one token, confidence exactly 1
    model.norm.weight.data *= 1e4
    assert confidence(model(tokens)).max() == 1
    scores, _ = early_exit(model, tokens, threshold=1.0)
    assert torch.equal(scores, model(tokens))


@torch.no_grad()
def test_so_does_decoding_with_a_cache():
    model, tokens = make_model(), some_tokens()
    scores, depths, _ = decoded(model, tokens, threshold=1.0)
    assert depths == [LAYERS] * T

    # the plain loop, with no notion of exits
    cache = [([], []) for _ in model.blocks]
    for t in range(T):
        x = model.embed(tokens[:, t : t + 1], start=t)
        for block, (keys, values) in zip(model.blocks, cache, strict=True):
            normal = block.norm1(x)
            keys.append(block.k(normal))
            values.append(block.v(normal))
            k, v = torch.cat(keys, dim=1), torch.cat(values, dim=1)
            x = x + block.attend(normal, k, v)
            x = x + block.transform(block.norm2(x))
        assert torch.equal(scores[t], model.read(x)[0, 0])
    torch.testing.assert_close(scores, model(tokens)[0], **CLOSE)


def test_decoding_agrees_with_all_tokens_at_once():
    model, tokens = make_model(), some_tokens()
    threshold = some_threshold(model, tokens)
    scores, depths, _ = decoded(model, tokens, threshold)
    want, want_depths = early_exit(model, tokens, threshold)
    assert depths == want_depths[0].tolist()
    assert len(set(depths)) >= 3  # or this would show little
    torch.testing.assert_close(scores, want[0], **CLOSE)


def test_a_token_leaves_at_its_first_sure_exit():
    model, tokens = make_model(), some_tokens()
    threshold = some_threshold(model, tokens)
    _, depths, _ = decoded(model, tokens, threshold)
    streams = frozen(model, tokens, depths)
    for t, depth in enumerate(depths):
        sure = [
            (p.topk(2).values[0] - p.topk(2).values[1]).item() > threshold
            for p in (model.read(x)[0, t].softmax(dim=0) for x in streams[1:])
        ]
        assert not any(sure[: depth - 1])
        assert sure[depth - 1] or depth == LAYERS


def check_keys(model, tokens, depths, decoder):
    """What blocks show of each token, recomputed from the stream."""
    streams = frozen(model, tokens, depths)
    for layer, block in enumerate(model.blocks):
        normal = layer_norm(
            streams[layer],
            (WIDTH,),
            block.norm1.weight,
            block.norm1.bias,
            block.norm1.eps,
        )
        for kept, linear in (
            (decoder.keys[layer], block.k),
            (decoder.values[layer], block.v),
        ):
            want = normal @ linear.weight.T + linear.bias
            torch.testing.assert_close(kept, want, **CLOSE)


@torch.no_grad()
def test_skipped_keys_are_those_of_a_recompute_from_the_exit():
    model, tokens = make_model(), some_tokens()
    threshold = some_threshold(model, tokens)
    _, depths, decoder = decoded(model, tokens, threshold)
    assert min(depths) < LAYERS
    check_keys(model, tokens, depths, decoder)


class Faulty(EarlyExitDecoder):
    """Decodes right, then harms what skipped blocks show of the token."""

    def step(self, token):
        found = super().step(token)
        for layer in range(found.depth, len(self.keys)):
            self.harm(layer)
        return found


class Zeros(Faulty):
    def harm(self, layer):
        self.keys[layer][:, -1] = 0
        self.values[layer][:, -1] = 0


class Missing(Faulty):
    def harm(self, layer):
        if self.keys[layer].shape[1] > 1:
            self.keys[layer] = self.keys[layer][:, :-1]
            self.values[layer] = self.values[layer][:, :-1]


class FromTheBlockBelow(Faulty):
    def harm(self, layer):
        self.keys[layer][:, -1] = self.keys[layer - 1][:, -1]


class OfTheFirstToken(Faulty):
    def harm(self, layer):
        self.values[layer][:, -1] = self.values[layer][:, 0]


class OfAnotherSize(Faulty):
    def harm(self, layer):
        self.keys[layer][:, -1] *= 1.01


FAULTS = [Zeros, Missing, FromTheBlockBelow, OfTheFirstToken, OfAnotherSize]


@pytest.mark.parametrize("fault", FAULTS)
@torch.no_grad()
def test_checks_catch_wrong_keys(fault):
    model, tokens = make_model(), some_tokens()
    threshold = some_threshold(model, tokens)
    scores, depths, decoder = decoded(model, tokens, threshold, fault)
    with pytest.raises(AssertionError):
        check_keys(model, tokens, depths, decoder)
    # and later tokens get something else, where they go as deep
    want, _ = early_exit(model, tokens, threshold)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(scores, want[0], **CLOSE)


def test_confidence_is_the_lead_of_the_first_over_the_second():
    scores = torch.randn(50, V, dtype=torch.float64)
    for row, got in zip(scores, confidence(scores), strict=True):
        second, first = sorted(torch.softmax(row, dim=0).tolist())[-2:]
        assert got.item() == pytest.approx(first - second, abs=1e-15)


def test_exit_loss_weighs_later_exits_more():
    model, tokens = make_model(), some_tokens(2)
    targets = some_tokens(2)
    mask, x, losses = causal_mask(T, T, tokens.device), model.embed(tokens), []
    for block in model.blocks:
        x = block(x, mask)
        losses.append(cross_entropy(model.read(x).mT, targets).item())
    want = sum(w * loss for w, loss in enumerate(losses, start=1)) / 15
    got = exit_loss(model, tokens, targets).item()
    assert got == pytest.approx(want, rel=1e-12)
    assert got != pytest.approx(sum(losses) / 5, rel=1e-3)


def test_a_skipped_block_costs_a_sixth_of_its_weights():
    model = make_model()

    def operations(threshold):
        with FlopCounterMode(display=False) as counter:
            EarlyExitDecoder(model, threshold).step(3)
        return counter.get_total_flops()

    C, head, attended = WIDTH, 2 * WIDTH * V, 4 * WIDTH
    block = 24 * C * C + attended + head
    assert operations(1.0) == LAYERS * block
    assert operations(0.0) == block + (LAYERS - 1) * 4 * C * C


# as the page prints them: size and directions of 32
GRADIENTS = {
    (False, False): [("0.21", 9), ("3.8e-05", 5), ("5.9e-20", 1)],
    (True, False): [("2.5", 22), ("21", 9), ("2.8e+05", 3)],
    (False, True): [("0.64", 11), ("1.3", 5), ("7", 2)],
    (True, True): [("1.4", 21), ("1.1", 17), ("1.6", 11)],
}


@pytest.mark.parametrize(("link", "norm"), GRADIENTS)
def test_gradients_are_those_of_the_page(link, norm):
    for layers, want in zip((4, 16, 64), GRADIENTS[link, norm], strict=True):
        got = gradient_through(layers, link, norm)
        assert (f"{got.size:.2g}", got.directions) == want


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_only_norm_and_link_together_keep_size_and_directions(seed):
    kept = {
        (link, norm): gradient_through(64, link, norm, seed=seed)
        for link in (False, True)
        for norm in (False, True)
    }
    assert kept[False, False].size < 1e-10
    assert kept[True, False].size > 1e3
    assert kept[False, True].directions <= 3
    assert 0.1 < kept[True, True].size < 10
    assert kept[True, True].directions >= 8


def test_gradient_agrees_with_finite_differences():
    """One linear layer by hand: identity plus the product of its weights."""
    small = gradient_through(1, link=True, norm=False, width=2, seed=3)
    generator = torch.Generator().manual_seed(3)
    up, down, x = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((8, 2), (2, 8), (2,))
    )

    def layer(x):
        return x + down @ nn.functional.gelu(up / 2**0.5 @ x) / 8**0.5

    columns = [
        (layer(x + step) - layer(x - step)) / 2e-5
        for step in 1e-5 * torch.eye(2, dtype=torch.float64)
    ]
    size = (torch.stack(columns).square().sum() / 2).sqrt().item()
    assert small.size == pytest.approx(size, rel=1e-8)


def test_bad_input_is_named():
    model, tokens = make_model(), some_tokens()
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="threshold must be 0 to 1, got"):
            early_exit(model, tokens, wrong)
        with pytest.raises(ValueError, match="threshold must be 0 to 1, got"):
            EarlyExitDecoder(model, wrong)
    with pytest.raises(ValueError, match="got 0 and 32"):
        gradient_through(0, link=True, norm=True)
    decoder = EarlyExitDecoder(model, 0.5)
    for token in range(T):
        decoder.step(token)
    with pytest.raises(ValueError, match="15 tokens, but only 14 positions"):
        decoder.step(0)
