"""What each API key may use: requests in flight, and a minute."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx
import pytest
from openai import RateLimitError as OfficialRateLimitError

from llava_serve.api.key_limits import KeyLimits
from llava_serve.errors import RateLimitError, RequestError
from support.api_keys import KEY, OTHER, Clock, bearer
from support.api_server import BODY, MESSAGES, PATH, PacedBackend, app_over, error_of, official, wait_until


def test_the_requests_in_flight_of_a_key_are_bounded() -> None:
    backend = PacedBackend(pace_s=1)
    keys = (f"web:{KEY}", f"web:{OTHER}", "batch")
    with app_over(backend, api_keys=keys, max_in_flight_per_key=2) as web:
        threads = [
            threading.Thread(target=web.post, args=(PATH,), kwargs={"json": BODY, "headers": bearer(key)})
            for key in (KEY, OTHER)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: backend.working == 2)
        refused = web.post(PATH, json=BODY, headers=bearer(OTHER))  # two keys of one name share its limit
        backend.pace_s = 0
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert error_of(refused)["code"] == "rate_limit_exceeded"
        assert error_of(refused)["message"] == "This API key has 2 requests in flight, and may not have more."
        assert web.get("/v1/models", headers=bearer(KEY)).status_code == 200
        assert web.post(PATH, json=BODY, headers=bearer("batch")).status_code == 200
        for thread in threads:
            thread.join()
        assert web.post(PATH, json=BODY, headers=bearer(KEY)).status_code == 200


def test_the_requests_per_minute_of_a_key_are_bounded() -> None:
    with app_over(PacedBackend(), api_keys=(KEY, OTHER), requests_per_minute_per_key=7) as web:
        for _ in range(7):
            assert web.post(PATH, json=BODY, headers=bearer(KEY)).status_code == 200
        refused = web.post(PATH, json=BODY, headers=bearer(KEY))
        assert refused.status_code == 429
        assert 7 <= int(refused.headers["retry-after"]) <= 9  # a seventh of a minute, less what has passed
        assert error_of(refused)["code"] == "rate_limit_exceeded"
        assert web.post(PATH, json=BODY, headers=bearer(OTHER)).status_code == 200
        with pytest.raises(OfficialRateLimitError):
            official(web).with_options(api_key=KEY).chat.completions.create(model="paced", messages=MESSAGES)


@pytest.mark.parametrize("per_minute", [1, 7, 60, 6000])
def test_whoever_waits_as_long_as_it_is_said_is_served(per_minute: int) -> None:
    clock = Clock()
    limits = KeyLimits(None, per_minute, clock)

    def use_up() -> tuple[int, int]:
        """How many requests pass, and how long to wait for the next one."""
        for passed in range(per_minute + 1):
            try:
                with limits.request("web"):
                    pass
            except RateLimitError as error:
                return passed, error.retry_after_s
        raise AssertionError("more than a minute's requests passed")

    passed, wait_s = use_up()
    assert passed == per_minute
    waited = 0
    for _ in range(100):
        clock.now += wait_s
        waited += wait_s
        more, wait_s = use_up()
        assert more >= 1
        passed += more
    assert passed - per_minute == pytest.approx(waited * per_minute / 60, abs=1)
    clock.now += 3600
    assert use_up()[0] == per_minute  # no more are saved up


@pytest.mark.parametrize("limit", ["max_in_flight_per_key", "requests_per_minute_per_key"])
def test_a_limit_per_key_needs_keys(limit: str) -> None:
    with pytest.raises(RequestError, match=f"api.{limit} needs API keys"), app_over(PacedBackend(), **{limit: 1}):
        pass


def test_many_wrong_keys_are_refused_at_once(tmp_path: Path) -> None:
    with (
        app_over(PacedBackend(), api_keys=(KEY,), requests_per_minute_per_key=1) as web,
        httpx.Client(timeout=60) as other,
    ):
        for number in range(20):
            response = other.post(f"{web.base_url}{PATH}", json=BODY, headers=bearer(f"{KEY}{number}"))
            assert response.status_code == 401
        assert web.post(PATH, json=BODY, headers=bearer(KEY)).status_code == 200
