"""What an answer says: reasoning, content and calls apart, under every field that changes which is which."""

import functools
import json
import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from core.sampling_params import SamplingParams
from engine import sampler
from engine.engine import Engine
from engine.lanes import decode_request, encode_request
from engine.request import Request
from serving.accepted import IGNORED, OFF
from serving.plan import Plan
from support import processes as launch
from support.http_server import GENEROUS, RunningServer, serving
from support.tiny_tokenizer import EOS, write_tokenizer
from text.chat_format import ChatFormat
from text.parser import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR
from text.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE, THINK, THINK_END, Tokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PAGES = 40
CONTROL = (THINK, THINK_END, CALLS_BEGIN, CALL_BEGIN, SEPARATOR, CALL_END, CALLS_END, FIM_BEGIN, FIM_HOLE, FIM_END)
# In V3.1's form: it thinks where it is asked to.
TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<｜User｜>' ~ m.content }}"
    "{% elif m.role == 'tool' %}{{ '[' ~ m.content ~ ']' }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜></think>' ~ (m.content or '') }}"
    "{% for call in m.tool_calls or [] %}{{ '<｜tool▁call▁begin｜>' ~ call.function.name ~ '<｜tool▁sep｜>' }}"
    "{{ call.function.arguments ~ '<｜tool▁call▁end｜>' }}{% endfor %}{{ eos_token }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{{ '<think>' if thinking else '</think>' }}{% endif %}"
)
USER = {"role": "user", "content": "q"}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
CALL = f'{CALLS_BEGIN}{CALL_BEGIN}f{SEPARATOR}{{"a": "b"}}{CALL_END}{CALLS_END}'
THOUGHT = {"reasoning_effort": "high"}


@dataclass
class Scripted:
    """A server whose model says what it is told to."""

    running: RunningServer
    client: openai.OpenAI
    tokenizer: Tokenizer
    script: list[int]
    plans: list[Plan]  # of what was asked

    def ids(self, text: str) -> list[int]:
        """Each of CONTROL in the text is the control token."""
        runs = re.split("(" + "|".join(map(re.escape, (*CONTROL, "<｜User｜>", EOS))) + ")", text)
        added = self.tokenizer._added
        return [t for run in runs for t in ([added[run]] if run in added else self.tokenizer._encode_plain(run))]

    def says(self, text: str) -> None:
        """The next answers are this."""
        self.script[:] = self.ids(text + 500 * EOS)

    def ask(self, text: str, **fields: Any) -> Any:
        self.says(text)
        body = {"messages": [USER], **fields}
        status, _, said = self.running.send("POST", CHAT, body)
        assert status == 200, said
        if fields.get("stream"):
            return [json.loads(line[6:]) for line in said.split("\n") if line.startswith("data: {")]
        return said["choices"][0]

    def refused(self, path: str, body: dict[str, Any]) -> tuple[int, str, str]:
        status, _, said = self.running.send("POST", path, body)
        return status, said["error"]["param"], said["error"]["message"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    folder = launch.make_tiny(tmp_path_factory.mktemp("answers") / "tiny")
    write_tokenizer(folder, TEMPLATE, CONTROL)
    engine = Engine.from_pretrained(folder, dtype="float32", max_model_len=512, n_pages=PAGES)
    assert engine.tokenizer is not None
    script: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "verify", lambda logits, asks, _: [[script[len(a.tokens) - a.n_prompt]] for a in asks])
        with serving(engine) as running, openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", timeout=GENEROUS) as client:
            submit, plans = running.engine_thread.submit, []
            patch.setattr(running.engine_thread, "submit", lambda plan, at: plans.append(plan) or submit(plan, at))
            yield Scripted(running, client, engine.tokenizer, script, plans)


def spelled(entries: list[dict[str, Any]]) -> str:
    return bytes(byte for entry in entries for byte in entry["bytes"]).decode()


# ---------------------------------------------------------------- 1: log-probabilities, stop texts, why it ended


