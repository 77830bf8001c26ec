"""Pictures are drawn from committed data alone: each script from a small record, and none is older than its data."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
from PIL import Image

import concurrency
import drawing
import error_by_layer
import expert_load
import needle
import needle_attention
import roofline
import server_load
import tables
from core.config import load_config
from text.tokenizer import Tokenizer
from verification import RequestTrace, Trace
from verification.points import names_of

SCRIPTS = [concurrency, error_by_layer, expert_load, needle, needle_attention, roofline]
MOST_BYTES = 120 << 10  # of a picture
MACHINE = {"cpu": "Intel(R) Xeon(R)", "cores": 2}


def record(results: Any) -> dict[str, Any]:
    return {"date": "2026-11-30", "kind": "measured", "machine": MACHINE, "command": "", "results": results}


def at(gb_s: float, gflops: float) -> dict[str, float]:
    return {"us": 1.0, "gb_s": gb_s, "gflops": gflops, "ratio": 1.0}


LANES = [
    {"model": model, "link": link, "concurrent": n, **{way: {"tokens_s": 10.0 * n + i if link is None else 1.0} for i, way in enumerate(concurrency.WAYS)}}
    for model in ("the demo", "1.7 B") for link in (None, "slow") for n in (1, 4)
]  # fmt: skip
DRAFTS = {"mtp": [{"k": k, "sequences_at_a_time": n, "tokens_per_second": 100.0 * n + k} for k in (0, 1, 2) for n in (1, 4)]}
FORMS = {"groups": [{"bits": 16, "rows": [
    {"name": name, "tok_s": {"bf16": {"best": speed}, "int4": {"best": 2 * speed}, "ik_llama.cpp bf16": {"best": 1.0}}}
    for name, speed in (("decode at 512", 20.0), ("decode, 8 sequences", 80.0), ("prefill 512", 900.0))]}]}  # fmt: skip
KERNELS = {"read_gb_s": 20.0, "rows": [
    {"name": "1 x 8 by 8 x 8", "ours": at(20, 20), "F.linear": at(10, 10), "oneDNN, packed": at(12, 12)},
    {"name": "512 x 8 by 8 x 8", "ours": at(2, 900), "F.linear": at(1, 500), "oneDNN, packed": at(2, 1000)},
    {"name": "1 x 8 by 8 x 8, forms", "bfloat16": at(2, 9000)},
    {"name": "experts, 8 tokens", "ours": at(20, 40)},
    {"name": "attention, 8 at 4096", "ours": at(5, 100), "reference": at(2, 40)},
    {"name": "attention, 512 rows at 4096", "ours": at(1, 400), "torch": at(1, 300)},
]}  # fmt: skip
HAYSTACKS = {"checkpoint": "a model", "lengths": [10, 20, 30], "depths": [0, 100], "questions": 2, "trained": 25,
             "haystacks": [{"haystack": name, "right": [[2, 1, 0], [2, 2, 1]]} for name in ("a", "b")]}  # fmt: skip
ERRORS = {"checkpoint": "a model", "tokens": 7, "points": error_by_layer.points(1), "quantiles": [10, 50, 90], "formats": [
    {"format": name, "errors": [[0.0, 0.02 * n, 0.05 * n]] * 3 + [[0.0, 0.01 * n, 0.02]], "other_tokens": n} for n, name in enumerate("ab", 1)]}  # fmt: skip
LOADS = {"checkpoint": "a model", "per_token": 1, "groups": 2, "tokens": {"sums": 3, "long_lookup": 4},
         "counts": {f"layers.{i}": {"sums": [3, 0, 0, 0], "long_lookup": [1, 1, 1, 1]} for i in (1, 2)}}  # fmt: skip
WEIGHTS = {"checkpoint": "a model", "prompt_tokens": 5, "position": 5, "needle": [1, 4], "code": [2, 4], "layer": 0, "head": 1,
           "on_code": [[0.1, 0.9]], "tokens": list("abcdef"), "weights": [0.0, 0.05, 0.8, 0.1, 0.05, 0.0]}  # fmt: skip
SMALL: dict[ModuleType, list[Any]] = {
    concurrency: [LANES, DRAFTS, FORMS], roofline: [KERNELS], needle: [HAYSTACKS], error_by_layer: [ERRORS],
    expert_load: [LOADS], needle_attention: [WEIGHTS],
}  # fmt: skip


@pytest.mark.parametrize("script", SMALL, ids=lambda script: script.__name__)
def test_a_picture_of_a_small_record(script: ModuleType, tmp_path: Path) -> None:
    """A PNG of the size that documents show, and the same one again of the same record."""
    pictures = []
    for name in ("a.png", "b.png"):
        script.draw(*map(record, SMALL[script]), tmp_path / name, "data.json 0123")
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1] and len(pictures[0]) < MOST_BYTES
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG" and picture.width >= 1000 and picture.info["Source"] == "data.json 0123"
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 8  # something is on it


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_no_picture_is_older_than_its_data(script: ModuleType) -> None:
    """Else `python figures/NAME.py` draws it again."""
    path = drawing.HERE / f"{script.__name__}.png"
    with Image.open(path) as picture:
        assert picture.info["Source"] == drawing.checksum(*script.NAMES)
    assert path.stat().st_size < MOST_BYTES
    documents = [*(drawing.ROOT / "docs").glob("*.md"), drawing.ROOT / "demo" / "README.md"]
    assert any(f"figures/{path.name})" in text and f"figures/{script.__name__}.py" in text
               for text in (document.read_text() for document in documents))  # fmt: skip


def test_the_command_line_draws_and_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--compute writes the record first, with what a record has; without it the data stay as they are."""
    monkeypatch.setattr(drawing, "RESULTS", tmp_path)
    monkeypatch.setattr(drawing, "HERE", tmp_path)
    drawn: list[Any] = []

    def main(*flags: str) -> None:
        monkeypatch.setattr("sys.argv", ["dots.py", *flags])
        drawing.main("dots", lambda *given: drawn.append(given), ("dots.json",), lambda: [1, 2], "counted")

    with pytest.raises(FileNotFoundError):
        main()
    main("--compute")
    main()
    assert drawn[0] == drawn[1]
    made, target, source = drawn[0]
    assert made["results"] == [1, 2] and made["kind"] == "counted" and made["command"] == "python figures/dots.py --compute"
    assert target == tmp_path / "dots.png" and source == drawing.checksum("dots.json") and source.startswith("dots.json ")
    (tmp_path / "dots.json").write_text("[]")
    assert drawing.checksum("dots.json") != source
    with pytest.raises(SystemExit):
        main("--colour")
    assert "Counted: " in drawing.origin(made) and "Intel Xeon, 2 cores, 2026-11-30" in drawing.origin(record([]))


