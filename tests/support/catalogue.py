"""Checkpoints in the form people meet them, and what every program must do with each: load it, or refuse it by name.

    python tests/support/catalogue.py              # lists them
    python tests/support/catalogue.py NAME DIR     # makes one, for trying another loader

They are small: two layers, eight experts, 320 tokens. What transformers makes is made by transformers here too. The
table in docs/checkpoints.md is `table()`.
"""

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from math import log
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("inference", "tests")]
from support.checkpoints import dequantise, fp8_sizes, make_checkpoint
from support.damaged_checkpoints import HF_INDEX, add, drop, edit, edit_json, files, reindex, whole
from support.families import FAMILIES, V3
from support.packed_checkpoints import LAYOUTS, make_packed
from support.tiny_tokenizer import BOS, EOS, TEMPLATE, VOCAB_SIZE, write_tokenizer

ALL = ("generate", "server", "convert", "cast", "check", "plan")
TEXT = ("generate", "server", "check")  # converters copy tokenizers and templates as they are; a plan needs none
CHAT = ("generate",)  # a server answers /v1/completions without a chat template, and check_checkpoint warns

Make = Callable[[Path, "Bases"], Any]


class Entry(NamedTuple):
    group: str  # the heading in the document
    met: str  # where people meet it
    make: Make  # writes it to a folder; returns the path to give to the programs, if that is another
    # Loads, with the logits of transformers' model of: "" the same files; "plain" their float32 form; a base of that
    # name; or the same files after a change.
    equals: str | Callable[[Path], Any] | None = None
    refused: tuple[str, ...] = ()  # what every refusal must say
    by: tuple[str, ...] = ALL  # who refuses
    warns: tuple[str, ...] = ()  # what is said while it loads; nothing else may be
    noted: tuple[str, ...] = ()  # what check_checkpoint.py warns of besides
    mtp: bool = False  # it has an MTP module that drafts
    text: tuple[int | None, tuple[int, ...], list[int]] | None = None  # BOS, ends, ids of "Hi" as raw text
    source: str = ""  # where that is reported or documented

    @property
    def outcome(self) -> str:
        """What the document says."""
        if self.equals is not None:
            said = f"; warns: “{' … '.join(self.warns)}”" if self.warns else ""
            noted = f"; check_checkpoint.py warns: “{' … '.join(self.noted)}”" if self.noted else ""
            return f"loads{said}{noted}"
        only = {TEXT: " by what needs the tokenizer", CHAT: " for chat"}.get(self.by, "")
        return f"refused{only}: “{' … '.join(self.refused)}”"


CATALOGUE: dict[str, Entry] = {}
_group = ""


def group(title: str) -> None:
    global _group
    _group = title


def entry(name: str, met: str, make: Make, **outcome: Any) -> None:
    assert name not in CATALOGUE and ("equals" in outcome) != ("refused" in outcome), name
    CATALOGUE[name] = Entry(_group, met, make, **outcome)


# --------------------------------------------------------------------------------------------------------------------
# Base checkpoints: released models' layout, small
# --------------------------------------------------------------------------------------------------------------------

_SMALL = {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 2, "n_routed_experts": 8, "num_experts_per_tok": 3}
_GROUPS = {"n_group": 4, "topk_group": 2}
_V3 = V3 | fp8_sizes(2) | _SMALL | _GROUPS
_PLAIN_ROPE: dict[str, Any] = {"rope_scaling": None, "num_nextn_predict_layers": 0}
CONFIGS: dict[str, dict[str, Any]] = {
    "v3": _V3,
    "v3-fp8": _V3,
    "v3.1-fp8": _V3 | {"quantization_config": {"scale_fmt": "ue8m0"}},
    "v3-experts-128": _V3 | {"hidden_size": 256},  # whole groups of 128
    "v3-without-mtp": _V3 | {"num_nextn_predict_layers": 0},
    "v3-tied": _V3 | {"num_nextn_predict_layers": 0, "tie_word_embeddings": True},
    "v2": FAMILIES["v2"] | _SMALL | _GROUPS,
    "v2-lite": FAMILIES["v2-lite"] | _SMALL,
    "moonlight": FAMILIES["moonlight"] | _SMALL,
    "kimi-k2": FAMILIES["kimi-k2"] | _SMALL,
    # tiktoken's vocabulary has 256 reserved places behind its words
    "kimi-tiktoken": FAMILIES["moonlight"] | _SMALL | {"vocab_size": 544, "bos_token_id": 260, "eos_token_id": 261},
    # https://huggingface.co/ai-sage/GigaChat3-10B-A1.8B: values as wide as keys, no query latent, YaRN 64
    "gigachat3": V3 | _SMALL | {
        "n_group": 1, "topk_group": 1, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 192, "rope_theta": 100000.0, "rope_scaling": {**V3["rope_scaling"], "factor": 64},
    },
    # https://huggingface.co/jdopensource/JoyAI-LLM-Flash: V3's network under a name of its own
    "joyai": V3 | _SMALL | {
        "model_type": "joyai_llm_flash", "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0,
        "rope_theta": 32000000.0, "rope_scaling": None,
    },
    # https://huggingface.co/zai-org/GLM-4.7-Flash
    "glm-4.7-flash": V3 | _SMALL | {
        "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", "n_group": 1, "topk_group": 1,
        "rms_norm_eps": 1e-5, "routed_scaling_factor": 1.8, "qk_nope_head_dim": 48, "v_head_dim": 64,
        "rope_theta": 1000000.0, "rope_scaling": None, "partial_rotary_factor": 1.0,
    },
}  # fmt: skip
FP8 = ("v3-fp8", "v3.1-fp8")
PACKED = {  # the config, and the layout of the weights
    "kimi-k2-int4": ("kimi-k2", "int4-groups-of-32"), "v3-int4-zeros": ("v3", "int4-zero-points"),
    "v3-int8": ("v3-experts-128", "int8-groups-of-128"), "v3-int8-blocks": ("v3", "int8-blocks"), "v3-awq": ("v3", "awq"),
    "v3-gptq": ("v3", "gptq"),
}  # fmt: skip


class Bases:
    """Base checkpoints by name, each made once."""

    def __init__(self, root: Path):
        self.root = root

    def __getitem__(self, name: str) -> Path:
        """The folder of a base; "NAME float32" is what an FP8 one means, exactly, in float32."""
        folder = self.root / name
        if folder.exists():
            return folder
        if name.endswith(" float32"):
            source = self[name.removesuffix(" float32")]
            if not folder.exists():
                plain(source, folder)
            return folder
        making = folder.with_name(f"{name} unfinished")
        if name in PACKED:
            config, layout = PACKED[name]
            write_plain(making, make_packed(making, LAYOUTS[layout], CONFIGS[config]), self.root / f"{name} float32")
        else:
            make_checkpoint(making, CONFIGS[name], fp8=name in FP8, shard_bytes=1 << 21)
        write_tokenizer(making)
        (making / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 1}')
        if name == "kimi-tiktoken":
            write_tiktoken(making)
        making.rename(folder)
        return folder

    def copy(self, name: str, folder: Path) -> Path:
        return Path(shutil.copytree(self[name], folder))


