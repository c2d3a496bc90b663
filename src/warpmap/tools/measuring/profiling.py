"""What a profiler's trace says: who works, who waits, and for whom.

PyTorch's profiler writes a Chrome trace: JSON with an event for each
operation, each call of CUDA and each kernel. From it follow

    self time      of an operation, without the operations inside it
    busy time      in which at least one kernel or copy runs on the GPU
    gaps           between, each with the kernel that was waited for
    launch delay   from the call that launches a kernel to its start
    exposed time   of communication that no computation hides

Reference: https://docs.pytorch.org/docs/stable/profiler.html
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from statistics import median
from typing import Any

HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
CALLS = ("cuda_runtime", "cuda_driver")
GPU = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of events; all others, such as ``gpu_user_annotation``, repeat
what these say."""


@dataclass(frozen=True)
class Event:
    """Something that lasted.

    Attributes:
        name: Of the operation, the call or the kernel.
        category: ``cat`` of the trace, for example ``"kernel"``.
        start_ns: When it began, in ns after the first event.
        duration_ns: How long it took, in ns.
        lane: Process and thread on the host, GPU and stream on the GPU.
        args: What else the profiler noted.
    """

    name: str
    category: str
    start_ns: int
    duration_ns: int
    lane: tuple[str, str]
    args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def end_ns(self) -> int:
        """When it ended, in ns after the first event."""
        return self.start_ns + self.duration_ns


def read_trace(text: str) -> list[Event]:
    """Events of a Chrome trace that last, of all categories above.

    Args:
        text: What ``export_chrome_trace`` wrote.

    Raises:
        ValueError: If the text is no such trace.

    Examples:
        >>> from warpmap.tools.measuring._decode_step import decode_step
        >>> [event.name for event in read_trace(decode_step())][:2]
        ['aten::norm', 'cudaLaunchKernel']
    """
    try:
        # a time since boot in us has more digits than a float keeps
        found = json.loads(text, parse_float=Decimal)
        listed = found["traceEvents"] if isinstance(found, dict) else found
        kept = [
            e
            for e in listed
            if e.get("ph") == "X" and e.get("cat") in HOST + GPU
        ]
        first = min((Decimal(e["ts"]) for e in kept), default=Decimal(0))
        events = [
            Event(
                e["name"],
                e["cat"],
                round(1000 * (Decimal(e["ts"]) - first)),
                round(1000 * Decimal(e["dur"])),
                (str(e["pid"]), str(e["tid"])),
                e.get("args", {}),
            )
            for e in kept
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"text must be a Chrome trace with traceEvents: {error!r}"
        ) from None
    return sorted(events, key=lambda e: (e.start_ns, -e.duration_ns))


@dataclass(frozen=True)
class HostTime:
    """What the host spent on events of one name.

    Attributes:
        name: Of the operation or call.
        count: How many there were.
        total_ns: With what they called, in ns.
        self_ns: Without, in ns.
    """

    name: str
    count: int
    total_ns: int
    self_ns: int


def self_times(events: Iterable[Event]) -> list[HostTime]:
    """Time of the host by name, most self time first.

    Args:
        events: Of a trace, in any order.

    Examples:
        >>> inner = Event("mm", "cpu_op", 2, 5, ("1", "1"))
        >>> self_times([Event("linear", "cpu_op", 0, 9, ("1", "1")), inner])
        ... # doctest: +NORMALIZE_WHITESPACE
        [HostTime(name='mm', count=1, total_ns=5, self_ns=5),
         HostTime(name='linear', count=1, total_ns=9, self_ns=4)]
    """
    sums: dict[str, list[int]] = {}
    stacks: dict[tuple[str, str], list[Event]] = {}
    host = [e for e in events if e.category in HOST]
    for event in sorted(host, key=lambda e: (e.start_ns, -e.duration_ns)):
        stack = stacks.setdefault(event.lane, [])
        while stack and stack[-1].end_ns < event.end_ns:
            stack.pop()
        if stack:  # what encloses it did not do this itself
            sums[stack[-1].name][2] -= event.duration_ns
        stack.append(event)
        of_name = sums.setdefault(event.name, [0, 0, 0])
        of_name[0] += 1
        of_name[1] += event.duration_ns
        of_name[2] += event.duration_ns
    rows = [HostTime(name, *numbers) for name, numbers in sums.items()]
    return sorted(rows, key=lambda row: -row.self_ns)


