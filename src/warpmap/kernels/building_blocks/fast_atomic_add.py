"""Atomic additions of 16-bit numbers, two at a time even where one is meant.

The L2 cache adds pairs of halves, not halves. One half alone becomes a loop of
compare-and-swap, unless it is padded to a pair with a number that changes
nothing. The fastest atomic is the one that is not needed: ``dot`` adds up in
registers first, and then once for each program.

    traffic  dot: 4 n bytes; add_at: index and value once, and 4 bytes in L2
             for each value
    limit    an accumulator in half precision stops growing when what is added
             is less than half of the gap to its next number

The same in CUDA C++ is in the ``.cu`` file beside this one.
"""

import torch
from torch import Tensor

from warpmap import DEVICE
from warpmap.kernels import tl, triton
from warpmap.kernels.cuda import cuda_kernel

DTYPES = (torch.float16, torch.bfloat16)
THREADS = 256  # a block of CUDA's: dot_block counts on it

# what each rung accumulates in, and how many of them
RUNGS = {
    "half": (cuda_kernel(__file__, "dot_half"), torch.float16, 1),
    "half2": (cuda_kernel(__file__, "dot_half2"), torch.float16, 2),
    "padded": (cuda_kernel(__file__, "dot_padded"), torch.float16, 2),
    "float": (cuda_kernel(__file__, "dot_float"), torch.float32, 1),
    "block": (cuda_kernel(__file__, "dot_block"), torch.float32, 1),
}
ADDS = {
    "half": (cuda_kernel(__file__, "add_at_half"), torch.float16),
    "padded": (cuda_kernel(__file__, "add_at_padded"), torch.float16),
    "float": (cuda_kernel(__file__, "add_at_float"), torch.float32),
}


@triton.jit
def _add_at_kernel(
    out_ptr, index_ptr, value_ptr, shift, n, N, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(index_ptr + i, i < n, other=-1)
    value = tl.load(value_ptr + i, i < n, other=0.0)
    wanted = (index >= 0) & (index < N)

    # the pair around it, counted from the multiple of 4 bytes where out, or
    # the number before out, begins
    pair = (index + shift) // 2 * 2 - shift
    side = tl.arange(0, 2)[None, :]
    # -0.0 changes nothing, while 0.0 would make 0.0 of a -0.0. Made of its
    # bits, since Triton reads the literal -0.0 as 0.0
    nothing = tl.full((BLOCK, 2), -(2**15), tl.int16)
    nothing = nothing.to(value.dtype, bitcast=True)
    named = pair[:, None] + side == index[:, None]
    both = tl.where(named, value[:, None], nothing)
    # the compiler cannot know that a pair begins on a multiple of 4 bytes
    pair_ptrs = tl.multiple_of(out_ptr + pair, 4)
    # a partner outside is somebody else's memory
    whole = wanted & (pair >= 0) & (pair + 1 < N)
    tl.atomic_add(
        pair_ptrs[:, None] + side, both, whole[:, None], sem="relaxed"
    )
    tl.atomic_add(out_ptr + index, value, wanted & ~whole, sem="relaxed")


@triton.jit
def _dot_kernel(
    x_ptr, y_ptr, sum_ptr, n, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS)
    acc = tl.zeros((BLOCK,), tl.float32)
    for block in tl.static_range(BLOCKS):
        i = first + block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, i < n, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + i, i < n, other=0.0).to(tl.float32)
        acc += x * y
    tl.atomic_add(sum_ptr, tl.sum(acc, axis=0), sem="relaxed")


