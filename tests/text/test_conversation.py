"""Conversations as templates get them: results in the calls' order, answers gone on with, and nothing left out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_parser import R1_TOOLS_TEMPLATE, V31_TEMPLATE
from test_tokenizer import R1, V2, V31, VOCAB_SIZE, real_folder, small_with

from core.errors import UserError
from text.conversation import checked
from text.tokenizer import NoThinkingSwitch, Tokenizer

USER = {"role": "user", "content": "q"}
TOOL = {"type": "function", "function": {"name": "f"}}
# As V3.1's own template writes tools, with texts put together by `+`.
DESCRIBING = (
    "{{ bos_token }}{% for tool in tools or [] %}{{ '### ' + tool.function.name + '\\nDescription: ' + tool.function.description"
    " + '\\n\\nParameters: ' + (tool.function.parameters | tojson) + '\\n' }}{% endfor %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)


@pytest.fixture(scope="session")
def with_template(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Tokenizer]:
    """V3's tokenizer under a template, by default its own; each loaded once."""
    made: dict[str | None, Tokenizer] = {}

    def make(template: str | None) -> Tokenizer:
        if template not in made:
            folder = tmp_path_factory.mktemp("template")
            (folder / "tokenizer.json").symlink_to(real_folder() / "tokenizer.json")
            settings = json.loads((real_folder() / "tokenizer_config.json").read_text(encoding="utf-8"))
            settings |= {"add_bos_token": True} | ({} if template is None else {"chat_template": template})
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
            made[template] = Tokenizer.from_pretrained(folder, VOCAB_SIZE)
        return made[template]

    return make


def calls(*ids: str | None) -> dict[str, Any]:
    made = [{"type": "function", "function": {"name": f"f{i}", "arguments": "{}"}} | ({} if call_id is None else {"id": call_id})
            for i, call_id in enumerate(ids)]  # fmt: skip
    return {"role": "assistant", "content": None, "tool_calls": made}


def result(call_id: str | None, text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text} | ({} if call_id is None else {"tool_call_id": call_id})


# ---------------------------------------------------------------- results of tools


@pytest.mark.parametrize("template", [None, R1_TOOLS_TEMPLATE, V31_TEMPLATE])
def test_results_are_put_into_the_order_of_their_calls(template: str | None, with_template: Callable[[str | None], Tokenizer]) -> None:
    """They are rendered without their ids, so the order alone tells the model which is which."""
    tokenizer = with_template(template)
    ordered = [USER, calls("a", "b", "c"), result("a", "first"), result("b", "second"), result("c", "third")]
    mixed = [*ordered[:2], ordered[4], ordered[2], ordered[3]]
    assert tokenizer.encode_chat(mixed) == tokenizer.encode_chat(ordered)
    text = tokenizer.render_chat(mixed)
    assert text.index("first") < text.index("second") < text.index("third")
    again = [*mixed, {"role": "assistant", "content": "so"}, USER, calls("a", "d"), result("d", "5th"), result("a", "4th")]
    text = [message["content"] for message in checked(again) if message["role"] == "tool"]
    assert text == ["first", "second", "third", "4th", "5th"], "an id may come again in a later turn"


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([USER, result("a", "x")], "message 1: a tool's result, and no message with tool_calls precedes it"),
        ([USER, calls("a"), USER], "message 1: no tool message has the result of its tool call 'a'"),
        ([USER, calls("a", "b"), result("a", "x")], "message 1: no tool message has the result of its tool call 'b'"),
        ([USER, calls("a", "b"), result("a", "x"), USER, result("b", "y")], "no tool message has the result of its tool call 'b'"),
        ([USER, calls("a"), result("b", "x")], "message 2: message 1 has no tool call with the id 'b'"),
        ([USER, calls("a"), result("b" * 5000, "x")], "message 2: message 1 has no tool call with the id 'bbb"),
        ([USER, calls("a"), result(None, "x")], "message 2: a tool's result needs the tool_call_id of its call"),
        ([USER, calls("a"), result("", "x")], "message 2: a tool's result needs the tool_call_id of its call"),
        ([USER, calls("a"), result("a", "x"), result("a", "y")], "message 3: a second result of the tool call 'a'"),
        ([USER, calls(None), result("a", "x")], "message 1: tool call 0 has no id"),
        ([USER, calls("a", "a"), result("a", "x")], "message 1: two tool calls have the id 'a'"),
        ([USER, calls("a"), result("a", "x"), USER, result("a", "y")], "message 4: a tool's result, and no message"),
    ],
)  # fmt: skip
def test_results_that_belong_to_no_call(messages: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(UserError) as refused:
        checked(messages)
    assert says in str(refused.value) and len(str(refused.value)) < 200


# ---------------------------------------------------------------- what a template leaves out


def test_the_demos_template_knows_no_tools() -> None:
    demo = Tokenizer(Path(__file__).parents[2] / "demo" / "checkpoint")
    with pytest.raises(UserError, match="message 1: this checkpoint's chat template leaves out the call of 'f0'"):
        demo.encode_chat([USER, calls("a") | {"content": "x"}, result("a", "5")])
    assert demo.encode_chat([{"role": "system", "content": " "}, USER]), "nothing is left out of nothing"


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        ("{% for m in messages if m.role != 'tool' %}{{ m.content }}{{ m.tool_calls }}{% endfor %}",
         [USER, calls("a"), result("a", "q")], "message 2: this checkpoint's chat template leaves out what the tool says"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
         [{"role": "system", "content": "q"}, USER], "message 0: this checkpoint's chat template leaves out what the system says"),
        ("{% for m in messages %}{{ m.content[:20] }}{% endfor %}", [{"role": "user", "content": "x" * 99}], "what the user says"),
        ("{% for m in messages %}{{ m.content[-20:] }}{% endfor %}", [{"role": "user", "content": "x" * 99}], "what the user says"),
        ("{{ messages[-1].content }}", [USER, {"role": "assistant", "content": "q"}, USER], "message 0"),
        # a template that fails on any text but its own: then texts are looked for as they are
        ("{% for m in messages %}{% if m.content not in ('q', 'r') %}{{ raise_exception('no') }}{% endif %}{% endfor %}{{ messages[0].content }}",
         [USER, {"role": "user", "content": "r"}], "message 1: this checkpoint's chat template leaves out what the user says"),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_is_named(template: str, messages: list[dict[str, Any]], says: str, tmp_path: Path) -> None:
    tokenizer = small_with(tmp_path, template)
    with pytest.raises(UserError) as refused:
        tokenizer.encode_chat(messages)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content | trim }}{% endfor %}",
        "{% for m in messages %}{{ m.content | tojson }}{% endfor %}",
        "{{ messages | tojson(ensure_ascii=true) }}",
        "{{ messages | map(attribute='content') | join('|') | upper }}",
        "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}",
        "{% for m in messages | reverse %}{{ m.content | replace('é', 'e') }}{% endfor %}",
        "{% for m in messages %}{% if m.content == 'yes' %}{{ 'yes' }}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    ],
)
def test_what_a_template_reworks_is_not_left_out(template: str, tmp_path: Path) -> None:
    tokenizer = small_with(tmp_path, template)
    messages = [{"role": "user", "content": "  “né”\n "}, {"role": "assistant", "content": "hm</think>\n yes"}, {"role": "user", "content": "yes"}]
    assert tokenizer.encode_chat(messages)


