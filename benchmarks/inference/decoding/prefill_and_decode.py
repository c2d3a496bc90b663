"""Both stages of a request against the length of its prompt.

Eight layers of Llama 3 8B's shape in bf16, with random weights. A step is run
as PyTorch runs it, and as a CUDA graph, which takes the host out of it.
"""

import statistics
from collections.abc import Callable

import torch

from warpmap.hardware.performance.roofline import bound
from warpmap.inference.decoding._two_stages import (
    pass_seconds,
    pass_work,
    total,
)
from warpmap.inference.decoding.kv_cache import StaticCache
from warpmap.models.configs import ModelConfig
from warpmap.models.foundations.decoder_only import Decoder, DecoderConfig

PROMPTS = (1, 16, 64, 128, 256, 512, 2048, 8192, 32768)
LAYERS = 8
VOCAB = 32000
ROUNDS = 7
SHAPE = ModelConfig(
    "eight layers", ("", ""), layers=LAYERS, hidden_size=4096, heads=32,
    kv_heads=8, vocab_size=VOCAB, max_context=0, head_dim=128,
    intermediate_size=14336,
)  # fmt: skip


def make_model(layers: int = LAYERS) -> Decoder:
    """The model, in bf16 on the GPU."""
    config = DecoderConfig(
        VOCAB, 4096, layers, 32, 8, 14336, rope_base=500000.0, tied=False
    )
    with torch.device("cuda"):
        return Decoder(config).bfloat16().requires_grad_(False)


def milliseconds(work: Callable[[], object], runs: int) -> float:
    """Median over rounds of the mean of some runs, by CUDA events."""
    work()
    times = []
    for _ in range(ROUNDS):
        first = torch.cuda.Event(enable_timing=True)
        last = torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(runs):
            work()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / runs)
    return statistics.median(times)


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of the work, which has run before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def check(model: Decoder) -> None:
    """Refuse to time a step that is not the full pass.

    Raises:
        RuntimeError: If logits differ by more than bf16 explains.
    """
    tokens = torch.randint(VOCAB, (1, 300), device="cuda")
    cache = StaticCache(model.config, 1, 300, None, torch.bfloat16, "cuda")
    model(tokens[:, :299], cache=cache)
    got = model(tokens[:, 299:], cache=cache)[0, -1].float()
    want = model(tokens)[0, -1].float()
    error = ((got - want).norm() / want.norm()).item()
    if not error < 0.05:
        raise RuntimeError(f"a cached step differs by {error:.1%}")


@torch.no_grad()
def rows() -> list[dict]:
    """Time prefill and a step for every length of prompt.

    Returns:
        A row a length: milliseconds measured and predicted by the roofline.

    Raises:
        RuntimeError: If there is no GPU or a step is wrong.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("this benchmark needs one NVIDIA GPU")
    model = make_model()
    check(model)
    found = []
    for prompt in PROMPTS:
        tokens = torch.randint(VOCAB, (1, prompt), device="cuda")
        cache = StaticCache(
            model.config, 1, prompt + 1, None, torch.bfloat16, "cuda"
        )

        def read(tokens=tokens, cache=cache):
            cache.length = 0
            return model.head(model.features(tokens, cache=cache)[:, -1])

        def write(token=tokens[:, :1], cache=cache, prompt=prompt):
            cache.length = prompt
            return model.head(model.features(token, cache=cache)[:, -1])

        runs = 1 if prompt > 8000 else 10
        prefill, eager = milliseconds(read, runs), milliseconds(write, 10)
        graph = milliseconds(captured(write).replay, 10)
        graph_prefill = milliseconds(captured(read).replay, runs)
        work = pass_work(SHAPE, 1, held=0, new=prompt)
        step = pass_work(SHAPE, 1, held=prompt, new=1)
        flops, bytes_ = total(work).flops, total(step).bytes
        found.append(
            {
                "prompt": prompt,
                "prefill_ms": round(prefill, 3),
                "prefill_graph_ms": round(graph_prefill, 3),
                "prefill_predicted_ms": round(1e3 * pass_seconds(work), 3),
                "prefill_us_per_token": round(1e3 * graph_prefill / prompt, 2),
                "prefill_tflops": round(flops / graph_prefill / 1e9, 1),
                "prefill_wall": bound(total(work)).wall,
                "step_ms": round(eager, 3),
                "step_graph_ms": round(graph, 3),
                "step_predicted_ms": round(1e3 * pass_seconds(step), 3),
                "step_tb_s": round(bytes_ / graph / 1e9, 2),
            }
        )
        del cache, read, write
        torch.cuda.empty_cache()
    return found
