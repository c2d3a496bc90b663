import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from warpmap import DEVICE
from warpmap.models.attention._lightning_indexer import (
    DeepSeekSparseAttention,
    LightningIndexer,
    indexer_loss,
)
from warpmap.models.attention._sparse_cost import (
    CONTEXTS,
    sparse_chart,
    sparse_cost,
)
from warpmap.models.attention.grouped_query_attention import causal_mask
from warpmap.models.attention.multi_head_latent_attention import (
    MultiHeadLatentAttention,
    absorbed_attention,
)
from warpmap.models.attention.sparse_attention import (
    block_pattern,
    gather,
    index_scores,
    select,
    selected_mask,
    sparse_attention,
)
from warpmap.models.positions.rope import rotate_interleaved

EPS = torch.finfo(torch.float64).eps
# (B, H, Hkv, T, S, D, K): MHA, GQA, MQA with a cache, more keys than there are
SHAPES = [
    (2, 4, 4, 9, 9, 8, 3),
    (1, 6, 2, 7, 7, 5, 4),
    (2, 4, 1, 3, 12, 8, 5),
    (1, 2, 1, 5, 5, 4, 8),
]


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64, device=DEVICE)


def inputs(shape):
    B, H, Hkv, T, S, D, K = shape
    seen = causal_mask(T, S, torch.device(DEVICE))
    chosen, valid = select(randn(B, T, S), K, seen)
    return (
        randn(B, H, T, D),
        randn(B, Hkv, S, D),
        randn(B, Hkv, S, D),
        chosen,
        valid,
    )


def masked(q, k, v, mask):
    """All keys, and PyTorch told which of them count."""
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask[:, None], enable_gqa=True
    )


def pairs(chosen, valid, S):
    """The mask, a pair at a time."""
    mask = torch.zeros(*chosen.shape[:2], S, dtype=torch.bool)
    for b, t, i in valid.nonzero().tolist():
        mask[b, t, chosen[b, t, i]] = True
    return mask.to(chosen.device)


def assert_equal_but_for_rounding(got, want, q, k, v):
    """Scores sum D products of size at most A; outputs sum at most S."""
    D, S = q.shape[-1], k.shape[2]
    A = q.abs().sum(-1).max() * k.abs().max() / math.sqrt(D)
    bound = 2 * EPS * v.abs().max() * (2 * (D + 3) * A + S + 10)
    torch.testing.assert_close(got, want, rtol=0, atol=bound.item())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_all_keys_under_a_mask(shape):
    *leaves, chosen, valid = inputs(shape)
    mask = pairs(chosen, valid, shape[4])
    assert torch.equal(selected_mask(chosen, valid, shape[4]), mask)
    leaves = [x.requires_grad_() for x in leaves]
    got = sparse_attention(*leaves, chosen, valid)
    want = masked(*leaves, mask)
    assert_equal_but_for_rounding(got, want, *leaves)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), leaves),
        torch.autograd.grad(want.square().sum(), leaves),
    )


