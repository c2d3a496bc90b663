"""Cells: what the browser gets to run, and the same snippet as a notebook."""

import ast
import contextlib
import io
import json
import shutil
import subprocess
import sys
import zipfile

import nbformat
import pytest
from building import ROOT, build
from made_up import write_repository

from warpmap_site import worker
from warpmap_site.browser import archive, members
from warpmap_site.fences import Fences
from warpmap_site.loading import load_atlas
from warpmap_site.notebooks import notebook
from warpmap_site.sources import Files

ATLAS = load_atlas(ROOT)
TOPICS = [t for t in ATLAS.topics.values() if t.meta.kind != "survey"]
PURE = [t for t in TOPICS if "browser" in t.meta.runs_on]
PATH = "kernels/basics/softmax"


def topic_of_repository(root, **front_matter):
    write_repository(root, {PATH: front_matter})
    return load_atlas(root).topics[PATH]


# -- the archive ---------------------------------------------------------------


def test_everything_in_the_archive_imports_with_the_standard_library(tmp_path):
    zipfile.ZipFile(io.BytesIO(archive(ROOT, ATLAS))).extractall(tmp_path)
    modules = [
        p.relative_to(tmp_path).with_suffix("").as_posix().replace("/", ".")
        for p in sorted(tmp_path.rglob("*.py"))
    ]
    assert "warpmap_site.worker" in modules
    blocked = ["torch", "numpy", "triton", "pydantic", "yaml", "pygments"]
    code = (
        "import importlib, sys\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        f"sys.modules.update(dict.fromkeys({blocked}))\n"
        f"for module in {modules}: importlib.import_module(module)\n"
        "import warpmap, warpmap_site\n"
        f"for package in (warpmap, warpmap_site):\n"
        f"    assert package.__file__.startswith({str(tmp_path)!r})\n"
    )
    # without the folders of this environment
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_archive_holds_the_topics_of_the_browser_and_no_others():
    held = members(ROOT, ATLAS)
    for topic in PURE:
        assert f"warpmap/{topic.path}.py" in held
    assert "warpmap/kernels/normalization/softmax.py" not in held


def test_archive_holds_what_topics_and_pages_need(tmp_path):
    topic_of_repository(tmp_path, runs_on="browser")
    package = tmp_path / "src/warpmap"
    (package / "kernels/shared.py").write_text("import warpmap.deep.er\n")
    (package / "deep").mkdir()
    for name in ("deep/__init__.py", "deep/er.py", "chart.py", "torchy.py"):
        (package / name).write_text("")
    (package / "deep/data.json").write_text("{}")
    module = Files(tmp_path, PATH).module
    module.write_text(
        "def f():\n    from warpmap.kernels import shared\n    return shared\n"
    )
    held = set(members(tmp_path, load_atlas(tmp_path)))
    assert {name for name in held if name.startswith("warpmap/")} == {
        "warpmap/__init__.py",
        "warpmap/chart.py",
        "warpmap/deep/__init__.py",
        "warpmap/deep/data.json",
        "warpmap/deep/er.py",
        "warpmap/kernels/__init__.py",
        "warpmap/kernels/basics/__init__.py",
        "warpmap/kernels/basics/softmax.py",
        "warpmap/kernels/shared.py",
    }


def test_archive_holds_what_a_calculator_calls(tmp_path):
    topic_of_repository(tmp_path, runs_on="gpu")
    assert f"warpmap/{PATH}.py" not in members(tmp_path, load_atlas(tmp_path))
    page = Files(tmp_path, PATH).page
    called = f"warpmap.{PATH.replace('/', '.')}.double"
    page.write_text(f"{page.read_text()}\n```calculator\n{called}\n```\n")
    assert f"warpmap/{PATH}.py" in members(tmp_path, load_atlas(tmp_path))