@pytest.mark.parametrize("said", ["Hm é.\n</think>\n\nSo é ", "Hm.</think>So" + CALL, "</think>x", "Hm", "a\n\nb\n</think>c"])
def test_logprobs_are_the_contents_and_apart_from_them_the_reasonings(model: Scripted, said: str) -> None:
    fields: dict[str, Any] = dict(logprobs=True, top_logprobs=1, tools=TOOLS, max_tokens=100, **THOUGHT)
    choice = model.ask(said, **fields)
    message, found = choice["message"], choice["logprobs"]
    assert spelled(found["content"]) == (message["content"] or "")
    assert spelled(found.get("reasoning_content", [])) == message.get("reasoning_content", "")
    assert all(len(entry["top_logprobs"]) == 1 for entry in found["content"])
    listed = [entry["token"] for entries in (found["content"], found.get("reasoning_content", [])) for entry in entries]
    assert not set(listed) & {THINK_END, CALL_BEGIN, EOS}, "a marker is no part of either"
    content: list[Any] = []
    reasoning: list[Any] = []
    for chunk in model.ask(said, stream=True, **fields):
        part = chunk["choices"][0]
        logprobs = part["logprobs"] or {"content": []}
        for entries, whole, name in ((logprobs["content"], content, "content"), (logprobs.get("reasoning_content", []), reasoning, "reasoning_content")):
            assert not entries or part["delta"].get(name), "they come with the text"
            whole += entries
    assert (content, reasoning) == (found["content"], found.get("reasoning_content", []))


def test_stop_texts_match_in_content_only(model: Scripted) -> None:
    said = f"Question: b\n</think>\n\nIt is Question: what.{CALL}"
    for stop in (["Question:"], ["Question:", "b"], "Question"):
        choice = model.ask(said, stop=stop, tools=TOOLS, max_tokens=200, **THOUGHT)
        assert choice["message"] == {"role": "assistant", "reasoning_content": "Question: b", "content": "It is "}
        assert choice["finish_reason"] == "stop"
    for stop in (['"b"', "</think>", "\n", THINK_END, "f", CALL_BEGIN], ["Question: b"]):
        choice = model.ask(said, stop=stop, tools=TOOLS, max_tokens=200, **THOUGHT)
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "It is Question: what."
    choice = model.ask("one two", stop=["e t"], logprobs=True)
    assert choice["message"]["content"] == "on" and spelled(choice["logprobs"]["content"]) == "on"
    choice = model.ask("one<｜User｜> two", stop=["<｜User｜>", "e t"])
    assert choice["message"]["content"] == "one two", "a control token is no text"
    model.says("a</think>b")
    _, _, raw = model.running.send("POST", COMPLETIONS, {"prompt": [0, model.tokenizer.think_open_id], "stop": ["</think>"]})
    assert raw["choices"][0]["text"] == "a", "a text that goes on is all text"


@pytest.mark.parametrize(
    ("said", "fields", "finish"),
    [
        (CALL, {}, "tool_calls"),
        (CALL + " x stop", {"stop": ["stop"]}, "tool_calls"),
        (CALL + " x stop", {"max_tokens": 20}, "length"),
        (CALL, {"max_tokens": 6}, "length"),
        (CALL, {"max_tokens": 3}, "length"),
        (CALL[: CALL.index('b"')], {}, "stop"),  # it ends itself within its arguments
        (CALL[: CALL.index(CALL_END)], {}, "tool_calls"),  # all there but the marker
        (f"{CALL_BEGIN}f", {}, "stop"),
        (f'{CALL}{CALL_BEGIN}f{SEPARATOR}{{"a', {}, "stop"),
        (CALL, {"tool_choice": "none"}, "stop"),
    ],
)  # fmt: skip
def test_a_call_that_is_cut_does_not_finish_as_one(model: Scripted, said: str, fields: dict[str, Any], finish: str) -> None:
    assert model.ask(said, tools=TOOLS, **{"max_tokens": 100} | fields)["finish_reason"] == finish
    chunks = model.ask(said, tools=TOOLS, stream=True, **{"max_tokens": 100} | fields)
    assert chunks[-1]["choices"][0]["finish_reason"] == finish


