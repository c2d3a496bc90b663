"""Fetching a cache from pinned host memory, and computing it again.

Two shapes: Llama 3 8B (GQA), all 32 layers with random weights; and one layer
of DeepSeek-V3 (MLA), its time multiplied by 61. That layer's FFN is as wide as
the experts that a token runs, so it stands for those with experts too.

Three probes feed the prediction: one large copy, many small ones, and one
matrix product. None of them knows the lengths or the shapes.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.cuda import Event
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, rms_norm, silu
from torch.nn.functional import scaled_dot_product_attention as sdpa

from warpmap.inference.kv_cache.kv_transfer_vs_recompute import (
    PRESETS,
    fetch_or_recompute,
)

LENGTHS = [512 << k for k in range(7)]  # 512 to 32768
BLOCK_TOKENS = 16
PEAK_TFLOPS = 989.4
PROBE_BYTES = 1 << 30
SMALL_BYTES = 4096
SMALL_COPIES = 2000
MATRIX = 8192


def weight(rows: int, columns: int, like: Tensor) -> Tensor:
    """A random matrix that keeps the size of what it multiplies."""
    made = torch.empty(rows, columns, dtype=like.dtype, device=like.device)
    return made.normal_(std=1 / math.sqrt(rows))


def rotations(tokens: int, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of rotary positions, ``(tokens, 1, dim / 2)``."""
    rates = 500_000.0 ** (-torch.arange(0, dim, 2, device=like.device) / dim)
    angles = torch.arange(tokens, device=like.device)[:, None] * rates
    return angles.cos()[:, None].to(like), angles.sin()[:, None].to(like)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``(T, H, D)``."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """Causal attention of ``(T, H, D)``; on a GPU by flash attention."""
    q, k, v = (a.transpose(0, 1)[None] for a in (q, k, v))
    kernel = (
        sdpa_kernel(SDPBackend.FLASH_ATTENTION) if q.is_cuda else nullcontext()
    )
    with kernel:
        y = sdpa(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return y[0].transpose(0, 1)


class FFN:
    """A gated FFN of random weights."""

    def __init__(self, C: int, F: int, like: Tensor) -> None:
        """Draw the weights."""
        self.up, self.down = weight(C, 2 * F, like), weight(F, C, like)

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` and what the network adds."""
        gate, up = (rms_norm(x, x.shape[-1:]) @ self.up).chunk(2, dim=-1)
        return x + (silu(gate) * up) @ self.down


class GQA:
    """A layer of grouped-query attention and its FFN; Llama 3 8B's sizes."""

    def __init__(
        self,
        like: Tensor,
        C: int = 4096,
        H: int = 32,
        Hkv: int = 8,
        D: int = 128,
        F: int = 14336,
    ) -> None:
        """Draw the weights."""
        self.C, self.H, self.Hkv, self.D = C, H, Hkv, D
        self.rotary_dim, self.cached = D, 2 * Hkv * D
        self.qkv = weight(C, (H + 2 * Hkv) * D, like)
        self.out = weight(H * D, C, like)
        self.ffn = FFN(C, F, like)

    def __call__(
        self, x: Tensor, turns: tuple[Tensor, Tensor], cache: Tensor
    ) -> Tensor:
        """``x`` after the layer; keys and values are left in ``cache``."""
        T, heads = len(x), [self.H, self.Hkv, self.Hkv]
        qkv = (rms_norm(x, (self.C,)) @ self.qkv).view(T, -1, self.D)
        q, k, v = qkv.split(heads, dim=1)
        q, k = rotate(q, *turns), rotate(k, *turns)
        kept = cache.view(T, 2, self.Hkv, self.D)
        kept[:, 0], kept[:, 1] = k, v
        return self.ffn(x + attend(q, k, v).reshape(T, -1) @ self.out)


