import importlib.util
import random
from collections import deque
from pathlib import Path

import pytest

from warpmap.hardware.performance.kernel_launch_overhead import (
    HOWS,
    Launched,
    launch_trace,
    pace,
    pace_chart,
    run,
    total_us,
)

ROOT = Path(__file__).parents[3]


def by_ticks(
    kernel_us, launch_us, latency_us=0, depth=1024, sync_every=0, sync_us=0
):
    """Host and GPU as two machines that a clock drives, 1 us at a time."""
    to_launch = deque(enumerate(kernel_us))
    called, queued, start, end = {}, {}, {}, {}
    queue = deque()  # number, time, when it may start
    launching = running = None  # number and ticks that are left
    waits_done, sync_left = 0, None
    now = 0
    while len(end) < len(kernel_us):
        # what takes no time may follow at once, on both sides
        for _ in range(4 * len(kernel_us) + 4):
            moved = False
            if running and running[1] == 0:
                end[running[0]], running, moved = now, None, True
            if launching and launching[1] == 0:
                i, launching, moved = launching[0], None, True
                queued[i] = now
                queue.append((i, kernel_us[i], now + latency_us))
            if not running and queue and queue[0][2] <= now:
                i, ticks, _ = queue.popleft()
                start[i], running, moved = now, [i, ticks], True
            if not launching and to_launch:
                i, _ = to_launch[0]
                at_wait = (
                    sync_every
                    and i
                    and i % sync_every == 0
                    and waits_done < i // sync_every
                )
                if at_wait:
                    if sync_left is None and len(end) == i:
                        sync_left = sync_us
                    if sync_left == 0:
                        sync_left, moved = None, True
                        waits_done += 1
                elif i - len(end) < depth:
                    to_launch.popleft()
                    called[i], launching, moved = now, [i, launch_us], True
            if not moved:
                break
        now += 1
        if running:
            running[1] -= 1
        if launching:
            launching[1] -= 1
        if sync_left:
            sync_left -= 1
    return [
        Launched(called[i], queued[i], start[i], end[i])
        for i in range(len(kernel_us))
    ]


def cases(seed, count):
    rng = random.Random(seed)
    for _ in range(count):
        yield {
            "launch_us": rng.randint(0, 7),
            "latency_us": rng.choice([0, 0, 3, 11]),
            "depth": rng.choice([1, 2, 3, 5, 1024]),
            "sync_every": rng.choice([0, 0, 1, 2, 5]),
            "sync_us": rng.choice([0, 4]),
        }


def agrees_with_the_clock(simulate):
    rng = random.Random(1)
    for given in cases(2, 300):
        kernels = [rng.randint(0, 9) for _ in range(rng.randint(1, 18))]
        if simulate(kernels, **given) != by_ticks(kernels, **given):
            return False
    return True


def test_run_agrees_with_a_walk_by_the_clock():
    assert agrees_with_the_clock(run)


def wrong_endless_queue(kernel_us, launch_us, depth, **rest):
    return run(kernel_us, launch_us, **rest)


def wrong_latency_delays_every_kernel(kernel_us, launch_us, latency_us, **rest):
    return run([k + latency_us for k in kernel_us], launch_us, **rest)


def wrong_no_wait(kernel_us, launch_us, sync_every, **rest):
    return run(kernel_us, launch_us, **rest)


def wrong_one_lane(kernel_us, launch_us, depth, **rest):
    return run(kernel_us, launch_us, depth=1, **rest)


@pytest.mark.parametrize(
    "fault",
    [
        wrong_endless_queue,
        wrong_latency_delays_every_kernel,
        wrong_no_wait,
        wrong_one_lane,
    ],
)
def test_the_clock_catches_a_wrong_simulator(fault):
    assert not agrees_with_the_clock(fault)


