"""What a longer text asks of rotary pairs, and what a rule gives them.

A pair that turned fully in training has seen every angle. A slower one has
seen an arc, and a longer text takes it beyond, unless it is slowed down.

Reference: Liu et al., 2023, https://arxiv.org/abs/2310.05209
"""

import math
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal, get_args

from warpmap.chart import Axis, Line, LineChart
from warpmap.models.positions.context_extension import (
    attention_factor,
    by_parts,
    interpolated,
    inverse_frequencies,
    ntk_aware,
    yarn,
)

Method = Literal[
    "none", "interpolation", "NTK-aware", "by parts", "YaRN", "new base"
]
METHODS: tuple[str, ...] = get_args(Method)


def unseen(
    angles: list[float], trained_angles: list[float], target: int, trained: int
) -> list[float]:
    """Radians that each pair meets at the target length, but not in training.

    A pair that turned fully in training has seen all there is.

    Args:
        angles: What a rule returned.
        trained_angles: Those of training.
        target: Tokens of a text now.
        trained: Tokens of a text in training.

    Examples:
        >>> unseen([1.0, 0.01], [1.0, 0.01], target=400, trained=100)
        [0.0, 3.0]
    """
    turn = 2 * math.pi
    gaps = [
        min(turn, target * a) - min(turn, trained * t)
        for a, t in zip(angles, trained_angles, strict=True)
    ]
    # a rule that stops where training did may land a rounding beyond
    return [gap if gap > 1e-9 else 0.0 for gap in gaps]


@dataclass(frozen=True)
class ContextExtension:
    """What a rule does to the pairs.

    Attributes:
        pairs: Pairs of a head.
        full_turn_pairs: Pairs that turn fully within the trained length.
        unseen_pairs: Pairs that meet angles never seen in training.
        unseen_degrees: Angles new to the worst of them, in degrees.
        slowed_pairs: Pairs slower than in training.
        neighbour_degrees: Turn of the fastest pair a token, in degrees;
            57.3 in training.
        longest_wavelength: Tokens in which the slowest pair turns once.
        score_scale: Factor of all scores; only YaRN has one.
        safe_base: The smallest new base without an unseen angle.
    """

    pairs: int
    full_turn_pairs: int
    unseen_pairs: int
    unseen_degrees: float
    slowed_pairs: int
    neighbour_degrees: float
    longest_wavelength: float
    score_scale: float
    safe_base: float


def context_extension(
    method: Method = "YaRN",
    trained: int = 4096,
    target: int = 16384,
    factor: float = 4.0,
    head_size: int = 128,
    base: float = 10000.0,
    new_base: float = 500000.0,
    fast: float = 32.0,
    slow: float = 1.0,
) -> ContextExtension:
    """What a longer text asks of the pairs, and what a rule gives.

    Args:
        method: The rule.
        trained: Tokens of a text in training.
        target: Tokens of a text now.
        factor: The rule's factor; should be ``target / trained``.
        head_size: Entries of a head that turn.
        base: The base in training.
        new_base: The base now, for the rule of that name alone.
        fast: Turns in training from which a pair stays as it is.
        slow: Turns in training below which it is slowed fully.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> context_extension("NTK-aware").unseen_pairs
        17
        >>> context_extension("YaRN").unseen_pairs
        0
    """
    if trained < 7:
        raise ValueError(
            f"trained must be at least 7, a turn of pair 0, got {trained}"
        )
    if target < trained:
        raise ValueError(f"target must be at least {trained}, got {target}")
    after = _angles(
        method, trained, factor, head_size, base, new_base, fast, slow
    )
    before = inverse_frequencies(head_size, base)
    new = unseen(after, before, target, trained)
    full = sum(trained * angle >= 2 * math.pi for angle in before)
    # of the pairs without a full turn, the first is the hardest to slow
    ratio = target / trained if full < len(new) else 1.0
    log_safe = math.log(base) + math.log(ratio) * head_size / (2 * full)
    return ContextExtension(
        pairs=len(before),
        full_turn_pairs=full,
        unseen_pairs=sum(gap > 0 for gap in new),
        unseen_degrees=math.degrees(max(new)),
        slowed_pairs=sum(
            a < b * (1 - 1e-9) for a, b in zip(after, before, strict=True)
        ),
        neighbour_degrees=math.degrees(after[0]),
        longest_wavelength=2 * math.pi / after[-1],
        score_scale=attention_factor(factor) ** 2 if method == "YaRN" else 1.0,
        safe_base=math.exp(log_safe) if log_safe < 700 else math.inf,
    )


def slowdown_chart(**arguments: Any) -> LineChart:
    """How much slower each pair turns, and how much slower it would have to.

    Args:
        **arguments: As for ``context_extension``.

    Examples:
        >>> [line.name for line in slowdown_chart().lines]
        ['YaRN', 'needed']
    """
    fields = signature(context_extension).parameters.values()
    given = {field.name: field.default for field in fields} | arguments
    ratio = given.pop("target") / given["trained"]
    before = inverse_frequencies(given["head_size"], given["base"])
    after = _angles(**given)
    slower = [b / a for a, b in zip(after, before, strict=True)]
    turns = [given["trained"] * angle / (2 * math.pi) for angle in before]
    needed = [ratio if r < 1 else 1.0 for r in turns]
    return LineChart(
        "How much slower each pair turns",
        Axis("pair, fastest first"),
        Axis("times slower", log=True),
        [
            Line(given["method"], list(enumerate(slower))),
            Line("needed", list(enumerate(needed))),
        ],
    )


_FIELDS = (
    *("method", "trained", "target", "factor"),
    *("head_size", "base", "new_base", "fast", "slow"),
)
_PUBLISHED: dict[str, tuple[str | float, ...]] = {
    "LLaMA-2-7B-32K": ("interpolation", 4096, 32768, 8.0, 128, 1e4, 1e4, 32, 1),
    "Code Llama": ("new base", 4096, 16384, 1.0, 128, 1e4, 1e6, 32, 1),
    "Llama 3.1": ("by parts", 8192, 131072, 8.0, 128, 5e5, 5e5, 4, 1),
    "DeepSeek-V3": ("YaRN", 4096, 163840, 40.0, 64, 1e4, 1e4, 32, 1),
    "Qwen3 by its card": ("YaRN", 32768, 131072, 4.0, 128, 1e6, 1e6, 32, 1),
}
PRESETS: dict[str, dict[str, Any]] = {
    name: dict(zip(_FIELDS, row, strict=True))
    for name, row in _PUBLISHED.items()
}
"""Extensions as configs, cards and papers state them."""


def _angles(
    method: Method,
    trained: int,
    factor: float,
    head_size: int,
    base: float,
    new_base: float,
    fast: float,
    slow: float,
) -> list[float]:
    if not 1 < new_base <= 1e15:
        raise ValueError(f"new_base must be from 1 to 1e15, got {new_base}")
    match method:
        case "none":
            return inverse_frequencies(head_size, base)
        case "interpolation":
            return interpolated(head_size, base, factor)
        case "NTK-aware":
            return ntk_aware(head_size, base, factor)
        case "by parts":
            return by_parts(head_size, base, factor, trained, fast, slow)
        case "YaRN":
            return yarn(head_size, base, factor, trained, fast, slow)
        case "new base":
            return inverse_frequencies(head_size, new_base)
    raise ValueError(f"method must be one of {METHODS}, got {method!r}")
