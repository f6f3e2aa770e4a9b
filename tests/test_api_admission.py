"""A bounded house: who is let in, who is refused, and that every guest leaves."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import httpx
import pytest
from api_server import BODY, MESSAGES, PATH, PacedBackend, app_over, official, wait_until
from openai import RateLimitError

from llava_serve.api.app import create_app
from llava_serve.config import ApiOptions


def test_a_full_house_refuses_at_once_and_the_official_client_comes_again() -> None:
    backend = PacedBackend(pace_s=0.2)
    with app_over(backend, max_queue=1) as web:
        guest = threading.Thread(target=lambda: web.post(PATH, json=BODY))
        guest.start()
        wait_until(lambda: backend.working == 1)
        began = time.perf_counter()
        with httpx.Client(base_url=web.base_url) as other:
            refused = other.post(PATH, content=b"not looked at")
            assert other.get("/health").status_code == 200
        assert time.perf_counter() - began < 0.3
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        with pytest.raises(RateLimitError):
            official(web).chat.completions.create(model="paced", messages=MESSAGES)
        answer = official(web, retries=2).chat.completions.create(model="paced", messages=MESSAGES)
        assert answer.choices[0].message.content == "A red circle."
        guest.join()


async def test_two_hundred_at_once_get_an_answer_or_a_refusal_and_nothing_else() -> None:
    backend = PacedBackend(pace_s=0.02)
    limits = httpx.Limits(max_connections=200)
    with app_over(backend, max_queue=20) as web:
        async with httpx.AsyncClient(base_url=web.base_url, limits=limits, timeout=30) as guests:
            answers = await asyncio.gather(
                *(guests.post(PATH, json=BODY | {"stream": bool(number % 2)}) for number in range(200))
            )
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        else:
            assert "circle." in answer.text
    assert backend.working == 0


@pytest.mark.slow
async def test_a_refusal_is_decided_within_two_milliseconds() -> None:
    backend = PacedBackend(pace_s=60)
    app = create_app(backend, ApiOptions(max_queue=1))
    body = {"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}
    scope = {"type": "http", "method": "POST", "path": PATH, "root_path": "", "query_string": b"", "headers": []}
    silence = asyncio.Event()
    messages: asyncio.Queue[Any] = asyncio.Queue()
    messages.put_nowait(body)
    guest = asyncio.create_task(app(dict(scope), messages.get, messages.put))
    await asyncio.to_thread(wait_until, lambda: backend.working == 1)
    statuses, times = set(), []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            times.append(time.perf_counter() - began)
            statuses.add(message["status"])

    for _ in range(2000):
        began = time.perf_counter()
        await app(dict(scope), silence.wait, send)
    guest.cancel()
    assert statuses == {429}
    assert sorted(times)[int(0.99 * len(times))] < 0.002


def test_every_end_frees_its_place() -> None:
    backend = PacedBackend()
    with app_over(backend, max_queue=1) as web:
        for _ in range(3):
            assert web.post(PATH, json=BODY).status_code == 200
            assert web.post(PATH, json=BODY | {"stream": True}).status_code == 200
            assert web.post(PATH, content=b"{").status_code == 400
            assert web.post("/nowhere", content=b"{").status_code == 404
            backend.failure, backend.fail_at = KeyError("x"), 1
            assert web.post(PATH, json=BODY).status_code == 500
            assert "internal_error" in web.post(PATH, json=BODY | {"stream": True}).text
            backend.failure = None
