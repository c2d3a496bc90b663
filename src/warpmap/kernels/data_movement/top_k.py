"""The k largest of each row, by the maxima of groups: a row is read once.

The row is cut into groups of neighbours. Of the groups with the k largest
maxima, and of no other, come the k largest elements. So one pass finds maxima,
a small selection finds groups, and another as small finds elements in them.

    traffic  M N elements; the maxima, and k groups of each row once more
    work     N for the maxima, up to 3 sqrt(N k) to select from
    limit    k at most 1024, N k at most 2^25

Ties go to the lowest index, nan counts as largest: what a stable descending
sort would begin with. Short rows, as a router's, are done in one launch.

Reference: Gaihre et al., 2021, https://arxiv.org/abs/2109.08219
"""

import math

import torch
from torch import Tensor

from warpmap import DEVICE
from warpmap.kernels import tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_K = 1024
MAX_PRODUCT = 1 << 25  # N k: then the candidates fit in registers

LOWEST = tl.constexpr(-(1 << 31))  # below the key of every number
LOW_BITS = tl.constexpr((1 << 32) - 1)


@triton.jit
def _key(x):
    """Whole numbers in the order of floats; a key stays what it is."""
    if x.dtype == tl.int32:
        return x
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    # compared as whole numbers: a GPU may take a subnormal float for zero
    size = bits & 0x7FFFFFFF
    bits = tl.where(size == 0, 0, bits)  # -0 is 0
    # of negative floats, larger bits mean smaller numbers
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(size > 0x7F800000, 0x7FFFFFFF, keys)  # nan is the largest


