"""What each GPU of a split model holds, computes and exchanges.

``parallel_strategies`` prices it. Here are only counts: parameters, cached
values, operators and messages, which the tests hold against real processes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, Literal

from warpmap.hardware.network.communication_cost import (
    bus_factor,
    communication_cost,
)
from warpmap.inference.decoding.memory_bound_decoding import (
    Operator,
    attention_work,
    experts_touched,
    operators,
)
from warpmap.models.configs import ModelConfig
from warpmap.models.foundations.parameter_count import count

ACTIVATION_BYTES = 2  # bf16 between GPUs, whatever the weights are
MOST_GPUS = 32


@dataclass(frozen=True)
class Split:
    """GPUs in each direction.

    Examples:
        >>> Split(tensor=4, pipeline=2).gpus
        8
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    sequence: int = 1
    expert: int = 1

    @property
    def gpus(self) -> int:
        """All of them."""
        return math.prod(asdict(self).values())

    def check(self, c: ModelConfig) -> None:
        """Refuse what would cut a head, an expert or a layer.

        Raises:
            ValueError: Names the direction.
        """
        for name, ways in asdict(self).items():
            if ways < 1:
                raise ValueError(f"{name} must be at least 1, got {ways}")
        if self.gpus > MOST_GPUS:
            most = max(asdict(self), key=asdict(self).__getitem__)
            raise ValueError(
                f"{most} times all others must be at most {MOST_GPUS} GPUs, "
                f"got {self.gpus}"
            )
        if self.pipeline > c.layers:
            raise ValueError(
                f"pipeline must be at most {c.layers} layers, "
                f"got {self.pipeline}"
            )
        ways = self.tensor * self.sequence
        if c.heads % ways or max(c.kv_heads, ways) % min(c.kv_heads, ways):
            raise ValueError(
                f"tensor times sequence must share {c.heads} heads and "
                f"{c.kv_heads} key-value heads evenly, got {ways}"
            )
        for width in (c.intermediate_size, c.moe_intermediate_size):
            if width % self.tensor:
                raise ValueError(
                    f"tensor must divide a width of {width}, got {self.tensor}"
                )
        if self.expert > 1 and (not c.experts or c.experts % self.expert):
            raise ValueError(
                f"expert must divide {c.experts} experts, got {self.expert}"
            )


Kind = Literal["all-reduce", "all-gather", "all-to-all", "send"]
Part = Literal["attention", "FFN", "ends"]


