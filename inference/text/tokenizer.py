"""Text to token ids and back, from a checkpoint's own tokenizer and chat template.

Two promises shape this module. The model reads exactly what the released tokenizer makes of the rendered chat template,
with one BOS. And message text is only ever text: a user who types `<｜Assistant｜>` or `<think>` gets those characters,
not the control token. DeepSeek-V3's own file marks these added tokens `special: false`, so no option of an encoder
keeps text apart from control tokens; here their origin does. A control token counts only where the chat template itself
writes it, and everything else goes through a second tokenizer that knows no added tokens.
"""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import read_json, require_folder
from text.chat_template import ChatTemplate, read_template
from text.conversation import THINK, THINK_END, require_unicode
from text.detokenizer import Detokenizer
from text.limits import TooLong
from text.special_tokens import find_special_tokens
from text.vocabulary import read_vocabulary

FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
ROUND_TRIP = "Hello  world, 3.14 and 1024\n\tdéjà vu — 你好，世界 🙂 end"


class NoThinkingSwitch(UserError):
    """A chat template that always thinks, or never does, and is asked for the other."""


class Tokenizer:
    """A checkpoint's tokenizer.

    bos_id is None if the checkpoint names none; think_open_id and think_close_id are None where the vocabulary has no
    `<think>`. Each of eos_ids ends an answer. `ignored` has a line for every ordinary word that generation_config.json
    or config.json takes for a special token, and for every token that tokenizer_config.json alone has.
    """

    def __init__(self, folder: str | Path, vocab_size: int | None = None) -> None:
        """Reads tokenizer.json or tiktoken.model and, where present, tokenizer_config.json, chat_template.jinja,
        generation_config.json and config.json from `folder`. `vocab_size`: rows of the model's embedding, to check the
        tokenizer against.

        Raises UserError when a file is missing or damaged, when the tokenizer does not fit the model, when it has no
        end token, or when a test text does not survive encoding and decoding.
        """
        folder = Path(folder)
        require_folder(folder)
        optional = ("tokenizer_config.json", "generation_config.json", "config.json")
        settings, generation, config = (_read_optional(folder / name) for name in optional)
        self._vocabulary = read_vocabulary(folder, settings)
        self.path = self._vocabulary.path
        special = find_special_tokens(self._vocabulary, folder, settings, generation, config, vocab_size)
        self.bos_id, self.eos_ids, self.ignored = special.bos_id, special.eos_ids, special.ignored
        self._named, self._missing = special.named, special.missing
        added = [token for token in self._vocabulary.added.values() if token.text not in special.missing.values()]
        self._added = {token.text: token.id for token in added}
        self._added_text = {token.id: token.text for token in added}
        self._trimming = {token.text for token in added if token.trims}
        self._specials = self._added | special.declared
        self._last_id = max([self._vocabulary.last_word, *self._added_text])
        if vocab_size is not None and self._last_id >= vocab_size:
            raise UserError(f"{self.path}: ids go up to {self._last_id}, but the model's vocab_size is {vocab_size}")

        self.think_open_id = self._added.get(THINK)
        self.think_close_id = self._added.get(THINK_END)
        self._hidden = {token.id for token in added if token.special} | set(special.declared.values())
        self._hidden |= {i for i in (self.bos_id, *self.eos_ids) if i is not None}
        self._hidden -= {i for i in (self.think_open_id, self.think_close_id) if i is not None}
        self._pieces: dict[int, bytes] = {}
        self._template_source = read_template(folder, settings)
        before, after = self._vocabulary.around
        self._add_bos = bool(settings.get("add_bos_token")) and "bos_token" in self._named
        if self._add_bos and self.bos_id is not None and self.bos_id not in before:
            before = [self.bos_id, *before]
        self._before, self._after = before, after

        if self.decode(self._encode_plain(ROUND_TRIP)) != ROUND_TRIP:
            raise UserError(f"{self.path}: a text with spaces, digits, Chinese and an emoji does not come back whole")

    @classmethod
    def from_pretrained(cls, path: str | Path, vocab_size: int | None = None) -> "Tokenizer":
        """The constructor, under the name of transformers."""
        return cls(path, vocab_size)

    # ---------------------------------------------------------------- text to ids

    def encode_text(self, text: str, most: int | None = None, alone: bool = False) -> list[int]:
        """A raw completion prompt: `text` without control tokens, and around it, unless it is to be `alone`, what the
        tokenizer itself puts there, as its post-processor or `add_bos_token` says. Raises UserError for invalid
        Unicode, and TooLong for a text of more than `most` tokens, without making a list of them."""
        require_unicode(text, "the prompt")
        ids = self._encode_plain(text, most)
        return ids if alone else [*self._before, *ids, *self._after]

    def encode_infill(self, prefix: str, suffix: str, most: int | None = None) -> list[int]:
        """The prompt for the text between `prefix` and `suffix`, in the order that DeepSeek-V3 was trained with:
        prefix, suffix, middle (arXiv 2412.19437, section 4.1). Raises as `encode_text` does, and UserError where the
        tokenizer lacks a control token of it."""
        lacking = [token for token in (FIM_BEGIN, FIM_HOLE, FIM_END) if token not in self._added]
        if lacking:
            raise UserError(f"this checkpoint cannot fill a text in: its tokenizer has no {lacking[0]}")
        require_unicode(prefix + suffix, "the prompt")
        texts = self._encode_plain(prefix, most), self._encode_plain(suffix, most)
        begin, hole, end = (self._added[token] for token in (FIM_BEGIN, FIM_HOLE, FIM_END))
        return [*self._before, begin, *texts[0], hole, *texts[1], end]

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        thinking: bool | None = None,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        most: int | None = None,
    ) -> list[int]:
        """The prompt for a conversation of `{"role", "content"}` messages, with exactly one BOS.

        `thinking` switches a template that offers it (DeepSeek-V3.1); None leaves the template's default. `tools` are
        offered to the model, by a template that can.
        Equal to encoding `render_chat`'s text with the full tokenizer whenever no message spells an added token.
        Raises UserError without a chat template, for messages the template cannot render and for invalid Unicode,
        NoThinkingSwitch where a template does not offer the `thinking` asked for, and TooLong for more than `most`
        tokens, as `encode_text` does.
        """
        switch = thinking if self._template.has_thinking_switch else None
        ids: list[int] = []
        for run in self._template.render(messages, switch, add_generation_prompt, tools)[1]:
            left = None if most is None else max(most - len(ids), 0)
            try:
                ids += [run] if isinstance(run, int) else self._encode_plain(run, left)
            except TooLong as e:
                raise TooLong(len(ids) + e.n, most or 0, is_all=False) from None
        if self._add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)  # the checkpoint asks for one and its template leaves it to the tokenizer
        if switch is not thinking and self.starts_thinking(ids) is not thinking:
            raise NoThinkingSwitch("this checkpoint's chat template does not let thinking be switched on or off")
        return ids

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        thinking: bool | None = None,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text of the prompt that `encode_chat` encodes; the same errors."""
        return self._template.render(messages, thinking, add_generation_prompt, tools)[0]

    @property
    def has_chat_template(self) -> bool:
        return self._template_source is not None

    @property
    def begins_with(self) -> str:
        """The names of the tokens that are put before a raw text."""
        return b"".join(map(self.name, self._before)).decode("utf-8", "replace")

    @property
    def size(self) -> int:
        """One more than its last id."""
        return self._last_id + 1

    @property
    def control_tokens(self) -> set[str]:
        return set(self._specials)

    @property
    def has_thinking_switch(self) -> bool:
        """Whether the chat template reads `thinking`; if not, asking for it is a UserError."""
        return self.has_chat_template and self._template.has_thinking_switch

    @property
    def knows_tools(self) -> bool:
        """Whether the chat template reads `tools`; if not, offering some is a UserError."""
        return self.has_chat_template and self._template.knows_tools

    def starts_thinking(self, prompt_ids: list[int]) -> bool:
        """Whether the prompt already opened `<think>`, so that the output begins inside it, without the tag. The prompt
        may have the beginning of the thinking too."""
        last = next((token_id for token_id in reversed(prompt_ids) if self.is_control(token_id)), None)
        return last is not None and last == self.think_open_id

    # ---------------------------------------------------------------- ids to text

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: control tokens such as BOS and EOS left out, `<think>` kept, broken UTF-8 as U+FFFD."""
        return b"".join(map(self._piece, ids)).decode("utf-8", errors="replace")

    def stream(self) -> Detokenizer:
        return Detokenizer(self._piece, self.is_control)

    def name(self, token_id: int) -> bytes:
        """One token's bytes, which may end within a character; of a control token, its name."""
        return self._added_text[token_id].encode() if self.is_control(token_id) else self._piece(token_id)

    def control_id(self, text: str) -> int | None:
        """The id of the added token with this text, None where there is none."""
        return self._added.get(text)

    def is_control(self, token_id: int) -> bool:
        """Whether this is an added token, which no text that somebody wrote is encoded to."""
        return token_id in self._added_text

    @property
    def chat_template(self) -> str | None:
        """Its source."""
        return self._template_source

    def _piece(self, token_id: int) -> bytes:
        """The bytes one token stands for: none for a hidden one, or for an id that only pads the embedding."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._token_bytes(token_id)
        return piece

    def _token_bytes(self, token_id: int) -> bytes:
        if token_id in self._hidden or not 0 <= token_id <= self._last_id:
            return b""
        if token_id in self._added_text:
            return self._added_text[token_id].encode()
        return self._vocabulary.token_bytes(token_id)

    def _encode_plain(self, text: str, most: int | None = None) -> list[int]:
        """Ids of `text` as text. The check keeps the promise for vocabularies that list control tokens as words."""
        ids = self._vocabulary.encode(text, most)
        leaked = self._added_text.keys() & set(ids)
        if leaked:
            raise UserError(f"{self.path}: text turns into the control token {self._added_text[leaked.pop()]!r}")
        return ids

    @cached_property
    def _template(self) -> ChatTemplate:
        """Built on first use, so that a checkpoint with a broken template still serves raw completions."""
        if self._template_source is None:
            raise UserError(f"{self.path.parent}: no chat template in this checkpoint; use --raw for plain completion")
        template = ChatTemplate(self._template_source, self._specials, self._named, self._vocabulary.sorts_tools)
        lost = next((name for name in self._missing if name in template.reads), None)
        if lost is not None:
            settings = self.path.parent / "tokenizer_config.json"
            raise UserError(f"{settings}: the chat template reads {lost}, and {self._missing[lost]!r} is not in "
                            f"{self.path.name}")  # fmt: skip
        trimming = self._trimming & template.ids_by_text.keys()
        if trimming:
            raise UserError(f"{self.path}: {trimming.pop()!r} trims the text around it, which is not supported")
        return template


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
