"""Messages of a conversation: checked, put into the order in which templates read them, and marked to see what a
template leaves out."""

import json
import secrets
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from core.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
REASONING = ("reasoning_content", "thinking", "reasoning")  # templates read the first or the second
THINK, THINK_END = "<think>", "</think>"
Message = dict[str, Any]


class Json(str):
    """Text that is JSON already, such as a tool call's arguments: the filter `tojson`, through which some templates
    pass them while others do not, leaves it as it is."""


def checked(messages: Any) -> list[Message]:
    """The messages with their content as one string (or None beside tool calls), calls' arguments as Json (they may
    come parsed), and tools' results in the order of their calls, which is how templates tell one from another; raises
    UserError naming the message.

    A role no template knows is refused here, because templates silently drop such messages.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError("the conversation has no messages")
    return _in_order_of_calls([_checked(i, message) for i, message in enumerate(messages)])


def _checked(i: int, message: Any) -> Message:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise UserError(f"message {i}: role {role!r} is not supported (known: {', '.join(ROLES)})")
    content = message.get("content")
    if isinstance(content, list):  # OpenAI's list of parts
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        if len(texts) < len(content):
            raise UserError(f"message {i}: only parts of type text are supported")
        message = message | {"content": "".join(texts)}
    elif not isinstance(content, str) and not (content is None and (message.get("tool_calls") or _is_prefix(message))):
        says = "is missing" if content is None else "has another type"
        raise UserError(f"message {i}: content {says}, expected a string")
    try:
        require_unicode(json.dumps(message, ensure_ascii=False), f"message {i}")
    except (TypeError, ValueError) as e:
        raise UserError(f"message {i}: not plain JSON data ({e})") from None
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return _with_arguments(message, _as_json)


def variants(messages: list[Message]) -> Iterator[list[Message]]:
    """`checked` messages in the forms that templates want, from the usual one on. For a message of tool calls alone
    some want no content and others fail without; some want calls' arguments parsed."""
    yield messages
    texts = [message | {"content": message.get("content") or ""} for message in messages]
    yield texts
    yield [_with_arguments(message, _parsed) for message in texts]


def _with_arguments(part: Any, form: Callable[[Any], Any]) -> Any:
    """A copy of a message with every tool call's arguments in another form."""
    match part:
        case {"tool_calls": list(calls)}:
            return part | {"tool_calls": [_with_arguments(call, form) for call in calls]}
        case {"function": {"arguments": arguments}}:
            return part | {"function": part["function"] | {"arguments": form(arguments)}}
    return part


def _as_json(arguments: Any) -> Any:
    if isinstance(arguments, dict):
        return Json(json.dumps(arguments, ensure_ascii=False))
    return Json(arguments) if isinstance(arguments, str) else arguments


def _parsed(arguments: Any) -> Any:
    try:
        found = json.loads(arguments or "{}")
    except (TypeError, ValueError):
        return arguments
    return found if isinstance(found, dict) else arguments


def require_unicode(text: str, what: str) -> None:
    """Lone surrogates come from broken JSON escapes or undecodable input; they are no text and have no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{what} is not valid Unicode: lone surrogate {text[e.start]!a}") from None


def _named(value: Any) -> str:
    """What a client called something, in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}…"


# --------------------------------------------------------------------------------------------------------------------
# Results of tools
# --------------------------------------------------------------------------------------------------------------------


def _in_order_of_calls(messages: list[Message]) -> list[Message]:
    """Raises UserError for a result without a call, and for a call without a result but for the last message's."""
    ordered: list[Message] = []
    while len(ordered) < len(messages):
        at = len(ordered)
        message = messages[at]
        if message["role"] == "tool":
            raise UserError(f"message {at}: a tool's result, and no message with tool_calls precedes it")
        ordered.append(message)
        if message["role"] == "assistant" and message.get("tool_calls") and at + 1 < len(messages):
            results: list[Message] = []
            while at + 1 + len(results) < len(messages) and messages[at + 1 + len(results)]["role"] == "tool":
                results.append(messages[at + 1 + len(results)])
            ordered += _results_of(at, message["tool_calls"], results)
    return ordered


def _results_of(at: int, calls: Any, results: list[Message]) -> list[Message]:
    """The results of the calls of message `at`, in the calls' order. They follow it."""
    ids = [call.get("id") if isinstance(call, dict) else None for call in calls]
    for k, call_id in enumerate(ids):
        if not isinstance(call_id, str) or not call_id:
            raise UserError(f"message {at}: tool call {k} has no id, by which its result is told")
        if call_id in ids[:k]:
            raise UserError(f"message {at}: two tool calls have the id {_named(call_id)}")
    found: dict[Any, Message] = {}
    for n, result in enumerate(results, at + 1):
        call_id = result.get("tool_call_id")
        if not isinstance(call_id, str) or not call_id:
            raise UserError(f"message {n}: a tool's result needs the tool_call_id of its call")
        if call_id not in ids:
            raise UserError(f"message {n}: message {at} has no tool call with the id {_named(call_id)}")
        if call_id in found:
            raise UserError(f"message {n}: a second result of the tool call {_named(call_id)}")
        found[call_id] = result
    for call_id in ids:
        if call_id not in found:
            raise UserError(f"message {at}: no tool message has the result of its tool call {_named(call_id)}")
    return [found[call_id] for call_id in ids]


