"""LayerNorm forward and backward, beside its peers.

Every matrix has 2**27 elements: 256 MiB in bf16, five times the L2 cache.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from warpmap.kernels.normalization.layernorm import (
    layernorm,
    layernorm_reference,
)
from warpmap_site.harness import (
    Case,
    Missing,
    Prepared,
    compiled,
    gradient,
    optional,
)

ELEMENTS = 2**27
COLUMNS = (1024, 4096, 8192, 12288, 32768)
EPS = 1e-5


def forward() -> dict[str, Callable[..., Tensor] | Missing]:
    """Peers, made anew for every shape; those that autograd knows."""

    def liger() -> Callable[..., Tensor]:
        ops = importlib.import_module("liger_kernel.ops.layer_norm")
        return lambda x, weight, bias: ops.LigerLayerNormFunction.apply(
            x, weight, bias, EPS
        )

    return {
        "torch": lambda x, weight, bias: torch.layer_norm(
            x, weight.shape, weight, bias, EPS
        ),
        "torch.compile": compiled(layernorm_reference),
        "liger": optional("liger_kernel", liger),
    }


def quack_forward() -> Prepared:
    """It wants its parameters in float32, which is not timed."""
    quack = importlib.import_module("quack.rmsnorm")
    return Prepared(
        lambda x, weight, bias: (x, weight.float(), bias.float(), EPS),
        quack.layernorm_fwd,
    )


def quack_backward() -> Prepared:
    """It has no autograd function: forward keeps what backward takes."""
    quack = importlib.import_module("quack.rmsnorm")

    def prepare(
        x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor
    ) -> tuple[Any, ...]:
        weight, bias = weight.float(), bias.float()
        _, rstd, mean = quack.layernorm_fwd(x, weight, bias, EPS, True, True)
        return x, weight, dy, rstd, mean

    return Prepared(prepare, quack.layernorm_bwd)


def inputs(N: int, dy: bool = False) -> tuple[Tensor, ...]:
    """A matrix, a weight, a bias, and the gradient of the result."""
    made = {"device": "cuda", "dtype": torch.bfloat16}
    shape = ELEMENTS // N, N
    weight, bias = torch.randn(2, N, **made)
    found = torch.randn(shape, **made), weight + 1, bias
    return (*found, torch.randn(shape, **made)) if dy else found


def normal_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows less their mean, over their deviation, and one over that."""
    x = x.double()
    x -= x.mean(dim=1, keepdim=True)
    rstd = torch.einsum("mn,mn->m", x, x) / x.shape[1]
    rstd = torch.rsqrt(rstd + EPS)[:, None]
    return x.mul_(rstd), rstd


def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The result in float64."""
    return normal_rows(x)[0].mul_(weight.double()).add_(bias.double())


def gradient_exact(
    x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by ``x``, ``weight`` and ``bias``, in float64."""
    normal, rstd = normal_rows(x)
    g = dy.double()
    dweight, dbias = torch.einsum("mn,mn->n", normal, g), g.sum(dim=0)
    g.mul_(weight.double())
    mean = torch.einsum("mn,mn->m", normal, g) / x.shape[1]
    g -= g.mean(dim=1, keepdim=True)
    return g.sub_(normal.mul_(mean[:, None])).mul_(rstd), dweight, dbias


def cases() -> Iterator[Case]:
    """Both passes for each length of rows, in bf16."""
    for N in COLUMNS:
        matrix = 2 * ELEMENTS
        labels = {"dtype": "bf16", "M": ELEMENTS // N, "N": N}
        known = forward()
        yield Case(
            labels={"pass": "forward", **labels},
            inputs=lambda N=N: inputs(N),
            ours=layernorm,
            peers={**known, "quack": optional("quack", quack_forward)},
            exact=exact,
            moved=2 * matrix,
        )
        yield Case(
            labels={"pass": "backward", **labels},
            inputs=lambda N=N: inputs(N, dy=True),
            ours=gradient(layernorm),
            peers={
                **{
                    name: gradient(f) if callable(f) else f
                    for name, f in known.items()
                },
                "quack": optional("quack", quack_backward),
            },
            exact=gradient_exact,
            moved=3 * matrix,
        )
