"""Memory and time of one layout of a training, for the planner beside it.

Memory is that of the fullest pipeline stage, time that of the slowest: with m
micro-batches a step takes m + P - 1 turns. Messages of tensor, context and
expert parallelism are waited for. Gradients and weights of ZeRO travel while
the GPU computes, so that only what is longer than the computation counts.

Reference: Narayanan et al., 2021, https://arxiv.org/abs/2104.04473
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal

from warpmap.hardware.network.communication_cost import bus_factor
from warpmap.inference.decoding.kv_cache_size import values_per_token
from warpmap.models.configs import ModelConfig
from warpmap.models.foundations.parameter_count import count
from warpmap.training.cost.flops_and_mfu import forward_flops
from warpmap.training.cost.training_memory import (
    RECIPES,
    RecipeName,
    layer_bytes,
    logits_bytes,
    states,
)

RECIPE: RecipeName = "bf16, fp32 gradient"
ALPHA = 10e-6
"""Seconds to start a message; assumed, as on the page of its cost."""


@dataclass(frozen=True)
class Cluster:
    """What a training runs on; rates of one GPU, one way, in bytes a second.

    Args:
        gpus: All of them.
        gpus_per_node: Those that NVLink joins.
        flops: FLOP/s that matrix products reach.
        memory: Bytes that a plan may fill.
        bandwidth: Of a GPU's memory.
        inside: Of NVLink.
        outside: Of the network.
    """

    gpus: int
    gpus_per_node: int
    flops: float
    memory: float
    bandwidth: float
    inside: float
    outside: float

    def rate(self, stride: int, ranks: int) -> float:
        """Bandwidth of a group whose ranks are ``stride`` GPUs apart.

        Between nodes a ring enters and leaves through the network cards of all
        its ranks there.
        """
        if stride * ranks <= self.gpus_per_node:
            return self.inside
        together = max(1, self.gpus_per_node // stride)
        return min(self.inside, together * self.outside)


@dataclass(frozen=True)
class Plan:
    """A layout. Neighbours split matrices, stages are furthest apart."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    micro_batch: int = 1
    zero_stage: int = 1
    recompute: Literal["none", "full"] = "none"

    @property
    def name(self) -> str:
        """All that is not 1, for example ``"d16 t8 p4"``."""
        sizes = {
            "d": self.data,
            "t": self.tensor,
            "p": self.pipeline,
            "c": self.context,
            "e": self.expert,
            "b": self.micro_batch,
            "zero": 0 if self.zero_stage == 1 else self.zero_stage,
        }
        parts = [f"{key}{n}" for key, n in sizes.items() if n > 1]
        return " ".join(parts + ["full"] * (self.recompute == "full")) or "d1"


@dataclass(frozen=True)
class Stage:
    """Layers of one pipeline stage, and the ends that it has."""

    index: int
    dense: int
    moe: int
    first: bool
    last: bool


@functools.lru_cache(maxsize=256)
def stages_of(model: ModelConfig, pipeline: int) -> tuple[Stage, ...]:
    """Layers in a row, as evenly as they go; the ends get the fewest.

    Examples:
        >>> from warpmap.models.configs import config
        >>> [s.dense for s in stages_of(config("Llama 3.1 405B"), 4)]
        [31, 32, 32, 31]
    """
    each, left = divmod(model.layers, pipeline)
    inner_first = [*range(1, pipeline - 1), 0, pipeline - 1]
    more = set(inner_first[:left])
    result, at = [], 0
    dense_layers = model.dense_layers if model.experts else model.layers
    for index in range(pipeline):
        layers = each + (index in more)
        dense = max(0, min(at + layers, dense_layers) - at)
        ends = index == 0, index == pipeline - 1
        result.append(Stage(index, dense, layers - dense, *ends))
        at += layers
    return tuple(result)


@functools.lru_cache(maxsize=256)
def different_stages(model: ModelConfig, pipeline: int) -> tuple[Stage, ...]:
    """Of stages that are alike, the first: it holds the most micro-batches."""
    seen: dict[Any, Stage] = {}
    for stage in stages_of(model, pipeline):
        seen.setdefault(replace(stage, index=0), stage)
    return tuple(seen.values())


@dataclass(frozen=True)
class Layer:
    """Weights of the parts of a model, and FLOPs of a token's forward pass."""

    attention: int
    norms: int
    dense: int
    shared: int
    router: int
    routed: int
    table: int
    head: int
    attention_flops: float
    dense_flops: float
    moe_flops: float
    head_flops: float
    total_flops: float


