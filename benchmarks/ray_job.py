"""This process as a job on the Ray of an application that a benchmark has started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ray


@contextmanager
def ray_job(address: str) -> Iterator[None]:
    """Joins a Ray cluster, and disconnects before the cluster ends, which would kill this process without a message."""
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()
