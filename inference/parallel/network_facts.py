"""What one rank sees of its host and programs, and who of all ranks differs: for check_network.py."""

import contextlib
import hashlib
import os
import platform
import re
import socket
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from core import PROGRAM_VERSION, devices
from core.errors import UserError
from core.files import require_folder
from parallel import startup
from parallel.launcher import Launch

VARIABLES = ("NCCL_", "TORCH_NCCL_", "GLOO_")  # how the names of those begin that say how ranks talk
OURS = "TORCH_NCCL_ASYNC_ERROR_HANDLING"  # torchrun and this program set it
OF_A_HOST = re.compile(r"_(IFNAME|HCA|CROSS_NIC|TOPO_FILE|LOCAL_RANK)$")  # variables whose values hosts may differ in
SIOCGIFADDR = 0x8915  # Linux, netdevice(7)
HEADER_LENGTH = 8  # bytes: a safetensors file begins with its header's length


def collect(launch: Launch, device: torch.device, checkpoint: Path | None) -> dict[str, Any]:
    """Facts about this rank, as plain data."""
    return {
        "rank": launch.rank,
        "local_rank": launch.local_rank,
        "host": socket.gethostname(),
        "identity": startup.host_identity(),
        "node": launch.node,
        "pid": os.getpid(),
        "device": device.type,
        "versions": versions(),
        "devices": {} if device.type == "cpu" else {device.type: device_names(device)},
        "interfaces": interfaces(),
        "infiniband": infiniband(),
        "gloo": gloo_address(),
        "variables": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES) and name != OURS
        },
        "checkpoint": {} if checkpoint is None else checkpoint_hashes(checkpoint),
    }


def versions() -> dict[str, str]:
    found = {"Python": platform.python_version(), "torch": torch.__version__, "this program": PROGRAM_VERSION}
    with contextlib.suppress(Exception):  # a build of torch without it
        from torch.cuda import nccl

        version = nccl.version()
        found["NCCL"] = ".".join(map(str, version)) if isinstance(version, tuple) else str(version)
    if driver := re.search(r"(?:Module|for \S+)\s+(\d+\.[\d.]+)", read("/proc/driver/nvidia/version")):
        found["NVIDIA driver"] = driver[1]
    return found


def device_names(device: torch.device) -> list[str]:
    return [devices.name(torch.device(device.type, i)) for i in range(devices.count(device.type))]


def read(path: str | Path) -> str:
    """A file of the kernel's, without the end of its line; empty where there is none or it has no value."""
    try:
        return Path(path).read_text().strip()
    except (OSError, ValueError):
        return ""


def interfaces() -> list[dict[str, Any]]:
    """Network interfaces by /sys/class/net: name, state, speed in Gb/s (0 where it has none), MTU in bytes, address."""
    found = []
    for _, name in socket.if_nameindex():
        folder = Path("/sys/class/net", name)
        speed = read(folder / "speed")
        found.append({
            "name": name, "state": read(folder / "operstate"), "mtu": int(read(folder / "mtu") or 0),
            "speed": int(speed) / 1e3 if speed.isdecimal() else 0, "address": address(name),
        })  # fmt: skip
    return found


def address(interface: str) -> str:
    """Its IPv4 address; empty without one, and on hosts that are no Linux."""
    with contextlib.suppress(Exception), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        import fcntl

        reply = fcntl.ioctl(s, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(reply[20:24])
    return ""


def infiniband() -> list[str]:
    """Ports by /sys/class/infiniband, such as "mlx5_0/1 ACTIVE 400 Gb/sec (4X NDR)"."""
    ports = sorted(Path("/sys/class/infiniband").glob("*/ports/*"))
    return [f"{p.parts[-3]}/{p.name} {read(p / 'state').partition(': ')[2]} {read(p / 'rate')}".strip() for p in ports]


def gloo_address() -> dict[str, str]:
    """The interface that gloo listens on, as it chooses it, with its address, and what is wrong with that."""
    here = {name for _, name in socket.if_nameindex()}
    if named := os.environ.get("GLOO_SOCKET_IFNAME", ""):
        missing = [name for name in named.split(",") if name not in here]
        where = ",".join(address(name) for name in named.split(",") if name in here)
        down = [name for name in named.split(",") if read(f"/sys/class/net/{name}/operstate") == "down"]
        wrong = f"GLOO_SOCKET_IFNAME names the interface {', '.join(down)}, which is down" if down else ""
        if missing:
            there = ", ".join(sorted(here))
            wrong = f"GLOO_SOCKET_IFNAME names the interface {', '.join(missing)}, and there are only {there}"
        return {"interface": named, "address": where, "wrong": wrong}
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)[0][4][0]
        return {"interface": "", "address": str(found), "wrong": ""}
    except OSError:
        return {"interface": "", "address": "", "wrong": "the host's name has no address: set GLOO_SOCKET_IFNAME"}


