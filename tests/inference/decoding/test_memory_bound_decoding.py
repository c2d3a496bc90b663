"""Counts against a decoding step that really runs, times against a GPU."""

import dataclasses
import importlib.util
import itertools
import math
import random
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.nn.functional import silu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from warpmap.chart import LineChart
from warpmap.hardware.performance.roofline import (
    H200,
    Ceilings,
    break_even_batch,
)
from warpmap.inference.decoding.kv_cache_size import kv_cache_size
from warpmap.inference.decoding.memory_bound_decoding import (
    CHIPS,
    PRESETS,
    attention_work,
    critical_batch,
    decoding_chart,
    experts_touched,
    memory_bound_decoding,
    operators,
    step_seconds,
)
from warpmap.models.configs import MODELS, ModelConfig, config
from warpmap.models.foundations.parameter_count import count

ROOT = Path(__file__).parents[3]
FIGURE = ROOT / "docs/inference/decoding/memory_bound_decoding_figure.py"
BENCHMARK = ROOT / "benchmarks/inference/decoding/memory_bound_decoding.py"

BASE = ModelConfig(
    name="tiny",
    source=("", ""),
    layers=3,
    hidden_size=48,
    heads=6,
    kv_heads=2,
    vocab_size=80,
    max_context=64,
    head_dim=10,
    intermediate_size=56,
)
EXPERTS = dataclasses.replace(
    BASE,
    experts=7,
    experts_per_token=2,
    moe_intermediate_size=18,
    shared_experts=2,
    dense_layers=1,
)
LATENT = dataclasses.replace(
    EXPERTS,
    head_dim=0,
    kv_heads=6,
    q_lora_rank=14,
    kv_lora_rank=22,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=12,
)
TINY = {
    "grouped heads": BASE,
    "window": dataclasses.replace(BASE, window=5, windowed_layers=2),
    "experts": EXPERTS,
    "latent": LATENT,
    "latent, query not compressed": dataclasses.replace(LATENT, q_lora_rank=0),
}


class Tally(TorchDispatchMode):
    """What matrix products read, and the FLOPs that PyTorch counts.

    Each tensor that was registered counts once a step, whole: that is how
    often a fused kernel would read it.
    """

    def __init__(self):
        super().__init__()
        self.owner, self.read = {}, defaultdict(dict)
        self.flops = defaultdict(int)

    def keep(self, kind, *shape):
        tensor = torch.randn(shape, dtype=torch.float64) / shape[-1] ** 0.5
        self.owner[tensor.untyped_storage().data_ptr()] = kind, tensor
        return tensor

    @contextmanager
    def part(self, name):
        self.name = name
        with self:
            yield

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            for tensor in args:
                at = tensor.untyped_storage().data_ptr()
                if at in self.owner:
                    kind, whole = self.owner[at]
                    self.read[self.name, kind][at] = whole.numel()
        out = func(*args, **(kwargs or {}))
        if count_flops := flop_registry.get(func.overloadpacket):
            self.flops[self.name] += count_flops(*args, out_val=out)
        return out

    def values(self, name, kind):
        return sum(self.read[name, kind].values())


