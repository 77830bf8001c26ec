"""A trace of an engine at work: every request's values as it is answered, written to a directory as it finishes."""

from pathlib import Path
from typing import Any

from core.stages import single_stage
from engine.engine import Engine
from engine.runner import Propose
from engine.scheduler import Chunk, Sequence
from verification.recorder import Recorder, model_fields
from verification.recording import Recording, Selection
from verification.trace import RunNumerics, Step, Trace, TraceWriter


class EngineTrace:
    """Records an engine's forwards within `with`, on every rank. Requests are named by the order in which the engine
    took them; NAME.json has each one's `index` and `choice` too. A request's file appears once it is finished; what is
    not finished at the end is written then.

    The first rank of each lane writes, and of each stage of a pipeline, so that hosts need a directory in common.
    """

    def __init__(self, engine: Engine, folder: str | Path, selection: Selection = Selection(), program: str = ""):
        """`engine` was made eager and without prefix_reuse: a forward that is replayed, or left out, cannot be
        recorded. Raises UserError for a directory that cannot be written to, or
        holds something, on all ranks, and as Selection.names does."""
        model = engine.model
        assert engine.run.eager and not engine.run.prefix_reuse, "forwards that are replayed, or left out"
        self.engine, self.recorder = engine, Recorder(model, selection)
        self.recordings: dict[Sequence, Recording] = {}
        self.part = "" if model.stage == single_stage(model.args) else f"stage{engine.microbatches.stage}"
        several = engine.dp.size > 1 or bool(self.part)
        trace = Trace([], RunNumerics.of(model.num), program=program, config=model_fields(model))
        self.writer: TraceWriter | None = None

        def open_folder() -> TraceWriter | None:
            if engine.world.rank == 0:
                return TraceWriter(folder, trace, lists_requests=not several)
            return None

        self.writer = engine.world.run_on_all_ranks(open_folder)
        if self.writer is None and model.tp.rank == 0:
            self.writer = TraceWriter(folder, trace, lists_requests=False, joins=True)

    def __enter__(self) -> "EngineTrace":
        runner = self.engine.runner
        forward, draft = runner.forward, runner.draft

        def recorded_forward(chunks: list[Chunk], hidden: Any = None) -> Any:
            self._write_finished()
            self._follow(chunks)
            for chunk in chunks:
                if chunk.drafts:
                    self.recordings[chunk.sequence].tries.append((chunk.start + chunk.n - 1, chunk.drafts))
            return forward(chunks, hidden)

        def recorded_draft(chunks: list[Chunk], step: Any, continuing: list[Sequence], propose: Propose) -> None:
            self._follow(chunks)
            draft(chunks, step, continuing, propose)

        runner.forward, runner.draft = recorded_forward, recorded_draft  # type: ignore[method-assign]
        self.recorder.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.recorder.__exit__()
        del self.engine.runner.forward, self.engine.runner.draft
        self._write_finished(all_of_them=True)

    def _follow(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence not in self.recordings:
                self.recordings[sequence] = self.recorder.open(str(sequence.id), sequence.n_prompt)
                request = self.engine.registry.live.get(sequence.id)
                if request is not None:
                    self.recordings[sequence].about = {"index": request.id, "choice": request.choice}
        self.recorder.follow((self.recordings[chunk.sequence], chunk.sequence.pages) for chunk in chunks)

    def _write_finished(self, all_of_them: bool = False) -> None:
        live = self.engine.live_sequences
        for sequence in [s for s in self.recordings if all_of_them or s.id not in live]:
            recording = self.recordings.pop(sequence)
            self.recorder.release(recording)
            if self.writer is not None:
                answered = len(sequence.tokens) > sequence.n_prompt  # then the last token was not run
                self.writer.add(recording.finish(sequence.tokens, len(sequence.tokens) - answered), self.part)


def acceptance(steps: tuple[Step, ...]) -> list[float]:
    """Of a request's drafts, how many of the first ones were accepted, of the second ones, and so on: parts of 1."""
    most = max((len(step.drafts) for step in steps), default=0)
    tried = [sum(len(step.drafts) > k for step in steps) for k in range(most)]
    return [sum(step.accepted > k for step in steps) / n for k, n in enumerate(tried)]

