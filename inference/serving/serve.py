"""Runs the HTTP server and the engine's thread, from start to end."""

import argparse
import asyncio
import contextlib
import math
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from engine.engine import Engine
from parallel.group import Group
from serving.access import set_up_logging
from serving.app import application
from serving.auth import MAX_HEADERS
from serving.connections import ACCEPTED_AT_ONCE, Connection, Limits, Listening, max_connections
from serving.engine_thread import EngineThread

IDLE_SECONDS = 120.0  # what a connection without requests is kept open
CLOSING_SECONDS = 5  # clients have to read the last of an answer
GRACE_SECONDS = 10.0  # a step may still take when the engine is told to end


class Server(uvicorn.Server):
    """uvicorn with our own handling of signals, and of connections."""

    def __init__(
        self, app: ASGIApp, signalled: Callable[[int], None] = lambda number: None, limits: Limits | None = None
    ):
        limits = limits or Limits(max_connections(), IDLE_SECONDS)
        config = uvicorn.Config(
            app, lifespan="off", ws="none", http=partial(Connection, limits=limits),  # type: ignore[arg-type]
            loop="asyncio", log_config=None, log_level="error", access_log=False, proxy_headers=False,
            server_header=False, h11_max_incomplete_event_size=MAX_HEADERS, backlog=ACCEPTED_AT_ONCE,
            timeout_graceful_shutdown=CLOSING_SECONDS, timeout_keep_alive=math.ceil(limits.idle),
        )  # fmt: skip
        super().__init__(config)
        self._signalled = signalled

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        Listening(sockets or [])

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # once a second
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.close_if_overdue()
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Installs the handlers for good: uvicorn would restore the old ones when it ends, before our last messages."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda number, frame: self._signalled(number))
        yield


async def serve(
    options: argparse.Namespace, tp: Group, listener: socket.socket,
    load: Callable[[], Engine], finish: Callable[[Engine], object],
) -> int:  # fmt: skip
    """Loads the engine while it listens already, serves until a signal or a failure, and returns the exit status.

    `load` and `finish` are EngineThread's. Raises the error that ended the engine's thread.
    """
    set_up_logging(options.log_level)
    loop = asyncio.get_running_loop()
    engine_thread = EngineThread(load, name=options.model_name[0], max_queue=options.max_queue, finish=finish)
    app = application(engine_thread, options.model_name, options.api_key, options.host, options.allow_origin)
    signals: list[int] = []

    def signalled(number: int) -> None:
        if engine_thread.error is not None or tp.process.exit_lock.locked():
            return  # the process is ending already, with a message of its own
        signals.append(number)
        if len(signals) > 1 or engine_thread.state == "loading":
            tp.process.exit_on_signal(number)
        loop.call_soon_threadsafe(told.set)

    told = asyncio.Event()
    server = Server(app, signalled, Limits(max_connections(), options.keep_alive_seconds))
    host, port = listener.getsockname()[:2]
    at = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    if "*" in options.allow_origin and options.api_key is None:
        print("warning: --allow-origin '*' without --api-key lets every web page that is open on this machine use the "
              "model", file=sys.stderr, flush=True)  # fmt: skip
    print(f"listening on {at}, and loading", file=sys.stderr, flush=True)
    engine_thread.start(lambda: print(f"ready: {', '.join(options.model_name)} on {at}", file=sys.stderr, flush=True))

    async def watch() -> None:
        """Ends the engine's thread on a signal, and the server when that thread has ended."""
        signal_came = asyncio.ensure_future(told.wait())
        engine_ended = asyncio.ensure_future(engine_thread.ended.wait())
        await asyncio.wait({signal_came, engine_ended}, return_when=asyncio.FIRST_COMPLETED)
        if not engine_thread.ended.is_set():
            print("ending: running answers may finish", file=sys.stderr, flush=True)
            await engine_thread.drain(options.drain_seconds)
            await asyncio.wait({engine_ended}, timeout=GRACE_SECONDS)
        signal_came.cancel()
        engine_ended.cancel()
        server.should_exit = True

    watching = asyncio.ensure_future(watch())
    await server.serve(sockets=[listener])
    await watching
    if engine_thread.error is not None:
        raise engine_thread.error
    if not engine_thread.ended.is_set():
        tp.process.abort(tp.process.describe_dead_ranks() or "the running step did not end in time", 1)
    return 0
