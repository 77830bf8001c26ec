"""The engine over data-parallel lanes, as threads: answers, failures, preemption, and requests that come and go."""

import gc
import itertools
import json
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from core.answer_format import AnswerFormat
from core.numerics import Numerics
from core.run_config import PAGE_SIZE, RunConfig
from core.sampling_params import SamplingParams
from engine import sampler
from engine.engine import Engine
from engine.lanes import Dispatcher
from engine.request import Request
from engine.scheduler import Sequence
from parallel.group import Group
from support import processes as launch
from support.engine_runs import VOCABULARY, Recorders, come_and_go, greedy, questions, sums
from support.families import V3
from support.http_server import GENEROUS, await_that, serving
from support.model_pairs import ours, random_checkpoint, tokens
from support.thread_ranks import on_every_lane
from text.detokenizer import Detokenizer
from text.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"
LAYOUTS = [(2, 1), (4, 1), (2, 2), (1, 4)]
RUN = RunConfig(n_pages=24, max_model_len=300, max_num_seqs=3, max_num_batched_tokens=64)
PICK = AnswerFormat('{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": false}')


def answers(
    path: Path, lanes: int, size: int, use: Callable[[Engine], Any], run: RunConfig = RUN, num: Numerics | None = None,
    text: bool = False, prepare: Callable[[Engine], object] = lambda engine: None, **of_engine: Any,
) -> Any:  # fmt: skip
    """What `use` makes of an engine over lanes, on rank 0; the others follow, and afterwards nobody holds anything.
    `prepare` is called with every rank's engine."""
    num = num or Numerics(torch.float32)

    def work(tp: Group, dp: Group, world: Group) -> Any:
        model = ours(path, num, tp, dp=dp)
        tokenizer = Tokenizer(path, model.args.vocab_size) if text and tp.rank == 0 else None
        made = {name: make() for name, make in of_engine.items()}
        engine = Engine(model, tokenizer, replace(run, dp=lanes), world=world, **made)
        prepare(engine)
        found = None
        if world.rank == 0:
            found = use(engine)
            engine.close()
        else:
            engine.serve()
        engine.scheduler.check_integrity()
        assert engine.scheduler.pool.n_available == run.n_pages and not engine.registry.live and not engine._sequences
        assert engine.registry.dispatcher is None or engine.registry.dispatcher.unfinished == [0] * lanes
        return found

    return on_every_lane(lanes, size, work, ordered=num.batch_invariant)[0]


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("lanes") / "v3", V3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch.make_tiny(tmp_path_factory.mktemp("lanes") / "tiny", fp8=False)


@pytest.mark.parametrize("mtp", [0, 2])
@pytest.mark.parametrize("lanes, size", LAYOUTS)
def test_answers_over_lanes(v3: Path, lanes: int, size: int, mtp: int) -> None:
    """Fourteen prompts, more than fit at once, are answered as by one rank, in the order asked; with drafts too."""
    run = replace(RUN, mtp=mtp)
    alone = answers(v3, 1, 1, lambda engine: engine.generate(questions(14), greedy()), run)
    drafted: list[int] = []

    def use(engine: Engine) -> list[Request]:
        found = engine.generate(questions(14), greedy())
        drafted.extend(engine.stats.drafted)
        assert len(engine.lane_states) == lanes and engine.stats.generated == 14 * 12
        assert all(state.stats.generated > 0 for state in engine.lane_states)
        assert engine.stats.prompt == sum(map(len, questions(14)))
        return found

    found = answers(v3, lanes, size, use, run)
    assert [r.tokens for r in found] == [r.tokens for r in alone]
    assert [r.finish_reason for r in found] == ["length"] * 14
    assert len(drafted) == mtp and all(n > 10 for n in drafted[:1])


