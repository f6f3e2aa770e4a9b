// The page: asks the server, shows the answer as it comes, and goes on from there.

import {Composer} from "./composer.js";
import {Conversation, keep, kept} from "./conversation.js";
import {at, line} from "./elements.js";
import {closeOptions, limitOptions, optionFields, startOptions} from "./options.js";
import {sentenceFor} from "./sentences.js";
import {answerTo, findModel, Refusal} from "./server.js";
import {factsOf, TurnView} from "./turns.js";

const MOST_RETRIES = 3;
const MOST_WAIT_S = 5;
const LONG_S = 10;  // a visitor who waits longer is told why that may be
const UNKNOWN_LIMITS = {max_per_request: 16, max_bytes: 4 << 20, max_pixels: 16e6};

const conversation = new Conversation();
const composer = new Composer({
  limits: () => model?.images ?? UNKNOWN_LIMITS,
  taken: () => conversation.pictures.length,
  say: problem,
});
let model = null;
let key = kept("key") ?? "";
let running = null;

function problem(text) {
  at("problem").textContent = text;
}

function status(text) {
  at("status").textContent = text;
}

async function meet(signal) {
  model = await findModel(key, signal);
  at("model").textContent = line([
    model.id,
    `context ${model.max_model_len.toLocaleString("en")} tokens`,
    `up to ${model.images.max_per_request} pictures`,
  ]);
  at("knows").hidden = model.root !== "builtin";
  at("access").hidden = true;
  at("forget").hidden = !key;
  keep("key", key);
  limitOptions(model);
}

// Shows why something failed; asks for a key where it was that.
function fail(error) {
  if (!(error instanceof Refusal)) {
    console.error(error);
    return "Something went wrong in this page. Reload it, then ask again.";
  }
  const sentence = sentenceFor(error, {key, model});
  if (error.code === "model_not_found") model = null;
  if (error.code === "invalid_api_key") {
    at("access").hidden = false;
    at("forget").hidden = true;
    if (!model) at("model").textContent = "A key is needed";
    at("key").focus();
  } else if (!model) {
    at("model").textContent = "No model yet";
  }
  return sentence;
}

function pause(seconds, signal) {
  return new Promise((done, stop) => {
    setTimeout(done, seconds * 1000);
    signal.throwIfAborted();
    signal.addEventListener("abort", () => stop(signal.reason), {once: true});
  });
}

// Yields the parts of an answer; while the server is busy, asks again for a while.
async function* patientAnswer(request, view, signal) {
  for (let retries = 0; ; retries++) {
    try {
      yield* answerTo({model: model.id, ...request}, key, signal);
      return;
    } catch (error) {
      const seconds = Math.max(1, error.retryAfter);
      if (error.code !== "rate_limit_exceeded" || retries === MOST_RETRIES || seconds > MOST_WAIT_S) throw error;
      view.busy = true;
      await pause(seconds, signal);
    }
  }
}

// Asks for the answer of a turn and shows it. What came of it, and why not all, is in the turn.
async function answer(turn, fields, view) {
  const began = performance.now();
  const passed = () => (performance.now() - began) / 1000;
  const measured = {usage: null, finish: null, first: 0, total: 0};
  const tell = () => {
    const usual = passed() < LONG_S ? "Looking" : "Still waiting, others may be before you";
    const doing = view.busy ? "The server is busy, asking again" : usual;
    view.wait(`${doing} · ${Math.floor(passed())} s`);
    if (at("status").textContent !== `${doing}.`) status(`${doing}.`);
  };
  const ticking = setInterval(tell, 1000);
  tell();
  try {
    if (!model) await meet(running.signal);
    const request = {messages: conversation.messages(turn), ...fields};
    for await (const part of patientAnswer(request, view, running.signal)) {
      Object.assign(measured, part);
      if (!part.text) continue;
      if (!turn.answer) {
        measured.first = passed();
        clearInterval(ticking);
        view.wait("");
      }
      turn.answer += part.text;
      measured.total = passed();
      follow(() => view.write(part.text));
    }
    if (!turn.answer) turn.problem = "The model ended without a word.";
  } catch (error) {
    turn.problem = error.name === "AbortError" ? "Stopped." : fail(error);
  } finally {
    clearInterval(ticking);
  }
  if (turn.answer) turn.facts = factsOf(measured);
}

async function ask() {
  if (running) return;
  const fields = optionFields();
  if (!fields) return;
  running = new AbortController();
  problem("");
  if (!at("access").hidden) {
    key = at("key").value.trim();
    model = null;  // found again, with this key
  }
  try {
    const turn = {...await composer.leave(), answer: "", facts: "", problem: ""};
    if (turn.question) await run(turn, fields);
    else problem("Type a question first.");
  } finally {
    running = null;
  }
}

async function run(turn, fields) {
  const view = new TurnView(turn);
  working(true);
  at("turns").append(view.element);
  scrollTo(0, document.body.scrollHeight);
  await answer(turn, fields, view);
  if (turn.answer) {
    follow(() => view.end(turn));
    if (!conversation.add(turn)) problem("This conversation is too large for the tab to keep: it will be gone when you reload the page.");
    status(`${turn.answer} ${turn.problem}`);
  } else {
    view.element.remove();
    composer.restore(turn);
    if (!at("access").hidden) at("key").focus();
    problem(turn.problem);
    status("");
  }
  working(false);
}

// A button that is hidden leaves its focus to the question.
function working(now) {
  const focused = document.activeElement;
  at("ask").hidden = now;
  at("stop").hidden = !now;
  at("new").hidden = now || !conversation.turns.length;
  at("welcome").hidden = now || conversation.turns.length > 0;
  if (focused?.hidden) at("question").focus();
}

// Keeps the end in view while it grows, unless the visitor looks at something above.
function follow(grow) {
  const below = document.body.scrollHeight - innerHeight - scrollY;
  grow();
  if (below < 80) scrollTo(0, document.body.scrollHeight);
}

async function useKey() {
  key = at("key").value.trim();
  problem("");
  try {
    await meet();
    at("question").focus();
  } catch (error) {
    problem(fail(error));
  }
}

at("form").addEventListener("submit", event => { event.preventDefault(); ask(); });
at("access").addEventListener("submit", event => { event.preventDefault(); useKey(); });
at("question").addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
at("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", event => {
  if (event.key === "Escape" && !event.isComposing && !closeOptions()) running?.abort();
});
at("new").addEventListener("click", () => {
  conversation.clear();
  at("turns").replaceChildren();
  problem("");
  status("A new conversation.");
  working(false);
  at("question").focus();
});
at("forget").addEventListener("click", () => {
  key = at("key").value = "";
  keep("key", key);
  model = null;
  at("question").focus();
  useKey();
});
for (const button of document.querySelectorAll(".example")) {
  button.addEventListener("click", () => composer.takeExample(button));
}

startOptions();
at("key").value = key;
at("turns").append(...conversation.turns.map(turn => new TurnView(turn).element));
working(false);
meet().catch(error => problem(fail(error)));
