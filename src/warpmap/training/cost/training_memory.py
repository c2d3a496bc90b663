"""Bytes that one GPU holds while it trains: states, activations, logits.

States are kept from step to step, for each parameter; a recipe says which.

    fp16, gradient copied    weights 2, gradients 2, their copy 4,
                             master weights 4, two moments 4 + 4: together 20
    ZeRO's count             the same without the copy: together 16

ZeRO shares them among N ranks of data parallelism: stage 1 the optimizer's
part, stage 2 the gradients too, stage 3 the weights too. Activations grow with
tokens instead, and logits with tokens and vocabulary.

Reference: Rajbhandari et al., 2019, https://arxiv.org/abs/1910.02054
Reference: Korthikanti et al., 2022, https://arxiv.org/abs/2205.05198
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from warpmap.chart import Axis, Bar, BarChart
from warpmap.hardware.gpus import GPUS
from warpmap.models.configs import MODELS, ModelConfig, config
from warpmap.models.foundations.parameter_count import count

GIB = 1 << 30

if TYPE_CHECKING:
    ModelName = str
else:
    ModelName = Literal[tuple(MODELS)]

RecipeName = Literal[
    "fp16, gradient copied",
    "bf16, fp32 gradient",
    "bf16 as ZeRO counts",
    "fp32 under autocast",
    "bf16, 8-bit moments",
    "pure bf16",
]
Recompute = Literal["none", "selective", "full"]
Attention = Literal["flash", "stored"]
Loss = Literal["eager", "fused"]


@dataclass(frozen=True)
class Recipe:
    """Bytes of one parameter, in each place where it is kept.

    Args:
        weights: What forward and backward passes use.
        gradients: What the backward pass writes.
        copy: Gradients once more, in fp32 for the optimizer.
        master: Weights once more, in fp32 for small updates.
        moments: Adam's two averages, together.
        cast: Copies that live from forward to backward pass only.
    """

    weights: int
    gradients: int
    copy: int
    master: int
    moments: int
    cast: int = 0

    @property
    def optimizer(self) -> int:
        """Bytes that only the update needs; ZeRO shares them first."""
        return self.copy + self.master + self.moments

    @property
    def total(self) -> int:
        """Bytes that are kept from step to step."""
        return self.weights + self.gradients + self.optimizer


RECIPES: dict[RecipeName, Recipe] = {
    "fp16, gradient copied": Recipe(2, 2, 4, 4, 8),
    "bf16, fp32 gradient": Recipe(2, 4, 0, 4, 8),
    "bf16 as ZeRO counts": Recipe(2, 2, 0, 4, 8),
    "fp32 under autocast": Recipe(4, 4, 0, 0, 8, cast=2),
    "bf16, 8-bit moments": Recipe(2, 2, 0, 4, 2),
    "pure bf16": Recipe(2, 2, 0, 0, 4),
}
"""Adam in the number formats that are in use; scales of 8-bit blocks not."""


@dataclass(frozen=True)
class States:
    """Bytes of states on one rank."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.optimizer


def states(
    parameters: float, recipe: RecipeName, zero_stage: int = 0, ranks: int = 1
) -> States:
    """States of so many parameters on one of ``ranks``.

    Args:
        parameters: Parameters that the ranks would hold without ZeRO.
        recipe: A key of ``RECIPES``.
        zero_stage: 0 to 3: nothing shared, optimizer, gradients, weights.
        ranks: Ranks of data parallelism that share.

    Examples:
        >>> [states(1, "fp16, gradient copied", s, 64).total for s in (0, 1)]
        [20.0, 4.25]
    """
    bytes_ = RECIPES[recipe]
    return States(
        parameters * bytes_.weights / (ranks if zero_stage >= 3 else 1),
        parameters * bytes_.gradients / (ranks if zero_stage >= 2 else 1),
        parameters * bytes_.optimizer / (ranks if zero_stage >= 1 else 1),
    )


def gpt_layer_bytes(
    sequence: int,
    batch: int,
    hidden_size: int,
    heads: int,
    tensor: int = 1,
    sequence_parallel: bool = False,
    recompute: Recompute = "none",
) -> float:
    """Activations of a layer of GPT-3, in 16 bits, after Korthikanti et al.

    LayerNorm, biases, GELU, an FFN of four times the width, dropout in three
    places, and attention that stores its matrices.

    Args:
        sequence: Tokens of a sequence, s.
        batch: Sequences of a micro-batch, b.
        hidden_size: Values of a token between layers, h.
        heads: Attention heads, a.
        tensor: Ranks that split the matrices, t.
        sequence_parallel: Whether they also split what lies between.
        recompute: Nothing, the matrices of attention, or the whole layer.

    Examples:
        >>> gpt_layer_bytes(2048, 1, 12288, 96) / (2048 * 12288)
        114.0
    """
    sbh = sequence * batch * hidden_size
    if recompute == "full":
        return 2 * sbh
    between = 10 * sbh / (tensor if sequence_parallel else 1)
    inside = 24 * sbh / tensor
    matrices = 5 * heads * sequence**2 * batch / tensor
    return between + inside + (matrices if recompute == "none" else 0)


