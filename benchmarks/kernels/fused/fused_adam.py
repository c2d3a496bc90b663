"""One step of AdamW on 2**28 parameters, cut into few and many tensors.

``fused_adamw`` gets its table of addresses ready made, as a training loop
would keep it; PyTorch's functions get their lists.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from warpmap.kernels.fused.fused_adam import (
    adamw_reference,
    fused_adamw,
    make_table,
)
from warpmap_site.harness import Case, Prepared

ELEMENTS = 2**28
STEP = 100  # corrections neither tiny nor gone
LR, BETA1, BETA2, EPS, DECAY = 1e-3, 0.9, 0.999, 1e-8, 1e-2

Lists = tuple[list[Tensor], ...]


def random_lists(tensors: int, dtype: torch.dtype) -> Lists:
    """Parameters, gradients and the two means, each cut into as many."""
    n = ELEMENTS // tensors

    def cut(x: Tensor) -> list[Tensor]:
        return [part.clone() for part in x.split(n)]

    def randn(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(ELEMENTS, device="cuda", dtype=dtype)

    return (
        cut(randn(dtype)),
        cut(randn(dtype)),
        cut(randn() * 0.1),
        cut(randn().square_()),
    )


def exact(params, grads, exp_avgs, exp_avg_sqs) -> tuple[Tensor, ...]:
    """The parameters after the step, in float64."""
    results = []
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        p, g, m, v = (x.double() for x in (p, g, m, v))
        m = BETA1 * m + (1 - BETA1) * g
        v = BETA2 * v + (1 - BETA2) * g * g
        below = (v / (1 - BETA2**STEP)).sqrt() + EPS
        p = p - LR * DECAY * p - LR / (1 - BETA1**STEP) * m / below
        results.append(p.float())
    return tuple(results)


def ours() -> Prepared:
    """The launch, timed without the table."""

    def run(table: Any) -> tuple[Tensor, ...]:
        fused_adamw(table, STEP, LR, (BETA1, BETA2), EPS, DECAY)
        return tuple(table.tensors[0])

    return Prepared(lambda *lists: (make_table(*lists),), run)


def torchs(**how: bool) -> Prepared:
    """PyTorch's AdamW without its optimizer object."""

    def prepare(*lists: list[Tensor]) -> tuple[Any, ...]:
        device = "cuda" if "fused" in how else "cpu"
        # it counts on by one, each time it is called
        steps = [torch.full((), STEP - 1.0, device=device) for _ in lists[0]]
        return (*lists, steps)

    def run(params, grads, exp_avgs, exp_avg_sqs, steps) -> tuple[Tensor, ...]:
        adamw(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            amsgrad=False,
            beta1=BETA1,
            beta2=BETA2,
            lr=LR,
            weight_decay=DECAY,
            eps=EPS,
            maximize=False,
            **how,
        )
        return tuple(params)

    return Prepared(prepare, run)


def loop(*lists: list[Tensor]) -> tuple[Tensor, ...]:
    """The reference."""
    adamw_reference(*lists, STEP, LR, (BETA1, BETA2), EPS, DECAY)
    return tuple(lists[0])


def cases() -> Iterator[Case]:
    """Float32 in 1, 64 and 2048 tensors; bfloat16 parameters in 64."""
    for tensors in (1, 64, 2048):
        yield Case(
            labels={"dtype": "fp32", "tensors": tensors},
            inputs=lambda n=tensors: random_lists(n, torch.float32),
            ours=ours(),
            peers={
                "torch fused": torchs(fused=True),
                "torch foreach": torchs(foreach=True),
                "loop": loop,
            },
            exact=exact,
            moved=28 * ELEMENTS,
        )
    yield Case(
        labels={"dtype": "bf16", "tensors": 64},
        inputs=lambda: random_lists(64, torch.bfloat16),
        ours=ours(),
        peers={},
        exact=exact,
        moved=22 * ELEMENTS,
    )
