"""Parameters of a decoder, and those that one token meets.

    attention   projections of queries, keys, values and output, or MLA's
    FFN         three matrices a layer, dense or once an expert; a router
    ends        an embedding, norms, and a head, which may be the embedding

Everything a checkpoint stores is counted, biases and norms too. ``active``
leaves out experts that a token does not run, and the embedding, of which it
reads one row; ``active_with_embeddings`` counts that table whole.

Reference: Kaplan et al., 2020, https://arxiv.org/abs/2001.08361
Reference: Jiang et al., 2024, https://arxiv.org/abs/2401.04088
Reference: DeepSeek-AI, 2024, https://arxiv.org/abs/2412.19437
"""

from dataclasses import dataclass
from inspect import signature
from typing import Any

from warpmap.chart import Axis, Bar, BarChart
from warpmap.models.configs import MODELS, ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Parameters, in all and by part; parts without overlap.

    Attributes:
        total: All parameters of the main model.
        active: Parameters that multiply one token, the head's included.
        active_with_embeddings: The same and the whole embedding.
        non_embedding: All but embedding and head.
        embeddings: The table of token vectors.
        attention: Projections, their biases, and sinks.
        dense_ffn: FFNs of layers without experts.
        routed_experts: Experts among which a router chooses.
        chosen_experts: Those of them that one token runs.
        shared_experts: Experts that every token runs.
        routers: Scores of experts.
        norms: Weights of all RMSNorms.
        head: Output matrix; 0 if the embedding serves.
        extra_predictors: Modules for further tokens, on top of ``total``.
    """

    total: int
    active: int
    active_with_embeddings: int
    non_embedding: int
    embeddings: int
    attention: int
    dense_ffn: int
    routed_experts: int
    chosen_experts: int
    shared_experts: int
    routers: int
    norms: int
    head: int
    extra_predictors: int


def grouped_attention(
    hidden_size: int, heads: int, kv_heads: int, head_dim: int
) -> int:
    """Weights of the four projections of MHA, GQA or MQA.

    Args:
        hidden_size: Values of a token between layers.
        heads: Query heads.
        kv_heads: Key-value heads.
        head_dim: Values of a head.

    Examples:
        >>> grouped_attention(4096, heads=32, kv_heads=8, head_dim=128)
        41943040
    """
    query_and_output = 2 * hidden_size * heads * head_dim
    key_and_value = 2 * hidden_size * kv_heads * head_dim
    return query_and_output + key_and_value


def latent_attention(
    hidden_size: int,
    heads: int,
    q_lora_rank: int,
    kv_lora_rank: int,
    qk_nope_head_dim: int,
    qk_rope_head_dim: int,
    v_head_dim: int,
) -> int:
    """Weights of the projections of multi-head latent attention.

    Args:
        hidden_size: Values of a token between layers.
        heads: Heads, for queries, keys and values alike.
        q_lora_rank: Values of the compressed query; 0 if not compressed.
        kv_lora_rank: Values of the latent.
        qk_nope_head_dim: Values of a query and key without position.
        qk_rope_head_dim: Values with position; one such key for all heads.
        v_head_dim: Values of a value.

    Examples:
        >>> latent_attention(7168, 128, 1536, 512, 128, 64, 128)
        187105280
    """
    queries = heads * (qk_nope_head_dim + qk_rope_head_dim)
    if q_lora_rank:
        query = hidden_size * q_lora_rank + q_lora_rank * queries
    else:
        query = hidden_size * queries
    down = hidden_size * (kv_lora_rank + qk_rope_head_dim)
    up = kv_lora_rank * heads * (qk_nope_head_dim + v_head_dim)
    output = heads * v_head_dim * hidden_size
    return query + down + up + output


def gated_ffn(hidden_size: int, width: int, bias: bool = False) -> int:
    """Parameters of one gated FFN: two matrices up, one down.

    Args:
        hidden_size: Values of a token between layers.
        width: Values between the matrices.
        bias: Whether each matrix adds a bias.

    Examples:
        >>> gated_ffn(4096, 14336)
        176160768
    """
    biases = 2 * width + hidden_size if bias else 0
    return 3 * hidden_size * width + biases


def parameter_count(
    layers: int = 32,
    hidden_size: int = 4096,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    intermediate_size: int = 0,
    vocab_size: int = 32000,
    tied_embeddings: bool = False,
    experts: int = 8,
    experts_per_token: int = 2,
    moe_intermediate_size: int = 14336,
    shared_experts: int = 0,
    dense_layers: int = 0,
    q_lora_rank: int = 0,
    kv_lora_rank: int = 0,
    qk_nope_head_dim: int = 0,
    qk_rope_head_dim: int = 0,
    v_head_dim: int = 0,
    qk_norm: bool = False,
    attention_bias: bool = False,
    output_bias: bool = False,
    attention_sinks: bool = False,
    router_bias: bool = False,
    expert_bias: bool = False,
    mtp_layers: int = 0,
) -> ParameterCount:
    """Parameters of a decoder; the defaults are Mixtral 8x7B.

    Args:
        layers: Transformer layers.
        hidden_size: Values of a token between layers.
        heads: Query heads.
        kv_heads: Key-value heads; not used by MLA.
        head_dim: Values of a head; not used by MLA.
        intermediate_size: Width of a dense FFN; 0 if there is none.
        vocab_size: Rows of the embedding.
        tied_embeddings: Whether the head is the embedding.
        experts: Routed experts of a layer; 0 for a dense model.
        experts_per_token: Routed experts that one token runs.
        moe_intermediate_size: Width of one expert.
        shared_experts: Experts that every token runs.
        dense_layers: First layers with a dense FFN in place of experts.
        q_lora_rank: MLA: values of the compressed query; 0 for none.
        kv_lora_rank: MLA: values of the latent; 0 for any other attention.
        qk_nope_head_dim: MLA: values of a key without position.
        qk_rope_head_dim: MLA: values of a key with position.
        v_head_dim: MLA: values of a value.
        qk_norm: Whether queries and keys have norms.
        attention_bias: Whether queries, keys and values add biases.
        output_bias: Whether the attention's output adds a bias.
        attention_sinks: Whether a head learns an extra logit.
        router_bias: Whether routers hold a bias an expert.
        expert_bias: Whether the matrices of experts add biases.
        mtp_layers: Extra predictors, counted apart.

    Returns:
        The counts, by part.

    Raises:
        ValueError: If a number is out of range, or a part that is used has
            no size.

    Examples:
        >>> mixtral = parameter_count()
        >>> mixtral.total, mixtral.active
        (46702792704, 12748853248)
        >>> parameter_count(experts=0, intermediate_size=14336).total
        7241732096
    """
    given = dict(locals())  # the arguments, nothing else yet
    needed = {"layers", "hidden_size", "heads", "vocab_size"}
    if kv_lora_rank:
        needed |= {"qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"}
    else:
        needed |= {"kv_heads", "head_dim"}
    if experts:
        needed |= {"experts_per_token", "moe_intermediate_size"}
    if dense_layers or not experts:
        needed.add("intermediate_size")
    for name, value in given.items():
        least = 1 if name in needed else 0
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    for name, most in (
        ("dense_layers", layers),
        ("experts_per_token", experts),
    ):
        if experts and given[name] > most:
            raise ValueError(
                f"{name} must be at most {most}, got {given[name]}"
            )
    if not kv_lora_rank and heads % kv_heads:
        raise ValueError(f"kv_heads must divide {heads} heads, got {kv_heads}")
    for name in ("attention_bias", "qk_norm"):
        if kv_lora_rank and given[name]:
            raise ValueError(f"{name} is not defined for MLA, got True")

    if kv_lora_rank:
        attention = latent_attention(
            hidden_size,
            heads,
            q_lora_rank,
            kv_lora_rank,
            qk_nope_head_dim,
            qk_rope_head_dim,
            v_head_dim,
        )
        norms = 2 * hidden_size + q_lora_rank + kv_lora_rank
    else:
        attention = grouped_attention(hidden_size, heads, kv_heads, head_dim)
        attention += attention_bias * (heads + 2 * kv_heads) * head_dim
        norms = 2 * hidden_size + qk_norm * 2 * head_dim
    attention += output_bias * hidden_size + attention_sinks * heads

    expert = gated_ffn(hidden_size, moe_intermediate_size, expert_bias)
    router = experts * (hidden_size + router_bias)
    moe_layers = layers - dense_layers if experts else 0
    dense = gated_ffn(hidden_size, intermediate_size)

    parts = {
        "attention": layers * attention,
        "dense_ffn": (layers - moe_layers) * dense,
        "routed_experts": moe_layers * experts * expert,
        "shared_experts": moe_layers * shared_experts * expert,
        "routers": moe_layers * router,
        "norms": layers * norms + hidden_size,
    }
    chosen = moe_layers * experts_per_token * expert
    table = vocab_size * hidden_size
    head = 0 if tied_embeddings else table
    non_embedding = sum(parts.values())
    running = non_embedding - parts["routed_experts"] + chosen

    # one more layer, three norms, and a matrix that joins two vectors
    ffn = (experts + shared_experts) * expert + router if experts else dense
    predictor = attention + norms + ffn + 3 * hidden_size + 2 * hidden_size**2

    return ParameterCount(
        total=non_embedding + table + head,
        active=running + table,  # the head, be it the embedding or its own
        active_with_embeddings=running + table + head,
        non_embedding=non_embedding,
        embeddings=table,
        chosen_experts=chosen,
        head=head,
        extra_predictors=mtp_layers * predictor,
        **parts,
    )


def _arguments(config: ModelConfig) -> dict[str, Any]:
    """Those fields of a config that count."""
    names = signature(parameter_count).parameters
    return {name: getattr(config, name) for name in names}


PRESETS: dict[str, dict[str, Any]] = {
    name: _arguments(config) for name, config in MODELS.items()
}
"""Published models, as arguments of ``parameter_count``."""


def count(config: ModelConfig) -> ParameterCount:
    """Parameters of a published model.

    Args:
        config: Its shape, from ``warpmap.models.configs``.

    Examples:
        >>> from warpmap.models.configs import config
        >>> count(config("DeepSeek-V3")).total
        671026419200
    """
    return parameter_count(**_arguments(config))


def parameter_chart(**arguments: Any) -> BarChart:
    """Where parameters are: all of them, and those of one token.

    Args:
        **arguments: As for ``parameter_count``.

    Examples:
        >>> [bar.name for bar in parameter_chart().bars]
        ['all', 'one token']
    """
    n = parameter_count(**arguments)
    # what serves as head is drawn there, for one token
    always = {
        "attention": n.attention,
        "dense FFN": n.dense_ffn,
        "shared experts": n.shared_experts,
    }
    last = {"routers, norms": n.routers + n.norms}
    everything = {
        "embedding": n.embeddings,
        **always,
        "routed experts": n.routed_experts,
        **last,
        "head": n.head,
    }
    one_token = {
        "embedding": 0,
        **always,
        "routed experts": n.chosen_experts,
        **last,
        "head": n.embeddings,
    }
    return BarChart(
        "Where the parameters are",
        Axis("billions of parameters"),
        [
            Bar(name, [(part, size / 1e9) for part, size in parts.items()])
            for name, parts in (("all", everything), ("one token", one_token))
        ],
    )
