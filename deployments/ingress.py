"""The ingress: the library's web app, and the same pipeline for other Ray jobs, over handles to the other tiers."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from pydantic import BaseModel
from ray.serve.handle import DeploymentHandle
from starlette.types import Receive, Scope, Send

from llava_serve.api.app import create_app
from llava_serve.api.errors import reported
from llava_serve.api.handle_chat import ChatCalls
from llava_serve.api.key_limits import KeyLimits
from llava_serve.api.limiter import limiter_of
from llava_serve.api.middleware import check_image_bytes
from llava_serve.api.parse_process import in_thread
from llava_serve.api.pipeline import GenerationRequest, generation
from llava_serve.api.record import RequestRecord, recorded
from llava_serve.api.service import Service
from llava_serve.api.validation import check_priority
from llava_serve.config import ApiOptions
from llava_serve.errors import LlavaServeError
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import Chunk, Message, PreparedPrompt, Query

from .backend import HandleBackend
from .handle_calls import AbortedCalls, yields_failure
from .live_config import LiveConfig
from .model_gate import wait_for_model
from .replica import begin_replica

NOTICEABLE_S = 1.0
"""A wait for the model that is as long was for its start."""


class Ingress:
    """Admission, API keys and the OpenAI API over HTTP; `generate` and `chat` are for other Ray jobs.

    Args:
        model_name: the name that requests use for the model.
        options: access and limits; `reconfigure` changes them.
        preprocessor: handle to `ImagePreprocessor`.
        model: handle to `LlavaModel`.
        prompt_key: of the model that it serves (`ModelOptions.prompt_key`). None does not wait for it.
    """

    def __init__(
        self,
        model_name: str,
        options: ApiOptions,
        preprocessor: DeploymentHandle,
        model: DeploymentHandle,
        prompt_key: str | None = None,
    ) -> None:
        begin_replica()
        self._live = LiveConfig("Ingress", options, self._apply)
        self._model_tier = model
        self._prompt_key = prompt_key
        self._backend = HandleBackend(model_name, preprocessor, model)
        self._limiter = limiter_of(options, self._backend.exporter)
        self._key_limits = KeyLimits(options.max_in_flight_per_key, options.requests_per_minute_per_key)
        self._aborted = AbortedCalls()
        self._apply(options)

    def __serve_build_asgi_app__(self) -> CurrentApp:
        """Called by Serve in the replica, after the constructor."""
        return CurrentApp(self)

    async def reconfigure(self, user_config: Mapping[str, object] | None, rank: object) -> None:
        """Called by Serve with the deployment's `user_config`. Requests in flight keep the options of their arrival."""
        await self._live.change(user_config)
        if self._prompt_key is not None:
            began = time.monotonic()
            await wait_for_model(self._model_tier, self._prompt_key)
            if (waited := time.monotonic() - began) > NOTICEABLE_S:
                self._backend.model_tier.start_s = waited
            self._prompt_key = None  # it waits at the start alone

    def _apply(self, options: ApiOptions) -> None:
        app = create_app(self._backend, options, self._limiter, key_limits=self._key_limits)
        self._limiter.change(options.max_in_flight, options.max_in_flight_bytes)
        self._key_limits.change(options.max_in_flight_per_key, options.requests_per_minute_per_key)
        service = Service(self._backend, options, in_thread)
        self._metrics = service.metrics
        self._chats = ChatCalls(service, self._limiter)
        self.web_app = app

    @yields_failure
    async def generate(
        self,
        asked: Query | Sequence[Message],
        sampling: SamplingParams,
        conv_mode: str | None,
        priority: int,
        call_id: str,
        deadline: float,
    ) -> AsyncGenerator[PreparedPrompt | list[Chunk]]:
        """Yields the prompt without its tiles, then the answer in groups. `LlavaClient` is its caller.

        Admission, the longest timeout and draining are those of HTTP requests. No API key is required: callers have
        Ray's own token.

        Args:
            asked: pictures as encoded bytes or `data:` URLs.
            sampling: how the answer is sampled.
            conv_mode: overrides the checkpoint's template.
            priority: a smaller number is served earlier.
            call_id: unique to this call; `abort` takes it.
            deadline: seconds since the epoch.

        Raises:
            LlavaServeError: its class says what is wrong; the root class itself is an internal error, which is logged.
        """
        with self._call("generate", call_id) as record, self._limiter.request() as place:
            place.hold(check_image_bytes(asked, self._live.options.max_body_bytes))
            check_priority(priority, self._live.options.priority_range)
            place.classify(priority)
            bounded = min(deadline, time.time() + self._live.options.max_timeout_s)
            request = GenerationRequest(asked, sampling, call_id, bounded, record, conv_mode, priority)
            async with aclosing(self._answer(request)) as items:
                async for item in items:
                    yield item

    async def _answer(self, request: GenerationRequest) -> AsyncGenerator[PreparedPrompt | list[Chunk]]:
        """Ends at the next group once the call is aborted."""
        if request.request_id in self._aborted:
            return
        async with generation(self._backend, request) as answer:
            if request.request_id in self._aborted:
                return
            yield dataclasses.replace(answer.prepared, tiles=())
            async for group in answer:
                if request.request_id in self._aborted:
                    return
                yield group

    async def chat(self, request: Mapping[str, Any] | BaseModel) -> AsyncGenerator[dict[str, Any]]:
        """Yields one chat completion, as a dict in OpenAI's form. `ray.data.llm`'s Serve processor is its caller.

        Args:
            request: the body of a chat completion. Without `timeout` it has the longest timeout of the server.

        Raises:
            LlavaServeError: as `ChatCalls.answer`. It is raised, not sent as a `Failure`: the caller knows of none.
        """
        with self._call("chat", uuid.uuid4().hex) as record:
            yield await self._chats.answer(request, record)

    @contextmanager
    def _call(self, method: str, call_id: str) -> Iterator[RequestRecord]:
        """The record of a call by handle."""
        record = RequestRecord(self._metrics, call_id, "CALL", method)
        record.endpoint = method
        with _internal_errors_reported(call_id), recorded(record, {}):
            yield record

    async def abort(self, call_ids: Sequence[str]) -> None:
        """Ends calls of `generate` whose caller has disconnected, at their next step. Unknown ids are ignored."""
        self._aborted.add(call_ids)

    async def drain(self) -> None:
        """Refuses new requests from now on, and returns once no request is in flight."""
        await self._limiter.drain()


class CurrentApp:
    """The web app of an ingress that replaces it when its options change."""

    def __init__(self, ingress: Ingress) -> None:
        self._ingress = ingress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._ingress.web_app(scope, receive, send)


@contextmanager
def _internal_errors_reported(call_id: str) -> Iterator[None]:
    """Logs an unexpected error; the caller gets the root class of the library's errors, with the call's id."""
    try:
        yield
    except LlavaServeError:
        raise
    except Exception as error:
        raise LlavaServeError(reported(error, call_id)["error"]["message"]) from None
