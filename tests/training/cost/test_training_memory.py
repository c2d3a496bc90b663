import dataclasses
import math
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import (
    cross_entropy,
    gelu,
    scaled_dot_product_attention,
    silu,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from warpmap.hardware.gpus import GPUS
from warpmap.models.configs import MODELS, ModelConfig, config
from warpmap.models.foundations.parameter_count import count
from warpmap.training.cost.training_memory import (
    GIB,
    MEMORY,
    RECIPES,
    gpt_layer_bytes,
    layer_bytes,
    logits_bytes,
    states,
    training_memory,
    training_memory_chart,
)

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/training/cost/training_memory.md"
BF16 = torch.bfloat16


def saved_bytes(layer, x, small=0):
    """What autograd keeps of a layer: each storage once, no parameters.

    Storages of at most ``small`` bytes are left out: the formulas do not
    count numbers of which a token or a head has one.
    """
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    weights |= {b.untyped_storage().data_ptr() for b in layer.buffers()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so addresses stay
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    assert y.shape[-1] == x.shape[-1]
    sizes = [s.nbytes() for s in kept.values()]
    return sum(size for size in sizes if size > small)


# -- GPT-3's layer, of one rank of tensor parallelism --------------------------


class Gathered(torch.autograd.Function):
    """A matrix product on all tokens that keeps this rank's tokens only.

    Megatron's sequence parallelism gathers again in the backward pass. Other
    ranks' tokens are not here: copies of ours have their shape.
    """

    @staticmethod
    def forward(ctx, x, weight, ranks):
        ctx.save_for_backward(x, weight)
        return x.repeat(1, ranks, 1) @ weight.mT

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


class GPTLayer(nn.Module):
    """A rank's share of a layer: LayerNorm, GELU, dropout in three places."""

    def __init__(self, h, a, t, sequence_parallel, selective):
        super().__init__()
        self.a, self.D, self.t = a // t, h // a, t
        self.sp, self.selective = sequence_parallel, selective
        self.norm_1, self.norm_2 = nn.LayerNorm(h), nn.LayerNorm(h)
        self.qkv = nn.Linear(h, 3 * h // t)
        self.out = nn.Linear(h // t, h)
        self.up, self.down = nn.Linear(h, 4 * h // t), nn.Linear(4 * h // t, h)

    def enter(self, linear, x):
        if self.sp:
            return Gathered.apply(x, linear.weight, self.t) + linear.bias
        return linear(x)

    def leave(self, linear, x):
        """The product, and of its sum over ranks what this rank goes on."""
        y = linear(x)
        y = y[:, : y.shape[1] // self.t].contiguous() if self.sp else y
        return torch.native_dropout(y, 0.1, True)[0]

    def core(self, q, k, v):
        probs = (q @ k.mT / math.sqrt(self.D)).softmax(dim=-1)
        return torch.native_dropout(probs, 0.1, True)[0] @ v

    def forward(self, x):
        y = self.enter(self.qkv, self.norm_1(x))
        B, S, _ = y.shape
        q, k, v = (
            # each its own, so that one storage is not counted thrice
            part.reshape(B, S, self.a, self.D).transpose(1, 2).contiguous()
            for part in y.chunk(3, dim=-1)
        )
        if self.selective:
            y = checkpoint(self.core, q, k, v, use_reentrant=False)
        else:
            y = self.core(q, k, v)
        y = y.transpose(1, 2).reshape(B, S, -1)
        x = x + self.leave(self.out, y)
        y = gelu(self.enter(self.up, self.norm_2(x)))
        return x + self.leave(self.down, y)


@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize(
    ("t", "sp"), [(1, False), (2, False), (2, True), (4, True)]
)
def test_gpt_layer_agrees_with_saved_tensors(t, sp, selective):
    s, b, h, a = 64, 2, 128, 4
    layer = GPTLayer(h, a, t, sp, selective).to(BF16)
    x = torch.randn(b, s // t if sp else s, h, dtype=BF16, requires_grad=True)
    got = saved_bytes(layer, x, small=4 * s * b * a)
    recompute = "selective" if selective else "none"
    assert got == gpt_layer_bytes(s, b, h, a, t, sp, recompute)


def test_gpt_layer_s_table_of_the_paper():
    """Korthikanti et al., table 2, at s = 5, b = 3, h = 64, a = 8, t = 4."""
    s, b, h, a, t = 5, 3, 64, 8, 4
    sbh = s * b * h
    for arguments, per_sbh in {
        (1, False, "none"): 34 + 5 * a * s / h,
        (t, False, "none"): 10 + 24 / t + 5 * a * s / (h * t),
        (t, True, "none"): 34 / t + 5 * a * s / (h * t),
        (t, False, "selective"): 10 + 24 / t,
        (t, True, "selective"): 34 / t,
        (t, True, "full"): 2,
    }.items():
        assert gpt_layer_bytes(s, b, h, a, *arguments) == sbh * per_sbh


# -- today's layers ------------------------------------------------------------


class FusedRMSNorm(torch.autograd.Function):
    """Keeps its input and a number a token, as PyTorch's kernel on a GPU."""

    @staticmethod
    def forward(ctx, x, weight):
        scale = x.float().square().mean(dim=-1, keepdim=True).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x.float() * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        unit = x.float() * scale
        g = grad.float() * weight.float()
        inner = (g * unit).mean(dim=-1, keepdim=True)
        dx = (g - unit * inner) * scale
        dw = (grad.float() * unit).flatten(0, -2).sum(dim=0)
        return dx.to(x.dtype), dw.to(weight.dtype)


class RMSNorm(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))

    def forward(self, x):
        return FusedRMSNorm.apply(x, self.weight)


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


class Flash(torch.autograd.Function):
    """Keeps what a fused kernel keeps, for values of another size than keys.

    PyTorch's own kernel on a CPU wants them equal, FlashAttention 3 does not.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).contiguous()
        ctx.save_for_backward(q, k, v, y)
        return y

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


def attend(q, k, v, attention):
    # (B, T, H, D) to (B, H, T, D), and back at the end
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))
    if attention == "flash" and k.shape[-1] != v.shape[-1]:
        return Flash.apply(q, k, v).flatten(2)
    if attention == "flash":
        y = scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        return y.transpose(1, 2).flatten(2)
    # queries of a group one below the other: keys and values stay few
    B, Hkv, T, D = k.shape
    q = q.reshape(B, Hkv, -1, D)
    probs = (q @ k.mT / math.sqrt(D)).softmax(dim=-1)
    return (probs @ v).view(B, -1, T, D).transpose(1, 2).flatten(2)


class Grouped(nn.Module):
    def __init__(self, c, t):
        super().__init__()
        self.D = c.head_dim
        H, Hkv, C = c.heads // t, c.kv_heads // t, c.hidden_size
        self.q = nn.Linear(C, H * self.D, bias=False)
        self.k = nn.Linear(C, Hkv * self.D, bias=False)
        self.v = nn.Linear(C, Hkv * self.D, bias=False)
        self.out = nn.Linear(H * self.D, C, bias=False)
        angles = torch.outer(torch.arange(64), torch.ones(self.D))[:, None]
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x, attention):
        q, k, v = (f(x).unflatten(-1, (-1, self.D)) for f in self.qkv)
        q, k = (rotate(z, self.cos, self.sin) for z in (q, k))
        return self.out(attend(q, k, v, attention))

    @property
    def qkv(self):
        return self.q, self.k, self.v


class Latent(nn.Module):
    def __init__(self, c, t):
        super().__init__()
        assert t == 1
        self.H, C = c.heads, c.hidden_size
        self.nope, self.rope = c.qk_nope_head_dim, c.qk_rope_head_dim
        self.q_down = nn.Linear(C, c.q_lora_rank, bias=False)
        self.q_norm = RMSNorm(c.q_lora_rank)
        self.q_up = nn.Linear(
            c.q_lora_rank, self.H * (self.nope + self.rope), bias=False
        )
        self.kv_down = nn.Linear(C, c.kv_lora_rank, bias=False)
        self.kv_norm = RMSNorm(c.kv_lora_rank)
        self.key = nn.Linear(C, self.rope, bias=False)
        self.k_up = nn.Linear(c.kv_lora_rank, self.H * self.nope, bias=False)
        self.v_up = nn.Linear(c.kv_lora_rank, self.H * c.v_head_dim, bias=False)
        self.out = nn.Linear(self.H * c.v_head_dim, C, bias=False)

    def forward(self, x, attention):
        q = self.q_up(self.q_norm(self.q_down(x))).unflatten(-1, (self.H, -1))
        latent = self.kv_norm(self.kv_down(x))
        one = self.key(x)[:, :, None].expand(-1, -1, self.H, -1)
        k = self.k_up(latent).unflatten(-1, (self.H, -1))
        k = torch.cat([k, one], dim=-1)
        v = self.v_up(latent).unflatten(-1, (self.H, -1))
        return self.out(attend(q, k, v, attention))


class FFN(nn.Module):
    def __init__(self, C, width):
        super().__init__()
        self.gate = nn.Linear(C, width, bias=False)
        self.up = nn.Linear(C, width, bias=False)
        self.down = nn.Linear(width, C, bias=False)

    def forward(self, x):
        return self.down(silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """A mixture that sends tokens to experts in turn: an even load."""

    def __init__(self, c):
        super().__init__()
        C, W = c.hidden_size, c.moe_intermediate_size
        self.k = c.experts_per_token
        self.experts = nn.ModuleList(FFN(C, W) for _ in range(c.experts))
        self.shared = nn.ModuleList(FFN(C, W) for _ in range(c.shared_experts))
        self.router = nn.Linear(C, c.experts, bias=False)

    def forward(self, x):
        y = x.flatten(0, 1)
        scores = self.router(y).softmax(dim=-1)
        E, tokens = len(self.experts), torch.arange(len(y))
        out = torch.zeros_like(y)
        for ffn in self.shared:
            out = out + ffn(y)
        for e, ffn in enumerate(self.experts):
            mine = tokens[
                (tokens[:, None] * self.k % E + torch.arange(self.k) == e).any(
                    dim=1
                )
            ]
            here = ffn(y[mine]) * scores[mine, e, None]
            out = out.index_put((mine,), here, accumulate=True)
        return out.view_as(x)


class Layer(nn.Module):
    """A rank's share of a layer, with all tokens between its matrices."""

    def __init__(self, c, t=1, has_experts=False, attention="flash"):
        super().__init__()
        self.kind = attention
        C = c.hidden_size
        self.norm_1, self.norm_2 = RMSNorm(C), RMSNorm(C)
        self.attention = Latent(c, t) if c.kv_lora_rank else Grouped(c, t)
        if has_experts:
            self.ffn = Experts(c)
        else:
            self.ffn = FFN(C, c.intermediate_size // t)

    def forward(self, x):
        x = x + self.attention(self.norm_1(x), self.kind)
        return x + self.ffn(self.norm_2(x))


def shape(**features):
    known = {
        "name": "tiny",
        "source": ("", ""),
        "vocab_size": 512,
        "max_context": 64,
        "layers": 3,
        "hidden_size": 128,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 48,
        "intermediate_size": 176,
    }
    return ModelConfig(**(known | features))


EXPERTS = {
    "experts": 8,
    "experts_per_token": 2,
    "moe_intermediate_size": 80,
    "shared_experts": 1,
}
MLA = {
    "head_dim": 0,
    "kv_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 40,
}
S, B = 64, 2


def tokens(C, dtype=BF16):
    return torch.randn(B, S, C, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("attention", ["flash", "stored"])
@pytest.mark.parametrize("t", [1, 2])
def test_layer_agrees_with_saved_tensors(t, attention):
    c = shape()
    layer = Layer(c, t, attention=attention).to(BF16)
    got = saved_bytes(layer, tokens(128), small=4 * S * B * c.heads)
    assert got == layer_bytes(
        c, S, B, tensor=t, sequence_parallel=False, attention=attention
    )


def test_latent_attention_agrees_with_saved_tensors():
    c = shape(**MLA)
    got = saved_bytes(Layer(c).to(BF16), tokens(128), small=4 * S * B * 4)
    assert got == layer_bytes(c, S, B)


def test_experts_agree_with_saved_tensors():
    c = shape(**EXPERTS)
    layer = Layer(c, has_experts=True).to(BF16)
    # scores of experts and lists of tokens: 8 bytes a choice, 2 a score
    small = 8 * S * B * 2
    assert saved_bytes(layer, tokens(128), small) == layer_bytes(
        c, S, B, has_experts=True
    )


def test_recomputing_a_layer_keeps_its_input():
    c = shape()
    layer = Layer(c).to(BF16)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return checkpoint(self.layer, x, use_reentrant=False)

    got = saved_bytes(Checkpointed(), tokens(128))
    assert got == layer_bytes(c, S, B, recompute="full") == 2 * S * B * 128


def test_sequence_parallelism_splits_what_is_left():
    c = shape()
    whole = layer_bytes(c, S, B)
    assert layer_bytes(c, S, B, tensor=2) == whole / 2
    assert layer_bytes(c, S, B, tensor=2, sequence_parallel=False) > whole / 2


def test_ordinary_norms_save_more_than_a_fused_one():
    """Why the page says which norm: on a CPU PyTorch's own is not fused."""
    x = tokens(128)
    fused = saved_bytes(RMSNorm(128).to(BF16), x, small=4 * S * B)
    assert fused == 2 * S * B * 128
    assert saved_bytes(nn.RMSNorm(128).to(BF16), x, small=4 * S * B) > 2 * fused


# -- a whole step --------------------------------------------------------------


class Peak(TorchDispatchMode):
    """Counts bytes of all tensors alive, and the most there ever were.

    Args:
        known: Tensors that are not counted, for example parameters.
    """

    def __init__(self, known=()):
        super().__init__()
        self.now = self.most = 0
        self.seen = {t.untyped_storage()._cdata for t in known}

    def free(self, address, size):
        self.now -= size
        self.seen.discard(address)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                address = storage._cdata
                if address not in self.seen:
                    self.seen.add(address)
                    size = storage.nbytes()
                    self.now += size
                    weakref.finalize(storage, self.free, address, size)
        self.most = max(self.most, self.now)
        return result


class Decoder(nn.Module):
    def __init__(self, c, recompute):
        super().__init__()
        self.embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.hidden_size)
        self.head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.recompute = recompute

    def forward(self, ids, targets):
        x = self.embedding(ids)
        for layer in self.layers:
            if self.recompute:
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        logits = self.head(self.norm(x)).float()
        return cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_step_reaches_the_predicted_peak(recompute):
    c = shape(vocab_size=4096)
    model = Decoder(c, recompute == "full").to(BF16)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # as in the second micro-batch
    ids = torch.randint(c.vocab_size, (B, S))
    states = [t for p in model.parameters() for t in (p, p.grad)]
    with Peak(states) as peak:
        model(ids, ids).backward()
    layers = c.layers * layer_bytes(c, S, B, recompute=recompute)
    predicted = layers + logits_bytes(c.vocab_size, S * B)
    # input and output of the last norm, statistics, ids
    assert predicted < peak.most < 1.05 * predicted


def test_peak_counts_what_is_alive():
    with Peak() as peak:
        a = torch.zeros(100)
        b = a + 1
        del a
        c = b + 1
        del b, c
        torch.zeros(50)
    assert peak.most == 800


# -- states --------------------------------------------------------------------


def step_by_hand(recipe, n=1000):
    """Allocate what a recipe needs for one weight of n, and take a step.

    Returns:
        Bytes that are alive after it, by use.
    """
    dtype = {2: torch.float16 if "fp16" in recipe else BF16, 4: torch.float32}
    want = RECIPES[recipe]
    weight = torch.zeros(n, dtype=dtype[want.weights], requires_grad=True)
    alive = {"weights": [weight], "copy": [], "master": [], "moments": []}
    if want.cast:
        with torch.autocast("cpu", BF16):
            (weight * 1.0).sum().backward()
    else:
        (weight * 2).sum().backward()
    gradient = weight.grad.to(dtype[want.gradients])
    alive["gradients"] = [gradient]
    used = gradient
    if want.copy:
        used = gradient.float()
        alive["copy"] = [used]
    target = weight.detach()
    if want.master:
        target = weight.detach().float()
        alive["master"] = [target]
    kind = {8: torch.float32, 4: BF16, 2: torch.uint8}[want.moments]
    moments = [torch.zeros(n, dtype=kind) for _ in range(2)]
    alive["moments"] = moments
    if kind != torch.uint8:
        torch._fused_adamw_(
            [target],
            [used.to(target.dtype)],
            [moments[0].to(target.dtype)],
            [moments[1].to(target.dtype)],
            [],
            [torch.ones(())],
            lr=0.1,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
        assert (target < 0).all()
    return {k: sum(t.nbytes for t in v) / n for k, v in alive.items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_is_what_its_tensors_take(recipe):
    want = RECIPES[recipe]
    got = step_by_hand(recipe)
    assert got == {
        "weights": want.weights,
        "gradients": want.gradients,
        "copy": want.copy,
        "master": want.master,
        "moments": want.moments,
    }
    assert sum(got.values()) == want.total


def test_sums_that_have_names():
    totals = {name: recipe.total for name, recipe in RECIPES.items()}
    assert totals == {
        "fp16, gradient copied": 20,
        "bf16, fp32 gradient": 18,
        "bf16 as ZeRO counts": 16,
        "fp32 under autocast": 16,
        "bf16, 8-bit moments": 10,
        "pure bf16": 8,
    }
    twenty, sixteen = (
        RECIPES["fp16, gradient copied"],
        RECIPES["bf16 as ZeRO counts"],
    )
    assert dataclasses.replace(twenty, copy=0) == sixteen


def test_adam_of_torch_keeps_two_moments():
    for dtype, recipe in (
        (torch.float32, "fp32 under autocast"),
        (BF16, "pure bf16"),
    ):
        w = nn.Parameter(torch.zeros(1000, dtype=dtype))
        w.grad = torch.ones_like(w)
        adam = torch.optim.AdamW([w])
        adam.step()
        kept = sum(
            t.nbytes for t in adam.state[w].values() if t.numel() == 1000
        )
        assert kept == 1000 * RECIPES[recipe].optimizer


def test_autocast_keeps_a_cast_copy_of_each_matrix():
    linear = nn.Linear(64, 32, bias=False)
    own = linear.weight.untyped_storage().data_ptr()
    kept = Counter()

    def pack(t):
        if t.shape == linear.weight.shape or t.mT.shape == linear.weight.shape:
            kept[t.untyped_storage().data_ptr() == own] += t.nbytes
        return t

    x = torch.randn(8, 64, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", BF16),
    ):
        linear(x)
    assert kept == {False: RECIPES["fp32 under autocast"].cast * 64 * 32}


def test_zero_agrees_with_its_paper():
    """Rajbhandari et al., figure 1: 7.5 billion on 64 ranks, in GB."""
    got = [
        round(states(7.5, "bf16 as ZeRO counts", s, 64).total, 1)
        for s in range(4)
    ]
    assert got == [120.0, 31.4, 16.6, 1.9]


@pytest.mark.parametrize(
    ("recipe", "left", "shared"),
    [
        ("fp16, gradient copied", 4, 16),
        ("bf16, fp32 gradient", 6, 12),
        ("fp32 under autocast", 8, 8),
    ],
)
def test_first_stage_agrees_with_megatron(recipe, left, shared):
    """Megatron Core, documentation of its distributed optimizer."""
    for ranks in (1, 3, 8):
        got = states(1, recipe, 1, ranks).total
        assert got == pytest.approx(left + shared / ranks)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_shards_of_all_ranks_make_the_whole(stage):
    """Cut a flat buffer for each rank, as ZeRO does, and count the bytes."""
    n, ranks = 1200, 8
    recipe = RECIPES["bf16 as ZeRO counts"]
    rank = states(n, "bf16 as ZeRO counts", stage, ranks)
    for at, (part, bytes_) in enumerate(
        [
            ("optimizer", recipe.optimizer),
            ("gradients", recipe.gradients),
            ("weights", recipe.weights),
        ],
        start=1,
    ):
        buffer = torch.zeros(n * bytes_, dtype=torch.uint8)
        mine = buffer.chunk(ranks)[0] if stage >= at else buffer
        assert getattr(rank, part) == len(mine)


# -- the calculator ------------------------------------------------------------


def test_layers_without_experts_are_counted_apart():
    c = config("DeepSeek-V3")
    got = training_memory("DeepSeek-V3", sequence=4096, loss="fused")
    dense = layer_bytes(c, 4096)
    mixture = layer_bytes(c, 4096, has_experts=True)
    assert got.activation_bytes == 3 * dense + 58 * mixture
    assert mixture != dense


@pytest.mark.parametrize("name", MODELS)
def test_one_rank_holds_every_parameter(name):
    got = training_memory(name, zero_stage=0, data=1, sequence=512)
    assert got.parameters == count(config(name)).total
    assert got.weight_bytes == 2 * got.parameters
    assert got.shared_bytes == got.recipe_bytes


def test_all_tensor_ranks_hold_matrices_once_and_norms_each():
    n = count(config("Llama 3 8B"))
    got = training_memory(tensor=8, zero_stage=0, data=1)
    assert 8 * got.weight_bytes == 2 * (n.total + 7 * n.norms)


def test_most_sequences_is_the_last_that_fits():
    for arguments in (
        {"memory_gib": 140.4},
        {"memory_gib": 180, "recompute": "full"},
        {"tensor": 8, "zero_stage": 3, "sequence": 2048},
    ):
        most = training_memory(**arguments).most_sequences
        assert most >= 1
        assert training_memory(**arguments, micro_batch=most).fits
        assert not training_memory(**arguments, micro_batch=most + 1).fits


def test_stages_never_need_more():
    totals = [training_memory(zero_stage=s).total_gib for s in (0, 1, 2)]
    assert totals == sorted(totals, reverse=True)
    third = training_memory(zero_stage=3)
    assert third.weight_bytes < training_memory(zero_stage=2).weight_bytes
    assert third.passing_bytes > 0


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_chart_adds_up(recompute):
    arguments = {"recompute": recompute, "zero_stage": 2, "tensor": 2}
    bars = {b.name: b for b in training_memory_chart(**arguments).bars}
    total = training_memory(**arguments).total_gib
    assert sum(x for _, x in bars["here"].parts) == pytest.approx(total)
    zero = training_memory(**{**arguments, "zero_stage": 0}).total_gib
    assert sum(x for _, x in bars["ZeRO 0"].parts) == pytest.approx(zero)
    assert ("recompute full" in bars) == (recompute != "full")


def test_memory_menu_is_the_table_of_gpus():
    assert set(MEMORY) <= set(GPUS)
    assert MEMORY["A100 80GB SXM"] == {"memory_gib": 80}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"model": "Llama 9"}, "model must be a published one, got 'Llama 9'"),
        ({"recipe": "magic"}, "recipe must be"),
        ({"zero_stage": 4}, "zero_stage must be 0 to 3, got 4"),
        ({"data": 0}, "data must be at least 1, got 0"),
        ({"tensor": 3}, "tensor must divide 8 key-value heads, got 3"),
        ({"tensor": 8, "sequence": 12}, "sequence must be a multiple of 8"),
        ({"sequence": 0}, "sequence must be at least 1"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
        ({"reserve_gib": 80}, "reserve_gib must be from 0 to below 80"),
    ],
)
def test_bad_numbers_are_named(wrong, says):
    with pytest.raises(ValueError, match=says):
        training_memory(**wrong)


# mistakes seen in such calculators; saved tensors must refuse each of them
FAULTS = {
    "an FFN without its activated gate": -2 * S * B * 176,
    "keys and values for every head": 2 * S * B * 2 * 2 * 48,
    "no input of the second norm": -2 * S * B * 128,
    "dropout that is not there": S * B * 128,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_saved_tensors_refuse(fault):
    c = shape()
    got = saved_bytes(Layer(c).to(BF16), tokens(128), small=4 * S * B * 4)
    assert got != layer_bytes(c, S, B) + FAULTS[fault]


def test_runs_without_torch_and_numpy():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from warpmap.training.cost.training_memory import *\n"
        "print(training_memory().recipe_bytes)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "src",
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "16"


def test_page_numbers_agree():
    page = PAGE.read_text("utf-8")
    for number in (
        f"{training_memory(data=1, zero_stage=0).weight_bytes / GIB:.1f}",
        f"{layer_bytes(config('Llama 3 8B'), 1):,.0f}",
    ):
        assert number in page
