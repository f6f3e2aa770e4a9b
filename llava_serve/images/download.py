"""A link to the bytes behind it, over HTTP. Which hosts and addresses are visited, its caller says."""

from __future__ import annotations

import base64
import ssl
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from urllib.parse import unquote_to_bytes
from urllib.request import getproxies, proxy_bypass

import httpcore2
from httpx2 import URL, InvalidURL, Proxy

from llava_serve.images.addresses import Address
from llava_serve.images.transport import BoundedBackend, Budget, FetchError, Resolver, system_addresses

Visit = Callable[[URL, Budget], AbstractContextManager[Callable[[Address], bool]]]
"""Entered for each URL, redirects too, while it is read: raises for one that is refused, and gives what judges the
addresses of its host."""

MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_CAUSES: dict[type[Exception], str] = {
    httpcore2.ConnectTimeout: "its server does not answer",
    httpcore2.ConnectError: "its server refuses the connection, or cannot be reached",
    httpcore2.ReadError: "the connection breaks",
    httpcore2.WriteError: "the connection breaks",
    httpcore2.WriteTimeout: "its server does not answer",
    httpcore2.ProtocolError: "its server's answer is no valid HTTP, or is cut off",
    httpcore2.ProxyError: "the proxy refuses it",
}


def is_link(source: object) -> bool:
    """Whether a picture is named by an `http:` or `https:` URL."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


class Downloader:
    """Fetches over HTTP/1.1, a connection for each request: no cookies, no netrc, nothing kept. For several threads.

    Args:
        visit: judges each URL; None visits all, as a browser would, through the proxy that the environment names.
        resolve: names to addresses.
    """

    def __init__(self, visit: Visit | None = None, resolve: Resolver = system_addresses) -> None:
        self._visit = visit or (lambda url, budget: nullcontext(lambda address: True))
        self._use_proxy = visit is None
        self._resolve = resolve

    def fetch(self, link: str, max_bytes: int, budget: Budget) -> bytes:
        """The bytes behind a link, whatever type its server says they have.

        Raises:
            FetchError: there are none, or too many; the time is up; a redirect is refused.
        """
        url = _parse(link)
        for _ in range(1 + MAX_REDIRECTS):
            with self._visit(url, budget) as permits:
                found = self._get(url, max_bytes, budget, permits)
            if isinstance(found, bytes):
                return found
            if url.scheme == "https" and found.scheme == "http":
                raise FetchError("it is redirected from https to http")
            url = found
        raise FetchError(f"it is redirected more than {MAX_REDIRECTS} times")

    def _get(self, url: URL, max_bytes: int, budget: Budget, permits: Callable[[Address], bool]) -> bytes | URL:
        """The body, or where the server sends us."""
        backend = BoundedBackend(budget, self._resolve, permits)
        proxy = _proxy(url) if self._use_proxy else None
        context = self._ssl_context if url.scheme == "https" else None
        extensions = {"sni_hostname": url.raw_host.decode("ascii").rstrip(".")}
        try:
            with (
                httpcore2.ConnectionPool(context, proxy, network_backend=backend) as connections,
                connections.stream("GET", _core_url(url), headers=_headers(url), extensions=extensions) as response,
            ):
                headers = {name.lower(): value for name, value in response.headers}
                if response.status in _REDIRECTS and b"location" in headers:
                    return _parse(headers[b"location"].decode("latin-1"), url)
                if response.status != 200:
                    raise FetchError(f"its server answers with status {response.status}")
                # Identity was asked for. A body that is compressed all the same might be a bomb, and is not unpacked.
                if headers.get(b"content-encoding", b"identity").lower() != b"identity":
                    raise FetchError("its server sends it compressed")
                return _read_body(response, int(headers.get(b"content-length", 0)), max_bytes, budget)
        except tuple(_CAUSES) as error:
            if any(isinstance(cause, ssl.SSLError) for cause in error.args):
                raise FetchError("a TLS connection cannot be made, or its certificate is not valid") from error
            raise FetchError(next(cause for kind, cause in _CAUSES.items() if isinstance(error, kind))) from error

    @cached_property
    def _ssl_context(self) -> ssl.SSLContext:
        return httpcore2.default_ssl_context()


def _parse(link: str, base: URL | None = None) -> URL:
    """The one place where a link is taken apart."""
    try:
        url = URL(link) if base is None else base.join(link)
        if url.scheme in ("http", "https") and url.raw_host and 0 < port_of(url) < 1 << 16:
            return url
    except (InvalidURL, ValueError):  # the latter for lone surrogates, and hosts that have no ASCII form
        pass
    raise FetchError("it is not a valid URL")


def port_of(url: URL) -> int:
    """The port, also where the URL leaves it out."""
    return url.port if url.port is not None else {"http": 80, "https": 443}[url.scheme]


def _headers(url: URL) -> list[tuple[bytes, bytes]]:
    headers = [
        (b"Host", url.netloc),
        (b"User-Agent", b"llava-serve"),
        (b"Accept", b"image/*"),
        (b"Accept-Encoding", b"identity"),
        (b"Connection", b"close"),
    ]
    if url.userinfo:
        headers.append((b"Authorization", b"Basic " + base64.b64encode(unquote_to_bytes(url.userinfo))))
    return headers


def _core_url(url: URL) -> httpcore2.URL:
    return httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)


def _proxy(url: URL) -> httpcore2.Proxy | None:
    """The proxy that the environment names for a URL."""
    proxies = getproxies()
    named = proxies.get(url.scheme) or proxies.get("all")
    if not named or proxy_bypass(f"{url.host}:{port_of(url)}"):
        return None
    try:
        proxy = Proxy(named if "://" in named else f"http://{named}")
    except (InvalidURL, ValueError):
        proxy = None
    if proxy is None or proxy.url.scheme not in ("http", "https"):
        raise FetchError("the proxy that the environment names is no HTTP proxy")
    return httpcore2.Proxy(_core_url(proxy.url), auth=proxy.raw_auth)


def _read_body(response: httpcore2.Response, declared: int, max_bytes: int, budget: Budget) -> bytes:
    def check(size: int) -> None:
        if size > max_bytes:
            raise FetchError(f"it is over {max_bytes:,} bytes")
        if size > budget.bytes_left:
            raise FetchError(f"the request's links are over {budget.limits.total_bytes:,} bytes together")

    check(declared)
    data = bytearray()
    for block in response.iter_stream():
        data += block
        check(len(data))
    budget.bytes_left -= len(data)
    return bytes(data)
