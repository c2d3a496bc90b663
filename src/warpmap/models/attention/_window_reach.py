"""How far a stack of windows sees, and how much of it reaches the end.

Attention weights are taken as even. Then each layer moves a token's influence
back by 0 to ``window - 1`` places, all alike, or leaves it where it is, in the
residual stream. Layers add such moves, as a random walk adds steps.
"""

from dataclasses import dataclass
from itertools import accumulate

from warpmap.chart import Axis, Line, LineChart

STACKS = {
    "Mistral 7B v0.1": {"layers": 32, "window": 4096},
    "Four small layers": {"layers": 4, "window": 5},
}
FINE = 64  # steps a window; a wider one is counted in coarser steps


@dataclass(frozen=True)
class Reach:
    """Where the influence on the last token comes from.

    Attributes:
        farthest: Tokens back to the last one that has any influence.
        mean: Tokens back, on average.
        half: Half of the influence lies within so many tokens back.
        most: 99 percent of it lies within so many tokens back.
    """

    farthest: int
    mean: float
    half: int
    most: int


def influence(layers: int, window: int, residual: float) -> list[float]:
    """Share of the influence that comes from each distance; they add up to 1.

    Args:
        layers: Layers with a window.
        window: Tokens that a query meets, itself included.
        residual: Share that skips a layer's attention, 0 to below 1.

    Examples:
        >>> [round(9 * x) for x in influence(layers=2, window=3, residual=0)]
        [1, 2, 3, 2, 1]
    """
    shares = [1.0]
    for _ in range(layers):
        sums = [0.0, *accumulate(shares)]
        last = len(shares)
        shares = [
            (residual * shares[d] if d < last else 0.0)
            + (1 - residual)
            * (sums[min(d + 1, last)] - sums[min(max(0, d + 1 - window), last)])
            / window
            for d in range(last + window - 1)
        ]
    return shares


def _steps(
    layers: int, window: int, residual: float
) -> tuple[float, list[float]]:
    """Tokens a step, and the running sum of the influence over steps."""
    if not 1 <= layers <= 128:
        raise ValueError(f"layers must be 1 to 128, got {layers}")
    if not 1 <= window <= 1 << 20:
        raise ValueError(f"window must be 1 to {1 << 20}, got {window}")
    if not 0 <= residual < 1:
        raise ValueError(f"residual must be 0 to below 1, got {residual}")
    fine = min(window, FINE)
    size = (window - 1) / (fine - 1) if fine > 1 else 1.0
    return size, list(accumulate(influence(layers, fine, residual)))


def window_reach(
    layers: int = 32, window: int = 4096, residual: float = 0.5
) -> Reach:
    """How far a stack of layers with sliding windows sees.

    Args:
        layers: Layers with a window.
        window: Tokens that a query meets, itself included.
        residual: Share that skips a layer's attention, 0 to below 1.

    Examples:
        >>> window_reach(layers=32, window=4096, residual=0.5).farthest
        131040
    """
    size, running = _steps(layers, window, residual)

    def within(share: float) -> int:
        steps = next(
            (i for i, x in enumerate(running) if x >= share), len(running) - 1
        )
        return round(steps * size)

    return Reach(
        farthest=layers * (window - 1),
        mean=layers * (1 - residual) * (window - 1) / 2,
        half=within(0.5),
        most=within(0.99),
    )


def reach_chart(layers: int, window: int, residual: float) -> LineChart:
    """The influence within each distance, for the stack and parts of it.

    Examples:
        >>> [line.name for line in reach_chart(32, 4096, 0.5).lines]
        ['1 layer', '8 layers', '32 layers']
    """
    lines = []
    for n in sorted({1, max(1, layers // 4), layers}):
        size, running = _steps(n, window, residual)
        thin = max(1, len(running) // 48)
        points = [
            (i * size, 100 * x) for i, x in enumerate(running) if i % thin == 0
        ]
        name = f"{n} layer{'s' * (n > 1)}"
        lines.append(Line(name, [*points, (layers * (window - 1), 100.0)]))
    return LineChart(
        "Influence within a distance",
        Axis("tokens back"),
        Axis("% of the influence"),
        lines,
    )
