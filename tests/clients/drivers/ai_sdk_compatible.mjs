// The AI SDK with the provider for servers that are compatible with OpenAI's.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";

import { drive } from "./ai_sdk.mjs";
import { MODEL, URL } from "./checks.mjs";

const settings = { name: "llava", baseURL: URL, apiKey: "none", supportsStructuredOutputs: true };
await drive(createOpenAICompatible(settings)(MODEL));
