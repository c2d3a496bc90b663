"""Draw ``training_stability.svg``: Adam's steps after a gradient jumps."""

import math
from pathlib import Path

LEFT, RIGHT, BOTTOM, UNIT = 70, 700, 370, 46  # a step of lr is 46 high
FIRST, LAST = -12, 48


def step_size(age: int, beta2: float) -> float:
    """Step over ``lr`` after ``age`` steps of a new, far larger gradient."""
    if age < 1:
        return 0.0
    return (1 - 0.9**age) / math.sqrt(1 - beta2**age)


def x_of(age: int) -> float:
    """Where a step lies."""
    return LEFT + (RIGHT - LEFT) * (age - FIRST) / (LAST - FIRST)


def curve(beta2: float) -> str:
    """Points of a line."""
    points = (
        f"{x_of(age):.1f} {BOTTOM - UNIT * step_size(age, beta2):.1f}"
        for age in range(FIRST, LAST + 1)
    )
    return "M" + "L".join(points)


def svg() -> str:
    """The whole figure."""
    grid = "".join(
        f'<path d="M{LEFT} {BOTTOM - UNIT * n}H{RIGHT}" '
        'stroke="var(--wm-line)" stroke-width="1.5"/>'
        f'<text x="{LEFT - 14}" y="{BOTTOM - UNIT * n + 9}" '
        f'text-anchor="end">{n}</text>'
        for n in (0, 1, 3, 5, 7)
    )
    jump = x_of(0)
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 530" role="img" \
font-family="inherit" font-size="26" fill="currentColor">
  <title>After a jump of the gradient Adam's steps grow to 6.6 lr with beta2 \
0.999 and to 1.1 lr with 0.95</title>
  {grid}
  <text x="{LEFT}" y="28">step / learning rate</text>
  <path d="{curve(0.999)}" fill="none" stroke="var(--wm-area)" \
stroke-width="4" stroke-linejoin="round"/>
  <path d="{curve(0.95)}" fill="none" stroke="currentColor" \
stroke-width="3" stroke-linejoin="round"/>
  <text x="{RIGHT}" y="110" text-anchor="end" fill="var(--wm-area)" \
font-weight="600">β₂ = 0.999</text>
  <text x="{RIGHT}" y="304" text-anchor="end">β₂ = 0.95</text>
  <path d="M{LEFT} 500H{jump:.1f}V440H{RIGHT}" fill="none" \
stroke="var(--wm-muted)" stroke-width="3"/>
  <text x="{RIGHT}" y="480" text-anchor="end" fill="var(--wm-muted)">\
the gradient</text>
</svg>
"""


if __name__ == "__main__":
    Path(__file__).with_name("training_stability.svg").write_text(
        svg(), "utf-8"
    )
