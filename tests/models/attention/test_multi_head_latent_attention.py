import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from warpmap import DEVICE
from warpmap.inference.decoding.kv_cache_size import values_per_token
from warpmap.models.attention._latent_cost import (
    STEPS,
    latent_chart,
    latent_cost,
)
from warpmap.models.attention.grouped_query_attention import causal_mask
from warpmap.models.attention.multi_head_latent_attention import (
    MultiHeadLatentAttention,
    absorbed_attention,
    expanded_attention,
)

FORMS = [expanded_attention, absorbed_attention]
EPS = torch.finfo(torch.float64).eps
# (B, H, T, S, Dn, Dr, Dv, R): whole text, chunk, one token, odd, one of each
SHAPES = [
    (2, 4, 9, 9, 8, 4, 8, 16),
    (1, 3, 4, 11, 6, 2, 5, 7),
    (2, 8, 1, 33, 16, 8, 12, 24),
    (1, 1, 1, 1, 1, 2, 1, 1),
]


def inputs(shape):
    B, H, T, S, Dn, Dr, Dv, R = shape
    sizes = [(B, H, T, Dn + Dr), (B, S, R + Dr), (H, Dn + Dv, R)]
    q, cache, up = (
        torch.randn(n, dtype=torch.float64, device=DEVICE) for n in sizes
    )
    return q, cache, up / math.sqrt(R), causal_mask(T, S, q.device)


def by_head(q, cache, up, mask, Dn):
    """PyTorch's attention, a head at a time."""
    R = up.shape[2]
    latent, turned = cache[..., :R], cache[..., R:]
    heads = []
    for h, w in enumerate(up):
        k = torch.cat((latent @ w[:Dn].T, turned), dim=-1)
        v = latent @ w[Dn:].T
        heads.append(scaled_dot_product_attention(q[:, h], k, v, mask))
    return torch.stack(heads, dim=1)


def assert_equal_but_for_rounding(got, want, inputs):
    """A bound from rounding.

    A sum of n products errs by n EPS of the sum of sizes. Scores are sums
    over R, Dn and Dr, of size at most A; a weight errs by twice its score's
    error; outputs are sums over S and R, of size at most V. Both sides err.
    """
    q, cache, up = (x.abs() for x in inputs[:3])
    R, D, S = up.shape[2], q.shape[3], cache.shape[1]
    widest = torch.einsum("hdr,bsr->bshd", up, cache[..., :R]).amax()
    A = (q.sum(-1).amax() * max(widest, cache.amax())) / math.sqrt(D)
    bound = 2 * EPS * widest * (2 * (R + D + 3) * A + S + R + 10)
    assert bound < 1e-9
    torch.testing.assert_close(got, want, rtol=0, atol=bound.item())


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_torch_head_by_head(form, shape):
    given = inputs(shape)
    leaves = [x.requires_grad_() for x in given[:3]]
    got, want = form(*given), by_head(*given, Dn=shape[4])
    assert_equal_but_for_rounding(got, want, given)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), leaves),
        torch.autograd.grad(want.square().sum(), leaves),
    )


def changed(**changes):
    """A fault: some of the inputs changed before they are used."""
    names = ("q", "cache", "up", "mask")
    return lambda *given: [
        changes.get(name, lambda x: x)(x)
        for name, x in zip(names, given, strict=True)
    ]


