"""Traces as files: what is written is read, and a foreign or damaged one gives one line that says what is wrong."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import UserError
from model import Transformer
from support import processes as launch
from support.families import V3
from support.model_pairs import ours, random_checkpoint, tokens
from verification.points import markdown
from verification.recorder import record_tokens
from verification.trace import RunNumerics, Step, Trace, TraceWriter, write_trace
from verification.trace_reading import check_shapes, read_trace

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return ours(random_checkpoint(tmp_path_factory.mktemp("trace") / "v3", V3))


@pytest.fixture(scope="module")
def trace(model: Transformer) -> Trace:
    return record_tokens(model, [tokens(20, 256), tokens(5, 256, 2)])


def test_what_is_written_is_read(trace: Trace, tmp_path: Path, model: Transformer) -> None:
    trace.requests[0].steps, trace.requests[0].truncated = (Step(3, (7, 8), 1),), "from position 9 on: full"
    trace.notes = ("one",)
    write_trace(trace, tmp_path / "t")
    found = read_trace(tmp_path / "t")
    assert (found.numerics, found.rope_layout, found.config, found.notes) == (RunNumerics(), "interleaved", trace.config, ("one",))
    for a, b in zip(found.requests, trace.requests, strict=True):
        assert (a.name, a.prompt_tokens, a.steps, a.truncated) == (b.name, b.prompt_tokens, b.steps, b.truncated)
        assert torch.equal(a.tokens, b.tokens) and set(a.points) == set(b.points) and a.layers[-1] == "mtp.0"
        for name, value in b.points.items():
            assert torch.equal(a.points[name], value) and torch.equal(a.positions(name), b.positions(name))
    assert found.request("1").name == "1"
    with pytest.raises(KeyError, match="there are 0, 1"):
        found.request("2")
    check_shapes(found, model.args, "t")
    assert not list((tmp_path / "t").glob(".*"))
    with pytest.raises(UserError, match="holds something already"):
        write_trace(trace, tmp_path / "t")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        TraceWriter(tmp_path / "file", trace)


def test_the_least_that_a_program_must_write(tmp_path: Path, trace: Trace) -> None:
    """Token ids and a point; several files of one request; rows of some positions."""
    request = trace.requests[0]
    save_file({"tokens": request.tokens, "logits": request.points["logits"]}, tmp_path / "run.safetensors")
    found = read_trace(tmp_path).requests[0]
    assert found.name == "run" and torch.equal(found.value("logits", 4), request.points["logits"][4])
    norm, at = request.points["norm"][[3, 9]].bfloat16(), torch.tensor([3, 9], dtype=torch.int32)
    save_file({"norm": norm, "positions.norm": at}, tmp_path / "run.more.safetensors")
    found = read_trace(tmp_path).requests[0]
    assert found.positions("norm").tolist() == [3, 9] and torch.equal(found.value("norm", 9), norm[1])
    assert found.positions("logits").tolist() == list(range(20))


def edit(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        held = load_file(folder / "0.safetensors")
        change(held)
        save_file(held, folder / "0.safetensors")

    return apply


def index(**fields: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        held = json.loads((folder / "trace.json").read_text())
        (folder / "trace.json").write_text(json.dumps(held | fields))

    return apply


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a layer lacks a point": (edit(lambda t: t.pop("layers.1.attn.o")), "layers.1.attn.o is missing, though 2 of 3 layers have it"),
    "a layer lacks a router": (edit(lambda t: t.pop("layers.2.ffn.ids")), "layers.2.ffn.ids is missing, though 1 of 2 layers"),
    "no such point": (edit(lambda t: t.update({"layers.0.attn.q": t["norm"].clone()})), "layers.0.attn.q: no such point"),
    "no tokens": (edit(lambda t: t.pop("tokens")), "tokens is missing"),
    "tokens of a batch": (edit(lambda t: t.update(tokens=t["tokens"][None])), r"tokens: shape [1, 20], expected one token id"),
    "floating-point tokens": (edit(lambda t: t.update(tokens=t["tokens"].float())), "F32 [20], expected rows of integers"),
    "integers": (edit(lambda t: t.update(norm=t["norm"].int())), "norm: I32 [20, 128], expected rows of floating-point"),
    "rows": (edit(lambda t: t.update(norm=t["norm"][1:].clone())), "norm: 19 rows, expected 20, one for each token; or give positions.norm"),
    "rows and positions": (edit(lambda t: t.update({"positions.norm": torch.arange(3)})), "norm: 20 rows, expected 3, one for each of its positions"),
    "positions outside": (edit(lambda t: t.update({"positions.norm": torch.arange(20) + 1})), "positions go from 1 to 20, the request has 20 tokens"),
    "shape": (edit(lambda t: t.update(embed=t["embed"][:, :5].clone())), "embed has [5] for each token, expected [128] (H)"),
    "heads flattened": (
        edit(lambda t: t.update({f"layers.{i}.attn.o": t[f"layers.{i}.attn.o"].flatten(1) for i in range(3)})),
        "layers.0.attn.o has [96] for each token, expected [4, 24] (Nxdv)",
    ),
    "token ids": (edit(lambda t: t["tokens"].__setitem__(3, 999)), "token id 999, the vocabulary has 256"),
    "no file": (lambda folder: (folder / "1.safetensors").unlink(), "1.safetensors is missing, though trace.json lists request 1"),
    "cut short": (lambda f: (f / "0.safetensors").write_bytes((f / "0.safetensors").read_bytes()[:-9]), "truncated"),
    "not JSON": (lambda folder: (folder / "trace.json").write_text("{"), "not readable as JSON"),
    "another format": (index(format="x"), "format is 'x', expected 'deepseek-trace'"),
    "another version": (index(version=2), "version is 2, this program reads 1"),
    "requests": (index(requests="0"), "requests is '0', expected a list"),
    "nothing": (index(requests=[]), "no trace"),
    "layout": (index(rope_layout="neox"), "rope_layout is 'neox', expected interleaved or halves"),
    "dtype": (index(numerics={"dtype": "fp8"}), "numerics.dtype is 'fp8', expected one of"),
    "numerics": (index(numerics={"weights": "fp8"}), "numerics has ['weights'], expected"),
    "config": (index(config={"n_heads": 8}), "its config has n_heads 8, the checkpoint's 4"),
    "config by other names": (index(config={"routed_scaling_factor": 1.5}), "its config has routed_scaling_factor 1.5, the checkpoint's 2.5"),
    "steps": (lambda folder: (folder / "0.json").write_text('{"steps": [{"position": 3}]}'), "steps must have position, drafts and accepted"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(trace: Trace, model: Transformer, tmp_path: Path, name: str) -> None:
    change, said = WRONG[name]
    write_trace(trace, tmp_path / "t")
    change(tmp_path / "t")
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        check_shapes(read_trace(tmp_path / "t"), model.args, "t")
    assert "\n" not in str(caught.value)


def test_no_trace_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no trace"):
        read_trace(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        read_trace(tmp_path / "nothing")


def test_the_document_has_the_points() -> None:
    assert "\n".join(markdown()) in (ROOT / "docs" / "verifying.md").read_text()


def generate(*flags: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(launch.command(*flags), capture_output=True, text=True, env=launch.environment(), timeout=120)


def test_generate_writes_a_trace(tmp_path: Path) -> None:
    """Only what is asked for, under each prompt's number; a directory that holds something is refused before anything is
    loaded, and flags without --trace are wrong use."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is 3 + 4?\nWhat is 30 + 41?\n")
    common = ["--ckpt-path", ROOT / "demo" / "checkpoint", "--input-file", prompts, "--device", "cpu", "--temperature", 0,
              "--max-new-tokens", 5]  # fmt: skip
    chosen = ["--trace-points", "*.ffn.ids,logits", "--trace-positions", "last", "--trace-mib", 1]
    done = generate(*common, "--trace", tmp_path / "t", *chosen)
    assert done.returncode == 0, done.stderr
    found = read_trace(tmp_path / "t")
    assert found.names == ["0", "1"] and found.numerics.dtype == "bfloat16"
    for request in found.requests:
        assert set(request.points) == {"logits", *(f"layers.{i}.ffn.ids" for i in (1, 2, 3))}
        assert request.positions("logits").tolist() == [request.prompt_tokens - 1]
        assert int(request.points["logits"].argmax()) == request.tokens[request.prompt_tokens]
    again = generate(*common, "--trace", tmp_path / "t")
    assert again.returncode == 2 and again.stderr.strip().endswith("a trace goes into a directory of its own")
    alone = generate(*common, "--trace-points", "logits")
    assert alone.returncode == 2 and "--trace-points goes with --trace" in alone.stderr
