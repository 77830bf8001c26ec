"""From the format of an answer to a grammar that says which tokens may come next.

llguidance makes the masks: it refuses what it does not implement instead of ignoring it, holds to limits of work and
memory, and releases Python's lock. Compiling belongs on a thread that nobody waits for.
"""

import json
import threading
import time
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from core.answer_format import ANY_OBJECT, AnswerFormat, FormatError
from core.errors import UserError
from text.answer_grammar import answer_grammar, check_schemas, children, json_rule, schemas
from text.chat_format import tool_style
from text.conversation import THINK_END
from text.parser import MARKERS, Markers
from text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

LOCATE_SECONDS = 0.3  # for finding the part of a schema that is at fault
# Work that one mask may take: milliseconds. A state of the lexer takes 1 to 2 kB.
LIMITS = {"step_lexer_fuel": 50_000, "step_max_items": 20_000, "max_lexer_states": 50_000, "verbose_errors": False}


class Grammar:
    """A compiled format. Requests take a matcher each."""

    def __init__(self, matcher: "LLMatcher"):
        self._matcher = matcher

    def matcher(self) -> "LLMatcher":
        """At the beginning of an answer's content."""
        return self._matcher.deep_copy()


class _Words:
    """The vocabulary in the form that LLTokenizer reads."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.tokens = [tokenizer.name(i) for i in range(vocab_size)]
        self.special_token_ids = [i for i in range(vocab_size) if tokenizer.is_control(i) or i in tokenizer.eos_ids]
        self.eos_token_id, self.bos_token_id = tokenizer.eos_ids[0], tokenizer.bos_id

    def __call__(self, text: bytes | str) -> list[int]:
        raise AssertionError("grammars with no_forcing never encode text")


class Grammars:
    """Compiles formats for one vocabulary. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        """`vocab_size`: the width of the logits."""
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        template = tokenizer.chat_template or ""
        self.style = tool_style(template)
        self.thinks = THINK_END in template and tokenizer.think_close_id is not None
        self._lock = threading.Lock()

    @cached_property
    def _words(self) -> "LLTokenizer":
        """Takes a second for 129,280 tokens. Raises UserError without llguidance."""
        return _library().LLTokenizer(
            _Words(self.tokenizer, self.vocab_size), n_vocab=self.vocab_size, eos_token=list(self.tokenizer.eos_ids)
        )

    def prepare(self) -> None:
        """Read the vocabulary now, not when the first format is compiled."""
        with self._lock:
            _ = self._words

    def compile(self, format: AnswerFormat) -> Grammar:
        """Bounded in time: about a second at worst, milliseconds mostly. Raises FormatError, naming the part, for what
        is too large, not supported or impossible."""
        self.prepare()
        check_schemas(format)
        matcher = self._matcher(self._source(format))
        if matcher.is_error():
            format = self._supported(format)
            matcher = self._matcher(self._source(format))
        if not matcher.is_error():
            matcher.compute_bitmask()  # shows what the compiler does not
        if matcher.is_error():
            field = next((field for field, _, _ in schemas(format)), "tools")
            raise FormatError(field, f"is not supported: {_reason(matcher.get_error())}")
        return Grammar(matcher)

    def _source(self, format: AnswerFormat) -> str:
        markers = MARKERS[self.style] if self.style in MARKERS else Markers()
        return answer_grammar(format, self.style, markers, self.tokenizer.control_id)

    def _supported(self, format: AnswerFormat) -> AnswerFormat:
        """The format, with any object for arguments where a tool that is not strict has a schema that cannot be
        compiled. Raises FormatError for other such schemas."""
        loose = set()
        for field, schema, tool in schemas(format):
            if (error := self._error(json.loads(schema))) is None:
                continue
            if tool is None or tool.strict:
                path, reason = self._locate(json.loads(schema), error)
                raise FormatError(field + path, f"is not supported: {reason}")
            loose.add(tool)
        tools = tuple(replace(tool, schema=ANY_OBJECT) if tool in loose else tool for tool in format.tools)
        return replace(format, tools=tools)

    def _error(self, schema: Any) -> str | None:
        if not isinstance(schema, dict):
            schema = {"anyOf": [schema]}
        matcher = self._matcher(f"start: {json_rule(json.dumps(schema))}")
        return _reason(matcher.get_error()) if matcher.is_error() else None

    def _locate(self, schema: dict[str, Any], error: str) -> tuple[str, str]:
        """(path, reason): the innermost schema that has the error by itself. Gives up when that takes long."""
        until, path = time.monotonic() + LOCATE_SECONDS, ""
        shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
        inner: Any = schema
        while True:
            for step, child in children(inner):
                alone = shared | child if isinstance(child, dict) else child
                if time.monotonic() < until and self._error(alone) == error:
                    inner, path = child, f"{path}.{step}"
                    break
            else:
                return path, error

    def _matcher(self, source: str) -> "LLMatcher":
        library = _library()
        return library.LLMatcher(self._words, source, log_level=0, limits=library.LLParserLimits(**LIMITS))


def _reason(error: str) -> str:
    """The library's message without where it was in the grammar's text, on one line."""
    said = error.split("failed to compile JSON schema: ")[-1].split("\n   1 | ")[0].split("\n<state>")[0]
    if "NoExtensionBias" in said:  # a schema that refers to nothing but itself, for one
        return "no text can match it"
    return " ".join(said.split()) or "no reason given"


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UserError("holding answers to a format needs llguidance: pip install -r requirements.txt") from None
    return llguidance
