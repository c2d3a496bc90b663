"""Counts are checked by running the operation on numbers that count."""

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from warpmap.hardware.performance.roofline import (
    CHIPS,
    H200,
    WEIGHTS,
    Ceilings,
    Work,
    attention,
    bound,
    break_even_batch,
    elementwise,
    gemm,
    layer_roofline,
    roofline_chart,
)

ROOT = Path(__file__).parents[3]


@dataclass
class Meter:
    """What an operation really does: FLOPs, and elements that move."""

    products_and_sums: int = 0
    softmax: int = 0
    read: set = field(default_factory=set)
    written: set = field(default_factory=set)

    @property
    def elements(self):
        """Each first read and each last write crosses the bus once."""
        return len(self.read) + len(self.written)


class Number:
    """A value that reports its operations to a meter."""

    def __init__(self, meter, value=1.0):
        self.meter, self.value = meter, value

    def __mul__(self, other):
        self.meter.products_and_sums += 1
        return Number(self.meter, self.value * other.value)

    def __add__(self, other):
        self.meter.products_and_sums += 1
        return Number(self.meter, self.value + other.value)


class Tensor:
    """Elements in memory, which note who touches them."""

    def __init__(self, meter, name):
        self.meter, self.name, self.values = meter, name, {}

    def __getitem__(self, index):
        self.meter.read.add((self.name, index))
        return Number(self.meter)

    def __setitem__(self, index, value):
        self.meter.written.add((self.name, index))
        self.values[index] = value


def run_addition(n):
    meter = Meter()
    x, y, z = (Tensor(meter, name) for name in "xyz")
    for i in range(n):
        z[i] = x[i] + y[i]
    return meter


def run_gemm(M, N, K):
    meter = Meter()
    x, w, y = (Tensor(meter, name) for name in "xwy")
    for m in range(M):
        for n in range(N):
            total = Number(meter, 0.0)
            for k in range(K):
                total = total + x[m, k] * w[k, n]
            y[m, n] = total
    return meter


def run_attention(B, T, S, H, Hkv, D, causal):
    meter = Meter()
    q, k, v, o = (Tensor(meter, name) for name in "qkvo")
    for b in range(B):
        for h in range(H):
            shared = h // (H // Hkv)
            for t in range(T):
                seen = S - T + t + 1 if causal else S
                for s in range(seen):
                    score = Number(meter, 0.0)
                    for d in range(D):
                        score = score + q[b, t, h, d] * k[b, s, shared, d]
                    meter.softmax += 5  # max, minus, exp, sum, divide
                for d in range(D):
                    out = Number(meter, 0.0)
                    for s in range(seen):
                        out = out + Number(meter) * v[b, s, shared, d]
                    o[b, t, h, d] = out
    return meter


def agrees(work, meter, element_bytes=2):
    return (work.flops, work.bytes) == (
        meter.products_and_sums,
        element_bytes * meter.elements,
    )


# B, T, S, H, Hkv, D, causal: prefill, decoding, a chunk, grouped heads, no mask
ATTENTIONS = [
    (1, 6, 6, 2, 2, 4, True),
    (3, 1, 9, 4, 2, 4, True),
    (1, 3, 8, 4, 1, 5, True),
    (2, 5, 3, 2, 1, 4, False),
]
SHAPES = [(1, 1, 1), (4, 4, 4), (2, 3, 5), (7, 1, 3)]


@pytest.mark.parametrize("n", [1, 17])
def test_elementwise_agrees_with_a_count(n):
    assert agrees(elementwise(n), run_addition(n))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gemm_agrees_with_a_count(shape):
    assert agrees(gemm(*shape), run_gemm(*shape))


def test_gemv_agrees_with_a_count():
    assert agrees(gemm(1, 6, 9), run_gemm(1, 6, 9))


@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_attention_agrees_with_a_count(case):
    assert agrees(attention(*case), run_attention(*case))


def test_softmax_is_the_share_of_attention_that_the_page_says():
    D = 16
    meter = run_attention(1, 8, 8, 2, 2, D, True)
    assert meter.softmax / meter.products_and_sums == 5 / (4 * D)


def wrong_gemm_one_flop_each(M, N, K):
    return Work(M * N * K, gemm(M, N, K).bytes)


