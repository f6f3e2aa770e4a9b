"""The web app over a real model in this process, judged by the official client and by what the original answers."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError, OpenAI
from openai.types.chat import ChatCompletion

from llava_serve.api.app import create_app
from llava_serve.api.in_process import InProcessBackend
from llava_serve.async_llm import AsyncLLM
from llava_serve.config import ApiOptions, EngineOptions, ImageOptions, ModelOptions
from support.api_server import serving
from support.paths import GOLDEN

MODEL = "llava-v1.5-tiny"
CASES = [
    case
    for case in json.loads((GOLDEN / "cases.json").read_text())[MODEL]["cases"]
    if case["query"] and "<image" not in case["query"]
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    options = ModelOptions(model=str(GOLDEN / "checkpoints" / MODEL), device="cpu", dtype="float32")
    originals = ImageOptions(transparency="drop")  # the golden pixels
    llm = AsyncLLM(options, EngineOptions(kv_cache_bytes=64 << 20, num_threads=1), image_options=originals)
    backend = InProcessBackend(llm)
    with serving(create_app(backend, ApiOptions())) as url:
        yield url
    llm.close()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


def picture(name: str) -> dict[str, Any]:
    data = base64.b64encode((GOLDEN / "images" / name).read_bytes()).decode()
    kind = "jpeg" if name.endswith("jpg") else "png"
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


LANDSCAPE = [user(picture("landscape.png"), text("Describe the picture in detail."))]


def greedy(messages: list[Any], **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 20} | fields


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_a_greedy_answer_is_the_originals_streamed_and_not(client: OpenAI, case: dict[str, Any]) -> None:
    messages = [user(picture(Path(case["images"][0]).name), text(case["query"]))]
    asked = greedy(messages, extra_body={"conv_mode": case["conv_mode"]})
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == case["greedy_text"]
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == case["prompt_len"]
    assert whole.usage.completion_tokens == len(case["greedy_ids"])
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == case["greedy_text"]
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


async def test_the_asynchronous_client_asks_many_at_once(url: str, client: OpenAI) -> None:
    alone = client.chat.completions.create(**greedy(LANDSCAPE)).choices[0].message.content

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as many:

        async def ask(stream: bool) -> str | None:
            if not stream:
                whole: ChatCompletion = await many.chat.completions.create(**greedy(LANDSCAPE))
                return whole.choices[0].message.content
            chunks = await many.chat.completions.create(**greedy(LANDSCAPE, stream=True))
            return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

        answers = await asyncio.gather(*(ask(bool(number % 2)) for number in range(16)))
    assert set(answers) == {alone}


async def test_the_clients_streaming_helper_sums_up_the_stream(url: str) -> None:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="any") as client:
        fields = {"stop": "object", "logprobs": True, "top_logprobs": 2}  # the helper wants an answer that ends
        usage = {"stream_options": {"include_usage": True}}
        async with client.chat.completions.stream(**greedy(LANDSCAPE, **fields, **usage)) as stream:
            async for _ in stream:
                pass
            summed = await stream.get_final_completion()
        whole = await client.chat.completions.create(**greedy(LANDSCAPE, **fields))
    assert summed.choices[0].message.content == whole.choices[0].message.content
    assert summed.choices[0].logprobs is not None
    assert whole.choices[0].logprobs is not None
    assert summed.choices[0].logprobs.content == whole.choices[0].logprobs.content
    assert summed.usage is not None
    assert whole.usage is not None
    assert summed.usage.completion_tokens == whole.usage.completion_tokens


def test_logprobs_are_those_of_the_tokens(client: OpenAI) -> None:
    choice = client.chat.completions.create(**greedy(LANDSCAPE, logprobs=True, top_logprobs=3)).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 20
    for token in choice.logprobs.content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert math.isclose(token.top_logprobs[0].logprob, token.logprob)
        assert token.top_logprobs[0].token == token.token
    said = b"".join(bytes(token.bytes or ()) for token in choice.logprobs.content)
    assert said.decode(errors="replace") == choice.message.content


def test_a_blank_before_a_stop_string_stays(client: OpenAI) -> None:
    whole = client.chat.completions.create(**greedy(LANDSCAPE)).choices[0].message.content
    assert whole is not None
    before, _, word = whole.rpartition(" ")
    assert client.chat.completions.create(**greedy(LANDSCAPE, stop=word)).choices[0].message.content == before + " "
    include = {"include_stop_str_in_output": True}
    answer = client.chat.completions.create(**greedy(LANDSCAPE, stop=word, extra_body=include)).choices[0].message
    assert answer.content == whole


def test_an_answer_ends_at_a_token_of_the_request_and_not_before_its_least_length(client: OpenAI) -> None:
    reported = {"return_token_ids": True}
    whole = client.chat.completions.create(**greedy(LANDSCAPE, extra_body=reported)).choices[0]
    ids = whole.token_ids
    stop = {**reported, "stop_token_ids": [ids[5]]}
    at = ids.index(ids[5])
    ended = client.chat.completions.create(**greedy(LANDSCAPE, extra_body=stop)).choices[0]
    assert ended.token_ids == ids[: at + 1]
    assert ended.finish_reason == "stop"
    assert whole.message.content is not None
    assert whole.message.content.startswith(ended.message.content or "?")
    longer = client.chat.completions.create(**greedy(LANDSCAPE, extra_body={**stop, "min_tokens": at + 3})).choices[0]
    assert len(longer.token_ids) >= at + 3
    assert ids[5] not in longer.token_ids[: at + 2]
    with pytest.raises(BadRequestError, match="logit_bias has an id"):
        client.chat.completions.create(**greedy(LANDSCAPE, logit_bias={"999999": 1}))


def test_usage_reports_image_tokens_and_cached_tokens(client: OpenAI) -> None:
    messages = [user(text("First"), picture("tiny.png"), text("then"), picture("alpha.png"), text("which?"))]
    first, second = (client.chat.completions.create(**greedy(messages)).usage for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.prompt_tokens_details is not None
    assert second.prompt_tokens_details is not None
    assert first.prompt_tokens_details.image_tokens == second.prompt_tokens_details.image_tokens == 32
    cached = second.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert 32 < cached < second.prompt_tokens


def test_an_earlier_turn_and_a_system_message_count(client: OpenAI) -> None:
    alone = client.chat.completions.create(**greedy(LANDSCAPE))
    more = [{"role": "assistant", "content": "A hill."}, {"role": "user", "content": "What colour is it?"}]
    later = client.chat.completions.create(**greedy([{"role": "system", "content": "Be brief."}, *LANDSCAPE, *more]))
    assert alone.usage is not None
    assert later.usage is not None
    assert later.usage.prompt_tokens_details is not None
    assert later.usage.prompt_tokens_details.image_tokens == 16
    assert alone.usage.prompt_tokens != later.usage.prompt_tokens


def test_how_an_answer_ends_and_how_many_there_are(client: OpenAI) -> None:
    def create(**fields: Any) -> Any:
        return client.chat.completions.create(**greedy(LANDSCAPE, **fields))

    assert create(stop="lass").choices[0].message.content == "me\ufffd"
    assert create(stop=["zzz", "lass"]).choices[0].finish_reason == "stop"
    assert create(max_tokens=None, max_completion_tokens=3).usage.completion_tokens == 3
    long = create(max_tokens=300, extra_body={"ignore_eos": True})
    assert (long.usage.completion_tokens, long.choices[0].finish_reason) == (300, "length")
    sampled = [create(temperature=1, seed=5, n=3) for _ in range(2)]
    texts = [[choice.message.content for choice in completion.choices] for completion in sampled]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


def test_another_template_makes_another_prompt(client: OpenAI) -> None:
    lengths = set()
    for conv_mode in (None, "llava_v0", "mpt"):
        usage = client.chat.completions.create(**greedy(LANDSCAPE, extra_body={"conv_mode": conv_mode})).usage
        assert usage is not None
        lengths.add(usage.prompt_tokens)
    assert len(lengths) == 3


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("data:image/png;base64," + base64.b64encode(b"not a picture").decode(), "invalid_image"),
        ("data:image/png;base64,****", "invalid_image"),
        ("http://127.0.0.1/cat.png", "invalid_image"),
        ("/etc/passwd", "invalid_image"),
        ("file:///etc/passwd", "invalid_image"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_picture_is_refused_and_the_next_request_answered(
    client: OpenAI, source: str, code: str, stream: bool
) -> None:
    bad = [user({"type": "image_url", "image_url": {"url": source}}, text("What is it?"))]
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(**greedy(bad, stream=stream))
    assert caught.value.code == code
    assert "passwd" not in caught.value.message
    assert client.chat.completions.create(**greedy(LANDSCAPE)).choices


def test_a_prompt_that_does_not_fit_says_got_and_limit(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(**greedy([{"role": "user", "content": "many words " * 2000}]))
    assert caught.value.code == "context_length_exceeded"
    assert isinstance(caught.value.body, dict)
    length, got = map(int, re.findall(r"\d+", caught.value.body["message"]))
    assert got > 4000
    assert length == 2048
    assert "This model's maximum context length is 2048 tokens" in caught.value.body["message"]  # what clients go by


def test_an_unknown_template_is_refused(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(**greedy(LANDSCAPE, extra_body={"conv_mode": "nonsense"}))
    assert caught.value.param == "conv_mode"
