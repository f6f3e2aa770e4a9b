"""`POST /v1/responses`: OpenAI's Responses API without state and tools, as another form of a chat completion."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from llava_serve.api.answer import GeneratedAnswer
from llava_serve.api.logprobs import ContentLogprobs
from llava_serve.api.pipeline import Generation
from llava_serve.api.protocol import TokenLogprobs
from llava_serve.api.responses_protocol import (
    IncompleteDetails,
    InputTokensDetails,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    ResponseEvent,
    ResponseObject,
    ResponseRequest,
    ResponseUsage,
    Status,
    status_of,
)
from llava_serve.api.routing import reading_route, responses_of
from llava_serve.api.service import Service
from llava_serve.api.streaming import event
from llava_serve.api.usage import UsageCounter
from llava_serve.engine.output_processor import join_chunks
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import Chunk


class ResponseForm:
    """Writes an answer as a response, for `GeneratedAnswer`.

    Args:
        wire: the request as it was sent.
        sampling: of the request.
        model: name of the model.
    """

    def __init__(self, wire: ResponseRequest, sampling: SamplingParams, model: str) -> None:
        self._wire = wire
        self._sampling = sampling
        self._model = model
        self._id = f"resp_{uuid.uuid4().hex}"
        self._item_id = f"msg_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._sent = 0
        self._assigned = ContentLogprobs()
        self._logprobs: list[TokenLogprobs] = []  # of the text so far
        form = wire.text.format if wire.text is not None else None
        self._format = {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)

    @property
    def stream(self) -> bool:
        """The request asks for a stream."""
        return bool(self._wire.stream)

    async def whole(self, answer: Generation) -> bytes:
        """The response."""
        chunks = [chunk async for group in answer for chunk in group]
        (choice,) = join_chunks(chunks)
        self._add_logprobs(choice)
        assert choice.finish_reason is not None
        status = status_of(choice.finish_reason)
        return self._response(status, [self._message(status, choice.text)], answer.counter).json_bytes()

    async def events(self, answer: Generation) -> AsyncGenerator[bytes]:
        """The events of the stream. The first ones wait for the first chunk, which decides the HTTP status."""
        text, status = "", None
        async for group in answer:
            pieces = b"" if self._sent else self._opening()
            for chunk in group:
                text += chunk.text
                pieces += self._delta(chunk)
                if chunk.finish_reason is not None:
                    status = status_of(chunk.finish_reason)
            if pieces:
                yield pieces
        assert status is not None
        yield self._closing(status, text, answer.counter)

    def failure(self, error: dict[str, Any]) -> bytes:
        """The error as an event, with its fields as OpenAI's event has them, and as its clients look for them."""
        fields = {"type": "error", "sequence_number": self._sent, **error}
        fields |= {name: error["error"][name] for name in ("code", "message", "param")}
        return event(json.dumps(fields).encode(), "error")

    def _opening(self) -> bytes:
        response = self._response("in_progress", [])
        return (
            self._event("response.created", response=response)
            + self._event("response.in_progress", response=response)
            + self._event("response.output_item.added", output_index=0, item=self._message("in_progress"))
            + self._part_event("response.content_part.added", part=_text("", []))
        )

    def _delta(self, chunk: Chunk) -> bytes:
        logprobs = self._add_logprobs(chunk)
        if not (chunk.text or logprobs):
            return b""
        return self._part_event("response.output_text.delta", delta=chunk.text, logprobs=logprobs)

    def _add_logprobs(self, chunk: Chunk) -> list[TokenLogprobs]:
        """Those of a new piece of the text; none where they are not asked for."""
        new = self._assigned.push(chunk.text, chunk.logprobs, last=chunk.finish_reason is not None)
        self._logprobs += new.content if new is not None else []
        return new.content if new is not None else []

    def _closing(self, status: Status, text: str, counter: UsageCounter) -> bytes:
        message = self._message(status, text)
        return (
            self._part_event("response.output_text.done", text=text, logprobs=self._logprobs)
            + self._part_event("response.content_part.done", part=_text(text, self._logprobs))
            + self._event("response.output_item.done", output_index=0, item=message)
            + self._event(f"response.{status}", response=self._response(status, [message], counter))
        )

    def _part_event(self, name: str, **fields: Any) -> bytes:
        return self._event(name, item_id=self._item_id, output_index=0, content_index=0, **fields)

    def _event(self, name: str, **fields: Any) -> bytes:
        made = ResponseEvent(type=name, sequence_number=self._sent, **fields)
        self._sent += 1
        return event(made.json_bytes(), name)

    def _message(self, status: Status, text: str | None = None) -> OutputMessage:
        content = [] if text is None else [_text(text, self._logprobs)]
        return OutputMessage(id=self._item_id, type="message", status=status, role="assistant", content=content)

    def _response(
        self, status: Status, output: list[OutputMessage], counter: UsageCounter | None = None
    ) -> ResponseObject:
        return ResponseObject(
            id=self._id,
            object="response",
            created_at=self._created,
            status=status,
            error=None,
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if status == "incomplete" else None,
            instructions=self._wire.instructions,
            max_output_tokens=self._wire.max_output_tokens,
            model=self._model,
            output=output,
            parallel_tool_calls=False,
            previous_response_id=None,
            store=False,
            temperature=self._sampling.temperature,
            text={"format": self._format},
            tool_choice="none",
            tools=[],
            top_p=self._sampling.top_p,
            truncation="disabled",
            usage=None if counter is None else _usage(counter),
            metadata={},
        )


def _text(text: str, logprobs: list[TokenLogprobs]) -> OutputText:
    return OutputText(type="output_text", text=text, annotations=[], logprobs=logprobs)


def _usage(counter: UsageCounter) -> ResponseUsage:
    usage = counter.usage()
    details = usage.prompt_tokens_details
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(
            cached_tokens=details.cached_tokens, cache_write_tokens=0, image_tokens=details.image_tokens
        ),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
        total_tokens=usage.total_tokens,
    )


def response_routes(service: Service) -> APIRouter:
    """The endpoint."""
    routes = APIRouter(route_class=reading_route(ResponseRequest, service.read, ResponseEvent))

    @routes.post(
        "/v1/responses",
        summary="Create a response about pictures, without state",
        responses=responses_of(ResponseObject, ResponseEvent),
    )
    async def responses(request: Request, wire: ResponseRequest) -> Response:
        chat = wire.as_chat()
        asked = service.conversation(request, chat, "input", -bool(wire.instructions))
        work = service.generation_request(request, chat, asked, conv_mode=chat.conv_mode)
        form = ResponseForm(wire, work.sampling, service.model.name)
        return GeneratedAnswer(service.backend, work, form, request.state.request_id)

    return routes
