"""The simulator against a clock that ticks, closed forms and order statistics.

Wrong simulators are made by changing a line of its source; each must fail.
"""

import inspect
import math
import random
import re
import sys
import types
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest

from warpmap.training.cost.flops_and_mfu import PEAKS, PRESETS, flops_and_mfu
from warpmap.training.feedback import rlhf_systems as module
from warpmap.training.feedback.rlhf_systems import (
    PLACEMENTS,
    RUNS,
    Cluster,
    draw_lengths,
    idle_share,
    rlhf_systems,
    rlhf_trace,
    simulate,
    split_chart,
)

PAGE = Path(__file__).parents[3] / "docs/training/feedback/rlhf_systems.md"


# -- brute force: one second after the other, by the clock ---------------------


def tick(
    lengths, step, batch, steps, rollout, shared, sync, scorers, trained, ahead
):
    """Simulate second by second.

    A token takes each trained model 3 s and each scorer 1 s. What ends first
    in a second is the trainers' work, then answers, GPU by GPU.
    """
    running = [[] for _ in range(rollout)]  # [seconds left, answer]
    written, scored, batches, began, updates = [], [], [], [], []
    job, queue = None, []  # [stage, seconds left, answers]
    now = 0

    def pick():
        nonlocal job, scored, written
        if job is None and not queue:
            if len(scored) >= batch:
                taken, scored = scored[:batch], scored[batch:]
                batches.append(taken)
                cost = 3 * sum(lengths[a] for a in taken)
                queue.extend(["train", cost, taken] for _ in range(trained))
                queue.append(["sync", sync, taken])
            elif written and not (shared and any(running)):
                taken = written[: batch - len(scored)]
                written = written[len(taken) :]
                cost = scorers * sum(lengths[a] for a in taken)
                queue.append(["score", cost, taken])
        if job is None and queue:
            job = queue.pop(0)

    while True:
        if job and not job[1]:
            stage, _, taken = job
            job = None
            if stage == "score":
                scored += taken
            if stage == "sync":
                updates.append(now)
                if len(updates) == steps:
                    return updates, batches, began
            admit = True
        else:
            admit = now == 0
        if admit:
            while len(began) < min(
                len(lengths), (len(updates) + ahead + 1) * batch
            ):
                least = min(range(rollout), key=lambda g: len(running[g]))
                running[least].append([step * lengths[len(began)], len(began)])
                began.append(len(updates))
        pick()
        if not (job and job[0] == "sync"):
            for mine in running:
                ended = sorted(a for left, a in mine if left == 0)
                mine[:] = [entry for entry in mine if entry[0] > 0]
                written += ended
                if ended:
                    pick()
        syncing = job is not None and job[0] == "sync"
        if job:
            job[1] -= 1
        if not syncing:
            for mine in running:
                for entry in mine:
                    entry[0] -= 1
        now += 1


def agrees_with_the_clock(simulator):
    chance = random.Random(1)
    for _ in range(60):
        shared = chance.random() < 0.3
        rollout, others = chance.randint(1, 3), chance.randint(1, 3)
        gpus = rollout if shared else rollout + others
        trainers = gpus if shared else others
        batch, steps = chance.randint(1, 4), chance.randint(1, 4)
        ahead = 0 if shared else chance.randint(0, 2)
        extra = chance.randint(0, ahead)
        lengths = [
            chance.randint(1, 25) for _ in range(batch * (steps + extra))
        ]
        sync = chance.randint(1, 20)
        step = chance.choice([1, 5, 25])  # generation is quick, or slow
        algorithm = chance.choice(["PPO", "GRPO"])
        rate = 1 / (3 * trainers)  # 3 s a token
        cluster = Cluster(
            gpus, rollout, shared, step, 0.0, rate, sync, algorithm
        )
        try:
            run = simulator(lengths, batch, steps, cluster, ahead)
        except (ValueError, IndexError):
            return False
        scorers, trained = (3, 2) if algorithm == "PPO" else (1, 1)
        updates, batches, began = tick(
            lengths,
            step,
            batch,
            steps,
            rollout,
            shared,
            sync,
            scorers,
            trained,
            ahead,
        )
        if (
            run.updates != pytest.approx(updates)
            or run.batches != batches
            or run.began != began
        ):
            return False
    return True


