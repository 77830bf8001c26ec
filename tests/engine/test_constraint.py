"""Answers held to a format: with drafts, among others, preempted, over ranks; never one that does not parse."""

import json
from dataclasses import asdict
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from test_sampling import distribution, passes_chi_square, unlike

from core.answer_format import AnswerFormat, ToolFormat
from core.errors import UserError
from core.run_config import RunConfig
from core.sampling_params import SamplingParams
from engine.engine import Engine
from engine.request import Request
from engine.sampling import adjusted, propose, unpack_bits, verify
from engine.sampling_state import SamplingState
from model import Transformer
from support.families import V3
from support.model_pairs import ours, random_checkpoint
from support.tiny_tokenizer import TEMPLATE, VOCAB_SIZE, write_tokenizer
from text.tokenizer import Tokenizer

CONFIG = {**V3, "vocab_size": VOCAB_SIZE, "num_hidden_layers": 2}
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "legs": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
    },
    "required": ["kind", "legs", "tags"],
    "additionalProperties": False,
}
FORMAT = AnswerFormat(json.dumps(SCHEMA))
THINKING = TEMPLATE.replace("{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜><think>' }}")
MAY_THINK = TEMPLATE + "{# </think> #}"
PROMPTS = ["What is it?", "hello " * 20, "z", "another one"]


def model_of(tmp_path_factory: pytest.TempPathFactory, template: str) -> tuple[Transformer, Tokenizer]:
    path = random_checkpoint(tmp_path_factory.mktemp("formats"), CONFIG)
    write_tokenizer(path, template, ("<think>", "</think>"))
    return ours(path), Tokenizer(path, VOCAB_SIZE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Tokenizer]:
    return model_of(tmp_path_factory, TEMPLATE)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Tokenizer]:
    return model_of(tmp_path_factory, THINKING)


def engine_of(made: tuple[Transformer, Tokenizer], **run: Any) -> Engine:
    return Engine(*made, RunConfig(**{"n_pages": 40, "max_model_len": 600} | run))


def terse(made: tuple[Transformer, Tokenizer]) -> tuple[tuple[int, float], ...]:
    """Biases against blanks, which a random model would fill its answers with."""
    return tuple((token, -20.0) for token in range(VOCAB_SIZE) if made[1].name(token).isspace())


def run(engine: Engine) -> None:
    while engine.busy:
        engine.step()


def check(request: Request, text: str | None = None) -> bool:
    """An answer that stopped validates, one that was cut is as long as it may be; whether it stopped."""
    assert request.error is None
    if request.finish_reason == "length":
        assert len(request.tokens) == request.params.max_new_tokens
        return False
    assert request.finish_reason == "stop"
    jsonschema.validate(json.loads(request.text if text is None else text), SCHEMA)
    return True


@pytest.mark.parametrize(
    ("mtp", "how"),
    [(0, {"temperature": 0.0}), (0, {"temperature": 1.0}), pytest.param(2, {"temperature": 0.0}, marks=pytest.mark.trust),
     (1, {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2, "presence_penalty": 0.5}),
     (4, {"temperature": 0.7, "min_p": 0.01})],
    ids=str,
)  # fmt: skip
def test_answers_validate(tiny: tuple[Transformer, Tokenizer], mtp: int, how: dict[str, Any]) -> None:
    """Beside answers that are not held to anything, which are as they are alone."""
    free = SamplingParams(max_new_tokens=20, seed=3, temperature=how["temperature"])
    alone = engine_of(tiny, mtp=mtp).generate(PROMPTS, free)
    engine = engine_of(tiny, mtp=mtp, max_num_seqs=5)
    held = SamplingParams(max_new_tokens=80, seed=3, answer_format=FORMAT, logit_bias=terse(tiny), **how)
    requests = [engine.add(prompt, free, id=i) for i, prompt in enumerate(PROMPTS)]
    answers = [engine.add(prompt, held, id=100 + i) for i, prompt in enumerate(PROMPTS)]
    run(engine)
    assert [r.tokens for r in requests] == [r.tokens for r in alone]
    assert sum(map(check, answers)) >= 3
    if mtp and how["temperature"]:
        assert sum(engine.stats.accepted) > 0


def held_answers(made: tuple[Transformer, Tokenizer], params: SamplingParams, **run_fields: Any) -> list[list[int]]:
    engine = engine_of(made, **run_fields)
    answers = engine.generate([prompt * 3 for prompt in PROMPTS], params)
    assert engine.stats.preemptions > 0 or run_fields.get("n_pages", 40) == 40
    for answer in answers:
        check(answer)
    return [answer.tokens for answer in answers]


