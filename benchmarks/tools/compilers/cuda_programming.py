"""Copies and kernels on one stream and on several, beside the timeline.

Each piece is copied to the GPU, computed on and copied back. What a piece
takes is measured alone; the timeline predicts the rest.
"""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from warpmap.tools.compilers._streams import overlap
from warpmap.tools.compilers.cuda_programming import gpu_kernel

CHUNKS = 8
ELEMENTS = 2**24  # of a piece: 64 MiB of floats
REPEATS = 24  # the kernel's launches for one piece
BLOCKS, THREADS = 1056, 256  # 8 blocks on each of 132 multiprocessors
ROUNDS = 10


def _compute(x: Tensor, ones: Tensor) -> None:
    for _ in range(REPEATS):
        gpu_kernel("axpy")(BLOCKS, THREADS, 1.0, ones, x, ELEMENTS)


def _milliseconds(run: Callable[[], object]) -> float:
    """Median by events; the launches are queued before the first begins."""
    times = []
    for n in range(ROUNDS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        torch.cuda._sleep(20_000_000)
        begin.record()
        run()
        end.record()
        end.synchronize()
        if n >= 2:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def rows() -> list[dict]:
    """Milliseconds for eight pieces, measured and predicted, by streams.

    Raises:
        RuntimeError: If there is no GPU, or a result is wrong.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("this benchmark needs one NVIDIA GPU")
    ones = torch.ones(ELEMENTS, device="cuda")
    host = torch.ones(CHUNKS, ELEMENTS, pin_memory=True)
    back = torch.zeros(CHUNKS, ELEMENTS, pin_memory=True)
    device = torch.zeros(CHUNKS, ELEMENTS, device="cuda")

    copy_in = _milliseconds(lambda: device[0].copy_(host[0], non_blocking=True))
    copy_out = _milliseconds(
        lambda: back[0].copy_(device[0], non_blocking=True)
    )
    kernel = _milliseconds(lambda: _compute(device[0], ones))
    copy = (copy_in + copy_out) / 2

    def pipeline(streams: list[torch.cuda.Stream]) -> None:
        main = torch.cuda.current_stream()
        for stream in streams:
            stream.wait_stream(main)
        for chunk in range(CHUNKS):
            with torch.cuda.stream(streams[chunk % len(streams)]):
                device[chunk].copy_(host[chunk], non_blocking=True)
                _compute(device[chunk], ones)
                back[chunk].copy_(device[chunk], non_blocking=True)
        for stream in streams:
            main.wait_stream(stream)

    found = []
    for count in (1, 2, 3, 4, 8):
        streams = [torch.cuda.Stream() for _ in range(count)]
        back.zero_()
        measured = _milliseconds(lambda s=streams: pipeline(s))
        if not (back == 1.0 + REPEATS).all():
            raise RuntimeError(f"{count} streams: a piece came back wrong")
        found.append(
            {
                "streams": count,
                "chunks": CHUNKS,
                "copy_in_ms": round(copy_in, 3),
                "kernel_ms": round(kernel, 3),
                "copy_out_ms": round(copy_out, 3),
                "predicted_ms": round(overlap(CHUNKS, count, copy, kernel), 2),
                "measured_ms": round(measured, 2),
            }
        )
    return found
