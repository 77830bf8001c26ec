"""generate.py: every wrong use and bad checkpoint with its one line, batches in and out, several ranks."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file

import generate
from checkpoint.convert import convert
from checkpoint.reading import read_header
from cli import batch_files
from core import PROGRAM_VERSION
from core.errors import UserError
from core.sampling_params import SamplingParams
from engine.engine import Engine
from engine.request import Request
from parallel.group import Group
from parallel.startup import choose_device
from support import processes as launch
from support.checkpoints import make_checkpoint
from support.tiny_tokenizer import write_tokenizer

EXACT = ("--device", "cpu", "--dtype", "float32", "--threads", "1")
GREEDY = SamplingParams(max_new_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch.make_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return Engine.from_pretrained(tiny, dtype="float32")


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to damage: links, so that a file must be replaced and not written to."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """generate.py in this process: (exit status, standard output, standard error)."""

    def run(*flags: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["generate.py", *map(str, flags)])
        capsys.readouterr()
        status = generate.main()
        return status, *capsys.readouterr()

    return run


def rewrite(path: Path, text: str | bytes) -> Path:
    path.unlink(missing_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def prompts_file(folder: Path, text: str | bytes, name: str = "prompts.txt") -> Path:
    return rewrite(folder / name, text)


def without_progress(stderr: str) -> str:
    """Standard error but for progress bars, the numerics line and the last line."""
    lines = [line for line in stderr.replace("\r", "\n").splitlines() if line.strip()]
    return "\n".join(x for x in lines if not x.startswith(("loading:", "answering:", "numerics:", "converting:")))


# ---------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--interactive", "the following arguments are required: --ckpt-path"),
        ("--ckpt-path C", "give either --interactive or --input-file"),
        ("--ckpt-path C --interactive --input-file F", "give either --interactive or --input-file"),
        ("--ckpt-path C --interactive --output-file F", "--output-file goes with --input-file"),
        ("--ckpt-path C --interactive --raw --system S", "--system needs the chat template that --raw leaves out"),
        ("--ckpt-path C --interactive --top P", "unrecognized arguments: --top P"),
        ("--ckpt-path C --interactive --gemm int4", "argument --gemm: invalid choice: 'int4'"),
        ("--ckpt-path C --interactive --max-num-seqs 0", "argument --max-num-seqs: 0 is not at least 1"),
        ("--ckpt-path C --interactive --threads x", "argument --threads: invalid positive value: 'x'"),
        ("--ckpt-path C --interactive --timeout 0", "argument --timeout: 0 is not from 1 second to a week"),
    ],
)
def test_wrong_flags(run: Any, flags: str, message: str) -> None:
    status, out, err = run(*flags.split())
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert err.endswith("(--help lists the flags)\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--temperature -1", "temperature is -1.0, expected 0 or a positive number"),
        ("--temperature nan", "temperature is nan, expected 0 or a positive number"),
        ("--top-p 0", "top_p is 0.0, expected above 0 and at most 1"),
        ("--top-k -1", "top_k is -1, expected 0 (off) or a positive integer"),
        ("--seed -1", "seed is -1, expected from 0 to 2^64 - 1"),
        ("--max-new-tokens 0", "max_new_tokens is 0, expected at least 1"),
        ("--max-model-len 4000", "--max-model-len is 4000, expected from 2 to this model's 2560"),
        ("--mtp 9", "--mtp is 9, expected from 0 to 4"),
        ("--kv-cache-gib 0.0001 --max-model-len 500",
         "--max-model-len 500 needs 8 pages of cache and memory holds 1; ask for at most 64"),
        ("--gemm fp8 --dtype float32", "--gemm fp8 and --dtype float32 contradict each other; leave one out"),
    ],
)
def test_wrong_values(run: Any, tiny: Path, tmp_path: Path, flags: str, message: str) -> None:
    prompts = prompts_file(tmp_path, "hello")
    status, out, err = run("--ckpt-path", tiny, "--input-file", prompts, "--device", "cpu", *flags.split())
    assert (status, out, without_progress(err)) == (2, "", f"error: {message}")
    assert "loading" not in err, "found out before anything is loaded"


def test_help_and_version(run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, expected in (("--version", PROGRAM_VERSION), ("--help", "--max-model-len")):
        for rank, speaks in (("0", True), ("1", False)):
            monkeypatch.setenv("RANK", rank)
            with pytest.raises(SystemExit) as left:
                run(flag)
            assert left.value.code == 0
            assert (expected in capsys.readouterr().out) is speaks


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (b"", "no prompts in it, it is empty"),
        (b"\n  \n\r\n", "no prompts in it, only blank lines"),
        (b"fine\nnot \xff fine\n", "line 2 is not UTF-8 (byte 0xff)"),
        ("caf\u00e9".encode("latin-1"), "line 1 is not UTF-8 (byte 0xe9)"),
        ("hello".encode("utf-16"), "line 1 is not UTF-8 (byte 0xff)"),
    ],
)
def test_bad_input_file(run: Any, tiny: Path, tmp_path: Path, content: bytes | None, message: str) -> None:
    prompts = tmp_path / "none.txt" if content is None else prompts_file(tmp_path, content)
    status, out, err = run("--ckpt-path", tiny, "--input-file", prompts, *EXACT)
    assert (status, out, err) == (2, "", f"error: {prompts}: {message}\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON (Expecting property name enclosed in double quotes"),
        ('"text"', "line 2 is no request: expected an object with a body"),
        ('{"custom_id": "b"}', "line 2 is no request: expected an object with a body"),
        ('{"custom_id": 7, "body": {}}', "line 2: custom_id is 7, expected a string"),
        ('{"custom_id": "a", "body": {}}', "line 2 has the custom_id of line 1, 'a'"),
    ],
)
def test_bad_jsonl(run: Any, tiny: Path, tmp_path: Path, line: str, message: str) -> None:
    first = {"custom_id": "a", "body": {"messages": [{"role": "user", "content": "hello"}]}}
    prompts = prompts_file(tmp_path, json.dumps(first) + "\n" + line, "prompts.jsonl")
    status, out, err = run("--ckpt-path", tiny, "--input-file", prompts, *EXACT)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {prompts}: {message}")


def test_bad_output_file(run: Any, tiny: Path, tmp_path: Path) -> None:
    prompts = prompts_file(tmp_path, "hello")
    link = tmp_path / "link"
    link.symlink_to(prompts)
    for output, message in (
        (prompts, f"{prompts} is the input file"),
        (link, f"{link} is the input file"),
        (tmp_path, f"{tmp_path} is a directory"),
        (tmp_path / "no" / "out", f"{tmp_path}/no/out: no directory {tmp_path}/no"),
    ):
        status, _, err = run("--ckpt-path", tiny, "--input-file", prompts, "--output-file", output, *EXACT)
        assert (status, err) == (2, f"error: --output-file {message}\n")
    assert prompts.read_text() == "hello"
    # a run that cannot start leaves an earlier run's answers alone
    output = rewrite(tmp_path / "answers.jsonl", "earlier\n")
    run("--ckpt-path", tmp_path / "none", "--input-file", prompts, "--output-file", output, *EXACT)
    assert output.read_text() == "earlier\n"


# ---------------------------------------------------------------- bad checkpoints


def missing_directory(folder: Path) -> tuple[object, str]:
    return folder / "none", f"{folder / 'none'}: no such directory"


def unknown_architecture(folder: Path) -> tuple[object, str]:
    rewrite(folder / "config.json", json.dumps(launch.CONFIG | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    known = "DeepseekV3ForCausalLM, DeepseekV2ForCausalLM, Glm4MoeLiteForCausalLM, KimiK25ForConditionalGeneration"
    return folder, f"{folder}/config.json: config: architecture 'LlamaForCausalLM' is not supported (known: {known})"


def missing_shard(folder: Path) -> tuple[object, str]:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    return folder, f"{shard}: missing, but model.safetensors.index.json names it"


def missing_scale(folder: Path) -> tuple[object, str]:
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"].pop(name)
    tensors = load_file(shard)
    del tensors[name]
    shard.unlink()
    save_file(tensors, shard)
    rewrite(folder / "model.safetensors.index.json", json.dumps(index))
    return folder, f"{folder}: {name} is missing: an FP8 weight without its scale (F32 2x2)"


def for_other_ranks(folder: Path) -> tuple[object, str]:
    convert(folder, folder / "converted", ranks=2)
    return folder / "converted", f"{folder}/converted: converted for 2 ranks, not "


def no_tokenizer(folder: Path) -> tuple[object, str]:
    (folder / "tokenizer.json").unlink()
    return folder, f"{folder}/tokenizer.json: no such file; copy the tokenizer files beside the weights"


def no_template(folder: Path) -> tuple[object, str]:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    write_tokenizer(folder, template=None)
    return folder, f"{folder}: no chat template in this checkpoint; use --raw for plain completion"


def bad_generation_config(folder: Path) -> tuple[object, str]:
    file = rewrite(folder / "generation_config.json", '{"temperature": "warm"}')
    return folder, f"{file}: temperature is 'warm', expected a number"


def test_settings_are_read_before_the_weights(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By every rank, so that all end at the same place."""
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    bad_generation_config(copy)
    monkeypatch.setattr("engine.setup.load_into", None)
    monkeypatch.setattr(Group, "run_on_all_ranks", lambda _, work: work())
    for rank in range(2):
        with pytest.raises(UserError, match="temperature is 'warm', expected a number"):
            Engine.from_pretrained(copy, world=Group(rank, 2))