def test_closed_form_is_the_simulation_of_equal_kernels():
    rng = random.Random(3)
    for given in cases(4, 400):
        n, k = rng.randint(1, 40), rng.randint(0, 9)
        assert total_us(n, k, **given) == run([k] * n, **given)[-1].end
        # and not another mistake that both make
        if n < 15:
            assert total_us(n, k, **given) == by_ticks([k] * n, **given)[-1].end


def test_limits():
    # host-bound: launches follow each other, the last kernel sticks out
    assert run([2.0] * 50, 7.0, latency_us=3.0)[-1].end == 50 * 7 + 3 + 2
    # GPU-bound: kernels follow each other, the first launch sticks out
    assert run([7.0] * 50, 2.0, latency_us=3.0)[-1].end == 2 + 3 + 50 * 7
    # a wait after each: nothing overlaps
    assert run([7.0] * 50, 2.0, 3.0, sync_every=1, sync_us=4.0)[-1].end == (
        50 * (2 + 3 + 7) + 49 * 4
    )
    # a queue of one is a wait after each, without its cost
    assert run([7.0] * 50, 2.0, 3.0, depth=1)[-1].end == 50 * (2 + 3 + 7)


def test_a_short_queue_hides_latency_only_in_part():
    # d launches in each round trip, by Little's law
    for depth in (1, 2, 3, 4):
        done = run([2.0] * 1200, 1.0, latency_us=9.0, depth=depth)
        found = (done[-1].end - done[599].end) / 600
        assert found == max(1.0, 2.0, (1 + 9 + 2) / depth)


def test_more_room_or_less_work_never_takes_longer():
    rng = random.Random(5)
    for given in cases(6, 100):
        kernels = [rng.randint(0, 9) for _ in range(15)]
        end = run(kernels, **given)[-1].end
        for better in (
            {**given, "depth": given["depth"] + 1},
            {**given, "sync_every": 0},
            {**given, "launch_us": given["launch_us"] / 2},
        ):
            assert run(kernels, **better)[-1].end <= end


