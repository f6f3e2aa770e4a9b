"""A request from start to end: streams, failures at every stage, deadlines, disconnects."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from typing import Any

import pytest
from openai import APIError, AsyncOpenAI, InternalServerError

from llava_serve.api import streaming
from llava_serve.errors import CapacityError, DeadlineExceededError, EngineDeadError, InvalidImageError
from support.api_server import BODY, MESSAGES, PATH, PacedBackend, app_over, official, wait_until


def test_a_stream_has_the_role_first_the_end_last_and_the_usage_if_asked() -> None:
    with app_over(PacedBackend()) as web:
        answer = web.post(PATH, json=BODY | {"stream": True, "stream_options": {"include_usage": True}})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    *chunks, usage = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": "A "},
        {"content": "red "},
        {"content": "circle."},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in [*chunks, usage]}) == 1
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 0, "image_tokens": 3},
    }


def test_choices_are_kept_apart_streamed_and_not() -> None:
    with app_over(PacedBackend()) as web:
        client = official(web)
        whole = client.chat.completions.create(model="paced", messages=MESSAGES, n=2)
        texts = {0: "", 1: ""}
        for chunk in client.chat.completions.create(model="paced", messages=MESSAGES, n=2, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
            assert chunk.usage is None
    assert [(choice.index, choice.message.content) for choice in whole.choices] == list(texts.items())
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (7, 6)


def test_a_chunk_without_text_is_not_sent() -> None:
    with app_over(PacedBackend(words=("", "", "so", ""))) as web:
        answer = web.post(PATH, json=BODY | {"stream": True})
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in answer.text.split("\n\n")[:-2]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "so"}, {}]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fail_at", [-1, 0])
@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (InvalidImageError("The picture is not one.", "messages"), 400, "invalid_image"),
        (CapacityError("Full.", 3), 429, "rate_limit_exceeded"),
        (EngineDeadError("The engine has stopped."), 503, "service_unavailable"),
        (DeadlineExceededError("Late."), 504, "deadline_exceeded"),
        (KeyError("/srv/secret"), 500, "internal_error"),
    ],
)
def test_an_error_before_the_first_chunk_has_its_own_status(
    failure: Exception, status: int, code: str, fail_at: int, stream: bool
) -> None:
    backend = PacedBackend(failure=failure, fail_at=fail_at)
    with app_over(backend) as web:
        answer = web.post(PATH, json=BODY | {"stream": stream})
        backend.failure = None
        assert web.post(PATH, json=BODY).status_code == 200
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert answer.headers.get("retry-after") == {429: "3", 503: "5"}.get(status)
    assert answer.headers.get("x-should-retry") == ("false" if status == 504 else None)
    assert "secret" not in answer.text
    assert backend.working == 0


def test_an_internal_error_is_logged_with_the_id_that_the_caller_sees(caplog: pytest.LogCaptureFixture) -> None:
    with app_over(PacedBackend(failure=KeyError("secret"), fail_at=1)) as web:
        whole = web.post(PATH, json=BODY, headers={"X-Request-ID": "trace-7"})
        streamed = web.post(PATH, json=BODY | {"stream": True}, headers={"X-Request-ID": "trace-8"})
    assert whole.json()["error"]["message"] == "The server failed on this request. The request's id is trace-7."
    assert "The request's id is trace-8." in streamed.text
    logged = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.getMessage() for record in logged] == ["Request trace-7 failed.", "Request trace-8 failed."]
    assert all(record.exc_info for record in logged)


def test_an_error_in_mid_stream_is_an_event_that_the_official_client_raises() -> None:
    with app_over(PacedBackend(failure=EngineDeadError("The engine has stopped."), fail_at=2)) as web:
        raw = web.post(PATH, json=BODY | {"stream": True})
        chunks = official(web).chat.completions.create(model="paced", messages=MESSAGES, stream=True)
        assert [next(chunks).choices[0].delta.content for _ in range(2)] == ["A ", "red "]
        with pytest.raises(APIError, match="The engine has stopped"):
            next(chunks)
    assert raw.status_code == 200
    assert json.loads(raw.text.split("\n\n")[2].removeprefix("data: "))["error"]["code"] == "service_unavailable"
    assert raw.text.endswith("\n\ndata: [DONE]\n\n")


@pytest.mark.parametrize("words", [[], ["A ", "red "]])
def test_an_incomplete_answer_is_an_error(words: list[str]) -> None:
    with app_over(PacedBackend(words=words, cut_short=True)) as web:
        whole = web.post(PATH, json=BODY)
        streamed = web.post(PATH, json=BODY | {"stream": True})
    assert whole.status_code == 503
    assert "before its answer was complete" in streamed.text
    assert streamed.text.endswith("data: [DONE]\n\n") is bool(words)  # without a chunk the status says it


def test_comments_keep_a_silent_stream_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_S", 0.05)
    with app_over(PacedBackend(pace_s=0.2)) as web:
        began = time.perf_counter()
        raw = web.post(PATH, json=BODY | {"stream": True}).text
        took = time.perf_counter() - began
        chunks = official(web).chat.completions.create(model="paced", messages=MESSAGES, stream=True)
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert said == "A red circle."
    assert 0 < raw.count(": keep-alive\n\n") <= took / 0.05
    assert raw.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("silent", [{"prepare_s": 0.3}, {"pace_s": 0.3}], ids=["prepare", "generate"])
def test_comments_keep_a_stream_alive_before_its_first_chunk(monkeypatch: pytest.MonkeyPatch, silent: Any) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_S", 0.05)
    with app_over(PacedBackend(words=("Red.",), **silent)) as web:
        with web.stream("POST", PATH, json=BODY | {"stream": True}) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert next(answer.iter_raw()) == b": keep-alive\n\n"
        chunks = official(web).chat.completions.create(model="paced", messages=MESSAGES, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Red."
        whole = web.post(PATH, json=BODY)
    assert whole.json()["choices"][0]["message"]["content"] == "Red."


def test_an_error_after_a_long_silence_is_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_S", 0.05)
    failure = InvalidImageError("The picture is not one.", "messages")
    with app_over(PacedBackend(prepare_s=0.2, failure=failure, fail_at=-1)) as web:
        raw = web.post(PATH, json=BODY | {"stream": True})
        with pytest.raises(APIError, match="The picture is not one"):
            list(official(web).chat.completions.create(model="paced", messages=MESSAGES, stream=True))
        assert web.post(PATH, json=BODY).status_code == 400
    assert raw.status_code == 200
    comment, *_, last, done = raw.text.removesuffix("\n\n").split("\n\n")
    assert (comment, done) == (": keep-alive", "data: [DONE]")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "invalid_image"


@pytest.mark.parametrize("stage", ["prepare", "generate"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_ends_the_work_whatever_hangs(stream: bool, stage: str) -> None:
    backend = PacedBackend(prepare_s=30) if stage == "prepare" else PacedBackend(pace_s=30)
    with app_over(backend) as web:
        began = time.perf_counter()
        with pytest.raises(InternalServerError) as caught:
            official(web, retries=2).chat.completions.create(
                model="paced", messages=MESSAGES, stream=stream, extra_body={"timeout": 0.2}
            )
        assert time.perf_counter() - began >= 0.2
        assert caught.value.status_code == 504
        assert caught.value.code == "deadline_exceeded"
        assert backend.working == 0
        assert len(backend.asked) == 1  # the client did not retry


def test_a_deadline_in_mid_stream_is_an_event() -> None:
    backend = PacedBackend(words=["x"] * 100, pace_s=0.05)
    with app_over(backend) as web:
        raw = web.post(PATH, json=BODY | {"stream": True, "timeout": 2})
        assert backend.working == 0
    assert raw.status_code == 200
    assert "deadline_exceeded" in raw.text


@pytest.mark.parametrize("stage", ["prepare", "generate"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_disconnect_ends_the_work(stream: bool, stage: str) -> None:
    backend = PacedBackend(prepare_s=30) if stage == "prepare" else PacedBackend(words=["x"] * 100, pace_s=0.2)
    with app_over(backend, max_in_flight=1) as web:
        body = json.dumps(BODY | {"stream": stream}).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection((web.base_url.host, web.base_url.port)) as client:
            client.sendall(head + body)
            wait_until(lambda: backend.working == 1)
            if stream and stage == "generate":
                assert client.recv(1000).startswith(b"HTTP/1.1 200")
        wait_until(lambda: backend.working == 0)
        backend.prepare_s = backend.pace_s = 0
        assert web.post(PATH, json=BODY).status_code == 200  # it no longer counts as in flight


def test_a_slow_body_has_a_time_limit_too() -> None:
    with (
        app_over(PacedBackend(), default_timeout_s=0.3) as web,
        socket.create_connection((web.base_url.host, web.base_url.port), timeout=5) as client,
    ):
        client.sendall(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{{".encode())
        assert client.recv(1000).startswith(b"HTTP/1.1 504")


def test_health_reports_whether_the_model_can_answer() -> None:
    backend = PacedBackend()
    with app_over(backend) as web:
        assert web.get("/health").json() == {"status": "ok", "model": "paced"}
        backend.failure, backend.fail_at = EngineDeadError("The engine has stopped."), -1
        unhealthy = web.get("/health")
    assert unhealthy.status_code == 503
    assert unhealthy.json()["error"]["message"] == "The engine has stopped."


async def test_a_burst_of_random_disconnects_ends_all_work() -> None:
    backend = PacedBackend(words=["x"] * 100, pace_s=0.05, prepare_s=0.05)
    with app_over(backend) as web:
        async with AsyncOpenAI(base_url=f"{web.base_url}/v1", api_key="any", max_retries=0) as client:

            async def ask_and_disconnect(number: int) -> None:
                async def ask() -> None:
                    if number % 2:
                        await client.chat.completions.create(model="paced", messages=MESSAGES)
                    else:
                        async for _ in await client.chat.completions.create(
                            model="paced", messages=MESSAGES, stream=True
                        ):
                            pass

                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(ask(), (number % 10) * 0.04)

            await asyncio.gather(*(ask_and_disconnect(number) for number in range(60)))
        await asyncio.to_thread(wait_until, lambda: backend.working == 0)
