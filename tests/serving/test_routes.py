"""The routes that clients configure: prefixes, /tokenize, /detokenize and /v1/responses."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from core.run_config import RunConfig
from core.sampling_params import SamplingParams
from engine import sampler
from engine.engine import Engine
from serving.errors import ApiError
from serving.responses_request import chat_body, messages_of
from support import processes as launch
from support.http_server import GENEROUS, RunningServer, serving
from support.tiny_tokenizer import TEMPLATE, write_tokenizer
from text.parser import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR

DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"
QUESTION = "What is 347 + 285?"


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[RunningServer, Engine]]:
    """The demo, and an engine of the same model that answers alone."""
    engine = Engine.from_pretrained(DEMO, dtype="float32", max_model_len=1024, n_pages=40)
    alone = Engine(engine.model, engine.tokenizer, RunConfig(max_model_len=1024, n_pages=40))
    with serving(engine) as running:
        yield running, alone


@pytest.fixture(scope="module")
def client(demo: tuple[RunningServer, Engine]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo[0].url}/v1", api_key="none", max_retries=0, timeout=GENEROUS) as client:
        yield client


def test_prefixes_and_slashes(demo: tuple[RunningServer, Engine]) -> None:
    running = demo[0]
    chat = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 2}
    for prefix in ("/v1", "", "/beta"):
        for slash in ("", "/"):
            assert running.send("POST", f"{prefix}/chat/completions{slash}", chat)[0] == 200
            assert running.send("POST", f"{prefix}/completions{slash}", {"prompt": "x", "max_tokens": 1})[0] == 200
            assert running.send("GET", f"{prefix}/models{slash}")[2]["data"][0]["id"] == "model"
            assert running.send("GET", f"{prefix}/models/model{slash}")[2]["id"] == "model"
            assert running.send("POST", f"{prefix}/tokenize{slash}", {"prompt": "x"})[0] == 200
    for path in ("/health/", "/version/", "/metrics/"):
        assert running.send("GET", path)[0] == 200
    status, _, said = running.send("POST", "/v1/embeddings", {})
    assert status == 404 and said["error"]["message"].startswith("there is no route POST /v1/embeddings; there are ") and ":path" not in str(said)
    for route in ("POST /v1/chat/completions", "POST /v1/responses", "POST /v1/tokenize", "GET /v1/models", "GET /health"):
        assert route in said["error"]["message"]
    status, headers, said = running.send("GET", "/v1/completions")
    assert (status, headers["allow"]) == (405, "POST") and said["error"]["message"].endswith("this route takes POST")


def test_tokenize_and_back(demo: tuple[RunningServer, Engine]) -> None:
    running, tokenizer = demo[0], demo[1].tokenizer
    assert tokenizer is not None
    prompt = "What is 3 + 4? 你好 <think>"
    ids = tokenizer.encode_text(prompt)
    asked = {"model": "model", "prompt": prompt, "return_token_strs": True}
    status, _, said = running.send("POST", "/tokenize", asked)
    assert (status, said["tokens"], said["count"], said["max_model_len"]) == (200, ids, len(ids), 1024)
    assert b"".join(map(tokenizer.name, ids)).startswith(said["token_strs"][0].encode())
    status, _, said = running.send("POST", "/tokenize", {"prompt": prompt, "add_special_tokens": False})
    assert said["tokens"] == tokenizer.encode_text(prompt, alone=True) and said["token_strs"] is None
    assert running.send("POST", "/detokenize", {"tokens": said["tokens"]})[2] == {"prompt": prompt}
    messages = [{"role": "user", "content": QUESTION}]
    for more in ({}, {"add_generation_prompt": False}):
        _, _, said = running.send("POST", "/tokenize", {"messages": messages, **more})
        assert said["tokens"] == tokenizer.encode_chat(messages, **more)
        text = tokenizer.render_chat(messages, **more)
        assert running.send("POST", "/detokenize", {"tokens": said["tokens"], "model": "model"})[2]["prompt"] == text
    _, _, said = running.send("POST", "/tokenize", {"prompt": "x " * 5000})
    assert said["count"] > said["max_model_len"], "what does not fit is counted too"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"prompt": ["x"]}, "prompt"),
        ("/tokenize", {"prompt": "x", "add_special_tokens": 1}, "add_special_tokens"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x " * 3_000_000}, "prompt"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens"),
        ("/detokenize", {"tokens": [1, 10**9]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [1], "prompt": "x"}, "prompt"),
        ("/detokenize", {"tokens": [1], "model": 3}, "model"),
    ],
    ids=str,
)
def test_what_cannot_be_tokenized(demo: tuple[RunningServer, Engine], path: str, body: dict, param: str) -> None:
    status, _, said = demo[0].send("POST", path, body)
    assert (status, said["error"]["param"]) == (400, param)


# ---------------------------------------------------------------- responses


def test_a_response_is_what_the_engine_says(demo: tuple[RunningServer, Engine], client: openai.OpenAI) -> None:
    """By OpenAI's client, whole and streamed; the events add up to the response."""
    (expected,) = demo[1].generate([[{"role": "user", "content": QUESTION}]], SamplingParams(max_new_tokens=200, temperature=0))
    asked: Any = dict(model="model", input=QUESTION, temperature=0, max_output_tokens=200)
    whole = client.responses.create(**asked)
    assert (whole.status, whole.output_text, whole.error) == ("completed", expected.parts[1], None)
    reasoning, message = whole.output
    assert (reasoning.type, reasoning.content[0].text) == ("reasoning", expected.parts[0])
    assert (message.type, message.status, message.role) == ("message", "completed", "assistant")
    assert whole.usage is not None
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (len(expected.prompt), len(expected.tokens))
    assert whole.usage.output_tokens_details.reasoning_tokens > 0 and whole.temperature == 0
    kinds, texts, numbers = [], {"reasoning": "", "output": ""}, []
    for event in client.responses.create(**asked, stream=True):
        kinds.append(event.type)
        numbers.append(event.sequence_number)
        if event.type in ("response.output_text.delta", "response.reasoning_text.delta"):
            texts["output" if "output" in event.type else "reasoning"] += event.delta
    assert numbers == list(range(len(numbers)))
    assert (texts["reasoning"], texts["output"]) == expected.parts
    item = ["response.output_item.added", "response.content_part.added"]
    done = ["response.content_part.done", "response.output_item.done"]
    without_deltas = [kind for kind in kinds if not kind.endswith(".delta")]
    assert without_deltas == [
        "response.created", "response.in_progress", *item, "response.reasoning_text.done", *done,
        *item, "response.output_text.done", *done, "response.completed",
    ]  # fmt: skip
    with client.responses.stream(**asked) as stream:  # the client adds the events up itself
        final = stream.get_final_response()
    assert final.output_text == whole.output_text


