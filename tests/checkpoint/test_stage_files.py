"""convert.py --pipeline-parallel: every byte is in the files of one stage, any stages and ranks that they divide over
load them, and mistakes are one line."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import convert as command
from checkpoint.check import check
from checkpoint.convert import convert
from checkpoint.directory import Checkpoint
from checkpoint.load import load_into, plan_load
from checkpoint.manifest import Manifest, verify
from core.errors import CheckpointError, UserError
from core.numerics import Numerics
from core.sampling_params import SamplingParams
from core.stages import cut, divide
from engine.engine import Engine
from model import Transformer
from parallel.group import Group
from support import crash_points, fork_server
from support import processes as launch
from support.checkpoints import make_checkpoint
from support.damaged_checkpoints import whole
from support.families import FAMILIES, V3
from support.rank_weights import our_name, part

DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"
QUESTIONS = ["What is 17 + 25?", "Reverse the word maple."]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages") / "hf"
    make_checkpoint(folder, V3)
    return folder


@pytest.fixture(scope="module")
def two(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages of two ranks, the first with one layer."""
    folder = tmp_path_factory.mktemp("stages") / "out"
    convert(source, folder, 2, n_stages=2, layers="1,2")
    return folder


def stage_of(name: str, counts: list[int]) -> int:
    """Worked out apart from core/stages.py: which of the stages has a tensor, by our name."""
    top, number = name.split(".")[:2]
    if top == "layers":
        return next(s for s in range(len(counts)) if int(number) < sum(counts[: s + 1]))
    return 0 if top == "embed" else len(counts) - 1


def assert_round_trip(source: Path, target: Path, ranks: int, counts: list[int], config: dict, experts: str) -> None:
    """Reads every file with the safetensors library: each has its stage's tensors alone, and together they are the
    source, byte for byte."""
    held: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    for file in target.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            mark = f.metadata()
            place = int(mark["rank"]), int(mark["stage"])
            assert file.name.startswith(f"model{place[0]}-mp{ranks}-pp{place[1]}")
            assert (mark["ranks"], mark["experts"]) == (str(ranks), experts)
            tensors = held.setdefault(place, {})
            for name in f.keys():  # noqa: SIM118 (not a dict)
                assert name not in tensors and stage_of(name, counts) == place[1], name
                tensors[name] = f.get_tensor(name)
    assert held.keys() == {(rank, stage) for rank in range(ranks) for stage in range(len(counts))}
    for hf, tensor in whole(source).items():
        name = our_name(hf, config["num_hidden_layers"])
        for rank in range(ranks):
            wanted = part(name, tensor, rank, ranks, config["n_routed_experts"], experts)
            found = held[rank, stage_of(name, counts)].pop(name, None)
            assert (found is None) == (wanted is None), name
            if found is not None and wanted is not None:
                assert found.dtype == wanted.dtype and found.shape == wanted.shape, name
                assert torch.equal(found.view(torch.uint8), wanted.contiguous().view(torch.uint8)), name
    assert not any(held.values()), "tensors that are not in the source"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back(family: str, tmp_path: Path) -> None:
    config = FAMILIES[family]
    n = config["num_hidden_layers"]
    counts = [1, n - 1] if n % 2 else [1] * n
    make_checkpoint(tmp_path / "hf", config)
    convert(tmp_path / "hf", tmp_path / "out", 2, n_stages=len(counts), layers=",".join(map(str, counts)), max_file=1 << 19)
    experts = json.loads((tmp_path / "out" / "model-mp2.index.json").read_text())["experts"]
    assert_round_trip(tmp_path / "hf", tmp_path / "out", 2, counts, config, experts)
    assert list(verify(tmp_path / "out")) == []
    assert len(list((tmp_path / "out").glob("model1-mp2-pp1-0000*"))) > 1  # in several parts


def test_stages_are_those_of_a_run(source: Path, tmp_path: Path) -> None:
    """Unasked, layers are balanced as `--pp` balances them; and a run of as many stages keeps those of the files."""
    args = Checkpoint(source).args
    assert args is not None
    convert(source, tmp_path, 1, n_stages=2)
    counts = [len(stage.layers) for stage in divide(args, 2, mtp=True)]
    assert json.loads((tmp_path / "model-mp1.index.json").read_text())["stages"] == counts
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.layers_of_stages(args, 2, 2) == ",".join(map(str, counts))
    assert checkpoint.layers_of_stages(args, 2, 3) is checkpoint.layers_of_stages(args, 1, 1) is None
    assert Checkpoint(source).layers_of_stages(args, 1, 2) is None


