"""Cells on a kernel, by `warpmap serve` itself; and who cannot use it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from building import ROOT

from warpmap_site.sources import split_snippet

SOFTMAX = "kernels/normalization/softmax"
KV = "inference/decoding/kv_cache_size"
RANKS = "training/sharding/collective_operations"
AXE = ROOT / "web/node_modules/axe-core/axe.min.js"
SLOW = 60_000  # milliseconds: a kernel starts and imports PyTorch

pytestmark = pytest.mark.skipif(
    os.name == "nt", reason="signals of POSIX, and Triton"
)


class Served:
    """A running ``warpmap serve``."""

    def __init__(self, process, address):
        self.process, self.address = process, address
        self.site, fragment = address.split("#")
        self.port, self.token = re.match(
            r"kernel=(\d+)&token=([\w-]+)", fragment
        ).groups()
        self.kernel = f"http://127.0.0.1:{self.port}/"

    def ask(self, path, token="", method="GET", **headers):
        """The status with which the Jupyter server answers."""
        if token:
            headers["Authorization"] = f"token {token}"
        request = urllib.request.Request(
            self.kernel + path, headers=headers, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def kernels(self):
        request = urllib.request.Request(
            f"{self.kernel}api/kernels",
            headers={"Authorization": f"token {self.token}"},
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def served():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "warpmap_site.cli", "serve"]
    command += ["--no-browser", "--port", str(port)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        said = [process.stdout.readline() for _ in range(4)]
        assert "with your rights" in said[2]
        yield Served(process, said[1].split()[1])
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


@pytest.fixture
def visit(chromium, served):
    """``visit(path)``: a topic's page in a tab that has a kernel."""
    contexts = []

    def visited(path, address=served.address, **options):
        options.setdefault("viewport", {"width": 1280, "height": 900})
        context = chromium.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(address)
        page.goto(f"{served.site}{path}/")
        page.locator(".wm-kernel").wait_for()
        return page

    yield visited
    for context in contexts:
        for page in context.pages:
            assert page.errors == []
        context.close()


def state(page, words="connected|Python"):
    """What the panel says, once it says one of these words."""
    page.wait_for_function(
        "w => RegExp(w).test(document.querySelector("
        "'.wm-kernel-state')?.textContent)",
        arg=words,
        timeout=SLOW,
    )
    return page.locator(".wm-kernel-state").inner_text()


def choose_kernel(page):
    if page.locator(".wm-run[data-runs~=browser]").count():
        choice = page.locator(".wm-runner")
        choice.wait_for(timeout=SLOW)  # the kernel comes after the browser
        choice.select_option("on my kernel")


def start(page, code=None):
    choose_kernel(page)
    if code is not None:
        if page.locator(".wm-edit").is_visible():
            page.locator(".wm-edit").click()
        page.locator(".wm-editor").fill(code)
    page.locator(".wm-go").click()


def finish(page):
    """How a run ended, and what it printed."""
    page.wait_for_function(
        "/^(Finished|Failed|Stopped)/.test("
        "document.querySelector('.wm-said').textContent)",
        timeout=SLOW,
    )
    said = page.locator(".wm-said").inner_text().split(" ")[0]
    return said, page.locator(".wm-output pre").inner_text().strip()


def run(page, code=None):
    start(page, code)
    return finish(page)


# -- what a reader does --------------------------------------------------------


def test_a_triton_snippet_prints_what_the_page_promises(visit):
    page = visit(SOFTMAX)
    assert state(page) == "connected"
    promised = split_snippet((ROOT / f"snippets/{SOFTMAX}.py").read_text())[1]
    page.locator(".wm-output pre").evaluate("e => (e.textContent = '')")
    assert run(page) == ("Finished", promised)
    assert re.fullmatch(r"Python 3\.\d+\.\d+, .+", state(page, "Python"))


def test_a_snippet_of_several_processes_runs(visit):
    page = visit(RANKS)
    promised = split_snippet((ROOT / f"snippets/{RANKS}.py").read_text())[1]
    assert run(page) == ("Finished", promised)


