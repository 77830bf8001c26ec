"""A checkpoint's chat template: messages to a prompt's text, with its control tokens told apart from messages' text.

A message is only ever text: a user who types `<｜Assistant｜>` or `<think>` gets those characters, not the control
token.
"""

import json
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context

from core.errors import UserError
from core.files import read_text
from text.conversation import (
    THINK,
    THINK_END,
    Json,
    Message,
    checked,
    prefix_text,
    require_all_texts,
    split_prefix,
    variants,
)
from text.sandbox import RenderBudget, Sandbox, budget, measured, require_short

# Methods and filters that look for their argument in a text instead of writing it.
SEARCHES = frozenset(
    {"split", "rsplit", "partition", "rpartition", "startswith", "endswith", "find", "rfind", "index", "rindex",
     "count", "replace", "strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "trim"}
)  # fmt: skip
SURROGATES = range(0xD800, 0xE000)  # no valid text contains these, so each can stand for a control token
STAND_IN = re.compile(f"([{chr(SURROGATES[0])}-{chr(SURROGATES[-1])}])")


class Generation(Extension):
    """`{% generation %}` … `{% endgeneration %}`: a template written for training marks the assistant's text with them,
    which renders as it stands."""

    tags = {"generation"}  # noqa: RUF012  # jinja's own name

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_as_it_stands"), [], [], body).set_lineno(line)

    @staticmethod
    def _as_it_stands(caller: Callable[[], str]) -> str:
        return caller()


class ChatTemplate:
    """A Jinja chat template in two compiled forms: as written, and with a stand-in for every control token it writes.

    The rendered text does not show where a control token comes from, and templates cut and strip messages, so positions
    in the original text do not help either. But whatever a template does to a message, its own control tokens are
    literals of its source (or `bos_token` and its like). In the second form each such literal is one lone surrogate,
    which no valid text contains; everything else in the result came from a message or is ordinary wording. Literals
    that are only compared with (`'</think>' in content`) are left alone, and rendering checks that both forms agree.
    """

    def __init__(self, source: str, specials: dict[str, int], named: dict[str, str], sorts_tools: bool = False) -> None:
        """`specials`: every control token's text and id. `named`: variables such as `bos_token` and their text.
        `sorts_tools`: the template gets tools with their keys in alphabetical order.

        Raises UserError when the source does not compile.
        """
        # as in transformers' utils/chat_template_utils.py
        environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception

        written = [text for text in specials if text in source or text in named.values()]
        if len(written) > len(SURROGATES):
            raise UserError(f"the chat template writes {len(written)} control tokens, more than {len(SURROGATES)}")
        stand_ins = {text: chr(code) for text, code in zip(written, SURROGATES, strict=False)}
        self.ids_by_text = {text: specials[text] for text in written}
        self._ids: dict[str, int] = {stand_ins[text]: specials[text] for text in written}
        self._expand = {stand_in: text for text, stand_in in stand_ins.items()}
        try:
            tree = environment.parse(source)
            self.reads = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "load"}
            self.has_thinking_switch = bool(self.reads & {"thinking", "enable_thinking"})
            self.knows_tools = "tools" in self.reads
            self._as_written = environment.compiled(environment.parse(source))
            self._marked = environment.compiled(_mark(tree, stand_ins))
        except jinja2.TemplateSyntaxError as e:
            raise UserError(f"the chat template has a mistake in line {e.lineno}: {e.message}") from None
        except RecursionError:
            raise UserError("the chat template is nested too deeply") from None
        self._specials, self._any_special = specials, _any_of(specials)
        self._named, self._sorts_tools = named, sorts_tools
        self._marked_named = {name: stand_ins[text] for name, text in named.items()}

    def render(
        self,
        messages: list[dict[str, Any]],
        thinking: bool | None,
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None = None,
    ) -> tuple[str, list[str | int]]:
        """The prompt's text, and the same as control tokens' ids and the runs of ordinary text between them.

        With `add_generation_prompt` it ends where the model goes on: after the opening of a new answer or, if the last
        message is the assistant's with `prefix: true`, after that message's text.
        Raises UserError for messages that no template takes, that this one cannot render, or whose text it leaves out.
        """
        messages, prefix = checked(messages), None
        if add_generation_prompt:
            messages, prefix = split_prefix(messages)
        tools = _sorted_keys(tools) if self._sorts_tools else tools
        whole = None if tools is None else [_with_defaults(tool) for tool in tools]
        tried: list[Any] = []
        failures: list[UserError] = []
        for form in variants(messages):
            attempt = form, whole if tried else tools
            if attempt in tried:
                continue
            try:
                text, runs = self._render(form, thinking, add_generation_prompt, attempt[1])
                break
            except UserError as e:
                failures.append(e)
                tried.append(attempt)
        else:
            raise failures[0]
        messages, tools = attempt
        variables = self._variables(thinking, add_generation_prompt, tools)
        require_all_texts(messages, text, lambda marked: self._written(marked, variables))
        return (text, runs) if prefix is None else self._with_prefix(text, runs, prefix)

    def _with_prefix(self, text: str, runs: list[str | int], prefix: Message) -> tuple[str, list[str | int]]:
        """What was rendered, and the beginning of the answer."""
        space = runs[-1] if runs and isinstance(runs[-1], str) and runs[-1].isspace() else ""
        opens = runs[-2 if space else -1 :][:1] == [self._specials.get(THINK)]
        before, after = prefix_text(prefix, space if opens else None)
        runs, text = [*runs, before], text + before
        if after is not None:
            runs, text = [*runs, self._specials[THINK_END], after], text + THINK_END + after
        joined: list[str | int] = []
        for run in runs:
            if isinstance(run, str) and joined and isinstance(joined[-1], str):
                joined[-1] += run
            elif run != "":
                joined.append(run)
        return text, joined

    def _variables(self, thinking: bool | None, add_generation_prompt: bool, tools: Any) -> dict[str, Any]:
        """What a template is given beside messages and the names of control tokens."""
        if tools is not None and not self.knows_tools:
            raise UserError("this checkpoint's chat template knows no tools")
        if thinking is not None and not self.has_thinking_switch:
            raise UserError("this checkpoint's chat template does not let thinking be switched on or off")
        switch = {} if thinking is None else {"thinking": thinking, "enable_thinking": thinking}
        return switch | {
            "add_generation_prompt": add_generation_prompt, "tools": tools, "documents": None,
            "strftime_now": datetime.now().strftime,
        }  # fmt: skip

    def _written(self, messages: list[Message], variables: dict[str, Any], form: Any = None) -> str:
        """The text of one form, by default the template as written."""
        form, named = (self._as_written, self._named) if form is None else (form, self._marked_named)
        try:
            with RenderBudget() as limits:
                return limits.join(form.generate(variables | named | {"messages": messages}))
        except Exception as e:  # a template may fail as any program may
            raise UserError(f"the chat template cannot render these messages: {e}") from None

    def _render(
        self,
        messages: list[Message],
        thinking: bool | None,
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None,
    ) -> tuple[str, list[str | int]]:
        variables = self._variables(thinking, add_generation_prompt, tools)  # one moment for both forms
        text, marked = self._written(messages, variables), self._written(messages, variables, self._marked)
        runs = [run for run in STAND_IN.split(marked) if run]
        if "".join(self._expand.get(run, run) for run in runs) != text:
            raise UserError("the chat template handles its control tokens in a way that is not supported; use --raw")
        given = json.dumps([messages, tools], ensure_ascii=False)
        for run in runs:
            for token in self._any_special.findall(run):
                if json.dumps(token, ensure_ascii=False)[1:-1] not in given:  # no message spells it as a whole either
                    raise UserError(f"the chat template assembles {token!r} from pieces, not supported; use --raw")
        return text, [self._ids.get(run, run) for run in runs]


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


def read_template(folder: Path, settings: dict[str, Any]) -> str | None:
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


@pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on; transformers replaces it in the same way."""
    if isinstance(value, Json):
        return value
    for width in (*(separators or ()), *([] if indent is None else [indent])):
        require_short(width)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if indent is None and sum(map(len, separators or ())) <= 8:
        return budget().join([encoder.encode(measured(value))])
    return budget().join(encoder.iterencode(measured(value)))


def _with_defaults(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool with what OpenAI's API lets a client leave out."""
    function = tool.get("function")
    if not isinstance(function, dict):
        return tool
    left_out = {"description": "", "parameters": {"type": "object", "properties": {}}}
    return tool | {"function": left_out | {name: value for name, value in function.items() if value is not None}}


def _sorted_keys(value: Any) -> Any:
    """A JSON value with the keys of its objects in alphabetical order."""
    if isinstance(value, dict):
        return {key: _sorted_keys(value[key]) for key in sorted(value)}
    return [_sorted_keys(entry) for entry in value] if isinstance(value, list) else value


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
