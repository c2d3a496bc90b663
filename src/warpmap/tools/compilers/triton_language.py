"""Three kernels in Triton: a sum, a row's maximum, a matrix product.

A program works on a block of elements. It computes the block's addresses,
loads it under a mask, and stores its result; how threads share the block out
is the compiler's business.

    add      1 block of x, 1 of y; one mask, for the end
    row_max  1 block of rows, whole; the padding must not win
    matmul   1 block of the result; walks along K, two blocks a step

Reference: Tillet, Kung and Cox, 2019, https://doi.org/10.1145/3315508.3329973
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
from torch import Tensor

from warpmap import DEVICE
from warpmap.kernels import tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_COLS = 1 << 15  # of a row that row_max holds in registers


@triton.jit
def _add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    # 64-bit: the last index of a large array does not fit in 32
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = first + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask)
    y = tl.load(y_ptr + offsets, mask)
    # float32 in between: the interpreter cannot add bfloat16
    out = x.to(tl.float32) + y.to(tl.float32)
    tl.store(out_ptr + offsets, out, mask)


@triton.jit
def _row_max_kernel(
    x_ptr,
    out_ptr,
    stride_xm,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    # a column of rows and a row of columns make a matrix of addresses
    x_ptrs = x_ptr + rows[:, None] * stride_xm + cols[None, :]
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    # what a mask leaves out is -inf here: no maximum is smaller
    x = tl.load(x_ptrs, mask, other=-float("inf")).to(tl.float32)
    tl.store(out_ptr + rows, tl.max(x, axis=1), rows < M)


@triton.jit
def _matmul_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    stride_am,
    stride_bk,
    stride_cm,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    a_ptrs = a_ptr + rows[:, None] * stride_am + k[None, :]
    b_ptrs = b_ptr + k[:, None] * stride_bk + cols[None, :]

    # 64 bits again: this step too can pass 2^31, where b is very wide
    b_step = tl.cast(stride_bk, tl.int64) * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        # zeros beyond the end of K add nothing to the sum
        inside = k < K - first
        a_mask = (rows < M)[:, None] & inside[None, :]
        b_mask = inside[:, None] & (cols < N)[None, :]
        a = tl.load(a_ptrs, a_mask, other=0.0)
        b = tl.load(b_ptrs, b_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_ptrs += BLOCK_K
        b_ptrs += b_step

    c_ptrs = c_ptr + rows[:, None] * stride_cm + cols[None, :]
    tl.store(c_ptrs, acc, (rows < M)[:, None] & (cols < N)[None, :])


def _check(dtypes: tuple[torch.dtype, ...], *tensors: Tensor) -> None:
    for x in tensors:
        if x.dtype not in dtypes or x.dtype != tensors[0].dtype:
            raise ValueError(
                f"expected one dtype of {dtypes}, "
                f"got {[t.dtype for t in tensors]}"
            )
        if x.device.type != DEVICE or x.device != tensors[0].device:
            raise ValueError(
                f"expected tensors on one {DEVICE} device, "
                f"got {[str(t.device) for t in tensors]}"
            )


def _check_rows(**matrices: Tensor) -> None:
    for name, x in matrices.items():
        if x.ndim != 2 or (x.stride(1) != 1 and x.shape[1] > 1):
            raise ValueError(
                f"{name} must be a matrix with contiguous rows, "
                f"got shape {tuple(x.shape)}, strides {x.stride()}"
            )


def add(x: Tensor, y: Tensor) -> Tensor:
    """Sum of two tensors, element by element.

    Args:
        x: Any shape, contiguous, float32, float16 or bfloat16, on
            ``warpmap.DEVICE``.
        y: The same.

    Returns:
        The same.

    Raises:
        ValueError: If they differ, or are others.

    Examples:
        >>> x = torch.tensor([1.0, 2.0], device=DEVICE)
        >>> add(x, x).tolist()
        [2.0, 4.0]
    """
    _check(DTYPES, x, y)
    if x.shape != y.shape or not (x.is_contiguous() and y.is_contiguous()):
        raise ValueError(
            f"expected x and y contiguous and of one shape, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}, "
            f"strides {x.stride()} and {y.stride()}"
        )
    out, n = torch.empty_like(x), x.numel()
    if n:
        BLOCK = 1024
        with torch.cuda.device_of(x):  # Triton launches on the current GPU
            _add_kernel[(triton.cdiv(n, BLOCK),)](x, y, out, n, BLOCK=BLOCK)
    return out


def _row_tile(N: int) -> tuple[int, int, int]:
    """``BLOCK_M``, ``BLOCK_N`` and warps; short rows share a program."""
    BLOCK_N = triton.next_power_of_2(N)
    return max(1, 2048 // BLOCK_N), BLOCK_N, max(4, min(16, BLOCK_N // 1024))


def row_max(x: Tensor) -> Tensor:
    """Largest element of each row.

    Args:
        x: ``(M, N)``, ``N`` from 1 to ``MAX_COLS``, float32, float16 or
            bfloat16, on ``warpmap.DEVICE``. Each row is contiguous, rows may
            lie apart. No element is ``nan``.

    Returns:
        ``(M,)``, same dtype.

    Raises:
        ValueError: If ``x`` has another shape, dtype, layout or device.

    Examples:
        >>> x = torch.tensor([[1.0, 3.0], [-5.0, -4.0]], device=DEVICE)
        >>> row_max(x).tolist()
        [3.0, -4.0]
    """
    _check(DTYPES, x)
    _check_rows(x=x)
    M, N = x.shape
    if not 1 <= N <= MAX_COLS:
        raise ValueError(f"x must have 1 to {MAX_COLS} columns, got {N}")
    out = x.new_empty(M)
    if M:
        BLOCK_M, BLOCK_N, num_warps = _row_tile(N)
        with torch.cuda.device_of(x):
            _row_max_kernel[(triton.cdiv(M, BLOCK_M),)](
                x,
                out,
                x.stride(0),
                M,
                N,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                num_warps=num_warps,
            )
    return out


def _is_even(a: Tensor, b: Tensor) -> bool:
    """Whether 16 divides all that the addresses and ends of blocks hang on."""
    numbers = (x for t in (a, b) for x in (t.data_ptr(), *t.stride()[:1]))
    return not any(n % 16 for n in (*numbers, *b.shape))


def _tile(dtype: torch.dtype, even: bool) -> dict[str, int]:
    """Blocks of a product, its warps, and its stages."""
    if dtype == torch.float32:
        BLOCK_M, BLOCK_N, BLOCK_K, num_warps = 64, 64, 32, 4
    else:
        # narrow loads go through registers, which 64 columns would overflow
        BLOCK_M, BLOCK_N, BLOCK_K, num_warps = 128, 256, 64 if even else 32, 8
    return {
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": BLOCK_K,
        "num_warps": num_warps,
        "num_stages": 3,
    }


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Product of two matrices, summed in float32.

    Args:
        a: ``(M, K)``, float32 or float16, on ``warpmap.DEVICE``. Each row is
            contiguous, rows may lie apart.
        b: ``(K, N)``, the same.

    Returns:
        ``(M, N)``, same dtype, contiguous.

    Raises:
        ValueError: If a shape, dtype, layout or device is another.

    Examples:
        >>> a = torch.tensor([[1.0, 2.0]], device=DEVICE)
        >>> matmul(a, torch.tensor([[3.0], [4.0]], device=DEVICE)).tolist()
        [[11.0]]
    """
    _check((torch.float32, torch.float16), a, b)
    _check_rows(a=a, b=b)
    (M, K), (rows, N) = a.shape, b.shape
    if rows != K:
        raise ValueError(f"a has {K} columns, but b has {rows} rows")
    c = a.new_empty(M, N)
    if c.numel():
        tile = _tile(a.dtype, _is_even(a, b))
        grid = (
            triton.cdiv(M, tile["BLOCK_M"]),
            triton.cdiv(N, tile["BLOCK_N"]),
        )
        with torch.cuda.device_of(a):
            _matmul_kernel[grid](
                a,
                b,
                c,
                a.stride(0),
                b.stride(0),
                c.stride(0),
                M,
                N,
                K,
                PRECISION="ieee",  # the default, tf32, rounds float32 inputs
                **tile,
            )
    return c
