"""Gated activations: ``act(gate) * up`` in one pass, and its gradients.

Two activations, one form. SiLU is ``x sigmoid(x)``, and GELU in its tanh form
is ``x sigmoid(z)``, with ``z`` a cubic in ``x``.

    traffic  3 M F elements forward, 5 M F backward; PyTorch's steps 5 and 9
    kept     gate and up, 2 M F; PyTorch's steps keep act(gate) as well

Reference: Shazeer, 2020, https://arxiv.org/abs/2002.05202
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from warpmap import DEVICE
from warpmap.kernels import tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Activation = Literal["silu", "gelu"]

TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)


def swiglu_reference(
    gate: Tensor, up: Tensor, activation: Activation = "silu"
) -> Tensor:
    """``act(gate) * up``, as models write it.

    Args:
        gate: ``(..., F)``.
        up: The same.
        activation: "silu" for SwiGLU, "gelu" for GeGLU in its tanh form.

    Returns:
        ``(..., F)``, same dtype.

    Examples:
        >>> gate, up = torch.tensor([0.0, 20.0]), torch.tensor([3.0, 3.0])
        >>> swiglu_reference(gate, up).tolist()
        [0.0, 60.0]
    """
    if activation == "gelu":
        return F.gelu(gate, approximate="tanh") * up
    return F.silu(gate) * up


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr):
    """Activation of ``x``, and its slope."""
    z, dz = x, 1.0
    if ACTIVATION == "gelu":
        # (1 + tanh(t)) / 2 is sigmoid(2 t)
        z = TWO_SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)
        dz = TWO_SQRT_2_OVER_PI * (1 + 3 * 0.044715 * x * x)
    s = tl.sigmoid(z)
    return x * s, s + x * s * (1 - s) * dz


@triton.jit
def _tile_of_program(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    tiles_n = tl.cdiv(N, BLOCK_N)
    # 64-bit: row * stride overflows 32 bits in a large matrix
    tile_m = (tl.program_id(0) // tiles_n).to(tl.int64)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    rows = tl.minimum(rows, M - 1)  # past the end: the last row once more
    cols = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return rows, cols, cols < N


@triton.jit
def _swiglu_fwd_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    stride_gate,
    stride_up,
    stride_y,
    M,
    N,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows, cols, mask = _tile_of_program(M, N, BLOCK_M, BLOCK_N)
    gate = tl.load(gate_ptr + rows * stride_gate + cols, mask).to(tl.float32)
    up = tl.load(up_ptr + rows * stride_up + cols, mask).to(tl.float32)
    act, _ = _activation(gate, ACTIVATION)
    tl.store(y_ptr + rows * stride_y + cols, act * up, mask)


@triton.jit
def _swiglu_bwd_kernel(
    gate_ptr,
    up_ptr,
    dy_ptr,
    dgate_ptr,
    dup_ptr,
    stride_gate,
    stride_up,
    stride_dy,
    stride_dgate,
    stride_dup,
    M,
    N,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows, cols, mask = _tile_of_program(M, N, BLOCK_M, BLOCK_N)
    gate = tl.load(gate_ptr + rows * stride_gate + cols, mask).to(tl.float32)
    up = tl.load(up_ptr + rows * stride_up + cols, mask).to(tl.float32)
    dy = tl.load(dy_ptr + rows * stride_dy + cols, mask).to(tl.float32)
    # computed again: cheaper than to write it forward and read it here
    act, slope = _activation(gate, ACTIVATION)
    tl.store(dgate_ptr + rows * stride_dgate + cols, dy * up * slope, mask)
    tl.store(dup_ptr + rows * stride_dup + cols, dy * act, mask)


NUM_WARPS = 4


def _tile(N: int) -> tuple[int, int]:
    """``BLOCK_M`` and ``BLOCK_N``: 8 elements a thread, short rows together."""
    BLOCK_N = min(1024, triton.next_power_of_2(N))
    return 1024 // BLOCK_N, BLOCK_N


def _launch(kernel: Any, activation: str, *matrices: Tensor) -> None:
    M, N = matrices[0].shape
    if M * N == 0:
        return
    BLOCK_M, BLOCK_N = _tile(N)
    programs = triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N)
    with torch.cuda.device_of(matrices[0]):  # Triton takes the current GPU
        kernel[(programs,)](
            *matrices,
            *(x.stride(0) for x in matrices),
            M,
            N,
            ACTIVATION=activation,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            num_warps=NUM_WARPS,
        )


def _matrix(x: Tensor) -> Tensor:
    """``x`` as rows; gradients may come in any layout."""
    F = x.shape[-1]
    rows = x.reshape(x.numel() // max(F, 1), F)
    return rows if F <= 1 or rows.stride(1) == 1 else rows.contiguous()


@torch.library.custom_op("warpmap::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    y = gate.new_empty(gate.shape)
    _launch(
        _swiglu_fwd_kernel,
        activation,
        _matrix(gate),
        _matrix(up),
        _matrix(y),
    )
    return y


@torch.library.custom_op("warpmap::swiglu_backward", mutates_args=())
def _swiglu_backward(
    gate: Tensor, up: Tensor, dy: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    matrices = map(_matrix, (gate, up, dy, dgate, dup))
    _launch(_swiglu_bwd_kernel, activation, *matrices)
    return dgate, dup


@torch.library.custom_op("warpmap::swiglu_packed", mutates_args=())
def _swiglu_packed(x: Tensor, activation: str) -> Tensor:
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    gate, up = _matrix(x).tensor_split(2, dim=1)
    _launch(_swiglu_fwd_kernel, activation, gate, up, _matrix(y))
    return y


@torch.library.custom_op("warpmap::swiglu_packed_backward", mutates_args=())
def _swiglu_packed_backward(x: Tensor, dy: Tensor, activation: str) -> Tensor:
    dx = x.new_empty(x.shape)
    gate, up = _matrix(x).tensor_split(2, dim=1)
    dgate, dup = _matrix(dx).tensor_split(2, dim=1)
    matrices = (gate, up, _matrix(dy), dgate, dup)
    _launch(_swiglu_bwd_kernel, activation, *matrices)
    return dx


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


# what torch.compile and autograd must know about the operators
_swiglu.register_fake(lambda gate, up, _: gate.new_empty(gate.shape))
_swiglu_backward.register_fake(
    lambda gate, up, dy, _: (
        gate.new_empty(gate.shape),
        gate.new_empty(gate.shape),
    )
)
_swiglu_packed.register_fake(
    lambda x, _: x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
)
_swiglu_packed_backward.register_fake(lambda x, dy, _: x.new_empty(x.shape))
_swiglu.register_autograd(
    lambda ctx, dy: (
        *_swiglu_backward(*ctx.saved_tensors, dy, ctx.activation),
        None,
    ),
    setup_context=_keep,
)
_swiglu_packed.register_autograd(
    lambda ctx, dy: (
        _swiglu_packed_backward(*ctx.saved_tensors, dy, ctx.activation),
        None,
    ),
    setup_context=_keep,
)


def _check(activation: str, **tensors: Tensor) -> None:
    if activation not in ("silu", "gelu"):
        raise ValueError(
            f"activation must be 'silu' or 'gelu', got {activation!r}"
        )
    first, *_ = tensors.values()
    for name, t in tensors.items():
        if t.ndim == 0 or t.shape != first.shape:
            raise ValueError(
                f"expected {' and '.join(tensors)} (..., F), of one shape, "
                f"got {[tuple(t.shape) for t in tensors.values()]}"
            )
        if t.dtype not in DTYPES or t.dtype != first.dtype:
            raise ValueError(
                f"expected {name} in one dtype of {DTYPES}, got {t.dtype}"
            )
        if t.device.type != DEVICE or t.device != first.device:
            raise ValueError(f"expected {name} on {DEVICE}, got {t.device}")
        if t.shape[-1] > 1 and t.stride(-1) != 1:
            raise ValueError(
                f"expected contiguous rows of {name}, got strides "
                f"{t.stride()}: call {name}.contiguous() first"
            )


def swiglu(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """``act(gate) * up``, with its gradients.

    Args:
        gate: ``(..., F)``, float32, float16 or bfloat16, on
            ``warpmap.DEVICE``. Each row is contiguous, rows may lie apart.
        up: The same.
        activation: "silu" for SwiGLU, "gelu" for GeGLU in its tanh form.

    Returns:
        ``(..., F)``, same dtype, contiguous.

    Raises:
        ValueError: If a shape, dtype, layout or device is another, or the
            activation.

    Examples:
        >>> gate, up = torch.tensor([[0.0, 20.0], [3.0, 3.0]], device=DEVICE)
        >>> swiglu(gate, up).tolist()
        [0.0, 60.0]
    """
    _check(activation, gate=gate, up=up)
    y: Tensor = _swiglu(gate, up, activation)
    return y


def swiglu_packed(x: Tensor, activation: Activation = "silu") -> Tensor:
    """The same of two halves that one projection wrote side by side.

    Two views of ``x`` do for ``swiglu``, but their gradients would be copied
    together. Here they are written in place.

    Args:
        x: ``(..., 2 F)``, the gate first.
        activation: As for ``swiglu``.

    Returns:
        ``(..., F)``, same dtype, contiguous.

    Raises:
        ValueError: As ``swiglu``, or if the rows of ``x`` have no halves.

    Examples:
        >>> x = torch.tensor([0.0, 20.0, 3.0, 3.0], device=DEVICE)
        >>> swiglu_packed(x).tolist()
        [0.0, 60.0]
    """
    _check(activation, x=x)
    if x.shape[-1] % 2:
        raise ValueError(f"expected x (..., 2 F), got {tuple(x.shape)}")
    y: Tensor = _swiglu_packed(x, activation)
    return y
