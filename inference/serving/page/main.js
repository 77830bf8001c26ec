// The page: which conversation is shown, what is asked, and what the buttons do.

import { receive } from "./answer.js";
import { call, Refused, setKey } from "./api.js";
import { Conversation } from "./conversation.js";
import { $, download, make, say } from "./dom.js";
import { AnswerView, questionView, resultView } from "./message.js";
import { readSettingsForm, showSettings } from "./settings.js";
import { drawSide, openSide, setUpSide } from "./side.js";
import * as store from "./store.js";

const GENERAL = [
  "Explain in three sentences how a rainbow forms.",
  "Write a Python function that tells whether a word is a palindrome, with a test.",
  "Solve x² − 5x + 6 = 0 and show each step.",
];
const DRAFT = "chat-draft", LAST = "chat-last";  // in sessionStorage: what is being written, and the conversation shown
const RETRY_SECONDS = 2, SHORT = 300;  // characters of an answer that are read out

let model = { model: "", context: Infinity, temperature: null, thinking_switch: false, tools: false, drafts: false, examples: [] };
let conversation = new Conversation(store.preferred());
let running = null;  // {controller, message} of the answer on its way
let stuck = true;    // the end is in view and stays there

// --- errors -----------------------------------------------------------------------------------------------------------

function notify(text, action = "", act = null, isError = true) {
  $("notice-text").textContent = text;
  $("notice").classList.toggle("error", isError);
  $("notice-act").textContent = action;
  $("notice-act").hidden = !action;
  $("notice-act").onclick = () => {
    notify("");
    act();
  };
  $("notice").hidden = !text;
}

// Tells what went wrong and offers to try again; where a key is wanted, asks for it first.
function failed(error, again) {
  console.assert(error instanceof Refused, error);
  notify(error.message, "Try again", again);
  if (error.status === 401) askForKey(error.message, again);
}

function askForKey(why, then) {
  const dialog = $("key-dialog");
  $("key-why").textContent = why;
  if (!dialog.open) dialog.showModal();
  $("key").focus();
  $("key-form").onsubmit = () => {
    setKey($("key").value);
    $("key").value = "";
    notify("");
    if (!model.model && then !== start) start();
    then();
  };
}

// --- keeping ----------------------------------------------------------------------------------------------------------

function save() {
  if (!conversation.messages.length) return;
  try {
    const gone = store.save(conversation);
    if (gone.length) notify(`To make room, the oldest ${gone.length === 1 ? `conversation “${gone[0]}” is` : `${gone.length} conversations are`} no longer kept.`, "", null, false);
    sessionStorage.setItem(LAST, conversation.id);
  } catch (e) {
    notify(e.message, "Export", () => download("conversation.json", store.exported([conversation])));
  }
  drawSide(conversation.id);
}

const keepDraft = () => sessionStorage.setItem(DRAFT, $("question").value);

// --- the log ----------------------------------------------------------------------------------------------------------

function toEnd() {
  stuck = true;
  $("scroller").scrollTop = $("scroller").scrollHeight;
}

const painted = () => {
  if (stuck) $("scroller").scrollTop = $("scroller").scrollHeight;
};

function show(sibling) {
  stop();
  conversation.select(sibling);
  draw();
  save();
}

const actions = message => ({
  show,
  again: () => answer(conversation.byId(message.parent)),
  edit(text) {
    stop();
    answer(conversation.add("user", conversation.byId(message.parent), { content: text }));
  },
  results(contents) {
    let parent = message;
    for (const [i, content] of contents.entries()) parent = conversation.add("tool", parent, { content, call: message.calls[i].id });
    answer(parent);
  },
});

// Shows the conversation anew, and gives the view of `growing` back.
function draw(growing = null) {
  let view = null;
  const path = conversation.path(), articles = path.map(message => {
    const siblings = conversation.siblings(message);
    if (message.role === "user") return questionView(message, siblings, actions(message));
    if (message.role === "tool") return resultView(message);
    view = message === growing ? new AnswerView(message, actions(message)) : AnswerView.of(message, siblings, actions(message));
    return view.whole;
  });
  if (view && !growing && path.at(-1).calls?.length) view.askForResults();
  $("log").replaceChildren(...articles);
  $("welcome").hidden = path.length > 0;
  document.title = conversation.title ? `${conversation.title} · ${model.model || "Chat"}` : model.model || "Chat";
  $("with-system").hidden = !conversation.settings.system;
  $("think").setAttribute("aria-pressed", conversation.settings.thinking);
  drawSide(conversation.id);
  toEnd();
  return view;
}

function open(next) {
  stop();
  conversation = next;
  notify("");
  sessionStorage.setItem(LAST, conversation.id);
  draw();
  $("question").focus();
}

// --- answers ----------------------------------------------------------------------------------------------------------

function wait(on) {
  const focused = document.activeElement === $("stop") || document.activeElement === $("send");
  $("send").hidden = on;
  $("stop").hidden = !on;
  if (focused) $("question").focus();
}

function stop() {
  running?.controller.abort();
}

