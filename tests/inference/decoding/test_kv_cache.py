import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from warpmap import DEVICE
from warpmap.inference.decoding.kv_cache import (
    GrowingCache,
    KVCache,
    RingCache,
    StaticCache,
)
from warpmap.inference.decoding.kv_cache_size import values_per_token
from warpmap.models.foundations.decoder_only import (
    Decoder,
    DecoderConfig,
    MaskingCache,
)

SHAPE = DecoderConfig(50, 16, 2, 4, 2, 24)
T, WINDOW = 13, 5
LENGTHS = (13, 9, 3, 1)  # of the texts of a ragged batch
# prompts and steps, shorter and longer than the window
CHUNKS = [(1,) * 13, (4, *(1,) * 9), (9, 1, 1, 1, 1), (2, 7, 4), (13,)]
# sums of at most 24 terms in 20 products one after another: some 500
# roundings of 1e-16, and room for their growth
ROUNDING = 1e-12


def lively():
    model = Decoder(SHAPE).to(DEVICE, torch.float64).requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.normal_(std=0.3)
    return model


def growing(pads=None, batch=2):
    return GrowingCache(SHAPE.layers, pads, DEVICE)


def static(pads=None, batch=2, cls=StaticCache):
    return cls(SHAPE, batch, T, pads, torch.float64, DEVICE)


def ring(pads=None, batch=2, cls=RingCache):
    return cls(SHAPE, batch, WINDOW, pads, torch.float64, DEVICE)


MAKE = {"growing": growing, "static": static, "ring": ring}


def window_mask(n, window):
    """Which keys each of ``n`` tokens sees, by a loop."""
    seen = torch.zeros(n, n, dtype=torch.bool, device=DEVICE)
    for t in range(n):
        seen[t, max(0, t - window + 1) : t + 1] = True
    return seen


def worst(cache, pads, chunks, window):
    """Largest difference of logits from texts alone without a cache."""
    model = lively()
    B = 2 if pads is None else len(pads)
    tokens = torch.randint(SHAPE.vocab_size, (B, T), device=DEVICE)
    got = torch.cat(
        [model(piece, cache=cache) for piece in tokens.split(chunks, 1)], 1
    )
    assert cache.length == T
    error = scale = 0.0
    for b in range(B):
        pad = 0 if pads is None else int(pads[b])
        alone = tokens[b : b + 1, pad:]
        want = model(alone, mask=window_mask(T - pad, window))[0]
        difference = (got[b, pad:] - want).abs().max().item()
        # NaN is larger than all
        error = max(error, math.inf if difference != difference else difference)
        scale = max(scale, want.abs().max().item())
    return error / scale


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
def test_every_step_equals_texts_without_cache(name, chunks, ragged):
    pads = torch.tensor([T - n for n in LENGTHS]) if ragged else None
    cache = MAKE[name](pads, len(LENGTHS) if ragged else 2)
    assert isinstance(cache, MaskingCache)
    window = WINDOW if name == "ring" else T
    assert worst(cache, pads, chunks, window) < ROUNDING


class LatePosition(GrowingCache):
    def positions(self, T):
        new = torch.arange(self.length, self.length + T, device=self.device)
        return new + (self.length > 0)  # one off, for all but the prompt


class PaddingSeen(StaticCache):
    def mask(self, T):
        pads, self.pads = self.pads, None
        seen, self.pads = super().mask(T), pads
        return seen


class PositionsFromPadding(StaticCache):
    def positions(self, T):
        return torch.arange(self.length, self.length + T, device=self.device)


class SlotBefore(StaticCache):
    def update(self, layer, k, v):
        self.length -= self.length > 0
        return super().update(layer, k, v)


class ValuesShared(GrowingCache):
    def update(self, layer, k, v):
        k, _ = super().update(layer, k, v)
        return k, k


class AdvancesTooSoon(StaticCache):
    def _finish(self, layer, T):
        self.length += T * (layer == 0)


class WritesBeforeReading(RingCache):
    """A long piece written first: its early tokens miss their past."""

    def update(self, layer, k, v):
        for t in range(k.shape[2]):
            slot = (self.length + t) % self.capacity
            self.k[layer][:, :, slot] = k[:, :, t]
            self.v[layer][:, :, slot] = v[:, :, t]
        self._finish(layer, k.shape[2])
        return self.k[layer], self.v[layer]

    def mask(self, T):
        return None


class WiderMask(RingCache):
    @property
    def window(self):
        return self.capacity + 1


class SlotsInOrder(RingCache):
    """Takes the slots for the last tokens, oldest first."""

    def held(self, new=0):
        return super().held(new).sort().values


