"""Requests as clients really send them, over the model that ships: what is asked for is answered, and rightly."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import pytest

from support.api_server import PATH, error_of
from support.demo import DEMO_IMAGE, data_url

PNG = DEMO_IMAGE.read_bytes()
URL = data_url(PNG)
PICTURE = {"type": "image_url", "image_url": {"url": URL}}
WORDS = {"type": "text", "text": "What colour is the circle?"}
ASKED = {"role": "user", "content": [PICTURE, WORDS]}
ANSWERED = {"role": "assistant", "content": "The circle is red."}
SQUARE = {"role": "user", "content": "What colour is the square?"}
RED, BLUE = "The circle is red.", "The square is blue."


def answer(web: httpx.Client, messages: list[Any], **fields: Any) -> dict[str, Any]:
    """The choice of a greedy answer."""
    response = web.post(PATH, json={"messages": messages, "temperature": 0} | fields)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def about(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


SHAPES: dict[str, tuple[list[Any], str]] = {
    "an answer that is null": ([ASKED, {"role": "assistant", "content": None}, SQUARE | {"content": [WORDS]}], RED),
    "an answer without content": ([ASKED, {"role": "assistant"}, {"role": "user", "content": [WORDS]}], RED),
    "an answer of no parts": ([ASKED, {"role": "assistant", "content": []}, {"role": "user", "content": [WORDS]}], RED),
    "two system messages": (
        [{"role": "system", "content": "Be brief."}, {"role": "developer", "content": "Be exact."}, ASKED],
        RED,
    ),
    "a later system message": ([ASKED, ANSWERED, {"role": "system", "content": "Be brief."}, SQUARE], BLUE),
    "the assistant first": ([{"role": "assistant", "content": "Hello."}, ASKED], RED),
    "a history of tools": (
        [
            ASKED,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "3"},
            SQUARE,
        ],
        BLUE,
    ),
    "an answer that is a refusal": (
        [ASKED, {"role": "assistant", "content": [{"type": "refusal", "refusal": "I will not say."}]}, SQUARE],
        BLUE,
    ),
    "a text as it is in a list": (about(PICTURE, WORDS["text"]), RED),
    "the text first": (about(WORDS, PICTURE), RED),
    "image_url as a text": (about({"type": "image_url", "image_url": URL}, WORDS), RED),
    "input_image": (
        about(
            {"type": "input_image", "image_url": URL, "detail": "auto"}, {"type": "input_text", "text": WORDS["text"]}
        ),
        RED,
    ),
    "image": (about({"type": "image", "image": URL}, WORDS), RED),
    "white space around the URL": (about({"type": "image_url", "image_url": {"url": f" {URL}\n"}}, WORDS), RED),
    "base64 without padding": (about({"type": "image_url", "image_url": URL.rstrip("=")}, WORDS), RED),
    "URL-safe base64": (
        about(
            {
                "type": "image_url",
                "image_url": URL.replace("+", "-").replace("/", "_").replace("data:image_png", "data:image/png"),
            },
            WORDS,
        ),
        RED,
    ),
    "base64 with line breaks": (
        about({"type": "image_url", "image_url": "data:image/png;base64," + base64.encodebytes(PNG).decode()}, WORDS),
        RED,
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_conversation_is_answered_in_every_shape(web: httpx.Client, name: str) -> None:
    messages, expected = SHAPES[name]
    assert answer(web, messages)["message"]["content"] == expected


@pytest.mark.parametrize(
    "fields",
    [{}, {"continue_final_message": True, "add_generation_prompt": False}, {"messages": [{"prefix": True}]}],
    ids=["order alone", "flags", "prefix"],
)
def test_an_answer_goes_on_from_the_assistants_last_message(web: httpx.Client, fields: dict[str, Any]) -> None:
    begun = {"role": "assistant", "content": "The circle is"} | fields.get("messages", [{}])[0]
    rest = {name: value for name, value in fields.items() if name != "messages"}
    assert answer(web, [ASKED, begun], **rest)["message"]["content"] == " red."
    stream = web.post(PATH, json={"messages": [ASKED, begun], "temperature": 0, "stream": True} | rest).text
    assert '"content":" red' in stream


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (about({"type": "image_url", "image_url": base64.b64encode(PNG).decode()}, WORDS), "data:image/png;base64,"),
        ([ASKED, ANSWERED, {"role": "user", "content": ""}], "The user's message is empty."),
        ([ASKED, {"role": "assistant", "content": [PICTURE]}, SQUARE], "send it in a user message"),
        ([ASKED, ANSWERED] * 16 + [ASKED], "has 17 images, those of earlier turns included"),
        ([{"role": "system", "content": "Hello"}], "no message of the user"),
        ([{"role": "user", "content": "word " * 9000}], "maximum context length is 2048 tokens"),
    ],
    ids=["raw base64", "empty", "a picture of the assistant", "history counts", "no question", "too long"],
)
def test_what_cannot_be_answered_is_said_with_the_way_out(web: httpx.Client, messages: list[Any], words: str) -> None:
    response = web.post(PATH, json={"messages": messages})
    assert response.status_code == 400
    message = error_of(response)["message"]
    assert words in message
    assert len(message) < 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fields",
    [{}, {"stop": "red"}, {"stop": "cle i"}, {"max_tokens": 3}, {"temperature": 2, "seed": 5, "max_tokens": 30}],
)
def test_the_tokens_of_logprobs_join_to_the_content(web: httpx.Client, stream: bool, fields: dict[str, Any]) -> None:
    asked = {"messages": [ASKED], "temperature": 0, "logprobs": True, "top_logprobs": 1, "stream": stream} | fields
    response = web.post(PATH, json=asked)
    if stream:
        lines = [line.removeprefix("data: ") for line in response.text.split("\n\n")[:-2]]
        choices = [json.loads(line)["choices"][0] for line in lines]
        content = "".join(choice["delta"].get("content", "") for choice in choices)
    else:
        choices = response.json()["choices"]
        content = choices[0]["message"]["content"]
    tokens = [token for choice in choices for token in choice["logprobs"]["content"]]
    assert content
    assert "".join(token["token"] for token in tokens) == content
    assert bytes(byte for token in tokens for byte in token["bytes"]).decode() == content


def test_a_bias_and_the_least_length_are_obeyed(web: httpx.Client) -> None:
    reported = answer(web, [ASKED], return_token_ids=True)
    red, end = reported["token_ids"][-3], reported["token_ids"][-1]
    assert "red" not in answer(web, [ASKED], logit_bias={str(red): -100})["message"]["content"]
    longer = answer(web, [ASKED], return_token_ids=True, min_tokens=15, max_tokens=20)["token_ids"]
    assert len(longer) >= 15
    assert end not in longer[:14]