def test_a_conversation_of_responses(client: openai.OpenAI) -> None:
    """The output goes back as input, and the answer to it is the chat's."""
    first = client.responses.create(model="model", input=QUESTION, temperature=0, instructions="Add.")
    turns: Any = [{"role": "user", "content": QUESTION}, *first.output, {"role": "user", "content": [{"type": "input_text", "text": "What is 12 + 30?"}]}]
    second = client.responses.create(model="model", input=turns, temperature=0, instructions="Add.")
    chat: Any = [{"role": "system", "content": "Add."}, {"role": "user", "content": QUESTION},
                 {"role": "assistant", "content": first.output_text}, {"role": "user", "content": "What is 12 + 30?"}]  # fmt: skip
    same = client.chat.completions.create(model="model", messages=chat, temperature=0)
    assert second.output_text == same.choices[0].message.content == "42"
    assert second.usage.input_tokens == same.usage.prompt_tokens
    assert second.instructions == "Add."


def test_a_response_that_is_cut_off(client: openai.OpenAI) -> None:
    cut = client.responses.create(model="model", input=QUESTION, temperature=0, max_output_tokens=3)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert cut.output[-1].type == "message" and cut.output[-1].status == "incomplete"
    last = list(client.responses.create(model="model", input=QUESTION, max_output_tokens=3, stream=True))[-1]
    assert last.type == "response.incomplete"


