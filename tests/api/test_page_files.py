"""The files of the page over HTTP: open to all, from here alone, and kept by browsers."""

from __future__ import annotations

import re

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from llava_serve.api.app import create_app
from llava_serve.api.page_files import PAGE_PATHS
from llava_serve.config import ApiOptions
from support.api_server import PacedBackend, app_over, serving
from support.paths import ROOT

FILES = sorted(PAGE_PATHS)


def test_every_file_needs_no_key_and_is_kept_by_browsers() -> None:
    with app_over(PacedBackend(), api_keys=("sesame",)) as web:
        for path in FILES:
            whole = web.get(path)
            assert whole.status_code == 200, path
            policy = whole.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert whole.headers["x-content-type-options"] == "nosniff"
            again = web.get(path, headers={"If-None-Match": whole.headers["etag"]})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", whole.headers["etag"])
            assert web.get(path, headers={"If-None-Match": '"other"'}).content == whole.content
            head = web.head(path)
            assert (head.status_code, head.content) == (200, b"")
            assert int(head.headers["content-length"]) == len(whole.content)
        for path in (
            "/page",
            "/page/",
            "/page/page.html",
            "/page/../page_files.py",
            "/page/%2e%2e/app.py",
            "/v1/models",
        ):
            assert web.get(path).status_code == 401, path


def test_nothing_comes_from_elsewhere_and_every_file_is_small() -> None:
    for file in (ROOT / "llava_serve" / "api" / "page").iterdir():
        if file.suffix == ".png":
            assert file.stat().st_size < 10_000
            continue
        text = file.read_text("utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?://|@import|\bstyle=|\bon\w+=", text), file.name
        assert text.count("\n") < 300, file.name


def test_every_link_between_the_files_is_relative_and_has_its_file() -> None:
    with app_over(PacedBackend()) as web:
        links = set(re.findall(r'(?:src|href)="([^"]*)"', web.get("/").text))
        for path in (path for path in FILES if path.endswith(".js")):
            links |= {f"page/{name}" for name in re.findall(r'from "\./([^"]*)"', web.get(path).text)}
        assert {f"/{link}" for link in links} | {"/"} == PAGE_PATHS


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_under_serves_route_prefix_the_address_gets_its_slash(method: str) -> None:
    app = create_app(PacedBackend(), ApiOptions(api_keys=("sesame",)))

    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "root_path": "/of/llava"} if scope["type"] == "http" else scope, receive, send)

    with serving(mounted) as url, httpx.Client(follow_redirects=True) as web:
        answer = web.request(method, f"{url}/of/llava")
        assert (answer.status_code, str(answer.url)) == (200, f"{url}/of/llava/")
        assert all("x-request-id" in each.headers for each in (answer, *answer.history))
        assert web.get(f"{url}/of/llava/page/page.js").status_code == 200
        assert web.post(f"{url}/of/llava", json={}).status_code == 401
