"""Every access is compared with a cache kept as a plain list."""

import importlib.util
import random
from pathlib import Path

import pytest
from kernel_checks import mutant

from warpmap.hardware.gpu import memory_hierarchy
from warpmap.hardware.gpu.memory_hierarchy import (
    GPUS,
    KIB,
    L1_WAYS,
    L2_WAYS,
    LINE_BYTES,
    MIB,
    Cache,
    chase,
    chase_latency,
    chase_trace,
    hit_share,
    latency_chart,
    ring,
)

ROOT = Path(__file__).parents[3]


class ListCache:
    """All lines that are held, in one list with the time of their last use."""

    def __init__(self, size, ways, line):
        self.sets, self.ways, self.line = size // ways // line, ways, line
        self.held, self.time = [], 0

    def access(self, address):
        self.time += 1
        start = address - address % self.line
        for entry in self.held:
            if entry[0] == start:
                entry[1] = self.time
                return True
        rivals = [
            entry
            for entry in self.held
            if (entry[0] - start) % (self.line * self.sets) == 0
        ]
        if len(rivals) == self.ways:
            self.held.remove(min(rivals, key=lambda entry: entry[1]))
        self.held.append([start, self.time])
        return False


def random_traffic(rng, line, lines):
    """Addresses that come back: a walk, jumps, and short loops."""
    at, found = 0, []
    for _ in range(300):
        kind = rng.random()
        if kind < 0.3:
            at = rng.randrange(lines * line)
        elif kind < 0.6 and found:
            at = rng.choice(found[-20:])
        else:
            at = (at + rng.choice([1, line, 3 * line])) % (lines * line)
        found.append(at)
    return found


def lists_agree(cache_class):
    rng = random.Random(3)
    for _ in range(60):
        sets, ways = rng.choice([1, 2, 3, 4, 7]), rng.choice([1, 2, 3, 4, 8])
        line = rng.choice([32, 128, 100])
        size = sets * ways * line
        ours, plain = cache_class(size, ways, line), ListCache(size, ways, line)
        for address in random_traffic(rng, line, 3 * sets * ways):
            if ours.access(address) != plain.access(address):
                return False
    return True


def test_every_access_agrees_with_a_plain_list():
    assert lists_agree(Cache)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("            del kept[line]", "            return True"),  # FIFO
        ("next(iter(kept))", "next(reversed(kept))"),  # drops the newest
        ("len(kept) == self.ways", "len(kept) > self.ways"),
        ("line % len(self.sets)", "line // self.ways % len(self.sets)"),
        ("line = address // self.line", "line = address"),
        ("kept = self.sets[line % len(self.sets)]", "kept = self.sets[0]"),
    ],
)
def test_the_list_catches_a_wrong_cache(right, wrong, tmp_path):
    assert not lists_agree(
        mutant(memory_hierarchy, right, wrong, tmp_path).Cache
    )


def test_two_levels_agree_with_plain_lists():
    rng = random.Random(5)
    for _ in range(40):
        sizes = [(rng.choice([1, 2, 3]), 2), (rng.choice([4, 6, 8]), 4)]
        ours = [Cache(s * w * 128, w) for s, w in sizes]
        plain = [ListCache(s * w * 128, w, 128) for s, w in sizes]
        addresses = random_traffic(rng, 128, 60)
        seen, expected = [], []
        answers = chase(
            ours, addresses, 1, lambda *step, told=seen: told.append(step)
        )
        for address in addresses:
            if plain[0].access(address):
                level = 0
            else:
                level = 1 if plain[1].access(address) else 2
            expected.append((address, level))
        assert seen == expected
        assert answers == [
            sum(level == n for _, level in expected) for n in range(3)
        ]


def test_ring_meets_every_place_once():
    for count in (1, 2, 3, 100):
        order = ring(count, seed=7)
        assert order[0] == 0
        assert sorted(order) == list(range(count))
    assert ring(100, 1) != ring(100, 2)


