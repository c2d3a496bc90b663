"""How much the plain estimate of pass@k is off: a calculator."""

from dataclasses import dataclass

from warpmap.chart import Axis, Line, LineChart, Point
from warpmap.training.pretraining.evaluation import pass_at_k


@dataclass(frozen=True)
class PassRate:
    """What the samples of one problem say.

    Attributes:
        unbiased: Share of the choices of k samples that hold a correct one.
        naive: 1 - (1 - c / n)^k, as if samples were put back; too low.
        difference: Unbiased minus naive, in percentage points.
    """

    unbiased: float
    naive: float
    difference: float


def pass_rate(samples: int = 20, correct: int = 2, k: int = 10) -> PassRate:
    """Compare the two ways to estimate pass@k.

    Args:
        samples: Programs drawn for one problem.
        correct: How many of them pass the tests.
        k: Attempts.

    Raises:
        ValueError: If the numbers do not fit.

    Examples:
        >>> round(pass_rate(samples=20, correct=2, k=10).difference, 1)
        11.2
    """
    unbiased = pass_at_k(samples, correct, k)
    naive = 1 - (1 - correct / samples) ** k
    return PassRate(unbiased, naive, 100 * (unbiased - naive))


def pass_rate_chart(
    samples: int = 20, correct: int = 2, k: int = 10
) -> LineChart:
    """Both estimates over the number of attempts.

    Examples:
        >>> [line.name for line in pass_rate_chart().lines]
        ['unbiased', 'naive']
    """
    here = pass_rate(samples, correct, k)
    # at most 100 points a line
    step = -(-samples // 100)
    attempts = sorted({*range(1, samples + 1, step), k, samples})
    rates = [pass_rate(samples, correct, each) for each in attempts]
    unbiased = [rate.unbiased for rate in rates]
    naive = [rate.naive for rate in rates]
    return LineChart(
        "pass@k from the same samples",
        Axis("attempts k"),
        Axis("chance of a correct one"),
        [
            Line("unbiased", list(zip(attempts, unbiased, strict=True))),
            Line("naive", list(zip(attempts, naive, strict=True))),
        ],
        [Point(f"k = {k}", k, here.unbiased)],
    )
