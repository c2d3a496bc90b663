"""Loss by position, for texts four times as long as those of training.

A decoder over bytes learns the source of Python's standard library from pieces
of 256 bytes. Then it reads pieces of 1024 under each rule: as it is, and after
a short training at that length. A window that sees 256 bytes back, with no
rule, says what is lost by looking no further.
"""

import copy
import math
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from warpmap import DEVICE
from warpmap.models.positions.context_extension import (
    attention_factor,
    interpolated,
    inverse_frequencies,
    ntk_aware,
    yarn,
)
from warpmap.models.positions.rope import rotate

BASE = 10000.0
FACTOR = 4
BUCKETS = 32  # of positions, over the longer text
NAMES = {"window": "window of 256", "ntk_aware": "NTK-aware", "yarn": "YaRN"}
Table = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Size:
    """Of model, text and training."""

    width: int = 384
    layers: int = 6
    heads: int = 6
    tokens: int = 256  # in training
    batch: int = 64
    steps: int = 1500
    tuning_steps: int = 100
    tuning_batch: int = 16
    texts: int = 512  # held out
    lr: float = 1e-3
    tuning_lr: float = 2e-4


class Block(nn.Module):
    """Attention and a feed-forward network, each behind a norm."""

    def __init__(self, size: Size) -> None:
        """Create the projections."""
        super().__init__()
        C = size.width
        self.heads = size.heads
        self.norm, self.norm2 = nn.RMSNorm(C), nn.RMSNorm(C)
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.out = nn.Linear(C, C, bias=False)
        self.up = nn.Linear(C, 4 * C, bias=False)
        self.down = nn.Linear(4 * C, C, bias=False)

    def forward(self, x: Tensor, table: Table, mask: Tensor | None) -> Tensor:
        """``(B, T, C)`` in and out; without a mask all earlier keys count."""
        B, T, C = x.shape
        qkv = self.qkv(self.norm(x)).view(B, T, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        y = F.scaled_dot_product_attention(
            rotate(q, *table),
            rotate(k, *table),
            v,
            attn_mask=mask,
            is_causal=mask is None,
        )
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, size: Size) -> None:
        """Create the layers."""
        super().__init__()
        self.bytes = nn.Embedding(256, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width)
        self.head = nn.Linear(size.width, 256, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(
        self, tokens: Tensor, table: Table, mask: Tensor | None = None
    ) -> Tensor:
        """``(B, T)`` to ``(B, T, 256)``."""
        x = self.bytes(tokens)
        for block in self.blocks:
            x = block(x, table, mask)
        return self.head(self.norm(x))


def corpus() -> tuple[Tensor, Tensor]:
    """Bytes to train on and bytes held out, by file."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests"}
    files = [
        file
        for file in sorted(folder.rglob("*.py"))
        if not left_out & set(file.relative_to(folder).parts)
    ]
    held = b"".join(f.read_bytes() for f in files[::10])
    seen = b"".join(f.read_bytes() for i, f in enumerate(files) if i % 10)
    return tuple(
        torch.frombuffer(bytearray(text), dtype=torch.uint8).to(DEVICE)
        for text in (seen, held)
    )


def pieces(data: Tensor, count: int, tokens: int, seed: int) -> Tensor:
    """``(count, tokens + 1)``, the same for every rule."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(len(data) - tokens, (count, 1), generator=generator)
    return data[start.to(DEVICE) + torch.arange(tokens + 1, device=DEVICE)]


def table(angles: Sequence[float], tokens: int, scale: float = 1.0) -> Table:
    """Cosines and sines of a rule, for every position and pair."""
    turns = torch.tensor(angles, dtype=torch.float64, device=DEVICE)
    positions = torch.arange(tokens, dtype=torch.float64, device=DEVICE)
    all_turns = torch.outer(positions, turns)
    return (
        (scale * all_turns.cos()).float(),
        (scale * all_turns.sin()).float(),
    )


def losses(
    model: nn.Module, batch: Tensor, turns: Table, mask: Tensor | None = None
) -> Tensor:
    """``(B, T)`` in nats a byte."""
    batch = batch.long()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        logits = model(batch[:, :-1], turns, mask)
    targets = batch[:, 1:]
    found = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="none"
    )
    return found.view_as(targets)


