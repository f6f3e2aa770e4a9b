"""Links to pictures in requests: which are followed, and the reason that a caller gets for those that are not."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial

from httpx2 import URL

from llava_serve.config import ImageOptions, LinkHost
from llava_serve.errors import CapacityError, InvalidImageError
from llava_serve.images.addresses import Address, may_connect
from llava_serve.images.download import Downloader, is_link, port_of
from llava_serve.images.transport import Budget, Check, FetchError, FetchLimits, HostError, Resolver, system_addresses
from llava_serve.types import Asked, Conversation, ImagePart, Query, RawPrompt, TextPart

MAX_REQUESTS = 8
"""Requests whose links are fetched, or whose fetched pictures wait to be decoded, at once: it bounds memory, too."""
MAX_PER_HOST = 4
"""Of them, those that wait for one host: a slow one leaves room for the others."""
_PATIENCE_S = 2
"""How long a request waits for its turn at a host."""

Permit = Callable[[Address], bool]


class LinkPolicy:
    """Which hosts links may name, and which addresses these may have.

    Args:
        links: `ImageOptions.links`.
    """

    def __init__(self, links: str | Sequence[LinkHost]) -> None:
        self._public = links == "public"
        self._hosts = [] if isinstance(links, str) else [(URL(f"//{entry.host}"), entry.networks) for entry in links]
        self._busy: Counter[str] = Counter()
        self._freed = threading.Condition()

    @contextmanager
    def visit(self, url: URL, budget: Budget) -> Iterator[Permit]:
        """What judges the addresses of a URL's host, which counts as busy meanwhile.

        Raises:
            FetchError: the URL is refused by what it says.
            CapacityError: the host is busy, and stays so.
        """
        if url.userinfo:
            raise FetchError("it holds a name or a password")
        permit = self._permit(url)
        host = _name(url)
        end = time.monotonic() + _PATIENCE_S
        with self._freed:
            while self._busy[host] >= MAX_PER_HOST:
                if time.monotonic() >= end:
                    raise CapacityError(
                        "Too many pictures are fetched from one host at this time; try again later.", reason="link_host"
                    )
                self._freed.wait(budget.seconds(0.25))
            self._busy[host] += 1
        try:
            yield permit
        finally:
            with self._freed:
                self._busy[host] -= 1
                self._busy += Counter()  # drops what is zero
                self._freed.notify_all()

    def _permit(self, url: URL) -> Permit:
        if self._public and port_of(url) in (80, 443):
            return may_connect
        for entry, networks in self._hosts:
            ports = (80, 443) if entry.port is None else (entry.port,)
            if _name(entry) == _name(url) and port_of(url) in ports:
                return partial(may_connect, networks=networks)
        raise HostError


def _name(url: URL) -> str:
    return url.raw_host.decode("ascii").lower().rstrip(".")


class RequestLinks:
    """Fetches the pictures that a request links to, in threads of its own: a slow host holds up no decoding.

    Args:
        options: `links` and limits of pictures.
        resolve: names to addresses.
        limits: of fetching; None takes the defaults, and the bytes that a request's pictures may take.
    """

    def __init__(
        self, options: ImageOptions, resolve: Resolver = system_addresses, limits: FetchLimits | None = None
    ) -> None:
        self._options = options
        self._limits = limits or FetchLimits(total_bytes=options.max_total_bytes)
        self._downloader = Downloader(LinkPolicy(options.links).visit, resolve)
        self._slots = asyncio.Semaphore(MAX_REQUESTS)
        self._threads = ThreadPoolExecutor(MAX_REQUESTS, thread_name_prefix="links")

    @asynccontextmanager
    async def fetched(self, asked: Asked, check: Check) -> AsyncIterator[Asked]:
        """What is asked, with the pictures in the place of links. They count as held until the context is left.

        Args:
            asked: of a stranger.
            check: asked in every step; what it raises ends the work.

        Raises:
            InvalidImageError: a link cannot or may not be followed; `param` names the part.
            CapacityError: too many links lead to one host at this time.
        """
        images = dict(_images(asked))
        links: dict[str, str] = {}
        for place, image in images.items():
            if is_link(image.source):
                links.setdefault(str(image.source), place)
        # A request with too many pictures is refused by their count, before any link is followed.
        if not links or len(images) > self._options.max_per_request:
            yield asked
            return
        async with self._slots:
            found = await asyncio.get_running_loop().run_in_executor(self._threads, self.fetch, links, check)
            yield _with_bytes(asked, found)

    def fetch(self, links: Mapping[str, str], check: Check) -> dict[str | bytes, bytes]:
        """The bytes behind each link, one after the other, within one budget.

        Args:
            links: where each stands in the request, as `param` names it.
            check: asked in every step.

        Raises:
            InvalidImageError, CapacityError: as `fetched`.
        """
        budget = Budget(self._limits, check)
        found: dict[str | bytes, bytes] = {}
        for link, param in links.items():
            try:
                found[link] = self._downloader.fetch(link, self._options.max_bytes, budget)
            except HostError as error:
                # One sentence for all: else it would tell which names there are on the server's network.
                raise _refusal("its host is unknown here, or not one that this server reads from", param) from error
            except FetchError as error:
                raise _refusal(str(error), param) from error
        return found


def _refusal(cause: str, param: str) -> InvalidImageError:
    return InvalidImageError(
        f"The picture's link cannot be followed: {cause}. Send the picture itself, as a data: URL.", param
    )


def _images(asked: Asked) -> Iterator[tuple[str, ImagePart]]:
    """The pictures of a request, each with the place where it stands."""
    if isinstance(asked, Query):
        yield from ((f"images[{number}]", image) for number, image in enumerate(asked.images))
    if isinstance(asked, Query | RawPrompt):
        return
    for number, message in enumerate(asked):
        for place, part in enumerate(message.parts):
            if isinstance(part, ImagePart):
                yield f"messages[{number}].content[{place}]", part


def _with_bytes(asked: Asked, found: Mapping[str | bytes, bytes]) -> Asked:
    if isinstance(asked, RawPrompt):
        return asked

    def read(part: TextPart | ImagePart) -> TextPart | ImagePart:
        return ImagePart(found.get(part.source, part.source)) if isinstance(part, ImagePart) else part

    if isinstance(asked, Query):
        return replace(asked, images=tuple(ImagePart(found.get(each.source, each.source)) for each in asked.images))
    messages = tuple(replace(message, parts=tuple(read(part) for part in message.parts)) for message in asked)
    return replace(asked, messages=messages) if isinstance(asked, Conversation) else messages
