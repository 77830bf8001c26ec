"""A checkpoint's vocabulary: ordinary text to token ids, an id to its bytes, and the tokens that stand beside it.

It is read from tokenizer.json or, where there is none, from tiktoken.model. Either way the encoder knows no control
tokens, so text never turns into one. Ordinary words that were added to a vocabulary belong to it.
"""

import base64
import json
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from core.errors import UserError
from core.files import missing, read_json, read_text, stand_in
from text.detokenizer import LETTER_BYTES
from text.limits import TooLong, refuse_long


@dataclass(frozen=True)
class AddedToken:
    """A control token: one that no text is encoded to."""

    id: int
    text: str
    special: bool  # left out of decoded text
    trims: bool = False  # takes whitespace around it, or counts only as a word of its own


class Vocabulary(Protocol):
    path: Path  # of the file
    added: dict[str, AddedToken]  # by text
    last_word: int  # the last id of a token that text is encoded to
    around: tuple[list[int], list[int]]  # ids that the tokenizer itself puts before and after every text
    sorts_tools: bool  # whether the chat template is given tools with their keys in alphabetical order

    def encode(self, text: str, most: int | None = None) -> list[int]:
        """Raises TooLong for a text of more than `most` tokens, without making a list of them."""
        ...

    def id_of(self, token: str) -> int | None:
        """The id of a token that text is encoded to, by its spelling in the file."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token that text is encoded to; none for an id that is no token."""
        ...


def read_vocabulary(folder: Path, settings: dict[str, Any]) -> Vocabulary:
    """`settings`: the content of tokenizer_config.json. Raises UserError."""
    path, ranks = folder / "tokenizer.json", folder / "tiktoken.model"
    if path.exists():
        return JsonVocabulary(path, settings)
    if os.path.lexists(ranks) and not path.is_symlink():
        return TiktokenVocabulary(ranks, settings)
    raise missing(path, "no such file; copy the tokenizer files beside the weights")


class JsonVocabulary:
    """tokenizer.json of the tokenizers library, with a byte-level decoder."""

    sorts_tools = False

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        raw = read_json(path)
        decoder = raw.get("decoder") or {}
        chain = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
        kinds = [step.get("type") for step in chain]
        if "ByteLevel" not in kinds or set(kinds) - {"ByteLevel", "Fuse"}:
            raise UserError(f"{path}: decoder {kinds} is not supported (known: ByteLevel)")
        try:
            added = raw.get("added_tokens") or []
            declared = _declared_texts(settings)
            words = [token for token in added if not token.get("special") and _is_word(token["content"], declared)]
            model = raw["model"]["vocab"]
            # a word that the model has besides, such as a single letter, is written in byte letters as all its tokens
            self._words = {int(token["id"]): token["content"] for token in words if token["content"] not in model}
            self.added = {
                token["content"]: AddedToken(
                    int(token["id"]), token["content"], bool(token.get("special")),
                    any(token.get(option) for option in ("lstrip", "rstrip", "single_word")))
                for token in added if token not in words
            }  # fmt: skip
            kept = _without_control_tokens(model, added, words)
            text_only = raw | {"added_tokens": kept, "truncation": None, "padding": None, "post_processor": None}
            self._library = tokenizers.Tokenizer.from_str(json.dumps(text_only))
            self.around = _tokens_around(raw.get("post_processor"))
        except Exception as e:  # the tokenizers library raises nothing more precise
            raise UserError(f"{path}: not a usable tokenizer ({e})") from None
        for token_id, text in self._words.items():
            if (other_id := self._library.token_to_id(text)) != token_id:
                raise UserError(f"{path}: the added token {text!r} has id {token_id}, expected {other_id}")
        texts: dict[int, str] = {}
        for text, token_id in self._library.get_vocab(with_added_tokens=False).items():
            if (other := texts.setdefault(token_id, text)) != text:
                raise UserError(f"{path}: {other!r} and {text!r} have the same id, {token_id}")
        self.last_word = max([*texts, *self._words], default=-1)

    def encode(self, text: str, most: int | None = None) -> list[int]:
        if most is not None:
            refuse_long(text, most, lambda piece: len(self._encode(piece)))
        encoding = self._encode(text)
        if most is not None and len(encoding) > most:
            raise TooLong(len(encoding), most, is_all=True)
        return encoding.ids

    def _encode(self, text: str) -> tokenizers.Encoding:
        # a batch, because the library lets other threads run meanwhile only for those
        return self._library.encode_batch_fast([text], add_special_tokens=False)[0]

    def id_of(self, token: str) -> int | None:
        return self._library.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._words:
            return self._words[token_id].encode()
        token = self._library.id_to_token(token_id) if token_id >= 0 else None
        try:
            return bytes(LETTER_BYTES[letter] for letter in token or "")
        except KeyError:  # not written in byte letters, so it is the text itself
            return (token or "").encode()


