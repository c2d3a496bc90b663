"""From logits to a token: shift them, scale them, cut some off, draw one.

    shift   bias; penalties for tokens that the text already holds
    scale   temperature
    cut     top-k, top-p, min-p: what must not be drawn becomes -inf
    draw    inverse CDF, or Gumbel-max

Each step takes a list of logits and returns a new one. Some pairs of steps
can be swapped and some cannot, and engines order them differently.

Reference: Keskar et al., 2019, https://arxiv.org/abs/1909.05858
Reference: Holtzman et al., 2020, https://arxiv.org/abs/1904.09751
Reference: Nguyen et al., 2024, https://arxiv.org/abs/2407.01082
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

Logits = Sequence[float]
"""One number a token; -inf for a token that cannot be drawn."""

ORDERS: dict[str, tuple[str, ...]] = {
    "vLLM": (
        "bias", "repetition_penalty", "frequency_penalty",
        "presence_penalty", "temperature", "min_p", "top_k", "top_p",
    ),
    "Transformers": (
        "bias", "repetition_penalty", "temperature",
        "top_k", "top_p", "min_p",
    ),
    "llama.cpp": (
        "bias", "repetition_penalty", "frequency_penalty",
        "presence_penalty", "top_k", "top_p", "min_p", "temperature",
    ),
}  # fmt: skip
"""The steps that each engine takes, first to last."""


def probabilities(logits: Logits) -> list[float]:
    """Softmax: what a draw gives each token.

    Raises:
        ValueError: If there is no token to draw, or a logit is nan or inf.

    Examples:
        >>> probabilities([0.0, math.log(3), -math.inf])
        [0.25, 0.75, 0.0]
    """
    best = max(logits, default=-math.inf)
    if not math.isfinite(best) or any(x != x for x in logits):
        raise ValueError(
            f"logits must be below inf, and one above -inf, got {logits!r:.60}"
        )
    weights = [math.exp(x - best) for x in logits]
    total = math.fsum(weights)
    return [w / total for w in weights]


def add_bias(logits: Logits, bias: Mapping[int, float]) -> list[float]:
    """Add a number of the caller's own to some logits; -inf bans a token.

    Raises:
        ValueError: If there is no such token.

    Examples:
        >>> add_bias([1.0, 2.0], {0: 5.0, 1: -math.inf})
        [6.0, -inf]
    """
    if wrong := [i for i in bias if not 0 <= i < len(logits)]:
        raise ValueError(
            f"bias must name tokens from 0 to {len(logits) - 1}, got {wrong}"
        )
    return [x + bias.get(i, 0.0) for i, x in enumerate(logits)]


def penalize_repetition(
    logits: Logits, seen: Collection[int], penalty: float
) -> list[float]:
    """Divide positive logits of seen tokens, and multiply negative ones.

    Args:
        logits: One a token.
        seen: Tokens of the text so far; how often does not matter.
        penalty: 1 does nothing, more makes repetition less likely.

    Examples:
        >>> penalize_repetition([3.0, 3.0, -3.0], {0, 2}, 1.5)
        [2.0, 3.0, -4.5]
    """
    if not 0 < penalty < math.inf:
        raise ValueError(f"repetition_penalty must be above 0, got {penalty}")
    seen = set(seen)
    return [
        x if i not in seen else x / penalty if x > 0 else x * penalty
        for i, x in enumerate(logits)
    ]


def penalize_frequency(
    logits: Logits, tokens: Collection[int], penalty: float
) -> list[float]:
    """Subtract ``penalty`` for each time that ``tokens`` hold the token.

    Examples:
        >>> penalize_frequency([3.0, 3.0, 3.0], [1, 1, 2], 0.5)
        [3.0, 2.0, 2.5]
    """
    if not math.isfinite(penalty):
        raise ValueError(f"frequency_penalty must be finite, got {penalty}")
    counts = Counter(tokens)
    return [x - penalty * counts[i] for i, x in enumerate(logits)]


def penalize_presence(
    logits: Logits, tokens: Collection[int], penalty: float
) -> list[float]:
    """Subtract ``penalty`` once, if ``tokens`` hold the token at all.

    Examples:
        >>> penalize_presence([3.0, 3.0, 3.0], [1, 1, 2], 0.5)
        [3.0, 2.5, 2.5]
    """
    if not math.isfinite(penalty):
        raise ValueError(f"presence_penalty must be finite, got {penalty}")
    return penalize_frequency(logits, set(tokens), penalty)


def apply_temperature(logits: Logits, temperature: float) -> list[float]:
    """Divide all logits; 0 keeps the largest only, the first of equals.

    Examples:
        >>> apply_temperature([1.0, 3.0, 3.0], 0.5)
        [2.0, 6.0, 6.0]
        >>> apply_temperature([1.0, 3.0, 3.0], 0)
        [-inf, 3.0, -inf]
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if temperature == 0:
        best = max(range(len(logits)), key=logits.__getitem__)
        return [x if i == best else -math.inf for i, x in enumerate(logits)]
    return [x / temperature for x in logits]


def keep_top_k(logits: Logits, k: int) -> list[float]:
    """Keep the ``k`` likeliest tokens, and those as likely as the last.

    Args:
        logits: One a token.
        k: Tokens to keep; 0 keeps all.

    Examples:
        >>> keep_top_k([1.0, 4.0, 2.0], 2)
        [-inf, 4.0, 2.0]
    """
    if k < 0:
        raise ValueError(f"top_k must be 0 or more, got {k}")
    if not 0 < k < len(logits):
        return list(logits)
    return _keep(logits, sorted(logits)[-k])


