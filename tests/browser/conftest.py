"""A headless Chromium on the built site, which sees no other server."""

import contextlib
import functools
import http.server
import json
import os
import shutil
import threading
from typing import ClassVar

import pytest
from building import build, dead_links
from made_up import large_map, write_repository
from playwright.sync_api import sync_playwright

FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-sandbox",  # CI containers run as root; every page here is our own
]


def find_chromium():
    names = ("chromium", "chromium-browser", "google-chrome")
    for name in (os.environ.get("CHROMIUM", ""), *names):
        if name and (found := shutil.which(name)):
            return found
    raise RuntimeError(
        "the browser tests need Chromium: install it (Debian: apt-get install "
        "chromium) or name it in CHROMIUM"
    )


class Quiet(http.server.SimpleHTTPRequestHandler):
    # the same on every machine
    extensions_map: ClassVar = {
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def log_message(self, *_):
        pass


class Unsearchable(Quiet):
    """A host whose search index is empty.

    Every page builds the index anew, a second of work. Only tests of the
    search need the whole one.
    """

    def do_GET(self):
        if not self.path.endswith("/search/search_index.json"):
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        config = {"lang": ["en"], "separator": " ", "fields": {}}
        self.wfile.write(json.dumps({"config": config, "docs": []}).encode())


class Poor(Quiet):
    """A host that knows few types of files."""

    def guess_type(self, path):
        known = str(path).endswith((".html", ".css", ".js"))
        return super().guess_type(path) if known else "application/x-unknown"


@contextlib.contextmanager
def serve(folder, handler=Quiet):
    handler = functools.partial(handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def poor_host():
    """``with poor_host(folder) as address``."""
    return functools.partial(serve, handler=Poor)


@pytest.fixture(scope="session")
def address(site):
    with serve(site, Unsearchable) as found:
        yield found


@pytest.fixture(scope="session")
def searchable(site):
    with serve(site) as found:
        yield found


@pytest.fixture(scope="session")
def large_address(tmp_path_factory):
    """A made-up site with as many topics as the map is meant to hold."""
    root = tmp_path_factory.mktemp("large")
    write_repository(root, large_map(290))
    done = build(root, root / "site")
    assert done.returncode == 0, done.stderr
    assert dead_links(root / "site") == []
    with serve(root / "site") as found:
        yield found


@pytest.fixture(scope="session")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(), args=FLAGS
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tab(chromium):
    """A tab for tests that look at one page after the other.

    It keeps scripts and styles, which takes half the time.
    """
    context = chromium.new_context()
    yield context.new_page()
    context.close()


@pytest.fixture(scope="module")
def plain_tab(chromium):
    """A tab that runs no script."""
    context = chromium.new_context(java_script_enabled=False)
    yield context.new_page()
    context.close()


@pytest.fixture
def open_page(chromium, address):
    """``open_page(path, base, **context)``: a page of the site, or of another.

    In a new window, or in ``tab``. Fails at the end when a page asked another
    server for anything, or when its scripts raised.
    """
    contexts, heard, outside, errors = [], [], [], []

    def opened(path="", base=address, tab=None, **options):
        if (page := tab) is None:
            options.setdefault("viewport", {"width": 1280, "height": 800})
            contexts.append(chromium.new_context(**options))
            page = contexts[-1].new_page()

        def asked(request):
            if not request.url.startswith((base, "data:", "blob:")):
                outside.append(request.url)

        def raised(error):
            errors.append(str(error))

        for event, hear in (("request", asked), ("pageerror", raised)):
            page.on(event, hear)
            heard.append((page, event, hear))
        page.goto(base + path)
        page.wait_for_load_state("networkidle")
        return page

    yield opened
    for page, event, hear in heard:
        page.remove_listener(event, hear)
    for context in contexts:
        context.close()
    assert outside == []
    assert errors == []