# -- closed form: what one synchronous step takes ------------------------------


def synchronous_step(lengths, c):
    """Seconds of a step from formulas, without a simulation.

    On a GPU with answers of L_1, L_2, ... tokens, the k-th has ended at
    a L_k + b sum_i min(L_i, L_k). Scoring is a queue: its last end is the
    greatest, over the answers, of an end plus all scoring from there on.
    """
    ends = []
    for gpu in range(c.rollout):
        mine = lengths[gpu :: c.rollout]  # dealt out in turn
        for tokens in mine:
            slowed = c.step_per_answer * sum(min(tokens, t) for t in mine)
            ends.append((c.step * tokens + slowed, tokens))
    ends.sort()
    trainers = c.gpus if c.shared else c.gpus - c.rollout
    scorers, trained = (3, 2) if c.algorithm == "PPO" else (1, 1)
    a_token = 1 / (c.train_rate * trainers)
    if c.shared:
        scored = ends[-1][0] + scorers * a_token / 3 * sum(lengths)
    else:
        rest = list(accumulate(t for _, t in reversed(ends)))[::-1]
        scored = max(
            end + scorers * a_token / 3 * left
            for (end, _), left in zip(ends, rest, strict=True)
        )
    return scored + trained * a_token * sum(lengths) + c.sync


def agrees_with_the_closed_form(simulator):
    chance = random.Random(2)
    for _ in range(60):
        shared = chance.random() < 0.5
        rollout = chance.randint(1, 5)
        gpus = rollout if shared else rollout + chance.randint(1, 5)
        cluster = Cluster(
            gpus,
            rollout,
            shared,
            step=chance.uniform(0.01, 1),
            step_per_answer=chance.uniform(0, 1),
            train_rate=chance.uniform(0.1, 20),
            sync=chance.uniform(0, 30),
            algorithm=chance.choice(["PPO", "GRPO"]),
        )
        batch = chance.randint(1, 20)
        lengths = [chance.randint(1, 200) for _ in range(2 * batch)]
        try:
            run = simulator(lengths, batch, 2, cluster)
        except (ValueError, IndexError):
            return False
        first = synchronous_step(lengths[:batch], cluster)
        second = synchronous_step(lengths[batch:], cluster)
        if run.updates != pytest.approx([first, first + second]):
            return False
    return True


def test_agrees_with_a_clock_that_ticks():
    assert agrees_with_the_clock(simulate)


def test_synchronous_steps_agree_with_the_closed_form():
    assert agrees_with_the_closed_form(simulate)


FAULTS = {
    "answers do not slow each other": (
        "self.cluster.step_per_answer * len(self.running)",
        "0.0",
    ),
    "one batch too far ahead": ("+ ahead + 1)", "+ ahead + 2)"),
    "split GPUs wait for all answers": ("busy = c.shared and", "busy ="),
    "shared GPUs do not wait": ("any(r.running for r in rollouts)", "False"),
    "generation goes on while weights come": ("r.now = now  #", "pass  #"),
    "a forward pass as dear as training": ("pass_seconds / 3", "pass_seconds"),
    "all GPUs train in a split": ("0 if c.shared else c.rollout", "0"),
    "last written, first scored": ("written.popleft()", "written.pop()"),
    "answers go to the fullest GPU": (
        "free = min(rollouts",
        "free = max(rollouts",
    ),
    "the critic is not trained": ('("actor", "critic"),', '("actor",),'),
    "nothing is sent": ('"sync", c.sync', '"sync", 0'),
    "batches a little small": (
        "scored[:batch], scored[batch:]",
        "scored[: batch - 1], scored[batch - 1 :]",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_checks_catch_a_wrong_simulator(fault):
    right, wrong = FAULTS[fault]
    source = inspect.getsource(module)
    assert source.count(right) == 1
    broken = types.ModuleType("broken")
    sys.modules["broken"] = broken
    try:
        exec(source.replace(right, wrong), broken.__dict__)
        assert not (
            agrees_with_the_clock(broken.simulate)
            and agrees_with_the_closed_form(broken.simulate)
        )
    finally:
        del sys.modules["broken"]


# -- order statistics of the lengths -------------------------------------------


def generation_seconds(lengths, batch):
    """Mean time of generating a batch, a second a token, a GPU an answer."""
    cluster = Cluster(batch + 1, batch, False, 1.0, 0.0, 1e12, 0.0, "GRPO")
    run = simulate(lengths, batch, len(lengths) // batch, cluster)
    return run.updates[-1] / len(run.updates)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4, 32])
def test_longest_exponential_answer_is_a_harmonic_sum(batch):
    lengths = draw_lengths(batch * 1500, 4000, 1, 10**9, 3)
    harmonic = sum(1 / k for k in range(1, batch + 1))
    assert generation_seconds(lengths, batch) == pytest.approx(
        4000 * harmonic, rel=0.05
    )


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4, 32])
def test_longest_uniform_answer_is_n_over_n_plus_1_of_the_most(batch):
    chance = random.Random(4)
    lengths = [chance.randint(1, 8000) for _ in range(batch * 1500)]
    assert generation_seconds(lengths, batch) == pytest.approx(
        8000 * batch / (batch + 1), rel=0.05
    )


