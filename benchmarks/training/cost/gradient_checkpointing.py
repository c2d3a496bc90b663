"""Memory and time of a training step, for six ways to keep activations.

A chain of layers with the shape of Llama 3 8B's, in bf16, on one sequence of
8192 tokens. Gradients are allocated before; embedding, head and optimizer are
left out. Memory is what a forward and a backward pass take at most besides.
"""

import statistics

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from warpmap.models.configs import config
from warpmap.training.cost._recompute_plan import (
    best_segments,
    calls,
    segments_peak,
)
from warpmap.training.cost.gradient_checkpointing import (
    Recomputed,
    in_segments,
    nested,
)
from warpmap.training.cost.training_memory import layer_bytes

SHAPE = config("Llama 3 8B")
LAYERS, TOKENS = 24, 8192
ROUNDS = 5
GIB = 1 << 30


class Layer(nn.Module):
    """Grouped-query attention and a gated FFN, without positions."""

    def __init__(self) -> None:
        """Matrices of the shape."""
        super().__init__()
        C, D, F = SHAPE.hidden_size, SHAPE.head_dim, SHAPE.intermediate_size
        self.norm_1, self.norm_2 = nn.RMSNorm(C), nn.RMSNorm(C)
        self.q = nn.Linear(C, SHAPE.heads * D, bias=False)
        self.k = nn.Linear(C, SHAPE.kv_heads * D, bias=False)
        self.v = nn.Linear(C, SHAPE.kv_heads * D, bias=False)
        self.out = nn.Linear(SHAPE.heads * D, C, bias=False)
        self.gate = nn.Linear(C, F, bias=False)
        self.up = nn.Linear(C, F, bias=False)
        self.down = nn.Linear(F, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, C)`` to the same."""
        y = self.norm_1(x)
        q, k, v = (
            f(y).unflatten(-1, (-1, SHAPE.head_dim)).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        y = scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norm_2(x)
        return x + self.down(silu(self.gate(y)) * self.up(y))


def ways(layers: nn.ModuleList) -> dict[str, tuple[nn.Module, float, int]]:
    """Model, predicted bytes and calls of layers of each way.

    Args:
        layers: The chain, whose weights all models share.
    """
    n = len(layers)
    inside = round(layer_bytes(SHAPE, TOKENS))
    kept = round(layer_bytes(SHAPE, TOKENS, recompute="full"))
    chain = [kept] * n, [inside] * n
    best = best_segments(*chain)
    found: dict[str, tuple[nn.Module, float, int]] = {
        "plain": (nn.Sequential(*layers), n * inside, n),
        "each layer": (
            nn.Sequential(*map(Recomputed, layers[:-1]), layers[-1]),
            segments_peak(*chain, [1] * n),
            2 * n - 1,
        ),
        f"{len(best)} shrinking segments": (
            in_segments(layers, best),
            segments_peak(*chain, best),
            2 * n - best[-1],
        ),
    }
    for slots in (5, 2, 1):
        found[f"nested, {slots + 1} inputs"] = (
            nested(layers, slots),
            (slots + 1) * kept + inside,
            calls(n, slots),
        )
    return found


def _step(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    # a gradient like any other, without a loss that would hold tensors too
    y.backward(x.detach())
    return y.detach()


def rows() -> list[dict]:
    """Peak of memory and time of a step, measured and predicted.

    Returns:
        A row a way, with GiB, milliseconds and forward passes.

    Raises:
        RuntimeError: If there is no GPU, too little memory, or gradients
            differ from those of the plain model by more than rounding.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("this benchmark needs one NVIDIA GPU")
    free, _ = torch.cuda.mem_get_info()
    if free < 80 * GIB:
        raise RuntimeError(f"needs 80 GiB of memory, {free / GIB:.0f} are free")
    torch.manual_seed(0)
    with torch.device("cuda"):
        layers = nn.ModuleList(Layer() for _ in range(LAYERS)).bfloat16()
        x = torch.randn(1, TOKENS, SHAPE.hidden_size, dtype=torch.bfloat16)
    x.requires_grad_()
    for w in (x, *layers.parameters()):
        w.grad = torch.zeros_like(w)

    found, want, plain_ms = [], None, 0.0
    for way, (model, predicted, number) in ways(layers).items():
        _step(model, x)  # libraries load, weights are in the cache
        for w in (x, *layers.parameters()):
            w.grad.zero_()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        output = _step(model, x)
        most = torch.cuda.max_memory_allocated() - before
        got = output, x.grad.clone()
        want = want or got
        # attention's backward pass adds in any order, the forward in one
        error = (got[1] - want[1]).norm() / want[1].norm()
        if not torch.equal(got[0], want[0]) or not error < 0.02:
            raise RuntimeError(f"{way}: gradients are off by {error:.3f}")

        times = []
        for _ in range(ROUNDS):
            first = torch.cuda.Event(enable_timing=True)
            last = torch.cuda.Event(enable_timing=True)
            first.record()
            _step(model, x)
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last))
        ms = statistics.median(times)
        plain_ms = plain_ms or ms
        passes = number / LAYERS
        found.append(
            {
                "way": way,
                "predicted_gib": round(predicted / GIB, 2),
                "measured_gib": round(most / GIB, 2),
                "forward_passes": round(passes, 2),
                "predicted_step_ratio": round((passes + 2) / 3, 2),
                "step_ratio": round(ms / plain_ms, 2),
                "step_ms": round(ms, 1),
            }
        )
    return found
