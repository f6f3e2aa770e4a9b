// What went wrong, for a visitor.

const number = new Intl.NumberFormat("en");

const SENTENCES = {
  unreachable: () => "The server cannot be reached. Check your connection, then ask again.",
  cut_off: () => "The connection was lost before the answer was complete.",
  invalid_api_key: (error, {key}) => key
    ? "This key is not accepted. Check that it is complete, then try again."
    : "This server asks for a key. Enter the one you were given.",
  rate_limit_exceeded: error => error.retryAfter > 5
    ? `The server has no room for you now. Ask again in ${error.retryAfter} seconds.`
    : "The server is busy. Ask again in a moment.",
  request_too_large: () => "The pictures are too large together. Remove one, or begin a new conversation.",
  context_length_exceeded: (error, {model}) =>
    `This is more than the model can read: ${number.format(model.max_model_len)} tokens, pictures and earlier answers `
    + "included. Ask less at once, or begin a new conversation.",
  invalid_image: error => `The server cannot use a picture. ${error.message} Remove it, or save it as JPEG or PNG.`,
  model_not_found: () => "The server has another model now. Ask again.",
  deadline_exceeded: () => "The answer took too long and was ended. Ask for less, or try again later.",
  service_unavailable: () => "The model is not ready. Try again in a minute.",
  unavailable: () => "The server is not ready. Try again in a minute.",
};

// context has the key that was sent, and the model.
export function sentenceFor(error, context) {
  const known = SENTENCES[error.code];
  if (known) return known(error, context);
  if (["invalid_value", "unsupported_parameter"].includes(error.code)) return `The server does not take this. ${error.message}`;
  const name = error.id ? ` If it happens again, tell who runs the server this number: ${error.id}.` : "";
  return `Something went wrong on the server.${name}`;
}
