"""A server under every kind of client at once: its memory stays flat, its log small, and /health is answered."""

import asyncio
import contextlib
import json
import random
import re
import socket
import time
from collections import Counter
from pathlib import Path

import pytest

from support import processes as launch
from support.http_server import GENEROUS, RunningServer
from support.server_process import Process

COMPLETIONS = "/v1/completions"
POST = b"POST %s HTTP/1.1\r\nHost: localhost\r\n" % COMPLETIONS.encode()
HALVES = (b"", b"POST /v1/comp", POST, POST + b"Content-Length: 100\r\n\r\n{", b"GET /health HTTP/1.1\r\nHost: localhost\r\n")


def request(body: dict) -> bytes:
    raw = json.dumps(body).encode()
    return POST + b"Content-Length: %d\r\n\r\n" % len(raw) + raw


def memory(pid: int) -> int:
    """Resident, in bytes."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Load:
    """Clients of all kinds, until a moment; what came of them is counted."""

    def __init__(self, port: int, pid: int, seconds: float):
        self.port, self.pid, self.until = port, pid, time.monotonic() + seconds
        self.seen: Counter[str] = Counter()
        self.health: list[float] = []
        self.memory: list[int] = []  # of the server, at each look at its health

    async def repeat(self, kind: str, seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < self.until:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 14)
                try:
                    await getattr(self, kind)(reader, writer, draw)
                    self.seen[kind] += 1
                finally:
                    writer.close()

    async def streaming(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, draw: random.Random) -> None:
        """Reads its answer to the end, or is told to try again later."""
        writer.write(request({"prompt": "hello", "max_tokens": draw.randint(5, 40), "stream": True}))
        text = b""
        while not (text.endswith(b"\r\n0\r\n\r\n") or text.endswith(b"}")):
            text += (part := await reader.read(1 << 14))
            if not part:
                return
        self.seen["whole" if b"[DONE]" in text else text[9:12].decode()] += 1
        if b" 429 " in text[:20]:
            await asyncio.sleep(0.5)

    async def slow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, draw: random.Random) -> None:
        writer.write(request({"prompt": "hello", "max_tokens": 200, "logprobs": 5, "stream": True}))
        for _ in range(40):
            if time.monotonic() > self.until or not await reader.read(64):
                return
            await asyncio.sleep(0.1)

    async def leaving(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, draw: random.Random) -> None:
        writer.write(request({"prompt": "hello", "max_tokens": 400, "stream": draw.random() < 0.5}))
        await asyncio.sleep(draw.random())

    async def half_open(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, draw: random.Random) -> None:
        raw = request({"prompt": "hello"})
        writer.write(raw[: draw.randrange(len(raw))])
        await asyncio.wait([asyncio.ensure_future(reader.read(1))], timeout=max(self.until - time.monotonic(), 0))

    async def oversized(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, draw: random.Random) -> None:
        writer.write(request({"prompt": draw.choice(["word ", "<", "好 ", "a1 "]) * draw.choice([100_000, 3_000_000])}))
        await writer.drain()
        self.seen["oversized " + (await reader.readline())[9:12].decode()] += 1
        await asyncio.sleep(0.2)

    async def watch(self) -> None:
        """Asks for /health, as an orchestrator does, but more often."""
        while time.monotonic() < self.until:
            began = time.monotonic()
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            said = await reader.read(100)
            assert said.startswith(b"HTTP/1.1 200 "), said
            self.health.append(time.monotonic() - began)
            self.memory.append(memory(self.pid))
            writer.close()
            await asyncio.sleep(0.05)

    async def run(self, clients: dict[str, int]) -> None:
        everybody = [self.repeat(kind, seed) for kind, n in clients.items() for seed in range(n)]
        await asyncio.gather(self.watch(), *everybody)


SMALL = {"streaming": 30, "slow": 4, "leaving": 4, "half_open": 30, "oversized": 2}
LARGE = {"streaming": 400, "slow": 20, "leaving": 20, "half_open": 200, "oversized": 4}
FLAGS = ("--port", 0, "--device", "cpu", "--threads", 1, "--max-model-len", 512)


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    return launch.make_tiny(tmp_path / "endless", printable=True)


def silent_clients(running: RunningServer, n: int) -> None:
    """More clients than there are descriptors, which say nothing, or not all: anybody else is heard."""
    with contextlib.ExitStack() as stack:
        for i in range(n):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=GENEROUS))
            client.sendall(HALVES[i % len(HALVES)])
            if i % 50 == 49:
                assert running.send("GET", "/health")[0] == 200
        assert running.send("POST", COMPLETIONS, {"prompt": "x", "max_tokens": 3})[0] == 200


@pytest.mark.parametrize(
    ("clients", "seconds", "descriptors", "silent"),
    [(SMALL, 2, 256, 300), pytest.param(LARGE, 120, 1024, 3000, marks=[pytest.mark.trust, pytest.mark.timeout(600)])],
)
def test_everybody_at_once(
    endless: Path, clients: dict[str, int], seconds: float, descriptors: int, silent: int
) -> None:
    process = Process("--ckpt-path", endless, *FLAGS, "--log-level", "warning", descriptors=descriptors)
    try:
        running = process.ready()
        load = Load(running.port, process.child.pid, seconds)
        asyncio.run(load.run(clients))
        silent_clients(running, silent)
        status, _, said = running.send("POST", COMPLETIONS, {"prompt": "x", "max_tokens": 3})
        assert status == 200 and said["usage"]["completion_tokens"] == 3
        process.child.terminate()
        process.left()
    finally:
        process.close()
    p99 = sorted(load.health)[int(0.99 * len(load.health))]
    n = len(load.memory)  # a few on a busy machine
    grown = [max(part) >> 20 for i in range(8) if (part := load.memory[n * i // 8 : n * (i + 1) // 8])]
    print(f"/health: p99 {p99:.3f} s of {len(load.health)}; MiB by eighths of the time: {grown}; {dict(load.seen)}")
    assert load.seen["whole"] > 0 and load.seen["oversized 400"] > 0 and load.seen["leaving"] > 0
    assert not {outcome for outcome in load.seen if outcome.startswith(("5", "oversized 5"))}
    half = (len(grown) + 1) // 2
    assert max(grown[-half:]) < max(grown[:half]) * 1.05 + (16 if seconds > 60 else 64), "MiB; it does not grow with time"
    assert p99 < 5, "seconds; on a machine that does nothing else it is far less"
    assert len(process.said) < 20, "nothing of a single request, of clients that leave or that are not let in"
