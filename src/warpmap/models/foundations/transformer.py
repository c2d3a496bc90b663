"""The Transformer as GPT-2 has it, whole, on one page.

    start   embedding of the token + embedding of its position
    block   x + attention(norm(x)), then x + feed_forward(norm(x))
    end     norm(x) times the embedding, transposed: a score a token

    weights  12 C^2 a block, without biases and norms
    work     24 T C^2 + 4 T^2 C operations a block and text

Reference: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762
Reference: Radford et al., 2019, Language Models are Unsupervised Multitask
    Learners
"""

import math

import torch
from torch import Tensor, nn

from warpmap.models.attention.grouped_query_attention import causal_mask
from warpmap.models.foundations.attention import attention
from warpmap.models.foundations.feed_forward import activate
from warpmap.models.foundations.normalization import normalize


class LayerNorm(nn.Module):
    """Each token to mean 0 and variance 1, then a weight and a bias.

    Examples:
        >>> LayerNorm(2)(torch.tensor([[3.0, 5.0]])).round().tolist()
        [[-1.0, 1.0]]
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        """Make a norm for tokens of ``width`` values."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., C)`` to ``(..., C)``."""
        y, _ = normalize(x, axis=-1, eps=self.eps)
        return y * self.weight + self.bias


class Block(nn.Module):
    """Attention among tokens, a network for each token, a sum after both.

    Args:
        width: Values of a token, ``C``; a multiple of ``heads``.
        heads: Attention heads, ``H``.
        hidden: Width inside the feed-forward network, usually ``4 C``.

    Examples:
        >>> block = Block(width=64, heads=8, hidden=256)
        >>> matrices = [w for w in block.parameters() if w.ndim == 2]
        >>> sum(w.numel() for w in matrices) == 12 * 64**2
        True
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        """Create the weights."""
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(
                f"width must be a multiple of heads, got {width} and {heads}"
            )
        self.heads = heads
        self.norm1 = LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm2 = LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read the stream twice, and add to it twice.

        Args:
            x: ``(B, T, C)``.
            mask: Who sees whom, broadcastable to ``(B, H, T, T)``; without
                one, every token sees all others.

        Returns:
            ``(B, T, C)``.
        """
        normal = self.norm1(x)
        k, v = self.k(normal), self.v(normal)
        x = x + self.attend(normal, k, v, mask)
        added: Tensor = x + self.transform(self.norm2(x))
        return added

    def attend(
        self, asking: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """What the tokens that ask, ``(B, T, C)``, get from others' k and v.

        ``k`` and ``v`` are ``(B, S, C)``: of the same tokens, of earlier ones
        too, or of another text.
        """
        q, k, v = self._split(self.q(asking)), self._split(k), self._split(v)
        y = attention(q, k, v, mask)  # (B, H, T, D)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out  # (B, T, C)

    def transform(self, x: Tensor) -> Tensor:
        """What the network makes of each token, ``(B, T, C)``."""
        hidden, _ = activate(self.up(x), "gelu")
        out: Tensor = self.down(hidden)
        return out

    def _split(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return heads  # (B, H, T, D)

    @classmethod
    @torch.no_grad()
    def from_torch(cls, layer: nn.TransformerEncoderLayer) -> "Block":
        """A block with the weights of PyTorch's layer.

        Args:
            layer: Made with ``norm_first=True`` and ``activation="gelu"``.

        Raises:
            ValueError: If it was made otherwise.

        Examples:
            >>> layer = nn.TransformerEncoderLayer(
            ...     64, 8, 256, 0.0, "gelu", batch_first=True, norm_first=True
            ... )
            >>> x = torch.randn(2, 5, 64)
            >>> torch.allclose(Block.from_torch(layer)(x), layer(x), atol=1e-5)
            True
        """
        if not layer.norm_first or layer.activation is not nn.functional.gelu:
            raise ValueError(
                "expected norm_first=True and activation='gelu', got "
                f"{layer.norm_first} and {layer.activation}"
            )
        theirs = dict(layer.named_parameters())
        C, F = layer.linear2.out_features, layer.linear2.in_features
        block = cls(C, layer.self_attn.num_heads, F)
        block.to(theirs["linear1.weight"])  # device and dtype
        block.norm1.eps, block.norm2.eps = layer.norm1.eps, layer.norm2.eps
        for end in ("weight", "bias"):
            # rows of q, then k, then v, in one matrix
            q, k, v = theirs[f"self_attn.in_proj_{end}"].chunk(3)
            for ours, weight in (
                (block.norm1, theirs[f"norm1.{end}"]),
                (block.q, q),
                (block.k, k),
                (block.v, v),
                (block.out, theirs[f"self_attn.out_proj.{end}"]),
                (block.norm2, theirs[f"norm2.{end}"]),
                (block.up, theirs[f"linear1.{end}"]),
                (block.down, theirs[f"linear2.{end}"]),
            ):
                getattr(ours, end).copy_(weight)
        return block


class Transformer(nn.Module):
    """Tokens in, a score for every next token out.

    Weights start normal with deviation 0.02, and those that write into the
    stream with less, since ``2 layers`` of them add up. Biases start at 0.

    Args:
        vocab_size: Tokens that it knows, ``V``.
        width: Values of a token, ``C``.
        layers: Blocks, from 1.
        heads: Attention heads of a block.
        longest: Positions that it knows.

    Examples:
        >>> model = Transformer(100, width=32, layers=2, heads=4, longest=16)
        >>> model(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 100])
    """

    def __init__(
        self, vocab_size: int, width: int, layers: int, heads: int, longest: int
    ) -> None:
        """Create the weights."""
        super().__init__()
        for name, value in (
            ("vocab_size", vocab_size),
            ("layers", layers),
            ("longest", longest),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.embedding = nn.Parameter(torch.empty(vocab_size, width))
        self.positions = nn.Parameter(torch.empty(longest, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, 4 * width) for _ in range(layers)
        )
        self.norm = LayerNorm(width)

        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                writes = name.endswith(("out.weight", "down.weight"))
                less = math.sqrt(2 * layers) if writes else 1.0
                nn.init.normal_(weight, std=0.02 / less)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """What each token is and where it stands.

        Args:
            tokens: ``(B, T)``, integers below ``V``.
            start: Position of the first.

        Returns:
            ``(B, T, C)``.

        Raises:
            ValueError: If ``tokens`` is no matrix of integers, or too long.
        """
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(
                f"expected integers (B, T), got {tokens.dtype} of shape "
                f"{tuple(tokens.shape)}"
            )
        end, longest = start + tokens.shape[1], len(self.positions)
        if end > longest:
            raise ValueError(f"{end} tokens, but only {longest} positions")
        return self.embedding[tokens] + self.positions[start:end]

    def read(self, x: Tensor) -> Tensor:
        """Scores of the next token, ``(B, T, V)``, from the stream ``x``."""
        normal: Tensor = self.norm(x)
        return normal @ self.embedding.T

    def forward(self, tokens: Tensor, causal: bool = True) -> Tensor:
        """Scores of the token after each of ``tokens``.

        Args:
            tokens: ``(B, T)``, integers below ``V``.
            causal: Whether later tokens are hidden; BERT hides none.

        Returns:
            ``(B, T, V)``.

        Raises:
            ValueError: If ``tokens`` is no matrix of integers, or too long.
        """
        x = self.embed(tokens)
        T = tokens.shape[1]
        mask = causal_mask(T, T, tokens.device) if causal else None
        for block in self.blocks:
            x = block(x, mask)
        return self.read(x)
