// How messages look: questions, answers while they grow and after, and results of tools.

import { copy, icon, iconButton, make } from "./dom.js";
import { GrowingText } from "./growing.js";

const seconds = ms => `${(ms / 1000).toFixed(ms < 1000 ? 2 : ms < 10_000 ? 1 : 0)} s`;
const ENDINGS = {
  stopped: "Stopped.", length: "Cut at the limit of tokens.", broken: "The connection ended before the answer did.",
};

// ‹ 2/3 › where there are several messages in this place; `show` is called with the one to show.
function branches(message, siblings, show) {
  if (siblings.length < 2) return [];
  const at = siblings.indexOf(message);
  const back = iconButton("back", "Earlier version", () => show(siblings[at - 1]));
  const forth = iconButton("forth", "Later version", () => show(siblings[at + 1]));
  back.disabled = at === 0;
  forth.disabled = at === siblings.length - 1;
  return [make("span", { className: "branches" }, back, make("span", { className: "faint", textContent: `${at + 1}/${siblings.length}` }), forth)];
}

// A question, and in its place a field while it is edited. `act`: {edit(text), show(sibling)}.
export function questionView(message, siblings, act) {
  const text = make("div", { className: "bubble", textContent: message.content });
  const copying = iconButton("copy", "Copy message", () => copy(message.content, copying));
  const editing = iconButton("edit", "Edit message", () => edit());
  const tools = make("div", { className: "tools" }, ...branches(message, siblings, act.show), copying, editing);
  const whole = make("article", { className: "question", "aria-label": "Your message" }, text, tools);

  function edit() {
    const field = make("textarea", { value: message.content, "aria-label": "Edit message" });
    const send = make("button", { className: "filled", textContent: "Send" });
    const cancel = make("button", { type: "button", textContent: "Cancel" });
    const form = make("form", { className: "editor" }, field, make("div", { className: "foot" }, cancel, send));
    const close = () => {
      form.replaceWith(text, tools);
      editing.focus();
    };
    cancel.addEventListener("click", close);
    form.addEventListener("submit", event => {
      event.preventDefault();
      if (field.value.trim()) act.edit(field.value.trim());
    });
    field.addEventListener("keydown", event => {
      if (event.isComposing) return;
      if (event.key === "Escape") close();
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        form.requestSubmit();
      }
      if (event.key === "Escape" || event.key === "Enter") event.stopPropagation();
    });
    tools.remove();
    text.replaceWith(form);
    field.focus();
  }
  return whole;
}

export function resultView(message) {
  const text = make("pre", { textContent: message.content, tabIndex: 0 });
  return make("article", { className: "call", "aria-label": "Result of a tool" }, make("h3", { textContent: "Result" }), text);
}

// An answer. `begin` to let it grow: add(delta, drafted) as text comes, paint() once a frame, end() at last.
export class AnswerView {
  // `act`: {again(), show(sibling), results(contents)}.
  constructor(message, act) {
    this.message = message;
    this.act = act;
    this.summary = make("summary", { textContent: "Thinking…" });
    this.thought = make("div", { className: "prose" });
    this.details = make("details", { hidden: true }, this.summary, this.thought);
    this.said = make("div", { className: "prose said" });
    this.calls = make("div");
    this.tokens = make("pre", { className: "tokens", tabIndex: 0, "aria-label": "Tokens" });
    const legend = make("p", { className: "faint" }, make("span", { className: "drafted", textContent: "Underlined" }), " tokens were drafted by the MTP module and accepted by the model.");
    this.raw = make("div", { className: "raw", hidden: true }, legend, this.tokens);
    this.figures = make("span", { className: "figures" });
    this.tools = make("div", { className: "tools" });
    this.waiting = make("div", { className: "waiting", "aria-hidden": "true" });
    this.whole = make("article", { className: "answer", "aria-label": "Answer" },
      this.details, this.said, this.raw, this.calls, this.waiting, make("div", { className: "row" }, this.tools, this.figures));
    this.texts = { reasoning: new GrowingText(this.thought), content: new GrowingText(this.said) };
    this.marked = { reasoning: { marks: 0, at: 0 }, content: { marks: 0, at: 0 } };
    this.details.addEventListener("toggle", () => this.paint());
  }

  // Shows a message that is whole.
  static of(message, siblings, act) {
    const view = new AnswerView(message, act);
    if (message.reasoning) view.texts.reasoning.push(message.reasoning);
    view.texts.content.push(message.content);
    view.end(siblings);
    return view;
  }

