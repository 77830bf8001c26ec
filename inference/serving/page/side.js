// The list of conversations: a column on wide screens, a drawer on narrow ones.

import { $, download, iconButton, make } from "./dom.js";
import * as store from "./store.js";

let act = null;  // {open(id), removed(id, undo), notify}
let drawn = "";
const narrow = matchMedia("(max-width: 63.99rem)");

export function drawSide(current) {
  const kept = store.list(), now = JSON.stringify([current, kept.map(({ id, title }) => [id, title])]);
  if (now === drawn) return;  // what has the focus keeps it
  drawn = now;
  $("list").replaceChildren(...kept.map(({ id, title }) => {
    const name = title || "Untitled";
    const open = make("button", { type: "button", className: "title", textContent: name, title: name });
    if (id === current) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => {
      openSide(false);
      act.open(id);
    });
    return make("li", {}, open, iconButton("delete", `Delete “${name}”`, () => remove(id)));
  }));
  $("nothing-kept").hidden = kept.length > 0;
  $("export").disabled = kept.length === 0;
}

function remove(id) {
  const gone = store.load(id);
  store.remove(id);
  drawSide();
  act.removed(id, () => {
    store.save(gone);
    act.open(id);
  });
}

// On a narrow screen the drawer covers the page, which cannot be used meanwhile.
export function openSide(on) {
  const was = $("side").classList.contains("open");
  $("side").classList.toggle("open", on);
  $("open-side").setAttribute("aria-expanded", on);
  $("stage").inert = on;
  $("shade").hidden = !on;
  if (on) $("close-side").focus();
  else if (was) $("open-side").focus();
}

export function setUpSide(actions) {
  act = actions;
  $("open-side").addEventListener("click", () => openSide(true));
  $("close-side").addEventListener("click", () => openSide(false));
  $("shade").addEventListener("click", () => openSide(false));
  narrow.addEventListener("change", () => openSide(false));
  $("side").addEventListener("keydown", event => {
    if (event.key === "Escape") openSide(false);
  });
  $("export").addEventListener("click", () => {
    const all = store.list().map(({ id }) => store.load(id)).filter(Boolean);
    download("conversations.json", store.exported(all));
  });
  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", async () => {
    const [file] = $("import-file").files;
    if (file) await read(file);
    $("import-file").value = "";
  });
}

async function read(file) {
  let found, dropped = 0;
  try {
    found = store.imported(await file.text());
    for (const conversation of found) dropped += store.save(conversation).length;
  } catch (e) {
    act.notify(`${file.name} cannot be imported: ${e.message.replace(/\.$/, "")}.`);
    return;
  } finally {
    openSide(false);
    drawSide();
  }
  const room = dropped ? ` To make room, ${dropped} of the oldest are no longer kept.` : "";
  act.notify(`${found.length} ${found.length === 1 ? "conversation is" : "conversations are"} imported.${room}`, "", null, false);
}
