"""Multi-head latent attention: a cache of one narrow vector for all heads.

A token is squeezed into a latent of ``R`` values, from which every head makes
its key and its value. A key has ``Dn`` values made from the latent, and ``Dr``
values with rotary position, which all heads share.

    cache     R + Dr values a token: 576 in DeepSeek-V3, for 128 heads
    expanded  make keys and values of all heads, then multi-head attention
    absorbed  bring queries into the latent space, where the cached vector is
              key and value for all heads, as in multi-query attention

Both forms give the same output. YaRN, which DeepSeek adds for long texts, is
left out: it changes the angles and the scale of the scores.

Reference: DeepSeek-AI, 2024, https://arxiv.org/abs/2405.04434
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from warpmap.models.attention.grouped_query_attention import causal_mask
from warpmap.models.foundations.attention import attention
from warpmap.models.foundations.normalization import RMSNorm
from warpmap.models.positions.rope import rope_table, rotate_interleaved

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``expanded_attention``, ``absorbed_attention``, or one with their shapes."""


def expanded_attention(
    q: Tensor, cache: Tensor, up: Tensor, mask: Tensor
) -> Tensor:
    """Make keys and values of all heads, then attend as usual.

    Args:
        q: ``(B, H, T, Dn + Dr)``, the last ``Dr`` values turned by position.
        cache: ``(B, S, R + Dr)``: a latent and a turned key for each token.
        up: ``(H, Dn + Dv, R)``: from a latent to a head's key and value.
        mask: ``(T, S)`` or ``(B, T, S)`` of bool: the keys that each query
            may see, at least one.

    Returns:
        ``(B, H, T, Dv)``.

    Raises:
        ValueError: If shapes do not fit.

    Examples:
        >>> q, cache = torch.ones(1, 8, 1, 4 + 2), torch.ones(1, 3, 10 + 2)
        >>> up, mask = torch.ones(8, 4 + 5, 10), torch.ones(1, 3).bool()
        >>> expanded_attention(q, cache, up, mask).shape
        torch.Size([1, 8, 1, 5])
    """
    w_k, w_v = _split(q, cache, up)
    latent, k_rope = cache[:, None].tensor_split([up.shape[2]], dim=-1)
    k_nope, v = latent @ w_k.mT, latent @ w_v.mT  # (B, H, S, Dn), ... Dv)
    k_rope = k_rope.expand(-1, q.shape[1], -1, -1)  # the same for all heads
    k = torch.cat((k_nope, k_rope), dim=-1)  # (B, H, S, Dn + Dr)
    return attention(q, k, v, mask.unsqueeze(-3))


def absorbed_attention(
    q: Tensor, cache: Tensor, up: Tensor, mask: Tensor
) -> Tensor:
    """Attend in the latent space: no key and no value of a head is made.

    Args:
        q: As for ``expanded_attention``, likewise the rest.
        cache: ``(B, S, R + Dr)``, read in place.
        up: ``(H, Dn + Dv, R)``.
        mask: ``(T, S)`` or ``(B, T, S)``.

    Returns:
        ``(B, H, T, Dv)``, as ``expanded_attention`` but for rounding.

    Raises:
        ValueError: If shapes do not fit.

    Examples:
        >>> q, cache = torch.ones(1, 8, 1, 4 + 2), torch.ones(1, 3, 10 + 2)
        >>> up, mask = torch.ones(8, 4 + 5, 10), torch.ones(1, 3).bool()
        >>> absorbed_attention(q, cache, up, mask).shape
        torch.Size([1, 8, 1, 5])
    """
    w_k, w_v = _split(q, cache, up)
    B, H, T, D = q.shape
    S, R = cache.shape[1], up.shape[2]

    q_nope, q_rope = q.tensor_split([w_k.shape[1]], dim=-1)
    q = torch.cat((q_nope @ w_k, q_rope), dim=-1)  # (B, H, T, R + Dr)
    # the scale of the expanded key, although vectors are longer here
    q = q.reshape(B, H * T, -1) / math.sqrt(D)

    # heads are rows of one matrix, as all of them meet the same key
    scores = (q @ cache.mT).view(B, H, T, S)
    scores = scores.masked_fill(~mask.unsqueeze(-3), -math.inf)
    probs = scores.softmax(dim=-1).view(B, H * T, S)
    mixed = (probs @ cache[..., :R]).view(B, H, T, R)
    return mixed @ w_v.mT  # (B, H, T, Dv)


