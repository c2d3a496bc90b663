"""A loss spike made on purpose, with one guard after another.

The model and the run are those of the tests, with more steps. Three batches of
random tokens come at step 200. The sweep has no noise, but larger and larger
learning rates.
"""

import math
import statistics
from typing import Any

from warpmap.training.foundations._spike import Settings, Step, train

GUARDS: dict[str, dict[str, Any]] = {
    "none": {},
    "beta2 = 0.95": {"beta2": 0.95},
    "clip at 1": {"clip": 1.0},
    "clip at 0.1": {"clip": 0.1},
    "eps = 1e-3": {"eps": 1e-3},
    "QK-norm": {"qk_norm": True},
    "z-loss, 0.01": {"z_weight": 0.01},
}
KEYS = {
    "none": "none_loss",
    "beta2 = 0.95": "beta2_loss",
    "clip at 1": "clip_1_loss",
    "clip at 0.1": "clip_01_loss",
}
RATES = (0.003, 0.01, 0.03, 0.1)


def _mean(values: list[float]) -> float:
    return round(statistics.fmean(values), 3)


def _curves(runs: dict[str, list[Step]], first: int) -> list[dict[str, Any]]:
    return [
        {
            "kind": "curve",
            "step": step,
            **{k: round(runs[n][step].loss, 3) for n, k in KEYS.items()},
        }
        for step in range(first - 20, first + 80)
        # what the noise itself costs is no one's fault
        if not first <= step < first + 3
    ]


def _guards(runs: dict[str, list[Step]], first: int) -> list[dict[str, Any]]:
    found = []
    for name, run in runs.items():
        calm, after = run[first - 20 : first], run[first + 3 :]
        found.append(
            {
                "kind": "guard",
                "guard": name,
                "before": _mean([s.loss for s in calm]),
                "peak": round(max(s.loss for s in after), 3),
                "next_20": _mean([s.loss for s in after[:20]]),
                "end": _mean([s.loss for s in after[-20:]]),
                "norm_before": _mean([s.norm for s in calm]),
                "far_percent": round(
                    100 * max(s.far for s in run[first : first + 20]), 1
                ),
                "log_z": _mean([s.log_z for s in calm]),
            }
        )
    return found


def _rates() -> list[dict[str, Any]]:
    found = []
    for lr in RATES:
        row: dict[str, Any] = {"kind": "rate", "lr": lr}
        for key, qk_norm in (("plain", False), ("qk_norm", True)):
            run = train(
                Settings(lr=lr, qk_norm=qk_norm, steps=250, noise_steps=0)
            )
            row[f"{key}_loss"] = _mean([s.loss for s in run[-50:]])
            row[f"{key}_score"] = round(max(s.score for s in run), 1)
        found.append(row)
    return found


def rows() -> list[dict[str, Any]]:
    """Train with each guard, and at each learning rate.

    Returns:
        Rows of three kinds: ``curve``, ``guard`` and ``rate``.

    Raises:
        RuntimeError: If a loss is not finite, or no spike came about.
    """
    settings = Settings()
    first = settings.noise_from
    runs = {name: train(Settings(**set_)) for name, set_ in GUARDS.items()}
    if not all(math.isfinite(s.loss) for run in runs.values() for s in run):
        raise RuntimeError("a loss is not finite")
    guards = _guards(runs, first)
    if guards[0]["peak"] < 2 * guards[0]["before"]:
        raise RuntimeError("the noise left no spike")
    return [*_curves(runs, first), *guards, *_rates()]
