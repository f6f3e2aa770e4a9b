// The official client in JavaScript.
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

import { ANSWER, MODEL, PICTURE, QUESTION, URL, main, same } from "./checks.mjs";

const client = new OpenAI({ baseURL: URL, apiKey: "none", maxRetries: 0 });
const Circle = z.object({ colour: z.enum(["red", "green", "blue"]) });
const content = [
  { type: "image_url", image_url: { url: PICTURE } },
  { type: "text", text: QUESTION },
];
const asked = { model: MODEL, temperature: 0, messages: [{ role: "user", content }] };
const input = [
  {
    role: "user",
    content: [
      { type: "input_image", image_url: PICTURE, detail: "auto" },
      { type: "input_text", text: QUESTION },
    ],
  },
];

await main({
  async chat() {
    const completion = await client.chat.completions.create(asked);
    same(completion.choices[0].message.content, ANSWER);
  },
  async stream() {
    const stream = client.chat.completions.stream(asked);
    let text = "";
    for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
    same(text, ANSWER);
    same(await stream.finalContent(), ANSWER);
  },
  async parse() {
    const format = zodResponseFormat(Circle, "circle");
    const completion = await client.chat.completions.parse({ ...asked, response_format: format });
    Circle.parse(completion.choices[0].message.parsed);
  },
  async responses() {
    const response = await client.responses.create({ model: MODEL, temperature: 0, input });
    same(response.output_text, ANSWER);
    const stream = client.responses.stream({ model: MODEL, temperature: 0, input });
    same((await stream.finalResponse()).output_text, ANSWER);
  },
  async "responses.parse"() {
    const text = { format: zodTextFormat(Circle, "circle") };
    const response = await client.responses.parse({ model: MODEL, temperature: 0, input, text });
    Circle.parse(response.output_parsed);
  },
  async models() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    same(ids, [MODEL]);
  },
});
