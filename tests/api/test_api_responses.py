"""`/v1/responses` over the model that ships, by the official client, which sums the stream up by itself."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from openai import APIError, OpenAI
from openai.types.responses import ResponseCompletedEvent

from llava_serve.errors import EngineDeadError
from support.api_server import PATH, PacedBackend, app_over, error_of, official
from support.demo import DEMO_IMAGE, data_url

URL = data_url(DEMO_IMAGE.read_bytes())
PICTURE = {"type": "input_image", "image_url": URL, "detail": "auto"}
BROKEN = {"type": "input_image", "image_url": "data:image/png;base64,%%%"}
RED, BLUE = "The circle is red.", "The square is blue."


def turn(role: str, *parts: dict[str, Any] | str) -> Any:
    kind = "output_text" if role == "assistant" else "input_text"
    return {
        "role": role,
        "content": [{"type": kind, "text": part} if isinstance(part, str) else part for part in parts],
    }


ASKED = turn("user", "What colour is the circle?", PICTURE)


def greedy(given: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "builtin", "input": given, "temperature": 0} | fields


def test_a_picture_is_answered_as_in_a_chat(web: httpx.Client, client: OpenAI) -> None:
    response = client.responses.create(**greedy([ASKED], instructions="Be brief."))
    assert response.output_text == RED
    assert (response.object, response.status, response.model) == ("response", "completed", "builtin")
    assert response.instructions == "Be brief."
    parts = [{"type": "text", "text": "What colour is the circle?"}, {"type": "image_url", "image_url": URL}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    usage = web.post(PATH, json={"messages": messages, "temperature": 0}).json()["usage"]
    assert response.usage is not None
    assert response.usage.input_tokens == usage["prompt_tokens"]
    assert response.usage.output_tokens == usage["completion_tokens"]
    assert response.usage.total_tokens == usage["total_tokens"]


def test_a_text_alone_is_answered(client: OpenAI) -> None:
    assert client.responses.create(**greedy("Hello")).output_text


def test_earlier_answers_are_sent_back_as_they_came(client: OpenAI) -> None:
    first = client.responses.create(**greedy([ASKED]))
    history = [ASKED, *(item.to_dict() for item in first.output), turn("user", "What colour is the square?")]
    assert client.responses.create(**greedy(history)).output_text == BLUE


def test_the_events_of_a_stream_in_order(web: httpx.Client, client: OpenAI) -> None:
    events = list(client.responses.create(**greedy([ASKED], stream=True)))
    assert [each.sequence_number for each in events] == list(range(len(events)))
    names = [each.type for each in events]
    deltas = names.count("response.output_text.delta")
    assert deltas > 0
    assert names == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(each.delta for each in events if each.type == "response.output_text.delta") == RED
    last = events[-1]
    assert isinstance(last, ResponseCompletedEvent)
    assert last.response.output_text == RED
    raw = web.post("/v1/responses", json=greedy([ASKED], stream=True)).text
    for name, data in (each.split("\n") for each in raw.strip().split("\n\n")):
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]


def test_the_clients_streaming_helper_sums_up_the_stream(client: OpenAI) -> None:
    with client.responses.stream(**greedy([ASKED])) as stream:
        for _ in stream:
            pass
        summed = stream.get_final_response()
    whole = client.responses.create(**greedy([ASKED]))
    assert summed.output_text == whole.output_text == RED
    assert summed.usage is not None
    assert whole.usage is not None
    assert summed.usage.output_tokens == whole.usage.output_tokens


def test_an_answer_that_is_cut_says_so(client: OpenAI) -> None:
    response = client.responses.create(**greedy([ASKED], max_output_tokens=2))
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    *_, last = client.responses.create(**greedy([ASKED], max_output_tokens=2, stream=True))
    assert last.type == "response.incomplete"


def test_calls_of_tools_are_the_turns_of_a_chat(web: httpx.Client, client: OpenAI) -> None:
    calls = [
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "count", "arguments": '{"of": "circles"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "1", "status": "completed"},
    ]
    response = client.responses.create(**greedy([ASKED, *calls, turn("user", "What colour is the circle?")]))
    call = {"id": "c1", "type": "function", "function": {"name": "count", "arguments": '{"of": "circles"}'}}
    parts = [{"type": "text", "text": "What colour is the circle?"}, {"type": "image_url", "image_url": URL}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "user", "content": "What colour is the circle?"},
    ]
    chat = web.post(PATH, json={"messages": messages, "temperature": 0}).json()
    assert response.output_text == chat["choices"][0]["message"]["content"]
    assert response.usage is not None
    assert response.usage.input_tokens == chat["usage"]["prompt_tokens"]


def test_logprobs_join_to_the_text_streamed_and_not(web: httpx.Client, client: OpenAI) -> None:
    asked = greedy([ASKED], include=["message.output_text.logprobs"], top_logprobs=2)
    (message,) = client.responses.create(**asked).output
    part = message.to_dict()["content"][0]
    assert "".join(each["token"] for each in part["logprobs"]) == part["text"] == RED
    assert all(len(each["top_logprobs"]) == 2 and each["logprob"] <= 0 for each in part["logprobs"])
    events = list(client.responses.create(**asked, stream=True))
    deltas = [each for event in events if event.type == "response.output_text.delta" for each in event.logprobs]
    assert "".join(each.token for each in deltas) == RED
    (done,) = [event for event in events if event.type == "response.output_text.done"]
    assert [each.token for each in done.logprobs] == [each.token for each in deltas]
    assert events[-1].response.output[0].to_dict()["content"][0] == part
    with client.responses.stream(**asked) as stream:
        assert stream.until_done().get_final_response().output_text == RED
    chat = {"messages": [{"role": "user", "content": "Hello"}], "logprobs": True, "top_logprobs": 2, "temperature": 0}
    same = client.responses.create(**(asked | {"input": "Hello"})).output[0].to_dict()["content"][0]["logprobs"]
    assert same == web.post(PATH, json=chat).json()["choices"][0]["logprobs"]["content"]


FUNCTION = {"type": "function", "name": "f", "parameters": {}}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "earlier turns in 'input'"),
        ({"conversation": "conv_1"}, "conversation", "earlier turns in 'input'"),
        ({"store": True}, "store", "leave 'store' out"),
        ({"tools": [FUNCTION]}, "tools", "calls no tools"),
        ({"tool_choice": "required"}, "tool_choice", "calls no tools"),
        ({"background": True}, "background", "leave it out"),
        ({"text": {"format": {"type": "json_schema", "name": "c"}}}, "text.format", "has a schema"),
        ({"text": {"format": {"type": "json_object", "schema": {}}}}, "text.format", "has a schema"),
        ({"text": {"format": {"type": "json_schema", "name": "c", "schema": 3}}}, "text.format", "must be an object"),
        ({"input": "word " * 9000}, "input", "maximum context length"),
        ({"input": [ASKED, turn("user", "What?", BROKEN)]}, "input[1].content[1]", "base64"),
        ({"input": [turn("user", BROKEN)], "instructions": "Be brief."}, "input[0].content[0]", "base64"),
        ({"input": [turn("assistant", PICTURE)], "instructions": "Be brief."}, "input[0]", "stand in input[0],"),
        ({"include": ["file_search_call.results"]}, "include", "leave it out"),
        ({"top_logprobs": 2}, "top_logprobs", "message.output_text.logprobs"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input", "item_reference"),
        ({"input": [{"type": "function_call", "arguments": "{}"}]}, "input[0].tool_calls[0].function.name", "required"),
        ({"input": [{"type": "function_call_output", "output": "3", "volume": 2}]}, "input[0].volume", "leave it out"),
        ({"input": [turn("assistant", PICTURE)]}, "input[0]", "send it in a user message"),
        ({"input": []}, "input", "must not be empty"),
        ({"cache_salt": ""}, "cache_salt", "must not be empty"),
        ({"seed": 2**63}, "seed", "must be below"),
        ({"temperature": 200}, "temperature", "between 0 and 100"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    web: httpx.Client, fields: dict[str, Any], param: str, words: str
) -> None:
    response = web.post("/v1/responses", json={"input": "Hello"} | fields)
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert words in error_of(response)["message"]


def test_what_asks_for_nothing_passes(web: httpx.Client) -> None:
    fields = {
        "store": False,
        "tools": [],
        "tool_choice": "auto",
        "text": {"format": {"type": "text"}},
        "previous_response_id": None,
        "reasoning": None,
        "include": [],
        "truncation": "disabled",
        "metadata": {"who": "me"},
        "parallel_tool_calls": True,
        "max_output_tokens": 2,
    }
    assert web.post("/v1/responses", json={"input": "Hello"} | fields).status_code == 200


def test_a_stream_that_fails_reports_the_error() -> None:
    backend = PacedBackend(fail_at=2, failure=EngineDeadError("The engine has stopped."))
    with app_over(backend) as web:
        stream = official(web).responses.create(model="paced", input="Hello", stream=True)
        with pytest.raises(APIError, match="The engine has stopped"):
            list(stream)
        backend.fail_at = 0
        assert web.post("/v1/responses", json={"input": "Hello", "stream": True}).status_code == 503
