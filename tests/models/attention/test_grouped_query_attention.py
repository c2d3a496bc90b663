import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from warpmap import DEVICE
from warpmap.models.attention.grouped_query_attention import (
    GroupedQueryAttention,
    grouped_query_attention,
    grouped_query_attention_reference,
    mean_pool_heads,
)

# (B, H, Hkv, T, S, D): MHA, GQA, MQA, no cache, chunk, one new token, odd sizes
SHAPES = [
    (2, 4, 4, 5, 5, 8),
    (2, 8, 2, 7, 7, 16),
    (1, 8, 1, 3, 9, 8),
    (3, 6, 2, 1, 33, 5),
    (1, 1, 1, 1, 1, 1),
]
BOTH = [grouped_query_attention_reference, grouped_query_attention]


def inputs(shape, dtype=torch.float32):
    B, H, Hkv, T, S, D = shape
    sizes = [(B, H, T, D), (B, Hkv, S, D), (B, Hkv, S, D)]
    return [torch.randn(n, dtype=dtype, device=DEVICE) for n in sizes]


def brute_force(q, k, v):
    """One query, one key at a time, in Python floats; no masks, no reshape."""
    B, H, T, D = q.shape
    Hkv, S = k.shape[1:3]
    out = torch.zeros(B, H, T, D, dtype=torch.float64)
    q, k, v = q.tolist(), k.tolist(), v.tolist()
    for b in range(B):
        for h in range(H):
            kv = h * Hkv // H
            for t in range(T):
                now = S - T + t
                dots = [
                    math.fsum(
                        x * y for x, y in zip(q[b][h][t], key, strict=True)
                    )
                    for key in k[b][kv][: now + 1]
                ]
                exps = [math.exp(d / math.sqrt(D)) for d in dots]
                for d in range(D):
                    out[b, h, t, d] = math.fsum(
                        e * v[b][kv][s][d] for s, e in enumerate(exps)
                    ) / math.fsum(exps)
    return out


def torch_attention(q, k, v):
    """PyTorch's own, told that the queries are the last of the tokens."""
    T, S = q.shape[2], k.shape[2]
    now = torch.arange(S - T, S, device=q.device)[:, None]
    seen = torch.arange(S, device=q.device)[None, :] <= now
    return scaled_dot_product_attention(
        q, k, v, attn_mask=seen, enable_gqa=True
    )


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_brute_force_in_float64(attention, shape):
    q, k, v = inputs(shape, torch.float64)
    torch.testing.assert_close(attention(q, k, v).cpu(), brute_force(q, k, v))


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_torch(attention, shape):
    q, k, v = inputs(shape)
    torch.testing.assert_close(attention(q, k, v), torch_attention(q, k, v))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_agree_with_torch_and_with_finite_differences(shape):
    leaves = [x.requires_grad_() for x in inputs(shape, torch.float64)]
    weights = torch.randn_like(leaves[0])
    ours = (grouped_query_attention(*leaves) * weights).sum()
    theirs = (torch_attention(*leaves) * weights).sum()
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)
    )
    if leaves[1].numel() < 100:  # gradcheck runs twice a value
        assert torch.autograd.gradcheck(grouped_query_attention, leaves)


def faults():
    """Wrong attentions, each right where its own mistake does not matter."""

    def tiled(q, k, v):
        G = q.shape[1] // k.shape[1]
        k, v = k.repeat(1, G, 1, 1), v.repeat(1, G, 1, 1)
        return grouped_query_attention_reference(q, k, v)

    def aligned_top_left(q, k, v):
        return scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )

    def sees_the_future(q, k, v):
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def blind_to_itself(q, k, v):
        T, S = q.shape[2], k.shape[2]
        seen = torch.ones(T, S, dtype=torch.bool, device=q.device)
        return scaled_dot_product_attention(
            q, k, v, attn_mask=seen.tril(S - T - 1), enable_gqa=True
        )

    def unscaled(q, k, v):
        return grouped_query_attention_reference(
            q * math.sqrt(q.shape[-1]), k, v
        )

    def first_head_only(q, k, v):
        return grouped_query_attention_reference(q, k[:, :1], v[:, :1])

    return [
        tiled,
        aligned_top_left,
        sees_the_future,
        blind_to_itself,
        unscaled,
        first_head_only,
    ]