@pytest.mark.parametrize("counts, ranks", [([1, 2], 2), ([2, 1], 2), ([3], 2), ([1, 1, 1], 4)])
def test_any_stages_load(two: Path, source: Path, counts: list[int], ranks: int) -> None:
    """As the files are cut, cut otherwise, by more ranks of a stage: weights are those of the original files; of two
    stages as converted, a rank reads its own files' layers."""
    for stage in cut(counts):
        for rank in range(ranks):
            found = []
            for folder in (two, source):
                checkpoint = Checkpoint(folder)
                assert checkpoint.args is not None
                group = Group(rank, ranks)
                num = Numerics(torch.float32, experts=Checkpoint(two).experts(2) or "whole")
                model = Transformer(checkpoint.args, num, group, mtp=True, stage=stage)
                if folder == two and (counts, ranks) == ([1, 2], 2):
                    own = f"model{rank}-mp2-pp{int(stage.is_last)}.safetensors"
                    read = {c.entry.name for c in plan_load(model, checkpoint) if c.entry.file.name != own}
                    assert read == ({"embed.weight"} if stage.is_last else set())
                load_into(model, checkpoint, progress=False)
                found.append(dict(model.named_parameters()))
            ours, theirs = found
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_ranks_that_the_files_do_not_divide_over(two: Path) -> None:
    checkpoint = Checkpoint(two)
    assert checkpoint.args is not None
    with pytest.raises(UserError, match=r"converted for 2 ranks, not 1 in each of 3 stages: --pp 3 takes 6, or convert for 1$"):
        checkpoint.partition(checkpoint.args, 1, stages=3)


def test_other_stages_take_the_place_of_the_first(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path, 2, n_stages=3)
    convert(source, tmp_path, 2)
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {"model0-mp2.safetensors", "model1-mp2.safetensors"}
    convert(source, tmp_path, 2, n_stages=2, layers="2,1")
    assert Manifest(tmp_path, 2).stages == [2, 1] and list(verify(tmp_path)) == []
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert faults(tmp_path) == []


def test_killed_at_any_moment(source: Path, tmp_path: Path) -> None:
    """Nothing loads until everything does, and the same command goes on where it was cut short."""
    action = functools.partial(convert, source, tmp_path / "out", 1, n_stages=2)
    log = crash_points.events(functools.partial(convert, source, tmp_path / "logged", 1, n_stages=2), tmp_path / "log")
    hashes, seen = crash_points.hashes(tmp_path / "logged"), set()
    for at in crash_points.moments(log, 6):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        crash_points.kill(action, at)
        try:
            Checkpoint(tmp_path / "out")
            assert faults(tmp_path / "out") == []
            seen.add(True)
        except UserError:
            seen.add(False)
        action()
        assert crash_points.hashes(tmp_path / "out") == hashes
    assert seen == {True, False}


def faults(folder: Path) -> list[str]:
    """What check_checkpoint says of config, files and tensors."""
    found = check(folder, quick=True).findings
    return [str(f.problem) for f in found if f.fault and f.check in ("config", "files", "tensors")]


def damage(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_stage_without_its_files(two: Path, tmp_path: Path) -> None:
    copy = damage(two, tmp_path)
    (copy / "model1-mp2-pp1.safetensors").unlink()
    checkpoint = Checkpoint(copy)
    assert checkpoint.args is not None
    with pytest.raises(CheckpointError, match=r"model1-mp2-pp1\.safetensors: missing, but model-mp2\.index\.json names it"):
        checkpoint.on_disk(0, 2)
    (copy / "model-mp2.index.json").unlink()
    with pytest.raises(CheckpointError, match="its manifest is missing; copy the directory or convert again"):
        Checkpoint(copy)


def test_files_of_another_stage(two: Path, tmp_path: Path) -> None:
    """Two stages' files that changed their names, and manifests that say what cannot be."""
    copy = damage(two, tmp_path)
    a, b = (copy / f"model0-mp2-pp{stage}.safetensors" for stage in (0, 1))
    index = copy / "model-mp2.index.json"
    manifest = json.loads(index.read_text())
    a.rename(copy / "x")
    b.rename(a)
    (copy / "x").rename(b)
    sizes = manifest["files"]
    sizes[a.name]["bytes"], sizes[b.name]["bytes"] = sizes[b.name]["bytes"], sizes[a.name]["bytes"]
    index.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="does not mark it as rank 0 of 2, stage 0 of 2, split experts"):
        Checkpoint(copy).on_disk(0, 2)
    for stages in ([1], [1, 2, 1], [3, 0], 2, ["1", "2"]):
        index.write_text(json.dumps(manifest | {"stages": stages}))
        with pytest.raises(CheckpointError, match="damaged"):
            Manifest(copy, 2)


