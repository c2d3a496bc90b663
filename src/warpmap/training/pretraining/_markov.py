"""Text from a source that is known, so that the best loss is known too.

Each token is drawn by the two before it. Such text settles: everywhere in it a
pair of neighbours is as likely as anywhere else. With these likelihoods the
loss of the best predictor is a sum, whatever predicts.

Reference: Shannon, 1948, A Mathematical Theory of Communication
"""

import math
import random
from bisect import bisect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate


class MarkovSource:
    """A source that looks back two tokens.

    Args:
        table: For each pair of tokens the probabilities of the next one.

    Raises:
        ValueError: If a row is no distribution, or no row follows a pair.

    Examples:
        >>> turns = {(0, 0): [0, 1], (0, 1): [1, 0], (1, 0): [0.5, 0.5]}
        >>> source = MarkovSource(turns)
        >>> {pair: round(p, 3) for pair, p in source.pairs.items()}
        {(0, 0): 0.2, (0, 1): 0.4, (1, 0): 0.4}
        >>> [round(source.best_loss(context=n), 3) for n in (0, 1, 2, 3)]
        [0.673, 0.382, 0.277, 0.277]
    """

    def __init__(
        self, table: Mapping[tuple[int, int], Sequence[float]]
    ) -> None:
        """Find how likely each pair is."""
        for (a, b), row in table.items():
            if min(row) < 0 or abs(sum(row) - 1) > 1e-9:
                raise ValueError(f"row {a, b} must sum to 1, got {row}")
            for c, p in enumerate(row):
                if p and (b, c) not in table:
                    raise ValueError(f"table has no row for {b, c}")
        self.table = dict(table)
        self._sums = {pair: [*accumulate(row)] for pair, row in table.items()}

        # what one more token leaves as it is; half of the old distribution
        # is kept each time, so that a cycle cannot swing for ever
        self.pairs, moved = dict.fromkeys(table, 1 / len(table)), 1.0
        while moved > 1e-15:
            after = {pair: p / 2 for pair, p in self.pairs.items()}
            for (a, b), p in self.pairs.items():
                for c, chance in enumerate(table[a, b]):
                    if chance:
                        after[b, c] += p * chance / 2
            moved = max(abs(after[x] - self.pairs[x]) for x in after)
            self.pairs = after

    def best_loss(self, context: int) -> float:
        """Lowest expected loss of who sees ``context`` tokens, in nats.

        From 2 tokens on it is the entropy rate, which nothing gets below.

        Raises:
            ValueError: If ``context`` is negative.
        """
        if context < 0:
            raise ValueError(f"context must be at least 0, got {context}")
        # all that look alike to the predictor share one distribution
        seen: dict[tuple[int, ...], dict[int, float]] = {}
        for pair, p in self.pairs.items():
            row = seen.setdefault(
                pair[max(0, 2 - context) :], defaultdict(float)
            )
            for c, chance in enumerate(self.table[pair]):
                row[c] += p * chance
        return sum(
            -p * math.log(p / sum(row.values()))
            for row in seen.values()
            for p in row.values()
            if p
        )

    def floor(self, length: int) -> float:
        """Lowest expected loss on documents of ``length`` tokens, in nats.

        A little above the entropy rate: the second token of a document is
        predicted from one, and the first from nothing, so it does not count.
        """
        if length < 2:
            raise ValueError(f"length must be at least 2, got {length}")
        later = (length - 2) * self.best_loss(context=2)
        return (self.best_loss(context=1) + later) / (length - 1)

    def text(self, length: int, draw: random.Random) -> list[int]:
        """A document of at least two tokens, cut from endless text."""
        a, b = draw.choices([*self.pairs], [*self.pairs.values()])[0]
        tokens = [a, b]
        while len(tokens) < length:
            sums = self._sums[a, b]
            a, b = b, bisect(sums, draw.random(), hi=len(sums) - 1)
            tokens.append(b)
        return tokens


def branching_source(branches: int = 4, likely: float = 0.85) -> MarkovSource:
    """A token allows ``branches`` successors; the one before it picks one.

    The vocabulary has ``branches ** 2`` tokens, all equally frequent. Token
    ``b`` goes on with ``branches * b + j``, modulo the vocabulary, and the
    token before it says which ``j`` is likely.

    Args:
        branches: Successors of a token.
        likely: Probability of the one that is picked.

    Examples:
        >>> source = branching_source()
        >>> [round(source.best_loss(context=n), 3) for n in (0, 1, 2)]
        [2.773, 1.386, 0.588]
    """
    vocab, rest = branches**2, (1 - likely) / (branches - 1)
    table = {}
    for a in range(vocab):
        for j in range(branches):
            row, b = [0.0] * vocab, (branches * a + j) % vocab
            for k in range(branches):
                picked = k == (a // branches + b) % branches
                row[(branches * b + k) % vocab] = likely if picked else rest
            table[a, b] = row
    return MarkovSource(table)
