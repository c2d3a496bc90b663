"""The sum of a vector: read once, added up in a tree, the same every time.

A sum has one addition for each element that it reads, so it takes as long as
the reading. ``total`` is a Triton kernel in two stages: programs walk through
the vector and leave a sum each, then one program adds up those. ``reduce.cu``
holds the eight steps in CUDA C++ that lead there, launched by ``ladder_sum``.

    traffic  N elements, and 4 bytes for each program twice
    error    depth(N) 2^-24 sum |x|, to first order, before the last rounding
    limit    contiguous tensors; the ladder float32, aligned to 16 bytes

References: Harris, 2007,
https://developer.download.nvidia.com/assets/cuda/files/reduction.pdf;
Higham, 1993, https://doi.org/10.1137/0914050
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from warpmap import DEVICE
from warpmap.kernels import tl, triton
from warpmap.kernels.cuda import cuda_kernel

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# at most so many programs. There are more than the GPU holds at once, so that
# an SM that is done early gets another. With a number that depends on the GPU
# the last bits would depend on it too
PROGRAMS = 4096


@triton.jit(do_not_specialize=["N"])
def _sum_kernel(x_ptr, sums_ptr, N, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    # 64-bit: the last block may begin past 2^31
    first = program.to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    full = N.to(tl.int64) // BLOCK * BLOCK

    sums = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(first, full, step):
        # without a mask, so that every load is one of 16 bytes; nothing is
        # read again, so it may leave the caches first
        x = tl.load(x_ptr + start + lanes, eviction_policy="evict_first")
        sums += x.to(tl.float32)
    total = tl.sum(sums, axis=0)

    # what is left at the end is less than a block: the first program's
    if program == 0:
        x = tl.load(x_ptr + full + lanes, lanes < N - full, other=0.0)
        total += tl.sum(x.to(tl.float32), axis=0)
    tl.store(sums_ptr + program, total)


def _tile(N: int, itemsize: int) -> tuple[int, int, int]:
    """Programs, ``BLOCK`` and warps for a vector of ``N`` elements."""
    # 32 KiB a block: four loads of 16 bytes for each of 512 threads
    BLOCK = min(32768 // itemsize, max(256, triton.next_power_of_2(N)))
    programs = max(1, min(PROGRAMS, N // BLOCK))
    return programs, BLOCK, max(1, BLOCK * itemsize // 2048)


@torch.library.custom_op("warpmap::total", mutates_args=())
def _total(x: Tensor) -> Tensor:
    out = x.new_empty(())
    programs = _tile(x.numel(), x.itemsize)[0]
    sums = x.new_empty(programs, dtype=torch.float32) if programs > 1 else out
    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        _launch(x, sums)
        if programs > 1:
            _launch(sums, out)
    return out


def _launch(x: Tensor, sums: Tensor) -> None:
    N = x.numel()
    programs, BLOCK, num_warps = _tile(N, x.itemsize)
    _sum_kernel[(programs,)](x, sums, N, BLOCK=BLOCK, num_warps=num_warps)


# what torch.compile and autograd must know about the operator
_total.register_fake(lambda x: x.new_empty(()))


def _keep_shape(ctx, inputs, output):
    ctx.shape = inputs[0].shape


_total.register_autograd(
    lambda ctx, dy: dy.expand(ctx.shape), setup_context=_keep_shape
)


def total(x: Tensor) -> Tensor:
    """Sum of all elements, with its gradient.

    Added up in float32, in an order that depends on nothing but the number of
    elements, their type and their alignment: every run gives the same bits.

    Args:
        x: Any shape, float32, float16 or bfloat16, contiguous, on
            ``warpmap.DEVICE``.

    Returns:
        ``()``, same dtype; 0 of no elements.

    Raises:
        ValueError: If ``x`` has another dtype, layout or device.

    Examples:
        >>> total(torch.ones(3, 5, device=DEVICE)).item()
        15.0
    """
    _check(x, DTYPES)
    if x.device.type != DEVICE:
        raise ValueError(f"expected a tensor on {DEVICE}, got {x.device}")
    y: Tensor = _total(x)
    return y


def _check(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in dtypes:
        raise ValueError(f"expected one of {dtypes}, got {x.dtype}")
    if not x.is_contiguous():
        raise ValueError(
            f"expected a contiguous tensor, got strides {x.stride()}: "
            "call x.contiguous() first"
        )


def depth(N: int, itemsize: int) -> int:
    """The most additions that one element goes through in ``total``.

    Each rounds by 2^-24 of its result at most, so the sum is off by no more
    than ``depth`` times that, times the sum of the magnitudes, to first order.

    Args:
        N: Elements.
        itemsize: Bytes of one: 4 or 2.

    Raises:
        ValueError: If ``N`` is negative.

    Examples:
        >>> depth(2**28, itemsize=4)
        60
    """
    if N < 0:
        raise ValueError(f"N must be at least 0, got {N}")
    programs, BLOCK, num_warps = _tile(N, itemsize)
    threads = 32 * num_warps
    loops = -(-(N // BLOCK) // programs)
    # within a thread, then across threads; last, what was left at the end
    block = BLOCK // threads + threads.bit_length() - 1
    return loops + block + 1 + (depth(programs, 4) if programs > 1 else 0)


# The ladder, in CUDA C++: kernels of reduce.cu

Rung = Literal[
    "interleaved",
    "strided",
    "sequential",
    "first_add",
    "last_warp",
    "shuffle",
    "packed",
    "grid",
]

THREADS = 256
GRID = 528  # four blocks for each SM of an H200

# elements that a block adds up; on the last rung, that it must have to do
PER_BLOCK: dict[Rung, int] = {
    "interleaved": THREADS,
    "strided": THREADS,
    "sequential": THREADS,
    "first_add": 2 * THREADS,
    "last_warp": 2 * THREADS,
    "shuffle": 2 * THREADS,
    "packed": 8 * THREADS,
    "grid": 16 * THREADS,
}

_KERNELS: dict[Rung, Callable[..., None]] = {
    rung: cuda_kernel(__file__, f"sum_{rung}") for rung in PER_BLOCK
}


def ladder_sum(x: Tensor, rung: Rung = "grid") -> Tensor:
    """Sum of all elements, as one rung of the ladder does it.

    Args:
        x: Any shape, float32, contiguous, on a GPU; it begins on a multiple
            of 16 bytes.
        rung: Which kernel.

    Returns:
        ``()``, float32.

    Raises:
        ValueError: If ``x`` has another dtype, layout or device, or there is
            no such rung.

    Examples:
        >>> ladder_sum(torch.ones(3), "ninth")
        Traceback (most recent call last):
        ...
        ValueError: expected a rung of interleaved, strided, sequential, \
first_add, last_warp, shuffle, packed, grid, got 'ninth'
    """
    if rung not in PER_BLOCK:
        raise ValueError(
            f"expected a rung of {', '.join(get_args(Rung))}, got {rung!r}"
        )
    _check(x, (torch.float32,))
    if x.device.type != "cuda":
        raise ValueError(f"expected a tensor on a GPU, got {x.device}")
    if x.data_ptr() % 16:
        raise ValueError("expected data on a multiple of 16 bytes: x.clone()")
    while True:
        blocks = max(1, triton.cdiv(x.numel(), PER_BLOCK[rung]))
        if rung == "grid":
            blocks = min(blocks, GRID)
        sums = x.new_empty(blocks)
        _KERNELS[rung](blocks, THREADS, x, sums, x.numel())
        if blocks == 1:
            return sums.view(())
        x = sums
