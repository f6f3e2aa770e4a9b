"""The main job over the real application: right answers, the same over HTTP, in Python and on the command line."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from support.demo import DEMO_ANSWER, DEMO_IMAGE, DEMO_QUESTION, data_url, question

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


def test_the_other_endpoints_answer_over_the_tiers(client: Any, served: Any) -> None:
    """The context is known at the ingress, and a prompt's cost without the model; a response is the chat's answer."""
    image = DEMO_IMAGE.read_bytes()
    messages = question(DEMO_QUESTION, image)
    [model] = client.models.list().data
    with httpx.Client(base_url=served.url, timeout=60) as web:
        reported = web.post("/tokenize", json={"messages": messages, "return_token_strs": True}).json()
        assert (reported["fits"], reported["max_model_len"]) == (True, model.to_dict()["max_model_len"])
        assert len(reported["images"]) == 1
        words = [each for each in reported["tokens"] if each >= 0]
        assert DEMO_QUESTION in web.post("/detokenize", json={"tokens": words}).json()["prompt"]
        refused = web.post("/detokenize", json={"tokens": [10**6]})
        assert refused.status_code == 400
        assert "page/page.js" in web.get("/").text
        assert web.get("/page/page.js").headers["content-type"].startswith("text/javascript")
    content = [
        {"type": "input_text", "text": DEMO_QUESTION},
        {"type": "input_image", "image_url": data_url(image), "detail": "auto"},
    ]
    response = client.responses.create(model="builtin", input=[{"role": "user", "content": content}], temperature=0)
    assert response.output_text == answer(client, DEMO_QUESTION, image)
    assert response.usage.input_tokens == reported["count"]
    text = client.completions.create(model="builtin", prompt="The circle is", temperature=0, max_tokens=3)
    assert text.choices[0].text


def test_streamed_equals_unstreamed(client: Any) -> None:
    image = DEMO_IMAGE.read_bytes()
    for text in QUESTIONS:
        stream = client.chat.completions.create(
            model="builtin", messages=question(text, image), temperature=0, max_tokens=40, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert "".join(pieces) == answer(client, text, image)


def test_http_equals_python_and_the_command_line(client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from llava_serve import LLM, SamplingParams
    from llava_serve.cli import main

    image = DEMO_IMAGE.read_bytes()
    llm = LLM("builtin", device="cpu")
    greedy = SamplingParams(temperature=0, max_new_tokens=40)
    for text in QUESTIONS:
        assert llm.chat(question(text, image), sampling=greedy).text == answer(client, text, image)
    assert main(["ask", "--image", str(DEMO_IMAGE), "--temperature", "0", DEMO_QUESTION]) == 0
    assert capsys.readouterr().out.strip() == answer(client, DEMO_QUESTION, image)


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
