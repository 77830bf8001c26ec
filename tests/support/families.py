"""Hugging Face configs of every released family, shrunk, and shaped so that the usual porting mistakes show.

32 experts in 8 groups of which 3 are kept, 6 chosen, with a biased gate: a wrong group score, mask or bias changes
the choice. YaRN's original length is 64, so that 1,000 tokens lie far past it.
"""

V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 32,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 8,
    "topk_group": 3,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 2560,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}


def _with(base: dict, **changes) -> dict:
    config = {**base, **changes}
    return {k: v for k, v in config.items() if v != "absent"}


_V2_ONLY = {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "num_nextn_predict_layers": "absent"}

FAMILIES: dict[str, dict] = {
    "v3": V3,
    # 256 experts as released: ties between near scores are likelier
    "v3-256": _with(V3, n_routed_experts=256, n_group=8, topk_group=4, num_experts_per_tok=8, num_hidden_layers=2,
                    moe_intermediate_size=32, n_shared_experts=1, num_nextn_predict_layers=0),
    "v2": _with(V3, **_V2_ONLY, scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False,
                routed_scaling_factor=16.0, rope_scaling={**V3["rope_scaling"], "mscale": 0.707, "mscale_all_dim": 0.707}),
    "v2-lite": _with(V3, **_V2_ONLY, scoring_func="softmax", topk_method="greedy", norm_topk_prob=False, n_group=1,
                     topk_group=1, routed_scaling_factor=1.0, q_lora_rank=None, n_routed_experts=16,
                     rope_scaling={**V3["rope_scaling"], "mscale": 0.707, "mscale_all_dim": 0.707}),
    "moonlight": _with(V3, n_group=1, topk_group=1, routed_scaling_factor=2.446, q_lora_rank=None, rope_theta=50000.0,
                       rope_scaling=None, rms_norm_eps=1e-5, num_nextn_predict_layers=0),
    "kimi-k2": _with(V3, model_type="kimi_k2", n_group=1, topk_group=1, routed_scaling_factor=2.827, n_shared_experts=1,
                     rope_theta=50000.0, num_nextn_predict_layers=0,
                     rope_scaling={**V3["rope_scaling"], "factor": 32, "beta_fast": 1.0, "beta_slow": 1.0}),
    # head sizes as released: the values' is neither the keys' nor a power of two
    "gigachat3": _with(V3, n_group=1, topk_group=1, routed_scaling_factor=1.0, n_shared_experts=1, q_lora_rank=None,
                       qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=192, rope_theta=100000.0,
                       rope_scaling={**V3["rope_scaling"], "factor": 64}),
    "joyai-llm-flash": _with(V3, model_type="joyai_llm_flash", n_group=1, topk_group=1, n_shared_experts=1,
                             rope_theta=32000000.0, rope_scaling=None, num_nextn_predict_layers=0),
    "glm-4.7-flash": _with(V3, architectures=["Glm4MoeLiteForCausalLM"], model_type="glm4_moe_lite", n_group=1,
                           topk_group=1, routed_scaling_factor=1.8, n_shared_experts=1, scoring_func="absent",
                           partial_rotary_factor=1.0, rms_norm_eps=1e-5, rope_theta=1000000.0, rope_scaling=None,
                           qk_nope_head_dim=48, v_head_dim=64),
}  # fmt: skip


def two_layers(family: str) -> dict:
    """The family's config with one dense layer and one of experts."""
    config = FAMILIES[family] | {"num_hidden_layers": 2}
    return config | ({"mlp_layer_types": config["mlp_layer_types"][:2]} if "mlp_layer_types" in config else {})


def multimodal(text: dict) -> dict:
    """The config of Kimi-K2.5 and 2.6 around that of their text model; the vision model's is not read."""
    return {
        "architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "dtype": "bfloat16",
        "tie_word_embeddings": False, "text_config": text, "vision_config": {"patch_size": 14, "vt_hidden_size": 1152},
        "bos_token_id": text["bos_token_id"], "eos_token_id": text["eos_token_id"],
    }  # fmt: skip
