"""Answers that a grammar allows, at random; and templates whose models write calls."""

import random
from typing import Any

import numpy as np

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