@pytest.mark.parametrize("fault", faults(), ids=lambda f: f.__name__)
def test_checks_catch(fault):
    q, k, v = inputs((1, 4, 2, 3, 6, 4), torch.float64)
    wrong = fault(q, k, v)
    assert wrong.shape == q.shape
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrong.cpu(), brute_force(q, k, v))


def test_torch_is_causal_lets_a_new_token_see_only_the_first_key():
    """The trap that the page warns of; fails once PyTorch changes it."""
    q, k, v = inputs((1, 4, 2, 1, 9, 8))
    wrong = scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    first = v[:, :, :1].repeat_interleave(2, dim=1)
    torch.testing.assert_close(wrong, first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", BOTH)
def test_half_precision_errs_no_more_than_rounding_explains(attention, dtype):
    q, k, v = inputs((2, 8, 2, 16, 300, 64), dtype)
    got = attention(q, k, v).double()
    exact = torch_attention(q.double(), k.double(), v.double())
    # u is half a unit in the last place. Rounding the query, then the score,
    # moves a score by at most u (|q| . |k| + |score|), which changes a weight
    # by twice that factor; weight and output are rounded once each.
    u = torch.finfo(dtype).eps / 2
    wide = k.double().repeat_interleave(4, dim=1)
    dots = q.double().abs() @ wide.abs().mT / math.sqrt(64)
    score = 2 * u * dots.amax()
    spread = torch_attention(q.double(), k.double(), v.double().abs())
    bound = (2 * score + 3 * u) * spread
    assert ((got - exact).abs() <= bound).all()
    # and the bound has teeth
    assert ((torch.zeros_like(exact) - exact).abs() > bound).any()
    rolled = attention(q, k.roll(1, dims=2), v).double()
    assert ((rolled - exact).abs() > bound).any()


class NewTensors(TorchDispatchMode):
    """Notes how many values each new tensor holds; views are not new."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {
            a.untyped_storage().data_ptr() for a in args if torch.is_tensor(a)
        }
        for t in out if isinstance(out, tuple | list) else [out]:
            if torch.is_tensor(t) and t.untyped_storage().data_ptr() not in old:
                self.sizes.append(t.numel())
        return out


def broadcast_attention(q, k, v):
    """Grouped, but leaving the group to matmul's broadcasting."""
    B, H, T, D = q.shape
    q = q.view(B, k.shape[1], -1, T, D) / math.sqrt(D)
    probs = (q @ k[:, :, None].mT).softmax(dim=-1)
    return (probs @ v[:, :, None]).reshape(B, H, T, D)


def test_no_key_or_value_is_copied():
    q, k, v = inputs((1, 8, 2, 1, 512, 64))

    def largest(attention):
        with NewTensors() as new:
            attention(q, k, v)
        return max(new.sizes)

    # the largest new tensor holds the scores: one query a head, 512 keys
    assert largest(grouped_query_attention) == 8 * 512
    assert largest(grouped_query_attention_reference) == 4 * k.numel()
    assert largest(broadcast_attention) == 4 * k.numel()


def test_a_view_of_a_larger_cache_is_read_in_place():
    q, k, v = inputs((1, 8, 2, 1, 512, 64))
    want = torch_attention(q, k[:, :, :300], v[:, :, :300])
    with NewTensors() as new:
        got = grouped_query_attention(q, k[:, :, :300], v[:, :, :300])
    torch.testing.assert_close(got, want)
    assert max(new.sizes) == 8 * 300


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_layer_decodes_with_a_cache_as_it_does_at_once(kv_heads):
    layer = GroupedQueryAttention(64, heads=8, kv_heads=kv_heads).to(DEVICE)
    x = torch.randn(2, 11, 64, device=DEVICE)

    def heads(y, n):
        return y.unflatten(-1, (n, 8)).transpose(1, 2)

    want = scaled_dot_product_attention(
        heads(x @ layer.q_proj.weight.T, 8),
        heads(x @ layer.k_proj.weight.T, kv_heads),
        heads(x @ layer.v_proj.weight.T, kv_heads),
        is_causal=True,
        enable_gqa=True,
    )
    want = want.transpose(1, 2).flatten(2) @ layer.o_proj.weight.T

    cache, parts = None, []
    for chunk in x.split([4, 5, 1, 1], dim=1):
        y, cache = layer(chunk, cache)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), want)


