"""The formula against bytes of caches that real attention layers filled.

Each tiny layer also shows that its cache is enough: decoding with it gives
what attention over all tokens gives.
"""

import inspect
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from warpmap import DEVICE
from warpmap.inference.decoding.kv_cache_size import (
    GIB,
    MEMORY,
    MODELS,
    PRESETS,
    kv_cache_chart,
    kv_cache_size,
    requests_that_fit,
    tokens_held,
)
from warpmap.models.attention.grouped_query_attention import (
    GroupedQueryAttention,
)

ROOT = Path(__file__).parents[3]


def nbytes(tensors):
    return sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [8, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_heads_agree_with_a_filled_cache(kv_heads, dtype):
    layers = [
        GroupedQueryAttention(64, heads=8, kv_heads=kv_heads).to(DEVICE, dtype)
        for _ in range(3)
    ]
    caches = [None] * 3
    for _ in range(7):  # one token at a time
        x = torch.randn(1, 1, 64, device=DEVICE, dtype=dtype)
        for i, layer in enumerate(layers):
            x, caches[i] = layer(x, caches[i])
    size = kv_cache_size(
        layers=3,
        kv_heads=kv_heads,
        head_dim=8,
        tokens=7,
        bytes_per_value=dtype.itemsize,
        block_tokens=1,
    )
    assert size.bytes_per_request == sum(nbytes(c) for c in caches)
    assert size.bytes_per_token * 7 == size.bytes_per_request


def rotate(x, positions):
    """Rotary embedding of the last dimension, at the given positions."""
    half = x.shape[-1] // 2
    rates = 0.1 ** (torch.arange(half, dtype=x.dtype, device=x.device) / half)
    angles = positions.to(x.dtype)[:, None] * rates
    a, b = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class TinyMLA:
    """Latent attention: 4 heads of 8 + 6 values, a latent of 10 values."""

    H, D, R, DR, C = 4, 8, 10, 6, 32

    def __init__(self):
        def make(*size):
            x = torch.randn(size, dtype=torch.float64, device=DEVICE)
            return x / math.sqrt(size[-1])

        self.q = make(self.H, self.D + self.DR, self.C)
        self.down = make(self.R + self.DR, self.C)
        self.up_k, self.up_v = make(2, self.H, self.D, self.R)
        self.cache = []

    def compress(self, x, start):
        """The latent and the rotary key of new tokens: all that is kept."""
        latent, key = (x @ self.down.T).split([self.R, self.DR], dim=-1)
        positions = torch.arange(len(x), device=x.device) + start
        return latent.contiguous(), rotate(key, positions)

    def queries(self, x, start):
        q = torch.einsum("tc,hdc->htd", x, self.q)
        plain, rotary = q.split([self.D, self.DR], dim=-1)
        positions = torch.arange(len(x), device=x.device) + start
        return plain, rotate(rotary, positions)

    def decode(self, x, start):
        """Attend from one new token to the cache, in the latent space."""
        self.cache.append(self.compress(x, start))
        latent = torch.cat([c[0] for c in self.cache])
        key = torch.cat([c[1] for c in self.cache])
        plain, rotary = self.queries(x, start)
        absorbed = torch.einsum("htd,hdr->htr", plain, self.up_k)
        scores = absorbed @ latent.T + rotary @ key.T
        probs = (scores / math.sqrt(self.D + self.DR)).softmax(dim=-1)
        return torch.einsum("hts,sr,hdr->htd", probs, latent, self.up_v)

    def at_once(self, x):
        """Ordinary multi-head attention over expanded keys and values."""
        latent, key = self.compress(x, 0)
        k = torch.einsum("sr,hdr->hsd", latent, self.up_k)
        v = torch.einsum("sr,hdr->hsd", latent, self.up_v)
        k = torch.cat([k, key.expand(self.H, -1, -1)], dim=-1)
        q = torch.cat(self.queries(x, 0), dim=-1)
        return scaled_dot_product_attention(q, k, v, is_causal=True)


def test_mla_agrees_with_a_filled_cache_that_is_enough():
    layer = TinyMLA()
    x = torch.randn(9, layer.C, dtype=torch.float64, device=DEVICE)
    got = torch.cat([layer.decode(x[t : t + 1], t) for t in range(9)], dim=1)
    torch.testing.assert_close(got, layer.at_once(x))
    size = kv_cache_size(
        layers=1,
        kv_lora_rank=layer.R,
        qk_rope_head_dim=layer.DR,
        tokens=9,
        bytes_per_value=8,
        block_tokens=1,
    )
    assert size.bytes_per_request == sum(nbytes(c) for c in layer.cache)


def test_window_agrees_with_a_rolling_buffer_that_is_enough():
    W, Hkv, D, T = 4, 2, 8, 11
    q = torch.randn(1, 4, T, D, dtype=torch.float64, device=DEVICE)
    k, v = torch.randn(2, 1, Hkv, T, D, dtype=torch.float64, device=DEVICE)
    at = torch.arange(T, device=DEVICE)
    seen = (at[None, :] <= at[:, None]) & (at[None, :] > at[:, None] - W)
    want = scaled_dot_product_attention(
        q, k, v, attn_mask=seen, enable_gqa=True
    )

    buffer = k.new_empty(2, 1, Hkv, W, D)
    for t in range(T):
        buffer[0, :, :, t % W] = k[:, :, t]
        buffer[1, :, :, t % W] = v[:, :, t]
        held = buffer[..., : min(t + 1, W), :]
        got = scaled_dot_product_attention(
            q[:, :, t : t + 1], held[0], held[1], enable_gqa=True
        )
        torch.testing.assert_close(got, want[:, :, t : t + 1])
        size = kv_cache_size(
            layers=1,
            kv_heads=Hkv,
            head_dim=D,
            window=W,
            windowed_layers=1,
            tokens=t + 1,
            bytes_per_value=8,
            block_tokens=1,
        )
        assert size.bytes_per_request == held.numel() * held.element_size()


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 8, 9, 23])
def test_blocks_agree_with_blocks_allocated_on_demand(tokens):
    # 2 full layers and 3 layers that keep 6 tokens, blocks of 4 tokens
    blocks = []
    for window in [None, None, 6, 6, 6]:
        table = []
        for t in range(tokens):
            slot = t if window is None else t % window
            if slot // 4 == len(table):
                table.append(torch.zeros(2, 4, 3, 16, dtype=torch.bfloat16))
        blocks += table
    size = kv_cache_size(
        layers=5,
        kv_heads=3,
        head_dim=16,
        window=6,
        windowed_layers=3,
        tokens=tokens,
        block_tokens=4,
    )
    assert size.bytes_per_request == nbytes(blocks)


