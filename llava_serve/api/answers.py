"""What goes back over the wire, in OpenAI's shapes. Fields that are not set are not sent."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from llava_serve.types import FinishReason


class Answer(BaseModel):
    """Base: made by us, so never checked for surplus."""

    model_config = ConfigDict(frozen=True)

    def json_bytes(self) -> bytes:
        """Compact JSON of the fields that were set."""
        return self.model_dump_json(exclude_unset=True).encode()


class Alternative(Answer):
    """A token that might have been, in UTF-8 beside its text, since a token can be a part of a character."""

    token: str
    bytes: list[int]
    logprob: float


class TokenLogprobs(Alternative):
    """A token of the answer."""

    top_logprobs: list[Alternative]


class ChoiceLogprobs(Answer):
    """The tokens of a choice, or of a piece of it."""

    content: list[TokenLogprobs]


class AssistantMessage(Answer):
    """A whole answer."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class Choice(Answer):
    """One of the `n` answers."""

    index: int
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason


class Delta(Answer):
    """What is new; the first one of a choice has the role."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Answer):
    """What is new in one of the `n` answers."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None


class PromptTokensDetails(Answer):
    """Parts of the prompt: pictures, and positions that were computed before."""

    cached_tokens: int
    image_tokens: int


class Usage(Answer):
    """Positions in the model; a picture takes as many as it has features."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ChatCompletion(Answer):
    """The answer to an unstreamed request."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class ChatCompletionChunk(Answer):
    """One event of a stream. With `include_usage`, `usage` is null on all but the last, which has no choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class Model(Answer):
    """An entry of `/v1/models`."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(Answer):
    """The answer of `/v1/models`."""

    object: Literal["list"]
    data: list[Model]
