"""Forms: what a function becomes, what readers may write, author mistakes."""

import json
import math
import re
import sys
import types
from dataclasses import dataclass, make_dataclass
from html.parser import HTMLParser
from typing import Literal

import pytest
from building import build
from made_up import write_repository

from warpmap.chart import Axis, Bar, BarChart
from warpmap_site.calculators import calculator_html
from warpmap_site.forms import (
    Field,
    FormError,
    InputError,
    blame,
    describe,
    evaluate,
    form_html,
    import_from,
    parse,
    text_of,
    unit_of,
)

PATH = "kernels/basics/softmax"


@dataclass(frozen=True)
class Size:
    """What comes out.

    Attributes:
        total_bytes: Bytes
            in all.
        share: Part of it.
        fits: Whether it fits.
        best: The best, if there
            is one.
        wall: What stops it.
    """

    total_bytes: int
    share: float
    fits: bool
    best: int | None
    wall: str


def size(
    tokens: int = 1024,
    memory_gib: float = 80.0,
    causal: bool = True,
    dtype: Literal["bf16", "fp8"] = "bf16",
    level: Literal[1, 2] = 2,
    note: str = "a \"b\" <c> & 'd'",
) -> Size:
    """The size of something.

    More about it.

    Args:
        tokens: Tokens of a request; ``n < m`` of them
            in two lines.
        memory_gib: Memory of the GPU.
        causal: Whether it is causal.
        dtype: Format of a value.
        level: How hard.
        note: Anything.

    Returns:
        The size.

    Raises:
        ValueError: If tokens is not positive.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    if memory_gib > 1000:
        raise ValueError("too much")
    return Size(
        tokens * 2**20, 1 / tokens, causal, None if causal else level, dtype
    )


def size_chart(tokens, **_):
    return BarChart("T", Axis("n"), [Bar("a", [("", tokens)])])


PRESETS = {"long <one>": {"tokens": 8192, "causal": False}}
FORM = describe(size)
FIELDS = {field.name: field for field in FORM.fields}


@pytest.fixture
def module(monkeypatch):
    """A module of that name, which holds what this file does."""
    made = types.ModuleType("made_up_calculator")
    for name in ("size", "size_chart", "PRESETS"):
        setattr(made, name, globals()[name])
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


class Elements(HTMLParser):
    """Every element of a page: its tag and its attributes."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def all(self, *tags, **attributes):
        return [
            found
            for tag, found in self.found
            if tag in tags and attributes.items() <= found.items()
        ]


# -- what a function becomes ---------------------------------------------------


def test_fields_are_the_parameters():
    assert [(f.name, f.kind, f.default, f.unit) for f in FORM.fields] == [
        ("tokens", "int", 1024, ""),
        ("memory_gib", "float", 80.0, "GiB"),
        ("causal", "bool", True, ""),
        ("dtype", "choice", "bf16", ""),
        ("level", "choice", 2, ""),
        ("note", "str", "a \"b\" <c> & 'd'", ""),
    ]
    assert FIELDS["dtype"].choices == ("bf16", "fp8")
    assert FIELDS["tokens"].help == (
        "Tokens of a request; ``n < m`` of them in two lines."
    )
    assert (FORM.name, FORM.summary) == ("size", "The size of something.")


def test_results_are_the_attributes():
    assert [(r.name, r.help, r.unit) for r in FORM.results] == [
        ("total_bytes", "Bytes in all.", "bytes"),
        ("share", "Part of it.", ""),
        ("fits", "Whether it fits.", ""),
        ("best", "The best, if there is one.", ""),
        ("wall", "What stops it.", ""),
    ]


def test_function_that_returns_no_dataclass_has_no_results():
    def plain(n: int = 1) -> list[int]:
        """Plain.

        Args:
            n: A number.
        """
        return [n]

    assert describe(plain).results == ()


@pytest.mark.parametrize(
    ("name", "says", "unit"),
    [
        ("memory_gib", "", "GiB"),
        ("bandwidth_tb_s", "", "TB/s"),
        ("peak_tflops", "", "TFLOP/s"),
        ("tflops", "", "TFLOP/s"),
        ("bytes_per_token", "", "bytes"),
        ("element_bytes", "", "bytes"),
        ("microseconds", "", "µs"),
        ("latency_ms", "", "ms"),
        ("rate", "The rate, in GB/s of payload.", "GB/s"),
        ("tokens_per_s", "", ""),
        ("items", "Items in GBS.", ""),
    ],
)
def test_unit_is_read_from_name_or_help(name, says, unit):
    assert unit_of(name, says) == unit


