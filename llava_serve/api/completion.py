"""From the library's chunks to OpenAI's objects: the events of a stream, or one completion."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from llava_serve.api.logprobs import ContentLogprobs, prompt_logprobs_of
from llava_serve.api.pipeline import Generation
from llava_serve.api.protocol import (
    Answer,
    AssistantMessage,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
    GenerationFields,
    StreamOptions,
    Usage,
)
from llava_serve.api.record import RequestRecord
from llava_serve.api.streaming import DONE, event
from llava_serve.api.usage import UsageCounter
from llava_serve.engine.output_processor import join_chunks
from llava_serve.types import Chunk, PreparedPrompt


class Shape(Protocol):
    """The objects of one endpoint. `ids` has the choice's `token_ids` where the request asks for them.

    Attributes:
        every_token: the log-probabilities list tokens without a text, too.
    """

    every_token: bool

    def shown(self, chunk: Chunk, prepared: PreparedPrompt, *, first: bool) -> Chunk:
        """What is shown for a chunk; `first`: of its choice."""
        ...

    def choice(self, choice: Chunk, logprobs: ChoiceLogprobs | None, **ids: Any) -> Answer:
        """A complete choice."""
        ...

    def piece(self, chunk: Chunk, logprobs: ChoiceLogprobs | None, *, first: bool, **ids: Any) -> Answer:
        """What is new in a choice."""
        ...

    def completion(self, **fields: Any) -> Answer:
        """The whole answer."""
        ...

    def event(self, **fields: Any) -> Answer:
        """One event of a stream."""
        ...


class ChatShape:
    """Of a chat completion."""

    every_token = False

    def shown(self, chunk: Chunk, prepared: PreparedPrompt, *, first: bool) -> Chunk:
        """The chunk itself."""
        return chunk

    def choice(self, choice: Chunk, logprobs: ChoiceLogprobs | None, **ids: Any) -> Choice:
        """A complete choice."""
        assert choice.finish_reason is not None
        message = AssistantMessage(role="assistant", content=choice.text, refusal=None)
        return Choice(index=choice.index, message=message, logprobs=logprobs, finish_reason=choice.finish_reason, **ids)

    def piece(self, chunk: Chunk, logprobs: ChoiceLogprobs | None, *, first: bool, **ids: Any) -> ChunkChoice:
        """What is new in a choice; the first one has the role."""
        delta = Delta(role="assistant", content=chunk.text) if first else Delta(content=chunk.text)
        return ChunkChoice(
            index=chunk.index,
            delta=delta if first or chunk.text else Delta(),
            logprobs=logprobs,
            finish_reason=chunk.finish_reason,
            **ids,
        )

    def completion(self, **fields: Any) -> ChatCompletion:
        """The whole answer."""
        return ChatCompletion(object="chat.completion", **fields)

    def event(self, **fields: Any) -> ChatCompletionChunk:
        """One event of a stream."""
        return ChatCompletionChunk(object="chat.completion.chunk", **fields)


class StreamEvents:
    """Makes the events of one stream.

    Args:
        shape: of the endpoint.
        completion_id: the same on every event.
        model: name of the model.
        request: says what the events tell.
        prepared: the prompt.
        counter: of the answer, up to date at each call.
        record: of the request; so, too.
    """

    def __init__(
        self,
        shape: Shape,
        completion_id: str,
        model: str,
        request: GenerationFields,
        prepared: PreparedPrompt,
        counter: UsageCounter,
        record: RequestRecord,
    ) -> None:
        self._shape = shape
        self._id = completion_id
        self._model = model
        self._created = int(time.time())
        options = request.stream_options or StreamOptions()
        self._include_usage = bool(options.include_usage)
        self._continuous_usage = bool(options.continuous_usage_stats)
        self._prepared = prepared
        self._prompt_ids = prepared.token_ids.tolist() if request.return_token_ids else None
        self._counter = counter
        self._record = record if request.return_timings else None
        self._begun: dict[int, ContentLogprobs] = {}

    def event(self, chunk: Chunk) -> Answer | None:
        """None for a chunk that tells nothing yet: its token is not a whole character, or may begin a stop string."""
        first = chunk.index not in self._begun
        chunk = self._shape.shown(chunk, self._prepared, first=first)
        logprobs = self._begun.setdefault(chunk.index, ContentLogprobs(every=self._shape.every_token)).push(
            chunk.text, chunk.logprobs, last=chunk.finish_reason is not None
        )
        shows_ids = self._prompt_ids is not None and chunk.token_ids
        if not (first or chunk.text or chunk.finish_reason or (logprobs and logprobs.content) or shows_ids):
            return None
        ids = {} if self._prompt_ids is None else {"token_ids": list(chunk.token_ids)}
        choice = self._shape.piece(chunk, logprobs, first=first, **ids)
        return self._chunk(
            [choice],
            self._counter.usage() if self._continuous_usage else None,
            **({"prompt_token_ids": self._prompt_ids} if first and self._prompt_ids is not None else {}),
        )

    def last(self) -> Answer | None:
        """The event with the usage and the timings, if the request asks for one of them."""
        timings = {} if self._record is None else {"timings": self._record.timings()}
        return self._chunk([], self._counter.usage(), **timings) if self._include_usage or timings else None

    def _chunk(self, choices: list[Answer], usage: Usage | None, **fields: Any) -> Answer:
        if self._include_usage:
            fields["usage"] = usage  # a field that is set is sent, even if it is null
        return self._shape.event(id=self._id, created=self._created, model=self._model, choices=choices, **fields)


class CompletionBuilder:
    """Gathers the chunks of an unstreamed answer.

    Args:
        shape: of the endpoint.
        request: says what the answer tells.
        prepared: the prompt.
    """

    def __init__(self, shape: Shape, request: GenerationFields, prepared: PreparedPrompt) -> None:
        self._shape = shape
        self._prepared = prepared
        self._scored = request.prompt_logprobs
        self._prompt_ids = prepared.token_ids.tolist() if request.return_token_ids else None
        self._chunks: list[Chunk] = []

    def add(self, chunk: Chunk) -> None:
        """Takes a chunk of any choice."""
        self._chunks.append(chunk)

    def completion(self, completion_id: str, model: str, counter: UsageCounter, **fields: Any) -> Answer:
        """The answer, its choices in order, with more fields. All of them must be finished."""
        choices = sorted(join_chunks(self._chunks), key=lambda choice: choice.index)
        if self._prompt_ids is not None:
            fields["prompt_token_ids"] = self._prompt_ids
        if self._scored is not None:
            fields["prompt_logprobs"] = prompt_logprobs_of(choices[0].prompt_logprobs or (), self._scored)
        return self._shape.completion(
            id=completion_id,
            created=int(time.time()),
            model=model,
            choices=[self._choice(choice) for choice in choices],
            usage=counter.usage(),
            **fields,
        )

    def _choice(self, choice: Chunk) -> Answer:
        choice = self._shape.shown(choice, self._prepared, first=True)
        logprobs = ContentLogprobs(every=self._shape.every_token).push(choice.text, choice.logprobs, last=True)
        ids = {} if self._prompt_ids is None else {"token_ids": list(choice.token_ids)}
        return self._shape.choice(choice, logprobs, **ids)


class CompletionForm:
    """Writes an answer as a completion, for `GeneratedAnswer`.

    Args:
        shape: of the endpoint.
        request: says what the answer tells.
        completion_id: of the answer.
        model: name of the model.
    """

    def __init__(self, shape: Shape, request: GenerationFields, completion_id: str, model: str) -> None:
        self._shape = shape
        self._request = request
        self._id = completion_id
        self._model = model

    @property
    def stream(self) -> bool:
        """The request asks for a stream."""
        return bool(self._request.stream)

    async def events(self, answer: Generation) -> AsyncGenerator[bytes]:
        """The events of the stream, those of a group of chunks at once, and `[DONE]`."""
        events = StreamEvents(
            self._shape, self._id, self._model, self._request, answer.prepared, answer.counter, answer.record
        )
        async for group in answer:
            lines = [event(each.json_bytes()) for chunk in group if (each := events.event(chunk)) is not None]
            if lines:
                yield b"".join(lines)
        if (last := events.last()) is not None:
            yield event(last.json_bytes())
        yield DONE

    async def whole(self, answer: Generation) -> bytes:
        """The completion."""
        builder = CompletionBuilder(self._shape, self._request, answer.prepared)
        async for group in answer:
            for chunk in group:
                builder.add(chunk)
        timings = {"timings": answer.record.timings()} if self._request.return_timings else {}
        return builder.completion(self._id, self._model, answer.counter, **timings).json_bytes()

    def failure(self, error: dict[str, Any]) -> bytes:
        """The error as an event, and `[DONE]`."""
        return event(json.dumps(error).encode()) + DONE