  // The next piece of reasoning or content.
  add(name, text) {
    this.texts[name].push(text);
  }

  // Shows what came since the last time, at a cost that does not depend on what came before.
  paint() {
    const { reasoning, content, calls } = this.message;
    this.details.hidden = !reasoning;
    this.waiting.hidden = Boolean(content || calls || this.ended);
    if (this.details.open) this.ended ? this.finishReasoning() : this.texts.reasoning.paint();
    if (!this.ended) this.texts.content.paint();
    if (!this.raw.hidden) this.paintTokens();
    if (content || calls) this.summary.textContent = this.thoughtFor;
    this.figures.textContent = this.figuresText;
  }

  // A folded text is rendered when it is opened.
  finishReasoning() {
    if (!this.finished) this.texts.reasoning.finish();
    this.finished = true;
  }

  end(siblings) {
    const { message, tools, act } = this, { content, calls, ending, marks } = message;
    this.ended = true;
    this.texts.content.finish();
    this.paint();
    this.summary.textContent = this.thoughtFor;
    this.calls.replaceChildren(...(calls ?? []).map(callView));
    if (ending) this.said.after(make("p", { className: "ending faint", textContent: ENDINGS[ending] ?? ending }));
    const copying = iconButton("copy", "Copy answer", () => copy(content, copying));
    const again = iconButton("again", "Answer again", act.again);
    tools.replaceChildren(...branches(message, siblings, act.show), copying, again);
    if (marks?.reasoning.length || marks?.content.length) tools.append(this.tokenSwitch());
  }

  tokenSwitch() {
    const made = iconButton("tokens", "Show drafted tokens", () => {
      const shown = this.raw.hidden;
      this.raw.hidden = !shown;
      this.said.hidden = shown;
      made.setAttribute("aria-pressed", shown);
      this.paint();
    });
    made.setAttribute("aria-pressed", "false");
    return made;
  }

  get thoughtFor() {
    const { thought, content, calls, ending } = this.message;
    if (!Number.isFinite(thought)) return content || calls || !ending ? "Thought" : "Thought, unfinished";
    return `Thought for ${seconds(thought)}`;
  }

  get figuresText() {
    const { first, tokens, rate, marks } = this.message;
    const all = marks ? [...(this.ended ? [marks.reasoning, marks.content] : [])].flat() : [];
    const drafted = all.length && Math.round((100 * all.filter(mark => mark < 0).length) / all.length);
    return [
      first !== undefined && `${seconds(first)} to the first token`, tokens > 0 && `${tokens} ${tokens === 1 ? "token" : "tokens"}`,
      rate > 0 && `${rate.toFixed(1)} tokens/s`, all.length > 0 && `${drafted} % drafted`,
    ].filter(Boolean).map(part => part.replaceAll(" ", "\u00a0")).join(" · ");  // lines end between them
  }

  // Each token in a box of its own; what MTP drafted and the model accepted is underlined.
  paintTokens() {
    for (const name of ["reasoning", "content"]) {
      const marks = this.message.marks[name], seen = this.marked[name], text = this.message[name] ?? "";
      if (name === "content" && seen.marks === 0 && marks.length && this.message.reasoning) this.tokens.append("\n\n");
      for (; seen.marks < marks.length; seen.marks += 1) {
        const length = Math.abs(marks[seen.marks]), part = text.slice(seen.at, seen.at + length);
        this.tokens.append(marks[seen.marks] < 0 ? make("span", { className: "drafted", textContent: part }) : make("span", { textContent: part }));
        seen.at += length;
      }
    }
  }

  // Fields for the results of the answer's calls, and a button that sends them.
  askForResults() {
    const fields = this.message.calls.map(call => make("textarea", { rows: 2, required: true, "aria-label": `Result of ${call.name}`, placeholder: "Result" }));
    const form = make("form", { className: "editor" }, ...fields, make("div", { className: "foot" }, make("button", { className: "filled", textContent: "Send results" })));
    form.addEventListener("submit", event => {
      event.preventDefault();
      this.act.results(fields.map(field => field.value));
    });
    this.calls.append(form);
  }
}

function callView({ name, arguments: given }) {
  let shown = given;
  try {
    shown = JSON.stringify(JSON.parse(given), null, 2);
  } catch {
    // as the model wrote it
  }
  const title = make("h3", {}, icon("settings"), make("span", { textContent: name }));
  return make("section", { className: "call", "aria-label": `Call of ${name}` }, title, make("pre", { textContent: shown, tabIndex: 0 }));
}