def test_text_comes_from_both_streams_without_colours(visit):
    page = visit(KV)
    code = "import sys\nprint('\\x1b[31mred\\x1b[0m')\nsys.stderr.write('err')"
    assert run(page, code) == ("Finished", "red\nerr")
    stderr = page.locator('.wm-output [data-stream="stderr"]')
    assert stderr.inner_text() == "err"


def test_an_image_is_shown_and_html_is_text(visit):
    page = visit(KV)
    code = """
import struct, zlib
from IPython.display import HTML, Image, display
def chunk(name, data):
    check = struct.pack(">I", zlib.crc32(name + data))
    return struct.pack(">I", len(data)) + name + data + check
head = chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 2, 8, 2, 0, 0, 0))
rows = (b"\\0" + b"\\xff\\0\\0" * 3) * 2
body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
display(Image(b"\\x89PNG\\r\\n\\x1a\\n" + head + body))
display(HTML("<b id='bold'>bold</b><script>window.ran = 1</script>"))
print("<i id='italic'>")
"""
    said, printed = run(page, code)
    assert said == "Finished"
    size = page.locator(".wm-output img").evaluate(
        "i => i.decode().then(() => [i.naturalWidth, i.naturalHeight])"
    )
    assert size == [3, 2]
    assert "<i id='italic'>" in printed
    assert page.locator("#bold, #italic").count() == 0
    assert page.evaluate("window.ran") is None


def test_an_error_is_a_plain_traceback(visit):
    page = visit(KV)
    said, printed = run(page, "def f(x):\n    return 1 / x\n\nf(0)")
    assert said == "Failed"
    assert "return 1 / x" in printed
    assert printed.endswith("ZeroDivisionError: division by zero")
    assert "\x1b" not in printed


def test_each_run_begins_with_nothing(visit):
    page = visit(KV)
    assert run(page, "kept = 1")[0] == "Finished"
    said, printed = run(page, "print(kept)")
    assert said == "Failed"
    assert "NameError" in printed


def test_stop_interrupts_an_endless_loop(visit):
    page = visit(KV)
    start(page, "print('on')\nwhile True: pass")
    page.locator(".wm-output", has_text="on").wait_for(timeout=SLOW)
    page.get_by_role("button", name="Stop").click()
    assert finish(page)[0] == "Stopped"
    assert run(page, "print(1)") == ("Finished", "1")


def test_stop_restarts_what_cannot_be_interrupted(visit):
    page = visit(KV)
    start(
        page,
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "print('on')\nwhile True: pass",
    )
    page.locator(".wm-output", has_text="on").wait_for(timeout=SLOW)
    page.get_by_role("button", name="Stop").click()
    assert finish(page)[0] == "Stopped"
    assert run(page, "print(1)") == ("Finished", "1")


def test_restart_ends_the_process(visit):
    page = visit(KV)
    code = "import os\nprint(os.getpid())"
    before = run(page, code)[1]
    assert run(page, code)[1] == before
    state(page, "Python")
    page.locator(".wm-kernel summary").click()
    page.get_by_role("button", name="Restart").click()
    state(page, "restarting")
    state(page, "Python")
    assert run(page, code)[1] not in (before, "")


def test_a_kernel_that_dies_is_said_and_started_again(visit):
    page = visit(KV)
    said, printed = run(page, "import os\nos.kill(os.getpid(), 9)")
    assert (said, printed.split(".")[0]) == ("Failed", "The kernel ended")
    assert run(page, "print(1)") == ("Finished", "1")


def test_another_page_of_the_tab_uses_the_same_kernel(visit, served):
    page = visit(KV)
    code = "import os\nprint(os.getpid())"
    process = run(page, code)[1]
    known = state(page, "Python")
    kernels = {k["id"] for k in served.kernels()}
    page.goto(f"{served.site}{SOFTMAX}/")
    assert state(page) == known
    assert run(page, code)[1] == process
    assert {k["id"] for k in served.kernels()} == kernels


