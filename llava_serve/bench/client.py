"""One streamed request to an OpenAI-compatible server, and the times of its answer."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx2

from llava_serve.errors import RequestError

OK = "200"
"""The `Trace.status` of an answer that is whole."""


@dataclass
class Trace:
    """One request and its answer. Times are in seconds since `sent`.

    Attributes:
        sent: when it was sent, or was due, on the clock of `time.perf_counter`.
        status: `200` for a whole answer, else the HTTP status, or `timeout`, `no connection`, `cut off` (the stream
            ends before the answer does), `error in stream`, `no event stream`.
        error: what the server says of it.
        text: of the answer.
        arrivals: when each event with text arrived.
        seconds: when the answer was complete.
        usage: as the server reports it; empty if it does not.
    """

    sent: float
    status: str = OK
    error: str = ""
    text: str = ""
    arrivals: list[float] = field(default_factory=list)
    seconds: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.status == OK

    @property
    def output_tokens(self) -> int:
        """As reported, else the number of events with text."""
        return int(self.usage.get("completion_tokens", len(self.arrivals)))


class Client:
    """A server's address, a model, and connections that are kept.

    Args:
        url: of the server, with or without `/v1`.
        model: its name; `find_model` sets it where there is none.
        api_key: sent as a bearer token; None sends none.
        timeout_s: longest silence of the server.
        extra: more fields of each request.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model
        self._extra = extra or {}
        self._web = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
            timeout=timeout_s,
            limits=httpx2.Limits(max_connections=None),
            trust_env=False,  # a proxy would be measured, too
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._web.aclose()

    async def find_model(self) -> None:
        """Takes the first model that the server lists, unless one was named.

        Raises:
            RequestError: the server does not answer, requires a key, or lists no model.
        """
        try:
            response = await self._web.get(f"{self.url}/v1/models")
        except (httpx2.HTTPError, httpx2.InvalidURL):
            raise RequestError(f"No server answers at {self.url}: is it running, and is that its address?") from None
        if response.status_code in (401, 403):
            raise RequestError("The server requires an API key, or another one: --api-key-file FILE or LLAVA_API_KEY.")
        if self.model is None:
            try:
                self.model = str(response.json()["data"][0]["id"])
            except (ValueError, LookupError, TypeError):
                raise RequestError(f"{self.url} lists no models; name one with --model.") from None

    def body(self, messages: Sequence[dict[str, Any]], max_tokens: int) -> dict[str, Any]:
        """What is sent."""
        return {
            "model": self.model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        } | self._extra

    async def ask(self, messages: Sequence[dict[str, Any]], max_tokens: int, *, due: float | None = None) -> Trace:
        """Sends a conversation and reads its answer. What goes wrong is in the trace.

        Args:
            due: when it should have been sent, if that is not now: the times count from then.
        """
        body = self.body(messages, max_tokens)
        trace = Trace(time.perf_counter() if due is None else due)
        try:
            async with self._web.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response:
                if response.status_code == 200:
                    await _read(response, trace)
                else:
                    trace.status = str(response.status_code)
                    trace.error = _message(await response.aread())
        except httpx2.TimeoutException:
            trace.status = "timeout"
        except httpx2.ConnectError:
            trace.status = "no connection"
        except httpx2.HTTPError:
            trace.status = "cut off"
        except (ValueError, TypeError, AttributeError):  # what came is not what OpenAI's API sends
            trace.status = "no event stream"
        trace.seconds = time.perf_counter() - trace.sent
        return trace


async def _read(response: httpx2.Response, trace: Trace) -> None:
    """Reads server-sent events. Each gets its time before it is parsed."""
    complete = False
    rest = b""
    async for data in response.aiter_raw():
        came = time.perf_counter() - trace.sent
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            if line[5:].strip() == b"[DONE]":
                complete = True
                continue
            event = json.loads(line[5:])
            if event.get("error"):
                trace.status, trace.error = "error in stream", _text_of(event["error"])
                return
            trace.usage = event.get("usage") or trace.usage
            for choice in event.get("choices", ()):
                complete = complete or choice.get("finish_reason") is not None
                delta = choice.get("delta") or {}
                if delta.get("content") or delta.get("reasoning_content"):
                    trace.arrivals.append(came)
                    trace.text += delta.get("content") or ""
    if not complete:
        trace.status = "cut off"


def _message(body: bytes) -> str:
    """The server's sentence in an error's body of OpenAI's form, or of another."""
    try:
        return _text_of(json.loads(body)["error"])
    except (ValueError, LookupError, TypeError):
        return body[:200].decode("utf-8", "replace")


def _text_of(error: Any) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)
