"""Add rows to the rows that an index names: at once, or sorted and in order.

Rows may share a destination. Atomic additions let them arrive in any order,
and round each time one does. Sorting the indices first brings the rows of a
destination together: one program adds them up in float32, always in the same
order, and stores once.

    traffic  the source once; with atomics each of its elements is added to
             out in the L2 cache; sorted, out is read and written once, and
             the indices are sorted
    limit    atomics are not reproducible; sorted, a destination that gets
             most of the rows keeps one program busy with all of them

Both are registered as PyTorch operators, in place, and together as one that
returns a new tensor and has a gradient: a gather.
"""

import torch
from torch import Tensor

from warpmap import DEVICE
from warpmap.kernels import tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_COLS = 65535 * 64  # a grid has at most 65535 strips side by side


@triton.jit(debug=True)  # or the assertion is left out
def _index_add_kernel(
    out_ptr,
    index_ptr,
    source_ptr,
    stride_om,
    stride_sm,
    M,
    N,
    C,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # 64-bit: row * stride overflows 32 bits on a large matrix
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    index = tl.load(index_ptr + rows, rows < M, other=0).to(tl.int64)
    known = (index >= 0) & (index < N)
    tl.device_assert(known, "index out of range")
    mask = ((rows < M) & known)[:, None] & (cols < C)

    # the source is read once: what the L2 cache should keep is out
    x = tl.load(
        source_ptr + rows[:, None] * stride_sm + cols,
        mask,
        eviction_policy="evict_first",
    )
    # relaxed: no addition has to wait for another to be seen
    tl.atomic_add(
        out_ptr + index[:, None] * stride_om + cols, x, mask, sem="relaxed"
    )


@triton.jit(debug=True)
def _segment_add_kernel(
    out_ptr,
    starts_ptr,
    order_ptr,
    source_ptr,
    stride_om,
    stride_sm,
    M,
    N,
    C,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = tl.load(starts_ptr + row)
    end = tl.load(starts_ptr + row + 1)
    # sorted, what is out of range lies before the first or after the last
    tl.device_assert((row > 0) | (begin == 0), "index out of range")
    tl.device_assert((row < N - 1) | (end == M), "index out of range")

    if begin < end:
        out_ptrs = out_ptr + row * stride_om + cols
        acc = tl.load(out_ptrs, cols < C, other=0.0).to(tl.float32)
        for first in range(begin, end, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            rows = tl.load(order_ptr + k, k < end, other=0)
            x = tl.load(
                source_ptr + rows[:, None] * stride_sm + cols[None, :],
                (k < end)[:, None] & (cols < C)[None, :],
                other=0.0,
            )
            acc += tl.sum(x.to(tl.float32), axis=0)
        tl.store(out_ptrs, acc, cols < C)


def _atomic_tile(C: int) -> tuple[int, int, int]:
    """``BLOCK_M``, ``BLOCK_C`` and warps for rows of ``C`` elements."""
    # a strip of 64 columns: of 128k rows in 16 bits 16 MiB, which the L2
    # cache of a Hopper GPU holds, and 128 bytes of each row at a time
    BLOCK_C = min(64, triton.next_power_of_2(C))
    return 4096 // BLOCK_C, BLOCK_C, 4


def _segment_tile(C: int) -> tuple[int, int, int]:
    """``BLOCK_K``, ``BLOCK_C`` and warps for rows of ``C`` elements."""
    # sixteen rows are under way at once; a warp takes 256 columns of 16 bits
    # in loads of 16 bytes
    BLOCK_C = min(1024, triton.next_power_of_2(C))
    return 16, BLOCK_C, max(1, BLOCK_C // 256)


def _check_apart(out: Tensor, source: Tensor) -> None:
    """Refuse a source that is read where the output is written."""
    ends = []
    for t in (out, source):
        steps = zip(t.shape, t.stride(), strict=True)
        last = sum((size - 1) * stride for size, stride in steps)
        ends.append((t.data_ptr(), t.data_ptr() + last * t.itemsize))
    if ends[0][0] <= ends[1][1] and ends[1][0] <= ends[0][1]:
        raise ValueError(
            "expected source apart from out in memory: call source.clone() "
            "first"
        )


@torch.library.custom_op("warpmap::index_add_", mutates_args={"out"})
def _index_add_(out: Tensor, index: Tensor, source: Tensor) -> None:
    (N, C), M = out.shape, index.numel()
    _check_range(index, N)
    if source.numel() == 0:
        return
    _check_apart(out, source)
    BLOCK_M, BLOCK_C, num_warps = _atomic_tile(C)
    grid = (triton.cdiv(M, BLOCK_M), triton.cdiv(C, BLOCK_C))
    with torch.cuda.device_of(out):  # Triton launches on the current GPU
        _index_add_kernel[grid](
            out,
            index,
            source,
            out.stride(0),
            source.stride(0),
            M,
            N,
            C,
            BLOCK_M=BLOCK_M,
            BLOCK_C=BLOCK_C,
            num_warps=num_warps,
            sanitize_overflow=False,  # asserts are for the index alone
        )


@torch.library.custom_op("warpmap::index_add_sorted_", mutates_args={"out"})
def _index_add_sorted_(out: Tensor, index: Tensor, source: Tensor) -> None:
    (N, C), M = out.shape, index.numel()
    _check_range(index, N)
    if source.numel() == 0:
        return
    _check_apart(out, source)
    # 32 bits take half the passes; clamped, what is out of range stays so
    keys, order = index.clamp(-1, N).int().sort(stable=True)
    rows = torch.arange(N + 1, dtype=torch.int32, device=out.device)
    starts = torch.searchsorted(keys, rows)
    BLOCK_K, BLOCK_C, num_warps = _segment_tile(C)
    with torch.cuda.device_of(out):
        _segment_add_kernel[(N, triton.cdiv(C, BLOCK_C))](
            out,
            starts,
            order,
            source,
            out.stride(0),
            source.stride(0),
            M,
            N,
            C,
            BLOCK_K=BLOCK_K,
            BLOCK_C=BLOCK_C,
            num_warps=num_warps,
            sanitize_overflow=False,
        )


@torch.library.custom_op("warpmap::index_add", mutates_args=())
def _index_add(
    x: Tensor, index: Tensor, source: Tensor, deterministic: bool
) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    (_index_add_sorted_ if deterministic else _index_add_)(out, index, source)
    return out


# what torch.compile and autograd must know about the operators
_index_add_.register_fake(lambda out, index, source: None)
_index_add_sorted_.register_fake(lambda out, index, source: None)
_index_add.register_fake(lambda x, *_: x.new_empty(x.shape))
_index_add.register_autograd(
    lambda ctx, dy: (dy, None, dy.index_select(0, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
)


def index_add_(out: Tensor, index: Tensor, source: Tensor) -> Tensor:
    """Add each row of ``source`` to the row of ``out`` that its index names.

    In place, with atomic additions: rows arrive in any order, so results may
    differ in their last bits from run to run.

    Args:
        out: ``(N, C)``, float32, float16 or bfloat16, on ``warpmap.DEVICE``.
            Each row is contiguous, and rows do not overlap; ``C`` is at most
            ``MAX_COLS``. Triton's interpreter, on the CPU, has no atomics of
            bfloat16.
        index: ``(M,)``, int64 or int32, from 0 to ``N - 1``, in any order and
            as often as may be. On a GPU a kernel checks it, and stops.
        source: ``(M, C)``, same dtype, each row contiguous, apart from ``out``
            in memory.

    Returns:
        ``out``.

    Raises:
        ValueError: If a tensor has another shape, dtype, layout or device, or
            needs a gradient, which ``index_add`` has; on the CPU, if an index
            is out of range.

    Examples:
        >>> out = torch.zeros(3, 2, device=DEVICE)
        >>> index = torch.tensor([2, 0, 2], device=DEVICE)
        >>> index_add_(out, index, torch.ones(3, 2, device=DEVICE)).tolist()
        [[1.0, 1.0], [0.0, 0.0], [2.0, 2.0]]
    """
    _check(out, index, source, in_place=True)
    _check_atomics(out)
    _index_add_(out, index.contiguous(), source)
    return out


def index_add_sorted_(out: Tensor, index: Tensor, source: Tensor) -> Tensor:
    """The same, bit for bit equal from run to run, rounded to the dtype once.

    The rows of a destination are added up in float32, in the order in which
    they stand in ``source``, sixteen at a time.

    Args:
        out: ``(N, C)``, as for ``index_add_``, bfloat16 on the CPU too; ``N``
            is less than ``2**31 - 1``.
        index: ``(M,)``, as for ``index_add_``.
        source: ``(M, C)``, as for ``index_add_``.

    Returns:
        ``out``.

    Raises:
        ValueError: As ``index_add_``.

    Examples:
        >>> out = torch.zeros(3, 2, device=DEVICE)
        >>> index = torch.tensor([2, 0, 2], device=DEVICE)
        >>> ones = torch.ones(3, 2, device=DEVICE)
        >>> index_add_sorted_(out, index, ones).tolist()
        [[1.0, 1.0], [0.0, 0.0], [2.0, 2.0]]
    """
    _check(out, index, source, in_place=True)
    _index_add_sorted_(out, index.contiguous(), source)
    return out


def index_add(
    x: Tensor, index: Tensor, source: Tensor, deterministic: bool = False
) -> Tensor:
    """A copy of ``x`` with rows added, with its gradient.

    Args:
        x: ``(N, C)``, as ``out`` of ``index_add_``.
        index: ``(M,)``, as for ``index_add_``.
        source: ``(M, C)``, as for ``index_add_``.
        deterministic: Whether to sort, as ``index_add_sorted_``.

    Returns:
        ``(N, C)``, same dtype, contiguous.

    Raises:
        ValueError: As ``index_add_``, but for gradients.

    Examples:
        >>> x = torch.ones(2, 1, device=DEVICE)
        >>> index = torch.tensor([1, 1], device=DEVICE)
        >>> index_add(x, index, x).tolist()
        [[1.0], [3.0]]
    """
    _check(x, index, source, in_place=False)
    if not deterministic:
        _check_atomics(x)
    y: Tensor = _index_add(x, index.contiguous(), source, deterministic)
    return y


def _check(
    out: Tensor, index: Tensor, source: Tensor, *, in_place: bool
) -> None:
    if (
        out.ndim != 2
        or index.ndim != 1
        or source.shape != (index.shape[0], out.shape[1])
    ):
        raise ValueError(
            "expected out (N, C), index (M,) and source (M, C), got "
            f"{tuple(out.shape)}, {tuple(index.shape)}, {tuple(source.shape)}"
        )
    N, C = out.shape
    if out.dtype not in DTYPES or source.dtype != out.dtype:
        raise ValueError(
            f"expected out and source in one of {DTYPES}, got {out.dtype} "
            f"and {source.dtype}"
        )
    if index.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"expected an index in int64 or int32, got {index.dtype}"
        )
    if out.device.type != DEVICE or not (
        out.device == index.device == source.device
    ):
        raise ValueError(
            f"expected all on one device, {DEVICE}, got {out.device}, "
            f"{index.device}, {source.device}"
        )
    if N >= 2**31 - 1:
        raise ValueError(f"expected less than 2**31 - 1 rows, got {N}")
    if C > MAX_COLS:
        raise ValueError(f"expected at most {MAX_COLS} columns, got {C}")
    for t in (out, source):
        if t.shape[0] > 0 and C > 1 and t.stride(1) != 1:
            raise ValueError(
                f"expected contiguous rows, got strides {t.stride()}: "
                "call .contiguous() first"
            )
    if in_place and N > 1 and out.stride(0) < C:
        raise ValueError(
            f"expected rows of out that do not overlap, got strides "
            f"{out.stride()}"
        )
    if (
        in_place
        and torch.is_grad_enabled()
        and (out.requires_grad or source.requires_grad)
    ):
        raise ValueError(
            "in place there is no gradient, got tensors that need one: "
            "call index_add, or do it under torch.no_grad()"
        )


def _check_atomics(out: Tensor) -> None:
    if out.dtype == torch.bfloat16 and out.device.type == "cpu":
        raise ValueError(
            "expected float32 or float16 on the CPU, got torch.bfloat16: "
            "Triton's interpreter cannot add it atomically; sort instead"
        )


def _check_range(index: Tensor, N: int) -> None:
    """Where that does not make the CPU wait; on a GPU the kernels assert."""
    if index.numel() and (N == 0 or index.device.type == "cpu"):
        low, high = (int(i) for i in index.aminmax())
        if low < 0 or high >= N:
            raise ValueError(
                f"expected indices from 0 to {N - 1}, got {low} to {high}"
            )
