"""Draw pretraining.svg: two losses of the snippet, beside what can be reached.

Run it with Python after any change; a test compares the two, and ``LEARNED``
and ``BY_HEART`` with a run of the snippet.
"""

from pathlib import Path

from warpmap.training.pretraining._markov import branching_source

EVERY = 4
"""Steps that a number is the mean of."""

LEARNED = """
    2.15 1.79 1.40 1.19 1.14 1.13 1.12 1.12 1.10 1.09
    1.05 1.01 0.89 0.88 0.82 0.78 0.80 0.75 0.74 0.68
    0.70 0.66 0.65 0.66 0.61 0.60 0.61 0.68 0.61 0.58
"""
BY_HEART = """
    2.15 1.78 1.41 1.10 0.96 0.87 0.76 0.65 0.52 0.41
    0.32 0.26 0.21 0.18 0.15
"""

LEFT, RIGHT, TOP, BOTTOM = 62, 700, 56, 436
STEPS, HIGHEST, LOWEST = 120, 2.3, 0.1
RATE = 540  # where the learning rate is 0
WARMUP, DECAY = 10, 30


def x_of(step: float) -> float:
    """Where a step lies."""
    return LEFT + (RIGHT - LEFT) * step / STEPS


def y_of(loss: float) -> float:
    """Where a loss lies."""
    return TOP + (BOTTOM - TOP) * (HIGHEST - loss) / (HIGHEST - LOWEST)


def curve(losses: str) -> str:
    """Points of a line, each in the middle of its steps."""
    points = (
        f"{x_of(EVERY * (i + 0.5)):.0f} {y_of(float(loss)):.0f}"
        for i, loss in enumerate(losses.split())
    )
    return "M" + "L".join(points)


def svg() -> str:
    """The whole figure."""
    source = branching_source(branches=3)
    levels = [
        ("sees nothing", source.best_loss(context=0), -10),
        ("sees one token", source.best_loss(context=1), -10),
        ("knows the source", source.floor(64), 32),
    ]
    lines = "".join(
        f'<path d="M{LEFT} {y_of(loss):.0f}H{RIGHT}" stroke="var(--wm-muted)" '
        'stroke-width="1.5" stroke-dasharray="6 5"/>'
        f'<text x="{LEFT - 10}" y="{y_of(loss) + 9:.0f}" text-anchor="end">'
        f"{loss:.1f}</text>"
        f'<text x="{RIGHT}" y="{y_of(loss) + below:.0f}" text-anchor="end" '
        f'fill="var(--wm-muted)">{name}</text>'
        for name, loss, below in levels
    )
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 570" role="img" \
font-family="inherit" font-size="26" fill="currentColor">
  <title>The loss on fresh text falls in steps towards the best that can be \
reached; on repeated text it falls through</title>
  <text x="0" y="26">loss, nats a token</text>
  {lines}
  <path d="{curve(LEARNED)}" fill="none" stroke="var(--wm-area)" \
stroke-width="4" stroke-linejoin="round"/>
  <path d="{curve(BY_HEART)}" fill="none" stroke="currentColor" \
stroke-width="3" stroke-linejoin="round"/>
  <text x="{x_of(62):.0f}" y="{y_of(0.89):.0f}" fill="var(--wm-area)" \
font-weight="600">fresh text</text>
  <text x="{LEFT + 8}" y="{y_of(0.33):.0f}">the same</text>
  <text x="{LEFT + 8}" y="{y_of(0.14):.0f}">batch again</text>
  <path d="M{LEFT} {RATE}L{x_of(WARMUP):.0f} {RATE - 50}\
H{x_of(STEPS - DECAY):.0f}L{RIGHT} {RATE}" fill="none" \
stroke="var(--wm-muted)" stroke-width="3" stroke-linejoin="round"/>
  <text x="{x_of(WARMUP) + 14:.0f}" y="{RATE - 8}" fill="var(--wm-muted)">\
learning rate, 120 steps</text>
</svg>
"""


if __name__ == "__main__":
    Path(__file__).with_name("pretraining.svg").write_text(svg(), "utf-8")