@pytest.mark.parametrize("kv_heads", [8, 4, 2, 1])
def test_cached_bytes_fall_with_the_number_of_heads(kv_heads):
    layer = GroupedQueryAttention(64, heads=8, kv_heads=kv_heads).to(DEVICE)
    _, cache = layer(torch.randn(3, 5, 64, device=DEVICE))
    # keys and values, 3 requests, 5 tokens, 8 values of 4 bytes a head
    assert sum(t.nbytes for t in cache) == 2 * 3 * 5 * kv_heads * 8 * 4


def test_pooling_identical_heads_keeps_the_output():
    mha = GroupedQueryAttention(64, heads=8, kv_heads=8).to(DEVICE)
    with torch.no_grad():
        for projection in (mha.k_proj, mha.v_proj):
            heads = projection.weight.view(8, 8, 64)
            heads.copy_(heads[::4].repeat_interleave(4, dim=0))
    x = torch.randn(2, 9, 64, device=DEVICE)
    torch.testing.assert_close(mha.pooled(2)(x)[0], mha(x)[0])


def test_pooling_different_heads_does_not():
    mha = GroupedQueryAttention(64, heads=8, kv_heads=8).to(DEVICE)
    x = torch.randn(2, 9, 64, device=DEVICE)
    assert not torch.allclose(mha.pooled(2)(x)[0], mha(x)[0], atol=1e-3)
    torch.testing.assert_close(mha.pooled(8)(x)[0], mha(x)[0])


def test_the_mean_is_the_nearest_shared_head():
    weight = torch.randn(8 * 4, 16, dtype=torch.float64)
    heads = weight.view(2, 4, 4, 16)
    pooled = mean_pool_heads(weight, heads=8, kv_heads=2).view(2, 1, 4, 16)
    torch.testing.assert_close(pooled[1, 0], sum(heads[1]) / 4)
    # the squared distance has no slope there
    shared = pooled.clone().requires_grad_()
    (slope,) = torch.autograd.grad((heads - shared).square().sum(), shared)
    torch.testing.assert_close(slope, torch.zeros_like(slope))
    # pooling heads 0, 2, 4, 6 together is caught
    mixed = weight.view(4, 2, 4, 16).mean(dim=0).view(2, 1, 4, 16)
    (slope,) = torch.autograd.grad(
        (heads - mixed.requires_grad_()).square().sum(), mixed
    )
    assert slope.abs().max() > 0.1


@pytest.mark.parametrize("shape", [(0, 4, 2, 1, 3, 8), (2, 4, 2, 0, 3, 8)])
def test_nothing_in_nothing_out(shape):
    q, k, v = inputs(shape)
    assert grouped_query_attention(q, k, v).shape == q.shape


def test_strided_inputs():
    q, k, v = inputs((2, 8, 2, 5, 9, 16))
    strided = [
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)
    ]
    torch.testing.assert_close(
        grouped_query_attention(*strided), torch_attention(q, k, v)
    )


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((1, 6, 1, 8), (1, 4, 3, 8), (1, 4, 3, 8)),  # 4 does not divide 6
        ((1, 4, 1, 8), (1, 0, 3, 8), (1, 0, 3, 8)),
        ((1, 4, 4, 8), (1, 2, 3, 8), (1, 2, 3, 8)),  # more queries than keys
        ((1, 4, 1, 8), (2, 2, 3, 8), (2, 2, 3, 8)),
        ((1, 4, 1, 8), (1, 2, 3, 4), (1, 2, 3, 4)),
        ((1, 4, 1, 8), (1, 2, 3, 8), (1, 2, 2, 8)),
        ((4, 1, 8), (2, 3, 8), (2, 3, 8)),
    ],
)
def test_bad_shapes_are_named(q, k, v):
    with pytest.raises(ValueError, match="got q"):
        grouped_query_attention(torch.ones(q), torch.ones(k), torch.ones(v))


def test_bad_head_counts_are_named():
    with pytest.raises(ValueError, match="multiple of kv_heads 3"):
        GroupedQueryAttention(64, heads=8, kv_heads=3)
    with pytest.raises(ValueError, match="into 3 heads"):
        mean_pool_heads(torch.ones(8, 4), heads=8, kv_heads=3)
