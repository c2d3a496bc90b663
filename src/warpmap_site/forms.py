"""Functions as forms: the fields from the signature, the words from its doc.

The build calls this for the form and its default results. The page calls the
very same code in the reader's browser when an input changes, so only the
standard library is imported.
"""

import functools
import html
import importlib
import inspect
import json
import math
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from warpmap_site.charts import number, svg, table

KINDS: dict[Any, str] = {int: "int", float: "float", bool: "bool", str: "str"}
UNITS = {
    "_tflops": "TFLOP/s",
    "_tb_s": "TB/s",
    "_gb_s": "GB/s",
    "_mb_s": "MB/s",
    "_gbit_s": "Gbit/s",
    "_gib": "GiB",
    "_mib": "MiB",
    "_kib": "KiB",
    "_tb": "TB",
    "_gb": "GB",
    "_mb": "MB",
    "_ms": "ms",
    "_us": "µs",
    "_ns": "ns",
    "_mhz": "MHz",
    "_ghz": "GHz",
    "_percent": "%",
}
"""Units that the end of a name tells."""

_NAMED_UNITS = "|".join(
    sorted({re.escape(unit) for unit in UNITS.values()}, reverse=True)
)
_NUMBER = re.compile(
    r"[+-]?(?:\d+(?:_\d+)*|\d{1,3}(?:,\d{3})+|\d{1,3}(?:[ \u202f]\d{3})+)?"
    r"(?:\.\d*)?(?:[eE][+-]?\d{1,3})?"
)


class FormError(LookupError):
    """A function that no form can be made of; an author must mend it."""


class InputError(ValueError):
    """What a reader gave is not what a field takes.

    Args:
        field: The field's name.
        says: What was expected and what came.
    """

    def __init__(self, field: str, says: str) -> None:
        """Keep the field beside the message."""
        self.field = field
        super().__init__(says)


@dataclass(frozen=True)
class Field:
    """One input of a form: a parameter of the function.

    Attributes:
        name: The parameter's name.
        kind: ``int``, ``float``, ``bool``, ``str`` or ``choice``.
        default: What the parameter is when nothing is given.
        choices: All that a ``choice`` may be; else empty.
        help: What the docstring says of it.
        unit: Its unit, where the name or the help tells one.
    """

    name: str
    kind: str
    default: Any
    choices: tuple[Any, ...]
    help: str
    unit: str


@dataclass(frozen=True)
class Result:
    """One output: an attribute of what the function returns."""

    name: str
    help: str
    unit: str


@dataclass(frozen=True)
class Form:
    """A function as a form.

    Attributes:
        function: Its dotted name.
        summary: First paragraph of its docstring.
        fields: One a parameter.
        results: One a field of the dataclass that it returns; none where it
            returns anything else.
    """

    function: str
    summary: str
    fields: tuple[Field, ...]
    results: tuple[Result, ...]

    @property
    def name(self) -> str:
        """The function's own name."""
        return self.function.rpartition(".")[2]


# -- reading the function ------------------------------------------------------


def find(name: str) -> Any:
    """What a dotted name of a module's attribute stands for.

    Raises:
        FormError: If there is no such module or attribute.

    Examples:
        >>> find("math.gcd")(12, 18)
        6
    """
    module, _, attribute = name.rpartition(".")
    try:
        found = importlib.import_module(module)
    except (ImportError, ValueError) as error:
        raise FormError(f"{name}: {error}") from error
    if not hasattr(found, attribute):
        raise FormError(
            f"{_file(module)} has no {attribute}; mend: define it, or name "
            "another"
        )
    return getattr(found, attribute)


def import_from(src: Path) -> None:
    """Let ``find`` see the topics of a folder as they are on disk now.

    What was imported of ``warpmap`` is forgotten, but for the modules that lie
    directly in it: charts and traces are told by their classes.

    Args:
        src: The folder that holds ``warpmap``.
    """
    for name in list(sys.modules):
        if name == "warpmap" or (
            name.startswith("warpmap.")
            and (name.count(".") > 1 or hasattr(sys.modules[name], "__path__"))
        ):
            del sys.modules[name]
    if str(src) in sys.path:
        sys.path.remove(str(src))
    sys.path.insert(0, str(src))
    importlib.invalidate_caches()


def _file(module: str) -> str:
    return f"src/{module.replace('.', '/')}.py"


