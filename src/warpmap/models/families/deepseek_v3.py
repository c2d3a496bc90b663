"""DeepSeek-V3 taken apart: weights, work, cache and training, by module.

Little is computed here. Parameters, FLOPs, MFU and cache each have a topic;
this one puts them side by side for one model and its variants.

    attention   MLA: five matrices, and a cache of 512 + 64 values a layer
    FFN         3 dense layers; then 58 with 256 experts, of which 8 and a
                shared one run
    MTP         one more layer that predicts the token after the next

DeepSeek-R1 has the same shape.

Reference: DeepSeek-AI, 2024, https://arxiv.org/abs/2412.19437
Reference: Zhao et al., 2025, https://arxiv.org/abs/2505.09343
"""

from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

from warpmap.chart import Axis, Bar, BarChart
from warpmap.hardware.gpus import GPUS
from warpmap.inference.decoding.kv_cache_size import kv_cache_size
from warpmap.models.configs import MODELS, ModelConfig
from warpmap.models.foundations.parameter_count import count
from warpmap.training.cost.flops_and_mfu import (
    flops_and_mfu,
    forward_flops,
    shape,
)


@dataclass(frozen=True)
class Module:
    """One kind of module, in all layers together.

    Attributes:
        total: Its parameters.
        active: Those of them that one token multiplies.
        forward_flops: FLOPs of one token's forward pass.
    """

    total: int
    active: int
    forward_flops: float


@dataclass(frozen=True)
class DeepSeekV3:
    """The model in numbers.

    Attributes:
        total_parameters: All parameters, without extra predictors.
        active_parameters: Those that one token multiplies.
        mtp_parameters: Extra predictors, on top of the total.
        forward_gflop: 10^9 FLOPs of one token's forward pass.
        training_gflop: 10^9 FLOPs to train on one token, no predictor.
        attention_percent: Share of attention's scores in it.
        cache_bytes_per_token: Cache of one token in all layers.
        request_bytes: Cache of one sequence.
        tokens_per_gpu_second: Tokens that one GPU trains on in a second.
        mfu_percent: Share of the peak that training reached.
        mfu_with_mtp_percent: The same, with the predictors' work counted.
    """

    total_parameters: int
    active_parameters: int
    mtp_parameters: int
    forward_gflop: float
    training_gflop: float
    attention_percent: float
    cache_bytes_per_token: int
    request_bytes: int
    tokens_per_gpu_second: float
    mfu_percent: float
    mfu_with_mtp_percent: float


def mla_matrices(model: ModelConfig) -> dict[str, int]:
    """Weights of one layer's attention, by their names in the checkpoint.

    Args:
        model: A shape with MLA and a compressed query.

    Examples:
        >>> mla_matrices(MODELS["DeepSeek-V3"])["o_proj"]
        117440512
    """
    rope = model.qk_rope_head_dim
    query = model.heads * (model.qk_nope_head_dim + rope)
    key_value = model.heads * (model.qk_nope_head_dim + model.v_head_dim)
    return {
        "q_a_proj": model.hidden_size * model.q_lora_rank,
        "q_b_proj": model.q_lora_rank * query,
        "kv_a_proj_with_mqa": model.hidden_size * (model.kv_lora_rank + rope),
        "kv_b_proj": model.kv_lora_rank * key_value,
        "o_proj": model.heads * model.v_head_dim * model.hidden_size,
    }


