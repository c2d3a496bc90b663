"""Formulas are checked by sending the messages, one by one.

The simulator knows nothing of formulas. It moves blocks of data, notes whose
numbers each block contains, and adds up what crosses every link.
"""

import itertools
import math
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from warpmap.hardware.network.communication_cost import (
    ALGORITHMS,
    RATES,
    Cost,
    bus_factor,
    communication_chart,
    communication_cost,
    fit,
    ring_pass,
)

ROOT = Path(__file__).parents[3]
CHUNK = 10  # bytes
WORLDS = [*range(2, 18), 31, 32]
NETWORKS = ["switch", "ring"]


# schedules: rounds of messages (from, to, blocks, whether they are added)


def ring_gather(p):
    return [
        [(r, (r + 1) % p, [(r - step) % p], False) for r in range(p)]
        for step in range(p - 1)
    ]


def doubling_gather(p):
    rounds, held = [], 1
    while held < p:
        new = min(held, p - held)
        rounds.append(
            [
                (r, (r + held) % p, [(r - i) % p for i in range(new)], False)
                for r in range(p)
            ]
        )
        held += new
    return rounds


def backwards(rounds):
    """An all-gather run backwards is a reduce-scatter."""
    return [
        [(to, start, blocks, True) for start, to, blocks, _ in messages]
        for messages in reversed(rounds)
    ]


def tree(p):
    up, d = [], 1
    whole = list(range(p))
    while d < p:
        up.append([(r, r - d, whole, True) for r in range(d, p, 2 * d)])
        d *= 2
    down = [
        [(to, start, whole, False) for start, to, _, _ in messages]
        for messages in reversed(up)
    ]
    return up + down


def exchange(p):
    return [
        [(r, r ^ 1 << k, list(range(p)), True) for r in range(p)]
        for k in range(p.bit_length() - 1)
    ]


def pairwise(p):
    return [
        [(r, (r + d) % p, [(r, (r + d) % p)], False) for r in range(p)]
        for d in range(1, p)
    ]


def bruck(p):
    """A block moves by 2^k in round k if that is a digit of its way."""
    at = {(a, b): a for a in range(p) for b in range(p)}
    rounds = []
    for k in range((p - 1).bit_length()):
        bags = defaultdict(list)
        for (a, b), where in at.items():
            if (b - a) % p >> k & 1:
                bags[where].append((a, b))
                at[a, b] = (where + (1 << k)) % p
        rounds.append(
            [(r, (r + (1 << k)) % p, bags[r], False) for r in range(p)]
        )
    return rounds


SCHEDULES = {
    "all-reduce": {
        "ring": lambda p: backwards(ring_gather(p)) + ring_gather(p),
        "halving + doubling": lambda p: (
            backwards(doubling_gather(p)) + doubling_gather(p)
        ),
        "recursive doubling": exchange,
        "tree": tree,
    },
    "all-gather": {"ring": ring_gather, "doubling": doubling_gather},
    "reduce-scatter": {
        "ring": lambda p: backwards(ring_gather(p)),
        "halving": lambda p: backwards(doubling_gather(p)),
    },
    "all-to-all": {"pairwise": pairwise, "Bruck": bruck},
}


# the simulator


def path(start, to, p, network):
    """Links that a message crosses: its ports, or wires of the ring."""
    if network == "switch":
        return [("out", start), ("in", to)]
    clockwise = (to - start) % p <= p // 2
    step = 1 if clockwise else -1
    stations = [start]
    while stations[-1] != to:
        stations.append((stations[-1] + step) % p)
    return list(itertools.pairwise(stations))


def simulate(collective, p, network, rounds):
    """Send everything, check who ends up with what, and count."""
    if collective == "all-to-all":
        held = [{(r, to): {r} for to in range(p)} for r in range(p)]
    elif collective == "all-gather":
        held = [{r: {r}} for r in range(p)]
    else:
        held = [{block: {r} for block in range(p)} for r in range(p)]

    steps = in_a_row = sent = 0
    for messages in rounds:
        load = defaultdict(int)
        for ends in (0, 1):
            ranks = [message[ends] for message in messages]
            assert len(set(ranks)) == len(ranks), "one message at a time"
        arriving = [
            (to, {b: set(held[start][b]) for b in blocks}, added)
            for start, to, blocks, added in messages
        ]
        for start, to, blocks, _ in messages:
            for link in path(start, to, p, network):
                load[link] += CHUNK * len(blocks)
            sent += CHUNK * len(blocks)
        for to, blocks, added in arriving:
            for block, whose in blocks.items():
                if added:
                    assert not held[to][block] & whose, "counted twice"
                    held[to][block] |= whose
                else:
                    held[to][block] = whose
        steps += 1
        in_a_row += max(load.values())

    everyone = set(range(p))
    for r in range(p):
        if collective == "all-reduce":
            assert all(held[r][b] == everyone for b in range(p)), "not summed"
        elif collective == "reduce-scatter":
            assert held[r][r] == everyone, "not summed"
        elif collective == "all-gather":
            assert held[r] == {b: {b} for b in range(p)}, "not gathered"
        else:
            assert all((a, r) in held[r] for a in range(p)), "not delivered"
    return Cost(steps, in_a_row, sent)


