"""Dropout that stores no mask: backward draws the same numbers again.

Element i looks at 16 bits of a generator that is a function of a seed and a
counter (Philox). Whoever knows the seed knows the mask.

    counter  i // 8: four words of 32 bits, two elements each
    kept     8 bytes, the seed; PyTorch keeps a byte an element
    traffic  the input and the output, once each

Reference: Salmon, Moraes, Dror and Shaw, 2011,
https://doi.org/10.1145/2063384.2063405
"""

from typing import Any

import torch
from torch import Tensor

from warpmap import DEVICE
from warpmap.kernels import tl, triton
from warpmap.kernels.data_movement._philox import philox4x32

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EACH = tl.constexpr(8)  # elements of a counter: 16 bytes of half precision
MAX_SEED = 2**63 - 1


def threshold(p: float) -> int:
    """Of the 65536 values of 16 bits, how many drop an element.

    Args:
        p: Share to drop, from 0 to below 1.

    Examples:
        >>> threshold(0.5), threshold(0.1)
        (32768, 6554)
    """
    return min(round(p * 2**16), 2**16 - 1)


def keep_mask(n: int, p: float, seed: int) -> Tensor:
    """Which of ``n`` elements stay, one counter at a time.

    Args:
        n: Elements.
        p: Share to drop, from 0 to below 1.
        seed: From 0 to ``MAX_SEED``.

    Returns:
        ``(n,)``, bool, on the CPU.

    Examples:
        >>> keep_mask(8, p=0.5, seed=0).tolist()
        [True, False, True, True, True, True, True, True]
    """
    counter = torch.arange((n + 7) // 8)
    zero = torch.zeros_like(counter)
    high, low = divmod(seed, 2**32)
    words = philox4x32((counter, zero, zero, zero), (low, high))
    halves = [half for w in words for half in (w & 0xFFFF, w >> 16)]
    return torch.stack(halves, dim=1).flatten()[:n] >= threshold(p)


def dropout_reference(x: Tensor, p: float, seed: int) -> Tensor:
    """Zero where the mask is off; what stays is scaled up.

    Args:
        x: Any shape.
        p: Share to drop, from 0 to below 1.
        seed: From 0 to ``MAX_SEED``.

    Returns:
        The same shape and dtype; the mean over all seeds is ``x``.

    Examples:
        >>> dropout_reference(torch.ones(4), p=0.5, seed=0).tolist()
        [2.0, 0.0, 2.0, 2.0]
    """
    mask = keep_mask(x.numel(), p, seed).view(x.shape).to(x.device)
    stays = 1 - threshold(p) / 2**16
    return torch.where(mask, x.float() / stays, 0.0).to(x.dtype)


@triton.jit
def _keep(seed, counters, drop):
    """The decisions of ``EACH`` elements for each counter, in order."""
    w0, w1, w2, w3 = tl.randint4x(seed, counters)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # w0 w1 w2 w3
    # the low half moved up beside the whole word, whose low half decides
    # nothing: both are compared with a threshold that is moved up as well
    halves = tl.join(words << 16, words)
    keep = halves >= tl.cast(drop, tl.uint32) << 16
    return tl.reshape(keep, (counters.shape[0] * EACH,))


@triton.jit
def _dropout_kernel(
    x_ptr, seed_ptr, y_ptr, n, drop, scale, BLOCK: tl.constexpr
):
    seed = tl.load(seed_ptr)
    # 64-bit: an element's number overflows 32 bits in a large tensor
    first = tl.program_id(0).to(tl.int64) * BLOCK
    counters = first // EACH + tl.arange(0, BLOCK // EACH)
    i = first + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < n).to(tl.float32)
    y = tl.where(_keep(seed, counters, drop), x * scale, 0.0)
    tl.store(y_ptr + i, y, i < n)


BLOCK, NUM_WARPS = 1024, 4  # 8 elements a thread: one counter


@torch.library.custom_op("warpmap::dropout", mutates_args=())
def _dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    n = x.numel()
    if n == 0:
        return y
    drop = threshold(p)
    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        _dropout_kernel[(triton.cdiv(n, BLOCK),)](
            x.contiguous(),
            seed,
            y,
            n,
            drop,
            2**16 / (2**16 - drop),  # exact: the mean stays what it was
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return y


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    # what was dropped gets no gradient, what stayed gets it scaled: the same
    return _dropout(dy, *ctx.saved_tensors, ctx.p), None, None


# what torch.compile and autograd must know about the operator
_dropout.register_fake(
    lambda x, seed, p: torch.empty_like(
        x, memory_format=torch.contiguous_format
    )
)
_dropout.register_autograd(_gradient, setup_context=_setup_context)


def dropout(
    x: Tensor, p: float = 0.5, seed: int | Tensor | None = None
) -> Tensor:
    """Zero elements at random and scale the others up, with its gradient.

    Args:
        x: Any shape and strides, float32, float16 or bfloat16, on
            ``warpmap.DEVICE``.
        p: Share to drop, from 0 to below 1, in steps of 2^-16.
        seed: From 0 to ``MAX_SEED``, or a tensor ``(1,)`` of it, int64, on the
            same device. The same seed drops the same elements of tensors of
            any shape, counted in order. By default PyTorch draws it, in code
            that ``torch.compile`` made not the same as in eager code.

    Returns:
        The same shape and dtype, contiguous.

    Raises:
        ValueError: If ``x`` has another dtype or device, if ``p`` or ``seed``
            is out of range, or a tensor of a seed is no such tensor.

    Examples:
        >>> dropout(torch.ones(4, device=DEVICE), p=0.5, seed=0).tolist()
        [2.0, 0.0, 2.0, 2.0]
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"expected one dtype of {DTYPES}, got {x.dtype}")
    if x.device.type != DEVICE:
        raise ValueError(f"expected a tensor on {DEVICE}, got {x.device}")
    if not 0 <= p < 1:
        raise ValueError(f"p must be from 0 to below 1, got {p}")
    if seed is None:
        # it stays on the GPU: the CPU need not wait for it
        seed = torch.randint(MAX_SEED, (1,), device=x.device)
    elif isinstance(seed, int):
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, got {seed}")
        seed = torch.full((1,), seed, dtype=torch.int64, device=x.device)
    elif (seed.shape, seed.dtype, seed.device) != ((1,), torch.int64, x.device):
        raise ValueError(
            f"expected a seed of shape (1,), int64, on {x.device}, "
            f"got {tuple(seed.shape)}, {seed.dtype}, on {seed.device}"
        )
    y: Tensor = _dropout(x, seed, p)
    return y
