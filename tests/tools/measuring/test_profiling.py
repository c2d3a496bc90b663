import importlib.util
import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from warpmap.tools.measuring import profiling
from warpmap.tools.measuring._decode_step import (
    DECODE_BYTES,
    LAYER,
    decode_step,
)
from warpmap.tools.measuring.profiling import (
    Event,
    Gap,
    communication,
    covered_ns,
    idle_gaps,
    kernel_times,
    launch_delays,
    on_gpu,
    read_trace,
    self_times,
    summarise,
)

ROOT = Path(__file__).parents[3]
HOST, STREAM, OTHER = ("9", "9"), ("0", "7"), ("0", "20")


def op(name, start, end):
    return Event(name, "cpu_op", start, end - start, HOST)


def call(number, start, end):
    about = {"correlation": number}
    return Event(
        "cudaLaunchKernel", "cuda_runtime", start, end - start, HOST, about
    )


def kernel(name, start, end, number=None, lane=STREAM):
    about = {} if number is None else {"correlation": number}
    return Event(name, "kernel", start, end - start, lane, about)


# Worked by hand

BY_HAND = [
    op("linear", 0, 100),
    op("t", 10, 20),
    op("addmm", 30, 90),
    call(1, 40, 60),
    op("relu", 100, 130),
    call(2, 110, 120),
    call(3, 200, 220),  # no operation around it
    kernel("gemm", 70, 150, 1),
    kernel("relu", 160, 170, 2),  # launched long before: not the host's fault
    kernel("gemm", 230, 260, 3),  # launched after the GPU ran dry
    Event("step", "gpu_user_annotation", 60, 300, STREAM),  # no work
]


def test_a_case_worked_by_hand():
    assert {
        r.name: (r.count, r.total_ns, r.self_ns) for r in self_times(BY_HAND)
    } == {
        "linear": (1, 100, 30),
        "t": (1, 10, 10),
        "addmm": (1, 60, 40),
        "relu": (1, 30, 20),
        "cudaLaunchKernel": (3, 50, 50),
    }
    assert idle_gaps(BY_HAND) == [
        Gap(150, 160, "relu", late=False),
        Gap(170, 230, "gemm", late=True),
    ]
    assert launch_delays(BY_HAND) == [30, 50, 30]
    found = summarise(
        [e for e in BY_HAND if e.category != "gpu_user_annotation"]
    )
    assert found.span_us == 0.26
    assert found.busy_percent == pytest.approx(100 * 120 / 260)
    assert (found.launched, found.gaps, found.idle_us) == (3, 2, 0.07)
    assert found.late_percent == pytest.approx(100 * 60 / 70)
    assert found.delay_us == 0.03
    rows = kernel_times(BY_HAND, {"gemm": 110}, bandwidth_gb_s=4)
    assert [(r.name, r.count, r.total_ns) for r in rows] == [
        ("gemm", 2, 110),
        ("relu", 1, 10),
    ]
    assert rows[0].share == pytest.approx(110 / 120)
    # 220 bytes in 110 ns are 2 GB/s, of 4
    assert (rows[0].bandwidth_share, rows[1].bandwidth_share) == (0.5, None)


def test_a_graph_is_one_launch():
    events = [call(5, 0, 50), kernel("a", 40, 44, 5), kernel("b", 46, 48, 5)]
    # the call has not returned, but b waits for the GPU, not for the host
    assert idle_gaps(events) == [Gap(44, 46, "b", late=False)]


def test_a_kernel_without_its_call_has_no_cause():
    assert idle_gaps([kernel("a", 0, 1), kernel("b", 3, 4)])[0].late is None
    assert launch_delays([kernel("a", 0, 1)]) == []


def test_communication_by_hand():
    ring = "ncclDevKernel_AllReduce"
    events = [
        kernel("gemm", 0, 10),
        kernel(ring, 5, 25, lane=OTHER),
        kernel("gemm", 20, 22),
        Event("Memcpy", "gpu_memcpy", 22, 30, STREAM),  # hides nothing
    ]
    assert communication(events) == (20, 13)
    assert communication(events[:1]) == (0, 0)


# Brute force


def random_trace(seed):
    """Nested operations and overlapping kernels, in whole ns."""
    rng = random.Random(seed)
    events = []

    def nest(start, end, depth):
        while end - start > 4 and depth < 4:
            left = rng.randint(start, end)
            right = rng.randint(left, end)
            if right > left:
                events.append(op(rng.choice("abcd"), left, right))
                nest(left, right, depth + 1)
            start = right

    nest(0, 300, 0)
    for i in range(rng.randint(1, 12)):
        start = rng.randint(0, 300)
        name = rng.choice(["gemm", "add", "ncclReduce"])
        end = start + rng.randint(1, 40)
        events.append(kernel(name, start, end, i, rng.choice([STREAM, OTHER])))
    rng.shuffle(events)
    return events


def running(events, now):
    return [e for e in events if e.start_ns <= now < e.end_ns]


