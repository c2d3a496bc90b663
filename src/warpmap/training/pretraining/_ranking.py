"""Strengths of models from who beat whom: the Bradley-Terry model.

Reference: Newman, 2023, https://arxiv.org/abs/2207.00076 (the iteration)
"""

import math
from collections.abc import Sequence


def bradley_terry(
    wins: Sequence[Sequence[float]], rounds: int = 10_000
) -> list[float]:
    """Strengths that make what happened likeliest.

    Player ``i`` beats ``j`` with probability
    ``1 / (1 + exp(strength[j] - strength[i]))``.

    Args:
        wins: ``wins[i][j]``: how often ``i`` beat ``j``; a tie is half a win
            for both.
        rounds: Most rounds of the iteration.

    Returns:
        Natural logarithms with mean 0. Times ``400 / log(10)`` they are Elo
        points.

    Raises:
        ValueError: If ``wins`` is no square of numbers, if some group never
            lost to the rest, so that no finite strengths fit, or if ``rounds``
            were not enough.

    Examples:
        >>> [round(s, 6) for s in bradley_terry([[0, 3], [1, 0]])]
        [0.549306, -0.549306]
    """
    players = range(len(wins))
    if not wins or any(len(row) != len(wins) for row in wins):
        raise ValueError("wins must be a square, one row a player")
    if any(not 0 <= w < math.inf for row in wins for w in row):
        raise ValueError("wins must be finite and at least 0")
    for table in (wins, list(zip(*wins, strict=True))):
        reached, todo = {0}, [0]
        while todo:
            beaten = {j for j in players if table[todo[-1]][j]} - reached
            todo.pop()
            reached |= beaten
            todo += beaten
        if len(reached) < len(wins):
            raise ValueError(
                "wins must link every player to every other by a chain of "
                "wins: otherwise a strength is infinite"
            )
    if len(wins) == 1:
        return [0.0]
    strength = [1.0] * len(wins)
    for _ in range(rounds):
        largest = 0.0
        for i in players:
            won = lost = 0.0
            for j in players:
                if i != j:
                    both = strength[i] + strength[j]
                    won += wins[i][j] * strength[j] / both
                    lost += wins[j][i] / both
            change = won / lost / strength[i]
            largest = max(largest, abs(math.log(change)))
            strength[i] *= change
        logs = [math.log(s) for s in strength]
        mean = math.fsum(logs) / len(logs)
        strength = [math.exp(log - mean) for log in logs]
        if largest < 1e-13:
            return [log - mean for log in logs]
    raise ValueError(f"rounds must be more than {rounds}: not settled yet")
