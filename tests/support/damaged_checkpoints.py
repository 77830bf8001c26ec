"""Kinds of broken checkpoint, each made from a good one: for tests here, and for trying another loader.

    python tests/support/damaged_checkpoints.py                    # lists the kinds
    python tests/support/damaged_checkpoints.py KIND DIR [GOOD]    # makes DIR: GOOD, or a small random one, broken so

A kind says what good directory it starts from, who has to refuse it, and what the refusal has to say.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

HF_INDEX = "model.safetensors.index.json"
EVERYBODY = ("load", "convert", "cast", "check")
NOT_TO_CAST = ("load", "convert", "check")  # it is BF16 already
SEALED = ("load", "check", "verify")  # a manifest says what was written
LOADERS = ("load", "check")  # converted files are no source, and text is none of a converter's business
WEIGHT, SCALE, BIAS = "layers.1.self_attn.o_proj.weight", "layers.1.self_attn.o_proj.weight_scale_inv", "correction_bias"


class Kind(NamedTuple):
    good: str  # what it is made from: see good_checkpoint
    damage: Callable[[Path], Any]  # breaks a directory; returns names that the refusal must give
    by: tuple[str, ...]  # who must refuse it: load, convert, cast, check, verify (generate.py --verify)
    says: tuple[str, ...]  # what else the refusal must say


KINDS: dict[str, Kind] = {}


def kind(good: str, *says: str, by: tuple[str, ...] = EVERYBODY) -> Callable[[Callable], Callable]:
    def add(damage: Callable[[Path], Any]) -> Callable[[Path], Any]:
        KINDS[damage.__name__.replace("_", " ")] = Kind(good, damage, by, says)
        return damage

    return add


def add_kinds(good: str, by: tuple[str, ...], cases: dict[str, tuple]) -> None:
    """Kinds that are one function each with other arguments: name to (function, arguments …, what it must say)."""
    for name, (damage, *arguments, says) in cases.items():
        KINDS[name] = Kind(good, partial(damage, *arguments), by, (says,))


def good_checkpoint(folder: Path, good: str) -> None:
    """Writes a small random checkpoint: "fp8" in shards, "ue8m0" the same with powers of two as scales, "bf16" in one
    file, "converted" by convert.py for two ranks, "cast" by fp8_cast_bf16.py, "upstream" as the V3 repository's converter
    leaves it."""
    from checkpoint.cast import cast
    from checkpoint.convert import convert
    from support.checkpoints import fp8_sizes, make_checkpoint
    from support.families import V3
    from support.rank_weights import write_upstream
    from support.tiny_tokenizer import VOCAB_SIZE, write_tokenizer

    experts = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 2}
    config = V3 | fp8_sizes(2) | experts | {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 2}
    if good == "ue8m0":
        config["quantization_config"] = {"scale_fmt": "ue8m0"}
    if good in ("converted", "cast", "upstream"):
        source = folder.with_name(f"{folder.name}-source")
        good_checkpoint(source, "fp8")
        if good == "converted":
            convert(source, folder, 2)
        elif good == "cast":
            cast(source, folder, "cpu")
        else:
            write_upstream(source, folder, 2, config)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(source / file, folder)
            folder.with_name(f"{folder.name}.json").write_text(json.dumps(config | quantization(source)))
        shutil.rmtree(source)
        return
    make_checkpoint(folder, config, fp8=good != "bf16", shard_bytes=1 << 30 if good == "bf16" else 1 << 19)
    write_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 1}')
    if good == "bf16":
        min(folder.glob("*.safetensors")).rename(folder / "model.safetensors")
        (folder / HF_INDEX).unlink()


def quantization(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    return {"quantization_config": config["quantization_config"]}


# --------------------------------------------------------------------------------------------------------------------
# Tools
# --------------------------------------------------------------------------------------------------------------------


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def whole(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in files(folder) for k, v in load_file(file).items()}


def header_of(file: Path) -> tuple[dict, bytes]:
    data = file.read_bytes()
    n = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def place(folder: Path, ending: str) -> tuple[Path, str]:
    """The first tensor whose name ends so, and its file."""
    for file in files(folder):
        for name in sorted(header_of(file)[0]):
            if name.endswith(ending):
                return file, name
    raise SystemExit(f"error: {folder}: no tensor is called …{ending}")


def file_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / HF_INDEX).read_text())["weight_map"][name]


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrites a safetensors file after `change` has had its tensors."""
    with safe_open(file, "pt") as f:
        metadata = f.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata)


def edit_json(file: Path, change: Callable[[Any], Any]) -> None:
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


