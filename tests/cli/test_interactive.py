"""Conversations through a pseudo-terminal, as a user has them: alone, under torchrun, and when a rank goes away."""

import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.sampling_params import SamplingParams
from engine.engine import Engine
from support import processes as launch

pexpect = pytest.importorskip("pexpect")

EXACT = ("--device", "cpu", "--dtype", "float32", "--threads", "1", "--temperature", "0")
PROMPT = ">>> "
CTRL_C, CTRL_D, UP, ENTER = "\x03", "\x04", "\x1b[A", "\r"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers never end by themselves, and are plain ASCII, so that a terminal shows them unchanged."""
    return launch.make_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny", printable=True)


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return Engine.from_pretrained(tiny, dtype="float32", max_model_len=600)


def answer(engine: Engine, n: int, *turns: str) -> str:
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    (request,) = engine.generate([messages], SamplingParams(n, temperature=0))
    return request.text


class Chat:
    """A conversation with a program in a pseudo-terminal."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path):
        settings = folder / "inputrc"
        settings.write_text("set enable-bracketed-paste off\n")
        self.child = pexpect.spawn(
            command[0], command[1:], env=environment | {"TERM": "vt100", "INPUTRC": str(settings)}, encoding="utf-8",
            timeout=60, dimensions=(24, 1000),
        )  # fmt: skip
        self.found = termios.tcgetattr(self.child.child_fd)

    def ready(self) -> str:
        """Everything shown up to the next prompt."""
        self.child.expect_exact(PROMPT)
        return self.child.before.replace("\r\n", "\n")

    def type(self, keys: str) -> None:
        self.child.send(keys)

    def say(self, text: str) -> str:
        """Types a line and returns what is shown after it, up to the next prompt."""
        self.type(text + ENTER)
        _, typed, shown = self.ready().partition(f"{text}\n")
        assert typed
        return shown

    def start_answer(self, text: str) -> None:
        """Types a line and waits until its answer has begun."""
        self.type(text + ENTER)
        self.child.expect(text + "\r\n.{3}")

    def left(self, within: float) -> str:
        """What is shown until the program ends, which it must within so many seconds."""
        self.child.expect(pexpect.EOF, timeout=within)
        self.child.wait()
        return self.child.before.replace("\r\n", "\n")

    def settings_are_back(self) -> bool:
        return termios.tcgetattr(self.child.child_fd) == self.found

    def close(self) -> None:
        self.child.close(force=True)


@pytest.fixture
def chats() -> Iterator[list[Chat]]:
    started: list[Chat] = []
    yield started
    for chat in started:
        chat.close()


def cut_off(text: str, n: int) -> str:
    return f"{text}\n(stopped after {n} tokens (--max-new-tokens))\n"


def test_conversation(engine: Engine, tiny: Path, tmp_path: Path, chats: list[Chat]) -> None:
    """Alone: answers as the engine gives them, turns remembered and cleared, lines edited, a context that fills up."""
    flags = ("--ckpt-path", tiny, "--interactive", "--max-new-tokens", 40, "--max-model-len", 600, *EXACT)
    chat = Chat(launch.command(*flags), launch.environment(), tmp_path)
    chats.append(chat)
    assert "/clear" in chat.ready()
    assert not chat.settings_are_back(), "the interrupt key is ours"

    one = answer(engine, 40, "one")
    two = answer(engine, 40, "one", one, "two")
    assert chat.say("one") == cut_off(one, 40)
    assert chat.say("two") == cut_off(two, 40) != cut_off(answer(engine, 40, "two"), 40)
    assert chat.say("   ") == ""
    assert chat.say("/clear") == ""
    chat.type("never sent" + CTRL_C)  # discarded
    alone = cut_off(answer(engine, 40, "two"), 40)
    assert chat.say("two") == alone
    chat.say("/clear")
    chat.type(UP + UP + ENTER)  # history: "two" again
    assert chat.ready().endswith("\n" + alone)

    assert chat.say("x" * 600) == (
        f"(that message was left out: the conversation with it has {1 + 1 + 3 + 1 + 40 + 1 + 1 + 600 + 1} tokens, and "
        "the context holds 600 with the answer; /clear starts afresh)\n"
    )
    three = answer(engine, 40, "two", answer(engine, 40, "two"), "three")
    assert chat.say("three") == cut_off(three, 40), "the conversation goes on as if nothing had been said"
    chat.say("/clear")
    long = "y" * 580
    shown = chat.say(long)
    assert shown == f"{answer(engine, 40, long)}\n(the context of 600 tokens is full; /clear starts afresh)\n"

    chat.type(CTRL_D)
    assert chat.left(within=20).strip() == ""
    assert chat.child.exitstatus == 0
    assert chat.settings_are_back()


def test_stopping_an_answer(engine: Engine, tiny: Path, tmp_path: Path, chats: list[Chat]) -> None:
    flags = ("--ckpt-path", tiny, "--interactive", "--max-new-tokens", 2000, *EXACT)
    chat = Chat(launch.command(*flags), launch.environment(), tmp_path)
    chats.append(chat)
    chat.ready()
    chat.start_answer("one")
    chat.type("typed ahead" + CTRL_C)
    assert "stopped after" not in chat.ready()
    chat.start_answer("two")
    chat.type("/exit" + ENTER)  # typed ahead, and obeyed in its turn
    chat.type("gone" + CTRL_C)
    assert "stopped after" not in chat.ready()
    os.kill(chat.child.pid, signal.SIGTERM)
    assert chat.left(within=10).splitlines()[-1] == "error: stopped from outside (SIGTERM)"
    assert chat.child.exitstatus == 128 + signal.SIGTERM
    assert chat.settings_are_back()


