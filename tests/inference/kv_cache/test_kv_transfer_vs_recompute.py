"""Times against a queue that is simulated and FLOPs that PyTorch counts.

Units are checked by quantities that refuse to add bytes to seconds.
"""

import importlib.util
import math
import random
import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from warpmap.inference.decoding import kv_cache_size
from warpmap.inference.kv_cache.kv_transfer_vs_recompute import (
    CHIPS,
    PATHS,
    PRESETS,
    fetch_or_recompute,
    fetch_or_recompute_chart,
    fetch_seconds,
    first_of_all_gains,
    recompute_bound,
)

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/inference/kv_cache/kv_transfer_vs_recompute.md"
BENCHMARK = ROOT / "benchmarks/inference/kv_cache/kv_transfer_vs_recompute.py"


def load(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- dimensions ----------------------------------------------------------------


@dataclass(frozen=True)
class Quantity:
    """A number of some dimensions; only equal ones can be added or compared."""

    value: float
    units: tuple[tuple[str, int], ...] = ()

    def _same(self, other):
        if other in (0, math.inf):  # zero of any unit is zero
            return other
        if not isinstance(other, Quantity) or other.units != self.units:
            raise TypeError(f"{self} and {other} do not have one unit")
        return other.value

    def __add__(self, other):
        return Quantity(self.value + self._same(other), self.units)

    __radd__ = __add__

    def __lt__(self, other):
        return self.value < self._same(other)

    def __gt__(self, other):
        return self.value > self._same(other)

    def _times(self, other, sign):
        other = other if isinstance(other, Quantity) else Quantity(other)
        units = dict(self.units)
        for unit, power in other.units:
            units[unit] = units.get(unit, 0) + sign * power
        kept = tuple(sorted((u, p) for u, p in units.items() if p))
        return Quantity(self.value * other.value**sign, kept)

    def __mul__(self, other):
        return self._times(other, 1)

    __rmul__ = __mul__

    def __truediv__(self, other):
        return self._times(other, -1)

    def __rtruediv__(self, other):
        return Quantity(other) / self


BYTE, FLOP, SECOND = (Quantity(1, ((u, 1),)) for u in ("byte", "flop", "s"))


def test_fetching_takes_seconds():
    got = fetch_seconds(
        pieces=7,
        piece_bytes=2e6 * BYTE,
        bytes_per_s=50e9 * BYTE / SECOND,
        latency_s=1e-5 * SECOND,
        issue_s=5e-6 * SECOND,
    )
    assert got.units == SECOND.units
    assert got.value == pytest.approx(1e-5 + 7 * 4e-5)


def test_recomputing_takes_seconds():
    got = recompute_bound(
        flops=1e12 * FLOP,
        weight_bytes=16e9 * BYTE,
        flops_per_s=500e12 * FLOP / SECOND,
        bytes_per_s=4e12 * BYTE / SECOND,
    )
    assert got.seconds.units == SECOND.units
    assert got.seconds.value == pytest.approx(4e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bytes_per_s": 50e9 * SECOND / BYTE},
        {"piece_bytes": 2e6 * FLOP},
        {"latency_s": 1e-5},
        {"issue_s": 5e-6 * BYTE},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_mixed_dimensions_are_caught(wrong):
    right = {
        "piece_bytes": 2e6 * BYTE,
        "bytes_per_s": 50e9 * BYTE / SECOND,
        "latency_s": 1e-5 * SECOND,
        "issue_s": 5e-6 * SECOND,
    }
    with pytest.raises(TypeError, match="one unit"):
        fetch_seconds(pieces=7, **{**right, **wrong})


def test_prefixes_are_decimal():
    """By hand, in exact fractions, from the units in the names."""
    size = fetch_or_recompute(
        tokens=100,
        layers=3,
        heads=5,
        qk_head_dim=7,
        v_head_dim=11,
        active_billions=2.0,
        weights_gb=4.0,
        cache_bytes_per_token=1000,
        block_tokens=16,
        pieces_per_block=2,
        link_gb_s=0.5,
        latency_us=30.0,
        issue_us=1.0,
        gpus=2,
        peak_tflops=100.0,
        achieved_percent=40.0,
        memory_tb_s=2.0,
    )
    piece = Fraction(16 * 1000, 2)
    fetch = Fraction(30, 10**6) + 7 * 2 * piece / (5 * 10**8)
    pairs = 100 * 101 // 2
    flops = 2 * 2 * 10**9 * 100 + 2 * pairs * 3 * 5 * (7 + 11)
    recompute = Fraction(flops, 2 * 100 * 10**12) / Fraction(40, 100)
    reading = Fraction(4 * 10**9, 2 * 2 * 10**12)
    assert size.fetch_bytes == 7 * 16 * 1000
    assert size.fetch_ms == pytest.approx(float(1000 * fetch))
    assert size.recompute_tflop == pytest.approx(flops / 10**12)
    assert size.recompute_ms == pytest.approx(
        float(1000 * max(recompute, reading))
    )
    assert (size.wall == "compute") == (recompute > reading)


@pytest.mark.parametrize(
    "scaled",
    [
        ("cache_bytes_per_token", "link_gb_s"),
        ("weights_gb", "memory_tb_s"),
    ],
)
def test_other_units_of_bytes_change_no_time(scaled):
    base = {"cache_bytes_per_token": 4000, "link_gb_s": 3.0}
    base |= {"weights_gb": 14.0, "memory_tb_s": 0.5}
    times = fetch_or_recompute(**base)
    other = fetch_or_recompute(
        **{**base, **{name: 8 * base[name] for name in scaled}}
    )
    assert other.fetch_ms == pytest.approx(times.fetch_ms)
    assert other.recompute_ms == pytest.approx(times.recompute_ms)
    assert other.break_even_tokens == times.break_even_tokens


# -- the parts -----------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_fetching_agrees_with_a_simulated_queue(seed):
    pick = random.Random(seed)
    pieces, wire = pick.randint(1, 50), pick.uniform(0.1, 3)
    issue, latency = pick.uniform(0, 3), pick.uniform(0, 10)
    issued = link_free = 0.0
    for _ in range(pieces):
        issued += issue
        link_free = max(link_free, issued) + wire
    got = fetch_seconds(pieces, wire, 1.0, latency, issue)
    # the queue also waits for the first piece, or ends with the last
    assert latency + link_free - got == pytest.approx(min(issue, wire))


class Tiny(torch.nn.Module):
    """A layer that decodes from a cache, so that no masked score is made."""

    def __init__(self, hidden, heads, qk_dim, v_dim, width):
        super().__init__()
        self.heads = heads
        sizes = {
            "q": (hidden, heads * qk_dim),
            "k": (hidden, heads * qk_dim),
            "v": (hidden, heads * v_dim),
            "out": (heads * v_dim, hidden),
            "up": (hidden, width),
            "down": (width, hidden),
        }
        for name, (rows, columns) in sizes.items():
            setattr(self, name, torch.nn.Linear(rows, columns, bias=False))
        self.keys, self.values = [], []

    def forward(self, x):
        split = (self.heads, 1, -1)
        self.keys.append(self.k(x).view(split))
        self.values.append(self.v(x).view(split))
        k, v = torch.cat(self.keys, dim=1), torch.cat(self.values, dim=1)
        probs = (self.q(x).view(split) @ k.mT).softmax(dim=-1)
        x = x + self.out((probs @ v).view(1, -1))
        return x + self.down(self.up(x).relu())


@pytest.mark.parametrize(
    ("qk_dim", "v_dim"), [(8, 8), (12, 8)], ids=["GQA", "MLA"]
)
def test_flops_agree_with_what_pytorch_counts(qk_dim, v_dim):
    T, hidden, heads = 13, 16, 4
    layers = [Tiny(hidden, heads, qk_dim, v_dim, 24) for _ in range(2)]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for x in torch.randn(T, 1, hidden):
            for layer in layers:
                x = layer(x)
    active = sum(p.numel() for layer in layers for p in layer.parameters())
    got = fetch_or_recompute(
        tokens=T,
        layers=2,
        heads=heads,
        qk_head_dim=qk_dim,
        v_head_dim=v_dim,
        active_billions=active / 1e9,
        weights_gb=1e-12,
    )
    assert got.recompute_tflop * 1e12 == pytest.approx(
        counter.get_total_flops()
    )
    linear = 2 * active * T
    assert got.attention_percent == pytest.approx(
        100 * (1 - linear / counter.get_total_flops())
    )


def test_few_tokens_wait_for_the_weights():
    few = fetch_or_recompute(tokens=16)
    assert few.wall == "memory"
    assert few.recompute_ms == pytest.approx(13.9592 / 4.8)
    assert fetch_or_recompute(tokens=1024).wall == "compute"


# -- where they meet -----------------------------------------------------------


def made_up(seed):
    """A small case whose times meet at a few thousand tokens, or nowhere."""
    pick = random.Random(seed)
    return {
        "layers": pick.randint(1, 4),
        "heads": pick.randint(1, 8),
        "qk_head_dim": pick.choice([32, 64]),
        "v_head_dim": 32,
        "active_billions": 10 ** pick.uniform(-5, -4),
        "weights_gb": 10 ** pick.uniform(-4, -1),
        "cache_bytes_per_token": pick.randint(100, 4000),
        "block_tokens": pick.choice([1, 3, 16, 64]),
        "pieces_per_block": pick.choice([1, 4]),
        "link_gb_s": 10 ** pick.uniform(0.4, 1.2),
        "latency_us": pick.choice([0.0, 10.0, 1000.0]),
        "issue_us": pick.choice([0.0, 0.2]),
        "peak_tflops": 1.0,
        "memory_tb_s": 1.0,
    }


@pytest.mark.parametrize("seed", range(24))
def test_break_even_length_agrees_with_a_scan(seed):
    given, most = made_up(seed), 6000

    def faster(n):
        # times alone, worked out once more
        blocks = math.ceil(n / given["block_tokens"])
        pieces = blocks * given["pieces_per_block"]
        piece = given["cache_bytes_per_token"] * given["block_tokens"]
        piece /= given["pieces_per_block"]
        wire = piece / given["link_gb_s"] / 1e9
        each = max(given["issue_us"] / 1e6, wire)
        dims = given["qk_head_dim"] + given["v_head_dim"]
        pairs = given["layers"] * given["heads"] * n * (n + 1) / 2
        flops = 2e9 * given["active_billions"] * n + 2 * pairs * dims
        computing = flops / (given["peak_tflops"] * 1e12 * 0.5)
        reading = given["weights_gb"] / given["memory_tb_s"] / 1e3
        return given["latency_us"] / 1e6 + pieces * each < max(
            computing, reading
        )

    slower = [n for n in range(1, most + 1) if not faster(n)]
    want = max(slower, default=0) + 1
    got = fetch_or_recompute(**given).break_even_tokens
    if want > most:  # it lies beyond the scan
        assert got is None or got > most
    else:
        assert got == want


def test_scans_meet_within_reach():
    """The cases above are not all trivial."""
    lengths = [
        fetch_or_recompute(**made_up(seed)).break_even_tokens
        for seed in range(24)
    ]
    assert sum(1 < (n or 0) <= 6000 for n in lengths) >= 8
    assert 1 in lengths


@pytest.mark.parametrize("seed", range(12))
def test_break_even_bandwidth_parts_fetching_from_recomputing(seed):
    given = made_up(seed) | {"tokens": 500}
    meet = fetch_or_recompute(**given).break_even_gb_s
    if meet is None:
        limitless = fetch_or_recompute(**{**given, "link_gb_s": 1e12})
        assert not limitless.fetch_is_faster
        return
    for factor, faster in ((0.999, False), (1.001, True)):
        times = fetch_or_recompute(**{**given, "link_gb_s": factor * meet})
        assert times.fetch_is_faster == faster


def test_no_bandwidth_helps_where_start_up_takes_longer():
    times = fetch_or_recompute(tokens=16, latency_us=1e4)
    assert times.break_even_gb_s is None
    issuing = fetch_or_recompute(pieces_per_block=64, issue_us=10.0)
    assert issuing.break_even_gb_s is None


def test_short_prefixes_may_be_fetched_too():
    """Below the break-even length recomputing need not always be faster."""
    few, more = fetch_or_recompute(tokens=16), fetch_or_recompute(tokens=4096)
    assert few.fetch_is_faster
    assert not more.fetch_is_faster
    assert more.break_even_tokens > 4096


def test_gains_that_never_come_have_no_length():
    assert first_of_all_gains(lambda n: -n) is None
    assert first_of_all_gains(lambda n: n + 1) == 1


# times of the default case by mistakes seen in such estimates, in ms
BYTES, TOKENS, ACTIVE = 131072, 8192, 6.9793e9
SQUARE = 4 * 32 * 32 * 128 * TOKENS**2
FETCH_FAULTS = {
    "bits for bytes": BYTES * TOKENS / 10e9,
    "GiB for GB": BYTES * TOKENS / (1.25 * 2**30),
    "keys without values": BYTES * TOKENS / 2 / 1.25e9,
    "every query head": 4 * BYTES * TOKENS / 1.25e9,
}
RATE = 989.4e12 / 2
PREFILL_FAULTS = {
    "no attention": 2 * ACTIVE * TOKENS / RATE,
    "masked scores counted": (2 * ACTIVE * TOKENS + SQUARE) / RATE,
    "one operation a weight": (ACTIVE * TOKENS + SQUARE / 2) / RATE,
    "the sparse peak": (2 * ACTIVE * TOKENS + SQUARE / 2) / RATE / 2,
    "the head and embedding too": (2 * 8.03e9 * TOKENS + SQUARE / 2) / RATE,
}


def test_worked_case():
    times = fetch_or_recompute(latency_us=0.0)
    assert times.fetch_ms == pytest.approx(1000 * BYTES * TOKENS / 1.25e9)
    right = (2 * ACTIVE * TOKENS + SQUARE / 2) / RATE
    # a token meets itself too: half a token more than half the square
    assert times.recompute_ms == pytest.approx(1000 * right, rel=1e-4)


@pytest.mark.parametrize("fault", [*FETCH_FAULTS, *PREFILL_FAULTS])
def test_the_worked_case_catches(fault):
    times = fetch_or_recompute(latency_us=0.0)
    if fault in FETCH_FAULTS:
        wrong, right = FETCH_FAULTS[fault], times.fetch_ms
    else:
        wrong, right = PREFILL_FAULTS[fault], times.recompute_ms
    assert 1000 * wrong != pytest.approx(right, rel=0.02)


# -- menus, chart, page --------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_caches_are_those_of_the_cache_calculator(name):
    size = kv_cache_size.kv_cache_size(**kv_cache_size.PRESETS[name])
    assert PRESETS[name]["cache_bytes_per_token"] == size.bytes_per_token


def test_models_with_windows_are_left_out():
    assert "Mistral 7B v0.1" not in PRESETS
    assert {"Llama 3 8B", "DeepSeek-V3"} <= set(PRESETS)


def test_defaults_are_in_the_menus():
    default = fetch_or_recompute()
    named = fetch_or_recompute(
        **PRESETS["Llama 3 8B"],
        **PATHS["network, 10 Gbit/s"],
        **CHIPS["H200 SXM"],
    )
    assert named.fetch_ms == default.fetch_ms
    assert named.recompute_ms == pytest.approx(default.recompute_ms, rel=1e-4)


def test_chart_shows_both_times():
    times = fetch_or_recompute(tokens=5000)
    chart = fetch_or_recompute_chart(tokens=5000)
    fetch, recompute = (dict(line.points)[5000] for line in chart.lines)
    assert (fetch, recompute) == (times.fetch_ms, times.recompute_ms)
    assert chart.points[1].x == times.break_even_tokens


def test_page_table_agrees():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text("utf-8").splitlines()
        if line.startswith("| ")
    ]
    shown = {row[0]: row[1:] for row in rows if row[0] in PRESETS}
    assert len(shown) >= 5
    for name, cells in shown.items():
        given = PRESETS[name]
        times = fetch_or_recompute(**given)
        flops = times.recompute_tflop * 1e12 / 8192
        assert cells == [
            f"{given['cache_bytes_per_token']:,}",
            f"{flops / 1e9:.1f}",
            f"{times.break_even_gb_s:.2f}",
        ]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"tokens": 1 << 31}, "tokens must be at most 1073741824"),
        ({"pieces_per_block": 0}, "pieces_per_block must be at least 1"),
        ({"link_gb_s": 0.0}, "link_gb_s must be positive, got 0.0"),
        ({"memory_tb_s": math.inf}, "memory_tb_s must be positive, got inf"),
        ({"latency_us": -1.0}, "latency_us must not be negative"),
        ({"issue_us": math.nan}, "issue_us must not be negative, got nan"),
        ({"achieved_percent": 101.0}, "achieved_percent must be at most 100"),
    ],
)
def test_bad_numbers_are_named(wrong, says):
    with pytest.raises(ValueError, match=says):
        fetch_or_recompute(**wrong)


