"""`LlavaClient` from a driver, a task and an actor of another job on the same cluster."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from conftest import DEMO_IMAGE, DEMO_QUESTION, question
from PIL import Image

from deployments.client import LlavaClient
from llava_serve import SamplingParams
from llava_serve.errors import DeadlineExceededError, InvalidImageError, PromptTooLongError

GREEDY = SamplingParams(temperature=0, max_new_tokens=40)


@pytest.fixture(scope="module")
def llava(ray_job: None) -> LlavaClient:
    return LlavaClient()


@pytest.fixture
def over_http(client: Any) -> str:
    completion = client.chat.completions.create(
        model="builtin",
        messages=question(DEMO_QUESTION, DEMO_IMAGE.read_bytes()),
        temperature=0,
        max_tokens=GREEDY.max_new_tokens,
    )
    said: str = completion.choices[0].message.content
    return said


def as_array(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize(
    "read",
    [Path, str, Path.read_bytes, Image.open, as_array, lambda path: ray.put(path.read_bytes())],
    ids=["path", "string", "bytes", "PIL", "array", "reference"],
)
def test_a_picture_in_any_form(llava: LlavaClient, over_http: str, read: Callable[[Path], Any]) -> None:
    assert llava.ask(read(DEMO_IMAGE), DEMO_QUESTION, GREEDY) == over_http


def test_chat_and_stream_say_the_same(llava: LlavaClient, over_http: str) -> None:
    messages = question(DEMO_QUESTION, DEMO_IMAGE.read_bytes())
    result = llava.chat(messages, GREEDY)
    assert result.text == over_http
    assert result.num_prompt_tokens > 10
    assert "".join(chunk.text for chunk in llava.stream(messages, GREEDY)) == over_http


async def test_the_async_forms_say_the_same(llava: LlavaClient, over_http: str) -> None:
    messages = question(DEMO_QUESTION, DEMO_IMAGE.read_bytes())
    assert (await llava.chat_async(messages, GREEDY)).text == over_http
    async with aclosing(llava.stream_async(messages, GREEDY)) as chunks:
        assert "".join([chunk.text async for chunk in chunks]) == over_http


def test_from_a_task_and_an_actor(ray_job: None, over_http: str) -> None:
    def ask(image: bytes) -> str:
        return LlavaClient().ask(image, DEMO_QUESTION, GREEDY)

    class Asker:
        def __init__(self) -> None:
            self.llava = LlavaClient()

        async def ask(self, image: bytes) -> str:
            return await self.llava.ask_async(image, DEMO_QUESTION, GREEDY)

    image = DEMO_IMAGE.read_bytes()
    assert ray.get(ray.remote(num_cpus=0)(ask).remote(image)) == over_http
    asker = ray.remote(num_cpus=0)(Asker).remote()
    assert ray.get(asker.ask.remote(image)) == over_http
    ray.kill(asker)


def test_the_errors_are_the_librarys(llava: LlavaClient) -> None:
    with pytest.raises(InvalidImageError):
        llava.ask(b"not a picture", DEMO_QUESTION)
    with pytest.raises(PromptTooLongError) as refusal:
        llava.chat(question("word " * 20_000))
    assert refusal.value.got > refusal.value.limit
    with pytest.raises(DeadlineExceededError):
        llava.chat(question("Hello"), timeout_s=1e-6)


def test_a_stream_that_is_left_frees_the_engine(
    llava: LlavaClient, engine_stats: Callable[[], dict[str, Any]], wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    before = engine_stats()["generated_tokens"]
    forever = SamplingParams(max_new_tokens=1500, ignore_eos=True)
    stream = llava.stream(question(DEMO_QUESTION, DEMO_IMAGE.read_bytes()), forever)
    next(stream)
    stream.close()
    wait_until(lambda: engine_stats()["running"] == 0)
    assert engine_stats()["generated_tokens"] - before < 1500
