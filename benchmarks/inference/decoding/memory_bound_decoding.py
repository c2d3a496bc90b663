"""Real decoding steps of a model shaped like Llama 3 8B, beside the bound.

Random bf16 weights in plain PyTorch, one step in a CUDA graph. There is no
rotary embedding and no sampling: both move next to nothing. The weights are
300 times as large as the L2 cache, so each step reads them anew.
"""

import contextlib
import math
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import (
    linear,
    rms_norm,
    scaled_dot_product_attention,
    silu,
)

from warpmap.hardware.performance.roofline import H200, bound, gemm
from warpmap.inference.decoding.memory_bound_decoding import (
    memory_bound_decoding,
)
from warpmap.models.configs import config

MODEL = "Llama 3 8B"
BATCHES = 1, 4, 16, 64, 256
CONTEXTS = 512, 2048, 8192, 32768
PRODUCT_BATCHES = 1, 16, 64, 128, 160, 192, 224, 256, 384, 512, 1024, 2048
MOST_TOKENS = 700_000  # in flight: 92 GB of cache
SPARE_BYTES = 10 << 30
ROUNDS = 7
EPS = 1e-5


class Decoder:
    """Weights and a pool of cache, and one step through all layers."""

    def __init__(self, c, tokens, device="cuda", dtype=torch.bfloat16):
        """Draw random weights and a random cache for that many tokens."""
        self.c = c
        C, F, D = c.hidden_size, c.intermediate_size, c.head_dim
        H, Hkv = c.heads, c.kv_heads

        def weight(rows, columns):
            empty = torch.empty(rows, columns, device=device, dtype=dtype)
            return empty.normal_(std=columns**-0.5)

        self.layers = [
            {
                "qkv": weight((H + 2 * Hkv) * D, C),
                "out": weight(C, H * D),
                "gate_up": weight(2 * F, C),
                "down": weight(C, F),
            }
            for _ in range(c.layers)
        ]
        self.head = weight(c.vocab_size, C)
        self.pool = [
            torch.empty(
                2, tokens * Hkv * D, device=device, dtype=dtype
            ).normal_()
            for _ in range(c.layers)
        ]

    def cache_of(self, layer, batch, context):
        """Keys and values of a layer, each ``(B, Hkv, S, D)``."""
        shape = batch, self.c.kv_heads, context, self.c.head_dim
        pool = self.pool[layer][:, : math.prod(shape)]
        return pool.view(2, *shape).unbind()

    def step(self, x, batch, context):
        """Logits ``(B, V)`` of one new token each; it is cached last."""
        flash = contextlib.nullcontext()
        if x.is_cuda:
            flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION)
        with flash:
            for layer in range(self.c.layers):
                x = self.through(layer, x, batch, context)
        return linear(rms_norm(x, x.shape[1:], eps=EPS), self.head)

    def through(self, layer, x, batch, context):
        """Hidden states ``(B, C)`` after one layer."""
        H, Hkv, D = self.c.heads, self.c.kv_heads, self.c.head_dim
        w = self.layers[layer]
        keys, values = self.cache_of(layer, batch, context)
        qkv = linear(rms_norm(x, x.shape[1:], eps=EPS), w["qkv"])
        q, k, v = qkv.view(batch, H + 2 * Hkv, D).split([H, Hkv, Hkv], dim=1)
        keys[:, :, -1] = k
        values[:, :, -1] = v
        mixed = scaled_dot_product_attention(
            q.unsqueeze(2), keys, values, enable_gqa=True
        )
        x = torch.addmm(x, mixed.reshape(batch, H * D), w["out"].mT)
        both = linear(rms_norm(x, x.shape[1:], eps=EPS), w["gate_up"])
        gate, up = both.chunk(2, dim=1)
        return torch.addmm(x, silu(gate) * up, w["down"].mT)


