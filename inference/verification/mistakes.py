"""Known mistakes of ports of the family: each recomputes a point, a weight or an activation the wrong way.

A run whose value a mistake reproduces, and the right computation does not, has made that mistake. They are from the
bug trackers of engines and from readings of the released code.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from verification.expected import Expected


class Inapplicable(Exception):
    """A mistake that this model cannot show."""


class Mistake(NamedTuple):
    """`how` replaces the computation of `points` (names within a layer), or of "weight", "activations", "act" or
    "kv_weights", as Expected.overrides has them. `sentence` says what was done wrong, for the person who did it."""

    name: str
    points: tuple[str, ...]
    sentence: str
    how: Callable[..., Any]
    applies: Callable[[Expected], bool] = lambda e: True


MISTAKES: list[Mistake] = []


def mistake(
    name: str, points: str, sentence: str, applies: Callable[[Expected], bool] = lambda e: True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds the decorated function to the list. points: names separated by spaces."""

    def add(how: Callable[..., Any]) -> Callable[..., Any]:
        assert name not in {known.name for known in MISTAKES}, name
        MISTAKES.append(Mistake(name, tuple(points.split()), sentence, how, applies))
        return how

    return add


def named(name: str) -> Mistake:
    """Raises StopIteration for an unknown name."""
    return next(known for known in MISTAKES if known.name == name)


def require(condition: bool) -> None:
    """Raises Inapplicable unless the condition holds."""
    if not condition:
        raise Inapplicable


def overriding(mistakes: Iterable[Mistake]) -> dict[str, Callable[..., Any]]:
    """The overrides with which Expected makes these mistakes."""
    return {point: known.how for known in mistakes for point in known.points}
