"""From a body to token ids: what one HTTP request may ask for, and what the engine needs to answer it."""

import codecs
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pydantic_core

from core.answer_format import AnswerFormat, FormatError
from core.errors import UserError
from core.sampling_params import SamplingParams
from serving.errors import ApiError
from serving.formats import answer_format
from serving.schema import Body, ChatBody, CompletionBody, FieldError, Sampled, parse, shown
from text.chat_format import ChatFormat
from text.grammar import Grammar
from text.keyed_calls import text_parameters
from text.limits import TooLong
from text.tokenizer import NoThinkingSwitch, Tokenizer

MAX_VALUES = 1 << 20  # in one body: making Python objects of it holds all other threads up
MAX_ITEMS = {"messages": 2048, "tools": 128, "stop": 16}
MAX_NUMBERS = {"n": 16, "logprobs": 20, "top_logprobs": 20}
MAX_STOP_LENGTH = 256  # characters
COMPLETION_TOKENS = 16  # of a completion that does not say how many


@dataclass(frozen=True)
class Served:
    """The facts of a loaded engine."""

    names: list[str]  # of the model; answers are in the first, unless another was asked for
    tokenizer: Tokenizer
    context: int  # tokens of a prompt and its answer
    vocab_size: int
    defaults: SamplingParams
    tool_style: str | None  # see parser.tool_style
    marks_drafts: bool
    compile: Callable[[AnswerFormat], Grammar]
    most_answers: int = 16  # at a time, waiting ones included
    since: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True)
class Plan:
    """A request that can be run."""

    body: ChatBody | CompletionBody
    prompts: list[list[int]]
    params: SamplingParams
    chat: ChatFormat | None = None  # of a conversation
    grammar: Grammar | None = None  # of params.answer_format; see with_grammar
    asked: dict[str, Any] | None = None  # the body of /v1/responses that `body` was made of

    @property
    def choices(self) -> list[tuple[int, int]]:
        """(prompt, which of its answers) of each choice of the response."""
        return [(i, c) for i in range(len(self.prompts)) for c in range(self.params.n)]


def plan_chat(data: dict[str, Any], served: Served, asked: dict[str, Any] | None = None) -> Plan:
    """`asked`: Plan's. Raises ApiError."""
    body = read_body(ChatBody, data, served)
    prompt = encode_messages(body, served)
    try:
        format = answer_format(body)
    except FieldError as e:
        raise ApiError(str(e), e.param) from None
    params = sampling_params(body, served, [prompt], "messages", format)
    texts = text_parameters((tool.function.name, tool.function.parameters) for tool in body.tools)
    return Plan(body, [prompt], params, ChatFormat(served.tool_style, body.offers_tools, texts), asked=asked)


def encode_messages(body: ChatBody, served: Served, add_generation_prompt: bool = True) -> list[int]:
    """The prompt of a conversation. Raises ApiError."""
    if not served.tokenizer.has_chat_template:
        raise ApiError("this checkpoint has no chat template, so no conversations; /v1/completions continues texts")
    thinking, says_thinking = body.wants_thinking
    tools = [tool.given for tool in body.tools] if body.offers_tools else None
    if tools and served.tool_style is None and served.tokenizer.knows_tools:
        raise ApiError("tools are not supported: this model writes its calls in a way that is not known (known: V3's, "
                       "R1's, V3.1's, Kimi-K2's and GLM's)", "tools")  # fmt: skip
    if tools and (served.tool_style is None or not served.tokenizer.knows_tools):
        raise ApiError("tools are not supported: this checkpoint's chat template offers none to the model; a "
                       "chat_template.jinja beside its weights that does would be used instead", "tools")  # fmt: skip
    try:
        messages = [message.for_template for message in body.messages]
        return served.tokenizer.encode_chat(messages, thinking=thinking, tools=tools, most=served.context,
                                            add_generation_prompt=add_generation_prompt)  # fmt: skip
    except TooLong as e:
        raise too_long("messages", served, e.n, e.is_all) from None
    except NoThinkingSwitch as e:
        raise ApiError(str(e), says_thinking) from None
    except UserError as e:
        raise ApiError(str(e), "messages") from None


def with_grammar(plan: Plan, served: Served) -> Plan:
    """The plan of an answer that is held to a format, with its grammar, which may take a second. Raises ApiError."""
    assert plan.params.answer_format is not None
    try:
        return replace(plan, grammar=served.compile(plan.params.answer_format))
    except FormatError as e:
        raise ApiError(str(e), e.param) from None
    except UserError as e:
        raise ApiError(str(e), "response_format", status=501) from None


