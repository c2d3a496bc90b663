"""The command ``warpmap``: the map in a terminal, and the site with a kernel.

Each command imports what it needs, so that ``run`` works where there is
nothing but PyTorch and typer.
"""

import importlib.util
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

from warpmap import __version__
from warpmap_site import launching
from warpmap_site.sources import AREAS, Files

try:
    import typer
except ModuleNotFoundError:
    sys.exit("warpmap: the command needs typer: pip install typer")

if TYPE_CHECKING:
    from warpmap_site.atlas import Atlas

app = typer.Typer(
    name="warpmap",
    help="A knowledge map of LLM systems in which every page runs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """What the script ``warpmap`` calls."""
    app(prog_name="warpmap")


def fail(message: str, code: int = 2) -> NoReturn:
    """One line on stderr, and the end."""
    typer.echo(f"warpmap: {message}", err=True)
    raise typer.Exit(code)


def the_root() -> Path:
    """The clone to work on."""
    root = launching.find_root(Path.cwd())
    if root is None:
        fail(
            "this is no clone of Warpmap: git clone it, then run warpmap in it"
        )
    return root


def the_topic(root: Path, name: str) -> str:
    """The path of the topic that the reader named."""
    try:
        return launching.find_topic(launching.topics(root), name)
    except LookupError as error:
        fail(str(error))


def the_atlas(root: Path) -> "Atlas":
    """The map; says what is missing where it cannot be read."""
    needs("docs", "pydantic", "yaml", "pybtex")
    from warpmap_site.loading import AtlasError, load_atlas

    try:
        return load_atlas(root)
    except AtlasError as error:
        fail(str(error), 1)


def needs(extra: str, *modules: str) -> None:
    """End with what to install where a module is missing."""
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        fail(
            f"this command needs {', '.join(missing)}: "
            f"pip install -e '.[{extra}]'"
        )


def complete_topic(incomplete: str) -> list[str]:
    """Names for the shell: last parts that are clear, and whole paths."""
    root = launching.find_root(Path.cwd())
    known = launching.topics(root) if root else []
    last = [path.rpartition("/")[2] for path in known]
    clear = [name for name in last if last.count(name) == 1]
    return [n for n in [*clear, *known] if n.startswith(incomplete)]


def complete_area(incomplete: str) -> list[str]:
    """Names of areas for the shell."""
    return [area for area in AREAS if area.startswith(incomplete)]


TopicName = Annotated[
    str,
    typer.Argument(
        help="A topic's path, or the last part of it.",
        autocompletion=complete_topic,
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"warpmap {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    pass


@app.command("list")
def list_topics(
    area: Annotated[
        str,
        typer.Option(
            help="Only this area.",
            autocompletion=complete_area,
        ),
    ] = "",
) -> None:
    """List the topics, area by area."""
    if area and area not in AREAS:
        fail(f"there is no area {area!r}; there are {', '.join(AREAS)}")
    atlas = the_atlas(the_root())
    width = max(map(len, atlas.topics), default=0)
    for one in atlas.areas:
        if area in ("", one.path):
            typer.echo(f"{one.meta.title}: {one.meta.question}")
            for topic in one.topics:
                typer.echo(f"  {topic.path:{width}}  {topic.title}")


@app.command()
def show(topic: TopicName) -> None:
    """Show what a topic is, what it needs, and which files it has."""
    root = the_root()
    path = the_topic(root, topic)
    atlas = the_atlas(root)
    from warpmap_site.atlas import PLACES
    from warpmap_site.reports import last_passes

    found, files = atlas.topics[path], Files(root, path)
    typer.echo(f"{found.title}\n{found.meta.description}\n")
    parts = (files.page, files.module, files.snippet, files.test)
    passes = [
        f"{p.where}: {p.tests} tests, {p.date}, {p.commit}"
        + (" (changed since)" if p.stale else "")
        for p in last_passes(root, path)
    ]
    for label, lines, none in (
        ("Runs on", [PLACES[key] for key in found.meta.runs_on], "nothing"),
        (
            "Builds on",
            [t.path for t in atlas.builds_on(found)],
            "nothing: start here",
        ),
        (
            "Leads to",
            [t.path for t in atlas.leads_to(found)],
            "nothing on the map yet",
        ),
        (
            "Files",
            [p.relative_to(root).as_posix() for p in parts if p.exists()],
            "",
        ),
        ("Passed on", passes, "no recorded machine"),
    ):
        for i, line in enumerate(lines or [none]):
            typer.echo(f"{'' if i else label:10} {line}")


@app.command("path")
def path_to(topic: TopicName) -> None:
    """List what to read before a topic, in order, and the topic itself."""
    root = the_root()
    path = the_topic(root, topic)
    atlas = the_atlas(root)
    order = [*atlas.path_to(atlas.topics[path]), atlas.topics[path]]
    width = max(len(t.path) for t in order)
    for i, step in enumerate(order, start=1):
        typer.echo(f"{i:3}  {step.path:{width}}  {step.title}")


@app.command()
def bench(
    topics: Annotated[
        list[str] | None,
        typer.Argument(
            help="Topics to measure; all that have a benchmark if none.",
            autocompletion=complete_topic,
        ),
    ] = None,
    list_only: Annotated[
        bool, typer.Option("--list", help="Only say what can be measured.")
    ] = False,
    quick: Annotated[
        bool, typer.Option(help="Few rounds, for a look: nothing is recorded.")
    ] = False,
) -> None:
    """Measure topics on this machine's GPU and write their records."""
    from warpmap_site.records import machine, measure, run_benchmark

    root = the_root()
    known = [
        path
        for path in launching.topics(root)
        if Files(root, path).benchmark.exists()
    ]
    if list_only:
        for path in known:
            typer.echo(path)
        return
    chosen = [the_topic(root, name) for name in topics or known]
    for path in chosen:
        if path not in known:
            fail(f"{path} has no benchmark; see warpmap bench --list")
    needs("gpu", "torch")
    if not machine()["gpu"]:
        fail("a benchmark needs an NVIDIA GPU; PyTorch sees none", 1)
    failed = []
    for i, path in enumerate(chosen, start=1):
        started = time.monotonic()
        typer.echo(f"[{i}/{len(chosen)}] {path}")
        try:
            if quick:
                run_benchmark(root, path, quick=True)
                written = "nothing recorded"
            else:
                written = measure(root, path).relative_to(root).as_posix()
        except Exception as error:  # the next one is measured all the same
            traceback.print_exc()
            typer.echo(f"nothing recorded: {error}")
            failed.append(path)
        else:
            seconds = time.monotonic() - started
            typer.echo(f"{written}, {seconds:.0f} s")
    if failed:
        fail(f"{len(failed)} failed: {', '.join(failed)}", 1)


@app.command()
def run(topic: TopicName) -> None:
    """Run a topic's snippet with this Python; its exit code is passed on."""
    root = the_root()
    path = the_topic(root, topic)
    file = Files(root, path).snippet
    if not file.is_file():
        fail(f"{path} has no snippet: it is a survey")
    ranks = launching.ranks_of(root, path)
    try:
        done = subprocess.run(
            launching.snippet_command(file, ranks),
            env={
                **(launching.ONE_THREAD if ranks > 1 else {}),
                **launching.environment(root),
            },
            check=False,
        )
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if done.returncode and importlib.util.find_spec("torch") is None:
        fail("there is no torch here: pip install -e '.[gpu]'", done.returncode)
    raise typer.Exit(done.returncode)


@app.command()
def train(
    model: Annotated[
        Literal["house-model"], typer.Argument(help="What to train.")
    ],
    size: Annotated[
        Literal["target", "draft", "tiny"] | None,
        typer.Option(help="By default target on a GPU, else tiny."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Keeps checkpoints and the model; build/house-SIZE if none."
        ),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="Folder of Python files to read, not Python's own library.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
) -> None:
    """Train a small model on Python's standard library.

    A run that was stopped goes on where its last checkpoint was.
    """
    needs("gpu", "torch", "safetensors")
    from warpmap_site.training import train_and_tell

    try:
        train_and_tell(size, folder, corpus, typer.echo)
    except (ValueError, ArithmeticError, OSError) as error:
        fail("\n".join([str(error), *getattr(error, "__notes__", [])]), 1)
    except KeyboardInterrupt:
        typer.echo("\nstopped; the same command goes on", err=True)
        raise typer.Exit(130) from None


@app.command()
def serve(
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of the site.")
    ] = 8000,
    kernel_port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, help="Port of the Jupyter server; 0 is any free."
        ),
    ] = 0,
    browser: Annotated[
        bool, typer.Option(help="Open the site in a browser.")
    ] = True,
) -> None:
    """Serve the site, with a kernel on which its cells run.

    Both listen on this machine only. Cells run Python with your rights; the
    address that is printed holds the token that lets a page do so.
    """
    root = the_root()
    needs("serve", "mkdocs", "jupyter_server", "ipykernel")
    from warpmap_site import serving

    try:
        serving.serve(root, port, kernel_port, browser)
    except serving.ServingError as error:
        fail(str(error), 1)


if __name__ == "__main__":
    main()
