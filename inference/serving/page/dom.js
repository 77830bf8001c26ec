// Small helpers for elements. Text reaches the page as text nodes; only markdown.js parses HTML, through DOMPurify.

export const $ = id => document.getElementById(id);

export function make(tag, properties = {}, ...inside) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...inside);
  return made;
}

export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const drawing = document.createElementNS(space, "svg"), use = document.createElementNS(space, "use");
  use.setAttribute("href", `#i-${name}`);
  drawing.setAttribute("aria-hidden", "true");
  drawing.append(use);
  return drawing;
}

// A button that shows an icon alone; `label` is its name and its tooltip.
export function iconButton(name, label, act) {
  const made = make("button", { type: "button", className: "round", title: label, "aria-label": label }, icon(name));
  made.addEventListener("click", act);
  return made;
}

export function say(text) {
  $("status").textContent = text;
}

// Copies `text`, also where a page has no clipboard because it came without TLS, and says so on the button for a moment.
export async function copy(text, pressed) {
  let done;
  try {
    await navigator.clipboard.writeText(text);
    done = true;
  } catch {
    const field = make("textarea", { className: "unseen", value: text });
    (document.querySelector("dialog[open]") ?? document.body).append(field);
    field.select();
    done = document.execCommand("copy");
    field.remove();
    pressed.focus();
  }
  say(done ? "Copied" : "The browser does not let this page copy");
  pressed.classList.toggle("done", done);
  setTimeout(() => pressed.classList.remove("done"), 1500);
}

// Offers `text` as a file.
export function download(name, text) {
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
