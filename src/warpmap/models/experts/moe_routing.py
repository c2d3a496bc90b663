"""Who runs what in a mixture of experts, and how the load is kept even.

    token choice   a token takes its k best experts; full ones turn it away
    expert choice  an expert takes its best tokens; all are equally busy
    Switch loss    is least where experts are equally busy; has a gradient
    bias           is added to scores to choose by, moved by the load; has none

Scores are lists: one row a token, one number an expert. Of equals the first
wins. Nothing here needs more than Python, so that every number can be watched.

Reference: Fedus et al., 2021, https://arxiv.org/abs/2101.03961
Reference: Zhou et al., 2022, https://arxiv.org/abs/2202.09368
Reference: Wang et al., 2024, https://arxiv.org/abs/2408.15664
Reference: DeepSeek-AI, 2024, https://arxiv.org/abs/2412.19437
"""

import math
from collections.abc import Sequence

Scores = Sequence[Sequence[float]]
"""A row a token, a column an expert; a larger number is a better fit."""

Choices = list[list[int]]
"""Of each token, the experts that it runs."""


def best(scores: Sequence[float], k: int) -> list[int]:
    """Where the k largest numbers are, the largest first.

    Args:
        scores: At least ``k`` numbers.
        k: How many.

    Raises:
        ValueError: If there are fewer numbers than ``k``.

    Examples:
        >>> best([0.1, 0.7, 0.2, 0.7], k=2)
        [1, 3]
    """
    if not 0 <= k <= len(scores):
        raise ValueError(f"k must be 0 to {len(scores)}, got {k}")
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:k]


def expert_capacity(
    tokens: int, experts: int, k: int = 1, factor: float = 1.25
) -> int:
    """Tokens that an expert has room for.

    Args:
        tokens: In the batch.
        experts: Among which their choices are divided.
        k: Choices of a token.
        factor: Room in multiples of an equal share.

    Raises:
        ValueError: If an argument is not positive.

    Examples:
        >>> expert_capacity(tokens=64, experts=8, factor=1.25)
        10
    """
    for name, value in (
        ("tokens", tokens),
        ("experts", experts),
        ("k", k),
        ("factor", factor),
    ):
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    return math.ceil(factor * tokens * k / experts)


def token_choice(
    scores: Scores, k: int, capacity: int | None = None
) -> Choices:
    """Each token takes its k best experts, as long as they have room.

    All first choices are served before any second choice, and tokens in their
    order. Who is turned away gets no substitute: that place is dropped.

    Args:
        scores: Of ``N`` tokens and ``E`` experts.
        k: Experts a token asks for.
        capacity: Tokens that an expert takes; any number if ``None``.

    Returns:
        The experts of each token, at most ``k``, the best first.

    Raises:
        ValueError: If ``k`` is larger than ``E``, or ``capacity`` negative.

    Examples:
        >>> both_want_0 = [[0.9, 0.1], [0.8, 0.2]]
        >>> token_choice(both_want_0, k=1)
        [[0], [0]]
        >>> token_choice(both_want_0, k=1, capacity=1)
        [[0], []]
    """
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity must be at least 0, got {capacity}")
    wishes = [best(row, k) for row in scores]
    room = [math.inf if capacity is None else capacity] * _width(scores)
    chosen: Choices = [[] for _ in scores]
    for rank in range(k):
        for mine, wish in zip(chosen, wishes, strict=True):
            if room[wish[rank]]:
                room[wish[rank]] -= 1
                mine.append(wish[rank])
    return chosen


def expert_choice(scores: Scores, capacity: int) -> Choices:
    """Each expert takes the tokens that fit it best.

    Args:
        scores: Of ``N`` tokens and ``E`` experts.
        capacity: Tokens that every expert takes, at most ``N``.

    Returns:
        The experts of each token: none, some or all, the first first.

    Raises:
        ValueError: If ``capacity`` is larger than ``N``.

    Examples:
        >>> expert_choice([[0.9, 0.1], [0.8, 0.2]], capacity=1)
        [[0], [1]]
        >>> expert_choice([[0.9, 0.4], [0.8, 0.3]], capacity=1)
        [[0, 1], []]
    """
    if not 0 <= capacity <= len(scores):
        raise ValueError(
            f"capacity must be 0 to {len(scores)}, the tokens, got {capacity}"
        )
    chosen: Choices = [[] for _ in scores]
    for expert in range(_width(scores)):
        for token in best([row[expert] for row in scores], capacity):
            chosen[token].append(expert)
    return chosen


