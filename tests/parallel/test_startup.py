"""Ranks started by srun and mpirun: what their variables mean, and real processes that have them."""

import json
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core import devices
from core.errors import UserError
from parallel import launcher, startup
from parallel.group import Group
from support import processes as launch

Variables = Callable[..., None]


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Variables:
    """Sets these variables and no others of a launcher's."""
    monkeypatch.setattr(os, "environ", launch.environment())

    def set_all(*sets: dict[str, object], **more: object) -> None:
        for found in (*sets, more):
            os.environ.update({name: str(value) for name, value in found.items()})

    return set_all


def slurm(rank: int = 0, size: int = 2, **more: object) -> dict[str, object]:
    """What srun gives a task; by default all tasks are on one node."""
    return {
        "SLURM_JOB_ID": 4321, "SLURM_STEP_ID": 1, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": 0,
        "SLURM_NTASKS": size, "SLURM_STEP_NUM_TASKS": size, "SLURM_STEP_TASKS_PER_NODE": size,
        "SLURM_STEP_NODELIST": "gpu-a[07-08]", **more,
    }  # fmt: skip


def open_mpi(
    rank: int = 0, size: int = 2, local: int | None = None, local_size: int | None = None
) -> dict[str, object]:
    values = (rank, size, rank if local is None else local, size if local_size is None else local_size)
    return dict(zip(launcher.NAMES[launcher.OPEN_MPI], values, strict=True))


def test_a_task_of_slurm(variables: Variables) -> None:
    """Three nodes with tasks of uneven number: each knows how many share its host."""
    uneven = {
        "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
        "SLURM_STEP_NODELIST": "gpu-a[07-08],gpu-b1",
        "SLURM_CPUS_ON_NODE": 64,
    }
    variables(slurm(9, 11, SLURM_LOCALID=1, SLURM_NODEID=2, **uneven))
    found = launcher.find()
    assert (found.rank, found.size, found.local_rank, found.local_size) == (9, 11, 1, 3) == startup.environment()
    assert (found.address, found.port, found.node, found.host_cores) == ("gpu-a07", str(20000 + 43211 % 10000), "2", 64)
    variables(SLURM_LOCALID=3, SLURM_NODEID=0)
    assert startup.environment() == (9, 11, 3, 4)
    variables(MASTER_ADDR="10.0.0.1", MASTER_PORT=4444)
    assert (launcher.find().address, launcher.find().port) == ("10.0.0.1", "4444")


def test_a_step_smaller_than_its_job(variables: Variables) -> None:
    """The job's variables are there besides the step's own."""
    variables(slurm(1, 2), SLURM_NTASKS=16, SLURM_TASKS_PER_NODE="8(x2)", SLURM_NODELIST="gpu-a[01-02]")
    assert startup.environment() == (1, 2, 1, 2)
    assert launcher.find().address == launcher.LOOPBACK, "one host has no need of its name"
    del os.environ["SLURM_STEP_NUM_TASKS"], os.environ["SLURM_STEP_TASKS_PER_NODE"], os.environ["SLURM_STEP_NODELIST"]
    variables(SLURM_LOCALID=1, SLURM_NODEID=1)
    assert startup.environment() == (1, 16, 1, 8) and launcher.find().address == "gpu-a01"


@pytest.mark.parametrize(
    "found",
    [
        {"SLURM_NTASKS": 16, "SLURM_JOB_ID": 7},  # a shell of salloc's
        {**slurm(0, 16), "SLURM_STEP_ID": ""},  # a batch script
        {**slurm(0, 16), "SLURM_STEP_ID": "batch"},
        {**slurm(0, 16), "SLURM_STEP_ID": 0xFFFFFFFB},
        {**slurm(0, 16), "SLURM_STEP_ID": 0xFFFFFFFA},  # salloc's interactive step
        {**slurm(0, 1), "SLURM_NTASKS": 16},  # srun --pty bash
    ],
)
def test_an_allocation_alone_starts_no_ranks(variables: Variables, found: dict[str, object]) -> None:
    variables(found)
    assert startup.environment() == (0, 1, 0, 1)
    assert launcher.is_alone() and launcher.is_first()


