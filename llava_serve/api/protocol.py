"""The wire format: OpenAI's chat completion with our own fields beside it, and the responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from llava_serve.api.field_types import AnyLimit, Bias, Integer, Limit, Seed, Stops, TokenIds
from llava_serve.api.neutral import NEUTRAL_FIELDS
from llava_serve.api.structured import ResponseFormat, StructuredOutputs
from llava_serve.errors import RequestError
from llava_serve.openai_messages import MAX_MESSAGES, WireMessage
from llava_serve.types import FinishReason
from llava_serve.wire import Wire, one_of

MAX_SALT = 1024
"""Characters; vLLM's bound."""


class StreamOptions(Wire):
    """What a stream tells beside the answer.

    Attributes:
        include_usage: one more event before `[DONE]` has the usage.
        continuous_usage_stats: with `include_usage`, every event has the usage so far, as in vLLM.
    """

    NEUTRAL = {"include_obfuscation": one_of(False)}  # noqa: RUF012 (a ClassVar of the base)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationFields(Wire):
    """What every request for an answer may have. Defaults and ranges that are not written here are those of
    `SamplingParams`.

    Attributes:
        model: a name from `/v1/models`; may be left out, since one model is served.
        max_tokens, max_completion_tokens: two names for the longest answer in tokens; without them it may go on to the
            end of the context, or to `default_max_tokens` in `/v1/models`.
        min_tokens: tokens before which nothing ends the answer. vLLM's.
        temperature: 0 takes the likeliest token each time.
        top_p: sample from the smallest set of tokens with this total probability; 0 takes the likeliest token.
        min_p: sample from tokens with at least this share of the likeliest one's probability. vLLM's.
        stop: strings that end the answer.
        stop_token_ids: tokens that end the answer, too. vLLM's.
        include_stop_str_in_output: the answer has the stop string or token that ended it. vLLM's.
        logit_bias: added to the logits of tokens, by token id.
        seed: the same seed and request give the same answer.
        n: number of answers.
        presence_penalty, frequency_penalty: as OpenAI defines them.
        stream: send the answer as it is generated, as server-sent events.
        stream_options: what a stream tells beside the answer.
        user: a label of the end user; accepted and ignored.
        top_k: sample from this many likeliest tokens; 0 is all. Ours.
        num_beams: beam search above 1. Ours.
        repetition_penalty: above 1 makes tokens of the prompt and the answer less likely. Ours.
        ignore_eos: go on to `max_tokens` even after an end token. Ours.
        timeout: seconds that the answer may take from the request's arrival; `api.default_timeout_s` without it, and
            `api.max_timeout_s` at most. Ours.
        priority: a smaller number is served earlier, as in vLLM; 0 by default. Above 0 is batch work, which takes
            nothing from the others. Ours.
        cache_salt: requests share cached prefixes and images only with those of the same salt, as in vLLM. Ours.
        return_token_ids: return the ids of the prompt and the answer; an image's positions have the id -200. vLLM's.
        return_timings: return how long the stages of the answer took, in milliseconds: in the header `Server-Timing`,
            and as `timings` in the answer or in the last event of a stream. Ours.
        request_id: names the completion: its id ends with this. vLLM's.
        prompt_logprobs: return the log-probability of each text token of the prompt, and of this many alternatives; not
            in a stream. vLLM's.
        response_format: the answer is a JSON object, or keeps to a JSON schema.
        structured_outputs: the answer keeps to a schema, a regular expression, a choice or a grammar. vLLM's.
        guided_json, guided_regex, guided_choice, guided_grammar: the same, vLLM's older names.
    """

    NEUTRAL = NEUTRAL_FIELDS

    model: str | None = None
    max_tokens: Limit = None
    max_completion_tokens: Limit = None
    min_tokens: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop: Stops = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: Bias = None
    seed: Seed = None
    n: Integer | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    top_k: AnyLimit = None
    num_beams: Integer | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT)] | None = None
    priority: Integer | None = None
    return_token_ids: bool | None = None
    return_timings: bool | None = None
    request_id: str | None = None
    prompt_logprobs: Integer | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report beside each token; None reports no log-probabilities."""
        return None

    @property
    def prompt_alternatives(self) -> int | None:
        """The same of the prompt's tokens."""
        return self.prompt_logprobs


class ChatRequest(GenerationFields):
    """A chat completion request.

    Attributes:
        messages: the conversation, oldest turn first; the answer goes on from a last message of the assistant.
        logprobs: return the log-probability of each token.
        top_logprobs: return the log-probabilities of this many alternatives, too.
        conv_mode: the prompt template, instead of the model's own. Ours.
        continue_final_message: the answer goes on from the last message, which is the assistant's, as it does without
            this field. vLLM's.
        add_generation_prompt: the prompt ends where the assistant's turn begins, also after one of its own. vLLM's.
    """

    messages: Annotated[list[WireMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    logprobs: bool | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=20)] | None = None
    conv_mode: str | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    @property
    def alternatives(self) -> int | None:
        """As `GenerationFields` says.

        Raises:
            RequestError: only one of the two fields is given.
        """
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true.", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


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


class PromptLogprob(Answer):
    """A token at a position of the prompt: the prompt's own, or an alternative. The likeliest has rank 1."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""Of each position of a prompt, by token id; null for the first, before which nothing comes, and for an image's."""


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
    token_ids: list[int] | None = None


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
    token_ids: list[int] | None = None


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
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    timings: dict[str, float] | None = None


class ChatCompletionChunk(Answer):
    """One event of a stream. With `include_usage`, `usage` is null on all but the last, which has no choices; with
    `return_token_ids`, the first one of a choice has the prompt's ids."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
    timings: dict[str, float] | None = None


class ErrorDetail(Answer):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(Answer):
    """The body of every error response."""

    error: ErrorDetail
