import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import silu
from torch.utils.flop_counter import FlopCounterMode

from warpmap.models.configs import MODELS, config
from warpmap.models.families.deepseek_v3 import (
    CHANGES,
    PRESETS,
    deepseek_v3,
    deepseek_v3_chart,
    mla_matrices,
    modules,
    mtp_flops,
)

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/models/families/deepseek_v3.md"
V3 = config("DeepSeek-V3")


# The model in PyTorch, written from the report, with the checkpoint's names.
# Experts are stacked and gathered by token, so that the whole model, with its
# routing, runs on the meta device. Rotary position and masks are left out:
# they hold no weights and multiply no matrices.


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, C, H, r = c, c.hidden_size, c.heads, c.kv_lora_rank
        queries = H * (c.qk_nope_head_dim + c.qk_rope_head_dim)
        up = H * (c.qk_nope_head_dim + c.v_head_dim)
        self.q_a_proj = nn.Linear(C, c.q_lora_rank, bias=False)
        self.q_a_norm = nn.RMSNorm(c.q_lora_rank)
        self.q_b_proj = nn.Linear(c.q_lora_rank, queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            C, r + c.qk_rope_head_dim, bias=False
        )
        self.kv_a_norm = nn.RMSNorm(r)
        self.kv_b_proj = nn.Linear(r, up, bias=False)
        self.o_proj = nn.Linear(H * c.v_head_dim, C, bias=False)

    def forward(self, x):
        T, c = len(x), self.c
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x))).view(T, c.heads, -1)
        self.cached = self.kv_a_proj_with_mqa(x)
        latent, rotary = self.cached.split(
            [c.kv_lora_rank, c.qk_rope_head_dim], dim=-1
        )
        kv = self.kv_b_proj(self.kv_a_norm(latent)).view(T, c.heads, -1)
        k, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        k = torch.cat([k, rotary[:, None].expand(-1, c.heads, -1)], dim=-1)
        q, k, v = (a.transpose(0, 1) for a in (q, k, v))
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)
        return self.o_proj((scores @ v).transpose(0, 1).reshape(T, -1))


class FFN(nn.Module):
    def __init__(self, C, width):
        super().__init__()
        self.gate_proj = nn.Linear(C, width, bias=False)
        self.up_proj = nn.Linear(C, width, bias=False)
        self.down_proj = nn.Linear(width, C, bias=False)

    def forward(self, x):
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Routed(nn.Module):
    def __init__(self, c):
        super().__init__()
        E, C, W = c.experts, c.hidden_size, c.moe_intermediate_size
        self.up = nn.Parameter(torch.empty(E, C, 2 * W).normal_(0, 0.1))
        self.down = nn.Parameter(torch.empty(E, W, C).normal_(0, 0.1))

    def forward(self, x, chosen):
        k = chosen.shape[1]
        each = x.repeat_interleave(k, dim=0)[:, None]  # (T k, 1, C)
        which = chosen.flatten()
        gate, up = torch.bmm(each, self.up[which]).chunk(2, dim=-1)
        out = torch.bmm(silu(gate) * up, self.down[which])
        return out.view(len(x), k, -1)


class MoE(nn.Module):
    def __init__(self, c):
        super().__init__()
        C = c.hidden_size
        self.k = c.experts_per_token
        self.gate = nn.Linear(C, c.experts, bias=False)
        if c.router_bias:
            self.e_score_correction_bias = nn.Parameter(torch.zeros(c.experts))
        self.experts = Routed(c)
        width = c.shared_experts * c.moe_intermediate_size
        self.shared_experts = FFN(C, width)

    def forward(self, x):
        scores = self.gate(x).sigmoid()
        biased = scores + getattr(self, "e_score_correction_bias", 0)
        chosen = biased.topk(self.k).indices
        weights = scores.gather(1, chosen)
        y = (
            self.experts(x, chosen)
            * (weights / weights.sum(1, True))[..., None]
        )
        return self.shared_experts(x) + y.sum(dim=1)


