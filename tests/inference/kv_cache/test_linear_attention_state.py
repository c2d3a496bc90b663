"""The formula against bytes of states that tiny recurrent layers kept.

Each layer decodes token by token and keeps tensors of constant size. That they
are enough is shown by the parallel form, which sees all tokens at once.
"""

import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import conv1d, normalize, sigmoid, softplus

from warpmap import DEVICE
from warpmap.inference.kv_cache.linear_attention_state import (
    PRESETS,
    crossover_tokens,
    linear_attention_state,
    state_chart,
    state_values,
    tail_values,
)
from warpmap.models.attention.grouped_query_attention import (
    GroupedQueryAttention,
)

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/inference/kv_cache/linear_attention_state.md"

# kinds of layers: how the state decays, whether it corrects what it holds
KINDS = {
    "linear attention": {"decay": None, "delta": False, "normalizer": True},
    "Mamba-2": {"decay": "head", "delta": False, "normalizer": False},
    "gated delta net": {"decay": "head", "delta": True, "normalizer": False},
    "KDA": {"decay": "channel", "delta": True, "normalizer": False},
}


class Tiny:
    """A layer of 4 heads that keeps a state, a tail and nothing else.

    Query and key have 2 heads of 6 values, each shared by two value heads of
    5, so that no two of the sizes are equal by chance.
    """

    H, HK, DK, DV, K, C = 4, 2, 6, 5, 4, 16

    def __init__(self, kind, dtypes=(torch.float64, torch.float64)):
        self.kind = KINDS[kind]
        self.state_dtype, self.tail_dtype = dtypes
        channels = 2 * self.HK * self.DK + self.H * self.DV

        def make(*size):
            x = torch.randn(size, dtype=torch.float64, device=DEVICE)
            return x / math.sqrt(size[-1])

        self.project, self.filter = (
            make(channels, self.C),
            make(channels, self.K),
        )
        self.gate, self.rate = (
            make(self.H * self.DK, self.C),
            make(self.H, self.C),
        )
        self.state = make(self.H, self.DK, self.DV).zero_().to(self.state_dtype)
        self.sum = make(self.H, self.DK).zero_().to(self.state_dtype)
        self.tail = make(self.K - 1, channels).zero_().to(self.tail_dtype)

    def kept(self):
        """All that lives from one token to the next."""
        some = [self.state, self.tail]
        return [*some, self.sum] if self.kind["normalizer"] else some

    def restore(self, kept):
        self.state, self.tail = kept[:2]
        if self.kind["normalizer"]:
            self.sum = kept[2]

    def parts(self, x, mixed):
        """Query, key, value, log of the decay and rate, of T tokens."""
        T = len(x)
        sizes = [self.HK * self.DK, self.HK * self.DK, self.H * self.DV]
        q, k, v = mixed.split(sizes, dim=-1)
        q, k = (a.view(T, self.HK, self.DK) for a in (q, k))
        q, k = (a.repeat_interleave(self.H // self.HK, dim=1) for a in (q, k))
        log_a = -softplus(x @ self.gate.T).view(T, self.H, self.DK) / 4
        if self.kind["decay"] == "head":
            log_a = log_a[..., :1].expand(-1, -1, self.DK)
        elif self.kind["decay"] is None:
            log_a = torch.zeros_like(log_a)
        if self.kind["delta"]:
            k = normalize(k, dim=-1)
        if self.kind["normalizer"]:  # a positive feature map
            q, k = (torch.nn.functional.elu(a) + 1 for a in (q, k))
        return q, k, v.view(T, self.H, self.DV), log_a, sigmoid(x @ self.rate.T)

    def decode(self, x):
        """One token, from what was kept."""
        new = (x @ self.project.T)[None]
        seen = torch.cat([self.tail.double(), new])
        mixed = (seen * self.filter.T).sum(dim=0, keepdim=True)
        self.tail = seen[1:].to(self.tail_dtype)
        q, k, v, log_a, beta = (a[0] for a in self.parts(x[None], mixed))
        state = log_a.exp()[..., None] * self.state.double()
        if self.kind["delta"]:
            held = torch.einsum("hkv,hk->hv", state, k)
            v = beta[:, None] * (v - held)
        state = state + k[..., None] * v[:, None]
        self.state = state.to(self.state_dtype)
        y = torch.einsum("hkv,hk->hv", state, q)
        if self.kind["normalizer"]:
            self.sum = (self.sum.double() + k).to(self.state_dtype)
            y = y / (self.sum.double() * q).sum(dim=-1, keepdim=True)
        return y

    def at_once(self, x):
        """All tokens, each attending to all before it; no state at all."""
        T = len(x)
        inputs = (x @ self.project.T).T[None]
        padded = torch.nn.functional.pad(inputs, (self.K - 1, 0))
        mixed = conv1d(padded, self.filter[:, None], groups=len(self.filter))
        q, k, v, log_a, beta = (
            a.transpose(0, 1) for a in self.parts(x, mixed[0].T)
        )
        so_far = log_a.cumsum(dim=1)
        k_back = k * (-so_far).exp()
        scores = (q * so_far.exp()) @ k_back.mT
        if self.kind["delta"]:
            # what each token writes depends on what earlier ones wrote
            reads = ((k * so_far.exp()) @ k_back.mT).tril(-1)
            one = torch.eye(T, dtype=x.dtype, device=x.device)
            system = one + beta[..., None] * reads
            v = torch.linalg.solve(system, beta[..., None] * v)
        scores = scores.tril()
        y = scores @ v
        if self.kind["normalizer"]:
            y = y / scores.sum(dim=-1, keepdim=True)
        return y.transpose(0, 1)


def nbytes(tensors):
    return sum(t.nbytes for t in tensors)


def shape(kind):
    return {
        "heads": Tiny.H,
        "key_heads": Tiny.HK,
        "key_dim": Tiny.DK,
        "value_dim": Tiny.DV,
        "conv_width": Tiny.K,
        "normalizer": KINDS[kind]["normalizer"],
    }


@pytest.mark.parametrize("kind", KINDS)
def test_state_agrees_with_what_a_layer_kept_and_is_enough(kind):
    layer = Tiny(kind)
    x = torch.randn(9, layer.C, dtype=torch.float64, device=DEVICE)
    want = layer.at_once(x)
    for t in range(9):
        torch.testing.assert_close(layer.decode(x[t]), want[t])
        size = linear_attention_state(
            **shape(kind),
            linear_layers=1,
            full_layers=0,
            tokens=t + 1,
            bytes_per_state_value=8,
            bytes_per_value=8,
        )
        assert size.request_bytes == nbytes(layer.kept())
        assert size.request_bytes == size.fixed_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_state_and_tail_have_their_own_widths(kind):
    layer = Tiny(kind, dtypes=(torch.float32, torch.bfloat16))
    x = torch.randn(3, layer.C, dtype=torch.float64, device=DEVICE)
    for token in x:
        layer.decode(token)
    size = linear_attention_state(**shape(kind), linear_layers=1, tokens=3)
    assert size.fixed_bytes == nbytes(layer.kept())
    assert size.tail_bytes == layer.tail.nbytes


def test_hybrid_agrees_with_filled_caches():
    """Three gated delta nets, then a layer of full attention, twice."""
    stack = [
        GroupedQueryAttention(16, heads=4, kv_heads=2).to(DEVICE)
        if at % 4 == 3
        else Tiny("gated delta net", dtypes=(torch.float32, torch.float32))
        for at in range(8)
    ]
    caches = {}
    for t in range(1, 8):
        for at, layer in enumerate(stack):
            x = torch.randn(16, device=DEVICE)
            if isinstance(layer, Tiny):
                layer.decode(x.double())
                caches[at] = layer.kept()
            else:
                _, caches[at] = layer(x[None, None], caches.get(at))
        size = linear_attention_state(
            **shape("gated delta net"),
            linear_layers=6,
            full_layers=2,
            kv_heads=2,
            head_dim=4,
            kv_lora_rank=0,
            qk_rope_head_dim=0,
            tokens=t,
            bytes_per_value=4,
        )
        assert size.request_bytes == sum(nbytes(c) for c in caches.values())
        # had all eight been like the last
        assert size.all_full_bytes == 8 * nbytes(caches[7])


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_can_go_on_from_a_snapshot(kind):
    layer = Tiny(kind)
    x = torch.randn(8, layer.C, dtype=torch.float64, device=DEVICE)
    want = layer.at_once(x)
    snapshots = {}
    for t in range(8):
        layer.decode(x[t])
        snapshots[t + 1] = [kept.clone() for kept in layer.kept()]
    for start in (2, 5):
        layer.restore(snapshots[start])
        torch.testing.assert_close(layer.decode(x[start]), want[start])


@pytest.mark.parametrize("kind", KINDS)
def test_no_part_of_a_snapshot_can_be_left_out(kind):
    layer = Tiny(kind)
    x = torch.randn(6, layer.C, dtype=torch.float64, device=DEVICE)
    want = layer.at_once(x)
    for token in x[:5]:
        layer.decode(token)
    whole = [kept.clone() for kept in layer.kept()]
    for lost in range(len(whole)):
        layer.restore(
            [
                torch.zeros_like(k) if i == lost else k
                for i, k in enumerate(whole)
            ]
        )
        assert not torch.allclose(layer.decode(x[5]), want[5])


@pytest.mark.parametrize("every", [1, 3, 4, 7, 8])
def test_prefix_agrees_with_snapshots_taken_one_by_one(every):
    layer = Tiny("KDA", dtypes=(torch.float32, torch.bfloat16))
    rows, snapshots, reusable = [], [], 0
    for t in range(1, 8):
        x = torch.randn(layer.C, dtype=torch.float64, device=DEVICE)
        layer.decode(x)
        # latent and rotary key of three MLA layers
        rows.append([torch.zeros(10 + 4, dtype=torch.bfloat16)] * 3)
        if t % every == 0:
            snapshots.append([kept.clone() for kept in layer.kept()])
            reusable = t
        size = linear_attention_state(
            **shape("KDA"),
            linear_layers=1,
            full_layers=3,
            kv_lora_rank=10,
            qk_rope_head_dim=4,
            tokens=t,
            snapshot_tokens=every,
        )
        kept = sum(nbytes(s) for s in snapshots)
        kept += sum(nbytes(row) for row in rows[:reusable])
        assert size.prefix_bytes == kept
        assert (size.snapshots, size.reusable_tokens) == (
            len(snapshots),
            reusable,
        )


def scan(given):
    """First length at which tensors of the hybrid are smaller, by trying."""

    def tensor(*size, width):
        dtype = {1: torch.int8, 2: torch.bfloat16, 4: torch.float32}[width]
        return torch.empty(size, dtype=dtype, device="meta").nbytes

    wide, narrow = given["bytes_per_state_value"], given["bytes_per_value"]
    columns = given["value_dim"] + given["normalizer"]
    linear = tensor(given["heads"], given["key_dim"], columns, width=wide)
    channels = 2 * given["key_heads"] * given["key_dim"]
    channels += given["heads"] * given["value_dim"]
    linear += tensor(max(0, given["conv_width"] - 1), channels, width=narrow)
    for n in range(1, 100_000):
        full = tensor(2, n, given["kv_heads"], given["head_dim"], width=narrow)
        layers = given["linear_layers"] + given["full_layers"]
        hybrid = given["linear_layers"] * linear + given["full_layers"] * full
        if hybrid < layers * full:
            return n
    return None


@pytest.mark.parametrize("seed", range(20))
def test_crossover_agrees_with_a_scan(seed):
    pick = random.Random(seed)
    key_heads = pick.choice([1, 2, 4])
    given = {
        "linear_layers": pick.randint(1, 9),
        "full_layers": pick.randint(0, 4),
        "heads": key_heads * pick.randint(1, 4),
        "key_heads": key_heads,
        "key_dim": pick.randint(1, 20),
        "value_dim": pick.randint(1, 20),
        "conv_width": pick.randint(0, 4),
        "normalizer": pick.random() < 0.5,
        "kv_heads": pick.randint(1, 4),
        "head_dim": pick.randint(1, 16),
        "bytes_per_state_value": pick.choice([2, 4]),
        "bytes_per_value": pick.choice([1, 2]),
    }
    mla = {"kv_lora_rank": 0, "qk_rope_head_dim": 0}
    assert linear_attention_state(**given, **mla).crossover_tokens == scan(
        given
    )


@pytest.mark.parametrize("name", PRESETS)
def test_presets_cross_over_where_they_say(name):
    n = linear_attention_state(**PRESETS[name]).crossover_tokens
    before = linear_attention_state(**PRESETS[name], tokens=n - 1)
    after = linear_attention_state(**PRESETS[name], tokens=n)
    assert before.request_bytes >= before.all_full_bytes
    assert after.request_bytes < after.all_full_bytes


@pytest.mark.parametrize("name", PRESETS)
def test_snapshots_pay_from_the_crossover_on(name):
    """Spaced so far apart, they make the prefix cheaper than full attention."""
    n = linear_attention_state(**PRESETS[name]).crossover_tokens
    for every, pays in ((n - 1, False), (n, True)):
        size = linear_attention_state(
            **PRESETS[name], tokens=5 * every, snapshot_tokens=every
        )
        assert (size.prefix_bytes < size.all_full_bytes) == pays


def test_vllm_s_block_for_qwen_3_5_4b():
    """Its log, https://github.com/vllm-project/vllm/issues/40696.

    Attention pages are made as large as a layer's state: "Setting attention
    block size to 528 tokens", a multiple of 16, and 0.76% are padding.
    """
    size = linear_attention_state(**PRESETS["Qwen3.5 4B"])
    state = size.fixed_bytes / 24
    token = size.bytes_per_token / 8
    block = 16 * math.ceil(state / token / 16)
    assert block == 528
    assert round(100 * (block * token / state - 1), 2) == 0.76


def test_published_saving():
    """Kimi Team 2025: up to 75% less cache, at a million tokens."""
    size = linear_attention_state(
        **PRESETS["Kimi Linear 48B-A3B"], tokens=1_000_000
    )
    assert 0.73 < 1 - size.request_bytes / size.all_full_bytes < 0.75


# values of a layer by mistakes seen in such calculators
FAULTS = {
    "no tail": lambda t: state_values(t.H, t.DK, t.DV),
    "a tail as wide as the filter": lambda t: (
        state_values(t.H, t.DK, t.DV)
        + tail_values(t.H, t.HK, t.DK, t.DV, t.K + 1)
    ),
    "a tail of values only": lambda t: (
        state_values(t.H, t.DK, t.DV) + (t.K - 1) * t.H * t.DV
    ),
    "as many key heads as heads": lambda t: (
        state_values(t.H, t.DK, t.DV) + tail_values(t.H, t.H, t.DK, t.DV, t.K)
    ),
    "a vector a head": lambda t: (
        t.H * t.DK + tail_values(t.H, t.HK, t.DK, t.DV, t.K)
    ),
    "one matrix for all heads": lambda t: (
        t.DK * t.DV + tail_values(t.H, t.HK, t.DK, t.DV, t.K)
    ),
    "a square matrix": lambda t: (
        state_values(t.H, t.DV, t.DV) + tail_values(t.H, t.HK, t.DK, t.DV, t.K)
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kept_state_catches(fault):
    layer = Tiny("gated delta net")
    values = nbytes(layer.kept()) // 8
    assert values == state_values(Tiny.H, Tiny.DK, Tiny.DV) + tail_values(
        Tiny.H, Tiny.HK, Tiny.DK, Tiny.DV, Tiny.K
    )
    assert FAULTS[fault](Tiny) != values


def test_equal_sizes_are_not_yet_smaller():
    assert crossover_tokens(layer_fixed=100, layer_per_token=10) == 11
    assert crossover_tokens(layer_fixed=99, layer_per_token=10) == 10


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"linear_layers": -1}, "linear_layers must be at least 0, got -1"),
        ({"linear_layers": 0, "full_layers": 0}, "linear_layers and full_"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"key_heads": 5}, "key_heads must divide 32 heads, got 5"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"snapshot_tokens": 0}, "snapshot_tokens must be at least 1"),
        ({"kv_lora_rank": 0}, "qk_rope_head_dim belongs to MLA"),
        (
            {"kv_lora_rank": 0, "qk_rope_head_dim": 0, "kv_heads": 0},
            "kv_heads must be at least 1, got 0",
        ),
    ],
)
def test_bad_numbers_are_named(wrong, says):
    with pytest.raises(ValueError, match=says):
        linear_attention_state(**wrong)


