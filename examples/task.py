"""Asks the running application from Ray tasks; the picture is sent through the cluster once, as a reference."""

from pathlib import Path

import ray

import llava_serve
from llava_serve.client import LlavaClient

PICTURE = Path(llava_serve.__file__).parent / "builtin" / "demo.png"
QUESTIONS = ["What colour is the circle?", "How many shapes are there?"]


@ray.remote(num_cpus=0)  # it only waits: the application's own replicas do the work
def ask(picture: bytes, question: str) -> str:
    return LlavaClient().ask(picture, question)


ray.init(address="auto", log_to_driver=False)  # RAY_ADDRESS says which cluster
picture = ray.put(PICTURE.read_bytes())
for question, answer in zip(QUESTIONS, ray.get([ask.remote(picture, question) for question in QUESTIONS]), strict=True):
    print(question, answer)
