"""One small language model, trained in six ways from the same start.

A decoder over bytes reads the source of Python's standard library. All ways
see the same batches; they differ in the dtype of the weights, in whether fp32
masters carry what rounding takes, and in whether the loss is scaled. Besides:
how large gradients are, and how tensor cores round fp32 to TF32.
"""

import math
import statistics
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from warpmap import DEVICE
from warpmap.hardware.gpu.number_formats import TF32
from warpmap.training.precision.mixed_precision import (
    LossScaler,
    MasterWeights,
    round_to,
)

LOG = 20  # steps between two rows
WARMUP = 20


@dataclass(frozen=True)
class Size:
    """Of model and batch."""

    width: int = 512
    layers: int = 6
    heads: int = 8
    tokens: int = 256
    batch: int = 64
    steps: int = 400
    lr: float = 6e-4


@dataclass(frozen=True)
class Way:
    """How to train."""

    dtype: torch.dtype
    masters: bool = True
    scaled: bool = False
    matmul: str = "highest"  # "high" is TF32


WAYS = {
    "fp32": Way(torch.float32),
    "tf32": Way(torch.float32, matmul="high"),
    "bf16": Way(torch.bfloat16),
    "bf16_alone": Way(torch.bfloat16, masters=False),
    "fp16_scaled": Way(torch.float16, scaled=True),
    "fp16_unscaled": Way(torch.float16),
}


class Block(nn.Module):
    """Attention and a feed-forward network, each behind a norm."""

    def __init__(self, size: Size) -> None:
        """Create the projections."""
        super().__init__()
        C = size.width
        self.heads = size.heads
        self.norm, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, C)`` in and out."""
        B, T, C = x.shape
        qkv = self.qkv(self.norm(x)).view(B, T, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, size: Size) -> None:
        """Create the layers."""
        super().__init__()
        self.bytes = nn.Embedding(256, size.width)
        self.places = nn.Embedding(size.tokens, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, 256, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, T)`` to ``(B, T, 256)``, kept as ``self.hidden`` on the way."""
        x = self.bytes(tokens) + self.places.weight[: tokens.shape[1]]
        self.hidden = []
        for block in self.blocks:
            x = block(x)
            self.hidden.append(x)
        return self.head(self.norm(x))


