"""A sandbox for chat templates, which come with checkpoints and handle users' texts.

jinja's own sandbox keeps them from Python, and each rendering's budget keeps them from hanging the engine or filling
its memory. A template that needs more is refused.
"""

import time
from collections.abc import Iterable
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

PASSES = 200_000  # through loops and macros in one rendering
SECONDS = 20.0  # that one may take
CHARACTERS = 1 << 28  # of all texts that one puts together
ELEMENTS = 1_000_000  # of a list
BITS = 4096  # of an integer
WIDE = frozenset("center ljust rjust zfill expandtabs format format_map translate".split())  # a number makes them long
LEFT_OUT = ("batch", "center", "format", "indent", "slice", "urlize", "wordwrap", "xmlattr")  # filters, likewise
BUDGET = "render budget"  # a variable that no template can name


class RenderBudget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self.passes, self.characters, self.until = PASSES, CHARACTERS, time.monotonic() + SECONDS

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
            texts.append(str(part))
            self.spend(len(texts[-1]) + len(between))
        return between.join(texts)

    def replace(self, text: str, old: str, new: str, count: int = -1) -> str:
        self.spend(len(text) + text.count(old) * len(new))
        return text.replace(old, new, count)


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles templates whose renderings keep to a RenderBudget, one of their variables."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in LEFT_OUT:
            del self.filters[name]
        self.filters |= {"join": _join, "replace": _replace}
        del self.globals["lipsum"]

    def compiled(self, tree: nodes.Template) -> Any:
        """The template of a tree, which is changed. Raises TemplateSyntaxError and RecursionError."""
        return self.from_string(_Counting().visit(tree).set_environment(self))

    def step(self, context: Context) -> None:
        context[BUDGET].step()

    def concat_values(self, context: Context, *parts: Any) -> str:
        return context[BUDGET].join(parts)

    def call(__self, __context: Context, __obj: Any, *args: Any, **options: Any) -> Any:
        text, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(text, str) and name in ("replace", "join"):
            budget = __context[BUDGET]
            return budget.replace(text, *args, **options) if name == "replace" else budget.join(*args, between=text)
        return super().call(__context, __obj, *args, **options)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(right, str | list | tuple) and operator == "*":
            left, right = right, left
        if isinstance(left, int) and isinstance(right, int) and operator in ("*", "**"):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > BITS:
                raise SecurityError(f"an integer of more than {BITS} bits")
        elif isinstance(left, str | list | tuple):
            if operator == "%":
                raise SecurityError("% with a text")
            size = len(left) * right if operator == "*" and isinstance(right, int) else len(left)
            size += len(right) if operator == "+" and isinstance(right, str | list | tuple) else 0
            if isinstance(left, str):
                context[BUDGET].spend(size)
            elif size > ELEMENTS:
                raise SecurityError(f"a list of more than {ELEMENTS} elements")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return not (isinstance(obj, str) and attr in WIDE) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """None: `format` is an attribute like any other, that is, not a safe one."""


@pass_context
def _join(context: Context, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    return context[BUDGET].join(value, d)


@pass_context
def _replace(context: Context, s: Any, old: str, new: str, count: int = -1) -> str:
    return context[BUDGET].replace(str(s), old, new, count)


class _Counting(NodeTransformer):
    """Counts every pass through a loop or a macro, and makes `~` a call that counts characters."""

    def visit_For(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("step", [], node.lineno), lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_For

    def visit_Concat(self, node: Any) -> Any:
        self.generic_visit(node)
        return _call("concat_values", node.nodes, node.lineno)


def _call(method: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    """A call of a Sandbox's method with the template's context before other arguments."""
    function = nodes.EnvironmentAttribute(method, lineno=line)
    return nodes.Call(function, [nodes.ContextReference(lineno=line), *arguments], [], None, None, lineno=line)
