"""What a model says, taken apart while it is said: reasoning, content and tool calls in DeepSeek's formats.

An answer is `reasoning</think>content` and then, where tools were offered, calls. V3, V3-0324, R1 and R1-0528 write

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME
    ```json
    {…}
    ```<｜tool▁call▁end｜>
    <｜tool▁call▁begin｜>…<｜tool▁call▁end｜><｜tool▁calls▁end｜>

and V3.1 writes `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}<｜tool▁call▁end｜>` with nothing between two calls.

How the text was cut into pieces never matters, and no character is handed out that may still turn out to be part of a
marker. Whitespace around markers is layout and is dropped. Arguments are handed out as the model writes them, valid
JSON or not: what to do with invalid ones is for whoever runs the tool. What begins like a call and is none, because it
has no name or no separator, is content as it stands, with its markers. Text after or between calls is content.
"""

import re
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from text.tokenizer import THINK, THINK_END

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END, SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"

Style = Literal["v3", "v3.1"]
# From after <｜tool▁call▁begin｜> to the first character of the arguments; the look-ahead makes the end certain.
# V3.1 at times puts its arguments into V3's fence.
HEADS = {
    "v3": re.compile(rf"\s*(?:function\s*)?{SEPARATOR}(?P<name>[^<`]+)(?P<fence>```json)\s*(?=\S)"),
    "v3.1": re.compile(rf"(?P<name>[^<`]+){SEPARATOR}\s*(?:(?P<fence>```json)\s*(?=\S)|(?=[^\s`]))"),
}
LONGEST_HEAD = 512  # characters; what goes on longer is no call
STOPS = re.compile(f"{CALL_END}|{CALLS_END}|{CALL_BEGIN}")  # the last two for calls that were never closed


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class ToolCallStart:
    index: int  # from 0 within the answer
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    index: int
    text: str


Piece = Reasoning | Content | ToolCallStart | ToolCallArguments


def tool_style(chat_template: str) -> Style | None:
    """How the model that this chat template belongs to writes tool calls; None if the template knows none."""
    if CALL_BEGIN not in chat_template:
        return None
    return "v3" if re.search(f"{SEPARATOR}[^<]*```json", chat_template) else "v3.1"


class ChatParser:
    """Takes an answer's text as it grows and returns its pieces. Their concatenation equals that of the whole text at
    once; reasoning and content equal `Request.parts` where there are no calls."""

    def __init__(self, style: str | None, thinking: bool, tools: bool) -> None:
        """`style`: what `tool_style` says; `thinking`: the prompt already opened <think>; `tools`: whether calls are
        looked for, which needs a style. Raises ValueError for an unknown style."""
        if style is not None and style not in HEADS:
            raise ValueError(f"tool style {style!r}, expected one of {', '.join(HEADS)} or None")
        self._head = HEADS[style] if style and tools else None
        self._thinking = thinking
        self._held = ""  # text not yet understood
        self._skipped = ""  # characters that are layout until something else comes
        self._in_calls = False  # between <｜tool▁calls▁begin｜> and <｜tool▁calls▁end｜>
        self._fenced = False
        self._n_calls = 0
        self._state: Callable[[bool], list[Piece]] = self._beginning

    def push(self, text: str) -> list[Piece]:
        """The pieces that `text` completes."""
        self._held += text
        return self._advance(last=False)

    def finish(self) -> list[Piece]:
        """What was held back, now that nothing comes after it. Call it once."""
        return self._advance(last=True)

    def _advance(self, last: bool) -> list[Piece]:
        pieces: list[Piece] = []
        while True:
            before = self._state, self._held
            pieces += self._state(last)
            if before == (self._state, self._held):
                return pieces

    # Each state takes what it is sure of from `_held`, and either moves on to another state or waits for more.

    def _beginning(self, last: bool) -> list[Piece]:
        """A <think> here is a marker, even if the prompt had opened one already."""
        if len(self._held) < len(THINK) and THINK.startswith(self._held) and not last:
            return []
        if self._thinking or self._held.startswith(THINK):
            self._held = self._held.removeprefix(THINK)
            self._state, self._skipped = self._reasoning, "\n"
        else:
            self._state = self._content
        return []

    def _reasoning(self, last: bool) -> list[Piece]:
        self._held = self._held.lstrip(self._skipped)
        text, closed, after = self._held.partition(THINK_END)
        if closed:
            self._held, self._state, self._skipped = after, self._content, "\n"
        else:
            end = len(text) if last else _certain(text, (THINK_END,))
            text = text[:end].rstrip("\n")
            self._held = "" if last else self._held[len(text) :]
            self._skipped = "" if text else self._skipped
        text = text.rstrip("\n")
        return [Reasoning(text)] if text else []

    def _content(self, last: bool) -> list[Piece]:
        self._held = self._held.lstrip(self._skipped)
        markers = self._markers()
        found = re.search("|".join(markers), self._held) if markers else None
        if found:
            text, marker = self._held[: found.start()], found[0]
            self._held, self._skipped = self._held[found.end() :], string.whitespace
            self._in_calls = marker != CALLS_END
            if marker == CALL_BEGIN:
                self._state = self._call
        else:
            end = len(self._held) if last else _certain(self._held, markers)
            text, self._held = self._held[:end], self._held[end:]
            self._skipped = "" if text else self._skipped
        return [Content(text)] if text else []

    def _call(self, last: bool) -> list[Piece]:
        """After <｜tool▁call▁begin｜>: waits for the whole head, or for the certainty that there is none."""
        assert self._head is not None
        head = self._head.match(self._held[:LONGEST_HEAD])
        name = head["name"].strip() if head else ""
        if head and name:
            self._held, self._fenced, self._state = self._held[head.end() :], bool(head["fence"]), self._arguments
            self._n_calls += 1
            return [ToolCallStart(self._n_calls - 1, f"call_{uuid.uuid4().hex}", name)]
        if head or last or len(self._held) >= LONGEST_HEAD or STOPS.search(self._held):
            self._state, self._skipped = self._content, ""
            return [Content(CALL_BEGIN)]
        return []

    def _arguments(self, last: bool) -> list[Piece]:
        stop = STOPS.search(self._held)
        if stop or last:
            text = (self._held[: stop.start()] if stop else self._held).rstrip()
            if self._fenced:
                text = text.removesuffix("```").rstrip()
            self._held = self._held[stop.end() if stop[0] == CALL_END else stop.start() :] if stop else ""
            self._state, self._skipped = self._content, string.whitespace
        else:
            text = self._held[: _certain(self._held, (CALL_END, CALLS_END, CALL_BEGIN))].rstrip()
            if self._fenced:
                text = text.rstrip("`").rstrip()
            self._held = self._held[len(text) :]
        return [ToolCallArguments(self._n_calls - 1, text)] if text else []

    def _markers(self) -> tuple[str, ...]:
        """What is no content in the content."""
        if self._head is None:
            return ()
        return (CALLS_BEGIN, CALL_BEGIN, CALLS_END) if self._in_calls else (CALLS_BEGIN, CALL_BEGIN)


def _certain(text: str, markers: tuple[str, ...]) -> int:
    """How much of `text` can be no beginning of a marker at its end. Every marker has one `<`, its first character."""
    last = text.rfind("<")
    return last if last >= 0 and any(marker.startswith(text[last:]) for marker in markers) else len(text)
