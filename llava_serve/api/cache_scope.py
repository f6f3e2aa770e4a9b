"""Which requests share what is cached of them: all, or those with the same API key, and with the same salt."""

from __future__ import annotations

from hashlib import blake2b

from llava_serve.config import CacheScope


def cache_salt(scope: CacheScope, client: str | None, given: str | None) -> str:
    """The salt of a request's caches; empty where it shares with all others.

    Args:
        scope: with `key`, no salt that another key sends gives the same.
        client: the name of the request's API key; None where it has none.
        given: by the request.
    """
    parts = (client if scope == "key" else None, given)
    return "" if parts == (None, None) else blake2b(repr(parts).encode(), digest_size=16).hexdigest()
