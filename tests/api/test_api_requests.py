"""What the web app accepts, and what it refuses: by name, in OpenAI's shape, over a real socket."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from llava_serve.types import Conversation, ImagePart, Message, TextPart
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
    {"top_k": -1},
    {"seed": -1, "max_tokens": -1, "n_predict": -1},
    {"min_p": 0, "typical_p": 1.0, "best_of": 1, "mirostat": 0, "repeat_penalty": 1},
    {"max_tokens": 64.0, "n": 1.0, "seed": 3.0, "top_logprobs": 0.0},
    {"stop": ""},
    {"stop": ["", "\n"]},
    {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
    {"functions": [{"name": "f"}], "function_call": "none"},
    {"skip_special_tokens": True, "detokenize": True, "spaces_between_special_tokens": False},
    {"something_new": False, "something_else": {}, "and_more": [], "and_this": ""},
    {"add_generation_prompt": True, "continue_final_message": False, "return_token_ids": False},
    {"chat_template_kwargs": {"enable_thinking": False, "tools": None}},
    {"session_id": "s", "cache_prompt": False, "keep_alive": "5m"},
    {"stop_token_ids": [], "logit_bias": {}, "min_tokens": 0, "include_stop_str_in_output": False},
    {"stream_options": {"include_usage": False, "continuous_usage_stats": False}},
    {"messages": [{**QUESTION, "id": "m1", "cache_control": {"type": "ephemeral"}}]},
    {"messages": [{"role": "user", "content": [{**PICTURE, "uuid": "u", "modalities": "image"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,", "detail": "auto"}]}]},
    {"messages": [{"role": "user", "content": [{**PICTURE, "image_url": {"url": "data:,", "format": "png"}}]}]},
]


@pytest.mark.parametrize("fields", NEUTRAL, ids=lambda fields: ",".join(fields))
def test_a_field_at_its_neutral_value_is_accepted(web: httpx.Client, fields: dict[str, Any]) -> None:
    response = ask(web, **fields)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == "A red circle."


ASKING: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tools": [{"type": "function"}], "tool_choice": "auto"}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"skip_special_tokens": False}, "skip_special_tokens"),
    ({"typical_p": True}, "typical_p"),
    ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
    ({"echo": True}, "echo"),
    ({"something_new": 0}, "something_new"),
    ({"response_format": {"type": "json_object", "name": "a"}}, "response_format.name"),
    ({"structured_outputs": {"regex": "a", "structural_tag": "b"}}, "structured_outputs.structural_tag"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
    ({"store": True}, "store"),
    ({"store": 0}, "store"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"temprature": 0}, "temprature"),
    ({"stream": True, "stream_options": {"interval": 5}}, "stream_options.interval"),
    ({"messages": [{**QUESTION, "reasoning_content": "1"}]}, "messages[0].reasoning_content"),
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
    ({"messages": [{"content": "x"}]}, "messages[0].role", "'messages[0].role' is required."),
    ({"messages": [{**QUESTION, "name": 5}]}, "messages[0].name", "'messages[0].name' must be a string."),
    (
        {"messages": [{"role": "user", "content": [{**PICTURE, "image_url": {"url": "data:,", "detail": "more"}}]}]},
        "messages[0].content[0].image_url.detail",
        "'messages[0].content[0].image_url.detail' must be one of 'auto', 'low', 'high' or 'original'.",
    ),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "'messages[0].content' must be a list."),
    ({"temperature": "hot"}, "temperature", "'temperature' must be a number."),
    ({"temperature": -1}, "temperature", "temperature must be between 0 and 100; got -1.0."),
    ({"top_p": -0.1}, "top_p", "top_p must be above 0 and at most 1; got -0.1."),
    ({"min_p": 2}, "min_p", "min_p must be between 0 and 1; got 2.0."),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "min_tokens must be at most the longest answer; got 9."),
    ({"logit_bias": {"a": 1}}, "logit_bias", "The keys of logit_bias must be token ids."),
    (
        {"logit_bias": {"1": 101}},
        "logit_bias",
        "logit_bias must be numbers within 100 by token id; got {1: 101.0}.",
    ),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "stop_token_ids must be a tuple of token ids; got (-1,)."),
    (
        {"request_id": "a b"},
        "request_id",
        "request_id must be 1 to 128 letters, digits and marks out of _ . : / + = @ -.",
    ),
    ({"max_tokens": 0}, "max_tokens", "'max_tokens' must be 1 or more."),
    ({"max_tokens": 1.5}, "max_tokens", "'max_tokens' must be an integer."),
    ({"n": True}, "n", "'n' must be an integer."),
    ({"stop": ["a", 5]}, "stop[1]", "'stop[1]' must be a string."),
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
        {"messages": [{"role": "robot", "content": "x"}]},
        "messages[0].role",
        "'messages[0].role' must be one of 'system', 'developer', 'user', 'assistant', 'tool' or 'function'.",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "messages[0].content[0].type",
        "'messages[0].content[0].type' must be one of 'text', 'input_text', 'output_text', 'image_url', 'input_image' "
        "or 'image'.",
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
    assert error["message"].endswith("send it in a user message.")


def test_flags_of_a_conversation_reach_the_library(web: httpx.Client, backend: PacedBackend) -> None:
    assert ask(web, continue_final_message=False, add_generation_prompt=False).status_code == 200
    asked = backend.asked[-1][0]
    assert isinstance(asked, Conversation)
    assert (asked.continue_final_message, asked.add_generation_prompt) == (False, False)
    with app_over(backend, image_order="as_sent") as sent:
        assert ask(sent).status_code == 200
    asked = backend.asked[-1][0]
    assert isinstance(asked, Conversation)
    assert asked.image_order == "as_sent"
    assert tuple(asked) == (Message("user", (TextPart("What is it?"),)),)


def test_unknown_fields_are_ignored_and_named_where_the_operator_wants_so(
    backend: PacedBackend, caplog: pytest.LogCaptureFixture
) -> None:
    fields = {"verbosity": "low", "new\u00e9": 5, "messages": [{**QUESTION, "mood": "good"}]}
    with app_over(backend, unknown_fields="ignore") as web:
        for stream in (False, True):
            response = ask(web, **fields, stream=stream)
            assert response.status_code == 200
            notes = response.headers["x-llava-serve-notes"]
            assert notes == r"verbosity: ignored; new\xe9: ignored; messages[0].mood: ignored"
        assert "x-llava-serve-notes" not in ask(web).headers
        assert ask(web, tools=[{"type": "function"}]).status_code == 400
    logged = [record.getMessage() for record in caplog.records if "not supported and ignored" in record.getMessage()]
    assert len(logged) == 3


def test_a_picture_of_a_tool_that_is_shown_elsewhere_is_noted(web: httpx.Client, backend: PacedBackend) -> None:
    tool = {"role": "tool", "tool_call_id": "1", "content": [PICTURE]}
    response = ask(web, messages=[QUESTION, tool, QUESTION])
    assert response.headers["x-llava-serve-notes"] == (
        "messages[1]: pictures of a tool are shown in the next message of the user"
    )
    assert backend.asked[-1][0][2].parts == (ImagePart("data:image/png;base64,AAAA"), TextPart("What is it?"))


def test_a_long_note_is_cut(backend: PacedBackend) -> None:
    with app_over(backend, unknown_fields="ignore") as web:
        response = ask(web, **{f"field_{number}": "x" for number in range(500)})
    assert response.status_code == 200
    assert len(response.headers["x-llava-serve-notes"]) == 1000


def test_ids_of_tokens_and_of_the_completion_are_returned_on_request(web: httpx.Client) -> None:
    whole = ask(web, return_token_ids=True, request_id="job-7").json()
    assert whole["id"] == "chatcmpl-job-7"
    assert whole["prompt_token_ids"] == list(range(7))
    assert whole["choices"][0]["token_ids"] == [0, 1, 2]
    raw = ask(web, return_token_ids=True, stream=True).text.split("\n\n")[:-2]
    events = [json.loads(line.removeprefix("data: ")) for line in raw]
    assert [event.get("prompt_token_ids") for event in events] == [list(range(7)), None, None]
    assert [event["choices"][0]["token_ids"] for event in events] == [[0], [1], [2]]
    assert "token_ids" not in ask(web).json()["choices"][0]


def test_every_event_has_the_usage_on_request(web: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    raw = ask(web, stream=True, stream_options=options).text.split("\n\n")[:-2]
    events = [json.loads(line.removeprefix("data: ")) for line in raw]
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 3]


def test_an_answer_may_go_on_to_the_end_of_the_context_or_to_the_operators_limit(
    web: httpx.Client, backend: PacedBackend
) -> None:
    assert ask(web).status_code == 200
    assert backend.samplings[-1].max_new_tokens >= 1 << 30
    assert web.get("/v1/models").json()["data"][0]["default_max_tokens"] is None
    with app_over(backend, default_max_tokens=70) as limited:
        assert ask(limited).status_code == 200
        assert backend.samplings[-1].max_new_tokens == 70
        assert ask(limited, max_tokens=90).status_code == 200
        assert backend.samplings[-1].max_new_tokens == 90
        assert limited.get("/v1/models").json()["data"][0]["default_max_tokens"] == 70


def test_the_smallest_top_p_is_greedy(web: httpx.Client, backend: PacedBackend) -> None:
    assert ask(web, top_p=0, temperature=0.9).status_code == 200
    assert backend.samplings[-1].greedy


def test_the_model_may_be_left_out(web: httpx.Client) -> None:
    assert web.post("/v1/chat/completions", json={"messages": [QUESTION]}).json()["model"] == "paced"


def test_sampling_reaches_the_library(web: httpx.Client, backend: PacedBackend) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 3, "n": 2, "presence_penalty": 1}
    ours = {"frequency_penalty": -1, "repetition_penalty": 1.5, "ignore_eos": True}
    assert ask(web, **fields, **ours, stop="\n", max_tokens=9, logprobs=True, top_logprobs=4).status_code == 200
    sampling = backend.samplings[-1]
    for name, value in (fields | ours).items():
        assert getattr(sampling, name) == value
    assert (sampling.stop, sampling.max_new_tokens, sampling.logprobs) == (("\n",), 9, 4)
    new = {"min_p": 0.1, "min_tokens": 3, "include_stop_str_in_output": True}
    assert ask(web, **new, stop_token_ids=[5, 6], logit_bias={"7": -3}).status_code == 200
    sampling = backend.samplings[-1]
    for name, value in new.items():
        assert getattr(sampling, name) == value
    assert (sampling.stop_token_ids, sampling.logit_bias) == ((5, 6), {7: -3})


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
