"""Two ways to cut a word with a given vocabulary: Unigram and WordPiece.

References: Kudo, 2018, https://arxiv.org/abs/1804.10959, and Wu et al., 2016,
https://arxiv.org/abs/1609.08144
"""

import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet


def viterbi(text: str, log_probs: Mapping[str, float]) -> list[str]:
    """Cut ``text`` into the tokens with the largest product of probabilities.

    Best cut up to each position, from the best cuts before it: as many steps
    as the length of the text times that of the longest token, though the cuts
    number ``2 ** (len(text) - 1)``.

    Args:
        text: What to cut, a word or a sentence.
        log_probs: Logarithm of each token's probability.

    Raises:
        ValueError: If no sequence of tokens spells ``text``.

    Examples:
        >>> costs = {"un": -3, "fold": -4, "unf": -2, "old": -2, "o": -9}
        >>> viterbi("unfold", costs)
        ['unf', 'old']
    """
    longest = max(map(len, log_probs), default=0)
    best = [0.0] + [-math.inf] * len(text)
    starts = [0] * (len(text) + 1)
    for end in range(1, len(text) + 1):
        for start in range(max(0, end - longest), end):
            score = best[start] + log_probs.get(text[start:end], -math.inf)
            if score > best[end]:
                best[end], starts[end] = score, start
    if best[-1] == -math.inf:
        raise ValueError(f"text must be spelt by tokens, got {text!r}")
    tokens: list[str] = []
    end = len(text)
    while end:
        tokens.append(text[starts[end] : end])
        end = starts[end]
    return tokens[::-1]


def longest_match(word: str, vocabulary: AbstractSet[str]) -> list[str]:
    """Cut ``word`` as WordPiece does: each time the longest token that fits.

    Tokens inside a word begin with ``##``. A word that gets stuck is
    ``[UNK]`` as a whole, since nothing is taken back.

    Examples:
        >>> vocabulary = {"un", "unf", "##fold", "##old", "##o"}
        >>> longest_match("unfold", vocabulary)
        ['unf', '##old']
        >>> longest_match("unfolds", vocabulary)
        ['[UNK]']
    """
    tokens: list[str] = []
    start = 0
    while start < len(word):
        mark = "##" if start else ""
        for end in range(len(word), start, -1):
            if mark + word[start:end] in vocabulary:
                tokens.append(mark + word[start:end])
                start = end
                break
        else:
            return ["[UNK]"]
    return tokens
