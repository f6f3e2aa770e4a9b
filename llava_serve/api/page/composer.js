// What is asked next: the question, and its pictures, from wherever they come.

import {at, make} from "./elements.js";
import {PictureProblem, readPicture} from "./pictures.js";

export class Composer {
  // limits() are the server's on pictures; taken() counts those of the conversation; say(text) shows a problem.
  constructor({limits, taken, say}) {
    Object.assign(this, {limits, taken, say, pictures: [], reading: Promise.resolve()});
    at("add").addEventListener("click", () => at("file").click());
    at("photograph").addEventListener("click", () => at("camera").click());
    for (const input of [at("file"), at("camera")]) {
      input.addEventListener("change", () => {
        this.take([...input.files]);
        input.value = "";  // the same picture can be chosen again
      });
    }
    at("question").addEventListener("input", () => this.fit());
    document.addEventListener("paste", event => {
      const files = [...event.clipboardData.files];
      if (!files.length) return;
      event.preventDefault();
      this.take(files);
    });
    this.takeDrops();
  }

  takeDrops() {
    const holdsFiles = event => event.dataTransfer.types.includes("Files");
    document.addEventListener("dragover", event => {
      if (!holdsFiles(event)) return;
      event.preventDefault();
      at("over").hidden = false;
    });
    document.addEventListener("dragleave", event => { at("over").hidden ||= !event.relatedTarget; });
    document.addEventListener("drop", event => {
      at("over").hidden = true;
      if (event.target === at("question") && !holdsFiles(event)) return;
      event.preventDefault();  // the browser would open it in place of the page
      if (holdsFiles(event)) this.take([...event.dataTransfer.files]);
      else this.say("That is a link or a text. Save the picture, then drop the file.");
    });
  }

  // Adds pictures, one after the other; returns once all are read.
  take(files) {
    this.say("");
    this.reading = this.reading.then(async () => {
      for (const file of files) await this.takeOne(file);
    });
    return this.reading;
  }

  async takeOne(file) {
    const limits = this.limits();
    const reading = make("li", {className: "waiting", textContent: `Reading ${file.name}`});
    at("pictures").append(reading);
    try {
      if (this.taken() + this.pictures.length >= limits.max_per_request) {
        throw new PictureProblem(limits.max_per_request
          ? `A conversation may have ${limits.max_per_request} pictures here. Begin a new one for others.`
          : "This server takes no pictures.");
      }
      this.put([...this.pictures, await readPicture(file, limits)]);
      at("question").focus();
    } catch (error) {
      this.say(error instanceof PictureProblem ? error.message : `${file.name} is too large for this browser.`);
    } finally {
      reading.remove();
    }
  }

  // The picture of an example, and its question.
  async takeExample(button) {
    try {
      const blob = await (await fetch(button.querySelector("img").src)).blob();
      await this.take([new File([blob], "the example", {type: blob.type})]);
      this.write(button.dataset.question);
    } catch {
      this.say("The server cannot be reached. Check your connection, then try again.");
    }
  }

  put(pictures) {
    this.pictures = pictures;
    at("pictures").replaceChildren(...pictures.map(picture => make("li", {},
      make("img", {src: picture.url, alt: picture.name}),
      make("button", {type: "button", textContent: "×", ariaLabel: `Remove ${picture.name}`, title: "Remove",
        onclick: () => this.remove(picture)}),
      make("small", {textContent: [`${picture.width} x ${picture.height}`, picture.note].filter(Boolean).join(", ")}))));
  }

  remove(picture) {
    this.put(this.pictures.filter(each => each !== picture));
    at("question").focus();
  }

  write(question) {
    at("question").value = question;
    this.fit();
    at("question").focus();
  }

  fit() {
    const box = at("question");
    box.style.height = "auto";
    box.style.height = `${box.scrollHeight}px`;
  }

  // What is asked: {question, pictures}. It leaves the box.
  async leave() {
    await this.reading;
    const asked = {question: at("question").value.trim(), pictures: this.pictures};
    if (asked.question) {
      this.put([]);
      this.write("");
    }
    return asked;
  }

  // A question that got no answer stands in the box again, before what was typed since.
  restore({question, pictures}) {
    this.put([...pictures, ...this.pictures]);
    this.write([question, at("question").value].filter(Boolean).join("\n"));
  }
}
