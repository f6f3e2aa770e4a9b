"""What the web app accepts, and what it refuses: by name, in OpenAI's shape, over a real socket."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from llava_serve.types import ImagePart, Message, TextPart
from support.api_server import PacedBackend, app_over, error_of

QUESTION = {"role": "user", "content": "What is it?"}
PICTURE: dict[str, Any] = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.fixture(scope="module")
def backend() -> PacedBackend:
    return PacedBackend()


@pytest.fixture(scope="module")
def web(backend: PacedBackend) -> Iterator[httpx.Client]:
    with app_over(backend, default_timeout_s=50, max_timeout_s=70) as web:
        yield web


def ask(web: httpx.Client, **fields: Any) -> httpx.Response:
    body = {"model": "paced", "messages": [QUESTION]} | fields
    return web.post("/v1/chat/completions", json=body)


NEUTRAL: list[dict[str, Any]] = [
    {"tools": []},
    {"tools": None},
    {"tool_choice": "none"},
    {"parallel_tool_calls": True},
    {"response_format": {"type": "text"}},
    {"logit_bias": {}},
    {"store": False},
    {"metadata": {"team": "a"}},
    {"modalities": ["text"]},
    {"service_tier": "auto"},
    {"user": "somebody"},
    {"stop": None, "seed": None, "n": None, "temperature": None, "max_tokens": None, "logprobs": None},
    {"something_new": None},
    {"logprobs": False, "top_logprobs": 0},
    {"stream_options": {"include_usage": False}},
    {"messages": [{"role": "user", "content": [{**PICTURE, "image_url": {**PICTURE["image_url"], "detail": "auto"}}]}]},
    {"messages": [{"role": "user", "content": [{**PICTURE, "image_url": {**PICTURE["image_url"], "detail": "low"}}]}]},
    {"messages": [{**QUESTION, "name": "Ann"}]},
    {"messages": [{"role": "assistant", "content": "A.", "refusal": None, "tool_calls": None}, QUESTION]},
]


@pytest.mark.parametrize("fields", NEUTRAL, ids=lambda fields: ",".join(fields))
def test_a_field_at_its_neutral_value_is_accepted(web: httpx.Client, fields: dict[str, Any]) -> None:
    response = ask(web, **fields)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == "A red circle."


ASKING: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"store": True}, "store"),
    ({"store": 0}, "store"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"temprature": 0}, "temprature"),
    ({"stream": True, "stream_options": {"interval": 5}}, "stream_options.interval"),
    ({"messages": [{**QUESTION, "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
    (
        {"messages": [{"role": "user", "content": [{**PICTURE, "image_url": {"url": "data:,", "crop": "left"}}]}]},
        "messages[0].content[0].image_url.crop",
    ),
]


@pytest.mark.parametrize(("fields", "param"), ASKING, ids=[param for _, param in ASKING])
def test_a_field_that_is_not_supported_is_refused_by_name(
    web: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    response = ask(web, **fields)
    error = error_of(response)
    assert response.status_code == 400
    assert error["code"] == "unsupported_parameter"
    assert error["param"] == param
    assert param in error["message"]


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "'messages' must not be empty."),
    ({"messages": "hello"}, "messages", "'messages' must be a list."),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "'messages[0].content' is required."),
    ({"messages": [{**QUESTION, "name": 5}]}, "messages[0].name", "'messages[0].name' must be a string."),
    (
        {"messages": [{"role": "user", "content": [{**PICTURE, "image_url": {"url": "data:,", "detail": "more"}}]}]},
        "messages[0].content[0].image_url.detail",
        "'messages[0].content[0].image_url.detail' must be one of 'auto', 'low', 'high' or 'original'.",
    ),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "'messages[0].content' must be a list."),
    ({"temperature": "hot"}, "temperature", "'temperature' must be a number."),
    ({"temperature": -1}, "temperature", "temperature must be between 0 and 100; got -1.0."),
    ({"top_p": 0}, "top_p", "top_p must be above 0 and at most 1; got 0.0."),
    ({"max_tokens": 0}, "max_tokens", "'max_tokens' must be 1 or more."),
    ({"max_tokens": 1.5}, "max_tokens", "'max_tokens' must be an integer."),
    ({"n": True}, "n", "'n' must be an integer."),
    ({"stop": ["a", 5]}, "stop[1]", "'stop[1]' must be a string."),
    ({"stop": ""}, "stop[0]", "'stop[0]' must not be empty."),
    ({"stop": ["a"] * 17}, "stop", "'stop' must have 16 items or fewer."),
    ({"seed": 2**70}, "seed", "'seed' must be below 9223372036854775808."),
    ({"timeout": 0}, "timeout", "'timeout' must be above 0."),
    ({"top_logprobs": 3}, "top_logprobs", "top_logprobs needs logprobs to be true."),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options needs stream to be true."),
    (
        {"max_tokens": 5, "max_completion_tokens": 5},
        "max_completion_tokens",
        "Give max_tokens or max_completion_tokens, not both.",
    ),
    (
        {"messages": [{"role": "tool", "content": "x"}]},
        "messages[0].role",
        "'messages[0].role' must be one of 'system', 'developer', 'user' or 'assistant'.",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "messages[0].content[0].type",
        "'messages[0].content[0].type' must be one of 'text', 'image_url' or 'image'.",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
        "messages[0].content[0]",
        "messages[0].content[0] must hold 'image_url', as its type says, and nothing else.",
    ),
]


@pytest.mark.parametrize(("fields", "param", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_a_wrong_field_is_named_in_a_sentence(
    web: httpx.Client, fields: dict[str, Any], param: str, message: str
) -> None:
    response = ask(web, **fields)
    assert response.status_code == 400
    assert error_of(response) == {
        "message": message,
        "type": "invalid_request_error",
        "param": param,
        "code": "invalid_value",
    }


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"model": "\\ud800"}', b"[" * 10_000])
def test_a_body_that_is_no_json_is_refused(web: httpx.Client, body: bytes) -> None:
    response = web.post("/v1/chat/completions", content=body)
    assert response.status_code == 400
    assert error_of(response)["message"] == "The request's body is not valid JSON."


def test_json_that_is_no_object_is_refused(web: httpx.Client) -> None:
    response = web.post("/v1/chat/completions", content=b"[]")
    assert response.status_code == 400
    assert error_of(response)["message"] == "The request's body must be a JSON object."


def test_messages_reach_the_library_as_they_were_written(web: httpx.Client, backend: PacedBackend) -> None:
    text = {"type": "text", "text": "and <image> this?"}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "What is"}, PICTURE, text, PICTURE]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
        QUESTION,
    ]
    assert ask(web, messages=messages, conv_mode="plain").status_code == 200
    picture = ImagePart("data:image/png;base64,AAAA")
    assert backend.asked[-1] == (
        (
            Message("system", (TextPart("Be "), TextPart("brief."))),
            Message("user", (TextPart("What is"), picture, TextPart("and <image> this?"), picture)),
            Message("assistant", (TextPart("A dog."),)),
            Message("user", (TextPart("What is it?"),)),
        ),
        "plain",
    )


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_a_picture_in_another_turn_than_the_users_is_refused(web: httpx.Client, role: str) -> None:
    text = {"type": "text", "text": "See this:"}
    response = ask(web, messages=[{"role": role, "content": [text, PICTURE]}, QUESTION])
    error = error_of(response)
    assert error["code"] == "unsupported_parameter"
    assert error["param"] == "messages[0]"


def test_sampling_reaches_the_library(web: httpx.Client, backend: PacedBackend) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 3, "n": 2, "presence_penalty": 1}
    ours = {"frequency_penalty": -1, "repetition_penalty": 1.5, "ignore_eos": True}
    assert ask(web, **fields, **ours, stop="\n", max_tokens=9, logprobs=True, top_logprobs=4).status_code == 200
    sampling = backend.samplings[-1]
    for name, value in (fields | ours).items():
        assert getattr(sampling, name) == value
    assert (sampling.stop, sampling.max_new_tokens, sampling.logprobs) == (("\n",), 9, 4)


@pytest.mark.parametrize(("asked", "given"), [(None, 50), (20, 20), (500, 70)])
def test_a_request_has_its_timeout_within_the_servers_limits(
    web: httpx.Client, backend: PacedBackend, asked: float | None, given: float
) -> None:
    now = time.time()
    assert ask(web, timeout=asked).status_code == 200
    assert 0 <= backend.deadlines[-1] - now - given < 5


def test_an_unknown_model_is_not_found(web: httpx.Client) -> None:
    for response in (ask(web, model="gpt-9"), web.get("/v1/models/org/gpt-9")):
        assert response.status_code == 404
        error = error_of(response)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
