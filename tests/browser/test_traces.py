"""Traces as a reader meets them: played, stepped, replayed, read as a table."""

import re

import pytest
from building import ROOT

from warpmap.inference.kv_cache.radix_attention import radix_trace
from warpmap.training.sharding._ring import ring_trace
from warpmap_site.traces import replay

RADIX = "inference/kv_cache/radix_attention/"
RING = "training/sharding/collective_operations/"
RING_NAME = "warpmap.training.sharding._ring.ring_trace"
AXE = ROOT / "web/node_modules/axe-core/axe.min.js"
SOON = 2_000  # ms
PYTHON = 60_000  # the runtime starts


def player(page):
    trace = page.locator(".wm-trace").first
    trace.locator(".wm-trace-scrub").wait_for()
    return trace


def caption(trace):
    return trace.locator(".wm-trace-caption").inner_text()


def step(trace):
    return int(trace.get_attribute("data-step"))


def wait_for_step(page, number, timeout=SOON):
    trace = page.locator(f'.wm-trace[data-step="{number}"]').first
    trace.wait_for(timeout=timeout)


def drawn(trace):
    """The texts of the picture, without those that fade out."""
    parts = trace.locator(".wm-trace-stage .wm-part:not(.wm-leave)")
    return parts.locator("text").all_text_contents()


def steps_in_words(trace):
    rows = trace.locator(".wm-trace-steps tbody tr")
    return rows.evaluate_all("l => l.map(r => r.cells[1].textContent)")


@pytest.mark.parametrize("path", [RADIX, RING])
def test_it_waits_and_plays_to_its_end(open_page, path):
    page = open_page(path)
    trace = player(page)
    page.wait_for_timeout(1_800)
    assert step(trace) == 1
    frames = {RADIX: radix_trace, RING: ring_trace}[path]()
    trace.locator(".wm-trace-scrub").fill(str(len(frames) - 2))
    trace.locator(".wm-trace-speed").select_option("4")
    trace.get_by_role("button", name="Play").click()
    assert (
        trace.locator(".wm-trace-caption").get_attribute("aria-live") == "off"
    )
    wait_for_step(page, len(frames), 10_000)
    assert caption(trace) == frames[-1].caption
    assert trace.get_by_role("button", name="Play again").is_visible()
    trace.get_by_role("button", name="Play again").click()
    assert step(trace) == 1
    trace.get_by_role("button", name="Pause").click()


def test_buttons_and_slider_show_their_step(open_page):
    trace = player(open_page(RADIX))
    frames = radix_trace()
    forward = trace.get_by_role("button", name="One step forward")
    back = trace.get_by_role("button", name="One step back")
    assert back.is_disabled()
    forward.click()
    forward.click()
    back.click()
    assert (step(trace), caption(trace)) == (2, frames[1].caption)
    for number in (16, 3, 18):
        trace.locator(".wm-trace-scrub").fill(str(number))
        assert caption(trace) == frames[number - 1].caption
        assert f"{number} / {len(frames)}" in trace.inner_text()
    assert forward.is_disabled()
    live = trace.locator(".wm-trace-caption").get_attribute("aria-live")
    assert live == "polite"


def test_keys_move_and_play(open_page):
    page = open_page(RADIX)
    trace = player(page)
    trace.locator(".wm-trace-stage").focus()
    for key, number in (
        ("ArrowRight", 2),
        ("ArrowRight", 3),
        ("ArrowLeft", 2),
        ("End", 18),
        ("ArrowRight", 18),
        ("Home", 1),
    ):
        page.keyboard.press(key)
        assert step(trace) == number
    page.keyboard.press(" ")
    assert trace.get_by_role("button", name="Pause").is_visible()
    wait_for_step(page, 2, 5_000)
    page.keyboard.press(" ")
    assert trace.get_by_role("button", name="Play").is_visible()
    trace.locator(".wm-trace-scrub").focus()
    page.keyboard.press("End")
    assert step(trace) == 18


def test_picture_shows_the_frame(open_page):
    trace = player(open_page(RADIX))
    frames = radix_trace()
    for number in (3, 16, 18, 5):
        trace.locator(".wm-trace-scrub").fill(str(number))
        shown = " ".join(drawn(trace))
        for node in frames[number - 1].picture.nodes:
            assert node.text in shown
        assert ("Ada" in shown) == (number != 18)


@pytest.mark.parametrize("width", [1280, 390, 340])
@pytest.mark.parametrize("path", [RADIX, RING])
def test_text_is_legible_and_in_its_box(open_page, path, width):
    page = open_page(
        path,
        viewport={"width": width, "height": 800},
        reduced_motion="reduce",  # parts are where they go
    )
    trace = player(page)
    last = int(trace.locator(".wm-trace-scrub").get_attribute("max"))
    assert page.evaluate(
        "document.documentElement.scrollWidth <= innerWidth"
    ), "the page scrolls to the side"
    for number in range(1, last + 1):
        trace.locator(".wm-trace-scrub").fill(str(number))
        page.wait_for_timeout(30)
        found = trace.evaluate(
            """trace => [...trace.querySelectorAll(
                '.wm-part:not(.wm-leave) > text')].map(text => {
              const box = text.parentElement.querySelector('rect');
              const [t, b] = [text, box ?? text]
                .map(e => e.getBoundingClientRect());
              const svg = text.ownerSVGElement.getBoundingClientRect();
              return {
                text: text.textContent,
                size: parseFloat(getComputedStyle(text).fontSize)
                  * svg.width / text.ownerSVGElement.viewBox.baseVal.width,
                inside: t.left >= b.left - 0.5 && t.right <= b.right + 0.5
                  && t.left >= svg.left - 1 && t.right <= svg.right + 1
                  && t.top >= svg.top - 4 && t.bottom <= svg.bottom + 4,
              };
            })"""
        )
        assert found
        assert [f for f in found if f["size"] < 11 or not f["inside"]] == []


