"""Which tokens may follow an answer that is held to a format, for each request and after each of its drafts.

A request's reasoning is free; a grammar begins behind </think>. Masks are bits, little-endian in bytes, so that a
device is sent 16 KB for a row of 129,280 logits.
"""

import contextlib
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from core.answer_format import AnswerFormat
from core.errors import UserError
from text.grammar import Grammar, Grammars
from text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

Mask = np.ndarray  # (ceil(vocab / 8),), uint8


class Thinking(NamedTuple):
    """What a vocabulary has to do with reasoning."""

    opens: int | None  # <think>
    closes: int | None  # </think>
    ends: frozenset[int]  # end tokens, which stand neither in reasoning nor within a format
    mask: Mask  # text, and </think>


class Constraints:
    """Makes the constraints of an engine's requests."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        """`vocab_size`: the width of the logits."""
        self.tokenizer, self.grammars = tokenizer, Grammars(tokenizer, vocab_size)

    def prepare(self) -> None:
        """Read the vocabulary now, not with the first format, which would hold up a step for a second. Does nothing
        without the library."""
        with contextlib.suppress(UserError):
            self.grammars.prepare()
            _ = self._thinking

    def constraint(self, format: AnswerFormat, prompt: list[int], grammar: Grammar | None = None) -> "Constraint":
        """At the beginning of the answer to a prompt; `grammar`: the format's, if it is compiled already. Raises
        UserError where it cannot be compiled."""
        grammar = grammar or self.grammars.compile(format)
        opened = self.tokenizer.starts_thinking(prompt)
        may_open = self.grammars.thinks and not opened and not self._has_thought(prompt)
        return Constraint(grammar.matcher(), self._thinking, opened, may_open)

    def _has_thought(self, prompt: Sequence[int]) -> bool:
        """Whether the prompt ends with </think>: the template has switched thinking off."""
        last = next((token for token in reversed(prompt) if not self.tokenizer.name(token).isspace()), None)
        return last == self.tokenizer.think_close_id

    @cached_property
    def _thinking(self) -> Thinking:
        tokenizer, ends = self.tokenizer, frozenset(self.tokenizer.eos_ids)
        allowed = np.array([
            token == tokenizer.think_close_id
            or not (token in ends or tokenizer.is_control(token) or not tokenizer.name(token))
            for token in range(self.grammars.vocab_size)
        ])  # fmt: skip
        mask = np.packbits(allowed, bitorder="little")
        return Thinking(tokenizer.think_open_id, tokenizer.think_close_id, ends, mask)


class Constraint:
    """Where one request's answer stands. The answer only grows; drafts behind it are taken back when others come."""

    def __init__(self, matcher: "LLMatcher", thinking: Thinking, opened: bool, may_open: bool):
        """`opened`: the prompt opens <think>; `may_open`: the answer itself may."""
        self._matcher, self._thinking, self._opened, self._may_open = matcher, thinking, opened, may_open
        self._begin: int | None = None if opened else 0  # the answer's token with which the grammar begins
        self._n = 0  # tokens of the answer that are certain
        self._ahead: list[int] = []  # drafts behind them
        self._masks: list[Mask | None] = [None]  # after the certain tokens and so many drafts

    def mask(self, tokens: Sequence[int], n_prompt: int, drafts: Sequence[int]) -> Mask | None:
        """What may follow `tokens`, prompt and answer so far, and `drafts`; None where the format does not allow the
        drafts: what follows them makes no difference.

        Raises UserError where the work exceeds the limits.
        """
        new = tokens[n_prompt + self._n :]
        if not self._seek([*new, *drafts], len(new)):
            return None
        found = self._masks[-1]
        if found is None:
            found = self._masks[-1] = self._compute()
        return found

    def _seek(self, path: list[int], certain: int) -> bool:
        """Goes where `path` leads from the certain tokens, of which its first ones now are; whether it can be gone."""
        same = 0
        while same < min(len(path), len(self._ahead)) and path[same] == self._ahead[same]:
            same += 1
        self._take_back(len(self._ahead) - same)
        reached = all(self._take(token) for token in path[same:])
        if len(self._ahead) < certain:
            raise UserError("the answer has left its format: this is a bug")
        self._n += certain
        del self._ahead[:certain], self._masks[:certain]
        return reached

    def _take(self, token: int) -> bool:
        """Goes on by one token, unless the format does not allow it."""
        at = self._n + len(self._ahead)
        if self._begin is None:
            if token in self._thinking.ends:
                return False
            if token == self._thinking.closes:
                self._begin = at + 1
        elif at == 0 and self._may_open and token == self._thinking.opens:
            self._begin = None  # the answer opens <think> itself
        elif token in self._thinking.ends or not self._matcher.try_consume_tokens([token]):
            return False
        self._ahead.append(token)
        self._masks.append(None)
        return True

    def _take_back(self, n: int) -> None:
        if n == 0:
            return
        at = self._n + len(self._ahead) - n
        if self._begin is not None:
            consumed = max(self._n + len(self._ahead) - self._begin, 0)
            if surplus := consumed - max(at - self._begin, 0):
                self._matcher.rollback(surplus)
            if self._begin > at:
                self._begin = None
        if at == 0 and not self._opened:
            self._begin = 0
        del self._ahead[-n:], self._masks[-n:]

    def _compute(self) -> Mask:
        if self._begin is None:
            return self._thinking.mask
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)[: len(self._thinking.mask)]
        if self._matcher.is_error():  # the mask then has the end alone
            reason = " ".join(self._matcher.get_error().split("\n<state>")[0].split())
            raise UserError(f"the answer's format is too complex to follow: {reason}")
        if self._n + len(self._ahead) == 0 and self._may_open:
            assert self._thinking.opens is not None
            mask = mask.copy()
            mask[self._thinking.opens // 8] |= 1 << self._thinking.opens % 8
        return mask
