"""Where a text begins and an answer ends, in checkpoints as transformers writes them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_tokenizer import real_folder, texts
from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Library
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DeepseekV2Config,
    DeepseekV3Config,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from core.errors import UserError
from support.tiny_tokenizer import write_words
from text.tokenizer import Tokenizer

WORDS = ["!", '"', "#", "Ġa", "Ġb"]  # first those with the ids that are DeepseekV3Config's defaults
BOS, EOS, TURN = "<s>", "</s>", "<|im_end|>"  # 258 to 260


def save(
    folder: Path, *, config: dict[str, Any] | None = None, generation: dict[str, Any] | None = None,
    change: Callable[[Any], Any] = lambda library: None, **settings: Any,
) -> Path:  # fmt: skip
    """A checkpoint's text files as transformers' save_pretrained writes them."""
    library = write_words(folder, WORDS, [BOS, EOS, TURN])
    change(library)
    PreTrainedTokenizerFast(tokenizer_object=library, **settings).save_pretrained(folder)
    DeepseekV3Config(vocab_size=library.get_vocab_size(), **(config or {})).save_pretrained(folder)
    if generation is not None:
        GenerationConfig(**generation).save_pretrained(folder)
    return folder


def peer(folder: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_stale_defaults_are_words(tmp_path: Path) -> None:
    save(tmp_path, bos_token=BOS, eos_token=EOS)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (0, 1), "the defaults of the class"
    tokenizer, theirs = Tokenizer(tmp_path), peer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))
    text = '!"# !'
    ids = tokenizer.encode_text(text)
    assert ids == theirs(text)["input_ids"] and {0, 1, 2} <= set(ids)
    assert tokenizer.decode(ids) == text == "".join(map(tokenizer.stream().push, ids)), "no word is hidden"
    assert [line.split(",")[0] for line in tokenizer.ignored] == [
        "config.json: bos_token_id 0 is '!'", "config.json: eos_token_id 1 is '\"'"
    ]  # fmt: skip


def test_stale_defaults_in_generation_config(tmp_path: Path) -> None:
    """transformers makes a model's generation config of its config."""
    save(tmp_path, bos_token=BOS, eos_token=EOS)
    GenerationConfig.from_model_config(AutoConfig.from_pretrained(tmp_path)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 1
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (peer(tmp_path).bos_token_id, (peer(tmp_path).eos_token_id,))


@pytest.mark.parametrize("made", [
    DeepseekV3Config(vocab_size=300), DeepseekV2Config(vocab_size=300),
    DeepseekV2Config(vocab_size=300, bos_token_id=100_000, eos_token_id=100_001),  # as V2's repositories have it
])  # fmt: skip
def test_defaults_of_any_class(tmp_path: Path, made: Any) -> None:
    """Words of this vocabulary, and ids beyond it."""
    save(tmp_path, bos_token=BOS, eos_token=EOS)
    made.save_pretrained(tmp_path)
    GenerationConfig.from_model_config(made).save_pretrained(tmp_path)
    assert Tokenizer(tmp_path, 300).eos_ids == (peer(tmp_path).eos_token_id,)


@pytest.mark.parametrize("settings, generation, ends", [
    ({"eos_token": EOS}, {"eos_token_id": 260}, (TURN, EOS)),  # the end of turn is in one of them alone
    ({"eos_token": TURN}, {"eos_token_id": 259}, (EOS, TURN)),
    ({"eos_token": TURN}, None, (TURN,)),
    ({}, {"eos_token_id": [260, 259]}, (TURN, EOS)),
    ({}, {"eos_token_id": [5, 260]}, (TURN,)),  # 5 is a word
    ({"eos_token": EOS}, {"eos_token_id": 5}, (EOS,)),
])  # fmt: skip
def test_every_end_that_is_named(tmp_path: Path, settings: Any, generation: Any, ends: Any) -> None:
    tokenizer = Tokenizer(save(tmp_path, generation=generation, **settings))
    assert tuple(tokenizer._added_text[i] for i in tokenizer.eos_ids) == ends


def test_config_is_asked_last(tmp_path: Path) -> None:
    config = {"bos_token_id": 258, "eos_token_id": [260, 5]}
    tokenizer = Tokenizer(save(tmp_path, config=config))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (258, (260,)), "where nothing else names one, and no word"
    tokenizer = Tokenizer(save(tmp_path, config=config, eos_token=EOS))
    assert tokenizer.eos_ids == (259,)
    with pytest.raises(UserError, match=r"names an end token \(.*config.json: eos_token_id 1 is '\"', an ordinary word\)"):
        Tokenizer(save(tmp_path, config={}))


def test_an_added_word_ends_nothing_by_config_alone(tmp_path: Path) -> None:
    def add(library: Any) -> None:
        library.add_tokens(["Ω", "</answer>"])

    with pytest.raises(UserError, match="eos_token_id 261 is 'Ω', an ordinary word"):
        Tokenizer(save(tmp_path, change=add, config={"eos_token_id": 261}))
    with pytest.raises(UserError, match="eos_token_id 262 is '</answer>', an ordinary word"):
        Tokenizer(save(tmp_path, change=add, config={"eos_token_id": 262}))
    tokenizer = Tokenizer(save(tmp_path, change=add, generation={"eos_token_id": [261, 262]}, eos_token=EOS))
    assert tokenizer.eos_ids == (262, 259), "somebody wrote that file by hand; a word is none even so"


def test_a_token_that_was_not_added_but_is_spelt_as_one(tmp_path: Path) -> None:
    library = write_words(tmp_path, [*WORDS, "<|endoftext|>"], [])
    at = library.token_to_id("<|endoftext|>")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": at}))
    assert Tokenizer(tmp_path).eos_ids == (at,)


def test_another_models_tokenizer(tmp_path: Path) -> None:
    save(tmp_path, config={"bos_token_id": 70}, bos_token=BOS, eos_token=EOS)
    with pytest.raises(UserError, match=r"config.json says bos_token_id 70, but in tokenizer.json '<s>' is 258: this is another"):
        Tokenizer(tmp_path)
    GenerationConfig(bos_token_id=258, eos_token_id=259).save_pretrained(tmp_path)
    assert Tokenizer(tmp_path).bos_id == 258, "two against one"


# ------------------------------------------------------------------ words that were added


def test_added_words_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    """As people add them before training. Control tokens beside them stay what no text becomes."""
    words = ["ö", "Ω", "newword", "New York", "   ", "word"]

    def change(library: Any) -> None:
        library.add_tokens(["<think>", *words[:3]])
        library.add_special_tokens(["<|im_start|>"])
        library.add_tokens([*words[3:], "</think>", AddedToken("trim", lstrip=True, rstrip=True), AddedToken("alone", single_word=True)])

    tokenizer = Tokenizer(save(tmp_path, change=change, bos_token=BOS, eos_token=EOS))
    theirs, rng = peer(tmp_path), random.Random(16)
    pool = [*words, *texts(200, seed=17), " trim ", "trim", " alone ", "alones", "Wörter", "newwords", "!", " ", "wor", "d"]
    for _ in range(500):
        text = "".join(rng.choices(pool, k=5))
        ids = tokenizer.encode_text(text)
        assert ids == theirs(text)["input_ids"], repr(text)
        stream = tokenizer.stream()
        assert tokenizer.decode(ids) == theirs.decode(ids) == "".join(map(stream.push, ids)) + stream.finish()
        assert tokenizer.decode(ids) == text or "trim" in text or "ö" in text, "the last is a letter for a byte"
    for text in (BOS, EOS, TURN, "<think>", "<|im_start|>", "</think>"):
        assert tokenizer.decode(tokenizer.encode_text(f"Ω{text}Ω")) == f"Ω{text}Ω"
        assert not any(map(tokenizer.is_control, tokenizer.encode_text(f"Ω{text}Ω")))
    word = theirs.convert_tokens_to_ids("newword")
    assert tokenizer.encode_text("newword") == [word] and tokenizer.name(word) == b"newword" and not tokenizer.is_control(word)


def test_letters_that_stand_for_no_byte_of_any_text(tmp_path: Path) -> None:
    """DeepSeek's older vocabularies lack the letters of bytes that UTF-8 never has, and they were added as words."""
    letters = [chr(code) for code in (*range(0xC0, 0xC2), *range(0xF5, 0x100))]

    def change(library: Any) -> None:
        raw = json.loads(library.to_str())
        raw["model"]["vocab"] = {text: i for i, text in enumerate(t for t in raw["model"]["vocab"] if t not in letters)}
        size = len(raw["model"]["vocab"])
        raw["added_tokens"] = [token | {"id": size + i} for i, token in enumerate(raw["added_tokens"])]
        library = Library.from_str(json.dumps(raw))
        library.add_tokens(letters)
        library.save(str(tmp_path / "tokenizer.json"))

    save(tmp_path, bos_token=BOS, eos_token=EOS)
    change(Library.from_file(str(tmp_path / "tokenizer.json")))
    text = "Übergrößen, à la carte, ÀÁ÷ 好"
    ids = Tokenizer(tmp_path).encode_text(text)
    assert ids == peer(tmp_path)(text)["input_ids"] and max(ids) > 247
    assert Tokenizer(tmp_path).decode(ids) == text


def test_an_added_word_with_another_id(tmp_path: Path) -> None:
    save(tmp_path, bos_token=BOS, eos_token=EOS, change=lambda library: library.add_tokens(["newword"]))
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["added_tokens"][-1]["id"] = 270
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="the added token 'newword' has id 270, expected 261"):
        Tokenizer(tmp_path)


