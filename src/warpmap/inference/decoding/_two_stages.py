"""What a pass over any number of new tokens costs, and the two stages' share.

A pass takes T new tokens of each of B texts, P tokens of which are held:

    product with W weights     2 B T W FLOPs       W weights read
    attention, H heads of D    4 B H D FLOPs a     2 B Hkv D values read for
                               pair that is seen   P tokens, written for T
    head                       as a product, of the last token only

Prefill has P = 0 and T tokens, a decoding step P tokens and T = 1. Other
activations are left out: small beside weights, and fused where they are not.
"""

import math
from dataclasses import dataclass
from typing import Any

from warpmap.chart import Axis, Line, LineChart, Point
from warpmap.hardware.gpus import GPUS
from warpmap.hardware.performance.roofline import (
    H200,
    Ceilings,
    Work,
    bound,
)
from warpmap.models.configs import MODELS, ModelConfig
from warpmap.models.foundations.parameter_count import (
    gated_ffn,
    grouped_attention,
)


def pass_work(
    c: ModelConfig,
    batch: int,
    held: int,
    new: int,
    weight_bytes: float = 2,
    cache_bytes: float = 2,
) -> dict[str, Work]:
    """FLOPs and bytes of one pass, by operator.

    Args:
        c: Shape of a model with dense layers and cached heads.
        batch: Texts.
        held: Tokens of each in the cache.
        new: Tokens of each that the pass takes.
        weight_bytes: Bytes of a weight.
        cache_bytes: Bytes of a cached value.

    Examples:
        >>> prefill = pass_work(MODELS["Llama 3 8B"], 1, held=0, new=1024)
        >>> step = pass_work(MODELS["Llama 3 8B"], 1, held=1024, new=1)
        >>> prefill["products"].intensity, step["products"].intensity
        (1024.0, 1.0)
    """
    layer = grouped_attention(c.hidden_size, c.heads, c.kv_heads, c.head_dim)
    layer += gated_ffn(c.hidden_size, c.intermediate_size)
    weights, head = c.layers * layer, c.vocab_size * c.hidden_size
    pairs = new * held + new * (new + 1) // 2
    values = 2 * c.kv_heads * c.head_dim * (held + new)
    return {
        "products": Work(2 * batch * new * weights, weight_bytes * weights),
        "attention": Work(
            4 * batch * c.layers * c.heads * c.head_dim * pairs,
            cache_bytes * batch * c.layers * values,
        ),
        "head": Work(2 * batch * head, weight_bytes * head),
    }


def pass_seconds(work: dict[str, Work], chip: Ceilings = H200) -> float:
    """Lower bound of a pass whose operators run one after another.

    Args:
        work: From ``pass_work``.
        chip: What the chip can do.

    Examples:
        >>> step = pass_work(MODELS["Llama 3 8B"], 1, held=1023, new=1)
        >>> round(1e3 * pass_seconds(step), 2)
        3.15
    """
    return math.fsum(bound(part, chip).seconds for part in work.values())


def total(work: dict[str, Work]) -> Work:
    """All operators together.

    Args:
        work: From ``pass_work``.

    Examples:
        >>> total({"a": Work(1, 2), "b": Work(3, 4)})
        Work(flops=4.0, bytes=6.0)
    """
    parts = work.values()
    return Work(
        math.fsum(part.flops for part in parts),
        math.fsum(part.bytes for part in parts),
    )


@dataclass(frozen=True)
class TwoStages:
    """A request, stage by stage, at its best.

    Attributes:
        first_token_ms: Prefill, in ms: the time to the first token.
        next_token_ms: A decoding step, in ms, on average.
        total_ms: All tokens, in ms.
        decode_percent: Share of the time that goes to decoding, in %.
        prefill_intensity: FLOPs a byte of prefill.
        decode_intensity: FLOPs a byte of the first decoding step.
        prefill_tflops: Rate of prefill, in TFLOP/s.
        decode_tflops: Rate of the first decoding step, in TFLOP/s.
        ratio: Time of a written token over time of a token read.
    """

    first_token_ms: float
    next_token_ms: float
    total_ms: float
    decode_percent: float
    prefill_intensity: float
    decode_intensity: float
    prefill_tflops: float
    decode_tflops: float
    ratio: float


