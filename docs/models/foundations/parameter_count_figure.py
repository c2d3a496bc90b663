"""Draw parameter_count.svg: which weights a token meets, by the module.

Run it with Python after any change; a test compares the two.
"""

from pathlib import Path

from warpmap.models.configs import config
from warpmap.models.foundations.parameter_count import count

NAMES = ["Llama 3 8B", "Mixtral 8x7B", "DeepSeek-V3", "gpt-oss 120B"]
LEFT, WIDTH, TOP, ROW, BAR = 20, 680, 72, 116, 44
STYLES = {
    "always": 'fill="var(--wm-area)"',
    "chosen": 'fill="var(--wm-area)" fill-opacity="0.5"',
    "waiting": 'fill="currentColor" fill-opacity="0.12"',
}
LEGEND = {
    "always": "every token",
    "chosen": "chosen experts",
    "waiting": "not this token",
}


def svg() -> str:
    """The figure; every bar is one model, whole."""
    height = TOP + ROW * len(NAMES)
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 720 {height}" role="img" font-family="inherit" '
        'font-size="26" fill="currentColor">',
        "  <title>Parameters that one token meets, in four models</title>",
    ]
    x = LEFT
    for key, label in LEGEND.items():
        lines += [
            f'  <rect x="{x}" y="12" width="22" height="22" rx="3" '
            f"{STYLES[key]}/>",
            f'  <text x="{x + 30}" y="32">{label}</text>',
        ]
        x += 205 if key == "always" else 242
    for row, name in enumerate(NAMES):
        n = count(config(name))
        y = TOP + ROW * row
        parts = {
            "always": n.active - n.chosen_experts,
            "chosen": n.chosen_experts,
            "waiting": n.total - n.active,
        }
        lines.append(
            f'  <text x="{LEFT}" y="{y + 22}">{name}</text>\n'
            f'  <text x="{LEFT + WIDTH}" y="{y + 22}" text-anchor="end" '
            f'fill="var(--wm-muted)">{n.active / 1e9:.3g}B of '
            f"{n.total / 1e9:.3g}B</text>"
        )
        x = float(LEFT)
        for key, size in parts.items():
            width = WIDTH * size / n.total
            if width:
                lines.append(
                    f'  <rect x="{x:.1f}" y="{y + 36}" width="{width:.1f}" '
                    f'height="{BAR}" rx="3" {STYLES[key]}/>'
                )
            x += width
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("parameter_count.svg").write_bytes(svg().encode())
