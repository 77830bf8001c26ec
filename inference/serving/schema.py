"""What a request may say, in OpenAI's format: the one schema of .jsonl files and HTTP bodies.

Types are exact, a field that is null counts as absent, and a field that would change the answer and is not implemented
is refused by name, at any depth: to leave it out silently would be to answer another question. `accepted` lists those
that change nothing. The ranges of sampling parameters are SamplingParams' own.
"""

import json
import re
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from core.errors import UserError
from serving.accepted import OFF_NAMES, changes_nothing

MAX_FIELDS = 64  # of one object
MAX_BIASES = 1024
SERVER_ONLY = ("model", "stream", "stream_options")  # without effect in a file of requests
# What each effort means to a template that has thinking on or off.
EFFORTS = {"none": False, "minimal": False, "low": True, "medium": True, "high": True, "xhigh": True, "max": True}
THINKING = {"enabled": True, "disabled": False, "auto": None, "adaptive": None}
JSON_TYPES = {  # by pydantic's type of error, which speaks of Python's
    "string_type": "a string", "int_type": "an integer", "int_from_float": "an integer", "float_type": "a number",
    "bool_type": "true or false", "list_type": "an array", "dict_type": "an object", "model_type": "an object",
    "string_too_short": "a string that is not empty",
}  # fmt: skip


class FieldError(UserError):
    """A request's field that cannot be read: `param` is its path, such as messages.0.role."""

    def __init__(self, param: str, says: str):
        super().__init__(f"{param or 'the body'} {says}")
        self.param = param


class Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    kind: ClassVar[str] = ""  # among `accepted`'s; "": no other field is

    @model_validator(mode="before")
    @classmethod
    def _drop_what_changes_nothing(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = {name: entry for name, entry in value.items() if entry is not None and not cls._is_idle(name, entry)}
        if len(value) > MAX_FIELDS:
            raise ValueError(f"has {len(value)} fields, at most {MAX_FIELDS} are read")
        return value

    @classmethod
    def _is_idle(cls, name: str, entry: Any) -> bool:
        return name not in cls.model_fields and cls.kind != "" and changes_nothing(cls.kind, name, entry)

    @property
    def given(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True)


class TextPart(Schema):
    kind = "part"

    type: Literal["text"]
    text: str


class Function(Schema):
    kind = "call"

    name: str
    arguments: str | dict[str, Any]  # some templates want it parsed


class ToolCall(Schema):
    kind = "call"

    id: str = ""
    type: Literal["function"]
    function: Function
    index: int = 0  # streams carry it, and clients send it back


class Message(Schema):
    kind = "message"

    role: Literal["system", "user", "assistant", "tool", "developer"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str = ""
    reasoning_content: str = ""
    reasoning: str = ""  # as some servers call it
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=128)] = []
    tool_call_id: str = ""
    prefix: bool = False  # of an assistant's message that is last: the model goes on with it

    @property
    def for_template(self) -> dict[str, Any]:
        left = {name: value for name, value in self.given.items() if name == "content" or value not in ("", [], False)}
        role = "system" if self.role == "developer" else self.role  # OpenAI's newer name
        return {"content": None} | left | {"role": role}


class Definition(Schema):
    kind = "tool"

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool = False


class Tool(Schema):
    kind = "tool"

    type: Literal["function"]
    function: Definition


class ChosenFunction(Schema):
    name: str


class NamedChoice(Schema):
    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(Schema):
    name: str = ""
    description: str = ""
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool = False  # schemas are followed either way


class ResponseFormat(Schema):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class StreamOptions(Schema):
    kind = "stream_options"

    include_usage: bool = False


class TemplateSwitches(Schema):
    thinking: bool | None = None
    enable_thinking: bool | None = None


NotEmpty = Annotated[str, Field(min_length=1)]


class Thinking(Schema):
    type: Literal["enabled", "disabled", "auto", "adaptive"]


