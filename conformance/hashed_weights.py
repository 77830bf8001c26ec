"""Weights of the conformance models, from an integer hash: no download, no random generator, no rounding.

    python conformance/hashed_weights.py FAMILY DIR     # writes a checkpoint in the released layout
    python conformance/hashed_weights.py --vectors      # prints test vectors for another implementation

docs/porting.md states the rule on one page. Every number here is an integer times a power of two that its dtype holds
exactly (BF16, F32, F8_E4M3), so that any language generates the same bytes.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from families import FAMILIES

MASK = (1 << 64) - 1
GOLDEN, MIX1, MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
BLOCK = 128
SMALL = 4  # bits by which the projections in front of the inner norms are smaller: their eps shows


class Stored(NamedTuple):
    """A tensor of a checkpoint: its name, shape, and the rule that fills it."""

    name: str
    shape: tuple[int, ...]
    rule: str  # matrix, embedding, norm, bias
    fp8: bool = False  # whether an FP8 checkpoint has it in FP8, with a scale for each block


def name_hash(name: str) -> int:
    """FNV-1a, 64 bits, of a name's UTF-8 bytes."""
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = ((h ^ byte) * 0x100000001B3) & MASK
    return h


def draw(name: str, count: int) -> torch.Tensor:
    """r(name, i) for i from 0 to count - 1, int64 with the bits of an unsigned number: splitmix64 of
    name_hash(name) + (i + 1) * GOLDEN."""
    x = _signed(name_hash(name)) + torch.arange(1, count + 1) * _signed(GOLDEN)
    x = (x ^ _shifted(x, 30)) * _signed(MIX1)
    x = (x ^ _shifted(x, 27)) * _signed(MIX2)
    return x ^ _shifted(x, 31)


def _signed(n: int) -> int:
    return n - (1 << 64) if n >> 63 else n


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift to the right of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def bell(name: str, count: int, bits: int = 6) -> torch.Tensor:
    """Integers (count,) about normally distributed around 0: four fields of r, `bits` wide, added, less their mean.
    With 6 bits from -126 to 126 (standard deviation 36.9), with 16 from -131070 to 131070 (37,837)."""
    r, mask = draw(name, count), (1 << bits) - 1
    return sum((_shifted(r, at) & mask if at else r & mask) for at in (0, 16, 32, 48)) - 2 * mask  # type: ignore[return-value]


def shrink(stored: Stored) -> int:
    """Bits of a matrix's size: half those of its inputs' number, so that products keep their size."""
    return stored.shape[-1].bit_length() // 2


def four_bits(n: torch.Tensor) -> torch.Tensor:
    """Integers without all but the four leading bits of their size (towards zero): numbers that e4m3 has."""
    size = n.abs()  # of at most 7 bits
    bits = sum((size >= bound).long() for bound in (16, 32, 64))
    return (size >> bits << bits) * n.sign()


def values(stored: Stored, config: dict[str, Any]) -> torch.Tensor:
    """A tensor's values as they are without quantisation, float64, exact."""
    count = math.prod(stored.shape)
    if stored.rule == "bias":
        return (bell(stored.name, count, 16) - 65536).double() / 65536
    n = bell(stored.name, count).reshape(stored.shape)
    if stored.rule == "norm":
        return (128 + (3 * n >> 2)).double() / 128
    if stored.rule == "embedding":
        return n.double() / 512
    return n.double() * power(-5 - shrink(stored)) * smaller(stored, config)


