"""The page that talks to the server, in a real browser: what its user does and sees."""

import contextlib
import itertools
import json
import queue
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from engine.engine import Engine
from support.chat_page import NARROW, WIDE, Page, Scripted, has_browser, opened_browser, scripted
from support.http_server import Gate, serving

pytestmark = pytest.mark.skipif(
    not has_browser(), reason="the page is tested in a browser: install chromium and chromium-driver"
)
DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"
EVERYTHING = {"thinking_switch": True, "tools": True}  # that a model may have
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with opened_browser() as made:
        yield made


@pytest.fixture
def server() -> Iterator[Scripted]:
    with scripted() as made:
        yield made


def values(page: Page, *ids: str) -> list[str]:
    return [page.all(f"#{name}")[0].get_property("value") for name in ids]


# --- answers ---------------------------------------------------------------------------------------------------------


def test_a_conversation(page: Page, server: Scripted) -> None:
    """Text comes bit by bit; thinking is folded away; what was drafted is shown on demand; the conversation goes on."""
    page.open(server.url)
    page.until(lambda: page.text("#model") == "model", "the model's name")
    page.ask(f"two{Keys.SHIFT}{Keys.ENTER}{Keys.SHIFT}lines")
    asked = server.next_question()
    assert asked == {"messages": [{"role": "user", "content": "two\nlines"}], "stream": True,
                     "stream_options": {"include_usage": True}}  # fmt: skip
    assert page.text(".bubble") == "two\nlines" and values(page, "question") == [""]

    server.say(role="assistant", content="")
    server.say(reasoning_content="Let me")
    page.until(lambda: page.shown("summary"), "thinking")
    assert not page.shown("details .prose") and page.text("summary") == "Thinking…"
    page.press("summary")
    page.until(lambda: page.text("details .prose") == "Let me", "thinking unfolds")
    server.say(reasoning_content=" think.", drafted=[[" thi", False], ["nk.", True]])
    page.until(lambda: page.text("details .prose") == "Let me think.", "more thinking")

    begun, rest = b'data: {"choices": [{"index": 0, "delta": {"content": "\xc3\x89t"}}]}\n'.split(b"\x89")
    server.said.put(b': still there\n\ndata: {"choices": [{"delta": {"reasoning_content": " So:"}}]}\r\n' + begun)
    page.until(lambda: page.text("details .prose").endswith(" So:"), "an event, and the next within a line and a character")
    server.said.put(b"\x89" + rest)
    page.until(lambda: page.text(".said") == "Ét", "the answer begins")
    assert page.text("summary").startswith("Thought for ") and page.shown("#stop") and not page.shown("#send")
    server.say(content="é 🙂", drafted=[["é", True], [" 🙂", True]])
    page.until(lambda: page.text(".said") == "Été 🙂", "the answer grows")
    server.end(tokens=7)
    page.idle()
    assert {part.count(" ") for part in page.text(".figures").split(" · ")} == {0}, "lines end between figures"
    figures = page.text(".figures").replace("\xa0", " ")
    assert "to the first token · 7 tokens · " in figures and "tokens/s" in figures and figures.endswith(" % drafted")
    page.press("[title='Show drafted tokens']")
    assert page.texts("pre .drafted") == ["nk.", "é", " 🙂"] and not page.shown(".said")
    assert page.text(".tokens") == "Let me think. So:\n\nÉté 🙂" and page.shown(".raw p")
    page.press("[title='Show drafted tokens']")
    assert page.shown(".said") and not page.shown(".tokens")

    page.ask("again")
    server.say(content="No.")
    server.end("length")
    assert server.next_question()["messages"][1:] == [{"role": "assistant", "content": "Été 🙂"}, {"role": "user", "content": "again"}]
    page.idle()
    assert len(page.all("article")) == 4 and page.text(".ending") == "Cut at the limit of tokens."
    assert not page.shown("#notice") and not page.complaints  # nothing that the policy had to forbid