@pytest.mark.parametrize(
    "damage",
    [missing_directory, unknown_architecture, missing_shard, missing_scale, for_other_ranks, no_tokenizer, no_template,
     bad_generation_config],
)  # fmt: skip
def test_bad_checkpoint(run: Any, copy: Path, tmp_path: Path, damage: Any) -> None:
    path, message = damage(copy)
    prompts = prompts_file(tmp_path, "hello")
    status, out, err = run("--ckpt-path", path, "--input-file", prompts, *EXACT)
    said = without_progress(err).splitlines()
    assert (status, out) == (2, "")
    assert said[-1].startswith(f"error: {message}")
    assert all(line.startswith("warning: ") for line in said[:-1])


def test_verify(run: Any, tiny: Path, tmp_path: Path) -> None:
    """With --verify a flipped bit is found before anything is loaded; without a manifest there is nothing to verify."""
    folder = tmp_path / "converted"
    convert(tiny, folder, ranks=1)
    prompts = prompts_file(tmp_path, "hello")
    flags = ("--input-file", prompts, "--verify", "--max-new-tokens", "2", *EXACT)
    status, _, err = run("--ckpt-path", folder, *flags)
    assert status == 0 and "verifying" not in err, "progress bars are for terminals"
    status, out, err = run("--ckpt-path", tiny, *flags)
    message = f"error: {tiny}: --verify needs the manifest that convert.py, fp8_cast_bf16.py and quantize.py write"
    assert (status, out, without_progress(err)) == (2, "", message)
    name, entry = list(read_header(folder / "model0-mp1.safetensors")[1].items())[3]
    data = bytearray((folder / "model0-mp1.safetensors").read_bytes())
    data[entry.start] ^= 1
    (folder / "model0-mp1.safetensors").write_bytes(data)
    status, out, err = run("--ckpt-path", folder, *flags)
    assert (status, out) == (2, "") and "loading" not in err
    assert f"error: {folder}/model0-mp1.safetensors: {name}: expected CRC32 and SHA-256 " in err


