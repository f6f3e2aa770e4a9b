// Shows the turns of a conversation.

import {line, make} from "./elements.js";

const number = new Intl.NumberFormat("en");

// The element of a turn, with what changes while the answer comes.
export class TurnView {
  constructor(turn) {
    this.words = make("p", {className: "words"});
    this.waiting = make("p", {className: "waiting", ariaHidden: "true"});  // it changes each second
    this.facts = make("span");
    this.copy = make("button", {type: "button", className: "quiet", textContent: "Copy", onclick: () => this.copied()});
    this.foot = make("div", {className: "facts", hidden: true}, this.facts, this.copy);
    this.problem = make("p", {className: "problem"});
    this.answer = make("div", {className: "answer"},
      make("h2", {className: "unseen", textContent: "Answer"}), this.words, this.waiting, this.problem, this.foot);
    this.element = make("li", {}, make("div", {className: "asked"},
      make("h2", {className: "unseen", textContent: "Question"}),
      pictureList(turn.pictures),
      make("p", {textContent: turn.question})), this.answer);
    if (turn.answer) this.end(turn);
    else this.answer.ariaBusy = "true";
  }

  wait(text) {
    this.waiting.textContent = text;
  }

  write(text) {
    this.words.append(text);
  }

  end({answer, facts, problem}) {
    this.words.textContent = answer;
    this.waiting.remove();
    this.problem.textContent = problem;
    this.facts.textContent = facts;
    this.foot.hidden = false;
    this.answer.ariaBusy = "false";
  }

  async copied() {
    this.copy.textContent = await copy(this.words) ? "Copied" : "Select the text to copy it";
    setTimeout(() => { this.copy.textContent = "Copy"; }, 2000);
  }
}

// usage is the server's; times are in seconds. A beam search sends its answer at once.
export function factsOf({usage, finish, first, total}) {
  const parts = [];
  if (usage) {
    const tokens = usage.completion_tokens;
    const streamed = total - first > 0.05 && tokens > 1;
    const rate = streamed ? (tokens - 1) / (total - first) : tokens / total;
    parts.push(`${number.format(tokens)} ${tokens === 1 ? "token" : "tokens"}`);
    parts.push(`${rate.toPrecision(rate < 1000 ? 3 : 4)} tokens/s`);
  }
  parts.push(`first token after ${first.toFixed(2)} s`);
  const images = usage?.prompt_tokens_details.image_tokens;
  if (images) parts.push(`${number.format(images)} image tokens`);
  if (finish === "length") parts.push("ended at the longest answer");
  return line(parts);
}

function pictureList(pictures) {
  return make("ul", {className: "pictures", hidden: !pictures.length}, ...pictures.map(picture => make("li", {},
    make("img", {src: picture.url, alt: picture.name, title: picture.note || picture.name}),
    picture.note && make("small", {textContent: picture.note}))));
}

async function copy(element) {
  try {
    await navigator.clipboard.writeText(element.textContent);
    return true;
  } catch {  // a page without TLS has no clipboard
    getSelection().selectAllChildren(element);
    return document.execCommand("copy");
  }
}