def test_the_demo(page: Page) -> None:
    """The server itself: its examples are answered rightly; watch an answer stream, stop it, ask again."""
    engine = Engine.from_pretrained(DEMO, dtype="float32", max_model_len=1024, n_pages=40, mtp=1)
    engine.default_params = replace(engine.default_params, temperature=0.0)
    gate = Gate(engine)
    with serving(engine) as running:
        page.open(f"{running.url}/")
        page.until(lambda: len(page.all("#examples button")) == 3, "the model's own examples")
        page.all("#examples button")[1].click()
        page.until(lambda: page.text(".bubble") == "Sort these numbers: 42, 17, 93, 28, 64, 35.", "the second is asked")
        gate.step_once()
        page.until(lambda: page.shown("summary"), "thinking")
        page.press("summary")
        looks = [page.text("details .prose")]
        while len(looks) < 4:
            gate.step_once()
            page.until(lambda: len(page.text("details .prose")) > len(looks[-1]), "it has grown by a step")
            looks.append(page.text("details .prose"))
        assert all(later.startswith(look) for look, later in itertools.pairwise(looks))
        page.press("#stop")
        gate.open()
        page.idle()
        running.idle(40)
        assert page.text("details .prose") == looks[-1] and page.text(".said") == "" and page.text(".ending") == "Stopped."

        for place, answer in enumerate(["632", "17, 28, 35, 42, 64, 93", "5560"]):
            page.press("#fresh-too")
            page.all("#examples button")[place].click()
            page.until(lambda: page.shown(".figures"), "an answer")
            page.idle()
            assert page.text(".said").strip() == answer and page.shown("details")
        body = {"messages": [{"role": "user", "content": page.text(".bubble")}], "stream": True}
        events = running.send("POST", "/v1/chat/completions", body)[2].split("\n\n")
        tokens = [pair for event in events if '"drafted"' in event for pair in json.loads(event[6:])["choices"][0]["drafted"]]
        page.press("[title='Show drafted tokens']")
        marked = page.texts("pre .drafted")
        assert len(marked) > 5 and marked == [text for text, drafted in tokens if drafted]
        assert not page.shown("#notice") and not page.complaints


def test_stopping(page: Page, server: Scripted) -> None:
    page.open(server.url)
    page.ask("q")
    server.say(content="One")
    page.until(lambda: page.text(".said") == "One", "the answer begins")
    page.all("#question")[0].send_keys("next" + Keys.ESCAPE)
    page.idle()
    while not server.left.wait(0.01):  # noticed when something is sent
        server.say(content="two")
    assert page.text(".said") == "One" and page.text(".ending") == "Stopped." and not page.shown("#notice")
    with contextlib.suppress(queue.Empty):
        while True:
            server.said.get_nowait()
    server.next_question()
    page.ask(" question")
    asked = server.next_question()["messages"]
    assert [message["content"] for message in asked] == ["q", "One", "next question"]
    page.press("#fresh-too")  # while the answer is on its way
    page.idle()
    assert not page.all("article") and not page.shown("#notice") and page.shown("#welcome")
    server.said.put(None)  # of the answer that nobody reads
    page.until(server.said.empty, "its end")
    page.ask("anew")
    assert server.answer("Yes")["messages"] == [{"role": "user", "content": "anew"}]
    page.idle()
    assert [len(kept["messages"]) for kept in page.stored()] in ([4, 2], [2, 4])


def test_errors_are_one_line_and_lose_nothing(page: Page, server: Scripted) -> None:
    page.open(server.url)
    page.ask("why")

    def complains(text: str) -> None:
        page.until(lambda: page.text("#notice-text") == text and page.shown("#notice-act"), text)
        page.idle()
        assert page.texts(".bubble") == ["why"] and not page.all(".answer")

    server.said.put(None)
    complains("The connection ended before the answer did.")
    server.next_question()
    for refusal, text in [
        ((429, {"error": {"message": "too many\nwait"}}), "Too many wait."),
        ((500, ["no object"]), "The server answered 500 Internal Server Error."),
        ((503, {"error": {"message": "the engine is loading"}}), "The engine is loading."),
    ]:
        server.refusal = refusal
        page.press("#notice-act")
        complains(text)
    server.refusal = None
    for said, text in [(b"data: [1\n\n", "The server sent something that is no answer."),
                       (b'data: {"error": {"message": "out of pages"}}\n\n', "Out of pages.")]:  # fmt: skip
        page.press("#notice-act")
        server.said.put(said)
        complains(text)
        server.said.put(None)
        assert server.next_question()["messages"] == [{"role": "user", "content": "why"}]

    page.press("#notice-act")
    server.say(content="Half an")
    page.until(lambda: page.text(".said") == "Half an" and not page.shown("#notice"), "half an answer")
    server.said.put(None)
    page.until(lambda: page.text("#notice-text") == "The connection ended before the answer did.", "the end is told")
    server.next_question()
    page.press("#notice-act")  # answers again, and keeps the half
    server.answer("Because.")
    page.idle()
    page.until(lambda: page.text(".said") == "Because.", "the other answer")
    assert page.text(".branches") == "2/2" and not page.shown("#notice")
    page.all("#question")[0].send_keys("unsent")
    server.shutdown()
    server.socket.close()
    page.press("[title='Answer again']")
    page.until(lambda: page.text("#notice-text") == "The server cannot be reached.", "no server")
    assert page.text(".said") == "Because." and values(page, "question") == ["unsent"]


