"""Which links of a request are followed, against real servers of this machine and name servers that a test makes up."""

from __future__ import annotations

import asyncio
import random
from ipaddress import ip_address
from pathlib import Path

import pytest

from llava_serve.config import ImageOptions
from llava_serve.images.addresses import Address
from llava_serve.images.links import RequestLinks
from llava_serve.images.transport import system_addresses
from llava_serve.types import Conversation, ImagePart, Message, TextPart
from support.link_reader import HOST_REFUSED, Names, fetch, near, reader, refusal, url_of
from support.picture_server import PICTURE, PictureServer, picture_server, redirect, response


def test_a_link_is_read_with_nothing_of_the_server_in_the_request(
    server: PictureServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login me password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert fetch(near(server), url_of(server, "/a.png#part")) == PICTURE
    [head] = server.heads
    assert head.split("\r\n") == [
        "GET /a.png HTTP/1.1",
        f"Host: pictures.test:{server.port}",
        "User-Agent: llava-serve",
        "Accept: image/*",
        "Accept-Encoding: identity",
        "Connection: close",
        "",
        "",
    ]


def test_the_environments_proxy_is_not_used(server: PictureServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with picture_server({}) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert fetch(near(server), url_of(server)) == PICTURE
        assert proxy.heads == []


def test_a_name_is_resolved_once_and_its_judged_address_connected_to(server: PictureServer) -> None:
    """A name server that answers differently the second time finds nobody who asks."""
    with picture_server({"/a.png": response(b"of the rebound address")}, "127.0.0.2", server.port) as rebound:
        answers = iter([["127.0.0.1"], ["127.0.0.2"]])

        def resolve(host: str, port: int) -> list[Address]:
            return [ip_address(address) for address in next(answers)]

        assert fetch(near(server, names=resolve), url_of(server)) == PICTURE
        assert next(answers) == ["127.0.0.2"]
        assert rebound.heads == []


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["10.0.0.1"],
        ["169.254.169.254"],
        ["::1"],
        ["::ffff:127.0.0.1"],
        ["64:ff9b::127.0.0.1"],
        ["2002:7f00:1::"],
        ["fe80::1%1"],
        ["8.8.8.8", "127.0.0.1"],  # one that is refused refuses all: which is connected to is not left to chance
        ["127.0.0.1", "8.8.8.8"],
        [],
    ],
)
def test_a_public_name_with_a_refused_address(server: PictureServer, addresses: list[str]) -> None:
    names = Names(evil_test=addresses)
    entry = {"host": f"evil.test:{server.port}"}
    assert refusal(reader(entry, names=names), url_of(server, host="evil.test")) == HOST_REFUSED
    public = RequestLinks(ImageOptions(links="public"), names)
    for scheme in ("http", "https"):
        assert refusal(public, f"{scheme}://evil.test/a.png") == HOST_REFUSED
    assert names.asked == ["evil.test"] * 3
    assert server.heads == []


@pytest.mark.parametrize(
    "spelled",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "017700000001",
        "0177.1",
        "127。0。0。1",
        "localhost",
        "LOCALHOST",
    ],
)
def test_odd_spellings_of_this_machine(server: PictureServer, spelled: str) -> None:
    """They mean what the resolver says they mean, and that is judged: without its network the host is refused."""
    host = f"{spelled}:{server.port}"
    networks = {"networks": ["127.0.0.0/8", "::1/128"]}
    assert refusal(reader({"host": host}, names=system_addresses), url_of(server, host=spelled)) == HOST_REFUSED
    assert server.heads == []
    assert fetch(reader({"host": host, **networks}, names=system_addresses), url_of(server, host=spelled)) == PICTURE


THIS_MACHINE = """
127.0.0.1 127.1 2130706433 0x7f.1 017700000001 localhost localhost. 0 0.0.0.0
[::1] [::] [::ffff:127.0.0.1] [::ffff:7f00:1] [fe80::1] [fe80::1%251] [::1%lo] 169.254.169.254 2852039166 10.0.0.1
"""


@pytest.mark.parametrize("host", THIS_MACHINE.split())
def test_public_is_never_private(host: str) -> None:
    public = RequestLinks(ImageOptions(links="public"), system_addresses)
    assert refusal(public, f"http://{host}/a.png") == HOST_REFUSED


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///a.png",
        "http://[::1",
        "http://0177.0.0.1/",
        "http://256.1.1.1/",
        "http://\uff11\uff12\uff17.0.0.1/",
        "http://[::1%\u00fc]/",
        "http://\ud800/",
        "http://pictures.test:port/",
        "http://pictures.test:99999/",
        "http://pictures.test:0/",
        "http://pictures.test\n/",
        "http://pictures.test:80:80/",
        "http://" + "x" * 70_000,
    ],
)
def test_what_is_no_url(url: str) -> None:
    assert refusal(reader("pictures.test"), url) == "it is not a valid URL"


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://me:secret@pictures.test/a.png", "it holds a name or a password"),
        ("http://me@pictures.test/a.png", "it holds a name or a password"),
        ("http://pictures.test@other.test/a.png", "it holds a name or a password"),
        ("http://pictures.test:8080/a.png", HOST_REFUSED),
        ("http://pictures.test:22/a.png", HOST_REFUSED),
        ("http://other.test/a.png", HOST_REFUSED),
        ("http://not.pictures.test/a.png", HOST_REFUSED),
        ("http://pictures.test.other.test/a.png", HOST_REFUSED),
        ("http://pictures.tést/a.png", HOST_REFUSED),
        ("http://%70ictures.test/a.png", HOST_REFUSED),
        ("http://127.0.0.1/a.png", HOST_REFUSED),
    ],
)
def test_what_is_not_listed(url: str, why: str) -> None:
    names = Names()
    assert refusal(reader("pictures.test", names=names), url) == why
    assert names.asked == []


