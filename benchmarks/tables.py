"""Puts measured figures into the documents, out of benchmarks/results/*.json and nowhere else, and the table of
checkpoints out of the tests' catalogue.

    python benchmarks/tables.py            # rewrites every table and every fact between its markers
    python benchmarks/tables.py --check    # exits with 1, naming those that differ

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, with a line below it that says how its figures came to
be. NAME is a function below, with the file it reads, or `kernel-BENCH`, `rank-step` and `model-NAME` for what
kernel_gpu.py, rank_step.py and model_gpu.py wrote to the file of that name with underscores, or `checkpoints`, the
catalogue. One of a function whose file is not there yet says so; one without figures (a smoke run's) is refused. A fact
is a number in a sentence, between `<!-- fact: NAME -->` and `<!-- end -->`.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib import INFERENCE, ROOT, race, report

import bench

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", ROOT / "demo" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"(<!-- (table|fact): (\S+) -->\n?)(.*?)(<!-- end -->)", re.DOTALL)
NUMBERS = {1: "one core", 2: "two cores"}
SCRIPTS = {Path(output).stem: Path(script).relative_to(ROOT)
           for script, *_, output in (bench.COMMANDS | bench.ON_A_GPU).values()}  # fmt: skip
KEYS = {
    "dense": ["m", "n", "k"], "moe": ["layout", "m"], "fused": ["op", "m", "width"], "router": ["m"],
    "decode": ["heads", "b", "context"], "prefill": ["heads", "length"],
    "sample": ["cut", "m"],
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


def cpu_forms(record: dict[str, Any]) -> str:
    """Best tokens per second; in brackets, by form, ours over theirs."""
    lines = []
    for group in record["results"]["groups"]:
        rows = [row for row in group["rows"] if not row["name"].startswith("prefill 8")]
        ours = [side for side in group["sides"] if side in rows[0]["ratio"]]
        for side, about in group["sides"].items():
            who, _, form = side.rpartition(" ")
            line = [form, who or "this engine"]
            for row in rows:
                ratios = [f"{row['ratio'][form][side]:.2f}" for form in ours if side not in ours]
                line.append(f"{row['tok_s'][side]['best']:.1f}" + (f" ({' / '.join(ratios)})" if ratios else ""))
            lines.append([*line, f"{about['start_s']:.1f}", f"{about['peak_mib'] / 1024:.1f}"])
    return report.table(["weights", "", *(row["name"] for row in rows), "start, s", "peak memory, GiB"], lines)


def cpu_limits(record: dict[str, Any]) -> str:
    """Of decoding, by what a step reads."""
    lines = []
    for group in record["results"]["groups"]:
        rows = [row for row in group["rows"] if "limit" in row]
        for form in rows[0]["limit"]:
            limits = [row["limit"][form] for row in rows]
            line = [form, f"{max(group['read_gb_s']):.1f}"]
            for limit in limits:
                line += [f"{limit['step_bytes'] / 1e9:.2f}", f"{limit['tok_s']:.1f}", f"{100 * limit['share']:.0f} %"]
            lines.append(line)
    cases = [cell for row in rows for cell in (f"{row['name']}: GB a step", "limit, tok/s", "reached")]
    return report.table(["weights", "memory read, GB/s", *cases], lines)


def compiled_reference(record: dict[str, Any]) -> str:
    """Times over ours; ratios alone, as the machine had other work."""
    sides = ("reference", "reference, compiled")
    header = ["two layers of these widths", "the reference, × our time", "through torch.compile", "its first run, s"]
    rows = []
    for row in record["results"]["rows"]:
        rows.append([row["name"], *(f"{row['ratio'][side]:.2f}" for side in sides), f"{row['first_s'][sides[1]]:.0f}"])
    return report.table(header, rows)


def kernel_cpu_clang(record: dict[str, Any]) -> str:
    """The median over the shapes of each kind."""
    kinds = {"products": " by ", "experts": "experts", "attention": "attention"}
    rows = record["results"]["rows"]
    times = [statistics.median(row["Clang"]["ratio"] for row in rows if word in row["name"]) for word in kinds.values()]
    return report.table(["", *kinds], [["compiled by Clang, the time × GCC's", *(f"{time:.2f}" for time in times)]])


def kernel_cpu(record: dict[str, Any]) -> str:
    """Of the products, one shape's; ratios are of the fastest other side."""
    results = record["results"]
    header = ["", "µs", "GB/s of weights or latents", "GFLOPS", "fastest other", "its time, × ours"]
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


