"""Philox-4x32: random numbers as a function of a counter and a key.

Nothing is carried from one number to the next, so any of them can be computed
anywhere, in any order, and once more later.

Reference: Salmon, Moraes, Dror and Shaw, 2011, "Parallel random numbers: as
easy as 1, 2, 3", https://doi.org/10.1145/2063384.2063405
"""

from typing import Any

WORD = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85  # of the golden ratio, and of sqrt(3) - 1


def philox4x32(
    counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any], rounds: int = 10
) -> tuple[Any, Any, Any, Any]:
    """Four random words for a counter of four words and a key of two.

    Args:
        counter: Words from 0 to 2^32 - 1: ints, or arrays of 64-bit integers.
        key: The same.
        rounds: How often the words are mixed.

    Returns:
        Four words, as the counter's.

    Examples:
        >>> [hex(word) for word in philox4x32((0, 0, 0, 0), (0, 0))]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(rounds):
        # both halves of a product go to the other pair; the high one, which
        # is well mixed, meets a word and the key there
        first, second = MULTIPLIERS[0] * a, MULTIPLIERS[1] * c
        a, b = (second >> 32) & WORD ^ b ^ k0, second & WORD
        c, d = (first >> 32) & WORD ^ d ^ k1, first & WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return a, b, c, d
