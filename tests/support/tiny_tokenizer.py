"""A tokenizer for tiny checkpoints: one token a byte, V3's control tokens, a chat template in V3's form."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
VOCAB_SIZE = 320  # rows of the embedding, the last of them unused; divides by 2, 4 and 8


def write_tokenizer(folder: Path, template: str | None = TEMPLATE, more: tuple[str, ...] = ()) -> None:
    """Writes tokenizer.json and tokenizer_config.json: BOS 0, EOS 1, a pad token, 256 bytes, User, Assistant, and `more`
    control tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [BOS, EOS, "<｜▁pad▁｜>", *letters, "<｜User｜>", "<｜Assistant｜>", *more]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens[:3]])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens[259:]])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": True}  # as in the repositories of V3 and R1
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")


def write_words(folder: Path, words: list[str], special: list[str]) -> Tokenizer:
    """Writes a tokenizer.json alone whose first tokens are `words`, then the other bytes, then `special` ones."""
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(words))
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*words, *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer
