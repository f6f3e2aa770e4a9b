"""The main job over the real application: right answers, the same over HTTP, in Python and on the command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from support.demo import DEMO_ANSWER, DEMO_IMAGE, DEMO_QUESTION, question

QUESTIONS = (DEMO_QUESTION, "Describe the picture.", "How many shapes are there?")


def answer(client: Any, text: str, *images: bytes, **fields: Any) -> str:
    completion = client.chat.completions.create(
        model="builtin", messages=question(text, *images), temperature=0, max_tokens=40, **fields
    )
    said: str = completion.choices[0].message.content
    return said


def test_the_demo_question_is_answered_rightly(client: Any) -> None:
    completion = client.chat.completions.create(
        model="builtin", messages=question(DEMO_QUESTION, DEMO_IMAGE.read_bytes()), temperature=0, max_tokens=40
    )
    [choice] = completion.choices
    assert DEMO_ANSWER in choice.message.content.lower()
    assert choice.finish_reason == "stop"
    assert 0 < completion.usage.completion_tokens <= 40
    assert completion.usage.prompt_tokens > 10


def test_streamed_equals_unstreamed(client: Any) -> None:
    image = DEMO_IMAGE.read_bytes()
    for text in QUESTIONS:
        stream = client.chat.completions.create(
            model="builtin", messages=question(text, image), temperature=0, max_tokens=40, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert "".join(pieces) == answer(client, text, image)


def test_http_equals_python_and_the_command_line(client: Any) -> None:
    from llava_serve import LLM, SamplingParams

    image = DEMO_IMAGE.read_bytes()
    llm = LLM("builtin", device="cpu")
    greedy = SamplingParams(temperature=0, max_new_tokens=40)
    for text in QUESTIONS:
        assert llm.chat(question(text, image), sampling=greedy).text == answer(client, text, image)
    command = [sys.executable, "-m", "llava_serve.cli", "ask", "--image", str(DEMO_IMAGE), "--temperature", "0"]
    done = subprocess.run([*command, DEMO_QUESTION], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == answer(client, DEMO_QUESTION, image)


def test_eight_clients_at_once_get_what_one_gets(client: Any, engine_stats: Callable[[], dict[str, Any]]) -> None:
    image = DEMO_IMAGE.read_bytes()
    alone = {text: answer(client, text, image) for text in QUESTIONS}
    texts = [QUESTIONS[number % len(QUESTIONS)] for number in range(24)]
    with ThreadPoolExecutor(8) as clients:
        together = list(clients.map(lambda text: answer(client, text, image), texts))
    assert together == [alone[text] for text in texts]
    assert engine_stats()["running"] == 0


@pytest.mark.parametrize("fields", [{"top_p": 0.9}, {"stop": ["nothing says this"]}, {"seed": 7}])
def test_fields_that_do_not_matter_to_a_greedy_answer(client: Any, fields: dict[str, Any]) -> None:
    image = DEMO_IMAGE.read_bytes()
    assert answer(client, DEMO_QUESTION, image, **fields) == answer(client, DEMO_QUESTION, image)