FAULTS = {
    LatePosition: (lambda c, p, B: c(2, p, DEVICE), False),
    ValuesShared: (lambda c, p, B: c(2, p, DEVICE), False),
    SlotBefore: (lambda c, p, B: static(p, B, c), False),
    AdvancesTooSoon: (lambda c, p, B: static(p, B, c), False),
    PaddingSeen: (lambda c, p, B: static(p, B, c), True),
    PositionsFromPadding: (lambda c, p, B: static(p, B, c), True),
    WritesBeforeReading: (lambda c, p, B: ring(p, B, c), False),
    WiderMask: (lambda c, p, B: ring(p, B, c), True),
    SlotsInOrder: (lambda c, p, B: ring(p, B, c), True),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_wrong_cache_is_caught(fault):
    make, ragged = FAULTS[fault]
    pads = torch.tensor([T - n for n in LENGTHS]) if ragged else None
    window = WINDOW if issubclass(fault, RingCache) else T
    caught = False
    for chunks in CHUNKS:
        cache = make(fault, pads, len(LENGTHS) if ragged else 2)
        try:
            caught |= not worst(cache, pads, chunks, window) < 1e-4
        except (AssertionError, RuntimeError, ValueError):  # of shapes
            caught = True
    # what all positions share does not matter: only distances do
    harmless = fault is PositionsFromPadding
    assert caught != harmless


@pytest.mark.parametrize("name", MAKE)
def test_attention_equals_scaled_dot_product(name):
    """Without a model: grouped heads, every step against all keys."""
    q = torch.randn(2, 4, T, 4, dtype=torch.float64, device=DEVICE)
    k, v = torch.randn(2, 2, 2, T, 4, dtype=torch.float64, device=DEVICE)
    seen = window_mask(T, WINDOW if name == "ring" else T)
    want = scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), attn_mask=seen
    )
    cache = MAKE[name]()
    cache.layers = 1
    for t in range(T):
        mask = cache.mask(1)
        keys, values = cache.update(0, k[:, :, t : t + 1], v[:, :, t : t + 1])
        rows = q[:, :, t].unflatten(1, (2, 2))  # the group as rows
        got = scaled_dot_product_attention(rows, keys, values, attn_mask=mask)
        error = (got.flatten(1, 2) - want[:, :, t]).abs().max()
        assert error < ROUNDING


def test_bytes_are_those_counted():
    a_token = 8 * SHAPE.layers * values_per_token(2, 4, 0, 0)
    model = lively()
    tokens = torch.randint(50, (2, T), device=DEVICE)
    for name, slots in (("growing", 0), ("static", T), ("ring", WINDOW)):
        cache = MAKE[name]()
        assert cache.nbytes == 2 * slots * a_token
        model(tokens, cache=cache)
        held = WINDOW if name == "ring" else T
        assert cache.nbytes == 2 * held * a_token


def test_what_stays_where_it_is():
    """A step of the growing cache moves all; of the others, nothing."""
    model, token = lively(), torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    for name, make in MAKE.items():
        cache = make()
        model(token, cache=cache)
        where = cache.k[0].data_ptr()
        old = cache.k[0]
        model(token, cache=cache)
        moved = cache.k[0].data_ptr() != where
        assert moved == (name == "growing")
        assert (old is cache.k[0]) != moved


def test_the_order_of_slots_does_not_matter():
    model = lively()
    tokens = torch.randint(50, (2, T), device=DEVICE)
    results = []
    for shuffle in (False, True):
        cache = growing()
        model(tokens[:, :-1], cache=cache)
        if shuffle:
            order = torch.randperm(T - 1, device=DEVICE)
            cache.k = [k[:, :, order] for k in cache.k]
            cache.v = [v[:, :, order] for v in cache.v]
        results.append(model(tokens[:, -1:], cache=cache))
    error = (results[0] - results[1]).abs().max()
    assert error < ROUNDING * results[0].abs().max()


def test_a_full_cache_says_so_and_keeps_what_it_has():
    cache = StaticCache(SHAPE, batch=2, capacity=3)
    new = torch.ones(2, 2, 2, 4)
    for layer in range(2):
        cache.update(layer, new, new)
    with pytest.raises(ValueError, match="4 tokens do not fit into a capac"):
        cache.update(0, new, new)
    assert cache.length == 2
    assert cache.k[0].sum() == new.sum()


def test_errors_say_what_came():
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        GrowingCache(layers=0)
    with pytest.raises(ValueError, match="at least 1, got 2 and 0"):
        StaticCache(SHAPE, batch=2, capacity=0)
    with pytest.raises(ValueError, match=r"float32 of shape \(2,\)"):
        KVCache(layers=1, pads=torch.zeros(2))