def layer_bytes(
    model: ModelConfig,
    sequence: int,
    batch: int = 1,
    *,
    has_experts: bool = False,
    tensor: int = 1,
    sequence_parallel: bool = True,
    recompute: Recompute = "none",
    attention: Attention = "flash",
) -> float:
    """Activations of a layer of today's models, in 16 bits, as PyTorch saves.

    RMSNorm, a gated FFN, no dropout; numbers of fp32 that there is one of for
    a token or a head are left out. A tensor saved twice counts once.

    Args:
        model: Its shape.
        sequence: Tokens of a sequence on this rank.
        batch: Sequences of a micro-batch.
        has_experts: Whether the FFN is a mixture, evenly loaded.
        tensor: Ranks that split the matrices.
        sequence_parallel: Whether they also split what lies between.
        recompute: Nothing, the matrices of attention, or the whole layer.
        attention: ``"stored"`` keeps its probabilities, ``"flash"`` does not.

    Examples:
        >>> layer_bytes(config("Llama 3 8B"), sequence=1)
        167936.0
    """
    C, H = model.hidden_size, model.heads
    shared = tensor if sequence_parallel else 1
    if recompute == "full":
        return 2 * sequence * batch * C / shared
    if model.kv_lora_rank:  # MLA: ranks stay whole, heads are split
        low = 2 * (model.q_lora_rank + model.kv_lora_rank)
        query_and_key = 2 * (model.qk_nope_head_dim + model.qk_rope_head_dim)
        heads = H * (query_and_key + 2 * model.v_head_dim)
    else:
        low = 0
        heads = 2 * (H + model.kv_heads) * model.head_dim  # q, output; k, v
    if has_experts:
        # a copy of the input, gate, up, activated, product, and the output
        expert = 2 * C + 4 * model.moe_intermediate_size
        ffn = model.experts_per_token * expert
        ffn += 4 * model.shared_experts * model.moe_intermediate_size
    else:
        ffn = 4 * model.intermediate_size
    # inputs and outputs of both norms
    values = (4 * C + low) / shared + (heads + ffn) / tensor
    matrices = 2.0 * H * sequence**2 * batch / tensor
    if attention == "flash" or recompute == "selective":
        matrices = 0
    return 2 * sequence * batch * values + matrices


def logits_bytes(
    vocab_size: int, tokens: int, loss: Loss = "eager", tensor: int = 1
) -> float:
    """The most that logits and their gradients take at once.

    PyTorch's cross-entropy in fp32 holds log-probabilities, their gradient
    and the gradient of the logits: 12 bytes each. Fused kernels compute a
    chunk at a time; it is not counted.

    Args:
        vocab_size: Logits of a token.
        tokens: Tokens of a micro-batch on this rank.
        loss: ``"eager"`` or ``"fused"``.
        tensor: Ranks that split the vocabulary.

    Examples:
        >>> logits_bytes(128256, tokens=8192) / GIB
        11.7421875
    """
    return 12 * vocab_size * tokens / tensor if loss == "eager" else 0.0


@dataclass(frozen=True)
class TrainingMemory:
    """Memory of one GPU.

    Attributes:
        parameters: Parameters of the model.
        recipe_bytes: Bytes of a parameter that nobody shares.
        shared_bytes: Bytes of a parameter on this GPU, all sharing counted.
        weight_bytes: Weights that stay.
        gradient_bytes: Gradients.
        optimizer_bytes: Master weights, moments, and copied gradients.
        activation_bytes: What all layers save for the backward pass.
        peak_bytes: The most beside it for a moment: logits, or a layer that
            is computed again.
        passing_bytes: Weights for a part of the step: autocast's copies, and
            under stage 3 weights and gradients of the layer at work.
        total_gib: All of it, in GiB.
        fits: Whether that is within the memory less the reserve.
        most_sequences: Largest micro-batch that fits, in sequences.
    """

    parameters: int
    recipe_bytes: int
    shared_bytes: float
    weight_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    activation_bytes: float
    peak_bytes: float
    passing_bytes: float
    total_gib: float
    fits: bool
    most_sequences: int


