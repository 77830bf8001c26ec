// The server's API: requests with the key, errors in one line, and the events of a streamed answer.

const KEY = "key";  // in sessionStorage: gone with the tab

export class Refused extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export const setKey = key => sessionStorage.setItem(KEY, key);

// The response to a request that succeeded. Throws Refused otherwise, and the AbortError of an aborted one.
export async function call(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  let response;
  try {
    response = await fetch(new URL(path, location.origin), {
      ...options, headers: { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) },
    });
  } catch (e) {
    throw e.name === "AbortError" ? e : new Refused("The server cannot be reached.");
  }
  if (response.ok) return response;
  if (response.status === 401) {
    throw new Refused(key ? "The server does not accept this API key." : "The server asks for an API key.", 401);
  }
  const body = await response.json().catch(() => null);
  const said = body?.error?.message;
  throw new Refused(typeof said === "string" && said ? sentence(said) : `The server answered ${response.status} ${response.statusText}.`, response.status);
}

// A server's message in the page's style: one line, a capital, a full stop.
export function sentence(text) {
  const line = text.replace(/\s+/g, " ").trim();
  return line.charAt(0).toUpperCase() + line.slice(1) + (/[.!?…]$/.test(line) ? "" : ".");
}

// The JSON objects of a stream of server-sent events. Throws Refused where it breaks or ends before [DONE].
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read().catch(e => {
      throw e.name === "AbortError" ? e : new Refused("The connection broke.");
    });
    if (done) throw new Refused("The connection ended before the answer did.");
    const lines = (held + value).split(/\r?\n/);
    held = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";  // other lines are comments that keep it alive
      if (data === "[DONE]") return;
      if (!data) continue;
      const event = parse(data);
      if (event.error) throw new Refused(sentence(String(event.error.message ?? "The answer failed")));
      yield event;
    }
  }
}

function parse(data) {
  try {
    return Object(JSON.parse(data));
  } catch {
    throw new Refused("The server sent something that is no answer.");
  }
}
