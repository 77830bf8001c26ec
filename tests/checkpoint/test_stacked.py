"""Experts stacked in one tensor, as transformers saves them with save_original_format=False: the same to every program
as single ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from checkpoint.cast import cast
from checkpoint.check import check
from checkpoint.convert import convert
from checkpoint.directory import Checkpoint
from checkpoint.manifest import HF_INDEX
from checkpoint.partition import Partition
from checkpoint.quantize import quantize
from checkpoint.reading import Entry
from checkpoint.stacked import unstack
from core.config import parse
from core.errors import CheckpointError
from core.numerics import Numerics
from parallel.group import Group
from support.checkpoints import fp8_sizes, make_checkpoint
from support.damaged_checkpoints import add, edit, file_of, good_checkpoint, whole
from support.families import V3
from support.model_pairs import theirs
from support.programs import PROGRAMS, plan, refusals
from support.rank_weights import FP8, assert_same, loaded

LAYER = "model.layers.1.mlp.experts."
GATE_UP, DOWN = LAYER + "gate_up_proj", LAYER + "down_proj"
CPU = "cpu"
FLOAT32 = Numerics(torch.float32)


def stack(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors as transformers 5 has them in memory."""
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in {name.partition(".experts.")[0] for name in tensors.keys() - found.keys()}:
        experts = range(sum(name.startswith(layer) and name.endswith(".up_proj.weight") and ".experts." in name
                            for name in tensors))  # fmt: skip
        for suffix in ("", "_scale_inv"):
            single = [[tensors.get(f"{layer}.experts.{e}.{kind}_proj.weight{suffix}") for e in experts]
                      for kind in ("gate", "up", "down")]  # fmt: skip
            if single[0][0] is None:
                continue
            gate, up, down = ([t.view(torch.uint8) if t.dtype.itemsize == 1 else t for t in some] for some in single)
            dtype = single[0][0].dtype
            pairs = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
            found[f"{layer}.experts.gate_up_proj{suffix}"] = torch.stack(pairs).view(dtype)
            found[f"{layer}.experts.down_proj{suffix}"] = torch.stack(down).view(dtype)
    return found


