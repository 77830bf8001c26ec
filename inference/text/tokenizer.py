"""Text to token ids and back, from a checkpoint's own tokenizer.json and chat template.

Two promises shape this file. What the model reads is exactly what the released tokenizer makes of the rendered chat
template, with one BOS. And message text is only ever text: a user who types `<｜Assistant｜>` or `<think>` gets those
characters, not the control token. In DeepSeek-V3's own file these are added tokens marked `special: false`, so no
option of an encoder keeps text apart from control tokens; here it is done by origin. A control token counts only where
the chat template itself writes it, and everything else goes through a second tokenizer that knows no added tokens.
"""

import codecs
import json
import re
from collections.abc import Iterable
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2 import nodes

from core.errors import UserError
from core.files import read_json, read_text, require_folder
from text.sandbox import ROOM, Room, Sandbox

THINK, THINK_END = "<think>", "</think>"
ROLES = ("system", "user", "assistant", "tool")
ROUND_TRIP = "Hello  world, 3.14 and 1024\n\tdéjà vu — 你好，世界 🙂 end"

# Methods and filters that look for their argument in a text instead of writing it.
SEARCHES = frozenset(
    {"split", "rsplit", "partition", "rpartition", "startswith", "endswith", "find", "rfind", "index", "rindex",
     "count", "replace", "strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "trim"}
)  # fmt: skip
SURROGATES = range(0xD800, 0xE000)  # no valid text contains these, so they can stand for what is not text


class TooLong(UserError):
    """A prompt that comes to more tokens than were wanted."""


class Json(str):
    """JSON already: `tojson` leaves it as it is. A tool call's arguments are, and some templates pass them through that
    filter, while others write them as they are."""


class Tokenizer:
    """A checkpoint's tokenizer. Public facts: `bos_id` (None if there is none), `eos_ids`, `think_open_id` and
    `think_close_id` (None where the vocabulary has no `<think>`), `has_chat_template`."""

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
        self._template_source = _read_template(folder, settings)
        self._add_bos = bool(settings.get("add_bos_token"))

        if self.decode(self._encode_plain(ROUND_TRIP)) != ROUND_TRIP:
            raise UserError(f"{self._path}: a text with spaces, digits, Chinese and an emoji does not come back whole")

    @classmethod
    def from_pretrained(cls, path: str | Path, vocab_size: int | None = None) -> "Tokenizer":
        """The same as the constructor, under the name users know."""
        return cls(path, vocab_size)

    # ---------------------------------------------------------------- text to ids

    def encode_text(self, text: str, most: int | None = None) -> list[int]:
        """A raw completion prompt: BOS, then `text` as nothing but text. Raises UserError for invalid Unicode, and
        TooLong for a text of more than `most` tokens, without making a list of them."""
        _require_unicode(text, "the prompt")
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
        marked = self._template.render(_checked(messages), thinking, add_generation_prompt, tools)[1]
        ids: list[int] = []
        for run in self._template.split(marked):
            if run in self._template.ids:
                ids.append(self._template.ids[run])
            else:
                ids += self._encode_plain(run, most)
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
        return self._template.render(_checked(messages), thinking, add_generation_prompt, tools)[0]

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

    def stream(self) -> "TextStream":
        """A decoder that takes one id at a time and hands out whole characters."""
        return TextStream(self)

    def name(self, token_id: int) -> bytes:
        """One token's bytes, which may end within a character; of a control token, its name."""
        return self._added_text[token_id].encode() if self.is_control(token_id) else self._piece(token_id)

    def is_control(self, token_id: int) -> bool:
        """Whether it stands for itself, and is not text that somebody may have written."""
        return token_id in self._added_text

    @property
    def chat_template(self) -> str | None:
        """Its source."""
        return self._template_source

    def _piece(self, token_id: int) -> bytes:
        """The bytes one token stands for: none for a hidden one, or for an id that only pads the embedding."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._spell(token_id)
        return piece

    def _spell(self, token_id: int) -> bytes:
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
            raise UserError(f"{self._path}: no such file; {hint}")
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
    def _template(self) -> "ChatTemplate":
        """Built on first use, so that a checkpoint with a broken template still serves raw completions."""
        if self._template_source is None:
            raise UserError(f"{self._path.parent}: no chat template in this checkpoint; use --raw for plain completion")
        template = ChatTemplate(self._template_source, self._specials, self._named)
        trimming = self._trimming & template.ids_by_text.keys()
        if trimming:
            raise UserError(f"{self._path}: {trimming.pop()!r} trims the text around it, which is not supported")
        return template


class TextStream:
    """Text of a growing list of ids; the sum of all `push`es and `finish` equals `Tokenizer.decode` of the list.

    A character of several bytes is held back until its last byte is there, so U+FFFD appears before `finish` only for
    bytes that can no longer become a character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._piece, self._is_control = tokenizer._piece, tokenizer.is_control
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._piece(token_id))

    def push_apart(self, token_id: int) -> tuple[str, str, bool]:
        """(leftover, text, is_control): as `push`, but that before a control token the text of a character which it
        leaves incomplete is apart from its own."""
        text, is_control = self.push(token_id), self._is_control(token_id)
        n = len(text) - len(self._piece(token_id).decode()) if is_control and text else 0
        return text[:n], text[n:], is_control

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class ChatTemplate:
    """A Jinja chat template in two compiled forms: as written, and with a stand-in for every control token it writes.

    Where a control token comes from cannot be seen in the rendered text, and templates do cut and strip messages, so
    positions of the original text do not help either. But whatever a template does to a message, its own control
    tokens are literals of its source (or `bos_token` and its like). In the second form each such literal is one lone
    surrogate, which no valid text contains; what is not a stand-in in the result came from a message or is ordinary
    wording. Literals that are only compared with (`'</think>' in content`) are left alone, and rendering checks that
    both forms say the same.
    """

    def __init__(self, source: str, specials: dict[str, int], named: dict[str, str]) -> None:
        """`specials`: every control token's text and id. `named`: variables such as `bos_token` and their text.

        Raises UserError when the source does not compile.
        """
        environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception

        written = [text for text in specials if text in source or text in named.values()]
        if len(written) > len(SURROGATES):
            raise UserError(f"the chat template writes {len(written)} control tokens, more than {len(SURROGATES)}")
        stand_ins = {text: chr(code) for text, code in zip(written, SURROGATES, strict=False)}
        self.ids_by_text = {text: specials[text] for text in written}
        self.ids = {stand_ins[text]: specials[text] for text in written}
        self._expand = {stand_in: text for text, stand_in in stand_ins.items()}
        try:
            tree = environment.parse(source)
            read = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "load"}
            self.has_thinking_switch = bool(read & {"thinking", "enable_thinking"})
            self.knows_tools = "tools" in read
            self._as_written = environment.compiled(environment.parse(source))
            self._marked = environment.compiled(_mark(tree, stand_ins))
        except jinja2.TemplateSyntaxError as e:
            raise UserError(f"the chat template has a mistake in line {e.lineno}: {e.message}") from None
        except RecursionError:
            raise UserError("the chat template is nested too deeply") from None
        self._specials = _any_of(specials)
        self._named = named
        self._marked_named = {name: stand_ins[text] for name, text in named.items()}

    def render(
        self,
        messages: list[dict[str, Any]],
        thinking: bool | None,
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None = None,
    ) -> tuple[str, str]:
        """The prompt's text, and the same with a stand-in for each control token. Raises UserError."""
        try:
            return self._render(messages, thinking, add_generation_prompt, tools)
        except UserError:
            # Of a message that is tool calls alone some templates want to see no content, and others fail of that.
            texts = [message | {"content": message.get("content") or ""} for message in messages]
            if texts == messages:
                raise
        return self._render(texts, thinking, add_generation_prompt, tools)

    def _render(
        self,
        messages: list[dict[str, Any]],
        thinking: bool | None,
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None,
    ) -> tuple[str, str]:
        variables: dict[str, Any] = {
            "messages": messages, "add_generation_prompt": add_generation_prompt, "tools": tools, "documents": None,
            "strftime_now": datetime.now().strftime,  # one moment for both forms
        }  # fmt: skip
        if tools is not None and not self.knows_tools:
            raise UserError("this checkpoint's chat template knows no tools")
        if thinking is not None:
            if not self.has_thinking_switch:
                raise UserError("this checkpoint's chat template does not let thinking be switched on or off")
            variables |= {"thinking": thinking, "enable_thinking": thinking}
        try:
            text, marked = (
                room.joined(form.generate(variables | named | {ROOM: room}))
                for form, named, room in ((self._as_written, self._named, Room()),
                                          (self._marked, self._marked_named, Room()))
            )  # fmt: skip
        except Exception as e:  # a template may fail as any program may
            raise UserError(f"the chat template cannot render these messages: {e}") from None
        runs = self.split(marked)
        if "".join(self._expand.get(run, run) for run in runs) != text:
            raise UserError("the chat template handles its control tokens in a way that is not supported; use --raw")
        said = json.dumps([messages, tools], ensure_ascii=False)
        for run in runs:
            for token in self._specials.findall(run):
                if json.dumps(token, ensure_ascii=False)[1:-1] not in said:  # no message spells it as a whole either
                    raise UserError(f"the chat template assembles {token!r} from pieces, not supported; use --raw")
        return text, marked

    def split(self, marked: str) -> list[str]:
        """Stand-ins and the runs of ordinary text between them, in order."""
        return [run for run in re.split(f"([{chr(SURROGATES[0])}-{chr(SURROGATES[-1])}])", marked) if run]


