"""Every calculator of the site, against the Python that its page teaches."""

import re
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest
from building import ROOT
from playwright.sync_api import expect

from warpmap_site.forms import describe, evaluate, find, text_of
from warpmap_site.loading import load_atlas

AXE = ROOT / "web/node_modules/axe-core/axe.min.js"
FENCE = re.compile(r"^```calculator\n(.+?)\n```$", re.MULTILINE | re.DOTALL)
WAIT = 60_000  # ms: the runtime has to start


class Calculator:
    """A fence of a page: where it is, and what Python says to its inputs."""

    def __init__(self, url, fence):
        self.url = url
        self.function, *lines = (line.strip() for line in fence.splitlines())
        pairs = dict(line.split(": ") for line in lines)
        self.chart = pairs.pop("chart", "")
        module = self.function.rpartition(".")[0]
        self.menus = {k: find(f"{module}.{v}") for k, v in pairs.items()}
        self.form = describe(find(self.function))
        self.name = self.form.name

    def answer(self, **texts):
        return evaluate(self.function, texts, self.chart)

    def shown(self, **texts):
        results = self.answer(**texts)["results"]
        return {r["name"]: r["text"] + r["unit"] + r["note"] for r in results}

    def drawn(self, **texts):
        """Every shape of the chart."""
        chart = self.answer(**texts).get("svg", "")
        return re.findall(r' (?:d|width|cx)="([^"]+)"', chart)

    @property
    def scheme(self):
        """Half of them are looked at in the dark."""
        return "dark" if len(self.name) % 2 else "light"

    @property
    def kind(self):
        fields = frozenset(f.kind for f in self.form.fields)
        return fields, bool(self.chart), bool(self.menus)

    @property
    def change(self):
        """A field and a text that make Python answer something else."""
        for field in self.form.fields:
            if field.kind in ("int", "float"):
                for value in (field.default * 2, field.default + 1):
                    given = {field.name: text_of(value)}
                    if (
                        "results" in self.answer(**given)
                        and self.shown(**given) != self.shown()
                    ):
                        return given
        raise AssertionError(f"no field of {self.name} changes its results")

    @property
    def number(self):
        """A field that takes numbers."""
        kinds = ("int", "float")
        return next(f.name for f in self.form.fields if f.kind in kinds)


CALCULATORS = [
    Calculator(topic.url, found)
    for topic in load_atlas(ROOT).reading_order
    for found in FENCE.findall(
        (ROOT / f"docs/{topic.path}.md").read_text("utf-8")
    )
]
KV = next(c for c in CALCULATORS if c.name == "kv_cache_size")
EVERY = pytest.mark.parametrize("calculator", CALCULATORS, ids=lambda c: c.name)
# one of each kind: with these kinds of fields, with a chart, with menus
OF_EACH_KIND = {c.kind: c for c in CALCULATORS}.values()


class Part:
    """A calculator on an open page."""

    def __init__(self, page, calculator):
        self.page, self.calculator = page, calculator
        self.root = page.locator(
            f'.wm-calculator:has([data-function="{calculator.function}"])'
        )
        self.status = self.root.locator(".wm-form-status")

    def control(self, name):
        return self.root.locator(f'.wm-field [name="{name}"]')

    def error(self, name):
        return self.root.locator(f'.wm-field:has([name="{name}"]) .wm-error')

    def drawn(self):
        return self.root.locator(".wm-chart svg *").evaluate_all(
            """shapes => shapes.flatMap(e => ['d', 'width', 'cx'].map(
              name => e.getAttribute(name))).filter(found => found)"""
        )

    def fill(self, texts):
        for name, text in texts.items():
            self.control(name).fill(text)
            self.control(name).press("Enter")

    def expect_shown(self, expected):
        for name, text in expected.items():
            cell = self.root.locator(f'[data-result="{name}"] td')
            expect(cell).to_have_text(text, timeout=WAIT)

    def violations(self):
        self.page.evaluate(AXE.read_text("utf-8"))
        found = self.page.evaluate("axe.run('.wm-calculator')")["violations"]
        return [(v["id"], n["html"][:120]) for v in found for n in v["nodes"]]


@EVERY
def test_defaults_read_without_a_script(plain_tab, address, calculator):
    plain_tab.goto(address + calculator.url)
    part = Part(plain_tab, calculator)
    part.expect_shown(calculator.shown())
    assert part.control(calculator.number).is_disabled()
    assert part.drawn() == calculator.drawn()
    assert part.root.locator("button:visible").count() == 0


def test_every_answer_is_that_of_python_here(open_page):
    """All on one start of Python, past the forms."""
    page = open_page(KV.url)
    (script,) = ROOT.glob("src/warpmap_site/theme/assets/bundle/pyodide-*.js")
    for calculator in CALCULATORS:
        for texts in (
            {},
            calculator.change,
            *({calculator.number: text} for text in ("abc", "-1", "0", "")),
        ):
            given = {
                "function": calculator.function,
                "arguments": texts,
                "chart": calculator.chart,
            }
            answer = page.evaluate(
                """async ([script, given]) =>
                  (await import(script)).call(
                    'warpmap_site.forms', 'evaluate', given)""",
                [f"/assets/bundle/{script.name}", given],
            )
            assert answer == calculator.answer(**texts), calculator.name


