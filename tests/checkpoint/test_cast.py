"""fp8_cast_bf16.py: exact, complete, loadable by transformers, and all or nothing."""

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_convert import OTHERS, SMALL, content

import fp8_cast_bf16
from checkpoint import transform
from checkpoint.cast import cast
from checkpoint.directory import Checkpoint
from checkpoint.manifest import HF_INDEX, HF_MANIFEST
from checkpoint.partition import Partition
from checkpoint.quantize import quantize
from checkpoint.reading import Reader
from core.errors import UserError
from core.numerics import Numerics
from support import crash_points, fork_server
from support.checkpoints import fp8_sizes, make_checkpoint
from support.damaged_checkpoints import drop, replace, whole
from support.families import FAMILIES
from support.model_pairs import theirs
from support.rank_weights import assert_same, loaded, multiplied_out

CPU = "cpu"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "fp8"
    make_checkpoint(folder, SMALL, fp8=True, shard_bytes=1 << 19)
    for name, text in OTHERS.items():
        (folder / name).write_text(text)
    weight_map = json.loads((folder / HF_INDEX).read_text())["weight_map"]
    assert any(
        weight_map[name + "_scale_inv"] != file
        for name, file in weight_map.items()
        if name + "_scale_inv" in weight_map
    )
    return folder


@pytest.mark.parametrize("window", [1, 30_000, 16 << 20])
def test_exact_and_complete(source, window, tmp_path, monkeypatch):
    monkeypatch.setattr(transform, "Reader", functools.partial(Reader, window))
    cast(source, tmp_path, CPU)
    wanted = multiplied_out(whole(source), torch.bfloat16)
    assert_same(whole(tmp_path), wanted)
    index = json.loads((tmp_path / HF_INDEX).read_text())
    before = json.loads((source / HF_INDEX).read_text())["weight_map"]
    assert index["weight_map"] == {name: file for name, file in before.items() if not name.endswith("_scale_inv")}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in wanted.values())
    for file in set(index["weight_map"].values()):
        assert load_file(tmp_path / file).keys() == {n for n, f in index["weight_map"].items() if f == file}
        with safe_open(tmp_path / file, "pt") as f:
            assert f.metadata()["format"] == "pt"
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    assert json.loads((tmp_path / "config.json").read_text()) == config and config["torch_dtype"] == "bfloat16"
    for name, text in OTHERS.items():
        assert (tmp_path / name).read_text() == text


def test_powers_of_two_as_scales(tmp_path):
    make_checkpoint(tmp_path / "a", SMALL | {"quantization_config": {"scale_fmt": "ue8m0"}}, fp8=True)
    cast(tmp_path / "a", tmp_path / "b", CPU)
    assert_same(whole(tmp_path / "b"), multiplied_out(whole(tmp_path / "a"), torch.bfloat16))


def test_our_model_has_the_same_weights(source, tmp_path):
    cast(source, tmp_path, CPU)
    assert_same(loaded(tmp_path, Numerics()), loaded(source, Numerics()))


def test_transformers_loads_it(tmp_path):
    make_checkpoint(tmp_path / "fp8", FAMILIES["v3"] | fp8_sizes(1) | {"num_hidden_layers": 2}, fp8=True)
    cast(tmp_path / "fp8", tmp_path / "bf16", CPU)
    state = theirs(tmp_path / "bf16").state_dict()
    ours = loaded(tmp_path / "fp8", Numerics())  # FP8 to bf16 on the way in
    for name, hf in {
        "embed.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight",
        "layers.0.attn.wo.weight": "model.layers.0.self_attn.o_proj.weight",
        "layers.0.ffn.w2.weight": "model.layers.0.mlp.down_proj.weight",
        "layers.1.ffn.experts.w2.weight": "model.layers.1.mlp.experts.down_proj",
        "layers.1.ffn.gate.bias": "model.layers.1.mlp.gate.e_score_correction_bias",
    }.items():  # fmt: skip
        assert torch.equal(state[hf].float(), ours[name].float()), name
    up = ours["layers.1.ffn.shared_experts.w13.weight"].chunk(2)[1]
    assert torch.equal(state["model.layers.1.mlp.shared_experts.up_proj.weight"].float(), up.float())


