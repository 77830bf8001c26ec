"""Answers prompts from a terminal or a file with a DeepSeek-V3, V2 or Kimi-K2 checkpoint.

  python generate.py --ckpt-path CKPT --interactive
  torchrun --nproc-per-node 8 generate.py --ckpt-path CKPT --input-file prompts.txt --output-file answers.jsonl

Exit status: 0; 1 some request failed, or a rank was lost; 2 wrong use, or a checkpoint that cannot be used.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import main as cli
from cli.flags import Parser, add_checkpoint_flags, add_engine_flags
from core.errors import UserError
from serving import requestfields

if TYPE_CHECKING:  # torch takes seconds to import: a mistyped flag is answered without it
    from core.sampling_params import SamplingParams
    from engine.engine import Engine, Prompt
    from engine.request import Request
    from engine.sampling import Logprob
    from parallel.group import Group

LINE_BREAKS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}  # to some readers; JSON allows them bare
HINT = "(Ctrl-C stops an answer, /clear forgets the conversation, /exit leaves)"


# --------------------------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> argparse.Namespace:
    """Raises UserError for wrong use."""
    parser = Parser(__doc__)
    add_checkpoint_flags(parser)
    add = parser.add_argument
    add("--interactive", action="store_true", help="a conversation in the terminal")
    add("--input-file", metavar="FILE", help="one prompt a line, or .jsonl requests in the OpenAI batch format")
    add("--output-file", metavar="FILE", help="also write the answers here, one JSON object a line")
    add("--max-new-tokens", type=int, default=200, metavar="N", help="most tokens of an answer (default: 200)")
    add("--temperature", type=float, metavar="T", help="0 is greedy (default: generation_config.json's, else 0.2)")
    add("--top-p", type=float, metavar="P", help="nucleus sampling (default: generation_config.json's, else 1)")
    add("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens (default: all)")
    add("--min-p", type=float, metavar="P", help="drop tokens less likely than P times the likeliest")
    add("--repetition-penalty", type=float, metavar="X", help="divides logits of tokens already there")
    add("--presence-penalty", type=float, default=0.0, metavar="X", help="off the logits of tokens already answered")
    add("--frequency-penalty", type=float, default=0.0, metavar="X", help="the same, for each time they were")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be given several times")
    add("--seed", type=int, default=0, metavar="N", help="of the sampling noise (default: 0)")
    add("--system", metavar="TEXT", help="a system message before each conversation")
    add("--no-thinking", action="store_true", help="for chat templates that can leave thinking out (DeepSeek-V3.1)")
    add("--raw", action="store_true", help="no chat template: complete the text (base models)")
    add("--stats", action="store_true", help="say at the end what the cache and the drafts were worth")
    add_engine_flags(parser)
    options = parser.parse_args(arguments)
    if options.interactive == (options.input_file is not None):
        parser.error("give either --interactive or --input-file")
    if options.output_file is not None and options.interactive:
        parser.error("--output-file goes with --input-file")
    if options.raw and options.system is not None:
        parser.error("--system needs the chat template that --raw leaves out")
    if options.raw and options.no_thinking:
        parser.error("--no-thinking needs the chat template that --raw leaves out")
    return options


def default_params(options: argparse.Namespace) -> "SamplingParams":
    """From the flags, else the checkpoint's generation_config.json, else 0.2 and the rest off. Raises UserError."""
    from core.sampling_params import params_from_generation_config

    return params_from_generation_config(
        Path(options.ckpt_path),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        seed=options.seed,
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        stop=tuple(options.stop),
    )


# --------------------------------------------------------------------------------------------------------------------
# Prompts from a file
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """One prompt of the input file: as it is printed, and as the engine gets it, or why it cannot."""

    shown: str
    prompt: "Prompt"
    params: "SamplingParams"
    custom_id: str | None = None
    error: str | None = None


