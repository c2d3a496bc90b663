"""RMSNorm, alone or together with the residual addition before it.

Each row is divided by its root mean square and multiplied by a weight for
each column. Forward takes a row a program, or several short ones. Backward
also needs a sum over all rows, the gradient of the weight: there a program
walks over many rows and keeps its part of that sum in registers;
a long row finds no room beside it and is read again, from L1.

    traffic  2 M N elements forward, 4 M N with the addition, 3 M N backward
    limit    rows of at most MAX_COLS

Reference: Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467
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

# of rows that load more, backward does not keep one in registers
IN_REGISTERS = 128 * 1024  # bytes


def rmsnorm_reference(
    x: Tensor, weight: Tensor, eps: float = 1e-6, cast_first: bool = False
) -> Tensor:
    """RMSNorm of each row, one step at a time, in float32.

    Args:
        x: ``(M, N)``.
        weight: ``(N,)``.
        eps: Added to the mean square.
        cast_first: Round to the dtype of ``x`` before the weight, too.

    Returns:
        ``(M, N)``, same dtype as ``x``.

    Examples:
        >>> x, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([5.0, 10.0])
        >>> y = rmsnorm_reference(x, weight, eps=0.0)  # root of 12.5
        >>> [round(v, 3) for v in y[0].tolist()]
        [4.243, 11.314]
    """
    wide = x.float()
    mean_square = wide.square().mean(dim=1, keepdim=True)
    normal = wide * torch.rsqrt(mean_square + eps)
    if cast_first:
        return (normal.to(x.dtype) * weight).to(x.dtype)  # two roundings
    return (normal * weight.float()).to(x.dtype)  # one


@triton.jit
def _rmsnorm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    h_ptr,
    rstd_ptr,
    stride_xm,
    stride_rm,
    M,
    eps,
    N: tl.constexpr,  # fixed by the model: no masks where it fills the tile
    ADD: tl.constexpr,
    CAST_FIRST: tl.constexpr,
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
    if ADD:
        x += load(residual_ptr + rows * stride_rm + cols, mask, "evict_first")
        # rounded first: y is the norm of the h that the next layer reads
        h = x.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + rows * N + cols, h, mask)
        x = h.to(tl.float32)
    mean_square = tl.sum(x * x, axis=1, keep_dims=True) / N
    rstd = tl.rsqrt(mean_square + eps)
    tl.store(rstd_ptr + rows, rstd)

    if not ADD:
        # again, now from the L1 cache: not kept in registers, a row leaves
        # them to more rows at a time
        x = load(x_ptrs, mask, "evict_first")
    weight = load(weight_ptr + cols, mask, "evict_last")
    x *= rstd
    if CAST_FIRST:
        x = x.to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + rows * N + cols, x * weight, mask)


@triton.jit
def _rmsnorm_bwd_kernel(
    h_ptr,
    weight_ptr,
    rstd_ptr,
    dy_ptr,
    dh_ptr,
    dx_ptr,
    dweight_ptr,
    stride_hm,
    M,
    N: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    walker = tl.program_id(1)
    cols = tl.arange(0, BLOCK_N)[None, :]
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    step = tl.num_programs(1) * BLOCK_M
    # pipelined: the next rows are on their way to shared memory meanwhile
    for first in tl.range(walker * BLOCK_M, M, step, num_stages=STAGES):
        rows = (first + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
        live = rows < M
        rstd = tl.load(rstd_ptr + rows, live, other=0.0)

        mask = live & (cols < N)
        h = load(h_ptr + rows * stride_hm + cols, mask, "")
        dy = load(dy_ptr + rows * N + cols, mask, "")
        normal = h * rstd
        g = dy * load(weight_ptr + cols, cols < N, "evict_last")
        mean = tl.sum(normal * g, axis=1, keep_dims=True) / N

        dweight += dy * normal
        dx = (g - normal * mean) * rstd
        if ADD:
            dx += load(dh_ptr + rows * N + cols, mask, "")
        tl.store(dx_ptr + rows * N + cols, dx, mask)

    dweight = tl.sum(dweight, axis=0, keep_dims=True)
    tl.store(dweight_ptr + walker * N + cols, dweight, cols < N)


@triton.jit
def _rmsnorm_bwd_long_kernel(
    h_ptr,
    weight_ptr,
    rstd_ptr,
    dy_ptr,
    dh_ptr,
    dx_ptr,
    dweight_ptr,
    stride_hm,
    M,
    N: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    # a row belongs to SPLIT programs: each reads all of it, for the mean, and
    # owns CHUNKS of its chunks; one program is fastest, but without this
    # arithmetic the compiler spills
    part = tl.program_id(0)
    walker = tl.program_id(1)
    lane = tl.arange(0, BLOCK_N)
    own = part * CHUNKS * BLOCK_N + lane
    # the sums of each chunk: all that stays in registers from row to row
    dweight = (tl.zeros((BLOCK_N,), tl.float32),) * CHUNKS

    # not pipelined: what shared memory takes, the L1 cache loses
    for row in tl.range(walker, M, tl.num_programs(1), num_stages=1):
        h_row = h_ptr + tl.cast(row, tl.int64) * stride_hm
        offset = tl.cast(row, tl.int64) * N
        rstd = tl.load(rstd_ptr + row)

        # first the mean; its own part last: that one stays near
        total = tl.zeros((BLOCK_N,), tl.float32)
        last = (1 + SPLIT) * CHUNKS
        for i in tl.range(CHUNKS, last, num_stages=1, loop_unroll_factor=2):
            cols = (part * CHUNKS + i) % (SPLIT * CHUNKS) * BLOCK_N + lane
            mask = cols < N
            g = load(dy_ptr + offset + cols, mask, "evict_last")
            g *= load(weight_ptr + cols, mask, "evict_last")
            total += g * load(h_row + cols, mask, "evict_last")
        mean = tl.sum(total) * rstd / N

        # then its own part again, now from the L1 cache
        for i in tl.static_range(CHUNKS):
            cols = own + i * BLOCK_N
            sums = dweight[0]
            # a branch: the loads of all chunks at once would spill
            if (part * CHUNKS + i) * BLOCK_N < N:
                mask = cols < N
                normal = load(h_row + cols, mask, "evict_first") * rstd
                dy = load(dy_ptr + offset + cols, mask, "evict_first")
                sums += dy * normal
                g = dy * load(weight_ptr + cols, mask, "evict_last")
                dx = (g - normal * mean) * rstd
                if ADD:
                    dx += load(dh_ptr + offset + cols, mask, "evict_first")
                tl.store(dx_ptr + offset + cols, dx, mask)
            # to the end: after CHUNKS turns all sums are in place
            dweight += (sums,)
            dweight = dweight[1:]

    for i in tl.static_range(CHUNKS):
        cols = own + i * BLOCK_N
        tl.store(dweight_ptr + walker * N + cols, dweight[i], cols < N)


def _fwd_tile(N: int) -> dict[str, int]:
    """Launch parameters of the forward kernel for rows of ``N`` elements."""
    BLOCK_N = triton.next_power_of_2(N)
    # several short rows a program, so that its threads have enough to load
    BLOCK_M = max(1, 1024 // BLOCK_N)
    if N <= 4096:
        num_warps = max(1, BLOCK_M * BLOCK_N // 512)  # 16 elements a thread
    else:
        # by N: with more warps some would lie past the end of the row
        num_warps = 8 if N <= 6144 else 16 if N <= 16384 else 32
    return {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "num_warps": num_warps}


def _bwd_tile(N: int, loads: int) -> tuple[dict[str, int], int]:
    """The same for backward, and how many programs a multiprocessor holds.

    Args:
        N: Elements of a row.
        loads: Bytes that a program loads for each column of a row.
    """
    BLOCK_N = triton.next_power_of_2(N)
    if BLOCK_N * loads > IN_REGISTERS:
        # 128 registers a thread, at most half of them sums
        BLOCK_N = 4096 if loads <= 6 else 2048
        CHUNKS = triton.cdiv(N, BLOCK_N)
        tile = {"BLOCK_N": BLOCK_N, "CHUNKS": CHUNKS, "SPLIT": 1}
        return tile | {"num_warps": 16}, 1
    BLOCK_M = max(1, 4096 // BLOCK_N)
    # 32 elements a thread; 8 warps together may have 255 registers each. Of
    # long rows 16 elements, for more threads to load them
    num_warps = BLOCK_M * BLOCK_N // (1024 if N <= 8192 else 512)
    per_sm = max(1, 8 // num_warps)
    # two steps ahead, if shared memory holds what they load; one is no gain
    step = loads * BLOCK_M * BLOCK_N
    STAGES = 3 if 2 * step * per_sm <= 220 * 1024 else 1
    tile = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "STAGES": STAGES}
    return tile | {"num_warps": num_warps}, per_sm


@torch.library.custom_op("warpmap::rmsnorm", mutates_args=())
def _rmsnorm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    cast_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y``, ``h`` and ``rstd``; without a residual ``h`` is left empty."""
    M, N = x.shape
    y = x.new_empty(M, N)
    h = x.new_empty(0 if residual is None else (M, N))
    rstd = x.new_empty(M, 1, dtype=torch.float32)
    if y.numel() == 0:
        return y, h, rstd
    tile = _fwd_tile(N)
    r = x if residual is None else residual
    given = x, r, weight, y, h, rstd, x.stride(0), r.stride(0), M, eps
    kind = {"ADD": residual is not None, "CAST_FIRST": cast_first}
    grid = (triton.cdiv(M, tile["BLOCK_M"]),)
    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        _rmsnorm_fwd_kernel[grid](*given, N=N, **kind, **tile)
    return y, h, rstd


