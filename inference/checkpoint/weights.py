"""Which tensors a checkpoint holds, how they are shared out over ranks, and how they get into a model.

Three kinds of directory are read: Hugging Face's, the ones `convert.py` writes (marked in each file's metadata, with
a manifest), and those the original DeepSeek-V3 repository's converter wrote (no mark, no manifest, no MTP module).
What `fp8_cast_bf16.py` writes is Hugging Face's kind with a mark and a manifest.

Names: "ours" are the names in memory and in converted files, which are upstream's, with the MTP module added.
A `scale` is Hugging Face's `weight_scale_inv`: float32, one per 128x128 block, weight = FP8 value * scale.
"""

import functools
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from checkpoint.manifest import CAST_MANIFEST, CAST_MARK, FORMAT, HF_INDEX, Manifest, check_file_name, read_manifests
from checkpoint.tensorfile import TEMPORARY, Entry, Reader, describe, read_header
from core.config import BLOCK_SIZE, ModelArgs, agree, load_config
from core.errors import CheckpointError, UserError
from core.files import read_json, require_folder
from core.run_config import AskedLayout, ExpertLayout
from parallel.group import SOLO, Group

IGNORED = "rotary_emb.inv_freq"  # a buffer some releases saved; it follows from the config


# --------------------------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A tensor's two names, its shape in the words of `sizes`, and which dimension the ranks split (None: all have it).

    Routed experts are split only in the "split" layout; in the other a rank holds whole ones. A row in whose shape a
    size is 0 does not exist.
    """

    ours: str
    hf: str
    shape: tuple[str, ...]
    split: int | None = None
    fp8: bool = False  # in an FP8 checkpoint
    required: bool = True


TOP = (
    Row("embed.weight", "model.embed_tokens.weight", ("V", "H"), 0),
    Row("norm.weight", "model.norm.weight", ("H",)),
    Row("head.weight", "lm_head.weight", ("V", "H"), 0),
)
BLOCK = (
    Row("attn_norm.weight", "input_layernorm.weight", ("H",)),
    Row("attn.wq.weight", "self_attn.q_proj.weight", ("N(dn+R) direct", "H"), 0, True),
    Row("attn.wq_a.weight", "self_attn.q_a_proj.weight", ("Q", "H"), None, True),
    Row("attn.q_norm.weight", "self_attn.q_a_layernorm.weight", ("Q",)),
    Row("attn.wq_b.weight", "self_attn.q_b_proj.weight", ("N(dn+R)", "Q"), 0, True),
    Row("attn.wkv_a.weight", "self_attn.kv_a_proj_with_mqa.weight", ("C+R", "H"), None, True),
    Row("attn.kv_norm.weight", "self_attn.kv_a_layernorm.weight", ("C",)),
    Row("attn.wkv_b.weight", "self_attn.kv_b_proj.weight", ("N(dn+dv)", "C"), 0, True),
    Row("attn.wo.weight", "self_attn.o_proj.weight", ("H", "N dv"), 1, True),
    Row("ffn_norm.weight", "post_attention_layernorm.weight", ("H",)),
)
DENSE = (
    Row("ffn.w1.weight", "mlp.gate_proj.weight", ("I", "H"), 0, True),
    Row("ffn.w2.weight", "mlp.down_proj.weight", ("H", "I"), 1, True),
    Row("ffn.w3.weight", "mlp.up_proj.weight", ("I", "H"), 0, True),
)
MOE = (
    Row("ffn.gate.weight", "mlp.gate.weight", ("E", "H")),
    Row("ffn.gate.bias", "mlp.gate.e_score_correction_bias", ("E biased",)),
    Row("ffn.shared_experts.w1.weight", "mlp.shared_experts.gate_proj.weight", ("S", "H"), 0, True),
    Row("ffn.shared_experts.w2.weight", "mlp.shared_experts.down_proj.weight", ("H", "S"), 1, True),
    Row("ffn.shared_experts.w3.weight", "mlp.shared_experts.up_proj.weight", ("S", "H"), 0, True),
)
EXPERT = (
    Row("w1.weight", "gate_proj.weight", ("M", "H"), 0, True),
    Row("w2.weight", "down_proj.weight", ("H", "M"), 1, True),
    Row("w3.weight", "up_proj.weight", ("M", "H"), 0, True),
)
MTP = (  # besides an ordinary layer's tensors; the released files repeat the main model's embedding and head
    Row("embed.weight", "embed_tokens.weight", ("V", "H"), 0, required=False),
    Row("enorm.weight", "enorm.weight", ("H",)),
    Row("hnorm.weight", "hnorm.weight", ("H",)),
    Row("eh_proj.weight", "eh_proj.weight", ("H", "2H")),
    Row("norm.weight", "shared_head.norm.weight", ("H",)),
    Row("head.weight", "shared_head.head.weight", ("V", "H"), 0, required=False),
)


def sizes(args: ModelArgs) -> dict[str, int]:
    """What the table's words mean for a model."""
    queries = args.n_heads * args.qk_head_dim
    return {
        "V": args.vocab_size, "H": args.dim, "2H": 2 * args.dim, "Q": args.q_lora_rank, "C": args.kv_lora_rank,
        "N(dn+R)": queries, "N(dn+R) direct": 0 if args.q_lora_rank else queries, "C+R": args.latent_dim,
        "N(dn+dv)": args.n_heads * (args.qk_nope_head_dim + args.v_head_dim), "N dv": args.n_heads * args.v_head_dim,
        "I": args.inter_dim, "M": args.moe_inter_dim, "S": args.n_shared_experts * args.moe_inter_dim,
        "E": args.n_routed_experts, "E biased": args.n_routed_experts if args.gate_bias else 0,
    }  # fmt: skip


