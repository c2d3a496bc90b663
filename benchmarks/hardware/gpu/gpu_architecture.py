"""The limits that the driver of this GPU states, and warps hiding latency.

The limits are read from the CUDA driver and compared with PyTorch's. Then a
kernel of dependent multiply-adds runs on every multiprocessor, with one to
eight warps a scheduler and one to four chains in each of them.
"""

import ctypes
import statistics

import torch

from warpmap.hardware.gpu.gpu_architecture import (
    SCHEDULERS,
    issue_rate,
    mix,
)
from warpmap.kernels import tl, triton

# level, property, CUdevice_attribute of cuda.h, unit and what it counts
LIMITS = [
    ("GPU", "multiprocessors", 16, "", 1),
    ("GPU", "L2 cache", 38, "MiB", 1 << 20),
    ("GPU", "block clusters can be launched", 120, "", 1),
    ("multiprocessor", "threads resident", 39, "", 1),
    ("multiprocessor", "blocks resident", 106, "", 1),
    ("multiprocessor", "32-bit registers", 82, "", 1),
    ("multiprocessor", "shared memory", 81, "KiB", 1 << 10),
    ("block", "threads", 1, "", 1),
    ("block", "32-bit registers", 12, "", 1),
    ("block", "shared memory, by default", 8, "KiB", 1 << 10),
    ("block", "shared memory, on request", 97, "KiB", 1 << 10),
    ("block", "shared memory that CUDA keeps", 111, "KiB", 1 << 10),
    ("warp", "threads", 10, "", 1),
]
# the same as PyTorch names them, where it does
TORCH = {
    16: "multi_processor_count",
    38: "L2_cache_size",
    39: "max_threads_per_multi_processor",
    82: "regs_per_multiprocessor",
    81: "shared_memory_per_multiprocessor",
    8: "shared_memory_per_block",
    97: "shared_memory_per_block_optin",
    10: "warp_size",
}

WARPS = (1, 2, 4, 8)  # of a scheduler
CHAINS = (1, 2, 4)  # of a warp
STEPS = 4096
UNROLLED = 64
MATH_LATENCY = 4  # of the model, in cycles
ROUNDS = 15


@triton.jit
def _chains_kernel(
    out_ptr, steps, factor, summand, BLOCK: tl.constexpr, UNROLLED: tl.constexpr
):
    # a thread holds BLOCK over the threads of the block: so many chains
    lanes = tl.arange(0, BLOCK)
    x = lanes.to(tl.float32)
    for _ in range(steps):
        for _ in tl.static_range(UNROLLED):
            x = x * factor + summand
    tl.store(out_ptr + tl.program_id(0) * BLOCK + lanes, x)


def run_chains(out, blocks, warps, chains, steps=STEPS):
    """Launch ``blocks`` blocks; ``out`` gets each thread's results."""
    num_warps = SCHEDULERS * warps
    _chains_kernel[(blocks,)](
        out,
        steps,
        1.0,
        1.0,
        BLOCK=32 * num_warps * chains,
        UNROLLED=UNROLLED,
        num_warps=num_warps,
    )


def limit_rows():
    """A row for each limit.

    Raises:
        RuntimeError: If the driver does not answer, or PyTorch says other.
    """
    torch.cuda.init()
    properties = torch.cuda.get_device_properties(0)
    cuda = ctypes.CDLL("libcuda.so.1")
    found = []
    for level, name, attribute, unit, size in LIMITS:
        value = ctypes.c_int()
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0):
            raise RuntimeError(
                f"the driver does not know attribute {attribute}"
            )
        said = getattr(properties, TORCH.get(attribute, ""), value.value)
        if said != value.value:
            raise RuntimeError(
                f"{name}: the driver says {value.value}, PyTorch {said}"
            )
        found.append(
            {
                "kind": "limit",
                "level": level,
                "property": name,
                "value": value.value // size,
                "unit": unit,
            }
        )
    return found


def chain_rows():
    """A row for each number of warps and chains.

    Raises:
        RuntimeError: If a result is wrong.
    """
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    cases = [(warps, chains) for warps in WARPS for chains in CHAINS]
    longest = 32 * SCHEDULERS * max(WARPS) * max(CHAINS)
    out = torch.empty(sms * longest, device="cuda")
    for warps, chains in cases:
        size = 32 * SCHEDULERS * warps * chains
        run_chains(out, sms, warps, chains)
        lanes = torch.arange(size, device="cuda", dtype=torch.float32)
        expected = (lanes + UNROLLED * STEPS).repeat(sms)
        if not torch.equal(out[: sms * size], expected):
            raise RuntimeError(
                f"wrong result of {warps} warps, {chains} chains"
            )

    times = {case: [] for case in cases}
    for _ in range(ROUNDS):
        for case in cases:  # in turns, so that all meet the same clocks
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            # keeps the GPU busy until the launch is queued behind it
            torch.cuda._sleep(500_000)
            begin.record()
            run_chains(out, sms, *case)
            end.record()
            end.synchronize()
            times[case].append(begin.elapsed_time(end) / 1e3)

    # instructions of one scheduler in a second
    rates = {
        (warps, chains): warps
        * chains
        * UNROLLED
        * STEPS
        / statistics.median(times[warps, chains])
        for warps, chains in cases
    }
    best = max(rates.values())

    def predicted(warps, chains):
        program = mix(0, UNROLLED * chains, chains, 1, MATH_LATENCY)
        return issue_rate(program, warps)

    return [
        {
            "kind": "chains",
            "warps_per_scheduler": warps,
            "chains": chains,
            "predicted_share": round(predicted(warps, chains), 3),
            "measured_share": round(rate / best, 3),
            "measured_tflops": round(64 * SCHEDULERS * sms * rate / 1e12, 2),
        }
        for (warps, chains), rate in rates.items()
    ]


def rows() -> list[dict]:
    """Read the limits and time the chains.

    Returns:
        Rows of two kinds: ``limit`` and ``chains``.

    Raises:
        RuntimeError: If there is no GPU, or a number or result is wrong.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("this benchmark needs one NVIDIA GPU")
    return [*limit_rows(), *chain_rows()]
