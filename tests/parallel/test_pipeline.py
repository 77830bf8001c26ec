"""Pipeline stages: the same numbers, and in the deterministic mode the same bits, as one stage; and the engine over them."""

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.answer_format import AnswerFormat
from core.config import ModelArgs, load_config
from core.errors import UserError
from core.numerics import Numerics
from core.run_config import RunConfig
from core.sampling_params import SamplingParams
from core.stages import Stage, balanced, divide, layer_costs
from engine import rank_memory
from engine.engine import Engine
from engine.rank_memory import RankSpec
from engine.request import Request
from model import Transformer
from parallel.group import Group
from support import processes as launch
from support.engine_runs import Recorders, come_and_go, greedy, questions, sums
from support.families import FAMILIES, V3
from support.model_pairs import ours, random_checkpoint
from support.thread_ranks import on_every_stage
from text.tokenizer import Tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"
LAYOUTS = [(2, 1), (2, 2), (3, 1)]  # stages, ranks of each
RUN = RunConfig(n_pages=36, max_model_len=300, max_num_seqs=6, max_num_batched_tokens=64)


def answers(
    path: Path, stages: int, size: int, use: Callable[[Engine], Any], run: RunConfig = RUN, num: Numerics | None = None,
    text: bool = False, layers: str | None = None, prepare: Callable[[Engine], object] = lambda engine: None,
    **of_engine: Any,
) -> Any:  # fmt: skip
    """What `use` makes of an engine over stages, on rank 0; the others follow, and afterwards nobody holds anything."""
    num = num or Numerics(torch.float32)

    def work(tp: Group, pp: Group, world: Group, stage: int) -> Any:
        args = load_args(path)
        model = ours(path, num, tp, stage=divide(args, stages, layers, args.n_mtp_layers > 0)[stage])
        tokenizer = Tokenizer(path, model.args.vocab_size) if text and world.rank == 0 else None
        made = {name: make() for name, make in of_engine.items()}
        engine = Engine(model, tokenizer, replace(run, pp=stages), world=world, pp=pp, **made)
        prepare(engine)
        found = None
        if world.rank == 0:
            found = use(engine)
            engine.close()
        else:
            engine.serve()
        for scheduler in engine.microbatches.schedulers:
            scheduler.check_integrity()
            assert scheduler.pool.n_available == (run.n_pages or 0) // stages
        assert not engine.registry.live and not engine._sequences and not any(engine.microbatches.in_flight) and not engine._leaving
        return found

    return on_every_stage(stages, size, work, ordered=num.batch_invariant)[0]


def load_args(path: Path) -> ModelArgs:
    return load_config(path / "config.json")


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("pipeline") / "v3", V3)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("pipeline") / "deep", five_layers("v3"))


def five_layers(family: str) -> dict[str, Any]:
    """The family's config with two dense layers and three of experts."""
    return FAMILIES[family] | {"num_hidden_layers": 5, "first_k_dense_replace": 2}


@pytest.mark.parametrize("mtp", [0, 2])
@pytest.mark.parametrize("stages, size", LAYOUTS)
def test_answers_over_stages(v3: Path, stages: int, size: int, mtp: int) -> None:
    """Fourteen prompts, more than fit at once, are answered as by one rank, in the order asked; with drafts too."""
    run = replace(RUN, mtp=mtp)
    alone = answers(v3, 1, 1, lambda engine: engine.generate(questions(14), greedy()), run)

    def use(engine: Engine) -> list[Request]:
        found = engine.generate(questions(14), greedy())
        assert engine.stats.generated == 14 * 12 and (not mtp or engine.stats.drafted[0] > 10)
        return found

    found = answers(v3, stages, size, use, run)
    assert [r.tokens for r in found] == [r.tokens for r in alone]
    assert [r.finish_reason for r in found] == ["length"] * 14


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(tmp_path: Path, name: str) -> None:
    """Stages of one layer each, and uneven ones: the dense layers alone, or the MTP module's stage with one layer."""
    path = random_checkpoint(tmp_path / "c", FAMILIES[name])
    args = load_args(path)
    run = replace(RUN, mtp=int(args.n_mtp_layers > 0))
    prompts = [[t % args.vocab_size for t in prompt] for prompt in questions(5)]

    def use(engine: Engine) -> list[list[int]]:
        return [r.tokens for r in engine.generate(prompts, greedy(6))]

    alone = answers(path, 1, 1, use, run)
    n = args.n_layers
    assert answers(path, n, 1, use, replace(run, n_pages=12 * n), layers=",".join(["1"] * n)) == alone
    assert answers(path, 2, 2, use, run, layers=f"1,{n - 1}") == alone
    assert answers(path, 2, 1, use, run, layers=f"{n - 1},1") == alone


