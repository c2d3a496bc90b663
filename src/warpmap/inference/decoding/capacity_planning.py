"""Tokens a second of a GPU and their price, at best, for a way to serve.

A model is split over GPUs in three ways, which may be combined:

    tensor parallel    a group of GPUs shares every matrix of its requests;
                       two all-reduces a layer
    data parallel      groups with requests of their own
    expert parallel    the groups share their experts; each token is sent to
                       those that it chose and comes back, once a layer

A step then takes at least what its operators take on one GPU, and what its
messages take on the links: one after the other, or at the same time. The
largest batch that keeps the limit of the time per token, and that fits into
memory, is the cheapest. Everything is a lower bound of time and price.

Reference: Pope et al., 2022, https://arxiv.org/abs/2211.05102
Reference: DeepSeek-AI, 2025, https://arxiv.org/abs/2505.09343
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, Literal

from warpmap.chart import Axis, Line, LineChart, Point
from warpmap.hardware.gpus import GPUS
from warpmap.hardware.gpus import gpu as gpu_named
from warpmap.hardware.network.communication_cost import bus_factor
from warpmap.hardware.performance.roofline import Ceilings, bound
from warpmap.inference.decoding.memory_bound_decoding import (
    Operator,
    attention_work,
    experts_touched,
    operators,
)
from warpmap.models.configs import MODELS, ModelConfig, config
from warpmap.models.foundations.parameter_count import count

BF16 = 2
"""Bytes of an activation that is summed over GPUs."""


@dataclass(frozen=True)
class Server:
    """GPUs that serve one model together, and how they split it.

    Args:
        products: Ceilings of one GPU in the format of the weights.
        attention: Ceilings of one GPU in bf16.
        memory_bytes: Memory of one GPU.
        node_bytes_per_s: Link of one GPU to others of its node, one way.
        network_bytes_per_s: Link of one GPU to other nodes, one way.
        tensor_parallel: GPUs of a group.
        data_parallel: Groups, each with requests of its own.
        expert_parallel: Whether the groups share their experts.
        gpus_per_node: GPUs of a node.
        weight_bytes: Bytes of a weight, and of a value sent to an expert.
        cache_bytes: Bytes of a cached value.
        start_up: Seconds that each exchange takes besides its bytes.
        overlap: Whether messages and operators run at the same time.
    """

    products: Ceilings
    attention: Ceilings
    memory_bytes: float
    node_bytes_per_s: float
    network_bytes_per_s: float
    tensor_parallel: int = 1
    data_parallel: int = 1
    expert_parallel: bool = False
    gpus_per_node: int = 8
    weight_bytes: float = 2
    cache_bytes: float = 2
    start_up: float = 0
    overlap: bool = False

    @property
    def expert_groups(self) -> int:
        """Groups whose tokens meet in one set of experts."""
        return self.data_parallel if self.expert_parallel else 1

    @property
    def expert_ranks(self) -> int:
        """GPUs that share one set of experts."""
        return self.tensor_parallel * self.expert_groups

    def cache_share(self, c: ModelConfig) -> float:
        """Part of a request's cache that each GPU of its group holds."""
        # MLA's latent serves all heads, so every GPU needs all of it
        pieces = 1 if c.kv_lora_rank else min(self.tensor_parallel, c.kv_heads)
        return 1 / pieces

    def seconds(self, ops: float, messages: float) -> float:
        """Time of both, one after the other or at once."""
        return max(ops, messages) if self.overlap else ops + messages


def operator_seconds(server: Server, ops: Sequence[Operator]) -> float:
    """Time of one GPU's operators, attention in bf16.

    Examples:
        >>> ops = operators(config("Llama 3 8B"), batch=1, context=1)
        >>> round(operator_seconds(server_of(weights="bf16"), ops) * 1e3, 2)
        3.13
    """
    return math.fsum(
        bound(
            op.work,
            server.attention if op.name == "attention" else server.products,
        ).seconds
        for op in ops
    )


