"""One server with the model that ships, for all tests here that ask it. Modules with another define their own."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from openai import OpenAI

from llava_serve.async_llm import AsyncLLM
from support.api_server import official
from support.builtin_server import builtin_llm, llm_over_http


@pytest.fixture(scope="session")
def llm() -> Iterator[AsyncLLM]:
    with builtin_llm() as llm:
        yield llm


@pytest.fixture(scope="session")
def web(llm: AsyncLLM) -> Iterator[httpx.Client]:
    with llm_over_http(llm) as web:
        yield web


@pytest.fixture(scope="session")
def client(web: httpx.Client) -> Iterator[OpenAI]:
    with official(web) as client:
        yield client
