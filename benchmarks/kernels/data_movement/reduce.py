"""The sum of a vector, beside PyTorch's, and the ladder in CUDA C++.

All numbers are positive, so that the sum is as large as what is added. In 16
bits they are scaled down: the sum of 2**28 must not overflow float16.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from warpmap.kernels.data_movement.reduce import (
    PER_BLOCK,
    ladder_sum,
    total,
)
from warpmap_site.harness import Case, compiled

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def vector(N: int, dtype: torch.dtype) -> tuple[Tensor]:
    """Uniform from 0 to 1, or in 16 bits from 0 to 2**-13."""
    x = torch.rand(N, device="cuda", dtype=dtype)
    return (x if dtype == torch.float32 else x.mul_(2**-13),)


def cases() -> Iterator[Case]:
    """Each dtype; the ladder is measured where its kernels apply."""
    for dtype, N in (
        ("fp32", 2**25),
        ("fp32", 2**28),
        ("fp16", 2**28),
        ("bf16", 2**28),
    ):
        rungs = {
            f"{number} {rung}": partial(ladder_sum, rung=rung)
            for number, rung in enumerate(PER_BLOCK, start=1)
        }
        yield Case(
            labels={"dtype": dtype, "N": N},
            inputs=partial(vector, N, DTYPES[dtype]),
            ours=total,
            peers={
                "torch": torch.sum,
                "torch.compile": compiled(lambda x: torch.sum(x)),
                **(rungs if dtype == "fp32" else {}),
            },
            exact=lambda x: x.double().sum(),
            moved=N * DTYPES[dtype].itemsize,
            ceiling="read",
        )
