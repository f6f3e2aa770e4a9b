"""`POST /v1/chat/completions`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from llava_serve.api.answer import GeneratedAnswer
from llava_serve.api.completion import ChatShape, CompletionForm
from llava_serve.api.protocol import ChatCompletion, ChatCompletionChunk, ChatRequest
from llava_serve.api.routing import reading_route, responses_of
from llava_serve.api.service import Service
from llava_serve.api.validation import completion_id


def chat_routes(service: Service) -> APIRouter:
    """The endpoint."""
    routes = APIRouter(route_class=reading_route(ChatRequest, service.read_chat, ChatCompletionChunk))

    @routes.post(
        "/v1/chat/completions",
        summary="Create a chat completion about pictures",
        responses=responses_of(ChatCompletion, ChatCompletionChunk),
    )
    async def chat_completions(request: Request, wire: ChatRequest) -> Response:
        work = service.generation_request(request, wire, request.state.conversation, conv_mode=wire.conv_mode)
        answer_id = completion_id(wire, "chatcmpl-", work.request_id)
        form = CompletionForm(ChatShape(), wire, answer_id, service.model.name)
        return GeneratedAnswer(service.backend, work, form, request.state.request_id)

    return routes
