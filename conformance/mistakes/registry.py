"""What a known mistake is, and the table of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from exact_network import Network

Change = Callable[[Network], None]


class Mistake(NamedTuple):
    name: str
    says: str  # what is wrong, one clause
    signature: str  # how it shows: the first point that differs, and where it does not
    change: Change
    format: str = ""  # "w8a8": only where activations are quantised


MISTAKES: dict[str, Mistake] = {}


def mistake(name: str, says: str, signature: str, format: str = "", **values: Any) -> Callable[[Change], Change]:
    def add(change: Change) -> Change:
        assert name not in MISTAKES, name
        MISTAKES[name] = Mistake(name, says, signature, change, format)
        return change

    return add


def replaced(name: str, says: str, signature: str, format: str = "", **methods: Callable[..., Any]) -> None:
    """A mistake that replaces methods; each is given the network before its own arguments."""

    def change(network: Network) -> None:
        for method, wrong in methods.items():
            setattr(network, method, lambda *given, wrong=wrong: wrong(network, *given))

    mistake(name, says, signature, format)(change)


def right(network: Network, method: str, *given: Any) -> Any:
    """What a method returns without the mistake."""
    return getattr(type(network), method)(network, *given)