def test_pace_is_the_simulation():
    for how, given in HOWS.items():
        for elements in (1, 2**16, 2**22):
            found = pace(ops=500, elements=elements, **given)
            each = given["ops_a_launch"]
            done = run(
                [each * found.kernel_us] * (500 // each),
                given["launch_us"],
                latency_us=5.0,
                sync_every=given["sync_every"],
                sync_us=5.0,
            )
            assert found.total_us == pytest.approx(done[-1].end), how
            busy = sum(each.end - each.start for each in done)
            assert found.gpu_busy_percent == pytest.approx(
                100 * busy / done[-1].end
            )


@pytest.mark.parametrize("ops_a_launch", [1, 2])
def test_break_even_is_where_the_gpu_takes_over(ops_a_launch):
    at = pace(ops_a_launch=ops_a_launch).break_even_elements
    for elements, bound in ((at, "GPU"), (at - 1, "host")):
        found = pace(elements=elements, ops_a_launch=ops_a_launch)
        assert found.bound_by == bound


def test_who_is_blamed():
    assert pace(elements=1).bound_by == "host"
    assert pace(elements=2**24).bound_by == "GPU"
    assert pace(sync_every=1).bound_by == "waiting for each other"
    assert pace(depth=1).bound_by == "a short queue"
    # no wait ever happens
    assert pace(ops=10, sync_every=10).bound_by == "host"


def test_numbers_of_the_page():
    found = pace()
    assert found.break_even_elements == 1_200_000
    assert 65536 * 12 == 786_432
    assert round(65536 * 12 / 4.8e6, 2) == 0.16
    assert round(found.kernel_us, 2) == 2.16
    assert round(found.us_per_op, 2) == 5.01
    assert round(found.gpu_busy_percent) == 43
    assert pace(sync_every=1).us_per_op == pytest.approx(17.16, abs=0.01)
    graph = pace(**HOWS["Graphs of 100 kernels"])
    assert round(graph.us_per_op, 2) == 2.18
    assert graph.break_even_elements == 1


def test_chart_goes_through_the_given_size():
    for elements in (1, 3000, 2**16, 2**30):
        chart = pace_chart(elements=elements, sync_every=2)
        (yours,) = chart.points
        mine, gpu = (dict(line.points) for line in chart.lines)
        found = pace(elements=elements, sync_every=2)
        assert (yours.x, yours.y) == (elements, found.us_per_op)
        assert mine[elements] == found.us_per_op
        assert gpu[elements] == found.kernel_us
        assert all(mine[n] >= gpu[n] for n in gpu)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"kernel_us": 9.0},
        {"sync_every": 2},
        {"depth": 1, "latency_us": 0},
        {"kernels": 1},
    ],
)
def test_trace_ends_with_the_result(given):
    arguments = {
        "kernels": 10,
        "launch_us": 5.0,
        "kernel_us": 2.0,
        "latency_us": 3.0,
        "depth": 4,
        **given,
    }
    n = arguments.pop("kernels")
    times = [arguments.pop("kernel_us")] * n
    seen = []
    done = run(times, **arguments, visit=seen.append)
    assert done == seen == run(times, **arguments)

    frames = launch_trace(**given)
    assert len(frames) == n + 1
    last = frames[-1].picture
    assert last.end == done[-1].end
    for (_, spans), ends in zip(
        last.lanes,
        (("called", "queued"), ("start", "end")),
        strict=True,
    ):
        shown = [
            (s.start, s.end) for s in spans if s.mark not in ("wait", "gone")
        ]
        assert shown == [tuple(getattr(d, e) for e in ends) for d in done]
        # what is idle fills the rest
        assert [s.start for s in spans] == [0, *(s.end for s in spans[:-1])]
    assert not any(cell.text for cell in frames[-1].below.rows[0][1])
    for frame in frames:
        (row,) = frame.below.rows
        assert len(row[1]) == arguments["depth"]
        running = [c for c in row[1] if c.mark == "on"]
        assert len(running) <= 1 + (frame.picture.now == last.end)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: run([1.0], -1), "launch_us must be at least 0, got -1"),
        (lambda: run([-1.0], 1), "kernel_us must be at least 0"),
        (lambda: run([1.0], 1, depth=0), "depth must be at least 1"),
        (lambda: run([1.0], 1, sync_every=-1), "sync_every must be"),
        (lambda: total_us(0, 1, 1), "kernels must be at least 1"),
        (lambda: total_us(1, 1, 1, latency_us=-1), "latency_us must be"),
        (lambda: total_us(1, 1, 1, sync_us=float("nan")), "sync_us must be"),
        (lambda: pace(ops=0), "ops must be at least 1"),
        (lambda: pace(elements=0), "elements must be at least 1"),
        (lambda: pace(bandwidth_gb_s=0), "bandwidth_gb_s must be more than 0"),
        (lambda: pace(ops_a_launch=3), "ops_a_launch must divide the 1000"),
        (lambda: pace(least_us=-1), "least_us must be at least 0"),
        (lambda: pace(depth=0), "depth must be at least 1"),
        (lambda: launch_trace(kernels=31), "kernels must be 1 to 30, got 31"),
        (lambda: launch_trace(depth=0), "depth must be 1 to 12"),
        (lambda: launch_trace(kernel_us=0), "kernel_us must be at least 1"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def benchmark():
    file = ROOT / "benchmarks/hardware/performance/kernel_launch_overhead.py"
    spec = importlib.util.spec_from_file_location("launch_benchmark", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.gpu
def test_every_way_to_launch_computes_the_same():
    import torch

    bench = benchmark()
    for n in (1, 1000, 65537):
        for how, chain in bench.chains(n).items():
            x, y = chain.x, chain.y
            before = y.clone()
            chain.run()
            torch.cuda.synchronize()
            expected = before + bench.CHAIN * x
            assert torch.equal(y, expected), (how, n)


@pytest.mark.gpu
def test_a_full_queue_makes_the_host_wait():
    depth = benchmark().queue_depth()
    assert 100 < depth < 100_000
