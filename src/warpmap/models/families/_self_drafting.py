"""A model that guesses its own next tokens and checks them in one pass."""

import torch
from torch import Tensor

from warpmap.models.families.multi_token_prediction import MultiToken


@torch.no_grad()
def draft(model: MultiToken, text: Tensor) -> Tensor:
    """Guess the tokens that follow a text, one from each further depth.

    The last token of the text is the decoder's own; the guesses start after
    it. Everything is computed anew, where an engine would keep a cache.

    Args:
        model: Independent or sequential.
        text: ``(1, T)``, longer than ``model.ahead``.

    Returns:
        ``(1, ahead)``.

    Examples:
        >>> from warpmap.models.families import multi_token_prediction as mtp
        >>> from warpmap.models.foundations import decoder_only as one
        >>> decoder = one.Decoder(one.DecoderConfig(100, 16, 2, 4, 2, 32))
        >>> model = mtp.SequentialModules(decoder, ahead=2)
        >>> draft(model, torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 2])
    """
    longer = text
    for k in range(1, model.ahead + 1):
        last = model.features(longer)[k][:, -1:]
        guess = model.decoder.head(last).argmax(dim=-1)
        longer = torch.cat([longer, guess], dim=1)
    return longer[:, text.shape[1] :]


@torch.no_grad()
def generate(model: MultiToken, prompt: Tensor, new: int) -> tuple[Tensor, int]:
    """The decoder's greedy text, in fewer of its passes.

    Each pass runs over the text and the guesses. It says what the decoder
    would have written after each of them: guesses are kept up to the first
    that it would not have, and its own word follows.

    Args:
        model: Independent or sequential.
        prompt: ``(1, T)``, at least ``model.ahead`` tokens.
        new: Tokens to add.

    Returns:
        ``(1, T + new)``, and the passes of the decoder.

    Raises:
        ValueError: If ``prompt`` is no such text.

    Examples:
        >>> from warpmap.models.families import multi_token_prediction as mtp
        >>> from warpmap.models.foundations import decoder_only as one
        >>> decoder = one.Decoder(one.DecoderConfig(100, 16, 2, 4, 2, 32))
        >>> model = mtp.SequentialModules(decoder, ahead=1)
        >>> text, passes = generate(model, torch.tensor([[1, 2, 3]]), new=6)
        >>> text.shape, 3 <= passes <= 6
        (torch.Size([1, 9]), True)
    """
    if prompt.shape[0] != 1 or prompt.shape[1] < model.ahead:
        raise ValueError(
            f"expected one prompt of at least {model.ahead} tokens, got "
            f"{tuple(prompt.shape)}"
        )
    text, guesses, passes = prompt, prompt[:, :0], 0
    while text.shape[1] < prompt.shape[1] + new:
        logits = model.decoder(torch.cat([text, guesses], dim=1))
        passes += 1
        chosen = logits[:, text.shape[1] - 1 :].argmax(dim=-1)
        agreed = (chosen[:, :-1] == guesses).cumprod(dim=1).sum()
        text = torch.cat([text, chosen[:, : agreed + 1]], dim=1)
        guesses = draft(model, text)
    return text[:, : prompt.shape[1] + new], passes
