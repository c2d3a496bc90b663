"""The k largest of each row: of a vocabulary, and of a router's experts.

Only values are compared: of equal numbers others may take another.
"""

import importlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from warpmap.kernels.data_movement.top_k import top_k
from warpmap_site.harness import Case, compiled, optional


def matrix(M: int, N: int, dtype: torch.dtype) -> tuple[Tensor]:
    """Normal numbers."""
    return (torch.randn(M, N, device="cuda", dtype=dtype),)


def cases() -> Iterator[Case]:
    """A vocabulary for 256 sequences; 131072 tokens for 256 experts."""
    for name, M, N, k, dtype in (
        ("vocabulary", 256, 128256, 50, torch.float32),
        ("vocabulary", 256, 128256, 50, torch.bfloat16),
        ("vocabulary", 16, 128256, 50, torch.float32),
        ("router", 131072, 256, 8, torch.float32),
    ):

        def theirs(x: Tensor, k: int = k) -> tuple[Tensor, Tensor]:
            values, indices = torch.topk(x, k, dim=1)
            return values, indices

        peers = {"torch": theirs, "torch.compile": compiled(theirs)}
        if name == "vocabulary":
            peers["flashinfer"] = optional(
                "flashinfer",
                lambda k=k: partial(
                    importlib.import_module("flashinfer").top_k,
                    k=k,
                    sorted=True,
                ),
            )
        itemsize = dtype.itemsize
        yield Case(
            labels={
                "rows": name,
                "dtype": "fp32" if itemsize == 4 else "bf16",
                "M": M,
                "N": N,
                "k": k,
            },
            inputs=partial(matrix, M, N, dtype),
            ours=partial(top_k, k=k),
            peers=peers,
            exact=lambda x, k=k: x.double().topk(k, dim=1).values,
            moved=M * N * itemsize + M * k * (itemsize + 8),
            ceiling="read",
        )
