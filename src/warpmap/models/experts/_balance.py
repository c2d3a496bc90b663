"""A mixture small enough to watch: eight experts, 64 tokens, pure Python.

A token is a point ``x`` in the plane. The mixture has to return it moved by
(1, 1). An expert is nothing but a point ``v``, and each token runs one; the
output is ``s v``, with the sigmoid ``s`` of the router's logit. So experts
should divide the plane among them. Every gradient is exact.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Literal

from warpmap.models.experts.moe_routing import (
    expert_capacity,
    loads,
    token_choice,
    update_bias,
)
from warpmap.trace import Cell, Frame, Grid, Mark, Trace

Balancing = Literal["nothing", "Switch loss", "bias"]
EXPERTS, TOKENS, STEPS = 8, 64, 300
LEARNING_RATE = 0.5
EVERY = 15  # steps between two frames
HIGH = 4  # tokens that a cell of the picture stands for


def train(
    balancing: Balancing,
    strength: float,
    capacity_factor: float = math.inf,
    seed: int = 3,
    record: Callable[[list[int], list[float], float], object] | None = None,
    steps: int = STEPS,
) -> list[list[int]]:
    """Train router and experts together by gradient descent.

    Args:
        balancing: How the load is kept even.
        strength: Weight of the loss, or how far a bias moves in a step.
        capacity_factor: Room of an expert in equal shares; beyond it tokens
            are dropped, and nothing is learnt from them.
        seed: Of tokens and weights.
        record: Receives, before each update and once at the end, how many
            tokens asked for each expert, the biases and the mean error.
        steps: Updates.

    Returns:
        How many tokens asked for each expert, before each step and at the
        end.

    Examples:
        >>> train("nothing", strength=0)[-1]
        [27, 0, 0, 10, 4, 0, 0, 23]
        >>> train("bias", strength=0.003)[-1]
        [9, 8, 9, 7, 7, 8, 8, 8]
    """
    rng = random.Random(seed)
    E = range(EXPERTS)
    router = [[rng.gauss(0, 0.3) for _ in range(3)] for _ in E]
    values = [[rng.gauss(0, 0.3) for _ in range(2)] for _ in E]
    tokens = [(rng.gauss(0, 1), rng.gauss(0, 1), 1.0) for _ in range(TOKENS)]
    bias = [0.0] * EXPERTS
    capacity = None
    if capacity_factor < math.inf:
        capacity = expert_capacity(TOKENS, EXPERTS, factor=capacity_factor)

    history = []
    for step in range(steps + 1):
        scores = [
            [1 / (1 + math.exp(-_dot(row, x))) for row in router]
            for x in tokens
        ]
        biased = [
            [s + b for s, b in zip(row, bias, strict=True)] for row in scores
        ]
        load = loads(token_choice(biased, k=1), EXPERTS)
        served = token_choice(biased, k=1, capacity=capacity)
        history.append(load)

        error = 0.0
        d_router = [[0.0] * 3 for _ in E]
        d_values = [[0.0] * 2 for _ in E]
        for x, row, mine in zip(tokens, scores, served, strict=True):
            d_row = [0.0] * EXPERTS
            y = [0.0, 0.0]
            for i in mine:
                y = [row[i] * v for v in values[i]]
            missed = [y[d] - (x[d] + 1) for d in range(2)]
            error += _dot(missed, missed) / TOKENS
            for i in mine:
                slope = [2 * m / TOKENS for m in missed]
                d_row[i] += _dot(slope, values[i])
                d_values[i] = [
                    old + row[i] * s
                    for old, s in zip(d_values[i], slope, strict=True)
                ]
            if balancing == "Switch loss":
                # its probabilities are scores divided by their sum
                total = sum(row)
                mean = _dot(load, row) / total
                for i in E:
                    push = EXPERTS * (load[i] - mean) / TOKENS**2 / total
                    d_row[i] += strength * push
            for i in E:
                d_logit = d_row[i] * row[i] * (1 - row[i])
                for d in range(3):
                    d_router[i][d] += d_logit * x[d]
        if record:
            record(load, bias, error)
        if step == steps:
            break
        router, values = _moved(router, d_router), _moved(values, d_values)
        if balancing == "bias":
            bias = update_bias(bias, load, strength)
    return history


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True))


def _moved(
    weights: list[list[float]], slopes: list[list[float]]
) -> list[list[float]]:
    return [
        [w - LEARNING_RATE * d for w, d in zip(row, slope, strict=True)]
        for row, slope in zip(weights, slopes, strict=True)
    ]


def balance_trace(
    balancing: Balancing = "bias",
    bias_step: float = 0.003,
    loss_weight: float = 1.0,
    capacity_factor: float = 1.5,
    seed: int = 3,
) -> Trace:
    """Train the small mixture, and look at the loads every 15 steps.

    Args:
        balancing: How the load is kept even.
        bias_step: How far a bias moves in a step, 0 to 1.
        loss_weight: Weight of the Switch loss, 0 to 10.
        capacity_factor: Room of an expert in equal shares, 0.5 to 8.
        seed: Of tokens and weights.

    Returns:
        A bar for each expert, and the biases under them.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> print(balance_trace("nothing")[-1].caption[:28])
        Step 300: loads from 0 to 28
    """
    for name, value, low, high in (
        ("bias_step", bias_step, 0.0, 1.0),
        ("loss_weight", loss_weight, 0.0, 10.0),
        ("capacity_factor", capacity_factor, 0.5, 8.0),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name} must be {low:g} to {high:g}, got {value}")
    seen: list[tuple[list[int], list[float], float]] = []
    train(
        balancing,
        bias_step if balancing == "bias" else loss_weight,
        capacity_factor,
        seed,
        lambda *now: seen.append(now),
    )
    highest = max(max(load) for load, _, _ in seen[::EVERY])
    return [
        _frame(EVERY * i, *now, capacity_factor, highest)
        for i, now in enumerate(seen[::EVERY])
    ]


def _frame(
    step: int,
    load: list[int],
    bias: list[float],
    error: float,
    factor: float,
    highest: int,
) -> Frame:
    """Bars, the top row first; what is over the capacity is gone."""
    room = expert_capacity(TOKENS, EXPERTS, factor=factor)
    dropped = sum(max(0, count - room) for count in load)
    rows = []
    for low in range((highest - 1) // HIGH * HIGH, -1, -HIGH):
        cells = []
        for count in load:
            mark: Mark = "gone" if count > low >= room else "on"
            top = low < count <= low + HIGH
            shown = Cell(str(count) if top else "", mark)
            cells.append(shown if count > low else Cell())
        rows.append((f"{low + HIGH}", cells))
    said = (
        f"Step {step}: loads from {min(load)} to {max(load)}, where "
        f"{TOKENS // EXPERTS} would be even. {dropped} of {TOKENS} tokens "
        f"{'is' if dropped == 1 else 'are'} dropped, the mean error is "
        f"{error:.2f}."
    )
    names = [f"E{i}" for i in range(EXPERTS)]
    numbers = [Cell(f"{b:+.2f}".replace("+0.00", "0")) for b in bias]
    return Frame(said, Grid(rows, names), Grid([("bias", numbers)], names))
