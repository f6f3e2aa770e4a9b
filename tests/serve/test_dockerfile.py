"""The Dockerfile: linted, and what can be seen without an engine that builds it. `test_image.py` runs its steps."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.tools.serve import KEYS_FILE_VARIABLE, MODEL_VARIABLE
from llava_serve import __version__
from llava_serve.api.keys import KEYS_VARIABLE
from llava_serve.cli.ports import OPEN_VARIABLE
from support.paths import ROOT

DOCKERFILE = ROOT / "Dockerfile"
TEXT = DOCKERFILE.read_text()
[ENTRYPOINT] = [json.loads(found) for found in re.findall(r"^ENTRYPOINT (.+)$", TEXT, re.MULTILINE)]


def lint(path: Path) -> str:
    linter = Path(sys.executable).parent / "hadolint"
    return subprocess.run([linter, "--no-color", path], capture_output=True, text=True, check=False).stdout


def test_hadolint_finds_nothing() -> None:
    assert lint(DOCKERFILE) == ""


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text(TEXT.replace("# hadolint ignore=DL3008\n", "").replace("USER 1000:1000", "USER ray"))
    found = lint(path)
    assert "DL3008" in found
    assert "DL3066" in found


def test_each_target_has_what_serves_and_no_root() -> None:
    assert re.search(r"^ARG BASE=python:3\.11\.\d+-slim-\w+$", TEXT, re.MULTILINE)
    stages = re.split(r"^FROM ", TEXT, flags=re.MULTILINE)[1:]
    assert [stage.split()[2] for stage in stages] == ["wheel", "runtime", "cpu", "cuda"]
    for stage in stages[2:]:
        assert stage.split()[0] == "runtime"
        assert stage.rstrip().endswith("USER 1000:1000")  # a number: Kubernetes looks at it
    [packages] = re.findall(r"apt-get install --yes --no-install-recommends (.+) \\", stages[1])
    assert {"g++", "libc6-dev"} <= set(packages.split())  # g++ brings gcc, which Triton calls
    assert f'image.version="{__version__}"' in stages[1]


def test_all_that_is_copied_is_there_and_not_ignored() -> None:
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", TEXT, re.MULTILINE) for name in line.split()}
    copied |= set(re.findall(r"type=bind,source=([\w.]+)", TEXT))
    assert all((ROOT / name).exists() for name in copied)
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == kept


def test_the_health_check_asks_what_is_answered(served: Any) -> None:
    [command] = re.findall(r"^HEALTHCHECK .+\\\n +CMD (.+)$", TEXT, re.MULTILINE)
    *_, url = json.loads(command)
    path = url.removeprefix("http://127.0.0.1:8000")
    assert httpx.get(f"{served.url}{path}").status_code == 200


def start(**variables: str) -> subprocess.CompletedProcess[str]:
    """The image's command with what it refuses before anything starts."""
    command = [sys.executable, "-m", "llava_serve.cli", *ENTRYPOINT[1:], "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLAVA_")} | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_it_serves_nobody_without_a_key() -> None:
    assert ENTRYPOINT[0] == "llava-serve"
    done = start()
    assert done.returncode == 2
    assert done.stderr.startswith("On 0.0.0.0 anyone who reaches this machine could use the server.")


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({MODEL_VARIABLE: "/nowhere/llava"}, "/nowhere/llava"),
        ({KEYS_FILE_VARIABLE: "/nowhere/keys"}, "The file of API keys /nowhere/keys cannot be read."),
        ({KEYS_VARIABLE: "two words"}, f"{KEYS_VARIABLE}: key 1 is not KEY, name:KEY or name:sha256:HEX."),
    ],
)
def test_the_environment_names_the_model_and_the_keys(variables: dict[str, str], sentence: str) -> None:
    done = start(**variables)
    assert done.returncode == 2
    assert sentence in done.stderr


def test_what_the_dockerfile_says_of_the_environment_is_so() -> None:
    assert set(re.findall(r"-e (LLAVA_\w+)", TEXT)) == {
        MODEL_VARIABLE,
        KEYS_VARIABLE,
        KEYS_FILE_VARIABLE,
        OPEN_VARIABLE,
    }
