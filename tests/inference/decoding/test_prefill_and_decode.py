from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from warpmap import DEVICE
from warpmap.hardware.performance.roofline import H200, Work, bound
from warpmap.inference.decoding._two_stages import (
    CHIPS,
    DENSE,
    PRESETS,
    pass_seconds,
    pass_work,
    stages_chart,
    total,
    two_stages,
)
from warpmap.inference.decoding.kv_cache import (
    GrowingCache,
    RingCache,
    StaticCache,
)
from warpmap.inference.decoding.memory_bound_decoding import operators
from warpmap.inference.decoding.prefill_and_decode import (
    generate,
    greedy,
    stream,
)
from warpmap.models.configs import ModelConfig
from warpmap.models.foundations.decoder_only import Decoder, DecoderConfig

# the head is a matrix of its own: a tied one is read as embedding, too
SHAPE = DecoderConfig(50, 16, 2, 4, 2, 24, tied=False)
COUNTED = ModelConfig(
    "small", ("", ""), layers=2, hidden_size=16, heads=4, kv_heads=2,
    vocab_size=50, max_context=0, head_dim=4, intermediate_size=24,
)  # fmt: skip
B, P, N = 2, 9, 6
# 20 products of sums of at most 24 terms: 500 roundings, and their growth
ROUNDING = 1e-12


def lively():
    model = Decoder(SHAPE).to(DEVICE, torch.float64).requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.normal_(std=0.3)
    return model


def prompts(P=P):
    return torch.randint(SHAPE.vocab_size, (B, P), device=DEVICE)


def caches():
    room = SHAPE, B, P + N, None, torch.float64, DEVICE
    return [GrowingCache(SHAPE.layers), StaticCache(*room), RingCache(*room)]


class Watched:
    """Chooses as told, and keeps what it chose from."""

    def __init__(self, choose):
        self.choose, self.seen = choose, []

    def __call__(self, logits):
        self.seen.append(logits)
        return self.choose(logits)


def drawn(seed):
    source = torch.Generator(DEVICE).manual_seed(seed)
    return lambda logits: torch.multinomial(
        logits.softmax(-1), 1, generator=source
    ).squeeze(1)


@pytest.mark.slow
@pytest.mark.parametrize("which", range(3), ids=["growing", "static", "ring"])
@pytest.mark.parametrize("make", [lambda: greedy, lambda: drawn(3)])
def test_every_logit_equals_a_full_pass(which, make):
    model, prompt, cache = lively(), prompts(), caches()[which]
    choose = Watched(make())
    written = generate(model, prompt, N, choose, cache)
    assert written.shape == (B, N)
    assert cache.length == P + N - 1  # the last token was never read

    again, text = make(), prompt
    for logits in choose.seen:
        want = model(text)[:, -1]
        assert (logits - want).abs().max() < ROUNDING * want.abs().max()
        text = torch.cat((text, again(want)[:, None]), dim=1)
    assert torch.equal(text[:, P:], written)


def test_a_text_goes_on_where_its_cache_ends():
    model, prompt, cache = lively(), prompts(), GrowingCache(SHAPE.layers)
    first = generate(model, prompt, 3, greedy, cache)
    second = generate(model, first[:, -1:], 3, greedy, cache)
    whole = generate(model, prompt, 6, greedy, GrowingCache(SHAPE.layers))
    assert torch.equal(torch.cat((first, second), 1), whole)


def test_ragged_prompts_write_what_each_writes_alone():
    model, prompt = lively(), prompts()
    pads = torch.tensor([0, 4])
    cache = GrowingCache(SHAPE.layers, pads, DEVICE)
    together = generate(model, prompt, N, greedy, cache)
    for row, pad in enumerate(pads):
        alone = generate(
            model, prompt[row : row + 1, pad:], N, greedy,
            GrowingCache(SHAPE.layers),
        )  # fmt: skip
        assert torch.equal(together[row], alone[0])


def test_tokens_come_one_a_pass_and_prefill_makes_one_row_of_logits():
    model, cache = lively(), GrowingCache(SHAPE.layers)
    rows = []
    model.head.register_forward_hook(lambda m, x, y: rows.append(y.shape))
    held = [cache.length for _ in stream(model, prompts(), N, greedy, cache)]
    assert held == list(range(P, P + N))
    assert rows == [(B, SHAPE.vocab_size)] * N
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("fault", ["prompt again", "a token late", "no cache"])
def test_a_wrong_loop_is_caught(fault):
    model, prompt, choose = lively(), prompts(), Watched(drawn(3))
    generate(model, prompt, N, choose, GrowingCache(SHAPE.layers))
    cache, tokens, text = GrowingCache(SHAPE.layers), prompt, prompt
    again, error = drawn(3), 0.0
    for want in choose.seen:
        held = None if fault == "no cache" else cache
        late = -2 if fault == "a token late" and tokens is prompt else -1
        got = model(tokens, cache=held)[:, late]
        error = max(error, (got - want).abs().max().item())
        tokens = again(want)[:, None]
        text = torch.cat((text, tokens), dim=1)
        if fault == "prompt again":
            tokens = text
    assert error > 1e-3


