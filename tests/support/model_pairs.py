"""Two loads of one random checkpoint on disk: ours, and transformers' own classes, which share no code with it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.modeling_layers import MtpModel

from checkpoint.directory import Checkpoint
from checkpoint.load import load_into
from checkpoint.table import exceptions
from core.batch import Batch
from core.numerics import Numerics
from core.run_config import PAGE_SIZE
from core.stages import Stage
from model import Transformer
from ops.reference_backend import ReferenceBackend
from parallel.group import SOLO, Group
from support.checkpoints import make_checkpoint


def ours(
    path: Path,
    num: Numerics = Numerics(torch.float32),
    tp: Group = SOLO,
    device: torch.device | str = "cpu",
    backend: ReferenceBackend | None = None,
    dp: Group = SOLO,
    stage: Stage | None = None,
) -> Transformer:
    """Our model, float32 unless told otherwise, with the checkpoint's weights."""
    checkpoint = Checkpoint(path)
    assert checkpoint.args is not None
    num = replace(num, exceptions=exceptions(checkpoint.expected(checkpoint.args), num))
    model = Transformer(checkpoint.args, num, tp, device, mtp=checkpoint.has_mtp, backend=backend, dp=dp, stage=stage)
    load_into(model, checkpoint, progress=False)
    return model.prepare()


def theirs(path: Path) -> Any:
    """transformers' model in float32, reading the same files."""
    raw = json.loads((path / "config.json").read_text())
    family = raw["architectures"][0].removesuffix("ForCausalLM")  # kimi_k2 and joyai_llm_flash are V3's code
    raw = {k: v for k, v in raw.items() if k not in ("model_type", "torch_dtype", "dtype")}
    config = getattr(transformers, family + "Config")(**raw)
    config._attn_implementation = "eager"
    cls = getattr(transformers, family + "ForCausalLM")
    return cls.from_pretrained(path, config=config, dtype=torch.float32).eval()


def their_mtp(main: Any, path: Path) -> Any:
    """transformers' MTP module on its main model, filled from the checkpoint's extra layer by its released names."""
    from safetensors.torch import load_file

    module = MtpModel(main, 1).float().eval()
    prefix = f"model.layers.{main.config.num_hidden_layers}."
    tensors = {k: v.float() for f in sorted(path.glob("*.safetensors")) for k, v in load_file(f).items()}
    layer = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    state = module.layers[0].state_dict()
    for name, target in state.items():
        own = name.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
        own = "post_attention_layernorm.weight" if name == "mtp_block.post_attention_layernorm.weight" else own
        if own.endswith("experts.gate_up_proj"):
            base = own.removesuffix("gate_up_proj")
            rows = [torch.cat([layer[f"{base}{e}.{w}_proj.weight"] for w in ("gate", "up")]) for e in range(len(target))]
            target.copy_(torch.stack(rows))
        elif own.endswith("experts.down_proj"):
            base = own.removesuffix("down_proj")
            target.copy_(torch.stack([layer[f"{base}{e}.down_proj.weight"] for e in range(len(target))]))
        else:
            target.copy_(layer[own])
    return module


def random_checkpoint(path: Path, config: dict, fp8: bool = False, seed: int = 0) -> Path:
    make_checkpoint(path, config, fp8=fp8, seed=seed)
    return path


def tokens(n: int, vocab: int, seed: int = 1) -> list[int]:
    return torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def hidden_states(model: Transformer, ids: list[int], chunks: list[int] | None = None) -> torch.Tensor:
    """Our hidden states (len(ids), H), in one forward or in chunks of the given sizes, over scattered pages."""
    n_pages = -(-len(ids) // PAGE_SIZE)
    pages = torch.randperm(n_pages, generator=torch.Generator().manual_seed(2)).tolist()
    cache, out, at = model.new_cache(n_pages), [], 0
    for n in chunks or [len(ids)]:
        out.append(model(Batch.pack([(ids[at : at + n], at, pages)], model.device), cache))
        at += n
    assert at == len(ids)
    return torch.cat(out)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||, NaN where either holds one."""
    return float((a.double() - b.double()).norm() / b.double().norm())