def plain(source: Path, target: Path) -> None:
    """Writes the float32 form of a checkpoint: FP8 weights times their scales, one file, no quantization_config."""
    tensors = whole(source)
    scales = {name for name in tensors if name.endswith("_scale_inv")}
    found = {name: t.float() for name, t in tensors.items() if name not in scales}
    for name in scales:
        weight = name.removesuffix("_scale_inv")
        found[weight] = dequantise(tensors[weight], tensors[name].float())
    write_plain(source, found, target)


def write_plain(source: Path, tensors: dict[str, torch.Tensor], target: Path) -> None:
    """Writes tensors in float32, in one file, with the config of `source` but for its quantisation."""
    target.mkdir()
    found = {name: t.float().contiguous() for name, t in tensors.items()}
    save_file(found, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))


def base(name: str, *changes: Callable[[Path], Any]) -> Make:
    """A base with changes made to its folder; the last may return another path to give to the programs."""

    def make(folder: Path, bases: Bases) -> Any:
        bases.copy(name, folder)
        found = None
        for change in changes:
            found = change(folder)
        return found

    return make


def config(**changes: Any) -> Callable[[Path], None]:
    """Changes fields of config.json; None removes one."""

    def change(folder: Path) -> None:
        def put(raw: dict[str, Any]) -> None:
            raw.update(changes)
            for name in [name for name, value in changes.items() if value is None]:
                del raw[name]

        edit_json(folder / "config.json", put)

    return change


def quant(**changes: Any) -> Callable[[Path], None]:
    """Replaces quantization_config."""
    return config(quantization_config=changes)


def tensors(where: Callable[[str], bool], change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Changes the tensors whose names are chosen."""

    def put(found: dict[str, torch.Tensor]) -> None:
        for name in filter(where, list(found)):
            found[name] = change(found[name]).contiguous()

    return lambda folder: [edit(file, put) for file in files(folder)] and None  # type: ignore[func-returns-value]


def ending(*ends: str) -> Callable[[str], bool]:
    return lambda name: name.endswith(ends)


def is_norm(name: str) -> bool:
    return "norm" in name


def finer(t: torch.Tensor) -> torch.Tensor:
    """float32 values that bfloat16 does not have."""
    return t.float() * (1 + 2**-10 + 2**-13)


def one_file(folder: Path) -> None:
    """All weights in model.safetensors, without an index."""
    found = whole(folder)
    for file in files(folder):
        file.unlink()
    (folder / HF_INDEX).unlink(missing_ok=True)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def write(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(text)

    return change


# --------------------------------------------------------------------------------------------------------------------
# transformers
# --------------------------------------------------------------------------------------------------------------------


def theirs(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of a checkpoint, with the config that it makes of config.json. Names of the family that
    transformers has no class for are V3's code on the hub (`auto_map`)."""
    import transformers

    transformers.logging.set_verbosity_error()  # of tensors that its class leaves out, such as the MTP layer's
    transformers.logging.disable_progress_bar()
    raw = json.loads((folder / "config.json").read_text())
    kind = raw["model_type"] if raw["model_type"] in transformers.CONFIG_MAPPING else "deepseek_v3"
    made = transformers.CONFIG_MAPPING[kind].from_dict({k: v for k, v in raw.items() if k != "model_type"})
    made._attn_implementation = "eager"
    cls = transformers.AutoModelForCausalLM
    return cls.from_pretrained(folder, config=made, dtype=dtype).eval()


def saved(name: str, dtype: torch.dtype, *changes: Callable[[Path], Any], **options: Any) -> Make:
    """A base that transformers loaded in a dtype and saved; then what its own tokenizer saves."""

    def make(folder: Path, bases: Bases) -> Any:
        source = bases[name]
        model = theirs(source, dtype)
        model.save_pretrained(folder, **options)
        kind = CONFIGS[name]["model_type"]
        if kind != model.config.model_type:  # the class on the hub has a config class of its own, which keeps its name
            config(model_type=kind, architectures=CONFIGS[name]["architectures"])(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / file, folder)
        found = None
        for change in changes:
            found = change(folder)
        return found

    return make


def saved_fp8(name: str, *changes: Callable[[Path], Any], **options: Any) -> Make:
    """As transformers loads and saves an FP8 checkpoint on a GPU, where the weights stay FP8. Its checks for a GPU and
    for accelerate are left out: nothing is computed."""

    def make(folder: Path, bases: Bases) -> Any:
        from unittest import mock

        from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

        source = bases[name]
        with mock.patch.object(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None):
            theirs(source, torch.bfloat16).save_pretrained(folder, **options)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / file, folder)
        for change in changes:
            change(folder)

    return make


def scratch(folder: Path, bases: Bases, kind: str) -> None:
    """A model of transformers' config class that was given sizes and nothing else."""
    import transformers

    sizes = {name: value for name, value in CONFIGS["moonlight"].items()
             if name.endswith(("_size", "_layers", "_heads", "_rank", "_dim", "_experts", "_tok")) and value is not None}  # fmt: skip
    made = transformers.CONFIG_MAPPING[kind](**sizes | {"q_lora_rank": 64, "num_mtp_layers": 0})
    if kind == "deepseek_v3":
        made.n_group, made.topk_group, made.first_k_dense_replace = 4, 2, 1
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        tensor.copy_(1 + 0.2 * torch.randn_like(tensor) if is_norm(name) else torch.randn_like(tensor) * 0.1)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bases["v3"] / file, folder)


NO_MTP = "no MTP module, though its config names one"
ROUNDED = "rounded when they were saved"

group("Saved by transformers 5")
BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
for kind, title in (("v3", "DeepSeek-V3"), ("v2", "DeepSeek-V2"), ("v2-lite", "DeepSeek-V2-Lite"), ("moonlight", "Moonlight"),
                    ("kimi-k2", "Kimi-K2"), ("gigachat3", "GigaChat3"), ("joyai", "JoyAI-LLM-Flash"),
                    ("glm-4.7-flash", "GLM-4.7-Flash")):  # fmt: skip
    lost = (NO_MTP,) if CONFIGS[kind].get("num_nextn_predict_layers") else ()
    met, source = "the same of another model", ""
    if kind == "v3":
        met = "a fine-tuned model: `from_pretrained(dtype=torch.bfloat16)`, then `save_pretrained`; its config has `rope_parameters`, " \
            "its files no MTP layer"  # fmt: skip
        source = "https://huggingface.co/docs/transformers/main_classes/model#transformers.PreTrainedModel.save_pretrained"
    entry(f"{title} in bfloat16", met, saved(kind, BF16), equals="", warns=lost, source=source)
entry("V3 in float32", "`save_pretrained` of a model that was trained in float32", saved("v3", F32), equals="", warns=(NO_MTP,))
entry("V3 in float16", "`save_pretrained(…)` after `.half()`, for old GPUs", saved("v3", F16), equals="", warns=(NO_MTP,))
entry("V3 wholly cast to bfloat16", "`model.bfloat16().save_pretrained(…)`, which rounds the routers' biases as well",
      saved("v3", F32, tensors(lambda name: True, torch.Tensor.bfloat16), config(dtype="bfloat16")), equals="",
      warns=(NO_MTP, ROUNDED), source="https://github.com/huggingface/transformers/pull/42580")  # fmt: skip
entry("V3 in small shards", "`save_pretrained(max_shard_size=…)`", saved("v3", BF16, max_shard_size="1MB"), equals="",
      warns=(NO_MTP,))  # fmt: skip
