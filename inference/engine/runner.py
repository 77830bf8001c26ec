"""Runs the model on a step's chunks: the forward, the logits that are asked for, drafts, and recorded graphs."""

import gc
from collections.abc import Callable, Iterator

import torch

from core import devices
from core.batch import Batch, SequenceSlice
from core.run_config import RunConfig
from engine import memory
from engine.graphs import Capture, Forward, Graphs
from engine.scheduler import Chunk, Sequence
from model import Transformer

# From sequences and the MTP module's logits (sequences, V) to their next drafts.
Propose = Callable[[list[Sequence], torch.Tensor], list[int]]


class ModelRunner:
    """A model and its latent cache. Every rank calls the same methods with the same chunks."""

    def __init__(self, model: Transformer, run: RunConfig, capture: Capture | None, progress: bool):
        """`run` with n_pages and max_model_len filled in; `capture` None records nothing; `progress` shows a bar."""
        assert run.n_pages is not None
        self.model, self.mtp = model, run.mtp
        # with graphs one page more, for the latents of padding
        self.cache = model.new_cache(run.n_pages + (capture is not None))
        self.step_graphs: Graphs | None = None
        self.draft_graphs: list[Graphs] = []
        if capture is not None:
            self._record(run, capture, progress)

    def forward(self, chunks: list[Chunk]) -> torch.Tensor:
        """Hidden states (T, H) of all chunks' tokens, in order; writes their latents into the cache."""
        self.model.tp.partial_sums.clear()
        slices = [chunk.slice for chunk in chunks]
        hidden = self.step_graphs.run(slices) if self.step_graphs else None
        if hidden is None:
            hidden = self.model(Batch.pack(slices, self.model.device), self.cache)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (rows, V), float32, where they can be sampled from: that takes float64."""
        logits = self.model.logits(hidden)
        return logits if devices.holds(logits.device, torch.float64) else logits.cpu()

    def sample_logits(self, chunks: list[Chunk], hidden: torch.Tensor) -> torch.Tensor:
        """Logits (rows, V), float32, after the last token of each chunk that samples and after each of its drafts."""
        rows: list[int] = []
        at = 0
        for chunk in chunks:
            if chunk.samples:
                rows += range(at + chunk.n - 1, at + chunk.n_rows)
            at += chunk.n_rows
        return self.logits(hidden[rows])

    def prompt_logits(self, chunks: list[Chunk], hidden: torch.Tensor) -> Iterator[tuple[Sequence, int, torch.Tensor]]:
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
                    yield sequence, lo + 1, self.logits(hidden[at + lo - chunk.start : at + hi - chunk.start])
            at += chunk.n_rows

    def draft(self, chunks: list[Chunk], hidden: torch.Tensor, continuing: list[Sequence], propose: Propose) -> None:
        """Gives each continuing sequence `mtp` drafts, after the tokens of this step were committed.

        The MTP module (V3 section 2.2) runs on every token that the step has cached, each with the next one, and on
        the main model's hidden (T, H). For drafts after the first it runs on its own state and its own proposal.
        """
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
        if not slices:
            return
        states = self._draft_states(slices, hidden[rows])
        if not continuing:
            return
        states = states[[ends[sequence][0] for sequence in continuing]]
        for k in range(self.mtp):
            if k:
                step: list[SequenceSlice] = [([s.drafts[-1]], ends[s][1] + k - 1, s.pages) for s in continuing]
                states = self._draft_states(step, states)
            drafts = propose(continuing, self.logits(states))
            for sequence, token in zip(continuing, drafts, strict=True):
                sequence.drafts.append(token)

    def close(self) -> None:
        """Frees the graphs: they hold communicators, which must go before the process group does."""
        if self.step_graphs is not None:
            self.step_graphs = None
            self.draft_graphs.clear()
            gc.collect()

    def _draft_states(self, slices: list[SequenceSlice], hidden: torch.Tensor) -> torch.Tensor:
        """The MTP module's states (T, H) from hidden states (T, H) and the tokens that follow them."""
        for graphs in self.draft_graphs:
            states = graphs.run(slices, hidden)
            if states is not None:
                return states
        return self.model.draft(Batch.pack(slices, self.model.device), hidden, self.cache)

    def _record(self, run: RunConfig, capture: Capture, progress: bool) -> None:
        """Records the forwards of decoding: the step itself, and the MTP module on a step's tokens and on one draft."""
        model, most, width = self.model, run.max_num_seqs, 1 + run.mtp
        hidden = torch.zeros(most * width, model.args.dim, dtype=model.num.dtype, device=model.device)

        def record(width: int, forward: Forward, what: str) -> Graphs:
            return Graphs(
                forward, max_num_seqs=most, width=width, hidden=hidden, n_pages=run.pages_per_sequence,
                padding_page=self.cache.shape[1] - 1, capture=capture, progress=f"recording {what}" if progress else "",
            )  # fmt: skip

        self.step_graphs = record(width, lambda batch, _: model(batch, self.cache), "decode steps")
        for tokens in sorted({1, width} if run.mtp > 1 else {width} if run.mtp else ()):
            drafts = record(tokens, lambda batch, h: model.draft(batch, h, self.cache), "drafts")
            self.draft_graphs.append(drafts)
