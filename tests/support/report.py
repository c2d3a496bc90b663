"""The report that pages show: which topics passed, where and when.

A pytest plugin. A topic is in the report when at least one of its tests,
doctests or snippets ran and none failed, with the hash of the files it ran.
"""

import datetime
import json
import os
import platform
import subprocess
from collections import Counter
from pathlib import Path

from warpmap_site.sources import Files, topic_of

ROOT = Path(__file__).parents[2]


def commit():
    """The commit: ``WARPMAP_COMMIT`` where there is no ``.git``."""
    if given := os.environ.get("WARPMAP_COMMIT"):
        return given
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run(
        [*git, "rev-parse", "--short=10", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    if head.returncode:
        return "unknown"
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "src", "snippets", "tests"],
        capture_output=True,
        text=True,
        check=True,
    )
    return head.stdout.strip() + ("-dirty" if dirty.stdout else "")


def machine():
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
    return about


class Report:
    def __init__(self, path):
        self.path = Path(path)
        self.passed = Counter()
        self.failed = set()

    def pytest_runtest_logreport(self, report):
        topic = topic_of(report.nodeid.split("::")[0])
        if topic is None and "[" in report.nodeid:  # a snippet's test
            topic = topic_of(
                f"snippets/{report.nodeid.split('[')[1].rstrip(']')}.py"
            )
        if topic is None:
            return
        if report.failed:
            self.failed.add(topic)
        elif report.when == "call" and report.passed:
            self.passed[topic] += 1

    def pytest_sessionfinish(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        now = datetime.datetime.now(datetime.UTC)
        report = {
            "date": now.isoformat(timespec="minutes"),
            "commit": commit(),
            "machine": machine(),
            "topics": {
                topic: {"passed": n, "source": Files(ROOT, topic).digest()}
                for topic, n in sorted(self.passed.items())
                if topic not in self.failed
            },
        }
        self.path.write_text(json.dumps(report, indent=2) + "\n")
