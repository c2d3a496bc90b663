"""What every test gets: a seed, poisoned memory, and an honest choice of GPU.

``--gpu N`` promises N GPUs: with fewer the run stops instead of leaving tests
out. ``--report FILE`` writes what passed, for the pages to show. ``--site
FOLDER`` names a site that was just built strictly, so that none is built.
"""

import contextlib
import random
import shutil
import sys
from pathlib import Path

import pytest
from ranks import ranks  # noqa: F401  the fixture
from report import Report


def gpu_count():
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def pytest_addoption(parser):
    parser.addoption("--gpu", type=int, default=0, metavar="N")
    parser.addoption("--report", metavar="FILE")
    parser.addoption("--site", type=Path, metavar="FOLDER")


def pytest_configure(config):
    promised = config.getoption("--gpu")
    if promised and gpu_count() < promised:
        raise pytest.UsageError(
            f"--gpu {promised} was promised, but PyTorch sees {gpu_count()}"
        )
    with contextlib.suppress(ModuleNotFoundError):
        # first, to interpret kernels: Transformers imports Triton as it is
        from warpmap.kernels import triton  # noqa: F401
    path = config.getoption("--report")
    if path and not hasattr(config, "workerinput"):  # of pytest-xdist
        config.pluginmanager.register(Report(path))


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "site" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")  # it builds the whole site
    needs = {"gpu": 1, "multi_gpu": 2}
    marked = [i for i in items if any(i.get_closest_marker(m) for m in needs)]
    seen = gpu_count() if marked else 0
    left_out = [
        item
        for item in marked
        if any(
            seen < n and item.get_closest_marker(m) for m, n in needs.items()
        )
    ]
    if not shutil.which("nvcc"):
        left_out += [i for i in items if i.get_closest_marker("nvcc")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(autouse=True)
def _seeded_and_poisoned():
    """Seed every generator; ``torch.empty`` holds NaN, not old results."""
    random.seed(0)
    if "torch" not in sys.modules:
        yield
        return
    import torch

    torch.manual_seed(0)
    # in this mode PyTorch fills new tensors with NaN
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture(scope="session")
def site(request, tmp_path_factory):
    """The site, built strictly once for all tests that read it."""
    from building import ROOT, build

    given = request.config.getoption("--site")
    if given:
        assert (given / "index.html").is_file(), f"{given} is no built site"
        return given
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    return out
