"""What a directory of weights may look like, and what is said of one that is damaged."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from checkpoint.convert import convert
from checkpoint.directory import Checkpoint
from checkpoint.manifest import HF_INDEX
from checkpoint.partition import Partition, choose_files
from checkpoint.reading import Reader, read_header
from core.errors import UserError
from core.numerics import Numerics
from parallel.group import Group
from support.checkpoints import make_checkpoint
from support.damaged_checkpoints import add, drop, edit, edit_json, file_of, header_of, reindex, replace, whole
from support.rank_weights import (
    CONFIG,
    FP8,
    assert_same,
    fp8_checkpoint,
    in_memory,
    loaded,
    refusal,
    write_upstream,
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return fp8_checkpoint(tmp_path_factory.mktemp("checkpoint") / "fp8")


@pytest.fixture
def copy(source, tmp_path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


WO = "model.layers.0.self_attn.o_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"
NO_SIZES = f"{WO}: shape or data_offsets in the header are not sizes"


def test_missing_and_extra_shards(copy):
    first, second = sorted(path.name for path in copy.glob("*.safetensors"))[:2]
    (copy / second).rename(copy / "renamed.bin")
    assert refusal(copy) == f"{second}: missing, but {HF_INDEX} names it"
    (copy / "renamed.bin").rename(copy / second)
    shutil.copy(copy / first, copy / "model-00099-of-00099.safetensors")
    assert refusal(copy) == f"model-00099-of-00099.safetensors: not named by {HF_INDEX}; remove it or repair the index"


def test_index_and_files_that_disagree(copy):
    files = sorted(path.name for path in copy.glob("*.safetensors"))
    at = file_of(copy, WO).name
    other = next(file for file in files if file != at)
    reindex(copy, lambda m: m.update({WO: other}))
    assert refusal(copy) == f"{at}: {WO}: {HF_INDEX} places it in {other}"
    reindex(copy, lambda m: m.pop(WO))
    assert refusal(copy) == f"{at}: {WO}: {HF_INDEX} does not name it"
    reindex(copy, lambda m: m.update({WO: at}))
    edit(copy / at, lambda tensors: tensors.pop(WO))
    assert refusal(copy) == f"{at}: {WO} is missing, but {HF_INDEX} places it there"


@pytest.mark.parametrize(
    "file", ["../copy/x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "..", "", "x.bin", ".x.safetensors", 3]
)
def test_index_that_points_elsewhere(copy, file):
    reindex(copy, lambda m: m.update({WO: file}))
    assert refusal(copy) == f"{HF_INDEX}: {WO}: {file!r} is not the plain name of a .safetensors file"


def test_missing_scale(copy):
    drop(copy, lambda name: name == EXPERT + "_scale_inv")
    assert refusal(copy) == f"DIR: {EXPERT}_scale_inv is missing: an FP8 weight without its scale (F32 2x1)"


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
def test_scales_that_are_no_scales(copy, value):
    def spoil(scale):
        scale[1, 0] = value
        return scale

    file = replace(copy, EXPERT + "_scale_inv", spoil)
    message = f"{file}: {EXPERT}_scale_inv: expected finite, positive scales, found {value} at [1, 0]"
    assert refusal(copy) == message
    assert refusal(copy, Numerics()) == message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_with_which_weights_overflow(copy, dtype):
    """448 times 2^119 is finite, 448 times 2^120 is not, in float32 or bfloat16."""

    def fill(power):
        replace(copy, EXPERT, lambda weight: torch.full(weight.shape, 448.0).to(weight.dtype))
        return replace(copy, EXPERT + "_scale_inv", lambda scale: torch.full(scale.shape, 2.0**power).to(dtype))

    fill(119)
    for num in (Numerics(), Numerics(torch.float32)):
        held = loaded(copy, num)
        assert all(tensor.isfinite().all() for tensor in held.values()) and max(t.amax() for t in held.values()) > 2e38
    file = fill(120)
    wanted = "expected scales of at most 7.57e+35, so that a scaled weight is finite"
    message = f"{file}: {EXPERT}_scale_inv: {wanted}, found {2.0**120} at [0, 0]"
    assert refusal(copy) == refusal(copy, Numerics()) == message


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (WO, lambda t: t[:, :-1].contiguous(), "expected F8_E4M3 192x1024, found F8_E4M3 192x1023"),
        (WO, lambda t: t.char(), "expected F8_E4M3 192x1024 (or BF16, F32, F16), found I8 192x1024"),
        (WO + "_scale_inv", lambda t: t.double(), "expected F32 2x8 (or BF16, F16, F8_E8M0), found F64 2x8"),
        (WO + "_scale_inv", lambda t: t.T.contiguous(), "expected F32 2x8, found F32 8x2"),
        (BIAS, lambda t: t.double(), "expected F32 16 (or BF16, F16), found F64 16"),
        ("model.norm.weight", lambda t: t.to(torch.float8_e4m3fn), "expected BF16 192 (or F32, F16), found F8_E4M3 192"),
        ("lm_head.weight", lambda t: t.to(torch.float8_e4m3fn), "expected BF16 256x192 (or F32, F16), found F8_E4M3 256x192"),
        ("lm_head.weight", lambda t: t[:-1].float(), "expected F32 256x192, found F32 255x192"),
        ("model.layers.2.eh_proj.weight", lambda t: t[:, :192].clone(), "expected BF16 192x384, found BF16 192x192"),
    ],
)
def test_wrong_shapes_and_dtypes(copy, name, change, message):
    file = replace(copy, name, change)
    assert refusal(copy) == f"{file}: {name}: {message}"


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "lm_head.weight", BIAS, EXPERT, "model.layers.2.enorm.weight",
     "model.layers.2.eh_proj.weight"],
)  # fmt: skip
def test_missing_tensor(copy, name):
    t = whole(copy)[name]
    drop(copy, lambda n: n == name)
    kind = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}[t.dtype]
    assert refusal(copy) == f"DIR: {name} is missing ({kind} {'x'.join(map(str, t.shape))})"


def test_a_scale_whose_weight_is_not_fp8(copy):
    file = replace(copy, WO, lambda t: t.bfloat16())
    scale = file_of(copy, WO + "_scale_inv").name
    message = f"{file}: {WO}: expected F8_E4M3, as {scale}: {WO}_scale_inv is there for it, or no scale; found BF16"
    assert refusal(copy) == message
    assert refusal(copy, Numerics()) == message


def test_modules_not_to_convert_that_were_converted(copy):
    """Only a module's whole name is taken at its word."""
    for name in ("o_proj", "self_attn", "model.layers.0", "lm_head", "mlp.gate", WO.replace("layers.0", "layers.9")):
        edit_json(copy / "config.json", lambda raw, name=name: raw["quantization_config"].update(ignored_layers=[name]))
        loaded(copy, FP8)
    module = WO.removesuffix(".weight")
    for field in ("ignored_layers", "modules_to_not_convert"):
        edit_json(copy / "config.json", lambda raw, field=field: raw["quantization_config"].update(
            {"ignored_layers": None, field: ["lm_head", module]}))  # fmt: skip
        message = f"{file_of(copy, WO).name}: {WO}: FP8, but config.json's quantization_config.{field} names {module}"
        assert refusal(copy) == message


