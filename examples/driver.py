"""Asks the running application from a driver: any Python process that has joined the application's Ray cluster."""

from pathlib import Path
from typing import Any

import ray

import llava_serve
from llava_serve import SamplingParams
from llava_serve.client import LlavaClient
from llava_serve.errors import InvalidImageError

PICTURE = Path(llava_serve.__file__).parent / "builtin" / "demo.png"

ray.init(address="auto", log_to_driver=False)  # RAY_ADDRESS says which cluster
llava = LlavaClient()

# One question about one picture. It may be a path, a link, bytes, a PIL image, a numpy array, or a Ray reference.
print(llava.ask(PICTURE, "What colour is the circle?"))

# A conversation in OpenAI's form, and the details of its answer.
messages: list[dict[str, Any]] = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": PICTURE},
            {"type": "text", "text": "What colour is the circle?"},
        ],
    },
    {"role": "assistant", "content": "The circle is red."},
    {"role": "user", "content": "How many shapes are there?"},
]
answer = llava.chat(messages, SamplingParams(temperature=0, max_new_tokens=32))
print(answer.text, answer.finish_reason, answer.num_prompt_tokens)

# The library's own errors report what is wrong, as a status does over HTTP.
try:
    llava.ask(b"not a picture", "What is this?")
except InvalidImageError as error:
    print(f"Refused: {error}")
