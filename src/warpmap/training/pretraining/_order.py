"""The order of a training run as a pure function of the position in it."""

from collections.abc import Sequence

from warpmap.training.pretraining._stable_hash import stable_hash


def temperature_counts(
    sizes: Sequence[int], temperature: float, total: int
) -> list[int]:
    """How many rows of each source go into one epoch of a mixture.

    Args:
        sizes: Rows of each source.
        temperature: 1 keeps the shares of ``sizes``; above 1 small sources
            gain: shares are those of ``size ** (1 / temperature)``.
        total: Rows of the epoch.

    Returns:
        One count a source. They sum to ``total``; a count above its size
        means that rows repeat within the epoch.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> temperature_counts([900, 90, 10], temperature=1, total=100)
        [90, 9, 1]
        >>> temperature_counts([900, 90, 10], temperature=2, total=100)
        [70, 22, 8]
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes must be 1 or more each, got {list(sizes)}")
    if not temperature > 0 or total < 0:
        raise ValueError(
            "temperature must be above 0, and total not negative, got "
            f"{temperature} and {total}"
        )
    largest = max(sizes)  # scaled by it, a small temperature cannot overflow
    weights = [(size / largest) ** (1 / temperature) for size in sizes]
    exact = [total * w / sum(weights) for w in weights]
    counts = [int(x) for x in exact]
    # largest remainders: no other whole numbers of this sum come closer
    order = sorted(range(len(sizes)), key=lambda i: counts[i] - exact[i])
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def permuted(i: int, n: int, key: str) -> int:
    """Where place ``i`` lands in a shuffle of ``n`` places, without a table.

    Four Feistel rounds permute the numbers of ``2 * half`` bits, at most four
    times too many; who lands outside goes round again until inside.

    Args:
        i: A place, 0 to ``n - 1``.
        n: Places to shuffle.
        key: Names the shuffle: another key, another order.

    Raises:
        ValueError: If ``i`` is no place.

    Examples:
        >>> [permuted(i, 8, "epoch 0") for i in range(8)]
        [0, 1, 6, 5, 4, 3, 2, 7]
    """
    if not 0 <= i < n:
        raise ValueError(f"i must be 0 to {n - 1}, got {i}")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for turn in range(4):
            mixed = stable_hash(f"{key}/{turn}/{right}") & mask
            left, right = right, left ^ mixed
        i = left << half | right
        if i < n:
            return i


def draw(
    position: int, sizes: Sequence[int], counts: Sequence[int], seed: int = 0
) -> tuple[int, int]:
    """The row at one position of an endless training run.

    A pure function: to resume, know the position. Each epoch has its own
    order and exactly ``counts`` rows of each source. Each source gives all
    of its rows, in an order of their own, before it gives any again.

    Args:
        position: Rows read before this one; row ``r`` of step ``s`` has
            position ``s * batch + r``.
        sizes: Rows of each source.
        counts: Rows of each source in one epoch.
        seed: Names the run.

    Returns:
        The number of the source, and of the row in it.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> [draw(i, sizes=[6, 2], counts=[3, 1]) for i in range(4)]
        [(0, 5), (1, 1), (0, 4), (0, 3)]
        >>> [draw(i, sizes=[6, 2], counts=[3, 1]) for i in range(4, 8)]
        [(0, 1), (1, 0), (0, 0), (0, 2)]
    """
    if position < 0:
        raise ValueError(f"position must not be negative, got {position}")
    if len(sizes) != len(counts) or min(sizes, default=0) < 1:
        raise ValueError(
            "sizes must be 1 or more, one for each of counts, got "
            f"{list(sizes)} and {list(counts)}"
        )
    if min(counts) < 0 or sum(counts) < 1:
        raise ValueError(f"counts must have a positive sum, got {counts}")
    epoch, place = divmod(position, sum(counts))
    place = permuted(place, sum(counts), f"{seed}/epoch {epoch}")
    source = 0
    while place >= counts[source]:
        place -= counts[source]
        source += 1
    given = epoch * counts[source] + place  # rows this source gave before
    turn, row = divmod(given, sizes[source])
    key = f"{seed}/source {source}/pass {turn}"
    return source, permuted(row, sizes[source], key)
