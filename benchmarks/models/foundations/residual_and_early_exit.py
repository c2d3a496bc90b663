"""How deep bytes of Python go before they leave, and what leaving costs.

Two models learn from the source of Python's standard library: one with the
loss of all its exits, one with that of the last exit alone. Then both read
files that they have not seen, with one threshold after another.
"""

import sysconfig
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from warpmap import DEVICE
from warpmap.models.foundations.residual_and_early_exit import (
    early_exit,
    exit_loss,
)
from warpmap.models.foundations.transformer import Transformer

ON_GPU = DEVICE == "cuda"
WIDTH, HEADS, LAYERS = (256, 8, 8) if ON_GPU else (32, 4, 2)
STEPS, BATCH, LENGTH, TEXTS = (600, 32, 256, 128) if ON_GPU else (4, 2, 32, 4)
THRESHOLDS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
SHOWN = 0.8  # the threshold at which bytes are sorted by their depth
BEST_RATE = 1e-3


def texts() -> tuple[Tensor, Tensor]:
    """The standard library's bytes: to train on, and to read.

    Raises:
        RuntimeError: If it is not installed as source.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for file in sorted(folder.rglob("*.py")):
        if "site-packages" not in file.parts:
            name = file.relative_to(folder).as_posix().encode()
            parts[zlib.crc32(name) % 10 == 0].append(file.read_bytes())
    train, held = (
        torch.frombuffer(bytearray(b"".join(parts[k])), dtype=torch.uint8)
        for k in (False, True)
    )
    if len(held) < 100_000:
        raise RuntimeError(f"too little source in {folder}")
    return train, held


def pieces(text: Tensor, count: int, seed: int) -> Tensor:
    """So many pieces from random places, with one byte more to predict."""
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - LENGTH, (count, 1), generator=draw)
    return text[starts + torch.arange(LENGTH + 1)].long().to(DEVICE)


def trained(train: Tensor, all_exits: bool) -> Transformer:
    """A model, after all steps."""
    torch.manual_seed(0)
    model = Transformer(256, WIDTH, LAYERS, HEADS, LENGTH).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=BEST_RATE)
    for step in range(STEPS):
        rate = min(1, (step + 1) / 50, 3 * (STEPS - step) / STEPS)
        optimizer.param_groups[0]["lr"] = BEST_RATE * rate
        batch = pieces(train, BATCH, seed=step)
        tokens, targets = batch[:, :-1], batch[:, 1:]
        if all_exits:
            loss = exit_loss(model, tokens, targets)
        else:
            loss = cross_entropy(model(tokens).mT, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


@torch.no_grad()
def leave(
    model: Transformer, held: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """Loss and depth of every byte, in one row each."""
    losses, depths = [], []
    for batch in pieces(held, TEXTS, seed=1).split(16):
        scores, depth = early_exit(model, batch[:, :-1], threshold)
        loss = cross_entropy(scores.mT, batch[:, 1:], reduction="none")
        losses.append(loss.flatten())
        depths.append(depth.flatten())
    return torch.cat(losses), torch.cat(depths)


def rows() -> list[dict]:
    """Loss and layers at each threshold; then bytes by their depth.

    Returns:
        A row a threshold, of kind "threshold", and a row a depth, of kind
        "depth", at the threshold ``SHOWN``.

    Raises:
        RuntimeError: If there is no text, or a model learns nothing.
    """
    train, held = texts()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        every = trained(train, all_exits=True)
        last = trained(train, all_exits=False)
        found = []
        for threshold in THRESHOLDS:
            row: dict = {"kind": "threshold", "threshold": threshold}
            for name, model in (("all", every), ("last", last)):
                loss, depth = leave(model, held, threshold)
                row[f"{name}_layers"] = round(depth.double().mean().item(), 2)
                row[f"{name}_nats"] = round(loss.mean().item(), 3)
            found.append(row)
        # guessing among 96 printable characters costs 4.6 nats
        if ON_GPU and not max(row["all_nats"], row["last_nats"]) < 2.5:
            raise RuntimeError(f"did not learn: {row}")

        loss, depth = leave(every, held, SHOWN)
        whole, _ = leave(every, held, 1.0)
    finally:
        torch.set_float32_matmul_precision(before)
    for layer in range(1, LAYERS + 1):
        here = depth == layer
        if here.any():
            share = 100 * here.double().mean().item()
            found.append(
                {
                    "kind": "depth",
                    "layers": layer,
                    "percent": round(share, 1),
                    "exit_nats": round(loss[here].mean().item(), 3),
                    "whole_nats": round(whole[here].mean().item(), 3),
                }
            )
    return found
