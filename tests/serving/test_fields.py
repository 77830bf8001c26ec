"""Which fields a request may have: what changes nothing is accepted at any depth, what would is refused by name."""

import copy
from typing import Any

import pytest

from serving.accepted import IGNORED, OFF
from serving.schema import ChatBody, CompletionBody, FieldError, parse

USER = {"role": "user", "content": "x"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}
PLAIN: dict[str, Any] = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]},
                 {"role": "assistant", "content": "y", "tool_calls": [CALL]}],
    "tools": [TOOL],
    "stream_options": {},
}  # fmt: skip
PLACES: list[tuple[str, tuple[str | int, ...]]] = [
    ("body", ()), ("message", ("messages", 0)), ("message", ("messages", 1)), ("part", ("messages", 0, "content", 0)),
    ("call", ("messages", 1, "tool_calls", 0)), ("call", ("messages", 1, "tool_calls", 0, "function")), ("tool", ("tools", 0)),
    ("tool", ("tools", 0, "function")), ("stream_options", ("stream_options",)),
]  # fmt: skip


def with_field(place: tuple[str | int, ...], name: str, value: Any) -> dict[str, Any]:
    body = copy.deepcopy(PLAIN)
    target: Any = body
    for step in place:
        target = target[step]
    target[name] = value
    return body


@pytest.mark.parametrize(("kind", "place"), PLACES)
def test_what_changes_nothing_is_accepted_and_what_would_is_refused(kind: str, place: tuple[str | int, ...]) -> None:
    plain = parse(ChatBody, PLAIN)
    known = {"index", "id"}  # of a call
    for name in IGNORED[kind] - known:
        for value in ("x", 1, True, [], {"type": "ephemeral"}, [{"a": {}}]):
            assert parse(ChatBody, with_field(place, name, value)) == plain, (name, value)
    for name, values in OFF[kind].items():
        if name in ChatBody.model_fields or (name == "strict" and "function" in place):
            continue  # a field of the schema's own
        for value in values:
            assert parse(ChatBody, with_field(place, name, value)) == plain, (name, value)
        with pytest.raises(FieldError) as refused:
            parse(ChatBody, with_field(place, name, "something"))
        path = ".".join(map(str, (*place, name)))
        assert refused.value.param == path and str(refused.value) == f'{path} is not supported with the value "something"'
    for name in ("frobnicate", "a\nb", "x" * 200):
        assert parse(ChatBody, with_field(place, name, None)) == plain
        with pytest.raises(FieldError, match=r"is not supported$") as refused:
            parse(ChatBody, with_field(place, name, 0))
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        # as clients send them: LiteLLM, Anthropic's cache marks, OpenRouter, AI SDK, LangChain, openai's parse()
        ({"provider_specific_fields": {"refusal": None}, "function_call": None, "annotations": [], "audio": None}, ("messages", 1)),
        ({"reasoning_details": [{"type": "reasoning.text", "text": "hm"}], "refusal": None}, ("messages", 1)),
        ({"parsed": {"a": 1}, "refusal": ""}, ("messages", 1)),
        ({"cache_control": {"type": "ephemeral"}}, ("messages", 0, "content", 0)),
        ({"cache_control": {"type": "ephemeral"}}, ("tools", 0)),
        ({"strict": False, "description": None, "parameters": None}, ("tools", 0, "function")),
        ({"parsed_arguments": {"a": 1}}, ("messages", 1, "tool_calls", 0, "function")),
        ({"function_call": "none", "functions": [], "ignore_eos": False, "best_of": 1, "use_beam_search": False}, ()),
        ({"length_penalty": 1.0, "min_tokens": 0, "stop_token_ids": [], "skip_special_tokens": True}, ()),
        ({"include_obfuscation": True, "continuous_usage_stats": False}, ("stream_options",)),
        ({"logit_bias": {}, "modalities": ["text"], "web_search_options": None, "verbosity": "medium"}, ()),
    ],
)  # fmt: skip
def test_fields_of_clients(fields: dict[str, Any], place: tuple[str | int, ...]) -> None:
    for name, value in fields.items():
        parse(ChatBody, with_field(place, name, value))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"ignore_eos": True}, "ignore_eos"),
        ({"ignore_eos": 0}, "ignore_eos"),
        ({"best_of": True}, "best_of"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"messages": [USER | {"refusal": "no"}]}, "messages.0.refusal"),
        ({"messages": [USER | {"function_call": {"name": "f"}}]}, "messages.0.function_call"),
        ({"tools": [{"type": "function", "function": {"name": "f", "returns": {"type": "string"}}}]}, "tools.0.function.returns"),
        ({"thinking": {"type": "enabled", "budget_tokens": 100}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "on"}}, "thinking.type"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"clear_thinking": False}}, "chat_template_kwargs.clear_thinking"),
    ],
)  # fmt: skip
def test_what_would_change_the_answer(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(FieldError) as refused:
        parse(ChatBody, {"messages": [USER], **fields})
    assert refused.value.param == param


def test_a_completion_has_the_same_off_values() -> None:
    plain = parse(CompletionBody, {"prompt": "x"})
    fields = {"tools": [], "tool_choice": "none", "suffix": "", "top_logprobs": 0, "enable_thinking": False, "user": "me"}
    assert parse(CompletionBody, {"prompt": "x", **fields}) == plain or "suffix" in CompletionBody.model_fields
    for name, value in (("tools", [TOOL]), ("enable_thinking", True), ("messages", [USER])):
        with pytest.raises(FieldError, match=f"{name} is not supported"):
            parse(CompletionBody, {"prompt": "x", name: value})


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, None),
        ({"thinking": {"type": "enabled"}}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "auto"}}, None),
        ({"enable_thinking": False}, False),
        ({"chat_template_kwargs": {"thinking": True}}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "minimal"}, False),
        ({"reasoning_effort": "low"}, True),
        ({"reasoning_effort": "high"}, True),
        ({"reasoning_effort": "max", "thinking": {"type": "enabled"}, "enable_thinking": True}, True),
    ],
)
def test_thinking_under_any_of_its_names(fields: dict[str, Any], wanted: bool | None) -> None:
    found, name = parse(ChatBody, {"messages": [USER], **fields}).wants_thinking
    assert found is wanted and (name.split(".")[0] in fields or wanted is None)


def test_thinking_that_contradicts_itself() -> None:
    both = {"messages": [USER], "thinking": {"type": "disabled"}, "reasoning_effort": "high"}
    with pytest.raises(FieldError, match="the body has thinking and reasoning_effort, which contradict each other"):
        parse(ChatBody, both)


def test_messages_as_templates_get_them() -> None:
    """A developer's message is the system's, reasoning has one name, and an empty field is none."""
    said = [
        {"role": "developer", "content": "be brief", "name": ""},
        {"role": "assistant", "content": "x", "reasoning": "hm", "tool_calls": [], "tool_call_id": None, "prefix": False},
        {"role": "assistant", "content": "x", "reasoning": "hm", "reasoning_content": "hm"},
    ]
    assert [message.for_template for message in parse(ChatBody, {"messages": said}).messages] == [
        {"role": "system", "content": "be brief"},
        {"role": "assistant", "content": "x", "reasoning": "hm"},
        {"role": "assistant", "content": "x", "reasoning": "hm", "reasoning_content": "hm"},
    ]
