"""Copies between two GPUs and from the host, by size."""

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.cuda import Event, Stream

SIZES = [4096 << (2 * k) for k in range(10)]  # 4 KiB to 1 GiB
ROUNDS = 7


def copies_for(size: int) -> int:
    """Copies timed together: some 512 MiB, at least 4 and at most 200."""
    return max(4, min(200, (512 << 20) // size))


def microseconds(
    copy: Callable[[], None], streams: Sequence[Stream], copies: int
) -> float:
    """Time of one of many copies: the median of some rounds.

    Args:
        copy: Puts one copy on each of its streams.
        streams: They start together; the time ends with the last of them.
        copies: How many are timed together.
    """
    first, *others = streams
    times = []
    for at in range(1 + ROUNDS):  # the first is the warm-up
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)
        begin, end = Event(enable_timing=True), Event(enable_timing=True)
        begin.record(first)
        for stream in others:
            stream.wait_event(begin)
        for _ in range(copies):
            copy()
        for stream in others:
            first.wait_stream(stream)
        end.record(first)
        end.synchronize()
        if at:
            times.append(begin.elapsed_time(end) * 1e3 / copies)
    return statistics.median(times)


def check(target: Tensor, source: Tensor, path: str) -> None:
    """Compare on the host, so that no link is trusted twice."""
    if not torch.equal(target.cpu(), source.cpu()):
        raise RuntimeError(f"{path}: what arrived is not what was sent")


def rows() -> list[dict[str, int | float | str]]:
    """One row a size; rates in GB/s, of one direction unless "both"."""
    if torch.cuda.device_count() < 2:
        raise RuntimeError(
            f"needs 2 GPUs, PyTorch sees {torch.cuda.device_count()}"
        )
    direct = torch.cuda.can_device_access_peer(0, 1)
    most = SIZES[-1]
    host = torch.randint(0, 256, (most,), dtype=torch.uint8)
    pinned = host.pin_memory()
    a, b = (host.to(f"cuda:{device}") for device in (0, 1))
    into_a, into_b = torch.zeros_like(a), torch.zeros_like(b)

    # PyTorch orders a copy with the current streams of both GPUs, so the two
    # directions need a pair of streams each
    there = Stream(device=0), Stream(device=1)
    back = Stream(device=0), Stream(device=1)

    result: list[dict[str, int | float | str]] = []
    for size in SIZES:

        def forward(n: int = size) -> None:
            with torch.cuda.stream(there[1]), torch.cuda.stream(there[0]):
                into_b[:n].copy_(a[:n], non_blocking=True)

        def both(n: int = size) -> None:
            forward(n)
            with torch.cuda.stream(back[0]), torch.cuda.stream(back[1]):
                into_a[:n].copy_(b[:n], non_blocking=True)

        def from_pinned(n: int = size) -> None:
            with torch.cuda.stream(there[0]):
                into_a[:n].copy_(pinned[:n], non_blocking=True)

        def from_pageable(n: int = size) -> None:
            with torch.cuda.stream(there[0]):
                into_a[:n].copy_(host[:n], non_blocking=True)

        paths = {
            "peer": (forward, there, 1, [(into_b, a)]),
            "peer_both": (both, (*there, *back), 2, [(into_b, a), (into_a, b)]),
            "pinned": (from_pinned, there[:1], 1, [(into_a, host)]),
            "pageable": (from_pageable, there[:1], 1, [(into_a, host)]),
        }
        row: dict[str, int | float | str] = {"bytes": size}
        for name, (copy, streams, directions, moved) in paths.items():
            for target, _ in moved:
                target[:size].zero_()
            time = microseconds(copy, streams, copies_for(size))
            row[f"{name}_measured_gb_s"] = directions * size / time / 1e3
            row[f"{name}_us"] = time
            for target, source in moved:
                check(target[:size], source[:size], f"{name}, {size} bytes")
        row["peer_access"] = "direct" if direct else "through the host"
        result.append(row)
    return result
