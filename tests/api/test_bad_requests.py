"""Bad requests to a real server: each is answered, clearly and soon, and the next good one is answered rightly."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping

import pytest

from support.bad_requests import bad_requests
from support.demo import DEMO_ANSWER, DEMO_IMAGE
from testbed.hostile_inputs import HOSTILE, ask_about, picture_url, send
from testbed.in_process import in_process_server

GOOD = ask_about(picture_url(DEMO_IMAGE.read_bytes()), max_tokens=16, temperature=0)
LEAKS = re.compile(
    r"Traceback|\.py\b|site-packages|0x[0-9a-f]{6}|[a-z](Error|Exception)\b|\b127\.0\.0\.1:\d|, line \d"
    r"|/(usr|home|work|tmp|proc|root|opt|var|lib)/|\b(numpy|PIL|Pillow|pydantic|libjpeg|libpng|libtiff|torch|asyncio)\b"
)
ANSWER_S = 60.0
"""Longer than any of them takes on a busy machine: a picture may take ten seconds to decode."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with in_process_server() as url:
        yield url


def check_good(url: str, after: str) -> None:
    status, body = send(url, GOOD, ANSWER_S)
    assert status == 200, f"after {after}: {body}"
    assert DEMO_ANSWER in json.loads(body)["choices"][0]["message"]["content"], f"after {after}"


def check_bad(url: str, name: str, data: bytes) -> int:
    """The status of an answer that is no fault of the server and tells nothing of it."""
    status, body = send(url, data, ANSWER_S)
    assert 200 <= status < 500, f"{name}: {status} {body}"
    if status >= 400:
        assert not LEAKS.search(body), f"{name}: {body}"
        assert len(body) < 1000, name
        if body.startswith("{"):  # else the HTTP server's own line about what is no HTTP
            error = json.loads(body)["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"].endswith("."), f"{name}: {body}"
        else:
            assert "Invalid HTTP request received." in body, name
    return status


def check(url: str, requests: Mapping[str, bytes], every: int) -> Counter[int]:
    """Sends all of them, and a good request after every so many; counts the statuses."""
    statuses: Counter[int] = Counter()
    for number, (name, data) in enumerate(requests.items(), 1):
        statuses[check_bad(url, name, data)] += 1
        if number % every == 0:
            check_good(url, name)
    check_good(url, "all")
    return statuses


def test_some_bad_requests(url: str) -> None:
    some = dict(list(bad_requests().items())[::5])
    statuses = check(url, some, every=10)
    assert sum(statuses[status] for status in range(400, 500)) > 60


@pytest.mark.extended
def test_all_bad_requests(url: str) -> None:
    statuses = check(url, bad_requests(), every=1)
    assert sum(statuses[status] for status in range(400, 500)) >= 250


@pytest.mark.extended
@pytest.mark.parametrize("name", [name for name, each in HOSTILE.items() if each.complete])
def test_hostile_requests(url: str, name: str) -> None:
    assert check_bad(url, name, HOSTILE[name].make()) in HOSTILE[name].statuses
    check_good(url, name)
