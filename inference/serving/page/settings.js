// The dialog of a conversation's settings.

import { $ } from "./dom.js";

export function showSettings(settings, model) {
  $("system").value = settings.system;
  $("temperature").value = settings.temperature ?? "";
  $("temperature").placeholder = model.temperature ?? "the model’s own";
  $("max-tokens").value = settings.maxTokens ?? "";
  if (Number.isFinite(model.context)) $("max-tokens").max = model.context;
  $("tools-part").hidden = !model.tools;
  $("tools").value = settings.tools;
  $("tools").setCustomValidity("");
  $("settings").showModal();
}

// The settings in the dialog; null where one of them is wrong, which the browser then says beside its field.
export function readSettingsForm(model) {
  const tools = $("tools").value.trim();
  $("tools").setCustomValidity(model.tools && tools ? wrongTools(tools) : "");
  if (!$("settings").querySelector("form").reportValidity()) return null;
  const number = id => $(id).value === "" ? null : Number($(id).value);
  return { system: $("system").value.trim(), temperature: number("temperature"), maxTokens: number("max-tokens"), tools };
}

function wrongTools(text) {
  try {
    const list = JSON.parse(text);
    return Array.isArray(list) && list.every(tool => typeof tool?.function?.name === "string") ? "" : "Write a list of tools, each with a function that has a name.";
  } catch (e) {
    return `This is not JSON: ${e.message}`;
  }
}

$("tools").addEventListener("input", () => $("tools").setCustomValidity(""));
$("settings-cancel").addEventListener("click", () => $("settings").close());
