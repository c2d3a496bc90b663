"""Prefix sums of a long vector in one pass: each element read and written once.

A tile of the vector cannot finish before it knows the sum of all that lies
before it. Here tiles publish their sums on a board in memory, and look there
for those of others. The board has two levels, so that every sum is added up in
one fixed order: runs are equal to the last bit.

    traffic  2 N elements; a tile also reads about 1 KiB of the board, from L2
    error    at most depth(N) float32 additions lie on the way to a result
    limit    one vector; rows of a matrix of their own have `recurrence`

`recurrence` scans pairs: h[t] = a[t] h[t-1] + b[t], for each row of a matrix.

References: Merrill and Garland, 2016, https://research.nvidia.com/publication/\
2016-03_single-pass-parallel-prefix-scan-decoupled-look-back;
Blelloch, 1990, https://www.cs.cmu.edu/~guyb/papers/Ble93.pdf
"""

import torch
from torch import Tensor

from warpmap import DEVICE
from warpmap.kernels import tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int32)

# a word of the board: 32 bits of value under a bit that says it is there
READY = tl.constexpr(1 << 32)


@triton.jit
def _publish(ptr, value):
    word = value.to(tl.uint32, bitcast=True).to(tl.int64) | READY
    # value and flag in one word arrive together: nothing else to be ordered
    tl.atomic_xchg(ptr, word, sem="relaxed")


@triton.jit
def _await(ptrs, mask, DTYPE: tl.constexpr):
    # volatile: asks the L2 cache anew each time, where all SMs meet
    words = tl.load(ptrs, mask, other=READY, volatile=True)
    while tl.min(words, axis=0) < READY:
        words = tl.load(ptrs, mask, other=READY, volatile=True)
    values = words.to(tl.uint32).to(DTYPE, bitcast=True)
    return tl.sum(values, axis=0)  # in an order that does not change


@triton.jit(do_not_specialize=["tiles"])
def _scan_kernel(
    x_ptr,
    y_ptr,
    board_ptr,
    N,
    tiles,
    EXCLUSIVE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    WHOLE: tl.constexpr = x_ptr.dtype.element_ty == tl.int32
    DTYPE: tl.constexpr = tl.int32 if WHOLE else tl.float32
    sums_ptr = board_ptr  # of each tile
    starts_ptr = board_ptr + tiles  # what lies before each group of tiles

    # the place of the first start, 0, counts who has begun: whoever is waited
    # for has an earlier number, so it runs already
    tile = tl.atomic_add(starts_ptr, 1, sem="relaxed")
    first = tile * BLOCK
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + first + cols, cols < N - first, other=0).to(DTYPE)
    own = tl.sum(x, axis=0)
    _publish(sums_ptr + tile, own)
    inside = tl.cumsum(x, axis=0)  # while others publish theirs

    group = tile // GROUP
    others = group * GROUP + tl.arange(0, GROUP)
    before = _await(sums_ptr + others, others < tile, DTYPE)
    groups = group + tl.arange(0, 1)
    start = _await(starts_ptr + groups, groups > 0, DTYPE)
    before += start
    if tile % GROUP == GROUP - 1:
        _publish(starts_ptr + group + 1, before + own)

    y = inside + before
    if EXCLUSIVE:  # the same, one place further on
        tl.store(y_ptr + first + cols + 1, y, cols + 1 < N - first)
        if tile == 0:
            tl.store(y_ptr, 0.0)
    else:
        tl.store(y_ptr + first + cols, y, cols < N - first)


