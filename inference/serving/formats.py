"""The form that a conversation's answer is to have: response_format, strict tools, tool_choice, parallel_tool_calls."""

import json
from typing import Any

from core.answer_format import ANY_OBJECT, AnswerFormat, ToolFormat
from serving.schema import ChatBody, FieldError, NamedChoice, shown


def answer_format(body: ChatBody) -> AnswerFormat | None:
    """None where any text will do, with any calls in it. Raises FieldError."""
    schema, choice = _schema(body), body.tool_choice
    names = [tool.function.name for tool in body.tools]
    if choice == "required" and not names:
        raise FieldError("tool_choice", 'is "required": it needs tools')
    if isinstance(choice, NamedChoice) and choice.function.name not in names:
        raise FieldError("tool_choice.function.name", f"is {shown(choice.function.name)}, which is none of the tools")
    tools = _tools(body)
    required = choice == "required" or isinstance(choice, NamedChoice)
    one_call = not body.parallel_tool_calls or isinstance(choice, NamedChoice)
    held = required or any(tool.strict for tool in tools) or (bool(tools) and one_call)
    if schema is None and not held:
        return None
    return AnswerFormat(schema, tools, required, one_call)


def _schema(body: ChatBody) -> str | None:
    asked = body.response_format
    if asked.type == "text":
        return None
    if asked.type == "json_object":
        return ANY_OBJECT
    if asked.json_schema is None:
        raise FieldError("response_format.json_schema", "is missing")
    return ANY_OBJECT if asked.json_schema.schema_ is None else _json(asked.json_schema.schema_)


def _tools(body: ChatBody) -> tuple[ToolFormat, ...]:
    """Those that may be called."""
    if not body.offers_tools:
        return ()
    wanted = body.tool_choice.function.name if isinstance(body.tool_choice, NamedChoice) else None
    return tuple(
        ToolFormat(tool.function.name, _json(tool.function.parameters), tool.function.strict, index)
        for index, tool in enumerate(body.tools)
        if wanted in (None, tool.function.name)
    )


def _json(schema: dict[str, Any]) -> str:
    return json.dumps(schema, ensure_ascii=False)
