// The turns so far, kept in the tab. A turn is {question, pictures, answer, facts, problem}.

// Servers under different paths of one host share the storage.
const named = name => `llava-serve ${location.pathname} ${name}`;

export function kept(name) {
  try {
    return JSON.parse(sessionStorage.getItem(named(name)));
  } catch {
    return null;
  }
}

// Returns whether there was room. A browser that keeps nothing has none.
export function keep(name, value) {
  try {
    sessionStorage.setItem(named(name), JSON.stringify(value));
    return true;
  } catch {
    try { sessionStorage.removeItem(named(name)); } catch { /* it keeps nothing */ }
    return false;
  }
}

export class Conversation {
  constructor() {
    this.turns = kept("turns") ?? [];
  }

  get pictures() {
    return this.turns.flatMap(turn => turn.pictures);
  }

  add(turn) {
    this.turns.push(turn);
    return keep("turns", this.turns);
  }

  clear() {
    this.turns = [];
    keep("turns", []);
  }

  // The messages of the API, with every picture in its turn.
  messages({question, pictures}) {
    return [
      ...this.turns.flatMap(turn => [asked(turn), {role: "assistant", content: turn.answer}]),
      asked({question, pictures}),
    ];
  }
}

function asked({question, pictures}) {
  const images = pictures.map(picture => ({type: "image_url", image_url: {url: picture.url}}));
  return {role: "user", content: images.length ? [...images, {type: "text", text: question}] : question};
}