@dataclass(frozen=True)
class Message:
    """What a group of GPUs exchanges, and how often in a visit of a stage.

    Args:
        kind: The collective operation, or a send to the next stage.
        part: After which part of a layer.
        ranks: GPUs of the group.
        size: Bytes, of the largest buffer of a GPU.
        times: How often.
    """

    kind: Kind
    part: Part
    ranks: int
    size: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes that one GPU sends at least, all times together."""
        if self.kind == "send":
            return self.times * self.size
        return self.times * self.size * bus_factor(self.kind, self.ranks)

    def seconds(self, alpha_us: float, link_gb_s: float) -> float:
        """Time, all times together, with the fastest algorithm."""
        alpha, rate = alpha_us * 1e-6, link_gb_s * 1e9
        if self.kind == "send":
            return self.times * (alpha + self.size / rate)
        key = self.kind, self.ranks, self.size, alpha_us, link_gb_s
        return self.times * _fastest(*key)


@cache
def _fastest(
    kind: Any, ranks: int, size: int, alpha_us: float, link_gb_s: float
) -> float:
    cost = communication_cost(kind, ranks, size / 1e6, alpha_us, link_gb_s)
    return cost.microseconds * 1e-6


@dataclass(frozen=True)
class Stage:
    """One GPU of a pipeline stage; those of the same stage do the same.

    Args:
        layers: Layers of the stage.
        parameters: Weights that the GPU holds.
        cache_values: Keys and values that it holds for all requests.
        operators: What it computes when requests visit.
        messages: What it exchanges then.
    """

    layers: int
    parameters: int
    cache_values: int
    operators: Sequence[Operator]
    messages: Sequence[Message]


@dataclass(frozen=True)
class Load:
    """How a batch is shared out.

    Args:
        requests: Of one group of GPUs; other groups have others.
        together: Of those, as many visit a stage together.
        flights: Such companies; each stage may hold one.
        tokens: New tokens of one GPU outside attention, in a visit.
        routed: New tokens for one set of experts, of all who share it.
    """

    requests: int
    together: int
    flights: int
    tokens: int
    routed: int


def share_out(split: Split, batch: int, new_tokens: int = 1) -> Load:
    """The busiest GPU's part of a batch.

    Examples:
        >>> share_out(Split(data=2, pipeline=4), batch=64)
        Load(requests=32, together=8, flights=4, tokens=8, routed=8)
    """
    requests = -(-batch // (split.data * split.expert))
    together = -(-requests // split.pipeline)
    tokens = -(-together * new_tokens // split.sequence)
    # with few requests not every GPU brings tokens
    sharing = -(-batch // (split.data * split.pipeline))
    brought = -(-sharing * new_tokens // split.sequence)
    return Load(
        requests=requests,
        together=together,
        flights=-(-requests // together),
        tokens=tokens,
        routed=min(tokens * split.expert, brought),
    )


def stages(
    c: ModelConfig,
    split: Split,
    batch: int,
    context: int,
    new_tokens: int = 1,
    weight_bytes: float = 2,
    cache_bytes: float = 2,
) -> list[Stage]:
    """What each GPU holds, computes and exchanges, stage by stage.

    Args:
        c: The model's shape.
        split: GPUs in each direction.
        batch: Requests of all GPUs together.
        context: Tokens of each, the new ones among them.
        new_tokens: New tokens of each: 1 decodes, more fill a prompt.
        weight_bytes: Bytes of a weight.
        cache_bytes: Bytes of a cached value.

    Raises:
        ValueError: If the model cannot be split like that.

    Examples:
        >>> from warpmap.models.configs import config
        >>> split = Split(tensor=2, pipeline=2)
        >>> for stage in stages(config("Llama 3 8B"), split, 8, 4096):
        ...     print(stage.parameters, [m.kind for m in stage.messages])
        2007629824 ['all-reduce', 'all-reduce', 'all-reduce', 'send']
        2007633920 ['all-reduce', 'all-reduce', 'all-gather']
    """
    split.check(c)
    load = share_out(split, batch, new_tokens)
    sizes = context, new_tokens, weight_bytes, cache_bytes
    cuts = [c.layers * n // split.pipeline for n in range(split.pipeline + 1)]
    made = []
    for first, last in pairwise(cuts):
        part = replace(
            c,
            layers=last - first,
            dense_layers=min(c.dense_layers, last) - min(c.dense_layers, first),
            windowed_layers=c.windowed_layers * last // c.layers
            - c.windowed_layers * first // c.layers,
            # a key-value head is not cut but copied
            kv_heads=max(c.kv_heads, split.tensor),
        )
        made.append(
            _stage(part, split, load, first == 0, last == c.layers, *sizes)
        )
    return made


@lru_cache(maxsize=4096)
def _stage(
    c: ModelConfig,
    split: Split,
    load: Load,
    is_first: bool,
    is_last: bool,
    context: int,
    new_tokens: int,
    weight_bytes: float,
    cache_bytes: float,
) -> Stage:
    """One GPU of a stage whose layers are all of ``c``."""
    _, values = attention_work(c, context)
    # causal: a new token does not see those after it
    seen = context - (new_tokens - 1) // 2
    ops = operators(c, load.tokens, seen, weight_bytes, cache_bytes)
    return Stage(
        layers=c.layers,
        parameters=_parameters(c, split, is_first, is_last),
        cache_values=math.ceil(load.requests * values * _cache_share(c, split)),
        operators=[
            _shared(op, c, split, load, new_tokens)
            for op in ops
            if op.name != "head" or is_last
        ],
        messages=[
            message
            for message in _messages(c, split, load, is_first, is_last)
            if message.times and message.ranks > 1
        ],
    )


def _cache_share(c: ModelConfig, split: Split) -> float:
    """Of the cache of a group's requests, what one GPU holds."""
    if c.kv_lora_rank:  # one latent serves all heads, so each GPU needs it
        return 1.0
    ways = split.tensor * split.sequence
    return max(c.kv_heads, ways) / (c.kv_heads * ways)