@pytest.mark.parametrize("port", [1, 22, 81, 444, 8080, 65535])
def test_public_has_two_ports(port: int) -> None:
    names = Names(open_test=["8.8.8.8"])
    public = RequestLinks(ImageOptions(links="public"), names)
    assert refusal(public, f"http://open.test:{port}/a.png") == HOST_REFUSED
    assert names.asked == []


def test_a_listed_host_in_any_case_and_script(server: PictureServer) -> None:
    names = Names(**{"xn--bcher-kva_test": ["127.0.0.1"]})
    links = reader(f"BÜCHER.test:{server.port}", f"pictures.test.:{server.port}", names=names)
    assert fetch(links, url_of(server, host="bücher.test")) == PICTURE
    assert fetch(links, url_of(server, host="Pictures.TEST")) == PICTURE


def test_redirects_within_bounds(server: PictureServer) -> None:
    server.answers |= {
        "/1": redirect("/2", "Set-Cookie: a=b"),
        "/2": redirect(url_of(server, "/3"), status="307 Temporary Redirect"),
        "/3": redirect("a.png", status="301 Moved Permanently"),
        "/0": redirect("/1", status="308 Permanent Redirect"),
        "/loop": redirect("/loop"),
    }
    names = Names()
    assert fetch(near(server, names=names), url_of(server, "/1")) == PICTURE
    assert names.asked == ["pictures.test"] * 4  # once for each connection
    assert not any("cookie" in head.lower() for head in server.heads)
    for path in ("/0", "/loop"):
        assert refusal(near(server), url_of(server, path)) == "it is redirected more than 3 times"
    assert len(server.heads) == 4 + 4 + 4


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("http://127.0.0.1:{port}/a.png", HOST_REFUSED),
        ("http://[::1]:{port}/a.png", HOST_REFUSED),
        ("http://localhost:{port}/a.png", HOST_REFUSED),
        ("//other.test:{port}/a.png", HOST_REFUSED),
        ("http://pictures.test:1/a.png", HOST_REFUSED),
        ("http://public.test:{port}/a.png", HOST_REFUSED),  # listed, without networks, and this machine after all
        ("http://169.254.169.254/latest/meta-data/", HOST_REFUSED),
        ("http://me:secret@pictures.test:{port}/a.png", "it holds a name or a password"),
        ("file:///etc/passwd", "it is not a valid URL"),
        ("gopher://pictures.test/", "it is not a valid URL"),
        ("http://pictures.test:99999/", "it is not a valid URL"),
        ("\xff\xfe", "its server answers with status 404"),
        ("data:image/png;base64,aGk=", "it is not a valid URL"),
    ],
)
def test_redirects_are_judged_again(server: PictureServer, target: str, why: str) -> None:
    server.answers["/away"] = redirect(target.format(port=server.port))
    names = Names(other_test=["127.0.0.1"], public_test=["127.0.0.1"])
    links = reader(f"pictures.test:{server.port}", {"host": f"public.test:{server.port}"}, names=names)
    assert refusal(links, url_of(server, "/away")) == why
    assert not any("/a.png" in head for head in server.heads)


PIECES = "http https : / // @ # ? [ ] % %00 %2e .. . \\ xn-- ::1 127.0.0.1 0x7f pictures.test 80 -1"


def test_urls_at_random(server: PictureServer) -> None:
    """Whatever a stranger spells is refused with a sentence, and nothing but ASCII comes to the resolver."""
    draw = random.Random(0)
    pieces = [*PIECES.split(), "\u00fc", "\u3002", "\u2488", "\u202e", "\ud800", "\t", " "]
    names = Names(pictures_test=[])
    public = RequestLinks(ImageOptions(links="public"), names)
    for _ in range(500):
        rest = "".join(draw.choices(pieces, k=draw.randrange(8)))
        refusal(public, draw.choice(["http://", "https://", "HTTP://"]) + rest)
        if "\ud800" not in rest:  # no header holds it
            server.answers["/away"] = redirect(rest.encode().decode("latin-1"))
            assert refusal(near(server), url_of(server, "/away"))
    assert len(set(names.asked)) > 50
    assert len(server.heads) > 400
    assert all(name.isascii() and name.isprintable() for name in names.asked)


def test_a_conversation_keeps_how_its_prompt_is_made(server: PictureServer) -> None:
    message = Message("user", (ImagePart(url_of(server)), TextPart("What is it?")))
    asked = Conversation((message,), add_generation_prompt=False, image_order="as_sent")

    async def read() -> object:
        async with near(server).fetched(asked, lambda: None) as found:
            return found

    expected = Message("user", (ImagePart(PICTURE), TextPart("What is it?")))
    assert asyncio.run(read()) == Conversation((expected,), None, False, "as_sent")