def quantised_memory(record: dict[str, Any]) -> str:
    sizes = ("checkpoint_bytes", "planned_cpu", "planned_gpu")
    rows = [
        [row["form"].upper(), *(f"{row[key] / 1e9:.2f} GB" for key in sizes),
         *(f"{row[key] * 2**20 / 1e9:.2f} GB" for key in ("peak_mib", "imports_mib")), f"{row['limit_gb']} GB"]
        for row in record["results"]
    ]  # fmt: skip
    return report.table(["routed experts in", "checkpoint", "planned, CPU", "planned, GPU", "the process's peak, CPU",
                         "of that Python and torch", "limit"], rows)  # fmt: skip


def convert_memory(record: dict[str, Any]) -> str:
    rows = record["results"]
    converted = [row for row in rows if row["what"].startswith("convert for ")]
    ranks = [row["what"].removeprefix("convert for ") for row in converted]
    [cast] = [row for row in rows if row["what"].startswith("cast")]
    quantized = [row for row in rows if row["what"].startswith("quantize")]

    def peaks(*of: dict[str, Any]) -> list[str]:
        return [f"{max(row[key] for row in of)} MiB" for key in ("peak_mib", "peak_anonymous_mib")]

    header = [f"a checkpoint of V3's widths, {cast['bytes_read'] / 1e9:.1f} GB", "peak memory, mapped pages and all",
              "anonymous"]  # fmt: skip
    names = f"{', '.join(ranks[:-1])} or {ranks[-1]}"
    return report.table(header, [
        [f"`convert.py`, for {names} ranks", *peaks(*converted)],
        ["`fp8_cast_bf16.py`, on the CPU", *peaks(cast)],
        *([f"`quantize.py --format {row['what'].split()[2]}`, on the CPU", *peaks(row)] for row in quantized),
    ])  # fmt: skip


def demo(record: dict[str, Any]) -> str:
    rows = [[kind.replace("_", " "), EXAMPLES[kind], f"{found['right']} of {found['asked']}"]
            for kind, found in record["results"]["kinds"].items()]  # fmt: skip
    return report.table(["kind", "example", "held-out questions right"], rows)


def format_masks(record: dict[str, Any]) -> str:
    batches = list(next(iter(record["results"]["schemas"].values()))["step_ms"])
    header = ["schema", "compiled in, ms", "mask of a token, µs", "mean", "p99",
              *(f"sampling {n} at once, ms: free / held" for n in batches)]  # fmt: skip
    masks = ("mask_us", "mask_us_mean", "mask_us_p99")
    rows = [
        [name, f"{found['compile_ms']:.1f}", *(f"{found[key]:.0f}" for key in masks),
         *(f"{found['step_ms'][n]['free']:.2f} / {found['step_ms'][n]['held']:.2f}" for n in batches)]
        for name, found in record["results"]["schemas"].items()
    ]  # fmt: skip
    return report.table(header, rows)


def format_demo(record: dict[str, Any]) -> str:
    rows = [[n, f"{best['free']:.0f}", f"{best['held']:.0f}", f"{best['held'] / best['free']:.2f}"]
            for n, best in record["results"]["demo"].items()]  # fmt: skip
    return report.table(["answers at once", "free, tokens/s", "held to a schema", "ratio"], rows)


def page_time(record: dict[str, Any]) -> str:
    places = [cost["tokens"] for cost in record["results"]["rows"][0]["at"]]
    rows = [[row["kind"], *(f"{cost['task']:.2f} ({cost['script']:.2f})" for cost in row["at"])]
            for row in record["results"]["rows"]]  # fmt: skip
    return report.table(["an answer of", *(f"at {place:,} tokens, ms" for place in places)], rows)


