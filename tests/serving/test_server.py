"""server.py: the API by OpenAI's own client, what is refused, who is let in, and what clients do to each other."""

import asyncio
import base64
import contextlib
import copy
import json
import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch.distributed as dist

import generate
import server
from cli.flags import run_config
from cli.main import load
from core import PROGRAM_VERSION
from core.errors import UserError
from core.run_config import CPU_MIXED_TOKENS, RunConfig
from core.sampling_params import SamplingParams
from engine import sampler
from engine.engine import Engine
from parallel.group import SOLO
from serving import bodies
from serving.accepted import IGNORED, OFF
from serving.schema import ChatBody, CompletionBody
from serving.serve import serve
from support import processes as launch
from support.http_server import GENEROUS, Gate, RunningServer, await_that, serving
from support.server_process import Process, server_command
from support.tiny_tokenizer import TEMPLATE, write_tokenizer
from text import keyed_calls as keyed
from text.parser import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, KIMI, MARKERS, SEPARATOR

DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"
KEY = "a-key-of-the-tests"
PAGES = 40
QUESTION = [{"role": "user", "content": "What is 347 + 285?"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[RunningServer, Engine]]:
    """The demo, drafting; and an engine of the same model that answers alone."""
    engine = Engine.from_pretrained(DEMO, dtype="float32", max_model_len=1024, n_pages=PAGES, mtp=1)
    alone = Engine(engine.model, engine.tokenizer, RunConfig(max_model_len=1024, n_pages=PAGES))
    alone.default_params = engine.default_params
    with serving(engine) as running:
        yield running, alone


@pytest.fixture(scope="module")
def client(demo: tuple[RunningServer, Engine]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo[0].url}/v1", api_key="none", max_retries=0, timeout=GENEROUS) as client:
        yield client


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A random model that never ends an answer by itself, and says any bytes."""
    folder = launch.make_tiny(tmp_path_factory.mktemp("server") / "tiny")
    return Engine.from_pretrained(folder, dtype="float32", max_model_len=512, n_pages=PAGES)


def again(engine: Engine, **changes: Any) -> Engine:
    """Another engine of the same model."""
    return Engine(engine.model, engine.tokenizer, RunConfig(**{"max_model_len": 512, "n_pages": PAGES} | changes))


def events(stream: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in stream.split("\n") if line.startswith("data: {")]


# ---------------------------------------------------------------- answers


def test_chat_is_what_the_engine_says(demo: tuple[RunningServer, Engine], client: openai.OpenAI) -> None:
    (expected,) = demo[1].generate([QUESTION], SamplingParams(max_new_tokens=200, temperature=0))
    answer = client.chat.completions.create(model="model", messages=QUESTION, temperature=0, max_completion_tokens=200)
    (choice,) = answer.choices
    assert (choice.message.reasoning_content, choice.message.content) == expected.parts
    assert (choice.finish_reason, choice.message.role) == ("stop", "assistant")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(expected.prompt), len(expected.tokens))
    close = demo[1].tokenizer.think_close_id
    assert usage.completion_tokens_details.reasoning_tokens == expected.tokens.index(close)
    assert usage.prompt_cache_hit_tokens + usage.prompt_cache_miss_tokens == usage.prompt_tokens


def reasoned(choice: Any) -> list[Any]:
    """Log-probabilities of a choice's reasoning."""
    return (choice.logprobs.model_extra or {}).get("reasoning_content", [])


def test_stream_is_the_whole(client: openai.OpenAI) -> None:
    """Two answers, streamed and whole; every character of a choice is told to be drafted or not."""
    asked: Any = dict(model="model", messages=QUESTION, temperature=4, seed=7, n=2, max_tokens=60,
                      logprobs=True, top_logprobs=2)  # fmt: skip
    whole = client.chat.completions.create(**asked)
    said: dict[int, dict[str, str]] = {0: {}, 1: {}}
    tokens: dict[int, list] = {0: [], 1: []}
    drafted: dict[int, list] = {0: [], 1: []}
    finish, usage = {}, None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            fields = choice.delta.model_dump(exclude_unset=True)
            for name in ("content", "reasoning_content"):
                said[choice.index][name] = said[choice.index].get(name, "") + (fields.get(name) or "")
            told = "".join(text for text, _ in choice.drafted)
            assert told == (fields.get("reasoning_content") or fields.get("content") or "")
            drafted[choice.index] += choice.drafted
            tokens[choice.index] += (choice.logprobs.content + reasoned(choice)) if choice.logprobs else []
            finish[choice.index] = choice.finish_reason
    for choice in whole.choices:
        assert said[choice.index]["content"] == choice.message.content
        assert said[choice.index]["reasoning_content"] == choice.message.reasoning_content
        assert finish[choice.index] == choice.finish_reason
        assert tokens[choice.index] == reasoned(choice) + choice.logprobs.content
        assert drafted[choice.index] == choice.drafted
        assert {len(entry["top_logprobs"]) for entry in reasoned(choice)} == {2}
        assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    assert whole.choices[0].message != whole.choices[1].message
    assert {accepted for part in drafted.values() for _, accepted in part} == {True, False}
    assert usage == whole.usage and 0 < usage.completion_tokens - sum(map(len, tokens.values())) <= 4, "but for markers"


def test_conversation_goes_on_from_the_cache(client: openai.OpenAI) -> None:
    """An answer goes back whole, as clients send it, and its beginning is found."""
    turns: list[Any] = [{"role": "system", "content": "You add numbers. " * 10}, *QUESTION]
    first = client.chat.completions.create(model="model", messages=turns, temperature=0)
    turns += [first.choices[0].message, {"role": "user", "content": "What is 12 + 30?"}]
    second = client.chat.completions.create(model="model", messages=turns, temperature=0)
    assert second.choices[0].message.content == "42"
    assert second.usage.prompt_cache_hit_tokens >= 64
    assert second.usage.prompt_tokens_details.cached_tokens == second.usage.prompt_cache_hit_tokens


def test_completions(demo: tuple[RunningServer, Engine], client: openai.OpenAI) -> None:
    engine = demo[1]
    prompts = ["What is 3 + 4?", "Reverse the word"]
    params = SamplingParams(max_new_tokens=16, temperature=0, logprobs=1, prompt_logprobs=1)
    expected = engine.generate(prompts, params)
    ids = [request.prompt for request in expected]
    for prompt, answers in ((prompts, expected), (ids, expected), (prompts[0], expected[:1]), (ids[0], expected[:1])):
        said = client.completions.create(model="model", prompt=prompt, temperature=0)
        assert [choice.text for choice in said.choices] == [request.text for request in answers]
        assert said.usage.completion_tokens == sum(len(request.tokens) for request in answers)
    said = client.completions.create(model="model", prompt=prompts[0], temperature=0, echo=True, logprobs=1)
    (choice,), request = said.choices, expected[0]
    assert choice.text == prompts[0] + request.text
    scores = [None, *(entry.logprob for entry in (*request.prompt_logprobs, *request.logprobs))]
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(scores[1:], abs=1e-4)
    for at, token in zip(choice.logprobs.text_offset[1:], choice.logprobs.tokens[1:], strict=True):
        assert choice.text[at : at + len(token)] == token
    held = client.completions.create(model="model", prompt=prompts[0], temperature=0, echo=True, logprobs=1,
                                     stop=[choice.text[-4:] + "never"])  # fmt: skip
    assert held.choices[0] == choice  # offsets too, though the last texts were held back for a while
    parts = list(client.completions.create(model="model", prompt=prompts[0], temperature=0, echo=True, logprobs=1,
                                           stream=True))  # fmt: skip
    assert [token for part in parts for token in part.choices[0].drafted] == choice.drafted
    assert "".join(text for text, _ in choice.drafted) == request.text
    assert "".join(part.choices[0].text for part in parts) == choice.text
    assert [token for part in parts for token in part.choices[0].logprobs.tokens] == choice.logprobs.tokens
    assert parts[-1].choices[0].finish_reason == "length"


def test_stop_texts_and_defaults(demo: tuple[RunningServer, Engine], client: openai.OpenAI) -> None:
    for stop, content in (("</think>", "632"), ("347", "632"), ("3", "6"), ("\n", "632"), ("6", "")):
        answer = client.chat.completions.create(model="model", messages=QUESTION, temperature=0, stop=[stop])
        assert answer.choices[0].message.content == content and answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].message.reasoning_content == "347+285: 7+5+0=12 4+8+1=13 3+2+1=6"
    prompt = demo[1].tokenizer.encode_chat(QUESTION)
    raw = client.completions.create(model="model", prompt=prompt, temperature=0, stop=["</think>"], max_tokens=100)
    assert raw.choices[0].text.strip() == "347+285: 7+5+0=12 4+8+1=13 3+2+1=6", "a text is all text"
    seen: list[SamplingParams] = []
    thread = demo[0].engine_thread
    submit = thread.submit
    thread.submit = lambda plan, arrived: seen.append(plan.params) or submit(plan, arrived)  # type: ignore[method-assign]
    for _ in range(2):
        client.chat.completions.create(model="model", messages=QUESTION)
    thread.submit = submit  # type: ignore[method-assign]
    released = demo[1].default_params
    assert [replace(params, seed=0, max_new_tokens=200) for params in seen] == [released, released]
    assert seen[0].seed != seen[1].seed, "nobody asked for the same noise"
    assert seen[0].max_new_tokens == 1024 - len(demo[1].tokenizer.encode_chat(QUESTION))