CASES = [(c, a) for c, algorithms in ALGORITHMS.items() for a in algorithms]


def worlds(algorithm):
    powers = algorithm == "recursive doubling"
    return [p for p in WORLDS if not powers or not p & (p - 1)]


def agrees(formula, collective, algorithm):
    return all(
        formula(CHUNK * p, p, network)
        == simulate(collective, p, network, SCHEDULES[collective][algorithm](p))
        for network in NETWORKS
        for p in worlds(algorithm)
    )


@pytest.mark.parametrize(("collective", "algorithm"), CASES)
def test_formulas_agree_with_the_messages(collective, algorithm):
    assert agrees(ALGORITHMS[collective][algorithm], collective, algorithm)


def changed(steps=0, size=0, sent=0):
    """A right formula with something added to its parts."""

    def wrong(collective, algorithm):
        def formula(n, p, network):
            right = ALGORITHMS[collective][algorithm](n, p, network)
            return Cost(
                right.steps + steps, right.bytes + size, right.sent + sent
            )

        return formula

    return wrong


def for_a_switch(collective, algorithm):
    return lambda n, p, _: ALGORITHMS[collective][algorithm](n, p, "switch")


def whole_tensor(collective, algorithm):
    return lambda n, p, network: ALGORITHMS[collective][algorithm](
        2 * n, p, network
    )


WRONG = {
    "a step too many": changed(steps=1),
    "a chunk too few": changed(size=-CHUNK),
    "a chunk sent twice": changed(sent=CHUNK),
    "twice the tensor": whole_tensor,
}


@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.parametrize(("collective", "algorithm"), CASES)
def test_a_wrong_formula_is_caught(fault, collective, algorithm):
    formula = WRONG[fault](collective, algorithm)
    assert not agrees(formula, collective, algorithm)


def test_a_shared_wire_that_is_forgotten_is_caught():
    neighbours_only = {"ring", "tree"}
    for collective, algorithm in CASES:
        formula = for_a_switch(collective, algorithm)
        same = agrees(formula, collective, algorithm)
        assert same == (algorithm in neighbours_only)


BROKEN = {
    "stops a round early": lambda rounds: rounds[:-1],
    "starts a round late": lambda rounds: rounds[1:],
    "repeats a round": lambda rounds: [*rounds[:1], *rounds],
    "sends the blocks of another rank": lambda rounds: [
        [
            (start, to, other[2], added)
            for (start, to, _, added), other in zip(
                messages, messages[1:] + messages[:1], strict=True
            )
        ]
        for messages in rounds
    ],
}


@pytest.mark.parametrize(
    "fault", ["stops a round early", "starts a round late"]
)
@pytest.mark.parametrize(("collective", "algorithm"), CASES)
def test_a_round_that_is_missing_is_caught(fault, collective, algorithm):
    rounds = BROKEN[fault](SCHEDULES[collective][algorithm](8))
    with pytest.raises((AssertionError, KeyError)):
        simulate(collective, 8, "switch", rounds)


@pytest.mark.parametrize(
    ("fault", "collective", "algorithm"),
    [
        ("repeats a round", "all-reduce", "recursive doubling"),
        ("repeats a round", "reduce-scatter", "ring"),
        ("sends the blocks of another rank", "all-gather", "ring"),
        ("sends the blocks of another rank", "reduce-scatter", "halving"),
    ],
)
def test_wrong_blocks_are_caught(fault, collective, algorithm):
    rounds = BROKEN[fault](SCHEDULES[collective][algorithm](8))
    with pytest.raises((AssertionError, KeyError)):
        simulate(collective, 8, "switch", rounds)