def checkpoint_hashes(folder: Path) -> dict[str, str]:
    """Hashes of the config and of all tensors' headers with the sizes of their files, or what is in their place."""
    try:
        require_folder(folder)
    except UserError as e:
        return {"config.json": str(e), "headers": str(e)}
    config = folder / "config.json"
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    try:
        for path in files:
            with open(path, "rb") as f:
                length = f.read(HEADER_LENGTH)
                header = f.read(min(int.from_bytes(length, "little"), 1 << 28))
                digest.update(f"{path.name} {os.fstat(f.fileno()).st_size}\n".encode() + header)
        said = hashlib.sha256(config.read_bytes()).hexdigest()[:16] if config.is_file() else "none"
    except OSError as e:
        return {"config.json": str(e), "headers": str(e)}
    return {"config.json": said, "headers": f"{len(files)} files {digest.hexdigest()[:16]}"}


# --------------------------------------------------------------------------------------------------------------------
# Of all ranks
# --------------------------------------------------------------------------------------------------------------------


def group_by_host(facts: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Ranks by the host they run on, in rank order; ranks of one host see each other's processes."""
    hosts: dict[str, list[int]] = {}
    for fact in facts:
        hosts.setdefault(fact["identity"], []).append(fact["rank"])
    return list(hosts.values())


def host_names(facts: Sequence[dict[str, Any]]) -> list[str]:
    """For each rank its host's name, with the node's number where several hosts have the same name."""
    names = Counter(name for name, _ in {(fact["host"], fact["identity"]) for fact in facts})
    hosts = [fact["identity"] for fact in facts]
    order = list(dict.fromkeys(hosts))
    return [
        fact["host"] if names[fact["host"]] == 1 else f"{fact['host']}#{fact['node'] or order.index(fact['identity'])}"
        for fact in facts
    ]


def comparable(fact: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, value) of what must be the same on all ranks."""
    yield from fact["versions"].items()
    yield "kind of device", fact["device"]
    for kind, names in fact["devices"].items():
        yield f"{kind} devices", ", ".join(f"{n} x {name}" for name, n in Counter(names).items())
    yield "InfiniBand ports", ", ".join(fact["infiniband"]) or "none"
    yield from ((f"${name}", value) for name, value in fact["variables"].items() if not OF_A_HOST.search(name))
    yield from ((f"the checkpoint's {name}", value) for name, value in fact["checkpoint"].items())


def differences(facts: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each thing that is not the same on all ranks, with the ranks in the minority."""
    names = host_names(facts)
    values: dict[str, dict[int, str]] = {}
    for i, fact in enumerate(facts):
        for name, value in comparable(fact):
            values.setdefault(name, dict.fromkeys(range(len(facts)), "not there"))[i] = value
    lines = []
    for name, by_rank in values.items():
        most = Counter(by_rank.values()).most_common(1)[0][0]  # of equally many the first rank's
        groups: dict[str, list[int]] = {}
        for i, value in by_rank.items():
            if value != most:
                groups.setdefault(value, []).append(i)
        for value, odd in groups.items():
            lines.append(f"{name}: {value} on {describe_ranks(facts, names, odd)}, {most} elsewhere")
    return lines


def describe_ranks(facts: Sequence[dict[str, Any]], names: Sequence[str], indices: Sequence[int]) -> str:
    """Such as "rank 3 on host b" or "ranks 8-15 on host b"."""
    by_host: dict[str, list[int]] = {}
    for i in indices:
        by_host.setdefault(names[i], []).append(facts[i]["rank"])
    return " and ".join(f"rank{'s' * (len(r) > 1)} {spans(r)} on {host}" for host, r in by_host.items())


def spans(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as "0-2,5"."""
    found: list[list[int]] = []
    for n in sorted(numbers):
        if found and n == found[-1][1] + 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def wrong_interfaces(facts: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each rank whose gloo cannot be reached, as far as its own host can tell."""
    names, lines = host_names(facts), []
    several = len(group_by_host(facts)) > 1
    for fact, name in zip(facts, names, strict=True):
        gloo, wrong = fact["gloo"], fact["gloo"]["wrong"]
        if several and not wrong and gloo["address"].startswith("127."):
            by = f"interface {gloo['interface']}" if gloo["interface"] else "the host's name"
            wrong = f"{by} has the address {gloo['address']}, where no other host reaches it: set GLOO_SOCKET_IFNAME"
        if wrong:
            lines.append(f"rank {fact['rank']} on {name}: {wrong}")
    return lines
