"""The engine on a thread of its own, and the event loop's side of it.

The engine is not made for several threads, so one owns it: it loads it, steps it, and takes orders from a queue between
two steps. What a step has said goes to the event loop in one call, where each answer collects it until its reader is
ready for more. So a slow reader delays nobody, and is cut off where it falls too far behind.
"""

import asyncio
import contextlib
import gc
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

from engine.engine import Engine
from engine.request import Request
from serving.metrics import Metrics, Snapshot
from serving.protocol import Plan, Refused, Update

T = TypeVar("T")
COMPANY = 1.0  # seconds without work after which other ranks are called, to see that they are there
BACKLOG = 1 << 20  # characters of one choice that may wait for its reader
STATES = Literal["loading", "ready", "draining", "dead"]
READERS = 2  # threads that make tokens of prompts


@dataclass(eq=False)
class Answer:
    """What a Plan's choices have said and nobody has read yet. Of the event loop but for `requests`, which the engine's
    thread fills in before the first update."""

    plan: Plan
    arrived: float
    requests: list[Request] = field(default_factory=list)
    waiting: dict[int, Update] = field(default_factory=dict)  # by choice
    open: int = 0  # choices that have not finished
    failure: Refused | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """(choice, what it has said) until all have finished. Raises Refused when the answer cannot go on."""
        left = len(self.plan.choices)
        while left:
            await self.news.wait()
            self.news.clear()
            if self.failure is not None:
                raise self.failure
            waiting, self.waiting = self.waiting, {}
            for choice, update in waiting.items():
                left -= update.finished
                yield choice, update


