"""Nothing is unpickled, evaluated or fetched, and nobody else is listened to: the code is scanned, and processes are
looked at while they work."""

import ast
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import processes as launch

ROOT = Path(__file__).parents[2]
SOURCES = [p for folder in ("inference", "demo", "benchmarks", "figures", "deploy", "conformance") for p in sorted((ROOT / folder).rglob("*.py"))]
OURS_TOP = {part for path in SOURCES for part in path.relative_to(ROOT).with_suffix("").parts[1:2]}
PINNED = {
    line.split("==")[0].replace("-", "_")
    for file in ROOT.glob("requirements*.txt") if file.name != "requirements-dev.txt"
    for line in file.read_text().splitlines() if "==" in line
}  # fmt: skip

# Modules of Python's own that unpickle, evaluate, or talk to others.
REFUSED_MODULES = set(
    "pickle marshal shelve dbm copyreg builtins code codeop runpy importlib ctypes multiprocessing socket socketserver ssl "
    "http urllib ftplib smtplib poplib imaplib telnetlib xmlrpc wsgiref asyncio subprocess pty webbrowser".split()
)
REFUSED_NAMES = {"eval", "exec", "compile", "__import__", "__builtins__", "breakpoint"}
REFUSED_ATTRIBUTES = {  # the last of the dotted name, and what may stand before it ("": anything)
    "os": set("system popen fork forkpty startfile execl execle execlp execlpe execv execve execvp execvpe spawnl spawnle "
              "spawnlp spawnlpe spawnv spawnve spawnvp spawnvpe posix_spawn posix_spawnp".split()),
    "torch": {"load", "save", "hub", "package"},
    "jit": {"load"},
    "jinja2": {"Environment", "Template"},
    "yaml": {"load", "load_all", "unsafe_load"},
    "": {"exec_module", "ProcessPoolExecutor", "rpc", "broadcast_object_list", "all_gather_object", "gather_object",
         "scatter_object_list", "send_object_list", "recv_object_list", "read_pickle", "snapshot_download",
         "hf_hub_download", "push_to_hub"},
}  # fmt: skip
REFUSED_ARGUMENTS = {"trust_remote_code": (False,), "shell": (False,), "allow_pickle": (False,), "weights_only": (True,)}
OURS = {"Engine", "Tokenizer"}  # whose from_pretrained reads directories only

