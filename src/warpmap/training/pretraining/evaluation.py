"""How good is a language model? Numbers that survive a second look.

    perplexity      windows that overlap, so that every token has context, and
                    is counted once
    bits per byte   the same loss for models whose tokens differ
    pass@k          without the bias of 1 - (1 - c / n)^k
    choice          the likeliest answer, for its length
    intervals       what another draw of the questions might have said

Reference: Chen et al., 2021, https://arxiv.org/abs/2107.03374 (pass@k)
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

LogProbs = Callable[[Sequence[int]], Sequence[float]]
"""A model: the natural logarithm of the probability of each token of a window
but the first, given those before it."""


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Loss of a text in bits for each of its bytes, whatever the tokenizer.

    Args:
        nats: Sum of the loss over all tokens, natural logarithm.
        text_bytes: Length of the text in UTF-8.

    Raises:
        ValueError: If ``text_bytes`` is below 1.

    Examples:
        >>> bits_per_byte(10 * math.log(256), 10)  # knows nothing
        8.0
    """
    if text_bytes < 1:
        raise ValueError(f"text_bytes must be at least 1, got {text_bytes}")
    return nats / (text_bytes * math.log(2))


def windows(
    length: int, context: int, stride: int
) -> Iterator[tuple[int, int, int]]:
    """Windows over a text: ``(begin, first, end)``, score ``first`` to ``end``.

    All tokens but number 0 are scored, each once, and with at least
    ``context - stride`` tokens before it as soon as there are as many.

    Args:
        length: Tokens of the text.
        context: Most tokens in a window.
        stride: Tokens that a window scores, from the second window on.

    Raises:
        ValueError: If ``context`` is below 2, or ``stride`` not 1 to
            ``context - 1``.

    Examples:
        >>> list(windows(9, context=4, stride=2))
        [(0, 1, 4), (2, 4, 6), (4, 6, 8), (5, 8, 9)]
    """
    if context < 2:
        raise ValueError(f"context must be at least 2, got {context}")
    if not 1 <= stride < context:
        raise ValueError(f"stride must be 1 to {context - 1}, got {stride}")
    first, end = 1, min(context, length)
    while first < end:
        yield max(0, end - context), first, end
        first, end = end, min(end + stride, length)


@dataclass(frozen=True)
class Loss:
    """How surprised a model was by a text.

    Attributes:
        nats: Sum over the tokens scored.
        tokens: How many.
    """

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """As unsure as among so many equally likely tokens."""
        return math.exp(self.nats / self.tokens)


def strided_loss(
    log_probs: LogProbs, tokens: Sequence[int], context: int, stride: int
) -> Loss:
    """Loss of a text that is longer than the model's context.

    Args:
        log_probs: The model.
        tokens: The text, 2 tokens or more.
        context: Most tokens that the model takes.
        stride: Tokens that a window scores: 1 gives all the context there is
            and costs a window a token, ``context - 1`` is the cheapest.

    Raises:
        ValueError: If there are fewer than 2 tokens, or the windows are not
            possible.

    Examples:
        >>> def coin(window):
        ...     return [math.log(0.5)] * (len(window) - 1)
        >>> round(strided_loss(coin, [0, 1] * 50, 8, 4).perplexity, 12)
        2.0
    """
    if len(tokens) < 2:
        raise ValueError(f"tokens must be at least 2, got {len(tokens)}")
    scored: list[float] = []
    for begin, first, end in windows(len(tokens), context, stride):
        found = log_probs(tokens[begin:end])
        scored += found[first - begin - 1 :]
    return Loss(-math.fsum(scored), len(scored))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that one of ``k`` attempts is correct, without bias.

    The share of all choices of ``k`` out of the samples that hold a correct
    one. Its mean over draws of the samples is exactly ``1 - (1 - p)^k``.

    Args:
        samples: Programs drawn from the model for one problem.
        correct: How many of them pass the tests.
        k: Attempts, at most ``samples``.

    Raises:
        ValueError: If the numbers do not fit.

    Examples:
        >>> pass_at_k(samples=4, correct=1, k=2)  # 3 of 6 pairs have it
        0.5
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if not 0 <= correct <= samples:
        raise ValueError(f"correct must be 0 to {samples}, got {correct}")
    if not 1 <= k <= samples:
        raise ValueError(f"k must be 1 to {samples}, got {k}")
    # exact integers: a product of floats would lose the small cases
    every = math.comb(samples, k)
    return (every - math.comb(samples - correct, k)) / every


def choose(
    log_probs: Sequence[float], lengths: Sequence[int] | None = None
) -> int:
    """Which answer a model prefers.

    Args:
        log_probs: Of each answer, summed over its tokens, given the question.
        lengths: Of each answer, in bytes; the sum is divided by it. Without,
            long answers lose.

    Raises:
        ValueError: If there is no answer, or a length that does not fit.

    Examples:
        >>> choose([-5.0, -6.0])
        0
        >>> choose([-5.0, -6.0], lengths=[4, 12])
        1
    """
    if not log_probs:
        raise ValueError("log_probs must hold an answer or more, got none")
    lengths = [1] * len(log_probs) if lengths is None else lengths
    if len(lengths) != len(log_probs) or min(lengths) < 1:
        raise ValueError(
            f"lengths must be {len(log_probs)} numbers, 1 or more, "
            f"got {list(lengths)}"
        )
    scores = [p / n for p, n in zip(log_probs, lengths, strict=True)]
    return scores.index(max(scores))


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean.

    Examples:
        >>> mean([1, 2, 6])
        3.0
    """
    return math.fsum(values) / len(values)


def bootstrap(
    values: Sequence[float],
    statistic: Callable[[Sequence[float]], float] = mean,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of what a statistic might be on other questions of the kind.

    The questions are drawn anew from those at hand, with replacement, as many
    as there are; the interval leaves out as many draws below as above.

    Args:
        values: One number a question: a score, or the difference of two
            models on it.
        statistic: What to look at.
        level: Share of draws inside.
        draws: How often to draw.
        seed: Of the draws.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> bootstrap([1] * 70 + [0] * 30)
        (0.61, 0.78)
    """
    if not values:
        raise ValueError("values must be one or more, got none")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    rng = random.Random(seed)
    found = sorted(
        statistic(rng.choices(values, k=len(values))) for _ in range(draws)
    )
    out = min(round((1 - level) / 2 * draws), (draws - 1) // 2)
    return found[out], found[-1 - out]
