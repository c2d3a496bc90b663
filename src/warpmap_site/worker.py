"""How the browser's Python runs a program or calls a function.

Only the standard library: the page's worker imports this module, in Pyodide.
"""

import builtins
import contextlib
import importlib
import io
import json
import linecache
import sys
import traceback
import types
from collections.abc import Callable

FILE = "cell.py"
"""What tracebacks call the reader's program."""

LONGEST = 100_000
"""Characters that a program may print: a page has to show them."""


class _Printed(io.TextIOBase):
    """A stream that hands on whole lines, as they come."""

    def __init__(self, send: Callable[[str], None]) -> None:
        self.send = send
        self.waiting: list[str] = []

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.waiting.append(text)
        if "\n" in text or len(self.waiting) > 1000:
            self.flush()
        return len(text)

    def flush(self) -> None:
        text = "".join(self.waiting)
        self.waiting.clear()
        if text:
            self.send(text)


def run(code: str, send: Callable[[str, str], object]) -> str:
    r"""Run a program as ``__main__``, with names of its own.

    Args:
        code: The program.
        send: Gets the name of a stream and what was printed there.

    Returns:
        Its traceback, without our frames; empty where nothing went wrong.

    Examples:
        >>> printed = []
        >>> run("print(6 * 7)", lambda *part: printed.append(part))
        ''
        >>> printed
        [('stdout', '42\n')]
        >>> print(run("1 / 0", print))
        Traceback (most recent call last):
          File "cell.py", line 1, in <module>
            1 / 0
            ~~^~~
        ZeroDivisionError: division by zero
        <BLANKLINE>
    """
    room = LONGEST

    def sender(stream: str) -> Callable[[str], None]:
        def to_page(text: str) -> None:
            nonlocal room
            send(stream, text[:room])
            room = max(0, room - len(text))
            if not room:
                raise RuntimeError(f"more than {LONGEST:,} characters printed")

        return to_page

    main = types.ModuleType("__main__")
    out, err = _Printed(sender("stdout")), _Printed(sender("stderr"))
    lines = f"{code}\n".splitlines(keepends=True)
    linecache.cache[FILE] = (len(code), None, lines, FILE)
    before = sys.modules["__main__"], builtins.input
    sys.modules["__main__"], builtins.input = main, _input
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                exec(compile(code, FILE, "exec"), main.__dict__)
            except SystemExit as end:
                if end.code not in (None, 0):
                    print(_status(end.code), file=err)
            finally:
                out.flush()
                err.flush()
    except BaseException as error:
        return _readers_part(error)
    finally:
        sys.modules["__main__"], builtins.input = before
    return ""


def call(module: str, function: str, arguments: str) -> str:
    """Call a function with JSON, and get JSON.

    Args:
        module: Its module's dotted name.
        function: Its name.
        arguments: A list of arguments, or an object of named ones.

    Returns:
        ``{"value": ...}``, or ``{"error": {"type": ..., "message": ...}}``.

    Examples:
        >>> call("math", "gcd", "[12, 18]")
        '{"value": 6}'
        >>> call("math", "sqrt", "[-1]").startswith('{"error": {"type": "Val')
        True
    """
    try:
        found = getattr(importlib.import_module(module), function)
        given = json.loads(arguments)
        named = isinstance(given, dict)
        value = found(**given) if named else found(*given)
        return json.dumps({"value": value}, allow_nan=False)
    except Exception as error:
        says = {"type": type(error).__name__, "message": str(error)}
        return json.dumps({"error": says})


def _input(prompt: object = "") -> str:
    raise RuntimeError("nobody can answer input() here: write the value")


def _status(code: object) -> str:
    return f"exit status {code}" if isinstance(code, int) else str(code)


def _readers_part(error: BaseException) -> str:
    """A traceback in which only the frames of the reader's program are left."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        error.msg = (
            f"No module named {error.name!r} in the browser: it has the "
            "standard library and Warpmap's pure-Python modules"
        )
    whole = traceback.TracebackException.from_exception(error)
    for part in (whole, whole.__cause__, whole.__context__):
        if part:
            kept = [frame for frame in part.stack if frame.filename == FILE]
            part.stack[:] = kept
    if not whole.stack:  # it could not be compiled
        return "".join(whole.format_exception_only())
    return "".join(whole.format())