@pytest.mark.slow
def test_archive_and_notebooks_are_the_same_bytes_each_time(tmp_path):
    assert archive(ROOT, ATLAS) == archive(ROOT, ATLAS)
    assert notebook(ROOT, TOPICS[0]) == notebook(ROOT, TOPICS[0])


# -- running -------------------------------------------------------------------


def run(code):
    """What a program printed, by stream, and its traceback."""
    printed = {"stdout": "", "stderr": ""}

    def send(stream, text):
        printed[stream] += text

    traceback = worker.run(code, send)
    return printed["stdout"], printed["stderr"], traceback


def test_runs_share_no_names():
    assert run("x = 1\nprint(__name__)") == ("__main__\n", "", "")
    assert "NameError: name 'x' is not defined" in run("x")[2]


def test_main_is_there_for_dataclasses():
    code = (
        "import dataclasses, sys\n"
        "@dataclasses.dataclass\nclass A:\n    x: 'int'\n"
        "print(A(1), sys.modules['__main__'].A is A)"
    )
    assert run(code)[0] == "A(x=1) True\n"
    assert sys.modules["__main__"].__dict__.get("A") is None


def test_output_comes_in_order_and_without_a_last_newline():
    parts = []
    code = (
        "import sys\n"
        "print('a')\nprint('b', file=sys.stderr)\nprint('c', end='')"
    )
    worker.run(code, lambda *part: parts.append(part))
    assert parts == [("stdout", "a\n"), ("stderr", "b\n"), ("stdout", "c")]


def test_traceback_has_only_the_readers_frames():
    _, _, traceback = run(
        "import json\n\ndef f(text):\n    return json.loads(text)\n\nf('{')\n"
    )
    assert traceback.splitlines()[:5] == [
        "Traceback (most recent call last):",
        '  File "cell.py", line 6, in <module>',
        "    f('{')",
        *traceback.splitlines()[3:5],
    ]
    assert "    return json.loads(text)" in traceback
    assert "json/" not in traceback
    assert "worker.py" not in traceback


def test_chained_errors_keep_only_the_readers_frames():
    _, _, traceback = run("try:\n    int('x')\nexcept ValueError:\n    1 / 0")
    assert "During handling of the above exception" in traceback
    assert traceback.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("x = (", "SyntaxError: '(' was never closed"),
        ("input('name?')", "RuntimeError: nobody can answer input() here"),
        ("import torchless", "No module named 'torchless' in the browser"),
        ("def f(): f()\nf()", "RecursionError"),
        ("while True: print('x' * 99)", "more than 100,000 characters printed"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ],
)
def test_error_is_readable(code, says):
    _, _, traceback = run(code)
    assert says in traceback
    assert "worker.py" not in traceback


@pytest.mark.parametrize(
    ("code", "printed"),
    [("0", ""), ("", ""), ("'no data'", "no data\n"), ("3", "exit status 3\n")],
)
def test_exit_ends_a_run_without_a_traceback(code, printed):
    assert run(f"print(1)\nraise SystemExit({code})") == ("1\n", printed, "")


def test_call_takes_arguments_by_name_or_in_order():
    def value(*call):
        return json.loads(worker.call(*call))

    assert value("math", "comb", "[5, 2]") == {"value": 10}
    assert value("textwrap", "shorten", '{"text": "a  b", "width": 9}') == {
        "value": "a b"
    }
    error = value("math", "sqrt", "[-1]")["error"]
    assert error["type"] == "ValueError"
    assert value("nowhere", "f", "[]")["error"]["type"] == "ModuleNotFoundError"
    # what JSON cannot hold is an error, not a page that breaks
    assert "error" in value("math", "log", "[Infinity]")


# -- notebooks -----------------------------------------------------------------


