"""NCCL's collectives over sizes, and the line that fits them best."""

import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from warpmap.hardware.network.communication_cost import bus_factor, fit

SIZES = [1 << k for k in (*range(10, 29, 2), 29)]  # 1 KiB to 512 MiB
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
ROUNDS = 7
ITEM = 4  # bytes of an int32, whose sums are exact in any order


def runs_for(size: int) -> int:
    """Operations timed together; the large ones are long enough alone."""
    return 20 if size <= 1 << 20 else 5


def numbers(rank: int, count: int, device: torch.device) -> Tensor:
    """What a rank holds at first."""
    at = torch.arange(count, dtype=torch.int32, device=device)
    return at % 1009 * 7 + rank * 13


def prepare(
    collective: str, size: int, rank: int, world: int, device: torch.device
) -> tuple[Callable[[], object], Tensor, Tensor]:
    """A call that runs the operation, where its result is, what it must be."""
    count = size // ITEM
    part = count // world
    mine = slice(rank * part, (rank + 1) * part)
    if collective == "all-gather":
        source = numbers(rank, part, device)
        result = torch.empty(count, dtype=torch.int32, device=device)
        expected = torch.cat([numbers(r, part, device) for r in range(world)])
        call = lambda: dist.all_gather_into_tensor(result, source)  # noqa: E731
    elif collective == "all-to-all":
        source = numbers(rank, count, device)
        result = torch.empty_like(source)
        expected = torch.cat(
            [numbers(r, count, device)[mine] for r in range(world)]
        )
        call = lambda: dist.all_to_all_single(result, source)  # noqa: E731
    else:
        source = numbers(rank, count, device)
        expected = numbers(0, count, device)
        for r in range(1, world):
            expected += numbers(r, count, device)
        if collective == "all-reduce":  # in place, as gradients are
            result = source
            call = lambda: dist.all_reduce(result)  # noqa: E731
        else:
            result = torch.empty(part, dtype=torch.int32, device=device)
            expected = expected[mine].clone()
            call = lambda: dist.reduce_scatter_tensor(  # noqa: E731
                result, source
            )
    return call, result, expected


def check(collective: str, size: int, result: Tensor, expected: Tensor) -> None:
    """Compare after the first call: an all-reduce in place goes on adding."""
    if not torch.equal(result, expected):
        raise RuntimeError(f"{collective} of {size} bytes is wrong")


def microseconds(call: Callable[[], object], runs: int) -> float:
    """Time of one of many calls in a row, on this rank: a median of rounds."""
    times = []
    for at in range(1 + ROUNDS):  # the first is the warm-up
        dist.barrier()
        torch.cuda.synchronize()
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(runs):
            call()
        end.record()
        end.synchronize()
        if at:
            times.append(begin.elapsed_time(end) * 1e3 / runs)
    return statistics.median(times)


def work(rank: int, world: int, folder: str) -> None:
    """One rank: measure everything, and let rank 0 write it down."""
    # no switch that adds: the model knows only messages between ranks
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        device_id=device,
    )
    try:
        times = []
        for collective in COLLECTIVES:
            for size in SIZES:
                call, result, expected = prepare(
                    collective, size, rank, world, device
                )
                call()
                check(collective, size, result, expected)
                time = microseconds(call, runs_for(size))
                slowest = torch.tensor(time, device=device)
                dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
                times.append((collective, size, slowest.item()))
                del call, result, expected
        if rank == 0:
            text = json.dumps(times)
            Path(folder, "times.json").write_text(text, encoding="utf-8")
    finally:
        dist.destroy_process_group()


def summarize(
    world: int, times: list[tuple[str, int, float]]
) -> list[dict[str, int | float | str]]:
    """Rows of kind "run", then for each collective one of kind "fit".

    The bus bandwidth of a fit is that of its line for an endless message.
    """
    result: list[dict[str, int | float | str]] = []
    fits: list[dict[str, int | float | str]] = []
    for collective in dict.fromkeys(c for c, _, _ in times):
        runs = [(n, t) for c, n, t in times if c == collective]
        sizes, measured = [n for n, _ in runs], [t for _, t in runs]
        factor = bus_factor(collective, world)
        alpha, beta = fit(sizes, measured)  # in microseconds
        for n, t in runs:
            result.append(
                {
                    "kind": "run",
                    "collective": collective,
                    "ranks": world,
                    "bytes": n,
                    "measured_us": t,
                    "fitted_us": alpha + beta * n,
                    "algbw_gb_s": n / t / 1e3,
                    "busbw_gb_s": factor * n / t / 1e3,
                }
            )
        fits.append(
            {
                "kind": "fit",
                "collective": collective,
                "ranks": world,
                "alpha_us": alpha,
                "beta_us_per_mb": beta * 1e6,
                "fitted_busbw_gb_s": factor / beta / 1e3,
                "worst_error": max(
                    abs((alpha + beta * n) / t - 1) for n, t in runs
                ),
            }
        )
    return result + fits


def rows() -> list[dict[str, int | float | str]]:
    """Runs and fits for two GPUs, and for four where there are four."""
    gpus = torch.cuda.device_count()
    if gpus < 2:
        raise RuntimeError(f"needs 2 GPUs, PyTorch sees {gpus}")
    result = []
    for world in (2, 4):
        if world > gpus:
            break
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(work, args=(world, folder), nprocs=world, join=True)
            text = Path(folder, "times.json").read_text(encoding="utf-8")
        result += summarize(world, [tuple(t) for t in json.loads(text)])
    return result
