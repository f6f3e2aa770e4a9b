"""Writes the reference of the requests' fields and of the errors, from their types.

python -m deployments.tools.request_reference > docs/fields.md
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llava_serve.api.errors import INTERNAL, WIRE_ERRORS
from llava_serve.api.neutral import NEUTRAL_FIELDS
from llava_serve.api.protocol import ChatRequest, GenerationFields, StreamOptions
from llava_serve.api.responses_protocol import ResponseRequest
from llava_serve.api.structured import JsonSchema, ResponseFormat, StructuredOutputs
from llava_serve.api.text_completion import CompletionRequest
from llava_serve.api.tokenization import DetokenizeRequest, TokenizeRequest
from llava_serve.openai_messages import Part, WireMessage
from llava_serve.sampling_params import RANGES, SamplingParams
from llava_serve.wire import anything

from .config_reference import attribute_docs

INTRODUCTION = """# Fields and errors

<!-- Written by `python -m deployments.tools.request_reference > docs/fields.md`; a test compares. -->

Every field of every request, with its values and its default; [Requests](api.md) explains them, and `/openapi.json` has
the answers, too. JSON types are strict ("5" is no number), and null is the same as an absent field, which asks for
nothing where no default stands.
"""

PARTS: tuple[tuple[str, type[BaseModel], type[BaseModel] | None], ...] = (
    ("Every request for an answer", GenerationFields, None),
    ("/v1/chat/completions", ChatRequest, GenerationFields),
    ("/v1/completions", CompletionRequest, GenerationFields),
    ("/v1/responses", ResponseRequest, ChatRequest),
    ("/tokenize", TokenizeRequest, ChatRequest),
    ("/detokenize", DetokenizeRequest, None),
    ("A message", WireMessage, None),
    ("A part of a message", Part, None),
    ("stream_options", StreamOptions, None),
    ("response_format", ResponseFormat, None),
    ("response_format.json_schema", JsonSchema, None),
    ("structured_outputs", StructuredOutputs, None),
)
"""A heading, the type, and the type whose fields it has beside its own, some or all."""

_RULES = {name: rule for name, *_, rule in RANGES if name != "logprobs"}  # a boolean in chats
_RULES["top_p"] = "between 0 and 1"  # over HTTP, 0 takes the likeliest token
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(SamplingParams) if field.default is not None}


def main() -> int:
    """Prints the page."""
    sys.stdout.write(page())
    return 0


def page() -> str:
    """The page, in Markdown."""
    parts = [line for part in PARTS for line in _part(*part)]
    return "\n".join([INTRODUCTION, *parts, *_neutral(), *_errors(), ""])


def _part(title: str, kind: type[BaseModel], base: type[BaseModel] | None) -> Iterator[str]:
    yield f"## {title}\n"
    yield "| field | values | default | |\n|---|---|---|---|"
    own = attribute_docs(kind)
    meanings = {**attribute_docs(GenerationFields), **attribute_docs(ChatRequest), **own}
    values = _values_of(kind)
    inherited = [name for name in kind.model_fields if base and name in base.model_fields and name not in own]
    rows = [
        (field.alias or name, f"{values[name]} | {_default(name, field)} | {meanings[name]} |")
        for name, field in kind.model_fields.items()
        if name not in inherited
    ]
    for rest, same in groupby(rows, lambda row: row[1]):  # neighbours with one meaning
        yield f"| {_list([name for name, _ in same])} | {rest}"
    yield ""
    if base is not None:
        above = next(title for title, each, _ in PARTS if each is base)
        which = "all fields" if issubclass(kind, base) else _list(inherited)
        yield f"And {which} of [{above}](#{_anchor(above)}).\n"


def _default(name: str, field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = _DEFAULTS.get(name, ())
    return "" if value == () else f"`{str(value).lower()}`"


def _values_of(kind: type[BaseModel]) -> dict[str, str]:
    """What each field takes, in words. A validator hides the bounds of what it passes on from the schema of what comes
    in; the schema of what comes out has them."""
    accepted, kept = kind.model_json_schema(), kind.model_json_schema(mode="serialization")
    words = {}
    for name, field in kind.model_fields.items():
        word, exact = (_values(schema["properties"][field.alias or name]) for schema in (accepted, kept))
        words[name] = _RULES.get(name, exact if exact.startswith(word) else word)
    return words


def _values(schema: Mapping[str, Any]) -> str:
    """What a JSON schema takes, in words."""
    if kinds := schema.get("anyOf"):
        return " or ".join(_values(each) for each in kinds if each.get("type") != "null")
    if "$ref" in schema:
        return "object"
    if choices := schema.get("enum", [schema["const"]] if "const" in schema else None):
        return ", ".join(f"`{each}`" for each in choices)
    kind = schema.get("type", "any")
    names = {"string": "text", "boolean": "`true`, `false`"}
    words = f"list of {_values(schema['items'])}" if kind == "array" else names.get(kind, kind)
    return words + "".join(_bounds(schema))


def _bounds(schema: Mapping[str, Any]) -> Iterator[str]:
    """The limits of a JSON schema. pydantic writes those of a type with a validator by its own names."""
    least, greatest = (schema.get(new, schema.get(old)) for new, old in (("minimum", "ge"), ("maximum", "le")))
    if least is not None:
        yield f", {least} to {greatest}" if greatest is not None else f", {least} or more"
    if "exclusiveMinimum" in schema:
        yield f", above {schema['exclusiveMinimum']}"
    if "maxLength" in schema:
        yield f" of at most {schema['maxLength']:,} characters"
    most = schema.get("maxItems", schema.get("maxProperties"))
    if most is not None:
        yield f", at most {most:,}"


def _neutral() -> Iterator[str]:
    labels = [name for name, rule in NEUTRAL_FIELDS.items() if rule is anything]
    others = sorted(NEUTRAL_FIELDS.keys() - labels)
    yield "## Fields that change nothing\n"
    yield f"Accepted with any value: {_list(sorted(labels))}; those on tools as [Requests](api.md#fields) says.\n"
    yield f"Accepted with the value that asks for nothing: {_list(others)}.\n"


def _list(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _errors() -> Iterator[str]:
    yield "## Errors\n"
    yield (
        "The body of an error is OpenAI's: `error` with `message`, `type`, `param` and `code`. The library and\n"
        "`LlavaClient` raise the class of the same row, whose `param` names the field, too.\n"
    )
    yield "| status | `code` | `type` | class | |\n|---|---|---|---|---|"
    for kind, wire in sorted(WIRE_ERRORS.items(), key=lambda each: each[1].status):
        if wire is not INTERNAL:
            about, *_ = re.split(r"(?<=\.)\s", kind.__doc__ or "")
            yield f"| {wire.status} | `{wire.code}` | `{wire.type}` | `{kind.__name__}` | {about} |"
    about = "Anything else: the message has the request's id and no more."
    yield f"| {INTERNAL.status} | `{INTERNAL.code}` | `{INTERNAL.type}` | | {about} |"


def _anchor(title: str) -> str:
    return title.lower().replace("/", "").replace(" ", "-")


if __name__ == "__main__":
    raise SystemExit(main())
