"""From the library's chunks to OpenAI's objects: the events of a stream, or the one answer that they add up to."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from llava_serve.api.answers import (
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
from llava_serve.types import Chunk, FinishReason, PreparedPrompt, TokenLogprob

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def new_completion_id() -> str:
    """Unique, which an id that a client chose is not."""
    return f"chatcmpl-{uuid.uuid4().hex}"


class Tally:
    """Counts what an answer costs, chunk by chunk, and which choices have come to their end.

    Args:
        prepared: the prompt.
        choices: how many there are to be.
    """

    def __init__(self, prepared: PreparedPrompt, choices: int) -> None:
        self._prompt = prepared.num_tokens
        self._image = sum(end - start for start, end in prepared.image_spans)
        self._cached = 0
        self._completion = 0
        self._open = set(range(choices))

    @property
    def complete(self) -> bool:
        """Every choice has said why it ended."""
        return not self._open

    def add(self, chunk: Chunk) -> None:
        """Takes a chunk of any choice."""
        self._completion += len(chunk.token_ids)
        self._cached = max(self._cached, chunk.num_cached_tokens)
        if chunk.finish_reason is not None:
            self._open.discard(chunk.index)

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
        tell_usage: `stream_options.include_usage`.
    """

    def __init__(self, completion_id: str, model: str, tell_usage: bool) -> None:
        self._id = completion_id
        self._model = model
        self._created = int(time.time())
        self._tell_usage = tell_usage
        self._begun: set[int] = set()

    def event(self, chunk: Chunk) -> ChatCompletionChunk | None:
        """None for a chunk that says nothing yet: its token is not a whole character, or may begin a stop string."""
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

    def last(self, tally: Tally) -> ChatCompletionChunk | None:
        """The event that tells the usage, where it is asked for."""
        return self._chunk([], tally.usage()) if self._tell_usage else None

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None) -> ChatCompletionChunk:
        told = {"usage": usage} if self._tell_usage else {}  # a field that is set is sent, null or not
        return ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=choices,
            **told,
        )


@dataclass(slots=True)
class _Parts:
    """What came of one choice."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None


class WholeAnswer:
    """Gathers the chunks of an unstreamed answer."""

    def __init__(self) -> None:
        self._choices: dict[int, _Parts] = {}

    def add(self, chunk: Chunk) -> None:
        """Takes a chunk of any choice."""
        parts = self._choices.setdefault(chunk.index, _Parts())
        parts.texts.append(chunk.text)
        if chunk.logprobs is not None:
            parts.logprobs = parts.logprobs or []
            parts.logprobs.extend(chunk.logprobs)
        if chunk.finish_reason is not None:
            parts.finish_reason = chunk.finish_reason

    def completion(self, completion_id: str, model: str, tally: Tally) -> ChatCompletion:
        """The answer, its choices in order. All of them must have ended."""
        return ChatCompletion(
            id=completion_id,
            object="chat.completion",
            created=int(time.time()),
            model=model,
            choices=[_choice(index, parts) for index, parts in sorted(self._choices.items())],
            usage=tally.usage(),
        )


def _choice(index: int, parts: _Parts) -> Choice:
    assert parts.finish_reason is not None
    return Choice(
        index=index,
        message=AssistantMessage(role="assistant", content="".join(parts.texts), refusal=None),
        logprobs=wire_logprobs(parts.logprobs),
        finish_reason=parts.finish_reason,
    )


def wire_logprobs(logprobs: Sequence[TokenLogprob] | None) -> ChoiceLogprobs | None:
    """OpenAI's form of the library's log-probabilities."""
    if logprobs is None:
        return None
    return ChoiceLogprobs(
        content=[
            TokenLogprobs(
                token=token.text,
                bytes=token_bytes(token.text),
                logprob=token.logprob,
                top_logprobs=[
                    Alternative(token=text, bytes=token_bytes(text), logprob=logprob) for _, text, logprob in token.top
                ],
            )
            for token in logprobs
        ]
    )


def token_bytes(text: str) -> list[int]:
    """UTF-8, but for a token that is one byte of a character: vocabularies write it `<0xE2>`."""
    return [int(text[3:5], 16)] if _BYTE_TOKEN.fullmatch(text) else list(text.encode())