def test_without_linear_layers_nothing_crosses():
    size = linear_attention_state(linear_layers=0)
    assert size.crossover_tokens is None
    assert size.request_bytes == size.all_full_bytes
    assert len(state_chart(linear_layers=0).points) == 1


def test_chart_shows_the_request():
    size = linear_attention_state(tokens=5000)
    hybrid, full, prefix = state_chart(tokens=5000).lines
    assert dict(hybrid.points)[5000] * 2**30 == size.request_bytes
    assert dict(full.points)[5000] * 2**30 == size.all_full_bytes
    assert dict(prefix.points)[5000] * 2**30 == size.prefix_bytes
    assert math.isnan(dict(prefix.points)[512])  # no snapshot yet


def test_page_table_agrees():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text("utf-8").splitlines()
        if line.startswith("| ")
    ]
    shown = {row[0].strip("[").partition("]")[0]: row[-4:] for row in rows}
    for name, given in PRESETS.items():
        s = linear_attention_state(**given)
        k_64 = linear_attention_state(**given, tokens=65536)
        assert shown[name] == [
            f"{s.fixed_bytes / 2**20:.1f} MiB",
            f"{s.bytes_per_token / 2**10:.1f} KiB",
            f"{s.crossover_tokens:,}",
            f"{k_64.request_bytes / k_64.all_full_bytes:.1%}",
        ]


def test_runs_without_torch_and_numpy():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from warpmap.inference.kv_cache.linear_attention_state import *\n"
        "print(linear_attention_state().crossover_tokens)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "src",
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "1885"
