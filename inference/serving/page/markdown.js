// Markdown to elements. What a model writes is parsed by markdown-it without HTML, and what comes of it passes DOMPurify
// with short lists of elements and attributes. Formulas are KaTeX's, which builds elements itself and is loaded with the
// first formula.

import "./vendored/markdown-it-15.0.3/markdown-it.umd.min.js";
import "./vendored/dompurify-3.5.0/purify.min.js";
import { CodeBlock } from "./code.js";
import { make } from "./dom.js";

const { markdownit, DOMPurify } = globalThis;
const TAGS = "p br hr strong em s a code pre ul ol li blockquote table thead tbody tr th td h3 h4 h5 h6".split(" ");
const PURE = { ALLOWED_TAGS: TAGS, ALLOWED_ATTR: ["href", "title", "class", "start"], ALLOW_DATA_ATTR: false, ALLOW_ARIA_ATTR: false, RETURN_DOM_FRAGMENT: true };
const FORMULA = { IN_PLACE: true, USE_PROFILES: { html: true, mathMl: true, svg: true }, ADD_TAGS: ["semantics", "annotation"] };
const KATEX = { throwOnError: true, trust: false, strict: false, maxSize: 30, maxExpand: 500 };
const MAX_FORMULA = 4000, MAX_FORMULA_LINES = 100, MAX_KEPT = 300;

const md = markdownit({ html: false, linkify: true, breaks: true });
const { escapeHtml } = md.utils;
md.validateLink = url => /^(https?:|mailto:)/i.test(url.trim());
md.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
md.inline.ruler.before("escape", "formula", inlineFormula);
md.block.ruler.before("fence", "formula_block", blockFormula, { alt: ["paragraph", "blockquote", "list"] });
md.renderer.rules.formula = (tokens, i) => `<code class="tex${tokens[i].meta.display ? " display" : ""}">${escapeHtml(tokens[i].content)}</code>`;
md.renderer.rules.formula_block = (tokens, i) => `<p>${md.renderer.rules.formula(tokens, i)}</p>\n`;
// The policy loads no pictures, so they are links.
md.renderer.rules.image = (tokens, i) => `<a href="${escapeHtml(tokens[i].attrGet("src") ?? "")}">${escapeHtml(tokens[i].content || "picture")}</a>`;
for (const name of ["th_open", "td_open"]) {
  md.renderer.rules[name] = (tokens, i, options, env, self) => {
    const side = /text-align:(\w+)/.exec(tokens[i].attrGet("style") ?? "");
    tokens[i].attrs = side && [["class", side[1]]];
    return self.renderToken(tokens, i, options);
  };
}
for (const name of ["heading_open", "heading_close"]) {  // below the page's own
  md.renderer.rules[name] = (tokens, i, options, env, self) => {
    tokens[i].tag = `h${Math.min(6, Number(tokens[i].tag.slice(1)) + 2)}`;
    return self.renderToken(tokens, i, options);
  };
}

// `$…$` as pandoc reads it, so that prices stay prices; `\(…\)`; `$$…$$` and `\[…\]` are displayed.
function inlineFormula(state, silent) {
  const { src, pos } = state;
  const open = ["$$", "$", "\\(", "\\["].find(mark => src.startsWith(mark, pos));
  if (!open) return false;
  const close = { "\\(": "\\)", "\\[": "\\]" }[open] ?? open, begin = pos + open.length, last = Math.min(state.posMax, begin + MAX_FORMULA);
  for (let end = src.indexOf(close, begin); end >= 0 && end < last; end = src.indexOf(close, end + 1)) {
    if (close[0] === "$" && src[end - 1] === "\\") continue;
    if (close === "$" && (/\s/.test(src[begin]) || /\s/.test(src[end - 1]) || /\d/.test(src[end + 1] ?? "") || src[begin] === "$")) continue;
    if (!src.slice(begin, end).trim()) return false;
    if (!silent) {
      const token = state.push("formula", "code", 0);
      token.content = src.slice(begin, end).trim();
      token.meta = { display: open === "$$" || open === "\\[" };
    }
    state.pos = end + close.length;
    return true;
  }
  return false;
}

