"""All around a chat completion: API keys, body sizes, request ids, other endpoints, the API's own description."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator

import httpx
import pytest
from openai import AuthenticationError

from support.api_server import PATH, PacedBackend, app_over, error_of, official


@pytest.fixture(scope="module")
def web() -> Iterator[httpx.Client]:
    with app_over(PacedBackend(), max_body_bytes=100_000) as web:
        yield web


def test_models_are_listed_for_the_official_client(web: httpx.Client) -> None:
    client = official(web)
    assert [model.id for model in client.models.list()] == ["paced"]
    assert client.models.retrieve("paced").owned_by == "llava-serve"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/v2", 404, "unknown_url"), ("GET", "/v1/chat/completions", 405, "method_not_allowed")],
)
def test_an_unknown_endpoint_is_answered_in_openais_shape(
    web: httpx.Client, method: str, path: str, status: int, code: str
) -> None:
    response = web.request(method, path)
    assert response.status_code == status
    assert error_of(response)["code"] == code


def test_a_large_body_is_refused_by_its_declared_length(web: httpx.Client) -> None:
    """The answer comes before any byte of the body is sent."""
    with socket.create_connection((web.base_url.host, web.base_url.port), timeout=5) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100001\r\n\r\n")
        answer = client.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"request_too_large" in answer


def test_a_large_body_is_refused_by_its_bytes(web: httpx.Client) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(11):
            yield b" " * 10_000

    response = web.post("/v1/chat/completions", content=pieces())
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"


def test_keys_are_required_where_they_are_configured() -> None:
    with app_over(PacedBackend(), api_keys=("one", "zwei-ü")) as web:
        for header in ({}, {"Authorization": "Bearer two"}, {"Authorization": "one"}, {"Authorization": "Basic one"}):
            for response in (web.get("/v1/models", headers=header), web.post(PATH, headers=header), web.get("/v2")):
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
                assert error_of(response)["code"] == "invalid_api_key"
        with pytest.raises(AuthenticationError):
            official(web).models.list()
        for key in ("one", "zwei-ü"):
            encoded = {b"Authorization": f"Bearer {key}".encode()}
            assert web.get("/v1/models", headers=encoded).status_code == 200
        for path in ("/health", "/", "/openapi.json"):
            assert web.get(path).status_code == 200


@pytest.mark.parametrize(("given", "kept"), [("trace-1", True), ("a b", False), ("x" * 200, False)])
def test_a_request_id_is_kept_if_it_is_one_and_returned(web: httpx.Client, given: str, kept: bool) -> None:
    for path in ("/health", "/nowhere"):
        returned = web.get(path, headers={"X-Request-ID": given}).headers.get_list("x-request-id")
        assert len(returned) == 1
        assert returned[0]
        assert (returned[0] == given) == kept


def test_the_api_describes_itself(web: httpx.Client) -> None:
    description = web.get("/openapi.json").json()
    chat = description["paths"]["/v1/chat/completions"]["post"]
    assert chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatRequest")
    schemas = description["components"]["schemas"]
    assert {"model", "messages", "max_tokens", "conv_mode"} <= set(schemas["ChatRequest"]["properties"])
    text = json.dumps(description)
    named = set(re.findall(r"#/components/schemas/([^\"]+)", text))
    assert named
    assert named <= set(schemas)
