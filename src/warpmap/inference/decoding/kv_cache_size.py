"""Bytes that a KV cache takes, and requests that fit beside the weights.

Every layer keeps, for each token, what later tokens attend to:

    MHA, GQA, MQA   a key and a value a key-value head: 2 Hkv D values
    MLA             one latent and one rotary key for all heads: r + Dr values

A layer with a sliding window keeps the last tokens only. Memory is handed out
in blocks of tokens, so a request pays for the rest of its last block.

All sizes are in bytes. Memory is given in GiB (2**30 bytes), never in GB.

Reference: Ainslie et al., 2023, https://arxiv.org/abs/2305.13245
Reference: DeepSeek-AI, 2024, https://arxiv.org/abs/2405.04434
"""

import math
from dataclasses import dataclass

from warpmap.chart import Axis, Line, LineChart, Point
from warpmap.hardware.gpus import GPUS
from warpmap.models import configs

GIB = 1 << 30

MODELS: dict[str, dict[str, int]] = {
    "Llama 2 7B": {"layers": 32, "kv_heads": 32, "head_dim": 128},
    "Llama 3 70B": {"layers": 80, "kv_heads": 8, "head_dim": 128},
    "Llama 3 8B": {"layers": 32, "kv_heads": 8, "head_dim": 128},
    "Mistral 7B v0.1": {
        "layers": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "window": 4096,
        "windowed_layers": 32,
    },
    "DeepSeek-V2": {
        "layers": 60,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
    },
    "DeepSeek-V3": {
        "layers": 61,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
    },
}
"""Shapes of published models, as arguments of ``kv_cache_size``."""


@dataclass(frozen=True)
class KVCacheSize:
    """What a cache takes.

    Attributes:
        bytes_per_token: Bytes of one token in all layers, no window full yet.
        bytes_per_request: Bytes of one request, whole blocks.
        requests: Requests of that length that fit at once.
    """

    bytes_per_token: int
    bytes_per_request: int
    requests: int


def values_per_token(
    kv_heads: int,
    head_dim: int,
    kv_lora_rank: int = 0,
    qk_rope_head_dim: int = 0,
) -> int:
    """Values that one layer caches for one token.

    Args:
        kv_heads: Key-value heads; not used by MLA.
        head_dim: Values a key, and a value; not used by MLA.
        kv_lora_rank: Values of MLA's latent; 0 for any other attention.
        qk_rope_head_dim: Values of MLA's rotary key, one for all heads.

    Examples:
        >>> values_per_token(kv_heads=8, head_dim=128)
        2048
        >>> values_per_token(8, 128, kv_lora_rank=512, qk_rope_head_dim=64)
        576
    """
    if kv_lora_rank:
        return kv_lora_rank + qk_rope_head_dim
    return 2 * kv_heads * head_dim


