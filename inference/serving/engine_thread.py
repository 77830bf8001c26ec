"""The engine on a thread of its own, and the event loop's side of it.

The engine is not thread-safe, so one thread owns it: it loads the engine, steps it, and executes commands from a queue
between two steps. After a step it posts the new token events to the event loop in one call, where they wait until each
answer's reader asks for more. A slow reader therefore delays nobody, and is cut off when too much waits for it.
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
from engine.request import Request, TokenEvent
from serving.errors import ApiError, busy, unavailable
from serving.metrics import Metrics, Snapshot
from serving.plan import Plan

T = TypeVar("T")
HEARTBEAT_SECONDS = 1.0  # between steps without work, which show whether the other ranks are there
BACKLOG = 1 << 20  # characters of one choice that may wait for its reader
PREPARE_THREADS = 2  # tokenize short prompts; one more has long ones, and one formats, which hold up only each other
SHORT = 1 << 17  # bytes of a request that is read and tokenized in about 0.1 s
State = Literal["loading", "ready", "draining", "dead"]


@dataclass
class Update:
    """What was added to a choice since its reader last asked."""

    events: list[TokenEvent] = field(default_factory=list)
    finished: bool = False
    size: int = 0  # about how many characters its client is sent

    def __post_init__(self) -> None:
        self.size += sum(len(e.text) + (0 if e.logprob is None else 64 * (1 + len(e.logprob.top))) for e in self.events)

    def add(self, later: "Update") -> None:
        self.events += later.events
        self.finished |= later.finished
        self.size += later.size


@dataclass(eq=False)
class Answer:
    """A Plan's choices with what nobody has read yet. The event loop's, but for `requests`, which the engine's thread
    fills in before the first update."""

    plan: Plan
    arrived: float
    requests: list[Request] = field(default_factory=list)
    waiting: dict[int, Update] = field(default_factory=dict)  # by choice
    open: int = 0  # choices that have not finished
    failure: ApiError | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """(choice, update) until all choices have finished. Raises ApiError when the answer cannot go on."""
        left = len(self.plan.choices)
        while left:
            await self.changed.wait()
            self.changed.clear()
            if self.failure is not None:
                raise self.failure
            waiting, self.waiting = self.waiting, {}
            for choice, update in waiting.items():
                left -= update.finished
                yield choice, update


class EngineThread:
    """Owns the engine's thread. The event loop calls everything public."""

    def __init__(
        self, load: Callable[[], Engine], *, name: str, max_queue: int,
        finish: Callable[[Engine], object] = Engine.close, backlog: int = BACKLOG,
    ):  # fmt: skip
        """`load` makes the engine, and `finish` releases the other ranks, both on the engine's thread; `max_queue`
        choices may wait beside those that run."""
        self.state: State = "loading"
        self.engine: Engine | None = None  # once it has loaded; the event loop reads only what never changes
        self.error: BaseException | None = None  # ended the thread
        self.ended = asyncio.Event()
        self.metrics = Metrics(name, lambda: self._snapshot, lambda: self._preparing)
        self._load, self._finish, self._max_queue, self._backlog = load, finish, max_queue, backlog
        self._commands: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._snapshot = Snapshot()
        self._answers: set[Answer] = set()
        self._preparing = 0
        self._lanes = [ThreadPoolExecutor(n, thread_name_prefix="prepare") for n in (PREPARE_THREADS, 1, 1)]
        self._short, self._long, self._formats = self._lanes
        self._loop = asyncio.get_running_loop()
        # The engine thread's own, by request:
        self._choices: dict[Request, tuple[Answer, int]] = {}
        self._n_seen: dict[Request, tuple[int, int]] = {}  # events and tokens
        self._last: dict[Request, float] = {}  # when it last had a new token

    # ----------------------------------------------------------------------------------------------------------------
    # The event loop's side
    # ----------------------------------------------------------------------------------------------------------------

    def start(self, ready: Callable[[], object] = lambda: None) -> None:
        """Calls `ready` when the engine has loaded."""
        self._when_ready = ready
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    @property
    def _n_open(self) -> int:
        return self._preparing + sum(answer.open for answer in self._answers)

    def admit(self) -> None:
        """Raises ApiError when the engine is not there, or too many requests are."""
        if self.state != "ready":
            raise self._unavailable
        self._check_room(1)

    @property
    def _unavailable(self) -> ApiError:
        why = {"loading": "is loading", "draining": "is shutting down", "dead": "has failed"}
        return unavailable(f"the engine {why[self.state]}")

    @property
    def most_answers(self) -> int:
        """That run or wait at a time."""
        assert self.engine is not None
        return self.engine.max_num_seqs + self._max_queue

    def _check_room(self, more: int) -> None:
        most = self.most_answers
        if more > most:
            why = f"{more} answers at once are more than this server takes, {most}"
            raise ApiError(f"{why}: ask for fewer with n, or for fewer prompts", "n")
        if self._n_open + more > most:
            raise busy(f"{self._n_open} requests are waiting or running already")

    async def prepare(self, work: Callable[[], T], size: int) -> T:
        """Runs what takes a processor long, such as tokenizing a request of `size` bytes, on another thread; it counts
        as a request in the queue meanwhile. Raises ApiError, as `admit` does."""
        return await self._prepare(self._short if size <= SHORT else self._long, work)

    async def compile(self, work: Callable[[], T]) -> T:
        """As `prepare`, for making a grammar: a few characters of a schema may take a second."""
        return await self._prepare(self._formats, work)

    async def _prepare(self, lane: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        self.admit()
        self._preparing += 1
        try:
            return await self._loop.run_in_executor(lane, work)
        finally:
            self._preparing -= 1

    def submit(self, plan: Plan, arrived: float) -> Answer:
        """Raises ApiError when its choices are too many more. The caller must `close` the answer in the end."""
        if self.ended.is_set():
            raise self._unavailable
        self._check_room(len(plan.choices))
        answer = Answer(plan, arrived, open=len(plan.choices))
        self._answers.add(answer)
        self._commands.put(partial(self._add, answer))
        return answer

    def close(self, answer: Answer) -> None:
        """Cancels what an answer has unfinished, because nobody reads it any more. Safe to call twice."""
        if answer in self._answers:
            self._answers.remove(answer)
            if answer.open:
                self._commands.put(partial(self._cancel, answer))

    async def drain(self, seconds: float) -> None:
        """Refuses new requests, gives running ones this long to finish, then cancels them and ends the thread."""
        if not self.ended.is_set():
            self.state = "draining"
        until = time.monotonic() + seconds
        while self._n_open and time.monotonic() < until and not self.ended.is_set():
            await asyncio.sleep(0.05)
        self._fail_open()
        self._commands.put(None)

    async def call(self, work: Callable[[Engine], T]) -> T:
        """Runs `work` on the engine's thread between two steps, and returns its result."""
        result: asyncio.Future[T] = self._loop.create_future()
        self._commands.put(lambda engine: self._post_to_loop(result.set_result, work(engine)))
        return await result

    def _deliver(self, updates: list[tuple[Answer, int, Update]]) -> None:
        for answer, choice, update in updates:
            if answer.failure is not None or answer not in self._answers:
                continue
            answer.waiting.setdefault(choice, Update()).add(update)
            answer.open -= update.finished
            answer.changed.set()
            if answer.waiting[choice].size > self._backlog:
                self._fail(answer, ApiError("the answer was read too slowly, and is given up", status=408,
                                            kind="timeout_error"))  # fmt: skip

    def _fail(self, answer: Answer, failure: ApiError) -> None:
        answer.failure = failure
        answer.waiting = {}
        answer.changed.set()
        self.close(answer)

    def _fail_open(self) -> None:
        """Fails unfinished answers. Finished ones may still be read."""
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
        for lane in self._lanes:
            lane.shutdown(wait=False)
        self.ended.set()

    # ----------------------------------------------------------------------------------------------------------------
    # The engine's thread
    # ----------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            engine = self._load()
            gc.collect()
            gc.freeze()  # searching all of torch for cycles would now and then stop everything for 0.1 s
            self._post_to_loop(self._ready, engine)
            while self._drain_commands(engine):
                advanced = engine.step()
                self._snapshot = Snapshot.of(engine)
                if advanced:
                    self._post_to_loop(self._deliver, self._collect_updates(advanced))
            self._finish(engine)
        except BaseException as e:  # the main thread reports it
            error = e
        self._post_to_loop(self._end, error)

    def _post_to_loop(self, function: Callable[..., object], *values: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function, *values)

    def _drain_commands(self, engine: Engine) -> bool:
        """Executes the waiting commands; without work it waits for one, with other ranks until the next heartbeat.
        Returns False for the command to end."""
        heartbeat = min(HEARTBEAT_SECONDS, engine.world.timeout / 3) if engine.world.size > 1 else None
        timeout = 0.0 if engine.busy else heartbeat
        while True:
            try:
                command = self._commands.get(timeout=timeout) if timeout != 0 else self._commands.get_nowait()
            except queue.Empty:
                return True
            if command is None:
                return False
            command(engine)
            if engine.busy:
                timeout = 0.0

    def _add(self, answer: Answer, engine: Engine) -> None:
        plan, finished = answer.plan, []
        for choice, (prompt, number) in enumerate(plan.choices):
            request = engine.add(plan.prompts[prompt], plan.params, id=prompt, choice=number, chat=plan.chat,
                                 grammar=plan.grammar)  # fmt: skip
            answer.requests.append(request)
            self._choices[request] = answer, choice
            if request.finish_reason is not None:
                finished.append(request)
        if finished:
            self._post_to_loop(self._deliver, self._collect_updates(finished))

    def _cancel(self, answer: Answer, engine: Engine) -> None:
        for request in answer.requests:
            engine.cancel(request)

    def _collect_updates(self, advanced: list[Request]) -> list[tuple[Answer, int, Update]]:
        """What a step added to each of these requests."""
        now = time.monotonic()
        updates = []
        for request in advanced:
            answer, choice = self._choices[request]
            n_events, n_tokens = self._n_seen.get(request, (0, 0))
            update = Update(request.events[n_events:], request.finish_reason is not None)
            updates.append((answer, choice, update))
            self._observe(request, answer, len(request.tokens) - n_tokens, now)
            self._n_seen[request] = len(request.events), len(request.tokens)
            if update.finished:
                self.metrics.finished(request.finish_reason or "")
                for by_request in (self._choices, self._n_seen, self._last):
                    by_request.pop(request, None)  # type: ignore[attr-defined]
        return updates

    def _observe(self, request: Request, answer: Answer, n: int, now: float) -> None:
        """Counts the latency of `n` new tokens."""
        if n and request not in self._last:
            self.metrics.first_token.observe(now - answer.arrived)
        elif n:
            for _ in range(n):
                self.metrics.next_token.observe((now - self._last[request]) / n)
        if n:
            self._last[request] = now
        if request.finish_reason in ("stop", "length"):
            self.metrics.whole.observe(now - answer.arrived)