def reference(model, x, batch, context):
    """The same step in float64, attention written out."""
    c = model.c
    H, Hkv, D = c.heads, c.kv_heads, c.head_dim
    x = x.double()

    def norm(x):
        return x / (x.square().mean(dim=1, keepdim=True) + EPS).sqrt()

    for layer, w in enumerate(model.layers):
        w = {name: tensor.double() for name, tensor in w.items()}
        keys, values = (
            t.double() for t in model.cache_of(layer, batch, context)
        )
        qkv = (norm(x) @ w["qkv"].mT).view(batch, H + 2 * Hkv, D)
        q, k, v = qkv.split([H, Hkv, Hkv], dim=1)
        keys[:, :, -1], values[:, :, -1] = k, v
        keys, values = (
            t.repeat_interleave(H // Hkv, dim=1) for t in (keys, values)
        )
        scores = torch.einsum("bhd,bhsd->bhs", q, keys) / math.sqrt(D)
        mixed = torch.einsum("bhs,bhsd->bhd", scores.softmax(-1), values)
        x = x + mixed.reshape(batch, H * D) @ w["out"].mT
        gate, up = (norm(x) @ w["gate_up"].mT).chunk(2, dim=1)
        x = x + (gate * torch.sigmoid(gate) * up) @ w["down"].mT
    return norm(x) @ model.head.double().mT


def cases(tokens):
    """Batches and contexts whose caches fit."""
    return [(b, s) for s in CONTEXTS for b in BATCHES if b * s <= tokens]


def compare(name, found, right, most):
    """Raise if two results differ by more than a share of their size."""
    error = (found.double() - right.double()).norm() / right.double().norm()
    if not error <= most:  # NaN too
        raise RuntimeError(f"{name} is wrong: relative error {error:.3g}")


def captured(run):
    """A CUDA graph of a call, and where its result will be."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def milliseconds(graph):
    """Median time of a replay, several in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed(count):
        start.record()
        for _ in range(count):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / count

    timed(2)
    count = max(2, min(50, round(60 / timed(2))))
    return statistics.median(timed(count) for _ in range(ROUNDS))


def steps(model, tokens):
    """Rows of whole decoding steps."""
    found = []
    for batch, context in cases(tokens):
        x = torch.randn(
            batch, model.c.hidden_size, device="cuda", dtype=torch.bfloat16
        )
        graph, logits = captured(
            lambda x=x, b=batch, s=context: model.step(x, b, s)
        )
        measured = milliseconds(graph)
        name = f"a step of {batch} x {context}"
        compare(name, logits, model.step(x, batch, context), 0.03)
        if (batch, context) == (BATCHES[1], CONTEXTS[0]):
            # 32 layers, each of which rounds to 8 bits several times
            right = reference(model, x, batch, context)
            compare(name, logits, right, 0.06)
            del right
        del graph, logits
        best = memory_bound_decoding(MODEL, batch, context)
        found.append(
            {
                "kind": "step",
                "context": context,
                "batch": batch,
                "weights_ms": round(best.weights_ms, 3),
                "cache_ms": round(best.cache_ms, 3),
                "predicted_ms": round(best.step_ms, 3),
                "measured_ms": round(measured, 3),
                "ratio": round(measured / best.step_ms, 3),
                "tokens_per_s": round(batch / measured * 1e3),
            }
        )
    return found


def products(model):
    """Rows of one layer's widest product over the batch, weights not cached."""
    weights = [layer["gate_up"] for layer in model.layers]
    N, K = weights[0].shape
    found = []
    for batch in PRODUCT_BATCHES:
        x = torch.randn(batch, K, device="cuda", dtype=torch.bfloat16)

        def run(x=x):
            for w in weights:
                y = linear(x, w)
            return y

        graph, y = captured(run)
        measured = milliseconds(graph) / len(weights)
        some = slice(0, 1024)
        right = x.double() @ weights[-1][some].double().mT
        compare(f"a product of {batch} rows", y[:, some], right, 0.01)
        del graph, y
        work = gemm(batch, N, K)
        best = bound(work, H200)
        found.append(
            {
                "kind": "product",
                "batch": batch,
                "predicted_us": round(best.seconds * 1e6, 2),
                "measured_us": round(measured * 1e3, 2),
                "ratio": round(measured / 1e3 / best.seconds, 3),
                "tflops": round(work.flops / measured / 1e9, 1),
                "wall": best.wall,
            }
        )
    return found


@torch.no_grad()
def rows():
    """Rows of kind "step" and of kind "product"."""
    if not torch.cuda.is_available():
        raise RuntimeError("needs one NVIDIA GPU, but PyTorch sees none")
    name = torch.cuda.get_device_name(0)
    if "H200" not in name:
        raise RuntimeError(f"the predictions are for an H200, not for {name}")
    torch.manual_seed(0)
    c = config(MODEL)
    token_bytes = 2 * 2 * c.layers * c.kv_heads * c.head_dim
    free, _ = torch.cuda.mem_get_info()
    room = free - 2 * c.published_total - SPARE_BYTES
    tokens = min(MOST_TOKENS, room // token_bytes)
    if tokens < max(CONTEXTS):
        raise RuntimeError(f"too little memory is free: {free / 1e9:.0f} GB")
    model = Decoder(c, tokens)
    return steps(model, tokens) + products(model)
