"""Tensors that the config does not ask for: those that do no harm, and an MTP module that it does not mention."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import plan as plan_command
from checkpoint.cast import cast
from checkpoint.check import check
from checkpoint.convert import convert
from core.numerics import Numerics
from engine.engine import Engine
from support.damaged_checkpoints import add, configure, drop, edit, file_of, files, whole
from support.programs import PROGRAMS, refusals
from support.rank_weights import assert_same, loaded

CPU = "cpu"
BF16 = Numerics(torch.bfloat16)


# --- without a meaning --------------------------------------------------------------------------------------------------


HARMLESS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32),
    "model.layers.1.self_attn.rotary_emb.cos_cached": torch.full((8, 32), torch.inf),
    "model.layers.1.self_attn.rotary_emb.sin_cached": torch.ones(8, 32),
    "model.rotary_emb.original_inv_freq": torch.ones(32),
    "model.layers.1.mlp.gate.padding": torch.ones(0, 192),
    "model.layers.0.self_attn.q_proj.weight_scale_inv": torch.ones(4, 0),
    "x": torch.ones(0, dtype=torch.float8_e4m3fn),
}


def test_buffers_and_tensors_without_elements_are_ignored(good, copy, tmp_path):
    add(copy, HARMLESS)
    for program in PROGRAMS.values():
        program(copy, tmp_path)
    assert_same(loaded(copy, BF16), loaded(good, BF16))
    report = check(copy)
    assert not report.findings and report.subject["tensors"] == len(whole(good))
    assert not whole(tmp_path / "convert").keys() & HARMLESS.keys()
    cast(good, tmp_path / "cast of the good one", CPU)
    held, wanted = whole(tmp_path / "cast"), whole(tmp_path / "cast of the good one")
    assert_same({name: held[name] for name in wanted}, wanted)
    assert all(HARMLESS[name].numel() for name in held.keys() - wanted.keys())


def test_a_tensor_of_the_model_without_elements_is_a_fault(copy, tmp_path):
    """DeepSpeed's ZeRO-3 leaves such files when a model is saved without gathering it."""
    name = "model.layers.1.input_layernorm.weight"
    file = file_of(copy, name)
    edit(file, lambda tensors: tensors.update({name: tensors[name][:0].clone()}))
    for program, lines in refusals(copy, tmp_path, ("load", "check", "convert", "cast")).items():
        assert f"{file.name}: {name}: expected BF16 192, found BF16 0" in lines, (program, lines)


def test_an_optional_tensor_without_elements_is_not_there(copy):
    name = "model.layers.2.shared_head.head.weight"
    edit(file_of(copy, name), lambda tensors: tensors.update({name: tensors[name][:0].clone()}))
    assert not check(copy).findings
    loaded(copy, BF16)


# --- an MTP module that the config does not mention ---------------------------------------------------------------------


NOTE = "the files hold an MTP module that the config does not mention (num_nextn_predict_layers): it is loaded"


@pytest.fixture(params=[0, None, "absent"])
def unmentioned(request, copy) -> Path:
    config = json.loads((copy / "config.json").read_text())
    config["num_nextn_predict_layers"] = request.param
    if request.param == "absent":
        del config["num_nextn_predict_layers"]
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_an_unmentioned_mtp_module_is_loaded(unmentioned, good, tmp_path, capsys):
    assert_same(loaded(unmentioned, BF16), loaded(good, BF16))
    assert any(name.startswith("mtp.") for name in loaded(unmentioned, BF16))
    capsys.readouterr()
    for name in ("load", "plan", "convert", "cast"):
        PROGRAMS[name](unmentioned, tmp_path)
        assert capsys.readouterr().err.count(f"warning: {unmentioned}: {NOTE}\n") == 1, name
    report = check(unmentioned)
    assert report.ok and [str(f.problem) for f in report.findings] == [f"{unmentioned}: {NOTE}"]
    assert "MTP" not in capsys.readouterr().err
    convert(good, tmp_path / "of the good one", 2)
    assert_same(whole(tmp_path / "convert"), whole(tmp_path / "of the good one"))


