"""check_network.py: on processes of this host, and on three hosts in network namespaces, one of them with a slow, a dead
or a wrong link (needs root, iproute2 and tc)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import two_hosts
from parallel import network_facts, network_report
from parallel.network import Findings, group_rounds, link_rounds
from parallel.network_probe import COLLECTIVES, Probe
from support import processes as launch

SCRIPT = launch.SCRIPT.parent / "check_network.py"
# other tests may have the cores: what is a hundred times slower is slow here
FLAGS = ("--device", "cpu", "--sizes", "16K", "256K", "--share", "0.05", "--timeout", "4", "--json")


def command(*flags: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *FLAGS, *map(str, flags)]


def together(ranks: list[subprocess.Popen[str]], seconds: float = 120) -> tuple[list[int], dict[str, Any], list[str]]:
    """The ranks' exit statuses, rank 0's report, and all lines of error. They end."""
    try:
        outputs = [rank.communicate(timeout=seconds) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    out, err = outputs[0][0], "".join(err for _, err in outputs)
    assert all(not silent for silent, _ in outputs[1:])
    return [rank.returncode for rank in ranks], json.loads(out) if out else {}, launch.errors(err) or err.splitlines()


def start(rank: int, size: int, port: int, *flags: object, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*flags), env=launch.rank_environment(rank, size, port) | more, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Without network namespaces
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.trust
def test_three_ranks_of_a_host(tmp_path: Path) -> None:
    """All that the engine uses is tried on all of them, and nothing is wrong."""
    (tmp_path / "config.json").write_text("{}")
    port = launch.free_port()
    statuses, report, _ = together([start(rank, 3, port, "--ckpt-path", tmp_path) for rank in range(3)])
    assert statuses == [0, 0, 0] and report["ok"] and report["problems"] == [], report["problems"]
    assert [link["ranks"] for link in report["links"]] == [[0, 1], [0, 2], [1, 2]]
    assert all(min(link["gb_s"]) > 0 and link["bytes"] == 256 << 10 for link in report["links"])
    assert [entry["collective"] for entry in report["collectives"]] == list(COLLECTIVES)
    assert all(
        entry["group"] == "world" and entry["ranks"] == [0, 1, 2] and entry["gb_s"] > 0
        for entry in report["collectives"]
    )
    assert {len(fact["checkpoint"]) for fact in report["ranks"]} == {2}


def test_ranks_that_differ(tmp_path: Path) -> None:
    """In a variable, and in what lies where the checkpoint should be; each is one line that names the rank."""
    for name, text in (("one", "{}"), ("two", '{"n": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    port = launch.free_port()
    checkpoints, algorithms = ("one", "one", "two"), ("Tree", "Ring", "Tree")
    statuses, report, _ = together([
        start(rank, 3, port, "--ckpt-path", tmp_path / checkpoints[rank], NCCL_ALGO=algorithms[rank]) for rank in range(3)
    ])  # fmt: skip
    host = os.uname().nodename
    assert statuses == [1, 1, 1]
    variable, config = sorted(report["problems"])
    assert variable == f"$NCCL_ALGO: Ring on rank 1 on {host}, Tree elsewhere"
    assert config.startswith("the checkpoint's config.json: ") and f" on rank 2 on {host}, " in config


def test_one_rank() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], env=launch.environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "nothing wrong; several ranks" in done.stdout, done.stderr
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=launch.environment(GLOO_SOCKET_IFNAME="nosuch"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "GLOO_SOCKET_IFNAME names the interface nosuch, and there are only " in done.stdout


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--sizes", "10"), "argument --sizes: '10' is not from 64 bytes to 4G"),
        (("--share", "2"), "argument --share: 2 is not between 0 and 1"),
        (("--expected", "450"), "argument --expected: expected 2 arguments"),
        (("--device", "cuda:99"), "--device cuda:99: there is none"),
    ],
)
def test_wrong_use(flags: tuple[str, ...], message: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *flags], env=launch.environment(), capture_output=True, text=True
    )
    [line] = launch.errors(done.stderr)
    assert done.returncode == 2 and message in line


def test_wrong_use_is_one_line_for_all_ranks() -> None:
    statuses, _, errors = together([start(rank, 2, 1, "--share", 2) for rank in range(2)])
    assert statuses == [2, 2] and len(errors) == 1


@pytest.mark.trust
def test_a_rank_that_never_comes() -> None:
    """Named by rank 0, in time."""
    port = launch.free_port()
    statuses, report, _ = together([start(rank, 3, port, "--timeout", 3) for rank in range(2)])
    assert statuses == [1, 1] and report["problems"] == ["rank 2 has not come"]


def test_a_rank_that_is_killed() -> None:
    """While the links are tried: rank 0 says which, and everybody ends."""
    port = launch.free_port()
    ranks = [start(rank, 3, port) for rank in range(3)]
    wait_until_it_tries_links(ranks[2])
    ranks[2].send_signal(signal.SIGKILL)
    statuses, report, _ = together(ranks)
    assert statuses[:2] == [1, 1]
    assert any(problem.startswith(f"rank 2 on {os.uname().nodename} was lost in ") for problem in report["problems"]), (
        report
    )


def wait_until_it_tries_links(rank: subprocess.Popen[str]) -> None:
    """It has threads of gloo's then."""
    until = time.monotonic() + 60
    while rank.poll() is None and time.monotonic() < until:
        names = [(task / "comm").read_text() for task in Path(f"/proc/{rank.pid}/task").glob("*")]
        if "gloo" in "".join(names):
            return
        time.sleep(0.02)


