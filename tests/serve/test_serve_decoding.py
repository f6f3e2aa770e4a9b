"""The picture tier of the running application decodes in child processes: their ends harm no other request."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from PIL import Image

from support.cluster import replicas
from support.demo import DEMO_ANSWER, DEMO_IMAGE, DEMO_QUESTION, question

pytestmark = pytest.mark.extended


def ask(client: Any, *images: bytes, **fields: Any) -> str:
    messages = question(DEMO_QUESTION, *images)
    completion = client.chat.completions.create(
        model="builtin", messages=messages, temperature=0, max_tokens=20, **fields
    )
    return str(completion.choices[0].message.content)


def demo(number: int) -> bytes:
    """The demo's picture as a file that no cache knows."""
    out = io.BytesIO()
    with Image.open(DEMO_IMAGE) as image:
        image.save(out, "PNG", compress_level=number % 9 + 1)
    return out.getvalue() + bytes(number)  # what follows a PNG's end is not looked at


@cache
def large() -> list[bytes]:
    """Good pictures that take a second or two each to decode, and together half a minute."""
    out, pictures = io.BytesIO(), []
    Image.new("RGBA", (8000, 7900), (255, 0, 0, 200)).save(out, "PNG", compress_level=1)
    for number in range(16):
        pictures.append(out.getvalue() + bytes(number))
    return pictures


def children(served: Any) -> list[psutil.Process]:
    return [child for replica in replicas("ImagePreprocessor", served) for child in replica.children()]


def test_decoding_runs_in_children_without_torch(client: Any, served: Any) -> None:
    assert DEMO_ANSWER in ask(client, demo(1)).lower()
    found = children(served)
    assert len(found) >= 2  # one that has worked, and a spare
    for child in found:
        assert "decode_worker" in " ".join(child.cmdline())
        assert "libtorch" not in Path(f"/proc/{child.pid}/maps").read_text()
        assert child.num_threads() == 1


def test_a_child_that_is_killed_costs_no_request(client: Any, served: Any) -> None:
    with ThreadPoolExecutor(4) as callers:
        for first in (2, 10, 18, 26):
            answers = callers.map(lambda number: ask(client, demo(number)), range(first, first + 8))
            time.sleep(0.3)
            children(served)[0].kill()  # one: a request that is tried again could meet the end of another
            for answer in answers:
                assert DEMO_ANSWER in answer.lower()


@pytest.mark.parametrize("how", ["deadline", "disconnect"])
def test_a_slow_picture_gives_the_tier_back(how: str, client: Any, served: Any) -> None:
    ask(client, demo(40))
    if how == "deadline":
        with pytest.raises(openai.APIStatusError) as refusal:
            ask(client, *large(), extra_body={"timeout": 1.0})
        assert refusal.value.status_code == 504
    else:
        with pytest.raises(openai.APITimeoutError):
            ask(client, *large(), timeout=1.0)
    ended = time.monotonic()
    assert DEMO_ANSWER in ask(client, demo(41)).lower()
    assert time.monotonic() - ended < 8


def test_no_child_outlives_its_replica(
    client: Any, served: Any, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    ask(client, demo(50))
    orphans = children(served)
    assert orphans
    for replica in replicas("ImagePreprocessor", served):
        replica.kill()
    assert psutil.wait_procs(orphans, timeout=10)[1] == []

    def answered() -> bool:
        try:
            return DEMO_ANSWER in ask(client, demo(51)).lower()
        except openai.InternalServerError:
            return False

    wait_until(answered)