entry("experts stacked", "`save_pretrained(save_original_format=False)`: `gate_up_proj` and `down_proj` of all experts "
      "in one tensor each", saved("v3", BF16, save_original_format=False), equals="", warns=(NO_MTP,),
      source="https://github.com/vllm-project/vllm/pull/36997")  # fmt: skip
entry("experts stacked, in shards", "the same with `max_shard_size`",
      saved("v2-lite", F32, save_original_format=False, max_shard_size="300KB"), equals="")  # fmt: skip
entry("tied embeddings", "`tie_word_embeddings: true`: the head is not saved",
      saved("v3-tied", BF16), equals="")  # fmt: skip
entry("V3 from its config class", "a model made by `DeepseekV3Config(…)` and trained: no `scoring_func`, no `topk_method`, ids 0 and 1",
      partial(scratch, kind="deepseek_v3"), equals="")  # fmt: skip
entry("V2 from its config class", "the same with `DeepseekV2Config`: no groups, `mlp_bias: false`",
      partial(scratch, kind="deepseek_v2"), equals="")  # fmt: skip
entry("GLM-4.7-Flash from its config class", "the same with `Glm4MoeLiteConfig`: `mlp_layer_types`, no `first_k_dense_replace`",
      partial(scratch, kind="glm4_moe_lite"), equals="")  # fmt: skip
entry("FP8 V3", "`save_pretrained` of the FP8 model: `scale_fmt: \"float\"`", saved_fp8("v3-fp8"),
      equals="v3-fp8 float32", warns=(NO_MTP,),
      source="https://huggingface.co/docs/transformers/quantization/finegrained_fp8")  # fmt: skip
entry("FP8 V3.1", "the same of V3.1: `scale_fmt: \"ue8m0\"` and scales of one byte (F8_E8M0)", saved_fp8("v3.1-fp8"),
      equals="v3.1-fp8 float32", warns=(NO_MTP,))  # fmt: skip
entry("FP8 V3, experts stacked", "the same with `save_original_format=False`: stacked weights with stacked scales",
      saved_fp8("v3-fp8", save_original_format=False), equals="v3-fp8 float32", warns=(NO_MTP,))  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Casts
# --------------------------------------------------------------------------------------------------------------------


group("Cast by other programs")
entry("float32 norms, BF16 weights", "reported of V3.1-Terminus, and of casts that widen one-dimensional tensors",
      base("v3", tensors(is_norm, finer)), equals="", mtp=True,
      source="https://github.com/vllm-project/vllm/issues/30017")  # fmt: skip
entry("float32 norms, FP8 weights", "V3.1-Terminus itself; V3.2's code has float32 norms", base("v3.1-fp8", tensors(is_norm, finer)),
      equals="plain", mtp=True)  # fmt: skip
entry("float32 router", "trainers that keep the router in float32", base("v3-fp8", tensors(ending("mlp.gate.weight"), finer)),
      equals="plain", mtp=True)  # fmt: skip
entry("float32 head and embedding", "casts that leave the head in float32 for sampling",
      base("v3-fp8", tensors(ending("embed_tokens.weight", "head.weight"), finer)), equals="plain", mtp=True)  # fmt: skip
entry("router bias in BF16", "FP8 casts that were made from a BF16 model",
      base("v3-fp8", tensors(ending("e_score_correction_bias"), torch.Tensor.bfloat16)), equals="plain", mtp=True,
      warns=(ROUNDED,), source="https://github.com/deepseek-ai/DeepSeek-V3/pull/963")  # fmt: skip
entry("all in F16", "casts for GPUs without bfloat16, with `torch_dtype: float16`",
      base("v3", tensors(lambda name: True, torch.Tensor.half), config(torch_dtype="float16")), equals="", mtp=True,
      warns=(ROUNDED,))  # fmt: skip
entry("BF16 scales", "FP8 casts by trainers that hold everything but the weights in bfloat16",
      base("v3-fp8", tensors(ending("_scale_inv"), torch.Tensor.bfloat16)), equals="plain", mtp=True)  # fmt: skip


entry("scales that are no powers of two", "reported of V3.1-Terminus, whose config promises UE8M0: its `o_proj` scales are not",
      base("v3.1-fp8", tensors(ending("o_proj.weight_scale_inv"), lambda t: t * 1.375)), equals="plain", mtp=True,
      noted=("power",))  # fmt: skip


def to_bf16(where: Callable[[str], bool]) -> Callable[[Path], None]:
    """Dequantises the chosen FP8 weights, rounded to BF16, and leaves out their scales."""

    def change(folder: Path) -> None:
        held = whole(folder)
        chosen = {name for name, t in held.items() if t.dtype == torch.float8_e4m3fn and where(name)}

        def put(found: dict[str, torch.Tensor]) -> None:
            for name in chosen & found.keys():
                found[name] = dequantise(held[name], held[name + "_scale_inv"]).bfloat16()

        for file in files(folder):
            edit(file, put)
        drop(folder, lambda name: name.removesuffix("_scale_inv") in chosen and name not in chosen)

    return change


def attention(name: str) -> bool:
    return ".self_attn." in name


def not_experts(name: str) -> bool:
    return ".mlp.experts." not in name


def add_quant(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda raw: raw["quantization_config"].update(changes))


entry("attention in BF16, named", "FP8 casts with `modules_to_not_convert`",
      base("v3-fp8", to_bf16(attention), add_quant(modules_to_not_convert=["model.layers.0.self_attn", "model.layers.1.self_attn", "model.layers.2.self_attn", "lm_head"])),
      equals="plain", mtp=True, source="https://github.com/intel/auto-round/issues/1283")  # fmt: skip
entry("one layer in BF16, named", "mixed casts: the first layer is left in BF16",
      base("v3-fp8", to_bf16(lambda name: ".layers.0." in name), add_quant(modules_to_not_convert=["model.layers.0"])),
      equals="plain", mtp=True)  # fmt: skip
entry("only experts in FP8, not named", "casts of the routed experts alone, whose config does not say so",
      base("v3-fp8", to_bf16(not_experts)), equals="plain", mtp=True)  # fmt: skip
entry("MTP layer in BF16", "casts that quantise what transformers loads and copy the MTP layer",
      base("v3-fp8", to_bf16(lambda name: ".layers.2." in name)), equals="plain", mtp=True)  # fmt: skip
entry("BF16 weights, FP8 config", "a BF16 cast whose config still has `quantization_config`",
      base("v3", quant(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128])),
      refused=("config.json has a quantization_config, but the files hold no FP8 scales (weight_scale_inv); remove it, if they are a BF16 cast",),
      source="https://github.com/sgl-project/sglang/issues/6054")  # fmt: skip
entry("FP8 weights, no FP8 config", "an FP8 download beside the config of a BF16 cast", base("v3-fp8", config(quantization_config=None)),
      refused=("config.json has no quantization_config, but the files hold FP8 scales; get the config.json that belongs to them",))  # fmt: skip
entry("`torch_dtype` says float32", "BF16 files whose config says float32: trainers write what they computed in",
      base("v3", config(torch_dtype="float32")), equals="", mtp=True)  # fmt: skip
entry("`torch_dtype` says bfloat16", "float32 files whose config says bfloat16",
      base("v3", tensors(lambda name: True, torch.Tensor.float)), equals="", mtp=True)  # fmt: skip
