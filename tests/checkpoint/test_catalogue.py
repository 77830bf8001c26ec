"""Every program does with every checkpoint of the catalogue what the catalogue says, and the document shows it."""

import json
import os
import runpy
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import convert
import fp8_cast_bf16
import generate
import plan
import server
import serving.serve
from checkpoint.check import check
from checkpoint.directory import Checkpoint, choose_args
from cli import main as cli
from core.batch import Batch
from core.errors import UserError
from core.numerics import Numerics
from core.sampling_params import SamplingParams
from engine.engine import Engine
from model import Transformer
from parallel.group import SOLO, Group
from support import fork_server, processes
from support.catalogue import ALL, CATALOGUE, FP8, Bases, Entry, base, mixture, nested, plain, table, theirs
from support.model_pairs import hidden_states, relative_error, their_mtp, tokens
from support.rank_weights import assert_same, loaded

ROOT = Path(__file__).parents[2]
IDS = tokens(48, 250, seed=5)  # of letters, in every tokenizer here
RUN = ("--device", "cpu", "--max-model-len", "128", "--max-num-seqs", "1")
ENGINE = (*RUN, "--threads", "1", "--kv-cache-gib", "0.002")
EXACT = Numerics(torch.float32)


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(autouse=True)
def nothing_is_kept(tmp_path) -> Iterator[None]:
    """A run would leave a gigabyte behind."""
    yield
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="session")
def oracle(bases) -> Callable[[Path], Any]:
    """transformers' float32 model of a folder; that of a base is made once."""
    models: dict[Path, Any] = {}

    def model(folder: Path) -> Any:
        if folder.parent != bases.root:
            return theirs(folder)
        if folder not in models:
            models[folder] = theirs(folder)
        return models[folder]

    return model


# --------------------------------------------------------------------------------------------------------------------
# The programs, as their command lines run them
# --------------------------------------------------------------------------------------------------------------------


def start_generate(path: Path, *flags: str) -> Engine:
    """generate.py up to the first prompt."""
    options = generate.parse(["--ckpt-path", str(path), "--input-file", "-", *ENGINE, *flags])
    return cli.load(options, SOLO, lambda: generate.default_params(options), chat=not options.raw)[0]


def start_server(path: Path) -> Engine:
    """server.py, with the engine where it would begin to serve."""
    started: list[Engine] = []

    async def serve(options, tp, listener, load, finish) -> int:
        listener.close()
        started.append(load())
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving.serve, "serve", serve)
        server.run(server.parse(["--ckpt-path", str(path), "--port", "0", *ENGINE]), SOLO)
    return started[0]


def run_convert(path: Path, target: Path) -> None:
    convert.run(convert.parse(["--hf-ckpt-path", str(path), "--save-path", str(target), "--model-parallel", "2"]))


def run_cast(path: Path, target: Path) -> None:
    flags = ["--input-fp8-hf-path", str(path), "--output-bf16-hf-path", str(target), "--device", "cpu"]
    fp8_cast_bf16.run(fp8_cast_bf16.parse(flags))


def run_plan(path: Path) -> dict:
    return plan.plan(plan.parse(["--ckpt-path", str(path), *RUN]))


def made(entry: Entry, folder: Path, bases: Bases) -> Path:
    return entry.make(folder, bases) or folder


# --------------------------------------------------------------------------------------------------------------------
# Those that load
# --------------------------------------------------------------------------------------------------------------------


def form_of(entry: Entry, path: Path, bases: Bases, folder: Path) -> Path:
    """The form of it that transformers loads; `folder` is for one that has to be made."""
    if entry.equals == "plain":
        plain(path, folder)
        return folder
    if callable(entry.equals):
        shutil.copytree(path, folder)
        entry.equals(folder)
        return folder
    return bases[entry.equals] if entry.equals else path


def expect_drafts(model: Transformer, oracle: Any, form: Path) -> None:
    """The MTP module's logits are those of transformers'."""
    module = their_mtp(oracle, form)
    if not hasattr(module, "forward_layer"):
        return  # before transformers 5.20
    inputs = torch.tensor([IDS])
    hidden = oracle.model(inputs[:, :-1]).last_hidden_state
    drafted = module.forward_layer(0, hidden, torch.arange(len(IDS) - 1)[None], None, input_ids=inputs[:, 1:])
    ours = model.draft(Batch.pack([(IDS[1:], 0, [0])]), hidden_states(model, IDS[:-1]), model.new_cache(1))
    assert relative_error(model.logits(ours), oracle.lm_head(drafted)[0]) < 1e-5


def warnings(said: str) -> Iterator[str]:
    return (line for line in said.splitlines() if line.startswith("warning: "))


