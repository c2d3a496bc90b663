"""Loss of a language model's head that never holds all logits.

The head multiplies M hidden vectors with V rows of weights, and the M x V
logits outweigh everything else. Here they are made some rows at a time. Of a
chunk the loss, the gradient in place, and both products of that gradient are
taken at once; then the next chunk overwrites it.

    work    6 M C V operations, as without chunks: nothing is done twice
    memory  one chunk of logits and the gradients, instead of 3 M V elements

Reference: Hsu et al., 2024, https://arxiv.org/abs/2410.10989
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from warpmap import DEVICE
from warpmap.kernels import tl, triton
from warpmap.kernels.normalization.cross_entropy import (
    DTYPES,
    backward_rows,
    forward_rows,
)

CHUNK_BYTES = 256 * 2**20


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int = -100
) -> Tensor:
    """Mean loss by way of all logits.

    Args:
        hidden: ``(M, C)``.
        weight: ``(V, C)``.
        target: ``(M,)``, int64.
        ignore_index: Rows with this target do not count.

    Returns:
        A scalar, float32.

    Examples:
        >>> hidden, weight = torch.zeros(1, 3), torch.zeros(2, 3)
        >>> loss = linear_cross_entropy_reference(
        ...     hidden, weight, torch.tensor([1])
        ... )
        >>> round(loss.item(), 4)
        0.6931
    """
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.float(), target, ignore_index=ignore_index)


def chunk_rows(
    M: int, V: int, itemsize: int, chunk_bytes: int = CHUNK_BYTES
) -> int:
    """How many rows of logits to hold at once.

    Args:
        M: Tokens.
        V: Vocabulary.
        itemsize: Bytes of a logit.
        chunk_bytes: What the logits of a chunk may take.

    Returns:
        A multiple of 128, the rows of a matrix product's tile, so that no
        tile is partly empty; all ``M`` rows if they are fewer.

    Examples:
        >>> chunk_rows(8192, 128256, 2)
        1024
    """
    rows = max(1, chunk_bytes // (V * itemsize) // 128) * 128
    return max(1, min(M, rows))


@torch.library.custom_op("warpmap::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    mean: bool,
    chunk: int,
    wants_dhidden: bool,
    wants_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    M, V = len(hidden), len(weight)
    losses = hidden.new_empty(M, dtype=torch.float32)
    share = losses.new_ones(())  # of each loss in the result
    if mean:
        share = share / (target != ignore_index).sum()
    shares = share.repeat(M)
    buffer = hidden.new_empty(min(chunk, M), V)
    dhidden = hidden.new_empty(hidden.shape if wants_dhidden else 0)
    dweight = weight.new_empty(weight.shape if wants_dweight else 0)
    if M == 0:
        dweight.zero_()

    for start in range(0, M, chunk):
        rows = slice(start, start + chunk)
        logits = buffer[: M - start]
        torch.mm(hidden[rows], weight.T, out=logits)
        losses[rows], lse = forward_rows(logits, target[rows], ignore_index)
        if wants_dhidden or wants_dweight:
            # in place: from here on these are the gradients of the logits
            backward_rows(
                logits, target[rows], lse, shares[rows], logits, ignore_index
            )
        if wants_dhidden:
            torch.mm(logits, weight, out=dhidden[rows])
        if wants_dweight:  # added to the former chunks', if there are any
            dweight.addmm_(logits.T, hidden[rows], beta=int(start > 0))
    return losses.sum() * share, dhidden, dweight


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, n, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor == 1:  # as a rule; only the GPU knows, so only it can skip
        return
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < n).to(tl.float32)
    tl.store(x_ptr + i, x * factor, i < n)


@torch.library.custom_op("warpmap::scale", mutates_args={"x"})
def _scale(x: Tensor, factor: Tensor) -> None:
    BLOCK = 8192
    if x.numel():
        with torch.cuda.device_of(x):  # Triton launches on the current GPU
            _scale_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                x, factor, x.numel(), BLOCK=BLOCK, num_warps=8
            )


# what torch.compile and autograd must know about the operator
@_linear_cross_entropy.register_fake
def _(hidden, weight, target, ignore_index, mean, chunk, *wants):
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(hidden.shape if wants[0] else 0),
        weight.new_empty(weight.shape if wants[1] else 0),
    )


def _keep(ctx, inputs, output):
    _, dhidden, dweight = output
    # no zeros, as large as both, for gradients that nobody has
    ctx.set_materialize_grads(False)
    ctx.wants = inputs[-2:]
    ctx.save_for_backward(dhidden, dweight)
    ctx.mark_non_differentiable(dhidden, dweight)


def _gradient(ctx, dloss, *_):
    gradients = ctx.saved_tensors
    if torch.compiler.is_compiling():  # may not change what was kept
        gradients = [gradient * dloss for gradient in gradients]
    else:
        # in place, for want of room for a second one. They are used up then:
        # PyTorch sees the change, and refuses another backward
        for gradient in gradients:
            _scale(gradient, dloss)
    wanted = zip(gradients, ctx.wants, strict=True)
    return *(d if wants else None for d, wants in wanted), *[None] * 6


_linear_cross_entropy.register_autograd(_gradient, setup_context=_keep)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    chunk: int | None = None,
) -> Tensor:
    """Cross-entropy of ``hidden @ weight.T``, without holding that product.

    The gradients that are wanted are computed together with the loss;
    backward only multiplies them with the incoming one, once. The gradient
    of ``weight`` is added up over the chunks in the dtype of ``weight``.

    Args:
        hidden: ``(M, C)``, float32, float16 or bfloat16, on
            ``warpmap.DEVICE``.
        weight: ``(V, C)``, same dtype and device.
        target: ``(M,)``, int64, each from 0 to ``V - 1`` or ``ignore_index``.
        ignore_index: A row with this target does not count.
        reduction: ``"mean"`` over the rows not ignored, or ``"sum"``. The
            loss of each row has no place here: its gradient must be known
            when the rows are added up.
        chunk: Rows of logits to hold at once; default: ``chunk_rows``.

    Returns:
        A scalar, float32; the mean of no rows is ``nan``, as in PyTorch.

    Raises:
        ValueError: If an argument has another shape, dtype or device, or is
            out of its range.

    Examples:
        >>> hidden = torch.zeros(4, 3, device=DEVICE)
        >>> weight = torch.zeros(2, 3, device=DEVICE)
        >>> target = torch.tensor([0, 1, 1, -100], device=DEVICE)
        >>> loss = linear_cross_entropy(hidden, weight, target, chunk=3)
        >>> round(loss.item(), 4)
        0.6931
    """
    if hidden.ndim != 2 or weight.ndim != 2 or not len(weight):
        raise ValueError(
            "expected hidden (M, C) and weight (V, C), V at least 1, got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden and weight must have the same width, got "
            f"{hidden.shape[1]} and {weight.shape[1]}"
        )
    if hidden.dtype not in DTYPES or weight.dtype != hidden.dtype:
        raise ValueError(
            f"expected hidden and weight in one of {DTYPES}, got "
            f"{hidden.dtype} and {weight.dtype}"
        )
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"expected an int64 target ({hidden.shape[0]},), got "
            f"{target.dtype} {tuple(target.shape)}"
        )
    devices = hidden.device, weight.device, target.device
    if hidden.device.type != DEVICE or len(set(devices)) > 1:
        raise ValueError(f"expected tensors on {DEVICE}, got {devices}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, got {reduction!r}")
    if chunk is None:
        chunk = chunk_rows(len(hidden), len(weight), hidden.itemsize)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    with_gradients = torch.is_grad_enabled()
    loss: Tensor
    loss, _, _ = _linear_cross_entropy(
        hidden,
        weight,
        target.contiguous(),
        ignore_index,
        reduction == "mean",
        chunk,
        with_gradients and hidden.requires_grad,
        with_gradients and weight.requires_grad,
    )
    return loss
