"""Connections: how many, how long each may keep the server waiting, who is closed first, and what is logged of it."""

import asyncio
import json
import logging
import re
import resource
import socket
import time
from collections.abc import Iterator

import openai
import pytest
import uvicorn

import server
from core.errors import UserError
from core.run_config import RunConfig
from engine.engine import Engine
from serving import bodies, streams
from serving.connections import Limits, Listening, max_connections
from serving.serve import Server
from support import processes as launch
from support.http_server import GENEROUS, Gate, RunningServer, await_that, serving

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG = {"prompt": "hello", "max_tokens": 60, "temperature": 0, "stream": True}
POST = b"POST %s HTTP/1.1\r\nHost: localhost\r\n" % COMPLETIONS.encode()
HALVES = (b"", b"POST /v1/comp", POST, POST + b"Content-Length: 100\r\n\r\n{", b"GET /health HTTP/1.1\r\nHost: localhost\r\n")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = launch.make_tiny(tmp_path_factory.mktemp("transport") / "tiny")
    return Engine.from_pretrained(folder, dtype="float32", max_model_len=512, n_pages=40)


def again(engine: Engine, **changes: int) -> Engine:
    """Another engine of the same model."""
    return Engine(engine.model, engine.tokenizer, RunConfig(**{"max_model_len": 512, "n_pages": 40} | changes))


