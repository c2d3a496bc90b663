"""Draw normalization.svg: the gradient of each layer, norm before or after.

Run it with Python after any change; a test compares the two.
"""

import math
from pathlib import Path

from warpmap.models.foundations.normalization import gradient_norms

FIGURE = Path(__file__).with_name("normalization.svg")
LAYERS = 64
LEFT, RIGHT, TOP, BOTTOM = 104, 700, 78, 440
LOW, HIGH = 1, 6  # powers of ten


def svg() -> str:
    """The figure: two lines over the layers, on a logarithmic scale."""

    def path(placement: str) -> str:
        points = []
        for i, norm in enumerate(gradient_norms(placement, LAYERS)):
            x = LEFT + (RIGHT - LEFT) * i / (LAYERS - 1)
            up = (math.log10(norm) - LOW) / (HIGH - LOW)
            points.append(f"{x:.1f} {BOTTOM - (BOTTOM - TOP) * up:.1f}")
        return "M" + " L".join(points)

    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 530" '
        'role="img" font-family="inherit" font-size="26" '
        'fill="currentColor">',
        "  <title>Gradient of each of 64 layers: with the norm after the "
        "sum it falls by a factor of thousands from the first layer to the "
        "last, with the norm before the sublayer by 27</title>",
        '  <text x="20" y="36" fill="var(--wm-muted)">'
        "size of the gradient</text>",
    ]
    for power in range(LOW, HIGH + 1):
        y = BOTTOM - (BOTTOM - TOP) * (power - LOW) / (HIGH - LOW)
        lines += [
            f'  <path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="var(--wm-line)" '
            'stroke-width="1.5"/>',
            f'  <text x="20" y="{y + 9:.1f}" fill="var(--wm-muted)">10'
            f'<tspan dy="-9" font-size="18">{power}</tspan></text>',
        ]
    for layer in (1, 16, 32, 48, 64):
        x = LEFT + (RIGHT - LEFT) * (layer - 1) / (LAYERS - 1)
        anchor = {1: "start", 64: "end"}.get(layer, "middle")
        lines.append(
            f'  <text x="{x:.1f}" y="478" text-anchor="{anchor}" '
            f'fill="var(--wm-muted)">{layer}</text>'
        )
    lines += [
        f'  <text x="{(LEFT + RIGHT) // 2}" y="516" text-anchor="middle" '
        'fill="var(--wm-muted)">layer</text>',
        f'  <path d="{path("post")}" fill="none" stroke="var(--wm-area)" '
        'stroke-width="5" stroke-linejoin="round"/>',
        f'  <path d="{path("pre")}" fill="none" stroke="currentColor" '
        'stroke-width="5" stroke-linejoin="round"/>',
        '  <text x="390" y="190" fill="var(--wm-area)" font-weight="600">'
        "norm after the sum</text>",
        '  <text x="120" y="408" font-weight="600">'
        "norm before the sublayer</text>",
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FIGURE.write_bytes(svg().encode())
