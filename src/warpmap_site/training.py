"""What ``warpmap train`` does, and says meanwhile."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from warpmap import DEVICE
from warpmap.models.families._house_baselines import gzip_bits
from warpmap.models.families._house_corpus import corpus as read
from warpmap.models.families._house_training import (
    RECIPES,
    held_out_nats,
    prepare,
    train_house_model,
)
from warpmap.training.pretraining.evaluation import bits_per_byte
from warpmap.training.pretraining.pretraining import Report

LINES_APART = 5.0  # seconds
SAVES = 10  # checkpoints in a run


class Progress:
    """Says from time to time how far a run has come.

    Args:
        steps: Of the run.
        say: Prints a line.
    """

    def __init__(self, steps: int, say: Callable[[str], object]) -> None:
        """Start the clock."""
        self._steps, self._say, self._first = steps, say, True
        self._said, self._tokens, self._seconds = time.monotonic(), 0, 0.0

    def __call__(self, report: Report) -> None:
        """Hear of a step."""
        if self._first and report.step > 1:
            self._say(f"going on after step {report.step - 1}")
        self._first = False
        self._tokens += report.tokens
        self._seconds += report.seconds
        now = time.monotonic()
        if now - self._said < LINES_APART and report.step < self._steps:
            return
        speed = self._tokens / self._seconds
        left = (self._steps - report.step) * report.tokens / speed
        self._say(
            f"step {report.step:5} of {self._steps}   loss {report.loss:.3f}   "
            f"{speed:9,.0f} tokens/s   {left:4.0f} s left"
        )
        # the speed since the last line, so that it follows the machine
        self._said, self._tokens, self._seconds = now, 0, 0.0


def train_and_tell(
    size: Literal["target", "draft", "tiny"] | None,
    folder: Path | None,
    source: Path | None,
    say: Callable[[str], object],
) -> None:
    """Train one of the house models and judge it.

    Args:
        size: Which; by default the target on a GPU and the tiny one without.
        folder: For checkpoints and the model.
        source: Files to read; by default Python's library.
        say: Prints a line.

    Raises:
        ValueError: If the files are too few, or ``folder`` has another run.
    """
    name = size or ("target" if DEVICE == "cuda" else "tiny")
    recipe, folder = RECIPES[name], folder or Path("build") / f"house-{name}"
    say(f"reading {source or 'the standard library of this Python'} ...")
    found = read(source, recipe.one_in)
    say(
        f"{found.name}: {len(found.training)} files to train on, "
        f"{len(found.held_out)} held out; learning "
        f"{recipe.config.vocab_size} tokens ..."
    )
    prepared = prepare(found, recipe.config.vocab_size)
    steps = recipe.plan.steps
    say(f"training {name} for {steps} steps on {DEVICE}, in {folder}")
    model, _ = train_house_model(
        recipe,
        prepared,
        folder,
        DEVICE,
        save_every=max(1, steps // SAVES),
        report=Progress(steps, say),
    )
    nats = held_out_nats(model, prepared.held_out, recipe.context, DEVICE)
    bits = bits_per_byte(nats, prepared.held_out_bytes)
    say(
        f"held-out files: {bits:.3f} bits a byte; gzip -9 needs "
        f"{gzip_bits(found.held_out):.3f}"
    )
    say(f"the model is in {folder / 'model'}, as Hugging Face keeps a Llama")