DENSE = {
    name: c
    for name, c in MODELS.items()
    if not c.experts and not c.kv_lora_rank and not c.windowed_layers
}
"""Published models that ``pass_work`` describes."""


def two_stages(
    model: str = "Llama 3 8B",
    prompt: int = 1024,
    written: int = 256,
    batch: int = 1,
    weight_bytes: float = 2.0,
    cache_bytes: float = 2.0,
    peak_tflops: float = 989.4,
    bandwidth_tb_s: float = 4.8,
) -> TwoStages:
    """Lower bounds of both stages of a request.

    Args:
        model: Name of a published dense model.
        prompt: Tokens of the prompt.
        written: Tokens to write.
        batch: Requests that run together.
        weight_bytes: Bytes of a weight: 2 for bf16, 1 for fp8, 0.5 for int4.
        cache_bytes: Bytes of a cached value.
        peak_tflops: Dense peak of the chip, in TFLOP/s.
        bandwidth_tb_s: Memory bandwidth of the chip, in TB/s.

    Raises:
        ValueError: If there is no such dense model, or a number is out of
            range.

    Examples:
        >>> request = two_stages(prompt=1024, written=256)
        >>> round(request.first_token_ms, 1), round(request.next_token_ms, 2)
        (14.9, 3.16)
    """
    given = dict(locals())
    given.pop("model")
    if model not in DENSE:
        raise ValueError(f"model must be one of {', '.join(DENSE)}")
    for name, value in given.items():
        if not 0 < value < 1 << 30:
            raise ValueError(f"{name} must be positive, got {value}")
    chip = Ceilings(peak_tflops * 1e12, bandwidth_tb_s * 1e12)

    def cost(held: int, new: int) -> tuple[Work, float]:
        work = pass_work(
            DENSE[model], batch, held, new, weight_bytes, cache_bytes
        )
        return total(work), pass_seconds(work, chip)

    prefill, first = cost(0, prompt)
    step, start = cost(prompt, 1)
    # attention's intensity is that of its heads, whatever is held: the time
    # of a step grows along a line, so the mean is that of first and last
    _, end = cost(prompt + max(written - 2, 0), 1)
    following = (start + end) / 2
    decode = (written - 1) * following
    return TwoStages(
        first_token_ms=1e3 * first,
        next_token_ms=1e3 * following,
        total_ms=1e3 * (first + decode),
        decode_percent=100 * decode / (first + decode),
        prefill_intensity=prefill.intensity,
        decode_intensity=step.intensity,
        prefill_tflops=prefill.flops / first / 1e12,
        decode_tflops=step.flops / start / 1e12,
        ratio=following / (first / prompt),
    )


def stages_chart(**arguments: Any) -> LineChart:
    """Both stages under the roof of the chip.

    Args:
        **arguments: Those of ``two_stages``.

    Examples:
        >>> [point.name for point in stages_chart().points]
        ['prefill', 'decode']
    """
    s = two_stages(**arguments)
    peak = arguments.get("peak_tflops", 989.4)
    bandwidth = arguments.get("bandwidth_tb_s", 4.8)
    ridge = peak / bandwidth
    first = min(0.5, s.decode_intensity, s.prefill_intensity)
    last = max(8 * ridge, s.prefill_intensity, s.decode_intensity)
    return LineChart(
        "Two stages of one request under the roof",
        Axis("FLOPs a byte", log=True),
        Axis("TFLOP/s, at best", log=True),
        [
            Line(
                "roof",
                [(first, first * bandwidth), (ridge, peak), (last, peak)],
            )
        ],
        [
            Point("prefill", s.prefill_intensity, s.prefill_tflops),
            Point("decode", s.decode_intensity, s.decode_tflops),
        ],
    )


PRESETS: dict[str, dict[str, str]] = {name: {"model": name} for name in DENSE}
"""The calculator's menu of models."""

CHIPS: dict[str, dict[str, float | None]] = {
    name: {"peak_tflops": gpu.bf16_tflops, "bandwidth_tb_s": gpu.bandwidth_tb_s}
    for name, gpu in GPUS.items()
    if gpu.bf16_tflops
}
"""The calculator's menu of GPUs, in bf16."""
