"""LayerNorm with a variance that survives a large mean.

Each row loses its mean and is divided by its standard deviation; then every
column has a weight and a bias. The row stays on chip, so the mean is known
before the squared distances from it are added up: two passes over the row,
one trip to memory.

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
):
    # 64-bit: row * stride overflows 32 bits on a large matrix
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)[:, None]
    rows = tl.minimum(rows, M - 1)  # past the end: the last row once more
    cols = tl.arange(0, BLOCK_N)[None, :]
    mask = cols < N
    x_ptrs = x_ptr + rows * stride_xm + cols

    x = load(x_ptrs, mask, "evict_last")
    mean = tl.sum(x, axis=1, keep_dims=True) / N
    centred = tl.where(mask, x - mean, 0.0)  # padding would count as -mean
    variance = tl.sum(centred * centred, axis=1, keep_dims=True) / N
    rstd = tl.rsqrt(variance + eps)
    tl.store(mean_ptr + rows, mean)
    tl.store(rstd_ptr + rows, rstd)

    # again, now from the L1 cache: not kept in registers, a row leaves them
    # to more rows at a time
    normal = (load(x_ptrs, mask, "evict_first") - mean) * rstd
    weight = load(weight_ptr + cols, mask, "evict_last")
    y = normal * weight + load(bias_ptr + cols, mask, "evict_last")
    tl.store(y_ptr + rows * N + cols, y, mask)


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
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    # a long row belongs to SPLIT programs: each reads all of it, for the
    # means, and owns one part
    part = tl.program_id(0)
    own = part * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    walker = tl.program_id(1)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    step = tl.num_programs(1) * BLOCK_M
    # pipelined: the next rows are on their way to shared memory meanwhile
    for first in tl.range(walker * BLOCK_M, M, step, num_stages=STAGES):
        rows = (first + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
        live = rows < M
        mean = tl.load(mean_ptr + rows, live, other=0.0)
        rstd = tl.load(rstd_ptr + rows, live, other=0.0)

        mean_g = tl.zeros((BLOCK_M, 1), tl.float32)
        mean_xg = tl.zeros((BLOCK_M, 1), tl.float32)
        for i in tl.static_range(1, SPLIT + 1):
            # its own part last: that one stays in registers
            cols = (part + i) % SPLIT * BLOCK_N
            cols += tl.arange(0, BLOCK_N)[None, :]
            mask = live & (cols < N)
            x = load(x_ptr + rows * stride_xm + cols, mask, "")
            dy = load(dy_ptr + rows * N + cols, mask, "")
            normal = (x - mean) * rstd
            g = dy * load(weight_ptr + cols, cols < N, "evict_last")
            mean_g += tl.sum(g, axis=1, keep_dims=True) / N
            mean_xg += tl.sum(normal * g, axis=1, keep_dims=True) / N

        dweight += dy * normal
        dbias += dy
        dx = (g - mean_g - normal * mean_xg) * rstd
        tl.store(dx_ptr + rows * N + own, dx, mask)

    sums_ptrs = sums_ptr + walker * 2 * N + own
    dweight = tl.sum(dweight, axis=0, keep_dims=True)
    tl.store(sums_ptrs, dweight, own < N)
    dbias = tl.sum(dbias, axis=0, keep_dims=True)
    tl.store(sums_ptrs + N, dbias, own < N)


def _fwd_tile(N: int) -> dict[str, int]:
    """Launch parameters of the forward kernel for rows of ``N`` elements."""
    BLOCK_N = triton.next_power_of_2(N)
    # several short rows a program, so that its threads have enough to load
    BLOCK_M = max(1, 1024 // BLOCK_N)
    # 32 elements a thread
    num_warps = min(32, max(1, BLOCK_M * BLOCK_N // 1024))
    return {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "num_warps": num_warps}


def _bwd_tile(N: int, loads: int) -> tuple[dict[str, int], int]:
    """The same for backward, and how many programs a multiprocessor holds.

    Args:
        N: Elements of a row.
        loads: Bytes that a program loads for each column of a row.
    """
    # what registers hold of a row: both sums, itself and its gradient
    BLOCK_N = min(triton.next_power_of_2(N), 8192)
    BLOCK_M = max(1, 4096 // BLOCK_N)
    SPLIT = triton.cdiv(N, BLOCK_N)
    # 32 elements a thread; 8 warps together may have 255 registers each
    num_warps = BLOCK_M * BLOCK_N // 1024
    per_sm = max(1, 8 // num_warps)
    # two steps ahead, as far as shared memory holds what they load
    step = loads * BLOCK_M * BLOCK_N * SPLIT
    ahead = min(2, 220 * 1024 // (step * per_sm))
    tile = {
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": BLOCK_N,
        "SPLIT": SPLIT,
        "STAGES": 1 + ahead,
        "num_warps": num_warps,
    }
    return tile, per_sm


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
    loads = 2 * x.itemsize + weight.itemsize
    tile, per_sm = _bwd_tile(N, loads)
    walkers = max(1, programs_at_once(x, per_sm) // tile["SPLIT"])
    walkers = min(walkers, triton.cdiv(M, tile["BLOCK_M"]))
    sums = x.new_empty(walkers, 2 * N, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _layernorm_bwd_kernel[(tile["SPLIT"], walkers)](
            x, weight, mean, rstd, dy, dx, sums, x.stride(0), M, N=N, **tile
        )
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
