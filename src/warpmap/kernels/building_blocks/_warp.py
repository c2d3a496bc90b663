"""A warp of 32 lanes, simulated: what each lane asks, and what it is told.

A lane's program is a generator. It yields what it calls in CUDA with a mask,
``x = yield shfl_xor(FULL, x, 16)`` for ``__shfl_xor_sync``, and waits until
all lanes that the mask names have made the same call. What CUDA leaves
undefined does not pass unseen here: it stops with an error that says who
waits for whom, or gives ``UNDEFINED``, which spoils all that is computed from
it.

Reference: NVIDIA, PTX ISA, shfl.sync, vote.sync, match.sync,
https://docs.nvidia.com/cuda/parallel-thread-execution/
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

LANES = 32
FULL = 0xFFFFFFFF
"""The mask that names all lanes: lane ``i`` is bit ``i``."""

UNDEFINED = float("nan")
"""What a lane reads from a lane that takes no part."""


class WarpError(RuntimeError):
    """Lanes that break CUDA's rules; on a GPU they hang, or err in silence."""


@dataclass(frozen=True)
class Call:
    """What a lane asks of its warp.

    Attributes:
        name: The function, without underscores and ``_sync``.
        mask: Lanes that take part.
        value: What this lane brings along.
        where: Lane, distance or bits to flip, for a shuffle.
        width: Lanes of the pieces that a shuffle stays in.
    """

    name: str
    mask: int
    value: Any
    where: int = 0
    width: int = LANES

    def __post_init__(self) -> None:
        if not 0 < self.mask <= FULL:
            raise ValueError(f"mask must name lanes, got {self.mask:#x}")
        if not 0 <= self.where < LANES:
            raise ValueError(f"where must be 0 to 31, got {self.where}")
        if self.width not in (1, 2, 4, 8, 16, 32):
            raise ValueError(
                f"width must be a power of two up to 32, got {self.width}"
            )

    def __str__(self) -> str:
        return f"{self.name}(0x{self.mask:08x})"


Result = TypeVar("Result")
Program = Generator[Call, Any, Result]
"""What a lane does; ends with the lane's result."""


def shfl(mask: int, value: Any, lane: int, width: int = LANES) -> Call:
    """The value of a lane by its number.

    Examples:
        >>> def program(lane, x):
        ...     return (yield shfl(FULL, x, 3))
        >>> run_warp(program, range(100, 132))[:2]
        [103, 103]
    """
    return Call("shfl", mask, value, lane % width, width)


def shfl_up(mask: int, value: Any, delta: int, width: int = LANES) -> Call:
    """The value of the lane ``delta`` below; the lowest keep their own.

    Examples:
        >>> def program(lane, x):
        ...     return (yield shfl_up(FULL, x, 2))
        >>> run_warp(program, range(32))[:5]
        [0, 1, 0, 1, 2]
    """
    return Call("shfl_up", mask, value, delta, width)


def shfl_down(mask: int, value: Any, delta: int, width: int = LANES) -> Call:
    """The value of the lane ``delta`` above; the highest keep their own.

    Examples:
        >>> def program(lane, x):
        ...     return (yield shfl_down(FULL, x, 2))
        >>> run_warp(program, range(32))[-4:]
        [30, 31, 30, 31]
    """
    return Call("shfl_down", mask, value, delta, width)


def shfl_xor(mask: int, value: Any, flip: int, width: int = LANES) -> Call:
    """The value of the lane whose number differs in the bits of ``flip``.

    Examples:
        >>> def program(lane, x):
        ...     return (yield shfl_xor(FULL, x, 1))
        >>> run_warp(program, range(32))[:4]
        [1, 0, 3, 2]
    """
    return Call("shfl_xor", mask, value, flip, width)


def ballot(mask: int, vote: Any) -> Call:
    """A mask of the lanes whose vote is true.

    Examples:
        >>> def program(lane, x):
        ...     return (yield ballot(FULL, x > 29))
        >>> hex(run_warp(program, range(32))[0])
        '0xc0000000'
    """
    return Call("ballot", mask, bool(vote))


def match_any(mask: int, value: Any) -> Call:
    """A mask of the lanes that bring the same value as this one.

    Examples:
        >>> def program(lane, x):
        ...     return (yield match_any(FULL, x % 16))
        >>> hex(run_warp(program, range(32))[0])
        '0x10001'
    """
    return Call("match_any", mask, value)


def match_all(mask: int, value: Any) -> Call:
    """All lanes of the mask if they bring one value, else 0.

    Examples:
        >>> def program(lane, x):
        ...     return (yield match_all(FULL, x // 32))
        >>> hex(run_warp(program, range(32))[0])
        '0xffffffff'
    """
    return Call("match_all", mask, value)


