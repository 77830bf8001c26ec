"""Schemas, and answers that a grammar allows, at random; and templates whose models write calls."""

import random
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from text.grammar import Grammar, Grammars
from text.parser import MARKERS, ChatParser, Content, Piece, Reasoning, ToolCallArguments, ToolCallStart

CLOSING = '"]}'


def marker_tokens(style: str) -> tuple[str, ...]:
    m = MARKERS[style]
    return (m.calls_begin, m.call_begin, m.separator, m.call_end, m.calls_end)


def tools_template(style: str, template: str) -> str:
    """A template that offers tools in this style."""
    m = MARKERS[style]
    shape = f"{m.call_begin}function{m.separator}x\\n```json" if style == "v3" else f"{m.call_begin}x{m.separator}"
    return "{% if tools %}{{ tools | tojson }}{{ '" + shape + "' }}{% endif %}" + template


def bits(mask: bytes | np.ndarray) -> np.ndarray:
    """Ids of the tokens in a mask."""
    return np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))


def walk(grammars: Grammars, grammar: Grammar, draw: random.Random, most: int = 600) -> list[int] | None:
    """Tokens drawn from a grammar's masks, more often than not what ends something, without the end token; None where
    they come to no end."""
    matcher, ends = grammar.matcher(), set(grammars.tokenizer.eos_ids)
    closing = {t for t in range(grammars.vocab_size) if grammars.tokenizer.name(t).decode("latin") in CLOSING}
    markers = {t for t in range(grammars.vocab_size) if grammars.tokenizer.is_control(t)} - ends
    made: list[int] = []
    for _ in range(most):
        allowed = bits(matcher.compute_bitmask()).tolist()
        assert allowed and not matcher.is_error(), matcher.get_error()
        wish = draw.choice((ends, markers, closing, range(grammars.vocab_size)))
        token = draw.choice([t for t in allowed if t in wish] or allowed)
        if token in ends:
            return made
        assert matcher.try_consume_tokens([token]) == 1
        made.append(token)
    return None


def parsed(grammars: Grammars, tokens: list[int], thinking: bool = False) -> tuple[str, str, list[list[str]]]:
    """(reasoning, content, [name, arguments] of each call)."""
    parser, stream = ChatParser(grammars.style, thinking, tools=True), grammars.tokenizer.stream()
    pieces: list[Piece] = []
    for token in tokens:
        left, text, is_control = stream.push_apart(token)
        pieces += parser.push(left, False) + parser.push(text, is_control)
    pieces += parser.push(stream.finish(), False) + parser.finish()
    said: dict[Any, str] = {Reasoning: "", Content: ""}
    calls: list[list[str]] = []
    for piece in pieces:
        if isinstance(piece, ToolCallStart):
            calls.append([piece.name, ""])
        elif isinstance(piece, ToolCallArguments):
            calls[-1][1] += piece.text
        else:
            said[type(piece)] += piece.text
    return said[Reasoning], said[Content], calls


# --- random schemas --------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "long name", "é", '"'])


def numbers(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    bounds = st.tuples(st.integers(-50, 50), st.integers(0, 50)).map(lambda b: {"minimum": b[0], "maximum": b[0] + b[1]})
    return st.one_of(st.just({}), bounds, st.just({"exclusiveMinimum": 3}), st.just({"multipleOf": 5} if kind == "integer" else {})).map(
        lambda more: {"type": kind, **more}
    )


LEAVES = st.one_of(
    numbers("integer"),
    numbers("number"),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"]}, {"const": {"x": [1, None]}}, {}]),
    st.lists(st.sampled_from(["red", "grün", 1, None, True]), min_size=1, max_size=4, unique_by=repr).map(lambda e: {"enum": e}),
    st.tuples(st.integers(0, 4), st.integers(0, 5)).map(lambda n: {"type": "string", "minLength": n[0], "maxLength": n[0] + n[1]}),
    st.sampled_from(["^[a-c]{2,4}$", "^x+y?$", r"^\d{3}-\d{2}$"]).map(lambda p: {"type": "string", "pattern": p}),
    st.sampled_from(["date", "uuid", "ipv4"]).map(lambda f: {"type": "string", "format": f}),
)


def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def an_object(found: tuple[dict, list, Any]) -> dict:
        properties, required, additional = found
        made: dict = {"type": "object", "properties": properties, "required": [name for name in properties if name in required]}
        return made if additional is None else made | {"additionalProperties": additional}

    return st.one_of(
        st.tuples(st.dictionaries(NAMES, inner, max_size=4), st.lists(NAMES), st.one_of(st.none(), st.just(False), inner)).map(an_object),
        st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
            lambda a: {"type": "array", "items": a[0], "minItems": a[1], "maxItems": a[1] + a[2]}
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda s: {"anyOf": s}),
        st.lists(inner, min_size=1, max_size=2).map(lambda s: {"type": "array", "prefixItems": s, "items": False}),
    )


SCHEMAS = st.recursive(LEAVES, larger, max_leaves=6)


def random_schemas(n: int) -> list[dict[str, Any]]:
    """The same ones every time."""
    found: list[dict[str, Any]] = []

    @settings(max_examples=n, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(SCHEMAS)
    def collect(schema: dict[str, Any]) -> None:
        found.append(schema)

    collect()
    return found