@pytest.mark.parametrize("counts", [(1, 1), (2, 2), (3, 1), (2, 2, 2), (1, 2, 3), (1, 1, 1, 1, 1), (8, 8)])
def test_rounds(counts: tuple[int, ...]) -> None:
    """Each pair of a host's ranks and of two hosts' same places once; a host has one link at a time."""
    first = [sum(counts[:i]) for i in range(len(counts))]
    hosts = [list(range(a, a + n)) for a, n in zip(first, counts, strict=True)]
    host_of = {rank: i for i, ranks in enumerate(hosts) for rank in ranks}
    expected = {pair for ranks in hosts for pair in combinations(ranks, 2)}
    expected |= {pair for a, b in combinations(hosts, 2) for pair in zip(a, b, strict=False)}
    rounds = list(link_rounds(hosts))
    tried = [ranks for tests in rounds for _, ranks in tests]
    assert len(tried) == len(set(tried)) and set(tried) == expected
    for tests in rounds:
        busy = [host for _, ranks in tests for host in {host_of[rank] for rank in ranks}]
        assert len(busy) == len(set(busy))
    groups = {ranks for tests in group_rounds(hosts) for _, ranks in tests}
    assert tuple(range(sum(counts))) in groups
    assert all(len(ranks) > 1 for ranks in groups) and {name for tests in group_rounds(hosts) for name, _ in tests} >= {
        f"world {name}" for name in network_report.CROSSING
    }


def fact(rank: int, host: str = "a", **more: Any) -> dict[str, Any]:
    return {
        "rank": rank, "host": host, "identity": host, "node": None, "pid": rank, "device": "cuda", "devices": {}, "infiniband": [],
        "interfaces": [], "versions": {"torch": "2.13"}, "gloo": {"interface": "eth0", "address": "10.0.0.1", "wrong": ""},
        "variables": {}, "checkpoint": {}, **more,
    }  # fmt: skip


def test_who_differs() -> None:
    odd = {"torch": "2.12"}
    assert network_facts.differences(
        [fact(i, versions=odd if i in (4, 5, 6) else {"torch": "2.13"}) for i in range(8)]
    ) == ["torch: 2.12 on ranks 4-6 on a, 2.13 elsewhere"]
    assert network_facts.differences([fact(0, variables={"NCCL_SOCKET_IFNAME": "a"}), fact(1)]) == []
    assert network_facts.differences([fact(0, variables={"NCCL_DEBUG": "INFO"}), fact(1), fact(2, "b")]) == [
        "$NCCL_DEBUG: INFO on rank 0 on a, not there elsewhere"
    ]
    ports = {"infiniband": ["mlx5_0/1 ACTIVE 200 Gb/sec"]}
    assert network_facts.differences([fact(0, **ports), fact(1, "b"), fact(2, **ports)]) == [
        "InfiniBand ports: none on rank 1 on b, mlx5_0/1 ACTIVE 200 Gb/sec elsewhere"
    ]


def test_loopback_between_hosts() -> None:
    """As where a host's name stands for 127.0.1.1 in /etc/hosts."""
    gloo = {"interface": "", "address": "127.0.1.1", "wrong": ""}
    assert network_facts.wrong_interfaces([fact(0, gloo=gloo), fact(1)]) == []
    assert network_facts.wrong_interfaces([fact(0), fact(1, "b", gloo=gloo)]) == [
        "rank 1 on b: the host's name has the address 127.0.1.1, where no other host reaches it: set GLOO_SOCKET_IFNAME"
    ]


