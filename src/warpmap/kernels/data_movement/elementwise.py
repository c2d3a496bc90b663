"""Elementwise operators: broadcasting by strides, 16 bytes a load.

Two tensors of any shapes that broadcast become two matrices of one shape:

    expand   a dimension that is repeated has stride 0
    merge    two dimensions that every operand walks through as one, are one

Most often one row is left. Each program takes a tile of it.

    traffic  every input read once, the output written once

Reference: Harris, 2013,
https://developer.nvidia.com/blog/cuda-pro-tip-write-flexible-kernels-grid-stride-loops/
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from warpmap import DEVICE
from warpmap.kernels import tl, triton
from warpmap.kernels.cuda import cuda_kernel

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RUNGS = ("naive", "grid_stride", "packed")


def merge_dims(
    shape: Sequence[int], *strides: Sequence[int]
) -> list[tuple[int, ...]]:
    """Join neighbouring dimensions that are one for every operand.

    Two dimensions are one if a step of the outer is as far as walking the
    inner to its end, in each operand. Repeated twice is repeated: 0 = n * 0.

    Args:
        shape: The shape that all operands are expanded to.
        strides: The strides of each operand, in elements.

    Returns:
        ``(size, stride, stride, ...)`` of each dimension left, outer first.

    Examples:
        >>> merge_dims((8, 16, 32), (512, 32, 1))
        [(4096, 1)]
        >>> merge_dims((8, 16, 32), (512, 32, 1), (0, 0, 1))  # a bias
        [(128, 32, 0), (32, 1, 1)]
    """
    merged: list[tuple[int, ...]] = []
    for size, *steps in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1:] == tuple(size * step for step in steps):
            size *= merged.pop()[0]
        merged.append((size, *steps))
    return merged


@triton.jit
def _apply(a_ptrs, b_ptrs, y_ptrs, mask, OP: tl.constexpr):
    a = tl.load(a_ptrs, mask).to(tl.float32)
    if OP == "multiply":
        y = a * tl.load(b_ptrs, mask).to(tl.float32)
    elif OP == "silu":
        y = a * tl.sigmoid(a)
    else:  # "silu_backward": b is the gradient of silu(a)
        s = tl.sigmoid(a)
        y = tl.load(b_ptrs, mask).to(tl.float32) * s * (1 + a * (1 - s))
    tl.store(y_ptrs, y, mask)


@triton.jit
def _elementwise_kernel(
    a_ptr,
    b_ptr,
    y_ptr,
    stride_am,
    stride_bm,
    stride_ym,
    M,
    N,
    STRIDE_AN: tl.constexpr,
    STRIDE_BN: tl.constexpr,
    OP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_n = N // BLOCK_N + (N % BLOCK_N > 0)  # cdiv may overflow
    # 64-bit: an element's number overflows 32 bits in a large tensor
    first_row = (tile // tiles_n).to(tl.int64) * BLOCK_M
    first_col = (tile % tiles_n).to(tl.int64) * BLOCK_N
    rows = first_row + tl.arange(0, BLOCK_M)[:, None]
    rows = tl.minimum(rows, M - 1)  # past the end: the last row once more
    cols = first_col + tl.arange(0, BLOCK_N)[None, :]

    # an operand that repeats along a row is loaded once a row
    a_ptrs = a_ptr + rows * stride_am
    b_ptrs = b_ptr + rows * stride_bm
    if STRIDE_AN == 1:
        a_ptrs += cols
    if STRIDE_BN == 1:
        b_ptrs += cols
    y_ptrs = y_ptr + rows * stride_ym + cols

    # a mask that may end inside a pack breaks up every pack: so only the
    # tile that needs one has one
    if first_col + BLOCK_N <= N:
        _apply(a_ptrs, b_ptrs, y_ptrs, None, OP)
    else:
        _apply(a_ptrs, b_ptrs, y_ptrs, cols < N, OP)


NUM_WARPS = 4


def _tile(N: int, itemsize: int, arrays: int) -> tuple[int, int]:
    """``BLOCK_M`` and ``BLOCK_N``; short rows together.

    A thread loads 32 bytes: a pack of each of two arrays, or two packs of one.
    """
    elements = 32 * NUM_WARPS * 32 // itemsize // arrays
    BLOCK_N = min(elements, triton.next_power_of_2(N))
    return elements // BLOCK_N, BLOCK_N


def _as_matrices(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """The operands, and ``M, stride_am, stride_bm, N, stride_an, stride_bn``.

    Operands of another layout, with more dimensions or an inner stride beyond
    1, are copied.
    """
    a, b = torch.broadcast_tensors(a, b)
    dims = merge_dims(a.shape, a.stride(), b.stride())
    if len(dims) > 2 or (dims and max(dims[-1][1:]) > 1):
        a, b = a.contiguous(), b.contiguous()
        dims = merge_dims(a.shape, a.stride(), b.stride())
    one = (1, 0, 0)
    outer, inner = [one, one, *dims][-2:]
    return a, b, [*outer, *inner]


def _launch(OP: str, a: Tensor, b: Tensor) -> Tensor:
    a, b, layout = _as_matrices(a, b)
    y = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    if y.numel() == 0:
        return y
    M, stride_am, stride_bm, N, stride_an, stride_bn = layout
    arrays = 1 if OP == "silu" else stride_an + stride_bn
    BLOCK_M, BLOCK_N = _tile(N, a.itemsize, max(1, arrays))
    tiles = triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N)
    with torch.cuda.device_of(a):  # Triton launches on the current GPU
        _elementwise_kernel[(tiles,)](
            a,
            b,
            y,
            stride_am,
            stride_bm,
            0 if M == 1 else N,  # 0 is a multiple of 16, an odd N is not
            M,
            N,
            STRIDE_AN=stride_an,
            STRIDE_BN=stride_bn,
            OP=OP,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            num_warps=NUM_WARPS,
        )
    return y


@torch.library.custom_op("warpmap::multiply", mutates_args=())
def _multiply(a: Tensor, b: Tensor) -> Tensor:
    return _launch("multiply", a, b)


@torch.library.custom_op("warpmap::silu", mutates_args=())
def _silu(x: Tensor) -> Tensor:
    return _launch("silu", x, x)


@torch.library.custom_op("warpmap::silu_backward", mutates_args=())
def _silu_backward(x: Tensor, dy: Tensor) -> Tensor:
    return _launch("silu_backward", x, dy)


def _multiply_gradients(
    ctx: Any, dy: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    # what was repeated collects the gradients of all its copies
    da, db = (
        _multiply(dy, other).sum_to_size(x.shape)
        if ctx.needs_input_grad[i]
        else None
        for i, x, other in ((0, a, b), (1, b, a))
    )
    return da, db


# what torch.compile and autograd must know about the operators
_multiply.register_fake(
    lambda a, b: a.new_empty(torch.broadcast_shapes(a.shape, b.shape))
)
_silu.register_fake(lambda x: x.new_empty(x.shape))
_silu_backward.register_fake(lambda x, dy: x.new_empty(x.shape))
_multiply.register_autograd(
    _multiply_gradients,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
_silu.register_autograd(
    lambda ctx, dy: _silu_backward(*ctx.saved_tensors, dy),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _check(device: str, *tensors: Tensor) -> None:
    for x in tensors:
        if x.dtype not in DTYPES or x.dtype != tensors[0].dtype:
            raise ValueError(
                f"expected one dtype of {DTYPES}, "
                f"got {[t.dtype for t in tensors]}"
            )
        if x.device.type != device or x.device != tensors[0].device:
            raise ValueError(
                f"expected tensors on one {device} device, "
                f"got {[str(t.device) for t in tensors]}"
            )


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Product of two tensors that broadcast, with its gradients.

    Args:
        a: Any shape and strides, float32, float16 or bfloat16, on
            ``warpmap.DEVICE``.
        b: A shape that broadcasts with ``a``'s, the same dtype and device.

    Returns:
        Their common shape, same dtype, contiguous.

    Raises:
        ValueError: If the dtypes or devices differ or are others, or the
            shapes do not broadcast.

    Examples:
        >>> a = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=DEVICE)
        >>> multiply(a, torch.tensor([10.0, 1.0], device=DEVICE)).tolist()
        [[10.0, 2.0], [30.0, 4.0]]
    """
    _check(DEVICE, a, b)
    try:
        torch.broadcast_shapes(a.shape, b.shape)
    except RuntimeError:
        raise ValueError(
            "expected shapes that broadcast, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        ) from None
    y: Tensor = _multiply(a, b)
    return y


def silu(x: Tensor) -> Tensor:
    """``x * sigmoid(x)`` of each element, with its gradient.

    Args:
        x: Any shape and strides, float32, float16 or bfloat16, on
            ``warpmap.DEVICE``.

    Returns:
        The same shape and dtype, contiguous.

    Raises:
        ValueError: If ``x`` has another dtype or is on another device.

    Examples:
        >>> silu(torch.tensor([0.0, 20.0], device=DEVICE)).tolist()
        [0.0, 20.0]
    """
    _check(DEVICE, x)
    y: Tensor = _silu(x)
    return y


# The same in CUDA C++

BLOCK = 256  # threads; 8 blocks fill an SM, and the grid of grid_stride


def _sms(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def _cuda(name: str, *inputs: Tensor, packs: bool = True) -> Tensor:
    """Launch a kernel on inputs whose first is as large as the output."""
    x = inputs[0]
    if packs and any(t.data_ptr() % 16 for t in inputs):
        raise ValueError(
            "expected addresses that 16 divides: call clone() first, "
            "or choose rung='grid_stride'"
        )
    y, n = torch.empty_like(x), x.numel()
    if n == 0:
        return y
    dtype = str(x.dtype).removeprefix("torch.")
    threads = triton.cdiv(n, 16 // x.itemsize) if packs else n
    blocks = triton.cdiv(threads, BLOCK)
    if "grid_stride" in name:
        blocks = min(blocks, 2048 // BLOCK * _sms(x))
    columns = []
    if "row" in name:  # two steps a thread, which divides once for both
        columns, blocks = [inputs[1].numel()], triton.cdiv(blocks, 2)
    launch = cuda_kernel(__file__, f"{name}_{dtype}")
    launch(blocks, BLOCK, *inputs, y, n, *columns)
    return y


def multiply_cuda(a: Tensor, b: Tensor, rung: str = "packed") -> Tensor:
    """Product of two tensors, by one of three kernels in CUDA C++.

    Args:
        a: ``(..., N)``, contiguous, float32, float16 or bfloat16, on a GPU.
        b: The same; or, for packs, one row ``(N,)`` of whole packs.
        rung: "naive", "grid_stride" or "packed", which needs addresses that 16
            divides.

    Returns:
        Shape and dtype of ``a``.

    Raises:
        ValueError: If the tensors or the rung are others.

    Examples:
        >>> multiply_cuda(torch.ones(3), torch.ones(3))
        Traceback (most recent call last):
        ValueError: expected tensors on one cuda device, got ['cpu', 'cpu']
    """
    _check("cuda", a, b)
    if rung not in RUNGS:
        raise ValueError(f"rung must be one of {RUNGS}, got {rung!r}")
    if not a.is_contiguous() or not b.is_contiguous():
        raise ValueError(
            f"expected contiguous tensors, got strides {a.stride()}, "
            f"{b.stride()}"
        )
    if a.shape == b.shape:
        return _cuda(f"multiply_{rung}", a, b, packs=rung == "packed")
    N = b.numel()
    if b.shape != a.shape[-1:] or rung != "packed" or N % (16 // b.itemsize):
        raise ValueError(
            f"expected b like a {tuple(a.shape)}, or for packs one row of "
            f"whole packs, got {tuple(b.shape)}"
        )
    return _cuda("multiply_row", a, b)


def silu_cuda(x: Tensor) -> Tensor:
    """``x * sigmoid(x)`` of each element, in packs, in CUDA C++.

    Args:
        x: Any shape, contiguous, float32, float16 or bfloat16, on a GPU, at an
            address that 16 divides.

    Returns:
        The same shape and dtype.

    Raises:
        ValueError: If ``x`` is another.

    Examples:
        >>> silu_cuda(torch.ones(3))
        Traceback (most recent call last):
        ValueError: expected tensors on one cuda device, got ['cpu']
    """
    _check("cuda", x)
    if not x.is_contiguous():
        raise ValueError(f"expected x contiguous, got strides {x.stride()}")
    return _cuda("silu", x)
