"""The door: routes, who may use them, and how a client's request meets the engine's answer."""

import argparse
import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import json
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from core.config import PROGRAM_VERSION
from engine.engine import Engine
from parallel.group import Group
from serving import protocol
from serving.bridge import Answer, Bridge, busy
from serving.protocol import ChatChoice, CompletionChoice, Delta, Plan, Refused, Served, Update
from text import parser as chat

PAGE = Path(__file__).parent / "page.html"
BODY = 16 << 20  # bytes of a request: a million characters, each escaped
BODIES = 16 * BODY  # of all requests that have come, in part or whole, and are not token ids yet
HEADERS = 32 << 10
BODY_SECONDS = 60.0  # that a body may take to come
CLOSING_SECONDS = 5  # that clients have to read the last of an answer
GRACE = 10.0  # seconds a step may still take when the engine is told to end
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


# --------------------------------------------------------------------------------------------------------------------
# Who may come in
# --------------------------------------------------------------------------------------------------------------------


class Guard:
    """Stands before every route. With a key, everything but exactly /health needs it: as a bearer token, or as the
    password of basic authentication, which is how a browser asks for it. Without one, which is only on loopback, the
    Host header must name this machine: a web page whose name was made to point here would name its own. What a browser
    sends for a page of another origin, the user knowing nothing of it, is refused as well."""

    def __init__(self, app: ASGIApp, key: str | None, hosts: Collection[str], origins: Collection[str]):
        self.app, self.hosts, self.origins = app, hosts, origins
        self.key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            self.check(scope)
        except Refused as e:
            await refusal(e)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def check(self, scope: Scope) -> None:
        """Raises Refused."""
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEADERS:
            raise Refused(f"the headers have more than {HEADERS} bytes", status=431)
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value)
        host = [value.decode("latin-1").lower() for value in headers.get(b"host", [])]
        if self.key is None:
            if len(host) != 1 or without_port(host[0]) not in self.hosts:
                raise Refused(f"the Host header does not name {' or '.join(sorted(self.hosts))}", status=403,
                              code="wrong_host")  # fmt: skip
        elif scope["raw_path"] != b"/health":
            kind, secret = credentials(headers.get(b"authorization", []))
            if not hmac.compare_digest(secret, self.key):
                browser = scope["raw_path"] == b"/"
                challenge = 'Basic realm="API key as password", charset="UTF-8"' if browser else "Bearer"
                raise Refused("the API key is missing or wrong", status=401, code="invalid_api_key",
                              headers={"WWW-Authenticate": challenge})  # fmt: skip
            if kind == "bearer":  # no browser sends that by itself
                return
        for origin in (value.decode("latin-1").lower() for value in headers.get(b"origin", [])):
            if origin not in self.origins and [origin.partition("://")[2]] != host:
                raise Refused(f"pages of {origin} are not let in (--allow-origin)", status=403, code="wrong_origin")


def without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


def credentials(values: list[bytes]) -> tuple[str, bytes]:
    """(kind, secret) of an Authorization header; empty for none, several or another kind."""
    kind, _, rest = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
    if kind.lower() == b"bearer":
        return "bearer", rest.strip()
    if kind.lower() == b"basic":
        try:
            return "basic", base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            pass
    return "", b""


# --------------------------------------------------------------------------------------------------------------------
# Routes
# --------------------------------------------------------------------------------------------------------------------


def refusal(error: Refused) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


def application(bridge: Bridge, name: str, key: str | None, host: str, origins: list[str]) -> ASGIApp:
    """The ASGI application, with every route behind the Guard."""
    routes = Routes(bridge, name)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return refusal(error)

    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        said = {404: "there is no such route", 405: "this route knows other methods"}.get(error.status_code, "")
        return refusal(Refused(said or error.detail, status=error.status_code, headers=headers))

    async def failed(request: Request, error: Exception) -> Response:
        return refusal(Refused("the server has a bug; its log says more", status=500, kind="server_error"))

    app: ASGIApp = Starlette(
        routes=[
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/v1/models/{model:path}", routes.model),
            Route("/health", routes.health),
            Route("/version", routes.version),
            Route("/metrics", routes.metrics),
            Route("/", routes.page),
        ],
        exception_handlers={Refused: refused, HTTPException: no_route, Exception: failed},
    )
    app.router.redirect_slashes = False  # type: ignore[attr-defined]
    local = {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host.lower()}
    app = Guard(app, key, local, {origin.lower() for origin in origins})
    if origins:  # outside the guard: a browser's question whether it may ask carries no key
        app = CORSMiddleware(app, allow_origins=origins, allow_methods=["GET", "POST"],
                             allow_headers=["Authorization", "Content-Type"])  # fmt: skip
    return app


