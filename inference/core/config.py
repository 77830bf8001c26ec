"""`ModelArgs`: a model's architecture, read from a Hugging Face config.json or from the original repository's JSON.

Every fact that changes the network's arithmetic is a field here and comes from the file. A value this engine does
not implement is refused by name: a silent default would be a silent loss of quality.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from core.errors import CheckpointError, UserError
from core.files import read_json

PROGRAM_VERSION = "0.1.0"
BLOCK_SIZE = 128  # FP8 scales: one per 1x128 activations and per 128x128 weights (technical report, section 3.3.2)
MODEL_TYPES = ("deepseek_v3", "deepseek_v2", "kimi_k2")
SCORE_FUNCS = ("sigmoid", "softmax")
TOPK_METHODS = ("noaux_tc", "group_limited_greedy", "greedy")
MAX_LAYERS, MAX_EXPERTS = 1000, 1 << 17  # in all layers together; V3 has 15,104: more is a damaged number


@dataclass(frozen=True)
class ModelArgs:
    """The architecture of one model. Names are the original repository's (upstream's); comments give Hugging Face's
    where they differ. Raises UserError for a value out of range."""

    vocab_size: int
    dim: int  # hidden_size
    inter_dim: int  # intermediate_size
    moe_inter_dim: int  # moe_intermediate_size
    n_layers: int  # num_hidden_layers
    n_dense_layers: int  # first_k_dense_replace
    n_heads: int  # num_attention_heads
    # mixture of experts
    n_routed_experts: int
    n_shared_experts: int
    n_activated_experts: int  # num_experts_per_tok
    n_expert_groups: int = 1  # n_group
    n_limited_groups: int = 1  # topk_group
    score_func: Literal["sigmoid", "softmax"] = "softmax"  # scoring_func
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "greedy"
    norm_topk_prob: bool = False
    gate_bias: bool = False  # e_score_correction_bias exists iff topk_method is noaux_tc
    route_scale: float = 1.0  # routed_scaling_factor
    # multi-head latent attention
    q_lora_rank: int = 0  # null in the file: queries come from one projection `wq`
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    # rotary embedding; YaRN applies iff rope_factor > 1
    rope_theta: float = 10000.0
    rope_factor: float = 1.0
    original_seq_len: int = 4096  # rope_scaling.original_max_position_embeddings
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    max_seq_len: int = 163840  # max_position_embeddings: what positions the model was made for
    # the rest
    norm_eps: float = 1e-6  # rms_norm_eps; the two inner norms of MLA always use 1e-6
    tie_word_embeddings: bool = False
    n_mtp_layers: int = 0  # num_nextn_predict_layers
    dtype: Literal["fp8", "bf16", "fp32"] = "bf16"  # how the weights are stored
    scale_fmt: Literal["ue8m0"] | None = None  # activation scales rounded up to powers of two (V3.1)
    block_size: int = BLOCK_SIZE

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is int:
                self._require(type(value) is int and 0 <= value < 1 << 31, f.name, "a whole number below 2^31")
            elif f.type is float:
                self._require(type(value) in (int, float) and math.isfinite(value), f.name, "a number")
            elif f.type is bool:
                self._require(type(value) is bool, f.name, "true or false")
        self._choice("score_func", SCORE_FUNCS)
        self._choice("topk_method", TOPK_METHODS)
        self._choice("dtype", ("fp8", "bf16", "fp32"))
        self._choice("scale_fmt", (None, "ue8m0"))
        for name in ("vocab_size", "dim", "inter_dim", "n_layers", "n_heads", "kv_lora_rank", "qk_nope_head_dim",
                     "qk_rope_head_dim", "v_head_dim", "max_seq_len", "original_seq_len"):  # fmt: skip
            self._require(getattr(self, name) > 0, name, "a positive integer")
        self._require(self.n_layers <= MAX_LAYERS, "n_layers", f"at most {MAX_LAYERS}")
        self._require(self.n_layers * self.n_routed_experts <= MAX_EXPERTS, "n_routed_experts",
                      f"at most {MAX_EXPERTS // self.n_layers} in each of {self.n_layers} layers")  # fmt: skip
        self._require(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "an even number")
        self._require(0 <= self.n_dense_layers <= self.n_layers, "n_dense_layers", f"from 0 to {self.n_layers}")
        self._require(self.n_mtp_layers in (0, 1), "n_mtp_layers", "0 or 1")
        self._require(self.block_size == BLOCK_SIZE, "block_size", str(BLOCK_SIZE))
        self._require(self.rope_factor >= 1, "rope_factor", "at least 1")
        for name in ("rope_theta", "norm_eps", "route_scale", "beta_fast", "beta_slow", "mscale"):
            self._require(getattr(self, name) > 0, name, "a positive number")
        self._require(self.mscale_all_dim >= 0, "mscale_all_dim", "0 or a positive number")
        if self.n_moe_layers:
            self._require(self.moe_inter_dim > 0, "moe_inter_dim", "a positive integer")
            self._require(self.n_routed_experts > 0, "n_routed_experts", "a positive integer")
            self._require(self.n_expert_groups > 0 and self.n_routed_experts % self.n_expert_groups == 0,
                          "n_expert_groups", f"a divisor of {self.n_routed_experts} experts")  # fmt: skip
            self._require(0 < self.n_limited_groups <= self.n_expert_groups, "n_limited_groups",
                          f"from 1 to {self.n_expert_groups}")  # fmt: skip
            kept = self.n_routed_experts // self.n_expert_groups * self.n_limited_groups
            if self.topk_method == "greedy":
                kept = self.n_routed_experts
            self._require(0 < self.n_activated_experts <= kept, "n_activated_experts", f"from 1 to {kept}")
            self._require(self.gate_bias == (self.topk_method == "noaux_tc"), "gate_bias",
                          f"{self.topk_method == 'noaux_tc'} where topk_method is {self.topk_method}")  # fmt: skip
            if self.topk_method == "noaux_tc":
                self._require(self.score_func == "sigmoid", "score_func", "sigmoid where topk_method is noaux_tc")
                self._require(self.n_expert_groups == 1 or self.n_routed_experts // self.n_expert_groups >= 2,
                              "n_expert_groups", "one that leaves two experts a group")  # fmt: skip

    def _choice(self, name: str, known: tuple) -> None:
        if getattr(self, name) not in known:
            raise UserError(f"config: {name} {getattr(self, name)!r} is not supported (known: {_join(known)})")

    def _require(self, ok: bool, name: str, wanted: str) -> None:
        if not ok:
            raise UserError(f"config: {name} is {getattr(self, name)!r}, expected {wanted}")

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values cached per token and layer: compressed key/value and shared rotary key (arXiv 2405.04434, 2.1)."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def n_moe_layers(self) -> int:
        return self.n_layers - self.n_dense_layers

    @property
    def softmax_scale(self) -> float:
        """1/sqrt(head dim), times YaRN's squared temperature (YaRN, section 3.4)."""
        return self.qk_head_dim**-0.5 * _mscale(self.rope_factor, self.mscale_all_dim) ** 2

    @property
    def rope_multiplier(self) -> float:
        """The factor of cos and sin: 1 in every release, where mscale equals mscale_all_dim."""
        return _mscale(self.rope_factor, self.mscale) / _mscale(self.rope_factor, self.mscale_all_dim)

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "ModelArgs":
        """Reads a Hugging Face config.json, as released or as transformers 5 rewrites it (`rope_parameters`).

        Raises UserError for an architecture, activation, rotary embedding, router or quantisation not implemented.
        """
        model_type = raw.get("model_type")
        if model_type not in MODEL_TYPES:
            raise UserError(f"config: model_type {model_type!r} is not supported (known: {_join(MODEL_TYPES)})")
        v2 = model_type == "deepseek_v2"
        for name, wanted, default in (("hidden_act", "silu", "silu"), ("attention_bias", False, False),
                                      ("moe_layer_freq", 1, 1), ("rope_interleave", True, True)):  # fmt: skip
            if raw.get(name, default) != wanted:
                raise UserError(f"config: {name} {raw[name]!r} is not supported (known: {wanted!r})")
        topk_method: Any = raw.get("topk_method") or ("greedy" if v2 else "noaux_tc")
        try:
            facts: dict[str, Any] = {
                ours: raw[theirs]
                for ours, theirs in {
                    "vocab_size": "vocab_size", "dim": "hidden_size", "inter_dim": "intermediate_size",
                    "moe_inter_dim": "moe_intermediate_size", "n_layers": "num_hidden_layers",
                    "n_dense_layers": "first_k_dense_replace", "n_heads": "num_attention_heads",
                    "n_activated_experts": "num_experts_per_tok", "route_scale": "routed_scaling_factor",
                    "kv_lora_rank": "kv_lora_rank", "qk_nope_head_dim": "qk_nope_head_dim",
                    "qk_rope_head_dim": "qk_rope_head_dim", "v_head_dim": "v_head_dim",
                    "max_seq_len": "max_position_embeddings", "norm_eps": "rms_norm_eps",
                }.items()
            }  # fmt: skip
            # transformers 5 writes the number of experts under a second name too
            facts["n_routed_experts"] = raw["n_routed_experts" if "n_routed_experts" in raw else "num_local_experts"]
        except KeyError as e:
            raise UserError(f"config: {e.args[0]} is missing") from None
        return cls(
            **facts,
            **_hf_rope(raw),
            **_hf_storage(raw),
            n_shared_experts=raw.get("n_shared_experts") or 0,
            n_expert_groups=1 if raw.get("n_group") is None else raw["n_group"],
            n_limited_groups=1 if raw.get("topk_group") is None else raw["topk_group"],
            score_func=raw.get("scoring_func") or ("softmax" if v2 else "sigmoid"),
            topk_method=topk_method,
            # the released V2 code neither normalises nor biases; transformers' V2 class has no such option either
            norm_topk_prob=raw.get("norm_topk_prob", not v2),
            gate_bias=topk_method == "noaux_tc",
            q_lora_rank=raw.get("q_lora_rank") or 0,
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            n_mtp_layers=raw.get("num_nextn_predict_layers") or 0,
        )

    @classmethod
    def from_upstream(cls, raw: dict[str, Any]) -> "ModelArgs":
        """Reads upstream-style JSON. What such a file leaves out is derived as the released models have it:
        a biased, normalised noaux_tc router iff the scores are sigmoid; YaRN 40 over 4096 with theta 1e4; eps 1e-6.

        Raises UserError for an unknown field (a misspelt one would otherwise be ignored) or a missing one.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(raw) - known - {"max_batch_size"})
        if unknown:
            raise UserError(f"config: unknown field{'s' * (len(unknown) > 1)} {_join(unknown)}")
        facts = {k: v for k, v in raw.items() if k in known}
        facts.setdefault("score_func", "softmax")
        facts.setdefault("n_expert_groups", 1)
        sigmoid = facts["score_func"] == "sigmoid"
        grouped = "group_limited_greedy" if facts["n_expert_groups"] > 1 else "greedy"
        facts.setdefault("topk_method", "noaux_tc" if sigmoid else grouped)
        facts.setdefault("gate_bias", facts["topk_method"] == "noaux_tc")
        facts.setdefault("norm_topk_prob", sigmoid)
        facts.setdefault("rope_factor", 40.0)
        facts.setdefault("mscale_all_dim", facts.get("mscale", 1.0))  # upstream's one mscale scales the softmax
        facts["q_lora_rank"] = facts.get("q_lora_rank") or 0
        try:
            return cls(**facts)
        except TypeError:
            needed = {f.name for f in fields(cls)} - set(facts)
            missing = sorted(n for n in needed if n in cls.__match_args__[:10])
            raise UserError(f"config: {_join(missing)} missing") from None


def parse(raw: dict[str, Any]) -> ModelArgs:
    """Reads a config of either style: a Hugging Face config has a `model_type`. Raises UserError."""
    try:
        return ModelArgs.from_hf(raw) if "model_type" in raw or "architectures" in raw else ModelArgs.from_upstream(raw)
    except (TypeError, ValueError, AttributeError, OverflowError) as e:  # a string where a number or an object belongs
        raise UserError(f"config: a field has the wrong type ({e})") from None


def load_config(path: str | Path) -> ModelArgs:
    """Reads a config file of either style. Raises CheckpointError that begins with the file's name."""
    raw = read_json(Path(path))
    try:
        return parse(raw)
    except UserError as e:
        raise CheckpointError(f"{path}: {e}", path) from None


