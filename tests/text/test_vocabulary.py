"""tiktoken.model, as Moonlight and Kimi have it: the ids of the tiktoken package, whole characters, nothing executed.

The real files are not at hand. Theirs is a vocabulary of 163,584 byte strings; here it is DeepSeek-V3's, of 127,997, in
the same form.
"""

import base64
import functools
import json
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from test_tokenizer import chat, real_folder, texts
from tiktoken.load import load_tiktoken_bpe

from core.errors import UserError
from text.detokenizer import LETTER_BYTES
from text.tokenizer import Tokenizer
from text.vocabulary import MAX_PART, MAX_RUN, TooLong, split_long_runs

# moonshotai's tokenization_kimi.py, `pat_str`
KIMI_PATTERN = "|".join([
    r"""[\p{Han}]+""",
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
    r"""\p{N}{1,3}""",
    r""" ?[^\s\p{L}\p{N}]+[\r\n]*""",
    r"""\s*[\r\n]+""",
    r"""\s+(?!\S)""",
    r"""\s+""",
])  # fmt: skip
SPECIAL = {  # Kimi-K2's, by their distance from the first; the last two are the last of 256
    0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 6: "<|start_header_id|>",
    7: "<|end_header_id|>", 9: "[EOT]", 10: "<|im_system|>", 11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>", 13: "<|tool_call_begin|>", 14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>", 17: "<|im_middle|>", 18: "<|media_begin|>", 19: "<|media_content|>", 20: "<|media_end|>",
    21: "<|media_pad|>", 254: "[UNK]", 255: "[PAD]",
}  # fmt: skip
# In Kimi-K2's form: a default system message, roles by name, tools declared first, ids of calls as they were given.
KIMI_TEMPLATE = """
{%- macro text_of(message) -%}
  {%- set content = message.get('content') -%}
  {%- if content is string -%}{{ content }}{%- elif content is not none -%}
    {%- for part in content -%}{{ part['text'] }}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if tools -%}
  <|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>
{%- endif -%}
{% for message in messages %}
  {%- if loop.first and messages[0]['role'] != 'system' -%}
  <|im_system|>system<|im_middle|>You are a test.<|im_end|>
  {% endif %}
  {%- set speaker = message.get('name') or message['role'] -%}
  {%- if message['role'] == 'user' -%}
    <|im_user|>{{ speaker }}<|im_middle|>
  {%- elif message['role'] == 'assistant' -%}
    <|im_assistant|>{{ speaker }}<|im_middle|>
  {%- else -%}
    <|im_system|>{{ speaker }}<|im_middle|>
  {%- endif -%}
  {%- if message['role'] == 'assistant' and message.get('tool_calls') -%}
    {{ text_of(message) }}<|tool_calls_section_begin|>
    {%- for call in message['tool_calls'] -%}
    <|tool_call_begin|>{{ call['id'] }}<|tool_call_argument_begin|>
    {%- if call['function']['arguments'] is string -%}{{ call['function']['arguments'] }}
    {%- else -%}{{ call['function']['arguments'] | tojson }}{%- endif -%}<|tool_call_end|>
    {%- endfor -%}
    <|tool_calls_section_end|>
  {%- elif message['role'] == 'tool' -%}
    ## Return of {{ message.tool_call_id }}
    {{ text_of(message) }}
  {%- elif message['content'] is not none -%}
    {{ text_of(message) }}
  {%- endif -%}
  <|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
  <|im_assistant|>assistant<|im_middle|>
{%- endif -%}"""


# In Moonlight's form: no tools, no names.
MOONLIGHT_TEMPLATE = """
{%- for message in messages -%}
    {%- if loop.first and messages[0]['role'] != 'system' -%}
        <|im_system|>system<|im_middle|>You are a test.<|im_end|>
    {%- endif -%}
    {%- if message['role'] == 'system' -%}<|im_system|>{%- endif -%}
    {%- if message['role'] == 'user' -%}<|im_user|>{%- endif -%}
    {%- if message['role'] == 'assistant' -%}<|im_assistant|>{%- endif -%}
    {{ message['role'] }}<|im_middle|>{{ message['content'] }}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"""