class Spec(NamedTuple):
    """What the table says about one tensor of one model."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    hf: str
    split: int | None
    expert: int | None  # its number, if it belongs to a routed expert
    required: bool

    def cut(self, group: Group, args: ModelArgs, experts: ExpertLayout) -> tuple[tuple[int, int], ...] | None:
        """The part of it a rank holds, a range per dimension; None if it holds none of it."""
        if self.expert is not None and self.expert not in held_experts(args, group, experts):
            return None
        split = self.split if self.expert is None or experts == "split" else None
        parts = [group.size if d == split else 1 for d in range(len(self.shape))]
        return tuple(
            (group.rank * (n // p), (group.rank + 1) * (n // p)) if p > 1 else (0, n)
            for n, p in zip(self.shape, parts, strict=True)
        )


def held_experts(args: ModelArgs, group: Group, experts: ExpertLayout) -> range:
    """The numbers of the routed experts a rank holds, whole or its share of each."""
    if experts == "split":
        return range(args.n_routed_experts)
    each = args.n_routed_experts // group.size
    return range(group.rank * each, (group.rank + 1) * each)


@functools.lru_cache(maxsize=2)
def expected_tensors(args: ModelArgs, quantised: bool, mtp: bool = True) -> dict[str, Spec]:
    """Every tensor of a checkpoint, by our name, whole: FP8 with scales if `quantised`, else all plain.

    Tensors with `required` False may be absent. `mtp` False leaves the MTP module out.
    """
    size = sizes(args)
    plain = torch.float32 if args.dtype == "fp32" else torch.bfloat16
    found: dict[str, Spec] = {}

    def add(row: Row, ours: str = "", hf: str = "", expert: int | None = None) -> None:
        shape = tuple(size[word] for word in row.shape)
        if 0 in shape:
            return
        name, theirs = ours + row.ours, hf + row.hf
        required = row.required and not (row.hf == "lm_head.weight" and args.tie_word_embeddings)
        fp8 = row.fp8 and quantised
        dtype = torch.float8_e4m3fn if fp8 else torch.float32 if name.endswith(".bias") else plain
        found[name] = Spec(shape, dtype, theirs, row.split, expert, required)
        if fp8:
            blocks = tuple(math.ceil(n / BLOCK_SIZE) for n in shape)
            found[scale_name(name)] = Spec(blocks, torch.float32, theirs + "_scale_inv", row.split, expert, required)

    for row in TOP:
        add(row)
    for i in range(args.n_layers + (args.n_mtp_layers if mtp else 0)):
        k = i - args.n_layers
        ours, hf = (f"layers.{i}." if k < 0 else f"mtp.{k}."), f"model.layers.{i}."
        dense = i < args.n_dense_layers
        for row in (*BLOCK, *(DENSE if dense else MOE), *(MTP if k >= 0 else ())):
            add(row, ours, hf)
        for e in range(0 if dense else args.n_routed_experts):
            for row in EXPERT:
                add(row, f"{ours}ffn.experts.{e}.", f"{hf}mlp.experts.{e}.", e)
    return found


def scale_name(weight: str) -> str:
    return weight.removesuffix("weight") + "scale"


def check_ranks(args: ModelArgs, ranks: int, fp8: bool, experts: ExpertLayout = "whole") -> None:
    """Raises UserError unless the model divides over that many ranks: heads, vocabulary, widths and experts, and, where
    FP8 weights stay FP8, each rank's part of a weight into whole 128x128 blocks. The message says which counts work,
    and whether the other layout of the experts would.
    """

    def problem(n: int, experts: ExpertLayout) -> str | None:
        size = sizes(args)
        rows = [*BLOCK, *(DENSE if args.n_dense_layers else ()), *MOE]
        counts = {"n_heads": args.n_heads, "vocab_size": args.vocab_size}
        if args.n_dense_layers:
            counts["inter_dim"] = args.inter_dim
        if args.n_moe_layers or args.n_mtp_layers:
            if experts == "whole":
                counts["n_routed_experts"] = args.n_routed_experts
            counts["the shared experts' width"] = size["S"]
            if experts == "split":
                counts["moe_inter_dim"] = args.moe_inter_dim
        for what, count in counts.items():
            if count % n:
                return f"{what} {count} does not divide by {n} ranks"
        for row in rows if fp8 and n > 1 else ():
            if row.fp8 and row.split is not None and size[row.shape[row.split]] // n % BLOCK_SIZE:
                dimension = ("rows", "columns")[row.split]
                return (
                    f"{row.ours.removesuffix('.weight')} has {size[row.shape[row.split]]} {dimension}, "
                    f"which {n} ranks cannot share in whole {BLOCK_SIZE}-wide FP8 blocks"
                )
        if fp8 and n > 1 and counts.get("moe_inter_dim", 0) // n % BLOCK_SIZE:
            return (
                f"moe_inter_dim is {args.moe_inter_dim}, "
                f"which {n} ranks cannot share in whole {BLOCK_SIZE}-wide FP8 blocks"
            )
        return None

    if ranks < 1:
        raise UserError(f"the number of ranks is {ranks}, expected at least 1")
    if found := problem(ranks, experts):
        fits = ", ".join(str(n) for n in range(1, args.n_heads + 1) if not problem(n, experts))
        other: ExpertLayout = "whole" if experts == "split" else "split"
        way_out = "" if problem(ranks, other) else f"; --experts {other} works"
        raise UserError(f"{found} (it works with {fits}){way_out}")


def choose_experts(
    asked: AskedLayout,
    args: ModelArgs,
    ranks: int,
    fp8: bool,
    made: ExpertLayout | None = None,
) -> tuple[ExpertLayout, str]:
    """How the ranks share the routed experts, and a line that says why.

    Files that were made for ranks (`made`) are followed. Else "auto" splits every expert's inner width where it divides
    (into whole 128-wide blocks if the checkpoint is FP8), by the byte count: at one token a V3 layer's 8 experts are
    352 MB of FP8, 44 MB on each of 8 ranks. Whole, they lie on at most 4 of the ranks, and all wait for the busiest,
    which reads two experts, 88 MB, at the least. With many tokens every rank reads all it has either way.
    Raises UserError when asked for another layout than the files have.
    """
    if made is not None:
        if asked not in ("auto", made) and ranks > 1:
            raise UserError(f"--experts {asked}, but the files hold {made} experts: convert again, or --experts {made}")
        return made, f"experts: {made}, as the files were converted"
    if asked != "auto":
        return asked, f"experts: {asked}, as asked"
    width, unit = args.moe_inter_dim, BLOCK_SIZE if fp8 else 1
    if ranks <= 1:
        return "whole", "experts: whole, on one rank"
    if width % (ranks * unit):
        what = f"in whole {BLOCK_SIZE}-wide FP8 blocks" if fp8 else "evenly"
        return "whole", f"experts: whole, as {ranks} ranks cannot share their width of {width} {what}"
    return "split", f"experts: split, a rank has {width // ranks} of each one's width of {width}"


# --------------------------------------------------------------------------------------------------------------------
# A checkpoint on disk
# --------------------------------------------------------------------------------------------------------------------


class Checkpoint:
    """A directory of weights. Opening it reads the config and the index; `check` reads headers and scales.

    kind     "hf", "converted" (by convert.py) or "upstream" (by the original repository's converter)
    args     from its config.json; None if it has none (upstream's have none)
    ranks    the numbers of ranks it can be loaded with; None: any
    """

    def __init__(self, path: str | Path, report: Callable[[UserError], object] | None = None):
        """Raises UserError when this is no directory, or holds no checkpoint, or half of one.

        `report` gets each fault beyond which there is something left to look at; by default the first one is raised.
        """
        self.path = Path(path)
        self.report = report or _fail
        self.unreadable: set[str] = set()  # names of files, reported already
        require_folder(self.path)
        config = self.path / "config.json"
        self.args: ModelArgs | None = None
        try:
            self.args = load_config(config) if config.is_file() else None
        except UserError as e:
            self.report(e)
        self.files = sorted(p.name for p in self.path.glob("*.safetensors") if not p.name.startswith("."))
        if odd := [file for file in self.files if not file.isprintable()]:
            raise CheckpointError(f"{self.path}: {odd[0]!r} is not the name of a file of weights", repr(odd[0]))
        self.manifests = read_manifests(self.path)
        self.kind, self.ranks, self._owner = self._detect()
        self._headers: dict[str, tuple[dict[str, str], dict[str, Entry]]] = {}

    def _detect(self) -> tuple[str, tuple[int, ...] | None, dict[str, str] | None]:
        """The kind, the numbers of ranks, and the file of each tensor where an index tells."""
        names = {p.name for p in self.path.iterdir()}
        if self.manifests:
            known = {file for found in self.manifests.values() for file in (*found.files, *found.obsolete)}
            for extra in (file for file in self.files if file not in known):
                text = f"{self.path}: {extra} belongs to no index here; remove it or convert again"
                self.report(CheckpointError(text, self.path / extra))
            if cast := self.manifests.get(None):
                owner = {name: file for file, facts in cast.files.items() for name in facts["tensors"]}
                at = self.path / HF_INDEX
                if at.exists() and not cast.pending and read_json(at).get("weight_map") != owner:
                    self.report(
                        CheckpointError(f"{at}: places tensors elsewhere than {cast.path.name}; cast again", at)
                    )
                return "hf", None, owner
            return "converted", tuple(n for n in self.manifests if n is not None), None
        if HF_INDEX in names:
            return "hf", None, self._hf_index(read_json(self.path / HF_INDEX).get("weight_map"))
        if not self.files:
            if any(name.startswith(TEMPORARY) for name in names):
                raise UserError(f"{self.path}: an unfinished conversion and nothing else; run the conversion again")
            raise UserError(f"{self.path}: no checkpoint here (no .safetensors files)")
        ranked = [re.fullmatch(r"model(\d+)-mp([1-9]\d*)(-\d+-of-\d+)?\.safetensors", file) for file in self.files]
        if all(ranked):
            for file in self.files:
                if read_header(self.path / file)[0].get("format") == FORMAT:
                    text = f"{self.path / file}: its manifest is missing; copy the directory or convert again"
                    raise CheckpointError(text, self.path / file)
            counts = {int(m[2]) for m in ranked if m}
            for m in filter(None, ranked):
                if m[3] or int(m[1]) >= int(m[2]):
                    text = f"{self.path / m[0]}: not a file of {m[2]} ranks, which are model0-mp{m[2]} …; remove it"
                    self.report(CheckpointError(text, self.path / m[0]))
            return "upstream", tuple(sorted(counts)), None
        if self.files == ["model.safetensors"]:
            return "hf", None, None
        raise UserError(f"{self.path}: {len(self.files)} .safetensors files but no {HF_INDEX} beside them")

    def _hf_index(self, index: Any) -> dict[str, str]:
        at = self.path / HF_INDEX
        if not isinstance(index, dict) or not index:
            raise CheckpointError(f"{at}: expected a weight_map of tensor names to files", at, "", "a weight_map")
        named: dict[str, str] = {}
        for name, file in index.items():
            try:
                check_file_name(at, name, file)
                named[name] = file
            except UserError as e:
                self.report(e)
        listed = set(named.values())
        for missing in sorted(listed - set(self.files)):
            self.report(
                CheckpointError(f"{self.path / missing}: missing, but {HF_INDEX} names it", self.path / missing)
            )
            self.unreadable.add(missing)
        for extra in sorted(set(self.files) - listed):
            text = f"{self.path / extra}: not named by {HF_INDEX}; remove it or repair the index"
            self.report(CheckpointError(text, self.path / extra))
        self.files = sorted(listed & set(self.files))
        return named

    def _header(self, file: str, path: Path | None = None) -> tuple[dict[str, str], dict[str, Entry]]:
        if file not in self._headers:
            self._headers[file] = read_header(path or self.path / file)
        return self._headers[file]

    def _tensors(self, file: str) -> dict[str, Entry]:
        """A file's tensors; none, once that is reported, if it is not readable."""
        try:
            return {} if file in self.unreadable else self._header(file)[1]
        except UserError as e:
            self._lack(file, e)
            return {}

    def on_disk(self, group: Group = SOLO) -> dict[str, Entry]:
        """The tensors on disk for a rank, by the names the files use; whole tensors in an "hf" directory.

        Raises UserError when files are missing, damaged, or not what the index says.
        """
        if self.ranks is not None and group.size not in self.ranks:
            made, n = " or ".join(map(str, self.ranks)), group.size
            raise UserError(f"{self.path}: converted for {made} ranks, not {n}; start as many, or convert for {n}")
        if manifest := self.manifest(group.size):
            for sentence in manifest.changed() if group.rank == 0 else ():
                warn(sentence)
            try:
                return manifest.entries(group.rank if manifest.ranks else None, self._header)
            except UserError as e:
                self._lack(f"of rank {group.rank}", e)
                return {}
        if self.kind == "upstream":
            files = [f"model{rank}-mp{group.size}.safetensors" for rank in range(min(group.size, len(self.files) + 1))]
            for missing in (file for file in files if file not in self.files):
                self._lack(missing, CheckpointError(f"{self.path / missing}: missing", self.path / missing))
            return self._tensors(files[group.rank]) if group.rank < len(files) else {}
        found: dict[str, Entry] = {}
        for file in self.files:
            tensors = self._tensors(file)
            if file not in self.unreadable and CAST_MARK.items() <= self._header(file)[0].items():
                text = f"{self.path / CAST_MANIFEST}: missing, though the cast wrote {file}; copy it too, or cast again"
                self.report(CheckpointError(text, self.path / CAST_MANIFEST))
            for name, entry in tensors.items():
                if self._owner is not None and (where := self._owner.get(name)) != file:
                    said = f"places it in {where}" if where else "does not name it"
                    self.report(CheckpointError(f"{entry}: {HF_INDEX} {said}", entry.file, name, where or "", file))
                found[name] = entry
        owner = self._owner or {}
        for name in sorted(owner.keys() - found.keys()):
            if (file := owner[name]) not in self.unreadable:
                text = f"{self.path / file}: {name} is missing, but {HF_INDEX} places it there"
                self.report(CheckpointError(text, self.path / file, name, "the tensor", "nothing"))
        return found

    def _lack(self, file: str, problem: UserError) -> None:
        """A file that is not there, or not what it should be: its tensors are not asked for."""
        self.unreadable.add(file)
        self.report(problem)

    def manifest(self, ranks: int) -> Manifest | None:
        """What a load on that many ranks goes by, if this program wrote the directory."""
        return self.manifests.get(ranks) or self.manifests.get(None)

    def experts(self, ranks: int) -> ExpertLayout | None:
        """How files made for that many ranks share the routed experts; None where the files are whole."""
        if self.kind == "converted" and ranks in self.manifests:
            return self.manifests[ranks].experts
        return None if self.kind == "hf" else "whole"

    def _names(self) -> dict[str, torch.dtype | None]:
        """Every rank's tensor names, with dtypes where a header had to be read for them."""
        if self.kind == "converted":
            manifest = next(iter(self.manifests.values()))
            return dict.fromkeys(name for file in manifest.files.values() for name in file["tensors"])
        if self.kind == "hf" and self._owner is not None:
            return dict.fromkeys(self._owner)
        return {name: entry.dtype for file in self.files for name, entry in self._tensors(file).items()}

    @functools.cached_property
    def has_mtp(self) -> bool:
        """Whether the MTP module is there (the original converter leaves it out)."""
        return any(re.match(r"mtp\.|.*\.(eh_proj|enorm|hnorm|shared_head)\.", name) for name in self._names())

    @functools.cached_property
    def quantised(self) -> bool:
        """Whether the linear layers are stored as FP8 with block scales."""
        fp8 = torch.float8_e4m3fn
        return any(d == fp8 or n.endswith((".scale", ".weight_scale_inv")) for n, d in self._names().items())

    def check(self, args: ModelArgs, group: Group = SOLO, experts: AskedLayout = "auto") -> dict[str, Entry]:
        """Everything that can be known without reading the weights: what `match` finds, and bad scales.

        Returns and raises as `match` does.
        """
        found = self.match(args, group, experts)
        scales = [entry for name, entry in found.items() if name.endswith(".scale")]
        with Reader() as reader:
            for entry in sorted(scales, key=lambda e: (e.file, e.start)):
                if problem := bad_scale(entry, reader.read(entry)):
                    self.report(problem)
        return found

    def match(self, args: ModelArgs, group: Group = SOLO, experts: AskedLayout = "auto") -> dict[str, Entry]:
        """Holds the headers to the config: files, names, shapes, dtypes.

        Returns the entries a rank needs, by our names; in an "hf" directory they are whole tensors, of which the rank
        may need a part (of routed experts as `experts` says, see choose_experts). Raises UserError naming file, tensor,
        what was expected and what was found.
        """
        made = self.experts(group.size)
        layout, _ = choose_experts(experts, args, group.size, self.quantised, made)
        check_ranks(args, group.size, fp8=False, experts=layout)
        if self.args is not None and (self.args.dtype == "fp8") != self.quantised:
            said, held = ("no", "") if self.quantised else ("a", "no ")
            text = f"{self.path}: config.json has {said} quantization_config, but the files hold {held}FP8 scales"
            self.report(CheckpointError(text, self.path / "config.json"))
        on_disk = self.on_disk(group)
        expected = expected_tensors(args, self.quantised, self.has_mtp)
        hf = self.kind == "hf"
        found: dict[str, Entry] = {}
        rounded = ""
        for name, spec in expected.items():
            cut = spec.cut(group, args, layout)
            entry = on_disk.get(spec.hf if hf else name)
            if entry is None:
                if cut is not None and spec.required:
                    self._missing(spec.hf if hf else name, spec)
                continue
            shape = spec.shape if hf or cut is None else tuple(b - a for a, b in cut)
            dtype = spec.dtype
            if name.endswith("gate.bias") and entry.dtype == torch.bfloat16 and not self.quantised:
                dtype, rounded = entry.dtype, entry.name  # as transformers saves it; widening it loses nothing more
            if (entry.dtype, entry.shape) != (dtype, shape):
                wanted, got = describe(spec.dtype, shape), describe(entry.dtype, entry.shape)
                self.report(
                    CheckpointError(f"{entry}: expected {wanted}, found {got}", entry.file, entry.name, wanted, got)
                )
                continue
            if cut is None and not hf:
                text = f"{entry}: belongs to another rank than {group.rank} of {group.size}"
                self.report(CheckpointError(text, entry.file, entry.name))
            if cut is not None:
                found[name] = entry
        if rounded and group.rank == 0:
            warn(f"{self.path}: {rounded} and its like are BF16, not float32: they were rounded when they were saved")
        known = {spec.hf for spec in expected.values()} if hf else expected.keys()
        for name, entry in on_disk.items():
            if name not in known and not name.endswith(IGNORED):
                self.report(
                    CheckpointError(f"{entry}: the config has no such tensor", entry.file, name, "nothing", str(entry))
                )
        return found

    def _missing(self, name: str, spec: Spec) -> None:
        if self.unreadable:
            return  # it may have been there
        wanted = describe(spec.dtype, spec.shape)
        why = "missing: an FP8 weight without its scale" if name.endswith((".scale", "_scale_inv")) else "missing"
        self.report(CheckpointError(f"{self.path}: {name} is {why} ({wanted})", self.path, name, wanted, "nothing"))


def bad_scale(entry: Entry, scale: torch.Tensor) -> CheckpointError | None:
    """What is wrong with an FP8 weight's scales: float32, one a block."""
    bad = (~(scale.isfinite() & (scale > 0))).nonzero().tolist()
    if not bad:
        return None
    wanted, found = "finite, positive scales", f"{scale[tuple(bad[0])].item()} at {bad[0]}"
    return CheckpointError(f"{entry}: expected {wanted}, found {found}", entry.file, entry.name, wanted, found)


def choose_args(checkpoint: Checkpoint, config: str | Path | None) -> ModelArgs:
    """The checkpoint's own config, which `config` must not contradict, or, where it has none, `config`."""
    if checkpoint.args is not None:
        if config is not None:
            agree(config, checkpoint.args)
        return checkpoint.args
    if config is None:
        raise UserError(f"{checkpoint.path} has no config.json; name its model with --config configs/…")
    args = load_config(config)
    stored = "fp8" if checkpoint.quantised else "bf16" if args.dtype == "fp8" else args.dtype
    return replace(args, dtype=stored)  # converted files may be a BF16 cast of the FP8 model that --config describes


def _fail(problem: UserError) -> None:
    raise problem


# --------------------------------------------------------------------------------------------------------------------
# Into a model
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Piece:
    """A tensor on disk (or the part a rank wants of it) and the parameter, or rows of a stacked one, it fills."""

    entry: Entry
    cut: tuple[tuple[int, int], ...]
    target: torch.Tensor
    scale: Entry | None = None  # set when FP8 is dequantised on the way


def load_into(model: nn.Module, checkpoint: Checkpoint, group: Group = SOLO, progress: bool = True) -> None:
    """Fills every parameter of one rank's model in place, reading only that rank's part of the checkpoint.

    FP8 weights stay FP8 where the parameter is, and else become float32(q) * scale, rounded once to the parameter's
    dtype. Stacked parameters are filled piece by piece. Everything is checked before the first byte is read.
    Raises UserError when the checkpoint is damaged or does not fit the model.
    """
    pieces = plan_load(model, checkpoint, group)
    clear_gaps(model)
    total = sum(p.entry.row_bytes * (p.cut[0][1] - p.cut[0][0]) for p in pieces)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=not progress or group.rank != 0)
    with bar, Reader() as reader, torch.no_grad():
        scales = {id(p): reader.read(p.scale) for p in sorted(pieces, key=_scale_place) if p.scale}
        for piece in sorted(pieces, key=lambda p: (p.entry.file, p.entry.start)):
            _fill(piece, scales.pop(id(piece), None), reader, bar)


def require_equal(main: Entry, copy: Entry) -> None:
    """Raises CheckpointError unless the two have the same bytes. Other types or shapes are told elsewhere."""
    if (main.dtype, main.shape) != (copy.dtype, copy.shape):
        return
    with Reader(1 << 20) as a, Reader(1 << 20) as b:
        for (row, left), (_, right) in zip(a.rows(main), b.rows(copy), strict=True):
            if not torch.equal(left, right):
                row += int((left != right).any(dim=1).nonzero()[0])
                wanted, found = f"the bytes of {main}", f"others from row {row} on"
                raise CheckpointError(f"{copy}: expected {wanted}, found {found}", copy.file, copy.name, wanted, found)


def _scale_place(piece: Piece) -> tuple[str, int]:
    return (str(piece.scale.file), piece.scale.start) if piece.scale else ("", 0)


def plan_load(model: nn.Module, checkpoint: Checkpoint, group: Group) -> list[Piece]:
    """A piece for each parameter, or each tensor of a stacked one; raises UserError where they do not match."""
    args: ModelArgs = model.args  # type: ignore[assignment]
    experts: ExpertLayout = model.num.experts  # type: ignore[assignment, union-attr]
    parameters = dict(model.named_parameters())
    keeps_fp8 = any(p.dtype == torch.float8_e4m3fn for p in parameters.values())
    # files made for ranks have cut the scales already, whatever becomes of the weights
    check_ranks(args, group.size, keeps_fp8 or (checkpoint.kind != "hf" and checkpoint.quantised), experts)
    if checkpoint.kind == "upstream" and group.rank == 0:
        warn(f"{checkpoint.path} was converted by another program: no MTP module, no checksums, no config.json")
    elif args.n_mtp_layers and not checkpoint.has_mtp and group.rank == 0:
        warn(f"{checkpoint.path} has no MTP module, though its config names one")
    entries = checkpoint.check(args, group, experts)
    if args.tie_word_embeddings and "head.weight" in entries:  # then it must be the embedding
        require_equal(entries["embed.weight"], entries["head.weight"])
    if keeps_fp8 and not checkpoint.quantised:
        raise UserError(f"{checkpoint.path}: the model wants FP8 weights, the checkpoint is not FP8")
    expected = expected_tensors(args, checkpoint.quantised, checkpoint.has_mtp)
    pieces: list[Piece] = []
    used: set[str] = set()
    for parameter, target in parameters.items():
        for name, part in _disk_names(model, parameter, target, held_experts(args, group, experts)):
            if name not in entries:
                raise UserError(f"{checkpoint.path}: nothing there for the model's {parameter}")
            # a converted file holds the rank's part already
            cut = expected[name].cut(group, args, experts) if checkpoint.kind == "hf" else None
            pieces.append(_piece(name, part, entries, cut, args))
            used |= {name} | ({scale_name(name)} if pieces[-1].scale else set())
    optional = {name for name, spec in expected.items() if not spec.required or name.startswith("mtp.")}
    if unused := sorted(entries.keys() - used - optional):
        raise UserError(f"{entries[unused[0]]}: the model has no place for it")
    return pieces


def _disk_names(
    model: nn.Module, parameter: str, target: torch.Tensor, held: range
) -> Iterator[tuple[str, torch.Tensor]]:
    """A parameter's names on disk, each with the part of it that tensor fills.

    Stacked experts are tensors of their own there, and so are the projections of one input that model.Linear stacks.
    """
    owner, _, leaf = parameter.rpartition(".")
    linear: Any = model.get_submodule(owner)
    before, stacked, projection = owner.partition(".experts.")
    if stacked:
        assert len(target) == len(held), f"{parameter} stacks {len(target)} experts, this rank has {len(held)}"
        whole = [(f"{before}.experts.{e}.{projection}", rows) for e, rows in zip(held, target, strict=True)]
    else:
        whole = [(owner, target)]
    for name, rows in whole:
        if not (parts := getattr(linear, "parts", None)):
            yield f"{name}.{leaf}" if name else leaf, rows
            continue
        unit = BLOCK_SIZE if leaf == "scale" else 1
        for start, (part, width) in zip(linear.starts, parts.items(), strict=True):
            first = start // unit
            sibling = ".".join((*name.split(".")[:-1], part, leaf))
            yield sibling, rows[first : first + math.ceil(width / unit)]


def clear_gaps(model: nn.Module) -> None:
    """Zeros the rows between stacked FP8 projections, which no tensor fills."""
    for module in model.modules():
        if parts := getattr(module, "parts", None):
            linear: Any = module
            if sum(parts.values()) < linear.weight.shape[-2]:
                linear.weight.data.view(torch.uint8).zero_()


def _piece(
    name: str,
    target: torch.Tensor,
    entries: dict[str, Entry],
    cut: tuple[tuple[int, int], ...] | None,
    args: ModelArgs,
) -> Piece:
    """`cut` None: all of the tensor."""
    entry = entries[name]
    cut = cut or tuple((0, n) for n in entry.shape)
    piece = Piece(entry, cut, target)
    shape = tuple(b - a for a, b in cut)
    if shape != target.shape:
        raise UserError(f"{entry}: the model's {name} is {tuple(target.shape)}, the checkpoint's part for it {shape}")
    if entry.dtype == torch.float8_e4m3fn and target.dtype != entry.dtype:
        piece.scale = entries[scale_name(name)]
    # nothing may lose precision unnoticed: the router's bias and the scales are float32 in memory as they are on disk
    exact = target.dtype == entry.dtype
    widened = entry.dtype == torch.bfloat16 and target.dtype == torch.float32
    asked = entry.dtype == torch.float32 and args.dtype == "fp32" and not name.endswith((".bias", ".scale"))
    if not (exact or widened or asked or piece.scale):
        wanted, got = describe(target.dtype, shape), describe(entry.dtype, shape)
        raise UserError(f"{entry}: the model's {name} is {wanted}, the checkpoint's is {got}")
    return piece


def _fill(piece: Piece, scale: torch.Tensor | None, reader: Reader, bar: Any) -> None:
    entry, target = piece.entry, piece.target
    (first, last), columns = piece.cut[0], piece.cut[1:]
    raw = target.dtype == entry.dtype
    width = entry.row_bytes if raw else entry.row_bytes // entry.dtype.itemsize
    flat = target.view(len(target), -1)
    if raw:  # bytes are bytes: no arithmetic on FP8
        flat = flat.view(torch.uint8)
    unit = width // (entry.shape[1] if columns else 1)
    start, stop = (columns[0][0] * unit, columns[0][1] * unit) if columns else (0, width)
    if scale is not None:
        across = torch.arange(start, stop) // BLOCK_SIZE
    for row, window in reader.rows(entry, first, last):
        data = window if raw else window.view(entry.dtype)
        data = data[:, start:stop].to(target.device)
        if scale is not None:
            down = torch.arange(row, row + len(data)) // BLOCK_SIZE
            data = data.float() * scale[down][:, across].to(target.device)
        flat[row - first : row - first + len(data)].copy_(data)
        bar.update(window.numel())


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
