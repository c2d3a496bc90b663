"""A training run: schedule, clipping, the loop, and going on after a crash.

The loop knows no data set. It asks for the batch of a step by its number, so
that a run that was killed goes on with the batch it had come to.

    rate      rises over the first steps, stays, falls to zero in the last
    weights   updated in float32; the model computes in ``dtype``
    stops     at a loss or gradient that is no number, and says at which batch

Reference: Brown et al., 2020, https://arxiv.org/abs/2005.14165
Reference: Hu et al., 2024, https://arxiv.org/abs/2404.06395
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from warpmap.training.foundations.optimizers import AdamW
from warpmap.training.foundations.training_stability import clip_gradients
from warpmap.training.precision.mixed_precision import MasterWeights
from warpmap.training.pretraining.checkpointing import (
    latest_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from warpmap.training.pretraining.sequence_packing import (
    Packed,
    document_mask,
    packed_loss,
    positions_of,
)


class NonFiniteLoss(ArithmeticError):
    """A loss, or its gradient, is infinite or NaN: nothing was updated with it.

    Attributes:
        step: The step, counted from 0.
        documents: Numbers of the documents in its batch.
    """

    def __init__(
        self, loss: float, step: int, documents: list[int], norm: float = 0.0
    ) -> None:
        """Say where it happened; ``norm`` is the gradient's."""
        what = "gradient" if math.isfinite(loss) else "loss"
        found = norm if math.isfinite(loss) else loss
        first = ", ".join(map(str, documents[:8]))
        more = ", ..." if len(documents) > 8 else ""
        super().__init__(
            f"{what} is {found} at step {step}; its batch holds the documents "
            f"{first}{more}"
        )
        self.step, self.documents = step, documents


@dataclass(frozen=True)
class Plan:
    """The settings of a run.

    Attributes:
        steps: Updates of the weights.
        peak: Highest learning rate.
        warmup: First steps, over which the rate rises from zero.
        decay: Last steps, over which it falls to zero.
        weight_decay: Of the matrices; norms have none.
        betas: Of Adam.
        clip: Longest gradient, as a Euclidean norm over all weights.
        dtype: What the model computes in.

    Raises:
        ValueError: If the parts of the schedule overlap, ``clip`` is not
            positive, or ``dtype`` needs a loss scaler.
    """

    steps: int
    peak: float
    warmup: int = 0
    decay: int = 0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        """Refuse what could not run, before hours of work."""
        warmup_stable_decay(0, self.steps, self.warmup, self.decay)
        if not self.clip > 0:
            raise ValueError(f"clip must be above 0, got {self.clip}")
        if self.dtype == torch.float16:
            raise ValueError(
                "dtype float16 needs a loss scaler, which this loop has not: "
                "use bfloat16"
            )


@dataclass(frozen=True)
class Report:
    """What a step did.

    Attributes:
        step: Steps done, this one included.
        loss: Mean over the batch before the update, in nats a token.
        gradient_norm: Before clipping.
        tokens: Tokens that went through the model in this step.
        seconds: Time of this step.
    """

    step: int
    loss: float
    gradient_norm: float
    tokens: int
    seconds: float


