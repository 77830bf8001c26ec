"""Runs the conformance suite on this engine with a known mistake in it, one mistake after another, and counts how many
fail the suite and how many it names.

    python tests/mutation/conformance_suite.py [--only NAME …] [--json FILE]

A mutant is text of inference/ changed in a copy, as in mutants.py; its values are compared with those of
conformance/exact_network.py, which shares no code with inference/. Each is judged twice: by its logits alone, and by
all named activations. Exit status 0 if every mutant fails the suite.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "conformance"))
sys.path.append(str(ROOT / "benchmarks"))
sys.path.append(str(ROOT / "tests"))
from lib import report

import check_port
import goldens
from families import FAMILIES
from hashed_weights import write_checkpoint
from judge import Unusable
from mistakes import MISTAKES
from mutation.mutants import MUTANTS, Mutant

NAMED = """
routing-group-max routing-group-sum routing-no-groups routing-masked-with-zero routing-bias-in-weights
routing-bias-left-out routing-bias-before-sigmoid routing-softmax routing-sigmoid routing-not-normalised
routing-normalised routing-normalised-over-all routing-scale-left-out routing-scale-twice routing-scale-normalised-only
moe-shared-scaled moe-shared-left-out moe-gate-and-up moe-weights-of-others moe-sum-in-bfloat16 moe-first-dense-layers
rope-backwards rope-half rope-key-not-rotated rope-wrong-query-part rope-wrong-key-part rope-frequencies-of-head
yarn-left-out yarn-by-context-limit yarn-ramp-turned-round yarn-no-ramp yarn-betas-swapped yarn-unrounded-bounds
yarn-original-length
mscale-once mscale-left-out mscale-not-read mscale-in-the-angles mla-scale-without-rope
norm-eps norm-inner-eps norm-of-queries-left-out norm-of-latents-left-out norm-wrong-one norm-final-left-out
norm-in-the-residual
mla-kv-b-order mla-kv-b-heads mla-mask
mtp-concat-order mtp-norms-swapped mtp-before-the-final-norm mtp-final-norm-twice mtp-main-norm mtp-layer-61
weights-gate-and-up weights-enorm-and-hnorm fp8-inverse-scale
""".split()  # of mutants.py; those of W8A8 stand below
W8A8 = """
fp8-scale-per-token fp8-ue8m0-nearest fp8-ue8m0-after-division fp8-ue8m0-not-reached
fp8-ue8m0-fused-not-reached fp8-sum-in-bfloat16 fp8-activation-scale-left-out fp8-silently-w8a16
""".split()
OWN = (  # what rounds to bfloat16, in a run of float32, where mutants.py has the bug in a run of bfloat16
    ("routing-bias-rounded", "ops/reference.py", "choice = scores if bias is None else scores + bias",
     "choice = scores if bias is None else scores + bias.bfloat16().float()", "", "the gate's bias in bfloat16"),
    ("routing-in-bfloat16", "ops/reference_backend.py", "return self.route(self.project_float32(x, w), bias, rule)",
     "return self.route(self.project_float32(x, w).bfloat16().float(), bias, rule)", "", "router logits in bfloat16"),
    ("moe-silu-in-bfloat16", "ops/reference.py", "y = (F.silu(gate.float()) * up.float()).to(gate.dtype)",
     "y = F.silu(gate).bfloat16().float() * up", "", "silu(gate) in bfloat16"),
    ("rope-positions-in-bfloat16", "model.py", "angle = positions.float().unsqueeze(-1) * self.inv_freq",
     "angle = positions.bfloat16().float().unsqueeze(-1) * self.inv_freq", "", "positions in bfloat16"),
    ("norm-logits-in-bfloat16", "model.py", "self.ops.project_float32(hidden, shard) for shard in self.head_shards]",
     "self.ops.project_float32(hidden, shard).bfloat16().float() for shard in self.head_shards]", "", "logits in bfloat16"),
    ("norm-rounded-twice", "ops/reference.py", "return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)",
     "return F.rms_norm(x.float(), weight.shape, None, eps).bfloat16().to(x.dtype) * weight", "", "a norm rounded twice"),
    ("mla-scores-in-bfloat16", "ops/reference.py", "scores = _heads_matmul(rows, k.mT) * scale",
     "scores = _heads_matmul(rows, k.mT).bfloat16().float() * scale", "", "scores in bfloat16"),
)  # fmt: skip
POINTS = ("logits", "points")


class Judged(NamedTuple):
    name: str
    bug: str
    format: str
    fails: bool
    error: str  # why it gave nothing, if so
    named: dict[str, list[str]]  # mistakes named, by what was given: logits, or points as well


def mutants() -> list[tuple[Mutant, str]]:
    """Each mutant with the format that its run has."""
    known = {m.name: m for m in MUTANTS}
    rows = [(known[name], "float32") for name in NAMED] + [(known[name], "w8a8") for name in W8A8]
    return rows + [(Mutant(*row), "float32") for row in OWN]


def start(mutant: Mutant | None, format: str, families: list[str], checkpoints: Path, scratch: Path) -> int:
    """Has the engine, with the mutant's bug, answer for families, in a process of its own that has imported nothing of
    the engine; its id. FAMILY.safetensors in `scratch` is its answer, FAMILY.error is there where it gave none."""
    scratch.mkdir()
    if (child := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            _answer_all(mutant, format, families, checkpoints, scratch)
        os._exit(0)
    return child


def _answer_all(mutant: Mutant | None, format: str, families: list[str], checkpoints: Path, scratch: Path) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (300, 300))
    for folder in ("inference", "conformance"):
        shutil.copytree(ROOT / folder, scratch / folder, ignore=shutil.ignore_patterns("__pycache__"))
    if mutant:
        file = scratch / "inference" / mutant.file
        file.write_text(mutant.apply(file.read_text()))
    sys.path[:] = [p for p in sys.path if Path(p) != ROOT / "inference"]
    spec = importlib.util.spec_from_file_location("engine_adapter", scratch / "conformance" / "adapters" / "engine.py")
    assert spec and spec.loader
    adapter: Any = importlib.util.module_from_spec(spec)
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            spec.loader.exec_module(adapter)
        except Exception as e:
            for family in families:
                (scratch / f"{family}.error").write_text(f"{type(e).__name__}: {e}")
            return
        for family in families:
            try:
                mode = "w8a8" if format == "w8a8" else "float32"
                answer = adapter.answer(checkpoints / family, goldens.prompts()[family], mode, points=True)
                save_file({name: t.contiguous() for name, t in answer.items()}, scratch / f"{family}.safetensors")
            except Exception as e:
                (scratch / f"{family}.error").write_text(f"{type(e).__name__}: {e}"[:200])


def judged(folder: Path, format: str, families: list[str], points: bool) -> check_port.Report:
    """The suite's report on such a folder. Raises Unusable if there is nothing in it."""

    def port(family: str, _: Path, __: list[int]) -> dict[str, torch.Tensor]:
        if not (folder / f"{family}.safetensors").exists():
            error = folder / f"{family}.error"
            raise Unusable(error.read_text() if error.exists() else "the process ended")
        found = load_file(folder / f"{family}.safetensors")
        return {name: t for name, t in found.items() if points or name in ("logits", "mtp.0.logits")}

    return check_port.check(port, format, families, folder.parent / "checkpoints")


