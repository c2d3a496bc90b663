"""What softmax and the norms share: which rows they take, and column sums.

The gradient of a weight is a sum over all rows. Each program adds up its own
rows and stores one row of partial sums; a second kernel adds these.
"""

import torch
from torch import Tensor

from warpmap import DEVICE
from warpmap.kernels import tl, triton

# the norms' forward takes a row in one program, and RMSNorm's into registers:
# 32768 columns in float32 are half of the 256 KiB of a multiprocessor
MAX_COLS = 32768

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_rows(
    matrices: dict[str, Tensor],
    vectors: dict[str, Tensor],
    longest: int | None = MAX_COLS,
) -> None:
    """Refuse what the kernels cannot read.

    Args:
        matrices: By name, ``(M, N)`` each and of one dtype; rows contiguous.
        vectors: By name, ``(N,)`` each and of one dtype; contiguous.
        longest: The most elements that a row may have.

    Raises:
        ValueError: If one has another shape, dtype, layout or device, or
            rows are too long.

    Examples:
        >>> check_rows({"x": torch.zeros(2, 3, device=DEVICE)}, {})
    """
    first, x = next(iter(matrices.items()))
    if x.ndim != 2:
        raise ValueError(f"expected {first} to be (M, N), got {tuple(x.shape)}")
    if longest is not None and x.shape[1] > longest:
        raise ValueError(
            f"expected rows of {first} of at most {longest}, got {x.shape[1]}"
        )
    device = x.device if x.device.type == DEVICE else DEVICE
    for same, shape in ((matrices, x.shape), (vectors, x.shape[1:])):
        for name, t in same.items():
            if t.shape != shape:
                raise ValueError(
                    f"expected {name} to be {tuple(shape)} beside {first}, "
                    f"got {tuple(t.shape)}"
                )
            dtype = next(iter(same.values())).dtype
            if t.dtype not in DTYPES or t.dtype != dtype:
                raise ValueError(
                    f"expected {' and '.join(same)} in one dtype of {DTYPES}, "
                    f"got {name} in {t.dtype}"
                )
            if t.device.type != DEVICE or t.device != x.device:
                raise ValueError(f"expected {name} on {device}, got {t.device}")
            if shape[-1] > 1 and t.stride(-1) != 1:
                raise ValueError(
                    f"expected contiguous rows of {name}, got strides "
                    f"{t.stride()}: call {name}.contiguous() first"
                )


def programs_at_once(x: Tensor, per_sm: int) -> int:
    """How many programs the GPU of ``x`` runs at the same time.

    Args:
        x: Any tensor.
        per_sm: Programs on one streaming multiprocessor.

    Returns:
        Three in Triton's interpreter, so that there, too, each walks.

    Examples:
        >>> programs_at_once(torch.zeros(1), 4)
        3
    """
    if x.device.type == "cpu":
        return 3
    gpu = torch.cuda.get_device_properties(x.device)
    return int(gpu.multi_processor_count) * per_sm


@triton.jit
def load(ptrs, mask, cache: tl.constexpr, other=0.0):
    """Elements in float32; ``other`` where the mask is off.

    ``cache`` says what becomes of them in the L1 cache: ``evict_last`` keeps
    what is read again soon, ``evict_first`` lets go of it.
    """
    x = tl.load(ptrs, mask, other=other, eviction_policy=cache)
    return x.to(tl.float32)


@triton.jit
def _column_sums_kernel(
    x_ptr, y_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, M, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)[:, None]
        mask = (rows < M) & (cols < N)
        acc += tl.load(x_ptr + rows * N + cols, mask, other=0.0)
    y = tl.sum(acc, axis=0, keep_dims=True)
    tl.store(y_ptr + cols, y, cols < N)


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of each column, in one fixed order.

    Args:
        x: ``(M, N)``, float32, contiguous; less than 2**31 elements.
        dtype: What each sum is rounded to.

    Returns:
        ``(N,)``.

    Examples:
        >>> x = torch.ones(5, 2, device=DEVICE)
        >>> column_sums(x, torch.float16).tolist()
        [5.0, 5.0]
    """
    M, N = x.shape
    y = x.new_empty(N, dtype=dtype)
    # narrow and tall, for many programs with 16 KiB on the way each
    BLOCK_N = max(32, triton.next_power_of_2(N) // 256)
    _column_sums_kernel[(triton.cdiv(N, BLOCK_N),)](
        x, y, M, N, BLOCK_M=4096 // BLOCK_N, BLOCK_N=BLOCK_N
    )
    return y
