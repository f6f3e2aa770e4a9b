"""What the README shows is run as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
CONSOLE = re.findall(r"```console\n\$ (.+)\n(.+)\n```", README)
PYTHON = [code for code in re.findall(r"```python\n(.+?)```", README, re.DOTALL) if "a running application" not in code]


def test_there_is_something_to_run() -> None:
    assert CONSOLE
    assert PYTHON
    assert README.index("```console") < README.index("## ")


@pytest.mark.parametrize(("command", "printed"), CONSOLE)
def test_commands_print_what_they_show(command: str, printed: str) -> None:
    scripts = Path(sys.executable).parent
    assert command.startswith("llava-serve ")
    done = subprocess.run(f"{scripts}/{command}", shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == printed


@pytest.mark.parametrize("code", PYTHON)
def test_python_runs(code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("The circle is red. stop ")
    assert len(printed) == 4


def test_named_files_and_targets_are_there() -> None:
    for link in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / link).exists(), link
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in set(re.findall(r"make ([a-z][\w-]*)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