def test_hit_share_is_what_a_chase_counts_in_any_order():
    rng = random.Random(9)
    for _ in range(300):
        sets, ways = rng.randint(1, 12), rng.randint(1, 5)
        lines, stride = rng.randint(1, 2 * sets * ways), rng.randint(1, 30)
        order = ring(lines, seed=rng.randrange(99))
        addresses = [LINE_BYTES * stride * place for place in order]
        hits, _ = chase([Cache(sets * ways * LINE_BYTES, ways)], addresses)
        share = hit_share(lines, stride, sets, ways)
        assert share == pytest.approx(hits / lines)


def test_latency_is_what_two_caches_of_real_sizes_count():
    for kib in (8, 16, 17, 19, 20, 21, 512, 1024, 1040, 1080, 1088, 1100, 1500):
        for stride in (128, 1024, 16384):
            lines = max(1, kib * KIB // stride)
            found = chase_latency(kib, stride, l1_kib=16, l2_mib=1)
            caches = [
                Cache(16 * KIB, L1_WAYS),
                Cache(MIB, L2_WAYS),
            ]
            answers = chase(caches, [stride * n for n in range(lines)])
            percents = [100 * n / lines for n in answers]
            assert [
                found.l1_percent,
                found.l2_percent,
                found.memory_percent,
            ] == pytest.approx(percents)
            mean = sum(
                n * c for n, c in zip(answers, (40, 260, 480), strict=True)
            )
            assert found.cycles == pytest.approx(mean / lines)


def test_l1_of_an_h200_line_by_line():
    # 2048 lines fit; a fifth line in each of 512 sets, and none hits
    for lines, hits in ((2048, 2048), (2049, 2044), (2304, 1024), (2560, 0)):
        addresses = [LINE_BYTES * n for n in range(lines)]
        assert chase([Cache(256 * KIB, L1_WAYS)], addresses)[0] == hits


def test_latency_in_other_units():
    found = chase_latency(working_set_kib=1 << 20)
    assert found.ns == pytest.approx(480 / 1.98)
    assert found.thread_gb_s == pytest.approx(8 / found.ns)
    # Little's law: 4.8 TB/s for that long, in lines
    under_way = 4.8e12 * found.ns * 1e-9 / 128
    assert found.loads_for_bandwidth == pytest.approx(under_way)


def test_sums_of_the_page():
    registers = 132 * 65536 * 4 / MIB
    shared = 132 * 228 * KIB / MIB
    assert registers == 33
    assert shared == pytest.approx(29.4, abs=0.05)
    assert registers + shared > GPUS["H200 SXM"]["l2_mib"]
    # bytes of a thread: all resident, and 1 of 132 * 2048 threads of L2
    assert 65536 * 4 / 2048 == 128
    assert pytest.approx(194, abs=0.5) == 50 * MIB / (132 * 2048)
    hbm = chase_latency(1 << 20)
    assert round(hbm.loads_for_bandwidth) == 9091
    assert hbm.thread_gb_s == pytest.approx(0.033)
    # three floats a lane and cycle, and 128 bytes a cycle and SM
    wanted = 132 * 128 * 3 * 4 * 1.98e9
    assert (round(wanted / 1e12), round(wanted / 4.8e12)) == (401, 84)
    assert pytest.approx(33_454, abs=1) == 132 * 128 * 1.98
    # a stride of 64 KiB meets one set of L1
    assert chase_latency(256, 65536).l1_percent == 100
    assert chase_latency(320, 65536).l1_percent == 0


def test_presets_are_arguments():
    assert GPUS["H200 SXM"] == {"l1_kib": 256, "l2_mib": 50}
    for preset in GPUS.values():
        assert chase_latency(**preset).cycles > 0


def test_chart_rises_in_two_steps():
    chart = latency_chart(working_set_kib=100)
    (line,) = chart.lines
    cycles = [y for _, y in line.points]
    assert cycles == sorted(cycles)
    at = dict(line.points)
    assert (at[256], at[512], at[1 << 20]) == (40, 260, 480)
    assert chart.points[0].y == 40


@pytest.mark.parametrize(("lines", "sets", "ways"), [(5, 2, 2), (4, 1, 4)])
def test_trace_ends_with_the_result(lines, sets, ways):
    frames = chase_trace(lines, sets, ways, rounds=3)
    assert len(frames) == 3 * lines + 1
    cache = Cache(sets * ways * LINE_BYTES, ways)
    addresses = [LINE_BYTES * n for n in range(lines)]
    hits, _ = chase([cache], addresses, 3)
    assert f"{hits} of {lines} loads hit" in frames[-1].caption
    drawn = [
        [int(cell.text) for cell in cells if cell.text]
        for _, cells in frames[-1].picture.rows
    ]
    assert drawn == [list(kept) for kept in cache.sets]
    said = [" hits" in frame.caption for frame in frames[2 * lines : -1]]
    assert sum(said) == hits


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Cache(1000, 4), "size must be a multiple of 512, got 1000"),
        (lambda: chase_latency(working_set_kib=0), "working_set_kib .* got 0"),
        (lambda: chase_latency(stride_bytes=100), "stride_bytes .* got 100"),
        (lambda: chase_latency(l2_mib=-1), "l2_mib must be at least 1, got -1"),
        (lambda: chase_latency(clock_mhz=0), "clock_mhz"),
        (lambda: latency_chart(l1_cycles=-2.0), "l1_cycles .* got -2"),
        (lambda: latency_chart(bandwidth_gb_s=0), "bandwidth_gb_s"),
        (lambda: chase_trace(lines=30), "lines must be 1 to 20, got 30"),
        (lambda: chase_trace(lines=20, rounds=3), "rounds must be fewer"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.slow
@pytest.mark.nvcc
def test_kernels_wait_for_each_load_and_read_16_bytes():
    from aot import compile_cuda

    kernels = compile_cuda(Path(memory_hierarchy.__file__).with_suffix(".cu"))
    # one load of the first lap, eight unrolled, one of the rest
    chases = {
        "chase_through_l1": "LDG.E.64.STRONG.SM",
        "chase_past_l1": "LDG.E.64.STRONG.GPU",
        "chase_cluster": "LD.E.64",
    }
    for name, load in chases.items():
        assert kernels[name].opcodes[load] == 10, kernels[name].opcodes
    shared = kernels["chase_shared"].opcodes
    assert shared["LDS"] + shared["LDS.64"] == 10
    reads = {
        "read_through_l1": "LDG.E.128.STRONG.SM",
        "read_past_l1": "LDG.E.128.STRONG.GPU",
    }
    for name, load in reads.items():
        assert kernels[name].opcodes[load] == 5, kernels[name].opcodes
        assert kernels[name].registers <= 64  # 1024 threads must fit
    assert kernels.keys() == {*chases, *reads, "chase_shared"}
    for kernel in kernels.values():
        assert kernel.spills == kernel.stack == 0


def load_benchmark():
    file = ROOT / "benchmarks/hardware/gpu/memory_hierarchy.py"
    spec = importlib.util.spec_from_file_location("hierarchy_benchmark", file)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark


@pytest.mark.gpu
@pytest.mark.sanitize
def test_kernels_come_to_the_right_place():
    # the benchmark itself raises where a chase or a sum ends elsewhere
    import torch

    benchmark = load_benchmark()
    lines, order = benchmark.make_ring(16)
    for path in benchmark.PATHS:
        assert benchmark.chase(path, lines, order, 8, 100)[0] > 0
        x = torch.randint(2**31, (3 * 16 * 256,), device="cuda").int()
        benchmark.BYTES = 0
        assert benchmark.read_seconds(path, x, 16, 3) > 0
    assert benchmark.chase_of_cluster(benchmark.chase_shared, 1)[0] > 0
    assert benchmark.chase_of_cluster(benchmark.chase_cluster, 2)[0] > 0


@pytest.mark.gpu
def test_each_level_is_slower_than_the_one_before():
    benchmark = load_benchmark()
    own = benchmark.chase_of_cluster(benchmark.chase_shared, 1)
    other = benchmark.chase_of_cluster(benchmark.chase_cluster, 2)
    assert own[0] < other[0]
    cycles = []
    for path, kib in (("through_l1", 32), ("past_l1", 4096)):
        lines, order = benchmark.make_ring(kib)
        warm = 2 * len(order)
        cycles.append(benchmark.chase(path, lines, order, warm, 20_000)[0])
    lines, order = benchmark.make_ring(1 << 18)
    cycles.append(benchmark.chase("past_l1", lines, order, 0, 20_000)[0])
    assert cycles[0] < 0.5 * cycles[1]
    assert cycles[1] < 0.8 * cycles[2]
