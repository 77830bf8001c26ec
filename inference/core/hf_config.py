"""What a Hugging Face config.json says, in the terms of `core.config`: which network, and which rotary embedding.

A network is accepted by what it computes: its class, and what its config asks of that class. Nothing is guessed where
two readers of such a file (the released code, transformers, vLLM) differ.
"""

from typing import Any, NamedTuple

from core.errors import UserError

# Classes that compute as the released DeepSeek-V3 or -V2 does, and the model types that stand for them.
ARCHITECTURES = {"DeepseekV3ForCausalLM": "v3", "DeepseekV2ForCausalLM": "v2", "Glm4MoeLiteForCausalLM": "v3"}
MODEL_TYPES = {
    "deepseek_v3": "DeepseekV3ForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM", "kimi_k2": "DeepseekV3ForCausalLM",
    "joyai_llm_flash": "DeepseekV3ForCausalLM", "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
}  # fmt: skip
# Kimi-K2.5 and 2.6: images beside a text model, which `text_config` describes. transformers spells the class otherwise.
MULTIMODAL = ("KimiK25ForConditionalGeneration", "Kimi_K25ForConditionalGeneration", "kimi_k25")
# Near relatives, by class and model type, and what they compute otherwise.
SPARSE = "its attention chooses keys by an indexer"
HYPER = "it has hyper-connections, compressed attention and another router"
NORMED = "it has a norm behind each layer's MLP"
SCALED = "its queries are scaled by position, its router has no bias, and its tensors have other names"
DIFFERENT = {
    "DeepseekV32ForCausalLM": SPARSE, "deepseek_v32": SPARSE, "GlmMoeDsaForCausalLM": SPARSE, "glm_moe_dsa": SPARSE,
    "DeepseekV4ForCausalLM": HYPER, "deepseek_v4": HYPER,
    "AXK1ForCausalLM": NORMED, "AXK1": NORMED, "axk1": NORMED,
    "MistralLarge3ForCausalLM": SCALED, "mistral_large3": SCALED, "Mistral4ForCausalLM": SCALED, "mistral4": SCALED,
}  # fmt: skip
# The routers that a network has, as released and in transformers, which does not look at these fields of V3.
ROUTERS: dict[str, dict[str, tuple[Any, ...]]] = {
    "v3": {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    "v2": {"scoring_func": ("softmax",), "topk_method": ("greedy", "group_limited_greedy")},
}
# Fields that change the arithmetic: the only value implemented, which is also what a file without the field means ...
FIXED = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "moe_layer_freq": 1, "rope_interleave": True,
    "partial_rotary_factor": 1,
}  # fmt: skip
# ... and fields that ask, unless empty, for another network under a familiar name.
FOREIGN = {
    "index_topk": SPARSE, "hc_mult": HYPER, "llama_4_scaling": SCALED, "linear_attn_config": "it has linear attention",
    "sliding_window": "its attention has a window", "swiglu_limit": "its activations are clipped",
}  # fmt: skip


def is_hugging_face(raw: dict[str, Any]) -> bool:
    """Whether a config is Hugging Face's, not in the style of the original repository."""
    return "model_type" in raw or "architectures" in raw


def hf_prefix(raw: dict[str, Any]) -> str:
    """What stands before the text model's tensor names in the files: "language_model." where the config is that of a
    multimodal model, otherwise nothing."""
    return "language_model." if _is_multimodal(raw) else ""


