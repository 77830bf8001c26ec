"""The answers' shapes in OpenAI's API, streamed and whole: from a request's token events to JSON.

A server that drafts adds `drafted` to each choice: of each token that has a text, the text and whether it was drafted.
Log-probabilities of a conversation's answer are those of the tokens whose text is content and, apart from them and
under the same name as DeepSeek's API has it, reasoning. Tokens of calls and of markers are in neither.
"""

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any, ClassVar

from engine.request import Request
from engine.sampling import Logprob
from serving.engine_thread import Answer, Update
from serving.errors import ApiError
from serving.plan import Plan, Served
from serving.schema import ChatBody, CompletionBody
from text.chat_format import ChatFormat
from text.parser import Content, Piece, Reasoning, ToolCallStart
from text.tokenizer import Tokenizer

Part = dict[str, Any]  # one entry of a chunk's `choices`


class ChatChoice:
    """One answer to a conversation."""

    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, index: int, plan: Plan, served: Served, request: Request):
        assert isinstance(plan.body, ChatBody)
        self._index, self._tokenizer, self._request = index, served.tokenizer, request
        self._parser = (plan.chat or ChatFormat()).parser(request.opens_thinking)
        self._unplaced: list[Logprob] = []  # of tokens whose text may be part of the next piece
        self._marks_drafts = served.marks_drafts
        self._has_begun = self._has_called = False

    def parts(self, update: Update) -> Iterator[Part]:
        """What an update adds to a stream."""
        if not self._has_begun:
            self._has_begun = True
            yield self._part({"role": "assistant", "content": ""})
        deltas: list[Part] = []
        for event in update.events:
            if event.logprob is not None and not event.is_control:
                self._unplaced.append(event.logprob)
            pieces = self._parser.push(event.text, event.is_control)
            self._add_deltas(deltas, pieces, event.drafted)
            if pieces or (event.text and not self._parser.is_undecided):
                self._place_logprobs(deltas, pieces)
        if update.finished:
            finish_reason = self._finish_reason  # before the parser closes a call that is open
            if pieces := self._parser.finish():
                self._add_deltas(deltas, pieces, False)
                self._place_logprobs(deltas, pieces)
            deltas.append(self._part({}, finish_reason))
            if self._request.params.logprobs is not None:  # even of no token
                deltas[-1]["logprobs"] = {"content": [], "refusal": None}
        yield from deltas

    def _part(self, delta: dict[str, Any], finish_reason: str | None = None) -> Part:
        part: Part = {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return part | {"drafted": []} if self._marks_drafts else part

    def _add_deltas(self, deltas: list[Part], pieces: list[Piece], drafted: bool) -> None:
        for piece in pieces:
            if isinstance(piece, Reasoning | Content):
                name = "content" if isinstance(piece, Content) else "reasoning_content"
                if not (deltas and name in deltas[-1]["delta"]):
                    deltas.append(self._part({name: ""}))
                deltas[-1]["delta"][name] += piece.text
                if self._marks_drafts:
                    deltas[-1]["drafted"].append((piece.text, drafted))
                continue
            self._has_called = True
            call: dict[str, Any] = {"index": piece.index}
            if isinstance(piece, ToolCallStart):
                call |= {"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": ""}}
            else:
                call |= {"function": {"arguments": piece.text}}
            deltas.append(self._part({"tool_calls": [call]}))

    def _place_logprobs(self, deltas: list[Part], pieces: list[Piece]) -> None:
        """Gives the tokens so far to the last of `deltas`, if `pieces`, which it ends with, are text."""
        unplaced, self._unplaced = self._unplaced, []
        if not unplaced or not pieces or not isinstance(pieces[-1], Reasoning | Content):
            return
        entries = [
            self._named(entry.token, entry.logprob)
            | {"top_logprobs": [self._named(token, value) for token, value in entry.top]}
            for entry in unplaced
        ]
        found = deltas[-1]["logprobs"] or {"content": [], "refusal": None}
        name = "content" if isinstance(pieces[-1], Content) else "reasoning_content"
        found[name] = found.get(name, []) + entries
        deltas[-1]["logprobs"] = found

    def _named(self, token: int, value: float) -> dict[str, Any]:
        name = self._tokenizer.name(token)
        return {"token": name.decode("utf-8", "replace"), "logprob": finite(value), "bytes": list(name)}

    @property
    def _finish_reason(self) -> str:
        assert self._request.finish_reason is not None
        is_call = self._has_called and self._request.finish_reason == "stop" and not self._parser.is_cut
        return "tool_calls" if is_call else self._request.finish_reason

    @staticmethod
    def merge(parts: list[Part]) -> dict[str, Any]:
        """The choice of an answer in one piece, from those of a stream."""
        message: dict[str, Any] = {"role": "assistant", "content": None}
        logprobs: dict[str, Any] | None = None
        for part in parts:
            if part["logprobs"] is not None:
                logprobs = logprobs or {"content": [], "refusal": None}
                for name in ("content", "reasoning_content"):
                    if found := part["logprobs"].get(name):
                        logprobs[name] = logprobs.get(name, []) + found
            for name, value in part["delta"].items():
                if name in ("content", "reasoning_content") and value:
                    message[name] = (message.get(name) or "") + value
                for call in value if name == "tool_calls" else ():
                    calls = message.setdefault("tool_calls", [])
                    if "id" in call:
                        calls.append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
                    else:
                        calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        if message["content"] is None and "tool_calls" not in message:
            message["content"] = ""
        whole: Part = {
            "index": parts[0]["index"],
            "message": message,
            "logprobs": logprobs,
            "finish_reason": parts[-1]["finish_reason"],
        }
        if "drafted" in parts[0]:
            whole["drafted"] = [token for part in parts for token in part["drafted"]]
        return whole


