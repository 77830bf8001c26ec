"""What is wrong with a network, by what network.py found, as lines for people and as plain data."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from parallel import network_facts
from parallel.network import Findings
from parallel.network_probe import Test

NODE, BETWEEN = "within a host", "between hosts"
SHOWN = 16  # links of a kind in the text, slowest first; --json has all
# Bytes that cross the slowest link, over the bytes of the buffer: what nccl-tests calls bus bandwidth
# (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md), which can be compared with the link's own whatever the ranks
CROSSING: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1.0,
}


@dataclass(frozen=True)
class Thresholds:
    """What counts as slow."""

    share: float  # of the median of links of its kind, and of what is expected
    expected: dict[str, float]  # GB/s by kind of link; empty where nothing is expected
    is_demanded: bool  # whether less than the share of it is wrong, or it is only shown

    def find_slow(self, found: Findings) -> list[Test]:
        """Links to be tried again, before they are called slow."""
        slow = {tuple(way["ranks"]) for way, _ in self.slow_ways(links(found))}
        return [test for test, _ in found.results if "link" in test[0] and (test[1] in slow or test[1][::-1] in slow)]

    def slow_ways(self, links: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
        """One direction of a link, and why it is slow."""
        for kind in (NODE, BETWEEN):
            ways = directions(links, kind)
            if not ways:
                continue
            middle = median(way["gb_s"] for way in ways)
            for way in ways:
                expected = self.expected.get(kind, 0.0) * self.is_demanded
                if way["gb_s"] < self.share * middle:
                    yield way, f"less than {self.share:.0%} of {rate(middle)}, the median {kind}"
                elif way["gb_s"] < self.share * expected:
                    yield way, f"less than {self.share:.0%} of the {rate(expected)} expected {kind}"


def directions(links: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Both ways of each link that was timed, slowest first."""
    ways = [
        {"ranks": link["ranks"][::step], "gb_s": gb_s}
        for link in links if link["kind"] == kind and "gb_s" in link
        for step, gb_s in zip((1, -1), link["gb_s"], strict=True)
    ]  # fmt: skip
    return sorted(ways, key=lambda way: way["gb_s"])


def links(found: Findings) -> list[dict[str, Any]]:
    """Each link once: latency in µs and GB/s there and back, the better of two tries, or the ranks' errors."""
    by_ranks: dict[tuple[int, ...], dict[str, Any]] = {}
    for (name, ranks), results in found.results:
        if "link" not in name:
            continue
        entry: dict[str, Any] = {"kind": NODE if name == "node link" else BETWEEN, "ranks": list(ranks)}
        wrong = errors_by_rank(results)
        wrong |= dict.fromkeys(set(ranks) - set(results), "no answer")
        if wrong:
            entry["errors"] = {str(rank): wrong[rank] for rank in sorted(wrong)}
        if all("sent" in results.get(rank, ()) for rank in ranks):
            entry["latency_us"] = min(results[rank]["seconds"] for rank in ranks) * 1e6
            entry["bytes"] = results[ranks[0]]["bytes"][-1]
            entry["gb_s"] = [entry["bytes"] / results[rank]["sent"][-1] / 1e9 for rank in ranks]
        before = by_ranks.get(ranks)
        if before and "gb_s" in before and "gb_s" in entry:
            entry["latency_us"] = min(entry["latency_us"], before["latency_us"])
            entry["gb_s"] = [max(pair) for pair in zip(entry["gb_s"], before["gb_s"], strict=True)]
        by_ranks[ranks] = {**entry, **({"errors": before["errors"]} if before and "errors" in before else {})}
    return list(by_ranks.values())


def errors_by_rank(results: dict[int, dict[str, Any]]) -> dict[int, str]:
    """What went wrong on each rank of a test, of those on which something did."""
    errors = {rank: result.get("error") or result.get("wrong") for rank, result in results.items()}
    return {rank: text for rank, text in errors.items() if text}