class MLA:
    """A layer of latent attention and a dense FFN; DeepSeek-V3's sizes."""

    def __init__(
        self,
        like: Tensor,
        C: int = 7168,
        H: int = 128,
        q_rank: int = 1536,
        rank: int = 512,
        nope: int = 128,
        rope: int = 64,
        Dv: int = 128,
        F: int = 18432,
    ) -> None:
        """Draw the weights."""
        self.C, self.H, self.rank = C, H, rank
        self.nope, self.rope, self.Dv = nope, rope, Dv
        self.rotary_dim, self.cached = rope, rank + rope
        self.q_down = weight(C, q_rank, like)
        self.q_up = weight(q_rank, H * (nope + rope), like)
        self.down = weight(C, rank + rope, like)
        self.up = weight(rank, H * (nope + Dv), like)
        self.out = weight(H * Dv, C, like)
        self.ffn = FFN(C, F, like)

    def __call__(
        self, x: Tensor, turns: tuple[Tensor, Tensor], cache: Tensor
    ) -> Tensor:
        """``x`` after the layer; the latent is left in ``cache``."""
        T, rank, nope, rope = len(x), self.rank, self.nope, self.rope
        h = rms_norm(x, (self.C,))
        q = h @ self.q_down
        q = (rms_norm(q, q.shape[-1:]) @ self.q_up).view(T, self.H, -1)
        q = torch.cat([q[..., :nope], rotate(q[..., nope:], *turns)], dim=-1)
        latent, key = (h @ self.down).split([rank, rope], dim=-1)
        latent, key = rms_norm(latent, (rank,)), rotate(key[:, None], *turns)
        cache[:, :rank], cache[:, rank:] = latent, key[:, 0]
        k, v = (
            (latent @ self.up)
            .view(T, self.H, -1)
            .split([nope, self.Dv], dim=-1)
        )
        k = torch.cat([k, key.expand(-1, self.H, -1)], dim=-1)
        # flash attention wants values as long as keys
        v = pad(v, (0, nope + rope - self.Dv))
        y = attend(q, k, v)[..., : self.Dv]
        return self.ffn(x + y.reshape(T, -1) @ self.out)


Layer = GQA | MLA


def check(layer: Layer, tokens: int = 64) -> None:
    """One token alone, from the layer's cache, must come out the same.

    Raises:
        RuntimeError: If it differs by more than rounding explains.
    """
    like = layer.out
    x = torch.randn(tokens, layer.C, device=like.device).to(like)
    cache = x.new_empty(tokens, layer.cached)
    turns = rotations(tokens, layer.rotary_dim, x)
    got = layer(x, turns, cache)

    # a token in the middle, which must not see what comes after it
    at = tokens // 2
    got, x, cache = got[at].float(), x[at : at + 1].float(), cache.float()
    cache, tokens = cache[: at + 1], at + 1
    h = rms_norm(x, (layer.C,))
    turn = tuple(part[at : at + 1].float() for part in turns)
    if isinstance(layer, GQA):
        D = layer.D
        q = (h @ layer.qkv[:, : layer.H * D].float()).view(1, -1, D)
        q = rotate(q, *turn)[0]
        k, v = cache.view(tokens, 2, layer.Hkv, D).unbind(1)
        group = layer.H // layer.Hkv
        k, v = (a.repeat_interleave(group, dim=1) for a in (k, v))
    else:
        q = h @ layer.q_down.float()
        q = rms_norm(q, q.shape[-1:]) @ layer.q_up.float()
        q = q.view(1, layer.H, -1)
        rotated = rotate(q[..., layer.nope :], *turn)
        q = torch.cat([q[..., : layer.nope], rotated], dim=-1)[0]
        latent, key = cache.split([layer.rank, layer.rope], dim=-1)
        up = (latent @ layer.up.float()).view(tokens, layer.H, -1)
        k, v = up.split([layer.nope, layer.Dv], dim=-1)
        k = torch.cat([k, key[:, None].expand(-1, layer.H, -1)], dim=-1)
    scores = torch.einsum("hd,shd->hs", q, k) / math.sqrt(q.shape[-1])
    y = torch.einsum("hs,shd->hd", scores.softmax(dim=-1), v)
    x = x + y.reshape(1, -1) @ layer.out.float()
    up, down = layer.ffn.up.float(), layer.ffn.down.float()
    gate, value = (rms_norm(x, (layer.C,)) @ up).chunk(2, dim=-1)
    want = (x + (silu(gate) * value) @ down)[0]
    error = ((got - want).norm() / want.norm()).item()
    if not error < 0.02:  # a handful of roundings to bf16, 2^-9 each
        raise RuntimeError(
            f"{type(layer).__name__}: relative error {error:.3g}"
        )