class Layer(nn.Module):
    def __init__(self, c, has_experts):
        super().__init__()
        C = c.hidden_size
        self.input_norm, self.post_norm = nn.RMSNorm(C), nn.RMSNorm(C)
        self.self_attn = Attention(c)
        self.mlp = MoE(c) if has_experts else FFN(C, c.intermediate_size)

    def forward(self, x):
        x = x + self.self_attn(self.input_norm(x))
        return x + self.mlp(self.post_norm(x))


class DeepSeek(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(
            Layer(c, i >= c.dense_layers) for i in range(c.layers)
        )
        self.norm = nn.RMSNorm(c.hidden_size)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class Predictor(nn.Module):
    """An MTP module; embedding and head are those of the main model."""

    def __init__(self, c, main):
        super().__init__()
        C = c.hidden_size
        self.main = [main]  # not its own
        self.enorm, self.hnorm, self.norm = (nn.RMSNorm(C) for _ in range(3))
        self.eh_proj = nn.Linear(2 * C, C, bias=False)
        self.layer = Layer(c, True)

    def forward(self, hidden, tokens):
        (main,) = self.main
        embedded = self.enorm(main.embed_tokens(tokens))
        x = self.eh_proj(torch.cat([embedded, self.hnorm(hidden)], dim=-1))
        return main.lm_head(self.norm(self.layer(x)))


def part_of(path):
    """The kind of module that a parameter or a module belongs to."""
    words = {
        "embed_tokens": "embedding",
        "norm": "norms",
        "self_attn": "attention",
        "shared_experts": "shared experts",
        "mlp.experts": "routed experts",
        "mlp.gate_proj": "dense FFN",
        "mlp.up_proj": "dense FFN",
        "mlp.down_proj": "dense FFN",
        "mlp.gate": "routers",
        "e_score_correction_bias": "routers",
        "lm_head": "head",
    }
    return next((part for word, part in words.items() if word in path), None)


def weights_by_part(model):
    parts = {}
    for name, p in model.named_parameters():
        parts[part_of(name)] = parts.get(part_of(name), 0) + p.numel()
    return parts


def flops_by_part(model, *inputs):
    """FLOPs that PyTorch counts in forward, for each part and in all."""
    with FlopCounterMode(display=False) as counter:
        result = model(*inputs)
    # attention also multiplies outside of its Linear layers, so take modules
    whole = {"self_attn", "shared_experts", "experts", "gate", "lm_head"}
    parts = {}
    for name, ops in counter.get_flop_counts().items():
        path = name.split(".")
        dense = path[-1] == "mlp" and int(path[-2]) < model.dense
        if path[-1] in whole or dense:
            part = "dense FFN" if dense else part_of(name)
            parts[part] = parts.get(part, 0) + sum(ops.values())
    return result, parts, counter.get_total_flops()


def build(c):
    model = DeepSeek(c)
    model.dense = c.dense_layers
    return model


# everything about a hundredth as wide, no two sizes equal
SMALL = replace(
    V3,
    layers=3,
    dense_layers=1,
    hidden_size=28,
    heads=3,
    vocab_size=37,
    q_lora_rank=11,
    kv_lora_rank=10,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=5,
    intermediate_size=40,
    experts=7,
    experts_per_token=2,
    shared_experts=1,
    moe_intermediate_size=9,
)


@pytest.mark.parametrize("name", ["DeepSeek-V3", "DeepSeek-V2", "small"])
def test_weights_agree_by_module(name):
    c = SMALL if name == "small" else config(name)
    with torch.device("meta"):
        want = weights_by_part(build(c))
    got = modules(c, 4096)
    assert {part: m.total for part, m in got.items()} == want


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DeepSeek-V3", "small"])
def test_forward_agrees_by_module_with_pytorch(name):
    """The whole model, on the meta device, on a sequence of 12 tokens."""
    c, T = (V3, 12) if name == "DeepSeek-V3" else (SMALL, 12)
    with torch.device("meta"):
        model = build(c)
        tokens = torch.zeros(T, dtype=torch.long)
    _, got, total = flops_by_part(model, tokens)
    assert sum(got.values()) == total
    want = modules(c, T, causal=False)
    for part, flops in got.items():
        assert flops == T * want[part].forward_flops, part
    assert total == T * sum(m.forward_flops for m in want.values())


def test_training_is_three_times_forward_on_real_weights():
    model, T = build(SMALL), 12
    tokens = torch.randint(SMALL.vocab_size, (T,))
    with FlopCounterMode(display=False) as counter:
        model(tokens).square().sum().backward()
    want = modules(SMALL, T, causal=False).values()
    forward = sum(m.forward_flops for m in want)
    assert counter.get_total_flops() == 3 * T * forward


def test_active_weights_are_those_with_a_gradient():
    model = build(SMALL)
    model(torch.tensor([5])).square().sum().backward()
    reached = {}
    for name, p in model.named_parameters():
        used = p.numel()
        # the correction of a router only chooses: active, and no gradient
        assert (p.grad is None) == name.endswith("correction_bias")
        if part_of(name) == "routed experts":
            used = p.grad.flatten(1).any(dim=1).sum().item() * p[0].numel()
        elif part_of(name) == "embedding":
            used = 0
        reached[part_of(name)] = reached.get(part_of(name), 0) + used
    got = modules(SMALL, 1)
    assert {part: m.active for part, m in got.items()} == reached


def test_predictor_agrees_in_weights_and_work():
    with torch.device("meta"):
        main = build(V3)
        predictor = Predictor(V3, main)
        hidden, tokens = torch.zeros(12, V3.hidden_size), torch.zeros(12).long()
    held = sum(p.numel() for p in predictor.parameters())
    v3 = deepseek_v3()
    assert v3.mtp_parameters == held
    # files hold embedding and head once more, so 685B on the Hub
    copies = 2 * V3.vocab_size * V3.hidden_size
    assert v3.total_parameters + held + copies == 684_489_845_504
    with FlopCounterMode(display=False) as counter:
        predictor(hidden, tokens)
    assert counter.get_total_flops() == 12 * mtp_flops(V3, 12, causal=False)


def test_matrices_agree_with_attention():
    with torch.device("meta"):
        layer = Attention(V3)
    want = {
        name.removesuffix(".weight"): p.numel()
        for name, p in layer.named_parameters()
        if "norm" not in name
    }
    assert mla_matrices(V3) == want
    assert sum(want.values()) * V3.layers == modules(V3, 1)["attention"].total


def test_cache_is_what_attention_keeps():
    """DeepSeek-AI, arXiv:2505.09343, table 1: 70.272 KB a token in bf16."""
    with torch.device("meta"):
        model = build(V3).bfloat16()
        model(torch.zeros(2, dtype=torch.long))
    kept = sum(
        layer.self_attn.cached.nbytes // 2  # tokens
        for layer in model.layers
    )
    v3 = deepseek_v3()
    assert v3.cache_bytes_per_token == kept == 70_272
    assert v3.request_bytes == 4096 * kept
    assert 2 * deepseek_v3(bytes_per_value=1).request_bytes == v3.request_bytes


def test_defaults_and_menus_are_the_published_models():
    assert deepseek_v3() == deepseek_v3(**PRESETS["DeepSeek-V3"])
    assert deepseek_v3() == deepseek_v3(**CHANGES["as it was built"])
    for values in PRESETS.values():
        deepseek_v3(**values)
    everything = deepseek_v3(**CHANGES["every expert runs"])
    table = V3.vocab_size * V3.hidden_size
    assert everything.active_parameters == 671_026_419_200 - table


def test_sizes_are_the_published_ones():
    """671B and 37B; README_WEIGHTS.md: 36.6B with the head."""
    v3 = deepseek_v3()
    assert v3.total_parameters == V3.published_total == 671_026_419_200
    assert round(v3.active_parameters / 1e9, 1) == 36.6
    assert round(v3.mtp_parameters / 1e9, 1) == 11.6
    v2 = deepseek_v3(**PRESETS["DeepSeek-V2"])
    assert round(v2.total_parameters / 1e9) == 236
    assert round(v2.active_parameters / 1e9) == 21


@pytest.mark.parametrize(
    ("name", "gflop"), [("DeepSeek-V2", 155), ("DeepSeek-V3", 250)]
)
def test_work_is_the_published_one(name, gflop):
    """DeepSeek-AI, arXiv:2505.09343, table 2."""
    got = deepseek_v3(**PRESETS[name], tokens=4096).training_gflop
    assert round(got) == gflop


def test_utilization_is_the_published_one_without_the_predictor():
    """DeepSeek-AI, arXiv:2505.09343, table 4: 38.94%."""
    v3 = deepseek_v3()
    assert v3.mfu_percent == pytest.approx(38.94, abs=0.15)
    assert v3.mfu_with_mtp_percent > 40.5
    assert 2048 * v3.tokens_per_gpu_second * 86400 == pytest.approx(
        272.80e9, rel=0.002
    )


# mistakes seen in such accounts
FAULTS = {
    "experts in every layer": {"dense_layers": 0, "intermediate_size": 1},
    "no shared expert": {"shared_experts": 0},
    "query not compressed": {"q_lora_rank": 0},
    "half the rotary key": {"qk_rope_head_dim": 32},
    "a latent as wide as the query's": {"kv_lora_rank": 1536},
    "no routing correction": {"router_bias": False},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_published_numbers_catch(fault):
    assert deepseek_v3(**FAULTS[fault]).total_parameters != V3.published_total


@pytest.mark.parametrize("name", PRESETS)
def test_chart_shows_every_module(name):
    bars = deepseek_v3_chart(**PRESETS[name], tokens=4096).bars
    for bar in bars:
        assert sum(p for _, p in bar.parts) == pytest.approx(100)
    stored, active, _ = (dict(bar.parts) for bar in bars)
    assert stored["routed experts"] > 90
    assert active["attention"] > 10 * stored["attention"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"experts": 0}, "experts must be at least 1, got 0"),
        ({"experts_per_token": 257}, "experts_per_token must be at most 256"),
        ({"kv_lora_rank": 0}, "kv_lora_rank must be at least 1, got 0"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"bytes_per_value": 0}, "bytes_per_value must be at least 1"),
        ({"peak_tflops": 0.0}, "peak_tflops must be above 0"),
        ({"gpu_hours_per_trillion": 0.0}, "gpu_hours_per_trillion must be"),
    ],
)
def test_bad_numbers_are_named(wrong, says):
    with pytest.raises(ValueError, match=says):
        deepseek_v3(**wrong)


