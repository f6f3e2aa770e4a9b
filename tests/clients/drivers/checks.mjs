// What the drivers for Node share; the same as checks.py.
import { readFileSync } from "node:fs";

export const URL = process.env.LLAVA_URL + "/v1";
export const MODEL = "builtin";
export const QUESTION = "What colour is the circle?";
export const ANSWER = "The circle is red.";
export const PICTURE = "data:image/png;base64," + readFileSync(process.env.LLAVA_PICTURE).toString("base64");

export function same(got, wanted) {
  if (JSON.stringify(got) !== JSON.stringify(wanted)) {
    throw new Error(`got ${JSON.stringify(got)} instead of ${JSON.stringify(wanted)}`);
  }
}

// Runs each check and prints a line of JSON for it; the traces go to the standard error.
export async function main(checks) {
  for (const [check, run] of Object.entries(checks)) {
    let problem = "";
    try {
      await run();
    } catch (error) {
      console.error(error);
      problem = `${error.name}: ${error.message}`;
    }
    console.log(JSON.stringify({ check, problem }));
  }
}
