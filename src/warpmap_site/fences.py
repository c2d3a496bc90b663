"""The Markdown fences: code by symbol, a snippet as a cell, a figure, ...

Each is an ordinary function from a fence's text to HTML. A name that does not
exist raises, which ends the build.
"""

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import CudaLexer, PythonLexer
from pymdownx.superfences import SuperFencesException

from warpmap_site import cells
from warpmap_site.atlas import Topic
from warpmap_site.calculators import calculator_html
from warpmap_site.comparisons import scoreboard_html
from warpmap_site.records import record_html
from warpmap_site.sources import find_symbol, split_snippet, topic_of
from warpmap_site.traces import trace_html

_FORMAT = HtmlFormatter(cssclass="highlight", wrapcode=True)


def python(code: str) -> str:
    """Highlighted Python, with the classes that the site's CSS colours."""
    return highlight(code, PythonLexer(), _FORMAT)


@dataclass(frozen=True)
class Fences:
    """The fences, bound to a repository.

    Args:
        root: The repository.
        source_url: Where its files can be read on the web, or "".
        topics: Topics by their path.
        colab_url: Where Colab finds the notebooks of the built site, or "".
    """

    root: Path
    source_url: str = ""
    topics: Mapping[str, Topic] = field(default_factory=dict)
    colab_url: str = ""

    def superfences(self) -> list[dict[str, Any]]:
        """What ``pymdownx.superfences`` takes as ``custom_fences``."""
        return [
            {"name": name, "class": "", "format": self._fence(render)}
            for name, render in (
                ("source", self.source),
                ("cell", self.cell),
                ("figure", self.figure),
                ("record", self.record),
                ("calculator", calculator_html),
                ("trace", trace_html),
                ("scoreboard", self.scoreboard),
            )
        ]

    def _fence(self, render: Callable[[str], str]) -> Callable[..., str]:
        def fence(source: str, language: str, *_: Any, **__: Any) -> str:
            try:
                return render(source.strip())
            except Exception as error:  # else superfences hides it
                says = str(error)
                if not isinstance(error, LookupError | OSError):
                    says = f"{type(error).__name__}: {says}"
                raise SuperFencesException(f"```{language}: {says}") from error

        return fence

    def source(self, names: str) -> str:
        """The source of symbols, one dotted name a line, in one panel."""
        symbols = [
            find_symbol(self.root, n.strip()) for n in names.splitlines()
        ]
        if len({symbol.file for symbol in symbols}) > 1:
            raise LookupError(f"{names.split()} are not of one module")
        file = symbols[0].file.relative_to(self.root).as_posix()
        code = "\n\n\n".join(symbol.code for symbol in symbols)
        name = names.splitlines()[0].strip()
        cuda = file.endswith(".cu")
        path = file.removeprefix("src/warpmap/").removesuffix(".py")
        link = f"../../../reference/{path}/"  # a topic's page is three deep
        if "._" not in name:  # the reference shows what is public
            link += f"#{name}"
        first = min(symbol.first_line for symbol in symbols)
        last = max(symbol.last_line for symbol in symbols)
        if "/_" in path or cuda:  # these have no reference page
            link = ""
        if self.source_url:
            link = f"{self.source_url}/{file}#L{first}-L{last}"
        return self._panel(
            file,
            link,
            highlight(code, CudaLexer(), _FORMAT) if cuda else python(code),
            f"{file}, lines {first} to {last}",
        )

    def cell(self, file: str) -> str:
        """A snippet that the tests run, with the output they compare."""
        code, output = split_snippet((self.root / file).read_text("utf-8"))
        link = f"{self.source_url}/{file}" if self.source_url else ""
        topic = self.topics.get(topic_of(file) or "")
        body = python(code) + (cells.controls(topic) if topic else "")
        return self._panel(
            file,
            link,
            body + cells.output(output),
            file,
            "wm-cell",
            cells.links(topic, self.colab_url) if topic else "",
        )

    def figure(self, text: str) -> str:
        """An SVG put into the page, so that it takes the page's colours.

        The first line names the file from ``docs``, the rest is the caption.
        """
        name, _, caption = text.partition("\n")
        svg = (self.root / "docs" / name.strip()).read_text("utf-8")
        return (
            f'<figure class="wm-figure">{svg}'
            f"<figcaption>{html.escape(caption.strip())}</figcaption></figure>"
        )

    def record(self, text: str) -> str:
        """Measured numbers as a table, perhaps with a chart."""
        return record_html(self.root, text)

    def scoreboard(self, _: str) -> str:
        """Every kernel that was compared, in its worst case."""
        titles = {path: topic.title for path, topic in self.topics.items()}
        return scoreboard_html(self.root, titles)

    def _panel(
        self,
        file: str,
        link: str,
        body: str,
        says: str,
        css: str = "",
        links: str = "",
    ) -> str:
        says = html.escape(says)
        name = f'<a href="{link}">{says}</a>' if link else says
        return (
            f'<div class="wm-code {css}" data-file="{html.escape(file)}">'
            f'<div class="wm-bar"><span class="wm-file">{name}</span>{links}'
            '<button class="wm-copy" type="button" hidden>Copy</button></div>'
            f"{body}</div>"
        )
