"""Builds the demo's tokenizer: bytes, one token per digit, and one token for each word of a short list.

It is a byte-level BPE file without merges. `ignore_merges` makes a whole listed word (with the space before it) one
token without needing the pieces in between, which keeps the vocabulary at 448; every other text falls apart into
bytes. So the scaffold of a question is short, while a word in quotes is letters, which is what spelling needs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from tasks import ASSISTANT, BOS, END_THINK, EOS, NAMES, OPENERS, PAD, PLAIN_WORDS, THINK, USER

VOCAB_SIZE = 448
WORD_PATTERN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SYMBOLS = (" +", " -", " =", ' "')

# Behaves as the template of DeepSeek-R1: an earlier answer loses its thinking, a new one is opened with a think tag.
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for m in messages if m['role'] == 'system' -%}{{- m['content'] -}}{%- endfor -%}"
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'user' -%}{{- '<｜User｜>' + m['content'] -}}"
    "{%- elif m['role'] == 'assistant' -%}"
    "{{- '<｜Assistant｜>' + m['content'].split('</think>')[-1] + eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<｜Assistant｜><think>\\n' -}}{%- endif -%}"
)


def byte_letters() -> dict[int, str]:
    """The printable letter by which byte-level BPE writes each byte: itself where printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def build() -> Tokenizer:
    """The tokenizer: three special tokens, 256 bytes, the listed words, spare entries, and the four chat tokens."""
    letters = byte_letters()

    def spelled(text: str) -> str:
        return "".join(letters[byte] for byte in text.encode())

    words = [*SYMBOLS, *(f" {word}" for word in (*PLAIN_WORDS, *NAMES)), *OPENERS]
    chat = [USER, ASSISTANT, THINK, END_THINK]
    tokens = [BOS, EOS, PAD, *sorted(letters.values()), *map(spelled, words)]
    room = VOCAB_SIZE - len(chat) - len(tokens)
    if room < 0:
        raise ValueError(f"{-room} words too many for a vocabulary of {VOCAB_SIZE}")
    tokens += [f"<spare_{i}>" for i in range(room)] + chat
    if len(set(tokens)) != VOCAB_SIZE:
        raise ValueError("a token is listed twice")

    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (BOS, EOS, PAD)])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in chat])
    return tokenizer


def tokenizer_config() -> dict[str, Any]:
    """The content of tokenizer_config.json, with the chat template inside as in the released models."""

    def entry(token: str) -> dict[str, Any]:
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        return {"__type": "AddedToken", "content": token, **flags}

    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": entry(BOS),
        "clean_up_tokenization_spaces": False,
        "eos_token": entry(EOS),
        "legacy": True,
        "model_max_length": 4096,
        "pad_token": entry(PAD),
        "sp_model_kwargs": {},
        "unk_token": None,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }


def write(folder: Path) -> Tokenizer:
    """Write tokenizer.json and tokenizer_config.json into `folder` and return the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build()
    tokenizer.save(str(folder / "tokenizer.json"), pretty=True)
    text = json.dumps(tokenizer_config(), ensure_ascii=False, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    return tokenizer


if __name__ == "__main__":
    write(Path(__file__).parent / "checkpoint")
