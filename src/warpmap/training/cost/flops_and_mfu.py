"""FLOPs of training a token, and the share of a peak that they reach.

A weight that multiplies a token costs 2 FLOPs, a multiplication and an
addition. Backward multiplies twice as much: once for the gradient of the
input, once for that of the weight.

    forward     2 N, and for attention 2 H (Dqk + Dv) for each key, a layer
    training    3 x forward, so 6 N without attention
    executed    and whatever is computed a second time to save memory

N are the weights that multiply one token: no embedding, of the experts only
those chosen. MFU divides what training needs by the peak, HFU what is
executed. Norms, softmax and activations are not counted, as is customary.

Reference: Kaplan et al., 2020, https://arxiv.org/abs/2001.08361
Reference: Chowdhery et al., 2022, https://arxiv.org/abs/2204.02311
Reference: Narayanan et al., 2021, https://arxiv.org/abs/2104.04473
"""

from dataclasses import astuple, dataclass, replace
from typing import Any

from warpmap.chart import Axis, Line, LineChart, Point
from warpmap.hardware.gpus import GPUS
from warpmap.models.configs import MODELS, ModelConfig
from warpmap.models.foundations.parameter_count import count


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one token's forward pass, by part.

    Attributes:
        projections: Matrices of attention.
        scores: Queries with keys, and weights with values.
        dense_ffn: FFNs of layers without experts.
        routed_experts: The experts that one token runs.
        shared_experts: Experts that every token runs.
        routers: Scores of experts.
        head: The output matrix.
    """

    projections: int
    scores: float
    dense_ffn: int
    routed_experts: int
    shared_experts: int
    routers: int
    head: int

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(astuple(self)))


@dataclass(frozen=True)
class FlopsAndMFU:
    """What training costs, and how well it uses its GPUs.

    Attributes:
        gflop_per_token: 10^9 FLOPs that training on one token needs.
        attention_percent: Share of them that grows with the sequence.
        executed_gflop_per_token: The same and all that is recomputed.
        model_tflops: Needed FLOPs that one GPU does, in TFLOP/s.
        mfu_percent: Share of the peak that is; more than 100 cannot be.
        hfu_percent: Share of the peak with what is recomputed.
        days: Days that all tokens take.
        gpu_hours: Hours of one GPU that all tokens take.
        total_flop: FLOPs that training on all tokens needs.
    """

    gflop_per_token: float
    attention_percent: float
    executed_gflop_per_token: float
    model_tflops: float
    mfu_percent: float
    hfu_percent: float
    days: float
    gpu_hours: float
    total_flop: float


def attended_keys(tokens: int, window: int = 0, causal: bool = True) -> float:
    """Keys that a query meets, on average over a sequence.

    Args:
        tokens: Tokens of the sequence.
        window: Last tokens that a query may meet; 0 for all.
        causal: Whether masked keys are left out; else all are counted,
            whatever the window.

    Examples:
        >>> attended_keys(4096), attended_keys(4096, causal=False)
        (2048.5, 4096.0)
        >>> attended_keys(4096, window=1)
        1.0
    """
    if not causal:
        return float(tokens)
    most = min(window or tokens, tokens)
    # the first queries meet 1, 2, ... keys, the rest a full window
    return (most * (most + 1) / 2 + (tokens - most) * most) / tokens


def attention_scores(
    tokens: int,
    layers: int,
    heads: int,
    qk_head_dim: int,
    v_head_dim: int,
    window: int = 0,
    windowed_layers: int = 0,
    causal: bool = True,
) -> float:
    """FLOPs of one token's forward pass that grow with the sequence.

    Args:
        tokens: Tokens of the sequence.
        layers: All layers.
        heads: Query heads; that keys are shared saves nothing here.
        qk_head_dim: Values of a query and of a key.
        v_head_dim: Values of a value; 0 for the queries' product alone.
        window: Last tokens that windowed layers attend to.
        windowed_layers: How many of the layers are windowed.
        causal: Whether masked keys are left out.

    Examples:
        >>> attention_scores(4095, 1, heads=1, qk_head_dim=64, v_head_dim=64)
        524288.0
    """
    whole = attended_keys(tokens, causal=causal)
    short = attended_keys(tokens, window, causal)
    keys = (layers - windowed_layers) * whole + windowed_layers * short
    return 2 * heads * (qk_head_dim + v_head_dim) * keys


def head_dims(model: ModelConfig) -> tuple[int, int]:
    """Values of a query and of a value, as attention multiplies them.

    Args:
        model: A published shape, or one of your own.

    Examples:
        >>> head_dims(MODELS["DeepSeek-V3"]), head_dims(MODELS["Llama 3 8B"])
        ((192, 128), (128, 128))
    """
    if model.kv_lora_rank:
        query = model.qk_nope_head_dim + model.qk_rope_head_dim
        return query, model.v_head_dim
    return model.head_dim, model.head_dim


def forward_flops(
    model: ModelConfig, tokens: int, causal: bool = True
) -> ForwardFlops:
    """FLOPs of one token's forward pass, by part.

    MLA is counted as it trains, with keys and values of every head.

    Args:
        model: A published shape, or one of your own.
        tokens: Tokens of the sequence.
        causal: Whether masked keys are left out.

    Returns:
        FLOPs a token, on average over the sequence.

    Raises:
        ValueError: If ``tokens`` is below 1, or the shape is not sound.

    Examples:
        >>> v3 = forward_flops(MODELS["DeepSeek-V3"], 4096)
        >>> round(v3.total / 1e9, 1), round(v3.scores / 1e9, 1)
        (83.5, 10.2)
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    # biases and sinks are added, they multiply nothing
    matrices = count(
        replace(
            model,
            attention_bias=False,
            output_bias=False,
            router_bias=False,
            expert_bias=False,
            attention_sinks=False,
        )
    )
    return ForwardFlops(
        projections=2 * matrices.attention,
        scores=attention_scores(
            tokens,
            model.layers,
            model.heads,
            *head_dims(model),
            model.window,
            model.windowed_layers,
            causal,
        ),
        dense_ffn=2 * matrices.dense_ffn,
        routed_experts=2 * matrices.chosen_experts,
        shared_experts=2 * matrices.shared_experts,
        routers=2 * matrices.routers,
        head=2 * matrices.embeddings,  # as large as the embedding, or the same
    )