def train(
    model: nn.Module, batches: Sequence[Tensor], turns: Table, lr: float
) -> None:
    """One pass, rising and falling rate."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=lr,
        betas=(0.9, 0.95),
        fused=DEVICE == "cuda",
    )
    steps, warmup = len(batches), max(1, len(batches) // 20)
    for step, batch in enumerate(batches):
        rate = min(1.0, (step + 1) / warmup) * (1 - step / steps)
        optimizer.param_groups[0]["lr"] = lr * rate
        optimizer.zero_grad()
        losses(model, batch, turns).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def by_position(
    model: nn.Module, texts: Tensor, turns: Table, mask: Tensor | None = None
) -> list[float]:
    """Bits a byte, in ``BUCKETS`` equal parts of the text."""
    found = [losses(model, t, turns, mask) for t in texts.split(32)]
    bits = torch.cat(found).mean(dim=0) / math.log(2)
    return bits.view(BUCKETS, -1).mean(dim=1).tolist()


def rows(size: Size | None = None) -> list[dict]:
    """Train once, then read longer texts under every rule.

    Args:
        size: Of model and training; by default under a minute on an H200.

    Returns:
        Rows of two kinds: ``position`` with bits a byte by rule, and ``rule``
        with means within and beyond the trained length.

    Raises:
        RuntimeError: If the model learns nothing.
    """
    size = size or Size()
    torch.manual_seed(0)
    T, longer = size.tokens, FACTOR * size.tokens
    D = size.width // size.heads
    seen, held = corpus()
    texts = pieces(held, size.texts, longer, seed=2)
    model = Model(size).to(DEVICE)
    batches = pieces(seen, size.steps * size.batch, T, seed=1)
    trained = inverse_frequencies(D, BASE)
    train(model, batches.split(size.batch), table(trained, T), size.lr)

    ones = torch.ones(longer, longer, dtype=torch.bool, device=DEVICE)
    window = ones.tril() & ones.triu(1 - T)
    rules = {
        "none": table(trained, longer),
        "interpolation": table(interpolated(D, BASE, FACTOR), longer),
        "ntk_aware": table(ntk_aware(D, BASE, FACTOR), longer),
        "yarn": table(
            # few turns fit into 256 bytes: from 8 on a pair is fast
            yarn(D, BASE, FACTOR, T, fast=8.0),
            longer,
            attention_factor(FACTOR),
        ),
    }
    bits = {"window": by_position(model, texts, rules["none"], window)}
    if not bits["window"][0] < 6:
        raise RuntimeError(f"nothing was learned: {bits['window'][0]} bits")
    bits |= {name: by_position(model, texts, t) for name, t in rules.items()}

    count = size.tuning_steps * size.tuning_batch
    more = pieces(seen, count, longer, seed=3).split(size.tuning_batch)
    for name, turns in rules.items():
        tuned = copy.deepcopy(model)
        train(tuned, more, turns, size.tuning_lr)
        bits[f"{name}_tuned"] = by_position(tuned, texts, turns)

    step = longer // BUCKETS
    found = [
        {
            "kind": "position",
            "position": step * i + step // 2,
            **{f"{name}_bits": round(b[i], 4) for name, b in bits.items()},
        }
        for i in range(BUCKETS)
    ]
    within = BUCKETS // FACTOR
    for name, b in bits.items():
        if name.endswith("_tuned"):
            continue
        row = {"kind": "rule", "rule": NAMES.get(name, name)}
        after = bits.get(f"{name}_tuned", b)
        for when, values in (("", b), ("_tuned", after)):
            row[f"within{when}_bits"] = round(_mean(values[:within]), 4)
            row[f"last_quarter{when}_bits"] = round(_mean(values[-within:]), 4)
        found.append(row)
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