def test_tensors_the_config_does_not_know(copy):
    add(copy, {"model.layers.7.input_layernorm.weight": torch.ones(192).bfloat16()})
    file = min(copy.glob("*.safetensors")).name
    assert refusal(copy) == f"{file}: model.layers.7.input_layernorm.weight: the config has no such tensor"


def test_config_and_files_disagree_about_fp8(copy):
    config = json.loads((copy / "config.json").read_text())
    quantisation = config.pop("quantization_config")
    (copy / "config.json").write_text(json.dumps(config))
    assert refusal(copy) == "DIR: config.json has no quantization_config, but the files hold FP8 scales; get the config.json that belongs to them"
    folder = copy.with_name("bf16")
    make_checkpoint(folder, CONFIG)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    assert refusal(folder) == "DIR: config.json has a quantization_config, but the files hold no FP8 scales (weight_scale_inv); remove it, if they are a BF16 cast"


def test_truncated_and_padded_files(copy):
    file = file_of(copy, WO)
    data = file.read_bytes()
    for n in (0, 7, 8, 100):
        file.write_bytes(data[:n])
        assert refusal(copy) == f"{file.name}: truncated, or not a safetensors file ({n} bytes)"
    file.write_bytes(data[:-1])
    assert refusal(copy) == f"{file.name}: truncated: expected {len(data)} bytes, found {len(data) - 1}"
    file.write_bytes(data + b"x")
    assert refusal(copy) == f"{file.name}: has bytes no tensor owns: expected {len(data)} bytes, found {len(data) + 1}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: b"{ ", "header is not valid JSON (Expecting property name enclosed in double quotes"),
        (lambda h: b"[]", "header is not valid JSON (not an object)"),
        (lambda h: b'{"a":1,"a":2}', "header is not valid JSON ('a' is there twice)"),
        (lambda h: b"[" * 100_000, "header is not valid JSON ("),
        (lambda h: b"\xff\xfe", "header is not valid JSON ("),
        (lambda h: h | {"__metadata__": {"x": 1}}, "__metadata__ is not an object of strings"),
        (lambda h: h | {WO: 1}, f"{WO}: expected dtype, shape and data_offsets in the header"),
        (lambda h: h | {WO: h[WO] | {"dtype": "F4"}}, f"{WO}: unknown dtype 'F4'"),
        (lambda h: h | {WO: h[WO] | {"shape": [-192, -1024]}}, NO_SIZES),
        (lambda h: h | {WO: h[WO] | {"shape": [True, 196608]}}, NO_SIZES),
        (lambda h: h | {WO: h[WO] | {"data_offsets": [5]}}, NO_SIZES),
        (lambda h: h | {WO: h[WO] | {"data_offsets": [8, 0]}},
         f"{WO}: F8_E4M3 192x1024 takes 196608 bytes, its data_offsets span -8"),
        (lambda h: h | {WO: h[WO] | {"data_offsets": [n + 1 for n in h[WO]["data_offsets"]]}},
         f"{WO}: data_offsets leave a gap or overlap another tensor"),
    ],
)  # fmt: skip
def test_damaged_headers(copy, change, message):
    file = file_of(copy, WO)
    header, body = header_of(file)
    text = change(header)
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)
    assert refusal(copy).startswith(f"{file.name}: {message}")


