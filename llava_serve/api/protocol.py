"""The wire format: OpenAI's chat completion with our own fields beside it, and the responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from llava_serve.openai_messages import MAX_MESSAGES, WireMessage
from llava_serve.types import FinishReason
from llava_serve.wire import Wire, anything, one_of

MAX_SALT = 256
"""Characters; vLLM's documentation asks for 43."""
MAX_STOPS = 16
"""OpenAI allows 4; each is searched for at every token, so their number is limited."""


class StreamOptions(Wire):
    """How a stream ends.

    Attributes:
        include_usage: one more event before `[DONE]` has the usage.
    """

    NEUTRAL = {"include_obfuscation": one_of(False)}  # noqa: RUF012 (a ClassVar of the base)

    include_usage: bool | None = None


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


Stops = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS, fail_fast=True)]


class ChatRequest(Wire):
    """A chat completion request. Defaults and ranges that are not written here are those of `SamplingParams`.

    Attributes:
        model: a name from `/v1/models`.
        messages: the conversation, oldest turn first; the last one is the user's.
        max_tokens, max_completion_tokens: two names for the longest answer in tokens.
        temperature: 0 takes the likeliest token each time.
        top_p: sample from the smallest set of tokens with this total probability.
        stop: strings that end the answer.
        seed: the same seed and request give the same answer.
        n: number of answers.
        logprobs: return the log-probability of each token.
        top_logprobs: return the log-probabilities of this many alternatives, too.
        presence_penalty, frequency_penalty: as OpenAI defines them.
        stream: send the answer as it is generated, as server-sent events.
        stream_options: of the stream.
        user: a label of the end user; accepted and ignored.
        top_k: sample from this many likeliest tokens; 0 is all. Ours.
        num_beams: beam search above 1. Ours.
        repetition_penalty: above 1 makes tokens of the prompt and the answer less likely. Ours.
        conv_mode: the prompt template, instead of the model's own. Ours.
        ignore_eos: go on to `max_tokens` even after an end token. Ours.
        timeout: seconds that the answer may take from the request's arrival. Ours.
        priority: a smaller number is served earlier, as in vLLM; 0 by default. Ours.
        cache_salt: requests share cached prefixes and images only with those of the same salt, as in vLLM. Ours.
    """

    NEUTRAL = {  # noqa: RUF012 (a ClassVar of the base)
        "function_call": one_of("none", "auto"),
        "functions": one_of([]),
        "logit_bias": one_of({}),
        "metadata": anything,
        "modalities": one_of(["text"]),
        "parallel_tool_calls": one_of(True, False),
        "prompt_cache_key": anything,
        "prompt_cache_options": anything,
        "prompt_cache_retention": anything,
        "reasoning_effort": one_of("none"),
        "response_format": one_of({"type": "text"}),
        "safety_identifier": anything,
        "service_tier": one_of("auto", "default"),
        "store": one_of(False),
        "tool_choice": one_of("none", "auto"),
        "tools": one_of([]),
        "verbosity": one_of("medium"),
    }

    model: str
    messages: Annotated[list[WireMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: Annotated[Stops | None, BeforeValidator(_as_list, json_schema_input_type=str | Stops | None)] = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    top_k: int | None = None
    num_beams: int | None = None
    repetition_penalty: float | None = None
    conv_mode: str | None = None
    ignore_eos: bool | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    priority: int | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT)] | None = None


class Answer(BaseModel):
    """Base of the responses: made here, so not validated for unknown fields."""

    model_config = ConfigDict(frozen=True)

    def json_bytes(self) -> bytes:
        """Compact JSON of the fields that were set."""
        return self.model_dump_json(exclude_unset=True).encode()


class Alternative(Answer):
    """An alternative token: its text and its UTF-8 bytes, since a token can be a part of a character."""

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
    """A complete answer."""

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
    """New text; the first one of a choice has the role."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Answer):
    """New text of one of the `n` answers."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None


class PromptTokensDetails(Answer):
    """Parts of the prompt: images, and positions that were in the cache."""

    cached_tokens: int
    image_tokens: int


class Usage(Answer):
    """Tokens, as positions in the model: an image takes as many as it has features."""

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


class ErrorDetail(Answer):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(Answer):
    """The body of every error response."""

    error: ErrorDetail
