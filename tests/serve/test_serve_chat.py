"""`Ingress.chat`: an OpenAI request through a Ray handle, as Ray Data's processor sends it."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest
from openai.types.chat import ChatCompletion
from ray import serve

from llava_serve.api.protocol import ChatRequest
from support.cluster import limited_ingress
from support.demo import DEMO_IMAGE, DEMO_QUESTION, question

ASK: dict[str, Any] = {"messages": question(DEMO_QUESTION, DEMO_IMAGE.read_bytes()), "temperature": 0, "max_tokens": 40}


@pytest.fixture(scope="module")
def chat(ray_job: None) -> Any:
    return serve.get_deployment_handle("Ingress", "llava").options(stream=True).chat


async def first(items: Any) -> dict[str, Any]:
    """What `ray.data.llm` reads of a call."""
    item: dict[str, Any] = await anext(items)
    return item


async def test_the_answer_is_that_over_http(client: Any, chat: Any) -> None:
    row = {"request_id": "7", "idx_in_batch": 3} | ASK
    # As Ray Data gives rows: lists are arrays.
    row["messages"] = np.array([message | {"content": np.array(message["content"])} for message in ASK["messages"]])
    answer = await first(chat.remote(row))
    over_http = client.chat.completions.create(model="builtin", **ASK).to_dict()
    assert ChatCompletion.model_validate(answer).id == "chatcmpl-7"
    for name in ("object", "model", "choices"):
        assert answer[name] == over_http[name]
    assert answer["usage"]["total_tokens"] == over_http["usage"]["total_tokens"]
    assert (await first(chat.remote(ChatRequest.model_validate(ASK))))["choices"] == answer["choices"]


@pytest.mark.parametrize(
    ("fields", "kind", "sentence"),
    [
        ({"messages": question("What is this?", b"no picture")}, ValueError, "InvalidImageError"),
        ({"messages": [{"role": "user", "content": b"bytes"}]}, ValueError, "a value that JSON has no form for"),
        ({"priority": 101}, ValueError, "priority must be between 0 and 100"),
        ({"tempreature": 1}, ValueError, "does not support 'tempreature'"),
        ({"stream": True}, ValueError, "leave stream out"),
        ({"timeout": 1e-6}, TimeoutError, "DeadlineExceededError"),
    ],
)
async def test_errors_are_those_that_end_a_row_and_not_the_job(
    chat: Any, fields: dict[str, Any], kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        await first(chat.remote(ASK | fields))


async def test_a_busy_server_is_waited_for(served: Any, ray_job: None) -> None:
    with limited_ingress(served, "patient", max_in_flight=1) as url:
        patient = serve.get_deployment_handle("Ingress", "patient").options(stream=True).chat
        forever = ASK | {"max_tokens": 1500, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=forever, timeout=60) as taken:
            assert taken.status_code == 200
            chunks = taken.iter_raw()  # closed with its name: that would end the answer
            next(chunks)
            with pytest.raises(TimeoutError, match="at capacity"):
                await first(patient.remote(ASK | {"timeout": 0.9}))  # it waits a second or more
            waiting = first(patient.remote(ASK))
        assert (await waiting)["choices"][0]["finish_reason"] == "stop"


async def test_calls_at_once_are_answered_each_with_its_own(chat: Any) -> None:
    questions = ["What colour is the circle?", "How many shapes are there?"] * 4
    image = DEMO_IMAGE.read_bytes()
    calls = [chat.remote(ASK | {"messages": question(text, image), "priority": 1}) for text in questions]
    answers = [(await first(call))["choices"][0]["message"]["content"] for call in calls]
    assert answers == ["The circle is red.", "There are two shapes in the picture."] * 4
