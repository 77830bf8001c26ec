"""How ranks find each other, and what of its host each of them may use."""

import datetime
import os
import socket
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from core import devices
from core.errors import UserError
from parallel import launcher
from parallel.failure import RankProcess
from parallel.group import MAX_PARTIAL_SUMS, SOLO, Group, OneShot

JOINING_LIMIT = 600.0  # seconds for all ranks to come up; a later one may have torch to import from a slow disk


def environment() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local world size) as torchrun, srun or mpirun set them; (0, 1, 0, 1) without them.

    Raises UserError as `launcher.find` does.
    """
    launch = launcher.find()
    return launch.rank, launch.size, launch.local_rank, launch.local_size


def join(timeout: float) -> Group:
    """Joins the ranks that were started with this one, with gloo, for tensors on CPUs; `on` follows for other devices.

    A rank that waits `timeout` seconds for another gives the run up. Ranks of one host keep to its loopback interface
    unless GLOO_SOCKET_IFNAME names another. Raises UserError and RankFailure.
    """
    launch = launcher.find()
    rank, size = launch.rank, launch.size
    if size == 1:
        return SOLO
    keep_to_loopback(launch)
    with RankProcess(rank, size).translate_collective_errors("could not join the others"):
        wait = datetime.timedelta(seconds=max(timeout, JOINING_LIMIT))
        store = open_store(launch, wait)
        store.set(f"process of rank {rank}", f"{os.getpid()} {host_identity()}")
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
        pg = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
        places = [store.get(f"process of rank {other}").decode().partition(" ") for other in range(size)]
    neighbours = tuple((other, int(pid)) for other, (pid, _, host) in enumerate(places) if host == host_identity())
    return Group(rank, size, pg, pg, timeout, process=RankProcess(rank, size, neighbours, store))


def keep_to_loopback(launch: launcher.Launch) -> None:
    """Has gloo listen on the loopback interface alone where all ranks are on one host, unless an interface is named."""
    loopback = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
    if launch.local_size == launch.size and loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback.pop())  # gloo takes it from there and nowhere else


def open_store(launch: launcher.Launch, wait: datetime.timedelta) -> Any:
    """The store at MASTER_ADDR: torchrun's own, which listens on all interfaces; without torchrun rank 0 keeps it, on
    that address alone."""
    host, port, size = launch.address, launch.port, launch.size
    if not host or not port.isdecimal():
        raise UserError(f"{size} ranks, but MASTER_ADDR is {host!r} and MASTER_PORT {port!r}: start with torchrun")
    listener = None
    if launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        try:
            family, *_, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
            listener = socket.create_server(address[:2], family=family, backlog=size).detach()
        except (OSError, OverflowError) as e:
            raise UserError(f"MASTER_ADDR {host}, MASTER_PORT {port}: {getattr(e, 'strerror', None) or e}") from None
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, int(port), size, is_master=listener is not None, timeout=wait, wait_for_workers=False,
        master_listen_fd=listener,
    )  # fmt: skip


def host_identity() -> str:
    """The same text on ranks that can see each other's processes and belong to one host's launcher."""
    try:
        processes = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        processes = 0
    return f"{socket.gethostname()} {processes} {launcher.find().node}"


def on(device: torch.device, group: Group) -> Group:
    """The same ranks with tensors on `device`: over the collectives that torch has for it (NCCL for GPUs), or through
    the host's where it has none. Every rank calls it with its own."""
    if group.size == 1 or device.type == "cpu":
        return group
    _require_own_gpu(device, group)
    backend = collectives_of(device)
    if backend is None:
        return replace(group, through_host=True)
    with group.process.translate_collective_errors():
        wait = datetime.timedelta(seconds=group.timeout)
        group = replace(group, pg=dist.new_group(backend=backend, timeout=wait, device_id=device))
    return _with_one_shot(group, device)


def lanes(world: Group, n: int, device: torch.device) -> tuple[Group, Group]:
    """This rank's lane, of the n that the ranks of `world` make, and the ranks that have its place in the others: for
    data-parallel lanes, and for the stages of a pipeline. n divides the ranks.

    Lanes are neighbouring ranks, so that they share a host. `world` is one that `on` made for `device`. Every rank
    calls it with the same n.
    """
    if n == 1:
        return world, replace(SOLO, process=world.process)
    size = world.size // n
    row = _subgroup(world, [tuple(range(i, i + size)) for i in range(0, world.size, size)], device)
    return row, _subgroup(world, [tuple(range(i, world.size, size)) for i in range(size)], device)