def plan_completion(data: dict[str, Any], served: Served) -> Plan:
    """Raises ApiError."""
    body = read_body(CompletionBody, data, served)
    if isinstance(body.prompt, str):
        asked: Sequence[str | list[int]] = [body.prompt]
    elif body.prompt and isinstance(body.prompt[0], int):
        asked = [body.prompt]  # type: ignore[list-item]
    else:
        asked = body.prompt  # type: ignore[assignment]
    if not 1 <= len(asked) * max(body.n, 1) <= served.most_answers:
        raise ApiError(f"prompt and n ask for {len(asked) * body.n} answers, expected from 1 to {served.most_answers}",
                       "prompt")  # fmt: skip
    if body.suffix:
        if body.echo:
            raise ApiError("echo cannot be had with suffix: what is asked for is not behind the prompt", "echo")
        if not all(isinstance(prompt, str) for prompt in asked):
            raise ApiError("suffix needs a prompt that is text", "suffix")
    try:
        prompts = [encode(prompt, body.suffix, served) if isinstance(prompt, str) else prompt for prompt in asked]
    except TooLong as e:
        raise too_long("prompt", served, e.n, e.is_all) from None
    except UserError as e:
        raise ApiError(str(e), "suffix" if body.suffix else "prompt") from None
    for ids in prompts:
        wrong = next((t for t in ids if not 0 <= t < served.vocab_size), None)
        if wrong is not None:
            raise ApiError(f"token id {shown(wrong)} is not in the vocabulary of {served.vocab_size}", "prompt")
        if not ids:
            raise ApiError("a prompt is empty", "prompt")
    return Plan(body, prompts, sampling_params(body, served, prompts, "prompt"))


def encode(prompt: str, suffix: str | None, served: Served) -> list[int]:
    """A text to go on with, or one to fill in before a suffix. Raises as the tokenizer does."""
    if suffix:
        return served.tokenizer.encode_infill(prompt, suffix, served.context)
    return served.tokenizer.encode_text(prompt, served.context)


def read_json(raw: bytes | bytearray) -> dict[str, Any]:
    """The JSON object that a body is. Raises ApiError."""
    if sum(map(raw.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ApiError(f"the body has more than {MAX_VALUES} values", status=413)
    try:
        data = pydantic_core.from_json(raw.removeprefix(codecs.BOM_UTF8), allow_inf_nan=False)
    except ValueError as e:
        raise ApiError(f"the body is not JSON that can be read: {e}") from None
    if not isinstance(data, dict):
        raise ApiError("the body is not a JSON object")
    return data


def read_body(kind: type[Body], data: dict[str, Any], served: Served) -> Body:
    """Raises ApiError, naming the field."""
    check_size(data)
    try:
        body = parse(kind, data)
    except FieldError as e:
        raise ApiError(str(e), e.param or None) from None
    check_model(body.model, served)
    return body


def check_model(asked: str | None, served: Served) -> None:
    """Raises ApiError for a name that is none of the model's."""
    if asked and asked not in served.names:
        known = " or ".join(map(shown, served.names))
        raise ApiError(f"there is no model {shown(asked)}, only {known}", "model", status=404, code="model_not_found")


def check_size(data: dict[str, Any]) -> None:
    """Raises ApiError for more than one client may ask for. What has another type is left to the schema."""
    for name, most in MAX_ITEMS.items():
        if isinstance(value := data.get(name), list) and len(value) > most:
            raise ApiError(f"{name} has {len(value)} items, expected at most {most} items", name)
    for name, most in MAX_NUMBERS.items():
        if type(value := data.get(name)) is int and value > most:
            raise ApiError(f"{name} is {shown(value)}, expected at most {most}", name)
    stops = data.get("stop")
    for i, text in enumerate(stops if isinstance(stops, list) else [stops]):
        if isinstance(text, str) and len(text) > MAX_STOP_LENGTH:
            name = f"stop.{i}" if isinstance(stops, list) else "stop"
            raise ApiError(f"{name} has {len(text)} characters, expected at most {MAX_STOP_LENGTH} characters", name)


def too_long(source: str, served: Served, n: int, is_all: bool = True) -> ApiError:
    """The refusal of a prompt of `n` tokens or, unless that is all, more. Clients shorten a conversation when they find
    its code, LangChain in the message, or OpenAI's words "maximum context length is … tokens", "resulted in …"."""
    code, more = "context_length_exceeded", "" if is_all else " or more"
    return ApiError(f"This model's maximum context length is {served.context} tokens, of the prompt and its answer "
                    f"together. Your {source} resulted in {n} tokens{more} ({code}).", source, code=code)  # fmt: skip


def sampling_params(
    body: Sampled, served: Served, prompts: list[list[int]], source: str, format: AnswerFormat | None = None
) -> SamplingParams:
    """As the body says, else as the checkpoint's generation_config.json does. `source` names the prompt's field."""
    if (longest := max(map(len, prompts))) >= served.context:
        raise too_long(source, served, longest)
    fields, name = body.sampling, body.max_tokens_field
    least = 1 if fields.get("prompt_logprobs") is None else 0
    if not least <= fields.get("max_new_tokens", 1) <= served.context:
        raise ApiError(f"{name} is {shown(fields['max_new_tokens'])}, expected from {least} to {served.context}", name)
    fields.setdefault("seed", secrets.randbits(63))
    fields.setdefault("max_new_tokens", served.context - min(map(len, prompts)) if body.is_chat else COMPLETION_TOKENS)
    try:
        params = replace(served.defaults, **fields, answer_format=format)
        params.check_vocabulary(served.vocab_size)
    except UserError as e:
        raise ApiError(str(e), str(e).split()[0].rstrip(":")) from None
    return params
