"""The engine on random checkpoints: what a request gets is independent of batch composition."""

import contextlib
import dataclasses
import functools
import os
import random
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from checkpoint.convert import convert
from core import devices
from core.batch import DECODE_ROWS, Batch, BatchBounds
from core.errors import UserError
from core.numerics import PLAIN, Form, Numerics
from core.run_config import RunConfig
from core.sampling_params import SamplingParams
from engine import host_memory
from engine.block_table import BlockTable
from engine.choose_numerics import choose_numerics
from engine.engine import Engine
from engine.graphs import Graphs, RecordedBuffers, cuda_capture, records
from engine.setup import free_memory
from ops import reference
from ops.backend import choose_backend
from ops.cpu import kernels
from ops.formats import Routing
from parallel.group import Group
from parallel.startup import choose_threads
from support.engine_runs import Recorder
from support.families import V3
from support.model_pairs import hidden_states, ours, random_checkpoint, relative_error, theirs, tokens

GREEDY = SamplingParams(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("engine"), V3)


@pytest.fixture(scope="module")
def model(path):
    return ours(path)


def prompts(n: int) -> list[list[int]]:
    return [tokens(1 + 37 * i % 150, V3["vocab_size"], seed=100 + i) for i in range(n)]


def test_greedy_is_transformers_greedy(path, model):
    ids = tokens(40, V3["vocab_size"])
    expected = theirs(path).generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    [answer] = Engine(model, None, RunConfig(n_pages=10, max_model_len=256)).generate([ids], GREEDY)
    assert answer.tokens == expected[0, len(ids) :].tolist()
    assert answer.finish_reason == "length"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("max_num_seqs, budget", [(1, 2048), (3, 7), (8, 64)])
def test_answers_are_independent_of_batch_composition(model, temperature, max_num_seqs, budget):
    """Chunked prompts, mixed with decodes, more requests than fit: tokens equal those of each request alone."""
    params = SamplingParams(temperature=temperature, max_new_tokens=12, seed=5)
    alone = []
    for i, prompt in enumerate(prompts(9)):
        engine = Engine(model, None, RunConfig(n_pages=4, max_model_len=256))
        request = engine.add(prompt, params, id=i)
        while engine.busy:
            engine.step()
        alone.append(request.tokens)
    engine = Engine(model, None, RunConfig(n_pages=9, max_model_len=256, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget))
    assert [r.tokens for r in engine.generate(prompts(9), params)] == alone
    engine.scheduler.check_integrity()
    assert engine.scheduler.pool.n_available == 9


def test_few_rows_come_first(model, monkeypatch):
    """A batch's sequences are in the order that its phases ask for, and answers still go to whom they belong."""
    packed, pack = [], Batch.pack

    def record(sequences, *where):
        packed.append([len(new) for new, *_ in sequences])
        return pack(sequences, *where)

    monkeypatch.setattr(Batch, "pack", record)
    asked = [tokens(n, V3["vocab_size"], seed=n) for n in (DECODE_ROWS + 9, 3, DECODE_ROWS + 1, DECODE_ROWS)]
    answers = Engine(model, None, RunConfig(n_pages=16, max_model_len=128)).generate(asked, GREEDY)
    assert packed[0] == [3, DECODE_ROWS, DECODE_ROWS + 9, DECODE_ROWS + 1]
    alone = [Engine(model, None, RunConfig(n_pages=16, max_model_len=128)).generate([ids], GREEDY)[0] for ids in asked]
    assert [r.tokens for r in answers] == [r.tokens for r in alone]


def test_seeds(model):
    def answers(seed, temperature=1.0):
        params = SamplingParams(temperature=temperature, max_new_tokens=8, seed=seed)
        engine = Engine(model, None, RunConfig(n_pages=16, max_model_len=256))
        return [r.tokens for r in engine.generate([[1, 2, 3]] * 3, params)]

    first = answers(1)
    assert first == answers(1) != answers(2)
    assert first[0] != first[1], "two requests share their noise"
    assert len({tuple(t) for t in answers(1, temperature=0.0)}) == 1


def test_what_cannot_be_answered_fails_alone(model):
    engine = Engine(model, None, RunConfig(n_pages=8, max_model_len=100))
    long, empty, alien, good = engine.generate([tokens(100, 256), [], [256], [1, 2]], GREEDY)
    assert long.error == ("the prompt has 100 tokens and leaves no room for an answer in the context of 100 "
                          "(--max-model-len)")  # fmt: skip
    assert empty.error == "the prompt is empty"
    assert alien.error == "token id 256 is not in the vocabulary of 256"
    assert good.finish_reason == "length" and len(good.tokens) == 12 and good.error is None


def test_the_context_limit_ends_an_answer(model):
    engine = Engine(model, None, RunConfig(n_pages=2, max_model_len=100))
    [request] = engine.generate([tokens(97, 256)], GREEDY)
    assert len(request.tokens) == 3 and request.finish_reason == "length"


def test_cancel(model):
    engine = Engine(model, None, RunConfig(n_pages=8, max_model_len=256, max_num_seqs=2))
    a, b, c = (engine.add([1, 2, 3], GREEDY) for _ in range(3))
    engine.step()
    engine.cancel(a)
    engine.cancel(c)  # not even started
    done = engine.step()
    assert a.finish_reason == c.finish_reason == "cancelled" and {a, c} <= set(done)
    while engine.busy:
        engine.step()
    assert b.finish_reason == "length" and len(b.tokens) == 12
    engine.scheduler.check_integrity()
    assert engine.scheduler.pool.n_available == 8


