"""Grammars of answers: whatever they allow is valid, in every way to write calls; and schemas that are refused."""

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tokenizer import VOCAB_SIZE, real_folder

from core.answer_format import AnswerFormat, FormatError, ToolFormat
from core.errors import UserError
from support.formats import SCHEMAS, bits, marker_tokens, parsed, tools_template, walk
from support.tiny_tokenizer import TEMPLATE, write_tokenizer
from support.tiny_tokenizer import VOCAB_SIZE as TINY
from text.grammar import Grammars
from text.parser import MARKERS
from text.tokenizer import Tokenizer

FIELD = "response_format.json_schema.schema"


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Grammars]:
    """A vocabulary of bytes whose model writes calls in a style."""
    made: dict[str, Grammars] = {}

    def make(style: str) -> Grammars:
        if style not in made:
            folder = tmp_path_factory.mktemp("words")
            template = tools_template(style, TEMPLATE) + ("{# </think> #}" if style == "v3.1" else "")
            write_tokenizer(folder, template, ("<think>", "</think>", *marker_tokens(style)))
            made[style] = Grammars(Tokenizer(folder, TINY), TINY)
        return made[style]

    return make


@pytest.fixture(scope="module")
def real() -> Grammars:
    """V3's vocabulary and template."""
    return Grammars(Tokenizer(real_folder(), VOCAB_SIZE), VOCAB_SIZE)


# --- whatever is allowed is valid ------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [60, pytest.param(2000, marks=pytest.mark.trust)])
def test_answers_validate(bytewise: Callable[[str], Grammars], n: int) -> None:
    """Random schemas: three answers each that end are JSON and validate; and nearly all schemas compile."""
    grammars, counts = bytewise("v3"), {"ended": 0, "endless": 0, "refused": 0}

    @settings(max_examples=n, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(SCHEMAS, st.integers(0, 2**32), st.booleans())
    def check(schema: dict[str, Any], seed: int, refers: bool) -> None:
        schema = {"type": "array", "items": {"$ref": "#/$defs/it"}, "$defs": {"it": schema}} if refers else schema
        try:
            grammar = grammars.compile(AnswerFormat(json.dumps(schema)))
        except FormatError as e:
            assert "nsatisfiable" in str(e), (schema, str(e))
            counts["refused"] += 1
            return
        validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker(["date", "uuid", "ipv4"]))
        for i in range(3):
            answer = walk(grammars, grammar, random.Random(seed + i), most=250)
            counts["endless" if answer is None else "ended"] += 1
            if answer is not None:
                validator.validate(json.loads(grammars.tokenizer.decode(answer)))

    check()
    assert counts["ended"] > 2 * n and counts["refused"] < n / 10, counts


WEATHER = '{"type": "object", "properties": {"city": {"type": "string", "maxLength": 9}}, "required": ["city"], "additionalProperties": false}'
TOOLS = (ToolFormat("get_weather", WEATHER, True, 0), ToolFormat("now", "{}", False, 1), ToolFormat("odd", '{"not": {}}', False, 2))


@pytest.mark.parametrize("style", list(MARKERS))
@pytest.mark.parametrize(
    "how",
    [{}, {"calls_required": True}, {"calls_required": True, "one_call": True}, {"one_call": True},
     {"schema": '{"type": "array", "items": {"type": "integer"}}'}],
    ids=str,
)  # fmt: skip
def test_calls(bytewise: Callable[[str], Grammars], style: str, how: dict[str, Any]) -> None:
    """Every call that a grammar allows is one to the parser, with valid arguments, and content is what is left."""
    grammars = bytewise(style)
    grammar = grammars.compile(AnswerFormat(**{"schema": None, "tools": TOOLS} | how))
    numbers, contents = set(), set()
    for seed in range(60):
        if (answer := walk(grammars, grammar, random.Random(seed))) is None:
            continue
        _, content, calls = parsed(grammars, answer)
        numbers.add(len(calls))
        for name, arguments in calls:
            found = json.loads(arguments)
            assert isinstance(found, dict)
            if name == "get_weather":
                jsonschema.validate(found, json.loads(WEATHER))
            assert name in ("get_weather", "now", "odd")
        contents.add(bool(content))
        if "schema" in how and not calls:
            jsonschema.validate(json.loads(content), json.loads(how["schema"]))
        assert not (content and (how.get("calls_required") or ("schema" in how and calls))), content
    expected = {1} if how.get("one_call") else {1, 2}
    expected |= set() if how.get("calls_required") else {0}
    assert expected <= numbers and (not how.get("one_call") or max(numbers) == 1), numbers
    assert contents >= ({False} if how.get("calls_required") else {True, False})


