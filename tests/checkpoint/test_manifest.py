"""Manifests and what they are for: every damage is found, and a run that was cut short goes on as if it had not been."""

import contextlib
import errno
import hashlib
import importlib
import json
import os
import random
import shutil
import subprocess
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from test_convert import SMALL, content

from checkpoint import transform
from checkpoint.atomic import JOURNAL, TEMPORARY
from checkpoint.cast import cast
from checkpoint.check import check
from checkpoint.convert import convert
from checkpoint.directory import Checkpoint
from checkpoint.manifest import HF_INDEX, HF_MANIFEST, read_manifests, require_hashes, verify
from checkpoint.quantize import quantize
from checkpoint.reading import Digest, hash_both, hash_file, read_header
from checkpoint.writing import Writer
from core.errors import UserError
from support import crash_points
from support.checkpoints import make_checkpoint

CPU = "cpu"
PART = 100_000  # bytes of a converted file here
WANTED = {
    "convert": ("--hf-ckpt-path", "a", "--save-path", "b", "--model-parallel", "2"),
    "fp8_cast_bf16": ("--input-fp8-hf-path", "a", "--output-bf16-hf-path", "b"),
    "quantize": ("--hf-ckpt-path", "a", "--save-path", "b", "--format", "int4"),
}


def convert_small(source: Path, target: Path) -> None:
    convert(source, target, 2, max_file=PART)


def cast_small(source: Path, target: Path) -> None:
    cast(source, target, CPU)


def quantize_small(source: Path, target: Path) -> None:
    quantize(source, target, "int4", device=CPU)


EVERY = pytest.mark.parametrize("write", [convert_small, cast_small, quantize_small])


def ranks_of(write: Callable) -> int:
    return 2 if write is convert_small else 1


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[Path, Path]:
    """Two checkpoints with the same headers, as V3's and R1's have."""
    folder = tmp_path_factory.mktemp("sources")
    for seed, name in enumerate(("old", "new")):
        make_checkpoint(folder / name, SMALL, fp8=True, seed=seed, shard_bytes=1 << 18)
        (folder / name / "tokenizer.json").write_text("{}")
    return folder / "old", folder / "new"


@pytest.fixture(scope="module")
def written(sources, tmp_path_factory) -> dict[Callable, Path]:
    """What uninterrupted runs make of the second."""
    folder = tmp_path_factory.mktemp("written")
    writers = (convert_small, cast_small, quantize_small)
    for write in writers:
        write(sources[1], folder / write.__name__)
    return {write: folder / write.__name__ for write in writers}


def damaged_copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 16]))


# What a manifest says -----------------------------------------------------------------------------------------------


def test_a_file_of_any_shapes_in_any_order(tmp_path):
    """Its hashes are right, every tensor lies at a multiple of its own width, and the library reads it."""
    draw = random.Random(1)
    dtypes = [torch.float32, torch.bfloat16, torch.uint8, torch.int64]
    for trial in range(20):
        tensors = {
            f"t{i}": torch.randint(0, 100, (draw.randint(1, 5), draw.randint(0, 7))).to(draw.choice(dtypes))
            for i in range(draw.randint(1, 9))
        }
        if not sum(t.numel() for t in tensors.values()):
            continue
        path = tmp_path / f"{trial}.safetensors"
        writer = Writer(path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, {"a": "b"})
        for name in draw.sample(list(tensors), len(tensors)):
            for row, data in enumerate(tensors[name]):
                writer.write(name, data, row * data.nbytes)
        assert writer.record == hash_file(path, lambda _: None)
        assert writer.record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert all(entry.start % entry.dtype.itemsize == 0 for entry in read_header(path)[1].values())
        with safe_open(path, "pt") as f:
            assert all(torch.equal(f.get_tensor(name), t) for name, t in tensors.items())


def test_large_blocks_are_hashed_beside_each_other(tmp_path):
    data = torch.randint(0, 256, (5 << 20,), dtype=torch.uint8)
    writer = Writer(tmp_path / "a", {"x": (data.dtype, data.shape)}, {})
    for at in range(0, len(data), 2 << 20):
        writer.write("x", data[at : at + (2 << 20)], at)
    assert writer.record == hash_file(tmp_path / "a", lambda _: None)
    assert writer.record["sha256"] == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    slow = SimpleNamespace(seen=0)
    slow.update = lambda view: time.sleep(0.05) or setattr(slow, "seen", len(view))
    hash_both(slow, Digest(), memoryview(bytes(1 << 20)))
    assert slow.seen == 1 << 20, "the next block may come before this one"
    raw = data.numpy().tobytes()
    assert writer.record["tensors"]["x"] == f"{zlib.crc32(raw):08x} {hashlib.sha256(raw).hexdigest()}"