def _is_word(text: str, declared: set[str]) -> bool:
    """Whether an added token that is not marked as special is an ordinary word, such as people add before training: not
    one of `declared`, and without the brackets and bars of control tokens."""
    return text not in declared and not set(text) & set("<>[]{}|｜")


def _declared_texts(settings: dict[str, Any]) -> set[str]:
    """The tokens that tokenizer_config.json calls special."""
    entries = [value for key, value in settings.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key)
        entries += more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
    return {str(entry.get("content") if isinstance(entry, dict) else entry) for entry in entries}


def _without_control_tokens(
    vocabulary: Any, added: list[dict[str, Any]], words: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The added tokens of a tokenizer.json that text may become, `words`, with their ids: the library numbers added
    tokens in their order, so each control token leaves one behind that nobody can spell."""
    if not words:
        return []
    secret = secrets.token_hex(16)
    return [
        token if token in words else token | {"content": f"{secret} {token['id']}"}
        for token in added
        if token in words or token["content"] not in vocabulary
    ]


def _tokens_around(post_processor: dict[str, Any] | None) -> tuple[list[int], list[int]]:
    """What a tokenizer.json's post-processor puts before and after a text, found out with a text of one token."""
    word = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    minimal: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": None, "post_processor": post_processor, "decoder": None, "model": word,
    }  # fmt: skip
    encoding = tokenizers.Tokenizer.from_str(json.dumps(minimal)).encode("a")
    at = encoding.special_tokens_mask.index(0)
    return encoding.ids[:at], encoding.ids[at + 1 :]


# What follows is of `TikTokenTokenizer` in moonshotai's tokenization_moonshot.py and tokenization_kimi.py, which come
# with Moonlight and Kimi. They are programs, and are not run.
CLASSES = ("tokenization_moonshot.TikTokenTokenizer", "tokenization_kimi.TikTokenTokenizer")
LETTERS = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
PATTERN = "|".join((
    r"[\p{Han}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{LETTERS}]*[\p{{Ll}}{LETTERS}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{LETTERS}]+[\p{{Ll}}{LETTERS}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
))  # fmt: skip
N_RESERVED = 256  # special tokens after the vocabulary; tokenizer_config.json names some
MAX_PART = 400_000  # characters that are encoded together
MAX_RUN = 25_000  # of them without whitespace, or of whitespace alone
LONG_RUN = re.compile(rf"(?<!\S)\S{{{MAX_RUN + 1},}}|(?<!\s)\s{{{MAX_RUN + 1},}}")


