"""Time against the size of the grid: a kernel of equal blocks, and GEMMs.

The own kernel keeps one block of 1024 threads on an SM and does the same
work in each, so its time should be the number of waves. cuBLAS chooses its
own tiles; their size is read from the name of the kernel that ran.
"""

import re
import statistics

import torch

from warpmap.hardware.performance.occupancy_and_tail_effect import (
    SMS,
    gemm_tiles,
    residency,
    wave_efficiency,
    waves,
)
from warpmap.kernels import tl, triton

BLOCK = 32768  # values a block: 32 registers a thread, so no second block fits
WARPS = 32
STEPS = 1000
K = 4096
TILE = 128, 256  # what cuBLAS often takes on Hopper, if its name says nothing
ROUNDS = 21


@triton.jit
def _work_kernel(out_ptr, steps, factor, summand, BLOCK: tl.constexpr):
    # different values, else the compiler would compute one of them
    x = tl.arange(0, BLOCK).to(tl.float32)
    for _ in range(steps):
        x = x * factor + summand
    tl.store(out_ptr + tl.program_id(0), tl.max(x, axis=0))


def work(out, blocks, steps=STEPS):
    """Run the own kernel; returns what Triton compiled."""
    return _work_kernel[(blocks,)](
        out, steps, 1.0, 1.0, BLOCK=BLOCK, num_warps=WARPS
    )


def _milliseconds(cases):
    """Median time of each launch, in turns so that all meet the same clocks."""
    times = [[] for _ in cases]
    for launch in cases:
        launch()
    torch.cuda.synchronize()
    for _ in range(ROUNDS):
        for launch, found in zip(cases, times, strict=True):
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            # keeps the GPU busy until the launch is queued behind it
            torch.cuda._sleep(500_000)
            begin.record()
            launch()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end))
    return [statistics.median(found) for found in times]


def _kernel_name(launch):
    """Name of the longest kernel of a launch, or ``"unknown"``."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        launch()
        torch.cuda.synchronize()
    kernels = [
        event
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    if not kernels:
        return "unknown"
    return max(kernels, key=lambda e: e.time_range.elapsed_us()).name


def _tile(name):
    """Rows and columns of a tile; cuBLAS puts the columns first."""
    found = re.search(r"(\d+)x(\d+)", name)
    return (int(found[2]), int(found[1])) if found else TILE


def _grid_sizes(sms):
    """Half, full and just overfull waves."""
    sizes = [sms // 2, sms - 1]
    for wave in range(1, 4):
        sizes += [wave * sms, wave * sms + 1, wave * sms + sms // 2]
    return [*sizes, 4 * sms]


def _row(kernel, blocks, sms, milliseconds, flops, tile="", n=0):
    return {
        "kernel": kernel,
        "n": n,
        "tile": tile,
        "blocks": blocks,
        "waves": waves(blocks, sms),
        "last_wave_blocks": (blocks - 1) % sms + 1,
        "predicted_share": round(wave_efficiency(blocks, sms), 3),
        "measured_ms": round(milliseconds, 4),
        "measured_tflops": round(flops / milliseconds / 1e9, 1),
    }


def _share_of_best(rows):
    best = max(row["measured_tflops"] for row in rows)
    for row in rows:
        row["measured_share"] = round(row["measured_tflops"] / best, 3)
    return rows


def _own_rows(sms, sm):
    out = torch.zeros(4 * sms, device="cuda")
    compiled = work(out, 4 * sms)
    if not torch.equal(out, torch.full_like(out, BLOCK - 1 + STEPS)):
        raise RuntimeError(f"wrong result: {out[:4].tolist()}")
    held = residency(32 * WARPS, compiled.n_regs, compiled.metadata.shared, sm)
    if held.blocks != 1:
        raise RuntimeError(f"expected one block an SM, got {held}")
    sizes = _grid_sizes(sms)
    times = _milliseconds([lambda b=b: work(out, b) for b in sizes])
    return _share_of_best(
        [
            _row("fixed work", b, sms, ms, 2.0 * b * BLOCK * STEPS)
            for b, ms in zip(sizes, times, strict=True)
        ]
    )


def _gemm_rows(sms):
    high = max(d for d in range(1, 17) if sms % d == 0)  # rows of tiles
    wide = sms // high  # columns of tiles that fill one wave
    M = high * TILE[0]
    columns = [wide // 2]
    for wave in range(1, 4):
        columns += [wave * wide, wave * wide + 1, wave * wide + wide // 2]
    columns = [TILE[1] * c for c in [*columns, 4 * wide]]

    a = torch.randn(M, K, device="cuda").bfloat16()
    bs = [torch.randn(K, n, device="cuda").bfloat16() for n in columns]
    for b in bs:
        # partial sums may be rounded to bf16, whatever their order
        torch.testing.assert_close(
            (a @ b)[:64].float(), a[:64].float() @ b.float(), rtol=0.02, atol=2
        )
    outs = [torch.empty(M, n, device="cuda").bfloat16() for n in columns]
    launches = [
        lambda b=b, out=out: torch.matmul(a, b, out=out)
        for b, out in zip(bs, outs, strict=True)
    ]
    names = [_kernel_name(launch) for launch in launches]
    times = _milliseconds(launches)
    found = []
    for n, name, ms in zip(columns, names, times, strict=True):
        tile_m, tile_n = _tile(name)
        found.append(
            _row(
                f"torch.matmul: {name[:60]}",
                gemm_tiles(M, n, tile_m, tile_n),
                sms,
                ms,
                2.0 * M * n * K,
                tile=f"{tile_m} x {tile_n}",
                n=n,
            )
        )
    return _share_of_best(found)


def rows() -> list[dict]:
    """Time both kernels on grids of up to four waves.

    Returns:
        A row for each grid: blocks, waves, the share of the time in which
        equal blocks would keep the SMs busy, the time, the rate, and the rate
        over the best of the same kernel.

    Raises:
        RuntimeError: If there is no GPU, none that the module knows, or a
            result is wrong.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("this benchmark needs one NVIDIA GPU")
    gpu = torch.cuda.get_device_properties(0)
    capability = f"{gpu.major}.{gpu.minor}"
    if capability not in SMS:
        raise RuntimeError(f"compute capability {capability} is not in SMS")
    sms = gpu.multi_processor_count
    return [*_own_rows(sms, SMS[capability]), *_gemm_rows(sms)]
