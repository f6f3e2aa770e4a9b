"""`/v1/completions` over the model that ships, by the official client."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai import OpenAI

from support.api_server import error_of

ASKED = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def chat(web: httpx.Client) -> dict[str, Any]:
    """A chat completion, and its prompt's ids."""
    body = {"messages": ASKED, "temperature": 0, "max_tokens": 16, "return_token_ids": True}
    reported: dict[str, Any] = web.post("/v1/chat/completions", json=body).json()
    return reported


def greedy(prompt: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "builtin", "prompt": prompt, "temperature": 0} | fields


def test_the_prompt_of_a_chat_gets_its_answer(client: OpenAI, chat: dict[str, Any]) -> None:
    ids = chat["prompt_token_ids"]
    for prompt in (ids, [ids]):
        completion = client.completions.create(**greedy(prompt))
        assert completion.object == "text_completion"
        assert completion.id.startswith("cmpl-")
        assert completion.choices[0].text.strip() == chat["choices"][0]["message"]["content"]
        assert completion.choices[0].finish_reason == chat["choices"][0]["finish_reason"]
        assert completion.usage is not None
        assert completion.usage.prompt_tokens == len(ids)


def test_a_text_gets_no_template(web: httpx.Client, client: OpenAI) -> None:
    tokens = web.post("/tokenize", json={"prompt": "The circle is"}).json()["tokens"]
    whole = client.completions.create(**greedy("The circle is", max_tokens=5))
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(tokens)
    same = client.completions.create(**greedy(["The circle is"], max_tokens=5))
    assert same.choices[0].text == client.completions.create(**greedy(tokens, max_tokens=5)).choices[0].text
    assert same.choices[0].text == whole.choices[0].text


def test_a_stream_is_the_answer_in_pieces(client: OpenAI) -> None:
    asked = greedy("The circle is", n=2, seed=3, max_tokens=12) | {"temperature": 0.8}
    whole = client.completions.create(**asked)
    events = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert events[-1].usage == whole.usage
    for choice in whole.choices:
        pieces = [each for event in events for each in event.choices if each.index == choice.index]
        assert "".join(each.text for each in pieces) == choice.text
        assert pieces[-1].finish_reason == choice.finish_reason


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_in_the_legacy_form(client: OpenAI, stream: bool) -> None:
    asked = greedy("The circle is", logprobs=2, max_tokens=6, stream=stream)
    events = list(client.completions.create(**asked)) if stream else [client.completions.create(**asked)]
    choices = [event.choices[0] for event in events]
    text = "".join(choice.text for choice in choices)
    reported = [choice.logprobs for choice in choices if choice.logprobs is not None]
    tokens = [token for each in reported for token in each.tokens or ()]
    offsets = [offset for each in reported for offset in each.text_offset or ()]
    logprobs = [logprob for each in reported for logprob in each.token_logprobs or ()]
    top = [alternatives for each in reported for alternatives in each.top_logprobs or ()]
    assert "".join(tokens) == text
    assert [text[at : at + len(token)] for token, at in zip(tokens, offsets, strict=True)] == tokens
    assert len(logprobs) == len(top) == len(tokens) > 0
    assert [max(each.values()) for each in top] == pytest.approx(logprobs)  # greedy


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [-200]}, "prompt"),
        ({"prompt": "word " * 9000}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "num_beams": 2, "temperature": 0}, "prompt_logprobs"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"messages": ASKED}, "messages"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(web: httpx.Client, fields: dict[str, Any], param: str) -> None:
    response = web.post("/v1/completions", json={"prompt": "Hi"} | fields)
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert error_of(response)["message"].count(param) == 1


def test_what_asks_for_nothing_passes(web: httpx.Client) -> None:
    fields = {"echo": False, "suffix": None, "best_of": 1, "logprobs": None, "user": "me", "max_tokens": 2}
    assert web.post("/v1/completions", json={"prompt": "Hi"} | fields).status_code == 200
