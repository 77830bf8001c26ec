"""Puts measured figures into the documents, out of benchmarks/results/*.json and nowhere else.

    python benchmarks/tables.py            # rewrites every table between its markers
    python benchmarks/tables.py --check    # exits with 1, naming the tables that differ

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. NAME is a function below, with the file it reads, or
`kernel-BENCH`, `rank-slice` and `model-NAME` for what bench_kernel.py, bench_rank_slice.py and bench_model.py wrote to
the file of that name with underscores. A file that is no measurement (a smoke run's) is refused.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import report

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", ROOT / "demo" / "README.md"]
MARKED = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
NUMBERS = {1: "one core", 2: "two cores"}
KEYS = {
    "dense": ["m", "n", "k"], "moe": ["layout", "m"], "fused": ["op", "m", "width"], "router": ["m"],
    "decode": ["heads", "b", "context"], "prefill": ["heads", "length"],
}  # fmt: skip
EXAMPLES = {  # what the demo's model card shows of each kind of question
    "addition": "What is 347 + 285?",
    "subtraction": "Subtract 468 from 731.",
    "spelling": 'Spell the word "lantern".',
    "reversing": 'Reverse the word "penguin".',
    "sorting": "Sort these numbers: 42, 17, 93, 28.",
    "counting": "Count from 95 to 108.",
    "lookup": "The code of maple is 4821. … What is the code of maple?",
    "several_codes": "… What are the codes of cedar and fox?",
    "turns": "any of these after other questions",
    "follow_up": "a code told in an earlier turn",
    "long_lookup": "a code among up to 2,300 tokens",
}


class NoTable(Exception):
    """A marker that nothing can be made for; the text says why."""


def read(name: str) -> dict[str, Any]:
    """A results file: machine, date, command and results."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise NoTable(f"there is no {path.name} in {RESULTS}")
    record: dict[str, Any] = json.loads(path.read_text())
    if isinstance(record["results"], dict) and "no_timing" in record["results"]:
        raise NoTable(f"{path.name} comes from a smoke run and holds no measurement")
    return record


def cpu(record: dict[str, Any]) -> str:
    results, versions = record["results"], record["machine"]["versions"]
    cores = NUMBERS.get(results["threads"], f"{results['threads']} cores")
    size = f"{results['parameters'] / 1e9:.2f} B parameters (0.4 B active)"
    transformers = ".".join(versions["transformers"].split(".")[:2])
    names = {"transformers": f"transformers {transformers}", "llama.cpp": "llama.cpp"}
    measured = [row for row in results["rows"] if row["turns"] > 1]
    peers = [side for side in names if any(side in row["ratio"] for row in measured)]
    header = [f"a random DeepSeek-V3 of {size}, bfloat16, {cores}", "this engine, tok/s"]
    header += [column for side in peers for column in (f"{names[side]}, tok/s", "ratio")]
    rows = []
    for row in measured:
        line = [row["name"], f"{row['tok_s']['ours']:.1f}"]
        for side in peers:
            known = side in row["ratio"]
            line += [f"{row['tok_s'][side]:.1f}", f"{row['ratio'][side]:.2f}"] if known else ["–", "–"]
        rows.append(line)
    return report.table(header, rows)


def kernel_cpu(record: dict[str, Any]) -> str:
    """Of the products, one shape's; ratios are of the fastest other side."""
    results = record["results"]
    header = ["", "µs", "GB/s of weights or latents", "GFLOPS", "beside", "ratio"]
    rows = []
    for row in results["rows"]:
        if " by " in row["name"] and not row["name"].endswith(" by 7168 x 2048"):
            continue
        ours = row["ours"]
        others = {side: f["ratio"] for side, f in row.items() if isinstance(f, dict) and side != "ours"}
        side = min(others, key=others.__getitem__)
        figures = [f"{ours['us']:,.0f}", f"{ours['gb_s']:.1f}", f"{ours['gflops']:.0f}"]
        rows.append([row["name"].replace(" x ", " × "), *figures, side, f"{others[side]:.2f}"])
    return report.table(header, rows)


def convert(record: dict[str, Any]) -> str:
    rows = record["results"]
    converted = [row for row in rows if row["what"].startswith("convert for ")]
    ranks = [row["what"].removeprefix("convert for ") for row in converted]
    [cast] = [row for row in rows if row["what"].startswith("cast")]

    def peaks(*of: dict[str, Any]) -> list[str]:
        return [f"{max(row[key] for row in of)} MiB" for key in ("peak_mib", "peak_anonymous_mib")]

    header = [f"a checkpoint of V3's widths, {cast['bytes_read'] / 1e9:.1f} GB", "peak memory, mapped pages and all",
              "anonymous"]  # fmt: skip
    names = f"{', '.join(ranks[:-1])} or {ranks[-1]}"
    return report.table(header, [
        [f"`convert.py`, for {names} ranks", *peaks(*converted)],
        ["`fp8_cast_bf16.py`, on the CPU", *peaks(cast)],
    ])  # fmt: skip


