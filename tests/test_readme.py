"""The README's commands and code run unchanged."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.paths import ROOT

README = (ROOT / "README.md").read_text("utf-8")
CONSOLE = re.findall(r"```console\n\$ (.+)\n(.+)\n```", README)
CURL = re.findall(r"^(curl .+?)```", README, re.DOTALL | re.MULTILINE)
PYTHON = [code for code in re.findall(r"```python\n(.+?)```", README, re.DOTALL) if "a running application" not in code]


def test_there_is_something_to_run() -> None:
    assert CONSOLE
    assert PYTHON
    assert README.index("```console") < README.index("## ")


@pytest.mark.parametrize(("command", "printed"), CONSOLE)
def test_commands_print_what_they_show_and_import_no_ray(command: str, printed: str) -> None:
    scripts = Path(sys.executable).parent
    assert command.startswith("llava-serve ")
    traced = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}  # each import is a line on standard error
    done = subprocess.run(
        f"{scripts}/{command}", shell=True, cwd=ROOT, env=traced, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == printed
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "llava_serve.llm" in imported
    assert "ray" not in imported


@pytest.mark.parametrize("code", PYTHON)
def test_python_runs(code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("The circle is red. stop ")
    assert len(printed) == 5


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_the_answer(served: Any) -> None:
    [command] = CURL
    port = served.url.rsplit(":", 1)[1]
    assert command.count("localhost:8000") == 1
    command = command.replace("localhost:8000", f"localhost:{port}")
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == "The circle is red."


def test_named_files_and_targets_are_there() -> None:
    links = re.findall(r"\]\(([\w./-]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert len(links) > 5
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"make ([a-z][\w-]*)", README))
    assert {"demo", "test", "serve"} <= targets <= set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
