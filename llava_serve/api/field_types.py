"""Types of a request's fields, with the spellings of a value that clients have."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

MAX_STOPS = 16
"""OpenAI allows 4; each is searched for at every token, so their number is limited."""
MAX_TOKEN_IDS = 1024
"""Of `logit_bias` and `stop_token_ids`: the work for them is done at every token."""


def _without_empty(stop: Any) -> Any:
    """A list. An empty string stops nothing."""
    given = [stop] if isinstance(stop, str) else stop
    return [each for each in given if each != ""] if isinstance(given, list) else given


def _whole(number: Any) -> Any:
    """JSON has one kind of number: 64.0 is 64."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _unless_empty_list(bias: Any) -> Any:
    """An empty list is llama.cpp's spelling of no bias."""
    return None if bias == [] else bias


def _unless_minus_one(number: Any) -> Any:
    """-1 is llama.cpp's and vLLM's spelling of an absent limit or seed."""
    return None if number == -1 and not isinstance(number, bool) else _whole(number)


Integer = Annotated[int, BeforeValidator(_whole, json_schema_input_type=int)]

_ABSENT = BeforeValidator(_unless_minus_one, json_schema_input_type=int | None)
AnyLimit = Annotated[int | None, _ABSENT]
Limit = Annotated[Annotated[int, Field(ge=1)] | None, _ABSENT]
LimitFromZero = Annotated[Annotated[int, Field(ge=0)] | None, _ABSENT]
Seed = Annotated[Annotated[int, Field(ge=-(2**63), lt=2**63)] | None, _ABSENT]

_Stops = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS, fail_fast=True)]
Stops = Annotated[_Stops | None, BeforeValidator(_without_empty, json_schema_input_type=str | _Stops | None)]

_Bias = Annotated[dict[str, float], Field(max_length=MAX_TOKEN_IDS)]
Bias = Annotated[_Bias | None, BeforeValidator(_unless_empty_list, json_schema_input_type=_Bias | None)]
TokenIds = Annotated[list[Integer], Field(max_length=MAX_TOKEN_IDS, fail_fast=True)]
