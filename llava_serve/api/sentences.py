"""From the validator's findings to one sentence that names the field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

_RULES = {
    "missing": "is required",
    "string_type": "must be a string",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "int_parsing_size": "is too large a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "model_type": "must be an object",
    "literal_error": "must be one of {expected}",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be {le} or less",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "too_long": "must have {max_length} items or fewer",
}


def sentence(error: ValidationError) -> tuple[str, str | None]:
    """A sentence about the first fault, and the name of its field (None where the body as a whole is at fault)."""
    fault = error.errors(include_url=False, include_input=False)[0]
    path = field_path(fault["loc"])
    if fault["type"] == "json_invalid":
        return "The request's body is not valid JSON.", None
    if not path:
        return "The request's body must be a JSON object.", None
    rule = _RULES.get(fault["type"], "has a value that is not allowed")
    bounds = {name: _plain(value) for name, value in fault.get("ctx", {}).items()}
    return f"'{path}' {rule.format(**bounds)}.", path


def field_path(location: Sequence[int | str]) -> str:
    """`messages[0].content[1].text`, as OpenAI names fields."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in location)
    return "".join(steps).removeprefix(".")


def _plain(bound: Any) -> Any:
    """0, where the validator says 0.0."""
    return int(bound) if isinstance(bound, float) and bound.is_integer() else bound
