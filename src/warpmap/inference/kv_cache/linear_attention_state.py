"""Bytes of a request whose layers keep a state instead of a growing cache.

A linear-attention layer folds each token into one matrix a head and forgets
the token. What it keeps does not depend on the length:

    state   heads x key_dim x value_dim: the sum of keys times values
    tail    the last inputs of a short convolution before the state

Linear attention, gated delta nets, KDA and Mamba-2 differ in how they update
the matrix, not in its shape. Mamba-2 calls a key B, a query C and a value x.
Hybrids keep full attention, and so a cache that grows, in a few layers.

All sizes are in bytes.

Reference: Katharopoulos et al., 2020, https://arxiv.org/abs/2006.16236
Reference: Yang, Kautz and Hatamizadeh, 2024, https://arxiv.org/abs/2412.06464
Reference: Kimi Team, 2025, https://arxiv.org/abs/2510.26692
"""

import math
from dataclasses import dataclass
from typing import Any

from warpmap.chart import Axis, Line, LineChart, Point
from warpmap.inference.decoding.kv_cache_size import GIB, values_per_token


@dataclass(frozen=True)
class LinearAttentionState:
    """What a request takes, and its prefix when others shall reuse it.

    Attributes:
        state_bytes: Matrices of all linear layers.
        tail_bytes: Inputs that their convolutions still need.
        fixed_bytes: Both: a request's bytes before its first token, and those
            of one snapshot.
        bytes_per_token: Cache of the full layers for each further token.
        request_bytes: The request at this length.
        all_full_bytes: The same if every layer had full attention.
        crossover_tokens: Length from which the request is the smaller one.
        snapshots: States kept for reuse.
        reusable_tokens: Prefix up to the last of them.
        prefix_bytes: Snapshots, and the full layers' cache of that prefix.
    """

    state_bytes: int
    tail_bytes: int
    fixed_bytes: int
    bytes_per_token: int
    request_bytes: int
    all_full_bytes: int
    crossover_tokens: int | None
    snapshots: int
    reusable_tokens: int
    prefix_bytes: int


def state_values(
    heads: int, key_dim: int, value_dim: int, normalizer: bool = False
) -> int:
    """Values of one layer's state.

    Args:
        heads: Heads, each with a matrix of its own.
        key_dim: Values of a key, the rows of the matrix.
        value_dim: Values of a value, its columns.
        normalizer: Whether the sum of keys is kept besides, to divide by.

    Examples:
        >>> state_values(heads=32, key_dim=128, value_dim=128)
        524288
    """
    return heads * key_dim * (value_dim + normalizer)


def tail_values(
    heads: int, key_heads: int, key_dim: int, value_dim: int, conv_width: int
) -> int:
    """Values of one layer's convolution tail.

    A causal convolution over ``conv_width`` tokens needs the last
    ``conv_width - 1`` inputs, for each channel of query, key and value.

    Args:
        heads: Heads of values.
        key_heads: Heads of queries and keys; groups in Mamba-2.
        key_dim: Values of a query and of a key.
        value_dim: Values of a value.
        conv_width: Tokens that the convolution sees; 0 for none.

    Examples:
        >>> tail_values(32, 16, key_dim=128, value_dim=128, conv_width=4)
        24576
    """
    channels = 2 * key_heads * key_dim + heads * value_dim
    return max(0, conv_width - 1) * channels


def crossover_tokens(layer_fixed: int, layer_per_token: int) -> int:
    """First length at which a fixed size is smaller than a growing one.

    Args:
        layer_fixed: Bytes that one linear layer keeps.
        layer_per_token: Bytes that one full layer adds for each token.

    Examples:
        >>> crossover_tokens(layer_fixed=1000, layer_per_token=100)
        11
    """
    return layer_fixed // layer_per_token + 1


