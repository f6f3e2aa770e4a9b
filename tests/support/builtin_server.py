"""The web app on a real socket, with the model that ships."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from llava_serve.api.app import create_app
from llava_serve.api.in_process import InProcessBackend
from llava_serve.async_llm import AsyncLLM
from llava_serve.config import ApiOptions, EngineOptions
from support.api_server import serving


@contextmanager
def builtin_llm() -> Iterator[AsyncLLM]:
    """The model that ships."""
    llm = AsyncLLM("builtin", EngineOptions(kv_cache_bytes=64 << 20, num_threads=1))
    try:
        yield llm
    finally:
        llm.close()


@contextmanager
def llm_over_http(llm: AsyncLLM) -> Iterator[httpx.Client]:
    """A client of a server with this model."""
    with serving(create_app(InProcessBackend(llm), ApiOptions())) as url, httpx.Client(base_url=url, timeout=60) as web:
        yield web


@contextmanager
def builtin_over_http() -> Iterator[httpx.Client]:
    """A client of a server with the model that ships."""
    with builtin_llm() as llm, llm_over_http(llm) as web:
        yield web