@pytest.mark.parametrize("topic", TOPICS, ids=lambda t: t.path)
def test_notebook_is_valid_and_holds_the_whole_snippet(topic):
    made = nbformat.reads(notebook(ROOT, topic), as_version=4)
    nbformat.validate(made)
    code = "\n".join(c.source for c in made.cells if c.cell_type == "code")
    snippet = ast.parse(Files(ROOT, topic.path).snippet.read_text("utf-8"))
    if "multi-gpu" in topic.meta.runs_on:
        code = code.split("\n", 1)[1].rsplit("\n", 1)[0]
        assert "!torchrun" in made.cells[-1].source
    assert ast.dump(ast.parse(code)) == ast.dump(
        ast.Module(snippet.body[1:], type_ignores=[])
    )


@pytest.mark.parametrize("topic", PURE, ids=lambda t: t.path)
def test_each_cell_of_a_notebook_prints_its_output(topic):
    names = {}
    for cell in json.loads(notebook(ROOT, topic))["cells"]:
        if cell["cell_type"] == "code":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec("".join(cell["source"]), names)
            promised = "".join("".join(o["text"]) for o in cell["outputs"])
            said = [line.rstrip() for line in out.getvalue().splitlines()]
            assert said == [line.rstrip() for line in promised.splitlines()]


def test_notebook_installs_the_package_from_the_deployers_repository():
    def second(source_url):
        cells = json.loads(notebook(ROOT, PURE[0], source_url))["cells"]
        return "".join(cells[1]["source"])

    git = "%pip install --quiet git+https://{}@1a2b"
    assert second("https://github.com/a/b/blob/1a2b") == git.format(
        "github.com/a/b"
    )
    assert second("https://host/a/b/-/blob/1a2b") == git.format("host/a/b")
    assert "%pip" not in second("")


# -- the panel -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("runs_on", "says"),
    [
        ("cpu, browser", ""),
        ("cpu", "Runs on your machine"),
        ("cpu, gpu", "Runs on your GPU"),
        ("cpu, multi-gpu", f"warpmap run {PATH}"),
    ],
)
def test_cell_says_where_it_runs_otherwise(tmp_path, runs_on, says):
    topic = topic_of_repository(tmp_path, runs_on=runs_on)
    cell = Fences(tmp_path, topics={PATH: topic}).cell(f"snippets/{PATH}.py")
    assert ("wm-elsewhere" in cell) == bool(says)
    assert says in cell
    assert f'data-runs="{runs_on.replace(",", "")}"' in cell


def test_cell_links_to_its_notebook_and_to_colab_only_where_configured(
    tmp_path,
):
    topic = topic_of_repository(tmp_path)
    colab = "https://colab.example/github/a/b/blob/pages/notebooks"
    file = f"snippets/{PATH}.py"
    plain = Fences(tmp_path, topics={PATH: topic}).cell(file)
    linked = Fences(tmp_path, "", {PATH: topic}, colab).cell(file)
    assert f'href="../../../notebooks/{PATH}.ipynb" download' in plain
    assert "Colab" not in plain
    assert f'href="{colab}/{PATH}.ipynb"' in linked


def test_site_holds_notebooks_and_archive(site):
    for topic in TOPICS:
        assert (site / f"notebooks/{topic.path}.ipynb").is_file()
    assert zipfile.is_zipfile(site / "assets/modules.zip")


@pytest.mark.slow
def test_site_builds_without_a_bundle(tmp_path):
    write_repository(tmp_path, {PATH: {"runs_on": "browser"}})
    package = tmp_path / "bare/warpmap_site"
    shutil.copytree(
        ROOT / "src/warpmap_site",
        package,
        ignore=shutil.ignore_patterns("bundle"),
    )
    config = tmp_path / "mkdocs.yml"
    theme = str(ROOT / "src/warpmap_site/theme")
    text = config.read_text("utf-8")
    assert theme in text
    config.write_text(text.replace(theme, str(package / "theme")), "utf-8")
    done = build(tmp_path, tmp_path / "site", PYTHONPATH=str(package.parent))
    assert done.returncode == 0, done.stderr
    page = (tmp_path / f"site/{PATH}/index.html").read_text("utf-8")
    assert "wm-python" not in page
    assert "assets/bundle/" not in page
