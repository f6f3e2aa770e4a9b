"""Drives every client against a recorded server, and rewrites what is known of them.

`PYTHONPATH=tests .venv/bin/python -m support.recorded_clients [ID ...]` (from the repository's root) writes the rows of
docs/clients.md and, in tests/api/client_bodies, the kinds of request that got 200.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_serve.api.app import create_app
from llava_serve.api.in_process import InProcessBackend
from llava_serve.async_llm import AsyncLLM
from llava_serve.config import ApiOptions, EngineOptions
from support.api_server import serving
from support.clients import CLIENTS, Client, NotInstalledError, drive, installed
from support.paths import ROOT, TESTS

BODIES = TESTS / "api" / "client_bodies"
DOCUMENT = ROOT / "docs" / "clients.md"
CACHE = ROOT / ".pytest_cache" / "d" / "clients"
IMAGE = "data:image/png;base64,@DEMO_PNG_BASE64@"
"""What stands for every picture in a recorded body."""

Kind = tuple[str, str]


class Recorder:
    """Keeps one body of each kind that the app answers with 200.

    Attributes:
        bodies: by path and shape.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.bodies: dict[Kind, dict[str, Any]] = {}
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = bytearray()

        async def received() -> Message:
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200 and body:
                self._keep(scope["path"], bytes(body))
            await send(message)

        await self._app(scope, received, sent)

    def _keep(self, path: str, body: bytes) -> None:
        reduced = json.loads(re.sub(r"data:image/[\w.+-]+;base64,[\w+/=]+", IMAGE, body.decode()))
        self.bodies.setdefault((path, json.dumps(shape(reduced))), {"path": path, "body": reduced})


def shape(value: Any) -> Any:
    """What two requests of one kind have in common: their fields, and the kinds of values."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner) for inner in value]
    return type(value).__name__


def row(client: Client, result: str) -> str:
    """The client's line of the document's table."""
    versions = ", ".join(f"`{package}`" for package in client.packages)
    return f"| {client.name} | {versions} | {', '.join(client.checks)} | {result} |"


def result_of(client: Client, url: str) -> str:
    """What the document says of a client now."""
    try:
        folder = installed(client, CACHE)
    except NotInstalledError as error:
        return f"not run: {error}"
    problems, errors = drive(client, folder, url)
    failed = [check for check in client.checks if problems.get(check, "not reached")]
    if failed:
        print(problems, errors, sep="\n", file=sys.stderr)
    return f"fails: {', '.join(failed)}" if failed else "works"


def rewrite(document: Path, client: Client, result: str) -> None:
    """Replaces the client's row."""
    text = document.read_text("utf-8")
    new, count = re.subn(
        rf"^\| {re.escape(client.name)} \|.*$", lambda _: row(client, result), text, flags=re.MULTILINE
    )
    assert count == 1, f"{document} has {count} rows of {client.name}"
    document.write_text(new, "utf-8")


def main(ids: list[str]) -> None:
    """Drives the named clients, or all."""
    llm = AsyncLLM("builtin", EngineOptions(num_threads=1))
    recorder = Recorder(create_app(InProcessBackend(llm), ApiOptions()))
    with serving(recorder) as url:
        for client in CLIENTS:
            if ids and client.id not in ids:
                continue
            recorder.bodies.clear()
            result = result_of(client, url)
            print(f"{client.id}: {result}", flush=True)
            rewrite(DOCUMENT, client, result)
            if recorder.bodies:
                BODIES.mkdir(exist_ok=True)
                lines = ",\n".join(json.dumps(case) for case in recorder.bodies.values())
                (BODIES / f"{client.id}.json").write_text(f"[\n{lines}\n]\n", "utf-8")
    llm.close()


if __name__ == "__main__":
    main(sys.argv[1:])
