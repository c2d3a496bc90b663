"""LayerNorm with a variance that survives a large mean.

Each row loses its mean and is divided by its standard deviation; then every
column has a weight and a bias. The row stays on chip, so the mean is known
before the squared distances from it are added up: two passes over the row,
one trip to memory. Where registers have no room for it, the L1 cache has.

    traffic  2 M N elements forward, 3 M N backward
    limit    rows of at most MAX_COLS

References: Ba, Kiros and Hinton, 2016, https://arxiv.org/abs/1607.06450
    Welford, 1962, https://doi.org/10.1080/00401706.1962.10490022
"""

import torch
from torch import Tensor

from warpmap.kernels import tl, triton
from warpmap.kernels.normalization._rows import (
    check_rows,
    column_sums,
    load,
    programs_at_once,
)

# columns of which backward keeps a row in registers, beside their sums; of
# a longer row both passes read chunks
IN_REGISTERS = 8192


def layernorm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> Tensor:
    """LayerNorm of each row, one step at a time, in float32.

    Args:
        x: ``(M, N)``.
        weight: ``(N,)``.
        bias: ``(N,)``.
        eps: Added to the variance.

    Returns:
        ``(M, N)``, same dtype as ``x``.

    Examples:
        >>> x, one = torch.tensor([[1.0, 3.0]]), torch.ones(2)
        >>> layernorm_reference(x, one, 10 * one, eps=0.0).tolist()
        [[9.0, 11.0]]
    """
    wide = x.float()
    centred = wide - wide.mean(dim=1, keepdim=True)
    variance = centred.square().mean(dim=1, keepdim=True)
    normal = centred * torch.rsqrt(variance + eps)
    return (normal * weight.float() + bias.float()).to(x.dtype)


def naive_variance(x: Tensor) -> Tensor:
    """Mean of the squares less the square of the mean: what not to do.

    Args:
        x: ``(M, N)``, float32.

    Returns:
        ``(M,)``; where the mean is large it is noise, even below zero.

    Examples:
        >>> naive_variance(torch.tensor([[1.0, 3.0]])).tolist()
        [1.0]
        >>> naive_variance(torch.tensor([[5001.0, 5003.0]])).tolist()
        [0.0]
    """
    return x.square().mean(dim=1) - x.mean(dim=1).square()


def welford_variance(x: Tensor) -> Tensor:
    """Variance of each row in one pass that does not cancel.

    Args:
        x: ``(M, N)``, float32; read from left to right, each element once.

    Returns:
        ``(M,)``.

    Examples:
        >>> welford_variance(torch.tensor([[5001.0, 5003.0]])).tolist()
        [1.0]
    """
    mean = torch.zeros_like(x[:, 0])
    squares = torch.zeros_like(mean)  # of the distances from the mean
    for n, column in enumerate(x.unbind(dim=1), start=1):
        before = column - mean
        mean = mean + before / n
        squares = squares + before * (column - mean)
    return squares / x.shape[1]


