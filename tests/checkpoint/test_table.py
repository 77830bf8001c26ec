"""The table of tensors, and how it is divided over ranks."""

import math
from dataclasses import replace

import pytest
import torch

from checkpoint.directory import Checkpoint
from checkpoint.partition import Partition, choose_experts
from checkpoint.table import expected_tensors, quantised_rows
from core.config import ModelArgs
from core.errors import UserError
from support.checkpoints import make_checkpoint
from support.damaged_checkpoints import whole
from support.families import FAMILIES, two_layers
from support.rank_weights import (
    our_name,
)  # fmt: skip

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
    make_checkpoint(tmp_path, two_layers(family), fp8=fp8)
    args = Checkpoint(tmp_path).args
    specs = expected_tensors(args, quantised=fp8)
    assert {s.hf: (s.shape, s.dtype) for s in specs.values()} == {
        name: (tuple(t.shape), t.dtype) for name, t in whole(tmp_path).items()
    }
    assert {name: s.hf for name, s in specs.items()} == {our_name(s.hf, args.n_layers): s.hf for s in specs.values()}


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({}, 3, "num_attention_heads 128 does not divide by 3 ranks (it works with 1, 2, 4, 8, 16)"),
        ({"vocab_size": 129281}, 2, "vocab_size 129281 does not divide by 2 ranks (it works with 1)"),
        ({"intermediate_size": 18436}, 8, "intermediate_size 18436 does not divide by 8 ranks (it works with 1)"),
        ({"n_routed_experts": 264}, 16, "n_routed_experts 264 does not divide by 16 ranks (it works with 1, 2, 4, 8)"
                                     "; --experts split works"),
        ({"moe_intermediate_size": 2052}, 8,
         "the shared experts' width 2052 does not divide by 8 ranks (it works with 1)"),
        ({}, 32, "mlp.gate_proj has 18432 rows, which 32 ranks cannot share in whole 128-wide FP8 blocks "
                 "(it works with 1, 2, 4, 8, 16)"),
        ({"num_attention_heads": 132}, 4, "self_attn.q_b_proj has 25344 rows, which 4 ranks cannot share in whole 128-wide "
                                          "FP8 blocks (it works with 1, 2)"),
        ({}, 0, "the number of ranks is 0, expected at least 1"),
    ],
)  # fmt: skip
def test_rank_counts(changes, ranks, message):
    args = ModelArgs.from_hf(V3_671B | changes)
    with pytest.raises(UserError) as e:
        Partition(args, ranks, quantised=True)
    assert str(e.value) == message


def test_rank_counts_that_work():
    args = ModelArgs.from_hf(V3_671B)
    for experts in ("whole", "split"):
        for ranks in (1, 2, 4, 8, 16):
            Partition(args, ranks, experts, quantised=True)
        Partition(args, 32, experts)


@pytest.mark.parametrize(
    ("changes", "ranks", "fp8", "message"),
    [
        ({"moe_intermediate_size": 1024, "n_shared_experts": 2}, 16, True,
         "moe_intermediate_size is 1024, which 16 ranks cannot share in whole 128-wide FP8 blocks (it works with 1, 2, 4, 8); "
         "--experts whole works"),
        ({"moe_intermediate_size": 1028, "n_shared_experts": 2}, 8, False,
         "moe_intermediate_size 1028 does not divide by 8 ranks (it works with 1, 2, 4); --experts whole works"),
        ({"moe_intermediate_size": 1024, "n_shared_experts": 2, "n_routed_experts": 264}, 16, True,
         "moe_intermediate_size is 1024, which 16 ranks cannot share in whole 128-wide FP8 blocks (it works with 1, 2, 4, 8)"),
        ({}, 32, True, "mlp.gate_proj has 18432 rows, which 32 ranks cannot share in whole 128-wide FP8 blocks "
                       "(it works with 1, 2, 4, 8, 16)"),
    ],
)  # fmt: skip
def test_rank_counts_with_split_experts(changes, ranks, fp8, message):
    with pytest.raises(UserError) as e:
        Partition(ModelArgs.from_hf(V3_671B | changes), ranks, "split", fp8)
    assert str(e.value) == message


def test_split_experts_need_not_divide_in_number():
    args = ModelArgs.from_hf(V3_671B | {"n_routed_experts": 264})
    assert Partition.choose(args, 16, quantised=True).experts == "split"


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


WORLDS = [(2, 1), (4, 1), (2, 2), (1, 4), (1, 2)]  # lanes, and ranks of each


def expert_of(name):
    return int(name.split(".experts.")[1].split(".")[0]) if ".experts." in name else None