def sampled(events):
    """Everything by looking at each ns: self, busy, gaps, communication."""
    last = max(e.end_ns for e in events)
    host = [e for e in events if e.category == "cpu_op"]
    gpu = [e for e in events if e.category == "kernel"]
    own, busy, comm, exposed, idle = Counter(), 0, 0, 0, []
    for now in range(last):
        inside = running(host, now)
        if inside:  # the shortest one is the innermost
            own[min(inside, key=lambda e: e.duration_ns).name] += 1
        names = {e.name for e in running(gpu, now)}
        busy += bool(names)
        comm += "ncclReduce" in names
        exposed += names == {"ncclReduce"}
        first, end = min(e.start_ns for e in gpu), max(e.end_ns for e in gpu)
        if first <= now < end and not names:
            idle.append(now)
    return own, busy, (comm, exposed), idle


def agrees_with_samples(module):
    for seed in range(60):
        events = random_trace(seed)
        own, busy, comm, idle = sampled(events)
        found = Counter({r.name: r.self_ns for r in module.self_times(events)})
        if (
            +found != own
            or module.covered_ns(on_gpu(events)) != busy
            or module.communication(events) != comm
            or [
                t
                for gap in module.idle_gaps(events)
                for t in range(gap.start_ns, gap.end_ns)
            ]
            != idle
        ):
            return False
    return True


def test_times_agree_with_looking_at_every_ns():
    assert agrees_with_samples(profiling)


class Faulty:
    """The analyser, with one function exchanged."""

    def __init__(self, **changed):
        self.changed = changed

    def __getattr__(self, name):
        return self.changed.get(name) or getattr(profiling, name)


def wrong_total_for_self(events):
    rows = self_times(events)
    return [
        profiling.HostTime(r.name, r.count, r.total_ns, r.total_ns)
        for r in rows
    ]


def wrong_sum_of_durations(events):
    return sum(e.duration_ns for e in events)


def wrong_gaps_after_each_kernel(events):
    gpu = on_gpu(events)
    return [
        Gap(a.end_ns, b.start_ns, b.name, None)
        for a, b in pairwise(gpu)
        if b.start_ns > a.end_ns
    ]


def wrong_all_exposed(events):
    comm, _ = communication(events)
    return comm, comm


@pytest.mark.parametrize(
    "fault",
    [
        {"self_times": wrong_total_for_self},
        {"covered_ns": wrong_sum_of_durations},
        {"idle_gaps": wrong_gaps_after_each_kernel},
        {"communication": wrong_all_exposed},
    ],
    ids=lambda fault: next(iter(fault)),
)
def test_samples_catch_a_wrong_analyser(fault):
    assert not agrees_with_samples(Faulty(**fault))


# PyTorch's profiler


def profiled(tmp_path, work, activities):
    with profile(activities=activities) as found:
        work()
    file = tmp_path / "trace.json"
    found.export_chrome_trace(str(file))
    return found, read_trace(file.read_text(encoding="utf-8"))


def test_self_times_agree_with_pytorch(tmp_path):
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16)
    )
    x = torch.randn(4, 16)
    model(x).sum().backward()

    def work():
        with record_function("my step"):
            for _ in range(3):
                model(x).sum().backward()

    found, events = profiled(tmp_path, work, [ProfilerActivity.CPU])
    theirs = {
        row.key: (row.count, row.cpu_time_total, row.self_cpu_time_total)
        for row in found.key_averages()
    }
    ours = {
        row.name: (row.count, row.total_ns / 1e3, row.self_ns / 1e3)
        for row in self_times(events)
    }
    assert ours.keys() == theirs.keys()
    assert "my step" in ours
    same = 0
    for name, (count, total, own) in theirs.items():
        # both read the same clock, in ns
        assert ours[name][2] == pytest.approx(own, abs=0.01 * count), name
        # PyTorch counts an operation once that calls only its own name
        assert ours[name][0] >= count
        if ours[name][0] == count:
            same += 1
            assert ours[name][1] == pytest.approx(total, abs=0.002 * count)
    assert same > 20


def test_digits_of_the_clock_are_kept():
    # as a float, the time since boot is off by up to half a ns
    line = '{"ph": "X", "cat": "cpu_op", "name": "a", "pid": 1, "tid": 1, '
    text = (
        '{"traceEvents": ['
        + line
        + '"ts": 8804428429929933.539, "dur": 0.001}, '
        + line
        + '"ts": 8804428429929933.540, "dur": 2.0}]}'
    )
    assert [(e.start_ns, e.duration_ns) for e in read_trace(text)] == [
        (0, 1),
        (1, 2000),
    ]


# The built-in step