def read_jobs(options: argparse.Namespace, params: "SamplingParams") -> list[Job]:
    """Raises UserError when the file is unreadable, not UTF-8, without prompts, or .jsonl with a line that is none."""
    path = Path(options.input_file)
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}") from None
    jobs, seen = [], dict[str, int]()
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = line.decode().removesuffix("\r")
        except UnicodeDecodeError as e:
            raise UserError(f"{path}: line {number} is not UTF-8 (byte 0x{line[e.start]:02x})") from None
        if not text.strip():
            continue
        if path.suffix.lower() != ".jsonl":
            jobs.append(Job(text, text if options.raw else conversation(options.system, text), params))
            continue
        job = read_request(text, f"{path}: line {number}", options, params)
        if job.custom_id is not None and seen.setdefault(job.custom_id, number) != number:
            raise UserError(f"{path}: line {number} has the custom_id of line {seen[job.custom_id]}, {job.custom_id!r}")
        jobs.append(job)
    if not jobs:
        raise UserError(f"{path}: no prompts in it" + (", only blank lines" if raw else ", it is empty"))
    return jobs


def conversation(system: str | None, text: str) -> list[dict]:
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": text}]


def read_request(text: str, where: str, options: argparse.Namespace, params: "SamplingParams") -> Job:
    """A line of the OpenAI batch format. Raises UserError for what is no such line; what the line asks for and cannot
    have is that request's error alone."""
    try:
        request = json.loads(text)
    except ValueError as e:
        raise UserError(f"{where} is not JSON ({e})") from None
    body = request.get("body") if isinstance(request, dict) else None
    if not isinstance(body, dict):
        raise UserError(f"{where} is no request: expected an object with a body, such as "
                        '{"custom_id": "1", "body": {"messages": [{"role": "user", "content": "Hello"}]}}')  # fmt: skip
    name = request.get("custom_id")
    if not isinstance(name, str | None):
        raise UserError(f"{where}: custom_id is {name!r}, expected a string")
    kind = "prompt" if options.raw else "messages"
    prompt: Any = body.get(kind)
    job = Job(last_text(prompt), prompt, params, name)
    try:
        if prompt is None:
            raise UserError(f"body.{kind} is missing" + (" (--raw completes text)" if options.raw else ""))
        if options.raw and not isinstance(prompt, str):
            raise UserError("body.prompt: expected a string")
        if not options.raw and not (isinstance(prompt, list) and all(isinstance(m, dict) for m in prompt)):
            raise UserError("body.messages: expected a list of messages")
        if options.system is not None and isinstance(prompt, list):
            opening = prompt[0] if prompt else None
            if not (isinstance(opening, dict) and opening.get("role") == "system"):
                job.prompt = [{"role": "system", "content": options.system}, *prompt]
        job.params = replace(params, **sampling_fields(body, kind))
    except UserError as e:
        job.error = str(e)
    return job


def last_text(prompt: Any) -> str:
    """What to show of a request: its text, or its last message's."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        content = prompt[-1].get("content")
        if isinstance(content, list):  # parts
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        return content if isinstance(content, str) else ""
    return prompt if isinstance(prompt, str) else ""


def sampling_fields(body: dict[str, Any], kind: str) -> dict[str, Any]:
    """SamplingParams' fields from a request's. Raises UserError for a field that cannot have its effect."""
    known = {kind, "logprobs", "top_logprobs", "stop", *requestfields.NUMBERS, *requestfields.INTEGERS}
    try:
        values = requestfields.effective(body, known)
    except UserError as e:
        raise UserError(f"body.{e}") from None
    for name, value in values.items():
        if name in requestfields.NUMBERS and not is_number(value):
            raise UserError(f"body.{name} is {value!r}, expected a number")
        if name in requestfields.INTEGERS and type(value) is not int:
            raise UserError(f"body.{name} is {value!r}, expected an integer")
    fields = requestfields.sampling(values)
    if "logprobs" in values or "top_logprobs" in values:
        fields |= logprob_fields(body, kind)
    if "stop" in values:
        texts = [values["stop"]] if isinstance(values["stop"], str) else values["stop"]
        if not isinstance(texts, list):
            raise UserError(f"body.stop is {texts!r}, expected a text or a list of texts")
        fields["stop"] = tuple(texts)
    return fields


def logprob_fields(body: dict[str, Any], kind: str) -> dict[str, int]:
    """How many of the likeliest tokens to name beside each: a number for completions, for chats a switch and a number.
    Raises UserError."""
    asked, top = body.get("logprobs"), body.get("top_logprobs")
    if kind == "prompt":
        if type(asked) is not int or top is not None:
            raise UserError(f"body.logprobs is {asked!r}, expected an integer, and no top_logprobs (--raw)")
        return {"logprobs": asked}
    if not isinstance(asked, bool | None) or (top is not None and type(top) is not int):
        raise UserError(f"body.logprobs is {asked!r} and top_logprobs {top!r}, expected true or false, and an integer")
    if top and not asked:
        raise UserError("body.top_logprobs needs logprobs: true")
    return {"logprobs": top or 0} if asked else {}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def check_output(output: str, source: str) -> None:
    """Raises UserError for a path that cannot be written to, or that is the input file's; writes nothing."""
    path = Path(output)
    if path.is_dir():
        raise UserError(f"--output-file {path} is a directory")
    if not path.parent.is_dir():
        raise UserError(f"--output-file {path}: no directory {path.parent}")
    if path.exists() and os.path.samefile(path, source):
        raise UserError(f"--output-file {path} is the input file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--output-file {path}: not writable")


