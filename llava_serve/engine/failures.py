"""A failure of one sequence or one image fails the requests that need it, and no other."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from llava_serve.engine.scheduler import Scheduler
from llava_serve.errors import LlavaServeError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepFailures:
    """What has failed in a step, while the others go on.

    Attributes:
        requests: by id. Nothing that the step has computed for such a request is to be used.
        images: by digest, in the vision tower. Every request that needs such an image fails with it.
    """

    requests: dict[str, Exception] = field(default_factory=dict)
    images: dict[str, Exception] = field(default_factory=dict)


def failed_requests(failures: StepFailures, scheduler: Scheduler) -> dict[str, Exception]:
    """The requests that a step's failures end, by id. The features of their images are discarded where one failed."""
    failed = dict(failures.requests)
    for group in scheduler.running:
        for digest in failures.images.keys() & set(group.pins):
            failed[group.request.request_id] = failures.images[digest]
            scheduler.discard_images(group)
    return failed


def request_failure(request_id: str, error: Exception) -> LlavaServeError:
    """The error that the caller of a request gets. An unexpected one is logged; its text does not reach the caller."""
    if isinstance(error, LlavaServeError):
        return error
    _logger.error("Request %s has failed; the others go on.", request_id, exc_info=error)
    return LlavaServeError("The server failed on this request.")