REPLIES = {
    "v3": ["<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "function", "<｜tool▁sep｜>", 'get_weather\n```json\n{"city": "Paris"}\n```', "<｜tool▁call▁end｜>",
           "\n", "<｜tool▁call▁begin｜>", "function", "<｜tool▁sep｜>", 'now\n```json\n{}\n```', "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"],
    "v3.1": ["<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "get_weather", "<｜tool▁sep｜>", '{"city": "Paris"}', "<｜tool▁call▁end｜>", "<｜tool▁call▁begin｜>",
             "now", "<｜tool▁sep｜>", "{}", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"],
}  # fmt: skip


@pytest.mark.parametrize("style", list(REPLIES))
def test_released_forms(real: Grammars, style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """V3's tokens, as released tokenizers cut them, are allowed one by one: calls after text, and JSON with and without
    layout; and where a call is required, nothing but one."""
    monkeypatch.setattr(real, "style", style)
    tokenizer = real.tokenizer

    def ids(*texts: str) -> list[int]:
        parts = ([tokenizer.control_id(t)] if tokenizer.control_id(t) is not None else tokenizer._encode_plain(t) for t in texts)
        return [token for part in parts for token in part]

    def allows(format: AnswerFormat, answer: list[int]) -> bool:
        matcher = real.compile(format).matcher()
        for token in [*answer, tokenizer.eos_ids[0]]:
            mask = matcher.compute_bitmask()
            if not mask[token // 8] >> token % 8 & 1:
                return False
            matcher.try_consume_tokens([token])
        return True

    required = AnswerFormat(None, TOOLS, calls_required=True)
    assert allows(required, ids(*REPLIES[style])) and not allows(required, ids("I would call."))
    assert not allows(AnswerFormat(None, TOOLS, calls_required=True, one_call=True), ids(*REPLIES[style]))
    assert allows(AnswerFormat(None, TOOLS), ids("Let me look – one moment…\n\n", *REPLIES[style]))
    assert allows(AnswerFormat(None, TOOLS), ids("No need: 你好 🙂")) and allows(AnswerFormat(None, TOOLS), [])
    for text in ('{"city": "Paris"}', '{"city":"Paris"}', '{\n    "city": "Paris"\n}', '{"city": "\\u0007 \\" 🙂"}', '{ "city": "" }'):
        assert allows(AnswerFormat(WEATHER), ids(text)), text
    for text in ('{"city": 3}', '{"city": "0123456789"}', '{"city": "x"} ', "{}", '{"city": "x",\n\n\n"b": 1}', "", "```json"):
        assert not allows(AnswerFormat(WEATHER), ids(text)), text


# --- what is refused -------------------------------------------------------------------------------------------------


def nested(n: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(n):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def doubling(keyword: str) -> dict[str, Any]:
    """As large as 2^30 schemas, if it were written out."""
    twice = {f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i - 1}"}] * 2} for i in range(1, 31)}
    return {"$ref": "#/$defs/d30", "$defs": {"d0": {"type": "integer"}, **twice}}


def large(n: int, prefix: str = "") -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{prefix}{i}": {"type": "string"} for i in range(n)}}


@pytest.mark.parametrize(
    ("schema", "part", "says"),
    [
        ({"properties": {"a": {"items": {"not": {"const": 1}}}}}, ".properties.a.items", 'Unimplemented keys: ["not"]'),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"uniqueItems": True}}}, ".$defs.x", "uniqueItems"),
        ({"x-guidance": {"lenient": True}, "properties": {"a": {"contains": {}}}}, ".properties.a", "contains"),
        ({"anyOf": [{"type": "string"}, {"type": "text"}]}, ".anyOf.1", "Invalid type: text"),
        ({"type": "string", "pattern": "(?=a)b"}, "", "look-around"),
        ({"type": "string", "format": "color"}, "", "Unknown format: color"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "", "Unsatisfiable schema"),
        ({"$ref": "https://example.com/schema"}, "", "not present in a registry"),
        ({"$ref": "#/$defs/none"}, "", "does not exist"),
        ({"$ref": "#"}, "", "no text can match it"),
        (large(401), ".properties", "has 401 entries, at most 400"),
        ({"enum": list(range(5001))}, ".enum", "has 5001 entries"),
        (nested(65), ".properties.a" * 65, "is more than 64 schemas deep"),
        ({"anyOf": [large(200) for _ in range(10)]}, "", "2011 schemas in schemas, at most 2000"),
        ({"const": "x" * (128 << 10)}, "", "more than 131072 characters"),
        ({"type": "integer", "multipleOf": 999999937}, "", "fuel exhausted"),
        ({"anyOf": [large(390, f"{i}_") for i in range(5)]}, None, ""),
        ({"type": "string", "pattern": "^" + "(a?){500}" * 50 + "$"}, None, ""),
        ({"type": "string", "pattern": "^((a{1,300}){1,300}){1,300}$"}, None, ""),
        ({"type": "string", "pattern": "^(.*a.*b.*c.*d.*e.*f){30}$"}, None, ""),
        ({"type": "array", "minItems": 10**9, "items": {"type": "integer"}}, None, ""),
        ({"type": "array", "items": {"anyOf": [{"type": "string", "pattern": f"^.{{0,{k}}}$"} for k in range(1, 200)]}}, None, ""),
        (doubling("anyOf"), None, ""),
        (doubling("allOf"), None, ""),
    ],
)  # fmt: skip
def test_schemas_refused_or_bounded(real: Grammars, schema: dict[str, Any], part: str | None, says: str) -> None:
    """Refused with the part named, or (part None) followed at a bounded cost, whatever is said."""
    real.prepare()
    began = time.process_time()
    if part is None:
        try:
            matcher = real.compile(AnswerFormat(json.dumps(schema))).matcher()
        except FormatError:
            return
        for _ in range(20):
            allowed = bits(matcher.compute_bitmask())
            if matcher.is_error() or matcher.is_stopped():
                break
            matcher.try_consume_tokens([int(allowed[len(allowed) // 2])])
    else:
        with pytest.raises(FormatError) as e:
            real.compile(AnswerFormat(json.dumps(schema)))
        assert e.value.param.startswith((FIELD + part)[:60]) and e.value.param.count(".a") == part.count(".a")
        assert says in str(e.value) and len(str(e.value)) < 1200 and "\n" not in str(e.value)
    assert time.process_time() - began < 6  # a second or less on a machine with nothing else to do


def test_a_strict_tool_is_refused_and_another_is_left_open(bytewise: Callable[[str], Grammars]) -> None:
    grammars = bytewise("v3.1")
    strict = ToolFormat("odd", '{"properties": {"a": {"not": {}}}}', True, 3)
    with pytest.raises(FormatError) as e:
        grammars.compile(AnswerFormat(None, (*TOOLS, strict)))
    assert e.value.param == "tools.3.function.parameters.properties.a"


def test_a_vocabulary_without_the_markers(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, tools_template("v3", TEMPLATE))
    with pytest.raises(FormatError, match="the vocabulary has no token <｜tool"):
        Grammars(Tokenizer(tmp_path, TINY), TINY).compile(AnswerFormat(None, TOOLS))
    write_tokenizer(tmp_path, TEMPLATE)
    with pytest.raises(FormatError, match="cannot be held to a form in the way"):
        Grammars(Tokenizer(tmp_path, TINY), TINY).compile(AnswerFormat(None, TOOLS))


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokenizer(tmp_path, TEMPLATE)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"needs llguidance: pip install -r requirements\.txt"):
        Grammars(Tokenizer(tmp_path, TINY), TINY).compile(AnswerFormat("{}"))