@triton.jit
def _layernorm_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    stride_xm,
    M,
    eps,
    N: tl.constexpr,  # fixed by the model: no masks where it fills the tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    # 64-bit: row * stride overflows 32 bits on a large matrix
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)[:, None]
    rows = tl.minimum(rows, M - 1)  # past the end: the last row once more
    cols = tl.arange(0, BLOCK_N)[None, :]
    x_ptrs = x_ptr + rows * stride_xm + cols

    total = 0.0
    for i in tl.static_range(CHUNKS):
        at = i * BLOCK_N
        x = load(x_ptrs + at, cols + at < N, "evict_last")
        # nothing is added to the only chunk of a short row
        total = x if i == 0 else total + x
    mean = tl.sum(total, axis=1, keep_dims=True) / N

    for i in tl.static_range(CHUNKS):
        at = i * BLOCK_N
        mask = cols + at < N
        # one chunk is still in registers; more are in the L1 cache
        if CHUNKS > 1:
            x = load(x_ptrs + at, mask, "")
        centred = tl.where(mask, x - mean, 0.0)  # padding would count as -mean
        squares = centred * centred
        total = squares if i == 0 else total + squares
    variance = tl.sum(total, axis=1, keep_dims=True) / N
    rstd = tl.rsqrt(variance + eps)
    tl.store(mean_ptr + rows, mean)
    tl.store(rstd_ptr + rows, rstd)

    # again, now from the L1 cache: not kept in registers, a row leaves them
    # to more rows at a time
    for i in tl.static_range(CHUNKS):
        at = i * BLOCK_N
        mask = cols + at < N
        normal = (load(x_ptrs + at, mask, "evict_first") - mean) * rstd
        weight = load(weight_ptr + cols + at, mask, "")
        bias = load(bias_ptr + cols + at, mask, "")
        tl.store(y_ptr + rows * N + cols + at, normal * weight + bias, mask)


