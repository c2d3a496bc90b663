"""Nearest-neighbour upsampling that reads an image once, in both directions.

Images lie in memory as planes of pixels: ``N * C`` planes with one number a
pixel (channels first), or ``N`` planes with ``C`` numbers a pixel (channels
last). Both are ``(planes, H, W, D)``.

    repeat   whole scales, D = 1: a pixel is loaded once, stored SH SW times
    gather   any sizes, any D: a pixel of the large image finds its source,
             and in the gradient a pixel of the small one all that found it
    traffic  the small image and the large one, once each

Reference: PyTorch's float32 rule for the source of a pixel,
https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/cuda/UpSample.cuh
"""

from typing import Any

import torch
from torch import Tensor

from warpmap import DEVICE
from warpmap.kernels import tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# products of two sizes fit 32 bits, and float32 finds sources within a pixel
MAX_SIZE = 1 << 15

# scales of the repeat kernels: a tile's width is a power of two
REPEATED_ROWS = range(1, 9)
REPEATED_COLUMNS = (1, 2, 4, 8)

# up to here float32 finds i // scale; 41 times 1 / 41 is less than 1
MAX_EXACT_SCALE = 40


def source_index(size: int, new_size: int) -> Tensor:
    """Which pixel each pixel of a new row or column comes from.

    The factor and the product are rounded to float32, as in PyTorch.

    Args:
        size: Pixels there are.
        new_size: Pixels wanted.

    Returns:
        ``(new_size,)``, int64, on the CPU, from 0 to ``size - 1``.

    Examples:
        >>> source_index(2, 5).tolist()
        [0, 0, 0, 1, 1]
    """
    scale = torch.tensor(size, dtype=torch.float32) / new_size
    steps = torch.arange(new_size, dtype=torch.float32)
    return (steps * scale).floor().long().clamp(max=size - 1)


