"""INT4 and INT8 checkpoints in every layout: what their bits mean, dequantised and kept, on any number of ranks."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from checkpoint.cast import cast
from checkpoint.check import check
from checkpoint.convert import convert
from checkpoint.directory import Checkpoint, choose_args
from checkpoint.partition import Partition
from checkpoint.table import expected_tensors, quantised_form, quantised_rows
from core.config import parse
from core.errors import UserError
from core.numerics import PLAIN, Numerics
from ops.reference_backend import ReferenceBackend
from support.damaged_checkpoints import drop, edit, edit_json, files, whole
from support.families import FAMILIES
from support.model_pairs import hidden_states, ours, relative_error, tokens
from support.packed_checkpoints import LAYOUTS, make_packed
from support.rank_weights import assert_same, in_memory, loaded, refusal

CONFIG = FAMILIES["v3"] | {"num_hidden_layers": 2, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
                           "num_experts_per_tok": 2, "moe_intermediate_size": 256}  # fmt: skip
F32 = torch.float32


@pytest.fixture(scope="module", params=LAYOUTS)
def packed(request, tmp_path_factory):
    """A checkpoint, its layout, and the plain weights that it means, also as a directory."""
    folder, layout = tmp_path_factory.mktemp("packed"), LAYOUTS[request.param]
    means = make_packed(folder / "packed", layout, CONFIG)
    plain = folder / "plain"
    plain.mkdir()
    config = json.loads((folder / "packed" / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    save_file({name: t.float().contiguous() for name, t in means.items()}, plain / "model.safetensors")
    return folder / "packed", layout, means, plain


def kept(folder, dtype=F32) -> Numerics:
    """Numerics that leave the weights as they are stored."""
    checkpoint = Checkpoint(folder)
    form = quantised_form(choose_args(checkpoint, None))
    return Numerics(dtype, "bf16", projections=PLAIN if form.block[0] == 1 else form)


def assert_no_fault(folder):
    """But that there is no tokenizer."""
    report = check(folder)
    assert [line for line in report.lines() if "✗" in line] == ["✗ tokenizer          1 finding"], report.lines()


def test_dequantised_on_one_rank_and_on_two(packed):
    folder, _, means, _ = packed
    checkpoint = Checkpoint(folder)
    for ranks, experts in ((1, "whole"), (2, "whole"), (2, "split")):
        for rank in range(ranks):
            group = replace_group(rank, ranks)
            found = loaded(folder, Numerics(F32, experts=experts), group)
            assert_same(found, in_memory({n: t.float() for n, t in means.items()}, rank, ranks, CONFIG, experts))
    assert checkpoint.quantised and choose_args(checkpoint, None).is_quantised


def replace_group(rank: int, ranks: int):
    from parallel.group import SOLO

    return replace(SOLO, rank=rank, size=ranks)


def test_kept_it_computes_what_its_weights_mean(packed):
    folder, layout, _, plain = packed
    num = kept(folder)
    model = ours(folder, num, backend=ReferenceBackend())
    experts = model.layers[1].ffn.experts.w13
    assert experts.weight.dtype == (torch.uint8 if layout.bits == 4 else torch.int8)
    assert experts.scale.dtype == layout.scale and (experts.zero is not None) == layout.zeros
    ids = tokens(20, CONFIG["vocab_size"])
    exact = hidden_states(ours(plain, backend=ReferenceBackend()), ids)
    assert relative_error(hidden_states(model, ids), exact) < 1e-5


@pytest.mark.parametrize("experts", ["whole", "split"])
def test_converted(packed, experts, tmp_path):
    """Files for two ranks hold what a rank loads from the whole ones, kept and dequantised."""
    folder, layout, _, _ = packed
    num = replace(kept(folder), experts=experts)
    if layout.group == 0 or not layout.experts_only:
        num = Numerics(F32, experts=experts)  # other projections are no whole blocks here
    if not layout.experts_only:
        with pytest.raises(Exception, match="cannot share in whole"):
            convert(folder, tmp_path / "two", 2, experts=experts)
        return
    convert(folder, tmp_path / "two", 2, experts=experts)
    for rank in range(2):
        for numerics in (num, Numerics(F32, experts=experts)):
            group = replace_group(rank, 2)
            assert_same(loaded(tmp_path / "two", numerics, group), loaded(folder, numerics, group))
    assert_no_fault(tmp_path / "two")


def test_ranks_share_whole_groups():
    args = replace(parse(CONFIG), dtype="int4", group_size=128)
    assert Partition.choose(args, 2).experts == "split"  # 128 channels each
    partition = Partition.choose(args, 4)
    assert partition.experts == "whole"
    assert partition.reason == "experts: whole, as 4 ranks cannot share their width of 256 in whole groups of 128 channels"
    assert Partition.choose(replace(args, group_size=64), 4).experts == "split"
    with pytest.raises(UserError, match="moe_intermediate_size is 256, which 4 ranks cannot share in whole groups of 128 channels"):
        Partition(args, 4, "split", quantised_rows(expected_tensors(args, True)))


def test_checked_and_cast(packed, tmp_path):
    folder, _, means, _ = packed
    assert_no_fault(folder)
    cast(folder, tmp_path / "cast", "cpu")
    written = whole(tmp_path / "cast")
    assert written.keys() == means.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, means[name].bfloat16() if tensor.dtype == torch.bfloat16 else means[name]), name
    assert_no_fault(tmp_path / "cast")


# --------------------------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------------------------

EXPERT = "model.layers.1.mlp.experts.3.up_proj"
FILE = "model-00001-of-00001.safetensors"


def changed(name, change):
    """Stores another tensor in a tensor's place."""

    def damage(folder):
        edit(files(folder)[0], lambda held: held.update({name: change(held[name]).contiguous()}))

    return damage


