"""API keys and their limits in the Serve application."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from deployments.tools.config import read_config
from deployments.tools.local_cluster import free_port, local_cluster
from llava_serve.api.keys import KEYS_VARIABLE
from support.demo import question
from support.paths import CONFIG

pytestmark = pytest.mark.extended

FIRST, SECOND, THIRD = "sk-first-8d1f2c", "sk-second-77b0aa", "sk-third-0c9e51"


def test_keys_change_limit_and_are_not_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"web:{FIRST}\n")
    monkeypatch.setenv(KEYS_VARIABLE, f"batch:{SECOND}")
    config = read_config(CONFIG, port=free_port(), api_keys_file=str(keys))
    config["applications"][0]["args"]["api"]["requests_per_minute_per_key"] = 2
    with local_cluster(config, num_cpus=2) as running, httpx.Client(base_url=running.url, timeout=120) as web:

        def bearer(key: str) -> dict[str, str]:
            return {"Authorization": f"Bearer {key}"}

        def status(key: str) -> int:
            return web.get("/v1/models", headers=bearer(key)).status_code

        assert [status(key) for key in (FIRST, SECOND, THIRD)] == [200, 200, 401]
        body = {"model": "builtin", "messages": question("Hello"), "max_tokens": 2}
        asked = [web.post("/v1/chat/completions", json=body, headers=bearer(FIRST)) for _ in range(3)]
        assert [each.status_code for each in asked] == [200, 200, 429]
        assert asked[-1].json()["error"]["code"] == "rate_limit_exceeded"
        assert 20 < int(asked[-1].headers["retry-after"]) <= 30
        assert web.post("/v1/chat/completions", json=body, headers=bearer(SECOND)).status_code == 200

        keys.write_text(f"web:{THIRD}\n")
        wait_until(lambda: status(THIRD) == 200)
        assert status(FIRST) == 401
        keys.write_text("")
        time.sleep(2)  # it is looked at each second
        assert [status(key) for key in (FIRST, SECOND, THIRD)] == [401, 200, 200]

        folder = running.log.parent
        written = [path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
        assert any(b"holds no key" in text and b"ERROR" in text for text in written)
        assert any(str(keys).encode() in text for text in written)
        assert not any(key.encode() in text for key in (FIRST, SECOND, THIRD) for text in written)
