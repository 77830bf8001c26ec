// One answer on its way: from the stream's events into a message, and into its view once a frame.

import { call, events } from "./api.js";

const SAVE_EVERY = 5000;  // ms

// Fills `message`, and shows it in `view` where it is shown. `save` is called now and then. Throws Refused and AbortError.
export async function receive(body, message, view, signal, save, painted) {
  const began = performance.now();
  let first = null, last = began, saved = began, due = false, told = false;

  const frame = () => {
    due = false;
    if (signal.aborted) return;
    view.paint();
    painted();
  };
  const add = (name, text, drafted) => {
    last = performance.now();
    first ??= last;
    if (name === "content" && message.reasoning && message.thought === undefined) message.thought = last - began;
    message[name] = (message[name] ?? "") + text;
    view.add(name, text);
    const fits = drafted?.reduce((sum, [part]) => sum + part.length, 0) === text.length;
    message.tokens += fits ? drafted.length : 1;
    told ||= Boolean(drafted);
    for (const [part, was] of fits ? drafted : [[text, false]]) message.marks[name].push(was ? -part.length : part.length);
  };

  message.tokens = 0;
  message.marks = { reasoning: [], content: [] };  // lengths of tokens, negative for drafted ones
  try {
    const response = await call("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
    for await (const { choices = [], usage } of events(response)) {
      for (const { delta = {}, drafted, finish_reason: reason } of choices) {
        if (delta.reasoning_content) add("reasoning", delta.reasoning_content, drafted);
        if (delta.content) add("content", delta.content, drafted);
        for (const piece of delta.tool_calls ?? []) addCall(message, piece);
        if (reason === "length") message.ending = "length";
      }
      if (usage) message.tokens = usage.completion_tokens;
      message.first = first === null ? undefined : first - began;
      message.rate = first !== null && last - first > 20 ? ((message.tokens - 1) * 1000) / (last - first) : undefined;
      if (!due) {
        due = true;
        requestAnimationFrame(frame);
      }
      if (first !== null && performance.now() - saved > SAVE_EVERY) {
        saved = performance.now();
        save();
      }
    }
  } finally {
    if (message.reasoning && message.thought === undefined) message.thought = last - began;
    if (!told) delete message.marks;
  }
}

function addCall(message, { index, id, function: { name = "", arguments: given = "" } = {} }) {
  message.calls ??= [];
  if (!(index <= message.calls.length)) return;
  message.calls[index] ??= { id: "", name: "", arguments: "" };
  const made = message.calls[index];
  made.id ||= id ?? "";
  made.name ||= name;
  made.arguments += given;
}
