"""Axes of charts: what they show, round numbers along them, and short names.

Only the standard library: charts are drawn in the reader's browser too.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """Round numbers from ``low`` to ``high``, three to seven of them.

    Args:
        low: Least number that may be among them.
        high: Largest number, above ``low``.
        log: Whether equal distances are equal ratios.

    Examples:
        >>> ticks(0, 70)
        [0.0, 20.0, 40.0, 60.0]
        >>> ticks(1, 5000, log=True)
        [1.0, 10.0, 100.0, 1000.0]
    """
    if log:
        first, last = math.log10(low), math.log10(high)
        decades = math.floor(last + 1e-9) - math.ceil(first - 1e-9) + 1
        steps = [1.0] if decades > 2 else [1.0, 2.0, 5.0]
        skip = max(1, math.ceil(decades / 6))
        found = [
            m * 10.0**e
            for e in range(math.floor(first) - 1, math.ceil(last) + 1)
            if e % skip == 0
            for m in steps
            if low * (1 - 1e-9) <= m * 10.0**e <= high * (1 + 1e-9)
        ]
        if len(found) >= 3 or last - first > 1:
            return found
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    start, end = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [n * step for n in range(start, end + 1)]


def short(value: float) -> str:
    """A number on an axis: ``1.5k``, ``20M``, powers of ten beyond.

    Examples:
        >>> short(0), short(0.25), short(1500), short(2e7), short(1e18)
        ('0', '0.25', '1.5k', '20M', '10¹⁸')
    """
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        power = f"10{str(int(exponent)).translate(_RAISED)}"
        return power if mantissa == "1.00" else f"{float(mantissa):g}·{power}"
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= scale * (1 - 1e-9):
            return f"{value / scale:.9g}{letter}"
    return f"{value:.9g}"


@dataclass(frozen=True)
class Scale:
    """From a quantity to a place in the drawing.

    Attributes:
        low: Quantity at the start of the axis.
        high: Quantity at its end.
        start: Place of ``low``.
        end: Place of ``high``.
        log: Whether equal distances are equal ratios.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        """The place of a value."""
        of: Callable[[float], float] = math.log if self.log else float
        low, high = of(self.low), of(self.high)
        share = (of(value) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Round numbers along the axis."""
        return ticks(self.low, self.high, self.log)


def domain(
    values: Sequence[float], log: bool, whole: bool
) -> tuple[float, float]:
    """The range that an axis shows.

    Args:
        values: All that it must hold.
        log: Whether it is logarithmic.
        whole: Whether it goes on to the next round number, and a linear one to
            zero.
    """
    if not values:
        return (1, 10) if log else (0, 1)
    low, high = min(values), max(values)
    if log:
        if low == high:
            low, high = low / 3, high * 3
        if whole:
            low, high = _round_down(low), -_round_down(-high)
        return low, high
    if whole:
        low, high = min(low, 0), max(high, 0)
    if low == high:
        pad = abs(low) / 2 or 1
        low, high = low - pad, high + pad
    if whole:
        marks = ticks(low, high)
        step = marks[1] - marks[0]
        low = math.floor(low / step + 1e-6) * step
        high = math.ceil(high / step - 1e-6) * step
    return low, high


def _round_down(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten that is no larger."""
    size = abs(value)
    power = 10.0 ** math.floor(math.log10(size))
    steps = [m * power for m in (0.5, 1, 2, 5, 10)]
    if value > 0:
        return max(s for s in steps if s <= size * (1 + 1e-9))
    return -min(s for s in steps if s >= size * (1 - 1e-9))
