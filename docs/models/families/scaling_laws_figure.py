"""Draw scaling_laws.svg: the two parts of the loss, at one budget.

Run it with Python after any change; a test compares the two.
"""

from pathlib import Path

from warpmap.models.families.scaling_laws import BESIROGLU

FIGURE = Path(__file__).with_name("scaling_laws.svg")
BUDGET = 5.76e23
SIZES = (7e9, 20e9, 72e9, 200e9, 700e9)
LEFT, WIDTH, TOP, ROW, BAR = 128, 500, 118, 82, 50
SIZE = 'fill="var(--wm-area)"'
DATA = 'fill="currentColor" fill-opacity="0.22"'


def svg() -> str:
    """The figure: bars of what is lost above E, size by size."""
    law = BESIROGLU
    rows = []
    for N in SIZES:
        D = BUDGET / 6 / N
        rows.append((N, law.A * N**-law.alpha, law.B * D**-law.beta))
    most = max(size + data for _, size, data in rows)
    height = TOP + ROW * len(rows)
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 720 {height}" role="img" font-family="inherit" '
        'font-size="26" fill="currentColor">',
        "  <title>Loss above E for five sizes at one budget: too small and "
        "too large both lose, 72 billion parameters lose least</title>",
        f'  <rect x="20" y="10" width="24" height="24" rx="3" {SIZE}/>',
        '  <text x="54" y="32">too few parameters</text>',
        f'  <rect x="340" y="10" width="24" height="24" rx="3" {DATA}/>',
        '  <text x="374" y="32">too few tokens</text>',
        '  <text x="20" y="84" fill="var(--wm-muted)">size</text>',
        f'  <text x="{LEFT}" y="84" fill="var(--wm-muted)">'
        "loss above E, nats a token</text>",
    ]
    best = min(size + data for _, size, data in rows)
    for i, (N, size, data) in enumerate(rows):
        y = TOP + ROW * i
        weight = ' font-weight="700"' if size + data == best else ""
        a, b = WIDTH * size / most, WIDTH * data / most
        lines += [
            f'  <text x="20" y="{y + 34}"{weight}>{N / 1e9:.0f}B</text>',
            f'  <rect x="{LEFT}" y="{y}" width="{a:.1f}" height="{BAR}" '
            f'rx="3" {SIZE}/>',
            f'  <rect x="{LEFT + a:.1f}" y="{y}" width="{b:.1f}" '
            f'height="{BAR}" rx="3" {DATA}/>',
            f'  <text x="{LEFT + a + b + 10:.1f}" y="{y + 34}"{weight}>'
            f"{size + data:.2f}</text>",
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    FIGURE.write_bytes(svg().encode())
