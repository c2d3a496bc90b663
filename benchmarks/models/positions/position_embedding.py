"""Loss by position, far beyond the length that was trained on.

Five small causal models differ in their positions only. They learn to predict
the bytes of Python's standard library from pieces of 256, and read pieces of
2048 from files that they have not seen.
"""

import math
import sysconfig
import zlib
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from warpmap import DEVICE
from warpmap.models.foundations.attention import attention
from warpmap.models.positions._position_layers import (
    T5Bias,
    alibi_bias,
    shaw_bias,
    sinusoidal_table,
)

ON_GPU = DEVICE == "cuda"
SCHEMES = ("none", "sinusoidal", "shaw", "t5", "alibi")
TRAINED, READ = 256, 2048  # bytes of a piece
WIDTH, HEADS, LAYERS = (256, 8, 4) if ON_GPU else (32, 4, 2)
STEPS, BATCH, TEXTS = (500, 64, 64) if ON_GPU else (3, 2, 2)
LIMIT = 64  # of Shaw and others
BINS = [0, 16, 32, 64, 128, 192, 256, 320, 384, 512, 768, 1024, 1536, 2048]


class Block(nn.Module):
    """Attention and a feed-forward network, each after a norm."""

    def __init__(self, scheme: str) -> None:
        """Create the weights."""
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.ffn = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH),
            nn.GELU(),
            nn.Linear(4 * WIDTH, WIDTH),
        )
        if scheme == "shaw":
            rows = 2 * LIMIT + 1
            self.offsets = nn.Parameter(torch.zeros(rows, WIDTH // HEADS))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attend under a mask of floats, then think."""
        B, T, _ = x.shape
        qkv = self.qkv(self.norms[0](x)).view(B, T, 3, HEADS, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if hasattr(self, "offsets"):
            mask = mask + shaw_bias(q, self.offsets, T)
        y = attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return x + self.ffn(self.norms[1](x))


class Model(nn.Module):
    """A causal model of bytes."""

    def __init__(self, scheme: str) -> None:
        """Create the weights, with one scheme of positions."""
        super().__init__()
        self.scheme = scheme
        self.embed = nn.Embedding(256, WIDTH)
        # as large as the sinusoids, so that neither drowns the other
        nn.init.normal_(self.embed.weight, std=math.sqrt(0.5))
        self.blocks = nn.ModuleList(Block(scheme) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)
        table = sinusoidal_table(READ, WIDTH).float()
        self.register_buffer("places", table)
        if scheme == "t5":
            self.bias = T5Bias(HEADS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the next byte, ``(B, T, 256)``."""
        T = tokens.shape[1]
        x = self.embed(tokens)
        if self.scheme == "sinusoidal":
            x = x + self.places[:T]
        seen = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
        bias = torch.zeros(1, T, T, device=x.device)
        if self.scheme == "t5":
            bias = self.bias(T, T)
        elif self.scheme == "alibi":
            bias = alibi_bias(HEADS, T, T, x.device)
        mask = bias.masked_fill(~seen, -math.inf)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


def texts() -> tuple[Tensor, Tensor]:
    """The standard library's bytes: to train on, and to read.

    Raises:
        RuntimeError: If it is not installed as source.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = [
        file
        for file in sorted(folder.rglob("*.py"))
        if "site-packages" not in file.parts
    ]
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for file in files:
        name = file.relative_to(folder).as_posix().encode()
        parts[zlib.crc32(name) % 10 == 0].append(file.read_bytes())
    train, held = (
        torch.frombuffer(bytearray(b"".join(parts[k])), dtype=torch.uint8)
        for k in (False, True)
    )
    if min(len(train), len(held)) < 20 * READ:
        raise RuntimeError(f"too little source in {folder}")
    return train, held


def pieces(text: Tensor, count: int, length: int, seed: int) -> Tensor:
    """So many pieces from random places, with one byte more to predict."""
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - length, (count, 1), generator=draw)
    return text[starts + torch.arange(length + 1)].long()


def losses(scheme: str, train: Tensor, held: Tensor) -> list[float]:
    """Train one model; its loss in each bin of positions, nats a byte."""
    torch.manual_seed(0)
    model = Model(scheme).to(DEVICE)
    # Adam moves a number by its rate a step: T5's 32 numbers a head start at
    # zero and must get as far as scores do
    table = [w for name, w in model.named_parameters() if name == "bias.table"]
    others = [w for name, w in model.named_parameters() if name != "bias.table"]
    peaks = (1e-3, 3e-2)
    optimizer = torch.optim.AdamW(
        [{"params": others}, {"params": table, "weight_decay": 0.0}]
    )
    for step in range(STEPS):
        rate = min(1, (step + 1) / 50, 3 * (STEPS - step) / STEPS)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate
        batch = pieces(train, BATCH, TRAINED, seed=step).to(DEVICE)
        scores = model(batch[:, :-1])
        loss = cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    total = torch.zeros(READ, dtype=torch.float64)
    with torch.no_grad():
        for text in pieces(held, TEXTS, READ, seed=1).split(4):
            text = text.to(DEVICE)
            scores = model(text[:, :-1]).transpose(1, 2)
            found = cross_entropy(scores, text[:, 1:], reduction="none")
            total += found.double().sum(dim=0).cpu()
    by_position = total / TEXTS
    return [by_position[a:b].mean().item() for a, b in pairwise(BINS)]


def rows() -> list[dict]:
    """Loss of each scheme, for ranges of positions.

    Returns:
        A row a range, with its middle as ``position``.

    Raises:
        RuntimeError: If there is no text, or a model learns nothing.
    """
    train, held = texts()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = {name: losses(name, train, held) for name in SCHEMES}
    finally:
        torch.set_float32_matmul_precision(before)
    for name, curve in found.items():
        # 96 printable characters: guessing among them costs 4.6 nats
        if ON_GPU and not curve[4] < 3:
            raise RuntimeError(f"{name} did not learn: {curve[4]:.2f} nats")
    return [
        {
            "position": (a + b) // 2,
            "from": a,
            "to": b,
            **{f"{name}_nats": round(found[name][i], 3) for name in SCHEMES},
        }
        for i, (a, b) in enumerate(pairwise(BINS))
    ]
