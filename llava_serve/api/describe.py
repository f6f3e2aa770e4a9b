"""The API's description at `/openapi.json`. The chat request is read by hand, so its schema is put in by hand."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from llava_serve.api.protocol import ChatCompletion, ChatCompletionChunk, ChatRequest

_REF = "#/components/schemas/{model}"
_MODELS = (ChatRequest, ChatCompletion, ChatCompletionChunk)

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


def _json(model: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(model=model)}}}


def _error(description: str) -> dict[str, Any]:
    return {"description": description, "content": _json("Error")}


CHAT_DESCRIPTION: dict[str, Any] = {
    "requestBody": {"required": True, "content": _json("ChatRequest")},
    "responses": {
        "200": {
            "description": "The answer; with `stream`, events of `ChatCompletionChunk` and at last `[DONE]`.",
            "content": _json("ChatCompletion")
            | {"text/event-stream": {"schema": {"$ref": _REF.format(model="ChatCompletionChunk")}}},
        },
        "400": _error("A field, a picture or the prompt's length is at fault; the message says which."),
        "401": _error("No key, or a wrong one."),
        "404": _error("No such model."),
        "413": _error("The body is too large."),
        "429": _error("The server is full; `Retry-After` says when to try again."),
        "503": _error("The model cannot answer at present."),
        "504": _error("The request's time was up."),
    },
}


class DescribedApp(FastAPI):
    """An app whose description holds the chat API's models."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI description, made once."""
        if self.openapi_schema is None:
            schemas = super().openapi().setdefault("components", {}).setdefault("schemas", {})
            for model in _MODELS:
                schema = model.model_json_schema(ref_template=_REF)
                schemas |= schema.pop("$defs", {})
                schemas[model.__name__] = schema
            schemas["Error"] = _ERROR
        assert self.openapi_schema is not None
        return self.openapi_schema