def judge(wanted: list[tuple[Mutant, str]], jobs: int, families: list[str]) -> Iterator[Judged]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Path(folder) / "checkpoints"
        for family in families:
            write_checkpoint(family, checkpoints / family)
        sound: list[tuple[Mutant | None, str]] = [(None, format) for format in sorted({f for _, f in wanted})]
        waiting = [(mutant, format, Path(folder) / f"{i}") for i, (mutant, format) in enumerate([*sound, *wanted])]
        running: list[tuple[Mutant | None, str, Path, int]] = []
        while waiting or running:
            while waiting and len(running) < jobs:
                mutant, format, scratch = waiting.pop(0)
                child = start(mutant, format, families_for(mutant, format, families), checkpoints, scratch)
                running.append((mutant, format, scratch, child))
            mutant, format, scratch, child = running.pop(0)
            os.waitpid(child, 0)
            row = _judged(mutant, format, families_for(mutant, format, families), scratch)
            shutil.rmtree(scratch)
            if mutant:
                yield row
            else:
                assert not row.fails, f"without a mistake: {row}"


def families_for(mutant: Mutant | None, format: str, families: list[str]) -> list[str]:
    """Those that can show the bug: FP8's for bugs of FP8, the others for the rest. A run without a bug has all."""
    of_fp8 = format == "w8a8" or (mutant is not None and mutant.name.startswith("fp8"))
    return [f for f in families if mutant is None or f.endswith("fp8") == of_fp8]


