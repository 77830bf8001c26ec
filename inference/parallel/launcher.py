"""Which rank of how many this process is, by the environment of torchrun, of SLURM's srun or of Open MPI's mpirun.

Needs no torch: commands ask before they import it.
"""

import os
import re
import zlib
from dataclasses import dataclass

from core.errors import UserError

TORCHRUN, SLURM, OPEN_MPI = "torchrun", "SLURM", "Open MPI"
LOOPBACK = "127.0.0.1"
RESERVED_STEPS = 0xFFFFFFF0  # SLURM's own steps (a batch script, an interactive shell) count from here
PORTS = range(20000, 30000)  # below those that Linux gives to clients


@dataclass(frozen=True)
class Launch:
    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the ranks of this host
    local_size: int = 1
    by: str = TORCHRUN
    address: str = ""  # where the ranks meet: of rank 0's host
    port: str = ""
    node: str | None = None  # the host's number, where the launcher tells it
    host_cores: int = 0  # of this host, for all its ranks; 0 where the launcher does not tell

    @property
    def may_divide_devices(self) -> bool:
        """Whether each rank may see one device only, its own, as with `srun --gpus-per-task 1`."""
        return self.by != TORCHRUN


def find() -> Launch:
    """torchrun's variables count first, then Open MPI's, whose daemons may be tasks of SLURM, then SLURM's. Raises
    UserError for values that are no numbers or contradict each other, and where rank 0's host is not known."""
    names = NAMES[by := _launched_by()]
    try:
        launch = _read()
    except ValueError as e:
        raise UserError(f"{by}'s environment ({', '.join(names)}) is not made of numbers: {e}") from None
    if not 0 <= launch.rank < launch.size:
        raise UserError(f"{names[0]} is {launch.rank} but {names[1]} is {launch.size}")
    if not 0 <= launch.local_rank < launch.local_size <= launch.size:
        here = f"{names[3]} is {launch.local_size} here and {names[1]} {launch.size}"
        raise UserError(f"{names[2]} is {launch.local_rank}, but {here}")
    if launch.by == OPEN_MPI and launch.size > 1 and not launch.address:
        raise UserError(
            f"{launch.size} ranks on several hosts, and Open MPI does not say where rank 0 is: "
            "mpirun -x MASTER_ADDR=HOST, the first host's"
        )
    return launch


def is_alone() -> bool:
    """Whether there is one rank, or an environment that `find` refuses."""
    try:
        return find().size == 1
    except UserError:
        return True


def is_first(of_host: bool = False) -> bool:
    """Whether this is rank 0, or the first rank of its host; true where the environment does not say."""
    try:
        launch = _read()
    except ValueError:
        return True
    return (launch.local_rank if of_host else launch.rank) == 0


NAMES = {  # the variables with a rank, the number of ranks, and both among the ranks of its host
    TORCHRUN: ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    OPEN_MPI: tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    SLURM: ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}


def _launched_by() -> str:
    """The launcher whose variables count here: a key of NAMES."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:  # RANK alone: a user's, for torchrun's --node-rank
        return TORCHRUN
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        return OPEN_MPI
    # sbatch and salloc set SLURM_NTASKS for a script or a shell too, which is one process: only srun makes tasks
    step = os.environ.get("SLURM_STEP_ID", "")
    if step.isdecimal() and int(step) < RESERVED_STEPS and "SLURM_PROCID" in os.environ:
        return SLURM
    return TORCHRUN


def _read() -> Launch:
    """Raises ValueError for what is no number."""
    by = _launched_by()
    if by == SLURM:
        return _read_slurm()
    rank, size, local, local_size = (int(os.environ.get(n, d)) for n, d in zip(NAMES[by], "0101", strict=True))
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if by == TORCHRUN:
        return Launch(rank, size, local, local_size, TORCHRUN, address, port, os.environ.get("GROUP_RANK"))
    run = os.environ.get("PMIX_NAMESPACE") or os.environ.get("OMPI_MCA_orte_hnp_uri", "")  # noqa: SIM112 (Open MPI 5, 4)
    port = port or str(PORTS[zlib.crc32(run.encode()) % len(PORTS)])
    return Launch(rank, size, local, local_size, OPEN_MPI, address or LOOPBACK * (local_size == size), port)


def _read_slurm() -> Launch:
    """A task of a step. SLURM_NTASKS and the like may be the whole job's; the step's own count first."""

    def of_step(name: str) -> str:
        return os.environ.get(f"SLURM_STEP_{name}") or os.environ.get(f"SLURM_{name}", "")

    size = int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "1"))
    if size == 1:
        return Launch(by=SLURM)
    rank, local, node = (int(os.environ.get(f"SLURM_{name}", "")) for name in ("PROCID", "LOCALID", "NODEID"))
    per_node = tasks_per_node(of_step("TASKS_PER_NODE"))
    if not 0 <= node < len(per_node):
        raise ValueError(f"SLURM_NODEID {node}, and {len(per_node)} nodes")
    job = int(os.environ.get("SLURM_JOB_ID", "0"))
    port = PORTS[(10 * job + int(os.environ["SLURM_STEP_ID"])) % len(PORTS)]  # another one for each step
    address = LOOPBACK if per_node[node] == size else first_host(of_step("NODELIST"))
    return Launch(
        rank, size, local, per_node[node], SLURM, os.environ.get("MASTER_ADDR") or address,
        os.environ.get("MASTER_PORT") or str(port), str(node), int(os.environ.get("SLURM_CPUS_ON_NODE", "0")),
    )  # fmt: skip


def tasks_per_node(text: str) -> list[int]:
    """SLURM's short form, a number for each node: "4(x2),3" is 4, 4, 3. Raises ValueError."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ValueError(f"tasks of the nodes {text!r}")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def first_host(nodes: str) -> str:
    """The first of SLURM's short form: "a[01-04,07],b" is a01, a02, …; "r[1-2]n[1-8]" is r1n1, …"""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else "")
