"""What sparse attention computes and reads for one new token, in one layer."""

from dataclasses import dataclass
from typing import Any

from warpmap.chart import Axis, Line, LineChart, Point


@dataclass(frozen=True)
class SparseCost:
    """One layer, one new token.

    Attributes:
        dense_mflop: 10^6 FLOPs if it meets all tokens, in the latent space.
        index_mflop: 10^6 FLOPs of the indexer, which scores all tokens.
        chosen_mflop: 10^6 FLOPs to meet the chosen ones.
        fewer_flop: How many times fewer FLOPs indexer and choice take.
        dense_mb: 10^6 bytes of cache read if it meets all.
        sparse_mb: 10^6 bytes read: indexer's keys, and chosen latents.
        break_even: Tokens from which the FLOPs are fewer.
        indexer_leads: Tokens from which the indexer takes the larger part.
    """

    dense_mflop: float
    index_mflop: float
    chosen_mflop: float
    fewer_flop: float
    dense_mb: float
    sparse_mb: float
    break_even: float | None
    indexer_leads: float


def sparse_cost(
    tokens: int = 131_072,
    top_k: int = 2048,
    heads: int = 128,
    kv_lora_rank: int = 512,
    qk_rope_head_dim: int = 64,
    index_n_heads: int = 64,
    index_head_dim: int = 128,
    bytes_per_value: int = 2,
    index_bytes: int = 132,
) -> SparseCost:
    """Work and traffic of a decoding step, with latent attention.

    Args:
        tokens: Tokens in the cache, the new one among them.
        top_k: Tokens that are chosen.
        heads: Heads of attention.
        kv_lora_rank: Values of a latent.
        qk_rope_head_dim: Values of a key with position.
        index_n_heads: Small queries of the indexer.
        index_head_dim: Values of each, and of its key.
        bytes_per_value: Bytes of a cached value: 2 for bf16.
        index_bytes: Bytes of the indexer's key: 128 in fp8 and a scale.

    Returns:
        FLOPs and bytes, and where they cross.

    Raises:
        ValueError: If a number is below 1.

    Examples:
        >>> cost = sparse_cost()
        >>> round(cost.index_mflop), round(cost.chosen_mflop)
        (2147, 570)
        >>> round(cost.break_even), round(cost.indexer_leads)
        (2176, 34816)
    """
    for name, value in dict(locals()).items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    meet = 2 * heads * (2 * kv_lora_rank + qk_rope_head_dim)
    score = 2 * index_n_heads * index_head_dim
    read = (kv_lora_rank + qk_rope_head_dim) * bytes_per_value
    chosen = min(top_k, tokens)
    return SparseCost(
        dense_mflop=meet * tokens / 1e6,
        index_mflop=score * tokens / 1e6,
        chosen_mflop=meet * chosen / 1e6,
        fewer_flop=meet * tokens / (score * tokens + meet * chosen),
        dense_mb=read * tokens / 1e6,
        sparse_mb=(index_bytes * tokens + read * chosen) / 1e6,
        break_even=meet * top_k / (meet - score) if meet > score else None,
        indexer_leads=meet * top_k / score,
    )


CONTEXTS: dict[str, dict[str, Any]] = {
    "4K tokens": {"tokens": 4096},
    "32K tokens": {"tokens": 32_768},
    "128K tokens": {"tokens": 131_072},
    "1M tokens": {"tokens": 1_048_576},
}
"""Lengths of the text so far."""


def sparse_chart(**arguments: Any) -> LineChart:
    """FLOPs of one layer over the length of the text.

    Args:
        **arguments: As for ``sparse_cost``, all of them.

    Examples:
        >>> chart = sparse_chart(tokens=4096)
        >>> [line.name for line in chart.lines]
        ['all tokens', 'indexer and chosen', 'indexer']
    """
    here = sparse_cost(**arguments)
    lengths = [2**i for i in range(9, 21)]
    costs = [sparse_cost(**{**arguments, "tokens": n}) for n in lengths]
    at = arguments["tokens"]
    both = here.index_mflop + here.chosen_mflop
    return LineChart(
        "Work for one new token, one layer",
        Axis("tokens so far", log=True),
        Axis("MFLOP", log=True),
        [
            Line(name, list(zip(lengths, sizes, strict=True)))
            for name, sizes in (
                ("all tokens", [c.dense_mflop for c in costs]),
                (
                    "indexer and chosen",
                    [c.index_mflop + c.chosen_mflop for c in costs],
                ),
                ("indexer", [c.index_mflop for c in costs]),
            )
        ],
        [
            Point(f"{here.dense_mflop:,.4g}", at, here.dense_mflop),
            Point(f"{both:,.4g}", at, both),
        ],
    )