ALLOWED = {  # file and finding: why
    ("inference/parallel/network_facts.py", "import socket"): "names the host, its interfaces and their addresses",
    ("inference/parallel/startup.py", "import socket"): "names the host and its loopback; without torchrun, the ranks' meeting point",
    ("inference/ops/cpu/kernels.py", "import ctypes"): "calls what it compiled from kernels.c",
    ("inference/ops/cpu/captured_calls.py", "import ctypes"): "keeps arguments of these calls as C takes them",
    ("inference/ops/cpu/kernels.py", "import subprocess"): "starts the C compiler on kernels.c, which is its own",
    ("inference/ops/cpu/kernels.py", "import importlib"): "looks whether the package ziglang, a C compiler, is installed",
    ("inference/ops/backend.py", "import importlib"): "looks whether Triton is installed",
    ("inference/core/devices.py", "import importlib"): "torch's packages for devices, by names that stand in it, when --device asks for one",
    ("inference/checkpoint/commit.py", "import importlib"): "importlib.metadata: the versions of what is installed",
    ("inference/server.py", "import asyncio"): "the server's loop",
    ("inference/server.py", "import socket"): "the server's: on loopback, or where its user says",
    ("inference/serving/app.py", "import asyncio"): "the server's loop",
    ("inference/serving/serve.py", "import asyncio"): "the server's loop",
    ("inference/serving/serve.py", "import socket"): "takes over server.py's",
    ("inference/serving/bodies.py", "import asyncio"): "a body's deadline",
    ("inference/serving/connections.py", "import asyncio"): "the loop that accepts connections",
    ("inference/serving/connections.py", "import socket"): "how many connections server.py's keeps waiting",
    ("inference/serving/streams.py", "import asyncio"): "comments in the silences of a stream",
    ("inference/serving/engine_thread.py", "import asyncio"): "hands the engine's text to the server's loop",
    ("inference/serving/plan.py", "import pydantic_core"): "comes with pydantic, which is pinned",
    ("inference/serving/plan.py", "compile"): "a field: what makes an answer's grammar",
    ("benchmarks/attention_counts.py", "import support"): "tests/support: what compiles the kernels",
    ("benchmarks/host_step.py", "import support"): "tests/support: the driver that does nothing",
    ("benchmarks/step_model.py", "import support"): "tests/support: what counts launches and compiles the kernels",
    ("benchmarks/lib/sass.py", "import support"): "tests/support: what compiles the kernels",
    ("benchmarks/format_masks.py", "import importlib"): "whether the package with V3's tokenizer is installed",
    ("benchmarks/gpu_proof.py", "import subprocess"): "starts each step of the proof under its own limit",
    ("benchmarks/online_serving.py", "import asyncio"): "many clients",
    ("benchmarks/online_serving.py", "import socket"): "looks for a free port",
    ("benchmarks/online_serving.py", "import subprocess"): "starts the servers that it compares",
    ("benchmarks/online_serving.py", "import urllib"): "asks those servers whether they are ready",
    ("benchmarks/online_serving.py", "import openai"): "the client; pinned in requirements-dev.txt",
    ("benchmarks/lane_throughput.py", "import socket"): "looks for a free port",
    ("benchmarks/lane_throughput.py", "import subprocess"): "starts the ranks that it compares",
    ("benchmarks/lib/delayed_link.py", "import subprocess"): "starts the two ends of a ping in network namespaces",
    ("deploy/two_hosts.py", "import subprocess"): "starts torchrun on two hosts, and ip and tc, which make them",
    ("benchmarks/bench.py", "import subprocess"): "starts the other benchmarks",
    ("benchmarks/lib/machine.py", "import subprocess"): "starts convert.py, fp8_cast_bf16.py, check_checkpoint.py and llama.cpp, to see their memory",
    ("benchmarks/revisions.py", "import subprocess"): "starts two revisions of this project, and git to get them",
    ("benchmarks/bench_cpu.py", "import subprocess"): "starts the llama-bench that its user names, and quantize.py",
    ("benchmarks/lib/child.py", "import subprocess"): "starts the V3 repository's code, so that a kernel that hangs can be ended, and this engine, so that its memory can be told",
    ("benchmarks/kernel_gpu.py", "import importlib"): "peers, by names that stand in it",
    ("benchmarks/kernel_gpu.py", "import deep_gemm"): "a peer, where its user has installed it",
    ("benchmarks/kernel_gpu.py", "import flash_mla"): "a peer, where its user has installed it",
    ("benchmarks/page_time.py", "import support"): "the tests' browser and the server that it talks to",
    ("benchmarks/tables.py", "import support"): "the tests' catalogue of checkpoints, which a document shows",
    ("benchmarks/tables.py", "import mutation"): "the tests' list of mutants, whose number a document says",
    ("conformance/check_port.py", "import subprocess"): "starts the command that its user names",
    ("conformance/adapters/original_demo.py", "import importlib"): "loads the model.py of its user's own copy",
    ("conformance/check_port.py", "torch.load"): "safetensors', of what that command wrote",
    ("conformance/goldens.py", "torch.save"): "safetensors', to bytes",
    ("conformance/adapters/original_demo.py", "loader.exec_module"): "runs that model.py, in a process of its own",
    ("figures/page.py", "import PIL"): "makes pictures small; comes with matplotlib",
    ("figures/page.py", "import support"): "the tests' browser and the server that it talks to",
    ("figures/benchmark.py", "import matplotlib"): "draws; pinned in requirements-dev.txt",
    ("figures/server_load.py", "import matplotlib"): "draws; pinned in requirements-dev.txt",
    ("figures/drawing.py", "import matplotlib"): "draws; pinned in requirements-dev.txt",
    ("figures/drawing.py", "import PIL"): "makes pictures small; comes with matplotlib",
}