def test_layers_that_are_not_the_config_s(two: Path, tmp_path: Path) -> None:
    """Stages in a manifest that are another model's are a fault of the checkpoint, not of a flag."""
    copy = damage(two, tmp_path)
    index = copy / "model-mp2.index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"stages": [1, 3]}))
    says = "model-mp2.index.json: stages of 1, 3 layers, but the model has 3"
    checkpoint = Checkpoint(copy)
    assert checkpoint.args is not None
    with pytest.raises(CheckpointError, match=says):
        checkpoint.layers_of_stages(checkpoint.args, 2, 2)
    assert faults(copy) == [f"{copy}/{says}"]


@pytest.mark.parametrize("flags, says", [
    ("--pipeline-parallel 4", "--pipeline-parallel 4: the model has 3 layers, fewer than stages"),
    ("--pipeline-parallel 0", "--pipeline-parallel is 0, expected at least 1"),
    ("--pp-layers 1,2", "--pp-layers needs --pipeline-parallel"),
    ("--pipeline-parallel 2 --pp-layers 2,2", "--pp-layers 2,2: these are 2 numbers, 4 together; expected 2 stages of 3 layers"),
])  # fmt: skip
def test_mistakes(source: Path, tmp_path: Path, flags: str, says: str) -> None:
    place = ["--hf-ckpt-path", str(source), "--save-path", "out", "--model-parallel", "2"]
    done = fork_server.run([sys.executable, command.__file__, *place, *flags.split()], cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr.splitlines()[-1], done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.trust
def test_the_demo_in_two_stages_of_two_ranks(tmp_path: Path) -> None:
    """Converted by the command and generated from by torchrun: the text is one rank's. Other numbers of ranks are
    refused in one line before a weight is read."""
    place = ["--hf-ckpt-path", str(DEMO), "--save-path", "out", "--model-parallel", "2", "--pipeline-parallel", "2"]
    done = fork_server.run([sys.executable, command.__file__, *place], cwd=tmp_path)
    assert done.returncode == 0 and "pipeline: 2 stages of 2 ranks" in done.stderr, done.stderr
    done = fork_server.run([sys.executable, command.__file__, "--verify", "out"], cwd=tmp_path)
    assert done.returncode == 0 and "4 weight files" in done.stderr and "all as it was written" in done.stderr
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(QUESTIONS))
    flags = ("--ckpt-path", tmp_path / "out", "--input-file", prompts, "--pp", 2, "--temperature", 0,
             "--max-new-tokens", 8, "--dtype", "float32", "--device", "cpu", "--threads", 1)  # fmt: skip
    four = subprocess.run(
        launch.torchrun(*flags, "--verify", ranks=4), env=launch.environment(), capture_output=True, text=True
    )
    engine = Engine.from_pretrained(DEMO, dtype="float32", device="cpu")
    alone = engine.generate([[{"role": "user", "content": q}] for q in QUESTIONS], SamplingParams(8, temperature=0))
    assert four.returncode == 0 and "pipeline: 2 stages of 2 ranks" in four.stderr, four.stderr
    assert four.stdout == "".join(f"Prompt: {q}\nCompletion: {r.text}\n\n" for q, r in zip(QUESTIONS, alone, strict=True))
    port = launch.free_port()
    ranks = [launch.start_rank(rank, 2, port, *flags) for rank in range(2)]
    said = [rank.communicate(timeout=100)[1] for rank in ranks]
    says = f"{tmp_path / 'out'}: converted for 2 ranks, not 1 in each of 2 stages: --pp 2 takes 4, or convert for 1"
    assert [rank.returncode for rank in ranks] == [2, 2] and launch.errors(said[0] + said[1]) == [f"error: {says}"]
    assert "loading" not in said[0]
