"""What is given in place of a checkpoint is called what it is, by every program in one line that says what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint.check import check
from checkpoint.convert import convert
from checkpoint.manifest import HF_INDEX, verify
from core.files import LFS_POINTER, stand_in
from support.checkpoints import make_checkpoint
from support.damaged_checkpoints import files, good_checkpoint
from support.families import V3
from support.programs import PROGRAMS, refusals

POINTER = LFS_POINTER.decode() + "\noid sha256:" + "0" * 64 + "\nsize 4302479\n"
SINGLE = "model.safetensors"


def assert_refused(folder: Path, message: str, out: Path) -> None:
    """All programs say the same."""
    for program, lines in refusals(folder, out).items():
        assert message in lines, (program, lines)
        assert len(lines) == 1 or program == "check", (program, lines)
    assert not (out / "convert").exists() and not (out / "cast").exists()


# --- in place of a checkpoint -------------------------------------------------------------------------------------------


def touch(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")

    return make


MERGE = "merge it into its base model (peft: merge_and_unload), save that, and give its directory"
PICKLES = "pickles, which can run code and are not read; save them as safetensors (save_pretrained)"
INSTEAD = {
    "nothing": (touch(), "DIR: empty; give the directory of a checkpoint"),
    "an adapter": (touch("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"),
                   f"DIR: adapter_model.safetensors is an adapter's, and no whole model; {MERGE}"),
    "an adapter's config": (touch("adapter_config.json", "README.md"),
                            f"DIR: adapter_config.json is an adapter's, and no whole model; {MERGE}"),
    "an adapter beside its base": (touch("config.json", SINGLE, "adapter_config.json", "adapter_model.safetensors"),
                                   f"DIR: adapter_model.safetensors is an adapter's, beside the weights; {MERGE}"),
    "a pipeline": (touch("model_index.json", "unet/config.json", "unet/x.safetensors"),
                   "DIR: model_index.json is a diffusers pipeline's, not a language model's; give another checkpoint"),
    "a part of one": (touch("config.json", "diffusion_pytorch_model.safetensors"),
                      "DIR: diffusion_pytorch_model.safetensors is a diffusers pipeline's, not a language model's; give "
                      "another checkpoint"),
    "GGUF": (touch("config.json", "DeepSeek-V3-Q4_K_M-00001-of-00009.gguf"),
             "DIR: no .safetensors files; DeepSeek-V3-Q4_K_M-00001-of-00009.gguf is GGUF, llama.cpp's format; get the "
             "safetensors files that it was made from"),
    "pickles": (touch("config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"),
                f"DIR: no .safetensors files; pytorch_model-00001-of-00002.bin is {PICKLES}"),
    "a .pt": (touch("consolidated.00.pth", "params.json"), f"DIR: no .safetensors files; consolidated.00.pth is {PICKLES}"),
    "ONNX": (touch("config.json", "onnx/x.json", "model.onnx"),
             "DIR: no .safetensors files; model.onnx is ONNX; get the safetensors files that it was made from"),
    "its parent": (touch("a/config.json", "b/config.json", f"b/{SINGLE}", "c.txt"), "DIR: no checkpoint itself; give b"),
    "the parent of several": (touch(*(f"{name}/{SINGLE}" for name in "abcde")),
                              "DIR: no checkpoint itself; give a or b or c or one of 2 more"),
    "a snapshots directory": (touch(f"0123/{SINGLE}"), "DIR: no checkpoint itself; give 0123"),
    "the cache of the Hub": (touch(*(f"models--x--y/{name}" for name in ("refs/main", "blobs/0", f"snapshots/0/{SINGLE}"))),
                             "DIR: no checkpoint itself; give models--x--y/snapshots/0"),
    "a model in it, cut short": (touch("refs/main", "blobs/0.incomplete", "snapshots/0/config.json"),
                                 "DIR: a cache of the Hugging Face Hub; give a snapshot; it has none: download the model "
                                 "again"),
}  # fmt: skip


@pytest.mark.parametrize("name", INSTEAD)
def test_something_else(name, tmp_path):
    make, message = INSTEAD[name]
    (tmp_path / "it").mkdir()
    make(tmp_path / "it")
    assert_refused(tmp_path / "it", message, tmp_path)


def test_the_config_of_a_part_of_a_pipeline(copy, tmp_path):
    (copy / "config.json").write_text('{"_class_name": "SD3Transformer2DModel", "_diffusers_version": "0.35.0"}')
    of = "config.json: config: of 'SD3Transformer2DModel', a part of a diffusers pipeline, not of a language model"
    assert_refused(copy, of, tmp_path)


def test_the_cache_of_the_hub_names_the_snapshot_of_main_first(tmp_path):
    cache = tmp_path / "models--deepseek-ai--DeepSeek-V3"
    touch("blobs/0", f"snapshots/1/{SINGLE}", f"snapshots/2/{SINGLE}", "snapshots/3/config.json")(cache)
    touch("refs/main")(cache)
    (cache / "refs" / "main").write_text("2\n")
    assert_refused(cache, "DIR: a cache of the Hugging Face Hub; give one of its snapshots, snapshots/2 or snapshots/1", tmp_path)


def test_a_file(good, tmp_path):
    for file in ("config.json", files(good)[0].name):
        assert_refused(good / file, "DIR: a file; give the directory that holds it", tmp_path)


def test_a_file_of_another_format(tmp_path):
    (tmp_path / "V3.gguf").touch()
    message = "DIR: GGUF, llama.cpp's format; get the safetensors files that it was made from"
    assert_refused(tmp_path / "V3.gguf", message, tmp_path)


def test_a_link_to_no_directory(tmp_path):
    (tmp_path / "it").symlink_to("/mnt/v3")
    broken = "DIR: a broken link: nothing is at '/mnt/v3'; download or copy that, or mend the link"
    assert_refused(tmp_path / "it", broken, tmp_path)


# --- in place of a file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", HF_INDEX, "tiktoken.model",
                                  "model-00002-of-00005.safetensors"])  # fmt: skip
@pytest.mark.parametrize("kind", ["pointer", "broken link"])
def test_a_stand_in(name, kind, copy, tmp_path):
    assert name == "tiktoken.model" or (copy / name).exists()
    (copy / name).unlink(missing_ok=True)
    if kind == "pointer":
        (copy / name).write_text(POINTER)
        message = f"{name}: a Git LFS pointer, not the file itself; run `git lfs pull` in its directory"
    else:
        (copy / name).symlink_to("../../blobs/4a")
        message = f"{name}: a broken link: nothing is at '../../blobs/4a'; download or copy that, or mend the link"
    assert_refused(copy, message, tmp_path)
    told = [str(finding.problem) for finding in check(copy).findings if finding.fault]
    assert sum(name in text for text in told) == 1, told


def test_nothing_stands_for_a_file_that_is_gone(copy):
    """A file may go between two looks at a directory: a commit renames it."""
    assert stand_in(copy / "gone.json") is None and stand_in(copy / "config.json") is None
    assert stand_in(copy / "config.json" / "x") is None


def test_many_stand_ins_have_one_line(copy, tmp_path):
    """As a clone without Git LFS leaves them: V3 has 163."""
    for file in files(copy):
        file.write_text(POINTER)
    message = "model-00001-of-00005.safetensors: a Git LFS pointer, not the file itself; run `git lfs pull` in its directory"
    assert_refused(copy, f"{message} (5 files of weights are such)", tmp_path)
    assert len([finding for finding in check(copy).findings if finding.fault]) == 1


@pytest.mark.parametrize("kind", ["pointer", "broken link"])
def test_verification_tells_them_too(kind, good, tmp_path):
    convert(good, tmp_path, 1)
    file = files(tmp_path)[0]
    file.unlink()
    if kind == "pointer":
        file.write_text(POINTER)
    else:
        file.symlink_to("/mnt/v3")
    said = [str(difference) for difference in verify(tmp_path)]
    assert said == [f"{file}: " + {"pointer": "a Git LFS pointer, not the file itself; run `git lfs pull` in its directory",
                    "broken link": "a broken link: nothing is at '/mnt/v3'; download or copy that, or mend the link"}[kind]]  # fmt: skip


def test_links_into_a_shared_store(good, tmp_path, capsys):
    """As laboratories keep a checkpoint once for everybody: a working link is as good as a file."""
    store, here = Path(shutil.copytree(good, tmp_path / "store")), tmp_path / "here"
    here.mkdir()
    for path in store.iterdir():
        (here / path.name).symlink_to(path)
    for program in PROGRAMS.values():
        program(here, tmp_path)
    report = check(here)
    assert not report.findings
    assert report.looked["files"].endswith(f"names, headers; links into {store}")


# --- two checkpoints in one directory -----------------------------------------------------------------------------------


AWAY = "move away the one that is not meant"


@pytest.mark.parametrize(("names", "index", "message"), [
    ((SINGLE,), True, f"DIR: two checkpoints, {SINGLE} and the files that {HF_INDEX} names; {AWAY}"),
    (("consolidated.safetensors",), True,
     f"DIR: two checkpoints, consolidated.safetensors and the files that {HF_INDEX} names; {AWAY}"),
    (("model0-mp2.safetensors", "model1-mp2.safetensors"), True,
     f"DIR: two checkpoints, model0-mp2.safetensors and the files that {HF_INDEX} names; {AWAY}"),
    ((SINGLE,), False, f"DIR: two checkpoints, {SINGLE} and model-00001-of-00005.safetensors; {AWAY}"),
    (("model.safetensors.index.fp16.json", "model.fp16-00001-of-00001.safetensors"), True,
     f"DIR: two indexes, {HF_INDEX} and model.safetensors.index.fp16.json; {AWAY}"),
    (("consolidated.safetensors.index.json",), False,
     f"DIR: its index is consolidated.safetensors.index.json, not {HF_INDEX}: a variant, or in other names than Hugging "
     "Face's; get the ordinary form"),
])  # fmt: skip
def test_two_checkpoints(names, index, message, copy, tmp_path):
    for name in names:
        if name.endswith(".json"):
            (copy / name).write_text('{"weight_map": {"x": "model.fp16-00001-of-00001.safetensors"}}')
        else:
            save_file({"x": torch.ones(2)}, copy / name)
    if not index:
        (copy / HF_INDEX).unlink()
    assert_refused(copy, message, tmp_path)


def test_single_file_of_another_name(tmp_path):
    good_checkpoint(tmp_path / "a", "bf16")
    (tmp_path / "a" / SINGLE).rename(tmp_path / "a" / "deepseek.safetensors")
    message = f"DIR: one file of weights, deepseek.safetensors, and no {HF_INDEX}: a checkpoint in one file has the name {SINGLE}"
    assert_refused(tmp_path / "a", message, tmp_path)


def test_an_old_index_beside_a_new_single_file(good, tmp_path, capsys):
    """What transformers 5 leaves: it saves one file over a checkpoint in shards, and removes these, but not their index."""
    good_checkpoint(tmp_path / "a", "bf16")
    shutil.copy(good / HF_INDEX, tmp_path / "a")
    note = (f"{tmp_path}/a/{HF_INDEX} names other files than {SINGLE}, and none of them is here: it was left by an earlier "
            f"save, and {SINGLE} is loaded; remove the index")  # fmt: skip
    for name in ("load", "plan", "convert"):
        PROGRAMS[name](tmp_path / "a", tmp_path)
        assert capsys.readouterr().err.count(f"warning: {note}\n") == 1, name
    report = check(tmp_path / "a")
    assert report.ok and [str(f.problem) for f in report.findings] == [note]


def test_transformers_leaves_the_old_index(tmp_path):
    """The case above, made by transformers itself."""
    from support.model_pairs import theirs

    make_checkpoint(tmp_path / "a", V3 | {"num_hidden_layers": 2, "n_routed_experts": 16, "num_nextn_predict_layers": 0})
    theirs(tmp_path / "a").save_pretrained(tmp_path / "a")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert {SINGLE, HF_INDEX, "config.json"} <= names and not any("-of-" in name for name in names)
    assert json.loads((tmp_path / "a" / HF_INDEX).read_text())["weight_map"]
    assert check(tmp_path / "a", quick=True).looked["tensors"] == "77 tensors: names, shapes and dtypes as the config has them"
