"""Rules that slow rotary pairs down, so that longer texts hold no new angle.

Each rule returns ``D / 2`` angles a token, in radians, fastest pair first:
what ``base ** (-2 i / D)`` becomes when the context grows by a factor.

    interpolation  every pair is slowed by the factor
    NTK-aware      a larger base: the first pair not at all, the last fully
    by parts       pairs that turned often in training stay, slow ones are
                   slowed fully, and in between a ramp over their turns
    YaRN           the ramp runs over the pairs' numbers, and scores grow

Reference: Chen et al., 2023, https://arxiv.org/abs/2306.15595
Reference: Peng et al., 2023, https://arxiv.org/abs/2309.00071
"""

import math


def inverse_frequencies(head_size: int, base: float) -> list[float]:
    """Angles as trained; a larger base is an extension of its own.

    Args:
        head_size: Entries that turn, ``D``; even, at least 4.
        base: Above 1; 10000 in the first models.

    Raises:
        ValueError: If a number is out of range, here and below.

    Examples:
        >>> [round(angle, 6) for angle in inverse_frequencies(6, 1000.0)]
        [1.0, 0.1, 0.01]
    """
    if head_size < 4 or head_size % 2:
        raise ValueError(f"head_size must be even, at least 4, got {head_size}")
    if not 1 < base <= 1e15:
        raise ValueError(f"base must be above 1, at most 1e15, got {base}")
    return [base ** (-i / head_size) for i in range(0, head_size, 2)]


def interpolated(head_size: int, base: float, factor: float) -> list[float]:
    """Position interpolation: as if positions were divided by the factor.

    Args:
        head_size: Entries that turn.
        base: As trained.
        factor: How many times as long the text may be; at least 1.

    Examples:
        >>> [round(angle, 6) for angle in interpolated(6, 1000.0, factor=4)]
        [0.25, 0.025, 0.0025]
    """
    _check_factor(factor)
    return [angle / factor for angle in inverse_frequencies(head_size, base)]


def ntk_aware(head_size: int, base: float, factor: float) -> list[float]:
    """The base for which the last pair is slowed by the factor.

    Args:
        head_size: Entries that turn.
        base: As trained.
        factor: How many times as long the text may be; at least 1.

    Examples:
        >>> [round(angle, 6) for angle in ntk_aware(6, 1000.0, factor=4)]
        [1.0, 0.05, 0.0025]
    """
    _check_factor(factor)
    larger = base * factor ** (head_size / (head_size - 2))
    return inverse_frequencies(head_size, larger)


def by_parts(
    head_size: int,
    base: float,
    factor: float,
    trained: int,
    fast: float = 32.0,
    slow: float = 1.0,
) -> list[float]:
    """NTK-by-parts as in the paper of YaRN; Llama 3.1 has ``fast=4``.

    Args:
        head_size: Entries that turn.
        base: As trained.
        factor: How many times as long the text may be; at least 1.
        trained: Tokens of a text in training.
        fast: Pairs with more turns within ``trained`` stay as they are.
        slow: Pairs with fewer are slowed by the factor.

    Examples:
        >>> angles = by_parts(8, 10000.0, factor=4, trained=1000)
        >>> [round(angle, 6) for angle in angles]
        [1.0, 0.061086, 0.002643, 0.00025]
    """
    _check_factor(factor)
    _check_turns(trained, fast, slow)
    angles = inverse_frequencies(head_size, base)
    turns = [trained * angle / (2 * math.pi) for angle in angles]
    kept = [_clamp((r - slow) / (fast - slow)) for r in turns]
    return _blend(angles, kept, factor)


def yarn(
    head_size: int,
    base: float,
    factor: float,
    trained: int,
    fast: float = 32.0,
    slow: float = 1.0,
    truncate: bool = True,
) -> list[float]:
    """YaRN as its code has it: the ramp is linear in a pair's number.

    Args:
        head_size: Entries that turn.
        base: As trained.
        factor: How many times as long the text may be; at least 1.
        trained: Tokens of a text in training.
        fast: The ramp begins at the pair with so many turns.
        slow: It ends at the pair with so many.
        truncate: Whether both ends are rounded outwards to whole pairs.

    Examples:
        >>> angles = yarn(8, 10000.0, factor=4, trained=1000)
        >>> [round(angle, 6) for angle in angles]
        [1.0, 0.075, 0.005, 0.00025]
    """
    _check_factor(factor)
    _check_turns(trained, fast, slow)
    angles = inverse_frequencies(head_size, base)

    def pair_with(turns: float) -> float:
        log_wavelength = math.log(trained / (2 * math.pi * turns))
        return head_size * log_wavelength / (2 * math.log(base))

    low, high = pair_with(fast), pair_with(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    # the published code clips at D - 1, though pairs end at D / 2 - 1
    low, high = max(low, 0), min(high, head_size - 1)
    width = max(high - low, 0.001)
    kept = [1 - _clamp((i - low) / width) for i in range(len(angles))]
    return _blend(angles, kept, factor)


def attention_factor(factor: float) -> float:
    """YaRN's factor of cosines and sines; scores grow by its square.

    Args:
        factor: How many times as long the text may be; at least 1.

    Examples:
        >>> attention_factor(1), round(attention_factor(4), 4)
        (1.0, 1.1386)
    """
    _check_factor(factor)
    return 0.1 * math.log(factor) + 1


def _clamp(share: float) -> float:
    return min(1.0, max(0.0, share))


def _blend(
    angles: list[float], kept: list[float], factor: float
) -> list[float]:
    return [
        share * angle + (1 - share) * angle / factor
        for angle, share in zip(angles, kept, strict=True)
    ]


def _check_factor(factor: float) -> None:
    if not 1 <= factor <= 1e6:
        raise ValueError(f"factor must be from 1 to 1e6, got {factor}")


def _check_turns(trained: int, fast: float, slow: float) -> None:
    if trained < 7:
        raise ValueError(
            f"trained must be at least 7, a turn of pair 0, got {trained}"
        )
    most = trained / (2 * math.pi)
    if not 0 < slow <= most:
        raise ValueError(
            f"slow must be more than 0 and at most {most:.4g}, got {slow}"
        )
    if not fast > slow:
        raise ValueError(f"fast must be more than slow {slow}, got {fast}")