def test_other_input_is_what_python_computes(open_page):
    page = open_page(RING)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    trace = player(page)
    trace.get_by_role("button", name="One step forward").click()
    assert not [url for url in asked if "pyodide" in url]  # not before use

    trace.locator(".wm-trace-inputs summary").click()
    trace.get_by_label("ranks").fill("3")
    trace.get_by_label("elements").fill("5")
    trace.get_by_role("button", name="Replay").click()
    frames = ring_trace(ranks=3, elements=5)
    page.get_by_text(f"{len(frames)} steps, computed").wait_for(timeout=PYTHON)
    assert trace.get_by_role("button", name="Pause").is_visible()
    trace.get_by_role("button", name="Pause").click()
    assert steps_in_words(trace) == [frame.caption for frame in frames]
    state = trace.locator(".wm-trace-steps tbody td:nth-child(3)")
    assert (
        state.evaluate_all(
            "l => l.map(c => [...c.childNodes].filter(n => n.nodeType === 3)"
            ".map(n => n.textContent))"
        )
        == replay(RING_NAME, {"ranks": "3", "elements": "5"})["words"]
    )
    trace.locator(".wm-trace-scrub").fill(str(len(frames)))
    assert drawn(trace).count("111 111") == 6
    assert "ring_trace.ranks=3" in page.url

    # what is wrong is said where it is wrong, and the frames stay
    trace.get_by_label("ranks").fill("9")
    error = trace.locator(".wm-field", has_text="ranks").locator(".wm-error")
    error.first.wait_for(timeout=PYTHON)
    assert error.first.inner_text() == "ranks must be 2 to 6, got 9"
    assert steps_in_words(trace) == [frame.caption for frame in frames]
    trace.get_by_label("ranks").fill("3")
    error.first.wait_for(state="hidden", timeout=PYTHON)


def test_a_link_brings_other_input_back(open_page):
    page = open_page(f"{RING}?ring_trace.ranks=2")
    trace = player(page)
    frames = ring_trace(ranks=2)
    page.get_by_text(f"{len(frames)} steps, computed").wait_for(timeout=PYTHON)
    assert step(trace) == 1
    assert steps_in_words(trace) == [frame.caption for frame in frames]


def test_nothing_moves_for_those_who_asked_for_it(open_page):
    durations = "l => l.map(e => getComputedStyle(e).transitionDuration)"
    for wish in ("no-preference", "reduce"):
        page = open_page(RADIX, reduced_motion=wish)
        trace = player(page)
        trace.locator(".wm-trace-scrub").fill("5")
        parts = trace.locator(
            ".wm-trace-stage :is(.wm-part, .wm-box, .wm-wire)"
        )
        found = {
            float(d)
            for all_of in parts.evaluate_all(durations)
            for d in re.findall(r"[\d.]+", all_of)
        }
        assert (max(found) == 0) == (wish == "reduce")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", [RADIX, RING])
def test_axe_finds_no_violation(open_page, path, scheme):
    page = open_page(path, color_scheme=scheme)
    trace = player(page)
    trace.locator(".wm-trace-inputs summary").click()
    trace.locator(".wm-trace-steps summary").click()
    trace.locator(".wm-trace-scrub").fill("9")
    page.wait_for_timeout(600)
    page.evaluate(AXE.read_text("utf-8"))
    result = page.evaluate("axe.run(document.querySelector('.wm-trace'))")
    found = [
        (v["id"], n["html"][:120], n.get("failureSummary", "")[:200])
        for v in result["violations"]
        for n in v["nodes"]
    ]
    assert found == []


@pytest.mark.parametrize("path", [RADIX, RING])
def test_steps_can_be_read_without_javascript(open_page, path):
    page = open_page(path, java_script_enabled=False)
    trace = page.locator(".wm-trace").first
    frames = {RADIX: radix_trace, RING: ring_trace}[path]()
    assert caption(trace) == frames[0].caption
    assert trace.locator("button:visible").count() == 0
    assert not trace.locator(".wm-trace-inputs").is_visible()
    trace.locator(".wm-trace-steps summary").click()
    rows = trace.locator(".wm-trace-steps tbody tr")
    assert rows.count() == len(frames)
    assert rows.last.is_visible()
    assert frames[-1].caption in rows.last.inner_text()


def test_pages_without_a_trace_load_no_player(open_page):
    asked = []
    page = open_page()
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    page.wait_for_load_state("networkidle")
    without = {url.rpartition("/")[2] for url in asked}
    page.goto(page.url + RADIX)
    player(page)
    assert {
        name
        for name in (u.rpartition("/")[2] for u in asked)
        if name.startswith("trace-")
    }
    assert not [name for name in without if name.startswith("trace-")]