def test_biases(demo: tuple[RunningServer, Engine], client: openai.OpenAI) -> None:
    (expected,) = demo[1].generate(["The"], SamplingParams(max_new_tokens=3, temperature=0, logit_bias=((40, 100.0),)))
    answer = client.completions.create(model="model", prompt="The", temperature=0, max_tokens=3, logit_bias={"40": 100})
    assert expected.tokens == [40] * 3 and answer.choices[0].text == expected.text
    banned = client.completions.create(model="model", prompt="The", temperature=0, max_tokens=1,
                                       logit_bias={"40": -100}, logprobs=3)  # fmt: skip
    assert banned.choices[0].text != expected.text[:1]


def test_async_clients_at_once(demo: tuple[RunningServer, Engine]) -> None:
    async def ask(client: openai.AsyncOpenAI, a: int) -> str:
        said = ""
        messages: Any = [{"role": "user", "content": f"What is {a} + 285?"}]
        stream = await client.chat.completions.create(model="model", messages=messages, temperature=0, stream=True)
        async for chunk in stream:
            said += chunk.choices[0].delta.content or ""
        return said

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{demo[0].url}/v1", api_key="none", timeout=GENEROUS) as client:
            return await asyncio.gather(*(ask(client, a) for a in range(110, 118)))

    assert asyncio.run(main()) == [str(a + 285) for a in range(110, 118)]


def test_whole_characters(tiny: Engine) -> None:
    """A model that says any bytes: streams are cut between characters, and add up to the engine's own text."""
    prompt = list(range(3, 60))
    params = SamplingParams(max_new_tokens=300, temperature=1.0, seed=3)
    (expected,) = again(tiny).generate([prompt], params)
    asked = {"prompt": prompt, "max_tokens": 300, "temperature": 1.0, "seed": 3, "stream": True, "top_logprobs": 0}
    with serving(again(tiny)) as running:
        _, _, text = running.send("POST", COMPLETIONS, asked)
    assert "".join(event["choices"][0]["text"] for event in events(text)) == expected.text
    assert all("drafted" not in event["choices"][0] for event in events(text))  # nothing drafts
    assert any(ord(letter) > 0x7F and letter != "\ufffd" for letter in expected.text)


SAYINGS = {
    "v3": f"{CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}add\n```json\n{{\"a\": \"<b>\"}}\n```{CALL_END}{CALLS_END}",
    "v3.1": f"{CALLS_BEGIN}{CALL_BEGIN}add{SEPARATOR}{{\"a\": \"<b>\"}}{CALL_END}{CALLS_END}",
    "kimi": f"{KIMI.calls_begin}{KIMI.call_begin}functions.add:0{KIMI.separator}{{\"a\": \"<b>\"}}{KIMI.call_end}{KIMI.calls_end}",
}  # fmt: skip


