import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from warpmap import DEVICE
from warpmap.models.foundations._attention_by_hand import (
    SENTENCE,
    attend,
    attention_trace,
)
from warpmap.models.foundations.attention import (
    MultiHeadAttention,
    attention,
    attention_weights,
)

# (B, H, T, S, D): square, more keys, more queries, one of all, odd sizes
SHAPES = [
    (2, 4, 5, 5, 8),
    (1, 2, 3, 9, 16),
    (3, 1, 7, 2, 5),
    (1, 1, 1, 1, 1),
    (2, 3, 1, 33, 3),
]
MASKS = ["none", "causal", "padding", "bias"]


def inputs(shape, dtype=torch.float64):
    B, H, T, S, D = shape
    sizes = [(B, H, T, D), (B, H, S, D), (B, H, S, D)]
    return [torch.randn(n, dtype=dtype, device=DEVICE) for n in sizes]


def make_mask(kind, shape):
    B, H, T, S, _ = shape
    if kind == "causal":  # the first query sees the first key at least
        seen = torch.ones(T, S, dtype=torch.bool, device=DEVICE)
        return seen.tril(max(S - T, 0))
    if kind == "padding":  # the last keys of all but the first text
        lengths = [max(S - b, 1) for b in range(B)]
        ends = torch.tensor(lengths, device=DEVICE)[:, None, None, None]
        return torch.arange(S, device=DEVICE) < ends
    if kind == "bias":
        bias = torch.randn(H, T, S, dtype=torch.float64, device=DEVICE)
        bias[:, :, 1:] = bias[:, :, 1:].masked_fill(
            bias[:, :, 1:] > 1, -math.inf
        )
        return bias
    return None


def by_hand(q, k, v, mask=None):
    """The page's plain Python, one query at a time, in double precision."""
    B, H, T, _ = q.shape
    bias = torch.zeros(B, H, T, k.shape[2], dtype=torch.float64)
    if mask is not None and mask.dtype == torch.bool:
        bias = bias.masked_fill(~mask.cpu(), -math.inf)
    elif mask is not None:
        bias = bias + mask.cpu()
    rows = [
        attend(q[b, h, t].tolist(), k[b, h].tolist(), v[b, h].tolist(),
               bias[b, h, t].tolist())
        for b in range(B) for h in range(H) for t in range(T)
    ]  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64).view(B, H, T, -1)


def rounding(q, k, v, mask=None):
    """How far apart two right answers in float64 may lie.

    A score is a sum of D products, scaled and shifted: at most (D + 3) u of
    the sum of their sizes. An error e in all scores changes a weight by a
    factor of at most exp(2 e); exp, the sum of S weights, the quotient and
    the last sum of S products add 2 S + 8 roundings. Both sides err.
    """
    u = torch.finfo(torch.float64).eps / 2
    D, S = q.shape[-1], k.shape[2]
    sizes = q.abs() @ k.abs().mT / math.sqrt(D)
    if mask is not None and mask.is_floating_point():
        sizes = sizes + mask.abs().nan_to_num(posinf=0)
    e = (D + 3) * u * sizes.amax(dim=-1, keepdim=True)
    largest = v.abs().amax(dim=2, keepdim=True)  # a mean is no larger
    return (2 * (2 * e + (2 * S + 8) * u) * largest).cpu()


def check(got, want, bound):
    assert got.shape == want.shape
    assert ((got.cpu() - want.cpu()).abs() <= bound).all()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_plain_python_and_with_torch(shape, kind):
    q, k, v = inputs(shape)
    mask = make_mask(kind, shape)
    got, bound = attention(q, k, v, mask), rounding(q, k, v, mask)
    check(got, by_hand(q, k, v, mask), bound)
    with sdpa_kernel(SDPBackend.MATH):
        want = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    check(got, want, bound)


def faults():
    def softmax(scores, mask):
        return scores.masked_fill(~mask, -math.inf).softmax(dim=-1)

    def unscaled(q, k, v, mask):
        return softmax(q @ k.mT, mask) @ v

    def divided_by_size(q, k, v, mask):
        return softmax(q @ k.mT / q.shape[-1], mask) @ v

    def softmax_over_queries(q, k, v, mask):
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -1e9)
        return scores.softmax(dim=-2) @ v

    def masked_after_softmax(q, k, v, mask):
        return (attention_weights(q, k) * mask) @ v

    def mask_inverted(q, k, v, mask):
        return attention(q, k, v, ~mask)

    def mask_added(q, k, v, mask):
        return attention(q, k, v, mask.double())

    def keys_for_values(q, k, v, mask):
        return attention(q, k, k, mask)

    def blind_to_itself(q, k, v, mask):
        return attention(q, k, v, mask.tril(-1))

    def heads_mixed(q, k, v, mask):
        return attention(q, k.roll(1, dims=1), v, mask)

    return [f for name, f in locals().items() if name != "softmax"]


