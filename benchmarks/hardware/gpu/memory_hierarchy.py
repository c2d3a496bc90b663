"""Latency and bandwidth of one GPU's memory, by working set and by level.

One thread chases pointers around a ring of lines in random order; all
multiprocessors read their own parts of an array over and over. Both go
through L1, and past it. The kernels are in the ``.cu`` file beside the module.
"""

import statistics

import torch

from warpmap.hardware.gpu import memory_hierarchy
from warpmap.hardware.gpu.memory_hierarchy import (
    KIB,
    LINE_BYTES,
    MIB,
    chase_latency,
)
from warpmap.kernels.cuda import cuda_kernel

PATHS = ("through_l1", "past_l1")
CHASE = {
    path: cuda_kernel(memory_hierarchy.__file__, f"chase_{path}")
    for path in PATHS
}
READ = {
    path: cuda_kernel(memory_hierarchy.__file__, f"read_{path}")
    for path in PATHS
}
chase_shared = cuda_kernel(memory_hierarchy.__file__, "chase_shared")
chase_cluster = cuda_kernel(memory_hierarchy.__file__, "chase_cluster")

# KiB; two sizes an octave, more where caches may end
CHASES = [16, 32, 64, 128, 160, 192, 208, 224, 240, 256, 288, 320, 384, 512]
CHASES += [n * 1024 for n in (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44)]
CHASES += [n * 1024 for n in (48, 50, 52, 56, 60, 64, 72, 96, 128, 256, 1024)]
STEPS = 30_000  # measured; no multiple of the rings in shared memory
MOST_WARM = 1 << 21  # steps: all lines of 256 MiB
SHARED_WORDS, SHARED_STEP = 4096, 33  # as in the .cu file

# KiB that each multiprocessor reads
SLICES = [16, 32, 64, 128, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512]
SLICES += [640, 1024, 2048, 8192]
THREADS = 1024
BYTES = 1 << 33  # read in one launch, at least
ROUNDS = 7

LINES = 16  # of L2, each loaded by every multiprocessor
BIN = 10  # cycles