def wrong_gemm_output_not_written(M, N, K):
    return Work(2 * M * N * K, 2 * (M * K + K * N))


def wrong_gemm_reads_per_use(M, N, K):
    return Work(2 * M * N * K, 2 * (2 * M * N * K + M * N))


@pytest.mark.parametrize(
    "wrong",
    [
        wrong_gemm_one_flop_each,
        wrong_gemm_output_not_written,
        wrong_gemm_reads_per_use,
    ],
)
def test_the_count_catches_a_wrong_gemm(wrong):
    assert not all(agrees(wrong(*s), run_gemm(*s)) for s in SHAPES)


def wrong_attention_no_mask(*case):
    return attention(*case[:-1], False)


def wrong_attention_keys_per_query_head(B, T, S, H, Hkv, D, causal):
    right = attention(B, T, S, H, Hkv, D, causal)
    return Work(right.flops, attention(B, T, S, H, H, D, causal).bytes)


def wrong_attention_scores_in_memory(B, T, S, H, Hkv, D, causal):
    right = attention(B, T, S, H, Hkv, D, causal)
    return Work(right.flops, right.bytes + 4 * B * H * T * S)


@pytest.mark.parametrize(
    "wrong",
    [
        wrong_attention_no_mask,
        wrong_attention_keys_per_query_head,
        wrong_attention_scores_in_memory,
    ],
)
def test_the_count_catches_a_wrong_attention(wrong):
    assert not all(agrees(wrong(*c), run_attention(*c)) for c in ATTENTIONS)


def test_flops_agree_with_pytorchs_counter():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counted:
        torch.ones(7, 33) @ torch.ones(33, 5)
    assert counted.get_total_flops() == gemm(7, 5, 33).flops

    q, k = torch.ones(2, 3, 8, 16), torch.ones(2, 3, 12, 16)
    with FlopCounterMode(display=False) as counted:
        (q @ k.mT).softmax(-1) @ k
    work = attention(B=2, T=8, S=12, H=3, Hkv=3, D=16, causal=False)
    assert counted.get_total_flops() == work.flops


def test_square_gemm_has_the_closed_form_intensity():
    for n in (1, 48, 8192):
        assert gemm(n, n, n).intensity == pytest.approx(n / 3)


def test_decode_attention_tends_to_the_heads_that_share_a_key():
    # 4 S H D FLOPs over 4 S Hkv D bytes, whatever batch and length
    for B in (1, 256):
        work = attention(B=B, T=1, S=10**7, H=64, Hkv=8, D=128)
        assert work.intensity == pytest.approx(64 / 8, rel=1e-5)


def test_time_is_the_longer_of_the_two_walls():
    chip = Ceilings(flops_per_s=100, bytes_per_s=10)
    memory = bound(Work(flops=50, bytes=20), chip)
    assert (memory.seconds, memory.wall) == (2.0, "memory")
    assert memory.flops_per_s == 25
    compute = bound(Work(flops=500, bytes=20), chip)
    assert (compute.seconds, compute.wall) == (5.0, "compute")
    assert compute.flops_per_s == 100


def test_the_roof_is_the_lower_of_slope_and_ceiling():
    rng = random.Random(0)
    for _ in range(200):
        work = Work(10 ** rng.uniform(0, 15), 10 ** rng.uniform(0, 12))
        roof = min(H200.flops_per_s, work.intensity * H200.bytes_per_s)
        assert bound(work).flops_per_s == pytest.approx(roof)
        assert (bound(work).wall == "compute") == (work.intensity >= H200.ridge)


def test_more_work_is_never_faster_and_a_better_chip_never_slower():
    rng = random.Random(1)
    for _ in range(200):
        M, N, K = (rng.randint(1, 5000) for _ in range(3))
        seconds = bound(gemm(M, N, K)).seconds
        for bigger in ((M + 1, N, K), (M, N + 1, K), (M, N, K + 1)):
            assert bound(gemm(*bigger)).seconds >= seconds
        for better in (
            Ceilings(H200.flops_per_s * 2, H200.bytes_per_s),
            Ceilings(H200.flops_per_s, H200.bytes_per_s * 2),
        ):
            assert bound(gemm(M, N, K), better).seconds <= seconds


