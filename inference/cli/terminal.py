"""Reads a conversation's lines, with editing and history, and an interrupt key that stops only the running answer.

torchrun starts its workers in a session of their own, so the terminal's Ctrl-C never reaches them: it ends torchrun,
which ends everything. Therefore the terminal is set to pass the interrupt key on as an ordinary byte (no ISIG). It
follows that the byte must be watched for while an answer is generated, that readline must be told its meaning, and that
the terminal's settings must be restored however the program ends.
"""

import os
import queue
import select
import signal
import sys
import termios
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

INTERRUPT = b"\x03"  # Ctrl-C
MAX_PRESSES = 3  # of the interrupt key without an effect; the last ends the program


class Terminal:
    """Standard input: a terminal, a pipe or a file. Use it as a context manager, on the main thread.

    A thread of its own reads, so that the main thread can send the other ranks heartbeats while the user thinks.
    Between two prompts it watches for the interrupt key, and keeps lines typed ahead for the prompts to come.
    """

    def __init__(self, exit_on_signal: Callable[[int], object], prompt: str = ">>> "):
        """`exit_on_signal` ends the program, with a message, on the signal of that number."""
        self.prompt, self._exit_on_signal = prompt, exit_on_signal
        self._fd = 0
        self.is_tty = os.isatty(self._fd)
        self._settings: list[Any] | None = None  # the terminal's own, to be restored
        self._readline = self.is_tty and os.isatty(sys.stdout.fileno()) and _load_readline()
        self._editing = False
        self._ahead = b""  # read, but not asked for yet
        self._ended = False
        self._presses = 0
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._asked, self._ask = os.pipe()
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Terminal":
        if self.is_tty:
            self._configure()
        threading.Thread(target=self._listen, name="terminal", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()
        if error is not None and self.is_tty:
            print(flush=True)  # what follows is not part of a half-typed or half-answered line
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._handlers:
            signal.set_wakeup_fd(self._wakeup)

    def ask(self, meanwhile: Callable[[], object], every: float) -> str | None:
        """Shows the prompt and returns the next line, without its end, or None where the input ends.

        Calls `meanwhile` every `every` seconds until then; what it raises comes out of here, with the user's
        half-typed line left on the screen.
        """
        self._presses = 0
        os.write(self._ask, b"?")
        while True:
            try:
                return self._answers.get(timeout=every)
            except queue.Empty:
                meanwhile()

    @property
    def interrupted(self) -> bool:
        """Whether the interrupt key was pressed since the last line."""
        return self._presses > 0

    def restore(self) -> None:
        """Restores the terminal's settings. Safe to call twice and from any thread."""
        if self._settings is not None:
            termios.tcsetattr(self._fd, termios.TCSANOW, self._settings)
        if self._editing:  # readline is interrupted: stop it marking pasted text
            os.write(sys.stdout.fileno(), b"\x1b[?2004l")

    # ---------------------------------------------------------------- the terminal's settings

    def _configure(self) -> None:
        self._settings = termios.tcgetattr(self._fd)
        ours = termios.tcgetattr(self._fd)
        ours[0] &= ~termios.IXON  # Ctrl-S would stop our output, and with it every rank
        ours[3] &= ~termios.ISIG
        for key in (termios.VINTR, termios.VQUIT, termios.VSUSP):  # readline switches ISIG on again while it edits
            ours[6][key] = bytes([os.fpathconf(self._fd, "PC_VDISABLE")])
        ours[6][termios.VEOL] = INTERRUPT  # the key ends a line as Enter does, so that it is read at once
        self._signals, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in (signal.SIGTERM, signal.SIGHUP):
            self._handlers[number] = signal.signal(number, lambda *_: None)
        self._wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._await_signal, name="signals", daemon=True).start()
        termios.tcsetattr(self._fd, termios.TCSANOW, ours)

    def _await_signal(self) -> None:
        """Exits on a signal from outside, on a thread because the main one may be waiting for another rank."""
        while (number := os.read(self._signals, 1)[0]) not in self._handlers:
            pass
        self.restore()
        os.write(sys.stderr.fileno(), b"\n")
        self._exit_on_signal(number)

    def _exit(self, line: str, status: int) -> None:
        self.restore()
        os.write(sys.stderr.fileno(), f"\n{line}\n".encode())
        os._exit(status)

    # ---------------------------------------------------------------- the reading thread

    def _listen(self) -> None:
        line: str | None = ""
        while line is not None:
            self._watch()
            line = self._next_line()
            self._answers.put(line)

    def _watch(self) -> None:
        """Until the next prompt: counts interrupts, and keeps lines typed ahead; an interrupt discards those."""
        while True:
            watched = [self._asked, self._fd] if self.is_tty and not self._ended else [self._asked]
            if self._asked in select.select(watched, [], [])[0]:
                os.read(self._asked, 1)
                return
            typed = self._read()
            if not typed.endswith(INTERRUPT):
                self._ahead += typed
                continue
            self._ahead = b""
            self._presses += 1
            if self._presses == MAX_PRESSES - 1:
                os.write(sys.stderr.fileno(), b"\n(waiting for the running step; Ctrl-C once more ends the program)\n")
            if self._presses == MAX_PRESSES:
                self._exit("error: interrupted while waiting for a step", 130)

    def _next_line(self) -> str | None:
        while True:
            try:
                if self._readline and not self._ended and b"\n" not in self._ahead:
                    return self._edited_line()
                return self._plain_line()
            except EOFError:
                print(flush=True)
                return None
            except UnicodeDecodeError:
                print("not understood: that line is not valid UTF-8", file=sys.stderr, flush=True)

    def _edited_line(self) -> str:
        """A line by readline. Raises EOFError and UnicodeDecodeError."""
        self._editing = True
        try:
            return input(self.prompt)
        finally:
            self._editing = False

    def _plain_line(self) -> str:
        """A line typed ahead, or one without editing of ours. The same errors."""
        print(self.prompt, end="", flush=True)
        typed_ahead = self.is_tty and b"\n" in self._ahead
        while b"\n" not in self._ahead and not self._ended:
            typed = self._read()
            if self.is_tty and typed.endswith(INTERRUPT):
                self._ahead, typed = b"", b""
                print(f"\n{self.prompt}", end="", flush=True)
            self._ahead += typed
        line, newline, self._ahead = self._ahead.partition(b"\n")
        if not line and not newline:
            raise EOFError
        text = line.removesuffix(b"\r").decode()
        if typed_ahead:
            print(text, flush=True)
        return text

    def _read(self) -> bytes:
        try:
            data = os.read(self._fd, 1 << 16)
        except OSError:  # a terminal that was hung up
            data = b""
        self._ended = not data
        return data


def _load_readline() -> bool:
    """Line editing and history for `input`, with Ctrl-C discarding the line; False where Python lacks it."""
    try:
        import readline
    except ImportError:
        return False
    if "libedit" in (readline.__doc__ or ""):  # what some Pythons have under this name, with its own commands
        readline.parse_and_bind("bind ^C em-kill-line")
    else:
        readline.parse_and_bind('"\\C-c": kill-whole-line')
    return True
