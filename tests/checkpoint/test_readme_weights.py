"""README_WEIGHTS.md: its numbers and its tables of tensors are those of the table that loads and conversions go by."""

import math
import re
from pathlib import Path

import torch

from checkpoint.partition import Partition
from checkpoint.table import expected_tensors
from core.config import load_config

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README_WEIGHTS.md").read_text()
V3 = load_config(ROOT / "configs" / "config_671B.json")
SPECS = expected_tensors(V3, quantised=True)
PARAMETERS = {name: math.prod(spec.shape) for name, spec in SPECS.items() if not name.endswith(".scale")}


def billions(*prefixes: str, activated: bool = False, without: tuple[str, ...] = ()) -> float:
    """Parameters of the tensors whose names begin so; `activated`: of the routed experts those that serve a token."""
    total = 0.0
    for name, n in PARAMETERS.items():
        if name.startswith(prefixes) and not name.startswith(without):
            share = V3.n_activated_experts / V3.n_routed_experts if activated and ".experts." in name else 1
            total += n * share
    return total / 1e9


def test_parameters_and_bytes():
    main, mtp = ("embed", "layers", "norm", "head"), ("mtp.",)
    copies = ("mtp.0.embed", "mtp.0.head")
    read, without_embed = billions(*main, activated=True), billions(*main, activated=True, without=("embed",))
    own, own_read = billions(*mtp, without=copies), billions(*mtp, activated=True, without=copies)
    size = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in SPECS.values())
    layer = billions("mtp.", without=(*copies, "mtp.0.eh", "mtp.0.enorm", "mtp.0.hnorm", "mtp.0.norm"))
    for text in (
        f"| main model | {billions(*main):.1f} B | {read:.1f} B with embedding and head, {without_embed:.1f} B with the head alone |",
        f"| MTP module | {billions(*mtp):.1f} B | {billions(*mtp, activated=True):.1f} B with embedding and head, {own_read:.1f} B of its own |",
        f"| together | {billions(*main, *mtp):.1f} B | | {len(SPECS):,} tensors, {size:,} bytes |",
        f"{round(sum(math.prod(s.shape) for n, s in SPECS.items() if n.endswith('.scale')) / 1e6)} million float32 numbers",
        f"head are {V3.vocab_size} × {V3.dim} each, {billions('embed'):.2f} B parameters",
        f"one complete MoE layer like the others, {layer:.2f} B parameters",
        f"`eh_proj`, 7168 × 14336 ({billions('mtp.0.eh_proj'):.2f} B)",
        f"{own:.1f} B of its {billions(*mtp):.1f} B parameters are its own",
    ):
        assert text in TEXT, text


def rows() -> list[list[str]]:
    lines = TEXT[TEXT.index("## 3. Tensors") : TEXT.index("## 4.")].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in cells if "`" in row[0]]


def spelled_out(cell: str) -> list[str]:
    """The names in a cell; the second may leave out what it has in common with the first."""
    names = re.findall(r"`([^`]+)`", cell)
    before = names[0].rpartition(".")[0]
    return [name if name.count(".") == names[0].count(".") or "shared_head" in name else f"{before}.{name}" for name in names]


def test_tables_of_tensors():
    dtypes = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "**float32**": torch.float32}
    whole, split = Partition(V3, 4, "whole"), Partition(V3, 4, "split")
    seen = set()
    for theirs, ours, shape, dtype, *rest in rows():
        scales, divided = rest if len(rest) == 2 else ("", *rest)
        layer = "layers.0." if "(dense)" in theirs else "layers.3."
        prefix = "" if len(rest) == 1 else layer
        for name in spelled_out(ours):
            ending = "" if name.endswith("bias") else ".weight"
            name = prefix + name.replace(".E.", ".5.") + ending
            spec = SPECS[name]
            wanted = [hf.replace(".E.", ".5.").replace("model.layers.61.shared", "shared") for hf in spelled_out(theirs)]
            assert any(spec.hf.endswith(f"{hf}{ending}") for hf in wanted), (name, spec.hf, wanted)
            assert spec.shape == tuple(map(int, shape.split(" × "))) and spec.dtype == dtypes[dtype], name
            blocks = SPECS[name.removesuffix("weight") + "scale"].shape if scales else ()
            assert blocks == (tuple(map(int, scales.split(" × "))) if scales else ()), name
            assert spec.split == (0 if "rows" in divided else 1 if "columns" in divided else None), name
            assert ("whole experts" in divided) == (whole.cut(spec, 1) != split.cut(spec, 1)), name
            seen.add(re.sub(r"^(layers|mtp)\.\d+\.", r"\1.", re.sub(r"\.experts\.\d+", ".experts", name)))
    known = {re.sub(r"^(layers|mtp)\.\d+\.", r"\1.", re.sub(r"\.experts\.\d+", ".experts", n)) for n in PARAMETERS}
    assert seen == {name for name in known if not (name.startswith("mtp.") and f"layers.{name[4:]}" in known)}


def test_examples():
    """The experts' bytes for one token, and the numbers of ranks."""
    expert = 3 * V3.moe_inter_dim * V3.dim / 1e6  # MB in FP8
    assert f"its 8 experts are {round(8 * expert)} MB" in TEXT and f"{round(expert)} MB on each of 8 ranks" in TEXT
    assert f"at least two experts, {round(2 * expert)} MB" in TEXT and V3.n_limited_groups == 4
    for layout in ("whole", "split"):
        works = []
        for ranks in range(1, V3.n_heads + 1):
            try:
                works.append(Partition(V3, ranks, layout, quantised=True).ranks)
            except Exception:
                continue
        assert works == [1, 2, 4, 8, 16]
    assert "V3 works with 1, 2,\n4, 8 and 16 ranks in either layout" in TEXT
