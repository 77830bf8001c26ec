"""The engine: requests in, steps, answers out.

A step schedules chunks of sequences, runs the model on them, samples, and commits the new tokens. Every rank runs the
same steps. Rank 0 alone takes requests, samples and answers; it broadcasts what the other ranks need (prompts,
cancellations, tokens, drafts) as integers. They follow in `Engine.serve`. With data-parallel lanes the first rank of
each samples its lane's sequences, and reports to rank 0 (lanes.py).
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from core.errors import UserError, describe
from core.run_config import RunConfig
from core.sampling_params import SamplingParams
from engine import graphs, recorded_steps, setup
from engine.constraint import Constraints
from engine.exchange import STOP, unpack
from engine.graphs import Capture
from engine.lanes import Dispatcher, LaneState, add_stats, apply_reports, decode_request
from engine.microbatches import Microbatches
from engine.registry import RequestRegistry
from engine.request import Prompt, Request, encode, is_conversation
from engine.runner import ModelRunner
from engine.sampler import Sampled, Sampler, isolate_request_errors
from engine.sampling import Scores
from engine.scheduler import Chunk, Scheduler, Sequence
from engine.stats import Stats
from engine.step_rows import StepRows
from model import Transformer
from ops.cpu.captured_calls import Scratch
from parallel.group import SOLO, Group
from text.chat_format import ChatFormat
from text.grammar import Grammar
from text.tokenizer import Tokenizer

T = TypeVar("T")


class Engine:
    """Answers requests with one model, several at a time.

    engine = Engine.from_pretrained("demo/checkpoint", mtp=1)
    for request in engine.generate([[{"role": "user", "content": "What is 3 + 4?"}]]):
        print(request.text)
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        run: RunConfig = RunConfig(),
        *,
        capture: Capture | None = None,
        progress: bool = False,
        world: Group | None = None,
        pp: Group = SOLO,
    ):
        """`model` is loaded and prepared: `run` sizes the engine, and what it says of numerics and devices is not read
        again. The tokenizer is needed on the first rank of a lane only. All ranks give the same `run`. `world`: those
        of all lanes or stages, where there are several; `pp`: those with this one's place in the stages of a pipeline.

        `capture` records decode steps, by default as CUDA graphs where these work and `run` is not eager; `progress`
        shows a bar meanwhile. Raises UserError for a run that the model or this rank's memory does not allow.
        """
        if run.deterministic and not model.num.batch_invariant:
            raise UserError("deterministic needs a model built with Numerics(batch_invariant=True)")
        self.model, self.tokenizer, self.tp, self.dp = model, tokenizer, model.tp, model.dp
        assert world is not None or self.dp.size * run.pp == 1, "lanes and stages need the group of all ranks"
        self.world = self.tp if world is None else world
        rank = setup.rank_of(model)
        if capture is None and not run.eager and graphs.records(rank.gpu, model.num.dtype):
            capture = graphs.cuda_capture()
        calls = capture is None and recorded_steps.records(rank, run)
        self.run = run = setup.size_cache(run, model, calls or capture is not None, pp)
        assert run.n_pages is not None and run.max_model_len is not None
        self.mtp, self.max_model_len = run.mtp, run.max_model_len
        self.constraints = None if tokenizer is None else Constraints(tokenizer, model.args.vocab_size)
        no_states = torch.empty(0, model.args.dim, dtype=model.num.dtype, device=model.device)
        self.microbatches = Microbatches(run, pp, no_states)
        scratch = Scratch(recorded_steps.scratch_bytes(rank, run)) if calls else None
        shows = progress and self.world.rank == 0
        self.runner = ModelRunner(model, self.microbatches.config, capture, shows, scratch)
        self._stats = Stats(drafted=[0] * run.mtp, accepted=[0] * run.mtp)
        self._others: list[LaneState] = []  # rank 0: of the other lanes, after the last step
        self.default_params = SamplingParams()  # of requests that bring none
        self.closed = False
        self._next_id = 0
        self._sequences: dict[int, Sequence] = {}  # every rank: the unfinished ones, by id
        places = self.dp.size * run.pp
        dispatcher = Dispatcher(places, run.seqs_per_microbatch) if places > 1 and self.world.rank == 0 else None
        self.registry = RequestRegistry(dispatcher, lanes=self.dp.size)
        followers = self.world if run.pp > 1 else self.tp  # hear what is sampled
        self.sampler = Sampler(followers, tokenizer, self.registry.live, self._stats, run.mtp, self.cancel, model.ops)
        self._leaving: list[int] = []  # cancelled sequences of other microbatches than the next

    @classmethod
    def from_pretrained(
        cls,
        ckpt_path: str | Path,
        run: RunConfig | None = None,
        *,
        config: str | Path | None = None,
        device: torch.device | str | None = None,
        world: Group = SOLO,
        progress: bool = False,
        chat: bool = False,
        thinking: bool | None = None,
        **run_fields: Any,
    ) -> "Engine":
        """Loads a checkpoint directory: Hugging Face's layout, converted by this project, or by the V3 repository.

        `run_fields` are RunConfig's and replace those of `run`. `config` is needed only where the directory has none;
        `device` replaces RunConfig's where it has a number; `world` are the ranks (parallel.startup.join and on), one
        lane or, by RunConfig's `dp`, several; `chat` refuses a checkpoint without a usable chat template,
        or without the switch that `thinking` asks for. Raises UserError for a bad checkpoint, a config that contradicts
        it, numerics the device cannot compute, or a run that memory cannot hold, on every rank when one rank meets it.
        """
        known = {f.name for f in fields(RunConfig)}
        if unknown := [name for name in run_fields if name not in known]:
            raise TypeError(f"{unknown[0]!r} is neither an argument of from_pretrained nor a field of RunConfig")
        run = replace(run or RunConfig(), **run_fields)
        model, tokenizer, default_params, pp = setup.load(
            ckpt_path, run, config=config, device=device, world=world, progress=progress, chat=chat, thinking=thinking
        )
        engine = cls(model, tokenizer, run, progress=progress, world=world, pp=pp)
        engine.default_params = default_params
        return engine

    # ----------------------------------------------------------------------------------------------------------------
    # Requests (rank 0)
    # ----------------------------------------------------------------------------------------------------------------

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        id: int | None = None,
        *,
        choice: int = 0,
        thinking: bool | None = None,
        chat: ChatFormat | None = None,
        grammar: Grammar | None = None,
    ) -> Request:
        """Queues a prompt. One that cannot be answered comes back finished, with `error` set; no other is affected.

        `id` and `choice` key the random numbers: the same (seed, id, choice) draws the same ones in any batch.
        `thinking` is for templates that can switch it (see Tokenizer.encode_chat); `chat` says that token ids are those
        of a conversation, and how its answer is read; `grammar`, the params' answer_format compiled, saves time here.
        """
        request = Request(self._next_id if id is None else id, [], params or self.default_params, choice)
        request.chat = ChatFormat() if chat is None and is_conversation(prompt) else chat
        self._next_id = max(self._next_id, request.id) + 1
        try:
            request.prompt = encode(prompt, self.tokenizer, self.model.args.vocab_size, thinking)
            if not request.prompt:
                raise UserError("the prompt is empty")
            request.params.check_vocabulary(self.model.args.vocab_size)
            if len(request.prompt) >= self.max_model_len:
                raise UserError(f"the prompt has {len(request.prompt)} tokens and leaves no room for an answer in the "
                                f"context of {self.max_model_len} (--max-model-len)")  # fmt: skip
            if self.tokenizer:
                request.detokenizer = self.tokenizer.stream()
                request.opens_thinking = self.tokenizer.starts_thinking(request.prompt)
            self._constrain(request, grammar)
        except Exception as e:  # internal errors fail this request only
            request.finish_reason, request.error = "error", describe(e)
            return request
        self._stats.prompt += len(request.prompt)
        self.registry.queue(request, min(len(request.prompt) + request.params.max_new_tokens, self.max_model_len))
        return request

    def _constrain(self, request: Request, grammar: Grammar | None = None) -> None:
        """Holds a request to its params' answer_format. Raises UserError where that is not possible."""
        if request.params.answer_format is not None:
            if self.constraints is None:
                raise UserError("answer_format needs a tokenizer")
            request.constraint = self.constraints.constraint(request.params.answer_format, request.prompt, grammar)

    def cancel(self, request: Request) -> None:
        """Ends a request; it is finished, as "cancelled" (or "error", if it has one), after the next step."""
        self.registry.cancel(request)

    @property
    def busy(self) -> bool:
        return bool(self.registry.live)

    @property
    def live_sequences(self) -> Mapping[int, Sequence]:
        """Every rank: the unfinished sequences, by id."""
        return self._sequences

    @property
    def scheduler(self) -> Scheduler:
        """That of the first microbatch, the only one without a pipeline."""
        return self.microbatches.schedulers[0]

    @property
    def max_num_seqs(self) -> int:
        """Sequences that all lanes, or all microbatches of a pipeline, together answer at a time."""
        return self.dp.size * self.run.pp * self.run.seqs_per_microbatch

    @property
    def lane_states(self) -> list[LaneState]:
        """Rank 0: what each lane had done, and had to do, after the last step."""
        return [LaneState.of(self.microbatches.schedulers, self._stats), *self._others]

    @property
    def stats(self) -> Stats:
        """Rank 0: what all lanes have done so far."""
        return add_stats([state.stats for state in self.lane_states]) if self._others else self._stats

    def stream(
        self, prompts: Iterable[Prompt], params: SamplingParams | None = None, *, thinking: bool | None = None
    ) -> Iterator[Request]:
        """Answers prompts, yielding a request each time it has new tokens or is finished.

        `request.new_text` is what was added. Requests are numbered from 0, so that a seed means the same every time;
        a prompt has params.n of them, with the same `id` and different `choice`.
        """
        assert not self.busy, "another call is being answered"
        self._next_id = 0
        params = params or self.default_params
        requests = [self.add(prompt, params, i, choice=c, thinking=thinking)
                    for i, prompt in enumerate(prompts) for c in range(params.n)]  # fmt: skip
        try:
            yield from (r for r in requests if r.finish_reason)
            while self.busy:
                yield from self.step()
        except BaseException as e:  # the caller has left the loop, or was interrupted
            if isinstance(e, GeneratorExit) or self.world.size == 1:  # after a failure other ranks are in another step
                for r in requests:
                    self.cancel(r)
                for _ in range(self.run.pp):  # until each microbatch has been scheduled
                    self.step()
            raise

    def generate(
        self, prompts: Iterable[Prompt], params: SamplingParams | None = None, *, thinking: bool | None = None
    ) -> list[Request]:
        """Answers prompts and returns the finished requests in the same order, params.n to each prompt."""
        finished = {(r.id, r.choice): r for r in self.stream(prompts, params, thinking=thinking)}
        return [finished[key] for key in sorted(finished)]

    # ----------------------------------------------------------------------------------------------------------------
    # The loop (every rank)
    # ----------------------------------------------------------------------------------------------------------------

    def step(self) -> list[Request]:
        """Runs one forward; returns the requests that have new tokens or are finished. A step without work only checks
        that every rank is alive."""
        began = time.perf_counter()
        advanced = self._exchange()
        if self.closed:
            return []
        chunks, rows, busy = self.microbatches.run(self.runner)
        if not busy:
            self.world.heartbeat()
            return advanced + self._share_reports([])  # a lane may just have lost its last sequence
        sampled = self._sample(chunks, rows)
        changed = self._commit(chunks, rows, sampled)
        advanced += [request for _, request in changed]
        self._stats.steps += 1
        self._stats.preemptions = self.microbatches.preemptions
        self._stats.seconds += time.perf_counter() - began
        return advanced + self._share_reports(changed)

    def _sample(self, chunks: list[Chunk], step: StepRows | None) -> Sampled:
        """The tokens that follow each chunk that samples; prompt tokens are scored on the way. `step`: what the last
        stage's forwards left."""
        sampling = [chunk for chunk in chunks if chunk.samples]
        if not self.model.stage.is_last or step is None:
            return self.sampler.sample(sampling, Scores([])) if sampling else {}
        self._score_prompts(chunks, step)
        return self.sampler.sample(sampling, self.runner.sample_scores(chunks, step)) if sampling else {}

    def _score_prompts(self, chunks: list[Chunk], step: StepRows) -> None:
        for sequence, at, logits in self.runner.prompt_logits(chunks, step):
            self.sampler.score_prompt(sequence, at, logits)
            del logits  # before the next block of them is made

    def _commit(self, chunks: list[Chunk], step: StepRows | None, sampled: Sampled) -> list[tuple[int, Request]]:
        """Appends the tokens, drafts the next ones, and finishes what has its last token; returns on a lane's first
        rank the requests that sampled, each with its sequence."""
        for chunk in chunks:
            self.microbatches.commit(chunk, sampled[chunk][0] if chunk in sampled else [])
        if self.mtp and (step is not None or not self.model.stage.is_last):
            continuing = [chunk.sequence for chunk, (_, finish) in sampled.items() if finish is None]
            self.runner.draft(chunks, step, continuing, self.sampler.propose)
        advanced = []
        for chunk, (_, finish) in sampled.items():
            id = chunk.sequence.id
            if finish is not None:
                self.microbatches.remove(self._sequences.pop(id))
            if (request := self.registry.live.get(id)) is not None:
                advanced.append((id, request))
                if finish is not None:
                    self.registry.finish(request, finish)
        return advanced

    def _share_reports(self, changed: list[tuple[int, Request]]) -> list[Request]:
        """Rank 0: the requests of other lanes that this step changed, after doing to them what it did there."""
        if self.dp.size == 1 or self.tp.rank > 0:
            return []
        if self.world.rank > 0:
            self.dp.gather_bytes(self.registry.report(changed, LaneState.of(self.microbatches.schedulers, self._stats)))
            return []
        reports = self.dp.gather_bytes(b"")[1:]
        self._others, advanced = apply_reports(reports, self.registry.live, self.registry.finish, self.cancel)
        return advanced

    # ----------------------------------------------------------------------------------------------------------------
    # Ranks
    # ----------------------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Ranks other than 0: follows rank 0's steps until it closes the engine."""
        assert self.world.rank > 0
        while not self.closed:
            self.step()

    def close(self) -> None:
        """Rank 0: ends `serve` on the other ranks, and frees the graphs on all."""
        if not self.closed:
            self._exchange(stop=True)

    def _exchange(self, stop: bool = False) -> list[Request]:
        """Every rank hears rank 0's new requests and cancellations, or that it stops; returns on rank 0 the cancelled
        requests."""
        said = self.world.broadcast_ints(STOP if stop else self.registry.message() if self.world.rank == 0 else [])
        if said == STOP:
            self.closed = True
            self.runner.close()
            return []
        cancelled, arrivals = unpack(said)
        self._leaving += cancelled
        gone = self._remove_cancelled()
        for a in arrivals:
            microbatch, lane = divmod(a.place, self.dp.size)
            if lane == self.dp.rank:
                sequence = Sequence(a.id, a.prompt, a.capacity, len(a.prompt), a.scored, microbatch=microbatch)
                self._sequences[a.id] = sequence
                self.microbatches.add(sequence)
                if lane > 0 and self.tp.rank == 0:
                    request = decode_request(a.about, list(a.prompt), self.tokenizer)
                    self.registry.keep(a.id, request)
                    isolate_request_errors(request, partial(self._constrain, request))
                    if request.error:
                        self.cancel(request)
        return gone

    def _remove_cancelled(self) -> list[Request]:
        """Removes the cancelled sequences of the next microbatch, which no stage is running; returns their requests."""
        gone, later = [], []
        for id in self._leaving:
            if id in self._sequences and self._sequences[id].microbatch != self.microbatches.next:
                later.append(id)
                continue
            if id in self._sequences:
                self.microbatches.remove(self._sequences.pop(id))
            if (request := self.registry.live.get(id)) is not None:
                request.begin_step()
                self.registry.finish(request, "cancelled")
                gone.append(request)
        self._leaving = later
        return gone