@triton.jit
def _maxima_kernel(
    x_ptr,
    maxima_ptr,
    stride_xm,
    N,
    groups,
    pieces,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // pieces).to(tl.int64)
    piece = tl.program_id(0) % pieces
    group = piece * BLOCK + tl.arange(0, BLOCK)
    cols = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(
        x_ptr + row * stride_xm + cols,
        cols < N,
        other=-float("inf"),
        eviction_policy="evict_first",
    )
    maxima = tl.max(_key(x), axis=1)
    tl.store(maxima_ptr + row * groups + group, maxima, group < groups)


@triton.jit
def _select_kernel(
    x_ptr,
    groups_ptr,
    places_ptr,
    stride_xm,
    N,
    k,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    here = places < N
    if SIZE:  # only the groups listed, which are in the order of their places
        number = places // SIZE
        group = tl.load(groups_ptr + row * k + number, number < k, other=0)
        places = group * SIZE + places % SIZE
        here = (number < k) & (places < N)
    x = tl.load(x_ptr + row * stride_xm + places, here, other=0)
    keys = tl.where(here, _key(x), LOWEST)

    # the largest key that k elements reach, one bit after another
    cut = tl.full([], LOWEST, tl.int32)
    for bit in range(32):
        higher = cut ^ (tl.full([], 1, tl.int32) << (31 - bit))
        reach = tl.sum((keys >= higher).to(tl.int32), axis=0)
        cut = tl.where(reach >= k, higher, cut)

    # all above it, and of those equal to it the first
    above = (keys > cut).to(tl.int32)
    equal = (keys == cut).to(tl.int32)
    missing = k - tl.sum(above, axis=0)
    chosen = (above > 0) | ((equal > 0) & (tl.cumsum(equal, 0) <= missing))
    slots = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(places_ptr + row * k + slots, places, chosen)


@triton.jit
def _order_kernel(
    x_ptr,
    places_ptr,
    values_ptr,
    indices_ptr,
    stride_xm,
    k,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, BLOCK)
    places = tl.load(places_ptr + row * k + slots, slots < k, other=0)
    x = tl.load(x_ptr + row * stride_xm + places, slots < k, other=0)
    keys = tl.where(slots < k, _key(x), LOWEST)
    # 64 bits: a larger key first, and of equal keys the lower place
    words = (keys.to(tl.int64) << 32) | (LOW_BITS - places.to(tl.int64))
    words = tl.sort(words, descending=True)
    indices = LOW_BITS - (words & LOW_BITS)
    _store(x_ptr, values_ptr, indices_ptr, indices, row * stride_xm, row * k, k)


@triton.jit
def _store(x_ptr, values_ptr, indices_ptr, indices, row_x, row_y, k):
    """The first ``k`` of each row, as values and indices."""
    slots = tl.arange(0, indices.shape[-1])
    mask = (slots < k) & (indices >= 0)  # in the shape of the indices
    values = tl.load(x_ptr + row_x + indices, mask)  # the very bits
    tl.store(values_ptr + row_y + slots, values, mask)
    tl.store(indices_ptr + row_y + slots, indices, mask)


@triton.jit
def _short_kernel(
    x_ptr,
    values_ptr,
    indices_ptr,
    stride_xm,
    M,
    N,
    k,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(rows, M - 1)[:, None]  # past the end: the last once more
    places = tl.arange(0, BLOCK_N)[None, :]
    x = tl.load(x_ptr + rows * stride_xm + places, places < N, other=0)
    keys = tl.where(places < N, _key(x), LOWEST)

    # the largest, its first place, and then without it once more
    slots = tl.arange(0, K)[None, :]
    best = tl.zeros([BLOCK_M, K], tl.int32)
    for slot in range(k):
        largest = tl.max(keys, axis=1, keep_dims=True)
        place = tl.where(keys == largest, places, 0x7FFFFFFF)
        place = tl.min(place, axis=1, keep_dims=True)
        best = tl.where(slots == slot, place, best)
        keys = tl.where(places == place, LOWEST, keys)
    _store(x_ptr, values_ptr, indices_ptr, best, rows * stride_xm, rows * k, k)


# rows so short are done by one launch of `_short_kernel`
SHORT_COLS, SHORT_K = 1024, 16


def _group_size(N: int, k: int) -> int:
    """Elements a group: the largest power of 2 up to the root of ``N / k``."""
    return 1 << int(math.log2(N / k) / 2)


def _maxima_tile(SIZE: int) -> tuple[int, int]:
    """Groups a program, and warps: 32 elements a thread, 16 KiB of float32."""
    return max(1, 4096 // SIZE), 4


def _select_tile(candidates: int) -> tuple[int, int]:
    """``BLOCK`` and warps to choose from so many candidates."""
    BLOCK = max(32, triton.next_power_of_2(candidates))
    return BLOCK, min(32, max(1, BLOCK // 256))


def _short_tile(N: int) -> tuple[int, int, int]:
    """``BLOCK_M``, ``BLOCK_N`` and warps: 32 elements a thread at most."""
    # one warp, so that no round of `_short_kernel` waits for another
    BLOCK_N = triton.next_power_of_2(N)
    return min(16, 1024 // BLOCK_N), BLOCK_N, 1


@torch.library.custom_op("warpmap::top_k", mutates_args=())
def _top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    M, N = x.shape
    values = x.new_empty(M, k)
    indices = x.new_empty(M, k, dtype=torch.int64)
    if values.numel() == 0:
        return values, indices
    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        if N <= SHORT_COLS and k <= SHORT_K:
            _short(x, values, indices)
        else:
            _long(x, values, indices)
    return values, indices


def _short(x: Tensor, values: Tensor, indices: Tensor) -> None:
    (M, N), k = x.shape, values.shape[1]
    BLOCK_M, BLOCK_N, num_warps = _short_tile(N)
    _short_kernel[(triton.cdiv(M, BLOCK_M),)](
        x,
        values,
        indices,
        x.stride(0),
        M,
        N,
        k,
        K=triton.next_power_of_2(k),
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        num_warps=num_warps,
    )


def _long(x: Tensor, values: Tensor, indices: Tensor) -> None:
    (M, N), k = x.shape, values.shape[1]
    SIZE = _group_size(N, k)
    count = triton.cdiv(N, SIZE)
    maxima = x.new_empty(M, count, dtype=torch.int32)
    groups, places = x.new_empty(2, M, k, dtype=torch.int32)

    # a row is shared by many programs: of a few hundred rows alone not every
    # multiprocessor would have enough to load
    BLOCK, num_warps = _maxima_tile(SIZE)
    pieces = triton.cdiv(count, BLOCK)
    _maxima_kernel[(M * pieces,)](
        x,
        maxima,
        x.stride(0),
        N,
        count,
        pieces,
        SIZE=SIZE,
        BLOCK=BLOCK,
        num_warps=num_warps,
    )
    _select(maxima, groups, groups, count, SIZE=0)
    _select(x, groups, places, k * SIZE, SIZE=SIZE)
    BLOCK = triton.next_power_of_2(k)
    _order_kernel[(M,)](
        x,
        places,
        values,
        indices,
        x.stride(0),
        k,
        BLOCK=BLOCK,
        num_warps=max(1, BLOCK // 128),
    )


def _select(
    x: Tensor, groups: Tensor, places: Tensor, candidates: int, SIZE: int
) -> None:
    (M, N), k = x.shape, places.shape[1]
    BLOCK, num_warps = _select_tile(candidates)
    _select_kernel[(M,)](
        x,
        groups,
        places,
        x.stride(0),
        N,
        k,
        SIZE=SIZE,
        BLOCK=BLOCK,
        num_warps=num_warps,
    )


def _keep_indices(ctx, inputs, output):
    ctx.shape = inputs[0].shape
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dvalues, _):
    dx = dvalues.new_zeros(ctx.shape)
    return dx.scatter(1, ctx.saved_tensors[0], dvalues), None


# what torch.compile and autograd must know about the operator
_top_k.register_fake(
    lambda x, k: (
        x.new_empty(x.shape[0], k),
        x.new_empty(x.shape[0], k, dtype=torch.int64),
    )
)
_top_k.register_autograd(_backward, setup_context=_keep_indices)


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The largest elements of each row, in order, with their gradient.

    Of equal elements the first comes first; -0 and 0 are equal, and ``nan`` is
    larger than any number.

    Args:
        x: ``(M, N)``, float32, float16 or bfloat16, on ``warpmap.DEVICE``.
            Each row is contiguous, rows may lie apart.
        k: How many, 1 to ``N`` and at most ``MAX_K``.

    Returns:
        Values, ``(M, k)``, same dtype, and indices, ``(M, k)``, int64.

    Raises:
        ValueError: If ``x`` has another shape, dtype, layout or device, or if
            ``k``, or ``N`` times ``k``, is out of range.

    Examples:
        >>> x = torch.tensor([[2.0, 7.0, 1.0, 7.0, 5.0]], device=DEVICE)
        >>> [t.tolist() for t in top_k(x, 3)]
        [[[7.0, 7.0, 5.0]], [[1, 3, 4]]]
    """
    if x.ndim != 2 or (x.numel() and x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(
            f"expected contiguous rows (M, N), got {tuple(x.shape)} "
            f"with strides {x.stride()}"
        )
    if x.dtype not in DTYPES:
        raise ValueError(f"expected one of {DTYPES}, got {x.dtype}")
    if x.device.type != DEVICE:
        raise ValueError(f"expected a tensor on {DEVICE}, got {x.device}")
    N = x.shape[1]
    if not 1 <= k <= min(N, MAX_K):
        raise ValueError(f"k must be from 1 to {min(N, MAX_K)}, got {k}")
    if N * k > MAX_PRODUCT:
        raise ValueError(f"N k must be at most {MAX_PRODUCT}, got {N} x {k}")
    values, indices = _top_k(x, k)
    return values, indices
