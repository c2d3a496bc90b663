"""Memory of real steps of a decoder of 10^9 weights, beside the prediction.

Rows of kind "states" hold what a recipe keeps between steps, rows of kind
"step" the most that a forward and a backward pass take with gradients of a
first micro-batch in place.
"""

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    cross_entropy,
    scaled_dot_product_attention,
    silu,
)
from torch.utils.checkpoint import checkpoint

from warpmap.models.configs import ModelConfig
from warpmap.models.foundations.parameter_count import count
from warpmap.training.cost.training_memory import (
    GIB,
    RECIPES,
    layer_bytes,
    logits_bytes,
    states,
)

SHAPE = ModelConfig(
    name="1B",
    source=("", ""),
    layers=18,
    hidden_size=2048,
    heads=16,
    kv_heads=8,
    head_dim=128,
    intermediate_size=5632,
    vocab_size=32000,
    max_context=2048,
)
SEQUENCE, BATCH = 2048, 4
BLOCK = 256  # values that share a scale, in 8-bit moments
LOSS_SCALE = 1024.0  # keeps gradients of fp16 from rounding to zero


# -- the model -----------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position of ``(B, T, H, D)``."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + turned * sin


class Attention(nn.Module):
    """Grouped-query attention; ``kind`` is flash, stored or selective."""

    def __init__(self, c: ModelConfig, kind: str) -> None:
        """Matrices of a shape."""
        super().__init__()
        C, D = c.hidden_size, c.head_dim
        self.D, self.kind = D, kind
        self.q = nn.Linear(C, c.heads * D, bias=False)
        self.k = nn.Linear(C, c.kv_heads * D, bias=False)
        self.v = nn.Linear(C, c.kv_heads * D, bias=False)
        self.out = nn.Linear(c.heads * D, C, bias=False)

    def core(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """With all its matrices; queries of a group one below the other."""
        B, Hkv, T, D = k.shape
        q = q.reshape(B, Hkv, -1, D)
        scores = (q @ k.mT).mul_(D**-0.5).add_(mask)
        return (scores.softmax(dim=-1) @ v).view(B, -1, T, D)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor
    ) -> Tensor:
        """Attend: ``(B, T, C)``."""
        q, k, v = (
            f(x).unflatten(-1, (-1, self.D)) for f in (self.q, self.k, self.v)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        if self.kind == "flash":
            y = scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )
        elif self.kind == "selective":
            y = checkpoint(self.core, q, k, v, mask, use_reentrant=False)
        else:
            y = self.core(q, k, v, mask)
        return self.out(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and a gated FFN, each after a norm."""

    def __init__(self, c: ModelConfig, kind: str) -> None:
        """Matrices of a shape."""
        super().__init__()
        C, F = c.hidden_size, c.intermediate_size
        self.norm_1, self.norm_2 = nn.RMSNorm(C), nn.RMSNorm(C)
        self.attention = Attention(c, kind)
        self.gate = nn.Linear(C, F, bias=False)
        self.up = nn.Linear(C, F, bias=False)
        self.down = nn.Linear(F, C, bias=False)

    def forward(self, x: Tensor, *tables: Tensor) -> Tensor:
        """``(B, T, C)`` to the same."""
        x = x + self.attention(self.norm_1(x), *tables)
        y = self.norm_2(x)
        return x + self.down(silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """The whole model, and its loss."""

    def __init__(self, c: ModelConfig, kind: str, recompute: str) -> None:
        """Build it where ``torch.device`` says."""
        super().__init__()
        kind = "selective" if recompute == "selective" else kind
        self.c, self.full = c, recompute == "full"
        self.embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, kind) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.hidden_size)
        self.head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def tables(self, T: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Cosines and sines ``(T, 1, D)``, and the mask of a group."""
        D = self.c.head_dim
        device = self.head.weight.device
        rates = 10000 ** (-torch.arange(0, D, 2, device=device) / D)
        angles = torch.outer(torch.arange(T, device=device), rates)
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        mask = torch.full((T, T), -math.inf, device=device).triu(1)
        group = self.c.heads // self.c.kv_heads
        return (
            angles.cos().to(dtype),
            angles.sin().to(dtype),
            mask.repeat(group, 1).to(dtype),
        )

    def forward(self, ids: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        """Mean loss of predicting each next token."""
        x = self.embedding(ids)
        for layer in self.layers:
            if self.full:
                x = checkpoint(layer, x, *tables, use_reentrant=False)
            else:
                x = layer(x, *tables)
        logits = self.head(self.norm(x)).float()
        targets = ids.roll(-1, dims=1)
        return cross_entropy(logits.flatten(0, 1), targets.flatten())


# -- the optimizer -------------------------------------------------------------


class Moment:
    """A running average of a gradient, in 4, 2 or 1 byte a value."""

    def __init__(self, like: Tensor, width: int) -> None:
        """Zeros."""
        self.shape, self.width = like.shape, width
        if width == 1:
            blocks = -(-like.numel() // BLOCK)
            self.kept = torch.zeros(
                blocks, BLOCK, dtype=torch.int8, device=like.device
            )
            self.scale = torch.zeros(blocks, 1, device=like.device)
        else:
            dtype = torch.float32 if width == 4 else torch.bfloat16
            self.kept = torch.zeros_like(like, dtype=dtype)

    def update(self, new: Tensor, decay: float) -> Tensor:
        """Average one more in; returns it in fp32."""
        if self.width == 1:
            old = (self.kept * self.scale).flatten()
            mean = old[: new.numel()].view(self.shape).lerp(new, 1 - decay)
            padded = nn.functional.pad(
                mean.flatten(), (0, self.kept.numel() - new.numel())
            ).view_as(self.kept)
            self.scale.copy_(padded.abs().amax(dim=1, keepdim=True) / 127)
            self.kept.copy_((padded / self.scale.clamp(min=1e-30)).round())
        else:
            mean = self.kept.float().lerp(new, 1 - decay)
            self.kept.copy_(mean)
        return mean


class Adam:
    """Adam that keeps exactly what a recipe says."""

    def __init__(self, model: nn.Module, name: str) -> None:
        """Allocate the states of a recipe beside the model's own weights."""
        self.recipe = recipe = RECIPES[name]
        self.scale = LOSS_SCALE if "fp16" in name else 1.0
        self.weights = list(model.parameters())
        self.steps = 0
        self.gradients = []
        for w in self.weights:
            if recipe.gradients > recipe.weights:  # fp32, filled by a hook
                total = torch.zeros_like(w, dtype=torch.float32)
                w.register_post_accumulate_grad_hook(self._into(total))
            else:
                total = w.grad = torch.zeros_like(w)
            self.gradients.append(total)
        floats = {"dtype": torch.float32}
        each = recipe.moments // 2
        self.copies = [
            torch.zeros_like(w, **floats) for w in self.weights if recipe.copy
        ]
        self.masters = [
            w.detach().to(**floats) for w in self.weights if recipe.master
        ]
        self.moments = [
            (Moment(w, each), Moment(w, each)) for w in self.weights
        ]

    @staticmethod
    def _into(total: Tensor) -> Callable[[Tensor], None]:
        def move(w: Tensor) -> None:
            total.add_(w.grad)
            w.grad = None

        return move

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update all weights and clear their gradients."""
        self.steps += 1
        rate *= (1 - 0.99**self.steps) / (1 - 0.9**self.steps)
        for at, (w, gradient) in enumerate(
            zip(self.weights, self.gradients, strict=True)
        ):
            if self.copies:
                self.copies[at].copy_(gradient)
            g = (self.copies[at] if self.copies else gradient).float()
            g = g / self.scale
            first, second = self.moments[at]
            mean = first.update(g, 0.9)
            # of the root, which 8 bits hold better than the square
            root = second.update(g.abs(), 0.99)
            target = self.masters[at] if self.masters else w
            target.sub_((rate * mean / (root + 1e-8)).to(target.dtype))
            if self.masters:
                w.copy_(target)
            gradient.zero_()


# -- measuring -----------------------------------------------------------------


def predict_step(name: str, kind: str, recompute: str) -> float:
    """Bytes at the highest point, as the page's functions count them."""
    c, tokens = SHAPE, SEQUENCE * BATCH
    kept = states(count(c).total, name).total

    def layer(how: str) -> float:
        return layer_bytes(c, SEQUENCE, BATCH, recompute=how, attention=kind)

    peak = logits_bytes(c.vocab_size, tokens)
    if recompute != "none":
        peak = max(peak, layer("none"))
    return kept + c.layers * layer(recompute) + peak


def measure(
    name: str, kind: str = "flash", recompute: str = "none"
) -> Iterator[dict]:
    """Rows of one recipe: its states, and a step where it is predicted."""
    recipe = RECIPES[name]
    torch.manual_seed(0)
    # the libraries' own buffers first, so that they are not counted
    warm = torch.ones(256, 256, device="cuda", dtype=torch.bfloat16)
    (warm @ warm).sum().item()
    torch.cuda.synchronize()
    del warm
    gc.collect()
    base = torch.cuda.memory_allocated()

    dtype = torch.float32
    if recipe.weights == 2:
        dtype = torch.float16 if "fp16" in name else torch.bfloat16
    with torch.device("cuda"):
        model = Decoder(SHAPE, kind, recompute).to(dtype)
    parameters = sum(p.numel() for p in model.parameters())
    if parameters != count(SHAPE).total:
        raise RuntimeError(f"built {parameters} parameters")
    adam = Adam(model, name)
    ids = torch.randint(SHAPE.vocab_size, (BATCH, SEQUENCE), device="cuda")
    low = torch.bfloat16 if recipe.cast else dtype
    tables = model.tables(SEQUENCE, low)
    extra = sum(t.nbytes for t in (ids, *tables))

    losses, most = [], 0
    for _ in range(2):  # the first allocates what is only allocated once
        torch.cuda.reset_peak_memory_stats()
        autocast = torch.autocast("cuda", low) if recipe.cast else nullcontext()
        with autocast:
            loss = model(ids, tables)
        (loss * adam.scale).backward()
        most = torch.cuda.max_memory_allocated() - base - extra
        losses.append(loss.item())
        del loss
        adam.step(1e-4)
    if not losses[1] < losses[0]:
        raise RuntimeError(f"{name}: loss went from {losses[0]} to {losses[1]}")
    rest = torch.cuda.memory_allocated() - base - extra

    def row(of: str, predicted: float, measured: float) -> dict:
        return {
            "kind": of,
            "recipe": name,
            "attention": kind,
            "recompute": recompute,
            "bytes_per_parameter": recipe.total,
            "predicted_gib": round(predicted / GIB, 3),
            "measured_gib": round(measured / GIB, 3),
            "error_percent": round(100 * (predicted / measured - 1), 2),
        }

    if kind == "flash" and recompute == "none":
        yield row("states", states(parameters, name).total, rest)
    # under autocast what lies between layers stays in fp32
    if not recipe.cast:
        yield row("step", predict_step(name, kind, recompute), most)


def rows() -> list[dict]:
    """States of each recipe, and steps with and without recomputation.

    Returns:
        Rows with predicted and measured GiB and the error of the prediction.

    Raises:
        RuntimeError: If there is no GPU, too little memory, or no training.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("this benchmark needs one NVIDIA GPU")
    free, _ = torch.cuda.mem_get_info()
    if free < 60 * GIB:
        raise RuntimeError(f"needs 60 GiB of memory, {free / GIB:.0f} are free")
    cases = [(name,) for name in RECIPES]
    cases += [
        (name, "flash", "full") for name in ("bf16 as ZeRO counts", "pure bf16")
    ]
    cases += [
        ("bf16 as ZeRO counts", "stored", how)
        for how in ("none", "selective", "full")
    ]
    result = []
    for case in cases:
        result += measure(*case)
        torch.cuda.empty_cache()
    return sorted(result, key=lambda row: row["kind"])
