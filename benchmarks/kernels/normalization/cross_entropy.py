"""Cross-entropy over large vocabularies: the loss, and loss and gradient."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from warpmap.kernels.normalization.cross_entropy import cross_entropy
from warpmap_site.harness import Case, compiled, optional

VOCABULARIES = (32000, 50257, 128256)
ELEMENTS = {"forward": 2**30, "forward+backward": 2**28}

Loss = Callable[[Tensor, Tensor], Tensor]


def rows_of(f: Callable[..., Tensor], **options: Any) -> Loss:
    """A loss function, asked for the loss of each row."""
    return lambda x, target: f(x, target, reduction="none", **options)


def trained(f: Loss) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The losses and the gradient of their sum."""

    def run(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        losses = f(x, target)
        (dx,) = torch.autograd.grad(losses, x, torch.ones_like(losses))
        return losses.detach(), dx

    return run


def in_float32(x: Tensor, target: Tensor) -> Tensor:
    """PyTorch's own with losses in float32, as ours has them."""
    return F.cross_entropy(x.float(), target, reduction="none")


def quack() -> Loss:
    """Forward alone, and with autograd where a gradient is asked for."""
    loss = importlib.import_module("quack.cross_entropy").cross_entropy
    return rows_of(loss)


def liger() -> Loss:
    """Forward alone: its gradient overwrites the logits, which all share."""
    ops = importlib.import_module("liger_kernel.ops.cross_entropy")
    options = None, -100, 0.0, 0.0, "none"
    apply = ops.LigerCrossEntropyFunction.apply
    return lambda x, target: apply(x, target, *options)[0]


def exact(x: Tensor, target: Tensor) -> Tensor:
    """Losses in float64, a gigabyte of logits at a time."""
    step = max(1, 2**27 // x.shape[1])
    parts = zip(x.split(step), target.split(step), strict=True)
    return torch.cat(
        [F.cross_entropy(a.double(), b, reduction="none") for a, b in parts]
    )


def exact_both(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and gradient in float64."""
    gradient = torch.softmax(x.double(), dim=1)
    gradient[torch.arange(len(x), device=x.device), target] -= 1
    return exact(x, target), gradient


def cases() -> Iterator[Case]:
    """Every vocabulary, in bf16."""
    by_name: dict[str, Loss] = {
        "torch": rows_of(F.cross_entropy),
        "torch.compile": compiled(in_float32),
    }
    for direction, N in [(d, n) for d in ELEMENTS for n in VOCABULARIES]:
        both = direction == "forward+backward"
        M = ELEMENTS[direction] // N // 1024 * 1024

        def inputs(M: int = M, N: int = N) -> tuple[Tensor, Tensor]:
            made = {"device": "cuda", "dtype": torch.bfloat16}
            target = torch.randint(N, (M,), device="cuda")
            return torch.randn(M, N, **made), target

        peers: dict[str, Any] = {**by_name, "quack": optional("quack", quack)}
        if not both:
            peers["liger"] = optional("liger_kernel", liger)
        pick = trained if both else (lambda f: f)
        yield Case(
            labels={"pass": direction, "dtype": "bf16", "M": M, "N": N},
            inputs=inputs,
            ours=pick(rows_of(cross_entropy)),
            peers={
                name: pick(f) if callable(f) else f for name, f in peers.items()
            },
            exact=exact_both if both else exact,
            # together: read by forward, read and written by backward
            moved=(3 if both else 1) * 2 * M * N,
            ceiling="copy" if both else "read",
        )