def _whole(c: ModelConfig) -> int:
    """Weights of a layer's attention that tensor parallelism cannot divide."""
    if not c.kv_lora_rank:
        return 0
    latents = c.q_lora_rank + c.kv_lora_rank + c.qk_rope_head_dim
    return c.hidden_size * latents


def _parameters(
    c: ModelConfig, split: Split, is_first: bool, is_last: bool
) -> int:
    n = count(c)
    whole = c.layers * _whole(c)
    divided = n.attention - whole + n.dense_ffn + n.shared_experts
    divided += n.routed_experts // split.expert
    table = c.vocab_size * c.hidden_size
    divided += table * is_first
    if is_last and not (is_first and c.tied_embeddings):
        divided += table
    norms = n.norms - (0 if is_last else c.hidden_size)
    return whole + -(-divided // split.tensor) + n.routers + norms


def _shared(
    op: Operator, c: ModelConfig, split: Split, load: Load, new_tokens: int
) -> Operator:
    """One GPU's part of an operator on ``load.tokens`` tokens."""
    part = 1 / split.tensor
    flops, weights, cached = part, part, 0.0
    if op.name == "attention projections":
        n = count(c).attention / c.layers
        flops = weights = part + (1 - part) * _whole(c) / n
    elif op.name == "attention":  # by heads, for the tokens of all GPUs
        tokens = load.together * new_tokens
        ways = split.tensor * split.sequence
        flops = tokens / load.tokens / ways
        # keys and values are read once for all new tokens of a request
        cached = load.together / load.tokens * _cache_share(c, split)
    elif op.name == "router":
        flops = weights = 1
    elif op.name == "experts":  # those of this GPU, for tokens of all groups
        choice = c.experts, c.experts_per_token
        flops *= load.routed / (load.tokens * split.expert)
        # where there are fewer choices than GPUs, some GPU still has one
        here = max(1, experts_touched(load.routed, *choice) / split.expert)
        weights *= here / experts_touched(load.tokens, *choice)
    elif op.name == "head":  # only a request's last token needs it
        flops = part * -(-load.together // split.sequence) / load.tokens
    return Operator(
        op.name,
        op.flops * flops,
        op.weight_bytes * weights,
        op.cache_bytes * cached,
    )


def _messages(
    c: ModelConfig, split: Split, load: Load, is_first: bool, is_last: bool
) -> Iterator[Message]:
    """All that one GPU exchanges in a visit, needed or not."""
    t, s, e = split.tensor, split.sequence, split.expert
    token = load.tokens * ACTIVATION_BYTES
    hidden = token * c.hidden_size
    expert_layers = c.layers - c.dense_layers if c.experts else 0
    # a token goes to its experts and back, once for each of them
    routed = hidden * c.experts_per_token
    answers = -(-load.together // s) * ACTIVATION_BYTES * c.vocab_size
    if c.kv_lora_rank:
        query = c.heads // t * (c.qk_nope_head_dim + c.qk_rope_head_dim)
        cached = s * (c.kv_lora_rank + c.qk_rope_head_dim)
        output = c.heads // t * c.v_head_dim
    else:
        query = output = c.heads // t * c.head_dim
        cached = 2 * max(c.kv_heads // t, s) * c.head_dim
    yield Message("all-reduce", "ends", t, hidden, int(is_first))
    yield Message(
        "all-to-all", "attention", s, token * (query + cached), c.layers
    )
    yield Message("all-to-all", "attention", s, token * output, c.layers)
    yield Message("all-reduce", "attention", t, hidden, c.layers)
    yield Message("all-to-all", "FFN", e, routed, 2 * expert_layers)
    yield Message("all-reduce", "FFN", t, hidden, c.layers)
    yield Message("all-gather", "ends", t, answers, int(is_last))
    yield Message("send", "ends", split.pipeline, hidden, int(not is_last))