@pytest.mark.parametrize("fault", faults(), ids=lambda f: f.__name__)
def test_checks_catch(fault):
    shape = (2, 4, 5, 5, 8)
    q, k, v = inputs(shape)
    mask = make_mask("causal", shape)
    with pytest.raises(AssertionError):
        check(fault(q, k, v, mask), by_hand(q, k, v, mask), rounding(q, k, v))


@pytest.mark.parametrize("kind", ["none", "bias"])
def test_gradients_are_those_of_finite_differences(kind):
    shape = (1, 2, 2, 3, 2)
    leaves = [x.requires_grad_() for x in inputs(shape)]
    mask = make_mask(kind, shape)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, mask), leaves)


@pytest.mark.parametrize("as_bias", [False, True])
def test_a_query_that_sees_nothing_gets_nothing_and_breaks_nothing(as_bias):
    q, k, v = (x.requires_grad_() for x in inputs((1, 2, 3, 4, 8)))
    mask = torch.ones(3, 4, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    if as_bias:
        mask = torch.zeros(3, 4, device=DEVICE).masked_fill(~mask, -math.inf)
    out = attention(q, k, v, mask)
    assert (out[:, :, 1] == 0).all()
    assert torch.isfinite(out).all()
    out.sum().backward()
    for x in (q, k, v):
        assert torch.isfinite(x.grad).all()
    # the textbook's softmax divides 0 by 0
    assert torch.full((4,), -math.inf).softmax(dim=0).isnan().all()
    # no keys at all: the same
    assert (attention(q, k[:, :, :0], v[:, :, :0]) == 0).all()


def test_no_gradient_comes_back_from_the_future():
    x = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    layer = MultiHeadAttention(8, heads=2).double()
    seen = torch.ones(6, 6, dtype=torch.bool).tril()

    def reach(mask):  # row t: which inputs move output t
        y = layer(x, mask=mask)
        rows = [torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)[0]
                for t in range(6)]  # fmt: skip
        return torch.stack([row[0].abs().sum(-1) > 0 for row in rows])

    assert (reach(seen) == seen).all()
    assert reach(None).all()


def test_weights_are_a_mean():
    q, k, v = inputs((2, 3, 7, 9, 8))
    weights = attention_weights(q, k)
    assert (weights > 0).all()
    torch.testing.assert_close(
        weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=0, atol=1e-14
    )
    out = attention(q, k, v)
    assert (out <= v.amax(2, keepdim=True)).all()
    assert (out >= v.amin(2, keepdim=True)).all()


def test_a_context_told_twice_says_the_same():
    q, k, v = inputs((1, 2, 3, 5, 8))
    twice = [torch.cat([x, x], dim=2) for x in (k, v)]
    check(attention(q, *twice), attention(q, k, v), rounding(q, *twice))


@pytest.mark.parametrize("D", [4, 64, 512])
def test_scores_spread_by_the_root_of_the_head_size_without_scaling(D):
    n = 5_000
    q, k = torch.randn(2, n, D, dtype=torch.float64)
    scores = (q * k).sum(-1)
    # a fourth moment of 3 + 6 / D: five standard errors of a variance
    slack = 5 * math.sqrt((2 + 6 / D) / n)
    assert abs(scores.var().item() / D - 1) < slack
    assert abs((scores / math.sqrt(D)).var().item() - 1) < slack


def test_without_scaling_one_key_takes_nearly_all():
    q, k = torch.randn(2, 1, 1, 256, 512, dtype=torch.float64)
    scaled = attention_weights(q, k).amax(-1).mean()
    unscaled = (q @ k.mT).softmax(-1).amax(-1).mean()
    assert unscaled > 0.85
    assert scaled < 0.1


def test_tied_queries_and_keys_make_scores_symmetric():
    x = torch.randn(1, 1, 6, 16, dtype=torch.float64)
    wq, wk = torch.randn(2, 16, 4, dtype=torch.float64)

    def scores(wq, wk):
        return (x @ wq) @ (x @ wk).mT

    tied, untied = scores(wq, wq), scores(wq, wk)
    torch.testing.assert_close(tied, tied.mT, rtol=0, atol=1e-12)
    assert (untied - untied.mT).abs().max() > 1


@pytest.mark.parametrize("cross", [False, True])
def test_layer_agrees_with_torchs(cross):
    ours = MultiHeadAttention(12, heads=3).double()
    theirs = torch.nn.MultiheadAttention(
        12, 3, bias=False, batch_first=True, dtype=torch.float64
    )
    parts = (ours.q_proj, ours.k_proj, ours.v_proj)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
        theirs.out_proj.weight.copy_(ours.o_proj.weight)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    context = torch.randn(2, 7, 12, dtype=torch.float64) if cross else x
    want, weights = theirs(x, context, context, average_attn_weights=False)
    got = ours(x, context) if cross else ours(x)
    # |x| and all sums stay below 100, of at most 12 terms, four in a row
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    q = ours._split(ours.q_proj(x))
    k = ours._split(ours.k_proj(context))
    torch.testing.assert_close(
        attention_weights(q, k), weights, rtol=0, atol=1e-13
    )
    # heads cut without the transpose fit every shape, and are wrong
    ours._split = lambda x: x.reshape(x.shape[0], 3, -1, 4)
    assert (ours(x, context) - want).abs().max() > 1e-3


