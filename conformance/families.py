"""Configs of the conformance models: one for each family, shrunk, and shaped so that the known mistakes show.

32 experts in 8 groups of which 3 are kept, 6 chosen; YaRN's original length is 64; `v2` has a context limit no longer
than that, where YaRN applies all the same; `moonlight` has a prompt of 320 tokens, whose last positions bfloat16 cannot
count; layer norms' eps differ from the inner norms' where a release has it so.
"""

from typing import Any

_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
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
_YARN: dict[str, Any] = _V3["rope_scaling"]
_ABSENT = object()
_QUANTISED = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
}  # fmt: skip
_BLOCKS = {  # sizes of which most end in part of a block
    "hidden_size": 192, "intermediate_size": 320, "moe_intermediate_size": 160, "num_hidden_layers": 2,
    "n_shared_experts": 1, "q_lora_rank": 160, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}  # fmt: skip


def _changed(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in (_V3 | changes).items() if value is not _ABSENT}


_V2: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "num_nextn_predict_layers": _ABSENT,
    "scoring_func": "softmax", "norm_topk_prob": False,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "v3": _V3,
    "v3-fp8": _changed(**_BLOCKS, quantization_config=_QUANTISED),
    "v3.1-fp8": _changed(**_BLOCKS, quantization_config={**_QUANTISED, "scale_fmt": "ue8m0"}),
    "v2": _changed(**_V2, topk_method="group_limited_greedy", routed_scaling_factor=16.0, max_position_embeddings=64),
    "v2-lite": _changed(
        **_V2, topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0, q_lora_rank=None,
        rope_scaling={**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "moonlight": _changed(
        n_group=1, topk_group=1, routed_scaling_factor=2.446, q_lora_rank=None, rope_theta=50000.0, rope_scaling=None,
        rms_norm_eps=1e-5, num_nextn_predict_layers=0, max_position_embeddings=8192,
    ),
    "kimi-k2": _changed(
        model_type="kimi_k2", n_group=1, topk_group=1, routed_scaling_factor=2.827, n_shared_experts=1,
        rope_theta=50000.0, num_nextn_predict_layers=0,
        rope_scaling={**_YARN, "factor": 32, "beta_fast": 1.0, "beta_slow": 1.0},
    ),
    "glm-4.7-flash": _changed(
        architectures=["Glm4MoeLiteForCausalLM"], model_type="glm4_moe_lite", n_group=1, topk_group=1,
        routed_scaling_factor=1.8, n_shared_experts=1, scoring_func=_ABSENT, partial_rotary_factor=1.0,
        rms_norm_eps=1e-5, rope_theta=1000000.0, rope_scaling=None, qk_nope_head_dim=48, v_head_dim=64,
    ),
    "gigachat3": _changed(
        n_group=1, topk_group=1, routed_scaling_factor=1.0, n_shared_experts=1, q_lora_rank=None, v_head_dim=48,
        rope_theta=100000.0, rope_scaling={**_YARN, "factor": 64},
    ),
}  # fmt: skip
LENGTHS = {family: 320 if family == "moonlight" else 24 for family in FAMILIES}  # tokens of each prompt
KEPT = 24  # positions, the last ones, whose golden values are kept