def tokens_held(tokens: int, window: int = 0, block_tokens: int = 1) -> int:
    """Tokens that one layer has memory for.

    Args:
        tokens: Tokens of the request so far.
        window: Last tokens that the layer attends to; 0 for all.
        block_tokens: Tokens in a block.

    Examples:
        >>> tokens_held(1001, block_tokens=16)
        1008
        >>> tokens_held(32768, window=4096)
        4096
    """
    kept = min(tokens, window) if window else tokens
    return -(-kept // block_tokens) * block_tokens


def requests_that_fit(
    memory_bytes: int, weight_bytes: int, request_bytes: int
) -> int:
    """Whole requests that fit into what the weights leave.

    Args:
        memory_bytes: Memory of the GPU, or of all GPUs of one replica.
        weight_bytes: Weights, and whatever else stays in memory.
        request_bytes: Cache of one request.

    Examples:
        >>> requests_that_fit(80 * GIB, 16 * GIB, 3 * GIB)
        21
    """
    return max(0, memory_bytes - weight_bytes) // request_bytes


def kv_cache_size(
    layers: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    kv_lora_rank: int = 0,
    qk_rope_head_dim: int = 0,
    window: int = 0,
    windowed_layers: int = 0,
    tokens: int = 8192,
    bytes_per_value: int = 2,
    block_tokens: int = 16,
    memory_gib: int = 80,
    weights_gib: int = 15,
) -> KVCacheSize:
    """Size of a KV cache; the defaults are Llama 3 8B in 16 bits.

    Args:
        layers: Layers that attend.
        kv_heads: Key-value heads of a layer; MHA: all heads, MQA: 1.
        head_dim: Values a key, and a value.
        kv_lora_rank: Values of MLA's latent, which replaces the heads; else 0.
        qk_rope_head_dim: Values of MLA's rotary key; else 0.
        window: Tokens that a windowed layer keeps; 0 if there is none.
        windowed_layers: How many of the layers keep only a window.
        tokens: Tokens of one request, prompt and answer.
        bytes_per_value: 2 for bfloat16, 1 for FP8 (scales not counted).
        block_tokens: Tokens in a block; 1 for no rounding.
        memory_gib: Memory in GiB of the GPUs that hold one replica.
        weights_gib: GiB taken by weights and all else that stays.

    Returns:
        Bytes a token and a request, and the requests that fit.

    Raises:
        ValueError: If a number is out of range, or windows and MLA's parts
            are half given.

    Examples:
        >>> size = kv_cache_size()
        >>> size.bytes_per_token, size.bytes_per_request / GIB, size.requests
        (131072, 1.0, 65)
        >>> kv_cache_size(**MODELS["DeepSeek-V3"]).bytes_per_token
        70272
    """
    given = dict(locals())  # the arguments, nothing else yet
    may_be_zero = {
        "kv_lora_rank",
        "qk_rope_head_dim",
        "window",
        "windowed_layers",
        "weights_gib",
    }
    for name, value in given.items():
        least = 0 if name in may_be_zero else 1
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if windowed_layers > layers:
        raise ValueError(
            f"windowed_layers must be at most {layers} layers, "
            f"got {windowed_layers}"
        )
    if bool(window) != bool(windowed_layers):
        raise ValueError(
            "give both window and windowed_layers, or neither, "
            f"got {window} and {windowed_layers}"
        )
    if qk_rope_head_dim and not kv_lora_rank:
        raise ValueError(
            "qk_rope_head_dim belongs to MLA and needs kv_lora_rank, "
            f"got {qk_rope_head_dim} and 0"
        )

    layer_bytes = bytes_per_value * values_per_token(
        kv_heads, head_dim, kv_lora_rank, qk_rope_head_dim
    )
    full = (layers - windowed_layers) * tokens_held(
        tokens, block_tokens=block_tokens
    )
    windowed = windowed_layers * tokens_held(tokens, window, block_tokens)
    request = layer_bytes * (full + windowed)
    return KVCacheSize(
        bytes_per_token=layers * layer_bytes,
        bytes_per_request=request,
        requests=requests_that_fit(
            memory_gib * GIB, weights_gib * GIB, request
        ),
    )


def kv_cache_chart(**arguments: int) -> LineChart:
    """Requests that fit, over the length of a request.

    Args:
        arguments: Those of ``kv_cache_size``, all of them.

    Returns:
        A line for these arguments, one with half the bytes a value, and one
        without the windows where there are any. Where no request fits, there
        is a gap.

    Raises:
        ValueError: As ``kv_cache_size``.

    Examples:
        >>> chart = kv_cache_chart(tokens=8192, bytes_per_value=2)
        >>> [line.name for line in chart.lines]
        ['2 bytes a value', '1 byte a value']
    """
    here = kv_cache_size(**arguments)
    tokens, width = arguments["tokens"], arguments["bytes_per_value"]
    variants = {_bytes_a_value(width): arguments}
    if width % 2 == 0:
        half = {**arguments, "bytes_per_value": width // 2}
        variants[_bytes_a_value(width // 2)] = half
    if arguments.get("windowed_layers"):
        whole = {**arguments, "window": 0, "windowed_layers": 0}
        variants["without windows"] = whole

    lines = []
    for name, given in variants.items():
        points = []
        for n in sorted({tokens, *(2**n for n in range(8, 21))}):
            fit = kv_cache_size(**{**given, "tokens": n}).requests
            points.append((n, fit or math.nan))
        lines.append(Line(name, points))
    return LineChart(
        "Requests that fit, by their length",
        Axis("tokens of a request", log=True),
        Axis("requests", log=True),
        lines,
        [Point(f"{here.requests:,} here", tokens, here.requests or math.nan)],
    )


def _bytes_a_value(count: int) -> str:
    return f"{count} byte{'' if count == 1 else 's'} a value"


PRESETS = {
    name: {
        "layers": model.layers,
        "kv_heads": model.kv_heads,
        "head_dim": model.head_dim or 128,  # MLA has none, and ignores it
        "kv_lora_rank": model.kv_lora_rank,
        "qk_rope_head_dim": model.qk_rope_head_dim if model.kv_lora_rank else 0,
        "window": model.window,
        "windowed_layers": model.windowed_layers,
        "weights_gib": math.ceil(2 * model.published_total / GIB),
    }
    for name, model in configs.MODELS.items()
    if model.published_total
}
"""The calculator's menu of models, with their weights in 16 bits."""

MEMORY = {
    f"{count} x {name}" if count > 1 else name: {
        "memory_gib": math.floor(count * gpu.memory_gib)
    }
    for count in (1, 8)
    for name, gpu in GPUS.items()
    if gpu.memory_gib
}
"""The calculator's menu of GPUs that hold one replica."""