def quantised(stored: Stored, config: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """An FP8 matrix: e4m3 values (N, K) and scales (ceil(N/128), ceil(K/128)), both float64 and exact."""
    n = bell(stored.name, math.prod(stored.shape)).reshape(stored.shape)
    q = 2 * four_bits(n).double() * smaller(stored, config)
    blocks = [math.ceil(size / BLOCK) for size in stored.shape]
    r = draw(f"{stored.name}_scale_inv", math.prod(blocks)).reshape(blocks)
    if config["quantization_config"].get("scale_fmt") == "ue8m0":
        s = torch.where((r & 1).bool(), 0.5, 1.0).double() * power(-6 - shrink(stored))
    else:
        s = ((1 << 23) + (r & ((1 << 23) - 1))).double() * power(-30 - shrink(stored))
    return q, s


def smaller(stored: Stored, config: dict[str, Any]) -> torch.Tensor:
    """A factor for each row (N, 1): 2^-4 for the rows in front of an inner norm, elsewhere 1."""
    rows = torch.ones(stored.shape[0], 1, dtype=torch.float64)
    if stored.name.endswith("self_attn.q_a_proj.weight"):
        rows /= 1 << SMALL
    elif stored.name.endswith("self_attn.kv_a_proj_with_mqa.weight"):
        rows[: config["kv_lora_rank"]] /= 1 << SMALL
    return rows


def spread(s: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Block scales as one for each number of a matrix of that shape."""
    return s.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: shape[0], : shape[1]]


def power(exponent: int) -> float:
    return math.ldexp(1.0, exponent)


def tensors(config: dict[str, Any]) -> Iterator[tuple[Stored, str]]:
    """Every tensor of a checkpoint, and the name under which it lies in the files. They differ for the MTP layer's
    embedding and head, which repeat the main model's."""
    c = config
    hidden, vocab, heads = c["hidden_size"], c["vocab_size"], c["num_attention_heads"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    latent, q_rank, inner = c["kv_lora_rank"], c["q_lora_rank"], c["moe_intermediate_size"]
    n_layers, modules = c["num_hidden_layers"], c.get("num_nextn_predict_layers") or 0
    embedding = Stored("model.embed_tokens.weight", (vocab, hidden), "embedding")
    head = Stored("lm_head.weight", (vocab, hidden), "matrix")
    found = [embedding, head, Stored("model.norm.weight", (hidden,), "norm")]

    def mlp(at: str, width: int) -> None:
        found.append(Stored(f"{at}.gate_proj.weight", (width, hidden), "matrix", True))
        found.append(Stored(f"{at}.up_proj.weight", (width, hidden), "matrix", True))
        found.append(Stored(f"{at}.down_proj.weight", (hidden, width), "matrix", True))

    for i in range(n_layers + modules):
        at = f"model.layers.{i}"
        attn = f"{at}.self_attn"
        found += [Stored(f"{at}.{n}_layernorm.weight", (hidden,), "norm") for n in ("input", "post_attention")]
        if q_rank:
            found.append(Stored(f"{attn}.q_a_proj.weight", (q_rank, hidden), "matrix", True))
            found.append(Stored(f"{attn}.q_a_layernorm.weight", (q_rank,), "norm"))
            found.append(Stored(f"{attn}.q_b_proj.weight", (heads * (nope + rope), q_rank), "matrix", True))
        else:
            found.append(Stored(f"{attn}.q_proj.weight", (heads * (nope + rope), hidden), "matrix", True))
        found.append(Stored(f"{attn}.kv_a_proj_with_mqa.weight", (latent + rope, hidden), "matrix", True))
        found.append(Stored(f"{attn}.kv_a_layernorm.weight", (latent,), "norm"))
        found.append(Stored(f"{attn}.kv_b_proj.weight", (heads * (nope + value), latent), "matrix", True))
        found.append(Stored(f"{attn}.o_proj.weight", (hidden, heads * value), "matrix", True))
        if i < c["first_k_dense_replace"]:
            mlp(f"{at}.mlp", c["intermediate_size"])
        else:
            found.append(Stored(f"{at}.mlp.gate.weight", (c["n_routed_experts"], hidden), "matrix"))
            if has_bias(c):
                found.append(Stored(f"{at}.mlp.gate.e_score_correction_bias", (c["n_routed_experts"],), "bias"))
            for e in range(c["n_routed_experts"]):
                mlp(f"{at}.mlp.experts.{e}", inner)
            mlp(f"{at}.mlp.shared_experts", inner * c["n_shared_experts"])
        if i >= n_layers:
            found += [Stored(f"{at}.{n}.weight", (hidden,), "norm") for n in ("enorm", "hnorm", "shared_head.norm")]
            found.append(Stored(f"{at}.eh_proj.weight", (hidden, 2 * hidden), "matrix"))
    yield from ((stored, stored.name) for stored in found)
    for i in range(n_layers, n_layers + modules):
        yield embedding, f"model.layers.{i}.embed_tokens.weight"
        yield head, f"model.layers.{i}.shared_head.head.weight"


def has_bias(config: dict[str, Any]) -> bool:
    """Whether a config's routers have e_score_correction_bias: those of V2 have none."""
    return config["model_type"] != "deepseek_v2"


def checkpoint(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor as it lies in the files, by name."""
    found: dict[str, torch.Tensor] = {}
    for stored, name in tensors(config):
        if stored.fp8 and "quantization_config" in config:
            q, s = quantised(stored, config)
            found[name], found[f"{name}_scale_inv"] = q.to(torch.float8_e4m3fn), s.float()
        else:
            dtype = torch.float32 if stored.rule == "bias" else torch.bfloat16
            found[name] = values(stored, config).to(dtype)
    return found


def write_checkpoint(family: str, folder: Path) -> None:
    """Writes config.json, two files of safetensors and their index. An FP8 weight's scale lies in the other file than
    the weight."""
    folder.mkdir(parents=True, exist_ok=True)
    config = FAMILIES[family]
    found = checkpoint(config)
    names = [name for name in found if not name.endswith("_scale_inv")]
    first = set(names[: len(names) // 2])
    files: list[dict[str, torch.Tensor]] = [{}, {}]
    for name, tensor in found.items():
        weight = name.removesuffix("_scale_inv")
        files[(weight in first) == (weight != name)][name] = tensor
    where: dict[str, str] = {}
    for i, held in enumerate(files, 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file(held, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(held, file)
    total = sum(tensor.nbytes for tensor in found.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def vectors() -> dict[str, Any]:
    """Test vectors of the rule: hashes, numbers drawn, integers and values."""
    plain, fp8 = FAMILIES["v3"], FAMILIES["v3-fp8"]
    shown = {
        "model.embed_tokens.weight": plain, "model.norm.weight": plain, "model.layers.1.mlp.gate.weight": plain,
        "model.layers.1.mlp.gate.e_score_correction_bias": plain, "model.layers.0.self_attn.q_a_proj.weight": plain,
        "model.layers.1.mlp.experts.7.down_proj.weight": fp8,
    }  # fmt: skip
    found = {}
    for name, config in shown.items():
        [stored] = [stored for stored, own in tensors(config) if own == name]
        row: dict[str, Any] = {
            "hash": f"{name_hash(name):016x}",
            "r": [f"{r & MASK:016x}" for r in draw(name, 2).tolist()],
        }
        row["n"] = bell(name, 4, 16 if stored.rule == "bias" else 6).tolist()
        if config is fp8:
            q, s = quantised(stored, config)
            row |= {"shape": list(stored.shape), "e4m3": q.flatten()[:4].tolist(), "scale": s.flatten()[:2].tolist()}
        else:
            row |= {"shape": list(stored.shape), "values": values(stored, config).flatten()[:4].tolist()}
        found[name] = row
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("family", nargs="?", choices=sorted(FAMILIES))
    parser.add_argument("folder", nargs="?", type=Path, help="where the checkpoint goes; made if it is not there")
    parser.add_argument("--vectors", action="store_true", help="print test vectors as JSON and write nothing")
    options = parser.parse_args()
    if options.vectors:
        print(json.dumps(vectors(), indent=2))
    elif options.family is None or options.folder is None:
        parser.error("a family and a directory are needed")
    else:
        write_checkpoint(options.family, options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