def expect_warnings(expected: tuple[str, ...], said: str) -> None:
    """Each of them, and no other."""
    lines = list(warnings(said))
    assert all(any(words in line for line in lines) for words in expected), (expected, lines)
    assert all(any(words in line for words in expected) for line in lines), (expected, lines)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, entry in CATALOGUE.items() if entry.equals is not None])
def test_loads(name, bases, oracle, tmp_path, capsys):
    entry = CATALOGUE[name]
    path = made(entry, tmp_path / "c", bases)
    form = form_of(entry, path, bases, tmp_path / "other form")
    capsys.readouterr()
    expect_loads(entry, path, form, oracle(form), tmp_path, capsys)


def expect_loads(entry: Entry, path: Path, form: Path, reference: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Every program takes it, and computes or writes what `reference` says of its other form."""
    engine = start_generate(path, "--dtype", "float32", *(("--mtp", "1") if entry.mtp else ()))
    expect_warnings(entry.warns, capsys.readouterr().err)
    assert relative_error(engine.model.logits(hidden_states(engine.model, IDS)), reference(torch.tensor([IDS])).logits[0]) < 1e-5
    if entry.mtp:
        expect_drafts(engine.model, reference, form)
    [request] = engine.generate([IDS], SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True))
    greedy = reference(torch.tensor([IDS + request.tokens])).logits[0].argmax(-1)[len(IDS) - 1 : -1]
    assert request.tokens == greedy.tolist() and len(request.tokens) == 6
    if entry.text:
        found = engine.tokenizer
        assert (found.bos_id, tuple(sorted(found.eos_ids)), found.encode_text("Hi")) == entry.text

    checkpoint = Checkpoint(path)
    fp8 = choose_args(checkpoint, None).dtype == "fp8"
    few = reference(torch.tensor([IDS[:8]])).logits[0]
    model = start_server(path).model  # bfloat16, where nothing is wider
    assert relative_error(model.logits(hidden_states(model, IDS[:8])), few) < 0.05
    if fp8:
        model = start_generate(path, "--gemm", "fp8").model  # W8A8, with weights in memory as a GPU has them
        assert relative_error(model.logits(hidden_states(model, IDS[:8])), few) < 0.25

    run_convert(path, tmp_path / "converted")
    assert check(tmp_path / "converted", quick=True).ok
    experts = Checkpoint(tmp_path / "converted").experts(2)
    for rank in range(2):
        group, numerics = Group(rank, 2), Numerics(torch.float32, experts=experts)
        assert_same(loaded(tmp_path / "converted", numerics, group), loaded(path, numerics, group))
    if checkpoint.quantised:
        run_cast(path, tmp_path / "cast")
        assert check(tmp_path / "cast", quick=True).ok
        assert_same(loaded(tmp_path / "cast", Numerics()), loaded(path, Numerics()))
    else:
        with pytest.raises(UserError, match="holds no FP8, INT8 or INT4 weights, so there is nothing to cast"):
            run_cast(path, tmp_path / "cast")

    capsys.readouterr()
    report = check(path)
    findings = [f"warning: {finding.problem}" for finding in report.findings]
    assert report.ok, findings
    expect_warnings((*entry.warns, *entry.noted), "\n".join([*findings, capsys.readouterr().err]))
    weights = {t.data_ptr(): t.numel() for t in reference.state_dict().values()}  # a tied head is the embedding
    assert run_plan(path)["model"]["parameters"] == sum(weights.values())


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.trust) for seed in range(2, 42))])
def test_mixtures_load(seed, bases, tmp_path, capsys):
    """Several of these at once, as each rule is met beside every other."""
    name, values, layout = mixture(seed)
    folder = bases.copy(name, tmp_path / "c")
    for change in values:
        change(folder)
    form = tmp_path / "other form"
    plain(folder, form)
    path = folder
    for change in layout:
        path = change(path) or path
    entry = Entry("", "", base(name), equals="plain", mtp=True, warns=("the vision model are left out",) * (nested in layout))
    expect_loads(entry, path, form, theirs(form), tmp_path, capsys)


# --------------------------------------------------------------------------------------------------------------------
# Those that are refused
# --------------------------------------------------------------------------------------------------------------------


def refusals(who: str, path: Path, target: Path) -> list[str]:
    """What a program says against it; nothing if it takes it. A converter must leave nothing behind."""
    if who == "check":
        try:
            return [str(finding.problem) for finding in check(path).findings if finding.fault]
        except UserError as e:
            return [str(e)]
    try:
        {
            "generate": start_generate, "server": start_server, "plan": run_plan,
            "convert": lambda path: run_convert(path, target), "cast": lambda path: run_cast(path, target),
        }[who](path)  # fmt: skip
    except UserError as e:
        assert not target.exists() or not list(target.iterdir()), who
        return [str(e)]
    return []


@pytest.mark.parametrize("name", [name for name, entry in CATALOGUE.items() if entry.refused])
def test_refused(name, bases, tmp_path):
    entry = CATALOGUE[name]
    path = made(entry, tmp_path / "c", bases)
    for who in ALL:
        lines = refusals(who, path, tmp_path / who)
        assert all(line.isprintable() and len(line) < 1000 for line in lines), lines
        lines = [line.replace(str(tmp_path), "") for line in lines]  # which has the test's name in it
        if who == "cast" and any("holds no FP8, INT8 or INT4 weights, so there is nothing to cast" in line for line in lines):
            continue
        assert bool(lines) == (who in entry.by), (who, lines)
        if lines:
            assert any(all(words in line for words in entry.refused) for line in lines), (who, entry.refused, lines)


def test_exit_status_and_one_line(bases, tmp_path):
    """Each command, on one that all refuse."""
    path = made(CATALOGUE["LFS pointer for weights"], tmp_path / "c", bases)
    (tmp_path / "prompts.txt").write_text("Hi\n")
    commands = {
        "generate": ("--ckpt-path", path, "--input-file", tmp_path / "prompts.txt", *ENGINE),
        "server": ("--ckpt-path", path, "--port", 0, *ENGINE),
        "convert": ("--hf-ckpt-path", path, "--save-path", tmp_path / "for 2", "--model-parallel", 2),
        "fp8_cast_bf16": ("--input-fp8-hf-path", path, "--output-bf16-hf-path", tmp_path / "cast", "--device", "cpu"),
        "check_checkpoint": (path,),
        "plan": ("--ckpt-path", path, *RUN),
    }

    for command, flags in commands.items():
        status, out, err = forked(command, *flags)
        checks = command == "check_checkpoint"
        assert status == (1 if checks else 2), (command, err)
        lines = [line for line in (out if checks else err).splitlines() if "git lfs pull" in line]
        assert len(lines) == 1 and "Traceback" not in err, (command, out, err)
        assert checks or lines == [line for line in err.splitlines() if line.startswith("error: ")], err


def forked(command: str, *flags: object) -> tuple[int, str, str]:
    """`python COMMAND.py FLAGS` as a process of its own that need not import everything again: its status, output and
    errors."""
    script = ROOT / "inference" / f"{command}.py"
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        if (child := os.fork()) == 0:
            status = 70
            try:
                for file, number in ((out, 1), (err, 2)):
                    os.dup2(file.fileno(), number)
                sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
                sys.argv = [str(script), *map(str, flags)]
                runpy.run_path(str(script), run_name="__main__")
            except SystemExit as e:
                status = e.code if isinstance(e.code, int) else 71
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, how = os.waitpid(child, 0)
        out.seek(0)
        err.seek(0)
        return os.waitstatus_to_exitcode(how), out.read(), err.read()


# --------------------------------------------------------------------------------------------------------------------
# The catalogue itself
# --------------------------------------------------------------------------------------------------------------------


def test_enough_of_both():
    loads = [entry for entry in CATALOGUE.values() if entry.equals is not None]
    assert len(CATALOGUE) >= 100 and len(loads) >= 55 and set(FP8) <= {"v3-fp8", "v3.1-fp8"}
    assert all(entry.refused for entry in CATALOGUE.values() if entry.equals is None)


def test_the_document_shows_it():
    text = (ROOT / "docs" / "checkpoints.md").read_text()
    assert table() in text, "python benchmarks/tables.py"


def test_by_hand(tmp_path, capsys):
    from support import catalogue

    assert catalogue.main([]) == 0
    assert capsys.readouterr().out.splitlines() == list(CATALOGUE)
    assert catalogue.main(["V2 with `norm_topk_prob`", str(tmp_path / "c")]) == 0
    assert json.loads((tmp_path / "c" / "config.json").read_text())["norm_topk_prob"]
    assert catalogue.main(["x"]) == 2


def test_by_hand_from_anywhere(tmp_path):
    """Both scripts find the project's modules by themselves."""
    environment = {name: value for name, value in processes.environment().items() if name != "PYTHONPATH"}
    for script, *arguments in (("catalogue.py",), ("damaged_checkpoints.py", "config with another router", "c")):
        command = [sys.executable, ROOT / "tests" / "support" / script, *arguments]
        done = fork_server.run(command, cwd=tmp_path, env=environment)
        assert done.returncode == 0 and done.stdout, done.stderr