class Sampled(Schema):
    """What chats and completions have in common."""

    kind = "body"

    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    n: int = 1
    stop: NotEmpty | Annotated[list[NotEmpty], Field(fail_fast=True)] = []
    logit_bias: dict[str, float] = {}
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    is_chat: ClassVar[bool]

    @field_validator("logit_bias")
    @classmethod
    def _by_token(cls, value: dict[str, float]) -> dict[str, float]:
        if len(value) > MAX_BIASES:
            raise ValueError(f"has {len(value)} fields, at most {MAX_BIASES} are read")
        for token, bias in value.items():
            if not re.fullmatch("0|[1-9][0-9]{0,8}", token) or abs(bias) > 100:
                raise ValueError(f"has {shown(token)}: {bias:g}, expected token ids with numbers from -100 to 100")
        return value

    @property
    def n_logprobs(self) -> int | None:
        """How many of the likeliest tokens are named beside each; None for no log-probabilities."""
        raise NotImplementedError

    @property
    def max_tokens_field(self) -> str:
        """The field that limits the answer: of the two names the newer one, where both are given."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of SamplingParams that the request sets."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                 "frequency_penalty", "seed", "n")  # fmt: skip
        fields = {name: getattr(self, name) for name in names if name in self.model_fields_set}
        if (most := getattr(self, self.max_tokens_field)) is not None:
            fields["max_new_tokens"] = most
        if "stop" in self.model_fields_set:
            fields["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.logit_bias:
            fields["logit_bias"] = tuple((int(token), bias) for token, bias in self.logit_bias.items())
        return fields if self.n_logprobs is None else fields | {"logprobs": self.n_logprobs}


class ChatBody(Sampled):
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] = []
    tool_choice: Literal["none", "auto", "required"] | NamedChoice = "auto"
    parallel_tool_calls: bool = True
    response_format: ResponseFormat = ResponseFormat()
    chat_template_kwargs: TemplateSwitches = TemplateSwitches()
    thinking: Thinking | None = None
    enable_thinking: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None

    is_chat = True

    @field_validator("top_logprobs")
    @classmethod
    def _belongs_to_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs", True):
            raise ValueError("needs logprobs: true")
        return value

    @property
    def n_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _agree_on_thinking(self) -> "ChatBody":
        if len({wanted for wanted, _ in self._thinking}) > 1:
            names = " and ".join(name for _, name in self._thinking)
            raise ValueError(f"has {names}, which contradict each other")
        return self

    @property
    def _thinking(self) -> list[tuple[bool, str]]:
        """(whether to think, the field that says so), of each field that does."""
        said = {
            "chat_template_kwargs.thinking": self.chat_template_kwargs.thinking,
            "chat_template_kwargs.enable_thinking": self.chat_template_kwargs.enable_thinking,
            "thinking": None if self.thinking is None else THINKING[self.thinking.type],
            "enable_thinking": self.enable_thinking,
            "reasoning_effort": None if self.reasoning_effort is None else EFFORTS[self.reasoning_effort],
        }
        return [(wanted, name) for name, wanted in said.items() if wanted is not None]

    @property
    def wants_thinking(self) -> tuple[bool | None, str]:
        """Whether the model is to think, and the field that says so; None where none does."""
        return next(iter(self._thinking), (None, ""))

    @property
    def offers_tools(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"


Ids = Annotated[list[int], Field(fail_fast=True)]


class CompletionBody(Sampled):
    prompt: str | Ids | Annotated[list[str], Field(fail_fast=True)] | Annotated[list[Ids], Field(fail_fast=True)]
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool = False
    suffix: str | None = None  # what follows the text that is asked for

    is_chat = False

    @property
    def n_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def sampling(self) -> dict[str, Any]:
        fields = super().sampling
        if self.echo:
            scored_alone = fields.get("max_new_tokens") == 0 and self.logprobs is None
            fields["prompt_logprobs"] = 0 if scored_alone else self.logprobs
        return fields


Body = TypeVar("Body", ChatBody, CompletionBody)


def parse(kind: type[Body], data: dict[str, Any]) -> Body:
    """A request of JSON values. Raises FieldError."""
    try:
        return kind.model_validate(data)
    except ValidationError as e:
        problems = [(_describe(error, data), error["type"]) for error in e.errors(include_url=False)]
    # Of a union's errors those of the alternative that came furthest, and of these one about more than the type.
    (path, says), _ = max(problems, key=lambda found: (len(found[0][0]), not found[1].endswith("_type")))
    raise FieldError(".".join(path), says)


def _describe(error: Any, data: Any) -> tuple[list[str], str]:
    """(path, what is wrong there) of one of pydantic's errors, whose own paths name types of unions as well."""
    path: list[str] = []
    for part in error["loc"]:
        inside = part in data if isinstance(data, dict) else isinstance(data, list) and isinstance(part, int)
        if inside:
            data = data[part]
            path.append(shown(part)[1:-1] if isinstance(part, str) else str(part))
        elif error["type"] == "missing" and part == error["loc"][-1] and isinstance(data, dict):
            return [*path, str(part)], "is missing"
    if error["type"] == "extra_forbidden":
        with_value = f" with the value {shown(data)}" if path[-1] in OFF_NAMES else ""
        return path, f"is not supported{with_value}"
    if error["type"] in JSON_TYPES:
        says = f"expected {JSON_TYPES[error['type']]}"
    elif error["type"] == "literal_error":
        expected = error["ctx"]["expected"].replace("'", '"').replace("True", "true").replace("False", "false")
        says = f"expected {expected}"
    else:
        says = error["msg"].replace("Input should be ", "expected ").removeprefix("Value error, ")
        says = says.replace("List should have", "expected").replace(" after validation", "")
    return path, says if says.startswith(("has ", "needs ")) else f"is {shown(data)}: {says}"


def shown(value: Any) -> str:
    """A JSON value in a message, as JSON, its middle left out if it is long."""
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()  # no lone surrogates
    return text if len(text) <= 80 else f"{text[:60]} … ({len(text)} characters)"
