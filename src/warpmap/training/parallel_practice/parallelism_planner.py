"""The fastest layout of a training that fits, by a model of time and memory.

A layout says how many ranks split the same thing:

    data D        sequences of a batch         tensor T     matrices
    pipeline P    layers                       context C    tokens
    expert E      experts, among D C ranks     ZeRO         states, among D C

All layouts are enumerated that divide what they must. Memory and time of each
come from ``_layout_cost``; what cannot be the fastest is not timed.

Reference: Narayanan et al., 2021, https://arxiv.org/abs/2104.04473
Reference: Hagemann et al., 2023, https://arxiv.org/abs/2311.05610
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from warpmap.chart import Axis, Bar, BarChart
from warpmap.hardware.gpus import GPUS, gpu
from warpmap.models.configs import MODELS, ModelConfig, config
from warpmap.training.cost.training_memory import GIB
from warpmap.training.parallel_practice._layout_cost import (
    Cluster,
    Plan,
    layer_of,
    memory,
    step_time,
)

SHORTEST = 4096
"""Tokens of a sequence that context parallelism leaves each rank at least."""

if TYPE_CHECKING:
    ModelName = str
    GpuName = str
else:
    ModelName = Literal[tuple(MODELS)]
    GpuName = Literal[
        tuple(
            name
            for name, each in GPUS.items()
            if each.memory_gib and each.bf16_tflops and each.nvlink_gb_s
        )
    ]


def divisors(n: int) -> list[int]:
    """All divisors, small ones first.

    Examples:
        >>> divisors(12)
        [1, 2, 3, 4, 6, 12]
    """
    return [d for d in range(1, n + 1) if n % d == 0]


def layouts(
    model: ModelConfig, gpus: int, sequence: int, sequences: int
) -> Iterator[Plan]:
    """Every layout that divides what it must, without ZeRO or recomputation.

    Examples:
        >>> model = config("Llama 3 8B")
        >>> [plan.name for plan in layouts(model, 2, 4096, 1)]
        ['p2', 't2']
    """
    parts = divisors(gpus)
    for T in (t for t in parts if model.kv_heads % t == 0):
        for P in (p for p in divisors(gpus // T) if p <= model.layers):
            for C in divisors(gpus // T // P):
                D = gpus // T // P // C
                if sequence % (T * C) or sequences % D:
                    continue
                if C > 1 and sequence < C * SHORTEST:
                    break
                most = sequences // D
                experts = [1]
                if model.experts:
                    shared = divisors(D * C)
                    experts = [e for e in shared if model.experts % e == 0]
                for E in experts:
                    for b in (1, 2, 4, 8):
                        if most % b == 0:
                            yield Plan(D, T, P, C, E, b)


def variants(plan: Plan) -> Iterator[Plan]:
    """ZeRO and recomputation for a layout, each before what is slower.

    Stage 0 sends what stage 1 sends and holds more. With a pipeline, stages 2
    and 3 would communicate in every micro-batch, and are left out.

    Examples:
        >>> [plan.name for plan in variants(Plan(data=4, pipeline=2))]
        ['d4 p2', 'd4 p2 full']
    """
    stages: tuple[int, ...] = (1,)
    if plan.pipeline == 1 and plan.data * plan.context > 1:
        stages = (1, 2, 3)
    for recompute in ("none", "full"):
        for zero_stage in stages:
            yield replace(plan, zero_stage=zero_stage, recompute=recompute)


Found = tuple[float, Plan]


@functools.lru_cache(maxsize=32)
def search(
    model: ModelConfig, on: Cluster, sequence: int, sequences: int
) -> tuple[list[Found], int]:
    """Layouts that fit, fastest first, and how many were looked at.

    Of a layout only variants are timed of which no faster one fits: those
    with as much or less recomputation and as low or a lower ZeRO stage.

    Returns:
        Seconds of a step and the plan, for each; and the count.

    Examples:
        >>> node = Cluster(8, 8, 7e14, 74e9, 3.35e12, 4.5e11, 5e10)
        >>> found, looked_at = search(config("Llama 3 8B"), node, 4096, 64)
        >>> found[0][1].name, len(found) < looked_at
        ('d8 zero2', True)
    """
    found, seen = [], 0
    for layout in layouts(model, on.gpus, sequence, sequences):
        m = sequences // layout.data // layout.micro_batch
        lowest = 4  # ZeRO stage that already fits
        for plan in variants(layout):
            seen += 1
            if plan.zero_stage >= lowest:
                continue
            if memory(model, plan, sequence, m) > on.memory:
                continue
            lowest = plan.zero_stage
            found.append((step_time(model, plan, on, sequence, m).total, plan))
    return sorted(found, key=lambda f: (f[0], f[1].name)), seen


@dataclass(frozen=True)
class BestPlan:
    """The fastest layout that fits, by this model.

    Attributes:
        plan: All that is not 1: data, tensor, pipeline, context, expert
            parallelism, and sequences of a micro-batch.
        data: Ranks that take different sequences.
        tensor: Ranks that split matrices.
        pipeline: Stages that split the layers.
        context: Ranks that split the tokens of a sequence.
        expert: Ranks that split experts.
        micro_batch: Sequences that a rank computes at once.
        micro_batches: Micro-batches of a rank in a step.
        zero_stage: States that data ranks share.
        recompute: What the backward pass computes again.
        memory_gib: Memory of the fullest GPU, in GiB.
        step_seconds: Time of a step, in seconds.
        mfu_percent: Share of the peak that training needs of it.
        bubble_percent: Share of a step in which stages wait for others.
        tried: Plans looked at.
        fitting: Those of them that were worth timing, and fit.
    """

    plan: str
    data: int
    tensor: int
    pipeline: int
    context: int
    expert: int
    micro_batch: int
    micro_batches: int
    zero_stage: int
    recompute: str
    memory_gib: float
    step_seconds: float
    mfu_percent: float
    bubble_percent: float
    tried: int
    fitting: int


def _problem(
    model: str,
    gpus: int,
    gpus_per_node: int,
    gpu_name: str,
    million_tokens: float,
    sequence: int,
    efficiency_percent: float,
    network_gb_s: float,
    reserve_gib: float,
) -> tuple[ModelConfig, Cluster, int]:
    """The same, checked: shape, cluster, and sequences of a step."""
    if model not in MODELS:
        raise ValueError(f"model must be a published one, got {model!r}")
    if not 1 <= gpus <= 4096:
        raise ValueError(f"gpus must be from 1 to 4096, got {gpus}")
    if gpus_per_node < 1 or gpus % min(gpus, gpus_per_node):
        raise ValueError(
            f"gpus_per_node must divide {gpus} GPUs, got {gpus_per_node}"
        )
    if sequence < 1:
        raise ValueError(f"sequence must be at least 1, got {sequence}")
    sequences = round(million_tokens * 2**20 / sequence)
    if sequences < 1:
        raise ValueError(
            f"million_tokens must hold a sequence of {sequence} tokens, "
            f"got {million_tokens}"
        )
    if not 0 < efficiency_percent <= 100:
        raise ValueError(
            "efficiency_percent must be above 0 and at most 100, "
            f"got {efficiency_percent}"
        )
    if not network_gb_s > 0:
        raise ValueError(f"network_gb_s must be above 0, got {network_gb_s}")
    if gpu_name not in GPUS:
        raise ValueError(f"gpu_name must be a known GPU, got {gpu_name!r}")
    card = gpu(gpu_name)
    if not (
        card.memory_gib
        and card.bf16_tflops
        and card.bandwidth_tb_s
        and card.nvlink_one_way_gb_s
    ):
        raise ValueError(
            f"gpu_name must be one with NVLink and known memory, "
            f"got {gpu_name!r}"
        )
    if not 0 <= reserve_gib < card.memory_gib:
        raise ValueError(
            f"reserve_gib must be from 0 to below {card.memory_gib}, "
            f"got {reserve_gib}"
        )
    cluster = Cluster(
        gpus,
        min(gpus, gpus_per_node),
        card.bf16_tflops * 1e12 * efficiency_percent / 100,
        (card.memory_gib - reserve_gib) * GIB,
        card.bandwidth_tb_s * 1e12,
        card.nvlink_one_way_gb_s * 1e9,
        network_gb_s * 1e9,
    )
    return config(model), cluster, sequences


def _search(
    model: ModelConfig, on: Cluster, sequence: int, sequences: int
) -> tuple[list[Found], int]:
    """The same, or an error that says what a reader may change."""
    found, tried = search(model, on, sequence, sequences)
    if not found:
        raise ValueError(
            f"gpus must be more to hold {model.name} with {sequences} "
            f"sequences of {sequence} tokens: none of {tried} plans fits "
            f"{on.gpus}"
        )
    return found, tried


def parallelism_planner(
    model: ModelName = "Llama 3 70B",
    gpus: int = 256,
    gpus_per_node: int = 8,
    gpu_name: GpuName = "H100 SXM",
    million_tokens: float = 4,
    sequence: int = 8192,
    efficiency_percent: float = 70,
    network_gb_s: float = 50,
    reserve_gib: float = 6,
) -> BestPlan:
    """The fastest layout that fits, to train a published model.

    Args:
        model: Its name in the table of models.
        gpus: All GPUs, at most 4096.
        gpus_per_node: GPUs that NVLink joins.
        gpu_name: Which GPU.
        million_tokens: Tokens of a step, in 2^20.
        sequence: Tokens of a sequence.
        efficiency_percent: Share of the peak that matrix products reach;
            assumed.
        network_gb_s: Network of one GPU in one direction, in GB/s.
        reserve_gib: GiB of each GPU that the plan leaves alone; assumed.

    Raises:
        ValueError: If a number is out of range, or no layout fits.

    Examples:
        >>> best = parallelism_planner("Llama 3 8B", gpus=64)
        >>> best.plan, best.micro_batch, best.recompute
        ('d64 zero2', 1, 'none')
    """
    shape, cluster, sequences = _problem(
        model,
        gpus,
        gpus_per_node,
        gpu_name,
        million_tokens,
        sequence,
        efficiency_percent,
        network_gb_s,
        reserve_gib,
    )
    found, tried = _search(shape, cluster, sequence, sequences)
    seconds, plan = found[0]
    m = sequences // plan.data // plan.micro_batch
    time = step_time(shape, plan, cluster, sequence, m)
    needed = 3 * layer_of(shape, sequence).total_flops * sequences * sequence
    peak = gpus * cluster.flops * 100 / efficiency_percent
    return BestPlan(
        plan=plan.name,
        data=plan.data,
        tensor=plan.tensor,
        pipeline=plan.pipeline,
        context=plan.context,
        expert=plan.expert,
        micro_batch=plan.micro_batch,
        micro_batches=m,
        zero_stage=plan.zero_stage,
        recompute=plan.recompute,
        memory_gib=memory(shape, plan, sequence, m) / GIB,
        step_seconds=seconds,
        mfu_percent=100 * needed / (peak * seconds),
        bubble_percent=100 * time.bubble / seconds,
        tried=tried,
        fitting=len(found),
    )


def planner_chart(**arguments: Any) -> BarChart:
    """Where the time of a step goes, in the best plans of different layout.

    Args:
        **arguments: As for ``parallelism_planner``, all of them.

    Raises:
        ValueError: As ``parallelism_planner``.

    Examples:
        >>> from inspect import signature
        >>> inputs = signature(parallelism_planner).parameters.values()
        >>> chart = planner_chart(**{p.name: p.default for p in inputs})
        >>> chart.bars[0].name
        'd64 t2 c2 zero3'
    """
    sequence: int = arguments["sequence"]
    shape, cluster, sequences = _problem(**arguments)
    found, _ = _search(shape, cluster, sequence, sequences)
    best: dict[Any, Plan] = {}
    for _, plan in found:
        layout = plan.tensor, plan.pipeline, plan.context, plan.expert
        if len(best) < 7:
            best.setdefault(layout, plan)
    bars = []
    for plan in best.values():
        m = sequences // plan.data // plan.micro_batch
        t = step_time(shape, plan, cluster, sequence, m)
        parts = {
            "compute": t.compute,
            "bubble": t.bubble,
            "tensor": t.tensor,
            "context, experts": t.context,
            "pipeline": t.pipeline,
            "data": t.data,
        }
        bars.append(Bar(plan.name, list(parts.items())))
    return BarChart("Best plans of different layout", Axis("seconds"), bars)


NETWORKS = {
    "100 Gbit/s a node of 8": {"network_gb_s": 1.5625},
    "200 Gbit/s a GPU": {"network_gb_s": 25.0},
    "400 Gbit/s a GPU": {"network_gb_s": 50.0},
    "800 Gbit/s a GPU": {"network_gb_s": 100.0},
}
"""The calculator's menu of networks."""
