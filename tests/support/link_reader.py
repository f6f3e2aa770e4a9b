"""What tests of links share: name servers that a test makes up, and links into this machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from typing import Any

import pytest

from llava_serve.config import ImageOptions
from llava_serve.errors import InvalidImageError
from llava_serve.images.addresses import Address
from llava_serve.images.links import RequestLinks
from llava_serve.images.transport import FetchLimits, Resolver
from support.picture_server import PictureServer

QUICK = FetchLimits(connect_s=0.5, read_s=0.3, total_s=1)
HOST_REFUSED = "its host is unknown here, or not one that this server reads from"


class Names:
    """A name server: `pictures.test` is this machine, and so is what else a test says.

    Attributes:
        asked: the names that were asked for.
    """

    def __init__(self, **more: Sequence[str]) -> None:
        self.asked: list[str] = []
        self._addresses = {"pictures.test": ["127.0.0.1"], **{name.replace("_", "."): more[name] for name in more}}

    def __call__(self, host: str, port: int) -> list[Address]:
        self.asked.append(host)
        if host not in self._addresses:
            raise OSError("no such name")
        return [ip_address(address) for address in self._addresses[host]]


def reader(
    *hosts: Any, names: Resolver | None = None, limits: FetchLimits | None = None, **options: Any
) -> RequestLinks:
    """Of links to some hosts, which may all lie on this machine."""
    entries = [host if isinstance(host, dict) else {"host": host, "networks": ["127.0.0.0/8"]} for host in hosts]
    return RequestLinks(ImageOptions.model_validate({"links": entries, **options}), names or Names(), limits)


def fetch(links: RequestLinks, url: str, check: Callable[[], None] = lambda: None) -> bytes:
    return links.fetch({url: "messages[0].content[1]"}, check)[url]


def refusal(links: RequestLinks, url: str) -> str:
    """Why a link is refused; in a sentence that names the part, what to do, and nothing about where the server is."""
    with pytest.raises(InvalidImageError) as caught:
        fetch(links, url)
    assert caught.value.param == "messages[0].content[1]"
    found = re.fullmatch(
        r"The picture's link cannot be followed: (.+)\. Send the picture itself, as a data: URL\.", str(caught.value)
    )
    assert found is not None
    assert not re.search(r"\d+\.\d+\.\d|test|Errno|Error|://", found[1])
    return found[1]


def url_of(server: PictureServer, path: str = "/a.png", host: str = "pictures.test") -> str:
    return f"http://{host}:{server.port}{path}"


def near(server: PictureServer, **arguments: Any) -> RequestLinks:
    """Of links to one server, by its name."""
    return reader(f"pictures.test:{server.port}", **arguments)
