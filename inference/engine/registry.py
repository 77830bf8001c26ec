"""The unfinished requests that a rank keeps, and what it has to tell other ranks about them."""

from collections.abc import Iterable

from engine.exchange import Arrival, pack
from engine.lanes import Dispatcher, LaneState, encode_request, report
from engine.request import FinishReason, Request
from engine.sampler import isolate_request_errors


class RequestRegistry:
    """Rank 0's are all that its callers wait for; those of another lane's first rank are the lane's."""

    def __init__(self, dispatcher: Dispatcher | None, lanes: int):
        """`dispatcher`: rank 0's, where there are several lanes or microbatches."""
        self.live: dict[int, Request] = {}  # by sequence
        self.sequence_of: dict[Request, int] = {}
        self.dispatcher, self._lanes = dispatcher, lanes
        self._next = 0
        self._new: list[tuple[int, int]] = []  # sequences that no rank knows yet, and their capacities
        self._cancelled: list[int] = []

    def queue(self, request: Request, capacity: int) -> None:
        """Rank 0: a request that is to be answered, with prompt and answer in so many tokens."""
        sequence, self._next = self._next, self._next + 1
        if self.dispatcher is not None:
            self.dispatcher.assign(sequence, request.prompt, capacity)
        self.keep(sequence, request)
        self._new.append((sequence, capacity))

    def keep(self, sequence: int, request: Request) -> None:
        self.live[sequence], self.sequence_of[request] = request, sequence

    def cancel(self, request: Request) -> None:
        """Has the next message, or report, end a request."""
        if request in self.sequence_of:
            self._cancelled.append(self.sequence_of[request])

    def finish(self, request: Request, reason: FinishReason) -> None:
        sequence = self.sequence_of.pop(request)
        del self.live[sequence]
        if self.dispatcher is not None:
            self.dispatcher.release(sequence)
        isolate_request_errors(request, request.flush)
        request.finish_reason = "error" if request.error else reason

    def message(self) -> list[int]:
        """Rank 0: what all ranks must hear before the next step."""
        new = [self._arrival(*one) for one in self._new if one[0] not in self._cancelled]
        cancelled, self._new, self._cancelled = self._cancelled, [], []
        return pack(cancelled, new)

    def _arrival(self, sequence: int, capacity: int) -> Arrival:
        request, place = self.live[sequence], self.dispatcher.lane_of(sequence) if self.dispatcher else 0
        about = encode_request(request) if place % self._lanes else b""
        scored = request.params.prompt_logprobs is not None
        return Arrival(sequence, place, capacity, scored, request.prompt, about)

    def report(self, changed: Iterable[tuple[int, Request]], state: LaneState) -> bytes:
        """Another lane's first rank: what rank 0 must hear after a step that changed these, each with its sequence."""
        updated = dict(changed)  # a request that failed after it sampled is in it already
        updated |= {sequence: self.live[sequence] for sequence in self._cancelled if sequence in self.live}
        self._cancelled = []
        return report(updated.items(), state)