def online_serving(record: dict[str, Any]) -> str:
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


def offline_throughput(record: dict[str, Any]) -> str:
    """Both loads: the demo's questions, and the random model's requests."""
    rows = []
    for what, results in (
        ("the demo", record["results"]),
        ("1.72 B parameters", read("offline_throughput_1b")["results"]),
    ):
        best = [max(results[side], key=lambda run: run["tokens_per_second"]) for side in ("ours", "transformers")]
        again = results["second_turn_first_token_s"]
        rows.append([
            what, f"{results['requests']}, {results['prompt_tokens']:,} + {best[0]['tokens']:,}",
            *(f"{run['tokens_per_second']:,.1f}" for run in best), f"{results['throughput_ratio']:.2f}",
            f"{results['same_answers']} of {results['requests']}",
            f"{again['reused']:.3f} / {again['not reused']:.2f}",
        ])  # fmt: skip
    header = ["model", "requests, tokens in + out", "this engine, tok/s", "transformers, tok/s", "ratio"]
    header += ["same answers", "first token of a second turn, prefix reused / not, s"]
    return report.table(header, rows)


def drafts(record: dict[str, Any]) -> str:
    rows = record["results"]["mtp"]
    plain = {row["sequences_at_a_time"]: row["tokens_per_second"] for row in rows if row["k"] == 0}
    lines = []
    for row in rows:
        speed, n = row["tokens_per_second"], row["sequences_at_a_time"]
        places = ", ".join(f"{100 * a:.1f} %" for a in row["acceptance"]) or "–"
        lines.append(
            [str(n), str(row["k"]), f"{row['tokens_per_step']:.2f}", places, f"{speed:,.0f}", f"{speed / plain[n]:.2f}"]
        )
    header = [
        "sequences at a time",
        "drafts",
        "tokens a step of a sequence",
        "accepted, by place",
        "tok/s",
        "over none",
    ]
    return report.table(header, lines)


def check_speed(record: dict[str, Any]) -> str:
    rows = [
        [row["what"], f"{row['tensors']:,}", f"{row['bytes'] / 1e9:.1f}", f"{row['seconds']:.1f}",
         "–" if row["gb_per_second"] is None else f"{row['gb_per_second']:.1f}", str(row["peak_mib"])]
        for row in record["results"]
    ]  # fmt: skip
    return report.table(["what is read", "tensors", "GB", "seconds", "GB/s, without imports", "peak memory, MiB"], rows)


def numerics(record: dict[str, Any]) -> str:
    """The demo's answers in every mode; the first record is bfloat16's."""
    modes = {
        "bfloat16, from dequantised weights": record, "bfloat16 over FP8 latents": read("demo_fp8_latents"),
        "float32, from exactly dequantised weights": read("demo_float32"), "W8A8": read("demo_w8a8"),
        "W8A16": read("demo_w8a16"), "W8A16 in fixed point": read("demo_fixed_point"),
        "W4A16: routed experts in INT4, groups of 32": read("demo_int4"),
        "W8A16: routed experts in INT8, groups of 128": read("demo_int8"),
    }  # fmt: skip
    lines = []
    for mode, r in modes.items():
        found = r["results"]
        drafted = f"{100 * found['mtp_acceptance']:.2f} %" if "mtp_acceptance" in found else "–"
        weakest = min(found["kinds"].items(), key=lambda kind: kind[1]["right"] / kind[1]["asked"])
        share = f"{100 * found['right'] / found['asked']:.1f} %"
        lines.append([mode, f"{found['right']:,} of {found['asked']:,}", share,
                      f"{weakest[0].replace('_', ' ')}, {weakest[1]['right']} of {weakest[1]['asked']}", drafted,
                      f"{r['machine']['cpu']}, {r['date']}"])  # fmt: skip
    header = ["computed in", "right", "", "weakest kind", "first drafts accepted", "counted on"]
    return report.table(header, lines)


