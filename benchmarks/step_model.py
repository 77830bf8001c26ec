"""A model of a step of DeepSeek-V3 on one H200, one rank of eight: a prediction, which a run on a device confirms or
refutes.

    python benchmarks/step_model.py --output benchmarks/results/step_model.json

The launches are counted through the stub driver (tests/support/stub_driver.py); registers, shared memory and
instructions come from the kernels compiled for sm_90 (those that the output file has already, by Triton's key of them,
are not compiled again); bytes and operations follow from the arguments. A kernel takes the longest of what its memory,
its second-level cache, its tensor cores and its instructions take, and on the main stream the start and the gap of a
launch. Collectives are a copy of what they send: communication is left out, as in rank_step.py. Every assumption is in
ASSUMED with its source.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lib import ROOT, report

sys.path.append(str(ROOT / "tests"))

Row = dict[str, Any]
MULTIPROCESSORS, SCHEDULERS = 132, 4  # an H200's, and of each of these
EXPERTS, TOP_K, LATENT = 256, 8, 576 * 2  # V3's; bytes of a token's latent and rotary key in bfloat16
CONTEXT = 4096
COPYING = 4  # warps of a specialised program that only copy; as many make a group that multiplies


class Assumed(NamedTuple):
    value: float
    unit: str
    source: str


ASSUMED = {
    "copy": Assumed(4.3e12, "B/s", "what a copy reaches on an H200; this project's TARGETS, to be measured"),
    "memory": Assumed(4.8e12, "B/s", "NVIDIA H200 data sheet"),
    "cache": Assumed(7.0e12, "B/s", "the second-level cache: 78 % of 5,120 B a clock, NVIDIA's figure for the A100"),
    "clock": Assumed(1.755e9, "Hz", "the boost clock of NVIDIA's H100; under load it may be less, the proof prints it"),
    "fp8": Assumed(8192, "FLOP a clock and multiprocessor", "1,979 TFLOPS at 132 x 1.83 GHz, NVIDIA H100 data sheet"),
    "bf16": Assumed(4096, "FLOP a clock and multiprocessor", "989 TFLOPS at 132 x 1.83 GHz, NVIDIA H100 data sheet"),
    "tensor_share": Assumed(0.76, "", "the most that DeepGEMM publishes, 1,500 of 1,979 TFLOPS"),
    "issue": Assumed(1.0, "instructions a clock and scheduler", "CUDA programming guide, compute capability 9.0"),
    "alone": Assumed(2.0, "clocks an instruction, lone warp", "an assumption, between 1, independent, and 4, a chain"),
    "latency": Assumed(0.8e-6, "s", "of memory under load; idle 479 clocks on an H100, arXiv 2402.13499, times three"),
    "sm_bytes": Assumed(64, "B a clock and multiprocessor", "from the second-level cache; an assumption"),
    "registers": Assumed(0.5, "", "of a program's registers wait for loads at once, without a pipeline; an assumption"),
    "start": Assumed(1.0e-6, "s", "of a kernel: addresses, the first instructions, the last stores; an assumption"),
    "gap": Assumed(1.2e-6, "s", "between two kernels of a stream or graph; this project's review, to be measured"),
    "gap_dependent": Assumed(0.3e-6, "s", "the same with programmatic dependent launch; an assumption"),
    "start_dependent": Assumed(0.7e-6, "s", "the same with programmatic dependent launch; an assumption"),
    "host": Assumed(20e-6, "s", "the host's time for a launch outside a graph (prefill); this project's review"),
}  # fmt: skip
A = {name: one.value for name, one in ASSUMED.items()}

# By name: sequences, new tokens of each, tokens cached before them; and what the step should take, in ms (TARGETS).
STEPS = {
    **{f"decode {b}": (b, 1, CONTEXT) for b in (1, 8, 32, 128)},
    **{f"prefill {n}": (1, n, 0) for n in (1024, 4096, 16384)},
}
PREFILL_TARGET = 45e3  # tokens a second
TARGET_MS = {"decode 1": 3.5, "decode 8": 9.0, "decode 32": 20.0, "decode 128": 35.0}
TARGET_MS |= {name: 1e3 * n / PREFILL_TARGET for name, (_, n, before) in STEPS.items() if not before}


# --------------------------------------------------------------------------------------------------------------------
# What a launch has to do, from its arguments
# --------------------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """Of one launch. `flops` are what the tensor cores do, padding and idle programs of the last round included, and
    `useful` those of them that count; `cache_bytes` what the programs load, however often; `trips` of the main loop."""

    nbytes: float
    flops: float = 0.0
    useful: float = 0.0
    kind: str = "bf16"  # of the operations
    cache_bytes: float = 0.0
    programs: float = 1.0  # that have something to do
    trips: float = 1.0
    tiles: float = 1.0  # of a persistent program, one after another
    known: bool = True  # whether `trips` is


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        import torch

        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


def tensor(text: Any) -> Tensor | None:
    found = re.fullmatch(r"(\w+)\(([\d, ]*)\)", text) if isinstance(text, str) else None
    return found and Tensor(found[1], tuple(int(n) for n in found[2].split(",") if n.strip()))


def tensors_of(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: t for name, t in ((name, tensor(value)) for name, value in arguments.items()) if t}


def touched(tokens: int) -> float:
    """Of a layer's routed experts, how many so many tokens are expected to choose."""
    return EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** tokens)


