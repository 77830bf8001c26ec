"""What is read from configs of both styles, and what is refused by name."""

import copy
import json
import re
import tempfile
from pathlib import Path

import pytest

from core.config import ModelArgs, check_agreement, hf_prefix, load_config, parse
from core.errors import UserError
from support.families import FAMILIES, V3, multimodal

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
    assert not any(found.warnings for found in args.values())
    assert args["moonlight"].rope_factor == 1 and args["moonlight"].norm_eps == 1e-5
    assert args["v2-lite"].q_lora_rank == 0 and args["v2-lite"].mscale_all_dim == 0.707
    assert args["kimi-k2"].beta_fast == args["kimi-k2"].beta_slow == 1
    assert args["v2"].topk_method == "group_limited_greedy" and not args["v2"].gate_bias
    assert args["gigachat3"].v_head_dim == 192 and args["gigachat3"].q_lora_rank == 0
    assert args["joyai-llm-flash"].topk_method == "noaux_tc"
    glm = args["glm-4.7-flash"]
    assert glm.gate_bias and glm.norm_topk_prob and glm.score_func == "sigmoid" and glm.n_dense_layers == 1


def test_the_class_says_what_is_computed():
    """`architectures` before `model_type`; either alone will do."""
    args = ModelArgs.from_hf(V3)
    for absent in ("architectures", "model_type"):
        other = ModelArgs.from_hf({k: v for k, v in V3.items() if k != absent})
        assert other == args and not other.warnings
    fork = ModelArgs.from_hf({**V3, "model_type": "my_model"})
    assert fork == args and fork.warnings == (
        "config: model_type 'my_model' is unknown; computed as DeepseekV3ForCausalLM, its architecture",
    )


def test_the_text_model_of_a_multimodal_one():
    text = FAMILIES["kimi-k2"]
    for name in ("KimiK25ForConditionalGeneration", "Kimi_K25ForConditionalGeneration"):  # released; transformers'
        raw = {**multimodal(text), "architectures": [name]}
        assert ModelArgs.from_hf(raw) == ModelArgs.from_hf(text) and hf_prefix(raw) == "language_model."
    assert hf_prefix(text) == ""
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert ModelArgs.from_hf({**multimodal(text), "quantization_config": fp8}).dtype == "fp8"
    with pytest.raises(UserError, match=r"config: text_config.hidden_size is 0, expected a positive integer"):
        parse(multimodal({**text, "hidden_size": 0}))
    with pytest.raises(UserError, match=r"config: text_config.hidden_size is missing"):
        parse(multimodal({k: v for k, v in text.items() if k != "hidden_size"}))
    with pytest.raises(UserError, match=r"tie_word_embeddings and text_config.tie_word_embeddings differ"):
        parse({**multimodal(text), "tie_word_embeddings": True})
    with pytest.raises(UserError, match="text_config is None, expected an object"):
        parse({k: v for k, v in multimodal(text).items() if k != "text_config"})


@pytest.mark.parametrize(
    "change, n",
    [
        ({"first_k_dense_replace": 1}, 1),
        ({"mlp_layer_types": ["dense", "dense", "sparse"]}, 2),
        ({"mlp_layer_types": ["dense", "dense", "sparse"], "first_k_dense_replace": 2}, 2),
        ({"mlp_layer_types": ["dense"] * 3}, 3),
        ({}, 1),
    ],
)
def test_dense_layers(change, n):
    bare = {k: v for k, v in FAMILIES["glm-4.7-flash"].items() if k != "first_k_dense_replace"}
    assert ModelArgs.from_hf({**bare, **change}).n_dense_layers == n


def test_what_a_config_leaves_out():
    """Is as the released code has it: V3 normalises and biases its router, V2 does neither."""
    for family, wanted in (("v3", ("sigmoid", "noaux_tc", True, True)), ("v2-lite", ("softmax", "greedy", False, False))):
        said = ("scoring_func", "topk_method", "norm_topk_prob")
        args = ModelArgs.from_hf({k: v for k, v in FAMILIES[family].items() if k not in said})
        assert (args.score_func, args.topk_method, args.norm_topk_prob, args.gate_bias) == wanted