entry("`torch_dtype` says float16", "BF16 files whose config says float16", base("v3", config(torch_dtype="float16")), equals="",
      mtp=True)  # fmt: skip
entry("BF16, F16 and F32 mixed", "merged models that keep each part's dtype",
      base("v3", tensors(attention, torch.Tensor.half), tensors(ending("down_proj.weight"), torch.Tensor.float)), equals="",
      mtp=True)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Token ids
# --------------------------------------------------------------------------------------------------------------------


def ordinary_first(folder: Path, generation: Any = 257, settings: dict[str, Any] | None = None, bos: bool = False) -> None:
    """A tokenizer whose ids 0 and 1 are `!` and `"`, with BOS 256 and EOS 257, as V2's, Kimi's and many have them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, BOS, EOS, "<｜▁pad▁｜>", "<｜User｜>", "<｜Assistant｜>"]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(names)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in names[256:259]])
    made.add_tokens([AddedToken(token, normalized=False, special=False) for token in names[259:]])
    if bos:
        made.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 256)])
    made.save(str(folder / "tokenizer.json"))
    given = {"bos_token": BOS, "eos_token": EOS} if settings is None else settings
    text = json.dumps(given | {"chat_template": TEMPLATE}, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))


HI = [39, 72]  # "Hi" where the letters come first: places in the sorted alphabet
STALE = ("bos_token_id 0 is '!', an ordinary word", "eos_token_id 1 is '\"', an ordinary word")
group("Token ids")
entry("ids 0 and 1 that nobody set", "DeepseekV3Config's defaults in a config that never had ids: they are `!` and `\"` here",
      base("v3", partial(ordinary_first, bos=True)), equals="v3", mtp=True, noted=STALE, text=(256, (257,), [256, *HI]))  # fmt: skip
entry("ids 0 and 1, no generation_config.json", "the same; only the tokenizer's own settings name BOS and EOS",
      base("v3", partial(ordinary_first, generation=None, bos=True)), equals="v3", mtp=True, noted=STALE,
      text=(256, (257,), [256, *HI]))  # fmt: skip
entry("ids 0 and 1 and nothing else", "the same without any other name for an end: ordinary words end no answer",
      base("v3", partial(ordinary_first, generation=None, settings={})), refused=("end token",), by=TEXT)  # fmt: skip
entry("`add_bos_token`", "a tokenizer without post-processor whose settings say `add_bos_token: true`",
      base("v3", partial(ordinary_first, settings={"bos_token": BOS, "eos_token": EOS, "add_bos_token": True})), equals="v3",
      mtp=True, noted=STALE, text=(256, (257,), [256, *HI]))  # fmt: skip
entry("no BOS before raw text", "a tokenizer that names a BOS and adds none: neither post-processor nor `add_bos_token`",
      base("v3", partial(ordinary_first, settings={"bos_token": BOS, "eos_token": EOS, "add_bos_token": False})), equals="v3",
      mtp=True, noted=STALE, text=(256, (257,), HI))  # fmt: skip
entry("several ends", "generation_config.json lists an end of turn beside the end of text",
      base("v3", partial(ordinary_first, generation=[257, 260])), equals="v3", mtp=True, noted=STALE, text=(256, (257, 260), HI))  # fmt: skip
entry("pad token that is no token", "settings that name a pad or unk token which tokenizer.json lacks",
      base("v3", lambda folder: edit_json(folder / "tokenizer_config.json", lambda raw: raw.update(pad_token="[PAD]", unk_token="<unk>"))),
      equals="v3", mtp=True)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Configs
# --------------------------------------------------------------------------------------------------------------------

YARN = dict(V3["rope_scaling"])
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}


def yarn(**changes: Any) -> dict[str, Any]:
    found = YARN | changes
    return {name: value for name, value in found.items() if value is not None}


def parameters(**changes: Any) -> dict[str, Any]:
    """What transformers 5 makes of rope_scaling."""
    return yarn(rope_theta=10000.0, rope_type="yarn", **changes)


def dense_mtp(folder: Path) -> None:
    """Adds an MTP layer made of the first, dense layer."""
    found = {name.replace(".layers.0.", ".layers.2."): t for name, t in whole(folder).items() if ".layers.0." in name}
    h = found["model.layers.2.input_layernorm.weight"]
    extra = {"enorm.weight": h, "hnorm.weight": h, "shared_head.norm.weight": h, "eh_proj.weight": h.repeat(len(h), 2)}
    add(folder, found | {f"model.layers.2.{name}": t.clone() for name, t in extra.items()})
    config(num_nextn_predict_layers=1)(folder)


group("Configs")
entry("YaRN twice, equal", "a config that transformers 5 saved, with `rope_scaling` added for other engines",
      base("v3", config(rope_parameters=parameters())), equals="v3", mtp=True,
      source="https://github.com/sgl-project/sglang/pull/34792")  # fmt: skip
entry("YaRN added by hand", "a config that transformers 5 saved without YaRN, with `rope_scaling` added: transformers obeys the "
      "latter, others the former", base("v3", config(rope_parameters=DEFAULT)), refused=("rope_scaling and rope_parameters differ (type", "make them equal or remove one"))  # fmt: skip
entry("YaRN twice, different", "`rope_scaling` and `rope_parameters` with two factors",
      base("v3", config(rope_parameters=parameters(factor=4.0))), refused=("rope_scaling and rope_parameters differ (factor 40.0 against 4.0)", "make them equal or remove one"))  # fmt: skip
entry("`default` with YaRN's fields", "`rope_type: default` beside `factor` and `beta_fast`: somebody meant YaRN",
      base("v3", config(rope_scaling=None, rope_parameters=parameters() | {"rope_type": "default", "type": "default"})),
      refused=("rope_parameters has the type 'default', but factor,", "of YaRN: give it the type 'yarn' or remove these"))  # fmt: skip
entry("`mscale` alone", "YaRN with one of two fields: V3's released code, vLLM and transformers differ; here it means what the "
      "released code makes of it", base("v3", config(rope_scaling=yarn(mscale=0.707, mscale_all_dim=None))), mtp=True,
      equals=config(rope_scaling=yarn(mscale=None, mscale_all_dim=None, attention_factor=0.0707 * log(40) + 1)),
      warns=("mscale_all_dim",), source="https://github.com/huggingface/transformers/pull/47435")  # fmt: skip
entry("`mscale_all_dim` alone", "the same, the other one", base("v3", config(rope_scaling=yarn(mscale=None, mscale_all_dim=0.707))),
      equals=config(rope_scaling=yarn(mscale=None, mscale_all_dim=0.707, attention_factor=(0.1 * log(40) + 1) / (0.0707 * log(40) + 1))),
      mtp=True, warns=("mscale",))  # fmt: skip
entry("V2 with `norm_topk_prob`", "V2's released code normalises only in another branch, transformers never: a config that asks for it "
      "means nothing certain", base("v2", config(norm_topk_prob=True)), refused=("norm_topk_prob true is not supported with a V2 model", "set it to false"))  # fmt: skip
entry("`quantization_config: null`", "configs that name every field", base("v3", lambda folder: edit_json(
    folder / "config.json", lambda raw: raw.update(quantization_config=None, rope_parameters=None))), equals="v3", mtp=True)  # fmt: skip
entry("a byte order mark", "a config edited on Windows", base("v3", lambda folder: (folder / "config.json").write_text(
    (folder / "config.json").read_text(), encoding="utf-8-sig") and None), refused=("config.json: not readable as JSON", "BOM"))  # fmt: skip
entry("MTP layer not in the config", "a config without `num_nextn_predict_layers` beside all of V3's files",
      base("v3", config(num_nextn_predict_layers=None)), equals="v3", warns=("MTP",),
      source="https://github.com/huggingface/transformers/issues/35688")  # fmt: skip
entry("MTP layer not in the files", "the reverse: converters that drop the layer and keep the config",
      base("v3", partial(drop, where=lambda name: ".layers.2." in name)), equals="v3", warns=(NO_MTP,))  # fmt: skip
entry("MTP layer without its copies", "casts that leave out the MTP layer's copies of embedding and head",
      base("v3", partial(drop, where=lambda name: ".layers.2.embed" in name or "shared_head.head" in name)), equals="v3", mtp=True)  # fmt: skip
entry("MTP layer with a dense MLP", "JoyAI-LLM-Flash as released; the layer is left out", base("joyai", dense_mtp), equals="joyai",
      warns=("dense MLP",), source="https://huggingface.co/jdopensource/JoyAI-LLM-Flash")  # fmt: skip
entry("an extra tensor without elements", "leftovers of sharded trainers: shape [0]",
      base("v3", lambda folder: add(folder, {"model.layers.0.self_attn.rotary_emb.cos_cached": torch.empty(0)})), equals="v3", mtp=True)  # fmt: skip
entry("weights without elements", "DeepSpeed ZeRO-3 saved through `save_pretrained`: every weight has shape [0]",
      base("v3", tensors(ending("q_b_proj.weight"), lambda t: t[:0, 0])),
      refused=("q_b_proj.weight", "found BF16 0"), source="https://github.com/microsoft/DeepSpeed/issues/3303")  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:3f786850e387550fdab836ed7e6dc881de23001b0e3f4a9b1f4f8b4f8d6c2f1a\nsize 4302\n"


def first(folder: Path) -> str:
    return files(folder)[0].name


def linked(store: str, folder: Path) -> None:
    """Moves the folder's files elsewhere and links to them."""
    place = folder.parent / f"{folder.name} {store}"
    place.mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(place / f"{i:064x}")
        path.symlink_to(place / f"{i:064x}")