@pytest.mark.parametrize("style", ["v3.1", "kimi", pytest.param("v3", marks=pytest.mark.trust)])
def test_tools(style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that says what it is told to: calls made of control tokens are calls, the same in letters is content."""
    m = MARKERS[style]
    markers = (m.calls_begin, m.call_begin, m.separator, m.call_end, m.calls_end)
    shape = f"{CALL_BEGIN}function{SEPARATOR}x\\n```json" if style == "v3" else f"{m.call_begin}x{m.separator}"
    template = "{% if tools %}{{ tools | tojson }}{{ '" + shape + "' }}{% endif %}" + TEMPLATE
    launch.make_tiny(tmp_path)
    write_tokenizer(tmp_path, template, markers)
    engine = Engine.from_pretrained(tmp_path, dtype="float32", max_model_len=512, n_pages=PAGES)
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    spelled = tokenizer._encode_plain(f"I would say {SAYINGS[style]} to that: ")
    control = {text: tokenizer._added[text] for text in markers}
    runs = re.split("(" + "|".join(map(re.escape, markers)) + ")", SAYINGS[style])
    script = [*spelled, *(t for run in runs for t in ([control[run]] if run in control else tokenizer._encode_plain(run))), 1]
    monkeypatch.setattr(sampler, "verify", lambda logits, asks, _: [[script[len(a.tokens) - a.n_prompt]] for a in asks])
    tools: Any = [{"type": "function", "function": {"name": "add", "description": f"{CALL_BEGIN}x", "parameters": {"type": "object"}}}]
    with serving(engine) as running, openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", timeout=GENEROUS) as client:
        asked: Any = dict(model="model", messages=[{"role": "user", "content": "hi"}], tools=tools)
        whole = client.chat.completions.create(**asked).choices[0]
        assert whole.finish_reason == "tool_calls"
        assert whole.message.content == f"I would say {SAYINGS[style]} to that: "
        (call,) = whole.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": "<b>"})
        assert call.id == "functions.add:0" if style == "kimi" else call.id.startswith("call_")
        said, names, arguments = "", "", ""
        for chunk in client.chat.completions.create(**asked, stream=True):
            delta = chunk.choices[0].delta
            said += delta.content or ""
            for part in delta.tool_calls or []:
                names += part.function.name or ""
                arguments += part.function.arguments or ""
        assert (said, names, json.loads(arguments)) == (whole.message.content, "add", {"a": "<b>"})
        plain = client.chat.completions.create(**asked, tool_choice="none").choices[0]
        assert plain.message.tool_calls is None and plain.message.content.endswith("".join(run for run in runs if run not in control))
        assert "add" in tokenizer.render_chat(asked["messages"], tools=tools)


# In GLM-4.7's form: arguments one by one, which the template takes apart itself.
GLM_TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' ~ m.content }}{% elif m.role == 'tool' %}{{ '[' ~ m.content ~ ']' }}"
    "{% else %}{{ '<｜Assistant｜>' ~ (m.content or '') }}{% for call in m.tool_calls or [] %}{{ '<tool_call>' ~ call.function.name }}"
    "{% for key, value in call.function.arguments.items() %}<arg_key>{{ key }}</arg_key><arg_value>"
    "{{ value if value is string else value | tojson }}</arg_value>{% endfor %}</tool_call>{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


def test_calls_of_keys_and_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, streamed, and sent back with a result; what cannot be held to a form in this style is refused."""
    launch.make_tiny(tmp_path)
    begin, end, (key, key_end, value, value_end) = keyed.GLM.call_begin, keyed.GLM.call_end, (keyed.KEY, keyed.KEY_END, keyed.VALUE, keyed.VALUE_END)
    write_tokenizer(tmp_path, GLM_TEMPLATE, (begin, end, key, key_end, value, value_end))
    engine = Engine.from_pretrained(tmp_path, dtype="float32", max_model_len=900, n_pages=PAGES)
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    written = ("I add.", begin, "add", key, "a", key_end, value, "7", value_end, key, "b", key_end, value, "[8]", value_end, end)
    script = [t for part in written for t in ([tokenizer.control_id(part)] if tokenizer.control_id(part) else tokenizer._encode_plain(part))] + [1]
    monkeypatch.setattr(sampler, "verify", lambda logits, asks, _: [[script[len(a.tokens) - a.n_prompt]] for a in asks])
    schema = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "array"}}}
    tools: Any = [{"type": "function", "function": {"name": "add", "parameters": schema}}]
    messages: Any = [{"role": "user", "content": "hi"}]
    with serving(engine) as running, openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", timeout=GENEROUS) as client:
        asked: Any = dict(model="model", messages=messages, tools=tools)
        (choice,) = client.chat.completions.create(**asked).choices
        (call,) = choice.message.tool_calls
        assert (choice.finish_reason, choice.message.content, call.function.name) == ("tool_calls", "I add.", "add")
        assert json.loads(call.function.arguments) == {"a": "7", "b": [8]}
        parts = [chunk.choices[0].delta.tool_calls for chunk in client.chat.completions.create(**asked, stream=True)]
        assert "".join(part.function.arguments for found in parts for part in found or []) == call.function.arguments
        messages += [choice.message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "15"}]
        again = client.chat.completions.create(**asked)
        assert again.choices[0].finish_reason == "tool_calls"
        rendered = tokenizer.render_chat([*messages], tools=tools)
        assert "<tool_call>add<arg_key>a</arg_key><arg_value>7</arg_value><arg_key>b</arg_key><arg_value>[8]</arg_value></tool_call>[15]" in rendered
        with pytest.raises(openai.BadRequestError, match="cannot be held to a form in the way that this model writes them"):
            client.chat.completions.create(**asked, tool_choice="required")


def test_tools_whose_calls_could_not_be_read(tmp_path: Path) -> None:
    launch.make_tiny(tmp_path)
    write_tokenizer(tmp_path, "{{ tools | tojson }}" + TEMPLATE)
    with serving(Engine.from_pretrained(tmp_path, dtype="float32", max_model_len=512, n_pages=PAGES)) as running:
        body = {"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function", "function": {"name": "f"}}]}
        status, _, answer = running.send("POST", "/v1/chat/completions", body)
    assert (status, answer["error"]["param"]) == (400, "tools")
    assert "this model writes its calls in a way that is not known" in answer["error"]["message"]


# ---------------------------------------------------------------- refusals


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": QUESTION, "max_tokens": 2, **fields}


def complete(**fields: Any) -> dict[str, Any]:
    return {"prompt": "x", "max_tokens": 2, **fields}


IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        (CHAT, chat(messages=IMAGE), "messages.0.content.0.type", 'is "image_url": expected "text"'),
        (CHAT, chat(messages=[]), "messages", "at least 1 item"),
        (CHAT, {"max_tokens": 2}, "messages", "messages is missing"),
        (CHAT, chat(messages=[{"role": "root", "content": "x"}]), "messages.0.role", 'expected "system", "user"'),
        (CHAT, chat(messages=[{"role": "user"}]), "messages", "content is missing"),
        (CHAT, chat(messages=[{"role": "user", "content": "x", "weight": 1}]), "messages.0.weight", "is not supported"),
        (CHAT, chat(messages=QUESTION * 3000), "messages", "at most 2048 items"),
        (COMPLETIONS, complete(response_format={"type": "json_object"}), "response_format", "is not supported"),
        (CHAT, chat(audio={"voice": "x"}), "audio", "audio is not supported"),
        (CHAT, chat(modalities=["audio"]), "modalities", "is not supported with the value"),
        (CHAT, chat(logit_bias={"5": 101}), "logit_bias", 'has "5": 101, expected token ids with numbers from -100 to 100'),
        (CHAT, chat(logit_bias={"05": 1}), "logit_bias", 'has "05": 1, expected token ids'),
        (CHAT, chat(logit_bias={str(i): 1 for i in range(1025)}), "logit_bias", "has 1025 fields, at most 1024"),
        (CHAT, chat(logit_bias={"448": 1}), "logit_bias", "token id 448 is not in the vocabulary of 448"),
        (COMPLETIONS, complete(logit_bias=[1]), "logit_bias", "expected an object"),
        (CHAT, chat(guided_regex="(a+)+"), "guided_regex", "is not supported"),
        (CHAT, chat(chat_template="{{ x }}"), "chat_template", "is not supported"),
        (CHAT, chat(chat_template_kwargs={"thinking": False}), "chat_template_kwargs.thinking", "does not let thinking be switched"),
        (CHAT, chat(chat_template_kwargs={"x": 1}), "chat_template_kwargs.x", "is not supported"),
        (CHAT, chat(tools=[{"type": "function", "function": {"name": "f"}}]), "tools", "offers none to the model"),
        (CHAT, chat(messages=[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}]),
         "messages.0.tool_calls.0.type", "is missing"),
        (CHAT, chat(tool_choice="any"), "tool_choice", 'expected "none", "auto" or "required"'),
        (CHAT, chat(n=1_000_000), "n", "is 1000000, expected at most 16"),
        (CHAT, chat(n=0), "n", "is 0, expected at least 1"),
        (CHAT, chat(n=True), "n", "expected an integer"),
        (CHAT, chat(max_tokens=2**63), "max_tokens", f"is {2**63}, expected from 1 to 1024"),
        (CHAT, chat(max_tokens=10**400), "max_tokens", "expected from 1 to 1024"),
        (CHAT, chat(max_completion_tokens=0), "max_completion_tokens", "is 0, expected from 1"),
        (CHAT, chat(temperature="hot"), "temperature", "is \"hot\": expected a number"),
        (CHAT, chat(temperature=-1), "temperature", "is -1.0, expected 0 or a positive number"),
        (CHAT, chat(seed=-1), "seed", "expected from 0"),
        (CHAT, chat(seed=2**64), "seed", "expected from 0"),
        (CHAT, chat(top_p=0), "top_p", "expected above 0"),
        (CHAT, chat(stop=["x"] * 17), "stop", "at most 16 items"),
        (CHAT, chat(stop=["x" * 257]), "stop.0", "at most 256 characters"),
        (CHAT, chat(stop=""), "stop", "expected a string that is not empty"),
        (CHAT, chat(logprobs=3), "logprobs", "true or false"),
        (CHAT, chat(top_logprobs=3), "top_logprobs", "needs logprobs: true"),
        (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs", "is 21, expected at most 20"),
        (CHAT, chat(messages=[{"role": "user", "content": "x " * 2000}]), "messages", "maximum context length is 1024 tokens"),
        (CHAT, chat(prompt="x"), "prompt", "prompt is not supported"),
        (COMPLETIONS, complete(prompt=[]), "prompt", "expected from 1 to 72"),
        (COMPLETIONS, complete(prompt=["x"] * 73), "prompt", "ask for 73 answers"),
        (COMPLETIONS, complete(prompt=[1, 2, 999_999]), "prompt", "token id 999999 is not in the vocabulary"),
        (COMPLETIONS, complete(prompt=[1, -2]), "prompt", "token id -2 is not in the vocabulary"),
        (COMPLETIONS, complete(prompt=[[]]), "prompt", "a prompt is empty"),
        (COMPLETIONS, complete(prompt=[1, "x"]), "prompt.1", "expected an integer"),
        (COMPLETIONS, complete(prompt={}), "prompt", "expected a string"),
        (COMPLETIONS, complete(prompt=list(range(3, 100)) * 20), "prompt", "Your prompt resulted in 1940 tokens "),
        (COMPLETIONS, complete(best_of=2), "best_of", "is not supported with the value 2"),
        (COMPLETIONS, complete(suffix="x"), "suffix", "cannot fill a text in"),
        (COMPLETIONS, complete(logprobs=True), "logprobs", "expected an integer"),
        (COMPLETIONS, complete(max_tokens=0), "max_tokens", "is 0, expected from 1"),
        (COMPLETIONS, complete(stream_options={"x": 1}), "stream_options.x", "is not supported"),
    ],
)  # fmt: skip
def test_refused_fields(demo: tuple[RunningServer, Engine], path: str, body: dict, param: str, says: str) -> None:
    status, _, said = demo[0].send("POST", path, body)
    assert (status, said["error"]["type"], said["error"]["param"]) == (400, "invalid_request_error", param)
    assert says in said["error"]["message"] and said["error"]["message"].count("\n") == 0


