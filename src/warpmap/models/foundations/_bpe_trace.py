"""Byte-pair encoding is trained on one sentence, merge by merge."""

from collections import Counter
from collections.abc import Sequence

from warpmap.models.foundations.tokenization import PIECE, Pair, train_bpe
from warpmap.trace import Cell, Frame, Grid, Trace


def bpe_trace(
    text: str = "she sells sea shells by the sea shore, "
    "the shells she sells are sea shells for sure",
    merges: int = 12,
) -> Trace:
    """Train on a short text with :func:`train_bpe` and keep every merge of it.

    Args:
        text: What to train on, 1 to 16 distinct pieces.
        merges: Most merges to learn, 1 to 38.

    Returns:
        The tokens of each distinct piece after each merge, and under them the
        tokens learned so far. A dot is a space.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> for frame in bpe_trace("sea shells, sea shore", merges=2):
        ...     print(frame.caption)
        21 bytes, 5 distinct pieces: each byte is a token.
        "·" and "s" meet 3 times: token 256 is "·s". 18 tokens are left.
        "e" and "a" meet 2 times: token 257 is "ea". 16 tokens are left.
    """
    counts = Counter(PIECE.findall(text))
    if not 1 <= len(counts) <= 16:
        raise ValueError(
            f"text must have 1 to 16 distinct pieces, got {len(counts)}"
        )
    if not 1 <= merges <= 38:
        raise ValueError(f"merges must be 1 to 38, got {merges}")
    spelt = [bytes([byte]) for byte in range(256)]
    trace: Trace = []

    def add(caption: str, words: Sequence[list[int]]) -> None:
        newest = max(len(spelt) - 1, 256)
        rows = [
            (
                f"{_shown(piece.encode())} \N{MULTIPLICATION SIGN} {count}",
                [
                    Cell(_shown(spelt[i]), "new" if i == newest else "")
                    for i in word
                ],
            )
            for (piece, count), word in zip(counts.items(), words, strict=True)
        ]
        learned = [
            Cell(_shown(spelt[i]), "new" if i == newest else "on")
            for i in range(256, len(spelt))
        ]
        learned += [Cell()] * (merges - len(learned))
        trace.append(Frame(caption, Grid(rows), Grid([("learned", learned)])))

    def record(pair: Pair, count: int, words: Sequence[list[int]]) -> None:
        left, right = (spelt[i] for i in pair)
        spelt.append(left + right)
        add(
            f'"{_shown(left)}" and "{_shown(right)}" meet {count} times: token '
            f'{len(spelt) - 1} is "{_shown(left + right)}". '
            f"{sum(map(_times, words, counts.values()))} tokens are left.",
            words,
        )

    bytewise = [list(piece.encode("utf-8")) for piece in counts]
    add(
        f"{len(text.encode())} bytes, {len(counts)} distinct pieces: "
        "each byte is a token.",
        bytewise,
    )
    train_bpe([text], 257 + merges, record)
    return trace


def _times(word: list[int], count: int) -> int:
    return len(word) * count


def _shown(token: bytes) -> str:
    try:
        text = token.decode("utf-8")
    except UnicodeDecodeError:
        return token.hex(" ").upper()  # part of a character
    return "".join(
        c if c.isprintable() else repr(c)[1:-1]
        for c in text.replace(" ", "\N{MIDDLE DOT}")
    )
