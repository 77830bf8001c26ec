"""Which kind of checkpoint a directory is, told from its files' names, its index and its manifests.

Three kinds are read: Hugging Face's, those that convert.py writes (marked in each file's metadata, with a manifest),
and those that the original DeepSeek-V3 repository's converter wrote (no mark, no manifest, no MTP module). What
fp8_cast_bf16.py and quantize.py write is of Hugging Face's kind, with a mark and a manifest.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint.atomic import TEMPORARY
from checkpoint.manifest import FORMAT, HF_INDEX, changed_files, check_file_name, read_manifests
from checkpoint.reading import read_header
from core.errors import CheckpointError, UserError
from core.files import read_json, stand_in

SINGLE = "model.safetensors"
OTHER_INDEX = re.compile(r"[^.].*\.safetensors\.index(\..+)?\.json")  # of a variant, or in other names than the model's
# files that are a checkpoint of their own, or a part of one, beside those that an index names
OTHER_WEIGHTS = re.compile(r"(model|consolidated.*|model\d+-mp\d+.*)\.safetensors")


class Detected:
    """What a directory's files are.

    kind        "hf", "converted" (by convert.py) or "upstream" (by the original repository's converter)
    ranks       the numbers of ranks that its files were made for; None: whole tensors, for any number
    owner       the file of each tensor, where an index says it
    files       names of its files of weights
    manifests   by number of ranks (None: of whole tensors)
    unreadable  names of files of weights whose fault was reported
    notes       sentences worth a warning
    """

    def __init__(self, folder: Path, report: Callable[[UserError], object]):
        """Calls `report` with each fault after which checks can go on. Raises UserError where no kind can be told."""
        self.folder, self.report = folder, report
        self.unreadable: set[str] = set()
        self.notes: list[str] = []
        self._report_stand_ins()
        self.files = sorted(p.name for p in folder.glob("*.safetensors") if not p.name.startswith("."))
        if odd := [file for file in self.files if not file.isprintable()]:
            raise CheckpointError(f"{folder}: {odd[0]!r} is not the name of a file of weights", repr(odd[0]))
        self.manifests = read_manifests(folder)
        self.notes += changed_files(self.manifests.values())
        self.kind, self.ranks, self.owner = self._detect()

    def _report_stand_ins(self) -> None:
        """Reports Git LFS pointers and broken links; the first of several files of weights, and how many there are."""
        weights: list[CheckpointError] = []
        for path in sorted(self.folder.iterdir()):
            known = path.suffix in (".safetensors", ".json", ".jinja", ".model")
            if not known or path.name.startswith(".") or not path.name.isprintable():
                continue
            if problem := stand_in(path):
                if path.suffix == ".safetensors":
                    self.unreadable.add(path.name)
                    weights.append(problem)
                else:
                    self.report(problem)
        if weights:
            more = f" ({len(weights)} files of weights are such)" if len(weights) > 1 else ""
            first = weights[0]
            self.report(CheckpointError(f"{first}{more}", first.file, "", first.expected, first.found))

    def _detect(self) -> tuple[str, tuple[int, ...] | None, dict[str, str] | None]:
        """The kind, the numbers of ranks, and, where there is an index, the file of each tensor."""
        names = {p.name for p in self.folder.iterdir()}
        if manifests := self.manifests.values():
            for extra in (f for f in self.files if not any(f in m.files or m.replaces(f) for m in manifests)):
                text = f"{self.folder}: {extra} belongs to no index here; remove it or convert again"
                self.report(CheckpointError(text, self.folder / extra))
            if whole := self.manifests.get(None):
                owner = {name: file for file, record in whole.files.items() for name in record["tensors"]}
                at = self.folder / HF_INDEX
                if at.exists() and not whole.pending and read_json(at).get("weight_map") != owner:
                    text = f"{at}: places tensors elsewhere than {whole.path.name}; run {whole.command} again"
                    self.report(CheckpointError(text, at))
                return "hf", None, owner
            return "converted", tuple(n for n in self.manifests if n is not None), None
        if HF_INDEX in names:
            return "hf", None, self._hf_index(read_json(self.folder / HF_INDEX).get("weight_map"))
        if not self.files:
            if any(name.startswith(TEMPORARY) for name in names):
                raise UserError(f"{self.folder}: an unfinished conversion and nothing else; run the conversion again")
            raise UserError(f"{self.folder}: no checkpoint here (no .safetensors files)")
        of_ranks = re.compile(r"model(\d+)-mp([1-9]\d*)((?:-pp\d+)?(?:-\d+-of-\d+)?)\.safetensors")
        ranked = [of_ranks.fullmatch(file) for file in self.files]
        if all(ranked):
            for file in self.files:
                if read_header(self.folder / file)[0].get("format") == FORMAT:
                    text = f"{self.folder / file}: its manifest is missing; copy the directory or convert again"
                    raise CheckpointError(text, self.folder / file)
            counts = {int(m[2]) for m in ranked if m}
            for m in filter(None, ranked):
                if m[3] or int(m[1]) >= int(m[2]):
                    text = f"{self.folder / m[0]}: not a file of {m[2]} ranks, which are model0-mp{m[2]} …; remove it"
                    self.report(CheckpointError(text, self.folder / m[0]))
            return "upstream", tuple(sorted(counts)), None
        if self.files == [SINGLE]:
            return "hf", None, None
        if SINGLE in self.files:
            other = min(file for file in self.files if file != SINGLE)
            both = f"two checkpoints, {SINGLE} and {other}"
            raise UserError(f"{self.folder}: {both}; move away the one that is not meant")
        if other := min(filter(OTHER_INDEX.fullmatch, names), default=""):
            text = f"{self.folder}: its index is {other}, not {HF_INDEX}"
            raise UserError(f"{text}: a variant, or in other names than Hugging Face's; get the ordinary form")
        if len(self.files) == 1:
            one = f"one file of weights, {self.files[0]}, and no {HF_INDEX}"
            raise UserError(f"{self.folder}: {one}: a checkpoint in one file has the name {SINGLE}")
        raise UserError(f"{self.folder}: {len(self.files)} .safetensors files but no {HF_INDEX} beside them")

    def _hf_index(self, index: Any) -> dict[str, str] | None:
        """The file of each tensor; None where the index is a left-over of an earlier save, beside a single file."""
        at = self.folder / HF_INDEX
        if not isinstance(index, dict) or not index:
            raise CheckpointError(f"{at}: expected a weight_map of tensor names to files", at, "", "a weight_map")
        if self.files == [SINGLE] and SINGLE not in index.values():  # as transformers 5 leaves it
            old = f"{at} names other files than {SINGLE}, and none of them is here"
            self.notes.append(f"{old}: it was left by an earlier save, and {SINGLE} is loaded; remove the index")
            return None
        named: dict[str, str] = {}
        for name, file in index.items():
            try:
                check_file_name(at, name, file)
                named[name] = file
            except UserError as e:
                self.report(e)
        listed = set(named.values())
        for missing in sorted(listed - set(self.files)):
            text = f"{self.folder / missing}: missing, but {HF_INDEX} names it"
            self.unreadable.add(missing)
            self.report(CheckpointError(text, self.folder / missing))
        for extra in sorted(set(self.files) - listed):
            text = f"{self.folder / extra}: not named by {HF_INDEX}; remove it or repair the index"
            if other := self._other_index(extra):
                text = f"{self.folder}: two indexes, {HF_INDEX} and {other}; move away the one that is not meant"
            elif OTHER_WEIGHTS.fullmatch(extra) or self._in_whole_set(extra):
                both = f"{extra} and the files that {HF_INDEX} names"
                text = f"{self.folder}: two checkpoints, {both}; move away the one that is not meant"
            self.report(CheckpointError(text, self.folder / extra))
        self.files = sorted(listed & set(self.files))
        return named

    def _in_whole_set(self, file: str) -> bool:
        """Whether a shard's name counts a number of shards that are all here, as those of another download are."""
        if (m := re.fullmatch(r"(.+-)\d{5}(-of-(\d{5})\.safetensors)", file)) is None:
            return False
        return {f"{m[1]}{i + 1:05}{m[2]}" for i in range(int(m[3]))} <= set(self.files)

    def _other_index(self, file: str) -> str | None:
        """The name of an index, other than the model's ordinary one, that names a file of weights."""
        for path in sorted(self.folder.iterdir()):
            if path.name != HF_INDEX and OTHER_INDEX.fullmatch(path.name):
                weight_map = read_json(path).get("weight_map")
                if isinstance(weight_map, dict) and file in weight_map.values():
                    return path.name
        return None
