"""GLM's calls: the arguments' object is what the model wrote, however its text is cut; and what is no call."""

import json
import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.lanes import decode_request, encode_request
from engine.request import Request, SamplingParams
from text.chat_format import ChatFormat, tool_style
from text.keyed_calls import GLM, KEY, KEY_END, VALUE, VALUE_END, text_parameters
from text.parser import Content, Piece, Reasoning, ToolCallArguments, ToolCallStart

CONTROL = ("<think>", "</think>", "<|user|>", GLM.call_begin, GLM.call_end, KEY, KEY_END, VALUE, VALUE_END)
SCHEMA: dict[str, Any] = {"type": "object", "properties": {
    "city": {"type": "string"}, "unit": {"enum": ["C", "F"]}, "days": {"type": "integer"}, "tags": {"type": "array"}, "any": {},
    "odd": {"enum": ["1", 1]}, "none": {"enum": []}, "flag": True}}  # fmt: skip
TEXTS = text_parameters([("weather", SCHEMA), ("bare", {}), ("wrong", {"properties": [1]})])


def call(name: str, **pairs: str) -> str:
    return GLM.call_begin + name + "".join(f"{KEY}{key}{KEY_END}{VALUE}{value}{VALUE_END}" for key, value in pairs.items()) + GLM.call_end


def pieces_of(text: str, thinking: bool = False, tools: bool = True, sizes: random.Random | None = None) -> tuple[list[Piece], bool]:
    """Pieces of an answer in which each of CONTROL is a control token, and whether it is cut within a call."""
    parser = ChatFormat("glm", tools, TEXTS).parser(thinking)
    found: list[Piece] = []
    for run in re.split("(" + "|".join(map(re.escape, CONTROL)) + ")", text):
        while run:
            n = len(run) if run in CONTROL or sizes is None else sizes.randint(1, 3)
            found += parser.push(run[:n], run in CONTROL)
            run = run[n:] if run not in CONTROL else ""
    cut = parser.is_cut
    return found + parser.finish(), cut


def read(text: str, **how: Any) -> tuple[str, str, list[tuple[str, str]]]:
    """(reasoning, content, (name, arguments) of each call)."""
    said, calls = {Reasoning: "", Content: ""}, list[list[str]]()
    for piece in pieces_of(text, **how)[0]:
        if isinstance(piece, ToolCallStart):
            assert piece.index == len(calls) and piece.id.startswith("call_")
            calls.append([piece.name, ""])
        elif isinstance(piece, ToolCallArguments):
            assert piece.index == len(calls) - 1
            calls[-1][1] += piece.text
        else:
            said[type(piece)] += piece.text
    return said[Reasoning], said[Content], [(name, arguments) for name, arguments in calls]


def test_which_parameters_are_text() -> None:
    assert TEXTS == (("weather", "city"), ("weather", "unit"))


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_released_forms(seed: int | None) -> None:
    """GLM-4.7's on one line and GLM-4.5's over lines; several calls; none of arguments; behind reasoning and text."""
    sizes = None if seed is None else random.Random(seed)
    one = call("weather", city='St. "John\'s"\n', days="3", tags='["a", 1]', unit="C")
    arguments = {"city": 'St. "John\'s"\n', "days": 3, "tags": ["a", 1], "unit": "C"}
    reasoning, content, [(name, found)] = read(f"Hm.</think>I look.{one}", thinking=True, sizes=sizes)
    assert (reasoning, content, name, json.loads(found)) == ("Hm.", "I look.", "weather", arguments)
    lines = f"{GLM.call_begin}weather\n{KEY}city{KEY_END}\n{VALUE}Rome{VALUE_END}\n{KEY}days{KEY_END}\n{VALUE}2{VALUE_END}\n{GLM.call_end}"
    _, content, calls = read(f"\n{lines}\n{call('now')}", sizes=sizes)
    assert [(name, json.loads(found)) for name, found in calls] == [("weather", {"city": "Rome", "days": 2}), ("now", {})]
    assert not content.strip()


@pytest.mark.parametrize(
    ("written", "value"),
    [("12", 12), ("-1.5e3", -1500.0), ("true", True), ("null", None), ('{"a": [1]}', {"a": [1]}), ('"12"', "12"), ("12 days", "12 days"),
     ("", ""), ("NaN", "NaN"), ("[1,", "[1,"), ("[" * 10_000, "[" * 10_000), (" Rome ", " Rome "), ("é\u2028🙂", "é\u2028🙂")],
    ids=lambda value: str(value)[:12],
)  # fmt: skip
def test_a_value_is_json_where_it_is(written: str, value: Any) -> None:
    """Without a schema that says string; with one it is text whatever it looks like."""
    assert json.loads(read(call("weather", any=written))[2][0][1]) == {"any": value}
    assert json.loads(read(call("weather", city=written))[2][0][1]) == {"city": written}
    assert json.loads(read(call("other", city=written))[2][0][1]) == {"city": value}


