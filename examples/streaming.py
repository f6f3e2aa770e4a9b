"""Prints an answer as it is generated, and closes another stream before its end."""

from contextlib import closing
from pathlib import Path

import ray

import llava_serve
from llava_serve import SamplingParams
from llava_serve.client import LlavaClient

PICTURE = Path(llava_serve.__file__).parent / "builtin" / "demo.png"
MESSAGES = [
    {
        "role": "user",
        "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "Describe the picture."}],
    }
]

ray.init(address="auto", log_to_driver=False)  # RAY_ADDRESS says which cluster
llava = LlavaClient()

for chunk in llava.stream(MESSAGES, SamplingParams(temperature=0, max_new_tokens=64)):
    print(chunk.text, end="", flush=True)
print()

# Closing a stream stops the engine's work on it.
endless = SamplingParams(max_new_tokens=1000, ignore_eos=True)
with closing(llava.stream(MESSAGES, endless)) as chunks:
    next(chunks)
print("Closed.")
