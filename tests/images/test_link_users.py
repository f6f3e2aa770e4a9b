"""Who follows links: the picture tier, the web app, the library, the command line; and the option that opens them."""

from __future__ import annotations

import asyncio
import re
import time
from functools import partial
from typing import Any

import httpx
import pytest

from llava_serve.api.app import create_app
from llava_serve.api.in_process import InProcessBackend
from llava_serve.async_llm import AsyncLLM
from llava_serve.checkpoints import open_checkpoint
from llava_serve.cli import main
from llava_serve.config import ApiOptions, EngineOptions, ImageOptions
from llava_serve.errors import DeadlineExceededError, InvalidImageError
from llava_serve.images.fetch import read_local_source
from llava_serve.images.links import RequestLinks
from llava_serve.processor import Processor
from llava_serve.threaded_processor import ThreadedProcessor
from llava_serve.types import ImagePart, Message, TextPart
from support.api_server import PATH, error_of, serving, wait_until
from support.link_reader import HOST_REFUSED, url_of
from support.picture_server import PICTURE, PictureServer, picture_server, redirect, response, silent


def asked(*urls: str) -> list[Message]:
    return [Message("user", (*(ImagePart(url) for url in urls), TextPart("What is it?")))]


def tier(server: PictureServer, **options: Any) -> ThreadedProcessor:
    """A picture replica with one thread to decode, which asks this machine's resolver."""
    entry = {"host": f"localhost:{server.port}", "networks": ["127.0.0.0/8", "::1/128"]}
    images = ImageOptions.model_validate({"links": [entry], **options})
    return ThreadedProcessor(Processor(open_checkpoint("builtin", weights=False), images), 1)


async def test_the_picture_tier_follows_links(server: PictureServer) -> None:
    server.answers["/page"] = response(b"<html>", "Content-Type: image/png")
    processor, url = tier(server, max_per_request=2), partial(url_of, server, host="localhost")
    linked = await processor.prepare(lambda: asked(url(), url()))
    sent = await processor.prepare(lambda: [Message("user", (*(ImagePart(PICTURE),) * 2, TextPart("What is it?")))])
    assert linked.digests == sent.digests
    assert len(server.heads) == 1  # the same link is read once
    with pytest.raises(InvalidImageError, match="an HTML page"):
        await processor.prepare(lambda: asked(url("/page")))
    for source in ("file:///etc/passwd", "ftp://localhost/a.png", "/etc/passwd"):
        with pytest.raises(InvalidImageError, match="as a data: URL, or as an http: or https: link"):
            await processor.prepare(partial(asked, source))
    with pytest.raises(InvalidImageError, match="at most 2"):
        await processor.prepare(lambda: asked(url(), url("/b"), url("/c")))
    with pytest.raises(InvalidImageError, match="status 404") as caught:
        await processor.prepare(lambda: asked(url(), url("/b")))
    assert caught.value.param == "messages[0].content[1]"


async def test_links_share_the_bytes_of_a_request(server: PictureServer) -> None:
    server.answers["/b"] = server.answers["/c"] = response(PICTURE)
    processor, url = tier(server, max_total_bytes=2 * len(PICTURE) - 1), partial(url_of, server, host="localhost")
    assert (await processor.prepare(lambda: asked(url("/b")))).tiles
    with pytest.raises(InvalidImageError, match="link cannot be followed") as caught:
        await processor.prepare(lambda: asked(url("/b"), url("/c")))
    assert caught.value.param == "messages[0].content[1]"


async def test_a_slow_link_holds_up_no_decoding_and_ends_with_its_request(server: PictureServer) -> None:
    server.answers["/silent"] = silent
    processor, url = tier(server), url_of(server, "/silent", "localhost")
    slow = [asyncio.ensure_future(processor.prepare(lambda: asked(url))) for _ in range(3)]
    await asyncio.to_thread(wait_until, lambda: len(server.heads) == 3)
    async with asyncio.timeout(5):
        await processor.prepare(lambda: [Message("user", (ImagePart(PICTURE), TextPart("What is it?")))])
    assert not any(each.done() for each in slow)
    for each in slow:
        each.cancel()
    assert await asyncio.to_thread(server.left.wait, 2)  # the client has gone, and its connection goes
    with pytest.raises(DeadlineExceededError):
        await processor.prepare(lambda: asked(url), deadline=time.time() + 0.3)


