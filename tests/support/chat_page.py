"""The chat page in a real browser (Debian's chromium and chromium-driver), and a server that says what it is told to."""

import contextlib
import json
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait
from starlette.datastructures import Headers

from serving.page_files import page_response
from support.http_server import GENEROUS

NARROW, WIDE = (390, 760), (1280, 860)  # CSS pixels
MODEL = {"model": "model", "context": 4096, "temperature": 0.6, "thinking_switch": False, "tools": False, "drafts": True,
         "examples": []}  # fmt: skip


def has_browser() -> bool:
    return bool(shutil.which("chromium") and shutil.which("chromedriver"))


class Page:
    """The page in a browser, as its user sees it."""

    def __init__(self, browser: webdriver.Chrome) -> None:
        self.browser = browser

    def open(self, url: str, size: tuple[int, int] = NARROW, dark: bool = False) -> None:
        """The page as on a first visit."""
        self.resize(size, dark)
        self.browser.get(url)
        self.run("sessionStorage.clear(); localStorage.clear()")
        self.browser.get(url)
        self.browser.get_log("browser")

    def resize(self, size: tuple[int, int], dark: bool = False) -> None:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme, still]})

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def all(self, css: str) -> list[Any]:
        return self.browser.find_elements(By.CSS_SELECTOR, css)

    def text(self, css: str) -> str:
        """Of the last such element, shown or not, whitespace as it is; nothing where there is none."""
        found = self.all(css)
        return found[-1].get_property("textContent") if found else ""

    def texts(self, css: str) -> list[str]:
        return self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", css)

    def shown(self, css: str) -> bool:
        return any(element.is_displayed() for element in self.all(css))

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        wait = WebDriverWait(self.browser, GENEROUS, 0.02)
        return wait.until(lambda _: condition(), f"{what}; the page says {self.text('#log')!r}, error {self.text('#notice')!r}")

    def ask(self, text: str) -> None:
        self.all("#question")[0].send_keys(text + Keys.ENTER)

    def press(self, css: str) -> None:
        """The last such element that is shown."""
        self.until(lambda: self.shown(css), f"{css} is shown")
        next(element for element in reversed(self.all(css)) if element.is_displayed()).click()

    def idle(self) -> None:
        self.until(lambda: self.shown("#send") and not self.shown("#stop"), "nothing is on its way")

    def stored(self) -> list[dict[str, Any]]:
        """The conversations that the browser keeps."""
        return self.run("return Object.keys(localStorage).filter(k => k.startsWith('chat:')).map(k => JSON.parse(localStorage[k]))")

    @property
    def complaints(self) -> list[str]:
        """What the browser's console has got since it was asked last, such as what the policy forbade."""
        return [entry["message"] for entry in self.browser.get_log("browser")]


@contextlib.contextmanager
def opened_browser() -> Iterator[Page]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # as root in a container: no sandbox, and no shared memory to speak of
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1300,900"):
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield Page(browser)
    finally:
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
        self.model: dict[str, Any] = dict(MODEL)
        self.key = ""
        self.loading = False
        self.refusal: tuple[int, Any] | None = None

    def next_question(self) -> dict[str, Any]:
        return self.asked.get(timeout=GENEROUS)

    def say(self, *, drafted: Any = None, **delta: Any) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": None}
        self.send({"choices": [choice | ({} if drafted is None else {"drafted": drafted})]})

    def send(self, *events: Any) -> None:
        self.said.put("".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events).encode())

    def end(self, reason: str = "stop", tokens: int = 7) -> None:
        self.send({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]},
                  {"choices": [], "usage": {"completion_tokens": tokens}})  # fmt: skip
        self.said.put(b"data: [DONE]\n\n")
        self.said.put(None)

    def answer(self, text: str) -> dict[str, Any]:
        """Answers the next question at once; returns its body."""
        self.say(content=text)
        self.end()
        return self.next_question()


class Script(BaseHTTPRequestHandler):
    server: Scripted

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def json(self, status: int, content: Any) -> None:
        self.reply(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def do_GET(self) -> None:
        if self.path == "/page/settings.json":
            if self.server.loading:
                self.json(503, {"error": {"message": "the engine is loading"}})
            elif self.welcome():
                self.json(200, self.server.model)
            return
        name = "index.html" if self.path == "/" else self.path.removeprefix("/page/")
        if response := page_response(name, Headers()):
            self.reply(response.status_code, response.body, dict(response.headers))
        else:
            self.json(404, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.welcome():
            return
        if self.server.refusal:
            return self.json(*self.server.refusal)
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
            self.json(401, {"error": {"message": "no key"}})
            return False
        return True


@contextlib.contextmanager
def scripted() -> Iterator[Scripted]:
    made = Scripted()
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        made.server_close()
        thread.join()