def source_lane(call: Call, lane: int) -> int:
    """The lane that a shuffle reads; its own where that lies outside.

    Examples:
        >>> source_lane(shfl_down(FULL, 0, 4), 3)
        7
        >>> source_lane(shfl_down(FULL, 0, 4, width=4), 3)
        3
    """
    first = lane - lane % call.width
    if call.name == "shfl":
        return first + call.where
    if call.name == "shfl_up":
        return lane - call.where if lane - call.where >= first else lane
    there = lane ^ call.where
    if call.name == "shfl_down":
        there = lane + call.where
    # only the end of the piece counts: xor may reach back into an earlier one
    return there if there < first + call.width else lane


def run_warp(
    program: Callable[..., Program[Result]],
    *columns: Sequence[Any],
    record: Callable[[Mapping[int, Call], Mapping[int, Any]], object]
    | None = None,
) -> list[Result]:
    """Run a program on every lane of a warp.

    A lane that has returned has exited: nobody waits for it any more, and
    whoever reads from it gets ``UNDEFINED``.

    Args:
        program: Called as ``program(lane, *arguments of the lane)``.
        columns: An argument for each lane; 1 to 32 of them, as the last warp
            of a block may be short.
        record: Called with each exchange: the calls by lane, and what the
            lanes are told.

    Returns:
        What each lane returned.

    Raises:
        ValueError: If there are too few or too many lanes.
        WarpError: If a lane's mask does not name the lane itself, or lanes
            wait for others that wait elsewhere.

    Examples:
        >>> def halves(lane, x):
        ...     if lane < 16:
        ...         x = yield shfl_xor(FULL, x, 1)
        ...     else:
        ...         x = yield ballot(FULL, x)
        ...     return x
        >>> try:
        ...     run_warp(halves, range(32))
        ... except WarpError as error:
        ...     print(error)
        no lane can go on
        lanes 0-15 wait in shfl_xor(0xffffffff)
        lanes 16-31 wait in ballot(0xffffffff)
    """
    sizes = [len(column) for column in columns]
    if not sizes or not 0 < sizes[0] <= LANES or len(set(sizes)) > 1:
        raise ValueError(f"columns must hold 1 to 32 values, got {sizes}")
    lanes = [
        program(lane, *given)
        for lane, given in enumerate(zip(*columns, strict=True))
    ]
    results: list[Any] = [None] * len(lanes)
    waiting: dict[int, Call] = {}

    def resume(lane: int, answer: Any) -> None:
        try:
            waiting[lane] = lanes[lane].send(answer)
        except StopIteration as end:
            waiting.pop(lane, None)
            results[lane] = end.value

    for lane in range(len(lanes)):
        resume(lane, None)
    while waiting:
        calls = _meeting(waiting)
        answers = _answers(calls)
        if record:
            record(calls, answers)
        for lane, answer in answers.items():
            resume(lane, answer)
    return results


def _meeting(waiting: Mapping[int, Call]) -> dict[int, Call]:
    """The calls of lanes that wait for nobody but each other."""
    for lane, call in waiting.items():
        if not call.mask >> lane & 1:
            raise WarpError(f"{call} is called by lane {lane}, not in its mask")
    for call in waiting.values():
        calls = {i: c for i, c in waiting.items() if call.mask >> i & 1}
        if len({(c.name, c.mask) for c in calls.values()}) == 1:
            return calls
    groups: dict[str, list[int]] = {}
    for lane, call in waiting.items():
        groups.setdefault(str(call), []).append(lane)
    stuck = [f"lanes {_span(who)} wait in {c}" for c, who in groups.items()]
    raise WarpError("no lane can go on\n" + "\n".join(stuck))


def _span(lanes: Sequence[int]) -> str:
    first, last = min(lanes), max(lanes)
    if len(lanes) > 2 and len(lanes) == last - first + 1:
        return f"{first}-{last}"
    return " ".join(map(str, sorted(lanes)))


def _answers(calls: Mapping[int, Call]) -> dict[int, Any]:
    """What each lane of a meeting is told."""
    values = {lane: call.value for lane, call in calls.items()}
    (name,) = {call.name for call in calls.values()}

    def lanes_with(value: Any) -> int:
        return sum(1 << lane for lane, v in values.items() if v == value)

    if name == "ballot":
        return dict.fromkeys(calls, lanes_with(True))
    if name == "match_any":
        return {lane: lanes_with(value) for lane, value in values.items()}
    if name == "match_all":
        same = {lanes_with(value) for value in values.values()}
        return dict.fromkeys(calls, same.pop() if len(same) == 1 else 0)
    return {
        lane: values.get(source_lane(call, lane), UNDEFINED)
        for lane, call in calls.items()
    }