def needle(record: dict[str, Any]) -> str:
    """Right answers of prompts as long as in training and of longer ones, in halves of the depth."""
    results = record["results"]
    lengths, depths, most = results["lengths"], results["depths"], results["trained"]

    def right(cells: list[list[int]], longer: bool, half: int) -> str:
        """Of the first or second half of the haystack; the middle is of the second."""
        part = [n for depth, row in zip(depths, cells, strict=True) if (depth >= 50) == half
                for length, n in zip(lengths, row, strict=True) if (length > most) == longer]  # fmt: skip
        return f"{sum(part)} of {results['questions'] * len(part)}"

    header = ["needle among", *(f"{size} {most:,} tokens, {half} half" for size in ("up to", "over")
                                for half in ("first", "second"))]  # fmt: skip
    rows = [[found["haystack"], *(right(found["right"], longer, half) for longer in (False, True) for half in (0, 1))]
            for found in results["haystacks"]]  # fmt: skip
    return report.table(header, rows)


def error_by_layer(record: dict[str, Any]) -> str:
    """What figures/error_by_layer.py draws, at the end of the network."""
    results = record["results"]
    middle, last, logits = results["quantiles"].index(50), -3, -1
    rows = [[found["format"], *(f"{100 * found['errors'][at][middle]:.2f} %" for at in (last, logits)),
             f"{found['other_tokens']} of {results['tokens']:,}"] for found in results["formats"]]  # fmt: skip
    return report.table(["format", "error after the last layer", "of the logits", "other most likely next token"], rows)


def results(record: dict[str, Any]) -> str:
    """What the README shows of everything that has been measured."""
    lines = []

    def line(what: str, name: str, ours: str, other: str, ratio: str) -> None:
        r = read(name)
        link = f"[{r['kind']}](benchmarks/results/{name}.json), {r['machine']['cpu'].replace('(R)', '')}, {r['date']}"
        lines.append([what, ours, other, ratio, link])

    for row in read("cpu")["results"]["rows"]:
        if row["turns"] > 1:
            sides = [side for side in ("transformers", "llama.cpp") if side in row["ratio"]]
            others = "; ".join(f"{side} {row['tok_s'][side]:.1f}" for side in sides)
            ratios = "; ".join(f"{row['ratio'][side]:.2f}" for side in sides)
            line(
                f"1.72 B random V3 on a CPU, {row['name']}, tok/s", "cpu", f"{row['tok_s']['ours']:.1f}", others, ratios
            )
    for what, name in (("demo", "offline_throughput"), ("1.72 B random V3", "offline_throughput_1b")):
        found = read(name)["results"]
        ours, theirs = (max(run["tokens_per_second"] for run in found[side]) for side in ("ours", "transformers"))
        line(f"{found['requests']} requests to the {what}, offline, tok/s", name, f"{ours:,.1f}",
             f"transformers, batches of 8: {theirs:.1f}", f"{found['throughput_ratio']:.1f}")  # fmt: skip
    for row in read("online_serving")["results"]["rows"]:
        if row["rate"] == 4.0:
            a, b = (row[side]["first_token_s"]["p99"] for side in ("server.py", "transformers serve"))
            line(
                "demo served, 4 requests/s, first token p99, s",
                "online_serving",
                f"{a:.2f}",
                f"transformers serve {b:.1f}",
                f"{b / a:.0f}",
            )
    rows = read("offline_throughput")["results"]["mtp"]
    plain, one = (row["tokens_per_second"] for row in rows if row["k"] < 2 and row["sequences_at_a_time"] == 1)
    what = "demo, one sequence, `--mtp 1`, tok/s"
    line(what, "offline_throughput", f"{one:.0f}", f"no drafts: {plain:.0f}", f"{one / plain:.2f}")
    found = record["results"]
    line("demo, held-out questions right, bfloat16", "demo", f"{found['right']:,} of {found['asked']:,}", "–", "–")
    return report.table(["", "this engine", "compared with", "ratio", "how, where, when"], lines)


def kernel(record: dict[str, Any], name: str) -> str:
    """One table of one of kernel_gpu's benches, a line to a shape."""
    cases: dict[tuple, list[dict[str, Any]]] = {}
    for row in record["results"]["rows"]:
        if row["bench"] == name:
            cases.setdefault(tuple(row[key] for key in KEYS[name]), []).append(row)
    if not cases:
        raise NoTable(f"no row of {name}")
    names = list(dict.fromkeys(row["contestant"] for rows in cases.values() for row in rows))
    lines = [race.shown(rows, KEYS[name], names) for rows in cases.values()]
    return report.table(race.header(KEYS[name], names), lines)


