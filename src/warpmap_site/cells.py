"""What a snippet's panel has beside its code: notebooks, Run, the output."""

import html

from warpmap_site.atlas import Topic


def links(topic: Topic, colab_url: str) -> str:
    """The same snippet as a notebook; they need no script.

    Args:
        topic: The snippet's topic.
        colab_url: Where Colab finds the notebooks of the built site, or "".
    """
    name = f"{topic.path}.ipynb"
    # a topic's page is three deep
    made = f'<a href="../../../notebooks/{name}" download>Notebook</a>'
    if colab_url:
        where = html.escape(f"{colab_url.rstrip('/')}/{name}")
        made += f'<a href="{where}">Colab</a>'
    return made


def controls(topic: Topic) -> str:
    """Buttons that the script shows, and how to run it elsewhere.

    ``cell.ts`` takes the second away where the first work.
    """
    places = topic.meta.runs_on
    elsewhere = ""
    if "multi-gpu" in places:
        command = f"warpmap run {topic.path}"
        elsewhere = f"Runs as several processes: <code>{command}</code>"
    elif "browser" not in places:
        whose = "GPU" if "gpu" in places else "machine"
        elsewhere = f"Runs on your {whose}: start <code>warpmap serve</code>"
    if elsewhere:
        elsewhere = (
            f'<p class="wm-elsewhere">{elsewhere} in a clone of the '
            "repository.</p>"
        )
    return (
        f'<div class="wm-run" data-runs="{" ".join(places)}"'
        " data-search-exclude hidden>"
        '<button class="wm-go" type="button">Run</button>'
        '<button class="wm-edit" type="button">Edit</button>'
        '<button class="wm-reset" type="button" hidden>Reset</button>'
        '<select class="wm-runner" aria-label="Where to run" hidden></select>'
        '<span class="wm-progress"></span>'
        '<span class="wm-said" role="status" aria-live="polite"></span>'
        f"</div>{elsewhere}"
    )


def output(text: str) -> str:
    """What the snippet printed when the tests ran it."""
    return (
        '<div class="wm-output"><span class="wm-output-label">Output</span>'
        f"<pre tabindex=0>{html.escape(text)}</pre></div>"
    )
