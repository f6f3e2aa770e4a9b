"""The web app: OpenAI's chat API, health, and a page to try it, over any `Backend`."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from llava_serve.api.backends import Backend
from llava_serve.api.cache_scope import cache_salt
from llava_serve.api.chat import ChatAnswer
from llava_serve.api.completion import new_completion_id
from llava_serve.api.errors import WireError, log_refusal, openai_error
from llava_serve.api.key_limits import KeyLimitMiddleware
from llava_serve.api.keys import accepted_keys
from llava_serve.api.limiter import ConcurrencyLimiter
from llava_serve.api.middleware import REQUEST_ID, AdmissionMiddleware, APIKeyMiddleware, RequestContextMiddleware
from llava_serve.api.notes import HEADER as NOTES
from llava_serve.api.notes import IgnoredFields
from llava_serve.api.parse_process import Offload
from llava_serve.api.pipeline import GenerationRequest
from llava_serve.api.protocol import Answer, ChatRequest, Model, ModelList
from llava_serve.api.routing import CHAT_RESPONSES, ERROR_RESPONSES, route_reading_by
from llava_serve.api.validation import check_priority, completion_id, read_chat, sampling_of
from llava_serve.checkpoints.model_name import short_name
from llava_serve.config import ApiOptions
from llava_serve.errors import DeadlineExceededError, UnknownModelError, shown

LARGE_BODY_BYTES = 64 << 10
"""Takes about a millisecond to parse."""

_PAGE = Path(__file__).with_name("page.html")
_PAGE_POLICY = (
    "default-src 'none'; img-src blob: data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Health(Answer):
    """The answer of `/health`."""

    status: str
    model: str


def create_app(
    backend: Backend,
    options: ApiOptions,
    limiter: ConcurrencyLimiter | None = None,
    offload: Offload = asyncio.to_thread,
) -> FastAPI:
    """Makes the web app; it runs under uvicorn and as a Ray Serve ingress.

    Args:
        backend: what prepares prompts and generates chunks.
        options: access and limits.
        limiter: shared with requests that arrive another way; None makes one for this app.
        offload: parses large bodies. A thread shares the interpreter with the streams: it suits a process that does
            little else.

    Raises:
        RequestError: as `accepted_keys`.
    """
    app = FastAPI(title="llava-serve", version="1", docs_url=None, redoc_url=None, responses=ERROR_RESPONSES)
    model = Model(
        id=backend.model_name,
        object="model",
        created=int(time.time()),
        owned_by="llava-serve",
        default_max_tokens=options.default_max_tokens,
        generation_config="ignored",
    )
    ignored_fields = IgnoredFields()
    ignore_unknown = options.unknown_fields == "ignore"
    names = (model.id, short_name(model.id))
    page = _PAGE.read_text(encoding="utf-8")

    def check_model(name: str) -> None:
        if name not in names:
            raise UnknownModelError(
                f"The model '{shown(name)}' does not exist here; this server has '{model.id}'.", "model"
            )

    async def read(request: Request) -> ChatRequest:
        body = await _body(request, options.default_timeout_s)
        parse = partial(read_chat, body, ignore_unknown=ignore_unknown, image_order=options.image_order)
        parsed = parse() if len(body) < LARGE_BODY_BYTES else await offload(parse)
        request.state.notes += [*ignored_fields.notes(parsed.ignored), *parsed.notes]
        request.state.conversation = parsed.conversation
        return parsed.wire

    chat = APIRouter(route_class=route_reading_by(read))

    @chat.post("/v1/chat/completions", summary="Create a chat completion about pictures", responses=CHAT_RESPONSES)
    async def chat_completions(request: Request, wire: ChatRequest) -> Response:
        if wire.model is not None:
            check_model(wire.model)
        priority = wire.priority or 0
        check_priority(priority, options.priority_range)
        seconds = min(wire.timeout or options.default_timeout_s, options.max_timeout_s)
        work = GenerationRequest(
            asked=request.state.conversation,
            sampling=sampling_of(wire, options.default_max_tokens),
            request_id=new_completion_id(),
            deadline=request.state.arrived + seconds,
            conv_mode=wire.conv_mode,
            priority=priority,
            cache_salt=cache_salt(options.cache_scope, getattr(request.state, "client", None), wire.cache_salt),
        )
        return ChatAnswer(backend, wire, work, request.state.request_id, completion_id(wire, work.request_id))

    @app.get("/v1/models", summary="List the models")
    async def models() -> ModelList:
        return ModelList(object="list", data=[model])

    @app.get("/v1/models/{name:path}", summary="Describe a model")
    async def one_model(name: str) -> Model:
        check_model(name)
        return model

    @app.get("/health", summary="Report whether the model can answer")
    async def health() -> Health:
        await backend.check_health()
        return Health(status="ok", model=model.id)

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY, "Cache-Control": "no-cache"})

    app.include_router(chat)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    # The middleware that is added last runs first.
    app.add_middleware(KeyLimitMiddleware, options=options)
    app.add_middleware(
        AdmissionMiddleware,
        limiter=limiter or ConcurrencyLimiter(options.max_in_flight, options.max_in_flight_bytes),
        max_body_bytes=options.max_body_bytes,
    )
    if (keys := accepted_keys(options)) is not None:
        app.add_middleware(APIKeyMiddleware, keys=keys)
    app.add_middleware(RequestContextMiddleware)
    if options.cors_origins:  # outermost: a preflight has no key, and errors need the headers, too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, NOTES, "retry-after"],
        )
    return app


async def _body(request: Request, timeout_s: float) -> bytes:
    """Reads the body within a time limit: a slow client must not stay in flight for ever."""
    try:
        async with asyncio.timeout(timeout_s):
            return await request.body()
    except TimeoutError:
        raise DeadlineExceededError("The request's body did not arrive in time.") from None


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Answers the router's own errors (unknown path, wrong method) in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    method, path = shown(request.method), shown(request.url.path)
    message = {
        404: f"There is no endpoint {method} {path}.",
        405: f"{method} is not allowed at {path}.",
    }.get(error.status_code, "The request cannot be served.")
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    wire = WireError(error.status_code, "invalid_request_error", code)
    log_refusal(wire, request.state.request_id)
    return JSONResponse(openai_error(message, wire), wire.status, error.headers)
