"""Splits a model's output into reasoning, content and tool calls, while it is generated.

An answer is `reasoning</think>content` and then, where tools were offered, calls. V3, V3-0324, R1 and R1-0528 write

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME
    ```json
    {…}
    ```<｜tool▁call▁end｜>
    <｜tool▁call▁begin｜>…<｜tool▁call▁end｜><｜tool▁calls▁end｜>

and V3.1 writes `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}<｜tool▁call▁end｜>` with nothing between two calls. Each at
times writes the other's form, a fence that is not quite one, or none. Kimi-K2 writes
`<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{…}<|tool_call_end|>`, in which the call's id precedes
its arguments: calls are numbered through the whole conversation. GLM writes each argument apart (keyed_calls.py).

Only control tokens are markers; text spelled alike is text. No control token is ever content or reasoning. How ordinary
text is cut into pieces makes no difference. Whitespace around markers is layout and is dropped. Arguments come out as
the model writes them, valid JSON or not: the caller of the tool validates them; for none there is `{}`. Of a call
without a name or a separator the text is what it would be without the markers. A call that begins before `</think>`
ends the reasoning. Text after or between calls is content.
"""

import json
import re
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from text.conversation import THINK, THINK_END

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END, SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"

Style = Literal["v3", "v3.1", "kimi", "glm"]
LONGEST_HEAD = 512  # characters; anything longer is no call


@dataclass(frozen=True)
class Markers:
    """The control tokens of a way to write calls."""

    calls_begin: str = CALLS_BEGIN
    calls_end: str = CALLS_END
    call_begin: str = CALL_BEGIN
    call_end: str = CALL_END
    separator: str = SEPARATOR

    @property
    def stops(self) -> tuple[str, ...]:
        """These end a call; the last two where the model never closed it."""
        return self.call_end, self.calls_end, self.call_begin


KIMI = Markers("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>",
               "<|tool_call_argument_begin|>")  # fmt: skip
MARKERS: dict[str, Markers] = {"v3": Markers(), "v3.1": Markers(), "kimi": KIMI}
NAME = r"(?P<name>[^\s<>`{}\"]+)"
# The look-aheads make the end certain. After a fence's own line anything may follow, on it only JSON or the call's end.
FENCE = r"(?P<fence>`{3,})(?i:json)?(?:[ \t]*\n\s*(?=\S)|[ \t]*(?=[{\[\"<]))"
ENDS = "|".join((CALL_END, CALLS_END, CALL_BEGIN))
# A call's head: what precedes the separator, and what follows it up to the first character of the arguments, which may
# be a control token's.
NAME_BEHIND = re.compile(r"\s*(?:function\s*)?"), re.compile(rf"\s*{NAME}\s*(?:{FENCE}|(?=\{{|{ENDS}))")
NAMED_FUNCTION = re.compile(r"\s*(?P<name>function)\s*"), re.compile(rf"\s*(?:{FENCE}|(?=\{{))")
NAME_BEFORE = re.compile(rf"(?!\s*function\s*$)\s*{NAME}\s*")
HEADS = {
    "v3": (NAME_BEHIND, (NAME_BEFORE, re.compile(rf"\s*(?:{FENCE}|(?=\{{|{ENDS}))"))),
    "v3.1": ((NAME_BEFORE, re.compile(rf"\s*(?:{FENCE}|(?=[^\s`]))")), NAMED_FUNCTION, NAME_BEHIND),
    "kimi": (
        (re.compile(r"\s*(?P<id>(?:functions\.)?(?P<name>[^\s<:]+):\d+)\s*"), re.compile(r"\s*(?=\S)(?P<fence>)")),
    ),
}


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


