"""A replica that dies fails the requests in it, and is replaced for later ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import psutil
import pytest

from support.cluster import replicas
from support.demo import DEMO_IMAGE, DEMO_QUESTION, question

pytestmark = pytest.mark.extended


def ask(client: Any, **fields: Any) -> Any:
    messages = question(DEMO_QUESTION, DEMO_IMAGE.read_bytes())
    return client.chat.completions.create(model="builtin", messages=messages, temperature=0, **fields)


def test_a_model_replica_that_is_killed_is_replaced(client: Any, served: Any) -> None:
    before = ask(client, max_tokens=20).choices[0].message.content
    stream = ask(client, max_tokens=1500, stream=True, extra_body={"ignore_eos": True})
    next(stream)
    [replica] = replicas("LlavaModel", served)
    replica.kill()
    psutil.wait_procs([replica], timeout=20)
    with pytest.raises(openai.APIError, match="replica"):
        list(stream)
    # Serve queues requests until a new replica runs; the client retries nothing.
    assert ask(client, max_tokens=20, timeout=200).choices[0].message.content == before


@pytest.mark.parametrize("tier", ["Ingress", "ImagePreprocessor"])
def test_a_replica_of_another_tier_that_is_killed_is_replaced(
    tier: str, client: Any, served: Any, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    before = ask(client, max_tokens=20).choices[0].message.content
    [replica] = replicas(tier, served)
    replica.kill()
    psutil.wait_procs([replica], timeout=20)

    def answered() -> bool:
        """Until Serve notices the death, a request may get an error; it always gets a response."""
        try:
            return bool(ask(client, max_tokens=20).choices[0].message.content == before)
        except openai.InternalServerError:
            return False

    wait_until(answered)
    [successor] = replicas(tier, served)
    assert successor.pid != replica.pid
