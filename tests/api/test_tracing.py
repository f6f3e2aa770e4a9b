"""The spans of requests: their parents, what they have, and what they do not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from llava_serve import tracing
from llava_serve.errors import EngineDeadError, RequestError
from support.api_server import PATH, PacedBackend, app_over, ask_paced, wait_until
from support.demo import DEMO_IMAGE, DEMO_QUESTION, question
from support.served_command import serve_in_process
from support.traces import EXPORTER, Spans

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
MESSAGE = {"role": "user", "content": "Hi"}
STAGES = {
    "hop": ["queue", "fetch", "decode", "tile", "tokenize"],
    "first_chunk": ["engine_queue", "vision", "prefill"],
}


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Traces all requests of this process. Not by `export_by`: a process sets its provider once, for good."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("test"))
    monkeypatch.setattr(tracing, "_makes_roots", True)
    yield exporter
    provider.shutdown()


def spans_of(exporter: InMemorySpanExporter, request: str) -> dict[str, ReadableSpan]:
    """Spans by name, once the request's own has ended."""
    wait_until(lambda: any(span.name == request for span in exporter.get_finished_spans()))
    return {span.name: span for span in exporter.get_finished_spans()}


def test_a_request_is_below_its_callers_span_and_names_its_own(exported: InMemorySpanExporter) -> None:
    with app_over(PacedBackend()) as web:
        given = {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "vendor=1", "x-request-id": "mine"}
        answer = web.post(PATH, json={"model": "paced", "messages": [MESSAGE]}, headers=given)
        assert web.get("/health").status_code == 200
    spans = spans_of(exported, f"POST {PATH}")
    assert set(spans) == {f"POST {PATH}", "body", "hop", "first_chunk"}
    own = spans.pop(f"POST {PATH}")
    assert own.parent is not None
    assert own.context is not None
    assert (own.parent.trace_id, own.parent.span_id) == (int(TRACE, 16), int(CALLER, 16))
    assert answer.headers["traceresponse"] == f"00-{TRACE}-{own.context.span_id:016x}-01"
    assert all(span.parent == own.context for span in spans.values())
    assert own.status.status_code == StatusCode.UNSET
    assert own.attributes is not None
    assert set(own.attributes) == set(tracing.ATTRIBUTES.values()) - {"error.type"}
    assert own.attributes["request_id"] == "mine"
    assert own.attributes["gen_ai.usage.output_tokens"] == 3


def test_a_request_without_a_caller_begins_a_trace_of_its_own(exported: InMemorySpanExporter) -> None:
    with app_over(PacedBackend()) as web:
        answers = [ask_paced(web) for _ in range(2)]
    traces = {answer.headers["traceresponse"].split("-")[1] for answer in answers}
    assert len(traces) == 2
    wait_until(lambda: len(exported.get_finished_spans()) == 8)
    found = {f"{span.context.trace_id:032x}" for span in exported.get_finished_spans() if span.context}
    assert found == traces


def test_a_caller_that_wants_no_trace_gets_none(exported: InMemorySpanExporter) -> None:
    with app_over(PacedBackend()) as web:
        given = {"traceparent": f"00-{TRACE}-{CALLER}-00"}
        answer = web.post(PATH, json={"messages": [MESSAGE]}, headers=given)
    assert answer.status_code == 200
    assert "traceresponse" not in answer.headers
    assert exported.get_finished_spans() == ()


def test_a_traceparent_that_is_none_is_ignored(exported: InMemorySpanExporter) -> None:
    with app_over(PacedBackend()) as web:
        for given in ("", "00-0-0-01", f"00-{TRACE}-{CALLER}", f"99-{TRACE}-x-01", "a" * 60):
            answer = web.post(PATH, json={"messages": [MESSAGE]}, headers={"traceparent": given})
            assert answer.status_code == 200
            assert TRACE not in answer.headers["traceresponse"]


def test_a_failure_is_in_the_span_and_a_refusal_is_no_error(exported: InMemorySpanExporter) -> None:
    failing = PacedBackend(fail_at=1, failure=EngineDeadError("The engine has stopped."))
    with app_over(failing) as web:
        assert ask_paced(web).status_code == 503
        span = spans_of(exported, f"POST {PATH}")[f"POST {PATH}"]
        assert span.status.status_code == StatusCode.ERROR
        assert (span.attributes or {})["error.type"] == "service_unavailable"
        exported.clear()
        assert ask_paced(web, n=0).status_code == 400
    span = spans_of(exported, f"POST {PATH}")[f"POST {PATH}"]
    assert span.status.status_code == StatusCode.UNSET
    assert (span.attributes or {})["error.type"] == "invalid_value"
    assert span.events == ()


@pytest.mark.extended
def test_off_the_library_imports_nothing_and_says_nothing() -> None:
    program = (
        "import sys, llava_serve.tracing, llava_serve.threaded_processor\n"
        "with llava_serve.tracing.request_trace({'traceparent': '00-" + f"{TRACE}-{CALLER}" + "-01'}) as trace:\n"
        "    llava_serve.tracing.add_stages((('body', 1.0),))\n"
        "assert trace.parent is None\n"
        "print(*sorted(name for name in sys.modules if name.startswith('opentelemetry')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == []


@pytest.mark.parametrize("path", ["nowhere:exporter", "support.traces:nothing", "support.traces", "json:dumps", ""])
def test_an_exporter_that_cannot_be_used_is_a_sentence(path: str) -> None:
    with pytest.raises(RequestError, match=r"^The exporter of traces, .* cannot be used: "):
        tracing.export_by(path)


@pytest.mark.extended
def test_the_spans_of_a_server_are_the_stages_of_its_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACE_FOLDER", str(tmp_path))
    flags = ("--port", 0, "--trace-exporter", EXPORTER, "--api-key", "sesame", "--log-format", "json")
    asked = {"messages": question(DEMO_QUESTION, DEMO_IMAGE.read_bytes()), "temperature": 0, "return_timings": True}
    header = {"Authorization": "Bearer sesame"}
    with serve_in_process("builtin", *flags, named="builtin") as (url, process):
        answer = httpx.post(f"{url}{PATH}", json=asked, headers=header, timeout=60)
        process.terminate()
        assert process.stderr is not None
        logged = process.stderr.read()
    trace = answer.headers["traceresponse"].split("-")[1]
    assert f'"trace_id": "{trace}"' in logged
    spans = Spans(tmp_path)
    own = spans.named(f"POST {PATH}", trace)
    assert own["parent_id"] is None
    assert spans.names_below(own) == ["body", "hop", "first_chunk", "engine_decode"]
    for call, stages in STAGES.items():
        assert spans.names_below(spans.named(call, trace)) == stages
    assert len(spans.all) == 1 + 4 + 8
    said = answer.json()["choices"][0]["message"]["content"]
    for private in ("sesame", DEMO_QUESTION, said, "base64"):
        assert private not in spans.text + logged
