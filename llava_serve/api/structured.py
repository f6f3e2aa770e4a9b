"""The form that a request asks for: OpenAI's `response_format`, vLLM's `structured_outputs` and `guided_*`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from llava_serve.errors import RequestError
from llava_serve.structured_output import StructuredOutput
from llava_serve.wire import Wire, anything

GUIDED = ("json", "regex", "choice", "grammar")


class JsonSchema(Wire):
    """A schema.

    Attributes:
        name, description: accepted and ignored.
        json_schema: a JSON schema.
        strict: accepted and ignored, since the answer keeps to the schema in any case.
    """

    name: str | None = None
    description: str | None = None
    json_schema: Any = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Wire):
    """OpenAI's `response_format`.

    Attributes:
        type: `text` asks for nothing.
        json_schema: goes with the type of this name.
        object_schema: a JSON schema beside the type `json_object`. llama.cpp's.
    """

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    object_schema: Any = Field(default=None, alias="schema")


class StructuredOutputs(Wire):
    """vLLM's `structured_outputs`: one of its fields.

    Attributes:
        json_schema: a JSON schema, as an object or as text.
        regex: a regular expression that the whole answer matches.
        choice: a list of texts, one of which is the answer.
        grammar: in Lark's or GBNF's notation.
        json_object: the answer is a JSON object.
    """

    NEUTRAL = {"_backend": anything, "disable_any_whitespace": anything}  # noqa: RUF012 (a ClassVar of the base)

    json_schema: Any = Field(default=None, alias="json")
    regex: Any = None
    choice: Any = None
    grammar: Any = None
    json_object: bool | None = None


def structured_output(
    response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None, guided: Mapping[str, Any]
) -> StructuredOutput | None:
    """The form that a request asks for.

    Args:
        guided: by the names in `GUIDED`, without their prefix.

    Raises:
        RequestError: it asks for several, or for one that is malformed; `param` names the field.
    """
    asked = [*_of_format(response_format), *_of_fields(structured_outputs, guided)]
    if len(asked) > 1:
        (one, *_), (other, *_) = asked[:2]
        raise RequestError(f"Give {one} or {other}, not both: an answer has one form.", other)
    for path, kind, value in asked:
        try:
            form: dict[str, Any] = {kind: tuple(value) if isinstance(value, list) else value}
            return StructuredOutput(**form, param=path)
        except RequestError as error:
            raise RequestError(error.message, path) from None
    return None


def _of_format(given: ResponseFormat | None) -> Iterator[tuple[str, str, Any]]:
    if given is None:
        return
    schema = given.object_schema
    if given.type == "json_schema":
        if given.json_schema is None or given.json_schema.json_schema is None:
            raise RequestError(
                "response_format of the type json_schema needs the schema: "
                '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}.',
                "response_format.json_schema",
            )
        schema = given.json_schema.json_schema
    elif given.json_schema is not None or (schema is not None and given.type == "text"):
        raise RequestError("response_format has a schema, so its type must be json_schema.", "response_format.type")
    if schema is not None:
        yield "response_format", "json", schema
    elif given.type == "json_object":
        yield "response_format", "json_object", True


def _of_fields(given: StructuredOutputs | None, guided: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    if given is not None:
        for kind in (*GUIDED, "json_object"):
            value = getattr(given, "json_schema" if kind == "json" else kind)
            if value not in (None, False):
                yield f"structured_outputs.{kind}", kind, value
    for kind, value in guided.items():
        if value is not None:
            yield f"guided_{kind}", kind, value
