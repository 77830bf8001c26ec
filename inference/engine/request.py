"""A request: its prompt, the tokens of its answer, and the text they make.

Tokens become text in three steps: `Detokenizer` joins their bytes to characters, `_pending` withholds tokens whose text
may begin a stop text, and `events` records each token once its text is certain. A reader of a growing answer remembers
how many events it has seen: events are only ever appended. In the answer to a conversation stop texts are looked for in
its content alone, neither in reasoning nor in calls.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from core.errors import UserError
from core.sampling_params import SamplingParams
from engine.constraint import Constraint
from engine.sampling import Logprob
from engine.sampling_state import Draft, SamplingState
from text.chat_format import ChatFormat
from text.detokenizer import Detokenizer
from text.parser import ChatParser, Content, Reasoning
from text.tokenizer import Tokenizer

Prompt = str | list[int] | list[dict]  # raw text, token ids, or chat messages
FinishReason = Literal["stop", "length", "error", "cancelled"]


class TokenEvent(NamedTuple):
    """One token of an answer with the text it completes, "" for a token that ends inside a character."""

    id: int | None  # None: text of an incomplete character whose own tokens are already recorded
    text: str
    is_control: bool = False  # the token stands for itself (see Tokenizer.is_control), and `text` is exactly its own
    drafted: bool = False  # the MTP module proposed the token
    logprob: Logprob | None = None  # where params.logprobs asks for it


@dataclass(eq=False)
class Request:
    """One prompt and its answer as it grows. The answer is complete once `finish_reason` is set."""

    id: int
    prompt: list[int]
    params: SamplingParams
    choice: int = 0  # which of params.n answers to the prompt
    tokens: list[int] = field(default_factory=list)  # all ids made, without the end token, withheld ones included
    events: list[TokenEvent] = field(default_factory=list)  # append-only; in the end all of `tokens`, and leftover text
    finish_reason: FinishReason | None = None
    error: str | None = None
    n_reused: int = 0  # prompt tokens whose latents the prefix cache held
    opens_thinking: bool = False  # the prompt itself opens <think>
    prompt_logprobs: list[Logprob] = field(default_factory=list)  # of each prompt token but the first
    draft: Draft = field(default_factory=Draft, repr=False)
    sampling_state: SamplingState | None = field(default=None, repr=False)  # where it is sampled, once it is
    chat: ChatFormat | None = None  # of the answer to a conversation; None: a text goes on
    constraint: Constraint | None = field(default=None, repr=False)  # of params.answer_format, where it is sampled
    detokenizer: Detokenizer | None = field(default=None, repr=False)  # None: no tokenizer, and no text
    hit_stop: bool = False  # a stop text ended the text; nothing follows it
    _pending: list[TokenEvent] = field(default_factory=list, repr=False)  # their text may begin a stop text
    _n_searchless: int = field(default=0, repr=False)  # characters of their texts that no stop text may be in
    _parser: ChatParser | None = field(default=None, repr=False)  # tells content, where stop texts ask for it
    _n_before: int = field(default=0, repr=False)  # events before the last step
    _n_tokens_before: int = field(default=0, repr=False)

    @property
    def text(self) -> str:
        """The text that is certain so far."""
        return "".join(event.text for event in self.events)

    @property
    def new_text(self) -> str:
        """What the last step added to `text`: whole characters only."""
        return "".join(event.text for event in self.events[self._n_before :])

    @property
    def step_tokens(self) -> list[tuple[int, bool, Logprob | None]]:
        """The last step's tokens, each with whether it was a draft, and its log-probability."""
        events = [event for event in (*self.events[self._n_before :], *self._pending) if event.id is not None]
        earlier = len(events) - (len(self.tokens) - self._n_tokens_before)  # withheld by then
        return [(event.id, event.drafted, event.logprob) for event in events[earlier:] if event.id is not None]

    @property
    def logprobs(self) -> list[Logprob]:
        """Log-probabilities of the recorded tokens, where params.logprobs asks for them."""
        return [event.logprob for event in self.events if event.logprob is not None]

    @property
    def parts(self) -> tuple[str | None, str]:
        """(reasoning, answer): the text inside a leading <think> … </think>, None without one, and the text after it,
        without control tokens and calls.

        Text that never leaves the thinking is all reasoning. Only control tokens are markers, not text spelled alike.
        Without a conversation and without thinking the answer is the whole text.
        """
        parser = (self.chat or ChatFormat()).parser(self.opens_thinking)
        pieces = [piece for event in self.events for piece in parser.push(event.text, event.is_control)]
        reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
        answer = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        if self.chat is None and not parser.has_reasoning:
            return None, self.text
        return reasoning if parser.has_reasoning else None, answer

    @property
    def rng_key(self) -> int:
        """The number that separates this request's random draws from others' under one seed."""
        return self.id + (self.choice << 40)

    def begin_step(self) -> None:
        """Start collecting `new_text` and `step_tokens` afresh."""
        self._n_before, self._n_tokens_before = len(self.events), len(self.tokens)

    def append(self, token: int, drafted: bool = False, logprob: Logprob | None = None) -> bool:
        """Append a token to the answer; return whether a stop text ends it."""
        text, is_control = "", False
        if self.detokenizer is not None:
            left, text, is_control = self.detokenizer.push_apart(token)
            self._append_leftover(left)
        self.tokens.append(token)
        event = TokenEvent(token, text, is_control, drafted, logprob)
        if not self.params.stop:
            self.events.append(event)
            return False
        self._append_pending(event)
        return bool(self._pending) and self._record()

    def flush(self) -> None:
        """Record what is withheld, now that nothing follows it, up to a stop text in it."""
        left = self.detokenizer.finish() if self.detokenizer is not None else ""
        if not self.hit_stop:
            self._append_leftover(left)
            self._record()
        self.events += self._pending
        self._pending = []

    def _append_leftover(self, text: str) -> None:
        """Append the text of an incomplete character to the last withheld token, or as an event of its own."""
        if not text:
            return
        if self._pending and not self._pending[-1].is_control:
            last = self._pending.pop()
            self._append_pending(last._replace(text=last.text + text), text)
        else:
            self._append_pending(TokenEvent(None, text))

    def _append_pending(self, event: TokenEvent, new: str | None = None) -> None:
        """Withhold a token, if there are stop texts, of whose text `new` (None: all) is new. What is no content
        separates stop texts."""
        new = event.text if new is None else new
        if self.chat is not None and self.params.stop and new:
            self._parser = self._parser or self.chat.parser(self.opens_thinking)
            pieces = self._parser.push(new, event.is_control)
            n_content = sum(len(piece.text) for piece in pieces if isinstance(piece, Content))
            if n_content < len(new):
                before = sum(len(earlier.text) for earlier in self._pending)
                self._n_searchless = before + len(event.text) - n_content
        (self._pending if self.params.stop else self.events).append(event)

    def _record(self) -> bool:
        """Move tokens whose text is certain from `_pending` to `events`, cut at the first stop text; return whether
        there is one."""
        stops, text = self.params.stop, "".join(event.text for event in self._pending)[self._n_searchless :]
        found = min((at for at in (text.find(stop) for stop in stops) if at >= 0), default=-1)
        if found >= 0:
            self.hit_stop = True
            found += self._n_searchless
            for event in self._pending:
                self.events.append(event._replace(text=event.text[:found]))
                found -= len(self.events[-1].text)
            self._pending = []
            return True
        keep = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        certain = self._n_searchless + len(text) - keep
        while self._pending and len(self._pending[0].text) <= certain:
            self.events.append(self._pending.pop(0))
            certain -= len(self.events[-1].text)
            self._n_searchless = max(self._n_searchless - len(self.events[-1].text), 0)
        return False


def is_conversation(prompt: Prompt) -> bool:
    return isinstance(prompt, list) and any(isinstance(message, dict) for message in prompt[:1])


def encode(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int, thinking: bool | None) -> list[int]:
    """A prompt's token ids. Raises UserError for what is not in the vocabulary, and as the tokenizer does."""
    if isinstance(prompt, str):
        assert tokenizer is not None, "text needs a tokenizer"
        return tokenizer.encode_text(prompt)
    ids = [t for t in prompt if isinstance(t, int)]
    if len(ids) == len(prompt):
        if wrong := [t for t in ids if not 0 <= t < vocab_size]:
            raise UserError(f"token id {wrong[0]} is not in the vocabulary of {vocab_size}")
        return ids
    assert tokenizer is not None, "text needs a tokenizer"
    return tokenizer.encode_chat(prompt, thinking=thinking)  # type: ignore[arg-type]  # checked there
