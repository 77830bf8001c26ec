// A conversation is a tree of messages: to edit or to ask again adds a branch and loses nothing.

export const SETTINGS = { system: "", temperature: null, maxTokens: null, thinking: false, tools: "" };
const ROLES = ["user", "assistant", "tool"];
const MAX_TEXT = 4_000_000, MAX_MESSAGES = 10_000, MAX_TITLE = 80;

export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(9)), byte => byte.toString(36).padStart(2, "0")).join("");

export class Conversation {
  constructor(settings = SETTINGS) {
    this.id = newId();
    this.title = "";
    this.updated = Date.now();
    this.settings = { ...settings };
    this.messages = [];
    this.leaf = null;  // id of the last message that is shown
  }

  // A message after `parent` (null: the first), which becomes the last one shown.
  add(role, parent, fields) {
    const message = { id: newId(), parent: parent?.id ?? null, role, content: "", ...fields };
    this.messages.push(message);
    this.leaf = message.id;
    if (!this.title && role === "user") this.title = title(message.content);
    return message;
  }

  remove(message) {
    this.messages = this.messages.filter(other => other !== message);
    this.leaf = message.parent;
    this.select(this.byId(message.parent));
  }

  byId(id) {
    return this.messages.find(message => message.id === id) ?? null;
  }

  // The messages that are shown, first to last.
  path() {
    const known = new Map(this.messages.map(message => [message.id, message])), path = [];
    for (let message = known.get(this.leaf); message; message = known.get(message.parent)) path.push(message);
    return path.reverse();
  }

  // All messages in the place of this one, itself included, oldest first.
  siblings(message) {
    return this.messages.filter(other => other.parent === message.parent);
  }

  // Shows the branch of `message`, to its newest end.
  select(message) {
    for (let next = message; next; next = this.messages.findLast(other => other.parent === this.leaf)) this.leaf = next.id;
  }

  // Takes over the messages that another tab has added to the same conversation.
  merge(other) {
    const known = new Set(this.messages.map(message => message.id));
    this.messages.push(...other.messages.filter(message => !known.has(message.id)));
  }

  // What is sent to the server to have the message after `last` written.
  request(last) {
    const { system, temperature, maxTokens } = this.settings, messages = system ? [{ role: "system", content: system }] : [];
    this.leaf = last.id;
    for (const message of this.path()) messages.push(sent(message));
    return {
      messages, stream: true, stream_options: { include_usage: true },
      ...(temperature !== null && { temperature }), ...(maxTokens !== null && { max_tokens: maxTokens }),
    };
  }

  // A conversation from JSON that may come from anywhere. Throws an Error that says what is wrong.
  static from(data) {
    const made = new Conversation();
    if (!Array.isArray(data?.messages)) throw new Error("a conversation has no list of messages");
    if (data.messages.length > MAX_MESSAGES) throw new Error(`a conversation has more than ${MAX_MESSAGES} messages`);
    if (/^\w{6,40}$/.test(data.id)) made.id = data.id;
    made.messages = [];
    const known = new Set([null]);
    for (const message of data.messages) {
      const read = readMessage(message);
      if (!known.has(read.parent) || known.has(read.id)) throw new Error("messages do not follow one another");
      known.add(read.id);
      made.messages.push(read);
    }
    made.leaf = known.has(data.leaf) && data.leaf !== null ? data.leaf : made.messages.at(-1)?.id ?? null;
    made.title = title(typeof data.title === "string" ? data.title : made.messages.find(m => m.role === "user")?.content ?? "");
    made.updated = Number.isFinite(data.updated) ? Math.min(data.updated, Date.now()) : Date.now();
    made.settings = readSettings(data.settings);
    return made;
  }
}

function sent(message) {
  if (message.role === "tool") return { role: "tool", tool_call_id: message.call, content: message.content };
  if (!message.calls) return { role: message.role, content: message.content };
  const calls = message.calls.map(call => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } }));
  return { role: "assistant", content: message.content, tool_calls: calls };
}

export function title(text) {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > MAX_TITLE ? `${line.slice(0, MAX_TITLE - 1).trimEnd()}…` : line;
}

function text(value, what) {
  if (typeof value !== "string" || value.length > MAX_TEXT) throw new Error(`a message's ${what} is no text`);
  return value;
}

function readMessage(data) {
  if (!ROLES.includes(data?.role)) throw new Error("a message is from nobody known");
  const message = {
    id: text(data.id, "id"), parent: data.parent === null ? null : text(data.parent, "parent"),
    role: data.role, content: text(data.content, "content"),
  };
  for (const name of ["reasoning", "ending", "call"]) {
    if (data[name] !== undefined) message[name] = text(data[name], name);
  }
  if (Array.isArray(data.calls)) {
    message.calls = data.calls.map(call => ({
      id: text(call?.id, "call"), name: text(call?.name, "call"), arguments: text(call?.arguments, "call"),
    }));
  }
  for (const name of ["tokens", "first", "thought", "rate"]) {
    if (Number.isFinite(data[name])) message[name] = data[name];
  }
  if (data.marks) {
    message.marks = Object.fromEntries(["reasoning", "content"].map(name =>
      [name, Array.isArray(data.marks[name]) ? data.marks[name].filter(Number.isInteger) : []]));
  }
  return message;
}

export function readSettings(data) {
  const settings = { ...SETTINGS };
  if (typeof data?.system === "string") settings.system = data.system;
  if (typeof data?.tools === "string") settings.tools = data.tools;
  if (Number.isFinite(data?.temperature)) settings.temperature = Math.min(Math.max(data.temperature, 0), 2);
  if (Number.isInteger(data?.maxTokens) && data.maxTokens > 0) settings.maxTokens = data.maxTokens;
  settings.thinking = data?.thinking === true;
  return settings;
}
