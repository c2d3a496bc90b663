"""One step of each optimizer on the parameters of a small model.

Least time is what reading and writing a step's numbers once would take at the
rate at which this GPU copies.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from warpmap import DEVICE
from warpmap.kernels.fused.fused_adam import fused_adamw, make_table
from warpmap.training.foundations.optimizers import (
    SGD,
    Adafactor,
    Adam,
    AdamW,
    Lion,
    Muon,
)

LAYERS, WIDTH, HIDDEN = 16, 1024, 2816
ROUNDS = 20


def parameters(
    layers: int = LAYERS, width: int = WIDTH, hidden: int = HIDDEN
) -> list[Tensor]:
    """Matrices of attention and feed-forward, with a gradient each."""
    shapes = [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden)]
    params = [
        torch.randn(shape, device=DEVICE) * 0.02
        for _ in range(layers)
        for shape in shapes
    ]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def _fused(params: list[Tensor]) -> Callable[[], None]:
    """Our one kernel; the table is made once, as in a training loop."""
    grads = [p.grad for p in params if p.grad is not None]
    means = [torch.zeros_like(p) for p in params]
    squares = [torch.zeros_like(p) for p in params]
    table = make_table(params, grads, means, squares)
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        fused_adamw(table, step=count, lr=1e-3)

    return step


MAKERS: dict[str, Callable[[list[Tensor]], Callable[[], None]]] = {
    "SGD": lambda p: SGD(p, 1e-3).step,
    "Lion": lambda p: Lion(p, 1e-3).step,
    "Adafactor": lambda p: Adafactor(p).step,
    "Adam, tensor by tensor": lambda p: Adam(p, 1e-3).step,
    "AdamW, foreach": lambda p: AdamW(p, 1e-3).step,
    "AdamW, torch fused": lambda p: (
        torch.optim.AdamW(p, lr=1e-3, fused=True).step
    ),
    "AdamW, one kernel": _fused,
    "Muon": lambda p: Muon(p, 1e-3).step,
}
STATE = {"SGD": 4, "Lion": 4, "Adafactor": 0, "Muon": 4}  # bytes; others 8


def _milliseconds(work: Callable[[], Any]) -> float:
    for _ in range(3):
        work()
    times = []
    for _ in range(ROUNDS):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _copied() -> float:
    """Bytes a millisecond that a copy reads and writes."""
    x = torch.randn(1 << 28, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.nbytes / _milliseconds(lambda: y.copy_(x))


def _check() -> None:
    """All ways to do AdamW agree."""
    ways = [n for n in MAKERS if n.startswith("AdamW")]
    found = []
    for name in ways:
        torch.manual_seed(0)
        params = parameters(1, 128, 256)
        step = MAKERS[name](params)
        for _ in range(3):
            step()
        found.append(params)
    for params in found[1:]:
        for got, want in zip(params, found[0], strict=True):
            if not torch.allclose(got, want, atol=1e-6):
                raise RuntimeError("the ways to do AdamW disagree")


def rows() -> list[dict[str, Any]]:
    """Time a step of each.

    Returns:
        A row for each optimizer: state in bytes a parameter, time of a step,
        and the least time that its bytes need.

    Raises:
        RuntimeError: If there is no GPU, or a result is wrong.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("this benchmark needs one NVIDIA GPU")
    _check()
    copied = _copied()
    found = []
    for name, make in MAKERS.items():
        params = parameters()
        count = sum(p.numel() for p in params)
        state = STATE.get(name, 8)
        # parameter and state both ways, the gradient one way
        least = count * (12 + 2 * state) / copied
        time = _milliseconds(make(params))
        found.append(
            {
                "optimizer": name,
                "parameters": count,
                "state_bytes": state,
                "step_ms": round(time, 3),
                "least_ms": round(least, 3),
                "times_least": round(time / least, 2),
            }
        )
    return found
