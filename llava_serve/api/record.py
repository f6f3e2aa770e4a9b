"""What is recorded of each request: for the metrics, for its line in the log, and for its caller."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from urllib.parse import quote

from starlette.requests import ClientDisconnect

from llava_serve.api.errors import WireError, wire_error
from llava_serve.errors import CapacityError, DeadlineExceededError, shown
from llava_serve.metrics.requests import RequestMetrics
from llava_serve.tracing import RequestTrace, request_trace
from llava_serve.types import StageTimes

logger = logging.getLogger("llava_serve.access")

CLIENT_CLOSED_REQUEST = 499
"""The status in logs and metrics of a request whose client is gone."""


class RequestRecord:
    """Of one request, over HTTP or by a handle. Times are seconds of `time.perf_counter()`.

    Attributes:
        endpoint: the path of the route, or the handle's method; a path that there is not is `unknown`.
        status: of the answer, once it is known.
        stages: up to the first token, as far as they are over.
        first_token_s: from the arrival; None while there is none.
        prompt_tokens, output_tokens: so far.
        trace: gets what became of it.
    """

    def __init__(self, metrics: RequestMetrics, request_id: str, method: str, path: str) -> None:
        self.request_id = request_id
        self.endpoint = "unknown"
        self.status: int | None = None
        self.stages: StageTimes = ()
        self.first_token_s: float | None = None
        self.model: str | None = None
        self.prompt_tokens = self.output_tokens = 0
        self.trace = RequestTrace()
        self._metrics = metrics
        self._method = method
        self._path = quote(shown(path), errors="replace")  # it is a caller's: no line of the log may end in it
        self._outcome = "completed"
        self._reason: str | None = None
        self._arrived = self._marked = time.perf_counter()

    @property
    def reads(self) -> bool:
        """It asks for no work: probes, scrapes and the files of the page."""
        return self._method in ("GET", "HEAD")

    def stage(self, name: str, inner: StageTimes = ()) -> None:
        """A stage is over. Of the time since the one before, `inner` are parts that others have measured."""
        now = time.perf_counter()
        rest = now - self._marked - sum(seconds for _, seconds in inner)
        self._marked = now
        self.stages += (*inner, (name, rest))

    def first_tokens(self, count: int, inner: StageTimes) -> None:
        """The first tokens are here; `inner` are the stages of the engine."""
        self.stage("first_chunk", inner)
        self.output_tokens = count
        self.first_token_s = self._marked - self._arrived
        self._metrics.first_token(self.first_token_s, self.stages)

    def more_tokens(self, count: int) -> None:
        """A later group of tokens is here."""
        now = time.perf_counter()
        self._metrics.tokens(now - self._marked, count)
        self._marked = now
        self.output_tokens += count

    def choice_finished(self, reason: str) -> None:
        """A choice is complete."""
        self._metrics.finished(reason)

    def answered(self) -> None:
        """The answer is complete."""
        assert self.first_token_s is not None, "a complete answer has a first token"
        seconds = time.perf_counter() - self._arrived
        self._metrics.completed(seconds, self.first_token_s, self.prompt_tokens, self.output_tokens)

    def refused(self, wire: WireError) -> None:
        """The request ends with this error; a second one changes nothing."""
        if self._reason is None:
            self._outcome, self._reason = "failed" if wire.status >= 500 else "refused", wire.code
            self.status = self.status or wire.status

    def failed(self, error: BaseException) -> None:
        """The same by what was raised."""
        if self._reason is not None:
            return
        if isinstance(error, ClientDisconnect | asyncio.CancelledError | GeneratorExit):
            self._outcome, self._reason = "disconnected", "client_disconnected"
            self.status = self.status or CLIENT_CLOSED_REQUEST
            return
        self.refused(wire_error(error))
        if isinstance(error, DeadlineExceededError):
            self._outcome = "expired"
        if isinstance(error, CapacityError):
            self._reason = error.reason
            self._metrics.refused(error.reason)

    def ended(self) -> None:
        """The request has ended: counts it, and logs one line. What was asked and answered is in neither."""
        status = self.status or 200
        self._metrics.ended(self.endpoint, self._outcome, status)
        fields: dict[str, Any] = {
            "request_id": self.request_id,
            "method": self._method,
            "path": self._path,
            "status": status,
            "outcome": self._outcome,
            "seconds": round(time.perf_counter() - self._arrived, 4),
        }
        if self.model is not None:
            tokens = {"prompt_tokens": self.prompt_tokens, "output_tokens": self.output_tokens}
            fields |= {"model": self.model, **tokens}
        if self.first_token_s is not None:
            fields["first_token_s"] = round(self.first_token_s, 4)
        if self._reason is not None:
            fields["reason"] = self._reason
        if self.trace.trace_id is not None:
            fields["trace_id"] = self.trace.trace_id
        expected = self._outcome == "completed" or self._reason == "draining"  # a drain has its own line in the log
        if self.reads and expected:
            level = logging.DEBUG
        else:
            level = logging.WARNING if self._outcome in ("failed", "expired") and not expected else logging.INFO
        logger.log(level, " ".join(f"{name}={value}" for name, value in fields.items()), extra=fields)
        self.trace.ended(fields | {"endpoint": self.endpoint})

    def timings(self) -> dict[str, float]:
        """Milliseconds of the stages, of the first token, and of all so far."""
        times = dict(self.stages) | {"total": time.perf_counter() - self._arrived}
        if self.first_token_s is not None:
            times["first_token"] = self.first_token_s
        return {name: round(seconds * 1000, 3) for name, seconds in times.items()}


def server_timing(timings: dict[str, float]) -> str:
    """The value of the header `Server-Timing`."""
    return ", ".join(f"{name};dur={value}" for name, value in timings.items())


@contextmanager
def recorded(record: RequestRecord, headers: Mapping[str, str]) -> Iterator[RequestRecord]:
    """Ends the record with the block, by what that raises; `headers` are the request's, for its trace."""
    with nullcontext(RequestTrace()) if record.reads else request_trace(headers) as record.trace:
        try:
            yield record
        except BaseException as error:
            record.failed(error)
            raise
        finally:
            record.ended()