def flops_and_mfu(
    matmul_parameters: int = 36_624_596_992,
    head_parameters: int = 926_679_040,
    layers: int = 61,
    heads: int = 128,
    qk_head_dim: int = 192,
    v_head_dim: int = 128,
    window: int = 0,
    windowed_layers: int = 0,
    tokens: int = 4096,
    causal: bool = True,
    recompute_scores: bool = True,
    recompute_layers: bool = False,
    gpus: int = 2048,
    peak_tflops: float = 989.4,
    tokens_per_second: float = 3_157_407,
    trillion_tokens: float = 14.8,
) -> FlopsAndMFU:
    """FLOPs, MFU and time of a training; the defaults are DeepSeek-V3.

    Args:
        matmul_parameters: Weights that multiply one token, the head's too.
        head_parameters: Those of them in the head.
        layers: Transformer layers.
        heads: Query heads.
        qk_head_dim: Values of a query and of a key.
        v_head_dim: Values of a value.
        window: Last tokens that windowed layers attend to; else 0.
        windowed_layers: How many of the layers are windowed.
        tokens: Tokens of one sequence.
        causal: Whether masked keys are left out; PaLM counts them.
        recompute_scores: Whether backward computes scores again, as fused
            attention does.
        recompute_layers: Whether backward runs the layers' forward again.
        gpus: GPUs that train together.
        peak_tflops: Dense peak of one GPU, in TFLOP/s.
        tokens_per_second: Tokens that all GPUs train on in a second.
        trillion_tokens: 10^12 tokens to train on in all.

    Returns:
        FLOPs of a token, utilization, and the time for all tokens.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> v3 = flops_and_mfu()
        >>> round(v3.gflop_per_token, 1), round(v3.mfu_percent, 1)
        (250.5, 39.0)
        >>> round(flops_and_mfu(causal=False).mfu_percent, 1)
        43.8
    """
    given = dict(locals())  # the arguments, nothing else yet
    above_zero = {"peak_tflops", "tokens_per_second", "trillion_tokens"}
    from_zero = {"head_parameters", "window", "windowed_layers"}
    switches = {"causal", "recompute_scores", "recompute_layers"}
    for name, value in given.items():
        if name in above_zero and not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
        least = 0 if name in from_zero else 1
        if name not in above_zero | switches and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    for name, most in (
        ("head_parameters", matmul_parameters),
        ("windowed_layers", layers),
    ):
        if given[name] > most:
            raise ValueError(
                f"{name} must be at most {most}, got {given[name]}"
            )
    if windowed_layers and not window:
        raise ValueError(
            f"window must be at least 1 with windowed_layers, got {window}"
        )

    attends = tokens, layers, heads, qk_head_dim
    masked = window, windowed_layers, causal
    scores = attention_scores(*attends, v_head_dim, *masked)
    needed = 3 * (2 * matmul_parameters + scores)
    executed = needed
    if recompute_scores:
        executed += attention_scores(*attends, 0, *masked)
    if recompute_layers:
        executed += 2 * (matmul_parameters - head_parameters) + scores

    peak = gpus * peak_tflops * 1e12
    seconds = trillion_tokens * 1e12 / tokens_per_second
    return FlopsAndMFU(
        gflop_per_token=needed / 1e9,
        attention_percent=100 * 3 * scores / needed,
        executed_gflop_per_token=executed / 1e9,
        model_tflops=needed * tokens_per_second / gpus / 1e12,
        mfu_percent=100 * needed * tokens_per_second / peak,
        hfu_percent=100 * executed * tokens_per_second / peak,
        days=seconds / 86400,
        gpu_hours=seconds * gpus / 3600,
        total_flop=needed * trillion_tokens * 1e12,
    )