def test_break_even_agrees_with_trying_every_batch():
    rng = random.Random(2)
    for _ in range(60):
        N, K = rng.randint(400, 9000), rng.randint(400, 9000)
        widths = rng.choice([(2, 2), (2, 1), (2, 0.5), (1, 1)])
        found = next(
            (
                M
                for M in range(1, 3000)
                if bound(gemm(M, N, K, *widths)).wall == "compute"
            ),
            None,
        )
        expected = break_even_batch(N, K, H200, *widths)
        if found is None:
            assert expected is None or expected >= 3000
        else:
            assert expected == found


def test_a_narrow_layer_never_turns_compute_bound():
    # for many rows the intensity of a square layer tends to its width / 2
    assert break_even_batch(412, 412) is None
    assert bound(gemm(10**9, 412, 412)).wall == "memory"
    assert break_even_batch(413, 413) is not None


def test_a_wide_layer_turns_compute_bound_at_the_ridge():
    # only the weights count: 2 M FLOPs for 2 bytes each
    assert break_even_batch(10**9, 10**9) == 207


def test_calculator_agrees_with_its_parts():
    layer = layer_roofline(64, 4096, 14336, 2, 0.5, 989.4, 4.8)
    work = gemm(64, 14336, 4096, 2, 0.5)
    assert layer.intensity == work.intensity
    assert layer.microseconds == bound(work).seconds * 1e6
    assert layer.tflops == pytest.approx(work.flops / layer.microseconds / 1e6)
    assert layer.ridge == pytest.approx(H200.ridge)
    assert layer.break_even_batch == break_even_batch(14336, 4096, H200, 2, 0.5)


@pytest.mark.parametrize("batch", [1, 64, 217, 8192])
@pytest.mark.parametrize("weight_bytes", [2, 0.5])
def test_chart_shows_the_layer_on_the_roof(batch, weight_bytes):
    chart = roofline_chart(batch, 8192, 8192, 2, weight_bytes, 989.4, 4.8)
    (roof,) = chart.lines
    for intensity, rate in roof.points:
        assert rate == pytest.approx(min(989.4, 4.8 * intensity))
    ridge, layer = chart.points
    assert ridge.x == pytest.approx(989.4 / 4.8)
    assert roof.points[0][0] <= layer.x <= roof.points[-1][0]
    assert layer.y == pytest.approx(min(989.4, 4.8 * layer.x))
    # 2 FLOPs a weight and token; inputs, weights and outputs move once
    moved = 2 * 2 * batch * 8192 + weight_bytes * 8192**2
    assert layer.x == pytest.approx(2 * batch * 8192**2 / moved)


def test_menus_hold_what_the_page_computes_with():
    h200 = CHIPS["H200 SXM"]
    assert h200 == {"peak_tflops": 989.4, "bandwidth_tb_s": 4.8}
    # 2 M N K FLOPs: half the bytes of the weights, half the batch
    crossings = [layer_roofline(**w).break_even_batch for w in WEIGHTS.values()]
    assert crossings == [218, 109, 55]
    for chip in CHIPS.values():
        layer_roofline(**chip)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: gemm(0, 1, 1), "M > 0 and finite, got 0"),
        (lambda: gemm(1, -2, 1), "N > 0 and finite, got -2"),
        (lambda: gemm(1, 1, 1, float("nan")), "element_bytes > 0"),
        (lambda: gemm(1, 1, 1, 2, 0), "weight_bytes > 0"),
        (lambda: elementwise(0), "elements > 0"),
        (lambda: attention(1, 1, 1, 3, 2, 8), "H a multiple of Hkv"),
        (lambda: attention(1, 2, 1, 2, 2, 8), "T <= S under the mask"),
        (lambda: attention(1, 1, 0, 2, 2, 8), "S > 0"),
        (lambda: Ceilings(float("inf"), 1), "flops_per_s > 0 and finite"),
        (lambda: Ceilings(1, 0), "bytes_per_s > 0"),
        (lambda: break_even_batch(0, 1), "N > 0"),
        (lambda: layer_roofline(batch=0), "batch > 0"),
        (lambda: layer_roofline(bandwidth_tb_s=-1), "bandwidth_tb_s > 0"),
    ],
)
def test_bad_input_says_what_came(call, says):
    with pytest.raises(ValueError, match=says):
        call()
