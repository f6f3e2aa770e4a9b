"""What the page on batch jobs shows is what happens."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from llava_serve.cli import main
from support.paths import BUILTIN, ROOT

PAGE = (ROOT / "docs" / "batch.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    """A page's code blocks; one that is not run gives its reason in its first line."""
    found = re.findall(rf"^```{language}\n(.+?)^```", PAGE, re.DOTALL | re.MULTILINE)
    return [block for block in found if not re.match(r"# not run: .{5}", block)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.png").write_bytes((BUILTIN / "demo.png").read_bytes())
    return tmp_path


def test_the_command_writes_what_the_page_shows(folder: Path) -> None:
    [questions], [command], [answers] = blocks("csv"), blocks("sh"), blocks("json")
    (folder / "questions.csv").write_text(questions)
    assert main(shlex.split(command)[1:]) == 1
    written = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert all(line.pop("version") for line in written)
    assert written == [json.loads(line) for line in answers.splitlines()]


def test_the_python_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [code] = blocks("python")
    exec(compile(code, "docs/batch.md", "exec"), {})
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "How many shapes are there? There are two shapes in the picture.",
        "What colour is the circle? The circle is red.",
    ]
