"""Time and traffic of collective operations in the alpha-beta model.

A message of n bytes takes alpha + beta n: a start-up, then the bytes. A rank
sends one message and receives one at a time. What an algorithm costs is then
the longest chain of its steps and of its bytes. For p ranks and n bytes:

    ring                   p - 1 steps            (p - 1) n / p bytes
    doubling or halving    ceil(log2 p) steps     (p - 1) n / p bytes
    tree                   ceil(log2 p) steps     ceil(log2 p) n bytes

An all-reduce takes two such passes. The size n is always the largest buffer
of one rank: the tensor, all that is gathered, all that is scattered.

References: Hockney, 1994, doi:10.1016/S0167-8191(06)80021-9;
Thakur, Rabenseifner and Gropp, 2005, doi:10.1177/1094342005051521;
Patarasuk and Yuan, 2009, doi:10.1016/j.jpdc.2008.09.002
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from warpmap.chart import Axis, Line, LineChart, Point
from warpmap.hardware.network.interconnects import LINKS, transfer

Collective = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all"]
Network = Literal["switch", "ring"]


@dataclass(frozen=True)
class Cost:
    """What stands in a row until the last rank is done.

    Args:
        steps: Messages, one after another.
        bytes: Bytes, one after another, over the busiest link of each step.
        sent: Bytes that all ranks send together.
    """

    steps: int
    bytes: int
    sent: int

    def seconds(self, alpha: float, bytes_per_s: float) -> float:
        """Time, for a start-up in seconds and a link's bandwidth.

        Examples:
            >>> Cost(steps=6, bytes=3_000_000, sent=0).seconds(1e-5, 1e11)
            9e-05
        """
        return self.steps * alpha + self.bytes / bytes_per_s

    def __add__(self, other: "Cost") -> "Cost":
        """One after the other."""
        return Cost(
            self.steps + other.steps,
            self.bytes + other.bytes,
            self.sent + other.sent,
        )


def _shift(size: int, distance: int, ranks: int, network: Network) -> Cost:
    """Every rank sends ``size`` bytes to the rank ``distance`` further."""
    # wired in a ring, the messages of that many ranks share each link
    sharing = 1 if network == "switch" else min(distance, ranks - distance)
    return Cost(1, size * sharing, size * ranks)


def _total(steps: Sequence[Cost]) -> Cost:
    return sum(steps, Cost(0, 0, 0))


def ring_pass(size: int, ranks: int, network: Network = "switch") -> Cost:
    """All-gather, or reduce-scatter, that only talks to the next rank.

    Args:
        size: Bytes of all chunks together.
        ranks: Ranks that take part.
        network: ``"switch"`` joins all ranks, ``"ring"`` neighbours only.

    Examples:
        >>> ring_pass(size=8000, ranks=8)
        Cost(steps=7, bytes=7000, sent=56000)
    """
    chunk = -(-size // ranks)
    step = _shift(chunk, 1, ranks, network)
    return _total([step] * (ranks - 1))


def doubling_pass(size: int, ranks: int, network: Network = "switch") -> Cost:
    """All-gather that doubles what a rank holds; backwards, reduce-scatter.

    In step k each rank sends all it has, 2^k chunks, 2^k ranks further. The
    last step sends what is still missing, so any number of ranks will do.
    Arguments are those of ``ring_pass``.

    Examples:
        >>> doubling_pass(size=8000, ranks=8)
        Cost(steps=3, bytes=7000, sent=56000)
    """
    chunk = -(-size // ranks)
    distances = [1 << k for k in range((ranks - 1).bit_length())]
    return _total(
        [
            _shift(chunk * min(d, ranks - d), d, ranks, network)
            for d in distances
        ]
    )


def ring_all_reduce(size: int, ranks: int, network: Network = "switch") -> Cost:
    """Reduce-scatter, then all-gather, both along the ring.

    Examples:
        >>> ring_all_reduce(size=8000, ranks=8)
        Cost(steps=14, bytes=14000, sent=112000)
    """
    return _total([ring_pass(size, ranks, network)] * 2)


def halving_doubling(
    size: int, ranks: int, network: Network = "switch"
) -> Cost:
    """All-reduce: reduce-scatter by halving, then all-gather by doubling.

    Examples:
        >>> halving_doubling(size=8000, ranks=8)
        Cost(steps=6, bytes=14000, sent=112000)
    """
    return _total([doubling_pass(size, ranks, network)] * 2)


def tree_all_reduce(size: int, ranks: int, network: Network = "switch") -> Cost:
    """Sums of whole tensors up a binomial tree, the result down again.

    No two messages of a step share a link, in a ring neither.

    Examples:
        >>> tree_all_reduce(size=8000, ranks=8)
        Cost(steps=6, bytes=48000, sent=112000)
    """
    steps = 2 * (ranks - 1).bit_length()
    return Cost(steps, steps * size, 2 * (ranks - 1) * size)


def recursive_doubling(
    size: int, ranks: int, network: Network = "switch"
) -> Cost:
    """All-reduce that exchanges whole tensors with 1, 2, 4... ranks further.

    Raises:
        ValueError: If the number of ranks is not a power of two.

    Examples:
        >>> recursive_doubling(size=8000, ranks=8)
        Cost(steps=3, bytes=24000, sent=192000)
    """
    if ranks & (ranks - 1):
        raise ValueError(f"ranks must be a power of two here, got {ranks}")
    distances = [1 << k for k in range(ranks.bit_length() - 1)]
    return _total([_shift(size, d, ranks, network) for d in distances])


def pairwise_exchange(
    size: int, ranks: int, network: Network = "switch"
) -> Cost:
    """All-to-all in which every chunk goes straight to its rank.

    Examples:
        >>> pairwise_exchange(size=8000, ranks=8)
        Cost(steps=7, bytes=7000, sent=56000)
    """
    chunk = -(-size // ranks)
    return _total([_shift(chunk, d, ranks, network) for d in range(1, ranks)])


def bruck_exchange(size: int, ranks: int, network: Network = "switch") -> Cost:
    """All-to-all in which a chunk travels by the binary digits of its way.

    Examples:
        >>> bruck_exchange(size=8000, ranks=8)
        Cost(steps=3, bytes=12000, sent=96000)
    """
    chunk = -(-size // ranks)
    steps = []
    for k in range((ranks - 1).bit_length()):
        chunks = sum(way >> k & 1 for way in range(ranks))
        steps.append(_shift(chunk * chunks, 1 << k, ranks, network))
    return _total(steps)


Algorithm = Callable[[int, int, Network], Cost]

ALGORITHMS: dict[str, dict[str, Algorithm]] = {
    "all-reduce": {
        "ring": ring_all_reduce,
        "halving + doubling": halving_doubling,
        "recursive doubling": recursive_doubling,
        "tree": tree_all_reduce,
    },
    "all-gather": {"ring": ring_pass, "doubling": doubling_pass},
    "reduce-scatter": {"ring": ring_pass, "halving": doubling_pass},
    "all-to-all": {"pairwise": pairwise_exchange, "Bruck": bruck_exchange},
}
"""Algorithms of each collective operation."""

RATES: dict[str, dict[str, float]] = {
    name.partition(",")[0]: {"gb_s": round(transfer(**link).payload_gb_s, 1)}
    for name, link in LINKS.items()
    if name.startswith(("PCIe 4", "PCIe 5", "NVLink 3", "NVLink 4", "NVLink 5"))
}
"""Bandwidth of links in one direction, with full packets, in GB/s."""


def bus_factor(collective: Collective, ranks: int) -> float:
    """Bytes that a rank must send at least, as a share of the size.

    ``nccl-tests`` multiplies size over time by it, so that the result can be
    held against the bandwidth of a link, for any number of ranks.

    Examples:
        >>> bus_factor("all-reduce", 8), bus_factor("all-gather", 8)
        (1.75, 0.875)
    """
    passes = 2 if collective == "all-reduce" else 1
    return passes * (ranks - 1) / ranks


def fit(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Alpha and beta of measured times: start-up, and seconds a byte.

    Least squares of the relative errors, so that a short run counts as much
    as a long one.

    Args:
        sizes: Bytes of each run; at least two different ones.
        seconds: Time of each run.

    Raises:
        ValueError: If sizes and times do not make a line.

    Examples:
        >>> fit([0, 1000, 4000], [1.0, 2.0, 5.0])
        (1.0, 0.001)
    """
    if len(sizes) != len(seconds) or len(set(sizes)) < 2:
        raise ValueError(
            "sizes must be two or more and as many as seconds, "
            f"got {len(set(sizes))} and {len(seconds)}"
        )
    if min(seconds) <= 0:
        raise ValueError(f"seconds must be positive, got {min(seconds)}")
    # minimize the sum of (alpha / t + beta n / t - 1)^2
    ones = [1 / t for t in seconds]
    rates = [n / t for n, t in zip(sizes, seconds, strict=True)]
    aa = math.fsum(x * x for x in ones)
    ab = math.fsum(x * y for x, y in zip(ones, rates, strict=True))
    bb = math.fsum(y * y for y in rates)
    a, b = math.fsum(ones), math.fsum(rates)
    determinant = aa * bb - ab * ab
    return (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant


@dataclass(frozen=True)
class CommunicationCost:
    """What a collective operation costs with the best algorithm.

    Attributes:
        fastest: Algorithm that is done first.
        microseconds: Its time.
        steps: Messages that it sends one after another.
        megabytes_in_a_row: Bytes one after another, in 10^6 bytes.
        megabytes_sent: Bytes that all ranks send together, in 10^6 bytes.
        algbw_gb_s: Algorithm bandwidth: size over time, in GB/s.
        busbw_gb_s: Bus bandwidth: the same times ``bus_factor``, in GB/s.
        for_tiny: Fastest for a message that has almost no bytes.
        for_huge: Fastest for a message in which only bytes count.
        crossing_mb: Size at which these two are equal, in 10^6 bytes.
    """

    fastest: str
    microseconds: float
    steps: int
    megabytes_in_a_row: float
    megabytes_sent: float
    algbw_gb_s: float
    busbw_gb_s: float
    for_tiny: str
    for_huge: str
    crossing_mb: float | None


def _costs(
    collective: Collective, size: int, ranks: int, network: Network
) -> dict[str, Cost]:
    return {
        name: algorithm(size, ranks, network)
        for name, algorithm in ALGORITHMS[collective].items()
        if name != "recursive doubling" or not ranks & (ranks - 1)
    }


def _check(
    collective: str, megabytes: float, ranks: int, alpha_us: float, gb_s: float
) -> int:
    """The size in bytes."""
    if collective not in ALGORITHMS:
        known = ", ".join(ALGORITHMS)
        raise ValueError(f"collective must be one of {known}, got {collective}")
    if not 2 <= ranks <= 1024:
        raise ValueError(f"ranks must be from 2 to 1024, got {ranks}")
    positive = {"megabytes": megabytes, "alpha_us": alpha_us, "gb_s": gb_s}
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {value}")
    size = round(megabytes * 1e6)
    if size < 1:
        raise ValueError(f"megabytes must hold a byte, got {megabytes}")
    return size


def communication_cost(
    collective: Collective = "all-reduce",
    ranks: int = 8,
    megabytes: float = 1.0,
    alpha_us: float = 10.0,
    gb_s: float = 423.5,
    network: Network = "switch",
) -> CommunicationCost:
    """Cost of a collective operation with the fastest of its algorithms.

    Args:
        collective: What the ranks do together.
        ranks: Ranks that take part, from 2 to 1024.
        megabytes: Largest buffer of one rank, in 10^6 bytes.
        alpha_us: Start-up of one message, in microseconds; assumed.
        gb_s: Bandwidth of a link in one direction, in GB/s.
        network: Whether a switch joins all ranks, or each its neighbours.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> cost = communication_cost("all-reduce", ranks=8, megabytes=1.0)
        >>> cost.fastest, cost.steps, round(cost.microseconds, 1)
        ('recursive doubling', 3, 37.1)
    """
    size = _check(collective, megabytes, ranks, alpha_us, gb_s)
    if network not in ("switch", "ring"):
        raise ValueError(f"network must be switch or ring, got {network}")
    alpha, rate = alpha_us * 1e-6, gb_s * 1e9

    costs = _costs(collective, size, ranks, network)
    fastest = min(costs, key=lambda name: costs[name].seconds(alpha, rate))
    best = costs[fastest]
    seconds = best.seconds(alpha, rate)

    large = ranks << 30
    slope = _costs(collective, large, ranks, network)
    tiny = min(slope, key=lambda n: (slope[n].steps, slope[n].bytes))
    huge = min(slope, key=lambda n: (slope[n].bytes, slope[n].steps))
    crossing = None
    if tiny != huge:
        more_steps = slope[huge].steps - slope[tiny].steps
        more_bytes = (slope[tiny].bytes - slope[huge].bytes) / large
        crossing = more_steps * alpha * rate / more_bytes / 1e6
    return CommunicationCost(
        fastest=fastest,
        microseconds=seconds * 1e6,
        steps=best.steps,
        megabytes_in_a_row=best.bytes / 1e6,
        megabytes_sent=best.sent / 1e6,
        algbw_gb_s=size / seconds / 1e9,
        busbw_gb_s=bus_factor(collective, ranks) * size / seconds / 1e9,
        for_tiny=tiny,
        for_huge=huge,
        crossing_mb=crossing,
    )


def communication_chart(
    collective: Collective = "all-reduce",
    ranks: int = 8,
    megabytes: float = 1.0,
    alpha_us: float = 10.0,
    gb_s: float = 423.5,
    network: Network = "switch",
) -> LineChart:
    """Time of each algorithm against the size.

    Arguments are those of ``communication_cost``.

    Examples:
        >>> [line.name for line in communication_chart("all-to-all").lines]
        ['pairwise', 'Bruck']
    """
    here = communication_cost(
        collective, ranks, megabytes, alpha_us, gb_s, network
    )
    alpha, rate = alpha_us * 1e-6, gb_s * 1e9
    points: dict[str, list[tuple[float, float]]] = {}
    for k in range(10, 33):  # 1 KiB to 4 GiB
        costs = _costs(collective, 1 << k, ranks, network)
        for name, cost in costs.items():
            at = (1 << k) / 1e6, cost.seconds(alpha, rate) * 1e6
            points.setdefault(name, []).append(at)
    return LineChart(
        f"{collective} of {ranks} ranks",
        Axis("megabytes", log=True),
        Axis("microseconds", log=True),
        [Line(name, line) for name, line in points.items()],
        [Point(here.fastest, megabytes, here.microseconds)],
    )
