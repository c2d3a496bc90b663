"""Two half moons, and a network that learns to tell them apart."""

import math
from collections.abc import Sequence
from random import Random
from typing import Literal

from warpmap.trace import Cell, Frame, Grid, Mark, Trace
from warpmap.training.foundations.autograd import tensor
from warpmap.training.foundations.mlp_from_scratch import (
    MLP,
    SGD,
    Adam,
    Example,
    train,
)

LEFT, RIGHT, BOTTOM, TOP = -1.5, 2.5, -1.0, 1.5
POINTS = 96
SIZE = 24  # examples a batch
EPOCH = POINTS // SIZE


def moons(count: int, noise: float = 0.12, seed: int = 0) -> list[Example]:
    """Points on two half circles that reach into each other.

    Args:
        count: How many, half of each class.
        noise: Standard deviation of each coordinate.
        seed: Of the noise.

    Examples:
        >>> [(round(x), round(y), c) for (x, y), c in moons(4, noise=0)]
        [(1, 0, 0), (-1, 0, 0), (0, 0, 1), (2, 0, 1)]
    """
    rng, half = Random(seed), count // 2
    found: list[Example] = []
    for label in (0, 1):
        for i in range(half):
            angle = math.pi * i / max(1, half - 1)
            x, y = math.cos(angle), math.sin(angle)
            if label:
                x, y = 1 - x, 0.5 - y
            point = rng.gauss(x, noise), rng.gauss(y, noise)
            found.append((point, label))
    return found


def margins(model: MLP, points: Sequence[Sequence[float]]) -> list[float]:
    """Score of class 1 minus that of class 0, for each point."""
    scores = model(tensor(points, needs_grad=False)).tolist()
    return [one - zero for zero, one in scores]


def centres(columns: int, rows: int) -> list[tuple[float, float]]:
    """Middles of the cells of a picture, from its top left corner."""
    return [
        (
            LEFT + (RIGHT - LEFT) * (i + 0.5) / columns,
            TOP - (TOP - BOTTOM) * (j + 0.5) / rows,
        )
        for j in range(rows)
        for i in range(columns)
    ]


def boundary_trace(
    hidden: int = 12,
    optimizer: Literal["Adam", "SGD"] = "Adam",
    lr: float = 0.05,
    epochs: int = 40,
    seed: int = 0,
) -> Trace:
    """Train on two half moons and look at the network now and then.

    Args:
        hidden: Hidden units, 1 to 32.
        optimizer: Adam, or SGD with momentum 0.9.
        lr: Learning rate, above 0 and at most 10.
        epochs: Passes over the 96 examples, 12 to 60; each has four steps.
        seed: Of the weights and of the order.

    Returns:
        The plane at moments of the training, with the loss of each epoch.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> print(boundary_trace(hidden=4, epochs=12)[0].caption)
        Before the first step: 48 of 96 points are on the right side.
    """
    if not 1 <= hidden <= 32:
        raise ValueError(f"hidden must be 1 to 32, got {hidden}")
    if not 0 < lr <= 10:
        raise ValueError(f"lr must be above 0 and at most 10, got {lr}")
    if not 12 <= epochs <= 60:
        raise ValueError(f"epochs must be 12 to 60, got {epochs}")
    examples = moons(POINTS)
    model = MLP([2, hidden, 2], seed)
    rule: SGD | Adam
    if optimizer == "Adam":
        rule = Adam(model.parameters(), lr)
    else:
        rule = SGD(model.parameters(), lr, momentum=0.9)

    # more often at first, when more happens
    moments = sorted({round(epochs * (n / 12) ** 1.5) for n in range(13)})
    trace: Trace = []
    losses: list[float] = []

    def look(epoch: int, said: str) -> None:
        sides = [m > 0 for m in margins(model, [x for x, _ in examples])]
        right = sum(
            side == bool(label)
            for side, (_, label) in zip(sides, examples, strict=True)
        )
        seen = [moment for moment in moments[1:] if moment <= epoch]
        curve = [
            Cell(f"{_mean(losses, e):.2f}", "new" if e == epoch else "")
            for e in seen
        ]
        missing = [Cell()] * (len(moments) - 1 - len(curve))
        trace.append(
            Frame(
                f"{said} {right} of {POINTS} points are on the right side.",
                _plane(model, examples),
                Grid([("loss", curve + missing)], [*map(str, moments[1:])]),
            )
        )

    def record(step: int, loss: float) -> None:
        losses.append(loss)
        epoch = step // EPOCH
        if step % EPOCH == 0 and epoch in moments:
            look(
                epoch,
                f"Epoch {epoch}, step {step}: loss {_mean(losses, epoch):.3f}.",
            )

    look(0, "Before the first step:")
    train(model, rule, examples, SIZE, epochs, seed, record)
    return trace


def _mean(losses: Sequence[float], epoch: int) -> float:
    return sum(losses[(epoch - 1) * EPOCH : epoch * EPOCH]) / EPOCH


def _plane(
    model: MLP,
    examples: Sequence[Example],
    columns: int = 16,
    rows: int = 10,
) -> Grid:
    """Where the network sees class 1, and the points."""
    marks: list[Mark] = [
        "on" if margin > 0 else ""
        for margin in margins(model, centres(columns, rows))
    ]
    texts = [""] * len(marks)
    for (x, y), label in examples:
        i = int((x - LEFT) / (RIGHT - LEFT) * columns)
        j = int((TOP - y) / (TOP - BOTTOM) * rows)
        if 0 <= i < columns and 0 <= j < rows:
            texts[j * columns + i] = "○●"[label]
    cells = list(map(Cell, texts, marks))
    return Grid(
        [
            ("", cells[at : at + columns])
            for at in range(0, len(cells), columns)
        ],
        [""] * columns,
    )
