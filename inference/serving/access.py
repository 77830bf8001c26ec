"""A line in the log and an id for every request."""

import logging
import re
import sys
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SANE_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
MOST_OF_A_PATH = 200  # bytes of it that are told
PROBES = ("/health", "/metrics")  # asked every few seconds, so told at level debug


def set_up_logging(level: str) -> None:
    """Log lines go to standard error from here on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, its_level in (("server", level), ("uvicorn.error", "error"), ("asyncio", "error")):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(its_level.upper())


class AccessLog:
    """ASGI middleware: logs each request when it has been answered, and answers with `x-request-id`, the client's own
    where it sent one that is fit to be logged.

    A handler may leave "tokens" in the request's scope, for the line.
    """

    def __init__(self, app: ASGIApp):
        self._app, self._log = app, logging.getLogger("server")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        began, status, is_whole, has_left = time.monotonic(), 0, False, False
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if SANE_ID.fullmatch(given) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(raw=message["headers"])["x-request-id"] = request_id
            await send(message)
            is_whole = message["type"] == "http.response.body" and not message.get("more_body")

        async def receive_or_leave() -> Message:
            nonlocal has_left
            message = await receive()
            has_left |= message["type"] == "http.disconnect" and not is_whole
            return message

        try:
            await self._app(scope, receive_or_leave, send_with_id)
        finally:
            level = logging.DEBUG if scope["path"] in PROBES else logging.INFO
            if self._log.isEnabledFor(level):
                client = "{}:{}".format(*scope["client"]) if scope.get("client") else "-"
                path = scope["raw_path"][:MOST_OF_A_PATH].decode("ascii", "backslashreplace")
                end = " (the client left)" if has_left else "" if is_whole else " (cut off)"
                self._log.log(level, '%s "%s %s" %s %.3f s%s%s id=%s', client, scope["method"], path, status,
                              time.monotonic() - began, scope.get("tokens", ""), end, request_id)  # fmt: skip
