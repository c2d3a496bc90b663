"""Causal attention in which several query heads share one key-value head.

``H`` query heads, ``Hkv`` key-value heads, ``G = H / Hkv`` query heads a group:

    Hkv = H       multi-head attention (MHA)
    1 < Hkv < H   grouped-query attention (GQA)
    Hkv = 1       multi-query attention (MQA)

    work     4 H T S D operations, whatever Hkv is
    traffic  2 Hkv S D cached values are read; with repeated heads 2 H S D

Queries are the last ``T`` of ``S`` tokens: ``S - T`` came from a cache.

Reference: Shazeer, 2019, https://arxiv.org/abs/1911.02150
Reference: Ainslie et al., 2023, https://arxiv.org/abs/2305.13245
"""

import math

import torch
from torch import Tensor, nn


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """Which of ``S`` keys each of the last ``T`` tokens may see.

    Returns:
        ``(T, S)`` of bool; row ``t`` sees the keys up to ``S - T + t``.

    Examples:
        >>> causal_mask(2, 4, torch.device("cpu")).int().tolist()
        [[1, 1, 1, 0], [1, 1, 1, 1]]
    """
    seen = torch.ones(T, S, dtype=torch.bool, device=device)
    return seen.tril(diagonal=S - T)


def grouped_query_attention_reference(
    q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Attention with every key-value head copied once a query head.

    Args:
        q: ``(B, H, T, D)``.
        k: ``(B, Hkv, S, D)``.
        v: ``(B, Hkv, S, D)``.

    Returns:
        ``(B, H, T, D)``.

    Examples:
        >>> q, k = torch.ones(1, 4, 1, 2), torch.ones(1, 2, 3, 2)
        >>> grouped_query_attention_reference(q, k, k).shape
        torch.Size([1, 4, 1, 2])
    """
    G = q.shape[1] // k.shape[1]
    # heads 0 to G-1 take key-value head 0: interleave, do not tile
    k = k.repeat_interleave(G, dim=1)  # (B, H, S, D)
    v = v.repeat_interleave(G, dim=1)

    scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, H, T, S)
    seen = causal_mask(q.shape[2], k.shape[2], q.device)
    return scores.masked_fill(~seen, -float("inf")).softmax(dim=-1) @ v


def grouped_query_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention that reads every key-value head where it lies.

    Args:
        q: ``(B, H, T, D)``, the last ``T`` of ``S`` tokens.
        k: ``(B, Hkv, S, D)``, ``Hkv`` a divisor of ``H``.
        v: ``(B, Hkv, S, D)``.

    Returns:
        ``(B, H, T, D)``, same dtype.

    Raises:
        ValueError: If the shapes do not fit, or queries outnumber keys.

    Examples:
        >>> q, v = torch.zeros(1, 4, 1, 2), torch.eye(2).reshape(1, 1, 2, 2)
        >>> grouped_query_attention(q, v, v)[0, :, 0].tolist()
        [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    """
    _check(q, k, v)
    B, H, T, D = q.shape
    Hkv, S = k.shape[1:3]
    G = H // Hkv

    # the G queries of a group become rows of one matrix: broadcasting
    # k over the group instead would make matmul copy it G times
    q = q.reshape(B, Hkv, G * T, D)
    scores = (q / math.sqrt(D)) @ k.mT  # (B, Hkv, G T, S)

    scores = scores.view(B, Hkv, G, T, S)
    scores = scores.masked_fill(~causal_mask(T, S, q.device), -float("inf"))
    probs = scores.softmax(dim=-1).view(B, Hkv, G * T, S)
    return (probs @ v).view(B, H, T, D)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            f"expected (B, heads, tokens, D), k like v, got {shapes}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"expected the same B and D, got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"key-value heads must divide query heads, got {shapes}"
        )
    if q.shape[2] > k.shape[2]:
        raise ValueError(
            f"expected at most as many queries as keys, got {shapes}"
        )


def mean_pool_heads(weight: Tensor, heads: int, kv_heads: int) -> Tensor:
    """The key or value projection of a multi-head checkpoint, with fewer heads.

    Args:
        weight: ``(heads * D, C)``, as ``nn.Linear`` keeps it.
        heads: Heads in ``weight``.
        kv_heads: Heads to keep, a divisor of ``heads``.

    Returns:
        ``(kv_heads * D, C)``; each head is the mean of its group's heads.

    Raises:
        ValueError: If the numbers do not divide each other.

    Examples:
        >>> weight = torch.tensor([[1.0], [3.0], [5.0], [5.0]])
        >>> mean_pool_heads(weight, heads=4, kv_heads=2).tolist()
        [[2.0], [5.0]]
    """
    rows, C = weight.shape
    if kv_heads < 1 or heads % kv_heads or rows % heads:
        raise ValueError(
            f"cannot pool {rows} rows of {heads} heads into {kv_heads} heads"
        )
    groups = weight.reshape(kv_heads, heads // kv_heads, rows // heads, C)
    return groups.mean(dim=1).reshape(-1, C)


class GroupedQueryAttention(nn.Module):
    """A causal attention layer with a KV cache; positions are left out.

    Args:
        width: Model width ``C``, a multiple of ``heads``.
        heads: Query heads ``H``.
        kv_heads: Key-value heads ``Hkv``: ``heads`` for MHA, 1 for MQA.

    Examples:
        >>> layer = GroupedQueryAttention(width=64, heads=8, kv_heads=2)
        >>> y, (k, v) = layer(torch.zeros(1, 5, 64))
        >>> y.shape, k.shape
        (torch.Size([1, 5, 64]), torch.Size([1, 2, 5, 8]))
    """

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        """Create the four projections."""
        super().__init__()
        if kv_heads < 1 or heads % kv_heads or width % heads:
            raise ValueError(
                f"width {width} must be a multiple of heads {heads}, "
                f"and heads a multiple of kv_heads {kv_heads}"
            )
        self.heads, self.kv_heads, self.D = heads, kv_heads, width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.D, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.D, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attend from new tokens to the cached ones and to themselves.

        Args:
            x: ``(B, T, C)``, the new tokens.
            cache: Keys and values of earlier tokens, ``(B, Hkv, S - T, D)``.

        Returns:
            ``(B, T, C)``, and the cache with the new tokens in it.
        """
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.D).transpose(1, 2)
        k = self.k_proj(x).view(B, T, self.kv_heads, self.D).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.D).transpose(1, 2)
        if cache is not None:
            k = torch.cat([cache[0], k], dim=2)  # (B, Hkv, S, D)
            v = torch.cat([cache[1], v], dim=2)
        y = grouped_query_attention(q, k, v)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C)), (k, v)

    @torch.no_grad()
    def pooled(self, kv_heads: int) -> "GroupedQueryAttention":
        """A copy with fewer key-value heads, each the mean of its group."""
        width = self.q_proj.in_features
        layer = GroupedQueryAttention(width, self.heads, kv_heads)
        layer.to(self.q_proj.weight)  # device and dtype
        layer.q_proj.weight.copy_(self.q_proj.weight)
        layer.o_proj.weight.copy_(self.o_proj.weight)
        for old, new in (
            (self.k_proj, layer.k_proj),
            (self.v_proj, layer.v_proj),
        ):
            new.weight.copy_(
                mean_pool_heads(old.weight, self.kv_heads, kv_heads)
            )
        return layer