def test_drafts_and_preemption_change_no_answer(tiny: tuple[Transformer, Tokenizer]) -> None:
    greedy = SamplingParams(temperature=0, max_new_tokens=40, answer_format=FORMAT)
    expected = held_answers(tiny, greedy)
    assert held_answers(tiny, greedy, mtp=2) == expected
    few: dict[str, Any] = {"n_pages": 8, "max_model_len": 500}
    assert held_answers(tiny, greedy, mtp=2, **few) == expected
    sampled = SamplingParams(temperature=1.0, seed=9, max_new_tokens=40, answer_format=FORMAT)
    assert held_answers(tiny, sampled, mtp=2, **few) == held_answers(tiny, sampled, mtp=2)


def test_prefix_reuse(tiny: tuple[Transformer, Tokenizer]) -> None:
    params = SamplingParams(temperature=0, max_new_tokens=80, answer_format=FORMAT, logit_bias=terse(tiny))
    engine = engine_of(tiny, mtp=1)
    first, again = (engine.generate(["a prompt of more than a page, " * 6], params)[0] for _ in range(2))
    assert again.n_reused > 0 and first.tokens == again.tokens and check(again)


# --- reasoning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mtp", [0, 2])
def test_the_format_begins_behind_the_reasoning(thinker: tuple[Transformer, Tokenizer], mtp: int) -> None:
    """Reasoning is text that never ends the answer; the model closes it when it likes."""
    engine, (_, tokenizer) = engine_of(thinker, mtp=mtp), thinker
    close = tokenizer.think_close_id
    assert close is not None
    params = SamplingParams(
        temperature=1.0, max_new_tokens=200, seed=1, logit_bias=((close, 3.0), (tokenizer.eos_ids[0], 4.0)), answer_format=FORMAT
    )
    requests = engine.generate([[{"role": "user", "content": prompt}] for prompt in PROMPTS], params)
    for request in requests:
        assert request.opens_thinking and check(request, request.parts[1])
        assert request.tokens.count(close) == 1 and tokenizer.eos_ids[0] not in request.tokens
    assert max(request.tokens.index(close) for request in requests) > 3
    endless = SamplingParams(temperature=1.0, max_new_tokens=50, logit_bias=((close, -100.0),), answer_format=FORMAT)
    (request,) = engine.generate([[{"role": "user", "content": "x"}]], endless)
    assert (request.finish_reason, len(request.tokens), request.parts[1]) == ("length", 50, "")


