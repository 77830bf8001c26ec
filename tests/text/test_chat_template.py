"""Templates render as transformers renders them, and `{% generation %}` marks nothing."""

import datetime
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from core.errors import UserError
from text import chat_template
from text.chat_template import ChatTemplate

MESSAGES = [
    {"role": "system", "content": "Be <brief> & “kind”."},
    {"role": "user", "content": "Hello,\n  world\n\nfoo"},
    {"role": "assistant", "content": "Hi!", "reasoning_content": "hm"},
    {"role": "user", "content": "  spaces  "},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"b": [1, 2.5, None], "a": {"é": True}}}}]
EACH = "{% for m in messages %}%s{% endfor %}"
TEMPLATES = [
    # the extension for training
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}",
    "{% for m in messages %}\n  {%- generation -%}\n  {{ loop.index0 }} {{ m.content }}\n  {%- endgeneration %}\n{% endfor %}",
    "{% set ns = namespace(n=0) %}{% generation %}{% set ns.n = ns.n + 1 %}{% set x = 5 %}{{ ns.n }}{% endgeneration %}{{ x }}{{ ns.n }}",
    "{% for m in messages %}{% generation %}{% for c in m.content %}{% if c == 'l' %}{% break %}{% endif %}{{ c }}{% endfor %}{% endgeneration %}{% endfor %}",
    # tojson's arguments
    "{{ tools | tojson }}|{{ tools | tojson(indent=2) }}|{{ tools | tojson(indent='\t') }}|{{ tools | tojson(ensure_ascii=True) }}",
    "{{ tools | tojson(separators=(',', ':')) }}|{{ tools | tojson(sort_keys=True, indent=4) }}|{{ tools | tojson(true, none, (', ', ':  ')) }}",
    "{{ messages | map('tojson') | join('\n') }}{{ messages[0].content | tojson }}{{ 1.5 | tojson }}{{ none | tojson }}",
    # globals
    "{{ strftime_now('%Y-%m-%d') }}{{ range(3) | list }}{{ dict(a=1, b='x') }}{{ dict.fromkeys(['a'], 2) if false }}",
    "{% set ns = namespace(a=1, b=[]) %}{% for m in messages %}{% set ns.a = ns.a * 3 %}{% endfor %}{{ ns.a }}",
    "{% set c = cycler('x', 'y') %}{% for m in messages %}{{ c.next() }}{% endfor %}{% set j = joiner('-') %}{{ j() }}a{{ j() }}b",
    # loop controls, loops, macros, blocks
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% if loop.index > 3 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages recursive %}{{ loop.depth }}{{ loop.cycle('a', 'b') }}{{ loop.previtem.role if not loop.first }}{{ loop.last }}{% endfor %}",
    "{% for a, b in tools[0].function.parameters | dictsort %}{{ a }}={{ b }};{% endfor %}{% for x in [] %}{% else %}none{% endfor %}",
    "{% macro m(a, b='c') %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{{ caller() if caller }}{% endmacro %}{{ m(1) }}{{ m(1, 2, 3, d=4) }}{% call m(5) %}in{% endcall %}",
    "{% set x %}a{{ messages | length }}{% endset %}{{ x | upper }}{% filter title %}hello {{ x }}{% endfilter %}{% with y = 3 %}{{ y }}{% endwith %}",
    "{% block b %}{{ self is defined }}{% endblock %}{% raw %}{{ x }}{% endraw %}{# comment #}\n    {% if true %}\n  a\n    {% endif %}\nb",
    # filters and methods that a sandbox bounds
    "{{ messages[1].content | indent }}|{{ messages[1].content | indent(2, true, true) }}|{{ messages[1].content | indent('> ', first=true) }}",
    "{{ 'a' | center(9) }}|{{ 'ab'.center(7, '*') }}|{{ 'ab'.ljust(5) }}|{{ 'ab'.rjust(5) }}|{{ '7'.zfill(3) }}|{{ 'a\tb'.expandtabs(4) }}",
    "{{ '%s is %05.1f%% of %-6d|' | format('x', 2.5, 7) }}{{ '%(a)s' | format(a=1) }}{{ '%s-%s' % ('a', 'b') }}{{ '%d' % 3 }}{{ '%(a)r' % {'a': 'x'} }}",
    "{{ '{} {1}'.format(1) if false else '{0:>8}|{1!r}|{2[0]}|{x:.2f}'.format('a', 'b', [3], x=1.234) }}",
    "{{ [1, 2, 3, 4, 5] | batch(2, 0) | list }}{{ [1, 2, 3, 4, 5] | slice(3) | list }}{{ messages[1].content | wordwrap(5) }}{{ 'aa bb' | wordwrap(2, wrapstring='|') }}",
    "{{ messages | map(attribute='role') | unique | join(', ') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | rejectattr('reasoning_content', 'defined') | map(attribute='content') | first }}",
    "{{ [3, 1] | sort }}{{ [1, 2] | sum }}{{ [1, 2] | max }}{{ 'a,b'.split(',') }}{{ ['a', 'b'] | join('-') }}{{ '-'.join(['a', 'b']) }}{{ 'aXb'.replace('X', 'y', 1) }}{{ 'aXbX' | replace('X', 'y') }}",
    "{{ 'abc'[::-1] }}{{ 'abc'[1:] }}{{ messages[::-1][0].role }}{{ messages[-1]['content'] | trim }}{{ 7 // 2 }}{{ 2 ** 5 }}{{ 7 % 4 }}{{ 1 ~ 'a' ~ none }}{{ [1] + [2] }}{{ 'ab' * 2 }}",
    "{{ messages | groupby('role') | map(attribute='grouper') | list }}{{ 'hello world' | title }}{{ 'x' | default('y') }}{{ z | default('y') }}{{ 'abcdef' | truncate(4, true) }}{{ '<a>' | e }}{{ '<a>b' | striptags }}",
    "{{ messages[0] is mapping }}{{ messages is sequence }}{{ 'a' is string }}{{ 1 is number }}{{ z is defined }}{{ none is none }}{{ 3 is divisibleby 3 }}{{ 'a' in 'abc' }}{{ tools is iterable }}{{ true is boolean }}",
    "{{ messages[2].get('thinking') }}{{ messages[2].thinking }}{{ messages[2].reasoning_content }}{{ messages[0].get('x', 'd') }}{{ messages[0].items() | list | length }}{{ tools[0].function.parameters.keys() | list }}",
    "{{ {'a': [1, (2, 3)], 'b': {'c': none}} }}{{ [true, false, none, 1.0, 'é\n'] }}{{ {'a': 1} | string }}{{ [1, 2] | pprint }}{{ [1] | upper }}",
    "{{ documents is none }}{{ add_generation_prompt }}{{ bos_token }}{{ unk_token is defined }}{{ 'a' if z else 'b' }}{{ (1, 2) | list }}{{ 'A' | lower | upper | capitalize | length }}{{ -5 | abs }}{{ 2.567 | round(1) }}{{ '5' | int + 1 }}",
]  # fmt: skip