def test_config(run: Any, copy: Path, tmp_path: Path) -> None:
    """Optional where the checkpoint has one, which it must not contradict; needed where it has none."""
    prompts = prompts_file(tmp_path, "hello")
    flags = ("--ckpt-path", copy, "--input-file", prompts, "--max-new-tokens", "3", "--temperature", "0", *EXACT)
    expected = run(*flags)
    assert expected[0] == 0
    other = prompts_file(tmp_path, json.dumps(launch.CONFIG | {"rope_theta": 5e5}), "other.json")
    status, _, err = run(*flags, "--config", other)
    says = "rope_theta is 500000.0 but the checkpoint says 10000.0"
    assert (status, without_progress(err)) == (2, f"error: {other} does not describe this checkpoint: {says}")
    same = prompts_file(tmp_path, (copy / "config.json").read_text(), "same.json")
    (copy / "config.json").unlink()
    status, _, err = run(*flags)
    assert (status, err) == (2, f"error: {copy} has no config.json; name its model with --config configs/…\n")
    assert run(*flags, "--config", same)[:2] == expected[:2]


def test_numerics_that_cannot_be(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bf16"
    make_checkpoint(folder, launch.CONFIG)
    write_tokenizer(folder)
    prompts = prompts_file(tmp_path, "hello")
    flags = ("--ckpt-path", folder, "--input-file", prompts, "--threads", "1")
    status, _, err = run(*flags, "--device", "cpu", "--gemm", "fp8")
    assert (status, err) == (2, "error: --gemm fp8 needs FP8 weights, and this checkpoint's are bf16\n")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, _, err = run(*flags, "--device", "cuda")
    assert (status, err) == (2, f"error: --device cuda: there is none that torch can use; this torch ({torch.__version__}) has cpu\n")


def test_one_gpu_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    assert choose_device("auto", 1, 2) == torch.device("cuda", 1) and chosen == [1]
    assert choose_device("cpu", 1, 2) == torch.device("cpu")
    with pytest.raises(UserError, match=r"^4 ranks on a host with 2 GPUs: start as many, or --device cpu$"):
        choose_device("auto", 0, 4)


# ---------------------------------------------------------------- batches


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_batch(run: Any, engine: Engine, tiny: Path, tmp_path: Path) -> None:
    """More prompts than run at once, of lengths that finish out of order: printed and written in the file's order. A
    chat's completion is written without the control tokens that are printed."""
    texts = ["hello", "  What is 2+2?", "数える", "x" * 400, "a", "b", "z\u2028y"]
    prompts = prompts_file(tmp_path, "\ufeff" + "\r\n\n  \n".join(texts[:3]) + "\n" + "\n".join(texts[3:]))
    output = tmp_path / "answers.jsonl"
    status, out, err = run("--ckpt-path", tiny, "--input-file", prompts, "--output-file", output, "--temperature", 0,
                           "--max-new-tokens", 12, "--max-num-seqs", 2, *EXACT)  # fmt: skip
    assert status == 0
    expected = engine.generate([[{"role": "user", "content": text}] for text in texts], GREEDY)
    printed = [f"Prompt: {t}\nCompletion: {r.text}\n\n" for t, r in zip(texts, expected, strict=True)]
    assert out == "".join(printed)
    assert read(output) == [
        {"index": i, "prompt": t, "completion": re.sub("<｜[^｜]+｜>", "", r.text), "prompt_tokens": len(r.prompt),
         "tokens": r.tokens, "finish_reason": "length"}
        for i, (t, r) in enumerate(zip(texts, expected, strict=True))
    ]  # fmt: skip
    assert all(len(line["tokens"]) == 12 for line in read(output))
    assert "numerics: float32 throughout" in err and "answering: 100%" in err
    last = err.splitlines()[-1]
    assert last.startswith("7 prompts, 84 tokens in ") and last.endswith(" tokens/s")


def test_too_long_fails_alone(run: Any, engine: Engine, tiny: Path, tmp_path: Path) -> None:
    prompts = prompts_file(tmp_path, "first\n" + "x" * 97 + "\n" + "y" * 96 + "\nlast\n")
    output = tmp_path / "answers.jsonl"
    status, out, err = run("--ckpt-path", tiny, "--input-file", prompts, "--output-file", output, "--temperature", 0,
                           "--max-new-tokens", 12, "--max-model-len", 100, *EXACT)  # fmt: skip
    lines = read(output)
    assert status == 1
    assert [line["finish_reason"] for line in lines] == ["length", "error", "length", "length"]
    says = "the prompt has 100 tokens and leaves no room for an answer in the context of 100 (--max-model-len)"
    assert lines[1] == {"index": 1, "prompt": "x" * 97, "completion": "", "prompt_tokens": 100, "tokens": [],
                        "finish_reason": "error", "error": says}  # fmt: skip
    assert len(lines[2]["tokens"]) == 1, "the context's last token can still be made"
    assert f"Prompt: {'x' * 97}\nError: {says}\n\n" in out
    assert err.splitlines()[-1].startswith("4 prompts (1 failed), 25 tokens in ")
    alone = engine.generate([[{"role": "user", "content": text}] for text in ("first", "last")], GREEDY)
    assert [lines[0]["completion"], lines[3]["completion"]] == [r.text for r in alone]


def request(name: str | None, messages: Any = "hello", **fields: Any) -> str:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    line = {"method": "POST", "url": "/v1/chat/completions", "body": {"model": "any", "messages": messages, **fields}}
    return json.dumps(line if name is None else {"custom_id": name, **line})


def test_jsonl_with_several_answers_and_logprobs(run: Any, engine: Engine, tiny: Path, tmp_path: Path) -> None:
    """One line for each of n answers, in order; each token's log-probability with the likeliest beside it."""
    lines = [request("two", n=2, temperature=1.0, seed=3), request("likely", logprobs=True, top_logprobs=2),
             request("bare", logprobs=True), request("odd", top_logprobs=2), request("odder", logprobs=3)]  # fmt: skip
    output = tmp_path / "answers.jsonl"
    prompts = prompts_file(tmp_path, "\n".join(lines), "requests.jsonl")
    status, _, err = run("--ckpt-path", tiny, "--input-file", prompts, "--output-file", output, "--temperature", 0,
                         "--max-new-tokens", 6, *EXACT)  # fmt: skip
    assert status == 1 and "5 prompts (2 failed)" in err
    hello = [[{"role": "user", "content": "hello"}]]
    first, second, likely, bare, odd, odder = read(output)
    expected = engine.generate(hello, SamplingParams(6, temperature=1.0, seed=3, n=2))
    assert [line["tokens"] for line in (first, second)] == [r.tokens for r in expected]
    assert [(line["custom_id"], line["choice"]) for line in (first, second)] == [("two", 0), ("two", 1)]
    [greedy] = engine.generate(hello, SamplingParams(6, temperature=0, logprobs=2))
    assert likely["tokens"] == greedy.tokens and "choice" not in likely
    for entry, wanted in zip(likely["logprobs"], greedy.logprobs, strict=True):
        assert entry["token"] == wanted.token == entry["top"][0]["token"] and len(entry["top"]) == 2
        assert entry["logprob"] == pytest.approx(wanted.logprob, abs=1e-4)
    assert [len(entry["top"]) for entry in bare["logprobs"]] == [0] * 6
    assert odd["error"] == "body.top_logprobs needs logprobs: true"
    assert odder["error"] == "body.logprobs is 3: expected true or false"


def test_jsonl(run: Any, engine: Engine, tiny: Path, tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"},
            {"role": "assistant", "content": "1"}, {"role": "user", "content": "two"}]  # fmt: skip
    hello = [{"role": "user", "content": "hello"}]

    def expected(index: int, prompt: Any, **fields: Any) -> Request:
        asked = engine.add(prompt, replace(GREEDY, **fields), id=index)
        while asked.finish_reason is None:
            engine.step()
        return asked

    plain = expected(0, hello)
    end = plain.text[4:6]
    penalties = {"repetition_penalty": 1.5, "presence_penalty": 1, "frequency_penalty": 0.5}
    lines = [
        request("plain"),
        request("short", max_tokens=3),
        request("newer", max_tokens=3, max_completion_tokens=5),
        request("warm", temperature=1.5, top_p=0.9, top_k=50, seed=7),
        request(None, talk),
        request("off", n=1, stop=None, frequency_penalty=0, logprobs=False, tools=[], user="me"),
        request("parts", [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]),
        request("penalised", **penalties, min_p=0.1),
        request("stops", stop=end),
        request("stopped", stop=["never said", end]),
        request("many", n=0),
        request("unclear", n=True),
        request("biased", logit_bias={"9999": 100}),
        request("wordless", stop=[""]),
        request("typed", max_tokens="3"),
        request("cold", temperature=-1),
        request("beams", use_beam_search=True),
        request("empty", []),
        request("odd", "\ud800"),
        request("late", temperature=1.5, seed=7),
        request("drawn", logit_bias={"40": 100, "41": -100}),
    ]
    prompts = prompts_file(tmp_path, "\n\n".join(lines), "requests.jsonl")
    output = tmp_path / "answers.jsonl"
    status, out, _ = run("--ckpt-path", tiny, "--input-file", prompts, "--output-file", output, "--temperature", 0,
                         "--max-new-tokens", 12, *EXACT)  # fmt: skip
    assert status == 1
    found = {line.get("custom_id", line["index"]): line for line in read(output)}
    assert list(found) == [json.loads(line).get("custom_id", i) for i, line in enumerate(lines)]
    for name, asked in (
        ("plain", plain),
        ("short", expected(1, hello, max_new_tokens=3)),
        ("newer", expected(2, hello, max_new_tokens=5)),
        ("warm", expected(3, hello, temperature=1.5, top_p=0.9, top_k=50, seed=7)),
        (4, expected(4, talk)),
        ("off", plain),
        ("parts", plain),
        ("penalised", expected(7, hello, **penalties, min_p=0.1)),
        ("stops", expected(8, hello, stop=(end,))),
        ("stopped", expected(9, hello, stop=(end,))),
        ("late", expected(19, hello, temperature=1.5, seed=7)),
        ("drawn", expected(20, hello, logit_bias=((40, 100), (41, -100)))),
    ):
        assert (found[name]["tokens"], found[name]["completion"]) == (asked.tokens, asked.parts[1]), name
        assert found[name]["finish_reason"] == ("stop" if "stop" in str(name) else "length") == asked.finish_reason
        assert "error" not in found[name]
    assert found["stops"]["completion"] == plain.text.partition(end)[0] != plain.text
    assert found["penalised"]["tokens"] != plain.tokens
    assert found["warm"]["tokens"] != plain.tokens
    assert found["drawn"]["tokens"] == [40] * 12
    assert found[4]["prompt"] == "two" and "Prompt: two\n" in out
    failed = {name: line["error"] for name, line in found.items() if line["finish_reason"] == "error"}
    assert failed == {
        "many": "n is 0, expected at least 1",
        "unclear": "body.n is true: expected an integer",
        "biased": "logit_bias: token id 9999 is not in the vocabulary of 320",
        "wordless": 'body.stop.0 is "": expected a string that is not empty',
        "typed": 'body.max_tokens is "3": expected an integer',
        "cold": "temperature is -1.0, expected 0 or a positive number",
        "beams": "body.use_beam_search is not supported with the value true",
        "empty": "body.messages is []: expected at least 1 item, not 0",
        "odd": "message 0 is not valid Unicode: lone surrogate '\\ud800'",
    }
    assert found["odd"]["prompt"] == "\ud800"


def test_jsonl_held_to_a_format(run: Any, engine: Engine, tiny: Path, tmp_path: Path) -> None:
    """Answers of a file parse or are cut; what cannot be held to fails its own request alone, and names the part."""
    shape = {"type": "object", "properties": {"a": {"enum": [1, 2]}, "b": {"type": "string", "maxLength": 5}},
             "required": ["a", "b"], "additionalProperties": False}  # fmt: skip

    def schema(schema: Any, **fields: Any) -> dict[str, Any]:
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}, **fields}

    lines = [
        request("greedy", **schema(shape)),
        request("drawn", **schema(shape, temperature=1.5, seed=3, n=2)),
        request("cut", **schema(shape, max_tokens=3)),
        request("any", response_format={"type": "json_object"}),
        request("text", response_format={"type": "text"}),
        request("odd", **schema({"properties": {"a": {"not": {}}}})),
        request("nameless", response_format={"type": "json_schema"}),
        request("stopped", **schema(shape, stop="x")),
    ]
    output = tmp_path / "answers.jsonl"
    prompts = prompts_file(tmp_path, "\n".join(lines), "requests.jsonl")
    status, _, err = run("--ckpt-path", tiny, "--input-file", prompts, "--output-file", output, "--temperature", 0,
                         "--max-new-tokens", 80, *EXACT)  # fmt: skip
    greedy, *drawn, cut, anything, text, odd, nameless, stopped = read(output)
    assert status == 1 and "8 prompts (3 failed)" in err
    assert [line["choice"] for line in drawn] == [0, 1] and drawn[0]["tokens"] != drawn[1]["tokens"]
    for line in (greedy, *drawn):
        assert line["finish_reason"] == "stop"
        jsonschema.validate(json.loads(line["completion"]), shape)
    assert cut["finish_reason"] == "length" and cut["tokens"] == greedy["tokens"][:3]
    assert anything["completion"].startswith("{")
    [free] = engine.generate([[{"role": "user", "content": "hello"}]], replace(GREEDY, max_new_tokens=80))
    assert text["tokens"] == free.tokens != greedy["tokens"]
    assert odd["error"].startswith("response_format.json_schema.schema.properties.a: is not supported: ")
    assert nameless["error"] == "response_format.json_schema is missing"
    assert stopped["error"].startswith("stop cannot be combined with a format")