@pytest.mark.parametrize("how", [
    Numerics(torch.float32, fp8_latents=True), Numerics(torch.float32, experts="split"),
    Numerics(torch.float32, experts="split", batch_invariant=True, virtual_ranks=4),
])  # fmt: skip
def test_answers_in_other_numerics(v3: Path, how: Numerics) -> None:
    alone = answers(v3, 1, 1, lambda engine: engine.generate(questions(6), greedy()), num=how)
    found = answers(v3, 2, 2, lambda engine: engine.generate(questions(6), greedy()), num=how)
    assert [r.tokens for r in found] == [r.tokens for r in alone]


@pytest.mark.parametrize("mtp", [0, 2])
def test_recorded_steps(v3: Path, mtp: int) -> None:
    """All lanes replay a step, of the largest size that one of them needs, or none does; an idle one is all padding."""
    run = replace(RUN, mtp=mtp)
    alone = answers(v3, 1, 1, lambda engine: engine.generate(questions(5), greedy()), run)
    made = Recorders()
    found = answers(v3, 2, 1, lambda engine: engine.generate(questions(5), greedy()), run, capture=made.make)
    assert [r.tokens for r in found] == [r.tokens for r in alone]
    assert len(made) == 2 and made[0].replayed == made[1].replayed > 10


@pytest.mark.parametrize("mtp", [0, 1])
def test_a_mixed_step_is_split(v3: Path, mtp: int) -> None:
    """While one lane takes a long prompt in by chunks, the other's decoding goes on by replays, and its own forwards
    beside the chunks are padding."""
    run, made = replace(RUN, mtp=mtp), Recorders()
    asked, eager = [questions(1, most=20)[0], tokens(250, VOCABULARY, 1)], {}

    def prepare(engine: Engine) -> None:
        seen, plain = eager.setdefault(engine.dp.rank, []), engine.runner._step
        engine.runner._step = lambda batch, hidden: seen.append(batch.lane_rows) or plain(batch, hidden)  # type: ignore[method-assign]

    def use(engine: Engine) -> tuple[list[list[int]], int, int]:
        requests = [engine.add(asked[0], greedy(20, ignore_eos=True))]
        while not requests[0].tokens:
            engine.step()
        before, replayed = len(eager[0]), made[0].replayed
        requests.append(engine.add(asked[1], greedy(4, ignore_eos=True), 1))
        while not requests[1].tokens:
            engine.step()
        beside, replayed = eager[0][before:], made[0].replayed - replayed
        while engine.busy:
            engine.step()
        return [r.tokens for r in requests], beside, replayed

    found, beside, replayed = answers(v3, 2, 1, use, run, capture=made.make, prepare=prepare)
    assert len(beside) >= 4 <= replayed and all(sorted(rows)[0] == 0 < sorted(rows)[1] for rows in beside), beside
    assert made[0].replayed == made[1].replayed
    alone = answers(v3, 1, 1, lambda e: [e.generate([p], greedy(n, ignore_eos=True))[0] for p, n in zip(asked, (20, 4), strict=True)], run)
    assert found == [r.tokens for r in alone]


def test_all_that_a_request_may_ask_for(tiny: Path) -> None:
    """Sampling with a seed and biases, log-probabilities of answer and prompt, stop texts, text piece by piece, several answers:
    rank 0 has for requests of other lanes what their lane has for its own."""
    prompts = ["What is 2+2?", "hello " * 30, "z", "another one", "five", "six of them"]
    asked = SamplingParams(temperature=1.0, seed=5, max_new_tokens=24, logprobs=2, prompt_logprobs=1, n=2, stop=("e", "qu"),
                           logit_bias=((100, 2.0), (104, -100.0)))  # fmt: skip

    def use(engine: Engine) -> list[tuple[Any, ...]]:
        pieces: dict[tuple[int, int], str] = {}
        requests = {}
        for request in engine.stream(prompts, asked):
            key = request.id, request.choice
            pieces[key] = pieces.get(key, "") + request.new_text
            requests[key] = request
        assert all(pieces[key] == request.text for key, request in requests.items())
        return [(key, r.tokens, r.text, r.finish_reason, r.events, r.prompt_logprobs, r.error, r.hit_stop)
                for key, r in sorted(requests.items())]  # fmt: skip

    exact = Numerics(torch.float32, experts="split", batch_invariant=True, virtual_ranks=2)
    alone = answers(tiny, 1, 1, use, num=exact, text=True)
    assert answers(tiny, 2, 1, use, num=exact, text=True) == alone
    assert len(alone) == 12 and any(one[-1] for one in alone)


