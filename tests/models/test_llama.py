"""A decoder in the files of a Llama, beside the library that made them."""

import copy
import dataclasses
import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import rms_norm

from warpmap.models.foundations._llama import load_llama, save_llama
from warpmap.models.foundations.decoder_only import Decoder, DecoderConfig
from warpmap.models.positions.rope import rope_table, to_interleaved

SHAPE = DecoderConfig(50, 16, 2, 4, 2, 24, rope_base=500.0, norm_eps=1e-5)
# sums of at most 24 terms in 20 products one after another, whose sizes the
# norms keep near 1: some 500 roundings of 1e-16, and room for their growth
ROUNDING = 1e-12


def lively(config=SHAPE):
    """A model whose parts all matter: weights large, norms not 1."""
    model = Decoder(config).double().requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.uniform_(0.5, 2)
        else:
            weight.normal_(std=0.3)
    return model


def some_tokens():
    return torch.randint(SHAPE.vocab_size, (2, 11))


@pytest.fixture(scope="module")
def transformers():
    from transformers.models.llama import configuration_llama, modeling_llama

    class Peer:
        model = modeling_llama.LlamaForCausalLM
        config = configuration_llama.LlamaConfig

    return Peer


def exact(model):
    """Their model in float64 throughout: theirs keeps some in float32."""

    class Rope(nn.Module):
        def forward(self, x, position_ids):
            cos, sin = rope_table(position_ids.double(), 4, 500.0)
            return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)

    model = copy.deepcopy(model).double().requires_grad_(False)
    model.model.rotary_emb = Rope()
    for norm in model.modules():
        if hasattr(norm, "variance_epsilon"):
            eps, weight = norm.variance_epsilon, norm.weight
            norm.forward = functools.partial(
                rms_norm, normalized_shape=(16,), weight=weight, eps=eps
            )
    return model


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def theirs(request, transformers, tmp_path_factory):
    """A checkpoint that transformers wrote, and the model that it holds."""
    torch.manual_seed(0)
    config = transformers.config(
        vocab_size=50, hidden_size=16, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        rms_norm_eps=1e-5, tie_word_embeddings=request.param,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        initializer_range=0.3,
    )  # fmt: skip
    model = transformers.model(config).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.uniform_(0.5, 2)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder, model


def test_loads_what_transformers_wrote(theirs):
    folder, peer = theirs
    model, tokens = load_llama(folder), some_tokens()
    assert model.config == dataclasses.replace(SHAPE, tied=model.config.tied)
    assert model.embedding.weight.dtype == torch.float32
    tied = model.head.weight is model.embedding.weight
    assert tied == model.config.tied

    ours32, peer32 = model(tokens), peer(tokens).logits
    ours64 = model.double()(tokens)
    peer64 = exact(peer)(tokens).logits
    scale = peer64.abs().max()
    assert (ours64 - peer64).abs().max() < ROUNDING * scale
    # as near to the truth as they are, twice over for luck
    error = (ours32 - ours64).abs().max()
    assert error < 2 * (peer32 - ours64).abs().max() < 1e-4 * scale


def swapped(block, one, other):
    """The weights of two parts, changed for each other."""
    a, b = block.get_parameter(one), block.get_parameter(other)
    a.data, b.data = b.data, a.data