def docstring_entries(documented: Any, section: str) -> dict[str, str]:
    """Entries of a section of a Google docstring, each in one line.

    Examples:
        >>> def f(x):
        ...     '''F.
        ...
        ...     Args:
        ...         x: How many,
        ...             at most.
        ...     '''
        >>> docstring_entries(f, "Args")
        {'x': 'How many, at most.'}
    """
    lines = (inspect.getdoc(documented) or "").splitlines()
    entries: dict[str, str] = {}
    if f"{section}:" not in lines:
        return entries
    name = ""
    for line in lines[lines.index(f"{section}:") + 1 :]:
        if line and not line.startswith(" "):
            break
        start = re.match(r" {4}(\w+)(?: \([^)]*\))?: *(.*)", line)
        if start:
            name = start[1]
            entries[name] = start[2]
        elif name and line.strip():
            entries[name] = f"{entries[name]} {line.strip()}".strip()
    return entries


def unit_of(name: str, says: str) -> str:
    """The unit of a quantity, "" where neither its name nor its help tells.

    Examples:
        >>> unit_of("memory_gib", "Memory of the GPU."), unit_of("tokens", "")
        ('GiB', '')
        >>> unit_of("rate", "The best rate, in TFLOP/s.")
        'TFLOP/s'
    """
    if name == "bytes" or name.startswith("bytes_") or name.endswith("_bytes"):
        return "bytes"
    for end, unit in UNITS.items():
        if name.endswith(end) or name == end[1:]:
            return unit
    named = re.search(rf"\bin ({_NAMED_UNITS})(?![\w/])", says)
    if named:
        return named[1]
    spoken = {"microseconds": "µs", "milliseconds": "ms", "seconds": "s"}
    for word, unit in spoken.items():
        if name == word or name.endswith(f"_{word}"):
            return unit
    return ""


def describe(function: Callable[..., Any]) -> Form:
    """The form of a function.

    Args:
        function: Every parameter has a default, an annotation ``int``,
            ``float``, ``bool``, ``str`` or ``Literal``, and an entry in the
            docstring. Results are described where it returns a dataclass.

    Raises:
        FormError: If something of that is missing; names the file and the
            mend.
    """
    where = f"{_file(function.__module__)}: {function.__qualname__}"
    hints = get_type_hints(function)
    says = docstring_entries(function, "Args")
    made = []
    for name, parameter in inspect.signature(function).parameters.items():
        here = f"{where}: {name}"
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD and (
            parameter.kind is not parameter.KEYWORD_ONLY
        ):
            raise FormError(
                f"{here} cannot be given by name; mend: make it an ordinary "
                "parameter"
            )
        if parameter.default is parameter.empty:
            raise FormError(f"{here} has no default; mend: give it one")
        hint = hints.get(name)
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        kind = "choice" if choices else KINDS.get(hint, "")
        if not kind:
            raise FormError(
                f"{here} is annotated {hint}; mend: use int, float, bool, str "
                "or Literal[...]"
            )
        if choices and parameter.default not in choices:
            raise FormError(
                f"{here} is {parameter.default!r}, which its Literal lacks; "
                f"mend: use one of {', '.join(map(repr, choices))}"
            )
        if not says.get(name):
            raise FormError(
                f"{here} has no entry in the docstring; mend: describe it "
                "under Args:, with its unit"
            )
        unit = unit_of(name, says[name]) if kind in ("int", "float") else ""
        made.append(
            Field(name, kind, parameter.default, choices, says[name], unit)
        )
    summary = (inspect.getdoc(function) or "").partition("\n\n")[0]
    return Form(
        f"{function.__module__}.{function.__name__}",
        " ".join(summary.split()),
        tuple(made),
        tuple(_results(hints.get("return"))),
    )


def _results(returned: Any) -> Iterator[Result]:
    if not is_dataclass(returned):
        return
    name = getattr(returned, "__name__", str(returned))
    where = f"{_file(returned.__module__)}: {name}"
    says = docstring_entries(returned, "Attributes")
    hints = get_type_hints(returned)
    for field in fields(returned):
        hint = hints[field.name]
        union = get_origin(hint) in (Union, types.UnionType)
        kinds = set(get_args(hint) if union else (hint,)) - {type(None)}
        if not kinds <= set(KINDS):
            raise FormError(
                f"{where}: {field.name} is annotated {hint}; mend: use int, "
                "float, bool or str, or one of them | None"
            )
        if not says.get(field.name):
            raise FormError(
                f"{where}: {field.name} has no entry in the docstring; mend: "
                "describe it under Attributes:, with its unit"
            )
        yield Result(
            field.name,
            says[field.name],
            unit_of(field.name, says[field.name])
            if kinds <= {int, float}
            else "",
        )


# -- calling it ----------------------------------------------------------------


