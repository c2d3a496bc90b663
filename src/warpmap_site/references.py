"""The papers of ``docs/references.bib``, rendered for a page."""

from functools import cache
from pathlib import Path

from pybtex.database import Entry, parse_file


@cache
def _parse(file: Path, changed: float) -> dict[str, Entry]:
    return dict(parse_file(str(file), bib_format="bibtex").entries)


def load_references(file: Path) -> dict[str, Entry]:
    """All papers by key.

    Args:
        file: A BibTeX file; one that does not exist holds no paper.

    Returns:
        Entries by key, read again only when the file has changed.
    """
    return _parse(file, file.stat().st_mtime) if file.exists() else {}


def render(entry: Entry) -> str:
    """One paper as a line of Markdown: authors, year, title, where, link."""
    people = [
        " ".join([*p.prelast_names, *p.last_names])
        for p in entry.persons.get("author", [])
    ]
    authors = f"{people[0]} et al." if len(people) > 3 else " and ".join(people)
    fields = {k.lower(): _plain(v) for k, v in entry.fields.items()}
    link = fields.get("url", "")
    if "doi" in fields:
        link = f"https://doi.org/{fields['doi']}"
    if "eprint" in fields:
        link = f"https://arxiv.org/abs/{fields['eprint']}"
    title = f"[{fields['title']}]({link})" if link else f"*{fields['title']}*"
    where = fields.get("journal") or fields.get("booktitle")
    where = where or fields.get("publisher") or fields.get("institution") or ""
    tail = f" {where}." if where and "arxiv" not in where.lower() else ""
    return f"{authors}, {fields['year']}. {title}.{tail}"


def _plain(text: str) -> str:
    return " ".join(text.replace("{", "").replace("}", "").split())
