"""`POST /tokenize` and `/detokenize`: what a prompt takes, from the picture tier, before the model works on it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from llava_serve.api.field_types import Integer
from llava_serve.api.protocol import Answer, ChatRequest
from llava_serve.api.routing import reading_route, responses_of
from llava_serve.api.service import Service
from llava_serve.deadline import deadline_scope
from llava_serve.errors import RequestError
from llava_serve.openai_messages import MAX_MESSAGES, WireMessage
from llava_serve.tokenization import TokenizedPrompt
from llava_serve.types import Asked, RawPrompt
from llava_serve.wire import Wire

MAX_DETOKENIZED = 65_536
"""Ids in one request."""


class TokenizeRequest(ChatRequest):
    """A prompt, or the body of a chat completion as it is; of the latter what does not change the prompt is ignored.

    Attributes:
        prompt: a text without a template.
        messages: a conversation; instead of `prompt`.
        add_special_tokens: a `prompt` gets the tokens that the tokenizer begins a prompt with; true by default. The
            template decides for a conversation.
        return_token_strs: return the text of each token, too.
    """

    prompt: str | None = None
    messages: Annotated[list[WireMessage], Field(max_length=MAX_MESSAGES, fail_fast=True)] = Field(default_factory=list)
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class ImageTokens(Answer):
    """What an image takes: positions in the prompt, tiles for the vision tower. Its size is in pixels."""

    tokens: int
    tiles: int
    width: int
    height: int


class Tokenized(Answer):
    """The tokens of a prompt. `count`, `max_model_len`, `tokens` and `token_strs` are vLLM's, the others ours.

    Attributes:
        count: of all tokens, those of images included.
        tokens: ids; an image's positions have the id -200.
        token_strs: the text of each token, `<image>` for an image's; null if not asked for.
        text_tokens, image_tokens: the parts of `count`.
        images: in order.
        fits: the context has room for the prompt and one token of an answer.
    """

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None
    text_tokens: int
    image_tokens: int
    images: list[ImageTokens]
    fits: bool


class DetokenizeRequest(Wire):
    """Token ids.

    Attributes:
        tokens: -200, an image's position, has no text, and neither have control tokens.
    """

    model: str | None = None
    tokens: Annotated[list[Integer], Field(max_length=MAX_DETOKENIZED, fail_fast=True)]


class Detokenized(Answer):
    """The text of token ids."""

    prompt: str


def tokenization_routes(service: Service) -> APIRouter:
    """Both endpoints."""
    tokenizing = APIRouter(route_class=reading_route(TokenizeRequest, service.read))
    detokenizing = APIRouter(route_class=reading_route(DetokenizeRequest, service.read))

    @tokenizing.post("/tokenize", summary="Count and list the tokens of a prompt", responses=responses_of(Tokenized))
    async def tokenize(request: Request, wire: TokenizeRequest) -> Response:
        service.model.check(wire.model)
        if (wire.prompt is None) == (not wire.messages):
            raise RequestError("Give prompt or messages, and not both.", "prompt")
        asked: Asked
        if wire.prompt is not None:
            asked = RawPrompt(wire.prompt, wire.add_special_tokens is not False)
        elif wire.add_special_tokens:
            raise RequestError("add_special_tokens goes with prompt; the template of messages has its own.", "messages")
        else:
            asked = service.conversation(request, wire)
        deadline = service.deadline(request, wire.timeout)
        async with deadline_scope(deadline):
            tokenized = await service.backend.tokenize(
                asked, conv_mode=wire.conv_mode, deadline=deadline, texts=bool(wire.return_token_strs)
            )
        return _json(_wire(tokenized))

    @detokenizing.post("/detokenize", summary="Give the text of token ids", responses=responses_of(Detokenized))
    async def detokenize(request: Request, wire: DetokenizeRequest) -> Response:
        service.model.check(wire.model)
        deadline = service.deadline(request)
        async with deadline_scope(deadline):
            return _json(Detokenized(prompt=await service.backend.detokenize(wire.tokens, deadline=deadline)))

    routes = APIRouter()
    routes.include_router(tokenizing)
    routes.include_router(detokenizing)
    return routes


def _wire(tokenized: TokenizedPrompt) -> Tokenized:
    image_tokens = sum(image.tokens for image in tokenized.images)
    return Tokenized(
        count=len(tokenized.token_ids),
        max_model_len=tokenized.max_model_len,
        tokens=list(tokenized.token_ids),
        token_strs=None if tokenized.token_texts is None else list(tokenized.token_texts),
        text_tokens=len(tokenized.token_ids) - image_tokens,
        image_tokens=image_tokens,
        images=[
            ImageTokens(tokens=image.tokens, tiles=image.tiles, width=image.size[0], height=image.size[1])
            for image in tokenized.images
        ],
        fits=tokenized.fits,
    )


def _json(answer: Answer) -> Response:
    return Response(answer.json_bytes(), media_type="application/json")
