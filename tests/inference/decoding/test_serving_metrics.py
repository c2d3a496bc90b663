"""Metrics against NumPy and hand-worked logs, the server against queueing."""

import random
from itertools import pairwise

import numpy as np
import pytest

from warpmap.inference.decoding.serving_metrics import (
    Request,
    goodput,
    mean_concurrency,
    percentile,
    serving_chart,
    serving_metrics,
    simulate,
)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
@pytest.mark.parametrize("percent", [0, 1, 50, 90, 99, 100])
def test_percentile_is_numpys(count, percent):
    values = [random.gauss(0, 1) for _ in range(count)]
    assert percentile(values, percent) == pytest.approx(
        np.percentile(values, percent)
    )


def test_log_worked_by_hand():
    one = Request(arrival=1.0, tokens=(3.0, 4.0, 4.5, 7.0))
    assert one.ttft == 2.0
    assert one.gaps == [1.0, 0.5, 2.5]
    assert one.tpot == pytest.approx(4 / 3)
    assert Request(0.0, (5.0,)).tpot == 0.0


def test_goodput_needs_both_promises():
    both = Request(0.0, (1.0, 2.0))
    late = Request(0.0, (3.0, 4.0))
    slow = Request(0.0, (1.0, 4.0))
    log = [both, late, slow]
    assert goodput(log, ttft_limit=1.0, tpot_limit=1.0) == 1 / 4
    assert goodput(log, ttft_limit=3.0, tpot_limit=3.0) == 3 / 4


@pytest.mark.slow
def test_littles_law_agrees_with_watching_the_server():
    arrivals = poisson(3.0, 300)
    log = simulate(arrivals, 20, 0.05, 0.01, 0.001, max_batch=8)
    start, end = arrivals[0], max(r.tokens[-1] for r in log)
    watched = [
        sum(r.arrival <= at < r.tokens[-1] for r in log)
        for at in np.linspace(start, end, 40_000)
    ]
    assert mean_concurrency(log) == pytest.approx(np.mean(watched), rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_token_answers_wait_as_in_an_m_d_1_queue(load):
    """Pollaczek and Khinchine: W = load * service / (2 (1 - load))."""
    service = 0.1
    log = simulate(poisson(load / service, 200_000), 1, service, 1, 1, 1)
    waited = np.mean([r.ttft - service for r in log])
    assert waited == pytest.approx(load * service / (2 * (1 - load)), rel=0.05)


def test_server_does_one_thing_at_a_time():
    """Every moment a token appears ends one prefill or one step."""
    arrivals = poisson(20.0, 60)
    log = simulate(arrivals, 7, 0.03, 0.01, 0.002, max_batch=4)
    moments = sorted({t for r in log for t in r.tokens})
    firsts = {r.tokens[0] for r in log}
    assert len(firsts) == len(log)  # prefills never share a moment
    for before, at in pairwise(moments):
        batch = sum(at in r.tokens for r in log)
        if at in firsts:
            assert batch == 1
            assert at - before >= 0.03 - 1e-9
        else:
            assert at - before == pytest.approx(0.01 + 0.002 * batch)
    inside = [
        sum(r.tokens[0] <= at < r.tokens[-1] for r in log) for at in moments
    ]
    assert max(inside) == 4


def test_nobody_overtakes_and_no_token_is_early():
    log = simulate(poisson(50.0, 200), 5, 0.02, 0.01, 0.0, max_batch=8)
    firsts = [r.tokens[0] for r in log]
    assert firsts == sorted(firsts)
    for request in log:
        assert request.ttft >= 0.02
        assert len(request.tokens) == 5
        assert min(request.gaps) >= 0.01 - 1e-9


def test_rates_follow_from_the_log():
    served = serving_metrics(requests_per_s=3, output_tokens=10, requests=50)
    assert served.goodput == pytest.approx(
        served.attainment / 100 * served.tokens_per_s / 10
    )


def test_goodput_falls_where_throughput_still_rises():
    calm, best, busy = (serving_metrics(rate) for rate in (2, 4, 7))
    assert calm.tokens_per_s < best.tokens_per_s < busy.tokens_per_s
    assert calm.goodput < best.goodput > 2 * busy.goodput


def test_chart_passes_through_the_readers_point():
    chart = serving_chart(requests_per_s=5.0, requests=100)
    (point,) = chart.points
    assert (point.x, point.y) in chart.lines[1].points
    assert point.y == serving_metrics(5.0, requests=100).goodput


@pytest.mark.parametrize(
    "wrong",
    [
        {"requests_per_s": 0.0},
        {"requests_per_s": -1.0},
        {"output_tokens": 0},
        {"prefill_ms": 0.0},
        {"step_ms": float("nan")},
        {"max_batch": 0},
        {"requests": 2_000_000},
    ],
    ids=lambda w: next(iter(w)),
)
def test_bad_input_is_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        serving_metrics(**wrong)


def test_percentile_refuses_nonsense():
    with pytest.raises(ValueError, match="got none"):
        percentile([], 50)
    with pytest.raises(ValueError, match="0 to 100"):
        percentile([1.0], 101)


def poisson(rate, count):
    now, arrivals = 0.0, []
    for _ in range(count):
        now += random.expovariate(rate)
        arrivals.append(now)
    return arrivals