def shape(model: ModelConfig) -> dict[str, Any]:
    """What ``flops_and_mfu`` must know of a model.

    Args:
        model: A published shape, or one of your own.

    Examples:
        >>> llama = flops_and_mfu(**shape(MODELS["Llama 3 8B"]))
        >>> round(llama.attention_percent, 1)
        6.7
    """
    parts = forward_flops(model, 1)
    qk_head_dim, v_head_dim = head_dims(model)
    return {
        "matmul_parameters": round(parts.total - parts.scores) // 2,
        "head_parameters": parts.head // 2,
        "layers": model.layers,
        "heads": model.heads,
        "qk_head_dim": qk_head_dim,
        "v_head_dim": v_head_dim,
        "window": model.window,
        "windowed_layers": model.windowed_layers,
    }


PRESETS: dict[str, dict[str, Any]] = {
    name: shape(model) for name, model in MODELS.items()
}
"""The calculator's menu of models."""

PEAKS: dict[str, dict[str, Any]] = {
    name: {"peak_tflops": peak}
    for name, card in GPUS.items()
    if (peak := card.peak_tflops("bf16"))
}
"""The calculator's menu of GPUs, with their dense peak in bf16."""

RUNS: dict[str, dict[str, Any]] = {
    # 272.80 billion tokens a day, https://arxiv.org/abs/2505.09343
    "DeepSeek-V3, 2048 H800": {
        **PRESETS["DeepSeek-V3"],
        **PEAKS["H800 SXM"],
        "tokens": 4096,
        "causal": True,
        "recompute_scores": True,
        "recompute_layers": False,
        "gpus": 2048,
        "tokens_per_second": 3_157_407,
        "trillion_tokens": 14.8,
    },
    # section 4.1 and appendix B of https://arxiv.org/abs/2204.02311
    "PaLM 540B, 6144 TPU v4": {
        "matmul_parameters": 540_350_000_000,
        "head_parameters": 256_000 * 18432,
        "layers": 118,
        "heads": 48,
        "qk_head_dim": 256,
        "v_head_dim": 256,
        "window": 0,
        "windowed_layers": 0,
        "tokens": 2048,
        "causal": False,
        "recompute_scores": False,
        "recompute_layers": False,
        "gpus": 6144,
        "peak_tflops": 275,
        "tokens_per_second": 238_300,
        "trillion_tokens": 0.78,
    },
}
"""Published runs, as all arguments of ``flops_and_mfu``."""


def flops_chart(**arguments: Any) -> LineChart:
    """FLOPs of a token over the length of its sequence.

    Args:
        **arguments: As for ``flops_and_mfu``, all of them.

    Returns:
        What training needs, what is executed, and 6 N.

    Raises:
        ValueError: As ``flops_and_mfu``.

    Examples:
        >>> run = RUNS["DeepSeek-V3, 2048 H800"]
        >>> [line.name for line in flops_chart(**run).lines]
        ['needed', 'executed', '6 N']
    """
    here = flops_and_mfu(**arguments)
    tokens = arguments["tokens"]
    lengths = sorted({tokens, *(2**n for n in range(10, 21))})
    costs = {n: flops_and_mfu(**{**arguments, "tokens": n}) for n in lengths}
    rule = 6 * arguments["matmul_parameters"] / 1e9
    return LineChart(
        "FLOPs to train on one token",
        Axis("tokens of a sequence", log=True),
        Axis("10^9 FLOPs", log=True),
        [
            Line("needed", [(n, c.gflop_per_token) for n, c in costs.items()]),
            Line(
                "executed",
                [(n, c.executed_gflop_per_token) for n, c in costs.items()],
            ),
            Line("6 N", [(n, rule) for n in lengths]),
        ],
        [Point(f"{here.gflop_per_token:,.4g}", tokens, here.gflop_per_token)],
    )