@pytest.mark.parametrize("mtp", [0, 2])
@pytest.mark.parametrize("before", [0, 5, 63, 64])
def test_nan_fails_its_request_alone(path, mtp, before):
    """A poisoned embedding row: the request whose prompt has that token fails, alone in its step or not, at a page's
    end or not; the others' tokens do not change, and nobody finds what it computed."""
    model = ours(path)
    clean = Engine(model, None, RunConfig(n_pages=8, max_model_len=256)).generate([[3, 4]], GREEDY)
    model.embed.weight[77] = float("nan")
    engine = Engine(model, None, RunConfig(n_pages=8, max_model_len=256, mtp=mtp))
    poisoned = [*tokens(before, 70), 77]
    for others in ([], [[3, 4]]):
        bad, *good = engine.generate([poisoned, *others], GREEDY)
        assert bad.finish_reason == "error" and bad.error == "the model's output holds NaN or infinity"
        assert [r.tokens for r in good] == [clean[0].tokens] * len(others)
        engine.scheduler.check_integrity()
    [again] = engine.generate([[*poisoned, 5]], GREEDY)
    assert again.n_reused == 0 and again.finish_reason == "error"


def test_nan_that_has_gone_is_not_found_again(path):
    """What comes of it in the first chunks of a prompt fails that prompt, and nobody who asks the same later."""
    model = ours(path)
    [clean] = Engine(model, None, RunConfig(n_pages=8, max_model_len=256)).generate([prompt := tokens(200, 70)], GREEDY)
    engine = Engine(model, None, RunConfig(n_pages=8, max_model_len=256, max_num_batched_tokens=100))
    weight = model.embed.weight[prompt[3]].clone()
    model.embed.weight[prompt[3]] = float("nan")
    request = engine.add(prompt, GREEDY)
    engine.step()
    model.embed.weight[prompt[3]] = weight
    while engine.busy:
        engine.step()
    assert request.finish_reason == "error"
    [again] = engine.generate([prompt], GREEDY)
    assert again.n_reused == 0 and again.tokens == clean.tokens
    engine.scheduler.check_integrity()


def test_leaving_a_stream_early(model):
    engine = Engine(model, None, RunConfig(n_pages=8, max_model_len=256))
    for _ in engine.stream([[1, 2, 3], [4, 5]], GREEDY):
        break
    assert not engine.busy and engine.scheduler.pool.n_available == 8
    assert len(engine.generate([[1, 2, 3]], GREEDY)[0].tokens) == 12


def test_an_interrupted_call_does_not_keep_the_engine(model, monkeypatch):
    engine, forwards = Engine(model, None, RunConfig(n_pages=8, max_model_len=256)), []

    def forward(*args, real=model.forward):
        forwards.append(args)
        if len(forwards) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1, 2, 3], [4, 5]], GREEDY)
    assert not engine.busy and engine.scheduler.pool.n_available == 8
    engine.scheduler.check_integrity()
    assert len(engine.generate([[1, 2, 3]], GREEDY)[0].tokens) == 12


def test_limits_are_checked(model):
    with pytest.raises(UserError, match="--max-model-len is 99999, expected from 2 to this model's 2560"):
        Engine(model, None, RunConfig(max_model_len=99999, n_pages=8))
    with pytest.raises(UserError, match="needs 16 pages of cache and memory holds 8; ask for at most 512"):
        Engine(model, None, RunConfig(max_model_len=1000, n_pages=8))
    assert Engine(model, None, RunConfig(n_pages=8)).max_model_len == 512


def test_a_run_is_described_once(path):
    """RunConfig's fields as keywords, over those of a RunConfig; the engine's own says what came of them."""
    run = RunConfig(n_pages=8, max_num_seqs=3, dtype="float32", device="cpu")
    engine = Engine.from_pretrained(path, run, max_num_seqs=2, mtp=1, world=Lonely(1, 2))
    assert engine.run == dataclasses.replace(run, max_num_seqs=2, mtp=1, max_model_len=8 * 64 - 1)
    assert engine.scheduler.max_num_seqs == 2 and engine.model.num.dtype == torch.float32
    with pytest.raises(TypeError, match="'max_len' is neither an argument of from_pretrained nor a field of RunConfig"):
        Engine.from_pretrained(path, max_len=3)


def test_a_deterministic_run_needs_a_model_for_it(model):
    with pytest.raises(UserError, match=r"needs a model built with Numerics\(batch_invariant=True\)"):
        Engine(model, None, RunConfig(n_pages=8, deterministic=True))


# --- numerics --------------------------------------------------------------------------------------------------------