def test_the_key_is_asked_for(page: Page, server: Scripted) -> None:
    server.key = "secret"
    page.open(server.url)
    page.until(lambda: page.shown("#key") and page.text("#key-why") == "The server asks for an API key.", "no key")
    page.all("#key")[0].send_keys("wrong" + Keys.ENTER)
    page.until(lambda: page.text("#key-why") == "The server does not accept this API key.", "a wrong key")
    page.press("#key-cancel")
    page.ask("q")
    page.until(lambda: page.shown("#key"), "it is asked for again")
    page.all("#key")[0].send_keys("secret" + Keys.ENTER)
    page.until(lambda: page.texts(".bubble") == ["q"], "the question is still there")
    assert server.answer("Yes")["messages"] == [{"role": "user", "content": "q"}]
    page.idle()
    assert page.text(".said") == "Yes" and not page.shown("#key") and not page.shown("#notice")
    page.until(lambda: page.text("#model") == "model", "the model's name")
    page.browser.refresh()
    page.until(lambda: page.text("#model") == "model", "the key is kept")
    assert "secret" not in page.run("return JSON.stringify([{...localStorage}, document.cookie])")
    assert all("401" in said for said in page.complaints)


def test_the_servers_key_as_a_password(page: Page) -> None:
    """As the browser asks for it: the page's files and what it asks for need nothing more."""
    engine = Engine.from_pretrained(DEMO, dtype="float32", max_model_len=256, n_pages=8)
    engine.default_params = replace(engine.default_params, temperature=0.0)
    with serving(engine, key="secret-key") as running:
        page.browser.get_log("browser")
        page.browser.get(running.url.replace("//", "//anybody:secret-key@"))
        page.until(lambda: page.text("#model") == "model", "the model's name")
        page.ask("What is 347 + 285?")
        page.until(lambda: page.shown(".figures"), "an answer")
        page.idle()
        assert page.text(".said") == "632" and not page.shown("#key") and not page.complaints
        assert page.run("return getComputedStyle(document.body).display") == "flex", "the style has loaded"
        page.browser.get("about:blank")


def test_the_model_may_still_load(page: Page, server: Scripted) -> None:
    server.loading = True
    page.open(server.url)
    page.until(lambda: page.text("#about") == "The model is loading…", "it loads")
    server.loading = False
    page.until(lambda: len(page.all("#examples button")) == 3 and page.text("#model") == "model", "it has loaded")


# --- what its user can do to a conversation ---------------------------------------------------------------------------


def test_editing_and_asking_again_keep_every_branch(page: Page, server: Scripted) -> None:
    page.open(server.url)
    page.ask("first")
    server.answer("A")
    page.idle()
    page.ask("second")
    server.answer("B")
    page.idle()
    page.press("[title='Answer again']")
    assert [message["content"] for message in server.answer("C")["messages"]] == ["first", "A", "second"]
    page.idle()
    assert page.texts(".said") == ["A", "C"] and page.text(".branches") == "2/2"
    page.press("[title='Earlier version']")
    assert page.texts(".said") == ["A", "B"] and page.text(".branches") == "1/2"

    page.all("[title='Edit message']")[0].click()
    field = page.all(".editor textarea")[0]
    assert field.get_property("value") == "first"
    field.send_keys(" thrown away" + Keys.ESCAPE)
    assert page.texts(".bubble") == ["first", "second"] and not page.all(".editor")
    page.all("[title='Edit message']")[0].click()
    page.all(".editor textarea")[0].send_keys(", edited" + Keys.ENTER)
    assert [message["content"] for message in server.answer("D")["messages"]] == ["first, edited"]
    page.idle()
    assert page.texts(".bubble") == ["first, edited"] and page.texts(".said") == ["D"]
    page.press("[title='Earlier version']")
    assert page.texts(".bubble") == ["first", "second"] and page.texts(".said") == ["A", "C"]
    page.press("[title='Earlier version']")
    page.browser.refresh()
    page.until(lambda: page.texts(".said") == ["A", "B"], "the branch that was shown")
    page.all("[title='Later version']")[0].click()
    assert page.texts(".bubble") == ["first, edited"]


