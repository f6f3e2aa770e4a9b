"""A bad request is refused with a sentence and the right status, and affects no other request."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import openai
import pytest

from support.demo import DEMO_ANSWER, DEMO_IMAGE, DEMO_QUESTION, question


def ask(client: Any, messages: list[dict[str, Any]], **fields: Any) -> Any:
    return client.chat.completions.create(model="builtin", messages=messages, temperature=0, max_tokens=20, **fields)


def test_data_that_is_no_picture_is_refused_and_the_next_request_is_answered(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        ask(client, question(DEMO_QUESTION, b"not a picture"))
    body = refusal.value.body
    assert isinstance(body, dict)
    assert body["code"] == "invalid_image"
    assert "picture" in body["message"]
    assert "Traceback" not in body["message"]
    completion = ask(client, question(DEMO_QUESTION, DEMO_IMAGE.read_bytes()))
    assert DEMO_ANSWER in completion.choices[0].message.content.lower()


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_says_so_before_a_stream_begins(client: Any, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        ask(client, question("word " * 20_000), stream=stream)
    assert refusal.value.code == "context_length_exceeded"


def test_an_unknown_model_is_refused(client: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=question("Hello"))


def test_an_expired_deadline_is_reported(client: Any) -> None:
    with pytest.raises(openai.APIStatusError) as refusal:
        ask(client, question(DEMO_QUESTION, DEMO_IMAGE.read_bytes()), extra_body={"timeout": 0.001})
    assert refusal.value.status_code == 504


def test_health_and_models(client: Any, served: Any) -> None:
    assert [model.id for model in client.models.list()] == ["builtin"]
    with urllib.request.urlopen(f"{served.url}/health", timeout=30) as response:
        assert response.status == 200


def test_a_client_cannot_lift_serves_time_limit(served: Any) -> None:
    # Serve would read "0.001" as this request's time and answer 408 before the application is asked.
    headers = {"x-request-timeout-seconds": "0.001", "content-type": "application/json"}
    body = {"model": "builtin", "messages": question("Hello"), "max_tokens": 2}
    request = urllib.request.Request(f"{served.url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.status == 200
