"""The command: its sides, its report in three forms, its exit status, and one line for what is wrong."""

import json
import re
import subprocess
import xml.dom.minidom
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import verify
from core.errors import UserError
from parallel.group import SOLO
from support import processes as launch
from support.families import two_layers
from support.model_pairs import ours, random_checkpoint, tokens
from support.traces import foreign_run
from verification import html
from verification.check import Report, check
from verification.mistakes import named
from verification.recorder import record_tokens
from verification.report import dumps, text
from verification.sides import prompt_ids
from verification.trace import Trace, write_trace
from verification.trace_reading import read_trace
from verification.weights import Weights

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo" / "checkpoint"
TOKENS = tokens(30, 256, 5)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("verify") / "v3", two_layers("v3"))


@pytest.fixture(scope="module")
def wrong(path: Path) -> Trace:
    return foreign_run(Weights(path), TOKENS, named("weights-unscaled"))


@pytest.fixture(scope="module")
def report(path: Path, wrong: Trace) -> Report:
    return check(wrong, Weights(path), record_tokens(ours(path), [TOKENS]), what="theirs", against="ours")


def command(*flags: object) -> int:
    return verify.run(verify.parse([str(flag) for flag in flags]), SOLO)


def test_this_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo, drafts and all; the trace that is kept can be checked again."""
    common = ["--ckpt-path", DEMO, "--device", "cpu"]
    flags = ["--prompt", "3 + 4?", "--mtp", 1, "--save", tmp_path / "t", "--max-new-tokens", 3]
    assert command(*common, *flags, "--max-model-len", 200) == 0
    said = capsys.readouterr().out
    assert "no divergence" in said and "against exact" in said and "mtp.0" in said
    assert command(*common, "--run", tmp_path / "t", "--against", "none") == 0
    assert "no divergence" in capsys.readouterr().out and len(read_trace(tmp_path / "t").requests) == 1


def test_a_directory_that_diverges(path: Path, wrong: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_trace(wrong, tmp_path / "t")
    files = ["--json", tmp_path / "r.json", "--html", tmp_path / "r.html"]
    assert command("--ckpt-path", path, "--run", tmp_path / "t", *files) == 1
    said = capsys.readouterr().out
    assert "FIRST DIVERGENCE  layers.1.ffn.weights: layer 1, gating values g (equation 13)" in said
    assert "likely: routed_scaling_factor is missing" in said and "weights-unscaled" in said
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["diverges"] and found["requests"][0]["first"] == "layers.1.ffn.weights"
    assert found["requests"][0]["causes"]["layers.1.ffn.weights"][0]["name"] == "weights-unscaled"
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


def test_transformers(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against the exact values, and as what another run's errors are measured against."""
    assert command("--ckpt-path", path, "--run", "transformers", "--tokens", 20, "--save", tmp_path / "t") == 0
    assert "not recorded: mtp.0.embed" in capsys.readouterr().out
    assert len(read_trace(tmp_path / "t").requests[0].tokens) == 20
    assert command("--ckpt-path", path, "--run", tmp_path / "t", "--against", "transformers") == 0
    assert command("--ckpt-path", path, "--run", "transformers", "--against", tmp_path / "t") == 0
    assert "accumulated" in capsys.readouterr().out