def test_lanes_know_how_a_conversations_answer_is_read() -> None:
    for chat in (None, ChatFormat(), ChatFormat("v3.1", True)):
        request = Request(3, [1, 2], SamplingParams(stop=("x",)), chat=chat, opens_thinking=True)
        again = decode_request(encode_request(request), [1, 2], None)
        assert (again.chat, again.opens_thinking, again.params) == (chat, True, request.params)


# ---------------------------------------------------------------- 2: tools' results


def test_results_without_a_call_are_refused(model: Scripted) -> None:
    call = {"role": "assistant", "tool_calls": [{"id": i, "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in "ab"]}
    results = [{"role": "tool", "tool_call_id": i, "content": i * 3} for i in "ba"]
    model.says("x")
    assert model.running.send("POST", CHAT, {"messages": [USER, call, *results]})[0] == 200
    text = model.tokenizer.decode(model.plans[-1].prompts[0])
    assert text.index("[aaa]") < text.index("[bbb]")
    for wrong in (results[:1], [results[0], results[0]], [*results, results[0] | {"tool_call_id": "c"}], [results[0], {"role": "tool", "content": "x"}], []):
        status, param, says = model.refused(CHAT, {"messages": [USER, call, *wrong, USER]})
        assert (status, param) == (400, "messages") and re.match(r"message \d: ", says)


# ---------------------------------------------------------------- 3: calls and control tokens


def test_a_call_before_the_end_of_thinking(model: Scripted) -> None:
    message = model.ask(f"Hm.\n{CALL}", tools=TOOLS, max_tokens=100, **THOUGHT)["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", None)
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"a": "b"}


def test_no_control_token_is_content(model: Scripted) -> None:
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = model.ask(f"x<｜User｜>y{CALL}z", max_tokens=100, **fields)
        assert choice["message"]["content"] == 'xyf{"a": "b"}z' and "tool_calls" not in choice["message"]
    message = model.ask(f"x<｜User｜>y{CALL}z", tools=TOOLS, max_tokens=100)["message"]
    assert message["content"] == "xyz" and len(message["tool_calls"]) == 1


@pytest.mark.parametrize("said", [f"{CALL_BEGIN}f{SEPARATOR}{CALL_END}", f"{CALL_BEGIN}function{SEPARATOR}f\n```json\n```{CALL_END}"])
def test_a_call_without_arguments_has_none_that_are_json(model: Scripted, said: str) -> None:
    asked: Any = dict(model="model", messages=[USER], tools=TOOLS, max_tokens=100)
    model.says(said)
    (call,) = model.client.chat.completions.create(**asked).choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("f", "{}")
    arguments = ""
    for chunk in model.client.chat.completions.create(**asked, stream=True):
        for part in chunk.choices[0].delta.tool_calls or []:
            arguments += part.function.arguments or ""
    assert arguments == "{}"


# ---------------------------------------------------------------- 4: the beginning of an answer


def test_prefix(model: Scripted) -> None:
    model.says(" world</think>!")
    asked: Any = {"model": "model", "messages": [USER, {"role": "assistant", "content": "Hello", "prefix": True}]}
    choice = model.client.chat.completions.create(**asked, stop=["!"]).choices[0]
    assert choice.message.content == " world", "the beginning is not said again"
    assert model.tokenizer.decode(model.plans[-1].prompts[0]).endswith("</think>Hello")
    asked["messages"][1] |= {"content": None, "reasoning_content": "Hm,"}
    message = model.client.chat.completions.create(**asked, extra_body=THOUGHT).choices[0].message
    assert (message.reasoning_content, message.content) == (" world", "!")
    with openai.OpenAI(base_url=f"{model.running.url}/beta", api_key="none", timeout=GENEROUS) as beta:  # as DeepSeek's
        assert beta.chat.completions.create(**asked, extra_body=THOUGHT).choices[0].message == message
    for messages in ([USER, {"role": "assistant", "content": "x"}], [USER | {"prefix": True}]):
        assert model.refused(CHAT, {"messages": messages})[:2] == (400, "messages")


# ---------------------------------------------------------------- 8: thinking, scored prompts, many prompts


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, False), (THOUGHT, True), ({"reasoning_effort": "none"}, False), ({"thinking": {"type": "enabled"}}, True),
        ({"thinking": {"type": "disabled"}}, False), ({"enable_thinking": True}, True), ({"chat_template_kwargs": {"thinking": True}}, True),
    ],
)  # fmt: skip
def test_thinking(model: Scripted, fields: dict[str, Any], thinks: bool) -> None:
    message = model.ask("a", **fields)["message"]
    assert message.get("reasoning_content") == ("a" if thinks else None)
    close, opened = model.tokenizer.think_close_id, model.tokenizer.think_open_id
    assert model.plans[-1].prompts[0][-1] == (opened if thinks else close)


