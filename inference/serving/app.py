"""The HTTP application: routes, and how a client's request meets the engine's answer."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from core import PROGRAM_VERSION
from serving.auth import Guard, error_response
from serving.engine_thread import Answer, EngineThread
from serving.errors import ApiError, busy
from serving.page_files import page_response, page_settings
from serving.plan import Plan, Served, check_model, plan_chat, plan_completion, read_json
from serving.responses import Reply
from text.parser import tool_style

MAX_BODY = 16 << 20  # bytes of a request: a million characters, each escaped
MAX_BODIES = 16 * MAX_BODY  # of all requests that are being read, in part or whole, and are not token ids yet
BODY_SECONDS = 60.0  # a body may take to arrive
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def application(
    engine_thread: EngineThread, names: list[str], key: str | None, host: str, origins: list[str]
) -> ASGIApp:
    """The ASGI application, with every route behind Guard."""
    routes = Routes(engine_thread, names)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_response(error)

    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        said = {404: "there is no such route", 405: "this route knows other methods"}.get(error.status_code, "")
        return error_response(ApiError(said or error.detail, status=error.status_code, headers=headers))

    async def failed(request: Request, error: Exception) -> Response:
        return error_response(ApiError("the server has a bug; its log says more", status=500, kind="server_error"))

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
            Route("/page/settings.json", routes.page_settings),
            Route("/page/{name:path}", routes.page),
        ],
        exception_handlers={ApiError: refused, HTTPException: no_route, Exception: failed},
    )
    app.router.redirect_slashes = False  # type: ignore[attr-defined]
    local = {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host.lower()}
    app = Guard(app, key, local, {origin.lower() for origin in origins})
    if origins:  # outside Guard: a browser's preflight request carries no key
        app = CORSMiddleware(app, allow_origins=origins, allow_methods=["GET", "POST"],
                             allow_headers=["Authorization", "Content-Type"])  # fmt: skip
    return app


class Routes:
    """The handler of each route."""

    def __init__(self, engine_thread: EngineThread, names: list[str]):
        self.engine_thread, self.names = engine_thread, names
        self._served: Served | None = None
        self._n_bytes = 0  # of bodies that are being read

    @property
    def served(self) -> Served:
        """Raises ApiError until the engine has loaded."""
        engine = self.engine_thread.engine
        if self._served is None:
            if engine is None:
                self.engine_thread.admit()
            assert engine is not None and engine.tokenizer is not None
            tokenizer = engine.tokenizer
            self._served = Served(
                self.names, tokenizer, engine.max_model_len, engine.model.args.vocab_size, engine.default_params,
                tool_style(tokenizer.chat_template or ""), engine.mtp > 0, self.engine_thread.most_answers,
            )  # fmt: skip
        return self._served

    async def health(self, request: Request) -> Response:
        ready = self.engine_thread.state == "ready"
        return JSONResponse({"status": self.engine_thread.state}, 200 if ready else 503)

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": PROGRAM_VERSION})

    async def metrics(self, request: Request) -> Response:
        return Response(self.engine_thread.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self, request: Request) -> Response:
        response = page_response(request.path_params.get("name", "index.html"), request.headers)
        if response is None:
            raise HTTPException(404)
        return response

    async def page_settings(self, request: Request) -> Response:
        return JSONResponse(page_settings(self.served), headers={"Cache-Control": "no-store"})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self.served.names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        check_model(name, self.served)
        return JSONResponse(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        served = self.served
        return {"id": name, "object": "model", "created": served.since, "owned_by": "local",
                "max_model_len": served.context}  # fmt: skip

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, plan_chat)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, plan_completion)

    async def _answer(self, request: Request, plan_request: Callable[[dict[str, Any], Served], Plan]) -> Response:
        arrived, served = time.monotonic(), self.served
        self.engine_thread.admit()
        raw = bytearray()
        try:
            await self._read(request, raw)
            plan = await self.engine_thread.prepare(lambda: plan_request(read_json(raw), served), len(raw))
        except ClientDisconnect:
            return Response(status_code=400)
        finally:
            self._n_bytes -= len(raw)
        answer = self.engine_thread.submit(plan, arrived)
        reply = Reply(answer, served)
        if plan.body.stream:
            return Streamed(self.engine_thread, answer, reply)
        try:
            return await self._whole(reply, request.receive)
        finally:
            self.engine_thread.close(answer)

    async def _read(self, request: Request, body: bytearray) -> None:
        """Appends the request's body to `body`. Raises ApiError as soon as it is too long, too slow or too much beside
        all others, and ClientDisconnect."""
        too_long = ApiError(f"the body has more than {MAX_BODY} bytes", status=413)
        announced = request.headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > MAX_BODY:
            raise too_long
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    if len(body) + len(part) > MAX_BODY:
                        raise too_long
                    if self._n_bytes + len(part) > MAX_BODIES:
                        raise busy(f"{self._n_bytes} bytes of requests are being read already")
                    body += part
                    self._n_bytes += len(part)
        except TimeoutError:
            raise ApiError("the body did not come in time", status=408) from None

    async def _whole(self, reply: Reply, receive: Receive) -> Response:
        """The answer in one piece, unless the client goes away meanwhile."""
        work = asyncio.ensure_future(reply.whole())
        gone = asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(work.result()) if work.done() else Response(status_code=400)
        finally:
            work.cancel()
            gone.cancel()


async def until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Streamed(StreamingResponse):
    """Server-sent events. However they end, the answer is closed."""

    def __init__(self, engine_thread: EngineThread, answer: Answer, reply: Reply):
        super().__init__(reply.events(), headers=STREAM_HEADERS, media_type="text/event-stream")
        self._engine_thread, self._answer = engine_thread, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._engine_thread.close(self._answer)