class Step:
    """One decoding step with plain products, written from the papers."""

    def __init__(self, c, batch, context):
        self.c, self.B, self.S = c, batch, context
        self.t = Tally()
        self.experts_read = []

    def weight(self, rows, columns):
        return self.t.keep("weights", rows, columns)

    def run(self):
        c, t = self.c, self.t
        x = torch.randn(self.B, c.hidden_size, dtype=torch.float64)
        for layer in range(c.layers):
            attend = self.latent if c.kv_lora_rank else self.grouped
            x = x + attend(x, layer)
            x = x + self.ffn(x, layer)
        head = self.weight(c.hidden_size, c.vocab_size)
        with t.part("head"):
            x @ head
        return t

    def tokens(self, layer):
        windowed = layer < self.c.windowed_layers
        return min(self.S, self.c.window) if windowed else self.S

    def grouped(self, x, layer):
        c, t, S = self.c, self.t, self.tokens(layer)
        H, Hkv, D = c.heads, c.kv_heads, c.head_dim
        wq = self.weight(c.hidden_size, H * D)
        wk, wv = (self.weight(c.hidden_size, Hkv * D) for _ in range(2))
        wo = self.weight(H * D, c.hidden_size)
        with t.part("attention projections"):
            q, k, v = x @ wq, x @ wk, x @ wv
        keys, values = (t.keep("cache", self.B, Hkv, S, D) for _ in range(2))
        keys[:, :, -1] = k.view(self.B, Hkv, D)
        values[:, :, -1] = v.view(self.B, Hkv, D)
        with t.part("attention"):
            q = q.view(self.B, Hkv, H // Hkv, D)  # groups share their keys
            probs = (q @ keys.mT / math.sqrt(D)).softmax(dim=-1)
            out = probs @ values
        with t.part("attention projections"):
            return out.reshape(self.B, H * D) @ wo

    def latent(self, x, layer):
        c, t, S, B = self.c, self.t, self.S, self.B
        H, r, dr = c.heads, c.kv_lora_rank, c.qk_rope_head_dim
        dn, dv, C = c.qk_nope_head_dim, c.v_head_dim, c.hidden_size
        down = [self.weight(C, c.q_lora_rank)] if c.q_lora_rank else []
        up = self.weight(c.q_lora_rank or C, H * (dn + dr))
        w_latent, w_rope = self.weight(C, r), self.weight(C, dr)
        up_k = t.keep("weights", H, dn, r)
        up_v = t.keep("weights", H, r, dv)
        wo = self.weight(H * dv, C)
        latent, rope = t.keep("cache", B, S, r), t.keep("cache", B, S, dr)
        with t.part("attention projections"):
            q = x
            for w in [*down, up]:
                q = q @ w
            latent[:, -1], rope[:, -1] = x @ w_latent, x @ w_rope
            q_nope, q_rope = q.view(B, H, dn + dr).split([dn, dr], dim=-1)
            absorbed = (q_nope.transpose(0, 1) @ up_k).transpose(0, 1)
        with t.part("attention"):
            scores = absorbed @ latent.mT + q_rope @ rope.mT  # (B, H, S)
            probs = (scores / math.sqrt(dn + dr)).softmax(dim=-1)
            mixed = probs @ latent  # (B, H, r)
        with t.part("attention projections"):
            out = (mixed.transpose(0, 1) @ up_v).transpose(0, 1)
        # the same as with keys and values of every head, expanded
        k = torch.einsum("bsr,hnr->bhsn", latent, up_k)
        v = torch.einsum("bsr,hrv->bhsv", latent, up_v)
        scores = torch.einsum("bhn,bhsn->bhs", q_nope, k)
        scores = scores + torch.einsum("bhd,bsd->bhs", q_rope, rope)
        probs = (scores / math.sqrt(dn + dr)).softmax(dim=-1)
        torch.testing.assert_close(out, torch.einsum("bhs,bhsv->bhv", probs, v))
        with t.part("attention projections"):
            return out.reshape(B, H * dv) @ wo

    def gated(self, width):
        gate, up = (self.weight(self.c.hidden_size, width) for _ in range(2))
        down = self.weight(width, self.c.hidden_size)
        return lambda x: (silu(x @ gate) * (x @ up)) @ down

    def ffn(self, x, layer):
        c, t = self.c, self.t
        if not c.experts or layer < c.dense_layers:
            dense = self.gated(c.intermediate_size)
            with t.part("dense FFN"):
                return dense(x)
        router = self.weight(c.hidden_size, c.experts)
        experts = [
            self.gated(c.moe_intermediate_size) for _ in range(c.experts)
        ]
        shared = [
            self.gated(c.moe_intermediate_size) for _ in range(c.shared_experts)
        ]
        with t.part("router"):
            _, chosen = (x @ router).topk(c.experts_per_token)
        out = torch.zeros_like(x)
        with t.part("experts"):
            for e, expert in enumerate(experts):
                rows = (chosen == e).any(dim=1)
                if rows.any():
                    out[rows] += expert(x[rows])
        self.experts_read.append(len(chosen.unique()))
        with t.part("shared experts"):
            for expert in shared:
                out += expert(x)
        return out


def check(c, step, batch, context):
    """Every operator's FLOPs, weights and cache, against the tally."""
    ops = operators(c, batch, context, weight_bytes=1, cache_bytes=1)
    assert {op.name for op in ops} == set(step.t.flops)
    for op in ops:
        read = op.weight_bytes
        if op.name == "experts":  # the mean; this batch may read others
            mean = experts_touched(batch, c.experts, c.experts_per_token)
            expert = 3 * c.hidden_size * c.moe_intermediate_size
            assert read == pytest.approx(
                mean * expert * (c.layers - c.dense_layers)
            )
            read = sum(step.experts_read) * expert
        assert op.flops == step.t.flops[op.name], op.name
        assert read == step.t.values(op.name, "weights"), op.name
        assert op.cache_bytes == step.t.values(op.name, "cache"), op.name


@pytest.mark.parametrize("batch", [1, 2, 9])
@pytest.mark.parametrize("kind", TINY)
def test_counts_are_those_of_a_step_that_runs(kind, batch):
    step = Step(TINY[kind], batch, context=13)
    step.run()
    check(TINY[kind], step, batch, 13)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("grouped heads", {"kv_heads": 6}),
        ("grouped heads", {"heads": 8}),
        ("grouped heads", {"intermediate_size": 57}),
        ("window", {"windowed_layers": 3}),
        ("window", {"window": 0, "windowed_layers": 0}),
        ("experts", {"experts_per_token": 3}),
        ("experts", {"shared_experts": 1}),
        ("experts", {"dense_layers": 0}),
        ("latent", {"kv_lora_rank": 23}),
        ("latent", {"qk_rope_head_dim": 0}),
        ("latent", {"v_head_dim": 8}),
        ("latent", {"q_lora_rank": 0}),
    ],
    ids=str,
)
def test_wrong_counts_are_caught(kind, wrong):
    step = Step(TINY[kind], 4, context=13)
    step.run()
    with pytest.raises(AssertionError):
        check(dataclasses.replace(TINY[kind], **wrong), step, 4, 13)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_experts_touched_is_the_mean_over_all_choices(tokens):
    choices = list(itertools.combinations(range(5), 2))
    batches = list(itertools.product(choices, repeat=tokens))
    touched = [len(set().union(*batch)) for batch in batches]
    assert experts_touched(tokens, 5, 2) == pytest.approx(
        sum(touched) / len(batches)
    )


