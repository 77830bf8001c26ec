"""The order of the packages, measured from the imports: arrows point down, nothing goes round, nothing imports a command.

    python tests/test_house.py                      # a table of figures
    python tests/test_house.py --at f7d20d2 HEAD    # a column for each revision, the flat folder's too
    python tests/test_house.py --token              # also the files that a token passes through, traced on the demo

An arrow is an import of one project module by another: at the top of a file, inside a function, or under
`if TYPE_CHECKING:`, which never runs and is also counted apart. A floor is a step of the longest chain of arrows, a circle
(a strongly connected component of several modules) counting as one.
"""

import argparse
import ast
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# From the ground up. Those of one line do not import each other; every other top-level module is a command.
FLOORS = (
    ("core",), ("ops", "parallel", "text"), ("model",), ("checkpoint",), ("engine",), ("serving", "verification"), ("cli",),
)  # fmt: skip
COMMANDS = len(FLOORS)
RESERVED = {"triton", "kernels", "distributed"}  # names that torch or transformers look for
Arrows = set[tuple[str, str]]


class House(NamedTuple):
    sources: dict[str, str]  # by dotted name; a package's own file under the package's name
    arrows: Arrows  # (importer, imported), all of them
    typing_arrows: Arrows  # those that only type checkers follow
    other_lines: int  # of C, and of the page


def read_files(root: Path) -> Iterator[tuple[str, str]]:
    """(path below inference/, text) of what the program is written in."""
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".c", ".html", ".css", ".js") and path.is_file() and "vendored" not in path.parts:
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")


def build(files: Iterable[tuple[str, str]]) -> House:
    sources, other_lines = {}, 0
    for path, text in files:
        if path.endswith(".py"):
            sources[path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")] = text
        else:
            other_lines += len(text.splitlines())
    arrows: Arrows = set()
    typing_arrows: Arrows = set()
    for name, text in sources.items():
        tree = ast.parse(text)
        unseen = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for statement in node.body
            for inner in ast.walk(statement)
        }
        for node in ast.walk(tree):
            for target in imported(node, sources):
                if target != name:
                    (typing_arrows if node in unseen else arrows).add((name, target))
    return House(sources, arrows | typing_arrows, typing_arrows - arrows, other_lines)


def imported(node: ast.AST, sources: dict[str, str]) -> Iterator[str]:
    """The project's modules that a statement imports: `from a import b` is a.b where there is such a module, else a."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in sources)
    elif isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            if whole in sources or node.module in sources:
                yield whole if whole in sources else node.module


def package(module: str) -> str:
    return module.partition(".")[0]


def floor(module: str) -> int:
    """How high a module belongs: its package's place in FLOORS; a command's is the highest."""
    return next((i for i, names in enumerate(FLOORS) if package(module) in names), COMMANDS)


def components(nodes: Iterable[str], arrows: Arrows) -> list[list[str]]:
    """Strongly connected components (Tarjan), those that others import first."""
    below: dict[str, list[str]] = {node: [] for node in nodes}
    for a, b in sorted(arrows):
        below[a].append(b)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in below[node]:
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            at = stack.index(node)
            found.append(sorted(stack[at:]))
            del stack[at:]

    for node in below:
        if node not in index:
            visit(node)
    return found


def circles(nodes: Iterable[str], arrows: Arrows) -> list[list[str]]:
    return [component for component in components(nodes, arrows) if len(component) > 1]


def n_floors(nodes: Iterable[str], arrows: Arrows) -> int:
    """The length of the longest chain."""
    height: dict[str, int] = {}
    for component in components(nodes, arrows):
        under = [height[b] for a, b in arrows if a in component and b not in component]
        height |= dict.fromkeys(component, 1 + max(under, default=0))
    return max(height.values(), default=0)


def wrong_arrows(arrows: Arrows) -> list[str]:
    """Those that point up, or from one package to another on its floor. Anything that imports a command is among them."""
    return [
        f"{a} imports {b}"
        for a, b in sorted(arrows)
        if (package(a) != package(b) and floor(a) <= floor(b)) or floor(b) == COMMANDS
    ]


# --- one token's way -------------------------------------------------------------------------------------------------

TRACER = """
import os, runpy, sys, threading
inference, script = sys.argv[1], sys.argv[2]
seen, whole = [], []

def profile(frame, event, _):
    code = frame.f_code
    file = code.co_filename
    if event != "call" or not file.startswith(inference + os.sep) or code.co_name == "<module>":
        return
    whole.append(file)
    if not seen:
        if not (code.co_name == "step" and "engine" in file):
            return
        while frame is not None:  # those that wait for the step
            if frame.f_code.co_filename.startswith(inference + os.sep):
                seen.append(frame.f_code.co_filename)
            frame = frame.f_back
    seen.append(file)

threading.setprofile(profile)
sys.setprofile(profile)
sys.argv[1:] = sys.argv[3:]
sys.argv[0] = script
sys.path.insert(0, inference)
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as e:
    assert not e.code, e.code
finally:
    sys.setprofile(None)
    for word, files in (("STEPS", seen), ("WHOLE", whole)):
        print(word, *dict.fromkeys(os.path.relpath(file, inference) for file in files), file=sys.stderr)