def hub_cache(folder: Path) -> Path:
    """The hub's cache: blobs by hash, and a snapshot of links to them. Returns the cache's root for the model."""
    root = folder.parent / f"{folder.name} cache" / "models--org--model"
    snapshot = root / "snapshots" / "9a3c1e6f7b2d4c508e1f0a9b8c7d6e5f4a3b2c1d"
    for made in (root / "blobs", root / "refs", snapshot):
        made.mkdir(parents=True)
    (root / "refs" / "main").write_text(snapshot.name)
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(root / "blobs" / f"{i:064x}")
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", f"{i:064x}"))
    folder.rmdir()
    return root


def snapshot_of(root: Path) -> Path:
    return next((root / "snapshots").iterdir())


def broken(name: str | None, folder: Path) -> None:
    path = folder / (name or first(folder))
    path.unlink()
    path.symlink_to(Path("..", "..", "blobs", "f" * 64))


def remove_weights(folder: Path) -> None:
    for file in [*files(folder), folder / HF_INDEX]:
        file.unlink()


def adapter(folder: Path) -> None:
    """As peft saves LoRA."""
    remove_weights(folder)
    (folder / "config.json").unlink()
    save_file({"base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight": torch.ones(8, 256)},
              folder / "adapter_model.safetensors")  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "base_model_name_or_path": "deepseek-ai/DeepSeek-V3", "r": 8, "target_modules": ["o_proj"]}))  # fmt: skip


