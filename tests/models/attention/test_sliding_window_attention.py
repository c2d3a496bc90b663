"""Against PyTorch with a band mask, against loops, against gradients."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from warpmap import DEVICE
from warpmap.models.attention import _window_reach
from warpmap.models.attention._window_reach import (
    STACKS,
    influence,
    reach_chart,
    window_reach,
)
from warpmap.models.attention.sliding_window_attention import (
    RollingBuffer,
    band_mask,
    sliding_window_attention,
    sliding_window_attention_reference,
)
from warpmap_site.charts import svg
from warpmap_site.traces import impure_imports

# (T, window): a part of a block, whole blocks, one token, one key, wider
SIZES = [(11, 4), (12, 4), (1, 3), (7, 1), (5, 9), (6, 6), (33, 8)]
BOTH = [sliding_window_attention, sliding_window_attention_reference]


def inputs(T, B=2, H=3, D=8, dtype=torch.float64):
    return [torch.randn(B, H, T, D, dtype=dtype, device=DEVICE) for _ in "qkv"]


def band(T, window):
    """The same band, pair by pair."""
    pairs = [[0 <= t - s < window for s in range(T)] for t in range(T)]
    return torch.tensor(pairs, device=DEVICE)


def torch_attention(q, k, v, window):
    """PyTorch's own, with a mask."""
    mask = band(q.shape[2], window)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_agrees_with_torch_in_value_and_gradient(attention, size):
    T, window = size
    leaves = [x.requires_grad_() for x in inputs(T)]
    ours, theirs = attention(*leaves, window), torch_attention(*leaves, window)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad((ours * weights).sum(), leaves),
        torch.autograd.grad((theirs * weights).sum(), leaves),
    )


@pytest.mark.parametrize("chunks", [[1] * 23, [9, 1, 1, 5, 7], [23], [3, 20]])
@pytest.mark.parametrize("window", [1, 4, 6, 40])
def test_the_buffer_decodes_what_torch_computes_at_once(chunks, window):
    q, k, v = inputs(23)
    buffer = RollingBuffer(window)
    parts = [
        buffer.attend(*chunk)
        for chunk in zip(*(x.split(chunks, dim=2) for x in (q, k, v)),
                         strict=True)
    ]  # fmt: skip
    got = torch.cat(parts, dim=2)
    torch.testing.assert_close(got, torch_attention(q, k, v, window))
    assert buffer.k.shape == (2, 3, window, 8)
    # token t lies in slot t % window
    for t in range(max(0, 23 - window), 23):
        assert torch.equal(buffer.k[:, :, t % window], k[:, :, t])
        assert torch.equal(buffer.v[:, :, t % window], v[:, :, t])


def test_the_order_of_slots_does_not_matter():
    q, k, v = inputs(12)
    buffer = RollingBuffer(5)
    for chunk in zip(*(x.split(1, dim=2) for x in (q, k, v)), strict=True):
        got = buffer.attend(*chunk)
    shuffled = torch.randperm(5, device=DEVICE)
    other = scaled_dot_product_attention(
        q[:, :, -1:], buffer.k[:, :, shuffled], buffer.v[:, :, shuffled]
    )
    torch.testing.assert_close(got, other)


class OverwritesFirst(RollingBuffer):
    """Writes a chunk before its first query has seen the oldest key."""

    def attend(self, q, k, v):
        if self.length == 0 or k.shape[2] == 1:
            return super().attend(q, k, v)
        length = self.length
        self._write(k, v)
        self.length = length
        return super().attend(q, k, v)


class KeepsTheFirst(RollingBuffer):
    """Stops writing when it is full."""

    def _write(self, k, v):
        if self.length < self.window:
            return super()._write(k, v)
        self.length += k.shape[2]


class ReadsEmptySlots(RollingBuffer):
    """Takes slots that were never written for keys."""

    def attend(self, q, k, v):
        first = self.length == 0
        y = super().attend(q, k, v)
        return scaled_dot_product_attention(q, self.k, self.v) if first else y


@pytest.mark.parametrize(
    "wrong", [OverwritesFirst, KeepsTheFirst, ReadsEmptySlots]
)
def test_wrong_buffers_are_caught(wrong):
    q, k, v = inputs(12)
    chunks = [1, 5, 3, 1, 1, 1]
    buffer = wrong(4)
    parts = [
        buffer.attend(*chunk)
        for chunk in zip(*(x.split(chunks, dim=2) for x in (q, k, v)),
                         strict=True)
    ]  # fmt: skip
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(
            torch.cat(parts, dim=2), torch_attention(q, k, v, 4)
        )


def blocks(q, k, v, window, seen):
    """The blocked version with another mask for its blocks."""
    D = q.shape[-1]
    pad = torch.nn.functional.pad
    q = q.unflatten(2, (-1, window))
    k = pad(k, (0, 0, window, 0)).unfold(2, 2 * window, window)
    v = pad(v, (0, 0, window, 0)).unfold(2, 2 * window, window)
    scores = (q @ k / math.sqrt(D)).masked_fill(~seen.to(q.device), -math.inf)
    return (scores.softmax(dim=-1) @ v.mT).flatten(2, 3)


