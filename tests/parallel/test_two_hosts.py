"""Two network namespaces joined by a cable stand for two hosts, each with its own torchrun, as in the README.

Needs root and iproute2.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from core.sampling_params import SamplingParams
from engine.engine import Engine
from support import processes as launch

DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"
INFERENCE = launch.SCRIPT.parent
QUESTIONS = ["What is 17 + 25?", "Reverse the word maple."]
ADDRESS = "10.213.7.{}"

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("ip") is None,
    reason="needs root and iproute2 (Linux)",
)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two namespaces with one end of a veth pair each; removed in any case."""
    names = [f"dsv3-{os.getpid()}-{i}" for i in range(2)]
    ends = [f"v{os.getpid()}-{i}" for i in range(2)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        except subprocess.CalledProcessError as e:
            pytest.skip(f"no network namespaces here: {e.stderr.decode().strip()}")
        for i, (name, end) in enumerate(zip(names, ends, strict=True)):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "link", "set", end, "name", "cable")
            ip("-n", name, "address", "add", ADDRESS.format(i + 1) + "/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        subprocess.run(["ip", "link", "delete", ends[0]], capture_output=True)


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(hosts: list[str]) -> Iterator[Start]:
    """Runs the README's two-node command on a host, from inference/, one process a host."""
    started = []

    def start(rank: int, *flags: object) -> subprocess.Popen[str]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
                    "--node-rank", str(rank), "--master-addr", ADDRESS.format(1)]  # fmt: skip
        process = subprocess.Popen(
            ["ip", "netns", "exec", hosts[rank], *torchrun, "generate.py", *map(str, flags)],
            env=launch.environment(GLOO_SOCKET_IFNAME="cable"), cwd=INFERENCE, encoding="utf-8", bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:  # torchrun takes its worker along
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, or, where it has not been trained, a random stand-in."""
    if (DEMO / "config.json").is_file():
        return DEMO
    return launch.make_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny", printable=True)


def test_batch_on_two_hosts(start: Start, checkpoint: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(QUESTIONS))
    flags = ("--ckpt-path", checkpoint, "--config", checkpoint / "config.json", "--input-file", prompts,
             "--temperature", 0, "--max-new-tokens", 12, "--dtype", "float32", "--threads", 1)  # fmt: skip
    one, two = start(0, *flags), start(1, *flags)
    out, err = one.communicate(timeout=120)
    silent, err2 = two.communicate(timeout=30)
    assert (one.returncode, two.returncode) == (0, 0), err + err2
    engine = Engine.from_pretrained(checkpoint, dtype="float32")
    prompt = [[{"role": "user", "content": text}] for text in QUESTIONS]
    expected = engine.generate(prompt, SamplingParams(12, temperature=0))
    assert out == "".join(f"Prompt: {q}\nCompletion: {r.text}\n\n" for q, r in zip(QUESTIONS, expected, strict=True))
    assert silent == ""


def test_conversation_until_the_cable_is_cut(start: Start, hosts: list[str], checkpoint: Path) -> None:
    """Nothing tells rank 0 that the other host is gone; it misses it while it waits for a line."""
    flags = ("--ckpt-path", checkpoint, "--config", checkpoint / "config.json", "--interactive", "--temperature", 0.7,
             "--max-new-tokens", 12, "--timeout", 6, "--threads", 1)  # fmt: skip
    one, _ = start(0, *flags), start(1, *flags)
    assert one.stdin and one.stdout
    one.stdin.write(f"{QUESTIONS[0]}\n")
    shown = ""
    while shown.count(">>> ") < 2:  # the answer lies between two prompts
        shown += (letter := one.stdout.read(1))
        assert letter, "rank 0 left"
    answer = shown.split(">>> ")[1]
    assert answer.strip()
    ip("-n", hosts[1], "link", "set", "cable", "down")
    _, err = one.communicate(timeout=60)
    assert one.returncode != 0
    assert len(launch.errors(err)) == 1
    assert launch.errors(err)[0].startswith("error: rank 0 lost contact with another rank: ")
