"""Attention for one query, in plain Python: every number can be watched."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

from warpmap.trace import Cell, Frame, Grid, Mark, Trace

Vector = Sequence[float]


def attend(
    query: Vector,
    keys: Sequence[Vector],
    values: Sequence[Vector],
    bias: Vector | None = None,
    scaled: bool = True,
    record: Callable[[str, int, list[float]], object] | None = None,
) -> list[float]:
    """What one query takes home.

    Args:
        query: ``D`` numbers.
        keys: ``S`` vectors like the query.
        values: ``S`` vectors of any one size.
        bias: ``S`` numbers, added to the scores; -inf hides a key.
        scaled: Whether scores are divided by the square root of ``D``.
        record: Hears of each step: its name, the key it is about, and the
            numbers so far.

    Returns:
        A mean of the values.

    Raises:
        ValueError: If the query may see no key.

    Examples:
        >>> attend([1.0], keys=[[0.0], [0.0]], values=[[4.0], [8.0]])
        [6.0]
    """
    bias = [0.0] * len(keys) if bias is None else bias
    if max(bias, default=-math.inf) == -math.inf:
        raise ValueError("bias must leave the query a key, hides all")
    record = record or (lambda step, key, numbers: None)

    scores: list[float] = []
    for i, key in enumerate(keys):
        fit = sum(a * b for a, b in zip(query, key, strict=True))
        fit = fit / math.sqrt(len(query)) if scaled else fit
        scores.append(fit + bias[i])
        record("score", i, scores)

    # softmax: the best key counts 1, and no other more
    best = max(scores)
    counts = [math.exp(score - best) for score in scores]
    record("exp", scores.index(best), counts)
    weights = [count / sum(counts) for count in counts]
    record("weight", scores.index(best), weights)

    mixed = [0.0] * len(values[0])
    for i, value in enumerate(values):
        mixed = [m + weights[i] * x for m, x in zip(mixed, value, strict=True)]
        record("mix", i, mixed)
    return mixed


NOUN, VERB, NEITHER = (2.0, 0.0), (0.0, 2.0), (0.0, 0.0)
SENTENCE = {
    # word: its query, what it looks for; its key, what it is; its value
    "dogs": (VERB, NOUN, (8.0, 0.0)),
    "chase": (NOUN, VERB, (2.0, 2.0)),
    "cats": (VERB, NOUN, (0.0, 8.0)),
    "fast": (VERB, NEITHER, (4.0, 4.0)),
}
"""A sentence with vectors made by hand; training would find its own."""


def attention_trace(
    asking: Literal["dogs", "chase", "cats", "fast"] = "chase",
    causal: bool = True,
    scaled: bool = True,
) -> Trace:
    """One word of "dogs chase cats fast" attends, step by step.

    Args:
        asking: The word whose query it is.
        causal: Whether it sees earlier words and itself only.
        scaled: Whether scores are divided by the square root of 2.

    Returns:
        A frame for the query, each key, the softmax, and each value.

    Raises:
        ValueError: If ``asking`` is no word of the sentence.

    Examples:
        >>> print(attention_trace("chase")[-1].caption)
        chase takes home 7.7 0.1: 94% dogs, 6% chase.
    """
    words = list(SENTENCE)
    if asking not in words:
        raise ValueError(f"asking must be one of {words}, got {asking!r}")
    query = SENTENCE[asking][0]
    keys = [key for _, key, _ in SENTENCE.values()]
    values = [value for _, _, value in SENTENCE.values()]
    last = words.index(asking) if causal else len(words) - 1
    bias = [0.0 if i <= last else -math.inf for i in range(len(words))]

    table = {
        "key": [_numbers(key) for key in keys],
        "score": [""] * len(words),
        "exp": [""] * len(words),
        "weight": [""] * len(words),
        "value": [_numbers(value) for value in values],
        "output": [""] * len(words),
    }
    trace: Trace = []

    def add(caption: str, marks: dict[tuple[str, int], Mark]) -> None:
        rows = [
            (row, [Cell(text, marks.get((row, i), ""))
                   for i, text in enumerate(texts)])
            for row, texts in table.items()
        ]  # fmt: skip
        trace.append(Frame(caption, Grid(rows, words)))

    def record(step: str, at: int, numbers: list[float]) -> None:
        if step == "score" and at <= last:
            table["score"][at] = f"{numbers[at]:.1f}"
            add(
                f"Does {words[at]} fit? {_numbers(query)} times "
                f"{_numbers(keys[at])}{' over √2' if scaled else ''} is "
                f"{numbers[at]:.1f}.",
                {("key", at): "on", ("score", at): "new"},
            )
        elif step == "score":
            table["score"][at] = "-inf"
            add(
                f"{words[at]} comes later: the mask hides it.",
                {("key", at): "gone", ("score", at): "gone"},
            )
        elif step == "mix":
            table["output"][words.index(asking)] = _numbers(numbers, 1)
            if at <= last:
                add(
                    f"{table['weight'][at]} of the value of {words[at]} is "
                    "added.",
                    {
                        ("weight", at): "on",
                        ("value", at): "on",
                        ("output", words.index(asking)): "new",
                    },
                )
        else:
            table[step] = [f"{x:.2f}" for x in numbers]
            said = {
                "exp": "exp(score - best score): the best counts 1.",
                "weight": "Each over their sum: weights, 1 in all.",
            }
            add(said[step], {(step, i): "new" for i in range(len(words))})

    wanted = "noun" if query == NOUN else "verb"
    add(f"{asking} asks: its query {_numbers(query)} fits a {wanted}.", {})
    mixed = attend(query, keys, values, bias, scaled, record)
    shares = [
        f"{float(share):.0%} {word}"
        for word, share in zip(words, table["weight"], strict=True)
        if float(share)
    ]
    add(
        f"{asking} takes home {_numbers(mixed, 1)}: {', '.join(shares)}.",
        {("output", words.index(asking)): "on"},
    )
    return trace


def _numbers(vector: Vector, digits: int = 0) -> str:
    return " ".join(f"{x:.{digits}f}" for x in vector)
