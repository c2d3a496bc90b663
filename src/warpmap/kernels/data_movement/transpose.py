"""Transpose: rows of the input become columns, at the speed of a copy.

A warp that reads a row has to write a column, and a column costs a sector of
32 bytes for each element. So a tile is read by rows, turned on the chip, and
written by rows of the output.

    traffic  2 M N elements
    tiles    128 x 128 for 2-byte elements; thin matrices have long tiles

In CUDA C++ beside this module stands the ladder: naive, through shared memory,
with padding, with a swizzle.

Reference: Ruetsch and Micikevicius, 2009, Optimizing Matrix Transpose in CUDA
"""

import torch
from torch import Tensor

from warpmap import DEVICE
from warpmap.kernels import tl, triton
from warpmap.kernels.cuda import cuda_kernel

# a transpose moves bits and never looks at them
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

RUNGS = ("naive", "tiled", "padded", "swizzled")
_CUDA = {rung: cuda_kernel(__file__, f"transpose_{rung}") for rung in RUNGS}

MAX_SHORT = 15  # longest short side of a thin matrix


@triton.jit
def _transpose_kernel(
    x_ptr,
    y_ptr,
    stride_xb,
    stride_xm,
    stride_xn,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles = tiles_m * tl.cdiv(N, BLOCK_N)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    # along M first: programs that run together store to places that touch
    m = tile % tiles_m * BLOCK_M
    n = tile // tiles_m * BLOCK_N

    # 64-bit: a tile may reach over 2**31 elements
    x_ptr += batch * stride_xb
    x_ptr += m.to(tl.int64) * stride_xm + n.to(tl.int64) * stride_xn
    y_ptr += (batch * N + n) * M + m

    rows = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < M - m) & (cols < N - n)
    x_offsets = rows.to(tl.int64) * stride_xm + cols.to(tl.int64) * stride_xn
    x = tl.load(x_ptr + x_offsets, mask)
    # neighbours are now those along the rows: Triton moves the elements to
    # other threads, through swizzled shared memory
    tl.store(y_ptr + cols.to(tl.int64) * M + rows, x, mask)


