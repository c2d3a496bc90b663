"""Each token attends to itself and the few before it, whatever the length.

    window   tokens that a query meets, itself included: Mistral 7B has 4096
    work     4 H T W D operations instead of 2 H T T D
    memory   a rolling buffer of W tokens a layer; token t lies in slot t % W
    reach    layers * (W - 1) tokens back, since layers pass on what they saw

Reference: Beltagy et al., 2020, https://arxiv.org/abs/2004.05150
Reference: Jiang et al., 2023, https://arxiv.org/abs/2310.06825
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from warpmap.models.foundations.attention import attention


def band_mask(
    T: int, S: int, window: int, device: torch.device | None = None
) -> Tensor:
    """Which of ``S`` keys each of the last ``T`` tokens may see.

    Returns:
        ``(T, S)`` of bool; a band of ``window`` keys that ends at the query.

    Raises:
        ValueError: If ``window`` is below 1.

    Examples:
        >>> band_mask(3, 5, window=2).int().tolist()
        [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    query = torch.arange(S - T, S, device=device)[:, None]
    key = torch.arange(S, device=device)
    return (key <= query) & (key > query - window)


def sliding_window_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, window: int
) -> Tensor:
    """All scores, and then most of them masked.

    Args:
        q: ``(B, H, T, D)``, the last ``T`` of ``S`` tokens.
        k: ``(B, H, S, D)``.
        v: ``(B, H, S, D)``.
        window: Tokens that a query meets, itself included.

    Returns:
        ``(B, H, T, D)``.

    Examples:
        >>> v = torch.tensor([2.0, 4.0, 6.0]).reshape(1, 1, 3, 1)
        >>> y = sliding_window_attention_reference(0 * v, 0 * v, v, window=2)
        >>> y.flatten().tolist()  # all fit alike: means of two
        [2.0, 3.0, 5.0]
    """
    mask = band_mask(q.shape[2], k.shape[2], window, q.device)
    return attention(q, k, v, mask)


def sliding_window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int
) -> Tensor:
    """The band only: each block of queries meets two blocks of keys.

    Args:
        q: ``(B, H, T, D)``.
        k: ``(B, H, T, D)``, of the same tokens.
        v: ``(B, H, T, D)``.
        window: Tokens that a query meets, itself included.

    Returns:
        ``(B, H, T, D)``; ``2 H T W`` scores were computed.

    Raises:
        ValueError: If shapes differ, or ``window`` is below 1.

    Examples:
        >>> v = torch.tensor([2.0, 4.0, 6.0]).reshape(1, 1, 3, 1)
        >>> sliding_window_attention(0 * v, 0 * v, v, window=2).flatten()
        tensor([2., 3., 5.])
    """
    if not q.shape == k.shape == v.shape or q.ndim != 4:
        raise ValueError(
            "expected q, k and v of one shape (B, H, T, D), got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    T, D = q.shape[2:]
    W = max(1, min(window, T))
    short = -T % W
    q = pad(q, (0, 0, 0, short)).unflatten(2, (-1, W))  # (B, H, N, W, D)
    # block n meets the tokens of blocks n - 1 and n
    k = pad(k, (0, 0, W, short)).unfold(2, 2 * W, W)  # (B, H, N, D, 2 W)
    v = pad(v, (0, 0, W, short)).unfold(2, 2 * W, W)

    scores = (q / math.sqrt(D)) @ k  # (B, H, N, W, 2 W)
    seen = band_mask(W, 2 * W, W, q.device).repeat(q.shape[2], 1, 1)
    seen[:1, :, :W] = False  # nothing comes before the first block
    weights = scores.masked_fill(~seen, -math.inf).softmax(dim=-1)
    return (weights @ v.mT).flatten(2, 3)[:, :, :T]


class RollingBuffer:
    """Keys and values of the last tokens, and nothing older.

    Args:
        window: Tokens kept; the query's own is one of them.

    Examples:
        >>> buffer = RollingBuffer(window=2)
        >>> for number in (2.0, 4.0, 6.0):
        ...     v = torch.full((1, 1, 1, 1), number)
        ...     y = buffer.attend(0 * v, 0 * v, v)
        >>> y.item(), buffer.v.flatten().tolist()  # 6 took the place of 2
        (5.0, [6.0, 4.0])
    """

    k: Tensor
    v: Tensor

    def __init__(self, window: int) -> None:
        """An empty buffer; it takes its shape from the first tokens."""
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.window = window
        self.length = 0  # tokens so far, not tokens kept

    @torch.no_grad()
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the next ``T`` tokens; their keys and values are kept.

        Args:
            q: ``(B, H, T, D)``.
            k: ``(B, H, T, D)``, with their positions in them already.
            v: ``(B, H, T, D)``.

        Returns:
            ``(B, H, T, D)``.
        """
        T, W = k.shape[2], self.window
        if self.length == 0:
            self.k = k.new_zeros(*k.shape[:2], W, k.shape[3])
            self.v = v.new_zeros(*v.shape[:2], W, v.shape[3])

        if T == 1:
            self._write(k, v)
            # all that is kept may be seen, and a mean has no order: no mask
            kept = min(self.length, W)
            return attention(q, self.k[:, :, :kept], self.v[:, :, :kept])

        # the chunk's first query needs what its last key overwrites
        old = torch.arange(max(0, self.length - W), self.length) % W
        seen_k = torch.cat([self.k[:, :, old], k], dim=2)
        seen_v = torch.cat([self.v[:, :, old], v], dim=2)
        self._write(k, v)
        return sliding_window_attention_reference(q, seen_k, seen_v, W)

    def _write(self, k: Tensor, v: Tensor) -> None:
        end = self.length + k.shape[2]
        new = torch.arange(max(self.length, end - self.window), end)
        self.k[:, :, new % self.window] = k[:, :, -len(new) :]
        self.v[:, :, new % self.window] = v[:, :, -len(new) :]
        self.length = end
