"""What rank 0 tells all ranks before a step: cancelled and new sequences, as integers; nothing is pickled."""

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

STOP = [-1]  # no step follows


class Arrival(NamedTuple):
    """A new sequence."""

    id: int
    place: int  # the number of its lane and of its microbatch there: lane + lanes * microbatch
    capacity: int  # the most tokens it may have, prompt and answer
    scored: bool  # the log-probabilities of its prompt are asked for
    prompt: list[int]
    about: bytes  # lanes.describe_request's, where another rank keeps the request


def pack(cancelled: Sequence[int], arrivals: Sequence[Arrival]) -> list[int]:
    """One message; empty if there is nothing to tell, as one broadcast of its length is then enough."""
    if not cancelled and not arrivals:
        return []
    message = [len(cancelled), *cancelled]
    for a in arrivals:
        message += [a.id, a.place, a.capacity, int(a.scored), len(a.prompt), *a.prompt, len(a.about), *a.about]
    return message


def unpack(message: Sequence[int]) -> tuple[list[int], list[Arrival]]:
    """The cancelled sequences and the new ones of a message that `pack` made."""
    if not message:
        return [], []
    words = iter(message)
    cancelled = list(islice(words, next(words)))
    arrivals = []
    for id in words:
        place, capacity, scored, n = islice(words, 4)
        prompt = list(islice(words, n))
        arrivals.append(Arrival(id, place, capacity, bool(scored), prompt, bytes(islice(words, next(words)))))
    return cancelled, arrivals
