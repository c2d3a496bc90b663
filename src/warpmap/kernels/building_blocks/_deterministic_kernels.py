"""The kernels of ``deterministic_reduction``, which itself is plain Python."""

import torch
from torch import Tensor

from warpmap import DEVICE
from warpmap.kernels import tl, triton

BLOCK, NUM_WARPS = 4096, 8


@triton.jit
def _atomic_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < N, other=0.0)
    # who comes first is added first
    tl.atomic_add(out_ptr, tl.sum(x, axis=0), sem="relaxed")


@triton.jit
def _split_kernel(x_ptr, parts_ptr, N, size, splits, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // splits).to(tl.int64)
    first = (tl.program_id(0) % splits).to(tl.int64) * size
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        i = start + lanes
        mask = (i < size) & (first + i < N)
        sums += tl.load(x_ptr + row * N + first + i, mask, other=0.0)
    tl.store(parts_ptr + tl.program_id(0), tl.sum(sums, axis=0))


def _check(x: Tensor) -> None:
    if x.dtype != torch.float32:
        raise ValueError(f"expected torch.float32, got {x.dtype}")
    if not x.is_contiguous():
        raise ValueError(f"expected contiguous, got strides {x.stride()}")
    if x.device.type != DEVICE:
        raise ValueError(f"expected a tensor on {DEVICE}, got {x.device}")


def atomic_total(x: Tensor) -> Tensor:
    """See ``deterministic_reduction``."""
    _check(x)
    out = x.new_zeros(())
    if x.numel():
        with torch.cuda.device_of(x):
            _atomic_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                x, out, x.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS
            )
    return out


def row_sums(x: Tensor, splits: int) -> Tensor:
    """See ``deterministic_reduction``."""
    if x.ndim != 2:
        raise ValueError(f"expected (M, N), got {tuple(x.shape)}")
    _check(x)
    if splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    M, N = x.shape
    if x.numel() == 0:
        return x.new_zeros(M)
    with torch.cuda.device_of(x):
        while True:
            parts = x.new_empty(M, splits)
            size = triton.cdiv(N, splits)
            _split_kernel[(M * splits,)](
                x, parts, N, size, splits, BLOCK=1024, num_warps=4
            )
            if splits == 1:
                return parts.view(M)
            x, N, splits = parts, splits, 1
