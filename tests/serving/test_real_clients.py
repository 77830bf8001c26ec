"""Other people's clients, as they are published, and lm-evaluation-harness. In `make trust`; they are installed into
build/clients, outside the project's environment, and a test is skipped where that cannot be done."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.sampling_params import SamplingParams
from engine.engine import Engine
from support.http_server import RunningServer, serving

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
CLIENTS = ROOT / "build" / "clients"
DEMO = ROOT / "demo" / "checkpoint"
KINDS = ("addition", "spelling", "lookup")
PER_KIND = 8

pytestmark = [pytest.mark.trust, pytest.mark.timeout(2400)]


def environment(name: str) -> Path:
    """The folder of an environment, made now if it is not there; skips the test where it cannot be made."""
    spec = importlib.util.spec_from_file_location("environments", HERE / "clients" / "environments.py")
    assert spec is not None and spec.loader is not None
    environments: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(environments)
    problem = environments.make(CLIENTS, name)
    if problem is not None:
        pytest.skip(f"the clients of {name} cannot be installed here: {problem}")
    return CLIENTS / name


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[RunningServer, Engine]]:
    engine = Engine.from_pretrained(DEMO, max_model_len=4096)
    with serving(engine) as running:
        yield running, engine


def output(command: list[str], cwd: Path | None = None, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_python_clients(demo: tuple[RunningServer, Engine]) -> None:
    """LangChain, LiteLLM and pydantic-ai: the same answer every way, and an overflow is what they call one."""
    python = environment("python") / "bin" / "python"
    said = json.loads(output([str(python), str(HERE / "clients" / "python_clients.py"), f"{demo[0].url}/v1", "model"]).splitlines()[-1])
    for name in ("langchain", "litellm", "pydantic_ai"):
        assert {said[name][how] for how in ("whole", "streamed", "responses") if how in said[name]} == {"632"}, said
    assert said["langchain"]["too_long"] == "OpenAIContextOverflowError"
    assert said["litellm"]["too_long"] == "ContextWindowExceededError"
    assert said["litellm"]["reasoning"].startswith("347+285: ")


def test_node_clients(demo: tuple[RunningServer, Engine]) -> None:
    """openai's package and the AI SDK."""
    folder = environment("node")
    shutil.copy(HERE / "clients" / "clients.mjs", folder)
    said = json.loads(output(["node", "clients.mjs", f"{demo[0].url}/v1", "model"], folder))
    for name in ("openai", "ai_sdk"):
        assert {said[name][how] for how in ("whole", "streamed", "responses")} == {"632"}, said
    assert said["ai_sdk"]["reasoning"].startswith("347+285: ")


def test_lm_evaluation_harness(demo: tuple[RunningServer, Engine], tmp_path: Path) -> None:
    """It counts as many right answers, and as many replies that greedy decoding gives, as the engine itself does."""
    python = environment("lm_eval") / "bin" / "python"
    make = [sys.executable, str(HERE / "lm_eval" / "make_questions.py"), str(tmp_path), "--per-kind", str(PER_KIND)]
    output([*make, "--kinds", *KINDS])
    questions = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    conversations = [
        ([{"role": "system", "content": asked["system"]}] if asked["system"] else []) + [{"role": "user", "content": asked["question"]}]
        for asked in questions
    ]  # fmt: skip
    engine = Engine.from_pretrained(DEMO, max_model_len=4096)
    replies = engine.generate(conversations, SamplingParams(max_new_tokens=300, temperature=0))
    right = sum(reply.parts[1] == asked["answer"] for reply, asked in zip(replies, questions, strict=True))
    same = sum(reply.text == asked["reply"] for reply, asked in zip(replies, questions, strict=True))
    url, offline = f"{demo[0].url}/v1", {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    common = [str(python), "-m", "lm_eval", "run", "--include_path", str(tmp_path)]
    output([*common, "--model", "local-chat-completions", "--tasks", "demo_chat", "--apply_chat_template", "--output_path",
            str(tmp_path / "chat"), "--model_args", f"model=model,base_url={url}/chat/completions,num_concurrent=4,"
            "tokenizer_backend=none,eos_string=<none>"], **offline)  # fmt: skip
    output([*common, "--model", "local-completions", "--tasks", "demo_loglikelihood", "--output_path", str(tmp_path / "likely"),
            "--model_args", f"model=model,base_url={url}/completions,num_concurrent=4,tokenizer_backend=huggingface,"
            f"tokenizer={DEMO},tokenized_requests=True,add_bos_token=False,max_length=4096"], **offline)  # fmt: skip

    def found(folder: str, task: str, metric: str) -> float:
        (path,) = (tmp_path / folder).rglob("results_*.json")
        return float(json.loads(path.read_text())["results"][task][f"{metric},none"])

    assert found("chat", "demo_chat", "exact_match") == pytest.approx(right / len(questions))
    assert found("likely", "demo_loglikelihood", "acc") == pytest.approx(same / len(questions))
    assert right > 0.8 * len(questions)