class Routes:
    """What each route answers."""

    def __init__(self, bridge: Bridge, name: str):
        self.bridge, self.name = bridge, name
        self._served: Served | None = None
        self._page = PAGE.read_bytes()
        self._held = 0  # bytes of bodies

    @property
    def served(self) -> Served:
        """Raises Refused until the engine has loaded."""
        engine = self.bridge.engine
        if self._served is None:
            if engine is None:
                self.bridge.admit()
            assert engine is not None and engine.tokenizer is not None
            tokenizer = engine.tokenizer
            self._served = Served(
                self.name, tokenizer, engine.max_model_len, engine.model.args.vocab_size, engine.default_params,
                chat.tool_style(tokenizer.chat_template or ""), engine.mtp > 0,
            )  # fmt: skip
        return self._served

    async def health(self, request: Request) -> Response:
        ready = self.bridge.state == "ready"
        return JSONResponse({"status": self.bridge.state}, 200 if ready else 503)

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": PROGRAM_VERSION})

    async def metrics(self, request: Request) -> Response:
        return Response(self.bridge.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self, request: Request) -> Response:
        return Response(self._page, media_type="text/html; charset=utf-8", headers=page_headers(self._page))

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card]})

    async def model(self, request: Request) -> Response:
        if request.path_params["model"] != self.served.name:
            raise Refused(f"there is only the model {self.served.name!r}", "model", status=404, code="model_not_found")
        return JSONResponse(self._card)

    @property
    def _card(self) -> dict[str, Any]:
        served = self.served
        return {"id": served.name, "object": "model", "created": served.since, "owned_by": "local",
                "max_model_len": served.context}  # fmt: skip

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, protocol.read_chat, Chat)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, protocol.read_completion, Completion)

    async def _answer(
        self, request: Request, read: Callable[[bytearray, Served], Plan], kind: "type[Chat] | type[Completion]"
    ) -> Response:
        arrived, served = time.monotonic(), self.served
        self.bridge.admit()
        raw = bytearray()
        try:
            await self._read(request, raw)
            plan = await self.bridge.prepare(partial(read, raw, served))
        except ClientDisconnect:
            return Response(status_code=400)
        finally:
            self._held -= len(raw)
        del raw
        answer = self.bridge.submit(plan, arrived)
        reply = kind(answer, served)
        if plan.body.stream:
            return Streamed(self.bridge, answer, reply)
        try:
            return await self._whole(reply, request.receive)
        finally:
            self.bridge.leave(answer)

    async def _read(self, request: Request, body: bytearray) -> None:
        """Adds the request's body to `body`. Raises Refused for one that is too long, too slow or too much beside all
        others, as soon as it is, and ClientDisconnect."""
        too_long = Refused(f"the body has more than {BODY} bytes", status=413)
        announced = request.headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > BODY:
            raise too_long
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    if len(body) + len(part) > BODY:
                        raise too_long
                    if self._held + len(part) > BODIES:
                        raise busy(f"{self._held} bytes of requests are being read already")
                    body += part
                    self._held += len(part)
        except TimeoutError:
            raise Refused("the body did not come in time", status=408) from None

    async def _whole(self, reply: "Reply", receive: Receive) -> Response:
        """The answer in one piece, unless the client goes away meanwhile."""
        work = asyncio.ensure_future(reply.whole())
        gone = asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(work.result()) if work.done() else Response(status_code=400)
        finally:
            work.cancel()
            gone.cancel()