// Has the message after `last` written.
async function answer(last) {
  stop();
  const mine = conversation;  // another one may be shown before this answer ends
  const { thinking, tools } = mine.settings, controller = new AbortController();
  const body = {
    ...mine.request(last), ...(model.thinking_switch && { chat_template_kwargs: { thinking } }),
    ...(model.tools && tools && { tools: JSON.parse(tools) }),
  };
  mine.updated = Date.now();
  save();
  const message = mine.add("assistant", last, {}), siblings = mine.siblings(message), run = { controller, message };
  const view = draw(message);
  running = run;
  wait(true);
  if (document.activeElement === document.body) $("scroller").focus({ preventScroll: true });
  notify("");
  say("Answering");
  let error = null;
  try {
    await receive(body, message, view, controller.signal, () => running === run && save(), painted);
  } catch (e) {
    if (e.name === "AbortError") message.ending = "stopped";
    else {
      error = e;
      message.ending = "broken";
    }
  }
  if (running === run) {
    running = null;
    wait(false);
  }
  const isShown = mine === conversation && mine.path().includes(message) && !running;
  if (error && !message.content && !message.reasoning && !message.calls) mine.remove(message);
  if (mine !== conversation) {
    try {
      store.save(mine);
    } catch {
      // said when it is opened and grows
    }
    return;
  }
  save();
  if (!isShown) return;  // another branch of the conversation is shown
  if (mine.byId(message.id)) {
    view.end(siblings);
    if (message.calls?.length && !error) view.askForResults();
    painted();
  } else draw();
  if (error) failed(error, () => answer(last));
  else say(message.ending === "stopped" ? "Stopped" : spoken(message));
}

// What a screen reader says of an answer that has ended: all of a short one.
function spoken({ content, calls }) {
  if (calls?.length) return `The model calls ${calls.map(({ name }) => name).join(", ")}`;
  return content.length <= SHORT ? `Answer: ${content}` : `Answer, ${content.split(/\s+/).length} words. It begins: ${content.slice(0, SHORT)}`;
}

function ask(question) {
  if (running) return;
  $("question").value = "";
  keepDraft();
  answer(conversation.add("user", conversation.path().at(-1) ?? null, { content: question }));
}

// --- buttons and keys -------------------------------------------------------------------------------------------------

$("ask").addEventListener("submit", event => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (question) ask(question);
});
$("question").addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("question").addEventListener("input", keepDraft);
addEventListener("keydown", event => {
  if (event.key === "Escape" && running && !document.querySelector("dialog[open]") && !$("side").classList.contains("open")) stop();
});
$("stop").addEventListener("click", stop);
$("notice-close").addEventListener("click", () => notify(""));
$("key-cancel").addEventListener("click", () => $("key-dialog").close());
$("key-dialog").addEventListener("close", () => {
  $("question").blur();  // Chromium gave it the focus back, but no caret
  $("question").focus();
});
$("think").addEventListener("click", () => {
  conversation.settings.thinking = !conversation.settings.thinking;
  $("think").setAttribute("aria-pressed", conversation.settings.thinking);
  store.prefer(conversation.settings);
  save();
});
$("open-settings").addEventListener("click", () => showSettings(conversation.settings, model));
$("settings-save").addEventListener("click", event => {
  const read = readSettingsForm(model);
  if (!read) {
    event.preventDefault();
    return;
  }
  Object.assign(conversation.settings, read);
  $("with-system").hidden = !read.system;
  store.prefer(conversation.settings);
  save();
});
$("to-end").addEventListener("click", toEnd);
new IntersectionObserver(([{ isIntersecting }]) => {
  $("to-end").hidden = isIntersecting;
  if (isIntersecting) stuck = true;
}, { root: $("scroller"), rootMargin: "40px" }).observe($("end"));
for (const name of ["wheel", "touchmove", "keydown", "pointerdown"]) {
  $("scroller").addEventListener(name, () => {
    requestAnimationFrame(() => {
      const { scrollHeight, scrollTop, clientHeight } = $("scroller");
      stuck = scrollHeight - scrollTop - clientHeight < 40;
    });
  }, { passive: true });
}
for (const id of ["fresh", "fresh-too"]) $(id).addEventListener("click", () => {
  openSide(false);
  open(new Conversation(store.preferred()));
});
setUpSide({
  open(id) {
    const found = store.load(id);
    if (found) open(found);
    else drawSide(conversation.id);
  },
  removed(id, undo) {
    if (id === conversation.id) open(new Conversation(store.preferred()));
    notify("The conversation is deleted.", "Undo", undo, false);
  },
  notify,
});
store.watch(id => {
  if (!running && (id === conversation.id || id === null)) {
    const other = store.load(conversation.id);
    if (other && other.messages.length > conversation.messages.length) {
      conversation.merge(other);
      draw();
    }
  }
  drawSide(conversation.id);
});
addEventListener("pagehide", () => {
  if (running) running.message.ending = "stopped";
  if (running) save();
});

// --- the start --------------------------------------------------------------------------------------------------------

async function start() {
  try {
    model = await (await call("/page/settings.json")).json();
  } catch (e) {
    if (e.status === 503) {
      $("about").textContent = "The model is loading…";
      setTimeout(start, RETRY_SECONDS * 1000);
    } else failed(e, start);
    return;
  }
  $("model").textContent = model.model;
  $("think").hidden = !model.thinking_switch;
  $("about").textContent = `${model.model} reads up to ${model.context.toLocaleString("en")} tokens.`;
  const examples = model.examples.length ? model.examples : GENERAL;
  $("examples").replaceChildren(...examples.map(text => {
    const button = make("button", { type: "button", textContent: text });
    button.addEventListener("click", () => ask(text));
    return make("li", {}, button);
  }));
  if (!conversation.messages.length) document.title = model.model;
}

$("question").value = sessionStorage.getItem(DRAFT) ?? "";
conversation = store.load(sessionStorage.getItem(LAST)) ?? conversation;
draw();
start();