def write_stacked(source: Path, folder: Path) -> Path:
    """The checkpoint with stacked experts: in two files, scales in another than their weights."""
    shutil.copytree(source, folder, ignore=lambda _, names: [n for n in names if "safetensors" in n])
    tensors = stack(whole(source))
    files = {f"model-0000{i}-of-00002.safetensors": {} for i in (1, 2)}
    first, second = files.values()
    for name, tensor in tensors.items():
        (second if name.endswith("_scale_inv") else first)[name] = tensor
    second |= {} if second else {"lm_head.weight": first.pop("lm_head.weight")}
    for file, held in files.items():
        save_file(held, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in files.items() for name in held}
    (folder / HF_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """By dtype a checkpoint as released, and the same stacked."""
    folder = tmp_path_factory.mktemp("pairs")
    found = {}
    for name in ("fp8", "bf16"):
        good_checkpoint(folder / name, name)
        found[name] = folder / name, write_stacked(folder / name, folder / f"{name}-stacked")
    return found


@pytest.fixture
def copy(pairs, tmp_path) -> Path:
    return Path(shutil.copytree(pairs["fp8"][1], tmp_path / "copy"))


@pytest.mark.parametrize("name", ["fp8", "bf16"])
@pytest.mark.parametrize("group", [Group(0, 1), Group(1, 2)])
def test_loaded(name, group, pairs):
    single, stacked = pairs[name]
    assert not [t for t in whole(stacked) if ".experts.1." in t] and GATE_UP in whole(stacked)
    for num in [Numerics(torch.bfloat16)] + [FP8] * (name == "fp8"):
        assert_same(loaded(stacked, num, group), loaded(single, num, group))


@pytest.mark.parametrize("name", ["fp8", "bf16"])
@pytest.mark.parametrize("experts", ["whole", "split"])
def test_converted(name, experts, pairs, tmp_path):
    for which, folder in zip(("single", "stacked"), pairs[name], strict=True):
        convert(folder, tmp_path / which, 2, experts="whole" if name == "fp8" else experts)
    for rank in range(2):
        file = f"model{rank}-mp2.safetensors"
        assert_same(load_file(tmp_path / "stacked" / file), load_file(tmp_path / "single" / file))


def test_cast(pairs, tmp_path):
    for which, folder in zip(("single", "stacked"), pairs["fp8"], strict=True):
        cast(folder, tmp_path / which, CPU)
    assert_same(whole(tmp_path / "stacked"), whole(tmp_path / "single"))
    assert check(tmp_path / "stacked").ok


@pytest.mark.parametrize(("name", "format"), [("fp8", "int4"), ("bf16", "int8"), ("bf16", "fp8")])
def test_quantised(name, format, pairs, tmp_path):
    for which, folder in zip(("single", "stacked"), pairs[name], strict=True):
        quantize(folder, tmp_path / which, format, None if format == "fp8" else 32, CPU)
    assert_same(whole(tmp_path / "stacked"), whole(tmp_path / "single"))


@pytest.mark.parametrize("name", ["fp8", "bf16"])
def test_checked_and_planned(name, pairs, tmp_path):
    single, stacked = pairs[name]
    report, other = check(stacked), check(single)
    assert report.ok and not report.findings
    assert report.subject["tensors"] == len(whole(stacked)) and report.subject["bytes"] == other.subject["bytes"]
    assert all(report.looked[check] == other.looked[check] for check in ("tensors", "weights", "copies"))
    assert plan(stacked, tmp_path) == plan(single, tmp_path)


def test_as_transformers_saves_them(pairs, tmp_path):
    """Names, order and layout are its own: it reads a checkpoint as released, and writes what it has in memory."""
    single, _ = pairs["bf16"]
    theirs(single).save_pretrained(tmp_path / "saved", save_original_format=False, max_shard_size="300KB")
    held = whole(tmp_path / "saved")
    wanted = {name: tensor for name, tensor in stack(whole(single)).items() if not name.startswith("model.layers.2.")}
    assert_same(held, {name: tensor.float() for name, tensor in wanted.items()})
    mine = {name: tensor for name, tensor in loaded(single, FLOAT32).items() if not name.startswith("mtp.")}
    assert_same(loaded(tmp_path / "saved", FLOAT32), mine)
    convert(tmp_path / "saved", tmp_path / "converted", 2)
    report = check(tmp_path / "saved")
    assert report.looked["tensors"] and not any(finding.check in ("files", "weights") for finding in report.findings)


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_as_transformers_saves_fp8_ones(scale_fmt, tmp_path, monkeypatch):
    """It asks for a GPU, which saving does not need. V3.1's scales it saves in bytes, as exponents."""
    config = V3 | fp8_sizes(1) | {"num_hidden_layers": 2, "n_routed_experts": 16, "num_nextn_predict_layers": 0}
    config |= {"hidden_size": 256, "quantization_config": {"scale_fmt": scale_fmt} if scale_fmt else {}}
    make_checkpoint(tmp_path / "single", config, fp8=True)
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "saved", save_original_format=False)
    scales = torch.float8_e8m0fnu if scale_fmt else torch.float32
    wanted = stack(whole(tmp_path / "single"))
    wanted |= {name: tensor.to(scales) for name, tensor in wanted.items() if name.endswith("_scale_inv")}
    assert_same(whole(tmp_path / "saved"), wanted)
    assert_same(loaded(tmp_path / "saved", Numerics()), loaded(tmp_path / "single", Numerics()))
    for which in ("saved", "single"):
        cast(tmp_path / which, tmp_path / f"{which}-cast", CPU)
    assert_same(whole(tmp_path / "saved-cast"), whole(tmp_path / "single-cast"))


def damage_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[GATE_UP] = tensors[GATE_UP][:3].clone()


def damage_scales(tensors: dict[str, torch.Tensor]) -> None:
    tensors[DOWN + "_scale_inv"] = tensors[DOWN + "_scale_inv"].mT.contiguous()