def test_a_response_that_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that says what it is told to: two calls, the second without arguments, and then their results."""
    markers = (CALLS_BEGIN, CALL_BEGIN, SEPARATOR, CALL_END, CALLS_END)
    template = "{% if tools %}{{ tools | tojson }}{{ '" + f"{CALL_BEGIN}x{SEPARATOR}" + "' }}{% endif %}" + TEMPLATE
    launch.make_tiny(tmp_path)
    write_tokenizer(tmp_path, template, markers)
    engine = Engine.from_pretrained(tmp_path, dtype="float32", max_model_len=512, n_pages=40)
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    said = ["I look: ", CALLS_BEGIN, CALL_BEGIN, "add", SEPARATOR, '{"a": 1}', CALL_END, CALL_BEGIN, "now", SEPARATOR, "{}", CALL_END, CALLS_END]
    script = [t for run in said for t in ([tokenizer._added[run]] if run in markers else tokenizer._encode_plain(run))] + [1]
    monkeypatch.setattr(sampler, "verify", lambda logits, asks, _: [[script[len(a.tokens) - a.n_prompt]] for a in asks])
    tools: Any = [{"type": "function", "name": name, "parameters": {"type": "object"}} for name in ("add", "now")]
    with serving(engine) as running, openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", timeout=GENEROUS) as client:
        asked: Any = dict(model="model", input="hi", tools=tools)
        whole = client.responses.create(**asked)
        message, add, now = whole.output
        assert (message.content[0].text, whole.status) == ("I look: ", "completed")
        assert (add.type, add.name, json.loads(add.arguments), add.status) == ("function_call", "add", {"a": 1}, "completed")
        assert (now.name, json.loads(now.arguments)) == ("now", {}) and add.call_id != now.call_id
        with client.responses.stream(**asked) as stream:
            events = list(stream)
        calls = [event.item for event in events if event.type == "response.output_item.done" and event.item.type == "function_call"]
        assert [(call.name, json.loads(call.arguments)) for call in calls] == [("add", {"a": 1}), ("now", {})]
        deltas = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
        assert json.loads(deltas[: deltas.index("}") + 1]) == {"a": 1}


def test_items_become_messages() -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}", "id": "fc_1", "status": "completed"}
    called = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a", "annotations": []},
                                                                {"type": "refusal", "refusal": "b"}]}  # fmt: skip
    found = messages_of([
        {"role": "developer", "content": "d"}, {"role": "user", "content": "u"}, thought, said, call,
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "r"}]},
        call, said, {"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y"},
    ])  # fmt: skip
    assert found == [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "ab", "reasoning_content": "hm", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "c1", "content": "r"},
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "assistant", "content": "ab"},
        {"role": "assistant", "content": "x"},
        {"role": "assistant", "content": "y"},
    ]


def test_settings_become_the_chats() -> None:
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    found = chat_body({
        "model": "m", "input": "x", "max_output_tokens": 5, "reasoning": {"effort": "low", "summary": "auto"}, "store": True,
        "text": {"format": form}, "tool_choice": {"type": "function", "name": "f"}, "truncation": "disabled", "background": False,
        "tools": [{"type": "function", "name": "f", "parameters": {}, "strict": True}], "top_p": 0.5, "previous_response_id": None,
        "include": ["reasoning.encrypted_content"], "stream": True, "metadata": {},
    })  # fmt: skip
    assert {name: value for name, value in found.items() if value is not None} == {
        "model": "m", "messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 5, "reasoning_effort": "low",
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True}},
        "tool_choice": {"type": "function", "function": {"name": "f"}}, "top_p": 0.5, "stream": True, "metadata": {},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}, "strict": True}}],
    }  # fmt: skip
    with pytest.raises(ApiError, match="keeps no answers"):
        chat_body({"input": [{"type": "item_reference", "id": "x"}]})


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "previous_response_id is not supported: this server keeps no answers"),
        ({"conversation": "c"}, "conversation", "keeps no answers"),
        ({"background": True}, "background", "background is true: expected false"),
        ({"truncation": "auto"}, "truncation", 'truncation is "auto": expected "disabled"'),
        ({"input": None}, "input", "input is missing"),
        ({"input": 3}, "input", "expected a string or an array"),
        ({"input": [3]}, "input.0", "expected an object"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": [{"type": "web_search_call"}]}, "input.0.type", 'expected "message"'),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content.0.type", "input_image"),
        ({"input": [{"role": "root", "content": "x"}]}, "input.0.role", 'is "root"'),
        ({"tools": [{"type": "web_search"}]}, "tools.0", 'expected "function"'),
        ({"tools": [3]}, "tools.0", "expected an object"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens is 0"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", 'is "huge"'),
        ({"reasoning": {"x": 1}}, "reasoning", "reasoning.x is not supported"),
        ({"n": 2}, "n", "n is not supported"),
        ({"messages": []}, "messages", "messages is not supported"),
        ({"temperature": "hot"}, "temperature", "expected a number"),
        ({"input": "x " * 2000}, "input", "maximum context length is 1024 tokens"),
        ({"unheard_of": 1}, "unheard_of", "unheard_of is not supported"),
    ],
    ids=str,
)  # fmt: skip
def test_refused_responses(demo: tuple[RunningServer, Engine], fields: dict, param: str, says: str) -> None:
    status, _, said = demo[0].send("POST", "/v1/responses", {"input": "x", **fields})
    assert (status, said["error"]["param"]) == (400, param) and says in said["error"]["message"]


def test_a_response_that_fails(demo: tuple[RunningServer, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole: a status. Streamed: an event, for the status has been sent."""
    from serving.responses import Reply

    async def parts(self: Reply) -> Any:
        raise ApiError("the answer failed", status=500, kind="server_error")
        yield

    monkeypatch.setattr(Reply, "_parts", parts)
    assert demo[0].send("POST", "/v1/responses", {"input": "x", "max_output_tokens": 1})[0] == 500
    _, _, text = demo[0].send("POST", "/v1/responses", {"input": "x", "max_output_tokens": 1, "stream": True})
    last = json.loads(text.rstrip().rpartition("data: ")[2])
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["message"] == "the answer failed"
