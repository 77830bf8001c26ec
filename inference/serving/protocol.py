"""OpenAI's API as data: what a request may say, and the answers' shapes. Nothing of HTTP, and no engine is run here.

`read_chat` and `read_completion` turn a body into a Plan: prompts as token ids, how to sample, and what the client
wants to see. ChatChoice and CompletionChoice turn what the engine then says into an answer, streamed or whole.
"""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from core.errors import UserError
from core.sampling_params import SamplingParams
from engine.request import Request, TokenEvent
from engine.sampling import Logprob
from serving import requestfields
from serving.requestfields import shown
from text.parser import ChatParser, Content, Piece, Reasoning, ToolCallStart
from text.tokenizer import Tokenizer, TooLong

VALUES = 1 << 20  # in one body: what makes Python objects of it holds all other threads up
FIELDS = 64  # of one object that has a schema
MESSAGES, CHOICES, LIKELIEST = 2048, 16, 20
STOPS, STOP_LENGTH = 16, 256
TOOLS = 128
LEGACY_TOKENS = 16  # of a completion that does not say how many


class Refused(Exception):
    """A request that is not answered, as the client is told it."""

    def __init__(
        self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None,
        kind: str = "invalid_request_error", headers: dict[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.param, self.status, self.code, self.kind, self.headers = param, status, code, kind, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


# --------------------------------------------------------------------------------------------------------------------
# The schema
# --------------------------------------------------------------------------------------------------------------------


class Schema(BaseModel):
    """Types are exact, what is null counts as absent, and what is unknown is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _present(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if len(value) > FIELDS:
            raise ValueError(f"has {len(value)} fields, at most {FIELDS} are read")
        return {name: entry for name, entry in value.items() if entry is not None}

    @property
    def given(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True)


Text = str
Ids = Annotated[list[int], Field(fail_fast=True)]


class TextPart(Schema):
    type: Literal["text"]
    text: str


class Function(Schema):
    name: str
    arguments: str


class ToolCall(Schema):
    id: str = ""
    type: Literal["function"]
    function: Function
    index: int = 0  # streams carry it, and clients send it back


class Message(Schema):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str = ""
    reasoning_content: str = ""
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=TOOLS)] = []
    tool_call_id: str = ""
    annotations: Annotated[list[Any], Field(max_length=0)] = []  # clients send an answer back whole

    @property
    def for_template(self) -> dict[str, Any]:
        left = {name: value for name, value in self.given.items() if name == "content" or value not in ("", [])}
        return {"role": self.role, "content": None} | left


class Definition(Schema):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: Literal[False] = False


class Tool(Schema):
    type: Literal["function"]
    function: Definition


class StreamOptions(Schema):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class TemplateSwitches(Schema):
    thinking: bool | None = None
    enable_thinking: bool | None = None


class Sampled(Schema):
    """What both kinds of request have in common. The numbers' ranges are SamplingParams'."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES)] = 1
    stop: Annotated[str, Field(max_length=STOP_LENGTH)] | Annotated[
        list[Annotated[str, Field(max_length=STOP_LENGTH)]], Field(fail_fast=True, max_length=STOPS)
    ] = []  # fmt: skip
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    chat: ClassVar[bool]


class ChatBody(Sampled):
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=LIKELIEST)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=TOOLS)] = []
    tool_choice: Literal["none", "auto"] = "auto"
    chat_template_kwargs: TemplateSwitches = TemplateSwitches()

    chat = True


class CompletionBody(Sampled):
    prompt: Text | Ids | Annotated[list[Text], Field(fail_fast=True)] | Annotated[list[Ids], Field(fail_fast=True)]
    logprobs: Annotated[int, Field(ge=0, le=LIKELIEST)] | None = None
    echo: bool = False

    chat = False


Body = TypeVar("Body", ChatBody, CompletionBody)


