"""What a validator finds wrong with a value, in our words: pydantic's own are for programmers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from llava_serve.errors import RequestError

Model = TypeVar("Model", bound=BaseModel)

_RULES = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "extra_forbidden": "is unknown",
    "finite_number": "must be a finite number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be {ge} or more",
    "int_from_float": "must be an integer",
    "int_parsing": "must be an integer",
    "int_parsing_size": "is too large a number",
    "int_type": "must be an integer",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be {le} or less",
    "list_type": "must be a list",
    "literal_error": "must be one of {expected}",
    "missing": "is required",
    "model_type": "must be an object",
    "string_too_long": "must have {max_length} characters or fewer",
    "string_too_short": "must not be empty",
    "string_type": "must be a string",
    "too_long": "must have {max_length} items or fewer",
    "too_short": "must not be empty",
    "tuple_type": "must be a list",
    "value_error": "{error}",  # of a validator of ours, in these words
}


def faults(error: ValidationError) -> list[Mapping[str, Any]]:
    """Each fault, with neither the value, which may be a key, nor an address."""
    return list(error.errors(include_url=False, include_input=False))


def rule_of(fault: Mapping[str, Any]) -> str:
    """What the value must be, to be put behind the name of its field."""
    bounds = {name: _plain(value) for name, value in fault.get("ctx", {}).items()}
    return _RULES.get(fault["type"], "has a value that is not allowed").format(**bounds)


def option_path(location: Sequence[int | str]) -> str:
    """Where an option stands: `engine.max_num_seqs`, `probe.0.image`."""
    return ".".join(map(str, location))


def validated(kind: type[Model], values: Mapping[str, Any]) -> Model:
    """The options with these values.

    Raises:
        RequestError: one is unknown or has a wrong value; the sentence names it, without its value.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        fault = faults(error)[0]
        path = option_path(fault["loc"])
        raise RequestError(f"{path} {rule_of(fault)}.", path) from None


def _plain(bound: Any) -> Any:
    """0, where the validator says 0.0."""
    return int(bound) if isinstance(bound, float) and bound.is_integer() else bound
