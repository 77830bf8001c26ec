"""Answers over HTTP, in OpenAI's API, with a DeepSeek-V3, V2 or Kimi-K2 checkpoint.

  python server.py --ckpt-path CKPT
  torchrun --nproc-per-node 8 server.py --ckpt-path CKPT --host 0.0.0.0 --api-key @FILE

Routes: /v1/chat/completions, /v1/completions, /v1/responses, /v1/tokenize, /v1/detokenize, /v1/models, /health,
/version, /metrics, and a page to talk to it at /.
Listens on this machine only, unless an API key is given. The first SIGTERM or Ctrl-C lets running answers finish, the
second ends at once.

Exit status: 0 told to end, by a first signal once it was ready; 1 a rank was lost; 2 wrong use, or a checkpoint that
cannot be used; 128 and a signal's number: ended by it at once. torchrun makes 1 of all but 0.
"""

if __name__ == "__main__":
    from cli.interrupts import end_process_on_interrupt

    end_process_on_interrupt()

import argparse
import asyncio
import ipaddress
import os
import re
import signal
import socket
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cli import main as cli
from cli.flags import SERVER_FLAGS, Parser, add_checkpoint_flags, add_engine_flags, positive
from core.errors import UserError

if TYPE_CHECKING:
    from engine.engine import Engine
    from parallel.group import Group

KEY_VARIABLE = "SERVER_API_KEY"
SHORTEST_KEY = 8
ORIGIN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]+))?")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Raises UserError for wrong use."""
    parser = Parser(__doc__)
    add_checkpoint_flags(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (default: 127.0.0.1)")
    add("--port", type=port, default=8000, metavar="N", help="to listen on, 0 for any (default: 8000)")
    add("--api-key", metavar="KEY", help=f"clients must send it; @FILE reads it from a file (default: ${KEY_VARIABLE}, "
        "which unlike a flag other users cannot see); needed to listen on other addresses than loopback")  # fmt: skip
    add("--allow-origin", action="append", type=origin, default=[], metavar="ORIGIN",
        help="let web pages of this origin (https://example.com, or '*' for any) use the API; may be given several "
        "times")  # fmt: skip
    add("--model-name", action="append", metavar="NAME", help="what clients call the model (default: the checkpoint "
        "directory's name); may be given several times")  # fmt: skip
    add("--max-queue", type=positive, default=256, metavar="N", help="requests that may wait (default: 256)")
    add("--drain-seconds", type=float, default=20.0, metavar="S",
        help="time running answers have to finish when the server is told to end (default: 20); torchrun gives them "
        "30 at most, unless its --shutdown-timeout says otherwise")  # fmt: skip
    add("--keep-alive-seconds", type=float, default=120.0, metavar="S",
        help="what a connection is kept open between two requests; more than the clients, or a proxy in front of "
        "the server, keep theirs (default: 120)")  # fmt: skip
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info",
        help="info has a line for each request (default: info)")  # fmt: skip
    add_engine_flags(parser, *SERVER_FLAGS)
    options = parser.parse_args(arguments)
    options.api_key = read_key(options.api_key or os.environ.get(KEY_VARIABLE) or None)
    if not 0 <= options.drain_seconds <= 86400:
        parser.error(f"--drain-seconds is {options.drain_seconds}, expected from 0 to a day")
    if not 1 <= options.keep_alive_seconds <= 86400:
        parser.error(f"--keep-alive-seconds is {options.keep_alive_seconds}, expected from 1 to a day")
    if not is_loopback(options.host) and options.api_key is None:
        parser.error(f"--host {options.host} lets other machines in: that needs --api-key")
    options.model_name = options.model_name or [Path(options.ckpt_path).resolve().name]
    if not all(options.model_name):
        parser.error("--model-name is empty")
    return options


def port(text: str) -> int:
    if not 0 <= (value := int(text)) < 65536:
        raise argparse.ArgumentTypeError(f"{text} is no port")
    return value


def origin(text: str) -> str:
    """A web page's origin as its browser writes it: scheme, host, and port unless it is the scheme's own."""
    if text in ("*", "null"):
        return text
    found = ORIGIN.fullmatch(text.lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!a} is no origin, such as https://example.com or "
                                         "http://localhost:3000, without a path or a slash at the end")  # fmt: skip
    if (found["scheme"], found["port"]) in (("http", "80"), ("https", "443")):
        raise argparse.ArgumentTypeError(f"{text!a}: browsers leave the port {found['port']} out of an origin")
    if found["port"]:
        port(found["port"])
    return found[0]


def read_key(given: str | None) -> str | None:
    """The key, read from a file where `given` is @FILE. Raises UserError for one that is short or that a header cannot
    carry."""
    if given is not None and given.startswith("@"):
        try:
            given = Path(given[1:]).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--api-key {given}: {getattr(e, 'strerror', None) or e}") from None
    if given is not None and (len(given) < SHORTEST_KEY or not all("!" <= letter <= "~" for letter in given)):
        raise UserError(f"--api-key: expected at least {SHORTEST_KEY} printable ASCII characters, without spaces")
    return given


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises UserError for an address that cannot be bound."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except (OSError, UnicodeError) as e:  # the latter for a malformed name
        raise UserError(f"--host {host} --port {port}: {getattr(e, 'strerror', None) or e}") from None
    return listener


def run(options: argparse.Namespace, tp: "Group") -> int:
    """Serves until told to end; returns the exit status. Raises UserError on all ranks alike."""
    listener = tp.run_on_all_ranks(lambda: listen(options.host, options.port) if tp.rank == 0 else None)

    def load() -> "Engine":
        engine = cli.load(options, tp, lambda: None, chat=False)[0]
        if engine.constraints is not None:
            engine.constraints.prepare()
        return engine

    if listener is None:
        tp.process.install_sigterm_handler()
        engine = load()
        for number in (signal.SIGTERM, signal.SIGINT):  # torchrun sends them to all; rank 0 may have answers left
            signal.signal(number, signal.SIG_IGN)
        return cli.follow(engine)
    from serving.serve import serve

    return asyncio.run(serve(options, tp, listener, load, partial(cli.finish, status=0)))


if __name__ == "__main__":
    sys.exit(cli.run_on_ranks(parse, run, handles_sigterm=True))
