"""quantize.py: complete in every format, the same in windows of any size, read by transformers, and refused in time."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_convert import OTHERS, SMALL
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

import quantize as command
from checkpoint import transform
from checkpoint.cast import cast
from checkpoint.directory import Checkpoint
from checkpoint.manifest import HF_INDEX, HF_MANIFEST, read_manifests, verify
from checkpoint.partition import Partition
from checkpoint.quantize import FORMATS, quantize
from checkpoint.reading import Reader
from core.errors import UserError
from core.numerics import Numerics
from ops.weight_quant import block_quant, group_quant, pack_int32
from support import crash_points
from support.checkpoints import dequantise, make_checkpoint
from support.damaged_checkpoints import add, configure, replace, whole
from support.families import FAMILIES
from support.model_pairs import hidden_states, ours, relative_error, theirs, tokens
from support.rank_weights import assert_same, loaded

CPU = "cpu"
DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"
PLAIN_IN_FP8 = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "eh_proj", "shared_head")  # V3's release has them so


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """By dtype, with an MTP module; widths that FP8's blocks do not divide, and some that groups of 128 do not."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("bf16", "fp8"):
        make_checkpoint(folder / name, SMALL, fp8=name == "fp8", shard_bytes=1 << 19)
        for file, text in OTHERS.items():
            (folder / name / file).write_text(text)
    return {path.name: path for path in folder.iterdir()}


def is_expert(name: str) -> bool:
    return ".mlp.experts." in name and name.endswith("weight")


