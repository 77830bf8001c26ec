"""Checkpoints that transformers saved: every family, in every dtype and FP8 form that it writes."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers.quantizers import quantizer_finegrained_fp8

from checkpoint.directory import Checkpoint, choose_args
from checkpoint.table import exceptions
from core.errors import UserError
from core.numerics import Form, Numerics
from engine.choose_numerics import choose_numerics
from support.checkpoints import fp8_sizes
from support.damaged_checkpoints import whole
from support.families import FAMILIES, two_layers
from support.model_pairs import hidden_states, ours, random_checkpoint, relative_error, theirs, tokens

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
PLAIN = [*zip(FAMILIES, itertools.cycle((F32, BF16, F16)), strict=False), ("v3", BF16), ("v3", F16)]


def logits_of(path: Path, num: Numerics = Numerics(F32)) -> torch.Tensor:
    model = ours(path, num)
    return model.logits(hidden_states(model, tokens(100, model.args.vocab_size)))


@pytest.mark.parametrize(("family", "dtype"), PLAIN)
@torch.no_grad()
def test_plain(family, dtype, tmp_path):
    """Loaded in float32 it is what transformers makes of it; by default it is computed in what holds it."""
    path = random_checkpoint(tmp_path / "c", two_layers(family))
    theirs(path).to(dtype).save_pretrained(tmp_path / "saved")
    oracle = theirs(tmp_path / "saved")
    expected = oracle(torch.tensor([tokens(100, oracle.config.vocab_size)])).logits[0]
    assert relative_error(logits_of(tmp_path / "saved"), expected) < 1e-5
    checkpoint = Checkpoint(tmp_path / "saved")
    args = choose_args(checkpoint, None)
    num, _ = choose_numerics(args, torch.device("cpu"), "auto", "auto", specs=checkpoint.expected(args))
    assert num == Numerics(BF16 if dtype == BF16 else F32)


@pytest.fixture
def fp8_anywhere(monkeypatch):
    """Has transformers keep FP8 weights as it does on a GPU, which it asks for though saving needs none."""
    for name in ("is_accelerate_available", "is_torch_xpu_available"):
        monkeypatch.setattr(quantizer_finegrained_fp8, name, lambda: True)


SIZES = fp8_sizes(2) | {"hidden_size": 256, "q_lora_rank": 128, "num_nextn_predict_layers": 0}
NOT_FP8 = ["lm_head", "kv_a_proj_with_mqa"]
SIZES |= {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}


FP8_FORMS = [*itertools.product(("v3", "v2"), ("float", "made")), ("v3", "ue8m0"), ("v3", "made ue8m0")]


@pytest.mark.parametrize(("family", "form"), FP8_FORMS)
@torch.no_grad()
def test_fp8(family, form, tmp_path, fp8_anywhere):
    """V3 as released is saved with `scale_fmt: "float"`, V3.1 with scales as exponents. Made by transformers from BF16,
    a checkpoint has BF16 where it was told so: here in one of two projections that lie in one stack in memory."""
    made, fmt = form.startswith("made"), "ue8m0" if "ue8m0" in form else "float"
    config = two_layers(family) | SIZES
    config |= {} if made or fmt == "float" else {"quantization_config": {"scale_fmt": fmt}}
    path = random_checkpoint(tmp_path / "c", config, fp8=not made)
    cls = getattr(transformers, config["architectures"][0])
    asked = transformers.FineGrainedFP8Config(scale_fmt=fmt, modules_to_not_convert=NOT_FP8)
    how = {"quantization_config": asked} if made else {}
    cls.from_pretrained(path, dtype=BF16, **how).save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    scales = {t.dtype for name, t in whole(tmp_path / "saved").items() if name.endswith("_scale_inv")}
    assert written["scale_fmt"] == fmt and scales == {torch.float8_e8m0fnu if fmt == "ue8m0" else F32}

    checkpoint = Checkpoint(tmp_path / "saved")
    args = choose_args(checkpoint, None)
    assert (args.dtype, args.scale_fmt) == ("fp8", "ue8m0" if fmt == "ue8m0" else None)
    plain = exceptions(checkpoint.expected(args), Numerics(gemm="fp8"))
    assert plain == (tuple((f"layers.{i}.attn.wqkv_a", Form()) for i in (0, 1)) if made else ())
    exact = logits_of(tmp_path / "saved")
    assert relative_error(logits_of(tmp_path / "saved", Numerics(F32, "bf16")), exact) < 1e-5
    if not made:  # the very numbers that were released
        assert torch.equal(exact, logits_of(path))
        return
    # transformers itself cannot read this: it stacks the experts' scales, and does not look for them so
    saved, before = (dict(ours(folder).named_parameters()) for folder in (tmp_path / "saved", path))
    for name, parameter in saved.items():
        apart = (parameter - before[name]).abs()
        rounded = "norm" not in name and parameter.dim() > 1 and name.startswith("layers") and "gate." not in name
        assert (apart <= 0.07 * before[name].abs() + 1e-3).all() and bool(apart.any()) == rounded, name
    q_a, kv_a = saved["layers.0.attn.wqkv_a.weight"].split([128, 192])
    assert torch.equal(kv_a, before["layers.0.attn.wqkv_a.weight"][128:]) and not torch.equal(q_a, kv_a[:128])


def test_a_scale_that_transformers_left_beside_a_plain_weight(tmp_path, fp8_anywhere):
    """Its quantiser leaves a width that is no whole number of blocks in BF16 (kv_a_proj_with_mqa has 576 rows), and saves
    a scale that it never set. It reads that back as FP8, times whatever the scale is; here it is refused."""
    path, cls = random_checkpoint(tmp_path / "c", two_layers("v3") | SIZES), transformers.DeepseekV3ForCausalLM
    fp8 = transformers.FineGrainedFP8Config()
    cls.from_pretrained(path, dtype=BF16, quantization_config=fp8).save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match=r"kv_a_proj_with_mqa\.weight: expected F8_E4M3, as .* or no scale; found BF16"):
        ours(tmp_path / "saved")
