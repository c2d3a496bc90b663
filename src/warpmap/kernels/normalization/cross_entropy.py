"""Cross-entropy of every row over a large vocabulary, read once.

PyTorch writes the log-probabilities of all classes and picks one a row. Here
a program runs along a row, keeps its log-sum-exp, and writes two numbers.

    traffic  M N elements forward, 2 M N backward
    kept     2 M numbers for backward, beside the logits themselves
    lanes    each keeps a maximum and a sum of its own; they meet at the end

Reference: Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867
"""

from typing import Literal

import torch
from torch import Tensor

from warpmap import DEVICE
from warpmap.kernels import tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# below every logit but those of a mask; times log2(e) still finite
FLOOR = tl.constexpr(-2e38)
LOG2_E = tl.constexpr(1.4426950408889634)


def cross_entropy_reference(
    logits: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Loss of each row, one step at a time, in float32.

    Args:
        logits: ``(M, N)``.
        target: ``(M,)``, int64.
        ignore_index: A row with this target has the loss 0.
        label_smoothing: Share of the target spread over all ``N`` classes.
        z_loss: Weight of the squared log-sum-exp.

    Returns:
        ``(M,)``, float32.

    Examples:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
        >>> cross_entropy_reference(logits, torch.tensor([1, -100])).tolist()
        [0.6931471824645996, 0.0]
    """
    kept = target != ignore_index
    logits = logits.float()
    lse = torch.logsumexp(logits, dim=1)
    picked = logits.gather(1, torch.where(kept, target, 0)[:, None])[:, 0]
    wanted = (1 - label_smoothing) * picked
    wanted = wanted + label_smoothing * logits.mean(dim=1)
    return torch.where(kept, lse - wanted + z_loss * lse**2, 0)


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_ptr,
    target_ptr,
    losses_ptr,
    lse_ptr,
    stride_m,
    N,
    ignore_index,
    label_smoothing,
    z_loss,
    SMOOTH: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    # 64-bit: row * stride overflows 32 bits on a large matrix
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_m
    target = tl.load(target_ptr + row)
    if target == ignore_index:  # such a row is not read
        tl.store(losses_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        return

    # a lane owns one column of the tile, and all of a column is one thread's:
    # nothing is exchanged between threads inside the loop
    tile = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    peak = tl.full((LANES,), FLOOR, tl.float32)  # -inf would make inf - inf
    total = tl.zeros((LANES,), tl.float32)
    plain = tl.zeros((LANES,), tl.float32)
    for start in tl.range(0, N, DEPTH * LANES):
        cols = start + tile
        mask = cols < N
        x = tl.load(row_ptr + cols, mask, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(x, axis=0))
        exps = tl.exp2((x - higher[None, :]) * LOG2_E)
        # what was summed under the old maximum shrinks to the new one
        shrink = tl.exp2((peak - higher) * LOG2_E)
        total = total * shrink + tl.sum(exps, axis=0)
        peak = higher
        if SMOOTH:
            plain += tl.sum(tl.where(mask, x, 0.0), axis=0)

    top = tl.max(peak, axis=0)
    log_sum = tl.log(tl.sum(total * tl.exp2((peak - top) * LOG2_E), axis=0))
    # a target that is no column: nan, here and in the gradient
    valid = (target >= 0) & (target < N)
    picked = tl.load(row_ptr + target, valid, other=float("nan"))
    picked = picked.to(tl.float32)
    lse = tl.where(valid, top + log_sum, float("nan"))
    loss = top - picked + log_sum
    if SMOOTH:
        loss += label_smoothing * (picked - tl.sum(plain, axis=0) / N)
    tl.store(losses_ptr + row, loss + z_loss * lse * lse)
    tl.store(lse_ptr + row, lse)


@triton.jit
def _cross_entropy_bwd_kernel(
    logits_ptr,
    target_ptr,
    lse_ptr,
    dlosses_ptr,
    dlogits_ptr,
    stride_m,
    stride_dm,
    N,
    ignore_index,
    label_smoothing,
    z_loss,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    target = tl.load(target_ptr + row)
    kept = target != ignore_index
    lse = tl.load(lse_ptr + row)
    dloss = tl.load(dlosses_ptr + row)

    x_ptrs = logits_ptr + row * stride_m + cols
    mask = (cols < N) & kept
    x = tl.load(x_ptrs, mask, other=-float("inf")).to(tl.float32)
    probability = tl.exp2((x - lse) * LOG2_E)
    picked = cols == target.to(tl.int32)
    wanted = tl.where(picked, 1 - label_smoothing, 0.0)
    wanted += label_smoothing / N
    dx = dloss * (probability * (1 + 2 * z_loss * lse) - wanted)
    # dlogits may be the logits: each element is read before it is written
    dx_ptrs = dlogits_ptr + row * stride_dm + cols
    tl.store(dx_ptrs, tl.where(kept, dx, 0.0), cols < N)


def _tile(N: int, itemsize: int) -> tuple[int, int, int]:
    """``DEPTH``, ``LANES`` and warps for rows of ``N`` elements."""
    # 4 warps, 16 bytes a thread: one row of the tile, 2 KiB
    LANES = min(2048 // itemsize, triton.next_power_of_2(N))
    # four such loads a thread: memory stays busy, registers suffice for ten
    # programs a multiprocessor, and an element costs 1.25 exponentials
    DEPTH = min(4, triton.next_power_of_2(triton.cdiv(N, LANES)))
    return DEPTH, LANES, max(1, LANES * itemsize // 512)


def forward_rows(
    logits: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of each row, without checks or autograd.

    Args:
        logits: ``(M, N)``, rows contiguous.
        target: ``(M,)``, int64, contiguous.
        ignore_index: See ``cross_entropy``.
        label_smoothing: See ``cross_entropy``.
        z_loss: See ``cross_entropy``.

    Returns:
        Twice ``(M,)``, float32.

    Examples:
        >>> logits = torch.zeros(1, 2, device=DEVICE)
        >>> target = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        >>> losses, lse = forward_rows(logits, target)
        >>> round(losses.item(), 4), round(lse.item(), 4)
        (0.6931, 0.6931)
    """
    M, N = logits.shape
    losses = logits.new_empty(M, dtype=torch.float32)
    lse = torch.empty_like(losses)
    if M == 0:
        return losses, lse
    DEPTH, LANES, num_warps = _tile(N, logits.itemsize)
    with torch.cuda.device_of(logits):  # Triton launches on the current GPU
        _cross_entropy_fwd_kernel[(M,)](
            logits,
            target,
            losses,
            lse,
            logits.stride(0),
            N,
            ignore_index,
            label_smoothing,
            z_loss,
            SMOOTH=label_smoothing > 0,
            DEPTH=DEPTH,
            LANES=LANES,
            num_warps=num_warps,
        )
    return losses, lse


def backward_rows(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    dlosses: Tensor,
    dlogits: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> None:
    """Write the gradient of the logits, without checks or autograd.

    Args:
        logits: ``(M, N)``, rows contiguous.
        target: ``(M,)``, int64, contiguous.
        lse: ``(M,)``, from ``forward_rows``.
        dlosses: ``(M,)``, float32, contiguous: the gradient of each loss.
        dlogits: Where to: ``(M, N)``, rows contiguous. May be ``logits``.
        ignore_index: See ``cross_entropy``.
        label_smoothing: See ``cross_entropy``.
        z_loss: See ``cross_entropy``.

    Examples:
        >>> logits = torch.zeros(1, 2, device=DEVICE)
        >>> target = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        >>> losses, lse = forward_rows(logits, target)
        >>> backward_rows(logits, target, lse, torch.ones_like(lse), logits)
        >>> [round(g, 4) for g in logits[0].tolist()]
        [-0.5, 0.5]
    """
    M, N = logits.shape
    if M == 0:
        return
    DEPTH, LANES, num_warps = _tile(N, logits.itemsize)
    BLOCK_N = DEPTH * LANES
    with torch.cuda.device_of(logits):
        _cross_entropy_bwd_kernel[(M * triton.cdiv(N, BLOCK_N),)](
            logits,
            target,
            lse,
            dlosses,
            dlogits,
            logits.stride(0),
            dlogits.stride(0),
            N,
            ignore_index,
            label_smoothing,
            z_loss,
            BLOCK_N=BLOCK_N,
            num_warps=num_warps,
        )


@torch.library.custom_op("warpmap::cross_entropy", mutates_args=())
def _cross_entropy(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    return forward_rows(logits, target, ignore_index, label_smoothing, z_loss)


@torch.library.custom_op("warpmap::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    dlosses: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    dlogits = logits.new_empty(logits.shape)
    options = ignore_index, label_smoothing, z_loss
    backward_rows(logits, target, lse, dlosses, dlogits, *options)
    return dlogits


# what torch.compile and autograd must know about the two operators
@_cross_entropy.register_fake
def _(logits, target, *options):
    per_row = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return per_row, torch.empty_like(per_row)


@_cross_entropy_backward.register_fake
def _(logits, *rest):
    return logits.new_empty(logits.shape)


def _keep(ctx, inputs, output):
    logits, target, *ctx.options = inputs
    _, lse = output
    ctx.save_for_backward(logits, target, lse)
    ctx.mark_non_differentiable(lse)


def _gradient(ctx, dlosses, _):
    kept = ctx.saved_tensors
    dlosses = dlosses.contiguous()
    dlogits = _cross_entropy_backward(*kept, dlosses, *ctx.options)
    return dlogits, None, None, None, None


_cross_entropy.register_autograd(_gradient, setup_context=_keep)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Cross-entropy between rows of logits and target classes.

    As ``torch.nn.functional.cross_entropy``, but for the loss in float32 and
    ``z_loss``. No target is compared with ``N`` before the launch, which
    would wait for the GPU: one that is no class gives ``nan``.

    Args:
        logits: ``(M, N)``, float32, float16 or bfloat16, on
            ``warpmap.DEVICE``. Each row is contiguous, rows may lie apart.
        target: ``(M,)``, int64, each from 0 to ``N - 1`` or ``ignore_index``.
        ignore_index: A row with this target has the loss 0 and the gradient
            0, and does not count in the mean.
        label_smoothing: Share of the target, from 0 to 1, that is spread
            over all ``N`` classes.
        z_loss: Weight of the squared log-sum-exp added to each loss.
        reduction: ``"mean"`` over the rows not ignored, ``"sum"``, or
            ``"none"`` for the loss of each row.

    Returns:
        Float32: a scalar, or ``(M,)`` with ``"none"``.

    Raises:
        ValueError: If an argument has another shape, dtype, layout or
            device, or is out of its range.

    Examples:
        >>> logits = torch.zeros(3, 2, device=DEVICE)
        >>> target = torch.tensor([0, 1, -100], device=DEVICE)
        >>> loss = cross_entropy(logits, target)
        >>> round(loss.item(), 4)
        0.6931
    """
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(
            f"expected logits (M, N), N at least 1, got {tuple(logits.shape)}"
        )
    if logits.dtype not in DTYPES:
        raise ValueError(f"expected one of {DTYPES}, got {logits.dtype}")
    if target.shape != logits.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"expected an int64 target ({logits.shape[0]},), got "
            f"{target.dtype} {tuple(target.shape)}"
        )
    if logits.device.type != DEVICE or target.device != logits.device:
        raise ValueError(
            f"expected tensors on {DEVICE}, got {logits.device} "
            f"and {target.device}"
        )
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(
            f"expected contiguous rows, got strides {logits.stride()}: "
            "call logits.contiguous() first"
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(
            f"label_smoothing must be from 0 to 1, got {label_smoothing}"
        )
    if not z_loss >= 0:
        raise ValueError(f"z_loss must be at least 0, got {z_loss}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(
            f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}"
        )
    losses: Tensor
    losses, _ = _cross_entropy(
        logits, target.contiguous(), ignore_index, label_smoothing, z_loss
    )
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (target != ignore_index).sum()
