// Conversations in the browser's localStorage, bounded: the one that was longest untouched goes first.

import { Conversation, readSettings, SETTINGS } from "./conversation.js";

const PREFIX = "chat:", PREFERRED = "chat-settings", FORMAT = "chat-conversations";
export const LIMITS = { conversations: 200, characters: 4_000_000 };

let headings = null;  // by id: {id, title, updated, size}

function heading(id, raw) {
  const { title, updated } = Conversation.from(JSON.parse(raw));
  return { id, title, updated, size: raw.length };
}

function known() {
  if (headings) return headings;
  headings = new Map();
  for (const key of Object.keys(localStorage)) {
    if (!key.startsWith(PREFIX)) continue;
    const id = key.slice(PREFIX.length);
    try {
      headings.set(id, heading(id, localStorage.getItem(key)));
    } catch {
      localStorage.removeItem(key);  // not ours, or damaged
    }
  }
  return headings;
}

// All that are kept, newest first.
export const list = () => [...known().values()].sort((a, b) => b.updated - a.updated);

export function load(id) {
  try {
    const conversation = Conversation.from(JSON.parse(localStorage.getItem(PREFIX + id)));
    conversation.id = id;
    return conversation;
  } catch {
    return null;
  }
}

// Keeps a conversation and returns the titles of those that had to go for it. Throws an Error where it has no room.
export function save(conversation) {
  const stored = load(conversation.id), others = list().filter(({ id }) => id !== conversation.id).reverse();
  if (stored) conversation.merge(stored);
  const raw = JSON.stringify(conversation), gone = [];
  const drop = () => {
    const oldest = others.shift();
    if (!oldest) throw new Error("This conversation is longer than the browser keeps. Export it to have it in a file.");
    remove(oldest.id);
    gone.push(oldest.title);
  };
  const size = () => others.reduce((sum, other) => sum + other.size, raw.length);
  while (others.length >= LIMITS.conversations || size() > LIMITS.characters) drop();
  for (;;) {
    try {
      localStorage.setItem(PREFIX + conversation.id, raw);
      break;
    } catch {
      drop();  // the browser's own limit
    }
  }
  known().set(conversation.id, { id: conversation.id, title: conversation.title, updated: conversation.updated, size: raw.length });
  return gone;
}

export function remove(id) {
  localStorage.removeItem(PREFIX + id);
  known().delete(id);
}

// Calls `changed(id)` when another tab has changed a conversation, or with null when it has cleared all.
export function watch(changed) {
  addEventListener("storage", ({ key }) => {
    if (key !== null && !key.startsWith(PREFIX)) return;
    headings = null;
    changed(key && key.slice(PREFIX.length));
  });
}

// The settings a new conversation starts with.
export function preferred() {
  try {
    return readSettings(JSON.parse(localStorage.getItem(PREFERRED)));
  } catch {
    return { ...SETTINGS };
  }
}

export function prefer(settings) {
  try {
    localStorage.setItem(PREFERRED, JSON.stringify(settings));
  } catch {
    // full: they hold for this conversation
  }
}

export function exported(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

// The conversations of an exported file. Throws an Error that says what is wrong with it.
export function imported(raw) {
  let data;
  try {
    data = JSON.parse(raw);
  } catch {
    throw new Error("it is not JSON");
  }
  if (data?.format !== FORMAT || !Array.isArray(data.conversations)) throw new Error("it is not an export of this page");
  if (data.version !== 1) throw new Error("it is of another version of this page");
  return data.conversations.map(conversation => Conversation.from(conversation));
}