def links_of(*rates: tuple[float, float]) -> Findings:
    """Links between hosts, each with GB/s there and back, between ranks of a host each."""
    pairs = list(combinations(range(5), 2))[: len(rates)]
    results = [
        (
            ("link", pair),
            {rank: {"seconds": 1e-5, "bytes": [1000], "sent": [1e-6 / r]} for rank, r in zip(pair, rate, strict=True)},
        )
        for pair, rate in zip(pairs, rates, strict=True)
    ]
    return Findings([fact(rank, f"h{rank}") for rank in range(5)], results)


def test_a_slow_direction_is_named() -> None:
    thresholds = network_report.Thresholds(0.5, {}, False)
    found = links_of((10, 10), (10, 4.9), (9, 11))
    assert thresholds.find_slow(found) == [("link", (0, 2))]
    report = network_report.report(found, thresholds, "gloo", 5)
    assert report["problems"] == [
        "rank 2 on h2 → rank 0 on h0 is slow: 4.9 GB/s, less than 50% of 10 GB/s, the median between hosts"
    ]
    assert report["slowest"]["between hosts"]["ranks"] == [2, 0]
    found.results += links_of((10, 10), (10, 9)).results[1:]
    assert network_report.report(found, thresholds, "gloo", 5)["ok"], "it was not slow when it was tried again"


def test_less_than_expected() -> None:
    found = links_of((10, 10), (10, 10))
    expected = {network_report.BETWEEN: 50.0}
    shown = network_report.report(found, network_report.Thresholds(0.5, expected, False), "NCCL", 5)
    assert shown["ok"] and "links between hosts, 50 GB/s expected" in "\n".join(network_report.lines(shown))
    report = network_report.report(found, network_report.Thresholds(0.5, expected, True), "NCCL", 5)
    assert len(report["problems"]) == 4 and not report["ok"]
    assert report["problems"][0].endswith("is slow: 10 GB/s, less than 50% of the 50 GB/s expected between hosts")


def test_wrong_numbers_are_named() -> None:
    found = links_of((10, 10))
    found.results[0][1][1]["wrong"] = "16 bytes from rank 0 to rank 1 came changed"
    found.results.append(
        (
            ("world all_reduce", (0, 1)),
            {0: {"error": "Connection closed"}, 1: {"wrong": "all_reduce gave wrong numbers"}},
        )
    )
    problems = network_report.report(found, network_report.Thresholds(0.5, {}, False), "gloo", 5)["problems"]
    assert problems[0].startswith(
        "rank 0 on h0 ↔ rank 1 on h1: 16 bytes from rank 0 to rank 1 came changed (gloo: rank 0 at eth0"
    )
    assert problems[1:] == [
        "all_reduce of ranks 0-1: rank 0 on h0: Connection closed",
        "all_reduce of ranks 0-1: rank 1 on h1: all_reduce gave wrong numbers",
    ]


