"""convert.py: every byte comes back, mistakes are found before anything is written, and a killed run leaves nothing."""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import convert as command
from checkpoint import transform
from checkpoint.atomic import PENDING, TEMPORARY, AtomicWriter
from checkpoint.convert import MAX_FILE, convert
from checkpoint.directory import Checkpoint
from checkpoint.manifest import HF_INDEX, read_manifests, verify
from checkpoint.reading import Reader
from core.errors import UserError
from support import crash_points, fork_server
from support.checkpoints import fp8_sizes, make_checkpoint
from support.damaged_checkpoints import drop, replace, whole
from support.families import FAMILIES, two_layers
from support.rank_weights import CONFIG, WIDE, our_name, part, write_upstream

SMALL = CONFIG | fp8_sizes(2) | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"
OTHERS = {
    "generation_config.json": "{}", "tokenizer.json": '{"a": 1}', "tokenizer_config.json": "{}", "LICENSE": "free",
    "special_tokens_map.json": "{}", "chat_template.jinja": "{{ x }}", "tokenization_x.py": "boom", "README.md": "#",
    "tiktoken.model": "m", "vocab.json": "{}", "merges.txt": "a b",
}  # fmt: skip
COPIED = {"config.json", *OTHERS} - {"LICENSE", "README.md", "tokenization_x.py"}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "fp8"
    make_checkpoint(folder, WIDE, fp8=True, shard_bytes=2 << 20)
    for name, text in OTHERS.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, Path]:
    """Two checkpoints of one config, for two ranks; small enough to be converted dozens of times."""
    folder = tmp_path_factory.mktemp("small")
    for seed, name in enumerate(("old", "new")):
        make_checkpoint(folder / name, SMALL, fp8=True, seed=seed, shard_bytes=1 << 20)
        (folder / name / "tokenizer.json").write_text("{}")
    return folder / "old", folder / "new"


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_round_trip(
    source: Path, target: Path, ranks: int, n_layers: int, n_experts: int, experts: str = "whole"
) -> None:
    """Reads the ranks' files with the safetensors library, puts them together and compares every byte."""
    assert json.loads((target / f"model-mp{ranks}.index.json").read_text())["experts"] == experts
    held: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
    for file in target.glob(f"model*-mp{ranks}*.safetensors"):
        rank = int(file.name.removeprefix("model").partition("-")[0])
        with safe_open(file, "pt") as f:
            mark = {"format": "deepseek-v3-ranks", "version": "2", "rank": str(rank), "ranks": str(ranks)}
            assert f.metadata() == mark | {"experts": experts}
            for name in f.keys():  # noqa: SIM118 (not a dict)
                assert name not in held[rank]
                held[rank][name] = f.get_tensor(name)
    tensors = {our_name(hf, n_layers): tensor for hf, tensor in whole(source).items()}
    for name, tensor in tensors.items():
        shares = [share.pop(name) for share in held if name in share]
        if ".experts." in name and experts == "whole":
            assert len(shares) == 1 and same_bytes(shares[0], tensor), name
        else:
            assert len(shares) == ranks, name
            parts = [part(name, tensor, rank, ranks, n_experts, experts) for rank in range(ranks)]
            assert all(same_bytes(a, b.contiguous()) for a, b in zip(shares, parts, strict=True)), name
            if parts[0].shape != tensor.shape:
                dim = next(d for d in range(tensor.dim()) if parts[0].shape[d] != tensor.shape[d])
                together = torch.cat([share.view(torch.uint8) for share in shares], dim=dim)
                assert torch.equal(together, tensor.view(torch.uint8)), name
    assert not any(held), "tensors that are not in the source"


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(("max_file", "experts"), [
    (MAX_FILE, "whole"), (MAX_FILE, "split"), (1 << 19, "whole"), (1 << 19, "split"),
])  # fmt: skip
def test_every_byte_comes_back(source, ranks, max_file, experts, tmp_path):
    convert(source, tmp_path, ranks, n_experts=8, max_file=max_file, experts=experts)
    assert_round_trip(source, tmp_path, ranks, WIDE["num_hidden_layers"], WIDE["n_routed_experts"], experts)
    names = {p.name for p in tmp_path.iterdir()}
    assert names > COPIED and not names & {"LICENSE", "README.md", "tokenization_x.py", HF_INDEX}
    files = names - COPIED - {f"model-mp{ranks}.index.json"}
    if max_file > 1 << 30:
        assert files == {f"model{rank}-mp{ranks}.safetensors" for rank in range(ranks)}
    else:
        for rank in range(ranks):
            parts = sorted(file for file in files if file.startswith(f"model{rank}-mp"))
            n = len(parts)
            assert n > 1 and parts == [f"model{rank}-mp{ranks}-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
        assert all((tmp_path / file).stat().st_size <= max_file for file in files)
    index = json.loads((tmp_path / f"model-mp{ranks}.index.json").read_text())
    assert "pending" not in index and index["files"].keys() == files


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back(family, tmp_path):
    config = two_layers(family)
    ranks = min(4, config["num_attention_heads"])
    make_checkpoint(tmp_path / "hf", config)
    convert(tmp_path / "hf", tmp_path / "out", ranks)
    assert_round_trip(tmp_path / "hf", tmp_path / "out", ranks, 2, config["n_routed_experts"], "split")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_demo_comes_back(ranks, tmp_path):
    convert(DEMO, tmp_path, ranks)
    config = json.loads((DEMO / "config.json").read_text())
    assert_round_trip(DEMO, tmp_path, ranks, config["num_hidden_layers"], config["n_routed_experts"])


@pytest.mark.parametrize("window", [1, 3000])
def test_windows_of_any_size(small, window, tmp_path, monkeypatch):
    monkeypatch.setattr(transform, "Reader", functools.partial(Reader, window))
    convert(small[0], tmp_path, 2)
    assert_round_trip(small[0], tmp_path, 2, 2, 4)


def test_a_tensor_larger_than_a_file_has_one_of_its_own(small, tmp_path):
    convert(small[0], tmp_path, 1, max_file=20_000)
    assert_round_trip(small[0], tmp_path, 1, 2, 4)
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            assert file.stat().st_size <= 20_000 or len(list(f.keys())) == 1


def test_a_checkpoint_in_one_file_and_behind_links(small, tmp_path):
    single = tmp_path / "single"
    single.mkdir()
    save_file(whole(small[0]), tmp_path / "blob")
    (single / "model.safetensors").symlink_to("../blob")
    (single / "config.json").symlink_to(small[0] / "config.json")
    convert(single, tmp_path / "out", 2)
    assert_round_trip(small[0], tmp_path / "out", 2, 2, 4)
    assert not (tmp_path / "out" / "config.json").is_symlink()


def test_without_the_mtp_module(small, tmp_path, capsys):
    copy = Path(shutil.copytree(small[0], tmp_path / "copy"))
    drop(copy, lambda name: ".layers.2." in name)
    convert(copy, tmp_path / "out", 2)
    assert f"warning: {copy} has no MTP module, though its config names one\n" in capsys.readouterr().err
    assert_round_trip(copy, tmp_path / "out", 2, 2, 4)
    assert not Checkpoint(tmp_path / "out").has_mtp


# Refusals: nothing is written ---------------------------------------------------------------------------------------


def refusal(source: Path, target: Path, ranks: int = 2, **options) -> str:
    """What convert says; it must not have left anything in a target that was not there before."""
    before = crash_points.hashes(target) if target.is_dir() else {}
    with pytest.raises(UserError) as e:
        convert(source, target, ranks, **options)
    assert (crash_points.hashes(target) if target.is_dir() else {}) == before
    assert "\n" not in str(e.value)
    return str(e.value).replace(str(target), "TARGET").replace(str(source), "SOURCE")


def test_wrong_numbers(small, tmp_path):
    out = tmp_path / "out"
    assert refusal(small[0], out, n_experts=256) == "--n-experts is 256, but config.json says 4"
    assert refusal(small[0], out, 3) == "num_attention_heads 4 does not divide by 3 ranks (it works with 1, 2)"
    assert refusal(small[0], out, 4) == (
        "self_attn.o_proj has 256 columns, which 4 ranks cannot share in whole 128-wide FP8 blocks (it works with 1, 2)"
    )
    assert refusal(small[0], out, 2, experts="split") == (
        "moe_intermediate_size is 128, which 2 ranks cannot share in whole 128-wide FP8 blocks (it works with 1); "
        "--experts whole works"
    )
    assert refusal(small[0], out, 0) == "the number of ranks is 0, expected at least 1"
    assert not out.exists()


def test_wrong_source(small, tmp_path):
    convert(small[0], tmp_path / "converted", 2)
    out = tmp_path / "out"
    assert refusal(tmp_path / "converted", out) == "SOURCE: already converted for ranks; give the Hugging Face checkpoint"
    write_upstream(small[0], tmp_path / "upstream", 2, SMALL)
    assert refusal(tmp_path / "upstream", out) == "SOURCE: already converted for ranks; give the Hugging Face checkpoint"
    assert refusal(tmp_path / "nothing", out) == "SOURCE: no such directory"
    copy = Path(shutil.copytree(small[0], tmp_path / "copy"))
    name = "model.layers.1.mlp.experts.3.down_proj.weight_scale_inv"
    file = replace(copy, name, lambda scale: scale * float("nan"))
    assert refusal(copy, out) == f"SOURCE/{file}: {name}: expected finite, positive scales, found nan at [0, 0]"
    (copy / "config.json").unlink()
    assert refusal(copy, out) == "SOURCE/config.json: missing"
    assert not out.exists()


def test_target_is_the_source(small, tmp_path):
    (tmp_path / "link").symlink_to(small[0])
    for target in (small[0], tmp_path / "link"):
        with pytest.raises(UserError, match="the output cannot go where the checkpoint is"):
            convert(small[0], target, 2)


def test_target_cannot_be_written(small, tmp_path):
    (tmp_path / "file").write_text("x")
    assert refusal(small[0], tmp_path / "file") == "TARGET: cannot be written (File exists)"
    assert refusal(small[0], tmp_path / "file" / "sub") == "TARGET: cannot be written (Not a directory)"
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        assert refusal(small[0], tmp_path / "locked") == "TARGET: cannot be written (Permission denied)"


def test_disk_too_small(small, tmp_path, monkeypatch):
    disk = namedtuple("disk", "f_bavail f_frsize")
    monkeypatch.setattr(os, "statvfs", lambda _: disk(17, 1 << 20))
    assert refusal(small[0], tmp_path / "out").startswith("TARGET: needs 0.02 GB of disk, 0.02 GB are free")


def test_target_of_somebody_else(small, source, tmp_path):
    foreign = tmp_path / "foreign"
    write_upstream(small[0], foreign, 2, SMALL)
    message = "TARGET/model0-mp2.safetensors: not written by this program; choose another directory or remove it"
    assert refusal(small[0], foreign) == message
    other = tmp_path / "other"
    convert(source, other, 2)
    message = "TARGET/config.json: another model's; choose another directory or remove what is there"
    assert refusal(small[0], other) == message


def test_two_at_once(small, tmp_path):
    with AtomicWriter(tmp_path):
        assert refusal(small[0], tmp_path) == "TARGET: another program is writing a checkpoint here"


# Killed, and failed -------------------------------------------------------------------------------------------------


def content(folder: Path, ranks: int = 1) -> dict[tuple[int, str], str | None] | None:
    """What loads from a directory: every byte of every rank, as checksums that were verified. None: nothing."""
    try:
        checkpoint = Checkpoint(folder)
        found = {}
        with Reader() as reader:
            for rank in range(ranks):
                for name, entry in checkpoint.check(checkpoint.partition(checkpoint.args, ranks), rank).items():
                    reader.read(entry)
                    found[rank, name] = entry.crc
        return found
    except UserError:
        return None


@pytest.fixture(scope="module")
def outcome(small, tmp_path_factory):
    """What conversions of the two checkpoints hold, and the events of a conversion of the second."""
    folder = tmp_path_factory.mktemp("outcome")
    convert(small[0], folder / "old", 2, max_file=200_000)
    convert(small[1], folder / "new", 2)
    log = crash_points.events(lambda: convert(small[1], folder / "logged", 2), folder / "log")
    return content(folder / "old", 2), content(folder / "new", 2), crash_points.hashes(folder / "new"), log


@crash_points.HOW_MANY
def test_killed_at_any_moment_leaves_nothing_that_loads(n, small, outcome, tmp_path):
    _, new, hashes, log = outcome
    action = functools.partial(convert, small[1], tmp_path / "out", 2)
    seen = set()
    for at in crash_points.moments(log, n):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        crash_points.kill(action, at)
        found = content(tmp_path / "out", 2)
        assert found in (None, new), f"half a conversion loads after event {at} ({log[at]})"
        assert (found is not None) == any((tmp_path / "out" / (prefix + "model-mp2.index.json")).exists() for prefix in ("", PENDING))
        seen.add(found is None)
        action()
        assert crash_points.hashes(tmp_path / "out") == hashes
    assert seen == {True, False}


@crash_points.HOW_MANY
def test_killed_at_any_moment_keeps_what_was_there(n, small, outcome, tmp_path):
    """The earlier conversion had more files; at every moment it loads whole, or the new one does."""
    old, new, hashes, log = outcome
    assert old is not None and new is not None and old != new
    out = tmp_path / "out"
    convert(small[0], tmp_path / "before", 2, max_file=200_000)
    shutil.copytree(tmp_path / "before", out)
    log = crash_points.events(lambda: convert(small[1], out, 2), tmp_path / "log")
    seen = []
    for at in crash_points.moments(log, n):
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "before", out)
        crash_points.kill(functools.partial(convert, small[1], out, 2), at)
        found = content(out, 2)
        assert found in (old, new), f"neither conversion loads after event {at} ({log[at]})"
        seen.append(found == new)
        convert(small[1], out, 2)
        assert crash_points.hashes(out) == hashes
    assert seen == sorted(seen) and {True, False} == set(seen)  # old up to one moment, new from then on


