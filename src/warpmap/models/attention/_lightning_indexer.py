"""The lightning indexer of DeepSeek sparse attention, and its layer.

The choice of keys has no gradient. So the indexer has a loss of its own: its
scores are to be distributed as the weights of attention are.
"""

import math

import torch
from torch import Tensor, nn

from warpmap.models.attention.multi_head_latent_attention import (
    MultiHeadLatentAttention,
    absorbed_attention,
)
from warpmap.models.attention.sparse_attention import (
    gather,
    index_scores,
    select,
)
from warpmap.models.positions.rope import rope_table, rotate


class LightningIndexer(nn.Module):
    """Scores all keys for each query; weights named as in checkpoints.

    Args:
        width: Model width ``C``.
        q_lora_rank: Values of MLA's compressed query, from which its own
            queries are made.
        heads: Small queries for each token, ``Hi``.
        head_size: Values of each, ``Di``.
        rope_size: The first so many of them are turned by position; even.
        base: Of the rotary positions.

    Examples:
        >>> indexer = LightningIndexer(64, 24, 4, 8, 4)
        >>> x, squeezed = torch.zeros(1, 5, 64), torch.zeros(1, 5, 24)
        >>> scores, keys = indexer(x, squeezed)
        >>> scores.shape, keys.shape
        (torch.Size([1, 5, 5]), torch.Size([1, 5, 8]))
    """

    def __init__(
        self,
        width: int,
        q_lora_rank: int,
        heads: int,
        head_size: int,
        rope_size: int,
        base: float = 10000.0,
    ) -> None:
        """Create three projections and a norm."""
        super().__init__()
        if not 0 < rope_size <= head_size or rope_size % 2:
            raise ValueError(
                f"rope_size must be even, from 2 to head_size {head_size}, "
                f"got {rope_size}"
            )
        self.heads, self.Di, self.Dr = heads, head_size, rope_size
        self.base = base
        self.wq_b = nn.Linear(q_lora_rank, heads * head_size, bias=False)
        self.wk = nn.Linear(width, head_size, bias=False)
        self.k_norm = nn.LayerNorm(head_size, eps=1e-6)
        self.weights_proj = nn.Linear(width, heads, bias=False)

    def forward(
        self, x: Tensor, squeezed: Tensor, cache: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Score the cached tokens and the new ones.

        Args:
            x: ``(B, T, C)``, the new tokens.
            squeezed: ``(B, T, q_lora_rank)``, their compressed queries.
            cache: ``(B, S - T, Di)``, keys of earlier tokens.

        Returns:
            Scores ``(B, T, S)``, later keys included, and the new cache.
        """
        past = 0 if cache is None else cache.shape[1]
        positions = torch.arange(past, past + x.shape[1], device=x.device)
        table = rope_table(positions.double(), self.Dr, self.base)
        q = self.wq_b(squeezed).unflatten(-1, (self.heads, self.Di))
        q = self._turn(q.transpose(1, 2), *table)  # (B, Hi, T, Di)
        k = self._turn(self.k_norm(self.wk(x))[:, None], *table)[:, 0]
        keys = k if cache is None else torch.cat((cache, k), dim=1)
        weights = self.weights_proj(x) / math.sqrt(self.heads * self.Di)
        return index_scores(q, keys, weights), keys

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # half-split, and the first part; MLA has neighbours, the last part
        turned, rest = x.tensor_split([self.Dr], dim=-1)
        return torch.cat((rotate(turned, cos, sin), rest), dim=-1)


def indexer_loss(scores: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """How far the indexer is from the attention that it stands in for.

    Args:
        scores: ``(B, T, S)``, of the indexer.
        weights: ``(B, H, T, S)``, of attention; each row sums to 1.
        mask: ``(T, S)`` or ``(B, T, S)`` of bool, who is seen.

    Returns:
        The Kullback-Leibler divergence from the indexer's softmax to the mean
        of the heads' weights, in nats, averaged over queries.

    Examples:
        >>> weights = torch.tensor([[[[1.0, 0.0]], [[1.0, 0.0]]]])
        >>> scores, mask = torch.zeros(1, 1, 2), torch.ones(1, 2).bool()
        >>> round(indexer_loss(scores, weights, mask).item(), 4)  # log 2
        0.6931
    """
    target = weights.mean(dim=1).detach()
    logs = scores.masked_fill(~mask, -math.inf).log_softmax(dim=-1)
    # 0 log 0 = 0, and 0 times the -inf of a hidden key is 0 as well
    logs = logs.masked_fill(target == 0, 0)
    divergence = torch.xlogy(target, target) - target * logs
    return divergence.sum(dim=-1).mean()


class DeepSeekSparseAttention(nn.Module):
    """Latent attention in which an indexer chooses whom each query meets.

    Args:
        mla: Stays as it is, and can be used without.
        indexer: What chooses.
        top_k: Keys for each query.

    Examples:
        >>> mla = MultiHeadLatentAttention(64, 8, 24, 16, 8, 4, 8)
        >>> indexer = LightningIndexer(64, 24, 4, 8, 4)
        >>> layer = DeepSeekSparseAttention(mla, indexer, top_k=3)
        >>> y, (latents, keys) = layer(torch.zeros(1, 5, 64))
        >>> y.shape, latents.shape, keys.shape[-1]
        (torch.Size([1, 5, 64]), torch.Size([1, 5, 20]), 8)
    """

    def __init__(
        self,
        mla: MultiHeadLatentAttention,
        indexer: LightningIndexer,
        top_k: int,
    ) -> None:
        """Put the parts together."""
        super().__init__()
        self.mla, self.indexer, self.top_k = mla, indexer, top_k

    def forward(
        self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attend from new tokens to some of the cached ones and themselves.

        Args:
            x: ``(B, T, C)``, the new tokens.
            cache: Latents ``(B, S - T, R + Dr)`` and the indexer's keys
                ``(B, S - T, Di)``.

        Returns:
            ``(B, T, C)``, and both caches with the new tokens in them.
        """
        past, past_keys = (None, None) if cache is None else cache
        # detached: the indexer learns from its own loss alone
        fixed, squeezed = x.detach(), self.mla.compress_query(x).detach()
        scores, keys = self.indexer(fixed, squeezed, past_keys)

        def attend(
            q: Tensor, latents: Tensor, up: Tensor, mask: Tensor
        ) -> Tensor:
            B, H, T, D = q.shape
            chosen, valid = select(scores, self.top_k, mask)
            y = absorbed_attention(
                q.transpose(1, 2).reshape(B * T, H, 1, D),
                gather(latents, chosen),  # once, for all heads
                up,
                valid.reshape(B * T, 1, -1),
            )
            return y.reshape(B, T, H, -1).transpose(1, 2)

        y, latents = self.mla(x, past, attend)
        return y, (latents, keys)