def test_uneven_choices_touch_fewer_experts():
    touched = []
    for _ in range(400):
        batch = set()
        for _ in range(32):
            batch |= set(random.choices(range(256), range(1, 257), k=8))
        touched.append(len(batch))
    assert sum(touched) / 400 < experts_touched(32, 256, 8)


@pytest.mark.parametrize("name", MODELS)
def test_one_token_reads_the_active_parameters(name):
    c, n = config(name), count(config(name))
    ops = operators(c, batch=1, context=0, weight_bytes=1)
    read = sum(op.weight_bytes for op in ops)
    assert sum(op.flops for op in ops) == pytest.approx(2 * read)
    # biases, norms and sinks are no products
    assert read == pytest.approx(n.active, rel=3e-3)
    assert read < n.active


@pytest.mark.parametrize("name", MODELS)
def test_cache_is_that_of_kv_cache_size(name):
    c = config(name)
    shape = {
        key: getattr(c, key)
        for key in ("layers", "kv_heads", "window", "windowed_layers")
    }
    if c.kv_lora_rank:
        shape["kv_lora_rank"] = c.kv_lora_rank
        shape["qk_rope_head_dim"] = c.qk_rope_head_dim
    else:
        shape["head_dim"] = c.head_dim
    for tokens in (1, 100, 10_000):
        size = kv_cache_size(tokens=tokens, block_tokens=1, **shape)
        _, values = attention_work(c, tokens)
        assert 2 * values == size.bytes_per_request