@pytest.mark.parametrize(("name", "damage", "message"), [
    (GATE_UP, damage_shape, f"{GATE_UP}: expected experts stacked as F8_E4M3 4x256x192, found F8_E4M3 3x256x192"),
    (DOWN + "_scale_inv", damage_scales,
     f"{DOWN}_scale_inv: expected experts stacked as F32 4x2x1, found F32 4x1x2"),
    (GATE_UP, lambda t: t.update({GATE_UP: t[GATE_UP].char()}),
     f"{GATE_UP}[0, 0:128]: expected F8_E4M3 128x192 (or BF16, F32, F16), found I8 128x192"),
    (DOWN + "_scale_inv", lambda t: t[DOWN + "_scale_inv"][2, 1].fill_(-1),
     f"{DOWN}_scale_inv[2]: expected finite, positive scales, found -1.0 at [1, 0]"),
])  # fmt: skip
def test_a_fault_is_told_by_the_files_own_name(name, damage, message, copy, tmp_path):
    file = file_of(copy, name)
    edit(file, damage)
    for program, lines in refusals(copy, tmp_path, ("load", "check", "convert", "cast")).items():
        assert any(line.startswith(f"{file.name}: {message}") for line in lines), (program, lines)
        assert not any("missing" in line for line in lines), (program, lines)


@pytest.mark.parametrize(("change", "found"), [
    (lambda t: t[1, 128 + 5, 7].fill_(0x7F), "finite values, found NaN or infinity at [5, 7], 1 such"),
    (lambda t: t[1, 128:].zero_(), "weights, found nothing but zeros"),
])  # fmt: skip
def test_values_of_every_expert_are_looked_at(change: Callable, found: str, copy):
    file = file_of(copy, GATE_UP)
    edit(file, lambda tensors: change(tensors[GATE_UP].view(torch.uint8)))
    said = [(str(f.problem), f.problem.tensor) for f in check(copy).findings]
    assert said == [(f"{file}: {GATE_UP}[1, 128:256]: expected {found}", GATE_UP)]


def test_both_forms_of_a_layer_are_refused(pairs, copy, tmp_path):
    name = f"{LAYER}2.down_proj.weight"
    add(copy, {name: whole(pairs["fp8"][0])[name]})
    for program, lines in refusals(copy, tmp_path, ("load", "check", "convert", "cast")).items():
        assert any(f": {DOWN}[2]" in line and f": {name}" in line for line in lines), (program, lines)


def test_scales_of_a_width_that_is_no_multiple_of_a_block():
    """gate and up have blocks of their own: 192 rows are two blocks each, and 384 would be three together."""
    args = parse(V3 | {"moe_intermediate_size": 192, "hidden_size": 256, "n_routed_experts": 16})
    name = GATE_UP + "_scale_inv"
    entry = Entry(Path("x"), name, torch.float32, (16, 4, 2), 1000, 512)
    found = {n: (e.shape, e.start - 1000, e.nbytes) for n, e in unstack(name, entry, args)}
    assert found == {f"{LAYER}{e}.{kind}_proj.weight_scale_inv": ((2, 2), 32 * e + 16 * (kind == "up"), 16)
                     for e in range(16) for kind in ("gate", "up")}  # fmt: skip
    with pytest.raises(CheckpointError, match="expected experts stacked as F32 16x4x2, found F32 16x3x2"):
        list(unstack(name, Entry(Path("x"), name, torch.float32, (16, 3, 2), 1000, 384), args))


def test_a_stacks_checksum_is_not_an_experts():
    args = parse(V3)
    entry = Entry(Path("x"), DOWN, torch.bfloat16, (32, 128, 128), 0, 1 << 20, crc="01234567")
    parts = [part for _, part in unstack(DOWN, entry, args)]
    assert {part.crc for part in parts} == {None} and str(parts[3]) == f"x: {DOWN}[3]"


def test_every_program_takes_them(pairs, tmp_path):
    for program in PROGRAMS.values():
        program(pairs["fp8"][1], tmp_path)
    Checkpoint(tmp_path / "convert").check(Partition(Checkpoint(pairs["fp8"][0]).args, 2))
