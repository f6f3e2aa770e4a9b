"""`LlavaClient` from a driver, a task and an actor of another job on the same cluster."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import numpy as np
import pytest
import ray
from PIL import Image
from ray import serve

from deployments.client import LlavaClient
from deployments.handle_calls import AbortSender
from llava_serve import Message, SamplingParams, StructuredOutput
from llava_serve.errors import (
    BodyTooLargeError,
    CapacityError,
    DeadlineExceededError,
    InvalidImageError,
    PromptTooLongError,
    RequestError,
    UnknownModelError,
)
from llava_serve.types import PreparedPrompt, TextPart
from support.cluster import limited_ingress
from support.demo import DEMO_IMAGE, DEMO_QUESTION, question

GREEDY = SamplingParams(temperature=0, max_new_tokens=40)
FOREVER = SamplingParams(max_new_tokens=1500, ignore_eos=True)
HELLO = [Message("user", (TextPart("Hello"),))]
LIGHT = """
import sys
import ray
from deployments.client import LlavaClient
from llava_serve import SamplingParams

ray.init(address="auto", log_to_driver=False)
content = [{"type": "image", "image": sys.argv[1]}, {"type": "text", "text": sys.argv[2]}]
print(LlavaClient().chat([{"role": "user", "content": content}], SamplingParams(temperature=0, max_new_tokens=40)).text)
print(*sorted(name for name in ("torch", "transformers") if name in sys.modules))
"""


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


def as_pil(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes()))


def as_array(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize(
    "read",
    [Path, str, Path.read_bytes, as_pil, as_array, lambda path: ray.put(path.read_bytes())],
    ids=["path", "string", "bytes", "PIL", "array", "reference"],
)
def test_a_picture_in_any_form(llava: LlavaClient, over_http: str, read: Callable[[Path], Any]) -> None:
    assert llava.ask(read(DEMO_IMAGE), DEMO_QUESTION, GREEDY) == over_http
    assert llava.generate(DEMO_QUESTION, [read(DEMO_IMAGE)], GREEDY).text == over_http


def test_chat_and_stream_say_the_same(llava: LlavaClient, over_http: str) -> None:
    messages = question(DEMO_QUESTION, DEMO_IMAGE.read_bytes())
    result = llava.chat(messages, GREEDY)
    assert result.text == over_http
    assert result.num_prompt_tokens > 10
    assert "".join(chunk.text for chunk in llava.stream(messages, GREEDY)) == over_http
    assert "".join(chunk.text for chunk in llava.stream(DEMO_QUESTION, DEMO_IMAGE, GREEDY)) == over_http
    with pytest.raises(RequestError, match="priority must be between 0 and 100"):
        llava.chat(messages, GREEDY, priority=-1)


def test_the_scores_of_a_prompt(llava: LlavaClient, served: Any) -> None:
    messages = question(DEMO_QUESTION, DEMO_IMAGE.read_bytes())
    result = llava.chat(messages, SamplingParams(temperature=0, prompt_logprobs=1, max_new_tokens=0))
    body = {"messages": messages, "prompt_logprobs": 1, "max_tokens": 1}
    over_http = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60).json()["prompt_logprobs"]
    assert result.text == ""
    assert result.prompt_logprobs is not None
    assert len(result.prompt_logprobs) == len(over_http) == result.num_prompt_tokens
    for entry, position in zip(result.prompt_logprobs, over_http, strict=True):
        assert (entry is None) == (position is None)
        if entry is not None:
            assert position[str(entry.token_id)]["logprob"] == pytest.approx(entry.logprob, abs=1e-3)


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


def test_a_reference_stands_in_a_conversation_too(llava: LlavaClient, over_http: str) -> None:
    content = [{"type": "image", "image": ray.put(DEMO_IMAGE.read_bytes())}, {"type": "text", "text": DEMO_QUESTION}]
    assert llava.chat([{"role": "user", "content": content}], GREEDY).text == over_http


def test_a_client_needs_no_torch(served: Any, over_http: str) -> None:
    command = [sys.executable, "-c", LIGHT, str(DEMO_IMAGE), DEMO_QUESTION]
    environment = os.environ | {"RAY_ADDRESS": served.ray_address}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=240)
    assert done.stdout.splitlines() == [over_http, ""]


def test_the_errors_are_the_librarys(llava: LlavaClient) -> None:
    with pytest.raises(InvalidImageError):
        llava.ask(b"not a picture", DEMO_QUESTION)
    with pytest.raises(PromptTooLongError) as refusal:
        llava.chat(question("word " * 20_000))
    assert refusal.value.got > refusal.value.limit
    with pytest.raises(DeadlineExceededError):
        llava.chat(question("Hello"), timeout=1e-6)
    unknown: Any = {"temperature": 0}
    with pytest.raises(TypeError, match="no option 'temperature'"):
        llava.chat(question("Hello"), **unknown)
    for wrong in ({"priority": "high"}, {"sampling": [GREEDY]}):
        with pytest.raises(RequestError, match=f"{next(iter(wrong))} must be a"):
            llava.chat(question("Hello"), **wrong)
    with pytest.raises(UnknownModelError, match="no application 'lama'"):
        LlavaClient("lama")


def test_the_limit_counts_requests_over_http_too(served: Any, ray_job: None) -> None:
    with limited_ingress(served, "narrow", max_in_flight=1) as url:
        narrow = LlavaClient("narrow")
        first = narrow.stream(HELLO, FOREVER)
        next(first)
        with pytest.raises(CapacityError):
            narrow.chat(HELLO, GREEDY)
        ask = {"model": "builtin", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
        refused = httpx.post(f"{url}/v1/chat/completions", json=ask, timeout=60)
        assert refused.status_code == 429
        first.close()
        answered = time.monotonic() + 60
        while httpx.post(f"{url}/v1/chat/completions", json=ask, timeout=60).status_code != 200:
            assert time.monotonic() < answered, "the request is still in flight"


def test_sizes_and_timeouts_are_limited_by_the_application(served: Any, ray_job: None) -> None:
    with limited_ingress(served, "low", max_body_bytes=1000, max_timeout_s=0.3):
        low = LlavaClient("low")
        with pytest.raises(BodyTooLargeError, match=r"0\.000954 MiB"):
            low.ask(DEMO_IMAGE, DEMO_QUESTION)
        with pytest.raises(DeadlineExceededError):
            low.chat(HELLO, FOREVER, timeout=120)


def test_more_than_the_transport_takes_is_not_sent(llava: LlavaClient) -> None:
    with pytest.raises(BodyTooLargeError, match="60 MiB"):
        llava.chat(question("What are these?", *[bytes(16 << 20)] * 4))


def test_a_drain_waits_for_a_client_and_refuses_the_next(served: Any, ray_job: None) -> None:
    with limited_ingress(served, "draining"):
        draining = LlavaClient("draining")
        first = draining.stream(HELLO, SamplingParams(max_new_tokens=60, ignore_eos=True), timeout=240)
        tokens = len(next(first).token_ids)
        drain = serve.get_app_handle("draining").broadcast("drain")  # begins when its results are asked for
        drained = Thread(target=drain.results)
        drained.start()

        def chat_until_the_drain_has_begun() -> None:
            while True:
                draining.chat(HELLO, SamplingParams(max_new_tokens=1))

        with pytest.raises(CapacityError, match="shutting down"):
            chat_until_the_drain_has_begun()
        tokens += sum(len(chunk.token_ids) for chunk in first)
        assert tokens == 60
        drained.join(60)
        assert not drained.is_alive()


async def test_an_abort_ends_a_call_whose_cancel_is_lost(ray_job: None) -> None:
    ingress = serve.get_app_handle("llava")
    calls = ingress.options(method_name="generate", stream=True)
    aborts = AbortSender(ingress)

    async def tokens_of(call_id: str) -> int:
        tokens = 0
        async for item in calls.remote(HELLO, FOREVER, None, 0, call_id, time.time() + 120):
            if isinstance(item, PreparedPrompt):
                aborts.send(call_id)
            else:
                tokens += sum(len(chunk.token_ids) for chunk in item)
        return tokens

    assert await tokens_of("aborted in flight") < 1500
    # An abort may also overtake the call that it is about.
    assert await tokens_of("aborted in flight") == 0


def test_a_closed_stream_frees_the_engine(
    llava: LlavaClient, engine_stats: Callable[[], dict[str, Any]], wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    before = engine_stats()["generated_tokens"]
    stream = llava.stream(question(DEMO_QUESTION, DEMO_IMAGE.read_bytes()), FOREVER)
    next(stream)
    stream.close()
    wait_until(lambda: engine_stats()["running"] == 0)
    assert engine_stats()["generated_tokens"] - before < 1500


def test_a_form_travels_with_the_sampling(llava: LlavaClient) -> None:
    form = StructuredOutput(choice=("green", "blue", "red"))
    asked = SamplingParams(temperature=0, structured=form)
    assert llava.ask(DEMO_IMAGE.read_bytes(), DEMO_QUESTION, asked) == "red"
    with pytest.raises(RequestError, match="not supported: not"):
        llava.ask(DEMO_IMAGE.read_bytes(), DEMO_QUESTION, SamplingParams(structured=StructuredOutput(json={"not": {}})))
