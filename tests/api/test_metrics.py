"""What `/metrics`, the log's line and `Server-Timing` say of requests whose outcome is known."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from llava_serve.errors import CapacityError, EngineDeadError
from llava_serve.metrics.definitions import METRICS, STAGES
from support.api_server import BODY, PATH, PacedBackend, app_over, official
from support.builtin_server import builtin_over_http
from support.dashboard import dashboard_series
from support.demo import DEMO_IMAGE, question

Scraped = dict[str, float]
"""Values by name and labels, as they stand on the page."""


def scrape(web: httpx.Client, **headers: str) -> Scraped:
    response = web.get("/metrics", headers=headers)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(response.text)
    return {_named(sample.name, sample.labels): sample.value for family in families for sample in family.samples}


def _named(name: str, labels: dict[str, str]) -> str:
    return name + "".join(f" {label}={value}" for label, value in sorted(labels.items()))


@pytest.fixture(scope="module")
def web() -> Iterator[httpx.Client]:
    """A server of its own, so that its counts are those of these tests' requests."""
    with builtin_over_http() as web:
        yield web


def test_the_counts_of_known_requests_are_exact(web: httpx.Client) -> None:
    image = DEMO_IMAGE.read_bytes()
    ask = {"model": "builtin", "temperature": 0, "ignore_eos": True}
    before = scrape(web)
    pictures = web.post(PATH, json=ask | {"messages": question("What is it?", image, image), "max_tokens": 5}).json()
    again = web.post(PATH, json=ask | {"messages": question("What is it?", image), "max_tokens": 3, "n": 2}).json()
    assert web.post(PATH, json=ask | {"messages": question("Hi"), "n": 0}).status_code == 400
    assert web.post(PATH, json=ask | {"messages": question("Hi", b"no picture")}).status_code == 400
    assert web.get("/nowhere").status_code == 404
    after = scrape(web)
    got = {name: round(value - before.get(name, 0), 6) for name, value in after.items()}

    chat, usages = f"endpoint={PATH}", (pictures["usage"], again["usage"])
    prompts = [usage["prompt_tokens"] for usage in usages]
    expected = {
        f"llava_requests_total {chat} outcome=completed status=200": 2,
        f"llava_requests_total {chat} outcome=refused status=400": 2,
        "llava_requests_total endpoint=unknown outcome=refused status=404": 1,
        "llava_time_to_first_token_seconds_count": 2,
        "vllm:time_to_first_token_seconds_count model_name=builtin": 2,
        "llava_request_seconds_count": 2,
        "vllm:e2e_request_latency_seconds_count model_name=builtin": 2,
        **{f"llava_stage_seconds_count stage={stage}": 2 for stage in STAGES},
        "llava_inter_token_seconds_count": 4 + 5,
        "llava_choices_total finish_reason=length": 3,
        "vllm:request_success_total finished_reason=length model_name=builtin": 3,
        "llava_request_prompt_tokens_sum": sum(prompts),
        "llava_request_output_tokens_sum": 5 + 6,
        "llava_prompts_prepared_total": 2,
        "llava_images_prepared_total": 3,
        "llava_images_decoded_total": 1,
        "llava_decoded_pixels_total": 320 * 240,
        "llava_tile_cache_queries_total": 4,
        "llava_tile_cache_hits_total": 2,
        "llava_prompt_tokens_total": sum(prompts),
        "vllm:prompt_tokens_total model_name=builtin": sum(prompts),
        "llava_image_tokens_total": sum(usage["prompt_tokens_details"]["image_tokens"] for usage in usages),
        "llava_output_tokens_total": 5 + 6,
        "vllm:generation_tokens_total model_name=builtin": 5 + 6,
        "llava_prefix_cache_queries_total": prompts[0] + 2 * prompts[1],
        "llava_requests_aborted_total": 0,
        "llava_requests_expired_total": 0,
        "llava_preemptions_total": 0,
    }
    assert {name: got.get(name, 0.0) for name in expected} == expected
    assert 0 < got["llava_engine_schedule_seconds_total"] < got["llava_engine_step_seconds_total"]
    assert got["llava_engine_step_sequences_total"] >= 5 + 6
    assert after["llava_requests_in_flight"] == 1, "the scrape itself"
    assert after["llava_running_sequences"] == after["vllm:num_requests_running model_name=builtin"] == 0
    assert after["llava_kv_cache_usage_ratio"] == 0


def test_every_metric_is_on_the_page(web: httpx.Client) -> None:
    """Those with labels are there once they have a value."""
    text = web.get("/metrics").text
    documented = set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE))
    for metric in METRICS:
        assert {metric.exported, metric.exported_vllm or metric.exported} <= documented or metric.labels


def test_the_dashboard_asks_for_series_that_the_server_exports(web: httpx.Client) -> None:
    documented = set(re.findall(r"^# TYPE (\S+) ", web.get("/metrics").text, re.MULTILINE))
    labelled = {metric.exported for metric in METRICS if metric.labels}
    ours = {name.removeprefix("ray_") for name in dashboard_series() if name.startswith("ray_llava_")}
    asked = {re.sub("_(bucket|sum|count)$", "", name) for name in ours}
    assert len(asked) > 25
    assert asked - documented - labelled == set()