FAULTS = {
    "scale of the long vector": changed(q=lambda q: q * math.sqrt(8 / 9)),
    "value before key": changed(up=lambda up: up.roll(1, 1)),
    "heads inside": changed(
        up=lambda up: up.flatten(0, 1).unflatten(0, (-1, 3)).transpose(0, 1)
    ),
    "position first": changed(q=lambda q: q.roll(2, 3)),
    "a token late": changed(cache=lambda cache: cache.roll(1, 1)),
    "the future seen": changed(mask=torch.ones_like),
    "top left mask": changed(mask=lambda mask: torch.ones_like(mask).tril()),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_bound_catches(fault, form):
    shape = SHAPES[1]
    given = inputs(shape)
    want = by_head(*given, Dn=shape[4])
    wrong = form(*FAULTS[fault](*given))
    with pytest.raises(AssertionError):
        assert_equal_but_for_rounding(wrong, want, given)


def layer_of(sizes=(32, 4, 12, 16, 8, 4, 6)):
    layer = MultiHeadLatentAttention(*sizes).to(DEVICE, torch.float64)
    for norm in (layer.q_a_layernorm, layer.kv_a_layernorm):
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
    return layer


@pytest.fixture(scope="module")
def deepseek():
    """Transformers' layer in float64, and its rotary tables."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as peer

    def build(layer, interleave=True):
        config = peer.DeepseekV3Config(
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=12,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=6,
            rope_interleave=interleave,
            attn_implementation="sdpa",
        )
        theirs = peer.DeepseekV3Attention(config, layer_idx=0)
        # its own norm rounds to float32, whatever it is given
        theirs.q_a_layernorm = torch.nn.RMSNorm(12, eps=1e-6)
        theirs.kv_a_layernorm = torch.nn.RMSNorm(16, eps=1e-6)
        theirs.to(DEVICE, torch.float64).load_state_dict(layer.state_dict())

        def run(x):
            T = x.shape[1]
            p = torch.arange(T, dtype=torch.float64, device=DEVICE)
            angles = torch.stack((p, p / 100), dim=-1)  # base 10000
            angles = torch.cat((angles, angles), dim=-1)[None]
            mask = causal_mask(T, T, x.device)[None, None]
            return theirs(x, (angles.cos(), angles.sin()), mask)[0]

        return run

    return build


@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_transformers_with_copied_weights(form, deepseek):
    layer = layer_of()
    x = torch.randn(2, 11, 32, dtype=torch.float64, device=DEVICE)
    got, _ = layer(x, attend=form)
    # sums of at most 32 products, seven in a row, all of sizes near 1
    bound = {"rtol": 0, "atol": 7 * 32 * 10 * EPS}
    torch.testing.assert_close(got, deepseek(layer)(x), **bound)

    halves = deepseek(layer, interleave=False)(x)
    assert (got - halves).abs().max() > 1e-3  # the other layout is caught


@pytest.mark.parametrize("form", FORMS)
def test_decodes_with_a_cache_as_it_does_at_once(form):
    layer = layer_of()
    x = torch.randn(2, 11, 32, dtype=torch.float64, device=DEVICE)
    want, whole = layer(x)
    cache, parts = None, []
    for chunk in x.split([4, 5, 1, 1], dim=1):
        y, cache = layer(chunk, cache, form)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), want)
    torch.testing.assert_close(cache, whole)
    assert cache.shape == (2, 11, 16 + 4)  # whatever the number of heads


def test_only_the_turned_part_knows_the_order():
    q, cache, up, mask = inputs((1, 4, 1, 9, 8, 4, 8, 16))
    shuffled = cache[:, [3, 1, 0, 2, *range(4, 9)]]
    for form in FORMS:  # latent and key move together: nothing changes
        y = form(q, cache, up, mask)
        torch.testing.assert_close(form(q, shuffled, up, mask), y)
    apart = torch.cat((cache[..., :16], shuffled[..., 16:]), dim=-1)
    assert (absorbed_attention(q, apart, up, mask) - y).abs().max() > 1e-3


class NewTensors(TorchDispatchMode):
    """Records how many values each new tensor holds; views are not new."""

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


def test_the_absorbed_form_makes_no_keys_and_copies_no_cache():
    given = inputs((1, 8, 1, 256, 32, 8, 32, 64))
    with NewTensors() as absorbed:
        absorbed_attention(*given)
    assert max(absorbed.sizes) == 8 * 256  # the scores
    with NewTensors() as expanded:
        expanded_attention(*given)
    assert max(expanded.sizes) >= 8 * 256 * (32 + 8)  # the keys


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cost_counts_what_pytorch_counts(shape):
    _, H, T, S, Dn, Dr, Dv, R = shape
    cost = latent_cost(T, S, H, R, Dn, Dr, Dv, bytes_per_value=8)
    given = inputs((1, *shape[1:]))
    for form, gflop in zip(
        FORMS, (cost.expanded_gflop, cost.absorbed_gflop), strict=True
    ):
        with FlopCounterMode(display=False) as counter:
            form(*given)
        assert counter.get_total_flops() == pytest.approx(gflop * 1e9)
    assert cost.absorbed_mib * 2**20 == given[1].nbytes


def test_crossover_is_where_the_counts_cross():
    def expanding_is_cheaper(n):
        cost = latent_cost(new_tokens=n)
        return cost.expanded_gflop < cost.absorbed_gflop

    first = next(n for n in range(1, 8193) if expanding_is_cheaper(n))
    crossover = latent_cost().crossover
    assert first - 1 <= crossover < first == 168
    narrow = latent_cost(8192, kv_lora_rank=64)  # than the heads
    assert narrow.crossover is None
    assert narrow.absorbed_gflop < narrow.expanded_gflop


def test_numbers_of_the_page():
    one, text = latent_cost(), latent_cost(8192)
    assert one.cached_values == values_per_token(0, 0, 512, 64) == 576
    assert one.values_of_heads / one.cached_values == pytest.approx(71.1, 0.01)
    assert one.expanded_gflop / one.absorbed_gflop == pytest.approx(119, 0.01)
    assert text.absorbed_gflop / text.expanded_gflop == pytest.approx(3.3, 0.02)
    assert round(one.flop_per_byte) == 245
    half = latent_cost(heads=64)
    assert half.flop_per_byte == one.flop_per_byte / 2
    assert (one.expanded_mib, one.absorbed_mib) == (1289, 9)


def test_chart_has_a_point_for_what_was_asked():
    chart = latent_chart(**STEPS["a chunk of a prompt"])
    for line, point in zip(chart.lines, chart.points, strict=True):
        assert point.x == 512
        assert (point.x, point.y) in line.points


@pytest.mark.parametrize(
    ("cost", "says"),
    [
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"qk_rope_head_dim": -1}, "qk_rope_head_dim must be at least 0"),
        ({"new_tokens": 9, "tokens": 8}, "new_tokens must be at most tokens"),
    ],
)
def test_bad_numbers_are_named(cost, says):
    with pytest.raises(ValueError, match=says):
        latent_cost(**cost)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("q", "cache", "up"),
    [
        ((2, 4, 1, 6), (2, 3, 12), (5, 9, 10)),  # heads
        ((2, 4, 1, 6), (1, 3, 12), (4, 9, 10)),  # batch
        ((2, 4, 1, 6), (2, 3, 9), (4, 9, 10)),  # a latent that is too narrow
        ((2, 4, 1, 1), (2, 3, 12), (4, 9, 10)),  # a query without position
        ((4, 1, 6), (3, 12), (4, 9, 10)),
    ],
)
def test_bad_shapes_are_named(form, q, cache, up):
    shapes = (torch.ones(n) for n in (q, cache, up))
    with pytest.raises(ValueError, match="got q"):
        form(*shapes, torch.ones(1, 3).bool())


def test_odd_rotary_size_is_named():
    with pytest.raises(ValueError, match="qk_rope_head_dim must be even"):
        layer_of((32, 4, 12, 16, 8, 3, 6))