@pytest.mark.parametrize(
    ("raw", "status", "says"),
    [
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400, "not JSON that can be read"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', 400, "temperature is Infinity"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "not JSON that can be read"),
        (b"[" * 100_000, 400, "not JSON that can be read"),
        (b"[" + b"[]," * 1_000_000 + b"[]]", 413, "has more than 1048576 values"),
        (b"", 400, "not JSON that can be read"),
        (b"\xff", 400, "not JSON that can be read"),
        (b"[]", 400, "not a JSON object"),
        (b" " * (bodies.MAX_BODY + 1), 413, "has more than"),
        (b'{"messages": [{"role": "user", "content": "x"%s}]}' % b"".join(b', "k%d": 1' % i for i in range(90_000)), 400, "has 90002 fields"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_refused_bodies(demo: tuple[RunningServer, Engine], raw: bytes, status: int, says: str) -> None:
    found, _, said = demo[0].send("POST", CHAT, raw)
    assert found == status and says in said["error"]["message"]


def test_body_without_a_length(demo: tuple[RunningServer, Engine]) -> None:
    """Chunks are counted as they come, whatever the headers say."""
    client = socket.create_connection(("127.0.0.1", demo[0].port), timeout=GENEROUS)
    client.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" % CHAT.encode())
    part = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    with contextlib.suppress(ConnectionError):
        for _ in range(bodies.MAX_BODY // 0x100000 + 40):
            client.sendall(part)
    assert client.recv(1000).startswith(b"HTTP/1.1 413 ")
    client.close()


def test_bodies_are_bounded_together(tiny: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has come of requests that are still being sent counts; when one is given up, its bytes are free again."""
    monkeypatch.setattr(bodies, "MAX_BODIES", 1000)
    with serving(again(tiny)) as running:
        slow = socket.create_connection(("127.0.0.1", running.port), timeout=GENEROUS)
        slow.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2000\r\n\r\n" % CHAT.encode() + b" " * 900)

        def ask() -> tuple[int, str | None]:
            status, headers, said = running.send("POST", COMPLETIONS, {"prompt": "x" * 300, "max_tokens": 1})
            assert status == 200 or "bytes of requests are being read already" in said["error"]["message"]
            return status, headers.get("retry-after")

        await_that(lambda: ask() == (429, "1"), "it has come")
        slow.close()
        await_that(lambda: ask() == (200, None), "it is forgotten")
        for _ in range(4):
            assert ask() == (200, None)


def test_errors_in_the_client(client: openai.OpenAI, demo: tuple[RunningServer, Engine]) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="model", messages=QUESTION, extra_body={"top_k": -1})
    assert wrong.value.param == "top_k"
    assert [model.id for model in client.models.list()] == ["model", "another-name"]
    assert client.models.retrieve("model").max_model_len == 1024
    for method, path, status in (("GET", CHAT, 405), ("POST", "/health", 405), ("GET", "/v2", 404), ("GET", "/v1/models/x", 404)):
        found, _, said = demo[0].send(method, path)
        assert found == status and set(said["error"]) == {"message", "type", "param", "code"}
    assert demo[0].send("GET", "/version")[2] == {"version": PROGRAM_VERSION}


def test_metrics(demo: tuple[RunningServer, Engine], client: openai.OpenAI) -> None:
    def read() -> dict[str, float]:
        lines = demo[0].send("GET", "/metrics")[2].splitlines()
        return {name.partition("{")[0]: float(value) for name, value in
                (line.rsplit(" ", 1) for line in lines if not line.startswith("#") and "bucket" not in line)}  # fmt: skip

    before = read()
    usage = client.chat.completions.create(model="model", messages=QUESTION, temperature=0).usage
    after = await_that(lambda: (now := read())["generation_tokens_total"] > before["generation_tokens_total"] and now, "counted")
    assert after["prompt_tokens_total"] - before["prompt_tokens_total"] == usage.prompt_tokens
    assert after["generation_tokens_total"] - before["generation_tokens_total"] == usage.completion_tokens + 1  # its end
    assert after["time_to_first_token_seconds_count"] - before["time_to_first_token_seconds_count"] == 1
    assert after["inter_token_latency_seconds_count"] - before["inter_token_latency_seconds_count"] == usage.completion_tokens - 1
    assert after["e2e_request_latency_seconds_count"] - before["e2e_request_latency_seconds_count"] == 1
    assert after["spec_decode_num_accepted_tokens_total"] > before["spec_decode_num_accepted_tokens_total"]
    assert after["num_requests_running"] == after["num_requests_waiting"] == after["kv_cache_usage_perc"] == 0


# ---------------------------------------------------------------- who is let in


ROUTES = [("POST", CHAT), ("POST", COMPLETIONS), ("GET", "/v1/models"), ("GET", "/version"), ("GET", "/metrics"), ("GET", "/")]
TRICKS = [
    "{}", "/{}", "{}/", "/health/..{}", "/health/../..{}", "/health{}", "/health;{}", "/health%00{}", "/health?{}", "/health%2f..{}",
    "/./{}", "/%2e{}", "{}?/health", "{}#/health", "http://localhost/health{}", "http://localhost/health/..{}", "/HEALTH{}", "\\health{}",
]  # fmt: skip
CREDENTIALS = [
    None, "", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Bearer {KEY.upper()}", KEY, f"Token {KEY}",
    f"Bearer\t{KEY}", f"Bearer {KEY} {KEY}", "Basic", "Basic !", "Basic " + base64.b64encode(f"{KEY}:".encode()).decode(),
    "Basic " + base64.b64encode(KEY.encode()).decode(), "Bearer " + "x" * 10_000, "Bearer \xff",
]  # fmt: skip


def raw_status(port: int, method: str, path: str, *headers: str) -> int:
    with socket.create_connection(("127.0.0.1", port), timeout=GENEROUS) as client:
        lines = [f"{method} {path} HTTP/1.1", *headers, "Content-Length: 2", "Connection: close", "", "{}"]
        client.sendall("\r\n".join(lines).encode("latin-1"))
        return int(client.recv(100).split()[1])


def test_every_route_needs_the_key(tiny: Engine) -> None:
    with serving(again(tiny), key=KEY) as running:
        right = f"Authorization: Bearer {KEY}"
        for method, route in ROUTES:
            for wrong in CREDENTIALS:
                headers = ("Host: x",) if wrong is None else ("Host: x", f"Authorization: {wrong}")
                assert raw_status(running.port, method, route, *headers) == 401, (route, wrong)
            assert raw_status(running.port, method, route, "Host: x", right, right) == 401
            assert raw_status(running.port, method, route, "Host: evil.com", right) in (200, 400, 404)
            for verb in ("GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE", "TRACE", "PATCH", "get", "X"):
                for trick in TRICKS:
                    path = trick.format(route)
                    opens = path.partition("?")[0] == "/health"
                    found = raw_status(running.port, verb, path, "Host: localhost")
                    assert found in ((200, 400, 405) if opens else (400, 401)), (verb, path, found)
        for path in ("//health", "/health/", "/%68ealth", "/healt%68", "/./health", "/x/../health", "/HEALTH", "/health%3f", "/health%00",
                     "http://x/health", "health", "*"):  # fmt: skip
            assert raw_status(running.port, "GET", path, "Host: x") in (400, 401), path
        assert raw_status(running.port, "GET", "/health", "Host: x") == 200
        basic = "Authorization: Basic " + base64.b64encode(f"me:{KEY}".encode()).decode()
        assert raw_status(running.port, "GET", "/version", "Host: x", basic) == 200
        assert raw_status(running.port, "GET", "/version", "Host: x", basic, "Origin: http://evil.com") == 403
        assert raw_status(running.port, "GET", "/version", "Host: x", basic, "Origin: https://x") == 200
        for path, challenge in (("/", "Basic "), ("/version", "Bearer")):
            status, headers, said = running.send("GET", path, Authorization="none")
            assert status == 401 and headers["www-authenticate"].startswith(challenge)
            assert said["error"]["code"] == "invalid_api_key"


def test_without_a_key_only_this_machine_by_name(demo: tuple[RunningServer, Engine]) -> None:
    port = demo[0].port
    for host in ("localhost", "127.0.0.1", "LOCALHOST:1", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert raw_status(port, "GET", "/version", f"Host: {host}") == 200
    for host in ("evil.com", f"evil.com:{port}", "localhost.evil.com", "127.0.0.1.evil.com", "localhost:x", "", "localhost:80:80",
                 "user@localhost", "0.0.0.0", "127.0.0.2", "localhost,evil.com"):  # fmt: skip
        for path in ("/version", "/health", "/"):
            assert raw_status(port, "GET", path, f"Host: {host}") in (400, 403), host
    assert raw_status(port, "GET", "/version", "Host: localhost", "Host: evil.com") == 400
    assert raw_status(port, "GET", "http://evil.com/version", "Host: evil.com") == 403
    assert raw_status(port, "GET", "/version", "Host: localhost", "X-Forwarded-Host: evil.com", "X-Forwarded-For: 1.2.3.4") == 200
    for origin, status in (("http://evil.com", 403), ("null", 403), ("http://localhost", 200), ("http://localhost:1", 403)):
        assert raw_status(port, "GET", "/version", "Host: localhost", f"Origin: {origin}") == status
    assert raw_status(port, "GET", "/version", "Host: localhost", f"X: {'x' * 33_000}") in (400, 431)
    assert "access-control-allow-origin" not in demo[0].send("GET", "/version", Origin="http://127.0.0.1")[1]


def test_cors_where_asked(tiny: Engine) -> None:
    ours, ask = "https://app.example", {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with serving(again(tiny), key=KEY, origins=(ours,)) as running:
        status, headers, _ = running.send("OPTIONS", CHAT, None, Origin=ours, Authorization="none", **ask)
        assert status == 200 and headers["access-control-allow-origin"] == ours
        assert running.send("OPTIONS", CHAT, None, Origin="https://evil.com", **ask)[0] == 400
        status, headers, _ = running.send("GET", "/version", Origin=ours)
        assert status == 200 and headers["access-control-allow-origin"] == ours
        assert running.send("GET", "/version", Origin=ours, Authorization="Bearer wrong-key")[0] == 401


# ---------------------------------------------------------------- load


LONG = {"prompt": "hello", "max_tokens": 400, "temperature": 0}


def test_queue_is_bounded(tiny: Engine) -> None:
    engine = again(tiny, max_num_seqs=2)
    gate = Gate(engine)
    with serving(engine, max_queue=3) as running, gate:
        clients = [running.start(COMPLETIONS, {**LONG, "max_tokens": 4}) for _ in range(5)]
        await_that(lambda: sum(answer.open for answer in running.engine_thread._answers) == 5, "five are in")
        for body in (LONG, {**LONG, "stream": True}):
            status, headers, said = running.send("POST", COMPLETIONS, body)
            assert (status, headers["retry-after"], said["error"]["code"]) == (429, "1", "queue_full")
        assert running.send("GET", "/health")[0] == 200
        gate.open()
        for client in clients:
            assert client.recv(100).startswith(b"HTTP/1.1 200 ")
            client.close()
        status, _, said = running.send("POST", CHAT, {"messages": QUESTION, "max_tokens": 1, "n": 6})  # never, however empty it is
        assert (status, said["error"]["param"]) == (400, "n") and "this server takes, 5" in said["error"]["message"]
        assert running.send("POST", COMPLETIONS, {**LONG, "max_tokens": 1, "n": 5})[0] == 200
        running.idle(PAGES)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_pages_in_a_step(tiny: Engine, stream: bool) -> None:
    engine = again(tiny)
    gate = Gate(engine)
    with serving(engine) as running, gate:
        client = running.start(COMPLETIONS, {**LONG, "stream": stream})
        await_that(lambda: running.engine_thread._answers, "it is in")
        for _ in range(3):
            gate.step_once()
        await_that(lambda: engine.stats.steps == 3, "it runs")
        client.close()
        await_that(lambda: not running.engine_thread._answers, "the server has noticed")
        gate.step_once()  # the engine may be waiting within the one step before the order
        gate.step_once()
        await_that(lambda: not engine.busy, "cancelled")
        assert engine.stats.steps <= 4
        gate.open()
        running.idle(PAGES)


@pytest.mark.parametrize("n", [20, pytest.param(500, marks=pytest.mark.trust)])
def test_disconnects_lose_no_page(tiny: Engine, n: int) -> None:
    """Clients that leave at any moment: while sending, while the answer is made, streaming or not, or never."""
    draw = random.Random(5)
    with serving(again(tiny, max_num_seqs=4), max_queue=1000) as running:
        before = running.send("POST", COMPLETIONS, {**LONG, "max_tokens": 20})[2]["choices"]
        for _ in range(n):
            body = {**LONG, "max_tokens": draw.randint(1, 60), "n": draw.choice((1, 1, 3)), "stream": draw.random() < 0.5,
                    "prompt": "x" * draw.randint(1, 300)}  # fmt: skip
            if draw.random() < 0.2:
                with socket.create_connection(("127.0.0.1", running.port)) as client:
                    client.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{" % CHAT.encode())
                continue
            client = running.start(COMPLETIONS, body)
            if draw.random() < 0.7:
                client.settimeout(draw.choice((0.001, 0.01, 0.05)))
                with contextlib.suppress(TimeoutError):
                    client.recv(draw.choice((1, 1000)))
            if draw.random() < 0.3:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # a reset
            client.close()
        await_that(lambda: not running.engine_thread._n_open and not running.engine_thread._choices, "all have left")
        running.idle(PAGES)
        assert running.send("POST", COMPLETIONS, {**LONG, "max_tokens": 20})[2]["choices"] == before


def test_a_slow_reader_delays_nobody_and_is_cut_off(tiny: Engine) -> None:
    """Its buffers fill up, then the server's, then it is given up; others are answered meanwhile."""
    with serving(again(tiny), backlog=20_000) as running:
        asked = {**LONG, "n": 2, "logprobs": 20, "stream": True}
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", running.port))
        raw = json.dumps(asked).encode()
        slow.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (COMPLETIONS.encode(), len(raw)) + raw)
        await_that(lambda: running.engine_thread._answers, "it is in")
        while running.engine_thread._answers:
            status, _, said = running.send("POST", COMPLETIONS, {**LONG, "max_tokens": 2})
            assert status == 200 and said["usage"]["completion_tokens"] == 2
        running.idle(PAGES)
        text = rest(slow, until=b"\r\n0\r\n\r\n")
    assert b"was read too slowly" in text and b"[DONE]" not in text


def long_prompts(running: RunningServer, *texts: str) -> float:
    """Each is refused, for it does not fit; returns the longest that /health took meanwhile, in seconds."""
    longest = 0.0
    for text in texts:
        for path, body in ((CHAT, {"messages": [{"role": "user", "content": text}]}), (COMPLETIONS, {"prompt": text})):
            raw = json.dumps(body, ensure_ascii=False).encode()
            with watched(running) as times:
                status, _, said = running.send("POST", path, raw)
            assert (status, said["error"]["code"]) == (400, "context_length_exceeded")
            longest = max(longest, *times)
    return longest


def test_a_million_characters(demo: tuple[RunningServer, Engine]) -> None:
    assert long_prompts(demo[0], "<" * 1_000_000) < 5


@pytest.mark.trust
def test_a_million_characters_hold_nobody_up(processes: list[Process]) -> None:
    """In a process of its own, so that it is the server alone that is measured."""
    processes.append(Process("--ckpt-path", DEMO, *FLAGS))
    texts = "hello wor1d " * 83_334, "<" * 1_000_000, "<｜User｜>" * 111_112, "🙂" * 1_000_000, "a" * 1_000_000, " " * 1_000_000
    longest = long_prompts(processes[0].ready(), "short" * 2000, *texts)
    assert longest < 0.1


@contextlib.contextmanager
def watched(running: RunningServer) -> Iterator[list[float]]:
    """Seconds that /health took, again and again, meanwhile."""
    times: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set() or not times:
            began = time.perf_counter()
            assert running.send("GET", "/health")[0] == 200
            times.append(time.perf_counter() - began)
            time.sleep(0.005)

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            yield times
        finally:
            done.set()
        watching.result()


@pytest.mark.parametrize(("clients", "each"), [(8, 1), pytest.param(64, 4, marks=pytest.mark.trust)])
def test_answers_do_not_depend_on_other_clients(clients: int, each: int) -> None:
    """Batch-invariant mode: sampled answers and their log-probabilities are those of each request alone."""
    engine = Engine.from_pretrained(DEMO, max_model_len=512, n_pages=PAGES, deterministic=True)
    bodies = [
        chat(messages=[{"role": "user", "content": f"What is {17 * i % 900} + {31 * i % 900}?" * (1 + i % 5)}], seed=i,
             temperature=4, max_tokens=8, logprobs=True, stream=i % 3 == 0)
        for i in range(clients * each)
    ]  # fmt: skip

    def content(answer: Any) -> Any:
        if isinstance(answer, str):
            parts = [part["logprobs"] for event in events(answer) for part in event["choices"]]
            return [entry for part in parts if part for name in sorted(part) for entry in part[name] or []]
        found = answer["choices"][0]["logprobs"]
        return [entry for name in ("reasoning_content", "content") for entry in found.get(name) or []]

    with serving(engine, max_queue=1000) as running:
        with ThreadPoolExecutor(clients) as pool:
            together = [content(said) for _, _, said in pool.map(lambda body: running.send("POST", CHAT, body), bodies)]
        alone = [content(running.send("POST", CHAT, body)[2]) for body in bodies]
    assert together == alone
    assert len({json.dumps(answer) for answer in alone}) > clients * each * 0.9


# ---------------------------------------------------------------- fuzzing


JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2, 1.5, -0.0, 1e308, 2**31, 2**63, 2**64, -(2**63), 10**300, "", "x", "\x00", "<｜User｜>", "🙂",
    "x" * 5000, [], [[]], [None], ["x"], [0], [1, "x"], {}, {"x": 1}, {"type": "text"}, [{}], [[[[[[]]]]]], {"a": {"b": {"c": []}}},
]  # fmt: skip


def junk(draw: random.Random) -> Any:
    return copy.deepcopy(draw.choice(JUNK))


def from_schema(schema: dict[str, Any], root: dict[str, Any], draw: random.Random, wrong: float, depth: int = 0) -> Any:
    """A value that a JSON schema describes, with parts of it junk at that rate."""
    if draw.random() < wrong or depth > 8:
        return junk(draw)
    if "$ref" in schema:
        return from_schema(root["$defs"][schema["$ref"].rpartition("/")[2]], root, draw, wrong, depth + 1)
    for either in ("anyOf", "oneOf"):
        if either in schema:
            return from_schema(draw.choice(schema[either]), root, draw, wrong, depth + 1)
    if "const" in schema or "enum" in schema:
        return draw.choice(schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "object":
        names = schema.get("properties", {})
        needed = set(schema.get("required", ()))
        given = [name for name in names if name in needed or draw.random() < 0.2]
        found = {name: from_schema(names[name], root, draw, wrong, depth + 1) for name in given}
        return found | ({draw.choice(["x", "model", "stop", "prompt"]): junk(draw)} if draw.random() < wrong else {})
    if kind == "array":
        most = min(schema.get("maxItems", 4), 4)
        return [from_schema(schema.get("items", {}), root, draw, wrong, depth + 1) for _ in range(draw.randint(schema.get("minItems", 0), most))]
    if kind == "integer":
        return draw.choice([schema.get("minimum", 0), schema.get("maximum", 3), draw.randint(-2, 40), 5, 2])
    if kind == "number":
        return draw.choice([0, 1, 0.5, 1.0, draw.uniform(-3, 3)])
    if kind == "string":
        return draw.choice(["hello", "Ünïcödé 🙂", "", "<think>", "x" * draw.randint(0, 400), "model", "find", "get_time", '{"a": 1}'])
    return {"boolean": draw.random() < 0.5, "null": None}.get(kind, junk(draw))


def fuzzed(draw: random.Random) -> tuple[str, bytes]:
    path, kind = draw.choice([(CHAT, ChatBody), (COMPLETIONS, CompletionBody)])
    schema = kind.model_json_schema()
    body = from_schema(schema, schema, draw, wrong=draw.choice([0, 0.02, 0.06]))
    if isinstance(body, dict):
        body.setdefault("max_tokens", draw.randint(1, 4))
        if draw.random() < 0.3:
            body[draw.choice([*OFF["body"], *sorted(IGNORED["body"])])] = junk(draw)
    raw = json.dumps(body, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    chance = draw.random()
    if chance < 0.05:
        return path, raw[: draw.randrange(len(raw) + 1)]
    if chance < 0.1:
        at = draw.randrange(len(raw) + 1)
        return path, raw[:at] + draw.choice([b"\xff", b"\x00", b'"', b"{", b"[" * 300, b"NaN", b"1e999", b"\\ud800"]) + raw[at:]
    return path, raw


@pytest.mark.parametrize("n", [200, pytest.param(5000, marks=pytest.mark.trust)])
def test_fuzzed_bodies(tiny: Engine, n: int) -> None:
    """Whatever is asked is answered or refused, never failed at; nothing is left over, and /health keeps answering."""
    draw = random.Random(n)
    cases = [fuzzed(draw) for _ in range(n)]
    with serving(again(tiny, max_model_len=96), max_queue=100) as running, watched(running) as times:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda case: running.send("POST", *case), cases))
        for (path, raw), (status, _, said) in zip(cases, found, strict=True):
            assert status in (200, 400, 404), (path, raw, status, said)
            if status == 200 and isinstance(said, str):
                assert said.endswith("data: [DONE]\n\n"), (path, raw, said)
            elif status != 200:
                assert set(said["error"]) == {"message", "type", "param", "code"} and "\n" not in said["error"]["message"]
        statuses = [status for status, _, _ in found]
        assert min(statuses.count(200), statuses.count(400)) > n // 10, "both kinds are exercised"
        running.idle(PAGES)
    assert max(times) < (0.1 if n > 1000 else 5)


# ---------------------------------------------------------------- processes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--ckpt-path C --host 0.0.0.0", "--host 0.0.0.0 lets other machines in: that needs --api-key"),
        ("--ckpt-path C --host ::", "--host :: lets other machines in: that needs --api-key"),
        ("--ckpt-path C --host example.com", "--host example.com lets other machines in: that needs --api-key"),
        ("--ckpt-path C --api-key short", "--api-key: expected at least 8 printable ASCII characters, without spaces"),
        ("--ckpt-path C --api-key @/no/such/file", "--api-key @/no/such/file: No such file or directory"),
        ("--ckpt-path C --drain-seconds -1", "--drain-seconds is -1.0, expected from 0 to a day"),
        ("--ckpt-path C --port 70000", "argument --port: 70000 is no port"),
        ("--ckpt-path C --max-queue 0", "argument --max-queue: 0 is not at least 1"),
        ("", "the following arguments are required: --ckpt-path"),
    ],
)  # fmt: skip
def test_wrong_flags(flags: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(server.KEY_VARIABLE, raising=False)
    with pytest.raises(UserError, match=re.escape(message)):
        server.parse(flags.split())


def test_prompts_beside_answers_are_cut_smaller_on_a_cpu() -> None:
    for flags, on_cpu, on_gpu in (([], CPU_MIXED_TOKENS, None), (["--max-num-mixed-tokens", "40"], 40, 40)):
        config = run_config(server.parse(["--ckpt-path", "C", *flags]))
        assert replace(config, device="cpu").for_serving().max_num_mixed_tokens == on_cpu
        assert replace(config, device="cuda").for_serving().max_num_mixed_tokens == on_gpu
    assert "max_num_mixed_tokens" not in generate.parse(["--ckpt-path", "C", "--interactive"])
    flags = ["--ckpt-path", str(DEMO), "--device", "cpu", "--threads", "1", "--kv-cache-gib", "0.1", "--max-model-len", "512"]
    assert load(server.parse(flags), SOLO, lambda: None, chat=False)[0].scheduler.max_num_mixed_tokens == 64


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    monkeypatch.setenv(server.KEY_VARIABLE, "from-the-environment")
    assert server.parse(["--ckpt-path", "C"]).api_key == "from-the-environment"
    assert server.parse(["--ckpt-path", "C", "--host", "0.0.0.0", "--api-key", f"@{tmp_path / 'key'}"]).api_key == KEY


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for process in started:
        process.close()


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch.make_tiny(tmp_path_factory.mktemp("server") / "endless", printable=True)


FLAGS = ("--port", 0, "--device", "cpu", "--threads", 1, "--max-model-len", 2560)


def rest(client: socket.socket, until: bytes | None = None) -> bytes:
    """What is still to come of an answer."""
    client.settimeout(GENEROUS)
    text = b""
    while not (until and text.endswith(until)) and (part := client.recv(1 << 16)):
        text += part
    client.close()
    return text


def two_ranks(endless: Path, processes: list[Process], lanes: int = 1, stages: int = 1) -> RunningServer:
    port = launch.free_port()
    for rank in range(2):
        layout = "--dp", lanes, "--pp", stages
        run = launch.start_rank(rank, 2, port, run=server_command("--ckpt-path", endless, *layout, *FLAGS))
        processes.append(Process(run=run))
    return processes[0].ready()


@pytest.mark.parametrize("lanes", [2, pytest.param(1, marks=pytest.mark.trust)])
def test_ranks_let_answers_finish(endless: Path, processes: list[Process], lanes: int) -> None:
    """torchrun tells every rank to end: an answer from before that is given in full, one asked for later is refused.
    With lanes one is in each, and a client leaves both before."""
    running = two_ranks(endless, processes, lanes)
    leavers = [running.start(COMPLETIONS, {"prompt": "x", "max_tokens": 2000, "stream": True}) for _ in range(lanes)]
    assert all(b"200 OK" in leaver.recv(1000) for leaver in leavers)
    for leaver in leavers:
        leaver.close()
    await_that(lambda: "num_requests_running{model_name" in (said := running.send("GET", "/metrics")[2])
               and all(line.endswith(" 0.0") for line in said.splitlines() if "num_requests_running{" in line), "they left")
    clients = [running.start(COMPLETIONS, {"prompt": "x", "max_tokens": 200, "stream": True}) for _ in range(lanes)]
    assert all(b"200 OK" in client.recv(1000) for client in clients)
    for process in reversed(processes):
        process.child.send_signal(signal.SIGTERM)
    processes[0].says("ending: running answers may finish")
    status, _, said = running.send("POST", COMPLETIONS, LONG)
    assert (status, said["error"]["message"]) == (503, "the engine is shutting down")
    assert running.send("GET", "/health")[0] == 503
    for client in clients:
        text = rest(client)
        assert b'"finish_reason":"length"' in text and b"[DONE]" in text
    assert [process.left() for process in processes] == [0, 0]
    assert launch.errors("".join(processes[0].said + processes[1].said)) == []


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    caught = re.search(r"SigCgt:\t(\w+)", Path(f"/proc/{pid}/status").read_text())
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def test_ranks_end_while_they_load(endless: Path, processes: list[Process], tmp_path: Path) -> None:
    """Told to end, or alone because the other was: nobody loads on, and one line is told."""
    port = launch.free_port()
    for file in endless.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "tokenizer.json")  # rank 0 waits for what it says
    keeper = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # as torchrun's agent does
    for rank in range(2):
        run = launch.start_rank(rank, 2, port, run=server_command("--ckpt-path", tmp_path, *FLAGS), agent=True)
        processes.append(Process(run=run))
    processes[0].says("listening on")
    for process in processes:
        await_that(lambda process=process: catches(process.child.pid, signal.SIGTERM), "it listens to signals")
    processes[0].child.send_signal(signal.SIGTERM)
    assert processes[0].left() == 128 + signal.SIGTERM
    processes[1].child.send_signal(signal.SIGTERM)
    assert processes[1].left() == 1
    assert launch.errors("".join(processes[0].said + processes[1].said)) == ["error: stopped from outside (SIGTERM)"]
    del keeper


@pytest.mark.parametrize("busy", [False, pytest.param(True, marks=pytest.mark.trust)])
def test_a_dead_rank_ends_the_server(endless: Path, processes: list[Process], busy: bool) -> None:
    """Idle or answering: noticed within seconds, told to whoever waits, and the exit status says so."""
    running = two_ranks(endless, processes)
    assert running.send("POST", COMPLETIONS, {**LONG, "max_tokens": 5})[0] == 200
    if busy:
        client = running.start(COMPLETIONS, {"prompt": "x", "max_tokens": 2500, "stream": True})
        assert b"200 OK" in client.recv(1000)
    processes[1].child.kill()
    began = time.monotonic()
    if busy:
        assert b"the engine has failed" in rest(client)
    assert processes[0].left() == 1
    assert time.monotonic() - began < 30
    (line,) = launch.errors("".join(processes[0].said))
    assert line.startswith("error: rank 0 lost contact with rank 1, which has died")


def test_two_stages_serve_until_one_dies(endless: Path, processes: list[Process]) -> None:
    """A stream and answers beside it are those of one rank. The first stage's end, in the middle of a stream, is told to
    the client, and in one line."""
    body = {"prompt": "hello", "max_tokens": 12, "temperature": 0}
    [alone] = Engine.from_pretrained(endless, device="cpu").generate(["hello"], SamplingParams(12, temperature=0))
    running = two_ranks(endless, processes, stages=2)
    text = rest(running.start(COMPLETIONS, {**body, "stream": True}), until=b"\r\n0\r\n\r\n").decode()
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events if event["choices"]) == alone.text
    assert "data: [DONE]" in text and len(events) > 5
    status, _, several = running.send("POST", COMPLETIONS, {**body, "n": 3})
    assert status == 200 and [choice["text"] for choice in several["choices"]] == [alone.text] * 3
    client = running.start(COMPLETIONS, {"prompt": "x", "max_tokens": 2500, "stream": True})
    assert b"200 OK" in client.recv(1000)
    processes[1].child.kill()
    assert b"the engine has failed" in rest(client)
    assert processes[0].left() == 1
    (line,) = launch.errors("".join(processes[0].said))
    assert line.startswith("error: rank 0 lost contact with rank 1, which has died")


