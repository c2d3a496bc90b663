import importlib.util
import math
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count

from warpmap.models.configs import MODELS, ModelConfig, config
from warpmap.models.foundations.parameter_count import count
from warpmap.training.cost.flops_and_mfu import (
    PEAKS,
    PRESETS,
    RUNS,
    ForwardFlops,
    attended_keys,
    attention_scores,
    flops_and_mfu,
    flops_chart,
    forward_flops,
    shape,
)

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/training/cost/flops_and_mfu.md"


# Decoders that run, written from the papers, not from the formulas. Products
# of attention are plain matmuls, so that PyTorch's counter sees each of them.


def attend(q, k, v):
    """(H, T, D) each; a mask changes no shape, so there is none."""
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v


class Grouped(nn.Module):
    def __init__(self, c):
        super().__init__()
        H, Hkv, D, C = c.heads, c.kv_heads, c.head_dim, c.hidden_size
        self.shape = H, Hkv, D
        self.q = nn.Linear(C, H * D, bias=c.attention_bias)
        self.k = nn.Linear(C, Hkv * D, bias=c.attention_bias)
        self.v = nn.Linear(C, Hkv * D, bias=c.attention_bias)
        self.out = nn.Linear(H * D, C, bias=False)

    def forward(self, x):
        T, (H, Hkv, D) = len(x), self.shape
        q = self.q(x).view(T, H, D).transpose(0, 1)
        k = self.k(x).view(T, Hkv, D).transpose(0, 1)
        v = self.v(x).view(T, Hkv, D).transpose(0, 1)
        k, v = (a.repeat_interleave(H // Hkv, dim=0) for a in (k, v))
        return self.out(attend(q, k, v).transpose(0, 1).reshape(T, -1))


class Latent(nn.Module):
    def __init__(self, c):
        super().__init__()
        H, C, r = c.heads, c.hidden_size, c.kv_lora_rank
        self.heads = H
        queries = H * (c.qk_nope_head_dim + c.qk_rope_head_dim)
        self.q_down = nn.Linear(C, c.q_lora_rank, bias=False)
        self.q_up = nn.Linear(c.q_lora_rank, queries, bias=False)
        self.latent = nn.Linear(C, r, bias=False)
        self.rotary_key = nn.Linear(C, c.qk_rope_head_dim, bias=False)
        self.up_k = nn.Linear(r, H * c.qk_nope_head_dim, bias=False)
        self.up_v = nn.Linear(r, H * c.v_head_dim, bias=False)
        self.out = nn.Linear(H * c.v_head_dim, C, bias=False)

    def forward(self, x):
        T, H = len(x), self.heads
        latent = self.latent(x)
        shared = self.rotary_key(x)[:, None].expand(-1, H, -1)
        k = torch.cat([self.up_k(latent).view(T, H, -1), shared], dim=-1)
        q = self.q_up(self.q_down(x)).view(T, H, -1)
        v = self.up_v(latent).view(T, H, -1)
        y = attend(*(a.transpose(0, 1) for a in (q, k, v)))
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
    def __init__(self, c):
        super().__init__()
        C, W = c.hidden_size, c.moe_intermediate_size
        self.k = c.experts_per_token
        self.router = nn.Linear(C, c.experts, bias=False)
        self.routed = nn.ModuleList(FFN(C, W) for _ in range(c.experts))
        self.shared = nn.ModuleList(FFN(C, W) for _ in range(c.shared_experts))

    def forward(self, x):
        y = sum((ffn(x) for ffn in self.shared), torch.zeros_like(x))
        weights, chosen = self.router(x).softmax(dim=-1).topk(self.k)
        for e, ffn in enumerate(self.routed):
            tokens, slot = torch.nonzero(chosen == e, as_tuple=True)
            if len(tokens):
                part = weights[tokens, slot, None] * ffn(x[tokens])
                y = y.index_add(0, tokens, part)
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
    def __init__(self, c, recompute=False):
        super().__init__()
        self.recompute = recompute
        self.embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(
            Layer(c, bool(c.experts) and i >= c.dense_layers)
            for i in range(c.layers)
        )
        self.head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            if self.recompute:
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return self.head(x)


TOKENS = 10
LATENT = {
    "q_lora_rank": 11,
    "kv_lora_rank": 9,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
ROUTED = {
    "experts": 6,
    "experts_per_token": 2,
    "moe_intermediate_size": 7,
}
# no two sizes equal
TINY = {
    "dense, GQA": {"head_dim": 6, "intermediate_size": 10},
    "biases": {
        "head_dim": 6,
        "intermediate_size": 10,
        "attention_bias": True,
    },
    "experts": {"head_dim": 6, **ROUTED},
    "latent": {"intermediate_size": 10, **LATENT},
    "latent, experts, one dense layer": {
        "intermediate_size": 10,
        "shared_experts": 2,
        "dense_layers": 1,
        **ROUTED,
        **LATENT,
    },
}


def tiny(features):
    return ModelConfig(
        name="tiny",
        source=("", ""),
        layers=2,
        hidden_size=12,
        heads=4,
        kv_heads=2,
        vocab_size=31,
        max_context=16,
        **features,
    )


def counted(run):
    """FLOPs that PyTorch counts, by module and in all."""
    with FlopCounterMode(display=False) as counter:
        result = run()
    by_module = {
        name: sum(ops.values())
        for name, ops in counter.get_flop_counts().items()
    }
    return result, by_module, counter.get_total_flops()


def by_part(modules):
    """Sum what modules count into the names of ``ForwardFlops``."""
    parts = dict.fromkeys((f.name for f in fields(ForwardFlops)), 0)
    for name, flops in modules.items():
        path = name.split(".")
        end = path[-1]
        if end == "attention":
            parts["scores"] += flops
        elif "attention" in path:
            parts["projections"] += flops
            parts["scores"] -= flops
        elif end == "router":
            parts["routers"] += flops
        elif end == "head":
            parts["head"] += flops
        elif end in ("gate", "up", "down"):
            kind = "dense_ffn"
            if "routed" in path:
                kind = "routed_experts"
            elif "shared" in path:
                kind = "shared_experts"
            parts[kind] += flops
    return parts


@pytest.mark.parametrize("features", TINY)
def test_forward_agrees_part_by_part_with_pytorch(features):
    c = tiny(TINY[features])
    model = Decoder(c)
    tokens = torch.randint(31, (TOKENS,))
    _, modules, total = counted(lambda: model(tokens))
    want = forward_flops(c, TOKENS, causal=False)
    got = by_part(modules)
    assert sum(got.values()) == total  # each product has found its part
    for part, flops in got.items():
        assert flops == TOKENS * getattr(want, part), part


@pytest.mark.parametrize("features", TINY)
def test_backward_is_twice_forward(features):
    c = tiny(TINY[features])
    model = Decoder(c)
    loss, _, forward = counted(
        lambda: model(torch.randint(31, (TOKENS,))).square().sum()
    )
    _, _, backward = counted(loss.backward)
    assert backward == 2 * forward
    cost = flops_and_mfu(
        **shape(c), tokens=TOKENS, causal=False, recompute_scores=False
    )
    step = forward + backward
    assert cost.gflop_per_token * 1e9 * TOKENS == pytest.approx(step, rel=1e-12)
    assert cost.executed_gflop_per_token == cost.gflop_per_token


@pytest.mark.parametrize("features", TINY)
def test_recomputed_layers_run_three_times_and_the_head_does_not(features):
    c = tiny(TINY[features])
    model = Decoder(c, recompute=True)

    def step():
        with set_checkpoint_early_stop(False):
            model(torch.randint(31, (TOKENS,))).square().sum().backward()

    _, _, executed = counted(step)
    cost = flops_and_mfu(
        **shape(c),
        tokens=TOKENS,
        causal=False,
        recompute_scores=False,
        recompute_layers=True,
    )
    got = cost.executed_gflop_per_token * 1e9 * TOKENS
    assert got == pytest.approx(executed, rel=1e-12)
    assert cost.executed_gflop_per_token > cost.gflop_per_token


def test_fused_attention_recomputes_one_of_two_products():
    """PyTorch's formula for the backward of fused attention."""
    H, T, Dqk, Dv = 4, 16, 12, 5
    q, v = (1, H, T, Dqk), (1, H, T, Dv)
    backward = sdpa_backward_flop_count(v, q, q, v)
    one = attention_scores(T, 1, H, Dqk, Dv, causal=False)
    again = attention_scores(T, 1, H, Dqk, 0, causal=False)
    assert backward == T * (2 * one + again)


def sdpa_step(device, dtype):
    """Backward and forward FLOPs of causal attention with fused kernels."""
    q, k, v = (
        torch.randn(
            1, 4, 128, 64, device=device, dtype=dtype, requires_grad=True
        )
        for _ in range(3)
    )
    y, _, forward = counted(
        lambda: scaled_dot_product_attention(q, k, v, is_causal=True)
    )
    _, _, backward = counted(y.sum().backward)
    return forward, backward


def test_counter_halves_nothing_and_misses_fused_attention_on_a_cpu():
    square = 128 * attention_scores(128, 1, 4, 64, 64, causal=False)
    with sdpa_kernel(SDPBackend.MATH):
        assert sdpa_step("cpu", torch.float32) == (square, 2 * square)
    assert sdpa_step("cpu", torch.float32) == (0, 0)


@pytest.mark.gpu
def test_counter_agrees_on_fused_attention_on_a_gpu():
    square = 128 * attention_scores(128, 1, 4, 64, 64, causal=False)
    again = 128 * attention_scores(128, 1, 4, 64, 0, causal=False)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        got = sdpa_step("cuda", torch.bfloat16)
    assert got == (square, 2 * square + again)


@pytest.mark.parametrize("window", [0, 1, 3, 7, 9])
def test_keys_are_what_the_mask_leaves(window):
    T = 7
    mask = torch.ones(T, T).tril()
    if window:
        mask = mask.triu(1 - window)
    assert attended_keys(T, window) == pytest.approx(mask.sum().item() / T)
    assert attended_keys(T, window, causal=False) == T


def test_kaplan_s_forward_pass():
    """2 N + 2 layers x context x width, table 1 there; long contexts."""
    cost = flops_and_mfu(
        **{
            **PRESETS["Llama 2 7B"],
            "tokens": 8192,
        }
    )
    n = PRESETS["Llama 2 7B"]["matmul_parameters"]
    kaplan = 3 * (2 * n + 2 * 32 * 8192 * 4096)
    assert cost.gflop_per_token * 1e9 == pytest.approx(kaplan, rel=1e-4)


def test_palm_s_utilization():
    """Chowdhery et al., section 4.1: 46.2%, 45.7% without attention."""
    palm = flops_and_mfu(**RUNS["PaLM 540B, 6144 TPU v4"])
    assert round(palm.mfu_percent, 1) == 46.2
    without = palm.mfu_percent * (1 - palm.attention_percent / 100)
    assert round(without, 1) == 45.7
    formula = 6 * 540.35e9 + 12 * 118 * 48 * 256 * 2048  # appendix B
    assert palm.gflop_per_token * 1e9 == pytest.approx(formula, rel=1e-12)


def test_narayanan_s_step():
    """96 B s l h^2 (1 + s / 6h + V / 16lh), recomputed layers, no mask."""
    l, h, s, V, B = 96, 12288, 2048, 51200, 1536  # noqa: E741  their letters
    head = V * h
    cost = flops_and_mfu(
        matmul_parameters=12 * l * h * h + head,
        head_parameters=head,
        layers=l,
        heads=96,
        qk_head_dim=128,
        v_head_dim=128,
        tokens=s,
        causal=False,
        recompute_scores=False,
        recompute_layers=True,
    )
    theirs = 96 * B * s * l * h**2 * (1 + s / (6 * h) + V / (16 * l * h))
    got = cost.executed_gflop_per_token * 1e9 * B * s
    assert got == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "gflop", "within"),
    [
        ("DeepSeek-V2", 155, 0.003),
        ("DeepSeek-V3", 250, 0.003),
        ("Llama 3.1 405B", 2448, 0.011),
    ],
)
def test_deepseek_s_cost_of_a_token(name, gflop, within):
    """arXiv:2505.09343, table 2, for sequences of 4096."""
    got = flops_and_mfu(**PRESETS[name], tokens=4096).gflop_per_token
    assert got == pytest.approx(gflop, rel=within)


def test_deepseek_v3_s_utilization():
    """arXiv:2505.09343, table 4: 385 and 432 TFLOP/s, 38.94% and 43.73%."""
    run = RUNS["DeepSeek-V3, 2048 H800"]
    assert run["tokens_per_second"] == round(272.80e9 / 86400)
    causal = flops_and_mfu(**run)
    square = flops_and_mfu(**{**run, "causal": False})
    assert causal.model_tflops == pytest.approx(385, rel=0.004)
    assert square.model_tflops == pytest.approx(432, rel=0.004)
    assert causal.mfu_percent == pytest.approx(38.94, abs=0.15)
    assert square.mfu_percent == pytest.approx(43.73, abs=0.15)


def test_deepseek_v3_s_bill():
    """arXiv:2412.19437: 180K GPU hours and 3.7 days for 10^12 tokens."""
    speed = 1e12 / (180e3 * 3600) * 2048
    one = flops_and_mfu(tokens_per_second=speed, trillion_tokens=1)
    assert one.gpu_hours == pytest.approx(180e3)
    assert round(one.days, 1) == 3.7
    all_of_it = flops_and_mfu(tokens_per_second=speed)
    assert all_of_it.gpu_hours == pytest.approx(2.664e6)
    assert round(all_of_it.mfu_percent, 1) == 39.1


# mistakes seen in such calculations, for DeepSeek-V3
FAULTS = {
    "the embedding multiplied": {
        "matmul_parameters": count(config("DeepSeek-V3")).active_with_embeddings
    },
    "every expert": {"matmul_parameters": count(config("DeepSeek-V3")).total},
    "no rotary part": {"qk_head_dim": 128},
    "attention in the latent": {"qk_head_dim": 576, "v_head_dim": 512},
    "no mask": {"causal": False},
    "no attention": {"heads": 1},
    "peak with sparsity": {"peak_tflops": 1978.9},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_published_utilization_catches(fault):
    wrong = {**RUNS["DeepSeek-V3, 2048 H800"], **FAULTS[fault]}
    mfu = flops_and_mfu(**wrong).mfu_percent
    assert mfu != pytest.approx(38.94, abs=0.15)


def test_defaults_are_deepseek_v3():
    run = RUNS["DeepSeek-V3, 2048 H800"]
    assert flops_and_mfu() == flops_and_mfu(**run)


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_the_active_ones_without_what_is_added(name):
    c, n = config(name), count(config(name))
    added = n.active - PRESETS[name]["matmul_parameters"]
    # sinks and the biases of experts and attention
    biases = 0
    if c.attention_bias:
        biases += c.layers * (c.heads + 2 * c.kv_heads) * c.head_dim
    biases += c.output_bias * c.layers * c.hidden_size
    biases += c.attention_sinks * c.layers * c.heads
    moe = c.layers - c.dense_layers if c.experts else 0
    biases += c.router_bias * moe * c.experts
    if c.expert_bias:
        one = 2 * c.moe_intermediate_size + c.hidden_size
        biases += moe * c.experts_per_token * one
    assert added == n.norms + biases
    assert added < 0.001 * n.active


def test_a_window_makes_long_sequences_linear():
    """Mistral 7B v0.1: from 4096 tokens on, nearly a constant."""
    c = config("Mistral 7B v0.1")
    short, long = (forward_flops(c, n).scores for n in (1 << 16, 1 << 20))
    assert long < 1.04 * short
    unbounded = replace(c, windowed_layers=0)
    assert forward_flops(unbounded, 1 << 20).scores > 100 * long


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"gpus": 0}, "gpus must be at least 1"),
        ({"window": -1}, "window must be at least 0"),
        ({"windowed_layers": 62, "window": 9}, "windowed_layers must be at"),
        ({"windowed_layers": 1}, "window must be at least 1"),
        ({"head_parameters": 1 << 60}, "head_parameters must be at most"),
        ({"peak_tflops": 0}, "peak_tflops must be above 0, got 0"),
        ({"tokens_per_second": math.nan}, "tokens_per_second must be above 0"),
        ({"trillion_tokens": -1.0}, "trillion_tokens must be above 0"),
    ],
)
def test_bad_numbers_are_named(wrong, says):
    with pytest.raises(ValueError, match=says):
        flops_and_mfu(**wrong)


