"""Who shares what is cached: with `cache_scope: key`, or a salt of their own, requests learn nothing of others'."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from deployments.preprocessor import ImagePreprocessor
from deployments.router import key_of
from deployments.tools.config import ConfigError, packaged, parse_config
from llava_serve.api.app import create_app
from llava_serve.api.cache_scope import cache_salt
from llava_serve.api.in_process import InProcessBackend
from llava_serve.async_llm import AsyncLLM
from llava_serve.config import ApiOptions, EngineOptions, ImageOptions, ModelOptions
from llava_serve.errors import RequestError
from llava_serve.types import ImagePart, Message, PreparedPrompt, TextPart
from support.api_server import PATH, PacedBackend, app_over, error_of, serving
from support.demo import DEMO_IMAGE, question

KEYS = ("first", "second")
TEXT = [{"role": "user", "content": "Which of these words is the longest? " * 8}]
PICTURE = question("What colour is the circle?", DEMO_IMAGE.read_bytes())


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    llm = AsyncLLM(ModelOptions(device="cpu"), EngineOptions(num_threads=1))
    yield llm
    llm.close()


@pytest.fixture(params=["shared", "key"])
def scope(request: pytest.FixtureRequest) -> str:
    scope: str = request.param
    return scope


@pytest.fixture
def web(llm: AsyncLLM, scope: Any) -> Iterator[httpx.Client]:
    options = ApiOptions(api_keys=KEYS, cache_scope=scope)
    with serving(create_app(InProcessBackend(llm), options)) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def ask(web: httpx.Client, key: str, messages: Any, **fields: Any) -> tuple[str, int]:
    """The answer, and how many positions of its prompt were cached."""
    body = {"model": "builtin", "messages": messages, "max_tokens": 4, "temperature": 0} | fields
    response = web.post(PATH, json=body, headers={"Authorization": f"Bearer {key}"})
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("messages", [TEXT, PICTURE], ids=["text", "picture"])
def test_keys_share_a_cache_only_where_the_scope_is_shared(
    web: httpx.Client, llm: AsyncLLM, scope: str, messages: Any
) -> None:
    own = [{"role": "system", "content": f"{scope} {'text' if messages is TEXT else 'picture'}"}, *messages]
    text, cached = ask(web, KEYS[0], own)
    assert ask(web, KEYS[0], own)[1] > cached
    computed = llm.stats().computed_tokens
    again, cached_of_other = ask(web, KEYS[1], own)
    assert again == text
    assert (cached_of_other == 0) == (scope == "key")
    assert (llm.stats().computed_tokens - computed > 50) == (scope == "key")  # it is the engine's count, too
    assert ask(web, KEYS[1], own)[1] > 0
    assert ask(web, KEYS[1], own, cache_salt="mine")[1] == 0
    assert ask(web, KEYS[1], own, cache_salt="mine")[1] > 0
    assert (ask(web, KEYS[0], own, cache_salt="mine")[1] == 0) == (scope == "key")


def test_no_salt_is_another_keys() -> None:
    asked: list[tuple[Any, str | None, str | None]] = [
        (scope, key, given)
        for scope in ("shared", "key")
        for key in ("a", "b")
        for given in (None, "a", "b", "('a', None)", cache_salt("key", "a", None))
    ]
    salts = {each: cache_salt(*each) for each in asked}
    assert salts["shared", "a", None] == salts["shared", "b", None] == ""
    assert salts["shared", "a", "b"] == salts["shared", "b", "b"] != ""
    own = [salts[each] for each in asked if each[0] == "key"]
    assert len(set(own)) == len(own)
    assert not set(own) & {salt for each, salt in salts.items() if each[0] == "shared"}


@pytest.mark.parametrize(
    ("salt", "rule"), [("", "must not be empty"), ("x" * 1025, "1024 characters"), (5, "a string")]
)
def test_a_salt_is_a_short_text(salt: Any, rule: str) -> None:
    with app_over(PacedBackend()) as web:
        response = web.post(PATH, json={"model": "paced", "messages": TEXT, "cache_salt": salt})
    assert response.status_code == 400
    assert error_of(response)["param"] == "cache_salt"
    assert rule in error_of(response)["message"]


def test_a_scope_by_key_needs_keys(tmp_path: Any) -> None:
    with pytest.raises(RequestError, match="is key and needs API keys"):
        create_app(PacedBackend(), ApiOptions(cache_scope="key"))
    config = tmp_path / "mine.yaml"
    config.write_text(packaged("serve_config.yaml").replace("api:", "api:\n        cache_scope: key"))
    with pytest.raises(ConfigError, match="is key and needs API keys"):
        parse_config(config)
    (tmp_path / "keys").write_text("one\n")
    parse_config(config, api_keys_file=str(tmp_path / "keys"))


async def test_the_salt_crosses_the_tiers() -> None:
    """The picture tier's own cache is kept apart, too: a tile that is found takes no time to decode."""
    tier = ImagePreprocessor(ModelOptions(), ImageOptions(isolate=True))
    messages = [Message("user", (ImagePart(DEMO_IMAGE.read_bytes()), TextPart("What is this?")))]

    async def prepared(asked: list[Message], salt: str) -> PreparedPrompt:
        made = await tier.prepare(asked, None, time.time() + 60, salt)
        assert isinstance(made, PreparedPrompt)
        sent: PreparedPrompt = pickle.loads(pickle.dumps(made))
        assert sent.cache_salt == salt
        return sent

    none, one, other = [await prepared(messages, salt) for salt in ("", "one", "other")]
    assert len({*none.digests, *one.digests, *other.digests}) == 3
    assert (await prepared(messages, "one")).digests == one.digests
    cache = tier._processor.processor._tile_cache
    assert len(cache._images) == 3
    text = [Message("user", (TextPart("What is this?"),))]
    keys = {key_of(_call(await prepared(text, salt))) for salt in ("", "one", "other")}
    assert len(keys) == 3


def _call(prompt: PreparedPrompt) -> Any:
    """What a router sees of a call."""
    return SimpleNamespace(args=(prompt,))