def test_ranks_of_a_host_share_it(monkeypatch):
    """Its free memory and its cores."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    assert (choose_threads(None, 1), choose_threads(None, 4), choose_threads(3, 4), choose_threads(None, 16)) == (12, 3, 3, 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)  # this process may use 12 of them
    assert choose_threads(16, 1) == 16
    with pytest.raises(UserError, match="--threads is 17, this host has 16 cores"):
        choose_threads(17, 1)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    text = "MemTotal: 1000 kB\nMemAvailable: 800 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda self: text if self.name == "meminfo" else "")
    for ranks in (1, 4):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert free_memory(torch.device("cpu")) == 800 * 1024 // ranks


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_what_its_limits_leave(version, tmp_path, monkeypatch):
    at, limit, usage, cache = {
        1: ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    }[version]
    groups = {1: "9:cpu:/a\n4:memory:/pod/box\n0::/\n", 2: "0::/pod/box\n"}[version]

    def write(path: str, text: object) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(str(text))

    assert list(host_memory.container_memory(tmp_path)) == []
    write("proc/self/cgroup", groups)
    assert list(host_memory.container_memory(tmp_path)) == []  # seen from inside, only the own group may be there
    for group, most in (("pod/box", 1000), ("pod", 700), ("", {1: 1 << 62, 2: "max"}[version])):
        write(f"{at}/{group}/{limit}", most)
        write(f"{at}/{group}/{usage}", 600)
        write(f"{at}/{group}/memory.stat", f"anon 400\n{cache} 100\n")
    assert list(host_memory.container_memory(tmp_path))[:2] == [500, 200]
    monkeypatch.setattr(host_memory, "container_memory", lambda: iter([300, 200]))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert free_memory(torch.device("cpu")) == 200


def test_choice_of_numerics(model):
    cpu, bf16 = torch.device("cpu"), model.args
    fp8 = dataclasses.replace(bf16, dtype="fp8", scale_fmt="ue8m0")
    assert choose_numerics(bf16, cpu, "auto", "auto")[0] == Numerics(torch.bfloat16)
    assert choose_numerics(dataclasses.replace(bf16, dtype="fp32"), cpu, "auto", "auto")[0] == Numerics(torch.float32)
    assert choose_numerics(fp8, cpu, "auto", "dequantised")[0] == Numerics(torch.bfloat16)
    kept = Numerics(torch.bfloat16, "bf16", "ue8m0")
    fast = dataclasses.replace(kept, fixed_point=True) if kernels.serve(torch.bfloat16) else Numerics()
    assert choose_numerics(fp8, cpu, "auto", "auto")[0] == fast
    numerics, says = choose_numerics(fp8, cpu, "auto", "bf16")
    assert numerics == kept and says.startswith("numerics: W8A16 (FP8 weights widened in the product)")
    assert choose_numerics(fp8, cpu, "float32", "auto")[0] == Numerics(torch.float32)
    numerics, says = choose_numerics(fp8, cpu, "auto", "fp8")
    assert numerics == Numerics(torch.bfloat16, "fp8", "ue8m0") and "emulated" in says
    for dtype, group in (("bf16", 0), ("int8", 0), ("int8", 128), ("int4", 32)):
        args = dataclasses.replace(bf16, dtype=dtype, group_size=group)
        with pytest.raises(UserError, match=f"--gemm fp8 needs FP8 weights, and this checkpoint's are {dtype}"):
            choose_numerics(args, cpu, "auto", "fp8")


def test_numerics_of_integers(model, monkeypatch):
    """Weights in groups are those of routed experts, as exceptions; blocks are the form of all projections."""
    monkeypatch.setattr(kernels, "serve", lambda dtype: True)
    monkeypatch.setattr(kernels, "may_use_fixed", lambda: False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    int4 = dataclasses.replace(model.args, dtype="int4", group_size=32)
    for device, has_fp8 in ((cpu, None), (gpu, True), (gpu, False)):
        numerics, says = choose_numerics(int4, device, "auto", "auto", has_fp8)
        assert numerics.gemm == "bf16" and numerics.projections == PLAIN
        form = Form("int4", (1, 32), torch.bfloat16)
        layers = [*(f"layers.{i}" for i in range(1, int4.n_layers)), "mtp.0"]
        assert set(numerics.exceptions) == {(f"{layer}.ffn.experts", form) for layer in layers}
        assert says.startswith(f"numerics: W4A16 (INT4 weights widened in the product) on {device.type}; ")
        assert "projections in bfloat16, as they are stored" in says
    numerics, says = choose_numerics(dataclasses.replace(model.args, dtype="int8"), cpu, "auto", "auto")
    expected = Numerics(gemm="bf16", projections=Form("int8"), fixed_point=True)
    assert numerics == expected and "W8A16 (INT8" in says
    monkeypatch.setattr(kernels, "serve", lambda dtype: False)
    assert choose_numerics(int4, cpu, "auto", "auto")[0] == Numerics()
    numerics, says = choose_numerics(int4, cpu, "auto", "bf16")
    assert numerics.exceptions and "computed by the reference (slow, for comparison), on cpu" in says


def test_fixed_point_is_said_and_can_be_left_out(model, monkeypatch):
    """By --gemm bf16, --deterministic, or a processor that has faster units or no kernels; all ranks agree about it,
    whatever theirs has."""
    monkeypatch.setattr(kernels, "serve", lambda dtype: True)
    monkeypatch.setattr(kernels, "may_use_fixed", lambda: True)
    cpu, fp8 = torch.device("cpu"), dataclasses.replace(model.args, dtype="fp8")
    said = "more than a few tokens at once in 13-bit fixed point (--gemm bf16: in bfloat16), on cpu"
    numerics, says = choose_numerics(fp8, cpu, "auto", "auto")
    assert numerics.fixed_point and said in says
    for gemm, deterministic in (("bf16", False), ("auto", True), ("dequantised", False), ("fp8", False)):
        numerics, says = choose_numerics(fp8, cpu, "auto", gemm, deterministic=deterministic)
        assert not numerics.fixed_point and "fixed point" not in says
    numerics, says = choose_numerics(fp8, torch.device("cuda"), "auto", "auto", False)
    assert not numerics.fixed_point and "fixed point" not in says
    monkeypatch.setattr(kernels, "may_use_fixed", lambda: False)
    numerics, says = choose_numerics(fp8, cpu, "auto", "auto")
    assert numerics.fixed_point and "fixed point" not in says


def test_contradicting_numerics(model):
    cpu, fp8 = torch.device("cpu"), dataclasses.replace(model.args, dtype="fp8")
    with pytest.raises(UserError, match="--gemm fp8 and --dtype float32 contradict each other"):
        choose_numerics(fp8, cpu, "float32", "fp8")


class Lonely(Group):
    """One of several ranks that never hears of the others: enough to load its share of a model."""

    def run_on_all_ranks(self, work, limit=0.0):
        return work()

    def broadcast_ints(self, values):
        return values

    def min_int(self, value):
        return value


@pytest.mark.parametrize("made", [None, "whole", "split"])
def test_layout_of_the_experts(path, tmp_path, made):
    """Split by default, as the files are if they were made for ranks, and as asked; what does not fit says what would."""
    if made is not None:
        convert(path, tmp_path, 2, experts=made)
    options = {"ckpt_path": path if made is None else tmp_path, "world": Lonely(1, 2), "n_pages": 8}
    for asked in ("auto", "whole", "split"):
        if made is None or asked in ("auto", made):
            engine = Engine.from_pretrained(experts=asked, **options)
            assert engine.model.num.experts == (asked if asked != "auto" else made or "split")
            assert engine.model.layers[1].ffn.experts.first == (16 if engine.model.num.experts == "whole" else 0)
        else:
            with pytest.raises(UserError, match=f"^--experts {asked}, but the files hold {made} experts: convert again"):
                Engine.from_pretrained(experts=asked, **options)


def test_layout_that_does_not_fit(tmp_path):
    path = random_checkpoint(tmp_path, V3 | {"moe_intermediate_size": 33})
    says = r"^moe_intermediate_size 33 does not divide by 2 ranks \(it works with 1\); --experts whole works$"
    with pytest.raises(UserError, match=says):
        Engine.from_pretrained(path, experts="split", world=Lonely(1, 2), n_pages=8)
    assert Engine.from_pretrained(path, world=Lonely(1, 2), n_pages=8).model.num.experts == "whole"


# --- page pool under pressure ----------------------------------------------------------------------------------------


def answers_alone(model, prompts, params, **options):
    out = []
    for i, prompt in enumerate(prompts):
        engine = Engine(model, None, RunConfig(n_pages=8, max_model_len=256, prefix_reuse=False, **options))
        request = engine.add(prompt, params, id=i)
        while engine.busy:
            engine.step()
        out.append(request.tokens)
    return out


@pytest.fixture(scope="module")
def answers_for_a_quarter(model):
    """The answers of the requests below, each given alone, by the temperature and the drafts that sampling has."""

    @functools.cache
    def answers(temperature, drafts):
        return answers_alone(model, QUARTER, SamplingParams(temperature=temperature, max_new_tokens=60), mtp=drafts)

    return answers


QUARTER = [tokens(60 + 11 * i, V3["vocab_size"], seed=i) for i in range(8)]


@pytest.mark.parametrize("mtp, temperature, budget", [(0, 0.0, 2048), (2, 0.0, 2048), (0, 0.8, 2048), (2, 0.8, 2048), (2, 0.8, 48)])
def test_pages_for_a_quarter_of_the_demand(model, answers_for_a_quarter, mtp, temperature, budget):
    """Requests queue and are preempted; nobody starves, nothing leaks, every answer is the one given alone (sampled
    ones too: a sequence that was away comes back with the drafts it had, in one chunk or in several)."""
    params = SamplingParams(temperature=temperature, max_new_tokens=60)
    engine = Engine(model, None, RunConfig(n_pages=5, max_model_len=256, max_num_seqs=8, mtp=mtp, max_num_batched_tokens=budget))
    assert sum(engine.scheduler.pages_for(len(prompt) + 60) for prompt in QUARTER) > 4 * 5
    got = engine.generate(QUARTER, params)
    assert engine.stats.preemptions > 0
    assert [r.tokens for r in got] == answers_for_a_quarter(temperature, mtp if temperature else 0)
    engine.scheduler.check_integrity()
    assert engine.scheduler.pool.n_available == 5


@pytest.mark.parametrize("mtp", [0, 3])
def test_prefix_reuse_changes_no_answer(model, mtp):
    """A conversation of three turns: later turns find the earlier ones' pages and say what they would have said."""
    params = SamplingParams(temperature=0, max_new_tokens=30)
    reusing, fresh = (
        Engine(model, None, RunConfig(n_pages=8, max_model_len=500, mtp=mtp, prefix_reuse=reuse)) for reuse in (True, False)
    )
    conversation = tokens(100, V3["vocab_size"])
    for turn in range(3):
        [a], [b] = reusing.generate([conversation], params), fresh.generate([conversation], params)
        assert a.tokens == b.tokens
        assert b.n_reused == 0 and (a.n_reused >= 64 * turn) and (turn == 0 or a.n_reused > 0)
        conversation = [*conversation, *a.tokens, *tokens(50, V3["vocab_size"], seed=turn)]
    assert reusing.stats.reused > 64 * 3 and fresh.stats.reused == 0