def corpus() -> tuple[Tensor, Tensor]:
    """Bytes to train on and bytes held out."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


def batches(data: Tensor, size: Size, steps: int, seed: int) -> Tensor:
    """``(steps, B, T + 1)``, the same for every way."""
    generator = torch.Generator().manual_seed(seed)
    count = steps * size.batch
    start = torch.randint(
        len(data) - size.tokens, (count, 1), generator=generator
    )
    found = data[start + torch.arange(size.tokens + 1)]
    return found.view(steps, size.batch, -1).to(DEVICE)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy, in fp32, in nats a byte."""
    batch = batch.long()
    logits = model(batch[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def _fresh(size: Size) -> Model:
    torch.manual_seed(0)
    return Model(size).to(DEVICE)


def _wait() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def train(way: Way, size: Size, data: Tensor, held_out: Tensor) -> dict:
    """Losses on the way, and what became of it."""
    torch.set_float32_matmul_precision(way.matmul)
    model = _fresh(size)
    weights = MasterWeights(model, way.dtype)
    optimizer = torch.optim.AdamW(
        weights.masters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0
    )
    scaler = LossScaler(interval=100) if way.scaled else None
    losses, lost, blocks, skipped = [], [], [], 0
    total = torch.zeros((), device=DEVICE)
    begin = _wait()
    for step, batch in enumerate(data):
        lr = min(1.0, (step + 1) / WARMUP) * (1 - step / size.steps)
        optimizer.param_groups[0]["lr"] = size.lr * lr
        loss = loss_of(model, batch)
        (loss * scaler.scale if scaler else loss).backward()
        weights.collect()
        if scaler is None or scaler.unscale(weights.masters):
            logged = step % LOG == LOG - 1
            old = [p.detach().clone() for p in model.parameters()] * logged
            optimizer.step()
            weights.publish()
            if logged:
                lost.append(_lost(old, list(model.parameters()), weights))
            if not way.masters:
                torch._foreach_copy_(
                    [m.detach() for m in weights.masters],
                    [p.detach() for p in model.parameters()],
                )
        else:
            skipped += 1
        total += loss.detach()
        if step % LOG == LOG - 1:
            end = _wait()
            blocks.append(1e3 * (end - begin) / LOG)
            losses.append(total.item() / LOG)
            total.zero_()
            begin = _wait()
    with torch.no_grad():
        final = statistics.mean(loss_of(model, b).item() for b in held_out)
    torch.set_float32_matmul_precision("highest")
    return {
        "losses": losses,
        "lost": lost,
        "final": final,
        "step_ms": statistics.median(blocks[1:] or blocks),
        "skipped": skipped,
        "scale": scaler.scale if scaler else 1.0,
        "model": model,
    }


@torch.no_grad()
def _lost(
    old: list[Tensor], new: list[Tensor], weights: MasterWeights
) -> float:
    """Percent of the weights that a step left as they were."""
    count = sum(p.numel() for p in new)
    same = sum((a == b).sum().item() for a, b in zip(old, new, strict=True))
    return 100 * same / count


def _sizes_of(tensors: list[Tensor]) -> dict[int, float]:
    """Percent of the numbers above zero, by power of two."""
    counts = torch.zeros(200, dtype=torch.int64)
    total = 0
    for t in tensors:
        size = t.detach().float().abs().flatten()
        size = size[size > 0]
        exponent = torch.frexp(size).exponent - 1  # 2^exponent and above
        counts += torch.bincount(
            exponent.clamp(-150, 49).cpu().long() + 150, minlength=200
        )
        total += size.numel()
    return {
        i - 150: 100 * n / total for i, n in enumerate(counts.tolist()) if n
    }


def gradient_rows(model: Model, batch: Tensor) -> list[dict]:
    """Sizes of gradients, in fp32: of weights and of activations."""
    model = model.float()
    loss = loss_of(model, batch)
    params = list(model.parameters())
    wanted = params + model.hidden
    grads = torch.autograd.grad(loss, wanted)
    weights = _sizes_of(list(grads[: len(params)]))
    activations = _sizes_of(list(grads[len(params) :]))
    both = sorted(set(weights) | set(activations))
    found = [
        {
            "kind": "gradients",
            "exponent": e,
            "weights_percent": round(weights.get(e, 0.0), 4),
            "activations_percent": round(activations.get(e, 0.0), 4),
        }
        for e in range(max(both[0], -60), both[-1] + 1)
    ]
    for name, sizes in (("weights", weights), ("activations", activations)):
        found.append(
            {
                "kind": "range",
                "gradients_of": name,
                "zero_in_fp16_percent": round(
                    sum(p for e, p in sizes.items() if e < -25), 2
                ),
                "subnormal_in_fp16_percent": round(
                    sum(p for e, p in sizes.items() if -25 <= e < -14), 2
                ),
                "largest_power_of_two": max(sizes),
            }
        )
    return found


def tf32_rows() -> list[dict]:
    """How the units round fp32: x times one is x as they read it."""
    x = torch.randn(512, 512, device=DEVICE)
    # every 16th number lies halfway between two of TF32
    bits = x.view(torch.int32)
    bits[:, ::16] = (bits[:, ::16] & ~0x1FFF) | 0x1000
    torch.set_float32_matmul_precision("high")
    kept = x @ torch.eye(512, device=DEVICE)
    torch.set_float32_matmul_precision("highest")
    rules = {
        "nearest, ties to even": round_to(x, TF32),
        "nearest, ties away from zero": ((bits + 0x1000) & ~0x1FFF).view(
            torch.float32
        ),
        "toward zero": (bits & ~0x1FFF).view(torch.float32),
        "none": x,
    }
    return [
        {
            "kind": "tf32",
            "rounding": name,
            "agree_percent": round(
                100 * (kept == want).float().mean().item(), 2
            ),
        }
        for name, want in rules.items()
    ]


def rows(size: Size | None = None) -> list[dict]:
    """Train in all ways, then look at gradients and at TF32.

    Args:
        size: Of model and batch; by default what takes a minute on an H200.

    Returns:
        Rows of five kinds: ``loss`` by step, ``final`` by way, ``gradients``
        by power of two, ``range``, ``tf32``.

    Raises:
        RuntimeError: If fp32 learns nothing.
    """
    size = size or Size()
    text, rest = corpus()
    data = batches(text, size, size.steps, seed=1)
    held_out = batches(rest, size, 8, seed=2)
    train(WAYS["bf16"], size, data[: 2 * LOG], held_out[:1])  # warm-up
    done = {
        name: train(way, size, data, held_out) for name, way in WAYS.items()
    }
    if not done["fp32"]["final"] < math.log(256) - 1:
        raise RuntimeError(f"fp32 learned nothing: {done['fp32']['final']}")
    found = []
    for i in range(size.steps // LOG):
        row = {"kind": "loss", "step": LOG * (i + 1)}
        for name, got in done.items():
            row[f"{name}_loss"] = round(got["losses"][i], 4)
        for name in ("bf16", "bf16_alone"):
            row[f"{name}_unmoved_percent"] = round(done[name]["lost"][i], 2)
        found.append(row)
    for name, got in done.items():
        found.append(
            {
                "kind": "final",
                "way": name.replace("_", ", "),
                "held_out_loss": round(got["final"], 4),
                "step_ms": round(got["step_ms"], 2),
                "skipped_steps": got["skipped"],
                "scale": got["scale"],
            }
        )
    found += gradient_rows(done["fp32"]["model"], data[-1])
    return found + tf32_rows()
