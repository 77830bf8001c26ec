"""Every kind of broken checkpoint is refused by everyone who must, in one line, and nothing is written."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoint.atomic import TEMPORARY
from checkpoint.cast import cast
from checkpoint.check import check
from checkpoint.convert import convert
from checkpoint.directory import Checkpoint, choose_args
from checkpoint.load import load_into
from checkpoint.manifest import verify
from checkpoint.report import CHECKS
from core.errors import UserError
from core.numerics import Numerics
from engine.engine import Engine
from model import Transformer
from parallel.group import Group
from support import crash_points
from support import damaged_checkpoints as damage
from support.damaged_checkpoints import KINDS, good_checkpoint
from text.tokenizer import Tokenizer

GOOD = ("fp8", "ue8m0", "bf16", "converted", "cast", "upstream")
CPU = "cpu"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("good")
    for name in GOOD:
        good_checkpoint(folder / name, name)
    return {name: folder / name for name in GOOD}


@pytest.fixture(scope="module")
def targets(good, tmp_path_factory) -> dict[str, Path]:
    """What was converted and cast before, which nobody may touch."""
    folder = tmp_path_factory.mktemp("targets")
    convert(good["fp8"], folder / "convert", 2)
    convert(good["cast"], folder / "convert a cast", 2)
    cast(good["fp8"], folder / "cast", CPU)
    return {name: folder / name for name in ("convert", "convert a cast", "cast")}


def visible(folder: Path) -> dict[str, str]:
    """The files that count, by hash: finished parts of a run that was cut short may wait under temporary names."""
    return {name: digest for name, digest in crash_points.hashes(folder).items() if not name.startswith(TEMPORARY)}


def config_of(folder: Path, good: dict[str, Path]) -> Path | None:
    """For a directory that has no config of its own by nature."""
    upstream = good["upstream"]
    return upstream.with_name("upstream.json") if list(folder.glob("model?-mp*")) and folder.name == "upstream" else None


def load(folder: Path, config: Path | None) -> None:
    """As generate.py does it; of directories for ranks, one rank after the other."""
    if not list(folder.glob("model*-mp*")):
        Engine.from_pretrained(folder, chat=True, max_model_len=64, max_num_seqs=1, n_pages=4)
        return
    for rank in range(2):
        checkpoint = Checkpoint(folder)
        args = choose_args(checkpoint, config)
        Tokenizer(folder, args.vocab_size)
        group = Group(rank, 2)
        numerics = Numerics(torch.bfloat16, experts=checkpoint.experts(2))
        model = Transformer(args, numerics, group, mtp=checkpoint.has_mtp)
        load_into(model, checkpoint, progress=False)


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as e:
        action()
    return str(e.value)


def refusals(who: str, folder: Path, good: dict[str, Path], targets: dict[str, Path]) -> list[str]:
    """What is said to a broken directory, at least one line."""
    config = config_of(folder, good)
    if who == "check":
        report = check(folder, config=config)
        assert not report.ok
        return [str(finding.problem) for finding in report.findings if finding.fault]
    if who == "verify":
        try:
            return [str(finding) for finding in verify(folder)]
        except UserError as e:
            return [str(e)]
    if who == "load":
        return [refusal(lambda: load(folder, config))]
    target = targets["convert a cast" if who == "convert" and folder.name == "cast" else who]
    before = visible(target)
    try:
        if who == "convert":
            return [refusal(lambda: convert(folder, target, 2))]
        return [refusal(lambda: cast(folder, target, CPU))]
    finally:
        assert visible(target) == before


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", KINDS)
def test_refused(name, good, targets, tmp_path, capsys):
    kind = KINDS[name]
    folder = Path(shutil.copytree(good[kind.good], tmp_path / kind.good))
    said = kind.damage(folder)
    if name == "unreadable file" and os.access(damage.files(folder)[1], os.R_OK):
        pytest.skip("the superuser reads everything")
    names = [said] if isinstance(said, str) else list(said or ())
    for who in kind.by:
        lines = refusals(who, folder, good, targets)
        assert all(line.isprintable() and len(line) < 2000 for line in lines), lines
        texts = names if who == "verify" else [*names, *kind.says]  # it compares hashes, and says so
        assert any(all(text in line for text in texts) for line in lines), (who, names, kind.says, lines)


def test_enough_kinds():
    assert len(KINDS) >= 200 and {kind.good for kind in KINDS.values()} == set(GOOD)


@pytest.mark.parametrize("name", GOOD)
def test_a_good_one_passes(name, good, targets, tmp_path):
    """The control: nobody refuses what nothing was done to."""
    folder, config = good[name], config_of(good[name], good)
    for quick in (False, True):
        report = check(folder, quick, config)
        assert report.ok and not report.findings, list(report.lines())
        assert ((report.looked | report.absent).keys() == set(CHECKS)) != quick
        assert not report.looked.keys() & report.absent.keys()
    load(folder, config)
    if name in ("converted", "cast"):
        assert not list(verify(folder))
    if name in ("fp8", "ue8m0"):
        cast(folder, tmp_path / "cast", CPU)
        assert check(tmp_path / "cast").ok
    if name in ("fp8", "ue8m0", "bf16"):
        for ranks in (1, 2):
            convert(folder, tmp_path / "converted", ranks)
        assert check(tmp_path / "converted").ok