def upsample_nearest_reference(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Pick the rows, then the columns, as PyTorch indexing.

    Args:
        x: ``(N, C, H, W)``.
        size: The new height and width.

    Returns:
        ``(N, C, *size)``, same dtype.

    Examples:
        >>> upsample_nearest_reference(torch.eye(2)[None, None], (2, 4))
        tensor([[[[1., 1., 0., 0.],
                  [0., 0., 1., 1.]]]])
    """
    rows = source_index(x.shape[2], size[0]).to(x.device)
    columns = source_index(x.shape[3], size[1]).to(x.device)
    return x[:, :, rows][:, :, :, columns]


@triton.jit
def _repeat_places(
    pixels,
    W,
    SH: tl.constexpr,
    SW: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGE: tl.constexpr,
):
    """A tile's pixels, and where the first copies of its rows are.

    Whole scales keep rows in order, so pixels are counted through all planes.
    """
    first = tl.program_id(0)
    if LARGE:  # a division of 64 bits takes a hundred instructions
        first = first.to(tl.int64)
    first *= BLOCK
    p = first + tl.arange(0, BLOCK)
    row = first // W
    W_out = W * SW
    # counted from the beginning of that row, each pixel SW times
    q = ((first - row * W) * SW).to(tl.int32) + tl.arange(0, BLOCK * SW)
    # every row that ends leaves room for its other SH - 1 copies
    q += q // W_out * ((SH - 1) * W_out)
    q = row.to(tl.int64) * (SH * W_out) + q
    mask = tl.arange(0, BLOCK * SW) < (pixels - first) * SW
    return p, p < pixels, q, mask, W_out


@triton.jit
def _repeat_fwd_kernel(
    x_ptr,
    y_ptr,
    pixels,
    W,
    SH: tl.constexpr,
    SW: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGE: tl.constexpr,
):
    p, mask_p, q, mask_q, W_out = _repeat_places(
        pixels, W, SH, SW, BLOCK, LARGE
    )
    x = tl.load(x_ptr + p, mask_p)
    # copies side by side, in the registers of the thread that has the pixel
    y = tl.reshape(tl.broadcast_to(x[:, None], (BLOCK, SW)), (BLOCK * SW,))
    for r in tl.static_range(SH):
        tl.store(y_ptr + q + r * W_out, y, mask_q)


@triton.jit
def _repeat_bwd_kernel(
    dy_ptr,
    dx_ptr,
    pixels,
    W,
    SH: tl.constexpr,
    SW: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGE: tl.constexpr,
):
    p, mask_p, q, mask_q, W_out = _repeat_places(
        pixels, W, SH, SW, BLOCK, LARGE
    )
    rows = tl.zeros((BLOCK * SW,), tl.float32)
    for r in tl.static_range(SH):
        dy = tl.load(dy_ptr + q + r * W_out, mask_q, other=0.0)
        rows += dy.to(tl.float32)
    dx = tl.sum(tl.reshape(rows, (BLOCK, SW)), axis=1)
    tl.store(dx_ptr + p, dx, mask_p)


@triton.jit
def _source(i, scale, size):
    """PyTorch's rule: one product in float32, rounded down."""
    source = tl.floor(i.to(tl.float32) * scale).to(tl.int32)
    return tl.minimum(source, size - 1)


@triton.jit
def _plane_tile(pixels, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """The plane, and a tile of its pixels with their numbers."""
    tiles = tl.cdiv(pixels, BLOCK)
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    p = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = p < pixels
    if BLOCK_D > 1:
        d += tl.program_id(1) * BLOCK_D
        mask = mask & (d < D)
    return plane, p, d, mask


@triton.jit
def _gather_fwd_kernel(
    x_ptr,
    y_ptr,
    H,
    W,
    H_out,
    W_out,
    D,
    scale_h,
    scale_w,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    plane, q, d, mask = _plane_tile(H_out * W_out, D, BLOCK, BLOCK_D)
    h = _source(q // W_out, scale_h, H)
    w = _source(q % W_out, scale_w, W)
    x = tl.load(x_ptr + (plane * (H * W) + h * W + w) * D + d, mask)
    tl.store(y_ptr + (plane * (H_out * W_out) + q) * D + d, x, mask)


@triton.jit
def _gather_bwd_kernel(
    dy_ptr,
    dx_ptr,
    H,
    W,
    H_out,
    W_out,
    D,
    scale_h,
    scale_w,
    SLACK: tl.constexpr,
    MOST_H: tl.constexpr,
    MOST_W: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    plane, p, d, mask = _plane_tile(H * W, D, BLOCK, BLOCK_D)
    h, w = p // W, p % W
    # rounding moves the first by at most one: begin there, and ask
    first_h = tl.cdiv(h * H_out, H) - SLACK
    first_w = tl.cdiv(w * W_out, W) - SLACK
    acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for r in range(MOST_H):
        row = first_h + r
        mine = (row >= 0) & (row < H_out) & (_source(row, scale_h, H) == h)
        for c in range(MOST_W):
            col = first_w + c
            mine_too = (col >= 0) & (col < W_out)
            mine_too = mine_too & (_source(col, scale_w, W) == w)
            q = plane * (H_out * W_out) + row * W_out + col
            here = mask & mine & mine_too
            dy = tl.load(dy_ptr + q * D + d, here, other=0.0)
            acc += dy.to(tl.float32)
    tl.store(dx_ptr + (plane * (H * W) + p) * D + d, acc, mask)


NUM_WARPS = 4


def _tile(itemsize: int, packs: int = 1) -> int:
    """Numbers of the large image in a tile: packs of 16 bytes a thread."""
    return 32 * NUM_WARPS * packs * 16 // itemsize


def _layout(x: Tensor) -> torch.memory_format:
    """Channels last only where that differs from channels first."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    if last and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def _whole(size: int, new_size: int) -> int:
    """The scale, if it is a whole number that float32 gets right; else 0."""
    scale = new_size // size
    exact = scale * size == new_size and scale <= MAX_EXACT_SCALE
    return scale if exact else 0


def _repeat(small: Tensor, large: Tensor, backward: bool) -> None:
    H, W = small.shape[2:]
    SH, SW = _whole(H, large.shape[2]), _whole(W, large.shape[3])
    BLOCK = _tile(small.itemsize) // SW
    kernel = _repeat_bwd_kernel if backward else _repeat_fwd_kernel
    kernel[(triton.cdiv(small.numel(), BLOCK),)](
        *((large, small) if backward else (small, large)),
        small.numel(),
        W,
        SH=SH,
        SW=SW,
        BLOCK=BLOCK,
        LARGE=large.numel() >= 2**31 - _tile(small.itemsize),
        num_warps=NUM_WARPS,
    )


def _gather(small: Tensor, large: Tensor, backward: bool) -> None:
    N, C, H, W = small.shape
    H_out, W_out = large.shape[2:]
    last = _layout(large) == torch.channels_last
    planes, D = (N, C) if last else (N * C, 1)
    # forward a thread waits for one load a pack: two packs, two under way;
    # backward it has several loads a pack
    numbers = _tile(small.itemsize, packs=1 if backward else 2)
    BLOCK_D = min(triton.next_power_of_2(D), numbers)
    BLOCK = numbers // BLOCK_D
    tiles = triton.cdiv(H * W if backward else H_out * W_out, BLOCK)
    grid = planes * tiles, triton.cdiv(D, BLOCK_D)
    # quotients of float32, as PyTorch has them
    one = torch.tensor(1, dtype=torch.float32)
    scales = [(one * a / b).item() for a, b in ((H, H_out), (W, W_out))]
    sizes = H, W, H_out, W_out, D
    tile = {"BLOCK": BLOCK, "BLOCK_D": BLOCK_D, "num_warps": NUM_WARPS}
    if not backward:
        _gather_fwd_kernel[grid](small, large, *sizes, *scales, **tile)
        return
    SLACK = 0 if _whole(H, H_out) and _whole(W, W_out) else 1
    _gather_bwd_kernel[grid](
        large,
        small,
        *sizes,
        *scales,
        SLACK=SLACK,
        MOST_H=triton.cdiv(H_out, H) + 2 * SLACK,
        MOST_W=triton.cdiv(W_out, W) + 2 * SLACK,
        **tile,
    )


def _launch(small: Tensor, large: Tensor, backward: bool) -> None:
    """Choose the kernel: from small to large, or backward to the small."""
    if small.numel() == 0:
        return
    SH = _whole(small.shape[2], large.shape[2])
    SW = _whole(small.shape[3], large.shape[3])
    one_a_pixel = _layout(large) == torch.contiguous_format
    repeated = SH in REPEATED_ROWS and SW in REPEATED_COLUMNS
    with torch.cuda.device_of(small):  # Triton launches on the current GPU
        run = _repeat if one_a_pixel and repeated else _gather
        run(small, large, backward)


@torch.library.custom_op("warpmap::upsample_nearest", mutates_args=())
def _upsample(x: Tensor, H: int, W: int) -> Tensor:
    y = _empty(x, H, W)
    _launch(x, y, backward=False)
    return y


@torch.library.custom_op("warpmap::upsample_nearest_backward", mutates_args=())
def _upsample_backward(dy: Tensor, H: int, W: int) -> Tensor:
    dx = _empty(dy, H, W)
    _launch(dx, dy, backward=True)
    return dx


def _empty(x: Tensor, H: int, W: int) -> Tensor:
    shape = (*x.shape[:2], H, W)
    return torch.empty(
        shape, dtype=x.dtype, device=x.device, memory_format=_layout(x)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x = inputs[0]
    ctx.size, ctx.layout = x.shape[2:], _layout(x)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    dy = dy.contiguous(memory_format=ctx.layout)
    return _upsample_backward(dy, *ctx.size), None, None


# what torch.compile and autograd must know about the two operators
_upsample.register_fake(_empty)
_upsample_backward.register_fake(_empty)
_upsample.register_autograd(_gradient, setup_context=_setup_context)


def upsample_nearest(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge images by repeating pixels, with its gradient.

    Equal to ``F.interpolate(x, size, mode="nearest")``, bit for bit.

    Args:
        x: ``(N, C, H, W)``, float32, float16 or bfloat16, on
            ``warpmap.DEVICE``, channels first or channels last.
        size: The new height and width, ``H`` and ``W`` at least.

    Returns:
        ``(N, C, *size)``, same dtype and layout.

    Raises:
        ValueError: If ``x`` has another shape, dtype, layout or device, or
            ``size`` is smaller or above ``MAX_SIZE``.

    Examples:
        >>> x = torch.tensor([[[[1.0, 2.0]]]], device=DEVICE)
        >>> upsample_nearest(x, (2, 4))[0, 0].tolist()
        [[1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0]]
    """
    if x.ndim != 4:
        raise ValueError(f"expected images (N, C, H, W), got {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"expected one dtype of {DTYPES}, got {x.dtype}")
    if x.device.type != DEVICE:
        raise ValueError(f"expected a tensor on {DEVICE}, got {x.device}")
    if not x.is_contiguous(memory_format=_layout(x)):
        raise ValueError(
            "expected images contiguous or channels_last, "
            f"got strides {x.stride()}"
        )
    H, W = size
    if min(x.shape[2:]) < 1:
        raise ValueError(f"expected pixels, got images {tuple(x.shape)}")
    if not (x.shape[2] <= H <= MAX_SIZE and x.shape[3] <= W <= MAX_SIZE):
        raise ValueError(
            f"size must be from {tuple(x.shape[2:])} to {MAX_SIZE}, "
            f"got {(H, W)}"
        )
    y: Tensor = _upsample(x, H, W)
    return y