def parsed(kind: type[Body], raw: bytes | bytearray) -> Body:
    """Raises Refused, naming the field."""
    if sum(map(raw.count, (b",", b"[", b"{"))) > VALUES:
        raise Refused(f"the body has more than {VALUES} values", status=413)
    try:
        data = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as e:
        raise Refused(f"the body is not JSON that can be read: {e}") from None
    if not isinstance(data, dict):
        raise Refused("the body is not a JSON object")
    try:
        data = requestfields.effective(data, kind.model_fields)
    except UserError as e:
        raise Refused(str(e), str(e).split()[0]) from None
    try:
        return kind.model_validate(data)
    except ValidationError as e:
        problems = [(problem(error, data), error["type"]) for error in e.errors(include_url=False)]
    # Of what a field may be, the errors of that which came furthest, and of these one about more than the type.
    (path, said), _ = max(problems, key=lambda found: (len(found[0][0]), not found[1].endswith("_type")))
    raise Refused(f"{'.'.join(path)} {said}", ".".join(path))


def problem(error: Any, data: Any) -> tuple[list[str], str]:
    """Where in the body, and what is wrong there. (pydantic's own paths name types of unions as well.)"""
    path: list[str] = []
    for part in error["loc"]:
        inside = part in data if isinstance(data, dict) else isinstance(data, list) and isinstance(part, int)
        if inside:
            data = data[part]
            path.append(str(part))
        elif error["type"] == "missing" and part == error["loc"][-1] and isinstance(data, dict):
            return [*path, str(part)], "is missing"
    if error["type"] == "extra_forbidden":
        return path, "is not supported"
    said = error["msg"].replace("Input should be ", "expected ").removeprefix("Value error, ")
    return path, said if said.startswith("has ") else f"is {shown(data)}: {said}"


# --------------------------------------------------------------------------------------------------------------------
# From a body to token ids
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """What has to be known of a loaded engine."""

    name: str
    tokenizer: Tokenizer
    context: int  # tokens of a prompt and its answer
    vocab_size: int
    defaults: SamplingParams
    tool_style: str | None  # see chat.tool_style
    marks_drafts: bool
    since: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True)
class Plan:
    """A request that can be run."""

    body: ChatBody | CompletionBody
    prompts: list[list[int]]
    params: SamplingParams

    @property
    def choices(self) -> list[tuple[int, int]]:
        """(prompt, which of its answers) of each choice of the response."""
        return [(i, c) for i in range(len(self.prompts)) for c in range(self.params.n)]


def read_chat(raw: bytes | bytearray, served: Served) -> Plan:
    """Raises Refused."""
    body = parsed(ChatBody, raw)
    check_model(body, served)
    if not served.tokenizer.has_chat_template:
        raise Refused("this checkpoint has no chat template, so no conversations; /v1/completions continues texts")
    thinking, enabled = body.chat_template_kwargs.thinking, body.chat_template_kwargs.enable_thinking
    if thinking is not None and enabled is not None and thinking != enabled:
        raise Refused("thinking and enable_thinking contradict each other", "chat_template_kwargs")
    thinking = enabled if thinking is None else thinking
    if thinking is not None and not served.tokenizer.has_thinking_switch:
        raise Refused("this checkpoint's chat template does not let thinking be switched on or off",
                      "chat_template_kwargs")  # fmt: skip
    tools = [tool.given for tool in body.tools] if offers_tools(body) else None
    if tools and (served.tool_style is None or not served.tokenizer.knows_tools):
        raise Refused("tools are not supported: this checkpoint's chat template offers none to the model; a "
                      "chat_template.jinja beside its weights that does would be used instead", "tools")  # fmt: skip
    if body.top_logprobs is not None and not body.logprobs:
        raise Refused("top_logprobs needs logprobs: true", "top_logprobs")
    try:
        messages = [message.for_template for message in body.messages]
        prompt = served.tokenizer.encode_chat(messages, thinking=thinking, tools=tools, most=served.context)
    except TooLong:
        raise too_long("messages", served) from None
    except UserError as e:
        raise Refused(str(e), "messages") from None
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return Plan(body, [prompt], sampling_params(body, served, [prompt], name, "messages", logprobs))