class CompletionChoice:
    """One continuation of a text."""

    object = chunk_object = "text_completion"
    prefix = "cmpl"

    def __init__(self, index: int, plan: Plan, served: Served, request: Request):
        assert isinstance(plan.body, CompletionBody)
        self._index, self._tokenizer, self._request = index, served.tokenizer, request
        self._marks_drafts = served.marks_drafts
        self._echo = served.tokenizer.decode(request.prompt) if plan.body.echo else None  # until it is said
        self._offset = len(self._echo or "")  # of the next event's text

    def parts(self, update: Update) -> Iterator[Part]:
        """What an update adds to a stream."""
        entries: list[tuple[Logprob | None, int, int]] = []  # with the token's id and where its text begins
        text = "".join(event.text for event in update.events)
        if self._echo is not None:
            text, self._echo = self._echo + text, None
            if self._request.params.logprobs is not None:
                entries += self._echoed()
        for event in update.events:
            if event.logprob is not None:
                entries.append((event.logprob, event.logprob.token, self._offset))
            self._offset += len(event.text)
        if text or entries or update.finished:
            part: Part = {
                "index": self._index,
                "text": text,
                "logprobs": None if self._request.params.logprobs is None else self._logprobs(entries),
                "finish_reason": self._request.finish_reason if update.finished else None,
            }
            drafted = [(event.text, event.drafted) for event in update.events if event.text]
            yield part | {"drafted": drafted} if self._marks_drafts else part

    def _echoed(self) -> Iterator[tuple[Logprob | None, int, int]]:
        offset, stream = 0, self._tokenizer.stream()
        scored = [None, *self._request.prompt_logprobs]
        for entry, token in zip(scored, self._request.prompt, strict=True):
            yield entry, token, offset
            offset += len(stream.push(token))

    def _logprobs(self, entries: list[tuple[Logprob | None, int, int]]) -> dict[str, list]:
        return {
            "tokens": [self._name(token) for _, token, _ in entries],
            "token_logprobs": [None if entry is None else finite(entry.logprob) for entry, _, _ in entries],
            "top_logprobs": [
                None if entry is None else {self._name(token): finite(value) for token, value in entry.top}
                for entry, _, _ in entries
            ],
            "text_offset": [offset for _, _, offset in entries],
        }

    def _name(self, token: int) -> str:
        return self._tokenizer.name(token).decode("utf-8", "replace")

    @staticmethod
    def merge(parts: list[Part]) -> dict[str, Any]:
        """The choice of an answer in one piece, from those of a stream."""
        whole, *rest = parts
        for part in rest:
            whole["text"] += part["text"]
            whole["finish_reason"] = part["finish_reason"]
            whole.get("drafted", []).extend(part.get("drafted", []))
            for name, values in (part["logprobs"] or {}).items():
                whole["logprobs"][name] += values
        return whole