def test_torchrun_in_a_task_of_slurm(variables: Variables) -> None:
    """`srun torchrun`: its ranks have both. $RANK alone is the user's, as for the README's command."""
    variables(slurm(1, 2), RANK=11, WORLD_SIZE=16, LOCAL_RANK=3, LOCAL_WORLD_SIZE=8, MASTER_ADDR="a", MASTER_PORT="1")
    assert startup.environment() == (11, 16, 3, 8) and launcher.find().by == launcher.TORCHRUN
    del os.environ["WORLD_SIZE"]
    assert startup.environment() == (1, 2, 1, 2)


def test_a_rank_of_open_mpi(variables: Variables) -> None:
    """Its daemon on a host may be a task of SLURM's, whose variables the ranks have then."""
    variables(slurm(1, 2), open_mpi(3, 4))
    assert startup.environment() == (3, 4, 3, 4)
    assert launcher.find().address == launcher.LOOPBACK and launcher.find().port.isdecimal()
    variables(open_mpi(3, 4, 1, 2))
    with pytest.raises(
        UserError, match=r"^4 ranks on several hosts, and Open MPI does not say where rank 0 is: mpirun -x MASTER_ADDR"
    ):
        launcher.find()
    variables(MASTER_ADDR="first")
    assert startup.environment() == (3, 4, 1, 2) and launcher.find().address == "first"


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("node7", "node7"), ("node[01-04,07]", "node01"), ("a,b[1-2]", "a"), ("node[9,11-12],a", "node9"),
        ("r[1-2]n[10-20]", "r1n10"), ("gpu-[003-4].example.org", "gpu-003.example.org"), ("", ""),
    ],
)  # fmt: skip
def test_first_host(nodes: str, first: str) -> None:
    assert launcher.first_host(nodes) == first


