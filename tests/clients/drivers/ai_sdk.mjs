// The AI SDK over one of its providers.
import { generateText, Output, streamText } from "ai";
import { z } from "zod";

import { ANSWER, PICTURE, QUESTION, main, same } from "./checks.mjs";

const Circle = z.object({ colour: z.enum(["red", "green", "blue"]) });
const content = [
  { type: "file", mediaType: "image/png", data: PICTURE },
  { type: "text", text: QUESTION },
];

export async function drive(model) {
  const asked = { model, temperature: 0, maxRetries: 0, messages: [{ role: "user", content }] };
  await main({
    async generateText() {
      same((await generateText(asked)).text, ANSWER);
    },
    async "a system message"() {
      same((await generateText({ ...asked, system: "Be brief." })).text, ANSWER);
    },
    async streamText() {
      let text = "";
      const { textStream } = streamText({ ...asked, onError: ({ error }) => console.error(error) });
      for await (const part of textStream) text += part;
      same(text, ANSWER);
    },
    async "Output.object"() {
      const { output } = await generateText({ ...asked, output: Output.object({ schema: Circle }) });
      Circle.parse(output);
    },
  });
}
