"""What a browser's page, an odd client or a broken one sends: over a real socket, each with the status that fits."""

from __future__ import annotations

import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import h11
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
def test_a_refused_request_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture, stream: bool) -> None:
    caplog.set_level(logging.INFO, "llava_serve")
    asked = {"X-Request-ID": "mine"}
    with app_over(PacedBackend()) as web:
        assert web.post(PATH, json=BODY | {"n": 0, "stream": stream}, headers=asked).status_code == 400
        assert web.get("/nowhere", headers=asked).status_code == 404
    seconds = r" seconds=\S+"
    assert [(each.levelno, re.sub(seconds, "", each.getMessage()), each.exc_info) for each in caplog.records] == [
        (
            logging.INFO,
            f"request_id=mine method=POST path={PATH} status=400 outcome=refused reason=invalid_value",
            None,
        ),
        (logging.INFO, "request_id=mine method=GET path=/nowhere status=404 outcome=refused reason=unknown_url", None),
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
        (logging.WARNING, False),
    ]


def head_of(size: int, *, lines: bool) -> bytes:
    """A request with a head of exactly `size` bytes, in many headers or in one long one."""
    start = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    room = size - len(start) - len(b"a: \r\n\r\n")
    filler = b"a: b\r\n" * (room // 6) if lines else b""
    return start + filler + b"a: %b\r\n\r\n" % (b"b" * (room - len(filler)))


@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize(("excess", "status"), [(0, b"200"), (1, b"400")])
def test_the_bound_of_a_head_is_exact(web: httpx.Client, excess: int, status: bytes, lines: bool) -> None:
    head = head_of(http_server.MAX_HEAD_BYTES + excess, lines=lines)
    assert raw(web, head).startswith(b"HTTP/1.1 %b " % status)
    with connected(web) as connection:
        connection.sendall(head[:50_000])
        time.sleep(0.05)
        connection.sendall(head[50_000:])
        assert read(connection).startswith(b"HTTP/1.1 %b " % status)


@pytest.mark.parametrize("lines", [True, False])
def test_a_head_that_arrives_in_one_read_has_the_same_bound(lines: bool) -> None:
    """A client might not see the refusal of the largest ones: their rest arrives at a closed connection."""
    for size in (http_server.MAX_HEAD_BYTES, http_server.MAX_HEAD_BYTES + 1, 100_000, 250_000):
        connection = http_server.StrictConnection(h11.SERVER, http_server.MAX_HEAD_BYTES)
        connection.receive_data(head_of(size, lines=lines) + bytes(9000))
        if size == http_server.MAX_HEAD_BYTES:
            assert isinstance(connection.next_event(), h11.Request)
        else:
            with pytest.raises(h11.RemoteProtocolError):
                connection.next_event()


@pytest.mark.parametrize(
    "lengths",
    [
        (b"Content-Length: 5", b"Transfer-Encoding: chunked"),
        (b"transfer-encoding: Chunked", b"content-length: 0"),
    ],
)
def test_two_lengths_of_a_body_are_refused(web: httpx.Client, lengths: tuple[bytes, bytes]) -> None:
    """What stands behind the shorter one is no request."""
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" % PATH.encode()
    answer = raw(web, head + b"\r\n".join(lengths) + b"\r\n\r\n0\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1


def test_a_head_that_does_not_arrive_in_time_ends_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEAD_TIMEOUT_S", 0.2)
    halves = (b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nConnection: keep-alive\r\na: b")
    with app_over(PacedBackend(pace_s=0.6)) as web:
        for half in halves:
            assert raw(web, half) == b""
        monkeypatch.setattr(http_server, "HEAD_TIMEOUT_S", 1.5)  # what is whole arrives within it
        with connected(web) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert read(connection, b"}").startswith(b"HTTP/1.1 200 ")
            connection.sendall(halves[1])  # the second request of a connection
            assert read(connection) == b""
        # The head's time is not the answer's, which takes longer.
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