def rank_step(record: dict[str, Any]) -> str:
    import rank_step

    return rank_step.table(record["results"])


def lane_throughput(record: dict[str, Any]) -> str:
    header = ["model", "at a time", "tensor parallel, tok/s", "two lanes", "ratio", "two stages", "ratio",
              "bytes a rank gives a step, tensor parallel", "lanes"]  # fmt: skip
    rows = []
    for row in record["results"]:
        tp, lanes, stages = (row[side] for side in ("tensor parallel", "lanes", "pipeline"))
        speeds = [f"{tp['tokens_s']:.1f}"]
        for side in (lanes, stages):
            speeds += [f"{side['tokens_s']:.1f}", f"{side['ratio']:.2f}"]
        sent = [f"{side['sent']:,}" + ("" if side["sent"] == side["predicted"] else f" (counted {side['predicted']:,})")
                for side in (tp, lanes)]  # fmt: skip
        rows.append([row["model"], str(row["concurrent"]), *speeds, *sent])
    return report.table(header, rows)


def revisions(record: dict[str, Any]) -> str:
    before, now = record["results"]["revisions"]
    rows = [
        [row["name"], *(f"{seconds:.3f} s" for seconds in row["seconds"].values()), f"{row['ratio']:.2f}"]
        for row in record["results"]["rows"]
    ]
    return report.table(["", before, now, "times as fast"], rows)


def slow_links(record: dict[str, Any]) -> str:
    header = ["model", "link", "at a time", "tensor parallel, tok/s", "two stages, tok/s", "ratio", "two lanes, tok/s",
              "ratio"]  # fmt: skip
    rows = []
    for row in record["results"]:
        speeds = [f"{row['tensor parallel']['tokens_s']:.1f}"]
        for side in (row["pipeline"], row["lanes"]):
            speeds += [f"{side['tokens_s']:.1f}", f"{side['ratio']:.2f}"]
        link = row["link"].replace(",", ", ")
        if "," in link:
            link += f" (a round trip: {row['round_trip_s'] * 1e3:.1f} ms)"
        rows.append([row["model"], link, str(row["concurrent"]), *speeds])
    return report.table(header, rows)


def scale_out(record: dict[str, Any]) -> str:
    import scale_out

    return scale_out.layouts_table(record["results"])


def overlap(record: dict[str, Any]) -> str:
    import scale_out

    return scale_out.overlap_table(record["results"])


def attention_counts(record: dict[str, Any]) -> str:
    header = ["kernel for sm_90", "Triton", "tile", "warps", "instructions", "registers", "stack",
              "shared memory", "programs beside"]  # fmt: skip
    rows = [
        [row["kernel"].replace("sm_90 ", ""), row["triton"], f"{row['rows']} × {row['keys']}", str(row["warps"]),
         str(row["instructions"]), str(row["registers"]), str(row["stack"]),
         f"{row['shared']:,}", str(row["programs_that_fit"])]
        for row in record["results"]["compiled"]
    ]  # fmt: skip
    return report.table(header, rows)


def attention_balance(record: dict[str, Any]) -> str:
    found = record["results"]["simulated"]
    rows = [[row["lengths"].replace(" x ", " × "), f"{row['efficiency']:.2f}"] for row in found]
    return report.table(["sequences", "pages read / (132 × the busiest one's)"], rows)


def step_model(record: dict[str, Any]) -> str:
    import step_model

    return step_model.table(record["results"])


def host_step(record: dict[str, Any]) -> str:
    """Milliseconds of Python, the median, by sequences; a column for each way to sample, with and without drafts."""
    rows = record["results"]["rows"]
    ways = list(dict.fromkeys((row["sampling"], row["mtp"]) for row in rows))
    found = {(row["b"], row["sampling"], row["mtp"]): row["ms"] for row in rows}
    lines = [[str(b), *(f"{found[b, *way]:.2f}" for way in ways)] for b in dict.fromkeys(row["b"] for row in rows)]
    return report.table(["sequences", *(f"{how}{', `--mtp 1`' if mtp else ''}, ms" for how, mtp in ways)], lines)