def test_piped_questions(engine: Engine, tiny: Path) -> None:
    flags = ("--ckpt-path", tiny, "--interactive", "--max-new-tokens", 5, *EXACT)
    asked = "one\n\n/clear\r\nbad \udcff\ntwo"
    done = subprocess.run(
        launch.command(*flags), env=launch.environment(), input=asked.encode("utf-8", "surrogateescape"),
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0
    one, two = answer(engine, 5, "one"), answer(engine, 5, "two")
    assert done.stdout.decode() == f"{PROMPT}{one}\n{PROMPT}{PROMPT}{PROMPT}{PROMPT}{two}\n{PROMPT}\n"
    assert "not understood: that line is not valid UTF-8" in done.stderr.decode()


def workers(torchrun: int) -> dict[int, int]:
    """Process ids of torchrun's workers by rank."""
    found = {}
    for task in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((task / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (task / "environ").read_bytes().split(b"\0") if parent == torchrun else []
        except OSError:
            continue
        found |= {int(v.partition(b"=")[2]): int(task.name) for v in variables if v.startswith(b"RANK=")}
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds torchrun's workers in /proc")
def test_under_torchrun(engine: Engine, tiny: Path, tmp_path: Path, chats: list[Chat]) -> None:
    """The interrupt key stops an answer and not torchrun; a slow typist is waited for; a dead rank ends the wait."""
    flags = ("--ckpt-path", tiny, "--interactive", "--max-new-tokens", 2000, "--timeout", 4, *EXACT)
    chat = Chat(launch.torchrun(*flags), launch.environment(), tmp_path)
    chats.append(chat)
    chat.ready()
    chat.start_answer("one")
    chat.type(CTRL_C)
    assert "stopped after" not in chat.ready()
    chat.type("half a line")
    time.sleep(6)  # longer than the timeout
    chat.type(CTRL_C)
    chat.say("/clear")
    chat.type("two" + ENTER)
    chat.child.expect_exact("two\r\n" + answer(engine, 20, "two"))
    chat.type(CTRL_C)
    chat.ready()

    rank1 = workers(chat.child.pid)[1]
    os.kill(rank1, signal.SIGKILL)
    shown = chat.left(within=15)  # torchrun's own clearing up included
    assert launch.errors(shown) == ["error: rank 0 lost contact with rank 1, which has died"]
    assert chat.child.exitstatus != 0
    assert chat.settings_are_back()


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_lost_while_waiting(tiny: Path, tmp_path: Path, chats: list[Chat], fate: signal.Signals) -> None:
    """No torchrun that would end rank 0, as when another host goes: it leaves the prompt by itself, in time."""
    flags = ("--ckpt-path", tiny, "--interactive", "--timeout", 4, *EXACT)
    port = launch.free_port()
    other = launch.start_rank(1, 2, port, *flags)
    try:
        chat = Chat(launch.command(*flags), launch.rank_environment(0, 2, port), tmp_path)
        chats.append(chat)
        chat.ready()
        chat.type("half a line")
        time.sleep(2)
        os.kill(other.pid, fate)
        shown = chat.left(within=20)
        what = "has died" if fate == signal.SIGKILL else "is stopped"
        assert launch.errors(shown) == [f"error: rank 0 lost contact with rank 1, which {what}"]
        assert chat.child.exitstatus == 1
        assert chat.settings_are_back()
    finally:
        other.kill()
        other.communicate()


def test_end_of_input_frees_every_rank(tiny: Path, tmp_path: Path, chats: list[Chat]) -> None:
    flags = ("--ckpt-path", tiny, "--interactive", "--max-new-tokens", 3, *EXACT)
    port = launch.free_port()
    other = launch.start_rank(1, 2, port, *flags)
    try:
        chat = Chat(launch.command(*flags), launch.rank_environment(0, 2, port), tmp_path)
        chats.append(chat)
        chat.ready()
        chat.say("one")
        chat.type("/exit" + ENTER)
        chat.left(within=20)
        _, err = other.communicate(timeout=20)
        assert (chat.child.exitstatus, other.returncode, err) == (0, 0, "")
    finally:
        other.kill()


def test_a_stuck_step_can_be_left(tiny: Path, tmp_path: Path, chats: list[Chat]) -> None:
    """A rank that hangs would keep the answer from being stopped until the timeout: insisting ends the program."""
    flags = ("--ckpt-path", tiny, "--interactive", "--max-new-tokens", 2000, *EXACT)
    port = launch.free_port()
    other = launch.start_rank(1, 2, port, *flags)
    try:
        chat = Chat(launch.command(*flags), launch.rank_environment(0, 2, port), tmp_path)
        chats.append(chat)
        chat.ready()
        chat.start_answer("one")
        os.kill(other.pid, signal.SIGSTOP)
        time.sleep(1)
        chat.type(CTRL_C + CTRL_C)
        chat.child.expect_exact("(waiting for the running step; Ctrl-C once more ends the program)")
        chat.type(CTRL_C)
        assert launch.errors(chat.left(within=10)) == ["error: interrupted while waiting for a step"]
        assert chat.child.exitstatus == 130
        assert chat.settings_are_back()
    finally:
        other.kill()
        other.communicate()
