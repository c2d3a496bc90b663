"""AdamW for all tensors of a model in one launch.

A table on the GPU lists where every tensor lies. A program takes one chunk of
one tensor, reads four numbers an element, and writes three.

    traffic   28 bytes an element in fp32; the reference moves 80
    launches  1, however many tensors; the reference makes 8 for each

References: Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980;
Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from warpmap import DEVICE
from warpmap.kernels import tl, triton


def adamw_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> None:
    """One step of AdamW, tensor by tensor, in place.

    Args:
        params: The parameters, changed.
        grads: A gradient for each.
        exp_avgs: Running means of the gradients, changed; zeros at first.
        exp_avg_sqs: Running means of their squares, changed; zeros at first.
        step: How many steps there are with this one; 1 at first.
        lr: Learning rate.
        betas: What the two running means keep in a step.
        eps: Added below the line.
        weight_decay: What a parameter loses in a step, over ``lr``.

    Examples:
        >>> p, g, m, v = (torch.full((1,), x) for x in (1.0, 7.0, 0.0, 0.0))
        >>> adamw_reference([p], [g], [m], [v], step=1, lr=0.25, weight_decay=0)
        >>> p.tolist()  # the first step is lr, whatever the gradient
        [0.75]
    """
    beta1, beta2 = betas
    step_size = lr / (1 - beta1**step)
    correction = math.sqrt(1 - beta2**step)
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        p.mul_(1 - lr * weight_decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.addcdiv_(m, v.sqrt().div_(correction).add_(eps), value=-step_size)


@triton.jit
def _stochastic_bf16(x, random):
    """Round up as often as ``x`` lies near the number above.

    The upper half of a float32 is a bfloat16. A random lower half, added,
    carries into it with just this probability.
    """
    bits = x.to(tl.int32, bitcast=True) + (random & 0xFFFF).to(tl.int32)
    rounded = (bits & -0x10000).to(tl.float32, bitcast=True)
    # the carry would turn some nan into -0
    return tl.where(x == x, rounded, x).to(tl.bfloat16)


@triton.jit
def _mean(old, new, BETA: tl.constexpr):
    # a step from the nearer end: what was nearly reached stays exact
    if BETA < 0.5:
        mean = new + (old - new) * BETA
    else:
        mean = old + (new - old) * (1 - BETA)
    return mean


@triton.jit
def _update(
    arrays,
    at,
    key,
    rates,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    BF16: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A block of a tensor; a ``WHOLE`` one 16 bytes at a time."""
    first, left, number = at
    step_size, correction, decay, eps = rates
    cols = tl.arange(0, BLOCK)
    mask = None if WHOLE else cols < left
    dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float32
    p_ptr = arrays[0].to(tl.pointer_type(dtype)) + first
    g_ptr = arrays[1].to(tl.pointer_type(dtype)) + first
    m_ptr = arrays[2].to(tl.pointer_type(tl.float32)) + first
    v_ptr = arrays[3].to(tl.pointer_type(tl.float32)) + first
    if WHOLE:  # the compiler cannot know what a table holds
        p_ptr = tl.multiple_of(p_ptr, 16)
        g_ptr = tl.multiple_of(g_ptr, 16)
        m_ptr = tl.multiple_of(m_ptr, 16)
        v_ptr = tl.multiple_of(v_ptr, 16)

    p = tl.load(p_ptr + cols, mask).to(tl.float32)
    g = tl.load(g_ptr + cols, mask).to(tl.float32)
    m = tl.load(m_ptr + cols, mask)
    v = tl.load(v_ptr + cols, mask)

    m = _mean(m, g, BETA1)
    v = _mean(v, g * g, BETA2)
    p -= p * decay
    p -= step_size * m / (tl.sqrt(v) * correction + eps)

    if BF16:
        p = _stochastic_bf16(p, tl.randint(key, number + cols, n_rounds=7))
    tl.store(p_ptr + cols, p, mask)
    tl.store(m_ptr + cols, m, mask)
    tl.store(v_ptr + cols, v, mask)


@triton.jit
def _power(BETA: tl.constexpr, step):
    # float64: in float32, 1 - 0.999 ** 1 is off in the fifth digit
    log2_beta = tl.log2(tl.full((), BETA, tl.float64))
    return tl.exp2(step.to(tl.float64) * log2_beta)