def test_forward_needs_a_token():
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        forward_flops(config("Llama 3 8B"), 0)


def test_chart_starts_at_the_rule_and_leaves_it():
    run = RUNS["DeepSeek-V3, 2048 H800"]
    needed, executed, rule = (line.points for line in flops_chart(**run).lines)
    assert needed[0][1] == pytest.approx(rule[0][1], rel=0.04)
    assert needed[-1][1] > 30 * rule[-1][1]
    assert all(e[1] > n[1] for e, n in zip(executed, needed, strict=True))
    (here,) = flops_chart(**run).points
    assert (here.x, here.y) in needed


def test_menus_fill_only_their_fields():
    for menu in (PRESETS, PEAKS, RUNS):
        for values in menu.values():
            flops_and_mfu(**values)
    assert "V100 SXM2 32GB" not in PEAKS  # no bf16


def test_runs_without_torch_and_numpy():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from warpmap.training.cost.flops_and_mfu import *\n"
        "print(round(flops_and_mfu().mfu_percent, 1))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "src",
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "39.0"


def page_rows():
    return {
        row[0]: row[1:]
        for row in (
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in PAGE.read_text("utf-8").splitlines()
            if line.startswith("| ")
        )
    }


def test_page_tables_agree():
    rows = page_rows()
    lengths = (4096, 32768, 131072)
    shown = [name for name in rows if name in MODELS]
    assert len(shown) == 4
    for name in shown:
        want = [
            flops_and_mfu(**PRESETS[name], tokens=n).attention_percent
            for n in lengths
        ]
        rule = 6 * PRESETS[name]["matmul_parameters"] / 1e9
        assert rows[name] == [f"{rule:,.0f}", *(f"{p:.0f}%" for p in want)]