def demo(record: dict[str, Any]) -> str:
    rows = [[kind.replace("_", " "), EXAMPLES[kind], f"{found['right']} of {found['asked']}"]
            for kind, found in record["results"]["kinds"].items()]  # fmt: skip
    return report.table(["kind", "example", "held-out questions right"], rows)


def server(record: dict[str, Any]) -> str:
    sides = ("server.py", "transformers serve")

    def both(row: dict[str, Any], form: str, *path: str) -> str:
        found = []
        for side in sides:
            value = row[side]
            for name in path:
                value = value[name]
            found.append(form.format(value))
        return " / ".join(found)

    header = ["requests a second", "tokens/s", "ratio", "first token, p50, s", "p99, s", "between tokens, p99, s",
              "whole answer, p99, s", "good answers a second"]  # fmt: skip
    rows = [
        [
            str(row["rate"]), both(row, "{:.1f}", "tokens_per_second"), f"{row['throughput_ratio']:.2f}",
            both(row, "{:.2f}", "first_token_s", "p50"), both(row, "{:.2f}", "first_token_s", "p99"),
            both(row, "{:.3f}", "between_tokens_s", "p99"), both(row, "{:.2f}", "end_to_end_s", "p99"),
            both(row, "{:.2f}", "good_requests_per_second"),
        ]
        for row in record["results"]["rows"]
    ]  # fmt: skip
    return report.table(header, rows)


def kernel(record: dict[str, Any], bench: str) -> str:
    """One table of one of bench_kernel's benches, a line to a shape."""
    import timing

    cases: dict[tuple, list[dict[str, Any]]] = {}
    for row in record["results"]["rows"]:
        if row["bench"] == bench:
            cases.setdefault(tuple(row[key] for key in KEYS[bench]), []).append(row)
    if not cases:
        raise NoTable(f"no row of {bench}")
    names = list(dict.fromkeys(row["contestant"] for rows in cases.values() for row in rows))
    lines = [timing.shown(rows, KEYS[bench], names) for rows in cases.values()]
    return report.table(timing.header(KEYS[bench], names), lines)


def rank_slice(record: dict[str, Any]) -> str:
    import bench_rank_slice

    return bench_rank_slice.table(record["results"])


def model(record: dict[str, Any]) -> str:
    import bench_model

    return bench_model.table(record["results"])


BY_NAME: dict[str, Callable[[dict[str, Any]], str]] = {
    "cpu": cpu, "kernel_cpu": kernel_cpu, "convert": convert, "demo": demo, "server": server
}  # fmt: skip


def made(name: str) -> str:
    """The table of a marker. Raises NoTable."""
    record = read(name.replace("-", "_"))
    if name in BY_NAME:
        return BY_NAME[name](record)
    if name.startswith("kernel-") and name.removeprefix("kernel-") in KEYS:
        return kernel(record, name.removeprefix("kernel-"))
    if name.startswith("rank-slice"):
        return rank_slice(record)
    if name.startswith("model-"):
        return model(record)
    raise NoTable("no function makes it")


def filled(text: str) -> tuple[str, list[str]]:
    """The text with every marked table made anew, and the names of those that changed. Raises NoTable."""
    if not len(MARKED.findall(text)) == text.count("<!-- table:") == text.count("<!-- end -->"):
        raise NoTable("a marker has no counterpart")
    changed = []

    def anew(match: re.Match[str]) -> str:
        begin, name, body, end = match.groups()
        try:
            new = made(name) + "\n"
        except NoTable as e:
            raise NoTable(f"table {name}: {e}") from None
        if new != body:
            changed.append(name)
        return begin + new + end

    return MARKED.sub(anew, text), changed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if a table differs")
    options = parser.parse_args()
    differ = 0
    for path in DOCUMENTS:
        try:
            text, changed = filled(path.read_text())
        except NoTable as e:
            print(f"error: {path.relative_to(ROOT)}: {e}", file=sys.stderr)
            return 2
        for name in changed:
            print(f"{path.relative_to(ROOT)}: table {name} {'differs from its JSON' if options.check else 'rewritten'}")
        differ += len(changed)
        if changed and not options.check:
            path.write_text(text)
    return 1 if options.check and differ else 0


if __name__ == "__main__":
    sys.exit(main())