def _judged(mutant: Mutant | None, format: str, families: list[str], scratch: Path) -> Judged:
    named, fails, error = {}, False, ""
    for given in POINTS:
        try:
            found = judged(scratch, format, families, given == "points")
            named[given], fails = [n.name for n in found.named], fails or not all(row.passed for row in found.rows)
            error = next((row.error for row in found.rows if row.error), "")
        except Unusable as e:
            named[given], fails, error = [], True, str(e)
    name, bug = (mutant.name, mutant.bug) if mutant else ("", "")
    return Judged(name, bug, format, fails, error.replace(str(scratch.parent), ""), named)


def is_named(row: Judged, given: str) -> bool:
    """Whether the mistake itself is the first that the report names; where another mistake has the very same effect, it
    counts by its sentence."""
    same = SAME_EFFECT.get(row.name, row.name)
    return row.named[given][:1] == [same]


SAME_EFFECT = {  # mutants that compute what a mistake of another name computes
    "weights-enorm-and-hnorm": "mtp-norms-swapped", "weights-gate-and-up": "moe-experts-gate-and-up",
    "norm-eps": "norm-attention-eps",
    "fp8-ue8m0-not-reached": "fp8-ue8m0-experts-not-reached", "fp8-silently-w8a16": "fp8-experts-silently-w8a16",
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutants by how their names begin")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--jobs", type=int, default=2, help="mutants that are run at a time (default: 2)")
    parser.add_argument("--json", metavar="FILE", help="where the counts go, with date and machine")
    options = parser.parse_args()
    wanted = [(m, f) for m, f in mutants() if not options.only or m.name.startswith(tuple(options.only))]
    began, rows = time.monotonic(), []
    for row in judge(wanted, options.jobs, options.families):
        rows.append(row)
        said = "  ".join(f"{given}: {', '.join(row.named[given]) or '–'}" for given in POINTS)
        print(f"{'fails' if row.fails else 'PASSES':7}{row.name:32}{said}  {row.error[:60]}", flush=True)
    counts = {given: sum(is_named(row, given) for row in rows) for given in POINTS}
    fails = sum(row.fails for row in rows)
    print(f"{fails} of {len(rows)} fail; named by logits {counts['logits']}, by points {counts['points']}; {time.monotonic() - began:.0f} s")
    if options.json:
        mutant_rows = {
            row.name: {"bug": row.bug, "is": SAME_EFFECT.get(row.name, row.name), "format": row.format, "fails": row.fails, "error": row.error, "named": row.named}
            for row in rows
        }
        traps = {m.name: {"says": m.says, "signature": m.signature} for m in MISTAKES.values()}
        results = {"of": len(rows), "fail": fails, "named_by_logits": counts["logits"], "named_by_points": counts["points"],
                   "known": len(MISTAKES), "mutants": mutant_rows, "mistakes": traps}  # fmt: skip
        report.save(options.json, results, "python tests/mutation/conformance_suite.py --json benchmarks/results/conformance.json", "counted")
    return int(fails < len(rows))


if __name__ == "__main__":
    sys.exit(main())
