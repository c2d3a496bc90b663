"""Timings are read aright on a clock with known answers; products are exact."""

import itertools
import random
import statistics

import pytest
import torch
from kernel_checks import mutant

from warpmap import DEVICE
from warpmap.hardware.performance import matmul_ceiling as module
from warpmap.hardware.performance.matmul_ceiling import (
    DTYPES,
    FORMATS,
    INPUTS,
    SPAN,
    Shape,
    call_times,
    matrix,
    measure,
    neighbours,
    product,
    row_alignment,
    summarize,
    toggled_bits,
    useful_share,
)


class Machine:
    """A synthetic clock: running costs what is planned, reading it nothing.

    It ticks: what it shows is rounded down to a whole tick.
    """

    def __init__(self, plan, tick=1e-9):
        self.plan, self.tick, self.now, self.runs = plan, tick, 0.0, 0

    def run(self):
        self.now += self.plan(self.runs)
        self.runs += 1

    def clock(self):
        return self.now // self.tick * self.tick


def timings(warm_up=0, usual=2e-3, noise=0.01, outliers=(), calls=60):
    """Calls that get faster, then keep their time but for noise."""
    rng = random.Random(1)
    slow = [usual * (1.3 + 0.2 * (warm_up - n)) for n in range(warm_up)]
    steady = [
        usual * (1 + rng.uniform(-noise, noise)) for _ in range(calls - warm_up)
    ]
    times = slow + steady
    for n in outliers:
        times[n] *= 6
    return times


def check_warm_up(summarize, warm_up):
    said = summarize(timings(warm_up))
    assert said.warm_up == warm_up
    assert said.median_s == pytest.approx(2e-3, rel=0.01)
    assert said.outliers == 0
    assert 0.01 < said.spread < 0.02  # of noise that is uniform in 2%


def check_outliers(summarize):
    said = summarize(timings(3, outliers=(5, 30, 31, 59)))
    assert (said.warm_up, said.outliers) == (3, 4)
    assert said.median_s == pytest.approx(2e-3, rel=0.01)


def check_fast_start(summarize):
    """A cool chip starts fast: what it does not keep up does not count."""
    said = summarize([1e-3] * 9 + timings(0, calls=40))
    assert said.warm_up == 9
    assert said.median_s == pytest.approx(2e-3, rel=0.01)


def check_never_settles(summarize):
    times = [1.0 * 1.2**n for n in range(20, 0, -1)]
    said = summarize(times)
    assert said.warm_up == 10
    assert said.median_s == statistics.median(times[10:])
    assert said.spread > 1


def check_statistics(summarize):
    for warm_up in (0, 1, 7, 20):
        check_warm_up(summarize, warm_up)
    check_outliers(summarize)
    check_fast_start(summarize)
    check_never_settles(summarize)


def test_the_statistics_find_what_was_planted():
    check_statistics(summarize)


@pytest.mark.parametrize(
    "fault",
    [
        ("counted = times[warm_up:]", "counted = list(times)"),
        ("median = statistics.median(counted)", "median = sum(counted) / 47"),
        ("median = statistics.median(counted)", "median = min(counted)"),
        ("for t in (times[first], middle)", "for t in (times[first],)[:0]"),
        ("abs(t - usual) <=", "(t - usual) <="),
        ("half = len(times) // 2", "half = len(times) // 8"),
        ("t > OUTLIER * median", "t > median"),
    ],
    ids=lambda fault: fault[1],
)
def test_wrong_statistics_are_caught(fault, tmp_path):
    wrong = mutant(module, *fault, tmp_path)
    with pytest.raises(AssertionError):
        check_statistics(wrong.summarize)


@pytest.mark.parametrize("times", [[1.0] * (2 * SPAN - 1), [1.0] * 20 + [0.0]])
def test_refuses_what_is_no_list_of_timings(times):
    with pytest.raises(ValueError, match="times must be"):
        summarize(times)


@pytest.mark.parametrize("usual", [2e-7, 3e-5, 2e-2])
def test_short_calls_are_repeated_until_the_clock_sees_them(usual):
    machine = Machine(lambda n: usual, tick=1e-6)
    times = call_times(machine.run, 12, machine.clock)
    assert len(times) == 12
    assert times == pytest.approx([usual] * 12, rel=2e-3)


def test_each_long_call_is_timed_by_itself():
    machine = Machine(lambda n: 0.5 if n == 0 else 0.1 + n / 100)
    times = call_times(machine.run, 12, machine.clock)
    assert times == pytest.approx([0.5] + [0.1 + n / 100 for n in range(1, 12)])