def test_a_config_that_names_every_field(source, tmp_path):
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"text_config": None}))
    cast(copy, tmp_path / "out", CPU)
    del config["quantization_config"]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"text_config": None}


def test_single_file(source, tmp_path):
    (tmp_path / "a").mkdir()
    save_file(whole(source), tmp_path / "a" / "model.safetensors")
    shutil.copy(source / "config.json", tmp_path / "a")
    cast(tmp_path / "a", tmp_path / "b", CPU)
    assert {p.name for p in (tmp_path / "b").iterdir()} == {"model.safetensors", "config.json", HF_MANIFEST}
    assert_same(whole(tmp_path / "b"), multiplied_out(whole(source), torch.bfloat16))
    cast(source, tmp_path / "b", CPU)  # in shards, over it
    assert not (tmp_path / "b" / "model.safetensors").exists()
    assert_same(whole(tmp_path / "b"), multiplied_out(whole(source), torch.bfloat16))


def test_a_shard_of_nothing_but_scales(source, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "a"))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    tensors = whole(source)
    scales = {n: t for n, t in tensors.items() if n.endswith("_scale_inv")}
    save_file(scales, folder / "scales.safetensors")
    save_file({n: t for n, t in tensors.items() if n not in scales}, folder / "weights.safetensors")
    weight_map = {n: "scales.safetensors" if n in scales else "weights.safetensors" for n in tensors}
    (folder / HF_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    cast(folder, tmp_path / "b", CPU)
    assert {p.name for p in (tmp_path / "b").glob("*.safetensors")} == {"weights.safetensors"}
    assert_same(whole(tmp_path / "b"), multiplied_out(tensors, torch.bfloat16))
    checkpoint = Checkpoint(tmp_path / "b")
    checkpoint.check(Partition(checkpoint.args))


# Refusals -----------------------------------------------------------------------------------------------------------


def refusal(source: Path, target: Path) -> str:
    before = crash_points.hashes(target) if target.is_dir() else None
    with pytest.raises(UserError) as e:
        cast(source, target, CPU)
    assert (crash_points.hashes(target) if target.is_dir() else None) == before
    return str(e.value).replace(str(target), "TARGET").replace(str(source), "SOURCE")


def test_missing_scale_is_an_error(source, tmp_path):
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    name = "model.layers.1.mlp.experts.3.down_proj.weight_scale_inv"
    drop(copy, lambda n: n == name)
    message = f"SOURCE: {name} is missing: an FP8 weight without its scale (F32 2x1)"
    assert refusal(copy, tmp_path / "out") == message
    assert not (tmp_path / "out").exists()


def test_other_refusals(source, tmp_path):
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    file = replace(copy, name, lambda scale: -scale)
    assert refusal(copy, tmp_path / "out").startswith(
        f"SOURCE/{file}: {name}: expected finite, positive scales, found -"
    )
    out = tmp_path / "out"
    assert refusal(source, source) == "TARGET: the output cannot go where the checkpoint is"
    assert refusal(tmp_path / "x", out) == "SOURCE: no such directory"
    cast(source, out, CPU)
    assert refusal(out, tmp_path / "again") == "SOURCE: holds no FP8, INT8 or INT4 weights, so there is nothing to cast"
    first = min(path.name for path in source.glob("*.safetensors"))
    message = f"TARGET/{first}: not written by this program; choose another directory or remove it"
    assert refusal(source, copy) == message
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"hidden_size": 1}))
    message = "TARGET/config.json: another model's; choose another directory or remove what is there"
    assert refusal(source, out) == message


