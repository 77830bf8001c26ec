"""Structured output over HTTP, by openai's client: schemas, strict tools, choices of tools; in streams and in files."""

import json
import random
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from core.answer_format import AnswerFormat
from engine.engine import Engine
from serving.formats import answer_format
from serving.schema import ChatBody, FieldError, parse
from support import processes as launch
from support.formats import marker_tokens, random_schemas, tools_template
from support.http_server import GENEROUS, RunningServer, await_that, serving
from support.tiny_tokenizer import TEMPLATE, write_tokenizer
from text.parser import MARKERS

DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"
CHAT = "/v1/chat/completions"
QUESTION: Any = [{"role": "user", "content": "What is 347 + 285?"}]


class Sum(BaseModel):
    total: int = Field(ge=0, le=9999)
    sure: bool
    note: Literal["easy", "hard"] | None


class Weather(BaseModel):
    """Says what the weather is."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


ADD = {"type": "function", "function": {"name": "add", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["a"], "additionalProperties": False}}}  # fmt: skip
STRICT_ADD = {"type": "function", "function": ADD["function"] | {"strict": True}}  # type: ignore[operator]
NOW = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[RunningServer, openai.OpenAI]]:
    engine = Engine.from_pretrained(DEMO, dtype="float32", max_model_len=1024, n_pages=40, mtp=1)
    with serving(engine) as running, openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=GENEROUS) as client:
        yield running, client


@pytest.fixture(scope="module", params=["v3", *(pytest.param(style, marks=pytest.mark.trust) for style in MARKERS if style != "v3")])
def caller(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, openai.OpenAI]]:
    """A random model of bytes that is offered tools in a style, drafting."""
    folder = launch.make_tiny(tmp_path_factory.mktemp("caller") / "tiny")
    write_tokenizer(folder, tools_template(request.param, TEMPLATE), marker_tokens(request.param))
    engine = Engine.from_pretrained(folder, dtype="float32", max_model_len=1600, n_pages=80, mtp=1)
    with serving(engine) as running, openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=GENEROUS) as client:
        yield running, client


def test_parse_gives_a_model(demo: tuple[RunningServer, openai.OpenAI]) -> None:
    """Behind the demo's reasoning, greedy and sampled, several at once beside free answers."""
    client = demo[1]
    free = client.chat.completions.create(model="model", messages=QUESTION, temperature=0).choices[0].message
    found: list[Any] = []

    def ask(temperature: float) -> None:
        asked: Any = dict(model="model", messages=QUESTION, temperature=temperature, seed=1, max_completion_tokens=400)
        found.append(client.chat.completions.parse(**asked, response_format=Sum).choices[0])
        found.append(client.chat.completions.create(**asked | {"temperature": 0}).choices[0].message)

    threads = [threading.Thread(target=ask, args=(t,)) for t in (0, 1.5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    parsed = [choice for choice in found if hasattr(choice, "finish_reason")]
    assert len(found) == 4 and len(parsed) == 2
    for choice in parsed:
        assert choice.finish_reason == "stop" and isinstance(choice.message.parsed, Sum)
        assert choice.message.reasoning_content and "{" not in choice.message.reasoning_content[:1]
    assert all(message.content == free.content for message in found if message not in parsed and not hasattr(message, "finish_reason"))


def test_streams_and_length(demo: tuple[RunningServer, openai.OpenAI]) -> None:
    client = demo[1]
    asked: Any = dict(model="model", messages=QUESTION, temperature=1, seed=4, max_tokens=40, response_format={"type": "json_object"}, n=2)
    whole = client.chat.completions.create(**asked)
    said = {0: "", 1: ""}
    finish = {}
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
            finish[choice.index] = choice.finish_reason or finish.get(choice.index)
    for choice in whole.choices:
        assert (said[choice.index], finish[choice.index]) == (choice.message.content, choice.finish_reason)
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content or ""), dict)
        else:
            assert choice.finish_reason == "length"
    with client.chat.completions.stream(model="model", messages=QUESTION, temperature=0, response_format=Sum) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Sum)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="model", messages=QUESTION, max_tokens=5, response_format=Sum)


