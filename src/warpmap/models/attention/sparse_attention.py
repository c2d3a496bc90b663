"""Sparse attention: each query meets a few keys instead of all.

    fixed   a pattern of blocks, the same for every text: near ones and the
            first ones, say
    chosen  DeepSeek sparse attention (DSA): a small indexer scores all keys,
            and the query meets the ``top_k`` best

    work    2 T S Hi Di to score every key, cheaply; then K keys a query
            instead of S

Reference: Child et al., 2019, https://arxiv.org/abs/1904.10509
Reference: DeepSeek-AI, 2025, https://arxiv.org/abs/2512.02556
"""

import math

import torch
from torch import Tensor

from warpmap.models.attention.grouped_query_attention import causal_mask
from warpmap.models.foundations.attention import attention


def block_pattern(
    tokens: int, block: int, near: int, first: int, device: torch.device | str
) -> Tensor:
    """A fixed causal pattern: the nearest blocks, and the first ones.

    Args:
        tokens: ``S``, queries and keys.
        block: Tokens of a block.
        near: Blocks up to the query's own, which is one of them.
        first: Blocks at the start of the text, seen by all.
        device: Where the mask is made.

    Returns:
        ``(S, S)`` of bool, a mask for ``attention``.

    Raises:
        ValueError: If a query could see no key.

    Examples:
        >>> block_pattern(4, 1, 2, 1, "cpu").int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    """
    if min(tokens, block, near) < 1 or first < 0:
        raise ValueError(
            "tokens, block and near must be at least 1, first at least 0, "
            f"got {tokens}, {block}, {near}, {first}"
        )
    device = torch.device(device)
    number = torch.arange(tokens, device=device) // block
    query, key = number[:, None], number[None, :]
    seen = (query - key < near) | (key < first)
    return seen & causal_mask(tokens, tokens, device)


def index_scores(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """How much the indexer wants each query to meet each key.

    Args:
        q: ``(B, Hi, T, Di)``: several small queries for each token.
        k: ``(B, S, Di)``: one key for all of them.
        weights: ``(B, T, Hi)``: how much each small query counts; may be
            negative.

    Returns:
        ``(B, T, S)``, the weighted sum of the positive parts of products.

    Examples:
        >>> q = torch.tensor([[[[1.0]], [[-1.0]]]])  # one head for each sign
        >>> k = torch.tensor([[[5.0], [-7.0]]])
        >>> index_scores(q, k, torch.tensor([[[1.0, 10.0]]])).tolist()
        [[[5.0, 70.0]]]
    """
    hits = (q @ k[:, None].mT).relu()  # (B, Hi, T, S)
    return torch.einsum("bth,bhts->bts", weights, hits)


def select(scores: Tensor, top_k: int, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The keys that each query meets: the best of those it may see.

    Args:
        scores: ``(B, T, S)``.
        top_k: Keys for a query, ``K``; all, if there are fewer.
        mask: ``(T, S)`` or ``(B, T, S)`` of bool, what may be seen.

    Returns:
        Places ``(B, T, K)`` among the keys, and bool ``(B, T, K)``: whether
        the place counts. Early queries see fewer than ``K`` keys, and the
        rest of their places must not be used. Equal scores, such as the 0 of
        a key that no head wants, go either way.

    Raises:
        ValueError: If ``top_k`` is below 1.

    Examples:
        >>> scores = torch.tensor([[[3.0, 9.0, 1.0], [3.0, 9.0, 1.0]]])
        >>> seen = causal_mask(2, 3, scores.device)
        >>> chosen, valid = select(scores, 2, seen)
        >>> chosen.tolist(), valid.all().item()
        ([[[1, 0], [1, 0]]], True)
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    mask = mask.expand_as(scores)
    seen = scores.masked_fill(~mask, -math.inf)
    chosen = seen.topk(min(top_k, scores.shape[-1]), dim=-1).indices
    return chosen, mask.gather(-1, chosen)


def selected_mask(chosen: Tensor, valid: Tensor, S: int) -> Tensor:
    """The choice as a mask over all ``S`` keys, ``(B, T, S)`` of bool.

    Examples:
        >>> chosen, valid = torch.tensor([[[2, 0]]]), torch.ones(1, 1, 2)
        >>> selected_mask(chosen, valid.bool(), 4).int().tolist()
        [[[1, 0, 1, 0]]]
    """
    mask = valid.new_zeros(*chosen.shape[:2], S)
    return mask.scatter(-1, chosen, valid)


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, valid: Tensor
) -> Tensor:
    """Attention of each query to its own few keys, and to no others.

    Every query becomes a sequence of its own, with ``K`` keys.

    Args:
        q: ``(B, H, T, D)``.
        k: ``(B, Hkv, S, D)``, ``Hkv`` a divisor of ``H``.
        v: ``(B, Hkv, S, Dv)``.
        chosen: ``(B, T, K)``, as from ``select``, the same for all heads.
        valid: ``(B, T, K)`` of bool; at least one for each query.

    Returns:
        ``(B, H, T, Dv)``.

    Raises:
        ValueError: If shapes do not fit.

    Examples:
        >>> q, k = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 3, 1)
        >>> v = torch.tensor([[[[1.0], [2.0], [4.0]]]])
        >>> chosen = torch.tensor([[[0, 2]]])
        >>> sparse_attention(q, k, v, chosen, chosen >= 0).item()
        2.5
    """
    if q.shape[1] % k.shape[1] or chosen.shape[:2] != (q.shape[0], q.shape[2]):
        raise ValueError(
            "expected chosen (B, T, K) and Hkv to divide H, got q "
            f"{tuple(q.shape)}, k {tuple(k.shape)}, "
            f"chosen {tuple(chosen.shape)}"
        )
    B, H, T, D = q.shape
    # heads that share a key become the queries of one short sequence
    rows = q.transpose(1, 2).reshape(B * T, k.shape[1], -1, D)
    keys = gather(k.transpose(1, 2), chosen).transpose(1, 2)
    values = gather(v.transpose(1, 2), chosen).transpose(1, 2)
    y = attention(rows, keys, values, valid.reshape(B * T, 1, 1, -1))
    return y.reshape(B, T, H, -1).transpose(1, 2)


def gather(x: Tensor, chosen: Tensor) -> Tensor:
    """Rows of ``x (B, S, ...)`` at ``chosen (B, T, K)``: ``(B T, K, ...)``.

    Examples:
        >>> x = torch.tensor([[10, 11, 12]])
        >>> gather(x, torch.tensor([[[0, 2], [1, 1]]])).tolist()
        [[10, 12], [11, 11]]
    """
    batch = torch.arange(len(x), device=x.device)[:, None, None]
    return x[batch, chosen].flatten(0, 1)
