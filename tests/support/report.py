"""The report that pages show: which topics passed, where and when.

A pytest plugin. A topic is in the report when at least one of its tests,
doctests or snippets ran and none failed, with the hash of the files it ran.
A topic of which none ran keeps what an earlier run said of it.
"""

import json
from collections import Counter
from pathlib import Path

from warpmap_site.records import commit, machine, now
from warpmap_site.reports import passed_digest
from warpmap_site.sources import topic_of

ROOT = Path(__file__).parents[2]


class Report:
    def __init__(self, path):
        self.path = Path(path)
        self.passed = Counter()
        self.failed = set()

    def pytest_runtest_logreport(self, report):
        file = report.nodeid.split("::")[0]
        if file == "tests/test_snippets.py" and "[" in report.nodeid:
            name = report.nodeid.split("[")[1].rstrip("]")
            file = f"snippets/{name}.py"
        topic = topic_of(file)
        if topic is None:
            return
        if report.failed:
            self.failed.add(topic)
        elif report.when == "call" and report.passed:
            self.passed[topic] += 1

    def pytest_sessionfinish(self):
        old = {"runs": {}, "topics": {}}
        if self.path.exists():
            old = json.loads(self.path.read_text("utf-8"))
        date = now()
        runs = {
            **old["runs"],
            date: {"commit": commit(ROOT), "machine": machine()},
        }
        topics = {
            topic: entry
            for topic, entry in old["topics"].items()
            if topic not in self.passed.keys() | self.failed
        }
        for topic in self.passed.keys() - self.failed:
            topics[topic] = {
                "run": date,
                "passed": self.passed[topic],
                "source": passed_digest(ROOT, topic),
            }
        used = {entry["run"] for entry in topics.values()}
        report = {
            "runs": {d: runs[d] for d in sorted(used)},
            "topics": dict(sorted(topics.items())),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(report, indent=2) + "\n")
