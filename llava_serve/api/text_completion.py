"""`POST /v1/completions`: the answer goes on from a raw prompt, without a template. OpenAI's legacy form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import isnan
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Field

from llava_serve.api.answer import GeneratedAnswer
from llava_serve.api.completion import CompletionForm
from llava_serve.api.field_types import Integer, LimitFromZero
from llava_serve.api.protocol import (
    Answer,
    ChoiceLogprobs,
    GenerationFields,
    PromptLogprobs,
    TokenLogprobs,
    Usage,
)
from llava_serve.api.routing import reading_route, responses_of
from llava_serve.api.service import Service
from llava_serve.api.validation import completion_id
from llava_serve.errors import RequestError
from llava_serve.types import Chunk, FinishReason, PreparedPrompt, RawPrompt, TokenLogprob

DEFAULT_MAX_TOKENS = 16
"""OpenAI's and vLLM's for this endpoint."""
MAX_PROMPT_IDS = 65_536


def _only_one(prompt: Any) -> Any:
    """The prompt of a list of one: clients send lists."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, list) and len(prompt) > MAX_PROMPT_IDS:
        # a union of types would report the fault of another one
        raise ValueError(f"must have {MAX_PROMPT_IDS} items or fewer")
    if isinstance(prompt, str) or (isinstance(prompt, list) and all(type(each) is int for each in prompt)):
        return prompt
    raise ValueError("must be one text or the token ids of one, or a list of one of them")


Prompt = str | Annotated[list[Integer], Field(max_length=MAX_PROMPT_IDS, fail_fast=True)]


class CompletionRequest(GenerationFields):
    """A completion request. `suffix` and a `best_of` above 1 are not supported.

    Attributes:
        prompt: one text, in which markup has no effect, or its token ids; or a list of one of them.
        logprobs: return the log-probability of each token, and of this many alternatives.
        echo: the text begins with the prompt, and so do the `logprobs`.
        max_tokens: 0, with `echo` or `prompt_logprobs`, gives no answer.
        add_special_tokens: a text gets the tokens that the tokenizer begins a prompt with; true by default. vLLM's.
    """

    prompt: Annotated[Prompt, BeforeValidator(_only_one, json_schema_input_type=Prompt | list[str])]
    logprobs: Annotated[Integer, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    max_tokens: LimitFromZero = None
    add_special_tokens: bool | None = None

    def field_name(self, param: str | None) -> str | None:
        """As `Wire` says."""
        return "prompt" if param == "messages" else param

    @property
    def alternatives(self) -> int | None:
        """As `GenerationFields` says."""
        return self.logprobs

    @property
    def prompt_alternatives(self) -> int | None:
        """As `GenerationFields` says.

        Raises:
            RequestError: nothing would be answered, or the scores would come too late.
        """
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise RequestError("max_tokens 0 needs echo or prompt_logprobs.", "max_tokens")
        if self.echo and self.logprobs is not None and self.stream and (self.n or 1) > 1:
            raise RequestError("A stream with echo and logprobs has one answer: leave n out.", "n")
        echoed = self.logprobs if self.max_tokens != 0 else self.logprobs or 0  # 0: so that no answer is allowed
        asked = (self.prompt_logprobs, echoed if self.echo else None)
        return max((each for each in asked if each is not None), default=None)


class TextLogprobs(Answer):
    """The tokens of a choice, or of a piece of it: each with its log-probability, alternatives by their text, and where
    it begins in the choice's text, in characters. The first token of an echoed prompt has null: nothing comes before
    it."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Answer):
    """One of the `n` answers, or a piece of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class TextCompletion(Answer):
    """The answer, or one event of a stream. With `include_usage`, `usage` is null on all events but the last."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
    timings: dict[str, float] | None = None


class TextShape:
    """The objects of one request."""

    def __init__(self, wire: CompletionRequest) -> None:
        self.every_token = bool(wire.echo)
        self._alternatives = wire.logprobs
        self._scored: Sequence[TokenLogprob] = ()  # the prompt's tokens, of choice 0
        self._offsets: Counter[int] = Counter()  # of the next token, by choice

    def shown(self, chunk: Chunk, prepared: PreparedPrompt, *, first: bool) -> Chunk:
        """With `echo` the first one of a choice begins with the prompt."""
        if not (first and self.every_token):
            return chunk
        if chunk.prompt_logprobs is not None:
            self._scored = [each for each in chunk.prompt_logprobs if each is not None]
        logprobs = None if self._alternatives is None else (*self._scored, *(chunk.logprobs or ()))
        return replace(chunk, text=prepared.prompt + chunk.text, logprobs=logprobs)

    def choice(self, choice: Chunk, logprobs: ChoiceLogprobs | None, **ids: Any) -> TextChoice:
        """A complete choice."""
        return TextChoice(
            index=choice.index,
            text=choice.text,
            logprobs=None if logprobs is None else self._logprobs(choice.index, logprobs),
            finish_reason=choice.finish_reason,
            **ids,
        )

    def piece(self, chunk: Chunk, logprobs: ChoiceLogprobs | None, *, first: bool, **ids: Any) -> TextChoice:
        """What is new in a choice."""
        return self.choice(chunk, logprobs, **ids)

    def completion(self, **fields: Any) -> TextCompletion:
        """The whole answer. Each choice has the prompt's log-probabilities, as in vLLM."""
        if (scored := fields.pop("prompt_logprobs", None)) is not None:
            fields["choices"] = [each.model_copy(update={"prompt_logprobs": scored}) for each in fields["choices"]]
        return TextCompletion(object="text_completion", **fields)

    def event(self, **fields: Any) -> TextCompletion:
        """One event of a stream."""
        return self.completion(**fields)

    def _logprobs(self, index: int, logprobs: ChoiceLogprobs) -> TextLogprobs:
        offsets = []
        for token in logprobs.content:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token.token)
        return TextLogprobs(
            tokens=[token.token for token in logprobs.content],
            token_logprobs=[None if isnan(token.logprob) else token.logprob for token in logprobs.content],
            top_logprobs=[self._top(token) for token in logprobs.content],
            text_offset=offsets,
        )

    def _top(self, token: TokenLogprobs) -> dict[str, float] | None:
        """The alternatives and, as in OpenAI's API, the token itself. Of those with the same text the likeliest."""
        if isnan(token.logprob):
            return None
        best = {each.token: each.logprob for each in reversed(token.top_logprobs[: self._alternatives])}
        return {token.token: token.logprob} | best


def text_routes(service: Service) -> APIRouter:
    """The endpoint."""
    routes = APIRouter(route_class=reading_route(CompletionRequest, service.read, TextCompletion))

    @routes.post(
        "/v1/completions",
        summary="Go on from a text",
        responses=responses_of(TextCompletion, TextCompletion),
    )
    async def completions(request: Request, wire: CompletionRequest) -> Response:
        prompt = wire.prompt if isinstance(wire.prompt, str) else tuple(wire.prompt)
        asked = RawPrompt(prompt, wire.add_special_tokens is not False)
        work = service.generation_request(request, wire, asked, default_max_tokens=DEFAULT_MAX_TOKENS)
        form = CompletionForm(TextShape(wire), wire, completion_id(wire, "cmpl-", work.request_id), service.model.name)
        return GeneratedAnswer(service.backend, work, form, request.state.request_id)

    return routes