def loads(chosen: Choices, experts: int) -> list[int]:
    """How many tokens each expert runs.

    Args:
        chosen: The experts of each token.
        experts: How many there are.

    Examples:
        >>> loads([[0, 2], [2], []], experts=4)
        [1, 0, 2, 0]
    """
    count = [0] * experts
    for mine in chosen:
        for expert in mine:
            count[expert] += 1
    return count


def switch_loss(probs: Scores, chosen: Choices) -> float:
    """The auxiliary loss of Switch: busy experts should be improbable.

    Args:
        probs: Of ``N`` tokens and ``E`` experts; each row adds up to 1.
        chosen: The experts of each token, before any is dropped.

    Returns:
        ``E`` times the sum, over experts, of the share of choices times the
        mean probability. 1 if either is the same for all experts, ``E`` if
        one expert has everything. What is chosen counts as given, so that the
        slope for each probability is ``E / N`` times that expert's share.

    Raises:
        ValueError: If there are no choices.

    Examples:
        >>> switch_loss([[0.75, 0.25], [0.75, 0.25]], [[0], [0]])
        1.5
        >>> switch_loss([[0.75, 0.25], [0.25, 0.75]], [[0], [1]])
        1.0
    """
    E = _width(probs)
    load = loads(chosen, E)
    if not sum(load):
        raise ValueError("chosen must hold at least one choice, got none")
    means = [
        math.fsum(column) / len(probs) for column in zip(*probs, strict=True)
    ]
    return E * math.fsum(
        count / sum(load) * mean
        for count, mean in zip(load, means, strict=True)
    )


def update_bias(
    bias: Sequence[float], load: Sequence[int], rate: float = 0.001
) -> list[float]:
    """Raise the bias of idle experts, lower that of busy ones, all as far.

    Args:
        bias: One number an expert.
        load: Tokens of each in the last batch.
        rate: How far.

    Examples:
        >>> update_bias([0.0, 0.0, 0.0], load=[9, 2, 4], rate=0.5)
        [-0.5, 0.5, 0.5]
    """
    mean = sum(load) / len(load)
    return [
        old + rate * ((count < mean) - (count > mean))
        for old, count in zip(bias, load, strict=True)
    ]


def grouped_gate(
    logits: Sequence[float],
    bias: Sequence[float],
    k: int,
    groups: int,
    kept: int,
    scale: float = 2.5,
) -> tuple[list[int], list[float]]:
    """DeepSeek-V3's gate, for one token.

    Experts are chosen by score and bias, from a few groups; they count by
    their score alone. A group is worth its two best experts.

    Args:
        logits: One number an expert; neighbours form a group.
        bias: One number an expert.
        k: Experts to choose.
        groups: Into how many groups the experts are divided.
        kept: Groups from which they may come.
        scale: What the weights add up to.

    Returns:
        Experts, the best with its bias first, and their weights.

    Raises:
        ValueError: If the groups are unequal, hold a single expert, or the
            kept ones fewer than ``k``.

    Examples:
        >>> logits = [9.0, -9.0, 1.0, 1.0]
        >>> experts, weights = grouped_gate(logits, [0.0] * 4, 2, 2, kept=1)
        >>> experts, weights
        ([2, 3], [1.25, 1.25])
    """
    E = len(logits)
    if len(bias) != E:
        raise ValueError(f"bias must hold {E} numbers, got {len(bias)}")
    if groups < 1 or E % groups or E // groups < 2:
        raise ValueError(
            f"groups must divide {E} experts into 2 or more each, got {groups}"
        )
    if not 1 <= kept <= groups:
        raise ValueError(f"kept must be 1 to {groups}, the groups, got {kept}")
    size = E // groups
    if not 1 <= k <= kept * size:
        raise ValueError(
            f"k must be 1 to {kept * size}, the experts kept, got {k}"
        )
    scores = [1 / (1 + math.exp(-z)) for z in logits]
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    worth = [
        sum(sorted(biased[g * size : (g + 1) * size])[-2:])
        for g in range(groups)
    ]
    open_groups = set(best(worth, kept))
    # not 0: with a negative bias, a closed expert would look better
    open_to = [
        b if i // size in open_groups else -math.inf
        for i, b in enumerate(biased)
    ]
    experts = best(open_to, k)
    total = math.fsum(scores[i] for i in experts)
    return experts, [scale * scores[i] / total for i in experts]


def _width(scores: Scores) -> int:
    width = len(scores[0]) if scores else 0
    if any(len(row) != width for row in scores):
        raise ValueError(
            "scores must have one number an expert in every row, got rows of "
            f"{sorted({len(row) for row in scores})}"
        )
    return width
