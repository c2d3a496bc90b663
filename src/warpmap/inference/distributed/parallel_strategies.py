"""Five ways to share a model among GPUs: what each holds, sends, waits for.

    data       the whole model, requests of its own
    tensor     a part of every matrix; all-reduces add up partial sums
    pipeline   a run of layers; activations go from stage to stage
    sequence   a part of the tokens, and within attention a part of the heads
    expert     requests of its own, but a part of the experts; tokens travel

Any of them combine: GPUs are the product of the five. A step is priced by
its operators under the roofline and by its messages in the alpha-beta model,
one after another. Choices of experts are taken to be even.

Reference: Pope et al., 2022, https://arxiv.org/abs/2211.05102
Reference: Aminabadi et al., 2022, https://arxiv.org/abs/2207.00032
Reference: Jacobs et al., 2023, https://arxiv.org/abs/2309.14509
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from warpmap.chart import Axis, Line, LineChart, Point
from warpmap.hardware.gpus import GPUS
from warpmap.hardware.performance.roofline import Ceilings
from warpmap.inference.decoding.memory_bound_decoding import step_seconds
from warpmap.inference.distributed._stages import Split, share_out, stages
from warpmap.models.configs import MODELS, ModelConfig, config
from warpmap.models.foundations.parameter_count import count

GIB = 1 << 30
BATCHES = [1 << n for n in range(0, 13, 2)]


def timeline(
    stage_seconds: Sequence[float],
    flights: int,
    steps: int,
    record: Callable[[int, int, float], object] | None = None,
) -> list[float]:
    """When each step is done, with requests in flight through the stages.

    A stage serves one flight at a time. A flight starts its next step when
    its token has left the last stage.

    Args:
        stage_seconds: Time of a visit, for each stage.
        flights: Companies of requests, which start at the same moment.
        steps: Tokens of each.
        record: Hears of each visit: its stage, its flight, when it starts.

    Returns:
        The time at which the last flight has left, for each step.

    Examples:
        >>> timeline([1.0, 1.0], flights=1, steps=3)
        [2.0, 4.0, 6.0]
        >>> timeline([1.0, 1.0], flights=2, steps=3)
        [3.0, 5.0, 7.0]
    """
    free = [0.0] * len(stage_seconds)
    ready = [0.0] * flights
    done = []
    for _ in range(steps):
        for flight in range(flights):
            for stage, seconds in enumerate(stage_seconds):
                start = max(free[stage], ready[flight])
                free[stage] = ready[flight] = start + seconds
                if record:
                    record(stage, flight, start)
        done.append(ready[-1])
    return done


@dataclass(frozen=True)
class ParallelPlan:
    """What a split costs.

    Attributes:
        gpus: GPUs in all.
        fits: Whether weights, keys and values fit into the fullest GPU.
        weights_gib: Weights on the fullest GPU, in GiB.
        cache_gib: Keys and values on it, in GiB.
        copies: Weights on all GPUs over those of the model.
        gflops: Operations of the busiest GPU in a step, in 10^9.
        sent_mb: What the busiest GPU sends in a step at least, in MB.
        messages: Exchanges that a token waits for, one after another.
        token_ms: Time between two tokens of a request, at best, in ms.
        waiting_percent: How much of a token's way is waiting for messages.
        tokens_per_s: New tokens of all requests, at most.
        tokens_per_s_per_gpu: The same for each GPU.
    """

    gpus: int
    fits: bool
    weights_gib: float
    cache_gib: float
    copies: float
    gflops: float
    sent_mb: float
    messages: int
    token_ms: float
    waiting_percent: float
    tokens_per_s: float
    tokens_per_s_per_gpu: float


def parallel_strategies(
    model: str = "Mixtral 8x7B",
    data: int = 1,
    tensor: int = 8,
    pipeline: int = 1,
    sequence: int = 1,
    expert: int = 1,
    batch: int = 64,
    context: int = 4096,
    new_tokens: int = 1,
    weight_bytes: float = 2.0,
    cache_bytes: float = 2.0,
    peak_tflops: float = 989.4,
    bandwidth_tb_s: float = 4.8,
    memory_gib: float = 140.4,
    link_gb_s: float = 450.0,
    alpha_us: float = 5.0,
) -> ParallelPlan:
    """Memory, work, messages and speed of a split model, at best.

    Args:
        model: Name of a published model.
        data: Copies of everything, each with requests of its own.
        tensor: GPUs that share every matrix.
        pipeline: Stages, each with a run of layers.
        sequence: GPUs that share tokens, and in attention the heads.
        expert: GPUs with requests of their own that share the experts.
        batch: Requests of all GPUs together.
        context: Tokens of each request, the new ones among them.
        new_tokens: New tokens of each: 1 decodes, more fill a prompt.
        weight_bytes: Bytes of a weight: 2 for bf16, 1 for fp8.
        cache_bytes: Bytes of a cached value.
        peak_tflops: Dense peak of a GPU, in TFLOP/s.
        bandwidth_tb_s: Memory bandwidth of a GPU, in TB/s.
        memory_gib: Memory of a GPU, in GiB.
        link_gb_s: Link of a GPU to all others, one direction, in GB/s.
        alpha_us: Start-up of a message, in microseconds; assumed.

    Raises:
        ValueError: If a number is out of range or the split impossible.

    Examples:
        >>> tensor = parallel_strategies(batch=1)
        >>> stages = parallel_strategies(batch=1, tensor=1, pipeline=8)
        >>> round(tensor.token_ms, 1), round(stages.token_ms, 1)
        (1.7, 5.5)
    """
    given = dict(locals())
    for name, value in given.items():
        if name != "model" and not 0 < value < 1 << 30:
            raise ValueError(f"{name} must be positive, got {value}")
    if new_tokens > context:
        raise ValueError(
            f"new_tokens must be within {context} tokens, got {new_tokens}"
        )
    try:
        c = config(model)
    except ValueError as error:
        raise ValueError(f"model: {error}") from error
    split = Split(data, tensor, pipeline, sequence, expert)
    parts = stages(
        c, split, batch, context, new_tokens, weight_bytes, cache_bytes
    )
    flights = share_out(split, batch).flights
    chip = Ceilings(peak_tflops * 1e12, bandwidth_tb_s * 1e12)

    waits = [
        math.fsum(m.seconds(alpha_us, link_gb_s) for m in stage.messages)
        for stage in parts
    ]
    seconds = [
        step_seconds(stage.operators, chip) + wait
        for stage, wait in zip(parts, waits, strict=True)
    ]
    # flights fill the stages in the first step; the second is like all others
    first, second = timeline(seconds, flights, steps=2)
    step = second - first
    fullest = max(
        parts,
        key=lambda s: (
            weight_bytes * s.parameters + cache_bytes * s.cache_values
        ),
    )
    weights = weight_bytes * fullest.parameters / GIB
    cached = cache_bytes * fullest.cache_values / GIB
    stored = split.gpus // pipeline * sum(s.parameters for s in parts)
    flops = [math.fsum(op.flops for op in s.operators) for s in parts]
    sent = [math.fsum(m.sent for m in s.messages) for s in parts]
    return ParallelPlan(
        gpus=split.gpus,
        fits=weights + cached <= memory_gib,
        weights_gib=weights,
        cache_gib=cached,
        copies=stored / count(c).total,
        gflops=flights * max(flops) / 1e9,
        sent_mb=flights * max(sent) / 1e6,
        messages=sum(m.times for s in parts for m in s.messages),
        token_ms=step * 1e3,
        waiting_percent=100 * sum(waits) / sum(seconds),
        tokens_per_s=batch * new_tokens / step,
        tokens_per_s_per_gpu=batch * new_tokens / step / split.gpus,
    )


DIRECTIONS = ("data", "tensor", "pipeline", "sequence", "expert")


def splits(c: ModelConfig, gpus: int) -> list[Split]:
    """All ways to split a model over that many GPUs.

    Examples:
        >>> splits(config("Mistral 7B v0.1"), 2)[:2]
        [Split(data=1, tensor=1, pipeline=1, sequence=2, expert=1), \
Split(data=1, tensor=1, pipeline=2, sequence=1, expert=1)]
    """
    divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]
    found = []
    for ways in product(divisors, repeat=len(DIRECTIONS)):
        if math.prod(ways) == gpus:
            split = Split(*ways)
            with suppress(ValueError):
                split.check(c)
                found.append(split)
    return found


def front_chart(**arguments: Any) -> LineChart:
    """Time of a token against tokens a second, for all splits that fit.

    Along a line the batch grows from 1 to 4096.

    Args:
        **arguments: Those of ``parallel_strategies``.

    Examples:
        >>> [line.name for line in front_chart().lines]
        ['best mix', 'data', 'tensor', 'pipeline', 'sequence', 'expert']
    """
    here = parallel_strategies(**arguments)
    c = config(arguments.get("model", "Mixtral 8x7B"))
    lines: dict[str, list[tuple[float, float]]] = {}
    everything = []
    for split in splits(c, here.gpus):
        ways = asdict(split)
        alone = [name for name, n in ways.items() if n == here.gpus > 1]
        for batch in BATCHES:
            plan = parallel_strategies(**{**arguments, **ways, "batch": batch})
            if plan.fits:
                point = plan.token_ms, plan.tokens_per_s_per_gpu
                everything.append(point)
                for name in alone:
                    lines.setdefault(name, []).append(point)
    front: list[tuple[float, float]] = []
    for point in sorted(everything, key=lambda p: (p[0], -p[1])):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return LineChart(
        f"Each token's time against throughput, {here.gpus} GPUs",
        Axis("milliseconds a token", log=True),
        Axis("tokens a second and GPU", log=True),
        [
            Line("best mix", front),
            *(Line(n, lines[n]) for n in DIRECTIONS if n in lines),
        ],
        [Point("here", here.token_ms, here.tokens_per_s_per_gpu)],
    )


PRESETS: dict[str, dict[str, str]] = {name: {"model": name} for name in MODELS}
"""The calculator's menu of models."""

SPLITS: dict[str, dict[str, int]] = {
    name: asdict(split)
    for name, split in {
        "TP 8": Split(tensor=8),
        "DP 8": Split(data=8),
        "PP 8": Split(pipeline=8),
        "SP 8": Split(sequence=8),
        "EP 8": Split(expert=8),
        "TP 4 x PP 2": Split(tensor=4, pipeline=2),
        "TP 2 x EP 4": Split(tensor=2, expert=4),
        "TP 2 x SP 4": Split(tensor=2, sequence=4),
    }.items()
}
"""The calculator's menu of splits."""

CHIPS: dict[str, dict[str, float | None]] = {
    name: {
        "peak_tflops": gpu.bf16_tflops,
        "bandwidth_tb_s": gpu.bandwidth_tb_s,
        "memory_gib": gpu.memory_gib,
        "link_gb_s": link,
    }
    for name, gpu in GPUS.items()
    if gpu.bf16_tflops
    and gpu.memory_gib
    and (link := gpu.nvlink_one_way_gb_s or gpu.pcie_one_way_gb_s)
}
"""The calculator's menu of GPUs, in bf16; without NVLink over PCIe."""
