"""What one decoding step computes and reads, operator by operator.

Every request adds one token. All of them share the weights, and each brings a
cache of its own. For B requests that attend to S tokens each:

    product with W weights     2 B W FLOPs            W weights read
    attention, H heads of D    4 B S H D FLOPs        2 B S Hkv D values read
    MLA, latent r, rotary Dr   2 B S H (2 r + Dr)     B S (r + Dr) values read

Of experts only those that some token chose are read. Each operator takes at
least the longer of its two times, and operators run one after another.
Activations are not counted: they are small and can stay on the chip.

Reference: Williams, Waterman and Patterson, 2009,
https://doi.org/10.1145/1498765.1498785
Reference: Pope et al., 2022, https://arxiv.org/abs/2211.05102
Reference: Yuan et al., 2024, https://arxiv.org/abs/2402.16363
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from warpmap.chart import Axis, Line, LineChart, Point
from warpmap.hardware.gpus import GPUS
from warpmap.hardware.performance.roofline import H200, Ceilings, Work, bound
from warpmap.inference.decoding.kv_cache_size import values_per_token
from warpmap.models.configs import MODELS, ModelConfig, config
from warpmap.models.foundations.parameter_count import (
    gated_ffn,
    grouped_attention,
    latent_attention,
)

MOST = 1 << 30
"""Batches and contexts are not searched further than this."""


@dataclass(frozen=True)
class Operator:
    """One kind of operation, in all layers that have it.

    Args:
        name: What it is.
        flops: Multiplications and additions of a step.
        weight_bytes: Weights that a step reads, whatever the batch.
        cache_bytes: Keys and values that a step reads.
    """

    name: str
    flops: float
    weight_bytes: float
    cache_bytes: float = 0

    @property
    def work(self) -> Work:
        """FLOPs, and bytes of both kinds."""
        return Work(self.flops, self.weight_bytes + self.cache_bytes)


def experts_touched(
    tokens: float, experts: int, experts_per_token: int
) -> float:
    """How many experts of a layer at least one token chooses, on average.

    Tokens choose independently and every expert is as likely as another. Any
    other likelihoods touch fewer.

    Args:
        tokens: Tokens of the batch.
        experts: Experts of the layer.
        experts_per_token: Different experts that a token chooses.

    Examples:
        >>> experts_touched(1, 256, 8)
        8.0
        >>> round(experts_touched(64, 256, 8))
        222
    """
    missed: float = (1 - experts_per_token / experts) ** tokens
    return experts * (1 - missed)


def attention_work(c: ModelConfig, context: int) -> tuple[float, float]:
    """FLOPs, and values read, of one request's attention in all layers.

    With MLA the query is moved into the space of the latent, which then serves
    as key and value of all heads: the form called absorbed.

    Args:
        c: The model's shape.
        context: Tokens attended to, the new one among them.

    Examples:
        >>> attention_work(config("Llama 3 8B"), context=1)
        (524288, 65536)
    """
    windowed = min(context, c.window) if c.windowed_layers else 0
    held = (c.layers - c.windowed_layers) * context
    held += c.windowed_layers * windowed
    values = values_per_token(
        c.kv_heads, c.head_dim, c.kv_lora_rank, c.qk_rope_head_dim
    )
    if c.kv_lora_rank:  # a score with the latent and position, then a sum
        flops = 2 * c.heads * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
    else:
        flops = 4 * c.heads * c.head_dim
    return flops * held, values * held


def operators(
    c: ModelConfig,
    batch: int,
    context: int,
    weight_bytes: float = 2,
    cache_bytes: float = 2,
) -> list[Operator]:
    """The operators of one step; those that a model lacks are left out.

    Args:
        c: The model's shape.
        batch: Requests, one new token each.
        context: Tokens that each attends to, the new one among them.
        weight_bytes: Bytes of a weight.
        cache_bytes: Bytes of a cached value.

    Examples:
        >>> for op in operators(config("Llama 3 8B"), batch=1, context=8192):
        ...     print(op.name, f"{op.work.intensity:.0f}")
        attention projections 1
        attention 4
        dense FFN 1
        head 1
    """
    C = c.hidden_size
    if c.kv_lora_rank:
        projections = latent_attention(
            C,
            c.heads,
            c.q_lora_rank,
            c.kv_lora_rank,
            c.qk_nope_head_dim,
            c.qk_rope_head_dim,
            c.v_head_dim,
        )
    else:
        projections = grouped_attention(C, c.heads, c.kv_heads, c.head_dim)
    expert_layers = c.layers - c.dense_layers if c.experts else 0
    expert = gated_ffn(C, c.moe_intermediate_size)
    touched = 0.0
    if c.experts:
        touched = experts_touched(batch, c.experts, c.experts_per_token)

    # layers that have it, weights that multiply a token, weights read
    dense = gated_ffn(C, c.intermediate_size)
    parts = {
        "attention projections": (c.layers, projections, projections),
        "dense FFN": (c.layers - expert_layers, dense, dense),
        "router": (expert_layers, c.experts * C, c.experts * C),
        "experts": (
            expert_layers,
            c.experts_per_token * expert,
            touched * expert,
        ),
        "shared experts": (
            expert_layers,
            c.shared_experts * expert,
            c.shared_experts * expert,
        ),
        "head": (1, c.vocab_size * C, c.vocab_size * C),
    }
    products = [
        Operator(name, 2 * batch * layers * used, weight_bytes * layers * read)
        for name, (layers, used, read) in parts.items()
        if layers and used
    ]
    flops, values = attention_work(c, context)
    attention = Operator(
        "attention", batch * flops, 0, cache_bytes * batch * values
    )
    return [products[0], attention, *products[1:]]


def step_seconds(ops: Sequence[Operator], chip: Ceilings = H200) -> float:
    """Lower bound of a step whose operators run one after another.

    Args:
        ops: From ``operators``.
        chip: What the chip can do.

    Examples:
        >>> ops = operators(config("Llama 3 8B"), batch=1, context=1)
        >>> round(step_seconds(ops) * 1e3, 2)
        3.13
    """
    return math.fsum(bound(op.work, chip).seconds for op in ops)


def _first(holds: Callable[[int], bool]) -> int | None:
    """The smallest number from 1 on for which something starts to hold."""
    found = 1 + bisect_left(range(1, MOST), True, key=holds)
    return found if found < MOST else None


def critical_batch(
    c: ModelConfig, chip: Ceilings = H200, weight_bytes: float = 2
) -> int | None:
    """The batch from which weights wait for arithmetic, not for memory.

    All products with weights are taken together; attention is not counted.

    Args:
        c: The model's shape.
        chip: What the chip can do.
        weight_bytes: Bytes of a weight.

    Examples:
        >>> critical_batch(config("Llama 3 8B"))
        207
        >>> critical_batch(config("DeepSeek-V3"))
        3772
    """

    def computes(batch: int) -> bool:
        ops = operators(c, batch, 0, weight_bytes)
        flops = math.fsum(op.flops for op in ops)
        read = math.fsum(op.weight_bytes for op in ops)
        return flops / chip.flops_per_s >= read / chip.bytes_per_s

    return _first(computes)


@dataclass(frozen=True)
class MemoryBoundDecoding:
    """One decoding step at its best.

    Attributes:
        step_ms: Lower bound of the step, in ms.
        tokens_per_s: Tokens a second of all requests together, at most.
        weights_ms: Time to read the weights, in ms.
        cache_ms: Time to read keys and values, in ms.
        arithmetic_ms: Time of all operations at the peak, in ms.
        longest: Which of these three takes longest.
        weights_gb: Weights read, in GB.
        cache_gb: Keys and values read, in GB.
        gflops: Operations, in 10^9.
        experts_read: Experts of a layer that are read, of those it has.
        critical_batch: Requests from which arithmetic hides the weights.
        critical_context: Tokens a request from which keys and values are
            more than the weights, at this batch.
    """

    step_ms: float
    tokens_per_s: float
    weights_ms: float
    cache_ms: float
    arithmetic_ms: float
    longest: str
    weights_gb: float
    cache_gb: float
    gflops: float
    experts_read: str
    critical_batch: int | None
    critical_context: int | None


def _config(model: str) -> ModelConfig:
    try:
        return config(model)
    except ValueError as error:
        raise ValueError(f"model: {error}") from error


def memory_bound_decoding(
    model: str = "Llama 3 8B",
    batch: int = 16,
    context: int = 4096,
    weight_bytes: float = 2.0,
    cache_bytes: float = 2.0,
    peak_tflops: float = 989.4,
    bandwidth_tb_s: float = 4.8,
) -> MemoryBoundDecoding:
    """Lower bound of one decoding step, and what sets it.

    Args:
        model: Name of a published model.
        batch: Requests that decode together.
        context: Tokens that each attends to, the new one among them.
        weight_bytes: Bytes of a weight: 2 for bf16, 1 for fp8, 0.5 for int4.
        cache_bytes: Bytes of a cached value.
        peak_tflops: Dense peak of the chip, in TFLOP/s.
        bandwidth_tb_s: Memory bandwidth of the chip, in TB/s.

    Raises:
        ValueError: If there is no such model, or a number is out of range.

    Examples:
        >>> one = memory_bound_decoding(batch=1, context=1024)
        >>> many = memory_bound_decoding(batch=64, context=1024)
        >>> round(one.step_ms, 2), round(many.step_ms, 2)
        (3.15, 4.92)
    """
    given = dict(locals())
    c = _config(given.pop("model"))
    for name, value in given.items():
        if not 0 < value < MOST:
            raise ValueError(f"{name} must be positive, got {value}")
    chip = Ceilings(peak_tflops * 1e12, bandwidth_tb_s * 1e12)
    ops = operators(c, batch, context, weight_bytes, cache_bytes)
    weights = math.fsum(op.weight_bytes for op in ops)
    cache = math.fsum(op.cache_bytes for op in ops)
    flops = math.fsum(op.flops for op in ops)
    seconds = step_seconds(ops, chip)
    parts = {
        "weights": weights / chip.bytes_per_s,
        "keys and values": cache / chip.bytes_per_s,
        "arithmetic": flops / chip.flops_per_s,
    }

    def cache_leads(tokens: int) -> bool:
        _, values = attention_work(c, tokens)
        return cache_bytes * batch * values >= weights

    read = "no experts"
    if c.experts:
        touched = experts_touched(batch, c.experts, c.experts_per_token)
        read = f"{touched:.0f} of {c.experts}"
    return MemoryBoundDecoding(
        step_ms=seconds * 1e3,
        tokens_per_s=batch / seconds,
        weights_ms=parts["weights"] * 1e3,
        cache_ms=parts["keys and values"] * 1e3,
        arithmetic_ms=parts["arithmetic"] * 1e3,
        longest=max(parts, key=lambda part: parts[part]),
        weights_gb=weights / 1e9,
        cache_gb=cache / 1e9,
        gflops=flops / 1e9,
        experts_read=read,
        critical_batch=critical_batch(c, chip, weight_bytes),
        critical_context=_first(cache_leads),
    )


PRESETS: dict[str, dict[str, str]] = {name: {"model": name} for name in MODELS}
"""The calculator's menu of models."""

