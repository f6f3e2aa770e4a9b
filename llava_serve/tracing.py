"""Traces: spans of OpenTelemetry for requests and their stages. Off, it costs a look at a variable.

OpenTelemetry is imported once tracing begins: on Serve by its `tracing_config`, in the in-process server by a flag.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from llava_serve.errors import RequestError
from llava_serve.types import StageTimes

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span, Tracer

ATTRIBUTES = {
    "request_id": "request_id",  # as Serve's own spans have it
    "method": "http.request.method",
    "endpoint": "http.route",
    "status": "http.response.status_code",
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "first_token_s": "llava.time_to_first_token_s",
    "outcome": "llava.outcome",
    "reason": "error.type",
}
"""What a request's span has, by the name in the request's line in the log; OpenTelemetry's names where it has one."""

_tracer: Tracer | None = None
_makes_roots = False


def begin(*, makes_roots: bool = False) -> None:
    """Makes spans from now on, through the tracer provider of this process. Without a provider it does nothing.

    Args:
        makes_roots: a request whose caller has no trace begins one. On Serve it does not: Serve's own span is the root.
    """
    global _tracer, _makes_roots
    from opentelemetry import trace

    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        _tracer, _makes_roots = trace.get_tracer("llava_serve"), makes_roots


def export_by(path: str) -> None:
    """Makes spans of all requests from now on, and gives them to an exporter. OpenTelemetry's own environment variables
    set its sampler and the name of the service.

    Args:
        path: `module:function` as Serve's `exporter_import_path`. Without arguments it gives a list of span processors.

    Raises:
        RequestError: it cannot be used.
    """
    try:
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
    except ImportError:
        raise RequestError("Traces need OpenTelemetry: pip install 'llava-serve[tracing]'.") from None
    module, _, function = path.partition(":")
    try:
        processors = list(getattr(import_module(module), function)())
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise RequestError(f"The exporter of traces, {path}, cannot be used: {error}") from error
    provider = TracerProvider()
    for processor in processors:
        provider.add_span_processor(processor)
    trace.set_tracer_provider(provider)
    begin(makes_roots=True)


def otlp() -> list[SpanProcessor]:
    """An exporter: it sends spans by OTLP over HTTP, to where `OTEL_EXPORTER_OTLP_ENDPOINT` says."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return [BatchSpanProcessor(OTLPSpanExporter())]


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """The span of one request, where it has one that is exported.

    Attributes:
        parent: `traceparent` of the W3C, for what belongs to the request; None without a span.
    """

    span: Span | None = None
    parent: str | None = None

    @property
    def trace_id(self) -> str | None:
        """The id of the trace."""
        return None if self.parent is None else self.parent.split("-")[1]

    def ended(self, fields: Mapping[str, Any]) -> None:
        """Puts what became of the request into its span: of these fields those in `ATTRIBUTES`."""
        if self.span is None:
            return
        from opentelemetry.trace import StatusCode

        self.span.update_name(f"{fields['method']} {fields['endpoint']}")
        self.span.set_attributes({ATTRIBUTES[name]: value for name, value in fields.items() if name in ATTRIBUTES})
        if fields["status"] >= 500 or fields["outcome"] in ("failed", "expired"):
            self.span.set_status(StatusCode.ERROR)


@contextmanager
def request_trace(headers: Mapping[str, str]) -> Iterator[RequestTrace]:
    """The block is a request, with a span. All spans in it are below that one, those of other tiers, too.

    Args:
        headers: of the request; the span is below their `traceparent`.
    """
    if _tracer is None or (parent := _parent(headers)) is None:
        yield RequestTrace()
        return
    from opentelemetry.trace import SpanKind

    with _current(_tracer.start_span("request", parent, SpanKind.SERVER)) as span:
        context = span.get_span_context()
        traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        yield RequestTrace(span, traceparent) if context.trace_flags.sampled else RequestTrace()


@contextmanager
def span(name: str) -> Iterator[None]:
    """The block is a stage that calls another tier: the spans of that one are below this one's."""
    if _tracer is None or not _is_traced():
        yield
        return
    with _current(_tracer.start_span(name)):
        yield


def add_stages(stages: StageTimes) -> None:
    """Adds spans of stages that are over, the last one now, each after the other, below the current span."""
    if _tracer is None or not _is_traced():
        return
    at = time.time_ns() - round(sum(seconds for _, seconds in stages) * 1e9)
    for name, seconds in stages:
        end = at + round(seconds * 1e9)
        _tracer.start_span(name, start_time=at).end(end)
        at = end


def _parent(headers: Mapping[str, str]) -> Context | None:
    """Of a request's span. None: the request gets no span.

    Serve's proxy takes no `traceparent` unless it traces itself, so that its span of a request may be in another trace.
    """
    from opentelemetry import context, trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    current = trace.get_current_span().get_span_context()
    given = TraceContextTextMapPropagator().extract(headers, context.Context())
    asked = trace.get_current_span(given).get_span_context()
    if asked.is_valid and asked.trace_id != current.trace_id:
        return given
    return context.get_current() if current.is_valid or _makes_roots else None


def _is_traced() -> bool:
    """Whether the current span is exported."""
    from opentelemetry import trace

    return trace.get_current_span().get_span_context().trace_flags.sampled


@contextmanager
def _current(started: Span) -> Iterator[Span]:
    """The span is the current one in the block, and ends with it. Not OpenTelemetry's own `use_span`: the block may be
    in a generator, which may end in another context than it began in."""
    from opentelemetry import context, trace

    previous = context.get_current()
    context.attach(trace.set_span_in_context(started))
    try:
        yield started
    finally:
        context.attach(previous)
        started.end()
