"""The documents name files, flags and counts that exist, and the original repository's commands as they were."""

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from ops.gpu.tiles import SHARED_LIMIT
from support.processes import environment

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "README_WEIGHTS.md", ROOT / "demo" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = [ROOT, ROOT / "inference", ROOT / "benchmarks", ROOT / "benchmarks" / "results", ROOT / "demo", ROOT / "demo" / "checkpoint"]
COMMANDS = ["generate", "server", "convert", "fp8_cast_bf16", "quantize", "check_checkpoint", "check_network", "plan", "verify"]
FILE = re.compile(r"[\w.-]+(?:/[\w.-]+)*(?:\.(?:py|c|json|md|html|png|txt|jinja|model|safetensors|so)|/)")
OTHERS = set(  # of checkpoints, of their users, of other projects
    "generation_config.json example_prompts.txt chat_template.jinja tokenizer.json tiktoken.model prompts.txt model.safetensors.index.json "
    "model.safetensors.manifest.json config.json tokenizer_config.json trace.json 0.safetensors 0.json".split()
)
ELSEWHERE = {"--nnodes", "--nproc-per-node", "--node-rank", "--master-addr", "--shutdown-timeout"}  # torchrun's
ELSEWHERE |= set("--nodes --ntasks-per-node --gpus-per-node --gpus-per-task --gpu-bind --kill-on-bad-exit".split())  # SLURM's
ELSEWHERE |= set("--include --tasks --apply --model".split())  # lm-evaluation-harness's
SEED = """
cd DeepSeek-V3/inference
pip install -r requirements.txt
python convert.py --hf-ckpt-path /path/to/DeepSeek-V3 --save-path /path/to/DeepSeek-V3-Demo --n-experts 256 --model-parallel 16
torchrun --nnodes 2 --nproc-per-node 8 --node-rank $RANK --master-addr $ADDR generate.py --ckpt-path /path/to/DeepSeek-V3-Demo --config configs/config_671B.json --interactive --temperature 0.7 --max-new-tokens 200
torchrun --nnodes 2 --nproc-per-node 8 --node-rank $RANK --master-addr $ADDR generate.py --ckpt-path /path/to/DeepSeek-V3-Demo --config configs/config_671B.json --input-file $FILE
python fp8_cast_bf16.py --input-fp8-hf-path /path/to/fp8_weights --output-bf16-hf-path /path/to/bf16_weights
""".strip().splitlines()

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def code(text: str) -> Iterator[str]:
    """What stands in backticks, and the lines of blocks of shell commands."""
    for block in re.findall(r"```shell\n(.*?)```", text, re.DOTALL):
        yield from block.splitlines()
    for block in re.findall(r"^ {4}(?! )(python .*)$", text, re.MULTILINE):
        yield block
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


@documents
def test_links_and_file_names_exist(document: Path) -> None:
    text = document.read_text()
    links = re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", text)
    assert not [link for link in links if not link.startswith("http") and not (document.parent / link).exists()]
    names = {word.strip("…") for said in code(text) for word in said.split()}
    named = {name for name in names if FILE.fullmatch(name) and name not in OTHERS and not name.startswith(".")}
    assert not sorted(name for name in named if not any((folder / name).exists() for folder in FOLDERS))


@documents
def test_anchors_exist(document: Path) -> None:
    text = document.read_text()
    headings = {re.sub(r"[^\w -]", "", line).lower().strip().replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    assert not set(re.findall(r"\]\(#([\w-]+)\)", text)) - headings


@cache
def told_by(script: str) -> str:
    """What names the flags of a script: a command's help, and of others the source."""
    if script in COMMANDS:
        command = [sys.executable, str(ROOT / "inference" / f"{script}.py"), "--help"]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment(COLUMNS="200")).stdout
    [path] = [p for p in ROOT.glob(f"*/**/{script}.py") if not {".venv", "build", "inference"} & {*p.relative_to(ROOT).parts}]
    return path.read_text()


def flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))


def test_commands_take_the_flags_that_are_shown() -> None:
    """Each flag behind a script's name is that script's, each flag that stands alone some command's."""
    known = ELSEWHERE.union(*(flags(told_by(command)) for command in COMMANDS))
    wrong, n = [], 0
    for document in DOCUMENTS:
        for line in code(document.read_text()):
            script = re.search(r"(?:^|\s)(?:\S*/)?(\w+)\.py\b", line)
            shown = flags(line) - ELSEWHERE
            taken = flags(told_by(script[1])) if script and shown else known | {"--limits", "--smoke", "--output", "--at"}
            wrong += [f"{document.name}: {line}: {flag}" for flag in shown - taken]
            n += len(shown)
    assert not wrong and n > 80


def test_the_original_commands_are_there() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert not [command for command in SEED if command not in lines]


def test_the_readme_is_short_and_says_the_right_numbers() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) < 200
    assert all(f"(docs/{path.name})" in readme for path in (ROOT / "docs").glob("*.md"))
    assert "five GPU architectures" in readme and len(SHARED_LIMIT) == 5


def test_memory_shows_what_plan_says(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import plan

    text = (ROOT / "docs" / "memory.md").read_text()
    [command] = re.findall(r"^python plan\.py (.*)$", text, re.MULTILINE)
    assert f"python plan.py {command}" in (ROOT / "README.md").read_text()
    monkeypatch.chdir(ROOT / "inference")
    monkeypatch.setattr(sys, "argv", ["plan.py", *command.split()])
    assert plan.main() == 0
    assert capsys.readouterr().out in text