def test_ring_and_tree_cost_what_the_messages_of_torch_cost():
    from warpmap.training.sharding.collective_operations import (
        ring_cost,
        tree_cost,
    )

    for p in WORLDS:
        for n in (12 * p, 1001):
            ours = ALGORITHMS["all-reduce"]["ring"](n, p, "switch")
            assert (ours.steps, ours.bytes) == ring_cost(n, 1, p)
            ours = ALGORITHMS["all-reduce"]["tree"](n, p, "switch")
            assert (ours.steps, ours.bytes) == tree_cost(n, 1, p)


@pytest.mark.parametrize(("collective", "algorithm"), CASES)
def test_nothing_beats_the_bound_behind_the_bus_bandwidth(
    collective, algorithm
):
    reaches = {"ring", "doubling", "halving", "halving + doubling"}
    for p in worlds(algorithm):
        size = CHUNK * p
        cost = ALGORITHMS[collective][algorithm](size, p, "switch")
        bound = bus_factor(collective, p) * size
        assert cost.bytes >= bound - 1e-9
        if algorithm in reaches | {"pairwise"}:
            assert cost.bytes == pytest.approx(bound)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("collective", ALGORITHMS)
def test_the_answer_is_the_fastest_and_the_crossing_is_a_tie(
    collective, network
):
    for p in (2, 3, 8, 12, 64):
        answer = communication_cost(collective, p, 2.0, 7.0, 50.0, network)
        times = {
            name: algorithm(2_000_000, p, network).seconds(7e-6, 50e9) * 1e6
            for name, algorithm in ALGORITHMS[collective].items()
            if p in worlds(name) or not p & (p - 1)
        }
        assert answer.microseconds == pytest.approx(min(times.values()))
        assert times[answer.fastest] == min(times.values())
        if answer.crossing_mb is not None:
            size = p * round(answer.crossing_mb * 1e6 / p)
            tiny, huge = (
                ALGORITHMS[collective][name](size, p, network)
                for name in (answer.for_tiny, answer.for_huge)
            )
            assert tiny.seconds(7e-6, 50e9) == pytest.approx(
                huge.seconds(7e-6, 50e9), rel=1e-3
            )


def test_extremes_are_what_wins_there():
    for collective, network, p in itertools.product(
        ALGORITHMS, NETWORKS, (4, 7, 16)
    ):
        case = {"collective": collective, "network": network, "ranks": p}
        tiny = communication_cost(megabytes=1e-6, gb_s=1e6, **case)
        huge = communication_cost(megabytes=1e7, alpha_us=1e-6, **case)
        assert tiny.steps == min(
            a(1, p, network).steps
            for name, a in ALGORITHMS[collective].items()
            if name != "recursive doubling" or not p & (p - 1)
        )
        assert huge.fastest == huge.for_huge


def test_behind_a_switch_the_ring_never_wins_and_in_a_ring_it_does():
    for p in (4, 6, 8, 64):
        for size in (1e-3, 1.0, 1e3, 1e6):
            switch = communication_cost("all-reduce", p, size)
            assert switch.fastest != "ring"
        wired = communication_cost("all-reduce", p, 1e4, network="ring")
        assert wired.fastest == "ring"


def test_bandwidths_are_those_of_nccl_tests():
    cost = communication_cost("all-reduce", 4, 100.0, 10.0, 50.0)
    seconds = cost.microseconds / 1e6
    assert cost.algbw_gb_s == pytest.approx(0.1 / seconds)
    assert cost.busbw_gb_s == pytest.approx(0.1 / seconds * 2 * 3 / 4)
    # doc/PERFORMANCE.md of nccl-tests
    assert bus_factor("all-gather", 4) == 3 / 4
    assert bus_factor("reduce-scatter", 4) == 3 / 4
    assert bus_factor("all-to-all", 4) == 3 / 4


def test_fit_finds_the_line_that_was_drawn():
    sizes = [1 << k for k in range(10, 30, 2)]
    alpha, beta = fit(sizes, [12e-6 + n / 300e9 for n in sizes])
    assert alpha == pytest.approx(12e-6)
    assert 1 / beta == pytest.approx(300e9)


def test_no_other_line_has_smaller_relative_errors():
    rng = random.Random(0)
    sizes = [1 << k for k in range(10, 30)]
    seconds = [(10e-6 + n / 100e9) * math.exp(rng.gauss(0, 0.2)) for n in sizes]
    alpha, beta = fit(sizes, seconds)

    def error(a, b):
        return sum(
            ((a + b * n) / t - 1) ** 2
            for n, t in zip(sizes, seconds, strict=True)
        )

    for factor in (0.99, 1.01):
        assert error(alpha * factor, beta) > error(alpha, beta)
        assert error(alpha, beta * factor) > error(alpha, beta)
        assert error(alpha * factor, beta / factor) > error(alpha, beta)


