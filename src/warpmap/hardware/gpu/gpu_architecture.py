"""One multiprocessor of a GPU, and how its warps hide each other's waiting.

A streaming multiprocessor (SM) has four schedulers. Each of them owns some
warps, and in each cycle it starts one instruction of one warp that need not
wait. How many it starts has three ceilings:

    slots     one instruction a cycle
    latency   what its warps can have under way, over the time that takes
    memory    what the SM's share of the bandwidth brings

Reference: Volkov, 2016,
https://www2.eecs.berkeley.edu/Pubs/TechRpts/2016/EECS-2016-143.html
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from warpmap.chart import Axis, Line, LineChart, Point
from warpmap.trace import Frame, Lanes, Mark, Span, Trace

SCHEDULERS = 4  # of an SM
MAX_WARPS = 16  # of a scheduler, 64 of an SM
REQUEST_BYTES = 128  # a load of 4 bytes by each thread of a warp
ROUNDS = 8  # simulated; the first half lets the warps fall into step

MIXES: dict[str, dict[str, int]] = {
    "Stream, one load at a time": {"loads": 1, "math": 4, "chains": 1},
    "Stream, four loads at a time": {"loads": 4, "math": 16, "chains": 4},
    "Work from registers, one chain": {"loads": 0, "math": 32, "chains": 1},
    "Work from registers, four chains": {"loads": 0, "math": 32, "chains": 4},
    "Some work a load": {"loads": 1, "math": 40, "chains": 2},
}
"""What warps do, as arguments of ``latency_hiding``."""


class Instruction(NamedTuple):
    """One instruction of a warp.

    Attributes:
        latency: Cycles from its start until its result can be used.
        needs: Instructions of the same round whose results it uses.
        memory: Whether it goes to memory.
    """

    latency: int
    needs: tuple[int, ...] = ()
    memory: bool = False


class Issue(NamedTuple):
    """An instruction that was started.

    Attributes:
        cycle: When.
        scheduler: By which scheduler.
        warp: Of which of its warps.
        step: The warp's how-manieth it is, from 0.
        done: When its result can be used.
    """

    cycle: int
    scheduler: int
    warp: int
    step: int
    done: int


def simulate(
    program: Sequence[Instruction],
    warps: int,
    rounds: int,
    request_cycles: int = 0,
    schedulers: int = SCHEDULERS,
    visit: Callable[[Issue], object] | None = None,
) -> list[Issue]:
    """Run one program on every warp of an SM.

    A warp starts its instructions in order, at most one a cycle, each when
    the results it needs are there. A round begins when all results of the
    round before are there. Of its ready warps a scheduler takes the one that
    has been ready for longest. Time jumps from one start to the next.

    Args:
        program: Instructions of a round, in order.
        warps: Warps of each scheduler.
        rounds: Times that each warp runs the program.
        request_cycles: Cycles between two requests that memory accepts from
            the SM.
        schedulers: Schedulers of the SM.
        visit: Called with each issue.

    Returns:
        All issues by cycle, and by scheduler within a cycle.

    Examples:
        >>> twice = [Instruction(4), Instruction(4, needs=(0,))]
        >>> [i.cycle for i in simulate(twice, 1, 2, schedulers=1)]
        [0, 4, 8, 12]
        >>> [i.cycle for i in simulate(twice, 2, 1, schedulers=1)]
        [0, 1, 4, 5]
    """
    # of each scheduler: since when each warp is ready, and its number
    waiting = [[(0, w) for w in range(warps)] for _ in range(schedulers)]
    steps = [[0] * warps for _ in range(schedulers)]
    done = [[[0] * len(program) for _ in range(warps)] for _ in waiting]
    turns = [(0, s) for s in range(schedulers)]  # when each acts next
    memory_free = 0
    issues = []

    while turns:
        cycle, s = heapq.heappop(turns)
        _, warp = heapq.heappop(waiting[s])
        at = steps[s][warp] % len(program)
        sent = cycle
        if program[at].memory:
            sent = max(cycle, memory_free)
            memory_free = sent + request_cycles
        results = done[s][warp]
        results[at] = sent + program[at].latency
        issue = Issue(cycle, s, warp, steps[s][warp], results[at])
        issues.append(issue)
        if visit:
            visit(issue)

        steps[s][warp] += 1
        if steps[s][warp] < rounds * len(program):
            at = steps[s][warp] % len(program)
            needed = [results[i] for i in program[at].needs] if at else results
            heapq.heappush(waiting[s], (max([cycle + 1, *needed]), warp))
        if waiting[s]:
            heapq.heappush(turns, (max(cycle + 1, waiting[s][0][0]), s))
    return issues


def mix(
    loads: int = 1,
    math: int = 4,
    chains: int = 1,
    memory_latency: int = 500,
    math_latency: int = 4,
) -> list[Instruction]:
    """A round of loads, then arithmetic on what they brought.

    Args:
        loads: Loads, none of which waits for another.
        math: Arithmetic instructions after them.
        chains: Chains that these form; each waits for the one before it in
            its chain, the first of each chain for the loads.
        memory_latency: Cycles until a load's value is there.
        math_latency: Cycles until a result can be used.

    Examples:
        >>> [i.needs for i in mix(loads=2, math=3, chains=2)]
        [(), (), (0, 1), (0, 1), (2,)]
    """
    program = [Instruction(memory_latency, memory=True)] * loads
    for i in range(math):
        first = i < chains
        needs = tuple(range(loads)) if first else (loads + i - chains,)
        program.append(Instruction(math_latency, needs))
    return program


def round_cycles(
    loads: int,
    math: int,
    chains: int,
    memory_latency: int,
    math_latency: int,
    request_cycles: int,
) -> int:
    """Cycles of a round of ``mix`` if a warp has the whole SM to itself.

    Args:
        loads: Loads of the round.
        math: Arithmetic instructions of the round.
        chains: Chains that these form.
        memory_latency: Cycles until a load's value is there.
        math_latency: Cycles until a result can be used.
        request_cycles: Cycles between two requests that memory accepts.

    Examples:
        >>> round_cycles(1, 4, 1, 500, 4, 7)
        516
    """
    cycles = 0
    if loads:
        cycles += (loads - 1) * max(1, request_cycles) + memory_latency
    if math:
        links, rest = divmod(math - 1, chains)
        cycles += links * max(math_latency, chains) + rest + math_latency
    return cycles


@dataclass(frozen=True)
class Hiding:
    """How well the warps of an SM hide each other's waiting.

    Attributes:
        issue_percent: Cycles in which a scheduler starts an instruction, as
            simulated, in percent.
        ceiling_percent: The lowest of the three ceilings, in percent.
        limited_by: Which of them it is: slots, latency or memory.
        warps_needed: Warps a scheduler from which on latency is not the
            lowest; it holds 16.
        requests_in_flight: Requests of the SM that memory has not answered
            yet, on average.
        bytes_in_flight: The bytes that these will bring, 128 each.
    """

    issue_percent: float
    ceiling_percent: float
    limited_by: str
    warps_needed: int
    requests_in_flight: float
    bytes_in_flight: float


def _check(**ranges: tuple[int, int, int]) -> None:
    for name, (value, least, most) in ranges.items():
        if not least <= value <= most:
            raise ValueError(f"{name} must be {least} to {most}, got {value}")


def issue_rate(
    program: Sequence[Instruction], warps: int, request_cycles: int = 0
) -> float:
    """Instructions that a scheduler starts a cycle, once in full swing.

    Args:
        program: Instructions of a round.
        warps: Warps of each of the four schedulers.
        request_cycles: Cycles between two requests that memory accepts.

    Examples:
        >>> issue_rate(mix(loads=0, math=8), warps=2)
        0.5
    """
    issues = simulate(program, warps, ROUNDS + 1, request_cycles)
    size, rate = len(program), 0.0
    for s in range(SCHEDULERS):
        mine = [issue for issue in issues if issue.scheduler == s]
        # whole rounds of its first warp, so that no round is cut
        begin, end = (
            issue.cycle
            for issue in mine
            if issue.warp == 0
            and issue.step in (ROUNDS // 2 * size, ROUNDS * size)
        )
        rate += sum(begin <= i.cycle < end for i in mine) / (end - begin)
    return rate / SCHEDULERS


def latency_hiding(
    warps: int = 4,
    loads: int = 1,
    math: int = 4,
    chains: int = 1,
    memory_latency: int = 500,
    math_latency: int = 4,
    request_cycles: int = 7,
) -> Hiding:
    """How busy an SM is that runs the same rounds on all its warps.

    Args:
        warps: Warps of each of the four schedulers, 1 to 16.
        loads: Loads of a round, which do not wait for each other, 0 to 16.
        math: Arithmetic instructions of a round after the loads, 0 to 64.
        chains: Independent chains that these form, 1 to 16.
        memory_latency: Cycles from a load to its value, 1 to 2000.
        math_latency: Cycles from an arithmetic instruction to its result, 1
            to 32.
        request_cycles: Cycles between two requests of 128 bytes that memory
            accepts from an SM, 0 to 100; 0 is no limit.

    Raises:
        ValueError: If a number is out of range, or the round is empty.

    Examples:
        >>> latency_hiding(warps=4).limited_by
        'latency'
        >>> latency_hiding(warps=1, loads=0, math=64).issue_percent
        25.0
    """
    _check(
        warps=(warps, 1, MAX_WARPS),
        loads=(loads, 0, 16),
        math=(math, 0 if loads else 1, 64),
        chains=(chains, 1, 16),
        memory_latency=(memory_latency, 1, 2000),
        math_latency=(math_latency, 1, 32),
        request_cycles=(request_cycles, 0, 100),
    )
    size = loads + math
    alone = round_cycles(
        loads, math, chains, memory_latency, math_latency, request_cycles
    )
    ceilings = {"slots": 1.0, "latency": warps * size / alone}
    if loads and request_cycles:
        ceilings["memory"] = size / (loads * request_cycles * SCHEDULERS)
    lowest = min(ceilings, key=lambda name: ceilings[name])
    others = min(c for name, c in ceilings.items() if name != "latency")

    program = mix(loads, math, chains, memory_latency, math_latency)
    rate = issue_rate(program, warps, request_cycles)
    # Little's law: how many come a cycle, times how long each stays
    in_flight = SCHEDULERS * rate * loads / size * memory_latency
    return Hiding(
        issue_percent=100 * rate,
        ceiling_percent=100 * ceilings[lowest],
        limited_by=lowest,
        warps_needed=-int(-others * alone // size),
        requests_in_flight=in_flight,
        bytes_in_flight=REQUEST_BYTES * in_flight,
    )


def hiding_chart(
    warps: int = 4,
    loads: int = 1,
    math: int = 4,
    chains: int = 1,
    memory_latency: int = 500,
    math_latency: int = 4,
    request_cycles: int = 7,
) -> LineChart:
    """Share of busy cycles against warps a scheduler; see ``latency_hiding``.

    Args:
        warps: Warps of each scheduler.
        loads: Loads of a round.
        math: Arithmetic instructions of a round.
        chains: Independent chains that these form.
        memory_latency: Cycles from a load to its value.
        math_latency: Cycles from an arithmetic instruction to its result.
        request_cycles: Cycles between two requests that memory accepts.

    Raises:
        ValueError: If a number is out of range, or the round is empty.

    Examples:
        >>> hiding_chart(warps=16).points[0].x
        16
    """

    def at(count: int) -> Hiding:
        return latency_hiding(
            count,
            loads,
            math,
            chains,
            memory_latency,
            math_latency,
            request_cycles,
        )

    yours = at(warps)
    found = {n: at(n) for n in sorted({1, 2, 3, 4, *range(6, 17, 2), warps})}
    return LineChart(
        "Cycles in which a scheduler starts something",
        Axis("warps of a scheduler"),
        Axis("cycles, %"),
        [
            Line("ceiling", [(n, h.ceiling_percent) for n, h in found.items()]),
            Line("simulated", [(n, h.issue_percent) for n, h in found.items()]),
        ],
        [Point("this SM", warps, yours.issue_percent)],
    )


def schedule_trace(
    warps: int = 3,
    loads: int = 1,
    math: int = 3,
    memory_latency: int = 12,
    math_latency: int = 4,
) -> Trace:
    """Two rounds on the warps of one scheduler, one frame an instruction.

    Args:
        warps: Warps of the scheduler, 1 to 8.
        loads: Loads of a round, 0 to 4.
        math: Arithmetic instructions of a round, each waiting for the one
            before, 0 to 16.
        memory_latency: Cycles from a load to its value, 1 to 40.
        math_latency: Cycles from an arithmetic instruction to its result, 1
            to 40.

    Returns:
        A lane for each warp; the last frame shows the busy cycles.

    Raises:
        ValueError: If a number is out of range, or more than 40 instructions
            would start.

    Examples:
        >>> schedule_trace(warps=1)[-1].caption
        '8 of 48 cycles started an instruction: 17%.'
    """
    _check(
        warps=(warps, 1, 8),
        loads=(loads, 0, 4),
        math=(math, 0 if loads else 1, 16),
        memory_latency=(memory_latency, 1, 40),
        math_latency=(math_latency, 1, 40),
    )
    count = 2 * warps * (loads + math)
    if count > 40:
        raise ValueError(f"warps must be fewer, got {warps}: {count} > 40")
    program = mix(loads, math, 1, memory_latency, math_latency)
    issues = simulate(program, warps, rounds=2, schedulers=1)
    end = max(issue.done for issue in issues)
    frames: Trace = []
    seen: list[Issue] = []

    def spans(warp: int, now: int) -> list[Span]:
        drawn = []
        mine = [issue for issue in seen if issue.warp == warp]
        for n, issue in enumerate(mine):
            memory = program[issue.step % len(program)].memory
            mark: Mark = "new" if issue.cycle == now else "on"
            text = "load" if memory else "add"
            drawn.append(Span(issue.cycle, issue.cycle + 1, text, mark))
            until = mine[n + 1].cycle if n + 1 < len(mine) else issue.done
            drawn.append(Span(issue.cycle + 1, until, "", "wait"))
        return [span for span in drawn if span.start < span.end]

    def lanes(now: int | None) -> Lanes:
        rows = [
            (f"warp {w}", spans(w, -1 if now is None else now))
            for w in range(warps)
        ]
        busy = [Span(i.cycle, i.cycle + 1, "", "on") for i in seen]
        return Lanes([*rows, ("busy", busy)], "cycles", end, now)

    def visit(issue: Issue) -> None:
        seen.append(issue)
        what = "a load" if program[issue.step % len(program)].memory else "math"
        frames.append(
            Frame(
                f"Cycle {issue.cycle}: warp {issue.warp} starts {what}; its "
                f"result is there at {issue.done}.",
                lanes(issue.cycle),
            )
        )

    simulate(program, warps, rounds=2, schedulers=1, visit=visit)
    share = len(issues) / end
    frames.append(
        Frame(
            f"{len(issues)} of {end} cycles started an instruction: "
            f"{share:.0%}.",
            lanes(None),
        )
    )
    return frames
