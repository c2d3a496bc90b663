"""Plans of what to keep and what to compute again, in a chain of layers.

A layer that runs with a graph keeps its *inside*, its input included. A layer
that runs without one keeps nothing.

    segments    each keeps its input; calls each layer twice, but those of the
                last segment once
    nested      segments within segments: c inputs are kept at once. If no
                layer is called more than r + 1 times, that is enough for a
                chain of (c + r)! / (c! r!) layers

Reference: Griewank and Walther, 2000, https://doi.org/10.1145/347837.347846
"""

import math
from collections.abc import Sequence

MOST = 256
"""Layers that a plan is made for."""


def calls(layers: int, slots: int) -> int:
    """Fewest calls of layers in a forward and a backward pass.

    Args:
        layers: Of a chain, 1 to ``MOST``.
        slots: Inputs that may be kept at once, besides the first.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> [calls(16, slots) for slots in (0, 1, 2, 3, 15)]
        [136, 61, 49, 43, 31]
    """
    if not 1 <= layers <= MOST:
        raise ValueError(f"layers must be 1 to {MOST}, got {layers}")
    if slots < 0:
        raise ValueError(f"slots must be at least 0, got {slots}")
    c = slots + 1
    r = next(r for r in range(layers) if math.comb(c + r, c) >= layers)
    # r + 1 calls of each, less what the layers that need fewer save
    return (r + 1) * layers - math.comb(c + r, c + 1)


def split(layers: int, slots: int) -> int:
    """After how many layers the next input is kept.

    Then the rest is done and reversed with one slot less, and at last the
    layers before, with all slots again.

    Examples:
        >>> split(16, slots=3), split(16, slots=0)
        (5, 15)
    """
    calls(layers, slots)  # checks them
    if slots == 0:  # no input to go on from: all but one, from the start
        return layers - 1
    return min(
        range(1, layers),
        key=lambda k: k + calls(layers - k, slots - 1) + calls(k, slots),
    )


def schedule(layers: int, slots: int) -> list[tuple[str, int]]:
    """What happens, in order, with at most ``slots`` more inputs kept.

    Returns:
        Pairs of what, and with which layer: ``keep`` its input, ``free`` that,
        ``call`` it without a graph, ``reverse`` it: call it with a graph, and
        go back through it.

    Examples:
        >>> print(*(f"{what} {i}" for what, i in schedule(3, 0)), sep=", ")
        keep 0, call 0, call 1, reverse 2, call 0, reverse 1, reverse 0, free 0
        >>> sum(what in ("call", "reverse") for what, _ in schedule(16, 3))
        43
    """
    calls(layers, slots)  # checks them
    steps: list[tuple[str, int]] = [("keep", 0)]

    def go(start: int, n: int, slots: int, is_kept: bool) -> None:
        if n == 1:
            steps.append(("reverse", start))
            return
        k = split(n, slots)
        if not is_kept:
            steps.append(("keep", start))
        steps.extend(("call", start + i) for i in range(k))
        go(start + k, n - k, slots - 1, False)
        go(start, k, slots, True)
        if not is_kept:
            steps.append(("free", start))

    go(0, layers, slots, True)
    return [*steps, ("free", 0)]


def segments_peak(
    inputs: Sequence[int], insides: Sequence[int], sizes: Sequence[int]
) -> int:
    """Most bytes at a time, with a segment's input kept for each before it.

    Args:
        inputs: Bytes of each layer's input.
        insides: Bytes of each layer's inside, its input included.
        sizes: Layers in each segment.

    Examples:
        >>> segments_peak([2] * 4, [20] * 4, [2, 2])
        42
    """
    start = kept = most = 0
    for size in sizes:
        most = max(most, kept + sum(insides[start : start + size]))
        kept += inputs[start]
        start += size
    return most


def best_segments(inputs: Sequence[int], insides: Sequence[int]) -> list[int]:
    """Layers in each segment, so that the peak is smallest.

    Guesses the peak by bisection. Whether a guess can be met is a question for
    dynamic programming: the fewest bytes kept before each layer.

    Args:
        inputs: Bytes of each layer's input.
        insides: Bytes of each layer's inside, its input included.

    Raises:
        ValueError: If there are no layers, or not as many of both.

    Examples:
        >>> best_segments([2] * 9, [2] * 9)
        [4, 3, 2]
        >>> best_segments([2] * 9, [40] * 9)
        [1, 1, 1, 1, 1, 1, 1, 1, 1]
    """
    n = len(inputs)
    if not n or n != len(insides):
        raise ValueError(
            f"expected as many inputs as insides, got {n} and {len(insides)}"
        )

    def within(peak: int) -> list[int]:
        kept, cut = [0.0] + [math.inf] * n, [0] * (n + 1)
        for end in range(1, n + 1):
            inside = 0
            for start in reversed(range(end)):
                inside += insides[start]
                if inside > peak:
                    break
                now = kept[start] + inputs[start]
                if kept[start] + inside <= peak and now < kept[end]:
                    kept[end], cut[end] = now, start
        sizes, end = [], n
        while end and kept[n] < math.inf:
            sizes.append(end - cut[end])
            end = cut[end]
        return sizes[::-1]

    low, high = 0, sum(insides)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if within(middle) else (middle + 1, high)
    return within(high)
