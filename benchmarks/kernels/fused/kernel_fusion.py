"""Bias, GELU and residual in one kernel, beside three and the compiler's.

``predicted`` is what counting launches and bytes promises over three kernels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from warpmap.kernels.fused._fusion_cost import fusion_gain
from warpmap.kernels.fused.kernel_fusion import (
    bias_gelu_add,
    bias_gelu_add_reference,
)
from warpmap_site.harness import Case, compiled, gradient

SHAPES = [
    (16, 4096),
    (256, 4096),
    (2048, 4096),
    (8192, 4096),
    (65536, 4096),
    (2**18, 1024),
    (2**14, 16384),
]


def exact(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """In float64."""
    return bias_gelu_add_reference(x.double(), bias.double(), residual.double())


def exact_gradients(
    x: Tensor, bias: Tensor, residual: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, by hand: autograd would keep much more."""
    h = x.double().add_(bias.double())
    dx = torch.ops.aten.gelu_backward(dy.double(), h, approximate="tanh")
    return dx, dx.sum(dim=0), dy.double()


def cases() -> Iterator[Case]:
    """Both directions in bf16, from launches alone to bytes alone."""
    for M, N in SHAPES:
        matrix = M * N * 2

        def inputs(M: int = M, N: int = N, count: int = 3) -> tuple:
            def random(*shape: int) -> Tensor:
                return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

            some = random(M, N), random(N), random(M, N), random(M, N)
            return some[:count]

        for which, chain in {
            "forward": "bias, GELU, residual",
            "backward": "its gradients",
        }.items():
            gain = fusion_gain(chain, M * N)
            labels = {
                "pass": which,
                "dtype": "bf16",
                "M": M,
                "N": N,
                "elements": f"2^{(M * N).bit_length() - 1}",
                "predicted": f"{gain.speedup:.2f}",
            }
            peers = {
                "torch": bias_gelu_add_reference,
                "torch.compile": compiled(bias_gelu_add_reference),
            }
            if which == "forward":
                yield Case(
                    labels=labels,
                    inputs=inputs,
                    ours=bias_gelu_add,
                    peers=peers,
                    exact=exact,
                    moved=3 * matrix,
                )
            else:
                yield Case(
                    labels=labels,
                    inputs=lambda f=inputs: f(count=4),
                    ours=gradient(bias_gelu_add),
                    peers={name: gradient(f) for name, f in peers.items()},
                    exact=exact_gradients,
                    moved=3 * matrix,
                )