@EVERY
def test_a_manifest_names_every_byte(write, sources, written):
    folder = written[write]
    (manifest,) = read_manifests(folder).values()
    names = {path.name for path in folder.iterdir()}
    assert names == {manifest.path.name, *manifest.files, *manifest.small} and "tokenizer.json" in manifest.small
    for name, record in (manifest.files | manifest.small).items():
        data = (folder / name).read_bytes()
        assert (record["bytes"], record["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    for name, record in manifest.files.items():
        with safe_open(folder / name, "pt") as f:
            held = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (not a dict)
        digests = {key: hashlib.sha256(t.view(-1).view(torch.uint8).numpy()).hexdigest() for key, t in held.items()}
        assert {key: text[9:] for key, text in record["tensors"].items()} == digests
    assert manifest.raw["written_by"].keys() == {"program", "torch", "safetensors"}
    source = manifest.raw["source"]
    config = (sources[1] / "config.json").read_bytes()
    assert source["config_sha256"] == hashlib.sha256(config).hexdigest()
    shards = sorted(sources[1].glob("*.safetensors"))
    sha = hashlib.sha256()
    for path in shards:
        data = path.read_bytes()
        sha.update(path.name.encode() + b"\0" + len(data).to_bytes(8, "little"))
        sha.update(data[: 8 + int.from_bytes(data[:8], "little")])
    sha.update((sources[1] / HF_INDEX).read_bytes())
    assert source["headers_sha256"] == sha.hexdigest()


def test_a_cast_as_the_source(written, tmp_path):
    convert(written[cast_small], tmp_path, 1)
    (manifest,) = read_manifests(tmp_path).values()
    wanted = hashlib.sha256((written[cast_small] / HF_MANIFEST).read_bytes()).hexdigest()
    assert manifest.raw["source"]["manifest_sha256"] == wanted


@EVERY
def test_nothing_is_read_twice(write, sources, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("a file that was just written is read again"))
    write(sources[1], tmp_path)


# Damage is found ----------------------------------------------------------------------------------------------------


@EVERY
def test_a_flipped_bit_in_each_tensor_is_found(write, written, tmp_path):
    assert list(verify(written[write])) == []
    folder = damaged_copy(written[write], tmp_path / "copy")
    flipped = set()
    for file in folder.glob("*.safetensors"):
        for name, entry in read_header(file)[1].items():
            flip(file, entry.start + entry.start * 7919 % entry.nbytes)
            flipped.add((file, name))
    assert len(flipped) > 50
    found = list(verify(folder))
    assert {(f.file, f.tensor) for f in found} == flipped and len(found) == len(flipped)


@EVERY
def test_everything_else_is_found(write, written, tmp_path):
    folder = damaged_copy(written[write], tmp_path / "copy")

    def finding() -> str:
        (found,) = verify(folder)
        return str(found).replace(str(folder), "DIR")

    file = max(folder.glob("*.safetensors"))
    data = file.read_bytes()
    mark = {convert_small: b'"rank":"1"', cast_small: b'"written_by":"fp8_cast_bf16"'}.get(write, b'"written_by":"quantize"')
    first = next(iter(read_header(file)[1]))
    for change, said in {
        data[:-1]: f"expected {len(data)} bytes, found {len(data) - 1}",
        data + b"\0": f"expected {len(data)} bytes, found {len(data) + 1}",
        b"\xff" * 8 + data[8:]: f"truncated, or not a safetensors file ({len(data)} bytes)",
        data.replace(mark, mark[:-2] + b'9"'): "header: expected SHA-256 ",
        data.replace(b'weight":{', b'wight":{ ', 1): f"{first}: expected CRC32 and SHA-256 ",
    }.items():
        file.write_bytes(change)
        assert finding().startswith(f"DIR/{file.name}: {said}")
    file.unlink()
    assert finding() == f"DIR/{file.name}: expected {len(data)} bytes, found no such file"
    file.write_bytes(data)
    small = folder / "tokenizer.json"
    small.write_text("[]")
    sha = [hashlib.sha256(text).hexdigest() for text in (b"{}", b"[]")]
    assert finding() == f"DIR/tokenizer.json: expected SHA-256 {sha[0]}, found {sha[1]}"
    small.unlink()
    assert finding() == "DIR/tokenizer.json: expected 2 bytes, found no such file"
    small.write_text("{}")
    (folder / "model-9.safetensors").write_bytes(data)
    assert finding() == "DIR/model-9.safetensors: expected no such file, found one that no manifest names"


@EVERY
def test_ranks_share_the_work_of_verifying(write, written, tmp_path):
    """Together the ranks of a host look at every file, each at its own, before a load."""
    folder = damaged_copy(written[write], tmp_path / "copy")
    for i in range(3):
        require_hashes(folder, ranks_of(write), (i, 3))
    for path in folder.iterdir():
        if "manifest" not in path.name and "-mp2.index" not in path.name:
            flip(path, path.stat().st_size - 1)
            refused = []
            for i in range(3):
                with contextlib.suppress(UserError):
                    require_hashes(folder, ranks_of(write), (i, 3))
                    continue
                refused.append(i)
            assert len(refused) == 1, path
            flip(path, path.stat().st_size - 1)


def test_verify_cannot_read(written, monkeypatch):
    real = os.preadv
    failed: list[int] = []

    def preadv(*args):
        if not failed and args[2] > 8000:
            failed.append(1)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args)

    monkeypatch.setattr(os, "preadv", preadv)
    (found,) = verify(written[convert_small])
    assert found.problem.endswith("cannot be read (Input/output error)")


@EVERY
def test_the_loader_wants_the_manifest_and_its_sizes(write, written, tmp_path, capsys):
    folder = damaged_copy(written[write], tmp_path / "copy")

    def refusal() -> str:
        with pytest.raises(UserError) as e:
            checkpoint = Checkpoint(folder)
            checkpoint.check(checkpoint.partition(checkpoint.args, ranks_of(write)))
        return str(e.value).replace(str(folder), "DIR")

    (folder / "tokenizer.json").write_text("{ }")  # may have been meant
    checkpoint = Checkpoint(folder)
    checkpoint.check(checkpoint.partition(checkpoint.args, ranks_of(write)))
    said = f"{folder / 'tokenizer.json'} was changed: 2 bytes were written, now it has 3"
    assert checkpoint.args.warnings == (said,) and said in [str(f.problem) for f in check(folder).findings]
    assert "was changed" not in capsys.readouterr().err
    (manifest,) = checkpoint.manifests.values()
    file = max(folder.glob("*.safetensors"))
    data = file.read_bytes()
    file.write_bytes(data + b"\0")
    assert refusal() == f"DIR/{file.name}: expected {len(data)} bytes, found {len(data) + 1}"
    file.write_bytes(data)
    manifest.path.unlink()
    first = min(folder.glob("*.safetensors")).name
    command = "fp8_cast_bf16.py" if write is cast_small else "quantize.py"
    assert refusal() == (
        f"DIR/{first}: its manifest is missing; copy the directory or convert again"
        if write is convert_small
        else f"DIR/{HF_MANIFEST}: missing, though {command} wrote {first}; copy it too, or run {command} again"
    )


def test_a_cast_whose_index_says_otherwise(written, tmp_path):
    folder = damaged_copy(written[cast_small], tmp_path / "copy")
    index = json.loads((folder / HF_INDEX).read_text())
    name, other = next(iter(index["weight_map"])), max(index["weight_map"].values())
    (folder / HF_INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {name: other}}))
    with pytest.raises(UserError, match=f"{HF_INDEX}: places tensors elsewhere than {HF_MANIFEST}; run fp8_cast_bf16.py again"):
        Checkpoint(folder)