def _split(q: Tensor, cache: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Check the shapes; what makes keys ``(H, Dn, R)``, and what values."""
    shapes = (
        f"got q {tuple(q.shape)}, cache {tuple(cache.shape)}, "
        f"up {tuple(up.shape)}"
    )
    if (q.ndim, cache.ndim, up.ndim) != (4, 3, 3):
        raise ValueError(
            "expected q (B, H, T, Dn + Dr), cache (B, S, R + Dr), "
            f"up (H, Dn + Dv, R), {shapes}"
        )
    if q.shape[0] != cache.shape[0] or q.shape[1] != up.shape[0]:
        raise ValueError(f"expected one B and one H, {shapes}")
    rope = cache.shape[2] - up.shape[2]
    nope = q.shape[3] - rope
    if rope < 0 or not 0 <= nope <= up.shape[1]:
        raise ValueError(f"expected Dr and Dn of at least 0, {shapes}")
    return up[:, :nope], up[:, nope:]


class MultiHeadLatentAttention(nn.Module):
    """A causal layer that caches a latent; weights named as in checkpoints.

    Args:
        width: Model width ``C``.
        heads: Heads ``H``.
        q_lora_rank: Values that a query is squeezed into.
        kv_lora_rank: Values of the latent, ``R``.
        qk_nope_head_dim: Values of a key without position, ``Dn``.
        qk_rope_head_dim: Values of a key with position, ``Dr``; even.
        v_head_dim: Values of a value, ``Dv``.
        base: Of the rotary positions.

    Examples:
        >>> layer = MultiHeadLatentAttention(64, 8, 24, 16, 8, 4, 8)
        >>> y, cache = layer(torch.zeros(1, 5, 64))
        >>> y.shape, cache.shape
        (torch.Size([1, 5, 64]), torch.Size([1, 5, 20]))
    """

    def __init__(
        self,
        width: int,
        heads: int,
        q_lora_rank: int,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        base: float = 10000.0,
    ) -> None:
        """Create five projections and two norms."""
        super().__init__()
        if qk_rope_head_dim < 2 or qk_rope_head_dim % 2:
            raise ValueError(
                "qk_rope_head_dim must be even, at least 2, "
                f"got {qk_rope_head_dim}"
            )
        self.heads, self.base = heads, base
        self.R, self.Dn, self.Dr = (
            kv_lora_rank,
            qk_nope_head_dim,
            qk_rope_head_dim,
        )
        key, key_value = self.Dn + self.Dr, self.Dn + v_head_dim
        self.q_a_proj = nn.Linear(width, q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(q_lora_rank)
        self.q_b_proj = nn.Linear(q_lora_rank, heads * key, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(width, self.R + self.Dr, bias=False)
        self.kv_a_layernorm = RMSNorm(self.R)
        self.kv_b_proj = nn.Linear(self.R, heads * key_value, bias=False)
        self.o_proj = nn.Linear(heads * v_head_dim, width, bias=False)

    def compress_query(self, x: Tensor) -> Tensor:
        """Squeeze tokens ``(B, T, C)`` into ``(B, T, q_lora_rank)``."""
        squeezed: Tensor = self.q_a_layernorm(self.q_a_proj(x))
        return squeezed

    def forward(
        self,
        x: Tensor,
        cache: Tensor | None = None,
        attend: Attend = expanded_attention,
    ) -> tuple[Tensor, Tensor]:
        """Attend from new tokens to the cached ones and to themselves.

        Args:
            x: ``(B, T, C)``, the new tokens.
            cache: ``(B, S - T, R + Dr)`` of earlier tokens.
            attend: The form to compute it in.

        Returns:
            ``(B, T, C)``, and the cache with the new tokens in it.
        """
        past, T = 0 if cache is None else cache.shape[1], x.shape[1]
        positions = torch.arange(past, past + T, device=x.device)
        cos, sin = rope_table(positions.double(), self.Dr, self.base)

        q = self.q_b_proj(self.compress_query(x))
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q_nope, q_rope = q.split((self.Dn, self.Dr), dim=-1)
        q = torch.cat((q_nope, rotate_interleaved(q_rope, cos, sin)), dim=-1)

        latent, k = self.kv_a_proj_with_mqa(x).split((self.R, self.Dr), dim=-1)
        k = rotate_interleaved(k[:, None], cos, sin)[:, 0]
        new = torch.cat((self.kv_a_layernorm(latent), k), dim=-1)
        cache = new if cache is None else torch.cat((cache, new), dim=1)

        up = self.kv_b_proj.weight.unflatten(0, (self.heads, -1))
        seen = causal_mask(T, past + T, x.device)
        y = attend(q, cache, up, seen)  # (B, H, T, Dv)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out, cache
