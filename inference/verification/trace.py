"""Traces: what a run computed at named points, in memory and as a directory that any program can write.

    DIR/trace.json         {"format": "deepseek-trace", "version": 1, "program", "numerics", "rope_layout", "config",
                            "requests", "notes"}; every field but the first may be missing
    DIR/NAME.safetensors   one request's values: `tokens` (n,), the points by their names (points.py), and `positions`
    DIR/NAME.*.safetensors more of its points, where one file does not hold them all
    DIR/NAME.json          what else is known of the request: {"prompt_tokens", "steps", "truncated"}

Row i of a point belongs to the token at position i, unless the file has `positions` (rows,) for all its points or
`positions.PREFIX` for those whose names begin with PREFIX ("positions.logits", "positions.mtp.0").

Values are read when they are asked for, through windows of a few MiB, so that a trace may be larger than memory.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from checkpoint.writing import Writer
from core.devices import CPU
from core.errors import UserError
from core.numerics import Numerics
from verification.points import split_name

FORMAT, VERSION = "deepseek-trace", 1
RopeLayout = Literal["interleaved", "halves"]  # channels 2i and 2i + 1 turn together, or i and i + R/2
SAFE_NAME = re.compile(r"[A-Za-z0-9_-]+")


class RunNumerics(NamedTuple):
    """What a run computed in, as far as its rounding depends on it."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of activations
    gemm: Literal["fp8", "bf16"] | None = None  # quantised weights times FP8 (W8A8) or plain activations; None: plain
    scale_fmt: Literal["ue8m0"] | None = None  # of the scales of FP8 activations
    latents: Literal["fp8"] | None = None  # the cache holds c^KV in FP8

    @classmethod
    def of(cls, num: Numerics) -> "RunNumerics":
        ue8m0: Any = "ue8m0" if num.scale_fmt == "ue8m0" and num.gemm == "fp8" else None
        gemm: Any = num.gemm if num.projections.kind == "fp8" or num.gemm is None else "bf16"
        return cls(str(num.dtype).removeprefix("torch."), gemm, ue8m0, "fp8" if num.fp8_latents else None)  # type: ignore[arg-type]

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.dtype]

    def __str__(self) -> str:
        gemm = {"fp8": "W8A8", "bf16": "quantised weights, plain activations", None: ""}[self.gemm]
        parts = self.dtype, gemm, self.scale_fmt, self.latents and "FP8 latents"
        return ", ".join(part for part in parts if part)


class Step(NamedTuple):
    """One verification of drafts: after the token at `position`, `drafts` were tried and the first `accepted` kept."""

    position: int
    drafts: tuple[int, ...]
    accepted: int


@dataclass(eq=False)
class RequestTrace:
    """The values of one request: `points` by name, each (rows, …), and the position of each row."""

    name: str
    tokens: torch.Tensor  # (n,) int64, prompt and answer
    points: Mapping[str, torch.Tensor]
    rows: dict[str, torch.Tensor] = field(default_factory=dict)  # positions by the beginning of points' names; "": all
    prompt_tokens: int | None = None
    steps: tuple[Step, ...] = ()  # those that verified drafts
    truncated: str = ""  # why not every position asked for is there
    about: dict[str, Any] = field(default_factory=dict)  # what else NAME.json says

    def positions(self, point: str) -> torch.Tensor:
        """The position (rows,) of each row of a point, int64."""
        found = [prefix for prefix in self.rows if not prefix or f"{point}.".startswith(f"{prefix}.")]
        if found:
            return self.rows[max(found, key=len)]
        return torch.arange(len(self.points[point]))

    def value(self, point: str, position: int) -> torch.Tensor:
        """A point's value for the token at a position. Raises KeyError where it is not there."""
        at = (self.positions(point) == position).nonzero().flatten()
        if not len(at):
            raise KeyError(f"{point} at position {position}")
        return self.points[point][int(at[0])]

    @property
    def layers(self) -> list[str]:
        """The layers that it has points of: "layers.0", …, "mtp.0"."""
        return list(dict.fromkeys(layer for layer, _ in map(split_name, self.points) if layer))