def test_disconnect_ends_the_kernel(visit, served):
    page = visit(KV)
    run(page, "print(1)")
    kernel = page.evaluate("JSON.parse(sessionStorage['warpmap.kernel'])")
    page.locator(".wm-kernel summary").click()
    page.get_by_role("button", name="Disconnect").click()
    assert state(page, "not connected")
    assert kernel["kernel"] not in {k["id"] for k in served.kernels()}
    assert page.evaluate("sessionStorage.length") == 0
    assert page.locator(".wm-runner").is_hidden()


def test_the_address_can_be_pasted(visit, served):
    page = visit(KV, address=served.site)
    assert state(page, "not connected")
    page.locator(".wm-kernel summary").click()
    page.get_by_label("Address", exact=True).fill(served.kernel)
    page.get_by_label("Token", exact=True).fill(served.token)
    page.get_by_role("button", name="Connect").click()
    assert state(page) == "connected"
    assert run(page, "print(1)") == ("Finished", "1")


# -- what fails says why -------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.address[:-4] + "none", "refuses this page or this token"),
        (lambda s: s.address.replace(s.port, "1"), "Nothing answers at"),
    ],
)
def test_a_wrong_address_is_answered_with_a_checklist(
    visit, served, change, says
):
    before = len(served.kernels())
    page = visit(KV, address=served.site)
    page.locator(".wm-kernel summary").click()
    page.get_by_label("Address", exact=True).fill(change(served))
    page.get_by_role("button", name="Connect").click()
    why = page.locator(".wm-kernel-why")
    assert says in why.inner_text()
    assert why.locator("li").count() >= 3
    assert page.locator(".wm-kernel-state").inner_text() == "not connected"
    # no cell is offered the kernel
    assert page.locator(".wm-runner").is_hidden()
    assert len(served.kernels()) == before
    assert page.evaluate("sessionStorage.length") == 0


def test_a_server_that_is_gone_is_said(visit, served):
    page = visit(KV)
    choose_kernel(page)
    page.route(f"{served.kernel}**", lambda route: route.abort())
    said, printed = run(page)
    assert said == "Failed"
    assert "does not answer" in printed
    assert "Nothing answers" in page.locator(".wm-kernel-why").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_no_violation_on_the_panel(visit, served, scheme, width):
    options = {
        "color_scheme": scheme,
        "viewport": {"width": width, "height": 800},
    }
    page = visit(SOFTMAX, address=served.address[:-4] + "none", **options)
    page.locator(".wm-kernel-why").wait_for()  # opened by itself
    page.evaluate(AXE.read_text("utf-8"))
    found = page.evaluate("axe.run('.wm-article')")["violations"]
    assert [(v["id"], v["nodes"][0]["html"]) for v in found] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width

    page.get_by_label("Address", exact=True).fill(served.address)
    page.get_by_role("button", name="Connect").click()
    state(page, "^connected")
    found = page.evaluate("axe.run('.wm-article')")["violations"]
    assert [(v["id"], v["nodes"][0]["html"]) for v in found] == []


# -- who cannot use it ---------------------------------------------------------


def test_the_token_is_in_the_tab_alone(visit, served):
    page = visit(KV)
    assert run(page, "print(1)")[0] == "Finished"
    assert served.token in page.evaluate("sessionStorage['warpmap.kernel']")
    assert served.token not in page.evaluate("JSON.stringify(localStorage)")
    assert page.context.cookies() == []
    page.goto(served.address)  # its address is rewritten at once
    page.wait_for_function("location.hash === ''")
    assert page.url == served.site
    page.goto(f"{served.site}{KV}/#kernel={served.port}&token={served.token}")
    page.wait_for_function("location.hash === ''")


def test_the_token_is_in_no_list_of_processes(served):
    listed = subprocess.run(
        ["ps", "axww"], capture_output=True, text=True, check=True
    ).stdout
    assert "jupyter_server" in listed
    assert served.token not in listed


