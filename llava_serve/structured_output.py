"""What form an answer is to have. Plain values: they travel with the sampling parameters."""

from __future__ import annotations

import json as json_module
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llava_serve.errors import RequestError

Kind = Literal["json", "regex", "choice", "grammar", "json_object"]

_MAX_TEXT: Mapping[Kind, int] = {"json": 64 << 10, "regex": 4 << 10, "choice": 16 << 10, "grammar": 8 << 10}
"""Characters. Compiling what is longer may take seconds; a chain of some thousand rules ends the compiler's process."""
_MAX_DEPTH = 100
_MAX_REFERENCES = 256
_MAX_CHOICES = 1024
_WORDS: Mapping[Kind, str] = {"json": "JSON schema", "regex": "regular expression", "grammar": "grammar"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """The form of an answer: exactly one of the fields is given.

    Attributes:
        json: a JSON schema, as an object or its text; kept as text.
        regex: a regular expression that the whole answer matches; no look-around, no back-references.
        choice: the answers to choose from.
        grammar: a context-free grammar, as Lark or as GBNF.
        json_object: any JSON object.
        param: the caller's name for the form, in errors; it is none of the fields above.

    Raises:
        RequestError: none or several are given, or one is malformed, too long or too deep.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool = False
    param: str = field(default="structured", compare=False)

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise RequestError(
                "Structured output is exactly one of json, regex, choice, grammar and json_object; "
                f"got {' and '.join(given) or 'none'}.",
                self.param,
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        elif self.choice is not None:
            _check_choice(self.choice)
        elif self.kind == "json_object":
            if self.json_object is not True:
                raise RequestError("json_object must be true or false.", "json_object")
        else:
            _check_text(self.kind, getattr(self, self.kind))

    @property
    def kind(self) -> Kind:
        """The field that is given."""
        return next(name for name in _KINDS if getattr(self, name) not in (None, False))

    @property
    def text(self) -> str:
        """What is given, as text: `choice` as a JSON list."""
        value = getattr(self, self.kind)
        return value if isinstance(value, str) else json_module.dumps(value)


_KINDS: tuple[Kind, ...] = ("json", "regex", "choice", "grammar", "json_object")


def _check_text(kind: Kind, text: Any) -> None:
    if not isinstance(text, str) or not text:
        raise RequestError(f"{kind} must be a text that is not empty.", kind)
    if len(text) > _MAX_TEXT[kind]:
        raise RequestError(f"The {_WORDS[kind]} must have at most {_MAX_TEXT[kind]:,} characters.", kind)
    depth = 0
    for bracket in re.findall(r"[(\[{)\]}]", text):
        depth += 1 if bracket in "([{" else -1
        if depth > _MAX_DEPTH:
            raise _too_deep(kind)


def _too_deep(kind: Kind) -> RequestError:
    return RequestError(f"The {_WORDS[kind]} is nested more than {_MAX_DEPTH} deep.", kind)


def _check_choice(choice: Any) -> None:
    if not isinstance(choice, tuple) or not choice or not all(isinstance(each, str) and each for each in choice):
        raise RequestError("choice must be a list of texts that are not empty.", "choice")
    if len(choice) > _MAX_CHOICES or sum(map(len, choice)) > _MAX_TEXT["choice"]:
        raise RequestError(
            f"choice must have at most {_MAX_CHOICES:,} texts of {_MAX_TEXT['choice']:,} characters in all.", "choice"
        )


def _schema_text(given: Any) -> str:
    """The text of a schema, checked."""
    try:
        schema = json_module.loads(given) if isinstance(given, str) else given
        text = given if isinstance(given, str) else json_module.dumps(given, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise _too_deep("json") from None
    except (TypeError, ValueError):
        raise RequestError("The JSON schema is not valid JSON.", "json") from None
    if not isinstance(schema, Mapping):
        raise RequestError("The JSON schema must be an object.", "json")
    if len(text) > _MAX_TEXT["json"]:
        raise RequestError(f"The JSON schema must have at most {_MAX_TEXT['json']:,} characters.", "json")
    _check_schema(schema)
    return text


def _check_schema(schema: Any) -> None:
    """Refuses what the compiler takes too long for, or fails at with its whole process."""
    level, depth, references, pattern = [schema], 0, 0, 0
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            raise _too_deep("json")
        deeper: list[Any] = []
        for each in level:
            if isinstance(each, Mapping):
                references += "$ref" in each
                patterns = (each.get("pattern"), *_keys(each.get("patternProperties")))
                pattern += sum(len(one) for one in patterns if isinstance(one, str))
                deeper += each.values()
            elif isinstance(each, list | tuple):
                deeper += each
        level = deeper
    if references > _MAX_REFERENCES:
        raise RequestError(f"The JSON schema must have at most {_MAX_REFERENCES} references ($ref).", "json")
    if pattern > _MAX_TEXT["regex"]:
        raise RequestError(
            f"The patterns of the JSON schema must have at most {_MAX_TEXT['regex']:,} characters in all.", "json"
        )


def _keys(given: Any) -> tuple[Any, ...]:
    return tuple(given) if isinstance(given, Mapping) else ()
