// A block of code that can grow: appending costs the same however long it is. It is coloured once it is whole.

import { copy, iconButton, make } from "./dom.js";

const LINES = 50;  // of one box, which is what the browser lays out anew when a line comes
const MAX_COLOURED = 60_000;  // characters

let highlighter = null, loading = null;

export class CodeBlock {
  constructor(language) {
    this.language = language;
    this.lines = [];
    this.code = make("code");
    const name = make("span", { className: "language", textContent: language || "text" });
    const button = iconButton("copy", "Copy code", () => copy(this.lines.join("\n"), button));
    this.node = make("div", { className: "code" }, make("div", { className: "code-bar" }, name, button),
      make("pre", { tabIndex: 0 }, this.code));
    this.box();
  }

  static of(language, text, settled) {
    const block = new CodeBlock(language);
    block.lines = text.replace(/\n$/, "").split("\n");
    block.code.textContent = block.lines.join("\n");
    if (settled) block.colour();
    return block;
  }

  box() {
    this.text = document.createTextNode("");
    this.unended = document.createTextNode("");
    this.code.append(make("span", { className: "lines" }, this.text, this.unended));
  }

  line(text) {
    this.lines.push(text);
    this.unended.data = "";
    this.text.appendData(`${text}\n`);
    if (this.lines.length % LINES === 0) this.box();
  }

  // Shows the beginning of a line that has not ended.
  tail(text) {
    if (this.unended.data !== text) this.unended.data = text;
  }

  finish() {
    this.code.textContent = this.lines.join("\n");
    this.colour();
  }

  colour() {
    const text = this.code.textContent;
    if (!this.language || text.length > MAX_COLOURED) return;
    if (!highlighter) {
      loading ??= import("./vendored/highlight-11.12.0/highlight.min.js").then(loaded => { highlighter = loaded.default; });
      loading.then(() => this.colour(), () => { loading = null; });
      return;
    }
    if (!highlighter.getLanguage(this.language)) return;
    const html = highlighter.highlight(text, { language: this.language, ignoreIllegals: true }).value;
    const pure = { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], RETURN_DOM_FRAGMENT: true };
    this.code.replaceChildren(globalThis.DOMPurify.sanitize(html, pure));
  }
}
