"""Time is walked cycle by cycle, and counted; Little's law bounds the rest."""

import itertools
import random

import pytest
from kernel_checks import mutant

from warpmap.hardware.gpu import gpu_architecture
from warpmap.hardware.gpu.gpu_architecture import (
    MAX_WARPS,
    MIXES,
    SCHEDULERS,
    Instruction,
    hiding_chart,
    issue_rate,
    latency_hiding,
    mix,
    round_cycles,
    schedule_trace,
    simulate,
)
from warpmap.hardware.performance.occupancy_and_tail_effect import (
    PARTITIONS,
    SMS,
)


def walk(program, warps, rounds, request_cycles, schedulers):
    """Look at every warp of every scheduler in every cycle.

    A board keeps the cycle in which each result arrives. Nothing is skipped,
    and a warp is ready if all that it needs can be found on the board.
    """
    size = len(program)
    everyone = [(s, w) for s in range(schedulers) for w in range(warps)]
    board = {warp: {} for warp in everyone}
    ready_since = {}
    next_request = 0
    found = []
    cycle = 0
    while any(len(board[warp]) < rounds * size for warp in everyone):
        for s in range(schedulers):
            ready = []
            for w in range(warps):
                arrived = board[s, w]
                step = len(arrived)
                if step == rounds * size:
                    continue
                first = step - step % size
                if step == first:
                    needed = range(first - size, first) if first else ()
                else:
                    needed = [first + i for i in program[step % size].needs]
                if all(arrived[i] <= cycle for i in needed):
                    ready_since.setdefault((s, w, step), cycle)
                    ready.append((ready_since[s, w, step], w, step))
            if not ready:
                continue
            _, w, step = min(ready)
            instruction = program[step % size]
            leaves = cycle
            if instruction.memory:
                while leaves < next_request:
                    leaves += 1
                next_request = leaves + request_cycles
            board[s, w][step] = leaves + instruction.latency
            found.append((cycle, s, w, step, leaves + instruction.latency))
        cycle += 1
    return found


def random_cases(count):
    rng = random.Random(count)
    for _ in range(count):
        program = []
        for i in range(rng.randint(1, 6)):
            needs = tuple(sorted(rng.sample(range(i), rng.randint(0, i))))
            memory = rng.random() < 0.4
            latency = rng.randint(10, 60) if memory else rng.randint(1, 8)
            program.append(Instruction(latency, needs, memory))
        yield (
            program,
            rng.randint(1, 5),
            rng.randint(1, 4),
            rng.choice([0, 1, 3, 9]),
            rng.randint(1, 4),
        )


def walks_agree(run):
    return all(
        [tuple(issue) for issue in run(*case)] == walk(*case)
        for case in random_cases(80)
    )


def test_every_issue_agrees_with_a_walk_through_all_cycles():
    assert walks_agree(simulate)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        # two instructions of a scheduler in one cycle
        ("(max(cycle + 1, waiting[s][0][0]), s)", "(waiting[s][0][0], s)"),
        ("max([cycle + 1, *needed])", "cycle + 1"),  # nobody waits
        ("if at else results", "if at else []"),  # rounds overlap
        ("[results[i] for i in program[at].needs]", "results"),
        ("max(cycle, memory_free)", "cycle"),  # memory takes all at once
        ("= sent + request_cycles", "= cycle + request_cycles"),
        ("results[at] = sent +", "results[at] = cycle +"),
        ("_, warp = heapq.heappop(waiting[s])", "_, warp = waiting[s].pop()"),
    ],
)
def test_the_walk_catches_a_wrong_scheduler(right, wrong, tmp_path):
    module = mutant(gpu_architecture, right, wrong, tmp_path)
    assert not walks_agree(module.simulate)


def test_a_visitor_sees_every_issue_and_changes_none():
    for case in random_cases(20):
        *first, schedulers = case
        seen = []
        told = simulate(*first, schedulers=schedulers, visit=seen.append)
        assert told == seen == simulate(*first, schedulers=schedulers)