def step_losses(record: dict[str, Any]) -> str:
    import step_model

    return step_model.losses_table(record["results"])


def step_assumptions(record: dict[str, Any]) -> str:
    import step_model

    return step_model.assumptions_table(record["results"])


def model(record: dict[str, Any]) -> str:
    import model_gpu

    return model_gpu.table(record["results"])


def traps(record: dict[str, Any]) -> str:
    """Every known mistake, and by what this engine with that mistake in it was seen through."""
    results = record["results"]
    lines = []
    for name, about in results["mistakes"].items():
        tried = [row for row in results["mutants"].values() if row["is"] == name]
        named = [given for given in ("logits", "points") if any(row["named"][given][:1] == [name] for row in tried)]
        says = "–" if not tried else " and ".join(named) or "nothing"
        lines.append([f"`{name}`", about["says"], about["signature"], says])
    return report.table(["mistake", "what is wrong", "where it shows first", "named by"], lines)


def conformance(record: dict[str, Any]) -> str:
    results = record["results"]
    counts = [str(results[name]) for name in ("of", "fail", "named_by_logits", "named_by_points")]
    header = ["mistakes put into this engine", "fail the suite", "named by logits alone", "named with all points given"]
    return report.table(header, [counts])


# A table's function and the file it reads.
BY_NAME: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "cpu": (cpu, "cpu"), "cpu_forms": (cpu_forms, "cpu_forms"), "cpu_limits": (cpu_limits, "cpu_forms"),
    "cpu_forms_avx2": (cpu_forms, "cpu_forms_avx2"), "cpu_forms_avx512": (cpu_forms, "cpu_forms_avx512"),
    "cpu_forms_amd": (cpu_forms, "cpu_forms_amd"),
    "kernel_cpu": (kernel_cpu, "kernel_cpu"), "convert_memory": (convert_memory, "convert_memory"),
    "quantised_memory": (quantised_memory, "quantised_memory"),
    "demo": (demo, "demo"), "numerics": (numerics, "demo"), "online_serving": (online_serving, "online_serving"),
    "format_masks": (format_masks, "format_masks"), "format_demo": (format_demo, "format_masks"),
    "page_time": (page_time, "page_time"),
    "offline_throughput": (offline_throughput, "offline_throughput"), "drafts": (drafts, "offline_throughput"),
    "check_speed": (check_speed, "check_speed"), "results": (results, "demo"),
    "compiled_reference": (compiled_reference, "compiled_reference"),
    "kernel_cpu_clang": (kernel_cpu_clang, "kernel_cpu_clang"),
    "lane_throughput": (lane_throughput, "lane_throughput"), "slow_links": (slow_links, "slow_links"),
    "revisions": (revisions, "revisions"),
    "scale_out": (scale_out, "scale_out"), "overlap": (overlap, "overlap"),
    "attention_counts": (attention_counts, "attention_counts"),
    "attention_balance": (attention_balance, "attention_counts"),
    "host_step": (host_step, "host_step"),
    "step_model": (step_model, "step_model"), "step_losses": (step_losses, "step_model"),
    "step_assumptions": (step_assumptions, "step_model"),
    "traps": (traps, "conformance"), "conformance": (conformance, "conformance"),
    "error_by_layer": (error_by_layer, "error_by_layer"), "needle": (needle, "needle"),
}  # fmt: skip


def lines_of(*files: str) -> int:
    return sum(len((INFERENCE / file).read_text().splitlines()) for file in files)


def kinds_of_damage() -> str:
    sys.path.append(str(ROOT / "tests"))
    from support.damaged_checkpoints import KINDS  # type: ignore[import-not-found]

    return str(len(KINDS))


def listed_mutants() -> str:
    sys.path.append(str(ROOT / "tests"))
    from mutation.mutants import MUTANTS  # type: ignore[import-not-found]

    return str(len(MUTANTS))


