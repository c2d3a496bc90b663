"""Predict several tokens ahead at every position, to learn and to draft.

    independent  one trunk, a last block for each token ahead, one head
    sequential   each depth reads the depth before and the token it predicted
    memory       logits of one depth at a time, if each goes backward at once

Depth 0 is the decoder as it is. Row ``i`` of depth ``k`` predicts token
``i + 1 + k``, and has seen the tokens up to ``i``; where depths are
sequential, up to ``i + k``.

Reference: Gloeckle et al., 2024, https://arxiv.org/abs/2404.19737
Reference: DeepSeek-AI, 2024, https://arxiv.org/abs/2412.19437
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from warpmap.models.foundations.decoder_only import (
    Decoder,
    DecoderBlock,
    DecoderConfig,
)
from warpmap.models.foundations.normalization import RMSNorm
from warpmap.models.positions.rope import rope_table


class MultiToken(nn.Module):
    """A decoder, and what its head may read for tokens further ahead.

    Args:
        decoder: The model of the next token; stays usable alone.
        ahead: Tokens to predict after the next one, at least 1.
    """

    def __init__(self, decoder: Decoder, ahead: int) -> None:
        """Keep the decoder."""
        super().__init__()
        if ahead < 1:
            raise ValueError(f"ahead must be at least 1, got {ahead}")
        self.decoder, self.ahead = decoder, ahead

    def features(self, tokens: Tensor) -> list[Tensor]:
        """What the head reads, for each depth.

        Args:
            tokens: ``(B, T)``, more than ``ahead`` each.

        Returns:
            Depth ``k``: ``(B, T - k, C)``.

        Raises:
            ValueError: If the texts are too short.
        """
        raise NotImplementedError

    def _angles(self, tokens: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        config, weight = self.decoder.config, self.decoder.embedding.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        positions = torch.arange(rows, device=tokens.device, dtype=wide)
        return rope_table(
            positions, config.width // config.heads, config.rope_base
        )

    def _check(self, tokens: Tensor) -> None:
        if tokens.ndim != 2 or tokens.shape[1] <= self.ahead:
            raise ValueError(
                f"expected (B, T) with T above {self.ahead}, got "
                f"{tuple(tokens.shape)}"
            )


class IndependentHeads(MultiToken):
    """Gloeckle and others: a block of its own for each token ahead.

    The decoder's last block predicts the next token. Its siblings read the
    same trunk, and know nothing of one another.

    Examples:
        >>> decoder = Decoder(DecoderConfig(100, 16, 2, 4, 2, 32))
        >>> model = IndependentHeads(decoder, ahead=3)
        >>> [f.shape[1] for f in model.features(torch.zeros(1, 9).long())]
        [9, 8, 7, 6]
    """

    def __init__(self, decoder: Decoder, ahead: int) -> None:
        """Create the siblings of the last block."""
        super().__init__(decoder, ahead)
        self.siblings = nn.ModuleList(
            _new_block(decoder.config) for _ in range(ahead)
        )

    def features(self, tokens: Tensor) -> list[Tensor]:
        """See ``MultiToken.features``."""
        self._check(tokens)
        T, angles = tokens.shape[1], self._angles(tokens, tokens.shape[1])
        *trunk, last = self.decoder.blocks
        x = self.decoder.embedding(tokens)
        for layer, block in enumerate(trunk):
            x = block(x, angles, None, layer, None)
        # the last k rows of depth k look past the end of the text
        return [
            self.decoder.norm(block(x, angles, None, len(trunk), None))[
                :, : T - k
            ]
            for k, block in enumerate([last, *self.siblings])
        ]


class PredictionModule(nn.Module):
    """One depth of DeepSeek-V3: join a feature with a later token."""

    def __init__(self, config: DecoderConfig) -> None:
        """Create three norms, a matrix and a block."""
        super().__init__()
        C = config.width
        self.feature_norm = RMSNorm(C, config.norm_eps)
        self.token_norm = RMSNorm(C, config.norm_eps)
        self.join = nn.Linear(2 * C, C, bias=False)
        self.block = _new_block(config)
        self.norm = RMSNorm(C, config.norm_eps)
        nn.init.normal_(self.join.weight, std=0.02)

    def forward(
        self, features: Tensor, token: Tensor, angles: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Features for one token further, from two ``(B, T, C)``."""
        both = [self.feature_norm(features), self.token_norm(token)]
        x = self.join(torch.cat(both, dim=-1))
        y: Tensor = self.norm(self.block(x, angles, None, 0, None))
        return y


