import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu

from warpmap.models.configs import MODELS, ModelConfig, config
from warpmap.models.foundations.parameter_count import (
    PRESETS,
    ParameterCount,
    count,
    parameter_chart,
    parameter_count,
)

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/models/foundations/parameter_count.md"


# A decoder in PyTorch that runs, written from the papers, not the formulas.
# Without rotary embeddings, masks and load balancing: they hold no parameters.


class Grouped(nn.Module):
    def __init__(self, c):
        super().__init__()
        H, Hkv, D, C = c.heads, c.kv_heads, c.head_dim, c.hidden_size
        self.H, self.Hkv, self.D = H, Hkv, D
        self.q = nn.Linear(C, H * D, bias=c.attention_bias)
        self.k = nn.Linear(C, Hkv * D, bias=c.attention_bias)
        self.v = nn.Linear(C, Hkv * D, bias=c.attention_bias)
        self.out = nn.Linear(H * D, C, bias=c.output_bias)
        self.q_norm = nn.RMSNorm(D) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(D) if c.qk_norm else nn.Identity()
        self.sinks = nn.Parameter(torch.zeros(H)) if c.attention_sinks else None

    def forward(self, x):
        T = len(x)
        q = self.q_norm(self.q(x).view(T, self.H, self.D)).transpose(0, 1)
        k = self.k_norm(self.k(x).view(T, self.Hkv, self.D)).transpose(0, 1)
        v = self.v(x).view(T, self.Hkv, self.D).transpose(0, 1)
        k, v = (a.repeat_interleave(self.H // self.Hkv, dim=0) for a in (k, v))
        scores = q @ k.mT / math.sqrt(self.D)
        if self.sinks is not None:  # a logit that takes weight, and no value
            sinks = self.sinks[:, None, None].expand(-1, T, 1)
            scores = torch.cat([scores, sinks], dim=-1)
        probs = scores.softmax(dim=-1)[..., :T]
        return self.out((probs @ v).transpose(0, 1).reshape(T, -1))


class Latent(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, H, C = c, c.heads, c.hidden_size
        queries = H * (c.qk_nope_head_dim + c.qk_rope_head_dim)
        if c.q_lora_rank:
            self.q = nn.Sequential(
                nn.Linear(C, c.q_lora_rank, bias=False),
                nn.RMSNorm(c.q_lora_rank),
                nn.Linear(c.q_lora_rank, queries, bias=False),
            )
        else:
            self.q = nn.Linear(C, queries, bias=False)
        self.latent = nn.Linear(C, c.kv_lora_rank, bias=False)
        self.rotary_key = nn.Linear(C, c.qk_rope_head_dim, bias=False)
        self.kv_norm = nn.RMSNorm(c.kv_lora_rank)
        self.up_k = nn.Linear(
            c.kv_lora_rank, H * c.qk_nope_head_dim, bias=False
        )
        self.up_v = nn.Linear(c.kv_lora_rank, H * c.v_head_dim, bias=False)
        self.out = nn.Linear(H * c.v_head_dim, C, bias=c.output_bias)

    def forward(self, x):
        T, H = len(x), self.c.heads
        latent = self.kv_norm(self.latent(x))
        shared = self.rotary_key(x)[:, None].expand(-1, H, -1)
        k = torch.cat([self.up_k(latent).view(T, H, -1), shared], dim=-1)
        q, v = self.q(x).view(T, H, -1), self.up_v(latent).view(T, H, -1)
        q, k, v = (a.transpose(0, 1) for a in (q, k, v))
        y = scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(0, 1).reshape(T, -1))


class FFN(nn.Module):
    def __init__(self, C, width):
        super().__init__()
        self.gate = nn.Linear(C, width, bias=False)
        self.up = nn.Linear(C, width, bias=False)
        self.down = nn.Linear(width, C, bias=False)

    def forward(self, x):
        return self.down(silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """Experts of a layer, stacked, so that large models are quickly made."""

    def __init__(self, c):
        super().__init__()
        E, C, W = c.experts, c.hidden_size, c.moe_intermediate_size
        self.k = c.experts_per_token
        self.router = nn.Linear(C, E, bias=c.router_bias)
        self.expert_up = nn.Parameter(torch.randn(E, 2 * W, C))
        self.expert_down = nn.Parameter(torch.randn(E, C, W))
        self.bias = c.expert_bias
        if self.bias:
            self.expert_up_bias = nn.Parameter(torch.randn(E, 2 * W))
            self.expert_down_bias = nn.Parameter(torch.randn(E, C))
        self.shared = nn.ModuleList(FFN(C, W) for _ in range(c.shared_experts))

    def forward(self, x):
        y = sum((ffn(x) for ffn in self.shared), torch.zeros_like(x))
        weights, chosen = self.router(x).softmax(dim=-1).topk(self.k)
        for t in range(len(x)):
            for weight, e in zip(weights[t], chosen[t].tolist(), strict=True):
                h = self.expert_up[e] @ x[t]
                if self.bias:
                    h = h + self.expert_up_bias[e]
                gate, up = h.chunk(2)
                out = self.expert_down[e] @ (silu(gate) * up)
                if self.bias:
                    out = out + self.expert_down_bias[e]
                y[t] = y[t] + weight * out
        return y


class Layer(nn.Module):
    def __init__(self, c, has_experts):
        super().__init__()
        C = c.hidden_size
        self.norm_1, self.norm_2 = nn.RMSNorm(C), nn.RMSNorm(C)
        self.attention = Latent(c) if c.kv_lora_rank else Grouped(c)
        self.ffn = Experts(c) if has_experts else FFN(C, c.intermediate_size)

    def forward(self, x):
        x = x + self.attention(self.norm_1(x))
        return x + self.ffn(self.norm_2(x))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(
            Layer(c, bool(c.experts) and i >= c.dense_layers)
            for i in range(c.layers)
        )
        self.last_norm = nn.RMSNorm(c.hidden_size)
        self.head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tied_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.last_norm(x))


class Predictor(nn.Module):
    """DeepSeek-V3's module for the next but one token, figure 3 there."""

    def __init__(self, c):
        super().__init__()
        C = c.hidden_size
        self.norms = nn.ModuleList(nn.RMSNorm(C) for _ in range(3))
        self.join = nn.Linear(2 * C, C, bias=False)
        self.layer = Layer(c, bool(c.experts))


def part_of(name):
    words = {
        "embedding.": "embeddings",
        "norm": "norms",
        "attention.q.1.": "norms",  # of MLA's compressed query
        "attention.": "attention",
        "router": "routers",
        "shared.": "shared_experts",
        "expert_": "routed_experts",
        "ffn.": "dense_ffn",
        "head.": "head",
    }
    return next(part for word, part in words.items() if word in name)


def counted(model):
    """Parameters of a module, in all and by part; shared ones once."""
    fields = [f.name for f in dataclasses.fields(ParameterCount)]
    result = dict.fromkeys(fields, 0)
    for name, p in model.named_parameters():
        result[part_of(name)] += p.numel()
        result["total"] += p.numel()
    return result


# every feature once, no two sizes equal
TINY = {
    "dense": {"intermediate_size": 10},
    "tied": {"intermediate_size": 10, "tied_embeddings": True},
    "biases, norms, sinks": {
        "intermediate_size": 10,
        "attention_bias": True,
        "output_bias": True,
        "qk_norm": True,
        "attention_sinks": True,
    },
    "experts": {
        "experts": 5,
        "experts_per_token": 2,
        "moe_intermediate_size": 7,
    },
    "experts with everything": {
        "intermediate_size": 10,
        "experts": 5,
        "experts_per_token": 3,
        "moe_intermediate_size": 7,
        "shared_experts": 2,
        "dense_layers": 1,
        "router_bias": True,
        "expert_bias": False,
    },
    "biased experts": {
        "experts": 5,
        "experts_per_token": 2,
        "moe_intermediate_size": 7,
        "router_bias": True,
        "expert_bias": True,
    },
    "latent": {
        "intermediate_size": 10,
        "q_lora_rank": 11,
        "kv_lora_rank": 9,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 5,
    },
    "latent, query whole": {
        "intermediate_size": 10,
        "kv_lora_rank": 9,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 5,
        "output_bias": True,
    },
}


def tiny(features):
    grouped = {} if "kv_lora_rank" in features else {"head_dim": 6}
    return ModelConfig(
        name="tiny",
        source=("", ""),
        layers=3,
        hidden_size=12,
        heads=4,
        kv_heads=2,
        vocab_size=31,
        max_context=16,
        **grouped,
        **features,
    )


@pytest.mark.parametrize("features", TINY)
def test_parts_agree_with_a_model_that_runs(features):
    c = tiny(TINY[features])
    model = Decoder(c)
    assert model(torch.tensor([3, 1, 4])).shape == (3, 31)
    got, want = dataclasses.asdict(count(c)), counted(model)
    for part in ("total", *set(map(part_of, dict(model.named_parameters())))):
        assert got[part] == want[part], part


@pytest.mark.parametrize("features", TINY)
def test_active_is_what_one_token_reaches(features):
    """Backward from one token: what has a gradient took part."""
    c = tiny(TINY[features])
    model = Decoder(c)
    model(torch.tensor([7])).square().sum().backward()
    reached = 0
    for name, p in model.named_parameters():
        if name == "embedding.weight" and not c.tied_embeddings:
            rows = p.grad.flatten(1).any(dim=1).sum().item()
            assert rows == 1  # looked up, not multiplied
        elif part_of(name) == "routed_experts":
            each = p.grad.flatten(1).any(dim=1).sum().item()
            assert each == c.experts_per_token
            reached += each * p[0].numel()
        else:
            assert p.grad is not None
            reached += p.numel()
    n = count(c)
    assert n.active == reached
    table = 0 if c.tied_embeddings else 31 * 12
    assert n.active_with_embeddings == reached + table


@pytest.mark.parametrize("name", MODELS)
def test_parts_agree_with_the_model_on_no_device(name):
    c = config(name)
    with torch.device("meta"):
        want = counted(Decoder(c))
    got = dataclasses.asdict(count(c))
    for part in want.keys() - {
        "active",
        "active_with_embeddings",
        "non_embedding",
        "chosen_experts",
        "extra_predictors",
    }:
        assert got[part] == want[part], part


def test_extra_predictor_agrees_with_a_module_and_the_checkpoint():
    c = config("DeepSeek-V3")
    with torch.device("meta"):
        module = sum(p.numel() for p in Predictor(c).parameters())
    n = count(c)
    assert n.extra_predictors == module
    # the checkpoint stores embedding and head a second time
    assert n.total + module + 2 * n.head == 684_489_845_504


def billions(number, places):
    return round(number / 1e9, places)


def test_mixtral_is_published_with_its_embedding():
    """Mistral AI, 2023: 46.7B in all, 12.9B a token."""
    n = count(config("Mixtral 8x7B"))
    assert billions(n.total, 1) == 46.7
    assert billions(n.active_with_embeddings, 1) == 12.9
    assert billions(n.active, 1) != 12.9


def test_deepseek_v3_is_published_without_its_embedding():
    """DeepSeek-AI, 2024: 671B and 37B; README_WEIGHTS.md says 36.6B."""
    n = count(config("DeepSeek-V3"))
    assert billions(n.total, 0) == 671
    assert billions(n.active, 0) == 37
    assert billions(n.active, 1) == 36.6
    assert billions(n.active_with_embeddings, 0) != 37


@pytest.mark.parametrize(
    ("name", "mlp", "attention", "active", "total"),
    [
        ("gpt-oss 120B", 114.71, 0.96, 5.13, 116.83),
        ("gpt-oss 20B", 19.12, 0.64, 3.61, 20.91),
    ],
)
def test_gpt_oss_agrees_with_its_card(name, mlp, attention, active, total):
    """OpenAI, 2025, arXiv:2508.10925, table 1."""
    n = count(config(name))
    assert billions(n.routed_experts + n.routers, 2) == mlp
    assert billions(n.attention, 2) == attention
    assert billions(n.embeddings + n.head, 2) == 1.16
    assert billions(n.active, 2) == active
    assert billions(n.total, 2) == total


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("Mixtral 8x22B", 141, 39),
        ("DeepSeek-V2", 236, 21),
        ("Qwen3 235B-A22B", 235, 22),
    ],
)
def test_others_fit_either_convention(name, total, active):
    n = count(config(name))
    assert billions(n.total, 0) == total
    assert billions(n.active, 0) == active
    assert billions(n.active_with_embeddings, 0) == active