def median_ms(run: Callable[[], object], rounds: int) -> float:
    """Median time of a call on the GPU, after one to warm up."""
    times = []
    for at in range(1 + rounds):
        torch.cuda.synchronize()
        begin, end = Event(enable_timing=True), Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        if at:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def copy_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Queue one copy after another."""
    for target, source in pairs:
        target.copy_(source, non_blocking=True)


def copy_ms(
    device: Tensor, host: Tensor, size: int, piece: int, rounds: int
) -> float:
    """Time to fetch ``size`` bytes in pieces that lie scattered.

    Raises:
        RuntimeError: If what arrived is not what was sent.
    """
    n = size // piece
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    targets = device[:size].view(n, piece).unbind()
    sources = host[:size].view(n, piece).unbind()
    pairs = [(targets[at], sources[i]) for i, at in enumerate(order.tolist())]
    device[:size].zero_()
    time = median_ms(lambda: copy_all(pairs), rounds)
    for i in {0, n // 2, n - 1}:
        target, source = pairs[i]
        if not torch.equal(target.cpu(), source):
            raise RuntimeError(f"piece {i} of {n} is not what was sent")
    return time


def prefill_ms(layers: Sequence[Layer], tokens: int, rounds: int) -> float:
    """Time of a prefill through the layers, caches written."""
    first = layers[0]
    like = first.out
    x = torch.randn(tokens, first.C, device=like.device).to(like)
    turns = rotations(tokens, first.rotary_dim, x)
    cache = x.new_empty(len(layers), tokens, first.cached)

    def run() -> None:
        y = x
        for layer, kept in zip(layers, cache, strict=True):
            y = layer(y, turns, kept)

    return median_ms(run, rounds)


def probes(device: Tensor, host: Tensor) -> dict[str, float]:
    """What the prediction needs to know of this machine."""
    large = median_ms(
        lambda: device[:PROBE_BYTES].copy_(
            host[:PROBE_BYTES], non_blocking=True
        ),
        rounds=5,
    )
    end = SMALL_COPIES * SMALL_BYTES
    targets = device[:end].view(SMALL_COPIES, SMALL_BYTES).unbind()
    sources = host[:end].view(SMALL_COPIES, SMALL_BYTES).unbind()
    pairs = list(zip(targets, sources, strict=True))
    small = median_ms(lambda: copy_all(pairs), rounds=5)
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    a, b = weight(MATRIX, MATRIX, like), weight(MATRIX, MATRIX, like)
    product = median_ms(lambda: a @ b, rounds=10)
    return {
        "link_gb_s": PROBE_BYTES / large / 1e6,
        "issue_us": small * 1e3 / SMALL_COPIES,
        "gemm_tflops": 2 * MATRIX**3 / product / 1e9,
    }


def rows() -> list[dict[str, int | float | str]]:
    """One row a shape and length; times in ms, predicted and measured."""
    if not torch.cuda.is_available():
        raise RuntimeError("needs one NVIDIA GPU, but PyTorch sees none")
    torch.manual_seed(0)
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    most = max(PRESETS[m]["cache_bytes_per_token"] for m in MODELS.values())
    size = int(most) * LENGTHS[-1]
    device = torch.empty(size, dtype=torch.uint8, device="cuda").random_(256)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    host.copy_(device)
    machine = probes(device, host)

    result: list[dict[str, int | float | str]] = []
    for name, model in MODELS.items():
        # a prefill on one GPU reads the experts that are timed, not all
        given = {**PRESETS[model]}
        given["weights_gb"] = 2 * given["active_billions"]
        timed, per_token = TIMED[name], int(given["cache_bytes_per_token"])
        layers = [LAYERS[name](like) for _ in range(timed)]
        check(layers[0])
        for tokens in LENGTHS:
            rounds = 9 if tokens <= 4096 else 5 if tokens <= 16384 else 3
            block = per_token * BLOCK_TOKENS
            by_layer = int(given["layers"])
            row: dict[str, int | float | str] = {
                "cache": name,
                "model": model,
                "tokens": tokens,
                "cache_mb": per_token * tokens / 1e6,
            }
            for key, pieces in (("blocks", 1), ("by_layer", by_layer)):
                predicted = fetch_or_recompute(
                    **given,
                    tokens=tokens,
                    block_tokens=BLOCK_TOKENS,
                    pieces_per_block=pieces,
                    link_gb_s=machine["link_gb_s"],
                    issue_us=machine["issue_us"],
                    peak_tflops=PEAK_TFLOPS,
                    achieved_percent=min(
                        100.0, 100 * machine["gemm_tflops"] / PEAK_TFLOPS
                    ),
                )
                row[f"{key}_predicted_ms"] = predicted.fetch_ms
                row[f"{key}_measured_ms"] = copy_ms(
                    device, host, per_token * tokens, block // pieces, rounds
                )
            row["prefill_predicted_ms"] = predicted.recompute_ms
            measured = prefill_ms(layers, tokens, rounds)
            row["prefill_measured_ms"] = measured * by_layer / timed
            result.append(row | {"layers_timed": timed} | machine)
        del layers
    return result


MODELS = {"GQA": "Llama 3 8B", "MLA": "DeepSeek-V3"}
LAYERS: dict[str, Callable[[Tensor], Layer]] = {"GQA": GQA, "MLA": MLA}
TIMED = {"GQA": 32, "MLA": 1}