function blockFormula(state, first, end, silent) {
  const at = line => state.src.slice(state.bMarks[line] + state.tShift[line], state.eMarks[line]);
  const open = at(first).slice(0, 2), close = { "$$": "$$", "\\[": "\\]" }[open];
  if (!close || state.sCount[first] - state.blkIndent >= 4) return false;
  const lines = [];
  for (let line = first, rest = at(first).slice(2); ; rest = at(line)) {
    const found = rest.indexOf(close);
    lines.push(found < 0 ? rest : rest.slice(0, found));
    line += 1;
    if (found >= 0) {
      if (rest.slice(found + 2).trim() || !lines.join("").trim()) return false;
      if (silent) return true;
      const token = state.push("formula_block", "code", 0);
      token.content = lines.join("\n").trim();
      token.meta = { display: true };
      token.map = [first, line];
      state.line = line;
      return true;
    }
    if (line >= end || line > first + MAX_FORMULA_LINES || state.sCount[line] < state.blkIndent) return false;
  }
}

// A fragment of `source`. `settled`: it does not grow any more, so code in it is coloured.
export function render(source, settled = true) {
  const fragment = DOMPurify.sanitize(md.render(source).trimEnd(), PURE);
  for (const code of fragment.querySelectorAll("code.tex")) showFormula(code, code.classList.contains("display"));
  for (const pre of fragment.querySelectorAll("pre")) {
    const language = /language-(\S+)/.exec(pre.firstElementChild?.className ?? "")?.[1] ?? "";
    pre.replaceWith(CodeBlock.of(language, pre.textContent, settled).node);
  }
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const table of fragment.querySelectorAll("table")) {
    const frame = make("div", { className: "table", tabIndex: 0, role: "region", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
  return fragment;
}

// --- formulas ---------------------------------------------------------------------------------------------------------

let katex = null, loading = null;
const kept = new Map();  // elements of formulas by their source: a block that grows is rendered often

function loadKatex() {
  document.head.append(make("link", { rel: "stylesheet", href: "/page/vendored/katex-0.19.1/katex.min.css" }));
  return import("./vendored/katex-0.19.1/katex.min.js").then(() => {
    katex = globalThis.katex;
  });
}

// Puts the formula that `code` holds in its place, now or once KaTeX is there; its source stays where KaTeX has an error.
function showFormula(code, display) {
  if (!katex) {
    loading ??= loadKatex();
    loading.then(() => showFormula(code, display), () => { loading = null; });
    return;
  }
  const tex = code.textContent, name = `${display} ${tex}`;
  if (!kept.has(name)) {
    if (kept.size >= MAX_KEPT) kept.delete(kept.keys().next().value);
    kept.set(name, formula(tex, display));
  }
  const made = kept.get(name);
  if (made instanceof Node) code.replaceWith(made.cloneNode(true));
  else {
    code.className = "tex wrong";
    code.title = made;
  }
}

function formula(tex, display) {
  try {
    const tree = katex.__renderToDomTree(tex, { ...KATEX, displayMode: display });
    moveStyles(tree);
    const node = tree.toNode();
    for (const drawing of node.querySelectorAll("[data-style]")) {
      for (const rule of drawing.dataset.style.split(";")) drawing.style.setProperty(...rule.split(":").map(part => part.trim()));
    }
    DOMPurify.sanitize(node, FORMULA);
    if (display) node.tabIndex = 0;  // a wide one scrolls
    return node;
  } catch (e) {
    return e.message;
  }
}

// KaTeX gives some drawings an attribute `style`, which the policy forbids, and all else styles as properties, which it
// allows. Moves the former to an attribute of data.
function moveStyles(node) {
  if (node.attributes?.style) {
    node.attributes["data-style"] = node.attributes.style;
    delete node.attributes.style;
  }
  for (const child of node.children ?? []) moveStyles(child);
}
