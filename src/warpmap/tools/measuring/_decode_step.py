"""A decoding step of a small model as a profiler would write it down.

Nothing was measured: the kernels' times follow from their bytes, and who waits
for whom from the simulator of launches.
"""

import json
from typing import Any

from warpmap.hardware.performance.kernel_launch_overhead import run

C, F, KV = 2048, 8192, 512
"""Width, feed-forward width, and width of keys of the built-in step."""

DECODE_BYTES: dict[str, float] = {
    "norm": 4 * C,
    "qkv": 2 * C * (C + 2 * KV),
    "rope": 4 * (C + KV),
    "cache": 8 * KV,
    "attention": 2 * 1024 * 2 * KV,  # 1024 tokens
    "output": 2 * C * C,
    "add": 6 * C,
    "gate_up": 2 * C * 2 * F,
    "silu_mul": 6 * F,
    "down": 2 * C * F,
}
"""Bytes of each kernel of the built-in step, one token, bf16."""

LAYER = (
    *("norm", "qkv", "rope", "cache", "attention", "output", "add"),
    *("norm", "gate_up", "silu_mul", "down", "add"),
)


def decode_step(
    layers: int = 4,
    graph: bool = False,
    host_us: float = 10.0,
    bandwidth_gb_s: float = 4800.0,
) -> str:
    """A trace of one decoding step, made by the simulator of launches.

    Args:
        layers: Layers of the model, 12 kernels each.
        graph: Whether one launch starts all kernels.
        host_us: What an operation costs the host, in us.
        bandwidth_gb_s: Of the GPU's memory, in GB/s.

    Returns:
        JSON, in the form in which PyTorch's profiler writes it.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> len(json.loads(decode_step(layers=1))["traceEvents"])
        38
    """
    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}")
    if not bandwidth_gb_s > 0:
        raise ValueError(
            f"bandwidth_gb_s must be more than 0, got {bandwidth_gb_s}"
        )
    names = LAYER * layers
    # an empty kernel takes 2 us
    times = [2 + DECODE_BYTES[n] / bandwidth_gb_s / 1e3 for n in names]
    events: list[dict[str, Any]] = []

    def note(
        cat: str, name: str, start: float, end: float, n: int = -1
    ) -> None:
        lane = {"pid": 0, "tid": 7} if cat == "kernel" else {"pid": 1, "tid": 1}
        about = {"correlation": n} if n >= 0 else {}
        # whole ns, both ends rounded alike: what follows at once, touches
        ts = round(start, 3)
        events.append(
            {"ph": "X", "cat": cat, "name": name, **lane, "args": about}
            | {"ts": ts, "dur": round(round(end, 3) - ts, 3)}
        )

    done = run([sum(times)] if graph else times, host_us, latency_us=5.0)
    for i, each in enumerate(done):
        op, call = (
            ("CUDAGraph.replay", "cudaGraphLaunch")
            if graph
            else (f"aten::{names[i]}", "cudaLaunchKernel")
        )
        note("cpu_op", op, each.called, each.queued)
        # the last half of the operation is the driver's
        half = (each.called + each.queued) / 2
        note("cuda_runtime", call, half, each.queued, i)
        start = each.start
        for n, name in enumerate(names if graph else [names[i]]):
            took = times[n] if graph else times[i]
            note("kernel", name, start, start + took, i)
            start += took
    # the host needs the token
    note("cpu_op", "aten::item", done[-1].queued, done[-1].end)
    note("cuda_runtime", "cudaStreamSynchronize", done[-1].queued, done[-1].end)
    return json.dumps({"traceEvents": events})
