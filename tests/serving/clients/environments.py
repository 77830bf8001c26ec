"""Makes throw-away environments with other people's clients, outside the project's own:

    python tests/serving/clients/environments.py build/clients

A virtual environment for Python's clients, one for lm-evaluation-harness, and a folder with Node's packages, in the
versions named here. What is there already is kept. The exit status is 1, with a line for each, where some cannot be made:
without a registry of packages, or without node and npm.
"""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

PYTHON = {
    "python": ("langchain-openai==1.7.4", "litellm==1.110.2", "pydantic-ai-slim[openai]==2.68.0"),
    "lm_eval": ("lm-eval[api]==0.4.13", "transformers==5.23.0"),
}
NODE = ("openai@6.49.0", "ai@6.0.326", "@ai-sdk/openai@3.0.141", "@ai-sdk/openai-compatible@2.0.92")
SECONDS = 900  # an installation may take


def make_python(folder: Path, packages: tuple[str, ...]) -> str | None:
    """What went wrong, if something did."""
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    return run([*pip, *packages], folder)


def make_node(folder: Path) -> str | None:
    """What went wrong, if something did."""
    if shutil.which("node") is None or (npm := shutil.which("npm")) is None:
        return "node and npm are not installed"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text('{"private": true}\n')
    return run([npm, "install", "--no-audit", "--no-fund", *NODE], folder)


def run(command: list[str], folder: Path) -> str | None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"not within {SECONDS} s"
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]


def make(root: Path, name: str) -> str | None:
    """Makes the environment `name` below `root`, unless it is there. Returns what went wrong, if something did."""
    folder, packages = root.resolve() / name, PYTHON.get(name, NODE)
    done = folder / "made_of.txt"
    if done.exists() and done.read_text() == "\n".join(packages):
        return None
    problem = make_node(folder) if name == "node" else make_python(folder, packages)
    if problem is None:
        done.write_text("\n".join(packages))
    return problem


if __name__ == "__main__":
    problems = {name: make(Path(sys.argv[1]), name) for name in (*PYTHON, "node")}
    for name, problem in problems.items():
        print(f"{name}: {problem or 'made'}")
    sys.exit(any(problems.values()))
