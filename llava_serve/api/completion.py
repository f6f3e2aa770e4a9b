"""From the library's chunks to OpenAI's objects: the events of a stream, or one completion."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from llava_serve.api.protocol import (
    Alternative,
    AssistantMessage,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
    PromptTokensDetails,
    TokenLogprobs,
    Usage,
)
from llava_serve.engine.output_processor import join_chunks
from llava_serve.errors import EngineDeadError
from llava_serve.types import Chunk, PreparedPrompt, TokenLogprob


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
        include_usage: `stream_options.include_usage`.
    """

    def __init__(self, completion_id: str, model: str, include_usage: bool) -> None:
        self._id = completion_id
        self._model = model
        self._created = int(time.time())
        self._include_usage = include_usage
        self._begun: set[int] = set()

    def event(self, chunk: Chunk) -> ChatCompletionChunk | None:
        """None for a chunk without text yet: its token is not a whole character, or may begin a stop string."""
        first = chunk.index not in self._begun
        if not (first or chunk.text or chunk.finish_reason or chunk.logprobs):
            return None
        self._begun.add(chunk.index)
        delta = Delta(role="assistant", content=chunk.text) if first else Delta(content=chunk.text)
        choice = ChunkChoice(
            index=chunk.index,
            delta=delta if first or chunk.text else Delta(),
            logprobs=wire_logprobs(chunk.logprobs),
            finish_reason=chunk.finish_reason,
        )
        return self._chunk([choice], None)

    def last(self, counter: UsageCounter) -> ChatCompletionChunk | None:
        """The event with the usage, if the request asks for it."""
        return self._chunk([], counter.usage()) if self._include_usage else None

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None) -> ChatCompletionChunk:
        reported = {"usage": usage} if self._include_usage else {}  # a field that is set is sent, even if it is null
        return ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=choices,
            **reported,
        )


class CompletionBuilder:
    """Gathers the chunks of an unstreamed answer."""

    def __init__(self) -> None:
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
            choices=[_choice(choice) for choice in choices],
            usage=counter.usage(),
        )


def _choice(choice: Chunk) -> Choice:
    assert choice.finish_reason is not None
    return Choice(
        index=choice.index,
        message=AssistantMessage(role="assistant", content=choice.text, refusal=None),
        logprobs=wire_logprobs(choice.logprobs),
        finish_reason=choice.finish_reason,
    )


def wire_logprobs(logprobs: Sequence[TokenLogprob] | None) -> ChoiceLogprobs | None:
    """OpenAI's form of the library's log-probabilities."""
    if logprobs is None:
        return None
    return ChoiceLogprobs(
        content=[
            TokenLogprobs(
                token=token.text,
                bytes=list(token.token_bytes),
                logprob=token.logprob,
                top_logprobs=[
                    Alternative(token=text, bytes=list(as_bytes), logprob=logprob)
                    for (_, text, logprob), as_bytes in zip(token.top, token.top_bytes, strict=True)
                ],
            )
            for token in logprobs
        ]
    )