# --------------------------------------------------------------------------------------------------------------------
# The beginning of an answer
# --------------------------------------------------------------------------------------------------------------------


def _is_prefix(message: Message) -> bool:
    return message.get("prefix") is True


def split_prefix(messages: list[Message]) -> tuple[list[Message], Message | None]:
    """The conversation up to where the model goes on, and the message whose beginning is given: the last one, if it is
    the assistant's with `prefix: true` (as in DeepSeek's API). Raises UserError for an assistant's message last without
    it, which would be followed by another answer, and for `prefix` anywhere else."""
    *earlier, last = messages
    for i, message in enumerate(messages):
        if _is_prefix(message) and (message is not last or last["role"] != "assistant"):
            raise UserError(f"message {i}: prefix is for an assistant's message that is the last one")
    if last["role"] != "assistant":
        return messages, None
    if not _is_prefix(last):
        raise UserError(f'message {len(earlier)}: the last message is the assistant\'s; "prefix": true in it has the '
                        "model go on with it, and a user's message after it asks for a new one")  # fmt: skip
    if last.get("tool_calls"):
        raise UserError(f"message {len(earlier)}: a message with tool_calls cannot be gone on with")
    if not earlier:
        raise UserError("message 0: no message precedes the one to go on with")
    return earlier, last


def prefix_text(prefix: Message, opened: str | None) -> tuple[str, str | None]:
    """(text, text): of the beginning of an answer up to its `</think>`, and after it; None where there is none to be
    written. `opened`: the whitespace after the `<think>` that ends the prompt, None where none does.

    An answer's thinking is laid out as R1's is after `<think>` and a line end, and V3.1's after `<think>` alone.
    """
    reasoning, content = prefix.get("reasoning_content"), prefix.get("content")
    if opened is None:
        if reasoning:
            raise UserError("the last message has reasoning_content, and the model is not asked to think")
        return content or "", None
    if reasoning and not content:
        return reasoning, None
    return (reasoning or "") + opened, 2 * opened + (content or "") if content else None


# --------------------------------------------------------------------------------------------------------------------
# What a template leaves out
# --------------------------------------------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """Something that a rendered conversation must have."""

    message: int
    what: str
    marks: tuple[str, ...]  # all of them, where the conversation was rendered with marks
    spellings: tuple[str, ...]  # one of them, where it was not


def require_all_texts(messages: list[Message], text: str, render: Callable[[list[Message]], str]) -> None:
    """Raises UserError naming the first message whose text, or one of whose calls, is not in the prompt. `text` is what
    `render` made of the messages.

    It is given them once more with numbers around each text, so that one text is not taken for another that is spelled
    alike. Reasoning, which templates leave out of earlier turns, and whitespace around a text are not looked for.
    """
    marked, wanted = _marked(messages)
    try:
        rendered: str | None = render(marked)
    except UserError:  # a template that reads more into a text than its words
        rendered = None
    for one in wanted:
        if rendered is not None:
            found = all(mark in rendered for mark in one.marks)
        else:
            found = any(spelling in text for spelling in one.spellings)
        if not found:
            raise UserError(f"message {one.message}: this checkpoint's chat template leaves out {one.what}")


def _marked(messages: list[Message]) -> tuple[list[Message], list[Wanted]]:
    secret = f"{secrets.randbelow(10**18):018d}"
    marked, wanted = [], []
    ids: dict[Any, str] = {}  # of the last message's calls, as they are marked
    for i, message in enumerate(messages):
        mark = f"{secret}{i:06d}"
        changed: dict[str, Any] = {}
        before, own, after = _own_text(message)
        if own:
            changed["content"] = f"{before}{mark}1{own}{mark}2{after}"
            spelled = (own, *(json.dumps(own, ensure_ascii=ascii)[1:-1] for ascii in (False, True)))
            wanted.append(Wanted(i, f"what the {message['role']} says", (f"{mark}1", f"{mark}2"), spelled))
        if message["role"] == "assistant" and isinstance(message.get("tool_calls"), list):
            calls, ids = [], {}
            for k, call in enumerate(message["tool_calls"]):
                if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
                    calls.append(call)
                    continue
                name, call_id, number = call["function"].get("name"), call.get("id"), f"{mark}3{k:04d}"
                ids[call_id] = f"{call_id}{number}"
                named = {"function": call["function"] | {"name": f"{name}{number}"}}
                calls.append(call | named | ({} if call_id is None else {"id": ids[call_id]}))
                spelled = tuple(str(text) for text in (name, call_id) if text)
                wanted.append(Wanted(i, f"the call of {_named(name)}", (number,), spelled))
            changed["tool_calls"] = calls
        if message.get("tool_call_id") is not None and message["tool_call_id"] in ids:
            changed["tool_call_id"] = ids[message["tool_call_id"]]
        marked.append(message | changed)
    return marked, wanted


def _own_text(message: Message) -> tuple[str, str, str]:
    """A message's content in three parts: thinking and whitespace, the text that a template must write, whitespace."""
    content = message.get("content") or ""
    ends = content.rfind(THINK_END) if message["role"] == "assistant" else -1
    thought = 0 if ends < 0 else ends + len(THINK_END)
    own = content[thought:].strip()
    at = content.index(own, thought)
    return content[:at], own, content[at + len(own) :]