# ------------------------------------------------------------------ around a raw text


def template(single: str, *tokens: tuple[str, int]) -> Callable[[Any], None]:
    def change(library: Any) -> None:
        library.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(tokens))

    return change


@pytest.mark.parametrize("single, before, after", [
    ("$A", [], []), ("<s> $A", [258], []), ("<s> $A </s>", [258], [259]), ("<s> <|im_end|> $A", [258, 260], []),
])  # fmt: skip
def test_the_post_processor_says_what_is_around_a_text(tmp_path: Path, single: str, before: Any, after: Any) -> None:
    change = template(single, (BOS, 258), (EOS, 259), (TURN, 260))
    tokenizer = Tokenizer(save(tmp_path, change=change, bos_token=BOS, eos_token=EOS))
    ids = tokenizer.encode_text("Hi!")
    assert ids == peer(tmp_path)("Hi!")["input_ids"]
    assert ids == [*before, *tokenizer._encode_plain("Hi!"), *after]


def test_a_post_processor_in_a_sequence(tmp_path: Path) -> None:
    def change(library: Any) -> None:
        first = processors.ByteLevel(trim_offsets=False)
        library.post_processor = processors.Sequence([first, processors.TemplateProcessing(single="<s> $A", special_tokens=[(BOS, 258)])])

    tokenizer = Tokenizer(save(tmp_path, change=change, bos_token=BOS, eos_token=EOS))
    assert tokenizer.encode_text("Hi!") == peer(tmp_path)("Hi!")["input_ids"] == [258, *tokenizer._encode_plain("Hi!")]


