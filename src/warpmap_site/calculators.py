"""The ``calculator`` fence: a function as a form with its results.

All of it is made at build time with the function's defaults, so it reads
without a script. With one, ``calculator.ts`` calls ``forms.evaluate`` again.
"""

import html
from collections.abc import Mapping
from typing import Any

from warpmap_site.forms import (
    Form,
    FormError,
    describe,
    evaluate,
    find,
    form_html,
    prose,
)


def calculator_html(text: str) -> str:
    """A calculator as HTML.

    Args:
        text: A function's dotted name; then lines ``chart: <function>`` and
            ``<label>: <presets>``, names of the function's module.

    Raises:
        FormError: If a name does not exist or the function makes no form;
            names the file and the mend.
    """
    function, *lines = (line.strip() for line in text.strip().splitlines())
    form = describe(find(function))
    if not form.results:
        raise FormError(
            f"{function} returns no dataclass; mend: let it return a frozen "
            "one, with its fields described under Attributes:"
        )
    module = function.rpartition(".")[0]
    chart, menus = "", {}
    for line in lines:
        label, _, name = (part.strip() for part in line.partition(":"))
        if not name:
            raise FormError(f"expected 'label: name' in a line, got {line!r}")
        found = find(f"{module}.{name}")
        if label == "chart":
            chart = name
        elif isinstance(found, Mapping):
            menus[label] = found
        else:
            raise FormError(
                f"{module}.{name} is no dictionary; mend: make it one of "
                "{name: {argument: value}}"
            )
    answer = evaluate(function, {}, chart)
    if "error" in answer:
        raise FormError(
            f"{function} refuses its own defaults: {answer['error']}"
        )
    chosen = html.escape(chart)
    path = module.removeprefix("warpmap.").replace(".", "/")
    link = f' href="../../../reference/{path}/#{function}"'  # a page's depth
    if "/_" in path:  # a private module has no reference page
        link = ""
    drawn = _chart(answer) if chart else ""
    return (
        f'<section class="wm-calculator" data-chart="{chosen}" '
        f'aria-label="Calculator: {form.name}">'
        f'<p class="wm-bar"><span class="wm-file"><a{link}>'
        f'{form.name}</a></span><span class="wm-summary">'
        f"{prose(form.summary)}</span></p>"
        f"{form_html(form, menus)}"
        f'<div class="wm-answer">{_results(form, answer)}{drawn}</div>'
        "</section>"
    )


def _results(form: Form, answer: Mapping[str, Any]) -> str:
    rows = ""
    for result, value in zip(form.results, answer["results"], strict=True):
        note = html.escape(value["note"])
        rows += (
            f'<tr data-result="{result.name}"><th scope="row">'
            f'<span class="wm-name">{result.name}</span>'
            f'<span class="wm-help">{prose(result.help)}</span></th>'
            f'<td><span class="wm-value">{html.escape(value["text"])}</span>'
            f'<span class="wm-unit">{value["unit"]}</span>'
            f'<span class="wm-note">{note}</span></td></tr>'
        )
    return (
        f'<table class="wm-results"><caption class="wm-sr">Results of '
        f"{form.name}</caption><tbody>{rows}</tbody></table>"
    )


def _chart(answer: Mapping[str, Any]) -> str:
    head, *rows = answer["table"]
    titles = "".join(f"<th scope=col>{html.escape(t)}</th>" for t in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(t)}</td>" for t in row) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wm-chart">{answer["svg"]}</div>'
        '<details class="wm-chart-data"><summary>Numbers of the chart'
        f'</summary><div tabindex=0 role="group" aria-label="Table">'
        f"<table><thead><tr>{titles}</tr></thead>"
        f"<tbody>{body}</tbody></table></div></details>"
    )
