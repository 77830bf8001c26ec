"""A sandbox for chat templates, which come with checkpoints and handle users' texts.

jinja's own sandbox keeps them from Python, and each rendering's budget keeps them from hanging the engine or filling
its memory. A template that needs more is refused.
"""

import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from jinja2 import filters, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.visitor import NodeTransformer

PASSES = 200_000  # through loops and macros in one rendering
SECONDS = 20.0  # that one may take
CHARACTERS = 1 << 28  # of all texts that one puts together
ELEMENTS = 1_000_000  # of a list
PER_ELEMENT = 256  # characters for the work of each, where a list becomes text
BITS = 4096  # of an integer
WIDTH = 4096  # characters that a field, an indentation or a line is widened to
WIDE = frozenset(("center", "ljust", "rjust", "zfill", "expandtabs"))  # methods that take a width
LEFT_OUT_METHODS = frozenset(("format_map", "translate"))  # whose argument may be as long as it likes
LEFT_OUT = ("urlize", "xmlattr")  # filters that write HTML, likewise
OF_TEXT = frozenset(  # filters that make a text of whatever they are given
    "string upper lower title capitalize trim striptags truncate wordcount escape e forceescape safe pprint urlencode "
    "int float".split()
)
FIELD = re.compile(r"[ #0+-]*(\*|\d*)(?:\.(\*|\d*))?[hlL]?.?", re.DOTALL)  # of printf: width and precision


class RenderBudget:
    """What one rendering may still use. It is the current one within `with`."""

    def __init__(self) -> None:
        self.passes, self.characters, self.until = PASSES, CHARACTERS, time.monotonic() + SECONDS

    def __enter__(self) -> "RenderBudget":
        self._token = _CURRENT.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _CURRENT.reset(self._token)

    def step(self) -> None:
        """Counts one pass. Raises SecurityError beyond the limits."""
        self.passes -= 1
        if self.passes < 0:
            raise SecurityError(f"more than {PASSES} passes through loops and macros")
        if time.monotonic() > self.until:
            raise SecurityError(f"more than {SECONDS:.0f} seconds")

    def spend(self, n: int) -> None:
        """Counts n characters. Raises SecurityError beyond the limit."""
        self.characters -= n
        if self.characters < 0:
            raise SecurityError(f"more than {CHARACTERS} characters of text")

    def join(self, parts: Iterable[Any], between: str = "") -> str:
        """The parts as one text."""
        texts = []
        for part in parts:
            texts.append(str(measured(part)))
            self.spend(len(texts[-1]) + len(between))
        return between.join(texts)


_CURRENT: ContextVar[RenderBudget] = ContextVar("budget of the rendering")


def budget() -> RenderBudget:
    """The current rendering's."""
    return _CURRENT.get()


