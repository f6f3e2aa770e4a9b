// The options of an answer.

import {at} from "./elements.js";
import {keep, kept} from "./conversation.js";

const NAMES = ["temperature", "length", "beams"];

export function startOptions() {
  for (const [name, value] of Object.entries(kept("options") ?? {})) at(name).value = value;
  at("options").addEventListener("input", changed);
  at("more").addEventListener("click", () => show(at("options").hidden));
  changed();
}

// What the model allows, and does by itself.
export function limitOptions(model) {
  at("length").max = model.max_tokens;
  at("length-about").textContent = model.default_max_tokens
    ? `${model.default_max_tokens} if you leave it empty.`
    : "If you leave it empty, it may take all that the model can hold.";
}

// Returns whether they were open.
export function closeOptions() {
  if (at("options").hidden) return false;
  show(false);
  at("more").focus();
  return true;
}

// The fields of a request. Null if one is outside its range, which the browser then says beside it.
export function optionFields() {
  const wrong = NAMES.map(at).find(input => !input.checkValidity());
  if (wrong) {
    show(true);
    wrong.reportValidity();
    return null;
  }
  const beams = Number(at("beams").value) || 1;
  return {
    temperature: beams > 1 ? 0 : Number(at("temperature").value),
    ...(at("length").value && {max_tokens: Number(at("length").value)}),
    ...(beams > 1 && {num_beams: beams}),
  };
}

function show(open) {
  at("options").hidden = !open;
  at("more").ariaExpanded = String(open);
}

function changed() {
  at("temperature").disabled = Number(at("beams").value) > 1;
  at("temperature-value").textContent = at("temperature").disabled ? "0" : at("temperature").value;
  keep("options", Object.fromEntries(NAMES.map(name => [name, at(name).value])));
}
