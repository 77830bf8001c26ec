"""Data-parallel lanes: which of them a request goes to, and what they tell each other about requests.

Rank 0 takes every request and hands it to a lane. There the lane's first rank keeps it, samples its tokens and decides
when it ends; after each step it reports this to rank 0, which repeats it on the request that its caller holds. Nothing
is pickled: requests and reports are JSON.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple

from core.run_config import PAGE_SIZE
from core.sampling_params import SamplingParams
from engine.request import FinishReason, Request
from engine.sampler import isolate_request_errors
from engine.sampling import Logprob
from engine.scheduler import Scheduler
from engine.stats import Stats
from text.chat_format import ChatFormat
from text.tokenizer import Tokenizer

REMEMBERED = 1 << 16  # beginnings of prompts


class Dispatcher:
    """Gives each request a lane: the one that answered a prompt with the same first page, so that its latents are
    found there, unless that one has much more to do than another; else the one with the least to do."""

    def __init__(self, lanes: int, max_num_seqs: int):
        self.unfinished = [0] * lanes  # requests of each lane
        self._tokens = [0] * lanes  # that these may have, prompts and answers
        self._most_ahead = max(max_num_seqs // 2, 1)  # requests more than the least busy lane has
        self._lane_of: OrderedDict[tuple[int, ...], int] = OrderedDict()
        self._taken: dict[int, tuple[int, int]] = {}  # by sequence: its lane, its tokens

    def assign(self, sequence: int, prompt: Sequence[int], tokens: int) -> int:
        """The lane of a new sequence that may have so many tokens."""
        least = min(range(len(self.unfinished)), key=lambda lane: (self._tokens[lane], self.unfinished[lane]))
        lane = least
        if len(prompt) > PAGE_SIZE:
            page = tuple(prompt[:PAGE_SIZE])
            lane = self._lane_of.get(page, least)
            if self.unfinished[lane] - self.unfinished[least] >= self._most_ahead:
                lane = least
            self._lane_of[page] = lane
            self._lane_of.move_to_end(page)
            if len(self._lane_of) > REMEMBERED:
                self._lane_of.popitem(last=False)
        self.unfinished[lane] += 1
        self._tokens[lane] += tokens
        self._taken[sequence] = lane, tokens
        return lane

    def lane_of(self, sequence: int) -> int:
        return self._taken[sequence][0]

    def release(self, sequence: int) -> None:
        """The sequence is finished."""
        lane, tokens = self._taken.pop(sequence)
        self.unfinished[lane] -= 1
        self._tokens[lane] -= tokens


@dataclass
class LaneState:
    """What a lane had done, and had to do, after its last step."""

    running: int = 0
    waiting: int = 0
    page_use: float = 0.0  # part of its latent cache's pages in use
    stats: Stats = field(default_factory=Stats)

    @classmethod
    def of(cls, schedulers: Sequence[Scheduler], stats: Stats) -> "LaneState":
        """Of a lane with one scheduler, or in a pipeline one for each microbatch."""
        free = sum(s.pool.n_available for s in schedulers) / sum(s.pool.n_pages for s in schedulers)
        running, waiting = sum(len(s.running) for s in schedulers), sum(len(s.waiting) for s in schedulers)
        return cls(running, waiting, 1 - free, stats.copy())


# --------------------------------------------------------------------------------------------------------------------
# From rank 0 to a lane
# --------------------------------------------------------------------------------------------------------------------


def encode_request(request: Request) -> bytes:
    """What a lane's first rank must know of a request beside its prompt."""
    params = asdict(request.params)
    about = {"id": request.id, "choice": request.choice, "thinking": request.opens_thinking, "params": params,
             "chat": request.chat and asdict(request.chat)}  # fmt: skip
    return json.dumps(about).encode()


def decode_request(about: bytes, prompt: list[int], tokenizer: Tokenizer | None) -> Request:
    """The request that `encode_request` was about, for the first rank of its lane."""
    said = json.loads(about)
    request = Request(said["id"], prompt, SamplingParams.from_json(said["params"]), said["choice"])
    request.opens_thinking = said["thinking"]
    request.chat = said["chat"] and ChatFormat.from_json(said["chat"])
    request.detokenizer = tokenizer.stream() if tokenizer else None
    return request


# --------------------------------------------------------------------------------------------------------------------
# From a lane to rank 0
# --------------------------------------------------------------------------------------------------------------------


class RequestUpdate(NamedTuple):
    """What a step did to a request of a lane. One with an error that is not finished must be cancelled."""

    sequence: int
    tokens: list[Any]  # Request.step_tokens
    scored: list[Any]  # log-probabilities of prompt tokens, told once
    n_reused: int
    finish: FinishReason | None
    error: str | None

    @classmethod
    def of(cls, sequence: int, request: Request) -> "RequestUpdate":
        scored, request.prompt_logprobs = request.prompt_logprobs, []  # from here on they are rank 0's to keep
        tokens = [(token, drafted, logprob and asdict(logprob)) for token, drafted, logprob in request.step_tokens]
        return cls(
            sequence, tokens, [asdict(logprob) for logprob in scored], request.n_reused, request.finish_reason,
            request.error,
        )  # fmt: skip

    def apply(self, request: Request) -> None:
        """Does to rank 0's request what the step did to the lane's."""
        request.begin_step()
        request.n_reused, request.error = self.n_reused, request.error or self.error
        request.prompt_logprobs += [_logprob(said) for said in self.scored]
        for token, drafted, logprob in self.tokens:
            request.append(token, drafted, logprob and _logprob(logprob))


def report(changed: Iterable[tuple[int, Request]], state: LaneState) -> bytes:
    """What a step did to a lane's requests, each with its sequence."""
    return json.dumps({"updates": [RequestUpdate.of(*one) for one in changed], "state": asdict(state)}).encode()


def apply_reports(
    reports: Iterable[bytes],
    requests: Mapping[int, Request],
    finish: Callable[[Request, FinishReason], object],
    cancel: Callable[[Request], object],
) -> tuple[list[LaneState], list[Request]]:
    """The states of the lanes that reported, and those of rank 0's `requests`, by their sequences, that changed there,
    after doing the same to them."""
    states, changed = [], []
    for said in map(json.loads, reports):
        states.append(LaneState(**said["state"] | {"stats": Stats(**said["state"]["stats"])}))
        for update in (RequestUpdate(*one) for one in said["updates"]):
            if (request := requests.get(update.sequence)) is None:
                continue
            isolate_request_errors(request, partial(update.apply, request))
            if update.finish is not None:
                finish(request, update.finish)
            elif request.error is not None:
                cancel(request)
            changed.append(request)
    return states, changed


def _logprob(said: dict[str, Any]) -> Logprob:
    return Logprob(said["token"], said["logprob"], tuple((token, value) for token, value in said["top"]))


def add_stats(all_lanes: Sequence[Stats]) -> Stats:
    """The counters of all lanes together. They step together, and rank 0 counts the prompts of all."""
    first, *others = all_lanes
    total = first.copy()
    for stats in others:
        for f in fields(Stats):
            if f.name in ("steps", "prompt", "seconds"):
                continue
            mine, more = getattr(total, f.name), getattr(stats, f.name)
            summed = [a + b for a, b in zip(mine, more, strict=True)] if isinstance(mine, list) else mine + more
            setattr(total, f.name, summed)
    return total
