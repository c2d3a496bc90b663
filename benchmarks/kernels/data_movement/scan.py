"""Prefix sums of a vector, beside PyTorch's and its compiler's."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from warpmap.kernels.data_movement.scan import scan
from warpmap_site.harness import Case, compiled

DTYPES = {"fp32": torch.float32, "int32": torch.int32}


def vector(N: int, dtype: torch.dtype) -> tuple[Tensor]:
    """Normal numbers, or whole ones whose sums fit in 32 bits."""
    if dtype == torch.int32:
        return (torch.randint(-8, 9, (N,), device="cuda", dtype=dtype),)
    return (torch.randn(N, device="cuda", dtype=dtype),)


def cases() -> Iterator[Case]:
    """Two lengths of floats, and whole numbers."""
    for name, N in (("fp32", 2**26), ("fp32", 2**28), ("int32", 2**28)):
        dtype = DTYPES[name]

        def theirs(x: Tensor, dtype: torch.dtype = dtype) -> Tensor:
            return torch.cumsum(x, 0, dtype=dtype)  # int64, if not told

        def exact(x: Tensor) -> Tensor:
            if x.dtype == torch.int32:
                return x.long().cumsum(0).int()
            return x.double().cumsum(0)

        yield Case(
            labels={"dtype": name, "N": N},
            inputs=partial(vector, N, dtype),
            ours=scan,
            peers={"torch": theirs, "torch.compile": compiled(theirs)},
            exact=exact,
            moved=2 * N * 4,
        )