def require_short(width: Any) -> None:
    """Raises SecurityError for a number above WIDTH, and for a text of more characters."""
    if (len(width) if isinstance(width, str) else width) > WIDTH:
        raise SecurityError(f"a width of more than {WIDTH} characters")


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles templates whose renderings keep to the current RenderBudget."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in LEFT_OUT:
            del self.filters[name]
        self.filters |= FILTERS
        del self.globals["lipsum"]

    def compiled(self, tree: nodes.Template) -> Any:
        """The template of a tree, which is changed. Raises TemplateSyntaxError and RecursionError."""
        return self.from_string(_Counting().visit(tree).set_environment(self))

    def step(self) -> None:
        budget().step()

    def measured(self, value: Any) -> Any:
        return measured(value)

    def call_filter(self, name: str, value: Any, *args: Any, **options: Any) -> Any:
        """For `map`, which applies a filter by its name."""
        return super().call_filter(name, measured(value) if name in OF_TEXT else value, *args, **options)

    def concat_values(self, *parts: Any) -> str:
        return budget().join(parts)

    def concat(self, parts: Iterable[Any]) -> str:  # type: ignore[override]  # of a macro and of a block
        """What a macro or a block has written, as one text."""
        return budget().join(parts)

    def call(__self, __context: Context, __obj: Any, *args: Any, **options: Any) -> Any:
        text, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(text, str):
            if name == "join":
                return budget().join(args[0], text)
            if name == "replace":
                return _replace(__context, text, *args, **options)
            if name in WIDE:
                _require_narrow(text, *args, **options)
            if name in ("split", "rsplit", "splitlines"):
                between = args[0] if args and isinstance(args[0], str) and args[0] else None
                _require_few(len(text) // 2 if between is None else text.count(between))
        return super().call(__context, __obj, *args, **options)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(right, str | list | tuple) and operator == "*":
            left, right = right, left
        if isinstance(left, int) and isinstance(right, int) and operator in ("*", "**"):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > BITS:
                raise SecurityError(f"an integer of more than {BITS} bits")
        elif isinstance(left, str) and operator == "%":
            return _percent(left, right)
        elif isinstance(left, str | list | tuple):
            size = len(left) * right if operator == "*" and isinstance(right, int) else len(left)
            size += len(right) if operator == "+" and isinstance(right, str | list | tuple) else 0
            if isinstance(left, str):
                budget().spend(size)
            else:
                _require_few(size)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`format` of a text, as a function that keeps to the sandbox; None for anything else."""
        text = getattr(value, "__self__", None)
        if not isinstance(text, str) or getattr(value, "__name__", "") != "format":
            return None
        formatter = _Formatter(self)
        return lambda *args, **options: budget().join([formatter.vformat(text, args, options)])

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return not (isinstance(obj, str) and attr in LEFT_OUT_METHODS) and super().is_safe_attribute(obj, attr, value)


class _Formatter(SandboxedFormatter):
    """Fields of a bounded width."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        return super().convert_field(measured(value), conversion)

    def format_field(self, value: Any, format_spec: str) -> str:
        for number in re.findall(r"\d+", format_spec):
            require_short(int(number[:9]))
        text: str = super().format_field(measured(value), format_spec)
        budget().spend(len(text))
        return text


def _require_few(n: int) -> None:
    """Raises SecurityError for the length of a list beyond ELEMENTS."""
    if n > ELEMENTS:
        raise SecurityError(f"a list of more than {ELEMENTS} elements")


def _require_narrow(text: str, *args: Any, **options: Any) -> None:
    """Counts the characters of a text that is widened to the number among the arguments, or its tabs are."""
    widths = [width for width in (*args, *options.values()) if isinstance(width, int)]
    for width in widths:
        require_short(width)
    budget().spend(len(text) + max([8, *widths]) * (1 + text.count("\t")))


def _percent(text: str, values: Any) -> str:
    """`text % values`, where no field is wider than WIDTH."""
    fields = list(_printf_fields(text))
    for number in (number for field in fields for number in field):
        if number == "*":
            raise SecurityError("a field whose width is an argument")
        require_short(int(number[:9] or 0))
        budget().spend(int(number or 0))
    given = values.values() if isinstance(values, dict) else values if isinstance(values, tuple) else (values,)
    longest = max((len(str(measured(value))) for value in given), default=0)
    budget().spend(len(text) + len(fields) * longest)
    return text % values


def _printf_fields(text: str) -> Iterator[tuple[str, str]]:
    """Width and precision of every field of a format string, as they stand there."""
    at = text.find("%")
    while at >= 0:
        at, depth = at + 1, 0
        while text[at : at + 1] == "(" or depth:  # the name of an argument, which may contain parentheses
            depth += {"(": 1, ")": -1}.get(text[at : at + 1], 0)
            at += 1
            if at > len(text):
                return
        field = FIELD.match(text, at)
        assert field is not None
        yield field[1], field[2] or ""
        at = text.find("%", field.end())


def measured(value: Any) -> Any:
    """The value; counts the characters that a list, a tuple or a dictionary has as text, which may hold one list many
    times."""
    left = [value] if isinstance(value, list | tuple | dict) else []
    while left:
        entry = left.pop()
        budget().spend(PER_ELEMENT + (len(entry) if isinstance(entry, str | list | tuple | dict) else 0))
        if isinstance(entry, dict):
            left += [*entry, *entry.values()]
        elif isinstance(entry, list | tuple):
            left += entry
    return value


# Filters that need a budget. `pass_context` also keeps the compiler from applying them to constants.


@pass_context
def _join(context: Context, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = map(filters.make_attrgetter(context.environment, attribute), value)
    return budget().join(value, d)


@pass_context
def _replace(context: Context, s: Any, old: str, new: str, count: int = -1) -> str:
    text = str(measured(s))
    budget().spend(len(text) + text.count(old) * len(new))
    return text.replace(old, new, count)


@pass_context
def _format(context: Context, value: Any, *args: Any, **options: Any) -> str:
    return _percent(str(measured(value)), options or args)


@pass_context
def _center(context: Context, value: Any, width: int = 80) -> str:
    _require_narrow(str(measured(value)), width)
    return filters.do_center(value, width)


@pass_context
def _indent(context: Context, s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    require_short(width)
    s = str(measured(s))
    size = len(width) if isinstance(width, str) else width
    budget().spend(len(s) + size * (1 + len(s.splitlines())))
    return filters.do_indent(s, width, first, blank)


@pass_context
def _wordwrap(context: Context, s: Any, width: int = 79, break_long_words: bool = True, wrapstring: str | None = None,
              break_on_hyphens: bool = True) -> str:  # fmt: skip
    s = str(measured(s))
    budget().spend(len(s) * (1 + len(wrapstring or "\n")))
    return filters.do_wordwrap(context.environment, s, width, break_long_words, wrapstring, break_on_hyphens)


@pass_context
def _batch(context: Context, value: Any, linecount: int, fill_with: Any = None) -> Any:
    require_short(linecount)
    return filters.do_batch(value, linecount, fill_with)


@pass_context
def _slice(context: Context, value: Any, slices: int, fill_with: Any = None) -> Any:
    require_short(slices)
    return filters.sync_do_slice(value, slices, fill_with)


@pass_context
def _list(context: Context, value: Iterable[Any]) -> list[Any]:
    values = list(itertools.islice(value, ELEMENTS + 1))
    _require_few(len(values))
    return values


FILTERS: dict[str, Callable[..., Any]] = {
    "join": _join, "replace": _replace, "format": _format, "center": _center, "indent": _indent, "wordwrap": _wordwrap,
    "batch": _batch, "slice": _slice, "list": _list,
}  # fmt: skip


class _Counting(NodeTransformer):
    """Counts every pass through a loop or a macro, and the characters of what is written or becomes text."""

    def visit_For(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("step", [], node.lineno), lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_For

    def visit_Output(self, node: Any) -> Any:
        self.generic_visit(node)
        node.nodes = [self._measured(part) for part in node.nodes]
        return node

    def visit_Filter(self, node: Any) -> Any:
        self.generic_visit(node)
        if node.name in OF_TEXT and node.node is not None:
            node.node = self._measured(node.node)
        return node

    @staticmethod
    def _measured(part: nodes.Expr) -> nodes.Expr:
        constant = isinstance(part, nodes.Const | nodes.TemplateData)
        return part if constant else _call("measured", [part], part.lineno)

    def visit_Concat(self, node: Any) -> Any:
        self.generic_visit(node)
        return _call("concat_values", node.nodes, node.lineno)


def _call(method: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    """A call of a Sandbox's method."""
    return nodes.Call(nodes.EnvironmentAttribute(method, lineno=line), arguments, [], None, None, lineno=line)
