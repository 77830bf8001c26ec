"""What commands have in common: flags made from RunConfig's fields, exit statuses, interrupts and readers that leave."""

import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import generate
import server
from cli.flags import ENGINE_FLAGS, SERVER_FLAGS, run_config
from core.run_config import RunConfig
from support import processes as launch

MINIMAL = {generate: ["--ckpt-path", "C", "--interactive"], server: ["--ckpt-path", "C"]}
EVERY_FLAG = {
    "dtype": "float32", "gemm": "bf16", "experts": "split", "device": "cpu", "max_model_len": 300, "max_num_seqs": 3,
    "max_num_batched_tokens": 70, "kv_cache_gib": 0.5, "kv_cache_dtype": "fp8", "mtp": 2, "deterministic": True,
    "eager": True, "verify": True, "threads": 2, "timeout": 9.5, "max_num_mixed_tokens": 40, "dp": 1,
    "pp": 3, "pp_layers": "20,21,20",
}  # fmt: skip


@pytest.mark.parametrize("command", MINIMAL, ids=lambda module: module.__name__)
def test_flags_are_the_fields_of_run_config(command, capsys):
    """With their defaults, their values and their help; all but those that callers in Python alone have."""
    assert run_config(command.parse(MINIMAL[command])) == RunConfig()
    names = ENGINE_FLAGS if command is generate else ENGINE_FLAGS + SERVER_FLAGS
    assert {f.name for f in fields(RunConfig)} - {*names, *SERVER_FLAGS} == {"n_pages", "prefix_reuse"}
    given = {name: EVERY_FLAG[name] for name in names}
    flags = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value)) if text != "True"]
    assert run_config(command.parse([*MINIMAL[command], *flags])) == RunConfig(**given)
    assert run_config(command.parse([*MINIMAL[command], "--dp", "2"])) == RunConfig(dp=2)  # not beside --pp
    with pytest.raises(SystemExit):
        command.parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for f in fields(RunConfig):
        if f.name in names:
            assert f"--{f.name.replace('_', '-')}" in shown and f.metadata["help"].replace("%(default)s", str(f.default)) in shown


def test_help_imports_only_what_it_shows(tmp_path):
    """Not the model's config, whose dataclass alone takes 4 ms to make, and not what answers a file."""
    code = (
        "import sys, generate\n"
        "try: generate.parse(['--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'asyncio', 'core.config', 'core.hf_config', 'cli.batch_files'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=launch.SCRIPT.parent, capture_output=True, text=True, timeout=100)
    assert done.stdout.startswith("usage:") and done.stderr == "set()\n"


def run(code: str, folder: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """A command whose `run` is these statements, beside a torch that is quickly imported."""
    (folder / "torch.py").write_text("")
    program = f"import signal, sys\nfrom cli.main import run_command\ndef run(options):\n    {code}\nsys.exit(run_command(list, run))"
    env = os.environ | {"PYTHONPATH": f"{folder}:{launch.SCRIPT.parent}"}
    return subprocess.run([sys.executable, "-c", program], env=env, stderr=subprocess.PIPE, text=True, timeout=100, **options)


def test_exit_statuses(tmp_path):
    for code, status, said in (
        ("return 3", 3, ""),
        ("signal.raise_signal(signal.SIGINT)", 130, ""),
        ("from core.errors import UserError; raise UserError('no such thing')", 2, "error: no such thing\n"),
    ):
        done = run(code, tmp_path)
        assert (done.returncode, done.stderr) == (status, said), code


def test_an_interrupt_that_is_ignored_stays_so(tmp_path):
    """As in a script's background, before and after torch is imported."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        done = run("signal.raise_signal(signal.SIGINT); return 0", tmp_path)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("flags", [["--help"], None], ids=["help", "output"])
def test_a_reader_that_leaves(tmp_path, flags):
    """Whoever read the output has gone, as `head` does: status 1, and not a word."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        if flags is None:
            done = run("print('x' * 100_000, flush=True); return 0", tmp_path, stdout=writer)
        else:
            done = subprocess.run(launch.command(*flags), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=100)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
