import dataclasses

import pytest
import torch

from warpmap import DEVICE
from warpmap.inference.decoding.kv_cache import GrowingCache
from warpmap.models.attention.grouped_query_attention import causal_mask
from warpmap.models.configs import ModelConfig
from warpmap.models.foundations._masks import (
    prefix_mask,
    reach,
    stays_right,
    trains_on,
)
from warpmap.models.foundations.attention import attention_weights
from warpmap.models.foundations.decoder_only import Decoder, DecoderConfig
from warpmap.models.foundations.parameter_count import count

SHAPE = DecoderConfig(50, 16, 2, 4, 2, 24, rope_base=500.0, norm_eps=1e-5)
# sums of at most 24 terms in 20 products one after another, whose sizes the
# norms keep near 1: some 500 roundings of 1e-16, and room for their growth
ROUNDING = 1e-12


def lively(config=SHAPE, dtype=torch.float64):
    """A model whose parts all matter: weights large, norms not 1."""
    model = Decoder(config).to(DEVICE, dtype).requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.uniform_(0.5, 2)
        elif "embedding" not in name or config.tied:
            weight.normal_(std=0.3)
    return model


def some_tokens(B=2, T=11):
    return torch.randint(SHAPE.vocab_size, (B, T), device=DEVICE)


@pytest.mark.parametrize("chunks", [(1,) * 11, (4, 7), (5, 1, 3, 2)], ids=str)
def test_cached_passes_equal_one_pass(chunks):
    model, tokens = lively(), some_tokens()
    cache, got = GrowingCache(SHAPE.layers), []
    for piece in tokens.split(chunks, dim=1):
        got.append(model(piece, cache=cache))
    want = model(tokens)
    assert cache.length == 11
    error = (torch.cat(got, 1) - want).abs().max()
    assert error < ROUNDING * want.abs().max()


def test_only_distance_matters():
    model, tokens = lively(), some_tokens()
    want, positions = model(tokens), torch.arange(11, device=DEVICE)
    got = model(tokens, positions + 1000)
    # an angle of 1000 rounds by 1e-13, and so do sine and cosine
    assert (got - want).abs().max() < 1000 * ROUNDING
    got = model(tokens, positions.expand(2, -1))
    assert (got - want).abs().max() < ROUNDING * want.abs().max()
    positions[-1] += 1
    assert (model(tokens, positions) - want).abs().max() > 1e-3


def learns(model, mask, T=8):
    """Positions whose logits the next token does not change."""
    tokens = torch.arange(T, device=DEVICE)[None]
    want, found = model(tokens, mask=mask), 0
    for t in range(T - 1):
        other = tokens.clone()
        other[0, t + 1] = 40
        changed = model(other, mask=mask)[0, t]
        found += bool(torch.allclose(changed, want[0, t], atol=1e-13))
    return found


def outlive(model, mask_of, T=8):
    """Tokens whose keys and values one more token does not change."""
    held = []
    for n in (T, T + 1):
        cache = GrowingCache(SHAPE.layers)
        tokens = torch.arange(n, device=DEVICE)[None]
        model(tokens, mask=mask_of(n).to(DEVICE), cache=cache)
        both = zip(cache.k, cache.v, strict=True)
        held.append([torch.cat(kv, -1)[:, :, :T] for kv in both])
    change = torch.stack(
        [(a - b).abs().amax((0, 1, 3)) for a, b in zip(*held, strict=True)]
    )
    return int((change.amax(0) < 1e-13).sum())