def share(
    c: ModelConfig, server: Server, ops: Sequence[Operator], tokens: int
) -> list[Operator]:
    """What one GPU does of the operators of its group.

    Args:
        c: The model's shape.
        server: How it is split.
        ops: Operators of the whole group.
        tokens: Tokens of each group; those of all groups meet in the experts.

    Examples:
        >>> two = server_of(tensor_parallel=2)
        >>> ops = operators(config("Llama 3 8B"), batch=1, context=1)
        >>> share(config("Llama 3 8B"), two, ops, 1)[-1].flops / ops[-1].flops
        0.5
    """
    all_tokens = tokens * server.expert_groups
    mine = []
    for op in ops:
        ranks = server.tensor_parallel
        if op.name == "experts":
            ranks = server.expert_ranks
            together = operators(c, all_tokens, 0, server.weight_bytes)
            (op,) = (other for other in together if other.name == "experts")
        mine.append(
            replace(
                op,
                flops=op.flops / ranks,
                weight_bytes=op.weight_bytes / ranks,
                cache_bytes=op.cache_bytes * server.cache_share(c),
            )
        )
    return mine


def copies(choices: int, ranks: int, gpus_per_node: int) -> tuple[float, float]:
    """Copies of a token that leave its node, and that stay in a node.

    A token is sent once to every GPU that has one of its experts, and once
    to every node: there it is forwarded. All GPUs are equally likely.

    Args:
        choices: Experts of a token.
        ranks: GPUs that share the experts.
        gpus_per_node: GPUs of a node.

    Returns:
        Means over the network between nodes, and over the links in a node.

    Examples:
        >>> [round(n, 2) for n in copies(8, ranks=8, gpus_per_node=8)]
        [0.0, 4.59]
        >>> [round(n, 2) for n in copies(8, ranks=144, gpus_per_node=8)]
        [6.24, 1.52]
    """
    nodes = -(-ranks // gpus_per_node)
    others = experts_touched(choices, ranks, 1) * (ranks - 1) / ranks
    away = experts_touched(choices, nodes, 1) * (nodes - 1) / nodes
    return away, max(0.0, others - away)


def message_seconds(c: ModelConfig, server: Server, tokens: int) -> float:
    """Time of all messages of one pass through the layers.

    Args:
        c: The model's shape.
        server: How it is split, and its links.
        tokens: Tokens of each group.

    Examples:
        >>> eight = server_of(tensor_parallel=8)
        >>> seconds = message_seconds(config("Llama 3 70B"), eight, tokens=64)
        >>> round(seconds * 1e3, 2)
        0.65
    """
    seconds = 0.0
    group = server.tensor_parallel
    if group > 1:
        # after attention, and after the FFN
        size = tokens * c.hidden_size * BF16
        slow = group > server.gpus_per_node
        rate = server.network_bytes_per_s if slow else server.node_bytes_per_s
        once = server.start_up + bus_factor("all-reduce", group) * size / rate
        seconds += 2 * c.layers * once
    if c.experts and server.expert_groups > 1:
        away, near = copies(
            c.experts_per_token, server.expert_ranks, server.gpus_per_node
        )
        a_copy = max(
            away / server.network_bytes_per_s, near / server.node_bytes_per_s
        )
        # each GPU of a group sends its part of the tokens
        values = tokens / group * c.hidden_size
        there_and_back = values * (server.weight_bytes + BF16) * a_copy
        layers = c.layers - c.dense_layers
        seconds += layers * (2 * server.start_up + there_and_back)
    return seconds


def decode_seconds(
    c: ModelConfig, server: Server, batch: int, context: int
) -> tuple[float, float]:
    """Lower bounds of one decoding step: operators, and messages.

    Args:
        c: The model's shape.
        server: Who serves it.
        batch: Requests of each group.
        context: Tokens that each attends to.

    Examples:
        >>> one = server_of(weights="bf16")
        >>> decode_seconds(config("Llama 3 8B"), one, 1, context=1)[1]
        0.0
    """
    ops = operators(c, batch, context, server.weight_bytes, server.cache_bytes)
    mine = share(c, server, ops, batch)
    return operator_seconds(server, mine), message_seconds(c, server, batch)


def prefill_seconds(
    c: ModelConfig, server: Server, tokens: int
) -> tuple[float, float]:
    """Lower bounds of one prompt in each group: operators, and messages.

    Args:
        c: The model's shape.
        server: Who serves it.
        tokens: Tokens of the prompt; logits are needed for the last.

    Examples:
        >>> ops, _ = prefill_seconds(config("Llama 3 8B"), server_of(), 2000)
        >>> round(ops * 1e3, 1)
        15.3
    """
    products = {
        op.name: op
        for op in operators(c, tokens, 0, server.weight_bytes)
        if op.name != "attention"
    }
    products["head"] = operators(c, 1, 0, server.weight_bytes)[-1]

    # causal: token i sees i tokens, or the window
    seen = min(tokens, c.window) if c.windowed_layers else 0
    pairs = c.windowed_layers * (seen * (seen + 1) / 2 + (tokens - seen) * seen)
    pairs += (c.layers - c.windowed_layers) * tokens * (tokens + 1) / 2
    if c.kv_lora_rank:  # here keys and values are expanded
        width = c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim
    else:
        width = 2 * c.head_dim
    _, values = attention_work(c, tokens)  # written once
    attention = Operator(
        "attention", 2 * c.heads * width * pairs, 0, server.cache_bytes * values
    )
    mine = share(c, server, [attention, *products.values()], tokens)
    return operator_seconds(server, mine), message_seconds(c, server, tokens)


def memory_of(
    c: ModelConfig, server: Server, context: int
) -> tuple[float, float]:
    """Bytes on one GPU: of weights, and of the cache of one request.

    Args:
        c: The model's shape.
        server: How it is split.
        context: Tokens of the request.

    Examples:
        >>> weights, cache = memory_of(config("Llama 3 8B"), server_of(), 8192)
        >>> round(weights / 1e9, 1), cache / 2**30
        (8.0, 1.0)
    """
    n = count(c)
    weights = (n.total - n.routed_experts) / server.tensor_parallel
    weights += n.routed_experts / server.expert_ranks
    _, values = attention_work(c, context)
    cache = server.cache_bytes * values * server.cache_share(c)
    return server.weight_bytes * weights, cache


def price_per_million(tokens_per_s: float, dollars_per_hour: float) -> float:
    """Dollars for a million tokens of a GPU.

    Examples:
        >>> round(price_per_million(1000, dollars_per_hour=3.6), 6)
        1.0
    """
    return dollars_per_hour / 3600 / tokens_per_s * 1e6


@dataclass(frozen=True)
class CapacityPlan:
    """What a GPU delivers at most, and what that costs at least.

    Attributes:
        batch: Requests that each tensor-parallel group decodes at once.
        limited_by: What keeps the batch from being larger.
        tpot_ms: Time per output token of a request, in ms.
        step_ms: Time of one decoding step, in ms.
        operators_ms: Part of the step on the GPU itself, in ms.
        messages_ms: Part of the step on the links, in ms.
        prefill_ms: Time to prefill one prompt in each group, in ms.
        decode_tokens_per_s: Output tokens a second of a GPU that decodes.
        prefill_tokens_per_s: Prompt tokens a second of a GPU that prefills.
        prefill_percent: Share of all GPU time that prefills take, in %.
        tokens_per_s: Output tokens a second a GPU, prefills included.
        dollars_per_million_input: Price of a million prompt tokens.
        dollars_per_million_output: Price of a million output tokens.
        weights_gb: Weights on each GPU, in GB.
        cache_gb: Keys and values on each GPU, in GB.
    """

    batch: int
    limited_by: str
    tpot_ms: float
    step_ms: float
    operators_ms: float
    messages_ms: float
    prefill_ms: float
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    prefill_percent: float
    tokens_per_s: float
    dollars_per_million_input: float
    dollars_per_million_output: float
    weights_gb: float
    cache_gb: float


def at_batch(
    c: ModelConfig,
    server: Server,
    batch: int,
    prompt_tokens: int,
    output_tokens: int,
    separate_prefill: bool = True,
    dollars_per_hour: float = 2,
    limited_by: str = "choice",
) -> CapacityPlan:
    """The plan for a batch that is given.

    Prefill makes the first token, decoding the others. A request attends to
    its prompt and on average to half of its answer.

    Args:
        c: The model's shape.
        server: Who serves it.
        batch: Requests that each group decodes at once.
        prompt_tokens: Tokens of a prompt.
        output_tokens: Tokens of an answer.
        separate_prefill: Whether other GPUs prefill; else decoding waits.
        dollars_per_hour: Price of one GPU.
        limited_by: Why the batch is not larger.

    Examples:
        >>> plan = at_batch(config("Llama 3 8B"), server_of(), 64, 2000, 500)
        >>> round(plan.decode_tokens_per_s)
        11646
    """
    context = prompt_tokens + output_tokens // 2
    weights, cache = memory_of(c, server, context)
    ops, messages = decode_seconds(c, server, batch, context)
    step = server.seconds(ops, messages)
    prefill = server.seconds(*prefill_seconds(c, server, prompt_tokens))

    gaps = output_tokens - 1
    tpot = step
    if not separate_prefill:
        # while a request decodes, each other place in the batch is filled once
        tpot += prefill * (batch - 1) / gaps
    decode = batch / step / server.tensor_parallel
    prefilled = prompt_tokens / prefill / server.tensor_parallel
    busy = prompt_tokens / prefilled, gaps / decode  # GPU seconds a request
    return CapacityPlan(
        batch=batch,
        limited_by=limited_by,
        tpot_ms=tpot * 1e3,
        step_ms=step * 1e3,
        operators_ms=ops * 1e3,
        messages_ms=messages * 1e3,
        prefill_ms=prefill * 1e3,
        decode_tokens_per_s=decode,
        prefill_tokens_per_s=prefilled,
        prefill_percent=100 * busy[0] / sum(busy),
        tokens_per_s=output_tokens / sum(busy),
        dollars_per_million_input=price_per_million(
            prefilled, dollars_per_hour
        ),
        dollars_per_million_output=price_per_million(decode, dollars_per_hour),
        weights_gb=weights / 1e9,
        cache_gb=batch * cache / 1e9,
    )


def server_of(
    gpu: str = "H200 SXM",
    weights: Literal["bf16", "fp8"] = "fp8",
    network_gb_s: float = 50.0,
    **split: Any,
) -> Server:
    """A server of GPUs from the table.

    Args:
        gpu: Name of a GPU.
        weights: Format of the weights, and of their products.
        network_gb_s: Link of one GPU to other nodes, one way, in GB/s.
        **split: Other arguments of ``Server``.

    Raises:
        ValueError: If there is no such GPU or it lacks the format.

    Examples:
        >>> round(server_of("H200 SXM", "fp8").products.ridge)
        412
    """
    try:
        chip = gpu_named(gpu)
    except ValueError as error:
        raise ValueError(f"gpu: {error}") from error
    if weights not in ("bf16", "fp8"):
        raise ValueError(f"weights must be bf16 or fp8, got {weights!r}")
    peak, plain = chip.peak_tflops(weights), chip.peak_tflops("bf16")
    bandwidth = chip.bandwidth_tb_s
    if peak is None or plain is None or bandwidth is None:
        raise ValueError(f"weights cannot be {weights} on {gpu}: no such units")
    link = chip.nvlink_one_way_gb_s or chip.pcie_one_way_gb_s or network_gb_s
    return Server(
        products=Ceilings(peak * 1e12, bandwidth * 1e12),
        attention=Ceilings(plain * 1e12, bandwidth * 1e12),
        memory_bytes=chip.memory_bytes or 0,
        node_bytes_per_s=link * 1e9,
        network_bytes_per_s=network_gb_s * 1e9,
        weight_bytes=1 if weights == "fp8" else 2,
        **split,
    )


def _prepare(
    given: dict[str, Any],
) -> tuple[ModelConfig, Server, dict[str, Any], int]:
    """Check the arguments of ``capacity_planning`` and sort them.

    Returns:
        The model's shape, its server, arguments of ``at_batch``, and how many
        requests fit into the memory of a group.
    """
    for name, value in given.items():
        if isinstance(value, bool | str):
            continue
        low = 1 if isinstance(value, int) else 1e-6
        low = {"output_tokens": 2, "start_up_us": 0}.get(name, low)
        if not low <= value < 1 << 30:
            raise ValueError(f"{name} must be at least {low}, got {value}")
    try:
        c = config(given["model"])
    except ValueError as error:
        raise ValueError(f"model: {error}") from error
    group = given["tensor_parallel"]
    if c.heads % group:
        raise ValueError(
            f"tensor_parallel must divide {c.heads} heads, got {group}"
        )
    if given["expert_parallel"] and not c.experts:
        raise ValueError(f"expert_parallel needs experts; {c.name} has none")
    split = (
        "tensor_parallel",
        "data_parallel",
        "expert_parallel",
        "gpus_per_node",
        "cache_bytes",
        "overlap",
    )
    server = server_of(
        given["gpu"],
        given["weights"],
        given["network_gb_s"],
        start_up=given["start_up_us"] * 1e-6,
        **{name: given[name] for name in split},
    )
    traffic = (
        "prompt_tokens",
        "output_tokens",
        "separate_prefill",
        "dollars_per_hour",
    )
    mix = {name: given[name] for name in traffic}
    held, cache = memory_of(
        c, server, mix["prompt_tokens"] + mix["output_tokens"] // 2
    )
    fit = math.floor((server.memory_bytes - held) / cache)
    if fit < 1:
        raise ValueError(
            f"gpu {given['gpu']} has {server.memory_bytes / 1e9:.0f} GB; "
            f"weights and one request take {(held + cache) / 1e9:.0f} GB: "
            "split the model over more"
        )
    return c, server, mix, fit


def capacity_planning(
    model: str = "Llama 3 70B",
    gpu: str = "H200 SXM",
    weights: Literal["bf16", "fp8"] = "fp8",
    cache_bytes: float = 2.0,
    tensor_parallel: int = 2,
    data_parallel: int = 1,
    expert_parallel: bool = False,
    gpus_per_node: int = 8,
    network_gb_s: float = 50.0,
    start_up_us: float = 0.0,
    overlap: bool = False,
    prompt_tokens: int = 2000,
    output_tokens: int = 500,
    tpot_limit_ms: float = 50.0,
    separate_prefill: bool = True,
    dollars_per_hour: float = 2.0,
) -> CapacityPlan:
    """Most tokens a second of a GPU, and their least price.

    Args:
        model: Name of a published model.
        gpu: Name of a GPU.
        weights: Format of weights and products; attention stays in bf16.
        cache_bytes: Bytes of a cached value.
        tensor_parallel: GPUs that share each matrix.
        data_parallel: Groups of so many GPUs, with requests of their own.
        expert_parallel: Whether these groups share their experts.
        gpus_per_node: GPUs that NVLink joins.
        network_gb_s: Link of a GPU to other nodes, one way, in GB/s.
        start_up_us: Start-up of each exchange, in µs; 0 for the bound.
        overlap: Whether messages hide behind operators, or these behind them.
        prompt_tokens: Tokens of each prompt.
        output_tokens: Tokens of each answer.
        tpot_limit_ms: Longest time per output token, in ms.
        separate_prefill: Whether other GPUs prefill; else decoding waits.
        dollars_per_hour: Price of one GPU for an hour.

    Raises:
        ValueError: If a name is unknown, a number out of range, the model
            does not fit, or one request alone exceeds the limit.

    Examples:
        >>> plan = capacity_planning()
        >>> plan.batch, plan.limited_by
        (313, 'memory')
        >>> round(plan.dollars_per_million_output, 2)
        0.13
    """
    c, server, mix, fit = _prepare(dict(locals()))

    def plan(batch: int, limited_by: str) -> CapacityPlan:
        return at_batch(c, server, batch, **mix, limited_by=limited_by)

    in_time = bisect_left(
        range(1, fit + 1),
        True,
        key=lambda batch: plan(batch, "").tpot_ms > tpot_limit_ms,
    )
    if not in_time:
        alone = plan(1, "").tpot_ms
        raise ValueError(
            f"tpot_limit_ms must be at least {alone:.3g}, which one request "
            f"takes alone, got {tpot_limit_ms}"
        )
    return plan(in_time, "memory" if in_time == fit else "time per token")


PRESETS: dict[str, dict[str, str]] = {name: {"model": name} for name in MODELS}
"""The calculator's menu of models."""

CHIPS: dict[str, dict[str, str]] = {
    name: {"gpu": name, "weights": "fp8" if chip.fp8_tflops else "bf16"}
    for name, chip in GPUS.items()
    if chip.bf16_tflops
}
"""The calculator's menu of GPUs, with the narrowest format they multiply."""

_ONE_NODE = {"data_parallel": 1, "expert_parallel": False, "overlap": False}
_PUBLISHED = {
    "model": "DeepSeek-V3",
    "gpu": "H800 SXM",
    "weights": "fp8",
    "tensor_parallel": 1,
    "expert_parallel": True,
    "gpus_per_node": 8,
    "network_gb_s": 50.0,
    "prompt_tokens": 4383,
    "output_tokens": 1211,
    "tpot_limit_ms": 50.0,
    "separate_prefill": True,
    "dollars_per_hour": 2.0,
}

SERVERS: dict[str, dict[str, Any]] = {
    "Llama 3 8B on an L40S": {
        **_ONE_NODE,
        "model": "Llama 3 8B",
        "gpu": "L40S",
        "weights": "fp8",
        "tensor_parallel": 1,
    },
    "Llama 3 70B on two H200": {
        **_ONE_NODE,
        "model": "Llama 3 70B",
        "gpu": "H200 SXM",
        "weights": "fp8",
        "tensor_parallel": 2,
    },
    "DeepSeek-V3 on a node of H200": {
        **_PUBLISHED,
        "gpu": "H200 SXM",
        "data_parallel": 8,
        "overlap": False,
    },
    "DeepSeek-V3 as published": {
        **_PUBLISHED,
        "data_parallel": 144,
        "overlap": True,
    },
}
"""The calculator's menu of servers to start from."""


def capacity_chart(**arguments: Any) -> LineChart:
    """Output of a GPU over the time per token, as the batch grows.

    Args:
        **arguments: Those of ``capacity_planning``.

    Examples:
        >>> [line.name for line in capacity_chart().lines]
        ['while decoding', 'with prefill']
    """
    here = capacity_planning(**arguments)
    defaults = signature(capacity_planning).parameters.values()
    given = {p.name: p.default for p in defaults} | arguments
    c, server, mix, fit = _prepare(given)
    batches = {1 << k for k in range(fit.bit_length())} | {here.batch, fit}
    plans = [at_batch(c, server, n, **mix) for n in sorted(batches)]
    return LineChart(
        "What a slower answer buys",
        Axis("ms per output token", log=True),
        Axis("output tokens a second a GPU"),
        [
            Line(
                "while decoding",
                [(p.tpot_ms, p.decode_tokens_per_s) for p in plans],
            ),
            Line("with prefill", [(p.tpot_ms, p.tokens_per_s) for p in plans]),
        ],
        [
            Point("here", here.tpot_ms, here.decode_tokens_per_s),
            Point("", here.tpot_ms, here.tokens_per_s),
        ],
    )