def text_of(value: Any) -> str:
    """A value as a field holds it; ``parse`` reads it back.

    Examples:
        >>> text_of(2.0), text_of(8192), text_of(0.5), text_of(True)
        ('2', '8192', '0.5', 'true')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)


def parse(field: Field, text: str) -> Any:
    """What a reader wrote, as the parameter takes it.

    Args:
        field: The field that it was written into.
        text: Thousands may be apart (``1,000``, ``1_000``, ``1 000``), and a
            whole number may be written ``1e6``.

    Raises:
        InputError: If it is no such value.

    Examples:
        >>> tokens = Field("tokens", "int", 1, (), "", "")
        >>> parse(tokens, " 1,000 "), parse(tokens, "1e6")
        (1000, 1000000)
    """
    text = text.strip()
    if field.kind == "str":
        return text
    if field.kind == "choice":
        for choice in field.choices:
            if text_of(choice) == text:
                return choice
        known = ", ".join(map(text_of, field.choices))
        raise InputError(
            field.name, f"{field.name} must be one of {known}, got {text!r}"
        )
    if field.kind == "bool":
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise InputError(
            field.name, f"{field.name} must be true or false, got {text!r}"
        )
    value = _number(text)
    if field.kind == "int":
        if value is None or value != value.to_integral_value():
            raise InputError(
                field.name, f"{field.name} must be a whole number, got {text!r}"
            )
        return int(value)
    if value is None or not math.isfinite(float(value)):
        raise InputError(
            field.name, f"{field.name} must be a number, got {text!r}"
        )
    return float(value)


def _number(text: str) -> Decimal | None:
    if len(text) > 60 or not _NUMBER.fullmatch(text):
        return None
    bare = re.sub(r"[_, \u202f]", "", text)
    return Decimal(bare) if re.match(r"[+-]?\.?\d", bare) else None


def shown(result: Result, value: Any) -> dict[str, Any]:
    """A result as a page prints it.

    Returns:
        ``value`` as it is, ``text`` as printed, ``unit``, and a ``note``: bytes
        once more in a larger unit.

    Examples:
        >>> shown(Result("kv_bytes", "", "bytes"), 3 << 29)["note"]
        '1.5 GiB'
    """
    text, note = number(value), ""
    if value is None:
        text = "none"
    elif isinstance(value, bool):
        text = "yes" if value else "no"
    elif result.unit == "bytes" and isinstance(value, int | float):
        size = float(value)
        for prefix in ("KiB", "MiB", "GiB", "TiB"):
            size /= 1024
            if 1 <= size < 1024 or (prefix == "TiB" and size >= 1024):
                note = f"{number(size)} {prefix}"
    if isinstance(value, float) and not math.isfinite(value):
        value = None  # JSON has no such number
    return {
        "name": result.name,
        "value": value,
        "text": text,
        "unit": "" if value is None else result.unit,
        "note": note,
    }


@functools.lru_cache(maxsize=64)
def _described(function: Callable[..., Any]) -> Form:
    return describe(function)


def read(form: Form, texts: Mapping[str, str]) -> dict[str, Any]:
    """Arguments from what a reader wrote; what is not given is the default.

    Raises:
        InputError: If a text is no value of its field.
    """
    return {
        field.name: parse(field, texts[field.name])
        if field.name in texts
        else field.default
        for field in form.fields
    }


def blame(form: Form, message: str) -> str | None:
    """The field that a message names first, if it names one.

    Examples:
        >>> def f(window=0, windowed_layers=0):
        ...     '''F.
        ...
        ...     Args:
        ...         window: Tokens.
        ...         windowed_layers: Layers.
        ...     '''
        >>> f.__annotations__ = {"window": int, "windowed_layers": int}
        >>> blame(describe(f), "windowed_layers exceeds the window")
        'windowed_layers'
    """
    names = "|".join(re.escape(field.name) for field in form.fields)
    found = re.search(rf"\b(?:{names})\b", message) if names else None
    return found[0] if found else None


def evaluate(
    function: str, arguments: Mapping[str, str], chart: str = ""
) -> dict[str, Any]:
    """Call a function with what a reader wrote.

    Args:
        function: Its dotted name.
        arguments: Text by parameter; what is missing takes its default.
        chart: A function of the same module that draws the same arguments.

    Returns:
        ``results``, one as of ``shown`` for each, and with a chart ``svg`` and
        its numbers as ``table``, rows of texts of which the first is the head;
        or ``error`` and the ``field`` that it names, or None.

    Examples:
        >>> evaluate("warpmap.nowhere.f", {})
        Traceback (most recent call last):
        warpmap_site.forms.FormError: warpmap.nowhere.f: ...
    """
    called = find(function)
    form = _described(called)
    try:
        values = read(form, arguments)
        returned = called(**values)
        answer: dict[str, Any] = {
            "results": [
                shown(result, getattr(returned, result.name))
                for result in form.results
            ]
        }
        if chart:
            drawn = find(f"{function.rpartition('.')[0]}.{chart}")(**values)
            answer |= {"svg": svg(drawn), "table": table(drawn)}
    except InputError as error:
        return {"error": str(error), "field": error.field}
    except (ValueError, ArithmeticError) as error:
        says = str(error) or type(error).__name__
        return {"error": says, "field": blame(form, says)}
    return answer


# -- HTML ----------------------------------------------------------------------


def prose(text: str) -> str:
    """A docstring's words as HTML, with its double backticks as code.

    Examples:
        >>> prose("Values of ``M < 2``.")
        'Values of <code>M &lt; 2</code>.'
    """
    return re.sub(r"``(.+?)``", r"<code>\1</code>", html.escape(text))


def form_html(
    form: Form,
    presets: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
) -> str:
    """The form, inert until a script wakes it.

    Args:
        form: What to ask for.
        presets: Menus by label; each gives values of some fields by name.

    Returns:
        A ``<form class="wm-form">``. Each field is an element
        ``.wm-field`` that holds its control, its help and a place for an error.
        The buttons stay hidden without a script.
    """
    menus = "".join(
        _menu(form, label, options)
        for label, options in (presets or {}).items()
    )
    if menus:
        menus = f'<div class="wm-presets">{menus}</div>'
    asked = "".join(_field(form, field) for field in form.fields)
    return (
        f'<form class="wm-form" data-function="{form.function}" novalidate '
        f'autocomplete="off"><fieldset disabled>'
        f'<legend class="wm-sr">Inputs of {form.name}</legend>'
        f'{menus}<div class="wm-fields">{asked}</div></fieldset>'
        '<p class="wm-form-actions wm-js" hidden>'
        '<button type="button" class="wm-form-reset">Reset</button> '
        '<button type="button" class="wm-form-link">Copy link</button> '
        '<span class="wm-form-status" role="status"></span></p></form>'
    )


def _field(form: Form, field: Field) -> str:
    key = f"wm-{form.name}-{field.name}"
    about = (
        f'id="{key}" name="{field.name}" '
        f'data-default="{html.escape(text_of(field.default))}" '
        f'aria-describedby="{key}-help"'
    )
    unit = f'<span class="wm-unit">{field.unit}</span>' if field.unit else ""
    if field.kind == "bool":
        checked = " checked" if field.default else ""
        control = f'<input type="checkbox" {about}{checked}>'
    elif field.kind == "choice":
        control = f"<select {about}>" + "".join(
            _option(text_of(c), text_of(c), c == field.default)
            for c in field.choices
        )
        control += "</select>"
    else:
        mode = {"int": "numeric", "float": "decimal"}.get(field.kind, "text")
        control = (
            f'<input type="text" inputmode="{mode}" spellcheck="false" '
            f'value="{html.escape(text_of(field.default))}" {about}>'
        )
    return (
        f'<div class="wm-field wm-field-{field.kind}">'
        f'<label for="{key}">{field.name}</label>'
        f'<span class="wm-input">{control}{unit}</span>'
        f'<p class="wm-help" id="{key}-help">{prose(field.help)}</p>'
        f'<p class="wm-error" id="{key}-error" hidden></p></div>'
    )


def _option(value: str, label: str, selected: bool, more: str = "") -> str:
    chosen = " selected" if selected else ""
    return (
        f'<option value="{html.escape(value)}"{more}{chosen}>'
        f"{html.escape(label)}</option>"
    )


def _menu(
    form: Form, label: str, options: Mapping[str, Mapping[str, Any]]
) -> str:
    known = {field.name: field for field in form.fields}
    defaults = {f.name: text_of(f.default) for f in form.fields}
    key = f"wm-{form.name}-menu-{re.sub(r'[^a-z0-9]+', '-', label.lower())}"
    shown_now = False
    offered = ""
    for name, values in options.items():
        if unknown := sorted(set(values) - set(known)):
            raise FormError(
                f"{form.function}: the preset {name!r} of {label} sets "
                f"{', '.join(unknown)}; mend: use {', '.join(known)}"
            )
        texts = {field: text_of(value) for field, value in values.items()}
        try:
            read(form, texts)
        except InputError as error:
            raise FormError(
                f"{form.function}: the preset {name!r} of {label}: {error}; "
                "mend: change its value"
            ) from error
        now = not shown_now and all(defaults[f] == t for f, t in texts.items())
        shown_now |= now
        data = html.escape(json.dumps(texts))
        offered += _option(name, name, now, f' data-values="{data}"')
    return (
        f'<div><label for="{key}">{html.escape(label)}'
        f'</label><select id="{key}" class="wm-preset">'
        f"{_option('', 'your own', not shown_now)}{offered}</select></div>"
    )