class Bridge:
    """Between the event loop, which calls everything public, and the engine's thread."""

    def __init__(
        self, load: Callable[[], Engine], *, name: str, max_queue: int,
        finish: Callable[[Engine], object] = Engine.close, backlog: int = BACKLOG,
    ):  # fmt: skip
        """`load` makes the engine, on the thread that will run it, and `finish` takes leave of it there; `max_queue` is
        how many choices may wait beside those that run."""
        self.state: STATES = "loading"
        self.engine: Engine | None = None  # of its thread, once it has loaded: read what never changes
        self.error: BaseException | None = None  # what the engine's thread died of
        self.ended = asyncio.Event()
        self.metrics = Metrics(name, lambda: self._snapshot, lambda: self._preparing)
        self._load, self._finish, self._max_queue, self._backlog = load, finish, max_queue, backlog
        self._orders: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._snapshot = Snapshot()
        self._answers: set[Answer] = set()
        self._preparing = 0
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="reader")
        self._loop = asyncio.get_running_loop()
        self._places: dict[Request, tuple[Answer, int]] = {}  # of the engine's thread, as the rest
        self._last: dict[Request, float] = {}
        self._seen: dict[Request, tuple[int, int]] = {}  # of each its events and tokens

    # ----------------------------------------------------------------------------------------------------------------
    # The event loop's side
    # ----------------------------------------------------------------------------------------------------------------

    def start(self, ready: Callable[[], object] = lambda: None) -> None:
        """Calls `ready` when the engine has loaded."""
        self._when_ready = ready
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    @property
    def _pending(self) -> int:
        return self._preparing + sum(answer.open for answer in self._answers)

    def admit(self) -> None:
        """Raises Refused when the engine is not there, or too many requests are."""
        if self.state != "ready":
            raise self._unavailable
        self._make_room(1)

    @property
    def _unavailable(self) -> Refused:
        why = {"loading": "is loading", "draining": "is shutting down", "dead": "has failed"}
        return unavailable(f"the engine {why[self.state]}")

    def _make_room(self, more: int) -> None:
        assert self.engine is not None
        most = self.engine.scheduler.max_num_seqs + self._max_queue
        if more > most:
            why = f"{more} answers at once are more than this server takes, {most}"
            raise Refused(f"{why}: ask for fewer with n, or for fewer prompts", "n")
        if self._pending + more > most:
            raise busy(f"{self._pending} requests are waiting or running already")

    async def prepare(self, work: Callable[[], T]) -> T:
        """Runs what takes a processor long, such as making tokens of a text, beside the event loop; it holds a place in
        the queue meanwhile. Raises Refused, as `admit` does."""
        self.admit()
        self._preparing += 1
        try:
            return await self._loop.run_in_executor(self._readers, work)
        finally:
            self._preparing -= 1

    def submit(self, plan: Plan, arrived: float) -> Answer:
        """Raises Refused when its choices are too many more. Whoever submits ends with `leave`, however that goes."""
        if self.ended.is_set():
            raise self._unavailable
        self._make_room(len(plan.choices))
        answer = Answer(plan, arrived, open=len(plan.choices))
        self._answers.add(answer)
        self._orders.put(partial(self._add, answer))
        return answer

    def leave(self, answer: Answer) -> None:
        """Nobody reads this answer any more: what it still has to say is cancelled. Safe to call twice."""
        if answer in self._answers:
            self._answers.remove(answer)
            if answer.open:
                self._orders.put(partial(self._cancel, answer))

    async def drain(self, seconds: float) -> None:
        """Takes nothing new, lets what runs finish, for so long, then cancels it and ends the engine's thread."""
        if not self.ended.is_set():
            self.state = "draining"
        until = time.monotonic() + seconds
        while self._pending and time.monotonic() < until and not self.ended.is_set():
            await asyncio.sleep(0.05)
        self._fail_open()
        self._orders.put(None)

    async def order(self, work: Callable[[Engine], T]) -> T:
        """What `work` says of the engine, between two steps."""
        said: asyncio.Future[T] = self._loop.create_future()
        self._orders.put(lambda engine: self._tell(said.set_result, work(engine)))
        return await said

    def _deliver(self, news: list[tuple[Answer, int, Update]]) -> None:
        for answer, choice, update in news:
            if answer.failure is not None or answer not in self._answers:
                continue
            answer.waiting.setdefault(choice, Update()).add(update)
            answer.open -= update.finished
            answer.news.set()
            if answer.waiting[choice].size > self._backlog:
                self._fail(answer, Refused("the answer was read too slowly, and is given up", status=408,
                                           kind="timeout_error"))  # fmt: skip

    def _fail(self, answer: Answer, failure: Refused) -> None:
        answer.failure = failure
        answer.waiting = {}
        answer.news.set()
        self.leave(answer)

    def _fail_open(self) -> None:
        """Gives up what the engine has not finished. The rest may still be read."""
        for answer in list(self._answers):
            if answer.open:
                self._fail(answer, self._unavailable)

    def _ready(self, engine: Engine) -> None:
        self.engine = engine
        if self.state == "loading":
            self.state = "ready"
            self._when_ready()

    def _end(self, error: BaseException | None) -> None:
        self.error = error
        self.state = "draining" if error is None else "dead"
        self._fail_open()
        self._readers.shutdown(wait=False)
        self.ended.set()

    # ----------------------------------------------------------------------------------------------------------------
    # The engine's thread
    # ----------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            engine = self._load()
            gc.collect()
            gc.freeze()  # looking all of torch through for cycles, now and then, would hold everybody up for 0.1 s
            self._tell(self._ready, engine)
            while self._obey(engine):
                advanced = engine.step()
                self._snapshot = Snapshot.of(engine)
                if advanced:
                    self._tell(self._deliver, self._news(advanced))
            self._finish(engine)
        except BaseException as e:  # the main thread speaks of it
            error = e
        self._tell(self._end, error)

    def _tell(self, what: Callable[..., object], *values: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has gone: nobody is left to hear it
            self._loop.call_soon_threadsafe(what, *values)

    def _obey(self, engine: Engine) -> bool:
        """Carries out what was ordered, waiting for work if there is none; False for the order to end. Other ranks wait
        for our steps, and a dead one is noticed by them: so every now and then there is one without work."""
        patience = 0.0 if engine.busy else min(COMPANY, engine.tp.timeout / 3) if engine.tp.size > 1 else None
        while True:
            try:
                order = self._orders.get(timeout=patience) if patience != 0 else self._orders.get_nowait()
            except queue.Empty:
                return True
            if order is None:
                return False
            order(engine)
            if engine.busy:
                patience = 0.0

    def _add(self, answer: Answer, engine: Engine) -> None:
        plan, news = answer.plan, []
        for choice, (prompt, number) in enumerate(plan.choices):
            request = engine.add(plan.prompts[prompt], plan.params, id=prompt, choice=number)
            answer.requests.append(request)
            self._places[request] = answer, choice
            if request.finish_reason is not None:
                news.append(request)
        if news:
            self._tell(self._deliver, self._news(news))

    def _cancel(self, answer: Answer, engine: Engine) -> None:
        for request in answer.requests:
            engine.cancel(request)

    def _news(self, advanced: list[Request]) -> list[tuple[Answer, int, Update]]:
        """What a step has added to each of these requests, for whom."""
        now = time.monotonic()
        news = []
        for request in advanced:
            answer, choice = self._places[request]
            n_events, n_tokens = self._seen.get(request, (0, 0))
            update = Update(request.events[n_events:], request.finish_reason is not None)
            news.append((answer, choice, update))
            self._clock(request, answer, len(request.tokens) - n_tokens, now)
            self._seen[request] = len(request.events), len(request.tokens)
            if update.finished:
                self.metrics.finished(request.finish_reason or "")
                for memory in (self._places, self._seen, self._last):
                    memory.pop(request, None)  # type: ignore[attr-defined]
        return news

    def _clock(self, request: Request, answer: Answer, n: int, now: float) -> None:
        if n and request not in self._last:
            self.metrics.first_token.observe(now - answer.arrived)
        elif n:
            for _ in range(n):
                self.metrics.next_token.observe((now - self._last[request]) / n)
        if n:
            self._last[request] = now
        if request.finish_reason in ("stop", "length"):
            self.metrics.whole.observe(now - answer.arrived)


def busy(why: str) -> Refused:
    return Refused(f"{why}; try again later", status=429, kind="rate_limit_error", code="queue_full",
                   headers={"Retry-After": "1"})  # fmt: skip


def unavailable(why: str) -> Refused:
    return Refused(why, status=503, kind="server_error", code="unavailable", headers={"Retry-After": "5"})