def make_ring(kib):
    """A ring through every line of a new array, in random order.

    Returns:
        The array, and the order of its lines.
    """
    lines = kib * KIB // LINE_BYTES
    order = torch.randperm(lines, device="cuda")
    ring = torch.zeros(lines, LINE_BYTES // 8, dtype=torch.int64, device="cuda")
    address = ring.data_ptr() + LINE_BYTES * order
    ring[order, 0] = address.roll(-1)
    return ring, order


def chase(path, ring, order, warm, steps, sm=-1):
    """Cycles and ns of a load, in the mean of a chase.

    Args:
        path: One of ``PATHS``.
        ring: The array.
        order: Of its lines.
        warm: Loads before the clock runs.
        steps: Loads that are timed.
        sm: The multiprocessor that runs it; -1 is any.

    Returns:
        None if no block came to that multiprocessor.

    Raises:
        RuntimeError: If it ended at a wrong place.
    """
    out = torch.zeros(3, dtype=torch.int64, device="cuda")
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    start = ring[order[0].item()]
    CHASE[path](1 if sm < 0 else sms, 1, start, warm, steps, sm, out)
    cycles, ns, end = out.tolist()
    if sm >= 0 and not end:
        return None
    place = order[(warm + steps) % len(order)].item()
    expected = ring.data_ptr() + LINE_BYTES * place
    if end != expected:
        raise RuntimeError(f"the chase ended at {end}, expected {expected}")
    return cycles / steps, ns / steps


def chase_of_cluster(kernel, grid):
    """Cycles and ns of a load from shared memory."""
    out = torch.zeros(3, dtype=torch.int64, device="cuda")
    kernel(grid, 1, STEPS, out)
    cycles, ns, end = out.tolist()
    expected = 8 * (SHARED_STEP * (SHARED_WORDS + STEPS) % SHARED_WORDS)
    if end != expected:
        raise RuntimeError(f"the chase ended at {end}, expected {expected}")
    return cycles / STEPS, ns / STEPS


def latency_rows():
    """A row for each working set: measured, and as LRU caches would do."""
    found = []
    for kib in CHASES:
        ring, order = make_ring(kib)
        row = {"kind": "latency", "working_set_kib": kib}
        for path in PATHS:
            warm = min(2 * len(order), MOST_WARM)
            cycles, ns = chase(path, ring, order, warm, STEPS)
            row[f"{path}_cycles"] = round(cycles, 1)
            row[f"{path}_ns"] = round(ns, 1)
        found.append(row)
        del ring, order
    plateau = {
        row["working_set_kib"]: row["through_l1_cycles"] for row in found
    }
    l2 = torch.cuda.get_device_properties(0).L2_cache_size // MIB
    for row in found:
        # the heights are measured, the places of the steps are computed
        model = chase_latency(
            row["working_set_kib"],
            l2_mib=l2,
            l1_cycles=plateau[32],
            l2_cycles=plateau[4096],
            memory_cycles=plateau[262144],
        )
        row["predicted_cycles"] = round(model.cycles, 1)
    return found


def level_rows(latencies, bandwidths):
    """A row for each level, from the nearest to the farthest."""
    chased = {row["working_set_kib"]: row for row in latencies}
    read = {row["slice_kib"]: row for row in bandwidths}

    def row(level, scope, cycles, ns, gb_s=None):
        found = {
            "kind": "level",
            "level": level,
            "scope": scope,
            "cycles": round(cycles, 1),
            "ns": round(ns, 1),
        }
        return found if gb_s is None else {**found, "gb_s": gb_s}

    def of(path, kib, slice_kib):
        latency = chased[kib][f"{path}_cycles"], chased[kib][f"{path}_ns"]
        return *latency, read[slice_kib][f"{path}_gb_s"]

    own, others = (
        chase_of_cluster(chase_shared, 1),
        chase_of_cluster(chase_cluster, 2),
    )
    return [
        row("shared memory", "block", *own),
        row("L1 cache", "multiprocessor", *of("through_l1", 32, 64)),
        row("distributed shared memory", "cluster", *others),
        row("L2 cache", "GPU", *of("past_l1", 4096, 64)),
        row("HBM", "GPU", *of("past_l1", 262144, 8192)),
    ]


def slice_rows():
    """A histogram: single lines of L2, each loaded by every multiprocessor."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    # rings of one line: it points to itself
    lines = torch.zeros(
        LINES, 4096 // 8 + LINE_BYTES // 8, dtype=torch.int64, device="cuda"
    )
    zero = torch.zeros(1, dtype=torch.int64, device="cuda")
    found = []
    for line in lines:
        line[0] = line.data_ptr()
        alone = line[: LINE_BYTES // 8].view(1, -1)
        for sm in range(sms):
            if timed := chase("past_l1", alone, zero, 8, 256, sm):
                found.append(timed[0])
    if len(found) < LINES * sms // 2:
        raise RuntimeError(f"only {len(found)} of {LINES * sms} pairs ran")
    first = int(min(found)) // BIN
    last = int(max(found)) // BIN
    counts = [0] * (last - first + 1)
    for cycles in found:
        counts[int(cycles) // BIN - first] += 1
    return [
        {
            "kind": "l2",
            "from_cycles": BIN * (first + n),
            "pairs": count,
            "share_percent": round(100 * count / len(found), 1),
        }
        for n, count in enumerate(counts)
    ]


def read_seconds(path, x, slice_kib, sms):
    """Median time in which all slices are read once.

    Raises:
        RuntimeError: If the sum of what was read is wrong.
    """
    count = slice_kib * KIB // 16
    rounds = max(2, BYTES // (sms * slice_kib * KIB))
    out = torch.zeros(sms * THREADS, dtype=torch.int32, device="cuda")

    def launch():
        READ[path](sms, THREADS, x, count, rounds, out)

    launch()
    words = x[: sms * count * 4].sum(dtype=torch.int64).item()
    got, expected = out.sum(dtype=torch.int64).item(), rounds * words
    if (got - expected) % 2**32:
        raise RuntimeError(f"the sum is {got}, expected {expected}")
    times = []
    for _ in range(ROUNDS):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        # keeps the GPU busy until the launch is queued behind it
        torch.cuda._sleep(500_000)
        begin.record()
        launch()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times) / rounds


def bandwidth_rows():
    """A row for each size that every multiprocessor reads again and again."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    words = sms * max(SLICES) * KIB // 4
    x = torch.randint(2**31, (words,), dtype=torch.int32, device="cuda")
    found = []
    for slice_kib in SLICES:
        total = sms * slice_kib * KIB
        row = {
            "kind": "bandwidth",
            "slice_kib": slice_kib,
            "working_set_kib": sms * slice_kib,
        }
        for path in PATHS:
            seconds = read_seconds(path, x, slice_kib, sms)
            row[f"{path}_gb_s"] = round(total / seconds / 1e9, 1)
        found.append(row)
    return found


def rows() -> list[dict]:
    """Measure latency by working set, level and slice of L2, and bandwidth.

    Returns:
        Rows of four kinds: ``latency``, ``level``, ``l2`` and ``bandwidth``.

    Raises:
        RuntimeError: If there is no GPU with clusters, or a result is wrong.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("this benchmark needs one NVIDIA GPU")
    if torch.cuda.get_device_capability()[0] < 9:
        raise RuntimeError("clusters need compute capability 9.0 or more")
    # a busy GPU raises its clock
    torch.randn(4096, 4096, device="cuda") @ torch.randn(
        4096, 4096, device="cuda"
    )
    latencies, bandwidths = latency_rows(), bandwidth_rows()
    return [
        *level_rows(latencies, bandwidths),
        *latencies,
        *slice_rows(),
        *bandwidths,
    ]