def test_page_s_comparison_agrees():
    rows = page_rows()
    run = RUNS["DeepSeek-V3, 2048 H800"]
    causal = flops_and_mfu(**run)
    square = flops_and_mfu(**{**run, "causal": False})
    for start, value in (
        ("[DeepSeek-V3](https://arxiv.org/abs/2505", causal.mfu_percent),
        ("the same, no mask", square.mfu_percent),
        ("[DeepSeek-V3](https://arxiv.org/abs/2412", causal.gpu_hours / 1e6),
    ):
        (row,) = (row for name, row in rows.items() if name.startswith(start))
        digits = 3 if value < 10 else 2
        assert row[-1].rstrip("%") == f"{value:.{digits}f}"


# -- the benchmark: its model and what it predicts of it ----------------------


@pytest.fixture(scope="module")
def benchmark_module():
    path = ROOT / "benchmarks/training/cost/flops_and_mfu.py"
    spec = importlib.util.spec_from_file_location("benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("recompute", [False, True])
def test_benchmark_predicts_its_own_model(benchmark_module, recompute):
    """A small one, on the CPU, with attention that the counter sees."""
    b = benchmark_module
    small = replace(
        b.SHAPE, layers=2, hidden_size=64, heads=4, kv_heads=2, head_dim=16
    )
    small = replace(small, intermediate_size=96, vocab_size=128)
    model = b.Decoder(small, 32, recompute)
    with sdpa_kernel(SDPBackend.MATH):
        got = b.counted_flops(model, torch.randint(128, (2, 33)))
    cost = flops_and_mfu(
        **shape(small),
        tokens=32,
        causal=False,
        recompute_scores=False,
        recompute_layers=recompute,
    )
    per_token = cost.executed_gflop_per_token * 1e9
    assert got == pytest.approx(64 * per_token, rel=1e-12)


def test_benchmark_shape_is_what_it_says(benchmark_module):
    b = benchmark_module
    with torch.device("meta"):
        model = b.Decoder(b.SHAPE, 16, False)
    held = sum(p.numel() for p in model.parameters())
    assert held == count(b.SHAPE).total
    assert 1.0e9 < held < 1.2e9
