"""Batches: prompts from a file, answers to standard output and to a file of one JSON object a line."""

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

from core.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import: a mistyped flag is answered without it
    from core.sampling_params import SamplingParams
    from engine.engine import Engine
    from engine.request import Prompt, Request
    from engine.sampling import Logprob

LINE_BREAKS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}  # to some readers; JSON allows them bare


# --------------------------------------------------------------------------------------------------------------------
# Prompts
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class BatchItem:
    """One prompt of the input file."""

    shown: str  # as it is printed
    prompt: "Prompt"
    params: "SamplingParams"
    custom_id: str | None = None
    error: str | None = None  # why it cannot be answered
    thinking: bool | None = None  # whether its body asks for thinking; None: it does not say


def read_items(options: argparse.Namespace, params: "SamplingParams") -> list[BatchItem]:
    """Raises UserError when the file is unreadable, not UTF-8, without prompts, or .jsonl with an unusable line."""
    path = Path(options.input_file)
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}") from None
    items, seen = [], dict[str, int]()
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = line.decode().removesuffix("\r")
        except UnicodeDecodeError as e:
            raise UserError(f"{path}: line {number} is not UTF-8 (byte 0x{line[e.start]:02x})") from None
        if not text.strip():
            continue
        if path.suffix.lower() != ".jsonl":
            items.append(BatchItem(text, text if options.raw else conversation(options.system, text), params))
            continue
        item = read_request(text, f"{path}: line {number}", options, params)
        if item.custom_id is not None and seen.setdefault(item.custom_id, number) != number:
            first = seen[item.custom_id]
            raise UserError(f"{path}: line {number} has the custom_id of line {first}, {item.custom_id!r}")
        items.append(item)
    if not items:
        raise UserError(f"{path}: no prompts in it" + (", only blank lines" if raw else ", it is empty"))
    return items


def conversation(system: str | None, text: str) -> list[dict]:
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": text}]


def read_request(text: str, where: str, options: argparse.Namespace, params: "SamplingParams") -> BatchItem:
    """A line of the OpenAI batch format. Raises UserError for anything else; a body that the schema refuses, or that
    asks for what files do not offer, fails its own request alone."""
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
    prompt = body.get("prompt" if options.raw else "messages")
    item = BatchItem(last_text(prompt), "", params, name)
    try:
        item.prompt, fields, item.thinking = read_body(body, options)
        item.params = replace(params, **fields)
    except UserError as e:
        item.error = str(e)
    return item


def read_body(body: dict[str, Any], options: argparse.Namespace) -> tuple["Prompt", dict[str, Any], bool | None]:
    """The prompt, the fields of SamplingParams that the body sets, and whether it asks for thinking. Raises
    UserError."""
    from serving import schema  # with pydantic, which plain text does without
    from serving.formats import answer_format

    if options.raw and body.get("prompt") is None:
        raise UserError("body.prompt is missing (--raw completes text)")
    body = {name: value for name, value in body.items() if name not in schema.SERVER_ONLY}
    parsed: schema.ChatBody | schema.CompletionBody
    try:
        parsed = schema.parse(schema.CompletionBody, body) if options.raw else schema.parse(schema.ChatBody, body)
    except schema.FieldError as e:
        raise UserError(f"body.{e}" if e.param else str(e)) from None
    given = parsed.given
    for field in ("tools", "echo", "suffix"):  # which only the server implements
        if given.get(field):
            raise UserError(f"body.{field} is not supported with the value {schema.shown(given[field])}")
    if isinstance(parsed, schema.CompletionBody):
        if not isinstance(parsed.prompt, str) and not are_ids(parsed.prompt):
            raise UserError(f"body.prompt is {schema.shown(parsed.prompt)}: expected a string or a list of token ids")
        return parsed.prompt, parsed.sampling, None  # type: ignore[return-value]  # no list of texts
    messages = [message.for_template for message in parsed.messages]
    if options.system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": options.system}, *messages]
    fields = parsed.sampling | {"answer_format": answer_format(parsed)}
    return messages, fields, parsed.wants_thinking[0]


def are_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(type(token) is int for token in prompt)


def last_text(prompt: Any) -> str:
    """What to show of a request: its text, its last message's, or its token ids, whose text only the engine knows."""
    if are_ids(prompt):
        return json.dumps(prompt)
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        content = prompt[-1].get("content")
        if isinstance(content, list):  # parts
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        return content if isinstance(content, str) else ""
    return prompt if isinstance(prompt, str) else ""


# --------------------------------------------------------------------------------------------------------------------
# Answers
# --------------------------------------------------------------------------------------------------------------------


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