def test_kaplan_s_estimate():
    """12 L C^2 without embeddings, where H D = C and the FFN is 4 C wide."""
    n = parameter_count(
        layers=24,
        hidden_size=1024,
        heads=16,
        kv_heads=16,
        head_dim=64,
        experts=0,
        intermediate_size=8 * 1024 // 3,  # three matrices in place of two
    )
    assert n.non_embedding == pytest.approx(12 * 24 * 1024**2, rel=1e-3)


# totals by mistakes seen in such counters, for DeepSeek-V3 or Mixtral 8x7B
FAULTS = {
    "experts in every layer": ("DeepSeek-V3", {"dense_layers": 0}),
    "no shared expert": ("DeepSeek-V3", {"shared_experts": 0}),
    "queries not compressed": ("DeepSeek-V3", {"q_lora_rank": 0}),
    "a rotary key a head": ("DeepSeek-V3", {"qk_rope_head_dim": 64 * 128}),
    "no routing correction": ("DeepSeek-V3", {"router_bias": False}),
    "keys for every head": ("Mixtral 8x7B", {"kv_heads": 32}),
    "one table for both ends": ("Mixtral 8x7B", {"tied_embeddings": True}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_published_totals_catch(fault):
    name, wrong = FAULTS[fault]
    n = parameter_count(**{**PRESETS[name], **wrong})
    assert n.total != MODELS[name].published_total


@pytest.mark.parametrize("name", MODELS)
def test_parts_add_up(name):
    n = count(config(name))
    parts = [n.attention, n.dense_ffn, n.routed_experts, n.shared_experts]
    parts += [n.routers, n.norms]
    assert n.non_embedding == sum(parts)
    assert n.total == sum(parts) + n.embeddings + n.head


@pytest.mark.parametrize("name", MODELS)
def test_chart_shows_every_parameter_once(name):
    n = count(config(name))
    everything, one_token = parameter_chart(**PRESETS[name]).bars
    assert sum(b for _, b in everything.parts) == pytest.approx(n.total / 1e9)
    assert sum(b for _, b in one_token.parts) == pytest.approx(n.active / 1e9)
    assert [p for p, _ in everything.parts] == [p for p, _ in one_token.parts]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"kv_heads": 0}, "kv_heads must be at least 1"),
        ({"kv_heads": 5}, "kv_heads must divide 32 heads, got 5"),
        ({"experts": 0}, "intermediate_size must be at least 1, got 0"),
        ({"experts": -1}, "experts must be at least 0, got -1"),
        ({"dense_layers": 1}, "intermediate_size must be at least 1"),
        (
            {"moe_intermediate_size": 0},
            "moe_intermediate_size must be",
        ),
        ({"experts_per_token": 9}, "experts_per_token must be at most 8"),
        (
            {"dense_layers": 33, "intermediate_size": 9},
            "dense_layers must be at most 32, got 33",
        ),
        ({"kv_lora_rank": 512}, "qk_nope_head_dim must be at least 1"),
    ],
)
def test_bad_numbers_are_named(wrong, says):
    with pytest.raises(ValueError, match=says):
        parameter_count(**wrong)


def test_mla_has_no_such_bias():
    with pytest.raises(ValueError, match="attention_bias is not defined"):
        parameter_count(**{**PRESETS["DeepSeek-V3"], "attention_bias": True})


def test_runs_without_torch_and_numpy():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from warpmap.models.foundations.parameter_count import *\n"
        "print(parameter_count().total)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "src",
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "46702792704"


def test_page_table_agrees():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text("utf-8").splitlines()
        if line.startswith("| ")
    ]
    shown = {row[0]: row[1:4] for row in rows if row[0] in MODELS}
    assert set(shown) == {n for n, c in MODELS.items() if c.experts}
    for name, numbers in shown.items():
        n = count(config(name))
        want = (n.total, n.active, n.active_with_embeddings)
        assert numbers == [f"{each / 1e9:.2f}" for each in want]


def test_a_file_may_store_a_tied_matrix_twice():
    """Qwen3 0.6B: the Hub counts 751,632,384."""
    n = count(config("Qwen3 0.6B"))
    assert n.head == 0
    assert n.total + n.embeddings == 751_632_384