@pytest.mark.parametrize(
    "found, message",
    [
        (slurm(SLURM_STEP_TASKS_PER_NODE="2(x"), r"SLURM's environment \(SLURM_PROCID, .*\) is not made of numbers: tasks of the nodes '2\(x'"),
        (slurm(SLURM_NODEID=1), "SLURM_NODEID 1, and 1 nodes"),
        (slurm(SLURM_PROCID=2), "SLURM_PROCID is 2 but SLURM_STEP_NUM_TASKS is 2"),
        (slurm(SLURM_LOCALID=2), "SLURM_LOCALID is 2, but SLURM_STEP_TASKS_PER_NODE is 2 here and SLURM_STEP_NUM_TASKS 2"),
        (slurm(SLURM_LOCALID=""), "SLURM's environment .* is not made of numbers: invalid literal"),
        (open_mpi("x"), "Open MPI's environment .* is not made of numbers"),
        ({"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 1}, "LOCAL_RANK is 1, but LOCAL_WORLD_SIZE is 1 here and WORLD_SIZE 2"),
    ],
)  # fmt: skip
def test_variables_that_contradict_each_other(variables: Variables, found: dict[str, object], message: str) -> None:
    variables(found)
    with pytest.raises(UserError, match=message):
        launcher.find()


def test_each_task_sees_its_own_gpu_alone(variables: Variables, monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun --gpus-per-task 1`: one GPU each, all called cuda:0."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    variables(slurm(3, 8))
    assert startup.choose_device("auto", 3, 8) == torch.device("cuda:0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(UserError, match="8 ranks on a host with 4 GPUs"):
        startup.choose_device("auto", 3, 8)
    variables(RANK=3, WORLD_SIZE=8)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match="8 ranks on a host with 1 GPU: start as many"):
        startup.choose_device("auto", 3, 8)


def test_tasks_that_see_the_same_gpu(variables: Variables, monkeypatch: pytest.MonkeyPatch) -> None:
    variables(slurm(0, 3))
    monkeypatch.setattr(Group, "gather_ints", lambda self, x: torch.stack([x, x + 1, x]))
    monkeypatch.setattr(devices, "uuid", lambda device: "GPU-1")
    with pytest.raises(UserError, match=r"^ranks 0, 2 were given the same GPU: each needs its own"):
        startup.on(torch.device("cuda:0"), Group(0, 3))


def test_uuids_that_nobody_tells_are_not_the_same(variables: Variables, monkeypatch: pytest.MonkeyPatch) -> None:
    variables(slurm(0, 2))
    monkeypatch.setattr(devices, "uuid", lambda device: "")
    monkeypatch.setattr(startup, "collectives_of", lambda device: None)
    meet, seen = threading.Barrier(2), [0, 0]

    def gather(self: Group, x: torch.Tensor) -> torch.Tensor:
        seen[self.rank] = int(x)
        meet.wait(20)
        return torch.tensor(seen)

    monkeypatch.setattr(Group, "gather_ints", gather)
    other = threading.Thread(target=startup.on, args=(torch.device("cuda:0"), Group(1, 2)))
    other.start()
    assert startup.on(torch.device("cuda:0"), Group(0, 2)).through_host
    other.join()


def test_cores_of_a_task(variables: Variables, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that srun has bound to 4 of the job's 16 cores uses these 4; unbound, its share of the 16."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    variables(slurm(0, 4), SLURM_CPUS_ON_NODE=16)
    for cores in (4, 16):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cores: set(range(n)))
        assert startup.choose_threads(None, 4) == 4


def answers(
    variables_of: Callable[[int], dict[str, Any]], folder: Path, checkpoint: Path
) -> list[subprocess.CompletedProcess[str]]:
    """Two ranks of generate.py that have these variables and nothing of torchrun's."""
    prompts, answered = folder / "prompts.txt", folder / "answers.jsonl"
    prompts.write_text("What is 17 + 25?\n")
    flags = ("--ckpt-path", checkpoint, "--input-file", prompts, "--output-file", answered, "--temperature", 0,
             "--max-new-tokens", 8, "--threads", 1, "--dtype", "float32", "--device", "cpu")  # fmt: skip
    ranks = [
        subprocess.Popen(
            launch.command(*flags),
            env=launch.environment(**{name: str(v) for name, v in variables_of(rank).items()}),
            encoding="utf-8",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        return [
            subprocess.CompletedProcess((), p.returncode, *out) for p in ranks if (out := p.communicate(timeout=120))
        ]
    finally:
        for p in ranks:
            p.kill()


@pytest.mark.parametrize("by", [slurm, pytest.param(open_mpi, marks=pytest.mark.trust)])
def test_two_processes_without_torchrun(by: Callable[..., dict[str, Any]], checkpoint: Path, tmp_path: Path) -> None:
    port = {"MASTER_PORT": launch.free_port()}
    one, two = answers(lambda rank: by(rank, 2) | port, tmp_path, checkpoint)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert one.stdout.startswith("Prompt: What is 17 + 25?\nCompletion: ") and two.stdout == ""
    assert len(json.loads((tmp_path / "answers.jsonl").read_text())["tokens"]) <= 8


def test_an_unknown_first_host_is_one_line_a_host(checkpoint: Path, tmp_path: Path) -> None:
    """The two are the second host's of four ranks under Open MPI, and nobody says where the first host is."""
    one, two = answers(lambda rank: open_mpi(2 + rank, 4, rank, 2), tmp_path, checkpoint)
    assert (one.returncode, two.returncode) == (2, 2), one.stderr + two.stderr
    assert [len(launch.errors(rank.stderr)) for rank in (one, two)] == [1, 0]


def test_wrong_flags_are_one_line(tmp_path: Path) -> None:
    port = {"MASTER_PORT": launch.free_port()}
    one, two = answers(lambda rank: slurm(rank, 2) | port, tmp_path, tmp_path / "nothing")
    assert (one.returncode, two.returncode) == (2, 2), one.stderr + two.stderr
    assert [len(launch.errors(rank.stderr)) for rank in (one, two)] == [1, 0]