def findings(source: str) -> Iterator[tuple[int, str]]:
    """(line, what) of everything in a module that is refused."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not (isinstance(node, ast.ImportFrom) and node.level), "a relative import"
            for name in names:
                top = name.partition(".")[0]
                known = top in sys.stdlib_module_names or top in PINNED or top in OURS_TOP
                if not known or top in REFUSED_MODULES:
                    yield node.lineno, f"import {top}"
            if isinstance(node, ast.ImportFrom):  # from torch import load
                for alias in node.names:
                    last = (node.module or "").rpartition(".")[2]
                    if alias.name in REFUSED_ATTRIBUTES.get(last, set()) | REFUSED_ATTRIBUTES[""]:
                        yield node.lineno, f"{last}.{alias.name}"
        elif isinstance(node, ast.Name) and node.id in REFUSED_NAMES:
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            before = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", "")
            if node.attr in REFUSED_ATTRIBUTES.get(before, set()) | REFUSED_ATTRIBUTES[""]:
                yield node.lineno, f"{before}.{node.attr}"
        elif isinstance(node, ast.Call):
            arguments = {a.arg: a.value for a in node.keywords}
            for name, harmless in REFUSED_ARGUMENTS.items():
                value = arguments.get(name)
                if value is not None and not (isinstance(value, ast.Constant) and value.value in harmless):
                    yield node.lineno, f"{name}={ast.unparse(value)}"
            function = node.func
            if isinstance(function, ast.Attribute) and function.attr == "from_pretrained":
                local = arguments.get("local_files_only")
                ours = isinstance(function.value, ast.Name) and function.value.id in OURS
                if not ours and not (isinstance(local, ast.Constant) and local.value is True):
                    yield node.lineno, "from_pretrained without local_files_only=True"


def test_the_code_does_nothing_that_is_refused() -> None:
    assert len(SOURCES) > 40 and {"torch", "jinja2", "tqdm"} <= PINNED
    found = {
        (str(path.relative_to(ROOT)), what): f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in SOURCES for line, what in findings(path.read_text())
    }  # fmt: skip
    assert not [said for key, said in found.items() if key not in ALLOWED]
    assert not [key for key in ALLOWED if key not in found], "allowed, and no longer there"


@pytest.mark.parametrize("line", """
import pickle
import requests
import yaml
from urllib.request import urlopen
import http.client as h
from multiprocessing import Pool
import torch, socket
from importlib import import_module
eval("1")
f = exec
compile("1", "", "eval")
__import__("os")
os.system("ls")
os.execv("a", [])
torch.load("f")
torch.load("f", weights_only=True)
from torch import load
torch.hub.load("a", "b")
torch.jit.load("f")
torch.save(x, "f")
dist.broadcast_object_list(x)
torch.distributed.all_gather_object(a, b)
jinja2.Environment()
from jinja2 import Template
np.load("f", allow_pickle=True)
run("ls", shell=True)
run("ls", shell=flag)
AutoModel.from_pretrained("org/name")
transformers.AutoModel.from_pretrained(path, local_files_only=flag)
Config.from_pretrained(path, trust_remote_code=True, local_files_only=True)
spec.loader.exec_module(m)
""".strip().splitlines())  # fmt: skip
def test_what_is_refused_is_found(line: str) -> None:
    assert list(findings(line))


# --- sockets of processes --------------------------------------------------------------------------------------------

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at sockets in /proc")
LISTENING, LOOPBACK = "0A", ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")


def sockets(pid: int) -> list[str]:
    """The inodes of a process's sockets, of whatever kind."""
    links = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            links.append(os.readlink(fd))
    return [link[8:-1] for link in links if link.startswith("socket:")]


def connections(pid: int) -> list[tuple[str, str, str]]:
    """(local address, remote address, state), as the kernel writes them, of a process's TCP sockets."""
    inodes, rows = set(sockets(pid)), []
    for table in ("tcp", "tcp6"):
        rows += [line.split() for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]]
    return [(row[1], row[2], row[3]) for row in rows if row[9] in inodes]


@linux
def test_sockets_are_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = f"{server.getsockname()[1]:04X}"
        assert (f"{LOOPBACK[0]}:{port}", "00000000:0000", LISTENING) in connections(os.getpid())


