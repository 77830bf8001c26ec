"""`ModelArgs`: a model's architecture, read from a Hugging Face config.json or from the original repository's JSON.

Every fact that changes the network's arithmetic is a field here and comes from the file. A value this engine does
not implement is refused by name: a silent default would be a silent loss of quality.
"""

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from core import hf_config
from core.errors import CheckpointError, UserError
from core.files import read_json
from core.hf_config import hf_prefix as hf_prefix
from core.quantization_config import BLOCK_SIZE as BLOCK_SIZE
from core.quantization_config import GROUP_SIZES, quantisation

SCORE_FUNCS = ("sigmoid", "softmax")
TOPK_METHODS = ("noaux_tc", "group_limited_greedy", "greedy")
MAX_LAYERS, MAX_EXPERTS = 1000, 1 << 17  # in all layers together; V3 has 15,104: more is a damaged number
HF_NAMES = {  # ModelArgs' fields that Hugging Face names otherwise; those of the rotary embedding depend on the file
    "dim": "hidden_size", "inter_dim": "intermediate_size", "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers", "n_dense_layers": "first_k_dense_replace", "n_heads": "num_attention_heads",
    "n_activated_experts": "num_experts_per_tok", "n_expert_groups": "n_group", "n_limited_groups": "topk_group",
    "score_func": "scoring_func", "route_scale": "routed_scaling_factor", "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps", "n_mtp_layers": "num_nextn_predict_layers", "dtype": "torch_dtype",
    "scale_fmt": "quantization_config.scale_fmt", "group_size": "quantization_config.group_size",
}  # fmt: skip


class FieldError(UserError):
    """A value that a field of ModelArgs cannot have."""

    def __init__(self, name: str, says: str, names: dict[str, str] | None = None):
        """`says` goes on from the field's name, which is what the file calls it if `names` is its spelling."""
        super().__init__(f"config: {(names or {}).get(name, name)} {says}")
        self.name, self.says = name, says


@dataclass(frozen=True)
class ModelArgs:
    """The architecture of one model. Names are the original repository's (upstream's); comments give Hugging Face's
    where they differ. Raises FieldError for a value out of range."""

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
    # how the weights are stored; the files know better
    dtype: Literal["fp8", "int8", "int4", "bf16", "fp32", "fp16"] = "bf16"
    scale_fmt: Literal["ue8m0"] | None = None  # activation scales rounded up to powers of two (V3.1)
    block_size: int = BLOCK_SIZE
    group_size: int = 0  # of int8 and int4: a row's channels that share a scale; 0: square blocks of block_size
    zero_points: bool = False  # of int4: each group has a zero point
    # what a user should know of the file that this was read from; a program prints them once
    warnings: tuple[str, ...] = field(default=(), repr=False, compare=False)
    # what that file calls each field; empty: as here
    names: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

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
        self._choice("dtype", ("fp8", "int8", "int4", "bf16", "fp32", "fp16"))
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
        groups = GROUP_SIZES if self.dtype == "int4" else (0, *GROUP_SIZES)
        self._require(self.group_size in groups, "group_size", f"one of {_join(groups)} where dtype is {self.dtype}")
        self._require(self.rope_factor >= 1, "rope_factor", "at least 1")
        self._require(self.rope_theta > 1, "rope_theta", "a number above 1")
        for name in ("norm_eps", "route_scale", "beta_fast", "beta_slow"):
            self._require(getattr(self, name) > 0, name, "a positive number")
        self._require(self.beta_fast >= self.beta_slow, "beta_fast", f"at least beta_slow, {self.beta_slow!r}")
        for name in ("mscale", "mscale_all_dim"):
            self._require(getattr(self, name) >= 0, name, "0 or a positive number")
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
            raise FieldError(name, f"{getattr(self, name)!r} is not supported (known: {_join(known)})")

    def _require(self, ok: bool, name: str, wanted: str) -> None:
        if not ok:
            raise FieldError(name, f"is {getattr(self, name)!r}, expected {wanted}")

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values cached per token and layer: compressed key/value and shared rotary key (arXiv 2405.04434, 2.1)."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def is_quantised(self) -> bool:
        return self.dtype in ("fp8", "int8", "int4")

    @property
    def weight_block(self) -> tuple[int, int]:
        """The rows and channels of a quantised weight that share a scale."""
        return (1, self.group_size) if self.group_size else (self.block_size, self.block_size)

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
        """Reads a Hugging Face config.json, as released or as transformers 5 rewrites it (`rope_parameters`); of a
        multimodal model's the text model.

        Raises UserError, by the file's own names, for an architecture, activation, rotary embedding, router or
        quantisation not implemented, and where the file can be read in two ways.
        """
        raw, prefix = hf_config.text_config(raw)
        architecture, warnings = hf_config.family(raw)
        v2 = hf_config.ARCHITECTURES[architecture] == "v2"
        rope = hf_config.rope(raw)
        names = {ours: prefix + theirs for ours, theirs in (hf_names() | rope.names).items()}
        topk_method: Any = raw.get("topk_method") or ("greedy" if v2 else "noaux_tc")
        if v2 and raw.get("norm_topk_prob"):
            # and we would do both, as V3 does
            differ = "the released code leaves routed_scaling_factor out then, transformers does not normalise"
            wanted = "set it to false, as every release of V2 has it, if the model was trained so"
            raise FieldError("norm_topk_prob", f"true is not supported with a V2 model ({differ}); {wanted}", names)
        try:
            facts: dict[str, Any] = {
                ours: raw[names[ours].removeprefix(prefix)]
                for ours in (
                    "vocab_size", "dim", "inter_dim", "moe_inter_dim", "n_layers", "n_heads", "n_activated_experts",
                    "route_scale", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_seq_len",
                    "norm_eps",
                )
            }  # fmt: skip
            # transformers 5 writes the number of experts under a second name too
            facts["n_routed_experts"] = raw["n_routed_experts" if "n_routed_experts" in raw else "num_local_experts"]
            facts["n_dense_layers"] = hf_config.dense_layers(raw, architecture)
            if architecture == "DeepseekV3ForCausalLM" or topk_method == "group_limited_greedy":
                # without these transformers takes 8 groups, of which 4 are kept, and vLLM takes one
                _ = raw["n_group"], raw["topk_group"]
        except KeyError as e:
            raise UserError(f"config: {prefix}{e.args[0]} is missing") from None
        try:
            return cls(
                **facts,
                **rope.facts,
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
                n_mtp_layers=hf_config.mtp_layers(raw),
                warnings=(*warnings, *rope.warnings),
                names=names,
            )
        except FieldError as e:
            raise FieldError(e.name, e.says, names) from None

    @classmethod
    def from_upstream(cls, raw: dict[str, Any]) -> "ModelArgs":
        """Reads upstream-style JSON. What such a file leaves out is derived as the released models have it:
        a biased, normalised noaux_tc router iff the scores are sigmoid; YaRN 40 over 4096 with theta 1e4; eps 1e-6.

        Raises UserError for an unknown field (a misspelt one would otherwise be ignored) or a missing one.
        """
        known = {f.name for f in fields(cls) if f.compare}
        unknown = sorted(set(raw) - known - {"max_batch_size"})
        if "llama_4_scaling" in raw:
            raise UserError(f"config: llama_4_scaling is not supported: {hf_config.SCALED}")
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