@pytest.mark.parametrize("name", FAMILIES)
def test_four_stages(tmp_path: Path, name: str) -> None:
    """Of one and of two ranks: the dense layers in one stage or in two, uneven counts, the MTP module's stage with one
    layer or two."""
    path = random_checkpoint(tmp_path / "c", five_layers(name))
    args = load_args(path)
    run = replace(RUN, mtp=int(args.n_mtp_layers > 0), max_num_seqs=4)
    prompts = [[t % args.vocab_size for t in prompt] for prompt in questions(5, most=100)]

    def use(engine: Engine) -> list[list[int]]:
        return [r.tokens for r in engine.generate(prompts, greedy(5))]

    alone = answers(path, 1, 1, use, run)
    assert answers(path, 4, 1, use, run, layers="2,1,1,1") == alone
    assert answers(path, 4, 2, use, run, layers="1,1,1,2") == alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_as_one_stage(v3: Path, dtype: torch.dtype) -> None:
    """In the deterministic mode the log-probabilities of all likeliest tokens are bitwise those of one rank, drafts or
    not, on two and three stages, of one and of two ranks."""
    num = Numerics(dtype, experts="split", batch_invariant=True, virtual_ranks=4)

    def use(engine: Engine) -> list[Any]:
        return [[(e.token, e.logprob, e.top) for e in r.logprobs] for r in engine.generate(questions(5), greedy(8, logprobs=5))]

    alone = answers(v3, 1, 1, use, num=num)
    for stages, size, mtp in ((2, 1, 0), (3, 1, 2), (2, 2, 1)):
        assert answers(v3, stages, size, use, replace(RUN, mtp=mtp), num=num) == alone


def test_the_same_bits_on_four_stages(deep: Path) -> None:
    num = Numerics(torch.bfloat16, experts="split", batch_invariant=True, virtual_ranks=4)

    def use(engine: Engine) -> list[Any]:
        return [[(e.token, e.logprob, e.top) for e in r.logprobs] for r in engine.generate(questions(4), greedy(6, logprobs=5))]

    alone = answers(deep, 1, 1, use, num=num)
    for size, mtp in ((1, 1), (2, 0)):
        assert answers(deep, 4, size, use, replace(RUN, mtp=mtp), num=num) == alone


@pytest.mark.parametrize("how", [Numerics(torch.float32, fp8_latents=True), Numerics(torch.bfloat16)])
def test_answers_in_other_numerics(v3: Path, how: Numerics) -> None:
    """With one prompt at a time, as rows of a CPU's products in bfloat16 are independent anyway."""

    def use(engine: Engine) -> list[list[int]]:
        return [engine.generate([prompt], greedy(6))[0].tokens for prompt in questions(4)]

    assert answers(v3, 3, 1, use, num=how) == answers(v3, 1, 1, use, num=how)


def test_recorded_steps(v3: Path) -> None:
    """Each stage replays its layers on what the one before made."""
    run = replace(RUN, mtp=1)
    alone = answers(v3, 1, 1, lambda engine: [r.tokens for r in engine.generate(questions(5), greedy())], run)
    made = Recorders()
    found = answers(
        v3, 2, 1, lambda engine: [r.tokens for r in engine.generate(questions(5), greedy())], run, capture=made.make
    )
    assert found == alone and len(made) == 2 and all(recorder.replayed > 10 for recorder in made)


