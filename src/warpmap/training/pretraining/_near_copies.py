"""Near duplicates: MinHash finds the pairs, Jaccard similarity decides.

Classical MinHash permutes all shingles once for each value of a signature.
Here each shingle is hashed once. Its high bits choose one of the bins, and
each bin keeps the smallest hash that falls into it.

    work     one hash a shingle, instead of 128
    misses   1 pair of 6500 at similarity 0.7; none is dropped by mistake

Reference: Broder, 1997, https://doi.org/10.1109/SEQUEN.1997.666900
Reference: Li, Owen and Zhang, 2012,
https://papers.nips.cc/paper/2012/hash/eaa32c96f620053cf442ad32258076b9-Abstract.html
Reference: Shrivastava and Li, 2014,
https://proceedings.mlr.press/v32/shrivastava14.html
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from warpmap.chart import Axis, Line, LineChart, Point
from warpmap.training.pretraining._stable_hash import stable_hash

BANDS, ROWS = 32, 4  # values of a signature: their product
WORD = re.compile(r"\w+")


def shingles(text: str, words: int = 5) -> frozenset[int]:
    """Hashes of all runs of ``words`` words; white space does not count.

    Raises:
        ValueError: If ``words`` is below 1.

    Examples:
        >>> len(shingles("to be or not to be or not", words=3))
        4
    """
    if words < 1:
        raise ValueError(f"words must be 1 or more, got {words}")
    found = WORD.findall(text)
    runs = zip(*(found[i:] for i in range(words)), strict=False)
    texts = set(map(" ".join, runs)) or {" ".join(found)}
    return frozenset(map(stable_hash, texts))


def jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    """Shared shingles over all shingles; 1 for two empty sets.

    Examples:
        >>> jaccard(frozenset({1, 2, 3}), frozenset({2, 3, 4}))
        0.5
    """
    shared = len(a & b)
    total = len(a) + len(b) - shared
    return shared / total if total else 1.0


def signature(hashes: frozenset[int], bins: int = BANDS * ROWS) -> list[int]:
    """The smallest hash in each of ``bins`` bins of the hashes.

    Two sets agree in a bin with the probability of their Jaccard similarity.
    An empty bin borrows from the next full one. That too is a minimum: in the
    order that starts at this bin and goes round.

    Args:
        hashes: 64-bit numbers, not empty.
        bins: Values to return, a power of two.

    Raises:
        ValueError: If ``bins`` is not a power of two, or ``hashes`` is empty.

    Examples:
        >>> a, b = frozenset({5, 2**63 + 1}), frozenset({5, 7, 2**63})
        >>> signature(a, 2) == [5, 2**63 + 1], signature(b, 2) == [5, 2**63]
        (True, True)
    """
    if bins < 1 or bins & (bins - 1):
        raise ValueError(f"bins must be a power of two, got {bins}")
    if not hashes:
        raise ValueError("hashes must not be empty: no shingle, no minimum")
    shift = 65 - bins.bit_length()  # the high bits choose the bin
    # from the largest down, so that the smallest is written last
    least = {h >> shift: h for h in sorted(hashes, reverse=True)}
    value = least[min(least)]  # after the last bin comes the first
    values = []
    for i in reversed(range(bins)):
        value = least.get(i, value)
        values.append(value)
    return values[::-1]


@dataclass(frozen=True)
class Detection:
    """What a choice of bands and rows finds.

    Attributes:
        found_percent: Chance that a pair as similar as this is compared (%).
        missed_one_in: Pairs of this similarity, of which one is missed.
        half_found: Similarity at which half of all pairs are compared.
        hashes: Values of a signature.
        signature_bytes: Bytes of a signature, at 8 a value.
    """

    found_percent: float
    missed_one_in: float | None
    half_found: float
    hashes: int
    signature_bytes: int


def detection(
    similarity: float = 0.7, bands: int = BANDS, rows: int = ROWS
) -> Detection:
    """How likely a pair agrees in all rows of at least one band.

    Args:
        similarity: Jaccard similarity of the pair, 0 to 1.
        bands: Groups of bins; each is looked up in a table of its own.
        rows: Bins in a group; all of them must agree.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> [round(detection(s).found_percent, 2) for s in (0.1, 0.5, 0.7)]
        [0.32, 87.32, 99.98]
    """
    if not 0 <= similarity <= 1:
        raise ValueError(f"similarity must be 0 to 1, got {similarity}")
    if not 1 <= bands <= 10_000:
        raise ValueError(f"bands must be 1 to 10000, got {bands}")
    if not 1 <= rows <= 1000:
        raise ValueError(f"rows must be 1 to 1000, got {rows}")
    missed = (1 - similarity**rows) ** bands
    return Detection(
        found_percent=100 * (1 - missed),
        missed_one_in=1 / missed if missed > 1e-300 else None,
        half_found=(1 - 0.5 ** (1 / bands)) ** (1 / rows),
        hashes=bands * rows,
        signature_bytes=8 * bands * rows,
    )


def detection_chart(similarity: float, bands: int, rows: int) -> LineChart:
    """The chance over all similarities, and the pair asked for.

    Examples:
        >>> detection_chart(0.5, bands=1, rows=1).lines[0].points[25]
        (0.5, 50.0)
    """
    grid = [i / 50 for i in range(51)]
    curve = [(s, detection(s, bands, rows).found_percent) for s in grid]
    here = detection(similarity, bands, rows).found_percent
    return LineChart(
        "Pairs that are compared",
        Axis("Jaccard similarity"),
        Axis("found (%)"),
        [Line(f"{bands} bands of {rows}", curve)],
        [Point("this pair", similarity, here)],
    )


def near_copies(
    texts: Mapping[str, str],
    threshold: float = 0.7,
    bands: int = BANDS,
    rows: int = ROWS,
) -> dict[str, str]:
    """Near duplicates, each with an earlier text that is kept.

    A shared band makes a pair worth comparing; the shingles of both decide.
    So nothing is dropped without cause, and a few pairs may be missed.

    Args:
        texts: A text for each name; the first of a kind is kept.
        threshold: Jaccard similarity from which a text is a near duplicate.
        bands: Groups of bins in which two texts may agree.
        rows: Bins in a group; ``bands * rows`` is a power of two.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> text = " ".join(map(str, range(100)))
        >>> texts = {"a": text, "b": text + " more", "c": text[::-1]}
        >>> near_copies(texts)
        {'b': 'a'}
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0, to 1, got {threshold}")
    if bands < 1 or rows < 1:
        raise ValueError(f"bands and rows must be 1 or more: {bands}, {rows}")
    sets: dict[str, frozenset[int]] = {}  # of texts that were compared with
    tables: defaultdict[tuple[int, ...], list[str]] = defaultdict(list)
    copies: dict[str, str] = {}
    for name, text in texts.items():
        own = shingles(text)
        values = signature(own, bands * rows)
        keys = [(b, *values[b * rows : (b + 1) * rows]) for b in range(bands)]
        alike = {other: None for key in keys for other in tables.get(key, ())}
        for other in alike:  # in their order, so that runs repeat
            if other not in sets:
                sets[other] = shingles(texts[other])
            if jaccard(own, sets[other]) >= threshold:
                copies[name] = other
                break
        else:
            for key in keys:
                tables[key].append(name)
    return copies
