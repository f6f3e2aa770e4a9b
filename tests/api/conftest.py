"""One server with the model that ships, for all tests here that ask it. Modules with another define their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import httpx
import pytest
from openai import OpenAI

from support.api_server import official

if TYPE_CHECKING:
    from llava_serve.async_llm import AsyncLLM


@pytest.fixture(scope="session")
def llm() -> Iterator[AsyncLLM]:
    from support.builtin_server import builtin_llm  # it imports torch, which many tests do without

    with builtin_llm() as llm:
        yield llm


@pytest.fixture(scope="session")
def web(llm: AsyncLLM) -> Iterator[httpx.Client]:
    from support.builtin_server import llm_over_http

    with llm_over_http(llm) as web:
        yield web


@pytest.fixture(scope="session")
def client(web: httpx.Client) -> Iterator[OpenAI]:
    with official(web) as client:
        yield client
