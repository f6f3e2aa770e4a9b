"""The small parts of the deployments, without a cluster: grouping a stream, aborts, draining, deadlines, headers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments import handle_calls
from deployments.coalesce import coalesce
from deployments.handle_calls import AbortedCalls
from deployments.header_filter import HeaderFilterMiddleware
from deployments.lost_replica import LostReplicaMiddleware
from llava_serve.api.limiter import ConcurrencyLimiter
from llava_serve.api.middleware import AdmissionMiddleware, RequestContextMiddleware
from llava_serve.deadline import check_deadline, deadline_scope
from llava_serve.engine.output_processor import join_chunks
from llava_serve.errors import DeadlineExceededError, EngineDeadError
from llava_serve.metrics.exporter import NoExporter
from llava_serve.metrics.requests import RequestMetrics
from llava_serve.types import Chunk, TokenLogprob
from support.api_server import wait_until


def chunk(number: int) -> Chunk:
    return Chunk(0, f"{number} ", (number,))


async def counting(count: int, ended: list[int], fail: bool = False) -> AsyncGenerator[Chunk]:
    """Chunks as fast as they are read; records where the stream ended."""
    number = 0
    try:
        for number in range(count):
            await asyncio.sleep(0)
            yield chunk(number)
        if fail:
            raise EngineDeadError("The engine has stopped.")
    finally:
        ended.append(number)


async def test_a_stream_in_groups_is_the_whole_stream_and_begins_with_one_token() -> None:
    groups = [group async for group in coalesce(counting(1000, []))]
    said = [each for group in groups for each in group]
    assert "".join(each.text for each in said) == "".join(f"{number} " for number in range(1000))
    assert [token for each in said for token in each.token_ids] == list(range(1000))
    assert said[0] == chunk(0)
    assert all(len(group) == 1 for group in groups)
    assert len(groups) < 1000


def test_a_group_has_one_chunk_per_choice_which_says_all() -> None:
    logprobs = tuple(TokenLogprob(token, f"{token}", -1.0) for token in range(3))
    first = Chunk(0, "a", (0,), logprobs=logprobs[:1])
    last = Chunk(0, "bc", (1, 2), "stop", logprobs[1:], num_prompt_tokens=7, num_cached_tokens=4)
    other = Chunk(1, "x", (9,))
    whole = Chunk(0, "abc", (0, 1, 2), "stop", logprobs, num_prompt_tokens=7, num_cached_tokens=4)
    assert join_chunks([first, other, last]) == [whole, other]


async def test_a_slow_stream_is_not_held_back() -> None:
    async def slow() -> AsyncGenerator[Chunk]:
        for number in range(3):
            yield chunk(number)
            await asyncio.sleep(0.05)

    assert [len(group) async for group in coalesce(slow(), gather_s=0.001)] == [1, 1, 1]


async def test_closing_the_groups_closes_the_stream() -> None:
    ended: list[int] = []
    async with aclosing(coalesce(counting(10**9, ended))) as groups:
        await anext(groups)
    assert len(ended) == 1


async def test_an_error_comes_after_what_was_there_before_it() -> None:
    received: list[Chunk] = []

    async def read() -> None:
        async for group in coalesce(counting(5, [], fail=True)):
            received.extend(group)

    with pytest.raises(EngineDeadError):
        await read()
    assert sum(len(each.token_ids) for each in received) == 5


def test_an_abort_is_remembered_for_a_call_that_comes_after_it() -> None:
    calls = AbortedCalls()
    calls.add(["one", "two"])
    calls.add(["three"])
    assert all(call in calls for call in ("one", "two", "three"))
    assert "four" not in calls


def test_only_so_many_aborts_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle_calls, "REMEMBERED_CALLS", 2)
    calls = AbortedCalls()
    calls.add(["one", "two", "three"])
    assert [call in calls for call in ("one", "two", "three")] == [False, True, True]


def test_an_abort_is_remembered_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle_calls, "REMEMBERED_S", 0.05)
    calls = AbortedCalls()
    calls.add(["one"])
    wait_until(lambda: "one" not in calls)


def test_a_deadline_is_checked() -> None:
    check_deadline(time.time() + 60)
    with pytest.raises(DeadlineExceededError):
        check_deadline(time.time())


async def test_a_wait_ends_at_the_deadline() -> None:
    with pytest.raises(DeadlineExceededError):
        async with deadline_scope(time.time() + 0.01):
            await asyncio.Event().wait()


async def ask(app: ASGIApp, headers: list[tuple[bytes, bytes]] | None = None) -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": headers or []}
    await app(scope, receive, send)
    return sent


async def test_a_drain_waits_for_requests_in_flight_and_refuses_new_ones() -> None:
    finish = asyncio.Event()

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await finish.wait()
        await PlainTextResponse("done")(scope, receive, send)

    limiter = ConcurrencyLimiter(1, 1000)
    app = RequestContextMiddleware(AdmissionMiddleware(answer, limiter, 1000), RequestMetrics(NoExporter()))
    first = asyncio.create_task(ask(app))
    await asyncio.sleep(0)
    drained = asyncio.create_task(limiter.drain())
    await asyncio.sleep(0)
    refusal = await ask(app)
    assert refusal[0]["status"] == 503
    assert dict(refusal[0]["headers"])[b"retry-after"]
    assert not drained.done()
    finish.set()
    assert (await first)[0]["status"] == 200
    await drained


async def test_headers_that_control_serve_are_removed() -> None:
    received: list[tuple[bytes, bytes]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        received.extend(scope["headers"])

    kept = [(b"accept", b"*/*"), (b"x-request-id", b"trace-1")]
    headers = [(b"X-Request-Timeout-Seconds", b"0"), (b"x-request-disconnect-disabled", b"?1"), (b"x-session-id", b"1")]
    await ask(HeaderFilterMiddleware(app), [*headers, (b"X-Request-ID", b"a\xffb"), *kept])
    assert received == kept


SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]


async def test_a_response_that_never_begins_is_a_503() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        return

    start, body = await ask(LostReplicaMiddleware(app))
    assert start["status"] == 503
    assert dict(start["headers"])[b"retry-after"] == b"5"
    assert json.loads(body["body"])["error"]["code"] == "service_unavailable"


async def test_an_event_stream_that_stops_ends_with_an_error_event() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": SSE})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})

    _, first, last = await ask(LostReplicaMiddleware(app))
    error, done, end = last["body"].split(b"\n\n")
    assert first["body"] == b"data: 1\n\n"
    assert "replica" in json.loads(error.removeprefix(b"data: "))["error"]["message"]
    assert (done, end, last.get("more_body", False)) == (b"data: [DONE]", b"", False)


@pytest.mark.parametrize(("kind", "more_body"), [(SSE, False), ([(b"content-type", b"application/json")], True)])
async def test_other_responses_stay_as_they_are(kind: list[tuple[bytes, bytes]], more_body: bool) -> None:
    sent: list[Message] = [
        {"type": "http.response.start", "status": 200, "headers": kind},
        {"type": "http.response.body", "body": b"x", "more_body": more_body},
    ]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in sent:
            await send(message)

    assert await ask(LostReplicaMiddleware(app)) == sent


async def test_an_answer_carries_its_id_once() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"x-request-id", b"ours"), (b"content-length", b"0"), (b"X-Request-ID", b"serve's")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    start, body = await ask(HeaderFilterMiddleware(app))
    assert start["headers"] == [(b"x-request-id", b"ours"), (b"content-length", b"0")]
    assert body["type"] == "http.response.body"