def test_what_the_roofline_shows() -> None:
    kinds = [roofline.kind_of(row["name"]) for row in KERNELS["rows"]]
    assert kinds == ["products", "products", "products", "experts", "attention, decode", "attention, prompt"]
    assert roofline.peak(KERNELS) == (1000, "the fastest product of all, oneDNN, packed")
    assert roofline.peak(KERNELS | {"peak_gflops": 1234.0}) == (1234.0, "the fastest product of all, torch in cache")
    assert roofline.peak(KERNELS | {"peak_gflops": 900.0}) == roofline.peak(KERNELS)  # measured in a slow moment
    committed = drawing.read("kernel_cpu.json")["results"]
    assert {roofline.kind_of(row["name"]) for row in committed["rows"]} >= {"products", "experts", "attention, decode"}


def test_what_the_lines_of_concurrency_are() -> None:
    assert concurrency.lanes(record(LANES), "1.7 B") == {
        way: {1: 10.0 + i, 4: 40.0 + i} for i, way in enumerate(concurrency.WAYS)
    }
    assert concurrency.drafts(record(DRAFTS))["1 draft"] == {1: 101.0, 4: 401.0}
    assert list(concurrency.drafts(record(DRAFTS))) == ["no drafts", "1 draft", "2 drafts"]
    assert concurrency.forms(record(FORMS)) == {"bfloat16": {1: 20.0, 8: 80.0}, "INT4": {1: 40.0, 8: 160.0}}


