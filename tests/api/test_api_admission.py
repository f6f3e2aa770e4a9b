"""The limit on requests in flight: what is admitted, what is refused, and that every end makes room."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from openai import RateLimitError

from llava_serve.api.limiter import ConcurrencyLimiter
from llava_serve.errors import CapacityError
from support.api_server import BODY, MESSAGES, PATH, PacedBackend, app_over, official, wait_until


def test_at_capacity_a_request_is_refused_at_once_and_the_official_client_retries() -> None:
    backend = PacedBackend(pace_s=1)
    with app_over(backend, max_in_flight=1) as web:
        first = threading.Thread(target=lambda: web.post(PATH, json=BODY))
        first.start()
        wait_until(lambda: backend.working == 1)
        with httpx.Client(base_url=web.base_url, timeout=60) as other:
            refused = other.post(PATH, content=b"not parsed")
            assert other.get("/health").status_code == 200
            assert backend.working == 1, "the refusal waited for the request in flight"
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        with pytest.raises(RateLimitError):
            official(web).chat.completions.create(model="paced", messages=MESSAGES)
        backend.pace_s = 0.0
        answer = official(web, retries=5).chat.completions.create(model="paced", messages=MESSAGES)
        assert answer.choices[0].message.content == "A red circle."
        first.join()


async def test_two_hundred_at_once_get_an_answer_or_a_refusal_and_nothing_else() -> None:
    backend = PacedBackend(pace_s=0.02)
    limits = httpx.Limits(max_connections=200)
    with app_over(backend, max_in_flight=20) as web:
        async with httpx.AsyncClient(base_url=web.base_url, limits=limits, timeout=30) as client:
            answers = await asyncio.gather(
                *(client.post(PATH, json=BODY | {"stream": bool(number % 2)}) for number in range(200))
            )
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        else:
            assert "circle." in answer.text
    assert backend.working == 0


def test_every_end_makes_room_for_the_next_request() -> None:
    backend = PacedBackend()
    with app_over(backend, max_in_flight=1) as web:
        for _ in range(3):
            assert web.post(PATH, json=BODY).status_code == 200
            assert web.post(PATH, json=BODY | {"stream": True}).status_code == 200
            assert web.post(PATH, content=b"{").status_code == 400
            assert web.post("/nowhere", content=b"{").status_code == 404
            backend.failure, backend.fail_at = KeyError("x"), 1
            assert web.post(PATH, json=BODY).status_code == 500
            assert "internal_error" in web.post(PATH, json=BODY | {"stream": True}).text
            backend.failure = None


def test_batch_work_takes_at_most_half_of_the_places_and_none_from_online_requests() -> None:
    backend = PacedBackend(pace_s=1)
    with app_over(backend, max_in_flight=4) as web, ThreadPoolExecutor(6) as threads:
        batch = [threads.submit(web.post, PATH, json=BODY | {"priority": 1}) for _ in range(2)]
        wait_until(lambda: backend.working == 2)
        refused = web.post(PATH, json=BODY | {"priority": 1})
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        online = [threads.submit(web.post, PATH, json=BODY) for _ in range(4)]
        wait_until(lambda: backend.working == 6)
        assert web.post(PATH, json=BODY).status_code == 429
        backend.pace_s = 0.0
        assert {answer.result().status_code for answer in batch + online} == {200}
        assert web.post(PATH, json=BODY | {"priority": 1}).status_code == 200


def test_batch_work_takes_at_most_half_of_the_bytes_and_none_from_online_requests() -> None:
    limiter = ConcurrencyLimiter(100, 1000)
    with limiter.request() as first, limiter.request() as second, limiter.request() as online:
        first.hold(600)
        first.classify(1)
        second.hold(100)
        with pytest.raises(CapacityError, match="no room for batch work"):
            second.classify(1)
        online.hold(900)
        online.classify(0)
        with pytest.raises(CapacityError):
            online.hold(1)
    with limiter.request() as last:
        last.hold(1000)
        last.classify(1)