def expected(tensors: dict[str, torch.Tensor], format: str, group_size: int) -> dict[str, torch.Tensor]:
    """What a quantised checkpoint holds, tensor by tensor, by whole tensors of the source."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        scale = tensors.get(f"{name}_scale_inv")
        exact = tensor if scale is None else dequantise(tensor, scale)
        if format == "fp8" and tensor.dim() == 2 and not any(word in name for word in PLAIN_IN_FP8):
            found[name], found[f"{name}_scale_inv"] = block_quant(exact)
        elif format != "fp8" and is_expert(name):
            q, found[f"{name}_scale"] = group_quant(exact, int(format[3:]), group_size)
            found[f"{name}_packed"] = pack_int32(q, int(format[3:]))
            found[f"{name}_shape"] = torch.tensor(tensor.shape)
        else:
            found[name] = exact if scale is None else exact.bfloat16()
    return found


@pytest.mark.parametrize("window", [1, 30_000, 16 << 20])
@pytest.mark.parametrize(("source", "format"), [("bf16", "fp8"), ("bf16", "int4"), ("bf16", "int8"), ("fp8", "int4")])
def test_exact_and_complete(source, format, window, sources, tmp_path, monkeypatch):
    monkeypatch.setattr(transform, "Reader", functools.partial(Reader, window))
    folder = sources[source]
    quantize(folder, tmp_path, format, None if format == "fp8" else 32, CPU)
    wanted = expected(whole(folder), format, 32)
    assert_same(whole(tmp_path), wanted)
    index = json.loads((tmp_path / HF_INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in wanted.values())
    for file in set(index["weight_map"].values()):
        assert load_file(tmp_path / file).keys() == {n for n, f in index["weight_map"].items() if f == file}
        with safe_open(tmp_path / file, "pt") as f:
            assert f.metadata() == {"format": "pt", "written_by": "quantize"}
    config = json.loads((folder / "config.json").read_text())
    written = json.loads((tmp_path / "config.json").read_text())
    assert {**config, "quantization_config": written["quantization_config"]} == written
    assert written["torch_dtype"] == "bfloat16"
    for name, text in OTHERS.items():
        assert (tmp_path / name).read_text() == text
    (manifest,) = read_manifests(tmp_path).values()
    assert manifest.raw["format"] == "deepseek-v3-quantized" and list(verify(tmp_path)) == []


def test_fp8_is_what_a_release_has(sources, tmp_path):
    """Names, dtypes, shapes and config.json are those of the FP8 checkpoint of the same model, and it loads."""
    quantize(sources["bf16"], tmp_path, "fp8", device=CPU)
    made, released = whole(tmp_path), whole(sources["fp8"])
    assert {n: (t.dtype, t.shape) for n, t in made.items()} == {n: (t.dtype, t.shape) for n, t in released.items()}
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path, sources["fp8"])]
    assert configs[0] == configs[1]
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.quantised and checkpoint.has_mtp
    checkpoint.check(Partition(checkpoint.args))


@pytest.mark.skipif(not DEMO.exists(), reason="no demo checkpoint in this tree")
def test_a_cast_of_a_release_comes_back(tmp_path):
    """The demo is FP8. Its cast, quantised, has each of its 10,633,216 e4m3 bytes again. None of its 654 scales, which
    float32 has to 24 bits and the cast to 8, but each to 8 bits, and so that the cast of it is the same to the bit."""
    cast(DEMO, tmp_path / "bf16", CPU)
    quantize(tmp_path / "bf16", tmp_path / "fp8", "fp8", device=CPU)
    before, after = whole(DEMO), whole(tmp_path / "fp8")
    assert before.keys() == after.keys()
    n_bytes = n_scales = n_same = 0
    for name, tensor in before.items():
        if name.endswith("_scale_inv"):
            n_scales += tensor.numel()
            n_same += int((after[name] == tensor).sum())
            assert ((after[name] / tensor - 1).abs() < 2**-8).all()
        else:
            assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
            n_bytes += tensor.nbytes * (tensor.dtype == torch.float8_e4m3fn)
    assert (n_bytes, n_scales, n_same) == (10_633_216, 654, 0)
    cast(tmp_path / "fp8", tmp_path / "again", CPU)
    assert_same(whole(tmp_path / "again"), whole(tmp_path / "bf16"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(dtype, sources, tmp_path):
    """Weights are quantised from what is stored, and what is not quantised keeps its dtype."""
    folder = Path(shutil.copytree(sources["bf16"], tmp_path / "copy"))
    made = torch.Generator().manual_seed(1)
    for file in folder.glob("*.safetensors"):
        tensors = {n: t + torch.randn(t.shape, generator=made) / 1000 for n, t in load_file(file).items()}
        save_file({n: t if n.endswith("bias") else t.to(dtype) for n, t in tensors.items()}, file)
    configure({"torch_dtype": str(dtype).removeprefix("torch.")}, folder)
    for format in ("fp8", "int8"):
        quantize(folder, tmp_path / format, format, None if format == "fp8" else 32, CPU)
        assert_same(whole(tmp_path / format), expected(whole(folder), format, 32))


# For other programs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of V3's family, and it in integers."""
    folder = tmp_path_factory.mktemp("packed")
    make_checkpoint(folder / "bf16", FAMILIES["v3"] | {"n_routed_experts": 16, "num_hidden_layers": 2})
    for format in ("int4", "int8"):
        quantize(folder / "bf16", folder / format, format, device=CPU)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("format", ["int4", "int8"])
@pytest.mark.parametrize("at_load", [True, False])
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # which is how it is told when
@torch.no_grad()
def test_transformers_loads_it(format, at_load, packed, tmp_path):
    """With the weights that the groups stand for, and the logits that our model has of those in bfloat16."""
    quantised = whole(packed[format])
    config = json.loads((packed[format] / "config.json").read_text())
    group_size = config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"]
    assert group_size == {"int4": 32, "int8": 128}[format]
    plain = Path(shutil.copytree(packed["bf16"], tmp_path / "plain"))
    for file in plain.glob("*.safetensors"):
        tensors = load_file(file)
        for name in filter(is_expert, tensors):
            data, scale = quantised[f"{name}_packed"], quantised[f"{name}_scale"].double()
            places = torch.arange(0, 32, 4 if format == "int4" else 8)
            half = 8 if format == "int4" else 128
            q = ((data[..., None].long() & 0xFFFFFFFF) >> places & (2 * half - 1)).flatten(1) - half
            assert quantised[f"{name}_shape"].tolist() == list(q.shape) == list(tensors[name].shape)
            tensors[name] = (q * scale.repeat_interleave(group_size, 1)).bfloat16()
        save_file(tensors, file)
    model = AutoModelForCausalLM.from_pretrained(
        packed[format],
        quantization_config=CompressedTensorsConfig(dequantize=at_load),
        attn_implementation="eager",
        dtype=torch.float32,
    )
    ids = tokens(40, config["vocab_size"])
    torch.nn.Module.float(model.eval())
    found = model(torch.tensor([ids])).logits[0]
    wanted = theirs(plain).state_dict()
    assert_same({n: t.float() for n, t in model.state_dict().items()}, wanted)
    assert_same(loaded(packed[format], Numerics()), loaded(plain, Numerics()))
    reference = ours(plain)
    assert relative_error(found, reference.logits(hidden_states(reference, ids))) < 1e-5


