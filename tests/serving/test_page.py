"""The page that talks to the server, in a real browser: Debian's chromium and chromium-driver."""

import contextlib
import itertools
import json
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from engine.engine import Engine
from serving import app
from support.http_server import GENEROUS, Gate, serving

pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="the page is tested in a browser: install chromium and chromium-driver",
)
DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"
HOSTILE = '</script><script>hacked=1</script><img src=x onerror="hacked=1"><b id=bold>&lt;&amp;'


class Page:
    """The page in a browser, as its user sees it."""

    def __init__(self, browser: webdriver.Chrome) -> None:
        self.browser = browser

    def open(self, url: str) -> None:
        self.browser.get(url)
        self.browser.execute_script("sessionStorage.clear()")
        self.browser.get(url)
        self.browser.get_log("browser")

    def all(self, css: str) -> list[Any]:
        return self.browser.find_elements(By.CSS_SELECTOR, css)

    def text(self, css: str) -> str:
        """Of the last such element, shown or not, whitespace as it is; nothing where there is none."""
        found = self.all(css)
        return found[-1].get_property("textContent") if found else ""

    def shown(self, css: str) -> bool:
        return any(element.is_displayed() for element in self.all(css))

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        wait = WebDriverWait(self.browser, GENEROUS, 0.02)
        return wait.until(lambda _: condition(), f"{what}; the page says {self.text('body > :not(script)')!r}, "
                          f"error {self.text('#error')!r}")  # fmt: skip

    def ask(self, text: str) -> None:
        self.all("#question")[0].send_keys(text + Keys.ENTER)

    def press(self, css: str) -> None:
        self.all(css)[0].click()

    def idle(self) -> None:
        self.until(lambda: self.shown("#send") and not self.shown("#stop"), "nothing is on its way")


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # as root in a container: no sandbox, and no shared memory to speak of
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=390,700"):
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield Page(browser)
    browser.quit()


