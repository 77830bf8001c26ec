"""server.py's application in this process, on a real port, with its event loop on a thread."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import server
from engine.engine import Engine
from serving import engine_thread
from serving.app import application
from serving.connections import Limits
from serving.serve import Server

GENEROUS = 60.0  # seconds that something may take on a busy machine


class RunningServer:
    """A running server: its objects in this process, and its address for clients."""

    def __init__(self, port: int, key: str | None) -> None:
        self.port, self.key = port, key
        self.url = f"http://127.0.0.1:{port}"
        self.loop: asyncio.AbstractEventLoop
        self.engine_thread: engine_thread.EngineThread
        self.server: Server

    def on_engine(self, work: Callable[[Engine], Any]) -> Any:
        """Runs `work` on the engine's thread and returns its result."""
        return self.on_loop(self.engine_thread.call(work))

    def on_loop(self, work: Any) -> Any:
        """Runs a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(GENEROUS)

    def pass_time(self, seconds: float) -> None:
        """Puts the server's clock forward."""
        now = self.loop.time

        async def later() -> None:
            self.loop.time = lambda: now() + seconds  # type: ignore[method-assign]

        self.on_loop(later())

    def close_overdue(self) -> None:
        """As the server itself does once a second."""

        async def close() -> None:
            for connection in list(self.server.server_state.connections):
                connection.close_if_overdue()  # type: ignore[union-attr]

        self.on_loop(close())

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], Any]:
        """(status, headers, JSON or text). Bytes go as they are, all else as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=GENEROUS)
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        key = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        connection.request(method, path, raw, key | {"Content-Type": "application/json"} | headers)
        response = connection.getresponse()
        text = response.read()
        connection.close()
        with contextlib.suppress(ValueError):
            return response.status, dict(response.getheaders()), json.loads(text)
        return response.status, dict(response.getheaders()), text.decode()

    def start(self, path: str, body: dict) -> socket.socket:
        """Sends a request and does not wait for the answer."""
        raw = json.dumps(body).encode()
        client = socket.create_connection(("127.0.0.1", self.port), timeout=GENEROUS)
        client.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(raw)) + raw)
        return client

    def idle(self, n_pages: int) -> None:
        """Waits until nothing runs and no page is held; one that is lost never comes back."""

        def is_idle(engine: Engine) -> bool:
            engine.scheduler.check_integrity()
            return not engine.busy and engine.scheduler.pool.n_available == n_pages

        await_that(lambda: self.on_engine(is_idle), "nothing runs, and no page is held")


def await_that(condition: Callable[[], Any], what: str, within: float = GENEROUS) -> Any:
    until = time.monotonic() + within
    while not (found := condition()):
        assert time.monotonic() < until, f"not in {within} s: {what}"
        time.sleep(0.005)
    return found


@contextlib.contextmanager
def serving(
    engine: Engine, *, key: str | None = None, max_queue: int = 64, backlog: int = engine_thread.BACKLOG,
    origins: tuple[str, ...] = (), limits: Limits | None = None,
) -> Iterator[RunningServer]:  # fmt: skip
    listener = server.listen("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)  # what the system keeps of a slow reader's
    running, ready = RunningServer(listener.getsockname()[1], key), threading.Event()

    async def main() -> None:
        running.loop = asyncio.get_running_loop()
        running.engine_thread = engine_thread.EngineThread(
            lambda: engine, name="model", max_queue=max_queue, finish=lambda engine: None, backlog=backlog
        )
        app = application(running.engine_thread, ["model", "another-name"], key, "127.0.0.1", list(origins))
        running.server = Server(app, limits=limits)
        running.engine_thread.start(ready.set)
        await running.server.serve(sockets=[listener])

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert ready.wait(GENEROUS)
    try:
        yield running
    finally:
        running.on_loop(running.engine_thread.drain(0))
        running.on_loop(running.engine_thread.ended.wait())
        running.server.should_exit = True
        thread.join(GENEROUS)
        assert not thread.is_alive()


class Gate:
    """Holds an engine's steps up until it is opened, as it is when left; `step_once` lets one through."""

    def __init__(self, engine: Engine):
        self._permits = threading.Semaphore(0)
        self._open = False
        step = engine.step

        def gated() -> list:
            if not self._open:
                self._permits.acquire()
            return step()

        engine.step = gated  # type: ignore[method-assign]

    def __enter__(self) -> "Gate":
        return self

    def __exit__(self, *error: object) -> None:
        self.open()

    def step_once(self) -> None:
        self._permits.release()

    def open(self) -> None:
        self._open = True
        self._permits.release()
