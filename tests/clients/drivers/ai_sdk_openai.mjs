// The AI SDK with OpenAI's provider, which speaks the Responses API.
import { createOpenAI } from "@ai-sdk/openai";

import { drive } from "./ai_sdk.mjs";
import { MODEL, URL } from "./checks.mjs";

await drive(createOpenAI({ baseURL: URL, apiKey: "none" })(MODEL));
