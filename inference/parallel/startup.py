"""How ranks find each other, and what of its host each of them may use."""

import datetime
import os
import socket
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from core import devices
from core.errors import UserError
from parallel.failure import RankProcess
from parallel.group import SOLO, Group, OneShot

JOINING_LIMIT = 600.0  # seconds for all ranks to come up; a later one may have torch to import from a slow disk


def environment() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local world size) as torchrun set them; (0, 1, 0, 1) without it.

    Raises UserError for values that are no such numbers.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    try:
        rank, size, local, local_size = (int(os.environ.get(n, d)) for n, d in zip(names, "0101", strict=True))
    except ValueError as e:
        raise UserError(f"torchrun's environment ({', '.join(names)}) is not made of numbers: {e}") from None
    if not 0 <= rank < size:
        raise UserError(f"RANK is {rank} but WORLD_SIZE is {size}")
    return rank, size, local, local_size


def join(timeout: float) -> Group:
    """Joins the ranks that torchrun started, with gloo, for tensors on CPUs; `on` follows for other devices.

    A rank that waits `timeout` seconds for another gives the run up. Ranks of one host keep to its loopback interface
    unless GLOO_SOCKET_IFNAME names another. Raises UserError and RankFailure.
    """
    rank, size, _, local_size = environment()
    if size == 1:
        return SOLO
    loopback = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
    if local_size == size and loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback.pop())  # gloo takes it from there and nowhere else
    with RankProcess(rank, size).translate_collective_errors("could not join the others"):
        wait = datetime.timedelta(seconds=max(timeout, JOINING_LIMIT))
        store = _open_store(rank, size, wait)
        store.set(f"process of rank {rank}", f"{os.getpid()} {_host()}")
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
        pg = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
        places = [store.get(f"process of rank {other}").decode().partition(" ") for other in range(size)]
    neighbours = tuple((other, int(pid)) for other, (pid, _, host) in enumerate(places) if host == _host())
    return Group(rank, size, pg, pg, timeout, process=RankProcess(rank, size, neighbours, store))


def _open_store(rank: int, size: int, wait: datetime.timedelta) -> Any:
    """The store at MASTER_ADDR: torchrun's own, which listens on all interfaces; without torchrun rank 0 keeps it, on
    that address alone."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        raise UserError(f"{size} ranks, but MASTER_ADDR is {host!r} and MASTER_PORT {port!r}: start with torchrun")
    listener = None
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        try:
            family, *_, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
            listener = socket.create_server(address[:2], family=family, backlog=size).detach()
        except OSError as e:
            raise UserError(f"MASTER_ADDR {host}, MASTER_PORT {port}: {e.strerror or e}") from None
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, int(port), size, is_master=listener is not None, timeout=wait, wait_for_workers=False,
        master_listen_fd=listener,
    )  # fmt: skip


def _host() -> str:
    """The same text on ranks that can see each other's processes and belong to one torchrun."""
    try:
        processes = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        processes = 0
    return f"{socket.gethostname()} {processes} {os.environ.get('GROUP_RANK')}"


def on(device: torch.device, group: Group) -> Group:
    """The same ranks with tensors on `device`: over the collectives that torch has for it (NCCL for GPUs), or through
    the host's where it has none. Every rank calls it with its own."""
    if group.size == 1 or device.type == "cpu":
        return group
    backend = collectives_of(device)
    if backend is None:
        return replace(group, through_host=True)
    with group.process.translate_collective_errors():
        wait = datetime.timedelta(seconds=group.timeout)
        group = replace(group, pg=dist.new_group(backend=backend, timeout=wait, device_id=device))
    if device.type != "cuda" or len(group.process.neighbours) < group.size:
        return group
    one_shot = OneShot.create(group, device)
    return replace(group, one_shot=one_shot) if group.min_int(int(one_shot is not None)) else group


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
    threads = asked or max(1, cores // local_size)
    torch.set_num_threads(threads)
    return threads


def choose_device(name: str, local_rank: int, local_size: int) -> torch.device:
    """This rank's device: of the kind named, the one with its number on this host; "auto" is a GPU if there is one,
    else the CPU. Raises UserError for what is not here, and where there are more ranks than devices."""
    if name == "auto":
        name = "cuda" if devices.count("cuda") else "cpu"
    device = devices.parse(name)
    if device.type == "cpu":
        return devices.CPU
    if device.index is not None and local_size > 1:
        raise UserError(f"--device {name} is one device, and there are {local_size} ranks: --device {device.type}")
    if local_size > (n := devices.count(device.type)):
        what = "GPU" if device.type == "cuda" else f"{device.type} device"
        raise UserError(f"{local_size} ranks on a host with {n} {what}{'s' * (n > 1)}: start as many, or --device cpu")
    device = torch.device(device.type, local_rank if device.index is None else device.index)
    devices.make_current(device)
    return device