@pytest.mark.parametrize(("lanes", "tp"), WORLDS)
@pytest.mark.parametrize("experts", ["whole", "split"])
@pytest.mark.parametrize("form", ["plain", "fp8", "int4"])
def test_lanes_hold_every_byte_where_it_should_be(form, experts, lanes, tp):
    """What a rank must hold, said in other words than cut's: MLPs and experts as rank t * lanes + l of all ranks would
    without lanes, the rest as rank t of one lane alone would. And no byte is held too often or not at all."""
    changes = {"n_routed_experts": 32, "n_shared_experts": 2, "num_hidden_layers": 4}
    changes |= {} if form == "fp8" else {"quantization_config": None}
    args = ModelArgs.from_hf(V3_671B | changes)
    if form == "int4":
        args = replace(args, dtype="int4", group_size=32, zero_points=True)
    quantised, world = form != "plain", lanes * tp
    rows = quantised_rows(expected_tensors(args, quantised))
    one_lane, flat = Partition(args, tp, experts, rows), Partition(args, world, experts, rows)
    partition = Partition(args, world, experts, rows, lanes=lanes)
    assert partition.tp == tp
    shares = [t * lanes + lane for lane in range(lanes) for t in range(tp)]
    assert [partition.shard(rank) for rank in range(world)] == shares
    mlps = 0
    for name, spec in expected_tensors(args, quantised).items():
        mlp = ".ffn." in name and "gate" not in name
        mlps += mlp
        held = [partition.cut(spec, rank) for rank in range(world)]
        for rank, cut in enumerate(held):
            assert cut == (flat.cut(spec, shares[rank]) if mlp else one_lane.cut(spec, rank % tp)), (name, rank)
        e = expert_of(name)
        if e is not None and experts == "whole":
            holders = [rank for rank in range(world) if held[rank] is not None]
            assert holders == [shares.index(e // (32 // world))] and e in partition.held_experts(holders[0]), name
            continue
        copies = sum(math.prod(b - a for a, b in cut) for cut in held) // math.prod(spec.shape)
        assert copies == (1 if mlp else world if spec.split is None else lanes), name
        if spec.split is not None:  # shares meet without gaps
            ends = {cut[spec.split] for cut in held}
            assert sorted(start for start, _ in ends) == [0, *sorted(stop for _, stop in ends)[:-1]]
    assert mlps > 3 * 33


@pytest.mark.parametrize(
    ("changes", "ranks", "lanes", "experts", "message"),
    [
        ({}, 4, 3, "split", "--dp 3 does not divide 4 ranks"),
        ({}, 4, 0, "split", "--dp 0 does not divide 4 ranks"),
        ({"num_attention_heads": 132}, 16, 2, "split",
         "num_attention_heads 132 does not divide by a lane's 8 ranks (it works with 2, 4 in 2 lanes)"),
        ({"num_attention_heads": 132}, 8, 2, "split",
         "self_attn.q_b_proj has 25344 rows, which a lane's 4 ranks cannot share in whole 128-wide FP8 blocks "
         "(it works with 2, 4 in 2 lanes)"),
        ({"n_routed_experts": 264}, 16, 16, "whole",
         "n_routed_experts 264 does not divide by 16 ranks (it works with none in 16 lanes); --experts split works"),
        ({"intermediate_size": 18436}, 8, 8, "split",
         "intermediate_size 18436 does not divide by 8 ranks (it works with none in 8 lanes)"),
        ({"moe_intermediate_size": 1024, "n_shared_experts": 2}, 16, 8, "split",
         "moe_intermediate_size is 1024, which 16 ranks cannot share in whole 128-wide FP8 blocks (it works with 8 in "
         "8 lanes); --experts whole works"),
        ({}, 32, 32, "whole", "mlp.gate_proj has 18432 rows, which 32 ranks cannot share in whole 128-wide FP8 blocks "
                              "(it works with none in 32 lanes)"),
    ],
)  # fmt: skip
def test_lanes_that_do_not_fit(changes, ranks, lanes, experts, message):
    with pytest.raises(UserError) as e:
        Partition(ModelArgs.from_hf(V3_671B | changes), ranks, experts, quantised=True, lanes=lanes)
    assert str(e.value) == message


def test_lanes_free_attention_of_the_ranks_that_do_not_divide_it():
    """132 heads do not divide by 8 ranks, but each of 8 lanes has them all."""
    args = ModelArgs.from_hf(V3_671B | {"num_attention_heads": 132})
    Partition(args, 8, "split", True, lanes=8)
    assert Partition.choose(args, 8, quantised=True, lanes=8).experts == "split"