@pytest.mark.parametrize("math_latency", [1, 4, 6])
def test_chains_of_arithmetic_keep_littles_law(math_latency):
    # under way are warps * chains instructions, each for the latency
    for warps in (1, 2, 3, 5, 8):
        for chains in (1, 2, 4):
            if math_latency % chains:
                continue  # a chain's turn is then not a whole cycle
            program = mix(0, 24 * chains, chains, math_latency=math_latency)
            alone = round_cycles(0, 24 * chains, chains, 1, math_latency, 0)
            got = issue_rate(program, warps)
            ceiling = min(1, warps * 24 * chains / alone)
            # a round's end may leave a slot empty where they are nearly full
            exact = warps * chains <= math_latency - chains
            assert got == pytest.approx(ceiling, rel=1e-9 if exact else 0.01)
            law = min(1, warps * chains / math_latency)
            assert got == pytest.approx(law, rel=0.15)


def random_mixes(count):
    rng = random.Random(count)
    for _ in range(count):
        yield {
            "warps": rng.randint(1, 16),
            "loads": rng.randint(0, 6),
            "math": rng.randint(1, 12),
            "chains": rng.randint(1, 4),
            "memory_latency": rng.choice([20, 50, 200, 500]),
            "math_latency": rng.choice([2, 4, 6]),
            "request_cycles": rng.choice([0, 1, 7, 12]),
        }


