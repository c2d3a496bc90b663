"""The sum of a vector: by atomics, by a fixed tree, by PyTorch."""

from collections.abc import Iterator

import torch
from torch import Tensor

from warpmap.kernels.building_blocks.deterministic_reduction import (
    atomic_total,
    row_sums,
)
from warpmap.kernels.data_movement.reduce import total
from warpmap_site.harness import Case


def cases() -> Iterator[Case]:
    """Positive numbers, so that the sum is as large as what is added."""
    for N in (2**22, 2**28):

        def inputs(N: int = N) -> tuple[Tensor]:
            return (torch.rand(N, device="cuda"),)

        yield Case(
            labels={"dtype": "fp32", "N": N},
            inputs=inputs,
            ours=total,
            peers={
                "torch": torch.sum,
                "atomics": atomic_total,
                "fixed split": lambda x: row_sums(x[None], 1024)[0],
            },
            exact=lambda x: x.double().sum(),
            moved=4 * N,
            ceiling="read",
        )
