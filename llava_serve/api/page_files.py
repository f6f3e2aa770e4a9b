"""The page to try the model: fixed files in memory. They need no API key, since the page is where users type theirs."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

_FOLDER = Path(__file__).with_name("page")
_EXAMPLE = Path(__file__).parents[1] / "builtin" / "demo.png"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
_FILES = {"/": _FOLDER / "page.html"} | {
    f"/page/{path.name}": path for path in (*_FOLDER.iterdir(), _EXAMPLE) if path.suffix != ".html"
}
"""The file at each path. The page names the others relative to its own address, so that it works under any prefix."""

PAGE_PATHS = frozenset(_FILES)

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a browser keeps the files, and asks each time whether they are the same
}


def page_routes() -> APIRouter:
    """`/`, and the files that the page consists of."""
    routes = APIRouter(include_in_schema=False)
    for path, file in _FILES.items():
        routes.add_api_route(path, _File(file).answer, methods=["GET"])
    return routes


class _File:
    """Answers with a file, or with 304 to a browser that has it. The ETag is of the content: replicas agree on it."""

    def __init__(self, file: Path) -> None:
        self._content = file.read_bytes()
        self._type = _TYPES[file.suffix]
        self._headers = _HEADERS | {"ETag": f'"{hashlib.sha256(self._content).hexdigest()[:32]}"'}

    async def answer(self, request: Request) -> Response:
        known = request.headers.get("if-none-match", "")
        if self._headers["ETag"] in known:  # a proxy that compresses marks it as weak: W/"..."
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, media_type=self._type, headers=self._headers)