YARN = V3["rope_scaling"]
SAVED_YARN = {**YARN, "rope_type": "yarn", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
NO_ROPE = {k: v for k, v in V3.items() if k not in ("rope_scaling", "rope_theta")}


def saved_by_transformers(config: dict) -> dict:
    """The config.json that transformers writes for a released one."""
    import transformers

    cls = getattr(transformers, config["architectures"][0].replace("ForCausalLM", "Config"))
    with tempfile.TemporaryDirectory() as folder:
        own = copy.deepcopy(config)  # transformers writes into the rope_scaling that it is given
        cls(**{k: v for k, v in own.items() if k != "model_type"}).save_pretrained(folder)
        return json.loads((Path(folder) / "config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_5_writes_the_same(family):
    saved = saved_by_transformers(FAMILIES[family])
    assert "rope_scaling" not in saved and saved["rope_parameters"]["rope_theta"] == FAMILIES[family]["rope_theta"]
    assert ModelArgs.from_hf(saved) == ModelArgs.from_hf(FAMILIES[family])
    assert not ModelArgs.from_hf(saved).warnings


def test_yarn_added_by_hand_to_what_transformers_saved():
    """transformers obeys `rope_scaling`, and forgets the theta beside the other: nobody may choose in silence."""
    saved = saved_by_transformers(FAMILIES["moonlight"])
    with pytest.raises(UserError) as e:
        parse({**saved, "rope_scaling": YARN})
    assert str(e.value) == (
        "config: rope_scaling and rope_parameters differ (type 'yarn' against 'default'); make them equal or remove one"
    )
    saved["rope_parameters"] = {**SAVED_YARN, "rope_theta": 50000.0}
    with pytest.raises(UserError, match=re.escape("differ (rope_theta 10000.0 against 50000.0)")):
        parse({**saved, "rope_scaling": YARN})
    assert parse({**saved, "rope_scaling": YARN, "rope_theta": 50000.0}).rope_factor == 40


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 10000.0, "rope_scaling": YARN},
        {"rope_theta": 10000, "rope_scaling": {**YARN, "type": None, "rope_type": "yarn"}},
        {"rope_parameters": SAVED_YARN},
        {"rope_parameters": SAVED_YARN, "rope_scaling": None},
        {"rope_parameters": SAVED_YARN, "rope_scaling": {}},
        {"rope_parameters": SAVED_YARN, "rope_scaling": YARN},
        {"rope_parameters": SAVED_YARN, "rope_scaling": YARN, "rope_theta": 10000.0},
        {"rope_parameters": SAVED_YARN, "rope_scaling": {k: v for k, v in YARN.items() if "beta" not in k}},
    ],
)
def test_spellings_that_mean_the_same(spelling):
    assert parse({**NO_ROPE, **spelling}) == ModelArgs.from_hf(V3)


@pytest.mark.parametrize(
    "spelling, says",
    [
        ({"rope_parameters": SAVED_YARN, "rope_scaling": {**YARN, "factor": 32, "beta_slow": 2}},
         "rope_scaling and rope_parameters differ (factor 32.0 against 40.0, beta_slow 2.0 against 1.0)"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": {"type": "default"}, "rope_theta": 1e5},
         "rope_theta is 100000.0, but rope_parameters.rope_theta is 10000.0"),
        ({"rope_scaling": YARN}, "rope_theta is missing"),
        ({"rope_parameters": {**SAVED_YARN, "rope_type": "default", "type": "default"}},
         "rope_parameters has the type 'default', but factor, original_max_position_embeddings, beta_fast, beta_slow, mscale, "
         "mscale_all_dim of YaRN"),
        ({"rope_theta": 1e4, "rope_scaling": {"factor": 40}}, "rope_scaling has no type, but factor of YaRN"),
        ({"rope_parameters": {**SAVED_YARN, "rope_type": "default"}},
         "rope_parameters.type is 'yarn', but rope_parameters.rope_type is 'default'"),
        ({"rope_parameters": {**SAVED_YARN, "llama_4_scaling_beta": 0.1}}, "rope_parameters.llama_4_scaling_beta is not supported"),
        ({"rope_parameters": {**SAVED_YARN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor other than 1"),
        ({"rope_parameters": SAVED_YARN, "original_max_position_embeddings": 128},
         "original_max_position_embeddings is 128, but rope_parameters has another"),
        ({"rope_parameters": {**SAVED_YARN, "factor": 0.5}}, "rope_parameters.factor is 0.5, expected at least 1"),
        ({"rope_parameters": {**SAVED_YARN, "factor": "40"}}, "rope_parameters.factor is '40', expected a number"),
    ],
)  # fmt: skip
def test_spellings_that_are_refused(spelling, says):
    with pytest.raises(UserError) as e:
        parse({**NO_ROPE, **spelling})
    assert says in str(e.value)


@pytest.mark.parametrize(
    "change, says",
    [
        ({}, ""),
        ({"mscale": None, "mscale_all_dim": None}, ""),
        ({"mscale": None}, "rope_scaling.mscale is missing and counts as 1, as in the released code"),
        ({"mscale_all_dim": None}, "rope_scaling.mscale_all_dim is missing and counts as 0"),
        ({"mscale_all_dim": 0}, "rope_scaling.mscale_all_dim is 0 and scales nothing"),
        ({"mscale": 0.0}, "rope_scaling.mscale is 0 and scales nothing"),
    ],
)
def test_an_mscale_alone_is_worth_a_warning(tmp_path, change, says):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**V3, "rope_scaling": {**YARN, **change}}))
    warnings = load_config(path).warnings
    assert len(warnings) == bool(says)
    assert all(warning.startswith(f"{path}: config: {says}") for warning in warnings)