def test_form_is_inert_labelled_and_escaped():
    page = Elements(form_html(FORM, {"Pre & set": PRESETS}))
    assert "disabled" in page.all("fieldset")[0]
    labels = {found["for"] for found in page.all("label")}
    controls = page.all("input", "select")
    assert {found["id"] for found in controls} == labels
    ids = [a["id"] for _, a in page.found if "id" in a]
    assert len(ids) == len(set(ids))
    for control in controls:
        if "name" in control:
            assert control["aria-describedby"] in ids
            assert f"{control['id']}-error" in ids
    (note,) = page.all("input", name="note")
    assert note["value"] == note["data-default"] == FIELDS["note"].default
    (memory,) = page.all("input", name="memory_gib")
    assert (memory["inputmode"], memory["value"]) == ("decimal", "80")
    assert "checked" in page.all("input", type="checkbox")[0]
    chosen = [found["value"] for found in page.all("option", selected=None)]
    assert chosen == ["", "bf16", "2"]  # no preset holds the defaults
    (preset,) = page.all("option", value="long <one>")
    values = json.loads(preset["data-values"])
    assert values == {"tokens": "8192", "causal": "false"}
    assert page.all("p", hidden=None)  # the buttons, without a script


def test_menu_names_the_preset_that_holds_the_defaults():
    presets = {"other": {"tokens": 1}, "this": {"tokens": 1024}}
    page = Elements(form_html(FORM, {"Model": presets}))
    assert page.all("option", value="this", selected=None)


# -- what readers may write ----------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        (" 12 ", 12),
        ("-3", -3),
        ("+3", 3),
        ("1_000", 1000),
        ("1,000", 1000),
        ("1,234,567", 1234567),
        ("1 000", 1000),
        ("1e6", 10**6),
        ("1.5e3", 1500),
        ("8192.0", 8192),
        ("123456789012345678901", 123456789012345678901),
    ],
)
def test_whole_numbers_are_read(text, value):
    got = parse(FIELDS["tokens"], text)
    assert (got, type(got)) == (value, int)


@pytest.mark.parametrize(
    "text",
    [
        "12a", "abc", "", " ", "1.5", "1,00", "1,0000", "10,00,0", "1__0", "_1",
        "0x10", "--1", "1e", "e5", "nan", "inf", "1e400000", "½", "1 00", ".",
        "1,000_000", "9" * 61, "__import__('os')",
    ],
)  # fmt: skip
def test_what_is_no_whole_number_is_told(text):
    with pytest.raises(InputError, match="tokens must be a whole number") as e:
        parse(FIELDS["tokens"], text)
    assert e.value.field == "tokens"
    assert str(e.value).endswith(f"got {text.strip()!r}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5", 0.5),
        (".5", 0.5),
        ("2", 2.0),
        ("1e-6", 1e-6),
        ("1,000.5", 1000.5),
    ],
)
def test_numbers_are_read(text, value):
    got = parse(FIELDS["memory_gib"], text)
    assert (got, type(got)) == (value, float)


@pytest.mark.parametrize(
    "text", ["a", "", "nan", "inf", "-inf", "1e999", "1,5"]
)
def test_what_is_no_number_is_told(text):
    with pytest.raises(InputError, match="memory_gib must be a number, got"):
        parse(FIELDS["memory_gib"], text)


def test_choices_and_switches_are_read():
    assert parse(FIELDS["level"], "1") == 1
    assert parse(FIELDS["dtype"], "fp8") == "fp8"
    assert parse(FIELDS["causal"], "false") is False
    with pytest.raises(InputError, match="level must be one of 1, 2, got '3'"):
        parse(FIELDS["level"], "3")
    with pytest.raises(InputError, match="causal must be true or false"):
        parse(FIELDS["causal"], "maybe")


@pytest.mark.parametrize("field", FORM.fields, ids=lambda f: f.name)
def test_every_default_is_read_back(field):
    assert parse(field, text_of(field.default)) == field.default


@pytest.mark.parametrize(
    "value", [0.1, 1e-9, 989.4, 1e22, 2.0**70, 123456789.25, 5e-324, -0.5]
)
def test_every_float_is_read_back(value):
    assert parse(Field("x", "float", 0.0, (), "", ""), text_of(value)) == value