@pytest.mark.parametrize(("change", "said"), [
    (lambda text: text.replace('"version": 2', '"version": 1'), "version 2, not 'deepseek-v3-ranks' version 1: convert"),
    (lambda text: text.replace('"ranks": 2', '"ranks": 3'), "damaged; copy the directory again or convert again"),
    (lambda text: text[:-9], "not readable as JSON"),
])  # fmt: skip
def test_converting_again_as_one_is_told_to(change, said, sources, written, tmp_path):
    """Over a manifest of an earlier version or a damaged one: it does not load, and a conversion takes its place."""
    folder = damaged_copy(written[convert_small], tmp_path / "copy")
    path = folder / "model-mp2.index.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=said):
        Checkpoint(folder)
    convert(sources[1], folder, 2)
    assert content(folder, 2) is not None and list(verify(folder)) == []
    assert not set(read_manifests(folder)[2].files) & set(read_manifests(written[convert_small])[2].files)


def test_commands(sources, written, tmp_path, monkeypatch, capsys):
    folder = damaged_copy(written[convert_small], tmp_path / "copy")
    file = max(folder.glob("*.safetensors"))
    name, entry = max(read_header(file)[1].items())

    def run(script: str, *options: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", [script, *map(str, options)])
        try:
            status = importlib.import_module(script).main()
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()

    status, out, err = run("convert", "--verify", folder)
    assert (status, out) == (0, "") and "verifying: 100%" in err and err.endswith(" GB: all as it was written\n")
    flip(file, entry.start)
    status, out, err = run("fp8_cast_bf16", "--verify", folder)  # any manifest will do
    assert status == 1 and out.startswith(f"{file}: {name}: expected CRC32 and SHA-256 ") and out.count("\n") == 1
    assert err.endswith(" GB: 1 difference from what was written\n")
    status, _, err = run("convert", "--verify", sources[0])
    no = f"error: {sources[0]}: no manifest, so nothing to compare with: convert.py, fp8_cast_bf16.py and quantize.py write one\n"
    assert status == 2 and err.endswith(no)
    for script in WANTED:
        for options in ((), ("--verify", folder, *WANTED[script]), WANTED[script][:2]):
            status, _, err = run(script, *options)
            assert status == 2 and "or --verify alone" in err


@pytest.mark.parametrize("name", ["listdir", "stat"])
def test_a_directory_that_may_not_be_read(name, written, tmp_path, monkeypatch, capsys):
    """Whoever asks: one line, and the status of wrong use."""
    folder, real = written[convert_small], getattr(os, name)

    def deny(path, *args, **options):
        if Path(path) == folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, name, deny)
    for script, *options in (
        ("convert", "--verify", folder),
        ("convert", "--hf-ckpt-path", folder, "--save-path", tmp_path / "out", "--model-parallel", 1),
        ("fp8_cast_bf16", "--input-fp8-hf-path", folder, "--output-bf16-hf-path", tmp_path / "out"),
        ("quantize", "--hf-ckpt-path", folder, "--save-path", tmp_path / "out", "--format", "int4"),
        ("check_checkpoint", folder),
        ("plan", "--ckpt-path", folder),
        ("generate", "--ckpt-path", folder, "--interactive", "--device", "cpu"),
    ):
        monkeypatch.setattr("sys.argv", [script, *map(str, options)])
        assert importlib.import_module(script).main() == 2, script
        assert capsys.readouterr().err == f"error: {folder}: cannot be read (Permission denied)\n", script
    assert not (tmp_path / "out").exists()


