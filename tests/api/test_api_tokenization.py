"""`/tokenize` and `/detokenize` over the model that ships: what a prompt takes is what its answer then counts."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx
import pytest

from llava_serve.api.app import create_app
from llava_serve.api.in_process import InProcessBackend
from llava_serve.async_llm import AsyncLLM
from llava_serve.config import ApiOptions
from llava_serve.types import Chunk
from support.api_server import PATH, error_of, serving
from support.demo import DEMO_IMAGE, data_url

PICTURE = {"type": "image_url", "image_url": {"url": data_url(DEMO_IMAGE.read_bytes())}}
ASKED = [{"role": "user", "content": [PICTURE, {"type": "text", "text": "What colour is the circle?"}]}]


class CountedBackend(InProcessBackend):
    """Counts the calls of the model."""

    calls = 0

    def generate(self, *args: Any, **keywords: Any) -> AsyncGenerator[list[Chunk]]:
        self.calls += 1
        return super().generate(*args, **keywords)


@pytest.fixture(scope="module")
def backend(llm: AsyncLLM) -> CountedBackend:
    return CountedBackend(llm)


@pytest.fixture(scope="module")
def web(backend: CountedBackend) -> Iterator[httpx.Client]:
    with serving(create_app(backend, ApiOptions())) as url, httpx.Client(base_url=url, timeout=60) as web:
        yield web


def tokenized(web: httpx.Client, **body: Any) -> dict[str, Any]:
    response = web.post("/tokenize", json=body)
    assert response.status_code == 200, response.text
    reported: dict[str, Any] = response.json()
    return reported


@pytest.mark.parametrize(
    "fields", [{}, {"conv_mode": "llava_v0"}, {"messages": [*ASKED, {"role": "assistant", "content": "The circle"}]}]
)
def test_a_conversation_takes_what_its_answer_counts(
    web: httpx.Client, backend: CountedBackend, fields: dict[str, Any]
) -> None:
    body = {"messages": ASKED, "max_tokens": 1, "return_token_ids": True} | fields
    before = backend.calls
    reported = tokenized(web, **body)
    assert backend.calls == before  # no step of the model
    answer = web.post(PATH, json=body).json()
    assert reported["tokens"] == answer["prompt_token_ids"]
    assert reported["count"] == len(reported["tokens"]) == answer["usage"]["prompt_tokens"]
    assert reported["image_tokens"] == answer["usage"]["prompt_tokens_details"]["image_tokens"] > 0
    assert reported["text_tokens"] + reported["image_tokens"] == reported["count"]
    assert reported["fits"] is True
    assert reported["max_model_len"] == web.get("/v1/models").json()["data"][0]["max_model_len"]


def test_each_picture_is_reported_by_itself(web: httpx.Client) -> None:
    content = [PICTURE, PICTURE, {"type": "text", "text": "Compare."}]
    reported = tokenized(web, messages=[{"role": "user", "content": content}], return_token_strs=True)
    assert len(reported["images"]) == 2
    assert reported["images"][0] == reported["images"][1]
    picture = reported["images"][0]
    assert (picture["tiles"], picture["tokens"] * 2) == (1, reported["image_tokens"])
    assert (picture["width"], picture["height"]) == (320, 240)
    assert reported["token_strs"].count("<image>") == reported["image_tokens"] == reported["tokens"].count(-200)


def test_a_prompt_that_is_too_long_is_counted(web: httpx.Client) -> None:
    long = [{"role": "user", "content": [PICTURE, {"type": "text", "text": "word " * 9000}]}]
    reported = tokenized(web, messages=long)
    assert reported["fits"] is False
    assert reported["count"] > 9000 > reported["max_model_len"]
    assert reported["images"]
    refused = error_of(web.post(PATH, json={"messages": long}))["message"]
    assert f"maximum context length is {reported['max_model_len']} tokens" in refused


def test_a_text_survives_its_tokens(web: httpx.Client) -> None:
    text = "Two words,  \u4e2d and </s> as text"
    reported = tokenized(web, prompt=text, return_token_strs=True)
    assert len(reported["token_strs"]) == reported["count"] == reported["text_tokens"]
    bare = tokenized(web, prompt=text, add_special_tokens=False)
    assert reported["tokens"][1:] == bare["tokens"]
    assert bare["token_strs"] is None
    for tokens in (reported["tokens"], [-200, *bare["tokens"]]):
        assert web.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", {}, "Give prompt or messages"),
        ("/tokenize", {"prompt": "Hi", "messages": ASKED}, "Give prompt or messages"),
        ("/tokenize", {"messages": ASKED, "add_special_tokens": True}, "goes with prompt"),
        ("/tokenize", {"prompt": "word " * 1_000_000}, "maximum context length"),
        ("/tokenize", {"prompt": "Hi", "odd": 1}, "'odd'"),
        ("/detokenize", {"tokens": [1, 10**6]}, "outside 0 to 639"),
        ("/detokenize", {"tokens": [-3]}, "outside 0 to 639"),
        ("/detokenize", {"tokens": [0] * 65_537}, "65536 items"),
    ],
)
def test_what_cannot_be_reported_is_refused(web: httpx.Client, path: str, body: dict[str, Any], words: str) -> None:
    response = web.post(path, json=body)
    assert response.status_code == 400
    assert words in error_of(response)["message"]
