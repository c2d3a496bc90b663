"""Online softmax, forward and backward, where rows outgrow the chip.

Every matrix has 2**27 elements: 256 MiB in bf16, five times the L2 cache.
"""

import importlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from warpmap.kernels.normalization.online_softmax import online_softmax
from warpmap.kernels.normalization.softmax import softmax_reference
from warpmap_site.harness import Case, compiled, gradient, optional

ELEMENTS = 2**27
COLUMNS = (32768, 65536, 131072, 262144)


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


def random_matrices(count: int, M: int, N: int) -> tuple[Tensor, ...]:
    """That many, normally distributed, in bf16."""
    return tuple(
        torch.randn(M, N, device="cuda", dtype=torch.bfloat16)
        for _ in range(count)
    )


def cases() -> Iterator[Case]:
    """Both directions for all lengths of rows."""
    for N in COLUMNS:
        M = ELEMENTS // N
        labels = {"dtype": "bf16", "M": M, "N": N}
        known = peers()
        yield Case(
            labels={"pass": "forward", **labels},
            inputs=lambda M=M, N=N: random_matrices(1, M, N),
            ours=online_softmax,
            peers=known,
            exact=lambda x: torch.softmax(x.double(), dim=1),
            moved=2 * ELEMENTS * 2,
        )
        yield Case(
            labels={"pass": "backward", **labels},
            inputs=lambda M=M, N=N: random_matrices(2, M, N),
            ours=gradient(online_softmax),
            peers={
                name: gradient(f) if callable(f) else f
                for name, f in known.items()
            },
            exact=gradient_exact,
            moved=3 * ELEMENTS * 2,
        )