CHIPS: dict[str, dict[str, float | None]] = {
    name: {"peak_tflops": gpu.bf16_tflops, "bandwidth_tb_s": gpu.bandwidth_tb_s}
    for name, gpu in GPUS.items()
    if gpu.bf16_tflops
}
"""The calculator's menu of GPUs, in bf16."""


def decoding_chart(batch: int = 16, **arguments: Any) -> LineChart:
    """The step and its three parts over the batch.

    Args:
        batch: Where the reader's point is.
        **arguments: The others of ``memory_bound_decoding``.

    Examples:
        >>> [line.name for line in decoding_chart().lines]
        ['step', 'weights', 'keys, values', 'arithmetic']
    """
    batches = sorted({batch, *(1 << k for k in range(13))})
    steps = {n: memory_bound_decoding(batch=n, **arguments) for n in batches}
    lines = {
        "step": "step_ms",
        "weights": "weights_ms",
        "keys, values": "cache_ms",
        "arithmetic": "arithmetic_ms",
    }
    return LineChart(
        "One decoding step, and what it waits for",
        Axis("requests in the batch", log=True),
        Axis("milliseconds, at best", log=True),
        [
            Line(name, [(n, getattr(s, key)) for n, s in steps.items()])
            for name, key in lines.items()
        ],
        [Point("here", batch, steps[batch].step_ms)],
    )