class SequentialModules(MultiToken):
    """DeepSeek-V3: depth ``k`` continues depth ``k - 1`` by one token.

    Embedding and head are the decoder's.

    Examples:
        >>> decoder = Decoder(DecoderConfig(100, 16, 2, 4, 2, 32))
        >>> model = SequentialModules(decoder, ahead=1)
        >>> [f.shape[1] for f in model.features(torch.zeros(1, 9).long())]
        [9, 8]
    """

    def __init__(self, decoder: Decoder, ahead: int) -> None:
        """Create a module for each depth."""
        super().__init__(decoder, ahead)
        self.depths = nn.ModuleList(
            PredictionModule(decoder.config) for _ in range(ahead)
        )

    def features(self, tokens: Tensor) -> list[Tensor]:
        """See ``MultiToken.features``."""
        self._check(tokens)
        result = [self.decoder.features(tokens)]
        embedded = self.decoder.embedding(tokens)
        for k, depth in enumerate(self.depths, start=1):
            # row i: what depth k - 1 made of it, and token i + k
            before, token = result[-1][:, :-1], embedded[:, k:]
            angles = self._angles(tokens, token.shape[1])
            result.append(depth(before, token, angles))
        return result


def depth_loss(
    decoder: Decoder, features: Tensor, tokens: Tensor, k: int
) -> Tensor:
    """Loss of one depth, in nats a token.

    Args:
        decoder: Its head is used.
        features: ``(B, T - k, C)``, of depth ``k``.
        tokens: ``(B, T)``.
        k: The depth.

    Returns:
        Sum over all targets that exist, over the number of next tokens: all
        depths are divided alike.

    Examples:
        >>> decoder = Decoder(DecoderConfig(8, 4, 1, 1, 1, 4))
        >>> tokens = torch.tensor([[1, 2, 3, 4, 5]])  # ln 8 = 2.08
        >>> f = torch.zeros(1, 4, 4)
        >>> round(depth_loss(decoder, f, tokens, k=1).item() * 4 / 3, 2)
        2.08
    """
    targets = tokens[:, k + 1 :]
    logits = decoder.head(features[:, : targets.shape[1]])
    total = cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum"
    )
    return total / tokens[:, 1:].numel()


def joint_loss(
    model: MultiToken, tokens: Tensor, weights: Sequence[float]
) -> Tensor:
    """Weighted sum of the losses of all depths.

    Args:
        model: Independent or sequential.
        tokens: ``(B, T)``.
        weights: One a depth; Gloeckle and others have 1 for all, DeepSeek-V3
            1 for the first and together 0.3, later 0.1, for the rest.

    Raises:
        ValueError: If there are more or fewer weights than depths.

    Examples:
        >>> decoder = Decoder(DecoderConfig(100, 16, 2, 4, 2, 32))
        >>> model = SequentialModules(decoder, ahead=1)
        >>> round(joint_loss(model, torch.ones(2, 64).long(), [1, 0.3]).item())
        6
    """
    _check_weights(model, weights)
    terms = [
        weight * depth_loss(model.decoder, f, tokens, k)
        for k, (weight, f) in enumerate(
            zip(weights, model.features(tokens), strict=True)
        )
    ]
    return torch.stack(terms).sum()


def backward_by_depth(
    model: MultiToken, tokens: Tensor, weights: Sequence[float]
) -> Tensor:
    """Gradients of ``joint_loss``, with the logits of one depth at a time.

    Each depth goes backward to its features as soon as its loss is there;
    what the features collect goes through the blocks in the end.

    Args:
        model: Independent or sequential; gradients are added to its ``grad``.
        tokens: ``(B, T)``.
        weights: One a depth.

    Returns:
        The weighted sum, without a graph.

    Raises:
        ValueError: If there are more or fewer weights than depths.

    Examples:
        >>> decoder = Decoder(DecoderConfig(100, 16, 2, 4, 2, 32))
        >>> model = IndependentHeads(decoder, ahead=1)
        >>> _ = backward_by_depth(model, torch.ones(2, 9).long(), [1, 1])
        >>> decoder.head.weight.grad.shape
        torch.Size([100, 16])
    """
    _check_weights(model, weights)
    features = model.features(tokens)
    ends = [f.detach().requires_grad_() for f in features]
    terms = []
    # last depth first: autograd's own order, so that sums round alike
    for k in reversed(range(len(ends))):
        term = weights[k] * depth_loss(model.decoder, ends[k], tokens, k)
        term.backward()
        terms.append(term.detach())
    torch.autograd.backward(features, [end.grad for end in ends])
    return torch.stack(terms[::-1]).sum()


def _new_block(config: DecoderConfig) -> DecoderBlock:
    block = DecoderBlock(config)
    for weight in block.parameters():
        if weight.ndim == 2:
            nn.init.normal_(weight, std=0.02)
    return block


def _check_weights(model: MultiToken, weights: Sequence[float]) -> None:
    if len(weights) != model.ahead + 1:
        raise ValueError(
            f"expected {model.ahead + 1} weights, one a depth, got "
            f"{len(weights)}"
        )
