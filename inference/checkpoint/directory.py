"""A directory of weights as it lies on disk, and whether its files are what its config asks for."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint.detect import Detected
from checkpoint.manifest import HF_FORMATS, HF_INDEX, HF_MANIFEST
from checkpoint.packed import LAYOUTS, contradiction, unpack
from checkpoint.partition import Partition, choose_files
from checkpoint.reading import DTYPE_NAMES, Entry, Reader, dtype_and_shape, read_header
from checkpoint.stacked import unstack
from checkpoint.table import (
    FP8,
    IGNORED,
    PLAIN,
    Spec,
    expected_tensors,
    has_experts,
    quantised_form,
    quantised_rows,
    stored_dtype,
)  # fmt: skip
from checkpoint.unsupported import require_checkpoint
from core.config import ModelArgs, check_agreement, hf_prefix, load_config
from core.errors import CheckpointError, CheckWarning, UserError, warn
from core.files import read_json
from core.hf_config import text_config
from core.quantization_config import UNCONVERTED, Quantisation, quantisation
from core.run_config import AskedLayout, ExpertLayout

# beginnings of names beside the text model's in a multimodal checkpoint (Kimi-K2.5), as released and as transformers
# has them in memory
VISION = tuple(f"{model}{part}." for model in ("", "model.") for part in ("vision_tower", "mm_projector"))
SCALE_NAME = re.compile(r"(weight_scale_inv|scale)$")
LARGEST_SCALE = torch.finfo(torch.bfloat16).max / torch.finfo(FP8).max  # the last power of two below is 2^119
QUANTISED = {FP8: "FP8", torch.int8: "INT8", torch.uint8: "INT4"}
SCALE_NAMES = (".scale", "_scale_inv", ".weight_scale", ".scales")  # ours, and those of the formats


class Checkpoint:
    """A directory of weights. Opening it reads the config and the index; `check` reads headers and scales.

    kind     "hf", "converted" (by convert.py) or "upstream" (by the original repository's converter)
    args     from its config.json; None if it has none (upstream's have none)
    ranks    the numbers of ranks that its files were made for; None: whole tensors, for any number
    """

    def __init__(self, path: str | Path, report: Callable[[UserError], object] | None = None):
        """Raises UserError when this is no directory, or holds no checkpoint, or half of one.

        `report` is called with each fault after which checks can go on; by default the first fault is raised.
        """
        self.path = Path(path)
        self.report = report or _raise
        require_checkpoint(self.path)
        config = self.path / "config.json"
        self.args: ModelArgs | None = None
        try:
            self.args = load_config(config) if config.is_file() or config.is_symlink() else None
        except UserError as e:
            self.report(e)
        found = Detected(self.path, self.report)
        self.kind, self.ranks, self._owner = found.kind, found.ranks, found.owner
        self.files, self.manifests = found.files, found.manifests
        self.unreadable = found.unreadable  # names of files whose fault was reported
        self.notes = found.notes  # sentences worth a warning
        self._headers: dict[str, tuple[dict[str, str], dict[str, Entry]]] = {}
        self._expected: dict[ModelArgs, dict[str, Spec]] = {}
        self._is_multimodal = False
        self._skipped: tuple[str, ...] = ()  # beginnings of the names of tensors that are not the model's
        if self.args is not None:
            self.args = self.describe(config, self.args)

    def describe(self, config: Path, args: ModelArgs) -> ModelArgs:
        """`args`, read from `config`, with what the files alone say of the model, and all notes among its warnings."""
        self._is_multimodal = bool(hf_prefix(read_json(config)))
        if self._is_multimodal and self.kind == "hf":
            self._skipped += VISION
            if count := sum(name.startswith(VISION) for name in self._names()):
                text = f"{count} tensors of the vision model are left out: the text model alone is computed"
                self.notes.append(f"{self.path}: {text}")
        if not args.n_mtp_layers:
            args = self._with_mtp_layer(args)
        return replace(args, warnings=(*args.warnings, *self.notes))

    def _with_mtp_layer(self, args: ModelArgs) -> ModelArgs:
        """`args` with the MTP module that the files hold after the main model's layers, where its config has none."""
        names = {self.table_name(name) for name in self._names()}
        before, gate = "mtp.0.", "ffn.gate.weight"
        if self.kind == "hf":
            before, gate = f"model.layers.{args.n_layers}.", "mlp.gate.weight"
        if not all(f"{before}{name}.weight" in names for name in ("eh_proj", "enorm", "hnorm")):
            return args
        if before + gate not in names:
            self._skipped += (before,)
            self.notes.append(f"{self.path}: its MTP module is left out: one with a dense MLP is not implemented")
            return args
        text = "the files hold an MTP module that the config does not mention (num_nextn_predict_layers): it is loaded"
        self.notes.append(f"{self.path}: {text}")
        return replace(args, n_mtp_layers=1)

    def _header(self, file: str, path: Path | None = None) -> tuple[dict[str, str], dict[str, Entry]]:
        if file not in self._headers:
            self._headers[file] = read_header(path or self.path / file)
        return self._headers[file]

    def _tensors(self, file: str) -> dict[str, Entry]:
        """A file's tensors; none if it cannot be read, which is reported once."""
        try:
            return {} if file in self.unreadable else self._header(file)[1]
        except UserError as e:
            self.mark_unreadable(file, e)
            return {}

    def on_disk(self, rank: int = 0, ranks: int = 1) -> dict[str, Entry]:
        """The tensors on disk for a rank, by the names that the files use; whole tensors in an "hf" directory.

        Raises UserError when files are missing, damaged, or not what the index says.
        """
        if self.ranks is not None and ranks not in self.ranks:
            raise self._made_for_others(ranks)
        if manifest := self.manifests.get(ranks) or self.manifests.get(None):
            try:
                return manifest.entries(rank if manifest.ranks else None, self._header)
            except UserError as e:
                self.mark_unreadable(f"of rank {rank}", e)
                return {}
        if self.kind == "upstream":
            files = [f"model{r}-mp{ranks}.safetensors" for r in range(min(ranks, len(self.files) + 1))]
            for missing in (file for file in files if file not in self.files):
                self.mark_unreadable(missing, CheckpointError(f"{self.path / missing}: missing", self.path / missing))
            return self._tensors(files[rank]) if rank < len(files) else {}
        found: dict[str, Entry] = {}
        for file in self.files:
            tensors = self._tensors(file)
            author = "" if file in self.unreadable else self._header(file)[0].get("written_by")
            if author in HF_FORMATS.values():
                at = self.path / HF_MANIFEST
                text = f"{at}: missing, though {author}.py wrote {file}; copy it too, or run {author}.py again"
                self.report(CheckpointError(text, at))
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

    def tensors(self, args: ModelArgs, rank: int = 0, ranks: int = 1) -> dict[str, Entry]:
        """The same with stacked experts as single ones and quantised weights in our layout, by the names that released
        FP8 files would have for them."""
        found: dict[str, Entry] = {}
        seen: dict[str, Entry] = {}
        for name, entry in self._unpacked(self.on_disk(rank, ranks)):
            try:
                for single, part in unstack(name, entry, args):
                    if (other := seen.setdefault(self.table_name(single), part)) is not part:
                        raise CheckpointError(f"{part}: the same as {other}; remove one", entry.file, entry.name)
                    found[single] = part
            except CheckpointError as e:
                self.mark_unreadable(str(entry), e)
        return found

    def _unpacked(self, entries: dict[str, Entry]) -> Iterator[tuple[str, Entry]]:
        try:
            yield from unpack(entries, self.quantisation if self.kind == "hf" else None)
        except CheckpointError as e:
            self.mark_unreadable(str(e.file), e)

    @functools.cached_property
    def quantisation(self) -> Quantisation | None:
        """How its config.json says that weights are quantised."""
        if self.args is None:
            return None
        return quantisation(text_config(read_json(self.path / "config.json"))[0])

    def mark_unreadable(self, file: str, problem: UserError) -> None:
        """Reports a file that is missing or damaged. Its tensors are not reported as missing."""
        self.unreadable.add(file)
        self.report(problem)

    def experts(self, ranks: int) -> ExpertLayout | None:
        """The layout of the routed experts in files that were made for that many ranks; None for whole tensors, from
        which either can be read."""
        if self.kind == "hf" or ranks == 1:
            return None
        return self.manifests[ranks].experts if ranks in self.manifests else "whole"

    def made_for(self, ranks: int, lanes: int = 1, stages: int = 1) -> int:
        """The number of ranks whose files such a run reads: its own, else the most for which each part that one of its
        ranks holds lies within one file's part. Whole tensors, an "hf" directory's, are those of one rank. `ranks` are
        those of one of so many stages; into which stages files are cut does not matter.

        Raises UserError where there are no such files.
        """
        if self.ranks is None:
            return 1
        if (found := choose_files(self.ranks, ranks, lanes)) is None:
            raise self._made_for_others(ranks, lanes, stages)
        return found

    def partition_of_files(self, partition: Partition) -> Partition:
        """How weights are divided over the files that its ranks read. Raises UserError as `made_for` does."""
        if self.kind == "hf" or (made_for := self.made_for(partition.ranks, partition.lanes)) == partition.ranks:
            return partition
        return Partition(partition.args, made_for, partition.experts, partition.quantised)

    def layers_of_stages(self, args: ModelArgs, ranks: int, stages: int) -> str | None:
        """The layers of each stage as --pp-layers has them, where files for that many ranks of a stage were converted
        for as many stages: then each rank reads its own files alone. Files for other stages are read too. Raises
        CheckpointError as `check_stages` reports it."""
        self.check_stages(args)
        manifest = self.manifests.get(self.made_for(ranks)) if self.kind == "converted" else None
        if manifest is None or stages == 1 or len(manifest.stages) != stages:
            return None
        return ",".join(map(str, manifest.stages))

    def check_stages(self, args: ModelArgs) -> None:
        """Reports manifests with stages of another number of layers than the model's."""
        for manifest in self.manifests.values():
            if manifest.stages and sum(manifest.stages) != args.n_layers:
                counts = ", ".join(map(str, manifest.stages))
                text = f"{manifest.path}: stages of {counts} layers, but the model has {args.n_layers}"
                self.report(CheckpointError(text, manifest.path))

    def _made_for_others(self, ranks: int, lanes: int = 1, stages: int = 1) -> UserError:
        counts = " or ".join(map(str, self.ranks or ()))
        wanted = f"not {ranks}; start as many, or convert for {ranks}"
        if lanes > 1:
            wanted = f"not {ranks} in {lanes} lanes; convert for {ranks // lanes}, or give the original files"
        if stages > 1:
            needs = ", ".join(f"--pp {stages} takes {n * stages}" for n in self.ranks or ())
            wanted = f"not {ranks} in each of {stages} stages: {needs}, or convert for {ranks}"
        return UserError(f"{self.path}: converted for {counts} ranks, {wanted}")

    def partition(
        self,
        args: ModelArgs,
        ranks: int,
        asked: AskedLayout = "auto",
        quantised: frozenset[str] = frozenset(),
        lanes: int = 1,
        stages: int = 1,
    ) -> Partition:
        """How its weights are divided over `ranks` ranks, those of all lanes, or of one of several stages. `quantised`:
        the rows of the table that stay so when they are loaded or converted.

        Raises UserError as Partition.choose and `made_for` do.
        """
        made_for = self.made_for(ranks, lanes, stages)
        stored = quantised_rows(self.expected(args))
        if self.kind != "hf":  # files made for ranks hold parts of the scales
            quantised |= stored
        return Partition.choose(
            args, ranks, asked, self.experts(made_for), quantised, has_experts(stored), lanes
        )

    def expected(self, args: ModelArgs) -> dict[str, Spec]:
        """Every tensor that the config asks for, by our name, in the dtype that it is stored in, if it may be. The same
        on all ranks. Raises UserError when files are missing or damaged."""
        if args not in self._expected:
            found = self._dtypes(args)
            specs = expected_tensors(args, self.quantised, self.has_mtp)
            others: frozenset[tuple[str, torch.dtype]] = frozenset()
            for _ in range(2):  # a weight that is quantised against what is usual has scales, which have a dtype too
                stored = ((name, found.get(spec.hf if self.kind == "hf" else name)) for name, spec in specs.items())
                unusual = ((n, d) for n, d in stored if d is not None and d != specs[n].dtype and d in specs[n].allowed)
                if not (more := frozenset(unusual)):
                    break
                others |= more
                specs = expected_tensors(args, self.quantised, self.has_mtp, others)
            self._expected[args] = specs
        return self._expected[args]

    def _dtypes(self, args: ModelArgs) -> dict[str, torch.dtype]:
        """Every rank's tensors, by their names in the table."""
        if self.kind == "hf":  # any rank: warnings are for rank 0 to give
            return {self.table_name(name): entry.dtype for name, entry in self.tensors(args, rank=1).items()}
        if not self.manifests:
            return {name: entry.dtype for file in self.files for name, entry in self._tensors(file).items()}
        found: dict[str, torch.dtype] = {}
        manifest = next(iter(self.manifests.values()))
        for file, record in manifest.files.items():
            if manifest.experts == "whole" or record["rank"] == 0:  # with split experts all ranks have all tensors
                with contextlib.suppress(UserError):  # which `on_disk` raises or reports
                    tensors = self._header(file, manifest.where(file))[1]
                    found |= {name: entry.dtype for name, entry in tensors.items()}
        return found

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
        """Whether linear layers are stored quantised, with scales beside them."""
        ends = (".scale", ".weight_scale_inv", *(weight for weight, _ in LAYOUTS.values()))
        return any(d == FP8 or n.endswith(ends) for n, d in self._names().items())

    def check(self, partition: Partition, rank: int = 0) -> dict[str, Entry]:
        """Checks what can be known without reading the weights: what `match` checks, and the scales' values.

        Returns and raises as `match` does.
        """
        found = self.match(partition, rank)
        scales = [entry for name, entry in found.items() if name.endswith(".scale")]
        with Reader() as reader:
            for entry in sorted(scales, key=lambda e: (e.file, e.start)):
                if problem := scale_error(entry, reader.read(entry).float(), bool(partition.args.group_size)):
                    self.report(problem)
        for problem in self.contradictory_values(rank, partition.ranks):
            self.report(problem)
        return found

    def contradictory_values(self, rank: int, ranks: int) -> Iterator[CheckpointError]:
        """What tensors that only repeat what others say have otherwise: shapes, and the groups of channels."""
        if self.kind != "hf" or (quant := self.quantisation) is None or quant.method not in LAYOUTS:
            return
        entries = self.on_disk(rank, ranks)
        with Reader() as reader:
            for name, entry in sorted(entries.items(), key=lambda item: (item[1].file, item[1].start)):
                if wrong := contradiction(name, entry, entries, quant, reader):
                    yield CheckpointError(f"{entry}: {wrong}", entry.file, entry.name)

    def match(self, partition: Partition, rank: int = 0) -> dict[str, Entry]:
        """Checks the headers against the config: files, names, shapes, dtypes.

        Returns the tensors that a rank needs, by our names. In an "hf" directory they are whole, and the rank may need
        a part of each. Raises CheckpointError, which names the file, the tensor, what was expected and what was found.
        """
        if self.args is not None and self.args.is_quantised != self.quantised:
            kind = quantised_form(self.args).kind.upper()
            said, held = "a", f"no {kind} scales (weight_scale_inv); remove it, if they are a BF16 cast"
            if kind != "FP8":
                held = f"no {kind} weights; remove it, if they are plain"
            if self.quantised:
                fp8 = any(name.endswith((".scale", "_scale_inv")) for name in self._names())
                said = "no"
                held = f"{'FP8 scales' if fp8 else 'quantised weights'}; get the config.json that belongs to them"
            text = f"{self.path}: config.json has {said} quantization_config, but the files hold {held}"
            self.report(CheckpointError(text, self.path / "config.json"))
        self.check_stages(partition.args)
        tensors = self.tensors(partition.args, rank, partition.ranks)
        on_disk = {self.table_name(name): entry for name, entry in tensors.items()}
        for problem in self._contradictions(tensors):
            self.report(problem)
        expected = self.expected(partition.args)
        hf = self.kind == "hf"
        found: dict[str, Entry] = {}
        rounded = ""
        for name, spec in expected.items():
            cut = partition.cut(spec, rank)
            entry = on_disk.get(spec.hf if hf else name)
            if entry is None or (0 in entry.shape and not spec.required):
                if cut is not None and spec.required:
                    self._report_missing(spec.hf if hf else name, spec)
                continue
            shape = spec.shape if hf or cut is None else tuple(b - a for a, b in cut)
            if name.endswith("gate.bias") and spec.dtype != torch.float32:
                rounded = f"{entry.name} and its like are {DTYPE_NAMES[spec.dtype]}"
            if (entry.dtype, entry.shape) != (spec.dtype, shape):
                wanted, got = dtype_and_shape(spec.dtype, shape), dtype_and_shape(entry.dtype, entry.shape)
                others = [DTYPE_NAMES[dtype] for dtype in spec.allowed if dtype != spec.dtype]
                if others and entry.dtype not in spec.allowed:
                    wanted += f" (or {', '.join(others)})"
                text = f"{entry}: expected {wanted}, found {got}"
                self.report(CheckpointError(text, entry.file, entry.name, wanted, got))
                continue
            if cut is None and not hf:
                text = f"{entry}: belongs to another rank than {rank} of {partition.ranks}"
                self.report(CheckpointError(text, entry.file, entry.name))
            if cut is not None:
                found[name] = entry
        if rounded and rank == 0:
            text = f"{self.path}: {rounded}, not float32: they were rounded when they were saved"
            if self.report is _raise:
                warn(text)
            else:
                self.report(CheckWarning(text, self.path))
        known = {spec.hf for spec in expected.values()} if hf else expected.keys()
        for name, entry in on_disk.items():
            if name not in known and not self.ignores(entry):
                weight = on_disk.get(re.sub(SCALE_NAME, "weight", name))
                text = f"{entry}: the config has no such tensor"
                if weight is not None and weight.dtype in PLAIN and weight is not entry:
                    held = DTYPE_NAMES[weight.dtype]
                    text = f"{weight}: expected F8_E4M3, as {entry} is there for it, or no scale; found {held}"
                self.report(CheckpointError(text, entry.file, entry.name, "nothing", str(entry)))
        return found

    def table_name(self, name: str) -> str:
        """A tensor's name in the table (see table.py). A text model within a multimodal one has the prefix
        `language_model.` in the files. transformers has it after `model.` in memory, and renames layers to blocks as it
        saves the model (5.23, which takes them for the vision model's)."""
        if not self._is_multimodal:
            return name
        name = re.sub(r"^(model\.)?language_model\.", r"\1", name)
        return re.sub(r"^model\.blocks\.", "model.layers.", name)

    def _contradictions(self, tensors: dict[str, Entry]) -> Iterator[CheckpointError]:
        """Quantised weights of modules that config.json names among those that are not. Only whole names count:
        programs differ in how they read patterns and parts of names."""
        raw, _ = text_config(read_json(self.path / "config.json") if self.args else {})
        quantisation = raw.get("quantization_config") or {}
        for field in UNCONVERTED:
            for module in quantisation.get(field) or ():
                if (entry := tensors.get(f"{module}.weight")) is not None and entry.dtype in QUANTISED:
                    kind = QUANTISED[entry.dtype]
                    text = f"{entry}: {kind}, but config.json's quantization_config.{field} names {module}"
                    found = dtype_and_shape(entry.dtype, entry.shape).split()[0]
                    yield CheckpointError(text, entry.file, entry.name, f"a weight that is not {kind}", found)

    def ignores(self, entry: Entry) -> bool:
        """Whether a tensor that the config has not does no harm: it has no elements, is a buffer that follows from the
        config, or is of a part that is left out, of which a warning tells."""
        left_out = self.table_name(entry.name).startswith(self._skipped)
        return 0 in entry.shape or entry.name.endswith(IGNORED) or left_out

    def _report_missing(self, name: str, spec: Spec) -> None:
        if self.unreadable:
            return  # it may be in one of those files
        name = "language_model." * self._is_multimodal + name
        wanted = dtype_and_shape(spec.dtype, spec.shape)
        why = "missing"
        if name.endswith((".scale", "_scale_inv")):
            kind = self.args and quantised_form(self.args).kind.upper()
            why = f"missing: an {kind or 'FP8'} weight without its scale"
        elif name.endswith((".zero", "_zero_point")):
            why = "missing: an INT4 weight without its zero points"
        self.report(CheckpointError(f"{self.path}: {name} is {why} ({wanted})", self.path, name, wanted, "nothing"))


def scale_error(entry: Entry, scale: torch.Tensor, of_groups: bool = False) -> CheckpointError | None:
    """What is wrong with the scales of a quantised weight, float32 (row blocks, column blocks); None if nothing is.
    `of_groups`: of a few channels each, which may all be zero, and the scale as well."""
    wanted = "finite scales, none negative" if of_groups else "finite, positive scales"
    bad = (~(scale.isfinite() & ((scale >= 0) if of_groups else (scale > 0)))).nonzero().tolist()
    if not bad:
        wanted = f"scales of at most {LARGEST_SCALE:.3g}, so that a scaled weight is finite"
        bad = (scale > LARGEST_SCALE).nonzero().tolist()
    if not bad:
        return None
    found = f"{scale[tuple(bad[0])].item()} at {bad[0]}"
    return CheckpointError(f"{entry}: expected {wanted}, found {found}", entry.file, entry.name, wanted, found)


def choose_args(checkpoint: Checkpoint, config: str | Path | None) -> ModelArgs:
    """The checkpoint's own config, which the file `config` must not contradict, or `config` where it has none.

    Raises UserError for a contradiction, or where there is neither."""
    if checkpoint.args is not None:
        if config is not None:
            check_agreement(config, checkpoint.args)
        return as_stored(checkpoint, checkpoint.args)
    if config is None:
        raise UserError(f"{checkpoint.path} has no config.json; name its model with --config configs/…")
    # which may describe the FP8 model that these are a cast of
    return as_stored(checkpoint, checkpoint.describe(Path(config), load_config(config)))


def as_stored(checkpoint: Checkpoint, args: ModelArgs) -> ModelArgs:
    """The same model in the dtype in which the files hold it. A config may say another: transformers' `dtype` is what
    somebody computed in."""
    return replace(args, dtype=stored_dtype(checkpoint.expected(args)))


def _raise(problem: UserError) -> None:
    raise problem
