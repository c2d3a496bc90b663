import inspect
import math

import pytest
import torch

from warpmap import DEVICE
from warpmap.models.foundations.attention import MultiHeadAttention, attention
from warpmap.models.positions._position_layers import (
    T5Bias,
    alibi_bias,
    offsets,
    shaw_bias,
    sinusoidal_table,
)
from warpmap.models.positions.position_embedding import (
    alibi_slopes,
    seen_chart,
    seen_from,
    shaw_index,
    sinusoidal,
    t5_bucket,
)

DEFAULTS = {
    n: p.default for n, p in inspect.signature(seen_from).parameters.items()
}
BUCKETS = [
    (32, 128, True), (32, 128, False), (64, 256, True), (8, 20, False),
    (4, 9, True), (8, 1000, False), (320, 800, False),
]  # fmt: skip


# -- attention without positions -----------------------------------------------


def layer():
    return MultiHeadAttention(8, heads=2).double().to(DEVICE)


def tokens(n):
    return torch.randn(1, n, 8, dtype=torch.float64, device=DEVICE)


# sums of at most 8 terms of sizes below 10, in another order
ORDER = {"rtol": 0, "atol": 1e-13}


def test_shuffled_tokens_give_shuffled_outputs():
    x, net = tokens(6), layer()
    shuffle = torch.tensor([3, 0, 5, 1, 4, 2], device=DEVICE)
    torch.testing.assert_close(net(x[:, shuffle]), net(x)[:, shuffle], **ORDER)
    # with sinusoids they do not
    place = sinusoidal_table(6, 8).to(DEVICE)
    moved = net(x[:, shuffle] + place) - net(x + place)[:, shuffle]
    assert moved.abs().max() > 1e-3


def test_under_a_causal_mask_only_a_second_layer_knows_the_order():
    x, first, second = tokens(6), layer(), layer()
    swap = torch.tensor([1, 0, 2, 3, 4, 5], device=DEVICE)
    seen = torch.ones(6, 6, dtype=torch.bool, device=DEVICE).tril()
    one, other = first(x, mask=seen), first(x[:, swap], mask=seen)
    torch.testing.assert_close(other[:, 2:], one[:, 2:], **ORDER)
    two = second(one, mask=seen) - second(other, mask=seen)
    assert two[:, -1].abs().max() > 1e-6


# -- sinusoids -----------------------------------------------------------------


def test_sinusoids_are_the_papers_formula():
    table = sinusoidal_table(50, 12)
    p, i = torch.meshgrid(
        torch.arange(50.0, dtype=torch.float64),
        torch.arange(6.0, dtype=torch.float64),
        indexing="ij",
    )
    angles = p * torch.exp(-i * 2 / 12 * math.log(10000))
    # an angle of up to 49 carries a few roundings
    near = {"rtol": 0, "atol": 50 * 4 * 2**-52}
    torch.testing.assert_close(table[:, 0::2], angles.sin(), **near)
    torch.testing.assert_close(table[:, 1::2], angles.cos(), **near)


@pytest.mark.parametrize("step", [1, 7, -3])
def test_one_matrix_moves_every_position_by_as_much(step):
    table = sinusoidal_table(40, 12)
    turn = torch.zeros(12, 12, dtype=torch.float64)
    for i in range(6):
        a = step / 10000 ** (2 * i / 12)
        block = [[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]]
        rows = slice(2 * i, 2 * i + 2)
        turn[rows, rows] = torch.tensor(block, dtype=torch.float64)
    here = torch.arange(10, 30)
    moved = table[here] @ turn.T
    # angles of up to 40, with a few roundings each
    near = {"rtol": 0, "atol": 40 * 8 * 2**-52}
    torch.testing.assert_close(moved, table[here + step], **near)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(moved, table[here - step], **near)


def test_products_of_sinusoids_depend_on_the_distance_only():
    table = sinusoidal_table(64, 16)
    fits = table @ table.T
    for distance in (0, 1, 13):
        along = fits.diagonal(distance)
        want = sum(math.cos(distance / 10000 ** (i / 8)) for i in range(8))
        assert (along - want).abs().max() < 64 * 16 * 2**-52
    shown = seen_from(distance=13, width=16).sinusoidal_fit
    assert abs(shown - fits.diagonal(13)[0].item() / 8) < 1e-13


# -- Shaw ----------------------------------------------------------------------


def shaw_by_hand(q, k, v, table, limit, index=shaw_index):
    """The paper's: a key of its own for each pair."""
    T, S = q.shape[2], k.shape[2]
    rows = [[index(s - (S - T + t), limit) for s in range(S)] for t in range(T)]
    moved = table[torch.tensor(rows, device=q.device)]  # (T, S, D)
    keys = k[:, :, None] + moved  # (B, H, T, S, D)
    scores = (keys @ q[..., None]).squeeze(-1) / math.sqrt(q.shape[-1])
    return scores.softmax(dim=-1) @ v


@pytest.mark.parametrize(("T", "S", "limit"), [(5, 5, 2), (2, 9, 3), (4, 4, 0)])
def test_shaw_is_a_key_for_each_pair(T, S, limit):
    q = torch.randn(2, 3, T, 4, dtype=torch.float64, device=DEVICE)
    k, v = torch.randn(2, 2, 3, S, 4, dtype=torch.float64, device=DEVICE)
    table = torch.randn(2 * limit + 1, 4, dtype=torch.float64, device=DEVICE)
    got = attention(q, k, v, shaw_bias(q, table, S))
    want = shaw_by_hand(q, k, v, table, limit)
    # scores stay below 20, of 4 terms; a mean of S values below 5
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    if limit:
        for wrong in (
            lambda offset, limit: shaw_index(-offset, limit),
            lambda offset, limit: shaw_index(offset, limit - 1),
        ):
            bad = shaw_by_hand(q, k, v, table, limit, wrong)
            assert (bad - want).abs().max() > 1e-3


