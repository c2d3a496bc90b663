"""Where a token stands, told to attention in five ways.

    sinusoidal  a fixed vector for each position, added to the token
    learned     the same, but trained: a table, with an end
    Shaw        a learned vector for each distance, added to the key
    T5          a learned number for each range of distances, added to the score
    ALiBi       a fixed number for each distance, added to the score

Here are the formulas, in plain Python. ``_position_layers`` has the tensors.

Reference: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762
Reference: Shaw et al., 2018, https://arxiv.org/abs/1803.02155
Reference: Raffel et al., 2019, https://arxiv.org/abs/1910.10683
Reference: Press et al., 2021, https://arxiv.org/abs/2108.12409
"""

import math
from dataclasses import dataclass

from warpmap.chart import Axis, Line, LineChart, Point


def sinusoidal(
    position: float, width: int, base: float = 10000.0
) -> list[float]:
    """The vector that is added to the token at a position.

    Args:
        position: Place in the text, from 0.
        width: Values of a token, even.
        base: The slowest wave repeats after nearly ``2 pi base`` tokens.

    Returns:
        ``width`` numbers: sine and cosine of ``width / 2`` angles.

    Raises:
        ValueError: If ``width`` is odd or below 2, or ``base`` not above 1.

    Examples:
        >>> [round(x, 3) for x in sinusoidal(1, width=4)]
        [0.841, 0.54, 0.01, 1.0]
    """
    if width < 2 or width % 2:
        raise ValueError(f"width must be even, from 2, got {width}")
    if not base > 1:
        raise ValueError(f"base must be above 1, got {base}")
    found = []
    for i in range(0, width, 2):
        angle = position / base ** (i / width)
        found += [math.sin(angle), math.cos(angle)]
    return found


def shaw_index(offset: int, limit: int) -> int:
    """Which learned vector belongs to an offset.

    Args:
        offset: Position of the key minus that of the query.
        limit: Offsets beyond it, on either side, are taken for it.

    Returns:
        A row of the table, 0 to ``2 limit``.

    Raises:
        ValueError: If ``limit`` is negative.

    Examples:
        >>> [shaw_index(offset, limit=2) for offset in (-9, -2, 0, 1, 9)]
        [0, 0, 2, 3, 4]
    """
    if limit < 0:
        raise ValueError(f"limit must be at least 0, got {limit}")
    return max(-limit, min(offset, limit)) + limit


def t5_bucket(
    offset: int, buckets: int = 32, longest: int = 128, causal: bool = True
) -> int:
    """Which learned number belongs to an offset.

    The nearer half of the buckets hold one distance each. The others grow by
    a constant factor, and all from ``longest`` on share the last.

    Args:
        offset: Position of the key minus that of the query.
        buckets: Numbers that a head learns.
        longest: The distance from which all are alike.
        causal: Whether no key comes after its query. If some do, they have
            half of the buckets for themselves.

    Returns:
        0 to ``buckets - 1``.

    Raises:
        ValueError: If ``buckets`` are too few, odd for both sides, or
            ``longest`` lies among the distances with buckets of their own.

    Examples:
        >>> [t5_bucket(-distance) for distance in (0, 15, 16, 100, 110, 10**6)]
        [0, 15, 16, 30, 30, 31]
    """
    least = 2 if causal else 4
    if buckets < least or buckets % least:
        raise ValueError(
            f"buckets must be a multiple of {least}, got {buckets}"
        )
    first = 0
    if not causal:
        buckets //= 2
        first = buckets if offset > 0 else 0
    distance = max(-offset, 0) if causal else abs(offset)

    exact = buckets // 2
    if longest <= exact:
        raise ValueError(f"longest must be above {exact}, got {longest}")
    if distance < exact:
        return first + distance
    octaves = math.log(distance / exact) / math.log(longest / exact)
    return first + min(exact + int(octaves * (buckets - exact)), buckets - 1)


def alibi_slopes(heads: int) -> list[float]:
    """What each head subtracts from a score for every token of distance.

    Args:
        heads: Attention heads. For a power of two the slopes fall by a
            constant factor to 1/256; otherwise those of the next lower power
            come first, then every second one of the next higher.

    Returns:
        A slope a head.

    Raises:
        ValueError: If ``heads`` is below 1.

    Examples:
        >>> alibi_slopes(8)
        [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]
    """
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")
    lower = 1 << heads.bit_length() - 1
    slopes = [2 ** (-8 * (h + 1) / lower) for h in range(lower)]
    between = [2 ** (-4 * (h + 1) / lower) for h in range(0, 2 * lower, 2)]
    return slopes + between[: heads - lower]