def set_to(value, *at):
    def change(tensor):
        tensor[at] = value
        return tensor

    return change


def added(name, tensor):
    def damage(folder):
        edit(files(folder)[0], lambda held: held.update({name: tensor}))
        edit_json(folder / "model.safetensors.index.json", lambda raw: raw["weight_map"].update({name: FILE}))

    return damage


DAMAGE = {  # layout, what is done, what loading says
    "weight_shape": ("int4-groups-of-32", changed(f"{EXPERT}.weight_shape", lambda t: torch.tensor([256, 120])),
        f"{FILE}: {EXPERT}.weight_shape: expected [256, 128], as {EXPERT}.weight_packed has them, found [256, 120]"),
    "scales of another group size": ("int4-groups-of-32", changed(f"{EXPERT}.weight_scale", lambda t: t[:, :2]),
        f"{FILE}: {EXPERT}.weight_scale: expected BF16 256x4, found BF16 256x2"),
    "packed along another dimension": ("int4-groups-of-32", changed(f"{EXPERT}.weight_packed", lambda t: t.T),
        f"{FILE}: {EXPERT}.weight_scale: expected BF16 16x64, found BF16 256x4"),
    "packed in bytes": ("int4-groups-of-32", changed(f"{EXPERT}.weight_packed", lambda t: t.contiguous().view(torch.uint8)),
        f"{FILE}: {EXPERT}.weight_packed: expected I32 256x64, found U8 256x64"),
    "half-a-group": ("int4-groups-of-128", changed(f"{EXPERT}.weight_packed", lambda t: t[:, :8]),
        f"{FILE}: {EXPERT}.weight_packed: expected whole groups of 128 channels, found 64 channels"),
    "a scale that is no number": ("int4-groups-of-32", changed(f"{EXPERT}.weight_scale", set_to(float("nan"), 5, 1)),
        f"{FILE}: {EXPERT}.weight_scale: expected finite scales, none negative, found nan at [5, 1]"),
    "a negative scale": ("int4-groups-of-32", changed(f"{EXPERT}.weight_scale", set_to(-1.0, 5, 1)),
        f"{FILE}: {EXPERT}.weight_scale: expected finite scales, none negative, found -1.0 at [5, 1]"),
    "an infinite scale of blocks": ("int8-blocks", changed(f"{EXPERT}.weight_scale_inv", set_to(float("inf"), 1, 0)),
        f"{FILE}: {EXPERT}.weight_scale_inv: expected finite, positive scales, found inf at [1, 0]"),
    "no scale": ("int4-groups-of-32", lambda folder: drop(folder, lambda n: n == f"{EXPERT}.weight_scale"),
        f"DIR: {EXPERT}.weight_scale_inv is missing: an INT4 weight without its scale (BF16 256x4)"),
    "no zero points": ("int4-zero-points", lambda folder: drop(folder, lambda n: n == f"{EXPERT}.weight_zero_point"),
        f"DIR: {EXPERT}.weight_zero_point is missing: an INT4 weight without its zero points (U8 256x4)"),
    "act-order": ("int4-groups-of-32", added(f"{EXPERT}.weight_g_idx", torch.arange(128, dtype=torch.int32)),
        f"{FILE}: {EXPERT}.weight_g_idx: act-order, which scatters a group's channels over the row, is not supported"),
    "act-order-of-gptq": ("gptq", changed(f"{EXPERT}.g_idx", lambda t: t.flip(0)),
        f"{FILE}: {EXPERT}.g_idx: channel 0 is of group 3, expected 0: act-order is not supported"),
    "zero points of another shape": ("awq", changed(f"{EXPERT}.qzeros", lambda t: t[:, :16]),
        f"{FILE}: {EXPERT}.qzeros: expected I32 4x32, found I32 4x16"),
    "no quantization_config": ("int4-groups-of-32",
        lambda folder: edit_json(folder / "config.json", lambda raw: raw.pop("quantization_config")),
        "DIR: config.json has no quantization_config, but the files hold quantised weights; get the config.json that belongs to them"),
    "a module that shall be plain": ("int4-groups-of-32",
        lambda folder: edit_json(folder / "config.json", lambda raw: raw["quantization_config"]["ignore"].append(EXPERT)),
        f"{FILE}: {EXPERT}.weight_packed: INT4, but config.json's quantization_config.ignore names {EXPERT}"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_refused(kind, tmp_path):
    layout, damage, says = DAMAGE[kind]
    make_packed(tmp_path / "c", LAYOUTS[layout], CONFIG | {"n_routed_experts": 4, "num_nextn_predict_layers": 0})
    damage(tmp_path / "c")
    assert refusal(tmp_path / "c", Numerics(F32)) == says
    findings = [str(finding.problem) for finding in check(tmp_path / "c").findings]
    assert any(finding.endswith(says.removeprefix("DIR")) for finding in findings), findings


def test_a_group_of_zeros_may_have_no_scale(tmp_path):
    make_packed(tmp_path / "c", LAYOUTS["int4-groups-of-32"], CONFIG)
    changed(f"{EXPERT}.weight_scale", set_to(0.0, 5, 1))(tmp_path / "c")
    loaded(tmp_path / "c", Numerics(F32))
    assert_no_fault(tmp_path / "c")


def test_plain_weights_under_a_quantization_config(tmp_path):
    make_packed(tmp_path / "c", LAYOUTS["int4-groups-of-32"], CONFIG)
    cast(tmp_path / "c", tmp_path / "plain", "cpu")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    says = "DIR: config.json has a quantization_config, but the files hold no INT4 weights; remove it, if they are plain"
    assert refusal(tmp_path / "plain", Numerics(F32)) == says
