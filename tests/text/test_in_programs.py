"""Every word of a vocabulary in an answer: in the engine, generate.py --raw and the server, of a checkpoint as
transformers saves it, whose config has the class's default ids, 0 and 1."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_special_tokens import BOS, EOS, TURN, WORDS
from tokenizers import processors
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

import generate
from checkpoint.cast import cast
from checkpoint.check import check
from checkpoint.convert import convert
from checkpoint.manifest import verify
from core.sampling_params import SamplingParams
from engine.engine import Engine
from support.checkpoints import make_checkpoint
from support.families import FAMILIES
from support.http_server import serving
from support.tiny_tokenizer import write_words

LARGE = {"max_model_len": 640, "n_pages": 64, "max_num_seqs": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without any preference: greedily and with a penalty it says every token in turn."""
    folder = tmp_path_factory.mktemp("saved")
    library = write_words(folder, WORDS, [BOS, EOS, TURN])
    library.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 258)])
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=library, bos_token=BOS, eos_token=EOS, chat_template=template).save_pretrained(folder)
    config = DeepseekV3Config(
        vocab_size=272, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        first_k_dense_replace=1, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=8, n_shared_experts=1,
        num_experts_per_tok=2, n_group=2, topk_group=1, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16,
        qk_rope_head_dim=16, v_head_dim=16, max_position_embeddings=1024,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(folder)
    written = [json.loads((folder / f"{name}.json").read_text()) for name in ("config", "generation_config")]
    assert [entry["eos_token_id"] for entry in written] == [1, 1]
    return folder


@pytest.fixture(scope="module")
def theirs(saved: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(saved)


@pytest.fixture(scope="module")
def engine(saved: Path) -> Engine:
    return Engine.from_pretrained(saved, device="cpu", dtype="float32", **LARGE)


ALL = SamplingParams(400, temperature=0, presence_penalty=1)


def test_engine(engine: Engine, theirs: Any) -> None:
    (request,) = engine.generate(["Hi!"], ALL)
    assert request.prompt == theirs("Hi!")["input_ids"] == [258, *theirs("Hi!", add_special_tokens=False)["input_ids"]]
    assert request.tokens == list(range(259)) and request.finish_reason == "stop", "up to EOS, past the words 0 and 1"
    assert request.text == theirs.decode(request.tokens, skip_special_tokens=True)
    assert request.text.startswith('!"# a b')


def test_generate(saved: Path, theirs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = {"body": {"prompt": "Hi!", "presence_penalty": 1}, "method": "POST", "url": "/v1/completions"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(line))
    flags = ["--ckpt-path", saved, "--input-file", tmp_path / "prompts.jsonl", "--output-file", tmp_path / "out.jsonl",
             "--raw", "--temperature", 0, "--max-new-tokens", 400, "--device", "cpu", "--dtype", "float32", "--threads", 1]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["generate.py", *map(str, flags)])
    assert generate.main() == 0
    answer = json.loads((tmp_path / "out.jsonl").read_text())
    assert answer["completion"] == theirs.decode(range(258), skip_special_tokens=True)


@pytest.mark.parametrize("stream", [False, True])
def test_server(engine: Engine, theirs: Any, stream: bool) -> None:
    body = {"prompt": "Hi!", "presence_penalty": 1, "temperature": 0, "max_tokens": 400, "stream": stream}
    with serving(engine) as server:
        status, _, answer = server.send("POST", "/v1/completions", body)
    assert status == 200
    if stream:
        events = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]
        choices = [choice for event in events for choice in event["choices"]]
        text, reason = "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]
    else:
        text, reason = answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]
        assert answer["usage"]["prompt_tokens"] == 4
    assert (text, reason) == (theirs.decode(range(258), skip_special_tokens=True), "stop")


def test_check(saved: Path) -> None:
    report = check(saved)
    assert "raw text begins with '<s>'" in report.looked["tokenizer"]
    faults = [str(finding.problem) for finding in report.findings if finding.fault]
    assert all("lm_head" in line for line in faults), faults
    warned = [str(finding.problem) for finding in report.findings]
    assert f"{saved}: config.json: eos_token_id 1 is '\"', an ordinary word, and is ignored" in warned
    assert f"{saved}: generation_config.json: bos_token_id 0 is '!', an ordinary word, and is ignored" in warned


# ------------------------------------------------------------------ a tokenizer in tiktoken.model


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from test_vocabulary import ALPHABET, write_tiktoken

    folder = tmp_path_factory.mktemp("kimi")
    make_checkpoint(folder, FAMILIES["kimi-k2"] | {"vocab_size": 512, "bos_token_id": 256, "eos_token_id": 257}, fp8=True)
    return write_tiktoken(folder, ALPHABET)


def test_tiktoken_is_carried_along(kimi: Path, tmp_path: Path) -> None:
    convert(kimi, tmp_path / "converted", ranks=1)
    cast(kimi, tmp_path / "cast", "cpu")
    texts = []
    for folder in (kimi, tmp_path / "converted", tmp_path / "cast"):
        assert (folder / "tiktoken.model").read_bytes() == (kimi / "tiktoken.model").read_bytes()
        report = check(folder)
        assert report.ok and not report.findings and report.looked["tokenizer"].startswith("tiktoken.model, 512 ids of 512")
        engine = Engine.from_pretrained(folder, device="cpu", dtype="float32", chat=True, **LARGE)
        (request,) = engine.generate([[{"role": "user", "content": "é?"}]], SamplingParams(20, temperature=0))
        assert engine.tokenizer is not None and request.prompt == engine.tokenizer.encode_chat([{"role": "user", "content": "é?"}])
        texts.append(request.text)
    assert texts[0] == texts[1], "a cast rounds its weights"
    assert verify(tmp_path / "converted") is not None


def test_a_damaged_tiktoken_model_is_found(kimi: Path, tmp_path: Path) -> None:
    for file in kimi.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tiktoken.model").unlink()
    (tmp_path / "tiktoken.model").write_text((kimi / "tiktoken.model").read_text().replace("Zw==", "Zg==", 1))
    report = check(tmp_path)
    assert [str(finding.problem) for finding in report.findings if finding.check == "tokenizer"] == [
        f"{tmp_path}/tiktoken.model: 256 tokens, expected all different, with the ids from 0 on"
    ]


def test_tools_over_http(kimi: Path) -> None:
    engine = Engine.from_pretrained(kimi, device="cpu", dtype="float32", **LARGE)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": 2}}}
    body = {"messages": [{"role": "user", "content": "?"}], "tools": [tool], "max_tokens": 3, "temperature": 0}
    with serving(engine) as server:
        status, _, answer = server.send("POST", "/v1/chat/completions", body)
        assert status == 200, answer
    assert engine.tokenizer is not None
    expected = engine.tokenizer.encode_chat(body["messages"], tools=[tool])  # type: ignore[arg-type]
    assert answer["usage"]["prompt_tokens"] == len(expected)
    text = engine.tokenizer.render_chat(body["messages"], tools=[tool])  # type: ignore[arg-type]
    assert '<|im_system|>tool_declare<|im_middle|>[{"function":{"name":"f","parameters":{"a":2,"b":1}},"type":"function"}]' in text