def test_choices_of_tools(caller: tuple[RunningServer, openai.OpenAI]) -> None:
    """Required, named, one at a time, strict; whole and streamed."""
    client = caller[1]
    tools = [STRICT_ADD, NOW]
    asked: Any = dict(model="model", messages=[{"role": "user", "content": "hi"}], tools=tools, temperature=1, max_tokens=120)
    blanks = caller[0].on_engine(lambda engine: [t for t in range(3, 259) if engine.tokenizer.name(t).isspace()])
    closes = caller[0].on_engine(lambda engine: [t for t in range(3, 259) if engine.tokenizer.name(t) == b"}"])
    asked["logit_bias"] = {str(t): -20.0 for t in blanks} | {str(t): 4.0 for t in closes}
    seen = set()
    for seed in range(1):
        for more in ({"tool_choice": "required", "parallel_tool_calls": False}, {"tool_choice": "required"},
                     {"tool_choice": {"type": "function", "function": {"name": "add"}}}):  # fmt: skip
            (choice,) = client.chat.completions.create(**asked, **more, seed=seed).choices
            if choice.finish_reason == "length":
                continue
            assert choice.finish_reason == "tool_calls" and choice.message.content is None and choice.message.tool_calls
            calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
            assert len(calls) == 1 or more == {"tool_choice": "required"}
            for name, arguments in calls:
                assert isinstance(arguments, dict) and name in ("add", "now")
                if name == "add":
                    jsonschema.validate(arguments, ADD["function"]["parameters"])  # type: ignore[index]
                assert name == "add" or isinstance(more["tool_choice"], str)
            seen.add(str(more))
    assert len(seen) >= 2
    names = arguments = ""
    named: Any = {"tool_choice": {"type": "function", "function": {"name": "add"}}}
    for chunk in client.chat.completions.create(**asked, **named, seed=1, stream=True):
        for part in chunk.choices[0].delta.tool_calls or []:
            names += (part.function and part.function.name) or ""
            arguments += (part.function and part.function.arguments) or ""
    assert names == "add" and set(json.loads(arguments)) == {"a"}
    tool = openai.pydantic_function_tool(Weather)
    parsed = client.chat.completions.parse(**asked | {"tools": [tool]}, tool_choice="required", parallel_tool_calls=False, seed=2)
    (call,) = parsed.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)


def asked(schema: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """A request that is held to a schema in one of the ways there are."""
    arguments = {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "f", "parameters": arguments, "strict": True}}
    ways: list[dict[str, Any]] = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": draw.random() < 0.5}}},
        {"response_format": {"type": "json_object"}},
        {"tools": [tool, NOW], "tool_choice": "required", "parallel_tool_calls": draw.random() < 0.5},
        {"tools": [NOW, tool], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"tools": [tool], "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
    ]
    return draw.choice(ways) | {
        "messages": [{"role": "user", "content": draw.choice("abc") * draw.randint(1, 80)}], "temperature": draw.choice([0, 0.7, 1.5]),
        "max_tokens": 150, "n": draw.choice([1, 1, 2]), "stream": draw.random() < 0.5, "seed": draw.randrange(1000),
    }  # fmt: skip


def choices_of(said: Any) -> list[tuple[str, list[list[str]], str]]:
    """(content, [name, arguments] of each call, why it ended) of each choice, streamed or whole."""
    if not isinstance(said, str):
        return [(c["message"]["content"] or "", [[call["function"]["name"], call["function"]["arguments"]] for call in c["message"].get("tool_calls", [])],
                 c["finish_reason"]) for c in said["choices"]]  # fmt: skip
    found: dict[int, list[Any]] = {}
    assert said.endswith("data: [DONE]\n\n")
    for part in (c for line in said.split("\n") if line.startswith("data: {") for c in json.loads(line[6:])["choices"]):
        choice = found.setdefault(part["index"], ["", [], None])
        choice[0] += part["delta"].get("content") or ""
        for call in part["delta"].get("tool_calls", []):
            if "id" in call:
                choice[1].append([call["function"]["name"], ""])
            choice[1][call["index"]][1] += call["function"]["arguments"]
        choice[2] = part["finish_reason"] or choice[2]
    return [(content, calls, why) for content, calls, why in found.values()]


