"""The command ``warpmap``, as typed in a terminal."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from made_up import ROOT, write_repository

SOFTMAX = "kernels/basics/softmax"
ROPE = "kernels/basics/rope"
TOPICS = {
    SOFTMAX: {},
    "inference/cache/softmax_cache": {},
    ROPE: {"builds_on": SOFTMAX, "runs_on": "cpu, gpu"},
    "models/basics/rope": {"builds_on": ROPE},
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    root = tmp_path_factory.mktemp("clone")
    write_repository(root, TOPICS)
    return root


def warpmap(folder, *words, src=ROOT / "src", **env):
    return subprocess.run(
        [sys.executable, "-m", "warpmap_site.cli", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(src), "COLUMNS": "80", **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def refusal(done):
    """The one line that a mistake is answered with."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    return done.stderr.strip()


def test_the_script_is_installed():
    script = Path(sys.executable).parent / "warpmap"
    done = subprocess.run(
        [script, "--version"], capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"warpmap \d+\.\d+\.\d+\n", done.stdout)


@pytest.mark.slow
def test_every_command_says_what_it_does(clone):
    overview = warpmap(clone, "--help").stdout
    names = re.findall(
        r"^  (\w+) {2,}\w", overview.partition("Commands:")[2], re.M
    )
    assert {"list", "show", "path", "run", "serve"} <= set(names)
    for name in names:
        help_text = warpmap(clone, name, "--help").stdout
        about = help_text.split("\n\n")[1]
        assert about.strip().endswith(".")
        for line in re.findall(r"^  (?:-|TOPIC|topic)\S*.*", help_text, re.M):
            assert len(line.split()) > 2, line


# -- list, show, path ----------------------------------------------------------


def test_list_names_every_topic_under_its_area(clone):
    said = warpmap(clone, "list").stdout
    assert re.findall(r"^  (\S+)", said, re.M) == [
        SOFTMAX,
        ROPE,
        "models/basics/rope",
        "inference/cache/softmax_cache",
    ]
    assert said.startswith("Kernels: What are kernels?\n")


def test_list_of_one_area(clone):
    said = warpmap(clone, "list", "--area", "models").stdout
    assert re.findall(r"^  (\S+)", said, re.M) == ["models/basics/rope"]
    assert "no area 'modelz'" in refusal(
        warpmap(clone, "list", "--area", "modelz")
    )


def test_show_says_what_a_page_says(clone):
    said = warpmap(clone, "show", ROPE).stdout
    assert said.startswith("Rope\nWhat this topic is for")
    facts = re.findall(r"^(\w+(?: on| to)?) +(.+)", said, re.M)
    assert ("Builds on", SOFTMAX) in facts
    assert ("Leads to", "models/basics/rope") in facts
    assert ("Runs on", "CPU") in facts
    assert ("Files", f"docs/{ROPE}.md") in facts
    assert f"snippets/{ROPE}.py" in said


def test_path_lists_what_comes_before_in_order(clone):
    said = warpmap(clone, "path", "models/basics/rope").stdout
    assert re.findall(r"\d  (\S+)", said) == [
        SOFTMAX,
        ROPE,
        "models/basics/rope",
    ]


def test_a_map_with_a_mistake_is_said_without_a_traceback(tmp_path):
    write_repository(tmp_path, {SOFTMAX: {"kind": "poem"}})
    done = warpmap(tmp_path, "list")
    assert done.returncode == 1
    assert "softmax.md: kind:" in done.stderr
    assert "Traceback" not in done.stderr


# -- naming a topic ------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        SOFTMAX,
        "softmax",
        "basics/softmax",
        "Softmax/",
        f"docs/{SOFTMAX}.md",
        f"./snippets/{SOFTMAX}.py",
    ],
)
def test_a_topic_has_many_names(clone, name):
    assert warpmap(clone, "run", name).stdout == "42\n"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("sofmax", f"'sofmax'; near: inference/cache/softmax_cache, {SOFTMAX}"),
        ("cache", "'cache'; near: inference/cache/softmax_cache"),
        ("rope", f"'rope' may be {ROPE} or models/basics/rope"),
        ("quicksort", "'quicksort'; see: warpmap list"),
        ("../../etc", "see: warpmap list"),
    ],
)
@pytest.mark.parametrize("command", ["show", "path", "run"])
def test_a_name_that_is_not_clear_is_answered_with_names(
    clone, command, name, says
):
    assert refusal(warpmap(clone, command, name)).endswith(says)