"""


def token_files(root: Path) -> tuple[list[str], list[str]]:
    """The files of inference/ whose functions run when generate.py answers one prompt of the demo with two tokens, that is
    with one step of prefill and one of decoding: those that are active at the first Engine.step or entered from then on,
    and those that are entered at all, loading included. Python's only: C is entered through one of them."""
    inference = root / "inference"
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.txt")
        prompts.write_text("What is 347 + 285?\n")
        flags = ["--ckpt-path", ROOT / "demo" / "checkpoint", "--input-file", prompts, "--max-new-tokens", 2,
                 "--temperature", 0, "--device", "cpu", "--threads", 1]  # fmt: skip
        command = [sys.executable, "-c", TRACER, inference, inference / "generate.py", *flags]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=os.environ | {"PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    steps, whole = (re.search(rf"^{word} (.*)$", done.stderr, re.MULTILINE) for word in ("STEPS", "WHOLE"))
    assert steps and whole, done.stderr
    return steps[1].split(), whole[1].split()


# --- what it is held to ----------------------------------------------------------------------------------------------


def present() -> House:
    return build(read_files(ROOT / "inference"))


def test_arrows_point_down() -> None:
    house = present()
    assert len(house.sources) > 40 and len(house.arrows) > 100, "imports were not found"
    assert not wrong_arrows(house.arrows)


def test_there_is_no_circle() -> None:
    house = present()
    assert not circles(house.sources, house.arrows)
    packages = {(package(a), package(b)) for a, b in house.arrows if package(a) != package(b)}
    assert not circles({package(name) for name in house.sources}, packages)


def test_no_name_hides_another() -> None:
    """Not of the standard library, of a package that is installed, of a module beside a package."""
    tops = {package(name) for name in present().sources}
    others = {*sys.stdlib_module_names, *metadata.packages_distributions(), *RESERVED}
    assert not tops & others
    folders = [path for path in (ROOT / "inference").rglob("*") if path.is_dir()]
    assert not [path for path in folders if path.with_suffix(".py").exists()]


def test_modules_of_tests_have_names_of_their_own() -> None:
    """Pytest imports them by name alone, and refuses two of one name only when it is given both."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, n in names.items() if n > 1]


def test_reading_follows_a_token() -> None:
    """docs/reading.md walks at most eleven files, in each of which the traced token really was, and names the others."""
    text = (ROOT / "docs" / "reading.md").read_text()
    section = text.partition("## A token's way")[2].partition("\n## ")[0]
    walk = re.findall(r"^\d+\. `([\w/]+\.py)`", section, re.MULTILINE)
    steps, _ = token_files(ROOT)
    assert 5 < len(walk) <= 11 and len(set(walk)) == len(walk)
    assert not set(walk) - set(steps), f"of the walk, the token was not in these; it was in {steps}"
    assert not [file for file in steps if f"`{file}`" not in section], "the token was in these, and they are not named"


def test_what_is_wrong_is_found() -> None:
    def house(**sources: str) -> House:
        return build((f"{name.replace('__', '/')}.py", text) for name, text in sources.items())

    up = house(core__a="def f():\n    from engine import b\n", engine__b="import core.a")
    assert wrong_arrows(up.arrows) == ["core.a imports engine.b"]
    assert circles(up.sources, up.arrows) == [["core.a", "engine.b"]] and n_floors(up.sources, up.arrows) == 1
    beside = house(ops__a="from text.b import c", text__b="", cli__d="if TYPE_CHECKING:\n    import generate", generate="")
    assert wrong_arrows(beside.arrows) == ["cli.d imports generate", "ops.a imports text.b"]
    assert beside.typing_arrows == {("cli.d", "generate")} and n_floors(beside.sources, beside.arrows) == 2


# --- the table -------------------------------------------------------------------------------------------------------


def figures(root: Path, token: bool) -> dict[str, str]:
    house = build(read_files(root / "inference"))
    names = {package(name) for name in house.sources}
    packages = {(package(a), package(b)) for a, b in house.arrows if package(a) != package(b)}
    lines = {name: len(text.splitlines()) for name, text in house.sources.items()}
    longest = max(lines, key=lines.__getitem__)
    found = {
        "modules": len([name for name, n in lines.items() if n]),
        "packages": len({name for name in names if any(other.startswith(f"{name}.") for other in house.sources)}),
        "lines of Python": sum(lines.values()),
        "lines of C and of the page": house.other_lines,
        "longest module": f"{longest.replace('.', '/')}.py, {lines[longest]}",
        "floors of modules": n_floors(house.sources, house.arrows),
        "floors of packages and top-level modules": n_floors(names, packages),
        "arrows between modules": len(house.arrows),
        "of them between packages": len({(a, b) for a, b in house.arrows if package(a) != package(b)}),
        "arrows between packages": len(packages),
        "for type checkers only": len(house.typing_arrows),
        "circles": "; ".join(f"{len(circle)} modules" for circle in circles(house.sources, house.arrows)) or "none",
        "arrows that point up": len(wrong_arrows(house.arrows)) if (root / "inference" / "core").exists() else "–",
    }
    if token:
        steps, whole = token_files(root)
        found |= {"files entered by generate.py for a token": len(whole), "of them from its first step on": len(steps)}
        print(f"{root.name}: {' '.join(steps)}", file=sys.stderr)
    return {name: str(value) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--at", nargs="+", metavar="REV", default=[], help="git revisions (default: the files as they are)")
    parser.add_argument("--token", action="store_true", help="trace one token through generate.py as well")
    options = parser.parse_args()
    columns = {}
    with tempfile.TemporaryDirectory() as folder:
        for revision in options.at:
            archive = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=True).stdout
            target = Path(folder, revision.replace("/", "-"))
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                tar.extractall(target, filter="data")
            columns[revision] = figures(target.resolve(), options.token)
    if not columns:
        columns["now"] = figures(ROOT, options.token)
    names = list(next(iter(columns.values())))
    print("| | " + " | ".join(columns) + " |", "| --- " * (1 + len(columns)) + "|", sep="\n")
    for name in names:
        print(f"| {name} | " + " | ".join(column[name] for column in columns.values()) + " |")


if __name__ == "__main__":
    main()