def connect(running: RunningServer, say: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", running.port), timeout=GENEROUS)
    client.sendall(say)
    return client


def answer(client: socket.socket) -> bytes:
    """One JSON answer, whole."""
    text = b""
    while not text.endswith(b"}"):
        part = client.recv(1 << 16)
        assert part
        text += part
    return text


def is_closed(client: socket.socket) -> bool:
    """Whether the server has closed it, without an answer or after one."""
    client.setblocking(False)
    try:
        while client.recv(1 << 16):
            pass
        return True
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


# ---------------------------------------------------------------- how many


def test_half_open_connections_make_room(tiny: Engine) -> None:
    """Whatever they have said so far, the oldest go first; who is being answered stays, and anybody is heard."""
    engine = again(tiny)
    gate = Gate(engine)
    with serving(engine, limits=Limits(20, idle=60)) as running, gate:
        busy = running.start(COMPLETIONS, LONG)
        await_that(lambda: running.engine_thread._answers, "it is in")
        halves = []
        for i in range(60):
            halves.append(connect(running, HALVES[i % len(HALVES)]))
            if i % 10 == 0:
                began = time.monotonic()
                assert running.send("GET", "/health")[0] == 200
                assert time.monotonic() - began < 5
        assert len(running.server.server_state.connections) <= 20
        await_that(lambda: all(is_closed(half) for i, half in enumerate(halves[:45]) if i % 5 != 3), "the oldest are closed")
        assert not any(map(is_closed, halves[-5:])), "nor are those whose body has begun"
        gate.open()
        text = b""
        while b"[DONE]" not in text:
            text += busy.recv(1 << 16)
        for client in (busy, *halves):
            client.close()


def test_no_room_at_all(tiny: Engine) -> None:
    """Where all connections are being answered, another one is told so, and nobody is cut off."""
    engine = again(tiny, max_num_seqs=4)
    gate = Gate(engine)
    with serving(engine, limits=Limits(6, idle=60)) as running, gate:
        clients = [running.start(COMPLETIONS, {**LONG, "max_tokens": 3}) for _ in range(6)]
        await_that(lambda: len(running.engine_thread._answers) == 6, "they are in")
        status, headers, said = running.send("GET", "/health")
        assert (status, headers["Retry-After"], said["error"]["code"]) == (503, "1", "unavailable")
        gate.open()
        for client in clients:
            text = b""
            while part := client.recv(1 << 16):
                text += part
                if b"[DONE]" in text:
                    break
            assert b"[DONE]" in text
            client.close()
        await_that(lambda: running.send("GET", "/health")[0] == 200, "there is room again")


def test_the_cap_leaves_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, most in ((256, 128), (1024, 896), (64, 16), (1 << 20, 4096), (resource.RLIM_INFINITY, 4096)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, soft=soft: (soft, soft))
        assert max_connections() == most


def test_accept_errors_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """asyncio tells each, and tries again at once: 50 MB of log a minute."""

    async def main() -> None:
        Listening([])
        loop = asyncio.get_running_loop()
        for _ in range(1000):
            context = {"message": "socket.accept() out of system resource", "exception": OSError(24, "Too many open files")}
            loop.call_exception_handler(context)
        loop.call_exception_handler({"message": "another"})

    with caplog.at_level(logging.ERROR):
        asyncio.run(main())
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and "Too many open files; ulimit -n" in told[0] and told[1] == "another"


# ---------------------------------------------------------------- how long


def test_deadlines(tiny: Engine) -> None:
    """For headers, whether nothing comes of them or a byte now and then; between requests; not while it answers."""
    engine = again(tiny)
    gate = Gate(engine)
    with serving(engine, limits=Limits(100, idle=300, head=100)) as running, gate:
        busy = running.start(COMPLETIONS, LONG)
        await_that(lambda: running.engine_thread._answers, "it is in")
        halves = [connect(running, half) for half in HALVES[:3]]
        trickling = connect(running, POST)
        idle = connect(running, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer(idle).startswith(b"HTTP/1.1 200 ")
        running.pass_time(90)
        trickling.sendall(b"X-Slow: x")
        assert running.send("GET", "/health")[0] == 200, "all of this has come"
        running.close_overdue()
        assert not any(map(is_closed, (*halves, trickling, idle, busy)))
        running.pass_time(20)
        await_that(lambda: all(map(is_closed, (*halves, trickling))), "those without headers are closed")
        assert not is_closed(idle) and not is_closed(busy)
        idle.setblocking(True)
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer(idle).startswith(b"HTTP/1.1 200 ")
        refused = connect(running, b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
        assert answer(refused).startswith(b"HTTP/1.1 404 ")
        running.pass_time(250)  # since its second request
        running.close_overdue()
        assert not is_closed(idle) and not is_closed(busy)
        running.pass_time(100)
        await_that(lambda: is_closed(idle) and is_closed(refused), "an idle one, and one whose body nobody waits for")
        busy.setblocking(True)
        gate.open()
        text = b""
        while b"[DONE]" not in text:
            part = busy.recv(1 << 16)
            assert part
            text += part


def test_a_body_has_to_come_in_time(tiny: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.3)
    with serving(again(tiny)) as running:
        client = connect(running, POST + b"Content-Length: 100\r\n\r\n{")
        assert client.recv(1000).startswith(b"HTTP/1.1 408 ")
        client.close()


def test_an_answer_has_to_be_read(tiny: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that stops is cut off; one that reads slowly is not, however full its buffer is when it is looked at."""
    monkeypatch.setattr(Server, "on_tick", uvicorn.Server.on_tick)  # nobody else looks
    with serving(again(tiny), limits=Limits(100, idle=6000, write=100)) as running:
        asked = json.dumps({**LONG, "n": 8, "max_tokens": 200, "logprobs": 20}).encode()
        clients = [socket.socket(), socket.socket()]
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(GENEROUS)
            client.connect(("127.0.0.1", running.port))
            client.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(asked) + asked)
        slow, client = clients
        await_that(lambda: running.engine_thread._answers and not running.engine_thread._n_open, "all is said")
        text, waited = b"", 0
        while b"[DONE]" not in text:
            part = slow.recv(1 << 13)
            assert part, "a slow reader is not cut off"
            text += part
            if len(text) // 140_000 > waited:  # more than its buffers may hold
                waited += 1
                for connection in running.server.server_state.connections:
                    connection._unsent = 0
                running.pass_time(80)
                running.close_overdue()
        assert waited >= 2
        slow.close()
        running.pass_time(110)
        running.close_overdue()
        await_that(lambda: not running.server.server_state.connections, "the one that does not read is closed")
        client.close()


def test_silences_are_filled_with_comments(tiny: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first token, and later; clients do not see them."""
    monkeypatch.setattr(streams, "SILENCE_SECONDS", 0.1)
    engine = again(tiny)
    gate = Gate(engine)
    with serving(engine) as running, gate, openai.OpenAI(base_url=f"{running.url}/v1", api_key="none") as api:
        client = running.start(COMPLETIONS, LONG)
        text = b""
        while text.count(b": still working\n\n") < 3:
            text += client.recv(1 << 16)
        assert b"data:" not in text
        while b"data:" not in text:
            gate.step_once()  # its token may be a part of a character
            text += client.recv(1 << 16)
        before = text.count(b": still working\n\n")
        while text.count(b": still working\n\n") < before + 2:
            text += client.recv(1 << 16)
        gate.open()
        while b"[DONE]" not in text:
            text += client.recv(1 << 16)
        client.close()
        monkeypatch.setattr(streams, "SILENCE_SECONDS", 0.0)  # between any two events
        parts = list(api.completions.create(model="model", prompt="hello", max_tokens=9, temperature=0, stream=True))
        assert parts[-1].choices[0].finish_reason == "length"


# ---------------------------------------------------------------- who is let in


OPENAIS = ("authorization,content-type,openai-organization,openai-project,x-stainless-arch,x-stainless-lang,x-stainless-os,"
           "x-stainless-package-version,x-stainless-retry-count,x-stainless-runtime,x-stainless-runtime-version,"
           "x-stainless-timeout,x-stainless-helper-method")  # fmt: skip


@pytest.mark.parametrize("allowed", ["*", "https://app.example"])
def test_a_page_of_another_origin(tiny: Engine, allowed: str) -> None:
    """The preflight that openai's browser client causes, and then its request."""
    page = {"Origin": "https://app.example"}
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": OPENAIS}
    with serving(again(tiny), origins=(allowed,)) as running:
        status, headers, _ = running.send("OPTIONS", CHAT, None, **page, **ask, **{"Access-Control-Request-Private-Network": "true"})
        assert (status, headers["access-control-allow-origin"]) == (200, allowed)
        assert set(headers["access-control-allow-headers"].split(",")) >= set(OPENAIS.split(","))
        assert headers["access-control-allow-private-network"] == "true"
        status, headers, _ = running.send("POST", COMPLETIONS, {"prompt": "x", "max_tokens": 1}, **page)
        assert (status, headers["access-control-allow-origin"]) == (200, allowed)
        assert "x-request-id" in headers["access-control-expose-headers"]
        status, headers, _ = running.send("POST", COMPLETIONS, {"prompt": []}, **page)  # an error can be read too
        assert (status, headers["access-control-allow-origin"]) == (400, allowed)
        other = running.send("GET", "/v1/models", None, Origin="https://other.example")[0]
        assert other == (200 if allowed == "*" else 403)


def test_origins_at_the_start() -> None:
    def origins(*given: str) -> list[str]:
        flags = [flag for origin in given for flag in ("--allow-origin", origin)]
        return server.parse(["--ckpt-path", "C", *flags]).allow_origin

    good = ["*", "null", "https://example.com", "http://localhost:3000", "http://[::1]:8080", "chrome-extension://abc", "tauri://localhost"]
    assert origins(*good) == good
    assert origins("HTTPS://Example.com") == ["https://example.com"]
    for bad in ("example.com", "https://", "https://example.com/", "https://example.com/x", "https://*.example.com", "https://a b", "",
                "https://me@example.com", "https://example.com:443", "http://example.com:80", "https://example.com:99999", "localhost:3000",
                "https://a.example,https://b.example", "*.example.com"):  # fmt: skip
        with pytest.raises(UserError, match="argument --allow-origin: "):
            origins(bad)


def test_a_body_of_two_lengths(tiny: Engine) -> None:
    """What a proxy may take for one request is not read as two."""
    with serving(again(tiny)) as running:
        next_one = b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        both = b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n" % len(next_one)
        client = connect(running, POST + both + next_one)
        text = b""
        while part := client.recv(1 << 16):
            text += part
        assert text.startswith(b"HTTP/1.1 400 ") and b"both Transfer-Encoding" in text and text.count(b"HTTP/1.1") == 1


# ---------------------------------------------------------------- what is logged


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG, logger="server"):
        yield caplog


def test_a_line_for_every_request(tiny: Engine, log: pytest.LogCaptureFixture) -> None:
    engine = again(tiny)
    gate = Gate(engine)
    gate.open()
    with serving(engine) as running:
        def line(status: int) -> str:
            return await_that(lambda: next((r.getMessage() for r in log.records if f'" {status} ' in r.getMessage()), None), "it is told")

        _, headers, _ = running.send("POST", COMPLETIONS, {"prompt": "hello", "max_tokens": 5}, **{"X-Request-ID": "mine-1.2:3"})
        assert headers["x-request-id"] == "mine-1.2:3"
        assert re.fullmatch(r'127\.0\.0\.1:\d+ "POST /v1/completions" 200 \d+\.\d{3} s \d+\+5 tokens id=mine-1\.2:3', line(200))
        log.clear()
        _, headers, text = running.send("POST", COMPLETIONS, {**LONG, "max_tokens": 5})
        assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"]) and "[DONE]" in text
        assert line(200).endswith(f"+5 tokens id={headers['x-request-id']}")
        for insane in ("a b", "x" * 129, "ü", "a;b"):
            assert re.fullmatch("[0-9a-f]{32}", running.send("GET", "/version", None, **{"X-Request-ID": insane})[1]["x-request-id"])
        log.clear()
        running.send("GET", "/no/such\u0020route".replace(" ", "%0a"))
        assert '"GET /no/such%0aroute" 404 ' in line(404) and line(404).count("\n") == 0
        log.clear()
        assert running.send("GET", "/" + "x" * 20_000)[0] == 404 and len(line(404)) < 400
        log.clear()
        assert running.send("GET", "/health")[0] == 200
        assert await_that(lambda: [r.levelname for r in log.records], "it is told") == ["DEBUG"]


def test_a_client_that_leaves_is_told(tiny: Engine, log: pytest.LogCaptureFixture) -> None:
    engine = again(tiny)
    gate = Gate(engine)
    with serving(engine) as running, gate:
        for stream in (False, True):
            client = running.start(COMPLETIONS, {**LONG, "stream": stream})
            await_that(lambda: running.engine_thread._answers, "it is in")
            client.close()
            await_that(lambda: log.records, "it is told")
            assert "(the client left) id=" in log.records[0].getMessage()
            log.clear()


def test_bodies_in_another_coding_are_refused(tiny: Engine) -> None:
    with serving(again(tiny)) as running:
        for coding, status in (("gzip", 415), ("br", 415), ("identity", 200)):
            found, _, said = running.send("POST", COMPLETIONS, {"prompt": "x", "max_tokens": 1}, **{"Content-Encoding": coding})
            assert found == status
            assert status == 200 or f"content-encoding '{coding}'" in said["error"]["message"]
