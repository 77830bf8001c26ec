"""What an answer is made of: text, stop texts, streaming, reasoning, log-probabilities, several answers."""

import re

import pytest
import torch

from core.run_config import RunConfig
from core.sampling_params import SamplingParams
from engine.engine import Engine
from engine.request import Request, TokenEvent
from engine.sampling import Scores
from support.families import V3
from support.model_pairs import hidden_states, ours, random_checkpoint
from support.tiny_tokenizer import VOCAB_SIZE, write_tokenizer
from text.tokenizer import Tokenizer

CONFIG = {**V3, "vocab_size": VOCAB_SIZE, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = random_checkpoint(tmp_path_factory.mktemp("answers"), CONFIG)
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def model(path):
    return ours(path)


@pytest.fixture(scope="module")
def tokenizer(path):
    return Tokenizer(path, VOCAB_SIZE)


def scripted(model, tokenizer, text: str | bytes, mtp: int = 0, end: bool = True, **params) -> tuple[Request, list[str]]:
    """Lets the model "say" this text, token by token (with mtp > 0, several a step); the request and what it streamed.

    The main model's logits are replaced by the script, and the drafter is right about two times of three.
    """
    raw = text if isinstance(text, bytes) else text.encode()
    letters = {tokenizer._piece(i): i for i in range(VOCAB_SIZE) if len(tokenizer._piece(i)) == 1}
    script = [letters[bytes([b])] for b in raw] + [tokenizer.eos_ids[0]] * end + [letters[b"x"]] * 50
    engine = Engine(model, tokenizer, RunConfig(n_pages=20, max_model_len=1000, mtp=mtp))
    verify, propose = engine.sampler._verify, engine.sampler.propose

    def verify_scripted(chunks, scores):
        at = [len(chunk.sequence.tokens) - chunk.sequence.n_prompt for chunk in chunks]
        wanted = [token for i, c in zip(at, chunks, strict=True) for token in script[i : i + len(c.drafts) + 1]]
        said = torch.nn.functional.one_hot(torch.tensor(wanted), VOCAB_SIZE).float() * 50 - 20
        return verify(chunks, Scores.of(said))

    def propose_scripted(sequences, logits):
        out = propose(sequences, logits)
        for i, sequence in enumerate(sequences):
            at = len(sequence.tokens) + len(sequence.drafts) - sequence.n_prompt
            out[i] = script[at] if at % 3 else 5
            engine.registry.live[sequence.id].draft.tokens[-1], engine.registry.live[sequence.id].draft.q[-1] = out[i], None
        return out

    engine.sampler._verify, engine.sampler.propose = verify_scripted, propose_scripted
    options = {"temperature": 0, "max_new_tokens": 400, **params}
    request = engine.add([{"role": "user", "content": "?"}], SamplingParams(**options))
    pieces, seen = [], []
    while engine.busy:
        pieces += [r.new_text for r in engine.step()]
        assert request.events[: len(seen)] == seen, "events are only appended"
        seen = list(request.events)
    engine.scheduler.check_integrity()
    assert "".join(pieces) == "".join(event.text for event in request.events) == request.text
    assert [event.id for event in request.events if event.id is not None] == request.tokens
    return request, pieces


TEXT = "One, two, three. Naïve 你好 🙂 done."


@pytest.mark.parametrize("mtp", [0, 1, 3])
def test_the_stream_adds_up(model, tokenizer, mtp):
    request, pieces = scripted(model, tokenizer, TEXT, mtp)
    assert request.text == TEXT and request.finish_reason == "stop"
    assert tokenizer.decode(request.tokens) == TEXT and tokenizer.eos_ids[0] not in request.tokens
    assert all("\ufffd" not in piece for piece in pieces)
    assert mtp == 0 or len(pieces) < len(request.tokens)


@pytest.mark.parametrize("mtp", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(
    "stop, said",
    [
        (("three",), "One, two, "),
        (("two, th", "One, tx"), "One, "),
        (("e. N", "ee"), "One, two, thr"),
        (("ee", "three"), "One, two, "),  # both at once: up to the one that begins first
        (("🙂",), "One, two, three. Naïve 你好 "),
        (("好",), "One, two, three. Naïve 你"),
        (("absent", "One, two, three! "), TEXT),
        (("done.!", "done. "), TEXT),  # held back to the very end, then said
        (("O",), ""),
    ],
)
def test_stop_texts(model, tokenizer, mtp, stop, said):
    """Found wherever tokens and steps split them, left out, never shown even in part."""
    request, pieces = scripted(model, tokenizer, TEXT, mtp, stop=stop)
    assert request.text == said and request.finish_reason == "stop"
    so_far = ""
    for piece in pieces:
        so_far += piece
        assert said.startswith(so_far)


def test_nothing_follows_a_stop_text(model, tokenizer):
    """Not even the half of a character that came in the same token as the stop text."""
    half = next(t for t in range(VOCAB_SIZE) if tokenizer._piece(t) == b"\xe2")
    tokenizer._pieces[half] = b" \xe2"
    try:
        engine = Engine(model, tokenizer, RunConfig(n_pages=4, max_model_len=100))
        request = engine.add([5], SamplingParams(temperature=0, stop=(" ",)))
        request.events.append(TokenEvent(None, "abc"))
        assert request.append(half)
        engine.registry.finish(request, "stop")
        assert request.text == "abc"
    finally:
        del tokenizer._pieces[half]


def test_a_control_token_has_exactly_its_text(tokenizer):
    """After half a character, and where it may begin a stop text."""
    half, user, word = (next(t for t in range(VOCAB_SIZE) if tokenizer._piece(t) == text)
                        for text in (b"\xe2", "<｜User｜>".encode(), b"w"))  # fmt: skip
    request = Request(0, [], SamplingParams(stop=("<｜User｜>?",)), detokenizer=tokenizer.stream())
    assert not any(request.append(token) for token in (word, half, user))
    assert request.events == [TokenEvent(word, "w"), TokenEvent(half, ""), TokenEvent(None, "\ufffd")]
    assert not any(request.append(token) for token in (half, word))
    request.flush()
    assert request.events[3:] == [TokenEvent(user, "<｜User｜>", True), TokenEvent(half, ""), TokenEvent(word, "\ufffdw")]
    assert request.tokens == [word, half, user, half, word]


def test_stop_tokens_and_ignored_end(model, tokenizer):
    letters = {tokenizer._piece(i): i for i in range(VOCAB_SIZE)}
    request, _ = scripted(model, tokenizer, "abcdef", stop_token_ids=(letters[b"d"],))
    assert request.text == "abc" and request.finish_reason == "stop"
    request, _ = scripted(model, tokenizer, "abc", ignore_eos=True, max_new_tokens=10)
    assert len(request.tokens) == 10 and request.finish_reason == "length"


@pytest.mark.parametrize("mtp", [0, 2])
def test_length_ends_inside_a_character(model, tokenizer, mtp):
    """The last character is incomplete: a replacement character, once, at the very end."""
    request, pieces = scripted(model, tokenizer, "ab你好", mtp, max_new_tokens=4)
    assert request.finish_reason == "length" and len(request.tokens) == 4
    assert request.text == "ab\ufffd" == tokenizer.decode(request.tokens)
    assert "".join(pieces[:-1]).count("\ufffd") == 0


def test_reasoning_is_kept_apart():
    def parts(text, opens, spelled=()):
        """Of an answer in which each tag is a control token but those whose number is in `spelled`."""
        pieces = re.split("(</?think>)", text)
        events = [TokenEvent(0, piece, i % 2 == 1 and i // 2 not in spelled) for i, piece in enumerate(pieces)]
        return Request(0, [], SamplingParams(), events=events, opens_thinking=opens).parts

    assert parts("7+5=12\n</think>\n\n12", True) == ("7+5=12", "12")
    assert parts("<think>\nhm\n</think>\n\nyes </think>", False) == ("hm", "yes ")
    assert parts("never closed", True) == ("never closed", "")
    assert parts("no thinking", False) == (None, "no thinking")
    assert parts("a <think> b", False) == (None, "a <think> b")
    said = "the tag </think> ends it.</think>42"  # the first is only spelled
    assert parts(said, True, [0]) == ("the tag </think> ends it.", "42")
    assert parts("<think> is a tag", False, [0]) == (None, "<think> is a tag")


def test_logprobs_are_the_models(model, tokenizer):
    """Of the tokens made, with drafts as without; and of the prompt, chunked or not."""
    prompt = [7, 8, 9, *range(20, 90)]
    found = {}
    for mtp, budget in ((0, 2048), (2, 16)):
        engine = Engine(model, None, RunConfig(n_pages=8, max_model_len=300, mtp=mtp, max_num_batched_tokens=budget))
        params = SamplingParams(temperature=0, max_new_tokens=9, logprobs=3, prompt_logprobs=2)
        engine.generate([prompt], SamplingParams(temperature=0, max_new_tokens=2))  # leaves pages to be found
        [request] = engine.generate([prompt], params)
        found[mtp] = request
    expected = model.logits(hidden_states(model, prompt + found[0].tokens)).double().log_softmax(-1)
    for request in found.values():
        assert len(request.prompt_logprobs) == len(prompt) - 1 and len(request.logprobs) == 9
        every = request.prompt_logprobs + request.logprobs
        for i, (entry, token) in enumerate(zip(every, (prompt + request.tokens)[1:], strict=True)):
            assert entry.token == token
            assert entry.logprob == pytest.approx(float(expected[i, token]), abs=1e-4)
            best = expected[i].topk(len(entry.top))
            assert [t for t, _ in entry.top] == best.indices.tolist()
        assert [len(e.top) for e in every] == [2] * (len(prompt) - 1) + [3] * 9


def test_several_answers_to_one_prompt(model, tokenizer):
    engine = Engine(model, tokenizer, RunConfig(n_pages=8, max_model_len=200))
    params = SamplingParams(temperature=1.0, max_new_tokens=6, n=3, seed=1)
    answers = engine.generate(["ab", "cd"], params)
    assert [(r.id, r.choice) for r in answers] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert len({tuple(r.tokens) for r in answers}) == 6
    first = engine.generate(["ab"], SamplingParams(temperature=1.0, max_new_tokens=6, seed=1))
    assert first[0].tokens == answers[0].tokens


def test_readme_example(path, capsys):
    """The Python use the README shows."""
    engine = Engine.from_pretrained(path)
    for request in engine.generate([[{"role": "user", "content": "What is 3 + 4?"}]]):
        assert request.text and request.finish_reason in ("stop", "length")
    streamed = "".join(r.new_text for r in engine.stream(["Once"], SamplingParams(max_new_tokens=5)))
    assert streamed == engine.generate(["Once"], SamplingParams(max_new_tokens=5))[0].text
