"""Training at many learning rates and widths, to see where the best one is."""

from collections.abc import Sequence

import torch
from torch import Tensor

from warpmap.models.foundations.initialization_and_parametrization import (
    HIDDEN,
    OUTPUT,
    Parametrization,
    growth,
)

BASE = 16  # at this width all rules are the same
BETAS, EPS = (0.9, 0.95), 1e-8


def losses_by_rate(
    rule: Parametrization, width: int, rates: Sequence[float], steps: int = 20
) -> list[float]:
    """Loss after some steps of Adam, for every learning rate.

    A network ``8 -> n -> n -> 1`` with ReLU fits 128 points of a smooth
    function, in float64. All rates start from the same weights.

    Args:
        rule: The parametrization, equal to the others at width 16.
        width: Neurons ``n`` of both hidden layers.
        rates: Learning rates at width 16; the rule divides them.
        steps: Steps, each on all points.

    Returns:
        Mean squared error, of a function whose own mean square is 1.

    Raises:
        ValueError: If ``width`` is below 1 or the rule unknown.

    Examples:
        >>> len(losses_by_rate("muP", 16, [0.01, 0.1], steps=2))
        2
    """
    growth(rule)  # refuses unknown rules
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    x, along = noise(128, 8), noise(8, 3) / 8**0.5
    a, b, c = (x @ along).unbind(-1)
    y = torch.sin(2 * a) + b * c
    y = y / y.square().mean().sqrt()

    n, hidden, output = width / BASE, HIDDEN[rule], OUTPUT[rule]
    weights = [
        noise(width, 8) / 8**0.5,
        noise(width, width) * (2 / BASE) ** 0.5 * n**-hidden.deviation,
        noise(1, width) / BASE**0.5 * n**-output.deviation,
    ]
    powers = [0, hidden.rate, output.rate]
    by = torch.tensor(rates, dtype=torch.float64)[:, None, None]
    # a copy of the network for each rate, trained side by side
    weights = [
        w.expand(len(rates), *w.shape).clone().requires_grad_() for w in weights
    ]
    firsts = [torch.zeros_like(w) for w in weights]
    seconds = [torch.zeros_like(w) for w in weights]

    def losses() -> Tensor:
        w1, w2, w3 = weights
        z = (x @ w1.mT).relu()
        z = (n**-hidden.multiplier * z @ w2.mT).relu()
        out = n**-output.multiplier * z @ w3.mT  # (rates, 128, 1)
        each: Tensor = (out[..., 0] - y).square().mean(-1)
        return each

    for step in range(1, steps + 1):
        grads = torch.autograd.grad(losses().sum(), weights)
        for w, g, m, v, power in zip(
            weights, grads, firsts, seconds, powers, strict=True
        ):
            m.lerp_(g, 1 - BETAS[0])
            v.lerp_(g * g, 1 - BETAS[1])
            mean = m / (1 - BETAS[0] ** step)
            square = v / (1 - BETAS[1] ** step)
            w.data -= by * n**-power * mean / (square.sqrt() + EPS)
    result: list[float] = losses().tolist()
    return result