@pytest.mark.parametrize("add, changed", [(True, False), (False, False), (None, False), (True, True), (False, True)])
def test_add_bos_token(tmp_path: Path, add: bool | None, changed: bool) -> None:
    """As in DeepSeek's repositories, whose post-processor adds nothing; one BOS where that adds it already."""
    change = template("<s> $A", (BOS, 258)) if changed else (lambda library: None)
    save(tmp_path, change=change, bos_token=BOS, eos_token=EOS)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | ({} if add is None else {"add_bos_token": add})
    file.write_text(json.dumps(settings))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode_text("Hi!") == ([258] if add or changed else []) + tokenizer._encode_plain("Hi!")


def test_released_files_saved_again(tmp_path: Path) -> None:
    """V3's own, of the class LlamaTokenizerFast, as AutoTokenizer opens and saves them: nothing is added to a text."""
    theirs = AutoTokenizer.from_pretrained(real_folder())
    theirs.save_pretrained(tmp_path)
    DeepseekV3Config().save_pretrained(tmp_path)
    tokenizer, text = Tokenizer(tmp_path, 129280), "Hello  world, 3.14! 你好 🙂"
    assert tokenizer.encode_text(text) == theirs(text)["input_ids"]
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.ignored) == (0, (1,), [])
    messages = [{"role": "user", "content": text}]
    prompt = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.render_chat(messages) == prompt
    assert tokenizer.encode_chat(messages) == theirs.encode(prompt, add_special_tokens=False)
    assert tokenizer.encode_text(text) == Tokenizer(real_folder(), 129280).encode_text(text)