class Scripted(ThreadingHTTPServer):
    """A server that says what the test tells it to, when it does."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Script)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.asked: queue.Queue[dict] = queue.Queue()  # bodies of questions
        self.said: queue.Queue[bytes | None] = queue.Queue()  # what is sent, until None
        self.left = threading.Event()  # a reader went away
        self.model, self.key = "model", ""
        self.refusal: tuple[int, Any] | None = None

    def say(self, *, drafted: Any = None, **delta: str) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": None}
        self.send({"choices": [choice | ({} if drafted is None else {"drafted": drafted})]})

    def send(self, *events: Any) -> None:
        self.said.put("".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events).encode())

    def end(self, reason: str = "stop", tokens: int = 7) -> None:
        self.send({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]},
                  {"choices": [], "usage": {"completion_tokens": tokens}})  # fmt: skip
        self.said.put(b"data: [DONE]\n\n")
        self.said.put(None)


class Script(BaseHTTPRequestHandler):
    server: Scripted

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, kind: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/":
            html = app.PAGE.read_bytes()
            return self.reply(200, "text/html; charset=utf-8", html, app.page_headers(html))
        if self.path == "/v1/models" and self.welcome():
            self.reply(200, "application/json", json.dumps({"data": [{"id": self.server.model}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.welcome():
            return
        if self.server.refusal:
            status, said = self.server.refusal
            return self.reply(status, "application/json", json.dumps(said).encode())
        self.server.asked.put(body)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            while (said := self.server.said.get(timeout=GENEROUS)) is not None:
                self.wfile.write(said)
        except OSError:
            self.server.left.set()

    def welcome(self) -> bool:
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self.reply(401, "application/json", b'{"error": {"message": "no key"}}')
            return False
        return True


@pytest.fixture
def server() -> Iterator[Scripted]:
    made = Scripted()
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def test_a_conversation(page: Page, server: Scripted) -> None:
    """Text comes bit by bit; thinking is folded away; what was drafted is marked; the conversation goes on."""
    page.open(server.url)
    page.until(lambda: page.text("#model") == "model", "the model's name")
    page.ask(f"two{Keys.SHIFT}{Keys.ENTER}{Keys.SHIFT}lines")
    asked = server.asked.get(timeout=GENEROUS)
    assert asked["messages"] == [{"role": "user", "content": "two\nlines"}]
    assert asked["stream"] and asked["stream_options"] == {"include_usage": True}
    assert page.text(".asked") == "two\nlines" and page.all("#question")[0].get_property("value") == ""

    server.say(role="assistant", content="")
    server.say(reasoning_content="Let me")
    page.until(lambda: page.text(".thought") == "Let me", "thinking")
    assert page.shown("summary") and not page.shown(".thought") and page.text("summary") == "Thinking…"
    server.say(reasoning_content=" think.", drafted=[[" thi", False], ["nk.", True]])
    page.until(lambda: page.text(".thought") == "Let me think.", "more thinking")
    assert [element.get_property("textContent") for element in page.all(".drafted")][:-1] == ["nk."]
    assert page.shown("#legend")
    page.press("summary")
    page.until(lambda: page.shown(".thought"), "thinking unfolds")

    begun, rest = b'data: {"choices": [{"index": 0, "delta": {"content": "\xc3\x89t"}}]}\n'.split(b"\x89")
    server.said.put(b'data: {"choices": [{"delta": {"reasoning_content": " So:"}}]}\n' + begun)
    page.until(lambda: page.text(".thought").endswith(" So:"), "an event, and the next within a line and a character")
    server.said.put(b"\x89" + rest)
    page.until(lambda: page.text(".said") == "Ét", "the answer begins")
    assert page.text("summary").startswith("Thought for ")
    assert page.shown("#stop") and not page.shown("#send") and page.all("#log")[0].get_attribute("aria-busy") == "true"
    server.say(content="é 🙂", drafted=[["é", True], [" 🙂", True]])
    page.until(lambda: page.text(".said") == "Été 🙂", "the answer grows")
    assert [element.get_property("textContent") for element in page.all(".said .drafted")] == ["é", " 🙂"]
    server.end(tokens=7)
    page.idle()
    figures = page.text(".figures")
    assert "to the first token · 7 tokens · " in figures and figures.endswith(" tokens/s")

    page.ask("again")
    asked = server.asked.get(timeout=GENEROUS)
    assert asked["messages"][1:] == [{"role": "assistant", "content": "Été 🙂"}, {"role": "user", "content": "again"}]
    server.say(content="No.")
    server.end("length")
    page.idle()
    assert len(page.all("article")) == 2 and page.text(".figures").endswith("cut at the limit of tokens")
    assert not page.shown("#error")
    assert page.browser.get_log("browser") == []  # nothing that the policy had to forbid


def test_the_demo(page: Page) -> None:
    """The server itself: ask, watch it stream, stop, ask again."""
    engine = Engine.from_pretrained(DEMO, dtype="float32", max_model_len=1024, n_pages=40, mtp=1)
    engine.default_params = replace(engine.default_params, temperature=0.0)
    gate = Gate(engine)
    with serving(engine) as running:
        page.open(f"{running.url}/")
        page.until(lambda: page.text("#model") == "model", "the model's name")
        page.ask("Sort these numbers: 42, 17, 93, 28, 64, 35.")
        looks = [""]
        while len(looks) < 4:
            gate.step_once()
            page.until(lambda: len(page.text(".thought")) > len(looks[-1]), "it has grown by a step")
            looks.append(page.text(".thought"))
        assert all(later.startswith(look) for look, later in itertools.pairwise(looks))
        page.press("#stop")
        gate.open()
        page.idle()
        running.idle(40)
        assert page.text(".thought") == looks[-1] and page.text(".said") == ""

        page.press("#fresh")
        page.ask("What is 347 + 285?")
        page.until(lambda: page.all("article"), "another answer")
        page.idle()
        assert page.text(".said") == "632" and page.shown("details") and not page.shown(".thought")
        body = {"messages": [{"role": "user", "content": "What is 347 + 285?"}], "stream": True}
        events = running.send("POST", "/v1/chat/completions", body)[2].split("\n\n")
        tokens = [pair for event in events if '"drafted"' in event for pair in json.loads(event[6:])["choices"][0]["drafted"]]
        marked = [element.get_property("textContent") for element in page.all("article .drafted")]
        assert len(marked) > 10 and marked == [text for text, drafted in tokens if drafted]
        assert page.shown("#legend")
        assert not page.shown("#error") and page.browser.get_log("browser") == []


def test_what_is_said_is_only_text(page: Page, server: Scripted) -> None:
    server.model = HOSTILE
    page.open(server.url)
    page.until(lambda: page.text("#model") == HOSTILE, "the model's name")
    page.ask(HOSTILE)
    server.say(reasoning_content=HOSTILE)
    server.say(content=HOSTILE, drafted=[[HOSTILE[:20], True], [HOSTILE[20:], False]])
    server.send({"error": {"message": HOSTILE}})
    page.idle()
    for part in (".asked", ".thought", ".said", "#error"):
        assert page.text(part) == HOSTILE, part
    assert len(page.all("script")) == 1 and not page.all("img, b")
    assert page.browser.execute_script("return typeof hacked") == "undefined"
    assert page.browser.get_log("browser") == []


def test_stopping(page: Page, server: Scripted) -> None:
    page.open(server.url)
    page.ask("q")
    server.say(content="One")
    page.until(lambda: page.text(".said") == "One", "the answer begins")
    page.press("#stop")
    page.idle()
    while not server.left.wait(0.01):  # noticed when something is sent
        server.say(content="two")
    assert page.text(".said") == "One" and page.text(".figures").endswith("stopped") and not page.shown("#error")
    with contextlib.suppress(queue.Empty):
        while True:
            server.said.get_nowait()
    server.asked.get(timeout=GENEROUS)
    page.ask("again")
    asked = server.asked.get(timeout=GENEROUS)["messages"]
    assert [message["content"] for message in asked] == ["q", "One", "again"]
    page.press("#fresh")  # while the answer is on its way
    page.idle()
    assert not page.all("article") and not page.shown("#error")
    server.said.put(None)  # of the answer that nobody reads
    page.until(server.said.empty, "its end")
    page.ask("anew")
    assert server.asked.get(timeout=GENEROUS)["messages"] == [{"role": "user", "content": "anew"}]
    server.end()
    page.idle()


def test_errors_are_one_line(page: Page, server: Scripted) -> None:
    page.open(server.url)

    def complains(text: str) -> None:
        page.until(lambda: page.text("#error") == text and page.shown("#error"), text)
        page.idle()
        assert page.all("#question")[0].get_property("value") == "why", "the question is given back"
        assert not page.all("article, .asked")

    server.refusal = 429, {"error": {"message": "too many wait"}}
    page.ask("why")
    complains("too many wait")
    server.refusal = 500, ["no object"]
    page.ask("")
    complains("The server answered 500 Internal Server Error.")
    server.refusal = None
    page.ask("")
    server.said.put(None)
    complains("The connection ended before the answer did.")
    server.asked.get(timeout=GENEROUS)

    page.ask("")
    server.say(content="Half an")
    page.until(lambda: page.text(".said") == "Half an" and not page.shown("#error"), "half an answer")
    server.said.put(None)
    page.until(lambda: page.text("#error") == "The connection ended before the answer did.", "the end is told")
    page.idle()
    assert page.text(".said") == "Half an"  # what came stays, and the conversation goes on from there
    assert page.all("#question")[0].get_property("value") == ""
    server.shutdown()
    server.socket.close()
    page.press("#fresh")
    page.ask("why")
    complains("The server cannot be reached.")


def test_the_key_is_asked_for(page: Page, server: Scripted) -> None:
    server.key = "secret"
    page.open(server.url)
    page.until(lambda: page.text("#error") == "The server asks for an API key.", "no key")
    page.ask("q")
    page.until(lambda: page.shown("#key-form"), "the key is asked for")
    page.idle()
    page.all("#key")[0].send_keys("wrong" + Keys.ENTER)
    page.until(lambda: page.text("#error") == "The server does not accept this API key.", "a wrong key")
    page.idle()
    page.all("#key")[0].send_keys("secret" + Keys.ENTER)
    assert server.asked.get(timeout=GENEROUS)["messages"] == [{"role": "user", "content": "q"}]
    server.say(content="Yes")
    server.end()
    page.idle()
    assert page.text(".said") == "Yes" and not page.shown("#key-form") and not page.shown("#error")
    page.browser.refresh()
    page.until(lambda: page.text("#model") == "model", "the key is kept")
    assert page.browser.execute_script("return [{...localStorage}, document.cookie]") == [{}, ""]
    assert all("401" in entry["message"] for entry in page.browser.get_log("browser"))
