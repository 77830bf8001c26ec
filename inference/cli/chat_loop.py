"""A conversation in the terminal (or from a pipe), each answer printed while it is generated."""

import argparse
import sys
from typing import TYPE_CHECKING

from cli.batch_files import conversation
from cli.terminal import Terminal
from core.errors import UserError
from text.chat_format import ChatFormat

if TYPE_CHECKING:
    from core.sampling_params import SamplingParams
    from engine.engine import Engine
    from engine.request import Request

HINT = "(Ctrl-C stops an answer, /clear forgets the conversation, /exit leaves)"


def chat_loop(engine: "Engine", params: "SamplingParams", options: argparse.Namespace) -> int:
    """Answers lines until the input ends or /exit. Returns the exit status."""
    assert engine.tokenizer is not None
    messages: list[dict] = []
    with Terminal(engine.world.process.exit_on_signal) as terminal:
        if terminal.is_tty:
            print(HINT, file=sys.stderr, flush=True)
        while (line := terminal.ask(meanwhile=engine.step, every=options.timeout / 3)) is not None:
            if not line.strip():
                continue
            if line.strip() == "/exit":
                break
            if line.strip() == "/clear":
                messages = []
                continue
            turns = [*messages, *conversation(None if messages else options.system, line)]
            try:
                if options.raw:
                    ids = engine.tokenizer.encode_text(line)
                else:
                    ids = engine.tokenizer.encode_chat(turns, thinking=False if options.no_thinking else None)
            except UserError as e:
                note(f"{e}; it was left out")
                continue
            if len(ids) >= engine.max_model_len:
                whole = "it" if len(turns) == 1 or options.raw else "the conversation with it"
                note(f"that message was left out: {whole} has {len(ids)} tokens, and the context holds "
                     f"{engine.max_model_len} with the answer; /clear starts afresh")  # fmt: skip
                continue
            request = engine.add(ids, params, chat=None if options.raw else ChatFormat())
            print_answer(engine, request, terminal)
            if request.finish_reason == "error":
                note(f"error: {request.error}; the message was left out")
                continue
            if request.finish_reason == "length":
                full = len(ids) + len(request.tokens) >= engine.max_model_len
                note(f"the context of {engine.max_model_len} tokens is full; /clear starts afresh" if full else
                     f"stopped after {len(request.tokens)} tokens (--max-new-tokens)")  # fmt: skip
            if not options.raw:
                messages = [*turns, {"role": "assistant", "content": request.text}]
    return 0


def print_answer(engine: "Engine", request: "Request", terminal: Terminal) -> None:
    """Prints the answer token by token until it ends, or the user interrupts it."""
    n_printed = 0
    while request.finish_reason is None:
        if terminal.interrupted:
            engine.cancel(request)
        engine.step()
        print("".join(event.text for event in request.events[n_printed:]), end="", flush=True)
        n_printed = len(request.events)
    print(flush=True)


def note(text: str) -> None:
    """Prints a message of the program's to standard error, in parentheses, apart from the model's text."""
    print(f"({text})", file=sys.stderr, flush=True)
