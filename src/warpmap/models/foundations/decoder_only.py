"""A decoder-only language model, as Llama and its relatives compute it.

Every token may see itself and what came before, so one pass over a text
trains on every position, and keys and values once computed stay right.

    block   x + attention(norm(x)), then x + feed_forward(norm(x))
    work    2 operations a weight and token, besides the attention scores
    kept    2 Hkv D values a layer and token, where a cache is given

Reference: Radford et al., 2018, Improving Language Understanding
Reference: Touvron et al., 2023, https://arxiv.org/abs/2302.13971
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from warpmap.models.attention.grouped_query_attention import causal_mask
from warpmap.models.foundations.feed_forward import SwiGLU
from warpmap.models.foundations.normalization import RMSNorm
from warpmap.models.positions.rope import rope_table, rotate


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder.

    Attributes:
        vocab_size: Tokens ``V`` of the vocabulary.
        width: Width ``C`` of the residual stream, a multiple of ``heads``.
        layers: Blocks.
        heads: Query heads ``H``.
        kv_heads: Key-value heads ``Hkv``, a divisor of ``heads``.
        hidden: Width ``F`` between the matrices of the feed-forward part.
        rope_base: Base of the rotary frequencies.
        norm_eps: Added to the mean square in every RMSNorm.
        tied: Whether the head is the embedding, transposed.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    tied: bool = True

    def __post_init__(self) -> None:
        """Refuse shapes that no decoder has."""
        sizes = (self.vocab_size, self.width, self.layers, self.hidden)
        if min(*sizes, self.heads, self.kv_heads) < 1:
            raise ValueError(f"every size must be at least 1, got {self}")
        if self.heads % self.kv_heads or self.width % self.heads:
            raise ValueError(
                f"width {self.width} must be a multiple of heads "
                f"{self.heads}, and heads of kv_heads {self.kv_heads}"
            )
        if self.width // self.heads % 2:
            raise ValueError(
                "RoPE turns pairs: the head size must be even, got "
                f"{self.width // self.heads}"
            )


class Cache(Protocol):
    """Keys and values of the tokens that the model has seen."""

    length: int
    """Tokens that every layer holds."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep new keys and values, ``(B, Hkv, T, D)``; give back all."""
        ...


@runtime_checkable
class MaskingCache(Cache, Protocol):
    """A cache with padding or gaps, which knows what new tokens may see."""

    def positions(self, T: int) -> Tensor | None:
        """Where the next ``T`` tokens stand; None for one after the other."""
        ...

    def mask(self, T: int) -> Tensor | None:
        """Which keys they see; None for all up to themselves."""
        ...


class CausalAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig) -> None:
        """Create the four projections."""
        super().__init__()
        C, D = config.width, config.width // config.heads
        self.heads, self.kv_heads, self.D = config.heads, config.kv_heads, D
        self.q = nn.Linear(C, C, bias=False)
        self.k = nn.Linear(C, self.kv_heads * D, bias=False)
        self.v = nn.Linear(C, self.kv_heads * D, bias=False)
        self.o = nn.Linear(C, C, bias=False)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        layer: int,
        cache: Cache | None,
    ) -> Tensor:
        """Mix what the tokens before, cached ones too, have to offer."""
        B, T, C = x.shape
        q = self.q(x).view(B, T, self.heads, self.D).transpose(1, 2)
        k = self.k(x).view(B, T, self.kv_heads, self.D).transpose(1, 2)
        v = self.v(x).view(B, T, self.kv_heads, self.D).transpose(1, 2)
        q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None:
            k, v = cache.update(layer, k, v)  # (B, Hkv, S, D)

        G = self.heads // self.kv_heads
        if mask is None and T == 1:
            # it sees all, so the queries of a group may be rows of one
            # matrix, and keys are read where they lie
            q = q.reshape(B, self.kv_heads, G, self.D)
            y = F.scaled_dot_product_attention(q, k, v)
            y = y.reshape(B, self.heads, 1, self.D)
        else:
            k = k.repeat_interleave(G, dim=1)
            v = v.repeat_interleave(G, dim=1)
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None
            )
        mixed: Tensor = self.o(y.transpose(1, 2).reshape(B, T, C))
        return mixed


class DecoderBlock(nn.Module):
    """Attention between tokens, then a network for each token alone."""

    def __init__(self, config: DecoderConfig) -> None:
        """Create both parts, each with its norm."""
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = CausalAttention(config)
        self.feed_forward_norm = RMSNorm(config.width, config.norm_eps)
        self.feed_forward = SwiGLU(config.width, config.hidden)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        layer: int,
        cache: Cache | None,
    ) -> Tensor:
        """Add to the residual stream twice."""
        normal = self.attention_norm(x)
        x = x + self.attention(normal, angles, mask, layer, cache)
        added: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return added


class Decoder(nn.Module):
    """The whole model: tokens in, a logit for every next token out.

    Weights start normal with deviation 0.02; the matrices that write into
    the residual stream with less, since ``2 layers`` of them add up there.

    Args:
        config: Its shape.

    Examples:
        >>> model = Decoder(DecoderConfig(100, 16, 2, 4, 2, 32))
        >>> model(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 100])
    """

    def __init__(self, config: DecoderConfig) -> None:
        """Create the weights."""
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(
            DecoderBlock(config) for _ in range(config.layers)
        )
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight

        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)
            if name.endswith(("attention.o.weight", "down.weight")):
                weight.data /= math.sqrt(2 * config.layers)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits of the token after each of ``tokens``.

        Args:
            tokens: ``(B, T)``, integers below ``V``.
            positions: ``(T,)`` or ``(B, T)``; else what the cache says, or
                one after the other from its length on.
            mask: Which key each query sees, bool or additive, broadcastable
                to ``(B, H, T, S)``; else what the cache says, or the keys
                up to itself.
            cache: Keys and values of earlier tokens; takes the new ones.

        Returns:
            ``(B, T, V)``, in the dtype of the weights.

        Raises:
            ValueError: If ``tokens`` is no matrix of integers.
        """
        logits: Tensor = self.head(
            self.features(tokens, positions, mask, cache)
        )
        return logits

    def features(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """What the head reads, for those who need few rows of logits.

        Returns:
            ``(B, T, C)``; arguments and errors are those of ``forward``.
        """
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(
                f"expected integers (B, T), got {tokens.dtype} of shape "
                f"{tuple(tokens.shape)}"
            )
        T, past = tokens.shape[1], cache.length if cache is not None else 0
        if isinstance(cache, MaskingCache):
            positions = cache.positions(T) if positions is None else positions
            mask = cache.mask(T) if mask is None else mask
        if positions is None:
            positions = torch.arange(past, past + T, device=tokens.device)
        if mask is None and past and T > 1:
            mask = causal_mask(T, past + T, tokens.device)

        x = self.embedding(tokens)  # (B, T, C)
        wide = positions.to(torch.promote_types(x.dtype, torch.float32))
        head_size = self.config.width // self.config.heads
        angles = rope_table(wide, head_size, self.config.rope_base)
        if positions.ndim == 2:
            # one row of angles for all heads of a text
            angles = angles[0][:, None], angles[1][:, None]
        for layer, block in enumerate(self.blocks):
            x = block(x, angles, mask, layer, cache)
        normal: Tensor = self.norm(x)
        return normal
