"""From the library's chunks to OpenAI's objects: the events of a stream, or one completion."""

from __future__ import annotations

import time
import uuid
from typing import Any

from llava_serve.api.logprobs import ContentLogprobs
from llava_serve.api.protocol import (
    AssistantMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    Choice,
    ChunkChoice,
    Delta,
    PromptTokensDetails,
    StreamOptions,
    Usage,
)
from llava_serve.engine.output_processor import join_chunks
from llava_serve.errors import EngineDeadError
from llava_serve.types import Chunk, PreparedPrompt


def new_completion_id() -> str:
    """A unique id; one that a client chooses may not be."""
    return f"chatcmpl-{uuid.uuid4().hex}"


class UsageCounter:
    """Counts the tokens of an answer, chunk by chunk, and the choices that are not finished.

    Args:
        prepared: the prompt.
        choices: how many are expected.
    """

    def __init__(self, prepared: PreparedPrompt, choices: int) -> None:
        self._prompt = prepared.num_tokens
        self._image = sum(end - start for start, end in prepared.image_spans)
        self._cached = 0
        self._completion = 0
        self._open = set(range(choices))

    def add(self, chunk: Chunk) -> None:
        """Takes a chunk of any choice."""
        self._completion += len(chunk.token_ids)
        self._cached = max(self._cached, chunk.num_cached_tokens)
        if chunk.finish_reason is not None:
            self._open.discard(chunk.index)

    def check_complete(self) -> None:
        """Refuses a stream that ended without its finish reasons: it was aborted, and the answer is incomplete.

        Raises:
            EngineDeadError: a choice has no finish reason.
        """
        if self._open:
            raise EngineDeadError("The model ended the request before its answer was complete.")

    def usage(self) -> Usage:
        """The prompt counts once, however many choices there are."""
        return Usage(
            prompt_tokens=self._prompt,
            completion_tokens=self._completion,
            total_tokens=self._prompt + self._completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._cached, image_tokens=self._image),
        )


class StreamEvents:
    """Makes the events of one stream.

    Args:
        completion_id: the same on every event.
        model: name of the model.
        request: says what the events tell.
        prepared: the prompt.
        counter: of the answer, up to date at each call.
    """

    def __init__(
        self, completion_id: str, model: str, request: ChatRequest, prepared: PreparedPrompt, counter: UsageCounter
    ) -> None:
        self._id = completion_id
        self._model = model
        self._created = int(time.time())
        options = request.stream_options or StreamOptions()
        self._include_usage = bool(options.include_usage)
        self._continuous_usage = bool(options.continuous_usage_stats)
        self._prompt_ids = prepared.token_ids.tolist() if request.return_token_ids else None
        self._counter = counter
        self._begun: dict[int, ContentLogprobs] = {}

    def event(self, chunk: Chunk) -> ChatCompletionChunk | None:
        """None for a chunk that tells nothing yet: its token is not a whole character, or may begin a stop string."""
        first = chunk.index not in self._begun
        logprobs = self._begun.setdefault(chunk.index, ContentLogprobs()).push(
            chunk.text, chunk.logprobs, last=chunk.finish_reason is not None
        )
        shows_ids = self._prompt_ids is not None and chunk.token_ids
        if not (first or chunk.text or chunk.finish_reason or (logprobs and logprobs.content) or shows_ids):
            return None
        delta = Delta(role="assistant", content=chunk.text) if first else Delta(content=chunk.text)
        choice = ChunkChoice(
            index=chunk.index,
            delta=delta if first or chunk.text else Delta(),
            logprobs=logprobs,
            finish_reason=chunk.finish_reason,
            **({} if self._prompt_ids is None else {"token_ids": list(chunk.token_ids)}),
        )
        return self._chunk(
            [choice],
            self._counter.usage() if self._continuous_usage else None,
            **({"prompt_token_ids": self._prompt_ids} if first and self._prompt_ids is not None else {}),
        )

    def last(self) -> ChatCompletionChunk | None:
        """The event with the usage, if the request asks for it."""
        return self._chunk([], self._counter.usage()) if self._include_usage else None

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None, **fields: Any) -> ChatCompletionChunk:
        if self._include_usage:
            fields["usage"] = usage  # a field that is set is sent, even if it is null
        return ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=choices,
            **fields,
        )


class CompletionBuilder:
    """Gathers the chunks of an unstreamed answer.

    Args:
        request: says what the answer tells.
        prepared: the prompt.
    """

    def __init__(self, request: ChatRequest, prepared: PreparedPrompt) -> None:
        self._prompt_ids = prepared.token_ids.tolist() if request.return_token_ids else None
        self._chunks: list[Chunk] = []

    def add(self, chunk: Chunk) -> None:
        """Takes a chunk of any choice."""
        self._chunks.append(chunk)

    def completion(self, completion_id: str, model: str, counter: UsageCounter) -> ChatCompletion:
        """The answer, its choices in order. All of them must be finished."""
        choices = sorted(join_chunks(self._chunks), key=lambda choice: choice.index)
        return ChatCompletion(
            id=completion_id,
            object="chat.completion",
            created=int(time.time()),
            model=model,
            choices=[self._choice(choice) for choice in choices],
            usage=counter.usage(),
            **({} if self._prompt_ids is None else {"prompt_token_ids": self._prompt_ids}),
        )

    def _choice(self, choice: Chunk) -> Choice:
        assert choice.finish_reason is not None
        return Choice(
            index=choice.index,
            message=AssistantMessage(role="assistant", content=choice.text, refusal=None),
            logprobs=ContentLogprobs().push(choice.text, choice.logprobs, last=True),
            finish_reason=choice.finish_reason,
            **({} if self._prompt_ids is None else {"token_ids": list(choice.token_ids)}),
        )
