"""Draw parallelism_planner.svg: 1F1B with its bubbles, by the schedule itself.

Run it with Python after any change; a test compares the two.
"""

from pathlib import Path

from warpmap.training.parallel_practice._one_forward_one_backward import (
    schedule,
)

STAGES, MICRO_BATCHES = 4, 4
LEFT, WIDTH, TOP, ROW, BAR = 20, 680, 64, 66, 52
FILL = {
    "F": 'fill="var(--wm-area)" fill-opacity="0.3"',
    "B": 'fill="var(--wm-area)"',
}


def svg() -> str:
    """The figure: a lane for each stage."""
    works = schedule(STAGES, MICRO_BATCHES)
    end = max(work.end for work in works)
    unit = WIDTH / end
    height = TOP + ROW * STAGES + 6
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 720 {height}" role="img" font-family="inherit" '
        'font-size="26" fill="currentColor">',
        "  <title>Four stages, four micro-batches, and their bubbles</title>",
    ]
    for x, key, label in ((20, "F", "forward"), (190, "B", "backward")):
        lines += [
            f'  <rect x="{x}" y="12" width="22" height="22" rx="3" '
            f"{FILL[key]}/>",
            f'  <text x="{x + 30}" y="32">{label}</text>',
        ]
    lines += [
        '  <rect x="376" y="13" width="20" height="20" rx="3" fill="none" '
        'stroke="var(--wm-muted)" stroke-width="1.5" '
        'stroke-dasharray="4 4"/>',
        '  <text x="406" y="32">bubble</text>',
    ]
    for stage in range(STAGES):
        y = TOP + ROW * stage
        lines.append(
            f'  <rect x="{LEFT}" y="{y}" width="{WIDTH}" height="{BAR}" '
            'rx="3" fill="none" stroke="var(--wm-muted)" '
            'stroke-width="1.5" stroke-dasharray="4 4"/>'
        )
        for work in works:
            if work.stage != stage:
                continue
            x = LEFT + work.start * unit
            width = (work.end - work.start) * unit
            ink = "currentColor" if work.kind == "F" else "var(--wm-paper)"
            lines += [
                # the ground hides the dashes where a stage is at work
                f'  <rect x="{x:.1f}" y="{y - 1}" width="{width:.1f}" '
                f'height="{BAR + 2}" fill="var(--wm-paper)"/>',
                f'  <rect x="{x + 1:.1f}" y="{y}" width="{width - 2:.1f}" '
                f'height="{BAR}" rx="3" {FILL[work.kind]}/>',
                f'  <text x="{x + width / 2:.1f}" y="{y + 35}" fill="{ink}" '
                f'text-anchor="middle">{work.micro_batch + 1}</text>',
            ]
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("parallelism_planner.svg").write_bytes(
        svg().encode()
    )