def test_wrong_bands_are_caught():
    q, k, v = inputs(12)
    want = torch_attention(q, k, v, 4)
    one_more, one_less = (
        torch_attention(q, k, v, 5),
        torch_attention(q, k, v, 3),
    )
    whole = scaled_dot_product_attention(q, k, v, is_causal=True)
    # sees the zeros before the text
    padding_seen = blocks(q, k, v, 4, band_mask(4, 8, 4).expand(3, 4, 8))
    for wrong in (one_more, one_less, whole, padding_seen):
        assert not torch.allclose(wrong, want, atol=1e-3)


def test_the_band_is_that_of_transformers():
    from transformers.masking_utils import sliding_window_causal_mask_function

    sees = sliding_window_causal_mask_function(4)
    query, key = torch.meshgrid(
        torch.arange(11), torch.arange(11), indexing="ij"
    )
    theirs = sees(0, 0, query, key).to(DEVICE)
    assert torch.equal(band_mask(11, 11, 4).to(DEVICE), theirs)
    assert torch.equal(band_mask(3, 11, 4).to(DEVICE), theirs[-3:])


def test_work_grows_with_the_window_and_not_with_the_square():
    def work(attention, T, window):
        with FlopCounterMode(display=False) as counter:
            attention(*inputs(T, B=1, H=2), window)
        return counter.get_total_flops()

    T, W, H, D = 64, 8, 2, 8
    assert work(sliding_window_attention, T, W) == 2 * 4 * H * T * W * D
    assert work(sliding_window_attention, 2 * T, W) == 4 * 4 * H * T * W * D
    assert work(BOTH[1], T, W) == 4 * H * T * T * D


def stack(x, layers, window, even=False):
    for _ in range(layers):
        key = 0 * x if even else x
        x = x / 2 + sliding_window_attention(key, key, x, window) / 2
    return x


@pytest.mark.parametrize(
    ("layers", "window"), [(1, 5), (3, 4), (4, 5), (5, 2), (2, 1)]
)
def test_the_receptive_field_is_layers_times_window(layers, window):
    x = torch.rand(1, 1, 24, 4, dtype=torch.float64, requires_grad=True)
    stack(x, layers, window)[:, :, -1].sum().backward()
    seen = x.grad[0, 0].abs().sum(dim=-1).flip(0) > 0  # by distance
    farthest = window_reach(layers, window).farthest
    assert farthest == layers * (window - 1)
    assert seen.tolist() == [d <= farthest for d in range(24)]


@pytest.mark.parametrize(("layers", "window"), [(1, 5), (3, 4), (4, 5), (6, 3)])
def test_influence_is_the_gradient_under_even_weights(layers, window):
    T = layers * (window - 1) + 3
    # far from the start of the text, where windows are shorter
    x = torch.zeros(1, 1, 2 * T, 1, dtype=torch.float64, requires_grad=True)
    stack(x, layers, window, even=True)[:, :, -1].sum().backward()
    shares = influence(layers, window, residual=0.5)
    got = x.grad.flatten().flip(0)[: len(shares)]
    torch.testing.assert_close(
        got, torch.tensor(shares, dtype=torch.float64), rtol=1e-12, atol=1e-15
    )
    # without the residual stream, or counted in another order, it is not
    for wrong in (influence(layers, window, residual=0.0), shares[::-1]):
        assert not torch.allclose(got, torch.tensor(wrong).double())
    reach = window_reach(layers, window, residual=0.5)
    mean = sum(d * share for d, share in enumerate(shares))
    assert reach.mean == pytest.approx(mean, rel=1e-12)
    assert sum(shares[: reach.half]) < 0.5 <= sum(shares[: reach.half + 1])
    assert sum(shares[: reach.most]) < 0.99 <= sum(shares[: reach.most + 1])


def test_coarse_steps_count_what_fine_ones_do(monkeypatch):
    coarse = window_reach(layers=6, window=512)
    monkeypatch.setattr(_window_reach, "FINE", 512)
    fine = window_reach(layers=6, window=512)
    assert coarse.half == pytest.approx(fine.half, abs=512 / 64)
    assert coarse.most == pytest.approx(fine.most, rel=0.02)


def test_mistral_sees_far_and_not_much():
    mistral = window_reach(**STACKS["Mistral 7B v0.1"])
    assert mistral.farthest == 131_040
    assert mistral.most < 0.4 * mistral.farthest
    assert svg(reach_chart(32, 4096, 0.5)).startswith("<svg")
    assert impure_imports("warpmap.models.attention._window_reach") == []


def test_bad_input_is_named():
    x = torch.ones(1, 1, 3, 2)
    for refused in (band_mask, RollingBuffer, sliding_window_attention):
        given = {band_mask: (3, 3, 0), RollingBuffer: (0,)}
        with pytest.raises(ValueError, match="window must be at least 1"):
            refused(*given.get(refused, (x, x, x, 0)))
    with pytest.raises(ValueError, match=r"one shape \(B, H, T, D\)"):
        sliding_window_attention(x[:, :, :1], x, x, 2)
    for name, bad in {"layers": 0, "window": 0, "residual": 1.0}.items():
        with pytest.raises(ValueError, match=f"{name} must be"):
            window_reach(**{name: bad})
