"""Requests' bodies: how long each may be, how long it may take, and how much of all may be here at a time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from serving.errors import ApiError, busy

MAX_BODY = 16 << 20  # bytes of a request: a million characters, each escaped
MAX_BODIES = 16 * MAX_BODY  # of all requests that are being read, in part or whole, and are not token ids yet
BODY_SECONDS = 60.0  # a body may take to arrive


class Bodies:
    """The bodies that are being read."""

    def __init__(self) -> None:
        self._n_bytes = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytearray]:
        """The request's body, which counts until the context ends. Raises ApiError as soon as it is too long, too slow
        or too much beside all others, and ClientDisconnect."""
        coding = request.headers.get("content-encoding", "identity")
        if coding.lower() != "identity":
            raise ApiError(f"bodies with the content-encoding {coding[:40]!a} are not read", status=415)
        body = bytearray()
        try:
            await self._fill(body, request)
            yield body
        finally:
            self._n_bytes -= len(body)

    async def _fill(self, body: bytearray, request: Request) -> None:
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
