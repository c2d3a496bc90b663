"""Host and GPU as two lanes: who waits for whom.

The host launches kernels into a queue and goes on. The GPU runs them in their
order. A launch takes the host ``a``, a kernel the GPU ``k``; ``l`` passes from
a launch to its kernel on an idle GPU; ``d`` launches may be under way:

    one kernel          a + l + k
    each of many        max(a, k), or (a + l + k) / d if the queue is short
    with a wait each    a + l + k + the wait's own cost

Reference: He, 2022, https://horace.io/brrr_intro.html
Reference: Gray, 2019, https://developer.nvidia.com/blog/cuda-graphs/
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from warpmap.chart import Axis, Line, LineChart, Point
from warpmap.trace import Cell, Frame, Grid, Lanes, Mark, Span, Trace

QUEUE = 1024  # launches that a stream holds, about


def _check(least: float, **arguments: float) -> None:
    for name, value in arguments.items():
        if not least <= value < math.inf:
            raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class Launched:
    """One kernel on both lanes; all times in us.

    Attributes:
        called: When the host began to launch it.
        queued: When the call returned.
        start: When the GPU began to run it.
        end: When it ended.
    """

    called: float
    queued: float
    start: float
    end: float


def run(
    kernel_us: Sequence[float],
    launch_us: float,
    latency_us: float = 0.0,
    depth: int = QUEUE,
    sync_every: int = 0,
    sync_us: float = 0.0,
    visit: Callable[[Launched], object] | None = None,
) -> list[Launched]:
    """Launch kernels into one stream.

    Args:
        kernel_us: How long the GPU takes for each, in us.
        launch_us: What a launch costs the host, in us.
        latency_us: From a launch to its kernel, if the GPU is idle, in us.
        depth: Launches that may be under way: not all of them have ended.
        sync_every: Kernels after which the host waits for the GPU; 0: never.
        sync_us: What such a wait costs beyond the waiting, in us.
        visit: Called with each kernel when its times are known.

    Raises:
        ValueError: If a time is negative, or a number out of range.

    Examples:
        >>> run([2.0, 2.0], launch_us=5.0)[-1]
        Launched(called=5.0, queued=10.0, start=10.0, end=12.0)
    """
    _check(0, launch_us=launch_us, latency_us=latency_us, sync_us=sync_us)
    _check(0, sync_every=sync_every)
    _check(1, depth=depth)
    for each in kernel_us:
        _check(0, kernel_us=each)
    host = gpu = 0.0  # when each of them is free
    done: list[Launched] = []
    for i, each in enumerate(kernel_us):
        if sync_every and i and i % sync_every == 0:
            host = max(host, gpu) + sync_us
        if i >= depth:  # the queue is full: the call waits
            host = max(host, done[i - depth].end)
        called, host = host, host + launch_us
        start = max(host + latency_us, gpu)
        gpu = start + each
        done.append(Launched(called, host, start, gpu))
        if visit:
            visit(done[-1])
    return done


def total_us(
    kernels: int,
    kernel_us: float,
    launch_us: float,
    latency_us: float = 0.0,
    depth: int = QUEUE,
    sync_every: int = 0,
    sync_us: float = 0.0,
) -> float:
    """When the last of equal kernels ends, without a simulation.

    Args:
        kernels: How many there are.
        kernel_us: How long the GPU takes for each, in us.
        launch_us: What a launch costs the host, in us.
        latency_us: From a launch to its kernel, if the GPU is idle, in us.
        depth: Launches that may be under way.
        sync_every: Kernels after which the host waits for the GPU; 0: never.
        sync_us: What such a wait costs beyond the waiting, in us.

    Raises:
        ValueError: If a time is negative, or a number out of range.

    Examples:
        >>> total_us(1000, kernel_us=2, launch_us=5)  # the host's pace
        5002.0
        >>> total_us(1000, kernel_us=20, launch_us=5)  # the GPU's pace
        20005.0
    """
    _check(0, kernel_us=kernel_us, launch_us=launch_us, latency_us=latency_us)
    _check(0, sync_us=sync_us, sync_every=sync_every)
    _check(1, kernels=kernels, depth=depth)
    first = launch_us + latency_us + kernel_us

    def burst(n: int) -> float:
        if not n:
            return 0.0
        pace = max(launch_us, kernel_us)
        freely = first + (n - 1) * pace
        # a full queue makes a launch wait for the end of a kernel, and its
        # own kernel then comes a whole round later
        rounds = (n - 1) // depth
        full = (rounds + 1) * first + (n - 1 - rounds * depth) * pace
        return float(max(freely, full))

    if not sync_every:
        return burst(kernels)
    waits, rest = divmod(kernels - 1, sync_every)
    return waits * (burst(sync_every) + sync_us) + burst(rest + 1)


@dataclass(frozen=True)
class Pace:
    """What a chain of equal operations costs.

    Attributes:
        us_per_op: Time of one operation, on average, in us.
        bound_by: Who sets the pace.
        gpu_busy_percent: Share of the time in which the GPU runs a kernel.
        kernel_us: Time of one kernel on the GPU, in us.
        total_us: Time of all operations, in us.
        break_even_elements: Elements from which on the GPU sets the pace.
    """

    us_per_op: float
    bound_by: str
    gpu_busy_percent: float
    kernel_us: float
    total_us: float
    break_even_elements: int


HOWS: dict[str, dict[str, int | float]] = {
    "A launch each": {"launch_us": 5.0, "ops_a_launch": 1, "sync_every": 0},
    "A launch and a wait each": {
        "launch_us": 5.0,
        "ops_a_launch": 1,
        "sync_every": 1,
    },
    "Graphs of 100 kernels": {
        "launch_us": 10.0,
        "ops_a_launch": 100,
        "sync_every": 0,
    },
}
"""Ways to launch, with costs in round numbers, as arguments of ``pace``."""


def pace(
    ops: int = 1000,
    elements: int = 65536,
    bytes_per_element: float = 12.0,
    bandwidth_gb_s: float = 4800.0,
    least_us: float = 2.0,
    launch_us: float = 5.0,
    ops_a_launch: int = 1,
    latency_us: float = 5.0,
    depth: int = QUEUE,
    sync_every: int = 0,
    sync_us: float = 5.0,
) -> Pace:
    """Time of a chain of operations that memory bounds.

    Args:
        ops: Operations, each a kernel.
        elements: Elements of each operation.
        bytes_per_element: Bytes read and written for each element.
        bandwidth_gb_s: Bandwidth of the memory, in GB/s (10^9 byte/s).
        least_us: Time of a kernel of no elements, in us.
        launch_us: What a launch costs the host, in us.
        ops_a_launch: Kernels that one launch starts; more than 1 is a graph.
        latency_us: From a launch to its kernel on an idle GPU, in us.
        depth: Launches that may be under way.
        sync_every: Launches after which the host waits; 0 for never.
        sync_us: What such a wait costs beyond the waiting, in us.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> found = pace(elements=1024)
        >>> round(found.us_per_op, 2), found.bound_by
        (5.01, 'host')
    """
    _check(1, ops=ops, elements=elements, ops_a_launch=ops_a_launch)
    _check(0, bytes_per_element=bytes_per_element, least_us=least_us)
    if not 0 < bandwidth_gb_s < math.inf:
        raise ValueError(
            f"bandwidth_gb_s must be more than 0, got {bandwidth_gb_s}"
        )
    if ops % ops_a_launch:
        raise ValueError(
            f"ops_a_launch must divide the {ops} ops, got {ops_a_launch}"
        )
    kernel_us = least_us + elements * bytes_per_element / bandwidth_gb_s / 1e3
    launches = ops // ops_a_launch
    # to the host a graph is one long kernel
    each = ops_a_launch * kernel_us
    costs = (launch_us, latency_us, depth, sync_every, sync_us)
    total = total_us(launches, each, *costs)

    round_trip = (launch_us + latency_us + each) / depth
    if sync_every and launches > sync_every:
        bound = "waiting for each other"
    elif round_trip > max(launch_us, each):
        bound = "a short queue"
    else:
        bound = "host" if launch_us > each else "GPU"
    to_hide = launch_us / ops_a_launch - least_us
    per_element = bytes_per_element / bandwidth_gb_s / 1e3
    even = max(1, math.ceil(to_hide / per_element)) if per_element else 1
    return Pace(
        us_per_op=total / ops,
        bound_by=bound,
        gpu_busy_percent=100 * ops * kernel_us / total if total else 0.0,
        kernel_us=kernel_us,
        total_us=total,
        break_even_elements=even,
    )


def pace_chart(**arguments: Any) -> LineChart:
    """Time of an operation against its size.

    Args:
        arguments: Those of ``pace``.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> [line.name for line in pace_chart().lines]
        ['your launches', 'the GPU alone']
    """
    yours = pace(**arguments)
    elements = arguments.get("elements", 65536)
    sizes = [2**n for n in range(8, 29)]
    sizes = sorted({*sizes, elements})
    found = [(n, pace(**{**arguments, "elements": n})) for n in sizes]
    return LineChart(
        "Time of an operation",
        Axis("elements", log=True),
        Axis("us", log=True),
        [
            Line("your launches", [(n, p.us_per_op) for n, p in found]),
            Line("the GPU alone", [(n, p.kernel_us) for n, p in found]),
        ],
        [Point("this size", elements, yours.us_per_op)],
    )


def launch_trace(
    kernels: int = 10,
    launch_us: float = 5.0,
    kernel_us: float = 2.0,
    latency_us: float = 3.0,
    depth: int = 4,
    sync_every: int = 0,
) -> Trace:
    """Host and GPU over time, one frame a launch.

    Args:
        kernels: Kernels to launch, 1 to 30.
        launch_us: What a launch costs the host, in us, at least 1.
        kernel_us: How long the GPU takes for each, in us, at least 1.
        latency_us: From a launch to its kernel on an idle GPU, in us.
        depth: Launches that may be under way, 1 to 12.
        sync_every: Kernels after which the host waits for the GPU; 0: never.

    Returns:
        A lane each, and the queue below; the last frame marks what was idle.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> launch_trace()[-1].caption
        'All done after 55 us. The GPU ran kernels for 36% of it.'
    """
    for name, value, most in (
        ("kernels", kernels, 30),
        ("depth", depth, 12),
    ):
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be 1 to {most}, got {value}")
    _check(1, launch_us=launch_us, kernel_us=kernel_us)
    seen: list[Launched] = []
    frames: Trace = []
    times = [kernel_us] * kernels
    costs = (launch_us, latency_us, depth, sync_every)
    end = run(times, *costs)[-1].end

    def lanes(now: float, last: bool = False) -> Lanes:
        host, gpu = [], []
        host_free = gpu_free = 0.0
        for i, each in enumerate(seen):
            if each.called > host_free:
                host.append(Span(host_free, each.called, "waits", "wait"))
            new: Mark = "new" if i == len(seen) - 1 and not last else ""
            host.append(Span(each.called, each.queued, f"{i}", new))
            host_free = each.queued
            if last and each.start > gpu_free:
                gpu.append(Span(gpu_free, each.start, "idle", "gone"))
            if each.start <= now:
                on: Mark = "on" if each.end > now and not last else ""
                gpu.append(Span(each.start, each.end, f"{i}", on))
            gpu_free = each.end
        return Lanes([("host", host), ("GPU", gpu)], "us", end, now)

    def queue(now: float) -> Grid:
        cells = [
            Cell(f"{i}", "on" if each.start <= now else "wait", f"{i}")
            for i, each in enumerate(seen)
            if each.end > now
        ]
        cells += [Cell()] * (depth - len(cells))
        return Grid([("under way", cells)])

    def visit(each: Launched) -> None:
        seen.append(each)
        now = each.queued
        number = len(seen) - 1
        before = seen[-2].queued if number else 0.0
        waited = each.called - before
        paused = f" after a wait of {waited:g} us" if waited else ""
        behind = sum(other.start > now for other in seen)
        frames.append(
            Frame(
                f"At {now:g} us kernel {number} is launched{paused}; "
                f"{behind} in all have not started.",
                lanes(now),
                queue(now),
            )
        )

    run(times, *costs, visit=visit)
    busy = sum(times) / end
    frames.append(
        Frame(
            f"All done after {end:g} us. The GPU ran kernels for "
            f"{busy:.0%} of it.",
            lanes(end, last=True),
            queue(end),
        )
    )
    return frames