def test_many_short_requests_leave_no_trace(model):
    engine = Engine(model, None, RunConfig(n_pages=6, max_model_len=128))
    params = SamplingParams(temperature=0, max_new_tokens=2)
    for _ in range(3):
        engine.generate([[i % 250, 5] for i in range(100)], params)
    assert not engine._sequences and not engine.registry.live and not engine.registry.sequence_of
    engine.scheduler.check_integrity()
    assert engine.scheduler.pool.n_available == 6


# --- speculation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mtp", [1, 2, 3, 4])
def test_greedy_speculation_is_lossless(model, mtp):
    """The same tokens with drafts as without, in mixed batches with chunked prompts, whatever the drafts are worth."""
    wanted = prompts(9)
    params = SamplingParams(temperature=0, max_new_tokens=25)
    engine = Engine(model, None, RunConfig(n_pages=40, max_model_len=256, max_num_seqs=4, max_num_batched_tokens=48, mtp=mtp))
    assert [r.tokens for r in engine.generate(wanted, params)] == answers_alone(model, wanted, params)
    assert engine.stats.drafted[0] > 100


class Planted:
    """Stands in for the MTP module's proposals: a fixed answer per prompt, right or wrong on purpose."""

    def __init__(self, engine, answers, wrong=False):
        self.engine, self.answers, self.wrong = engine, answers, wrong
        engine.sampler.propose = self

    def __call__(self, sequences, logits):
        out = []
        for sequence in sequences:
            request = self.engine.registry.live[sequence.id]
            at = len(sequence.tokens) + len(sequence.drafts) - len(request.prompt)
            answer = self.answers[request.id]
            token = answer[at] if at < len(answer) else 0
            token = (token + 1) % 256 if self.wrong else token
            request.draft.tokens.append(token)
            request.draft.q.append(None)
            out.append(token)
        return out