@lru_cache
def row_tiles(tokens: int, block: int) -> float:
    """How many tiles of `block` rows all experts are expected to fill, where each token chooses at random."""
    p, total, pmf = TOP_K / EXPERTS, 0.0, (1 - TOP_K / EXPERTS) ** tokens
    log_pmf = tokens * math.log1p(-p)
    for rows in range(1, tokens + 1):
        log_pmf += math.log((tokens - rows + 1) / rows * p / (1 - p))
        pmf = math.exp(log_pmf)
        total += math.ceil(rows / block) * pmf
        if rows > tokens * p and pmf < 1e-12:
            break
    return EXPERTS * total


def work_of(launch: Any, step: tuple[int, int, int]) -> Work:
    """Every tensor is read or written once, but for weights of experts that nobody chose and the pool of latents."""
    b, new, context = step
    tokens, args, constants = b * new, launch.arguments, launch.constants
    found = tensors_of(args)
    programs = math.prod(launch.grid)
    nbytes = float(sum(t.nbytes for t in found.values()))
    pool = [t.nbytes for name, t in found.items() if name in ("latents_ptr", "k_latents_ptr", "k_pe_in_ptr")]
    if launch.name in ("decode_kernel", "decode_fp8_kernel"):
        pool.append(found["k_pe_ptr"].nbytes)  # the same memory, from another channel on
    nbytes -= sum(pool)
    if launch.name == "aten::embedding":
        return Work(2.0 * found[max(found)].nbytes)
    if not launch.ours:
        if launch.name in ("aten::mm", "aten::bmm"):
            x, w = list(found.values())[:2]
            flops = 2.0 * math.prod(x.shape) * w.shape[-1]
            return Work(nbytes, flops, flops)
        return Work(nbytes)
    name = launch.name
    if name in ("gemm_kernel", "gemm_persistent_kernel", "grouped_gemm_kernel", "grouped_persistent_kernel"):
        width, kind = (1, "fp8") if found["x_ptr"].dtype.startswith("float8") else (2, "bf16")
        n, k, bm, bn = args["N"], args["K"], constants["BLOCK_M"], constants["BLOCK_N"]
        parts = launch.grid[1] if constants.get("SPLIT") else 1
        trips = math.ceil(math.ceil(k / 128) / parts)
        if name.startswith("grouped"):
            m_tiles, rows = row_tiles(tokens, bm), tokens * TOP_K
            weights = sum(found[w].nbytes for w in ("w_ptr", "w_s_ptr"))
            nbytes -= weights * (1 - touched(tokens) / EXPERTS)
            if "shared_w_ptr" in found:
                m_tiles, rows = m_tiles + math.ceil(tokens / bm), rows + tokens
        else:
            m_tiles, rows = math.ceil(args["M"] / bm), args["M"]
        tiles = m_tiles * math.ceil(n / bn) * parts
        loaded = tiles * (bm + bn) * trips * 128 * width
        each = 1
        if "persistent" in name:
            each = math.ceil(tiles / programs)
            tiles = each * programs
        flops, busy = 2.0 * tiles * bm * bn * trips * 128, min(programs, tiles)
        if "ids_ptr" in found:  # every program looks for its tile, also those that find none
            trips, busy = trips * busy / programs, programs
        return Work(nbytes, flops, 2.0 * rows * n * k, kind, loaded, busy, trips, each)
    if name in ("decode_kernel", "decode_fp8_kernel"):
        keys = constants.get("KEYS", constants["PAGE"])
        rows = constants["ROWS"] * math.ceil(constants["N"] * new / constants["ROWS"])
        latents = b * (context + new) * LATENT
        lanes = constants["LANES"]
        seen = b * math.ceil((context + new) / 64) * 64
        flops = 2.0 * rows * (2 * constants["C"] + constants["R"]) * seen
        useful = 2.0 * constants["N"] * new * (2 * constants["C"] + constants["R"]) * b * (context + new)
        return Work(nbytes + latents, flops, useful, "bf16", latents * lanes, programs, seen * lanes / keys / programs)
    if name == "prefill_kernel":
        keys, rows = constants["KEYS"], constants["ROWS"]
        seen = context + (new + rows) / 2  # of a mean tile of queries
        trips = seen / keys
        sizes = constants["DN_PAD"] + constants["R_PAD"], constants["DV_PAD"]
        flops = 2.0 * programs * rows * seen * sum(sizes)
        useful = 2.0 * constants["N"] * b * new * (context + (new + 1) / 2)
        useful *= constants["DN"] + constants["R"] + constants["DV"]
        return Work(nbytes, flops, useful, "bf16", programs * seen * sum(sizes) * 2, programs, trips)
    if name == "gather_kernel":
        latents = b * (context + new) * LATENT
        return Work(nbytes + latents, cache_bytes=2 * latents, programs=programs)
    if pool:  # writes the new tokens' latents
        nbytes += tokens * LATENT
    trips, known = 1.0, True
    flops = useful = 0.0
    if name == "router_kernel":
        trips = constants["CHUNK"]
        flops = 2.0 * programs * constants["BLOCK_T"] * constants["BLOCK_E"] * constants["CHUNK"] * 128
        useful = 2.0 * tokens * math.prod(found["w_ptr"].shape)
    elif name in ("absorb_kernel", "values_kernel"):
        rows = max(16, constants["ROWS"])
        size = sum(math.prod(found[w].shape) for w in ("w_uk_ptr", "w_uv_ptr") if w in found)
        flops, useful = 2.0 * size * rows * launch.grid[1], 2.0 * size * tokens
        if "partial_ptr" in found:  # C / COLUMNS loops, of which instructions_of counts one
            splits = math.ceil(found["partial_ptr"].shape[0] / b / constants["SPLITS"])
            trips = 1 + (splits - 1) * constants["C"] // constants["COLUMNS"]
    elif name == "sort_kernel":
        trips = math.ceil(args["n"] / constants["CHUNK"])
    elif name == "place_kernel":
        trips = math.ceil(constants["CHUNK"] / constants["STEP"])
    elif name == "gather_rows_kernel":
        trips = math.ceil(args["K"] / constants["COLUMNS"])
    else:
        known = name in WITHOUT_LOOP or not launch.key
    return Work(nbytes, flops, useful, "bf16", nbytes, programs, trips, known=known)


