"""A checkpoint's tokenizer, chat template and generation config, tried out."""

import re
from pathlib import Path

from checkpoint.report import Report
from core.config import ModelArgs
from core.errors import CheckpointError, CheckWarning
from core.sampling_params import params_from_generation_config
from text.tokenizer import Tokenizer

TEXTS = (
    "The quick brown fox, 3.14159 and 1,024; don't “quote” me — it's 50 % off!",
    "  two  spaces\tand\ttabs\n\n\n  new lines\r\n" + " " * 40 + "end  ",
    "def f(x: int) -> str:\n    return f'{x!r}'  # {[()]} <tag a=\"b\"> \\n $1 ~`^|",
    "深度求索的模型，回答：今天天气很好。日本語のテキスト、한국어 문장。",
    "Ελληνικά, русский, עברית, العربية, हिन्दी, ไทย, naïve café œuvre ß İ",
    "🙂👩‍👩‍👧‍👦🇩🇪👍🏽 e\u0301 \u200b\u00a0\u3000\u2028 𝒳 ∑∫√ ｜▁｜ \x00\x1b\x7f",
    "<｜User｜><think></think><｜end▁of▁sentence｜></s><|im_end|>[INST]",
)
CONTROL = re.compile(r"<[｜|][^<>]{1,40}[｜|]>")  # how control tokens are spelt
CONVERSATIONS = (
    [("user", "Hello, how are you?")],
    [("system", "You are brief."), ("user", "What is 3 + 4?")],
    [("user", "Name a colour."), ("assistant", "Blue."), ("user", "And <｜Assistant｜> another?")],
)


def check_text(path: Path, args: ModelArgs | None, report: Report) -> None:
    """Checks tokenizer, chat template and generation_config.json."""
    tokenizer: Tokenizer | None = None
    with report.checking("tokenizer"):
        tokenizer = Tokenizer(path, None if args is None else args.vocab_size)
        check_tokenizer(tokenizer, args, report)
    if tokenizer is not None and tokenizer.has_chat_template:
        with report.checking("chat template"):
            check_template(tokenizer, path, report)
    elif tokenizer is not None:
        with report.checking("chat template"):
            report.cover("chat template", "none", 0)
            raise CheckWarning(f"{path}: no chat template: a base model, for generate.py --raw", path)
    with report.checking("generation config"):
        params_from_generation_config(path)
        exists = (path / "generation_config.json").exists()
        report.cover("generation config", "readable" if exists else "none", exists)


def check_tokenizer(tokenizer: Tokenizer, args: ModelArgs | None, report: Report) -> None:
    file = tokenizer.path
    for line in tokenizer.ignored:
        report.add(CheckWarning(f"{file.parent}: {line}, and is ignored", file.parent / line.partition(":")[0]))
    rows = f" of {args.vocab_size:,} rows" if args is not None else ""
    begins = f"raw text begins with {tokenizer.begins_with!r}" if tokenizer.begins_with else "nothing before raw text"
    looked = f"{file.name}, {tokenizer.size:,} ids{rows}; {len(TEXTS)} texts there and back; {begins}"
    report.looked["tokenizer"] = looked
    if args is not None and tokenizer.size < args.vocab_size // 2:
        wanted, found = f"about {args.vocab_size} ids, the rows of the embedding", f"{tokenizer.size}"
        report.add(CheckpointError(f"{file}: expected {wanted}, found {found}", file, "", wanted, found))
    for text in TEXTS:
        if (back := tokenizer.decode(tokenizer.encode_text(text))) != text:
            report.add(CheckpointError(f"{file}: expected {text!r} back, found {back!r}", file, "", text, back))


def check_template(tokenizer: Tokenizer, path: Path, report: Report) -> None:
    """Renders conversations: each must have at most one BOS and no unknown control token. Raises UserError for a
    template that leaves a message out."""
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in turns]
        prompt, text = tokenizer.encode_chat(messages), tokenizer.render_chat(messages)
        if tokenizer.bos_id is not None and (n := prompt.count(tokenizer.bos_id)) > 1:
            wrong = f"{path}: the chat template: expected one BOS, found {n}"
            report.add(CheckpointError(wrong, path, "", "one BOS", n))
        said = "".join(content for _, content in turns)
        for token in set(CONTROL.findall(text)) - tokenizer.control_tokens:
            if token not in said:
                file = tokenizer.path
                wrong = f"{file}: expected the chat template's {token!r}, found no such token"
                report.add(CheckpointError(wrong, file, "", token, "no such token"))
    report.looked["chat template"] = f"{len(CONVERSATIONS)} conversations rendered"
