"""The one table from an error's class to its HTTP status and OpenAI's error body."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from llava_serve.errors import (
    AccessError,
    BodyTooLargeError,
    CapacityError,
    CheckpointError,
    DeadlineExceededError,
    DrainingError,
    EngineDeadError,
    InvalidImageError,
    LlavaServeError,
    ModelStartingError,
    NumericalError,
    PromptTooLongError,
    RateLimitError,
    RequestError,
    UnknownModelError,
    UnsupportedMediaTypeError,
    UnsupportedParameterError,
)

logger = logging.getLogger(__name__)

_REPLACED_S = 5
"""By then Serve knows that the replica is lost, and holds requests until another one runs."""


@dataclass(frozen=True, slots=True)
class WireError:
    """A class of errors over HTTP: the status, and OpenAI's `type` and `code`."""

    status: int
    type: str
    code: str

    @property
    def log_level(self) -> int:
        """A client's mistake is no warning, and what the server could not do is one."""
        return logging.WARNING if self.status >= 500 else logging.INFO


FieldName = Callable[[str | None], str | None]


def same(param: str | None) -> str | None:
    """The name itself."""
    return param


INTERNAL = WireError(500, "server_error", "internal_error")

WIRE_ERRORS: dict[type[BaseException], WireError] = {
    RequestError: WireError(400, "invalid_request_error", "invalid_value"),
    InvalidImageError: WireError(400, "invalid_request_error", "invalid_image"),
    PromptTooLongError: WireError(400, "invalid_request_error", "context_length_exceeded"),
    UnsupportedParameterError: WireError(400, "invalid_request_error", "unsupported_parameter"),
    BodyTooLargeError: WireError(413, "invalid_request_error", "request_too_large"),
    UnsupportedMediaTypeError: WireError(415, "invalid_request_error", "unsupported_media_type"),
    UnknownModelError: WireError(404, "invalid_request_error", "model_not_found"),
    AccessError: WireError(401, "invalid_request_error", "invalid_api_key"),
    CapacityError: WireError(429, "rate_limit_error", "rate_limit_exceeded"),
    RateLimitError: WireError(429, "rate_limit_error", "rate_limit_exceeded"),
    DrainingError: WireError(503, "server_error", "service_unavailable"),
    ModelStartingError: WireError(503, "server_error", "service_unavailable"),
    DeadlineExceededError: WireError(504, "timeout_error", "deadline_exceeded"),
    NumericalError: WireError(500, "server_error", "numerical_error"),
    EngineDeadError: WireError(503, "server_error", "service_unavailable"),
    # Raised while a model loads, for the operator: the message names files, so no client gets it.
    CheckpointError: INTERNAL,
    LlavaServeError: INTERNAL,
}


def wire_error(error: BaseException) -> WireError:
    """The entry of the error's class or of its nearest parent; an unexpected error is internal."""
    return next((WIRE_ERRORS[cls] for cls in type(error).__mro__ if cls in WIRE_ERRORS), INTERNAL)


def error_body(error: BaseException, request_id: str | None = None, field_name: FieldName = same) -> dict[str, Any]:
    """OpenAI's error object. An internal error reports the request's id and no more.

    Args:
        request_id: of the request.
        field_name: what the request calls a field: `Wire.field_name`.
    """
    wire = wire_error(error)
    if wire is not INTERNAL and isinstance(error, LlavaServeError):
        return openai_error(error.message, wire, field_name(error.param))
    about = f" The request's id is {request_id}." if request_id else ""
    return openai_error(f"The server failed on this request.{about}", wire)


def log_error(error: BaseException, request_id: str) -> None:
    """Logs an internal error with its traceback. Of every other one the request's line in the log says enough."""
    if wire_error(error) is INTERNAL:
        logger.error("Request %s failed.", request_id, exc_info=error)


def reported(error: Exception, request_id: str, field_name: FieldName = same) -> dict[str, Any]:
    """Logs an error, and returns the error object for the caller, as `error_body` does."""
    log_error(error, request_id)
    return error_body(error, request_id, field_name)


def openai_error(message: str, wire: WireError, param: str | None = None) -> dict[str, Any]:
    """The error object in OpenAI's exact shape."""
    return {"error": {"message": message, "type": wire.type, "param": param, "code": wire.code}}


def error_response(error: BaseException, request_id: str | None = None, field_name: FieldName = same) -> JSONResponse:
    """The whole answer to a request that failed before its first byte, with the body of `error_body`."""
    return JSONResponse(error_body(error, request_id, field_name), wire_error(error).status, _headers(error))


def _headers(error: BaseException) -> dict[str, str]:
    if isinstance(error, CapacityError):
        return {"Retry-After": str(error.retry_after_s)}
    if isinstance(error, EngineDeadError):
        return {"Retry-After": str(_REPLACED_S)}
    if isinstance(error, AccessError):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, DeadlineExceededError | NumericalError):
        # The official client would retry; but the caller's time is over, or it would get the same error.
        return {"x-should-retry": "false"}
    return {}
