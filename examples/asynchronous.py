"""Asks the running application from code with an event loop: many questions at once, and a stream."""

import asyncio
from contextlib import aclosing
from pathlib import Path

import ray

import llava_serve
from llava_serve import SamplingParams
from llava_serve.client import LlavaClient

PICTURE = Path(llava_serve.__file__).parent / "builtin" / "demo.png"
QUESTIONS = ["What colour is the circle?", "How many shapes are there?", "Is there a star?"]


async def main() -> None:
    llava = LlavaClient()
    picture = PICTURE.read_bytes()

    # Together: the engine answers them in one batch.
    answers = await asyncio.gather(*(llava.ask_async(picture, question) for question in QUESTIONS))
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(question, answer)

    # `aclosing` ends the work if the block ends early.
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What colour is the circle?"}]
    greedy = SamplingParams(temperature=0, max_new_tokens=32)
    async with aclosing(llava.stream_async([{"role": "user", "content": content}], greedy)) as chunks:
        async for chunk in chunks:
            print(chunk.text, end="", flush=True)
    print()


ray.init(address="auto", log_to_driver=False)  # RAY_ADDRESS says which cluster
asyncio.run(main())