@pytest.mark.parametrize("mtp", [1, 4])
def test_a_perfect_drafter_is_always_believed(model, mtp):
    params = SamplingParams(temperature=0, max_new_tokens=21)
    answers = answers_alone(model, prompts(3), params)
    engine = Engine(model, None, RunConfig(n_pages=30, max_model_len=256, mtp=mtp))
    Planted(engine, answers)
    assert [r.tokens for r in engine.generate(prompts(3), params)] == answers
    assert engine.stats.accepted == engine.stats.drafted and engine.stats.drafted[0] > 0
    assert engine.stats.steps == 1 + -(-20 // (1 + mtp))


def test_an_adversarial_drafter_is_never_believed(model):
    params = SamplingParams(temperature=0, max_new_tokens=15)
    answers = answers_alone(model, prompts(3), params)
    engine = Engine(model, None, RunConfig(n_pages=30, max_model_len=256, mtp=3))
    Planted(engine, answers, wrong=True)
    assert [r.tokens for r in engine.generate(prompts(3), params)] == answers
    assert engine.stats.accepted == [0, 0, 0] and engine.stats.steps == 15


def test_drafts_see_what_the_mtp_module_would_see_in_one_pass(model):
    """After any mix of chunks, acceptances and rejections the draft cache is what a single pass would have written."""
    params = SamplingParams(temperature=0, max_new_tokens=20)
    prompt = tokens(90, V3["vocab_size"], seed=3)
    [answer] = answers_alone(model, [prompt], params)
    half = [(t + 1) % 256 if i in (4, 6, 13) else t for i, t in enumerate(answer)]  # wrong in either place, or right
    engine = Engine(model, None, RunConfig(n_pages=4, max_model_len=250, max_num_batched_tokens=16, mtp=2))
    Planted(engine, [half])
    engine.generate([prompt], params)
    assert all(0 < a < d for a, d in zip(engine.stats.accepted, engine.stats.drafted, strict=True))
    everything = prompt + answer
    whole = Engine(model, None, RunConfig(n_pages=4, max_model_len=250, mtp=2))
    n = len(everything) - 1
    batch = Batch.pack([(everything[:-1], 0, [0, 1])])
    hidden = model(batch, whole.runner.cache)
    model.draft(Batch.pack([(everything[1:], 0, [0, 1])]), hidden, whole.runner.cache)
    for layer in range(len(engine.runner.cache)):
        a, b = (c[layer, :2].flatten(0, 1)[:n] for c in (engine.runner.cache, whole.runner.cache))
        assert relative_error(a, b) < 1e-5, layer


def test_drafts_follow_the_module_applied_again(model):
    """Each draft but the first is made from the one before it, and its state, one position further."""
    for n in (5, 40, 70):
        ids = tokens(n, V3["vocab_size"], seed=n)
        engine = Engine(model, None, RunConfig(n_pages=4, max_model_len=200, mtp=4))
        request = engine.add(ids, GREEDY)
        engine.step()
        cache, pages = model.new_cache(2), [0, 1]
        hidden = model(Batch.pack([(ids, 0, pages)]), cache)
        followers = [*ids[1:], *request.tokens]
        states = model.draft(Batch.pack([(followers, 0, pages)]), hidden, cache)[-1:]
        drafts = [int(model.logits(states).argmax())]
        for k in range(1, 4):
            states = model.draft(Batch.pack([(drafts[-1:], n - 1 + k, pages)]), states, cache)
            drafts.append(int(model.logits(states).argmax()))
        assert request.draft.tokens == drafts


def test_drafts_do_not_reuse_what_another_token_followed(model):
    """The module's latent of a token depends on the next one: with drafts a page is shared only if that agrees too."""
    page = tokens(64, V3["vocab_size"])
    for mtp, reused in ((0, [0, 64, 64]), (1, [0, 0, 64])):
        engine = Engine(model, None, RunConfig(n_pages=12, max_model_len=128, max_num_seqs=1, mtp=mtp))
        asked = [[*page, 1, 2], [*page, 3, 2], [*page, 1, 4]]
        assert [r.n_reused for r in engine.generate(asked, GREEDY)] == reused


def test_mtp_is_refused_where_there_is_none(tmp_path, monkeypatch):
    """By the constructor, and before anything is loaded."""
    config = {**V3, "num_nextn_predict_layers": 0, "num_hidden_layers": 1}
    model = ours(path := random_checkpoint(tmp_path / "c", config))
    with pytest.raises(UserError, match="--mtp needs an MTP module, and this checkpoint has none"):
        Engine(model, None, RunConfig(n_pages=4, mtp=1))
    with pytest.raises(UserError, match="--mtp is 5, expected from 0 to 4"):
        Engine(model, None, RunConfig(n_pages=4, mtp=5))
    monkeypatch.setattr("engine.setup.load_into", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match="--mtp needs an MTP module, and this checkpoint has none"):
        Engine.from_pretrained(path, mtp=1)


# --- recorded steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mtp, temperature", [(0, 0.0), (1, 0.0), (3, 0.0), (2, 0.9)])
def test_recorded_steps_change_no_answer(model, mtp, temperature):
    """Batches filled up with tokens that are not there, over scattered pages, with chunked prompts, shared beginnings
    and preemption between: the tokens are those of steps that were not recorded, and the drafts as good."""
    wanted = [*prompts(9), *prompts(3)]
    params = SamplingParams(temperature=temperature, max_new_tokens=25, seed=3)
    how = dict(n_pages=11, max_model_len=256, max_num_seqs=5, max_num_batched_tokens=48, mtp=mtp)
    recorder = Recorder()
    recording, plain = Engine(model, None, RunConfig(**how), capture=recorder), Engine(model, None, RunConfig(**how))
    assert [r.tokens for r in recording.generate(wanted, params)] == [r.tokens for r in plain.generate(wanted, params)]
    assert recording.stats.accepted == plain.stats.accepted
    assert recorder.recorded == 5 * (1 if mtp == 0 else 2 if mtp == 1 else 3)  # batches of 1, 2, 3, 4 and 5
    assert recorder.replayed > plain.stats.steps / 2
    recording.scheduler.check_integrity()


def test_what_is_recorded_fits_every_batch(model):
    """The attention kernels go by what the host says of a batch: a recorded one says the most that may come."""
    bounds = []

    def forward(batch, hidden):
        bounds.append((batch.decode, batch.prefill.n, batch.kv_lens.tolist(), batch.pages.shape))
        return hidden

    buffers = RecordedBuffers(3, 2, 0, 4, torch.float32, BlockTable(3, 5, 9, torch.device("cpu")))
    graphs = Graphs(forward, buffers, max_num_seqs=3, width=2, padding_page=9, capture=Recorder())
    assert [e[0] for e in bounds] == [BatchBounds(n, 2 * n, 2, 320, 320 * n) for n in (3, 2, 1)]
    states = torch.arange(12.0).view(3, 4)
    out = graphs.run([([7, 8], 66, [3, 4]), ([9], 0, [2])], states)
    assert torch.equal(out.hidden[out.rows], states) and bounds[-1] == (bounds[1][0], 0, [68, 1], (2, 5))
    assert graphs.fit([([1, 2], 0, [0])] * 3)
    assert not graphs.fit([([1, 2, 3], 0, [0])]) and not graphs.fit([([1], 0, [0])] * 4)
    assert not graphs.fit([([1], 0, [0] * 6)])
    buffers = RecordedBuffers(1, 96, 0, 4, torch.float32, BlockTable(1, 3, 9, torch.device("cpu")))
    bounds.clear()
    forward = lambda batch, hidden: bounds.append((batch.decode, batch.prefill)) or hidden  # noqa: E731
    graphs = Graphs(forward, buffers, max_num_seqs=1, width=96, padding_page=9, capture=Recorder())
    assert bounds == [(BatchBounds(), BatchBounds(1, 96, 96, 192, 192))]
    assert [n for n in (48, 49, 96, 97) if graphs.fit([([1] * n, 0, [0, 1])])] == [49, 96]


def test_recording_is_for_what_asks_the_device_nothing():
    """Float32 attends by the reference, which reads lengths and pages on the host: inside a capture that is an error."""
    assert records(True, torch.bfloat16)
    assert not records(True, torch.float32) and not records(False, torch.bfloat16)


def test_captures_warm_up_on_one_stream(monkeypatch):
    """Each stream that cuBLAS has worked on costs a workspace for good; and the warm-up comes before the capture."""
    streams, said = [], []

    class Stream:
        def __init__(self):
            streams.append(self)

        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def within(name):
        said.append(name)
        yield
        said.append("end")

    first = Stream()
    streams.clear()
    for name, stand_in in {
        "Stream": Stream,
        "current_stream": lambda: first,
        "stream": lambda stream: within("warm up"),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: said.append("replay")),
        "graph": lambda graph, pool: within(pool),
        "graph_pool_handle": lambda: "capture",
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    capture = cuda_capture()
    replays = [capture(lambda i=i: said.append("run") or torch.tensor(i)) for i in range(3)]
    assert said == ["warm up", "run", "run", "end", "capture", "run", "end"] * 3 and len(streams) == 1
    assert [int(replay()) for replay in replays] == [0, 1, 2] and said[-3:] == ["replay"] * 3


@pytest.mark.parametrize("mtp", [0, 1])
def test_a_mixed_step_is_split(model, mtp):
    """What decodes is replayed while a long prompt comes in by chunks, which run by themselves; the answers stay."""
    forwards = []
    run = RunConfig(n_pages=30, max_model_len=400, max_num_seqs=3, max_num_batched_tokens=64, mtp=mtp)
    recorder = Recorder()
    engine, plain = Engine(model, None, run, capture=recorder), Engine(model, None, run)
    step = engine.runner._step
    engine.runner._step = lambda batch, hidden: forwards.append(batch.whole) or step(batch, hidden)
    params = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)
    short, long = [5, 6, 7], tokens(300, V3["vocab_size"])
    answers = [engine.add(short, params)]
    while not answers[0].tokens:
        engine.step()
    answers.append(engine.add(long, params))
    replayed, before, forwards[:] = recorder.replayed, len(answers[0].tokens), []
    while not answers[1].tokens:
        engine.step()
    assert len(answers[0].tokens) - before >= 4 <= recorder.replayed - replayed
    assert forwards and all(bounds.n == 1 and bounds.longest_q > 1 for bounds in forwards)
    while engine.busy:
        engine.step()
    assert [r.tokens for r in answers] == [r.tokens for r in plain.generate([short, long], params)]


