"""What pydantic finds wrong, in sentences of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from llava_serve.errors import RequestError

_RULES = {
    "missing": "is required",
    "string_type": "must be a string",
    "string_unicode": "must be a text in Unicode",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "int_parsing_size": "is too large a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "model_type": "must be an object",
    "dict_type": "must be an object",
    "literal_error": "must be one of {expected}",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be {le} or less",
    "string_too_short": "must not be empty",
    "string_too_long": "must have {max_length} characters or fewer",
    "too_short": "must not be empty",
    "value_error": "{error}",  # of a validator of ours, in these words
    "too_long": "must have {max_length} items or fewer",
    # of options, which take "5" for 5
    "int_parsing": "must be an integer",
    "float_parsing": "must be a number",
    "bool_parsing": "must be true or false",
    "tuple_type": "must be a list",
    "mapping_type": "must be an object",
    "path_type": "must be a path",
    "string_pattern_mismatch": "must match the pattern {pattern}",
    "extra_forbidden": "is unknown",
    "ip_v4_network": "must be a network, such as 10.0.0.0/8",
    "ip_v6_network": "must be a network, such as 10.0.0.0/8",
}
"""By pydantic's name of a fault."""


def as_request_error(error: ValidationError, path: str = "") -> RequestError:
    """A sentence about the first fault that a validator found; `param` names the field, None the body as a whole."""
    fault = faults(error)[0]
    field = (path + field_path(fault["loc"])).removeprefix(".")
    if fault["type"] == "json_invalid":
        return RequestError("The request's body is not valid JSON.")
    if not field:
        return RequestError("The request's body must be a JSON object.")
    return RequestError(f"'{field}' {rule_of(fault)}.", field)


def option_fault(error: ValidationError) -> RequestError:
    """A sentence about the first fault of options. Of those in the members of a union, it is the innermost."""
    fault = max(faults(error), key=lambda fault: len(fault["loc"]))
    field = option_path(fault["loc"])
    return RequestError(f"{field} {rule_of(fault)}.", field)


def option_path(location: Sequence[int | str]) -> str:
    """`links[0].host`: the place of a fault without the names that pydantic gives the members of a union."""
    steps = [step for step in location if isinstance(step, int) or step.isidentifier()]
    return field_path(steps).removeprefix(".")


def field_path(location: Sequence[int | str]) -> str:
    """`.messages[0].content[1].text`, as OpenAI names fields, with a dot before a name."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location)


def faults(error: ValidationError) -> list[Mapping[str, Any]]:
    """Each fault, with neither the value, which may be a key, nor an address."""
    return list(error.errors(include_url=False, include_input=False))


def rule_of(fault: Mapping[str, Any]) -> str:
    """What a value must be, to be put behind the name of its field."""
    bounds = {name: _plain(value) for name, value in fault.get("ctx", {}).items()}
    return _RULES.get(fault["type"], "has a value that is not allowed").format(**bounds)


def _plain(bound: Any) -> Any:
    """0, where the validator says 0.0."""
    return int(bound) if isinstance(bound, float) and bound.is_integer() else bound