# Shapes


def test_share_agrees_with_a_count_of_what_every_sm_multiplies():
    for shape in [*neighbours(1500, (-1, 0, 36)), Shape(1, 1, 8)]:
        left = [
            (m, n)
            for m in range(0, shape.M, 128)
            for n in range(0, shape.N, 256)
        ]
        rounds = 0
        while left:
            del left[:132]
            rounds += 1
        whole = rounds * 132 * 128 * 256
        expected = shape.M * shape.N / whole
        assert useful_share(shape) == pytest.approx(expected)


def test_neighbours_change_one_side():
    shapes = neighbours()
    square = Shape(4096, 4096, 4096)
    assert shapes[0] == square
    assert len(shapes) == len(set(shapes)) == 1 + 3 * 6
    for shape in shapes[1:]:
        changed = [s for s in "MNK" if getattr(shape, s) != 4096]
        assert len(changed) == 1


def test_alignment_is_that_of_every_row():
    for element_bytes in (1, 2, 4):
        for length in range(1, 70):
            starts = [n * length * element_bytes for n in range(20)]
            best = max(
                d for d in (1, 2, 4, 8, 16) if not any(s % d for s in starts)
            )
            assert row_alignment(length, element_bytes) == best


# Numbers


def test_toggled_bits_agree_with_a_count():
    x = torch.randint(-128, 128, (3, 9), dtype=torch.int8)
    rows = x.tolist()
    count = [
        bin((a ^ b) & 0xFF).count("1")
        for row in rows
        for a, b in itertools.pairwise(row)
    ]
    assert toggled_bits(x) == pytest.approx(sum(count) / len(count))
    for dtype in {*DTYPES.values()}:
        assert toggled_bits(torch.ones(2, 9).to(dtype)) == 0
    signs = torch.tensor([[1.0, -1.0, 1.0]])
    assert toggled_bits(signs) == toggled_bits(signs.bfloat16()) == 1


@pytest.mark.parametrize("fmt", FORMATS)
def test_inputs_are_what_they_say(fmt):
    wide = 16 if fmt == "int8" else 1
    for inputs in INPUTS:
        x = matrix(inputs, 64, 256, fmt)
        assert x.dtype == DTYPES[fmt]
        values = x.double().cpu()
        if inputs in ("zeros", "constant"):
            assert (values == (inputs == "constant")).all()
        elif inputs == "normal":
            assert values.std() == pytest.approx(wide, rel=0.05)
            assert values.mean().abs() < 0.06 * wide
        elif fmt == "int8":
            assert (values.min(), values.max()) == (-128, 127)
        else:
            assert 0 <= values.min() < 0.01
            assert 0.99 < values.max() <= 1
            assert values.mean() == pytest.approx(0.5, abs=0.02)


def test_refuses_other_formats_and_inputs():
    for bad in (("ones", "bf16"), ("normal", "fp64")):
        with pytest.raises(ValueError, match="fmt must be one of"):
            matrix(bad[0], 2, 2, bad[1])


@pytest.mark.parametrize("fmt", FORMATS)
def test_products_agree_with_float64(fmt):
    before = torch.get_float32_matmul_precision()
    a, b = matrix("normal", 32, 64, fmt), matrix("normal", 48, 64, fmt)
    y = product(a, b, fmt)()
    exact = a.double() @ b.double().T
    assert torch.get_float32_matmul_precision() == before
    if fmt == "int8":
        assert torch.equal(y.double(), exact)
        return
    # 64 terms err by 8 * 8 roundings in fp32; tf32 keeps 10 bits of each factor
    eps = {"fp32": 2**-18, "tf32": 2**-8, "fp16": 2**-11}.get(fmt, 2**-8)
    size = a.double().abs() @ b.double().abs().T
    assert (y.double() - exact).abs().le(eps * size).all()


@pytest.mark.slow
@pytest.mark.parametrize("inputs", INPUTS)
def test_measures_on_this_machine(inputs):
    rate, said = measure(Shape(128, 128, 128), "fp32", inputs, calls=12)
    assert rate > 0
    assert rate == pytest.approx(2 * 128**3 / said.median_s / 1e12)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_gpu_is_timed_by_its_own_clock(fmt):
    shape = Shape(4096, 4096, 4096)
    # its spread is no check: other tests share the GPU
    rate, _ = measure(shape, fmt)
    assert DEVICE == "cuda"
    assert 1 < rate < 5000