# --------------------------------------------------------------------------------------------------------------------
# Answers to a file's prompts
# --------------------------------------------------------------------------------------------------------------------


class Records:
    """A file of one JSON object a line. Each line goes out in one write, so that whatever happens they are whole."""

    def __init__(self, path: str):
        """Raises UserError when the file cannot be opened."""
        self._path = path
        try:
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        except OSError as e:
            raise UserError(f"{path}: {e.strerror or e}") from None
        self._size = 0

    def write(self, record: dict[str, Any]) -> None:
        """Raises UserError when the disk is full, after taking back what was written of the line."""
        text = json.dumps(record, ensure_ascii=False).translate(LINE_BREAKS)
        line = text.encode("utf-8", "backslashreplace") + b"\n"  # a lone surrogate becomes its JSON escape
        left = line
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as e:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            raise UserError(f"{self._path}: {e.strerror or e}") from None
        self._size += len(line)

    def close(self) -> None:
        self._file.close()


def answer_file(engine: "Engine", jobs: list[Job], output: str | None, thinking: bool | None = None) -> int:
    """Answers every job, as many at a time as the engine takes, and puts the answers out in the order of the file.
    Returns the exit status."""
    from tqdm import tqdm

    records = None if output is None else Records(output)
    answers = [(i, choice) for i, job in enumerate(jobs) for choice in range(1 if job.error else job.params.n)]
    waiting = deque(answers)
    running: dict[tuple[int, int], Request] = {}
    finished: dict[tuple[int, int], Request] = {}
    due = made = failed = 0
    began = time.monotonic()
    often = 0.5 if sys.stderr.isatty() else 10.0  # in a log every redrawing stays
    with tqdm(total=len(answers), unit="prompt", desc="answering", mininterval=often) as bar:
        while due < len(answers):
            while waiting and len(running) < 2 * engine.scheduler.max_num_seqs:  # what comes next is always at hand
                place = waiting.popleft()
                request = submit(engine, place, jobs[place[0]], thinking)
                (running if request.finish_reason is None else finished)[place] = request
            for request in engine.step() if running else ():
                if request.finish_reason is not None:
                    place = request.id, request.choice
                    finished[place] = running.pop(place)
                    made += len(request.tokens)
            while due < len(answers) and (place := answers[due]) in finished:
                request, job = finished.pop(place), jobs[place[0]]
                failed += request.finish_reason == "error"
                bar.clear()
                show(job, request)
                if records is not None:
                    records.write(record(place[0], job, request))
                due += 1
                bar.update()
            so_far = made + sum(len(r.tokens) for r in running.values())
            bar.set_postfix_str(f"{so_far / max(time.monotonic() - began, 1e-9):.1f} tokens/s", refresh=False)
            bar.update(0)
    took = max(time.monotonic() - began, 1e-9)
    if records is not None:
        records.close()
    failures = f" ({failed} failed)" if failed else ""
    count = f"{len(jobs)} prompt{'s' * (len(jobs) > 1)}{failures}, {made} tokens"
    print(f"{count} in {took:.1f} s: {made / took:.1f} tokens/s", file=sys.stderr, flush=True)
    return 1 if failed else 0


def submit(engine: "Engine", place: tuple[int, int], job: Job, thinking: bool | None = None) -> "Request":
    """One answer to a job: `place` is its prompt's number and, of the answers to that, its own."""
    from engine.request import Request

    index, choice = place
    if job.error is not None:
        return Request(index, [], job.params, finish_reason="error", error=job.error)
    thinking = None if isinstance(job.prompt, str) else thinking
    return engine.add(job.prompt, job.params, id=index, choice=choice, thinking=thinking)