# Kernels whose loops, if they have any, run once or hardly more.
WITHOUT_LOOP = {
    "norm_kernel", "norm_latents_kernel", "sum_splits_kernel", "latent_write_kernel", "combine_parts_kernel",
    "act_quant_kernel", "silu_mul_kernel", "combine_kernel", "plan_runs_kernel", "count_kernel",
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# What it takes
# --------------------------------------------------------------------------------------------------------------------


def instructions_of(compiled: Row, trips: float, tiles: float, specialised: bool = False) -> float:
    """Of one warp: all of the code once for a tile, its main loop `trips` times. The main loop multiplies, if one does;
    of two, a masked one and the other, it is the shorter. Specialised warps share the rest of the code."""
    loops = [(n, multiplies) for n, multiplies in compiled["loops"]]
    main = [n for n, multiplies in loops if multiplies]
    n = min(main) if main else max((n for n, _ in loops), default=0)
    rest = float(compiled["instructions"] - n)
    if specialised:
        rest = (compiled["instructions"] - sum(n for n, _ in loops)) / (compiled["warps"] / COPYING)
    return float(tiles * (rest + trips * n))


# What a row of the results has where it says nothing.
USUAL: Row = {
    "compiled": None, "side": False, "dependent": False, "specialised": False, "serial": False, "trips_known": True,
    "flops": 0, "useful": 0, "tensor": "bf16", "trips": 1, "tiles": 1, "programs": 1,
}  # fmt: skip


def predict(row: Row, compiled: Row | None, memory: float = A["copy"]) -> Row:
    """µs of one launch of a row, in parts, at a memory's speed in B/s. On the side stream `gap` and `start` are 0: it
    fills what the main one leaves free."""
    row = {"cache_bytes": row["bytes"]} | USUAL | row
    found = {"memory": row["bytes"] / memory, "cache": row["cache_bytes"] / A["cache"]}
    rate = A[row["tensor"]] * A["clock"] * A["tensor_share"]  # of one multiprocessor
    found["tensor"] = row["flops"] / rate / MULTIPROCESSORS
    if compiled:
        programs = max(1.0, row["programs"])
        used, each = min(MULTIPROCESSORS, programs), math.ceil(programs / MULTIPROCESSORS)
        resident, warps = min(compiled["fit"], each), compiled["warps"]
        on_the_way = max(compiled["shared"], warps * 32 * 4 * compiled["registers"] * A["registers"])
        on_the_way = min(on_the_way, max(1.0, row["bytes"] / programs))
        speed = min(memory, used * A["sm_bytes"] * A["clock"], used * resident * on_the_way / A["latency"])
        found["memory"] = row["bytes"] / speed
        found["tensor"] = row["flops"] / programs * each / rate
        specialised = row["specialised"] and warps > COPYING
        groups = warps // COPYING - 1 if specialised else 1  # that multiply, independently
        warps -= COPYING * specialised
        in_turn = min(A["issue"], max(1.0, resident * warps / SCHEDULERS) / A["alone"]) * A["clock"]
        instructions = instructions_of(compiled, row["trips"], row["tiles"], specialised)
        found["issue"] = instructions * max(1.0, warps * each / SCHEDULERS) / in_turn
        # A group's product and what it does with it take turns; only other groups and programs overlap with them.
        alone = instructions * A["alone"] / A["clock"]
        found["turns"] = each / resident * (row["flops"] / programs / groups / rate + alone)
        if row["serial"]:  # loads that nothing but another program overlaps with
            own = row["trips"] * A["latency"] + row["bytes"] / memory * used / programs
            own += alone + row["flops"] / programs / rate
            found["serial"] = own * math.ceil(each / resident)
    longest = max(found, key=found.__getitem__)
    dependent = "_dependent" * row["dependent"]
    start, gap = (0.0, 0.0) if row["side"] else (A[f"start{dependent}"], A[f"gap{dependent}"])
    total = found[longest] + start + gap
    return {f"{name}_us": round(1e6 * value, 3) for name, value in found.items()} | {
        "bound": longest, "start_us": 1e6 * start, "gap_us": 1e6 * gap, "us": round(1e6 * total, 3),
    }  # fmt: skip


def step_ms(name: str, rows: list[Row]) -> dict[str, float]:
    """A decode step is a graph; a prefill step is launched by the host, which may be what it waits for."""
    device = sum(row["launches"] * row["us"] for row in rows) / 1e3
    host = 0.0 if name.startswith("decode") else 1e3 * A["host"] * sum(row["launches"] for row in rows)
    return {"device_ms": device, "host_ms": host, "ms": max(device, host)}


def losses(rows: list[Row]) -> list[Row]:
    """By kernel: ms beyond what its bytes take at a copy's speed or its operations at the tensor cores' peak."""
    found: dict[str, Row] = {}
    for row in rows:
        peak = row["useful"] / (A[row["tensor"]] * A["clock"] * MULTIPROCESSORS)
        floor = 1e6 * max(row["bytes"] / A["copy"], peak)
        launch = row["start_us"] + row["gap_us"]
        one = found.setdefault(row["kernel"], {"kernel": row["kernel"], "launches": 0, "ms": 0.0, "lost_ms": 0.0,
                                               "launch_ms": 0.0})  # fmt: skip
        one["launches"] += row["launches"]
        one["ms"] += row["launches"] * row["us"] / 1e3
        one["lost_ms"] += row["launches"] * (row["us"] - floor) / 1e3
        one["launch_ms"] += row["launches"] * launch / 1e3
    ranked = sorted(found.values(), key=lambda one: -one["lost_ms"])
    return [{key: round(n, 4) if isinstance(n, float) else n for key, n in one.items()} for one in ranked]


# --------------------------------------------------------------------------------------------------------------------
# Counting and compiling
# --------------------------------------------------------------------------------------------------------------------


def counted(known: dict[str, Row]) -> tuple[dict[str, list[Row]], dict[str, Row], dict[str, float]]:
    """By step its launches, those alike in one row; the kernels compiled, by the first digits of Triton's key; and the
    hardware's limit of each step, in bytes (decode) or seconds (prefill)."""
    import rank_step
    from support import step_launches, stub_driver  # type: ignore[import-not-found]

    steps: dict[str, list[Row]] = {}
    limits: dict[str, float] = {}
    with stub_driver.installed() as gpu:
        model = step_launches.rank_of_eight(gpu)
        weights = rank_step.weights_of(model)
        for name, shape in STEPS.items():
            step = step_launches.step_of(model, *shape)
            gpu.launches.clear()
            step()
            steps[name] = rows_of(gpu.launches, shape)
            b, new, context = shape
            if context:
                limits[name] = rank_step.decode_bytes(model, weights, b, context)
            else:
                linears, attention = rank_step.prefill_flops(model, weights, new)
                peak = MULTIPROCESSORS * 1.83e9
                nbytes = weights.always + weights.routed * rank_step.chosen(model.args, new)
                limits[name] = max(nbytes / A["copy"], linears / (A["fp8"] * peak) + attention / (A["bf16"] * peak))
        sources = dict(gpu.sources)
    wanted = {row["compiled"] for rows in steps.values() for row in rows if row.get("compiled")}
    kernels = {key: known[key] for key in wanted if key in known}
    for key, source in sources.items():
        if key[:16] in wanted - set(kernels):
            kernels[key[:16]] = compile_counts(*source)
            print(kernels[key[:16]], flush=True, file=sys.stderr)
    return steps, dict(sorted(kernels.items(), key=lambda item: (item[1]["kernel"], item[0]))), limits


def compile_counts(source: Any, target: Any, options: Any) -> Row:
    import triton

    from lib import sass

    compiled = triton.compile(source, target=target, options=options)
    return {"kernel": source.fn.fn.__name__, **sass.counts(compiled)}


def rows_of(launches: list[Any], shape: tuple[int, int, int]) -> list[Row]:
    alike: Counter[str] = Counter()
    first: dict[str, Any] = {}
    for launch in launches:
        key = repr((launch.name, launch.grid, launch.arguments, launch.key, launch.stream))
        alike[key] += 1
        first.setdefault(key, launch)
    rows = []
    for key, launch in first.items():
        work = work_of(launch, shape)
        row = {
            "kernel": launch.name, "launches": alike[key], "compiled": launch.key[:16] or None,
            "grid": " x ".join(map(str, launch.grid)), "side": bool(launch.stream),
            "dependent": bool(launch.options.get("launch_pdl")),
            "bytes": round(work.nbytes), "flops": round(work.flops), "useful": round(work.useful),
            "tensor": work.kind,
            "cache_bytes": round(work.cache_bytes or work.nbytes), "programs": round(work.programs, 1),
            "trips": round(work.trips, 2), "tiles": work.tiles, "trips_known": work.known,
            "specialised": bool(launch.constants.get("SPECIALISED")),
            "serial": launch.constants.get("STAGES") == 1,
        }  # fmt: skip
        usual = USUAL | {"cache_bytes": row["bytes"]}
        rows.append({name: value for name, value in row.items() if name not in usual or usual[name] != value})
    return rows


def results(steps: dict[str, list[Row]], kernels: dict[str, Row], limits: dict[str, float]) -> Row:
    found = {}
    for name, rows in steps.items():
        compiled = [kernels.get(row.get("compiled", "")) for row in rows]
        predicted = [USUAL | row | predict(row, known) for row, known in zip(rows, compiled, strict=True)]
        at_peak = [row | predict(row, known, A["memory"]) for row, known in zip(rows, compiled, strict=True)]
        decode = name.startswith("decode")
        limit = {"limit_bytes": limits[name]} if decode else {}
        limit["limit_ms"] = 1e3 * (limits[name] / A["copy"] if decode else limits[name])
        if decode:
            limit["limit_at_peak_ms"] = 1e3 * limits[name] / A["memory"]
        found[name] = {
            "launches": sum(row["launches"] for row in rows), **step_ms(name, predicted), **limit,
            "ms_at_peak": step_ms(name, at_peak)["ms"], "target_ms": TARGET_MS[name], "losses": losses(predicted),
            "rows": [row | {key: one[key] for key in ("bound", "us")}
                     for row, one in zip(rows, predicted, strict=True)],
        }  # fmt: skip
    kinds = {"steps": "predicted, from counted launches, bytes and operations", "kernels": "compiled"}
    assumed = {name: one._asdict() for name, one in ASSUMED.items()}
    return {"kinds": kinds, "assumed": assumed, "kernels": kernels, "steps": found}


def table(found: Row) -> str:
    lines = []
    for name, step in found["steps"].items():
        tokens = STEPS[name][0] * STEPS[name][1]
        over = step["ms"] / step["target_ms"]
        said = "met" if over <= 1 else f"missed: {over:.2f} ×"
        lines.append([
            name + (", 4k before" if name.startswith("decode") else ""), f"{step['launches']:,}",
            f"{step['limit_ms']:.2f}", f"{step['ms']:.1f} ({step['ms_at_peak']:.1f})", f"{step['target_ms']:.1f}",
            said, f"{1e3 * tokens / step['ms']:,.0f}",
        ])  # fmt: skip
    header = ["a step of one rank", "launches", "limit, ms", "predicted, ms (at 4.8 TB/s)", "target, ms",
              "prediction against target", "tok/s predicted"]  # fmt: skip
    return report.table(header, lines)


def losses_table(found: Row, most: int = 10) -> str:
    steps = {name: {one["kernel"]: one for one in step["losses"]} for name, step in found["steps"].items()}
    shares: Counter[str] = Counter()
    for name, by_kernel in steps.items():
        for kernel, one in by_kernel.items():
            shares[kernel] += one["lost_ms"] / found["steps"][name]["ms"] / len(steps)
    lines = []
    for kernel, _ in shares.most_common(most):
        cells = [steps[name].get(kernel) for name in steps]
        shown = [f"{one['lost_ms']:.2f} ({one['launch_ms']:.2f})" if one else "–" for one in cells]
        lines.append([f"`{kernel}`", *shown])
    return report.table(["ms lost", *steps], lines)


def assumptions_table(found: Row) -> str:
    rows = [[name, f"{one['value']:.4g}", one["unit"], one["source"]] for name, one in found["assumed"].items()]
    return report.table(["assumed", "", "unit", "source"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", help="JSON file for the results, whose compiled counts are used again")
    parser.add_argument("--compile", metavar="KERNEL", help="compile the kernels of this name, print their counts")
    options = parser.parse_args()
    old: Row = {}
    if options.output and Path(options.output).exists():
        old = json.loads(Path(options.output).read_text())["results"]["kernels"]
    if options.compile:
        counts = sample(options.compile)
        print(json.dumps(counts) if counts else f"no kernel {options.compile} in a step that decodes one token")
        return int(not counts)
    found = results(*counted(old))
    print(table(found), losses_table(found), sep="\n\n")
    report.save(options.output, found, kind="predicted")
    return 0


def sample(kernel: str) -> dict[str, Row]:
    """The counts of one kernel as a small step launches it, by key."""
    from support import step_launches, stub_driver

    with stub_driver.installed() as gpu:
        step_launches.step_of(step_launches.rank_of_eight(gpu), *STEPS["decode 1"])()
        sources = {key: source for key, source in gpu.sources.items() if gpu.compilations[key] == kernel}
    return {key[:16]: compile_counts(*source) for key, source in sources.items()}


if __name__ == "__main__":
    sys.exit(main())