# what each takes is q, k, v, chosen, valid
FAULTS = {
    "hidden keys used": lambda *x: (*x[:4], x[4] | True),
    "one choice for all": lambda q, k, v, c, ok: (
        *(q, k, v),
        c[:, -1:].expand_as(c),
        ok,
    ),
    "a token late": lambda q, k, v, c, ok: (q, k, v, (c + 1) % 7, ok),
    "heads tiled": lambda q, *x: (
        q.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2),
        *x,
    ),
    "not scaled": lambda q, *x: (q * math.sqrt(5), *x),
    "one less": lambda *x: (*x[:3], x[3][..., :-1], x[4][..., :-1]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_mask_catches(fault):
    q, k, v, chosen, valid = inputs(SHAPES[1])
    want = masked(q, k, v, pairs(chosen, valid, 7))
    wrong = sparse_attention(*FAULTS[fault](q, k, v, chosen, valid))
    with pytest.raises(AssertionError):
        assert_equal_but_for_rounding(wrong, want, q, k, v)


def test_selects_the_best_that_may_be_seen():
    scores, seen = randn(2, 5, 9), causal_mask(5, 9, torch.device(DEVICE))
    for top_k in (1, 3, 6, 20):
        mask = selected_mask(*select(scores, top_k, seen), 9)
        for b in range(2):
            for t in range(5):
                row = scores[b, t].tolist()
                best = sorted(range(5 + t), key=lambda s: -row[s])[:top_k]
                assert mask[b, t].nonzero().flatten().tolist() == sorted(best)


def test_index_scores_agree_with_the_formula():
    q, k, weights = randn(2, 3, 4, 5), randn(2, 6, 5), randn(2, 4, 3)
    got = index_scores(q, k, weights)
    for b, t, s in torch.ones(2, 4, 6).nonzero().tolist():
        want = math.fsum(
            weights[b, t, j].item() * max(0.0, (q[b, j, t] @ k[b, s]).item())
            for j in range(3)
        )
        assert got[b, t, s].item() == pytest.approx(want, abs=1e-13)


@pytest.mark.parametrize(("near", "first"), [(1, 0), (2, 1), (3, 2), (9, 0)])
def test_block_pattern_agrees_with_its_words(near, first):
    seen = block_pattern(13, 3, near, first, DEVICE)
    for q in range(13):
        for k in range(13):
            close = q // 3 - near < k // 3
            want = k <= q and (close or k // 3 < first)
            assert seen[q, k].item() == want


def parts(top_k=4):
    torch.manual_seed(0)
    mla = MultiHeadLatentAttention(32, 4, 12, 16, 8, 4, 6)
    # with few heads some keys score 0 exactly, and ties go either way
    indexer = LightningIndexer(32, 12, 16, 10, rope_size=4)
    layer = DeepSeekSparseAttention(mla, indexer, top_k)
    return layer.to(DEVICE, torch.float64)


def test_enough_keys_are_all_keys():
    layer, x = parts(top_k=11), randn(2, 11, 32)
    torch.testing.assert_close(layer(x)[0], layer.mla(x)[0])
    assert (parts(top_k=5)(x)[0] - layer.mla(x)[0]).abs().max() > 1e-3


def test_decodes_with_caches_as_it_does_at_once():
    layer, x = parts(), randn(2, 11, 32)
    want, _ = layer(x)
    cache, outputs = None, []
    for chunk in x.split([4, 5, 1, 1], dim=1):
        y, cache = layer(chunk, cache)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), want)
    assert [c.shape for c in cache] == [(2, 11, 20), (2, 11, 10)]


@pytest.fixture(scope="module")
def deepseek():
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as peer

    config = peer.DeepseekV32Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=12,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        index_n_heads=16,
        index_head_dim=10,
        index_topk=4,
        attn_implementation="sdpa",
    )
    return lambda: peer.DeepseekV32Attention(config, layer_idx=0)


def test_agrees_with_transformers_with_copied_weights(deepseek):
    layer, theirs, x = parts(), deepseek(), randn(2, 11, 32)
    # its own norm rounds to float32, whatever it is given
    theirs.q_a_layernorm = torch.nn.RMSNorm(12, eps=1e-6)
    theirs.kv_a_layernorm = torch.nn.RMSNorm(16, eps=1e-6)
    theirs.to(DEVICE, torch.float64).load_state_dict(
        {
            **layer.mla.state_dict(),
            **{
                f"indexer.{n}": w for n, w in layer.indexer.state_dict().items()
            },
        }
    )
    p = torch.arange(11, dtype=torch.float64, device=DEVICE)
    angles = torch.stack((p, p / 100), dim=-1).repeat(1, 2)[None]
    seen = causal_mask(11, 11, x.device)
    tables = angles.cos(), angles.sin()
    want, _ = theirs(x, tables, seen[None, None].expand(2, 1, -1, -1))
    # sums of at most 32 products, seven in a row, all of sizes near 1
    bound = {"rtol": 0, "atol": 7 * 32 * 10 * EPS}
    torch.testing.assert_close(layer(x)[0], want, **bound)

    def neighbours(q, cos, sin):  # MLA's layout in the indexer
        turned, rest = q.split((4, q.shape[-1] - 4), dim=-1)
        return torch.cat((rotate_interleaved(turned, cos, sin), rest), -1)

    def at_the_end(q, cos, sin):
        return LightningIndexer._turn(layer.indexer, q.roll(4, -1), cos, sin)

    for wrong in (neighbours, at_the_end):
        layer.indexer._turn = wrong
        assert (layer(x)[0] - want).abs().max() > 1e-3


