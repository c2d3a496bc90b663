"""Relative positions as tensors: each is added to the scores, as a mask is."""

import math

import torch
from torch import Tensor, nn

from warpmap.models.positions.position_embedding import (
    alibi_slopes,
    shaw_index,
    sinusoidal,
    t5_bucket,
)


def sinusoidal_table(tokens: int, width: int) -> Tensor:
    """The vectors that are added to the first tokens of a text.

    Returns:
        ``(T, C)`` in float64; round it once, to the dtype of the model.

    Examples:
        >>> sinusoidal_table(2, 2)[0].tolist()
        [0.0, 1.0]
    """
    rows = [sinusoidal(p, width) for p in range(tokens)]
    return torch.tensor(rows, dtype=torch.float64).reshape(tokens, width)


def offsets(T: int, S: int, device: torch.device) -> Tensor:
    """Position of each key minus that of each query, the last ``T`` of ``S``.

    Returns:
        ``(T, S)`` of int64; below zero where the key came earlier.

    Raises:
        ValueError: If there are more queries than keys.

    Examples:
        >>> offsets(2, 3, torch.device("cpu")).tolist()
        [[-1, 0, 1], [-2, -1, 0]]
    """
    if T > S:
        raise ValueError(f"expected at most as many queries as keys, {T} > {S}")
    keys = torch.arange(S, device=device)
    return keys - keys[S - T :, None]


def alibi_bias(heads: int, T: int, S: int, device: torch.device) -> Tensor:
    """ALiBi: each head's slope times the distance, to subtract.

    Returns:
        ``(H, T, S)`` in float32.

    Examples:
        >>> alibi_bias(8, 1, 3, torch.device("cpu"))[0].tolist()
        [[-1.0, -0.5, 0.0]]
    """
    slopes = torch.tensor(alibi_slopes(heads), device=device)
    return slopes[:, None, None] * -offsets(T, S, device).abs()


class T5Bias(nn.Module):
    """T5: a learned number for each head and range of distances.

    Args:
        heads: ``H``.
        buckets: Ranges of distances.
        longest: The distance from which all are alike.
        causal: Whether no key comes after its query.

    Examples:
        >>> T5Bias(heads=8)(T=2, S=5).shape
        torch.Size([8, 2, 5])
    """

    def __init__(
        self,
        heads: int,
        buckets: int = 32,
        longest: int = 128,
        causal: bool = True,
    ) -> None:
        """Create the table, one for all layers of a model."""
        super().__init__()
        t5_bucket(0, buckets, longest, causal)  # refuses what does not fit
        self.table = nn.Parameter(torch.zeros(buckets, heads))
        self.longest, self.causal = longest, causal

    def forward(self, T: int, S: int) -> Tensor:
        """The biases of the last ``T`` of ``S`` tokens, ``(H, T, S)``."""
        device, buckets = self.table.device, len(self.table)
        row = torch.tensor(
            [
                t5_bucket(offset, buckets, self.longest, self.causal)
                for offset in range(1 - S, S)
            ],
            device=device,
        )
        bucket = row[offsets(T, S, device) + S - 1]  # (T, S)
        return self.table[bucket].permute(2, 0, 1)


def shaw_bias(q: Tensor, table: Tensor, S: int) -> Tensor:
    """Shaw: how well the query fits a learned vector of the offset.

    Adding the vector to the key gives the same scores, but takes a key for
    each pair of tokens. Here each query meets each vector of the table once.

    Args:
        q: ``(B, H, T, D)``, the last ``T`` of ``S`` tokens.
        table: ``(2 limit + 1, D)``, a vector for each offset.
        S: Keys.

    Returns:
        ``(B, H, T, S)``.

    Examples:
        >>> q, table = torch.ones(1, 1, 1, 4), torch.eye(4)[:3]
        >>> shaw_bias(q, table, S=4)[0, 0, 0].tolist()
        [0.5, 0.5, 0.5, 0.5]
    """
    T, D = q.shape[-2:]
    limit = len(table) // 2
    row = [shaw_index(offset, limit) for offset in range(1 - S, S)]
    index = torch.tensor(row, device=q.device)
    index = index[offsets(T, S, q.device) + S - 1]  # (T, S)
    fits = (q / math.sqrt(D)) @ table.T  # (B, H, T, 2 limit + 1)
    return fits.gather(-1, index.expand(*q.shape[:2], T, S))