def modules(
    model: ModelConfig, tokens: int, causal: bool = True
) -> dict[str, Module]:
    """The model by kind of module; parts without overlap.

    Args:
        model: A shape with experts.
        tokens: Tokens of a sequence, for the work of attention.
        causal: Whether masked keys are left out.

    Examples:
        >>> parts = modules(MODELS["DeepSeek-V3"], 4096)
        >>> parts["attention"].active == parts["attention"].total
        True
    """
    n, work = count(model), forward_flops(model, tokens, causal)
    always = {
        "attention": (n.attention, work.projections + work.scores),
        "dense FFN": (n.dense_ffn, work.dense_ffn),
        "shared experts": (n.shared_experts, work.shared_experts),
        "routers": (n.routers, work.routers),
        "norms": (n.norms, 0),
        "head": (n.head, work.head),
    }
    return {
        "embedding": Module(n.embeddings, 0, 0),
        "routed experts": Module(
            n.routed_experts, n.chosen_experts, work.routed_experts
        ),
        **{name: Module(size, size, do) for name, (size, do) in always.items()},
    }


def mtp_flops(model: ModelConfig, tokens: int, causal: bool = True) -> float:
    """FLOPs of one token's forward pass through one extra predictor.

    It joins two vectors, runs a layer with experts, and the head again.

    Args:
        model: A shape with experts.
        tokens: Tokens of a sequence.
        causal: Whether masked keys are left out.

    Examples:
        >>> round(mtp_flops(MODELS["DeepSeek-V3"], 4096) / 1e9, 2)
        3.4
    """
    layer = replace(model, layers=1, dense_layers=0)
    join = 2 * 2 * model.hidden_size**2
    return forward_flops(layer, tokens, causal).total + join


