"""One step of Adam in a network of any width, in plain Python."""

import math
import random
from collections.abc import Iterable
from operator import mul

from warpmap.models.foundations.initialization_and_parametrization import (
    HIDDEN,
    OUTPUT,
    Coordinates,
    Parametrization,
    growth,
)


def coordinate_check(
    rule: Parametrization, width: int, rate: float = 1e-4, seed: int = 0
) -> Coordinates:
    """Sizes in a network ``4 -> n -> n -> 1`` with ReLU, and one step on.

    The step is Adam's first, on one example: each weight moves by its
    learning rate, against the sign of its gradient.

    Args:
        rule: The parametrization.
        width: Neurons ``n`` of both hidden layers.
        rate: Learning rate, before the rule divides it.
        seed: Of the weights and the example.

    Returns:
        Root mean squares, of the second layer before its ReLU and of the
        output.

    Raises:
        ValueError: If ``width`` is below 1 or the rule unknown.

    Examples:
        >>> check = coordinate_check("muP", 64), coordinate_check("muP", 256)
        >>> 0.8 < check[1].hidden_change / check[0].hidden_change < 1.25
        True
    """
    growth(rule)  # refuses unknown rules
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    hidden, output, n = HIDDEN[rule], OUTPUT[rule], float(width)
    noise = random.Random(seed).gauss
    x, target = [noise(0, 1) for _ in range(4)], noise(0, 1)

    def new(rows: int, columns: int, std: float) -> list[list[float]]:
        return [[noise(0, std) for _ in range(columns)] for _ in range(rows)]

    w1 = new(width, 4, 0.5)
    w2 = new(width, width, n**-hidden.deviation)
    [w3] = new(1, width, n**-output.deviation)

    def forward() -> tuple[list[float], list[float], float]:
        first = [max(_dot(w, x), 0.0) for w in w1]
        second = [n**-hidden.multiplier * _dot(w, first) for w in w2]
        seen = [max(z, 0.0) for z in second]
        return first, second, n**-output.multiplier * _dot(w3, seen)

    first, second, out = forward()
    # gradients of the squared error but for positive factors: signs suffice
    error = out - target
    grad2 = [error * w * (z > 0) for w, z in zip(w3, second, strict=True)]
    columns = zip(*w2, strict=True)
    grad1 = [
        _dot(w, grad2) * (z > 0) for w, z in zip(columns, first, strict=True)
    ]
    rate2, rate3 = rate * n**-hidden.rate, rate * n**-output.rate
    w1 = [_moved(w, g, x, rate) for w, g in zip(w1, grad1, strict=True)]
    w2 = [_moved(w, g, first, rate2) for w, g in zip(w2, grad2, strict=True)]
    w3 = _moved(w3, error, [max(z, 0.0) for z in second], rate3)

    _, second_then, out_then = forward()
    moved = [b - a for a, b in zip(second, second_then, strict=True)]
    return Coordinates(
        hidden_start=_size(second),
        hidden_change=_size(moved),
        output_start=abs(out),
        output_change=abs(out_then - out),
    )


def _dot(x: Iterable[float], y: Iterable[float]) -> float:
    return float(sum(map(mul, x, y)))


def _size(x: list[float]) -> float:
    return math.sqrt(_dot(x, x) / len(x))


def _moved(
    row: list[float], grad: float, inputs: list[float], rate: float
) -> list[float]:
    """A neuron's weights after the step; their gradients are grad * inputs."""

    def sign(a: float) -> int:
        return (a > 0) - (a < 0)

    step = rate * sign(grad)
    return [w - step * sign(a) for w, a in zip(row, inputs, strict=True)]
