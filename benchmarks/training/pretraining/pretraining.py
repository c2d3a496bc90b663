"""The house models, trained from nothing; then judged, timed and sampled.

``WARPMAP_CORPUS`` names a folder of Python files to read in place of the
running Python's library, and ``WARPMAP_HOUSE`` where the runs are kept.
"""

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from warpmap import DEVICE
from warpmap.hardware.gpus import GPUS
from warpmap.models.configs import ModelConfig
from warpmap.models.families._house_baselines import (
    NGrams,
    gzip_bits,
    xz_bits,
)
from warpmap.models.families._house_corpus import Corpus, corpus
from warpmap.models.families._house_training import (
    RECIPES,
    Batches,
    Prepared,
    Recipe,
    deterministic,
    held_out_nats,
    prepare,
    train_house_model,
)
from warpmap.models.foundations.decoder_only import Decoder, DecoderConfig
from warpmap.models.foundations.tokenization import BytePairTokenizer
from warpmap.training.cost.flops_and_mfu import flops_and_mfu, shape
from warpmap.training.pretraining.evaluation import bits_per_byte
from warpmap.training.pretraining.pretraining import Report, train

H200 = GPUS["H200 SXM"]
WARM_UP = 20
ORDER = 4
PROMPTS = (
    "def read_config(path):\n",
    "class Queue:\n    def __init__(self",
    "import unittest\n\nclass TestParser(",
)
SAMPLED = 160  # tokens


