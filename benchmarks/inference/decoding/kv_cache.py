"""The time of a step and the bytes held, by what keeps the keys and values.

Four layers of Llama 3 8B's shape in bf16, eight texts. Each step runs as a
CUDA graph, so that the GPU's time is seen. Without a cache, the step reads
the whole text again.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.inference.decoding.prefill_and_decode import (
    captured,
    milliseconds,
)
from warpmap.inference.decoding._two_stages import pass_seconds, pass_work
from warpmap.inference.decoding.kv_cache import (
    GrowingCache,
    KVCache,
    RingCache,
    StaticCache,
)
from warpmap.models.configs import ModelConfig
from warpmap.models.foundations.decoder_only import Decoder, DecoderConfig

LENGTHS = (512, 2048, 8192, 32768)
WINDOW = 1024
BATCH = 8
VOCAB = 32000
CONFIG = DecoderConfig(VOCAB, 4096, 4, 32, 8, 14336, tied=False)
SHAPE = ModelConfig(
    "four layers", ("", ""), layers=4, hidden_size=4096, heads=32,
    kv_heads=8, vocab_size=VOCAB, max_context=0, head_dim=128,
    intermediate_size=14336,
)  # fmt: skip


def caches(length: int) -> dict[str, KVCache]:
    """One of each, holding keys and values of ``length`` tokens."""
    made = {
        "growing": GrowingCache(CONFIG.layers, device="cuda"),
        "static": StaticCache(
            CONFIG, BATCH, length + 1, None, torch.bfloat16, "cuda"
        ),
        "ring": RingCache(CONFIG, BATCH, WINDOW, None, torch.bfloat16, "cuda"),
    }
    new = torch.randn(BATCH, 8, length, 128, device="cuda").bfloat16()
    for cache in made.values():
        for layer in range(CONFIG.layers):
            cache.update(layer, new.clone(), new.clone())
    return made


def step(model: Decoder, token: Tensor, cache: KVCache) -> Callable[[], Tensor]:
    """One step that leaves the cache as it found it."""
    length, k, v = cache.length, list(cache.k), list(cache.v)

    def work() -> Tensor:
        cache.length, cache.k, cache.v = length, list(k), list(v)
        return model(token, cache=cache)

    return work


def check(model: Decoder) -> None:
    """Refuse to time caches that change the result.

    Raises:
        RuntimeError: If logits differ by more than bf16 explains.
    """
    tokens = torch.randint(VOCAB, (BATCH, 300), device="cuda")
    want = model(tokens)[:, -1].float()
    for name, cache in {
        "growing": GrowingCache(CONFIG.layers, device="cuda"),
        "static": StaticCache(CONFIG, BATCH, 300, None, torch.bfloat16, "cuda"),
        "ring": RingCache(CONFIG, BATCH, 300, None, torch.bfloat16, "cuda"),
    }.items():
        model(tokens[:, :299], cache=cache)
        got = model(tokens[:, 299:], cache=cache)[:, -1].float()
        error = ((got - want).norm() / want.norm()).item()
        if not error < 0.05:
            raise RuntimeError(f"with a {name} cache logits differ {error:.1%}")


@torch.no_grad()
def rows() -> list[dict]:
    """Time a step with every cache and with none.

    Returns:
        A row a length: milliseconds, and bytes held.

    Raises:
        RuntimeError: If there is no GPU or a cache is wrong.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("this benchmark needs one NVIDIA GPU")
    with torch.device("cuda"):
        model = Decoder(CONFIG).bfloat16().requires_grad_(False)
    check(model)
    found = []
    for length in LENGTHS:
        text = torch.randint(VOCAB, (BATCH, length + 1), device="cuda")
        row: dict = {"tokens": length}

        def again(text=text):
            return model.head(model.features(text)[:, -1])

        row["none_ms"] = round(milliseconds(again, 1), 3)
        torch.cuda.empty_cache()
        made = caches(length)
        for name, cache in made.items():
            row[f"{name}_mb"] = round(cache.nbytes / 1e6, 1)
            graph = captured(step(model, text[:, :1], cache))
            spent = milliseconds(graph.replay, 10)
            del graph  # it keeps memory of its own
            row[f"{name}_ms"] = round(spent, 3)
            held = min(length, WINDOW - 1) if name == "ring" else length
            work = pass_work(SHAPE, BATCH, held=held, new=1)
            if name != "growing":
                predicted = 1e3 * pass_seconds(work)
                row[f"{name}_predicted_ms"] = round(predicted, 3)
        found.append(row)
        del made, cache
        torch.cuda.empty_cache()
    return found