class WeightsRead(TorchDispatchMode):
    """Bytes of parameters that matrix products take, counted by operator."""

    def __init__(self, model):
        super().__init__()
        self.own = {p.data_ptr() for p in model.parameters()}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm"):
            for x in args:
                if x.data_ptr() in self.own:
                    self.bytes += x.nbytes
        return func(*args, **(kwargs or {}))


class CacheRead(GrowingCache):
    """Counts what it hands out: what attention reads."""

    bytes = 0

    def update(self, layer, k, v):
        k, v = super().update(layer, k, v)
        self.bytes += k.nbytes + v.nbytes
        return k, v


def counted(held, new):
    """FLOPs and bytes of a pass, by the counters."""
    model, cache = lively(), CacheRead(SHAPE.layers)
    with sdpa_kernel(SDPBackend.MATH):  # others are single operators
        if held:
            model(prompts(held), cache=cache)
        cache.bytes = 0
        tokens = prompts(new)
        counter = FlopCounterMode(display=False)
        with counter, WeightsRead(model) as read:
            model.head(model.features(tokens, cache=cache)[:, -1])
    return counter.get_total_flops(), read.bytes, cache.bytes


def agrees(shape, held, new, counts):
    """Whether the formulas for a shape give what the counters saw."""
    flops, weights, cached = counts
    work = pass_work(shape, B, held, new, weight_bytes=8, cache_bytes=8)
    # the counter knows no mask: it counts pairs that are not seen, too
    unseen = 4 * B * SHAPE.layers * SHAPE.width * (new * (new - 1) // 2)
    return (
        total(work).flops == flops - unseen
        and work["products"].bytes + work["head"].bytes == weights
        and work["attention"].bytes == cached
    )


@pytest.mark.parametrize(("held", "new"), [(0, 9), (9, 1), (30, 1), (5, 4)])
def test_flops_and_bytes_are_those_of_the_operators(held, new):
    counts = counted(held, new)
    assert agrees(COUNTED, held, new, counts)
    for wrong in ({"kv_heads": 4}, {"vocab_size": 51}, {"layers": 3}):
        assert not agrees(replace(COUNTED, **wrong), held, new, counts)
    assert not agrees(COUNTED, held + 1, new, counts)
    assert not agrees(COUNTED, held, new + 1, counts)


@pytest.mark.parametrize("model", ["Llama 3 8B", "Qwen3 0.6B"])
def test_a_step_is_that_of_memory_bound_decoding(model):
    c = DENSE[model]
    ours = pass_work(c, 3, held=99, new=1)
    theirs = operators(c, batch=3, context=100)
    flops = sum(op.work.flops for op in theirs)
    traffic = sum(op.work.bytes for op in theirs)
    assert total(ours) == Work(flops, traffic)


@pytest.mark.parametrize("batch", [1, 300])
@pytest.mark.parametrize("written", [1, 2, 5])
def test_the_whole_request_is_the_sum_of_its_passes(batch, written):
    c = DENSE["Llama 3 8B"]
    passes = [pass_work(c, batch, 0, 700)]
    passes += [pass_work(c, batch, 700 + n, 1) for n in range(written - 1)]
    got = two_stages("Llama 3 8B", 700, written, batch)
    seconds = sum(pass_seconds(p) for p in passes)
    assert got.total_ms == pytest.approx(1e3 * seconds, rel=1e-12)
    assert got.first_token_ms == pytest.approx(1e3 * pass_seconds(passes[0]))
    rest = seconds - pass_seconds(passes[0])
    assert got.decode_percent == pytest.approx(100 * rest / seconds)


def test_stages_lie_on_two_sides_of_the_ridge():
    for name in PRESETS:
        s = two_stages(name, prompt=4096)
        assert s.decode_intensity < 5 < H200.ridge < s.prefill_intensity
        # no operator beats the roof, so neither does their sum
        for intensity, rate in (
            (s.prefill_intensity, s.prefill_tflops),
            (s.decode_intensity, s.decode_tflops),
        ):
            roof = bound(Work(intensity, 1)).flops_per_s / 1e12
            assert rate <= roof * (1 + 1e-12)
    points = stages_chart(prompt=10, **CHIPS["H200 SXM"]).points
    assert [p.x for p in points] == sorted((p.x for p in points), reverse=True)


def test_errors_say_what_came():
    with pytest.raises(ValueError, match="model must be one of Llama 2 7B"):
        two_stages("DeepSeek-V3")
    for name in ("prompt", "written", "batch", "weight_bytes", "peak_tflops"):
        with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
            two_stages(**{name: 0})
    model, cache = lively(), GrowingCache(SHAPE.layers)
    with pytest.raises(ValueError, match=r"P from 1, got \(2, 0\)"):
        generate(model, prompts(0), 1, greedy, cache)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        generate(model, prompts(), 0, greedy, cache)