def test_runs_without_torch_and_numpy():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from warpmap.models.families.deepseek_v3 import *\n"
        "print(deepseek_v3().total_parameters)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "src",
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "671026419200"


def test_page_tables_agree():
    rows = {
        row[0].strip("`"): row[1:]
        for row in (
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in PAGE.read_text("utf-8").splitlines()
            if line.startswith("| ")
        )
    }
    parts = modules(MODELS["DeepSeek-V3"], 4096)
    for name, part in parts.items():
        sizes = (part.total, part.active, part.forward_flops)
        assert rows[name] == [f"{size / 1e9:,.2f}" for size in sizes], name
    sums = [
        sum(getattr(p, field) for p in parts.values())
        for field in ("total", "active", "forward_flops")
    ]
    assert rows["together"] == [f"{size / 1e9:,.2f}" for size in sums]
    both = [deepseek_v3(**PRESETS[f"DeepSeek-V{i}"]) for i in (2, 3)]
    for name, values in {
        "parameters, billions": [
            f"{m.total_parameters / 1e9:.1f}" for m in both
        ],
        "for one token": [f"{m.active_parameters / 1e9:.1f}" for m in both],
        "GFLOP to train on a token, 4096": [
            f"{m.training_gflop:.1f}" for m in both
        ],
        "cache of a token, bytes": [
            f"{m.cache_bytes_per_token:,}" for m in both
        ],
        "MFU": [f"{m.mfu_percent:.1f}%" for m in both],
    }.items():
        assert rows[name] == values
    for name, size in mla_matrices(V3).items():
        assert rows[name][-1] == f"{size / 1e6:.1f}", name
