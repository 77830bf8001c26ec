"""The loop: schedule, pack, forward, sample, commit, draft.

Every rank runs the same engine. Rank 0 alone takes requests, samples and answers; what the other ranks need of it
(prompts, cancellations, the sampled tokens, drafts) it sends as integer tensors. They follow in `Engine.serve`.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from checkpoint.directory import Checkpoint, choose_args
from checkpoint.load import load_into
from core.batch import DECODE_ROWS, Batch
from core.config import ModelArgs
from core.errors import UserError, describe
from core.numerics import Numerics
from core.run_config import PAGE_SIZE, AskedLayout
from core.sampling_params import SamplingParams, params_from_generation_config
from engine import memory
from engine.graphs import Capture, Forward, Graphs, Place, cuda_capture, records
from engine.pages import PagePool
from engine.request import FinishReason, Request
from engine.sampling import Ask, Draft, logprob, propose, verify
from engine.scheduler import Chunk, Job, Scheduler
from model import Transformer
from ops import backend as ops
from ops.cpu import kernels as kernel_cpu
from parallel.group import SOLO, Group
from parallel.startup import environment
from text.tokenizer import Tokenizer

T = TypeVar("T")
Prompt = str | list[int] | list[dict]  # raw text, token ids, or chat messages
_FINISH: list[FinishReason | None] = [None, "stop", "length", "error", "cancelled"]  # as numbers on the wire
_STEP, _STOP = 0, 1


@dataclass
class Stats:
    """What the engine has done so far; all in tokens unless said."""

    steps: int = 0  # forwards
    prompt: int = 0  # prompt tokens asked for
    reused: int = 0  # of them found in the cache
    generated: int = 0
    preemptions: int = 0  # times a request gave its pages up to an older one
    drafted: list[int] = field(default_factory=list)  # by place in the draft: proposed and verified
    accepted: list[int] = field(default_factory=list)  # by place: of those, accepted
    sampled_steps: int = 0  # verifications, that is steps x requests that sampled
    seconds: float = 0.0  # inside step()

    def __str__(self) -> str:
        lines = [
            f"{self.steps} steps, {self.generated} tokens in {self.seconds:.1f} s",
            f"{self.reused} of {self.prompt} prompt tokens found in the cache, {self.preemptions} preemptions",
        ]
        if any(self.drafted):
            rates = ", ".join(f"{a / d:.1%}" for a, d in zip(self.accepted, self.drafted, strict=True) if d)
            lines.append(f"drafts accepted by place: {rates}; {self.generated / self.sampled_steps:.2f} tokens a step")
        return "\n".join(lines)


class Engine:
    """Answers requests with one model, several at a time.

    engine = Engine.from_pretrained("demo/checkpoint")
    for request in engine.generate([[{"role": "user", "content": "What is 3 + 4?"}]]):
        print(request.text)
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        *,
        max_model_len: int | None = None,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 2048,
        max_num_mixed_tokens: int | None = None,
        n_pages: int | None = None,
        kv_cache_gib: float | None = None,
        mtp: int = 0,
        reuse: bool = True,
        deterministic: bool = False,
        graphs: bool | Capture | None = None,
        progress: bool = False,
    ):
        """`model` loaded and prepared; the tokenizer is needed on rank 0 only. All ranks give the same numbers.

        max_model_len   tokens a conversation may have, prompt and answer; by default what the model was made for, or
                        as many as the page pool holds
        max_num_seqs, max_num_batched_tokens   requests, and tokens, that one forward takes at most
        max_num_mixed_tokens   prompt tokens of a forward that goes on with answers too: fewer stall these less
        n_pages, kv_cache_gib   the page pool, as pages or GiB a rank; by default sized from free memory
        mtp             tokens the MTP module drafts a step, 0 to 4
        reuse           whether requests share the cached beginnings of their prompts
        deterministic   bitwise the same logits for a request in any company (batch-invariant mode)
        graphs          whether decode and draft steps are recorded as CUDA graphs; by default in bfloat16 on a GPU
        progress        whether rank 0 shows a bar while it records them
        """
        self.model, self.tokenizer, self.tp = model, tokenizer, model.tp
        self.mtp, self.deterministic = mtp, deterministic
        wanted = model.args.max_seq_len if max_model_len is None else max_model_len
        asked = memory.Limits(wanted, max_num_seqs, max_num_batched_tokens, mtp)
        check_limits(asked, model.args, len(model.mtp) > 0)
        if graphs is None:
            graphs = records(model.device.type == "cuda", model.num.dtype)
        if n_pages is None:
            most = max_num_seqs * asked.pages
            if kv_cache_gib is None:
                limits = replace(asked, graphs=bool(graphs))
                rank, free = rank_of(model), free_memory(model.device)
                fit = min(most, memory.pages_that_fit(rank, limits, free, shrink=max_model_len is None))
            else:
                fit = int(kv_cache_gib * 2**30) // model.page_bytes
            n_pages = self.tp.min_int(fit)
        self.max_model_len = length_that_fits(asked, n_pages, shrink=max_model_len is None)
        self.cache = model.new_cache(n_pages + bool(graphs))  # one page more takes what fills a graph's batch up
        pool = PagePool(n_pages, PAGE_SIZE, lookahead=int(mtp > 0))
        self.scheduler = Scheduler(pool, max_num_seqs, asked.budget, mtp, reuse, max_num_mixed_tokens)
        self._step_graphs: Graphs | None = None
        self._draft_graphs: list[Graphs] = []
        if graphs:
            self._record(cuda_capture() if graphs is True else graphs, progress and self.tp.rank == 0)
        self.stats = Stats(drafted=[0] * mtp, accepted=[0] * mtp)
        self.default_params = SamplingParams()  # of requests that bring none
        self.closed = False
        self._next_id = 0
        self._next_job = 0
        self._live: dict[int, Request] = {}  # rank 0, by job
        self._job_of: dict[Request, int] = {}
        self._jobs: dict[int, Job] = {}  # every rank
        self._new: list[int] = []
        self._cancelled: list[int] = []

    @classmethod
    def from_pretrained(
        cls,
        ckpt_path: str | Path,
        *,
        config: str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: Literal["auto", "bfloat16", "float32"] = "auto",
        gemm: Literal["auto", "fp8", "bf16"] = "auto",
        tp: Group = SOLO,
        progress: bool = False,
        chat: bool = False,
        thinking: bool | None = None,
        kv_cache_dtype: Literal["auto", "fp8"] = "auto",
        experts: AskedLayout = "auto",
        **limits: float | None,
    ) -> "Engine":
        """Loads a checkpoint directory: Hugging Face's layout, converted by this project, or by the V3 repository.

        `config` is needed only where the directory has none; `chat` refuses one without a usable chat template, or
        without the switch that `thinking` asks for; `kv_cache_dtype` "fp8" keeps latents in FP8 (see
        reference.pack_latents); `experts` is how ranks share the routed experts (see choose_experts); `limits`
        are the constructor's. Raises UserError for a bad checkpoint, a config that contradicts it, numerics the device
        cannot compute, or a run that memory cannot hold, on every rank when one rank meets it.
        """
        device = torch.device(device)
        if device.index is not None:
            torch.cuda.set_device(device)  # kernels are launched on the current device

        def choose() -> tuple[Checkpoint, ModelArgs, Numerics, bool, SamplingParams]:
            checkpoint = Checkpoint(ckpt_path)
            args = choose_args(checkpoint, config)
            num, says = choose_numerics(args, device, dtype, gemm)
            partition = checkpoint.partition(args, tp.size, experts, num.gemm is not None)
            num = replace(num, fp8_latents=kv_cache_dtype == "fp8", experts=partition.experts)
            if progress and tp.rank == 0:
                print(says, file=sys.stderr)
                if device.type == "cpu" and num.dtype == torch.bfloat16 and (slower := kernel_cpu.why_not()):
                    print(f"note: on this CPU bfloat16 is slower than it could be ({slower})", file=sys.stderr)
                if tp.size > 1:
                    print(partition.reason, file=sys.stderr)
            has_mtp = bool(args.n_mtp_layers) and checkpoint.has_mtp
            check_start(memory.RankSpec(args, num, tp.size, device.type != "cpu", has_mtp), device, limits)
            return checkpoint, args, num, has_mtp, params_from_generation_config(Path(ckpt_path))

        # what is free is looked at before any rank takes of it
        checkpoint, args, num, has_mtp, default_params = tp.run_on_all_ranks(choose)

        def load() -> tuple[Transformer, Tokenizer | None]:
            tokenizer = Tokenizer(ckpt_path, args.vocab_size) if tp.rank == 0 else None
            if chat and tokenizer is not None:
                tokenizer.encode_chat([{"role": "user", "content": "Hello"}], thinking=thinking)
            ranks = replace(tp, ordered=bool(limits.get("deterministic")))
            model = Transformer(args, num, ranks, device, mtp=has_mtp)
            load_into(model, checkpoint, tp, progress)
            return model.prepare(), tokenizer

        model, tokenizer = tp.run_on_all_ranks(load)
        mine = repr((model.args, model.num, len(model.mtp)))
        first = bytes(tp.broadcast_ints(list(mine.encode()))).decode()

        def same() -> None:
            if mine != first:  # another GPU, or another checkpoint under the same path
                raise UserError(f"this host would compute {mine}, rank 0 {first}: give --gemm, and check --ckpt-path")

        tp.run_on_all_ranks(same)
        engine = cls(model, tokenizer, progress=progress, **limits)  # type: ignore[arg-type]
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
    ) -> Request:
        """Queues a prompt. One that cannot be answered comes back finished, with `error` set; nothing else suffers.

        `id` and `choice` take part in the sampling noise: the same (seed, id, choice) draws the same noise in any
        batch. `thinking` is for templates that can switch it (see Tokenizer.encode_chat).
        """
        request = Request(self._next_id if id is None else id, [], params or self.default_params, choice)
        self._next_id = max(self._next_id, request.id) + 1
        try:
            request.prompt = self._encode(prompt, thinking)
            if not request.prompt:
                raise UserError("the prompt is empty")
            if len(request.prompt) >= self.max_model_len:
                raise UserError(f"the prompt has {len(request.prompt)} tokens and leaves no room for an answer in the "
                                f"context of {self.max_model_len} (--max-model-len)")  # fmt: skip
            if self.tokenizer:
                request.detokenizer = self.tokenizer.stream()
                request.opens_thinking = self.tokenizer.starts_thinking(request.prompt)
        except Exception as e:  # of our own mistakes too only this request shall suffer
            request.finish_reason, request.error = "error", describe(e)
            return request
        self.stats.prompt += len(request.prompt)
        job = self._next_job
        self._next_job += 1
        self._live[job], self._job_of[request] = request, job
        self._new.append(job)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request; it is finished, as "cancelled" (or "error", if it has one), after the next step."""
        if request in self._job_of:
            self._cancelled.append(self._job_of[request])

    @property
    def busy(self) -> bool:
        return bool(self._live)

    def stream(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = None, *, thinking: bool | None = None
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
        except BaseException as e:  # whoever asked has seen enough, or was interrupted
            if isinstance(e, GeneratorExit) or self.tp.size == 1:  # after a failure other ranks are somewhere else
                for r in requests:
                    self.cancel(r)
                self.step()
            raise

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = None, *, thinking: bool | None = None
    ) -> list[Request]:
        """Answers prompts and returns the finished requests in the same order, params.n to each prompt."""
        finished = {(r.id, r.choice): r for r in self.stream(prompts, params, thinking=thinking)}
        return [finished[key] for key in sorted(finished)]

    def _encode(self, prompt: Prompt, thinking: bool | None) -> list[int]:
        if isinstance(prompt, str):
            assert self.tokenizer is not None, "text needs a tokenizer"
            return self.tokenizer.encode_text(prompt)
        ids = [t for t in prompt if isinstance(t, int)]
        if len(ids) == len(prompt):
            wrong = [t for t in ids if not 0 <= t < self.model.args.vocab_size]
            if wrong:
                raise UserError(f"token id {wrong[0]} is not in the vocabulary of {self.model.args.vocab_size}")
            return ids
        assert self.tokenizer is not None, "text needs a tokenizer"
        return self.tokenizer.encode_chat(prompt, thinking=thinking)  # type: ignore[arg-type]  # checked there

    # ----------------------------------------------------------------------------------------------------------------
    # The loop (every rank)
    # ----------------------------------------------------------------------------------------------------------------

    def step(self) -> list[Request]:
        """One forward: the requests that have new tokens or are finished. A step without work only makes sure that
        every rank is there."""
        began = time.perf_counter()
        advanced = self._exchange(_STEP)
        if self.closed:
            return []
        chunks = self.scheduler.schedule()
        if not chunks:
            self.tp.heartbeat()
        self.stats.preemptions = self.scheduler.preemptions
        if chunks:
            with ops.batch_invariant(self.deterministic):
                advanced += self._run(chunks)
            self.stats.steps += 1
            self.stats.seconds += time.perf_counter() - began
        return advanced

    def _run(self, chunks: list[Chunk]) -> list[Request]:
        chunks = sorted(chunks, key=lambda c: len(c.tokens) > DECODE_ROWS)  # as Batch.pack wants them
        places: list[Place] = [(c.tokens, c.start, list(c.job.pages)) for c in chunks]
        self.tp.partial_sums.clear()
        hidden = self._step_graphs.run(places) if self._step_graphs else None
        if hidden is None:
            hidden = self.model(Batch.pack(places, self.model.device), self.cache)
        self._score_prompts(chunks, hidden)
        sampling = [c for c in chunks if c.samples]
        decided = dict(zip(sampling, self._sample(chunks, hidden), strict=True))
        failed = any(finish == "error" for _, finish in decided.values())
        blamed = self.tp.nonfinite_ranks() if failed and self.tp.size > 1 else []
        advanced = []
        for chunk in chunks:
            tokens, finish = decided.get(chunk, ([], None))
            self.scheduler.commit(chunk, tokens)
            if chunk in decided:
                advanced.append(self._advance(chunk.job, finish, blamed))
        if self.mtp:
            self._draft(chunks, places, hidden, [c.job for c in sampling if decided[c][1] is None])
        for chunk in sampling:
            if decided[chunk][1] is not None:
                self.scheduler.remove(self._jobs.pop(chunk.job.id))
        return [r for r in advanced if r is not None]

    def _sample(self, chunks: list[Chunk], hidden: torch.Tensor) -> list[tuple[list[int], FinishReason | None]]:
        """Rank 0's new tokens and verdict for each chunk that samples, on every rank."""
        spans, at = [], 0
        for chunk in chunks:
            if chunk.samples:
                spans.append((chunk, range(at + chunk.n - 1, at + len(chunk.tokens))))
            at += len(chunk.tokens)
        if not spans:
            return []
        logits = self.model.logits(hidden[[row for _, rows in spans for row in rows]])
        wire = torch.zeros(len(spans), 2 + 1 + self.mtp, dtype=torch.int64)  # verdict, number of tokens, tokens
        if self.tp.rank == 0:
            sampling = [chunk for chunk, _ in spans]
            parts = logits.split([len(rows) for _, rows in spans])
            verified = self._verify(sampling, logits, parts)
            for i, found in enumerate(zip(sampling, verified, parts, strict=True)):
                request = self._live[sampling[i].job.id]
                tokens, finish = self._guarded(request, partial(self._decide, *found)) or ([], "error")
                wire[i, : 2 + len(tokens)] = torch.tensor([_FINISH.index(finish), len(tokens), *tokens])
        return [(row[2 : 2 + row[1]], _FINISH[row[0]]) for row in self.tp.broadcast(wire).tolist()]

    def _verify(
        self, chunks: Sequence[Chunk], logits: torch.Tensor, parts: Sequence[torch.Tensor]
    ) -> list[list[int] | None]:
        """Rank 0: what each chunk's request is to say next, from its rows of logits, all of them at once; None for one
        that fails."""
        asks = []
        for chunk in chunks:
            request, n = self._live[chunk.job.id], len(chunk.drafts)
            draft = Draft(request.draft.tokens[:n], request.draft.q[:n])
            asks.append(self._ask(chunk.job, draft))
            request.draft = Draft()
        try:
            return verify(logits, asks)
        except Exception:  # whose mistake it is shows when each is judged alone
            requests = [self._live[chunk.job.id] for chunk in chunks]
            works = [partial(verify, rows, [ask]) for rows, ask in zip(parts, asks, strict=True)]
            return [(self._guarded(*one) or [None])[0] for one in zip(requests, works, strict=True)]

    def _guarded(self, request: Request, work: Callable[[], T]) -> T | None:
        """Rank 0's work for one request. If it goes wrong that is the request's error, and nobody else's."""
        try:
            return work()
        except Exception as e:
            request.error = request.error or describe(e)
            return None

    def _ask(self, job: Job, draft: Draft) -> Ask:
        request = self._live[job.id]
        return Ask(request.params, request.rng_key, job.tokens, len(request.prompt), draft)

    def _decide(
        self, chunk: Chunk, tokens: list[int] | None, logits: torch.Tensor
    ) -> tuple[list[int], FinishReason | None]:
        """Rank 0: the tokens a request gets, up to the first that ends it, and whether one does."""
        job, request = chunk.job, self._live[chunk.job.id]
        params = request.params
        request.begin_step()
        if not request.tokens:
            request.n_reused = min(job.n_reused, len(request.prompt))
            self.stats.reused += request.n_reused
        if tokens is None or request.error:
            return [], "error"
        self.stats.sampled_steps += 1
        for place in range(len(chunk.drafts)):
            self.stats.drafted[place] += place < len(tokens)  # those behind a rejected one were never looked at
            self.stats.accepted[place] += place + 1 < len(tokens)
        finish: FinishReason | None = None
        for i, token in enumerate(tokens):
            if self._ends(token, params):
                finish = "stop"
            else:
                score = None if params.logprobs is None else logprob(logits[i], token, params.logprobs)
                if request.append(token, i + 1 < len(tokens), score):
                    finish = "stop"
                elif job.n_known + i + 1 >= job.capacity:
                    finish = "length"
            self.stats.generated += 1
            if finish:
                return tokens[: i + 1], finish
        return tokens, None

    def _ends(self, token: int, params: SamplingParams) -> bool:
        ends = self.tokenizer is not None and token in self.tokenizer.eos_ids and not params.ignore_eos
        return ends or token in params.stop_token_ids

    def _advance(self, job: Job, finish: FinishReason | None, blamed: list[int]) -> Request | None:
        """Rank 0: the request behind a job that sampled, finished if that is the verdict. NaN came from the ranks that
        are `blamed`, if that is known."""
        request = self._live.get(job.id)
        if request is not None and finish is not None:
            if finish == "error":
                came = f", which came from rank {' and '.join(map(str, blamed))}" if blamed else ""
                request.error = request.error or f"the model's output holds NaN or infinity{came}"
            self._finish(request, finish)
        return request

    def _finish(self, request: Request, reason: FinishReason) -> None:
        del self._live[self._job_of.pop(request)]
        self._guarded(request, request.flush)
        request.finish_reason = "error" if request.error else reason

    def _score_prompts(self, chunks: list[Chunk], hidden: torch.Tensor) -> None:
        """Log-probabilities of prompt tokens, for the requests that asked for them."""
        at = 0
        for chunk in chunks:
            job, first = chunk.job, max(chunk.start, chunk.job.n_scored)
            stop = min(chunk.start + chunk.n, job.n_prompt - 1)  # row p scores token p + 1
            for lo in range(first, stop if job.whole else first, memory.SCORED_ROWS):
                hi = min(lo + memory.SCORED_ROWS, stop)
                logits = self.model.logits(hidden[at + lo - chunk.start : at + hi - chunk.start])
                job.n_scored = hi
                request = self._live.get(job.id)
                if request is not None and request.params.prompt_logprobs is not None:
                    scored = list(zip(logits, job.tokens[lo + 1 : hi + 1], strict=True))
                    self._guarded(request, partial(self._score, request, scored))
                    if request.error:
                        self.cancel(request)
            at += len(chunk.tokens)

    def _score(self, request: Request, scored: Sequence[tuple[torch.Tensor, int]]) -> None:
        top = request.params.prompt_logprobs or 0
        request.prompt_logprobs += [logprob(row, token, top) for row, token in scored]

    # ----------------------------------------------------------------------------------------------------------------
    # Drafts (every rank)
    # ----------------------------------------------------------------------------------------------------------------

    def _draft(self, chunks: list[Chunk], places: list[Place], hidden: torch.Tensor, going_on: list[Job]) -> None:
        """The MTP module sees every token the main model has cached, each with the one after it, and proposes up to
        `mtp` tokens to each job that goes on: its own state and proposal are its next input.
        """
        packed: list[Place] = []
        rows: list[int] = []
        ends: dict[Job, tuple[int, int, Sequence[int]]] = {}  # its last row, the position after it, its pages
        at = 0
        for chunk, (tokens, start, pages) in zip(chunks, places, strict=True):
            followers = chunk.job.tokens[start + 1 : chunk.job.n_cached + 1]
            if followers:  # a request that failed may have no token after its last
                packed.append((followers, start, pages))
                rows += range(at, at + len(followers))
                ends[chunk.job] = (len(rows) - 1, start + len(followers), pages)
            at += len(tokens)
        if not packed:
            return
        states = self._drafted(packed, hidden[rows])
        if not going_on:
            return
        states = states[[ends[job][0] for job in going_on]]
        for k in range(self.mtp):
            if k:
                step: list[Place] = [([job.drafts[-1]], ends[job][1] + k - 1, ends[job][2]) for job in going_on]
                states = self._drafted(step, states)
            for job, token in zip(going_on, self._propose(going_on, self.model.logits(states)), strict=True):
                job.drafts.append(token)

    def _drafted(self, places: list[Place], hidden: torch.Tensor) -> torch.Tensor:
        """The MTP module on hidden states (T, H) and the tokens that follow them, from a graph where one fits."""
        for graphs in self._draft_graphs:
            states = graphs.run(places, hidden)
            if states is not None:
                return states
        return self.model.draft(Batch.pack(places, self.model.device), hidden, self.cache)

    def _propose(self, jobs: list[Job], logits: torch.Tensor) -> list[int]:
        """Rank 0's next draft for each job, on every rank."""
        wire = torch.zeros(len(jobs), dtype=torch.int64)
        if self.tp.rank == 0:
            requests = [self._live[job.id] for job in jobs]
            asks = [self._ask(job, request.draft) for job, request in zip(jobs, requests, strict=True)]
            try:
                propose(logits, asks)
            except Exception:  # as in _verify
                for request, ask, row in zip(requests, asks, logits.split(1), strict=True):
                    self._guarded(request, partial(propose, row, [ask]))
                    if request.error:
                        ask.draft.tokens.append(0)
                        ask.draft.q.append(None)
                        self.cancel(request)
            wire = torch.tensor([ask.draft.tokens[-1] for ask in asks])
        return self.tp.broadcast(wire).tolist()

    def _record(self, capture: Capture, progress: bool) -> None:
        """Records the forwards of decoding: the step itself, and the MTP module on a step's tokens and on its own."""
        model, most = self.model, self.scheduler.max_num_seqs
        n_pages = -(-(self.max_model_len + self.mtp) // PAGE_SIZE)
        hidden = torch.zeros(most * (1 + self.mtp), model.args.dim, dtype=model.num.dtype, device=model.device)

        def record(width: int, forward: Forward, what: str) -> Graphs:
            return Graphs(
                forward, most=most, width=width, hidden=hidden, n_pages=n_pages, spare=self.cache.shape[1] - 1,
                capture=capture, progress=f"recording {what}" if progress else "",
            )  # fmt: skip

        with ops.batch_invariant(self.deterministic):
            self._step_graphs = record(1 + self.mtp, lambda batch, _: model(batch, self.cache), "decode steps")
            for width in sorted({1, 1 + self.mtp} if self.mtp > 1 else {1 + self.mtp} if self.mtp else ()):
                drafts = record(width, lambda batch, h: model.draft(batch, h, self.cache), "drafts")
                self._draft_graphs.append(drafts)

    # ----------------------------------------------------------------------------------------------------------------
    # Ranks
    # ----------------------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """What every rank but 0 does: follows rank 0's steps until it closes the engine."""
        assert self.tp.rank > 0
        while not self.closed:
            self.step()

    def close(self) -> None:
        """Rank 0: lets the other ranks go."""
        if not self.closed:
            self._exchange(_STOP)

    def _exchange(self, command: int) -> list[Request]:
        """Brings rank 0's new and cancelled requests to every rank; returns the cancelled ones."""
        message = [command]
        if self.tp.rank == 0 and command == _STEP and not self._new and not self._cancelled:
            message = []  # nothing to tell: one broadcast instead of two
        elif self.tp.rank == 0:
            new = [job for job in self._new if job not in self._cancelled]
            message += [len(self._cancelled), *self._cancelled, len(new)]
            for job in new:
                r = self._live[job]
                capacity = min(len(r.prompt) + r.params.max_new_tokens, self.max_model_len)
                message += [job, capacity, int(r.params.prompt_logprobs is not None), len(r.prompt), *r.prompt]
            self._new, self._cancelled = [], []
        wire = iter(self.tp.broadcast_ints(message) or [_STEP, 0, 0])
        if next(wire) == _STOP:
            self.closed = True
            return []
        gone = []
        for _ in range(next(wire)):
            id = next(wire)
            if id in self._jobs:
                self.scheduler.remove(self._jobs.pop(id))
            if id in self._live:
                request = self._live[id]
                request.begin_step()
                self._finish(request, "cancelled")
                gone.append(request)
        for _ in range(next(wire)):
            id, capacity, whole, n = (next(wire) for _ in range(4))
            self._jobs[id] = Job(id, [next(wire) for _ in range(n)], capacity, n, whole=bool(whole))
            self.scheduler.add(self._jobs[id])
        return gone


def choose_numerics(
    args: ModelArgs, device: torch.device, dtype: str, gemm: str, has_fp8: bool | None = None
) -> tuple[Numerics, str]:
    """What to compute in, and a line that says so. `has_fp8` answers for a GPU that is not here. Raises UserError for
    what the device cannot do."""
    plain = torch.float32 if dtype == "float32" or (dtype == "auto" and args.dtype == "fp32") else torch.bfloat16
    name = str(plain).removeprefix("torch.")
    if gemm == "fp8" and args.dtype != "fp8":
        raise UserError(f"--gemm fp8 needs FP8 weights, and this checkpoint's are {args.dtype}")
    if gemm == "fp8" and plain == torch.float32:
        raise UserError("--gemm fp8 and --dtype float32 contradict each other; leave one out")
    if args.dtype != "fp8":
        return Numerics(plain), f"numerics: {name} weights and activations on {device.type}"
    if plain == torch.float32:
        return Numerics(plain), f"numerics: float32 throughout, FP8 weights dequantised exactly, on {device.type}"
    if device.type == "cpu":
        if gemm == "fp8":
            says = "numerics: W8A8, FP8 products emulated by the reference (slow, for comparison), on cpu"
            return Numerics(plain, "fp8", args.scale_fmt), says
        return Numerics(plain), f"numerics: {name}, FP8 weights dequantised once at load, on {device.type}"
    if has_fp8 is None and gemm != "bf16":
        has_fp8 = ops.has_fp8(device)
    if gemm == "auto":
        gemm = "fp8" if has_fp8 else "bf16"
    if gemm == "fp8" and not has_fp8:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"--gemm fp8 needs FP8 tensor cores, and {name} has none; use bf16")
    says = {"fp8": "W8A8 (FP8 weights and activations)", "bf16": "W8A16 (FP8 weights widened in the product)"}[gemm]
    return Numerics(plain, "fp8" if gemm == "fp8" else "bf16", args.scale_fmt), f"numerics: {says} on {device.type}"