def test_sample(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--ckpt-path", path, "--sample", "--tokens", 6, "--layers", 1, "--json", tmp_path / "s.json") == 0
    [row] = json.loads((tmp_path / "s.json").read_text())
    assert row["format"] == "BF16 cast" and f"{row['attn_out']:.2g}" in capsys.readouterr().out


WRONG: dict[str, tuple[list[Any], str]] = {
    "two prompts": (["--prompt", "a", "--tokens", 3], "give either --prompt or --tokens"),
    "layers alone": (["--layers", "1"], "--layers goes with --sample"),
    "states alone": (["--states", "x"], "--states goes with --sample"),
    "sample and a run": (["--sample", "--run", "transformers"], "--sample runs by itself"),
    "new tokens": (["--run", "transformers", "--max-new-tokens", 3], "--max-new-tokens goes with --run engine"),
    "no such directory": (["--run", "nowhere"], "nowhere: no such directory"),
    "no such side": (["--run", "transformers", "--against", "engine"], "--against engine: expected exact, none"),
    "report": (["--run", "transformers", "--tokens", 3, "--against", "none", "--json", "/nowhere/r.json"], "cannot be written"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use(path: Path, name: str) -> None:
    flags, said = WRONG[name]
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        command("--ckpt-path", path, *flags)
    assert "\n" not in str(caught.value)


def test_runs_on_other_tokens(path: Path, tmp_path: Path) -> None:
    write_trace(foreign_run(Weights(path), TOKENS), tmp_path / "a")
    write_trace(foreign_run(Weights(path), [*TOKENS[:9], 7, *TOKENS[10:]]), tmp_path / "b")
    with pytest.raises(UserError, match=r"token \d+ at position 9, .* has 7: compare runs on the same tokens"):
        command("--ckpt-path", path, "--run", tmp_path / "a", "--against", tmp_path / "b")


def test_ids_are_the_same_everywhere(path: Path) -> None:
    low_bytes = [(0xB1 * i + 0x39) % 256 for i in range(1, 5)]  # of 2654435761 i + 12345
    assert prompt_ids(path, None, 4) == low_bytes == prompt_ids(path, None, 9, 256)[:4]
    assert prompt_ids(DEMO, "What is 3", 1) == prompt_ids(DEMO, "What is 3", 5) and len(prompt_ids(DEMO, "What is 3", 1)) > 2


# --- the report ------------------------------------------------------------------------------------------------------


def test_text(report: Report) -> None:
    lines = text(report).splitlines()
    assert len(lines) < 25 and max(map(len, lines)) < 300
    [first] = [line for line in lines if line.startswith("FIRST DIVERGENCE")]
    assert "layers.1.ffn.weights" in first
    assert [line.split()[0] for line in lines if re.match(r"(model|layers\.\d|mtp\.0) ", line)] == ["model", "layers.0", "layers.1", "mtp.0"]
    assert "the same mistake" not in text(report)  # the module's own, made there too, is not told again
    assert sum("routed_scaling_factor is missing" in line for line in lines) == 1


def test_json_has_plain_numbers(report: Report) -> None:
    found = json.loads(dumps(report), parse_constant=lambda name: pytest.fail(name))
    [request] = found["requests"]
    assert len(request["points"]) == len(report.requests[0].points)
    assert {"name", "rows", "local", "position", "tolerance", "accumulated", "note", "diverges"} == set(request["points"][0])


class Page(HTMLParser):
    """What a page refers to, and whether its elements are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]


def test_page(report: Report) -> None:
    """Self-contained: no script, nothing loaded; the picture is well-formed SVG with a circle for each value."""
    shown = html.page(report)
    parsed = Page()
    parsed.feed(shown)
    assert not parsed.links and "script" not in parsed.tags and "link" not in parsed.tags
    assert not re.search(r"url\(|@import|https?://", shown)
    [svg] = re.findall(r"<svg.*</svg>", shown, re.DOTALL)
    xml.dom.minidom.parseString(svg)
    judged = [j for j in report.requests[0].points if j.judged and not j.name.endswith(".ids")]
    assert svg.count("<circle") == len(judged) and svg.count('r="4"') == sum(j.diverges for j in judged) > 0
    assert "routed_scaling_factor is missing" in shown and "class=bad" in shown


def test_page_escapes_what_a_trace_says(report: Report) -> None:
    evil = Report("<script>x</script>", "", "float32", report.requests)
    assert "<script>" not in html.page(evil)


@pytest.mark.trust
def test_ranks(tmp_path: Path) -> None:
    """Two ranks, lanes and stages of them, as torchrun starts them."""
    for flags in ([], ["--dp", 2], ["--pp", 2], ["--gemm", "fp8"]):
        common = ["--ckpt-path", DEMO, "--device", "cpu", "--tokens", 20, "--mtp", 1, "--max-model-len", 200]
        script = launch.SCRIPT.with_name("verify.py")
        done = subprocess.run(launch.torchrun(*common, *flags, script=script), capture_output=True, text=True,
                              env=launch.environment(), timeout=300)  # fmt: skip
        assert done.returncode == 0 and "no divergence" in done.stdout, done.stdout + done.stderr
        assert "mtp.0" in done.stdout


def test_help_needs_no_torch() -> None:
    code = "import sys, verify\ntry: verify.parse(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([launch.command()[0], "-c", code], cwd=launch.SCRIPT.parent, capture_output=True, text=True, timeout=100)
    assert done.stdout.startswith("usage:") and done.stderr == "False\n"