# -- calling it ----------------------------------------------------------------


def test_evaluate_calls_the_function(module):
    answer = evaluate(
        f"{module.__name__}.size", {"tokens": "4,096", "causal": "false"}
    )
    want = size(tokens=4096, causal=False)
    assert {r["name"]: r["value"] for r in answer["results"]} == vars(want)
    assert [(r["text"], r["unit"], r["note"]) for r in answer["results"]] == [
        ("4,294,967,296", "bytes", "4 GiB"),
        ("0.0002441", "", ""),
        ("no", "", ""),
        ("2", "", ""),
        ("bf16", "", ""),
    ]
    json.dumps(answer, allow_nan=False)


def test_missing_and_infinite_results_can_be_sent(module, monkeypatch):
    answer = evaluate(f"{module.__name__}.size", {})
    assert answer["results"][3]["text"] == "none"
    result = Size(1, math.inf, True, None, "x")
    monkeypatch.setattr(module, "size", _like_size(lambda **_: result))
    answer = evaluate(f"{module.__name__}.size", {})
    assert answer["results"][1]["text"] == "inf"
    json.dumps(answer, allow_nan=False)


def _like_size(function):
    function.__signature__ = __import__("inspect").signature(size)
    function.__annotations__ = size.__annotations__
    function.__doc__ = size.__doc__
    return function


def test_evaluate_draws_the_chart(module):
    name = f"{module.__name__}.size"
    answer = evaluate(name, {"tokens": "7"}, "size_chart")
    assert answer["svg"].startswith("<svg")
    assert answer["table"] == [["", "n"], ["a", "7"]]


@pytest.mark.parametrize(
    ("given", "field", "says"),
    [
        ({"tokens": "0"}, "tokens", "tokens must be at least 1, got 0"),
        ({"tokens": "12a"}, "tokens", "must be a whole number, got '12a'"),
        ({"memory_gib": "1e6"}, None, "too much"),
    ],
)
def test_evaluate_names_the_field_at_fault(module, given, field, says):
    answer = evaluate(f"{module.__name__}.size", given)
    assert answer["field"] == field
    assert says in answer["error"]
    assert "results" not in answer


@pytest.mark.parametrize("error", [ZeroDivisionError, OverflowError])
def test_arithmetic_that_fails_is_told(module, monkeypatch, error):
    def fails(**_):
        raise error

    monkeypatch.setattr(module, "size", _like_size(fails))
    answer = evaluate(f"{module.__name__}.size", {})
    assert answer == {"error": error.__name__, "field": None}


def test_blame_takes_whole_names_only():
    form = describe(size)
    assert blame(form, "memory must be positive") is None
    assert blame(form, "the notes of dtype and tokens") == "dtype"


# -- author mistakes -----------------------------------------------------------


def undocumented(n: int = 1) -> Size:
    """Nothing of n."""


def no_default(n: int) -> Size:
    """F.

    Args:
        n: A number.
    """


def wrong_type(n: list[int] = ()) -> Size:
    """F.

    Args:
        n: Numbers.
    """


def optional(n: int | None = None) -> Size:
    """F.

    Args:
        n: A number.
    """


def not_a_choice(n: Literal["a", "b"] = "c") -> Size:
    """F.

    Args:
        n: A letter.
    """


def collects(*n: int) -> Size:
    """F.

    Args:
        n: Numbers.
    """


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (undocumented, "n has no entry in the docstring; mend: describe it"),
        (no_default, "n has no default; mend: give it one"),
        (wrong_type, "n is annotated list[int]; mend: use int, float"),
        (optional, "n is annotated int | None; mend: use int"),
        (not_a_choice, "n is 'c', which its Literal lacks; mend: use one of"),
        (collects, "n cannot be given by name; mend: make it an ordinary"),
    ],
)
def test_function_that_makes_no_form_is_refused(function, says):
    with pytest.raises(FormError, match=re.escape(says)) as error:
        describe(function)
    assert str(error.value).startswith("src/")
    assert f".py: {function.__name__}: " in str(error.value)