def linear_attention_state(
    linear_layers: int = 20,
    heads: int = 32,
    key_heads: int = 32,
    key_dim: int = 128,
    value_dim: int = 128,
    conv_width: int = 4,
    normalizer: bool = False,
    full_layers: int = 7,
    kv_heads: int = 8,
    head_dim: int = 128,
    kv_lora_rank: int = 512,
    qk_rope_head_dim: int = 64,
    tokens: int = 131072,
    snapshot_tokens: int = 1024,
    bytes_per_state_value: int = 4,
    bytes_per_value: int = 2,
) -> LinearAttentionState:
    """Size of a hybrid's cache; the defaults are Kimi Linear 48B-A3B.

    Args:
        linear_layers: Layers that keep a state.
        heads: Heads of such a layer, each with a matrix.
        key_heads: Heads of its queries and keys; groups in Mamba-2.
        key_dim: Values of its keys; the state size in Mamba-2.
        value_dim: Values of its values; the head size in Mamba-2.
        conv_width: Tokens that its convolution sees; 0 for none.
        normalizer: Whether it keeps the sum of keys too, as in 2020.
        full_layers: Layers that keep full attention.
        kv_heads: Key-value heads of these; not used by MLA.
        head_dim: Values a key, and a value; not used by MLA.
        kv_lora_rank: Values of MLA's latent; 0 for any other attention.
        qk_rope_head_dim: Values of MLA's rotary key, one for all heads.
        tokens: Tokens of the request.
        snapshot_tokens: A snapshot for reuse is taken every so many tokens.
        bytes_per_state_value: 4 for float32, 2 for bfloat16.
        bytes_per_value: The same for tails and for the full layers' cache.

    Returns:
        Sizes of the request and of its reusable prefix.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> size = linear_attention_state()
        >>> size.fixed_bytes, size.bytes_per_token, size.crossover_tokens
        (43417600, 8064, 1885)
        >>> linear_attention_state(full_layers=0, tokens=1).request_bytes
        43417600
    """
    given = dict(locals())  # the arguments, nothing else yet
    may_be_zero = {"linear_layers", "full_layers", "conv_width", "normalizer"}
    may_be_zero |= {"kv_lora_rank", "qk_rope_head_dim"}
    if kv_lora_rank:
        may_be_zero |= {"kv_heads", "head_dim"}
    for name, value in given.items():
        least = 0 if name in may_be_zero else 1
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not linear_layers + full_layers:
        raise ValueError("linear_layers and full_layers are 0: no layer left")
    if heads % key_heads:
        raise ValueError(
            f"key_heads must divide {heads} heads, got {key_heads}"
        )
    if qk_rope_head_dim and not kv_lora_rank:
        raise ValueError(
            "qk_rope_head_dim belongs to MLA and needs kv_lora_rank, "
            f"got {qk_rope_head_dim} and 0"
        )

    state = bytes_per_state_value * state_values(
        heads, key_dim, value_dim, normalizer
    )
    tail = bytes_per_value * tail_values(
        heads, key_heads, key_dim, value_dim, conv_width
    )
    layer_per_token = bytes_per_value * values_per_token(
        kv_heads, head_dim, kv_lora_rank, qk_rope_head_dim
    )
    fixed = linear_layers * (state + tail)
    per_token = full_layers * layer_per_token
    snapshots = tokens // snapshot_tokens
    reusable = snapshots * snapshot_tokens
    return LinearAttentionState(
        state_bytes=linear_layers * state,
        tail_bytes=linear_layers * tail,
        fixed_bytes=fixed,
        bytes_per_token=per_token,
        request_bytes=fixed + per_token * tokens,
        all_full_bytes=(linear_layers + full_layers) * layer_per_token * tokens,
        crossover_tokens=crossover_tokens(state + tail, layer_per_token)
        if linear_layers
        else None,
        snapshots=snapshots,
        reusable_tokens=reusable,
        prefix_bytes=snapshots * fixed + per_token * reusable,
    )


def state_chart(**arguments: Any) -> LineChart:
    """Bytes of a request over its length, beside full attention.

    Args:
        arguments: Those of ``linear_attention_state``.

    Returns:
        Lines for this stack, for full attention in every layer, and for the
        prefix cache with its snapshots; a gap where there is no snapshot yet.

    Raises:
        ValueError: As ``linear_attention_state``.

    Examples:
        >>> [point.name for point in state_chart(tokens=4096).points]
        ['4,096 tokens', 'equal']
    """
    here = linear_attention_state(**arguments)
    tokens = arguments.get("tokens", 131072)
    lengths = sorted({tokens, *(2**n for n in range(8, 21))})
    sizes = [
        (n, linear_attention_state(**{**arguments, "tokens": n}))
        for n in lengths
    ]
    lines = [
        Line("this stack", [(n, s.request_bytes / GIB) for n, s in sizes]),
        Line("all full", [(n, s.all_full_bytes / GIB) for n, s in sizes]),
        Line(
            "its prefix cache",
            [(n, (s.prefix_bytes or math.nan) / GIB) for n, s in sizes],
        ),
    ]
    points = [Point(f"{tokens:,} tokens", tokens, here.request_bytes / GIB)]
    if here.crossover_tokens:
        equal = linear_attention_state(
            **{**arguments, "tokens": here.crossover_tokens}
        )
        points.append(
            Point("equal", here.crossover_tokens, equal.request_bytes / GIB)
        )
    return LineChart(
        "Memory of one request",
        Axis("tokens", log=True),
        Axis("GiB", log=True),
        lines,
        points,
    )


def _mla(linear: int, full: int, heads: int) -> dict[str, int]:
    """KDA beside MLA, as in the Kimi models."""
    shape = {"linear_layers": linear, "full_layers": full}
    shape |= {"heads": heads, "key_heads": heads}
    shape |= {"key_dim": 128, "value_dim": 128, "conv_width": 4}
    return shape | {"kv_lora_rank": 512, "qk_rope_head_dim": 64}


def _gqa(
    linear: int, full: int, kv_heads: int, head_dim: int
) -> dict[str, int]:
    shape = {"linear_layers": linear, "full_layers": full}
    shape |= {"kv_heads": kv_heads, "head_dim": head_dim}
    return shape | {"kv_lora_rank": 0, "qk_rope_head_dim": 0}


_GATED_DELTA = {"heads": 32, "key_heads": 16, "key_dim": 128}
_GATED_DELTA |= {"value_dim": 128, "conv_width": 4}
_MAMBA_2 = {"heads": 128, "key_heads": 8, "key_dim": 128}
_MAMBA_2 |= {"value_dim": 64, "conv_width": 4}
_LIGHTNING = {"heads": 64, "key_heads": 64, "key_dim": 128}
_LIGHTNING |= {"value_dim": 128, "conv_width": 0}

PRESETS: dict[str, dict[str, int]] = {
    "Kimi Linear 48B-A3B": _mla(linear=20, full=7, heads=32),
    "Kimi K3": _mla(linear=69, full=24, heads=96),
    "Qwen3-Next 80B-A3B": _gqa(36, 12, 2, 256) | _GATED_DELTA,
    "Qwen3.5 4B": _gqa(24, 8, 4, 256) | _GATED_DELTA,
    "MiniMax-Text-01": _gqa(70, 10, 8, 128) | _LIGHTNING,
    "Nemotron-H 8B": _gqa(24, 4, 8, 128) | _MAMBA_2,
    # no full layer; a GQA layer of 8 x 128 stands for what it replaces
    "Codestral Mamba 7B": _gqa(64, 0, 8, 128) | _MAMBA_2,
}
"""Published models, as arguments of ``linear_attention_state``."""
