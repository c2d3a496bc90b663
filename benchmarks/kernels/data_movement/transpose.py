"""Transposes beside PyTorch's, and the ladder in CUDA C++, against a copy.

Large matrices of bf16, square, odd and thin; a batch as attention permutes
it; and the rungs of the ladder on float32.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from warpmap.kernels.data_movement.transpose import (
    RUNGS,
    transpose,
    transpose_cuda,
)
from warpmap_site.harness import Case, compiled

SHAPES = {
    "8192 x 8192": (8192, 8192),
    "8191 x 8193": (8191, 8193),
    "2^26 x 3": (2**26, 3),
    "3 x 2^26": (3, 2**26),
    "2^22 x 16": (2**22, 16),
    "16 x 2^22": (16, 2**22),
    "64 of 4096 x 128": (64, 4096, 128),
}


def _torch(x: Tensor) -> Tensor:
    return x.mT.contiguous()


def _exact(x: Tensor) -> Tensor:
    return x.mT.double()


def cases() -> Iterator[Case]:
    """The shapes in bf16, then the ladder in float32.

    Raises:
        RuntimeError: If there is no GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("this benchmark needs one NVIDIA GPU")

    def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor]:
        return (torch.randn(shape, device="cuda", dtype=dtype),)

    for name, shape in SHAPES.items():
        yield Case(
            labels={"dtype": "bf16", "shape": name},
            inputs=partial(inputs, shape, torch.bfloat16),
            ours=transpose,
            peers={"torch": _torch, "torch.compile": compiled(_torch)},
            exact=_exact,
            moved=2 * 2 * torch.Size(shape).numel(),
        )
    for name in ("8192 x 8192", "8191 x 8193"):
        yield Case(
            labels={"dtype": "fp32", "shape": name},
            inputs=partial(inputs, SHAPES[name], torch.float32),
            ours=transpose,
            peers={
                "torch": _torch,
                **{r: partial(transpose_cuda, rung=r) for r in RUNGS},
            },
            exact=_exact,
            moved=2 * 4 * torch.Size(SHAPES[name]).numel(),
        )