# a mask of every kind, what it trains and what it keeps, of 8 tokens
MASKS = {
    "causal": (lambda T: prefix_mask(T, 0), 7, 8),
    "prefix of 5": (lambda T: prefix_mask(T, 5), 3, 8),
    "prefix of all": (lambda T: prefix_mask(T, T), 0, 0),
    # two looks of one step each: the second reaches the token after next
    "one ahead": (lambda T: torch.ones(T, T).tril(1).bool(), 0, 7),
    "itself alone": (lambda T: torch.eye(T).bool(), 7, 8),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_train_and_keep_what_a_model_says(name):
    mask_of, trained, kept = MASKS[name]
    model = lively()
    assert trains_on(mask_of(8)) == trained
    assert learns(model, mask_of(8).to(DEVICE)) == trained
    assert stays_right(mask_of, 8) == kept == outlive(model, mask_of)


def test_a_hole_does_not_hide_what_a_second_layer_carries():
    mask = prefix_mask(8, 0)
    mask[3, 5] = mask[2, 3] = True  # 2 sees 3, which sees 5
    assert not reach(mask, 1)[2, 5]
    assert reach(mask, 2)[2, 5]
    assert trains_on(mask) == 4  # so do 3 and 4, through what 3 saw
    assert trains_on(prefix_mask(8, 1)) == 7
    assert torch.equal(
        prefix_mask(8, 0), causal_mask(8, 8, torch.device("cpu"))
    )
    with pytest.raises(ValueError, match="prefix must be 0 to 8, got 9"):
        prefix_mask(8, 9)


def test_causal_weights_have_full_rank():
    """Triangular with positive diagonal; other masks promise nothing."""
    q, k = torch.randn(2, 3, 1, 12, 2, dtype=torch.float64)
    mask = prefix_mask(12, 0)
    weights = attention_weights(q, k, mask)[:, 0]
    assert (weights.diagonal(dim1=1, dim2=2) > 0).all()
    assert torch.equal(weights, weights.tril())
    assert (torch.linalg.matrix_rank(weights) == 12).all()
    log = weights.diagonal(dim1=1, dim2=2).log().sum(-1)
    torch.testing.assert_close(torch.linalg.slogdet(weights)[1], log)

    # equal tokens: seen from anywhere, the mean is the same
    equal = attention_weights(q, k[:, :, :1].expand_as(k))[:, 0]
    assert (torch.linalg.matrix_rank(equal) == 1).all()
    # without themselves, the first two tokens both see the first alone
    mask.fill_diagonal_(False)
    mask[0, 0] = True
    alone = attention_weights(q, k, mask)[:, 0]
    assert (torch.linalg.matrix_rank(alone) < 12).all()


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_counted(tied):
    model = Decoder(dataclasses.replace(SHAPE, tied=tied))
    shape = ModelConfig(
        "small", ("", ""), layers=2, hidden_size=16, heads=4, kv_heads=2,
        vocab_size=50, max_context=0, head_dim=4, intermediate_size=24,
        tied_embeddings=tied,
    )  # fmt: skip
    weights = sum(p.numel() for p in model.parameters())
    assert weights == count(shape).total


def test_starts_small_where_layers_add_up():
    model = Decoder(DecoderConfig(64, 128, 8, 4, 4, 256))
    block = model.blocks[3]
    deviation = block.attention.q.weight.std().item()
    assert deviation == pytest.approx(0.02, rel=0.05)
    for part in (block.attention.o, block.feed_forward.down):
        deviation = part.weight.std().item()
        assert deviation == pytest.approx(0.02 / 4, rel=0.05)  # sqrt(2 8)


def test_errors_say_what_came():
    with pytest.raises(ValueError, match="every size must be at least 1"):
        DecoderConfig(100, 16, 0, 4, 2, 32)
    with pytest.raises(ValueError, match=r"at least 1, got .*heads=0"):
        DecoderConfig(100, 16, 1, 0, 2, 32)
    with pytest.raises(ValueError, match="heads 4, and heads of kv_heads 3"):
        DecoderConfig(100, 16, 1, 4, 3, 32)
    with pytest.raises(ValueError, match="head size must be even, got 3"):
        DecoderConfig(100, 12, 1, 4, 2, 32)
    with pytest.raises(ValueError, match=r"got torch.float32 of shape \(1,\)"):
        lively()(torch.zeros(1, device=DEVICE))