def read_completion(raw: bytes | bytearray, served: Served) -> Plan:
    """Raises Refused."""
    body = parsed(CompletionBody, raw)
    check_model(body, served)
    if isinstance(body.prompt, str):
        asked: Sequence[str | list[int]] = [body.prompt]
    elif body.prompt and isinstance(body.prompt[0], int):
        asked = [body.prompt]  # type: ignore[list-item]
    else:
        asked = body.prompt  # type: ignore[assignment]
    if not 1 <= len(asked) * body.n <= CHOICES:
        raise Refused(f"prompt and n ask for {len(asked) * body.n} answers, expected from 1 to {CHOICES}", "prompt")
    try:
        prompts = [served.tokenizer.encode_text(p, served.context) if isinstance(p, str) else p for p in asked]
    except TooLong:
        raise too_long("prompt", served) from None
    except UserError as e:
        raise Refused(str(e), "prompt") from None
    for ids in prompts:
        wrong = next((t for t in ids if not 0 <= t < served.vocab_size), None)
        if wrong is not None:
            raise Refused(f"token id {shown(wrong)} is not in the vocabulary of {served.vocab_size}", "prompt")
        if not ids:
            raise Refused("a prompt is empty", "prompt")
    params = sampling_params(body, served, prompts, "max_tokens", "prompt", body.logprobs)
    return Plan(body, prompts, replace(params, prompt_logprobs=body.logprobs if body.echo else None))


def too_long(source: str, served: Served) -> Refused:
    return Refused(f"{source} leaves no room for an answer in the context of {served.context} tokens", source,
                   code="context_length_exceeded")  # fmt: skip


def offers_tools(body: ChatBody) -> bool:
    return bool(body.tools) and body.tool_choice == "auto"


def check_model(body: Sampled, served: Served) -> None:
    if body.model not in (None, "", served.name):
        raise Refused(f"there is no model {shown(body.model)}, only {served.name!r}", "model", status=404,
                      code="model_not_found")  # fmt: skip


def sampling_params(
    body: Sampled, served: Served, prompts: list[list[int]], length: str, source: str, logprobs: int | None
) -> SamplingParams:
    """As the body says, else as the checkpoint's generation_config.json does. `length` and `source` name the fields for
    the answer's length and the prompt."""
    if max(map(len, prompts)) >= served.context:
        raise too_long(source, served)
    values = body.given
    asked = values.get(length)
    if asked is not None and not 1 <= asked <= served.context:
        raise Refused(f"{length} is {shown(asked)}, expected from 1 to {served.context}", length)
    fields = requestfields.sampling(values) | {"stop": (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)}
    fields.setdefault("seed", secrets.randbits(63))
    fields.setdefault("max_new_tokens", served.context - min(map(len, prompts)) if body.chat else LEGACY_TOKENS)
    try:
        return replace(served.defaults, **fields, logprobs=logprobs)
    except UserError as e:
        raise Refused(str(e), str(e).split()[0]) from None


# --------------------------------------------------------------------------------------------------------------------
# From the engine's text to answers
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Update:
    """What the engine has said since the last one."""

    events: list[TokenEvent] = field(default_factory=list)
    finished: bool = False
    size: int = 0  # about how many characters a client would be sent

    def __post_init__(self) -> None:
        self.size += sum(len(e.text) + (0 if e.logprob is None else 64 * (1 + len(e.logprob.top))) for e in self.events)

    def add(self, later: "Update") -> None:
        self.events += later.events
        self.finished |= later.finished
        self.size += later.size


@dataclass
class Delta:
    """A part of a message, of one kind, with the tokens that made its text."""

    fields: dict[str, Any]
    drafted: list[tuple[str, bool]] = field(default_factory=list)