def text_config(raw: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The text model's config, and what stands before its fields' names in messages. How the weights are stored may
    be said outside of it."""
    if not _is_multimodal(raw):
        return raw, ""
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise UserError(f"config: text_config is {text!r}, expected an object")
    for name in ("quantization_config", "tie_word_embeddings"):
        if name in text and raw.get(name, text[name]) != text[name]:
            raise UserError(f"config: {name} and text_config.{name} differ; make them equal")
    outer: dict[str, Any] = {name: raw[name] for name in ("quantization_config", "torch_dtype", "dtype") if name in raw}
    return outer | text, "text_config."


def _is_multimodal(raw: dict[str, Any]) -> bool:
    return any(name in MULTIMODAL for name in (*_architectures(raw), raw.get("model_type")))


def _architectures(raw: dict[str, Any]) -> list[Any]:
    names = raw.get("architectures") or []
    return names if isinstance(names, list) else [names]


def family(raw: dict[str, Any]) -> tuple[str, list[str]]:
    """The class that computes a text model, a key of ARCHITECTURES, and warnings.

    `architectures` decides, as in vLLM; without it `model_type` does, as in transformers. Raises UserError, which says
    what differs, for a class or a model type of another network, for two that contradict each other, and for a field
    that asks for another network.
    """
    model_type, names = raw.get("model_type"), _architectures(raw)
    for field, value in (*(("architecture", name) for name in names), ("model_type", model_type)):
        if value in DIFFERENT:
            raise UserError(f"config: {field} {value!r} is not supported: {DIFFERENT[value]}")
    if unknown := [name for name in names if name not in ARCHITECTURES]:
        known = _join((*ARCHITECTURES, MULTIMODAL[0]))
        raise UserError(f"config: architecture {unknown[0]!r} is not supported (known: {known})")
    meant = MODEL_TYPES.get(model_type) if isinstance(model_type, str) else None
    name = names[0] if names else meant
    if name is None:
        raise UserError(f"config: model_type {model_type!r} is not supported (known: {_join(MODEL_TYPES)})")
    warnings: list[str] = []
    if meant is None and model_type is not None:
        warnings.append(f"config: model_type {model_type!r} is unknown; computed as {name}, its architecture")
    elif meant is not None and ARCHITECTURES[meant] != ARCHITECTURES[name]:
        raise UserError(f"config: architecture {name!r} and model_type {model_type!r} are different networks")
    for field, routers in ROUTERS[ARCHITECTURES[name]].items():
        if raw.get(field) not in (None, *routers):
            raise UserError(f"config: {field} {raw[field]!r} is not supported with {name} (known: {_join(routers)})")
    for field, wanted in FIXED.items():
        if raw.get(field) not in (None, wanted):
            raise UserError(f"config: {field} {raw[field]!r} is not supported (known: {wanted!r})")
    for field, why in FOREIGN.items():
        if raw.get(field):
            raise UserError(f"config: {field} {raw[field]!r} is not supported: {why}")
    return name, warnings


def dense_layers(raw: dict[str, Any], architecture: str) -> int:
    """How many layers, the first ones, have a dense MLP: `first_k_dense_replace`, or as transformers 5 lists them
    `mlp_layer_types`. Raises UserError where they differ or a dense layer comes later, KeyError where both are absent.
    """
    first, types = raw.get("first_k_dense_replace"), raw.get("mlp_layer_types")
    if types is None:
        if first is None and architecture == "Glm4MoeLiteForCausalLM":
            return 1  # what this class means by neither
        return raw["first_k_dense_replace"]
    n = types.index("sparse") if "sparse" in types else len(types)
    if types != ["dense"] * n + ["sparse"] * (raw["num_hidden_layers"] - n):
        wanted = f"{raw['num_hidden_layers']} times 'dense' or 'sparse', dense ones first"
        raise UserError(f"config: mlp_layer_types is {types!r}, expected {wanted}")
    if first not in (None, n):
        raise UserError(f"config: first_k_dense_replace is {first!r}, but mlp_layer_types has {n} dense layers first")
    return n


def mtp_layers(raw: dict[str, Any]) -> Any:
    """How many MTP modules the config names, by the releases' name or transformers 5's. JoyAI-LLM-Flash's has a dense
    MLP, which the MTP module here has not: it counts as none."""
    names = [name for name in ("num_nextn_predict_layers", "num_mtp_layers") if raw.get(name) is not None]
    if len({raw[name] for name in names}) > 1:
        raise UserError(f"config: {' and '.join(names)} differ; remove one")
    return 0 if raw.get("model_type") == "joyai_llm_flash" else raw[names[0]] if names else 0


# --------------------------------------------------------------------------------------------------------------------
# Rotary embedding
# --------------------------------------------------------------------------------------------------------------------

SPELLINGS = ("rope_scaling", "rope_parameters")  # the released files', transformers 5's
DEFAULT_THETA = 10000.0  # what transformers takes for a spelling that has none
YARN = {  # each number's field in ModelArgs, and what the released code takes where the file has none
    "factor": ("rope_factor", None), "original_max_position_embeddings": ("original_seq_len", None),
    "beta_fast": ("beta_fast", 32.0), "beta_slow": ("beta_slow", 1.0), "mscale": ("mscale", 1.0),
    "mscale_all_dim": ("mscale_all_dim", 0.0),
}  # fmt: skip
OTHER = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "attention_factor", "truncate"}


class Rope(NamedTuple):
    facts: dict[str, Any]  # fields of ModelArgs
    names: dict[str, str]  # their names in the file
    warnings: list[str]


def rope(raw: dict[str, Any]) -> Rope:
    """rope_theta and YaRN, from every spelling that the file has.

    Raises UserError for a kind or a field that is not implemented, for a `default` type beside numbers of YaRN, and for
    two spellings that mean different things: transformers obeys `rope_scaling`, others `rope_parameters`.
    """
    given = {where: raw[where] for where in SPELLINGS if raw.get(where)}
    outer = raw.get("rope_theta")
    thetas = [outer, *(spelling.get("rope_theta") for spelling in given.values() if isinstance(spelling, dict))]
    if all(theta is None for theta in thetas):
        raise UserError("config: rope_theta is missing")
    found = {where: _resolve(where, spelling, outer) for where, spelling in given.items()}
    if len(found) == 2:
        first, second = found.values()
        keys = ["type"] if first["type"] != second["type"] else [key for key in first if first[key] != second[key]]
        if keys:
            said = ", ".join(f"{key} {first[key]!r} against {second[key]!r}" for key in keys)
            raise UserError(f"config: {' and '.join(found)} differ ({said}); make them equal or remove one")
    if not found:
        found[""] = {"type": "default", "rope_theta": _number("rope_theta", outer)}
    where, resolved = next(iter(found.items()))
    length = raw.get("original_max_position_embeddings")  # transformers prefers it to that of the rope
    if length not in (None, resolved.get("original_max_position_embeddings", length)):
        text = f"config: original_max_position_embeddings is {length!r}, but {where} has another; make them equal"
        raise UserError(text)
    names = {ours: f"{where or SPELLINGS[0]}.{name}" for name, (ours, _) in YARN.items()}
    facts = {"rope_theta": resolved["rope_theta"]}
    facts |= {ours: resolved[name] for name, (ours, _) in YARN.items() if name in resolved}
    return Rope(facts, names, _doubts(where, given.get(where, {}), resolved))


def _resolve(where: str, rope: Any, outer: Any) -> dict[str, Any]:
    """The type, theta and, of YaRN, every number that one spelling stands for. `outer` is the theta beside it."""
    if not isinstance(rope, dict):
        raise UserError(f"config: {where} is {rope!r}, expected an object")
    given = {name: value for name, value in rope.items() if value is not None}
    kinds = {given[name] for name in ("type", "rope_type") if name in given} or {"default"}
    if len(kinds) > 1:
        raise UserError(f"config: {where}.type is {given['type']!r}, but {where}.rope_type is {given['rope_type']!r}")
    (kind,) = kinds
    if kind not in ("yarn", "default"):
        name = "rope_type" if "rope_type" in given else "type"
        raise UserError(f"config: {where}.{name} {kind!r} is not supported (known: yarn, default)")
    numbers = [name for name in given if name in YARN or name in ("attention_factor", "truncate")]
    if kind == "default" and numbers:
        said = "has no type" if "type" not in given and "rope_type" not in given else "has the type 'default'"
        wanted = "give it the type 'yarn' or remove these"
        raise UserError(f"config: {where} {said}, but {_join(numbers)} of YaRN: {wanted}")
    inner = given.get("rope_theta")
    if outer is not None and inner is not None and outer != inner:
        raise UserError(f"config: rope_theta is {outer!r}, but {where}.rope_theta is {inner!r}")
    theta = DEFAULT_THETA if outer is None and inner is None else outer if inner is None else inner
    resolved: dict[str, Any] = {"type": kind}
    resolved["rope_theta"] = _number("rope_theta" if inner is None else f"{where}.rope_theta", theta)
    for name in given:
        if name not in YARN and name not in OTHER:
            raise UserError(f"config: {where}.{name} is not supported")
    if given.get("partial_rotary_factor", 1) != 1 or "attention_factor" in given or given.get("truncate") is False:
        text = "partial_rotary_factor other than 1, attention_factor and truncate=false are not supported"
        raise UserError(f"config: {where}: {text}")
    if kind == "default":
        return resolved
    for name, (_, default) in YARN.items():
        if (value := given.get(name, default)) is None:
            raise UserError(f"config: {where}.{name} is missing")
        resolved[name] = value if name == "original_max_position_embeddings" else _number(f"{where}.{name}", value)
    return resolved


def _doubts(where: str, rope: dict[str, Any], resolved: dict[str, Any]) -> list[str]:
    """What engines read differently: one of the two mscales alone, or 0."""
    if resolved["type"] != "yarn":
        return []
    given = {name: rope[name] for name in ("mscale", "mscale_all_dim") if rope.get(name) is not None}
    if len(given) == 1:
        missing = "mscale" if "mscale_all_dim" in given else "mscale_all_dim"
        said = f"{missing} is missing and counts as {YARN[missing][1]:g}"
    elif 0 in given.values():
        said = f"{next(name for name, value in given.items() if value == 0)} is 0 and scales nothing"
    else:
        return []
    text = f"config: {where}.{said}, as in the released code; other engines may scale otherwise"
    return [f"{text} (every release has mscale and mscale_all_dim, and equal)"]


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float):
        raise UserError(f"config: {name} is {value!r}, expected a number")
    return float(value)


def _join(names: Any) -> str:
    return ", ".join(str(n) for n in names)