@functools.lru_cache(maxsize=64)
def layer_of(model: ModelConfig, sequence: int) -> Layer:
    """One layer of each kind, and the ends."""
    n, f = count(model), forward_flops(model, sequence)
    moe = model.layers - model.dense_layers if model.experts else 0
    dense = model.layers - moe
    routed = f.routed_experts + f.shared_experts + f.routers
    return Layer(
        attention=n.attention // model.layers,
        norms=(n.norms - model.hidden_size) // model.layers,
        dense=n.dense_ffn // max(1, dense),
        shared=n.shared_experts // max(1, moe),
        router=n.routers // max(1, moe),
        routed=n.routed_experts // max(1, moe),
        table=n.embeddings,
        head=n.embeddings,
        attention_flops=(f.projections + f.scores) / model.layers,
        dense_flops=f.dense_ffn / max(1, dense),
        moe_flops=routed / max(1, moe),
        head_flops=f.head,
        total_flops=f.total,
    )


def parameters(
    model: ModelConfig, plan: Plan, stage: Stage
) -> tuple[float, float]:
    """Parameters of one rank before ZeRO: all but routed experts, and those.

    Examples:
        >>> from warpmap.models.configs import config
        >>> whole = Stage(0, 32, 0, first=True, last=True)
        >>> parameters(config("Llama 3 8B"), Plan(), whole)
        (8030261248.0, 0.0)
    """
    one = layer_of(model, 1)
    split = (stage.dense + stage.moe) * one.attention
    split += stage.dense * one.dense + stage.moe * one.shared
    if stage.first:
        split += one.table
    if stage.last and not (stage.first and model.tied_embeddings):
        split += one.head
    whole = (stage.dense + stage.moe) * one.norms + stage.moe * one.router
    whole += model.hidden_size if stage.last else 0
    experts = stage.moe * one.routed / (plan.tensor * plan.expert)
    return whole + split / plan.tensor, experts


