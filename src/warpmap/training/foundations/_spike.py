"""A tiny transformer, and a training run with a few batches of noise in it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from warpmap import DEVICE
from warpmap.models.foundations.feed_forward import SwiGLU
from warpmap.models.foundations.normalization import RMSNorm
from warpmap.training.foundations.optimizers import AdamW
from warpmap.training.foundations.training_stability import (
    StableAttention,
    clip_gradients,
    cross_entropy,
)

VOCABULARY, TOKENS, BATCH = 32, 16, 16
WIDTH, HEADS, LAYERS = 32, 2, 2


@dataclass(frozen=True)
class Settings:
    """What may be switched on, and the run.

    Attributes:
        lr: Learning rate, after ``warmup`` steps.
        beta2: What Adam's mean of squares keeps in a step.
        eps: Added below Adam's line.
        clip: Largest norm of the gradient.
        z_weight: Weight of the z-loss.
        qk_norm: Whether queries and keys are normalized.
        steps: Of the run.
        noise_from: First step with random tokens instead of text.
        noise_steps: How many of them.
        warmup: Steps until ``lr`` is reached.
    """

    lr: float = 0.01
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float = math.inf
    z_weight: float = 0.0
    qk_norm: bool = False
    steps: int = 300
    noise_from: int = 200
    noise_steps: int = 3
    warmup: int = 20


@dataclass(frozen=True)
class Step:
    """What a step showed.

    Attributes:
        loss: Cross-entropy, without z-loss.
        norm: Of all gradients together, before clipping.
        far: Share of elements that moved by more than ``lr``.
        score: Largest attention score in the layers, in absolute value.
        log_z: Mean of ``log Z``.
    """

    loss: float
    norm: float
    far: float
    score: float
    log_z: float


class TinyTransformer(nn.Module):
    """Two pre-norm layers with learned positions."""

    def __init__(self, qk_norm: bool) -> None:
        """Draw the weights."""
        super().__init__()
        self.tokens = nn.Parameter(0.02 * torch.randn(VOCABULARY, WIDTH))
        self.positions = nn.Parameter(0.02 * torch.randn(TOKENS, WIDTH))
        self.norms = nn.ModuleList(RMSNorm(WIDTH) for _ in range(2 * LAYERS))
        self.attentions = nn.ModuleList(
            StableAttention(WIDTH, HEADS, qk_norm) for _ in range(LAYERS)
        )
        self.networks = nn.ModuleList(
            SwiGLU(WIDTH, 2 * WIDTH) for _ in range(LAYERS)
        )
        self.norm = RMSNorm(WIDTH)
        self.head = nn.Parameter(0.02 * torch.randn(VOCABULARY, WIDTH))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(B, T, V)``, and the largest attention score."""
        x = self.tokens[tokens] + self.positions
        scores = []
        for i, attend in enumerate(self.attentions):
            assert isinstance(attend, StableAttention)
            y = self.norms[2 * i](x)
            with torch.no_grad():  # only to watch them
                q, k, _ = attend.queries_and_keys(y)
                scores.append((q @ k.mT).abs().amax() / math.sqrt(q.shape[-1]))
            x = x + attend(y)
            x = x + self.networks[i](self.norms[2 * i + 1](x))
        return self.norm(x) @ self.head.T, torch.stack(scores).amax()


def batches(settings: Settings, generator: torch.Generator) -> Tensor:
    """Text in which each token chooses among a few successors, and noise.

    Returns:
        ``(steps, BATCH, TOKENS + 1)``.
    """
    steps = settings.steps
    table = 8 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    table = table.softmax(dim=-1)
    tokens = [torch.randint(VOCABULARY, (steps * BATCH,), generator=generator)]
    for _ in range(TOKENS):
        rows = table[tokens[-1]]
        tokens.append(rows.multinomial(1, generator=generator)[:, 0])
    text = torch.stack(tokens, dim=1).view(steps, BATCH, TOKENS + 1)
    noise = torch.randint(VOCABULARY, text.shape, generator=generator)
    first, last = (
        settings.noise_from,
        settings.noise_from + settings.noise_steps,
    )
    text[first:last] = noise[first:last]
    return text


def train(settings: Settings, seed: int = 0) -> list[Step]:
    """Run it; the same weights and batches for every choice of guards."""
    torch.manual_seed(seed)
    model = TinyTransformer(settings.qk_norm).to(DEVICE)
    params = list(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    data = batches(settings, generator).to(DEVICE)
    adamw = AdamW(
        params,
        settings.lr,
        (0.9, settings.beta2),
        settings.eps,
        weight_decay=0.0,
    )
    seen = []
    for i, tokens in enumerate(data):
        logits, score = model(tokens[:, :-1])
        logits, targets = logits.flatten(0, 1), tokens[:, 1:].flatten()
        adamw.zero_grad()
        cross_entropy(logits, targets, settings.z_weight).backward()
        norm = clip_gradients(params, settings.clip)
        adamw.lr = settings.lr * min(1, (i + 1) / settings.warmup)
        before = torch.cat([p.detach().flatten() for p in params])
        adamw.step()
        after = torch.cat([p.detach().flatten() for p in params])
        far = ((after - before).abs() > adamw.lr).double().mean()
        with torch.no_grad():
            loss = cross_entropy(logits, targets)
            log_z = logits.logsumexp(dim=-1).mean()
        seen.append(torch.stack([loss, norm, far.to(loss), score, log_z]))
    # one wait for the GPU, at the end
    return [Step(*row) for row in torch.stack(seen).tolist()]