# ------------------------------------------------------------------ tokens that only the settings name


def edit(folder: Path, **settings: Any) -> Path:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def test_a_padding_token_that_nothing_needs(tmp_path: Path) -> None:
    save(tmp_path, bos_token=BOS, eos_token=EOS)
    tokenizer = Tokenizer(edit(tmp_path, pad_token="[PAD]", unk_token={"content": "<unk>"}))
    assert tokenizer.decode(tokenizer.encode_text("[PAD]")) == "[PAD]"
    for name in ("bos_token", "eos_token"):
        with pytest.raises(UserError, match=rf"tokenizer_config.json: {name} '\[PAD\]' is not in tokenizer.json"):
            Tokenizer(edit(save(tmp_path, bos_token=BOS, eos_token=EOS), **{name: "[PAD]"}))


def test_tokens_that_the_settings_alone_have(tmp_path: Path) -> None:
    """transformers adds them, behind the model's vocabulary; here they stay ordinary text, and a check tells."""
    save(tmp_path, bos_token=BOS, eos_token=EOS)
    decoder = {"258": {"content": BOS}, "7": {"content": EOS}, "300": {"content": "<tool>"}}
    edit(tmp_path, extra_special_tokens=["<call>", EOS], added_tokens_decoder=decoder)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode_text("<call>")) == "<call>"
    assert tokenizer.ignored[:3] == [
        "tokenizer_config.json: extra_special_tokens has '<call>', no token of tokenizer.json",
        f"tokenizer_config.json: added_tokens_decoder has {EOS!r} as 7, token 259 of tokenizer.json",
        "tokenizer_config.json: added_tokens_decoder has '<tool>' as 300, no token of tokenizer.json",
    ]


def test_a_padding_token_that_the_template_reads(tmp_path: Path) -> None:
    save(tmp_path, bos_token=BOS, eos_token=EOS, chat_template="{{ bos_token }}{{ messages[0].content }}{{ pad_token }}")
    tokenizer = Tokenizer(edit(tmp_path, pad_token="[PAD]"))
    with pytest.raises(UserError, match=r"the chat template reads pad_token, and '\[PAD\]' is not in tokenizer.json"):
        tokenizer.encode_chat([{"role": "user", "content": "a"}])


def test_a_padding_token_without_a_row_in_the_embedding(tmp_path: Path) -> None:
    """Added for training, as transformers writes it, and no row was added."""
    save(tmp_path, bos_token=BOS, eos_token=EOS, pad_token="[PAD]")
    assert peer(tmp_path).pad_token_id == 261
    tokenizer = Tokenizer(tmp_path, 261)
    assert tokenizer.size == 261 and tokenizer.decode(tokenizer.encode_text("[PAD]")) == "[PAD]"
    with pytest.raises(UserError, match="ids go up to 260, but the model's vocab_size is 260"):
        Tokenizer(tmp_path, 260)
