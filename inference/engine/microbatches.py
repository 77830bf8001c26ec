"""The microbatches of a pipeline: what each stage runs in a step. Without a pipeline there is one microbatch."""

from dataclasses import replace

import torch

from core.run_config import PAGE_SIZE, RunConfig
from engine.pages import PagePool
from engine.runner import ModelRunner
from engine.scheduler import Chunk, Scheduler, Sequence
from engine.step_rows import StepRows
from parallel.group import Group


class Microbatches:
    """As many microbatches as stages, each with a scheduler, sequences and a part of the pages of its own. In a step
    the first stage runs the chunks of one microbatch, the second those of the one before, and so on; the last stage's
    are sampled. A microbatch is scheduled again when its chunks have been through all stages. Every rank calls the same
    methods."""

    def __init__(self, run: RunConfig, pp: Group, no_states: torch.Tensor):
        """`run` with n_pages filled in; `pp`: the ranks with this one's place in the stages, the last stage's first;
        no_states (0, H): hidden states of no tokens."""
        assert run.n_pages is not None
        self.pp, self.no_states, self.n = pp, no_states, run.pp
        self.stage = run.pp - 1 - pp.rank
        self.config = replace(run, max_num_seqs=run.seqs_per_microbatch)
        n_pages = run.n_pages // run.pp
        pools = [PagePool(n_pages, PAGE_SIZE, int(run.mtp > 0), first=i * n_pages) for i in range(run.pp)]
        self.schedulers = [Scheduler(pool, self.config) for pool in pools]
        self.next = 0  # the microbatch that the first stage runs next
        self.in_flight: list[list[Chunk]] = [[]] * (run.pp - 1)  # what all stages but the last ran, the first's first
        self._incoming: torch.Tensor | None = None  # hidden states from the stage before

    def run(self, runner: ModelRunner) -> tuple[list[Chunk], StepRows | None, bool]:
        """A step: schedules, runs this stage's chunks, and gives their states to the next stage. Returns the chunks
        that the last stage has run, what this stage's forwards left, None if it had nothing to do, and whether any
        stage or lane had."""
        running = [self.schedulers[self.next].schedule(), *self.in_flight]
        rows = runner.forward(running[self.stage], self._incoming)
        if self.n > 1:
            coming = sum(chunk.n_rows for chunk in running[self.stage - 1]) if self.stage else 0
            hidden = None if rows is None else rows.hidden()
            self._incoming = self.pp.send_receive(hidden, coming, self.no_states)
        self.next = (self.next + 1) % self.n
        *self.in_flight, done = running
        return done, rows, rows is not None or any(running)

    def add(self, sequence: Sequence) -> None:
        self.schedulers[sequence.microbatch].add(sequence)

    def commit(self, chunk: Chunk, tokens: list[int]) -> None:
        self.schedulers[chunk.sequence.microbatch].commit(chunk, tokens)

    def remove(self, sequence: Sequence) -> None:
        """Takes out a sequence that no stage is running a chunk of."""
        self.schedulers[sequence.microbatch].remove(sequence)

    @property
    def preemptions(self) -> int:
        return sum(scheduler.preemptions for scheduler in self.schedulers)
