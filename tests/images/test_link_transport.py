"""What fetching a link may take, against servers that do wrong."""

from __future__ import annotations

import gzip
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import trustme

from llava_serve.errors import CapacityError, DeadlineExceededError, InvalidImageError
from llava_serve.images.addresses import Address
from llava_serve.images.links import MAX_PER_HOST
from llava_serve.images.transport import FetchLimits
from support.api_server import wait_until
from support.link_reader import HOST_REFUSED, QUICK, Names, fetch, near, reader, refusal, url_of
from support.picture_server import PICTURE, PictureServer, endless, picture_server, redirect, response, silent

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 50000\r\n\r\n"
NOTHING, LONG = "its server sends nothing for 0.3 seconds", "it takes more than 1 seconds"
LIMITS = {NOTHING: FetchLimits(read_s=0.3), LONG: FetchLimits(read_s=30, total_s=1)}
"""So that a server that hangs reaches one limit alone."""


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (silent, NOTHING),
        (endless(b"HTTP/1.1 200 OK\r\n", b"X", 0.05), LONG),
        (endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.01), LONG),
        (endless(HEAD, b"x", 0.05), LONG),
        (endless(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 1000), "it is over 50,000 bytes"),
        (
            endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"3e8\r\n" + b"x" * 1000 + b"\r\n"),
            "it is over 50,000 bytes",
        ),
        (
            endless(HEAD.replace(b"50000", b"50001"), b"", 0.05),
            "it is over 50,000 bytes",
        ),  # by its head: no byte of it comes
        (endless(b"HTTP/1.1 200 OK\r\n", b"X: 1\r\n" * 100), "its server's answer is no valid HTTP, or is cut off"),
        (response(b"short", length=100), "its server's answer is no valid HTTP, or is cut off"),
        (b"", "its server's answer is no valid HTTP, or is cut off"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "its server's answer is no valid HTTP, or is cut off"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "its server's answer is no valid HTTP, or is cut off"),
        (response(b"x", "Content-Length: 2"), "its server's answer is no valid HTTP, or is cut off"),
        (response(gzip.compress(bytes(1 << 26)), "Content-Encoding: gzip"), "its server sends it compressed"),
        (response(b"x", "content-encoding: br"), "its server sends it compressed"),
        (response(b"x", "Transfer-Encoding: gzip"), "its server's answer is no valid HTTP, or is cut off"),
        (response(b"", status="204 No Content"), "its server answers with status 204"),
        (response(b"secret", status="401 Unauthorized"), "its server answers with status 401"),
        (response(b"secret", status="500 Oops"), "its server answers with status 500"),
        (response(b"", status="302 Found"), "its server answers with status 302"),
        (response(b"", status="101 Switching Protocols"), "its server's answer is no valid HTTP, or is cut off"),
    ],
)
def test_servers_that_do_wrong(server: PictureServer, answer: Any, why: str) -> None:
    server.answers["/wrong"] = answer
    # Those that hang do so for good: without a limit this would not return.
    assert refusal(near(server, limits=LIMITS.get(why), max_bytes=50_000), url_of(server, "/wrong")) == why


def test_a_length_that_is_too_short_cuts(server: PictureServer) -> None:
    """What comes is judged by its bytes, where it is decoded."""
    server.answers["/short"] = response(PICTURE, length=100)
    assert fetch(near(server), url_of(server, "/short")) == PICTURE[:100]


def test_links_of_a_request_share_a_budget(server: PictureServer) -> None:
    limits = FetchLimits(total_bytes=len(PICTURE) * 2)
    urls = [url_of(server, "/a.png"), url_of(server, "/a.png?2"), url_of(server, "/a.png?3")]
    server.answers |= {f"/a.png?{number}": response(PICTURE) for number in (2, 3)}
    links = near(server, limits=limits)
    assert links.fetch(dict.fromkeys(urls[:2], "here"), lambda: None) == dict.fromkeys(urls[:2], PICTURE)
    with pytest.raises(InvalidImageError, match=f"links are over {limits.total_bytes:,} bytes together"):
        links.fetch(dict.fromkeys(urls, "here"), lambda: None)