@pytest.mark.parametrize(
    ("lanes", "size", "mtp"), [(2, 1, 0), (1, 2, 2), pytest.param(2, 2, 1, marks=pytest.mark.trust)]
)
def test_answers_held_to_a_format(tiny: Path, lanes: int, size: int, mtp: int) -> None:
    """A lane's first rank holds its own requests, beside free ones and with drafts; one whose format cannot be held
    fails there alone."""
    held = SamplingParams(temperature=1.0, seed=5, max_new_tokens=60, answer_format=PICK)
    bad = SamplingParams(max_new_tokens=4, answer_format=AnswerFormat('{"not": {}}'))

    def use(engine: Engine) -> list[tuple[Any, ...]]:
        free = [engine.add(prompt, greedy(20), i) for i, prompt in enumerate(["free", "another"])]
        asked = [engine.add(prompt, held, 10 + i) for i, prompt in enumerate(["one", "two", "three", "four"])]
        requests = [*free, *asked, engine.add("x", bad, 20)]
        while engine.busy:
            engine.step()
        return [(r.tokens, r.finish_reason, r.error, r.text) for r in requests]

    exact = Numerics(torch.float32, experts="split", batch_invariant=True, virtual_ranks=lanes * size)
    run = replace(RUN, mtp=mtp)
    alone = answers(tiny, 1, 1, use, num=exact, text=True)
    found = answers(tiny, lanes, size, use, run, num=exact, text=True)
    assert found[:2] == alone[:2] and found[-1] == alone[-1] and "Unimplemented keys" in alone[-1][2]
    assert mtp or found == alone, "drafts draw other random numbers"
    assert all(reason == "stop" and json.loads(text)["a"] in (1, 2) for _, reason, _, text in found[2:-1]), found


def test_prefixes_are_found_in_their_lane(v3: Path) -> None:
    """Prompts with a common first page go to one lane while that has not much more to do, and find its latents, which
    padding has not touched while only other lanes worked."""
    shared = tokens(2 * PAGE_SIZE, VOCABULARY, 77)
    prompts = [[*shared, i] for i in range(3)]

    def use(engine: Engine) -> list[list[int]]:
        first = engine.generate(prompts[:1], greedy(2))
        if engine.dp.size > 1:
            dispatcher, lane = engine.registry.dispatcher, itertools.count(1)
            assert dispatcher is not None
            assign = dispatcher.assign
            dispatcher.assign = lambda sequence, prompt, n: place(engine, sequence, next(lane))  # type: ignore[method-assign]
            for i in range(3):  # each in another lane: the first lane, which has had the first, is idle
                engine.generate([tokens(70, VOCABULARY, i)], greedy(8))
            dispatcher.assign = assign  # type: ignore[method-assign]
        found = engine.generate(prompts[1:], greedy(8))
        if engine.dp.size > 1:
            assert [r.n_reused for r in found] == [2 * PAGE_SIZE] * 2
            assert sum(state.stats.reused > 0 for state in engine.lane_states) == 1
        return [r.tokens for r in [*first, *found]]

    run = replace(RUN, max_num_seqs=8)
    assert answers(v3, 4, 1, use, run) == answers(v3, 1, 1, use, run)


