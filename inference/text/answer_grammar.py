"""Grammars of answers, in llguidance's dialect of Lark: JSON by a schema, and calls in a model's own form.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md. Control tokens are written by their ids, `<[7]>`:
text that is spelled alike never stands for one. Lengths and depths are bounded here, because a grammar's cost grows
with them; llguidance's own limits bound the rest (see text/grammar.py).
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from core.answer_format import SCHEMA_FIELD, AnswerFormat, FormatError, ToolFormat
from text.parser import Markers

MAX_LENGTH = 128 << 10  # characters of all schemas of a request
MAX_SCHEMAS = 2000  # in them
MAX_PROPERTIES = 400  # of one object: a grammar of more cannot be followed
MAX_ENUM = 5000
MAX_DEPTH = 64  # schemas within schemas
# Between JSON's tokens: a model that may write any number of blanks can write them for ever.
WHITESPACE = r"[ ]{1,2}|\r?\n[ \t]{0,64}"
# Keywords with schemas in them: one, a list of them, or an object of them by name.
_ONE = ("items", "additionalProperties", "additionalItems", "not", "contains", "propertyNames", "if", "then", "else",
        "unevaluatedItems", "unevaluatedProperties")  # fmt: skip
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_MOST = dict.fromkeys(("properties", "patternProperties", "required"), MAX_PROPERTIES) | {"enum": MAX_ENUM}


def children(schema: Any) -> Iterator[tuple[str, Any]]:
    """The schemas directly within a schema, each with its path from there."""
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if key in _ONE and isinstance(value, dict | bool):
            yield key, value
        elif key in _LISTS and isinstance(value, list):
            yield from ((f"{key}.{i}", entry) for i, entry in enumerate(value))
        elif key in _NAMED and isinstance(value, dict):
            yield from ((f"{key}.{name}", entry) for name, entry in value.items())


def check_bounds(schema: Any, field: str, depth: int = 0) -> int:
    """The number of schemas in a schema. Raises FormatError for one too large to make a grammar of, naming the part."""
    if depth > MAX_DEPTH:
        raise FormatError(field, f"is more than {MAX_DEPTH} schemas deep")
    if not isinstance(schema, dict):
        return 1
    for key, most in _MOST.items():
        if isinstance(value := schema.get(key), list | dict) and len(value) > most:
            raise FormatError(f"{field}.{key}", f"has {len(value)} entries, at most {most} are supported")
    return 1 + sum(check_bounds(child, f"{field}.{path}", depth + 1) for path, child in children(schema))


def json_rule(schema: str) -> str:
    """The rule of a schema, which is JSON: what matches it."""
    return "%json " + json.dumps(json.loads(schema) | {"x-guidance": {"whitespace_pattern": WHITESPACE}})


def arguments_schema(schema: str) -> str:
    """That of a call's arguments: an object, whatever the function's parameters leave open."""
    parsed = json.loads(schema)
    says_type = {"type", "$ref", "anyOf", "oneOf", "allOf"} & parsed.keys()
    return json.dumps(parsed if says_type else {"type": "object"} | parsed)


def schemas(format: AnswerFormat) -> Iterator[tuple[str, str, ToolFormat | None]]:
    """(field, schema, its tool) of each schema of a format."""
    if format.schema is not None:
        yield SCHEMA_FIELD, format.schema, None
    for tool in format.tools:
        yield tool.field, arguments_schema(tool.schema), tool


def check_schemas(format: AnswerFormat) -> None:
    """Raises FormatError for schemas that are too large."""
    length = count = 0
    for field, schema, _ in schemas(format):
        length += len(schema)
        if length > MAX_LENGTH:
            raise FormatError(field, f"the request's schemas have more than {MAX_LENGTH} characters")
        count += check_bounds(json.loads(schema), field)
        if count > MAX_SCHEMAS:
            raise FormatError(field, f"the request has {count} schemas in schemas, at most {MAX_SCHEMAS} are read")


def answer_grammar(
    format: AnswerFormat, style: str | None, markers: Markers, token_id: Callable[[str], int | None]
) -> str:
    """The grammar of what follows a model's reasoning. `style` and `markers`: how it writes calls (text/parser.py);
    `token_id`: of a control token, None where there is none.

    Raises FormatError where calls cannot be written.
    """
    rules: list[str] = []
    if format.schema is None:
        content = "TEXT"
        rules.append("TEXT: /(?s:.*)/")
    else:
        content = "json"
        rules.append(f"json: {json_rule(format.schema)}")
    body = content
    if format.tools:
        rules += _calls(format, style, markers, token_id)
        body = "calls" if format.calls_required else f"{content} | {'TEXT? ' * (content == 'TEXT')}calls"
    return "\n".join(['%llguidance {"no_forcing": true}', f"start: {body}", *rules])


def _calls(
    format: AnswerFormat, style: str | None, markers: Markers, token_id: Callable[[str], int | None]
) -> list[str]:
    def control(text: str) -> str:
        if (found := token_id(text)) is None:
            raise FormatError("tools", f"calls cannot be held to a form: the vocabulary has no token {text}")
        return f"<[{found}]>"

    if style not in _CALLS:
        raise FormatError("tools", "calls cannot be held to a form in the way that this model writes them")
    head, after_name, end, between = _CALLS[style]
    separator = control(markers.separator)
    alternatives, rules = [], []
    for tool in format.tools:
        name = json.dumps(tool.name)
        call = after_name.replace("NAME", name).replace("SEPARATOR", separator)
        rules.append(f"arguments{tool.index}: {json_rule(arguments_schema(tool.schema))}")
        alternatives.append(f"{call} arguments{tool.index}")
    head = head.replace("SEPARATOR", separator)
    one_of = " | ".join(alternatives)
    rules.append(f"call: {control(markers.call_begin)} {head} ({one_of}) {end} {control(markers.call_end)}")
    more = "" if format.one_call else f" ({between} call)*"
    rules.append(f"calls: {control(markers.calls_begin)} call{more} {between} {control(markers.calls_end)}")
    return rules


# Of each style: what precedes the name, from the name to the arguments, what follows them, and what may stand between
# two calls. Layout is the templates' own.
_CALLS = {
    "v3": ('"function" SEPARATOR', r'NAME "\n```json\n"', r'"\n```"', r'"\n"?'),
    "v3.1": ("", "NAME SEPARATOR", "", ""),
    "kimi": ('"functions."', 'NAME ":" /[0-9]{1,4}/ SEPARATOR', "", ""),
}
