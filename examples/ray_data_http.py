"""Asks a server over HTTP about the rows of a data set: `ray.data.llm` on any Ray cluster, with any server."""

import base64
import os
from pathlib import Path
from typing import Any

import ray
from ray.data.llm import HttpRequestProcessorConfig, build_processor

import llava_serve

URL = os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1")
KEY = os.environ.get("OPENAI_API_KEY", "none")
PICTURE = str(Path(llava_serve.__file__).parent / "builtin" / "demo.png")
ROWS = [
    {"row": 1, "picture": PICTURE, "question": "What colour is the circle?"},
    {"row": 2, "picture": PICTURE, "question": "How many shapes are there?"},
    {"row": 3, "picture": __file__, "question": "What is this?"},  # no picture: this row gets an error, not an answer
]
ONLY_WAITS = {"num_cpus": 0}  # as in ray_data_serve.py


def as_payload(row: dict[str, Any]) -> dict[str, Any]:
    """A chat completion. A priority above 0 is batch work: online requests go first."""
    url = "data:;base64," + base64.b64encode(Path(row["picture"]).read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": row["question"]}]
    messages = [{"role": "user", "content": content}]
    return {"payload": {"messages": messages, "temperature": 0, "max_tokens": 32, "priority": 1}}


def as_answer(row: dict[str, Any]) -> dict[str, Any]:
    response = row["http_response"]
    answer = response["choices"][0]["message"]["content"] if response.get("choices") else response["error"]["message"]
    return {"row": row["row"], "answer": answer}


ray.init(address="auto", log_to_driver=False)  # RAY_ADDRESS says which cluster
processor = build_processor(
    HttpRequestProcessorConfig(
        url=f"{URL}/chat/completions",
        headers={"Authorization": f"Bearer {KEY}"},
        max_retries=10,  # of a busy server: after 1, 2, 4 ... seconds
        http_request_stage=ONLY_WAITS,
    ),
    preprocess=as_payload,
    postprocess=as_answer,
    preprocess_map_kwargs=ONLY_WAITS,
    postprocess_map_kwargs=ONLY_WAITS,
)
for row in sorted(processor(ray.data.from_items(ROWS)).take_all(), key=lambda row: row["row"]):
    print(row["row"], row["answer"])