def test_directories_that_are_none(tmp_path, source):
    with pytest.raises(UserError, match="no such directory"):
        Checkpoint(tmp_path / "nothing")
    (tmp_path / "config.json").touch()
    with pytest.raises(UserError, match=r"config\.json: not readable as JSON"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"no checkpoint here \(no \.safetensors files\)"):
        Checkpoint(tmp_path)
    (tmp_path / ".tmp-model0-mp2.safetensors").touch()
    with pytest.raises(UserError, match="an unfinished conversion and nothing else; run the conversion again"):
        Checkpoint(tmp_path)
    for file in source.glob("*.safetensors"):
        shutil.copy(file, tmp_path)
    with pytest.raises(UserError, match=r"\d+ \.safetensors files but no model\.safetensors\.index\.json beside them"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_damaged_index(copy, text):
    (copy / HF_INDEX).write_text(text)
    with pytest.raises(UserError, match=HF_INDEX):
        Checkpoint(copy)


# Damage to converted directories --------------------------------------------------------------------------------------


@pytest.fixture
def converted(source, tmp_path) -> Path:
    convert(source, tmp_path / "converted", 2, max_file=1 << 20)
    return tmp_path / "converted"


def test_converted_for_another_number_of_ranks(source, converted, tmp_path):
    assert refusal(converted) == "DIR: converted for 2 ranks, not 1; start as many, or convert for 1"
    convert(source, converted, 4)
    assert Checkpoint(converted).ranks == (2, 4)
    assert_same(loaded(converted, FP8, Group(3, 4)), in_memory(source, 3, 4, CONFIG))
    assert_same(loaded(converted, FP8, Group(0, 2)), in_memory(source, 0, 2, CONFIG))
    write_upstream(source, tmp_path / "upstream", 4, CONFIG)
    with pytest.raises(UserError, match="converted for 4 ranks, not 2; start as many, or convert for 2"):
        Checkpoint(tmp_path / "upstream").check(Partition(Checkpoint(source).args, 2))


def test_lanes_of_files_that_were_converted_for_ranks(source, converted):
    """Files of two ranks hold all that a lane of two or four wants, and not all that a lane of one does."""
    checkpoint, original = Checkpoint(converted), Checkpoint(source)
    for ranks in (2, 4):
        with pytest.raises(UserError) as e:
            checkpoint.partition(checkpoint.args, ranks, lanes=ranks)
        wanted = f"not {ranks} in {ranks} lanes; convert for 1, or give the original files"
        assert str(e.value) == f"{converted}: converted for 2 ranks, {wanted}"
        assert original.partition(original.args, ranks, lanes=2).tp == ranks // 2
    assert [checkpoint.made_for(*layout) for layout in ((2, 1), (4, 1), (4, 2), (8, 2))] == [2] * 4
    assert [choose_files((1, 2, 4, 6), *layout) for layout in ((2, 1), (12, 1), (3, 1), (4, 4), (8, 2))] == [2, 6, 1, 1, 4]
    assert choose_files((2, 4), 3) is None


def test_upstream_with_a_rank_missing(source, tmp_path):
    write_upstream(source, tmp_path / "upstream", 4, CONFIG)
    (tmp_path / "upstream" / "model2-mp4.safetensors").unlink()
    with pytest.raises(UserError, match=r"model2-mp4\.safetensors: missing"):
        loaded(tmp_path / "upstream", FP8, Group(0, 4), Checkpoint(source).args)


def test_damaged_converted_directories(converted):
    rank1 = sorted(converted.glob("model1-mp2-*.safetensors"))
    data = rank1[1].read_bytes()
    rank1[1].unlink()
    for rank in (0, 1):  # every rank sees that one is incomplete
        assert refusal(converted, FP8, Group(rank, 2)) == f"{rank1[1].name}: missing, but model-mp2.index.json names it"
    rank1[1].write_bytes(data[:-5])
    assert refusal(converted, FP8, Group(0, 2)) == f"{rank1[1].name}: expected {len(data)} bytes, found {len(data) - 5}"
    rank1[1].write_bytes(data)
    (converted / "model9-mp2.safetensors").write_bytes(data)
    assert refusal(converted) == "DIR: model9-mp2.safetensors belongs to no index here; remove it or convert again"
    (converted / "model9-mp2.safetensors").unlink()
    index = json.loads((converted / "model-mp2.index.json").read_text())
    for change in ({"format": "x"}, {"version": 1}):
        (converted / "model-mp2.index.json").write_text(json.dumps(index | change))
        assert "this program reads 'deepseek-v3-ranks' version 2, not" in refusal(converted, FP8, Group(0, 2))
    first = next(iter(index["files"]))
    for change in ({"ranks": 4}, {"experts": "half"}, {"files": {}}, {"files": []}, {"files": {"a": {}}},
                   {"files": index["files"] | {"x.safetensors": index["files"][first] | {"rank": 2}}},
                   {"files": index["files"] | {first: index["files"][first] | {"tensors": {"a": "0"}}}},
                   {"small": {"../a": {"bytes": 1, "sha256": "0" * 64}}}, {"small": {"a": {"bytes": 1}}}):  # fmt: skip
        (converted / "model-mp2.index.json").write_text(json.dumps(index | change))
        message = "model-mp2.index.json: damaged; copy the directory again or convert again"
        assert refusal(converted, FP8, Group(0, 2)) == message


def test_converted_without_its_manifest_is_not_taken_for_upstreams(source, tmp_path):
    convert(source, tmp_path / "c", 2)
    (tmp_path / "c" / "model-mp2.index.json").unlink()
    message = "model0-mp2.safetensors: its manifest is missing; copy the directory or convert again"
    assert refusal(tmp_path / "c", FP8, Group(0, 2)) == message


def test_a_file_marked_for_another_rank(source, tmp_path):
    convert(source, tmp_path / "c", 2)
    file = tmp_path / "c" / "model0-mp2.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"rank":"0"', b'"rank":"1"'))
    message = "model0-mp2.safetensors: its metadata does not mark it as rank 0 of 2, whole experts: found {'format': "
    assert refusal(tmp_path / "c", FP8, Group(0, 2)).startswith(message)


def test_a_flipped_bit_in_any_tensor_is_found(source, tmp_path):
    convert(source, tmp_path / "c", 2)
    checkpoint = Checkpoint(tmp_path / "c")
    entries = checkpoint.check(checkpoint.partition(checkpoint.args, 2), 1)
    file = tmp_path / "c" / "model1-mp2.safetensors"
    assert len(entries) == len(read_header(file)[1]) > 100
    with open(file, "r+b") as f, Reader() as reader:
        for entry in entries.values():
            at = entry.start + (entry.start * 7919) % entry.nbytes
            f.seek(at)
            byte = f.read(1)[0]
            f.seek(at)
            f.write(bytes([byte ^ 4]))
            f.flush()
            with pytest.raises(UserError, match="damaged: its checksum is"):
                reader.read(entry)
            f.seek(at)
            f.write(bytes([byte]))
            f.flush()
            reader.read(entry)
        name = "layers.1.ffn.experts.9.w1.weight"
        f.seek(entries[name].start)
        f.write(b"\x01")
    message = f"model1-mp2.safetensors: {name}: damaged: its checksum is"
    assert refusal(tmp_path / "c", FP8, Group(1, 2)).startswith(message)
    assert refusal(tmp_path / "c", Numerics(), Group(1, 2)).startswith(message)