def deepseek_v3(
    layers: int = 61,
    dense_layers: int = 3,
    hidden_size: int = 7168,
    vocab_size: int = 129280,
    heads: int = 128,
    q_lora_rank: int = 1536,
    kv_lora_rank: int = 512,
    qk_nope_head_dim: int = 128,
    qk_rope_head_dim: int = 64,
    v_head_dim: int = 128,
    intermediate_size: int = 18432,
    experts: int = 256,
    experts_per_token: int = 8,
    shared_experts: int = 1,
    moe_intermediate_size: int = 2048,
    router_bias: bool = True,
    mtp_layers: int = 1,
    tokens: int = 4096,
    bytes_per_value: int = 2,
    gpu_hours_per_trillion: float = 180_000,
    peak_tflops: float = 989.4,
) -> DeepSeekV3:
    """DeepSeek-V3 in numbers, or a variant of it.

    Args:
        layers: Transformer layers.
        dense_layers: First layers with a dense FFN in place of experts.
        hidden_size: Values of a token between layers.
        vocab_size: Rows of the embedding.
        heads: Heads of attention.
        q_lora_rank: Values of the compressed query; 0 for a whole one.
        kv_lora_rank: Values of the latent.
        qk_nope_head_dim: Values of a key without position.
        qk_rope_head_dim: Values of a key with position.
        v_head_dim: Values of a value.
        intermediate_size: Width of a dense FFN.
        experts: Routed experts of a layer.
        experts_per_token: Routed experts that one token runs.
        shared_experts: Experts that every token runs.
        moe_intermediate_size: Width of one expert.
        router_bias: Whether routers hold a number an expert for balance.
        mtp_layers: Extra predictors.
        tokens: Tokens of one sequence.
        bytes_per_value: Bytes of a cached value: 2 for bf16, 1 for fp8.
        gpu_hours_per_trillion: GPU hours to train on 10^12 tokens.
        peak_tflops: Dense peak of one GPU, in TFLOP/s.

    Returns:
        Parameters, work, cache and utilization.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> v3 = deepseek_v3()
        >>> v3.total_parameters, v3.cache_bytes_per_token
        (671026419200, 70272)
        >>> round(v3.mfu_percent, 1), round(v3.mfu_with_mtp_percent, 1)
        (39.1, 40.7)
    """
    given = dict(locals())  # the arguments, nothing else yet
    for name in ("kv_lora_rank", "experts"):
        if given[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {given[name]}")
    if not gpu_hours_per_trillion > 0:
        raise ValueError(
            "gpu_hours_per_trillion must be above 0, "
            f"got {gpu_hours_per_trillion}"
        )
    model = _config(given)
    n = count(model)
    speed = 1e12 / 3600 / gpu_hours_per_trillion
    training = flops_and_mfu(
        **shape(model),
        tokens=tokens,
        gpus=1,
        peak_tflops=peak_tflops,
        tokens_per_second=speed,
    )
    forward = forward_flops(model, tokens).total
    more = mtp_layers * mtp_flops(model, tokens) / forward
    cache = kv_cache_size(
        layers=layers,
        kv_lora_rank=kv_lora_rank,
        qk_rope_head_dim=qk_rope_head_dim,
        tokens=tokens,
        bytes_per_value=bytes_per_value,
        block_tokens=1,
    )
    return DeepSeekV3(
        total_parameters=n.total,
        active_parameters=n.active,
        mtp_parameters=n.extra_predictors,
        forward_gflop=forward / 1e9,
        training_gflop=training.gflop_per_token,
        attention_percent=training.attention_percent,
        cache_bytes_per_token=cache.bytes_per_token,
        request_bytes=cache.bytes_per_request,
        tokens_per_gpu_second=speed,
        mfu_percent=training.mfu_percent,
        mfu_with_mtp_percent=training.mfu_percent * (1 + more),
    )


_SHAPE = set(signature(deepseek_v3).parameters) & set(
    signature(ModelConfig).parameters
)


def _config(given: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        name="",
        source=("", ""),
        kv_heads=given["heads"],
        max_context=given["tokens"],
        **{name: given[name] for name in _SHAPE},
    )


# https://arxiv.org/abs/2412.19437 and https://arxiv.org/abs/2405.04434
_GPU_HOURS = {"DeepSeek-V3": 180_000, "DeepSeek-V2": 172_800}

PRESETS: dict[str, dict[str, Any]] = {
    name: {
        **{field: getattr(MODELS[name], field) for field in sorted(_SHAPE)},
        "gpu_hours_per_trillion": hours,
        "peak_tflops": GPUS["H800 SXM"].peak_tflops("bf16"),
    }
    for name, hours in _GPU_HOURS.items()
}
"""Both models that were trained with this design, and the hours they took."""

_AS_BUILT = {"experts_per_token": 8, "shared_experts": 1, "q_lora_rank": 1536}
CHANGES: dict[str, dict[str, Any]] = {
    "as it was built": _AS_BUILT,
    "every expert runs": {**_AS_BUILT, "experts_per_token": 256},
    "no shared expert": {**_AS_BUILT, "shared_experts": 0},
    "query not compressed": {**_AS_BUILT, "q_lora_rank": 0},
}
"""Changes to DeepSeek-V3; hours of training stay, so MFU moves with them."""


def deepseek_v3_chart(**arguments: Any) -> BarChart:
    """Where parameters and work are, in percent of each whole.

    Args:
        **arguments: As for ``deepseek_v3``, all of them.

    Examples:
        >>> chart = deepseek_v3_chart(**PRESETS["DeepSeek-V3"], tokens=4096)
        >>> [bar.name for bar in chart.bars]
        ['671B stored', '36.6B meet a token', '83.5 GFLOP forward']
    """
    parts = modules(_config(arguments), arguments["tokens"])
    drawn = {
        "routed experts": ["routed experts"],
        "shared experts": ["shared experts"],
        "attention": ["attention"],
        "dense FFN": ["dense FFN"],
        "embedding, head": ["embedding", "head"],
        "routers, norms": ["routers", "norms"],
    }
    bars = []
    for field, says in (
        ("total", "B stored"),
        ("active", "B meet a token"),
        ("forward_flops", " GFLOP forward"),
    ):
        sizes = {name: getattr(part, field) for name, part in parts.items()}
        whole = sum(sizes.values())
        bars.append(
            Bar(
                f"{whole / 1e9:.3g}{says}",
                [
                    (name, 100 * sum(sizes[each] for each in of) / whole)
                    for name, of in drawn.items()
                ],
            )
        )
    return BarChart("Where the model is large", Axis("percent"), bars)