@pytest.mark.parametrize("graph", [False, True])
def test_the_built_in_step_is_what_it_says(graph):
    events = read_trace(decode_step(layers=3, graph=graph))
    gpu = on_gpu(events)
    assert [e.name for e in gpu] == [*LAYER] * 3
    for event in gpu:
        expected = 2000 + DECODE_BYTES[event.name] / 4800
        assert event.duration_ns == pytest.approx(expected, abs=1)
    found = summarise(events)
    assert found.launched == 36
    busy = sum(e.duration_ns for e in gpu)
    assert covered_ns(gpu) == busy
    # between the first kernel and the last it is busy or idle
    between = gpu[-1].end_ns - gpu[0].start_ns
    assert round(1e3 * found.idle_us) == between - busy
    if graph:
        assert (found.gaps, found.late_percent) == (0, 0)


def test_numbers_of_the_page():
    now, fast, graph = (
        summarise(read_trace(decode_step(**change)))
        for change in ({}, {"bandwidth_gb_s": 9600}, {"graph": True})
    )
    assert round(now.span_us) == round(fast.span_us) == 487
    assert (round(now.busy_percent), round(fast.busy_percent)) == (41, 30)
    assert (round(graph.span_us), round(graph.busy_percent)) == (214, 93)
    assert (now.gaps, round(now.late_percent)) == (43, 96)
    assert (now.delay_us, round(graph.delay_us)) == (10, 109)
    top = kernel_times(read_trace(decode_step()), DECODE_BYTES)[0]
    assert (top.name, round(top.share, 2)) == ("gate_up", 0.32)
    assert DECODE_BYTES["gate_up"] == 67_108_864


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: read_trace("[1, 2]"), "text must be a Chrome trace"),
        (lambda: read_trace("no json"), "text must be a Chrome trace"),
        (lambda: read_trace('{"a": 1}'), "traceEvents"),
        (lambda: summarise([]), "events must not be empty"),
        (
            lambda: on_gpu(
                [kernel("a", 0, 1), kernel("b", 0, 1, lane=("1", "7"))]
            ),
            "events must be of one GPU, got 0, 1",
        ),
        (lambda: kernel_times([], bandwidth_gb_s=0), "bandwidth_gb_s must be"),
        (lambda: decode_step(layers=0), "layers must be at least 1, got 0"),
        (lambda: decode_step(bandwidth_gb_s=-1), "bandwidth_gb_s must be"),
        (lambda: decode_step(host_us=-1), "launch_us must be at least 0"),
    ],
)
def test_bad_input_is_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_an_empty_trace_is_no_mistake():
    assert read_trace('{"traceEvents": []}') == []
    assert read_trace("[]") == self_times([]) == idle_gaps([]) == []
    assert json.loads(decode_step())["traceEvents"]


# On a GPU

BOTH = [ProfilerActivity.CPU, ProfilerActivity.CUDA]


@pytest.mark.gpu
def test_kernel_times_agree_with_pytorch(tmp_path):
    x = torch.randn(512, 512, device="cuda")
    profiled(tmp_path, lambda: (x @ x).relu(), BOTH)  # starts CUPTI

    def work():
        for _ in range(5):
            (x @ x).relu().cpu()

    found, events = profiled(tmp_path, work, BOTH)
    theirs = {
        row.key: row.self_device_time_total
        for row in found.key_averages()
        if row.device_type == torch.autograd.DeviceType.CUDA
    }
    rows = kernel_times(events)
    assert len(rows) >= 3  # product, relu, copy
    for row in rows:
        assert row.total_ns / 1e3 == pytest.approx(
            theirs[row.name], abs=0.01 * row.count
        )
    # every kernel and copy has its call
    assert len(launch_delays(events)) == len(on_gpu(events))


@pytest.mark.gpu
def test_gaps_and_delays_are_those_that_were_made(tmp_path):
    import time

    x = torch.zeros(1, device="cuda")

    def work():
        x.add_(1)
        torch.cuda.synchronize()
        time.sleep(0.02)
        torch.cuda._sleep(40_000_000)  # some 20 ms
        x.add_(1)
        torch.cuda.synchronize()

    profiled(tmp_path, work, BOTH)
    _, events = profiled(tmp_path, work, BOTH)
    longest = max(idle_gaps(events), key=lambda g: g.end_ns - g.start_ns)
    assert 20e6 < longest.end_ns - longest.start_ns < 40e6
    assert longest.late
    spin = max(on_gpu(events), key=lambda e: e.duration_ns)
    # launched at once, and run after the spin
    assert launch_delays(events)[-1] > 0.9 * spin.duration_ns
    assert launch_delays(events)[0] < 1e6


@pytest.mark.gpu
def test_a_graph_leaves_fewer_gaps():
    file = ROOT / "benchmarks/tools/measuring/profiling.py"
    spec = importlib.util.spec_from_file_location("profiling_benchmark", file)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    eager, graph = benchmark.runs(layers=4)
    torch.testing.assert_close(eager(), graph(), rtol=0.05, atol=0.05)
    before, after = benchmark.summary(eager), benchmark.summary(graph)
    # the graph leaves out nothing
    assert after.launched >= 0.9 * before.launched > 40
    assert after.busy_percent > before.busy_percent