def test_v3s_own_template_leaves_out_what_is_said_beside_later_calls(with_template: Callable[[str | None], Tokenizer]) -> None:
    first, second = calls("a") | {"content": "one"}, calls("b") | {"content": "two"}
    with pytest.raises(UserError, match="message 3: this checkpoint's chat template leaves out what the assistant says"):
        with_template(None).encode_chat([USER, first, result("a", "x"), second, result("b", "y")])


def test_a_tool_without_description_or_parameters(tmp_path: Path, with_template: Callable[[str | None], Tokenizer]) -> None:
    described = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}}
    tokenizer = small_with(tmp_path, DESCRIBING)
    assert tokenizer.render_chat([USER], tools=[TOOL]) == tokenizer.render_chat([USER], tools=[described])
    assert "### f\nDescription: \n\nParameters: {" in tokenizer.render_chat([USER], tools=[TOOL])
    assert json.dumps([TOOL], ensure_ascii=False) in with_template(V31_TEMPLATE).render_chat([USER], tools=[TOOL]), "as it came"


@pytest.mark.parametrize("arguments", ['{"a": "é", "b": 2}', {"a": "é", "b": 2}])
@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("{{ call.function.arguments }}", '{"a": "é", "b": 2}'),
        ("{{ call.function.arguments + '!' }}", '{"a": "é", "b": 2}!'),
        ("{{ call.function.arguments | tojson }}", '{"a": "é", "b": 2}'),
        ("{% for k, v in call.function.arguments.items() %}<{{ k }}={{ v }}>{% endfor %}", "<a=é><b=2>"),
    ],
)
def test_arguments_as_text_and_parsed(written: str, text: str, arguments: Any, tmp_path: Path) -> None:
    """Whichever a client sends and a template wants."""
    call = calls("a")
    call["tool_calls"][0]["function"]["arguments"] = arguments
    source = "{% for m in messages %}{{ m.content }}{% for call in m.tool_calls %}{{ call.function.name }}:" + written + "{% endfor %}{% endfor %}"
    assert small_with(tmp_path, source).render_chat([USER, call | {"content": "x"}, result("a", "y")]) == f"qxf0:{text}y"


# ---------------------------------------------------------------- the beginning of an answer


def begin(content: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "prefix": True, **fields}


