"""The text model of a multimodal checkpoint (Kimi-K2.5 and 2.6): tensors have a prefix, and the vision model's are left out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from checkpoint.check import check
from checkpoint.quantize import quantize
from core.numerics import Numerics
from support.checkpoints import fp8_sizes, make_checkpoint
from support.damaged_checkpoints import add, configure, drop, edit, files, reindex, whole
from support.families import FAMILIES, multimodal
from support.packed_checkpoints import LAYOUTS, quantization_config
from support.programs import PROGRAMS, refusals
from support.rank_weights import assert_same, loaded
from support.tiny_tokenizer import VOCAB_SIZE, write_tokenizer

TEXT = FAMILIES["kimi-k2"] | fp8_sizes(2) | {"num_hidden_layers": 2, "vocab_size": VOCAB_SIZE, "n_routed_experts": 16}
VISION = {
    "vision_tower.patch_embed.proj.weight": torch.ones(8, 3, 14, 14, dtype=torch.bfloat16),
    "vision_tower.encoder.blocks.0.wqkv.bias": torch.zeros(24, dtype=torch.bfloat16),
    "vision_tower.encoder.final_layernorm.weight": torch.zeros(8, dtype=torch.bfloat16),
    "mm_projector.proj.0.weight": torch.ones(8, 8, dtype=torch.bfloat16),
}
FLOAT32, BF16 = Numerics(torch.float32), Numerics(torch.bfloat16)
NOTE = "4 tensors of the vision model are left out: the text model alone is computed"


def wrap(folder: Path) -> Path:
    """The checkpoint of a text model as that of a multimodal one."""
    for file in files(folder):
        edit(file, lambda tensors: [tensors.update({f"language_model.{n}": tensors.pop(n)}) for n in list(tensors)])
    reindex(folder, lambda m: [m.update({f"language_model.{n}": m.pop(n)}) for n in list(m)])
    add(folder, VISION)
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(multimodal(text)))
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """By dtype the text model alone, and within the multimodal one."""
    folder = tmp_path_factory.mktemp("kimi")
    found = {}
    for name in ("fp8", "bf16"):
        make_checkpoint(folder / name, TEXT, fp8=name == "fp8")
        write_tokenizer(folder / name)
        found[name] = folder / name, wrap(Path(shutil.copytree(folder / name, folder / f"{name}-whole")))
    return found


@pytest.mark.parametrize("name", ["fp8", "bf16"])
def test_quantised(name, pairs, tmp_path):
    """The text model alone, under its names; the vision model's tensors stay, and the config says that they do."""
    for folder in pairs[name]:
        quantize(folder, tmp_path / folder.name, "int4", device="cpu")
    text, found = whole(tmp_path / name), whole(tmp_path / f"{name}-whole")
    assert_same({n.removeprefix("language_model."): t for n, t in found.items()}, text | VISION)
    raw, alone = (json.loads((tmp_path / n / "config.json").read_text()) for n in (f"{name}-whole", name))
    said = {k: v for k, v in raw["quantization_config"].items() if k != "ignore"}
    assert said == {k: v for k, v in alone["quantization_config"].items() if k != "ignore"}
    assert "quantization_config" not in raw["text_config"]
    ignored = set(raw["quantization_config"]["ignore"]) - set(alone["quantization_config"]["ignore"])
    assert ignored == {"re:.*lm_head.*", "re:.*vision_tower.*", "re:.*mm_projector.*"}


@pytest.mark.parametrize("name", ["fp8", "bf16"])
def test_every_program_takes_the_text_model(name, pairs, tmp_path, capsys):
    text, folder = pairs[name]
    assert_same(loaded(folder, BF16), loaded(text, BF16))
    names = ("load", "plan", "convert", *(["cast"] if name == "fp8" else []))
    for program in names:
        capsys.readouterr()
        PROGRAMS[program](folder, tmp_path)
        assert capsys.readouterr().err.count(f"warning: {folder}: {NOTE}\n") == 1, program
    report = check(folder)
    assert report.ok and [str(f.problem) for f in report.findings] == [f"{folder}: {NOTE}"]
    assert report.subject["tensors"] == len(whole(text))
    PROGRAMS["convert"](text, tmp_path / "text")
    assert_same(whole(tmp_path / "convert"), whole(tmp_path / "text" / "convert"))
    assert check(tmp_path / "convert").ok
    if name == "bf16":
        return
    PROGRAMS["cast"](text, tmp_path / "text")
    wanted = {f"language_model.{n}": t for n, t in whole(tmp_path / "text" / "cast").items()}
    assert_same(whole(tmp_path / "cast"), wanted | VISION)
    assert check(tmp_path / "cast").ok
    assert_same(loaded(tmp_path / "cast", BF16), loaded(text, BF16))


