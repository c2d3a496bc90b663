"""The weight gradient of one layer, added up in three ways.

Rows of kind ``time`` hold what a micro-batch takes for a weight of 4096 by
14336, beside product and traffic; rows of kind ``error`` how far the sum is
off after some number of micro-batches.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from warpmap import DEVICE
from warpmap.hardware.gpus import gpu
from warpmap.training.cost.gradient_accumulation import add_product

SHAPE = (4096, 14336)  # of the weight
TOKENS = (256, 512, 1024, 2048, 4096, 8192)  # of a micro-batch
PIECES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ROUNDS, RUNS = 11, 8
BANDWIDTH = 4.8e12  # of the data sheet, in byte/s
# bytes a weight beside those of the product itself, which writes 2
EXTRA = {"bf16": 6, "fp32": 10, "fused": 8 - 2}

Way = Callable[[Tensor, Tensor, Tensor], object]


def in_bf16(total: Tensor, a: Tensor, b: Tensor) -> None:
    """What autograd does with a weight of bf16."""
    total += a @ b


WAYS: dict[str, Way] = {
    "bf16": in_bf16,
    "fp32": in_bf16,  # the product is bf16, the total is fp32
    "fused": add_product,
}


def _total(way: str, shape: tuple[int, int]) -> Tensor:
    dtype = torch.bfloat16 if way == "bf16" else torch.float32
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


def _inputs(tokens: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Gradients of the output, as a backward pass has them, and inputs."""
    dy = torch.randn(tokens, shape[0], device=DEVICE).bfloat16()
    x = torch.randn(tokens, shape[1], device=DEVICE).bfloat16()
    return dy.T, x


def _ms(run: Callable[[], object]) -> float:
    """Median of some rounds, in ms."""
    for _ in range(3):
        run()
    if DEVICE != "cuda":
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin)
    found = []
    for _ in range(ROUNDS):
        first = torch.cuda.Event(enable_timing=True)
        last = torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(RUNS):
            run()
        last.record()
        last.synchronize()
        found.append(first.elapsed_time(last) / RUNS)
    return statistics.median(found)


def time_rows(shape: tuple[int, int], sizes: tuple[int, ...]) -> list[dict]:
    """Times by tokens; predicted is the product, plus the extra bytes."""
    peak = 1e12 * (gpu("H200 SXM").bf16_tflops or 0)
    weights = shape[0] * shape[1]
    dw = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    totals = {way: _total(way, shape) for way in WAYS}
    found = []
    for tokens in sizes:
        a, b = _inputs(tokens, shape)
        product = _ms(lambda a=a, b=b: torch.mm(a, b, out=dw))
        row = {
            "kind": "time",
            "tokens": tokens,
            "product_ms": round(product, 4),
            "product_at_peak_ms": round(2e3 * tokens * weights / peak, 4),
        }
        for way, add in WAYS.items():
            total = totals[way]
            row[f"{way}_ms"] = round(
                _ms(lambda f=add, t=total, a=a, b=b: f(t, a, b)), 4
            )
            extra = 1e3 * EXTRA[way] * weights / BANDWIDTH
            row[f"{way}_predicted_ms"] = round(product + extra, 4)
        found.append(row)
    return found


def error_rows(
    shape: tuple[int, int], tokens: int, pieces: tuple[int, ...]
) -> list[dict]:
    """Errors by number of micro-batches, as a share of the sum's norm.

    Raises:
        RuntimeError: If the fused sum is off by more than fp32 explains.
    """
    exact = torch.zeros(shape, dtype=torch.float64, device=DEVICE)
    size = exact.clone()
    totals = {way: _total(way, shape) for way in WAYS}
    found = []
    for done in range(1, max(pieces) + 1):
        a, b = _inputs(tokens, shape)
        exact += a.double() @ b.double()
        size += a.double().abs() @ b.double().abs()
        for way, add in WAYS.items():
            add(totals[way], a, b)
        if done in pieces:
            errors = {
                way: ((total - exact).norm() / exact.norm()).item()
                for way, total in totals.items()
            }
            found.append(
                {"kind": "error", "pieces": done}
                | {
                    f"{way}_error": float(f"{e:.4g}")
                    for way, e in errors.items()
                }
            )
    bound = max(pieces) * tokens * 2.0**-23 * size
    if not ((totals["fused"] - exact).abs() <= bound).all():
        raise RuntimeError("the fused sum is off by more than fp32 explains")
    return found


def rows(
    shape: tuple[int, int] = SHAPE,
    sizes: tuple[int, ...] = TOKENS,
    pieces: tuple[int, ...] = PIECES,
) -> list[dict]:
    """Time the three ways, then follow their errors.

    Args:
        shape: Of the weight that is timed.
        sizes: Tokens of a micro-batch.
        pieces: Micro-batches after which errors are taken.

    Returns:
        Rows of kind ``time`` and ``error``.

    Raises:
        RuntimeError: If the fused sum is wrong.
    """
    torch.manual_seed(0)
    return time_rows(shape, sizes) + error_rows((256, 512), 64, pieces)