@pytest.mark.parametrize("tail", [0.5, 1.0, 2.0])
def test_lengths_follow_their_distribution(tail):
    """Against the integral of the survival function, with and without cut."""
    lengths = np.array(draw_lengths(100_000, 4000, tail, 10**9, 5))
    assert lengths.mean() == pytest.approx(4000, rel=0.04)
    scale = 4000 / math.gamma(1 + tail)
    x = np.linspace(0, 16384, 200_001)
    survival = np.exp(-((x / scale) ** (1 / tail)))
    cut = np.array(draw_lengths(100_000, 4000, tail, 16384, 6))
    assert cut.mean() == pytest.approx(
        np.trapezoid(survival, x) + 0.5, rel=0.03
    )
    longest = cut.reshape(-1, 50).max(axis=1).mean()
    assert longest == pytest.approx(
        np.trapezoid(1 - (1 - survival) ** 50, x), rel=0.03
    )
    assert set(draw_lengths(9, 70, 0, 100, 0)) == {70}


# -- staleness -----------------------------------------------------------------


def drawn(batch, steps, ahead, tail, seed=0, cluster=None):
    cluster = cluster or Cluster(6, 3, False, 0.01, 1e-4, 8000.0, 5.0, "GRPO")
    lengths = draw_lengths(batch * (steps + ahead), 2000, tail, 10**9, seed)
    return lengths, simulate(lengths, batch, steps, cluster, ahead)


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("tail", [0, 1, 2])
def test_no_answer_begins_too_early_and_none_is_learned_twice(ahead, tail):
    _, run = drawn(8, 40, ahead, tail)
    for answer, updates in enumerate(run.began):
        assert updates >= answer // 8 - ahead
    learned = [answer for batch in run.batches for answer in batch]
    assert len(learned) == len(set(learned)) == 8 * 40
    stale = [s for update in range(40) for s in run.staleness(update)]
    assert min(stale) >= 0
    if ahead == 0 or tail == 0:
        assert max(stale) <= ahead


@pytest.mark.parametrize("ahead", [1, 3])
def test_mean_staleness_is_the_batches_ahead_by_littles_law(ahead):
    _, run = drawn(8, 600, ahead, tail=1)
    stale = [s for update in range(100, 600) for s in run.staleness(update)]
    assert np.mean(stale) == pytest.approx(ahead, rel=0.02)
    assert max(stale) > ahead  # a long answer is overtaken


def test_first_updates_learn_from_short_answers():
    lengths, run = drawn(32, 30, ahead=3, tail=1)
    first = np.mean([lengths[a] for a in run.batches[0]])
    later = np.mean([lengths[a] for b in run.batches[15:] for a in b])
    assert first < 0.5 * later
    assert later == pytest.approx(2000, rel=0.1)


def test_no_batch_ahead_is_the_split():
    ahead = rlhf_systems("asynchronous", ahead=0)
    assert ahead == rlhf_systems("split")


