"""Draw ``house_model.svg``: bits a byte of the models and of compressors.

Run it with Python after any change of the record; a test compares the two.
"""

import json
from pathlib import Path

ROOT = Path(__file__).parents[3]
RECORD = ROOT / "docs/records/h200/training/pretraining/pretraining.json"
# kind of row, its name in the record, what to call it, has it read the library?
BARS = [
    ("baseline", "gzip -9", "gzip -9", False),
    ("baseline", "xz -9e", "xz -9e", False),
    ("baseline", "4-grams of the same tokens", "4-grams", True),
    ("baseline", "xz -9e, after the training files", "xz -9e", True),
    ("model", "draft", "draft", True),
    ("model", "target", "target", True),
]
LEFT, UNIT, ROW, HEIGHT = 136, 300, 56, 38
HEADS = ("read nothing before", "read the training files before")


def svg() -> str:
    """The figure: a bar for each, in two groups."""
    rows = json.loads(RECORD.read_text("utf-8"))["rows"]
    bits = {
        (r["what"], r["name"]): r["held_out_bits_a_byte"]
        for r in rows
        if "held_out_bits_a_byte" in r
    }
    parts, y, group = [], 60, None
    for what, name, label, has_read in BARS:
        if has_read != group:
            y += 24 if has_read else 0
            parts.append(
                f'  <text x="16" y="{y + 26}" fill="var(--wm-muted)">'
                f"{HEADS[has_read]}</text>"
            )
            y, group = y + 44, has_read
        ours, value = what == "model", bits[what, name]
        width = UNIT * value
        fill = 'fill="var(--wm-area)"' if ours else 'fill-opacity="0.3"'
        bold = ' font-weight="600"' if ours else ""
        parts.append(
            f'  <text x="{LEFT - 14}" y="{y + 28}" text-anchor="end"{bold}>'
            f"{label}</text>\n"
            f'  <rect x="{LEFT}" y="{y}" width="{width:.1f}" '
            f'height="{HEIGHT}" rx="3" {fill}/>\n'
            f'  <text x="{LEFT + width + 12:.1f}" y="{y + 28}"{bold}>'
            f"{value:.2f}</text>"
        )
        y += ROW
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {y}" '
            'role="img" font-family="inherit" font-size="26" '
            'fill="currentColor">',
            "  <title>Bits that each predictor needs for a byte of the "
            "held-out files; the house models need the fewest</title>",
            '  <text x="16" y="34" font-weight="600">bits a byte, held-out '
            "files</text>",
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_name("house_model.svg").write_text(svg(), "utf-8")
