"""How the answer to a conversation is read: the style of a model's calls, by its chat template, and its parser."""

import re
from dataclasses import dataclass
from typing import Any

from text.keyed_calls import GLM as KEYED
from text.keyed_calls import KEY, KeyedChatParser
from text.parser import CALL_BEGIN, KIMI, SEPARATOR, ChatParser, Style


def tool_style(chat_template: str) -> Style | None:
    """How the model of this chat template writes tool calls; None if the template knows none."""
    if KIMI.call_begin in chat_template:
        return "kimi"
    if KEYED.call_begin in chat_template and KEY in chat_template:
        return "glm"
    if CALL_BEGIN not in chat_template:
        return None
    return "v3" if re.search(f"{SEPARATOR}[^<]*```json", chat_template) else "v3.1"


@dataclass(frozen=True)
class ChatFormat:
    """How the answer to a conversation is read: the style of its calls (see `tool_style`), whether to look for any, and
    of GLM's calls which (function, parameter) are strings."""

    style: str | None = None
    tools: bool = False
    texts: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> "ChatFormat":
        """From what `dataclasses.asdict` makes of one, through JSON."""
        return cls(**said | {"texts": tuple((function, parameter) for function, parameter in said["texts"])})

    def parser(self, thinking: bool) -> "ChatParser":
        """`thinking`: the prompt already opened <think>."""
        if self.style == "glm":
            return KeyedChatParser(thinking, self.tools, self.texts)
        return ChatParser(self.style, thinking, self.tools)