def rank_of(model: Transformer) -> memory.RankSpec:
    return memory.RankSpec(model.args, model.num, model.tp.size, model.device.type != "cpu", len(model.mtp) > 0)


def check_limits(limits: memory.Limits, args: ModelArgs, has_mtp: bool) -> None:
    """Raises UserError for what this model cannot do, whatever memory there is."""
    if not 0 <= limits.mtp <= 4:
        raise UserError(f"--mtp is {limits.mtp}, expected from 0 to 4")
    if limits.mtp and not has_mtp:
        raise UserError("--mtp needs an MTP module, and this checkpoint has none")
    length, most = limits.max_model_len, args.max_seq_len
    if not 1 < length <= most:
        raise UserError(f"--max-model-len is {length}, expected from 2 to this model's {most}")
    if limits.max_num_seqs < 1 or limits.max_num_batched_tokens < 1:
        raise UserError("--max-num-seqs and --max-num-batched-tokens must be at least 1")


def length_that_fits(limits: memory.Limits, n_pages: int, shrink: bool) -> int:
    """The tokens of a conversation that a pool of so many pages holds: as asked, or with `shrink` fewer. Raises
    UserError."""
    if n_pages >= limits.pages:
        return limits.max_model_len
    holds = max(n_pages * PAGE_SIZE - limits.mtp, 0)
    if not shrink or holds < 2:
        raise UserError(f"--max-model-len {limits.max_model_len} needs {limits.pages} pages of cache and memory holds "
                        f"{n_pages}; ask for at most {holds}")  # fmt: skip
    return holds


