"""Measured numbers: made by a topic's benchmark, shown by a fence.

A topic that was measured has ``benchmarks/<topic>.py`` with ``cases()``, which
``warpmap_site.harness`` compares, or ``rows()``, which measures by itself.
What is found is written with the machine, the versions, the commit and a hash
of the code to ``docs/records/<machine>/<topic>.json``.

Only the standard library: the machines that measure use this too.
"""

import datetime
import hashlib
import html
import importlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warpmap.chart import Axis, Line, LineChart
from warpmap_site.charts import number, svg
from warpmap_site.comparisons import comparison_html
from warpmap_site.sources import Files

PEERS = (
    "quack-kernels",
    "liger-kernel",
    "flash-linear-attention",
    "flash-attn-4",
    "flashinfer-python",
    "cut-cross-entropy",
)


def commit(root: Path) -> str:
    """The commit of a clone: ``WARPMAP_COMMIT`` where there is no ``.git``.

    Returns:
        A short hash, with ``-dirty`` where code differs from it; "unknown"
        where there is neither.
    """
    if given := os.environ.get("WARPMAP_COMMIT"):
        return given
    git = ["git", "-C", str(root)]
    head = subprocess.run(
        [*git, "rev-parse", "--short=10", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    if head.returncode:
        return "unknown"
    code = ("src", "snippets", "tests", "benchmarks")
    dirty = subprocess.run(
        [*git, "status", "--porcelain", *code],
        capture_output=True,
        text=True,
        check=True,
    )
    return head.stdout.strip() + ("-dirty" if dirty.stdout else "")


def machine() -> dict[str, str]:
    """The GPUs that PyTorch sees, the driver, and versions."""
    import torch

    gpus = Counter(
        torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
    )
    about = {
        "gpu": ", ".join(f"{n} x {g}" if n > 1 else g for g, n in gpus.items()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    try:
        import triton

        about["triton"] = triton.__version__
    except ModuleNotFoundError:
        pass
    if gpus:
        about["cuda"] = torch.version.cuda or "none"
        about["driver"] = _ask_driver("driver_version")
        about["power_limit"] = _ask_driver("power.limit")
        identity = _ask_driver("uuid").encode()  # tells cards apart
        about["card"] = hashlib.sha256(identity).hexdigest()[:8]
    return about


def _ask_driver(what: str) -> str:
    """What ``nvidia-smi`` says of the first GPU; "unknown" without it."""
    try:
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return "unknown"
    return (said.stdout.splitlines() or ["unknown"])[0].strip()


def _clocks() -> str:
    """The multiprocessors' clock and what the card draws, now."""
    return _ask_driver("clocks.sm,power.draw")


def peers() -> dict[str, str]:
    """What kernels are compared with, and which version is installed."""
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def now() -> str:
    """Date and minute in UTC, as records carry it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")


def folder_of(gpu: str) -> str:
    """The folder in ``docs/records`` of a machine, from its GPUs' names.

    Examples:
        >>> folder_of("NVIDIA H200")
        'h200'
        >>> folder_of("4 x NVIDIA H100 80GB HBM3")
        'h100-80gb-hbm3-x4'
    """
    count, _, name = gpu.rpartition(" x ")
    name = re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia "))
    return f"{name}-x{count}" if count else name


def digest(root: Path, topic: str) -> str:
    """A short hash of what a measurement rests on: module and benchmark."""
    return Files(root, topic).digest("module", "cuda", "benchmark")


def run_benchmark(root: Path, topic: str, quick: bool) -> list[dict[str, Any]]:
    """The rows that a topic's benchmark finds on this machine.

    Args:
        root: The repository.
        topic: ``<area>/<section>/<topic>``.
        quick: Whether fewer rounds do, where implementations are compared.

    Raises:
        LookupError: If the topic has no benchmark.
        RuntimeError: If PyTorch sees no GPU, or a result is wrong.
    """
    file = Files(root, topic).benchmark
    if not file.exists():
        raise LookupError(f"{topic} has no benchmark: no {file}")
    if not machine()["gpu"]:
        raise RuntimeError("a benchmark needs an NVIDIA GPU; none is seen")
    if str(root) not in sys.path:  # its processes must import it too
        sys.path.insert(0, str(root))
    module = importlib.import_module(f"benchmarks.{topic.replace('/', '.')}")
    if hasattr(module, "rows"):
        rows: list[dict[str, Any]] = module.rows()
        return rows
    from warpmap_site.harness import ROUNDS, compare

    return compare(module.cases(), rounds=7 if quick else ROUNDS)


def measure(root: Path, topic: str) -> Path:
    """Run a topic's benchmark on this machine and write its record.

    Args:
        root: The repository.
        topic: ``<area>/<section>/<topic>``.

    Returns:
        The record's file.

    Raises:
        LookupError: If the topic has no benchmark.
        RuntimeError: If PyTorch sees no GPU. Nothing is written then, nor when
            the benchmark raises.
    """
    date, before = now(), _clocks()
    rows = run_benchmark(root, topic, quick=False)
    about = machine()
    record = {
        "date": date,
        "commit": commit(root),
        "command": f"warpmap bench {topic}",
        "digest": digest(root, topic),
        "machine": about,
        "clocks": {"before": before, "after": _clocks()},
        "peers": peers(),
        "rows": rows,
    }
    where = root / "docs/records" / folder_of(about["gpu"]) / f"{topic}.json"
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return where


@dataclass(frozen=True)
class Record:
    """A record as it was written, and whether its code is still the same."""

    rows: list[dict[str, Any]]
    machine: dict[str, str]
    date: str
    commit: str
    command: str
    stale: bool

    @property
    def where(self) -> str:
        """Machine, versions, day, commit and command in one line."""
        about = self.machine
        versions = f"torch {about['torch'].split('+')[0]}"
        if "triton" in about:
            versions += f", Triton {about['triton']}"
        return (
            f"{about['gpu']}, CUDA {about['cuda']}, driver {about['driver']}, "
            f"{versions}; {self.date[:10]}, commit {self.commit}; "
            f"repeat it with `{self.command}`"
        )


def load_record(root: Path, name: str) -> Record:
    """Read ``docs/records/<name>.json``, for example ``h200/<topic>``.

    Raises:
        LookupError: If there is no such record.
    """
    file = root / "docs/records" / f"{name}.json"
    if not file.is_file():
        raise LookupError(f"there is no record {name}: measure it first")
    found = json.loads(file.read_text("utf-8"))
    topic = name.partition("/")[2]
    return Record(
        rows=found["rows"],
        machine=found["machine"],
        date=found["date"],
        commit=found["commit"],
        command=found["command"],
        stale=found["digest"] != digest(root, topic),
    )


def _chosen(record: Record, only: dict[str, str]) -> list[dict[str, Any]]:
    rows = [
        row
        for row in record.rows
        if all(str(row.get(key)) == value for key, value in only.items())
    ]
    if not rows:
        raise LookupError(f"no row of the record has {only}")
    return rows


def table(record: Record, columns: dict[str, str], **only: str) -> str:
    """Rows of a record as an HTML table.

    Args:
        record: What was measured.
        columns: Heading by key, in the order shown.
        only: Shows the rows that have these values.

    Raises:
        LookupError: If no row is left, or a key is in none of them.
    """
    rows = _chosen(record, only)
    for key in columns:
        if not any(key in row for row in rows):
            raise LookupError(
                f"no row has {key}; they have {', '.join(rows[0])}"
            )
    numeric = {
        key: all(isinstance(row.get(key, 0), int | float) for row in rows)
        for key in columns
    }

    def cells(tag: str, texts: dict[str, str]) -> str:
        return "".join(
            f"<{tag}{' class=wm-n' if numeric[key] else ''}>"
            f"{html.escape(text)}</{tag}>"
            for key, text in texts.items()
        )

    body = "".join(
        f"<tr>{cells('td', {k: number(row.get(k, '')) for k in columns})}</tr>"
        for row in rows
    )
    # with a class Material does not wrap it in another box that scrolls
    return (
        '<div class="wm-record-table" tabindex=0 role="group" '
        f'aria-label="Measured"><table class="wm-rows"><thead><tr>'
        f"{cells('th', columns)}</tr>"
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def _pairs(text: str) -> dict[str, str]:
    """``"a = Heading, b = Other"`` as a dictionary."""
    pairs = {}
    for part in text.split(","):
        key, equals, value = (p.strip() for p in part.partition("="))
        if not equals:
            raise LookupError(f"expected 'key = heading', got {part.strip()!r}")
        pairs[key] = value
    return pairs


def _axis(text: str) -> Axis:
    label = text.strip()
    return Axis(label.removesuffix("(log)").strip(), label.endswith("(log)"))


def chart(record: Record, text: str, **only: str) -> LineChart:
    """Columns of a record over another one.

    Args:
        record: What was measured.
        text: ``title; x = its label; y's label; a = Name, b = Name``; a label
            that ends with ``(log)`` makes its axis logarithmic.
        only: Draws the rows that have these values.

    Raises:
        LookupError: If the text has another form, or a line has no point.
    """
    parts = text.split(";")
    if len(parts) != 4:
        raise LookupError(f"expected title; x = label; label; lines: {text}")
    title, x, y, lines = parts
    ((x_key, x_label),) = _pairs(x).items()
    rows = _chosen(record, only)
    drawn = [
        Line(
            name,
            [(r[x_key], r[key]) for r in rows if key in r and x_key in r],
        )
        for key, name in _pairs(lines).items()
    ]
    if empty := [line.name for line in drawn if not line.points]:
        raise LookupError(f"no row of the record has a point of {empty}")
    return LineChart(title.strip(), _axis(x_label), _axis(y), drawn)


def record_html(root: Path, text: str) -> str:
    """The ``record`` fence: a table of a record, with a chart if one is asked.

    Args:
        root: The repository.
        text: The record's name, perhaps with ``key=value`` that chooses rows;
            lines ``table: key = Heading, ...`` and ``chart: ...``, or
            ``compare: key = Heading`` for what the harness compared; a
            caption.

    Raises:
        LookupError: If the record, a key or a row does not exist.
    """
    first, *lines = text.splitlines()
    name, *chosen = first.split()
    only = dict(part.split("=", 1) for part in chosen)
    record = load_record(root, name)
    shown, caption = "", []
    for line in lines:
        key, _, value = line.partition(":")
        if key == "table":
            shown += table(record, _pairs(value), **only)
        elif key == "chart":
            shown += svg(chart(record, value, **only))
        elif key == "compare":
            ((column, heading),) = _pairs(value).items()
            shown += comparison_html(_chosen(record, only), column, heading)
        else:
            caption.append(line)
    stale = (
        '<span class="wm-record-stale">The code has changed since.</span> '
        if record.stale
        else ""
    )
    where = re.sub(r"`(.*)`", r"<code>\1</code>", html.escape(record.where))
    return (
        f'<figure class="wm-record">{shown}<figcaption>'
        f"{html.escape(' '.join(caption))} "
        f'<span class="wm-where">{stale}{where}.</span></figcaption></figure>'
    )