@pytest.mark.parametrize(
    ("raw", "fields", "message"),
    [
        (False, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "body.tools is not supported with the value [{"),
        (False, {"chat_template_kwargs": {"x": True}}, "body.chat_template_kwargs.x is not supported"),
        (False, {"thinking": {"type": "disabled"}, "reasoning_effort": "high"}, "the body has thinking and reasoning_effort, which"),
        (False, {"prompt": "x"}, "body.prompt is not supported"),
        (False, {"messages": [{"role": "user", "content": "x", "weight": 1}]}, "body.messages.0.weight is not supported"),
        (False, {"messages": [{"role": "root", "content": "x"}]}, 'body.messages.0.role is "root": expected "system", "user"'),
        (False, {"messages": "x"}, 'body.messages is "x": expected an array'),
        (False, {"temperature": float("nan")}, "body.temperature is NaN: expected a finite number"),
        (False, {f"x{i}": None for i in range(90)}, None),
        (True, {"echo": True}, "body.echo is not supported with the value true"),
        (True, {"prompt": [1, 2]}, None),
        (True, {"prompt": ["x", "y"]}, 'body.prompt is ["x", "y"]: expected a string or a list of token ids'),
        (True, {"prompt": [[1], [2]]}, "body.prompt is [[1], [2]]: expected a string or a list of token ids"),
        (True, {"prompt": [1, True]}, "body.prompt.1 is true: expected an integer"),
        (True, {"logprobs": True}, "body.logprobs is true: expected an integer"),
        (True, {"top_logprobs": 2}, "body.top_logprobs is not supported"),
        (True, {"top_logprobs": 0}, None),
        (True, {"top_logprobs": False}, "body.top_logprobs is not supported with the value false"),
        (False, {"top_logprobs": 0}, None),
        (False, {"top_logprobs": 0, "logprobs": False}, None),
        (False, {"top_logprobs": 1, "logprobs": False}, "body.top_logprobs needs logprobs: true"),
        (False, {"echo": False}, None),
        (False, {"echo": True}, "body.echo is not supported with the value true"),
        (True, {"messages": []}, "body.messages is not supported"),
        (True, {"echo": False, "max_completion_tokens": 3, "stream": True, "suffix": ""}, None),
    ],
)  # fmt: skip
def test_fields_of_a_file(raw: bool, fields: dict, message: str | None) -> None:
    """Refused by name where they would change the answer and are not implemented, or have another type."""
    options = generate.parse(["--ckpt-path", "C", "--input-file", "F", *(["--raw"] if raw else [])])
    body = {"prompt": "x"} if raw else {"messages": [{"role": "user", "content": "x"}]}
    item = batch_files.read_request(json.dumps({"body": body | fields}), "F: line 1", options, GREEDY)
    assert (item.error is None) if message is None else (item.error or "").startswith(message), item.error


