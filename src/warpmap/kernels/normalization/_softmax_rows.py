"""What softmax and online softmax share: which rows they take, and the GPU."""

import torch
from torch import Tensor

from warpmap import DEVICE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_rows(x: Tensor) -> None:
    """Refuse what the kernels cannot read.

    Raises:
        ValueError: If ``x`` is no matrix, or has another dtype or device, or
            rows that are not contiguous; says what came and what was expected.

    Examples:
        >>> check_rows(torch.zeros(4))
        Traceback (most recent call last):
        ValueError: expected a matrix (M, N), got (4,)
    """
    if x.ndim != 2:
        raise ValueError(f"expected a matrix (M, N), got {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"expected one of {DTYPES}, got {x.dtype}")
    if x.device.type != DEVICE:
        raise ValueError(f"expected a tensor on {DEVICE}, got {x.device}")
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(
            f"expected contiguous rows, got strides {x.stride()}: "
            "call x.contiguous() first"
        )


def multiprocessors(x: Tensor) -> int:
    """Streaming multiprocessors of the GPU that holds ``x``.

    The interpreter counts as two, so that a program gets several rows there.

    Examples:
        >>> multiprocessors(torch.zeros(1))
        2
    """
    if not x.is_cuda:
        return 2
    gpu = torch.cuda.get_device_properties(x.device)
    return int(gpu.multi_processor_count)
