"""Prompts that are far too long: refused early, in words that clients know, and without holding short ones up."""

import re
import threading
from pathlib import Path

import pytest

import server
from core.errors import UserError
from core.run_config import RunConfig
from engine.engine import Engine
from serving.plan import plan_completion
from support import processes as launch
from support.http_server import await_that, serving
from text import limits
from text.limits import TooLong, refuse_long

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = launch.make_tiny(tmp_path_factory.mktemp("long") / "tiny")
    return Engine.from_pretrained(folder, dtype="float32", max_model_len=512, n_pages=40)


def again(engine: Engine) -> Engine:
    """Another engine of the same model."""
    return Engine(engine.model, engine.tokenizer, RunConfig(max_model_len=512, n_pages=40))


def test_pieces_stop_at_the_limit() -> None:
    """The rest of a text is not looked at; one that may fit is left to be encoded as a whole."""
    seen: list[int] = []

    def count(piece: str) -> int:
        seen.append(len(piece))
        return len(piece) // 4

    with pytest.raises(TooLong) as e:
        refuse_long("x" * 14_000_000, 20_000, count)
    assert seen == [limits.PIECE] * 2 and (e.value.n, e.value.is_all) == (28672, False)
    refuse_long("x" * limits.PIECE, 1, count)
    refuse_long("x" * 8 * limits.PIECE, limits.PIECE, count)
    assert len(seen) == 2, "these may fit"
    refuse_long("x" * 1_000_000, 100_000, lambda piece: 1)
    with pytest.raises(UserError, match="a text has 14000000 characters, expected at most 1600000"):
        refuse_long("x" * 14_000_000, 100_000, lambda piece: 1)


def test_encoders_and_conversations_stop(tiny: Engine) -> None:
    """Both encoders, and a conversation's messages together."""
    tokenizer = tiny.tokenizer
    assert tokenizer is not None
    with pytest.raises(TooLong, match="or more") as e:
        tokenizer.encode_text("a b c " * 1_000_000, 1000)
    assert e.value.n < 200_000
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": "x y " * 40} for i in range(99)]
    one = len(tokenizer.encode_chat(messages[:1]))
    assert len(tokenizer.encode_chat(messages[:1], most=one)) == one
    with pytest.raises(TooLong) as e:
        tokenizer.encode_chat(messages, most=3 * one)
    assert 3 * one < e.value.n < 5 * one


def test_words_that_clients_know(tiny: Engine) -> None:
    """OpenAI's code and words: LangChain, LiteLLM and others look for them to shorten a conversation."""
    with serving(again(tiny)) as running:
        for text in ("x y " * 300, "x y " * 100_000):
            for path, body, field in (
                (CHAT, {"messages": [{"role": "user", "content": text}]}, "messages"),
                (COMPLETIONS, {"prompt": text}, "prompt"),
            ):
                status, _, said = running.send("POST", path, body)
                error = said["error"]
                assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", field)
                assert error["message"].startswith("This model's maximum context length is 512 tokens")
                assert re.search(rf"Your {field} resulted in \d+ tokens(?: or more)? \(context_length_exceeded\)\.$", error["message"])


def test_short_prompts_pass_long_ones(tiny: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """While long prompts are being read, one after the other, short ones are answered."""
    from serving import app

    go, held = threading.Event(), threading.Semaphore(0)

    def plan(data: dict, served: object) -> object:
        if len(data["prompt"]) > 100_000:
            held.release()
            assert go.wait(60)
        return plan_completion(data, served)  # type: ignore[arg-type]

    monkeypatch.setattr(app, "plan_completion", plan)
    with serving(again(tiny)) as running:
        clients = [running.start(COMPLETIONS, {"prompt": "x" * 300_000}) for _ in range(4)]
        assert held.acquire(timeout=60)
        await_that(lambda: running.engine_thread._preparing == 4, "all are being read")
        for _ in range(3):
            assert running.send("POST", COMPLETIONS, {"prompt": "x", "max_tokens": 1})[0] == 200
        assert running.send("GET", "/health")[0] == 200
        go.set()
        for client in clients:
            assert client.recv(100).startswith(b"HTTP/1.1 400 ")
            client.close()


def test_a_byte_order_mark_is_no_part_of_json(tiny: Engine) -> None:
    with serving(again(tiny)) as running:
        raw = b'\xef\xbb\xbf{"prompt": "x", "max_tokens": 1}'
        assert running.send("POST", COMPLETIONS, raw)[0] == 200
        assert running.send("POST", COMPLETIONS, raw.decode("utf-8-sig").encode("utf-16"))[0] == 400


def test_several_names(tiny: Engine) -> None:
    """An answer carries the name it was asked for by, else the first; all are listed."""
    options = server.parse(["--ckpt-path", "C/NAME", "--model-name", "a", "--model-name", "b"])
    assert options.model_name == ["a", "b"]
    assert server.parse(["--ckpt-path", str(Path("C/NAME"))]).model_name == ["NAME"]
    with serving(again(tiny)) as running:
        for asked, told in (("another-name", "another-name"), ("model", "model"), (None, "model")):
            status, _, said = running.send("POST", COMPLETIONS, {"prompt": "x", "max_tokens": 1, "model": asked})
            assert (status, said["model"]) == (200, told)
        assert running.send("GET", "/v1/models/another-name")[2]["id"] == "another-name"
        status, _, said = running.send("POST", COMPLETIONS, {"prompt": "x", "model": "third"})
        assert (status, said["error"]["message"]) == (404, 'there is no model "third", only "model" or "another-name"')
