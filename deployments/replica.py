"""What a replica of each tier does first: its log lines and its spans go where Serve's go."""

from __future__ import annotations

import logging

from ray import serve
from ray.serve.exceptions import RayServeException

from llava_serve import tracing

from .handle_calls import SERVE_LOGGER


def begin_replica() -> None:
    """To be called by the constructor of a deployment. Outside of a replica, the log stays as it is."""
    tracing.begin()
    try:
        serve.get_replica_context()
    except RayServeException:
        return
    log_with_serve(logging.getLogger("llava_serve"))


def log_with_serve(ours: logging.Logger) -> None:
    """A logger's lines go to Serve's log alone: with its format and the request's id, from its level on."""
    ours.setLevel(logging.DEBUG)  # Serve's own level decides, which may change
    ours.propagate = False
    ours.handlers = [ServeHandler()]


class ServeHandler(logging.Handler):
    """Hands records on to Serve's logger, whose handlers and level Serve replaces when `logging_config` changes."""

    def emit(self, record: logging.LogRecord) -> None:
        serves = logging.getLogger(SERVE_LOGGER)
        if serves.isEnabledFor(record.levelno):
            serves.handle(record)
