"""Two network namespaces joined by a switch stand for two hosts, each with its own torchrun, as in the README.

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

from lib import delayed_link

import two_hosts
from core.sampling_params import SamplingParams
from engine.engine import Engine
from support import processes as launch

QUESTIONS = ["What is 17 + 25?", "Reverse the word maple."]

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("ip") is None,
    reason="needs root and iproute2 (Linux)",
)


@pytest.fixture
def hosts() -> Iterator[two_hosts.Hosts]:
    try:
        with two_hosts.Hosts() as hosts:
            yield hosts
    except two_hosts.Unavailable as e:
        pytest.skip(str(e))


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(hosts: two_hosts.Hosts) -> Iterator[Start]:
    """Runs the README's two-node command on a host, from inference/, one process a host."""
    started = []

    def start(rank: int, *flags: object) -> subprocess.Popen[str]:
        process = hosts.start(
            rank, hosts.torchrun(rank, 1, "generate.py", *flags), environment=launch.environment(), encoding="utf-8",
            bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
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


@pytest.mark.parametrize("layout", [(), ("--pp", 2)])
def test_batch_on_two_hosts(start: Start, checkpoint: Path, tmp_path: Path, layout: tuple[object, ...]) -> None:
    """As two ranks of every layer, and as two stages."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(QUESTIONS))
    flags = ("--ckpt-path", checkpoint, "--config", checkpoint / "config.json", "--input-file", prompts,
             "--temperature", 0, "--max-new-tokens", 12, "--dtype", "float32", "--threads", 1, *layout)  # fmt: skip
    one, two = start(0, *flags), start(1, *flags)
    out, err = one.communicate(timeout=120)
    silent, err2 = two.communicate(timeout=30)
    assert (one.returncode, two.returncode) == (0, 0), err + err2
    engine = Engine.from_pretrained(checkpoint, dtype="float32")
    prompt = [[{"role": "user", "content": text}] for text in QUESTIONS]
    expected = engine.generate(prompt, SamplingParams(12, temperature=0))
    assert out == "".join(f"Prompt: {q}\nCompletion: {r.text}\n\n" for q, r in zip(QUESTIONS, expected, strict=True))
    assert silent == ""
    assert ("pipeline: 2 stages of 1 rank" in err) == bool(layout)


def test_conversation_until_the_cable_is_cut(start: Start, hosts: two_hosts.Hosts, checkpoint: Path) -> None:
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
    hosts.cut(1)
    _, err = one.communicate(timeout=60)
    assert one.returncode != 0
    assert len(launch.errors(err)) == 1
    assert launch.errors(err)[0].startswith("error: rank 0 lost contact with another rank: ")


@pytest.mark.skipif(not os.path.exists("/dev/net/tun"), reason="needs TUN devices")
def test_a_cable_with_latency(hosts: two_hosts.Hosts) -> None:
    """Each way takes the delay, on top of what a loaded machine takes; nothing is lost or out of order."""
    fast = delayed_link.round_trip(hosts)
    with delayed_link.DelayedLink(hosts, 0.02):
        slow = delayed_link.round_trip(hosts)
        ends = [hosts.start(i, [sys.executable, "-c", TRANSFER, hosts.address(1), str(i)], environment=dict(os.environ),
                            stdout=subprocess.PIPE) for i in (1, 0)]  # fmt: skip
        found = [end.communicate(timeout=60)[0] for end in ends]
    assert fast < 0.02 and 0.04 <= slow < 0.4
    assert found[0] == found[1] and len(found[0]) == 65


# receives 4 MB as host 1, or sends them as host 0, and prints their hash
TRANSFER = """
import hashlib, random, socket, sys, time
if sys.argv[2] == "1":
    with socket.create_server(("", 5002)) as server:
        peer, _ = server.accept()
        data = b""
        while part := peer.recv(1 << 20):
            data += part
else:
    data = random.Random(0).randbytes(4 << 20)
    for _ in range(100):
        try:
            with socket.create_connection((sys.argv[1], 5002)) as peer:
                peer.sendall(data)
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
print(hashlib.sha256(data).hexdigest())
"""


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = Path(two_hosts.__file__)
    return subprocess.run(
        [sys.executable, str(script), *arguments], env=launch.environment(), timeout=120,
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip


def test_the_rehearsal(checkpoint: Path, tmp_path: Path) -> None:
    """What `make two-hosts` runs: the first host answers, both end with its status, and no namespace is left."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(QUESTIONS[0])
    flags = f"--ckpt-path {checkpoint} --temperature 0 --max-new-tokens 4 --dtype float32 --device cpu".split()
    done = run_script("generate.py", "--input-file", str(prompts), *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Prompt: {QUESTIONS[0]}\nCompletion: ") and done.stdout.count("Prompt: ") == 1
    assert "host-" not in subprocess.check_output(["ip", "netns"], text=True) or os.environ.get("PYTEST_XDIST_WORKER")
    failed = run_script("generate.py", "--input-file", str(tmp_path / "none"), *flags)
    assert failed.returncode == 1 and len(launch.errors(failed.stderr)) == 1, failed.stderr


def test_the_rehearsal_needs_root_and_a_command() -> None:
    done = run_script("nothing.py")
    assert (done.returncode, launch.errors(done.stderr)) == (
        2,
        ["error: name a command of inference/, such as generate.py, and its flags"],
    )
    code = "import os, sys; os.geteuid = lambda: 1000; import two_hosts; sys.argv[1:] = ['generate.py']; sys.exit(two_hosts.main())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(two_hosts.__file__).parent, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "error: network namespaces need root: sudo make two-hosts\n")
