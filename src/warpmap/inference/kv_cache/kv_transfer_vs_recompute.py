"""Time to fetch the cached keys and values of a prefix, or to compute them.

    fetch       start-up, then pieces: each the longer of issuing and moving
    recompute   FLOPs of a prefill over the rate reached, and at least the
                time to read all weights once

A prefill of ``n`` tokens multiplies each token with every parameter, and each
token with all tokens before it. Bytes grow with ``n``, FLOPs with ``n`` squared
in the end, so fetching wins at great lengths over any link.

Units are decimal: GB are 10^9 bytes, TFLOP 10^12 operations.

Reference: Qin et al., 2024, https://arxiv.org/abs/2407.00079
Reference: Liu et al., 2023, https://arxiv.org/abs/2310.07240
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from warpmap.chart import Axis, Line, LineChart, Point
from warpmap.hardware.gpus import GPUS
from warpmap.hardware.network.interconnects import LINKS, transfer
from warpmap.hardware.performance.roofline import Bound, Ceilings, Work, bound
from warpmap.inference.decoding.kv_cache_size import values_per_token
from warpmap.models.configs import MODELS, ModelConfig
from warpmap.models.foundations.parameter_count import count
from warpmap.training.cost.flops_and_mfu import attention_scores, shape

MOST_TOKENS = 1 << 30
"""Break-even lengths are looked for up to here."""


@dataclass(frozen=True)
class FetchOrRecompute:
    """Both ways to get a prefix into the GPU's cache.

    Attributes:
        fetch_bytes: Bytes that are moved, whole blocks.
        fetch_ms: Time to fetch them.
        recompute_tflop: Operations of the prefill, in 10^12.
        attention_percent: Share of them that grows with the square.
        recompute_ms: Time to compute the prefix.
        wall: What sets the pace of the prefill, compute or memory.
        fetch_is_faster: Whether to fetch.
        break_even_gb_s: Bandwidth at which both take equally long; none if
            start-up and issuing alone take longer.
        break_even_tokens: Length from which fetching is always faster.
    """

    fetch_bytes: int
    fetch_ms: float
    recompute_tflop: float
    attention_percent: float
    recompute_ms: float
    wall: str
    fetch_is_faster: bool
    break_even_gb_s: float | None
    break_even_tokens: int | None


def fetch_seconds(
    pieces: int,
    piece_bytes: float,
    bytes_per_s: float,
    latency_s: float,
    issue_s: float,
) -> float:
    """Time to move pieces that are queued one after another.

    Issuing a piece hides behind moving the one before, so each takes the
    longer of the two.

    Args:
        pieces: How many.
        piece_bytes: Bytes of each.
        bytes_per_s: Bandwidth.
        latency_s: Time before the first byte moves, in seconds.
        issue_s: Time to put one piece into the queue, in seconds.

    Examples:
        >>> fetch_seconds(10, 2e9, 1e9, latency_s=1.0, issue_s=0.5)
        21.0
    """
    return latency_s + pieces * max(issue_s, piece_bytes / bytes_per_s)


def recompute_bound(
    flops: float, weight_bytes: float, flops_per_s: float, bytes_per_s: float
) -> Bound:
    """The roof over a prefill: computing, or reading the weights once.

    Args:
        flops: Operations of the prefill.
        weight_bytes: Bytes of the weights.
        flops_per_s: Rate that matrix products reach.
        bytes_per_s: Memory bandwidth.

    Examples:
        >>> recompute_bound(1e12, 16e9, 500e12, 4e12).wall
        'memory'
    """
    return bound(Work(flops, weight_bytes), Ceilings(flops_per_s, bytes_per_s))


def first_of_all_gains(
    gain: Callable[[int], float], block_tokens: int = 1
) -> int | None:
    """Smallest length from which ``gain`` stays positive.

    Args:
        gain: Of a length. From one block's first token to the next one's it
            may fall, then rise, but not fall again; within a block it rises.
        block_tokens: Tokens in a block.

    Returns:
        The length, or ``None`` if there is none up to ``MOST_TOKENS``.

    Examples:
        >>> first_of_all_gains(lambda n: n * n - 100)
        11
    """
    blocks = range(MOST_TOKENS // block_tokens)

    def at_start(block: int) -> float:
        return gain(block * block_tokens + 1)

    lowest = bisect_left(
        blocks, True, key=lambda b: at_start(b + 1) > at_start(b)
    )
    after = bisect_left(blocks, True, lo=lowest, key=lambda b: at_start(b) > 0)
    if after == len(blocks):
        return None
    if after == lowest:  # positive where it is smallest
        return 1
    inside = range((after - 1) * block_tokens + 1, after * block_tokens + 1)
    return inside.start + bisect_left(inside, True, key=lambda n: gain(n) > 0)


def fetch_or_recompute(
    tokens: int = 8192,
    layers: int = 32,
    heads: int = 32,
    qk_head_dim: int = 128,
    v_head_dim: int = 128,
    active_billions: float = 6.9793,
    weights_gb: float = 13.9592,
    cache_bytes_per_token: int = 131072,
    block_tokens: int = 16,
    pieces_per_block: int = 1,
    link_gb_s: float = 1.25,
    latency_us: float = 10.0,
    issue_us: float = 5.0,
    gpus: int = 1,
    peak_tflops: float = 989.4,
    achieved_percent: float = 50.0,
    memory_tb_s: float = 4.8,
) -> FetchOrRecompute:
    """Fetch a cached prefix, or compute it again?

    The defaults are Llama 3 8B on an H200 and a network of 10 Gbit/s.

    Args:
        tokens: Tokens of the prefix.
        layers: Layers that attend.
        heads: Query heads.
        qk_head_dim: Values of a query and key in the prefill.
        v_head_dim: Values of a value in the prefill.
        active_billions: Parameters that multiply a token, in 10^9, without
            embedding and head: no prefix needs a prediction.
        weights_gb: Weights that the prefill reads, in GB.
        cache_bytes_per_token: Cache of one token in all layers.
        block_tokens: Tokens in a block; whole blocks are moved.
        pieces_per_block: Places where a block is stored, one a layer perhaps.
        link_gb_s: Bandwidth to all GPUs together, in one direction.
        latency_us: Time before the first byte moves.
        issue_us: Time to put one piece into the queue.
        gpus: GPUs that share the prefill.
        peak_tflops: Dense peak of one GPU.
        achieved_percent: Share of the peak that the prefill reaches.
        memory_tb_s: Memory bandwidth of one GPU.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> times = fetch_or_recompute()
        >>> round(times.fetch_ms), round(times.recompute_ms)
        (859, 267)
        >>> round(times.break_even_gb_s, 2), times.break_even_tokens
        (4.03, 144646)
    """
    given = dict(locals())  # the arguments, nothing else yet
    whole = {"tokens", "layers", "heads", "qk_head_dim", "v_head_dim", "gpus"}
    whole |= {"cache_bytes_per_token", "block_tokens", "pieces_per_block"}
    for name, value in given.items():
        if name in whole and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
        if name in ("latency_us", "issue_us") and not 0 <= value < math.inf:
            raise ValueError(f"{name} must not be negative, got {value}")
        if name not in ("latency_us", "issue_us") and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {value}")
    if achieved_percent > 100:
        raise ValueError(
            f"achieved_percent must be at most 100, got {achieved_percent}"
        )
    if tokens > MOST_TOKENS:
        raise ValueError(f"tokens must be at most {MOST_TOKENS}, got {tokens}")

    latency_s, issue_s = latency_us * 1e-6, issue_us * 1e-6
    piece_bytes = cache_bytes_per_token * block_tokens / pieces_per_block
    rate = gpus * peak_tflops * 1e12 * achieved_percent / 100

    def pieces(n: int) -> int:
        return -(-n // block_tokens) * pieces_per_block

    def attention(n: int) -> float:
        scores = attention_scores(n, layers, heads, qk_head_dim, v_head_dim)
        return n * scores

    def prefill(n: int) -> Bound:
        flops = 2 * active_billions * 1e9 * n + attention(n)
        return recompute_bound(
            flops, weights_gb * 1e9, rate, gpus * memory_tb_s * 1e12
        )

    def fetch(n: int) -> float:
        return fetch_seconds(
            pieces(n), piece_bytes, link_gb_s * 1e9, latency_s, issue_s
        )

    recompute = prefill(tokens)
    flops = recompute.seconds * recompute.flops_per_s
    to_move = recompute.seconds - latency_s
    reachable = to_move > pieces(tokens) * issue_s
    size = pieces(tokens) * piece_bytes
    return FetchOrRecompute(
        fetch_bytes=round(size),
        fetch_ms=fetch(tokens) * 1e3,
        recompute_tflop=flops / 1e12,
        attention_percent=100 * attention(tokens) / flops,
        recompute_ms=recompute.seconds * 1e3,
        wall=recompute.wall,
        fetch_is_faster=fetch(tokens) < recompute.seconds,
        break_even_gb_s=size / to_move / 1e9 if reachable else None,
        break_even_tokens=first_of_all_gains(
            lambda n: prefill(n).seconds - fetch(n), block_tokens
        ),
    )


def fetch_or_recompute_chart(**arguments: Any) -> LineChart:
    """Both times over the length of the prefix.

    Args:
        arguments: Those of ``fetch_or_recompute``.

    Raises:
        ValueError: As ``fetch_or_recompute``.

    Examples:
        >>> [line.name for line in fetch_or_recompute_chart().lines]
        ['fetch', 'recompute']
    """
    here = fetch_or_recompute(**arguments)
    tokens = arguments.get("tokens", 8192)
    lengths = sorted({tokens, *(2**n for n in range(7, 21))})
    both = [
        (n, fetch_or_recompute(**{**arguments, "tokens": n})) for n in lengths
    ]
    points = [Point("fetch here", tokens, here.fetch_ms)]
    meet = here.break_even_tokens
    if meet and lengths[0] <= meet <= lengths[-1]:
        y = fetch_or_recompute(**{**arguments, "tokens": meet}).fetch_ms
        points.append(Point(f"{meet:,} tokens", meet, y))
    return LineChart(
        "Time until the prefix is there",
        Axis("tokens of the prefix", log=True),
        Axis("milliseconds", log=True),
        [
            Line("fetch", [(n, b.fetch_ms) for n, b in both]),
            Line("recompute", [(n, b.recompute_ms) for n, b in both]),
        ],
        points,
    )


def _arguments(model: ModelConfig) -> dict[str, int | float]:
    """A model's shape, its weights and cache in 16 bits."""
    forward = shape(model)
    matrices = forward["matmul_parameters"] - forward["head_parameters"]
    values = values_per_token(
        model.kv_heads,
        model.head_dim,
        model.kv_lora_rank,
        model.qk_rope_head_dim,
    )
    same = ("layers", "heads", "qk_head_dim", "v_head_dim")
    return {name: forward[name] for name in same} | {
        "active_billions": round(matrices / 1e9, 4),
        "weights_gb": round(2 * count(model).non_embedding / 1e9, 4),
        "cache_bytes_per_token": 2 * model.layers * values,
    }


PRESETS = {
    name: _arguments(model)
    for name, model in MODELS.items()
    if not model.windowed_layers
}
"""Models without windows, as arguments of ``fetch_or_recompute``."""

PATHS: dict[str, dict[str, float]] = {
    f"network, {gbit} Gbit/s": {"link_gb_s": gbit / 8}
    for gbit in (10, 100, 400)
} | {
    name: {"link_gb_s": round(transfer(**LINKS[name]).payload_gb_s, 1)}
    for name in ("PCIe 4.0 x16", "PCIe 5.0 x16", "NVLink 4, H100 and H200")
}
"""Where a cache may come from; start-up and issue times are kept."""

CHIPS: dict[str, dict[str, float | int]] = {
    f"{gpus} x {name}" if gpus > 1 else name: {
        "gpus": gpus,
        "peak_tflops": gpu.bf16_tflops,
        "memory_tb_s": gpu.bandwidth_tb_s,
    }
    for gpus in (1, 8)
    for name, gpu in GPUS.items()
    if gpu.bf16_tflops and gpu.bandwidth_tb_s
}
"""GPUs that share the prefill, in bf16."""
