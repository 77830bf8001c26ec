"""What is read from configs of both styles, and what is refused by name."""

import json

import pytest

from core.config import ModelArgs, check_agreement, load_config, parse
from core.errors import UserError
from support.families import FAMILIES, V3

RELEASED_V3 = {
    **V3, "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "first_k_dense_replace": 3, "num_attention_heads": 128, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "rope_scaling": {**V3["rope_scaling"], "original_max_position_embeddings": 4096}, "max_position_embeddings": 163840,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [128, 128]},
}  # fmt: skip

UPSTREAM_V3 = {
    "vocab_size": 129280, "dim": 7168, "inter_dim": 18432, "moe_inter_dim": 2048, "n_layers": 61, "n_dense_layers": 3,
    "n_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "n_activated_experts": 8, "n_expert_groups": 8,
    "n_limited_groups": 4, "route_scale": 2.5, "score_func": "sigmoid", "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "dtype": "fp8",
}  # fmt: skip


def test_the_two_styles_of_v3_agree(tmp_path):
    hf, upstream = ModelArgs.from_hf(RELEASED_V3), ModelArgs.from_upstream(UPSTREAM_V3)
    assert hf.n_mtp_layers == 1 and upstream.n_mtp_layers == 0
    short = tmp_path / "config_671B.json"
    short.write_text(json.dumps(UPSTREAM_V3))
    check_agreement(short, hf)
    check_agreement("configs/config_671B.json", hf)
    assert hf.softmax_scale == upstream.softmax_scale == pytest.approx(0.1352337788608801)
    assert hf.rope_multiplier == 1.0


def test_upstream_json_derives_what_it_lacks():
    lite = {k: v for k, v in UPSTREAM_V3.items() if k not in ("score_func", "n_expert_groups", "n_limited_groups", "dtype")}
    args = ModelArgs.from_upstream({**lite, "q_lora_rank": 0, "mscale": 0.707})
    assert (args.score_func, args.topk_method, args.gate_bias, args.norm_topk_prob) == ("softmax", "greedy", False, False)
    assert args.mscale_all_dim == 0.707 and args.rope_factor == 40 and args.rope_theta == 10000 and args.norm_eps == 1e-6
    grouped = ModelArgs.from_upstream({**lite, "n_expert_groups": 8, "n_limited_groups": 3})
    assert grouped.topk_method == "group_limited_greedy"
    v3 = ModelArgs.from_upstream(UPSTREAM_V3)
    assert (v3.topk_method, v3.gate_bias, v3.norm_topk_prob) == ("noaux_tc", True, True)


def test_families():
    args = {name: ModelArgs.from_hf(config) for name, config in FAMILIES.items()}
    assert args["moonlight"].rope_factor == 1 and args["moonlight"].norm_eps == 1e-5
    assert args["v2-lite"].q_lora_rank == 0 and args["v2-lite"].mscale_all_dim == 0.707
    assert args["kimi-k2"].beta_fast == args["kimi-k2"].beta_slow == 1
    assert args["v2"].topk_method == "group_limited_greedy" and not args["v2"].gate_bias


def test_what_a_config_leaves_out():
    """Is as the released code has it: V3 normalises and biases its router, V2 does neither."""
    for family, wanted in (("v3", ("sigmoid", "noaux_tc", True, True)), ("v2-lite", ("softmax", "greedy", False, False))):
        said = ("scoring_func", "topk_method", "norm_topk_prob")
        args = ModelArgs.from_hf({k: v for k, v in FAMILIES[family].items() if k not in said})
        assert (args.score_func, args.topk_method, args.norm_topk_prob, args.gate_bias) == wanted


def test_transformers_5_spelling():
    """`rope_parameters` and `dtype`, as transformers 5 saves a config, mean the same."""
    rope = {**V3["rope_scaling"], "rope_type": "yarn", "rope_theta": 10000.0}
    del rope["type"]
    saved = {k: v for k, v in V3.items() if k not in ("rope_scaling", "rope_theta", "torch_dtype")}
    assert ModelArgs.from_hf({**saved, "rope_parameters": rope, "dtype": "bfloat16"}) == ModelArgs.from_hf(V3)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"model_type": "deepseek_v32"}, "model_type 'deepseek_v32' is not supported (known: deepseek_v3, deepseek_v2, kimi_k2)"),
        ({"model_type": "llama"}, "model_type 'llama' is not supported"),
        ({"scoring_func": "tanh"}, "score_func 'tanh' is not supported (known: sigmoid, softmax)"),
        ({"topk_method": "noaux"}, "topk_method 'noaux' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type 'linear' is not supported (known: yarn, default)"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope_scaling.original_max_position_embeddings is missing"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.quant_method 'gptq' is not supported"),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, "quantization_config.fmt 'e5m2' is not supported"),
        ({"quantization_config": {"quant_method": "fp8", "scale_fmt": "e8"}}, "scale_fmt 'e8' is not supported"),
        ({"torch_dtype": "float16"}, "weights in 'float16' are not supported"),
        ({"num_experts_per_tok": 13}, "n_activated_experts is 13, expected from 1 to 12"),
        ({"n_group": 5}, "n_expert_groups is 5, expected a divisor of 32 experts"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim is 15, expected an even number"),
        ({"hidden_size": None}, "dim is None, expected a whole number"),
        ({"num_nextn_predict_layers": 2}, "n_mtp_layers is 2, expected 0 or 1"),
    ],
)
def test_refused_by_name(change, says):
    with pytest.raises(UserError) as e:
        parse({**V3, **change})
    assert says in str(e.value)


def test_missing_and_unknown_fields(tmp_path):
    with pytest.raises(UserError, match="config: hidden_size is missing"):
        parse({k: v for k, v in V3.items() if k != "hidden_size"})
    with pytest.raises(UserError, match="unknown field n_head"):
        parse({**UPSTREAM_V3, "n_head": 3})
    with pytest.raises(UserError, match="config: dim missing"):
        parse({k: v for k, v in UPSTREAM_V3.items() if k != "dim"})
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="expected a JSON object, found list"):
        load_config(tmp_path / "bad.json")


def test_a_config_that_contradicts_the_checkpoint_names_the_fields(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**UPSTREAM_V3, "dim": 5120, "route_scale": 16.0}))
    with pytest.raises(UserError) as e:
        check_agreement(path, ModelArgs.from_hf(RELEASED_V3))
    assert "dim is 5120 but the checkpoint says 7168; route_scale is 16.0 but the checkpoint says 2.5" in str(e.value)
    v31 = {**RELEASED_V3["quantization_config"], "scale_fmt": "ue8m0"}
    path.write_text(json.dumps({**UPSTREAM_V3, "scale_fmt": "ue8m0"}))
    check_agreement(path, ModelArgs.from_hf({**RELEASED_V3, "quantization_config": v31}))
    with pytest.raises(UserError, match="scale_fmt is 'ue8m0' but the checkpoint says None"):
        check_agreement(path, ModelArgs.from_hf(RELEASED_V3))