@pytest.mark.parametrize(
    ("kind", "documented", "says"),
    [
        (int, "", "x has no entry in the docstring; mend: describe it under"),
        (list, "x: A list.", "x is annotated <class 'list'>; mend: use int"),
    ],
)
def test_result_that_cannot_be_shown_is_refused(kind, documented, says):
    result = make_dataclass("Result", [("x", kind)])
    result.__doc__ = f"R.\n\nAttributes:\n    {documented}\n"

    def function():
        """F."""

    function.__annotations__ = {"return": result}
    with pytest.raises(FormError, match=re.escape(says)):
        describe(function)


@pytest.mark.parametrize(
    ("fence", "says"),
    [
        ("size\nModel: GONE", "has no GONE; mend: define it"),
        ("size\nchart: gone", "has no gone; mend: define it"),
        ("size\nModel: size", "is no dictionary; mend: make it one of"),
        ("size\nModel", "expected 'label: name' in a line, got 'Model'"),
        ("gone", "has no gone; mend: define it, or name another"),
        ("size\nModel: UNKNOWN", "sets speed; mend: use tokens, memory_gib"),
        ("size\nModel: BAD", "tokens must be a whole number, got 'x'"),
        ("refuses", "refuses its own defaults: n must be positive"),
        ("plain", "returns no dataclass; mend: let it return a frozen one"),
    ],
)
def test_fence_that_makes_no_calculator_is_refused(module, fence, says):
    def refuses(n: int = 0) -> Size:
        """F.

        Args:
            n: A number.
        """
        raise ValueError("n must be positive")

    def plain(n: int = 0) -> int:
        """F.

        Args:
            n: A number.
        """

    module.UNKNOWN = {"fast": {"speed": 1}}
    module.BAD = {"fast": {"tokens": "x"}}
    module.refuses, module.plain = refuses, plain
    with pytest.raises(FormError, match=re.escape(says)):
        calculator_html(f"{module.__name__}.{fence}")


def test_no_such_module_is_told():
    with pytest.raises(FormError, match=r"warpmap\.gone\.f: No module named"):
        calculator_html("warpmap.gone.f")


def test_calculator_reads_without_a_script(module):
    page = calculator_html(
        f"{module.__name__}.size\nModel: PRESETS\nchart: size_chart"
    )
    text = re.sub(r"<[^>]+>", " ", page)
    for shown in ("1,073,741,824", "1 GiB", "0.0009766", "yes", "none"):
        assert shown in text
    assert "<svg" in page
    assert 'data-chart="size_chart"' in page


@pytest.fixture
def repository(tmp_path):
    """A made-up repository with one calculator."""
    write_repository(tmp_path, {PATH: {"kind": "calculator"}})
    return tmp_path


@pytest.mark.slow
def test_made_up_calculator_builds(repository):
    done = build(repository, repository / "site")
    assert done.returncode == 0, done.stderr
    page = (repository / f"site/{PATH}/index.html").read_text("utf-8")
    assert 'data-function="warpmap.kernels.basics.softmax.double_cal' in page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        (
            "docs/{}.md",
            "```calculator",
            "```text",
            "kind: is calculator, but the page has no calculator; mend: add",
        ),
        (
            "src/warpmap/{}.py",
            "x: A number.",
            "y: A number.",
            "softmax.py: double_calculator: x has no entry in the docstring",
        ),
        (
            "src/warpmap/{}.py",
            "return Doubled(scale * x)",
            "return Doubled(scale * None)",
            "```calculator: TypeError: unsupported operand",
        ),
    ],
)
def test_mistake_of_a_calculator_fails_the_build(
    repository, file, old, new, says
):
    path = repository / file.format(PATH)
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")
    done = build(repository, repository / "site")
    assert done.returncode != 0
    assert says in " ".join(done.stderr.split())


def test_module_is_read_again_after_a_change(repository, monkeypatch):
    import warpmap.chart

    monkeypatch.setattr(sys, "path", list(sys.path))
    kept = dict(sys.modules)
    fence = "warpmap.kernels.basics.softmax.double_calculator"
    src = repository / "src"
    try:
        import_from(src)
        assert ">2</span>" in calculator_html(fence)
        module = src / f"warpmap/{PATH}.py"
        text = module.read_text("utf-8").replace("scale * x", "500 * x + 1")
        module.write_text(text, "utf-8")
        import_from(src)
        assert ">501</span>" in calculator_html(fence)
        assert sys.modules["warpmap.chart"] is warpmap.chart
    finally:
        for name in set(sys.modules) - set(kept):
            del sys.modules[name]
        sys.modules.update(kept)
