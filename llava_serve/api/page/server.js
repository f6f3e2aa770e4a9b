// The server's API: which model there is, and an answer as it comes.

const CODES = {401: "invalid_api_key", 413: "request_too_large", 429: "rate_limit_exceeded"};

// Why there is no answer, or no whole one. code is the server's, or "unreachable", "cut_off", "unavailable", "unknown".
export class Refusal extends Error {
  constructor(code, {message = "", retryAfter = 0, id = ""} = {}) {
    super(message);
    Object.assign(this, {code, retryAfter, id});
  }
}

export async function findModel(key, signal) {
  const response = await call("v1/models", {headers: headersOf(key), signal});
  return (await response.json()).data[0];
}

// Yields {text}, {finish} and {usage}. Throws Refusal, or an AbortError once the signal is aborted.
export async function* answerTo(request, key, signal) {
  const body = JSON.stringify({...request, stream: true, stream_options: {include_usage: true}});
  const response = await call("v1/chat/completions", {method: "POST", headers: headersOf(key), body, signal});
  const id = response.headers.get("x-request-id") ?? "";
  let finish = null;
  for await (const event of eventsOf(response.body, signal)) {
    if (event.error) throw new Refusal(event.error.code, {message: event.error.message, id});
    const choice = event.choices[0];
    if (choice?.delta.content) yield {text: choice.delta.content};
    if (choice?.finish_reason) yield {finish: finish = choice.finish_reason};
    if (event.usage) yield {usage: event.usage};
  }
  if (!finish) throw new Refusal("cut_off", {id});
}

function headersOf(key) {
  return {"Content-Type": "application/json", ...(key && {Authorization: `Bearer ${key}`})};
}

async function call(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("unreachable");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Refusal(body?.error?.code ?? CODES[response.status] ?? (response.status >= 502 ? "unavailable" : "unknown"), {
    message: body?.error?.message ?? "",
    retryAfter: Number(response.headers.get("retry-after")) || 0,
    id: response.headers.get("x-request-id") ?? "",
  });
}

async function* eventsOf(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {value, done} = await reader.read().catch(error => {
      throw signal.aborted ? error : new Refusal("cut_off");
    });
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:") && line.slice(5).trim() !== "[DONE]") yield JSON.parse(line.slice(5));
    }
  }
}
