"""Draw deepseek_v3.svg: one layer of DeepSeek-V3, area for weights.

Run it with Python after any change; a test compares the two.
"""

from pathlib import Path

from warpmap.models.configs import config
from warpmap.models.families.deepseek_v3 import mla_matrices
from warpmap.models.foundations.parameter_count import gated_ffn

MODEL = config("DeepSeek-V3")
COLUMNS, PITCH, SIDE = 16, 26.5, 22.5
LEFT, TOP, RIGHT = 20, 66, 482
CHOSEN = {19, 23, 44, 90, 117, 200, 213, 250}  # any will do


def square(x: float, y: float, weights: int, style: str) -> str:
    """A square whose area is a number of weights."""
    expert = gated_ffn(MODEL.hidden_size, MODEL.moe_intermediate_size)
    side = SIDE * (weights / expert) ** 0.5
    return (
        f'  <rect x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" '
        f'height="{side:.1f}" rx="{2 if side > 8 else 0}" {style}/>'
    )


def svg() -> str:
    """The figure: all routed experts, and what every token meets."""
    assert len(CHOSEN) == MODEL.experts_per_token
    expert = gated_ffn(MODEL.hidden_size, MODEL.moe_intermediate_size)
    waiting = 'fill="currentColor" fill-opacity="0.13"'
    runs = 'fill="var(--wm-area)"'
    rows = MODEL.experts // COLUMNS
    height = TOP + rows * PITCH + 14
    moe_layers = MODEL.layers - MODEL.dense_layers
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 720 {height:.0f}" role="img" font-family="inherit" '
        'font-size="26" fill="currentColor">',
        "  <title>Weights of one layer of DeepSeek-V3, to scale</title>",
        f'  <text x="{LEFT}" y="36"><tspan font-weight="600">One of '
        f"{moe_layers} layers,</tspan> area for weights</text>",
    ]
    for i in range(MODEL.experts):
        x = LEFT + i % COLUMNS * PITCH
        y = TOP + i // COLUMNS * PITCH
        lines.append(square(x, y, expert, runs if i in CHOSEN else waiting))
    attention = sum(mla_matrices(MODEL).values())
    router = MODEL.experts * MODEL.hidden_size
    notes = [
        (f"{MODEL.experts} experts,", f"{expert / 1e6:.0f}M each", 0),
        ("8 are chosen", "", expert),
        ("1 is shared", "", expert),
        ("router", f"{router / 1e6:.1f}M", router),
        ("attention", f"{attention / 1e6:.0f}M", attention),
    ]
    y = float(TOP)
    for name, size, weights in notes:
        if weights:
            lower = 2 if weights >= expert else 11
            lines.append(square(RIGHT, y + lower, weights, runs))
        inset = RIGHT + (58 if weights else 0)
        lines.append(f'  <text x="{inset}" y="{y + 23:.1f}">{name}</text>')
        if size:
            lines.append(
                f'  <text x="{inset}" y="{y + 55:.1f}" '
                f'fill="var(--wm-muted)">{size}</text>'
            )
        y += 98 if size else 66
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("deepseek_v3.svg").write_bytes(svg().encode())