@pytest.mark.parametrize("original", [True, False])
def test_as_transformers_saves_it(original, pairs, tmp_path):
    """In the released names, or in those that it has in memory, with stacked experts."""
    text, _ = pairs["bf16"]
    raw = {k: v for k, v in json.loads((text / "config.json").read_text()).items() if k not in ("torch_dtype", "model_type")}
    config = transformers.Kimi_K25Config(
        text_config={**raw, "model_type": "deepseek_v3", "num_nextn_predict_layers": 0},
        vision_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
        projection_hidden_size=16, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.Kimi_K25ForConditionalGeneration(config).float()
    own = {n: p for n, p in model.named_parameters() if "vision" not in n and "projector" not in n}
    with torch.no_grad():
        for parameter in own.values():
            parameter.normal_()
    model.save_pretrained(tmp_path, save_original_format=original, max_shard_size="1MB")
    held = whole(tmp_path)
    assert any(".experts.gate_up_proj" in name for name in held) != original
    assert ("language_model.lm_head.weight" in held) == original == ("lm_head.weight" not in held)
    ours = loaded(tmp_path, FLOAT32)
    assert torch.equal(ours["head.weight"], own["lm_head.weight"])
    assert torch.equal(ours["layers.1.ffn.experts.w2.weight"], own["model.language_model.layers.1.mlp.experts.down_proj"])
    assert torch.equal(ours["layers.1.ffn.experts.w13.weight"], own["model.language_model.layers.1.mlp.experts.gate_up_proj"])
    assert sum(p.numel() for p in ours.values()) == sum(
        p.numel() for p in own.values()) + ours["layers.1.ffn.gate.bias"].numel()  # fmt: skip
    assert "tensors of the vision model are left out" in str(check(tmp_path, quick=True).findings)


def test_faults_are_told_by_the_files_own_names(pairs, tmp_path):
    _, folder = pairs["fp8"]
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    add(copy, {"vision_model.x": torch.ones(2)})
    drop(copy, lambda name: name.endswith("layers.1.self_attn.o_proj.weight"))
    for program, lines in refusals(copy, tmp_path, ("load", "check", "convert", "cast")).items():
        missing = "DIR: language_model.model.layers.1.self_attn.o_proj.weight is missing"
        assert any(line.startswith(missing) for line in lines), (program, lines)
    assert any(": vision_model.x: the config has no such tensor" in str(f.problem) for f in check(copy).findings)


def test_a_tensor_with_and_without_the_prefix(pairs, tmp_path):
    copy = Path(shutil.copytree(pairs["bf16"][1], tmp_path / "copy"))
    add(copy, {"model.norm.weight": torch.ones(192, dtype=torch.bfloat16)})
    for program, lines in refusals(copy, tmp_path, ("load", "check", "convert")).items():
        assert any("model.norm.weight: the same as" in line for line in lines), (program, lines)


def test_the_text_model_s_quantization_config_counts(pairs, tmp_path):
    """A config that says INT4, as Kimi-K2.5's does, beside plain weights."""
    copy = Path(shutil.copytree(pairs["bf16"][1], tmp_path / "copy"))
    text = json.loads((copy / "config.json").read_text())["text_config"]
    configure({"text_config": text | {"quantization_config": quantization_config(LAYOUTS["int4-groups-of-32"])}}, copy)
    message = "config.json has a quantization_config, but the files hold no INT4 weights; remove it, if they are plain"
    for program, lines in refusals(copy, tmp_path).items():
        assert any(line.endswith(message) for line in lines), (program, lines)


def test_in_a_single_file(pairs, tmp_path):
    text, folder = pairs["bf16"]
    (tmp_path / "a").mkdir()
    save_file(whole(folder), tmp_path / "a" / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path / "a")
    assert_same(loaded(tmp_path / "a", BF16), loaded(text, BF16))
