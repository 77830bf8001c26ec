"""Checks another implementation of the DeepSeek-V3 family: runs its command on small models of every family and says
which pass, and of which known mistake a failure has the values.

    python conformance/check_port.py --format float32 --command "python my_port.py {checkpoint} {input} {output}"

The command gets a checkpoint directory, a JSON file {"family", "tokens", "format"}, and the name of a file to write:
safetensors with "logits" (T, V), or fewer rows, the last ones; optionally "mtp.0.logits" (T - 1, V) and any activation
by the names of docs/porting.md. JSON {"logits": [[…]]} and one .npy array are read too. Exit status: 0 all pass, 1 some
do not, 2 the command or what it wrote is unusable.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

import goldens
from families import FAMILIES
from hashed_weights import write_checkpoint
from judge import FORMATS, KINDS, Finding, Named, Unusable, compare, diagnose, expected, is_w8a8, kind
from mistakes import MISTAKES
from mistakes.names import IN_VERIFY

PLACES = ("{checkpoint}", "{input}", "{output}")
Port = Callable[[str, Path, list[int]], dict[str, Tensor]]  # family, checkpoint and tokens to named values


class Row(NamedTuple):
    family: str
    findings: list[Finding]
    error: str = ""  # why there are none

    @property
    def passed(self) -> bool:
        return not self.error and all(f.passed for f in self.findings)

    @property
    def first(self) -> Finding | None:
        """The first point, in the order of execution, that is wrong."""
        return next((f for f in self.findings if not f.passed), None)


class Report(NamedTuple):
    format: str
    rows: list[Row]
    named: list[Named]  # mistakes whose values these are, the likeliest first

    def as_json(self) -> dict[str, Any]:
        rows = {
            row.family: {
                "outcome": "error" if row.error else "pass" if row.passed else "fail",
                "error": row.error,
                "points": {
                    f.point: {"error": f.error, "position": f.position, "passed": f.passed} for f in row.findings
                },
            }
            for row in self.rows
        }
        return {"format": self.format, "families": rows, "named": [named._asdict() for named in self.named]}


def check(port: Port, format: str, families: list[str], checkpoints: Path) -> Report:
    """Runs a port on every family. Checkpoints are made where they are missing. Raises Unusable if no family gave
    anything to compare."""
    rows, answers = [], {}
    for family in families:
        folder = checkpoints / family
        if not (folder / "config.json").exists():
            write_checkpoint(family, folder)
        try:
            answer = port(family, folder, goldens.prompts()[family])
            if "logits" not in answer:
                raise Unusable(f"there is no tensor 'logits' among {', '.join(sorted(answer)[:5]) or 'nothing'}")
            findings = compare(answer, expected(family, is_w8a8(family, format)), family, format)
            answers[family] = answer
            rows.append(Row(family, findings))
        except Unusable as e:
            rows.append(Row(family, [], str(e)))
    if not answers:
        raise Unusable(rows[0].error if len({row.error for row in rows}) == 1 else f"{rows[0].family}: {rows[0].error}")
    failed = [row.family for row in rows if row.family in answers and not row.passed]
    return Report(format, rows, diagnose(answers, format, failed))


def command_port(command: str, format: str, seconds: float) -> Port:
    """A port that is a command of its user's."""
    words = shlex.split(command)
    if not words:
        raise Unusable("--command is empty")
    if not any(place in word for word in words for place in PLACES):
        words += PLACES

    def port(family: str, folder: Path, tokens: list[int]) -> dict[str, Tensor]:
        with tempfile.TemporaryDirectory() as scratch:
            given, written = Path(scratch, "input.json"), Path(scratch, "output.safetensors")
            given.write_text(json.dumps({"family": family, "tokens": tokens, "format": format}))
            values = dict(zip(PLACES, map(str, (folder.resolve(), given, written)), strict=True))
            run = [filled(word, values) for word in words]
            try:
                done = subprocess.run(run, capture_output=True, text=True, errors="replace", timeout=seconds)
            except OSError as e:
                raise Unusable(f"{run[0]} cannot be started: {e.strerror}") from None
            except subprocess.TimeoutExpired:
                raise Unusable(f"the command took more than {seconds:g} s (--timeout)") from None
            if done.returncode:
                last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
                raise Unusable(f"the command ended with status {done.returncode}: {last[:300]}")
            return read_answer(written)

    return port


