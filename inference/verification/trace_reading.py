"""Reads a trace that this engine or any other program wrote, and checks it: headers first, values when asked for."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch

from checkpoint.reading import DTYPE_NAMES, Entry, Reader, read_header
from core.config import ModelArgs, hf_names
from core.errors import UserError
from core.files import read_json, require_folder
from verification.points import LAYER_POINTS, POINTS, names_of, shape_of, sizes, split_name
from verification.trace import FORMAT, VERSION, RequestTrace, RopeLayout, RunNumerics, Step, Trace

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)
# how weights are stored, not what they mean; and what transformers' config calls otherwise
UNCOMPARED = set(
    "dtype torch_dtype max_seq_len max_position_embeddings n_mtp_layers block_size group_size zero_points scale_fmt "
    "num_nextn_predict_layers".split()
)


class StoredPoints(Mapping[str, torch.Tensor]):
    """The points of a request's files. A value is read when it is asked for, and not kept."""

    def __init__(self, entries: dict[str, Entry]):
        self.entries = entries

    def __getitem__(self, name: str) -> torch.Tensor:
        with Reader() as reader:
            return read_entry(reader, self.entries[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def read_entry(reader: Reader, entry: Entry) -> torch.Tensor:
    """A tensor; one without elements, which no window has, too."""
    return reader.read(entry) if entry.nbytes else torch.empty(entry.shape, dtype=entry.dtype)


def read_trace(folder: str | Path) -> Trace:
    """The trace in a directory; its headers and positions are read now, its values when they are asked for.

    Raises UserError in one line that names the file and the point: for a directory without a trace, a name that is no
    point, a dtype or a number of rows that does not fit, a layer that lacks what other layers have.
    """
    folder = Path(folder)
    require_folder(folder)
    about: dict[str, Any] = {"format": FORMAT}
    path = folder / "trace.json"
    if path.is_file():
        about = read_json(path)
        if about.get("format") != FORMAT:
            raise UserError(f"{path}: format is {about.get('format')!r}, expected {FORMAT!r}")
        if about.get("version", VERSION) != VERSION:
            raise UserError(f"{path}: version is {about['version']!r}, this program reads {VERSION}")
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if not file.name.startswith("."):
            files.setdefault(file.name.split(".")[0], []).append(file)
    names = about.get("requests", list(files))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: requests is {names!r}, expected a list of names")
    if not names:
        raise UserError(f"{folder}: no trace: there is no .safetensors file with a request's values")
    for name in names:
        if name not in files:
            raise UserError(f"{folder}: {name}.safetensors is missing, though trace.json lists request {name}")
    layout = about.get("rope_layout", "interleaved")
    if layout not in get_args(RopeLayout):
        raise UserError(f"{path}: rope_layout is {layout!r}, expected {' or '.join(get_args(RopeLayout))}")
    config, notes = about.get("config") or {}, about.get("notes") or []
    if not isinstance(config, dict) or not isinstance(notes, list):
        raise UserError(f"{path}: config must be an object and notes a list")
    return Trace(
        [_read_request(folder, name, files[name]) for name in names], _numerics(path, about.get("numerics")), layout,
        str(about.get("program", "")), config, tuple(map(str, notes)),
    )  # fmt: skip


def _numerics(path: Path, raw: Any) -> RunNumerics:
    if raw is None:
        return RunNumerics()
    choices = {"dtype": ("float32", "bfloat16", "float16"), "gemm": (None, "fp8", "bf16"), "scale_fmt": (None, "ue8m0"),
               "latents": (None, "fp8")}  # fmt: skip
    if not isinstance(raw, dict) or (unknown := sorted(set(raw) - set(choices))):
        raise UserError(f"{path}: numerics has {unknown if isinstance(raw, dict) else raw!r}, expected {list(choices)}")
    for name, value in raw.items():
        if value not in choices[name]:
            raise UserError(f"{path}: numerics.{name} is {value!r}, expected one of {choices[name]}")
    return RunNumerics(**raw)


def _read_request(folder: Path, name: str, files: list[Path]) -> RequestTrace:
    entries: dict[str, Entry] = {}
    for file in files:
        for tensor, entry in read_header(file)[1].items():
            if tensor in entries and tensor != "tokens" and not tensor.startswith("positions"):
                raise UserError(f"{entry}: {entries[tensor].file.name} has it too")
            entries[tensor] = entry
    if "tokens" not in entries:
        raise UserError(f"{files[0]}: tokens is missing: the token ids that the model was given")
    for tensor, entry in entries.items():
        rest = split_name(tensor)[1]
        if not (tensor == "tokens" or tensor == "positions" or tensor.startswith("positions.")):
            if rest not in {point.name for point in POINTS}:
                raise UserError(f"{entry}: no such point; docs/verifying.md lists them")
            allowed = INTEGERS if rest == "ffn.ids" else FLOATS
        else:
            allowed = INTEGERS
        if entry.dtype not in allowed or not entry.shape:
            wanted = "integers" if allowed is INTEGERS else "floating-point numbers"
            raise UserError(f"{entry}: {DTYPE_NAMES[entry.dtype]} {list(entry.shape)}, expected rows of {wanted}")
    with Reader() as reader:
        own = {key: read_entry(reader, entry).long() for key, entry in entries.items()
               if key == "tokens" or key.startswith("positions")}  # fmt: skip
    tokens = own.pop("tokens")
    if tokens.dim() != 1 or not len(tokens):
        raise UserError(f"{entries['tokens']}: shape {list(tokens.shape)}, expected one token id for each position")
    rows = {key.removeprefix("positions").removeprefix("."): value for key, value in own.items()}
    points = {key: entry for key, entry in entries.items() if key != "tokens" and not key.startswith("positions")}
    request = RequestTrace(name, tokens, StoredPoints(points), rows)
    for point, entry in points.items():
        has_own = any(not prefix or f"{point}.".startswith(f"{prefix}.") for prefix in rows)
        at = request.positions(point) if has_own else None
        n = len(tokens) if at is None else len(at)
        if point.startswith("mtp.") and at is None and entry.shape[0] == n - 1:
            continue  # a module needs the token after, which the last position may lack
        if entry.shape[0] != n:
            raise UserError(f"{entry}: {entry.shape[0]} rows, expected {n}, one for each "
                            f"{'of its positions' if has_own else 'token; or give positions.' + point}")  # fmt: skip
        if at is not None and len(at) and not 0 <= int(at.min()) <= int(at.max()) < len(tokens):
            raise UserError(f"{entry}: its positions go from {int(at.min())} to {int(at.max())}, "
                            f"the request has {len(tokens)} tokens")  # fmt: skip
    _require_every_layer(files[0], points)
    path = folder / f"{name}.json"
    if path.is_file():
        raw = read_json(path)
        try:
            request.steps = tuple(Step(s["position"], tuple(s["drafts"]), s["accepted"]) for s in raw.get("steps", ()))
        except (TypeError, KeyError):
            raise UserError(f"{path}: steps must have position, drafts and accepted") from None
        request.prompt_tokens, request.truncated = raw.get("prompt_tokens"), str(raw.get("truncated") or "")
        request.about = {key: raw[key] for key in ("index", "choice") if key in raw}
    return request


def _require_every_layer(file: Path, points: Mapping[str, Entry]) -> None:
    """Raises UserError where a layer lacks a point that other layers of its kind have."""
    by_layer: dict[str, set[str]] = {}
    for layer, rest in map(split_name, points):
        if layer.startswith("layers."):
            by_layer.setdefault(layer, set()).add(rest)
    sparse = {layer for layer, found in by_layer.items() if any(p.startswith("ffn.") and p != "ffn.out" for p in found)}
    for point in (point.name for point in LAYER_POINTS):
        kind = sparse if point.startswith("ffn.") and point != "ffn.out" else set(by_layer)
        having = [layer for layer in kind if point in by_layer[layer]]
        if having and (lacking := sorted(kind - set(having), key=lambda name: int(name.split(".")[1]))):
            raise UserError(f"{file}: {lacking[0]}.{point} is missing, though {len(having)} of {len(kind)} layers have "
                            "it; write it for all layers or for none")  # fmt: skip


def check_shapes(trace: Trace, args: ModelArgs, where: str) -> None:
    """Raises UserError, which names the point, where a trace's values do not have this model's shapes, or are of points
    that the model does not have."""
    known = names_of(args, mtp=True) if args.n_mtp_layers else names_of(args)
    for request in trace.requests:
        points = request.points
        stored = points.entries if isinstance(points, StoredPoints) else None
        for name in points:
            if name not in known:
                raise UserError(f"{where}: {name}: this model has no such point")
            shape = tuple((stored[name] if stored else points[name]).shape[1:])
            wanted = shape_of(known[name], args)
            if shape != wanted:
                letters = "x".join(known[name].shape)
                text = f"{name} has {list(shape)} for each token, expected {list(wanted)} ({letters})"
                raise UserError(f"{where}: {text}")
        if len(request.tokens) and int(request.tokens.max()) >= sizes(args)["V"]:
            raise UserError(f"{where}: token id {int(request.tokens.max())}, the vocabulary has {sizes(args)['V']}")
    if trace.config:
        check_config(trace.config, args, where)


def check_config(config: Mapping[str, Any], args: ModelArgs, where: str) -> None:
    """Raises UserError, which names the field, where a trace's config contradicts the model's. It may have our names or
    Hugging Face's; only plain numbers, words and switches are compared."""
    theirs = hf_names()
    for ours, value in asdict(args).items():
        for name in dict.fromkeys((ours, theirs[ours])):
            said = config.get(name)
            if type(said) in (int, float, str, bool) and name not in UNCOMPARED and said != value:
                raise UserError(f"{where}: its config has {name} {said!r}, the checkpoint's {value!r}")