def _tile(N: int) -> tuple[int, int, int]:
    """``BLOCK``, ``GROUP`` and warps for a vector of ``N`` elements."""
    # 32 elements a thread: a program waits with its tile in registers, and
    # four on a multiprocessor have 64 KiB under way meanwhile
    BLOCK = min(4096, max(256, triton.next_power_of_2(N)))
    # the starts are a chain: a group must take longer to read than a link
    return BLOCK, 256, max(1, BLOCK // 1024)


@torch.library.custom_op("warpmap::scan", mutates_args=())
def _scan(x: Tensor, exclusive: bool) -> Tensor:
    y = torch.empty_like(x)
    N = x.numel()
    if N == 0:
        return y
    BLOCK, GROUP, num_warps = _tile(N)
    tiles = triton.cdiv(N, BLOCK)
    size = tiles + tiles // GROUP + 1
    board = torch.zeros(size, dtype=torch.int64, device=x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        _scan_kernel[(tiles,)](
            x,
            y,
            board,
            N,
            tiles,
            EXCLUSIVE=exclusive,
            BLOCK=BLOCK,
            GROUP=GROUP,
            num_warps=num_warps,
        )
    return y


def _keep_kind(ctx, inputs, output):
    ctx.exclusive = inputs[1]


# what torch.compile and autograd must know about the operator: an input is
# in all later sums, so its gradient is a scan from the end
_scan.register_fake(lambda x, exclusive: torch.empty_like(x))
_scan.register_autograd(
    lambda ctx, dy: (_scan(dy.flip(0), ctx.exclusive).flip(0), None),
    setup_context=_keep_kind,
)


def scan(x: Tensor, exclusive: bool = False) -> Tensor:
    """Sums of everything up to each element, with their gradient.

    Floats are added up in float32, in an order that depends on nothing but
    their number and alignment: every run gives the same bits. Sums of int32
    wrap around.

    Args:
        x: ``(N,)``, float32, float16, bfloat16 or int32, contiguous, on
            ``warpmap.DEVICE``.
        exclusive: Whether to leave the element itself out: the first is 0.

    Returns:
        ``(N,)``, same dtype.

    Raises:
        ValueError: If ``x`` has another shape, dtype, layout or device.

    Examples:
        >>> scan(torch.tensor([3, 1, 7, 0], device=DEVICE).int()).tolist()
        [3, 4, 11, 11]
    """
    if x.ndim != 1 or not x.is_contiguous():
        raise ValueError(
            f"expected a contiguous vector, got {tuple(x.shape)} "
            f"with strides {x.stride()}"
        )
    if x.dtype not in DTYPES:
        raise ValueError(f"expected one of {DTYPES}, got {x.dtype}")
    if x.device.type != DEVICE:
        raise ValueError(f"expected a tensor on {DEVICE}, got {x.device}")
    y: Tensor = _scan(x, exclusive)
    return y


def depth(N: int) -> int:
    """The most additions that one element goes through in ``scan``.

    Args:
        N: Elements.

    Examples:
        >>> depth(2**28)
        4862
    """
    BLOCK, GROUP, _ = _tile(N)
    # in a tile and in a group at worst one after another; then two a start
    return BLOCK - 1 + GROUP - 1 - 2 * (-N // (BLOCK * GROUP))


@triton.jit
def _compose(a, b, a_next, b_next):
    # h -> a h + b, and then h -> a_next h + b_next, are again such a step
    return a_next * a, a_next * b + b_next


@triton.jit
def _recurrence_kernel(
    a_ptr, b_ptr, h_ptr, stride_am, stride_bm, N, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    h = 0.0
    for first in range(0, N, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        # past the end, steps that change nothing
        a = tl.load(a_ptr + row * stride_am + cols, cols < N, other=1.0)
        b = tl.load(b_ptr + row * stride_bm + cols, cols < N, other=0.0)
        steps = (a.to(tl.float32), b.to(tl.float32))
        a_all, b_all = tl.associative_scan(steps, 0, _compose)
        hs = a_all * h + b_all
        tl.store(h_ptr + row * N + cols, hs, cols < N)
        h = tl.sum(tl.where(cols == first + BLOCK - 1, hs, 0.0), axis=0)


def recurrence(a: Tensor, b: Tensor) -> Tensor:
    """Solve ``h[t] = a[t] h[t-1] + b[t]`` along each row, from ``h = 0``.

    Up to 1,024 of the ``a`` are multiplied with each other. If that overflows
    float32, what follows is ``inf`` or ``nan``, even where a loop is finite.

    Args:
        a: ``(M, N)``, float32, float16 or bfloat16, each row contiguous.
        b: As ``a``.

    Returns:
        ``(M, N)``, same dtype. It has no gradient.

    Raises:
        ValueError: If ``a`` and ``b`` differ, or have another dtype, layout
            or device.

    Examples:
        >>> b = torch.ones(1, 4, device=DEVICE)
        >>> recurrence(b / 2, b).tolist()
        [[1.0, 1.5, 1.75, 1.875]]
    """
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        raise ValueError(
            f"expected equal shapes, dtypes and devices, got {tuple(a.shape)} "
            f"{a.dtype} {a.device} and {tuple(b.shape)} {b.dtype} {b.device}"
        )
    if a.ndim != 2 or any(
        t.numel() and t.shape[1] > 1 and t.stride(1) != 1 for t in (a, b)
    ):
        raise ValueError(
            f"expected contiguous rows (M, N), got {tuple(a.shape)} with "
            f"strides {a.stride()} and {b.stride()}"
        )
    if a.dtype not in DTYPES[:3] or a.device.type != DEVICE:
        raise ValueError(
            f"expected one of {DTYPES[:3]} on {DEVICE}, "
            f"got {a.dtype} on {a.device}"
        )
    if a.requires_grad or b.requires_grad:
        raise ValueError("expected no gradient to be asked for: a.detach()")
    h = a.new_empty(a.shape)
    M, N = a.shape
    if h.numel() == 0:
        return h
    BLOCK = min(1024, triton.next_power_of_2(N))
    with torch.cuda.device_of(a):
        _recurrence_kernel[(M,)](
            a,
            b,
            h,
            a.stride(0),
            b.stride(0),
            N,
            BLOCK=BLOCK,
            num_warps=max(1, BLOCK // 256),
        )
    return h
