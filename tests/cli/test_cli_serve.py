"""`llava-serve serve`: a process that answers over HTTP until a signal."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from deployments.tools.local_cluster import cannot_start, free_port
from llava_serve.cli import main
from llava_serve.ray_application import application_package
from support.demo import DEMO_IMAGE, question
from support.paths import ROOT
from support.served_command import serve_command, serve_in_process

MODEL = ROOT / "tests" / "golden" / "checkpoints" / "llava-v1.5-tiny"


def config_of(path: Path, *applications: dict[str, Any], **http: object) -> Path:
    """A Serve config, as on Ray."""
    path.write_text(yaml.safe_dump({"http_options": http, "applications": list(applications)}))
    return path


def test_serve_in_process_takes_the_options_of_a_config(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sesame\n")
    api: dict[str, Any] = {"model_name": "mine", "unknown_fields": "ignore", "api_keys_file": str(tmp_path / "keys")}
    api |= {"default_timeout_s": 50, "cors_origins": ["https://app.example.org"]}
    args = {
        "model": "elsewhere",
        "engine": {"max_model_len": 400},
        "images": {"links": ["no.host.invalid"]},
        "api": api,
    }
    config = config_of(tmp_path / "mine.yaml", {"args": args | {"conv_mode": "vicuna_v1"}}, host="0.0.0.0", port=1)
    flags = ("--host", "127.0.0.1", "--port", 0, "--api-key", "open", config)
    with serve_in_process(MODEL, *flags, named="mine") as (url, process), httpx.Client(base_url=url, timeout=60) as web:
        assert process.stdout is not None
        printed = process.stdout.readline()
        assert web.get("/v1/models", headers={"Authorization": "Bearer sesame"}).json()["data"][0]["id"] == "mine"
        web.headers = {"Authorization": "Bearer open", "Origin": "https://app.example.org"}
        part = {"type": "image_url", "image_url": {"url": "https://no.host.invalid/a.png"}}
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 900, "ignore_eos": True, "colour": 1}
        answer = web.post("/v1/chat/completions", json=body)
        link = web.post("/v1/chat/completions", json=body | {"messages": [{"role": "user", "content": [part]}]})
        metrics = web.get(printed.removeprefix("Metrics: ").strip())
    assert (metrics.status_code, "llava_requests_total" in metrics.text) == (200, True)
    assert answer.headers["x-llava-serve-notes"] == "colour: ignored"
    assert answer.headers["access-control-allow-origin"] == "https://app.example.org"
    assert answer.json()["usage"]["total_tokens"] == 400
    assert link.status_code == 400
    assert "its host is unknown here" in link.json()["error"]["message"]


@pytest.mark.parametrize(
    ("applications", "http", "sentence"),
    [
        ([{"args": {"images": {"link": "public"}}}], {}, "args.images.link: unknown; did you mean links?"),
        ([{"args": {"engine": {"max_num_seqs": 0}}}], {}, "args.engine.max_num_seqs: must be 1 or more"),
        (
            [{"args": {"engine": {"compile": "always"}}}],
            {},
            "args.engine.compile: must be one of 'auto', True or False",
        ),
        ([{"args": {}}, {"args": {}}], {}, "has several applications"),
        ([], {}, "is not a Serve config with an application"),
        ([{"args": {}}], {"port": "http"}, "http_options.port a number"),
        ([{"args": {}}], {"host": "0.0.0.0", "port": 0}, "On 0.0.0.0 anyone who reaches this machine"),
    ],
)
def test_a_config_that_cannot_be_served_in_process_is_refused(
    applications: list[dict[str, Any]],
    http: dict[str, object],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = config_of(tmp_path / "mine.yaml", *applications, **http)
    assert main(["serve", "--in-process", str(config)]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("stop", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.extended)])
def test_serve_in_process_answers_and_drains(stop: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("simsim\n\n sesame \n")
    keys = ("--api-key", "open", "--api-key-file", tmp_path / "keys", "--log-format", "json")
    with serve_in_process(MODEL, "--dtype", "bfloat16", "--port", 0, *keys, named=MODEL.name) as (url, process):
        assert httpx.get(f"{url}/v1/models", timeout=60).status_code == 401
        body = {
            "model": "llava-v1.5-tiny",
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 1500,
            "ignore_eos": True,
            "stream": True,
        }
        for key in ("open", "simsim", "sesame"):
            header = {"Authorization": f"Bearer {key}"}
            assert httpx.get(f"{url}/v1/models", headers=header, timeout=60).status_code == 200
        pictures = {"messages": question("What?", DEMO_IMAGE.read_bytes(), b"not a picture")}
        refused = httpx.post(f"{url}/v1/chat/completions", json=body | pictures, headers=header, timeout=60)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "messages[0].content[1]"
        children = psutil.Process(process.pid).children()
        # Pictures are not decoded in the server's own process.
        assert any("llava_serve.images.decode_worker" in child.cmdline() for child in children)
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=header) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(stop)
            while (probed := httpx.get(f"{url}/health", timeout=60)).status_code == 200:
                time.sleep(0.01)
            assert (probed.status_code, probed.headers["retry-after"]) == (503, "1")
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(timeout=60) == 0
        assert process.stderr is not None
        logged = list(map(json.loads, process.stderr))
        assert [line["message"] for line in logged if line["logger"] == "llava_serve.api.limiter"] == [
            "Draining: new requests are refused; 1 in flight are finished."
        ]
        assert {line["level"] for line in logged} == {"INFO"}
        requests = [line for line in logged if line["logger"] == "llava_serve.access"]
        assert [(line["status"], line.get("reason"), line.get("output_tokens")) for line in requests] == [
            (401, "invalid_api_key", None),
            (400, "invalid_image", 0),
            (200, None, body["max_tokens"]),
        ]
        assert psutil.wait_procs(children, timeout=10)[1] == []


def test_a_port_in_use_is_one_sentence_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--in-process", "--port", str(port)]) == 2
    assert capfd.readouterr().err == f"llava-serve: Port {port} is in use; choose another with --port.\n"


@pytest.mark.parametrize("name", ["{package}/__init__.py", "{package}.py"])
def test_a_package_here_that_would_be_taken_for_the_application_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    package = application_package()  # it has another name where the library is installed than beside it
    name = name.format(package=package)
    (tmp_path / package).mkdir()
    (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert main(["serve", "--port", "0"]) == 2
    said = f"llava-serve: Here, {name} would be taken for the application: change to another folder.\n"
    assert capfd.readouterr().err == said


def test_what_ray_says_when_it_is_too_slow_is_said_in_our_words(tmp_path: Path) -> None:
    log = "Traceback (most recent call last):\nException: The current node timed out during startup. This could ...\n"
    said = str(cannot_start(log, tmp_path / "serve.log"))
    assert said.startswith("The application cannot start: Ray did not start within its 30 s, since the machine is busy")


REFUSED: list[tuple[list[str], str]] = [
    (["--port", "{taken}"], "Port {taken} is in use; choose another with --port."),
    (["--port", "80000"], "There is no port 80000: choose one from 0 to 65535 with --port."),
    (["--model", "{folder}"], "config.json is missing in {folder}"),
    (["--api-key-file", "{folder}/keys"], "The file of API keys {folder}/keys holds no key"),
    (["--host", "0.0.0.0"], "On 0.0.0.0 anyone who reaches this machine could use the server. Require a key"),
    (
        ["--profile", "{folder}/nothing.env"],
        "There is no profile {folder}/nothing.env; the one that ships is called production.",
    ),
    (["--config", "{folder}/keys"], "{folder}/keys is not a Serve config with an application."),
]


def test_what_ray_is_not_needed_for_is_reported_before_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(" \n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        places = {"taken": taken.getsockname()[1], "folder": tmp_path}
        each = [["--port", "0", *(flag.format(**places) for flag in flags)] for flags, _ in REFUSED]
        script = (
            f"import sys; from deployments.tools.serve import main; print(*map(main, {each}), 'ray' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2"] * len(REFUSED) + ["False"]
    for line, (_, sentence) in zip(done.stderr.splitlines(), REFUSED, strict=True):
        assert line.startswith(sentence.format(**places))


def test_serve_refuses_a_config_with_a_typo(tmp_path: Path) -> None:
    config = tmp_path / "typo.yaml"
    config.write_text((ROOT / "serve_config.yaml").read_text().replace("num_replicas:", "num_replica:"))
    done = subprocess.run(serve_command(config), cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "num_replica: unknown; did you mean num_replicas?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.extended
def test_serve_starts_the_application_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    port = free_port()
    config = tmp_path / "config.yaml"
    config.write_text((ROOT / "serve_config.yaml").read_text().replace("port: 8000", f"port: {port}"))
    process = subprocess.Popen(
        serve_command(config),
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert any(line.startswith(b"Serving on ") for line in process.stdout)
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C goes to the whole group
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert said.count(b"Draining") == 1
        assert b"Traceback" not in said
    finally:
        process.kill()
        process.communicate()
