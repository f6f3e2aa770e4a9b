"""The web app: OpenAI's chat API, health, and a page to try it, over any `Backend`."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from llava_serve import __version__
from llava_serve.api.answer import SERVER_TIMING
from llava_serve.api.backends import Backend
from llava_serve.api.chat import chat_routes
from llava_serve.api.errors import WireError, openai_error
from llava_serve.api.key_limits import KeyLimitMiddleware, KeyLimits
from llava_serve.api.keys import accepted_keys
from llava_serve.api.limiter import ConcurrencyLimiter, limiter_of
from llava_serve.api.middleware import REQUEST_ID, AdmissionMiddleware, APIKeyMiddleware, RequestContextMiddleware
from llava_serve.api.model_list import model_routes
from llava_serve.api.notes import HEADER as NOTES
from llava_serve.api.page_files import page_routes
from llava_serve.api.parse_process import Offload, in_thread
from llava_serve.api.protocol import Answer
from llava_serve.api.responses import response_routes
from llava_serve.api.routing import ERROR_RESPONSES
from llava_serve.api.service import Service
from llava_serve.api.text_completion import text_routes
from llava_serve.api.tokenization import tokenization_routes
from llava_serve.config import ApiOptions
from llava_serve.errors import shown


class Version(Answer):
    """The answer of `/version`."""

    version: str


class Health(Answer):
    """The answer of `/health`. The status is `ok`, or `sleeping` or `starting` where a request starts the model."""

    status: str
    model: str


def create_app(
    backend: Backend,
    options: ApiOptions,
    limiter: ConcurrencyLimiter | None = None,
    offload: Offload = in_thread,
    key_limits: KeyLimits | None = None,
) -> FastAPI:
    """Makes the web app; it runs under uvicorn and as a Ray Serve ingress.

    Args:
        backend: what prepares prompts and generates chunks.
        options: access and limits.
        limiter: shared with requests that arrive another way; None makes one for this app.
        offload: parses large bodies. A thread shares the interpreter with the streams: it suits a process that does
            little else.
        key_limits: shared with the app that this one replaces; None makes those of the options.

    Raises:
        RequestError: as `accepted_keys`.
    """
    app = FastAPI(
        title="llava-serve",
        version="1",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect could lose a body; `RequestContextMiddleware` drops a final slash
        responses=ERROR_RESPONSES,
        # FastAPI's own spans and logs would have queries and the texts of errors; `llava_serve.tracing` makes ours.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    service = Service(backend, options, offload)

    @app.get("/health", summary="Report whether the model can answer")
    @app.get("/ping", summary="Report whether the model can answer, as /health does")
    async def health() -> Health:
        return Health(status=await backend.check_health(), model=service.model.name)

    @app.get("/version", summary="Report the server's version")
    async def version() -> Version:
        return Version(version=__version__)

    @app.get("/metrics", summary="Report this process's metrics, for Prometheus", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(backend.exporter.page(), media_type=CONTENT_TYPE_LATEST)

    for routes in (chat_routes, response_routes, text_routes, tokenization_routes, model_routes):
        app.include_router(routes(service))
    app.include_router(page_routes())
    app.add_exception_handler(HTTPException, _answer_http_exception)
    # The middleware that is added last runs first.
    limits = key_limits or KeyLimits(options.max_in_flight_per_key, options.requests_per_minute_per_key)
    app.add_middleware(KeyLimitMiddleware, limits=limits)
    app.add_middleware(
        AdmissionMiddleware,
        limiter=limiter or limiter_of(options, backend.exporter),
        max_body_bytes=options.max_body_bytes,
    )
    if (keys := accepted_keys(options)) is not None:
        app.add_middleware(APIKeyMiddleware, keys=keys)
    app.add_middleware(RequestContextMiddleware, metrics=service.metrics)
    if options.cors_origins:  # outermost: a preflight has no key, and errors need the headers, too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, NOTES, SERVER_TIMING, "retry-after"],
        )
    return app


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Answers the router's own errors (unknown path, wrong method) in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    method, path = shown(request.method), shown(request.url.path)
    message = {
        404: f"There is no endpoint {method} {path}; there are {_endpoints(request.app)}.",
        405: f"{method} is not allowed at {path}.",
    }.get(error.status_code, "The request cannot be served.")
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    wire = WireError(error.status_code, "invalid_request_error", code)
    request.state.record.refused(wire)
    return JSONResponse(openai_error(message, wire), wire.status, error.headers)


def _endpoints(app: FastAPI) -> str:
    """The described endpoints, as a sentence lists them."""
    return ", ".join(sorted(app.openapi()["paths"]))