# -- T5 ------------------------------------------------------------------------


def bucket_in_integers(offset, buckets, longest, causal):
    """The same without a logarithm, so without rounding."""
    first = 0
    if not causal:
        buckets //= 2
        first = buckets * (offset > 0)
    n = abs(offset) if not causal else max(-offset, 0)
    exact, rest = buckets // 2, buckets - buckets // 2
    if n < exact:
        return first + n
    step = max(
        j for j in range(rest)
        if j == 0 or n**rest * exact**j >= longest**j * exact**rest
    )  # fmt: skip
    return first + exact + step


@pytest.fixture(scope="module")
def peer():
    from transformers.models.t5.modeling_t5 import T5Attention

    return T5Attention._relative_position_bucket


@pytest.mark.parametrize(("buckets", "longest", "causal"), BUCKETS)
def test_t5_buckets_are_those_of_transformers(peer, buckets, longest, causal):
    span = range(-1500, 1 if causal else 1500)
    got = [t5_bucket(o, buckets, longest, causal) for o in span]
    want = peer(torch.tensor(list(span)), not causal, buckets, longest)
    assert got == want.tolist()
    few = [o for o in span if abs(o) < 300 and buckets < 100]
    assert [t5_bucket(o, buckets, longest, causal) for o in few] == [
        bucket_in_integers(o, buckets, longest, causal) for o in few
    ]
    # one more, one fewer, and the other sign are all caught
    assert got != [t5_bucket(o, buckets, longest + longest // 2, causal)
                   for o in span]  # fmt: skip
    assert got != [t5_bucket(-o, buckets, longest, causal) for o in span]


def test_t5_bias_is_its_table_looked_up():
    bias = T5Bias(heads=3, buckets=8, longest=20, causal=False).double()
    torch.nn.init.normal_(bias.table)
    got = bias(T=4, S=30)
    assert got.shape == (3, 4, 30)
    for t in range(4):
        for s in range(30):
            row = t5_bucket(s - (26 + t), 8, 20, causal=False)
            assert (got[:, t, s] == bias.table[row]).all()


# -- ALiBi ---------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2, 5, 8, 12, 16, 112])
def test_alibi_slopes_are_those_of_bloom(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    # BLOOM's bias of the key at 1; its powers are in float32
    want = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    got = torch.tensor(alibi_slopes(heads))
    torch.testing.assert_close(got, want, rtol=heads * 2**-23, atol=0)
    if heads > 1:
        wrong = got.flip(0)
        assert not torch.allclose(wrong, want, rtol=heads * 2**-23, atol=0)


def test_alibi_multiplies_weights_by_a_power_of_the_distance():
    q = torch.zeros(1, 8, 3, 4, dtype=torch.float64, device=DEVICE)
    k = torch.zeros(1, 8, 7, 4, dtype=torch.float64, device=DEVICE)
    v = torch.eye(7, dtype=torch.float64, device=DEVICE).expand(1, 8, 7, 7)
    bias = alibi_bias(8, 3, 7, DEVICE)
    seen = offsets(3, 7, DEVICE) <= 0
    weights = attention(q, k, v, bias.masked_fill(~seen, -math.inf))[0]
    for head, slope in enumerate(alibi_slopes(8)):
        shares = [math.exp(-slope * (6 - s)) for s in range(7)]  # last query
        want = torch.tensor(shares, dtype=torch.float64) / math.fsum(shares)
        torch.testing.assert_close(
            weights[head, -1].cpu(), want, rtol=1e-14, atol=0
        )
    assert (weights[:, 0, 5:] == 0).all()


# -- the calculator, and what is refused ---------------------------------------


def test_what_is_seen_from_afar():
    near, far = seen_from(distance=100), seen_from(distance=110)
    assert near.t5_bucket == far.t5_bucket
    assert near.shaw_vector == far.shaw_vector == 0
    alike = [d for d in range(128) if t5_bucket(-d) == near.t5_bucket]
    assert near.t5_alike == len(alike)
    assert seen_from(distance=200).t5_alike is None
    steep = seen_from(distance=100, head=1)
    assert steep.alibi_factor == math.exp(-50)
    chart = seen_chart(**DEFAULTS)
    assert [point.y for point in chart.points] == [
        near.sinusoidal_fit,
        near.alibi_factor,
    ]
    assert all(line.points[0] == (0, 1) for line in chart.lines)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: sinusoidal(0, 5), "width must be even, from 2, got 5"),
        (lambda: sinusoidal(0, 4, base=1), "base must be above 1, got 1"),
        (lambda: shaw_index(0, -1), "limit must be at least 0, got -1"),
        (lambda: t5_bucket(0, 7), "buckets must be a multiple of 2, got 7"),
        (lambda: t5_bucket(0, 6, causal=False), "multiple of 4, got 6"),
        (lambda: t5_bucket(0, 32, 16), "longest must be above 16, got 16"),
        (lambda: T5Bias(4, buckets=3), "buckets must be a multiple of 2"),
        (lambda: alibi_slopes(0), "heads must be at least 1, got 0"),
        (lambda: offsets(3, 2, DEVICE), "as many queries as keys, 3 > 2"),
        (lambda: seen_from(distance=-1), "distance must be 0 to 1000000"),
        (lambda: seen_from(head=9), "head must be 1 to 8, got 9"),
        (lambda: seen_from(width=10**6), "width must be 2 to 8192"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