@torch.library.custom_op("warpmap::rmsnorm_backward", mutates_args=())
def _rmsnorm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    M, N = h.shape
    dx = h.new_empty(M, N)
    if dx.numel() == 0:
        return dx, torch.zeros_like(weight)
    add = dh is not None
    loads = (2 + add) * h.itemsize + weight.itemsize
    tile, per_sm = _bwd_tile(N, loads)
    steps = triton.cdiv(M, tile.get("BLOCK_M", 1))
    walkers = min(programs_at_once(h, per_sm), steps)
    partial = h.new_empty(walkers, N, dtype=torch.float32)
    given = h, weight, rstd, dy, dy if dh is None else dh, dx, partial
    long = "SPLIT" in tile
    kernel = _rmsnorm_bwd_long_kernel if long else _rmsnorm_bwd_kernel
    with torch.cuda.device_of(h):
        kernel[tile.get("SPLIT", 1), walkers](
            *given, h.stride(0), M, N=N, ADD=add, **tile
        )
        return dx, column_sums(partial, weight.dtype)


# what torch.compile and autograd must know about the two operators
@_rmsnorm.register_fake
def _(x, residual, weight, eps, cast_first):
    return (
        x.new_empty(x.shape),
        x.new_empty(0 if residual is None else x.shape),
        x.new_empty(x.shape[0], 1, dtype=torch.float32),
    )