class Roofline(TorchDispatchMode):
    """How long each operator should take, from its bytes and its FLOPs.

    An operator reads its arguments and writes its results; what only gives a
    view costs nothing. Nothing else, launches above all, is counted.
    """

    def __init__(self, tb_s: float, tflop_s: float) -> None:
        """Start at zero."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes_s, self.flop_s = tb_s * 1e12, tflop_s * 1e12
        self.seconds, self.operators = 0.0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operator and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view:
            return out
        moved = sum(
            x.numel() * x.itemsize
            for x in tree_leaves((args, kwargs, out))
            if isinstance(x, torch.Tensor)
        )
        count = flop_registry.get(func.overloadpacket)
        flops = count(*args, **kwargs, out_val=out) if count else 0
        self.seconds += max(moved / self.bytes_s, flops / self.flop_s)
        self.operators += 1
        return out


def described(config: DecoderConfig) -> ModelConfig:
    """The shape as the calculators take it."""
    return ModelConfig(
        name="house",
        source=("", ""),
        layers=config.layers,
        hidden_size=config.width,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.width // config.heads,
        intermediate_size=config.hidden,
        vocab_size=config.vocab_size,
        max_context=512,
        tied_embeddings=config.tied,
    )


def predicted(recipe: Recipe) -> Roofline:
    """Time of one step by rooflines, with the ceilings measured here."""
    measured = H200.measured
    counter = Roofline(measured["bandwidth_tb_s"], measured["bf16_tflops"])
    documents = [list(range(1, recipe.context))] * recipe.rows
    batches = Batches(documents, recipe.context - 1, recipe.rows, DEVICE)
    model = Decoder(recipe.config).to(DEVICE)
    plan = type(recipe.plan)(1, 1e-3, dtype=recipe.plan.dtype)
    with deterministic(), counter:
        train(model, batches, plan)
    return counter


def sample(
    model: Decoder,
    tokenizer: BytePairTokenizer,
    prompt: str,
    temperature: float = 0.8,
) -> str:
    """What the model writes after a prompt, with a fixed seed."""
    end = tokenizer.end_of_text
    tokens = torch.tensor([[end, *tokenizer.encode(prompt)]]).to(DEVICE)
    draws = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():
        for _ in range(SAMPLED):
            logits = model(tokens)[:, -1].float()
            p = (logits / temperature).softmax(-1)
            drawn = torch.multinomial(p, 1, generator=draws)
            if drawn.item() == end:
                break
            tokens = torch.cat([tokens, drawn], dim=1)
    return tokenizer.decode(tokens[0, 1:].tolist())


def ngram_bits(prepared: Prepared) -> float:
    """Held-out bits a byte of a model that counts the same tokens."""
    V = prepared.tokenizer.vocab_size
    model = NGrams(prepared.training, ORDER, V)
    nats = 0.0
    for document in prepared.held_out:
        for i in range(1, len(document)):
            history = document[max(0, i - ORDER + 1) : i]
            nats -= math.log(model.probability(history, document[i]))
    return bits_per_byte(nats, prepared.held_out_bytes)


def trained_row(
    name: str,
    model: Decoder,
    prepared: Prepared,
    losses: Sequence[float],
    reports: Sequence[Report],
) -> dict[str, Any]:
    """What one run cost, and what it reached."""
    recipe = RECIPES[name]
    seconds = sum(r.seconds for r in reports[WARM_UP:])
    tokens = sum(r.tokens for r in reports[WARM_UP:])
    per_step = recipe.rows * recipe.context
    work = {
        **shape(described(recipe.config)),
        "tokens": recipe.context,
        "gpus": 1,
        "peak_tflops": H200.bf16_tflops,
    }
    cost = flops_and_mfu(**work, tokens_per_second=tokens / seconds)
    bound = predicted(recipe)
    hoped = flops_and_mfu(**work, tokens_per_second=per_step / bound.seconds)
    nats = held_out_nats(model, prepared.held_out, recipe.context, DEVICE)
    trained_tokens = per_step * recipe.plan.steps
    return {
        "what": "model",
        "name": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": recipe.plan.steps,
        "million_tokens": trained_tokens / 1e6,
        "epochs": trained_tokens / sum(map(len, prepared.training)),
        "seconds": sum(r.seconds for r in reports),
        "tokens_per_s": tokens / seconds,
        "step_ms": 1e3 * seconds / len(reports[WARM_UP:]),
        "predicted_ms": 1e3 * bound.seconds,
        "operators": bound.operators,
        "mfu_percent": cost.mfu_percent,
        "predicted_mfu_percent": hoped.mfu_percent,
        "training_nats_a_token": sum(losses[-50:]) / 50,
        "held_out_bits_a_byte": bits_per_byte(nats, prepared.held_out_bytes),
    }


def curve(name: str, losses: Sequence[float]) -> Iterator[dict[str, Any]]:
    """The loss, averaged over twenty steps."""
    for start in range(0, len(losses) - 19, 20):
        yield {
            "what": "curve",
            "name": name,
            "step": start + 10,
            f"{name}_nats": sum(losses[start : start + 20]) / 20,
        }


def texts_row(found: Corpus) -> dict[str, Any]:
    """What was read."""
    sizes: Mapping[str, int] = found.funnel
    return {
        "what": "corpus",
        "name": found.name,
        "files": len(found.hashes),
        "characters": sum(sizes.values()),
        "kept": sizes["kept"],
        "training_files": len(found.training),
        "held_out_files": len(found.held_out),
        "held_out_bytes": sum(len(t.encode()) for t in found.held_out.values()),
    }


def rows() -> list[dict[str, Any]]:
    """Train both models, one after the other; baselines meanwhile."""
    folder = os.environ.get("WARPMAP_CORPUS")
    runs = Path(os.environ.get("WARPMAP_HOUSE", "build/house"))
    began = time.perf_counter()
    found = corpus(Path(folder) if folder else None)
    prepared = prepare(found, RECIPES["target"].config.vocab_size)
    table = [texts_row(found) | {"seconds": time.perf_counter() - began}]
    with ProcessPoolExecutor(4, get_context("spawn")) as pool:
        baselines = {
            "gzip -9": pool.submit(gzip_bits, found.held_out),
            "xz -9e": pool.submit(xz_bits, found.held_out),
            "xz -9e, after the training files": pool.submit(
                xz_bits, found.held_out, found.training
            ),
            f"{ORDER}-grams of the same tokens": pool.submit(
                ngram_bits, prepared
            ),
        }
        for name in ("target", "draft"):
            reports: list[Report] = []
            model, losses = train_house_model(
                RECIPES[name],
                prepared,
                runs / name,
                DEVICE,
                report=reports.append,
            )
            table.append(trained_row(name, model, prepared, losses, reports))
            table += curve(name, losses)
            for prompt in PROMPTS:
                text = sample(model, prepared.tokenizer, prompt)
                table.append({"what": "sample", "name": name, "text": text})
        for name, future in baselines.items():
            bits = future.result()
            table.append(
                {"what": "baseline", "name": name, "held_out_bits_a_byte": bits}
            )
    return table
