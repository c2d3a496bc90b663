"""Row-wise softmax that reads and writes each element once.

Plain PyTorch passes over the matrix at every step: max, subtract, exp, sum,
divide. Here one program holds whole rows in registers.

    traffic  2 M N elements forward, 3 M N backward; the reference 8 M N + 4 M
    limit    a row of 64 KiB forward, of 16384 elements backward; longer rows
             go to online_softmax, which reads them twice

Reference: Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867
"""

import torch
from torch import Tensor

from warpmap.kernels import tl, triton
from warpmap.kernels.normalization._softmax_rows import (
    check_rows,
    multiprocessors,
)
from warpmap.kernels.normalization.online_softmax import (
    online_softmax,
    online_softmax_backward,
)

# forward keeps a float32 row in registers, and the next two in shared memory
MAX_FORWARD_BYTES = 1 << 16

# backward keeps two float32 rows: at 16384 columns 128 KiB of the 256 KiB
# of registers of a streaming multiprocessor; at 32768 the compiler spills
MAX_BACKWARD_COLS = 1 << 14

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
    STAGES: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_N)[None, :]
    tiles = tl.cdiv(M, BLOCK_M)
    # with three stages the load runs two tiles ahead
    for tile in tl.range(
        tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES
    ):
        # 64-bit: row * stride overflows 32 bits on a large matrix
        first = tl.cast(tile, tl.int64) * BLOCK_M
        rows = first + tl.arange(0, BLOCK_M)[:, None]
        rows = tl.minimum(rows, M - 1)  # past the end: the last row once more

        # -inf keeps padding out of the max, and 2^-inf = 0 out of the sum
        x_ptrs = x_ptr + rows * stride_xm + cols
        x = tl.load(x_ptrs, cols < N, other=-float("inf")).to(tl.float32)
        shifted = x - tl.max(x, axis=1, keep_dims=True)
        exps = tl.exp2(shifted * LOG2_E)  # a GPU raises 2, not e
        scale = 1 / tl.sum(exps, axis=1, keep_dims=True)
        tl.store(y_ptr + rows * stride_ym + cols, exps * scale, cols < N)


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
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)[:, None]
    rows = tl.minimum(rows, M - 1)  # past the end: the last row once more
    cols = tl.arange(0, BLOCK_N)[None, :]
    mask = cols < N

    y_ptrs = y_ptr + rows * stride_ym + cols
    dy_ptrs = dy_ptr + rows * stride_dym + cols
    y = tl.load(y_ptrs, mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptrs, mask, other=0.0).to(tl.float32)
    mean = tl.sum(y * dy, axis=1, keep_dims=True)
    dx = y * (dy - mean)
    tl.store(dx_ptr + rows * stride_dxm + cols, dx, mask)


def _tile(N: int, itemsize: int) -> tuple[int, int, int]:
    """``BLOCK_M``, ``BLOCK_N`` and warps for rows of ``N`` elements."""
    BLOCK_N = triton.next_power_of_2(N)
    # several short rows a program, so that its threads have enough to load
    BLOCK_M = max(1, 1024 // BLOCK_N)
    tile = BLOCK_M * BLOCK_N
    # 16 elements a thread, in long rows 64 bytes
    num_warps = max(min(16, tile // 512), tile * itemsize // 2048)
    return BLOCK_M, BLOCK_N, num_warps


def _schedule(tiles: int, BLOCK_N: int, sms: int) -> tuple[int, int]:
    """Programs and pipeline stages of the forward kernel."""
    # two rows or more on a multiprocessor: while one waits, others work
    if BLOCK_N <= 16384:
        return tiles, 1
    # only one fits: its program stays, and loads the next two rows early
    return min(tiles, sms), 3


@torch.library.custom_op("warpmap::softmax", mutates_args=())
def _softmax(x: Tensor) -> Tensor:
    M, N = x.shape
    y = x.new_empty(M, N)
    if y.numel() == 0:
        return y
    BLOCK_M, BLOCK_N, num_warps = _tile(N, x.itemsize)
    tiles = triton.cdiv(M, BLOCK_M)
    programs, STAGES = _schedule(tiles, BLOCK_N, multiprocessors(x))
    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        _softmax_fwd_kernel[(programs,)](
            x,
            y,
            x.stride(0),
            y.stride(0),
            M,
            N,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            STAGES=STAGES,
            num_warps=num_warps,
        )
    return y


@torch.library.custom_op("warpmap::softmax_backward", mutates_args=())
def _softmax_backward(y: Tensor, dy: Tensor) -> Tensor:
    M, N = y.shape
    if N > MAX_BACKWARD_COLS:
        longer: Tensor = online_softmax_backward(y, dy)
        return longer
    dx = y.new_empty(M, N)
    if dx.numel() == 0:
        return dx
    BLOCK_M, BLOCK_N, num_warps = _tile(N, y.itemsize)
    with torch.cuda.device_of(y):
        _softmax_bwd_kernel[(triton.cdiv(M, BLOCK_M),)](
            y,
            dy,
            dx,
            y.stride(0),
            dy.stride(0),
            dx.stride(0),
            M,
            N,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            num_warps=num_warps,
        )
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
    check_rows(x)
    if x.shape[1] * x.itemsize > MAX_FORWARD_BYTES:
        return online_softmax(x)
    y: Tensor = _softmax(x)
    return y
