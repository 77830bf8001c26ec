"""Which tokens begin a text, end an answer, and are left out of decoded text.

The tokenizer's own files and generation_config.json say so. config.json is asked last: transformers writes its config
classes' defaults there, and in another model's vocabulary those ids are ordinary words.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import UserError
from text.vocabulary import Vocabulary

NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
SPELLING = re.compile(r"<[|｜].+[|｜]>")  # of control tokens
# BOS and EOS by default: 0 and 1 in transformers' DeepseekV3Config and Glm4MoeLiteConfig, 1 and 2 in DeepseekV2Config,
# 100000 and 100001 in configuration_deepseek.py of DeepSeek-V2's repositories.
DEFAULTS = frozenset({0, 1, 2, 100_000, 100_001})


@dataclass
class SpecialTokens:
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()  # each ends an answer
    named: dict[str, str] = field(default_factory=dict)  # the text of `bos_token` and its like, which templates may use
    missing: dict[str, str] = field(default_factory=dict)  # such names whose token the vocabulary does not have
    declared: dict[str, int] = field(default_factory=dict)  # every token that tokenizer_config.json calls special
    ignored: list[str] = field(default_factory=list)  # what files say that does not hold for this vocabulary


def find_special_tokens(
    vocabulary: Vocabulary,
    folder: Path,
    settings: dict[str, Any],
    generation: dict[str, Any],
    config: dict[str, Any],
    vocab_size: int | None,
) -> SpecialTokens:
    """What tokenizer_config.json, generation_config.json and config.json of `folder` say together; any may be empty.

    Raises UserError for files that contradict each other, and where no token ends an answer.
    """
    found = SpecialTokens()
    own = _declare(found, vocabulary, folder / "tokenizer_config.json", settings, vocab_size)
    files = (("generation_config.json", generation), ("config.json", config))
    bos, eos = ([_ids(content.get(key), folder / name, key, vocab_size) for name, content in files]
                for key in ("bos_token_id", "eos_token_id"))  # fmt: skip

    other = next((i for i in bos[1] if i not in DEFAULTS | {own.get("bos_token")}), None)
    if "bos_token" in own and other is not None and bos[0] != [own["bos_token"]]:
        raise UserError(
            f"{folder}: config.json says bos_token_id {other}, but in {vocabulary.path.name} "
            f"{found.named['bos_token']!r} is {own['bos_token']}: this is another model's tokenizer"
        )

    texts = {token.id: token.text for token in vocabulary.added.values()}
    special = {token.id for token in vocabulary.added.values() if token.special} | set(found.declared.values())

    def control_tokens(file: int, key: str, ids: list[int]) -> list[int]:
        """Those of `ids` that are control tokens. An added token that is not special is one for the file that is
        written by hand."""
        chosen = []
        for i in ids:
            text = texts.get(i, vocabulary.token_bytes(i).decode("utf-8", "replace"))
            if i in special or SPELLING.fullmatch(text) or (file == 0 and i in texts):
                chosen.append(i)
            else:
                what = f"{text!r}, an ordinary word" if text else f"no token of {vocabulary.path.name}"
                found.ignored.append(f"{files[file][0]}: {key} {i} is {what}")
        return chosen

    begins, ends = ([control_tokens(n, key, ids[n]) for n in (0, 1)]
                    for key, ids in (("bos_token_id", bos), ("eos_token_id", eos)))  # fmt: skip
    found.bos_id = next(iter([own["bos_token"]] if "bos_token" in own else begins[0] or begins[1]), None)
    # every end token that either names: chat models list their end of turn in only one of them
    ended = ends[0] + ([own["eos_token"]] if "eos_token" in own else [])
    found.eos_ids = tuple(dict.fromkeys(ended or ends[1]))
    if not found.eos_ids:
        why = f" ({'; '.join(found.ignored)})" if found.ignored else ""
        raise UserError(
            f"{folder}: neither generation_config.json, config.json nor tokenizer_config.json names an end token{why}"
        )
    if not settings:
        for name, token_id in (("bos_token", found.bos_id), ("eos_token", found.eos_ids[0])):
            if token_id in texts:
                found.named[name] = texts[token_id]
    return found


def _declare(
    found: SpecialTokens, vocabulary: Vocabulary, path: Path, settings: dict[str, Any], vocab_size: int | None
) -> dict[str, int]:
    """Fills in what tokenizer_config.json, at `path`, says; returns the ids of `bos_token` and its like."""
    own: dict[str, int] = {}

    def look_up(entry: Any) -> tuple[str | None, int | None]:
        text = entry.get("content") if isinstance(entry, dict) else entry
        if text is None or not isinstance(text, str):
            return text, None
        token = vocabulary.added.get(text)
        return text, vocabulary.id_of(text) if token is None else token.id

    for name in NAMES:
        text, token_id = look_up(settings.get(name))
        if text is None:
            continue
        if token_id is None and name in ("bos_token", "eos_token"):
            raise UserError(f"{path}: {name} {text!r} is not in {vocabulary.path.name}")
        if token_id is None or (name not in ("bos_token", "eos_token") and vocab_size and token_id >= vocab_size):
            found.missing[name] = str(text)
        else:
            found.named[name], own[name] = text, token_id
            found.declared[text] = token_id
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key)
        for entry in more.values() if isinstance(more, dict) else more if isinstance(more, list) else []:
            text, token_id = look_up(entry)
            if text is not None and token_id is not None:
                found.declared[text] = token_id
            elif text is not None:
                found.ignored.append(f"{path.name}: {key} has {text!r}, no token of {vocabulary.path.name}")
    decoder, file = settings.get("added_tokens_decoder"), vocabulary.path.name
    for key, entry in decoder.items() if isinstance(decoder, dict) else ():
        text, token_id = look_up(entry)
        if str(token_id) != key:
            what = "no token" if token_id is None else f"token {token_id}"
            found.ignored.append(f"{path.name}: added_tokens_decoder has {text!r} as {key}, {what} of {file}")
    return own


def _ids(value: Any, path: Path, name: str, vocab_size: int | None) -> list[int]:
    """One id, a list of ids or nothing, as a list."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise UserError(f"{path}: {name} is {value!r}, expected a token id or a list of them")
    beyond = next((i for i in ids if vocab_size is not None and i >= vocab_size and i not in DEFAULTS), None)
    if beyond is not None:
        raise UserError(f"{path}: {name} {beyond} is not below vocab_size {vocab_size}")
    return ids
