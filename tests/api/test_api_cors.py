"""Pages of other origins: which may use the server, and what a browser needs to let them."""

from __future__ import annotations

import httpx
import pytest

from llava_serve.config import ApiOptions
from llava_serve.errors import EngineDeadError, RequestError
from support.api_server import BODY, PATH, PacedBackend, app_over

ORIGIN = "https://app.example.org"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
}


def allowed(response: httpx.Response) -> str | None:
    origin: str | None = response.headers.get("access-control-allow-origin")
    return origin


def test_a_preflight_needs_no_key_and_the_request_does() -> None:
    with app_over(PacedBackend(), cors_origins=[ORIGIN], api_keys=["secret"]) as web:
        preflight = web.options(PATH, headers=PREFLIGHT)
        refused = web.post(PATH, json=BODY, headers={"Origin": ORIGIN})
        answer = web.post(PATH, json=BODY, headers={"Origin": ORIGIN, "Authorization": "Bearer secret"})
    assert preflight.status_code == 200
    assert allowed(preflight) == ORIGIN
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert {"authorization", "x-stainless-lang"} <= set(
        preflight.headers["access-control-allow-headers"].replace(" ", "").split(",")
    )
    assert (refused.status_code, allowed(refused)) == (401, ORIGIN)
    assert (answer.status_code, allowed(answer)) == (200, ORIGIN)
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("stream", [False, True])
def test_errors_and_streams_carry_the_headers(stream: bool) -> None:
    failing = PacedBackend(failure=EngineDeadError("The engine has stopped."), fail_at=0)
    with app_over(failing, cors_origins=["*"]) as web:
        error = web.post(PATH, json=BODY | {"stream": stream}, headers={"Origin": ORIGIN})
    with app_over(PacedBackend(), cors_origins=["*"]) as web:
        answer = web.post(PATH, json=BODY | {"stream": stream}, headers={"Origin": ORIGIN})
    assert (error.status_code, allowed(error)) == (503, "*")
    assert (answer.status_code, allowed(answer)) == (200, "*")
    if stream:
        assert "no-transform" in answer.headers["cache-control"]


def test_other_origins_get_no_header() -> None:
    with app_over(PacedBackend(), cors_origins=[ORIGIN]) as web:
        preflight = web.options(PATH, headers=PREFLIGHT | {"Origin": "https://other.example.org"})
        answer = web.post(PATH, json=BODY, headers={"Origin": "https://other.example.org"})
    assert preflight.status_code == 400
    assert allowed(preflight) is allowed(answer) is None


def test_by_default_no_page_may_use_the_server() -> None:
    with app_over(PacedBackend()) as web:
        assert web.options(PATH, headers=PREFLIGHT).status_code == 405
        assert allowed(web.post(PATH, json=BODY, headers={"Origin": ORIGIN})) is None


@pytest.mark.parametrize("origin", ["app.example.org", "https://app.example.org/", "https://*.example.org", ""])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(RequestError, match="cors_origins"):
        ApiOptions(cors_origins=(origin,))