@linux
def test_one_rank_has_no_sockets(tmp_path: Path) -> None:
    """While it answers, and when it has."""
    tiny = launch.make_tiny(tmp_path / "tiny", fp8=False, printable=True)
    flags = ("--ckpt-path", tiny, "--interactive", "--max-new-tokens", 200, "--device", "cpu", "--threads", 1)
    process = subprocess.Popen(
        launch.command(*flags), env=launch.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, encoding="utf-8", bufsize=1,
    )  # fmt: skip
    try:
        assert process.stdin and process.stdout
        process.stdin.write("hello\n")
        assert process.stdout.read(5), "the prompt and the first character of the answer"
        during = sockets(process.pid)
        assert process.stdout.readline(), "the rest of it"
        assert during == sockets(process.pid) == []
    finally:
        process.kill()
        process.communicate()


JOINED = """
import os, sys
sys.path[:0] = sys.argv[1:]
from parallel import startup
from project.test_security import connections
group = startup.join(30)
group.broadcast_ints([1, 2, 3])
agent = connections(os.getppid()) if "TORCHELASTIC_RUN_ID" in os.environ else []
said = repr((os.environ.get("GLOO_SOCKET_IFNAME"), connections(os.getpid()), agent))
os.write(1, f"{said}{os.linesep}".encode())  # at once: the ranks share a pipe
group.shutdown()
"""


@linux
@pytest.mark.parametrize("by", ["torchrun", pytest.param("hand", marks=pytest.mark.trust)])
def test_ranks_of_one_host_keep_to_its_loopback(tmp_path: Path, by: str) -> None:
    """Every socket of ours, gloo's too; torchrun itself listens on all interfaces, and we cannot help it."""
    script = tmp_path / "joined.py"
    script.write_text(JOINED)
    paths = str(launch.SCRIPT.parent), str(ROOT / "tests")
    if by == "torchrun":
        done = subprocess.run(
            launch.torchrun(*paths, script=script), env=launch.environment(), capture_output=True, text=True, timeout=120
        )
        out = done.stdout
        assert done.returncode == 0, done.stderr
    else:
        port = launch.free_port()
        ranks = [launch.start_rank(r, 2, port, run=[sys.executable, str(script), *paths]) for r in range(2)]
        out = "".join(rank.communicate(timeout=120)[0] for rank in ranks)
        assert [rank.returncode for rank in ranks] == [0, 0]
    said = [ast.literal_eval(line) for line in out.splitlines() if line.startswith("(")]
    assert len(said) == 2
    for interface, ours, agent in said:
        assert interface == "lo"
        assert sum(state == LISTENING for *_, state in ours) >= 1
        for local, remote, state in ours:
            assert local.startswith(LOOPBACK), ours
            assert remote.startswith(LOOPBACK) or state == LISTENING, ours
        open_to_all = [local for local, _, state in agent if state == LISTENING and not local.startswith(LOOPBACK)]
        assert len(open_to_all) <= 1, "torchrun's store"


GUARDED = """
import sys
def guard(event, arguments):
    if event.partition(".")[0] == "socket" and event not in ("socket.__new__", "socket.gethostname"):
        raise PermissionError(f"{event} {arguments}")
sys.addaudithook(guard)
sys.path[:0] = sys.argv[2:]
from pathlib import Path
import torch, generate, reload
reload.load_transformers(Path(sys.argv[1]), torch.float32)
sys.argv = ["generate.py", "--ckpt-path", sys.argv[1], "--input-file", sys.argv[1] + "/../prompts.txt",
            "--max-new-tokens", "2", "--device", "cpu", "--threads", "1"]
assert generate.main() == 0
import socket
try:
    socket.create_connection(("127.0.0.1", 1))
except PermissionError:
    print("guarded")
"""


@pytest.mark.skipif(not (ROOT / "demo" / "checkpoint").exists(), reason="no demo checkpoint in this tree")
def test_nothing_asks_the_network() -> None:
    """The demo answers, and is loaded by transformers, where every use of a socket raises."""
    folders = str(ROOT / "demo" / "checkpoint"), str(ROOT / "inference"), str(ROOT / "demo")
    env = {name: value for name, value in launch.environment().items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, *folders], env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0 and done.stdout.endswith("guarded\n"), done.stderr