@triton.jit
def _layernorm_bwd_kernel(
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dy_ptr,
    dx_ptr,
    sums_ptr,
    stride_xm,
    M,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    walker = tl.program_id(1)
    cols = tl.arange(0, BLOCK_N)[None, :]
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    step = tl.num_programs(1) * BLOCK_M
    # pipelined: the next rows are on their way to shared memory meanwhile
    for first in tl.range(walker * BLOCK_M, M, step, num_stages=STAGES):
        rows = (first + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
        live = rows < M
        mean = tl.load(mean_ptr + rows, live, other=0.0)
        rstd = tl.load(rstd_ptr + rows, live, other=0.0)
        mask = live & (cols < N)
        x = load(x_ptr + rows * stride_xm + cols, mask, "")
        dy = load(dy_ptr + rows * N + cols, mask, "")

        normal = (x - mean) * rstd
        g = dy * load(weight_ptr + cols, cols < N, "evict_last")
        mean_g = tl.sum(g, axis=1, keep_dims=True) / N
        mean_xg = tl.sum(normal * g, axis=1, keep_dims=True) / N
        dweight += dy * normal
        dbias += dy
        dx = (g - mean_g - normal * mean_xg) * rstd
        tl.store(dx_ptr + rows * N + cols, dx, mask)

    sums_ptrs = sums_ptr + walker * 2 * N + cols
    tl.store(sums_ptrs, tl.sum(dweight, axis=0, keep_dims=True), cols < N)
    tl.store(sums_ptrs + N, tl.sum(dbias, axis=0, keep_dims=True), cols < N)


@triton.jit
def _layernorm_bwd_long_kernel(
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dy_ptr,
    dx_ptr,
    sums_ptr,
    stride_xm,
    M,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    # a row that is too long for one program belongs to SPLIT: each reads all
    # of it, for the means, and owns CHUNKS of its chunks
    part = tl.program_id(0)
    walker = tl.program_id(1)
    lane = tl.arange(0, BLOCK_N)
    own = part * CHUNKS * BLOCK_N + lane
    # the sums of each chunk: all that stays in registers from row to row
    dweight = (tl.zeros((BLOCK_N,), tl.float32),) * CHUNKS
    dbias = dweight

    # not pipelined: what shared memory takes, the L1 cache loses
    for row in tl.range(walker, M, tl.num_programs(1), num_stages=1):
        x_row = x_ptr + tl.cast(row, tl.int64) * stride_xm
        offset = tl.cast(row, tl.int64) * N
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)

        sum_g = tl.zeros((BLOCK_N,), tl.float32)
        sum_xg = tl.zeros((BLOCK_N,), tl.float32)
        for i in tl.range(CHUNKS, (1 + SPLIT) * CHUNKS, num_stages=1):
            # first the means, its own part last: that one stays near
            cols = (part * CHUNKS + i) % (SPLIT * CHUNKS) * BLOCK_N + lane
            mask = cols < N
            g = load(dy_ptr + offset + cols, mask, "evict_last")
            g *= load(weight_ptr + cols, mask, "evict_last")
            sum_g += g
            x = load(x_row + cols, mask, "evict_last")
            sum_xg += g * (x - mean)
        mean_g = tl.sum(sum_g) / N
        mean_xg = tl.sum(sum_xg) * rstd / N

        # then its own part again, now from the L1 cache
        for i in tl.static_range(CHUNKS):
            cols = own + i * BLOCK_N
            sum_w = dweight[0]
            sum_b = dbias[0]
            # a branch: the loads of all chunks at once would spill
            if (part * CHUNKS + i) * BLOCK_N < N:
                mask = cols < N
                x = load(x_row + cols, mask, "evict_first")
                dy = load(dy_ptr + offset + cols, mask, "evict_first")
                normal = (x - mean) * rstd
                sum_w += dy * normal
                sum_b += dy
                g = dy * load(weight_ptr + cols, mask, "evict_last")
                dx = (g - mean_g - normal * mean_xg) * rstd
                tl.store(dx_ptr + offset + cols, dx, mask)
            # to the end: after CHUNKS turns all sums are in place
            dweight += (sum_w,)
            dbias += (sum_b,)
            dweight, dbias = dweight[1:], dbias[1:]

    for i in tl.static_range(CHUNKS):
        cols = own + i * BLOCK_N
        sums_ptrs = sums_ptr + walker * 2 * N + cols
        tl.store(sums_ptrs, dweight[i], cols < N)
        tl.store(sums_ptrs + N, dbias[i], cols < N)


def _fwd_tile(N: int) -> dict[str, int]:
    """Launch parameters of the forward kernel for rows of ``N`` elements."""
    if N <= 4096:
        BLOCK_N = triton.next_power_of_2(N)
        # several short rows a program, so that its threads have enough to load
        BLOCK_M = max(1, 1024 // BLOCK_N)
        num_warps = max(1, BLOCK_N // (512 if N <= 2048 else 1024))
    else:
        # the power of two below: the one above would leave threads without
        # work. Of long rows fewer at a time, for the L1 cache to hold them
        BLOCK_N = min(IN_REGISTERS, 1 << (N.bit_length() - 1))
        BLOCK_M = 1
        num_warps = 8 if N <= 12288 else 16 if N <= 20480 else 32
    return {
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": BLOCK_N,
        "CHUNKS": triton.cdiv(N, BLOCK_N),
        "num_warps": num_warps,
    }


def _bwd_tile(
    N: int, itemsize: int, weight_itemsize: int
) -> tuple[dict[str, int], int]:
    """The same for backward, and how many programs a multiprocessor holds."""
    if N > IN_REGISTERS:
        # 16 warps: 128 registers a thread, at most half of them sums
        SPLIT = 1 if N * itemsize <= 32 * 1024 else 2
        CHUNKS = triton.cdiv(N, SPLIT * 4096)
        tile = {"BLOCK_N": 4096, "CHUNKS": CHUNKS, "SPLIT": SPLIT}
        return tile | {"num_warps": 16}, 1
    # what registers hold of a row: both sums, itself and its gradient
    BLOCK_N = triton.next_power_of_2(N)
    if N > 2048 and N > BLOCK_N * 3 // 4:
        # all threads have work: 16 elements each
        BLOCK_M, num_warps, per_sm = 8192 // BLOCK_N, 16, 1
    else:
        # 32 elements each; 8 warps together may have 255 registers each
        BLOCK_M = max(1, 4096 // BLOCK_N)
        num_warps = BLOCK_M * BLOCK_N // 1024
        per_sm = 8 // num_warps
    # three steps ahead of long rows, if shared memory holds what they load
    step = (2 * BLOCK_M * itemsize + weight_itemsize) * BLOCK_N
    STAGES = 4 if N > 2048 and 3 * step * per_sm <= 220 * 1024 else 3
    tile = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "STAGES": STAGES}
    return tile | {"num_warps": num_warps}, per_sm


@torch.library.custom_op("warpmap::layernorm", mutates_args=())
def _layernorm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    M, N = x.shape
    y = x.new_empty(M, N)
    mean = x.new_empty(M, 1, dtype=torch.float32)
    rstd = x.new_empty(M, 1, dtype=torch.float32)
    if x.numel() == 0:
        return y, mean, rstd
    tile = _fwd_tile(N)
    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        _layernorm_fwd_kernel[(triton.cdiv(M, tile["BLOCK_M"]),)](
            x, weight, bias, y, mean, rstd, x.stride(0), M, eps, N=N, **tile
        )
    return y, mean, rstd


@torch.library.custom_op("warpmap::layernorm_backward", mutates_args=())
def _layernorm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """The second result holds both sums, ``(2, N)``."""
    M, N = x.shape
    dx = x.new_empty(M, N)
    if dx.numel() == 0:
        return dx, weight.new_zeros(2, N)
    tile, per_sm = _bwd_tile(N, x.itemsize, weight.itemsize)
    parts = tile.get("SPLIT", 1)
    walkers = max(1, programs_at_once(x, per_sm) // parts)
    walkers = min(walkers, triton.cdiv(M, tile.get("BLOCK_M", 1)))
    sums = x.new_empty(walkers, 2 * N, dtype=torch.float32)
    given = x, weight, mean, rstd, dy, dx, sums, x.stride(0), M
    long = N > IN_REGISTERS
    kernel = _layernorm_bwd_long_kernel if long else _layernorm_bwd_kernel
    with torch.cuda.device_of(x):
        kernel[(parts, walkers)](*given, N=N, **tile)
        return dx, column_sums(sums, weight.dtype).view(2, N)


# what torch.compile and autograd must know about the two operators
@_layernorm.register_fake
def _(x, weight, bias, eps):
    one_a_row = x.new_empty(x.shape[0], 1, dtype=torch.float32)
    return x.new_empty(x.shape), one_a_row, torch.empty_like(one_a_row)


@_layernorm_backward.register_fake
def _(dy, x, weight, mean, rstd):
    return x.new_empty(x.shape), weight.new_empty(2, x.shape[1])


def _save(ctx, inputs, output):
    # no zeros in place of a gradient that nobody has
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], inputs[1], *output[1:])


def _gradients(ctx, dy, dmean, drstd):
    dx, sums = _layernorm_backward(dy.contiguous(), *ctx.saved_tensors)
    return dx, sums[0], sums[1], None


_layernorm.register_autograd(_gradients, setup_context=_save)


def layernorm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> Tensor:
    """LayerNorm over the rows of a matrix, with its gradients.

    Args:
        x: ``(M, N)``, float32, float16 or bfloat16, on ``warpmap.DEVICE``.
            Each row is contiguous, rows may lie apart, and ``N`` is at most
            ``MAX_COLS``.
        weight: ``(N,)``, of any of these dtypes.
        bias: ``(N,)``, of the dtype of ``weight``.
        eps: Added to the variance.

    Returns:
        ``(M, N)``, same dtype as ``x``, contiguous.

    Raises:
        ValueError: If a tensor has another shape, dtype, layout or device,
            or rows are too long.

    Examples:
        >>> from warpmap import DEVICE
        >>> x = torch.tensor([[5001.0, 5003.0]], device=DEVICE)
        >>> one = torch.ones(2, device=DEVICE)
        >>> layernorm(x, one, 10 * one, eps=0.0).tolist()
        [[9.0, 11.0]]
    """
    check_rows({"x": x}, {"weight": weight, "bias": bias})
    y: Tensor = _layernorm(x, weight, bias, eps)[0]
    return y
