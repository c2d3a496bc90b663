"""Row-wise softmax that reads and writes each element once.

Plain PyTorch passes over the matrix at every step: max, subtract, exp, sum,
divide. Here one program holds whole rows on chip: in registers, or where they
are too long for that, in the L1 cache.

    traffic  2 M N elements forward, 3 M N backward; the reference 8 M N + 4 M
    limit    a row of 128 KiB forward, of 64 KiB backward; longer rows go to
             online_softmax, which reads them twice

Reference: Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867
"""

import torch
from torch import Tensor

from warpmap.kernels import tl, triton
from warpmap.kernels.normalization._rows import check_rows, load
from warpmap.kernels.normalization.online_softmax import (
    online_softmax,
    online_softmax_backward,
)

# a row that is longer than this goes through registers in pieces
IN_REGISTERS = 8192

# what a program reads again and again must stay in the L1 cache: forward a row,
# backward one of each of two matrices
ON_CHIP = 1 << 17  # bytes

LOG2_E = tl.constexpr(1.4426950408889634)


def softmax_reference(x: Tensor) -> Tensor:
    """Softmax of each row, one step at a time, in float32.

    Args:
        x: ``(M, N)``.

    Returns:
        ``(M, N)``, same dtype; each row sums to 1.

    Examples:
        >>> softmax_reference(torch.tensor([[0.0, 0.0]])).tolist()
        [[0.5, 0.5]]
    """
    logits = x.float()
    shifted = logits - logits.amax(dim=1, keepdim=True)
    exps = shifted.exp()
    return (exps / exps.sum(dim=1, keepdim=True)).to(x.dtype)


@triton.jit
def _softmax_fwd_kernel(
    x_ptr,
    y_ptr,
    stride_xm,
    stride_ym,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECES: tl.constexpr,
):
    # 64-bit: row * stride overflows 32 bits on a large matrix
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)[:, None]
    rows = tl.minimum(rows, M - 1)  # past the end: the last row once more
    cols = tl.arange(0, BLOCK_N)[None, :]
    x_ptrs = x_ptr + rows * stride_xm + cols
    y_ptrs = y_ptr + rows * stride_ym + cols

    # pieces come from memory once, and then from the L1 cache
    KEEP: tl.constexpr = "evict_last" if PIECES > 1 else ""
    # -inf keeps padding out of the max, and 2^-inf = 0 out of the sum
    pad = -float("inf")
    tops = pad
    for i in tl.static_range(PIECES):
        at = i * BLOCK_N
        x = load(x_ptrs + at, cols + at < N, KEEP, pad)
        tops = x if i == 0 else tl.maximum(tops, x)
    top = tl.max(tops, axis=1, keep_dims=True)

    sums = 0.0
    for i in tl.static_range(PIECES):
        at = i * BLOCK_N
        # a load that asks for the same as the first would be merged with it,
        # and its piece kept in registers, where there is no room
        if PIECES > 1:
            x = load(x_ptrs + at, cols + at < N, "", pad)
        exps = tl.exp2((x - top) * LOG2_E)  # a GPU raises 2, not e
        sums = exps if i == 0 else sums + exps
    scale = 1 / tl.sum(sums, axis=1, keep_dims=True)

    for i in tl.static_range(PIECES):
        at = i * BLOCK_N
        if PIECES > 1:
            x = load(x_ptrs + at, cols + at < N, "evict_first", pad)
            exps = tl.exp2((x - top) * LOG2_E)
        tl.store(y_ptrs + at, exps * scale, cols + at < N)


@triton.jit
def _softmax_bwd_kernel(
    y_ptr,
    dy_ptr,
    dx_ptr,
    stride_ym,
    stride_dym,
    stride_dxm,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECES: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)[:, None]
    rows = tl.minimum(rows, M - 1)  # past the end: the last row once more
    cols = tl.arange(0, BLOCK_N)[None, :]
    y_ptrs = y_ptr + rows * stride_ym + cols
    dy_ptrs = dy_ptr + rows * stride_dym + cols
    dx_ptrs = dx_ptr + rows * stride_dxm + cols

    KEEP: tl.constexpr = "evict_last" if PIECES > 1 else ""
    sums = 0.0
    for i in tl.static_range(PIECES):
        at = i * BLOCK_N
        y = load(y_ptrs + at, cols + at < N, KEEP)
        dy = load(dy_ptrs + at, cols + at < N, KEEP)
        sums = y * dy if i == 0 else sums + y * dy
    mean = tl.sum(sums, axis=1, keep_dims=True)

    for i in tl.static_range(PIECES):
        at = i * BLOCK_N
        if PIECES > 1:
            y = load(y_ptrs + at, cols + at < N, "evict_first")
            dy = load(dy_ptrs + at, cols + at < N, "evict_first")
        tl.store(dx_ptrs + at, y * (dy - mean), cols + at < N)


