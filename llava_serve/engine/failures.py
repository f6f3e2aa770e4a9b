"""What a failure of one sequence becomes: the error of its request, and of no other."""

from __future__ import annotations

import logging

from llava_serve.errors import LlavaServeError

_logger = logging.getLogger(__name__)


def request_failure(request_id: str, error: Exception) -> LlavaServeError:
    """The error that a request's caller meets. One that nobody foresaw is logged, and tells the caller nothing."""
    if isinstance(error, LlavaServeError):
        return error
    _logger.error("Request %s has failed; the others go on.", request_id, exc_info=error)
    return LlavaServeError("The server failed on this request.")
