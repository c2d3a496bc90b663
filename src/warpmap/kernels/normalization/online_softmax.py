"""Softmax of rows longer than a chip holds, read in pieces, twice.

The first reading keeps a running maximum and a running sum, the second knows
both and writes. It goes backwards, so it begins with what the caches hold.

    traffic  2 M N elements forward, 3 M N backward, while the rows under way
             fit in the caches; 3 M N and 5 M N where they do not
    state    two float32 a lane; :mod:`._online` has it in plain Python

Reference: Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867
"""

import torch
from torch import Tensor

from warpmap.kernels import tl, triton
from warpmap.kernels.normalization._rows import (
    check_rows,
    load,
    programs_at_once,
)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _online_fwd_kernel(
    x_ptr,
    y_ptr,
    stride_xm,
    stride_ym,
    M,
    N,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    BLOCK: tl.constexpr = LANES * VEC
    # a lane takes VEC neighbours of every piece: 16 bytes, one load
    cols = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    pieces = tl.cdiv(N, BLOCK)
    for program in range(tl.program_id(0), M, tl.num_programs(0)):
        # 64-bit: row * stride overflows 32 bits on a large matrix
        row = tl.cast(program, tl.int64)
        x_row = x_ptr + row * stride_xm
        y_row = y_ptr + row * stride_ym

        # every lane keeps a state of its own: no thread waits for another
        maxs = tl.full([LANES], -float("inf"), tl.float32)
        sums = tl.zeros([LANES], tl.float32)
        for piece in range(pieces):
            start = piece * BLOCK
            mask = cols < N - start
            x = load(x_row + start + cols, mask, "evict_last", -float("inf"))
            tops = tl.maximum(maxs, tl.max(x, axis=1))
            # in a lane that has seen only -inf: inf - inf is no number
            base = tl.where(tops == -float("inf"), 0.0, tops)
            sums *= tl.exp2((maxs - base) * LOG2_E)
            sums += tl.sum(tl.exp2((x - base[:, None]) * LOG2_E), axis=1)
            maxs = tops

        # all lanes merge at once
        top = tl.max(maxs, axis=0)
        scale = 1 / tl.sum(sums * tl.exp2((maxs - top) * LOG2_E), axis=0)

        # backwards: the last pieces are still in a cache near by
        for piece in range(pieces):
            start = (pieces - 1 - piece) * BLOCK
            mask = cols < N - start
            x = load(x_row + start + cols, mask, "evict_first", None)
            y = tl.exp2((x - top) * LOG2_E) * scale
            tl.store(
                y_row + start + cols, y, mask, eviction_policy="evict_first"
            )


@triton.jit
def _online_bwd_kernel(
    y_ptr,
    dy_ptr,
    dx_ptr,
    stride_ym,
    stride_dym,
    stride_dxm,
    M,
    N,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    BLOCK: tl.constexpr = LANES * VEC
    cols = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    pieces = tl.cdiv(N, BLOCK)
    for program in range(tl.program_id(0), M, tl.num_programs(0)):
        row = tl.cast(program, tl.int64)
        y_row = y_ptr + row * stride_ym
        dy_row = dy_ptr + row * stride_dym
        dx_row = dx_ptr + row * stride_dxm

        sums = tl.zeros([LANES], tl.float32)
        for piece in range(pieces):
            start = piece * BLOCK
            mask = cols < N - start
            y = load(y_row + start + cols, mask, "evict_last")
            dy = load(dy_row + start + cols, mask, "evict_last")
            sums += tl.sum(y * dy, axis=1)
        mean = tl.sum(sums, axis=0)

        for piece in range(pieces):
            start = (pieces - 1 - piece) * BLOCK
            mask = cols < N - start
            y = load(y_row + start + cols, mask, "evict_first", None)
            dy = load(dy_row + start + cols, mask, "evict_first", None)
            tl.store(
                dx_row + start + cols,
                y * (dy - mean),
                mask,
                eviction_policy="evict_first",
            )


def _forward_launch(row_bytes: int, sms: int) -> tuple[int, int, int]:
    """Programs, lanes and warps, where a row is so many bytes."""
    # few rows under way, so that the caches still hold them when they are
    # read again: two short ones a multiprocessor, or a long one
    resident = 2 if row_bytes <= 1 << 17 else 1
    return sms * resident, 2048, 32 // resident


def _backward_launch(sms: int) -> tuple[int, int, int]:
    """Programs, lanes and warps."""
    # a row of two matrices: one a multiprocessor; four lanes a thread, so
    # eight loads of 16 bytes under way
    return sms, 4096, 32


@torch.library.custom_op("warpmap::online_softmax", mutates_args=())
def _online_softmax(x: Tensor) -> Tensor:
    M, N = x.shape
    y = x.new_empty(M, N)
    if y.numel() == 0:
        return y
    programs, LANES, num_warps = _forward_launch(
        N * x.itemsize, programs_at_once(x, 1)
    )
    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        _online_fwd_kernel[(min(M, programs),)](
            x,
            y,
            x.stride(0),
            y.stride(0),
            M,
            N,
            LANES=LANES,
            VEC=16 // x.itemsize,
            num_warps=num_warps,
        )
    return y


@torch.library.custom_op("warpmap::online_softmax_backward", mutates_args=())
def online_softmax_backward(y: Tensor, dy: Tensor) -> Tensor:
    """Gradient of softmax by its input.

    Args:
        y: ``(M, N)``, the result of softmax.
        dy: ``(M, N)``, the gradient by it, with contiguous rows.

    Returns:
        ``(M, N)``.

    Examples:
        >>> from warpmap import DEVICE
        >>> y = torch.full((1, 2), 0.5, device=DEVICE)
        >>> dy = torch.tensor([[1.0, 0.0]], device=DEVICE)
        >>> online_softmax_backward(y, dy).tolist()
        [[0.25, -0.25]]
    """
    M, N = y.shape
    dx = y.new_empty(M, N)
    if dx.numel() == 0:
        return dx
    programs, LANES, num_warps = _backward_launch(programs_at_once(y, 1))
    with torch.cuda.device_of(y):
        _online_bwd_kernel[(min(M, programs),)](
            y,
            dy,
            dx,
            y.stride(0),
            dy.stride(0),
            dx.stride(0),
            M,
            N,
            LANES=LANES,
            VEC=16 // y.itemsize,
            num_warps=num_warps,
        )
    return dx


# what torch.compile and autograd must know about the two operators
_online_softmax.register_fake(lambda x: x.new_empty(x.shape))
online_softmax_backward.register_fake(lambda y, dy: y.new_empty(y.shape))
_online_softmax.register_autograd(
    lambda ctx, dy: online_softmax_backward(
        ctx.saved_tensors[0], dy.contiguous()
    ),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
)


def online_softmax(x: Tensor) -> Tensor:
    """Softmax over the rows of a matrix, of any length, with its gradient.

    A row that holds ``nan`` or ``inf``, or nothing but ``-inf``, becomes
    ``nan``, as in PyTorch.

    Args:
        x: ``(M, N)``, float32, float16 or bfloat16, on ``warpmap.DEVICE``.
            Each row is contiguous, rows may lie apart.

    Returns:
        ``(M, N)``, same dtype, contiguous; each row sums to 1.

    Raises:
        ValueError: If ``x`` has another shape, dtype, layout or device, or
            rows of nearly 2**31 elements.

    Examples:
        >>> from warpmap import DEVICE
        >>> online_softmax(torch.zeros(1, 4, device=DEVICE)).tolist()
        [[0.25, 0.25, 0.25, 0.25]]
    """
    check_rows({"x": x}, {}, longest=None)
    if 2**31 - 2**15 < x.shape[1] < 2**31:  # 32 bits count them, not the pieces
        raise ValueError(
            "expected no row of nearly 2**31 elements, got "
            f"{x.shape[1]}: take less than 2**31 - 2**15, or 2**31 and more"
        )
    y: Tensor = _online_softmax(x)
    return y