FAULTS = {
    "gate and up swapped": lambda m: swapped(
        m.blocks[1], "feed_forward.gate.weight", "feed_forward.up.weight"
    ),
    "norms swapped": lambda m: swapped(
        m.blocks[0], "attention_norm.weight", "feed_forward_norm.weight"
    ),
    "neighbours are pairs": lambda m: [
        part.weight.data.copy_(to_interleaved(part.weight.data, 4))
        for part in (m.blocks[0].attention.q, m.blocks[0].attention.k)
    ],
    "key-value heads reversed": lambda m: m.blocks[0]
    .attention.k.weight.data.copy_(
        m.blocks[0].attention.k.weight.data.view(2, 4, 16).flip(0).flatten(0, 1)
    ),
    "another base": lambda m: setattr(
        m, "config", dataclasses.replace(m.config, rope_base=10000.0)
    ),
    "another eps": lambda m: setattr(m.norm, "eps", 1e-6),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_catches(fault, theirs):
    folder, peer = theirs
    model, tokens = load_llama(folder).double(), some_tokens()
    FAULTS[fault](model)
    want = exact(peer)(tokens).logits
    error = (model(tokens) - want).abs().max()
    assert error > 1000 * ROUNDING * want.abs().max()


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_what_we_save(tied, transformers, tmp_path):
    model = lively(dataclasses.replace(SHAPE, tied=tied))
    save_llama(model, tmp_path / "new", context=77, end_of_text=49)
    peer, told = transformers.model.from_pretrained(
        tmp_path / "new", output_loading_info=True
    )
    assert not any(told.values()), told
    assert peer.dtype == torch.float64
    assert peer.config.max_position_embeddings == 77
    assert peer.config.eos_token_id == 49
    tokens = some_tokens()
    got, want = exact(peer)(tokens).logits, model(tokens)
    assert (got - want).abs().max() < ROUNDING * want.abs().max()

    again = load_llama(tmp_path / "new")
    assert again.config == model.config
    assert torch.equal(again(tokens), want)


def edited(folder, tmp_path, config=None, drop=(), tensors=None):
    """A checkpoint like that in ``folder``, with something changed."""
    given = json.loads((folder / "config.json").read_text())
    stored = load_file(folder / "model.safetensors")
    stored = {**stored, **(tensors or {})}
    for key in drop:
        stored.pop(key)
    (tmp_path / "config.json").write_text(
        json.dumps({**given, **(config or {})})
    )
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def test_reads_the_names_of_older_versions(theirs, tmp_path):
    old = {"rope_parameters": None, "rope_theta": 500.0, "head_dim": None}
    model = load_llama(edited(theirs[0], tmp_path, config=old))
    assert model.config.rope_base == 500.0


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0}
NORM = "model.norm.weight"
REFUSED = {
    "attention_bias True": {"config": {"attention_bias": True}},
    "mlp_bias True": {"config": {"mlp_bias": True}},
    "hidden_act 'gelu'": {"config": {"hidden_act": "gelu"}},
    "head_dim 8": {"config": {"head_dim": 8}},
    "model_type 'qwen3'": {"config": {"model_type": "qwen3"}},
    "rope_type 'yarn'": {"config": {"rope_parameters": YARN}},
    "rope_type 'linear'": {
        "config": {
            "rope_parameters": None,
            "rope_scaling": {"type": "linear", "factor": 2.0},
        }
    },
    "partial_rotary_factor 0.5": {"config": {"partial_rotary_factor": 0.5}},
    "lacks hidden_size": {"config": {"hidden_size": None}},
    "hidden_size must be int, got '16'": {"config": {"hidden_size": "16"}},
    "width 16 must be a multiple": {"config": {"num_attention_heads": 5}},
    "lacks 1 tensors: model.norm.weight": {"drop": [NORM]},
    "lacks 9 tensors: model.layers.2": {"config": {"num_hidden_layers": 3}},
    "has no use for 9 tensors": {"config": {"num_hidden_layers": 1}},
    "has no use for 1 tensors: model.bias": {
        "tensors": {"model.bias": torch.zeros(1)}
    },
    r"norm.weight must be \(16,\) by config.json, got \(8,\)": {
        "tensors": {NORM: torch.ones(8)}
    },
    r"up_proj.weight must be \(23, 16\)|gate_proj.weight must be \(23, 16\)": {
        "config": {"intermediate_size": 23}
    },
    "floats of one dtype, got torch.float32, torch.float64": {
        "tensors": {NORM: torch.ones(16).double()}
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses(message, theirs, tmp_path):
    changed = REFUSED[message]
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        load_llama(edited(theirs[0], tmp_path, **changed))


def test_refuses_broken_files(theirs, tmp_path):
    folder = edited(theirs[0], tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"model.safetensors is broken"):
        load_llama(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="weights in several files"):
        load_llama(folder)
    (folder / "config.json").write_text("[")
    with pytest.raises(ValueError, match=r"config.json is no JSON"):
        load_llama(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold an object"):
        load_llama(folder)
