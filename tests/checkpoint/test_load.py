"""Each rank's part of a checkpoint, loaded into a model."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch

from checkpoint import load
from checkpoint.convert import convert
from checkpoint.directory import Checkpoint
from checkpoint.load import load_into
from checkpoint.reading import Reader
from core.errors import UserError
from core.numerics import Numerics
from model import Transformer
from parallel.group import Group
from support.checkpoints import fp8_sizes, make_checkpoint
from support.damaged_checkpoints import add, drop, edit, edit_json, whole
from support.families import FAMILIES
from support.rank_weights import (
    CONFIG,
    FP8,
    WIDE,
    assert_same,
    build,
    fp8_checkpoint,
    in_memory,
    loaded,
    multiplied_out,
    refusal,
    write_upstream,
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return fp8_checkpoint(tmp_path_factory.mktemp("checkpoint") / "fp8")


@pytest.fixture
def copy(source, tmp_path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """An FP8 checkpoint whose experts may be split over eight ranks."""
    folder = tmp_path_factory.mktemp("wide") / "fp8"
    make_checkpoint(folder, WIDE, fp8=True, shard_bytes=2 << 20)
    return folder


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_three_kinds_of_directory_load_the_same_slices(source, ranks, tmp_path, capsys):
    convert(source, tmp_path / "parts", ranks, max_file=1 << 20)
    convert(source, tmp_path / "single", ranks)
    write_upstream(source, tmp_path / "upstream", ranks, CONFIG)
    args = Checkpoint(source).args
    kinds = {"parts": "converted", "single": "converted", "upstream": "upstream"}
    assert {name: Checkpoint(tmp_path / name).kind for name in kinds} == kinds
    for rank in range(ranks):
        group = Group(rank, ranks)
        wanted = in_memory(source, rank, ranks, CONFIG)
        assert_same(loaded(source, FP8, group), wanted)
        assert_same(loaded(tmp_path / "parts", FP8, group), wanted)
        assert_same(loaded(tmp_path / "single", FP8, group), wanted)
        capsys.readouterr()
        main_only = {name: tensor for name, tensor in wanted.items() if not name.startswith("mtp.")}
        assert_same(loaded(tmp_path / "upstream", FP8, group, args), main_only)
        warned = f"warning: {tmp_path / 'upstream'} was converted by another program"
        assert capsys.readouterr().err.startswith(warned) == (rank == 0)


@pytest.mark.parametrize("experts", ["whole", "split"])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_either_layout_of_the_experts(wide, ranks, experts, tmp_path):
    """From the original directory and from converted files, kept in FP8 and dequantised, on the first and last rank."""
    convert(wide, tmp_path, ranks, experts=experts)
    assert Checkpoint(tmp_path).experts(ranks) == (experts if ranks > 1 else None)
    for rank in {0, ranks - 1}:
        for num in (FP8, Numerics(torch.bfloat16)):
            tensors = whole(wide) if num.gemm else multiplied_out(whole(wide), torch.bfloat16)
            wanted = in_memory(tensors, rank, ranks, WIDE, experts)
            assert_same(loaded(wide, dataclasses.replace(num, experts=experts), Group(rank, ranks)), wanted)
            assert_same(loaded(tmp_path, num, Group(rank, ranks)), wanted)


def test_split_experts_that_do_not_divide_in_number(tmp_path):
    """Six experts on four ranks, in slices that are no whole blocks: dequantised while they are read."""
    config = FAMILIES["v3"] | {"n_routed_experts": 6, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3}
    make_checkpoint(tmp_path, config, fp8=True)
    wanted = in_memory(multiplied_out(whole(tmp_path), torch.float32), 3, 4, config, "split")
    assert_same(loaded(tmp_path, Numerics(torch.float32, experts="split"), Group(3, 4)), wanted)
    says = "n_routed_experts 6 does not divide by 4 ranks (it does by 1, 2)"
    assert refusal(tmp_path, Numerics(torch.float32), Group(3, 4)) == says


def test_layouts_that_do_not_fit(wide, tmp_path):
    convert(wide, tmp_path / "whole", 2, experts="whole")
    convert(wide, tmp_path / "split", 2, experts="split")
    for held, asked in (("whole", "split"), ("split", "whole")):
        checkpoint = Checkpoint(tmp_path / held)
        model = Transformer(checkpoint.args, dataclasses.replace(FP8, experts=asked), Group(0, 2))
        with pytest.raises(UserError, match=rf"^--experts {asked}, but the files hold {held} experts: convert again"):
            load_into(model, checkpoint, progress=False)
    upstream = tmp_path / "upstream"
    write_upstream(wide, upstream, 2, WIDE)
    args = Checkpoint(wide).args
    model = Transformer(args, dataclasses.replace(FP8, experts="split"), Group(0, 2), mtp=False)
    with pytest.raises(UserError, match=r"^--experts split, but the files hold whole experts"):
        load_into(model, Checkpoint(upstream), progress=False)


def test_another_layout_than_the_manifest_says(wide, tmp_path):
    convert(wide, tmp_path, 2, experts="whole")
    index = tmp_path / "model-mp2.index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"experts": "split"}))
    message = "model1-mp2.safetensors: its metadata does not mark it as rank 1 of 2, split experts: found {'format': "
    assert refusal(tmp_path, FP8, Group(1, 2)).startswith(message)


def test_ragged_widths_kept_in_fp8(tmp_path):
    """Every stacked projection ends inside a block, and so has a gap before the next."""
    config = FAMILIES["v3"] | fp8_sizes(1) | {"moe_intermediate_size": 96, "intermediate_size": 200, "kv_lora_rank": 144}
    make_checkpoint(tmp_path, config, fp8=True)
    found = loaded(tmp_path, FP8)
    assert_same(found, in_memory(tmp_path, 0, 1, config))
    shapes = {"attn.wqkv_a": (256 + 208, 192), "ffn.w13": (2 * 256, 192)}
    assert all(found[f"layers.0.{name}.weight"].shape == shape for name, shape in shapes.items())
    assert found["layers.1.ffn.experts.w13.weight"].shape == (32, 2 * 128, 192)
    assert not found["layers.1.ffn.experts.w13.weight"][:, 96:128].view(torch.uint8).any()


@pytest.mark.parametrize("window", [1, 5000])
def test_windows_of_any_size_load_the_same(source, window, tmp_path, monkeypatch):
    convert(source, tmp_path / "converted", 2)
    monkeypatch.setattr(load, "Reader", functools.partial(Reader, window))
    for folder in (source, tmp_path / "converted"):
        assert_same(loaded(folder, FP8, Group(1, 2)), in_memory(source, 1, 2, CONFIG))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantised_while_loading(source, dtype, tmp_path):
    convert(source, tmp_path / "converted", 2)
    for folder in (source, tmp_path / "converted"):
        for rank in range(2):
            wanted = in_memory(multiplied_out(whole(source), dtype), rank, 2, CONFIG)
            assert_same(loaded(folder, Numerics(dtype), Group(rank, 2)), wanted)


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_dequantised_slices_need_no_whole_blocks(tmp_path, scale_fmt):
    config = FAMILIES["v3"] | {"num_hidden_layers": 2, "quantization_config": {"scale_fmt": scale_fmt}}
    make_checkpoint(tmp_path, config, fp8=True)
    tensors = multiplied_out(whole(tmp_path), torch.float32)  # first the whole, then the slices
    for ranks in (2, 4):
        for rank in range(ranks):
            found = loaded(tmp_path, Numerics(torch.float32), Group(rank, ranks))
            assert_same(found, in_memory(tensors, rank, ranks, config))
    assert refusal(tmp_path, FP8, Group(0, 4)) == (
        "self_attn.q_b_proj has 192 rows, which 4 ranks cannot share in whole 128-wide FP8 blocks (it works with 1)"
    )


def test_plain_checkpoints(tmp_path):
    make_checkpoint(tmp_path / "bf16", CONFIG)
    for dtype in (torch.bfloat16, torch.float32):
        wanted = in_memory(multiplied_out(whole(tmp_path / "bf16"), dtype), 1, 2, CONFIG)
        assert_same(loaded(tmp_path / "bf16", Numerics(dtype), Group(1, 2)), wanted)
    assert refusal(tmp_path / "bf16") == "DIR: the model wants quantised weights, the checkpoint's are not"

    config = CONFIG | {"torch_dtype": "float32"}
    make_checkpoint(tmp_path / "fp32", config)
    for file in (tmp_path / "fp32").glob("*.safetensors"):
        edit(file, lambda tensors: tensors.update({n: t.float() * 1.001 for n, t in tensors.items()}))
    for dtype in (torch.bfloat16, torch.float32):
        wanted = in_memory(multiplied_out(whole(tmp_path / "fp32"), dtype), 0, 1, config)
        assert_same(loaded(tmp_path / "fp32", Numerics(dtype)), wanted)


def test_tied_embeddings(tmp_path):
    config = CONFIG | {"tie_word_embeddings": True, "num_nextn_predict_layers": 0}
    make_checkpoint(tmp_path / "hf", config)
    convert(tmp_path / "hf", tmp_path / "converted", 2)
    for folder in (tmp_path / "hf", tmp_path / "converted"):
        found = loaded(folder, Numerics(), Group(1, 2))
        assert_same(found, in_memory(tmp_path / "hf", 1, 2, config, "split" if folder.name == "converted" else "whole"))
        assert "head.weight" not in found  # it is the embedding's own parameter


def test_a_head_that_is_said_to_be_the_embedding_and_is_not(copy):
    edit_json(copy / "config.json", lambda raw: raw.update(tie_word_embeddings=True))
    with pytest.raises(UserError, match=r"lm_head\.weight.*: expected the bytes of .*embed_tokens\.weight.*, found others from row 0 on"):
        loaded(copy, FP8)


def test_a_checkpoint_may_lack_the_mtp_module(copy, capsys):
    drop(copy, lambda name: ".layers.2." in name)
    assert not Checkpoint(copy).has_mtp
    found = loaded(copy, FP8)
    assert not any(name.startswith("mtp.") for name in found)
    assert capsys.readouterr().err == f"warning: {copy} has no MTP module, though its config names one\n"
    with pytest.raises(UserError, match=r"nothing there for the model's mtp\.0\.attn_norm\.weight"):
        checkpoint = Checkpoint(copy)
        load_into(Transformer(checkpoint.args, FP8), checkpoint, progress=False)


def test_a_model_without_mtp_loads_a_checkpoint_with_it(source):
    checkpoint = Checkpoint(source)
    model = Transformer(checkpoint.args, FP8, mtp=False)
    load_into(model, checkpoint, progress=False)
    wanted = {n: t for n, t in in_memory(source, 0, 1, CONFIG).items() if not n.startswith("mtp.")}
    assert_same(dict(model.named_parameters()), wanted)


def test_links_as_in_the_hugging_face_cache(source, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(source.iterdir())):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    assert_same(loaded(snapshot, FP8), in_memory(source, 0, 1, CONFIG))


def test_ignored_buffers(copy):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    add(copy, {name: torch.ones(32)})
    assert_same(loaded(copy, FP8), {n: t for n, t in in_memory(copy, 0, 1, CONFIG).items() if "inv_freq" not in n})


def test_nothing_is_rounded_unnoticed(source):
    checkpoint = Checkpoint(source)
    for name, dtype in (("layers.1.ffn.gate.bias", torch.bfloat16), ("layers.0.attn.wo.scale", torch.bfloat16),
                        ("norm.weight", torch.float16)):  # fmt: skip
        model = build(checkpoint, FP8)
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, leaf, torch.nn.Parameter(getattr(module, leaf).to(dtype), requires_grad=False))
        with pytest.raises(UserError, match=rf"the model's {name} is (BF|F)16 .*, the checkpoint's is (F32|BF16)"):
            load_into(model, checkpoint, progress=False)


def test_every_parameter_is_filled_or_nothing_is(source):
    checkpoint = Checkpoint(source)
    model = build(checkpoint, FP8)
    model.layers[0].extra = torch.nn.Linear(2, 2, bias=False)
    before = model.norm.weight.clone()
    with pytest.raises(UserError, match=r"nothing there for the model's layers\.0\.extra\.weight"):
        load_into(model, checkpoint, progress=False)
    assert torch.equal(before.view(torch.uint8), model.norm.weight.view(torch.uint8))
    model = build(checkpoint, FP8)
    del model.layers[0].attn.kv_norm
    with pytest.raises(UserError, match=r"self_attn\.kv_a_layernorm\.weight: the model has no place for it"):
        load_into(model, checkpoint, progress=False)
