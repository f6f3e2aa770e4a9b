"""Structured answers over HTTP, in OpenAI's and vLLM's spelling, also with the official client."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import httpx
import pytest
from openai import OpenAI
from pydantic import BaseModel, ConfigDict

from llava_serve.api.app import create_app
from llava_serve.api.in_process import InProcessBackend
from llava_serve.async_llm import AsyncLLM
from llava_serve.config import ApiOptions
from support.api_server import PATH, error_of, serving
from support.demo import DEMO_IMAGE, data_url

PICTURE = {"type": "image_url", "image_url": {"url": data_url(DEMO_IMAGE.read_bytes())}}
ASKED: Any = [{"role": "user", "content": [PICTURE, {"type": "text", "text": "What colour is the circle?"}]}]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["green", "blue", "red"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
NAMED: Any = {"type": "json_schema", "json_schema": {"name": "c", "strict": True, "schema": SCHEMA}}
CHOICE = ["green", "blue", "red"]
RED = {"colour": "red"}


class Circle(BaseModel):
    model_config = ConfigDict(extra="forbid")

    colour: Literal["green", "blue", "red"]
    is_round: bool


def ask(web: httpx.Client, **fields: Any) -> httpx.Response:
    return web.post(PATH, json={"messages": ASKED, "temperature": 0, "max_tokens": 60} | fields)


def answer(web: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = ask(web, **fields)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


JSON: list[dict[str, Any]] = [
    {"response_format": NAMED},
    {"response_format": {"type": "json_object", "schema": SCHEMA}},
    {"structured_outputs": {"json": SCHEMA}},
    {"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None, "json_object": False}},
    {"guided_json": SCHEMA, "guided_decoding_backend": "xgrammar"},
    {"guided_json": json.dumps(SCHEMA), "response_format": {"type": "text"}},
]


@pytest.mark.parametrize("fields", JSON, ids=range(len(JSON)))
def test_a_schema_in_every_spelling(web: httpx.Client, fields: dict[str, Any]) -> None:
    choice = answer(web, **fields)
    assert json.loads(choice["message"]["content"]) == RED
    assert choice["finish_reason"] == "stop"


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {"choice": CHOICE}}, "red"),
    ({"guided_choice": CHOICE}, "red"),
    ({"structured_outputs": {"regex": "[a-z]{3,5}"}}, "[a-z]{3,5}"),
    ({"guided_regex": "(It|The circle) is [a-z]{3,5}"}, "(It|The circle) is [a-z]{3,5}"),
    ({"structured_outputs": {"grammar": 'root ::= "the " ("red" | "blue") " one"'}}, "the (red|blue) one"),
    ({"guided_grammar": 'start: "red" | "blue"'}, "red"),
    ({"structured_outputs": {"json_object": True}}, r"\{.*"),
    ({"response_format": {"type": "json_object"}}, r"\{.*"),
]


@pytest.mark.parametrize(("fields", "form"), OTHERS, ids=range(len(OTHERS)))
def test_other_forms(web: httpx.Client, fields: dict[str, Any], form: str) -> None:
    assert re.fullmatch(form, answer(web, **fields)["message"]["content"])


def test_parse_of_the_official_client(web: httpx.Client) -> None:
    with OpenAI(base_url=f"{web.base_url}/v1", api_key="any", max_retries=0) as client:
        parsed = client.chat.completions.parse(model="builtin", messages=ASKED, temperature=0, response_format=Circle)
        assert isinstance(parsed.choices[0].message.parsed, Circle)
        assert parsed.choices[0].message.parsed.colour == "red"
        with client.chat.completions.stream(
            model="builtin", messages=ASKED, temperature=0, response_format=Circle
        ) as stream:
            assert stream.get_final_completion().choices[0].message.parsed == parsed.choices[0].message.parsed


def test_streams_choices_and_logprobs(web: httpx.Client) -> None:
    with OpenAI(base_url=f"{web.base_url}/v1", api_key="any", max_retries=0) as client:
        fields: dict[str, Any] = {"model": "builtin", "messages": ASKED, "n": 3, "temperature": 2, "seed": 1}
        whole = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2, response_format=NAMED)
        texts = {choice.index: "" for choice in whole.choices}
        for event in client.chat.completions.create(**fields, stream=True, response_format=NAMED):
            for choice in event.choices:
                texts[choice.index] += choice.delta.content or ""
    for choice in whole.choices:
        assert json.loads(choice.message.content or "")["colour"] in CHOICE
        assert choice.message.content == texts[choice.index]
        assert choice.logprobs is not None
        tokens = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content or [])
        assert tokens.decode() == choice.message.content


def test_an_answer_that_goes_on_has_the_form_from_there(web: httpx.Client) -> None:
    messages = [*ASKED, {"role": "assistant", "content": '{"colour": '}]
    choice = answer(web, messages=messages, guided_regex='"(green|blue|red)"[}]', continue_final_message=True)
    assert choice["message"]["content"] == '"red"}'


def test_length_is_reported(web: httpx.Client) -> None:
    choice = answer(web, response_format=NAMED, max_tokens=3)
    assert choice["finish_reason"] == "length"


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": NAMED, "guided_choice": CHOICE}, "guided_choice", "not both"),
    ({"structured_outputs": {"choice": CHOICE, "regex": "a"}}, "structured_outputs.choice", "not both"),
    ({"structured_outputs": {"json": 3}}, "structured_outputs.json", "must be an object"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "needs the schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format.json_schema",
        "needs",
    ),
    ({"response_format": {"type": "structural_tag"}}, "response_format.type", "must be one of"),
    ({"response_format": NAMED | {"type": "json_object"}}, "response_format.type", "must be json_schema"),
    ({"guided_regex": 3}, "guided_regex", "text"),
    ({"guided_choice": "red"}, "guided_choice", "list of texts"),
    ({"guided_choice": CHOICE, "num_beams": 2}, "num_beams", "structured output"),
    ({"guided_choice": CHOICE, "ignore_eos": True}, "ignore_eos", "structured output"),
]


@pytest.mark.parametrize(("fields", "param", "sentence"), WRONG, ids=range(len(WRONG)))
def test_what_is_refused(web: httpx.Client, fields: dict[str, Any], param: str, sentence: str) -> None:
    response = ask(web, **fields)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param)
    assert sentence in error["message"]


NOT: dict[str, Any] = {"not": {}}
BAD: list[tuple[str, dict[str, Any]]] = [
    ("guided_json", {"guided_json": NOT}),
    ("guided_regex", {"guided_regex": "(?=a)"}),
    ("guided_grammar", {"guided_grammar": "start: ("}),
    ("structured_outputs.json", {"structured_outputs": {"json": NOT}}),
    ("structured_outputs.regex", {"structured_outputs": {"regex": "("}}),
    ("structured_outputs.grammar", {"structured_outputs": {"grammar": "start: ("}}),
    ("response_format", {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": NOT}}}),
    ("response_format", {"response_format": {"type": "json_object", "schema": NOT}}),
]


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_compiler_refuses_is_a_400_that_names_the_field(web: httpx.Client, stream: bool) -> None:
    for param, fields in BAD:
        response = ask(web, stream=stream, **fields)
        assert response.status_code == 400
        error = error_of(response)
        assert error["message"].startswith("The ")
        assert (error["param"], error["code"]) == (param, "invalid_value")
    completion = web.post("/v1/completions", json={"prompt": "Hi", "guided_json": NOT, "stream": stream})
    assert error_of(completion)["param"] == "guided_json"
    text = {"format": {"type": "json_schema", "name": "a", "schema": NOT}}
    response = web.post("/v1/responses", json={"input": "Hi", "text": text, "stream": stream})
    assert error_of(response)["param"] == "text.format"
    assert "not supported: not" in error_of(response)["message"]


def test_ignored_fields_are_no_forms(llm: AsyncLLM) -> None:
    app = create_app(InProcessBackend(llm), ApiOptions(unknown_fields="ignore"))
    with serving(app) as url, httpx.Client(base_url=url, timeout=60) as web:
        assert answer(web, guided_choice=CHOICE)["message"]["content"] == "red"
        unknown = {"type": "json_object", "pattern": "a"}
        assert error_of(ask(web, response_format=unknown))["param"] == "response_format.pattern"


def test_the_responses_api_keeps_to_a_schema(web: httpx.Client) -> None:
    content: Any = [
        {"type": "input_image", "image_url": data_url(DEMO_IMAGE.read_bytes())},
        {"type": "input_text", "text": "What colour is the circle?"},
    ]
    asked: Any = {"model": "builtin", "input": [{"role": "user", "content": content}], "temperature": 0}
    with OpenAI(base_url=f"{web.base_url}/v1", api_key="any", max_retries=0) as client:
        response = client.responses.parse(**asked, text_format=Circle, max_output_tokens=60)
    assert response.output_parsed is not None
    assert response.output_parsed.colour == "red"
    assert response.text is not None
    assert response.text.format is not None
    assert response.text.format.type == "json_schema"
