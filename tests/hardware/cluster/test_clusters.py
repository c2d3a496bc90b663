"""Fabrics are wired port by port, failures are drawn at random."""

import itertools
import math
import random
import subprocess
import sys
from collections import Counter, defaultdict, deque
from dataclasses import replace
from inspect import signature
from pathlib import Path

import pytest

from warpmap.hardware.cluster.clusters import (
    FABRICS,
    SIZES,
    best_interval,
    clusters,
    fat_tree,
    goodput,
    goodput_chart,
)

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/hardware/cluster/clusters.md"


# -- a fabric, cable by cable -------------------------------------------------


def wired(fabric, gpus, radix):
    """Cables between pairs; every switch must have ports for its own."""
    cables = Counter()

    def connect(lower, uppers, ports):
        assert ports % len(uppers) == 0, "not spread evenly"
        for upper in uppers:
            cables[lower, upper] += ports // len(uppers)

    leaf = [("leaf", i) for i in range(fabric.leaves)]
    spine = [("spine", i) for i in range(fabric.spines)]
    core = [("core", i) for i in range(fabric.cores)]
    for g in range(gpus):
        connect(("gpu", g), [leaf[g // fabric.down]], 1)
    if fabric.levels == 2:
        for switch in leaf:
            connect(switch, spine, fabric.cables[1] // fabric.leaves)
    if fabric.levels == 3:
        half = radix // 2
        # pods are filled one after the other, as far as spines have ports
        up = fabric.cables[2] // fabric.spines
        size = round(up * fabric.oversubscription)
        for i, switch in enumerate(leaf):
            pod = i // size
            connect(switch, spine[pod * half : (pod + 1) * half], half)
        group = fabric.cores // half
        for i, switch in enumerate(spine):
            column = i % half
            above = core[column * group : (column + 1) * group]
            connect(switch, above, fabric.cables[2] // fabric.spines)
    used = Counter()
    for (lower, upper), count in cables.items():
        used[lower] += count
        used[upper] += count
    for node, count in used.items():
        assert count <= (1 if node[0] == "gpu" else radix), "too many ports"
    steps = Counter()
    for (lower, _), count in cables.items():
        steps[lower[0]] += count
    assert tuple(steps.values()) == fabric.cables
    assert {upper for _, upper in cables} == {*leaf, *spine, *core}
    return cables


def flow(cables, senders, receivers):
    """Most that senders can send at once, one unit a cable (Edmonds, Karp)."""
    room = defaultdict(Counter)
    for (a, b), count in cables.items():
        room[a][b] += count
        room[b][a] += count
    for g in senders:
        room["source"]["gpu", g] = 1
    for g in receivers:
        room["gpu", g]["sink"] = 1
    total = 0
    while True:
        came = {"source": None}
        queue = deque(["source"])
        while queue and "sink" not in came:
            node = queue.popleft()
            for after, left in room[node].items():
                if left > 0 and after not in came:
                    came[after] = node
                    queue.append(after)
        if "sink" not in came:
            return total
        node = "sink"
        while came[node] is not None:
            before = came[node]
            room[before][node] -= 1
            room[node][before] += 1
            node = before
        total += 1


def halves(gpus):
    """Two halves side by side: the cut with the fewest ways around."""
    return range(gpus // 2), range(gpus // 2, gpus // 2 * 2)


def hops(cables, start, end):
    """Switches on the shortest way."""
    near = defaultdict(set)
    for a, b in cables:
        near[a].add(b)
        near[b].add(a)
    seen, queue = {start: 0}, deque([start])
    while queue:
        node = queue.popleft()
        for after in near[node] - seen.keys():
            seen[after] = seen[node] + 1
            queue.append(after)
    return seen[end] - 1


# full trees: as many GPUs as the switches can join
FULL = [
    (4, 4, 1.0),
    (8, 4, 1.0),
    (16, 4, 1.0),
    (32, 8, 1.0),
    (54, 6, 1.0),
    (128, 8, 1.0),
    (48, 8, 3.0),
    (192, 8, 3.0),
    (56, 8, 7.0),
]


@pytest.mark.parametrize(("gpus", "radix", "over"), FULL)
def test_full_trees_carry_what_they_promise(gpus, radix, over):
    fabric = fat_tree(gpus, radix, over)
    cables = wired(fabric, gpus, radix)
    promised = gpus // 2 / fabric.oversubscription
    assert flow(cables, *halves(gpus)) == pytest.approx(promised)


@pytest.mark.parametrize("radix", [4, 6, 8])
@pytest.mark.parametrize("over", [1.0, 3.0])
def test_any_number_of_gpus_can_be_wired(radix, over):
    up = int(radix / (1 + over))
    most = radix // 2 * int(up * over) * radix
    for gpus in range(2, min(most, 70) + 1):
        fabric = fat_tree(gpus, radix, over)
        cables = wired(fabric, gpus, radix)
        promised = gpus // 2 / fabric.oversubscription
        assert flow(cables, *halves(gpus)) >= math.floor(promised)


def test_no_choice_of_halves_carries_less():
    cables = wired(fat_tree(8, 4), 8, 4)
    for chosen in itertools.combinations(range(8), 4):
        others = set(range(8)) - set(chosen)
        assert flow(cables, chosen, others) == 4
    cables = wired(fat_tree(16, 4), 16, 4)
    rng = random.Random(0)
    for _ in range(100):
        order = rng.sample(range(16), 16)
        assert flow(cables, order[:8], order[8:]) == 8


def test_a_cable_that_is_cut_is_noticed():
    whole = wired(fat_tree(16, 4), 16, 4)
    for pair in whole:
        cut = whole.copy()
        cut[pair] -= 1
        least = min(
            flow(cut, *halves(16)),
            flow(cut, *reversed(halves(16))),
        )
        assert least == 7, pair


@pytest.mark.parametrize(
    "wrong",
    [
        {"cores": 2},
        {"cores": 5},
        {"spines": 6},
        {"leaves": 7},
        {"down": 3},
        {"cables": (16, 16, 8)},
    ],
)
def test_a_wrong_count_cannot_be_wired(wrong):
    right = fat_tree(16, 4)
    assert wired(right, 16, 4)
    with pytest.raises((AssertionError, IndexError, ZeroDivisionError)):
        wired(replace(right, **wrong), 16, 4)


def test_no_fewer_switches_above_would_do():
    for gpus in range(5, 129):
        fabric = fat_tree(gpus, 8)
        ends = fabric.cables[-1]
        above = fabric.cores or fabric.spines
        if fabric.levels > 1:
            assert above * 8 >= ends
            # a divisor of the 4 ports up: half of it would not be enough
            assert above in (1, 4) or above // 2 * 8 < ends


@pytest.mark.parametrize("radix", [4, 6, 8])
def test_hops_are_those_of_the_longest_way(radix):
    for gpus in (radix, radix**2 // 2, radix**3 // 4):
        cables = wired(fat_tree(gpus, radix), gpus, radix)
        longest = max(
            hops(cables, ("gpu", 0), ("gpu", g)) for g in range(1, gpus)
        )
        here = clusters(gpus, radix, gpus_per_server=2)
        assert here.hops == longest


def test_rails_bring_more_servers_to_one_leaf():
    gpus, radix, per_server = 64, 16, 4
    here = clusters(gpus, radix, gpus_per_server=per_server)
    fabric = fat_tree(gpus, radix)
    cables = wired(fabric, gpus, radix)
    servers = gpus // per_server
    plug = {  # where a GPU's cable goes
        "rail": lambda server, g: g * servers + server,
        "rack": lambda server, g: server * per_server + g,
    }
    for name, promised in (
        ("rail", here.rail_servers),
        ("rack", here.rack_servers),
    ):
        near = sum(
            hops(cables, ("gpu", plug[name](0, 0)),
                 ("gpu", plug[name](server, 0))) == 1
            for server in range(1, servers)
        )  # fmt: skip
        assert near + 1 == promised
    assert clusters(8, gpus_per_server=8).rail_servers == 1


def test_counts_are_those_of_nvidia_s_superpod():
    """DGX B200 reference architecture: leaf, spine, core; cables."""
    table = {
        512: ((16, 8, 0), (512, 512)),
        1024: ((32, 16, 0), (1024, 1024)),
        2048: ((64, 32, 0), (2048, 2048)),
        4096: ((128, 128, 64), (4096, 4096, 4096)),
        8192: ((256, 256, 128), (8192, 8192, 8192)),
        16384: ((512, 512, 256), (16384, 16384, 16384)),
    }
    for gpus, (switches, cables) in table.items():
        fabric = fat_tree(gpus, radix=64)
        assert (fabric.leaves, fabric.spines, fabric.cores) == switches
        assert fabric.cables == cables


def test_full_trees_are_those_of_al_fares():
    for k in (4, 8, 16, 48, 64):
        fabric = fat_tree(k**3 // 4, k)
        switches = fabric.leaves + fabric.spines + fabric.cores
        assert switches == 5 * k * k // 4
        assert fabric.cores == (k // 2) ** 2
        with pytest.raises(ValueError, match=f"from 2 to {k**3 // 4}"):
            fat_tree(k**3 // 4 + 1, k)


# -- failures, one by one -----------------------------------------------------


def simulated(interval, checkpoint, restart, mtbf, segments=40_000, seed=0):
    """Shares of the time: work kept, checkpoints, work lost, restarts."""
    rng = random.Random(seed)
    spent = Counter()
    until = rng.expovariate(1 / mtbf)  # the next failure
    for _ in range(segments):
        while until < interval + checkpoint:
            spent["lost"] += until
            until = rng.expovariate(1 / mtbf)
            while until < restart:
                spent["restart"] += until
                until = rng.expovariate(1 / mtbf)
            spent["restart"] += restart
            until -= restart
        until -= interval + checkpoint
        spent["kept"] += interval
        spent["checkpoint"] += checkpoint
    total = sum(spent.values())
    return {name: time / total for name, time in spent.items()}


# minutes: a calm cluster, one that fails often, checkpoints as long as work
CASES = [
    (30.0, 1.0, 10.0, 600.0),
    (20.0, 0.5, 10.0, 40.0),
    (10.0, 10.0, 5.0, 30.0),
    (60.0, 1.0, 1.0, 50.0),
]


def agrees(formula):
    return all(
        math.isclose(formula(*case), simulated(*case)["kept"], rel_tol=0.025)
        for case in CASES
    )


def test_goodput_is_what_random_failures_leave():
    assert agrees(goodput)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda t, c, r, m: 1 - c / t - t / (2 * m) - r / m,
        lambda t, c, r, m: goodput(t, c, 0.0, m),
        lambda t, c, r, m: goodput(t, 0.0, r, m),
        lambda t, c, r, m: goodput(t, c, r, m) * (t + c) / t,
        lambda t, c, r, m: goodput(t, c, r, 2 * m),
    ],
    ids=["first order", "no restart", "free", "counts checkpoints", "MTBF"],
)
def test_a_wrong_goodput_is_caught(wrong):
    assert not agrees(wrong)


def test_losses_are_told_apart():
    here = clusters(
        gpus=16384,
        mtbf_days=16384 * 40 / 1440,
        checkpoint_seconds=30.0,
        restart_minutes=10.0,
        interval_minutes=20.0,
    )
    drawn = simulated(20.0, 0.5, 10.0, 40.0)
    assert here.goodput_percent == pytest.approx(100 * drawn["kept"], rel=0.02)
    for name, percent in (
        ("checkpoint", here.checkpoint_percent),
        ("lost", here.rework_percent),
        ("restart", here.restart_percent),
    ):
        assert percent == pytest.approx(100 * drawn[name], rel=0.03)


def searched(checkpoint, restart, mtbf):
    """The best interval, by golden section."""
    low, high = 1e-3 * mtbf, 4 * mtbf
    shrink = (math.sqrt(5) - 1) / 2
    for _ in range(100):
        a, b = high - shrink * (high - low), low + shrink * (high - low)
        if goodput(a, checkpoint, restart, mtbf) > goodput(
            b, checkpoint, restart, mtbf
        ):
            high = b
        else:
            low = a
    return low


@pytest.mark.parametrize("restart", [0.0, 10.0, 100.0])
@pytest.mark.parametrize("checkpoint", [0.1, 1.0, 10.0, 50.0])
def test_best_interval_is_what_a_search_finds(checkpoint, restart):
    best = searched(checkpoint, restart, 180.0)
    assert best_interval(checkpoint, 180.0) == pytest.approx(best, rel=0.01)


def test_best_interval_is_daly_s():
    # captions of figures 3 to 5: dumps of 5 minutes
    for mtbf, shown in ((24 * 60, "117"), (6 * 60, "57"), (15, "9.1")):
        assert f"{best_interval(5, mtbf):.2g}" == f"{float(shown):.2g}"
    assert best_interval(30, 15) == 15


def test_failures_are_those_of_llama_3():
    here = clusters(**SIZES["Llama 3 405B"])
    assert here.failures_a_day * 54 == pytest.approx(419, rel=1e-3)
    assert here.hours_between_failures == pytest.approx(54 * 24 / 419, rel=1e-3)
    # more than 90% was reached; without any checkpoint this restart is most
    assert here.goodput_percent > 90
    mtbf = 60 * here.hours_between_failures
    assert math.exp(-19.5 / mtbf) == pytest.approx(0.9, abs=1e-3)
    assert goodput(1e-3, 0, 19.6, mtbf) < 0.9 < goodput(1e-3, 0, 19.4, mtbf)


def test_useful_gpus_have_a_maximum():
    useful = [clusters(gpus=2**k, radix=256).useful_gpus for k in range(10, 23)]
    top = useful.index(max(useful))
    assert 0 < top < len(useful) - 1
    assert useful[: top + 1] == sorted(useful[: top + 1])
    assert useful[top:] == sorted(useful[top:], reverse=True)


def test_a_cluster_that_never_gets_ahead_is_no_error():
    assert goodput(1000, 1, 1, 1) == 0.0


# -- the calculator -----------------------------------------------------------


def defaults(**changes):
    asked = signature(clusters).parameters.values()
    return {p.name: p.default for p in asked} | changes


def test_answer_is_put_together_from_the_fabric():
    here = clusters(gpus=48, radix=8, oversubscription=3.0, gbit_s=80.0)
    fabric = fat_tree(48, 8, 3.0)
    assert here.switches == fabric.leaves + fabric.spines + fabric.cores
    assert here.cables == sum(fabric.cables)
    # 8 ways of 10 GB/s
    assert here.bisection_tb_s == pytest.approx(0.08)
    assert (
        pytest.approx(
            here.goodput_percent
            + here.checkpoint_percent
            + here.rework_percent
            + here.restart_percent
        )
        == 100
    )


def test_chart_has_its_top_where_the_answer_is():
    chart = goodput_chart(**defaults())
    (here,) = chart.points
    line = chart.lines[1].points
    assert max(line, key=lambda at: at[1]) == pytest.approx((here.x, here.y))
    tops = [max(y for _, y in line.points) for line in chart.lines]
    assert tops == sorted(tops, reverse=True)
    (given,) = goodput_chart(**defaults(interval_minutes=60.0)).points
    assert given.x == 60
    assert given.y < here.y


def test_menus_fill_only_their_fields():
    for menu in (SIZES, FABRICS):
        for values in menu.values():
            clusters(**values)
    assert SIZES["Llama 3 405B"].items() <= defaults().items()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"gpus": 4}, "gpus_per_server must be from 1 to 4, got 8"),
        ({"gpus": 65537}, "gpus must be from 2 to 65536, got 65537"),
        ({"gpus": 1}, "gpus must be from 2"),
        ({"radix": 63}, "radix must be even and at least 4, got 63"),
        ({"radix": 2}, "radix must be even and at least 4, got 2"),
        ({"oversubscription": 0.5}, "oversubscription must be from 1 to 63"),
        ({"oversubscription": math.nan}, "oversubscription must be from 1"),
        ({"gbit_s": 0.0}, "gbit_s must be above 0, got 0.0"),
        ({"mtbf_days": -1.0}, "mtbf_days must be above 0, got -1.0"),
        ({"checkpoint_seconds": 0.0}, "checkpoint_seconds must be above 0"),
        ({"restart_minutes": -1.0}, "restart_minutes must not be below 0"),
        ({"interval_minutes": math.inf}, "interval_minutes must not be below"),
    ],
)
def test_bad_numbers_are_named(wrong, says):
    with pytest.raises(ValueError, match=says):
        clusters(**wrong)
    with pytest.raises(ValueError, match=says):
        goodput_chart(**defaults(**wrong))


def test_runs_without_torch_and_numpy():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from warpmap.hardware.cluster.clusters import *\n"
        "print(clusters().switches)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "src",
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "1280"


# -- the page -----------------------------------------------------------------


def page_rows():
    return {
        row[0]: row[1:]
        for row in (
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in PAGE.read_text("utf-8").splitlines()
            if line.startswith("| ")
        )
    }


def test_page_s_fabrics_agree():
    rows = page_rows()
    for gpus, over in ((64, 1), (2048, 1), (16384, 1), (65536, 1)):
        here = clusters(gpus, oversubscription=float(over))
        assert rows[f"{gpus:,}"] == [
            str(here.levels),
            f"{here.switches:,}",
            f"{here.cables:,}",
            str(here.hops),
            f"{here.bisection_tb_s:,.1f}",
        ]
    here = clusters(16384, oversubscription=7.0)
    assert rows["16,384, top 7:1"] == [
        str(here.levels),
        f"{here.switches:,}",
        f"{here.cables:,}",
        str(here.hops),
        f"{here.bisection_tb_s:,.1f}",
    ]


def test_page_s_sums_agree():
    text = " ".join(PAGE.read_text("utf-8").split())
    assert f"16384 / 419 = {54 * 16384 / 419:.0f}$ days" in text
    lost = 0.1 * 54 * 24  # hours
    assert f"are {lost:.0f} hours" in text
    assert 16 < 60 * lost / 466 < 17
    most = 2112 * 1440 / 10
    assert f"{most / 1000:.0f},000 here" in text


def test_page_s_losses_agree():
    rows = page_rows()
    for gpus in (1024, 4096, 16384, 65536):
        here = clusters(gpus)
        assert rows[f"{gpus:,} GPUs"] == [
            f"{here.hours_between_failures:.1f}",
            f"{here.best_interval_minutes:.0f}",
            f"{here.goodput_percent:.1f}%",
            f"{here.checkpoint_percent:.1f}%",
            f"{here.rework_percent:.1f}%",
            f"{here.restart_percent:.1f}%",
        ]
