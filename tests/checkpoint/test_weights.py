"""The table of tensors, what a checkpoint may look like, and loading each rank's part of it."""

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint import load
from checkpoint.convert import convert
from checkpoint.directory import Checkpoint
from checkpoint.load import load_into
from checkpoint.manifest import HF_INDEX
from checkpoint.partition import Partition, choose_experts
from checkpoint.reading import Reader, read_header
from checkpoint.table import expected_tensors
from core.config import ModelArgs
from core.errors import UserError
from core.numerics import Numerics
from model import Transformer
from parallel.group import SOLO, Group
from support.checkpoints import dequantise, fp8_sizes, make_checkpoint
from support.damaged_checkpoints import add, drop, edit, edit_json, file_of, header_of, reindex, replace, whole
from support.families import FAMILIES

FP8 = Numerics(torch.bfloat16, gemm="fp8")
CONFIG = FAMILIES["v3"] | fp8_sizes(8) | {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_hidden_layers": 2}
# the experts' width divides over eight ranks too
WIDE = CONFIG | {"moe_intermediate_size": 1024, "n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 4}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """An FP8 checkpoint in several shards that divides over eight ranks. Tests copy it before they damage it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "fp8"
    make_checkpoint(folder, CONFIG, fp8=True, shard_bytes=2 << 20)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """An FP8 checkpoint whose experts may be split over eight ranks."""
    folder = tmp_path_factory.mktemp("wide") / "fp8"
    make_checkpoint(folder, WIDE, fp8=True, shard_bytes=2 << 20)
    return folder


@pytest.fixture
def copy(source, tmp_path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


def upstream_name(hf: str) -> str:
    """The original repository's name of a tensor of the main model, by that repository's rules."""
    for old, new in (
        ("model.", ""), ("self_attn", "attn"), ("mlp", "ffn"), ("weight_scale_inv", "scale"),
        ("e_score_correction_bias", "bias"), ("embed_tokens", "embed"), ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"), ("q_a_layernorm", "q_norm"), ("kv_a_layernorm", "kv_norm"),
        ("kv_a_proj_with_mqa", "wkv_a"), ("q_a_proj", "wq_a"), ("q_b_proj", "wq_b"), ("kv_b_proj", "wkv_b"),
        ("q_proj", "wq"), ("o_proj", "wo"), ("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3"),
        ("lm_head", "head"),
    ):  # fmt: skip
        hf = hf.replace(old, new)
    return hf


def our_name(hf: str, n_layers: int) -> str:
    """As upstream's, with the MTP module in the place of layer n_layers."""
    hf = hf.replace(f"model.layers.{n_layers}.", "mtp.0.").replace("shared_head.", "")
    return upstream_name(hf)


def part(
    name: str, tensor: torch.Tensor, rank: int, ranks: int, n_experts: int, experts: str = "whole"
) -> torch.Tensor | None:
    """A rank's share of a tensor, by upstream's name: rows, columns, whole experts, or all of it."""
    layer = name.split(".")
    if ".experts." in name and experts == "whole":
        each = n_experts // ranks
        return tensor if int(layer[layer.index("experts") + 1]) // each == rank else None
    kind = layer[-2]
    if kind in ("embed", "head", "wq", "wq_b", "wkv_b", "w1", "w3"):
        return tensor.chunk(ranks, dim=0)[rank]
    if kind in ("wo", "w2"):
        return tensor.chunk(ranks, dim=1)[rank]
    return tensor


def in_memory(
    source: Path | dict[str, torch.Tensor], rank: int, ranks: int, config: dict, experts: str = "whole"
) -> dict[str, torch.Tensor]:
    """What a rank's parameters must be, from a Hugging Face directory or its tensors: experts stacked, and projections
    of one input one below the other."""
    found: dict[str, torch.Tensor] = {}
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for hf, tensor in (whole(source) if isinstance(source, Path) else source).items():
        name = our_name(hf, config["num_hidden_layers"])
        if (mine := part(name, tensor, rank, ranks, config["n_routed_experts"], experts)) is None:
            continue
        before, expert, after = name.partition(".experts.")
        if expert:
            number, _, rest = after.partition(".")
            stacks.setdefault(f"{before}.experts.{rest}", {})[int(number)] = mine
        elif name not in ("mtp.0.embed.weight", "mtp.0.head.weight"):  # the model shares the main ones
            found[name] = mine
    found |= {name: torch.stack([stack[e] for e in sorted(stack)]) for name, stack in stacks.items()}
    for name in list(found):
        for first, second, together in (("w1", "w3", "w13"), ("wq", "wkv_a", "wqkv_a"), ("wq_a", "wkv_a", "wqkv_a")):
            before, at, leaf = name.partition(f".{first}.")
            if at:
                pair = found.pop(name), found.pop(f"{before}.{second}.{leaf}")
                found[f"{before}.{together}.{leaf}"] = one_below_the_other(*pair)
    return found


def one_below_the_other(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Two projections (…, rows, in) as one: FP8 ones begin at whole blocks, with zeros between, and if they are of one
    width the second ends where its last block does."""
    if a.dtype == torch.float8_e4m3fn:
        last = -b.shape[-2] % 128 if a.shape == b.shape else 0
        a, b = (t.view(torch.uint8) for t in (a, b))
        a, b = torch.nn.functional.pad(a, (0, 0, 0, -a.shape[-2] % 128)), torch.nn.functional.pad(b, (0, 0, 0, last))
        return torch.cat((a, b), dim=-2).view(torch.float8_e4m3fn)
    return torch.cat((a, b), dim=-2)


def write_upstream(folder: Path, target: Path, ranks: int, config: dict) -> None:
    """A directory as the original repository's converter leaves it: rank files, no metadata, no MTP, no config."""
    target.mkdir()
    for rank in range(ranks):
        mine = {}
        for hf, tensor in whole(folder).items():
            if f".layers.{config['num_hidden_layers']}." not in hf:
                name = upstream_name(hf)
                share = part(name, tensor, rank, ranks, config["n_routed_experts"])
                mine |= {} if share is None else {name: share.contiguous()}
        save_file(mine, target / f"model{rank}-mp{ranks}.safetensors")


def build(checkpoint: Checkpoint, num: Numerics, group: Group = SOLO, args: ModelArgs | None = None) -> Transformer:
    """A model whose every value is wrong until it is loaded. Files made for ranks decide how the experts lie."""
    args = args or checkpoint.args
    num = dataclasses.replace(num, experts=checkpoint.experts(group.size) or num.experts)
    model = Transformer(args, num, group, mtp=bool(args.n_mtp_layers) and checkpoint.has_mtp)
    for p in model.parameters():
        p.data.view(torch.uint8).fill_(0x55)
    return model


def loaded(folder: Path, num: Numerics, group: Group = SOLO, args: ModelArgs | None = None) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    model = build(checkpoint, num, group, args)
    load_into(model, checkpoint, group, progress=False)
    return dict(model.named_parameters())


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype and tensor.shape == wanted[name].shape, name
        assert torch.equal(tensor.contiguous().view(torch.uint8), wanted[name].contiguous().view(torch.uint8)), name


def refusal(folder: Path, num: Numerics = FP8, group: Group = SOLO) -> str:
    """What loading the directory says; the directory's own path is cut from it."""
    with pytest.raises(UserError) as e:
        loaded(folder, num, group)
    assert "\n" not in str(e.value)
    return str(e.value).replace(f"{folder}/", "").replace(str(folder), "DIR")


# The table ----------------------------------------------------------------------------------------------------------

V3_671B = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "first_k_dense_replace": 3, "num_attention_heads": 128,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "rope_theta": 10000, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "num_nextn_predict_layers": 1,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}  # fmt: skip


def test_table_counts_the_released_v3():
    args = ModelArgs.from_hf(V3_671B)
    specs = expected_tensors(args, quantised=True)
    assert len(specs) == len({spec.hf for spec in specs.values()}) == 91_991
    assert sum(math.prod(s.shape) * s.dtype.itemsize for s in specs.values()) == 688_574_839_360
    assert specs["layers.3.attn.wkv_a.scale"].shape == (5, 56)
    assert specs["layers.60.ffn.experts.255.w2.weight"].hf == "model.layers.60.mlp.experts.255.down_proj.weight"
    assert specs["mtp.0.norm.weight"].hf == "model.layers.61.shared_head.norm.weight"
    assert specs["layers.3.ffn.gate.bias"].dtype == torch.float32


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_table_names_every_tensor_of_every_family(family, fp8, tmp_path):
    config = FAMILIES[family] | {"num_hidden_layers": 2}
    make_checkpoint(tmp_path, config, fp8=fp8)
    args = Checkpoint(tmp_path).args
    specs = expected_tensors(args, quantised=fp8)
    assert {s.hf: (s.shape, s.dtype) for s in specs.values()} == {
        name: (tuple(t.shape), t.dtype) for name, t in whole(tmp_path).items()
    }
    assert {name: s.hf for name, s in specs.items()} == {our_name(s.hf, args.n_layers): s.hf for s in specs.values()}


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({}, 3, "n_heads 128 does not divide by 3 ranks (it works with 1, 2, 4, 8, 16)"),
        ({"vocab_size": 129281}, 2, "vocab_size 129281 does not divide by 2 ranks (it works with 1)"),
        ({"intermediate_size": 18436}, 8, "inter_dim 18436 does not divide by 8 ranks (it works with 1)"),
        ({"n_routed_experts": 264}, 16, "n_routed_experts 264 does not divide by 16 ranks (it works with 1, 2, 4, 8)"
                                     "; --experts split works"),
        ({"moe_intermediate_size": 2052}, 8,
         "the shared experts' width 2052 does not divide by 8 ranks (it works with 1)"),
        ({}, 32, "ffn.w1 has 18432 rows, which 32 ranks cannot share in whole 128-wide FP8 blocks "
                 "(it works with 1, 2, 4, 8, 16)"),
        ({"num_attention_heads": 132}, 4, "attn.wq_b has 25344 rows, which 4 ranks cannot share in whole 128-wide "
                                          "FP8 blocks (it works with 1, 2)"),
        ({}, 0, "the number of ranks is 0, expected at least 1"),
    ],
)  # fmt: skip
def test_rank_counts(changes, ranks, message):
    args = ModelArgs.from_hf(V3_671B | changes)
    with pytest.raises(UserError) as e:
        Partition(args, ranks, fp8=True)
    assert str(e.value) == message


def test_rank_counts_that_work():
    args = ModelArgs.from_hf(V3_671B)
    for experts in ("whole", "split"):
        for ranks in (1, 2, 4, 8, 16):
            Partition(args, ranks, experts, fp8=True)
        Partition(args, 32, experts)


@pytest.mark.parametrize(
    ("changes", "ranks", "fp8", "message"),
    [
        ({"moe_intermediate_size": 1024, "n_shared_experts": 2}, 16, True,
         "moe_inter_dim is 1024, which 16 ranks cannot share in whole 128-wide FP8 blocks (it works with 1, 2, 4, 8); "
         "--experts whole works"),
        ({"moe_intermediate_size": 1028, "n_shared_experts": 2}, 8, False,
         "moe_inter_dim 1028 does not divide by 8 ranks (it works with 1, 2, 4); --experts whole works"),
        ({"moe_intermediate_size": 1024, "n_shared_experts": 2, "n_routed_experts": 264}, 16, True,
         "moe_inter_dim is 1024, which 16 ranks cannot share in whole 128-wide FP8 blocks (it works with 1, 2, 4, 8)"),
        ({}, 32, True, "ffn.w1 has 18432 rows, which 32 ranks cannot share in whole 128-wide FP8 blocks "
                       "(it works with 1, 2, 4, 8, 16)"),
    ],
)  # fmt: skip
def test_rank_counts_with_split_experts(changes, ranks, fp8, message):
    with pytest.raises(UserError) as e:
        Partition(ModelArgs.from_hf(V3_671B | changes), ranks, "split", fp8)
    assert str(e.value) == message


def test_split_experts_need_not_divide_in_number():
    args = ModelArgs.from_hf(V3_671B | {"n_routed_experts": 264})
    assert Partition.choose(args, 16, fp8=True).experts == "split"


@pytest.mark.parametrize(
    ("asked", "ranks", "fp8", "made", "expected"),
    [
        ("auto", 8, True, None, ("split", "experts: split, a rank has 256 of each one's width of 2048")),
        ("auto", 16, True, None, ("split", "experts: split, a rank has 128 of each one's width of 2048")),
        ("auto", 32, False, None, ("split", "experts: split, a rank has 64 of each one's width of 2048")),
        ("auto", 32, True, None,
         ("whole", "experts: whole, as 32 ranks cannot share their width of 2048 in whole 128-wide FP8 blocks")),
        ("auto", 3, False, None, ("whole", "experts: whole, as 3 ranks cannot share their width of 2048 evenly")),
        ("auto", 1, True, None, ("whole", "experts: whole, on one rank")),
        ("whole", 8, True, None, ("whole", "experts: whole, as asked")),
        ("split", 3, True, None, ("split", "experts: split, as asked")),
        ("auto", 8, True, "whole", ("whole", "experts: whole, as the files were converted")),
        ("split", 8, True, "split", ("split", "experts: split, as the files were converted")),
        ("whole", 1, True, "split", ("split", "experts: split, as the files were converted")),  # they are the same
    ],
)  # fmt: skip
def test_choice_of_layout(asked, ranks, fp8, made, expected):
    args = ModelArgs.from_hf(V3_671B | ({} if fp8 else {"quantization_config": None}))
    assert choose_experts(args, ranks, asked, made) == expected


@pytest.mark.parametrize(("asked", "made"), [("whole", "split"), ("split", "whole")])
def test_files_of_another_layout(asked, made):
    with pytest.raises(UserError) as e:
        choose_experts(ModelArgs.from_hf(V3_671B), 8, asked, made)
    assert str(e.value) == f"--experts {asked}, but the files hold {made} experts: convert again, or --experts {made}"


# Loading ------------------------------------------------------------------------------------------------------------


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
    assert Checkpoint(tmp_path).experts(ranks) == experts
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
            load_into(model, checkpoint, Group(0, 2), progress=False)
    upstream = tmp_path / "upstream"
    write_upstream(wide, upstream, 2, WIDE)
    args = Checkpoint(wide).args
    model = Transformer(args, dataclasses.replace(FP8, experts="split"), Group(0, 2), mtp=False)
    with pytest.raises(UserError, match=r"^--experts split, but the files hold whole experts"):
        load_into(model, Checkpoint(upstream), Group(0, 2), progress=False)


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


def multiplied_out(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors with FP8 weights times their scales, rounded once; the router's bias stays float32."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            found[name] = dequantise(tensor, tensors[name + "_scale_inv"]).to(dtype)
        elif not name.endswith("_scale_inv"):
            found[name] = tensor if name.endswith("bias") else tensor.to(dtype)
    return found


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
        "attn.wq_b has 192 rows, which 4 ranks cannot share in whole 128-wide FP8 blocks (it works with 1)"
    )


def test_plain_checkpoints(tmp_path):
    make_checkpoint(tmp_path / "bf16", CONFIG)
    for dtype in (torch.bfloat16, torch.float32):
        wanted = in_memory(multiplied_out(whole(tmp_path / "bf16"), dtype), 1, 2, CONFIG)
        assert_same(loaded(tmp_path / "bf16", Numerics(dtype), Group(1, 2)), wanted)
    assert refusal(tmp_path / "bf16") == "DIR: the model wants FP8 weights, the checkpoint is not FP8"

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


# Damage -------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (WO, lambda t: t[:, :-1].contiguous(), "expected F8_E4M3 192x1024, found F8_E4M3 192x1023"),
        (WO, lambda t: t.bfloat16(), "expected F8_E4M3 192x1024, found BF16 192x1024"),
        (WO + "_scale_inv", lambda t: t.bfloat16(), "expected F32 2x8, found BF16 2x8"),
        (WO + "_scale_inv", lambda t: t.T.contiguous(), "expected F32 2x8, found F32 8x2"),
        (BIAS, lambda t: t.bfloat16(), "expected F32 16, found BF16 16"),
        ("model.norm.weight", lambda t: t.float(), "expected BF16 192, found F32 192"),
        ("lm_head.weight", lambda t: t.half(), "expected BF16 256x192, found F16 256x192"),
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


def test_tensors_the_config_does_not_know(copy):
    add(copy, {"model.layers.7.input_layernorm.weight": torch.ones(192).bfloat16()})
    file = min(copy.glob("*.safetensors")).name
    assert refusal(copy) == f"{file}: model.layers.7.input_layernorm.weight: the config has no such tensor"


def test_config_and_files_disagree_about_fp8(copy):
    config = json.loads((copy / "config.json").read_text())
    quantisation = config.pop("quantization_config")
    (copy / "config.json").write_text(json.dumps(config))
    assert refusal(copy) == "DIR: config.json has no quantization_config, but the files hold FP8 scales"
    folder = copy.with_name("bf16")
    make_checkpoint(folder, CONFIG)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    assert refusal(folder) == "DIR: config.json has a quantization_config, but the files hold no FP8 scales"


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
    with pytest.raises(UserError, match="no such directory"):
        Checkpoint(source / "config.json")
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