def on_gpu(events: Iterable[Event]) -> list[Event]:
    """Kernels and copies, in the order of their starts.

    Args:
        events: Of a trace, in any order.

    Raises:
        ValueError: If they are of more than one GPU.

    Examples:
        >>> from warpmap.tools.measuring._decode_step import decode_step
        >>> [e.name for e in on_gpu(read_trace(decode_step()))][:3]
        ['norm', 'qkv', 'rope']
    """
    found = [e for e in events if e.category in GPU]
    gpus = {e.lane[0] for e in found}
    if len(gpus) > 1:
        raise ValueError(
            f"events must be of one GPU, got {', '.join(sorted(gpus))}: "
            "choose them by lane first"
        )
    return sorted(found, key=lambda e: (e.start_ns, e.end_ns))


def covered_ns(events: Sequence[Event]) -> int:
    """Time in which at least one of the events runs.

    Args:
        events: In the order of their starts.

    Examples:
        >>> lane = ("0", "7")
        >>> ks = [Event("k", "kernel", t, 10, lane) for t in (0, 5, 30)]
        >>> covered_ns(ks)
        25
    """
    covered, end = 0, 0
    for event in events:
        covered += max(0, event.end_ns - max(end, event.start_ns))
        end = max(end, event.end_ns)
    return covered


def launches(events: Iterable[Event]) -> dict[int, Event]:
    """The call that launched what, by correlation number.

    Examples:
        >>> from warpmap.tools.measuring._decode_step import decode_step
        >>> launches(read_trace(decode_step()))[0].name
        'cudaLaunchKernel'
    """
    return {
        e.args["correlation"]: e
        for e in events
        if e.category in CALLS and "correlation" in e.args
    }


@dataclass(frozen=True)
class Gap:
    """A time in which the GPU did nothing.

    Attributes:
        start_ns: When it began, in ns.
        end_ns: When it ended, in ns.
        before: What ran next.
        late: Whether the call that launched it had not returned when the GPU
            ran dry; None if the trace does not hold the call. Kernels of one
            graph are never late for each other.
    """

    start_ns: int
    end_ns: int
    before: str
    late: bool | None


def idle_gaps(events: Sequence[Event]) -> list[Gap]:
    """Gaps between the first kernel and the last, in their order.

    Args:
        events: Of a trace.

    Raises:
        ValueError: If kernels are of more than one GPU.

    Examples:
        >>> from warpmap.tools.measuring._decode_step import decode_step
        >>> idle_gaps(read_trace(decode_step()))[0]
        Gap(start_ns=17002, end_ns=25000, before='qkv', late=True)
    """
    gpu, calls = on_gpu(events), launches(events)
    gaps = []
    last = gpu[0] if gpu else None  # to end, of those before
    for event in gpu:
        if last and event.start_ns > last.end_ns:
            number = event.args.get("correlation", -1)
            call = calls.get(number)
            late = call.end_ns > last.end_ns if call else None
            if number == last.args.get("correlation"):
                late = False  # one launch of a graph started both
            gaps.append(Gap(last.end_ns, event.start_ns, event.name, late))
        if not last or event.end_ns > last.end_ns:
            last = event
    return gaps


def launch_delays(events: Sequence[Event]) -> list[int]:
    """From each launching call's begin to the start on the GPU, in ns.

    Args:
        events: Of a trace. What has no call in it is left out.

    Examples:
        >>> from warpmap.tools.measuring._decode_step import decode_step
        >>> launch_delays(read_trace(decode_step()))[:2]
        [10000, 10000]
    """
    calls = launches(events)
    return [
        e.start_ns - calls[e.args["correlation"]].start_ns
        for e in on_gpu(events)
        if e.args.get("correlation") in calls
    ]


def communication(events: Sequence[Event]) -> tuple[int, int]:
    """Time in NCCL's kernels, and what of it no other kernel hides, in ns.

    Args:
        events: Of a trace.

    Examples:
        >>> mm = Event("mm", "kernel", 0, 8, ("0", "7"))
        >>> sums = Event("ncclAllReduce", "kernel", 5, 9, ("0", "20"))
        >>> communication([mm, sums])
        (9, 6)
    """
    kernels = [e for e in on_gpu(events) if e.category == "kernel"]
    ours = [e for e in kernels if "nccl" in e.name.lower()]
    others = [e for e in kernels if "nccl" not in e.name.lower()]
    return covered_ns(ours), covered_ns(kernels) - covered_ns(others)