def reindex(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edit_json(folder / HF_INDEX, lambda index: change(index["weight_map"]))


def drop(folder: Path, where: Callable[[str], bool]) -> None:
    """Takes tensors out of the files and the index."""
    for file in files(folder):
        if any(where(name) for name in header_of(file)[0] if name != "__metadata__"):
            edit(file, lambda tensors: [tensors.pop(name) for name in list(tensors) if where(name)])
        if not load_file(file):
            file.unlink()
    if (folder / HF_INDEX).exists():
        reindex(folder, lambda m: [m.pop(name) for name in list(m) if where(name)])


def add(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = min(folder.glob("*.safetensors"))
    edit(file, lambda held: held.update(tensors))
    reindex(folder, lambda m: m.update(dict.fromkeys(tensors, file.name)))


def replace(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """Changes one tensor; returns the name of its file."""
    file = file_of(folder, name)
    edit(file, lambda tensors: tensors.update({name: change(tensors[name])}))
    return file.name


def change_tensor(ending: str, change: Callable[[torch.Tensor], torch.Tensor], folder: Path) -> tuple[str, str]:
    file, name = place(folder, ending)
    edit(file, lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))
    return file.name, name


def set_byte(ending: str, value: int, folder: Path) -> tuple[str, str]:
    """Writes one byte over a tensor's 6th."""
    file, name = place(folder, ending)
    header, body = header_of(file)
    data = bytearray(file.read_bytes())
    data[len(data) - len(body) + header[name]["data_offsets"][0] + 5] = value
    file.write_bytes(data)
    return file.name, name


def put(change: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Lets a change in place return the tensor."""

    def changed(tensor: torch.Tensor) -> torch.Tensor:
        change(tensor)
        return tensor

    return changed


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def change_file(change: Callable[[bytes], bytes], folder: Path) -> str:
    file = files(folder)[1]
    file.write_bytes(change(file.read_bytes()))
    return file.name


def flipped(data: bytes, at: int, bit: int = 0x20) -> bytes:
    return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]


def text_of(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


NO_FILE = "truncated, or not a safetensors file"
add_kinds("fp8", EVERYBODY, {
    "truncated by a byte": (change_file, lambda d: d[:-1], "truncated: expected"),
    "truncated by half": (change_file, lambda d: d[: len(d) // 2], "truncated"),
    "truncated in the header": (change_file, lambda d: d[:100], f"{NO_FILE} (100 bytes)"),
    "truncated in the length": (change_file, lambda d: d[:7], f"{NO_FILE} (7 bytes)"),
    "empty file": (change_file, lambda d: b"", f"{NO_FILE} (0 bytes)"),
    "padded": (change_file, lambda d: d + bytes(512), "has bytes no tensor owns: expected"),
    "zeroed header": (change_file, lambda d: bytes(8 + text_of(d)) + d[8 + text_of(d) :], NO_FILE),
    "zeroed text of the header": (change_file, lambda d: d[:8] + bytes(text_of(d)) + d[8 + text_of(d) :],
                                  "header is not valid JSON"),
    "zeroed file": (change_file, lambda d: bytes(len(d)), NO_FILE),
    "bit flipped in the length": (change_file, lambda d: flipped(d, 1, 1), "header is not valid JSON"),
    "bit flipped in the header": (change_file, lambda d: flipped(d, 8), "header is not valid JSON"),
    "bit flipped in a dtype": (change_file, lambda d: flipped(d, d.index(b'"BF16"') + 3, 4), "unknown dtype 'BF56'"),
    "bit flipped in a shape": (change_file, lambda d: flipped(d, d.index(b'"shape":[1') + 9, 2), "data_offsets span"),
    "bit flipped in a name": (change_file, lambda d: flipped(d, d.index(b"model.layers"), 1), "does not name it"),
    "header length of 2^60": (change_file, lambda d: (1 << 60).to_bytes(8, "little") + d[8:], NO_FILE),
    "header length of 2^64 - 1": (change_file, lambda d: b"\xff" * 8 + d[8:], NO_FILE),
    "header longer than the file": (change_file, lambda d: len(d).to_bytes(8, "little") + d[8:], NO_FILE),
    "a note in place of the file": (change_file, lambda d: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
                                    "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    "a web page in place of the file": (change_file, lambda d: b"<!DOCTYPE html><html><head><title>404</title>" * 99,
                                        NO_FILE),
})  # fmt: skip


@kind("fp8", NO_FILE)
def header_of_64_gib_in_a_sparse_file(folder: Path) -> str:
    file = files(folder)[1]
    os.truncate(file, 1 << 40)
    with open(file, "r+b") as f:
        f.write((1 << 36).to_bytes(8, "little"))
    return file.name


@kind("fp8", "missing, but")
def missing_file(folder: Path) -> str:
    file = files(folder)[1]
    file.unlink()
    return file.name


@kind("fp8", "not named by")
def extra_file(folder: Path) -> str:
    shutil.copy(files(folder)[0], folder / "model-00099-of-00099.safetensors")
    return "model-00099-of-00099.safetensors"


@kind("fp8", "two checkpoints")
def single_file_left_beside_shards(folder: Path) -> str:
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    return "model.safetensors"


@kind("fp8", "is not the name of a file of weights")
def newline_in_a_file_name(folder: Path) -> None:
    shutil.copy(files(folder)[0], folder / "model\nerror: x.safetensors")


@kind("fp8", "places it in")
def swapped_shards(folder: Path) -> str:
    first, second = files(folder)[:2]
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    return first.name


@kind("fp8", "cannot be read (Is a directory)")
def directory_for_a_file(folder: Path) -> str:
    file = files(folder)[1]
    file.unlink()
    file.mkdir()
    return file.name


@kind("fp8", "not a regular file")
def pipe_for_a_file(folder: Path) -> str:
    file = files(folder)[1]
    file.unlink()
    os.mkfifo(file)
    return file.name


def link(target: str, folder: Path) -> str:
    file = files(folder)[1]
    file.unlink()
    file.symlink_to(target)
    return file.name


add_kinds("fp8", EVERYBODY, {
    "link to nothing": (link, "../blobs/0123", "a broken link: nothing is at '../blobs/0123'"),
    "link to itself": (lambda folder: link(files(folder)[1].name, folder), "a broken link: nothing is at 'model-"),
    "link to a device": (link, "/dev/zero", "not a regular file"),
})  # fmt: skip


@kind("fp8", "missing, but")
def file_renamed(folder: Path) -> str:
    file = files(folder)[1]
    file.rename(folder / file.name.replace("-of-", "-OF-"))
    return file.name


@kind("fp8", "cannot be read (Permission denied)")
def unreadable_file(folder: Path) -> str:
    files(folder)[1].chmod(0)
    return files(folder)[1].name


# --------------------------------------------------------------------------------------------------------------------
# Headers
# --------------------------------------------------------------------------------------------------------------------


def write_header(file: Path, text: bytes, body: bytes) -> str:
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return file.name


def change_header(change: Callable[[dict, str], Any], folder: Path) -> tuple[str, str]:
    """`change` has the header and the name of a tensor in it, and may return another header."""
    file, name = place(folder, WEIGHT)
    header, body = header_of(file)
    return write_header(file, json.dumps(change(header, name) or header).encode(), body), name


def set_field(field: str, change: Callable[[Any], Any], folder: Path) -> tuple[str, str]:
    return change_header(lambda header, name: header[name].update({field: change(header[name][field])}), folder)


def header_text(change: Callable[[bytes], bytes], folder: Path) -> str:
    file = files(folder)[1]
    header, body = header_of(file)
    return write_header(file, change(json.dumps(header).encode()), body)


def at_file(damage: Callable, *arguments: Any) -> str:
    """Names the file alone: the message names another tensor, or none."""
    return damage(*arguments)[0]


def rename_tensor(new: str, folder: Path) -> str:
    return change_header(lambda header, name: header.update({new: header.pop(name)}), folder)[0]


NO_SIZES = "shape or data_offsets in the header are not sizes"
add_kinds("fp8", EVERYBODY, {
    "overlapping tensors": (set_field, "data_offsets", lambda o: [o[0] - 8, o[1] - 8], "gap or overlap"),
    "gap between tensors": (set_field, "data_offsets", lambda o: [o[0] + 8, o[1] + 8], "gap or overlap"),
    "two tensors in one place": (at_file, change_header, lambda h, name: h.update({"model.twin": h[name]}),
                                 "model.twin: data_offsets leave a gap or overlap"),
    "negative offsets": (set_field, "data_offsets", lambda o: [-o[1], -o[0]], NO_SIZES),
    "offsets the wrong way round": (set_field, "data_offsets", lambda o: o[::-1], "its data_offsets span -"),
    "offsets far beyond the file": (at_file, set_field, "data_offsets", lambda o: [(1 << 62), (1 << 62) + o[1] - o[0]], "gap or"),
    "offsets of 2^64": (set_field, "data_offsets", lambda o: [1 << 64, (1 << 64) + o[1] - o[0]], NO_SIZES),
    "one offset": (set_field, "data_offsets", lambda o: o[:1], NO_SIZES),
    "offsets that are text": (set_field, "data_offsets", lambda o: [str(n) for n in o], NO_SIZES),
    "unknown dtype": (set_field, "dtype", lambda _: "F4", "unknown dtype 'F4'"),
    "dtype that is a list": (set_field, "dtype", lambda d: [d], "unknown dtype ["),
    "dtype twice as wide": (set_field, "dtype", lambda _: "BF16", "bytes, its data_offsets span"),
    "huge shape": (set_field, "shape", lambda _: [1 << 62, 1 << 62], "its data_offsets span"),
    "shape of fractions": (set_field, "shape", lambda s: [float(n) for n in s], NO_SIZES),
    "negative shape": (set_field, "shape", lambda s: [-n for n in s], NO_SIZES),
    "no shape": (change_header, lambda h, name: h[name].pop("shape") and None, "expected dtype, shape and data_offsets"),
    "tensor that is a number": (change_header, lambda h, name: h.update({name: 1}), "expected dtype, shape and"),
    "metadata of numbers": (at_file, change_header, lambda h, _: h.update({"__metadata__": {"x": 1}}), "__metadata__ is not"),
    "newline in a tensor's name": (rename_tensor, "a\nerror: b", r"name is 'a\nerror: b', expected 1 to"),
    "NUL in a tensor's name": (rename_tensor, "a\0b", r"name is 'a\x00b', expected"),
    "escape in a tensor's name": (rename_tensor, "a\x1b[2Jb", r"name is 'a\x1b[2Jb', expected"),
    "tensor without a name": (rename_tensor, "", "name is '', expected"),
    "tensor's name of a megabyte": (rename_tensor, "a" * (1 << 20), "expected 1 to"),
    "duplicate keys in a header": (header_text, lambda t: b'{"a": 1, "a": 2, ' + t[1:], "'a' is there twice"),
    "header that is a list": (header_text, lambda t: b"[" + t + b"]", "header is not valid JSON (not an object)"),
    "header of brackets": (header_text, lambda t: b"[" * 200_000, "header is not valid JSON ("),
    "header with a number of 5,000 digits": (header_text, lambda t: b'{"a": ' + b"1" * 5000 + b"," + t[1:], "not valid"),
    "header that is no UTF-8": (header_text, lambda t: b'{"\xff": 1,' + t[1:], "header is not valid JSON ("),
    "header cut short": (header_text, lambda t: t[:-20], "header is not valid JSON ("),
})  # fmt: skip

# --------------------------------------------------------------------------------------------------------------------
# The index
# --------------------------------------------------------------------------------------------------------------------


def write_index(change: Callable[[bytes], bytes], folder: Path) -> str:
    file = folder / HF_INDEX
    file.write_bytes(change(file.read_bytes()))
    return HF_INDEX


def point(value: Any, folder: Path) -> tuple[str, str]:
    """Lets the index place a tensor elsewhere."""
    name = place(folder, WEIGHT)[1]
    reindex(folder, lambda m: m.update({name: value}))
    return HF_INDEX, name


def point_to_other_file(folder: Path) -> tuple[str, str, str]:
    file, name = place(folder, WEIGHT)
    other = next(path for path in files(folder) if path != file)
    reindex(folder, lambda m: m.update({name: other.name}))
    return file.name, name, other.name


def twice_in_the_index(folder: Path) -> str:
    name = place(folder, WEIGHT)[1]
    return write_index(lambda t: t.replace(b'"weight_map": {', f'"weight_map": {{"{name}": "x",'.encode()), folder)


def not_in_the_index(folder: Path) -> tuple[str, str]:
    file, name = place(folder, WEIGHT)
    reindex(folder, lambda m: m.pop(name))
    return file.name, name


def remove(name: str, folder: Path) -> None:
    (folder / name).unlink()


def pipe(name: str, folder: Path) -> str:
    remove(name, folder)
    os.mkfifo(folder / name)
    return name


PLAIN = "is not the plain name of a .safetensors file"
add_kinds("fp8", EVERYBODY, {
    "index that is no JSON": (write_index, lambda t: t[:-5], "not readable as JSON"),
    "index with a byte order mark": (write_index, lambda t: b"\xef\xbb\xbf" + t, "not readable as JSON (Unexpected UTF-8"),
    "index in UTF-16": (write_index, lambda t: t.decode().encode("utf-16"), "not readable as JSON"),
    "empty index": (write_index, lambda t: b"", "not readable as JSON"),
    "index that is null": (write_index, lambda t: b"null", "expected a JSON object, found NoneType"),
    "index without tensors": (write_index, lambda t: b'{"weight_map": {}}', "expected a weight_map of tensor names"),
    "index with null for a map": (write_index, lambda t: b'{"weight_map": null}', "expected a weight_map of tensor names"),
    "index that is a pipe": (pipe, HF_INDEX, "not a regular file"),
    "index of another file": (point_to_other_file, "places it in"),
    "index of a file not there": (at_file, point, "model-00077-of-00077.safetensors", "model-00077-of-00077.safetensors: missing"),
    "stray key in the index": (lambda folder: reindex(folder, lambda m: m.update({"stray.weight": max(m.values())})),
                               "stray.weight is missing, but"),
    "tensor not in the index": (not_in_the_index, "does not name it"),
    "duplicate key in the index": (twice_in_the_index, "is there twice"),
    "index with an absolute path": (point, "/etc/model.safetensors", PLAIN),
    "index with .. in a path": (point, "../copy/model-00001-of-00002.safetensors", PLAIN),
    "index with a backslash": (point, "..\\x.safetensors", PLAIN),
    "index with a NUL": (point, "a\0.safetensors", PLAIN),
    "index with a newline": (point, "a\nb.safetensors", PLAIN),
    "index with null": (point, None, PLAIN),
    "index with a pickle": (point, "pytorch_model.bin", PLAIN),
    "no index": (remove, HF_INDEX, f"but no {HF_INDEX} beside them"),
})  # fmt: skip

# --------------------------------------------------------------------------------------------------------------------
# Tensors
# --------------------------------------------------------------------------------------------------------------------


def without(ending: str, folder: Path) -> str:
    name = place(folder, ending)[1]
    drop(folder, lambda n: n == name)
    return name


def more(name: str, folder: Path) -> str:
    add(folder, {name: torch.ones(8).bfloat16()})
    return name


def cycle(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8).roll(1, 0).view(tensor.dtype)


def fill(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return put(lambda tensor: tensor[-1].fill_(value))


add_kinds("fp8", EVERYBODY, {
    "missing tensor": (without, "layers.0.self_attn.kv_b_proj.weight", "is missing (F8_E4M3 "),
    "missing norm": (without, "model.norm.weight", "is missing (BF16 "),
    "missing head": (without, "lm_head.weight", "is missing (BF16 "),
    "missing expert": (without, "experts.3.up_proj.weight", "is missing (F8_E4M3 "),
    "missing bias of a router": (without, BIAS, "is missing (F32 4)"),
    "missing scale": (without, SCALE, "is missing: an FP8 weight without its scale (F32 "),
    "extra tensor": (more, "model.layers.0.self_attn.q_proj.weight", "the config has no such tensor"),
    "extra expert": (more, "model.layers.1.mlp.experts.4.up_proj.weight", "the config has no such tensor"),
    "extra layer": (more, "model.layers.9.input_layernorm.weight", "the config has no such tensor"),
    "weight in BF16": (change_tensor, WEIGHT, lambda t: t.bfloat16(), "expected F8_E4M3, as "),
    "weight in E5M2": (change_tensor, WEIGHT, lambda t: t.view(torch.uint8).view(torch.float8_e5m2),
                       "expected F8_E4M3 192x256 (or BF16, F32, F16), found F8_E5M2 192x256"),
    "weight in bytes": (change_tensor, WEIGHT, lambda t: t.view(torch.uint8), "expected F8_E4M3 192x256 (or BF16, F32, F16), found U8"),
    "norm in float64": (change_tensor, "model.norm.weight", lambda t: t.double(), "expected BF16 192 (or F32, F16), found F64 192"),
    "bias in whole numbers": (change_tensor, BIAS, lambda t: t.int(), "expected F32 4 (or BF16, F16), found I32 4"),
    "bias in FP8": (change_tensor, BIAS, lambda t: t.to(torch.float8_e4m3fn), "expected F32 4 (or BF16, F16), found F8_E4M3 4"),
    "router in FP8": (change_tensor, "layers.1.mlp.gate.weight", lambda t: t.to(torch.float8_e4m3fn),
                      "expected BF16 4x192 (or F32, F16), found F8_E4M3 4x192"),
    "head in FP8": (change_tensor, "lm_head.weight", lambda t: t.to(torch.float8_e4m3fn),
                    "expected BF16 320x192 (or F32, F16), found F8_E4M3 320x192"),
    "scale in FP8": (change_tensor, SCALE, lambda t: t.to(torch.float8_e4m3fn), "expected F32 2x2 (or BF16, F16, F8_E8M0), found F8_E4M3 2x2"),
    "weight in float16 with a scale": (change_tensor, WEIGHT, lambda t: t.half(), "expected F8_E4M3, as "),
    "scales as exponents": (change_tensor, SCALE, lambda t: t.to(torch.uint8), "expected F32 2x2 (or BF16, F16, F8_E8M0), found U8 2x2"),
    "weight cut": (change_tensor, WEIGHT, lambda t: t[:-1], "expected F8_E4M3 192x256, found F8_E4M3 191x256"),
    "weight transposed": (change_tensor, WEIGHT, lambda t: t.T, "expected F8_E4M3 192x256, found F8_E4M3 256x192"),
    "weight flattened": (change_tensor, WEIGHT, lambda t: t.view(-1), "expected F8_E4M3 192x256, found F8_E4M3 49152"),
    "empty weight": (change_tensor, WEIGHT, lambda t: t[:0], "expected F8_E4M3 192x256, found F8_E4M3 0x256"),
    "scale of one value": (change_tensor, SCALE, lambda t: t[:1, :1], "expected F32 2x2, found F32 1x1"),
    "scale for each row": (change_tensor, SCALE, lambda t: t.repeat_interleave(96, 0), "expected F32 2x2, found F32 192x2"),
    "NaN for a scale": (change_tensor, SCALE, fill(float("nan")), "expected finite, positive scales, found nan at [1, 0]"),
    "infinite scale": (change_tensor, SCALE, fill(float("inf")), "expected finite, positive scales, found inf at [1, 0]"),
    "scale of zero": (change_tensor, SCALE, fill(0.0), "expected finite, positive scales, found 0.0 at [1, 0]"),
    "negative scale": (change_tensor, SCALE, fill(-1.0), "expected finite, positive scales, found -1.0 at [1, 0]"),
    "scale that overflows": (change_tensor, SCALE, fill(8e35), "expected scales of at most 7.57e+35, so that a scaled weight is "
                             "finite, found 8.0000003"),
    "exponent that overflows": (change_tensor, SCALE, lambda t: fill(2.0**127)(t.to(torch.float8_e8m0fnu)),
                                "so that a scaled weight is finite, found 1.7014118346046923e+38 at [1, 0]"),
    "zeroed scales": (change_tensor, SCALE, put(torch.zero_), "expected finite, positive scales, found 0.0 at [0, 0]"),
})  # fmt: skip

EMBED, ZEROS = "model.embed_tokens.weight", "expected weights, found nothing but zeros"
add_kinds("fp8", ("check",), {
    "zeroed weight": (change_tensor, WEIGHT, put(lambda t: t.view(torch.uint8).zero_()), ZEROS),
    "weight of negative zeros": (change_tensor, WEIGHT, put(lambda t: t.view(torch.uint8).fill_(0x80)), ZEROS),
    "zeroed norm": (change_tensor, "layers.0.input_layernorm.weight", put(torch.zero_), ZEROS),
    "zeroed embedding": (change_tensor, EMBED, put(torch.zero_), ZEROS),
    "NaN in an FP8 weight": (set_byte, WEIGHT, 0x7F, "expected finite values, found NaN or infinity at [0, 5], 1 such"),
    "negative NaN in an FP8 weight": (set_byte, WEIGHT, 0xFF, "NaN or infinity at [0, 5], 1 such"),
    "NaN in a router's bias": (change_tensor, BIAS, fill(float("nan")), "NaN or infinity at [3], 1 such"),
    "NaN in a norm": (change_tensor, "model.norm.weight", fill(float("nan")), "NaN or infinity at [191], 1 such"),
    "MTP embedding that differs": (set_byte, "layers.2.embed_tokens.weight", 0x11, "others from row 0 on"),
    "MTP head of another model": (change_tensor, "layers.2.shared_head.head.weight", cycle, "others from row 0 on"),
})  # fmt: skip
add_kinds("bf16", ("check",), {
    "infinity in a BF16 weight": (change_tensor, WEIGHT, fill(float("inf")), "NaN or infinity at [191, 0], 256 such"),
    "minus infinity in a BF16 weight": (change_tensor, WEIGHT, fill(-float("inf")), "NaN or infinity at [191, 0], 256"),
    "zeroed BF16 expert": (change_tensor, "experts.2.down_proj.weight", put(torch.zero_), ZEROS),
})  # fmt: skip
add_kinds("ue8m0", ("check",), {
    "scale that is no power of two": (change_tensor, "layers.0.self_attn.kv_b_proj.weight_scale_inv", fill(0.003),
                                      "expected powers of two (scale_fmt ue8m0), found 0.00"),
})  # fmt: skip

# --------------------------------------------------------------------------------------------------------------------
# The config
# --------------------------------------------------------------------------------------------------------------------


def configure(changes: dict[str, Any], folder: Path) -> None:
    edit_json(folder / "config.json", lambda raw: raw.update(changes))


def unset(name: str, folder: Path) -> str:
    edit_json(folder / "config.json", lambda raw: raw.pop(name))
    return "config.json"


def quantise_so(changes: Any, folder: Path) -> str:
    raw = json.loads((folder / "config.json").read_text())
    old = raw["quantization_config"]
    configure({"quantization_config": old | changes if isinstance(changes, dict) else changes}, folder)
    return "config.json"


def write_file(name: str, text: str, folder: Path) -> str:
    (folder / name).write_text(text)
    return name


def prepend(name: str, text: str, folder: Path) -> str:
    return write_file(name, text + (folder / name).read_text()[1:], folder)


YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
add_kinds("fp8", EVERYBODY, {
    "config with a layer more": (configure, {"num_hidden_layers": 3}, "model.layers.3.input_layernorm.weight is missing (BF16 192)"),
    "config with a layer less": (configure, {"num_hidden_layers": 1}, "model.layers.1."),
    "config with more experts": (configure, {"n_routed_experts": 8}, "expected BF16 8x192, found BF16 4x192"),
    "config with fewer experts": (configure, {"n_routed_experts": 2, "n_group": 1}, "expected BF16 2x192, found BF16 4x192"),
    "config with another hidden size": (configure, {"hidden_size": 256}, "expected BF16 320x256, found BF16 320x192"),
    "config with another rank of queries": (configure, {"q_lora_rank": 128}, "expected F8_E4M3 128x192, found F8_E4M3 160"),
    "config without a rank of queries": (configure, {"q_lora_rank": None}, "q_proj.weight is missing"),
    "config with another rank of latents": (configure, {"kv_lora_rank": 64}, "expected F8_E4M3 128x192, found F8_E4M3 192"),
    "config with another vocabulary": (configure, {"vocab_size": 640}, "expected BF16 640x192, found BF16 320x192"),
    "config with more heads": (configure, {"num_attention_heads": 8}, "expected F8_E4M3 1024x160, found F8_E4M3 512x160"),
    "config with another value width": (configure, {"v_head_dim": 128}, "found F8_E4M3 "),
    "config with more dense layers": (configure, {"first_k_dense_replace": 2}, "model.layers.1.mlp"),
    "config with another router": (configure, {"topk_method": "greedy"}, "topk_method 'greedy' is not"),
    "config with more shared experts": (configure, {"n_shared_experts": 4}, "shared_experts"),
    "config of another architecture": (configure, {"model_type": "deepseek_v32"}, "model_type 'deepseek_v32' is not"),
    "config with another activation": (configure, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    "config with another rotary embedding": (configure, {"rope_scaling": {"type": "linear"}}, "rope_scaling.type 'linear' is not"),
    "config without the hidden size": (unset, "hidden_size", "hidden_size is missing"),
    "config with text for a number": (configure, {"hidden_size": "192"}, "hidden_size is '192', expected a whole number"),
    "config with a fraction": (configure, {"num_attention_heads": 4.5}, "num_attention_heads is 4.5, expected a whole number"),
    "config with true for a number": (configure, {"n_group": True}, "n_group is True, expected a whole number"),
    "config with a negative number": (configure, {"kv_lora_rank": -128}, "kv_lora_rank is -128, expected a whole number"),
    "config with NaN": (configure, {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a number"),
    "config with infinity": (configure, {"routed_scaling_factor": float("inf")}, "routed_scaling_factor is inf, expected a number"),
    "config with 10^12 layers": (configure, {"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, expected"),
    "config with 10^8 experts": (configure, {"n_routed_experts": 10**8}, "n_routed_experts is 100000000, expected at most"),
    "config with 10^9 layers": (configure, {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected at most 1000"),
    "config with a number of 5,000 digits": (prepend, "config.json", '{"hidden_size": ' + "1" * 5000 + ",", "not readable"),
    "config with duplicate keys": (prepend, "config.json", '{"hidden_size": 192,', "'hidden_size' is there twice"),
    "config with a list for an object": (configure, {"rope_scaling": [1]}, "rope_scaling is [1], expected an object"),
    "config with text in the rotary embedding": (configure, {"rope_scaling": YARN | {"factor": "four"}},
                                                 "rope_scaling.factor is 'four', expected a number"),
    "config with text for a base": (configure, {"rope_theta": "10000"}, "rope_theta is '10000', expected a number"),
    "config with nothing for a factor": (configure, {"rope_scaling": YARN | {"factor": None}}, "rope_scaling.factor is missing"),
    "config with two bases": (configure, {"rope_scaling": YARN | {"rope_theta": 50000}}, "but rope_scaling.rope_theta is 50000"),
    "config with a negative temperature": (configure, {"rope_scaling": YARN | {"mscale": -5}}, "rope_scaling.mscale is -5.0, expected 0 or"),
    "config with a beta of 0": (configure, {"rope_scaling": YARN | {"beta_fast": 0}}, "rope_scaling.beta_fast is 0.0, expected"),
    "config with no group": (configure, {"n_group": 0, "topk_group": 0}, "n_group is 0, expected a divisor"),
    "config that chooses more experts than kept": (configure, {"num_experts_per_tok": 3}, "num_experts_per_tok is 3"),
    "config that is no JSON": (write_file, "config.json", "{", "not readable as JSON"),
    "config of brackets": (write_file, "config.json", "[" * 200_000, "not readable as JSON"),
    "config that is a list": (write_file, "config.json", "[]", "expected a JSON object, found list"),
    "empty config": (write_file, "config.json", "", "not readable as JSON"),
    "no config": (remove, "config.json", "config.json"),
    "config that is a pipe": (pipe, "config.json", "config.json"),
    "config that denies FP8": (unset, "quantization_config", "no quantization_config, but the files hold FP8 scales"),
    "config with other blocks": (quantise_so, {"weight_block_size": [64, 64]}, "weight_block_size [64, 64] is not"),
    "config with another FP8": (quantise_so, {"fmt": "e5m2"}, "fmt 'e5m2' is not supported"),
    "config with another quantisation": (quantise_so, {"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not supported"),
    "config with static activations": (quantise_so, {"activation_scheme": "static"}, "activation_scheme 'static' is not"),
    "config with unknown scales": (quantise_so, {"scale_fmt": "e5m3"}, "scale_fmt 'e5m3' is not supported"),
    "config with text for quantisation": (quantise_so, "fp8", "quantization_config is 'fp8', expected an object"),
})  # fmt: skip
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
add_kinds("bf16", NOT_TO_CAST, {
    "config that claims FP8": (configure, {"quantization_config": FP8}, "a quantization_config, but the files hold no FP8"),
    "config that claims float64": (configure, {"torch_dtype": "float64"}, "weights in 'float64' are not supported"),
    "single file renamed": (lambda folder: (folder / "model.safetensors").rename(folder / "weights.safetensors") and None,
                            "one file of weights, weights.safetensors, and no"),
    "no weights": (remove, "model.safetensors", "no checkpoint here (no .safetensors files)"),
})  # fmt: skip

# --------------------------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------------------------


def tokenise_so(change: Callable[[dict], Any], folder: Path) -> str:
    edit_json(folder / "tokenizer.json", change)
    return "tokenizer.json"


def without_token(text: str, raw: dict) -> None:
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != text]
    raw["model"]["vocab"].pop(text, None)


def no_end_token(folder: Path) -> None:
    for name, field in (("config.json", "eos_token_id"), ("generation_config.json", "eos_token_id"),
                        ("tokenizer_config.json", "eos_token")):  # fmt: skip
        edit_json(folder / name, lambda raw, field=field: raw.pop(field))


def template(change: Callable[[str], str | None], folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", lambda raw: raw.update(chat_template=change(raw["chat_template"])))


def generate_so(changes: dict[str, Any], folder: Path) -> str:
    edit_json(folder / "generation_config.json", lambda raw: raw.update(changes))
    return "generation_config.json"


EOS = "<｜end▁of▁sentence｜>"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
add_kinds("fp8", LOADERS, {
    "head that ought to be the embedding": (configure, {"tie_word_embeddings": True}, "expected the bytes of "),
    "no tokenizer": (remove, "tokenizer.json", "tokenizer.json: no such file; copy the tokenizer files"),
    "empty tokenizer": (write_file, "tokenizer.json", "", "not readable as JSON"),
    "tokenizer of nothing": (write_file, "tokenizer.json", "{}", "is not supported (known: ByteLevel)"),
    "tokenizer cut short": (lambda f: write_file("tokenizer.json", (f / "tokenizer.json").read_text()[:500], f), "not read"),
    "tokenizer that is a pipe": (pipe, "tokenizer.json", "not a regular file"),
    "tokenizer without its vocabulary": (tokenise_so, lambda raw: raw["model"].pop("vocab"), "not a usable tokenizer"),
    "tokenizer with another decoder": (tokenise_so, lambda raw: raw.update(decoder={"type": "Metaspace"}), "is not supp"),
    "tokenizer that lowers case": (tokenise_so, lambda raw: raw.update(normalizer={"type": "Lowercase"}), "come back whole"),
    "tokenizer larger than the embedding": (tokenise_so, lambda raw: raw["model"]["vocab"].update(x=320),
                                            "ids go up to 320, but the model's vocab_size is 320"),
    "tokenizer without the end token": (tokenise_so, partial(without_token, EOS), "eos_token"),
    "tokenizer of another model": (configure, {"bos_token_id": 7}, "this is another model's tokenizer"),
    "no end token anywhere": (no_end_token, "names an end token"),
    "end token beyond the embedding": (lambda folder: generate_so({"eos_token_id": 5000}, folder) and None,
                                       "eos_token_id 5000 is not below vocab_size 320"),
    "two tokens with one id": (tokenise_so, lambda raw: raw["model"]["vocab"].update(Q=raw["model"]["vocab"]["P"]),
                               "have the same id"),
    "end token that is text": (generate_so, {"eos_token_id": EOS}, "expected a token id or a list of them"),
    "settings that are no JSON": (write_file, "tokenizer_config.json", "{", "tokenizer_config.json: not readable as JSON"),
    "generation settings that are no JSON": (write_file, "generation_config.json", "x", "not readable as JSON"),
    "temperature that is text": (generate_so, {"temperature": "hot"}, "temperature is 'hot', expected a number"),
    "negative temperature": (generate_so, {"temperature": -1}, "temperature is -1.0, expected"),
    "template with a mistake": (template, lambda t: t + "{% if %}", "the chat template has a mistake in line 1"),
    "template that never ends": (template, lambda t: t + ENDLESS, "cannot render these messages: more than "),
    "template that calls what is not there": (template, lambda t: t + "{{ nothing() }}", "cannot render these messages"),
    "template that reaches out": (template, lambda t: t + "{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot render"),
    "template that is a number": (template, lambda t: 7, "chat_template is no string"),
})  # fmt: skip
add_kinds("fp8", ("load",), {"no template": (template, lambda t: None, "no chat template in this checkpoint; use --raw")})
add_kinds("fp8", ("check",), {
    "template with two BOS": (template, lambda t: "{{ bos_token }}" + t, "expected one BOS, found 2"),
    "template that drops what users say": (template, lambda t: t.replace("+ m['content'] }}", "}}", 1), "leaves out what the user says"),
    "tokenizer without the user token": (tokenise_so, partial(without_token, "<｜User｜>"), "found no such token"),
})  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Directories made for ranks
# --------------------------------------------------------------------------------------------------------------------


def other_conversion(folder: Path) -> tuple[str, str]:
    """A rank's file from a conversion of other weights of the same sizes."""
    file = files(folder)[1]
    tensor = next(name for name, t in load_file(file).items() if t.dtype == torch.bfloat16 and t.dim() == 1)
    edit_in_place(file, lambda name, t: t.mul_(1.5) if name == tensor else t)
    return file.name, tensor


def edit_in_place(file: Path, change: Callable[[str, torch.Tensor], Any]) -> None:
    """Changes values, and nothing of how the file is laid out."""
    header, body = header_of(file)
    data = bytearray(file.read_bytes())
    start = len(data) - len(body)
    for name, tensor in load_file(file).items():
        change(name, tensor)
        first, last = header[name]["data_offsets"]
        data[start + first : start + last] = tensor.view(-1).view(torch.uint8).numpy().tobytes()
    file.write_bytes(data)


def mark(old: bytes, new: bytes, folder: Path) -> str:
    file = files(folder)[0]
    data = file.read_bytes()
    assert old in data and len(old) == len(new)
    file.write_bytes(data.replace(old, new))
    return file.name


def swap_ranks(folder: Path) -> str:
    first, second = files(folder)
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    return first.name


def rank_missing(folder: Path) -> str:
    file = files(folder)[1]
    file.unlink()
    return file.name


def rank_cut(folder: Path) -> str:
    file = files(folder)[1]
    os.truncate(file, file.stat().st_size - 1)
    return file.name


def rank_too_many(name: str, folder: Path) -> str:
    shutil.copy(files(folder)[0], folder / name)
    return name


def mixed_norm(folder: Path) -> str:
    file = files(folder)[1]
    edit_in_place(file, lambda name, t: t.mul_(1.5) if name == "layers.0.attn_norm.weight" else t)
    return file.name


def seal(change: Callable[[dict], Any], folder: Path) -> str:
    """Changes the manifest of a conversion."""
    edit_json(folder / MANIFEST, change)
    return MANIFEST


def first_of(raw: dict) -> dict[str, Any]:
    return raw["files"][min(raw["files"])]


def other_checksum(raw: dict) -> None:
    tensors = first_of(raw)["tensors"]
    tensors["layers.0.attn.wo.weight"] = "00000000" + tensors["layers.0.attn.wo.weight"][8:]


def respace(folder: Path) -> str:
    """Changes bytes of a header that mean nothing."""
    file = files(folder)[0]
    data = file.read_bytes()
    end = 8 + text_of(data)
    text = data[8:end].rstrip()
    assert len(text) < end - 8
    file.write_bytes(data[:8] + text + b"\n" * (end - 8 - len(text)) + data[end:])
    return file.name


MANIFEST = "model-mp2.index.json"
DAMAGED = "damaged; copy the directory again or convert again"
add_kinds("converted", SEALED, {
    "manifest that is no JSON": (write_file, MANIFEST, "{", "not readable as JSON"),
    "manifest that is a pipe": (pipe, MANIFEST, "not a regular file"),
    "manifest of another version": (seal, lambda raw: raw.update(version=7), "'deepseek-v3-ranks' version 7: convert again"),
    "manifest of other ranks": (seal, lambda raw: raw.update(ranks=4), DAMAGED),
    "manifest of another layout": (seal, lambda raw: raw.update(experts="half"), DAMAGED),
    "manifest without files": (seal, lambda raw: raw.update(files={}), DAMAGED),
    "manifest with half a hash": (seal, lambda raw: first_of(raw).update(sha256="00"), DAMAGED),
    "manifest without a rank": (seal, lambda raw: raw["files"].pop(min(raw["files"])) and None, DAMAGED),
    "manifest with .. in a name": (seal, lambda raw: raw["files"].update({"../x.safetensors": first_of(raw)}), PLAIN),
    "manifest with a newline in a name": (seal, lambda raw: raw["files"].update({"x\n.safetensors": first_of(raw)}), PLAIN),
    "manifest with duplicate keys": (prepend, MANIFEST, '{"version": 2,', "'version' is there twice"),
    "manifest with another size": (lambda folder: seal(lambda raw: first_of(raw).update(bytes=1), folder) and None,
                                   "expected 1 bytes, found"),
    "manifest with a file more": (lambda folder: seal(lambda raw: raw["files"].update(
        {"model7.safetensors": first_of(raw)}), folder) and "model7.safetensors", "" ),
    "manifest with a tensor more": (lambda folder: seal(lambda raw: first_of(raw)["tensors"].update(
        {"stray.weight": "0" * 73}), folder) and "stray.weight", "names it, but the file lacks it"),
    "manifest with another checksum": (lambda folder: seal(other_checksum, folder) and "layers.0.attn.wo.weight",
                                       "damaged: its checksum is"),
})  # fmt: skip
add_kinds("converted", LOADERS, {"no manifest": (remove, MANIFEST, "its manifest is missing; copy the directory or convert")})
add_kinds("converted", ("verify",), {
    "spaces of a header changed": (respace, ""),
    "tokenizer changed since": (tokenise_so, lambda raw: raw.update(version="1.1"), ""),
})  # fmt: skip
HF_MANIFEST = "model.safetensors.manifest.json"
add_kinds("cast", ("load", "convert", "check"), {
    "cast without its manifest": (remove, HF_MANIFEST, f"{HF_MANIFEST}: missing, though fp8_cast_bf16.py wrote"),
})  # fmt: skip
add_kinds("cast", ("load", "convert", "check", "verify"), {
    "cast with a flipped bit": (set_byte, WEIGHT, 0x55, "damaged: its checksum is"),
    "cast cut short": (rank_cut, "bytes, found"),
    "cast with a shard missing": (rank_missing, "missing"),
    "cast manifest that is no JSON": (write_file, HF_MANIFEST, "", "not readable as JSON"),
})  # fmt: skip
add_kinds("cast", ("load", "convert", "check"), {
    "cast with an index of another": (lambda folder: (reindex(folder, lambda m: m.popitem()) and HF_INDEX) or HF_INDEX,
                                      "places tensors elsewhere than"),
})  # fmt: skip
add_kinds("converted", SEALED, {
    "rank missing": (rank_missing, "missing"),
    "rank cut short": (rank_cut, "bytes, found"),
    "rank of another conversion": (other_conversion, "damaged: its checksum is"),
    "flipped bit in a converted file": (set_byte, "layers.0.attn.wo.weight", 0x55, "damaged: its checksum is"),
    "ranks swapped": (swap_ranks, "rank"),
    "mark of another rank": (mark, b'"rank":"0"', b'"rank":"1"', "rank 0 of 2"),
    "mark of another version": (mark, b'"version":"', b'"vErsion":"', "rank 0 of 2"),
    "mark of another layout": (mark, b'"experts":"whole"', b'"experts":"split"', "rank 0 of 2"),
    "stray file of another conversion": (rank_too_many, "model3-mp4.safetensors", "belongs to no"),
    "zeroed header of a rank": (lambda folder: change_file(lambda d: bytes(100) + d[100:], folder), NO_FILE),
})  # fmt: skip
add_kinds("upstream", LOADERS, {
    "rank missing, of the V3 repository's": (rank_missing, "missing"),
    "rank cut short, of the V3 repository's": (rank_cut, "truncated: expected"),
    "ranks swapped, of the V3 repository's": (lambda folder: swap_ranks(folder) and None,
                                              "layers.1.ffn.experts.0.w1.weight is missing"),
    "rank too many, of the V3 repository's": (rank_too_many, "model7-mp2.safetensors", "not a file of 2 ranks"),
    "rank of 10^9": (lambda folder: [file.rename(folder / file.name.replace("mp2", "mp1000000000")) and None
                                     for file in files(folder)] and None, "1000000000"),
})  # fmt: skip
add_kinds("upstream", ("check",), {"ranks of two conversions": (mixed_norm, "others from row 0 on")})


def main(arguments: list[str]) -> int:
    if not arguments:
        for name, found in KINDS.items():
            print(f"{name:<44}{found.good:<11}{', '.join(found.by)}")
        return 0
    if len(arguments) not in (2, 3) or arguments[0] not in KINDS:
        print(f"error: expected KIND DIR [GOOD], found {arguments}; without arguments it lists the kinds", file=sys.stderr)
        return 2
    found, folder = KINDS[arguments[0]], Path(arguments[1])
    if folder.exists():
        print(f"error: {folder}: there already", file=sys.stderr)
        return 2
    if len(arguments) == 3:
        shutil.copytree(arguments[2], folder)
    else:
        good_checkpoint(folder, found.good)
    print(found.damage(folder) or "", "must be refused by:", ", ".join(found.by))
    return 0


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("inference", "tests")]
    sys.exit(main(sys.argv[1:]))
