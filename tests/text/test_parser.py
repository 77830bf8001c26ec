"""Reasoning, content and tool calls out of an answer's text, however it is cut into pieces."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import BOS, EOS, VOCAB_SIZE, real_folder

from core.sampling_params import SamplingParams
from engine.request import Request, TokenEvent
from text import parser as chat
from text.chat_format import ChatFormat, tool_style
from text.parser import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    KIMI,
    SEPARATOR,
    ChatParser,
    Content,
    Piece,
    Reasoning,
    ToolCallArguments,
    ToolCallStart,
)
from text.tokenizer import Tokenizer

FENCE = "```"
V3_CALL = f"{CALL_BEGIN}function{SEPARATOR}%s\n```json\n%s\n```{CALL_END}"
V31_CALL = f"{CALL_BEGIN}%s{SEPARATOR}%s{CALL_END}"
KIMI_CALL = f"{KIMI.call_begin}functions.%s:0{KIMI.separator}%s{KIMI.call_end}"

# Templates in the forms of R1-0528 and V3.1; V3's own comes with its tokenizer.
R1_TEMPLATE = """
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ '<｜User｜>' ~ m.content ~ '<｜Assistant｜>' }}
    {%- elif m.role == 'tool' %}{{ '<｜tool▁output▁begin｜>' ~ m.content ~ '<｜tool▁output▁end｜>' }}
    {%- else %}
        {{- m.content or '' }}
        {%- for call in m.tool_calls or [] %}
            {{- '<｜tool▁calls▁begin｜>' if loop.first else '\n' }}
            {{- '<｜tool▁call▁begin｜>' ~ call.type ~ '<｜tool▁sep｜>' ~ call.function.name }}
            {{- '\n```json\n' ~ call.function.arguments ~ '\n```<｜tool▁call▁end｜>' }}
            {{- '<｜tool▁calls▁end｜>' if loop.last else '' }}
        {%- endfor %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}"""
V31_TEMPLATE = """
{{- bos_token }}
{%- if tools %}{{ 'Tools:\n```json\n' ~ tools|tojson ~ '\n```\n' }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ '<｜User｜>' ~ m.content ~ '<｜Assistant｜></think>' }}
    {%- elif m.role == 'tool' %}{{ '<｜tool▁output▁begin｜>' ~ m.content ~ '<｜tool▁output▁end｜>' }}
    {%- else %}
        {{- m.content or '' }}
        {%- for call in m.tool_calls or [] %}
            {{- '<｜tool▁calls▁begin｜>' if loop.first else '' }}
            {{- '<｜tool▁call▁begin｜>' ~ call.function.name ~ '<｜tool▁sep｜>' ~ call.function.arguments }}
            {{- '<｜tool▁call▁end｜>' ~ ('<｜tool▁calls▁end｜>' if loop.last else '') }}
        {%- endfor %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}"""
# As templates that offer tools are written for R1-0528 and V3: arguments through a filter, no answer without content.
R1_TOOLS_TEMPLATE = R1_TEMPLATE.replace("call.function.arguments", "(call.function.arguments | tojson)").replace(
    "m.content or ''", "m.content.split('</think>')[-1] if '</think>' in m.content else m.content"
)  # fmt: skip


def v3_template() -> str:
    return json.loads((real_folder() / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]


MARKERS = (chat.THINK, chat.THINK_END, "<｜User｜>", CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR,
           KIMI.calls_begin, KIMI.calls_end, KIMI.call_begin, KIMI.call_end, KIMI.separator)  # fmt: skip


def tokens(text: str) -> list[tuple[str, bool]]:
    """(text, is_control): every marker a control token, and the text between two a piece."""
    return [(part, part in MARKERS) for part in re.split("(" + "|".join(map(re.escape, MARKERS)) + ")", text) if part]


def letters(text: str) -> list[tuple[str, bool]]:
    """The same with ordinary text a character at a time."""
    return [(piece, control) for part, control in tokens(text) for piece in ([part] if control else part)]


def push(parser: ChatParser, text: str) -> list[Piece]:
    return [piece for token in tokens(text) for piece in parser.push(*token)]


def parse(
    pieces: list[tuple[str, bool]], style: str | None = "v3", thinking: bool = False, tools: bool = True
) -> list[Piece]:
    parser = ChatParser(style, thinking, tools)
    return [piece for token in pieces for piece in parser.push(*token)] + parser.finish()


def joined(pieces: list[Piece]) -> tuple[str, str, list[tuple[str, str]]]:
    """(reasoning, content, [(name, arguments)]) of pieces, which must be in order and none of them empty."""
    reasoning = content = ""
    calls: list[tuple[str, str]] = []
    ids = []
    for piece in pieces:
        match piece:
            case Reasoning(text):
                assert text and not content and not calls
                reasoning += text
            case Content(text):
                assert text
                content += text
            case ToolCallStart(index, id, name):
                assert index == len(calls) and id.startswith(("call_", f"functions.{name}:", f"{name}:"))
                ids.append(id)
                calls.append((name, ""))
            case ToolCallArguments(index, text):
                assert text and index == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + text)
    assert len(set(ids)) == len(ids)
    return reasoning, content, calls


WEATHER, TIME = ("get_weather", '{"city": "Zürich"}'), ("time.now-1", '{"zone": "CET", "code": "```js\\n1 < 2```"}')
WRONG_FENCES = [
    f"{CALL_BEGIN}{head}{CALL_END}"
    for name, arguments in (WEATHER,)
    for head in (
        f"function{SEPARATOR}{name}\n```\n{arguments}\n```",
        f"function{SEPARATOR}{name}\n```JSON\n{arguments}\n```",
        f"function{SEPARATOR}{name}\n````json\n{arguments}\n````",
        f"function{SEPARATOR}{name}\n{arguments}",
        f"function{SEPARATOR}{name}\n{arguments}\n```",
        f"function{SEPARATOR}{name}{arguments}",
        f"function{SEPARATOR}{name} ```json {arguments} ```",
        f"{SEPARATOR}{name}\n```json\n{arguments}\n```",
        f"{name}{SEPARATOR}{arguments}",
        f"{name}{SEPARATOR}\n```json\n{arguments}\n```",
        f"{name}{SEPARATOR}```\n{arguments}\n```",
    )
]
CASES: list[tuple[str, bool, str, tuple[str, str, list[tuple[str, str]]]]] = [
    # calls as the models write them
    ("v3", False, f"{CALLS_BEGIN}{V3_CALL % WEATHER}{CALLS_END}", ("", "", [WEATHER])),
    ("v3", False, f"{CALLS_BEGIN}{V3_CALL % WEATHER}\n{V3_CALL % TIME}{CALLS_END}", ("", "", [WEATHER, TIME])),
    ("v3", False, f"Let me see.{CALLS_BEGIN}{V3_CALL % WEATHER}{CALLS_END}", ("", "Let me see.", [WEATHER])),
    ("v3", True, f"\nHm.\n</think>\n\n{CALLS_BEGIN}{V3_CALL % WEATHER}{CALLS_END}", ("Hm.", "", [WEATHER])),
    ("v3", False, f"<think>\nHm.\n</think>\nSo:{CALLS_BEGIN}{V3_CALL % TIME}", ("Hm.", "So:", [TIME])),
    ("v3.1", False, f"{CALLS_BEGIN}{V31_CALL % WEATHER}{V31_CALL % TIME}{CALLS_END}", ("", "", [WEATHER, TIME])),
    ("v3.1", True, f"Hm.</think>So:{CALLS_BEGIN}{V31_CALL % TIME}{CALLS_END}", ("Hm.", "So:", [TIME])),
    ("kimi", False, f"Let me see.{KIMI.calls_begin}{KIMI_CALL % WEATHER}{KIMI_CALL % TIME}{KIMI.calls_end}", ("", "Let me see.", [WEATHER, TIME])),
    ("kimi", True, f"Hm.</think>{KIMI.calls_begin}{KIMI_CALL % WEATHER}{KIMI.calls_end} So.", ("Hm.", "So.", [WEATHER])),
    # other layouts that are understood
    ("kimi", False, f"{KIMI.calls_begin}\n{KIMI.call_begin} f:12 {KIMI.separator} {{}} {KIMI.call_end}\n{KIMI.calls_end}\n", ("", "", [("f", "{}")])),
    ("kimi", False, KIMI_CALL % ("f", "```json\n{}\n```"), ("", "", [("f", "```json\n{}\n```")])),
    ("kimi", False, f"{KIMI.call_begin}functions.f:0{KIMI.separator}{{}}{KIMI_CALL % TIME}{KIMI.calls_end}", ("", "", [("f", "{}"), TIME])),
    ("kimi", False, f"{KIMI.call_begin}f{KIMI.separator}{{}}{KIMI.call_end}", ("", "f{}", [])),
    ("kimi", False, f"{V31_CALL % TIME}", ("", "".join(TIME), [])),
    ("v3.1", False, KIMI_CALL % TIME, ("", "functions.time.now-1:0" + TIME[1], [])),
    ("v3", False, f"{V3_CALL % WEATHER} and more", ("", "and more", [WEATHER])),
    ("v3", False, f"{CALLS_BEGIN}\n{CALL_BEGIN} {SEPARATOR} f ```json{{}}```\n{CALL_END}\n{CALLS_END}\n", ("", "", [("f", "{}")])),
    ("v3.1", False, f"{CALLS_BEGIN}\n{CALL_BEGIN}\nf\n{SEPARATOR}\n{{}}\n{CALL_END}\n\n{CALLS_END} x", ("", "x", [("f", "{}")])),
    ("v3.1", False, V31_CALL % ("f", "```json\n{}\n```"), ("", "", [("f", "{}")])),
    # whatever is in the arguments is handed out
    ("v3", False, V3_CALL % ("f", '{"a": "```"} ```'), ("", "", [("f", '{"a": "```"} ```')])),
    ("v3", False, V3_CALL % ("f", "no JSON <｜tool▁sep｜> <think> `"), ("", "", [("f", "no JSON <｜tool▁sep｜> <think> `")])),
    ("v3", False, V3_CALL % ("f", ""), ("", "", [("f", "{}")])),
    ("v3", False, f"{CALL_BEGIN}function{SEPARATOR}f{CALL_END}", ("", "", [("f", "{}")])),
    ("v3", False, f"{CALL_BEGIN}function{SEPARATOR}f\n```json\n```{CALL_END}", ("", "", [("f", "{}")])),
    ("v3.1", False, V31_CALL % ("f", "Paris"), ("", "", [("f", "Paris")])),
    ("v3.1", False, V31_CALL % ("f", '"```"'), ("", "", [("f", '"```"')])),
    ("v3.1", False, V31_CALL % ("f", "{} ```"), ("", "", [("f", "{}")])),
    ("v3.1", False, V31_CALL % ("f", ""), ("", "", [("f", "{}")])),
    ("kimi", False, KIMI_CALL % ("f", ""), ("", "", [("f", "{}")])),
    # one model's form from another, and fences that are not quite one
    *((style, False, f"{CALLS_BEGIN}{call}{CALLS_END}", ("", "", [WEATHER])) for style in ("v3", "v3.1") for call in WRONG_FENCES),
    ("v3", False, f"{CALLS_BEGIN}{V31_CALL % WEATHER}\n{V3_CALL % TIME}{CALLS_END}", ("", "", [WEATHER, TIME])),
    ("v3.1", False, f"{CALLS_BEGIN}{V3_CALL % WEATHER}{V31_CALL % TIME}{CALLS_END}", ("", "", [WEATHER, TIME])),
    ("v3.1", False, V31_CALL % ("function", '{"a": 1}'), ("", "", [("function", '{"a": 1}')])),
    ("v3.1", False, V31_CALL % ("function", '```json\n{"a": 1}\n```'), ("", "", [("function", '{"a": 1}')])),
    ("v3.1", False, V31_CALL % ("functional", "Paris"), ("", "", [("functional", "Paris")])),
    # a call that begins before </think>
    ("v3", True, f"Hm.\n{CALLS_BEGIN}{V3_CALL % WEATHER}{CALLS_END}", ("Hm.", "", [WEATHER])),
    ("v3.1", True, f"Hm.{CALLS_BEGIN}{V31_CALL % WEATHER}{CALLS_END}</think>\nSo.", ("Hm.", "So.", [WEATHER])),
    ("v3.1", True, f"{V31_CALL % WEATHER}{V31_CALL % TIME}", ("", "", [WEATHER, TIME])),
    ("kimi", True, f"Hm.{KIMI.calls_begin}{KIMI_CALL % WEATHER}{KIMI.calls_end}", ("Hm.", "", [WEATHER])),
    ("v3", True, f"Hm,\n{CALL_BEGIN}I could{CALL_END} ask.\n</think>So.", ("Hm,\nI could ask.", "So.", [])),
    # control tokens are never content or reasoning
    ("v3", False, f"a<｜User｜>b<think>c{CALL_END}d</think>\n\ne", ("", "abcde", [])),
    ("v3", True, "a<｜User｜>b<think>c</think>d", ("abc", "d", [])),
    # calls that are not closed
    ("v3", False, f"{CALL_BEGIN}function{SEPARATOR}f\n```json\n{{\"a\": ", ("", "", [("f", '{"a":')])),
    ("v3", False, f"{CALL_BEGIN}function{SEPARATOR}f\n```json\n{{}}\n``", ("", "", [("f", "{}\n``")])),
    ("v3", False, f"{CALL_BEGIN}function{SEPARATOR}f\n```json\n{{}}\n```<｜tool", ("", "", [("f", "{}\n```<｜tool")])),
    ("v3", False, f"{CALL_BEGIN}function{SEPARATOR}f\n```json\n{{}}\n```{CALLS_END}", ("", "", [("f", "{}")])),
    ("v3", False, f"{CALL_BEGIN}function{SEPARATOR}f\n```json\n{{}}{V3_CALL % TIME}", ("", "", [("f", "{}"), TIME])),
    ("v3.1", False, f"{CALL_BEGIN}f{SEPARATOR}{{}}{V31_CALL % TIME}{CALLS_END}", ("", "", [("f", "{}"), TIME])),
    # what is no call is content
    ("v3", False, f"{CALLS_BEGIN}{CALL_BEGIN}f {{}}{CALL_END}{CALLS_END}", ("", "f {}", [])),
    ("v3", False, f"{CALL_BEGIN}{SEPARATOR} \n```json\n1", ("", " \n```json\n1", [])),
    ("v3", False, f"{CALL_BEGIN}query{SEPARATOR}f\n```json\n{{}}", ("", "queryf\n```json\n{}", [])),
    ("v3", False, f"{CALL_BEGIN}oh {V3_CALL % TIME}", ("", "oh ", [TIME])),
    ("v3", False, f"{CALL_BEGIN}{'x' * 600}{V3_CALL % TIME}", ("", "x" * 600, [TIME])),
    ("v3", False, V3_CALL % ("x" * 600, "{}"), ("", f"function{'x' * 600}\n```json\n{{}}\n```", [])),
    ("v3.1", False, f"{CALL_BEGIN}f{CALLS_END}", ("", "f", [])),
    ("v3.1", False, f"{CALL_BEGIN}\n{SEPARATOR}{{}}{CALL_END}", ("", "\n{}", [])),
    ("v3.1", False, f"a {CALLS_BEGIN} b {V31_CALL % TIME} c {V31_CALL % TIME}", ("", "a b c ", [TIME, TIME])),
    ("v3.1", False, f"a {CALLS_END} {CALL_END} {SEPARATOR} <｜tool", ("", "a    <｜tool", [])),
    # reasoning
    ("v3", True, f"{V3_CALL % TIME}", ("", "", [TIME])),
    ("v3", False, " <think>a</think>", ("", " a", [])),
    ("v3", False, "<think", ("", "<think", [])),
    ("v3", True, "<think>\n\na\n\n</think></think>\n", ("a", "", [])),
    ("v3", True, "\n\n", ("", "", [])),
    ("v3", True, "a\n</thin", ("a\n</thin", "", [])),
]  # fmt: skip


@pytest.mark.parametrize("style, thinking, text, expected", CASES)
def test_examples(style: str, thinking: bool, text: str, expected: Any) -> None:
    assert joined(parse(tokens(text), style, thinking)) == expected
    assert joined(parse(letters(text), style, thinking)) == expected
    for at in range(len(letters(text))):
        first, second = letters(text)[:at], letters(text)[at:]
        assert joined(parse(merged(first) + merged(second), style, thinking)) == expected


def merged(pieces: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    return tokens("".join(text for text, _ in pieces))


@pytest.mark.parametrize("style, thinking, text, expected", CASES)
def test_spelled_markers_are_text(style: str, thinking: bool, text: str, expected: Any) -> None:
    """Letter by letter or whole: a user may have written them, and the model have said it again."""
    kind = Reasoning if thinking else Content
    for pieces in ([(text, False)], [(piece, False) for piece, _ in tokens(text)], [(letter, False) for letter in text]):
        said = parse(pieces, style, thinking)
        assert all(isinstance(piece, kind) for piece in said)
        assert "".join(piece.text for piece in said) == (text.strip("\n") if thinking else text)


def test_arguments_are_handed_out_as_they_come() -> None:
    parser = ChatParser("v3", thinking=False, tools=True)
    assert push(parser, f"Well {CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}f\n```json\n") == [Content("Well ")]
    start, arguments = push(parser, '{"a"')
    assert isinstance(start, ToolCallStart) and (start.index, start.name) == (0, "f")
    assert arguments == ToolCallArguments(0, '{"a"')
    assert push(parser, ": 1\n") == [ToolCallArguments(0, ": 1")]
    assert push(parser, "``") == []
    assert push(parser, "`") == []
    assert push(parser, " }") == [ToolCallArguments(0, "\n``` }")]
    assert push(parser, f"\n```{CALL_END}") == []
    assert parser.finish() == []


def test_calls_that_are_cut() -> None:
    """At any character of an answer that is one call: whether it ends within it. Its last line end and fence may lack."""
    for style, call in (("v3", V3_CALL % WEATHER), ("v3.1", V31_CALL % WEATHER), ("kimi", KIMI_CALL % WEATHER)):
        parser, said, cut = ChatParser(style, False, True), "", []
        for text, is_control in letters(f"So.{call}"):
            parser.push(text, is_control)
            said += text
            cut.append(parser.is_cut)
        begins, ends = len("So."), said.index(WEATHER[1]) + len(WEATHER[1])
        whole = [len("".join(text for text, _ in letters(f"So.{call}")[: i + 1])) for i in range(len(cut))]
        assert cut == [begins < n < ends for n in whole], style


def test_nothing_is_held_back_without_need() -> None:
    for thinking, kind in ((False, Content), (True, Reasoning)):
        parser = ChatParser("v3", thinking, tools=True)
        texts = ("a", " <b", " <", "<", "｜tool", "\n")
        assert [push(parser, text) for text in texts[:-1]] == [[kind(text)] for text in texts[:-1]]
        assert push(parser, texts[-1]) == ([] if thinking else [Content("\n")]), "it may be layout before </think>"


def test_what_is_no_call_is_content_as_soon_as_that_is_known() -> None:
    parser = ChatParser("v3", thinking=False, tools=True)
    assert push(parser, f"{CALL_BEGIN}Hello") == []
    assert push(parser, f"{CALL_BEGIN}") == [Content("Hello")]
    assert push(parser, "x" * 511) == []
    assert push(parser, "x") == [Content("x" * 512)]


def test_without_tools_a_calls_text_is_content_and_its_markers_are_nothing() -> None:
    text, name, arguments = f"x{CALLS_BEGIN}{V3_CALL % TIME}{CALLS_END}", *TIME
    for said in (parse(tokens(text), None, tools=True), parse(tokens(text), "v3", tools=False)):
        assert joined(said) == ("", f"xfunction{name}\n```json\n{arguments}\n```", [])
    assert joined(parse(tokens(text), "v3", thinking=True, tools=False))[1:] == ("", [])
    with pytest.raises(ValueError, match=r"tool style 'v4', expected one of v3, v3\.1, kimi or None"):
        ChatParser("v4", thinking=False, tools=True)


PARTS = [
    *(*MARKERS, FENCE, "```json", "function"),
    *("get_weather", "\n", " ", '{"a": 1}', "{", '"', "`", "<", "<｜", "é", "word", f"{CALL_BEGIN}function{SEPARATOR}f\n```json\n"),
    *(V3_CALL % WEATHER, V31_CALL % TIME, KIMI_CALL % TIME, "functions.f:3"),
]  # fmt: skip
texts = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=14).map("".join)


@settings(deadline=None, derandomize=True, database=None, max_examples=300)
@given(text=texts, style=st.sampled_from([None, "v3", "v3.1", "kimi"]), thinking=st.booleans(), draw=st.randoms())
def test_every_split_says_the_same(text: str, style: str | None, thinking: bool, draw: random.Random) -> None:
    whole = joined(parse(tokens(text), style, thinking))
    pieces = letters(text)
    assert joined(parse(pieces, style, thinking)) == whole
    cuts = sorted(draw.sample(range(len(pieces) + 1), min(len(pieces), draw.randrange(4))))
    parts = [pieces[a:b] for a, b in zip([0, *cuts], [*cuts, len(pieces)], strict=True)]
    assert joined(parse([token for part in parts for token in merged(part)], style, thinking)) == whole


@settings(deadline=None, derandomize=True, database=None, max_examples=300)
@given(text=texts, style=st.sampled_from(["v3", "v3.1"]))
def test_nothing_is_lost(text: str, style: str) -> None:
    """Every character comes out, in order, but for markers, fences, a call's type and whitespace."""
    said = "".join(piece.name if isinstance(piece, ToolCallStart) else piece.text for piece in parse(tokens(text), style))

    def bare(text: str) -> str:
        for layout in (*MARKERS, "`", "json"):
            text = text.replace(layout, "")
        text = "".join(text.split()).replace("function", "")
        while "{}" in text:  # stands for no arguments as well
            text = text.replace("{}", "")
        return text

    assert bare(said) == bare(text)


