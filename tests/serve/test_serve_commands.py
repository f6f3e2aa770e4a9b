"""The commands that start an application of their own: the demo, `make serve`, and Ray's `serve run`."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from openai import OpenAI

from deployments.tools.config import read_config
from deployments.tools.local_cluster import LocalClusterError, environment, free_port, local_cluster
from support.api_server import wait_until
from support.demo import DEMO_ANSWER, DEMO_IMAGE, DEMO_QUESTION, question
from support.paths import CONFIG, ROOT

pytestmark = pytest.mark.extended


def test_requests_in_flight_are_finished() -> None:
    config = read_config(CONFIG, port=free_port())
    pieces: list[str] = []
    finish: list[str | None] = []
    begun = threading.Semaphore(0)

    def read(url: str) -> None:
        with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            chunks = client.chat.completions.create(
                model="builtin",
                messages=question(DEMO_QUESTION, DEMO_IMAGE.read_bytes()),
                max_tokens=400,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            begun.release()  # it has the answer's head
            for chunk in chunks:
                pieces.append(chunk.choices[0].delta.content or "")
                finish.append(chunk.choices[0].finish_reason)

    health: list[int] = []

    def probe(url: str) -> None:
        """Until nothing listens any more."""
        with contextlib.suppress(httpx.TransportError):
            while True:
                health.append(httpx.get(f"{url}/health", timeout=60).status_code)
                time.sleep(0.1)

    with local_cluster(config, num_cpus=2) as running:
        readers = [threading.Thread(target=read, args=(running.url,)) for _ in range(4)]
        prober = threading.Thread(target=probe, args=(running.url,))
        for thread in (*readers, prober):
            thread.start()
        assert all(begun.acquire(timeout=60) for _ in readers)
    for thread in (*readers, prober):
        thread.join(60)
    assert finish.count("length") == len(readers)
    assert health[0] == 200
    assert 503 in health
    assert 200 not in health[health.index(503) :]


def test_rays_own_command_runs_the_config(tmp_path: Path) -> None:
    port = free_port()
    config = tmp_path / "serve_config.yaml"
    config.write_text(yaml.safe_dump(read_config(CONFIG, port=port)))
    # A shell's background jobs ignore the signal, and with them what they start.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "ray.serve.scripts", "run", str(config)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment("t" * 64), start_new_session=True)
    try:
        wait_for_health(f"http://127.0.0.1:{port}", process)
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            messages = question(DEMO_QUESTION, DEMO_IMAGE.read_bytes())
            answer = client.chat.completions.create(model="builtin", messages=messages, temperature=0, max_tokens=40)
        assert DEMO_ANSWER in (answer.choices[0].message.content or "").lower()
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(120)
        finally:
            with contextlib.suppress(ProcessLookupError):  # all of it has ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for_health(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            assert response.status == 200
            return
        time.sleep(0.5)
    raise AssertionError("the application did not come up")


def test_the_demo_prints_the_right_answer() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deployments.tools.demo"], capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert "Answer:" in done.stdout
    assert "tokens/s" in done.stdout


def test_a_wrong_answer_fails_the_demo() -> None:
    command = [sys.executable, "-m", "deployments.tools.demo", "--answer", "no such word"]
    assert subprocess.run(command, capture_output=True, check=False, timeout=280).returncode == 1


def serve(*flags: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """`make serve` on a free port, once it prints that it serves."""
    command = [sys.executable, "-m", "deployments.tools.serve", "--config", CONFIG, "--port", free_port(), *flags]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("Serving on"):
            break
    stages = [line.strip() for line in printed if line.startswith("  ")]
    assert "Ray runs; Serve starts" in stages
    assert any(line.startswith("starting: ") for line in stages)
    assert any(line.startswith("The model is on ") for line in printed)
    [metrics] = [re.findall(r"http://\S+", line) for line in printed if line.startswith("Metrics: ")]
    of_all_tiers, of_the_ingress = metrics
    wait_until(lambda: "ray_serve_" in httpx.get(of_all_tiers, timeout=60).raise_for_status().text)
    assert "llava_requests_in_flight" in httpx.get(of_the_ingress, timeout=60).raise_for_status().text
    return process


def test_serve_ends_normally_at_an_interrupt_and_may_log_to_its_own_output() -> None:
    process = serve("--log", "-")
    below = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in child.name() for child in below)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "Draining: new requests are refused, and requests in flight are finished." in printed  # by Ray's process
    _, alive = psutil.wait_procs(below, timeout=20)
    assert not alive


def test_rays_own_commands_work_with_what_is_printed_and_the_log_is_kept(tmp_path: Path) -> None:
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 64, "PYTHONPATH": str(ROOT)}
    port, changed, log = free_port(), tmp_path / "changed.yaml", tmp_path / "serve.log"
    config = read_config(CONFIG, port=port)
    config["applications"][0]["deployments"][0]["user_config"] = {"aliases": ["another"]}
    changed.write_text(yaml.safe_dump(config))

    def run(module: str, *arguments: str) -> str:
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    process = serve("--port", port, "--dashboard", free_port(), "--log", log, env=env)
    try:
        assert process.stdout is not None
        printed = ""
        while "RAY_ADDRESS=" not in printed:
            printed += process.stdout.readline()
        [dashboard] = re.findall("Ray's dashboard: ([^;]+);", printed)
        env["RAY_ADDRESS"] = printed.split("RAY_ADDRESS=")[1].split()[0]
        wait_until(lambda: "1.75/" in run("ray.scripts.scripts", "status"))  # CPUs that the replicas have
        run("ray.serve.scripts", "deploy", "-a", dashboard, str(changed))
        wait_until(lambda: "another" in httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=60).text)
        status = yaml.safe_load(run("ray.serve.scripts", "status", "-a", dashboard))
        assert status["applications"]["llava"]["status"] == "RUNNING"
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    assert process.returncode == 0
    assert "LlavaModel" in log.read_text("utf-8")


def test_serve_ends_when_the_application_does() -> None:
    process = serve()
    [runner] = psutil.Process(process.pid).children()
    below = runner.children(recursive=True)
    runner.kill()
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "ended by itself" in printed
    log = Path(printed.split("Log: ")[1].strip())
    assert log.exists()
    _, alive = psutil.wait_procs(below, timeout=60)
    assert not alive
    shutil.rmtree(log.parent)


def test_a_model_that_cannot_be_loaded_is_reported_with_the_log(tmp_path: Path) -> None:
    config = read_config(CONFIG, port=free_port())
    config["applications"][0]["args"]["model"] = str(tmp_path)  # as a folder that is there, and not where a replica is
    with pytest.raises(LocalClusterError) as failure, local_cluster(config, num_cpus=2):
        pass
    reason, log = str(failure.value).split("\nLog: ")
    assert re.search(r"CheckpointError: .*config\.json", reason)
    assert "CheckpointError" in Path(log).read_text()
    shutil.rmtree(Path(log).parent)