def _tile(N: int, itemsize: int, backward: bool = False) -> dict[str, int]:
    """Launch parameters for rows of ``N`` elements."""
    BLOCK_N = min(triton.next_power_of_2(N), IN_REGISTERS)
    # several short rows a program, so that its threads have enough to load
    BLOCK_M = max(1, 1024 // BLOCK_N)
    tile = BLOCK_M * BLOCK_N
    # 16 elements a thread; 32 where a row of 16 bits leaves part of a long tile
    # empty, or some threads would have nothing to load
    each = 32 if itemsize == 2 and 4096 < N < BLOCK_N else 16
    num_warps = tile // (32 * each)
    # in pieces, by measurement on an H200
    if N > IN_REGISTERS:
        num_warps = 32 if (N <= 3 * IN_REGISTERS) == backward else 16
    if N > 6 * IN_REGISTERS:
        # unaligned rows need more threads, or they spill
        BLOCK_N, num_warps = 2 * BLOCK_N, 32 if N % 16 else 16
    return {
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": BLOCK_N,
        "PIECES": triton.cdiv(N, BLOCK_N),
        "num_warps": num_warps,
    }


@torch.library.custom_op("warpmap::softmax", mutates_args=())
def _softmax(x: Tensor) -> Tensor:
    M, N = x.shape
    y = x.new_empty(M, N)
    if y.numel() == 0:
        return y
    tile = _tile(N, x.itemsize)
    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        _softmax_fwd_kernel[(triton.cdiv(M, tile["BLOCK_M"]),)](
            x, y, x.stride(0), y.stride(0), M, N, **tile
        )
    return y


@torch.library.custom_op("warpmap::softmax_backward", mutates_args=())
def _softmax_backward(y: Tensor, dy: Tensor) -> Tensor:
    M, N = y.shape
    if 2 * N * y.itemsize > ON_CHIP:
        longer: Tensor = online_softmax_backward(y, dy)
        return longer
    dx = y.new_empty(M, N)
    if dx.numel() == 0:
        return dx
    tile = _tile(N, y.itemsize, backward=True)
    given = y, dy, dx, y.stride(0), dy.stride(0), dx.stride(0), M, N
    with torch.cuda.device_of(y):
        _softmax_bwd_kernel[(triton.cdiv(M, tile["BLOCK_M"]),)](*given, **tile)
    return dx


# what torch.compile and autograd must know about the two operators
_softmax.register_fake(lambda x: x.new_empty(x.shape))
_softmax_backward.register_fake(lambda y, dy: y.new_empty(y.shape))
_softmax.register_autograd(
    lambda ctx, dy: _softmax_backward(ctx.saved_tensors[0], dy.contiguous()),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
)


def softmax(x: Tensor) -> Tensor:
    """Softmax over the rows of a matrix, with its gradient.

    A row that holds ``nan`` or ``inf``, or nothing but ``-inf``, becomes
    ``nan``, as in PyTorch.

    Args:
        x: ``(M, N)``, float32, float16 or bfloat16, on ``warpmap.DEVICE``.
            Each row is contiguous, rows may lie apart.

    Returns:
        ``(M, N)``, same dtype, contiguous; each row sums to 1.

    Raises:
        ValueError: If ``x`` has another shape, dtype, layout or device.

    Examples:
        >>> from warpmap import DEVICE
        >>> softmax(torch.zeros(1, 4, device=DEVICE)).tolist()
        [[0.25, 0.25, 0.25, 0.25]]
    """
    check_rows({"x": x}, {}, longest=None)
    if x.shape[1] * x.itemsize > ON_CHIP:
        return online_softmax(x)
    y: Tensor = _softmax(x)
    return y
