"""Generation in two stages: one pass over the prompt, then a token a pass.

    prefill  all P tokens of the prompt at once; fills the cache
    decode   one token a pass, N - 1 times; reads the whole cache each time

Both run the same code on the same weights. Prefill uses each weight P times
a read, decoding once: the first waits for arithmetic, the second for memory.

Reference: Pope et al., 2022, https://arxiv.org/abs/2211.05102
Reference: Patel et al., 2023, https://arxiv.org/abs/2311.18677
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from warpmap.models.foundations.decoder_only import Cache, Decoder


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row.

    Args:
        logits: ``(B, V)``.

    Returns:
        ``(B,)``, the first of equals.

    Examples:
        >>> greedy(torch.tensor([[0.1, 0.7, 0.2]])).tolist()
        [1]
    """
    return logits.argmax(dim=-1)


@torch.no_grad()
def stream(
    model: Decoder,
    tokens: Tensor,
    steps: int,
    choose: Callable[[Tensor], Tensor],
    cache: Cache,
) -> Iterator[Tensor]:
    """Write tokens after a prompt, and hand out each when it is known.

    Args:
        model: The model.
        tokens: ``(B, P)``, a prompt a row.
        steps: Tokens ``N`` to write after each.
        choose: Makes tokens ``(B,)`` of logits ``(B, V)``.
        cache: Holds nothing, or what came before the prompt; holds
            ``P + N - 1`` tokens more at the end, as the last is never read.

    Yields:
        Tokens, ``(B,)``: the first after prefill, then one a pass.

    Raises:
        ValueError: If the prompt is empty or ``steps`` is below 1.

    Examples:
        >>> from warpmap.inference.decoding.kv_cache import GrowingCache
        >>> from warpmap.models.foundations.decoder_only import DecoderConfig
        >>> model = Decoder(DecoderConfig(100, 16, 2, 4, 2, 32))
        >>> prompt, cache = torch.tensor([[1, 2, 3]]), GrowingCache(layers=2)
        >>> for _ in stream(model, prompt, 3, greedy, cache):
        ...     print(cache.length)
        3
        4
        5
    """
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ValueError(
            f"tokens must be (B, P) with P from 1, got {tuple(tokens.shape)}"
        )
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    for _ in range(steps):
        # logits of the last token alone: the others predict what is known
        last = model.features(tokens, cache=cache)[:, -1]
        chosen = choose(model.head(last))
        yield chosen
        tokens = chosen[:, None]


def generate(
    model: Decoder,
    tokens: Tensor,
    steps: int,
    choose: Callable[[Tensor], Tensor],
    cache: Cache,
) -> Tensor:
    """Write tokens after a prompt.

    Args:
        model: As in ``stream``, like all that follow.
        tokens: ``(B, P)``.
        steps: Tokens to write, ``N``.
        choose: Makes tokens ``(B,)`` of logits ``(B, V)``.
        cache: Takes keys and values.

    Returns:
        ``(B, N)``, what was written.

    Raises:
        ValueError: If the prompt is empty or ``steps`` is below 1.

    Examples:
        >>> from warpmap.inference.decoding.kv_cache import GrowingCache
        >>> from warpmap.models.foundations.decoder_only import DecoderConfig
        >>> model = Decoder(DecoderConfig(100, 16, 2, 4, 2, 32))
        >>> prompt, cache = torch.tensor([[1, 2, 3]]), GrowingCache(layers=2)
        >>> generate(model, prompt, 5, greedy, cache).shape
        torch.Size([1, 5])
    """
    written = stream(model, tokens, steps, choose, cache)
    return torch.stack(list(written), dim=1)