# A run that was cut short goes on ----------------------------------------------------------------------------------


def finished_in(out: Path) -> set[str]:
    lines = (out / (TEMPORARY + JOURNAL)).read_text().splitlines()
    return {json.loads(line)[0] for line in lines[1:]}


def bytes_moved(action: Callable[[], object]) -> tuple[Counter[str], Counter[str]]:
    """What an action writes and reads with pwrite and preadv, by file name without the temporary's prefix."""
    wrote: Counter[str] = Counter()
    read: Counter[str] = Counter()

    def name(fd: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{fd}")).name.removeprefix(TEMPORARY)

    def pwrite(fd, *args, real=os.pwrite):
        done = real(fd, *args)
        wrote[name(fd)] += done
        return done

    def preadv(fd, *args, real=os.preadv):
        done = real(fd, *args)
        read[name(fd)] += done
        return done

    with pytest.MonkeyPatch.context() as m:
        m.setattr(os, "pwrite", pwrite)
        m.setattr(os, "preadv", preadv)
        action()
    return wrote, read


def cut_short(write: Callable, source: Path, out: Path, log: Path, share: float) -> set[str]:
    """Kills a run after that share of its events; returns the weight files it had finished."""
    events = crash_points.events(lambda: write(source, out), log)
    shutil.rmtree(out)
    crash_points.kill(lambda: write(source, out), int(len(events) * share))
    return finished_in(out)


@EVERY
def test_finished_files_are_not_written_again(write, sources, written, tmp_path):
    out = tmp_path / "out"
    whole_run = bytes_moved(lambda: write(sources[1], out))
    shutil.rmtree(out)
    finished = cut_short(write, sources[1], out, tmp_path / "log", 0.6)
    (manifest,) = read_manifests(written[write]).values()
    assert 2 <= len(finished) < len(manifest.files)
    wrote, read = bytes_moved(lambda: write(sources[1], out))
    assert crash_points.hashes(out) == crash_points.hashes(written[write])
    for name, record in manifest.files.items():
        assert wrote[name] == (0 if name in finished else record["bytes"]), name
    shards = {path.name for path in sources[1].glob("*.safetensors")}
    again = sum(read[name] for name in shards) - (0 if write is convert_small else sum(read[name] for name in finished))
    assert again < sum(whole_run[1][name] for name in shards) - sum(manifest.files[n]["bytes"] for n in finished) / 4


@EVERY
def test_the_manifest_is_ready_before_anything_changes(write, sources, tmp_path):
    """An earlier checkpoint's tokenizer is not replaced minutes before its weights are."""
    events = crash_points.events(lambda: write(sources[1], tmp_path / "out"), tmp_path / "log")
    config, tokenizer, manifest, *_ = (at for at, name in enumerate(events) if name == "replace")
    assert "pwrite" not in events[config:manifest] and config < tokenizer < manifest


@EVERY
def test_nothing_is_left_to_do_but_the_commit(write, sources, written, tmp_path):
    out = tmp_path / "out"
    events = crash_points.events(lambda: write(sources[1], out), tmp_path / "log")
    (manifest,) = read_manifests(written[write]).values()
    renames = [at for at, name in enumerate(events) if name == "replace"]
    for at in (renames[0], renames[len(renames) // 2], renames[-1]):
        shutil.rmtree(out)
        crash_points.kill(lambda: write(sources[1], out), at)
        wrote, _ = bytes_moved(lambda: write(sources[1], out))
        assert crash_points.hashes(out) == crash_points.hashes(written[write])
        assert not any(wrote[name] for name in manifest.files)


@EVERY
def test_another_job_starts_afresh(write, sources, written, tmp_path):
    """A source with the same headers, one that was touched, other options: nothing of the first run is taken."""
    out = tmp_path / "out"

    def jobs() -> Iterator[tuple[Path, Callable]]:
        copy = Path(shutil.copytree(sources[0], tmp_path / "copy"))
        yield copy, lambda: write(sources[1], out)
        yield copy, lambda: os.utime(min(copy.glob("*.safetensors")), (1, 1)) or write(copy, out)
        if write is convert_small:
            yield sources[1], lambda: convert(sources[1], out, 2, max_file=PART + 5000)
            yield sources[1], lambda: convert(sources[1], out, 1, max_file=PART)
        if write is quantize_small:
            yield sources[1], lambda: quantize(sources[1], out, "int8", 32, device=CPU)

    for first, action in jobs():
        shutil.rmtree(out, ignore_errors=True)
        assert cut_short(write, first, out, tmp_path / "log", 0.6)
        wrote, _ = bytes_moved(action)
        sizes = {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
        assert {name: wrote[name] for name in sizes} == sizes
        assert [p.name for p in out.iterdir() if p.name.startswith(".")] == [] == list(verify(out))
        if first != sources[1] and "copy" not in str(first):
            assert crash_points.hashes(out) == crash_points.hashes(written[write])


@EVERY
def test_what_is_kept_is_checked(write, sources, written, tmp_path):
    """Finished files that were damaged, removed or cut, and a damaged journal, cost time and nothing else."""
    out = tmp_path / "out"
    finished = sorted(cut_short(write, sources[1], out, tmp_path / "log", 0.6))
    start = tmp_path / "start"
    out.rename(start)
    journal = TEMPORARY + JOURNAL

    def flip_in(name: str) -> Callable:
        return lambda: flip(out / (TEMPORARY + name), (out / (TEMPORARY + name)).stat().st_size - 3)

    damages = {
        flip_in(finished[0]): 1,
        lambda: os.truncate(out / (TEMPORARY + finished[1]), 5000): 1,
        lambda: (out / (TEMPORARY + finished[0])).unlink(): 1,
        lambda: os.truncate(out / journal, (out / journal).stat().st_size - 5): 1,
        lambda: (out / journal).write_bytes(b"\xff\n" + (out / journal).read_bytes()): len(finished),
        lambda: (out / journal).write_bytes((out / journal).read_bytes() + b'[["a"], {}]\n[1]\n{}\n7\n"ab"\n'): 0,
        lambda: (out / journal).write_bytes((out / journal).read_bytes() + b'["../x.safetensors", "00"]\n'): 0,
    }
    for damage, lost in damages.items():
        shutil.copytree(start, out)
        damage()
        wrote, _ = bytes_moved(lambda: write(sources[1], out))
        assert crash_points.hashes(out) == crash_points.hashes(written[write])
        assert sum(wrote[name] > 0 for name in finished) == lost
        shutil.rmtree(out)


@EVERY
def test_a_damaged_temporary_beside_the_whole_file(write, sources, written, tmp_path):
    """A second run of the same job was cut short: what it leaves never takes the place of what the first wrote."""
    out = tmp_path / "out"
    events = crash_points.events(lambda: write(sources[1], out), tmp_path / "log")
    crash_points.kill(lambda: write(sources[1], out), int(len(events) * 0.6))
    finished = finished_in(out)
    for name in finished:
        flip(out / (TEMPORARY + name), 5000)
    wrote, _ = bytes_moved(lambda: write(sources[1], out))
    assert crash_points.hashes(out) == crash_points.hashes(written[write])
    assert finished and not any(wrote[name] for name in finished)


@EVERY
def test_interrupted_by_hand(write, sources, written, tmp_path, monkeypatch, capsys):
    out, earlier = tmp_path / "out", tmp_path / "earlier"
    write(sources[0], earlier)
    shutil.copytree(earlier, out)
    def preadv(fd, *args, real=os.preadv):
        if (out / (TEMPORARY + JOURNAL)).exists() and len(finished_in(out)) > 2:
            raise KeyboardInterrupt
        return real(fd, *args)

    with monkeypatch.context() as m:
        m.setattr(os, "preadv", preadv)
        with pytest.raises(KeyboardInterrupt):
            write(sources[1], out)
    finished = finished_in(out)
    assert finished and {p.name for p in out.iterdir() if p.name.startswith(TEMPORARY)} == {
        TEMPORARY + name for name in (*finished, JOURNAL)
    }
    assert f"{out}: finished files ({len(finished)}, 0.00 GB) are kept; the same command goes on" in capsys.readouterr().err
    assert content(out, ranks_of(write)) == content(earlier, ranks_of(write))
    with pytest.raises(UserError):  # a mistake meanwhile costs nothing
        write(tmp_path, out)
    assert finished_in(out) == finished
    wrote, _ = bytes_moved(lambda: write(sources[1], out))
    assert crash_points.hashes(out) == crash_points.hashes(written[write])
    assert not any(wrote[name] for name in finished)


@EVERY
def test_a_source_that_changes_meanwhile(write, sources, tmp_path, monkeypatch):
    copy, out = Path(shutil.copytree(sources[1], tmp_path / "copy")), tmp_path / "out"
    real = transform.write_outputs
    monkeypatch.setattr(transform, "write_outputs", lambda *args: real(*args) or os.utime(max(copy.glob("*.safetensors"))))
    with pytest.raises(UserError, match=r"\.safetensors: was changed while it was read; run the command again"):
        write(copy, out)
    assert content(out, ranks_of(write)) is None


@EVERY
def test_errors_of_the_source(write, sources, written, tmp_path, monkeypatch):
    """A disk that fails while it is read: one line, what was there stays, and the next run goes on."""
    earlier, out = tmp_path / "earlier", tmp_path / "out"
    write(sources[0], earlier)

    def failing(at: int) -> Callable:
        reads: list[int] = []

        def preadv(fd, *args, real=os.preadv):
            reads.append(fd)
            if len(reads) == at:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(fd, *args)

        return preadv

    total = len(read_header(min(sources[1].glob("*.safetensors")))[1]) * len(list(sources[1].glob("*.safetensors")))
    for at in range(1, total, total // 5):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(earlier, out)
        with monkeypatch.context() as m:
            m.setattr(os, "preadv", failing(at))
            with pytest.raises(UserError, match=rf"^{sources[1]}/.*: cannot be read \(Input/output error\)$"):
                write(sources[1], out)
        assert content(out, ranks_of(write)) == content(earlier, ranks_of(write))
        write(sources[1], out)
        assert crash_points.hashes(out) == crash_points.hashes(written[write])


@EVERY
def test_a_small_file_that_cannot_be_read(write, sources, tmp_path):
    copy = Path(shutil.copytree(sources[1], tmp_path / "copy"))
    (copy / "tokenizer_config.json").symlink_to("/proc/self/mem")  # reading its first byte is an error
    with pytest.raises(UserError, match=r"tokenizer_config\.json: cannot be read \(Input/output error\)"):
        write(copy, tmp_path / "out")
    assert content(tmp_path / "out", ranks_of(write)) is None


# Killed again and again, and full disks -----------------------------------------------------------------------------


@EVERY
@crash_points.HOW_MANY
def test_killed_again_and_again(write, n, sources, written, tmp_path):
    """Runs that are killed and taken up until one comes through, with an earlier checkpoint there and without: at every
    moment that one loads or the new one does, and in the end the bytes are those of an uninterrupted run."""
    earlier, out = tmp_path / "earlier", tmp_path / "out"
    write(sources[0], earlier)
    old, new = content(earlier, ranks_of(write)), content(written[write], ranks_of(write))
    assert None not in (old, new) and old != new
    total = len(crash_points.events(lambda: write(sources[1], out), tmp_path / "log"))
    draw = random.Random(n)
    kills = 0
    while kills < n:
        shutil.rmtree(out, ignore_errors=True)
        if there := draw.random() < 0.5:
            shutil.copytree(earlier, out)
        patience = draw.uniform(0.1, 0.6)
        while not crash_points.ends_before(lambda: write(sources[1], out), draw.randrange(int(total * patience))):
            assert content(out, ranks_of(write)) in (old if there else None, new)
            patience = min(1.2, patience + 0.05)
            kills += 1
        assert crash_points.hashes(out) == crash_points.hashes(written[write])


@EVERY
@crash_points.HOW_MANY
def test_killed_at_random_times(write, n, sources, written, tmp_path):
    """A real SIGKILL from outside, after a random time, over an earlier checkpoint and without one."""
    earlier, out = tmp_path / "earlier", tmp_path / "out"
    write(sources[0], earlier)
    old, new = content(earlier, ranks_of(write)), content(written[write], ranks_of(write))
    began = time.monotonic()
    write(sources[1], out)
    length = min(time.monotonic() - began, 2)  # where the disk was slow, most kills come early
    draw = random.Random(n)
    for i in range(n):
        shutil.rmtree(out)
        if i % 2:
            shutil.copytree(earlier, out)
        crash_points.kill_after(lambda: write(sources[1], out), draw.uniform(0, 1.3 * length))
        assert content(out, ranks_of(write)) in (old if i % 2 else None, new)
        write(sources[1], out)
        assert crash_points.hashes(out) == crash_points.hashes(written[write])


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 16 MiB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@EVERY
@pytest.mark.parametrize("n", [4, pytest.param(20, marks=pytest.mark.trust)])
def test_a_disk_that_is_really_full(write, n, sources, written, small_disk, tmp_path, monkeypatch):
    """A disk that fills up after the first look at it: the earlier checkpoint stays, byte for byte, and nothing else."""
    out, ballast = small_disk / "out", small_disk / "ballast"
    statvfs = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=1 << 20, f_frsize=1 << 20))
    write(sources[0], out)
    before, new = crash_points.hashes(out), content(written[write], ranks_of(write))
    need = sum(-(-path.stat().st_size // 4096) * 4096 for path in written[write].iterdir())
    free = statvfs(small_disk).f_bavail * statvfs(small_disk).f_frsize
    outcomes = []
    for room in [need * i // (n - 2) // 4096 * 4096 for i in range(n - 1)] + [need + 4096]:
        with open(ballast, "wb") as f:
            os.posix_fallocate(f.fileno(), 0, free - room)
        try:
            with pytest.raises(UserError, match=f"^{out}: cannot be written: No space left on device"):
                write(sources[1], out)
        except pytest.fail.Exception:  # there was room enough
            assert room >= need
        ballast.unlink()
        outcomes.append(content(out, ranks_of(write)) == new)
        if outcomes[-1]:  # it was full when the new one had already become the checkpoint, or not at all
            write(sources[1], out)
            assert crash_points.hashes(out) == crash_points.hashes(written[write])
            shutil.rmtree(out)
            write(sources[0], out)
        else:
            assert crash_points.hashes(out) == before
    assert outcomes == sorted(outcomes) and {True, False} == set(outcomes)