def keep_top_p(logits: Logits, p: float) -> list[float]:
    """Keep a token if those above it have less than ``p`` together.

    Examples:
        >>> logits = [math.log(share) for share in (0.2, 0.5, 0.3)]
        >>> [x > -math.inf for x in keep_top_p(logits, 0.6)]
        [False, True, True]
    """
    if not 0 < p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {p}")
    if p == 1:  # whatever the rounding of the sum
        return list(logits)
    above, last = 0.0, math.inf
    for share, x in sorted(
        zip(probabilities(logits), logits, strict=True), reverse=True
    ):
        if above >= p and x < last:
            break
        above, last = above + share, x
    return _keep(logits, last)


def keep_min_p(logits: Logits, share: float) -> list[float]:
    """Keep what has at least a share of the likeliest token's probability.

    Examples:
        >>> logits = [math.log(share) for share in (0.2, 0.5, 0.3)]
        >>> [x > -math.inf for x in keep_min_p(logits, 0.5)]
        [False, True, True]
    """
    if not 0 <= share <= 1:
        raise ValueError(f"min_p must be from 0 to 1, got {share}")
    if share == 0:
        return list(logits)
    # p_i / p_max = exp(x_i - x_max): no sum over the vocabulary is needed
    return _keep(logits, max(logits) + math.log(share))


def _keep(logits: Logits, lowest: float) -> list[float]:
    return [x if x >= lowest else -math.inf for x in logits]


@dataclass(frozen=True)
class Settings:
    """What a request may ask for; as it stands, nothing is changed.

    Attributes:
        bias: What is added to the logits of some tokens.
        repetition_penalty: See ``penalize_repetition``.
        frequency_penalty: See ``penalize_frequency``.
        presence_penalty: See ``penalize_presence``.
        temperature: What logits are divided by; 0 takes the largest.
        top_k: Tokens to keep; 0 for all.
        top_p: Share of the probability to keep.
        min_p: Share of the likeliest token's probability that a token needs.
    """

    bias: Mapping[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def process(
    logits: Logits,
    settings: Settings,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    order: Sequence[str] = ORDERS["vLLM"],
    record: Callable[[str, list[float]], object] | None = None,
) -> list[float]:
    """Take the steps of a request, one after the other.

    Args:
        logits: One a token, as the model gave them.
        settings: What the request asks for.
        prompt: Tokens of the prompt. They count as repeated, but neither for
            frequency nor for presence.
        output: Tokens drawn so far.
        order: Names of the steps, first to last; others are left out.
        record: Hears each step's name, and the logits after it.

    Returns:
        Logits to draw from.

    Raises:
        ValueError: If a setting is out of range, or ``order`` holds an
            unknown or a repeated step.

    Examples:
        >>> logits = [math.log(p) for p in (0.6, 0.3, 0.1)]
        >>> flat = Settings(temperature=2, top_p=0.85)
        >>> [len([x for x in process(logits, flat, order=o) if x > -math.inf])
        ...  for o in ORDERS.values()]
        [3, 3, 2]
    """
    s = settings
    steps: dict[str, Callable[[Logits], list[float]]] = {
        "bias": lambda x: add_bias(x, s.bias),
        "repetition_penalty": lambda x: penalize_repetition(
            x, {*prompt, *output}, s.repetition_penalty
        ),
        "frequency_penalty": lambda x: penalize_frequency(
            x, output, s.frequency_penalty
        ),
        "presence_penalty": lambda x: penalize_presence(
            x, output, s.presence_penalty
        ),
        "temperature": lambda x: apply_temperature(x, s.temperature),
        "top_k": lambda x: keep_top_k(x, s.top_k),
        "top_p": lambda x: keep_top_p(x, s.top_p),
        "min_p": lambda x: keep_min_p(x, s.min_p),
    }
    if len({*order} & {*steps}) != len(order):
        raise ValueError(
            f"order must name steps once, out of {', '.join(steps)}; "
            f"got {' '.join(order)}"
        )
    probabilities(logits)  # is there a token?
    logits = list(logits)
    for name in order:
        logits = steps[name](logits)
        if record is not None:
            record(name, logits)
    return logits


def inverse_cdf(logits: Logits, u: float) -> int:
    """The token on whose stretch of the unit interval ``u`` falls.

    Args:
        logits: One a token.
        u: A random number from 0 to below 1.

    Examples:
        >>> [inverse_cdf([0.0, -math.inf, 0.0], u) for u in (0.2, 0.5, 0.9)]
        [0, 2, 2]
    """
    if not 0 <= u < 1:
        raise ValueError(f"u must be from 0 to below 1, got {u}")
    running, token = 0.0, -1
    for i, p in enumerate(probabilities(logits)):
        if p > 0:
            running, token = running + p, i
            if running > u:
                break
    return token  # the last that can be drawn, should rounding leave a gap


def gumbel_max(logits: Logits, rng: Random) -> int:
    """The largest of the logits, each with random noise of its own.

    Args:
        logits: One a token.
        rng: Gives one number for each token, drawable or not.

    Examples:
        >>> rng = Random(0)
        >>> draws = [gumbel_max([0.0, math.log(3)], rng) for _ in range(1000)]
        >>> draws.count(1)  # three of four are expected
        747
    """
    probabilities(logits)  # is there a token?
    # minus the logarithm of an exponential number, which must not be 0
    noise = [
        -math.log(rng.expovariate(1.0) or sys.float_info.min) for _ in logits
    ]
    scores = [x + g for x, g in zip(logits, noise, strict=True)]
    return scores.index(max(scores))
