"""Golden values of every conformance model, and the prompts that they are of.

    python conformance/goldens.py              # writes goldens/FAMILY.safetensors
    python conformance/goldens.py --check      # compares the bytes instead; exits with 1 where they differ
    python conformance/goldens.py --prompts    # searches the prompts anew, goldens/prompts.json (minutes)

The values are float64 numbers of exact_network.py, rounded once to float32. Their bytes do not depend on the processor,
its instruction sets, the number of threads or torch's version: see exact_math.py.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

import exact_math
import hashed_weights
from exact_network import Network
from families import FAMILIES, KEPT, LENGTHS

FOLDER = Path(__file__).parent / "goldens"
PROMPTS = FOLDER / "prompts.json"
CANDIDATES = 8  # tokens tried for each position
SENTINEL = ("v3", 12)  # a prompt, and from which position on one is sought where a bias in bfloat16 chooses otherwise
COMMON = (".logits", ".hidden", ".c_kv", ".k_rope", ".ids", ".weights")  # points kept, by their ends; logits are always
SLICES = (  # weights of which a part is kept dequantised, across the border of a block in both directions
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "model.layers.0.self_attn.o_proj.weight",
    "model.layers.1.mlp.experts.5.down_proj.weight", "model.layers.1.mlp.experts.5.up_proj.weight",
)  # fmt: skip
START, SIDE = 120, 16  # of such a part's rows and columns


def prompts() -> dict[str, list[int]]:
    return json.loads(PROMPTS.read_text())  # type: ignore[no-any-return]


def golden(family: str, arithmetic: exact_math.Arithmetic = exact_math.ORDERED) -> dict[str, Tensor]:
    """A family's golden tensors by name, "positions" being those that are kept, the last KEPT of the prompt. Of an FP8
    model all is of W8A8, by names that begin with "w8a8."; "logits" are those of its weights multiplied exactly."""
    config, tokens = FAMILIES[family], prompts()[family]
    kept = range(max(len(tokens) - KEPT, 0), len(tokens))
    found = {"tokens": torch.tensor(tokens), "positions": torch.tensor(list(kept))}
    modes = {"": False, "w8a8.": True} if "quantization_config" in config else {"": False}
    for prefix, w8a8 in modes.items():
        network = Network(config, w8a8, arithmetic)
        for name, value in network.run(tokens).items():
            if name == "logits" or ((len(modes) == 1 or w8a8) and name.endswith((*COMMON, ".scale"))):
                value = value[kept.start : kept.stop]
                found[prefix + name] = value.int() if name.endswith(".ids") else value.float()
        for name in SLICES if w8a8 else ():
            part = slice(START, START + SIDE)
            found[f"dequantised.{name}[{START}:{START + SIDE}]"] = network.weights[name][part, part].float()
    return {name: value.contiguous() for name, value in found.items()}


def file_of(family: str) -> Path:
    return FOLDER / f"{family}.safetensors"


def read(family: str) -> dict[str, Tensor]:
    """The golden tensors of the committed file."""
    with safe_open(file_of(family), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def encoded(family: str) -> bytes:
    about = {"family": family, "config": FAMILIES[family]}
    return bytes(save(golden(family), metadata={"conformance": json.dumps(about, sort_keys=True)}))


# --- prompts ---------------------------------------------------------------------------------------------------------


def margins(network: Network) -> Tensor:
    """Of the last run, for each position, how far the nearest expert or group is from being chosen otherwise. Relative
    to the score where there is no bias."""
    points, least = network.points, None
    for name, logits in points.items():
        if not name.endswith(".router_logits"):
            continue
        i = int(name.split(".")[1]) + (network.config["num_hidden_layers"] if name.startswith("mtp") else 0)
        bias = network.weights.get(f"model.layers.{i}.mlp.gate.e_score_correction_bias")
        scores = network.affinity(logits)
        rows = [network.candidates(scores, bias).sort(-1, descending=True).values]
        gaps = [rows[0][:, network.top_k - 1] - rows[0][:, network.top_k]]
        if network.n_groups > 1:
            choice = scores if bias is None else scores + bias
            rows.append(network.worth(choice.unflatten(-1, (network.n_groups, -1))).sort(-1, descending=True).values)
            gaps.append(rows[1][:, network.n_kept - 1] - rows[1][:, network.n_kept])
        if bias is None:
            gaps = [gap / row[:, 0] for gap, row in zip(gaps, rows, strict=True)]
        gap = torch.stack(gaps).amin(0)
        if len(gap) < len(points["logits"]):  # the MTP module's: a position less
            gap = torch.cat((gap, gap.new_full((1,), 9.0)))
        least = gap if least is None else torch.minimum(least, gap)
    assert least is not None
    return least


def flips(network: Network) -> bool:
    """Whether a bias rounded to bfloat16 chooses other experts at the last position."""
    for name, logits in network.points.items():
        if name.startswith("layers") and name.endswith(".router_logits"):
            bias = network.weights[f"model.{name.removesuffix('.ffn.router_logits')}.mlp.gate.e_score_correction_bias"]
            right, wrong = (
                network.route(logits[-1:], b)[0].sort().values for b in (bias, exact_math.to_bfloat16(bias))
            )
            if not torch.equal(right, wrong):
                return True
    return False


def search(family: str) -> list[int]:
    """A prompt whose routers decide clearly at every position that is kept, so that a format's rounding changes no
    choice: position by position the token, of some, with the widest margin in every mode."""
    config, length = FAMILIES[family], LENGTHS[family]
    drawn = (hashed_weights.draw(f"prompt {family}", length * 256) & 255).reshape(length, -1).tolist()
    networks = [Network(config, w8a8) for w8a8 in ((False, True) if "quantization_config" in config else (False,))]
    tokens: list[int] = []
    sought = family == SENTINEL[0]
    for position in range(length):
        if position < length - KEPT:
            tokens.append(drawn[position][0])
            continue
        best, turned = (-1.0, 0), (-1.0, 0)
        looking = sought and position >= SENTINEL[1]
        for token in range(256) if looking else dict.fromkeys(drawn[position][:CANDIDATES]):
            least = 9.0
            for network in networks:
                network.run([*tokens, token])
                least = min(least, *margins(network)[-2:].tolist())
            best = max(best, (least, token))
            if looking and flips(networks[0]):
                turned = max(turned, (least, token))
        if turned[0] > 0.002:
            best, sought = turned, False
        tokens.append(best[1])
        print(f"{family} {position}: {best[0]:.4f}{' turned by a rounded bias' if best == turned else ''}", flush=True)
    assert not sought, "no position is turned by a rounded bias"
    return tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed files and write nothing")
    parser.add_argument("--prompts", action="store_true", help="search the prompts anew")
    parser.add_argument("--family", choices=sorted(FAMILIES), nargs="+", default=list(FAMILIES))
    options = parser.parse_args()
    if options.prompts:
        torch.set_num_threads(1)  # many small operations
        found: dict[str, Any] = prompts() if PROMPTS.exists() else {}
        found |= {family: search(family) for family in options.family}
        rows = ",\n".join(f"  {json.dumps(family)}: {json.dumps(tokens)}" for family, tokens in found.items())
        PROMPTS.write_text(f"{{\n{rows}\n}}\n")
    different = []
    for family in options.family:
        made = encoded(family)
        if not options.check:
            file_of(family).write_bytes(made)
        elif made != file_of(family).read_bytes():
            different.append(family)
    for family in different:
        print(f"{file_of(family).name} differs from what is computed here")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
