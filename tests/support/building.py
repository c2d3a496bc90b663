"""Building the site as an author does, and reading what was built."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

ROOT = Path(__file__).parents[2]


def build(repository, out, **environment):
    """``mkdocs build --strict``; returns the finished process."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--site-dir",
            out,
        ],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={
            **os.environ,
            "NO_MKDOCS_2_WARNING": "1",
            "PYTHONPATH": str(ROOT / "src"),
            **environment,
        },
    )


class Anatomy(HTMLParser):
    """The ids and addresses in one page."""

    def __init__(self, page):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if "id" in found:
            self.ids.add(found["id"])
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") != "canonical":
            self.loads.append(found.get("href"))
        elif "src" in found:
            self.loads.append(found["src"])


def dead_links(site):
    """Every address of a page that leads nowhere, as ``page -> address``."""
    pages = {p: Anatomy(p) for p in site.rglob("*.html")}
    dead = []
    for page, anatomy in pages.items():
        here = "/" + page.relative_to(site).as_posix()
        for address in {*anatomy.links, *anatomy.loads} - {None}:
            parts = urlsplit(urljoin(here, address))
            if parts.scheme or parts.netloc:
                continue  # an outside source
            target = site / unquote(parts.path).lstrip("/")
            if target.is_dir():
                target /= "index.html"
            known = pages.get(target)
            missing_anchor = (
                known
                and parts.fragment
                and "=" not in parts.fragment  # state of the map
                and unquote(parts.fragment) not in known.ids
            )
            if not target.exists() or missing_anchor:
                dead.append(f"{here} -> {address}")
    return sorted(dead)
