"""Several documents in one row of a batch, none of which sees another.

Padding every document to the longest wastes most of a batch. Packing fills
the rows, and three things keep the documents apart:

    mask        a token sees its own document only, up to itself
    positions   count from 0 in each document
    targets     the last token of a document predicts nothing

A loss is then the mean over all tokens that predict, over the whole batch:
the same number, and the same gradients, as with one document a row.

Reference: Krell et al., 2021, https://arxiv.org/abs/2107.02027
Reference: Ding et al., 2024, https://arxiv.org/abs/2404.10830
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from warpmap.training.pretraining._bins import (
    best_fit_decreasing,
    cut_when_full,
    pieces,
)

__all__ = [
    "IGNORED",
    "Packed",
    "best_fit_decreasing",
    "cut_when_full",
    "document_mask",
    "document_starts",
    "pack",
    "packed_loss",
    "pieces",
    "positions_of",
]

IGNORED = -100  # a target that counts for nothing; cross_entropy's default


@dataclass(frozen=True)
class Packed:
    """Rows of documents.

    Attributes:
        tokens: ``(B, T)``; padding holds token 0.
        targets: ``(B, T)``; the next token of the same document, or
            ``IGNORED``.
        documents: ``(B, T)``; the number of the sequence, -1 for padding.
    """

    tokens: Tensor
    targets: Tensor
    documents: Tensor


def pack(
    sequences: Sequence[Sequence[int]] | Sequence[Tensor],
    capacity: int,
    bins: Sequence[Sequence[int]] | None = None,
) -> Packed:
    """Lay sequences into rows of ``capacity`` tokens.

    Args:
        sequences: Tokens of each document, 1 to ``capacity`` of them.
        capacity: Tokens of a row, ``T``.
        bins: Sequences of each row; by default best fit decreasing chooses.

    Raises:
        ValueError: If a sequence, or a row of ``bins``, does not fit.

    Examples:
        >>> rows = pack([[5, 6, 7], [8], [9, 9, 9, 9]], capacity=4)
        >>> rows.tokens.tolist()
        [[9, 9, 9, 9], [5, 6, 7, 8]]
        >>> rows.targets.tolist()
        [[9, 9, 9, -100], [6, 7, -100, -100]]
        >>> rows.documents.tolist()
        [[2, 2, 2, 2], [0, 0, 0, 1]]
    """
    if bins is None:
        bins = best_fit_decreasing([len(s) for s in sequences], capacity)
    fullest = max((sum(len(sequences[i]) for i in b) for b in bins), default=0)
    if fullest > capacity:
        raise ValueError(
            f"bins must hold at most {capacity} tokens each, got {fullest}"
        )
    shape = (len(bins), capacity)
    tokens = torch.zeros(shape, dtype=torch.long)
    targets = torch.full(shape, IGNORED)
    documents = torch.full(shape, -1)
    for row, members in enumerate(bins):
        start = 0
        for number in members:
            sequence = torch.as_tensor(sequences[number], dtype=torch.long)
            end = start + len(sequence)
            tokens[row, start:end] = sequence
            targets[row, start : end - 1] = sequence[1:]
            documents[row, start:end] = number
            start = end
    return Packed(tokens, targets, documents)


def document_mask(documents: Tensor) -> Tensor:
    """Which tokens each token may see: its own document's, up to itself.

    Args:
        documents: ``(B, T)``, a number for each document of a row, -1 for
            padding. A token of padding sees itself: a softmax over nothing
            would be NaN.

    Returns:
        ``(B, 1, T, T)`` of bool, true where row may see column.

    Raises:
        ValueError: If ``documents`` is no matrix.

    Examples:
        >>> document_mask(torch.tensor([[7, 7, 8, -1]]))[0, 0].int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [0, 0, 1, 0],
                [0, 0, 0, 1]], dtype=torch.int32)
    """
    _check(documents)
    T = documents.shape[1]
    same = documents[:, :, None] == documents[:, None, :]  # (B, T, T)
    same &= documents[:, :, None] >= 0
    same = same.tril() | torch.eye(T, dtype=torch.bool, device=same.device)
    return same[:, None]


def positions_of(documents: Tensor) -> Tensor:
    """Each token's position in its document.

    Args:
        documents: ``(B, T)``; the tokens of a document lie side by side.

    Returns:
        ``(B, T)`` of int64; padding counts from 0 too.

    Raises:
        ValueError: If ``documents`` is no matrix.

    Examples:
        >>> positions_of(torch.tensor([[7, 7, 7, 8, 8, -1]])).tolist()
        [[0, 1, 2, 0, 1, 0]]
    """
    _check(documents)
    places = torch.arange(documents.shape[1], device=documents.device)
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    # the latest start so far; place 0 is always one
    starts = torch.where(first, places, 0).cummax(dim=1).values
    return places - starts


def document_starts(documents: Tensor) -> Tensor:
    """Where each document begins when all rows are laid end to end.

    Kernels for variable lengths take this, ``cu_seqlens``, and no mask.

    Args:
        documents: ``(B, T)``; padding counts as a document.

    Returns:
        ``(documents + 1,)`` of int32, from 0 to ``B * T``.

    Raises:
        ValueError: If ``documents`` is no matrix.

    Examples:
        >>> document_starts(torch.tensor([[7, 7, 8], [9, 9, -1]])).tolist()
        [0, 2, 3, 5, 6]
    """
    _check(documents)
    starts = (positions_of(documents).flatten() == 0).nonzero().flatten()
    end = torch.tensor([documents.numel()], device=documents.device)
    return torch.cat([starts, end]).to(torch.int32)


def packed_loss(
    logits: Tensor,
    packed: Packed,
    by_document: bool = False,
) -> Tensor:
    """Cross entropy of the tokens that predict.

    Args:
        logits: ``(B, T, V)``.
        packed: The rows that they came from.
        by_document: Weigh documents alike, rather than tokens.

    Raises:
        ValueError: If the shapes do not fit.

    Examples:
        >>> rows = pack([[0, 1, 1], [0, 1]], capacity=5)
        >>> packed_loss(torch.zeros(1, 5, 2), rows).item()  # ln 2
        0.6931471824645996
    """
    if logits.ndim != 3 or logits.shape[:2] != packed.targets.shape:
        raise ValueError(
            f"logits must be (B, T, V) with B and T of targets "
            f"{tuple(packed.targets.shape)}, got {tuple(logits.shape)}"
        )
    targets = packed.targets.to(logits.device)
    # half precision would lose the sum, so it is not kept here
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = cross_entropy(
        logits.flatten(0, 1).to(wide),
        targets.flatten(),
        ignore_index=IGNORED,
        reduction="none",
    )
    predicts = targets.flatten() != IGNORED
    weights = predicts.to(losses.dtype)
    if by_document:
        # one over the predictions of its document, for each that it makes
        numbers = packed.documents.to(logits.device).flatten()[predicts]
        _, inverse, counts = numbers.unique(
            return_inverse=True, return_counts=True
        )
        weights[predicts] = 1 / counts[inverse].to(losses.dtype)
    return (losses * weights).sum() / weights.sum()


def _check(documents: Tensor) -> None:
    if documents.ndim != 2:
        raise ValueError(
            f"documents must be (B, T), got {tuple(documents.shape)}"
        )