def check_agreement(path: str | Path, checkpoint: ModelArgs) -> None:
    """Raises UserError, which names the fields, if a `--config` file contradicts the checkpoint's own config.

    Only what the file says explicitly is compared, so a short upstream-style JSON agrees with a full one. How the
    weights are stored, the MTP layer's presence and the context limit are the checkpoint's business.
    """
    raw, given = read_json(Path(path)), load_config(path)
    explicit = {f.name for f in fields(ModelArgs)} if "model_type" in raw else set(raw)
    free = {"dtype", "n_mtp_layers", "max_seq_len", "max_batch_size"}
    if "mscale" in explicit and "mscale_all_dim" not in explicit:
        explicit = (explicit - {"mscale"}) | {"mscale_all_dim"}
    different = [
        f"{name} is {getattr(given, name)!r} but the checkpoint says {getattr(checkpoint, name)!r}"
        for name in sorted(explicit - free)
        if getattr(given, name) != getattr(checkpoint, name)
    ]
    if different:
        raise UserError(f"{path} does not describe this checkpoint: {'; '.join(different)}")


def _hf_rope(raw: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and YaRN, from the released `rope_scaling` or from transformers 5's `rope_parameters`."""
    where = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    rope = raw.get(where) or {}
    if not isinstance(rope, dict):
        raise UserError(f"config: {where} is {rope!r}, expected an object")

    def number(name: str, default: float) -> float:
        return _number(f"{where}.{name}", default if rope.get(name) is None else rope[name])

    outer, inner = raw.get("rope_theta"), rope.get("rope_theta")
    if outer is None and inner is None:
        raise UserError("config: rope_theta is missing")
    if outer is not None and inner is not None and outer != inner:
        raise UserError(f"config: rope_theta is {outer!r}, but {where}.rope_theta is {inner!r}")
    theta = _number("rope_theta", outer) if inner is None else number("rope_theta", inner)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "yarn":
        raise UserError(f"config: rope type {kind!r} is not supported (known: yarn, default)")
    for name in ("factor", "original_max_position_embeddings"):
        if rope.get(name) is None:
            raise UserError(f"config: {where}.{name} is missing")
    if rope.get("attention_factor") is not None or rope.get("truncate") is False:
        raise UserError(f"config: {where}.attention_factor and truncate=false are not supported")
    return {
        "rope_theta": theta,
        "rope_factor": number("factor", 1.0),
        "original_seq_len": rope["original_max_position_embeddings"],
        "beta_fast": number("beta_fast", 32.0),
        "beta_slow": number("beta_slow", 1.0),
        "mscale": number("mscale", 1.0),
        "mscale_all_dim": number("mscale_all_dim", 0.0),
    }


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float):
        raise UserError(f"config: {name} is {value!r}, expected a number")
    return float(value)


def _hf_storage(raw: dict[str, Any]) -> dict[str, Any]:
    """How the weights are stored, from `quantization_config` or the checkpoint's dtype."""
    quant = raw.get("quantization_config")
    if quant and not isinstance(quant, dict):
        raise UserError(f"config: quantization_config is {quant!r}, expected an object")
    if not quant:
        name = raw.get("torch_dtype") or raw.get("dtype") or "bfloat16"
        if name not in ("bfloat16", "float32"):
            raise UserError(f"config: weights in {name!r} are not supported (known: bfloat16, float32, or fp8 blocks)")
        return {"dtype": "fp32" if name == "float32" else "bf16"}
    wanted = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
              "weight_block_size": [BLOCK_SIZE, BLOCK_SIZE]}  # fmt: skip
    for name, value in wanted.items():
        if quant.get(name, value) != value or (name == "quant_method" and name not in quant):
            found = f"quantization_config.{name} {quant.get(name)!r}"
            raise UserError(f"config: {found} is not supported (known: {value!r})")
    return {"dtype": "fp8", "scale_fmt": quant.get("scale_fmt")}


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _join(names: Any) -> str:
    return ", ".join(str(n) for n in names)
