"""Useful bandwidth of strided reads and copies, beside the count of sectors.

Every thread loads 4 bytes at a time, so 32 neighbours of the grid form one
request of a warp. The arrays hold 2 GiB each, far more than the L2 cache.
"""

import statistics

import torch

from warpmap.hardware.gpu.memory_coalescing import array_share, warp_request
from warpmap.kernels import tl, triton

FLOATS = 2**29  # 2 GiB an array
BLOCK = 1024
WARPS = 4
ROUNDS = 15

# stride, offset
CASES = [
    *[(stride, 0) for stride in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)],
    *[(1, offset) for offset in (1, 4, 8, 16)],
]


# Triton would turn a stride of 1 into a constant and load 16 bytes a thread
@triton.jit(do_not_specialize=["stride", "offset", "n"])
def _read_kernel(x_ptr, sums_ptr, stride, offset, n, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset + stride * i, i < n, other=0.0)
    tl.store(sums_ptr + program, tl.sum(x, axis=0))


@triton.jit(do_not_specialize=["stride", "offset", "n"])
def _copy_kernel(x_ptr, y_ptr, stride, offset, n, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset + stride * i, i < n, other=0.0)
    tl.store(y_ptr + offset + stride * i, x, i < n)


def _count(floats, stride, offset):
    """Elements of ``x[offset::stride]``, whole blocks."""
    return (floats - offset) // stride // BLOCK * BLOCK


def _read(x, sums, stride, offset):
    n = _count(x.numel(), stride, offset)
    grid = (n // BLOCK,)
    _read_kernel[grid](x, sums, stride, offset, n, BLOCK=BLOCK, num_warps=WARPS)


def _copy(x, y, stride, offset):
    n = _count(x.numel(), stride, offset)
    grid = (n // BLOCK,)
    _copy_kernel[grid](x, y, stride, offset, n, BLOCK=BLOCK, num_warps=WARPS)


def _check(x, y, sums, stride, offset):
    """Both kernels touch the right elements, and no others."""
    n = _count(x.numel(), stride, offset)
    last = offset + stride * (n - 1)
    wanted = x[offset : last + 1 : stride]
    sums.zero_()
    _read(x, sums, stride, offset)
    # small whole numbers: every sum is exact, in any order
    if not torch.equal(sums[: n // BLOCK], wanted.view(-1, BLOCK).sum(1)):
        raise RuntimeError(f"wrong sums: stride {stride}, offset {offset}")
    y.fill_(-1)
    _copy(x, y, stride, offset)
    copied = y[offset : last + 1 : stride]
    if not torch.equal(copied, wanted):
        raise RuntimeError(f"wrong copy: stride {stride}, offset {offset}")
    copied.fill_(-1)
    if int((y != -1).sum()):
        raise RuntimeError(f"stray writes: stride {stride}, offset {offset}")


def _seconds(launch):
    """Median of several runs, by events on the GPU."""
    times = []
    for _ in range(3):
        launch()
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
    return statistics.median(times)


def rows() -> list[dict]:
    """Check and time every stride and offset.

    Returns:
        A row for each: sectors of one request, the useful share of one
        request and of the sweep, and the useful bytes a second that were
        read, or read and written, with their share of those at stride 1.

    Raises:
        RuntimeError: If there is no GPU, too little memory, or a kernel is
            wrong.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("this benchmark needs one NVIDIA GPU")
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        raise RuntimeError("this benchmark needs 12 GiB of free GPU memory")
    x = torch.randint(0, 8, (FLOATS,), device="cuda", dtype=torch.int8).float()
    y = torch.empty_like(x)
    sums = torch.empty(FLOATS // BLOCK, device="cuda")

    found = []
    for stride, offset in CASES:
        _check(x, y, sums, stride, offset)
        useful = 4 * _count(FLOATS, stride, offset)
        read = useful / _seconds(
            lambda s=stride, o=offset: _read(x, sums, s, o)
        )
        copy = useful / _seconds(lambda s=stride, o=offset: _copy(x, y, s, o))
        request = warp_request(4, stride, offset)
        found.append(
            {
                "stride": stride,
                "offset": offset,
                "sectors": request.sectors,
                "request_share": round(request.efficiency_percent / 100, 3),
                "predicted_share": round(array_share(4, stride), 3),
                "share_if_64_bytes": round(array_share(4, stride, 64), 3),
                "measured_read_gb_s": round(read / 1e9, 1),
                "measured_copy_gb_s": round(2 * copy / 1e9, 1),
            }
        )
    for kind in ("read", "copy"):
        best = found[0][f"measured_{kind}_gb_s"]
        for row in found:
            share = row[f"measured_{kind}_gb_s"] / best
            row[f"measured_{kind}_share"] = round(share, 3)
    return found
