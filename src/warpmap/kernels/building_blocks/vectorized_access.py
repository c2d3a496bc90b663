"""Copies in packs of 1 to 16 bytes, whatever the addresses and the length.

A thread can load and store up to 16 bytes at once, from an address that the
width of the pack divides. So a copy has three parts:

    head   bytes before the first boundary, fewer than a pack
    packs  the rest, one pack a thread
    tail   bytes after the last whole pack

A head can align two arrays together only if their addresses leave the same
remainder. Where they differ, the widest pack that they agree on is taken.

Reference: Luitjens, 2013,
https://developer.nvidia.com/blog/cuda-pro-tip-increase-performance-with-vectorized-memory-access/
"""

from typing import NamedTuple

import torch
from torch import Tensor

from warpmap import DEVICE
from warpmap.kernels import tl, triton
from warpmap.kernels.cuda import cuda_kernel

WIDTHS = (1, 2, 4, 8, 16)
"""Bytes that one load can bring to a thread."""

THREADS = 256
"""In a block; each has one pack."""

_cuda_kernels = {w: cuda_kernel(__file__, f"copy_{w}") for w in WIDTHS}


class Plan(NamedTuple):
    """How a copy is cut into packs; ``width`` is theirs in bytes."""

    width: int
    head: int
    packs: int
    tail: int


def plan_copy(
    x_address: int, y_address: int, n_bytes: int, width: int = 16
) -> Plan:
    """The widest packs that two arrays can be copied in.

    Args:
        x_address: Where the bytes are, as ``data_ptr()`` says.
        y_address: Where they go.
        n_bytes: How many there are.
        width: The widest pack to use, in bytes: 1, 2, 4, 8 or 16.

    Returns:
        The width of the packs, how many there are, and the bytes before and
        after them.

    Raises:
        ValueError: If there is no such width, or ``n_bytes`` is negative.

    Examples:
        >>> plan_copy(2, 2, 100)  # the same remainder: one head for both
        Plan(width=16, head=14, packs=5, tail=6)
        >>> plan_copy(2, 0, 100)
        Plan(width=2, head=0, packs=50, tail=0)
    """
    if width not in WIDTHS:
        raise ValueError(f"width must be one of {WIDTHS}, got {width}")
    if n_bytes < 0:
        raise ValueError(f"n_bytes must be at least 0, got {n_bytes}")
    while (x_address - y_address) % width:
        width //= 2
    head = min(-x_address % width, n_bytes)
    packs, tail = divmod(n_bytes - head, width)
    return Plan(width, head, packs, tail)


# as written: one compiled kernel serves every length
@triton.jit(do_not_specialize=["head", "packs", "tail"])
def _copy_kernel(
    x_ptr,
    y_ptr,
    head,
    packs,
    tail,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # a row of the tile is a pack; 64-bit: bytes overflow 32 bits at 2 GiB
    first = tl.program_id(0).to(tl.int64) * BLOCK
    pack = first + tl.arange(0, BLOCK)[:, None]
    offsets = pack * WIDTH + tl.arange(0, WIDTH)[None, :]

    # a promise that the compiler cannot check: it loads a row at once
    x_packs = tl.multiple_of(x_ptr + head, WIDTH)
    y_packs = tl.multiple_of(y_ptr + head, WIDTH)
    mask = pack < packs  # the same for all of a row, or it could not
    tl.store(y_packs + offsets, tl.load(x_packs + offsets, mask), mask)

    # fewer bytes than a pack at each end
    if tl.program_id(0) == 0:
        byte = tl.arange(0, WIDTH)
        x = tl.load(x_ptr + byte, byte < head)
        tl.store(y_ptr + byte, x, byte < head)
        end = head + packs.to(tl.int64) * WIDTH
        x = tl.load(x_ptr + end + byte, byte < tail)
        tl.store(y_ptr + end + byte, x, byte < tail)


def _checked(y: Tensor, x: Tensor, width: int, device: str) -> Plan:
    """The plan of a copy that can be done.

    Raises:
        ValueError: If it cannot.
    """
    if x.device.type != device:
        raise ValueError(f"expected tensors on {device}, got {x.device}")
    if y.shape != x.shape or y.dtype != x.dtype or y.device != x.device:
        raise ValueError(
            f"expected a y like x, {tuple(x.shape)} {x.dtype} on {x.device}, "
            f"got {tuple(y.shape)} {y.dtype} on {y.device}"
        )
    for name, tensor in {"y": y, "x": x}.items():
        if not tensor.is_contiguous():
            raise ValueError(
                f"expected {name} contiguous, got strides {tensor.stride()}"
            )
        if tensor.is_conj() or tensor.is_neg():
            raise ValueError(
                f"expected {name} as it stands in memory, got a lazy conjugate "
                "or negative: call resolve_conj() or resolve_neg() first"
            )
    begins, n_bytes = (x.data_ptr(), y.data_ptr()), x.nbytes
    if abs(begins[0] - begins[1]) < n_bytes:
        raise ValueError("expected x and y apart in memory; they overlap")
    return plan_copy(*begins, n_bytes, width)


def _bytes(x: Tensor) -> Tensor:
    return x.detach().flatten().view(torch.uint8)


def copy_(y: Tensor, x: Tensor, width: int = 16) -> Tensor:
    """Copy ``x`` into ``y`` with Triton.

    Args:
        y: Any shape and dtype, contiguous, on ``warpmap.DEVICE``.
        x: The same, elsewhere in memory.
        width: The widest packs to use, in bytes: 1, 2, 4, 8 or 16.

    Returns:
        ``y``.

    Raises:
        ValueError: If ``y`` and ``x`` differ or overlap, are not contiguous or
            on another device, or there is no such width.

    Examples:
        >>> x = torch.arange(5, device=DEVICE)
        >>> copy_(torch.empty_like(x), x).tolist()
        [0, 1, 2, 3, 4]
    """
    plan = _checked(y, x, width, DEVICE)
    if x.numel():
        with torch.cuda.device_of(x):  # Triton launches on the current GPU
            _copy_kernel[(_blocks(plan),)](
                _bytes(x),
                _bytes(y),
                plan.head,
                plan.packs,
                plan.tail,
                WIDTH=plan.width,
                BLOCK=THREADS,
                num_warps=THREADS // 32,
            )
    return y


def copy_cuda_(y: Tensor, x: Tensor, width: int = 16) -> Tensor:
    """Copy ``x`` into ``y`` with CUDA C++; see ``copy_``.

    Args:
        y: Any shape and dtype, contiguous, on a GPU.
        x: The same, elsewhere in memory.
        width: The widest packs to use, in bytes: 1, 2, 4, 8 or 16.

    Returns:
        ``y``.

    Raises:
        ValueError: As ``copy_`` does, or if the tensors are on no GPU.

    Examples:
        >>> x = torch.zeros(5)
        >>> copy_cuda_(torch.empty(5), x)
        Traceback (most recent call last):
        ValueError: expected tensors on cuda, got cpu
    """
    plan = _checked(y, x, width, "cuda")
    if x.numel():
        kernel = _cuda_kernels[plan.width]
        kernel(_blocks(plan), THREADS, x, y, plan.head, plan.packs, plan.tail)
    return y


def _blocks(plan: Plan) -> int:
    # one at least: it moves the ends
    return max(1, -(-plan.packs // THREADS))
