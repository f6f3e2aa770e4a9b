"""Asks the running application over HTTP with the official `openai` client, whole and streamed. No Ray on this side."""

import base64
import os
from pathlib import Path

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

import llava_serve

PICTURE = Path(llava_serve.__file__).parent / "builtin" / "demo.png"
URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")

# The server checks the key only if it has some; the client always requires one.
client = OpenAI(base_url=URL, api_key=os.environ.get("OPENAI_API_KEY", "none"))
model = client.models.list().data[0].id

picture = "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()
messages: list[ChatCompletionMessageParam] = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": "What colour is the circle?"},
        ],
    }
]

completion = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=32)
print(completion.choices[0].message.content)
usage = completion.usage
assert usage is not None
assert usage.prompt_tokens_details is not None
print(usage.prompt_tokens, "tokens, of them", usage.prompt_tokens_details.image_tokens, "of the picture")

for event in client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=32, stream=True):
    print(event.choices[0].delta.content or "", end="", flush=True)
print()
