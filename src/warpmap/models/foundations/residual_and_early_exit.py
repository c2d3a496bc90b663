"""Leave the model at the first layer that is sure of the next token.

Blocks add to one stream, and the head reads that stream. So the head can read
it after any block, and a token that is easy to predict may skip the rest.

    exit     norm and head after every block; confidence above a threshold
    skipped  their keys and values, from the stream as it was at the exit
    cost     a skipped block still costs 4 C^2 of its 24 C^2 operations

Reference: Elbayad et al., 2019, https://arxiv.org/abs/1910.10073
Reference: Schuster et al., 2022, https://arxiv.org/abs/2207.07061
Reference: Elhoushi et al., 2024, https://arxiv.org/abs/2404.16710
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from warpmap.models.attention.grouped_query_attention import causal_mask
from warpmap.models.foundations.transformer import Block, Transformer


def confidence(scores: Tensor) -> Tensor:
    """How far the most likely token is ahead of the second, 0 to 1.

    Args:
        scores: ``(..., V)``, before the softmax.

    Returns:
        ``(...)``, the difference of their probabilities.

    Examples:
        >>> confidence(torch.tensor([[0.7, 0.2, 0.1]]).log())
        tensor([0.5000])
    """
    first, second = scores.softmax(dim=-1).topk(2, dim=-1).values.unbind(-1)
    return first - second


def exit_loss(model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of all exits; the exit after layer ``l`` has weight ``l``.

    A model trained on its last exit alone is not bound to keep the stream
    readable before.

    Args:
        model: Its blocks, and one head for all exits.
        tokens: ``(B, T)``.
        targets: ``(B, T)``, the token after each.

    Returns:
        A scalar, in nats a token.

    Examples:
        >>> model = Transformer(10, width=8, layers=2, heads=2, longest=4)
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> round(exit_loss(model, tokens, tokens).item())  # ln 10 = 2.3
        2
    """
    x, T = model.embed(tokens), tokens.shape[1]
    mask = causal_mask(T, T, tokens.device)
    total = x.new_zeros(())
    for layer, block in enumerate(model.blocks, start=1):
        x = block(x, mask)
        scores = model.read(x).flatten(0, 1)
        total = total + layer * cross_entropy(scores, targets.flatten())
    layers = len(model.blocks)
    return total / (layers * (layers + 1) / 2)


def early_exit(
    model: Transformer, tokens: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """Scores of all tokens of known texts, and where each token left.

    Computes every block for all tokens and keeps it for those that are still
    in. A token that has left stays as it was, and later tokens see it so.

    Args:
        model: The model.
        tokens: ``(B, T)``.
        threshold: A token leaves once its confidence is above; 1 is never.

    Returns:
        Scores ``(B, T, V)``, and the blocks that each token ran, ``(B, T)``.

    Raises:
        ValueError: If ``threshold`` is not 0 to 1.

    Examples:
        >>> model = Transformer(10, width=8, layers=2, heads=2, longest=4)
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> early_exit(model, tokens, threshold=1.0)[1].tolist()
        [[2, 2, 2]]
        >>> early_exit(model, tokens, threshold=0.0)[1].tolist()
        [[1, 1, 1]]
    """
    _check(threshold)
    x, T = model.embed(tokens), tokens.shape[1]
    mask = causal_mask(T, T, tokens.device)
    inside = torch.ones_like(tokens, dtype=torch.bool)
    depths = torch.zeros_like(tokens)
    for block in model.blocks:
        x = torch.where(inside[..., None], block(x, mask), x)
        depths = depths + inside
        inside = inside & (confidence(model.read(x)) <= threshold)
    return model.read(x), depths


class Exit(NamedTuple):
    """What one token brought.

    Attributes:
        scores: ``(V,)``, of the token after it.
        depth: Blocks that it ran.
    """

    scores: Tensor
    depth: int


class EarlyExitDecoder:
    """One text, token by token, with keys and values kept.

    ``keys[l]`` and ``values[l]`` are ``(1, S, C)``: what block ``l`` shows of
    each token so far, whether the token ran the block or skipped it.

    Args:
        model: The model.
        threshold: A token leaves once its confidence is above; 1 is never.

    Examples:
        >>> model = Transformer(10, width=8, layers=3, heads=2, longest=4)
        >>> decoder = EarlyExitDecoder(model, threshold=0.0)
        >>> decoder.step(7).depth, [k.shape[1] for k in decoder.keys]
        (1, [1, 1, 1])
    """

    def __init__(self, model: Transformer, threshold: float) -> None:
        """Start a text."""
        _check(threshold)
        self.model, self.threshold = model, threshold
        nothing = model.embedding.new_empty(1, 0, model.embedding.shape[1])
        self.keys = [nothing for _ in model.blocks]
        self.values = [nothing for _ in model.blocks]

    @torch.no_grad()
    def step(self, token: int) -> Exit:
        """Take one token more; as deep as it needs."""
        model = self.model
        tokens = torch.tensor([[token]], device=model.embedding.device)
        x = model.embed(tokens, start=self.keys[0].shape[1])  # (1, 1, C)
        inside, depth = True, 0
        for layer, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            # later tokens look for this one in every layer
            normal = block.norm1(x)
            k = torch.cat([self.keys[layer], block.k(normal)], dim=1)
            v = torch.cat([self.values[layer], block.v(normal)], dim=1)
            self.keys[layer], self.values[layer] = k, v
            if inside:
                x = x + block.attend(normal, k, v)
                x = x + block.transform(block.norm2(x))
                scores, depth = model.read(x)[0, 0], depth + 1
                inside = bool(confidence(scores) <= self.threshold)
        return Exit(scores, depth)


def _check(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be 0 to 1, got {threshold}")