def _subgroup(world: Group, partition: Sequence[tuple[int, ...]], device: torch.device) -> Group:
    """The group of this rank among those of `partition`; torch wants every rank to make all of them."""
    mine = next(members for members in partition if world.rank in members)
    place: dict[str, Any] = {"rank": mine.index(world.rank), "size": len(mine), "members": mine}
    if len(mine) == 1:  # so are the others
        return replace(world, **place, pg=None, control=None, one_shot=None, through_host=False)
    if len(mine) == world.size:
        return replace(world, members=mine)
    wait = datetime.timedelta(seconds=world.timeout)
    backend = collectives_of(device)  # None for a CPU: its are those of control
    made = {}
    with world.process.translate_collective_errors("could not join the others"):
        for members in partition:
            control = dist.new_group(list(members), timeout=wait, backend="gloo")
            pg = dist.new_group(list(members), timeout=wait, backend=backend, device_id=device) if backend else control
            made[members] = pg, control
    pg, control = made[mine]
    group = replace(world, **place, pg=pg, control=control, one_shot=None, partial_sums=deque(maxlen=MAX_PARTIAL_SUMS))
    return _with_one_shot(group, device)


def _with_one_shot(group: Group, device: torch.device) -> Group:
    """The group with one-shot sums, if its GPUs are on one host and have them. Every rank of it calls it."""
    neighbours = {rank for rank, _ in group.process.neighbours}
    if device.type != "cuda" or not neighbours.issuperset(group.members or range(group.size)):
        return group
    return replace(group, one_shot=OneShot.create(group, device))


def _require_own_gpu(device: torch.device, group: Group) -> None:
    """Raises UserError on all ranks if two have the same GPU. Where a launcher shows each rank one GPU, that may be its
    own or everybody's, and only UUIDs tell; a device without one passes."""
    if not launcher.find().may_divide_devices:
        return
    uuid = devices.uuid(device)
    seen = group.gather_ints(torch.tensor(zlib.crc32(uuid.encode()) if uuid else -1 - group.rank)).tolist()
    same = [rank for rank, other in enumerate(seen) if seen.count(other) > 1]
    if same:
        ranks = ", ".join(map(str, same))
        raise UserError(f"ranks {ranks} were given the same GPU: each needs its own (srun --gpus-per-task 1)")


def collectives_of(device: torch.device) -> str | None:
    """The library whose collectives torch has for a device: "nccl", "xccl", "hccl", …; None where it has gloo's or none
    at all, as for MPS."""
    try:
        backend = dist.get_default_backend_for_device(device)
    except ValueError:
        return None
    return backend if backend not in ("gloo", "fake") and dist.is_backend_available(backend) else None


def choose_threads(asked: int | None, local_size: int) -> int:
    """CPU threads of this rank: as asked, else the cores over the ranks of this host. Raises UserError for more than
    the host has cores.

    torchrun sets OMP_NUM_THREADS=1 for several ranks a host, which would leave the other cores idle.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if asked is not None and asked > (most := max(cores, os.cpu_count() or 1)):
        raise UserError(f"--threads is {asked}, this host has {most} cores")
    if cores < launcher.find().host_cores:
        local_size = 1  # srun has bound this rank to cores of its own
    threads = asked or max(1, cores // local_size)
    torch.set_num_threads(threads)
    return threads


def choose_device(name: str, local_rank: int, local_size: int) -> torch.device:
    """This rank's device: of the kind named, the one with its number on this host, or the only one that a launcher
    shows it; "auto" is a GPU if there is one, else the CPU. Raises UserError for what is not here, and where there are
    more ranks than devices."""
    if name == "auto":
        name = "cuda" if devices.count("cuda") else "cpu"
    device = devices.parse(name)
    if device.type == "cpu":
        return devices.CPU
    if device.index is not None and local_size > 1:
        raise UserError(f"--device {name} is one device, and there are {local_size} ranks: --device {device.type}")
    n = devices.count(device.type)
    if n == 1 and local_size > 1 and launcher.find().may_divide_devices:
        local_rank = 0  # the launcher shows each rank its own device alone; `on` makes sure of that
    elif local_size > n:
        what = "GPU" if device.type == "cuda" else f"{device.type} device"
        raise UserError(f"{local_size} ranks on a host with {n} {what}{'s' * (n > 1)}: start as many, or --device cpu")
    device = torch.device(device.type, local_rank if device.index is None else device.index)
    devices.make_current(device)
    return device
