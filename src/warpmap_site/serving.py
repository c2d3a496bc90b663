"""``warpmap serve``: the site and a Jupyter server, on this machine only."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import webbrowser
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from warpmap_site.launching import environment

HOST = "127.0.0.1"
IDLE = 1800  # seconds after which the kernel of a closed tab is ended


class ServingError(Exception):
    """Why the site cannot be served, in one line."""


def serve(root: Path, port: int, kernel_port: int, browser: bool) -> None:
    """Serve until Ctrl-C; leaves no process behind.

    Args:
        root: The repository.
        port: Where the site is served.
        kernel_port: Where the Jupyter server listens; 0 takes a free port.
        browser: Whether to open the site.

    Raises:
        ServingError: If a port is taken, or if one of the two ends.
    """
    port = free_port(port, "--port")
    kernel_port = free_port(kernel_port, "--kernel-port")
    make_bundle(root)
    token = secrets.token_urlsafe(24)
    address = f"http://{HOST}:{port}/#kernel={kernel_port}&token={token}"
    site = [sys.executable, "-m", "mkdocs", "serve", "--quiet"]
    # a page is not reloaded under a reader who edits its cell
    site += ["--no-livereload", "--dev-addr", f"{HOST}:{port}"]
    with ExitStack() as stack:
        stack.enter_context(suppress(KeyboardInterrupt))
        # an ended terminal and `kill` end the servers as Ctrl-C does
        for name in ("SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), _interrupt)
        temporary = tempfile.TemporaryDirectory(
            prefix="warpmap-", ignore_cleanup_errors=True
        )
        folder = Path(stack.enter_context(temporary))
        jupyter = started(
            folder / "jupyter.log",
            jupyter_command(folder, port, kernel_port),
            folder,
            jupyter_environment(root, folder, token),
        )
        mkdocs = started(
            folder / "mkdocs.log",
            site,
            root,
            {**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        )
        servers = [stack.enter_context(server) for server in (jupyter, mkdocs)]
        print("warpmap: building the site", flush=True)
        while not (listens(port) and listens(kernel_port)):
            check(servers)
            time.sleep(0.1)
        print(
            f"warpmap: {address}\n"
            "warpmap: cells run Python with your rights on this machine; "
            "keep the address to yourself\n"
            "warpmap: Ctrl-C ends the site and its kernels",
            flush=True,
        )
        if browser:
            open_browser(folder, address)
        while True:
            check(servers)
            time.sleep(0.2)


def free_port(port: int, option: str) -> int:
    """The port itself, or a free one for 0.

    Raises:
        ServingError: If something else listens there.
    """
    try:
        with socket.create_server((HOST, port)) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ServingError(
            f"port {port} cannot be used ({error.strerror}); "
            f"name another: {option} {port + 1}"
        ) from error


def listens(port: int) -> bool:
    """Whether something accepts connections there."""
    try:
        with socket.create_connection((HOST, port), timeout=1):
            return True
    except OSError:
        return False


def make_bundle(root: Path) -> None:
    """Make the site's script where there is none yet.

    Raises:
        ServingError: If that fails.
    """
    theme, build = Path(__file__).parent / "theme", root / "web/build.py"
    if (theme / "assets/bundle/main.js").is_file() or not build.is_file():
        return
    done = subprocess.run([sys.executable, str(build)], check=False)
    if done.returncode:
        raise ServingError("the site's script could not be made, see above")


def jupyter_command(folder: Path, port: int, kernel_port: int) -> list[str]:
    """The Jupyter server: kernels for the site on ``port``, nothing else."""
    origin = rf"^http://(127\.0\.0\.1|localhost):{port}$"
    ours = "warpmap_site.kernel_server"
    options = {
        "ServerApp.ip": HOST,
        "ServerApp.port": kernel_port,
        "ServerApp.port_retries": 0,
        "ServerApp.open_browser": False,
        "ServerApp.allow_root": True,  # containers with GPUs know no other
        "ServerApp.allow_origin_pat": origin,
        "ServerApp.identity_provider_class": f"{ours}.TokenAndOrigin",
        "ServerApp.authorizer_class": f"{ours}.KernelsOnly",
        "ServerApp.terminals_enabled": False,
        "ServerApp.root_dir": folder,
        "ServerApp.log_level": "WARN",
        "MappingKernelManager.cull_idle_timeout": IDLE,
    }
    command = [sys.executable, "-m", "jupyter_server"]
    return command + [f"--{name}={value}" for name, value in options.items()]


def jupyter_environment(root: Path, folder: Path, token: str) -> dict[str, str]:
    """Its environment: the token, which a command line would show to all.

    Nothing of the reader's own Jupyter is read, and nothing is left in it.
    """
    return {
        **environment(root),
        "JUPYTER_TOKEN": token,
        "JUPYTER_NO_CONFIG": "1",
        "JUPYTER_PREFER_ENV_PATH": "1",
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "IPYTHONDIR": str(folder / "ipython"),
        "TMPDIR": str(folder),
    }


@dataclass(frozen=True)
class Server:
    """A process and what it writes."""

    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def started(
    log: Path, command: list[str], folder: Path, env: dict[str, str]
) -> Iterator[Server]:
    """A process that hears no Ctrl-C of the terminal, ended on the way out."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        yield Server(process, log)
    finally:
        process.terminate()
        try:
            process.wait(10)  # Jupyter ends its kernels
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()


def check(servers: list[Server]) -> None:
    """Raise :class:`ServingError` where one has ended, after what it said."""
    for server in servers:
        code = server.process.poll()
        if code is not None:
            print(server.log.read_text("utf-8", "replace"), file=sys.stderr)
            raise ServingError(
                f"{server.log.stem} ended by itself, exit code {code}, "
                "see above; all else is ended too"
            )


def open_browser(folder: Path, address: str) -> None:
    """Open the address where there is a screen.

    By a file of the reader's own: a browser's command line is seen by all.
    """
    screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if not screen and sys.platform not in ("darwin", "win32"):
        return
    page = folder / "open.html"
    page.touch(mode=0o600)
    page.write_text(f"<script>location.replace({address!r})</script>")
    with suppress(webbrowser.Error):
        webbrowser.open(page.as_uri())


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