def test_the_stages_are_all_of_the_time_to_the_first_token(web: httpx.Client) -> None:
    body = {"model": "builtin", "messages": question("What is it?", DEMO_IMAGE.read_bytes()), "return_timings": True}
    response = web.post(PATH, json=body | {"max_tokens": 4, "cache_salt": "other"})
    timings = response.json()["timings"]
    header = dict(re.findall(r"(\w+);dur=([\d.]+)", response.headers["server-timing"]))
    assert list(header) == [*STAGES, "total", "first_token"]
    assert sum(timings[stage] for stage in STAGES) == pytest.approx(timings["first_token"], abs=0.02)
    assert timings["first_token"] <= timings["total"]
    for stage in ("decode", "tile", "tokenize", "vision", "prefill", "engine_queue"):
        assert timings[stage] >= 0
    assert timings["vision"] > 0, "its features were not cached"
    assert timings["prefill"] > 0


def test_a_stream_has_its_split_in_the_header_and_in_its_last_event(web: httpx.Client) -> None:
    answers = official(web).chat.completions.with_raw_response.create(
        model="builtin",
        messages=question("What is it?"),
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_timings": True},
    )
    assert "prefill;dur=" in answers.headers["server-timing"]
    *_, last = list(answers.parse())
    timings: dict[str, float] = last.timings  # type: ignore[attr-defined]  # a field of ours
    assert last.usage is not None
    assert sum(timings[stage] for stage in STAGES) == pytest.approx(timings["first_token"], abs=0.02)


def test_without_the_field_nothing_is_sent(web: httpx.Client) -> None:
    response = web.post(PATH, json={"model": "builtin", "messages": question("Hi"), "max_tokens": 2})
    assert "server-timing" not in response.headers
    assert "timings" not in response.json()


def test_refusals_are_counted_by_their_reason() -> None:
    backend = PacedBackend(fail_at=-1, failure=CapacityError("Busy.", reason="engine_queue"))
    with app_over(backend, max_in_flight_bytes=1000) as web:
        assert web.post(PATH, json=BODY).status_code == 429
        assert web.post(PATH, json=BODY | {"user": "x" * 2000}).status_code == 429
        found = scrape(web)
    assert found["llava_admission_refusals_total reason=engine_queue"] == 1
    assert found["llava_admission_refusals_total reason=bytes"] == 1
    assert found[f"llava_requests_total endpoint={PATH} outcome=refused status=429"] == 2


def test_a_stream_that_fails_and_one_whose_client_goes_are_counted_so() -> None:
    backend = PacedBackend(pace_s=0.05, fail_at=1, failure=EngineDeadError("It has stopped."))
    with app_over(backend) as web:
        assert "It has stopped." in web.post(PATH, json=BODY | {"stream": True}).text
        backend.failure = None
        backend.words = ("on ",) * 200
        with web.stream("POST", PATH, json=BODY | {"stream": True}) as response:
            next(response.iter_raw())
        name = f"llava_requests_total endpoint={PATH} outcome="
        for _ in range(200):
            found = scrape(web)
            if f"{name}disconnected status=200" in found:
                break
    assert found[f"{name}failed status=200"] == 1
    assert found[f"{name}disconnected status=200"] == 1


def test_a_key_is_needed_where_there_are_keys() -> None:
    with app_over(PacedBackend(), api_keys=("sesame",)) as web:
        assert web.get("/metrics").status_code == 401
        assert "llava_requests_in_flight" in scrape(web, authorization="Bearer sesame")


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_line_in_the_log_without_what_it_says(
    caplog: pytest.LogCaptureFixture, *, stream: bool
) -> None:
    caplog.set_level(logging.INFO, "llava_serve")
    with app_over(PacedBackend(), api_keys=("sesame",)) as web:
        headers = {"X-Request-ID": "mine", "Authorization": "Bearer sesame"}
        assert web.post(PATH, json=BODY | {"stream": stream}, headers=headers).status_code == 200
        assert web.get("/a%0Aline", headers=headers).status_code == 404
    record, other = (each for each in caplog.records if each.name == "llava_serve.access")
    assert " path=/a%0Aline status=404 " in other.getMessage()
    fields: dict[str, Any] = vars(record)
    message = record.getMessage()
    assert message.startswith(f"request_id=mine method=POST path={PATH} status=200 outcome=completed seconds=")
    assert fields["model"] == "paced"
    assert (fields["prompt_tokens"], fields["output_tokens"]) == (7, 3)
    assert 0 < fields["first_token_s"] <= fields["seconds"]
    shown = json.dumps(fields, default=str)
    assert not any(secret in shown for secret in ("What is it?", "sesame", "red"))


def test_names_keep_to_conventions() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    for metric in METRICS:
        assert re.fullmatch(r"llava_[a-z_]+", metric.name)
        assert metric.help.endswith(".")
        assert (metric.kind == "histogram") == bool(metric.buckets)
        assert all(low < high for low, high in pairwise(metric.buckets))
        if metric.buckets and "_tokens" not in metric.name:
            assert metric.name.endswith("_seconds")
