"""What the official client does by itself, against the running application: retries, timeouts, helpers, contexts."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from support.cluster import limited_ingress
from support.demo import DEMO_ANSWER, DEMO_IMAGE, DEMO_QUESTION, question

Stats = Callable[[], dict[str, Any]]
Wait = Callable[[Callable[[], bool]], None]
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


def asked(**fields: Any) -> dict[str, Any]:
    messages = question(DEMO_QUESTION, DEMO_IMAGE.read_bytes())
    return {"model": "builtin", "messages": messages, "temperature": 0, "max_tokens": 40} | fields


def endless(**fields: Any) -> dict[str, Any]:
    return asked(max_tokens=1500, extra_body={"ignore_eos": True}, **fields)


@pytest.fixture(scope="module")
def narrow(served: Any, ray_job: None) -> Iterator[str]:
    """The URL of an ingress that allows one request in flight."""
    with limited_ingress(served, "narrow", max_in_flight=1) as url:
        yield f"{url}/v1"


@pytest.fixture
def at_rest(engine_stats: Stats, wait_until: Wait) -> Iterator[int]:
    """Gives the tokens generated before the test; after it, the engine must be idle without the endless answer."""
    before = engine_stats()["generated_tokens"]
    yield before
    wait_until(lambda: engine_stats()["running"] == engine_stats()["waiting"] == 0)
    assert engine_stats()["generated_tokens"] - before < 1500


def test_at_capacity_the_client_retries_after_the_seconds_of_retry_after(narrow: str, at_rest: int) -> None:
    with OpenAI(base_url=narrow, api_key="none", max_retries=0) as first:
        running = first.chat.completions.create(**endless(stream=True))
        next(running)
        with pytest.raises(openai.RateLimitError) as refusal:
            first.chat.completions.create(model="builtin", messages=HELLO, max_tokens=2)
        assert refusal.value.response.headers["retry-after"] == "1"
        tries: list[tuple[int, float]] = []

        def note(response: httpx.Response) -> None:
            tries.append((response.status_code, time.monotonic()))
            running.close()

        hooked = openai.DefaultHttpxClient(event_hooks={"response": [note]})
        with OpenAI(base_url=narrow, api_key="none", max_retries=10, http_client=hooked) as second:
            raw = second.chat.completions.with_raw_response.create(model="builtin", messages=HELLO, max_tokens=2)
    usage = raw.parse().usage
    assert usage is not None
    assert usage.completion_tokens <= 2
    assert raw.retries_taken == len(tries) - 1 >= 1
    assert [status for status, _ in tries] == [429] * raw.retries_taken + [200]
    assert all(later - earlier >= 1 for (_, earlier), (_, later) in itertools.pairwise(tries))


def test_a_client_timeout_ends_an_unstreamed_answer(client: Any, at_rest: int) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(**endless())


def test_the_helper_sums_a_stream_up(client: Any) -> None:
    with client.chat.completions.stream(**asked(stream_options={"include_usage": True})) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        summed = stream.get_final_completion()
    whole = client.chat.completions.create(**asked())
    assert "".join(deltas) == summed.choices[0].message.content == whole.choices[0].message.content
    assert summed.choices[0].finish_reason == "stop"
    assert summed.usage.completion_tokens == whole.usage.completion_tokens


def test_an_answer_that_has_begun_and_its_sampling_cross_the_tiers(client: Any) -> None:
    begun = [*asked()["messages"], {"role": "assistant", "content": "The circle is"}]
    answered = client.chat.completions.create(**asked(messages=begun, extra_body={"continue_final_message": True}))
    assert answered.choices[0].message.content == f" {DEMO_ANSWER}."
    reopened = client.chat.completions.create(**asked(messages=begun, extra_body={"add_generation_prompt": True}))
    assert reopened.usage.prompt_tokens > answered.usage.prompt_tokens
    least = {"min_tokens": 12, "return_token_ids": True, "stop_token_ids": [5]}
    assert len(client.chat.completions.create(**asked(extra_body=least)).choices[0].token_ids) >= 12


def test_a_raw_stream_is_read_line_by_line(client: Any) -> None:
    with client.chat.completions.with_streaming_response.create(**asked(stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    with client.chat.completions.with_streaming_response.create(**asked()) as response:
        assert DEMO_ANSWER in response.parse().choices[0].message.content


async def test_the_asynchronous_contexts(served: Any, at_rest: int) -> None:
    async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        async with client.chat.completions.stream(**asked()) as stream:
            async for _ in stream:
                pass
            assert DEMO_ANSWER in ((await stream.get_final_completion()).choices[0].message.content or "")
        async with await client.chat.completions.create(**endless(stream=True)) as stream:
            assert (await anext(aiter(stream))).choices[0].delta.role == "assistant"
        # A closed stream frees its connection, and the client goes on.
        assert [model.id async for model in client.models.list()] == ["builtin"]


async def test_a_task_that_is_cancelled_ends_its_request(served: Any, at_rest: int) -> None:
    async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await client.chat.completions.create(**endless())
