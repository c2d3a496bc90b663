"""A decoder in the files of a Hugging Face Llama.

They are ``config.json`` and ``model.safetensors``. The weights are ours
by other names; nothing is reordered, since RoPE pairs halves here and there.
What our ``Decoder`` does not compute is refused: a model that loads and is a
little wrong is worse than none.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from warpmap.models.foundations.decoder_only import Decoder, DecoderConfig

FIELDS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "hidden": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
"""Our name of a field, and theirs; the base of RoPE has a place of its own."""

TYPES = {"norm_eps": "float", "tied": "bool"}
"""Types of the fields that are not ``int``."""

BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
"""Our name of a part of a block, and theirs."""


def _names(config: DecoderConfig) -> dict[str, str]:
    """Their name of every tensor, by ours; a tied head is not stored."""
    names = {"embedding": "model.embed_tokens", "norm": "model.norm"}
    for layer in range(config.layers):
        for ours, theirs in BLOCK.items():
            names[f"blocks.{layer}.{ours}"] = f"model.layers.{layer}.{theirs}"
    if not config.tied:
        names["head"] = "lm_head"
    return {f"{o}.weight": f"{t}.weight" for o, t in names.items()}


def _config(given: dict[str, Any]) -> DecoderConfig:
    """Our shape from their ``config.json``."""
    # what they assume where the file says nothing
    values: dict[str, Any] = {
        "num_key_value_heads": given.get("num_attention_heads"),
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **{key: value for key, value in given.items() if value is not None},
    }
    missing = [key for key in FIELDS.values() if values.get(key) is None]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    fields = {ours: values[theirs] for ours, theirs in FIELDS.items()}
    for ours, value in fields.items():
        wanted = TYPES.get(ours, "int")
        if type(value).__name__ != wanted:
            raise ValueError(f"{FIELDS[ours]} must be {wanted}, got {value!r}")

    # since version 5 one entry holds what were three
    rope = given.get("rope_parameters") or {
        **(given.get("rope_scaling") or {}),
        "rope_theta": given.get("rope_theta") or 10000.0,
    }
    scaling = rope.get("rope_type", rope.get("type", "default"))
    base = rope.get("rope_theta") or given.get("rope_theta") or 10000.0
    config = DecoderConfig(**fields, rope_base=float(base))

    head_size = config.width // config.heads
    part = given.get("partial_rotary_factor") or 1.0
    computed = {
        "model_type": (given.get("model_type"), "llama"),
        "hidden_act": (given.get("hidden_act", "silu"), "silu"),
        "attention_bias": (given.get("attention_bias") or False, False),
        "mlp_bias": (given.get("mlp_bias") or False, False),
        "head_dim": (given.get("head_dim") or head_size, head_size),
        "rope_type": (scaling, "default"),
        "partial_rotary_factor": (
            rope.get("partial_rotary_factor", part),
            1.0,
        ),
    }
    for key, (got, only) in computed.items():
        if got != only:
            raise ValueError(
                f"{key} {got!r} is not computed here, only {only!r}"
            )
    return config


def load_llama(folder: Path) -> Decoder:
    """Read a Llama that ``transformers`` or ``save_llama`` wrote.

    Args:
        folder: Holds ``config.json`` and ``model.safetensors``.

    Returns:
        The model, on the CPU, in the dtype of the file.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the files do not describe a model that ``Decoder``
            computes exactly, or do not fit each other.

    Examples:
        >>> import tempfile
        >>> model = Decoder(DecoderConfig(100, 16, 2, 4, 2, 32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_llama(model, Path(folder))
        ...     load_llama(Path(folder)).config == model.config
        True
    """
    text = (folder / "config.json").read_text(encoding="utf-8")
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"config.json is no JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"config.json must hold an object, got {text[:40]!r}")
    config = _config(given)
    if (folder / "model.safetensors.index.json").exists():
        raise ValueError(
            "expected one model.safetensors, got weights in several files"
        )
    try:
        stored = load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise ValueError(f"model.safetensors is broken: {error}") from error

    with torch.device("meta"):  # shapes alone, no memory
        model = Decoder(config)
    names, shapes = _names(config), model.state_dict()
    _compare(stored, {names[our]: shapes[our] for our in names})
    weights = {our: stored[their] for our, their in names.items()}
    model.load_state_dict(weights, strict=False, assign=True)
    if config.tied:
        model.head.weight = model.embedding.weight
    return model


def _compare(stored: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Refuse tensors that are missing, too many, or unlike the config."""
    for what, keys in (
        ("lacks", wanted.keys() - stored.keys()),
        ("has no use for", stored.keys() - wanted.keys()),
    ):
        if keys:
            some = ", ".join(sorted(keys)[:3])
            raise ValueError(f"the model {what} {len(keys)} tensors: {some}")
    for key, want in wanted.items():
        if stored[key].shape != want.shape:
            raise ValueError(
                f"{key} must be {tuple(want.shape)} by config.json, "
                f"got {tuple(stored[key].shape)}"
            )
    dtypes = {weight.dtype for weight in stored.values()}
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        found = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"expected floats of one dtype, got {found}")


def save_llama(
    model: Decoder,
    folder: Path,
    *,
    context: int = 2048,
    end_of_text: int | None = None,
) -> None:
    """Write a model that ``transformers`` loads as ``LlamaForCausalLM``.

    Args:
        model: What to write, in its dtype.
        folder: Where to; made if it is not there.
        context: Tokens that it was trained to read. We set no limit; servers
            take theirs from here.
        end_of_text: The token after which generation stops, if there is one.

    Examples:
        >>> import tempfile
        >>> model = Decoder(DecoderConfig(100, 16, 2, 4, 2, 32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_llama(model, Path(folder))
        ...     sorted(file.name for file in Path(folder).iterdir())
        ['config.json', 'model.safetensors']
    """
    config, ours = model.config, model.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    written = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "eos_token_id": end_of_text,
        "head_dim": config.width // config.heads,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "mlp_bias": False,
        "model_type": "llama",
        "rope_parameters": {
            "rope_theta": config.rope_base,
            "rope_type": "default",
        },
        "rope_theta": config.rope_base,  # for readers before version 5
        **{theirs: getattr(config, our) for our, theirs in FIELDS.items()},
    }
    weights = {
        theirs: ours[our].contiguous() for our, theirs in _names(config).items()
    }
    # its readers ask for the framework that wrote it
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    text = json.dumps(written, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