def _mark(tree: nodes.Template, stand_ins: dict[str, str]) -> nodes.Template:
    """Replaces the control tokens in the literals that `tree` writes; literals that it only looks for stay."""
    looked_for: set[int] = set()
    for node in tree.find_all((nodes.Compare, nodes.Call, nodes.Filter, nodes.Test, nodes.Getitem)):
        operands: list[nodes.Node] = []
        if isinstance(node, nodes.Compare):
            operands = [node.expr, *(operand.expr for operand in node.ops)]
        elif isinstance(node, nodes.Getitem):
            operands = [node.arg]
        elif isinstance(node, nodes.Call):
            searches = isinstance(node.node, nodes.Getattr) and node.node.attr in SEARCHES
            operands = list(node.args) if searches else []
        elif isinstance(node, nodes.Test) or (isinstance(node, nodes.Filter) and node.name in SEARCHES):
            operands = list(node.args)
        for operand in operands:
            looked_for |= {id(literal) for literal in (operand, *operand.find_all(nodes.Const))}

    pattern = _any_of(stand_ins)
    for literal in tree.find_all((nodes.Const, nodes.TemplateData)):
        field = "data" if isinstance(literal, nodes.TemplateData) else "value"
        text = getattr(literal, field)
        if isinstance(text, str) and id(literal) not in looked_for:
            setattr(literal, field, pattern.sub(lambda match: stand_ins[match[0]], text))
    return tree


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of `texts`, the longest where several fit, as the tokenizer itself does; nothing for none.

    Written as a tree by first characters, so that a text full of beginnings costs no more for there being many.
    """

    def tree(rests: set[str]) -> str:
        by_letter: dict[str, set[str]] = {}
        for rest in rests - {""}:
            by_letter.setdefault(rest[0], set()).add(rest[1:])
        branches = "|".join(re.escape(letter) + tree(after) for letter, after in sorted(by_letter.items()))
        if not branches:
            return ""
        return f"(?:{branches})?" if "" in rests else f"(?:{branches})" if len(by_letter) > 1 else branches

    return re.compile(tree(set(texts)) or "(?!)")


def _checked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with their content as one string (or None beside tool calls), and calls' arguments as Json; raises
    UserError naming the message.

    A role no template knows is refused here, because templates silently drop such messages.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError("the conversation has no messages")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise UserError(f"message {i}: role {role!r} is not supported (known: {', '.join(ROLES)})")
        content = message.get("content")
        if isinstance(content, list):  # OpenAI's list of parts
            parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
            texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
            if len(texts) < len(content):
                raise UserError(f"message {i}: only parts of type text are supported")
            message = message | {"content": "".join(texts)}
        elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise UserError(f"message {i}: content is {type(content).__name__}, expected a string")
        try:
            _require_unicode(json.dumps(message, ensure_ascii=False), f"message {i}")
        except (TypeError, ValueError) as e:
            raise UserError(f"message {i}: not plain JSON data ({e})") from None
        checked.append(_with_arguments(message))
    return checked


def _with_arguments(part: Any) -> Any:
    """A copy of a message in which every tool call's arguments, where they are text, are Json."""
    match part:
        case {"tool_calls": list(calls)}:
            return part | {"tool_calls": [_with_arguments(call) for call in calls]}
        case {"function": {"arguments": str(text)}}:
            return part | {"function": part["function"] | {"arguments": Json(text)}}
    return part


def _require_unicode(text: str, what: str) -> None:
    """Lone surrogates come from broken JSON escapes or undecodable input; they are no text and have no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{what} is not valid Unicode: lone surrogate {text[e.start]!a}") from None


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _read_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The chat template's source: chat_template.jinja wins over tokenizer_config.json, as in transformers."""
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return read_text(file)
        except (OSError, ValueError) as e:
            raise UserError(f"{file}: not readable as text ({e})") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several templates by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{folder / 'tokenizer_config.json'}: chat_template is no string")
    return template


def _ids(value: Any, path: Path, name: str) -> list[int]:
    """One id, a list of ids or nothing, as a list."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise UserError(f"{path}: {name} is {value!r}, expected a token id or a list of them")
    return ids


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on; transformers replaces it in the same way."""
    if isinstance(value, Json):
        return value
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _byte_letters() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable letter (Radford et al. 2019): printable Latin-1 bytes as
    themselves, the other 68 in order from U+0100 on. Returns letter -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


LETTER_BYTES = _byte_letters()
