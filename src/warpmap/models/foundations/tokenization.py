"""Tokenizers: text in, numbers out, and back without loss.

A byte-level BPE tokenizer knows the 256 bytes, so that it can spell any text,
and merges: pairs of tokens that stood side by side most often in the text it
was trained on, each a token of its own.

    train     count each distinct piece once, then merge; an index says which
              pieces a merge touches, and a heap which pair comes next
    encode    the merges, oldest first, inside each piece; pieces are cached
    decode    join the bytes

Reference: Sennrich et al., 2016, https://arxiv.org/abs/1508.07909
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path

Pair = tuple[int, int]

PIECE = re.compile(
    r"(?:[^\w\s]|[ _])?[^\W\d_]+"  # letters, and one sign before them
    r"| ?\d{1,3}"  # at most three digits
    r"| ?(?:[^\w\s]|_)+"  # other signs
    r"|\s+(?!\S)"  # white space, but for the last before a word
    r"|\s+"
)
"""Pieces that no token crosses; together they are the text."""

FORMAT = "warpmap byte-level BPE 1"
CACHED_PIECES = 1 << 20


class BytePairTokenizer:
    """Byte-level BPE: token 0 to 255 a byte, then one token for each merge.

    The last token, ``end_of_text``, stands between documents and has no bytes.

    Args:
        merges: Pairs of tokens, oldest first. Merge ``i`` makes token
            ``256 + i``.

    Attributes:
        merges: The same, as a tuple.
        tokens: The bytes of each token.

    Raises:
        ValueError: If a merge uses a token that is not made yet, or makes one
            that exists.

    Examples:
        >>> tokenizer = BytePairTokenizer([(104, 105)])
        >>> tokenizer.encode("hi!")
        [256, 33]
        >>> tokenizer.vocab_size, tokenizer.end_of_text
        (258, 257)
    """

    def __init__(self, merges: Iterable[Pair]) -> None:
        """Spell the tokens and check that each is new."""
        self.merges: tuple[Pair, ...] = tuple((a, b) for a, b in merges)
        self.tokens = [bytes([byte]) for byte in range(256)]
        known = set(self.tokens)
        for made, pair in enumerate(self.merges, start=256):
            if not 0 <= min(pair) <= max(pair) < made:
                raise ValueError(
                    f"merges must use earlier tokens: {made} is made of {pair}"
                )
            token = self.tokens[pair[0]] + self.tokens[pair[1]]
            if token in known:
                raise ValueError(f"merges must differ: {token!r} is made twice")
            known.add(token)
            self.tokens.append(token)
        self.end_of_text = len(self.tokens)
        self.tokens.append(b"")
        self.vocab_size = len(self.tokens)
        self._made = {pair: i for i, pair in enumerate(self.merges, start=256)}
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token numbers of ``text``; never ``end_of_text``.

        Raises:
            ValueError: If ``text`` has half a surrogate pair: it has no UTF-8.

        Examples:
            >>> tokenizer = train_bpe(["to be or not to be"], 260)
            >>> [tokenizer.tokens[i] for i in tokenizer.encode("not to be")]
            [b'n', b'o', b't', b' ', b'to', b' be']
        """
        ids: list[int] = []
        cache = self._cache
        for piece in PIECE.findall(text):
            part = cache.get(piece)
            if part is None:
                part = self._encode_piece(piece)
                if len(cache) < CACHED_PIECES:
                    cache[piece] = part
            ids += part
        return ids

    def _encode_piece(self, piece: str) -> list[int]:
        ids = list(piece.encode("utf-8"))
        never = self.end_of_text
        while len(ids) > 1:
            # tokens are numbered in the order in which they were learned
            made, pair = min(
                (self._made.get(pair, never), pair) for pair in pairwise(ids)
            )
            if made == never:
                break
            ids = _merge(ids, pair, made)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; bytes that are no UTF-8 become U+FFFD.

        Raises:
            ValueError: If a number is not a token's.

        Examples:
            >>> tokenizer = BytePairTokenizer([])
            >>> tokenizer.decode(tokenizer.encode("né"))
            'né'
            >>> tokenizer.decode(tokenizer.encode("né")[:2])
            'n\ufffd'
        """
        ids = list(ids)
        wrong = [i for i in ids if not 0 <= i < self.vocab_size]
        if wrong:
            raise ValueError(
                f"ids must be 0 to {self.vocab_size - 1}, got {wrong[0]}"
            )
        return b"".join([self.tokens[i] for i in ids]).decode(errors="replace")

    def save(self, path: str | Path) -> None:
        """Write the merges as JSON.

        Examples:
            >>> from tempfile import TemporaryDirectory
            >>> with TemporaryDirectory() as folder:
            ...     BytePairTokenizer([(104, 105)]).save(f"{folder}/hi.json")
            ...     BytePairTokenizer.load(f"{folder}/hi.json").merges
            ((104, 105),)
        """
        data = {
            "format": FORMAT,
            "pattern": PIECE.pattern,
            "merges": self.merges,
        }
        Path(path).write_text(json.dumps(data) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "BytePairTokenizer":
        """Read what ``save`` has written.

        Raises:
            ValueError: If the file is no such JSON, cuts text by another
                pattern, or its merges are not possible.
        """
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{path}: expected a file of format {FORMAT!r}")
        if data.get("pattern") != PIECE.pattern:
            raise ValueError(
                f"{path}: pattern is {data.get('pattern')!r}, but this version "
                f"cuts text by {PIECE.pattern!r}"
            )
        merges = data.get("merges")
        if not isinstance(merges, list) or not all(map(_is_pair, merges)):
            raise ValueError(f"{path}: merges must be a list of pairs")
        return cls(merges)


def _is_pair(pair: object) -> bool:
    return (
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(token) is int for token in pair)
    )


def _merge(ids: list[int], pair: Pair, made: int) -> list[int]:
    """Replace ``pair`` by ``made`` wherever it stands, left to right."""
    left, right = pair
    merged = []
    i, last = 0, len(ids) - 1
    while i <= last:
        token = ids[i]
        if token == left and i < last and ids[i + 1] == right:
            merged.append(made)
            i += 2
        else:
            merged.append(token)
            i += 1
    return merged


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    record: Callable[[Pair, int, Sequence[list[int]]], object] | None = None,
) -> BytePairTokenizer:
    """Learn the merges that shorten ``texts`` most, one after the other.

    The pair that occurs most often goes first; of equals, the one with the
    smallest numbers. So the order of the texts makes no difference.

    Args:
        texts: Documents; read once.
        vocab_size: Tokens to make, the 256 bytes and ``end_of_text`` included.
            There are fewer if no pair is left that occurs twice.
        record: Hears of each merge: the pair, how often it occurred, and the
            tokens of each distinct piece after it. The pieces are in the order
            of their first occurrence.

    Raises:
        ValueError: If ``vocab_size`` is below 257, or ``texts`` is one text.

    Examples:
        >>> tokenizer = train_bpe(["hug hugs hugging"], 260)
        >>> tokenizer.tokens[256:]
        [b'hu', b'hug', b' hug', b'']
    """
    if vocab_size < 257:
        raise ValueError(
            "vocab_size must be at least 257, the bytes and end_of_text, "
            f"got {vocab_size}"
        )
    if isinstance(texts, str):
        raise ValueError("texts must be several, got one; put it in a list")
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(PIECE.findall(text))
    words = [list(piece.encode("utf-8")) for piece in counts]
    weights = list(counts.values())

    pairs: defaultdict[Pair, int] = defaultdict(int)  # how often each occurs
    where: defaultdict[Pair, list[int]] = defaultdict(list)  # in which words
    for i, word in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += weights[i]
            where[pair].append(i)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapify(heap)

    merges: list[Pair] = []
    while heap and 257 + len(merges) < vocab_size:
        count, pair = heappop(heap)
        if -count != pairs[pair]:  # out of date: it has lost occurrences
            heappush(heap, (-pairs[pair], pair))
            continue
        if -count < 2:
            break
        made = 256 + len(merges)
        merges.append(pair)

        grown: set[Pair] = set()
        for i in set(where.pop(pair)):
            old, weight = words[i], weights[i]
            new = _merge(old, pair, made)
            if len(new) == len(old):
                continue  # an earlier merge took the pair apart
            words[i] = new
            for each in pairwise(old):
                pairs[each] -= weight
            for each in pairwise(new):
                pairs[each] += weight
                if made in each:
                    where[each].append(i)
                    grown.add(each)
        for each in grown:
            heappush(heap, (-pairs[each], each))
        if record:
            record(pair, -count, words)
    return BytePairTokenizer(merges)