@pytest.mark.parametrize("mode", ["off", "listed"])
def test_links_over_http(server: PictureServer, mode: str) -> None:
    """The whole way: the web app, the picture tier's thread, the model that ships."""
    entry = {"host": f"localhost:{server.port}", "networks": ["127.0.0.0/8", "::1/128"]}
    options = ImageOptions.model_validate({"links": [entry] if mode == "listed" else "off"})
    llm = AsyncLLM("builtin", EngineOptions(num_threads=1), image_options=options)

    def ask(url: str) -> httpx.Response:
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "What colour is the circle?"},
        ]
        body = {"model": "builtin", "temperature": 0, "messages": [{"role": "user", "content": parts}]}
        return httpx.post(web + PATH, json=body, timeout=60)

    try:
        with serving(create_app(InProcessBackend(llm), ApiOptions())) as web:
            answer = ask(url_of(server, host="localhost"))
            if mode == "off":
                assert answer.status_code == 400
                assert error_of(answer)["message"].endswith("data: URL; links are not accepted by this server.")
                assert server.heads == []
                return
            assert answer.json()["choices"][0]["message"]["content"] == "The circle is red."
            refused = ask(url_of(server))
            assert refused.status_code == 400
            assert error_of(refused)["param"] == "messages[0].content[0]"
            assert HOST_REFUSED in error_of(refused)["message"]
    finally:
        llm.close()


def test_the_librarys_own_user_reads_any_link(server: PictureServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers |= {"/to": redirect("/a.png"), "/big": response(b"x" * 11_000)}
    options = ImageOptions(max_bytes=10_000)
    assert read_local_source(url_of(server, "/to", "127.0.0.1"), options) == PICTURE
    assert read_local_source(f"http://me:s%40cret@127.0.0.1:{server.port}/a.png", options) == PICTURE
    assert "Authorization: Basic bWU6c0BjcmV0\r\n" in server.heads[-1]
    with picture_server({}) as gone:
        pass
    for url, cause in (
        (url_of(server, "/absent", "127.0.0.1"), "its server answers with status 404"),
        (url_of(server, "/big", "127.0.0.1"), "it is over 10,000 bytes"),
        (url_of(gone, host="127.0.0.1"), "its server refuses the connection, or cannot be reached"),
        ("http://picture.invalid/a.png", "its host is not known"),
        ("https://[::1", "it is not a valid URL"),
    ):
        with pytest.raises(InvalidImageError, match=re.escape(f"The picture at {url} cannot be fetched: {cause}.")):
            read_local_source(url, options)


def test_the_librarys_own_user_may_have_a_proxy(server: PictureServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with picture_server({"http://pictures.test/a.png": response(PICTURE)}) as proxy:
        monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{proxy.port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert read_local_source("http://pictures.test/a.png", ImageOptions()) == PICTURE
        assert "Proxy-Authorization: Basic bWU6c2VjcmV0\r\n" in proxy.heads[0]
        assert read_local_source(url_of(server, host="127.0.0.1"), ImageOptions()) == PICTURE
        assert len(proxy.heads) == 1
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1")
    with pytest.raises(InvalidImageError, match="names is no HTTP proxy"):
        read_local_source("http://pictures.test/a.png", ImageOptions())


def test_the_command_line_tells_the_cause(server: PictureServer, capsys: pytest.CaptureFixture[str]) -> None:
    url = url_of(server, "/absent", "127.0.0.1")
    assert main(["ask", "--image", url, "What is it?"]) == 2
    assert capsys.readouterr().err == (
        f"llava-serve: The picture at {url} cannot be fetched: its server answers with status 404.\n"
    )


GOOD_CONFIGS: list[Any] = [
    "off",
    False,
    "public",
    [],
    ["images.example.org"],
    ["images.example.org:8443", "10.0.0.5:9000", "[::1]:80", "BÜCHER.example", "minio"],
    [{"host": "minio.internal", "networks": ["10.0.0.0/8", "fd00::/8"]}],
]
BAD_CONFIGS: list[Any] = [
    "on",
    True,
    "images.example.org",
    ["http://images.example.org"],
    ["images.example.org/path"],
    ["images.example.org?x"],
    ["me@images.example.org"],
    ["images.example.org:port"],
    ["*.example.org:x"],
    [""],
    [{"host": "minio.internal", "network": ["10.0.0.0/8"]}],
    [{"host": "minio.internal", "networks": ["10.0.0.1/8"]}],
    [{"host": "minio.internal", "networks": "10.0.0.0/8"}],
    [{"networks": ["10.0.0.0/8"]}],
    [["a"]],
]


@pytest.mark.parametrize("links", GOOD_CONFIGS, ids=str)
def test_configs(links: Any) -> None:
    options = ImageOptions.model_validate({"links": links})
    assert (options.links == "off") == (links in ("off", False))
    RequestLinks(options)


@pytest.mark.parametrize("links", BAD_CONFIGS, ids=str)
def test_typos_in_configs(links: Any) -> None:
    with pytest.raises(ValueError, match="links"):
        ImageOptions.model_validate({"links": links})