@pytest.mark.parametrize("mtp", [0, 2])
def test_a_short_chunk_is_replayed(model, mtp, monkeypatch):
    """A chunk that fills more than half of the recorded shape, alone in a step or beside sequences that decode; those
    that are shorter or longer, have too many tokens before them, or come together run by themselves. The answers stay."""
    for module in ("graphs", "runner"):
        monkeypatch.setattr(f"engine.{module}.CHUNK_ROWS", 96)
        monkeypatch.setattr(f"engine.{module}.CHUNK_KEYS", 192)
    run = RunConfig(n_pages=30, max_model_len=400, max_num_seqs=3, max_num_batched_tokens=128, mtp=mtp)
    recorder = Recorder()
    engine, plain = Engine(model, None, run, capture=recorder), Engine(model, None, run)
    assert recorder.recorded == 3 * (1 if mtp == 0 else 3) + 1
    chunks, forwards = [], []
    chunk_run, eager = engine.runner.chunk_graph.run, engine.runner._run_eagerly
    monkeypatch.setattr(engine.runner.chunk_graph, "run", lambda s, h: chunks.append([len(t) for t, *_ in s]) or chunk_run(s, h))
    monkeypatch.setattr(
        engine.runner, "_run_eagerly",
        lambda f, s, *rest: (f == engine.runner._step and forwards.append([len(t) for t, *_ in s])) or eager(f, s, *rest),
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True)
    asked = [tokens(n, V3["vocab_size"], n) for n in (96, 49, 48, 97, 180, 220, 5)]
    found = [engine.generate([prompt], params)[0] for prompt in asked]
    assert chunks == [[96], [49], [52]], "the last is the second chunk of 180"
    assert forwards == [[48], [97], [128], [128], [92], [5]]
    chunks.clear()
    forwards.clear()
    beside = [engine.add([5, 6, 7], params)]
    engine.step()
    beside += [engine.add(asked[1], params, 1)]
    engine.step()
    assert chunks == [[49]] and forwards == ([[3]] if mtp == 0 else [])
    while engine.busy:
        engine.step()
    answers = [r.tokens for r in plain.generate([*asked, [5, 6, 7], asked[1]], params)]
    assert [r.tokens for r in (*found, *beside)] == answers


