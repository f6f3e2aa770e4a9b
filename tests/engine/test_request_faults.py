"""Failures of one request, as its caller gets them: through `LLM`, `AsyncLLM` and HTTP. The others are answered."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from llava_serve.api.app import create_app
from llava_serve.api.in_process import InProcessBackend
from llava_serve.async_llm import AsyncLLM
from llava_serve.config import ApiOptions, EngineOptions, ImageOptions, ModelOptions
from llava_serve.errors import LlavaServeError, NumericalError
from llava_serve.llm import LLM
from llava_serve.processor import Processor
from llava_serve.prompts.conversation import Text
from llava_serve.sampling_params import SamplingParams
from llava_serve.text.tokenizer import Tokenizer, load_tokenizer
from support.api_server import PATH, error_of, serving
from support.paths import GOLDEN

MODEL = ModelOptions(model=str(GOLDEN / "checkpoints" / "llava-v1.5-tiny"), device="cpu", dtype="float32")
OPTIONS = EngineOptions(num_threads=1, kv_cache_bytes=1 << 22)
GREEDY = SamplingParams(temperature=0, max_new_tokens=10)
LONG = SamplingParams(temperature=0, max_new_tokens=60, ignore_eos=True)
GOOD = ["What is this?", "Who made it?", "Why?"]
BAD = "What is this? 7"


class FailingTokenizer:
    """A tokenizer that raises for one id."""

    def __init__(self, tokenizer: Tokenizer, token_id: int) -> None:
        self._tokenizer = tokenizer
        self._token_id = token_id

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: list[int]) -> str:
        if self._token_id in ids:
            raise KeyError(self._token_id)
        return self._tokenizer.decode(ids)


def poison(llm: LLM | AsyncLLM, processor: Processor) -> None:
    """Makes the embedding of the last id of `BAD` NaN; no other prompt here contains it."""
    good = {token for text in GOOD for token in processor.prepare_query(text).token_ids.tolist()}
    ids = [token for token in processor.prepare_query(BAD).token_ids.tolist() if token not in good]
    engine = llm.engine if isinstance(llm, LLM) else llm._loop.engine
    engine.model.language_model.get_input_embeddings().weight.data[ids[-1]] = torch.nan


def offline() -> LLM:
    return LLM(MODEL.model, device="cpu", dtype="float32", engine=OPTIONS)


def greedy_ids(llm: LLM, text: str) -> tuple[int, ...]:
    return llm.generate(text, sampling=LONG).token_ids


def test_llm_raises_for_the_prompt_with_nan_only() -> None:
    llm = offline()
    expected = [one.text for one in llm.generate(GOOD, sampling=GREEDY)]
    llm = offline()
    poison(llm, llm.processor)
    for _ in range(2):
        with pytest.raises(NumericalError, match="float32"):
            llm.generate([GOOD[0], BAD, *GOOD[1:]], sampling=GREEDY)
        assert not llm.engine.has_work
        assert [one.text for one in llm.generate(GOOD, sampling=GREEDY)] == expected


def test_one_of_several_streams_of_llm_fails() -> None:
    llm = offline()
    prompts = [llm.processor.prepare_query(text) for text in (GOOD[0], BAD, GOOD[1])]
    expected = [llm.run([one], GREEDY)[0].text for one in (prompts[0], prompts[2])]
    poison(llm, llm.processor)
    streams = [llm.generate_prepared(one, GREEDY) for one in prompts]
    texts = [next(streams[0]).text]
    with pytest.raises(NumericalError):
        next(streams[1])
    texts = ["".join([*texts, *(chunk.text for chunk in streams[0])]), "".join(chunk.text for chunk in streams[2])]
    assert texts == expected


def test_a_detokenizer_error_fails_its_answer_only(caplog: pytest.LogCaptureFixture) -> None:
    llm = offline()
    answers = {text: greedy_ids(llm, text) for text in GOOD}
    text, token = next(
        (text, token)
        for text, ids in answers.items()
        for token in ids[5:]
        if not any(token in other for name, other in answers.items() if name != text)
    )
    others = [one for one in GOOD if one != text]
    expected = [one.text for one in llm.generate(others, sampling=LONG)]
    llm._answers._tokenizer = FailingTokenizer(llm.processor.tokenizer, token)  # type: ignore[assignment]
    good, bad, last = (llm.processor.prepare_query(one) for one in (others[0], text, others[1]))
    streams = [llm.generate_prepared(one, LONG) for one in (good, bad, last)]
    texts = [next(streams[0]).text, next(streams[2]).text]
    with pytest.raises(LlavaServeError, match="The server failed on this request"):
        list(streams[1])
    assert [a + "".join(chunk.text for chunk in b) for a, b in zip(texts, streams[::2], strict=True)] == expected
    assert llm.engine.stats.free_blocks == llm.engine.stats.total_blocks
    (record,) = [one for one in caplog.records if one.exc_info]
    assert "KeyError" in str(record.exc_info)


@pytest.fixture
def async_llm() -> Iterator[AsyncLLM]:
    llm = AsyncLLM(MODEL, OPTIONS)
    yield llm
    llm.close()


async def text_of(llm: AsyncLLM, text: str, sampling: SamplingParams = GREEDY) -> str:
    prepared = Processor(llm.spec, ImageOptions()).prepare_query(text)
    return "".join([chunk.text async for chunk in llm.generate_prepared(prepared, sampling)])


def unchecked(**fields: Any) -> SamplingParams:
    sampling = SamplingParams(max_new_tokens=10)
    for name, value in fields.items():
        object.__setattr__(sampling, name, value)
    return sampling


async def test_async_llm_raises_a_failure_to_its_caller_only(async_llm: AsyncLLM) -> None:
    expected = await asyncio.gather(*(text_of(async_llm, text) for text in GOOD))
    poison(async_llm, Processor(async_llm.spec, ImageOptions()))
    bad = [
        text_of(async_llm, BAD),
        text_of(async_llm, GOOD[0], unchecked(top_k="many")),
        text_of(async_llm, GOOD[0], unchecked(n="some")),
        text_of(async_llm, GOOD[0], unchecked(presence_penalty="much")),
    ]
    good = [text_of(async_llm, text) for text in GOOD]
    results = await asyncio.gather(*bad, *good, return_exceptions=True)
    assert isinstance(results[0], NumericalError)
    assert all(isinstance(one, Exception) for one in results[: len(bad)])
    assert results[len(bad) :] == expected
    assert async_llm.healthy
    assert async_llm.stats().free_blocks == async_llm.stats().total_blocks


async def test_async_llm_reports_an_unexpected_error_of_adding_a_request(async_llm: AsyncLLM) -> None:
    class Broken(np.ndarray[Any, Any]):
        def tolist(self) -> Any:
            raise ZeroDivisionError

    prepared = Processor(async_llm.spec, ImageOptions()).prepare_query(GOOD[0])
    broken = dataclasses.replace(prepared, token_ids=prepared.token_ids.view(Broken))
    with pytest.raises(LlavaServeError, match="The server failed on this request"):
        await anext(async_llm.generate_prepared(broken, GREEDY))
    assert await text_of(async_llm, GOOD[0])
    assert async_llm.healthy


@pytest.fixture(scope="module")
def builtin() -> Iterator[AsyncLLM]:
    llm = AsyncLLM(ModelOptions(device="cpu"), EngineOptions(num_threads=1))
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def web(builtin: AsyncLLM) -> Iterator[httpx.Client]:
    """The web app over the model that ships."""
    backend = InProcessBackend(builtin)
    with serving(create_app(backend, ApiOptions())) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


_HI = '{"model": "builtin", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4'
AS_GREEDY = {
    "temperature": _HI + ', "temperature": 1e-40}',
    "top_p": _HI + ', "temperature": 1, "top_p": 1e-46}',
    "top_p at a high temperature": _HI + ', "temperature": 100, "top_p": 5e-324}',
}


@pytest.mark.parametrize("body", AS_GREEDY.values(), ids=AS_GREEDY)
def test_the_smallest_values_are_greedy(web: httpx.Client, body: str) -> None:
    greedy = web.post(PATH, content=_HI + ', "temperature": 0}').json()["choices"]
    response = web.post(PATH, content=body)
    assert response.status_code == 200
    assert response.json()["choices"] == greedy
    assert greedy[0]["message"]["content"]


@pytest.mark.parametrize("top_k", [2**63 - 1, 2**63, 10**19, 10**300])
def test_the_largest_top_k_is_the_vocabulary_and_ends_no_stream(web: httpx.Client, top_k: int) -> None:
    stream = {"model": "builtin", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "temperature": 0}
    stream |= {"max_tokens": 60, "ignore_eos": True}
    body = _HI + ', "temperature": 1, "seed": 1%s}'
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(web.post, PATH, json=stream) for _ in range(3)]
        answer = web.post(PATH, content=body % f', "top_k": {top_k}')
    assert answer.status_code == 200
    assert answer.json()["choices"] == web.post(PATH, content=body % "").json()["choices"]
    for one in streams:
        assert one.result().text.endswith("data: [DONE]\n\n")
        assert "error" not in one.result().text


def test_a_repetition_penalty_that_would_overflow_is_refused(web: httpx.Client) -> None:
    response = web.post(PATH, content=_HI + ', "temperature": 1, "repetition_penalty": 1e-308}')
    assert response.status_code == 400
    assert error_of(response)["param"] == "repetition_penalty"
    assert error_of(response)["message"] == "repetition_penalty must be between 0.01 and 10; got 1e-308."


def test_an_error_message_truncates_a_long_number(web: httpx.Client) -> None:
    response = web.post(PATH, content=_HI + f', "n": {"9" * 4300}}}')
    assert response.status_code == 400
    assert len(error_of(response)["message"]) < 200


def test_nan_is_a_numerical_error_that_is_not_to_be_retried(web: httpx.Client, builtin: AsyncLLM) -> None:
    """One byte of an emoji has a NaN embedding, and all requests share the system prompt."""
    (*_, byte) = load_tokenizer(builtin.spec.tokenizer).encode([Text("\N{GRINNING FACE}")])
    weight = builtin._loop.engine.model.language_model.get_input_embeddings().weight.data
    before = weight[byte].clone()

    def ask(text: str, **fields: Any) -> httpx.Response:
        messages = [{"role": "system", "content": "Be brief. " * 30}, {"role": "user", "content": text}]
        return web.post(PATH, json={"model": "builtin", "messages": messages, "temperature": 0} | fields)

    expected = ask("What colour is the circle?").json()["choices"]
    weight[byte] = torch.nan
    try:
        for _ in range(2):
            response = ask("What colour is the circle? \N{GRINNING FACE}")
            assert response.status_code == 500
            assert response.headers["x-should-retry"] == "false"
            error = error_of(response)
            assert (error["type"], error["code"]) == ("server_error", "numerical_error")
            assert "not finite in float32" in error["message"]
            assert ask("What colour is the circle?").json()["choices"] == expected
        events = ask("\N{GRINNING FACE}", stream=True)
        assert json.loads(events.text.removeprefix("data: "))["error"]["code"] == "numerical_error"
    finally:
        weight[byte] = before
    assert web.get("/health").status_code == 200
