"""Steps of a decoder with 1.1 billion parameters: FLOPs, time, MFU, HFU."""

import statistics

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import (
    cross_entropy,
    scaled_dot_product_attention,
    silu,
)
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from warpmap.hardware.gpus import GPUS, Gpu
from warpmap.models.configs import ModelConfig
from warpmap.models.foundations.parameter_count import count
from warpmap.training.cost.flops_and_mfu import flops_and_mfu, shape

SHAPE = ModelConfig(
    name="1.1B",
    source=("", ""),
    layers=16,
    hidden_size=2048,
    heads=16,
    kv_heads=4,
    head_dim=128,
    intermediate_size=8192,
    vocab_size=32000,
    max_context=4096,
)
SEQUENCES = 4
TOKENS = 4096
WARM_UP = 3
STEPS = 10

# name, whether layers are compiled, whether backward runs them again
VARIANTS = [
    ("eager", False, False),
    ("compiled", True, False),
    ("compiled, layers recomputed", True, True),
]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position of queries or keys, ``(B, H, T, D)``."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class Layer(nn.Module):
    """Grouped-query attention and a gated FFN, each behind a norm."""

    def __init__(self, c: ModelConfig) -> None:
        """Make the weights of one layer."""
        super().__init__()
        C, D, F = c.hidden_size, c.head_dim, c.intermediate_size
        self.heads, self.kv_heads, self.head_dim = c.heads, c.kv_heads, D
        self.norm_1, self.norm_2 = nn.RMSNorm(C), nn.RMSNorm(C)
        self.q = nn.Linear(C, c.heads * D, bias=False)
        self.k = nn.Linear(C, c.kv_heads * D, bias=False)
        self.v = nn.Linear(C, c.kv_heads * D, bias=False)
        self.out = nn.Linear(c.heads * D, C, bias=False)
        self.gate = nn.Linear(C, F, bias=False)
        self.up = nn.Linear(C, F, bias=False)
        self.down = nn.Linear(F, C, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One layer on ``(B, T, C)``."""
        B, T, _ = x.shape
        D = self.head_dim
        h = self.norm_1(x)
        q = self.q(h).view(B, T, self.heads, D).transpose(1, 2)
        k = self.k(h).view(B, T, self.kv_heads, D).transpose(1, 2)
        v = self.v(h).view(B, T, self.kv_heads, D).transpose(1, 2)
        # as many keys as queries: the counter of torch 2.11 knows no groups
        group = self.heads // self.kv_heads
        k = rotate(k, cos, sin).repeat_interleave(group, dim=1)
        v = v.repeat_interleave(group, dim=1)
        q = rotate(q, cos, sin)
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, -1))
        h = self.norm_2(x)
        x = x + self.down(silu(self.gate(h)) * self.up(h))
        return x


class Decoder(nn.Module):
    """A decoder and its loss."""

    def __init__(self, c: ModelConfig, tokens: int, recompute: bool) -> None:
        """Make weights, and rotary tables for so many tokens."""
        super().__init__()
        self.recompute = recompute
        self.embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.hidden_size)
        self.head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        half = torch.arange(c.head_dim // 2)
        angles = torch.arange(tokens)[:, None] * 10000 ** (
            -2 * half / c.head_dim
        )
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, text: Tensor) -> Tensor:
        """Mean loss of each next token, for ``(B, T + 1)``."""
        x = self.embedding(text[:, :-1])
        for layer in self.layers:
            if self.recompute:
                x = checkpoint(
                    layer, x, self.cos, self.sin, use_reentrant=False
                )
            else:
                x = layer(x, self.cos, self.sin)
        logits = self.head(self.norm(x)).flatten(0, 1).float()
        loss: Tensor = cross_entropy(logits, text[:, 1:].flatten())
        return loss


def counted_flops(model: Decoder, text: Tensor) -> int:
    """FLOPs of forward and backward, as PyTorch's counter sees them.

    Args:
        model: Not compiled; its gradients are left empty.
        text: ``(B, T + 1)`` token ids.
    """
    # else a checkpoint leaves out a layer's last product, which it need not
    with (
        set_checkpoint_early_stop(False),
        FlopCounterMode(display=False) as counter,
    ):
        model(text).backward()
    model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


def this_gpu() -> Gpu:
    """The row of the table that describes the GPU in use."""
    name = torch.cuda.get_device_name()
    for known, card in GPUS.items():
        if known.split()[0] in name.split() and card.bf16_tflops:
            return card
    raise RuntimeError(f"no peak is known for {name!r}; add it to gpus.json")


def measure(compiled: bool, recompute: bool) -> dict[str, int | float]:
    """One variant: counted FLOPs, the median step, and its utilization."""
    torch.manual_seed(0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with torch.device("cuda"):
        model = Decoder(SHAPE, TOKENS, recompute).to(torch.bfloat16)
        text = torch.randint(SHAPE.vocab_size, (SEQUENCES, TOKENS + 1))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # one that is counted
        counted = SEQUENCES * counted_flops(model, text[:1])

    if compiled:
        for layer in model.layers:
            layer.compile()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    times, losses = [], []
    for at in range(WARM_UP + STEPS):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        loss = model(text)
        loss.backward()
        adam.step()
        adam.zero_grad(set_to_none=True)
        end.record()
        end.synchronize()
        losses.append(loss.item())
        if at >= WARM_UP:
            times.append(begin.elapsed_time(end))
    if not losses[-1] < losses[0]:
        raise RuntimeError(f"the loss does not fall: {losses}")

    step_ms = statistics.median(times)
    trained = SEQUENCES * TOKENS
    run = {
        **shape(SHAPE),
        "tokens": TOKENS,
        "recompute_layers": recompute,
        "gpus": 1,
        "peak_tflops": this_gpu().bf16_tflops,
        "tokens_per_second": trained / step_ms * 1e3,
    }
    masked = flops_and_mfu(**run)
    square = flops_and_mfu(**run, causal=False)
    predicted = square.executed_gflop_per_token * trained / 1e3
    if abs(predicted / (counted / 1e12) - 1) > 1e-9:
        raise RuntimeError(
            f"predicted {predicted} TFLOP a step, PyTorch counts {counted}"
        )
    return {
        "parameters": count(SHAPE).total,
        "tokens_a_step": trained,
        "predicted_executed_tflop": predicted,
        "counted_tflop": counted / 1e12,
        "needed_causal_tflop": masked.gflop_per_token * trained / 1e3,
        "step_ms": step_ms,
        "tokens_per_second": trained / step_ms * 1e3,
        "mfu_causal_percent": masked.mfu_percent,
        "mfu_square_percent": square.mfu_percent,
        "hfu_causal_percent": masked.hfu_percent,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def rows() -> list[dict[str, int | float | str]]:
    """One row a variant; all train the same model on the same text."""
    if not torch.cuda.is_available():
        raise RuntimeError("needs a GPU, PyTorch sees none")
    result: list[dict[str, int | float | str]] = []
    for name, compiled, recompute in VARIANTS:
        result.append({"variant": name, **measure(compiled, recompute)})
    first = [float(row["first_loss"]) for row in result]
    if max(first) - min(first) > 0.02 * first[0]:
        raise RuntimeError(f"variants disagree on the first loss: {first}")
    return result