# Killed, and failed -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["cast", "quantize"])
def small(request, tmp_path_factory) -> tuple[Path, Path, Callable[[Path, Path], None]]:
    """Two checkpoints of one config, and the command that makes others of them."""
    folder = tmp_path_factory.mktemp("small")
    for seed, name in enumerate(("old", "new")):
        make_checkpoint(folder / name, SMALL, fp8=request.param == "cast", seed=seed, shard_bytes=1 << 20)
    write = {"cast": functools.partial(cast, device=CPU), "quantize": functools.partial(quantize, format="fp8", device=CPU)}
    return folder / "old", folder / "new", write[request.param]


def content_for_others(folder: Path) -> dict[str, str] | None:
    """The weight files, by hash, that a program finds which knows no manifest (one file, or an index); None: none."""
    names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if "model.safetensors" in names:
        files = {"model.safetensors"}
    elif HF_INDEX in names:
        files = set(json.loads((folder / HF_INDEX).read_text())["weight_map"].values())
    else:
        return None
    return {file: digest for file, digest in crash_points.hashes(folder).items() if file in files}


@crash_points.HOW_MANY
def test_killed_at_any_moment(n, small, tmp_path):
    out, before = tmp_path / "out", tmp_path / "before"
    *sources, write = small
    write(sources[0], before)
    write(sources[1], out)
    old, new, hashes = content(before), content(out), crash_points.hashes(out)
    others = content_for_others(before), content_for_others(out)
    assert None not in (old, new, *others) and old != new and others[0] != others[1]

    def start(fresh: bool) -> None:
        shutil.rmtree(out)
        if not fresh:
            shutil.copytree(before, out)

    for fresh in (True, False):
        start(fresh)
        log = crash_points.events(lambda: write(sources[1], out), tmp_path / f"log{fresh}")
        seen = []
        for at in crash_points.moments(log, n):
            start(fresh)
            crash_points.kill(lambda: write(sources[1], out), at)
            found = content(out)
            assert found in (None if fresh else old, new), f"event {at} ({log[at]})"
            before_commit = None if fresh else others[0]
            assert content_for_others(out) in ((before_commit, None, others[1]) if found == new else (before_commit,))
            seen.append(found == new)
            write(sources[1], out)
            assert crash_points.hashes(out) == hashes
        assert seen == sorted(seen) and {True, False} == set(seen)  # the new one from one moment on


def test_a_full_disk_keeps_what_was_there(small, tmp_path, monkeypatch):
    out = tmp_path / "out"
    *sources, write = small
    log = crash_points.events(lambda: write(sources[1], out), tmp_path / "log")
    shutil.rmtree(out)
    write(sources[0], out)
    before = crash_points.hashes(out)
    writes = sum(name in ("pwrite", "ftruncate") for name in log)
    for at in range(0, writes, writes // 8):
        with monkeypatch.context() as m:
            crash_points.fill_disk(m, at)
            with pytest.raises(UserError, match=f"^{out}: cannot be written: No space left on device"):
                write(sources[1], out)
        assert crash_points.hashes(out) == before


def test_command_line(source, tmp_path):
    def run(*options: str) -> subprocess.CompletedProcess:
        return fork_server.run([sys.executable, fp8_cast_bf16.__file__, *options], cwd=tmp_path)

    paths = ["--input-fp8-hf-path", str(source), "--output-bf16-hf-path", "out"]
    done = run(*paths, "--device", "cpu")
    assert done.returncode == 0 and "casting: 100%" in done.stderr, done.stderr
    assert_same(whole(tmp_path / "out"), multiplied_out(whole(source), torch.bfloat16))
    if not torch.cuda.is_available():
        done = run(*paths, "--device", "cuda")
        assert done.returncode == 2 and done.stderr.startswith("error: --device cuda: there is none that torch can use; ")
        assert len(done.stderr.splitlines()) == 1