@settings(deadline=None, derandomize=True, database=None, max_examples=300)
@given(text=texts, thinking=st.booleans())
def test_reasoning_is_that_of_the_engine(text: str, thinking: bool) -> None:
    events = [TokenEvent(0, part, control) for part, control in tokens(text)]
    request = Request(0, [], SamplingParams(), events=events, opens_thinking=thinking, chat=ChatFormat())
    reasoning, content, _ = joined(parse(letters(text), None, thinking))
    assert (reasoning, content) == (request.parts[0] or "", request.parts[1])


@pytest.mark.parametrize("template, style", [(v3_template(), "v3"), (R1_TEMPLATE, "v3"), (R1_TOOLS_TEMPLATE, "v3"), (V31_TEMPLATE, "v3.1")])
def test_round_trip_through_templates(template: str, style: str, tmp_path: Path) -> None:
    """What a template writes for an earlier turn's calls is what the model was taught to say; read from token ids."""
    assert tool_style(template) == style
    (tmp_path / "tokenizer.json").symlink_to(real_folder() / "tokenizer.json")
    settings = {"bos_token": BOS, "eos_token": EOS, "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.from_pretrained(tmp_path, VOCAB_SIZE)
    question = {"role": "user", "content": "What is the weather?"}
    tools = [{"type": "function", "function": {"name": name, "arguments": text}} for name, text in (WEATHER, TIME)]
    for content, calls in ((None, tools[:1]), ("Let me see.", tools)):
        answer = {"role": "assistant", "content": content, "tool_calls": calls}
        asked = tokenizer.encode_chat([question], add_generation_prompt=True)
        ids = tokenizer.encode_chat([question, answer], add_generation_prompt=False)
        assert ids[: len(asked)] == asked
        stream, parser, pieces = tokenizer.stream(), ChatParser(style, thinking=False, tools=True), []
        for token in ids[len(asked) :]:
            pieces += parser.push(stream.push(token), tokenizer.is_control(token))
        pieces += parser.push(stream.finish(), False) + parser.finish()
        assert joined(pieces) == ("", content or "", [WEATHER, TIME][: len(calls)])


def test_calls_keep_the_ids_that_kimi_gives_them(tmp_path: Path) -> None:
    """They are numbered through a conversation, and a later turn has them again."""
    from test_vocabulary import ALPHABET, KIMI_TEMPLATE, write_tiktoken

    assert tool_style(KIMI_TEMPLATE) == "kimi"
    tokenizer = Tokenizer(write_tiktoken(tmp_path, ALPHABET))
    calls = [{"id": f"functions.{name}:{i}", "type": "function", "function": {"name": name, "arguments": text}}
             for i, (name, text) in enumerate((WEATHER, TIME), 3)]  # fmt: skip
    question = [{"role": "user", "content": "What is the weather?"}]
    asked = tokenizer.encode_chat(question)
    ids = tokenizer.encode_chat([*question, {"role": "assistant", "content": "So.", "tool_calls": calls}], add_generation_prompt=False)
    assert ids[: len(asked)] == asked
    stream, parser, pieces = tokenizer.stream(), ChatParser("kimi", thinking=False, tools=True), []
    for token in ids[len(asked) : ids.index(tokenizer.eos_ids[0], len(asked))]:
        pieces += parser.push(stream.push(token), tokenizer.is_control(token))
    pieces += parser.finish()
    assert joined(pieces) == ("", "So.", [WEATHER, TIME])
    assert [piece.id for piece in pieces if isinstance(piece, ToolCallStart)] == [call["id"] for call in calls]


def test_no_two_calls_have_one_id() -> None:
    pieces = parse(tokens(KIMI_CALL % ("f", "{}") * 2), "kimi")
    first, second = (piece.id for piece in pieces if isinstance(piece, ToolCallStart))
    assert first == "functions.f:0" and second.startswith("call_")


def test_templates_without_tools() -> None:
    demo = Path(__file__).parents[2] / "demo" / "checkpoint" / "tokenizer_config.json"
    assert tool_style(json.loads(demo.read_text(encoding="utf-8"))["chat_template"]) is None
