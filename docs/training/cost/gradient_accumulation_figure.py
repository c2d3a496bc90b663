"""Draw gradient_accumulation.svg: how far three sums are off, by their length.

Run it with Python after any change; a test compares the two.
"""

import math
import random
from pathlib import Path

from warpmap.hardware.gpu.number_formats import (
    BF16,
    FP32,
    Format,
    decode,
    encode,
)

PIECES = [2**n for n in range(10)]
WEIGHTS = 64
LEFT, RIGHT, TOP, BOTTOM = 96, 700, 56, 410
LOW, HIGH = -8, -1  # powers of ten
NAMES = {
    "bf16": ("sum in bf16", -16),
    "fp32": ("bf16 gradients, sum in fp32", 38),
    "fused": ("product adds in fp32", 58),
}


def rounded(form: Format, x: float) -> float:
    """The nearest number of a format."""
    return decode(form, encode(form, x))


def errors() -> dict[str, list[float]]:
    """Error of each sum after 1, 2, 4, ... pieces, as a share of its norm."""
    rng = random.Random(0)
    signal = [rng.uniform(-1, 1) for _ in range(WEIGHTS)]
    exact = [0.0] * WEIGHTS
    sums = {name: [0.0] * WEIGHTS for name in NAMES}
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for done in range(1, PIECES[-1] + 1):
        for i in range(WEIGHTS):
            # what all pieces agree on, and what they do not
            gradient = signal[i] + rng.uniform(-2, 2)
            exact[i] += gradient
            short = rounded(BF16, gradient)
            sums["bf16"][i] = rounded(BF16, sums["bf16"][i] + short)
            sums["fp32"][i] = rounded(FP32, sums["fp32"][i] + short)
            sums["fused"][i] = rounded(FP32, sums["fused"][i] + gradient)
        if done in PIECES:
            norm = math.dist(exact, [0.0] * WEIGHTS)
            for name, total in sums.items():
                found[name].append(math.dist(total, exact) / norm)
    return found


def _x(pieces: float) -> float:
    return LEFT + (RIGHT - LEFT) * math.log2(pieces) / (len(PIECES) - 1)


def _y(error: float) -> float:
    share = (math.log10(error) - LOW) / (HIGH - LOW)
    return BOTTOM - (BOTTOM - TOP) * share


def svg() -> str:
    """The figure: error over the number of micro-batches."""
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 490" '
        'role="img" font-family="inherit" font-size="26" fill="currentColor">',
        "  <title>Errors of three sums of gradients</title>",
        '  <text x="12" y="30" fill="var(--wm-muted)">'
        "error, as a share of the sum</text>",
    ]
    for power in range(LOW, HIGH, 2):
        y = _y(10.0**power)
        label = "1%" if power == -2 else f"10<tspan dy='-9'>−{-power}</tspan>"
        size = 26 if power == -2 else 22
        lines += [
            f'  <path d="M{LEFT} {y:.1f} H{RIGHT}" stroke="var(--wm-line)" '
            'stroke-width="2"/>',
            f'  <text x="{LEFT - 14}" y="{y + 9:.1f}" text-anchor="end" '
            f'font-size="{size}" fill="var(--wm-muted)">{label}</text>',
        ]
    for pieces in (1, 8, 64, 512):
        anchor = "end" if pieces == 512 else "middle"
        lines.append(
            f'  <text x="{_x(pieces):.1f}" y="{BOTTOM + 34}" '
            f'text-anchor="{anchor}" fill="var(--wm-muted)">{pieces}</text>'
        )
    lines.append(
        f'  <text x="{RIGHT}" y="{BOTTOM + 70}" text-anchor="end" '
        'fill="var(--wm-muted)">micro-batches</text>'
    )
    for name, found in errors().items():
        label, offset = NAMES[name]
        points = [
            f"{_x(n):.1f} {_y(e):.1f}"
            for n, e in zip(PIECES, found, strict=True)
        ]
        ink = "currentColor" if name == "bf16" else "var(--wm-area)"
        dash = ' stroke-dasharray="10 7"' if name == "fp32" else ""
        lines += [
            f'  <path d="M{" L".join(points)}" fill="none" stroke="{ink}" '
            f'stroke-width="3"{dash}/>',
            f'  <text x="{RIGHT}" y="{_y(found[-1]) + offset:.1f}" '
            f'text-anchor="end" fill="{ink}">{label}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    path = Path(__file__).with_name("gradient_accumulation.svg")
    path.write_bytes(svg().encode())
