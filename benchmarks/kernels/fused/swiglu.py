"""Gated activations beside their peers, forward and backward.

Liger's backward overwrites the tensors it kept: it gets copies of its own,
made outside the timing. From the second round on they hold old gradients.
"""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from warpmap.kernels.fused.swiglu import (
    Activation,
    swiglu,
    swiglu_packed,
    swiglu_reference,
)
from warpmap_site.harness import (
    Case,
    Missing,
    Prepared,
    compiled,
    gradient,
    optional,
)

# tokens and width: Llama 3 8B, Llama 3 70B, an expert of DeepSeek-V3
SHAPES = ((8192, 14336), (4096, 28672), (65536, 2048))


def packed_reference(x: Tensor, activation: Activation = "silu") -> Tensor:
    """Of two halves side by side."""
    gate, up = x.chunk(2, dim=-1)
    return swiglu_reference(gate, up, activation)


def liger(activation: str, packed: bool) -> Callable[..., Tensor]:
    """Its function for this layout."""
    if activation == "gelu":
        ops = importlib.import_module("liger_kernel.ops.geglu")
        return lambda gate, up: ops.LigerGELUMulFunction.apply(gate, up)
    ops = importlib.import_module("liger_kernel.ops.swiglu")
    if packed:
        return lambda x: ops.LigerFusedGateUpSiLUMulFunction.apply(x)
    return lambda gate, up: ops.LigerSiLUMulFunction.apply(gate, up)


def backward(name: str, f: Callable[..., Tensor] | Missing) -> Any:
    """The gradients; on copies, for Liger."""
    if isinstance(f, Missing):
        return f
    both = gradient(f)
    if name != "liger":
        return both
    return Prepared(
        lambda *given: both.prepare(*(t.clone() for t in given)), both.run
    )


def exact(*halves: Tensor, activation: Activation) -> Tensor:
    """In float64; halves may be one tensor."""
    gate, up = halves if len(halves) == 2 else halves[0].chunk(2, dim=-1)
    return swiglu_reference(gate.double(), up.double(), activation)


def exact_backward(
    *given: Tensor, activation: Activation
) -> tuple[Tensor, ...]:
    """The gradients, in float64."""
    *halves, dy = given
    leaves = [t.double().requires_grad_() for t in halves]
    y = exact(*leaves, activation=activation)
    return torch.autograd.grad(y, leaves, dy.double())


def random(*shapes: tuple[int, int]) -> tuple[Tensor, ...]:
    """Normal numbers in bf16."""
    return tuple(
        torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        for shape in shapes
    )


def cases() -> Iterator[Case]:
    """Separate and packed, SiLU and GELU."""
    kinds: list[tuple[Activation, bool, tuple[int, int]]]
    kinds = [("silu", packed, s) for s in SHAPES for packed in (False, True)]
    for activation, packed, (M, F) in [*kinds, ("gelu", False, SHAPES[0])]:
        ours, steps = (
            (swiglu_packed, packed_reference)
            if packed
            else (swiglu, swiglu_reference)
        )
        halves = ((M, 2 * F),) if packed else ((M, F), (M, F))
        labels = {
            "dtype": "bf16",
            "activation": activation,
            "input": "packed" if packed else "separate",
            "M": M,
            "F": F,
        }
        # bound now: optional() calls at once, the cases are measured in turn
        make = partial(liger, activation, packed)
        known = {
            "torch": partial(steps, activation=activation),
            "torch.compile": compiled(partial(steps, activation=activation)),
            "liger": optional("liger_kernel", make),
        }
        yield Case(
            labels={"pass": "forward", **labels},
            inputs=partial(random, *halves),
            ours=partial(ours, activation=activation),
            peers=known,
            exact=partial(exact, activation=activation),
            moved=3 * M * F * 2,
        )
        yield Case(
            labels={"pass": "backward", **labels},
            inputs=partial(random, *halves, (M, F)),
            ours=gradient(partial(ours, activation=activation)),
            peers={name: backward(name, f) for name, f in known.items()},
            exact=partial(exact_backward, activation=activation),
            moved=5 * M * F * 2,
        )