@pytest.mark.parametrize("logprobs", [None, 0, 2])
def test_a_prompt_that_is_scored_and_not_gone_on_with(model: Scripted, logprobs: int | None) -> None:
    model.says("xyz")
    fields = {"prompt": "Hello é", "echo": True} | ({} if logprobs is None else {"logprobs": logprobs})
    one = model.running.send("POST", COMPLETIONS, {**fields, "max_tokens": 1})[2]["choices"][0]
    status, _, said = model.running.send("POST", COMPLETIONS, {**fields, "max_tokens": 0})
    choice = said["choices"][0]
    assert (status, choice["text"], choice["finish_reason"], said["usage"]["completion_tokens"]) == (200, "Hello é", "length", 0)
    assert one["text"] == "Hello éx"
    if logprobs is not None:
        assert choice["logprobs"] == {name: values[:-1] for name, values in one["logprobs"].items()}
    _, _, stream = model.running.send("POST", COMPLETIONS, {**fields, "max_tokens": 0, "stream": True})
    assert json.loads(stream.split("\n")[0][6:])["choices"][0]["text"] == "Hello é" and stream.endswith("data: [DONE]\n\n")
    assert model.refused(COMPLETIONS, {"prompt": "x", "max_tokens": 0})[1:] == ("max_tokens", "max_tokens is 0, expected from 1 to 512")
    assert model.refused(CHAT, {"messages": [USER], "max_tokens": 0})[:2] == (400, "max_tokens")


def test_as_many_prompts_as_may_wait(model: Scripted) -> None:
    model.says("xyz")
    most = model.running.engine_thread.most_answers
    prompts = [f"p{i} " for i in range(most)]
    said = model.running.send("POST", COMPLETIONS, {"prompt": prompts, "max_tokens": 0, "echo": True})[2]
    assert [choice["text"] for choice in said["choices"]] == prompts and most > 64
    status, param, says = model.refused(COMPLETIONS, {"prompt": [*prompts, "x"]})
    assert (status, param) == (400, "prompt") and f"ask for {most + 1} answers, expected from 1 to {most}" in says
    assert model.refused(COMPLETIONS, {"prompt": prompts, "n": 2})[:2] == (400, "prompt")


# ---------------------------------------------------------------- 9: texts filled in


def test_suffix(model: Scripted) -> None:
    model.says("middle")
    said = model.client.completions.create(model="model", prompt="be<think>fore", suffix="after", max_tokens=50)
    assert said.choices[0].text == "middle" and said.choices[0].finish_reason == "stop"
    assert model.plans[-1].prompts == [model.tokenizer.encode_infill("be<think>fore", "after")]
    assert said.usage.prompt_tokens == 1 + 3 + len("be<think>fore" + "after")
    status, _, beta = model.running.send("POST", "/beta/completions", {"prompt": "x", "suffix": "y", "max_tokens": 50})
    assert (status, beta["choices"][0]["text"], len(model.plans[-1].prompts[0])) == (200, "middle", 6)
    plain = model.client.completions.create(model="model", prompt="before", suffix="", max_tokens=50)
    assert plain.usage.prompt_tokens == 1 + len("before")
    for body, param in (({"prompt": [5, 6], "suffix": "x"}, "suffix"), ({"prompt": "x", "suffix": "y", "echo": True}, "echo"),
                        ({"prompt": "x", "suffix": 5}, "suffix"), ({"prompt": "x", "suffix": "y" * 600}, "prompt")):  # fmt: skip
        assert model.refused(COMPLETIONS, body)[:2] == (400, param)