@pytest.mark.parametrize("unmentioned", [0], indirect=True)
def test_it_can_be_used(unmentioned, tmp_path, capsys):
    convert(unmentioned, tmp_path / "converted", 1)
    cast(unmentioned, tmp_path / "cast", CPU)
    for folder in (unmentioned, tmp_path / "converted", tmp_path / "cast"):
        capsys.readouterr()
        Engine.from_pretrained(folder, device=CPU, max_model_len=64, max_num_seqs=1, n_pages=4, mtp=1)
        assert capsys.readouterr().err.count(f"warning: {folder}: {NOTE}\n") == 1
        said = plan_command.plan(plan_command.parse(["--ckpt-path", str(folder), "--device", CPU, "--mtp", "1"]))
        assert said["model"]["mtp_parameters"] > 0


@pytest.mark.parametrize("unmentioned", [0], indirect=True)
def test_a_config_given_beside_it(unmentioned, good, tmp_path, capsys):
    config = (unmentioned / "config.json").rename(tmp_path / "config.json")
    Engine.from_pretrained(unmentioned, config=config, device=CPU, max_model_len=64, max_num_seqs=1, n_pages=4, mtp=1)
    assert capsys.readouterr().err.count(f"warning: {unmentioned}: {NOTE}\n") == 1


def test_in_a_single_file(good, tmp_path):
    (tmp_path / "a").mkdir()
    save_file(whole(good), tmp_path / "a" / "model.safetensors")
    shutil.copy(good / "config.json", tmp_path / "a")
    configure({"num_nextn_predict_layers": 0}, tmp_path / "a")
    assert_same(loaded(tmp_path / "a", BF16), loaded(good, BF16))


def test_a_layer_too_many_is_no_mtp_module(copy, tmp_path):
    """Without what only an MTP module has, the config is wrong about the number of layers."""
    configure({"num_nextn_predict_layers": 0}, copy)
    drop(copy, lambda name: name.endswith("layers.2.hnorm.weight"))
    for program, lines in refusals(copy, tmp_path, ("load", "check", "convert", "cast")).items():
        assert any(".layers.2." in line and "the config has no such tensor" in line for line in lines), (program, lines)


def test_half_an_unmentioned_module_is_a_fault(copy, tmp_path):
    configure({"num_nextn_predict_layers": 0}, copy)
    drop(copy, lambda name: name.endswith("layers.2.self_attn.o_proj.weight"))
    for program, lines in refusals(copy, tmp_path, ("load", "check", "convert", "cast")).items():
        assert any("model.layers.2.self_attn.o_proj.weight is missing" in line for line in lines), (program, lines)


def test_one_with_a_dense_mlp_is_left_out(good, copy, tmp_path, capsys):
    """As JoyAI-LLM-Flash has one: this program's module has experts."""
    configure({"num_nextn_predict_layers": 0}, copy)
    drop(copy, lambda name: name.startswith("model.layers.2.mlp."))
    add(copy, {"model.layers.2.mlp.gate_proj.weight": torch.ones(256, 192, dtype=torch.bfloat16)})
    note = f"{copy}: its MTP module is left out: one with a dense MLP is not implemented"
    for name in ("load", "plan", "convert", "cast"):
        PROGRAMS[name](copy, tmp_path)
        assert capsys.readouterr().err.count(f"warning: {note}\n") == 1, name
    assert [str(f.problem) for f in check(copy).findings] == [note]
    wanted = {name: t for name, t in loaded(good, BF16).items() if not name.startswith("mtp.")}
    assert_same(loaded(copy, BF16), wanted)
    assert_same({n: t for n, t in whole(tmp_path / "cast").items() if "layers.2.mlp" in n},
                {"model.layers.2.mlp.gate_proj.weight": torch.ones(256, 192, dtype=torch.bfloat16)})  # fmt: skip
    assert not any(name.startswith("mtp.") for name in whole(tmp_path / "convert"))
    assert files(copy)
