"""The steps of the image, run in a root of their own, and what comes of them: served as the manifests run it."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from deployments.tools.local_cluster import free_port
from support.demo import DEMO_IMAGE, DEMO_QUESTION, question
from support.image import NEEDED, Stage, build
from support.kubernetes import rendered

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KEY = secrets.token_hex(16)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """The target `cpu`. TORCH_CPU names the index of torch's CPU build, where pip's own settings do not."""
    if os.getuid() != 0 or (missing := [name for name in NEEDED if shutil.which(name) is None]):
        pytest.skip("the steps need root and " + ", ".join(missing if os.getuid() == 0 else NEEDED))
    folder = tmp_path_factory.mktemp("image")
    links, certificate = os.environ.get("PIP_FIND_LINKS", ""), os.environ.get("PIP_CERT", "")
    places = ("/etc/resolv.conf", links, certificate)
    machine = {place.lstrip("/"): Path(place) for place in places if place.startswith("/") and Path(place).exists()}
    arguments = {"TORCH_CPU": os.environ.get("TORCH_CPU", "file:///nowhere")}
    try:
        yield build("cpu", folder, arguments, machine)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(image: Stage, *program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = image.variables | variables
    command = image.command(*program, read_only=True)
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_its_user_can_write_nothing_but_tmp(image: Stage) -> None:
    done = run(image, "sh", "-c", "id -u; touch /tmp/x && echo yes; touch /app/x || echo no")
    assert done.stdout.split() == ["1000", "yes", "no"]


def test_it_has_a_compiler_and_the_proxy_of_the_profile(image: Stage) -> None:
    program = "echo '#include <cmath>\nint main() {}' | g++ -x c++ -o /tmp/a - && /tmp/a && haproxy-without-splice -v"
    done = run(image, "sh", "-c", program)
    assert done.returncode == 0, done.stderr
    assert "HAProxy version" in done.stdout


def test_it_serves_nobody_without_a_key(image: Stage) -> None:
    done = run(image, *image.entrypoint)
    assert done.returncode == 2
    assert "anyone who reaches this machine" in done.stderr


def test_it_answers_with_a_read_only_root_and_the_settings_of_the_pods(image: Stage) -> None:
    """Under the production profile, as the manifests have it."""
    [settings] = [each["data"] for each in rendered("base") if each["kind"] == "ConfigMap"]
    port = free_port()
    command = image.command(*image.entrypoint, "--port", str(port), "--profile", "production", read_only=True)
    environment = image.variables | {"HOME": settings["HOME"], "LLAVA_API_KEYS": KEY}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout is not None
            printed = []
            for line in process.stdout:
                printed.append(line)
                if line.startswith("Serving on"):
                    break
            else:
                pytest.fail("".join(printed))
            url = f"http://127.0.0.1:{port}"
            *check, address = image.health
            done = run(image, *check, address.replace("http://127.0.0.1:8000", url))
            assert done.returncode == 0, done.stderr
            asked = {"model": "builtin", "temperature": 0, "messages": question(DEMO_QUESTION, DEMO_IMAGE.read_bytes())}
            assert httpx.post(f"{url}/v1/chat/completions", json=asked).status_code == 401
            header = {"Authorization": f"Bearer {KEY}"}
            answer = httpx.post(f"{url}/v1/chat/completions", json=asked, headers=header, timeout=120)
            assert answer.json()["choices"][0]["message"]["content"] == "The circle is red."
            processes = psutil.Process(process.pid).children(recursive=True)
            assert {each.nice() for each in processes} == {psutil.Process().nice()}  # Ray's own is 15 for replicas
        finally:
            process.kill()  # and with it the namespace's other processes
