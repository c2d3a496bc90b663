"""What the two forms of latent attention compute and move, for one layer."""

from dataclasses import dataclass
from typing import Any

from warpmap.chart import Axis, Line, LineChart, Point


@dataclass(frozen=True)
class LatentCost:
    """One layer, from the queries of all heads to their outputs.

    Attributes:
        cached_values: Values that the layer caches for one token.
        values_of_heads: Values of all keys and values that they stand for.
        expanded_gflop: 10^9 FLOPs with keys and values of all heads.
        absorbed_gflop: 10^9 FLOPs in the latent space.
        expanded_mib: MiB of cache read, keys and values written and read.
        absorbed_mib: MiB of cache read.
        flop_per_byte: FLOPs of the absorbed form for each byte of cache.
        crossover: New tokens above which expanding takes fewer FLOPs, with
            as many tokens in all; None where it never does.
    """

    cached_values: int
    values_of_heads: int
    expanded_gflop: float
    absorbed_gflop: float
    expanded_mib: float
    absorbed_mib: float
    flop_per_byte: float
    crossover: float | None


def latent_cost(
    new_tokens: int = 1,
    tokens: int = 8192,
    heads: int = 128,
    kv_lora_rank: int = 512,
    qk_nope_head_dim: int = 128,
    qk_rope_head_dim: int = 64,
    v_head_dim: int = 128,
    bytes_per_value: int = 2,
) -> LatentCost:
    """Work and traffic of both forms; every query meets every key.

    Args:
        new_tokens: Tokens that ask: 1 in decoding.
        tokens: Tokens that are asked, the new ones among them.
        heads: Heads.
        kv_lora_rank: Values of the latent.
        qk_nope_head_dim: Values of a key without position.
        qk_rope_head_dim: Values of a key with position.
        v_head_dim: Values of a value.
        bytes_per_value: Bytes of a value: 2 for bf16.

    Returns:
        FLOPs, MiB, and where the forms meet.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> one = latent_cost()
        >>> round(one.expanded_gflop), round(one.absorbed_gflop, 1)
        (276, 2.3)
        >>> round(one.flop_per_byte), round(one.crossover)
        (245, 167)
    """
    given = dict(locals())  # the arguments, nothing else yet
    for name, value in given.items():
        if value < 1 and name != "qk_rope_head_dim":
            raise ValueError(f"{name} must be at least 1, got {value}")
    if qk_rope_head_dim < 0:
        raise ValueError(
            f"qk_rope_head_dim must be at least 0, got {qk_rope_head_dim}"
        )
    if new_tokens > tokens:
        raise ValueError(
            f"new_tokens must be at most tokens, {tokens}, got {new_tokens}"
        )
    R, nope, rope = kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim
    up = R * (nope + v_head_dim)  # from a latent to one head, or back
    wide, narrow = 2 * R + rope, nope + rope + v_head_dim
    expanded = 2 * heads * (tokens * up + new_tokens * tokens * narrow)
    absorbed = 2 * heads * (new_tokens * up + new_tokens * tokens * wide)

    cache = tokens * (R + rope) * bytes_per_value
    made = tokens * heads * narrow * bytes_per_value
    return LatentCost(
        cached_values=R + rope,
        values_of_heads=heads * narrow,
        expanded_gflop=expanded / 1e9,
        absorbed_gflop=absorbed / 1e9,
        expanded_mib=(cache + 2 * made) / 2**20,
        absorbed_mib=cache / 2**20,
        flop_per_byte=absorbed / cache,
        # T (up + S wide) = S up + T S narrow, solved for T
        crossover=tokens * up / (up + tokens * (wide - narrow))
        if wide > narrow
        else None,
    )


HEADS: dict[str, dict[str, Any]] = {
    "DeepSeek-V2, V3, R1": {"heads": 128},
    "Kimi K2": {"heads": 64},
    "DeepSeek-V2-Lite": {"heads": 16},
}
"""Models whose latents are alike, and their heads."""

STEPS: dict[str, dict[str, Any]] = {
    "decode one token": {"new_tokens": 1, "tokens": 8192},
    "check four drafted tokens": {"new_tokens": 4, "tokens": 8192},
    "a chunk of a prompt": {"new_tokens": 512, "tokens": 8192},
    "a whole prompt": {"new_tokens": 8192, "tokens": 8192},
}
"""Who asks whom in four kinds of step."""


def latent_chart(**arguments: Any) -> LineChart:
    """FLOPs of both forms over the number of new tokens.

    Args:
        **arguments: As for ``latent_cost``, all of them.

    Examples:
        >>> chart = latent_chart(new_tokens=1, tokens=4096)
        >>> [line.name for line in chart.lines]
        ['expanded', 'absorbed']
    """
    tokens = arguments["tokens"]
    counts = sorted({min(2**i, tokens) for i in range(tokens.bit_length() + 1)})
    costs = [latent_cost(**{**arguments, "new_tokens": n}) for n in counts]
    here = latent_cost(**arguments)
    x = arguments["new_tokens"]
    return LineChart(
        "Work of one layer",
        Axis("new tokens", log=True),
        Axis("GFLOP", log=True),
        [
            Line(
                form,
                [
                    (n, getattr(c, field))
                    for n, c in zip(counts, costs, strict=True)
                ],
            )
            for form, field in (
                ("expanded", "expanded_gflop"),
                ("absorbed", "absorbed_gflop"),
            )
        ],
        [
            Point(f"{here.expanded_gflop:,.4g}", x, here.expanded_gflop),
            Point(f"{here.absorbed_gflop:,.4g}", x, here.absorbed_gflop),
        ],
    )
