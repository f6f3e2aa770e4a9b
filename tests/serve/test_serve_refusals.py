"""A bad request is refused with a sentence and the right status, and affects no other request."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Callable
from typing import Any

import openai
import pytest

from support.cluster import serve_logs
from support.demo import DEMO_ANSWER, DEMO_IMAGE, DEMO_QUESTION, question


def ask(client: Any, messages: list[dict[str, Any]], **fields: Any) -> Any:
    return client.chat.completions.create(model="builtin", messages=messages, temperature=0, max_tokens=20, **fields)


def test_data_that_is_no_picture_is_refused_and_the_next_request_is_answered(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        ask(client, question(DEMO_QUESTION, b"not a picture"))
    body = refusal.value.body
    assert isinstance(body, dict)
    assert body["code"] == "invalid_image"
    assert body["message"].startswith("The data is plain text; send the image in one of PNG")
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


@pytest.mark.parametrize("stream", [False, True])
def test_a_clients_mistake_is_one_line_in_the_log_of_each_tier_that_refuses_it(
    client: Any, served: Any, stream: bool, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    tiers = ("Ingress", "ImagePreprocessor", "LlavaModel")
    before = {file: len(file.read_text()) for file in serve_logs(served)}

    def logged() -> dict[str, str]:
        """What each tier has written since."""
        files = {tier: serve_logs(served, f"replica_llava_{tier}_*.log") for tier in tiers}
        return {tier: "".join(each.read_text()[before.get(each, 0) :] for each in own) for tier, own in files.items()}

    expected: dict[str, list[str]] = {tier: [] for tier in tiers}
    for tier, messages, fields, code in (
        ("ImagePreprocessor", question(DEMO_QUESTION, b"not a picture"), {}, "invalid_image"),
        ("LlavaModel", question("Hello"), {"num_beams": 64}, "invalid_value"),
        ("Ingress", question("Hello"), {"top_p": 2}, "invalid_value"),
    ):
        request_id = f"{tier}-{stream}"
        with pytest.raises(openai.BadRequestError) as refusal:
            ask(client, messages, stream=stream, extra_body=fields, extra_headers={"X-Request-ID": request_id})
        assert refusal.value.code == code
        if tier != "Ingress":
            expected[tier].append(f"{request_id} -- Refused: 400 {code}.")
        expected["Ingress"].append(f"request_id={request_id} method=POST path=/v1/chat/completions status=400")
    wait_until(lambda: all(line in logged()[tier] for tier, lines in expected.items() for line in lines))
    for tier, text in logged().items():
        refused = [line for line in text.splitlines() if ": 400 " in line or "status=400" in line]
        assert len(refused) == len(expected[tier])
        assert all("INFO" in line for line in refused)
        assert not any(mark in text for mark in ("ERROR", "Traceback")), text
        assert not any("WARNING" in line and f"-{stream}" in line for line in text.splitlines()), text


def test_a_refused_picture_is_named(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        ask(client, question(DEMO_QUESTION, DEMO_IMAGE.read_bytes(), b"not a picture"))
    assert refusal.value.param == "messages[0].content[1]"


def test_a_request_id_that_is_not_utf_8_is_replaced(served: Any) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    for path in (b"/health", b"/nowhere", b"/-/routes"):
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            head = b"GET %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-ID: a\xffb\r\n\r\n"
            connection.sendall(head % path)
            answer = b""
            while block := connection.recv(65536):
                answer += block
        assert answer.startswith(b"HTTP/1.1 404 " if path == b"/nowhere" else b"HTTP/1.1 200 ")
        assert b"a\xffb" not in answer


@pytest.mark.parametrize("framing", ["length", "chunked", "none"])
def test_a_body_that_the_proxy_loses_is_refused_with_the_reason(served: Any, framing: str) -> None:
    """Serve's proxy drops the body of a request that offers HTTP/2."""
    host, port = served.url.removeprefix("http://").split(":")
    body = json.dumps({"model": "builtin", "messages": question("Hello"), "max_tokens": 2}).encode()
    sent = {
        "length": b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n" % len(body),
        "chunked": b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n",
        "none": b"GET /health HTTP/1.1\r\n",
    }[framing]
    sent += b"Host: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nContent-Type: application/json\r\n\r\n"
    sent += {"length": body, "chunked": b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body), "none": b""}[framing]
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(sent)
        answer = b""
        while not answer.endswith(b"}") and (block := connection.recv(65536)):  # of the JSON; the connection stays open
            answer += block
    if framing == "none":
        assert answer.startswith(b"HTTP/1.1 200 ")
    else:
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"plain HTTP/1.1" in answer
