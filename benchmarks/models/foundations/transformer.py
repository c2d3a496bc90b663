"""A small Transformer learns to write Python, each time with a part left out.

The text is the source of Python's standard library, byte by byte. All models
start from the same weights and read the same pieces in the same order.
"""

import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from warpmap import DEVICE
from warpmap.models.attention.grouped_query_attention import causal_mask
from warpmap.models.foundations.transformer import Transformer

ON_GPU = DEVICE == "cuda"
PARTS = ("nothing", "positions", "attention", "feed_forward", "link")
WIDTH, HEADS, LAYERS = (256, 8, 6) if ON_GPU else (32, 4, 2)
STEPS, BATCH, LENGTH = (400, 32, 256) if ON_GPU else (40, 2, 32)
EVERY = 20  # steps that a point of the curve is the mean of
BEST_RATE = 1e-3


def text() -> Tensor:
    """The standard library's source as bytes.

    Raises:
        RuntimeError: If it is not installed as source.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = [
        file
        for file in sorted(folder.rglob("*.py"))
        if "site-packages" not in file.parts
    ]
    found = bytearray(b"".join(file.read_bytes() for file in files))
    if len(found) < 1_000_000:
        raise RuntimeError(f"too little source in {folder}")
    return torch.frombuffer(found, dtype=torch.uint8)


def scores(model: Transformer, tokens: Tensor, without: str) -> Tensor:
    """What the model says with one part left out, ``(B, T, 256)``."""
    x = model.embed(tokens)
    if without == "positions":
        x = model.embedding[tokens]
    link = 0.0 if without == "link" else 1.0
    T = tokens.shape[1]
    mask = causal_mask(T, T, tokens.device)
    for block in model.blocks:
        if without != "attention":
            normal = block.norm1(x)
            k, v = block.k(normal), block.v(normal)
            x = link * x + block.attend(normal, k, v, mask)
        if without != "feed_forward":
            x = link * x + block.transform(block.norm2(x))
    return model.read(x)


def curve(without: str, source: Tensor) -> list[float]:
    """Train one model; its mean loss in nats a byte, every few steps."""
    torch.manual_seed(0)
    model = Transformer(256, WIDTH, LAYERS, HEADS, LENGTH).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=BEST_RATE)
    draw = torch.Generator().manual_seed(0)
    losses = []
    for step in range(STEPS):
        rate = min(1, (step + 1) / 50, 3 * (STEPS - step) / STEPS)
        optimizer.param_groups[0]["lr"] = BEST_RATE * rate
        places = (len(source) - LENGTH, (BATCH, 1))
        starts = torch.randint(*places, generator=draw)
        pieces = source[starts + torch.arange(LENGTH + 1)].long().to(DEVICE)
        found = scores(model, pieces[:, :-1], without)
        loss = cross_entropy(found.flatten(0, 1), pieces[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).unflatten(0, (-1, EVERY)).mean(dim=1).tolist()


def rows() -> list[dict]:
    """Loss over the steps, of the whole model and without each part.

    Returns:
        A row for every 20 steps.

    Raises:
        RuntimeError: If there is no text, or the whole model learns nothing.
    """
    source = text()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = {part: curve(part, source) for part in PARTS}
    finally:
        torch.set_float32_matmul_precision(before)
    # guessing among 96 printable characters costs 4.6 nats
    if ON_GPU and not found["nothing"][-1] < 2.5:
        raise RuntimeError(f"did not learn: {found['nothing'][-1]:.2f} nats")
    return [
        {
            "step": (i + 1) * EVERY,
            **{
                f"without_{part}_nats": round(found[part][i], 3)
                for part in PARTS
            },
        }
        for i in range(STEPS // EVERY)
    ]
