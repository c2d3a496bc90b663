"""Every token asks all others a question and takes a mean of their answers.

    scores   how well each key fits the query: a dot product, over sqrt(D)
    weights  their softmax: positive, and 1 in sum
    output   the mean of the values under these weights

    work     4 H T S D operations
    memory   H T S scores, written and read; fused kernels keep them on chip

Reference: Bahdanau et al., 2014, https://arxiv.org/abs/1409.0473
Reference: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762
"""

import math

import torch
from torch import Tensor, nn


def attention_weights(
    q: Tensor, k: Tensor, mask: Tensor | None = None
) -> Tensor:
    """How much of each value every query takes.

    Args:
        q: ``(B, H, T, D)``, a query a token.
        k: ``(B, H, S, D)``, the keys that they meet.
        mask: Broadcastable to ``(B, H, T, S)``. Of bool: which keys a query
            may see. Of floats: added to the scores, ``-inf`` hides a key.

    Returns:
        ``(B, H, T, S)``; each row sums to 1. A row that may see no key is 0.

    Examples:
        >>> q, k = torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 4, 4)
        >>> attention_weights(q, k).tolist()  # no key fits better than others
        [[[[0.25, 0.25, 0.25, 0.25]]]]
        >>> attention_weights(q, k, torch.tensor([True, False, True, False]))
        tensor([[[[0.5000, 0.0000, 0.5000, 0.0000]]]])
    """
    D = q.shape[-1]
    # scaled before the product, which then stays small in 16 bits too
    scores = (q / math.sqrt(D)) @ k.mT  # (B, H, T, S)
    if mask is None:
        return scores.softmax(dim=-1)

    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    else:
        scores = scores + mask.to(scores.dtype)
    # all -inf would be 0 / 0, and one NaN spreads to every weight
    blind = scores.isneginf().all(dim=-1, keepdim=True)
    weights = scores.masked_fill(blind, 0).softmax(dim=-1)
    return weights.masked_fill(blind, 0)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Scaled dot-product attention.

    Args:
        q: ``(B, H, T, D)``: batch, heads, queries, head size.
        k: ``(B, H, S, D)``, a key for each of ``S`` tokens.
        v: ``(B, H, S, D)``, a value for each key; its size may differ.
        mask: See ``attention_weights``; None lets every query see all keys.

    Returns:
        ``(B, H, T, D)``, for each query a mean of the values.

    Raises:
        ValueError: If shapes do not fit, or the mask holds integers.

    Examples:
        >>> q = torch.tensor([[[[99.0, 0.0]]]])  # fits the first key far better
        >>> k = torch.eye(2).reshape(1, 1, 2, 2)
        >>> v = torch.tensor([[[[7.0], [8.0]]]])
        >>> attention(q, k, v).item()
        7.0
    """
    _check(q, k, v, mask)
    return attention_weights(q, k, mask) @ v


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"expected (B, H, tokens, D), got {shapes}")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"expected q and k with one B, H and D, got {shapes}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"expected a value for each key, got {shapes}")
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"mask must be bool (who is seen) or float (added to the scores), "
            f"got {mask.dtype}: zeros and ones could mean either"
        )
    full = (*q.shape[:3], k.shape[2])
    fits = mask.ndim <= 4 and all(
        m in (1, n)
        for m, n in zip(reversed(mask.shape), reversed(full), strict=False)
    )
    if not fits:
        raise ValueError(
            f"expected a mask that broadcasts to {full}, "
            f"got {tuple(mask.shape)}"
        )


class MultiHeadAttention(nn.Module):
    """Several attentions side by side, each with questions of its own.

    Args:
        width: Values of a token, ``C``; a multiple of ``heads``.
        heads: Attentions, ``H``; each works on ``D = C / H`` values.

    Examples:
        >>> layer = MultiHeadAttention(width=64, heads=8)
        >>> layer(torch.zeros(1, 5, 64)).shape
        torch.Size([1, 5, 64])
    """

    def __init__(self, width: int, heads: int) -> None:
        """Create the four projections."""
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(
                f"width must be a multiple of heads, got {width} and {heads}"
            )
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from each token of ``x`` to each of ``context``.

        Args:
            x: ``(B, T, C)``, the tokens that ask.
            context: ``(B, S, C)``, the tokens that are asked; None for ``x``
                itself, which is self-attention.
            mask: As in ``attention_weights``.

        Returns:
            ``(B, T, C)``.
        """
        context = x if context is None else context
        q = self._split(self.q_proj(x))  # (B, H, T, D)
        k = self._split(self.k_proj(context))  # (B, H, S, D)
        v = self._split(self.v_proj(context))
        y = attention(q, k, v, mask)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out  # (B, T, C)

    def _split(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        return x.view(B, T, self.heads, C // self.heads).transpose(1, 2)