@pytest.fixture
def any_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets templates leave messages out, for tests of what they do otherwise."""
    monkeypatch.setattr(chat_template, "require_all_texts", lambda messages, text, render: None)


@pytest.mark.usefixtures("any_template")
@pytest.mark.parametrize("source", TEMPLATES)
def test_renders_as_transformers(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for tools in (TOOLS, [{}]):
        if "tools[0].function" in source and tools is not TOOLS:
            continue
        ((theirs,), _) = chat_template_utils.render_jinja_template(
            [MESSAGES], tools, chat_template=source, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
        )
        template = ChatTemplate(source, {"<s>": 0, "</s>": 1}, {"bos_token": "<s>", "eos_token": "</s>"})
        template.knows_tools = True
        ours, runs = template.render(MESSAGES, None, True, tools)
        assert ours == theirs
        assert "".join({0: "<s>", 1: "</s>"}[run] if isinstance(run, int) else run for run in runs) == theirs


def test_a_template_written_for_training() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endfor %}"
    runs = ChatTemplate(source, {"</s>": 1}, {"eos_token": "</s>"}).render([{"role": "user", "content": "a</s>"}], None, True)[1]
    assert runs == ["a</s>", 1], "control tokens within it are the template's own"
    with pytest.raises(UserError, match=r"mistake in line 1.*'generation'"):
        ChatTemplate("{% generation %}a", {}, {})


def test_the_date_is_today() -> None:
    source = "{{ strftime_now('%d %b %Y') }}"
    text, _ = ChatTemplate(source, {}, {}).render([{"role": "user", "content": ""}], None, True)
    assert text == datetime.datetime.now().strftime("%d %b %Y")


def test_reasoning_under_any_of_its_names() -> None:
    source = "{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}"
    for name in ("reasoning_content", "thinking", "reasoning"):
        message: dict[str, Any] = {"role": "assistant", "content": "", name: "hm"}
        ((theirs,), _) = chat_template_utils.render_jinja_template([[message]], chat_template=source)
        assert ChatTemplate(source, {}, {}).render([message], None, False)[0] == theirs == "hm|hm"