@dataclass(frozen=True)
class Seen:
    """What a key some tokens back looks like.

    Attributes:
        sinusoidal_fit: Product of its vector and the query's, 1 at distance 0.
        shaw_vector: Row of the table of Shaw and others.
        t5_bucket: Bucket of T5.
        t5_alike: Distances in that bucket; None if there is no end.
        alibi_bias: Added to its score.
        alibi_factor: By which its weight shrinks, before weights are divided
            by their sum.
    """

    sinusoidal_fit: float
    shaw_vector: int
    t5_bucket: int
    t5_alike: int | None
    alibi_bias: float
    alibi_factor: float


def seen_from(
    distance: int = 100,
    width: int = 512,
    limit: int = 16,
    buckets: int = 32,
    longest: int = 128,
    heads: int = 8,
    head: int = 5,
) -> Seen:
    """How far back a key stands, as four schemes see it.

    Args:
        distance: Tokens from the key to the query, which comes later.
        width: Values of a token, for the sinusoids.
        limit: The largest distance that Shaw and others tell apart.
        buckets: Of T5, per head.
        longest: From this distance on, T5 has one bucket.
        heads: For ALiBi's slopes.
        head: One of them, from 1, the steepest of a power of two.

    Returns:
        Each scheme's view of it.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> seen = seen_from(distance=100)
        >>> seen.t5_bucket, seen.t5_alike, seen.alibi_bias
        (30, 14, -3.125)
    """
    for name, value, least, most in (
        ("distance", distance, 0, 10**6),
        ("width", width, 2, 8192),
        ("longest", longest, 2, 10**5),
        ("heads", heads, 1, 1024),
        ("head", head, 1, heads),
    ):
        if not least <= value <= most:
            raise ValueError(f"{name} must be {least} to {most}, got {value}")
    bucket = t5_bucket(-distance, buckets, longest)
    alike = None
    if bucket < buckets - 1:
        near = range(longest)
        alike = sum(t5_bucket(-d, buckets, longest) == bucket for d in near)
    bias = -alibi_slopes(heads)[head - 1] * distance
    return Seen(
        sinusoidal_fit=_fit(distance, width),
        shaw_vector=shaw_index(-distance, limit),
        t5_bucket=bucket,
        t5_alike=alike,
        alibi_bias=bias,
        alibi_factor=math.exp(bias),
    )


def _fit(distance: float, width: int) -> float:
    here, there = sinusoidal(0, width), sinusoidal(distance, width)
    fits = [a * b for a, b in zip(here, there, strict=True)]
    return math.fsum(fits) / (width / 2)


def seen_chart(**arguments: int) -> LineChart:
    """What fades with the distance: to twice the one that is asked for.

    Args:
        arguments: Those of ``seen_from``, all of them.

    Returns:
        A line for the sinusoids' fit and one for ALiBi's factor.

    Raises:
        ValueError: As ``seen_from``.

    Examples:
        >>> import inspect
        >>> names = inspect.signature(seen_from).parameters
        >>> chart = seen_chart(**{n: p.default for n, p in names.items()})
        >>> [line.points[0] for line in chart.lines]  # both 1 at the start
        [(0, 1.0), (0, 1.0)]
    """
    here = seen_from(**arguments)
    distance, width = arguments["distance"], arguments["width"]
    slope = alibi_slopes(arguments["heads"])[arguments["head"] - 1]
    end = max(2 * distance, 16)
    grid = sorted({round(end * i / 128) for i in range(129)})
    return LineChart(
        "What fades with the distance",
        Axis("tokens back"),
        Axis("share of that at distance 0"),
        [
            Line("sinusoids", [(d, _fit(d, width)) for d in grid]),
            Line("ALiBi", [(d, math.exp(-slope * d)) for d in grid]),
        ],
        [
            Point("here", distance, here.sinusoidal_fit),
            Point("here", distance, here.alibi_factor),
        ],
    )
