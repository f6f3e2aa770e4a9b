"""What the web app accepts, and what it refuses: by name, in OpenAI's shape, over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from support.api_server import PICTURE, QUESTION, PacedBackend, app_over, ask_paced, error_of


@pytest.fixture(scope="module")
def backend() -> PacedBackend:
    return PacedBackend()


@pytest.fixture(scope="module")
def web(backend: PacedBackend) -> Iterator[httpx.Client]:
    with app_over(backend, default_timeout_s=50, max_timeout_s=70) as web:
        yield web


NEUTRAL: list[dict[str, Any]] = [
    {"tools": []},
    {"tools": None},
    {"tool_choice": "none"},
    {"parallel_tool_calls": True},
    {"response_format": {"type": "text"}},
    {"logit_bias": {}},
    {"store": False},
    {"metadata": {"team": "a"}},
    {"modalities": ["text"]},
    {"service_tier": "auto"},
    {"user": "somebody"},
    {"stop": None, "seed": None, "n": None, "temperature": None, "max_tokens": None, "logprobs": None},
    {"something_new": None},
    {"logprobs": False, "top_logprobs": 0},
    {"stream_options": {"include_usage": False}},
    {"messages": [{"role": "user", "content": [{**PICTURE, "image_url": {**PICTURE["image_url"], "detail": "auto"}}]}]},
    {"messages": [{"role": "user", "content": [{**PICTURE, "image_url": {**PICTURE["image_url"], "detail": "low"}}]}]},
    {"messages": [{**QUESTION, "name": "Ann"}]},
    {"messages": [{"role": "assistant", "content": "A.", "refusal": None, "tool_calls": None}, QUESTION]},
    {"top_k": -1},
    {"seed": -1, "max_tokens": -1, "n_predict": -1},
    {"min_p": 0, "typical_p": 1.0, "best_of": 1, "mirostat": 0, "repeat_penalty": 1},
    {"max_tokens": 64.0, "n": 1.0, "seed": 3.0, "top_logprobs": 0.0},
    {"stop": ""},
    {"stop": ["", "\n"]},
    {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
    {"functions": [{"name": "f"}], "function_call": "none"},
    {"skip_special_tokens": True, "detokenize": True, "spaces_between_special_tokens": False},
    {"something_new": False, "something_else": {}, "and_more": [], "and_this": ""},
    {"add_generation_prompt": True, "continue_final_message": False, "return_token_ids": False},
    {"chat_template_kwargs": {"enable_thinking": False, "tools": None}},
    {"session_id": "s", "cache_prompt": False, "keep_alive": "5m"},
    {"stop_token_ids": [], "logit_bias": {}, "min_tokens": 0, "include_stop_str_in_output": False},
    {"stream_options": {"include_usage": False, "continuous_usage_stats": False}},
    {"logit_bias": [], "repeat_last_n": 64, "id_slot": -1, "t_max_predict_ms": 0, "top_n_sigma": -1},
    {"dry_multiplier": 0, "dry_base": 1.75, "dry_allowed_length": 2, "dry_sequence_breakers": ["\n"]},
    {"dynatemp_range": 0, "dynatemp_exponent": 1, "xtc_probability": 0, "xtc_threshold": 0.1, "mirostat_tau": 5},
    {"use_beam_search": False, "length_penalty": 1.0, "bad_words": [], "include_reasoning": True, "echo": False},
    {
        "return_weight_versions": False,
        "routed_experts_prompt_start": 0,
        "mm_payload": "tensors",
        "add_special_tokens": False,
    },
    {"separate_reasoning": True, "stream_reasoning": True, "reasoning_format": "auto", "thinking_token_budget": 0},
    {"prediction": {"type": "content", "content": "A red circle."}, "thinking": {"type": "disabled"}},
    {"messages": [{**QUESTION, "id": "m1", "cache_control": {"type": "ephemeral"}}]},
    {"messages": [{"role": "user", "content": [{**PICTURE, "uuid": "u", "modalities": "image", "format": "png"}]}]},
    {"messages": [{"role": "user", "content": [{**PICTURE, "text": "", "image": None}]}]},
    {"messages": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,", "detail": "auto"}]}]},
    {"messages": [{"role": "user", "content": [{**PICTURE, "image_url": {"url": "data:,", "format": "png"}}]}]},
]


@pytest.mark.parametrize("fields", NEUTRAL, ids=lambda fields: ",".join(fields))
def test_a_field_at_its_neutral_value_is_accepted(web: httpx.Client, fields: dict[str, Any]) -> None:
    response = ask_paced(web, **fields)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == "A red circle."


ASKING: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tools": [{"type": "function"}], "tool_choice": "auto"}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"skip_special_tokens": False}, "skip_special_tokens"),
    ({"typical_p": True}, "typical_p"),
    ({"dry_multiplier": 0.8, "dry_base": 1.75}, "dry_multiplier"),
    ({"thinking": {"type": "enabled"}}, "thinking"),
    ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
    ({"echo": True}, "echo"),
    ({"something_new": 0}, "something_new"),
    ({"response_format": {"type": "json_object", "name": "a"}}, "response_format.name"),
    ({"structured_outputs": {"regex": "a", "structural_tag": "b"}}, "structured_outputs.structural_tag"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
    ({"store": True}, "store"),
    ({"store": 0}, "store"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"temprature": 0}, "temprature"),
    ({"stream": True, "stream_options": {"interval": 5}}, "stream_options.interval"),
    ({"messages": [{**QUESTION, "reasoning_content": "1"}]}, "messages[0].reasoning_content"),
    (
        {"messages": [{"role": "user", "content": [{**PICTURE, "image_url": {"url": "data:,", "crop": "left"}}]}]},
        "messages[0].content[0].image_url.crop",
    ),
]


@pytest.mark.parametrize(("fields", "param"), ASKING, ids=[param for _, param in ASKING])
def test_a_field_that_is_not_supported_is_refused_by_name(
    web: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    response = ask_paced(web, **fields)
    error = error_of(response)
    assert response.status_code == 400
    assert error["code"] == "unsupported_parameter"
    assert error["param"] == param
    assert param in error["message"]


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "'messages' must not be empty."),
    ({"messages": "hello"}, "messages", "'messages' must be a list."),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "'messages[0].role' is required."),
    ({"messages": [{**QUESTION, "name": 5}]}, "messages[0].name", "'messages[0].name' must be a string."),
    (
        {"messages": [{"role": "user", "content": [{**PICTURE, "image_url": {"url": "data:,", "detail": "more"}}]}]},
        "messages[0].content[0].image_url.detail",
        "'messages[0].content[0].image_url.detail' must be one of 'auto', 'low', 'high' or 'original'.",
    ),
    (
        {"messages": [{"role": "user", "content": 5}]},
        "messages[0].content",
        "'messages[0].content' must be a text or a list of parts.",
    ),
    ({"temperature": "hot"}, "temperature", "'temperature' must be a number."),
    ({"temperature": -1}, "temperature", "temperature must be between 0 and 100; got -1.0."),
    ({"top_p": -0.1}, "top_p", "top_p must be above 0 and at most 1; got -0.1."),
    ({"min_p": 2}, "min_p", "min_p must be between 0 and 1; got 2.0."),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "min_tokens must be at most the longest answer; got 9."),
    ({"logit_bias": [1]}, "logit_bias", "'logit_bias' must be an object."),
    ({"logit_bias": {"a": 1}}, "logit_bias", "The keys of logit_bias must be token ids."),
    (
        {"logit_bias": {"1": 101}},
        "logit_bias",
        "logit_bias must be numbers within 100 by token id; got {1: 101.0}.",
    ),
    (
        {"stop_token_ids": [-1]},
        "stop_token_ids",
        "stop_token_ids must be token ids, whole numbers from 0 on; got (-1,).",
    ),
    (
        {"request_id": "a b"},
        "request_id",
        "request_id must be 1 to 128 letters, digits and marks out of _ . : / + = @ -.",
    ),
    ({"max_tokens": 0}, "max_tokens", "'max_tokens' must be 1 or more."),
    ({"max_tokens": 1.5}, "max_tokens", "'max_tokens' must be an integer."),
    ({"n": True}, "n", "'n' must be an integer."),
    ({"stop": ["a", 5]}, "stop[1]", "'stop[1]' must be a string."),
    ({"stop": ["a"] * 17}, "stop", "'stop' must have 16 items or fewer."),
    ({"seed": 2**70}, "seed", "'seed' must be below 9223372036854775808."),
    ({"timeout": 0}, "timeout", "'timeout' must be above 0."),
    ({"top_logprobs": 3}, "top_logprobs", "top_logprobs needs logprobs to be true."),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options needs stream to be true."),
    (
        {"max_tokens": 5, "max_completion_tokens": 6},
        "max_completion_tokens",
        "Give max_tokens or max_completion_tokens, not both.",
    ),
    (
        {"messages": [{"role": "robot", "content": "x"}]},
        "messages[0].role",
        "'messages[0].role' must be one of 'system', 'developer', 'user', 'assistant', 'tool' or 'function'.",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "messages[0].content[0].type",
        "'messages[0].content[0].type' must be one of 'text', 'input_text', 'output_text', 'refusal', 'image_url', "
        "'input_image' or 'image'.",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
        "messages[0].content[0]",
        "messages[0].content[0] must hold 'image_url', as its type says, and nothing else.",
    ),
    (
        {"messages": [{"role": "user", "content": [{**PICTURE, "text": "x"}]}]},
        "messages[0].content[0]",
        "messages[0].content[0] must hold 'image_url', as its type says, and nothing else.",
    ),
]


@pytest.mark.parametrize(("fields", "param", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_a_wrong_field_is_named_in_a_sentence(
    web: httpx.Client, fields: dict[str, Any], param: str, message: str
) -> None:
    response = ask_paced(web, **fields)
    assert response.status_code == 400
    assert error_of(response) == {
        "message": message,
        "type": "invalid_request_error",
        "param": param,
        "code": "invalid_value",
    }


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"model": "\\ud800"}', b"[" * 10_000])
def test_a_body_that_is_no_json_is_refused(web: httpx.Client, body: bytes) -> None:
    response = web.post("/v1/chat/completions", content=body)
    assert response.status_code == 400
    assert error_of(response)["message"] == "The request's body is not valid JSON."


def test_json_that_is_no_object_is_refused(web: httpx.Client) -> None:
    response = web.post("/v1/chat/completions", content=b"[]")
    assert response.status_code == 400
    assert error_of(response)["message"] == "The request's body must be a JSON object."