def check_start(rank: memory.RankSpec, device: torch.device, limits: dict[str, Any]) -> None:
    """Refuses, before anything is loaded, limits that the model does not have, and a run that this rank's memory cannot
    hold. `limits` are the constructor's; what they do not say is as the constructor has it. Raises UserError."""
    shrink = limits.get("max_model_len") is None
    named = {f.name: limits[f.name] for f in fields(memory.Limits) if limits.get(f.name) is not None}
    asked = memory.Limits(**{"max_model_len": rank.args.max_seq_len, **named})
    check_limits(asked, rank.args, rank.mtp)
    n_pages, cache = limits.get("n_pages"), None
    if n_pages is not None:
        cache = n_pages * memory.page_bytes(rank)
    elif limits.get("kv_cache_gib") is not None:
        cache = int(limits["kv_cache_gib"] * 2**30)
        n_pages = cache // memory.page_bytes(rank)
    if n_pages is not None:
        length_that_fits(asked, n_pages, shrink)
    memory.check_fits(rank, asked, free_memory(device), cache, shrink)


def free_memory(device: torch.device) -> int:
    """Bytes this rank may take now: what its GPU has, or an equal part of what its host has, by the kernel's estimate
    (4 GiB where the host does not say), or its container, if that is less."""
    if device.type != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    return min([memory.host_memory(), *memory.container_memory()]) // environment()[3]