@triton.jit(do_not_specialize=["step", "seed"])
def _fused_adamw_kernel(
    table_ptr,
    tensor_of_chunk_ptr,
    step,
    seed,
    lr,
    decay,
    eps,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    BF16: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # which tensor, and where do its four arrays lie?
    chunk = tl.program_id(0)
    row_ptr = table_ptr + 6 * tl.load(tensor_of_chunk_ptr + chunk)
    p = tl.load(row_ptr)
    g = tl.load(row_ptr + 1)
    m = tl.load(row_ptr + 2)
    v = tl.load(row_ptr + 3)
    size = tl.load(row_ptr + 4)
    start = (chunk - tl.load(row_ptr + 5)) * CHUNK
    aligned = (p | g | m | v) % 16 == 0

    if step.dtype.is_ptr():
        step = tl.load(step)
    step_size = (lr / (1 - _power(BETA1, step))).to(tl.float32)
    correction = (1 / tl.sqrt(1 - _power(BETA2, step))).to(tl.float32)

    rates = step_size, correction, decay, eps
    arrays = p, g, m, v
    key = step.to(tl.int32) + seed

    for first in range(start, tl.minimum(start + CHUNK, size), BLOCK):
        left = size - first
        # each element of each tensor rounds by its own random number
        number = chunk * CHUNK + (first - start).to(tl.int32)
        at = first, left, number
        if aligned & (left >= BLOCK):
            _update(arrays, at, key, rates, BETA1, BETA2, BF16, BLOCK, True)
        else:
            _update(arrays, at, key, rates, BETA1, BETA2, BF16, BLOCK, False)


CHUNK = 1 << 12  # elements of a program: 112 KiB to move in fp32
BLOCK = 1 << 10  # of them at a time


def _num_warps(itemsize: int) -> int:
    """Warps whose threads take 16 bytes each of a block of parameters."""
    return BLOCK * itemsize // (32 * 16)


@dataclass(frozen=True)
class Table:
    """Where the tensors of a model lie, for ``fused_adamw``.

    Attributes:
        rows: ``(T, 6)``, on the GPU: the four addresses of a parameter, its
            gradient and its two means; its size; the number of its first chunk.
        tensor_of_chunk: ``(chunks,)``, on the GPU: a row for each chunk.
        tensors: All of them; this keeps their memory from being freed.
    """

    rows: Tensor
    tensor_of_chunk: Tensor
    tensors: tuple[tuple[Tensor, ...], ...]


def make_table(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
) -> Table:
    """List the tensors once, for as many steps as they stay where they are.

    Args:
        params: T parameters, all float32 or all bfloat16, contiguous, on
            ``warpmap.DEVICE``.
        grads: A gradient for each, of its shape and dtype.
        exp_avgs: A running mean for each, float32.
        exp_avg_sqs: A running mean of squares for each, float32.

    Raises:
        ValueError: If a tensor has another shape, dtype, layout or device, or
            a parameter is listed twice.

    Examples:
        >>> lists = [[torch.zeros(5, device=DEVICE)] for _ in "pgmv"]
        >>> make_table(*lists).rows[0, 4:].tolist()
        [5, 0]
    """
    lists = params, grads, exp_avgs, exp_avg_sqs
    names = "params", "grads", "exp_avgs", "exp_avg_sqs"
    for name, tensors in zip(names, lists, strict=True):
        if len(tensors) != len(params):
            raise ValueError(
                f"expected {len(params)} {name}, as params, got {len(tensors)}"
            )
        for i, (x, p) in enumerate(zip(tensors, params, strict=True)):
            means = name.startswith("exp")
            dtype = torch.float32 if means else params[0].dtype
            if x.shape != p.shape or x.dtype != dtype or not x.is_contiguous():
                raise ValueError(
                    f"expected {name}[{i}] {tuple(p.shape)}, {dtype} and "
                    f"contiguous, got {tuple(x.shape)}, {x.dtype} and strides "
                    f"{x.stride()}"
                )
            if x.device.type != DEVICE or x.device != params[0].device:
                raise ValueError(
                    f"expected all tensors on one {DEVICE} device, "
                    f"got {name}[{i}] on {x.device}"
                )
    if params and params[0].dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"expected params in float32 or bfloat16, got {params[0].dtype}"
        )
    addresses = [p.data_ptr() for p in params if p.numel()]
    if len({*addresses}) < len(addresses):
        raise ValueError("expected params without repeats: list tied ones once")

    chunks = [triton.cdiv(p.numel(), CHUNK) for p in params]
    columns = [[x.data_ptr() for x in tensors] for tensors in lists]
    columns.append([p.numel() for p in params])
    columns.append(list(itertools.accumulate(chunks, initial=0))[:-1])
    owners = torch.arange(len(params), dtype=torch.int32)
    owners = owners.repeat_interleave(torch.tensor(chunks, dtype=torch.int64))
    device = params[0].device if params else DEVICE
    table = torch.tensor(columns, dtype=torch.int64).T.contiguous()
    kept = tuple(tuple(tensors) for tensors in lists)
    return Table(table.to(device), owners.to(device), kept)


def fused_adamw(
    table: Table,
    step: int | Tensor,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    seed: int = 0,
) -> None:
    """One step of AdamW for all tensors at once, in place.

    Parameters in bfloat16 are rounded stochastically: the expected result is
    what float32 would hold.

    Args:
        table: From ``make_table``.
        step: How many steps there are with this one; 1 at first. A tensor of
            one number on the same device may change in a CUDA graph.
        lr: Learning rate.
        betas: What the two running means keep in a step; in the kernel they
            are constants, so other ones compile anew.
        eps: Added below the line.
        weight_decay: What a parameter loses in a step, over ``lr``.
        seed: Of the random rounding; every step has other numbers.

    Raises:
        ValueError: If ``step`` is below 1 or another tensor, or a beta is not
            in ``[0, 1)``.

    Examples:
        >>> numbers = torch.tensor([1.0, 7.0, 0.0, 0.0], device=DEVICE)
        >>> lists = [[x] for x in numbers.clone().split(1)]
        >>> fused_adamw(make_table(*lists), step=1, lr=0.25, weight_decay=0)
        >>> lists[0][0].tolist()
        [0.75]
    """
    device = table.rows.device
    if isinstance(step, Tensor):
        if step.numel() != 1 or step.device != device:
            raise ValueError(
                f"expected step as one number on {device}, got shape "
                f"{tuple(step.shape)} on {step.device}"
            )
    elif step < 1:
        raise ValueError(f"step must be at least 1, got {step}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be in [0, 1), got {betas}")
    if table.tensor_of_chunk.numel() == 0:
        return
    params = table.tensors[0]
    with torch.cuda.device_of(table.rows):  # Triton launches on this GPU
        _fused_adamw_kernel[(table.tensor_of_chunk.numel(),)](
            table.rows,
            table.tensor_of_chunk,
            step,
            seed,
            float(lr),
            float(lr * weight_decay),
            float(eps),
            BETA1=betas[0],
            BETA2=betas[1],
            BF16=params[0].dtype == torch.bfloat16,
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            num_warps=_num_warps(params[0].itemsize),
        )
