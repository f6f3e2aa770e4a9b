"""What a browser's page, an odd client or a broken one sends: over a real socket, each with the status that fits."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from llava_serve.api import http_server
from llava_serve.errors import EngineDeadError
from support.api_server import BODY, PATH, PacedBackend, app_over, error_of

PICTURE = {"type": "image_url", "image_url": "data:,"}
OTHER_PICTURE = {"type": "image", "image": "data:,"}
TEXT = {"type": "text", "text": "Hi"}


@pytest.fixture(scope="module")
def web() -> Iterator[httpx.Client]:
    with app_over(PacedBackend()) as web:
        yield web


def connected(web: httpx.Client) -> socket.socket:
    return socket.create_connection((web.base_url.host, web.base_url.port or 80), timeout=10)


def read(connection: socket.socket, until: bytes | None = None) -> bytes:
    """What the server sends, up to some bytes or to the connection's end."""
    answer = b""
    while (until is None or until not in answer) and (block := connection.recv(65536)):
        answer += block
    return answer


def raw(web: httpx.Client, request: bytes, until: bytes | None = None) -> bytes:
    with connected(web) as connection:
        connection.sendall(request)
        return read(connection, until)


JSON_BODY = json.dumps(BODY).encode()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # a client that names no type
        ({"Content-Type": "application/json"}, 200),
        ({"Content-Type": "Application/JSON; charset=utf-8", "Origin": "http://page"}, 200),
        ({"Content-Type": "application/problem+json"}, 200),
        ({"Content-Type": "application/json", "Content-Encoding": "identity"}, 200),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "text/plain; application/json"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Origin": "http://page"}, 415),  # a page can send a Blob without a type
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
    ],
)
def test_a_body_is_declared_as_json(web: httpx.Client, headers: dict[str, str], status: int) -> None:
    response = web.post(PATH, content=JSON_BODY, headers=headers)
    assert response.status_code == status
    if status == 415:
        error = error_of(response)
        assert error["code"] == "unsupported_media_type"
        assert "Content-" in error["message"]


@pytest.mark.parametrize("path", ["/health", "/nowhere", "/"])
@pytest.mark.parametrize("given", [b"a\xffb", b"\xc3\x28", b"a b", b"", b"x" * 200])
def test_a_request_id_that_is_none_is_replaced(web: httpx.Client, path: str, given: bytes) -> None:
    head = b"GET %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-ID: %b\r\n\r\n" % (path.encode(), given)
    answer = raw(web, head)
    assert answer.startswith(b"HTTP/1.1 404 " if path == "/nowhere" else b"HTTP/1.1 200 ")
    [returned] = [line[14:] for line in answer.split(b"\r\n") if line.lower().startswith(b"x-request-id: ")]
    assert returned.isalnum()


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/v1/models/paced", "/openapi.json", "/nowhere", PATH])
def test_head_is_answered_as_get_without_its_body(web: httpx.Client, path: str) -> None:
    whole, head = web.get(path), web.head(path)
    assert head.status_code == whole.status_code
    assert head.headers["content-length"] == whole.headers["content-length"]
    assert head.content == b""


def test_what_a_message_repeats_of_a_request_is_cut(web: httpx.Client) -> None:
    long = "x" * 20_000
    for response in (
        web.post(PATH, json=BODY | {"model": long}),
        web.post(PATH, json=BODY | {long: 1}),
        web.post(PATH, content=JSON_BODY, headers={"Content-Type": long}),
        web.post(PATH, content=JSON_BODY, headers={"Content-Encoding": long}),
        web.request(long, PATH),
        web.get(f"/{long}"),
        web.get(f"/v1/models/{long}"),
    ):
        error = error_of(response)
        assert 400 <= response.status_code < 500
        assert max(len(error["message"]), len(error["param"] or "")) < 300


@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_request_is_one_line_in_the_log(
    web: httpx.Client, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    caplog.set_level(logging.INFO, "llava_serve")
    asked = {"X-Request-ID": "mine"}
    assert web.post(PATH, json=BODY | {"n": 0, "stream": stream}, headers=asked).status_code == 400
    assert web.get("/nowhere", headers=asked).status_code == 404
    assert [(each.levelno, each.getMessage(), each.exc_info) for each in caplog.records] == [
        (logging.INFO, "Request mine: 400 invalid_value.", None),
        (logging.INFO, "Request mine: 404 unknown_url.", None),
    ]


def test_what_the_server_cannot_do_is_a_warning_and_the_unforeseen_has_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = PacedBackend(fail_at=0)
    with app_over(backend) as web:
        for backend.failure in (EngineDeadError("It has stopped."), KeyError("unforeseen")):
            assert web.post(PATH, json=BODY).status_code >= 500
    assert [(each.levelno, each.exc_info is not None) for each in caplog.records if each.name.startswith("llava")] == [
        (logging.WARNING, False),
        (logging.ERROR, True),
    ]


def test_a_head_that_is_too_large_is_refused(web: httpx.Client) -> None:
    head = b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * (http_server.MAX_HEAD_BYTES // 6)
    assert raw(web, head).startswith(b"HTTP/1.1 400 ")
    assert web.get("/health").status_code == 200


def test_a_head_that_does_not_arrive_in_time_ends_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEAD_TIMEOUT_S", 0.2)
    halves = (b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nConnection: keep-alive\r\na: b")
    with app_over(PacedBackend(pace_s=0.2)) as web:
        for half in halves:
            assert raw(web, half) == b""
        with connected(web) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert read(connection, b"}").startswith(b"HTTP/1.1 200 ")
            connection.sendall(halves[1])  # the second request of a connection
            assert read(connection) == b""
        # The head's time is not the answer's, which takes three times as long.
        assert web.post(PATH, json=BODY).json()["choices"][0]["message"]["content"] == "A red circle."


def test_many_half_sent_requests_do_not_hinder_another(web: httpx.Client) -> None:
    with ExitStack() as connections:
        for _ in range(500):
            connections.enter_context(connected(web)).sendall(b"GET /health HT")
        assert web.get("/health", timeout=5).status_code == 200


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_request_that_offers_http_2_keeps_its_body(web: httpx.Client, framing: str) -> None:
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n" % PATH.encode()
    head += b"HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\nContent-Type: application/json\r\n"
    if framing == "length":
        sent = head + b"Content-Length: %d\r\n\r\n%b" % (len(JSON_BODY), JSON_BODY)
    else:
        sent = head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(JSON_BODY), JSON_BODY)
    answer = raw(web, sent, b"A red circle.")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"A red circle." in answer
