"""The example's nginx, in front of a real server. Debian's nginx is used, installed or unpacked into a folder."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from llava_serve.api import streaming
from llava_serve.config import ApiOptions
from support.api_server import BODY, PATH, PacedBackend, app_over, official, wait_until
from support.paths import ROOT

pytestmark = pytest.mark.slow

EXAMPLE = ROOT / "examples" / "nginx.conf"
WORDS = ("A ", "red ", "circle ", "on ", "white.")
READ_TIMEOUT_S = 1.0
Nginx = Callable[[str], str]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of nginx."""
    if found := shutil.which("nginx"):
        return found
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip("there is no nginx, and no apt-get to get it by")
    folder = tmp_path_factory.mktemp("nginx")
    got = subprocess.run(["apt-get", "download", "nginx"], cwd=folder, capture_output=True, text=True, check=False)
    if got.returncode:
        pytest.skip(f"nginx cannot be had: {got.stderr.strip().splitlines()[-1]}")
    [package] = folder.glob("nginx_*.deb")
    subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    return str(folder / "usr" / "sbin" / "nginx")


@contextmanager
def proxied(program: str, prefix: Path, upstream: str, read_timeout_s: float | None = None) -> Iterator[str]:
    """Runs nginx with the example, in front of `upstream` (host and port); gives its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    site = EXAMPLE.read_text("utf-8")
    changes = {r"server 127\.0\.0\.1:8000;": f"server {upstream};", r"listen 8080;": f"listen 127.0.0.1:{port};"}
    if read_timeout_s is not None:
        changes[r"proxy_read_timeout \w+;"] = f"proxy_read_timeout {int(read_timeout_s * 1000)}ms;"
    for old, new in changes.items():
        site, count = re.subn(old, new, site)
        assert count == 1, old
    (prefix / "site.conf").write_text(site)
    temporary = "\n".join(
        f"{kind}_temp_path {prefix}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (prefix / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {prefix}/pid; error_log {prefix}/error.log;\n"
        f"events {{}}\nhttp {{ access_log off;\n{temporary}\ninclude {prefix}/site.conf; }}\n"
    )
    command = [program, "-p", str(prefix), "-c", str(prefix / "nginx.conf"), "-e", str(prefix / "error.log")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            await_port(port, process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(10)


def await_port(port: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()[1]
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.02)
        else:
            return
    raise AssertionError("nginx does not listen")


def host_of(web: httpx.Client) -> str:
    return f"{web.base_url.host}:{web.base_url.port}"


def test_tokens_come_one_by_one(program: str, tmp_path: Path) -> None:
    with (
        app_over(PacedBackend(words=WORDS, pace_s=0.3)) as web,
        proxied(program, tmp_path, host_of(web)) as url,
        httpx.Client(base_url=url) as through,
    ):
        arrived = []
        for chunk in official(through).chat.completions.create(**BODY, stream=True):
            if chunk.choices[0].delta.content:
                arrived.append((time.monotonic(), chunk.choices[0].delta.content))
    assert "".join(text for _, text in arrived) == "".join(WORDS)
    # Buffered, they would arrive together.
    assert arrived[-1][0] - arrived[0][0] > 0.3 * (len(WORDS) - 1) / 2
    assert len(arrived) == len(WORDS)


def test_comments_keep_a_silent_stream_alive(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_S", READ_TIMEOUT_S / 4)
    with (
        app_over(PacedBackend(words=("Red.",), pace_s=2.5 * READ_TIMEOUT_S)) as web,
        proxied(program, tmp_path, host_of(web), READ_TIMEOUT_S) as url,
        httpx.Client(base_url=url, timeout=30) as through,
    ):
        streamed = through.post(PATH, json=BODY | {"stream": True})
        whole = through.post(PATH, json=BODY)
    assert "Red." in streamed.text
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert whole.status_code == 504  # docs/api.md: an answer that is not streamed is silent


def test_the_largest_body_passes(program: str, tmp_path: Path) -> None:
    with (
        app_over(PacedBackend()) as web,
        proxied(program, tmp_path, host_of(web)) as url,
        httpx.Client(base_url=url, timeout=60) as through,
    ):
        limit = ApiOptions().max_body_bytes
        start = b'{"messages": [{"role": "user", "content": "What is it?"}], "user": ""'
        assert through.post(PATH, content=start + b" " * (limit - len(start) - 1) + b"}").status_code == 200
        assert through.post(PATH, content=b" " * (limit + 1)).status_code == 413


def test_a_disconnect_reaches_the_server(program: str, tmp_path: Path) -> None:
    backend = PacedBackend(pace_s=60)
    with (
        app_over(backend) as web,
        proxied(program, tmp_path, host_of(web)) as url,
        httpx.Client(base_url=url) as through,
    ):
        with pytest.raises(httpx.ReadTimeout):
            through.post(PATH, json=BODY, timeout=2)
        assert backend.samplings  # it was being generated
        wait_until(lambda: backend.working == 0)


def test_a_kept_connection_is_not_used_after_the_server_closes_it(program: str, tmp_path: Path) -> None:
    with (
        app_over(PacedBackend()) as web,
        proxied(program, tmp_path, host_of(web)) as url,
        httpx.Client(base_url=url) as through,
    ):
        for pause_s in (0, 3.9, 4.95, 5.05):
            time.sleep(pause_s)
            assert through.post(PATH, json=BODY).status_code == 200
