"""`prompt_logprobs`, and `echo` with `logprobs`, over the model that ships: the scores of its own forward pass."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai import OpenAI

from llava_serve import LLM, SamplingParams
from llava_serve.config import EngineOptions
from llava_serve.types import PreparedPrompt, RawPrompt, TokenLogprob
from support.api_server import PATH, error_of
from support.demo import DEMO_IMAGE, DEMO_QUESTION, question

TEXT = "The circle is red, and the square is blue"
MESSAGES = question(DEMO_QUESTION, DEMO_IMAGE.read_bytes())


@pytest.fixture(scope="module")
def library() -> LLM:
    return LLM("builtin", engine=EngineOptions(num_threads=1))


def expected(library: LLM, asked: Any, count: int = 2) -> list[TokenLogprob | None]:
    """The scores of a prompt by the library, which tests/engine compares with transformers."""
    prepared: PreparedPrompt = library.processor.prepare(asked)
    sampling = SamplingParams(temperature=0, prompt_logprobs=count, max_new_tokens=1)
    scored = library.run([prepared], sampling)[0].prompt_logprobs
    assert scored is not None
    return list(scored)


def complete(web: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = web.post("/v1/completions", json={"prompt": TEXT, "temperature": 0} | fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def check_positions(found: list[Any], scored: list[TokenLogprob | None]) -> None:
    """vLLM's form: at each position the prompt's token, and the alternatives."""
    assert len(found) == len(scored)
    for position, entry in zip(found, scored, strict=True):
        if entry is None:
            assert position is None
            continue
        assert set(position) == {str(entry.token_id), *(str(token) for token, _, _ in entry.top)}
        own = position[str(entry.token_id)]
        assert own["logprob"] == pytest.approx(entry.logprob, abs=1e-3)
        assert own["decoded_token"] == entry.text
        assert {position[str(token)]["rank"] for token, _, _ in entry.top} == set(range(1, len(entry.top) + 1))
        assert (own["rank"] == 1) == (str(entry.token_id) == str(entry.top[0][0]))


def test_a_text_is_scored_without_an_answer(web: httpx.Client, library: LLM) -> None:
    scored = expected(library, RawPrompt(TEXT))
    answer = complete(web, echo=True, logprobs=2, max_tokens=0)
    (choice,) = answer["choices"]
    assert choice["text"] == TEXT
    assert choice["finish_reason"] == "length"
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (len(scored), 0)
    reported = choice["logprobs"]
    assert [len(each) for each in reported.values()] == [len(scored)] * 4
    assert "".join(reported["tokens"]) == TEXT
    for token, at in zip(reported["tokens"], reported["text_offset"], strict=True):
        assert TEXT[at : at + len(token)] == token
    assert reported["token_logprobs"][0] is None
    assert reported["top_logprobs"][0] is None
    for value, top, entry in list(zip(reported["token_logprobs"], reported["top_logprobs"], scored, strict=True))[1:]:
        assert entry is not None
        assert value == pytest.approx(entry.logprob, abs=1e-3)
        assert value in top.values()
        assert max(top.values()) == pytest.approx(entry.top[0][2], abs=1e-3)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_follows_the_echo(web: httpx.Client, client: OpenAI, stream: bool) -> None:
    alone = complete(web, logprobs=1, max_tokens=6)["choices"][0]
    asked: dict[str, Any] = {"model": "builtin", "prompt": TEXT, "temperature": 0, "echo": True, "logprobs": 1}
    asked |= {"max_tokens": 6, "stream": stream}
    events = list(client.completions.create(**asked)) if stream else [client.completions.create(**asked)]
    choices = [event.choices[0] for event in events]
    text = "".join(choice.text for choice in choices)
    assert text == TEXT + alone["text"]
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.tokens or ()]
    offsets = [at for choice in choices if choice.logprobs for at in choice.logprobs.text_offset or ()]
    values = [value for choice in choices if choice.logprobs for value in choice.logprobs.token_logprobs or ()]
    assert "".join(tokens) == text
    assert all(text[at : at + len(token)] == token for token, at in zip(tokens, offsets, strict=True))
    answered = [value for token, value in zip(tokens, values, strict=True) if token]
    assert answered[-len(alone["logprobs"]["tokens"]) :] == pytest.approx(alone["logprobs"]["token_logprobs"], abs=1e-3)


def test_who_counts_tokens_gets_one_entry_for_each(web: httpx.Client, library: LLM) -> None:
    """lm-eval cuts the context off by its number of tokens, and the one token of the answer, whatever it is."""
    chat = library.processor.prepare(library.processor.read("Hello"))
    ended = complete(web, prompt=chat.token_ids.tolist(), max_tokens=64, return_token_ids=True)["choices"][0]
    ids = [*chat.token_ids.tolist(), *ended["token_ids"]]  # the answer ends: the next token is its end, without a text
    for prompt in (ids[:-1], ids):
        (choice,) = complete(web, prompt=[prompt], echo=True, logprobs=1, max_tokens=1)["choices"]
        assert [len(each) for each in choice["logprobs"].values()] == [len(prompt) + 1] * 4
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    continuation = choice["logprobs"]["token_logprobs"][chat.num_tokens : -1]
    greedy = choice["logprobs"]["top_logprobs"][chat.num_tokens : -1]
    assert continuation == [max(top.values()) for top in greedy], "the model's own greedy answer"


def test_echo_without_logprobs_and_of_several_answers(web: httpx.Client) -> None:
    assert complete(web, echo=True, max_tokens=0)["choices"][0]["text"] == TEXT
    plain = complete(web, max_tokens=4)["choices"][0]["text"]
    assert [each["text"] for each in complete(web, echo=True, max_tokens=4, n=2)["choices"]] == [TEXT + plain] * 2
    both = complete(web, echo=True, logprobs=1, max_tokens=2, n=2)["choices"]
    assert both[0]["logprobs"] == both[1]["logprobs"]
    response = web.post("/v1/completions", json={"prompt": TEXT, "echo": True, "logprobs": 1, "n": 2, "stream": True})
    assert response.status_code == 400
    assert error_of(response)["param"] == "n"


def test_prompt_logprobs_in_vllms_form(web: httpx.Client, library: LLM) -> None:
    scored = expected(library, RawPrompt(TEXT))
    both = complete(web, prompt_logprobs=2, n=2, max_tokens=2)["choices"]
    for choice in both:
        check_positions(choice["prompt_logprobs"], scored)
        assert not choice["text"].startswith(TEXT)
    check_positions(complete(web, prompt_logprobs=2, max_tokens=0)["choices"][0]["prompt_logprobs"], scored)
    mixed = complete(web, prompt_logprobs=2, echo=True, logprobs=5, max_tokens=0)["choices"][0]
    check_positions(mixed["prompt_logprobs"], scored)
    assert {len(top) for top in mixed["logprobs"]["top_logprobs"][1:]} <= {5, 6}


def test_a_chat_with_a_picture_is_scored(web: httpx.Client, library: LLM) -> None:
    body = {"messages": MESSAGES, "temperature": 0, "prompt_logprobs": 2, "return_token_ids": True}
    plain = web.post(PATH, json=body | {"prompt_logprobs": None}).json()
    for _ in range(2):  # the second finds the prompt in the cache
        answer = web.post(PATH, json=body).json()
        assert answer["choices"] == plain["choices"]
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        check_positions(answer["prompt_logprobs"], expected(library, library.processor.read(MESSAGES)))
        absent = [at for at, each in enumerate(answer["prompt_logprobs"]) if each is None]
        assert absent == [0, *(at for at, token in enumerate(answer["prompt_token_ids"]) if token == -200)]
    assert "prompt_logprobs" not in plain


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt_logprobs": 1, "stream": True}, "does not go with a stream"),
        ({"prompt_logprobs": 21}, "between 0 and 20"),
        ({"prompt_logprobs": -1}, "between 0 and 20"),
        ({"prompt_logprobs": 1, "num_beams": 2, "temperature": 0}, "num_beams"),
        ({"prompt_logprobs": True}, "must be an integer"),
    ],
)
def test_what_cannot_be_scored_is_refused(web: httpx.Client, fields: dict[str, Any], words: str) -> None:
    response = web.post(PATH, json={"messages": [{"role": "user", "content": "Hi"}]} | fields)
    assert response.status_code == 400
    assert error_of(response)["param"] == "prompt_logprobs"
    assert words in error_of(response)["message"]