def test_critical_batch_of_a_dense_model_is_the_ridge():
    for chip in (H200, Ceilings(312e12, 2.039e12)):
        for width in (2, 1, 0.5):
            exact = chip.ridge * width / 2
            found = critical_batch(config("Llama 3 8B"), chip, width)
            assert found == math.ceil(exact)
    # with activations counted it is a little more
    assert break_even_batch(28672, 4096) == 219


@pytest.mark.parametrize("name", ["Mixtral 8x7B", "DeepSeek-V3"])
def test_critical_batch_is_the_first(name):
    c = config(name)
    found = critical_batch(c)
    for batch, computes in ((found - 1, False), (found, True)):
        ops = operators(c, batch, 0)
        flops = sum(op.flops for op in ops) / H200.flops_per_s
        read = sum(op.weight_bytes for op in ops) / H200.bytes_per_s
        assert (flops >= read) is computes


def test_no_batch_may_be_large_enough():
    slow_memory = Ceilings(1e20, 1e3)
    assert critical_batch(config("Llama 3 8B"), slow_memory) is None


@pytest.mark.parametrize("name", ["Llama 3 8B", "DeepSeek-V3", "gpt-oss 20B"])
@pytest.mark.parametrize("batch", [1, 40])
def test_critical_context_is_the_first(name, batch):
    found = memory_bound_decoding(name, batch).critical_context
    before = memory_bound_decoding(name, batch, context=found - 1)
    after = memory_bound_decoding(name, batch, context=found)
    assert before.cache_gb < before.weights_gb
    assert after.cache_gb >= after.weights_gb


def test_full_windows_never_reach_the_weights():
    step = memory_bound_decoding("Mistral 7B v0.1", batch=1)
    assert step.critical_context is None


def test_step_takes_at_least_each_of_its_parts():
    for name, batch, context in itertools.product(
        MODELS, (1, 30, 3000), (1, 500, 100_000)
    ):
        step = memory_bound_decoding(name, batch, context)
        memory = step.weights_ms + step.cache_ms
        assert step.step_ms >= memory * (1 - 1e-9)
        assert step.step_ms >= step.arithmetic_ms * (1 - 1e-9)
        assert step.step_ms <= memory + step.arithmetic_ms


def test_limits_by_hand():
    """Weights alone, arithmetic alone, cache alone; bf16 on an H200."""
    weights = 32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336)
    weights += 128256 * 4096
    one = memory_bound_decoding(batch=1, context=1)
    assert one.step_ms == pytest.approx(2 * weights / 4.8e9, rel=1e-4)
    many = memory_bound_decoding(batch=1 << 20, context=1)
    assert many.tokens_per_s == pytest.approx(
        989.4e12 / (2 * weights), rel=2e-3
    )
    long = memory_bound_decoding(batch=64, context=1 << 20)
    assert long.tokens_per_s == pytest.approx(
        4.8e12 / (131072 * 2**20), rel=2e-3
    )


def test_attention_of_mla_sits_at_the_ridge():
    ops = {op.name: op for op in operators(config("DeepSeek-V3"), 64, 8192)}
    intensity = ops["attention"].work.intensity
    assert intensity == pytest.approx(128 * (2 * 512 + 64) / 576)
    assert H200.ridge < intensity < 989.4 / 3.35  # the H100's ridge


