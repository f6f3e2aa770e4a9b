"""A failure of one sequence fails its request, and no other."""

from __future__ import annotations

import logging

from llava_serve.errors import LlavaServeError

_logger = logging.getLogger(__name__)


def request_failure(request_id: str, error: Exception) -> LlavaServeError:
    """The error that the caller of a request gets. An unexpected one is logged; its text does not reach the caller."""
    if isinstance(error, LlavaServeError):
        return error
    _logger.error("Request %s has failed; the others go on.", request_id, exc_info=error)
    return LlavaServeError("The server failed on this request.")