def training_memory(
    model: ModelName = "Llama 3 8B",
    recipe: RecipeName = "bf16 as ZeRO counts",
    zero_stage: Literal[0, 1, 2, 3] = 1,
    data: int = 64,
    tensor: int = 1,
    sequence_parallel: bool = True,
    sequence: int = 8192,
    micro_batch: int = 1,
    recompute: Recompute = "none",
    attention: Attention = "flash",
    loss: Loss = "eager",
    memory_gib: float = 80,
    reserve_gib: float = 4,
) -> TrainingMemory:
    """Memory of one GPU that trains a published model with Adam.

    Args:
        model: Its name in the table of models.
        recipe: Number formats of weights, gradients and Adam's states.
        zero_stage: 1 shares the optimizer's part, 2 gradients, 3 weights.
        data: Ranks of data parallelism, which share.
        tensor: Ranks that split the matrices of each layer.
        sequence_parallel: Whether these split what lies between as well.
        sequence: Tokens of a sequence.
        micro_batch: Sequences that a rank computes at once.
        recompute: Parts of a layer that the backward pass computes again.
        attention: Whether attention stores its matrices.
        loss: Whether logits exist all at once.
        memory_gib: Memory of a GPU, in GiB.
        reserve_gib: GiB for CUDA, NCCL and fragmentation; assumed.

    Raises:
        ValueError: If a number is out of range, or ``tensor`` does not divide
            the heads.

    Examples:
        >>> memory = training_memory("Llama 3 8B", data=64)
        >>> memory.recipe_bytes, memory.shared_bytes, memory.fits
        (16, 4.1875, False)
        >>> training_memory("Llama 3 8B", data=64, loss="fused").most_sequences
        1
    """
    if model not in MODELS:
        raise ValueError(f"model must be a published one, got {model!r}")
    if recipe not in RECIPES:
        raise ValueError(f"recipe must be a key of RECIPES, got {recipe!r}")
    if zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_stage must be 0 to 3, got {zero_stage}")
    for name, number in (
        ("data", data),
        ("tensor", tensor),
        ("sequence", sequence),
        ("micro_batch", micro_batch),
    ):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    shape = config(model)
    if shape.kv_heads % tensor:
        raise ValueError(
            f"tensor must divide {shape.kv_heads} key-value heads, got {tensor}"
        )
    if sequence % tensor:
        raise ValueError(f"sequence must be a multiple of {tensor} ranks")
    if not 0 <= reserve_gib < memory_gib:
        raise ValueError(
            f"reserve_gib must be from 0 to below {memory_gib}, "
            f"got {reserve_gib}"
        )

    n, bytes_ = count(shape), RECIPES[recipe]
    # matrices are split; norms and routers every rank holds
    whole = n.norms + n.routers
    here = whole + (n.total - whole) / tensor
    kept = states(here, recipe, zero_stage, data)
    passing = bytes_.cast * here
    if zero_stage == 3:
        one_layer = (n.non_embedding / shape.layers) / tensor
        passing += (bytes_.weights + bytes_.gradients) * one_layer

    moe = shape.layers - shape.dense_layers if shape.experts else 0

    def layers(kind: Recompute) -> list[float]:
        """A layer of each kind that there is, and all of them together."""
        each = {
            has: layer_bytes(
                shape,
                sequence,
                has_experts=has,
                tensor=tensor,
                sequence_parallel=sequence_parallel,
                recompute=kind,
                attention=attention,
            )
            for has, many in ((False, shape.layers - moe), (True, moe))
            if many
        }
        together = (shape.layers - moe) * each.get(False, 0.0)
        return [max(each.values()), together + moe * each.get(True, 0.0)]

    _, activations = layers(recompute)
    again = layers("none")[0] if recompute != "none" else 0.0
    peak = max(again, logits_bytes(shape.vocab_size, sequence, loss, tensor))

    room = (memory_gib - reserve_gib) * GIB - kept.total - passing
    total = kept.total + passing + micro_batch * (activations + peak)
    return TrainingMemory(
        parameters=n.total,
        recipe_bytes=bytes_.total,
        shared_bytes=kept.total / n.total,
        weight_bytes=kept.weights,
        gradient_bytes=kept.gradients,
        optimizer_bytes=kept.optimizer,
        activation_bytes=micro_batch * activations,
        peak_bytes=micro_batch * peak,
        passing_bytes=passing,
        total_gib=total / GIB,
        fits=total <= (memory_gib - reserve_gib) * GIB,
        most_sequences=max(0, math.floor(room / (activations + peak))),
    )


def training_memory_chart(**arguments: Any) -> BarChart:
    """What the memory holds: as asked, with other stages, and recomputed.

    Args:
        **arguments: As for ``training_memory``.

    Examples:
        >>> [bar.name for bar in training_memory_chart(zero_stage=1).bars]
        ['here', 'ZeRO 0', 'ZeRO 2', 'ZeRO 3', 'recompute full']
    """
    stage = arguments.get("zero_stage", 1)
    variants: dict[str, dict[str, Any]] = {"here": {}}
    for other in {0, 1, 2, 3} - {stage}:
        variants[f"ZeRO {other}"] = {"zero_stage": other}
    if arguments.get("recompute", "none") != "full":
        variants["recompute full"] = {"recompute": "full"}
    bars = []
    for name, changes in variants.items():
        m = training_memory(**{**arguments, **changes})
        parts = {
            "weights": m.weight_bytes,
            "gradients": m.gradient_bytes,
            "optimizer": m.optimizer_bytes,
            "activations": m.activation_bytes,
            "logits or a layer": m.peak_bytes,
            "passing weights": m.passing_bytes,
        }
        bars.append(Bar(name, [(p, b / GIB) for p, b in parts.items() if b]))
    memory = arguments.get("memory_gib", 80)
    return BarChart(
        f"Memory of one GPU, which has {memory:g} GiB", Axis("GiB"), bars
    )


MEMORY = {
    name: {"memory_gib": gpu.memory_gib}
    for name, gpu in GPUS.items()
    if gpu.memory_gib
}
"""The calculator's menu of GPUs."""
