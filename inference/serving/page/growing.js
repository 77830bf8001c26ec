// Markdown that grows, at a cost per frame that does not depend on its length. Top-level blocks that have ended are
// rendered once; only the last one is rendered again. A block of code has its lines appended. A block that grows beyond
// LONG characters is cut between two lines for the time being, which may change how it looks, and rendered whole at the
// end; one line is cut at LONGEST characters only.

import { CodeBlock } from "./code.js";
import { make } from "./dom.js";
import { render } from "./markdown.js";

export const LONG = 1200, LONGEST = 6000;
const FENCE = /^([ \t]*)(`{3,}(?=[^`]*$)|~{3,})[ \t]*([^\s`]*)/;
const MARKER = /^(?:[-*+]|\d{1,9}[.)])(?:\s|$)/;
const HEADING = /^#{1,6}(?:\s|$)/;
const MAX_FORMULA_LINES = 100;  // as in markdown.js
const REFERENCE = /^ {0,3}\[[^\]]+\]:/;  // a definition may change any earlier block
const RULE = /^(?=.*-)[\s|:-]+$/;  // below a table's head
const UNSETTLED = /(?:^|\n)[ \t]*(?:[-=*+_]+|#{1,6}|\d+[.)]|`+|~+|\|[\s|:-]*|\$\$?|\\\[?)[ \t]*$/;  // may become anything

export class GrowingText {
  constructor(root) {
    this.root = root;
    this.pending = "";
    this.pieces = [];  // rendered for good: {source, node, joined}
    this.uncertain = false;  // what ended a block may be read otherwise by Markdown: all is rendered again at the end
    this.begin("");
  }

  // Adds text, which is shown by the next `paint`.
  push(text) {
    this.pending += text;
  }

  paint() {
    if (!this.pending) return;
    this.source += this.pending;
    this.pending = "";
    this.scan();
    if (this.block) this.block.tail(/^[`~]+$/.test(this.source) ? "" : this.source);
    else this.node.replaceChildren(render(this.prefix + this.source.replace(UNSETTLED, ""), false));
  }

  // Shows all of it as it would be had it come in one piece.
  finish() {
    this.source += this.pending;
    this.pending = "";
    this.scan();
    this.uncertain ||= Boolean(this.formula) || (!this.block && REFERENCE.test(this.source.slice(this.scanned)));
    if (this.block) this.endBlock(this.source);
    else this.commit(this.source.length);
    this.node.remove();
    let group = [];
    for (const piece of [...this.pieces, null]) {
      if (piece && (group.length === 0 || piece.joined || this.uncertain)) group.push(piece);
      else {
        this.unite(group);
        group = piece ? [piece] : [];
      }
    }
  }

  unite([first, ...rest]) {
    if (!rest.length) return;
    if (!first.node.parentNode) this.root.prepend(first.node);  // it was blank
    first.node.replaceChildren(render([first, ...rest].map(piece => piece.source).join("")));
    for (const { node } of rest) node.remove();
  }

  begin(source) {
    Object.assign(this, {
      source, joined: false, prefix: "", scanned: 0, block: null,
      fence: "", formula: "", formulaLines: 0, blank: false, isList: false, midline: false,  // at `scanned`
    });
    this.node = make("div", { className: "piece" });
    this.root.append(this.node);
  }

  // Renders the first `end` characters for good.
  commit(end) {
    const source = this.source.slice(0, end), rest = this.source.slice(end);
    if (end) this.pieces.push({ source, node: this.node, joined: this.joined });
    if (source.trim()) this.node.replaceChildren(render(this.prefix + source));
    else this.node.remove();
    this.begin(rest);
  }

  // Goes through the lines that have ended since, and commits what they end.
  scan() {
    for (;;) {
      const end = this.source.indexOf("\n", this.scanned);
      if (end < 0) {
        if (this.block || this.source.length <= LONGEST) return;
        this.cut();
      } else if (this.block) {
        const line = this.source.slice(0, end);
        this.source = this.source.slice(end + 1);
        if (this.closes(line)) this.endBlock("", line);
        else this.block.line(line);
      } else {
        const at = this.scanned;
        this.scanned = end + 1;
        this.look(this.source.slice(at, end), at, end + 1);
        if (!this.block && this.scanned > LONG) this.cut();
      }
    }
  }

  closes(line) {
    const text = line.trim();
    return text.length >= this.fence.length && text === this.fence[0].repeat(text.length) && !/^(?: {4}|\t)/.test(line);
  }

  // One whole line, from `at` to `next`, outside of top-level code.
  look(line, at, next) {
    const flush = /^\S/.test(line), isRest = this.midline;
    this.midline = false;
    if (REFERENCE.test(line)) this.uncertain = true;
    if (this.fence && this.isList && flush) this.fence = "";  // it ends with its item
    if (this.fence) {
      if (this.closes(line.trimStart())) this.fence = "";
      return;
    }
    if (this.formula) {
      const end = line.indexOf(this.formula);
      this.formulaLines += 1;
      if (end >= 0) this.uncertain ||= Boolean(line.slice(end + 2).trim()) || this.formulaLines >= MAX_FORMULA_LINES;
      if (end >= 0) this.formula = "";
      return;
    }
    if (!line.trim()) {
      this.blank = !isRest;
      return;
    }
    const isMarker = MARKER.test(line.trimStart()) && !isRest, fence = isRest ? null : FENCE.exec(line);
    const begins = flush && !isRest && (fence || HEADING.test(line) || (this.blank && !(this.isList && isMarker)));
    if (begins && at > 0) {
      this.commit(at);  // the line is looked at again, as the first of its block
      return;
    }
    if (begins) Object.assign(this, { joined: false, isList: false });
    if (begins && fence) {
      this.beginBlock(fence, next);
      return;
    }
    this.blank = false;
    this.isList ||= isMarker;
    if (begins && HEADING.test(line)) this.commit(next);
    else if (fence) this.fence = this.isList || fence[1].length < 4 ? fence[2] : "";
    else {
      const open = /^\s*(\$\$|\\\[)/.exec(line)?.[1], close = open === "\\[" ? "\\]" : open;
      if (open && !line.trimStart().slice(2).includes(close)) {
        Object.assign(this, { formula: close, formulaLines: 1 });
        this.uncertain ||= this.isList && flush;  // to Markdown these lines may be the item's text
      }
    }
  }

  beginBlock([, , fence, language], next) {
    this.opening = this.source.slice(0, next);
    this.source = this.source.slice(next);  // from here on only the line that has not ended
    this.scanned = 0;
    this.fence = fence;
    this.block = new CodeBlock(language);
    this.node.replaceChildren(this.block.node);
  }

  endBlock(unended, closing = null) {
    const { block, node } = this;
    let source = this.opening + block.lines.map(line => `${line}\n`).join("");
    if (closing !== null) source += `${closing}\n`;
    else if (unended) source += unended;
    if (unended && !this.closes(unended)) block.line(unended);
    block.finish();
    this.pieces.push({ source, node, joined: false });
    this.begin(closing === null ? "" : this.source);
  }

  // Cuts a long block for the time being: before a line that is not indented, else between lines, else between words.
  cut() {
    const { scanned, fence, formula, formulaLines, blank, isList, source } = this;
    const within = source.slice(0, scanned > 0 ? scanned : LONGEST);
    const [head, rule] = source.split("\n", 2), isTable = head.includes("|") && RULE.test(rule ?? "");
    const prefix = this.prefix || (isTable ? `${head}\n${rule}\n` : "");
    const end = [/[^]*\n(?=\S)/, /[^]*\n/, /[^]*\s/, /[^]*/].map(place => place.exec(within)?.[0].length ?? 0)
      .find(length => length > (this.prefix ? 0 : prefix.length));
    this.commit(end);
    this.node.className = "piece joined";
    Object.assign(this, { joined: true, prefix, scanned: Math.max(0, scanned - end), midline: end > scanned, fence, formula, formulaLines, blank, isList });
  }
}