def test_the_dispatcher() -> None:
    """The least busy lane by tokens; one that has the prompt's beginning, until it is half a batch ahead."""
    page = list(range(PAGE_SIZE))
    dispatcher = Dispatcher(3, max_num_seqs=4)
    assert [dispatcher.assign(i, [i], 10) for i in range(3)] == [0, 1, 2]
    assert dispatcher.assign(3, [*page, 1], 100) == 0
    assert dispatcher.assign(4, [5], 10) == 1  # lane 0 has as many requests and more tokens
    assert dispatcher.assign(5, [*page, 2], 10) == 0  # three requests there, one in lane 2: the last that may
    assert dispatcher.assign(6, [*page, 3], 10) == 2
    assert dispatcher.assign(7, [*page, 4], 10) == 2  # and from then on that lane has the page
    assert dispatcher.unfinished == [3, 2, 3]
    for sequence in range(8):
        dispatcher.release(sequence)
    assert dispatcher.unfinished == [0, 0, 0] and dispatcher._tokens == [0, 0, 0]


def test_preemption_in_one_lane(v3: Path) -> None:
    """One lane runs out of pages and preempts, the other goes on; all are answered as alone."""
    run = replace(RUN, n_pages=5, max_num_seqs=4, prefix_reuse=False)
    long, short = [tokens(100, VOCABULARY, i) for i in range(4)], [tokens(3, VOCABULARY, 50 + i) for i in range(4)]
    prompts = [prompt for pair in zip(long, short, strict=True) for prompt in pair]
    params = greedy(60)
    alone = answers(v3, 1, 1, lambda engine: engine.generate(prompts, params), replace(run, n_pages=40))

    def use(engine: Engine) -> list[Request]:
        engine.registry.dispatcher.assign = lambda sequence, prompt, n: place(engine, sequence, len(prompt) < 10)  # type: ignore
        found = engine.generate(prompts, params)
        assert engine.lane_states[0].stats.preemptions > 0 and engine.lane_states[1].stats.preemptions == 0
        return found

    assert [r.tokens for r in answers(v3, 2, 1, use, run)] == [r.tokens for r in alone]


def place(engine: Engine, sequence: int, lane: int) -> int:
    """Has a sequence go to a lane."""
    dispatcher = engine.registry.dispatcher
    assert dispatcher is not None
    dispatcher._taken[sequence] = lane, 0
    dispatcher.unfinished[lane] += 1
    return lane


def in_turn(engine: Engine) -> None:
    """Has sequences go to lanes by turns."""
    if engine.registry.dispatcher is not None:
        engine.registry.dispatcher.assign = lambda sequence, prompt, n: place(engine, sequence, sequence % engine.dp.size)  # type: ignore[method-assign]


@pytest.mark.parametrize("where", ["verify", "propose", "score"])
def test_an_error_in_one_request_of_another_lane(v3: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """It ends that request with its error, on rank 0 too, and no other, whatever lane it is in."""
    bad = 7  # likeliest tokens that the failing request asks for, which tells its work from others'
    original = {"verify": sampler.verify, "propose": sampler.propose, "score": sampler._score}[where]

    def fail(first: Any, second: Any, *more: Any) -> Any:
        params = [first.params] if where == "score" else [state.params for state in second]
        if any(p.logprobs == bad for p in params):
            raise RuntimeError("planted")
        return original(first, second, *more)

    monkeypatch.setattr(sampler, {"verify": "verify", "propose": "propose", "score": "_score"}[where], fail)
    prompts = questions(4)

    def use(engine: Engine) -> list[Request]:
        params = [greedy(20, logprobs=bad if i == 1 else 1, prompt_logprobs=0) for i in range(4)]
        requests = [engine.add(prompt, p, i) for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))]
        while engine.busy:
            engine.step()
        return requests

    alone = answers(v3, 1, 1, use, replace(RUN, mtp=1))
    found = answers(v3, 2, 1, use, replace(RUN, mtp=1), prepare=in_turn)
    assert [r.finish_reason for r in found] == ["length", "error", "length", "length"]
    assert found[1].error is not None and "planted" in found[1].error
    assert [r.tokens for r in found] == [r.tokens for r in alone]


