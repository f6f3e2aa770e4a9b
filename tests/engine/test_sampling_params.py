"""Ranges of the sampling fields: no accepted value overflows."""

from __future__ import annotations

from typing import Any

import pytest

from llava_serve.errors import RequestError
from llava_serve.sampling_params import SamplingParams

FLOATS = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
REFUSED: list[tuple[str, Any]] = [
    *((name, value) for name in FLOATS for value in (float("nan"), float("inf"), -float("inf"), 1e308, "1", None)),
    ("temperature", -1e-300),
    ("temperature", 100.1),
    ("top_p", 0),
    ("top_p", 1.0001),
    ("top_k", -1),
    ("top_k", 2.0),
    ("top_k", float("inf")),
    ("max_new_tokens", 0),
    ("max_new_tokens", 1e3),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("seed", 0.5),
    ("n", 0),
    ("n", 129),
    ("num_beams", 65),
    ("logprobs", -1),
    ("logprobs", 21),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 1e-308),
    ("repetition_penalty", 0.009),
    ("repetition_penalty", 10.1),
    ("stop", ["a"]),
    ("stop", ("",)),
    ("stop", (1,)),
    ("min_p", 1.01),
    ("min_tokens", -1),
    ("min_tokens", 513),
    ("stop_token_ids", [1]),
    ("stop_token_ids", (-1,)),
    ("logit_bias", {1: 100.1}),
    ("logit_bias", {1: float("nan")}),
    ("logit_bias", {"1": 1}),
]
ACCEPTED: list[tuple[str, Any]] = [
    ("temperature", 1e-300),
    ("temperature", 100),
    ("top_p", 1e-300),
    ("top_p", 1),
    ("top_k", 10**400),
    ("max_new_tokens", 10**400),
    ("seed", 2**63 - 1),
    ("seed", -(2**63)),
    ("repetition_penalty", 0.01),
    ("min_tokens", 512),
    ("logit_bias", {0: -100, 1: 100.0}),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_values_outside_the_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} must be ") as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(("name", "value"), ACCEPTED)
def test_values_inside_the_range_are_accepted(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize("value", [10**4000, -(10**4000), "9" * 10**6], ids=["long", "negative", "text"])
def test_a_message_truncates_a_long_value(value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(n=value)
    shown = repr(value) if isinstance(value, str) else str(value)  # "5" is no 5
    assert str(caught.value) == f"n must be a whole number between 1 and 128; got {shown[:100]}."


def test_beams_need_a_greedy_temperature() -> None:
    assert SamplingParams(temperature=1e-6, num_beams=2).greedy
    with pytest.raises(RequestError, match="num_beams"):
        SamplingParams(temperature=1e-4, num_beams=2)
