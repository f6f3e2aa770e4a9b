"""Requests that real clients have sent (`support.recorded_clients` records them): each is answered as it asks."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.clients import CLIENTS
from support.demo import DEMO_IMAGE

BODIES = Path(__file__).parent / "client_bodies"
CASES = [(path.stem, case) for path in sorted(BODIES.glob("*.json")) for case in json.loads(path.read_text("utf-8"))]

OBJECTS = {
    "/v1/chat/completions": "chat.completion",
    "/v1/completions": "text_completion",
    "/v1/responses": "response",
}


def test_every_client_has_recorded_requests() -> None:
    assert {name for name, _ in CASES} == {client.id for client in CLIENTS}


@pytest.mark.parametrize("case", [case for _, case in CASES], ids=[f"{name}-{case['path']}" for name, case in CASES])
def test_it_is_answered_as_it_asks(web: httpx.Client, case: dict[str, Any]) -> None:
    path, body = case["path"], case["body"]
    text = json.dumps(body).replace("@DEMO_PNG_BASE64@", base64.b64encode(DEMO_IMAGE.read_bytes()).decode())
    response = web.post(path, content=text, headers={"Content-Type": "application/json"})
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        assert response.headers["content-type"] == "application/json"
        answer = response.json()
        if path == "/tokenize":
            assert answer["count"] == len(answer["tokens"]) > 0
        else:
            assert answer["object"] == OBJECTS[path]
            assert answer["usage"]
        return
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, last = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert "error" not in json.loads(events[0])
    if path == "/v1/responses":
        assert json.loads(last)["type"] == "response.completed"
    else:
        assert last == "[DONE]"
        assert json.loads(events[0])["object"] == f"{OBJECTS[path]}{'.chunk' if 'chat' in path else ''}"