def test_text_needs_no_schema(tmp_path: Path) -> None:
    """pydantic takes a while to import; so does torch, and neither is needed to say what is wrong with a flag."""
    prompts = prompts_file(tmp_path, "hello\n")
    program = (
        "import sys, generate; from cli import batch_files\n"
        "options = generate.parse(['--ckpt-path', 'C', '--input-file', sys.argv[1]])\n"
        "assert len(batch_files.read_items(options, None)) == 1\n"
        "assert not {'pydantic', 'torch', 'starlette'} & set(sys.modules)\n"
    )
    folder = Path(generate.__file__).parent
    subprocess.run([sys.executable, "-c", program, str(prompts)], cwd=folder, check=True, timeout=100)


def test_system_and_raw(run: Any, engine: Engine, tiny: Path, tmp_path: Path) -> None:
    flags = ("--ckpt-path", tiny, "--temperature", 0, "--max-new-tokens", 5, *EXACT)
    params = replace(GREEDY, max_new_tokens=5)
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "hello"}]
    prompts = prompts_file(tmp_path, request(None) + "\n" + request(None, own), "requests.jsonl")
    out = run(*flags, "--input-file", prompts, "--system", "Be brief.")[1]
    ours = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    first, second = engine.generate([ours, own], params)
    assert out == f"Prompt: hello\nCompletion: {first.text}\n\nPrompt: hello\nCompletion: {second.text}\n\n"
    assert first.text != second.text

    prompts = prompts_file(tmp_path, "  once upon \n")
    output = tmp_path / "raw.jsonl"
    assert run(*flags, "--input-file", prompts, "--raw", "--output-file", output)[0] == 0
    (expected,) = engine.generate(["  once upon "], params)
    assert expected.prompt[0] == 0 and len(expected.prompt) == 13, "BOS and a token a byte"
    assert read(output)[0] == {"index": 0, "prompt": "  once upon ", "completion": expected.text, "prompt_tokens": 13,
                               "tokens": expected.tokens, "finish_reason": "length"}  # fmt: skip
    prompts = prompts_file(tmp_path, '{"body": {"prompt": "  once upon "}}\n' + request(None), "raw.jsonl")
    assert run(*flags, "--input-file", prompts, "--raw", "--output-file", output)[0] == 2, "the input file"
    output = tmp_path / "answers.jsonl"
    assert run(*flags, "--input-file", prompts, "--raw", "--output-file", output)[0] == 1
    first_line, second_line = read(output)
    assert first_line["tokens"] == expected.tokens
    assert second_line["error"] == "body.prompt is missing (--raw completes text)"