def _dot_launch() -> tuple[int, int, int]:
    """``BLOCK``, ``BLOCKS`` a program, and warps."""
    # 8 warps: 16 elements of x and of y a thread and block, in loads of 16
    # bytes, and four blocks whose loads are under way together
    return 4096, 4, 8


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Dot product, with one atomic addition for every 16,384 elements.

    The additions come in any order: results differ in their last bits.

    Args:
        x: ``(n,)``, float16 or bfloat16, contiguous, on ``warpmap.DEVICE``.
        y: The same.

    Returns:
        A float32 number, of shape ``()``.

    Raises:
        ValueError: If the two differ, or are something else.

    Examples:
        >>> x = torch.full((100,), 0.5, dtype=torch.float16, device=DEVICE)
        >>> dot(x, x).item()
        25.0
    """
    _check_vectors(x, y)
    total = torch.zeros((), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return total
    BLOCK, BLOCKS, num_warps = _dot_launch()
    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        _dot_kernel[(triton.cdiv(x.numel(), BLOCK * BLOCKS),)](
            x,
            y,
            total,
            x.numel(),
            BLOCK=BLOCK,
            BLOCKS=BLOCKS,
            num_warps=num_warps,
        )
    return total


def dot_by(rung: str, x: Tensor, y: Tensor) -> Tensor:
    """The same in CUDA C++, by one rung of the ladder.

    Every rung has the same threads read the same elements, and adds up what a
    thread has read in float32. They differ in how threads put it together.

    Args:
        rung: One of ``RUNGS``.
        x: ``(n,)``, float16, contiguous, beginning on a multiple of 16 bytes,
            on a GPU.
        y: The same.

    Returns:
        A float32 number, of shape ``()``. The first three rungs keep the sum
        in float16 on the way, and lose what that cannot hold.

    Raises:
        ValueError: If the rung is unknown, or a vector something else.

    Examples:
        >>> dot_by("sum", torch.zeros(1), torch.zeros(1))
        Traceback (most recent call last):
        ValueError: expected half, half2, padded, float or block, got 'sum'
    """
    if rung not in RUNGS:
        *most, last = RUNGS
        raise ValueError(f"expected {', '.join(most)} or {last}, got {rung!r}")
    _check_vectors(x, y)
    if x.dtype != torch.float16:
        raise ValueError(f"expected float16, got {x.dtype}")
    if x.data_ptr() % 16 or y.data_ptr() % 16:
        raise ValueError(
            "expected vectors that begin on a multiple of 16 bytes, got "
            f"{x.data_ptr() % 16} and {y.data_ptr() % 16} beyond one"
        )
    if x.device.type != "cuda":
        raise ValueError(f"expected tensors on a GPU, got {x.device}")
    kernel, dtype, count = RUNGS[rung]
    sums = torch.zeros(count, dtype=dtype, device=x.device)
    # as many threads as the GPU holds: 2048 on a multiprocessor
    gpu = torch.cuda.get_device_properties(x.device)
    blocks = gpu.multi_processor_count * 2048 // THREADS
    kernel(blocks, THREADS, x, y, sums, x.numel())
    return sums.sum(dtype=torch.float32)


def add_at(out: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """Add each value to the number of ``out`` that its index names, in place.

    Indices may repeat. Each addition is rounded to the dtype, in any order.

    Args:
        out: ``(N,)``, float16 or bfloat16, contiguous, on ``warpmap.DEVICE``;
            it may begin anywhere, in the middle of 4 bytes too. Triton's
            interpreter, on the CPU, has no atomics of bfloat16.
        index: ``(n,)``, int64, contiguous. What is not in ``0 .. N - 1`` adds
            nothing: to look at indices first would make the CPU wait.
        value: ``(n,)``, as ``out``.

    Returns:
        ``out``.

    Raises:
        ValueError: If a tensor has another shape, dtype, layout or device.

    Examples:
        >>> out = torch.zeros(3, dtype=torch.float16, device=DEVICE)
        >>> index = torch.tensor([2, 0, 2], device=DEVICE)
        >>> add_at(out, index, torch.ones_like(out)).tolist()
        [1.0, 0.0, 2.0]
    """
    _check_addition(out, index, value, DTYPES)
    if out.dtype == torch.bfloat16 and out.device.type == "cpu":
        raise ValueError("expected float16 on the CPU, got torch.bfloat16")
    n, N = index.numel(), out.numel()
    if n == 0 or N == 0:
        return out
    BLOCK = 256
    with torch.cuda.device_of(out):
        _add_at_kernel[(triton.cdiv(n, BLOCK),)](
            out,
            index,
            value,
            out.data_ptr() // 2 % 2,
            n,
            N,
            BLOCK=BLOCK,
        )
    return out


def add_at_by(way: str, out: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """``add_at`` in CUDA C++, with one of three atomic additions.

    Args:
        way: ``"half"``, ``"padded"``, or ``"float"`` for float32 tensors.
        out: ``(N,)``, of the way's dtype, contiguous, on a GPU.
        index: ``(n,)``, int64, contiguous.
        value: ``(n,)``, as ``out``.

    Returns:
        ``out``.

    Raises:
        ValueError: If the way is unknown, or a tensor something else.

    Examples:
        >>> add_at_by("half2", torch.zeros(1), torch.zeros(1), torch.zeros(1))
        Traceback (most recent call last):
        ValueError: expected half, padded or float, got 'half2'
    """
    if way not in ADDS:
        raise ValueError(f"expected half, padded or float, got {way!r}")
    kernel, dtype = ADDS[way]
    _check_addition(out, index, value, (dtype,))
    if out.device.type != "cuda":
        raise ValueError(f"expected tensors on a GPU, got {out.device}")
    n = index.numel()
    if n:
        blocks = (n + THREADS - 1) // THREADS
        kernel(blocks, THREADS, out, index, value, n, out.numel())
    return out


def _check_vectors(x: Tensor, y: Tensor) -> None:
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(
            f"expected two vectors (n,), got {tuple(x.shape)} "
            f"and {tuple(y.shape)}"
        )
    if x.dtype not in DTYPES or y.dtype != x.dtype:
        raise ValueError(
            f"expected both in one of {DTYPES}, got {x.dtype} and {y.dtype}"
        )
    _check_place(x, y)


def _check_addition(
    out: Tensor, index: Tensor, value: Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:
    if out.ndim != 1 or index.ndim != 1 or index.shape != value.shape:
        raise ValueError(
            "expected out (N,), index (n,) and value (n,), got "
            f"{tuple(out.shape)}, {tuple(index.shape)}, {tuple(value.shape)}"
        )
    if out.dtype not in dtypes or value.dtype != out.dtype:
        raise ValueError(
            f"expected out and value in one of {dtypes}, got {out.dtype} "
            f"and {value.dtype}"
        )
    if index.dtype != torch.int64:
        raise ValueError(f"expected an index in int64, got {index.dtype}")
    _check_place(out, index, value)


def _check_place(*tensors: Tensor) -> None:
    for t in tensors:
        if t.device.type != DEVICE or t.device != tensors[0].device:
            raise ValueError(
                f"expected all on one device, {DEVICE}, got "
                f"{', '.join(str(t.device) for t in tensors)}"
            )
        if not t.is_contiguous():
            raise ValueError(
                f"expected contiguous tensors, got strides {t.stride()}: "
                "call .contiguous() first"
            )