def test_settings(page: Page, server: Scripted) -> None:
    server.model |= {"thinking_switch": True, "tools": True, "context": 4096}
    page.open(server.url)
    page.until(lambda: page.shown("#think"), "the model can think or not")
    page.press("#open-settings")
    assert page.all("#temperature")[0].get_attribute("placeholder") == "0.6"
    for name, text in {"system": " Be brief. ", "temperature": "2.5", "max-tokens": "5000", "tools": "[{]"}.items():
        page.all(f"#{name}")[0].send_keys(text)
    for name, text in {"temperature": "0.3", "max-tokens": "50", "tools": json.dumps([TOOL])}.items():
        page.press("#settings-save")  # is refused: this field is wrong
        assert page.shown("#settings") and page.all(f"#{name}:invalid"), name
        page.all(f"#{name}")[0].clear()
        page.all(f"#{name}")[0].send_keys(text)
    page.press("#settings-save")
    assert not page.shown("#settings") and page.shown("#with-system")
    page.press("#think")
    page.ask("q")
    body = server.answer("A")
    page.idle()
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]
    assert (body["temperature"], body["max_tokens"], body["tools"]) == (0.3, 50, [TOOL])
    assert body["chat_template_kwargs"] == {"thinking": True}

    page.press("#fresh-too")  # a new conversation starts with them
    page.press("#open-settings")
    assert values(page, "system", "temperature", "max-tokens") == ["Be brief.", "0.3", "50"]
    for name in ("system", "temperature", "max-tokens", "tools"):
        page.all(f"#{name}")[0].clear()
    page.press("#settings-save")
    page.press("#think")
    page.ask("q")
    body = server.answer("A")
    assert body.keys() == {"messages", "stream", "stream_options", "chat_template_kwargs"}
    assert len(body["messages"]) == 1 and body["chat_template_kwargs"] == {"thinking": False}
    page.idle()
    page.press("#open-side")
    page.all("#list .title:not([aria-current])")[0].click()  # the first one has kept its own
    page.press("#open-settings")
    assert values(page, "system", "temperature") == ["Be brief.", "0.3"]


def test_tool_calls_are_shown_and_their_results_sent(page: Page, server: Scripted) -> None:
    server.model["tools"] = True
    page.open(server.url)
    page.ask("Is it warm in Oslo or in Rome?")
    server.say(content="I look.")
    for i, place in enumerate(["Oslo", "Rome"]):
        server.say(tool_calls=[{"index": i, "id": f"call_{i}", "type": "function", "function": {"name": "weather", "arguments": ""}}])
        for part in ('{"pla', f'ce": "{place}"}}'):
            server.say(tool_calls=[{"index": i, "function": {"arguments": part}}])
    server.end("tool_calls")
    server.next_question()
    page.until(lambda: page.texts(".call h3") == ["weather"] * 2, "both calls")
    assert page.texts(".call pre") == ['{\n  "place": "Oslo"\n}', '{\n  "place": "Rome"\n}'] and page.text(".said") == "I look."
    page.browser.refresh()  # they are kept, and still wait for results
    page.until(lambda: len(page.all(".editor textarea")) == 2, "fields for results")
    for field, text in zip(page.all(".editor textarea"), ["3 °C", "21 °C"], strict=True):
        field.send_keys(text)
    page.press(".editor .filled")
    asked = server.answer("In Rome.")["messages"]
    calls = [{"id": f"call_{i}", "type": "function", "function": {"name": "weather", "arguments": f'{{"place": "{place}"}}'}}
             for i, place in enumerate(["Oslo", "Rome"])]  # fmt: skip
    assert asked[1:] == [{"role": "assistant", "content": "I look.", "tool_calls": calls},
                         {"role": "tool", "tool_call_id": "call_0", "content": "3 °C"},
                         {"role": "tool", "tool_call_id": "call_1", "content": "21 °C"}]  # fmt: skip
    page.idle()
    assert page.text(".said") == "In Rome." and not page.all(".editor") and page.texts("article.call pre") == ["3 °C", "21 °C"]