def test_prompts_of_token_ids(run: Any, engine: Engine, tiny: Path, tmp_path: Path) -> None:
    """Are answered as they are, without BOS, and shown as their text; wrong ones fail alone and are shown as ids."""
    text = "  once upon "
    ids = engine.tokenizer.encode_text(text)
    vocab = engine.model.args.vocab_size
    given = [ids, ids[1:], text, [5, vocab], [-1], []]
    lines = [json.dumps({"custom_id": str(i), "body": {"prompt": prompt, "n": 2 if i == 0 else 1}}) for i, prompt in enumerate(given)]
    prompts, output = prompts_file(tmp_path, "\n".join(lines), "ids.jsonl"), tmp_path / "answers.jsonl"
    flags = ("--ckpt-path", tiny, "--temperature", 0, "--max-new-tokens", 5, "--raw", *EXACT)
    status, out, err = run(*flags, "--input-file", prompts, "--output-file", output)
    assert status == 1 and "6 prompts (3 failed), 20 tokens" in err
    first, second = engine.generate([ids, ids[1:]], replace(GREEDY, max_new_tokens=5))
    found = read(output)
    expected = [first.tokens, first.tokens, second.tokens, first.tokens, [], [], []]
    assert [line["tokens"] for line in found] == expected and first.tokens != second.tokens
    assert [line["prompt"] for line in found] == [text, text, text, text, f"[5, {vocab}]", "[-1]", "[]"]
    assert found[2]["prompt_tokens"] == len(ids) - 1
    outside = f"is not in the vocabulary of {vocab}"
    assert [line.get("error") for line in found[3:]] == [
        None, f"token id {vocab} {outside}", f"token id -1 {outside}", "the prompt is empty",
    ]  # fmt: skip
    assert out.count(f"Prompt: {text}\nCompletion: ") == 4 and f"Prompt: [5, {vocab}]\nError: token id" in out


def test_end_token(run: Any, tmp_path: Path) -> None:
    """An answer that ends by itself: finish_reason "stop", the end token neither printed nor among the tokens."""
    folder = tmp_path / "ending"
    make_checkpoint(folder, launch.CONFIG)
    write_tokenizer(folder)
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"] *= 0  # all tokens are alike, and the first of two end tokens is the likeliest
            save_file(tensors, shard)
    rewrite(folder / "generation_config.json", '{"eos_token_id": [0, 1]}')
    prompts, output = prompts_file(tmp_path, "hello"), tmp_path / "answers.jsonl"
    assert (
        run("--ckpt-path", folder, "--input-file", prompts, "--output-file", output, "--temperature", 0, *EXACT)[0] == 0
    )
    (line,) = read(output)
    assert (line["finish_reason"], line["tokens"], line["completion"]) == ("stop", [], "")


@pytest.mark.parametrize(
    ("released", "flags", "expected"),
    [
        (None, "", (0.2, 1.0)),
        ('{"temperature": 0.6, "top_p": 0.95}', "", (0.6, 0.95)),
        ('{"temperature": 0.6, "top_p": 0.95}', "--temperature 0 --top-p 0.5", (0.0, 0.5)),
        ('{"temperature": null, "top_p": 1}', "--top-p 0.5", (0.2, 0.5)),
        ('{"do_sample": false, "temperature": 0.6}', "", (0.0, 1.0)),
    ],
)
def test_sampling_defaults(tmp_path: Path, released: str | None, flags: str, expected: tuple[float, float]) -> None:
    if released is not None:
        (tmp_path / "generation_config.json").write_text(released)
    options = generate.parse(["--ckpt-path", str(tmp_path), "--interactive", *flags.split()])
    params = generate.default_params(options)
    assert (params.temperature, params.top_p) == expected
    assert (params.max_new_tokens, params.top_k, params.seed) == (200, 0, 0)