@triton.jit
def _thin_kernel(
    x_ptr,
    y_ptr,
    L,
    TALL: tl.constexpr,
    SHORT: tl.constexpr,
    SHORT_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # a tile is as wide as the matrix: on the tall side it is one piece of
    # memory, on the wide side SHORT rows of BLOCK elements
    tiles = tl.cdiv(L, BLOCK)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK
    x_ptr += batch * L * SHORT
    y_ptr += batch * L * SHORT

    short = tl.arange(0, SHORT_BLOCK)[:, None]
    long = tl.arange(0, BLOCK)[None, :]
    rows = short.to(tl.int64) * L + first + long
    rows_mask = (short < SHORT) & (long < L - first)

    at = tl.arange(0, SHORT_BLOCK * BLOCK)
    piece = first * SHORT + at
    piece_mask = (at < SHORT * BLOCK) & (at < (L - first) * SHORT)

    # where in the loaded tile each element of the stored one stands
    if TALL:
        x = tl.load(x_ptr + piece, piece_mask)
        source = tl.minimum(long * SHORT + short, SHORT * BLOCK - 1)
        y = tl.gather(x, source.reshape(SHORT_BLOCK * BLOCK), axis=0)
        tl.store(y_ptr + rows, y.reshape(SHORT_BLOCK, BLOCK), rows_mask)
    else:
        x = tl.load(x_ptr + rows, rows_mask)
        source = at % SHORT * BLOCK + tl.minimum(at // SHORT, BLOCK - 1)
        y = tl.gather(x.reshape(SHORT_BLOCK * BLOCK), source, axis=0)
        tl.store(y_ptr + piece, y, piece_mask)


# by bytes of an element: rows, columns, warps
TILES = {1: (128, 128, 16), 2: (128, 64, 8), 4: (256, 32, 4), 8: (32, 32, 1)}
WIDE_TILES = TILES | {2: (128, 128, 8), 4: (64, 64, 4)}


def _tile(M: int, N: int, size: int) -> tuple[int, int, int]:
    """``BLOCK_M``, ``BLOCK_N`` and warps, for elements of ``size`` bytes."""
    # Triton makes accesses of 16 bytes where 16 divides the sides
    wide = M % 16 == N % 16 == 0 and min(M, N) >= 128
    BLOCK_M, BLOCK_N, warps = (WIDE_TILES if wide else TILES)[size]
    # a side that is short makes the other longer
    area = BLOCK_M * BLOCK_N
    BLOCK_M = min(BLOCK_M, triton.next_power_of_2(M))
    BLOCK_N = min(area // BLOCK_M, triton.next_power_of_2(N))
    BLOCK_M = min(area // BLOCK_N, triton.next_power_of_2(M))
    return BLOCK_M, BLOCK_N, max(1, warps * BLOCK_M * BLOCK_N // area)


def _thin_tile(L: int, SHORT: int, size: int) -> tuple[int, int, int]:
    """``SHORT_BLOCK``, ``BLOCK`` and warps: 64 bytes for each thread."""
    SHORT_BLOCK = triton.next_power_of_2(SHORT)
    BLOCK = min(4096 // (SHORT_BLOCK * size), triton.next_power_of_2(L))
    return SHORT_BLOCK, BLOCK, 2


def _is_thin(x: Tensor) -> bool:
    """Whether rows are few or short, and do not fill accesses of 16 bytes."""
    short = min(x.shape[-2:])
    ragged = short * x.element_size() % 16 != 0
    return 2 <= short <= MAX_SHORT and ragged and x.is_contiguous()


@torch.library.custom_op("warpmap::transpose", mutates_args=())
def _transpose(x: Tensor) -> Tensor:
    M, N = x.shape[-2:]
    y = x.new_empty(*x.shape[:-2], N, M)
    if y.numel() == 0:
        return y
    batches, size = x.numel() // (M * N), x.element_size()
    x_bits, y_bits = x.view(BITS[size]), y.view(BITS[size])
    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        if _is_thin(x):
            L, SHORT = max(M, N), min(M, N)
            SHORT_BLOCK, BLOCK, num_warps = _thin_tile(L, SHORT, size)
            _thin_kernel[(batches * triton.cdiv(L, BLOCK),)](
                x_bits,
                y_bits,
                L,
                TALL=M > N,
                SHORT=SHORT,
                SHORT_BLOCK=SHORT_BLOCK,
                BLOCK=BLOCK,
                num_warps=num_warps,
            )
            return y
        BLOCK_M, BLOCK_N, num_warps = _tile(M, N, size)
        tiles = triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N)
        _transpose_kernel[(batches * tiles,)](
            x_bits,
            y_bits,
            x.stride(0) if x.ndim == 3 else 0,
            x.stride(-2),
            x.stride(-1),
            M,
            N,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            num_warps=num_warps,
        )
    return y


# what torch.compile and autograd must know about the operator
_transpose.register_fake(
    lambda x: x.new_empty(*x.shape[:-2], x.shape[-1], x.shape[-2])
)
_transpose.register_autograd(lambda ctx, dy: _transpose(dy))


def transpose(x: Tensor) -> Tensor:
    """The transposed matrix, or each matrix of a batch, as a new tensor.

    Bit for bit ``x.mT.contiguous()``, with its gradient: the transpose of the
    gradient.

    Args:
        x: ``(M, N)`` or ``(B, M, N)``, elements of 1, 2, 4 or 8 bytes, any
            strides, on ``warpmap.DEVICE``.

    Returns:
        ``(N, M)`` or ``(B, N, M)``, same dtype, contiguous.

    Raises:
        ValueError: If ``x`` has another shape, dtype or device.

    Examples:
        >>> transpose(torch.tensor([[1, 2, 3]], device=DEVICE)).tolist()
        [[1], [2], [3]]
    """
    if x.ndim not in (2, 3):
        raise ValueError(
            f"expected (M, N) or (B, M, N), got {tuple(x.shape)}: other "
            "leading dimensions can be flattened into one"
        )
    if x.element_size() not in BITS:
        raise ValueError(f"expected elements of {[*BITS]} bytes, got {x.dtype}")
    if x.device.type != DEVICE:
        raise ValueError(f"expected a tensor on {DEVICE}, got {x.device}")
    y: Tensor = _transpose(x)
    return y


def transpose_cuda(x: Tensor, rung: str = "swizzled") -> Tensor:
    """The transposed matrix by one rung of the ladder in CUDA C++.

    Args:
        x: ``(M, N)``, contiguous, elements of 4 bytes, on a GPU, with at most
            2,097,120 rows.
        rung: ``"naive"``, ``"tiled"``, ``"padded"`` or ``"swizzled"``.

    Returns:
        ``(N, M)``, same dtype, contiguous.

    Raises:
        ValueError: If ``rung`` is unknown, or ``x`` has another shape, layout,
            dtype or device.

    Examples:
        >>> transpose_cuda(torch.zeros(2, 3), rung="top")
        Traceback (most recent call last):
        ValueError: rung must be one of ('naive', 'tiled', ...), got 'top'
    """
    if rung not in RUNGS:
        raise ValueError(f"rung must be one of {RUNGS}, got {rung!r}")
    if x.ndim != 2 or not x.is_contiguous() or x.shape[0] > 65535 * 32:
        raise ValueError(
            "expected a contiguous matrix of at most 2097120 rows, got "
            f"{tuple(x.shape)} with strides {x.stride()}"
        )
    if x.element_size() != 4 or x.device.type != "cuda":
        raise ValueError(
            f"expected 4-byte elements on a GPU, got {x.dtype} on {x.device}"
        )
    M, N = x.shape
    y = x.new_empty(N, M)
    if y.numel():
        grid = (triton.cdiv(N, 32), triton.cdiv(M, 32))
        _CUDA[rung](grid, (32, 8), x, y, M, N)
    return y