def test_copying(page: Page, server: Scripted) -> None:
    page.open(server.url)
    origin = {"origin": server.url.rstrip("/"), "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    page.browser.execute_cdp_cmd("Browser.grantPermissions", origin)
    page.ask("How?")
    server.answer("So:\n\n```sh\necho 1\necho 2\n```\n")
    page.idle()
    for button, text in [("Copy code", "echo 1\necho 2"), ("Copy answer", "So:\n\n```sh\necho 1\necho 2\n```\n"),
                         ("Copy message", "How?")]:  # fmt: skip
        page.press(f"[title='{button}']")
        page.until(lambda: page.text("#status") == "Copied", "it says so")
        read = "navigator.clipboard.readText().then(arguments[0], arguments[0])"
        assert page.browser.execute_async_script(read) == text
        page.run("document.getElementById('status').textContent = ''")


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_conversations_are_kept(page: Page, server: Scripted) -> None:
    """Over a reload, the answer that is on its way and what is being written included; they can be deleted and brought
    back."""
    page.open(server.url)
    page.ask("one")
    server.answer("1")
    page.idle()
    page.press("#fresh-too")
    page.ask("two")
    server.next_question()
    server.say(content="half")
    page.until(lambda: page.text(".said") == "half", "it has begun")
    page.all("#question")[0].send_keys("unsent")
    page.browser.refresh()
    page.until(lambda: page.text(".said") == "half", "it is there again")
    assert page.text(".ending") in ("Stopped.", "The connection ended before the answer did.")
    assert values(page, "question") == ["unsent"] and not page.shown("#notice")
    server.said.put(None)

    page.press("#open-side")
    assert page.texts("#list .title") == ["two", "one"] and page.text("[aria-current]") == "two"
    page.press("[title='Delete “one”']")
    assert page.texts("#list .title") == ["two"] and len(page.stored()) == 1
    page.press("#close-side")
    page.press("#notice-act")
    page.until(lambda: page.texts(".bubble") == ["one"] and page.text(".said") == "1", "it is back")
    page.press("#open-side")
    page.press("[title='Delete “one”']")
    page.press("#close-side")
    assert page.shown("#welcome") and not page.all("article")


def test_what_is_kept_is_bounded(page: Page, server: Scripted) -> None:
    page.open(server.url)
    made = page.browser.execute_async_script("""
        const done = arguments[0];
        Promise.all([import('/page/store.js'), import('/page/conversation.js')]).then(([store, { Conversation }]) => {
          const keep = (i, size) => {
            const made = new Conversation();
            made.add('user', null, { content: i + ' ' + 'x'.repeat(size) });
            made.updated = 1000 + i;
            return store.save(made);
          };
          for (let i = 0; i < 205; i++) keep(i, 10);
          const many = store.list().map(({ title }) => title.split(' ')[0]);
          for (let i = 300; i < 312; i++) keep(i, 500000);
          const long = store.list().map(({ title }) => title.split(' ')[0]);
          let error = '';
          try { keep(400, 5000000); } catch (e) { error = e.message; }
          const length = Object.values(localStorage).join('').length;
          done([many.length, many.at(-1), long, length <= store.LIMITS.characters, error, store.list().length]);
        }, done);""")
    many, oldest, long, is_bounded, error, left = made
    assert (many, oldest) == (200, "5") and is_bounded
    assert long == [str(i) for i in range(311, 304, -1)], "the newest that fit"
    assert error.startswith("This conversation is longer than the browser keeps.") and left <= len(long)


def export(page: Page) -> str:
    """The text of the file that "Export all" offers."""
    page.run("URL.createObjectURL = blob => { blob.text().then(text => { window.exported = text }); return '#' }")
    page.press("#open-side")
    page.press("#export")
    return page.until(lambda: page.run("return window.exported"), "the file")


def test_export_and_import(page: Page, server: Scripted, tmp_path: Path) -> None:
    page.open(server.url)
    page.ask("q")
    server.say(reasoning_content="Hm", drafted=[["Hm", True]])
    server.answer("A")
    page.idle()
    (tmp_path / "all.json").write_text(export(page))
    kept = page.stored()
    page.open(server.url)
    assert not page.stored()

    def read(text: str) -> str:
        (tmp_path / "some.json").write_text(text)
        page.all("#import-file")[0].send_keys(str(tmp_path / "some.json"))
        page.until(lambda: page.shown("#notice"), "it is read")
        said = page.text("#notice-text")
        page.press("#notice-close")
        return said

    whole = json.loads((tmp_path / "all.json").read_text())
    messages = whole["conversations"][0]["messages"]
    for text, why in [
        ("{", "it is not JSON"), ("[]", "it is not an export of this page"),
        (json.dumps(whole | {"version": 2}), "it is of another version of this page"),
        (json.dumps(whole | {"conversations": [{}]}), "a conversation has no list of messages"),
        (json.dumps(whole | {"conversations": [{"messages": messages[::-1]}]}), "messages do not follow one another"),
        (json.dumps(whole | {"conversations": [{"messages": [messages[0] | {"role": "system"}]}]}), "a message is from nobody known"),
        (json.dumps(whole | {"conversations": [{"messages": [messages[0] | {"content": 1}]}]}), "a message's content is no text"),
    ]:  # fmt: skip
        assert read(text) == f"some.json cannot be imported: {why}." and not page.stored()
    assert read(json.dumps(whole)) == "1 conversation is imported."
    assert page.stored() == kept
    page.press("#open-side")
    page.press("#list .title")
    assert page.texts(".bubble") == ["q"] and page.text(".said") == "A" and page.text("summary").startswith("Thought for")
    page.run("localStorage.setItem('chat:damaged', '{'); localStorage.setItem('chat:other', '[]')")
    page.browser.refresh()
    page.until(lambda: page.text(".said") == "A", "what is damaged does no harm")
    assert len(page.stored()) == 1


def test_two_tabs_lose_nothing_of_each_other(page: Page, server: Scripted) -> None:
    page.open(server.url)
    page.ask("q")
    server.answer("A")
    page.idle()
    first = page.browser.current_window_handle
    page.browser.switch_to.new_window("tab")
    try:
        page.browser.get(server.url)
        page.resize(NARROW)
        page.press("#open-side")
        page.press("#list .title")
        page.ask("from the second")
        server.answer("B")
        page.idle()
    finally:
        page.browser.close()
        page.browser.switch_to.window(first)
    page.ask("from the first")
    server.answer("C")
    page.idle()
    page.run("""const key = Object.keys(localStorage).find(k => k.startsWith('chat:')), kept = JSON.parse(localStorage[key]);
        kept.messages.push({ id: 'another', parent: null, role: 'user', content: 'unseen' });
        localStorage[key] = JSON.stringify(kept);""")  # without the event that tells the page
    page.ask("at last")
    server.answer("D")
    page.idle()
    [kept] = page.stored()
    contents = {message["content"] for message in kept["messages"]}
    assert contents == {"q", "A", "from the second", "B", "from the first", "C", "unseen", "at last", "D"}


def described(tree: dict[str, Any]) -> list[tuple[str, str]]:
    """(role, name) of what assistive technology sees, in order."""
    nodes = [node for node in tree["nodes"] if not node["ignored"]]
    return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes]


