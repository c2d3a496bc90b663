"""Time of an operation against its size, for five ways to launch it.

The operation is ``y += x`` in fp32, fifty times in a row: PyTorch, Triton and
CUDA C++ launch a kernel each, torch.compile makes one kernel of the fifty, a
CUDA graph starts PyTorch's fifty with one launch. Besides, what a replay costs
against the size of the graph, and how many launches fit into the queue.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from warpmap.kernels import tl, triton
from warpmap.tools.compilers.cuda_programming import gpu_kernel

SIZES = [1 << n for n in (10, 14, 16, 18, 20, 22, 24, 26)]  # elements
CHAIN = 50  # operations
RUNS = 8  # of a chain: fewer launches than the queue holds
ROUNDS = 11
BANDWIDTH = 4.8e12  # of the data sheet, in byte/s
BYTES = 12  # of an element: two reads and a write
BLOCK = 1024
THREADS = 256
NODES = (1, 10, 100, 1000)  # of a graph

GRAPH, FUSED, WAIT = "CUDA graph", "torch.compile", "PyTorch, a wait each"
KEYS = {
    "PyTorch": "pytorch",
    "Triton": "triton",
    "CUDA C++": "cuda",
    FUSED: "compile",
    GRAPH: "graph",
    WAIT: "wait",
}
"""Ways to launch, and how the record's columns are called."""


@dataclass
class Chain:
    """Fifty times ``y += x``, launched in one way."""

    x: torch.Tensor
    y: torch.Tensor
    run: Callable[[], object]


@triton.jit
def _add_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    y = tl.load(y_ptr + i, mask) + tl.load(x_ptr + i, mask)
    tl.store(y_ptr + i, y, mask)


def _tensors(n):
    # small integers: their sums are exact in every order
    x = torch.randint(0, 4, (n,), device="cuda").float()
    return x, torch.randint(0, 4, (n,), device="cuda").float()


def _add(x, y):
    for _ in range(CHAIN):
        y.add_(x)


def _add_and_wait(x, y):
    for _ in range(CHAIN):
        y.add_(x)
        torch.cuda.synchronize()


def _captured(work, *arguments):
    """A graph of what ``work`` launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work(*arguments)  # warm-up, on the stream that is captured
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work(*arguments)
    return graph


def chains(n: int) -> dict[str, Chain]:
    """The ways to launch, each with tensors of its own.

    Args:
        n: Elements.
    """
    tensors = {how: _tensors(n) for how in KEYS}

    def run_triton(x, y):
        grid = (triton.cdiv(n, BLOCK),)
        for _ in range(CHAIN):
            _add_kernel[grid](x, y, n, BLOCK=BLOCK)

    axpy = gpu_kernel("axpy_once")

    def run_cuda(x, y):
        blocks = -(-n // THREADS)
        for _ in range(CHAIN):
            axpy(blocks, THREADS, 1.0, x, y, n)

    torch._dynamo.reset()  # a new size is no reason to give up
    graph = _captured(_add, *tensors[GRAPH])
    works = {
        "PyTorch": _add,
        "Triton": run_triton,
        "CUDA C++": run_cuda,
        FUSED: torch.compile(_add, dynamic=False),
        GRAPH: lambda x, y: graph.replay(),
        WAIT: _add_and_wait,
    }
    return {
        how: Chain(*tensors[how], lambda w=work, t=tensors[how]: w(*t))
        for how, work in works.items()
    }


def _us_per_op(chain):
    """Until the host is done, and until the GPU is."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(RUNS):
        chain.run()
    launched = time.perf_counter()
    torch.cuda.synchronize()
    end = time.perf_counter()
    ops = RUNS * CHAIN
    return 1e6 * (launched - begin) / ops, 1e6 * (end - begin) / ops