@dataclass(eq=False)
class Trace:
    """What one run computed at named points, a RequestTrace for each request."""

    requests: list[RequestTrace]
    numerics: RunNumerics = field(default_factory=RunNumerics)
    rope_layout: RopeLayout = "interleaved"  # of the channels in q_rope and k_rope
    program: str = ""
    config: dict[str, Any] = field(default_factory=dict)  # the model's, as the program knows it
    notes: tuple[str, ...] = ()

    def request(self, name: str) -> RequestTrace:
        """Raises KeyError."""
        return next(r for r in self.requests if r.name == name) if name in self.names else _no_request(name, self.names)

    @property
    def names(self) -> list[str]:
        return [request.name for request in self.requests]


def _no_request(name: str, names: list[str]) -> RequestTrace:
    raise KeyError(f"request {name!r}; there are {', '.join(names)}")


# --------------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------------


class TraceWriter:
    """Writes a trace into a new directory, one request after another, so that no two have to be in memory together.
    `trace` has everything but the requests. Of several writers of one directory the first lists no requests, and the
    others join it. Raises UserError where the directory holds something, or cannot be written."""

    def __init__(self, folder: str | Path, trace: Trace, lists_requests: bool = True, joins: bool = False):
        self.folder, self.trace, self.names = Path(folder), replace(trace, requests=[]), list[str]()
        self.lists_requests, self.joins = lists_requests, joins
        if joins:
            return
        require_new_folder(self.folder)
        with _write_errors(self.folder):
            self._write_index()

    def add(self, request: RequestTrace, part: str = "") -> None:
        """Writes a request's files, which appear whole or not at all. `part` names the file of some of its points."""
        assert SAFE_NAME.fullmatch(request.name) and request.name not in self.names, request.name
        tensors = {"tokens": request.tokens} | dict(request.points)
        tensors |= {".".join(filter(None, ("positions", prefix))): rows for prefix, rows in request.rows.items()}
        steps = [step._asdict() for step in request.steps]
        about = request.about | {"steps": steps, "truncated": request.truncated, "prompt_tokens": request.prompt_tokens}
        file = ".".join(filter(None, (request.name, part, "safetensors")))
        with _write_errors(self.folder):
            write_tensors(self.folder / file, tensors)
            if request.about or not part:
                _write_json(self.folder / f"{request.name}.json", about)
            self.names.append(request.name)
            if self.lists_requests:
                self._write_index()

    def _write_index(self) -> None:
        trace = self.trace
        fields = {"program": trace.program, "numerics": trace.numerics._asdict(), "rope_layout": trace.rope_layout,
                  "config": trace.config, "notes": list(trace.notes)}  # fmt: skip
        if self.lists_requests:
            fields["requests"] = self.names
        _write_json(self.folder / "trace.json", {"format": FORMAT, "version": VERSION} | fields)


def require_new_folder(folder: Path) -> None:
    """Makes a directory, or raises UserError where it holds something or cannot be made."""
    with _write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder}: holds something already; a trace goes into a directory of its own")


def write_trace(trace: Trace, folder: str | Path) -> None:
    """Writes a trace into a new directory. Raises UserError as TraceWriter does."""
    writer = TraceWriter(folder, trace)
    for request in trace.requests:
        writer.add(request)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """One safetensors file, which appears whole or not at all. Raises OSError."""
    temporary = path.with_name(f".tmp-{path.name}")
    writer = Writer(temporary, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, {"format": "pt"})
    try:
        for name, tensor in tensors.items():
            writer.write(name, tensor.to(CPU), 0)
        os.replace(temporary, path)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


@contextlib.contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise UserError(f"{folder}: cannot be written: {e.strerror or e}") from None