def test_page_numbers():
    page = FIGURE.with_name("memory_bound_decoding.md").read_text("utf-8")
    for name in ("Llama 3 8B", "Mixtral 8x7B", "DeepSeek-V3", "gpt-oss 120B"):
        c = config(name)
        ops = operators(c, 64, 0)
        mine = sum(op.weight_bytes for op in ops)
        whole = sum(op.weight_bytes for op in operators(c, 10**9, 0))
        one = memory_bound_decoding(name, 1)
        row = (
            f"| {name} | {one.weights_gb:,.0f} GB | {mine / 1e9:,.0f} GB | "
            f"{whole / 1e9:,.0f} GB | {one.critical_batch:,} |"
        )
        assert row in page, row
    cases = (1, 1024), (64, 1024), (64, 32768), (256, 512)
    for batch, context in cases:
        step = memory_bound_decoding(batch=batch, context=context)
        row = (
            f"| {batch} | {context:,} | {step.weights_ms:.2f} | "
            f"{step.cache_ms:.2f} | {step.arithmetic_ms:.2f} | "
            f"{step.step_ms:.2f} | {step.tokens_per_s:,.0f} |"
        )
        assert row in page, row


def test_chart_passes_through_the_readers_point():
    chart = decoding_chart(batch=48, context=2000, model="Mixtral 8x7B")
    assert isinstance(chart, LineChart)
    step = memory_bound_decoding("Mixtral 8x7B", 48, 2000)
    (point,) = chart.points
    assert (point.x, point.y) == (48, step.step_ms)
    assert (point.x, point.y) in chart.lines[0].points


def test_menus_fit():
    for preset in [*PRESETS.values(), *CHIPS.values()]:
        memory_bound_decoding(**preset)


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": "Llama 9"},
        {"batch": 0},
        {"batch": 1 << 40},
        {"context": -1},
        {"weight_bytes": 0.0},
        {"cache_bytes": float("nan")},
        {"peak_tflops": 0.0},
        {"bandwidth_tb_s": float("inf")},
    ],
    ids=str,
)
def test_bad_input_is_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        memory_bound_decoding(**wrong)


def load(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_benchmark_decodes_correctly():
    """On the CPU with a tiny model; the same code runs on the GPU."""
    bench = load(BENCHMARK)
    tiny = dataclasses.replace(BASE, head_dim=8)
    model = bench.Decoder(tiny, tokens=40, device="cpu", dtype=torch.float32)
    for batch, context in ((1, 7), (4, 10)):
        x = torch.randn(batch, tiny.hidden_size)
        model.cache_of(0, batch, context)  # fits
        torch.testing.assert_close(
            model.step(x, batch, context),
            bench.reference(model, x, batch, context).float(),
        )


def test_benchmark_measures_what_fits():
    bench = load(BENCHMARK)
    cases = bench.cases(700_000)
    assert (256, 512) in cases
    assert (256, 32768) not in cases
    assert len(cases) == len(set(cases)) >= 12
    assert max(b * s for b, s in cases) <= 700_000


def test_benchmark_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs one NVIDIA GPU"):
        load(BENCHMARK).rows()


@pytest.mark.gpu
def test_rows_are_nearly_free_until_arithmetic_is_the_limit():
    size = 16384  # 512 MiB of weights, no cache holds them
    weights = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    times = {}
    for rows in (1, 64, 4096):
        x = torch.randn(rows, size, device="cuda", dtype=torch.bfloat16)
        seconds = []
        for _ in range(12):
            start, end = (
                torch.cuda.Event(enable_timing=True) for _ in range(2)
            )
            start.record()
            x @ weights
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end))
        times[rows] = sorted(seconds)[6]
    assert times[64] < 2.5 * times[1]
    assert times[4096] > 4 * times[64]


def test_step_is_the_sum_of_its_operators():
    ops = operators(config("Mixtral 8x7B"), 300, 900)
    each = [
        max(op.flops / 989.4e12, (op.weight_bytes + op.cache_bytes) / 4.8e12)
        for op in ops
    ]
    assert step_seconds(ops) == pytest.approx(sum(each))
