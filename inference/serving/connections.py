"""How many connections there are, and how long each may keep the server waiting.

Each connection costs a descriptor, of which a process has few. So a request's headers have to come in time, as its body
has (`bodies`), and an answer has to be read. Where there is no room for another connection, the one that has waited
longest for a request, or for the rest of one, is closed for it: whatever idle clients do, a new one is heard.
"""

import asyncio
import logging
import socket
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

try:
    import resource
except ImportError:  # a system without limits of this kind
    resource = None  # type: ignore[assignment]

MOST = 4096  # connections
OTHER_DESCRIPTORS = 128  # files, other ranks, and connections that are accepted before as many others are closed
ACCEPTED_AT_ONCE = 16
LISTEN_QUEUE = 1024  # connections that the system keeps until they are accepted
NO_ROOM = b'{"error":{"message":"the server has no room for another connection; try again later",' \
          b'"type":"server_error","param":null,"code":"unavailable"}}'  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """In seconds, but for the number of connections. `idle` is between two requests, `head` for the headers of one,
    `write` without reading anything of an answer."""

    connections: int
    idle: float
    head: float = 30.0
    write: float = 120.0


def max_connections() -> int:
    """So many that descriptors are left for everything else."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource is not None else MOST
    if resource is None or soft == resource.RLIM_INFINITY:
        return MOST
    return min(MOST, max(soft - OTHER_DESCRIPTORS, soft // 4))


class Connection(H11Protocol):
    """uvicorn's connection, within limits."""

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._since = self._moved = self.loop.time()  # when it began to wait; when something was last sent
        self._is_idle = False  # after an answer, before the next request's first byte
        self._unsent = 0  # bytes, when it was last looked at

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        if self._is_idle:
            self._is_idle, self._since = False, self.loop.time()
        super().data_received(data)

    def on_response_complete(self) -> None:
        self._is_idle, self._since = True, self.loop.time()
        super().on_response_complete()

    def resume_writing(self) -> None:
        self._moved = self.loop.time()  # most of what was unsent has been read, whatever there is when it is looked at
        super().resume_writing()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _may_close(self) -> bool:
        """Whether it waits for its client to say something."""
        return not self.transport.is_closing() and not (self._is_answering and not self.cycle.more_body)

    def _make_room(self) -> None:
        """Closes the connection that has waited longest, of those without a request if there are any; or this one."""
        others = [c for c in self.connections if isinstance(c, Connection) and c is not self and c._may_close]
        if others:
            min(others, key=lambda c: (c._is_answering, c._since)).transport.abort()
            return
        head = b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n"
        self.transport.write(head + b"Retry-After: 1\r\nContent-Length: %d\r\n\r\n" % len(NO_ROOM) + NO_ROOM)
        self.transport.close()

    def close_if_overdue(self) -> None:
        now, unsent = self.loop.time(), self.transport.get_write_buffer_size()
        if unsent == 0 or unsent < self._unsent:
            self._moved = now
        self._unsent = unsent
        if unsent:
            overdue = now - self._moved > self._limits.write
        else:
            allowed = self._limits.idle if self._is_idle else self._limits.head
            overdue = not self._is_answering and now - self._since > allowed
        if overdue:
            self.transport.abort()


class Listening:
    """Settings of the listening sockets and of the event loop that accepts their connections."""

    def __init__(self, sockets: list[socket.socket]):
        self._told = False
        for listener in sockets:
            listener.listen(LISTEN_QUEUE)  # asyncio has made it ACCEPTED_AT_ONCE, which is another thing
        asyncio.get_running_loop().set_exception_handler(self._on_error)

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """asyncio tells every connection that cannot be accepted, thousands of times a second."""
        if "socket.accept()" not in context["message"]:
            loop.default_exception_handler(context)
        elif not self._told:
            self._told = True
            logging.getLogger("server").error("a connection was not accepted, nor may others be (this is told once): "
                                              "%s; ulimit -n sets the limit", context.get("exception"))  # fmt: skip
