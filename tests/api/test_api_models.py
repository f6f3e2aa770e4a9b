"""The served model's names and limits, probes, and addresses as clients write them."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from openai import NotFoundError

from llava_serve import __version__
from support.api_server import BODY, PATH, PacedBackend, app_over, error_of, official


@pytest.fixture(scope="module")
def web() -> Iterator[httpx.Client]:
    with app_over(PacedBackend(model_name="maker/paced"), aliases=("gpt-4o", "other"), default_max_tokens=9) as web:
        yield web


def test_each_name_of_the_model_is_listed_with_its_limits(web: httpx.Client) -> None:
    listed = official(web).models.list().data
    assert [model.id for model in listed] == ["maker/paced", "gpt-4o", "other"]
    for model in listed:
        fields = model.to_dict()
        assert fields["root"] == "maker/paced"
        assert fields["aliases"] == ["gpt-4o", "other"]
        assert (fields["max_model_len"], fields["max_tokens"], fields["default_max_tokens"]) == (64, 63, 9)
        assert fields["images"] == {"max_per_request": 3, "max_bytes": 1000, "max_pixels": 2000}


@pytest.mark.parametrize(
    ("name", "shown"), [("maker/paced", "maker/paced"), ("paced", "maker/paced"), ("gpt-4o", "gpt-4o")]
)
def test_every_name_is_described_and_answers(web: httpx.Client, name: str, shown: str) -> None:
    client = official(web)
    assert client.models.retrieve(name).id == shown
    completion = client.chat.completions.create(model=name, messages=BODY["messages"])
    assert completion.choices[0].message.content == "A red circle."


def test_the_default_of_the_server_bounds_that_of_an_endpoint() -> None:
    backend = PacedBackend()
    for own, used in ((None, 16), (9, 9), (20, 16)):
        with app_over(backend, default_max_tokens=own) as web:
            assert web.post("/v1/completions", json={"prompt": [1]}).status_code == 200
        assert backend.samplings[-1].max_new_tokens == used


def test_another_name_is_refused(web: httpx.Client) -> None:
    with pytest.raises(NotFoundError):
        official(web).models.retrieve("gpt-5")
    assert web.post(PATH, json=BODY | {"model": "gpt-5"}).status_code == 404
    assert web.post("/tokenize", json={"model": "gpt-5", "prompt": "Hello"}).status_code == 404


@pytest.mark.parametrize("path", ["/", "/health", "/ping", "/version", "/v1/models", "/openapi.json", "/v1/models/"])
def test_head_is_answered_where_get_is(web: httpx.Client, path: str) -> None:
    got, head = web.get(path), web.head(path)
    assert got.status_code == head.status_code == 200
    assert head.content == b""
    assert head.headers["content-type"] == got.headers["content-type"]


def test_probes() -> None:
    with app_over(PacedBackend(), api_keys=("key",)) as web:
        assert web.get("/ping").json() == web.get("/health").json() == {"status": "ok", "model": "paced"}
        assert web.get("/version").status_code == 401
        headers = {"Authorization": "Bearer key"}
        assert web.get("/version", headers=headers).json() == {"version": __version__}


def test_a_final_slash_changes_nothing(web: httpx.Client) -> None:
    answered = web.post(PATH + "/", json=BODY | {"model": "other"})
    assert answered.status_code == 200  # no redirect, which could lose the body
    assert answered.json()["choices"][0]["message"]["content"] == "A red circle."
    assert web.get("/v1/models//").json() == web.get("/v1/models").json()
    assert web.get("/nowhere/").status_code == 404


def test_an_unknown_endpoint_names_those_that_there_are(web: httpx.Client) -> None:
    message = error_of(web.post("/v1/embeddings", json={"input": "Hello"}))["message"]
    assert "/v1/chat/completions" in message
    assert "/tokenize" in message