# --- for everybody ---------------------------------------------------------------------------------------------------

RICH = r"""## A heading

Some *words*, `code`, [a link](https://example.com), $x^2$ and a price of $5.

$$\vec v = \begin{pmatrix} a \\ b \\ c \\ d \end{pmatrix}, \int_0^\infty e^{-x^2 + a + b + c + d + e + f + g + h + i + j}\,dx$$

| left | middle | right |
|------|:------:|------:|
| a long cell with quite a few words | another one of the same kind | 123,456,789 |

```python
def f(x: int) -> str:  # a comment
    return "a string" + str(x + 1) + "and a line that is longer than any narrow screen can show at once"
```

1. one
   - nested
2. two

> A quotation

averyveryveryveryveryveryveryveryveryveryveryveryveryveryveryveryveryveryveryverylongword
"""


def rich_conversation(page: Page, server: Scripted) -> None:
    """With everything that the page can show."""
    server.say(reasoning_content="So it *is*.", drafted=[["So ", False], ["it *is*.", True]])
    server.say(content=RICH, drafted=[[RICH[:40], False], [RICH[40:], True]])
    server.say(tool_calls=[{"index": 0, "id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}])
    server.end("length")
    page.ask("A question " * 12 + "w" * 60)
    server.next_question()
    page.idle()
    page.press("summary")
    page.until(lambda: page.all(".katex-display svg, .katex-display .katex-html") and page.all(".hljs-keyword"), "the libraries have loaded")


def test_screen_readers_get_names_and_are_not_read_every_token(page: Page, server: Scripted) -> None:
    page.open(server.url)
    page.ask("q")
    server.next_question()
    page.run("""window.heard = [];
        const live = '[aria-live], [role=status], [role=alert], [role=log]';
        new MutationObserver(changes => changes.forEach(({ target }) => {
          const region = (target.nodeType === 1 ? target : target.parentElement).closest(live);
          if (region && region.id === 'status') heard.push(region.textContent);
          else if (region && !region.hidden) heard.push('!' + region.id);
        })).observe(document.body, { subtree: true, childList: true, characterData: true });""")
    for i in range(20):
        server.say(content=f"word{i} ")
        page.until(lambda i=i: f"word{i}" in page.text(".said"), "a word")
    server.end()
    page.idle()
    text = " ".join(f"word{i}" for i in range(20))
    page.until(lambda: page.text("#status").startswith("Answer: "), "it is told at the end")
    assert page.run("return heard") == [f"Answer: {text} "]

    server.model |= EVERYTHING
    page.open(server.url, WIDE)
    rich_conversation(page, server)
    page.browser.execute_cdp_cmd("Accessibility.enable", {})
    seen = described(page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {}))
    needs_name = {"button", "textbox", "link", "dialog", "article", "region", "main", "navigation", "complementary", "spinbutton"}
    assert not [role for role, name in seen if role in needs_name and not name]
    assert {"main", "complementary", "navigation", "heading", "table", "status"} <= {role for role, _ in seen}
    assert ("button", "Send") in seen and ("textbox", "Your message") in seen and ("article", "Your message") in seen
    assert ("MathMLMath", "") in seen or any(role.startswith("Math") for role, _ in seen), "formulas are read as such"
    levels = page.run("return [...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].filter(e => e.checkVisibility()).map(e => +e.tagName[1])")
    assert levels.count(1) == 1 and 3 in levels, "the answer's headings are below the page's"
    page.press("#open-settings")
    seen = described(page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {}))
    assert {("textbox", "System prompt"), ("spinbutton", "Temperature"), ("spinbutton", "Longest answer"), ("textbox", "Tools"),
            ("dialog", "Settings")} <= set(seen)  # fmt: skip


def test_the_keyboard_alone(page: Page, server: Scripted) -> None:
    page.open(server.url)
    page.until(lambda: page.text("#model") == "model", "it has loaded")

    def focused() -> str:
        return page.run("const e = document.activeElement; return e.id || e.ariaLabel || e.title || e.textContent")

    def tab(times: int = 1, *held: str) -> list[str]:
        order = []
        for _ in range(times):
            page.browser.switch_to.active_element.send_keys(*held, Keys.TAB)
            order.append(focused())
        return order

    assert focused() == "question"
    assert tab() == ["send"]
    page.run("document.getElementById('question').focus()")
    before = tab(6, Keys.SHIFT)[::-1]
    assert before[:3] == ["open-side", "open-settings", "fresh-too"] and len(set(before)) == 6, "header, then examples"
    page.all("#open-side")[0].send_keys(Keys.ENTER)
    assert page.shown("#side") and focused() == "close-side" and page.run("return document.getElementById('stage').inert")
    page.browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    page.until(lambda: not page.shown("#side"), "Escape closes the drawer")
    assert focused() == "open-side" and page.all("#open-side")[0].get_attribute("aria-expanded") == "false"
    page.all("#open-settings")[0].send_keys(Keys.ENTER)
    page.browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not page.shown("#settings") and focused() == "open-settings"
    page.ask("q")
    server.answer("```sh\nls\n```")
    page.idle()
    assert focused() == "question"
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    names = []
    for _ in range(6):
        names += tab(1, Keys.SHIFT)
        assert page.run(outline) != "none", f"{names[-1]} shows that it has the focus"
    assert names[::-1][:4] == ["Copy message", "Edit message", "Copy code", "ls"]


@pytest.mark.parametrize("width", [390, 1024, *(pytest.param(n, marks=pytest.mark.trust) for n in (320, 768, 1920))])
def test_every_width(page: Page, server: Scripted, width: int) -> None:
    """Nothing is cut off or wider than the page, and everything can be touched."""
    server.model |= EVERYTHING
    page.open(server.url, (width, 800))
    rich_conversation(page, server)
    page.run("document.getElementById('notice').hidden = false; document.getElementById('notice-text').textContent = 'n'.repeat(200)")
    too_wide = """
        const width = document.documentElement.clientWidth, scrolls = '.table, .katex-display, pre, .unseen, #side:not(.open), .katex-mathml';
        return [...document.querySelectorAll('body *')].filter(e => e.checkVisibility({ visibilityProperty: true }) && !e.closest(scrolls))
          .map(e => [e.tagName + '.' + e.className, e.getBoundingClientRect()]).filter(([, r]) => r.width && (r.left < -1 || r.right > width + 1))
          .map(([name, r]) => `${name} ${r.left} ${r.right}`)"""
    assert page.run("return document.documentElement.scrollWidth") == width and page.run(too_wide) == []
    small = "return [...document.querySelectorAll('button')].filter(e => e.checkVisibility({ visibilityProperty: true })).map(e => [e.title || e.id, e.getBoundingClientRect()]).filter(([, r]) => r.width < 24 || r.height < 24).map(([n]) => n)"
    assert page.run(small) == []
    assert page.shown("#side") == (width >= 1024)
    for opener in ("#open-side", "#open-settings"):
        if page.shown(opener):
            page.press(opener)
            assert page.run(too_wide) == []
            page.browser.switch_to.active_element.send_keys(Keys.ESCAPE)


CONTRAST = """
const parse = colour => { const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const over = ([r, g, b, a], back) => [r, g, b].map((v, i) => v * a + back[i] * (1 - a));
const behind = e => { if (!e) return [255, 255, 255]; const colour = parse(getComputedStyle(e).backgroundColor);
  return colour[3] === 1 ? colour : over(colour, behind(e.parentElement)); };
const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let n = 0;
while (walker.nextNode()) {
  const e = walker.currentNode.parentElement, style = getComputedStyle(e);
  if (!walker.currentNode.data.trim() || !e.checkVisibility({ visibilityProperty: true }) || e.closest('.unseen, .katex-mathml, :disabled')) continue;
  n += 1;
  const value = ratio(over(parse(style.color), behind(e)), behind(e));
  if (value < 4.5) found.push(`${value.toFixed(2)} ${e.tagName}.${e.className} ${walker.currentNode.data.slice(0, 30)}`);
}
for (const e of document.querySelectorAll('button svg, input, textarea')) {  // 3 for what is no text
  if (!e.checkVisibility({ visibilityProperty: true }) || e.closest('#ask textarea, :disabled')) continue;
  const style = getComputedStyle(e), colour = e.tagName === 'svg' ? style.color : style.borderTopColor;
  const value = ratio(over(parse(colour), behind(e.parentElement)), behind(e.parentElement));
  if (value < 3) found.push(`${value.toFixed(2)} ${e.tagName} ${e.id} ${e.parentElement.title}`);
  const written = e.placeholder && parse(getComputedStyle(e, '::placeholder').color);
  if (written && ratio(written, behind(e)) < 4.5) found.push(`placeholder of ${e.id}`);
}
return [n, found];
"""


@pytest.mark.parametrize("dark", [False, pytest.param(True, marks=pytest.mark.trust)], ids=["light", "dark"])
def test_contrast(page: Page, server: Scripted, dark: bool) -> None:
    """WCAG 2.2: 4.5 for every text, 3 for icons and the borders of fields."""
    server.model |= EVERYTHING
    page.open(server.url, WIDE, dark)
    page.until(lambda: page.all("#examples button"), "the examples")
    assert page.run(CONTRAST) == [page.run(CONTRAST)[0], []]
    rich_conversation(page, server)
    page.run("for (const e of document.querySelectorAll('.round')) e.style.opacity = 1; document.querySelector('#scroller').scrollTop = 0")
    server.refusal = (500, {"error": {"message": "no"}})
    n, found = page.run(CONTRAST)
    assert n > 60 and not found
    page.press("#think")
    page.press("[title='Show drafted tokens']")
    assert page.run(CONTRAST)[1] == []
    page.press("[title='Answer again']")
    page.until(lambda: page.shown("#notice.error"), "an error")
    page.press("#open-settings")
    assert page.run(CONTRAST)[1] == []
    seen = page.run("return getComputedStyle(document.body).backgroundColor")
    assert (seen == "rgb(23, 24, 27)") is dark