class ChatChoice:
    """One answer to a conversation."""

    def __init__(self, plan: Plan, served: Served, request: Request):
        assert isinstance(plan.body, ChatBody)
        self._tokenizer = served.tokenizer
        self._request = request
        self._parser = ChatParser(served.tool_style, request.opens_thinking, offers_tools(plan.body))
        self.called = False

    def take(self, update: Update) -> list[Delta]:
        """What an update adds to the message."""
        deltas: list[Delta] = []
        for event in update.events:
            self._add(deltas, self._parser.push(event.text, event.is_control), event.drafted)
        if update.finished:
            self._add(deltas, self._parser.finish(), False)
        return deltas

    def _add(self, deltas: list[Delta], pieces: list[Piece], drafted: bool) -> None:
        for piece in pieces:
            if isinstance(piece, Reasoning | Content):
                name = "content" if isinstance(piece, Content) else "reasoning_content"
                if not (deltas and name in deltas[-1].fields):
                    deltas.append(Delta({name: ""}))
                deltas[-1].fields[name] += piece.text
                deltas[-1].drafted.append((piece.text, drafted))
                continue
            self.called = True
            call: dict[str, Any] = {"index": piece.index}
            if isinstance(piece, ToolCallStart):
                call |= {"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": ""}}
            else:
                call |= {"function": {"arguments": piece.text}}
            deltas.append(Delta({"tool_calls": [call]}))

    def logprobs(self, update: Update) -> dict[str, Any] | None:
        if self._request.params.logprobs is None:
            return None
        entries = [self._likelihood(e.logprob) for e in update.events if e.logprob is not None]
        return {"content": entries, "refusal": None}

    def _likelihood(self, entry: Logprob) -> dict[str, Any]:
        top = [self._named(token, value) for token, value in entry.top]
        return self._named(entry.token, entry.logprob) | {"top_logprobs": top}

    def _named(self, token: int, value: float) -> dict[str, Any]:
        spelled = self._tokenizer.name(token)
        return {"token": spelled.decode("utf-8", "replace"), "logprob": finite(value), "bytes": list(spelled)}

    @property
    def finish_reason(self) -> str:
        assert self._request.finish_reason is not None
        return "tool_calls" if self.called and self._request.finish_reason == "stop" else self._request.finish_reason


def message(deltas: list[Delta]) -> dict[str, Any]:
    """The whole message that deltas make up."""
    whole: dict[str, Any] = {"role": "assistant", "content": None}
    for delta in deltas:
        for name, value in delta.fields.items():
            if name != "tool_calls":
                whole[name] = (whole.get(name) or "") + value
                continue
            calls = whole.setdefault("tool_calls", [])
            for call in value:
                if "id" in call:
                    calls.append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
                else:
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    if whole["content"] is None and "tool_calls" not in whole:
        whole["content"] = ""
    return whole


class CompletionChoice:
    """One continuation of a text."""

    def __init__(self, plan: Plan, served: Served, request: Request):
        assert isinstance(plan.body, CompletionBody)
        self._tokenizer = served.tokenizer
        self._request = request
        self._echo = served.tokenizer.decode(request.prompt) if plan.body.echo else ""
        self._begun = not plan.body.echo
        self._at = len(self._echo)  # where the next event's text begins

    def take(self, update: Update) -> tuple[str, dict[str, Any] | None]:
        """The text that an update adds, and its log-probabilities."""
        text = "".join(event.text for event in update.events)
        first, self._begun = not self._begun, True
        if first:
            text = self._echo + text
        if self._request.params.logprobs is None:
            return text, None
        entries: list[tuple[Logprob | None, int, int]] = []  # token, its id, its place
        if first:
            at, stream = 0, self._tokenizer.stream()
            scored = [None, *self._request.prompt_logprobs]
            for entry, token in zip(scored, self._request.prompt, strict=True):
                entries.append((entry, token, at))
                at += len(stream.push(token))
        for event in update.events:
            if event.logprob is not None:
                entries.append((event.logprob, event.logprob.token, self._at))
            self._at += len(event.text)
        return text, {
            "tokens": [self._spelled(token) for _, token, _ in entries],
            "token_logprobs": [None if entry is None else finite(entry.logprob) for entry, _, _ in entries],
            "top_logprobs": [
                None if entry is None else {self._spelled(token): finite(value) for token, value in entry.top}
                for entry, _, _ in entries
            ],
            "text_offset": [at for _, _, at in entries],
        }

    def _spelled(self, token: int) -> str:
        return self._tokenizer.name(token).decode("utf-8", "replace")

    @property
    def finish_reason(self) -> str:
        assert self._request.finish_reason is not None
        return self._request.finish_reason


def finite(value: float) -> float:
    """JSON has no infinity."""
    return max(value, -9999.0)


def usage(plan: Plan, served: Served, requests: list[Request]) -> dict[str, Any]:
    """In tokens, each prompt counted once."""
    first = requests[:: plan.params.n]
    prompt, hit = sum(len(r.prompt) for r in first), sum(r.n_reused for r in first)
    made = sum(len(r.tokens) for r in requests)
    reasoning = sum(reasoning_tokens(r, served.tokenizer) for r in requests) if plan.body.chat else 0
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