# ---------------------------------------------------------------- fuzzing


TEXTS = ["", "x", "é\n", "<think>", "</think>", "<｜User｜>", '{"a": 1}', "```json\n", "q" * 300]


SNIPPETS = [CALL, f"{CALL_BEGIN}function{SEPARATOR}f\n```\n{{}}\n```{CALL_END}", CALL_BEGIN, SEPARATOR, CALL_END, "f", '{"a":', "\n", "```",
            "x", "é", "</think>", "</think>", "<think>", "<｜User｜>", EOS, EOS]  # fmt: skip


def some_call(draw: random.Random) -> dict[str, Any]:
    function = {"name": draw.choice(["f", "g", "", "a b"]), "arguments": draw.choice([*TEXTS, {"a": 1}])}
    return {"id": draw.choice(["a", "b", "c", ""]), "type": "function", "function": function}


def some_messages(draw: random.Random) -> list[Any]:
    messages: list[Any] = []
    for _ in range(draw.randint(1, 4)):
        kind = draw.choice(["user", "user", "system", "developer", "assistant", "calls", "tool"])
        if kind == "calls":
            made = [some_call(draw) | {"id": call_id} for call_id in draw.sample("abc", draw.randint(1, 3))]
            messages.append({"role": "assistant", "content": draw.choice([None, *TEXTS]), "tool_calls": made})
            results = [{"role": "tool", "tool_call_id": call["id"], "content": draw.choice(TEXTS)} for call in made]
            draw.shuffle(results)
            messages += results if draw.random() < 0.8 else results[:-1]
        else:
            content = draw.choice(TEXTS)
            messages.append({"role": kind, "content": [{"type": "text", "text": content}] if draw.random() < 0.2 else content})
        if draw.random() < 0.15:
            names = {"reasoning": "hm", "reasoning_content": "hm", "prefix": True, "name": "x", "tool_call_id": "a", "refusal": "no"}
            name = draw.choice([*names, *sorted(IGNORED["message"]), *OFF["message"]])
            messages[-1][name] = names.get(name, draw.choice([None, "", {}, [], 1, "x"]))
    if draw.random() < 0.6:
        messages.append(dict(USER))
    elif draw.random() < 0.5:
        messages.append({"role": "assistant", "content": draw.choice([None, *TEXTS]), "prefix": draw.choice([True, True, False, 1])})
    return messages


FIELDS: dict[str, list[Any]] = {
    "thinking": [{"type": "enabled"}, {"type": "disabled"}, {"type": "auto"}, {"type": "x"}, {}, True],
    "reasoning_effort": ["none", "low", "high", "max", "x", None], "enable_thinking": [True, False, 1],
    "chat_template_kwargs": [{"thinking": True}, {"enable_thinking": False}, {"x": 1}, {}],
    "tools": [TOOLS, [], [{"type": "function", "function": {"name": "f", "cache_control": {}}}], [{}]],
    "tool_choice": ["auto", "none", "x"], "logprobs": [True, False], "top_logprobs": [0, 2, 50],
    "stop": ["x", ["\n", "é"], [], "</think>", ["e" * 50]], "max_tokens": [0, 1, 3, 20, 60], "n": [1, 2, 3], "stream": [True, False],
    "stream_options": [{"include_usage": True}, {"include_obfuscation": False}, {}], "temperature": [0, 1], "seed": [1],
}  # fmt: skip
TEXT_FIELDS: dict[str, list[Any]] = {
    "suffix": ["", "x", "é", None, 5], "echo": [True, False], "logprobs": [0, 2, None], "max_tokens": [0, 0, 1, 20],
    "stop": FIELDS["stop"], "n": [1, 2], "stream": [True, False], "thinking": [None, {"type": "enabled"}],
}  # fmt: skip


