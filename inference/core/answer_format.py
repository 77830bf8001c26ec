"""What the form of an answer is held to: JSON by a schema, or calls of tools."""

from dataclasses import dataclass

from core.errors import UserError

SCHEMA_FIELD = "response_format.json_schema.schema"
ANY_OBJECT = '{"type": "object"}'  # a schema


class FormatError(UserError):
    """A format that no grammar can be made of: `param` is the part's path in a request, by OpenAI's field names."""

    def __init__(self, param: str, says: str):
        super().__init__(f"{param}: {says}")
        self.param = param


@dataclass(frozen=True)
class ToolFormat:
    """A function that an answer may call."""

    name: str
    schema: str  # of its arguments, JSON Schema as JSON
    strict: bool  # if not, a schema that no grammar can be made of leaves any object as arguments
    index: int = 0  # among a request's tools

    @property
    def field(self) -> str:
        return f"tools.{self.index}.function.parameters"


@dataclass(frozen=True)
class AnswerFormat:
    """What an answer must be, after a thinking model's reasoning: its content, or calls of `tools` behind any content
    that is free text, or instead of content that has a schema."""

    schema: str | None = None  # of the content, JSON Schema as JSON; None: any text
    tools: tuple[ToolFormat, ...] = ()
    calls_required: bool = False  # calls and no content
    one_call: bool = False  # at most one

    @classmethod
    def from_json(cls, said: dict) -> "AnswerFormat":
        """From what `dataclasses.asdict` makes of one, through JSON."""
        return cls(**said | {"tools": tuple(ToolFormat(**tool) for tool in said["tools"])})
