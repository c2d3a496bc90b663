"""Softmax forward and backward, beside its peers, for short and long rows.

Every matrix has 2**27 elements: 256 MiB in bf16, five times the L2 cache.
"""

import importlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from warpmap.kernels.normalization.softmax import softmax, softmax_reference
from warpmap_site.harness import Case, compiled, gradient, optional

ELEMENTS = 2**27
COLUMNS = (1024, 4096, 8192, 12288, 32768, 65536, 131072)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def peers() -> dict[str, Callable[[Tensor], Tensor]]:
    """The same from others, made anew for every shape."""

    def liger() -> Callable[[Tensor], Tensor]:
        ops = importlib.import_module("liger_kernel.ops.softmax")
        return ops.LigerSoftmaxFunction.apply

    return {
        "torch": lambda x: torch.softmax(x, dim=1),
        "torch.compile": compiled(softmax_reference),
        "quack": optional(
            "quack", lambda: importlib.import_module("quack.softmax").softmax
        ),
        "liger": optional("liger_kernel", liger),
    }


def gradient_exact(x: Tensor, dy: Tensor) -> Tensor:
    """The gradient by ``x``, in float64."""
    y = torch.softmax(x.double(), dim=1)
    dot = torch.einsum("mn,mn->m", y, dy.double())
    return y.mul_(dy.double().sub_(dot[:, None]))


def random_matrices(count: int, M: int, N: int, dtype: str) -> tuple:
    """That many, normally distributed."""
    return tuple(
        torch.randn(M, N, device="cuda", dtype=DTYPES[dtype])
        for _ in range(count)
    )


def cases() -> Iterator[Case]:
    """Both directions in bf16 for all lengths of rows, in fp32 for one."""
    for dtype, N in [("bf16", N) for N in COLUMNS] + [("fp32", 4096)]:
        M = ELEMENTS // N
        matrix = ELEMENTS * DTYPES[dtype].itemsize
        labels = {"dtype": dtype, "M": M, "N": N}
        known = peers()
        yield Case(
            labels={"pass": "forward", **labels},
            inputs=lambda M=M, N=N, d=dtype: random_matrices(1, M, N, d),
            ours=softmax,
            peers={**known, "step by step": softmax_reference},
            exact=lambda x: torch.softmax(x.double(), dim=1),
            moved=2 * matrix,
        )
        yield Case(
            labels={"pass": "backward", **labels},
            inputs=lambda M=M, N=N, d=dtype: random_matrices(2, M, N, d),
            ours=gradient(softmax),
            peers={
                name: gradient(f) if callable(f) else f
                for name, f in known.items()
            },
            exact=gradient_exact,
            moved=3 * matrix,
        )