def show(job: Job, request: "Request") -> None:
    """Raises UserError when standard output cannot be written to, BrokenPipeError when nobody reads it any more."""
    said = f"Completion: {request.text}" if request.error is None else f"Error: {request.error}"
    try:
        print(f"Prompt: {job.shown}\n{said}\n", flush=True)
    except BrokenPipeError:
        raise
    except OSError as e:
        raise UserError(f"standard output: {e.strerror or e}") from None


def record(index: int, job: Job, request: "Request") -> dict[str, Any]:
    """What an output file says about one request: a thinking model's reasoning apart from its answer."""
    reasoning, answer = request.parts
    return {
        "index": index,
        **({} if job.custom_id is None else {"custom_id": job.custom_id}),
        **({"choice": request.choice} if job.params.n > 1 else {}),
        "prompt": job.shown,
        **({} if reasoning is None else {"reasoning": reasoning}),
        "completion": answer,
        "prompt_tokens": len(request.prompt),
        "tokens": request.tokens,
        **({} if job.params.logprobs is None else {"logprobs": [likelihood(entry) for entry in request.logprobs]}),
        "finish_reason": request.finish_reason,
        **({} if request.error is None else {"error": request.error}),
    }


def likelihood(entry: "Logprob") -> dict[str, Any]:
    top = [{"token": token, "logprob": value} for token, value in entry.top]
    return {"token": entry.token, "logprob": entry.logprob, "top": top}


# --------------------------------------------------------------------------------------------------------------------
# A conversation
# --------------------------------------------------------------------------------------------------------------------


def converse(engine: "Engine", params: "SamplingParams", options: argparse.Namespace) -> int:
    """Questions from the terminal (or a pipe), each answered as it streams. Returns the exit status."""
    from cli.terminal import Terminal

    assert engine.tokenizer is not None
    messages: list[dict] = []
    with Terminal(engine.tp.process.exit_on_signal) as terminal:
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
                say(f"{e}; it was left out")
                continue
            if len(ids) >= engine.max_model_len:
                whole = "it" if len(turns) == 1 or options.raw else "the conversation with it"
                say(f"that message was left out: {whole} has {len(ids)} tokens, and the context holds "
                    f"{engine.max_model_len} with the answer; /clear starts afresh")  # fmt: skip
                continue
            request = engine.add(ids, params)
            while request.finish_reason is None:
                if terminal.interrupted:
                    engine.cancel(request)
                for advanced in engine.step():
                    print(advanced.new_text, end="", flush=True)
            print(flush=True)
            if request.finish_reason == "error":
                say(f"error: {request.error}; the message was left out")
                continue
            if request.finish_reason == "length":
                full = len(ids) + len(request.tokens) >= engine.max_model_len
                say(f"the context of {engine.max_model_len} tokens is full; /clear starts afresh" if full else
                    f"stopped after {len(request.tokens)} tokens (--max-new-tokens)")  # fmt: skip
            if not options.raw:
                messages = [*turns, {"role": "assistant", "content": request.text}]
    return 0


def say(text: str) -> None:
    """A word from the program between the model's, where it cannot be taken for the model's."""
    print(f"({text})", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------------------
# Every rank
# --------------------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, tp: "Group") -> int:
    """Loads and answers; returns the exit status, the same on every rank. Raises UserError on all ranks alike."""

    def prepare() -> tuple["SamplingParams", list[Job]]:
        params = default_params(options)
        jobs = [] if options.interactive else read_jobs(options, params)
        if options.output_file is not None:
            check_output(options.output_file, options.input_file)
        return params, jobs

    thinking = False if options.no_thinking else None
    engine, prepared = cli.load(options, tp, prepare, chat=not options.raw, thinking=thinking)
    if prepared is None:
        return cli.follow(engine)
    params, jobs = prepared
    try:
        status = (
            converse(engine, params, options)
            if options.interactive
            else answer_file(engine, jobs, options.output_file, thinking)
        )
        if options.stats:
            print(engine.stats, file=sys.stderr, flush=True)
    except BrokenPipeError:
        cli.discard_output()
        status = 1
    except UserError as e:  # an output file that cannot be written further
        cli.complain(str(e))
        status = 1
    return cli.finish(engine, status)


def main() -> int:
    return cli.run_on_ranks(parse, run)


if __name__ == "__main__":
    sys.exit(main())
