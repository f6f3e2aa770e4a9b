"""Batch work beside online requests, through the whole application."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from support.demo import DEMO_IMAGE, DEMO_QUESTION, question

MESSAGES = question(DEMO_QUESTION, DEMO_IMAGE.read_bytes())
ONLINE = {"messages": MESSAGES, "temperature": 0, "max_tokens": 40}
BATCH = ONLINE | {"priority": 10, "max_tokens": 300, "ignore_eos": True, "return_token_ids": True}


@pytest.mark.extended
def test_an_online_request_is_answered_while_a_full_batch_runs_which_then_ends_unchanged(
    served: Any, engine_stats: Callable[[], dict[str, Any]], wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    def ask(body: dict[str, Any]) -> dict[str, Any]:
        response = web.post("/v1/chat/completions", json=body)
        answer: dict[str, Any] = response.raise_for_status().json()
        return answer

    with httpx.Client(base_url=served.url, timeout=280) as web, ThreadPoolExecutor(48) as threads:
        alone = ask(BATCH)["choices"][0]["token_ids"]
        batch = [threads.submit(ask, BATCH) for _ in range(48)]  # the engine runs 32
        wait_until(lambda: engine_stats()["waiting"] > 0)
        online = [ask(ONLINE) for _ in range(3)]
        assert not all(each.done() for each in batch)
        assert [each["choices"][0]["message"]["content"] for each in online] == ["The circle is red."] * 3
        answers = [each.result()["choices"][0]["token_ids"] for each in batch]
    assert [len(ids) for ids in answers] == [300] * 48
    assert answers == [alone] * 48
