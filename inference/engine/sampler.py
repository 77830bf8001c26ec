"""Samples a step's tokens: rank 0 does, request by request, and broadcasts what every rank needs."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch

from core.errors import describe
from engine.request import FinishReason, Request
from engine.row_sampler import RowSampler
from engine.sampling import Scores, logprob, propose, verify
from engine.sampling_state import SamplingState
from engine.scheduler import Chunk, Sequence
from engine.stats import Stats
from ops.backend import ReferenceBackend
from parallel.group import Group
from text.tokenizer import Tokenizer

T = TypeVar("T")
Sampled = dict[Chunk, tuple[list[int], FinishReason | None]]  # the tokens of each chunk that samples, and its verdict
_FINISH: list[FinishReason | None] = [None, "stop", "length", "error", "cancelled"]  # as numbers in a broadcast


class Sampler:
    """Every rank calls the same methods; the requests are known to rank 0 only.

    An exception in the work for one request ends that request with an error, and no other.
    """

    def __init__(
        self,
        tp: Group,
        tokenizer: Tokenizer | None,
        requests: dict[int, Request],
        stats: Stats,
        n_drafts: int,
        cancel: Callable[[Request], None],
        ops: ReferenceBackend,
    ):
        """`tp`: the ranks that hear what its first one samples, a lane's or a pipeline's. `requests`: the unfinished
        ones by their sequence's id, kept up to date by the engine; `cancel` ends one of them with the next step;
        `ops`: the model's backend."""
        self.tp, self.requests, self.stats = tp, requests, stats
        self.eos_ids = () if tokenizer is None else tokenizer.eos_ids
        self.n_drafts, self.cancel = n_drafts, cancel
        self.row_sampler = RowSampler(ops)

    def sample(self, sampling: list[Chunk], scores: Scores) -> Sampled:
        """Rank 0's new tokens and verdict for each chunk that samples, on every rank.

        scores: sum of 1 + drafts rows, chunks in order: after a chunk's last token and after each of its drafts.
        """
        sampled: Sampled = {}
        if self.tp.rank == 0:
            first = 0
            for chunk, tokens in zip(sampling, self._verify(sampling, scores), strict=True):
                request = self.requests[chunk.sequence.id]
                decided = isolate_request_errors(request, self._decide, request, chunk, tokens, scores, first)
                sampled[chunk] = decided or ([], "error")
                first += 1 + len(chunk.drafts)
        if self.tp.size > 1:
            sampled = self._broadcast(sampling, sampled)
        failed = [chunk.sequence.id for chunk, (_, finish) in sampled.items() if finish == "error"]
        if failed:
            ranks = self.tp.nonfinite_ranks() if self.tp.size > 1 else []
            came = f", which came from rank {' and '.join(map(str, ranks))}" if ranks else ""
            for request in (self.requests[id] for id in failed if id in self.requests):
                request.error = request.error or f"the model's output holds NaN or infinity{came}"
        return sampled

    def _broadcast(self, sampling: list[Chunk], sampled: Sampled) -> Sampled:
        """Rank 0's `sampled` on every rank, a row for each chunk: verdict, number of tokens, tokens."""
        width = 1 + self.n_drafts
        rows = [[_FINISH.index(finish), len(t), *t, *[0] * (width - len(t))] for t, finish in sampled.values()]
        empty = torch.zeros(len(sampling), 2 + width, dtype=torch.int64)
        heard = self.tp.broadcast(torch.tensor(rows) if rows else empty).tolist()
        return {c: (tokens[:n], _FINISH[finish]) for c, (finish, n, *tokens) in zip(sampling, heard, strict=True)}

    def _verify(self, chunks: list[Chunk], scores: Scores) -> list[list[int] | None]:
        """Rank 0: the next tokens of each chunk's request, from its rows of logits, all of them at once; None for a
        request that fails."""
        states = []
        for chunk in chunks:
            request, n = self.requests[chunk.sequence.id], len(chunk.drafts)
            if self.n_drafts:
                del request.draft.tokens[n:], request.draft.q[n:]
            states.append(request.sampling_state or self._sampling_state(chunk.sequence, request))
        try:
            return verify(scores, states, self.row_sampler)
        except Exception:  # verified one by one, only the request at fault fails
            requests = [self.requests[chunk.sequence.id] for chunk in chunks]
            parts = scores.logits.split([1 + len(chunk.drafts) for chunk in chunks])
            pairs = zip(parts, states, strict=True)
            works = [partial(verify, rows, [state], self.row_sampler) for rows, state in pairs]
            return [(isolate_request_errors(*one) or [None])[0] for one in zip(requests, works, strict=True)]
        finally:
            for state in states if self.n_drafts else ():
                state.draft.clear()

    def _decide(
        self, request: Request, chunk: Chunk, tokens: list[int] | None, scores: Scores, first: int
    ) -> tuple[list[int], FinishReason | None]:
        """Rank 0: the tokens a request gets, up to the first that ends it, and whether one does. `first`: the number of
        its first row of `scores`."""
        sequence, params = chunk.sequence, request.params
        request.begin_step()
        if not request.tokens:
            request.n_reused = min(sequence.n_reused, len(request.prompt))
            self.stats.reused += request.n_reused
        if tokens is None or request.error:
            return [], "error"
        if params.max_new_tokens == 0:
            return [], "length"
        self.stats.sampled_steps += 1
        for place in range(len(chunk.drafts)):
            self.stats.drafted[place] += place < len(tokens)  # those behind a rejected one were never looked at
            self.stats.accepted[place] += place + 1 < len(tokens)
        room = sequence.capacity - len(sequence.tokens)
        finish: FinishReason | None = None
        for i, token in enumerate(tokens):
            if token in params.stop_token_ids or (token in self.eos_ids and not params.ignore_eos):
                finish = "stop"
            else:
                score = None if params.logprobs is None else logprob(scores.logits[first + i], token, params.logprobs)
                if request.append(token, i + 1 < len(tokens), score):
                    finish = "stop"
                elif i + 1 >= room:
                    finish = "length"
            if finish:
                tokens = tokens[: i + 1]
                break
        self.stats.generated += len(tokens)
        return tokens, finish

    def propose(self, sequences: list[Sequence], scores: Scores) -> list[int]:
        """Rank 0's next draft for each sequence, from the MTP module's logits after it, on every rank."""
        drafts = [0] * len(sequences)
        if self.tp.rank == 0:
            requests = [self.requests[sequence.id] for sequence in sequences]
            states = [self._sampling_state(s, r) for s, r in zip(sequences, requests, strict=True)]
            try:
                propose(scores, states, self.row_sampler)
            except Exception:  # proposed one by one, only the request at fault fails
                for request, state, row in zip(requests, states, scores.logits.split(1), strict=True):
                    isolate_request_errors(request, partial(propose, row, [state], self.row_sampler))
                    if request.error:
                        state.draft.tokens.append(0)
                        state.draft.q.append(None)
                        self.cancel(request)
            drafts = [state.draft.tokens[-1] for state in states]
        return self.tp.broadcast(torch.tensor(drafts)).tolist() if self.tp.size > 1 else drafts

    def score_prompt(self, sequence: Sequence, at: int, logits: torch.Tensor) -> None:
        """Gives a request the log-probabilities of its prompt tokens from position `at` on, scored by logits (n, V)."""
        request = self.requests.get(sequence.id)
        if request is not None and request.params.prompt_logprobs is not None:
            scored = zip(logits, sequence.tokens[at : at + len(logits)], strict=True)
            isolate_request_errors(request, partial(_score, request, scored))
            if request.error:
                self.cancel(request)

    def _sampling_state(self, sequence: Sequence, request: Request) -> SamplingState:
        """The same at each step: tokens and draft grow in place."""
        if request.sampling_state is None:
            request.sampling_state = SamplingState(
                request.params, request.rng_key, sequence.tokens, len(request.prompt), request.draft,
                request.constraint,
            )  # fmt: skip
        return request.sampling_state


def isolate_request_errors(request: Request, work: Callable[..., T], *args: Any) -> T | None:
    """Rank 0's work(*args) for one request; an exception becomes that request's error, and the result None."""
    try:
        return work(*args)
    except Exception as e:
        request.error = request.error or describe(e)
        return None


def _score(request: Request, scored: Iterable[tuple[torch.Tensor, int]]) -> None:
    top = request.params.prompt_logprobs or 0
    request.prompt_logprobs += [logprob(row, token, top) for row, token in scored]