def test_each_loss_trains_its_own_part():
    layer, x = parts(), randn(1, 6, 32).requires_grad_()
    layer(x)[0].square().sum().backward()
    assert all(p.grad is None for p in layer.indexer.parameters())

    layer.zero_grad()
    seen = causal_mask(6, 6, x.device)
    scores, _ = layer.indexer(x.detach(), layer.mla.compress_query(x).detach())
    indexer_loss(scores, randn(1, 4, 6, 6).softmax(-1) * seen, seen).backward()
    assert all(p.grad is not None for p in layer.indexer.parameters())
    assert all(p.grad is None for p in layer.mla.parameters())


def test_loss_is_a_divergence_with_the_slope_of_a_cross_entropy():
    seen = causal_mask(5, 8, torch.device(DEVICE))
    logits = randn(2, 3, 5, 8).masked_fill(~seen, -math.inf)
    weights, scores = logits.softmax(-1), randn(2, 5, 8).requires_grad_()
    loss = indexer_loss(scores, weights, seen)

    target = weights.mean(dim=1)
    own = scores.masked_fill(~seen, -math.inf).softmax(-1)
    want = [
        math.fsum(
            p * math.log(p / r) for p, r in zip(ps, rs, strict=True) if p > 0
        )
        for ps, rs in zip(
            target.flatten(0, 1).tolist(),
            own.flatten(0, 1).tolist(),
            strict=True,
        )
    ]
    assert loss.item() == pytest.approx(math.fsum(want) / 10, abs=1e-13)
    (slope,) = torch.autograd.grad(loss, scores)
    torch.testing.assert_close(slope, (own.detach() - target) / 10)


def test_cost_counts_what_pytorch_counts():
    S, K, H, R, Dr, Hi, Di = 20, 6, 4, 16, 4, 3, 10
    cost = sparse_cost(S, K, H, R, Dr, Hi, Di)

    def flops(function, *args):
        with FlopCounterMode(display=False) as counter:
            function(*args)
        return counter.get_total_flops() / 1e6

    q, k, weights = randn(1, Hi, 1, Di), randn(1, S, Di), randn(1, 1, Hi)
    # a product a head and token adds up the heads: not counted
    adding = 2 * Hi * S / 1e6
    got = flops(index_scores, q, k, weights)
    assert got == pytest.approx(cost.index_mflop + adding)

    q, cache, up = randn(1, H, 1, 8 + Dr), randn(1, S, R + Dr), randn(H, 14, R)
    into_the_latent_space = 2 * H * 14 * R / 1e6
    for keys, want in ((S, cost.dense_mflop), (K, cost.chosen_mflop)):
        some = gather(cache, torch.arange(keys, device=DEVICE)[None, None])
        mask = torch.ones(1, keys, dtype=torch.bool, device=DEVICE)
        got = flops(absorbed_attention, q, some, up, mask)
        assert got == pytest.approx(want + into_the_latent_space)


def test_numbers_of_the_page():
    def sparse_is_cheaper(tokens):
        return sparse_cost(tokens).fewer_flop > 1

    assert not sparse_is_cheaper(2176)
    assert sparse_is_cheaper(2177)
    assert sparse_cost().break_even == 2176
    here = sparse_cost(34_816)
    assert here.index_mflop == here.chosen_mflop
    assert round(sparse_cost().fewer_flop, 1) == 13.4
    assert sparse_cost(index_n_heads=2000).break_even is None
    chart = sparse_chart(**CONTEXTS["32K tokens"])
    assert {point.x for point in chart.points} == {32_768}


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        select(randn(1, 1, 1), 0, torch.ones(1, 1).bool())
    with pytest.raises(ValueError, match="tokens, block and near"):
        block_pattern(8, 2, 0, 1, DEVICE)
    q, k, v, chosen, valid = inputs(SHAPES[0])
    with pytest.raises(ValueError, match=r"expected chosen \(B, T, K\)"):
        sparse_attention(q, k, v, chosen[:, 1:], valid[:, 1:])
    with pytest.raises(ValueError, match="rope_size must be even"):
        LightningIndexer(32, 12, 3, 10, rope_size=3)
    with pytest.raises(ValueError, match="heads must be at least 1, got 0"):
        sparse_cost(heads=0)
