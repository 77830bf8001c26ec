"""What each program that opens a checkpoint says of a directory: one call for all of them."""

from collections.abc import Callable
from pathlib import Path

import pytest

import plan as plan_command
from checkpoint.cast import cast
from checkpoint.check import check
from checkpoint.convert import convert
from core.errors import UserError
from engine.engine import Engine

Program = Callable[[Path, Path], object]


def load(folder: Path, _: Path) -> None:
    """As generate.py and server.py do it."""
    Engine.from_pretrained(folder, device="cpu", max_model_len=64, max_num_seqs=1, n_pages=4)


def plan(folder: Path, _: Path) -> object:
    return plan_command.describe(plan_command.parse(["--ckpt-path", str(folder), "--device", "cpu"]))


def check_all(folder: Path, _: Path) -> None:
    report = check(folder)
    if not report.ok:
        raise UserError("\n".join(str(finding.problem) for finding in report.findings if finding.fault))


PROGRAMS: dict[str, Program] = {
    "load": load,
    "plan": plan,
    "check": check_all,
    "convert": lambda folder, out: convert(folder, out / "convert", 2),
    "cast": lambda folder, out: cast(folder, out / "cast", "cpu"),
}


def refusals(folder: Path, out: Path, programs: tuple[str, ...] = tuple(PROGRAMS)) -> dict[str, list[str]]:
    """By program, the lines it refuses a directory with, without the directory's path; all must refuse it. A program
    that has something to write writes to `out`."""
    said = {}
    for name in programs:
        with pytest.raises(UserError) as e:
            PROGRAMS[name](folder, out)
        said[name] = [line.replace(f"{folder}/", "").replace(str(folder), "DIR") for line in str(e.value).split("\n")]
    return said