def test_a_full_disk_keeps_what_was_there(small, outcome, tmp_path, monkeypatch):
    old, new, _, log = outcome
    out = tmp_path / "out"
    convert(small[0], out, 2)
    before = crash_points.hashes(out)
    writes = sum(name in ("pwrite", "ftruncate", "fsync") for name in log)
    for at in [*range(0, writes, writes // 8), *range(writes - 8, writes)]:
        with monkeypatch.context() as m:
            crash_points.fill_disk(m, at)
            with pytest.raises(UserError, match=f"^{out}: cannot be written: No space left on device"):
                convert(small[1], out, 2)
        if content(out, 2) == old:
            assert crash_points.hashes(out) == before, "a failed conversion left something behind"
        else:
            assert content(out, 2) == new  # it failed while tidying up, after the new files had become the checkpoint
            shutil.rmtree(out)
            convert(small[0], out, 2)


def test_files_are_durable_before_they_take_their_names(small, tmp_path, monkeypatch):
    """After a power cut a name must not stand for bytes that never came to the disk."""
    synced, renamed = set(), 0
    fsync, give_name = os.fsync, os.replace

    def note(fd):
        synced.add(os.fstat(fd).st_ino)
        fsync(fd)

    def rename(old, new):
        nonlocal renamed
        assert os.stat(old).st_ino in synced, f"{new} was not written through"
        renamed += 1
        give_name(old, new)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", rename)
    convert(small[0], tmp_path, 2)
    assert renamed > 4


def test_an_exception_closes_everything_and_keeps_what_is_finished(small, tmp_path, monkeypatch):
    monkeypatch.setattr(transform, "commit", lambda *_: 1 / 0)
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ZeroDivisionError):
        convert(small[0], tmp_path / "out", 2)
    kept = {".progress", "model0-mp2.safetensors", "model1-mp2.safetensors"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {TEMPORARY + name for name in kept}
    assert len(os.listdir("/proc/self/fd")) == fds


def test_another_layout_takes_the_place_of_the_first(source, tmp_path, capsys):
    """The same number of ranks again: the index, the marks and every file are the new layout's. Beside it lies another
    number of ranks, each with a layout of its own."""
    convert(source, tmp_path, 4, experts="whole", max_file=1 << 19)
    convert(source, tmp_path, 2, experts="whole")
    convert(source, tmp_path, 4)
    assert_round_trip(source, tmp_path, 4, 2, 8, "split")
    assert_round_trip(source, tmp_path, 2, 2, 8, "whole")
    assert [Checkpoint(tmp_path).experts(ranks) for ranks in (2, 4)] == ["whole", "split"]
    assert "experts: split, a rank has 256 of each one's width of 1024\n" in capsys.readouterr().err


def test_several_numbers_of_ranks_side_by_side(small, tmp_path):
    convert(small[0], tmp_path, 1)
    convert(small[0], tmp_path, 2)
    assert_round_trip(small[0], tmp_path, 1, 2, 4)
    assert_round_trip(small[0], tmp_path, 2, 2, 4)


def test_a_number_of_ranks_that_begins_with_another(tmp_path):
    """1 is the beginning of 16, and not its earlier conversion."""
    make_checkpoint(tmp_path / "source", SMALL | {"num_attention_heads": 16, "num_key_value_heads": 16})
    for ranks in (16, 1):
        convert(tmp_path / "source", tmp_path / "out", ranks)
    assert {manifest.ranks for manifest in read_manifests(tmp_path / "out").values()} == {1, 16}
    assert list(verify(tmp_path / "out")) == []


def test_command_line(small, tmp_path):
    def run(*options: str) -> subprocess.CompletedProcess:
        return fork_server.run([sys.executable, command.__file__, *options], cwd=tmp_path)

    source = ["--hf-ckpt-path", str(small[0]), "--save-path", "out"]
    done = run(*source, "--n-experts", "4", "--model-parallel", "2", "--experts", "whole")
    assert done.returncode == 0 and "converting: 100%" in done.stderr, done.stderr
    assert done.stderr.startswith("experts: whole, as asked\n")
    assert_round_trip(small[0], tmp_path / "out", 2, 2, 4)
    done = run(*source, "--n-experts", "256", "--model-parallel", "2")
    assert (done.returncode, done.stderr) == (2, "error: --n-experts is 256, but config.json says 4\n")