@_rmsnorm_backward.register_fake
def _(dy, dh, h, weight, rstd):
    return h.new_empty(h.shape), torch.empty_like(weight)


def _save(ctx, inputs, output):
    # no zeros in place of a gradient that nobody has
    ctx.set_materialize_grads(False)
    x, residual, weight, _, _ = inputs
    _, h, rstd = output
    ctx.add = residual is not None
    ctx.save_for_backward(h if ctx.add else x, weight, rstd)


def _gradients(ctx, dy, dh, drstd):
    h, weight, rstd = ctx.saved_tensors
    dy = torch.zeros_like(h) if dy is None else dy.contiguous()
    dh = dh.contiguous() if ctx.add and dh is not None else None
    dx, dweight = _rmsnorm_backward(dy, dh, h, weight, rstd)
    return dx, dx if ctx.add else None, dweight, None, None


_rmsnorm.register_autograd(_gradients, setup_context=_save)


def rmsnorm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, cast_first: bool = False
) -> Tensor:
    """RMSNorm over the rows of a matrix, with its gradients.

    Args:
        x: ``(M, N)``, float32, float16 or bfloat16, on ``warpmap.DEVICE``.
            Each row is contiguous, rows may lie apart, and ``N`` is at most
            ``MAX_COLS``.
        weight: ``(N,)``, of any of these dtypes.
        eps: Added to the mean square.
        cast_first: Round the normalized row to the dtype of ``x`` before the
            weight, as Llama's code does, and not only after it.

    Returns:
        ``(M, N)``, same dtype as ``x``, contiguous.

    Raises:
        ValueError: If a tensor has another shape, dtype, layout or device,
            or rows are too long.

    Examples:
        >>> from warpmap import DEVICE
        >>> x = torch.tensor([[3.0, -3.0]], device=DEVICE).half()
        >>> rmsnorm(x, torch.ones(2, device=DEVICE), eps=0.0).tolist()
        [[1.0, -1.0]]
    """
    check_rows({"x": x}, {"weight": weight})
    y: Tensor = _rmsnorm(x, None, weight, eps, cast_first)[0]
    return y


def add_rmsnorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    cast_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """Add the residual, then normalize, in one kernel.

    Args:
        x: What a layer adds, ``(M, N)``; see :func:`rmsnorm`.
        residual: What it adds to, of the same shape and dtype.
        weight: ``(N,)``.
        eps: Added to the mean square.
        cast_first: See :func:`rmsnorm`.

    Returns:
        The normalized rows and ``h = x + residual``, both ``(M, N)``,
        contiguous.

    Raises:
        ValueError: As :func:`rmsnorm`, or if ``residual`` differs from ``x``
            in shape or dtype.

    Examples:
        >>> from warpmap import DEVICE
        >>> one = torch.ones(1, 2, device=DEVICE).half()
        >>> y, h = add_rmsnorm(one, 2 * one, one[0], eps=0.0)
        >>> y.tolist(), h.tolist()
        ([[1.0, 1.0]], [[3.0, 3.0]])
    """
    check_rows({"x": x, "residual": residual}, {"weight": weight})
    y, h, _ = _rmsnorm(x, residual, weight, eps, cast_first)
    return y, h
