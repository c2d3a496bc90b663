"""Blocks are placed one by one, and time is walked step by step."""

import ctypes
import importlib.util
import random
from pathlib import Path

import pytest

from warpmap.hardware.performance.occupancy_and_tail_effect import (
    GPUS,
    KERNELS,
    SMS,
    dispatch,
    dispatch_trace,
    gemm_tiles,
    launch,
    residency,
    wave_chart,
    wave_efficiency,
    waves,
)

ROOT = Path(__file__).parents[3]


def place_one_by_one(threads, registers, shared, sm):
    """Fill an SM: warps take registers in a partition, blocks shared memory.

    Returns how many blocks found room for all they need.
    """
    free_registers = [[None] * (16384 // 256) for _ in range(4)]  # units
    free_warps, free_shared = sm.warps, sm.shared_bytes
    placed = 0
    while placed < sm.blocks:
        lanes = list(range(threads))
        of_block = [lanes[i : i + 32] for i in range(0, threads, 32)]
        for _ in of_block:
            roomiest = max(free_registers, key=len)
            bought = 0
            while bought * 256 < registers * 32:
                if not roomiest:
                    return placed
                roomiest.pop()
                bought += 1
            free_warps -= 1
        claimed = 0
        while claimed < shared + 1024:
            claimed += 128
        free_shared -= claimed
        if free_warps < 0 or free_shared < 0:
            return placed
        placed += 1
    return placed


def random_kernels(count):
    rng = random.Random(count)
    for _ in range(count):
        sm = rng.choice(list(SMS.values()))
        threads = rng.choice([rng.randint(1, 1024), 32 * rng.randint(1, 32)])
        most = min(255, 2 * 65536 // threads)
        shared = rng.choice(
            [
                0,
                rng.randint(0, sm.shared_bytes_a_block),
                rng.randint(0, 8192),
                # as much as leaves room for so many, to the byte
                sm.shared_bytes // rng.randint(2, 30) - 1024,
            ]
        )
        yield threads, rng.randint(1, most), shared, sm


def test_residency_agrees_with_placing_blocks_one_by_one():
    for kernel in random_kernels(1500):
        assert residency(*kernel).blocks == place_one_by_one(*kernel), kernel


def wrong(threads, registers, shared, sm, fault):
    """The formula again, with one of its parts missing."""
    warps = -(-threads // 32) if fault != "parts of warps" else threads / 32
    of_a_warp = registers * 32
    if fault != "exact registers":
        of_a_warp = -(-of_a_warp // 256) * 256
    if fault == "one register file":
        by_registers = 65536 // of_a_warp // warps
    else:
        by_registers = 16384 // of_a_warp * 4 // warps
    asked = shared + (1024 if fault != "nothing reserved" else 0)
    if fault != "exact shared memory":
        asked = -(-asked // 128) * 128
    by_shared = sm.shared_bytes // asked if asked else 10**6
    by_blocks = sm.blocks if fault != "any number of blocks" else 10**6
    return min(sm.warps // warps, by_registers, by_shared, by_blocks)


@pytest.mark.parametrize(
    "fault",
    [
        "parts of warps",
        "exact registers",
        "one register file",
        "nothing reserved",
        "exact shared memory",
        "any number of blocks",
    ],
)
def test_placing_catches_a_wrong_formula(fault):
    kernels = list(random_kernels(1500))
    assert all(wrong(*k, None) == place_one_by_one(*k) for k in kernels)
    assert any(wrong(*k, fault) != place_one_by_one(*k) for k in kernels)


# compute capability, threads, registers, shared bytes; blocks that
# cudaOccMaxActiveBlocksPerMultiprocessor of CUDA 13.0 gives (cuda_occupancy.h)
CUDA_ANSWERS = [
    ("8.0", 1, 147, 101377, 1),
    ("8.0", 64, 67, 128, 14),
    ("8.0", 320, 67, 49152, 2),
    ("8.0", 64, 25, 16384, 9),
    ("8.0", 64, 129, 1000, 6),
    ("8.0", 576, 112, 127, 0),
    ("8.9", 384, 131, 75000, 1),
    ("8.9", 224, 33, 16384, 5),
    ("8.9", 33, 47, 16384, 5),
    ("8.9", 64, 73, 129, 12),
    ("8.9", 288, 103, 4096, 1),
    ("8.9", 32, 143, 0, 12),
    ("9.0", 1, 158, 16384, 12),
    ("9.0", 224, 125, 116000, 1),
    ("9.0", 320, 86, 116000, 1),
    ("9.0", 33, 142, 4096, 6),
    ("9.0", 576, 108, 100000, 0),
    ("9.0", 1, 182, 16384, 8),
    ("10.0", 224, 61, 32768, 4),
    ("10.0", 992, 72, 10000, 0),
    ("10.0", 32, 66, 32768, 6),
    ("10.0", 1, 224, 127, 8),
]


@pytest.mark.parametrize("answer", CUDA_ANSWERS, ids=str)
def test_residency_agrees_with_cudas_header(answer):
    capability, *kernel, blocks = answer
    assert residency(*kernel, SMS[capability]).blocks == blocks


def test_limits_name_what_stops_one_block_more():
    assert residency(256, 32, 0).limits == ("warps", "registers")
    assert residency(32, 8, 0).limits == ("blocks",)
    assert residency(128, 128, 0).limits == ("registers",)
    assert residency(128, 16, 100_000).limits == ("shared memory",)
    for kernel in random_kernels(300):
        held = residency(*kernel)
        assert held.limits
        assert 0 <= held.occupancy <= 1
        threads, registers, shared, sm = kernel
        if registers < 255:
            more = residency(threads, registers + 1, shared, sm)
            assert more.blocks <= held.blocks


def walk(durations, slots, step=0.5):
    """Simulate by the clock: at every tick, free slots take waiting blocks."""
    waiting = list(range(len(durations)))
    running = {}  # slot: block, end
    runs, now = {}, 0.0
    while waiting or running:
        for slot in [s for s, (_, end) in running.items() if end <= now]:
            del running[slot]
        for slot in range(slots):
            if slot not in running and waiting:
                block = waiting.pop(0)
                running[slot] = block, now + durations[block]
                runs[block] = slot, now, now + durations[block]
        now += step
    return runs


def agrees_with_the_clock(dispatcher):
    rng = random.Random(7)
    for _ in range(60):
        slots = rng.randint(1, 9)
        durations = [rng.randint(1, 12) / 2 for _ in range(rng.randint(0, 40))]
        runs = {
            r.block: (r.slot, r.start, r.end)
            for r in dispatcher(durations, slots)
        }
        if runs != walk(durations, slots):
            return False
    return True


def wrong_fixed_slots(durations, slots):
    """Deals the blocks out beforehand, without looking who is free."""
    ends = [0.0] * slots
    runs = []
    for block, duration in enumerate(durations):
        run = dispatch([duration], 1)[0]
        slot = block % slots
        start = ends[slot]
        ends[slot] += duration
        runs.append(
            type(run)(block=block, slot=slot, start=start, end=ends[slot])
        )
    return runs


def wrong_longest_first(durations, slots):
    order = sorted(range(len(durations)), key=lambda b: -durations[b])
    runs = dispatch([durations[b] for b in order], slots)
    return [type(r)(order[r.block], r.slot, r.start, r.end) for r in runs]


def test_dispatch_agrees_with_a_walk_by_the_clock():
    assert agrees_with_the_clock(dispatch)


@pytest.mark.parametrize("fault", [wrong_fixed_slots, wrong_longest_first])
def test_the_clock_catches_a_wrong_dispatch(fault):
    assert not agrees_with_the_clock(fault)


def test_waves_are_the_time_of_equal_blocks():
    rng = random.Random(3)
    for _ in range(200):
        blocks, slots = rng.randint(1, 300), rng.randint(1, 60)
        runs = dispatch([2.0] * blocks, slots)
        end = max(run.end for run in runs)
        assert waves(blocks, slots) == end / 2.0
        busy = sum(run.end - run.start for run in runs)
        share = busy / (slots * end)
        assert wave_efficiency(blocks, slots) == pytest.approx(share)


def test_greedy_dispatch_keeps_grahams_bounds():
    # no schedule beats the mean load or the longest block; greedy takes at
    # most the mean load of the others, and then the block that ends last
    rng = random.Random(4)
    for _ in range(200):
        slots = rng.randint(1, 20)
        durations = [rng.uniform(0.1, 5) for _ in range(rng.randint(1, 100))]
        end = max(run.end for run in dispatch(durations, slots))
        mean, longest = sum(durations) / slots, max(durations)
        assert end >= max(mean, longest) - 1e-9
        assert end <= mean + (1 - 1 / slots) * longest + 1e-9


def test_efficiency_is_a_saw_tooth_that_flattens():
    for wave in range(1, 6):
        assert wave_efficiency(132 * wave, 132) == 1
        after = wave_efficiency(132 * wave + 1, 132)
        assert after == pytest.approx((132 * wave + 1) / (132 * (wave + 1)))
        assert after > wave / (wave + 1)


def test_tiles_cover_every_element_once():
    rng = random.Random(5)
    for _ in range(30):
        M, N, m, n = (rng.randint(1, 40) for _ in range(4))
        tiles = {(i // m, j // n) for i in range(M) for j in range(N)}
        assert gemm_tiles(M, N, m, n) == len(tiles)


def test_bandwidth_in_flight_is_littles_law():
    # every thread asks, waits for its answer, and asks again
    found = launch(
        blocks=1, threads_per_block=32, latency_ns=20.0, shared_bytes=0
    )
    arrived, horizon = 0, 20_000
    for thread in range(32):
        for now in range(thread, horizon, 20):
            arrived += 16 if now + 20 <= horizon else 0
    assert found.bandwidth_in_flight_gb_s == pytest.approx(
        arrived / horizon, rel=0.01
    )
    assert launch(latency_ns=1e-3).bandwidth_in_flight_gb_s == 4800


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_calculator_agrees_with_its_parts(gpu, kernel):
    given = {**GPUS[gpu], **KERNELS[kernel]}
    sm = SMS[given["capability"]]
    if given["shared_bytes"] > sm.shared_bytes_a_block:
        with pytest.raises(ValueError, match="shared_bytes must be 0 to"):
            launch(**given)
        return
    found = launch(blocks=5000, **given)
    held = residency(
        given["threads_per_block"],
        given["registers_per_thread"],
        given["shared_bytes"],
        sm,
    )
    assert found.blocks_per_sm == held.blocks
    assert found.occupancy_percent == 100 * held.occupancy
    assert found.limited_by == ", ".join(held.limits)
    assert found.slots == held.blocks * given["sms"]
    assert found.waves == waves(5000, found.slots)
    before = (found.waves - 1) * found.slots
    assert found.last_wave_blocks == 5000 - before


def test_numbers_of_the_page():
    # 500 ns at 4.8 TB/s, for an SM and for each of its 2048 threads
    assert 4800 * 500 == 2.4e6
    assert round(2.4e6 / 132 / 1000, 1) == 18.2
    assert round(2.4e6 / 132 / 2048, 1) == 8.9
    full = launch(5000, 256, 16, 0, bytes_in_flight_a_thread=4)
    assert (full.occupancy_percent, round(full.bandwidth_in_flight_gb_s)) == (
        100,
        2163,
    )
    few = launch(5000, 128, 40, 0, bytes_in_flight_a_thread=64)
    assert (few.occupancy_percent, few.bandwidth_in_flight_gb_s) == (75, 4800)
    assert residency(256, 33, 0).occupancy == 0.75
    assert launch(blocks=133).efficiency_percent == pytest.approx(
        50.4, abs=0.05
    )
    # 384 threads: 5376 registers a warp, so three warps in each partition
    assert residency(384, 168, 192 * 1024).blocks == 1
    assert residency(384, 169, 0).blocks == 0


def test_chart_is_the_saw_tooth_with_the_launch_on_it():
    for blocks in (1, 132, 133, 700, 5000, 10**6):
        chart = wave_chart(blocks=blocks)
        (line,) = chart.lines
        xs = [x for x, _ in line.points]
        assert xs == sorted(xs)
        (yours,) = chart.points
        assert xs[0] <= yours.x <= xs[-1]
        assert yours.y == pytest.approx(100 * wave_efficiency(blocks, 132))
        for x, y in line.points:
            assert y == pytest.approx(100 * wave_efficiency(x, 132))


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("size", [(13, 4, 1), (9, 3, 2), (1, 2, 1), (38, 8, 4)])
def test_trace_ends_with_the_result(size, uneven):
    blocks, sms, resident = size
    durations = [6 + 7 * b % 9 if uneven else 10 for b in range(blocks)]
    seen = []
    runs = dispatch(durations, sms * resident, seen.append)
    assert runs == seen == dispatch(durations, sms * resident)

    frames = dispatch_trace(*size, uneven)
    assert len(frames) == blocks + 1
    last = frames[-1].picture
    assert last.end == max(run.end for run in runs)
    shown = [
        (int(span.text), name, span.start, span.end)
        for name, spans in last.lanes
        for span in spans
        if span.mark != "gone"
    ]
    assert sorted(shown) == [
        (r.block, f"SM {r.slot % sms}", r.start, r.end) for r in runs
    ]
    # nothing is busy and idle at once, and together they fill the picture
    for _, spans in last.lanes:
        assert [s.start for s in spans[1:]] == [s.end for s in spans[:-1]]
        assert (spans[0].start, spans[-1].end) == (0, last.end)
    for i, frame in enumerate(frames[:-1]):
        on = [s for _, spans in frame.picture.lanes for s in spans]
        assert len(on) == i + 1
        assert [s.text for s in on if s.mark == "new"] == [str(i)]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: residency(0, 1, 0), "threads_per_block must be 1 to 1024"),
        (lambda: residency(1025, 1, 0), "threads_per_block .* got 1025"),
        (lambda: residency(1, 256, 0), "registers_per_thread must be 1 to 255"),
        (lambda: residency(1, 1, -1), "shared_bytes must be 0 to 232448"),
        (lambda: launch(shared_bytes=232449), "shared_bytes .* got 232449"),
        (
            lambda: launch(registers_per_thread=169),
            "registers_per_th.*169",
        ),
        (lambda: launch(capability="7.0"), "capability must be one of 8.0"),
        (lambda: launch(blocks=0), "blocks must be at least 1, got 0"),
        (lambda: launch(sms=0), "sms must be at least 1"),
        (lambda: launch(latency_ns=0), "latency_ns must be more than 0"),
        (lambda: launch(bandwidth_gb_s=-1), "bandwidth_gb_s"),
        (lambda: launch(bytes_in_flight_a_thread=-1), "bytes_in_flight_a"),
        (lambda: waves(0, 1), "blocks must be at least 1"),
        (lambda: wave_efficiency(1, 0), "slots must be at least 1"),
        (lambda: gemm_tiles(1, 1, 0), "tile_m must be at least 1"),
        (lambda: dispatch([1.0], 0), "slots must be at least 1"),
        (lambda: dispatch([-1.0], 1), "durations must be at least 0"),
        (lambda: dispatch_trace(blocks=39), "blocks must be 1 to 38, got 39"),
        (lambda: dispatch_trace(sms=0), "sms must be 1 to 16"),
        (lambda: dispatch_trace(resident=5), "resident must be 1 to 4"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# On a GPU: what CUDA says of real kernels

NUM_REGISTERS, MAX_DYNAMIC_SHARED = 4, 8  # CU_FUNC_ATTRIBUTE_...


def ptx_that_holds(values):
    """A kernel that reads so many values before it writes the first."""
    order = range(values)
    return "\n".join(
        [
            ".version 7.0",
            ".target sm_80",
            ".address_size 64",
            ".visible .entry hold(.param .u64 where) {",
            f".reg .b32 %r<{values}>;",
            ".reg .b64 %a;",
            "ld.param.u64 %a, [where];",
            *(f"ld.volatile.global.u32 %r{i}, [%a+{4 * i}];" for i in order),
            *(f"st.volatile.global.u32 [%a+{4 * i}], %r{i};" for i in order),
            "ret;",
            "}",
        ]
    )


def device_limits():
    import torch

    torch.zeros(1, device="cuda")  # makes the context current
    major, minor = torch.cuda.get_device_capability()
    assert f"{major}.{minor}" in SMS, "add this GPU's limits to SMS"
    return SMS[f"{major}.{minor}"]


def ask_cuda(function, threads, shared, sm):
    """Registers a thread, and blocks an SM; 0 where CUDA refuses."""
    cuda = ctypes.CDLL("libcuda.so.1")
    handle = ctypes.c_void_p(function)
    registers, blocks = ctypes.c_int(), ctypes.c_int()
    assert not cuda.cuFuncGetAttribute(
        ctypes.byref(registers), NUM_REGISTERS, handle
    )
    assert not cuda.cuFuncSetAttribute(
        handle, MAX_DYNAMIC_SHARED, sm.shared_bytes_a_block
    )
    refused = cuda.cuOccupancyMaxActiveBlocksPerMultiprocessor(
        ctypes.byref(blocks),
        handle,
        ctypes.c_int(threads),
        ctypes.c_size_t(shared),
    )
    return registers.value, 0 if refused else blocks.value


@pytest.mark.gpu
@pytest.mark.parametrize("values", [1, 24, 40, 60, 90, 125, 160, 200])
def test_residency_agrees_with_cuda(values):
    sm = device_limits()
    cuda = ctypes.CDLL("libcuda.so.1")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    text = ptx_that_holds(values).encode() + b"\0"
    assert not cuda.cuModuleLoadData(ctypes.byref(module), text)
    assert not cuda.cuModuleGetFunction(ctypes.byref(function), module, b"hold")
    shares = (0, 1, 5000, 16384, 32768, 49152, 75_000, 99 * 1024)
    for threads in (1, 32, 33, 96, 128, 224, 256, 288, 384, 576, 1024):
        for shared in (*shares, sm.shared_bytes_a_block):
            registers, blocks = ask_cuda(function.value, threads, shared, sm)
            assert registers >= values
            expected = residency(threads, registers, shared, sm).blocks
            assert blocks == expected, (threads, registers, shared)


@pytest.mark.gpu
def test_residency_agrees_with_cuda_on_a_triton_kernel():
    import torch

    file = ROOT / "benchmarks/hardware/performance/occupancy_and_tail_effect.py"
    spec = importlib.util.spec_from_file_location("occupancy_benchmark", file)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    sm = device_limits()
    out = torch.zeros(3, device="cuda")
    compiled = benchmark.work(out, 3, steps=5)
    assert out.tolist() == [benchmark.BLOCK + 4] * 3
    threads = 32 * benchmark.WARPS
    for shared in (compiled.metadata.shared, 50_000, sm.shared_bytes_a_block):
        registers, blocks = ask_cuda(compiled.function, threads, shared, sm)
        assert registers == compiled.n_regs
        assert blocks == residency(threads, registers, shared, sm).blocks == 1