@pytest.mark.parametrize("n", [20, pytest.param(1700, marks=[pytest.mark.trust, pytest.mark.timeout(3600)])])
def test_every_answer_validates(caller: tuple[RunningServer, openai.OpenAI], n: int) -> None:
    """Random schemas for content and for calls, greedy and sampled, drafted, streamed and whole, among each other."""
    running, draw = caller[0], random.Random(n)
    names = running.on_engine(lambda engine: [engine.tokenizer.name(t) for t in range(3, 259)])
    biases = {str(t): -20.0 if name.isspace() else 4.0 for t, name in enumerate(names, 3) if name.isspace() or name in (b"}", b"]", b'"')}
    schemas = random_schemas(n)
    bodies = [asked(schema, draw) | {"logit_bias": biases} for schema in schemas]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: running.send("POST", CHAT, body), bodies))
    checker, ended, refused = jsonschema.FormatChecker(["date", "uuid", "ipv4"]), Counter[str](), 0
    for schema, body, (status, _, said) in zip(schemas, bodies, answers, strict=True):
        if status == 400:  # the tools are in the prompt, byte by byte
            assert said["error"]["code"] == "context_length_exceeded" or "nsatisfiable" in said["error"]["message"], (body, said)
            refused += 1
            continue
        assert status == 200, (body, said)
        for content, calls, why in choices_of(said):
            ended[why] += 1
            if why == "length":
                continue
            assert (why == "tool_calls") == bool(calls) and not (calls and content), (body, content, calls)
            assert calls or not body.get("tool_choice"), (body, content)
            assert len(calls) <= 1 or body.get("parallel_tool_calls", "tool_choice" not in body), (body, calls)
            for name, arguments in calls:
                value = json.loads(arguments)
                assert name in ("f", "now") and isinstance(value, dict)
                if name == "f":
                    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(value["a"])
            if not calls:
                wanted = schema if body["response_format"]["type"] == "json_schema" else {"type": "object"}
                jsonschema.Draft202012Validator(wanted, format_checker=checker).validate(json.loads(content))
    assert set(ended) <= {"stop", "length", "tool_calls"} and min(ended["stop"], ended["tool_calls"]) > n / 5, ended
    assert refused < n / 10
    drafted = running.on_engine(lambda engine: engine.stats.accepted)
    assert sum(drafted) > 0


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
        ({"response_format": {"type": "xml"}}, "response_format.type", 'expected "text", "json_object" or "json_schema"'),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"properties": {"a": {"not": {}}}}}}},
         "response_format.json_schema.schema.properties.a", 'Unimplemented keys: ["not"]'),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}}, "response_format.json_schema.schema", "expected an object"),
        ({"response_format": {"type": "json_object"}, "stop": "x"}, "stop", "cannot be combined with a format"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": "some"}, "tool_choice", "expected"),
        ({"tools": [STRICT_ADD]}, "tools", "offers none to the model"),
    ],
)  # fmt: skip
def test_refused(demo: tuple[RunningServer, openai.OpenAI], fields: dict[str, Any], param: str, says: str) -> None:
    status, _, said = demo[0].send("POST", CHAT, {"messages": QUESTION, "max_tokens": 2} | fields)
    assert (status, said["error"]["type"], said["error"]["param"]) == (400, "invalid_request_error", param)
    assert says in said["error"]["message"] and "\n" not in said["error"]["message"]


def test_a_strict_schema_of_a_tool_is_named(caller: tuple[RunningServer, openai.OpenAI]) -> None:
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"properties": {"a": {"contains": {}}}}}}
    status, _, said = caller[0].send("POST", CHAT, {"messages": QUESTION, "tools": [NOW, tool]})
    assert (status, said["error"]["param"]) == (400, "tools.1.function.parameters.properties.a")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}, "tools": [ADD], "parallel_tool_calls": True, "tool_choice": "auto"}, None),
        ({"tools": [STRICT_ADD], "tool_choice": "none"}, None),
        ({"tools": [ADD, NOW]}, None),
        ({"tools": [ADD, STRICT_ADD]}, (None, 2, False, False)),
        ({"tools": [ADD, NOW], "parallel_tool_calls": False}, (None, 2, False, True)),
        ({"tools": [ADD, NOW], "tool_choice": "required"}, (None, 2, True, False)),
        ({"tools": [ADD, NOW], "tool_choice": {"type": "function", "function": {"name": "now"}}}, (None, 1, True, True)),
        ({"tools": [ADD], "response_format": {"type": "json_object"}}, ('{"type": "object"}', 1, False, False)),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"b": 1, "a": 2}}}},
         ('{"b": 1, "a": 2}', 0, False, False)),
        ({"parallel_tool_calls": False}, None),
    ],
)  # fmt: skip
def test_what_is_asked_for(fields: dict[str, Any], expected: Any) -> None:
    found = answer_format(parse(ChatBody, {"messages": QUESTION} | fields))
    assert found == expected or (
        isinstance(found, AnswerFormat) and (found.schema, len(found.tools), found.calls_required, found.one_call) == expected
    )


def test_a_choice_of_no_tool() -> None:
    choice = {"type": "function", "function": {"name": "sub"}}
    with pytest.raises(FieldError, match=r'tool_choice\.function\.name is "sub", which is none of the tools'):
        answer_format(parse(ChatBody, {"messages": QUESTION, "tools": [ADD], "tool_choice": choice}))


def test_formats_hold_only_each_other_up(demo: tuple[RunningServer, openai.OpenAI]) -> None:
    """Making a grammar may take a second, of a schema that is short."""
    running, go = demo[0], threading.Event()
    running.engine_thread._formats.submit(go.wait, GENEROUS)
    body = {"messages": QUESTION, "max_tokens": 2}
    held = running.start(CHAT, body | {"response_format": {"type": "json_object"}})
    await_that(lambda: running.engine_thread._preparing == 1 and not running.engine_thread._answers, "it waits")
    for _ in range(3):
        assert running.send("POST", CHAT, body)[0] == 200
    assert running.engine_thread._preparing == 1
    go.set()
    assert held.recv(100).startswith(b"HTTP/1.1 200 ")
    held.close()


def test_without_the_library(demo: tuple[RunningServer, openai.OpenAI], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    status, _, said = demo[0].send("POST", CHAT, {"messages": QUESTION, "response_format": {"type": "json_object"}})
    assert status == 501 and "needs llguidance" in said["error"]["message"]
