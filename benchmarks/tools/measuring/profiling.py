"""A decoding step under PyTorch's profiler, launched one by one and as a graph.

The step is that of a small model of plain layers, batch 1, in bf16: what the
page's analyser finds in its trace, beside the time without a profiler.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function

from warpmap.tools.measuring.profiling import (
    GPU,
    kernel_times,
    read_trace,
    summarise,
)

LAYERS = 16
C, FF = 2048, 8192  # width, feed-forward width
H, HKV, D = 32, 8, 64  # heads, key-value heads, head size
CONTEXT = 1024  # tokens in the cache
BANDWIDTH = 4800.0  # of the data sheet, in GB/s
STEPS = 50
PROFILES = 5
TOP = 8  # kernels in the record


class Layer(nn.Module):
    """One layer; the cache is full, and its last token is written again."""

    def __init__(self):
        """Random weights, and a random cache."""
        super().__init__()
        self.norms = nn.ParameterList([torch.ones(C), torch.ones(C)])
        self.qkv = nn.Linear(C, (H + 2 * HKV) * D, bias=False)
        self.output = nn.Linear(H * D, C, bias=False)
        self.gate_up = nn.Linear(C, 2 * FF, bias=False)
        self.down = nn.Linear(FF, C, bias=False)
        self.register_buffer("cache", torch.randn(2, 1, HKV, CONTEXT, D))

    def forward(self, x):
        """``(1, C)`` to ``(1, C)``."""
        qkv = self.qkv(F.rms_norm(x, (C,), self.norms[0]))
        q, k, v = qkv.view(1, -1, 1, D).split((H, HKV, HKV), dim=1)
        self.cache[0, :, :, -1:] = k
        self.cache[1, :, :, -1:] = v
        keys, values = self.cache
        heads = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        x = x + self.output(heads.view(1, H * D))
        gate_up = self.gate_up(F.rms_norm(x, (C,), self.norms[1]))
        gate, up = gate_up.chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def model_bytes(layers: int) -> int:
    """Bytes that a step must read: all weights, and the cache."""
    weights = C * (H + 2 * HKV) * D + H * D * C + 3 * C * FF + 2 * C
    return 2 * layers * (weights + 2 * HKV * CONTEXT * D)


def runs(layers: int = LAYERS):
    """The step launched one by one, and as a graph.

    Args:
        layers: Layers of the model.

    Returns:
        Two functions that take nothing and return the last layer's output.
    """
    with torch.device("cuda"):
        model = nn.Sequential(*(Layer() for _ in range(layers))).bfloat16()
    model.requires_grad_(False)
    x = torch.randn(1, C, device="cuda", dtype=torch.bfloat16)

    def eager():
        return model(x)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # warm-up, on another stream as capture asks for
            eager()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = eager()

    def replay():
        graph.replay()
        return out

    return eager, replay


def trace(step):
    """Events of one step, up to the end of its wait for the GPU."""
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as found, record_function("step"):
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        found.export_chrome_trace(str(file))
        events = read_trace(file.read_text(encoding="utf-8"))
    # the profiler itself calls CUDA before and after
    (whole,) = [e for e in events if e.name == "step"]
    return [
        e
        for e in events
        if e.category in GPU or whole.start_ns <= e.start_ns <= whole.end_ns
    ]


def summary(step):
    """What the analyser says of one step, after one that warms up."""
    trace(step)
    return summarise(trace(step))


def _step_us(step):
    """A step with its wait, without a profiler."""
    times = []
    for _ in range(STEPS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - begin))
    return statistics.median(times)


def rows() -> list[dict]:
    """Time, profile and analyse a step, one by one and as a graph.

    Returns:
        Rows of two kinds: ``step``, and ``kernel`` for the kernels that take
        longest.

    Raises:
        RuntimeError: If there is no GPU, or the two runs differ.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("this benchmark needs one NVIDIA GPU")
    torch.manual_seed(0)
    eager, replay = runs()
    expected, found = eager().float(), replay().float()
    if not torch.allclose(expected, found, rtol=0.05, atol=0.05):
        raise RuntimeError("the graph's result is another one")
    listed, kernels = [], []
    for how, step in (("a launch each", eager), ("one graph", replay)):
        for _ in range(3):
            step()
        without = _step_us(step)
        trace(step)  # the first one starts the profiler's own machinery
        traces = [trace(step) for _ in range(PROFILES)]
        every = [summarise(events) for events in traces]

        def middle(name, every=every):
            return statistics.median(getattr(s, name) or 0 for s in every)

        gpu_us = statistics.median(
            s.busy_percent * s.span_us / 100 for s in every
        )
        moved = model_bytes(LAYERS)
        listed.append(
            {
                "kind": "step",
                "how": how,
                "step_us": round(without, 1),
                "profiled_us": round(middle("span_us"), 1),
                "gpu_us": round(gpu_us, 1),
                "busy_percent": round(middle("busy_percent"), 1),
                # of the step as it is without a profiler
                "gpu_of_step_percent": round(100 * gpu_us / without, 1),
                "launched": int(middle("launched")),
                "gaps": int(middle("gaps")),
                "idle_us": round(middle("idle_us"), 1),
                "late_percent": round(middle("late_percent"), 1),
                "delay_us": round(middle("delay_us"), 2),
                "bandwidth_percent": round(
                    100 * moved / (gpu_us * 1e3 * BANDWIDTH), 1
                ),
            }
        )
        for row in kernel_times(traces[-1])[:TOP]:
            kernels.append(
                {
                    "kind": "kernel",
                    "how": how,
                    "kernel": row.name[:60],
                    "launches": row.count,
                    "total_us": round(row.total_ns / 1e3, 1),
                    "share_percent": round(100 * row.share, 1),
                }
            )
    return listed + kernels
