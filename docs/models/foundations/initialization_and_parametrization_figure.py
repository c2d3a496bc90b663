"""Draw initialization_and_parametrization.svg: loss by rate and width.

Run it with Python after any change; a test compares the two.
"""

import math
from pathlib import Path

from warpmap.models.foundations._width_sweep import losses_by_rate

FIGURE = Path(__file__).with_name("initialization_and_parametrization.svg")
STEPS = 16
POWERS = range(-11, -1)
WIDTHS = {16: (3, 0.4), 64: (4, 0.65), 256: (6, 1.0)}  # stroke, opacity
TOP, BOTTOM, PANEL, LEFT = 150, 520, 284, 76
HIGH = 1.2


def svg() -> str:
    """The figure: a panel a rule, a line a width, a dot at its best rate."""
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 640" '
        'role="img" font-family="inherit" font-size="26" '
        'fill="currentColor">',
        "  <title>Loss after 16 steps over the learning rate for widths 16, "
        "64 and 256: with the standard rule the best rate falls by 32, with "
        "muP it stays within a factor of two</title>",
        '  <text x="20" y="36" fill="var(--wm-muted)">width</text>',
    ]
    for i, (width, (stroke, opacity)) in enumerate(WIDTHS.items()):
        x = 110 + 150 * i
        lines += [
            f'  <path d="M{x} 27h44" stroke="var(--wm-area)" '
            f'stroke-width="{stroke}" stroke-opacity="{opacity}"/>',
            f'  <text x="{x + 56}" y="36">{width}</text>',
        ]
    for i, rule in enumerate(("standard", "muP")):
        left = LEFT + i * (PANEL + 44)
        lines.append(
            f'  <text x="{left}" y="112" font-weight="600">{rule}</text>'
        )
        for loss in (0, 0.5, 1):
            y = BOTTOM - (BOTTOM - TOP) * loss / HIGH
            lines.append(
                f'  <path d="M{left} {y:.1f}h{PANEL}" '
                'stroke="var(--wm-line)" stroke-width="1.5"/>'
            )
            if i == 0:
                lines.append(
                    f'  <text x="{left - 14}" y="{y + 9:.1f}" '
                    f'text-anchor="end" fill="var(--wm-muted)">{loss:g}</text>'
                )
        for power in (-10, -7, -4):
            lines.append(
                f'  <text x="{_x(left, power):.1f}" y="562" '
                'text-anchor="middle" fill="var(--wm-muted)">2'
                f'<tspan dy="-9" font-size="20">−{-power}</tspan></text>'
            )
        for width, (stroke, opacity) in WIDTHS.items():
            losses = losses_by_rate(
                "muP" if i else "standard",
                width,
                [2.0**p for p in POWERS],
                STEPS,
            )
            points = [
                (_x(left, p), BOTTOM - (BOTTOM - TOP) * loss / HIGH)
                for p, loss in zip(POWERS, losses, strict=True)
                if math.isfinite(loss) and loss <= HIGH
            ]
            path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            x, y = max(points, key=lambda point: point[1])
            lines += [
                f'  <path d="{path}" fill="none" stroke="var(--wm-area)" '
                f'stroke-width="{stroke}" stroke-opacity="{opacity}" '
                'stroke-linejoin="round"/>',
                f'  <circle cx="{x:.1f}" cy="{y:.1f}" r="10" '
                'fill="var(--wm-paper)" stroke="var(--wm-area)" '
                'stroke-width="4"/>',
            ]
    lines += [
        '  <text x="20" y="76" fill="var(--wm-muted)">loss after 16 steps'
        "</text>",
        f'  <text x="{LEFT + PANEL + 22}" y="612" text-anchor="middle" '
        'fill="var(--wm-muted)">learning rate, tuned at width 16</text>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _x(left: int, power: int) -> float:
    return left + PANEL * (power - POWERS[0]) / (len(POWERS) - 1)


if __name__ == "__main__":
    FIGURE.write_bytes(svg().encode())