def test_text_comes_as_it_is_written() -> None:
    parser = ChatFormat("glm", True, TEXTS).parser(False)
    for piece in (GLM.call_begin, "weather", KEY, "city", KEY_END, VALUE):
        parser.push(piece, piece in CONTROL)
    assert parser.push('Ro"', False) == [ToolCallArguments(0, 'Ro\\"')] and parser.is_cut


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"a{GLM.call_begin}", "a", []),
        (f"a{GLM.call_begin}two words{KEY}x", "atwo wordsx", []),
        (f"{GLM.call_begin}{GLM.call_end}b", "b", []),
        (f"{GLM.call_begin}{GLM.call_begin}f{GLM.call_end}", "", [("f", "{}")]),
        (f"{GLM.call_begin}f{GLM.call_begin}g{GLM.call_end}", "f", [("g", "{}")]),
        (f"{GLM.call_begin}" + "x" * 600, "x" * 600, []),
        (f"{GLM.call_begin}f{KEY}a{VALUE}1{KEY}b{KEY_END}{VALUE}2{GLM.call_end}x", "x", [("f", '{"a": 1, "b": 2}')]),
        (f"{GLM.call_begin}f{KEY}a{KEY_END}{VALUE}1{GLM.call_begin}g{GLM.call_end}", "", [("f", '{"a": 1}'), ("g", "{}")]),
        (f"{GLM.call_begin}f{KEY}a{KEY_END}{VALUE}1{VALUE_END}", "", [("f", '{"a": 1}')]),
        (f"x{KEY}y{VALUE_END}z{GLM.call_end}", "xyz", []),
        ("".join(f"<{c}>" for c in ("tool", "x")), "<tool><x>", []),
    ],
)  # fmt: skip
def test_what_is_not_quite_a_call(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read(text)[1:] == (content, calls)


def test_cut_and_without_tools() -> None:
    whole = call("f", a="1")
    for text, cut in ((whole, False), (whole[: -len(GLM.call_end)], False), (f"{GLM.call_begin}f{KEY}a{KEY_END}{VALUE}1", True),
                      (f"{GLM.call_begin}f", True), (f"{GLM.call_begin}f{KEY}a", True), ("x", False)):  # fmt: skip
        assert pieces_of(text)[1] is cut, text
    assert read(f"a{whole}", tools=False) == ("", "afa1", [])
    assert read(f"Hm{whole}x", thinking=True)[::2] == ("Hm", [("f", '{"a": 1}')]), "it ends the reasoning"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*CONTROL, "f", "weather", "city", "1", '"', "\n", " ", "{", "é"]), max_size=25), st.randoms(), st.booleans())
def test_whatever_a_model_writes(parts: list[str], sizes: random.Random, thinking: bool) -> None:
    """However it is cut the same comes of it; no control token is content; a call that is not cut has an object."""
    text = "".join(parts)
    reasoning, content, calls = read(text, thinking=thinking)
    assert read(text, thinking=thinking, sizes=sizes) == (reasoning, content, calls)
    assert not any(token in reasoning + content for token in CONTROL)
    cut = pieces_of(text, thinking)[1]
    for name, arguments in calls[: len(calls) - cut]:
        assert name and isinstance(json.loads(arguments), dict)


def test_the_style_and_what_lanes_are_told() -> None:
    template = "For each call: <tool_call>{name}<arg_key>{k}</arg_key><arg_value>{v}</arg_value></tool_call>"
    assert tool_style(template) == "glm" and tool_style("<tool_call>{}</tool_call>") is None
    request = Request(0, [1], SamplingParams(), 0)
    request.chat = ChatFormat("glm", True, TEXTS)
    told = decode_request(encode_request(request), [1], None)
    assert told.chat is not None
    parser = told.chat.parser(False)
    pieces = [p for part in (GLM.call_begin, "weather", KEY, "city", KEY_END, VALUE, "1", VALUE_END) for p in parser.push(part, part in CONTROL)]
    assert "".join(p.text for p in pieces if isinstance(p, ToolCallArguments)) == '{"city": "1"'