@pytest.mark.parametrize("template", [None, V2, V31])
def test_an_answer_goes_on_from_its_beginning(template: str | None, with_template: Callable[[str | None], Tokenizer]) -> None:
    """The prompt is that of a new answer, and the text; a user's control tokens in it are text."""
    tokenizer = with_template(template)
    asked = tokenizer.render_chat([USER])
    assert tokenizer.render_chat([USER, begin("```python\n")]) == asked + "```python\n"
    ids = tokenizer.encode_chat([USER, begin("<｜User｜>x</think>")])
    own = [i for i in tokenizer.encode_chat([USER]) if tokenizer.is_control(i)]
    assert [i for i in ids if tokenizer.is_control(i)] == own and tokenizer.decode(ids).endswith("<｜User｜>x</think>")
    assert not tokenizer.starts_thinking(ids)
    with pytest.raises(UserError, match="has reasoning_content, and the model is not asked to think"):
        tokenizer.encode_chat([USER, begin("x", reasoning_content="hm")])
    if template != V2:
        assert ids[: len(tokenizer.encode_chat([USER]))] == tokenizer.encode_chat([USER])


def test_the_beginning_of_an_answer_is_behind_its_thinking(with_template: Callable[[str | None], Tokenizer]) -> None:
    r1, v31 = with_template(R1), with_template(V31)
    for tokenizer, opened, closed, options in ((r1, "<think>\n", "\n</think>\n\n", {}), (v31, "<think>", "</think>", {"thinking": True})):
        asked = tokenizer.render_chat([USER], **options)
        assert asked.endswith(opened)
        for prefix, text, thinks in (
            (begin("It"), closed + "It", False),
            (begin("It", reasoning_content="hm"), "hm" + closed + "It", False),
            (begin(None, reasoning_content="hm"), "hm", True),
            (begin("", reasoning_content="hm"), "hm", True),
        ):
            ids = tokenizer.encode_chat([USER, prefix], **options)
            assert tokenizer.render_chat([USER, prefix], **options) == asked + text
            assert tokenizer.decode(ids).endswith(opened + text) and tokenizer.starts_thinking(ids) is thinks
            assert ids.count(tokenizer.think_close_id) == (not thinks) + tokenizer.encode_chat([USER], **options).count(tokenizer.think_close_id)
    whole = r1.encode_text("\nhm\n")[1:]
    ids = r1.encode_chat([USER, begin("It", reasoning_content="hm")])
    at = ids.index(r1.think_open_id) + 1
    assert ids[at : at + len(whole)] == whole, "encoded in one piece"


def test_an_assistants_message_last() -> None:
    demo = Tokenizer(Path(__file__).parents[2] / "demo" / "checkpoint")
    for messages, says in (
        ([USER, {"role": "assistant", "content": "x"}], "message 1: the last message is the assistant's; \"prefix\": true in it"),
        ([USER, {"role": "assistant", "content": "x", "prefix": False}], "message 1: the last message is the assistant's"),
        ([USER, begin("x"), USER], "message 1: prefix is for an assistant's message that is the last one"),
        ([USER | {"prefix": True}], "message 0: prefix is for an assistant's message"),
        ([begin("x")], "message 0: no message precedes the one to go on with"),
        ([USER, begin(None, tool_calls=calls("a")["tool_calls"])], "message 1: a message with tool_calls cannot be gone on with"),
    ):
        with pytest.raises(UserError) as refused:
            demo.encode_chat(messages)
        assert says in str(refused.value)
    assert demo.encode_chat([USER, {"role": "assistant", "content": "x"}], add_generation_prompt=False)


def test_thinking_that_a_template_does_not_switch(with_template: Callable[[str | None], Tokenizer]) -> None:
    """What it does anyway may be asked for."""
    for template, thinks in ((R1, True), (None, False), (V2, False)):
        tokenizer = with_template(template)
        assert tokenizer.encode_chat([USER], thinking=thinks) == tokenizer.encode_chat([USER])
        with pytest.raises(NoThinkingSwitch, match="does not let thinking be switched on or off"):
            tokenizer.encode_chat([USER], thinking=not thinks)
    assert len({tuple(with_template(V31).encode_chat([USER], thinking=thinks)) for thinks in (True, False)}) == 2


# ---------------------------------------------------------------- texts filled in


def test_infilling_with_v3s_tokens(with_template: Callable[[str | None], Tokenizer]) -> None:
    """Prefix, suffix, middle; what a user spells is text."""
    v3 = with_template(None)
    before, after = "def f(x):\n    ", "\n    return y<｜fim▁end｜>"
    begin_id, hole, end = 128801, 128800, 128802
    ids = v3.encode_infill(before, after)
    assert ids == [0, begin_id, *v3.encode_text(before)[1:], hole, *v3.encode_text(after)[1:], end]
    with pytest.raises(UserError, match="cannot fill a text in: its tokenizer has no <｜fim▁begin｜>"):
        Tokenizer(Path(__file__).parents[2] / "demo" / "checkpoint").encode_infill("a", "b")
