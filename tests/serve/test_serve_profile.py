"""The production profile: behind HAProxy and over gRPC the application answers as it does under Serve's defaults."""

from __future__ import annotations

import io
import json
import os
import selectors
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from PIL import Image

from deployments.tools.config import read_config
from deployments.tools.listening import listening
from deployments.tools.local_cluster import free_port, local_cluster
from deployments.tools.serve_env import ServeEnvError, read_serve_env
from support.bursts import at_rest, burst, remaining
from support.demo import DEMO_ANSWER, DEMO_IMAGE, DEMO_QUESTION, question
from support.paths import CONFIG, ROOT
from testbed.counted import counted_config

PROFILE = ROOT / "production.env"


@pytest.fixture(scope="module")
def production() -> Iterator[str]:
    """The application under the production profile; its URL."""
    with local_cluster(counted_config(), num_cpus=2, profile=read_serve_env(PROFILE)) as running:
        yield running.url


@pytest.fixture
def production_client(production: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{production}/v1", api_key="none", max_retries=0, timeout=120) as openai:
        yield openai


def post(url: str, headers: dict[str, str]) -> Any:
    """The response to a small question, with its status and headers."""
    body = {"model": "builtin", "messages": question("Hello"), "max_tokens": 2}
    headers = {"content-type": "application/json"} | headers
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        return response


@pytest.mark.extended
def test_it_answers_streamed_and_whole(production_client: OpenAI) -> None:
    asked: Any = {"model": "builtin", "messages": question(DEMO_QUESTION, DEMO_IMAGE.read_bytes()), "temperature": 0}
    whole = production_client.chat.completions.create(**asked, max_tokens=20)
    stream = production_client.chat.completions.create(**asked, max_tokens=20, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert DEMO_ANSWER in (whole.choices[0].message.content or "").lower()
    assert "".join(pieces) == whole.choices[0].message.content


@pytest.mark.extended
def test_a_picture_beyond_grpcs_own_limit_is_answered(production_client: OpenAI) -> None:
    noise = io.BytesIO()
    Image.frombytes("RGB", (1500, 1500), os.urandom(1500 * 1500 * 3)).save(noise, "PNG")
    assert len(noise.getvalue()) > 4 << 20
    messages: Any = question("What is it?", noise.getvalue())
    completion = production_client.chat.completions.create(model="builtin", messages=messages, max_tokens=2)
    assert completion.usage is not None


@pytest.mark.extended
def test_an_answer_has_its_id_once_and_a_client_cannot_control_serve(production: str, served: Any) -> None:
    for url in (production, served.url):
        # Serve would read "0.001" as this request's time and answer 408 before the application is asked.
        response = post(url, {"x-request-id": "mine", "x-request-timeout-seconds": "0.001"})
        assert response.status == 200
        assert response.headers.get_all("x-request-id") == ["mine"]


@pytest.mark.extended
async def test_a_burst_of_disconnects_leaves_no_work(
    production: str, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    rest = await at_rest(production)
    await burst(production, 20, within_s=0.4)
    wait_until(lambda: remaining(production) == rest)


def half_sent(url: str, connections: ExitStack) -> socket.socket:
    """A connection with the beginning of a request."""
    host, port = url.removeprefix("http://").split(":")
    connection = connections.enter_context(socket.create_connection((host, int(port)), timeout=60))
    connection.sendall(b"POST /v1/chat/completions HT")
    return connection


def ended(connection: socket.socket, timeout_s: float = 0.2) -> bool:
    """The server has answered 408, or ended the connection."""
    return bool(readable([connection], timeout_s))


def readable(connections: list[socket.socket], timeout_s: float) -> list[Any]:
    """Those that have something to read, or have ended; also beyond the 1,024 files of `select.select`."""
    with selectors.DefaultSelector() as selector:
        for each in connections:
            selector.register(each, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(timeout_s)]


@pytest.mark.extended
def test_many_half_sent_requests_do_not_hinder_another(production: str) -> None:
    with ExitStack() as connections:
        waiting = [half_sent(production, connections) for _ in range(1000)]
        start = time.monotonic()
        assert post(production, {}).status == 200
        assert time.monotonic() - start < 20
        assert readable(waiting, 0) == []  # all of them still wait


@pytest.mark.extended
def test_a_client_that_sends_nothing_is_disconnected_and_one_that_waits_is_not() -> None:
    limit_s = 1
    profile = read_serve_env(PROFILE) | {"RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(limit_s)}
    with local_cluster(read_config(CONFIG, port=free_port()), num_cpus=2, profile=profile) as running:
        lines = listening(running.process.pid, running.ports)
        this = lines.index("Only this machine reaches:")
        assert [line.split(":")[0] for line in lines[1:this]] == ["  replicas' gRPC (token), and HTTP behind HAProxy"]
        assert {"  HAProxy's statistics", "  HAProxy's metrics"} <= {line.split(":")[0] for line in lines[this:]}
        with ExitStack() as connections:
            silent, slow = half_sent(running.url, connections), half_sent(running.url, connections)
            start = time.monotonic()
            while not ended(slow):
                assert time.monotonic() - start < 10 * limit_s
                with suppress(ConnectionError):
                    slow.sendall(b"x")  # a byte of the head at a time
            assert ended(silent, timeout_s=10 * limit_s)
        with OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=600) as client:
            messages: Any = question("Hello")
            forever: Any = {"ignore_eos": True, "timeout": 600}
            choices, taken = 1, 0.0
            while taken < 2 * limit_s:
                start = time.monotonic()
                whole = client.chat.completions.create(
                    model="builtin", messages=messages, n=choices, max_tokens=800, extra_body=forever
                )
                taken = time.monotonic() - start
                assert [choice.finish_reason for choice in whole.choices] == ["length"] * choices
                choices *= 4


def test_a_profile_holds_settings_of_serve_alone(tmp_path: Path) -> None:
    assert read_serve_env(PROFILE)["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert read_serve_env(Path("production")) == read_serve_env(PROFILE)
    with pytest.raises(ServeEnvError, match="no profile"):
        read_serve_env(tmp_path / "nothing.env")
    (tmp_path / "wrong.env").write_text("# a comment\nRAY_SERVE_ENABLE_HA_PROXY=1\nHTTP_PROXY=x\n")
    with pytest.raises(ServeEnvError, match="HTTP_PROXY"):
        read_serve_env(tmp_path / "wrong.env")


def test_haproxy_lets_answers_end_and_serve_config_agrees() -> None:
    profile = read_serve_env(PROFILE)
    config = read_config(CONFIG)
    for name in ("HARD_STOP_AFTER_S", "TIMEOUT_SERVER_S"):
        longest = config["applications"][0]["args"]["api"]["max_timeout_s"]
        assert int(profile[f"RAY_SERVE_HAPROXY_{name}"]) > longest
    by_default = config["controller_options"]["runtime_env"]["env_vars"]
    assert by_default.items() <= profile.items()


def test_the_image_has_the_haproxy_of_the_profile() -> None:
    path = read_serve_env(PROFILE)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    targets = (ROOT / "Dockerfile").read_text().split("\nFROM runtime AS ")[1:]
    assert len(targets) == 2
    for target in targets:
        assert f"python -m llava_serve_deployments.tools.haproxy {path}\n" in target