def test_the_benchmark_s_layers_compute_attention():
    bench = load(BENCHMARK)
    like = torch.empty(0)
    layers = [
        bench.GQA(like, C=64, H=8, Hkv=2, D=16, F=96),
        bench.MLA(
            like,
            **{"C": 64, "H": 4, "q_rank": 24, "rank": 20},
            **{"nope": 16, "rope": 8, "Dv": 12, "F": 96},
        ),
    ]
    for layer in layers:
        bench.check(layer, tokens=20)
    attend = bench.attend
    bench.attend = lambda q, k, v: attend(q, k, v, causal=False)
    for layer in layers:
        with pytest.raises(RuntimeError, match="relative error"):
            bench.check(layer, tokens=20)


def test_the_benchmark_s_layers_have_the_counted_weights():
    bench = load(BENCHMARK)
    like = torch.empty(0, device="meta")
    for name, model in bench.MODELS.items():
        layer = bench.LAYERS[name](like)
        owned = [*vars(layer).values(), *vars(layer.ffn).values()]
        matrices = sum(t.numel() for t in owned if isinstance(t, torch.Tensor))
        given = PRESETS[model]
        counted = given["layers"] * matrices / 1e9
        # routers are not there, 0.3% of DeepSeek-V3's active weights
        assert counted == pytest.approx(given["active_billions"], rel=4e-3)
        cached = 2 * given["layers"] * layer.cached
        assert cached == given["cache_bytes_per_token"]


def test_runs_without_torch_and_numpy():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from warpmap.inference.kv_cache.kv_transfer_vs_recompute import *\n"
        "print(fetch_or_recompute().fetch_bytes)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "src",
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "1073741824"
