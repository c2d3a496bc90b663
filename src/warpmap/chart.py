"""Charts as plain data: what a topic wants drawn, not how.

A topic's function returns one of these; the site draws it, at build time and
again in the reader's browser when an input changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """What an axis shows.

    Attributes:
        label: Quantity and unit, for example ``"tokens in flight"``.
        log: Whether equal distances are equal ratios.
    """

    label: str
    log: bool = False


@dataclass(frozen=True)
class Line:
    """Points that belong together, joined in their order."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Point:
    """One point with its name: where the reader is, or a measurement."""

    name: str
    x: float
    y: float


@dataclass(frozen=True)
class LineChart:
    """Lines over one quantity.

    Examples:
        >>> LineChart(
        ...     "Doubling",
        ...     Axis("steps"),
        ...     Axis("size", log=True),
        ...     [Line("2^n", [(n, 2**n) for n in range(5)])],
        ... ).lines[0].points[-1]
        (4, 16)
    """

    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    points: Sequence[Point] = ()


@dataclass(frozen=True)
class Bar:
    """One bar; several named parts are stacked in their order."""

    name: str
    parts: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class BarChart:
    """Bars over one quantity, from zero.

    Examples:
        >>> BarChart("Memory", Axis("GiB"), [Bar("weights", [("", 15)])]).bars
        [Bar(name='weights', parts=[('', 15)])]
    """

    title: str
    x: Axis
    bars: Sequence[Bar]


Chart = LineChart | BarChart
