"""RMSNorm beside its peers: forward, with the residual, and backward.

Every matrix has 2**27 elements: 256 MiB in bf16, five times the L2 cache.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from warpmap.kernels.normalization.rmsnorm import (
    add_rmsnorm,
    rmsnorm,
    rmsnorm_reference,
)
from warpmap_site.harness import Case, Missing, compiled, gradient, optional

ELEMENTS = 2**27
COLUMNS = (1024, 4096, 8192, 12288, 32768)
EPS = 1e-6


def alone() -> dict[str, Callable[..., Tensor] | Missing]:
    """Peers of ``rmsnorm``, made anew for every shape."""

    def liger() -> Callable[..., Tensor]:
        ops = importlib.import_module("liger_kernel.ops.rms_norm")
        # offset 0, one rounding at the end, and dy left as it is
        return lambda x, weight: ops.LigerRMSNormFunction.apply(
            x, weight, EPS, 0.0, "gemma", False
        )

    def quack() -> Callable[..., Tensor]:
        f = importlib.import_module("quack.rmsnorm").rmsnorm
        return lambda x, weight: f(x, weight, eps=EPS)

    return {
        "torch": lambda x, weight: torch.rms_norm(x, weight.shape, weight, EPS),
        "torch.compile": compiled(rmsnorm_reference),
        "quack": optional("quack", quack),
        "liger": optional("liger_kernel", liger),
    }


def with_residual() -> dict[str, Callable[..., Any] | Missing]:
    """Peers of ``add_rmsnorm``."""

    def steps(x: Tensor, r: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = x + r
        return rmsnorm_reference(h, weight), h

    def torch_steps(
        x: Tensor, r: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        h = x + r
        return torch.rms_norm(h, weight.shape, weight, EPS), h

    def liger() -> Callable[..., Any]:
        ops = importlib.import_module("liger_kernel.ops.fused_add_rms_norm")
        return lambda x, r, weight: ops.LigerFusedAddRMSNormFunction.apply(
            x, r, weight, EPS, 0.0, "gemma", False
        )

    def quack() -> Callable[..., Any]:
        f = importlib.import_module("quack.rmsnorm").rmsnorm
        return lambda x, r, weight: f(
            x, weight, residual=r, eps=EPS, prenorm=True
        )

    return {
        "torch": torch_steps,
        "torch.compile": compiled(steps),
        "quack": optional("quack", quack),
        "liger": optional("liger_kernel", liger),
    }


def inputs(matrices: int, N: int, dy: bool = False) -> tuple[Tensor, ...]:
    """That many matrices, a weight, and the gradient of a result."""
    made = {"device": "cuda", "dtype": torch.bfloat16}
    shape = ELEMENTS // N, N
    found = [torch.randn(shape, **made) for _ in range(matrices)]
    found.append(torch.randn(N, **made) + 1)
    return (*found, *([torch.randn(shape, **made)] if dy else []))


def exact(x: Tensor, weight: Tensor) -> Tensor:
    """The result in float64."""
    rstd = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    rstd = torch.rsqrt(rstd.square() / x.shape[1] + EPS)
    return x.double().mul_(rstd[:, None]).mul_(weight.double())


def add_exact(x: Tensor, r: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the rounded sum, which is the second result."""
    h = x + r
    return exact(h, weight), h.double()


def gradient_exact(
    x: Tensor, weight: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients by ``x`` and ``weight``, in float64."""
    rstd = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    rstd = torch.rsqrt(rstd.square() / x.shape[1] + EPS)[:, None]
    normal = x.double().mul_(rstd)
    dweight = torch.einsum("mn,mn->n", normal, dy.double())
    g = dy.double().mul_(weight.double())
    mean = torch.einsum("mn,mn->m", normal, g) / x.shape[1]
    dx = g.sub_(normal.mul_(mean[:, None])).mul_(rstd)
    return dx, dweight


def cases() -> Iterator[Case]:
    """Each pass for each length of rows, in bf16."""
    for N in COLUMNS:
        matrix = 2 * ELEMENTS
        labels = {"dtype": "bf16", "M": ELEMENTS // N, "N": N}
        known = alone()
        yield Case(
            labels={"pass": "forward", **labels},
            inputs=lambda N=N: inputs(1, N),
            ours=rmsnorm,
            peers=known,
            exact=exact,
            moved=2 * matrix,
        )
        yield Case(
            labels={"pass": "add+forward", **labels},
            inputs=lambda N=N: inputs(2, N),
            ours=add_rmsnorm,
            peers=with_residual(),
            exact=add_exact,
            moved=4 * matrix,
        )
        yield Case(
            labels={"pass": "backward", **labels},
            inputs=lambda N=N: inputs(1, N, dy=True),
            ours=gradient(rmsnorm),
            peers={
                name: gradient(f) if callable(f) else f
                for name, f in known.items()
            },
            exact=gradient_exact,
            moved=3 * matrix,
        )