class Records:
    """A file of one JSON object a line. Each line is written at once, so that an interrupted run leaves whole lines."""

    def __init__(self, path: str):
        """Raises UserError when the file cannot be opened."""
        self._path = path
        try:
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        except OSError as e:
            raise UserError(f"{path}: {e.strerror or e}") from None
        self._size = 0

    def write(self, record: dict[str, Any]) -> None:
        """Raises UserError when the disk is full, after removing the incomplete line."""
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


def answer_file(engine: "Engine", items: list[BatchItem], output: str | None, thinking: bool | None = None) -> int:
    """Answers every item, as many at a time as the engine takes, and puts the answers out in the order of the file.
    Returns the exit status."""
    from tqdm import tqdm

    records = None if output is None else Records(output)
    answers = [(i, choice) for i, item in enumerate(items) for choice in range(1 if item.error else item.params.n)]
    waiting = deque(answers)
    running: dict[tuple[int, int], Request] = {}
    finished: dict[tuple[int, int], Request] = {}
    due = made = failed = 0
    began = time.monotonic()
    often = 0.5 if sys.stderr.isatty() else 10.0  # in a log every redrawing stays
    with tqdm(total=len(answers), unit="prompt", desc="answering", mininterval=often) as bar:
        while due < len(answers):
            while waiting and len(running) < 2 * engine.max_num_seqs:  # the engine never waits for a prompt
                key = waiting.popleft()
                request = submit(engine, *key, items[key[0]], thinking)
                (running if request.finish_reason is None else finished)[key] = request
            for request in engine.step() if running else ():
                if request.finish_reason is not None:
                    key = request.id, request.choice
                    finished[key] = running.pop(key)
                    made += len(request.tokens)
            while due < len(answers) and (key := answers[due]) in finished:
                request, item = finished.pop(key), items[key[0]]
                failed += request.finish_reason == "error"
                bar.clear()
                show(item, request)
                if records is not None:
                    records.write(record(key[0], item, request))
                due += 1
                bar.update()
            so_far = made + sum(len(r.tokens) for r in running.values())
            bar.set_postfix_str(f"{so_far / max(time.monotonic() - began, 1e-9):.1f} tokens/s", refresh=False)
            bar.update(0)
    took = max(time.monotonic() - began, 1e-9)
    if records is not None:
        records.close()
    failures = f" ({failed} failed)" if failed else ""
    count = f"{len(items)} prompt{'s' * (len(items) > 1)}{failures}, {made} tokens"
    print(f"{count} in {took:.1f} s: {made / took:.1f} tokens/s", file=sys.stderr, flush=True)
    return 1 if failed else 0


def submit(engine: "Engine", index: int, choice: int, item: BatchItem, thinking: bool | None = None) -> "Request":
    """The item at `index`, as the request for its answer number `choice`."""
    from engine.request import Request

    if item.error is not None:
        return Request(index, [], item.params, finish_reason="error", error=item.error)
    thinking = None if isinstance(item.prompt, str) else thinking if item.thinking is None else item.thinking
    request = engine.add(item.prompt, item.params, id=index, choice=choice, thinking=thinking)
    if are_ids(item.prompt) and request.error is None:
        assert engine.tokenizer is not None
        item.shown = engine.tokenizer.decode(request.prompt)
    return request


def show(item: BatchItem, request: "Request") -> None:
    """Raises UserError when standard output cannot be written to, BrokenPipeError when nobody reads it any more."""
    said = f"Completion: {request.text}" if request.error is None else f"Error: {request.error}"
    try:
        print(f"Prompt: {item.shown}\n{said}\n", flush=True)
    except BrokenPipeError:
        raise
    except OSError as e:
        raise UserError(f"standard output: {e.strerror or e}") from None


def record(index: int, item: BatchItem, request: "Request") -> dict[str, Any]:
    """The output file's line for one request, with a thinking model's reasoning apart from its answer."""
    reasoning, answer = request.parts
    logprobs = {"logprobs": [likelihood(entry) for entry in request.logprobs]}
    return {
        "index": index,
        **({} if item.custom_id is None else {"custom_id": item.custom_id}),
        **({"choice": request.choice} if item.params.n > 1 else {}),
        "prompt": item.shown,
        **({} if reasoning is None else {"reasoning": reasoning}),
        "completion": answer,
        "prompt_tokens": len(request.prompt),
        "tokens": request.tokens,
        **({} if item.params.logprobs is None else logprobs),
        "finish_reason": request.finish_reason,
        **({} if request.error is None else {"error": request.error}),
    }


def likelihood(entry: "Logprob") -> dict[str, Any]:
    top = [{"token": token, "logprob": value} for token, value in entry.top]
    return {"token": entry.token, "logprob": entry.logprob, "top": top}