def test_the_released_code_decides_what_a_lone_mscale_means():
    """yarn_get_mscale(s, m) = 0.1 m ln s + 1; by default mscale is 1 and mscale_all_dim is 0, which scales nothing."""
    yarn = {k: v for k, v in YARN.items() if "mscale" not in k}
    for change, multiplier, temperature in (
        ({}, 1.36889, 1), ({"mscale": 0.707}, 1.26080, 1), ({"mscale_all_dim": 0.707}, 1.36889 / 1.26080, 1.26080**2),
        ({"mscale": 0, "mscale_all_dim": 0}, 1, 1),
    ):  # fmt: skip
        args = ModelArgs.from_hf({**V3, "rope_scaling": {**yarn, **change}})
        assert args.rope_multiplier == pytest.approx(multiplier, rel=1e-5)
        assert args.softmax_scale * args.qk_head_dim**0.5 == pytest.approx(temperature, rel=1e-5)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"model_type": "deepseek_v32"}, "model_type 'deepseek_v32' is not supported: its attention chooses keys by an indexer"),
        ({"architectures": ["DeepseekV32ForCausalLM"]}, "architecture 'DeepseekV32ForCausalLM' is not supported: its attention"),
        ({"architectures": ["DeepseekV4ForCausalLM"]}, "is not supported: it has hyper-connections"),
        ({"architectures": ["AXK1ForCausalLM"], "model_type": "AXK1"}, "is not supported: it has a norm behind each layer's MLP"),
        ({"architectures": ["MistralLarge3ForCausalLM"]}, "is not supported: its queries are scaled by position"),
        ({"architectures": ["GlmMoeDsaForCausalLM"]}, "is not supported: its attention chooses keys by an indexer"),
        ({"architectures": ["DeepseekV3ForSequenceClassification"]}, "is not supported (known: DeepseekV3ForCausalLM, Deep"),
        ({"architectures": None, "model_type": "llama"}, "model_type 'llama' is not supported (known: deepseek_v3, deepseek_v2"),
        ({"model_type": "deepseek_v2"}, "architecture 'DeepseekV3ForCausalLM' and model_type 'deepseek_v2' are different networks"),
        ({"index_topk": 2048}, "index_topk 2048 is not supported: its attention chooses keys by an indexer"),
        ({"sliding_window": 4096}, "sliding_window 4096 is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported (known: 1)"),
        ({"mlp_bias": True}, "mlp_bias True is not supported"),
        ({"mlp_layer_types": ["dense", "sparse", "dense"]}, "expected 3 times 'dense' or 'sparse', dense ones first"),
        ({"mlp_layer_types": ["dense", "sparse"]}, "expected 3 times 'dense' or 'sparse', dense ones first"),
        ({"mlp_layer_types": ["dense", "dense", "sparse"]}, "first_k_dense_replace is 1, but mlp_layer_types has 2 dense layers"),
        ({"num_mtp_layers": 0}, "num_nextn_predict_layers and num_mtp_layers differ"),
        ({"scoring_func": "tanh"}, "scoring_func 'tanh' is not supported with DeepseekV3ForCausalLM (known: sigmoid)"),
        ({"scoring_func": "softmax", "topk_method": "greedy"}, "scoring_func 'softmax' is not supported with DeepseekV3ForCausalLM"),
        ({"topk_method": "greedy"}, "topk_method 'greedy' is not supported with DeepseekV3ForCausalLM (known: noaux_tc)"),
        ({**FAMILIES["v2"], "scoring_func": "sigmoid"}, "scoring_func 'sigmoid' is not supported with DeepseekV2ForCausalLM"),
        ({**FAMILIES["v2"], "topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported with DeepseekV2ForCausalLM"),
        ({"rope_scaling": {**V3["rope_scaling"], "beta_fast": 1, "beta_slow": 32}}, "rope_scaling.beta_fast is 1.0, expected at least"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type 'linear' is not supported (known: yarn, default)"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope_scaling.original_max_position_embeddings is missing"),
        ({"rope_theta": 1.0}, "rope_theta is 1.0, expected a number above 1"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config.quant_method 'bitsandbytes' is not supported"),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, "quantization_config.fmt 'e5m2' is not supported"),
        ({"quantization_config": {"quant_method": "fp8", "scale_fmt": "e8"}}, "quantization_config.scale_fmt 'e8' is not supported"),
        ({"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": "lm_head"}}, "modules_to_not_convert is 'lm_head', expected a list"),
        ({"quantization_config": {"quant_method": "fp8", "ignored_layers": 5}}, "ignored_layers is 5, expected a list of modules"),
        ({"torch_dtype": "float64"}, "weights in 'float64' are not supported"),
        ({"num_experts_per_tok": 13}, "num_experts_per_tok is 13, expected from 1 to 12"),
        ({"n_group": 5}, "n_group is 5, expected a divisor of 32 experts"),
        ({"topk_group": 9}, "topk_group is 9, expected from 1 to 8"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim is 15, expected an even number"),
        ({"hidden_size": None}, "hidden_size is None, expected a whole number"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2, expected 0 or 1"),
    ],
)
def test_refused_by_name(change, says):
    with pytest.raises(UserError) as e:
        parse({**V3, **change})
    assert says in str(e.value)


def test_a_normalised_router_of_v2_is_refused():
    """Three readers compute three things; every release says false."""
    with pytest.raises(UserError, match=r"config: norm_topk_prob true is not supported with a V2 model .*; set it to false"):
        parse({**FAMILIES["v2"], "norm_topk_prob": True})


@pytest.mark.parametrize("name", ["n_group", "topk_group"])
def test_groups_are_not_guessed(name):
    """Where V3's config leaves them out, transformers takes 8 and 4, others 1."""
    for family, needed in (("v3", True), ("v2", True), ("v2-lite", False), ("glm-4.7-flash", False)):
        bare = {k: v for k, v in FAMILIES[family].items() if k != name}
        if needed:
            with pytest.raises(UserError, match=f"config: {name} is missing"):
                parse(bare)
        else:
            assert parse(bare) == parse(FAMILIES[family])


def test_missing_and_unknown_fields(tmp_path):
    with pytest.raises(UserError, match="config: hidden_size is missing"):
        parse({k: v for k, v in V3.items() if k != "hidden_size"})
    with pytest.raises(UserError, match="unknown field n_head"):
        parse({**UPSTREAM_V3, "n_head": 3})
    with pytest.raises(UserError, match="config: dim missing"):
        parse({k: v for k, v in UPSTREAM_V3.items() if k != "dim"})
    with pytest.raises(UserError, match="config: n_expert_groups is 5, expected a divisor"):
        parse({**UPSTREAM_V3, "n_expert_groups": 5})
    with pytest.raises(UserError, match=r"config: score_func 'tanh' is not supported \(known: sigmoid, softmax\)"):
        parse({**UPSTREAM_V3, "score_func": "tanh"})
    with pytest.raises(UserError, match="config: llama_4_scaling is not supported: its queries are scaled by position"):
        parse({"dim": 7168, "n_layers": 61, "llama_4_scaling": {"beta": 0.1}})  # Mistral Large 3's params.json
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
    path.write_text(json.dumps({**RELEASED_V3, "hidden_size": 5120, "n_group": 4}))
    with pytest.raises(UserError) as e:
        check_agreement(path, ModelArgs.from_hf(RELEASED_V3))
    assert "hidden_size is 5120 but the checkpoint says 7168; n_group is 4 but the checkpoint says 8" in str(e.value)