def test_only_new_pages_are_sent(monkeypatch):
    """A sequence keeps its row; one that grows sends its new page, one that comes its whole row, one at rest nothing."""
    table = BlockTable(4, 6, 99, torch.device("cpu"))
    sent = []
    monkeypatch.setattr("engine.block_table.upload", lambda values, *to: sent.append(len(values[0])) or devices.upload(values, *to))
    a, b, c = [1, 2], [3], [4, 5, 6]
    assert table.place([([0], 0, a), ([0], 0, b), ([0], 0, c)], 4) == [0, 1, 2] and sent == [6]
    assert table.place([([0], 0, c), ([0], 0, a)], 4) == [2, 0] and sent == [6]
    c.append(7)
    assert table.rows_needed([([0], 0, c)]) == 3
    assert table.place([([0], 0, c)], 4) == [2] and sent == [6, 1]
    d = [8]
    assert table.place([([0], 0, c), ([0], 0, d)], 2) == [0, 1] and sent == [6, 1, 5]
    assert table.pages[0, :4].tolist() == c and table.pages[1, 0] == 8
    rows = table.place([([0], 0, a), ([0], 0, d)], 4)  # its row is another's now
    assert rows == [0, 1] and sent == [6, 1, 5, 2] and table.pages[0, :2].tolist() == a


def test_a_closed_engine_has_no_graphs(model, monkeypatch):
    """They hold communicators, which must go before the process group does: at once, not when the garbage collector
    gets to them, and the device must have done with them."""
    run = RunConfig(n_pages=9, max_model_len=520, max_num_seqs=2, max_num_batched_tokens=512, mtp=1)
    engine = Engine(model, None, run, capture=Recorder())
    recorded = engine.runner.all_graphs
    graphs = [weakref.ref(replay) for g in recorded for replay in g._replay.values()]
    assert len(graphs) == 2 * 2 + 1 and all(g() for g in graphs)
    said = []
    monkeypatch.setattr("gc.collect", lambda: said.append(("collect", [g() for g in graphs])))
    monkeypatch.setattr(devices, "synchronise", lambda device: said.append(("synchronise", device)))
    engine.close()
    assert engine.closed and said == [("collect", [None] * 5), ("synchronise", model.device)]