class TiktokenVocabulary:
    """tiktoken.model: byte strings in the order in which they merge. The split into words is in PATTERN, the names of
    the special tokens are in tokenizer_config.json."""

    around: tuple[list[int], list[int]] = ([], [])
    sorts_tools = True  # by the class's apply_chat_template

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        _require_known_class(path, settings)
        self._ranks = _read_ranks(path)
        self._bytes = list(self._ranks)
        self.last_word = len(self._bytes) - 1
        reserved = range(len(self._bytes), len(self._bytes) + N_RESERVED)
        named = _named_special_tokens(path.parent / "tokenizer_config.json", settings, reserved)
        added = (named.get(i) or AddedToken(i, f"<|reserved_token_{i}|>", special=True) for i in reserved)
        self.added = {token.text: token for token in added}
        try:
            import tiktoken
        except ImportError:
            raise UserError(f"{path}: needs the package tiktoken; pip install -r requirements.txt") from None
        self._library = tiktoken.Encoding(path.name, pat_str=PATTERN, mergeable_ranks=self._ranks, special_tokens={})

    def encode(self, text: str, most: int | None = None) -> list[int]:
        parts, n = [], 0
        for part in split_long_runs(text):
            parts.append(self._library.encode_to_numpy(part))
            n += len(parts[-1])
            if most is not None and n > most:
                raise TooLong(n, most, is_all=False)
        return [token_id for part in parts for token_id in part.tolist()]

    def id_of(self, token: str) -> int | None:
        return self._ranks.get(token.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""


def split_long_runs(text: str) -> Iterator[str]:
    """The parts in which the released class encodes a long text: of at most MAX_PART characters, and cut within every
    run of more than MAX_RUN characters that are all whitespace or all not. It bounds the time that a part takes."""
    for start in range(0, len(text), MAX_PART):
        part, begin = text[start : start + MAX_PART], 0
        for run in LONG_RUN.finditer(part):
            for end in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                yield part[begin:end]
                begin = end
        yield part[begin:]


def _require_known_class(path: Path, settings: dict[str, Any]) -> None:
    """Raises UserError for a tokenizer that splits words in a way that is not known here."""
    if not settings:
        raise UserError(f"{path}: there is no tokenizer_config.json beside it; copy it too")
    found = settings.get("tokenizer_class")
    mapped = settings.get("auto_map")
    mapped = mapped.get("AutoTokenizer") if isinstance(mapped, dict) else mapped
    code = [str(name).rpartition("--")[2] for name in (mapped if isinstance(mapped, list) else [mapped]) if name]
    if found != "TikTokenTokenizer" or not set(code) <= set(CLASSES):
        name = ", ".join([repr(found), *code])
        raise UserError(f"{path}: tokenizer_config.json's tokenizer_class {name} is not known (known: those of "
                        "Moonlight and Kimi, TikTokenTokenizer); convert the tokenizer to tokenizer.json")  # fmt: skip


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Every token's bytes and id, in the order of the ids. A line of the file has the bytes in base64, and the id."""
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as e:
        raise stand_in(path) or UserError(f"{path}: not readable as text ({e})") from None
    if (pointer := stand_in(path)) is not None:
        raise pointer
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(lines, 1):
        if line:
            try:
                token, rank = line.split()
                tokens[int(rank)] = base64.b64decode(token, validate=True)
            except ValueError:
                says = f"line {number} is {line[:60]!r}, expected a token in base64 and its id"
                raise UserError(f"{path}: {says}") from None
    ranks = {tokens[i]: i for i in range(len(tokens)) if i in tokens}
    if len(ranks) < len(tokens):
        raise UserError(f"{path}: {len(tokens)} tokens, expected all different, with the ids from 0 on")
    absent = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if absent is not None:
        raise UserError(f"{path}: {len(ranks)} tokens, and none is the byte {absent:#04x} alone")
    return ranks


def _named_special_tokens(path: Path, settings: dict[str, Any], reserved: range) -> dict[int, AddedToken]:
    """The special tokens that tokenizer_config.json, at `path`, names, by id."""
    named: dict[int, AddedToken] = {}
    given = settings.get("added_tokens_decoder") or {}
    if not isinstance(given, dict):
        raise UserError(f"{path}: added_tokens_decoder is {type(given).__name__}, expected an object of tokens by id")
    for key, entry in given.items():
        token_id = int(key) if key.isdecimal() else -1
        text = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(text, str) or token_id not in reserved:
            expected = f"an id from {reserved[0]} to {reserved[-1]} and its token"
            raise UserError(f"{path}: added_tokens_decoder has {key!r}: {text!r}, expected {expected}")
        trims = any(entry.get(option) for option in ("lstrip", "rstrip", "single_word"))
        named[token_id] = AddedToken(token_id, text, bool(entry.get("special")), trims)
    if len({token.text for token in named.values()}) < len(named):
        raise UserError(f"{path}: added_tokens_decoder names a token twice")
    return named