# -- what work there is --------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_work_fits_on_its_gpus_and_makes_every_token(shared):
    cluster = Cluster(
        5, 5 if shared else 3, shared, 0.01, 2e-3, 900.0, 4.0, "PPO"
    )
    ahead = 0 if shared else 2
    lengths, run = drawn(7, 12, ahead, 1, cluster=cluster)
    for gpu in range(5):
        mine = [w for w in run.works if gpu in w.gpus]
        for one, other in pairwise(sorted(mine, key=lambda w: w.start)):
            assert one.end <= other.start + 1e-9
    learned = {answer for batch in run.batches for answer in batch}
    tokens = sum(
        (w.end - w.start) / (0.01 + 2e-3 * w.answers) * w.answers
        for w in run.works
        if w.stage == "generate"
    )
    least = sum(lengths[answer] for answer in learned)
    if shared:
        assert tokens == pytest.approx(least)
    else:
        assert least < tokens < sum(lengths)
    trained = sum(w.end - w.start for w in run.works if w.stage == "actor")
    trainers = 5 if shared else 2
    assert trained == pytest.approx(least / (900 * trainers))

    start, end = run.updates[3], run.updates[-1]
    for gpus in (range(5), range(3), range(3, 5)):
        at = np.linspace(start, end, 20_001)[:-1]
        busy = sum(
            ((w.start <= at) & (at < w.end)).sum()
            * len(set(w.gpus) & set(gpus))
            for w in run.works
        )
        assert idle_share(run, gpus, start, end) == pytest.approx(
            1 - busy / (len(at) * len(gpus)), abs=2e-3
        )


def test_asynchronous_step_is_the_slower_of_its_two_sides():
    """With equal answers: either the trainers or generation sets the pace."""
    equal = {"tail": 0.0, "ahead": 1, "send_seconds": 0.0}
    slow_training = rlhf_systems(
        "asynchronous", train_tokens_per_s=500.0, **equal
    )
    tokens = 128 * 4000
    both = tokens / (500 * 8) * (1 + 1 / 3)
    assert slow_training.step_seconds == pytest.approx(both)
    assert slow_training.trainer_idle_percent == pytest.approx(0, abs=1e-6)
    free_training = rlhf_systems(
        "asynchronous", train_tokens_per_s=1e9, **equal
    )
    # two batches on 8 GPUs at once: 32 answers in a step
    pair = 4000 * (0.010 + 0.0001 * 32)
    assert free_training.step_seconds == pytest.approx(pair / 2, rel=1e-3)
    assert free_training.decode_batch == pytest.approx(32, rel=0.01)


# -- calculator, chart, trace, page --------------------------------------------


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_presets_give_sound_results(run, placement):
    found = rlhf_systems(**{**RUNS[run], **PLACEMENTS[placement]})
    assert found.samples_per_hour == pytest.approx(
        3600 * 128 / found.step_seconds
    )
    for share in (
        found.idle_percent,
        found.rollout_idle_percent,
        found.trainer_idle_percent,
    ):
        assert 0 <= share < 100
    if placement in ("colocated", "split"):
        assert found.most_staleness == 0


def test_synchronous_calculator_is_the_mean_of_closed_forms():
    lengths = draw_lengths(128 * 12, 4000, 1, 16384, 0)
    cluster = Cluster(16, 16, True, 0.01, 1e-4, 8000.0, 10.0, "GRPO")
    steps = [
        synchronous_step(lengths[128 * n : 128 * (n + 1)], cluster)
        for n in range(4, 12)
    ]
    assert rlhf_systems().step_seconds == pytest.approx(np.mean(steps))


def test_chart_goes_through_the_readers_point():
    few = {"batch": 16, "gpus": 6}
    for placement in ("colocated", "split", "asynchronous"):
        chart = split_chart(placement, rollout_gpus=4, **few)
        here, best = chart.points
        lines = {line.name: line.points for line in chart.lines}
        assert (here.x, here.y) in lines[placement]
        system = rlhf_systems(placement, rollout_gpus=4, **few)
        assert here.y == system.samples_per_hour
        assert best.y == max(y for _, y in lines["asynchronous"])
    alone = split_chart("colocated", gpus=1, batch=4)
    assert [line.name for line in alone.lines] == ["colocated"]