def page_headers(page: bytes) -> dict[str, str]:
    """Headers under which the page runs its own script and style, told by their hashes, and loads nothing else."""
    hashes = {}
    for tag in ("script", "style"):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(inside).digest()).decode()
    return {
        "Content-Security-Policy": f"default-src 'none'; script-src 'sha256-{hashes['script']}'; "
        f"style-src 'sha256-{hashes['style']}'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


async def until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Streamed(StreamingResponse):
    """Server-sent events. Whatever ends them, the engine is told that nobody reads any more."""

    def __init__(self, bridge: Bridge, answer: Answer, reply: "Reply"):
        super().__init__(reply.events(), headers=STREAM_HEADERS, media_type="text/event-stream")
        self._bridge, self._answer = bridge, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._bridge.leave(self._answer)


# --------------------------------------------------------------------------------------------------------------------
# Answers
# --------------------------------------------------------------------------------------------------------------------


class Reply:
    """An answer in the API's shape, whole or as events."""

    object: str
    prefix: str

    def __init__(self, answer: Answer, served: Served):
        self.answer, self.served, self.body = answer, served, answer.plan.body
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def frame(self, choices: list[dict[str, Any]], suffix: str = "") -> dict[str, Any]:
        return {"id": self._id, "object": self.object + suffix, "created": self._created, "model": self.served.name,
                "choices": choices}  # fmt: skip

    @property
    def usage(self) -> dict[str, Any]:
        return protocol.usage(self.answer.plan, self.served, self.answer.requests)

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """The answer's, but that a choice which failed is an error. Raises Refused."""
        async for choice, update in self.answer.updates():
            request = self.answer.requests[choice]
            if update.finished and request.finish_reason == "error":
                raise Refused(request.error or "the answer failed", status=500, kind="server_error")
            yield choice, update

    async def whole(self) -> dict[str, Any]:
        raise NotImplementedError

    def chunks(self) -> AsyncIterator[dict[str, Any]]:
        raise NotImplementedError

    async def events(self) -> AsyncIterator[str]:
        try:
            async for chunk in self.chunks():
                if self.body.stream_options.include_usage:
                    chunk["usage"] = None
                yield event(chunk)
            if self.body.stream_options.include_usage:
                yield event(self.frame([], self.suffix) | {"usage": self.usage})
            yield "data: [DONE]\n\n"
        except Refused as e:  # the status has long been sent
            yield event(e.body)

    suffix = ""


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


class Chat(Reply):
    object, prefix, suffix = "chat.completion", "chatcmpl", ".chunk"

    def _choice(self, choices: dict[int, ChatChoice], number: int) -> ChatChoice:
        if number not in choices:
            choices[number] = ChatChoice(self.answer.plan, self.served, self.answer.requests[number])
        return choices[number]

    async def whole(self) -> dict[str, Any]:
        choices: dict[int, ChatChoice] = {}
        deltas: dict[int, list[Delta]] = {}
        entries: dict[int, list[Any]] = {}
        async for number, update in self.updates():
            choice = self._choice(choices, number)
            deltas.setdefault(number, []).extend(choice.take(update))
            if (likely := choice.logprobs(update)) is not None:
                entries.setdefault(number, []).extend(likely["content"])
        made = [
            {
                "index": number,
                "message": protocol.message(deltas[number]),
                "logprobs": {"content": entries[number], "refusal": None} if number in entries else None,
                "finish_reason": choices[number].finish_reason,
            }
            for number in sorted(choices)
        ]
        return self.frame(made) | {"usage": self.usage}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        choices: dict[int, ChatChoice] = {}
        async for number, update in self.updates():
            if number not in choices:
                yield self._chunk(number, {"role": "assistant", "content": ""})
            choice = self._choice(choices, number)
            likely = choice.logprobs(update)
            for delta in choice.take(update):
                chunk = self._chunk(number, delta.fields, likely)
                likely = None
                if self.served.marks_drafts and delta.drafted:
                    chunk["drafted"] = delta.drafted
                yield chunk
            if update.finished:
                yield self._chunk(number, {}, likely, choice.finish_reason)
            elif likely is not None and likely["content"]:
                yield self._chunk(number, {}, likely)

    def _chunk(self, number: int, delta: dict, likely: Any = None, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": number, "delta": delta, "logprobs": likely, "finish_reason": finish}
        return self.frame([choice], self.suffix)


class Completion(Reply):
    object, prefix = "text_completion", "cmpl"

    def _choice(self, choices: dict[int, CompletionChoice], number: int) -> CompletionChoice:
        if number not in choices:
            choices[number] = CompletionChoice(self.answer.plan, self.served, self.answer.requests[number])
        return choices[number]

    async def whole(self) -> dict[str, Any]:
        made: dict[int, dict[str, Any]] = {}
        async for chunk in self.chunks():
            (part,) = chunk["choices"]
            so_far = made.setdefault(part["index"], part)
            if so_far is part:
                continue
            so_far["text"] += part["text"]
            so_far["finish_reason"] = part["finish_reason"]
            for name, values in (part["logprobs"] or {}).items():
                so_far["logprobs"][name] += values
        return self.frame([made[number] for number in sorted(made)]) | {"usage": self.usage}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        choices: dict[int, CompletionChoice] = {}
        async for number, update in self.updates():
            choice = self._choice(choices, number)
            text, likely = choice.take(update)
            finish = choice.finish_reason if update.finished else None
            if text or finish or (likely and likely["tokens"]):
                part = {"index": number, "text": text, "logprobs": likely, "finish_reason": finish}
                chunk = self.frame([part])
                if self.served.marks_drafts:
                    chunk["drafted"] = [(event.text, event.drafted) for event in update.events if event.text]
                yield chunk


# --------------------------------------------------------------------------------------------------------------------
# From start to end
# --------------------------------------------------------------------------------------------------------------------


class Server(uvicorn.Server):
    """uvicorn, but that what a signal does is ours to say."""

    def __init__(self, app: ASGIApp, signalled: Callable[[int], None] = lambda number: None):
        config = uvicorn.Config(
            app, lifespan="off", ws="none", http="h11", loop="asyncio", log_config=None, log_level="error",
            access_log=False, proxy_headers=False, server_header=False, h11_max_incomplete_event_size=HEADERS,
            timeout_graceful_shutdown=CLOSING_SECONDS,
        )  # fmt: skip
        super().__init__(config)
        self._signalled = signalled

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """For good: uvicorn would give them back as soon as it has ended, and what is told after that is told in
        peace."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda number, frame: self._signalled(number))
        yield


async def serve(
    options: argparse.Namespace, tp: Group, listener: socket.socket,
    load: Callable[[], Engine], finish: Callable[[Engine], object] = Engine.close,
) -> int:  # fmt: skip
    """Loads the engine while it listens already, serves until a signal or a failure, and returns the exit status.
    `finish` takes leave of the engine. Raises what the engine failed of."""
    loop = asyncio.get_running_loop()
    bridge = Bridge(load, name=options.model_name, max_queue=options.max_queue, finish=finish)
    app = application(bridge, options.model_name, options.api_key, options.host, options.allow_origin)
    signals: list[int] = []

    def signalled(number: int) -> None:
        if bridge.error is not None or tp.process.exit_lock.locked():
            return  # the end is near, and has a line of its own
        signals.append(number)
        if len(signals) > 1 or bridge.state == "loading":
            tp.process.exit_on_signal(number)
        loop.call_soon_threadsafe(told.set)

    told = asyncio.Event()
    server = Server(app, signalled)
    host, port = listener.getsockname()[:2]
    at = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"listening on {at}, and loading", file=sys.stderr, flush=True)
    bridge.start(lambda: print(f"ready: {options.model_name} on {at}", file=sys.stderr, flush=True))

    async def watch() -> None:
        """Ends the server when the engine has ended, and that when a signal says so."""
        signal_came = asyncio.ensure_future(told.wait())
        engine_ended = asyncio.ensure_future(bridge.ended.wait())
        await asyncio.wait({signal_came, engine_ended}, return_when=asyncio.FIRST_COMPLETED)
        if not bridge.ended.is_set():
            print("ending: running answers may finish", file=sys.stderr, flush=True)
            await bridge.drain(options.drain_seconds)
            await asyncio.wait({engine_ended}, timeout=GRACE)
        signal_came.cancel()
        engine_ended.cancel()
        server.should_exit = True

    watching = asyncio.ensure_future(watch())
    await server.serve(sockets=[listener])
    await watching
    if bridge.error is not None:
        raise bridge.error
    if not bridge.ended.is_set():
        tp.process.abort(tp.process.describe_dead_ranks() or "the running step did not end in time", 1)
    return 0