@pytest.mark.parametrize("calculator", OF_EACH_KIND, ids=lambda c: c.name)
def test_form_does_what_python_does(open_page, calculator):
    """A link, bad input, Reset and a change, all on one start of Python."""
    given = calculator.change
    query = {f"{calculator.name}.{k}": v for k, v in given.items()}
    page = open_page(
        f"{calculator.url}?{urlencode(query)}", color_scheme=calculator.scheme
    )
    part = Part(page, calculator)
    part.expect_shown(calculator.shown(**given))  # the link brought it back

    name = calculator.number
    for text in ("abc", "-1", "0", ""):
        part.fill({name: text})
        answer = calculator.answer(**{**given, name: text})
        if "error" not in answer:  # it takes that
            part.expect_shown(calculator.shown(**{**given, name: text}))
            continue
        assert answer["field"] == name, answer
        expect(part.error(name)).to_have_text(answer["error"], timeout=WAIT)
        control = part.control(name)
        expect(control).to_have_attribute("aria-invalid", "true")
        described = control.get_attribute("aria-describedby").split()
        assert part.error(name).get_attribute("id") in described
        if text == "abc":
            assert part.violations() == []

    part.root.locator(".wm-form-reset").click()
    part.expect_shown(calculator.shown())
    expect(part.error(name)).to_be_hidden()
    assert urlsplit(page.url).query == ""

    part.fill(given)
    part.expect_shown(calculator.shown(**given))
    expect(part.status).to_have_text("Computed in this browser.")
    assert dict(parse_qsl(urlsplit(page.url).query)) == query
    assert part.drawn() == calculator.drawn(**given)
    table = calculator.answer(**given).get("table", [])
    assert part.root.locator(".wm-chart-data tr").count() == len(table)


@pytest.mark.parametrize(
    "given",
    [
        {"qk_rope_head_dim": "64"},
        {"windowed_layers": "33"},
        {"window": "4096"},
        {"tokens": "12a"},
    ],
    ids=str,
)
def test_contradiction_is_told_beside_its_field(open_page, given):
    ((name, text),) = given.items()
    page = open_page(f"{KV.url}?{KV.name}.{name}={text}")
    answer = KV.answer(**given)
    assert answer["field"] == name
    part = Part(page, KV)
    expect(part.error(name)).to_have_text(answer["error"], timeout=WAIT)
    part.expect_shown(KV.shown())  # the old result, dimmed
    assert part.root.locator(".wm-answer-old").count() == 1


def test_preset_fills_its_fields(open_page):
    page = open_page(KV.url)
    part = Part(page, KV)
    for label, menu in KV.menus.items():
        name, values = list(menu.items())[-1]
        part.root.get_by_label(label).select_option(name)
        for field, value in values.items():
            expect(part.control(field)).to_have_value(text_of(value))
    last = [list(menu.values())[-1] for menu in KV.menus.values()]
    given = {k: text_of(v) for values in last for k, v in values.items()}
    part.expect_shown(KV.shown(**given))
    part.fill({"layers": "7"})
    expect(part.root.get_by_label("Model")).to_have_value("")


def test_last_of_many_changes_wins(open_page):
    part = Part(open_page(KV.url), KV)
    for tokens in ("1", "12", "123", "1_234", "12,345"):
        part.fill({"tokens": tokens})
    part.expect_shown(KV.shown(tokens="12345"))


def test_texts_of_the_address_are_never_markup(open_page):
    page = open_page(f"{KV.url}?{KV.name}.tokens=%3Cimg%20src%3Dx%3E")
    part = Part(page, KV)
    expect(part.error("tokens")).to_contain_text("<img src=x>", timeout=WAIT)
    assert page.locator("img[src=x]").count() == 0


def test_link_is_copied(open_page):
    page = open_page(KV.url, permissions=["clipboard-read", "clipboard-write"])
    part = Part(page, KV)
    part.fill({"tokens": "100"})
    part.root.get_by_role("button", name="Copy link").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.endswith(f"{KV.url}?{KV.name}.tokens=100")


@EVERY
def test_it_fits_a_phone_and_loads_no_python_yet(open_page, tab, calculator):
    tab.set_viewport_size({"width": 360, "height": 740})
    tab.emulate_media(color_scheme=calculator.scheme)
    asked = []
    tab.on("request", lambda r: asked.append(r.url))
    part = Part(open_page(calculator.url, tab=tab), calculator)
    expect(part.control(calculator.number)).to_be_enabled()
    assert [url for url in asked if "pyodide" in url or ".zip" in url] == []
    cut = part.root.evaluate(
        """part => [...part.querySelectorAll('label, .wm-help, td, input')]
          .filter(e => !e.closest('.wm-chart-data'))  // scrolls by itself
          .filter(e => e.getBoundingClientRect().right > innerWidth)
          .map(e => e.outerHTML)"""
    )
    assert cut == part.violations() == []
