"""The site as a reader meets it: mouse, keyboard, phone, no script, no net."""

import json

import pytest
from building import ROOT

from warpmap_site.labs import load_labs
from warpmap_site.loading import load_atlas

ATLAS = load_atlas(ROOT)
LABS = [lab.url for lab in load_labs(ROOT)]
PAGES = [
    "",
    *(f"{area.path}/" for area in ATLAS.areas),
    *(topic.url for topic in ATLAS.reading_order),
    *(f"reference/{t.url}" for t in ATLAS.reading_order),
    *("labs/", *LABS),
]
KV = ATLAS.topics["inference/decoding/kv_cache_size"]
SAMPLE = ["", "kernels/", KV.url, f"reference/{KV.url}", "labs/", *LABS]
AXE = ROOT / "web/node_modules/axe-core/axe.min.js"


def topic(page, path):
    return page.locator(f'li[data-path="{path}"]')


# -- the map -------------------------------------------------------------------


def test_map_opens_a_topic_by_click(open_page):
    page = open_page()
    topic(page, KV.path).locator("a").click()
    page.wait_for_url(f"**/{KV.url}")
    assert page.locator("h1").inner_text() == KV.title


def test_map_opens_a_topic_by_keyboard(open_page):
    page = open_page()
    for _ in range(30 + len(ATLAS.topics)):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            "document.activeElement.closest('li')?.dataset.path"
        )
        if focused == KV.path:
            break
    assert focused == KV.path
    before = f"{len(ATLAS.path_to(KV))} topics before it"
    assert before in page.locator("#wm-status").inner_text()
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/{KV.url}")


def test_pointing_marks_what_comes_before_and_after(open_page):
    page = open_page()
    topic(page, KV.path).hover()
    marked = page.locator("li.on").evaluate_all(
        "l => l.map(e => e.dataset.path)"
    )
    expected = {t.path for t in (*ATLAS.path_to(KV), *ATLAS.leads_to(KV))}
    assert set(marked) == expected
    assert page.locator(".wm-wires path").count() >= len(KV.meta.builds_on)


def shown(page):
    items = page.locator("li[data-path]:visible")
    return set(items.evaluate_all("l => l.map(e => e.dataset.path)"))


def choose(page, name, value):
    page.locator(f'label:has([name="{name}"][value="{value}"])').click()


def test_filters_leave_what_matches(open_page):
    page = open_page()
    everything = set(ATLAS.topics)
    assert shown(page) == everything
    choose(page, "runs", "browser")
    browser = {
        p for p, t in ATLAS.topics.items() if "browser" in t.meta.runs_on
    }
    assert shown(page) == browser != everything
    choose(page, "kind", "recipe")
    assert shown(page) == {
        p for p in browser if ATLAS.topics[p].meta.kind == "recipe"
    }
    page.locator(".wm-filters button").click()
    assert shown(page) == everything
    choose(page, "area", "kernels")
    assert shown(page) == {p for p in everything if p.startswith("kernels/")}


def test_path_view_lists_everything_before_in_order(open_page):
    page = open_page()
    page.get_by_label("Path to").fill(KV.title)
    page.keyboard.press("Enter")
    links = page.locator("#wm-path li a").all_inner_texts()
    assert links == [*(t.title for t in ATLAS.path_to(KV)), KV.title]
    page.keyboard.press("Escape")
    assert page.locator("#wm-path").is_hidden()


def test_path_view_can_be_linked_to(open_page):
    page = open_page(KV.url)
    page.get_by_role("link", name="Show on the map").click()
    page.wait_for_selector("#wm-path:visible")
    assert topic(page, KV.path).get_attribute("class") == "me"


def test_read_marks_stay_in_the_browser(open_page):
    page = open_page(KV.url)
    button = page.get_by_role("button", name="Mark as read")
    button.click()
    assert page.evaluate("localStorage['warpmap.read']") == json.dumps(
        [KV.path]
    )
    page.goto(page.url.replace(KV.url, ""))
    assert "wm-read-topic" in topic(page, KV.path).get_attribute("class")
    choose(page, "unread", "1")
    assert KV.path not in shown(page)


@pytest.mark.parametrize("width", [390, 1280, 1920])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_large_map_stays_legible(chromium, large_address, width, scheme):
    context = chromium.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme
    )
    page = context.new_page()
    page.goto(large_address)
    cut = page.locator(".wm-topic-title").evaluate_all(
        """titles => titles.filter(t => {
          const box = t.getBoundingClientRect();
          return t.scrollWidth > Math.ceil(box.width) + 1 || box.left < 0 ||
            box.right > innerWidth ||
            parseFloat(getComputedStyle(t).fontSize) < 12;
        }).map(t => t.textContent)"""
    )
    assert page.locator(".wm-topic-title").count() == 290
    assert cut == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


# -- pages ---------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES)
def test_page_asks_no_other_server_and_fits_a_phone(open_page, tab, path):
    tab.set_viewport_size({"width": 1280, "height": 800})
    page = open_page(path, tab=tab)
    assert page.locator("h1").count() == 1
    assert page.locator(".katex-error").count() == 0
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) <= 1280
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate(width) <= 360


@pytest.mark.parametrize("words", ["显存占用", "KV缓存", "KV cache memory"])
def test_search_finds_a_topic_by_another_name(open_page, searchable, words):
    page = open_page(base=searchable)
    page.locator(".md-search__input").fill(words)
    page.keyboard.press("End")  # the search listens to keys, fill presses none
    found = page.locator(f'.md-search-result__link[href*="{KV.url}"]')
    found.first.wait_for(timeout=10_000)


@pytest.mark.parametrize("path", SAMPLE)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation(open_page, path, scheme):
    page = open_page(path, color_scheme=scheme)
    page.evaluate(AXE.read_text("utf-8"))
    result = page.evaluate("axe.run()")
    found = [
        (v["id"], n["html"][:120], n.get("failureSummary", "")[:200])
        for v in result["violations"]
        for n in v["nodes"]
    ]
    assert found == []


@pytest.mark.parametrize("path", SAMPLE)
def test_page_works_without_javascript(open_page, path):
    page = open_page(path, java_script_enabled=False)
    assert page.locator("h1").is_visible()
    assert page.locator("button:visible").count() == 0
    if not path:
        page.locator(f'a.wm-topic[href="{KV.url}"]').click()
        page.wait_for_url(f"**/{KV.url}")


def test_copy_takes_the_code_without_its_output(open_page):
    page = open_page(KV.url, permissions=["clipboard-read", "clipboard-write"])
    page.locator(".wm-cell .wm-copy").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    snippet = (ROOT / f"snippets/{KV.path}.py").read_text("utf-8")
    code = "\n".join(
        s for s in snippet.splitlines() if not s.startswith("# ->")
    )
    assert copied.strip() == code.strip()
