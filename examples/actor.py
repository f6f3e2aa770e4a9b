"""Asks the running application from an actor, which keeps its client and serves several callers at once."""

from pathlib import Path

import ray

import llava_serve
from llava_serve.client import LlavaClient

PICTURE = Path(llava_serve.__file__).parent / "builtin" / "demo.png"
QUESTIONS = ["What colour is the circle?", "How many shapes are there?", "Is there a star?"]


@ray.remote(num_cpus=0)  # it only waits: the application's own replicas do the work
class Describer:
    """Its method is asynchronous, so that its calls run concurrently, and the engine answers them in one batch."""

    def __init__(self, picture: bytes) -> None:
        self.picture = picture
        self.llava = LlavaClient()

    async def answer(self, question: str) -> str:
        return await self.llava.ask_async(self.picture, question)


ray.init(address="auto", log_to_driver=False)  # RAY_ADDRESS says which cluster
describer = Describer.remote(PICTURE.read_bytes())
for question, answer in zip(
    QUESTIONS, ray.get([describer.answer.remote(question) for question in QUESTIONS]), strict=True
):
    print(question, answer)