def test_recorded_steps_leave_other_pages_alone(model):
    """What fills a batch up is written to the padding page only."""
    engine = Engine(model, None, RunConfig(n_pages=4, max_model_len=100, max_num_seqs=4, mtp=1), capture=Recorder())
    engine.runner.cache[:, :4] = 7.0
    a, b = engine.add([1, 2, 3], GREEDY), engine.add([4, 5], GREEDY)
    while engine.busy:
        engine.step()
    written = (engine.runner.cache != 7.0).any(dim=-1).any(dim=0).sum(dim=-1).tolist()  # tokens of each page
    assert written[:4] == [len(r.prompt) + len(r.tokens) - 1 for r in (a, b)] + [0, 0]


# --- batch-invariant mode --------------------------------------------------------------------------------------------


def logits_of_mixes(model, mixes, seed):
    """Runs random mixes; for each request the bits of all logits that it sampled from, keyed by request."""
    generator = random.Random(seed)
    seen: dict[int, list[set]] = {}
    prompts = [tokens(generator.randint(1, 90), V3["vocab_size"], seed=500 + i) for i in range(6)]
    for _ in range(mixes):
        mtp = generator.choice([0, 0, 1, 3])
        run = RunConfig(
            n_pages=generator.choice([5, 40]), max_model_len=200, max_num_seqs=generator.randint(1, 6),
            max_num_batched_tokens=generator.choice([3, 17, 64, 400]), mtp=mtp,
            prefix_reuse=generator.random() < 0.5, deterministic=model.num.batch_invariant,
        )  # fmt: skip
        engine = Engine(model, None, run)
        decide = engine.sampler._decide

        def record(request, chunk, verified, scores, first, decide=decide):
            at = len(request.tokens)
            tokens, finish = decide(request, chunk, verified, scores, first)
            for i in range(len(tokens)):
                places = seen.setdefault(request.id, [set() for _ in range(12)])
                places[at + i].add(scores.logits[first + i].numpy().tobytes())
            return tokens, finish

        engine.sampler._decide = record
        chosen = generator.sample(range(6), generator.randint(1, 6))
        again = generator.random() < 0.3  # a second time over the same pages
        for i in chosen + (chosen if again else []):
            engine.add(prompts[i], SamplingParams(temperature=0, max_new_tokens=generator.choice([3, 12])), id=i)
        while engine.busy:
            engine.step()
    return seen


MIXES = [10, pytest.param(100, marks=pytest.mark.trust)]


@pytest.mark.parametrize("mixes", MIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant_mode_is_bitwise(path, dtype, mixes):
    """Whatever the batch composition, chunking, reuse, preemption or speculation: one set of bits for each position."""
    seen = logits_of_mixes(ours(path, Numerics(dtype, batch_invariant=True)), mixes, seed=1)
    assert sum(len(places) for places in seen.values()) > 50
    assert all(len(bits) == 1 for places in seen.values() for bits in places if bits)


def test_one_set_of_bits_in_a_router_of_any_width():
    """A row's scores do not depend on how many rows are behind it, where rows end in the middle of a vector too."""
    rule = Routing(4, "sigmoid", "noaux_tc", 4, 2, True, 2.5)
    logits = torch.randn(40, 16)
    for dtype in (torch.float32, torch.bfloat16):
        ops = choose_backend(torch.device("cpu"), Numerics(dtype, batch_invariant=True))
        whole = ops.route(logits, None, rule)
        for n in range(1, 40):
            assert all(torch.equal(a, b[:n]) for a, b in zip(ops.route(logits[:n], None, rule), whole, strict=True)), n


def test_one_set_of_bits_over_many_key_tiles(path):
    """A context of several tiles of keys: in one piece, in chunks, and with other requests."""
    model = ours(path, Numerics(torch.float32, batch_invariant=True))
    prompt = tokens(1300, V3["vocab_size"])
    bits = set()
    for budget, others in ((4096, []), (100, []), (333, prompts(3))):
        engine = Engine(model, None, RunConfig(n_pages=40, max_model_len=1400, max_num_batched_tokens=budget, deterministic=True))
        params = SamplingParams(temperature=0, max_new_tokens=3, logprobs=5)
        bits.add(repr(engine.generate([prompt, *others], params)[0].logprobs))
    assert len(bits) == 1


def test_without_the_mode_bits_differ(path):
    """The control: the same mixes without the mode do not agree to the bit, so the test above can fail."""
    seen = logits_of_mixes(ours(path), MIXES[0], seed=1)
    assert any(len(bits) > 1 for places in seen.values() for bits in places)


# --- FP8 latents -----------------------------------------------------------------------------------------------------


def test_fp8_latents_cost_what_fp8_costs(tmp_path):
    """Without experts, whose choice among near ties would turn rounding into chaos."""
    path = random_checkpoint(tmp_path / "c", {**V3, "first_k_dense_replace": 3, "num_nextn_predict_layers": 0})
    ids = tokens(200, V3["vocab_size"])
    exact = ours(path)
    packed = ours(path, Numerics(torch.float32, fp8_latents=True))
    assert packed.new_cache(1).dtype == torch.uint8 and packed.page_bytes < 0.45 * exact.page_bytes
    error = relative_error(hidden_states(packed, ids, [150, 49, 1]), hidden_states(exact, ids))
    assert 1e-3 < error < 0.15  # 2 % a value, in a network whose random attention amplifies it
    latent = torch.randn(30, 80)
    back = reference.unpack_latents(reference.pack_latents(latent, 64), 64, torch.float32)
    assert relative_error(back[:, :64], latent[:, :64]) < 0.04
    assert torch.equal(back[:, 64:], latent[:, 64:].bfloat16().float())