def filled(word: str, values: dict[str, str]) -> str:
    for place, value in values.items():
        word = word.replace(place, value)
    return word


def read_answer(path: Path) -> dict[str, Tensor]:
    """What a port wrote, as safetensors, JSON or one .npy array, by its first bytes."""
    if not path.exists():
        raise Unusable("the command wrote nothing to {output}")
    data = path.read_bytes()
    try:
        if data[:1] in (b"{", b"["):
            raw = json.loads(data)
            return {
                name: torch.tensor(value) for name, value in (raw if isinstance(raw, dict) else {"logits": raw}).items()
            }
        if data[:6] == b"\x93NUMPY":
            return {"logits": torch.from_numpy(np.load(path))}
        return load(data)
    except (ValueError, TypeError, RuntimeError, SafetensorError) as e:
        raise Unusable(f"what the command wrote cannot be read: {str(e).splitlines()[0][:200]}") from None


def text(report: Report) -> str:
    """The scoring table, and what is wrong."""
    lines = [f"{'family':15}" + "".join(f"{name:>9}" for name in KINDS) + "   first wrong point"]
    for row in report.rows:
        cells = []
        for name in KINDS:
            own = [f for f in row.findings if kind(f.point) == name]
            cells.append("–" if not own else "pass" if all(f.passed for f in own) else "FAIL")
        first = row.first
        says = f"error: {row.error}" if row.error else ""
        if first:
            chosen = (
                "other experts"
                if first.error == float("inf")
                else f"off by {first.error:.1e}, allowed {first.tolerance:.0e}"
            )
            says = f"{first.point}, position {first.position}: {chosen}"
        lines.append(f"{row.family:15}" + "".join(f"{cell:>9}" for cell in cells) + f"   {says}")
    n = sum(row.passed for row in report.rows)
    lines.append(f"{n} of {len(report.rows)} families pass ({report.format})")
    for name, families, _ in report.named:
        lines.append(f"{', '.join(families)}: these are the values of a known mistake, {name}: {MISTAKES[name].says}")
        other = f" (in verify.py: {IN_VERIFY[name]})" if IN_VERIFY.get(name, name) != name else ""
        lines.append(f"    it shows in: {MISTAKES[name].signature}{other}")
    explained = {family for named in report.named for family in named.families}
    if unknown := [
        row.family for row in report.rows if not row.passed and not row.error and row.family not in explained
    ]:
        lines.append(
            f"{', '.join(unknown)}: no known mistake has these values. The first wrong point says where to look;"
        )
        lines.append("    if it is the logits, write more points: docs/porting.md names them.")
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Ends with one line and status 2, without the usage."""
        self.exit(2, f"error: {message} (--help lists the flags)\n")


def main() -> int:
    parser = Parser(description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n")[2],
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--command", required=True, help="with {checkpoint}, {input} and {output}, or these are added")
    parser.add_argument(
        "--format", choices=FORMATS, default="float32", help="what the port computes in (default: float32)"
    )
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--checkpoints", type=Path, help="where the checkpoints are kept (default: made anew)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one family (default: 600)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the report goes as JSON")
    options = parser.parse_args()
    try:
        port = command_port(options.command, options.format, options.timeout)
        with tempfile.TemporaryDirectory() as scratch:
            report = check(port, options.format, options.families, options.checkpoints or Path(scratch))
        if options.json:
            options.json.write_text(json.dumps(report.as_json(), indent=2) + "\n")
    except (Unusable, ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(text(report))
    return int(not all(row.passed for row in report.rows))


if __name__ == "__main__":
    sys.exit(main())
