"""Rotary embedding of queries and keys in one launch.

Each pair of entries of a head turns by an angle that grows with the token's
position. Here one program holds all heads of a token, so that its cosines and
sines are loaded once.

    traffic  queries and keys once in, once out, and the tables; the
             reference, from bf16, moves 13 times as much
    backward the same kernel, turning the other way

Reference: Su et al., 2021, https://arxiv.org/abs/2104.09864
"""

from typing import Any

import torch
from torch import Tensor

from warpmap import DEVICE
from warpmap.kernels import tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def rope_cache(
    S: int, R: int, base: float = 10000.0, device: str | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for every position and pair.

    Pair ``i`` turns by ``base ** (-2 i / R)`` radians a token. Angles are in
    float64: at position 10**6 the steps between float32 numbers are 0.06
    radians wide. What is stored lies in [-1, 1], where float32 is enough.

    Args:
        S: How many positions, from 0.
        R: How many entries of a head turn; even.
        base: Sets the slowest turn; 500000 in Llama 3.
        device: Where to put them; default: ``warpmap.DEVICE``.

    Returns:
        Two tables ``(S, R / 2)``, float32.

    Raises:
        ValueError: If ``R`` is odd or not positive.

    Examples:
        >>> cos, sin = rope_cache(2, 4)
        >>> cos.shape, cos[0].tolist(), sin[0].tolist()
        (torch.Size([2, 2]), [1.0, 1.0], [0.0, 0.0])
    """
    if R < 2 or R % 2:
        raise ValueError(f"R must be even and at least 2, got {R}")
    device = device or DEVICE
    pairs = torch.arange(0, R, 2, dtype=torch.float64, device=device)
    positions = torch.arange(S, dtype=torch.float64, device=device)
    angles = torch.outer(positions, base ** (-pairs / R))
    return angles.cos().float(), angles.sin().float()


def interleave(R: int) -> list[int]:
    """Where each entry of the interleaved layout stands in the half-split one.

    Examples:
        >>> interleave(6)
        [0, 3, 1, 4, 2, 5]
    """
    return [i + half for i in range(R // 2) for half in (0, R // 2)]


def rope_reference(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Rotary embedding of one tensor, one step at a time, in float32.

    Args:
        x: ``(B, T, H, D)``.
        cos: ``(S, R / 2)``, with ``R`` at most ``D``: the first ``R`` entries
            of a head turn.
        sin: The same.
        positions: ``(T,)`` or ``(B, T)``; default: 0, 1, 2 and so on.
        interleaved: Whether a pair is two neighbours, or lies ``R / 2`` apart.

    Returns:
        Shape and dtype of ``x``.

    Examples:
        >>> cos, sin = torch.tensor([[0.0]]), torch.tensor([[1.0]])
        >>> x = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 1, 3)
        >>> rope_reference(x, cos, sin).flatten().tolist()  # a quarter turn
        [-2.0, 1.0, 3.0]
    """
    rows = slice(x.shape[1]) if positions is None else positions
    cos, sin = cos[rows].unsqueeze(-2), sin[rows].unsqueeze(-2)
    R = 2 * cos.shape[-1]
    pairs = x[..., :R].float()
    if interleaved:
        a, b = pairs[..., 0::2], pairs[..., 1::2]
    else:
        a, b = pairs[..., : R // 2], pairs[..., R // 2 :]
    turned = a * cos - b * sin, b * cos + a * sin
    if interleaved:
        y = torch.stack(turned, dim=-1).flatten(-2)
    else:
        y = torch.cat(turned, dim=-1)
    return torch.cat((y.to(x.dtype), x[..., R:]), dim=-1)


@triton.jit
def _load_pairs(
    x_ptrs, mask, R: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):
    cols = tl.arange(0, HALF)[None, :]
    if INTERLEAVED:
        # a head in one piece, for wide loads; neighbours part in registers
        both = tl.arange(0, 2 * HALF)[None, :]
        x = tl.load(x_ptrs + both, mask & (both < R)).to(tl.float32)
        a, b = tl.split(x.reshape(x.shape[0], HALF, 2))
    else:
        mask = mask & (cols < R // 2)
        a = tl.load(x_ptrs + cols, mask).to(tl.float32)
        b = tl.load(x_ptrs + cols + R // 2, mask).to(tl.float32)
    return a, b


@triton.jit
def _store_turned(
    y_ptrs,
    a,
    b,
    cos,
    sin,
    mask,
    R: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    turned_a = a * cos - b * sin
    turned_b = b * cos + a * sin
    cols = tl.arange(0, HALF)[None, :]
    if INTERLEAVED:
        both = tl.arange(0, 2 * HALF)[None, :]
        y = tl.join(turned_a, turned_b).reshape(a.shape[0], 2 * HALF)
        tl.store(y_ptrs + both, y, mask & (both < R))
    else:
        mask = mask & (cols < R // 2)
        tl.store(y_ptrs + cols, turned_a, mask)
        tl.store(y_ptrs + cols + R // 2, turned_b, mask)


@triton.jit
def _rope_kernel(
    q_ptr,
    k_ptr,
    yq_ptr,
    yk_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,  # or None
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_pb,
    stride_pt,
    T,
    S,
    H: tl.constexpr,
    Hkv: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HKV: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    # 64-bit: token * stride overflows 32 bits in a large tensor
    token = tl.program_id(0).to(tl.int64)
    b, t = token // T, token % T
    heads = tl.arange(0, BLOCK_H)[:, None].to(tl.int64)
    kv_heads = tl.arange(0, BLOCK_HKV)[:, None].to(tl.int64)
    q_ptrs = q_ptr + b * stride_qb + t * stride_qt + heads * stride_qh
    k_ptrs = k_ptr + b * stride_kb + t * stride_kt + kv_heads * stride_kh
    yq_ptrs = yq_ptr + (token * H + heads) * D
    yk_ptrs = yk_ptr + (token * Hkv + kv_heads) * D
    q_mask, k_mask = heads < H, kv_heads < Hkv

    # all loads stand before the first store: they are under way together
    q_a, q_b = _load_pairs(q_ptrs, q_mask, R, HALF, INTERLEAVED)
    k_a, k_b = _load_pairs(k_ptrs, k_mask, R, HALF, INTERLEAVED)
    if R < D:
        rest = R + tl.arange(0, REST)[None, :]
        q_rest = tl.load(q_ptrs + rest, q_mask & (rest < D))
        k_rest = tl.load(k_ptrs + rest, k_mask & (rest < D))

    position = t
    if positions_ptr is not None:
        p_ptr = positions_ptr + b * stride_pb + t * stride_pt
        position = tl.load(p_ptr).to(tl.int64)
    pairs = tl.arange(0, HALF)[None, :]
    offsets = position * (R // 2) + pairs
    # a position that the tables do not have turns into nan
    known = (pairs < R // 2) & (position >= 0) & (position < S)
    cos = tl.load(cos_ptr + offsets, known, other=float("nan"))
    sin = tl.load(sin_ptr + offsets, known, other=float("nan"))
    if INVERSE:
        sin = -sin

    _store_turned(yq_ptrs, q_a, q_b, cos, sin, q_mask, R, HALF, INTERLEAVED)
    _store_turned(yk_ptrs, k_a, k_b, cos, sin, k_mask, R, HALF, INTERLEAVED)
    if R < D:
        tl.store(yq_ptrs + rest, q_rest, q_mask & (rest < D))
        tl.store(yk_ptrs + rest, k_rest, k_mask & (rest < D))


def _tile(H: int, Hkv: int, D: int, R: int) -> dict[str, int]:
    """Blocks that hold all heads of a token, and warps."""
    BLOCK_H, BLOCK_HKV, HALF, REST = (
        triton.next_power_of_2(max(1, n)) for n in (H, Hkv, R // 2, D - R)
    )
    pairs = max(BLOCK_H, BLOCK_HKV) * HALF
    return {
        "BLOCK_H": BLOCK_H,
        "BLOCK_HKV": BLOCK_HKV,
        "HALF": HALF,
        "REST": REST,
        # with fewer threads than numbers in a table row the compiler lays
        # pairs out anew, by way of shared memory
        "num_warps": 2 if pairs <= 1024 else 8,
    }


def _rows(x: Tensor) -> Tensor:
    """``x`` with heads in one piece; gradients may come in any layout."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@torch.library.custom_op("warpmap::rope", mutates_args=())
def _rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    B, T, H, D = q.shape
    Hkv, (S, half) = k.shape[2], cos.shape
    q, k = _rows(q), _rows(k)
    yq, yk = q.new_empty(q.shape), k.new_empty(k.shape)
    if B * T == 0:
        return yq, yk
    stride_pb = stride_pt = 0
    if positions is not None:
        positions = positions.expand(B, T)
        stride_pb, stride_pt = positions.stride()
    with torch.cuda.device_of(q):  # Triton launches on the current GPU
        _rope_kernel[(B * T,)](
            q,
            k,
            yq,
            yk,
            cos,
            sin,
            positions,
            *q.stride()[:3],
            *k.stride()[:3],
            stride_pb,
            stride_pt,
            T,
            S,
            H=H,
            Hkv=Hkv,
            D=D,
            R=2 * half,
            INTERLEAVED=interleaved,
            INVERSE=inverse,
            **_tile(H, Hkv, D, 2 * half),
        )
    return yq, yk


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, cos, sin, positions, interleaved, inverse = inputs
    ctx.save_for_backward(cos, sin, positions)
    ctx.turn = interleaved, not inverse


def _turn_back(ctx: Any, dyq: Tensor, dyk: Tensor) -> tuple[Any, ...]:
    return *_rope(dyq, dyk, *ctx.saved_tensors, *ctx.turn), *[None] * 5


# what torch.compile and autograd must know about the operator
_rope.register_fake(
    lambda q, k, *rest: (q.new_empty(q.shape), k.new_empty(k.shape))
)
_rope.register_autograd(_turn_back, setup_context=_keep)


def _check(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None
) -> None:
    if (
        q.ndim != 4
        or k.ndim != 4
        or q.shape[:2] + q.shape[3:] != (k.shape[:2] + k.shape[3:])
    ):
        raise ValueError(
            "expected q (B, T, H, D) and k (B, T, Hkv, D), "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    B, T, _, D = q.shape
    if q.dtype not in DTYPES or k.dtype != q.dtype:
        raise ValueError(
            f"expected q and k in one of {DTYPES}, got {q.dtype} and {k.dtype}"
        )
    R = 2 * cos.shape[-1] if cos.ndim == 2 else 0
    if not 2 <= R <= D or cos.shape != sin.shape:
        raise ValueError(
            f"expected cos and sin (S, R / 2) with R from 2 to {D}, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32 or not table.is_contiguous():
            raise ValueError(
                f"expected {name} contiguous in float32, got strides "
                f"{table.stride()} in {table.dtype}"
            )
        if table.requires_grad:
            raise ValueError(f"{name} gets no gradient here: detach() it")
    if positions is None:
        if cos.shape[0] < T:
            raise ValueError(f"expected {T} rows of cos, got {cos.shape[0]}")
    elif positions.dtype not in (
        torch.int32,
        torch.int64,
    ) or positions.shape not in ((T,), (B, T)):
        raise ValueError(
            f"expected positions ({T},) or ({B}, {T}), int32 or int64, "
            f"got {tuple(positions.shape)} in {positions.dtype}"
        )
    named = {"q": q, "k": k, "cos": cos, "sin": sin, "positions": positions}
    for name, x in named.items():
        if x is not None and (x.device.type != DEVICE or x.device != q.device):
            raise ValueError(
                f"expected {name} on {DEVICE} beside q, got {x.device}"
            )
    for name, x in (("q", q), ("k", k)):
        if x.stride(-1) != 1:
            raise ValueError(
                f"expected contiguous heads of {name}, got strides "
                f"{x.stride()}: call {name}.contiguous() first"
            )


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotary embedding of queries and keys, with its gradients.

    Args:
        q: ``(B, T, H, D)``, float32, float16 or bfloat16, on
            ``warpmap.DEVICE``. Each head is contiguous; the other strides may
            be any, as in a view of a fused projection.
        k: ``(B, T, Hkv, D)``, the same.
        cos: ``(S, R / 2)``, float32, contiguous, as from ``rope_cache``. The
            first ``R`` entries of a head turn, the rest is copied.
        sin: The same.
        positions: ``(T,)`` or ``(B, T)``, int32 or int64: a row of the tables
            for each token; default: 0, 1, 2 and so on. Where the tables do
            not have the position, what turns becomes ``nan``.
        interleaved: Whether a pair is two neighbours, as in the paper, or
            lies ``R / 2`` apart, as in most checkpoints.

    Returns:
        Both turned; same shapes and dtype, contiguous.

    Raises:
        ValueError: If a shape, dtype, layout or device is another.

    Examples:
        >>> cos, sin = rope_cache(8, 4)
        >>> q, k = (torch.ones(1, 8, h, 4, device=DEVICE) for h in (2, 1))
        >>> q, k = rope(q, k, cos, sin)
        >>> q.shape, k[0, 0, 0].tolist()  # at position 0 nothing turns
        (torch.Size([1, 8, 2, 4]), [1.0, 1.0, 1.0, 1.0])
    """
    _check(q, k, cos, sin, positions)
    turned: tuple[Tensor, Tensor]
    turned = _rope(q, k, cos, sin, positions, interleaved, False)
    return turned