@pytest.mark.parametrize("where", ["its-lane-and-rank-0", "rank-0"])
def test_text_that_fails_ends_its_request(tiny: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A token that cannot become text ends its own request at once, on rank 0 too, which repeats what another lane did,
    and where rank 0 alone fails."""
    push, failing = Detokenizer.push_apart, []

    def fail(self: Detokenizer, token: int) -> Any:
        if token == bad and (where != "rank-0" or self in failing):
            raise RuntimeError("planted")
        return push(self, token)

    def use(engine: Engine) -> list[Request]:
        requests = [engine.add(prompt, greedy(40), i) for i, prompt in enumerate(["one", "two", "three", "four"])]
        failing.extend(r.detokenizer for r in requests)
        while engine.busy:
            engine.step()
        assert engine.dp.size == 1 or engine.stats.generated < 3 * 40 + alone[1].tokens.index(bad) + 3
        return requests

    alone = answers(tiny, 1, 1, use, text=True)
    others = {token for r in (alone[0], *alone[2:]) for token in r.tokens}
    bad = next(token for token in alone[1].tokens[:30] if token not in others)
    monkeypatch.setattr(Detokenizer, "push_apart", fail)
    found = answers(tiny, 2, 1, use, text=True, prepare=in_turn)
    assert [r.finish_reason for r in found] == ["length", "error", "length", "length"]
    assert found[1].error is not None and "planted" in found[1].error
    assert [r.tokens for r in found if r.error is None] == [r.tokens for r in alone if r is not alone[1]]


def test_what_a_lane_holds_after_its_last_request_left(v3: Path) -> None:
    """Rank 0 knows of every lane from the first step on, and that one is empty though nothing runs any more."""

    def use(engine: Engine) -> list[tuple[int, float]]:
        engine.step()
        assert len(engine.lane_states) == 2
        requests = [engine.add(prompt, greedy(50)) for prompt in questions(4)]
        for _ in range(5):
            engine.step()
        assert all(state.running == 2 for state in engine.lane_states)
        for request in requests:
            engine.cancel(request)
        engine.step()
        return [(state.running, state.page_use) for state in engine.lane_states]

    assert answers(v3, 2, 1, use, replace(RUN, prefix_reuse=False), prepare=in_turn) == [(0, 0.0)] * 2


@pytest.mark.parametrize("seed", range(3))
def test_requests_that_come_and_go(v3: Path, seed: int) -> None:
    """Requests added, and some cancelled, at random moments: those that stay are answered as alone; nothing is lost."""
    draw = random.Random(seed)
    prompts = questions(30, seed + 10, most=100)
    run = replace(RUN, n_pages=12, mtp=seed % 2)
    alone = {i: r.tokens for i, r in enumerate(answers(v3, 1, 1, lambda e: e.generate(prompts, greedy(10)), run))}

    found = answers(v3, 4, 1, lambda engine: come_and_go(engine, prompts, draw), run)
    assert {r.finish_reason for r in found} == {"length", "cancelled"} and len(found) == 30
    assert all(r.tokens == alone[r.id] for r in found if r.finish_reason == "length")
    assert all(alone[r.id][: len(r.tokens)] == r.tokens for r in found)


@pytest.mark.parametrize("requests", [200, pytest.param(2000, marks=pytest.mark.trust)])
def test_nothing_is_left_of_many_requests(v3: Path, requests: int) -> None:
    """Neither rank 0 nor a lane keeps a request or a sequence that is finished."""
    prompts = questions(requests, 3, most=5)

    def use(engine: Engine) -> list[int]:
        before = sum(type(o) in (Request, Sequence) for o in gc.get_objects())  # those of other tests
        counts = []
        for half in (prompts[: requests // 2], prompts[requests // 2 :]):
            assert all(r.finish_reason == "length" for r in engine.generate(half, greedy(2)))
            gc.collect()
            counts.append(sum(type(o) in (Request, Sequence) for o in gc.get_objects()) - before)
        return counts

    run = replace(RUN, max_num_seqs=8, prefix_reuse=False)
    assert max(answers(v3, 4, 1, use, run)) < 12  # of the last step, on other threads


def test_a_stream_that_is_left(v3: Path) -> None:
    """In the middle, with requests in every lane and more waiting: nothing of them is left, and the next are answered
    as alone."""
    run = replace(RUN, mtp=1, prefix_reuse=False)
    alone = [r.tokens for r in answers(v3, 1, 1, lambda engine: engine.generate(questions(3), greedy()), run)]

    def use(engine: Engine) -> list[list[int]]:
        for i, _ in enumerate(engine.stream(questions(12), greedy(30))):
            if i == 20:
                break
        assert not engine.busy and all((s.running, s.waiting) == (0, 0) for s in engine.lane_states)
        return [r.tokens for r in engine.generate(questions(3), greedy())]

    assert answers(v3, 2, 2, use, run) == alone


def test_drafts_of_the_demo_are_accepted_in_each_lane() -> None:
    """Greedy answers of the demo with drafts are those without, and in each lane most drafts are accepted."""
    prompts = sums(5)

    def use(engine: Engine) -> tuple[list[list[int]], list[tuple[int, int]]]:
        found = [r.tokens for r in engine.generate(prompts, greedy(60))]
        return found, [(s.stats.accepted[0], s.stats.drafted[0]) for s in engine.lane_states if engine.mtp]

    run = RunConfig(n_pages=30, max_model_len=256, max_num_seqs=3)
    alone, _ = answers(DEMO, 1, 1, use, run, text=True)
    found, accepted = answers(DEMO, 2, 1, use, replace(run, mtp=1), text=True, prepare=in_turn)
    assert found == alone
    assert len(accepted) == 2 and all(a > 0.6 * n > 20 for a, n in accepted)


def test_a_server_over_lanes(tiny: Path) -> None:
    """Twelve clients at once, of whom one leaves: each gets what it would get alone, and lanes are counted apart."""
    prompts = [f"prompt {i} " * (1 + i % 5) for i in range(12)]
    alone = [r.text for r in answers(tiny, 1, 1, lambda e: e.generate(prompts, greedy(15)), text=True)]
    texts: dict[int, str] = {}

    def use(engine: Engine) -> None:
        with serving(engine) as running, openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
            leaver = running.start("/v1/completions", {"model": "model", "prompt": "leaves", "max_tokens": 250, "temperature": 0})
            await_that(lambda: engine.stats.generated > 2, "it runs")

            def ask(i: int) -> None:
                said = client.completions.create(model="model", prompt=prompts[i], max_tokens=15, temperature=0)
                texts[i] = said.choices[0].text

            threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
            for thread in threads:
                thread.start()
            leaver.close()
            for thread in threads:
                thread.join(GENEROUS)
            await_that(lambda: not running.on_engine(lambda engine: engine.busy), "nothing runs")
            running.on_engine(lambda engine: engine.step())
            said = running.send("GET", "/metrics")[2]
            made = [float(line.split()[-1]) for line in said.splitlines() if line.startswith("lane_generation_tokens_total{")]
            assert len(made) == 2 and all(n >= 15 for n in made) and sum(made) < 12 * 15 + 250
            assert 'lane_num_requests_running{lane="1",model_name="model"} 0.0' in said
            held = [line.split()[-1] for line in said.splitlines() if line.startswith("lane_kv_cache_usage_perc{")]
            assert held == ["0.0", "0.0"]

    answers(tiny, 2, 1, use, replace(RUN, prefix_reuse=False), text=True)
    assert [texts[i] for i in range(12)] == alone