def test_no_mix_passes_its_ceiling_or_stays_far_below():
    ratios = []
    for arguments in random_mixes(80):
        found = latency_hiding(**arguments)
        ratio = found.issue_percent / found.ceiling_percent
        # requests that waited before the window may be answered in it
        assert 0.6 < ratio < 1.02, arguments
        ratios.append(ratio)
    # near the knee warps meet by chance; elsewhere the ceiling is the rate
    assert sorted(ratios)[len(ratios) // 4] > 0.97


def test_ceilings_worked_by_hand():
    # 4 warps start 5 instructions every 500 + 4 * 4 cycles
    few = latency_hiding(warps=4, loads=1, math=4)
    assert few.limited_by == "latency"
    assert few.issue_percent == pytest.approx(100 * 4 * 5 / 516)
    # memory takes a request every 7 cycles from four schedulers
    many = latency_hiding(warps=16, loads=4, math=16, chains=4)
    assert many.limited_by == "memory"
    assert many.issue_percent == pytest.approx(100 * 20 / (4 * 7 * 4))
    busy = latency_hiding(warps=16, loads=0, math=32)
    assert (busy.limited_by, busy.issue_percent) == ("slots", 100)


def test_warps_needed_is_where_latency_stops_to_be_the_ceiling():
    for arguments in random_mixes(30):
        needed = latency_hiding(**arguments).warps_needed
        for warps in {needed - 1, needed + 1} & set(range(1, MAX_WARPS + 1)):
            limit = latency_hiding(**{**arguments, "warps": warps}).limited_by
            if warps < needed:
                assert limit == "latency"
            elif warps > needed:
                assert limit != "latency"


def test_requests_in_flight_agree_with_a_count_of_cycles():
    # Little's law says how many are under way; here they are counted
    for loads, math in ((1, 4), (2, 10), (4, 16)):
        program = mix(loads, math, memory_latency=200)
        size = len(program)
        issues = simulate(program, 3, 30, request_cycles=0)
        begins = {i.step: i.cycle for i in issues if i[1:3] == (0, 0)}
        begin, end = begins[10 * size], begins[26 * size]  # whole rounds
        under_way = sum(
            max(0, min(i.done, end) - max(i.cycle, begin))
            for i in issues
            if program[i.step % size].memory
        )
        counted = under_way / (end - begin)
        found = latency_hiding(
            3, loads, math, memory_latency=200, request_cycles=0
        )
        assert found.requests_in_flight == pytest.approx(counted, rel=0.02)
        assert found.bytes_in_flight == 128 * found.requests_in_flight


def test_a_round_alone_takes_its_closed_form():
    rng = random.Random(0)
    for _ in range(200):
        loads, math = rng.randint(0, 5), rng.randint(1, 12)
        chains, latency = rng.randint(1, 5), rng.randint(1, 9)
        gap, memory = rng.choice([0, 1, 4]), rng.randint(5, 60)
        program = mix(loads, math, chains, memory, latency)
        issues = simulate(program, 1, 1, gap, schedulers=1)
        took = max(issue.done for issue in issues)
        expected = round_cycles(loads, math, chains, memory, latency, gap)
        assert took == expected


def test_loads_of_one_warp_stand_in_for_warps():
    one_each = latency_hiding(warps=16, loads=1, math=4)
    four_each = latency_hiding(warps=4, loads=4, math=16, chains=4)
    assert four_each.issue_percent > 0.9 * one_each.issue_percent


def test_sizes_are_those_of_the_occupancy_page():
    assert SCHEDULERS == PARTITIONS
    assert SMS["9.0"].warps == MAX_WARPS * SCHEDULERS


TABLE_OF_THE_PAGE = {
    "Stream, one load at a time": (1.0, 3.9, 15.5, "latency"),
    "Stream, four loads at a time": (3.7, 14.8, 17.9, "memory"),
    "Work from registers, one chain": (25.0, 100, 100, "slots"),
    "Work from registers, four chains": (91.4, 100, 100, "slots"),
    "Some work a load": (7.1, 28.2, 96.6, "slots"),
}


@pytest.mark.parametrize("name", MIXES)
def test_table_of_the_page(name):
    found = [latency_hiding(warps, **MIXES[name]) for warps in (1, 4, 16)]
    percents = [round(f.issue_percent, 1) for f in found]
    assert (*percents, found[-1].limited_by) == TABLE_OF_THE_PAGE[name]


def test_warps_that_the_page_says_are_needed():
    one, four = list(MIXES.values())[:2]
    assert latency_hiding(**one).warps_needed == 19
    assert latency_hiding(**four).warps_needed == 5


def test_the_pages_share_of_an_sm():
    # 4.8 TB/s over 132 SMs at 1.98 GHz: 18.4 bytes, 128 in 7 cycles
    share = 4.8e12 / 132 / 1.98e9
    assert share == pytest.approx(18.4, abs=0.05)
    assert round(128 / share) == 7


def test_presets_are_arguments():
    for preset in MIXES.values():
        assert latency_hiding(**preset).issue_percent > 0


def test_chart_holds_this_sm_and_the_ceiling_is_never_below():
    chart = hiding_chart(warps=5, loads=2, math=10)
    ceiling, simulated = (dict(line.points) for line in chart.lines)
    assert list(ceiling) == [1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16]
    assert all(simulated[n] <= 1.02 * ceiling[n] for n in ceiling)
    (point,) = chart.points
    assert simulated[point.x] == point.y


def test_trace_ends_with_the_count():
    frames = schedule_trace(warps=3)
    issues = simulate(mix(1, 3, 1, 12, 4), 3, 2, schedulers=1)
    assert len(frames) == len(issues) + 1
    end = max(issue.done for issue in issues)
    assert f"{len(issues)} of {end} cycles" in frames[-1].caption
    lanes = dict(frames[-1].picture.lanes)
    assert sum(s.end - s.start for s in lanes["busy"]) == len(issues)
    for w in range(3):
        spans = lanes[f"warp {w}"]
        # nothing overlaps, and nothing is left open
        for left, right in itertools.pairwise(spans):
            assert left.end <= right.start
        starts = [s.start for s in spans if s.text]
        assert starts == [i.cycle for i in issues if i.warp == w]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: latency_hiding(warps=17), "warps must be 1 to 16, got 17"),
        (lambda: latency_hiding(loads=-1), "loads must be 0 to 16, got -1"),
        (lambda: latency_hiding(loads=0, math=0), "math must be 1 to 64"),
        (lambda: latency_hiding(chains=0), "chains"),
        (lambda: latency_hiding(memory_latency=0), "memory_latency"),
        (lambda: hiding_chart(math_latency=99), "math_latency .* got 99"),
        (lambda: hiding_chart(request_cycles=-1), "request_cycles"),
        (lambda: schedule_trace(warps=9), "warps must be 1 to 8, got 9"),
        (lambda: schedule_trace(warps=8, math=16), "warps must be fewer"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
