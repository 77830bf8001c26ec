"""A config with any field changed is computed as transformers computes it, or refused: never otherwise without a word."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from checkpoint.directory import Checkpoint
from core.errors import UserError
from support.catalogue import CONFIGS, is_norm
from support.families import V3
from support.model_pairs import hidden_states, ours, relative_error, tokens

YARN = V3["rope_scaling"]


def yarn(**changes: Any) -> dict[str, Any]:
    found = YARN | changes
    return {"rope_scaling": {name: value for name, value in found.items() if value is not None}}


CHANGES: list[dict[str, Any]] = [
    # routing
    {"norm_topk_prob": False}, {"norm_topk_prob": True}, {"routed_scaling_factor": 1.0}, {"scoring_func": "softmax"},
    {"scoring_func": "sigmoid"}, {"topk_method": "greedy"}, {"topk_method": "group_limited_greedy"}, {"topk_method": "noaux_tc"},
    {"n_group": 1, "topk_group": 1}, {"n_group": 2, "topk_group": 1}, {"n_group": 4, "topk_group": 4},
    {"n_group": None, "topk_group": None}, {"num_experts_per_tok": 1}, {"n_shared_experts": 1}, {"seq_aux": True}, {"ep_size": 4},
    # layers
    {"first_k_dense_replace": 0}, {"first_k_dense_replace": 2}, {"moe_layer_freq": 2}, {"mlp_layer_types": ["sparse", "dense"]},
    {"mlp_layer_types": ["sparse", "sparse"]}, {"layer_types": ["full_attention", "sliding_attention"]}, {"sliding_window": 16},
    {"hidden_act": "gelu"}, {"mlp_bias": True}, {"rms_norm_eps": 1e-3}, {"tie_word_embeddings": True}, {"pretraining_tp": 2},
    # attention
    {"q_lora_rank": None}, {"q_lora_rank": 32}, {"attention_bias": True}, {"num_key_value_heads": 2}, {"head_dim": 64}, {"v_head_dim": 48},
    {"qk_rope_head_dim": 32}, {"qk_nope_head_dim": 16}, {"kv_lora_rank": 32},
    # positions
    {"rope_theta": 500.0}, {"rope_interleave": False}, {"partial_rotary_factor": 0.5}, {"max_position_embeddings": 64},
    {"original_max_position_embeddings": 32}, {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    {"rope_scaling": None}, {"rope_scaling": {"type": "linear", "factor": 4.0}}, {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 64}},
    yarn(factor=1.0), yarn(factor=2.0), yarn(beta_fast=8), yarn(beta_slow=4), yarn(original_max_position_embeddings=16),
    yarn(mscale=0.5), yarn(mscale=None, mscale_all_dim=None), yarn(mscale=None), yarn(mscale_all_dim=None), yarn(mscale_all_dim=0),
    yarn(mscale=0, mscale_all_dim=0), yarn(attention_factor=1.2), yarn(truncate=False), yarn(rope_theta=50.0),
    yarn(type=None, rope_type="yarn"),
]  # fmt: skip
LONG = [pytest.param(name, marks=pytest.mark.trust) for name in ("v2", "v2-lite", "moonlight", "glm-4.7-flash")]


@torch.no_grad()
@pytest.mark.parametrize("name", ["v3", *LONG])
def test_computed_as_transformers_does_or_refused(name: str, tmp_path: Path) -> None:
    """Both in the form that transformers saves and in the one that people write. Where the file is ambiguous and the
    released code differs from transformers, there is a warning."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    ids, outcomes = tokens(48, 250), {"equal": 0, "refused": 0, "warned": 0}
    for i, change in enumerate(CHANGES):
        written = json.loads(json.dumps(CONFIGS[name] | {"num_nextn_predict_layers": 0} | change))
        folder = tmp_path / str(i)
        try:
            made = transformers.CONFIG_MAPPING[written["model_type"]].from_dict(
                {key: value for key, value in json.loads(json.dumps(written)).items() if key != "model_type"}
            )
            made._attn_implementation = "eager"
            theirs = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
            generator = torch.Generator().manual_seed(i)
            for key, tensor in theirs.state_dict().items():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(1 + 0.2 * noise if is_norm(key) else 0.3 * noise)
            expected = theirs(torch.tensor([ids])).logits[0]
        except Exception:  # transformers has no such model
            continue
        theirs.save_pretrained(folder)
        for form in (json.loads((folder / "config.json").read_text()), written | {"torch_dtype": "float32"}):
            (folder / "config.json").write_text(json.dumps(form))
            try:
                model = ours(folder)
            except UserError:
                outcomes["refused"] += 1
                continue
            args = Checkpoint(folder).args
            right = relative_error(model.logits(hidden_states(model, ids)), expected) < 1e-5
            assert right or (args and any("as in the released code" in said for said in args.warnings)), (change, form)
            outcomes["equal" if right else "warned"] += 1
    assert outcomes["equal"] > 40 and outcomes["refused"] > 15 and outcomes["warned"] <= 6, outcomes
