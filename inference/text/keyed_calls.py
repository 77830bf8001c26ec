"""Tool calls as GLM writes them from 4.5 on, each argument a key and a value between control tokens:

    <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>…</tool_call>

A value is JSON, but text stands as it is, without quotes. So what may be either is text where the tool's schema says
that the parameter is a string, and otherwise JSON where it is JSON. Arguments come out as one JSON object.
"""

import json
import re
import string
import uuid
from collections.abc import Iterable
from typing import Any

from text.parser import LONGEST_HEAD, NAME, ChatParser, Markers, Piece, ToolCallArguments, ToolCallStart

GLM = Markers("", "", "<tool_call>", "</tool_call>", "")
KEY, KEY_END, VALUE, VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"


def text_parameters(tools: Iterable[tuple[str, dict[str, Any]]]) -> tuple[tuple[str, str], ...]:
    """(function, parameter) of each parameter that is a string, of functions' names and schemas."""
    found = []
    for name, schema in tools:
        properties = schema.get("properties")
        for key, value in properties.items() if isinstance(properties, dict) else ():
            if isinstance(value, dict) and (value.get("type") == "string" or _is_choice_of_texts(value.get("enum"))):
                found.append((name, key))
    return tuple(found)


def _is_choice_of_texts(enum: Any) -> bool:
    return isinstance(enum, list) and bool(enum) and all(isinstance(entry, str) for entry in enum)


class KeyedChatParser(ChatParser):
    """A ChatParser of such calls."""

    def __init__(self, thinking: bool, tools: bool, texts: Iterable[tuple[str, str]] = ()) -> None:
        """`texts` is text_parameters'."""
        super().__init__(None, thinking, tools)
        self._markers, self._seeks_calls = GLM, tools
        self._texts = frozenset(texts)
        self._name = self._key = self._value = ""
        self._within: str | None = None  # the token that began what is not ended: KEY, VALUE or None
        self._n_pairs = 0  # of the call

    @property
    def is_cut(self) -> bool:
        return self._state == self._call or (self._state == self._pairs and self._within is not None)

    def finish(self) -> list[Piece]:
        if self._state == self._pairs:
            return [] if self.is_cut else [self._argument("}" if self._n_pairs else "{}")]
        return super().finish()

    def _call(self, text: str, is_control: bool) -> list[Piece]:
        """After the token that begins a call: waits for the end of its name."""
        name = "".join(piece for piece, _ in self._head).strip()
        if is_control and text in (KEY, GLM.call_end) and re.fullmatch(NAME, name):
            self._name, self._n_pairs, self._within, self._state = name, 0, None, self._pairs
            self._n_calls += 1
            return [ToolCallStart(self._n_calls - 1, f"call_{uuid.uuid4().hex}", name), *self._pairs(text, True)]
        self._head.append((text, is_control))
        return self._no_call() if is_control or len(name) + len(text) >= LONGEST_HEAD else []

    def _pairs(self, text: str, is_control: bool) -> list[Piece]:
        """Within a call, after its name. What stands between keys and values is layout."""
        if is_control and text in (KEY, KEY_END, VALUE, VALUE_END, GLM.call_begin, GLM.call_end):
            ended = self._end_value() if self._within == VALUE else []
            self._within = text if text in (KEY, VALUE) else None
            if text == KEY:
                self._key = ""
            elif text == VALUE:
                self._value = ""
                begin = f"{', ' if self._n_pairs else '{'}{json.dumps(self._key.strip(), ensure_ascii=False)}: "
                self._n_pairs += 1
                ended.append(self._argument(begin + '"' * self._is_text))
            elif text in (GLM.call_begin, GLM.call_end):
                ended.append(self._argument("}" if self._n_pairs else "{}"))
                self._state, self._layout = self._content, string.whitespace
                if text == GLM.call_begin:
                    self._begin_call()
            return ended
        if self._within == KEY:
            self._key += text
        elif self._within == VALUE and self._is_text:
            return [self._argument(json.dumps(text, ensure_ascii=False)[1:-1])]
        elif self._within == VALUE:
            self._value += text
        return []

    @property
    def _is_text(self) -> bool:
        return (self._name, self._key.strip()) in self._texts

    def _end_value(self) -> list[Piece]:
        if self._is_text:
            return [self._argument('"')]
        value = self._value.strip()
        return [self._argument(value if _is_json(value) else json.dumps(self._value, ensure_ascii=False))]

    def _argument(self, text: str) -> Piece:
        return ToolCallArguments(self._n_calls - 1, text)


def _is_json(text: str) -> bool:
    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        json.loads(text, parse_constant=refuse)  # Python reads NaN
    except (ValueError, RecursionError):
        return False
    return True
