"""Draw interconnects.svg: what is left of a link's figure at each step.

Run it with Python after any change; a test compares the two.
"""

from pathlib import Path

from warpmap.hardware.network.interconnects import LINKS, transfer

FIGURE = Path(__file__).with_name("interconnects.svg")
SHOWN = {"PCIe 5.0 x16": 1, "NVLink 4, H100 and H200": 0}
LEFT, WIDTH, ROW, GROUP = 20, 680, 82, 62


def steps(name: str, has_line_code: int) -> list[tuple[str, float]]:
    """Labels and GB/s, from the figure on the box to the data."""
    link = transfer(**LINKS[name])
    rows = [
        ("both directions, as sold", 2 * link.raw_gb_s),
        ("one direction", link.raw_gb_s),
    ]
    if has_line_code:
        rows.append(("after the line code", link.link_gb_s))
    rows.append(("after packet headers", link.payload_gb_s))
    return rows


def svg() -> str:
    """The figure; within a link, lengths are in proportion."""
    lines, y = [], 34
    for name, has_line_code in SHOWN.items():
        rows = steps(name, has_line_code)
        title = name.partition(",")[0].replace(" x16", ", 16 lanes")
        lines.append(
            f'  <text x="{LEFT}" y="{y}" font-size="30" '
            f'font-weight="600">{title}</text>'
        )
        y += 40
        for at, (label, rate) in enumerate(rows):
            shown = f"{rate:.1f}".removesuffix(".0")
            length = WIDTH * rate / rows[0][1]
            opacity = "1" if at == len(rows) - 1 else "0.3"
            lines += [
                f'  <text x="{LEFT}" y="{y}">{shown} GB/s'
                f'<tspan dx="14" fill="var(--wm-muted)">{label}</tspan>'
                "</text>",
                f'  <rect x="{LEFT}" y="{y + 12}" width="{length:.1f}" '
                f'height="24" rx="3" fill="var(--wm-area)" '
                f'opacity="{opacity}"/>',
            ]
            y += ROW
        y += GROUP - 40
    head = [
        '<svg xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 720 {y - GROUP + 20}" role="img" '
        'font-family="inherit" font-size="26" fill="currentColor">',
        "  <title>Of 128 GB/s of PCIe 5.0, 57.6 are data in one direction; "
        "of 900 GB/s of NVLink 4, 423.5</title>",
    ]
    return "\n".join([*head, *lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    FIGURE.write_bytes(svg().encode())
