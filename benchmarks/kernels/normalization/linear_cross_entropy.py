"""A language model's head and its loss: time and peak memory."""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from warpmap.kernels.normalization.linear_cross_entropy import (
    linear_cross_entropy,
)
from warpmap_site.harness import Case, compiled, optional

C, V = 4096, 128256  # of Llama 3 8B
TOKENS = (4096, 8192)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def all_logits(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """As one writes it in PyTorch."""
    return F.cross_entropy(F.linear(hidden, weight), target)


def trained(f: Loss) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The loss and both gradients."""

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Any:
        leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
        loss = f(*leaves, target)
        dhidden, dweight = torch.autograd.grad(loss, leaves)
        return loss.detach().reshape(1), dhidden, dweight

    return run


def liger() -> Callable[..., Any]:
    """Its fused linear cross-entropy, as its module calls it."""
    ops = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    apply = ops.LigerFusedLinearCrossEntropyFunction.apply
    return trained(lambda *inputs: apply(*inputs)[0])


def quack() -> Callable[..., Any]:
    """Chunks of 4096 rows, its default."""
    module = importlib.import_module("quack.linear_cross_entropy")
    return trained(module.chunked_linear_cross_entropy)


def cce() -> Callable[..., Any]:
    """Cut cross-entropy, which leaves out gradients too small for bf16."""
    module = importlib.import_module("cut_cross_entropy")
    return trained(module.linear_cross_entropy)


def exact(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradients in float64, 1024 rows of logits at a time."""
    M = len(hidden)
    wide = weight.double()
    loss = torch.zeros(1, dtype=torch.float64, device=hidden.device)
    dhidden = torch.empty_like(hidden, dtype=torch.float64)
    dweight = torch.zeros_like(wide)
    for start in range(0, M, 1024):
        rows = slice(start, start + 1024)
        h, t = hidden[rows].double(), target[rows]
        logits = h @ wide.T
        loss += F.cross_entropy(logits, t, reduction="sum") / M
        logits = logits.softmax(dim=1)
        logits[torch.arange(len(t), device=t.device), t] -= 1
        logits /= M
        torch.mm(logits, wide, out=dhidden[rows])
        dweight.addmm_(logits.T, h)
    return loss, dhidden, dweight


def cases() -> Iterator[Case]:
    """Some numbers of tokens, in bf16."""
    for M in TOKENS:

        def inputs(M: int = M) -> tuple[Tensor, Tensor, Tensor]:
            made = {"device": "cuda", "dtype": torch.bfloat16}
            hidden = torch.randn(M, C, **made)
            weight = torch.randn(V, C, **made) / C**0.5
            return hidden, weight, torch.randint(V, (M,), device="cuda")

        yield Case(
            labels={
                "pass": "forward+backward",
                "dtype": "bf16",
                "M": M,
                "C": C,
                "V": V,
            },
            inputs=inputs,
            ours=trained(linear_cross_entropy),
            peers={
                "torch": trained(all_logits),
                "torch.compile": trained(compiled(all_logits)),
                "liger": optional("liger_kernel", liger),
                "quack": optional("quack", quack),
                "cce": optional("cut_cross_entropy", cce),
                # half of ours: less memory, more trips of the weight's gradient
                "512 rows": trained(partial(linear_cross_entropy, chunk=512)),
            },
            exact=exact,
            # hidden, weight and their gradients, once
            moved=2 * 2 * (M + V) * C,
            flops=6 * M * C * V,
            ceiling="matmul",
            memory=True,
        )
