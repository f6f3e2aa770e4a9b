"""One trace over the three tiers, and JSON logs of all of them, as an application on Ray writes them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.tools.config import read_config
from deployments.tools.local_cluster import LocalCluster, free_port, local_cluster
from support.cluster import replica_logs, serve_logs
from support.demo import DEMO_IMAGE, question
from support.paths import CONFIG
from support.traces import EXPORTER, Spans

pytestmark = pytest.mark.extended

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PATH = "/v1/chat/completions"
KEY = "a-key-of-this-test"
QUESTION = "How many shapes are there?"  # not that of the probe, which Ray logs with the arguments
CALLS = {
    "hop": ("ImagePreprocessor", ("queue", "fetch", "decode", "tile", "tokenize")),
    "first_chunk": ("LlavaModel", ("engine_queue", "vision", "prefill", "engine_decode")),
}
TIERS = ("Ingress", "ImagePreprocessor", "LlavaModel")
OWN_LINES = {"ImagePreprocessor": "builtin: template", "LlavaModel": "builtin is on cpu in float32."}
"""Which the library itself logs while a replica starts."""


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def traced(traces: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """An application with `tracing_config` and `logging_config`, and a key."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    config = read_config(CONFIG, port=free_port(), api_keys_file=str(keys))
    config["tracing_config"] = {"enabled": True, "exporter_import_path": EXPORTER, "sampling_ratio": 1.0}
    config["logging_config"]["encoding"] = "JSON"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACE_FOLDER", str(traces))
        with local_cluster(config, num_cpus=2) as running:
            yield running


def ask(application: LocalCluster, *images: bytes, **headers: str) -> httpx.Response:
    body = {"messages": question(QUESTION, *images), "temperature": 0}
    given = {"Authorization": f"Bearer {KEY}", **headers}
    return httpx.post(f"{application.url}{PATH}", json=body, headers=given, timeout=120)


def written(traces: Path, trace: str, wait_until: Callable[[Callable[[], bool]], None]) -> Spans:
    """All spans, once those of a trace are complete: its last stages and, up to the caller, all parents."""
    names = {f"POST {PATH}", "tokenize", "engine_decode"}

    def complete() -> bool:
        spans = Spans(traces).of_trace(trace)
        known = {None, f"0x{CALLER}", *(span["context"]["span_id"] for span in spans)}
        return names <= {span["name"] for span in spans} and {span["parent_id"] for span in spans} <= known

    wait_until(complete)
    return Spans(traces)


def test_the_spans_of_all_tiers_are_below_the_callers(
    traced: LocalCluster, traces: Path, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    answer = ask(traced, DEMO_IMAGE.read_bytes(), traceparent=f"00-{TRACE}-{CALLER}-01")
    assert answer.status_code == 200
    said = answer.json()["choices"][0]["message"]["content"]
    spans = written(traces, TRACE, wait_until)
    own = spans.named(f"POST {PATH}", TRACE)
    assert answer.headers["traceresponse"] == f"00-{TRACE}-{own['context']['span_id'].removeprefix('0x')}-01"
    assert _above(spans, own)[-1] == CALLER
    assert own["attributes"]["request_id"] == answer.headers["x-request-id"]
    assert spans.names_below(own) == ["body", "hop", "first_chunk"]
    for call, (tier, stages) in CALLS.items():
        for stage in stages:
            replica, *others = _above(spans, spans.named(stage, TRACE))
            assert tier in replica
            assert others[others.index(call) :] == [call, f"POST {PATH}", *_above(spans, own)]
    for private in (KEY, QUESTION, said, "base64"):
        assert private not in spans.text


def test_a_request_without_a_caller_is_one_trace_below_serves_own_span(
    traced: LocalCluster, traces: Path, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    trace = ask(traced, DEMO_IMAGE.read_bytes()).headers["traceresponse"].split("-")[1]
    spans = written(traces, trace, wait_until)
    root = [span for span in spans.of_trace(trace) if span["parent_id"] is None]
    assert ["Ingress" in span["name"] for span in root] == [True]
    for stage in ("body", "tokenize", "prefill"):
        assert _above(spans, spans.named(stage, trace))[-1] == root[0]["name"]


def test_the_logs_are_json_with_one_line_of_a_request_and_nothing_of_what_was_asked(
    traced: LocalCluster, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    image = DEMO_IMAGE.read_bytes()
    good = ask(traced, image, **{"x-request-id": "good-one"})
    bad = ask(traced, b"no picture at all", **{"x-request-id": "bad-one"})
    assert (good.status_code, bad.status_code) == (200, 400)

    def lines(tier: str, request_id: str) -> list[dict[str, Any]]:
        read = map(json.loads, replica_logs(traced, tier).splitlines())
        return [line for line in read if line.get("request_id") == request_id]

    wait_until(lambda: bool(lines("Ingress", "good-one") and lines("Ingress", "bad-one")))
    [access] = lines("Ingress", "good-one")
    assert (access["outcome"], access["status"], access["model"], access["output_tokens"]) == (
        "completed",
        200,
        "builtin",
        good.json()["usage"]["completion_tokens"],
    )
    assert access["trace_id"] == good.headers["traceresponse"].split("-")[1]
    [refused] = lines("Ingress", "bad-one")
    assert (refused["outcome"], refused["reason"], refused["levelname"]) == ("refused", "invalid_image", "INFO")
    [why] = lines("ImagePreprocessor", "bad-one")
    assert why["message"] == "Refused: 400 invalid_image."
    for tier, own in OWN_LINES.items():
        messages = [json.loads(line)["message"] for line in replica_logs(traced, tier).splitlines()]
        assert sum(own in message for message in messages) == 1
    said = good.json()["choices"][0]["message"]["content"]
    time.sleep(1)  # for what might be written late
    written = "".join(each.read_text() for each in serve_logs(traced)).splitlines()
    assert len([line for line in written if "good-one" in line]) == 1  # also of the proxy and the controller
    logs = "".join(replica_logs(traced, tier) for tier in TIERS) + traced.log.read_text("utf-8")
    for private in (KEY, QUESTION, said, "base64", "no picture at all"):
        assert private not in logs


def _above(spans: Spans, span: dict[str, Any]) -> list[str]:
    """The names of a span's parents, the nearest first; the id of one that is not written."""
    by_id = {each["context"]["span_id"]: each for each in spans.all}
    names: list[str] = []
    while span["parent_id"] is not None:
        if span["parent_id"] not in by_id:
            return [*names, span["parent_id"].removeprefix("0x")]
        span = by_id[span["parent_id"]]
        names.append(span["name"])
    return names