def test_records_are_whole_lines(tmp_path: Path) -> None:
    """A disk that fills up in the middle of a line: the line is taken back."""

    class Full:
        def __init__(self, file: Any, room: int):
            self.file, self.room = file, room

        def write(self, data: bytes) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            written = self.file.write(data[: self.room])
            self.room -= written
            return written

        def truncate(self, size: int) -> None:
            self.file.truncate(size)

    path = tmp_path / "out"
    records = batch_files.Records(str(path))
    records._file = Full(records._file, 30)  # type: ignore[assignment]
    records.write({"index": 0, "a": "é"})
    with pytest.raises(UserError, match=r"out: No space left on device$"):
        records.write({"index": 1, "a": "é" * 20})
    assert path.read_text() == '{"index": 0, "a": "é"}\n'


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize("ranks, lanes", [(2, 1), (2, 2), pytest.param(4, 2, marks=pytest.mark.trust)])
def test_ranks_answer_as_one(engine: Engine, copy: Path, tmp_path: Path, ranks: int, lanes: int) -> None:
    """As one lane, and as two. From a config that is worth a warning, though it means the same."""
    rope = {name: value for name, value in launch.CONFIG["rope_scaling"].items() if name != "mscale"}
    config = json.loads((copy / "config.json").read_text())
    rewrite(copy / "config.json", json.dumps(config | {"rope_scaling": rope}))
    prompts = prompts_file(tmp_path, "hello\nWhat is 2+2?\n" + "z" * 200 + "\nlast\n")
    output = tmp_path / "answers.jsonl"
    flags = ("--ckpt-path", copy, "--input-file", prompts, "--output-file", output, "--temperature", 0,
             "--max-new-tokens", 12, "--max-num-seqs", 3, "--experts", "split", "--dp", lanes, *EXACT)  # fmt: skip
    done = subprocess.run(
        launch.torchrun(*flags, ranks=ranks), env=launch.environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    texts = ["hello", "What is 2+2?", "z" * 200, "last"]
    expected = engine.generate([[{"role": "user", "content": text}] for text in texts], GREEDY)
    assert [line["tokens"] for line in read(output)] == [r.tokens for r in expected]
    assert done.stdout == "".join(
        f"Prompt: {t}\nCompletion: {r.text}\n\n" for t, r in zip(texts, expected, strict=True)
    )
    assert done.stderr.count("numerics: ") == 1, "only rank 0 speaks"
    assert done.stderr.count("experts: split, as asked\n") == 1
    says = f"2 of {ranks // 2} rank{'s' * (ranks > 2)} each, as asked;" if lanes == 2 else "one of 2 ranks,"
    assert done.stderr.count(f"lanes: {says}") == 1
    assert done.stderr.count("config: rope_scaling.mscale is missing and counts as 1") == 1


def test_torchrun_wrong_use(tmp_path: Path) -> None:
    flags = ("--ckpt-path", tmp_path / "none", "--interactive", "--device", "cpu")
    done = subprocess.run(
        launch.torchrun(*flags), env=launch.environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert launch.errors(done.stderr) == [f"error: {tmp_path / 'none'}: no such directory"]


def finish(ranks: list[subprocess.Popen[str]], within: float = 60) -> list[tuple[int, str, str]]:
    """Each rank's exit status, standard output and standard error."""
    try:
        texts = [rank.communicate(timeout=within) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any("Traceback" in err for _, err in texts), texts
    return [(rank.returncode, *both) for rank, both in zip(ranks, texts, strict=True)]


SEVERAL = """
import generate, json, os, sys
for port, arguments in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"], sys.argv = port, ["generate.py", *arguments]
    print("status", generate.main(), flush=True)
"""


def test_one_rank_s_mistake_is_everyone_s(tiny: Path, copy: Path, tmp_path: Path) -> None:
    """Rank 1 alone has a wrong flag, another flag, or a damaged copy, or both cannot read the prompts: all leave with
    status 2, and one line of rank 0's says why, and whose fault it is."""
    prompts = prompts_file(tmp_path, "hello")
    flags = ["--input-file", prompts, *EXACT]
    damaged, why = missing_shard(copy)
    converted, three = tmp_path / "converted", tmp_path / "three"
    convert(tiny, converted, ranks=2)
    make_checkpoint(three, launch.CONFIG | {"n_routed_experts": 3, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2})
    write_tokenizer(three)
    at, odd = ["--ckpt-path", str(converted)], ["--ckpt-path", str(three)]
    cases = [
        ([], ["--max-num-seqs", "0"], "rank 1: argument --max-num-seqs: 0 is not at least 1 (--help lists the flags)"),
        ([], ["--experts", "split"], "rank 1: --experts split (rank 0: auto): start every host with the same flags"),
        ([], ["--max-num-seqs", "4"], "rank 1: --max-num-seqs 4 (rank 0: 8): start every host with the same flags"),
        ([], ["--dp", "2"], "rank 1: --dp 2 (rank 0: 1): start every host with the same flags"),
        (["--dp", "3"], ["--dp", "3"], "--dp 3: 2 ranks cannot make so many equal lanes; start a multiple (torchrun)"),
        (["--pp", "3"], ["--pp", "3"], "--pp 3: 2 ranks cannot make so many equal stages; start a multiple (torchrun)"),
        (["--pp", "2", "--dp", "2"], ["--pp", "2", "--dp", "2"], "--dp 2 and --pp 2: lanes of stages are not implemented"),
        (["--pp", "2", "--pp-layers", "1"], ["--pp", "2", "--pp-layers", "1"], "--pp-layers 1: these are 1 numbers, 1 together"),
        (["--dp", "2", "--verify", *at], ["--dp", "2", "--verify", *at], f"{converted}: converted for 2 ranks, not 2 in 2 lanes; convert for 1"),
        (["--dp", "2", "--experts", "whole", *odd], ["--dp", "2", "--experts", "whole", *odd],
         "n_routed_experts 3 does not divide by 2 ranks (it works with none in 2 lanes)"),
        ([], ["--dp", "0"], "rank 1: argument --dp: 0 is not at least 1 (--help lists the flags)"),
        ([], ["--ckpt-path", damaged], f"rank 1: {why}"),
        (["--input-file", "/none"], ["--input-file", "/none"], "/none: No such file or directory"),
        (["--threads", "0"], ["--threads", "0"], "argument --threads: 0 is not at least 1 (--help lists the flags)"),
    ]  # fmt: skip
    ports = [str(launch.free_port()) for _ in cases]
    ranks = []
    for rank in range(2):
        runs = [(port, ["--ckpt-path", tiny, *flags, *case[rank]]) for port, case in zip(ports, cases, strict=True)]
        run = [sys.executable, "-c", SEVERAL, json.dumps(runs, default=str)]
        ranks.append(launch.start_rank(rank, 2, 0, run=run))
    (_, out0, err0), (_, out1, err1) = finish(ranks, within=100)
    said = launch.errors(err0)
    assert len(said) == len(cases)
    assert all(line.startswith(f"error: {message}") for line, (*_, message) in zip(said, cases, strict=True)), said
    assert launch.errors(err1) == []
    assert out0.split() == out1.split() == ["status", "2"] * len(cases)


@pytest.mark.parametrize(
    "how, lost",
    [
        pytest.param(signal.SIGKILL, 0, id="killed-0"),
        pytest.param(signal.SIGSTOP, 1, id="stopped-1"),
        pytest.param(signal.SIGKILL, 1, id="killed-1", marks=pytest.mark.trust),
        pytest.param(signal.SIGSTOP, 0, id="stopped-0", marks=pytest.mark.trust),
    ],
)
def test_a_rank_that_is_lost(tiny: Path, tmp_path: Path, how: signal.Signals, lost: int) -> None:
    """In the middle of a batch: the other rank leaves, at once or at the timeout, with one line that names the lost one,
    even if that is rank 0; what was written are whole lines, and no answer is claimed that was not finished."""
    timeout = 4
    prompts, output = prompts_file(tmp_path, "hello\n" * 500), tmp_path / "answers.jsonl"
    flags = ("--ckpt-path", tiny, "--input-file", prompts, "--output-file", output, "--max-new-tokens", 20,
             "--timeout", timeout, *EXACT)  # fmt: skip
    port = launch.free_port()
    # a third process keeps the meeting point, as torchrun's agent does
    keeper = subprocess.Popen([sys.executable, "-c", KEEPER, str(port)], stdout=subprocess.PIPE, text=True)
    assert keeper.stdout and keeper.stdout.readline()
    ranks = [launch.start_rank(r, 2, port, *flags, agent=True) for r in range(2)]
    try:
        until = time.monotonic() + 60
        while not (output.exists() and output.stat().st_size) and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(ranks[lost].pid, how)
        began = time.monotonic()
        _, err = ranks[1 - lost].communicate(timeout=20)
        took = time.monotonic() - began
    finally:
        for process in (*ranks, keeper):
            process.kill()
    fate = "has died" if how == signal.SIGKILL else "is stopped"
    assert ranks[1 - lost].returncode == 1
    assert launch.errors(err) == [f"error: rank {1 - lost} lost contact with rank {lost}, which {fate}"]
    assert took < (5 if how == signal.SIGKILL else timeout + 2)
    lines = output.read_text()
    assert lines.endswith("\n") and 0 < lines.count("\n") < 500
    assert all(len(line["tokens"]) == 20 or line["finish_reason"] == "stop" for line in read(output))


KEEPER = """
import sys, time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
print("ready", flush=True)
time.sleep(100)
"""


STUB = """
import signal
signal.raise_signal(signal.SIGINT)
raise SystemExit("still here")
"""


@pytest.mark.parametrize("name", ["generate", "server", "plan", "convert", "fp8_cast_bf16", "quantize", "check_checkpoint", "check_network"])
@pytest.mark.parametrize("library", ["argparse", "torch"])
def test_interrupted_in_an_import(name: str, library: str, tmp_path: Path) -> None:
    """As if Ctrl-C came then, in the first one or the slowest: the program ends, without a traceback."""
    (tmp_path / f"{library}.py").write_text(STUB)
    flags = {"generate": ["--ckpt-path", "C", "--interactive"], "server": ["--ckpt-path", "C"], "plan": ["--ckpt-path", "C"],
             "convert": ["--verify", "C"], "fp8_cast_bf16": ["--verify", "C"], "quantize": ["--verify", "C"],
             "check_checkpoint": ["C"]}  # fmt: skip
    command = [sys.executable, str(launch.SCRIPT.parent / f"{name}.py"), *flags.get(name, [])]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, timeout=100,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # also where it is ignored
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


@pytest.mark.parametrize("name", ["convert", "fp8_cast_bf16", "quantize"])
def test_verify_stands_alone(name: str, tmp_path: Path) -> None:
    target = {"fp8_cast_bf16": "--output-bf16-hf-path"}.get(name, "--save-path")
    command = [sys.executable, str(launch.SCRIPT.parent / f"{name}.py"), "--verify", str(tmp_path), target, "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.endswith("or --verify alone\n")