@pytest.mark.parametrize(("stages", "size", "mtp"), [(2, 1, 0), (2, 1, 2), pytest.param(2, 2, 1, marks=pytest.mark.trust)])
def test_answers_held_to_a_format(tmp_path: Path, stages: int, size: int, mtp: int) -> None:
    """Rank 0 holds its requests, beside free ones, while the other stages compute the next microbatch."""
    tiny = launch.make_tiny(tmp_path, fp8=False)
    shape = '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": false}'
    held = SamplingParams(temperature=1.0, seed=5, max_new_tokens=60, answer_format=AnswerFormat(shape))

    def use(engine: Engine) -> list[tuple[Any, ...]]:
        free = [engine.add(prompt, greedy(20), i) for i, prompt in enumerate(["free", "another"])]
        asked = [engine.add(prompt, held, 10 + i) for i, prompt in enumerate(["one", "two", "three", "four"])]
        while engine.busy:
            engine.step()
        return [(r.tokens, r.finish_reason, r.error, r.text) for r in (*free, *asked)]

    found = answers(tiny, stages, size, use, replace(RUN, mtp=mtp), text=True)
    assert found[:2] == answers(tiny, 1, 1, use, text=True)[:2]
    assert all(reason == "stop" and json.loads(text)["a"] in (1, 2) for _, reason, _, text in found[2:]), found


@pytest.mark.parametrize("seed, stages", [(0, 3), (1, 3), (2, 3), (3, 4), pytest.param(4, 4, marks=pytest.mark.trust)])
def test_requests_that_come_and_go(v3: Path, deep: Path, seed: int, stages: int) -> None:
    """Requests added, and some cancelled, at random moments, while pages run out: those that stay are answered as
    alone, in microbatches that share nothing; nothing is lost."""
    draw = random.Random(seed)
    prompts = questions(24, seed + 20, most=100)
    path, run = v3 if stages == 3 else deep, replace(RUN, n_pages=3 * stages, mtp=seed % 2, max_model_len=150)
    alone = {i: r.tokens for i, r in enumerate(answers(path, 1, 1, lambda e: e.generate(prompts, greedy(10)), run))}

    found = answers(path, stages, 1, lambda engine: come_and_go(engine, prompts, draw), run)
    assert {r.finish_reason for r in found} == {"length", "cancelled"} and len(found) == 24
    assert all(r.tokens == alone[r.id] for r in found if r.finish_reason == "length")
    assert all(alone[r.id][: len(r.tokens)] == r.tokens for r in found)


def test_a_call_that_is_left_in_the_middle(v3: Path) -> None:
    """Leaving `stream` gives all microbatches' pages back, and the next call is answered."""

    def use(engine: Engine) -> list[list[int]]:
        for i, _ in enumerate(engine.stream(questions(6), greedy(30))):
            if i == 4:
                break
        assert not engine.busy
        return [r.tokens for r in engine.generate(questions(3), greedy(5))]

    assert answers(v3, 3, 1, use) == answers(v3, 1, 1, use)


def test_stages_are_balanced() -> None:
    """The costliest stage costs as little as it can; V3's head weighs 1.6 layers, and with the MTP module 4.4."""
    v3 = load_config(CONFIGS / "config_671B.json")
    costs = layer_costs(v3)
    assert costs[0] == pytest.approx(costs[-1], rel=0.02)  # a dense MLP is as wide as nine experts
    assert [len(s.layers) for s in divide(v3, 2)] == [31, 30]
    assert [len(s.layers) for s in divide(v3, 2, mtp=True)] == [33, 28]
    assert [len(s.layers) for s in divide(v3, 4, mtp=True)] == [17, 16, 16, 12]
    assert divide(v3, 3, "20,21,20") == [
        Stage(range(20), True, False), Stage(range(20, 41), False, False), Stage(range(41, 61), False, True)
    ]  # fmt: skip
    draw = random.Random(0)
    for _ in range(50):
        n, costs = draw.randint(1, 4), [draw.randint(1, 9) for _ in range(draw.randint(4, 8))]
        last = draw.choice((0, 5, 30))
        counts = balanced(costs, last, n)

        def worst(counts: list[int], costs: list[int] = costs, last: int = last) -> int:
            ends = [sum(counts[:i]) for i in range(len(counts) + 1)]
            stages = [sum(costs[a:b]) for a, b in itertools.pairwise(ends)]
            return max([*stages[:-1], stages[-1] + last])

        assert sum(counts) == len(costs) and min(counts) >= 1 and len(counts) == n
        assert worst(counts) == min(worst(list(other)) for other in compositions(len(costs), n))