def test_a_second_signal_ends_at_once(endless: Path, processes: list[Process]) -> None:
    process = Process("--ckpt-path", endless, *FLAGS, "--drain-seconds", 3600)
    processes.append(process)
    client = process.ready().start(COMPLETIONS, {"prompt": "x", "max_tokens": 2500, "stream": True, "n": 8})
    assert b"200 OK" in client.recv(1000)
    process.child.send_signal(signal.SIGTERM)
    process.says("ending: running answers may finish")
    process.child.send_signal(signal.SIGINT)
    assert process.left() == 128 + signal.SIGINT
    assert launch.errors("".join(process.said)) == ["error: stopped from outside (SIGINT)"]
    client.close()


def test_draining_has_an_end(tiny: Engine) -> None:
    with serving(again(tiny)) as running:
        client = running.start(COMPLETIONS, {**LONG, "stream": True, "n": 8})
        assert b"200 OK" in client.recv(1000)
        running.on_loop(running.engine_thread.drain(0))
        text = rest(client, until=b"\r\n0\r\n\r\n")
        assert b"the engine is shutting down" in text and b"[DONE]" not in text
        running.on_loop(running.engine_thread.ended.wait())
        assert running.send("POST", COMPLETIONS, LONG)[2]["error"]["message"] == "the engine is shutting down"