def gguf(folder: Path) -> None:
    remove_weights(folder)
    for path in folder.iterdir():
        path.unlink()
    (folder / "DeepSeek-V3-Q4_K_M-00001-of-00009.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(64))


def pickles(folder: Path) -> None:
    """As transformers saved before safetensors."""
    remove_weights(folder)
    names = [f"pytorch_model-{i}-of-00002.bin" for i in ("00001", "00002")]
    for name in names:
        (folder / name).write_bytes(b"PK\x03\x04" + bytes(64))
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": names[0], "lm_head.weight": names[1]}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def two_in_one(folder: Path) -> None:
    """The same weights in one shard more, all of them, which the index does not name."""
    held = sorted(whole(folder).items())
    n = len(files(folder)) + 1
    for i in range(n):
        save_file(dict(held[i::n]), folder / f"model-{i + 1:05}-of-{n:05}.safetensors", metadata={"format": "pt"})


def old_index(folder: Path) -> None:
    """What save_pretrained leaves in a folder that held shards: their files are gone, their index stays."""
    index = (folder / HF_INDEX).read_text()
    one_file(folder)
    (folder / HF_INDEX).write_text(index)


def partly_downloaded(folder: Path) -> None:
    """The hub's client that downloads into a folder, interrupted."""
    file = files(folder)[1]
    waiting = folder / ".cache" / "huggingface" / "download"
    waiting.mkdir(parents=True)
    file.rename(waiting / f"{file.name}.{'0' * 64}.incomplete")


group("Files")
entry("snapshot of the hub's cache", "what `hf download` leaves: links to files named by their hashes", base("v3", lambda folder: snapshot_of(hub_cache(folder))),
      equals="v3", mtp=True, source="https://huggingface.co/docs/huggingface_hub/guides/manage-cache")  # fmt: skip
entry("root of the hub's cache", "the folder `models--org--name` instead of the snapshot in it", base("v3", hub_cache),
      refused=("a cache of the Hugging Face Hub; give one of its snapshots,",))  # fmt: skip
entry("links into a shared store", "clusters that keep one copy of each file", base("v3-fp8", partial(linked, "store")),
      equals="v3-fp8 float32", mtp=True)  # fmt: skip
entry("a link to the folder", "`models/current`, which leads to a version", base("v3", lambda folder: link_to(folder)), equals="v3", mtp=True)
entry("spaces and Chinese in the path", "a download folder in any language", base("v3", lambda folder: moved(folder, "模型 (1) #2")), equals="v3",
      mtp=True)  # fmt: skip
entry("an index with another total_size", "merged and edited checkpoints", equals="v3", mtp=True,
      make=base("v3", lambda folder: edit_json(folder / HF_INDEX, lambda raw: raw.update(metadata={"total_size": 7}))))  # fmt: skip
entry("broken link to weights", "a snapshot whose blobs were not copied or mounted along", base("v3-fp8", partial(broken, None)),
      refused=("model-00001-of-", "a broken link: nothing is at", "download or copy that, or mend the link"), source="https://github.com/huggingface/huggingface_hub/pull/4550")  # fmt: skip
entry("broken link to the config", "the same", base("v3-fp8", partial(broken, "config.json")), refused=("config.json: a broken link",))  # fmt: skip
entry("broken link to the tokenizer", "the same", base("v3-fp8", partial(broken, "tokenizer.json")),
      refused=("tokenizer.json: a broken link",))  # fmt: skip
LFS = {"source": "https://github.com/deepseek-ai/DeepSeek-V3/issues/557"}
entry("LFS pointer for weights", "`git clone` without git-lfs", base("v3-fp8", lambda folder: write(first(folder), POINTER)(folder)),
      refused=("model-00001-of-", "a Git LFS pointer, not the file itself; run `git lfs pull`"), **LFS)  # fmt: skip
for name in ("config.json", HF_INDEX, "tokenizer.json", "tokenizer_config.json", "generation_config.json",
             "chat_template.jinja"):  # fmt: skip
    entry(f"LFS pointer for {name}", "the same, of a hub that keeps text in LFS too", base("v3-fp8", write(name, POINTER)),
          refused=(name, "git lfs pull"))  # fmt: skip
entry("adapter alone", "LoRA weights, without the model they belong to", base("v3", adapter), refused=("adapter_model.safetensors is an adapter's, and no whole model; merge it into its base model",))  # fmt: skip
entry("GGUF", "llama.cpp's format", base("v3", gguf), refused=(".gguf is GGUF, llama.cpp's format; get the safetensors files",))
entry("pickles alone", "old or foreign exports: `pytorch_model-….bin`", base("v3", pickles), refused=("pytorch_model", "is pickles, which can run code and are not read; save them as safetensors"))  # fmt: skip
entry("index without weights", "a download of the small files alone", base("v3-fp8", lambda folder: [f.unlink() for f in files(folder)] and None),
      refused=(f"missing, but {HF_INDEX} names it",))  # fmt: skip
entry("the folder above", "a parent folder with the checkpoint in it", lambda folder, bases: inside(folder, bases) and None,
      refused=("no checkpoint itself; give", "model-in-here"))  # fmt: skip
entry("a file, not its folder", "a path to one .safetensors file", base("v3", lambda folder: files(folder)[0]), refused=("a file; give the directory that holds it",))  # fmt: skip
entry("interrupted download", "`hf download` into a folder, cut short: one shard is still called `.incomplete`", base("v3-fp8", partly_downloaded),
      refused=("model-00002-of-", "missing, but"))  # fmt: skip
entry("two checkpoints in one folder", "a second download into the same folder", base("v3-fp8", two_in_one),
      refused=("two checkpoints, model-00001-of-00003.safetensors and the files that", "move away the one that is not meant"))  # fmt: skip
entry("the maker's own format beside it", "repositories that hold `consolidated` files too", base("v3", lambda folder: both_formats(folder)),
      refused=("two checkpoints, consolidated.safetensors and the files that",))  # fmt: skip
entry("old index beside a new file", "`save_pretrained` into a folder that held shards leaves their index", base("v3", old_index), mtp=True,
      equals="v3", warns=("left by an earlier save",), source="https://github.com/huggingface/diffusers/issues/14719")  # fmt: skip
entry("one shard with an index", "exports that number a single shard", base("v3", one_file, lambda folder: number_one(folder)), equals="v3",
      mtp=True, source="https://github.com/unslothai/unsloth-zoo/pull/346")  # fmt: skip


def link_to(folder: Path) -> Path:
    link = folder.parent / "current"
    link.symlink_to(folder.name)
    return link


def moved(folder: Path, name: str) -> Path:
    return folder.rename(folder.parent / name)


def both_formats(folder: Path) -> None:
    save_file(whole(folder), folder / "consolidated.safetensors")
    (folder / "params.json").write_text("{}")


def inside(folder: Path, bases: Bases) -> Path:
    folder.mkdir()
    return bases.copy("v3", folder / "model-in-here")


def number_one(folder: Path) -> None:
    file = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / file)
    (folder / HF_INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(folder / file), file)}))


# --------------------------------------------------------------------------------------------------------------------
# Tokenizers and templates
# --------------------------------------------------------------------------------------------------------------------

WORDS = (b"He", b"ll", b"Hell", b"lo")


def write_tiktoken(folder: Path) -> None:
    """A tiktoken.model instead of tokenizer.json, with the settings of Moonlight: 256 bytes, a few words, BOS 260."""
    import base64

    lines = [f"{base64.b64encode(token).decode()} {i}" for i, token in enumerate([*(bytes([i]) for i in range(256)), *WORDS])]
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")
    (folder / "tokenizer.json").unlink()
    special = {260: "[BOS]", 261: "[EOS]", 262: "<|im_end|>", 263: "<|im_user|>", 264: "<|im_assistant|>", 265: "<|im_middle|>",
               266: "<|im_system|>"}  # fmt: skip
    template = (
        "{%- for m in messages -%}{%- if m['role'] == 'user' -%}<|im_user|>{%- elif m['role'] == 'system' -%}<|im_system|>"
        "{%- else -%}<|im_assistant|>{%- endif -%}{{ m['role'] }}<|im_middle|>{{ m['content'] }}<|im_end|>{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"
    )
    settings = {
        "added_tokens_decoder": {str(i): {"content": token, "special": True, "lstrip": False, "rstrip": False, "normalized": False,
                                          "single_word": False} for i, token in special.items()},
        "auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
        "bos_token": "[BOS]", "eos_token": "[EOS]", "tokenizer_class": "TikTokenTokenizer", "chat_template": template,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 262}))


def tokenizer_saved(folder: Path) -> None:
    """What transformers 5 makes of a tokenizer: chat_template.jinja beside settings without a template."""
    import transformers

    made = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    made.save_pretrained(folder)
    assert (folder / "chat_template.jinja").exists()


GENERATION = TEMPLATE.replace(
    "{{ '<｜Assistant｜>' + m['content'] + eos_token }}",
    "{{ '<｜Assistant｜>' }}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}",
)
group("Tokenizers and chat templates")
entry("tiktoken.model", "Moonlight and Kimi-K2 as released: no tokenizer.json", base("kimi-tiktoken"), equals="kimi-tiktoken",
      source="https://huggingface.co/moonshotai/Moonlight-16B-A3B")  # fmt: skip
entry("LFS pointer for tiktoken.model", "the same, cloned without git-lfs", base("kimi-tiktoken", write("tiktoken.model", POINTER)),
      refused=("tiktoken.model", "git lfs pull"))  # fmt: skip
entry("tokenizer saved by transformers 5", "`tokenizer.save_pretrained`: chat_template.jinja", base("v3", tokenizer_saved), equals="v3", mtp=True)
entry("template with `{% generation %}`", "templates for training, which mark what the model said",
      base("v3", lambda folder: write_tokenizer(folder, GENERATION)), equals="v3", mtp=True,
      source="https://github.com/oobabooga/textgen/issues/6985")  # fmt: skip
entry("several templates by name", "tokenizer_config.json with `default` and `tool_use`", equals="v3", mtp=True, make=base("v3",
      lambda folder: edit_json(folder / "tokenizer_config.json", lambda raw: raw.update(
          chat_template=[{"name": "default", "template": raw["chat_template"]}, {"name": "tool_use", "template": ""}]))))  # fmt: skip
entry("no chat template", "a base model", base("v3", lambda folder: write_tokenizer(folder, None)), refused=("no chat template in this checkpoint; use --raw",),
      by=CHAT)  # fmt: skip
entry("no tokenizer", "a folder of weights alone", base("v3", lambda folder: (folder / "tokenizer.json").unlink()), refused=("tokenizer.json: no such file; copy the tokenizer files beside the weights",),
      by=TEXT)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Nested and foreign models