def compositions(total: int, n: int) -> list[tuple[int, ...]]:
    if n == 1:
        return [(total,)]
    return [(first, *rest) for first in range(1, total - n + 2) for rest in compositions(total - first, n - 1)]


@pytest.mark.parametrize("n, asked, says", [
    (4, None, "--pp 4: the model has 3 layers, fewer than stages"),
    (2, "1,x", "--pp-layers 1,x: expected numbers of layers, such as 20,21,20"),
    (2, "1,1", "--pp-layers 1,1: these are 2 numbers, 2 together; expected 2 stages of 3 layers, at least one in each"),
    (2, "1,1,1", "--pp-layers 1,1,1: these are 3 numbers, 3 together; expected 2 stages of 3 layers, at least one"),
    (2, "3,0", "--pp-layers 3,0: these are 2 numbers, 3 together; expected 2 stages of 3 layers, at least one in each"),
])  # fmt: skip
def test_stages_that_do_not_add_up(n: int, asked: str | None, says: str) -> None:
    with pytest.raises(UserError) as e:
        divide(ModelArgs.from_hf(V3), n, asked)
    assert str(e.value).startswith(says)


@pytest.mark.parametrize("fields, says", [
    ({"pp": 0}, "--dp is 1 and --pp is 0, expected at least 1"),
    ({"pp": 2, "dp": 2}, "--dp 2 and --pp 2: lanes of stages are not implemented; leave one out"),
    ({"pp_layers": "1,2"}, "--pp-layers needs --pp"),
])  # fmt: skip
def test_runs_that_contradict_themselves(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as e:
        RunConfig(**fields)
    assert str(e.value) == says


def test_drafts_of_the_demo_are_accepted() -> None:
    """Greedy answers of the demo over two stages with drafts are those of one without, and most drafts are accepted."""
    prompts = sums(5)

    def use(engine: Engine) -> list[list[int]]:
        found = [r.tokens for r in engine.generate(prompts, greedy(60))]
        if engine.mtp:
            assert engine.stats.accepted[0] > 0.6 * engine.stats.drafted[0] > 20
        return found

    run = RunConfig(n_pages=30, max_model_len=256, max_num_seqs=4)
    alone = answers(DEMO, 1, 1, use, run, text=True)
    assert answers(DEMO, 2, 1, use, replace(run, mtp=1), text=True) == alone


@pytest.mark.parametrize("name", FAMILIES)
def test_memory_of_a_stage(name: str) -> None:
    """Weights and latents of each stage are what its model holds, and together those of the whole."""
    args = ModelArgs.from_hf(FAMILIES[name])
    mtp = args.n_mtp_layers > 0
    latents = 0
    for stage in divide(args, 2, mtp=mtp):
        model = Transformer(args, Numerics(torch.float32), stage=stage, device="cpu")
        for parameter in model.parameters():
            parameter.data.zero_()
        held = {p.data_ptr(): p.nbytes for p in model.prepare().state_dict().values()}
        rank = RankSpec(args, Numerics(torch.float32), 1, gpu=False, mtp=mtp, stage=stage)
        assert sum(rank_memory.weight_bytes(rank).values()) == sum(held.values()) + absorbed(model)
        assert rank_memory.page_bytes(rank) == model.page_bytes
        latents += model.page_bytes
    whole = RankSpec(args, Numerics(torch.float32), 1, gpu=False, mtp=mtp)
    assert latents == rank_memory.page_bytes(whole)


def absorbed(model: Transformer) -> int:
    """Bytes of W^UK and W^UV, which no state dict has."""
    buffers = [b for name, b in model.named_buffers() if name.endswith(("w_uk", "w_uv"))]
    return sum(b.nbytes for b in buffers)