FACTS: dict[str, Callable[[], str]] = {
    "model-lines": lambda: str(lines_of("model.py")),
    "reference-lines": lambda: str(lines_of("ops/reference.py")),
    "modules": lambda: str(sum(bool(path.read_text()) for path in INFERENCE.rglob("*.py"))),
    "lines": lambda: f"{sum(len(path.read_text().splitlines()) for path in INFERENCE.rglob('*.py')):,}",
    "mutants-killed": lambda: str(read("mutants")["results"]["killed"]),
    "mutants": lambda: str(read("mutants")["results"]["of"]),
    "memory-read": lambda: f"{read('kernel_cpu')['results']['read_gb_s']:.0f}",
    "listed-mutants": listed_mutants,
    "kinds-of-damage": kinds_of_damage,
    "known-mistakes": lambda: str(read("conformance")["results"]["known"]),
    "long-tests": lambda: str(len(read("trust")["results"]["tests"])),
}


def source(name: str, record: dict[str, Any], folder: Path) -> str:
    """How a file's figures came to be: kind, script with the flags it had, processor, cores, date, and the file."""
    words = shlex.split(record["command"])[2:]
    if "--output" in words:
        at = words.index("--output")
        del words[at : at + 2]
    script = SCRIPTS.get(name) or SCRIPTS.get(name.rpartition("_")[0]) or Path(record["command"].split()[1])
    link = os.path.relpath(RESULTS / f"{name}.json", folder)
    machine = record["machine"]
    where = machine.get("gpu") or f"{machine['cpu'].replace('(R)', '')}, {machine['cores']} cores"
    command = " ".join(["python", script.as_posix(), *words])
    return f"{record['kind'].capitalize()}: `{command}`, {where}, {record['date']} ([{name}.json]({link}))."


def made(name: str, folder: Path = ROOT) -> str:
    """The table of a marker and the line below it, for a document in a folder. Raises NoTable."""
    if name == "checkpoints":
        sys.path.append(str(ROOT / "tests"))
        from support.catalogue import table as checkpoints  # type: ignore[import-not-found]

        return str(checkpoints())
    if name in BY_NAME:
        function, file = BY_NAME[name]
        if not (RESULTS / f"{file}.json").exists():
            return f"Not measured yet: `python benchmarks/bench.py {file.replace('_', '-')}` does."
        record = read(file)
        text = function(record)
        return text if name in ("results", "numerics") else f"{text}\n\n{source(file, record, folder)}"
    file = name.replace("-", "_")
    record = read(file)
    if name.startswith("kernel-") and name.removeprefix("kernel-") in KEYS:
        text = kernel(record, name.removeprefix("kernel-"))
    elif name.startswith("rank-step"):
        text = rank_step(record)
    elif name.startswith("model-"):
        text = model(record)
    else:
        raise NoTable("no function makes it")
    return f"{text}\n\n{source(file, record, folder)}"


def filled(text: str, folder: Path = ROOT) -> tuple[str, list[str]]:
    """The text with every marked table and fact made anew, and the names of those that changed. Raises NoTable."""
    if not len(MARKED.findall(text)) == len(re.findall("<!-- (?:table|fact):", text)) == text.count("<!-- end -->"):
        raise NoTable("a marker has no counterpart")
    changed = []

    def anew(match: re.Match[str]) -> str:
        begin, kind, name, body, end = match.groups()
        try:
            if kind == "fact" and name not in FACTS:
                raise NoTable("no function makes it")
            new = FACTS[name]() if kind == "fact" else made(name, folder) + "\n"
        except NoTable as e:
            raise NoTable(f"{kind} {name}: {e}") from None
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
            text, changed = filled(path.read_text(), path.parent)
        except NoTable as e:
            print(f"error: {path.relative_to(ROOT)}: {e}", file=sys.stderr)
            return 2
        for name in changed:
            print(f"{path.relative_to(ROOT)}: {name} {'differs from its source' if options.check else 'rewritten'}")
        differ += len(changed)
        if changed and not options.check:
            path.write_text(text)
    return 1 if options.check and differ else 0


if __name__ == "__main__":
    sys.exit(main())
