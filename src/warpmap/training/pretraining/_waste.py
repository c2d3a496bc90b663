"""What padding, joining and packing make of the same documents."""

from dataclasses import dataclass
from math import exp, log
from statistics import NormalDist

from warpmap.chart import Axis, Bar, BarChart
from warpmap.training.pretraining._bins import (
    best_fit_decreasing,
    cut_when_full,
    pieces,
)
from warpmap.training.pretraining._order import permuted


@dataclass(frozen=True)
class Waste:
    """One corpus, laid into rows in three ways.

    Attributes:
        tokens: Tokens of all documents.
        padded_percent: Padding with one piece a row (% of the batch).
        packed_percent: Padding with best fit decreasing (% of the batch).
        packed_rows: Rows, packed.
        fewest_rows: Rows that no packing can go below: tokens by capacity.
        must_cut: Documents longer than a row; any way cuts them.
        joined_cut: Documents cut when all are joined and cut into full rows.
        seen_percent: Scores within documents (% of a causal mask's).
    """

    tokens: int
    padded_percent: float
    packed_percent: float
    packed_rows: int
    fewest_rows: int
    must_cut: int
    joined_cut: int
    seen_percent: float


def document_lengths(documents: int, median: int, spread: float) -> list[int]:
    """Lengths with a log-normal distribution, in a fixed mixed order.

    Not drawn but the middles of equal shares, so that results repeat.

    Examples:
        >>> sorted(document_lengths(3, median=100, spread=1.0))
        [38, 100, 263]
    """
    normal = NormalDist()
    lengths = []
    for i in range(documents):
        place = permuted(i, documents, "lengths")
        z = normal.inv_cdf((place + 0.5) / documents)
        lengths.append(max(1, round(exp(log(median) + spread * z))))
    return lengths


def packing_waste(
    documents: int = 2000,
    median: int = 600,
    spread: float = 1.2,
    capacity: int = 4096,
) -> Waste:
    """Lay the same documents into rows in three ways.

    Args:
        documents: How many there are, 1 to 20000.
        median: Tokens of the middle one, 1 to 100000.
        spread: Standard deviation of the logarithm of the length, 0 to 3.
        capacity: Tokens of a row, 1 to 131072.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> packing_waste(spread=0.0, median=1000).packed_percent
        2.34375
    """
    if not 1 <= documents <= 20_000:
        raise ValueError(f"documents must be 1 to 20000, got {documents}")
    if not 1 <= median <= 100_000:
        raise ValueError(f"median must be 1 to 100000, got {median}")
    if not 0 <= spread <= 3:
        raise ValueError(f"spread must be 0 to 3, got {spread}")
    if not 1 <= capacity <= 131_072:
        raise ValueError(f"capacity must be 1 to 131072, got {capacity}")
    lengths = document_lengths(documents, median, spread)
    parts = [end - start for _, start, end in pieces(lengths, capacity)]
    tokens = sum(lengths)
    rows = len(best_fit_decreasing(parts, capacity))
    seen = sum(part * (part + 1) for part in parts)
    return Waste(
        tokens=tokens,
        padded_percent=100 * (1 - tokens / (len(parts) * capacity)),
        packed_percent=100 * (1 - tokens / (rows * capacity)),
        packed_rows=rows,
        fewest_rows=-(-tokens // capacity),
        must_cut=sum(length > capacity for length in lengths),
        joined_cut=cut_when_full(lengths, capacity),
        seen_percent=100 * seen / (rows * capacity * (capacity + 1)),
    )


def waste_chart(
    documents: int, median: int, spread: float, capacity: int
) -> BarChart:
    """Padding, and documents cut, each way.

    Examples:
        >>> waste_chart(100, 500, 1.0, 4096).bars[2].name
        'packed: padding'
    """
    waste = packing_waste(documents, median, spread, capacity)
    share = 100 / documents
    return BarChart(
        "What goes to waste",
        Axis("% of the batch, or of the documents"),
        [
            Bar("a row each: padding", [("", waste.padded_percent)]),
            Bar("joined: documents cut", [("", share * waste.joined_cut)]),
            Bar("packed: padding", [("", waste.packed_percent)]),
            Bar("packed: documents cut", [("", share * waste.must_cut)]),
        ],
    )
