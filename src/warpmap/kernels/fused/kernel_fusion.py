"""A bias, a GELU and a residual in one kernel, forward and backward.

Three operators in a row store what the next one loads again. Fused, what lies
between them never leaves the registers.

    forward   3 M N elements; operator by operator 7 M N
    backward  3 M N elements; operator by operator 4 M N

Reference: Ivanov et al., 2021, https://arxiv.org/abs/2007.00072
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from warpmap import DEVICE
from warpmap.kernels import tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCALE = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(0.044715)


def bias_gelu_add_reference(
    x: Tensor, bias: Tensor, residual: Tensor
) -> Tensor:
    """``gelu(x + bias) + residual``, one operator at a time.

    Examples:
        >>> one = torch.ones(1)
        >>> bias_gelu_add_reference(one[None], -one, one[None]).item()
        1.0
    """
    h = x + bias
    a = F.gelu(h, approximate="tanh")
    return a + residual


@triton.jit
def _gate(h):
    # (1 + tanh(u)) / 2 is the sigmoid of 2u: one exponential, one division
    return tl.sigmoid((h + h * h * h * CUBIC) * SCALE)


@triton.jit
def _bias_gelu_add_fwd_kernel(
    x_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    stride_xm,
    stride_rm,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BLOCK_N)
    # 64-bit: row * stride overflows 32 bits on a large matrix
    first = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)[:, None]
    cols = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < M) & (cols < N)

    x = tl.load(x_ptr + rows * stride_xm + cols, mask).to(tl.float32)
    r = tl.load(residual_ptr + rows * stride_rm + cols, mask).to(tl.float32)
    bias = tl.load(bias_ptr + cols, cols < N).to(tl.float32)
    h = x + bias
    tl.store(y_ptr + rows * N + cols, h * _gate(h) + r, mask)


@triton.jit
def _bias_gelu_add_bwd_kernel(
    x_ptr,
    bias_ptr,
    dy_ptr,
    dx_ptr,
    partial_ptr,
    stride_xm,
    stride_dym,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # a program stays in its strip of columns and walks down the rows
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    bias = tl.load(bias_ptr + cols, cols < N).to(tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    walker, walkers = tl.program_id(1), tl.num_programs(1)
    for turn in range(tl.cdiv(tl.cdiv(M, BLOCK_M) - walker, walkers)):
        first = (turn * walkers + walker).to(tl.int64) * BLOCK_M
        rows = first + tl.arange(0, BLOCK_M)[:, None]
        mask = (rows < M) & (cols < N)
        x = tl.load(x_ptr + rows * stride_xm + cols, mask, other=0.0)
        # zeros beyond the end add nothing to the sums
        dy = tl.load(dy_ptr + rows * stride_dym + cols, mask, other=0.0)
        # h is computed once more: cheaper than to have stored it
        h = x.to(tl.float32) + bias
        gate = _gate(h)
        slope = (1 + h * h * (3 * CUBIC)) * SCALE
        dx = dy.to(tl.float32) * gate * (1 + h * (1 - gate) * slope)
        tl.store(dx_ptr + rows * N + cols, dx, mask)
        sums += dx
    here = partial_ptr + walker * N + cols
    tl.store(here, tl.sum(sums, axis=0, keep_dims=True), cols < N)


NUM_WARPS = 4
PROGRAMS_PER_SM = 8  # of the backward kernel: registers allow them all


def _tile(N: int) -> tuple[int, int]:
    """``BLOCK_M`` and ``BLOCK_N``: 8 elements for each thread."""
    BLOCK_N = min(1024, triton.next_power_of_2(N))
    return 32 * NUM_WARPS * 8 // BLOCK_N, BLOCK_N


def _sms(x: Tensor) -> int:
    if x.device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def _rows(x: Tensor) -> Tensor:
    """As a matrix of contiguous rows, copied if it must be."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


@torch.library.custom_op("warpmap::bias_gelu_add", mutates_args=())
def _bias_gelu_add(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, residual, bias = _rows(x), _rows(residual), bias.contiguous()
    M, N = x.shape
    BLOCK_M, BLOCK_N = _tile(N)
    tiles = triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N)
    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        _bias_gelu_add_fwd_kernel[(tiles,)](
            x,
            bias,
            residual,
            y,
            x.stride(0),
            residual.stride(0),
            M,
            N,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            num_warps=NUM_WARPS,
        )
    return y


@torch.library.custom_op("warpmap::bias_gelu_add_backward", mutates_args=())
def _bias_gelu_add_backward(
    x: Tensor, bias: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel() == 0:
        return dx, torch.zeros_like(bias)
    x, dy, bias = _rows(x), _rows(dy), bias.contiguous()
    M, N = x.shape
    BLOCK_M, BLOCK_N = _tile(N)
    strips = triton.cdiv(N, BLOCK_N)
    walkers = max(1, PROGRAMS_PER_SM * _sms(x) // strips)
    # of few rows two turns each: half as many partial sums to add up
    walkers = min(walkers, triton.cdiv(M, 2 * BLOCK_M))
    partial = torch.empty(walkers, N, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _bias_gelu_add_bwd_kernel[(strips, walkers)](
            x,
            bias,
            dy,
            dx,
            partial,
            x.stride(0),
            dy.stride(0),
            M,
            N,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            num_warps=NUM_WARPS,
        )
    return dx, partial.sum(dim=0).to(bias.dtype)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # what was added last takes the gradient as it is
    return *_bias_gelu_add_backward(*ctx.saved_tensors, dy), dy


# what torch.compile and autograd must know about the operators
_bias_gelu_add.register_fake(lambda x, bias, residual: x.new_empty(x.shape))
_bias_gelu_add_backward.register_fake(
    lambda x, bias, dy: (x.new_empty(x.shape), bias.new_empty(bias.shape))
)
_bias_gelu_add.register_autograd(
    _gradients,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(
        *inputs[:2]
    ),
)


def bias_gelu_add(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """``gelu(x + bias) + residual`` in one kernel, with its gradients.

    GELU is the approximation by tanh.

    Args:
        x: ``(..., N)``, float32, float16 or bfloat16, on ``warpmap.DEVICE``;
            rows are best contiguous.
        bias: ``(N,)``, the same dtype and device.
        residual: As ``x``.

    Returns:
        Shape and dtype of ``x``, contiguous; rounded once.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit.

    Examples:
        >>> x, residual = torch.tensor([[[-15.0, 20.0]], [[1.0, 2.0]]]).to(
        ...     DEVICE
        ... )
        >>> bias = torch.full((2,), 5.0, device=DEVICE)
        >>> bias_gelu_add(x, bias, residual).tolist()  # -10 is cut to 0
        [[1.0, 27.0]]
    """
    if x.dtype not in DTYPES or {x.dtype} != {bias.dtype, residual.dtype}:
        raise ValueError(
            f"expected one dtype of {DTYPES}, "
            f"got {x.dtype}, {bias.dtype}, {residual.dtype}"
        )
    if x.ndim < 1 or residual.shape != x.shape or bias.shape != x.shape[-1:]:
        raise ValueError(
            "expected x and residual (..., N) and bias (N,), got "
            f"{tuple(x.shape)}, {tuple(residual.shape)}, {tuple(bias.shape)}"
        )
    if x.device.type != DEVICE or {x.device} != {bias.device, residual.device}:
        raise ValueError(
            f"expected tensors on one {DEVICE} device, "
            f"got {x.device}, {bias.device}, {residual.device}"
        )
    y: Tensor = _bias_gelu_add(x, bias, residual)
    return y