def collectives(found: Findings, hosts: Sequence[Sequence[int]], thresholds: Thresholds) -> list[dict[str, Any]]:
    """Each group's collectives: µs of the smallest size, GB/s of the largest by its slowest rank, or errors."""
    entries = []
    for (name, ranks), results in found.results:
        if "link" in name:
            continue
        group, what = name.split()
        kind = NODE if any(set(ranks) <= set(host) for host in hosts) else BETWEEN
        entry: dict[str, Any] = {"group": group, "ranks": list(ranks), "collective": what}
        wrong = errors_by_rank(results)
        if wrong:
            entry["errors"] = {str(rank): wrong[rank] for rank in sorted(wrong)}
        if len(results) == len(ranks) and all("seconds" in r for r in results.values()):
            seconds = [max(times) for times in zip(*(r["seconds"] for r in results.values()), strict=True)]
            entry["latency_us"] = seconds[0] * 1e6
            entry["bytes"] = results[ranks[0]]["bytes"][-1]
            entry["seconds"] = seconds[-1]
            entry["gb_s"] = entry["bytes"] * CROSSING[what](len(ranks)) / seconds[-1] / 1e9
        if kind in thresholds.expected and group != "gloo":
            entry["expected_gb_s"] = thresholds.expected[kind]
        entries.append(entry)
    return entries


def report(found: Findings, thresholds: Thresholds, backend: str, size: int) -> dict[str, Any]:
    """All of it as plain data: "problems" are lines, "ok" says that there are none."""
    facts = found.facts
    hosts = network_facts.group_by_host(facts)
    names = dict(zip((fact["rank"] for fact in facts), network_facts.host_names(facts), strict=True))

    def who(rank: int) -> str:
        return f"rank {rank} on {names[rank]}" if rank in names else f"rank {rank}"

    all_links = links(found)
    problems = [*network_facts.differences(facts), *network_facts.wrong_interfaces(facts)]
    for link in all_links:
        if "errors" in link:
            a, b = link["ranks"]
            said = dict.fromkeys(link["errors"].values())
            listening = ", ".join(f"rank {rank} at {gloo_of(facts, rank)}" for rank in (a, b))
            problems.append(f"{who(a)} ↔ {who(b)}: {'; '.join(said)} (gloo: {listening})")
    for way, why in thresholds.slow_ways(all_links):
        a, b = way["ranks"]
        problems.append(f"{who(a)} → {who(b)} is slow: {rate(way['gb_s'])}, {why}")
    all_collectives = collectives(found, hosts, thresholds)
    for entry in all_collectives:
        what = f"{entry['collective']} of ranks {network_facts.spans(entry['ranks'])}"
        problems += [f"{what}: {who(int(rank))}: {text}" for rank, text in entry.get("errors", {}).items()]
    for rank, stage in found.lost.items():
        problems.append(f"{who(rank)} has not come" if stage == "the start" else f"{who(rank)} was lost in {stage}")
    slowest = {kind: ways[0] for kind in (NODE, BETWEEN) if (ways := directions(all_links, kind))}
    return {
        "ok": not problems,
        "problems": problems,
        "world": {
            "ranks": size,
            "hosts": [{"name": names[ranks[0]], "ranks": list(ranks)} for ranks in hosts],
            "backend": backend,
            "share": thresholds.share,
            "expected_gb_s": thresholds.expected,
        },
        "links": all_links,
        "slowest": slowest,
        "collectives": all_collectives,
        "skipped": [{"test": name, "ranks": list(ranks)} for name, ranks in found.skipped],
        "ranks": facts,
    }


def gloo_of(facts: Sequence[dict[str, Any]], rank: int) -> str:
    gloo = next((fact["gloo"] for fact in facts if fact["rank"] == rank), {"interface": "", "address": ""})
    return " ".join(filter(None, (gloo["interface"], gloo["address"]))) or "no address"