# --------------------------------------------------------------------------------------------------------------------


def nested(folder: Path) -> None:
    """Kimi-K2.5's layout: the text model's config in `text_config`, its tensors below `language_model.`, a vision tower
    and its projector beside it."""
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "text_config": raw,
        "vision_config": {"hidden_size": 32, "num_hidden_layers": 1}, "media_placeholder_token_id": 163605,
        "bos_token_id": raw["bos_token_id"], "eos_token_id": raw["eos_token_id"], "tie_word_embeddings": False, "dtype": "bfloat16",
    }))  # fmt: skip
    for file in files(folder):
        edit(file, lambda found: [found.update({f"language_model.{name}": found.pop(name)}) for name in list(found)])
    weight_map = {name: file.name for file in files(folder) for name in load_file(file)}
    (folder / HF_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    add(folder, {"vision_tower.patch_embed.proj.weight": torch.ones(32, 3, 14, 14).bfloat16(),
                 "vision_tower.encoder.blocks.0.wqkv.weight": torch.ones(96, 32).bfloat16(),
                 "mm_projector.proj.0.weight": torch.ones(64, 128).bfloat16()})  # fmt: skip


def nested_saved(folder: Path, bases: Bases, **options: Any) -> None:
    """Kimi-K2.5 as transformers 5 saves it, with the weights of the base in the text model."""
    import transformers

    source = bases["kimi-k2"]
    text = theirs(source)
    vision = {"patch_size": 2, "pos_emb_height": 4, "pos_emb_width": 4, "num_attention_heads": 2, "num_hidden_layers": 1,
              "hidden_size": 16, "intermediate_size": 32}  # fmt: skip
    made = transformers.CONFIG_MAPPING["kimi_k25"](
        text_config=text.config.to_dict(), vision_config=vision, projection_hidden_size=16, tie_word_embeddings=False
    )
    whole = transformers.AutoModelForImageTextToText.from_config(made)
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    whole.save_pretrained(folder, **options)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, folder)


CHANNEL = {
    "quant_method": "compressed-tensors", "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
}  # fmt: skip


def renamed(folder: Path, old: str, new: str) -> None:
    def put(found: dict[str, Any]) -> None:
        for name in [name for name in found if name.endswith(old)]:
            found[name.removesuffix(old) + new] = found.pop(name)

    for file in files(folder):
        edit(file, put)
    reindex(folder, put)


def method(name: str) -> tuple[str, ...]:
    return (f"quantization_config.quant_method '{name}'", "is not supported (known: 'fp8', 'blockwise_int8', 'compressed-tensors'")


group("Nested models")
entry("Kimi-K2.5's layout", "a text model inside a vision model; its text is answered", base("kimi-k2", nested), equals="kimi-k2", warns=("the vision model are left out",),
      source="https://github.com/PrimeIntellect-ai/prime-rl/pull/3065")  # fmt: skip
entry("Kimi-K2.5 as released", "the same with experts of four bits", base("kimi-k2-int4", nested),
      equals="kimi-k2-int4 float32", warns=("the vision model are left out",), source="https://huggingface.co/moonshotai/Kimi-K2.5")  # fmt: skip

entry("Kimi-K2.5 saved by transformers 5", "`save_pretrained` of the whole; it calls the text model's `layers` `blocks`, as it does the "
      "vision model's", nested_saved, equals="kimi-k2", warns=("the vision model are left out",))  # fmt: skip
entry("Kimi-K2.5, experts stacked", "the same with `save_original_format=False`: the prefix is `model.language_model.`",
      partial(nested_saved, save_original_format=False), equals="kimi-k2", warns=("the vision model are left out",))  # fmt: skip

group("Other quantisations")
entry("INT4, compressed-tensors", "Kimi-K2-Thinking and Red Hat's casts: routed experts, `pack-quantized`", base("kimi-k2-int4"),
      equals="kimi-k2-int4 float32", source="https://huggingface.co/moonshotai/Kimi-K2-Thinking")  # fmt: skip
entry("INT4 with zero points", "the same, asymmetric", base("v3-int4-zeros"), equals="v3-int4-zeros float32", mtp=True)  # fmt: skip
entry("INT8, compressed-tensors", "the same of eight bits", base("v3-int8"), equals="v3-int8 float32", mtp=True)  # fmt: skip
entry("AWQ", "casts for eight GPUs of 80 GB: every projection", base("v3-awq"), equals="v3-awq float32", mtp=True,
      source="https://huggingface.co/cognitivecomputations/DeepSeek-R1-AWQ")  # fmt: skip
entry("GPTQ", "the same", base("v3-gptq"), equals="v3-gptq float32", mtp=True)  # fmt: skip
entry("GPTQ in act-order", "GPTQ with `desc_act: true`", base("v3-gptq", add_quant(desc_act=True)),
      refused=("quantization_config.desc_act is true: act-order, which scatters a group's channels over the row, is not supported",))  # fmt: skip
entry("GPTQ of three bits", "GPTQ with `bits: 3`", base("v3-gptq", add_quant(bits=3)),
      refused=("quantization_config.bits 3 is not supported (known: 4)",))  # fmt: skip
entry("INT8 blocks", "casts of R1 for A100", base("v3-int8-blocks"), equals="v3-int8-blocks float32", mtp=True,
      source="https://github.com/sgl-project/sglang/pull/3730")  # fmt: skip
entry("FP8 by channel, compressed-tensors", "llm-compressor's casts", base("v3-fp8", quant(**CHANNEL)),
      refused=("quantization_config.format 'float-quantized' is not supported (known: 'pack-quantized')",))  # fmt: skip
entry("FP8 by channel, fbgemm", "transformers' FbgemmFp8Config", base("v3-fp8", quant(quant_method="fbgemm_fp8", activation_scale_ub=1200.0)),
      refused=method("fbgemm_fp8"))  # fmt: skip
entry("NVFP4", "NVIDIA's casts", base("v3", quant(quant_method="modelopt", quant_algo="NVFP4")), refused=method("modelopt"),
      source="https://huggingface.co/nvidia/DeepSeek-R1-FP4")  # fmt: skip
entry("bitsandbytes", "`load_in_4bit`, saved", base("v3", quant(quant_method="bitsandbytes", load_in_4bit=True)), refused=method("bitsandbytes"))  # fmt: skip
entry("scales called `weight_scale`", "casts that use compressed-tensors' names under `quant_method: fp8`",
      base("v3-fp8", partial(renamed, old="_scale_inv", new="_scale")), refused=("the files hold no FP8 scales (weight_scale_inv)",))  # fmt: skip
entry("packed weights, no quantization_config", "INT4 tensors beside the config of the BF16 model",
      base("v3", partial(renamed, old=".mlp.experts.0.up_proj.weight", new=".mlp.experts.0.up_proj.weight_packed")),
      refused=("config.json has no quantization_config, but the files hold quantised weights; get the config.json that belongs to them",))  # fmt: skip
entry("FP8 blocks of another size", "casts with `weight_block_size: [64, 64]`", base("v3-fp8", add_quant(weight_block_size=[64, 64])),
      refused=("quantization_config.weight_block_size [64, 64] is not supported (known: [128, 128])",))  # fmt: skip
