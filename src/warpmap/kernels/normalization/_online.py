"""The state of an online softmax: what a stretch of a row comes to.

Two states merge into that of both stretches. The merge is associative and
commutative, so a row may be cut anywhere, and read in any order.

    max     the largest score of the stretch
    sum     of exp(score - max)
    value   of exp(score - max) * value, where every score weighs a value

References: Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867;
Rabe and Staats, 2021, https://arxiv.org/abs/2112.05682, for the values
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import exp, inf, isfinite

from warpmap.trace import Cell, Frame, Grid, Trace


@dataclass(frozen=True)
class State:
    """A stretch of a row; the empty one by default.

    Attributes:
        max: The largest score.
        sum: Of exp(score - max), over the scores.
        value: Of exp(score - max) * value; by the sum, it is their average.

    Examples:
        >>> State(max=3.0, sum=1.0)  # one score alone
        State(max=3.0, sum=1.0, value=0.0)
    """

    max: float = -inf
    sum: float = 0.0
    value: float = 0.0


def merge(a: State, b: State) -> State:
    """The state of two stretches together.

    Both are brought to the larger maximum, then added.

    Examples:
        >>> merge(State(1.0, 1.0), State(1.0, 1.0)).sum
        2.0
        >>> merge(State(), State(7.0, 1.5)) == State(7.0, 1.5)
        True
    """
    top = max(a.max, b.max)
    if top == -inf:
        return State()  # nothing to rescale, and inf - inf is no number
    of_a, of_b = exp(a.max - top), exp(b.max - top)
    return State(
        top, a.sum * of_a + b.sum * of_b, a.value * of_a + b.value * of_b
    )


Record = Callable[[int, Sequence[State]], object]
"""Hears which score was read, and the states of the lanes after it."""


def online_softmax(
    scores: Sequence[float], lanes: int = 1, record: Record | None = None
) -> list[float]:
    """Softmax of a row that is read twice: for the state, for the result.

    Args:
        scores: The row.
        lanes: How many states are kept; score ``i`` goes to ``i % lanes``.
        record: Called after every score of the first reading, then once with
            ``len(scores)`` and the merged state alone.

    Raises:
        ValueError: If ``lanes`` is below 1.
        ZeroDivisionError: If all scores are -inf; the kernel gives nan there.

    Examples:
        >>> online_softmax([2.0, 2.0, 2.0, 2.0], lanes=2)
        [0.25, 0.25, 0.25, 0.25]
    """
    if lanes < 1:
        raise ValueError(f"lanes must be at least 1, got {lanes}")
    record = record or (lambda i, states: None)
    states = [State()] * lanes
    for i, score in enumerate(scores):
        lane = i % lanes
        states[lane] = merge(states[lane], State(score, 1.0))
        record(i, states)
    row = reduce(merge, states)
    record(len(scores), [row])
    return [exp(score - row.max) / row.sum for score in scores]


def online_trace(scores: str = "1 3 2 2 6 1 4 5", lanes: int = 2) -> Trace:
    """The states of the lanes, score after score, and the result.

    Args:
        scores: Up to 16 numbers, with spaces between them.
        lanes: States that take turns, 1 to 8.

    Raises:
        ValueError: If ``scores`` are none, too many or no numbers, or there
            are more than 8 ``lanes``.

    Examples:
        >>> online_trace("1 3", lanes=1)[1].caption
        '3 is more than 1: the sum shrinks by e^-2 = 0.14, then 1 is added.'
    """
    try:
        row = [float(score) for score in scores.split()]
    except ValueError:
        row = []
    if not 1 <= len(row) <= 16 or not all(isfinite(score) for score in row):
        raise ValueError(f"scores must be 1 to 16 numbers, got {scores!r}")
    if not 1 <= lanes <= 8:
        raise ValueError(f"lanes must be 1 to 8, got {lanes}")

    frames: Trace = []
    before = [State()] * lanes

    def picture(i: int, results: Sequence[float] = ()) -> Grid:
        read = [
            Cell(f"{score:g}", "on" if at == i else "")
            for at, score in enumerate(row)
        ]
        written = [Cell(f"{y:.2g}", "new") for y in results]
        blank = [Cell()] * (len(row) - len(written))
        return Grid([("scores", read), ("softmax", written + blank)])

    def states_of(states: Sequence[State], changed: int) -> Grid:
        return Grid(
            [
                (
                    f"lane {n}" if len(states) == lanes else "row",
                    [
                        Cell("" if s == State() else f"{s.max:g}"),
                        Cell(f"{s.sum:.3g}", "new" if n == changed else ""),
                    ],
                )
                for n, s in enumerate(states)
            ],
            columns=["max", "sum"],
        )

    def show(i: int, states: Sequence[State]) -> None:
        if i == len(row):
            if lanes > 1:
                top = f"{states[0].max:g}"
                says = f"The lanes merge: their sums are brought to {top}."
                frames.append(Frame(says, picture(i), states_of(states, 0)))
            return
        lane = i % lanes
        old = before[lane]
        whose = f"of lane {lane} " if lanes > 1 else ""
        if old == State():
            says = f"The state {whose}begins with {row[i]:g} and the sum 1."
        elif row[i] > old.max:
            by = old.max - row[i]
            says = (
                f"{row[i]:g} is more than {old.max:g}: the sum {whose}shrinks "
                f"by e^{by:g} = {exp(by):.2g}, then 1 is added."
            )
        else:
            by = row[i] - old.max
            says = (
                f"{row[i]:g} is no more than {old.max:g}: "
                f"e^{by:g} = {exp(by):.2g} is added to the sum {whose}".strip()
                + "."
            )
        before[:] = states
        frames.append(Frame(says, picture(i), states_of(states, lane)))

    results = online_softmax(row, lanes, show)
    last = reduce(merge, before)
    says = "The row is read once more, now that its maximum and sum are known."
    frames.append(
        Frame(says, picture(len(row), results), states_of([last], -1))
    )
    return frames