@pytest.mark.parametrize("format", ["int4", "int8"])
def test_what_the_config_ignores_is_what_is_plain(format, packed):
    """As compressed-tensors reads it: of all matrices that a Linear may have, by their names in the files."""
    raw = json.loads((packed[format] / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(raw)
    assert config.quantization_status.value == "compressed" and config.to_dict()["format"] == raw["format"]
    group = config.config_groups["group_0"]
    assert group.targets == ["Linear"] and group.weights.symmetric and group.weights.actorder is None
    tensors = whole(packed[format])
    linear = {n.removesuffix(".weight") for n, t in tensors.items() if t.dim() == 2 and n.endswith(".weight")}
    linear = {n for n in linear if not n.endswith("embed_tokens")}
    experts = {n.removesuffix(".weight_packed") for n in tensors if n.endswith("_packed")}
    assert len(experts) == 2 * 16 * 3 and linear.isdisjoint(experts) and "model.layers.2.eh_proj" in linear
    for name in linear | experts:
        assert any(match_name(name, pattern) for pattern in config.ignore) == (name in linear), name


def test_fp8_loads_and_computes(tmp_path):
    make_checkpoint(tmp_path / "bf16", FAMILIES["v3"] | {"n_routed_experts": 16, "num_hidden_layers": 2})
    quantize(tmp_path / "bf16", tmp_path / "fp8", "fp8", device=CPU)
    cast(tmp_path / "fp8", tmp_path / "again", CPU)
    assert_same(loaded(tmp_path / "fp8", Numerics()), loaded(tmp_path / "again", Numerics()))
    before, after = whole(tmp_path / "bf16"), whole(tmp_path / "again")
    errors = {n: relative_error(after[n], t) for n, t in before.items()}
    assert all(error < 2**-4 for error in errors.values()) and sum(error == 0 for error in errors.values()) < len(errors) / 3
    theirs(tmp_path / "again")


# Refusals -----------------------------------------------------------------------------------------------------------


def refusal(source: Path, target: Path, format: str, group_size: int | None = None) -> str:
    before = crash_points.hashes(target) if target.is_dir() else None
    with pytest.raises(UserError) as e:
        quantize(source, target, format, group_size, CPU)
    assert (crash_points.hashes(target) if target.is_dir() else None) == before
    return str(e.value).replace(str(target), "TARGET").replace(str(source), "SOURCE")


def test_widths_that_groups_do_not_divide(sources, tmp_path):
    message = refusal(sources["bf16"], tmp_path / "out", "int8")
    name = "model.layers.1.mlp.experts.0.gate_proj.weight"
    assert message.split("SOURCE/")[1].split(": ", 1)[1] == (
        f"{name}: expected a width (hidden_size) that is a multiple of 128, the size of a group, found 192; "
        "--group-size 32 divides it"
    )
    make_checkpoint(tmp_path / "odd", SMALL | {"moe_intermediate_size": 72})
    message = refusal(tmp_path / "odd", tmp_path / "out", "int4")
    assert message.endswith("down_proj.weight: expected a width (moe_intermediate_size) that is a multiple of 32, the size of a group, found 72")
    assert not (tmp_path / "out").exists()


def test_other_refusals(sources, packed, tmp_path):
    out, bf16, fp8 = tmp_path / "out", sources["bf16"], sources["fp8"]
    assert refusal(bf16, out, "fp8", 32) == "--group-size goes with int4 and int8: fp8 has blocks of 128x128"
    assert refusal(bf16, out, "int4", 64) == "--group-size 64 is not supported (known: 32, 128)"
    assert refusal(fp8, out, "fp8") == "SOURCE: holds FP8 weights already; fp8_cast_bf16.py makes a BF16 checkpoint of it"
    for format in FORMATS:
        assert "quantization_config.quant_method 'compressed-tensors'" in refusal(packed["int4"], out, format)
    make_checkpoint(tmp_path / "dense", SMALL | {"first_k_dense_replace": 2, "num_hidden_layers": 2, "num_nextn_predict_layers": 0})
    message = "SOURCE: a model without routed experts, which are what int4 quantises; --format fp8"
    assert refusal(tmp_path / "dense", out, "int4") == message
    assert refusal(bf16, bf16, "int4") == "TARGET: the output cannot go where the checkpoint is"
    assert not out.exists()


def test_another_commands_checkpoint_is_left_alone(sources, tmp_path):
    cast(sources["fp8"], tmp_path, CPU)
    first = min(path.name for path in tmp_path.glob("*.safetensors"))
    message = f"TARGET/{first}: not written by this program; choose another directory or remove it"
    assert refusal(sources["fp8"], tmp_path, "int4") == message
    shutil.rmtree(tmp_path)
    quantize(sources["fp8"], tmp_path, "int4", device=CPU)
    with pytest.raises(UserError, match="not written by this program"):
        cast(sources["fp8"], tmp_path, CPU)
    message = "TARGET/config.json: another model's; choose another directory or remove what is there"
    assert refusal(sources["fp8"], tmp_path, "int8", 32) == message


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("format", FORMATS)
def test_weights_that_are_not_finite(bad, format, sources, tmp_path):
    """A quantised weight would hide it; the tensor is named, and nothing becomes a checkpoint."""
    folder = Path(shutil.copytree(sources["bf16"], tmp_path / "copy"))
    name = "model.layers.2.mlp.experts.3.down_proj.weight"

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[150, 3] = bad
        return tensor

    file = replace(folder, name, spoil)
    with pytest.raises(UserError) as e:
        quantize(folder, tmp_path / "out", format, None if format == "fp8" else 32, CPU)
    assert str(e.value).startswith(f"{folder / file}: {name}: expected finite numbers, found NaN or infinity in rows 0 to ")
    assert all(path.name.startswith(".tmp-") for path in (tmp_path / "out").iterdir())
    with pytest.raises(UserError, match="an unfinished conversion and nothing else"):
        Checkpoint(tmp_path / "out")


def test_tensors_of_other_parts_stay(sources, tmp_path):
    """A buffer that the model does not need is copied as it is."""
    folder = Path(shutil.copytree(sources["bf16"], tmp_path / "copy"))
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(32)}
    add(folder, buffer)
    quantize(folder, tmp_path / "out", "fp8", device=CPU)
    assert_same(whole(tmp_path / "out"), expected(whole(sources["bf16"]), "fp8", 0) | buffer)


def test_command_line(sources, tmp_path):
    def run(*options: str) -> subprocess.CompletedProcess:
        script = Path(command.__file__)
        return subprocess.run([sys.executable, script, *options], capture_output=True, text=True, cwd=tmp_path)

    paths = ["--hf-ckpt-path", str(sources["bf16"]), "--save-path", "out"]
    done = run(*paths, "--format", "int8", "--group-size", "32", "--device", "cpu")
    assert done.returncode == 0 and "quantizing to int8: 100%" in done.stderr, done.stderr
    assert_same(whole(tmp_path / "out"), expected(whole(sources["bf16"]), "int8", 32))
    assert (tmp_path / "out" / HF_MANIFEST).exists()
    done = run("--verify", "out")
    assert done.returncode == 0 and done.stderr.endswith(" GB: all as it was written\n")
    done = run(*paths, "--format", "int8", "--device", "cpu")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "hidden_size" in done.stderr