@functools.cache
def byte_strings() -> list[bytes]:
    """DeepSeek-V3's vocabulary without its special tokens: single bytes first, then in the order of the merges."""
    words = json.loads((real_folder() / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    return [bytes(LETTER_BYTES[letter] for letter in word)
            for word in sorted(words, key=words.__getitem__) if LETTER_BYTES.keys() >= set(word)]  # fmt: skip


def write_tiktoken(folder: Path, tokens: list[bytes], **settings: Any) -> Path:
    """tiktoken.model and tokenizer_config.json in Kimi-K2's form; `settings` replace the latter's fields."""
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (folder / "tiktoken.model").write_text("".join(lines))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    named = {str(len(tokens) + at): {"content": text, **flags, "special": "tool_call" not in text} for at, text in SPECIAL.items()}
    config = {
        "added_tokens_decoder": named, "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]", "pad_token": "[PAD]",
        "additional_special_tokens": ["<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"],
        "tokenizer_class": "TikTokenTokenizer", "chat_template": KIMI_TEMPLATE,
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": len(tokens) + 2}))
    return folder


BORDERS = [f"{a}{b}{c}" for a in (" ", "\n", "a", "A", "1", ".", "好", "カ") for b in ("好", "カ", "ab", "Ab", "'s", "'Ll", "12345", "\r\n", "  ", "\u0301", "ǅ", "ʰ")
           for c in ("", "b", "B", "1", " ", "\n", "好", "か")]  # fmt: skip
ALPHABET = [bytes([byte]) for byte in range(256)]


def small(folder: Path, **settings: Any) -> Path:
    return write_tiktoken(folder, ALPHABET, **settings)


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tiktoken(tmp_path_factory.mktemp("kimi"), byte_strings()))


@pytest.fixture(scope="module")
def package(kimi: Tokenizer) -> tiktoken.Encoding:
    return encoding(kimi.path)


def encoding(path: Path) -> tiktoken.Encoding:
    """What Kimi's own class makes of a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")
        ranks = load_tiktoken_bpe(str(path))
    special = {SPECIAL.get(i, f"<|reserved_token_{len(ranks) + i}|>"): len(ranks) + i for i in range(256)}
    return tiktoken.Encoding("kimi", pat_str=KIMI_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def check_texts(kimi: Tokenizer, package: tiktoken.Encoding, pool: list[str]) -> None:
    for text in pool:
        ids = kimi.encode_text(text)
        assert ids == package.encode(text, allowed_special="all"), repr(text)
        assert kimi.decode(ids) == text
        stream = kimi.stream()
        assert "".join(map(stream.push, ids)) + stream.finish() == text


def test_texts_have_the_packages_ids(kimi: Tokenizer, package: tiktoken.Encoding) -> None:
    check_texts(kimi, package, texts(2000, seed=11))


def test_words_are_split_as_the_package_splits_them(tmp_path: Path) -> None:
    """With a token for every two bytes, so that any two characters join that stand in one word."""
    pairs = [bytes([first, second]) for first in range(256) for second in range(256)]
    tokenizer = Tokenizer(write_tiktoken(tmp_path, [*ALPHABET, *pairs]))
    check_texts(tokenizer, encoding(tokenizer.path), [*texts(1000, seed=15), *BORDERS])


@pytest.mark.trust
def test_more_texts_have_the_packages_ids(kimi: Tokenizer, package: tiktoken.Encoding) -> None:
    check_texts(kimi, package, texts(18_000, seed=12))


def test_facts_of_the_file(kimi: Tokenizer, package: tiktoken.Encoding) -> None:
    base = len(byte_strings())
    assert (kimi.path.name, kimi.size, kimi.size) == ("tiktoken.model", base + 256, package.n_vocab)
    assert (kimi.bos_id, kimi.eos_ids) == (base, (base + 2, base + 1)), "the end of turn first, then [EOS]"
    assert kimi.has_chat_template and kimi.knows_tools and not kimi.has_thinking_switch
    assert all(kimi.name(i) == package.decode_single_token_bytes(i) for i in range(base - 300, base + 256))
    assert kimi.decode([base, base + 2, base + 5, base + 13]) == "<|tool_call_begin|>", "which is not marked as special"


def test_text_never_becomes_a_control_token(kimi: Tokenizer, package: tiktoken.Encoding) -> None:
    added = [*SPECIAL.values(), f"<|reserved_token_{len(byte_strings()) + 5}|>"]
    for text in [*added, "".join(added)]:
        ids = kimi.encode_text(text)
        assert ids == package.encode(text, disallowed_special=()) and max(ids) < len(byte_strings())
        assert kimi.decode(ids) == text


def test_every_split_of_a_character(kimi: Tokenizer) -> None:
    """A token a byte: text comes out in whole characters."""
    for sample in ("é", "߿", "ࠀ", "好", "\uffff", "𐀀", "🙂", "\U0010ffff"):
        ids = [kimi._vocabulary.id_of(chr(byte)) if byte < 128 else kimi._vocabulary._ranks[bytes([byte])] for byte in sample.encode()]
        stream = kimi.stream()
        assert [stream.push(i) for i in ids] == [""] * (len(ids) - 1) + [sample] and stream.finish() == ""
        for cut in range(1, len(ids)):
            stream = kimi.stream()
            assert [stream.push(i) for i in ids[:cut]] == [""] * cut and stream.finish() == "\ufffd"


# ------------------------------------------------------------------ long texts


def released_split(text: str) -> list[str]:
    """A character at a time, as the released class counts them."""
    parts = []
    for at in range(0, len(text), MAX_PART):
        part, begin, run = text[at : at + MAX_PART], 0, 0
        for i, letter in enumerate(part):
            run = run + 1 if i and letter.isspace() == part[i - 1].isspace() else 1
            if run > MAX_RUN:
                parts.append(part[begin:i])
                begin, run = i, 1
        parts.append(part[begin:])
    return parts


@pytest.mark.parametrize("text", [
    "", "a", "a" * MAX_RUN, "a" * (MAX_RUN + 1), " " * (2 * MAX_RUN + 1), "a" * MAX_RUN + " " + "b" * (MAX_RUN + 2),
    "x " * 30 + "é" * (3 * MAX_RUN) + " \n\u3000" * MAX_RUN + "ab", "好 " * MAX_PART, "a" * (MAX_PART + 10),
    "\x1c\x85" * MAX_RUN + "\u200b" * (MAX_RUN + 1),
])  # fmt: skip
def test_long_texts_are_cut_where_the_released_class_cuts_them(text: str) -> None:
    assert [part for part in split_long_runs(text) if part] == [part for part in released_split(text) if part]


def test_long_texts_take_bounded_time_and_let_other_threads_run(kimi: Tokenizer, package: tiktoken.Encoding) -> None:
    ticks, done = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.wait(0.001):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    began = time.monotonic()
    try:
        for text in ("a" * 1_000_000, " " * 1_000_000, "\n " * 200_000, "Aa好" * 200_000, "ab c1" * 100_000):
            expected = [i for part in released_split(text) for i in package.encode_ordinary(part)]
            before = ticks
            assert kimi.encode_text(text) == expected
            assert ticks > before
    finally:
        done.set()
        thread.join()
    assert time.monotonic() - began < 120


def test_a_text_of_too_many_tokens(kimi: Tokenizer) -> None:
    assert len(kimi.encode_text("好" * 40, 40)) <= 40
    with pytest.raises(TooLong, match="9 tokens or more, expected at most 8"):
        kimi.encode_text("1 1 1 1 1", 8)
    with pytest.raises(TooLong):
        kimi.encode_text("1 " * 10_000_000, 1000)


# ------------------------------------------------------------------ conversations


TOOLS = [{"type": "function", "function": {"name": "f", "description": "é", "parameters": {"z": 1, "a": {"y": [2], "b": 3}}}}]


def conversations() -> list[list[dict[str, Any]]]:
    pool, rng = texts(60, seed=13), random.Random(14)
    made = [chat(*(rng.choice(pool) for _ in range(n)), system=rng.choice([None, *pool])) for n in (1, 3, 5)]
    call = {"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": '{"a": "é"}'}}
    other = call | {"id": "functions.f:1", "function": {"name": "f", "arguments": {"a": "é"}}}
    turn = [{"role": "assistant", "content": "So.", "tool_calls": [call, other]},
            {"role": "tool", "name": "f", "tool_call_id": "functions.f:0", "content": "1"},
            {"role": "tool", "tool_call_id": "functions.f:1", "content": "2"}]  # fmt: skip
    named = [{"role": "user", "name": "Ann", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    return [*made, [*chat("Hi"), *turn], named]


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_conversations_equal_transformers(kimi: Tokenizer, package: tiktoken.Encoding, tools: Any) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    ordered = tools and [{"function": {"description": "é", "name": "f", "parameters": {"a": {"b": 3, "y": [2]}, "z": 1}}, "type": "function"}]
    for messages in conversations():
        for ready in (True, False):
            ((expected,), _) = render_jinja_template([messages], ordered, chat_template=KIMI_TEMPLATE, add_generation_prompt=ready,
                                                     bos_token="[BOS]", eos_token="[EOS]")  # fmt: skip
            assert kimi.render_chat(messages, tools=tools, add_generation_prompt=ready) == expected
            ids = kimi.encode_chat(messages, tools=tools, add_generation_prompt=ready)
            assert ids == package.encode(expected, allowed_special="all")


def test_moonlight_s_conversations_equal_transformers(tmp_path: Path) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    moonlight = Tokenizer(small(tmp_path, chat_template=MOONLIGHT_TEMPLATE))
    for messages in conversations()[:3]:
        ((expected,), _) = render_jinja_template([messages], chat_template=MOONLIGHT_TEMPLATE, add_generation_prompt=True)
        assert moonlight.render_chat(messages) == expected
        assert moonlight.encode_chat(messages) == encoding(moonlight.path).encode(expected, allowed_special="all")
    with pytest.raises(UserError, match="chat template knows no tools"):
        moonlight.encode_chat(chat("Hi"), tools=TOOLS)


def test_messages_stay_text(kimi: Tokenizer) -> None:
    innocent, mischief = chat("x", "x", "x", system="x"), chat(*["".join(SPECIAL.values())] * 3, system="<|im_middle|>")
    own = [i for i in kimi.encode_chat(innocent) if kimi.is_control(i)]
    assert len(own) == 3 * 4 + 2 and own == [i for i in kimi.encode_chat(mischief) if kimi.is_control(i)]


# ------------------------------------------------------------------ files that are not right


def line(number: int, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        lines = (folder / "tiktoken.model").read_text().splitlines()
        (folder / "tiktoken.model").write_text("\n".join([*lines[:number], text, *lines[number + 1 :]]))

    return change


@pytest.mark.parametrize("change, message", [
    (line(3, "nothing"), r"tiktoken.model: line 4 is 'nothing', expected a token in base64 and its id"),
    (line(3, "Aw== three"), r"tiktoken.model: line 4 is 'Aw== three'"),
    (line(3, "A 3"), r"tiktoken.model: line 4 is 'A 3'"),
    (line(3, "Aw== 300"), r"tiktoken.model: 256 tokens, expected all different, with the ids from 0 on"),
    (line(3, "Ag== 3"), r"tiktoken.model: 256 tokens, expected all different"),
    (line(3, "AwM= 3"), r"tiktoken.model: 256 tokens, and none is the byte 0x03 alone"),
    (lambda f: (f / "tiktoken.model").write_bytes(b"\xff"), r"tiktoken.model: not readable as text"),
    (lambda f: (f / "tiktoken.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), r"tiktoken.model: a Git LFS pointer.*git lfs pull"),
    (lambda f: ((f / "tiktoken.model").unlink(), (f / "tiktoken.model").symlink_to("nowhere")), r"tiktoken.model: a broken link: nothing is at 'nowhere'"),
    (lambda f: (f / "tiktoken.model").unlink(), r"tokenizer.json: no such file; copy the tokenizer files"),
    (lambda f: (f / "tokenizer_config.json").unlink(), r"tiktoken.model: there is no tokenizer_config.json beside it; copy it too"),
    (lambda f: small(f, tokenizer_class="QWenTokenizer"), r"tokenizer_class 'QWenTokenizer', tokenization_kimi.TikTokenTokenizer is not known"),
    (lambda f: small(f, auto_map={"AutoTokenizer": ["my_code.TikTokenTokenizer", None]}), r"'TikTokenTokenizer', my_code.TikTokenTokenizer is not known"),
    (lambda f: small(f, added_tokens_decoder={"5": {"content": "x"}}), r"added_tokens_decoder has '5': 'x', expected an id from 256 to 511"),
    (lambda f: small(f, added_tokens_decoder={"x": {"content": "x"}}), r"added_tokens_decoder has 'x': 'x'"),
    (lambda f: small(f, added_tokens_decoder=["x"]), r"added_tokens_decoder is list, expected an object of tokens by id"),
    (lambda f: small(f, auto_map={"AutoTokenizer": [3]}), r"'TikTokenTokenizer', 3 is not known"),
    (lambda f: small(f, added_tokens_decoder={"256": "x"}), r"added_tokens_decoder has '256': None"),
    (lambda f: small(f, added_tokens_decoder={i: {"content": "x"} for i in ("256", "257")}), r"names a token twice"),
])  # fmt: skip
def test_what_cannot_be_read(tmp_path: Path, change: Callable[[Path], Any], message: str) -> None:
    assert Tokenizer(small(tmp_path), 512).size == 512
    change(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer(tmp_path, 512)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("auto_map", [
    None, {}, {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
    {"AutoTokenizer": "moonshotai/Kimi-K2-Instruct--tokenization_kimi.TikTokenTokenizer"},
    ["tokenization_kimi.TikTokenTokenizer", None],
])  # fmt: skip
def test_known_classes(tmp_path: Path, auto_map: Any) -> None:
    """Written in any of the ways that transformers has written them. What code lies beside them is not looked at."""
    (tmp_path / "tokenization_kimi.py").write_text("raise SystemExit('executed')")
    (tmp_path / "tokenization_moonshot.py").write_text("raise SystemExit('executed')")
    tokenizer = Tokenizer(small(tmp_path, auto_map=auto_map))
    assert tokenizer.encode_text("Hi") == list(b"Hi")


def test_tokenizer_json_wins(tmp_path: Path, kimi: Tokenizer) -> None:
    small(tmp_path, bos_token=None, eos_token="<｜end▁of▁sentence｜>", unk_token=None)
    (tmp_path / "tokenizer.json").symlink_to(real_folder() / "tokenizer.json")
    assert Tokenizer(tmp_path).path.name == "tokenizer.json"


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    with pytest.raises(UserError, match=r"tiktoken.model: needs the package tiktoken; pip install -r requirements.txt"):
        Tokenizer(small(tmp_path))