@pytest.mark.parametrize("placement", ["colocated", "split", "asynchronous"])
@pytest.mark.parametrize("seed", range(4))
def test_trace_is_the_run_and_its_last_frame_the_result(placement, seed):
    frames = rlhf_trace(placement, seed=seed)
    assert 10 <= len(frames) <= 40
    shared = placement == "colocated"
    ahead = 1 if placement == "asynchronous" else 0
    lengths = draw_lengths(6 * (3 + ahead), 100, 1, 400, seed)
    cluster = Cluster(
        4, 4 if shared else 2, shared, 0.1, 0.02, 60.0, 2.0, "GRPO"
    )
    seen = []
    run = simulate(lengths, 6, 3, cluster, ahead, seen.append)
    assert run == simulate(lengths, 6, 3, cluster, ahead)
    assert seen == run.works

    last = frames[-1].picture
    assert last.end == run.updates[-1]
    for gpu, (name, spans) in enumerate(last.lanes):
        assert name == f"GPU {gpu}"
        shown = [(s.start, s.end) for s in spans if s.mark != "gone"]
        assert shown == [(w.start, w.end) for w in seen if gpu in w.gpus]
        edges = [0.0, *(e for s in spans for e in (s.start, s.end)), last.end]
        assert edges[::2] == pytest.approx(edges[1::2])  # no gap, no overlap
    idle = sum(
        s.end - s.start
        for _, spans in last.lanes
        for s in spans
        if s.mark == "gone"
    )
    assert f"idle {idle / (4 * last.end):.0%}" in frames[-1].caption
    moments = [f.picture.now for f in frames[:-1]]
    assert moments == sorted(moments)
    worst = [
        int(m[1]) if (m := re.search(r"at worst (\d+)", f.caption)) else 0
        for f in frames
        if "has learned" in f.caption
    ]
    assert worst == [max(run.staleness(update)) for update in range(3)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"placement": "together"},
        {"algorithm": "DPO"},
        {"gpus": 0},
        {"gpus": 129},
        {"rollout_gpus": 16, "placement": "split"},
        {"rollout_gpus": 0},
        {"ahead": -1},
        {"ahead": 9},
        {"batch": 0},
        {"batch": 5000},
        {"mean_tokens": 0.5},
        {"mean_tokens": float("nan")},
        {"tail": -1.0},
        {"tail": 4.0},
        {"max_tokens": 0},
        {"step_ms": 0.0},
        {"step_ms_per_answer": -1.0},
        {"train_tokens_per_s": 0.0},
        {"reshard_seconds": -1.0},
        {"send_seconds": float("inf")},
        {"seed": -1},
    ],
    ids=str,
)
def test_bad_input_is_named(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must"):
        rlhf_systems(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"gpus": 9},
        {"gpus": 1},
        {"rollout_gpus": 4},
        {"batch": 11},
        {"updates": 0},
        {"updates": 4, "batch": 10},
        {"ahead": 5},
        {"tail": 3.5},
    ],
    ids=str,
)
def test_bad_input_of_the_trace_is_named(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must"):
        rlhf_trace(**wrong)


def test_too_few_lengths_are_refused():
    cluster = Cluster(2, 1, False, 1.0, 0.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="lengths must be at least"):
        simulate([3, 3], 2, 2, cluster)


# -- what the page says --------------------------------------------------------


def test_default_rate_is_llama_at_40_percent_of_an_h100():
    llama = flops_and_mfu(**{**PRESETS["Llama 3 8B"], "tokens": 4096})
    assert round(llama.gflop_per_token) == 48
    peak = PEAKS["H100 SXM"]["peak_tflops"] * 1e12
    rate = 0.4 * peak / (llama.gflop_per_token * 1e9)
    assert rate == pytest.approx(8000, rel=0.03)


def test_table_of_the_page():
    text = PAGE.read_text(encoding="utf-8")
    for ahead, name in ((0, "0, the split"), (1, "1"), (2, "2"), (4, "4")):
        run = rlhf_systems("asynchronous", ahead=ahead)
        mean = f"{run.staleness:.1f}" if ahead else "0"
        assert (
            f"| {name} | {run.step_seconds:.0f} | {run.decode_batch:.0f} "
            f"| {mean} | {run.most_staleness} |"
        ) in text


def test_numbers_of_the_page():
    assert round(sum(1 / k for k in range(1, 129)), 1) == 5.4
    assert round(16384 * 0.010) == 164
    assert round(rlhf_systems(tail=0.0).step_seconds, 1) == 58.5
    assert round(rlhf_systems("split", tail=0.0).step_seconds) == 62
    assert round(rlhf_systems("asynchronous", tail=0.0).step_seconds) == 36
    assert len(FAULTS) == 12