def test_the_server_s_picture_has_its_data() -> None:
    assert json.loads(server_load.RESULTS.read_text())["results"]["rows"]


def test_the_table_of_needles() -> None:
    """Up to the length of training and over it, each in two halves of depth."""
    header, _, a, _ = tables.needle(record(HAYSTACKS)).splitlines()
    assert header.startswith("| needle among | up to 25 tokens, first half | up to 25 tokens, second half | over 25")
    assert a == "| a | 3 of 4 | 4 of 4 | 0 of 2 | 1 of 2 |"


def test_errors_are_of_tokens() -> None:
    exact = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert error_by_layer.errors(exact + torch.tensor([[0.0, 0.5], [1.0, 0.0]]), exact) == pytest.approx([0.1, 0.5])
    assert error_by_layer.quantiles([float(i) for i in range(101)]) == list(error_by_layer.QUANTILES)
    known = names_of(load_config(drawing.DEMO / "config.json"))
    assert set(error_by_layer.points(4)) <= set(known) and [p for p in known if p in error_by_layer.points(4)] == error_by_layer.points(4)
    assert tables.error_by_layer(record(ERRORS)).splitlines()[2:] == ["| a | 2.00 % | 1.00 % | 1 of 7 |", "| b | 4.00 % | 2.00 % | 2 of 7 |"]


def test_choices_are_counted_by_kind() -> None:
    def request(name: str, *ids: list[int]) -> RequestTrace:
        return RequestTrace(name, torch.zeros(len(ids)), {"layers.1.ffn.ids": torch.tensor(ids)})

    trace = Trace([request("0", [0, 2], [2, 3]), request("1", [1, 1]), request("2", [3, 0])])
    assert expert_load.count(trace, ["a", "b", "a"], 4) == {"layers.1": {"a": [2, 0, 2, 2], "b": [0, 2, 0, 0]}}
    with pytest.raises(ValueError):
        expert_load.count(trace, ["a", "b"], 4)


def test_tokens_are_found_in_others() -> None:
    assert needle_attention.find([1, 2, 3, 2, 3], [2, 3]) == 1 and needle_attention.find([1, 2, 3, 2, 3], [2, 3], 2) == 3
    with pytest.raises(ValueError):
        needle_attention.find([1, 2], [2, 3])


@pytest.mark.parametrize("codes", [0.6, 0.0])
def test_a_needle_is_where_it_should_be(codes: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt has its length, the needle is there once and at its depth, and the question is a held-out one."""
    monkeypatch.syspath_prepend(str(drawing.ROOT / "demo"))
    import tasks

    tokenizer = Tokenizer(drawing.DEMO, load_config(drawing.DEMO / "config.json").vocab_size)
    for length in (300, 4032):
        hay = needle.Haystack(tasks.Questions(1, held_out=True), tokenizer, length, codes)
        n_facts = 1 + sum(text.startswith("The code of") for text in hay.sentences)
        assert (n_facts == 1) == (codes == 0) and tasks.is_held_out(hay.needle + str(n_facts))
        for depth in (0, 30, 100):
            conversation = hay.with_needle(depth)
            text = conversation.last.question
            assert text.count(hay.needle) == 1 and conversation.last.answer in hay.needle and text.endswith(hay.turn.question)
            assert 0 <= length - len(tokenizer.encode_chat(conversation.messages())) <= 11
            before, after = (len(tokenizer.encode_text(part, alone=True))
                             for part in text.removesuffix(hay.turn.question).split(hay.needle))  # fmt: skip
            assert before / (before + after) == pytest.approx(depth / 100, abs=12 / length + 0.01)
