"""The HTTP application: routes, and how a client's request meets the engine's answer."""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from core import PROGRAM_VERSION
from serving.access import AccessLog
from serving.auth import Guard, error_response
from serving.bodies import Bodies
from serving.engine_thread import EngineThread
from serving.errors import ApiError
from serving.page_files import page_response, page_settings
from serving.plan import Plan, Served, check_model, plan_chat, plan_completion, read_json, with_grammar
from serving.responses import Reply
from serving.responses_events import ResponsesReply
from serving.responses_request import plan_response
from serving.streams import Streamed, token_counts, until_gone
from serving.tokens import detokenize, tokenize
from text.chat_format import tool_style

T = TypeVar("T")
PREFIXES = ("/v1", "", "/beta")  # of the API's routes: what clients' base URLs end with
EXPOSED = ["x-request-id", "retry-after"]  # headers that a web page of another origin may read


def application(
    engine_thread: EngineThread, names: list[str], key: str | None, host: str, origins: list[str]
) -> ASGIApp:
    """The ASGI application, with every route behind Guard. `origins`: of web pages that may use it, "*" for any."""
    routes = Routes(engine_thread, names)
    api = {
        "/chat/completions": ("POST", routes.chat),
        "/completions": ("POST", routes.completions),
        "/responses": ("POST", routes.responses),
        "/tokenize": ("POST", routes.tokenize),
        "/detokenize": ("POST", routes.detokenize),
        "/models": ("GET", routes.models),
        "/models/{model:path}": ("GET", routes.model),
    }
    others = {
        "/health": ("GET", routes.health),
        "/version": ("GET", routes.version),
        "/metrics": ("GET", routes.metrics),
        "/": ("GET", routes.page),
        "/page/settings.json": ("GET", routes.page_settings),
        "/page/{name:path}": ("GET", routes.page),
    }
    known = ", ".join([f"{method} {PREFIXES[0]}{path}" for path, (method, _) in api.items()]
                      + [f"{method} {path}" for path, (method, _) in others.items()])  # fmt: skip
    known = known.replace(":path}", "}")  # Starlette's

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_response(error)

    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        asked = f"{request.method} {request.url.path}"
        says = {404: f"there is no route {asked[:200]}; there are {known}",
                405: f"{asked[:200]}: this route takes {headers.get('Allow')}"}  # fmt: skip
        message = says.get(error.status_code, error.detail)
        return error_response(ApiError(message, status=error.status_code, headers=headers))

    async def failed(request: Request, error: Exception) -> Response:
        return error_response(ApiError("the server has a bug; its log says more", status=500, kind="server_error"))

    app: ASGIApp = Starlette(
        routes=[
            Route(prefix + path, handler, methods=[method])
            for table, prefixes in ((api, PREFIXES), (others, ("",)))
            for path, (method, handler) in table.items()
            for prefix in prefixes
        ],
        exception_handlers={ApiError: refused, HTTPException: no_route, Exception: failed},
    )
    app.router.redirect_slashes = False  # type: ignore[attr-defined]
    local = {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host.lower()}
    app = Guard(without_trailing_slash(app), key, local, origins)
    if origins:  # outside Guard: a browser's preflight request carries no key
        app = CORSMiddleware(app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"],
                             expose_headers=EXPOSED, allow_private_network=True)  # fmt: skip
    return AccessLog(app)


def without_trailing_slash(app: ASGIApp) -> ASGIApp:
    """The application for a path that ends with a slash as for the same without."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        scope["path"] = scope["path"].removesuffix("/") or "/"
        await app(scope, receive, send)

    return call


class Routes:
    """The handler of each route."""

    def __init__(self, engine_thread: EngineThread, names: list[str]):
        self.engine_thread, self.names = engine_thread, names
        self._served: Served | None = None
        self._bodies = Bodies()

    @property
    def served(self) -> Served:
        """Raises ApiError until the engine has loaded."""
        engine = self.engine_thread.engine
        if self._served is None:
            if engine is None:
                self.engine_thread.admit()
            assert engine is not None and engine.tokenizer is not None and engine.constraints is not None
            tokenizer = engine.tokenizer
            self._served = Served(
                self.names, tokenizer, engine.max_model_len, engine.model.args.vocab_size, engine.default_params,
                tool_style(tokenizer.chat_template or ""), engine.mtp > 0, engine.constraints.grammars.compile,
                self.engine_thread.most_answers,
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

    async def responses(self, request: Request) -> Response:
        return await self._answer(request, plan_response, ResponsesReply)

    async def tokenize(self, request: Request) -> Response:
        return await self._at_once(request, tokenize)

    async def detokenize(self, request: Request) -> Response:
        return await self._at_once(request, detokenize)

    async def _at_once(
        self, request: Request, answer: Callable[[dict[str, Any], Served], dict[str, Any]]
    ) -> Response:  # fmt: skip
        """What needs no engine."""
        served = self.served
        try:
            return JSONResponse(await self._prepare(request, lambda data: answer(data, served)))
        except ClientDisconnect:
            return Response(status_code=400)

    async def _answer(self, request: Request, plan_request: Callable[[dict[str, Any], Served], Plan],
                      kind: type[Reply] = Reply) -> Response:  # fmt: skip
        arrived, served = time.monotonic(), self.served
        self.engine_thread.admit()
        try:
            plan = await self._prepare(request, lambda data: plan_request(data, served))
        except ClientDisconnect:
            return Response(status_code=400)
        if plan.params.answer_format is not None:
            plan = await self.engine_thread.compile(partial(with_grammar, plan, served))
        answer = self.engine_thread.submit(plan, arrived)
        reply = kind(answer, served)
        if plan.body.stream:
            return Streamed(self.engine_thread, answer, reply.events())
        try:
            return await self._whole(reply, request.receive)
        finally:
            request.scope["tokens"] = token_counts(answer)
            self.engine_thread.close(answer)

    async def _prepare(self, request: Request, work: Callable[[dict[str, Any]], T]) -> T:
        """What `work` makes of the body's JSON, on another thread. Raises ApiError and ClientDisconnect."""
        async with self._bodies.read(request) as raw:
            return await self.engine_thread.prepare(lambda: work(read_json(raw)), len(raw))

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
