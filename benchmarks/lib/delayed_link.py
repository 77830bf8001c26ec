"""A cable with latency between two network namespaces, where the kernel has no netem.

Each host gets a TUN device in place of its cable. What it sends comes to this process, which holds every packet back
for the delay and then gives it to the other host. The hosts' kernels and their TCP know no difference: acknowledgements
are late too, and a queue on the device (tc, tbf) sets the rate as on any other. A packet takes the relay some
microseconds of a processor, so the devices take large packets; `round_trip` measures what came of it.
"""

import contextlib
import fcntl
import os
import select
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from types import TracebackType
from typing import Any

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
MTU = 9000  # bytes, as of jumbo frames
PINGS = 50
ECHO = """
import socket
with socket.create_server(("", 5001)) as server:
    print("listening", flush=True)
    peer, _ = server.accept()
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while byte := peer.recv(1):
        peer.sendall(byte)
"""
PING = """
import socket, statistics, sys, time
with socket.create_connection((sys.argv[1], 5001)) as peer:
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    seconds = []
    for _ in range(int(sys.argv[2])):
        began = time.perf_counter()
        peer.sendall(b"x")
        peer.recv(1)
        seconds.append(time.perf_counter() - began)
print(statistics.median(seconds))
"""


class DelayedLink:
    """Takes the place of the cable of two_hosts.Hosts. A context manager, within that of the hosts."""

    def __init__(self, hosts: Any, seconds: float):
        """`seconds`: of each way."""
        self.hosts, self.seconds = hosts, seconds
        self.devices: list[int] = []
        self._stopped, self._wake = os.pipe()
        self._relay = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "DelayedLink":
        """Raises OSError where there are no TUN devices, and two_hosts.Unavailable."""
        for i in range(2):
            name = f"tun{os.getpid()}-{i}"
            self.devices.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
            fcntl.ioctl(self.devices[i], TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
            self.hosts.replace_cable(i, name, MTU)
        self._relay.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._wake)
        if self._relay.is_alive():
            self._relay.join()
        for fd in (*self.devices, self._stopped):
            os.close(fd)

    def _run(self) -> None:
        with contextlib.suppress(PermissionError):  # ahead of ranks that keep all processors busy
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        to = dict(zip(self.devices, reversed(self.devices), strict=True))
        waiting: deque[tuple[float, int, bytes]] = deque()  # when each is due, where, and what
        while True:
            wait = max(waiting[0][0] - time.monotonic(), 0) if waiting else None
            readable, _, _ = select.select([*self.devices, self._stopped], [], [], wait)
            if self._stopped in readable:
                return
            for device in readable:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        waiting.append((time.monotonic() + self.seconds, to[device], os.read(device, 1 << 16)))
            while waiting and waiting[0][0] <= time.monotonic():
                _, device, packet = waiting.popleft()
                with contextlib.suppress(OSError):  # a device that is down, or a queue that is full, loses it
                    os.write(device, packet)


def round_trip(hosts: Any) -> float:
    """Seconds in which a byte comes back from the second host over TCP: the median of PINGS."""
    run = [sys.executable, "-c"]
    with hosts.start(1, [*run, ECHO], environment=dict(os.environ), stdout=subprocess.PIPE) as echo:
        assert echo.stdout.readline() == "listening\n"
        ping = [*run, PING, hosts.address(1), str(PINGS)]
        with hosts.start(0, ping, environment=dict(os.environ), stdout=subprocess.PIPE) as client:
            return float(client.stdout.read())