@pytest.mark.parametrize("memory", range(0, 40, 3))
def test_requests_agree_with_filling_memory_one_by_one(memory):
    weights, request = 10, 7
    fits, used = 0, weights
    while used + request <= memory:
        fits, used = fits + 1, used + request
    assert requests_that_fit(memory, weights, request) == fits


def test_gib_are_not_gb():
    size = kv_cache_size(memory_gib=2, weights_gib=1)
    assert size.bytes_per_request == 2**30 == GIB
    assert size.requests == 1  # 2 GB minus 1 GB would hold none


def test_published_sizes():
    """DeepSeek-AI 2025, arXiv:2505.09343, table 1, in 1000 bytes, 16 bits."""
    assert kv_cache_size(**MODELS["DeepSeek-V3"]).bytes_per_token == 70_272
    qwen = {"layers": 80, "kv_heads": 8, "head_dim": 128}  # Qwen2.5 72B
    assert kv_cache_size(**qwen).bytes_per_token == 327_680
    llama = {"layers": 126, "kv_heads": 8, "head_dim": 128}  # Llama 3.1 405B
    assert kv_cache_size(**llama).bytes_per_token == 516_096


def test_mla_weighs_as_much_as_two_and_a_quarter_heads():
    """DeepSeek-AI 2024, arXiv:2405.04434, section 2.1.4."""
    mla = kv_cache_size(**MODELS["DeepSeek-V2"]).bytes_per_token
    nine = kv_cache_size(layers=60, kv_heads=9, head_dim=128).bytes_per_token
    assert 4 * mla == nine


