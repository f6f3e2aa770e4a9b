"""A replica that dies is loud to those it served, and replaced for those who come after."""

from __future__ import annotations

from typing import Any

import openai
import psutil
import pytest
from conftest import DEMO_IMAGE, DEMO_QUESTION, question, replicas

pytestmark = pytest.mark.slow


def test_a_model_replica_that_is_killed_is_replaced(client: Any, served: Any) -> None:
    def ask(**fields: Any) -> Any:
        messages = question(DEMO_QUESTION, DEMO_IMAGE.read_bytes())
        return client.chat.completions.create(model="builtin", messages=messages, temperature=0, **fields)

    before = ask(max_tokens=20).choices[0].message.content
    stream = ask(max_tokens=1500, stream=True, extra_body={"ignore_eos": True})
    next(stream)
    [replica] = replicas("LlavaModel", served)
    replica.kill()
    psutil.wait_procs([replica], timeout=20)
    with pytest.raises(openai.APIError, match="replica"):
        list(stream)
    # Serve holds requests until a new replica is there; nothing is retried by the client.
    assert ask(max_tokens=20, timeout=200).choices[0].message.content == before