# --------------------------------------------------------------------------------------------------------------------
# As text
# --------------------------------------------------------------------------------------------------------------------


def rate(gb_s: float) -> str:
    return f"{gb_s:.3g} GB/s"


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The report for people. GB are 10^9 bytes."""
    world, facts = found["world"], {fact["rank"]: fact for fact in found["ranks"]}
    names = {rank: host["name"] for host in world["hosts"] for rank in host["ranks"]}
    n = len(world["hosts"])
    yield f"{world['ranks']} rank{'s' * (world['ranks'] > 1)}, {n} host{'s' * (n > 1)}, {world['backend']}"
    first = next(iter(facts.values()))
    yield ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    for host in world["hosts"]:
        fact = facts[host["ranks"][0]]
        there = ", ".join(describe_interface(i) for i in fact["interfaces"])
        ranks = f"rank{'s' * (len(host['ranks']) > 1)} {network_facts.spans(host['ranks'])}"
        yield f"{host['name']}: {ranks}; gloo on {gloo_of(found['ranks'], fact['rank'])}"
        yield f"  interfaces: {there}; InfiniBand: {', '.join(fact['infiniband']) or 'none'}"
        for kind, models in fact["devices"].items():
            yield f"  {kind}: {len(models)} x {models[0] if models else ''}"
        if fact["variables"]:
            yield "  " + " ".join(f"{name}={value}" for name, value in fact["variables"].items())
    for kind in (NODE, BETWEEN):
        timed = [link for link in found["links"] if link["kind"] == kind and "gb_s" in link]
        if not timed:
            continue
        timed.sort(key=lambda link: min(link["gb_s"]))
        expected = world["expected_gb_s"].get(kind)
        title = f"links {kind}, {expected:g} GB/s expected" if expected else f"links {kind}"
        yield ""
        yield f"{title:<58}{'µs':>10}{'GB/s →':>10}{'GB/s ←':>10}"
        for link in timed[:SHOWN]:
            a, b = (f"{rank} on {names[rank]}" for rank in link["ranks"])
            yield f"  {a + ' ↔ ' + b:<56}{link['latency_us']:10.1f}{link['gb_s'][0]:10.3g}{link['gb_s'][1]:10.3g}"
        if len(timed) > SHOWN:
            yield f"  and {len(timed) - SHOWN} faster"
        slowest = found["slowest"][kind]
        a, b = slowest["ranks"]
        yield f"  slowest: rank {a} on {names[a]} → rank {b} on {names[b]}, {rate(slowest['gb_s'])}"
    timed = [entry for entry in found["collectives"] if "gb_s" in entry]
    if timed:
        yield ""
        yield f"{'collectives (GB/s: bus bandwidth)':<58}{'µs':>10}{'bytes':>12}{'GB/s':>10}{'expected':>10}"
    for entry in timed:
        name = f"{entry['collective']}, {entry['group']}, ranks {network_facts.spans(entry['ranks'])}"
        expected = format(entry["expected_gb_s"], "g") if "expected_gb_s" in entry else "–"
        yield f"  {name:<56}{entry['latency_us']:10.1f}{entry['bytes']:12,}{entry['gb_s']:10.3g}{expected:>10}"
    if found["skipped"]:
        groups = dict.fromkeys(network_facts.spans(test["ranks"]) for test in found["skipped"])
        yield f"not tried, as a link of theirs is dead: collectives of ranks {' and of ranks '.join(groups)}"
    yield ""
    yield from (f"wrong: {problem}" for problem in found["problems"])
    if found["ok"]:
        more = "; several ranks (torchrun, srun, mpirun) are needed to time links" if world["ranks"] == 1 else ""
        yield f"nothing wrong{more}"


def describe_interface(interface: dict[str, Any]) -> str:
    speed = f"{interface['speed']:g} Gb/s" if interface["speed"] else ""
    return " ".join(filter(None, (interface["name"], interface["state"], speed, interface["address"])))
