"""What a mixture remembers, against its number of experts, at equal work.

There are 65,536 facts: for each of 256 subjects and 256 relations one of 256
answers, drawn at random, so that nothing but memory helps. A token is the sum
of two embeddings; one layer of experts, of which it runs two, and a linear
head have to find the answer. From row to row only the number of experts
grows, and with it the router.
"""

import math

import torch
from torch.nn import functional as F

from warpmap import DEVICE
from warpmap.models.experts.mixture_of_experts import (
    MixtureOfExperts,
    top_k_gate,
)

ON_GPU = DEVICE == "cuda"
EXPERTS = (2, 4, 8, 16, 32, 64) if ON_GPU else (2, 8, 32)
PER_TOKEN = 2
NAMES, WIDTH, HIDDEN = (256, 64, 64) if ON_GPU else (64, 16, 16)
STEPS, BATCH = (1500, 8192) if ON_GPU else (600, 1024)
RATE = 4e-3
BALANCE = 0.01  # weight of the Switch loss


class Memory(torch.nn.Module):
    """Embeddings of subject and relation, a mixture, a head."""

    def __init__(self, experts):
        """Make all of them."""
        super().__init__()
        self.subject = torch.nn.Embedding(NAMES, WIDTH)
        self.relation = torch.nn.Embedding(NAMES, WIDTH)
        self.mixture = MixtureOfExperts(WIDTH, HIDDEN, experts, PER_TOKEN)
        self.head = torch.nn.Linear(WIDTH, NAMES, bias=False)

    def tokens(self, facts):
        """What the layer gets, ``(N, C)``."""
        x = self.subject(facts // NAMES) + self.relation(facts % NAMES)
        return F.rms_norm(x, (WIDTH,))

    def forward(self, facts):
        """Logits of the answers, and the Switch loss."""
        x = self.tokens(facts)
        logits = self.mixture.router(x)
        _, chosen = top_k_gate(logits, PER_TOKEN)
        load = torch.bincount(chosen.flatten(), minlength=logits.shape[1])
        share = load / chosen.numel()
        switch = logits.shape[1] * share @ logits.softmax(dim=-1).mean(dim=0)
        return self.head(F.rms_norm(x + self.mixture(x), (WIDTH,))), switch


def remember(experts: int) -> dict:
    """Train on the facts, and ask for all of them.

    Args:
        experts: In the layer, of which a token runs two.
    """
    torch.manual_seed(0)
    answers = torch.randint(NAMES, (NAMES * NAMES,), device=DEVICE)
    model = Memory(experts).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        facts = torch.randint(NAMES * NAMES, (BATCH,), device=DEVICE)
        logits, switch = model(facts)
        loss = F.cross_entropy(logits, answers[facts]) + BALANCE * switch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        facts = torch.arange(NAMES * NAMES, device=DEVICE)
        logits, _ = model(facts)
        loss = F.cross_entropy(logits, answers).item()
        right = (logits.argmax(dim=1) == answers).float().mean().item()
        router = model.mixture.router(model.tokens(facts))
        _, chosen = top_k_gate(router, PER_TOKEN)
        load = torch.bincount(chosen.flatten(), minlength=experts).float()
        busiest = (load.max() / load.mean()).item()
    if not math.isfinite(loss):
        raise RuntimeError(f"loss of {experts} experts is {loss}")
    layer = model.mixture
    return {
        "experts": experts,
        "parameters": sum(w.numel() for w in layer.parameters()),
        "active_parameters": layer.active_parameters(),
        "loss_nats": round(loss, 3),
        "remembered_percent": round(100 * right, 1),
        "busiest_over_mean": round(busiest, 2),
    }


def rows() -> list[dict]:
    """Train with every number of experts.

    Raises:
        RuntimeError: If a loss is not finite.
    """
    return [remember(experts) for experts in EXPERTS]
