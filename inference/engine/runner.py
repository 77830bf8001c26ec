"""Runs the model on a step's chunks: the forward, the logits that are asked for, drafts, and recorded graphs."""

import gc
from collections.abc import Callable, Iterator

import torch

from core import devices
from core.batch import Batch, SequenceSlice
from core.run_config import RunConfig
from engine import memory
from engine.block_table import BlockTable
from engine.graphs import Capture, Forward, Graphs, RecordedBuffers
from engine.sampling import Scores
from engine.scheduler import Chunk, Sequence
from engine.step_rows import StepRows
from model import Transformer

# From sequences and what the MTP module says of their next tokens to their next drafts.
Propose = Callable[[list[Sequence], Scores], list[int]]


class ModelRunner:
    """A model and its latent cache. Every rank of a lane calls the same methods with the same chunks, and all lanes run
    the same forwards together, each on its own chunks; one without any runs padding."""

    def __init__(self, model: Transformer, run: RunConfig, capture: Capture | None, progress: bool):
        """`run` with n_pages and max_model_len filled in; `capture` None records nothing; `progress` shows a bar."""
        assert run.n_pages is not None
        self.model, self.mtp = model, run.mtp
        # with graphs or lanes one page more, for the latents of padding
        self.cache = model.new_cache(run.n_pages + (capture is not None or model.dp.size > 1))
        self.step_graphs: list[Graphs] = []
        self.draft_graphs: list[Graphs] = []  # the narrower first
        self.table: BlockTable | None = None
        if capture is not None:
            self._record(run, capture, progress)

    def forward(self, chunks: list[Chunk], hidden: torch.Tensor | None = None) -> StepRows | None:
        """What forwards leave of all chunks' tokens, in order; writes their latents into the cache. None where no lane
        has a chunk. `hidden` (T, H): in a later stage of a pipeline, what the one before made of the same chunks."""
        self.model.tp.partial_sums.clear()
        return self._run(self._step, self.step_graphs, [chunk.slice for chunk in chunks], hidden)

    def _step(self, batch: Batch, hidden: torch.Tensor | None) -> torch.Tensor:
        return self.model(batch, self.cache, hidden)

    def _draft(self, batch: Batch, hidden: torch.Tensor | None) -> torch.Tensor:
        assert hidden is not None
        return self.model.draft(batch, hidden, self.cache)

    def _run(
        self,
        forward: Forward,
        graphs: list[Graphs],
        slices: list[SequenceSlice],
        hidden: torch.Tensor | None = None,
    ) -> StepRows | None:
        """`forward` on the sequences of all lanes together: this lane's rows; None where no lane has any. hidden
        (T, H): its input hidden states.

        It is replayed where the sequences of all lanes fit one of `graphs`. Where some of this lane's first do, and
        there are no other lanes, these are replayed, and the others run by themselves."""
        n_rows = sum(len(tokens) for tokens, _, _ in slices)
        narrowest = next((i for i, recorded in enumerate(graphs) if recorded.fit(slices)), len(graphs))
        dp = self.model.dp
        if dp.size == 1 and narrowest == len(graphs) and graphs and (n := graphs[-1].fitting(slices)):
            n_first = sum(len(tokens) for tokens, _, _ in slices[:n])
            first, rest = (None, None) if hidden is None else (hidden[:n_first], hidden[n_first:])
            replayed = graphs[-1].run(slices[:n], first)
            return StepRows([replayed, *self._run_eagerly(forward, slices[n:], rest).parts])
        needed = self.table.rows_needed(slices) if self.table else len(slices)
        mine = [n_rows, needed, narrowest]
        lanes = [mine] if dp.size == 1 else dp.gather_ints(torch.tensor(mine)).tolist()
        rows, sequences, fitting = zip(*lanes, strict=True)
        if not any(rows):
            return None
        if max(fitting) < len(graphs):
            return StepRows([graphs[max(fitting)].run(slices, hidden, max(sequences))])
        if not slices:
            slices = [([0], 0, [self.cache.shape[1] - 1])]
            hidden = None if hidden is None else hidden.new_zeros(1, hidden.shape[1])
        return self._run_eagerly(forward, slices, hidden, rows if len(rows) > 1 else (), n_rows)

    def _run_eagerly(
        self,
        forward: Forward,
        slices: list[SequenceSlice],
        hidden: torch.Tensor | None,
        lane_rows: tuple[int, ...] = (),
        n_rows: int | None = None,
    ) -> StepRows:
        batch = Batch.pack(slices, self.model.device, lane_rows)
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

    def close(self) -> None:
        """Frees the graphs: they hold communicators, which must go before the process group does, and after the device
        has done with them."""
        if self.step_graphs:
            for graphs in (*self.step_graphs, *self.draft_graphs):
                graphs.close()
            self.step_graphs.clear()
            self.draft_graphs.clear()
            gc.collect()
            devices.synchronise(self.model.device)

    def _record(self, run: RunConfig, capture: Capture, progress: bool) -> None:
        """Records the forwards of decoding: the step itself, and the MTP module on a step's tokens and on one draft."""
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

        self.step_graphs.append(record(width, self._step, "decode steps"))
        if not is_last:
            return
        for tokens in sorted({1, width} if run.mtp > 1 else {width} if run.mtp else ()):
            self.draft_graphs.append(record(tokens, self._draft, "drafts"))