def fuzzed(draw: random.Random) -> tuple[str, dict[str, Any]]:
    is_chat = draw.random() < 0.8
    fields = FIELDS if is_chat else TEXT_FIELDS
    chosen = draw.sample(sorted(fields), draw.randint(0, 5))
    prompt = draw.choice(["x", "", "é" * 20, ["a", "b"], [5, 6], [[5], [6, 7]], ["x"] * 20])
    body: dict[str, Any] = {"messages": some_messages(draw)} if is_chat else {"prompt": prompt}
    body |= {"max_tokens": 60} | {name: draw.choice(fields[name]) for name in chosen}
    if is_chat and draw.random() < 0.5:
        body["tools"] = TOOLS
    if draw.random() < 0.2:
        name = draw.choice([*OFF["body"], *sorted(IGNORED["body"])])
        body.setdefault(name, draw.choice([*OFF["body"].get(name, ()), None, 1, "x", [], {}, False]))
    return (CHAT if is_chat else COMPLETIONS), body


def check(body: dict[str, Any], said: Any) -> None:
    """What holds of every answer to a conversation."""
    for choice in said["choices"]:
        message, calls = choice["message"], choice["message"].get("tool_calls", [])
        assert choice["finish_reason"] in ("stop", "length", "tool_calls")
        assert calls or choice["finish_reason"] != "tool_calls"
        assert not calls or (body.get("tools") and body.get("tool_choice") != "none")
        assert all(token not in (message["content"] or "") + message.get("reasoning_content", "") for token in CONTROL)
        if choice["finish_reason"] == "tool_calls":
            assert all(call["function"]["arguments"] and call["function"]["name"] for call in calls)
        if body.get("logprobs"):
            spoken = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"]).decode("utf-8", "replace")
            said_text, spoken = ("".join(text.split()) for text in (message["content"] or "", spoken))  # without layout
            assert said_text in spoken.replace("\ufffd", "") or "\ufffd" in said_text
        else:
            assert choice["logprobs"] is None


@pytest.mark.parametrize("n", [100, pytest.param(10_000, marks=pytest.mark.trust)])
def test_fuzzed_fields(model: Scripted, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """Conversations of all kinds to a model that says anything, control tokens above all: answered or refused, never failed
    at, and of every answer the parts are what they are called."""
    snippets = [model.ids(text) for text in SNIPPETS]

    @functools.cache
    def script(seed: int) -> list[int]:
        return [token for snippet in random.Random(seed).choices(snippets, k=100) for token in snippet]

    def verify(logits: Any, asks: Any, row_sampler: Any) -> list[list[int]]:
        scripts = (script(sum(a.tokens[: a.n_prompt])) for a in asks)
        return [[said[len(a.tokens) - a.n_prompt]] for said, a in zip(scripts, asks, strict=True)]

    monkeypatch.setattr(sampler, "verify", verify)
    draw = random.Random(n)
    cases = [fuzzed(draw) for _ in range(n)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda case: model.running.send("POST", *case), cases))
    for (path, body), (status, _, said) in zip(cases, found, strict=True):
        assert status in (200, 400), (path, body, status, said)
        if status == 400:
            assert set(said["error"]) == {"message", "type", "param", "code"} and "\n" not in said["error"]["message"]
        elif isinstance(said, str):
            assert said.endswith("data: [DONE]\n\n"), (path, body, said)
        elif path == CHAT:
            check(body, said)
    statuses = [status for status, _, _ in found]
    assert min(statuses.count(200), statuses.count(400)) > n // 5, "both kinds are exercised"
    finished = {choice["finish_reason"] for _, _, said in found if isinstance(said, dict) for choice in said.get("choices", ())}
    assert finished == {"stop", "length", "tool_calls"}
    model.running.idle(PAGES)