def hf_names() -> dict[str, str]:
    """Hugging Face's name of every field of ModelArgs."""
    return {f.name: HF_NAMES.get(f.name, f.name) for f in fields(ModelArgs)}


def parse(raw: dict[str, Any]) -> ModelArgs:
    """Reads a config of either style. Raises UserError."""
    if "_class_name" in raw:
        raise UserError(f"config: of {raw['_class_name']!r}, a part of a diffusers pipeline, not of a language model")
    try:
        return ModelArgs.from_hf(raw) if hf_config.is_hugging_face(raw) else ModelArgs.from_upstream(raw)
    except (TypeError, ValueError, AttributeError, OverflowError) as e:  # a string where a number or an object belongs
        raise UserError(f"config: a field has the wrong type ({e})") from None


def load_config(path: str | Path) -> ModelArgs:
    """Reads a config file of either style. Raises CheckpointError that begins with the file's name, as its `warnings`
    do."""
    raw = read_json(Path(path))
    try:
        args = parse(raw)
        return replace(args, warnings=tuple(f"{path}: {warning}" for warning in args.warnings))
    except UserError as e:
        raise CheckpointError(f"{path}: {e}", path) from None


def check_agreement(path: str | Path, checkpoint: ModelArgs) -> None:
    """Raises UserError, which names the fields as the file does, if a `--config` file contradicts the checkpoint's own.

    Only what the file says explicitly is compared, so a short upstream-style JSON agrees with a full one. How the
    weights are stored, the MTP layer's presence and the context limit are the checkpoint's business.
    """
    raw, given = read_json(Path(path)), load_config(path)
    explicit = {f.name for f in fields(ModelArgs) if f.compare} if given.names else set(raw)
    free = {"dtype", "group_size", "zero_points", "n_mtp_layers", "max_seq_len", "max_batch_size"}
    if "mscale" in explicit and "mscale_all_dim" not in explicit:
        explicit = (explicit - {"mscale"}) | {"mscale_all_dim"}
    both = {name: (getattr(given, name), getattr(checkpoint, name)) for name in sorted(explicit - free)}
    different = [
        f"{given.names.get(name, name)} is {said!r} but the checkpoint says {held!r}"
        for name, (said, held) in both.items()
        if said != held
    ]
    if different:
        raise UserError(f"{path} does not describe this checkpoint: {'; '.join(different)}")


def _hf_storage(raw: dict[str, Any]) -> dict[str, Any]:
    """How the weights are stored, from `quantization_config` or the checkpoint's dtype."""
    if found := quantisation(raw):
        names = ("dtype", "scale_fmt", "group_size", "zero_points")
        return {name: value for name, value in found._asdict().items() if name in names}
    name = raw.get("torch_dtype") or raw.get("dtype") or "bfloat16"
    dtypes = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}
    if name not in dtypes:
        raise UserError(f"config: weights in {name!r} are not supported (known: {_join(dtypes)}, or fp8 blocks)")
    return {"dtype": dtypes[name]}


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _join(names: Any) -> str:
    return ", ".join(str(n) for n in names)