def test_the_shell_completes_topics(clone):
    def completed(words):
        done = warpmap(
            clone,
            _WARPMAP_COMPLETE="complete_bash",
            COMP_WORDS=words,
            COMP_CWORD=str(len(words.split(" ")) - 1),
        )
        return sorted(done.stdout.split())

    assert completed("warpmap run so") == ["softmax", "softmax_cache"]
    # `rope` alone would not be clear
    assert completed("warpmap show ro") == []
    assert completed("warpmap path kernels/") == [ROPE, SOFTMAX]
    assert completed("warpmap list --area mo") == ["models"]


# -- run -----------------------------------------------------------------------


def test_run_passes_the_exit_code_on(tmp_path):
    write_repository(tmp_path, {SOFTMAX: {}})
    (tmp_path / f"snippets/{SOFTMAX}.py").write_text(
        "import sys; print('so far'); sys.exit(7)"
    )
    done = warpmap(tmp_path, "run", "softmax")
    assert (done.returncode, done.stdout, done.stderr) == (7, "so far\n", "")


def test_run_needs_nothing_of_the_site(clone):
    block = (
        "import sys; sys.modules.update(dict.fromkeys("
        "['mkdocs', 'yaml', 'pybtex', 'markdown', 'jieba', 'torch']));"
        "from warpmap_site.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", block, "run", "softmax"],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr


@pytest.mark.slow
def test_run_starts_several_processes(tmp_path):
    write_repository(tmp_path, {SOFTMAX: {"runs_on": "cpu, multi-gpu"}})
    (tmp_path / f"snippets/{SOFTMAX}.py").write_text(
        "import os\n"
        'says = f\'{os.environ["RANK"]} of {os.environ["WORLD_SIZE"]}\\n\'\n'
        "os.write(1, says.encode())  # in one piece"
    )
    done = warpmap(tmp_path, "run", "softmax")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        f"{rank} of 4" for rank in range(4)
    ]


# -- where it is run -----------------------------------------------------------


def test_a_clone_is_found_from_a_folder_inside(clone):
    assert warpmap(clone / "docs/kernels", "run", "softmax").stdout == "42\n"


@pytest.mark.parametrize(
    "words", [["list"], ["show", "a"], ["path", "a"], ["run", "a"], ["serve"]]
)
def test_outside_a_clone_one_line_says_so(tmp_path, words):
    installed = tmp_path / "lib"
    for package in ("warpmap", "warpmap_site"):  # as a wheel has them
        shutil.copytree(ROOT / "src" / package, installed / package)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    says = refusal(warpmap(elsewhere, *words, src=installed))
    assert says.startswith("warpmap: this is no clone of Warpmap")


def test_without_typer_one_line_says_what_to_install(clone):
    block = "import sys; sys.modules['typer'] = None; import warpmap_site.cli"
    done = subprocess.run(
        [sys.executable, "-c", block],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "warpmap: the command needs typer: pip install typer\n"
    )


# -- serve ---------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--port", "--kernel-port"])
def test_serve_says_that_a_port_is_in_use(clone, option):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = {"--port": "0", option: str(port)}
        if option != "--port":
            with socket.create_server(("127.0.0.1", 0)) as free:
                words["--port"] = str(free.getsockname()[1])
        done = warpmap(clone, "serve", *(w for o in words.items() for w in o))
    assert done.returncode == 1
    assert f"port {port} cannot be used" in done.stderr
    assert option in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_serve_ends_all_where_the_site_cannot_be_built(tmp_path):
    write_repository(tmp_path, {SOFTMAX: {"kind": "poem"}})
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = warpmap(tmp_path, "serve", "--port", str(port), TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert "softmax.md: kind:" in done.stderr
    assert "mkdocs ended by itself, exit code 1" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.glob("warpmap-*")) == []


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_serve_leaves_no_process_behind(clone, tmp_path, number):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "warpmap_site.cli", "serve"]
    command += ["--no-browser", "--port", str(port)]
    process = subprocess.Popen(
        command,
        cwd=clone,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "TMPDIR": str(tmp_path),
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            said = [process.stdout.readline() for _ in range(4)]
            assert f"http://127.0.0.1:{port}/#kernel=" in said[1]
            children = subprocess.run(
                ["ps", "-o", "pid=", "--ppid", str(process.pid)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()
            assert len(children) == 2
            process.send_signal(getattr(signal, number))
            assert process.wait(20) == 0
        finally:
            process.kill()  # a failure must not wait for it
    for pid in children:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    assert list(tmp_path.glob("warpmap-*")) == []