def test_nothing_listens_beyond_this_machine(visit, served):
    page = visit(KV)
    run(page, "print(1)")  # a kernel's own ports are open
    tree = descendants(served.process.pid)
    assert len(tree) >= 4
    listening = subprocess.run(
        ["ss", "-Hltnp"], capture_output=True, text=True, check=True
    ).stdout
    ours = [
        line.split()[3]
        for line in listening.splitlines()
        if any(f"pid={pid}," in line for pid in tree)
    ]
    assert f"127.0.0.1:{served.port}" in ours
    assert [a for a in ours if not a.startswith("127.0.0.1:")] == []


def descendants(pid):
    table = subprocess.run(
        ["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    parents = dict(line.split() for line in table.splitlines())
    found = [str(pid)]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


@pytest.mark.parametrize("token", ["", "wrong"])
def test_without_the_token_nothing_is_answered(served, token):
    assert served.ask("api/kernels", token) == 403
    assert served.ask("api/kernels", token, "POST") == 403
    assert served.ask(f"api/kernels?token={token}") == 403
    assert served.ask("api/contents", token) == 403


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("api/contents", "GET"),
        ("api/contents/x.txt", "PUT"),
        ("api/sessions", "POST"),
        ("api/shutdown", "POST"),
        ("api/terminals", "POST"),
        ("files/ipython", "GET"),
        ("lab", "GET"),
        ("tree", "GET"),
    ],
)
def test_the_token_opens_kernels_and_nothing_else(served, path, method):
    assert served.ask("api/kernels", served.token) == 200
    assert served.ask(path, served.token, method) in (403, 404, 405)


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "https://127.0.0.1:{port}",
        "http://127.0.0.1:{port}0",
        "http://127.0.0.1:{port}.evil.example",
        "http://127x0.0.1:{port}",
        "http://evil.example/http://127.0.0.1:{port}",
    ],
)
def test_another_origin_is_refused_with_the_token(served, origin):
    port = served.site.rstrip("/").rpartition(":")[2]
    origin = origin.format(port=port)
    before = len(served.kernels())
    for method in ("GET", "POST"):
        answer = served.ask("api/kernels", served.token, method, Origin=origin)
        assert answer in (403, 404)
    assert len(served.kernels()) == before


def test_a_host_that_is_not_this_machine_is_refused(served):
    host = {"Host": "evil.example"}  # a name that was bent to 127.0.0.1
    assert served.ask("api/kernels", served.token, **host) == 403


STRANGER = """async ([kernel, id, token]) => {
  const asked = await fetch(`${kernel}api/kernels?token=${token}`, {
    method: "POST", credentials: "include", body: "{}",
  }).then((answer) => answer.status, () => "refused");
  const socket = new WebSocket(
    `${kernel.replace("http", "ws")}api/kernels/${id}/channels?token=${token}`,
  );
  const opened = await new Promise((done) => {
    socket.onopen = () => done("opened");
    socket.onerror = () => done("refused");
  });
  return [asked, opened];
}"""


@pytest.mark.parametrize("with_token", [False, True])
def test_a_page_of_another_origin_runs_nothing(
    visit, served, address, with_token
):
    page = visit(KV)
    run(page, "print(1)")
    kernels = [k["id"] for k in served.kernels()]
    token = served.token if with_token else ""
    stranger = page.context.new_page()  # with all cookies there are
    stranger.errors = []
    stranger.goto(address)  # the same pages, from another port
    answer = stranger.evaluate(STRANGER, [served.kernel, kernels[-1], token])
    assert answer == ["refused", "refused"]
    assert [k["id"] for k in served.kernels()] == kernels
    # the same question from the site itself is answered
    own = page.evaluate(
        STRANGER.replace('"include"', '"omit"'),
        [served.kernel, kernels[-1], served.token],
    )
    assert own == [201, "opened"]
