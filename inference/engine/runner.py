"""Runs the model on a step's chunks: the forward, the logits that are asked for, drafts, and recorded graphs."""

import gc
from collections.abc import Callable, Iterator

import torch

from core import devices
from core.batch import Batch, SequenceSlice
from core.run_config import PAGE_SIZE, RunConfig
from engine import memory
from engine.block_table import BlockTable
from engine.graphs import CHUNK_KEYS, CHUNK_ROWS, Capture, Forward, Graphs, RecordedBuffers, records_chunks
from engine.recorded_steps import RecordedSteps
from engine.sampling import Scores
from engine.scheduler import Chunk, Sequence
from engine.step_rows import StepRows
from model import Transformer
from ops.cpu.captured_calls import Scratch

Recorder = Graphs | RecordedSteps  # of one forward
# From sequences and what the MTP module says of their next tokens to their next drafts.
Propose = Callable[[list[Sequence], Scores], list[int]]


class ModelRunner:
    """A model and its latent cache. Every rank of a lane calls the same methods with the same chunks, and all lanes run
    the same forwards together, each on its own chunks; one without any runs padding."""

    def __init__(
        self,
        model: Transformer,
        run: RunConfig,
        capture: Capture | None,
        progress: bool,
        scratch: Scratch | None = None,
    ):
        """`run` with n_pages and max_model_len filled in. `capture` records decode steps, with padding, and `progress`
        shows a bar meanwhile; with `scratch`, to work in, they are recorded as lists of calls."""
        assert run.n_pages is not None
        self.model, self.mtp = model, run.mtp
        # with graphs or lanes one page more, for the latents of padding
        self.cache = model.new_cache(run.n_pages + (capture is not None or model.dp.size > 1))
        self.step_graphs: list[Recorder] = []
        self.draft_graphs: list[Recorder] = []  # the narrower first
        self.chunk_graph: Graphs | None = None
        self.table: BlockTable | None = None
        if capture is not None:
            self._record(run, capture, progress)
        elif scratch is not None:
            self.step_graphs = [RecordedSteps(self._step, run, scratch, self.logits)]
            self.draft_graphs = [RecordedSteps(self._draft, run, scratch, self.logits)]

    def forward(self, chunks: list[Chunk], hidden: torch.Tensor | None = None) -> StepRows | None:
        """What forwards leave of all chunks' tokens, in order; writes their latents into the cache. None where no lane
        has a chunk. `hidden` (T, H): in a later stage of a pipeline, what the one before made of the same chunks."""
        return self.run([chunk.slice for chunk in chunks], hidden)

    def run(self, slices: list[SequenceSlice], hidden: torch.Tensor | None = None) -> StepRows | None:
        """The same for the tokens themselves."""
        self.model.tp.partial_sums.clear()
        return self._run(self._step, self.step_graphs, slices, hidden)

    def _step(self, batch: Batch, hidden: torch.Tensor | None) -> torch.Tensor:
        return self.model(batch, self.cache, hidden)

    def _draft(self, batch: Batch, hidden: torch.Tensor | None) -> torch.Tensor:
        assert hidden is not None
        return self.model.draft(batch, hidden, self.cache)

    def _run(
        self,
        forward: Forward,
        graphs: list[Recorder],
        slices: list[SequenceSlice],
        hidden: torch.Tensor | None = None,
    ) -> StepRows | None:
        """`forward` on the sequences of all lanes together: this lane's rows; None where no lane has any. hidden
        (T, H): its input hidden states.

        The first sequences of each lane that fit one of `graphs` are replayed, as long as some lane has any; the others
        run by themselves, or, if they are one chunk of a prompt that fits, by its graph."""
        narrowest = next((i for i, recorded in enumerate(graphs) if recorded.fit(slices)), len(graphs))
        n = len(slices) if narrowest < len(graphs) else graphs[-1].fitting(slices) if graphs else 0
        few, rest = slices[:n], slices[n:]
        n_few, n_rest = (sum(len(tokens) for tokens, _, _ in part) for part in (few, rest))
        dp = self.model.dp
        mine = [narrowest, self.table.rows_needed(few) if self.table else 0, n_few, n_rest]
        lanes = [mine] if dp.size == 1 else dp.gather_ints(torch.tensor(mine)).tolist()
        fitting, needed, all_few, all_rest = zip(*lanes, strict=True)
        if not any(all_few) and not any(all_rest):
            return None
        of_few, of_rest = (None, None) if hidden is None else (hidden[:n_few], hidden[n_few:])
        chunk = None
        if self.chunk_graph is not None and forward == self._step and rest and self.chunk_graph.fit(rest):
            chunk = self.chunk_graph.run(rest, of_rest)  # recorded first: the others' replays leave its result alone
        parts = []
        if any(all_few):
            parts.append(graphs[min(max(fitting), len(graphs) - 1)].run(few, of_few, max(needed)))
        if chunk is not None:
            parts.append(chunk)
        elif any(all_rest):
            parts += self._run_eagerly(forward, rest, of_rest, all_rest).parts
        return StepRows(parts)

    def _run_eagerly(
        self, forward: Forward, slices: list[SequenceSlice], hidden: torch.Tensor | None, lane_rows: tuple[int, ...]
    ) -> StepRows:
        """`forward` on what no graph takes; lane_rows: how many tokens of it each lane has."""
        n_rows = sum(len(tokens) for tokens, _, _ in slices)
        if not slices:
            slices = [([0], 0, [self.cache.shape[1] - 1])]
            hidden = None if hidden is None else hidden.new_zeros(1, hidden.shape[1])
        batch = Batch.pack(slices, self.model.device, lane_rows if len(lane_rows) > 1 else ())
        return StepRows.of(forward(batch, hidden)[:n_rows])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (rows, V), float32, where they can be sampled from: that takes float64."""
        logits = self.model.logits(hidden)
        return logits if devices.holds(logits.device, torch.float64) else logits.cpu()

    def sample_scores(self, chunks: list[Chunk], step: StepRows) -> Scores:
        """Logits after the last token of each chunk that samples and after each of its drafts."""
        rows: list[int] = []
        at = 0
        for chunk in chunks:
            if chunk.samples:
                rows += range(at + chunk.n - 1, at + chunk.n_rows)
            at += chunk.n_rows
        return step.scores(rows, self.logits)

    def prompt_logits(self, chunks: list[Chunk], step: StepRows) -> Iterator[tuple[Sequence, int, torch.Tensor]]:
        """For prompt tokens that are to be scored, at most SCORED_ROWS at a time: the sequence, the position of the
        first of them, and the logits (n, V), float32, that score them. Marks them as scored."""
        at = 0
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.no_prefix_reuse:
                first = max(chunk.start, sequence.n_scored)
                stop = min(chunk.start + chunk.n, sequence.n_prompt - 1)  # row p scores token p + 1
                for lo in range(first, stop, memory.SCORED_ROWS):
                    hi = min(lo + memory.SCORED_ROWS, stop)
                    sequence.n_scored = hi
                    rows = range(at + lo - chunk.start, at + hi - chunk.start)
                    yield sequence, lo + 1, self.logits(step.hidden(rows))
            at += chunk.n_rows

    def draft(self, chunks: list[Chunk], step: StepRows | None, continuing: list[Sequence], propose: Propose) -> None:
        """Gives each continuing sequence `mtp` drafts, after the tokens of this step were committed.

        The MTP module (V3 section 2.2) runs on every token that the step has cached, each with the next one, and on
        the main model's hidden states. For drafts after the first it runs on its own state and its own proposal.
        A lane without chunks calls this too, and so does a stage that is not the last: it has no module, and hears the
        proposals.
        """
        if not self.model.stage.is_last:
            for _ in range(self.mtp if continuing else 0):
                self._append_drafts(continuing, propose(continuing, Scores([])))
            return
        slices: list[SequenceSlice] = []
        rows: list[int] = []
        ends: dict[Sequence, tuple[int, int]] = {}  # its last row, and the position after it
        at = 0
        for chunk in chunks:
            sequence, start = chunk.sequence, chunk.start
            followers = sequence.tokens[start + 1 : sequence.n_cached + 1]
            if followers:  # a request that failed may have no token after its last
                slices.append((followers, start, sequence.pages))
                rows += range(at, at + len(followers))
                ends[sequence] = (len(rows) - 1, start + len(followers))
            at += chunk.n_rows
        states = self._run(self._draft, self.draft_graphs, slices, None if step is None else step.hidden(rows))
        last = [ends[sequence][0] for sequence in continuing]
        for k in range(self.mtp):
            if k and states is not None:
                more: list[SequenceSlice] = [([s.drafts[-1]], ends[s][1] + k - 1, s.pages) for s in continuing]
                states = self._run(self._draft, self.draft_graphs, more, states.hidden(last))
                last = list(range(len(continuing)))
            if states is None:
                return
            if continuing:
                self._append_drafts(continuing, propose(continuing, states.scores(last, self.logits)))

    def _append_drafts(self, sequences: list[Sequence], drafts: list[int]) -> None:
        for sequence, token in zip(sequences, drafts, strict=True):
            sequence.drafts.append(token)

    @property
    def all_graphs(self) -> list[Recorder]:
        return [*self.step_graphs, *self.draft_graphs, *([self.chunk_graph] if self.chunk_graph else [])]

    def close(self) -> None:
        """Frees the graphs: they hold communicators, which must go before the process group does, and after the device
        has done with them."""
        if self.step_graphs:
            for graphs in self.all_graphs:
                graphs.close()
            self.step_graphs.clear()
            self.draft_graphs.clear()
            self.chunk_graph = None
            gc.collect()
            devices.synchronise(self.model.device)

    def _record(self, run: RunConfig, capture: Capture, progress: bool) -> None:
        """Records the forwards of decoding: the step itself, and the MTP module on a step's tokens and on one draft;
        and before them, if there can be such a step, that of one chunk of a prompt."""
        model, most, width = self.model, run.max_num_seqs, 1 + run.mtp
        padding_page, is_last = self.cache.shape[1] - 1, model.stage.is_last
        self.table = BlockTable(most, run.pages_per_sequence, padding_page, model.device)
        vocab = model.args.vocab_size if is_last else 0
        self.buffers = RecordedBuffers(most, width, vocab, model.args.dim, model.num.dtype, self.table)

        def record(width: int, forward: Forward, what: str) -> Graphs:
            return Graphs(
                forward, self.buffers, max_num_seqs=most, width=width, padding_page=padding_page, capture=capture,
                head=self.logits if is_last else None, progress=f"recording {what}" if progress else "",
                lanes=model.dp.size,
            )  # fmt: skip

        if records_chunks(run, model.dp.size):
            table = BlockTable(1, CHUNK_KEYS // PAGE_SIZE, padding_page, model.device)
            buffers = RecordedBuffers(1, CHUNK_ROWS, 0, model.args.dim, model.num.dtype, table)
            self.chunk_graph = Graphs(
                self._step, buffers, max_num_seqs=1, width=CHUNK_ROWS, padding_page=padding_page, capture=capture
            )
        self.step_graphs = [record(width, self._step, "decode steps")]
        drafts = sorted({1, width} if run.mtp > 1 else {width} if run.mtp else ()) if is_last else []
        self.draft_graphs = [record(tokens, self._draft, "drafts") for tokens in drafts]