class Reply:
    """An answer in the API's shape, whole or as server-sent events."""

    kinds: ClassVar[dict[bool, type[ChatChoice] | type[CompletionChoice]]] = {True: ChatChoice, False: CompletionChoice}

    def __init__(self, answer: Answer, served: Served):
        self._answer, self._served, self._plan = answer, served, answer.plan
        self._kind = self.kinds[answer.plan.body.is_chat]
        self._id = f"{self._kind.prefix}-{uuid.uuid4().hex}"
        self._created, self._model = int(time.time()), self._plan.body.model or served.names[0]

    async def _parts(self) -> AsyncIterator[Part]:
        """Raises ApiError where a choice fails."""
        choices: dict[int, ChatChoice | CompletionChoice] = {}
        async for index, update in self._answer.updates():
            request = self._answer.requests[index]
            if update.finished and request.finish_reason == "error":
                raise ApiError(request.error or "the answer failed", status=500, kind="server_error")
            if index not in choices:
                choices[index] = self._kind(index, self._plan, self._served, request)
            for part in choices[index].parts(update):
                yield part

    async def whole(self) -> dict[str, Any]:
        parts: dict[int, list[Part]] = {}
        async for part in self._parts():
            parts.setdefault(part["index"], []).append(part)
        choices = [self._kind.merge(parts[index]) for index in sorted(parts)]
        return self._frame(self._kind.object, choices) | {"usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        with_usage = self._plan.body.stream_options.include_usage
        try:
            async for part in self._parts():
                chunk = self._frame(self._kind.chunk_object, [part])
                yield event(chunk | ({"usage": None} if with_usage else {}))
            if with_usage:
                yield event(self._frame(self._kind.chunk_object, []) | {"usage": self._usage()})
            yield "data: [DONE]\n\n"
        except ApiError as e:  # the status has long been sent
            yield event(e.body)

    def _frame(self, object: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": object, "created": self._created, "model": self._model,
                "choices": choices}  # fmt: skip

    def _usage(self) -> dict[str, Any]:
        return usage(self._plan, self._served, self._answer.requests)


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def finite(value: float) -> float:
    """JSON has no infinity."""
    return max(value, -9999.0)


def usage(plan: Plan, served: Served, requests: list[Request]) -> dict[str, Any]:
    """In tokens, each prompt counted once."""
    first = requests[:: plan.params.n]
    prompt, hit = sum(len(r.prompt) for r in first), sum(r.n_reused for r in first)
    made = sum(len(r.tokens) for r in requests)
    reasoning = sum(reasoning_tokens(r, served.tokenizer) for r in requests) if plan.body.is_chat else 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_cache_hit_tokens": hit,
        "prompt_cache_miss_tokens": prompt - hit,
        "prompt_tokens_details": {"cached_tokens": hit},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def reasoning_tokens(request: Request, tokenizer: Tokenizer) -> int:
    """Tokens of an answer up to the one that ends its reasoning."""
    opened = request.opens_thinking or request.tokens[:1] == [tokenizer.think_open_id]
    if not opened:
        return 0
    closes = tokenizer.think_close_id
    return request.tokens.index(closes) if closes in request.tokens else len(request.tokens)