def test_an_answer_may_open_its_reasoning_itself(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where the template knows reasoning and the prompt has neither opened nor closed it."""
    made = model_of(tmp_path_factory, MAY_THINK)
    opens, closes = made[1].think_open_id, made[1].think_close_id
    assert opens is not None and closes is not None
    wanted = ((opens, 100.0), (closes, 6.0))
    params = SamplingParams(temperature=1.0, max_new_tokens=150, logit_bias=(*wanted, *terse(made)), answer_format=FORMAT)
    for mtp in (0, 2):
        (request,) = engine_of(made, mtp=mtp).generate([[{"role": "user", "content": "x"}]], params)
        assert request.tokens[0] == opens and request.tokens.count(opens) == 1
        reasoning, content = request.parts
        assert reasoning is not None and check(request, content)
    (closed,) = engine_of(made).generate([[*made[1].encode_chat([{"role": "user", "content": "x"}]), closes]], params)
    assert opens not in closed.tokens and check(closed)


# --- the distribution ------------------------------------------------------------------------------------------------


class Allows:
    """A constraint with a fixed mask after each number of drafts."""

    def __init__(self, *masks: list[int]):
        self._masks = [np.packbits(np.isin(np.arange(9), mask), bitorder="little") for mask in masks]

    def mask(self, tokens: Any, n_prompt: int, drafts: list[int]) -> np.ndarray:
        return self._masks[len(drafts)]


@pytest.mark.parametrize("how", [{}, {"top_k": 3, "top_p": 0.8, "temperature": 1.5}], ids=str)
@pytest.mark.parametrize("blind", [False, True])
def test_drafts_leave_the_masked_distribution(how: dict[str, Any], blind: bool) -> None:
    """Chi-square at both positions against the masked distribution; also with a drafter that does not know the mask."""
    target, proposal = unlike()
    masks = [0, 2, 3, 5, 8], [1, 2, 4, 7], [0, 1]
    params = SamplingParams(**{"temperature": 1.0, "seed": 20} | how)
    allows: Any = Allows(*masks)
    first, second = [], []
    for start in range(0, 2000, 100):
        asks = [SamplingState(params, request, [0] * 5, 5, constraint=allows) for request in range(start, start + 100)]
        for ask in asks:
            ask.constraint = None if blind else ask.constraint
        for row in proposal[:2]:
            propose(row.expand(len(asks), -1), asks)
        for ask in asks:
            ask.constraint = allows
        for made in verify(target.repeat(len(asks), 1), asks):
            assert made is not None and all(token in masks[i] for i, token in enumerate(made))
            first.append(made[0])
            second += made[1:2]
    for found, row, mask in zip((first, second), target, masks, strict=False):
        kept = torch.full_like(row, -torch.inf)
        kept[mask] = row[mask]
        assert passes_chi_square(found, distribution(kept, params))
    assert len(second) > 200


def test_masks_of_some_rows() -> None:
    logits = torch.arange(27.0).reshape(3, 9)
    free, held = (SamplingState(SamplingParams(), 0, [0], 1, constraint=c) for c in (None, Allows([1, 8])))  # type: ignore[arg-type]
    found = adjusted(logits, [(free, 0), (held, 0), (free, 0)])
    assert torch.equal(found[::2], logits[::2]) and found[1].isfinite().nonzero().flatten().tolist() == [1, 8]
    assert torch.equal(found[1, [1, 8]], logits[1, [1, 8]]) and logits.isfinite().all()
    assert unpack_bits(torch.tensor([[5, 1]], dtype=torch.uint8), 9).int().tolist() == [[1, 0, 1, 0, 0, 0, 0, 0, 1]]


def test_a_mask_hides_no_nan() -> None:
    logits = torch.zeros(1, 9)
    logits[0, 4] = float("nan")
    for temperature in (0.0, 1.0):
        asks = [SamplingState(SamplingParams(temperature=temperature), 0, [0], 1, constraint=Allows([1, 8]))]  # type: ignore[arg-type]
        assert verify(logits, asks) == [None]


# --- what is asked for -----------------------------------------------------------------------------------------------


def test_log_probabilities_are_the_models(tiny: tuple[Transformer, Tokenizer]) -> None:
    """Not the masked distribution's: the token sampled can be an unlikely one."""
    params = SamplingParams(temperature=0, max_new_tokens=20, logprobs=1, answer_format=FORMAT)
    (request,) = engine_of(tiny).generate(["x"], params)
    assert any(entry.token != entry.top[0][0] for entry in request.logprobs)
    assert all(entry.logprob <= entry.top[0][1] for entry in request.logprobs)


@pytest.mark.parametrize("field", [{"stop": ("x",)}, {"stop_token_ids": (3,)}, {"ignore_eos": True}], ids=str)
def test_what_would_end_an_answer_elsewhere(field: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(field))} cannot be combined with a format"):
        SamplingParams(answer_format=FORMAT, **field)


def test_a_format_that_cannot_be_held_fails_alone(tiny: tuple[Transformer, Tokenizer]) -> None:
    engine = engine_of(tiny)
    bad = engine.add("x", SamplingParams(answer_format=AnswerFormat('{"not": {}}')))
    good = engine.add("x", SamplingParams(max_new_tokens=100, answer_format=FORMAT))
    run(engine)
    assert bad.finish_reason == "error" and "Unimplemented keys" in str(bad.error)
    check(good)
    wordless = Engine(tiny[0], None, RunConfig(n_pages=10, max_model_len=100)).add([1], SamplingParams(answer_format=FORMAT))
    assert wordless.error == "answer_format needs a tokenizer"


def test_a_grammar_that_becomes_too_complex_is_an_error(tiny: tuple[Transformer, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an answer that ends there: the library's mask then has the end token alone."""
    from text import grammar

    monkeypatch.setitem(grammar.LIMITS, "max_lexer_states", 60)
    monkeypatch.setitem(grammar.LIMITS, "step_lexer_fuel", 2000)
    pattern = {"type": "string", "pattern": "^(.*a.*b.*c.*d.*e.*f){30}$"}
    params = SamplingParams(max_new_tokens=300, answer_format=AnswerFormat(json.dumps({"type": "array", "items": pattern, "minItems": 2})))
    engine = engine_of(tiny)
    other = engine.add("x", SamplingParams(max_new_tokens=5))
    request = engine.add("x", params)
    run(engine)
    assert request.finish_reason == "error" and ("too complex" in str(request.error) or "not supported" in str(request.error))
    assert other.finish_reason == "length"


def test_parameters_survive_json() -> None:
    tools = (ToolFormat("a", "{}", True, 0), ToolFormat("b", '{"type": "object"}', False, 1))
    for format in (None, AnswerFormat(None, tools, True, True), FORMAT):
        params = SamplingParams(logit_bias=((1, 2.0),), answer_format=format)
        assert SamplingParams.from_json(json.loads(json.dumps(asdict(params)))) == params