def memory(
    model: ModelConfig, plan: Plan, sequence: int, micro_batches: int
) -> float:
    """Bytes on a GPU of the fullest stage.

    Args:
        model: A published shape, or one of your own.
        plan: The layout.
        sequence: Tokens of a sequence.
        micro_batches: Micro-batches of one rank in a step.

    Examples:
        >>> from warpmap.models.configs import config
        >>> plan = Plan(data=8, zero_stage=3, recompute="full")
        >>> round(memory(config("Llama 3 8B"), plan, 8192, 4) / 2**30, 1)
        31.8
    """
    here = sequence // plan.context

    @functools.cache
    def layer(moe: bool, how: Literal["none", "full"]) -> float:
        return layer_bytes(
            model,
            here,
            plan.micro_batch,
            has_experts=moe,
            tensor=plan.tensor,
            recompute=how,
        )

    recipe, ranks = RECIPES[RECIPE], plan.data * plan.context
    one = layer_of(model, 1)
    most = 0.0
    for stage in different_stages(model, plan.pipeline):
        rest, experts = parameters(model, plan, stage)
        kept = states(rest, RECIPE, plan.zero_stage, ranks).total
        kept += states(
            experts, RECIPE, plan.zero_stage, ranks // plan.expert
        ).total
        if plan.zero_stage == 3:  # the largest layer, whole, at work
            ffn = one.routed / plan.expert + one.shared if stage.moe else 0
            widest = (one.attention + max(ffn, one.dense)) / plan.tensor
            kept += (recipe.weights + recipe.gradients) * widest
        held = min(plan.pipeline - stage.index, micro_batches)
        saved = 0.0
        if stage.dense:
            saved += stage.dense * layer(False, plan.recompute)
        if stage.moe:
            saved += stage.moe * layer(True, plan.recompute)
        peak = 0.0
        if plan.recompute == "full":
            peak = layer(bool(stage.moe), "none")
        if stage.last:
            tokens = here * plan.micro_batch
            peak = max(
                peak,
                logits_bytes(model.vocab_size, tokens, "eager", plan.tensor),
            )
        most = max(most, kept + held * saved + peak)
    return most


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest stage, one after another."""

    compute: float
    bubble: float
    tensor: float
    context: float
    pipeline: float
    data: float

    @property
    def total(self) -> float:
        """All of it."""
        return (
            self.compute
            + self.bubble
            + self.tensor
            + self.context
            + self.pipeline
            + self.data
        )


def gather(size: float, ranks: int, rate: float) -> float:
    """Seconds of an all-gather or a reduce-scatter by doubling.

    Examples:
        >>> gather(8e9, ranks=8, rate=1e9)
        7.00003
    """
    if ranks == 1:
        return 0.0
    steps = (ranks - 1).bit_length()
    return steps * ALPHA + bus_factor("all-gather", ranks) * size / rate


def exchange(size: float, ranks: int, stride: int, on: Cluster) -> float:
    """Seconds of an all-to-all: part of it stays in the node, part leaves."""
    if ranks == 1:
        return 0.0
    near = min(ranks, max(1, on.gpus_per_node // stride))
    inside = (near - 1) / ranks * size / on.inside
    outside = (ranks - near) / ranks * size / on.outside
    return (ranks - 1).bit_length() * ALPHA + inside + outside


def step_time(
    model: ModelConfig,
    plan: Plan,
    on: Cluster,
    sequence: int,
    micro_batches: int,
) -> StepTime:
    """Time of a step, by its causes.

    Args:
        model: A published shape, or one of your own.
        plan: The layout.
        on: The GPUs; ``flops`` is what matrix products reach.
        sequence: Tokens of a sequence.
        micro_batches: Micro-batches of one rank in a step.
    """
    one = layer_of(model, sequence)
    T, C, E = plan.tensor, plan.context, plan.expert
    again = plan.recompute == "full"
    tokens = sequence * plan.micro_batch / C
    seconds = tokens / T / on.flops  # of one FLOP a token

    # a forward pass gathers and scatters twice, a backward pass too; what is
    # computed again also communicates again
    wide = 2 * tokens * model.hidden_size  # bytes between layers
    tensor = (12 if again else 8) * gather(wide, T, on.rate(1, T))
    cached: float = values_per_token(
        model.kv_heads,
        model.head_dim,
        model.kv_lora_rank,
        model.qk_rope_head_dim,
    )
    cached = cached if model.kv_lora_rank else cached / T
    keys = 2 * cached * sequence * plan.micro_batch
    context = (4 if again else 3) * gather(keys, C, on.rate(T, C))
    chosen = wide / T * model.experts_per_token
    expert = (6 if again else 4) * exchange(chosen, E, T, on)
    apart = T * C * plan.data
    pipeline = 0.0
    if plan.pipeline > 1:
        rate = on.inside if apart * 2 <= on.gpus_per_node else on.outside
        pipeline = 2 * (ALPHA + wide / T / rate)

    ranks = plan.data * C
    slowest, exposed = StepTime(0, 0, 0, 0, 0, 0), 0.0
    for stage in different_stages(model, plan.pipeline):
        layers = stage.dense + stage.moe
        flops = layers * one.attention_flops
        flops += stage.dense * one.dense_flops + stage.moe * one.moe_flops
        head = one.head_flops if stage.last else 0.0
        rest, experts = parameters(model, plan, stage)
        read = (rest + experts) / on.bandwidth
        # each pass reads the weights; gradients are read, added, and written
        forward = max((flops + head) * seconds, 2 * read)
        backward = max(2 * (flops + head) * seconds, 10 * read)
        backward += max(flops * seconds, 2 * read) if again else 0
        turn = StepTime(
            compute=forward + backward,
            bubble=0.0,
            tensor=layers * tensor,
            context=layers * context + stage.moe * expert,
            pipeline=pipeline,
            data=0.0,
        )
        if turn.total > slowest.total:
            slowest = turn

        scatter = gather(4 * rest, ranks, on.rate(T, ranks))
        fetch = gather(2 * rest, ranks, on.rate(T, ranks))
        if experts:
            others = ranks // E
            scatter += gather(4 * experts, others, on.rate(T * E, others))
            fetch += gather(2 * experts, others, on.rate(T * E, others))
        if plan.zero_stage == 3:
            wait = max(0.0, fetch - forward)
            wait += max(0.0, fetch + scatter - backward)
            wait *= micro_batches
        else:
            often = micro_batches if plan.zero_stage == 2 else 1
            wait = often * max(0.0, scatter - backward)
            wait += max(0.0, fetch - forward)
        exposed = max(exposed, wait)

    m = micro_batches
    return StepTime(
        compute=m * slowest.compute,
        bubble=(plan.pipeline - 1) * slowest.total,
        tensor=m * slowest.tensor,
        context=m * slowest.context,
        pipeline=m * slowest.pipeline,
        data=exposed,
    )