entry("FP8 by tensor", "casts with `weight_block_size: null`: one scale a weight", base("v3-fp8", add_quant(weight_block_size=None)),
      refused=("quantization_config.weight_block_size None is not supported (known: [128, 128])",))  # fmt: skip
entry("E5M2", "casts with `fmt: e5m2`", base("v3-fp8", add_quant(fmt="e5m2")), refused=("quantization_config.fmt 'e5m2' is not supported",))  # fmt: skip
entry("FP8 with static activations", "casts with `activation_scheme: static`", base("v3-fp8", add_quant(activation_scheme="static")),
      refused=("quantization_config.activation_scheme 'static' is not supported",))  # fmt: skip


def foreign(kind: str, **changes: Any) -> Callable[[Path], None]:
    """The config.json that transformers' class of another model writes, at this size where it has such a field."""

    def change(folder: Path) -> None:
        import transformers

        raw = json.loads((folder / "config.json").read_text())
        made = transformers.CONFIG_MAPPING[kind]()
        other = made.to_dict() | {"transformers_version": transformers.__version__}
        small = {name: raw[name] for name in other.keys() & raw.keys() if isinstance(raw[name], int) and name.startswith(("num_", "hidden", "n_"))}
        (folder / "config.json").write_text(json.dumps(other | small | changes, default=str))

    return change


group("Other networks")
entry("DeepSeek-V3.2", "sparse attention with an indexer", base("v3", foreign("deepseek_v32", architectures=["DeepseekV32ForCausalLM"])),
      refused=("architecture 'DeepseekV32ForCausalLM' is not supported: its attention chooses keys by an indexer",), source="https://huggingface.co/deepseek-ai/DeepSeek-V3.2-Exp")  # fmt: skip
entry("DeepSeek-V3.2, called V3", "a config patched for an engine that does not know V3.2",
      base("v3", foreign("deepseek_v32", architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3")), refused=("index_topk 2048 is not supported: its attention chooses keys by an indexer",),
      source="https://github.com/THUDM/slime/pull/1460")  # fmt: skip
entry("DeepSeek-V4", "another network", base("v3", foreign("deepseek_v4", architectures=["DeepseekV4ForCausalLM"])), refused=("architecture 'DeepseekV4ForCausalLM' is not supported: it has hyper-connections",))  # fmt: skip
entry("A.X-K1", "V3's shape with a norm behind the experts", base("v3", foreign("axk1", architectures=["AXK1ForCausalLM"])),
      refused=("architecture 'AXK1ForCausalLM' is not supported: it has a norm behind each layer's MLP",), source="https://huggingface.co/skt/A.X-K1")  # fmt: skip
entry("Mistral Large 3", "V3's shape with a router without bias and queries scaled by position",
      base("v3", config(architectures=["MistralLarge3ForCausalLM"])),
      refused=("architecture 'MistralLarge3ForCausalLM' is not supported: its queries are scaled by position",))  # fmt: skip
entry("V3 without its head", "`DeepseekV3Model.save_pretrained`: a model that embeds texts", base("v3", config(architectures=["DeepseekV3Model"])),
      refused=("architecture 'DeepseekV3Model' is not supported",))  # fmt: skip
entry("Llama", "any other model", base("v3", foreign("llama", architectures=["LlamaForCausalLM"])), refused=("architecture 'LlamaForCausalLM' is not supported",))


# --------------------------------------------------------------------------------------------------------------------
# Mixtures
# --------------------------------------------------------------------------------------------------------------------


def stack_experts(folder: Path) -> None:
    """All experts' weights, and their scales, in one tensor each, as `save_original_format=False` has them."""
    held = whole(folder)
    stacks: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for name in [name for name in held if ".mlp.experts." in name]:
        before, _, rest = name.partition("experts.")
        kind = "_scale_inv" if name.endswith("_scale_inv") else ""
        stacks.setdefault((f"{before}experts.", kind), {})[rest] = held.pop(name)
    for (at, kind), of in stacks.items():
        dtype = of[f"0.up_proj.weight{kind}"].dtype
        of = {rest: t.view(torch.uint8) if t.itemsize == 1 else t for rest, t in of.items()}  # torch cannot stack FP8
        parts = [[of[f"{e}.{part}_proj.weight{kind}"] for part in ("gate", "up", "down")] for e in range(len(of) // 3)]
        held[f"{at}gate_up_proj{kind}"] = torch.stack([torch.cat(part[:2]) for part in parts]).view(dtype)
        held[f"{at}down_proj{kind}"] = torch.stack([part[2] for part in parts]).view(dtype)
    for path in [*files(folder), folder / HF_INDEX]:
        path.unlink()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def mixture(seed: int) -> tuple[str, list[Callable[[Path], Any]], list[Callable[[Path], Any]]]:
    """A base with some changes of its values' dtypes, and some of how it is laid out, which change nothing."""
    draw = Random(seed)
    name = draw.choice(["v3", "v3-fp8", "v3.1-fp8"])
    wider = [is_norm, ending("mlp.gate.weight"), ending("embed_tokens.weight", "head.weight")]
    values = [tensors(where, finer) for where in wider if draw.random() < 0.4]
    scales = ending("_scale_inv")
    if name == "v3":
        values += [tensors(where, torch.Tensor.half) for where in (attention, ending("shared_experts.up_proj.weight")) if draw.random() < 0.5]
        values += [tensors(lambda name: ".mlp.experts." in name, finer)] * (draw.random() < 0.3)
    else:
        kept = [attention, not_experts, lambda name: ".layers.2." in name, lambda name: ".mlp.experts." in name,
                ending("kv_a_proj_with_mqa.weight"), ending("shared_experts.gate_proj.weight")]  # fmt: skip
        values += [to_bf16(where) for where in draw.sample(kept, draw.randrange(3))]
        if name == "v3.1-fp8" and draw.random() < 0.6:
            values.append(tensors(scales, lambda t: t.to(torch.float8_e8m0fnu)))
        elif draw.random() < 0.3:
            values.append(tensors(scales, torch.Tensor.bfloat16))
    layout = [stack_experts] * (draw.random() < 0.5) + [nested] * (draw.random() < 0.4)
    return name, values, [*layout, *[lambda folder: snapshot_of(hub_cache(folder))] * (draw.random() < 0.4)]


# --------------------------------------------------------------------------------------------------------------------
# The document, and the command
# --------------------------------------------------------------------------------------------------------------------


def table() -> str:
    """docs/checkpoints.md's tables, one to a group."""
    lines: list[str] = []
    before = ""
    for name, found in CATALOGUE.items():
        if found.group != before:
            lines += [*([""] if lines else []), f"### {found.group}", "", "| checkpoint | where people meet it | what happens |", "| --- | --- | --- |"]
            before = found.group
        met = f"{found.met} ([source]({found.source}))" if found.source else found.met
        lines.append(f"| {name} | {met} | {found.outcome.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    if not arguments:
        print(*CATALOGUE, sep="\n")
        return 0
    if len(arguments) != 2 or arguments[0] not in CATALOGUE:
        print(f"error: expected NAME DIR, found {arguments}; without arguments it lists the names", file=sys.stderr)
        return 2
    import tempfile

    found = CATALOGUE[arguments[0]]
    with tempfile.TemporaryDirectory() as root:
        print(found.make(Path(arguments[1]), Bases(Path(root))) or arguments[1], found.outcome, sep=": ")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
