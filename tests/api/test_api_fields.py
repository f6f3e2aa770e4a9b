"""What a request's fields and messages become: in the library, and in the answer."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import httpx
import pytest

from llava_serve.types import Conversation, ImagePart, Message, TextPart
from support.api_server import BODY, PATH, PICTURE, QUESTION, PacedBackend, app_over, ask_paced, error_of


@pytest.fixture(scope="module")
def backend() -> PacedBackend:
    return PacedBackend()


@pytest.fixture(scope="module")
def web(backend: PacedBackend) -> Iterator[httpx.Client]:
    with app_over(backend, default_timeout_s=50, max_timeout_s=70) as web:
        yield web


def test_messages_reach_the_library_as_they_were_written(web: httpx.Client, backend: PacedBackend) -> None:
    text = {"type": "text", "text": "and <image> this?"}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "What is"}, PICTURE, text, PICTURE]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
        QUESTION,
    ]
    assert ask_paced(web, messages=messages, conv_mode="plain").status_code == 200
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
    response = ask_paced(web, messages=[{"role": role, "content": [text, PICTURE]}, QUESTION])
    error = error_of(response)
    assert error["code"] == "unsupported_parameter"
    assert error["param"] == "messages[0]"
    assert error["message"].endswith("send it in a user message.")


def test_flags_of_a_conversation_reach_the_library(web: httpx.Client, backend: PacedBackend) -> None:
    assert ask_paced(web, continue_final_message=False, add_generation_prompt=False).status_code == 200
    asked = backend.asked[-1][0]
    assert isinstance(asked, Conversation)
    assert (asked.continue_final_message, asked.add_generation_prompt) == (False, False)
    with app_over(backend, image_order="as_sent") as sent:
        assert ask_paced(sent).status_code == 200
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
            response = ask_paced(web, **fields, stream=stream)
            assert response.status_code == 200
            notes = response.headers["x-llava-serve-notes"]
            assert notes == r"verbosity: ignored; new\xe9: ignored; messages[0].mood: ignored"
        assert "x-llava-serve-notes" not in ask_paced(web).headers
        assert ask_paced(web, tools=[{"type": "function"}]).status_code == 400
    logged = [record.getMessage() for record in caplog.records if "not supported and ignored" in record.getMessage()]
    assert len(logged) == 3


def test_a_picture_of_a_tool_that_is_shown_elsewhere_is_noted(web: httpx.Client, backend: PacedBackend) -> None:
    tool = {"role": "tool", "tool_call_id": "1", "content": [PICTURE]}
    response = ask_paced(web, messages=[QUESTION, tool, QUESTION])
    assert response.headers["x-llava-serve-notes"] == (
        "messages[1]: pictures of a tool are shown in the next message of the user"
    )
    assert backend.asked[-1][0][2].parts == (ImagePart("data:image/png;base64,AAAA"), TextPart("What is it?"))


def test_a_long_note_is_cut(backend: PacedBackend) -> None:
    with app_over(backend, unknown_fields="ignore") as web:
        response = ask_paced(web, **{f"field_{number}": "x" for number in range(500)})
    assert response.status_code == 200
    assert len(response.headers["x-llava-serve-notes"]) == 1000


def test_ids_of_tokens_and_of_the_completion_are_returned_on_request(web: httpx.Client) -> None:
    whole = ask_paced(web, return_token_ids=True, request_id="job-7").json()
    assert whole["id"] == "chatcmpl-job-7"
    assert whole["prompt_token_ids"] == list(range(7))
    assert whole["choices"][0]["token_ids"] == [0, 1, 2]
    raw = ask_paced(web, return_token_ids=True, stream=True).text.split("\n\n")[:-2]
    events = [json.loads(line.removeprefix("data: ")) for line in raw]
    assert [event.get("prompt_token_ids") for event in events] == [list(range(7)), None, None]
    assert [event["choices"][0]["token_ids"] for event in events] == [[0], [1], [2]]
    assert "token_ids" not in ask_paced(web).json()["choices"][0]


def test_every_event_has_the_usage_on_request(web: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    raw = ask_paced(web, stream=True, stream_options=options).text.split("\n\n")[:-2]
    events = [json.loads(line.removeprefix("data: ")) for line in raw]
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 3]


def test_an_answer_may_go_on_to_the_end_of_the_context_or_to_the_operators_limit(
    web: httpx.Client, backend: PacedBackend
) -> None:
    assert ask_paced(web).status_code == 200
    assert backend.samplings[-1].max_new_tokens >= 1 << 30
    assert web.get("/v1/models").json()["data"][0]["default_max_tokens"] is None
    with app_over(backend, default_max_tokens=70) as limited:
        assert ask_paced(limited).status_code == 200
        assert backend.samplings[-1].max_new_tokens == 70
        assert ask_paced(limited, max_tokens=90).status_code == 200
        assert backend.samplings[-1].max_new_tokens == 90
        assert limited.get("/v1/models").json()["data"][0]["default_max_tokens"] == 70


def test_the_smallest_top_p_is_greedy(web: httpx.Client, backend: PacedBackend) -> None:
    assert ask_paced(web, top_p=0, temperature=0.9).status_code == 200
    assert backend.samplings[-1].greedy


def test_both_names_of_the_longest_answer_may_say_the_same(web: httpx.Client, backend: PacedBackend) -> None:
    assert ask_paced(web, max_tokens=5, max_completion_tokens=5).status_code == 200
    assert backend.samplings[-1].max_new_tokens == 5


def test_a_body_may_begin_with_a_byte_order_mark(web: httpx.Client) -> None:
    assert web.post(PATH, content=b"\xef\xbb\xbf" + json.dumps(BODY).encode()).status_code == 200


def test_the_model_may_be_left_out(web: httpx.Client) -> None:
    for absent in ({}, {"model": None}, {"model": ""}):
        assert web.post("/v1/chat/completions", json={"messages": [QUESTION]} | absent).json()["model"] == "paced"


def test_sampling_reaches_the_library(web: httpx.Client, backend: PacedBackend) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 3, "n": 2, "presence_penalty": 1}
    ours = {"frequency_penalty": -1, "repetition_penalty": 1.5, "ignore_eos": True}
    assert ask_paced(web, **fields, **ours, stop="\n", max_tokens=9, logprobs=True, top_logprobs=4).status_code == 200
    sampling = backend.samplings[-1]
    for name, value in (fields | ours).items():
        assert getattr(sampling, name) == value
    assert (sampling.stop, sampling.max_new_tokens, sampling.logprobs) == (("\n",), 9, 4)
    new = {"min_p": 0.1, "min_tokens": 3, "include_stop_str_in_output": True}
    assert ask_paced(web, **new, stop_token_ids=[5, 6], logit_bias={"7": -3}).status_code == 200
    sampling = backend.samplings[-1]
    for name, value in new.items():
        assert getattr(sampling, name) == value
    assert (sampling.stop_token_ids, sampling.logit_bias) == ((5, 6), {7: -3})


@pytest.mark.parametrize(("asked", "given"), [(None, 50), (20, 20), (500, 70)])
def test_a_request_has_its_timeout_within_the_servers_limits(
    web: httpx.Client, backend: PacedBackend, asked: float | None, given: float
) -> None:
    now = time.time()
    assert ask_paced(web, timeout=asked).status_code == 200
    assert 0 <= backend.deadlines[-1] - now - given < 5


def test_an_unknown_model_is_not_found(web: httpx.Client) -> None:
    for response in (ask_paced(web, model="gpt-9"), web.get("/v1/models/org/gpt-9")):
        assert response.status_code == 404
        error = error_of(response)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
