"""Shapes of published language models: one table for every calculator.

``configs.json`` beside this file holds the figures. Names are short forms of
those in Hugging Face configs, and 0 or False stands for what a model lacks.

    heads       H query heads, Hkv key-value heads of D values; or MLA's ranks
    FFN         SwiGLU, three matrices; dense, or experts of which some run
    extras      biases, norms of queries and keys, sinks, extra predictors

Every entry names the config and the paper it was taken from.
"""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelConfig:
    """What a decoder's shape is made of.

    Attributes:
        name: The model's name here, for example ``"Llama 3 8B"``.
        source: Addresses of its config and of its paper or announcement.
        layers: Transformer layers, without extra predictors
            (``num_hidden_layers``).
        hidden_size: Values of a token between layers.
        heads: Query heads (``num_attention_heads``).
        kv_heads: Key-value heads (``num_key_value_heads``); as ``heads`` in
            MLA, which caches none of them.
        vocab_size: Rows of the embedding, padding included.
        max_context: Tokens that the config allows
            (``max_position_embeddings``).
        head_dim: Values of a query, key and value; 0 with MLA, which has
            dimensions of its own.
        intermediate_size: Width of a dense FFN; 0 if every layer has experts.
        tied_embeddings: Whether the head is the embedding
            (``tie_word_embeddings``).
        q_lora_rank: MLA: values of the compressed query; 0 if not compressed.
        kv_lora_rank: MLA: values of the latent; 0 for any other attention.
        qk_nope_head_dim: MLA: values of a query and key without position.
        qk_rope_head_dim: MLA: values of a query and key with rotary position.
        v_head_dim: MLA: values of a value.
        experts: Routed experts of a layer.
        experts_per_token: Routed experts that one token runs.
        moe_intermediate_size: Width of one expert.
        shared_experts: Experts that every token runs, each as wide.
        dense_layers: First layers with a dense FFN instead of experts
            (``first_k_dense_replace``).
        window: Last tokens that a windowed layer attends to
            (``sliding_window``).
        windowed_layers: How many of the layers are windowed.
        attention_bias: Whether queries, keys and values add a bias.
        output_bias: Whether the attention's output adds a bias.
        router_bias: Whether routers hold a number an expert: a bias, or
            DeepSeek-V3's correction, which balances load.
        expert_bias: Whether the three matrices of an expert add biases.
        qk_norm: Whether queries and keys pass an RMSNorm of ``head_dim``
            weights each.
        attention_sinks: Whether each head learns one extra logit.
        mtp_layers: Modules that predict further tokens
            (``num_nextn_predict_layers``).
        published_total: Parameters as published, rounded as there; exact
            where an exact count is. Without ``mtp_layers``.
        published_active: Parameters a token as published, rounded as there.
    """

    name: str
    source: tuple[str, str]
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    vocab_size: int
    max_context: int
    head_dim: int = 0
    intermediate_size: int = 0
    tied_embeddings: bool = False
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    experts: int = 0
    experts_per_token: int = 0
    moe_intermediate_size: int = 0
    shared_experts: int = 0
    dense_layers: int = 0
    window: int = 0
    windowed_layers: int = 0
    attention_bias: bool = False
    output_bias: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    qk_norm: bool = False
    attention_sinks: bool = False
    mtp_layers: int = 0
    published_total: int | None = None
    published_active: int | None = None


def _read() -> dict[str, ModelConfig]:
    text = Path(__file__).with_name("configs.json").read_text("utf-8")
    rows = [{**row, "source": tuple(row["source"])} for row in json.loads(text)]
    return {row["name"]: ModelConfig(**row) for row in rows}


MODELS: dict[str, ModelConfig] = _read()
"""Published models by name, families together, small ones first."""


def config(name: str) -> ModelConfig:
    """The shape of one published model.

    Args:
        name: A key of ``MODELS``; case does not matter.

    Raises:
        ValueError: If there is no such model; names the nearest ones.

    Examples:
        >>> config("Llama 3 8B").kv_heads
        8
        >>> config("deepseek-v3").experts
        256
    """
    names = {known.lower(): known for known in MODELS}
    if name.lower() in names:
        return MODELS[names[name.lower()]]
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
    known = ", ".join(repr(names[n]) for n in near) or "see MODELS"
    raise ValueError(f"name must be a known model, got {name!r}: {known}")