def test_draining_leaves_finished_answers_to_slow_readers(tiny: Engine) -> None:
    with serving(again(tiny)) as running:
        client = running.start(COMPLETIONS, {**LONG, "max_tokens": 200, "logprobs": 5, "stream": True, "n": 8})
        assert b"200 OK" in client.recv(1000)
        running.idle(PAGES)
        running.on_loop(running.engine_thread.drain(20))
        running.on_loop(running.engine_thread.ended.wait())
        text = rest(client, until=b"\r\n0\r\n\r\n")
        assert text.count(b'"finish_reason":"') == 8 and b"[DONE]" in text and b"shutting down" not in text


def test_an_engine_that_does_not_load_or_fails(tiny: Engine) -> None:
    """Its error ends the server; until then clients are told."""
    options = server.parse(["--ckpt-path", "C", "--port", "0"])
    listener = server.listen(options.host, options.port)
    running = RunningServer(listener.getsockname()[1], None)
    with pytest.raises(UserError, match="Address already in use"):
        server.listen(options.host, running.port)
    engine, asked, go = again(tiny), threading.Event(), threading.Event()

    def step() -> list:
        raise ValueError("a broken step")

    def load() -> Engine:
        asked.set()
        assert go.wait(GENEROUS)
        engine.step = step  # type: ignore[method-assign]
        return engine

    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(lambda: asyncio.run(serve(options, SOLO, listener, load, Engine.close)))
        assert asked.wait(GENEROUS)
        assert running.send("GET", "/health")[::2] == (503, {"status": "loading"})
        for method, path in (("POST", CHAT), ("GET", "/v1/models")):
            status, headers, said = running.send(method, path, {})
            assert (status, headers["retry-after"]) == (503, "5") and "the engine is loading" in said["error"]["message"]
        assert running.send("GET", "/metrics")[0] == 200
        go.set()
        await_that(lambda: running.send("GET", "/health")[0] == 200, "it is ready")
        status, _, said = running.send("POST", COMPLETIONS, LONG)
        assert (status, said["error"]["message"]) == (503, "the engine has failed")
        with pytest.raises(ValueError, match="a broken step"):
            serving.result(GENEROUS)