# bytes a request, by mistakes seen in such calculators
FAULTS = {
    "keys without values": lambda c: 2 * c["kv_heads"] * 8 * 8,
    "a head for every query": lambda c: 4 * c["heads"] * 8 * 8,
    "no rest of the last block": lambda c: 4 * c["kv_heads"] * 8 * 5,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_filled_blocks_catch(fault):
    c = {"heads": 8, "kv_heads": 2}
    # key and value, 2 blocks of 4 tokens for 5 tokens, 8 values a head
    blocks = torch.zeros(2, 2, 4, 2, 8, dtype=torch.bfloat16)
    size = kv_cache_size(
        layers=1, kv_heads=2, head_dim=8, tokens=5, block_tokens=4
    )
    assert size.bytes_per_request == blocks.nbytes
    assert FAULTS[fault](c) != blocks.nbytes


# values a token of a latent cache, likewise; H heads, R latent, DR rotary
MLA_FAULTS = {
    "a latent a head": lambda H, R, DR: H * R + DR,
    "a rotary key a head": lambda H, R, DR: R + H * DR,
    "no rotary key": lambda H, R, DR: R,
    "latents for key and value": lambda H, R, DR: 2 * R + DR,
}


@pytest.mark.parametrize("fault", MLA_FAULTS)
def test_a_filled_latent_cache_catches(fault):
    layer = TinyMLA()
    x = torch.randn(1, layer.C, dtype=torch.float64, device=DEVICE)
    layer.decode(x, 0)
    values = nbytes(layer.cache[0]) // 8
    assert values == layer.R + layer.DR
    assert MLA_FAULTS[fault](layer.H, layer.R, layer.DR) != values


def test_a_window_longer_than_the_request_changes_nothing():
    assert tokens_held(100, window=4096, block_tokens=16) == 112
    assert tokens_held(0, block_tokens=16) == 0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"tokens": -1}, "tokens must be at least 1, got -1"),
        ({"weights_gib": -1}, "weights_gib must be at least 0"),
        ({"windowed_layers": 33, "window": 9}, "at most 32 layers, got 33"),
        ({"window": 4096}, "got 4096 and 0"),
        ({"windowed_layers": 4}, "got 0 and 4"),
        ({"qk_rope_head_dim": 64}, "needs kv_lora_rank"),
    ],
)
def test_bad_numbers_are_named(wrong, says):
    with pytest.raises(ValueError, match=says):
        kv_cache_size(**wrong)


def test_nothing_fits_beside_weights_that_do_not_fit():
    assert kv_cache_size(memory_gib=80, weights_gib=132).requests == 0


DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(kv_cache_size).parameters.items()
}


def test_chart_counts_what_fits_and_no_more():
    chart = kv_cache_chart(**DEFAULTS)
    free = 65 * 2**30
    for line, width in zip(chart.lines, (2, 1), strict=True):
        assert line.name == f"{width} byte{'s' * (width == 2)} a value"
        for tokens, fit in line.points:
            request = 32 * 2 * 8 * 128 * width * tokens  # blocks are full
            if math.isnan(fit):
                assert request > free
            else:
                assert fit * request <= free < (fit + 1) * request
    (point,) = chart.points
    assert (point.x, point.y) == (8192, 65)
    assert (8192, 65) in chart.lines[0].points


def test_chart_shows_what_windows_save():
    given = {**DEFAULTS, **MODELS["Mistral 7B v0.1"], "tokens": 100_000}
    kept, _, whole = (
        dict(line.points) for line in kv_cache_chart(**given).lines
    )
    assert {kept[n] for n in kept if n >= 4096} == {130}  # 65 GiB, 512 MiB each
    assert all(kept[n] == whole[n] for n in kept if n <= 4096)
    assert whole[32768] == 16


def test_chart_of_what_does_not_fit_is_empty():
    chart = kv_cache_chart(**{**DEFAULTS, "weights_gib": 81})
    assert all(math.isnan(y) for line in chart.lines for _, y in line.points)


def test_chart_refuses_what_the_calculator_refuses():
    with pytest.raises(ValueError, match="tokens must be at least 1"):
        kv_cache_chart(**{**DEFAULTS, "tokens": 0})


def test_presets_agree_with_the_page_and_set_the_whole_shape():
    for name, shape in MODELS.items():
        want = kv_cache_size(**shape, tokens=100_000)
        preset = {**PRESETS[name], "weights_gib": 15}
        assert kv_cache_size(**preset, tokens=100_000) == want, name
    shape = set(list(DEFAULTS)[:7]) | {"weights_gib"}
    for preset in PRESETS.values():
        assert set(preset) == shape
        kv_cache_size(**preset)
    assert PRESETS["Llama 3 8B"]["weights_gib"] == 15
    assert MEMORY["8 x H200 SXM"] == {"memory_gib": 1123}


def test_runs_without_torch_and_numpy():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from warpmap.inference.decoding.kv_cache_size import kv_cache_size\n"
        "print(kv_cache_size().requests)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "src",
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "65"
