"""Text to token ids and back, from a checkpoint's own tokenizer.json and chat template.

Two promises shape this module. The model reads exactly what the released tokenizer makes of the rendered chat template,
with one BOS. And message text is only ever text: a user who types `<｜Assistant｜>` or `<think>` gets those characters,
not the control token. DeepSeek-V3's own file marks these added tokens `special: false`, so no option of an encoder
keeps text apart from control tokens; here their origin does. A control token counts only where the chat template itself
writes it, and everything else goes through a second tokenizer that knows no added tokens.
"""

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from core.errors import UserError
from core.files import missing, read_json, require_folder
from text.chat_template import ChatTemplate, read_template, require_unicode
from text.detokenizer import LETTER_BYTES, Detokenizer

THINK, THINK_END = "<think>", "</think>"
ROUND_TRIP = "Hello  world, 3.14 and 1024\n\tdéjà vu — 你好，世界 🙂 end"


class TooLong(UserError):
    """A prompt of more tokens than the caller's limit."""


class Tokenizer:
    """A checkpoint's tokenizer.

    bos_id is None if the checkpoint names none; think_open_id and think_close_id are None where the vocabulary has no
    `<think>`. Each of eos_ids ends an answer.
    """

    def __init__(self, folder: str | Path, vocab_size: int | None = None) -> None:
        """Reads tokenizer.json and, where present, tokenizer_config.json, chat_template.jinja, generation_config.json
        and config.json from `folder`. `vocab_size`: rows of the model's embedding, to check the tokenizer against.

        Raises UserError when a file is missing or damaged, when the tokenizer does not fit the model, when it has no
        end token, or when a test text does not survive encoding and decoding.
        """
        folder = Path(folder)
        self._path = folder / "tokenizer.json"
        self._load(folder)
        optional = ("tokenizer_config.json", "generation_config.json", "config.json")
        settings, generation, config = (_read_optional(folder / name) for name in optional)
        self._find_special_ids(folder, settings, generation, config)
        self._check_vocabulary(vocab_size)
        self.think_open_id = self._added.get(THINK)
        self.think_close_id = self._added.get(THINK_END)
        self._hidden |= {i for i in (self.bos_id, *self.eos_ids) if i is not None}
        self._hidden -= {i for i in (self.think_open_id, self.think_close_id) if i is not None}
        self._pieces: dict[int, bytes] = {}
        self._template_source = read_template(folder, settings)
        self._add_bos = bool(settings.get("add_bos_token"))

        if self.decode(self._encode_plain(ROUND_TRIP)) != ROUND_TRIP:
            raise UserError(f"{self._path}: a text with spaces, digits, Chinese and an emoji does not come back whole")

    @classmethod
    def from_pretrained(cls, path: str | Path, vocab_size: int | None = None) -> "Tokenizer":
        """The constructor, under the name of transformers."""
        return cls(path, vocab_size)

    # ---------------------------------------------------------------- text to ids

    def encode_text(self, text: str, most: int | None = None) -> list[int]:
        """A raw completion prompt: BOS, then `text` without control tokens. Raises UserError for invalid Unicode, and
        TooLong for a text of more than `most` tokens, without making a list of them."""
        require_unicode(text, "the prompt")
        return ([] if self.bos_id is None else [self.bos_id]) + self._encode_plain(text, most)

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
        Raises UserError without a chat template, for messages the template cannot render and for invalid Unicode, and
        TooLong for a message of more than `most` tokens, as `encode_text` does.
        """
        ids: list[int] = []
        for run in self._template.render(messages, thinking, add_generation_prompt, tools)[1]:
            ids += [run] if isinstance(run, int) else self._encode_plain(run, most)
        if self._add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)  # the checkpoint asks for one and its template leaves it to the tokenizer
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
        """Whether the prompt already opened `<think>`, so that the output begins inside it, without the tag."""
        for token_id in reversed(prompt_ids):
            if token_id == self.think_open_id:
                return True
            if not self._piece(token_id).isspace():
                return False
        return False

    # ---------------------------------------------------------------- ids to text

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: control tokens such as BOS and EOS left out, `<think>` kept, broken UTF-8 as U+FFFD."""
        return b"".join(map(self._piece, ids)).decode("utf-8", errors="replace")

    def stream(self) -> Detokenizer:
        return Detokenizer(self._piece, self.is_control)

    def name(self, token_id: int) -> bytes:
        """One token's bytes, which may end within a character; of a control token, its name."""
        return self._added_text[token_id].encode() if self.is_control(token_id) else self._piece(token_id)

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
        token = self._plain.id_to_token(token_id) or ""
        try:
            return bytes(LETTER_BYTES[letter] for letter in token)
        except KeyError:  # not written in byte letters, so it is the text itself
            return token.encode()

    # ---------------------------------------------------------------- loading

    def _load(self, folder: Path) -> None:
        """Builds the tokenizer without added tokens and the table of the added ones."""
        require_folder(folder)
        if not self._path.exists():
            tiktoken = (folder / "tiktoken.model").exists()
            hint = "convert tiktoken.model to it" if tiktoken else "copy the tokenizer files beside the weights"
            raise missing(self._path, f"no such file; {hint}")
        raw = read_json(self._path)
        decoder = raw.get("decoder") or {}
        chain = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
        kinds = [step.get("type") for step in chain]
        if "ByteLevel" not in kinds or set(kinds) - {"ByteLevel", "Fuse"}:
            raise UserError(f"{self._path}: decoder {kinds} is not supported (known: ByteLevel)")
        try:
            added = raw.get("added_tokens") or []
            self._added: dict[str, int] = {token["content"]: int(token["id"]) for token in added}
            self._hidden: set[int] = {token["id"] for token in added if token.get("special")}
            self._trimming = {token["content"] for token in added
                              if token.get("lstrip") or token.get("rstrip") or token.get("single_word")}  # fmt: skip
            text_only = raw | {"added_tokens": [], "truncation": None, "padding": None, "post_processor": None}
            self._plain = tokenizers.Tokenizer.from_str(json.dumps(text_only))
        except Exception as e:  # the tokenizers library raises nothing more precise
            raise UserError(f"{self._path}: not a usable tokenizer ({e})") from None
        self._added_text = {token_id: content for content, token_id in self._added.items()}

    def _find_special_ids(
        self, folder: Path, settings: dict[str, Any], generation: dict[str, Any], config: dict[str, Any]
    ) -> None:
        """`bos_id`, `eos_ids` and the token texts a template may name (`bos_token` …).

        Any of the files may be absent: an old converted directory has no config.json. Every end token that any of
        them names ends an answer, because chat models list their end of turn in only one of them.
        """
        self._named: dict[str, str] = {}
        named_ids: dict[str, int] = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            entry = settings.get(name)
            text = entry.get("content") if isinstance(entry, dict) else entry
            if text is None:
                continue
            token_id = self._added.get(text, self._plain.token_to_id(text)) if isinstance(text, str) else None
            if token_id is None:
                raise UserError(f"{folder / 'tokenizer_config.json'}: {name} {text!r} is not in tokenizer.json")
            self._named[name], named_ids[name] = text, token_id

        bos = _ids(config.get("bos_token_id"), folder / "config.json", "bos_token_id")
        self.bos_id = named_ids.get("bos_token", bos[0] if bos else None)
        if bos and bos[0] != self.bos_id:
            raise UserError(
                f"{folder}: config.json says bos_token_id {bos[0]}, but in tokenizer.json "
                f"{self._named['bos_token']!r} is {self.bos_id}: this is another model's tokenizer"
            )
        eos = [
            *_ids(generation.get("eos_token_id"), folder / "generation_config.json", "eos_token_id"),
            *_ids(config.get("eos_token_id"), folder / "config.json", "eos_token_id"),
            *([named_ids["eos_token"]] if "eos_token" in named_ids else []),
        ]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(eos))
        if not self.eos_ids:
            raise UserError(
                f"{folder}: neither generation_config.json, config.json nor tokenizer_config.json names an end token"
            )
        for name, token_id in (("bos_token", self.bos_id), ("eos_token", self.eos_ids[0])):
            if token_id in self._added_text:
                self._named.setdefault(name, self._added_text[token_id])
        self._specials = self._added | {self._named[name]: token_id for name, token_id in named_ids.items()}

    def _check_vocabulary(self, vocab_size: int | None) -> None:
        texts: dict[int, str] = {}
        for text, place in self._plain.get_vocab().items():
            if (other := texts.setdefault(place, text)) != text:
                raise UserError(f"{self._path}: {other!r} and {text!r} have the same id, {place}")
        self._last_id = max([*texts, *self._added_text], default=-1)
        if vocab_size is None:
            return
        if self._last_id >= vocab_size:
            raise UserError(f"{self._path}: ids go up to {self._last_id}, but the model's vocab_size is {vocab_size}")
        for token_id in (self.bos_id, *self.eos_ids):
            if token_id is not None and token_id >= vocab_size:
                name = "bos_token_id" if token_id == self.bos_id else "eos_token_id"
                raise UserError(f"{self._path.parent}: {name} {token_id} is not below vocab_size {vocab_size}")

    def _encode_plain(self, text: str, most: int | None = None) -> list[int]:
        """Ids of `text` as text. The check keeps the promise for vocabularies that list control tokens as words.
        (A batch, because the library lets other threads run meanwhile only for those.)"""
        (encoding,) = self._plain.encode_batch_fast([text], add_special_tokens=False)
        if most is not None and len(encoding) > most:
            raise TooLong(f"{len(encoding)} tokens, expected at most {most}")
        ids = encoding.ids
        leaked = self._added_text.keys() & set(ids)
        if leaked:
            raise UserError(f"{self._path}: text turns into the control token {self._added_text[leaked.pop()]!r}")
        return ids

    @cached_property
    def _template(self) -> ChatTemplate:
        """Built on first use, so that a checkpoint with a broken template still serves raw completions."""
        if self._template_source is None:
            raise UserError(f"{self._path.parent}: no chat template in this checkpoint; use --raw for plain completion")
        template = ChatTemplate(self._template_source, self._specials, self._named)
        trimming = self._trimming & template.ids_by_text.keys()
        if trimming:
            raise UserError(f"{self._path}: {trimming.pop()!r} trims the text around it, which is not supported")
        return template


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _ids(value: Any, path: Path, name: str) -> list[int]:
    """One id, a list of ids or nothing, as a list."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise UserError(f"{path}: {name} is {value!r}, expected a token id or a list of them")
    return ids
