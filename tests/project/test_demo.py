"""The shipped demo: laid out as released, the same network to transformers, right answers, drafts that are believed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint.directory import Checkpoint
from checkpoint.quantize import quantize
from core.config import ModelArgs, check_agreement, load_config
from core.numerics import Numerics
from core.run_config import RunConfig
from core.sampling_params import SamplingParams
from engine.engine import Engine
from support.model_pairs import hidden_states, ours, relative_error

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo" / "checkpoint"
pytestmark = pytest.mark.skipif(not DEMO.exists(), reason="no demo checkpoint in this tree")

QUESTIONS = [
    ("What is 347 + 285?", "632"),
    ("What is 704 - 389?", "315"),
    ('Spell the word "lantern".', "l-a-n-t-e-r-n"),
    ('Reverse the word "penguin".', "niugnep"),
    ("Sort these numbers: 42, 17, 93, 28, 64.", "17, 28, 42, 64, 93"),
    ("Count from 95 to 103.", "95, 96, 97, 98, 99, 100, 101, 102, 103"),
    ("The code of maple is 4821. The code of otter is 0937. The code of Oslo is 5560. What is the code of otter?", "0937"),
]
GREEDY = SamplingParams(temperature=0, max_new_tokens=300)


@pytest.fixture(scope="module")
def in_float32():
    return Engine.from_pretrained(DEMO, dtype="float32", max_model_len=1024).model


@pytest.fixture(scope="module")
def tokenizer():
    return Engine.from_pretrained(DEMO, max_model_len=256).tokenizer


def chat(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def right(engine: Engine, questions=QUESTIONS) -> int:
    answers = engine.generate([chat(q) for q, _ in questions], GREEDY)
    return sum(r.parts[1] == a and r.finish_reason == "stop" for r, (_, a) in zip(answers, questions, strict=True))


def test_released_layout():
    assert sum(f.stat().st_size for f in DEMO.iterdir()) <= 12e6
    checkpoint = Checkpoint(DEMO)
    args = checkpoint.args
    assert (checkpoint.kind, checkpoint.quantised, checkpoint.has_mtp) == ("hf", True, True)
    assert args.dtype == "fp8" and args.rope_factor > 1 and args.n_mtp_layers == 1 and args.q_lora_rank
    assert args.n_expert_groups > args.n_limited_groups and args.topk_method == "noaux_tc"
    checkpoint.check(checkpoint.partition(args, 1))
    index = json.loads((DEMO / "model.safetensors.index.json").read_text())["weight_map"]
    apart = [n for n in index if n + "_scale_inv" in index and index[n] != index[n + "_scale_inv"]]
    assert apart, "no scale lies in another file than its weight"
    assert f"model.layers.{args.n_layers}.eh_proj.weight" in index
    check_agreement(ROOT / "configs" / "config_demo.json", args)
    assert load_config(ROOT / "configs" / "config_demo.json") == args


def test_every_config_names_every_field():
    from dataclasses import fields

    for path in (ROOT / "configs").glob("*.json"):
        assert set(json.loads(path.read_text())) == {f.name for f in fields(ModelArgs) if f.compare}, path


@torch.no_grad()
def test_same_network_as_transformers(in_float32, tokenizer):
    """Logits over a long prompt and its answer, from exactly dequantised weights."""
    sys.path.insert(0, str(ROOT / "demo"))
    from reload import load_transformers

    theirs, _ = load_transformers(DEMO, torch.float32)
    facts = " ".join(f"The code of {w} is {1000 + i}." for i, w in enumerate(["maple", "otter", "Oslo", "amber"] * 12))
    ids = tokenizer.encode_chat(chat(f"{facts} What is the code of otter?"))
    expected = theirs(torch.tensor([ids])).logits[0]
    found = in_float32.logits(hidden_states(in_float32, ids))
    assert relative_error(found, expected) < 1e-5
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("how", [{}, {"dtype": "float32"}, {"gemm": "fp8"}], ids=["bf16", "float32", "w8a8"])
def test_answers_are_right(how):
    """In bfloat16, with exactly dequantised weights, and with FP8 activations as well."""
    assert right(Engine.from_pretrained(DEMO, max_model_len=1024, **how)) >= len(QUESTIONS) - 1


@pytest.mark.parametrize(("format", "group_size"), [("int4", 32), ("int4", 128), ("int8", 128)])
def test_quantised_answers_are_right(format, group_size, tmp_path):
    """With routed experts in integers, as quantize.py writes them, and everything else in bfloat16."""
    quantize(DEMO, tmp_path, format, group_size, "cpu")
    assert right(Engine.from_pretrained(tmp_path, max_model_len=1024)) >= len(QUESTIONS) - 1


def test_fp8_latents_answer_as_well(tokenizer):
    model = ours(DEMO, Numerics(torch.bfloat16, fp8_latents=True))
    assert right(Engine(model, tokenizer, RunConfig(max_model_len=1024))) >= len(QUESTIONS) - 1


def test_drafts_are_lossless_and_believed(in_float32, tokenizer):
    """A broken draft head does not show in the answers, so acceptance itself is asserted."""
    plain = Engine(in_float32, tokenizer, RunConfig(max_model_len=1024)).generate([chat(q) for q, _ in QUESTIONS], GREEDY)
    for k in (1, 2):
        engine = Engine(in_float32, tokenizer, RunConfig(max_model_len=1024, mtp=k))
        drafted = engine.generate([chat(q) for q, _ in QUESTIONS], GREEDY)
        assert [r.tokens for r in drafted] == [r.tokens for r in plain]
        first = engine.stats.accepted[0] / engine.stats.drafted[0]
        assert first > 0.8, f"only {first:.0%} of first drafts were accepted"
        assert engine.stats.generated / engine.stats.sampled_steps > 1.7


def test_thinking_is_kept_apart(in_float32, tokenizer):
    [request] = Engine(in_float32, tokenizer, RunConfig(max_model_len=1024)).generate([chat("What is 347 + 285?")], GREEDY)
    reasoning, answer = request.parts
    assert request.opens_thinking and "7+5" in reasoning and answer == "632"


def test_a_second_turn_remembers_and_reuses(tokenizer):
    """In bitwise mode the second answer has the same tokens with reuse and without; with it the facts are not run again."""
    words = "maple otter Oslo fox amber pearl cedar iron swan duck".split()
    facts = " ".join(f"The code of {w} is {4821 + 137 * i}." for i, w in enumerate(words))
    model = ours(DEMO, Numerics(torch.bfloat16, batch_invariant=True))
    answers = []
    for reuse in (True, False):
        engine = Engine(model, tokenizer, RunConfig(max_model_len=1024, prefix_reuse=reuse, deterministic=True))
        turns = chat(f"{facts} What is the code of fox?")
        for question in ("What is the code of maple?", None):
            [request] = engine.generate([turns], GREEDY)
            turns = [*turns, {"role": "assistant", "content": request.text}, *chat(question or "")]
        answers.append(request)
    assert answers[0].tokens == answers[1].tokens
    assert answers[0].n_reused >= 64 and answers[1].n_reused == 0


def test_training_resumes_where_it_was(tmp_path, monkeypatch):
    """Step, clock, random numbers, weights, moments and the routers' biases come back from the saved state."""
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    import train

    first = train.Trainer(tmp_path)
    first.step, first.seconds = 7, 1.5
    first.packer.questions.rng.random()
    for i, tensor in enumerate([*first.optimizer.state().values(), *(r.e_score_correction_bias for r in first.routers)]):
        tensor.fill_(i)
    first.save()
    again = train.Trainer(tmp_path)
    assert (again.step, again.seconds) == (7, 1.5)
    assert again.packer.questions.rng.getstate() == first.packer.questions.rng.getstate()
    for a, b in zip(again.optimizer.state().items(), first.optimizer.state().items(), strict=True):
        assert a[0] == b[0] and torch.equal(a[1], b[1])
    for a, b in zip(again.routers, first.routers, strict=True):
        assert torch.equal(a.e_score_correction_bias, b.e_score_correction_bias)
    name, parameter = next(iter(again.optimizer.parameters.items()))
    assert torch.equal(parameter.float(), again.optimizer.masters[name]), "the copies that compute follow"


def test_readme_python_runs():
    """The ten lines of Python in the README, as they stand there, from the project's root."""
    section = (ROOT / "README.md").read_text().partition("## Python")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    parts, streamed = done.stdout.split("\n", 1)
    assert parts.endswith("'632')") and streamed.endswith("nretnal"), done.stdout
