"""Which requests share what is cached of them: all, or those with the same API key, and with the same salt."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from llava_serve.config import CacheScope
from llava_serve.errors import RequestError


def check_cache_scope(scope: CacheScope, keys: Sequence[object]) -> None:
    """Raises `RequestError` for a scope by key on a server without keys: it would keep nothing apart."""
    if scope == "key" and not keys:
        raise RequestError("api.cache_scope is key, and there are no API keys: set some, or cache_scope: shared.")


def cache_salt(scope: CacheScope, key: str | None, given: str | None) -> str:
    """The salt of a request's caches; empty where it shares with all others.

    Args:
        scope: with `key`, no salt that another key sends gives the same.
        key: identifies the request's API key; None where it has none.
        given: by the request.
    """
    parts = (key if scope == "key" else None, given)
    return "" if parts == (None, None) else blake2b(repr(parts).encode(), digest_size=16).hexdigest()