def test_torchs_two_masks_are_opposite():
    """The trap that the page warns of; fails once PyTorch changes it."""
    net = torch.nn.MultiheadAttention(4, 1, batch_first=True)
    x = torch.randn(1, 3, 4)
    last_only = torch.tensor([[False, False, True]]).expand(3, 3)
    _, weights = net(x, x, x, attn_mask=last_only)
    assert (weights[..., 2] == 0).all()
    x = x[:, None]
    seen = scaled_dot_product_attention(x, x, x, attn_mask=last_only)
    torch.testing.assert_close(seen, x[:, :, 2:].expand_as(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_errs_no_more_than_rounding_explains(dtype):
    q, k, v = inputs((2, 4, 16, 200, 64), dtype)
    got = attention(q, k, v).double()
    with sdpa_kernel(SDPBackend.MATH):
        exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    # rounding the query, then the score, moves a score by at most
    # u (|q| . |k| + |score|); weight and output are rounded once each
    u = torch.finfo(dtype).eps / 2
    score = 2 * u * (q.double().abs() @ k.double().abs().mT / 8).amax()
    spread = attention(q.double(), k.double(), v.double().abs())
    bound = (2 * score + 3 * u) * spread
    assert ((got - exact).abs() <= bound).all()
    rolled = attention(q, k.roll(1, dims=2), v).double()
    assert ((rolled - exact).abs() > bound).any()


@pytest.mark.parametrize(
    ("q", "k", "v", "mask", "says"),
    [
        ((2, 3, 8), (2, 4, 8), (2, 4, 8), None, "expected (B, H, tokens, D)"),
        ((1, 2, 3, 8), (1, 2, 4, 6), (1, 2, 4, 8), None, "one B, H and D"),
        ((1, 4, 3, 8), (1, 2, 4, 8), (1, 2, 4, 8), None, "one B, H and D"),
        ((1, 2, 3, 8), (1, 2, 4, 8), (1, 2, 5, 8), None, "value for each key"),
        ((1, 2, 3, 8), (1, 2, 4, 8), (1, 2, 4, 8), (4, 3), "broadcasts to"),
        ((1, 2, 3, 8), (1, 2, 4, 8), (1, 2, 4, 8), (2, 1, 3, 4), "(1, 2, 3,"),
    ],
)  # fmt: skip
def test_bad_shapes_are_named(q, k, v, mask, says):
    mask = None if mask is None else torch.ones(mask, dtype=torch.bool)
    with pytest.raises(ValueError, match="expected") as error:
        attention(torch.ones(q), torch.ones(k), torch.ones(v), mask)
    assert says in str(error.value)


def test_masks_of_integers_and_odd_widths_are_refused():
    x = torch.ones(1, 1, 2, 4)
    with pytest.raises(ValueError, match=r"torch.int64: zeros and ones"):
        attention(x, x, x, torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="width must be a multiple of heads"):
        MultiHeadAttention(10, heads=4)
    with pytest.raises(ValueError, match="bias must leave the query a key"):
        attend([1.0], [[1.0]], [[1.0]], bias=[-math.inf])


@pytest.mark.parametrize("asking", list(SENTENCE))
@pytest.mark.parametrize("causal", [True, False])
def test_trace_shows_what_attention_returns(asking, causal):
    queries, keys, values = (
        torch.tensor(column, dtype=torch.float64)[None, None]
        for column in zip(*SENTENCE.values(), strict=True)
    )
    mask = torch.ones(4, 4, dtype=torch.bool).tril() if causal else None
    want = attention(queries, keys, values, mask)[0, 0]
    at = list(SENTENCE).index(asking)
    last = attention_trace(asking, causal)[-1]
    output = last.picture.rows[-1][1][at].text
    assert output == " ".join(f"{x:.1f}" for x in want[at].tolist())
    assert output in last.caption


def test_recording_changes_nothing():
    steps = []
    given = ([1.0, 2.0], [[1.0, 0.5], [0.25, 4.0]], [[1.0], [3.0]])
    silent = attend(*given)
    told = attend(*given, record=lambda step, at, x: steps.append((step, at)))
    assert told == silent
    assert steps == [("score", 0), ("score", 1), ("exp", 1), ("weight", 1),
                     ("mix", 0), ("mix", 1)]  # fmt: skip
    with pytest.raises(ValueError, match="asking must be one of"):
        attention_trace("birds")