class Idle:
    """A group whose collectives do nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self


@pytest.mark.parametrize("what", COLLECTIVES)
def test_what_arrives_is_looked_at(what: str) -> None:
    probe = Probe(1, dist.HashStore(), torch.device("cpu"), [64], 5.0)
    probe.store.set("t 8", "1")
    probe.store.set("t 8 go on", "0")
    result = probe.collective("t", Idle(), (0, 1), what)
    assert result["wrong"] == f"{what} of {4 if what == 'all_gather' else 8} bytes gave wrong numbers on rank 1"


# --------------------------------------------------------------------------------------------------------------------
# Three hosts in network namespaces
# --------------------------------------------------------------------------------------------------------------------

namespaces = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("tc") is None,
    reason="needs root and iproute2 (Linux)",
)


@pytest.fixture
def hosts() -> Iterator[two_hosts.Hosts]:
    try:
        with two_hosts.Hosts(3) as hosts:
            yield hosts
    except two_hosts.Unavailable as e:
        pytest.skip(str(e))


def on_hosts(hosts: two_hosts.Hosts, *flags: object, **of_third: str) -> list[subprocess.Popen[str]]:
    """A rank a host, with more variables on the third."""
    return [
        hosts.start(
            i, command(*flags),
            environment=launch.rank_environment(i, 3, 29555) | {
                "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(i), "MASTER_ADDR": hosts.address(0),
            } | (of_third if i == 2 else {}),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(3)
    ]  # fmt: skip


def named(i: int) -> str:
    return f"rank {i} on {os.uname().nodename}#{i}"


@namespaces
def test_a_slow_link(hosts: two_hosts.Hosts) -> None:
    """What the third host sends is slow, and what it receives is not."""
    try:
        hosts.slow_down(2, "20mbit")
    except two_hosts.Unavailable as e:
        pytest.skip(str(e))
    statuses, report, _ = together(on_hosts(hosts))
    assert statuses == [1, 1, 1]
    assert sorted(problem.partition(":")[0] for problem in report["problems"]) == [
        f"{named(2)} → {named(0)} is slow", f"{named(2)} → {named(1)} is slow",
    ]  # fmt: skip
    assert report["slowest"]["between hosts"]["ranks"][0] == 2
    assert report["slowest"]["between hosts"]["gb_s"] < 0.02


@namespaces
@pytest.mark.parametrize(
    "interface", [pytest.param("nosuch", marks=pytest.mark.trust), pytest.param("lo", marks=pytest.mark.trust), "other"]
)
def test_a_wrong_interface(hosts: two_hosts.Hosts, interface: str) -> None:
    """One that is not there, the loopback, and one in a network that the others have no way to."""
    two_hosts.ip("-n", hosts.names[2], "link", "add", "name", "other", "type", "veth", "peer", "name", "unused")
    two_hosts.ip("-n", hosts.names[2], "address", "add", "10.1.0.1/24", "dev", "other")
    for end in ("other", "unused"):
        two_hosts.ip("-n", hosts.names[2], "link", "set", end, "up")
    began = time.monotonic()
    statuses, report, _ = together(on_hosts(hosts, GLOO_SOCKET_IFNAME=interface))
    assert statuses == [1, 1, 1]
    dead = [problem.partition(": ")[0] for problem in report["problems"] if "↔" in problem]
    # of two ranks the one with the higher address connects to the other's, so that from the loopback it may work
    assert interface == "lo" or sorted(dead) == [f"{named(0)} ↔ {named(2)}", f"{named(1)} ↔ {named(2)}"]
    why = {
        "nosuch": f"{named(2)}: GLOO_SOCKET_IFNAME names the interface nosuch, and there are only cable, lo, other, unused",
        "lo": f"{named(2)}: interface lo has the address 127.0.0.1, where no other host reaches it: set GLOO_SOCKET_IFNAME",
    }
    others = [problem for problem in report["problems"] if "↔" not in problem]
    assert others == ([why[interface]] if interface in why else [])
    assert all("rank 2 at other 10.1.0.1" in problem for problem in report["problems"]) or interface != "other"
    assert {tuple(test["ranks"]) for test in report["skipped"]} == ({(0, 1, 2)} if dead else set())
    assert time.monotonic() - began < 60


@namespaces
@pytest.mark.parametrize(
    "between", [pytest.param((0, 2), marks=pytest.mark.trust, id="of_rank_0"), pytest.param((1, 2), id="of_others")]
)
def test_a_dead_link(hosts: two_hosts.Hosts, between: tuple[int, int]) -> None:
    """Two hosts do not hear each other. Where rank 0's is one of them, the other is lost with it."""
    a, b = between
    two_hosts.ip("-n", hosts.names[a], "route", "add", "blackhole", f"{hosts.address(b)}/32")
    statuses, report, errors = together(on_hosts(hosts))
    if a == 0:
        assert statuses == [1, 1, 1] and report["problems"] == ["rank 2 has not come"], report
        assert any(
            line.startswith(f"error: rank 2 on {os.uname().nodename} cannot reach rank 0 at MASTER_ADDR")
            for line in errors
        )
        return
    assert statuses == [1, 1, 1]
    [problem] = report["problems"]
    assert problem.startswith(f"{named(1)} ↔ {named(2)}: ")


@pytest.mark.trust
@namespaces
def test_a_cable_cut_in_the_middle(hosts: two_hosts.Hosts, tmp_path: Path) -> None:
    """While a long run of sends goes on: all ranks end, and rank 0 names the lost one."""
    ranks = on_hosts(hosts, "--sizes", "16K", "64M", "--timeout", 3)
    wait_until_it_tries_links(ranks[2])
    hosts.cut(2)
    statuses, report, errors = together(ranks)
    assert statuses == [1, 1, 1]
    assert any(problem.startswith(f"{named(2)} was lost in ") for problem in report["problems"]), report["problems"]
    assert any(f"rank 2 on {os.uname().nodename} lost contact with rank 0" in line for line in errors), errors