def test_nobody_listens(server: PictureServer) -> None:
    with picture_server({}) as gone:
        pass
    why = refusal(near(gone), url_of(gone))
    assert why == "its server refuses the connection, or cannot be reached"
    # the next address of a host is tried
    names = Names(two_test=["127.0.0.3", "127.0.0.1"])
    assert fetch(reader(f"two.test:{server.port}", names=names), url_of(server, host="two.test")) == PICTURE


def test_a_name_server_that_does_not_answer() -> None:
    over, answered = threading.Event(), threading.Event()

    def resolve(host: str, port: int) -> list[Address]:
        over.wait(60)
        answered.set()
        return [ip_address("127.0.0.1")]

    assert refusal(reader("pictures.test", names=resolve, limits=QUICK), "http://pictures.test/") == HOST_REFUSED
    assert not answered.is_set()
    over.set()


def test_a_deadline_ends_a_read(server: PictureServer) -> None:
    server.answers["/silent"] = silent
    end = time.monotonic() + 0.3

    def check() -> None:
        if time.monotonic() > end:
            raise DeadlineExceededError("The request's time was up.")

    with pytest.raises(DeadlineExceededError):
        fetch(near(server), url_of(server, "/silent"), check)
    assert server.left.wait(2)


def test_a_slow_host_holds_up_no_other(server: PictureServer) -> None:
    release = threading.Event()

    def slow(connection: Any, over: threading.Event) -> None:
        assert release.wait(20)
        connection.sendall(response(PICTURE))

    server.answers["/slow"] = slow
    names = Names(other_test=["127.0.0.1"])
    links = reader(f"pictures.test:{server.port}", f"other.test:{server.port}", names=names)
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(links, url_of(server, "/slow"))))
        for _ in range(MAX_PER_HOST)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(server.heads) == MAX_PER_HOST)
    assert fetch(links, url_of(server, host="other.test")) == PICTURE
    with pytest.raises(CapacityError, match="try again later"):
        fetch(links, url_of(server))
    threading.Timer(0.3, release.set).start()
    assert fetch(links, url_of(server)) == PICTURE  # waits for its turn
    for thread in threads:
        thread.join()
    assert found == [PICTURE] * MAX_PER_HOST


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> trustme.CA:
    """A certificate authority that this process trusts."""
    made = trustme.CA()
    made.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    return made


@contextmanager
def tls_server(authority: trustme.CA, name: str, answers: dict[str, Any], said: list[Any]) -> Iterator[PictureServer]:
    """Has a certificate for a name, and writes down which name its clients say."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    context.sni_callback = lambda socket, host, context: said.append(host)
    with picture_server(answers, tls=context) as running:
        yield running


def test_tls_is_for_the_name(authority: trustme.CA) -> None:
    said: list[Any] = []
    with tls_server(authority, "pictures.test", {"/a.png": response(PICTURE)}, said) as server:
        names = Names(other_test=["127.0.0.1"], pictures_test_=["127.0.0.1"])
        links = reader(f"pictures.test:{server.port}", f"other.test:{server.port}", names=names)
        assert fetch(links, f"https://pictures.test:{server.port}/a.png") == PICTURE
        assert fetch(links, f"https://pictures.test.:{server.port}/a.png") == PICTURE
        assert said == ["pictures.test", "pictures.test"]
        why = refusal(links, f"https://other.test:{server.port}/a.png")
        assert why == "a TLS connection cannot be made, or its certificate is not valid"
        assert len(server.heads) == 2


def test_tls_is_not_left_by_a_redirect(authority: trustme.CA, server: PictureServer) -> None:
    answers = {"/a.png": redirect(url_of(server))}
    with tls_server(authority, "pictures.test", answers, []) as secure:
        links = reader(f"pictures.test:{server.port}", f"pictures.test:{secure.port}")
        why = refusal(links, f"https://pictures.test:{secure.port}/a.png")
    assert why == "it is redirected from https to http"
    assert server.heads == []


def test_a_certificate_of_nobody(server: PictureServer) -> None:
    with tls_server(trustme.CA(), "pictures.test", {}, []) as secure:
        why = refusal(near(secure), f"https://pictures.test:{secure.port}/a.png")
    assert why == "a TLS connection cannot be made, or its certificate is not valid"
    # one that knows no TLS waits for a request
    assert refusal(near(server, limits=QUICK), f"https://pictures.test:{server.port}/") == "its server does not answer"
