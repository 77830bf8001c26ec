"""Rehearses a run on two hosts on one machine: each is a network namespace with its own torchrun, as in the README.

    sudo make two-hosts                                      # the demo, from the repository's folder
    sudo python deploy/two_hosts.py generate.py --ckpt-path /path/to/checkpoint --interactive
    sudo python deploy/two_hosts.py check_network.py

takes a command of inference/ with its flags, and runs on both hosts, from inference/,

    torchrun --nnodes 2 --nproc-per-node 1 --node-rank $RANK --master-addr $ADDR COMMAND FLAGS

Needs root and iproute2 (Linux). Exit status: the first host's that is not 0; 2 where namespaces cannot be made.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

INFERENCE = Path(__file__).parents[1] / "inference"
NETWORK = "10.213.7.{}"
CABLE = "cable"  # what a host calls its interface


class Unavailable(Exception):
    """No network namespaces here; the text says why."""


def configure(*command: str) -> None:
    """Runs a command of iproute2. Raises Unavailable."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"{' '.join(command)}: {done.stderr.strip()}")


def ip(*arguments: str) -> None:
    """Raises Unavailable."""
    configure("ip", *arguments)


class Hosts:
    """Network namespaces on one switch. A context manager: all of it is removed at the end."""

    def __init__(self, n: int = 2):
        self.names = [f"host-{os.getpid()}-{i}" for i in range(n)]
        self.switch = f"switch-{os.getpid()}"

    def __enter__(self) -> "Hosts":
        """Raises Unavailable."""
        if os.geteuid() != 0:
            raise Unavailable("network namespaces need root: sudo make two-hosts")
        if shutil.which("ip") is None:
            raise Unavailable("network namespaces need `ip`: install iproute2")
        try:
            ip("netns", "add", self.switch)
            ip("-n", self.switch, "link", "add", "name", "switch", "type", "bridge")
            ip("-n", self.switch, "link", "set", "switch", "up")
            for i, name in enumerate(self.names):
                port = f"port{i}"
                ip("netns", "add", name)
                ip("-n", name, "link", "add", "name", CABLE, "type", "veth", "peer", "name", port, "netns", self.switch)
                ip("-n", self.switch, "link", "set", port, "master", "switch", "up")
                ip("-n", name, "address", "add", self.address(i) + "/24", "dev", CABLE)
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", CABLE, "up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in (*self.names, self.switch):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def address(self, i: int) -> str:
        return NETWORK.format(i + 1)

    def start(self, i: int, command: list[str], *, environment: dict[str, str], **more: Any) -> subprocess.Popen[str]:
        """A process on a host, which has its ranks talk over the cable unless `environment` says otherwise."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[i], *command],
            env={"GLOO_SOCKET_IFNAME": CABLE, "NCCL_SOCKET_IFNAME": CABLE} | environment,
            cwd=INFERENCE,
            text=True,
            **more,
        )

    def torchrun(self, i: int, per_host: int, *command: object) -> list[str]:
        """The README's command for this host."""
        return [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(self.names)),
            "--nproc-per-node", str(per_host), "--node-rank", str(i), "--master-addr", self.address(0),
            *map(str, command),
        ]  # fmt: skip

    def cut(self, i: int) -> None:
        """Takes a host off the network."""
        ip("-n", self.names[i], "link", "set", CABLE, "down")

    def replace_cable(self, i: int, device: str, mtu: int) -> None:
        """Plugs another device in, which was made outside, with packets of at most so many bytes."""
        ip("-n", self.names[i], "link", "delete", CABLE)
        ip("link", "set", device, "netns", self.names[i])
        ip("-n", self.names[i], "link", "set", device, "name", CABLE, "mtu", str(mtu), "up")
        ip("-n", self.names[i], "address", "add", self.address(i) + "/24", "dev", CABLE)

    def slow_down(self, i: int, rate: str) -> None:
        """What a host sends goes at this rate, such as "20mbit", from now on."""
        how = ["tbf", "rate", rate, "burst", "32kb", "latency", "100ms"]
        configure("tc", "-n", self.names[i], "qdisc", "replace", "dev", CABLE, "root", *how)


def run(command: list[str]) -> int:
    """Runs a command of inference/ on two hosts, each with half of the cores, until both have ended. Raises
    Unavailable."""
    cores = sorted(os.sched_getaffinity(0))
    with Hosts() as hosts:
        processes = []
        try:
            for i in range(2):
                share = ",".join(map(str, cores[i::2] or cores))
                bound = ["taskset", "--cpu-list", share, *hosts.torchrun(i, 1, *command)]
                stdin = None if i == 0 else subprocess.DEVNULL
                environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
                processes.append(hosts.start(i, bound, environment=environment, stdin=stdin))
            statuses = [process.wait() for process in processes]
            return next((status for status in statuses if status), 0)
        except KeyboardInterrupt:  # the terminal has sent it to all of them
            return 130
        finally:
            until = time.monotonic() + 20
            for process in processes:
                try:
                    process.wait(timeout=max(until - time.monotonic(), 0.1))
                except (subprocess.TimeoutExpired, KeyboardInterrupt):
                    process.terminate()
                    process.wait()


def main() -> int:
    if len(sys.argv) < 2 or not (INFERENCE / sys.argv[1]).is_file():
        print("error: name a command of inference/, such as generate.py, and its flags", file=sys.stderr)
        return 2
    try:
        return run(sys.argv[1:])
    except Unavailable as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
