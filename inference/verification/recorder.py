"""Records a model's values at named points while it runs, in any mode, without changing what it computes.

Every op is a method of the backend that each module holds as `ops`. A Recorder puts an object in its place that calls
the same backend and keeps what goes in and comes out, under the name of the module that asks. Some values are computed
again, by the same backend, because the ops that need them keep them to themselves: the router's logits, the routed
experts' sum where shared experts are added in the same op, rotated queries, and in W8A8 what norms and attention give
before they quantise it. Logits are computed for all chosen positions, not for those alone that are sampled.

What a rank holds a part of is put together by the group's collectives: heads are gathered, partial sums added. So all
ranks record together, with one selection; the first rank of a lane keeps what there is of its lane's requests.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from core.batch import Batch, SequenceSlice
from core.devices import CPU
from core.run_config import PAGE_SIZE
from model import Block, Transformer
from verification.points import Point, names_of, shape_of
from verification.recording import Recording, Selection
from verification.recording_ops import SHARD, RecordingOps, plain
from verification.trace import RunNumerics, Trace

LOGIT_ROWS = 256  # whose logits are computed at one time


class Recorder:
    """Records within `with`: a model's forwards on batches whose sequences `follow` has named.

    The modules have their backend back at the end. One Recorder at a time records a model.
    """

    def __init__(self, model: Transformer, selection: Selection = Selection()):
        """Raises UserError as Selection.names does."""
        self.model, self.selection = model, selection
        self.known = names_of(model.args, len(model.mtp) > 0)
        self.chosen = selection.names(names_of(model.args)) & self.known.keys()
        self.of_page: dict[int, Recording] = {}
        self.running = False
        self._used = 0  # bytes of all recordings
        # of this forward: whose rows are recorded, their positions, their numbers in the batch
        self._rows: list[tuple[Recording, list[int], torch.Tensor]] = []
        self._partial: dict[str, list[torch.Tensor]] = {}  # of virtual ranks, until all are there
        self._batch: Batch | None = None
        self._module = ""  # "" in the main model's forward, "mtp.0." in its module's
        self._undo: list[Callable[[], None]] = []

    # ----------------------------------------------------------------------------------------------------------------
    # Whose rows a batch has
    # ----------------------------------------------------------------------------------------------------------------

    def open(self, name: str, n_prompt: int) -> Recording:
        """A recording of a request; `follow` says which rows are its."""
        order = tuple(name for name in self.known if name in self.chosen)
        return Recording(name, n_prompt, self.selection.chooses(n_prompt), order)

    def follow(self, pages: Iterable[tuple[Recording, Sequence[int]]]) -> None:
        """From now on rows whose latents go to these pages belong to these recordings; all others are ignored."""
        self.of_page = {page: recording for recording, held in pages for page in held}

    def release(self, recording: Recording) -> None:
        """Makes room: a finished recording no longer counts."""
        self._used -= recording.nbytes
        recording.nbytes = 0

    def _begin(self, batch: Batch, module: str) -> None:
        self._batch, self._module, self.running = batch, module, True
        self._rows = []
        bounds, positions = batch.cu_seqlens_q.tolist(), batch.positions.tolist()
        pages = (batch.slots // PAGE_SIZE).tolist()
        names = [name for name in self.chosen if name.startswith("mtp.") == bool(module)]
        row_bytes = sum(_row_bytes(self.known[name], self.model) for name in names)
        for start, stop in pairwise(bounds):
            recording = self.of_page.get(pages[start]) if stop > start else None
            if recording is None:
                continue
            rows = [row for row in range(start, stop) if recording.chosen(positions[row])]
            if rows and not recording.truncated and self._used + len(rows) * row_bytes > self.selection.mib * 2**20:
                recording.truncated = f"from position {positions[rows[0]]} on: {self.selection.mib:g} MiB are full"
            if rows and not recording.truncated:
                self._used += len(rows) * row_bytes
                recording.nbytes += len(rows) * row_bytes
                at = torch.tensor(rows, device=batch.tokens.device)
                self._rows.append((recording, [positions[row] for row in rows], at))

    def _end(self, output: torch.Tensor) -> None:
        if not self._module and not self.model.stage.is_last:
            self._record_hidden(output)
        name = f"{self._module}logits"
        if self.model.stage.is_last and name in self.chosen:
            for recording, positions, at in self._rows:
                for lo in range(0, len(positions), LOGIT_ROWS):
                    part = slice(lo, lo + LOGIT_ROWS)
                    logits = self.model.logits(output[at[part]])
                    if self._keeps:
                        recording.add(name, positions[part], logits.to(CPU))
        self.running, self._batch, self._rows = False, None, []

    # ----------------------------------------------------------------------------------------------------------------
    # Values
    # ----------------------------------------------------------------------------------------------------------------

    @property
    def _keeps(self) -> bool:
        return self.model.tp.rank == 0

    def wants(self, name: str) -> bool:
        return self.running and name in self.chosen

    def record(self, name: str, value: Any) -> None:
        """Keeps the chosen rows of a point's value (T, …), of which ranks and virtual ranks may hold parts."""
        if value is None or not self.wants(name):
            return
        value = plain(value)
        if self.known[name].combine == "heads":
            parts = self._collect(name, value)
            if parts is None:
                return
            value = torch.cat(parts, dim=1)
            value = self.model.tp.all_gather(value.flatten(1)).unflatten(-1, (-1, value.shape[-1]))
        self._keep(name, value)

    def add_partial(self, name: str, value: torch.Tensor, of_all_lanes: bool) -> None:
        """The same of a partial sum: this rank's, of the tokens of all lanes or of its own."""
        if not self.wants(name) or (parts := self._collect(name, value)) is None:
            return
        assert self._batch is not None
        total = reference_sum(parts)
        if of_all_lanes:
            total = self.model.dp.scatter_sum(total, self._batch.lane_rows, len(self._batch.tokens))
        self._keep(name, self.model.tp.all_reduce(total))

    def end_layer(self, norm: str, total: torch.Tensor) -> None:
        """The hidden state after the layer before a norm: that norm adds the layer's output to the residual."""
        if norm == "norm":
            self._record_hidden(total)
        elif norm.endswith(".attn_norm"):
            self.record(f"layers.{int(norm.split('.')[1]) - 1}.hidden", total)
        else:  # a module's last norm
            self.record(norm.removesuffix("norm") + "hidden", total)

    def _record_hidden(self, total: torch.Tensor) -> None:
        last = max(int(name) for name, _ in self.model.layers.named_children())
        self.record(f"layers.{last}.hidden", total)

    def _collect(self, name: str, value: torch.Tensor) -> list[torch.Tensor] | None:
        """The parts of all virtual ranks of this rank, once the last one's is there."""
        n = max(self.model.num.virtual_ranks // self._group(name), 1)
        parts = self._partial.setdefault(name, [])
        parts.append(value)
        return self._partial.pop(name) if len(parts) == n else None

    def _group(self, name: str) -> int:
        return self.model.tp.size * (1 if self.known[name].combine == "heads" else self.model.dp.size)

    def _keep(self, name: str, value: torch.Tensor) -> None:
        if self._keeps:
            for recording, positions, at in self._rows:
                recording.add(name, positions, value[at].to(CPU))

    # ----------------------------------------------------------------------------------------------------------------
    # In the model's modules
    # ----------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> "Recorder":
        model = self.model
        for name, module in model.named_modules():
            if isinstance(backend := getattr(module, "ops", None), RecordingOps):
                raise AssertionError("this model is being recorded already")
            if name and backend is not None:
                self._replace(module, "ops", RecordingOps(backend, self, name))
            if isinstance(module, Block):
                self._hook(module, self._block_hook(name))
            if name.endswith(".shared_experts") and model.num.mlps_in_lane:
                self._hook(module, self._shared_hook(SHARD.sub(r".\1", name).removesuffix("_experts")))
        if hasattr(model, "embed"):
            self._hook(model.embed, lambda module, args, out: self.record(f"{self._module}embed", out))
        self._undo.append(model.register_forward_pre_hook(lambda m, args: self._begin(args[0], "")).remove)
        self._hook(model, lambda module, args, out: self._end(out))
        draft = model.draft

        def recorded_draft(batch: Batch, hidden: torch.Tensor, cache: torch.Tensor, k: int = 0) -> torch.Tensor:
            self._begin(batch, f"mtp.{k}.")
            out = draft(batch, hidden, cache, k)
            self._end(out)
            return out

        self._replace(model, "draft", recorded_draft, new=True)
        return self

    def __exit__(self, *_: object) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self.running = False

    def _replace(self, module: Any, name: str, value: Any, new: bool = False) -> None:
        before = getattr(module, name)
        object.__setattr__(module, name, value)
        undo = (lambda: delattr(module, name)) if new else (lambda: object.__setattr__(module, name, before))
        self._undo.append(undo)

    def _hook(self, module: nn.Module, hook: Callable[[Any, Any, Any], None]) -> None:
        def returns_nothing(module: Any, args: Any, out: Any) -> None:
            hook(module, args, out)

        self._undo.append(module.register_forward_hook(returns_nothing).remove)

    def _block_hook(self, name: str) -> Callable[[Any, Any, Any], None]:
        return lambda module, args, out: self.record(f"{name}.ffn.out", out[1])

    def _shared_hook(self, name: str) -> Callable[[Any, Any, Any], None]:
        return lambda module, args, out: self.add_partial(name, out, of_all_lanes=False)


def reference_sum(parts: list[torch.Tensor]) -> torch.Tensor:
    """Partial sums added in float32, in the dtype of the first; a new tensor."""
    total = parts[0].float().clone()
    for part in parts[1:]:
        total += part.float()
    return total.to(parts[0].dtype)


def _row_bytes(point: Point, model: Transformer) -> int:
    """An upper bound of what a token's value takes."""
    n = 1
    for size in shape_of(point, model.args):
        n *= size
    return n * (8 if point.exact == "int64" else 4)


# --------------------------------------------------------------------------------------------------------------------
# Whole prompts, without an engine
# --------------------------------------------------------------------------------------------------------------------


def record_tokens(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    selection: Selection = Selection(),
    *,
    mtp: bool | None = None,
    chunk: int | None = None,
    program: str = "this engine",
) -> Trace:
    """The trace of prompts, which run together, in one forward or in chunks of so many tokens each; with `mtp` (None:
    if the model has it) of the MTP module on every position that has a token after it. Names are "0", "1", …"""
    mtp = len(model.mtp) > 0 if mtp is None else mtp
    pages, n_pages = [], 0
    for prompt in prompts:
        n = -(-len(prompt) // PAGE_SIZE)
        pages.append(list(range(n_pages, n_pages + n)))
        n_pages += n
    cache = model.new_cache(n_pages)
    with Recorder(model, selection) as recorder:
        recordings = [recorder.open(str(i), len(prompt)) for i, prompt in enumerate(prompts)]
        recorder.follow(zip(recordings, pages, strict=True))
        for slices in _chunks(prompts, pages, chunk):
            hidden = model(Batch.pack([slice for slice, _ in slices], model.device), cache)
            if mtp:
                rows: list[int] = []
                after: list[SequenceSlice] = []
                at = 0
                for (tokens, start, held), prompt in slices:
                    following = list(prompt[start + 1 : start + len(tokens) + 1])
                    rows += range(at, at + len(following))
                    after += [(following, start, held)] if following else []
                    at += len(tokens)
                if after:
                    model.draft(Batch.pack(after, model.device), hidden[rows], cache)
    requests = [r.finish(prompt) for r, prompt in zip(recordings, prompts, strict=True)]
    return Trace(requests, RunNumerics.of(model.num), program=program, config=model_fields(model))


def _chunks(prompts: Sequence[Sequence[int]], pages: list[list[int]], chunk: int | None) -> Iterator[Any]:
    longest = max(map(len, prompts))
    step = chunk or longest
    for start in range(0, longest, step):
        yield [((list(prompt[start : start + step]), start, held), prompt)
               for prompt, held in zip(prompts, pages, strict=True) if start < len(prompt)]  # fmt: skip


def model_fields(model: Transformer) -> dict[str, Any]:
    """The model's config for a trace: ModelArgs' fields."""
    return {name: value for name, value in vars(model.args).items() if name not in ("names", "warnings")}
