"""What the house models must beat: compressors, and counting."""

import gzip
import lzma
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence


def gzip_bits(texts: Mapping[str, str]) -> float:
    """Bits a byte of all texts one after the other, in one gzip stream."""
    data = _joined(texts)
    return 8 * len(gzip.compress(data, 9, mtime=0)) / len(data)


def xz_bits(
    texts: Mapping[str, str], known: Mapping[str, str] | None = None
) -> float:
    """The same by xz; with ``known``, what ``texts`` add to an archive of it.

    The dictionary is larger than the library, so all that is known is used.
    """
    data = _joined(texts)
    before = _joined(known or {})
    filters = [
        {
            "id": lzma.FILTER_LZMA2,
            "preset": 9 | lzma.PRESET_EXTREME,
            "dict_size": 1 << 27,
        }
    ]
    both = len(lzma.compress(before + data, filters=filters))
    alone = len(lzma.compress(before, filters=filters)) if before else 0
    return 8 * (both - alone) / len(data)


def _joined(texts: Mapping[str, str]) -> bytes:
    return "".join(texts.values()).encode("utf-8")


class NGrams:
    """A model that counts: absolute discounting, interpolated.

    ``p(w | h) = max(c(h w) - d, 0) / c(h) + d u(h) / c(h) p(w | h')``, where
    ``u(h)`` different tokens followed ``h``, and ``h'`` is ``h`` without its
    first token; below single tokens all are equally likely.

    Args:
        documents: Tokens of each, to count.
        order: Tokens of the longest n-gram.
        vocab_size: Tokens that may come.
        discount: ``d``, taken from every count.

    Reference: Ney, Essen and Kneser, 1994, On structuring probabilistic
    dependences in stochastic language modelling

    Examples:
        >>> model = NGrams([[0, 1, 0, 1]], order=2, vocab_size=2)
        >>> round(model.probability([0], 1), 4)
        0.8125
    """

    def __init__(
        self,
        documents: Sequence[Sequence[int]],
        order: int,
        vocab_size: int,
        discount: float = 0.75,
    ) -> None:
        """Count every n-gram up to ``order``."""
        self.order, self.vocab_size, self.d = order, vocab_size, discount
        self.counts: list[Counter[int]] = [Counter() for _ in range(order)]
        for document in documents:
            for n in range(1, order + 1):
                self.counts[n - 1].update(self._keys(document, n))
        # of each history: how often it was followed, by how many tokens
        self.followed: list[dict[int, list[int]]] = []
        for counts in self.counts:
            known: dict[int, list[int]] = {}
            for key, count in counts.items():
                entry = known.setdefault(key // vocab_size, [0, 0])
                entry[0] += count
                entry[1] += 1
            self.followed.append(known)

    def _keys(self, tokens: Sequence[int], n: int) -> Iterator[int]:
        """Each n-gram as one number, its tokens being the digits."""
        V, key, top = self.vocab_size, 0, self.vocab_size**n
        for i, token in enumerate(tokens):
            key = (key * V + token) % top
            if i >= n - 1:
                yield key

    def probability(self, history: Sequence[int], token: int) -> float:
        """How likely a token is after others.

        Args:
            history: Tokens before it; the last ``order - 1`` count.
            token: The next.
        """
        p = 1 / self.vocab_size
        for n in range(1, min(self.order, len(history) + 1) + 1):
            key = 0
            for digit in history[len(history) - n + 1 :]:
                key = key * self.vocab_size + digit
            total, distinct = self.followed[n - 1].get(key, (0, 0))
            if total:
                count = self.counts[n - 1][key * self.vocab_size + token]
                p = (
                    max(count - self.d, 0) / total
                    + self.d * distinct / total * p
                )
        return p