def test_fit_agrees_with_numpy():
    import numpy as np

    rng = np.random.default_rng(0)
    sizes = np.array([1 << k for k in range(8, 28)])
    seconds = (5e-6 + sizes / 40e9) * rng.uniform(0.8, 1.2, len(sizes))
    A = np.stack([1 / seconds, sizes / seconds], axis=1)
    expected = np.linalg.lstsq(A, np.ones(len(sizes)), rcond=None)[0]
    assert fit(sizes.tolist(), seconds.tolist()) == pytest.approx(
        expected.tolist()
    )


def test_chart_shows_the_answer():
    chart = communication_chart("all-to-all", 8, 1.048576, 5.0, 100.0)
    (here,) = chart.points
    line = next(x for x in chart.lines if x.name == here.name)
    assert any((here.x, here.y) == pytest.approx(at) for at in line.points)
    assert len(communication_chart(ranks=6).lines) == 3  # no power of two


def test_rates_are_those_of_the_links():
    assert RATES["PCIe 5.0 x16"] == {"gb_s": 57.6}
    assert RATES["NVLink 4"] == {"gb_s": 423.5}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"ranks": 1}, "ranks must be from 2 to 1024, got 1"),
        ({"ranks": 5000}, "ranks must be from 2 to 1024, got 5000"),
        ({"megabytes": 0.0}, "megabytes must be positive, got 0.0"),
        ({"megabytes": 1e-9}, "megabytes must hold a byte"),
        ({"alpha_us": -1.0}, "alpha_us must be positive, got -1.0"),
        ({"gb_s": math.inf}, "gb_s must be positive, got inf"),
        ({"collective": "broadcast"}, "collective must be one of all-reduce"),
        ({"network": "torus"}, "network must be switch or ring, got torus"),
    ],
)
def test_bad_numbers_are_named(wrong, says):
    for call in (communication_cost, communication_chart):
        with pytest.raises(ValueError, match=says):
            call(**wrong)


@pytest.mark.parametrize(
    ("sizes", "seconds", "says"),
    [
        ([1], [1.0], "sizes must be two or more"),
        ([5, 5], [1.0, 1.0], "got 1 and 2"),
        ([1, 2], [1.0], "got 2 and 1"),
        ([1, 2], [1.0, 0.0], "seconds must be positive, got 0.0"),
    ],
)
def test_points_that_are_no_line_are_refused(sizes, seconds, says):
    with pytest.raises(ValueError, match=says):
        fit(sizes, seconds)


def test_recursive_doubling_wants_a_power_of_two():
    formula = ALGORITHMS["all-reduce"]["recursive doubling"]
    with pytest.raises(ValueError, match="a power of two here, got 6"):
        formula(100, 6, "switch")


def test_wired_in_a_ring_the_closed_forms_of_the_page_hold():
    for k in range(1, 8):
        p = 1 << k
        n = 4 * p
        wired = {
            ("all-reduce", "halving + doubling"): 2 * (p * p - 1) / (3 * p),
            ("all-reduce", "recursive doubling"): p - 1,
            ("all-gather", "doubling"): (p * p - 1) / (3 * p),
            ("all-to-all", "pairwise"): p / 4,
            ("all-to-all", "Bruck"): (p - 1) / 2,
        }
        for (collective, algorithm), share in wired.items():
            cost = ALGORITHMS[collective][algorithm](n, p, "ring")
            assert cost.bytes == pytest.approx(share * n)


def test_the_table_at_the_top_of_the_page():
    names = ("ring", "halving + doubling", "recursive doubling")
    for size, table in (
        (8192 * 2, (140, 60, 30)),
        (8192 * 8192 * 2, (695, 615, 981)),
    ):
        for name, shown in zip(names, table, strict=True):
            cost = ALGORITHMS["all-reduce"][name](size, 8, "switch")
            time = cost.seconds(10e-6, 423.5e9) * 1e6
            assert round(time) == shown


def test_a_size_that_does_not_divide_is_filled_up():
    assert ring_pass(13, 4) == ring_pass(16, 4)


def test_runs_without_torch_and_numpy():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from warpmap.hardware.network import communication_cost as c\n"
        "print(c.communication_cost('all-gather').steps)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "src",
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "3"