@dataclass(frozen=True)
class KernelTime:
    """All launches of one kernel.

    Attributes:
        name: Of the kernel.
        count: Launches.
        total_ns: Time of all together, in ns.
        share: Of the time of all kernels and copies.
        bandwidth_share: Bytes moved over what the memory could have moved in
            that time; None if the bytes are not known.
    """

    name: str
    count: int
    total_ns: int
    share: float
    bandwidth_share: float | None


def kernel_times(
    events: Iterable[Event],
    bytes_moved: Mapping[str, float] | None = None,
    bandwidth_gb_s: float = 4800.0,
) -> list[KernelTime]:
    """Time on the GPU by kernel, most first.

    Args:
        events: Of a trace.
        bytes_moved: What one launch of a kernel must move, by its name. A
            profiler does not know it: it follows from the shapes.
        bandwidth_gb_s: Of the memory, in GB/s (10^9 byte/s).

    Raises:
        ValueError: If the bandwidth is not positive.

    Examples:
        >>> from warpmap.tools.measuring._decode_step import (
        ...     DECODE_BYTES,
        ...     decode_step,
        ... )
        >>> top = kernel_times(read_trace(decode_step()), DECODE_BYTES)
        >>> top[0].name, round(top[0].bandwidth_share, 2)
        ('gate_up', 0.87)
    """
    if not bandwidth_gb_s > 0:
        raise ValueError(
            f"bandwidth_gb_s must be more than 0, got {bandwidth_gb_s}"
        )
    sums: dict[str, list[int]] = {}
    for event in on_gpu(events):
        sums.setdefault(event.name, []).append(event.duration_ns)
    everything = sum(map(sum, sums.values()))
    rows = []
    for name, times in sums.items():
        moved = (bytes_moved or {}).get(name)
        total = sum(times)
        rows.append(
            KernelTime(
                name,
                len(times),
                total,
                total / everything if everything else 0.0,
                moved * len(times) / total / bandwidth_gb_s
                if moved is not None and total
                else None,
            )
        )
    return sorted(rows, key=lambda row: -row.total_ns)


@dataclass(frozen=True)
class Summary:
    """A trace in a few numbers.

    Attributes:
        span_us: From the first event to the end of the last, in us.
        busy_percent: Share of it in which the GPU works.
        launched: Kernels and copies.
        gaps: Times between them in which the GPU does nothing.
        idle_us: All of these together, in us.
        late_percent: Share of the idle time in which the kernel waited for had
            not been launched when the GPU ran dry.
        delay_us: Median launch delay, in us; None without calls.
    """

    span_us: float
    busy_percent: float
    launched: int
    gaps: int
    idle_us: float
    late_percent: float
    delay_us: float | None


def summarise(events: Sequence[Event]) -> Summary:
    """Busy time, gaps and delays of a trace.

    Args:
        events: Of a trace, of one GPU.

    Raises:
        ValueError: If there are no events, or those of more than one GPU.

    Examples:
        >>> from warpmap.tools.measuring._decode_step import decode_step
        >>> found = summarise(read_trace(decode_step()))
        >>> round(found.busy_percent), round(found.late_percent)
        (41, 96)
    """
    if not events:
        raise ValueError("events must not be empty: nothing was profiled")
    span = max(e.end_ns for e in events) - min(e.start_ns for e in events)
    gpu, gaps = on_gpu(events), idle_gaps(events)
    idle = sum(gap.end_ns - gap.start_ns for gap in gaps)
    late = sum(gap.end_ns - gap.start_ns for gap in gaps if gap.late)
    delays = launch_delays(events)
    return Summary(
        span_us=span / 1e3,
        busy_percent=100 * covered_ns(gpu) / span if span else 0.0,
        launched=len(gpu),
        gaps=len(gaps),
        idle_us=idle / 1e3,
        late_percent=100 * late / idle if idle else 0.0,
        delay_us=median(delays) / 1e3 if delays else None,
    )