class ChatParser:
    """Takes an answer piece by piece and returns what each completes."""

    def __init__(self, style: str | None, thinking: bool, tools: bool) -> None:
        """`style` is `tool_style`'s; `thinking`: the prompt already opened <think>; `tools`: look for calls, which
        needs a style. Raises ValueError for an unknown style."""
        if style is not None and style not in HEADS:
            raise ValueError(f"tool style {style!r}, expected one of {', '.join(HEADS)} or None")
        self.has_reasoning = thinking  # whether the answer begins with reasoning, even an empty one
        self._heads, self._seeks_calls = HEADS[style] if style else (), bool(style and tools)
        self._markers = MARKERS[style] if style else Markers()
        self._layout = ""  # characters dropped until others come
        self._withheld = ""  # trailing characters that are layout if a marker follows
        self._head: list[tuple[str, bool]] = []  # pieces of what may be a call's head
        self._in_calls = False  # between <｜tool▁calls▁begin｜> and <｜tool▁calls▁end｜>
        self._fence = ""  # what may close the arguments and is none of them
        self._arguments_so_far = ""  # of the last call
        self._n_calls = 0
        self._ids: set[str] = set()
        self._state: Callable[[str, bool], list[Piece]] = self._beginning
        self._before_call: Callable[[str, bool], list[Piece]] = self._beginning

    def push(self, text: str, is_control: bool) -> list[Piece]:
        """Return what `text` completes; with `is_control` it is a control token's whole text."""
        return self._state(text, is_control) if text else []

    def finish(self) -> list[Piece]:
        """Return what is withheld, now that nothing follows it. Call it once."""
        if self._state == self._call:
            return self._no_call()
        return self._end_arguments() if self._state == self._arguments else []

    @property
    def is_undecided(self) -> bool:
        """Whether text that was pushed may still become part of a piece, or of none."""
        return bool(self._withheld) or self._state == self._call

    @property
    def is_cut(self) -> bool:
        """Whether the answer, so far, ends within a call."""
        return self._state == self._call or (self._state == self._arguments and not _is_json(self._arguments_so_far))

    # Each state takes one piece and moves on to another state where a marker says so.

    def _beginning(self, text: str, is_control: bool) -> list[Piece]:
        """A <think> at the very beginning is a marker, even if the prompt opened one already."""
        opens = is_control and text == THINK
        self.has_reasoning |= opens
        self._state, self._layout = (self._reasoning, "\n") if self.has_reasoning else (self._content, "")
        return [] if opens else self._state(text, is_control)

    def _reasoning(self, text: str, is_control: bool) -> list[Piece]:
        if is_control:
            if text == THINK_END:
                self._state, self._layout, self._withheld = self._content, "\n", ""
            elif self._seeks_calls and text == self._markers.call_begin:
                self._begin_call()
            return []
        text = (self._withheld + text).lstrip(self._layout)
        said = text.rstrip("\n")
        self._withheld = text[len(said) :]
        self._layout = "" if said else self._layout
        return [Reasoning(said)] if said else []

    def _content(self, text: str, is_control: bool) -> list[Piece]:
        if is_control:
            if text in self._expected():
                self._layout, self._in_calls = string.whitespace, text != self._markers.calls_end
                if text == self._markers.call_begin:
                    self._begin_call()
            elif text == THINK_END:
                self._layout += "\n"
            return []
        text = text.lstrip(self._layout)
        self._layout = "" if text else self._layout
        return [Content(text)] if text else []

    def _expected(self) -> tuple[str, ...]:
        """The markers that have a meaning here."""
        if not self._seeks_calls:
            return ()
        begin = (self._markers.calls_begin, self._markers.call_begin)
        return (*begin, self._markers.calls_end) if self._in_calls else begin

    def _begin_call(self) -> None:
        self._before_call, self._state, self._head = self._state, self._call, []

    def _call(self, text: str, is_control: bool) -> list[Piece]:
        """After the token that begins a call: waits for the whole head, or for the certainty that there is none."""
        if self._head and not is_control and not self._head[-1][1]:
            self._head[-1] = self._head[-1][0] + text, False
        else:
            self._head.append((text, is_control))
        texts = [piece for piece, _ in self._head]
        separator = (self._markers.separator, True)
        at = self._head.index(separator) if separator in self._head else len(texts)
        before, after = "".join(texts[:at]), "".join(texts[at + 1 :])
        most = max(LONGEST_HEAD - len(before) - len(separator[0]), 0)
        for first, second in self._heads:
            if (name := first.fullmatch(before)) and (begin := second.match(after, 0, most)):
                return self._call_begins(name.groupdict() | begin.groupdict(), after[begin.end() :], is_control)
        is_stopped = is_control and text in self._markers.stops
        return self._no_call() if is_stopped or sum(map(len, texts)) >= LONGEST_HEAD else []

    def _call_begins(self, head: dict[str, str | None], rest: str, is_control: bool) -> list[Piece]:
        """A head is complete, and `rest` follows it."""
        self._state, self._in_calls, self._withheld, self._arguments_so_far = self._arguments, True, "", ""
        self._fence = head["fence"] or ("```" if head["fence"] is None and rest[:1] in ("{", "[") else "")
        call_id = head.get("id") or f"call_{uuid.uuid4().hex}"
        call_id = f"call_{uuid.uuid4().hex}" if call_id in self._ids else call_id
        self._ids.add(call_id)
        self._n_calls += 1
        return [ToolCallStart(self._n_calls - 1, call_id, head["name"] or ""), *self._arguments(rest, is_control)]

    def _no_call(self) -> list[Piece]:
        """What followed the call's marker, as what it would have been without."""
        self._state = self._before_call
        self._layout = "" if self._state == self._content else self._layout
        return [found for piece in self._head for found in self.push(*piece)]

    def _arguments(self, text: str, is_control: bool) -> list[Piece]:
        if is_control and text in self._markers.stops:
            pieces = self._end_arguments()
            self._state, self._layout = self._content, string.whitespace
            return pieces if text == self._markers.call_end else [*pieces, *self._content(text, is_control)]
        text = self._withheld + text
        said = text.rstrip()
        if self._fence:
            said = said.rstrip("`").rstrip()
        self._withheld = text[len(said) :]
        self._arguments_so_far += said
        return [ToolCallArguments(self._n_calls - 1, said)] if said else []

    def _end_arguments(self) -> list[Piece]:
        text, self._withheld = self._withheld.rstrip(), ""
        if self._fence:
            text = text.removesuffix(self._fence).rstrip()
        text = text or ("" if self._arguments_so_far else "{}")
        self._arguments_so_far += text
        return [ToolCallArguments(self._n_calls - 1, text)] if text else []


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