def warmup_stable_decay(
    step: int, steps: int, warmup: int, decay: int
) -> float:
    """The learning rate of a step, over the highest.

    Args:
        step: 0 to ``steps - 1``.
        steps: Of the whole run.
        warmup: First steps, over which the factor rises.
        decay: Last steps, over which it falls; the last one still learns.

    Raises:
        ValueError: If the step is not of the run, or the parts overlap.

    Examples:
        >>> [warmup_stable_decay(s, 8, warmup=2, decay=4) for s in range(8)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 <= step < steps:
        raise ValueError(f"step must be 0 to {steps - 1}, got {step}")
    if min(warmup, decay) < 0 or warmup + decay > steps:
        raise ValueError(
            f"warmup {warmup} and decay {decay} must fit into {steps} steps"
        )
    rise = (step + 1) / warmup if step < warmup else 1.0
    left = steps - step
    return rise * (left / decay if left < decay else 1.0)


def train(
    model: nn.Module,
    batch: Callable[[int], Packed],
    plan: Plan,
    folder: Path | None = None,
    save_every: int = 0,
    report: Callable[[Report], object] | None = None,
) -> list[float]:
    """Train a model in place, from the newest checkpoint if there is one.

    Args:
        model: Takes tokens, positions and a mask as ``Decoder`` does. Its
            weights end in ``plan.dtype``.
        batch: The rows of a step, a pure function of its number.
        plan: Settings.
        folder: For checkpoints; without one nothing is kept.
        save_every: Steps between checkpoints; 0 saves at the end only.
        report: Hears of every step.

    Returns:
        The loss of every step, those before a restart included.

    Raises:
        NonFiniteLoss: If a loss or a gradient is infinite or NaN.
        ValueError: If the checkpoint is of another model, of more steps than
            the plan, or of another number of GPUs.

    Examples:
        >>> from warpmap.training.pretraining.sequence_packing import pack
        >>> class Bigram(nn.Embedding):
        ...     def forward(self, tokens, positions, mask):
        ...         return super().forward(tokens)
        >>> rows = pack([[0, 1, 2, 3]], capacity=4)
        >>> losses = train(Bigram(4, 4), lambda step: rows, Plan(9, peak=2.0))
        >>> [len(losses), round(losses[-1], 1)]  # learned by heart
        [9, 0.0]
    """
    found = latest_checkpoint(folder) if folder else None
    start, state = found or (0, {})
    names = [name for name, _ in model.named_parameters()]
    if found:
        saved = {name: p.shape for name, p in state["masters"].items()}
        if saved != {name: p.shape for name, p in model.named_parameters()}:
            raise ValueError(f"{folder} holds a run of another model")
        if start > plan.steps:
            raise ValueError(
                f"{folder} holds {start} steps, the plan has {plan.steps}"
            )

    weights = MasterWeights(model.train(), plan.dtype)
    matrices = [p for p in weights.masters if p.ndim > 1]
    vectors = [p for p in weights.masters if p.ndim < 2]
    optimizers = [
        AdamW(params, plan.peak, plan.betas, 1e-8, decay)
        for params, decay in ((matrices, plan.weight_decay), (vectors, 0.0))
        if params
    ]
    losses: list[float] = state.get("losses", [])
    if found:
        with torch.no_grad():
            for name, master in zip(names, weights.masters, strict=True):
                master.copy_(state["masters"][name])
        for optimizer, moments in zip(
            optimizers, state["optimizers"], strict=True
        ):
            optimizer.load_state_dict(moments)
        weights.publish()
        set_random_state(state["generators"])

    for step in range(start, plan.steps):
        began = time.perf_counter()
        rows = batch(step)
        logits = model(
            rows.tokens,
            positions_of(rows.documents),
            document_mask(rows.documents),
        )
        loss = packed_loss(logits, rows)
        loss.backward()
        weights.collect()
        norm = clip_gradients(weights.masters, plan.clip)
        # read both here, so that the host waits for the device once a step
        losses.append(loss.item())
        length = norm.item()
        if not (math.isfinite(losses[-1]) and math.isfinite(length)):
            documents = rows.documents.unique().tolist()
            named = [number for number in documents if number >= 0]
            raise NonFiniteLoss(losses[-1], step, named, length)

        factor = warmup_stable_decay(step, plan.steps, plan.warmup, plan.decay)
        for optimizer in optimizers:
            optimizer.lr = plan.peak * factor
            optimizer.step()
        weights.publish()

        done = step + 1
        if folder and (
            done == plan.steps or (save_every and done % save_every == 0)
        ):
            state = {
                "masters": {
                    name: p.detach()
                    for name, p in zip(names, weights.masters, strict=True)
                },
                "optimizers": [o.state_dict() for o in optimizers],
                "generators": random_state(),
                "losses": losses,
            }
            save_checkpoint(folder, done, state)
        if report:
            seconds = time.perf_counter() - began
            report(
                Report(done, losses[-1], length, rows.tokens.numel(), seconds)
            )
    return losses