def predict(how: str, n: int, measured: dict[tuple[str, int], float]) -> float:
    """Time of an operation from its time at the smallest size, in us.

    Args:
        how: Which way to launch.
        n: Elements.
        measured: Times by way and elements, in us. Of those at ``n`` only
            the graph's is used, as the time of the kernel.
    """
    least = min(size for _, size in measured)
    known = measured[how, least]
    if how == GRAPH:
        return known + 1e6 * BYTES * (n - least) / BANDWIDTH
    kernel = measured[GRAPH, n]
    if how == WAIT:
        return known + kernel - measured[GRAPH, least]
    return max(known, kernel / CHAIN if how == FUSED else kernel)


def _chain_rows():
    measured, host = {}, {}
    for n in SIZES:
        ways = chains(n)
        for how, chain in ways.items():
            before = chain.y.clone()
            chain.run()
            torch.cuda.synchronize()
            if not torch.equal(chain.y, before + CHAIN * chain.x):
                raise RuntimeError(f"wrong result: {how}, {n} elements")
            chain.run()
        found = {how: [] for how in ways}
        for _ in range(ROUNDS):
            for how, chain in ways.items():
                found[how].append(_us_per_op(chain))
        for how, times in found.items():
            host[how, n] = statistics.median(h for h, _ in times)
            measured[how, n] = statistics.median(t for _, t in times)
    found = []
    for n in SIZES:
        row = {"kind": "chain", "elements": n}
        for how, key in KEYS.items():
            row[f"{key}_us"] = round(measured[how, n], 3)
            predicted = predict(how, n, measured)
            row[f"{key}_predicted_us"] = round(predicted, 3)
        found.append(row)
    least = min(SIZES)
    return found + [
        {
            "kind": "launch",
            "how": how,
            "host_us_per_op": round(host[how, least], 3),
            "total_us_per_op": round(measured[how, least], 3),
        }
        for how in KEYS
    ]


def _graph_rows():
    found = []
    x, y = _tensors(SIZES[0])
    for nodes in NODES:

        def work(nodes=nodes):
            for _ in range(nodes):
                y.add_(x)

        work()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        graph = _captured(work)
        capture = time.perf_counter() - begin
        for _ in range(3):
            graph.replay()
        host, gpu = [], []
        for _ in range(3 * ROUNDS):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            graph.replay()
            host.append(1e6 * (time.perf_counter() - begin))
        torch.cuda.synchronize()
        for _ in range(ROUNDS):
            first = torch.cuda.Event(enable_timing=True)
            last = torch.cuda.Event(enable_timing=True)
            # keeps the GPU busy until the replays are queued behind it
            torch.cuda._sleep(10_000_000)
            first.record()
            for _ in range(4):
                graph.replay()
            last.record()
            last.synchronize()
            gpu.append(1e3 * first.elapsed_time(last) / 4 / nodes)
        replay = statistics.median(host)
        found.append(
            {
                "kind": "graph",
                "kernels": nodes,
                "capture_ms": round(1e3 * capture, 2),
                "replay_us": round(replay, 2),
                "replay_us_per_kernel": round(replay / nodes, 3),
                "gpu_us_per_kernel": round(statistics.median(gpu), 3),
            }
        )
    return found


def queue_depth() -> int:
    """Launches that one stream holds before the host must wait.

    Raises:
        RuntimeError: If no launch waits.
    """
    x, y = _tensors(1)
    y.add_(x)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # half a second, the first under way
    for launches in range(1, 50_000):
        begin = time.perf_counter()
        y.add_(x)
        if time.perf_counter() - begin > 0.05:
            torch.cuda.synchronize()
            return launches
    torch.cuda.synchronize()
    raise RuntimeError("no launch had to wait")


def rows() -> list[dict]:
    """Time chains of every size, graphs of every length, and the queue.

    Returns:
        Rows of four kinds: ``chain``, ``launch``, ``graph`` and ``queue``.

    Raises:
        RuntimeError: If there is no GPU, a result is wrong, or no launch ever
            waits.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("this benchmark needs one NVIDIA GPU")
    return [
        *_chain_rows(),
        *_graph_rows(),
        {"kind": "queue", "launches": queue_depth()},
    ]
